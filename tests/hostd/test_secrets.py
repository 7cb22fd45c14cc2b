"""Secrets as files: found by the job as it asked, and nowhere else."""

from __future__ import annotations

import base64
import json
import os
import signal
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from discovery.wire.errors import AlreadyExists, ServiceError
from hostd.errors import InvalidSpec
from hostd.runtime import secret_files
from hostd.types import Job, JobEvent, SecretFile, SignalRequest
from tests.hostd.node import Node, wait_until
from tests.hostd.node import node as a_node

WORD = "hunter2-not-to-be-found-anywhere"


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"path": "../x"}, "path"),
        ({"path": "/proc/x"}, "system directory"),
        ({"path": "/run/secrets"}, "each path once"),
        ({"path": "a/../b"}, "path"),
        ({"path": "x", "content": WORD, "content_base64": "aGk="}, "not both"),
        ({"path": "x", "content_base64": "!!" + WORD}, "not base64"),
        ({"path": "x", "mode": 0o4755}, "mode"),
        ({"path": "x", "uid": 65536}, "owners"),
        ({"path": "x", "content": WORD * 40000}, "at most"),
    ],
)
def test_what_cannot_be_is_refused_without_showing_it(fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InvalidSpec) as caught:
        secret_files.check([SecretFile(**fields)])
    said = f"{caught.value.message} {caught.value.hint} {caught.value.detail}"
    assert complaint in said
    assert WORD not in said
    assert WORD not in repr(SecretFile(**fields))


def test_two_at_one_path_or_below_each_other_are_refused() -> None:
    for second in ("/run/secrets/a", "a/b"):
        with pytest.raises(InvalidSpec):
            secret_files.check([SecretFile(path="a"), SecretFile(path=second)])


@pytest.mark.needs_root
def test_the_tmpfs_goes_with_its_last_fd() -> None:
    fd = secret_files.make([SecretFile(path="a/b", content=WORD, mode=0o440, uid=7, gid=8)], 600000)
    place = Path(f"/proc/self/fd/{fd}/folder/a/b")
    assert place.read_text() == WORD
    found = place.stat()
    assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid) == (0o440, 600007, 600008)
    flags = os.fstatvfs(fd).f_flag
    assert flags & os.ST_NOSUID
    assert flags & os.ST_NODEV
    assert flags & os.ST_NOEXEC
    os.close(fd)


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with a_node(6, has_discovery=False) as made:
        made.up()
        yield made


SECRETS = (
    SecretFile(path="password", content=WORD),
    SecretFile(path="deep/er", content_base64=base64.b64encode(b"\0" + WORD.encode()).decode(), mode=0o444),
    SecretFile(path="/etc/app/key.pem", content=WORD, mode=0o440, uid=1000, gid=1001),
)
LOOK = (
    "cd /run/secrets; stat -c '%n %a %u %g %s' password deep/er /etc/app/key.pem;"
    " for to in password deep/er /etc/app/key.pem new; do (echo x > $to) 2>/dev/null && echo written $to; done;"
    " grep -o 'noexec' /proc/self/mounts | head -1; grep secrets /proc/self/mounts | head -1 | cut -d' ' -f3;"
    " env | grep -c hunter2; ls /etc/app"
)


@pytest.mark.needs_root
def test_a_job_finds_its_secrets_and_cannot_change_them(node: Node) -> None:
    node.start(node.spec("looker", "/bin/sh", "-c", LOOK, secrets=SECRETS))
    node.wait_ended("looker")
    size = len(WORD)
    assert node.log("looker") == [
        f"password 400 0 0 {size}",
        f"deep/er 444 0 0 {size + 1}",
        f"/etc/app/key.pem 440 1000 1001 {size}",
        "noexec",
        "tmpfs",
        "0",
        "key.pem",
    ]


@pytest.mark.needs_root
def test_nobody_else_finds_them(node: Node) -> None:
    spec = node.spec("holder", "/bin/sleep", "600", secrets=SECRETS, env={"TOKEN": "env-" + WORD})
    answers = [node.start(spec)]
    wait_until("it runs", lambda: node.job("holder").status == "running")
    answers += [node.job("holder"), *node.jobs()]
    for event in node.caller().events("/events", JobEvent):
        if event.kind == "current":
            break
        answers += [event.job] if event.job else []
    for job in answers:
        assert isinstance(job, Job)
        assert all(not secret.content and not secret.content_base64 for secret in job.spec.secrets)
    shown = json.loads(node.hostd("inspect", "holder").stdout)
    assert [each["path"] for each in shown["spec"]["secrets"]] == [each.path for each in SECRETS]
    assert shown["spec"]["env"]["TOKEN"] == "***"
    assert WORD not in node.hostd("ps", "--json", "--all").stdout
    assert "env-" + WORD in node.hostd("inspect", "--env", "holder").stdout
    holding = [
        str(path)
        for path in node.state_dir.rglob("*")
        if path.is_file()
        and "layers" not in path.parts
        and "images" not in path.parts
        and WORD.encode() in path.read_bytes()
    ]
    assert {Path(path).name for path in holding} <= {"hostd.db", "hostd.db-wal"}
    assert all(stat.S_IMODE(os.stat(path).st_mode) == 0o600 for path in holding)
    assert WORD.encode() not in (node.run_dir / "spawner.log").read_bytes()
    assert str(node.state_dir) not in Path("/proc/self/mountinfo").read_text()
    node.stop("holder")


@pytest.mark.needs_root
def test_the_same_spec_is_the_same_job_only_with_the_same_secrets(node: Node) -> None:
    spec = node.spec("again", "/bin/sleep", "600", secrets=SECRETS)
    node.start(spec)
    assert node.start(spec).spec.id == "again"
    other = node.spec("again", "/bin/sleep", "600", secrets=(SecretFile(path="password", content="other"),))
    with pytest.raises((AlreadyExists, ServiceError), match="another spec"):
        node.start(other)
    shown = node.spec("again", "/bin/sleep", "600", secrets=node.job("again").spec.secrets)
    with pytest.raises(ServiceError, match="another spec"):
        node.start(shown)
    node.stop("again")


@pytest.mark.needs_root
def test_a_successor_has_them_too_also_after_hostd_was_killed(node: Node) -> None:
    script = "trap 'exit 3' USR1; wc -c < /run/secrets/password; sleep 600 & wait"
    node.start(node.spec("chain", "/bin/sh", "-c", script, secrets=SECRETS, restart="always"))

    def newest(than: str) -> str | None:
        ids = [job.spec.id for job in node.jobs(active="") if job.spec.id.startswith("chain") and job.spec.id != than]
        return ids[0] if ids and str(len(WORD)) in node.log(ids[0]) else None

    first = wait_until("the first says its length", lambda: newest(""))
    node.start(node.spec("later", "/bin/true"))
    node.wait_ended("later")
    node.kill_daemon()
    node.up()
    node.caller().request("POST", f"/jobs/{first}/signal", body=SignalRequest(number=signal.SIGUSR1))
    second = wait_until("the second says its length", lambda: newest(first))
    node.stop(second)
