"""The API over mutual TLS on a real node: every command from afar, roles, jobs that may not, starts that come twice."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import ssl
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from discovery.wire.contexts import client_context, server_context
from hostd import remote
from hostd.authority import Authority
from hostd.config import load
from tests.hostd.node import Node, wait_until
from tests.hostd.node import node as new_node
from tests.pace import SLOWNESS

pytestmark = [pytest.mark.needs_root, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]
URL = "https://192.0.2.1:1113"

CONCURRENT = """
import asyncio, sys
import msgspec
from discovery.wire.contexts import client_context
from discovery.wire.errors import ServiceError
from hostd.client import HostClient
from hostd.errors import JobExists
from hostd.types import JobSpec

async def main():
    address, bundle, raw = sys.argv[1:4]
    pem = open(bundle).read()
    tls = client_context(bundle, bundle, pem.partition("-----END CERTIFICATE-----")[2])
    spec = msgspec.json.decode(raw, type=JobSpec)
    other = msgspec.structs.replace(spec, args=("/bin/sleep", "601"))
    async with HostClient(address, tls=tls) as client:
        wanted = [client.start(spec) for _ in range(20)] + [client.start(other) for _ in range(20)]
        answers = await asyncio.gather(*wanted, return_exceptions=True)
        jobs = [a for a in answers if not isinstance(a, BaseException)]
        refused = [a.code for a in answers if isinstance(a, ServiceError)]
        # Over many connections either may come first; whichever did, the job is its own.
        again = await client.start(next(job.spec for job in jobs))
        print(len({job.created_at for job in [*jobs, again]}), len(jobs), sorted(set(refused)), len(refused))
asyncio.run(main())
"""


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with new_node() as made:
        made.api_listen = "192.0.2.1:1113"
        made.up()
        yield made
        made.down()


@pytest.fixture(scope="module")
def bundle(node: Node) -> Path:
    return make_bundle(node, "alice")


def make_bundle(node: Node, name: str, *flags: str) -> Path:
    done = node.hostd("tls", "client", name, *flags)
    assert done.returncode == 0, done.stderr
    path = node.folder / f"{name}.pem"
    path.write_text(done.stdout)
    return path


def test_every_command_works_from_afar(node: Node, bundle: Path) -> None:
    far = ("--host", URL, "--cert", str(bundle))
    done = node.hostd(*far, "run", "--name", "hello", "-i", "--image", "base", "--", "/bin/cat", stdin="from afar\n")
    assert (done.returncode, done.stdout) == (0, "from afar\n"), done.stderr
    assert "from afar" in node.hostd(*far, "log", "hello").stdout
    assert json.loads(node.hostd(*far, "inspect", "hello").stdout)["exit_status"] == 0
    assert "hello" in node.hostd(*far, "ps", "-a").stdout
    assert node.hostd(*far, "forget", "hello").stdout == "hello forgotten\n"
    assert json.loads(node.hostd(*far, "status", "--json").stdout)["host_id"] == "testhost"


def test_what_is_done_on_the_machine_is_not_done_from_afar(node: Node, bundle: Path) -> None:
    for words in (["down"], ["up"], ["tls", "init"], ["image", "build"]):
        done = node.hostd("--host", URL, "--cert", str(bundle), *words)
        assert (done.returncode, "on the machine itself" in done.stderr) == (64, True)


def test_without_a_certificate_nothing_works(node: Node) -> None:
    done = node.hostd("--host", URL, "ps")
    assert done.returncode == 64
    assert "tls client" in done.stderr


def test_a_read_only_certificate_looks_and_does_nothing(node: Node) -> None:
    far = ("--host", URL, "--cert", str(make_bundle(node, "bob", "--read-only")))
    assert node.hostd(*far, "ps").returncode == 0
    assert node.hostd(*far, "run", "--name", "never", "--", "/bin/true").returncode == 77
    assert node.hostd(*far, "forget").returncode in (0, 77)
    assert node.jobs(active="") == []


def test_a_job_does_not_reach_the_port(node: Node) -> None:
    program = "import socket; socket.create_connection(('192.0.2.1', 1113), 3)"
    node.start(node.spec("prober", "/usr/bin/python3", "-c", program, image="system"))
    assert node.wait_ended("prober").exit_status == 1
    assert any("Error" in line for line in node.log("prober"))


@pytest.mark.parametrize("transport", ["unix", "tls"])
def test_the_same_start_many_times_is_one_job_and_another_spec_is_refused(
    node: Node, bundle: Path, transport: str
) -> None:
    address = URL if transport == "tls" else f"unix://{node.run_dir}/api/hostd.sock"
    spec = msgspec.json.encode(node.spec(f"once-{transport}", "/bin/sleep", "600")).decode()
    done = node.python("-c", CONCURRENT, address, str(bundle), spec)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "1 20 ['job_exists'] 20\n"
    assert [job.spec.id for job in node.jobs(active="")] == [f"once-{transport}"]
    node.stop(f"once-{transport}")


def test_the_document_and_the_version_are_there(node: Node) -> None:
    document = msgspec.json.decode(node.caller().request("GET", "/v1/openapi.json"))
    assert document["servers"] == [{"url": "/v1"}]
    assert "mutualTLS" in {scheme["type"] for scheme in document["components"]["securitySchemes"].values()}


def test_after_a_restart_the_same_certificates_count(node: Node, bundle: Path) -> None:
    node.kill_daemon()
    node.up()
    far = ("--host", URL, "--cert", str(bundle))
    wait_until("the API answers again", lambda: node.hostd(*far, "ps").returncode == 0)
    shown = json.loads(node.hostd("tls", "show", "--json").stdout)
    assert shown["api_listen"] == "192.0.2.1:1113"
    assert shown["server_expires"] < shown["authority_expires"]


async def test_a_renewed_certificate_counts_from_the_next_handshake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "RENEWAL_CHECK_S", 0.05)
    config = load({"state_dir": str(tmp_path), "run_dir": "/run/x", "host_ip": "192.0.2.1"}, file=tmp_path / "none")
    await remote.ensure_certificate(config)
    bundle = tmp_path / "client.pem"
    bundle.write_bytes(Authority.open(config.tls_dir).client("alice"))
    server = server_context(config.tls_dir / "ca.pem", remote.server_pem(config))
    client = client_context(str(bundle), str(bundle), (config.tls_dir / "ca.pem").read_text())
    before = handshake(server, client)
    assert handshake(server, client) == before
    remote.server_pem(config).unlink()
    async with asyncio.timeout(30 * SLOWNESS), asyncio.TaskGroup() as group:
        keeping = group.create_task(remote.keep_certificate(config, server))
        while handshake(server, client) == before:
            await asyncio.sleep(0.05)
        keeping.cancel()


def handshake(server: ssl.SSLContext, client: ssl.SSLContext) -> object:
    """Return the serial number that the server shows."""
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [server.wrap_bio(there, back, server_side=True), client.wrap_bio(back, there, server_hostname="192.0.2.1")]
    for end in reversed(ends * 3):
        with contextlib.suppress(ssl.SSLWantReadError):
            end.do_handshake()
    return (ends[1].getpeercert() or {})["serialNumber"]
