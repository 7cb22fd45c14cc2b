"""A job that is granted a prefix of the store: it gets there and no further, nobody else does, and it ends with it."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest

from discovery.types import KeyValue, Range
from discovery.wire.blocking import BlockingCaller
from discovery.wire.contexts import client_context
from discovery.wire.errors import ServiceError, Unavailable
from hostd import grants
from hostd.config import Config, load
from hostd.errors import InvalidSpec
from hostd.grants import Grants
from hostd.runtime.launch import NoStore
from hostd.types import BindMount, JobSpec, Layer, SecretFile
from tests.hostd import faulty_daemon
from tests.hostd.faulty_daemon import GRANT_POINTS
from tests.hostd.node import Node, sh, snapshot, wait_until
from tests.hostd.node import node as new_node

GATEWAY = "100.102.0.1"

USE = """
import base64, json, os, ssl, sys, urllib.error, urllib.request
tls = ssl.create_default_context(cafile=os.environ["STORE_CA"])
tls.load_cert_chain(os.environ["STORE_CERT"], os.environ["STORE_KEY"])
b64 = lambda text: base64.b64encode(text.encode()).decode()

def ask(path, **body):
    request = urllib.request.Request(os.environ["STORE_URL"] + path, json.dumps(body).encode())
    try:
        with urllib.request.urlopen(request, context=tls, timeout=20) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError as error:
        return type(getattr(error, "reason", error)).__name__

found = {}
for key in sys.argv[1:]:
    found[key] = [ask("/v3/kv/put", key=b64(key), value=b64("x")), ask("/v3/kv/range", key=b64(key))]
found["everything"] = ask("/v3/kv/range", key="AA==", range_end="AA==")
print(json.dumps(found), flush=True)
"""
ETCD3GW = """
import os
from urllib.parse import urlsplit
import etcd3gw
where = urlsplit(os.environ["STORE_URL"])
etcd = etcd3gw.client(
    host=where.hostname, port=where.port, protocol="https", ca_cert=os.environ["STORE_CA"],
    cert_cert=os.environ["STORE_CERT"], cert_key=os.environ["STORE_KEY"],
)
assert etcd.put("/app/a", "1") is True
assert etcd.get("/app/a") == [b"1"]
lease = etcd.lease(ttl=30)
etcd.put("/app/leased", "x", lease=lease)
assert [value for value, _ in etcd.get_prefix("/app/")] == [b"1", b"x"]
assert lease.revoke() is True
events, cancel = etcd.watch_prefix("/app/")
etcd.put("/app/seen", "yes")
assert next(events)["kv"]["value"] == b"yes"
cancel()
for key in ("/other/a", "/discoverd/grants/testhost/me"):
    try:
        etcd.put(key, "1")
    except Exception as error:
        print("refused:", key, type(error).__name__)
    else:
        raise SystemExit("it could write " + key)
print("well")
"""


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with new_node(8) as made:
        before = snapshot(made)
        made.up()
        yield made
        made.down()
        assert snapshot(made) == before


def spec(node: Node, job_id: str, *args: str, prefixes: tuple[str, ...] = ("/app/",), **more: Any) -> JobSpec:
    return node.spec(job_id, *args, image="system", store_prefixes=prefixes, **more)


def used(node: Node, job_id: str, *keys: str, **more: Any) -> dict[str, Any]:
    """Have a job use keys, and return what became of it."""
    node.start(spec(node, job_id, "python3", "-c", USE, *keys, **more))
    ended = node.wait_ended(job_id)
    assert ended.exit_status == 0, (ended, node.log(job_id))
    found: dict[str, Any] = json.loads(node.log(job_id)[-1])
    return found


def granted(node: Node) -> list[str]:
    """Return the jobs whose grants are in force."""
    store = BlockingCaller(f"unix://{node.run_dir}/discovery/discovery.sock", timeout_s=30)
    asked = {"key": "L2Rpc2NvdmVyZC9ncmFudHMv", "range_end": "L2Rpc2NvdmVyZC9ncmFudHMw"}  # /discoverd/grants/ and below
    answer = store.request("POST", "/v3/kv/range", into=dict[str, Any], body=asked)
    return [base64.b64decode(kv["key"]).decode().rpartition("/")[2] for kv in answer.get("kvs", [])]


def bundle_of(node: Node, job_id: str) -> Path:
    """Steal a running job's certificate, with its key."""
    path = node.folder / f"{job_id}.pem"
    inside = Path(f"/proc/{wait_until('it runs', lambda: node.job(job_id).pid)}/root/run/secrets/store")
    wait_until("it has its certificate", lambda: (inside / "cert.pem").exists())
    path.write_bytes((inside / "cert.pem").read_bytes() + (inside / "key.pem").read_bytes())
    return path


def thief(node: Node, bundle: Path) -> Callable[[str], str]:
    """Return what somebody on the host gets with that certificate who asks for a key."""
    script = (
        "import base64, sys\n"
        "from discovery.wire.blocking import BlockingCaller\n"
        "from discovery.wire.contexts import client_context\n"
        f"tls = client_context(sys.argv[1], sys.argv[1], open({str(node.state_dir / 'tls' / 'ca.pem')!r}).read())\n"
        f"caller = BlockingCaller('https://{GATEWAY}:1111', timeout_s=20, tls=tls)\n"
        "body = {'key': base64.b64encode(sys.argv[2].encode()).decode()}\n"
        "try:\n"
        "    caller.request('POST', '/v3/kv/range', body=body)\n"
        "except Exception as error:\n"
        "    print(type(error).__name__, error)\n"
        "else:\n"
        "    print('got it')\n"
    )
    return lambda key: node.python("-c", script, str(bundle), key).stdout.strip()


@pytest.mark.needs_root
def test_a_job_uses_its_own_prefix_and_no_other(node: Node) -> None:
    assert "settings" not in node.status().features["discovery"]
    found = used(node, "mine", "/app/a", "/app", "/other/a", "/discoverd/x", prefixes=("/app/", "/second/"))
    assert found == {
        "/app/a": [200, 200],
        "/app": [403, 403],
        "/other/a": [403, 403],
        "/discoverd/x": [403, 403],
        "everything": 403,
    }
    assert granted(node) == []


@pytest.mark.needs_root
def test_without_a_grant_the_port_is_closed_also_to_who_has_a_certificate(node: Node) -> None:
    node.start(spec(node, "victim", "sleep", "600"))
    bundle = bundle_of(node, "victim")
    ca = (node.state_dir / "tls" / "ca.pem").read_text()
    stolen = {"cert.pem": bundle.read_text(), "ca.pem": ca}
    program = "import socket; socket.create_connection(('100.102.0.1', 1111), 20)"
    node.start(node.spec("plain", "python3", "-c", program, image="system"))
    assert node.wait_ended("plain").exit_status == 1
    assert any("ConnectionRefusedError" in line for line in node.log("plain"))
    env = {"STORE_URL": f"https://{GATEWAY}:1111", "STORE_CA": "/run/secrets/ca.pem",
           "STORE_CERT": "/run/secrets/cert.pem", "STORE_KEY": "/run/secrets/cert.pem"}  # fmt: skip
    files = tuple(SecretFile(path=path, content=content) for path, content in stolen.items())
    assert used(node, "robber", "/app/a", prefixes=(), env=env, secrets=files) == {
        "/app/a": ["ConnectionRefusedError"] * 2, "everything": "ConnectionRefusedError",
    }  # fmt: skip
    assert used(node, "robber2", "/app/a", prefixes=(), env=env, secrets=files, has_host_network=True) == {
        "/app/a": [200, 200], "everything": 403,
    }  # fmt: skip
    node.stop("victim")


@pytest.mark.needs_root
def test_a_grant_ends_with_its_job_and_does_not_come_back_with_its_name(node: Node) -> None:
    node.start(spec(node, "again", "sleep", "600"))
    stolen = thief(node, bundle_of(node, "again"))
    assert stolen("/app/a") == "got it"
    assert "permission denied" in stolen("/other")
    assert granted(node) == ["again"]
    node.stop("again")
    assert granted(node) == []
    assert "permission denied" in stolen("/app/a")
    assert node.hostd("forget", "again").returncode == 0
    node.start(spec(node, "again", "sleep", "600"))
    newer = thief(node, bundle_of(node, "again").rename(node.folder / "newer.pem"))
    assert newer("/app/a") == "got it"
    assert granted(node) == ["again"]
    node.stop("again")


@pytest.mark.needs_root
def test_a_hostd_that_is_away_takes_nothing_and_what_ended_meanwhile_is_taken_back(node: Node) -> None:
    lasting = spec(node, "lasting", "sleep", "600")
    node.start(lasting)
    node.start(spec(node, "short", "sleep", "600"))
    stolen, dead = thief(node, bundle_of(node, "lasting")), thief(node, bundle_of(node, "short"))
    short = node.job("short").pid
    node.kill_daemon()
    os.kill(short, 9)
    assert stolen("/app/a") == "got it"
    node.up()
    wait_until("the grant of the dead is taken back", lambda: granted(node) == ["lasting"])
    assert stolen("/app/a") == "got it"
    assert "permission denied" in dead("/app/a")
    env = node.hostd("exec", "lasting", "--", "/bin/sh", "-c", "echo $STORE_URL $STORE_CERT; ls -l /run/secrets/store")
    assert f"https://{GATEWAY}:1111 /run/secrets/store/cert.pem" in env.stdout, env.stderr
    assert len(re.findall(r"-r--r-----", env.stdout)) == 3
    node.stop("lasting")
    assert granted(node) == []


@pytest.mark.needs_root
@pytest.mark.parametrize("point", GRANT_POINTS)
def test_a_hostd_that_dies_while_it_grants_or_takes_back_leaves_no_grant(node: Node, point: str) -> None:
    job_id, fault = point.replace(".", "-").replace(" ", "-"), node.folder / "fault"
    node.kill_daemon()
    with (node.state_dir / "hostd.log").open("ab") as log:
        command = node.inside(sys.executable, faulty_daemon.__file__)
        daemon = subprocess.Popen(command, env=node.environment() | {"FAULT_FILE": str(fault)}, stdout=log, stderr=log)
    wait_until("it serves", lambda: bool(node.status().host_id))
    wanted = spec(node, job_id, "sleep", "600")
    if "undo" in point:
        node.start(wanted)
        stolen = thief(node, bundle_of(node, job_id))
        assert stolen("/app/a") == "got it"
    fault.write_text(f"{point} hostd {job_id}")
    with suppress(ServiceError):
        node.stop(job_id) if "undo" in point else node.start(wanted)
    daemon.wait(60)
    node.up()
    if "undo" in point:
        wait_until("it has ended", lambda: node.job(job_id).status == "done")
        assert "permission denied" in stolen("/app/a")
    else:
        node.start(wanted)
        stolen = thief(node, bundle_of(node, job_id))
        assert stolen("/app/a") == "got it"
        node.stop(job_id)
    wait_until("no grant is left", lambda: granted(node) == [])


@pytest.mark.needs_root
def test_nothing_of_it_is_shown_or_written(node: Node) -> None:
    node.start(spec(node, "shown", "sleep", "600"))
    bundle = bundle_of(node, "shown").read_bytes()
    secret = bundle.split(b"PRIVATE KEY-----\n")[1].splitlines()[1]
    assert secret not in node.hostd("inspect", "shown").stdout.encode()
    for path in (node.state_dir / "hostd.db", node.state_dir / "hostd.log", node.state_dir / "discovery.log"):
        assert secret not in path.read_bytes()
    assert secret not in b"".join(path.read_bytes() for path in (node.state_dir / "discovery").glob("*.log"))
    node.stop("shown")


@pytest.mark.needs_root
def test_etcd3gw_in_a_job_of_an_ordinary_user(node: Node) -> None:
    pytest.importorskip("etcd3gw", reason="the client under test: pip install etcd3gw")
    packages = sysconfig.get_paths()["purelib"]
    done = node.start(
        spec(
            node, "client", "python3", "-c", ETCD3GW, user="1000:1000", env={"PYTHONPATH": "/packages"},
            mounts=(BindMount(source=packages, path="/packages"),),
        )
    )  # fmt: skip
    assert done.status in ("pending", "starting", "running")
    ended = node.wait_ended("client")
    assert ended.exit_status == 0, node.log("client")
    assert node.log("client")[-1] == "well"


@pytest.mark.needs_root
def test_by_hand(node: Node) -> None:
    script = (
        "import os, ssl, urllib.request as u; t = ssl.create_default_context(cafile=os.environ['STORE_CA']);"
        "t.load_cert_chain(os.environ['STORE_CERT'], os.environ['STORE_KEY']);"
        "r = u.Request(os.environ['STORE_URL'] + '/v3/kv/range', b'{\"key\": \"L2J5L2hhbmQ=\"}');"  # /by/hand
        "print(u.urlopen(r, context=t).status)"
    )
    words = ("--image", "system", "--store-prefix", "/by/", "--", "python3", "-c", script)
    done = node.hostd("run", *words)
    assert (done.returncode, done.stdout) == (0, "200\n"), done.stderr
    refused = node.hostd("run", "--store-prefix", "/", "--", "/bin/true")
    assert (refused.returncode, "discovery's own" in refused.stderr) == (64, True)


@pytest.mark.needs_root
def test_curl_on_the_host_with_a_certificate_by_hand(node: Node) -> None:
    """The port is there for people and agents, too, by `hostd tls client`."""
    bundle = node.folder / "reader.pem"
    made = node.hostd("tls", "client", "reader", "--role", "read-only")
    bundle.write_text(made.stdout)
    bundle.chmod(0o600)
    ca = str(node.state_dir / "tls" / "ca.pem")
    asked = ("--cacert", ca, "--cert", str(bundle), "-d", '{"key": "AA==", "range_end": "AA=="}')
    answer = sh(*node.inside("curl", "-sS", "-m", "20", *asked, f"https://{GATEWAY}:1111/v3/kv/range"))
    assert json.loads(answer)["kvs"]
    bare = subprocess.run(
        node.inside("curl", "-sS", "-m", "20", "--cacert", ca, f"https://{GATEWAY}:1111/version"), capture_output=True
    )
    assert bare.returncode != 0


# without a machine


GOOD = JobSpec(
    id="a", layers=(Layer(digest="sha256:" + "a" * 64, size_bytes=1),), args=("/x",), store_prefixes=("/app/",)
)


class FakeStore:
    """The store, away as long as `is_away`."""

    def __init__(self) -> None:
        self.keys: dict[str, bytes] = {}
        self.is_away = False

    def _check(self) -> None:
        if self.is_away:
            raise Unavailable("away")

    async def put(self, key: str, value: bytes) -> int:
        self._check()
        self.keys[key] = value
        return 1

    async def delete(self, key: str) -> bool:
        self._check()
        return self.keys.pop(key, None) is not None

    async def range(self, prefix: str) -> Range:
        self._check()
        found = [
            KeyValue(key=key, value=value, create_revision=1, mod_revision=1, version=1)
            for key, value in self.keys.items()
            if key.startswith(prefix)
        ]
        return Range(items=found, revision=1)

    async def close(self) -> None:
        return


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load({"state_dir": str(tmp_path), "run_dir": str(tmp_path / "run"), "host_id": "me"}, file=tmp_path / "none")


@pytest.fixture
async def made(config: Config, monkeypatch: pytest.MonkeyPatch) -> tuple[Grants, FakeStore]:
    async def reach(_: Grants) -> None:
        return

    monkeypatch.setattr(Grants, "_reach", reach)
    found, store = Grants(config), FakeStore()
    await found.close()
    monkeypatch.setattr(found, "_store", store)
    return found, store


async def test_the_certificate_is_the_one_that_the_store_knows(made: tuple[Grants, FakeStore], config: Config) -> None:
    from cryptography import x509

    given, store = made
    files = {file.path.rpartition("/")[2]: file for file in await given.apply(GOOD)}
    certificate = x509.load_pem_x509_certificate(files["cert.pem"].content.encode())
    assert store.keys == {"/discoverd/grants/me/a": f"{certificate.serial_number:X}".encode()}
    assert {file.mode for file in files.values()} == {0o440}
    bundle = config.state_dir / "bundle.pem"
    bundle.write_text(files["cert.pem"].content + files["key.pem"].content)
    client_context(str(bundle), str(bundle), files["ca.pem"].content)
    await given.undo("a")
    await given.undo("a")
    await given.undo("never")
    assert store.keys == {}


async def test_what_cannot_be_taken_back_is_taken_back_later(made: tuple[Grants, FakeStore]) -> None:
    given, store = made
    await given.apply(GOOD)
    store.is_away = True
    await given.undo("a")
    assert store.keys
    with pytest.raises(Unavailable):
        await given._sweep(lambda: {"a"})
    store.is_away = False
    await given._sweep(lambda: {"a"})  # its record may not say yet that it has ended
    assert store.keys == {}


async def test_after_a_restart_what_is_of_no_living_job_goes(made: tuple[Grants, FakeStore]) -> None:
    given, store = made
    store.keys = {"/discoverd/grants/me/lives": b"1", "/discoverd/grants/me/dead": b"2", "/discoverd/grants/it/x": b"3"}
    await given._sweep(lambda: {"lives"})
    assert list(store.keys) == ["/discoverd/grants/me/lives", "/discoverd/grants/it/x"]
    await given.undo("lives")
    assert list(store.keys) == ["/discoverd/grants/it/x"]


async def test_a_store_that_does_not_come_is_said(
    made: tuple[Grants, FakeStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    given, store = made
    store.is_away = True
    monkeypatch.setattr(grants, "READY_S", 0.0)
    with pytest.raises(Unavailable):
        await given.apply(GOOD)


async def test_a_host_whose_store_does_not_listen_grants_nothing(tmp_path: Path) -> None:
    for flags in ({"discovery_listen": ""}, {"discovery_members": "https://192.0.2.9:1111"}):
        assert not load({"state_dir": str(tmp_path), "run_dir": "/run/x", **flags}, file=tmp_path / "none").store_url
    with pytest.raises(InvalidSpec):
        await NoStore().apply(GOOD)
    assert await NoStore().apply(msgspec.structs.replace(GOOD, store_prefixes=())) == ()
