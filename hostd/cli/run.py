"""Run a job by hand, and be its terminal."""

from __future__ import annotations

import argparse
import base64
import os
import re
import secrets
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote

from discovery.wire.errors import Invalid
from hostd import imagejob
from hostd.cli.attach import add_detach_keys, left
from hostd.cli.command import add
from hostd.cli.connect import caller_of, job_path, labels_of
from hostd.types import MIB, Image, ImageConfig, ImageUser, Job, JobSpec, Port, Resources, SecretFile, VolumeMount


def _user(arguments: argparse.Namespace, image: Image) -> ImageUser:
    """Ask who the program runs as; numbers need no asking."""
    text = arguments.user or image.config.user or "0"
    if text in ("0", "0:0", "root"):
        return ImageUser(uid=0, gid=0)
    if re.fullmatch(r"\d{1,9}:\d{1,9}", text):
        uid, _, gid = text.partition(":")
        return ImageUser(uid=int(uid), gid=int(gid))
    path = f"/images/{quote(image.name, safe='')}/user"
    caller = caller_of(arguments, timeout_s=600.0)  # the first time, the image is unpacked for it
    return caller.request("GET", path, into=ImageUser, query={"user": text})


def _signal(arguments: argparse.Namespace, image: Image) -> int:
    config = image.config if not arguments.stop_signal else ImageConfig(stop_signal=arguments.stop_signal)
    return imagejob.stop_signal(config)


def _spec(arguments: argparse.Namespace, image: Image, user: ImageUser) -> JobSpec:
    volumes = []
    for word in arguments.volume:
        name, _, path = word.partition(":")
        if not path:
            raise Invalid(f"volume {word!r}", hint="NAME:/PATH, or NAME:/PATH:ro")
        target, _, mode = path.partition(":")
        if mode not in ("", "ro", "exclusive"):
            raise Invalid(f"volume {word!r}", hint="NAME:/PATH, NAME:/PATH:ro or NAME:/PATH:exclusive")
        is_exclusive = mode == "exclusive"
        volumes.append(VolumeMount(name=name, path=target, is_read_only=mode == "ro", is_exclusive=is_exclusive))
    from discovery.wire.terminal import size

    rows, columns = size() if arguments.tty else (24, 80)
    env = ({"HOME": user.home} if user.home else {}) | image.config.env | labels_of(arguments.env)
    if arguments.tty and "TERM" in os.environ:
        env.setdefault("TERM", os.environ["TERM"])
    return JobSpec(
        id=arguments.name or f"run-{secrets.token_hex(6)}",
        layers=image.layers,
        args=imagejob.command(image.config, arguments.args, arguments.entrypoint),
        env=env,
        working_dir=arguments.workdir or image.config.working_dir,
        user=f"{user.uid}:{user.gid}",
        has_tty=arguments.tty,
        rows=rows,
        columns=columns,
        has_stdin=arguments.stdin or arguments.tty,
        ports=(
            *(Port() for _ in range(arguments.port)),
            *(imagejob.exposed(image.config) if arguments.publish_all else ()),
        ),
        stop_signal=_signal(arguments, image),
        volumes=tuple(volumes),
        secrets=_secrets(arguments.secret),
        resources=Resources(memory_bytes=arguments.memory * MIB, temp_disk_bytes=arguments.disk * MIB),
        store_prefixes=tuple(arguments.store_prefix),
        has_host_network=arguments.host_network,
        user_namespace="host" if arguments.host_users else "job",
        inherits_proxy=True,
        restart="always" if arguments.restart else "never",
        labels=imagejob.labels(image.config) | labels_of(arguments.label),
    )


def _secrets(words: list[str]) -> tuple[SecretFile, ...]:
    found = []
    for word in words:
        path, _, source = word.partition("=")
        if not source:
            raise Invalid(f"secret {word!r}", hint="NAME=FILE, or /PATH=FILE")
        try:
            content = Path(source).read_bytes()
        except OSError as error:
            raise Invalid(f"secret {path}: {source}: {error.strerror}") from error
        found.append(SecretFile(path=path, content_base64=base64.b64encode(content).decode()))
    return tuple(found)


def run_job(arguments: argparse.Namespace) -> int:
    arguments.args = arguments.args[1:] if arguments.args[:1] == ["--"] else arguments.args
    caller = caller_of(arguments)
    image = caller.request("GET", "/images/" + quote(arguments.image, safe=""), into=Image)
    spec = _spec(arguments, image, _user(arguments, image))
    for path in imagejob.forgotten(image.config, [volume.path for volume in spec.volumes]):
        print(f"hostd: what is written to {path} goes with the job; -v NAME:{path} keeps it", file=sys.stderr)
    caller.request("PUT", job_path(spec.id), into=Job, body=spec)
    if arguments.detach:
        print(spec.id)
        return 0
    from discovery.wire import terminal

    path = job_path(spec.id) + "/attach?logs=true"
    stdin = 0 if spec.has_stdin else None
    keys = terminal.detach_keys_of(arguments.detach_keys)
    aside = job_path(spec.id) + "/signal"
    status = terminal.attach(caller, path, has_tty=spec.has_tty, stdin=stdin, detach_keys=keys, signal_path=aside)
    return left(status, spec.id)


def declare(commands: Any) -> None:
    run = add(commands, "run", run_job, "run a job and be its terminal", "hostd run -t --image base -- /bin/bash")
    run.add_argument("--image", default="base", metavar="NAME", help="image of the host's store (default: base)")
    run.add_argument("--name", default="", metavar="ID", help="the job's id (default: run-RANDOM)")
    run.add_argument("-t", "--tty", action="store_true", help="give it a terminal")
    run.add_argument("-i", "--stdin", action="store_true", help="send it our stdin")
    run.add_argument("-d", "--detach", action="store_true", help="print its id and leave it running")
    run.add_argument("-e", "--env", action="append", default=[], metavar="KEY=VALUE", help="environment variable")
    run.add_argument(
        "-v", "--volume", action="append", default=[], metavar="NAME:/PATH[:ro|:exclusive]", help="mount a volume"
    )
    run.add_argument(
        "--secret", action="append", default=[], metavar="NAME=FILE", help="a file below /run/secrets, never on disk"
    )
    run.add_argument(
        "--store-prefix",
        action="append",
        default=[],
        metavar="PREFIX",
        help="let it use the store's keys that begin so, at $STORE_URL (with $STORE_CERT, $STORE_KEY, $STORE_CA)",
    )
    run.add_argument("-l", "--label", action="append", default=[], metavar="KEY=VALUE", help="label it")
    run.add_argument("-p", "--port", action="count", default=0, help="publish a port, its number is $PORT; repeatable")
    run.add_argument(
        "-m", "--memory", type=int, default=1024, metavar="MIB", help="memory limit in MiB (default: 1024)"
    )
    run.add_argument(
        "--disk", type=int, default=4096, metavar="MIB", help="how much it may write, /tmp included (default: 4096)"
    )
    run.add_argument("-w", "--workdir", default="", metavar="DIR", help="working directory")
    run.add_argument(
        "-u", "--user", default="", metavar="USER[:GROUP]", help="user, by number or as the image knows it"
    )
    run.add_argument("--entrypoint", default=None, metavar="PROGRAM", help="instead of the image's ('' for none)")
    run.add_argument("-P", "--publish-all", action="store_true", help="publish what the image exposes, same numbers")
    run.add_argument("--stop-signal", default="", metavar="SIGNAL", help="instead of the image's")
    run.add_argument("--host-network", action="store_true", help="use the host's network")
    run.add_argument("--host-users", action="store_true", help="privileged: no user namespace, its root is the host's")
    run.add_argument("--restart", action="store_true", help="start it again whenever it ends")
    add_detach_keys(run)
    run.add_argument("args", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="what to run (default: the image's)")
