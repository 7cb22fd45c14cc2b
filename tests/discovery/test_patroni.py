"""Patroni's own etcd3 module, unmodified, keeps two PostgreSQL servers by our API and fails over.

All is real: Debian's PostgreSQL, two Patronis as an unprivileged user, three members of our store on TLS. They hold a
job's certificate that grants `/service/` only, which is what a PostgreSQL that runs as a job would have.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from discovery.wire.blocking import BlockingCaller
from discovery.wire.errors import ServiceError
from hostd.authority import Authority
from tests.discovery.conftest import Process
from tests.discovery.test_etcd_differential import free_ports

DEADLINE_S = 120.0
"""For one step, on a machine with a lot else to do; the whole takes some 40 s on one that is quiet."""
TTL_S = 20  # the least that Patroni takes
MEMBERS = 3
USER = "nobody"
PASSWORD = "a-test's"
PATRONI = Path(sys.executable).with_name("patroni")
BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))


def until(what: Callable[[], Any], why: str, deadline_s: float = DEADLINE_S) -> Any:
    deadline = time.monotonic() + deadline_s
    while not (found := what()):
        assert time.monotonic() < deadline, why
        time.sleep(0.1)
    return found


def as_user(command: list[str], **more: Any) -> subprocess.Popen[bytes]:
    """Start a command as somebody who is not root: PostgreSQL insists."""
    who = pwd.getpwnam(USER)
    if os.geteuid() == 0:
        more |= {"user": who.pw_uid, "group": who.pw_gid, "extra_groups": []}
    return subprocess.Popen(command, **more)


def why_not() -> str:
    if not BINARIES:
        return "needs PostgreSQL: apt-get install postgresql-15"
    if not PATRONI.exists():
        return "needs patroni[etcd3]: make deps"
    try:  # in a clone that lies in a private folder, it is not even found
        child = as_user([str(PATRONI), "--version"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/")
    except PermissionError:
        return f"needs {PATRONI} to be executable by {USER}: no folder above it may be private"
    return "" if child.wait(DEADLINE_S) == 0 else f"needs {PATRONI} to run as {USER}"


class Node:
    """One Patroni with its PostgreSQL."""

    def __init__(self, name: str, folder: Path, ports: tuple[int, int], stores: list[int]) -> None:
        self.name = name
        self.folder = folder / name
        self.folder.mkdir(mode=0o700)
        self.rest_port, self.sql_port = ports
        self.child: subprocess.Popen[bytes] | None = None
        tls = {"cacert": str(folder / "ca.pem"), "cert": str(folder / "job.pem"), "key": str(folder / "job.pem")}
        user = {"superuser": "postgres", "replication": "replicator", "rewind": "rewinder"}
        local = "127.0.0.1/32 md5"
        (self.folder / "patroni.json").write_text(json.dumps({  # YAML, too
            "scope": "demo", "namespace": "/service/", "name": name,
            "restapi": {"listen": f"127.0.0.1:{self.rest_port}", "connect_address": f"127.0.0.1:{self.rest_port}"},
            "etcd3": {"hosts": [f"127.0.0.1:{port}" for port in stores], "protocol": "https"} | tls,
            "bootstrap": {
                "dcs": {"ttl": TTL_S, "loop_wait": 1, "retry_timeout": 9, "postgresql": {"use_pg_rewind": True}},
                "initdb": [{"encoding": "UTF8"}, "data-checksums", "no-sync"],
            },
            "postgresql": {
                "listen": f"127.0.0.1:{self.sql_port}", "connect_address": f"127.0.0.1:{self.sql_port}",
                "data_dir": str(self.folder / "data"), "bin_dir": str(BINARIES[-1]),
                "pgpass": str(self.folder / "pgpass"), "remove_data_directory_on_diverged_timelines": True,
                "authentication": {role: {"username": found, "password": PASSWORD} for role, found in user.items()},
                "parameters": {"unix_socket_directories": str(self.folder), "fsync": "off", "wal_log_hints": "on",
                               "shared_buffers": "16MB", "max_connections": 20},
                "pg_hba": [f"host all all {local}", f"host replication replicator {local}"],
            },
        }))  # fmt: skip
        if os.geteuid() == 0:
            for path in (self.folder, self.folder / "patroni.json"):
                shutil.chown(path, USER)

    def start(self) -> None:
        with (self.folder / "log").open("ab") as log:
            self.child = as_user(
                [str(PATRONI), str(self.folder / "patroni.json")],
                stdout=log, stderr=log, cwd=self.folder, start_new_session=True,
                env={"PATH": os.environ["PATH"], "HOME": str(self.folder), "LANG": "C.UTF-8"},
            )  # fmt: skip

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")[-4000:]

    def state(self) -> dict[str, Any]:
        """Return what Patroni says of itself; nothing if it does not answer."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.rest_port}/patroni", timeout=5) as answer:
                return dict(json.load(answer))
        except urllib.error.HTTPError as error:
            with error:
                return dict(json.load(error))
        except (OSError, ValueError):
            return {}

    def is_leader(self) -> bool:
        found = self.state()
        return found.get("role") in ("primary", "master") and found.get("state") == "running"

    def is_replica(self) -> bool:
        found = self.state()
        return found.get("role") == "replica" and found.get("replication_state") == "streaming"

    def sql(self, text: str) -> str:
        """Run a statement; return what it printed. Raises if it failed."""
        environment = os.environ | {"PGPASSWORD": PASSWORD, "PGCONNECT_TIMEOUT": "10"}
        command = [
            str(BINARIES[-1] / "psql"),
            "-h",
            "127.0.0.1",
            "-p",
            str(self.sql_port),
            "-U",
            "postgres",
            "-Atqc",
            text,
        ]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def postmaster(self) -> int:
        """Return the process id of its PostgreSQL, 0 if there is none."""
        try:
            pid = int((self.folder / "data/postmaster.pid").read_text().split()[0])
            is_ours = str(self.folder).encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
        except (OSError, ValueError, IndexError):
            return 0
        return pid if is_ours else 0

    def kill(self) -> None:
        """End both at once, as a machine does that loses its power."""
        assert self.child is not None
        pid = self.postmaster()
        self.child.kill()
        if pid:
            os.kill(pid, signal.SIGKILL)
        self.child.wait(DEADLINE_S)
        until(lambda: not processes_of(self.folder), f"{self.name} does not end")

    def close(self) -> None:
        if self.child is not None and self.child.poll() is None:
            self.kill()


def processes_of(folder: Path) -> list[int]:
    """Return the processes that stand in a folder (PostgreSQL's all do, in its data) or name it."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            place, words = os.readlink(entry / "cwd"), (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if words and (place.startswith(str(folder)) or str(folder).encode() in words):
            found.append(int(entry.name))
    return found


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that others than root may enter."""
    if reason := why_not():
        pytest.skip(reason)
    path = Path(tempfile.mkdtemp(prefix="patroni-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@dataclass
class Members:
    """Our daemons, each a process, and the ports where they answer holders of a certificate."""

    daemons: list[Process]
    ports: list[int]

    def leader(self) -> Process:
        """Return who leads, as the log of the one that leads now says last."""
        for daemon in self.daemons:
            with contextlib.suppress(ServiceError):
                raw = BlockingCaller(daemon.address, timeout_s=5.0).request("POST", "/v3/maintenance/status", body={})
                status = json.loads(raw)
                if status.get("leader") == status["header"]["member_id"]:
                    return daemon
        raise AssertionError("nobody leads")


@pytest.fixture
def store(folder: Path) -> Iterator[Members]:
    authority = Authority.ensure(folder / "authority")
    (folder / "ca.pem").write_bytes((folder / "authority/ca.pem").read_bytes())
    (folder / "server.pem").write_bytes(authority.server(["127.0.0.1"]))
    (folder / "job.pem").write_bytes(authority.client("database", role="job", prefixes=["/service/"]))
    (folder / "ca.pem").chmod(0o644)
    (folder / "job.pem").chmod(0o600)
    if os.geteuid() == 0:
        shutil.chown(folder / "job.pem", USER)
    ports, peers = free_ports(MEMBERS), free_ports(MEMBERS)
    initial = ",".join(f"{number}=127.0.0.1:{port}" for number, port in enumerate(peers))
    daemons = []
    for number in range(MEMBERS):
        state = folder / f"store{number}"
        state.mkdir()
        (state / "member.pem").write_bytes(authority.member(str(number)))
        daemons.append(Process(state, [
            f"--api-listen=127.0.0.1:{ports[number]}", f"--api-ca={folder}/ca.pem", f"--api-cert={folder}/server.pem",
            f"--member-id={number}", f"--raft-address=127.0.0.1:{peers[number]}", f"--initial-members={initial}",
            f"--tls-ca={folder}/ca.pem", f"--tls-cert={state}/member.pem",
        ]))  # fmt: skip
    try:
        for daemon in daemons:
            daemon.start(is_expected_up=False)
        for daemon in daemons:
            daemon.wait_ready()
        yield Members(daemons, ports)
    finally:
        for daemon in daemons:
            if daemon.child is not None and daemon.child.poll() is None:
                daemon.kill()


@pytest.fixture
def nodes(folder: Path, store: Members) -> Iterator[list[Node]]:
    ports = free_ports(4)
    made = [Node(name, folder, (ports.pop(), ports.pop()), store.ports) for name in ("one", "two")]
    yield made
    for node in made:
        node.close()
    assert not processes_of(made[0].folder)
    assert not processes_of(made[1].folder)


def _leads(store: Members) -> bool:
    try:
        return bool(store.leader())
    except AssertionError:
        return False


@pytest.mark.timeout(600)
def test_two_postgresql_survive_the_stores_leader_and_then_their_own(nodes: list[Node], store: Members) -> None:
    one, two = nodes
    one.start()
    until(one.is_leader, f"nobody leads: {one.log}")
    two.start()
    one.sql("create table kept (value text)")
    one.sql("insert into kept values ('before')")
    until(two.is_replica, f"no replica: {two.log}")

    killed = store.leader()
    killed.kill()
    until(lambda: _leads(store), "the other members have no leader")
    killed.start(is_expected_up=False)
    one.sql("insert into kept values ('store had a new leader')")
    until(lambda: two.sql("select count(*) from kept") == "2", f"not replicated: {two.log}")
    assert one.is_leader(), one.log
    assert one.state()["timeline"] == 1, "PostgreSQL's leader gave up because the store's died"

    one.kill()
    until(two.is_leader, f"no failover: {two.log}")
    two.sql("insert into kept values ('after')")
    assert two.sql("select string_agg(value, ',') from kept") == "before,store had a new leader,after"
    assert two.state()["timeline"] == 2

    one.start()
    until(one.is_replica, f"does not come back: {one.log}")
    until(lambda: one.sql("select count(*) from kept") == "3", f"not replicated: {one.log}")
    assert not one.is_leader()
