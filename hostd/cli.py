"""The operator's command: start and stop a node, look at its jobs, run one by hand.

Speaks to the daemon over its unix socket; only `daemon`, `up` and `down` touch the machine itself.
An unknown `hostd WORD` runs `hostd-WORD` from the same directory, as git does, which is how
`hostd bootstrap` reaches a room that this one must not import. Imports are late, so that every
command answers quickly.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import shutil
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import msgspec

from discovery.wire.blocking import BlockingCaller
from discovery.wire.config import add_flags
from discovery.wire.errors import Invalid, NotFound, ServiceError, Unauthorized, Unavailable
from discovery.wire.version import VERSION
from hostd import config as settings_of
from hostd.config import LEAN_MALLOC, NO_AUTHORITIES, SETTINGS, Config
from hostd.types import (
    ENDED,
    MIB,
    HostStatus,
    Image,
    Job,
    JobSpec,
    LogLine,
    Port,
    Resources,
    SignalRequest,
    Volume,
    VolumeMount,
)

Command = Callable[[argparse.Namespace], int]
_EXIT_CODES = (
    "exit codes: 0 done, 64 bad input, 66 not found, 69 not reachable, 70 internal error, 73 exists, 75 conflict,"
    " 77 not allowed; `run` exits with the job's own"
)


def _config(arguments: argparse.Namespace) -> Config:
    file = Path(arguments.config) if arguments.config else None
    flags = vars(arguments)
    return settings_of.load(flags | {"run_dir": flags.get("run_dir") or arguments.node}, file=file)


def _caller(arguments: argparse.Namespace, timeout_s: float = 30.0) -> BlockingCaller:
    socket = _config(arguments).api_socket
    try:
        if not socket.exists():
            raise Unavailable(f"hostd is not running here: there is no {socket}", hint="sudo hostd up")
    except PermissionError:
        raise Unauthorized(f"only root may speak to {socket}", hint="try again with sudo") from None
    return BlockingCaller(f"unix://{socket}", timeout_s=timeout_s)


def _print_json(value: Any) -> None:
    print(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def _print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    table = [header, *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    for row in table:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


def _age(at: float) -> str:
    from discovery.wire import clock

    seconds = int(clock.now_s() - at) if at else -1
    if seconds < 0:
        return "-"
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= length:
            return f"{seconds // length}{unit}"
    return f"{seconds}s"


def _labels(words: Sequence[str]) -> dict[str, str]:
    found = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise Invalid(f"{word!r}", hint="KEY=VALUE")
        found[key] = value
    return found


def _labels_query(words: Sequence[str]) -> str:
    return urlencode([("label", f"{key}={value}") for key, value in _labels(words).items()])


def _job_path(job_id: str) -> str:
    return "/jobs/" + quote(job_id, safe="")


# the node


def run_daemon(arguments: argparse.Namespace) -> int:
    config = _config(arguments)
    if not LEAN_MALLOC.items() <= os.environ.items():
        os.execve(sys.executable, sys.orig_argv, os.environ | LEAN_MALLOC)  # noqa: S606 — ourselves, leaner
    environment = dict(os.environ)
    os.environ.update(NO_AUTHORITIES)  # for this import only: who fetches from elsewhere is to find them
    from hostd import daemon

    os.environ.clear()
    os.environ.update(environment)
    return daemon.main(config)


def bring_up(arguments: argparse.Namespace) -> int:
    if arguments.foreground:
        return run_daemon(arguments)
    from hostd import background

    status = background.up(_config(arguments))
    print(f"hostd is up: host {status.host_id} at {status.host_ip}, {status.jobs_running} jobs")
    return 0


def take_down(arguments: argparse.Namespace) -> int:
    from hostd import background

    background.down(_config(arguments), print)
    print("hostd is down")
    return 0


def show_status(arguments: argparse.Namespace) -> int:
    status = _caller(arguments).request("GET", "/status", into=HostStatus)
    if arguments.json:
        _print_json(status)
        return 0
    fields = msgspec.structs.asdict(status)
    extra = [*fields.pop("features").items(), *fields.pop("sysctls").items()]
    for name, value in [*((name.replace("_", " "), value) for name, value in fields.items()), *extra]:
        print(f"{name + ':':<40} {value}")
    return 0


# jobs


def list_jobs(arguments: argparse.Namespace) -> int:
    query = "&".join(filter(None, [_labels_query(arguments.label), "" if arguments.all else "active"]))
    jobs = _caller(arguments).request("GET", "/jobs" + (f"?{query}" if query else ""), into=list[Job])
    if arguments.json:
        _print_json(jobs)
        return 0
    rows = [
        (
            job.spec.id,
            job.status + ("" if job.is_up or job.status != "running" else " (not up)"),
            _age(job.started_at or job.created_at),
            job.ip or "-",
            ",".join(map(str, job.ports)) or "-",
            "-" if job.exit_status is None else str(job.exit_status),
            " ".join(job.spec.args)[:60],
        )
        for job in jobs
    ]
    _print_table(("ID", "STATUS", "AGE", "IP", "PORTS", "EXIT", "COMMAND"), rows)
    return 0


def _spec(arguments: argparse.Namespace, image: Image) -> JobSpec:
    volumes = []
    for word in arguments.volume:
        name, _, path = word.partition(":")
        if not path:
            raise Invalid(f"volume {word!r}", hint="NAME:/PATH, or NAME:/PATH:ro")
        target, _, mode = path.partition(":")
        volumes.append(VolumeMount(name=name, path=target, is_read_only=mode == "ro"))
    from discovery.wire.terminal import size

    rows, columns = size() if arguments.tty else (24, 80)
    env = dict(image.config.env) | _labels(arguments.env)
    if arguments.tty and "TERM" in os.environ:
        env.setdefault("TERM", os.environ["TERM"])
    return JobSpec(
        id=arguments.name or f"run-{secrets.token_hex(6)}",
        layers=image.layers,
        args=(*image.config.entrypoint, *(tuple(arguments.args) or image.config.cmd)),
        env=env,
        working_dir=arguments.workdir or image.config.working_dir,
        user=arguments.user or image.config.user or "0",
        has_tty=arguments.tty,
        rows=rows,
        columns=columns,
        has_stdin=arguments.stdin or arguments.tty,
        ports=tuple(Port() for _ in range(arguments.port)),
        volumes=tuple(volumes),
        resources=Resources(memory_bytes=arguments.memory * MIB),
        has_host_network=arguments.host_network,
        inherits_proxy=True,
        restart="always" if arguments.restart else "never",
        labels=_labels(arguments.label),
    )


def run_job(arguments: argparse.Namespace) -> int:
    arguments.args = arguments.args[1:] if arguments.args[:1] == ["--"] else arguments.args
    caller = _caller(arguments)
    image = caller.request("GET", "/images/" + quote(arguments.image, safe=""), into=Image)
    spec = _spec(arguments, image)
    caller.request("PUT", _job_path(spec.id), into=Job, body=spec)
    if arguments.detach:
        print(spec.id)
        return 0
    from discovery.wire import terminal

    path = _job_path(spec.id) + "/attach?logs=true"
    return terminal.attach(caller, path, has_tty=spec.has_tty, stdin=0 if spec.has_stdin else None)


def attach_job(arguments: argparse.Namespace) -> int:
    from discovery.wire import terminal

    caller = _caller(arguments)
    job = caller.request("GET", _job_path(arguments.id), into=Job)
    path = _job_path(arguments.id) + "/attach" + ("?logs=true" if arguments.logs else "")
    has_input = job.spec.has_stdin or job.spec.has_tty
    return terminal.attach(caller, path, has_tty=job.spec.has_tty, stdin=0 if has_input else None)


def show_log(arguments: argparse.Namespace) -> int:
    query = {"follow": "true"} if arguments.follow else {}
    query |= {"lines": str(arguments.lines)} if arguments.lines is not None else {}
    for line in _caller(arguments).events(_job_path(arguments.id) + "/log", LogLine, query):
        if arguments.json:
            print(msgspec.json.encode(line).decode(), flush=True)
            continue
        at = datetime.fromtimestamp(line.at, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z "
        out = sys.stderr if line.stream == 2 else sys.stdout
        print((at if arguments.time else "") + line.text, file=out, flush=True)
    return 0


def stop_jobs(arguments: argparse.Namespace) -> int:
    caller = _caller(arguments, timeout_s=600.0)
    for job_id in arguments.id:
        caller.request("POST", _job_path(job_id) + "/stop", into=Job, query={"wait": ""})
        print(f"{job_id} stopped")
    return 0


def _signal_number(text: str) -> int:
    if text.isdigit():
        return int(text)
    name = text.upper() if text.upper().startswith("SIG") else "SIG" + text.upper()
    try:
        return signal.Signals[name].value
    except KeyError:
        raise Invalid(f"signal {text!r}", hint="a number or a name such as HUP") from None


def signal_job(arguments: argparse.Namespace) -> int:
    number = _signal_number(arguments.signal)
    _caller(arguments).request("POST", _job_path(arguments.id) + "/signal", body=SignalRequest(number=number))
    return 0


def inspect_job(arguments: argparse.Namespace) -> int:
    _print_json(_caller(arguments).request("GET", _job_path(arguments.id), into=Job))
    return 0


def forget_jobs(arguments: argparse.Namespace) -> int:
    caller = _caller(arguments)
    ids = arguments.id
    if not ids:
        ids = [job.spec.id for job in caller.request("GET", "/jobs", into=list[Job]) if job.status in ENDED]
    for job_id in ids:
        caller.request("DELETE", _job_path(job_id))
        print(f"{job_id} forgotten")
    return 0


# images and volumes


def list_images(arguments: argparse.Namespace) -> int:
    images = _caller(arguments).request("GET", "/images", into=list[Image])
    if arguments.json:
        _print_json(images)
        return 0
    rows = [
        (
            image.name,
            image.digest.removeprefix("sha256:")[:12],
            str(len(image.layers)),
            f"{sum(layer.size_bytes for layer in image.layers) / MIB:.1f} MiB",
        )
        for image in images
    ]
    _print_table(("NAME", "DIGEST", "LAYERS", "SIZE"), rows)
    return 0


def build_images(arguments: argparse.Namespace) -> int:
    from rootfs.errors import RootfsError
    from rootfs.images import build_images as build

    config = _config(arguments)
    try:
        images = build(
            config.images_dir,
            config.cache_dir,
            names=arguments.name or None,
            progress=lambda text: print(text, flush=True),
            is_fresh=arguments.fresh,
        )
    except RootfsError as error:
        raise Invalid(str(error), hint=getattr(error, "hint", "")) from error
    for image in images:
        print(f"{image.name} {image.digest}")
    return 0


def inspect_image(arguments: argparse.Namespace) -> int:
    _print_json(_caller(arguments).request("GET", "/images/" + quote(arguments.name, safe=""), into=Image))
    return 0


def list_volumes(arguments: argparse.Namespace) -> int:
    volumes = _caller(arguments).request("GET", "/volumes", into=list[Volume])
    if arguments.json:
        _print_json(volumes)
        return 0
    _print_table(("NAME", "USED BY", "PATH"), [(v.name, ",".join(v.used_by) or "-", v.path) for v in volumes])
    return 0


def remove_volume(arguments: argparse.Namespace) -> int:
    _caller(arguments, timeout_s=600.0).request("DELETE", "/volumes/" + quote(arguments.name, safe=""))
    print(f"volume {arguments.name} removed")
    return 0


def show_version(arguments: argparse.Namespace) -> int:
    if arguments.json:
        _print_json({"version": VERSION})
    else:
        print(f"hostd {VERSION}")
    return 0


# the command line


def _add(
    commands: Any, name: str, act: Command, summary: str, example: str, *, has_json: bool = False
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"example:\n  {example}\n\n{_EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(act=act)
    if has_json:
        parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def parser() -> argparse.ArgumentParser:
    """Make the parser of all commands."""
    top = argparse.ArgumentParser(
        prog="hostd",
        description="Run jobs on this machine.",
        epilog=f"example:\n  hostd run --image base -- /bin/echo hello\n\n{_EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--config", default="", metavar="FILE", help="settings file (default: /etc/hostd/hostd.toml)")
    top.add_argument("--run-dir", dest="node", default=None, metavar="DIR", help="where the daemon's sockets are")
    commands = top.add_subparsers(metavar="COMMAND", required=True)
    _add_node_commands(commands)
    _add_job_commands(commands)
    _add_image_commands(commands)
    return top


def _add_node_commands(commands: Any) -> None:
    add_flags(_add(commands, "daemon", run_daemon, "run the daemon in the foreground", "hostd daemon"), SETTINGS)
    up = _add(commands, "up", bring_up, "start the daemon unless it runs, and wait until it is ready", "hostd up")
    up.add_argument("--foreground", action="store_true", help="stay in the foreground, for a supervisor")
    add_flags(up, SETTINGS)
    down = _add(commands, "down", take_down, "end every job and the daemon, and remove all traces", "hostd down")
    add_flags(down, SETTINGS)
    _add(commands, "status", show_status, "show the state of this host", "hostd status --json", has_json=True)
    _add(commands, "version", show_version, "show the version", "hostd version", has_json=True)


def _add_job_commands(commands: Any) -> None:
    ps = _add(commands, "ps", list_jobs, "list jobs", "hostd ps --label app=example", has_json=True)
    ps.add_argument("-a", "--all", action="store_true", help="ended jobs, too")
    ps.add_argument("-l", "--label", action="append", default=[], metavar="KEY=VALUE", help="only with this label")
    _add_run(commands)
    attach = _add(commands, "attach", attach_job, "attach to a running job", "hostd attach run-0123456789ab")
    attach.add_argument("id", metavar="ID")
    attach.add_argument("--logs", action="store_true", help="first print what it has printed so far")
    log = _add(commands, "log", show_log, "print a job's log", "hostd log -f -n 20 run-0123456789ab", has_json=True)
    log.add_argument("id", metavar="ID")
    log.add_argument("-f", "--follow", action="store_true", help="go on with what comes")
    log.add_argument("-n", "--lines", type=int, metavar="COUNT", help="only the last so many lines")
    log.add_argument("-t", "--time", action="store_true", help="begin each line with its time (UTC)")
    stop = _add(commands, "stop", stop_jobs, "end jobs and wait for it", "hostd stop run-0123456789ab")
    stop.add_argument("id", nargs="+", metavar="ID")
    send = _add(commands, "signal", signal_job, "send a signal to a job", "hostd signal run-0123456789ab HUP")
    send.add_argument("id", metavar="ID")
    send.add_argument("signal", metavar="SIGNAL")
    inspect = _add(commands, "inspect", inspect_job, "print everything about a job, as JSON", "hostd inspect ID")
    inspect.add_argument("id", metavar="ID")
    inspect.add_argument("--json", action="store_true", help="(always)")
    forget = _add(
        commands, "forget", forget_jobs, "remove ended jobs and their logs (all if none is named)", "hostd forget"
    )
    forget.add_argument("id", nargs="*", metavar="ID")


def _add_run(commands: Any) -> None:
    run = _add(commands, "run", run_job, "run a job and be its terminal", "hostd run -t --image base -- /bin/bash")
    run.add_argument("--image", default="base", metavar="NAME", help="image of the host's store (default: base)")
    run.add_argument("--name", default="", metavar="ID", help="the job's id (default: run-RANDOM)")
    run.add_argument("-t", "--tty", action="store_true", help="give it a terminal")
    run.add_argument("-i", "--stdin", action="store_true", help="send it our stdin")
    run.add_argument("-d", "--detach", action="store_true", help="print its id and leave it running")
    run.add_argument("-e", "--env", action="append", default=[], metavar="KEY=VALUE", help="environment variable")
    run.add_argument("-v", "--volume", action="append", default=[], metavar="NAME:/PATH[:ro]", help="mount a volume")
    run.add_argument("-l", "--label", action="append", default=[], metavar="KEY=VALUE", help="label it")
    run.add_argument("-p", "--port", action="count", default=0, help="publish a port, its number is $PORT; repeatable")
    run.add_argument(
        "-m", "--memory", type=int, default=1024, metavar="MIB", help="memory limit in MiB (default: 1024)"
    )
    run.add_argument("-w", "--workdir", default="", metavar="DIR", help="working directory")
    run.add_argument("-u", "--user", default="", metavar="UID[:GID]", help="user, as numbers")
    run.add_argument("--host-network", action="store_true", help="use the host's network")
    run.add_argument("--restart", action="store_true", help="start it again whenever it ends")
    run.add_argument("args", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="what to run (default: the image's)")


def _add_image_commands(commands: Any) -> None:
    image = commands.add_parser("image", help="list, build and inspect images", description="The host's images.")
    image_commands = image.add_subparsers(metavar="COMMAND", required=True)
    _add(image_commands, "list", list_images, "list the images", "hostd image list", has_json=True)
    build = _add(image_commands, "build", build_images, "build images (all if none is named)", "hostd image build")
    build.add_argument("name", nargs="*", metavar="NAME")
    build.add_argument("--fresh", action="store_true", help="with the archive's newest packages")
    add_flags(build, SETTINGS)
    inspect = _add(image_commands, "inspect", inspect_image, "print an image, as JSON", "hostd image inspect base")
    inspect.add_argument("name", metavar="NAME")
    inspect.add_argument("--json", action="store_true", help="(always)")
    volume = commands.add_parser("volume", help="list and remove volumes", description="The host's volumes.")
    volume_commands = volume.add_subparsers(metavar="COMMAND", required=True)
    _add(volume_commands, "list", list_volumes, "list the volumes", "hostd volume list", has_json=True)
    remove = _add(volume_commands, "remove", remove_volume, "delete an unused volume", "hostd volume remove data")
    remove.add_argument("name", metavar="NAME")


def _commands(top: argparse.ArgumentParser) -> set[str]:
    return {name for action in top._actions if isinstance(action.choices, dict) for name in action.choices}


def _run_other(word: str, arguments: Sequence[str]) -> None:
    """Become `hostd-WORD`, if there is one."""
    name = f"hostd-{word}"
    beside = Path(sys.argv[0]).resolve().parent / name
    program = str(beside) if os.access(beside, os.X_OK) else shutil.which(name)
    if program is None:
        raise NotFound(f"`hostd {word}` is no command", hint="hostd --help lists them")
    os.execv(program, [program, *arguments])  # noqa: S606 — git-style, our own directory first


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    top = parser()
    try:
        if words and not words[0].startswith("-") and words[0] not in _commands(top):
            _run_other(words[0], words[1:])
        parsed = top.parse_args(words)
        return int(parsed.act(parsed))
    except ServiceError as error:
        print(f"hostd: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"       {error.hint}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141


if __name__ == "__main__":
    sys.exit(main())
