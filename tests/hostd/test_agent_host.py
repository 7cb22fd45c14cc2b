"""Two hosts, one store: the second follows the first's over TCP, by certificate; jobs of neither get at the port."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack

import msgspec
import pytest

from discovery.types import Instance, StoreStatus
from discovery.wire.blocking import BlockingCaller
from tests.hostd.node import Node, sh, wait_until
from tests.hostd.node import node as new_node

pytestmark = [pytest.mark.needs_root, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]
FIRST, SECOND = "192.0.2.1", "192.0.2.2"
TRY = """
import socket, sys
for each in sys.argv[1:]:
    host, port = each.split(":")
    try:
        socket.create_connection((host, int(port)), 20)
        print(each, "open")
    except OSError as error:
        print(each, type(error).__name__)
"""


def connect(one: Node, other: Node) -> None:
    """Put the other host at the far end of the first one's uplink."""
    sh(*other.inside("ip", "link", "del", "up0"))
    sh(*one.inside("ip", "link", "set", "out0", "netns", other.name, "name", "up0"))
    for command in (f"addr add {SECOND}/24 dev up0", "link set up0 up", f"route add default via {FIRST}"):
        sh(*other.inside("ip", *command.split()))


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[Node, Node]]:
    with ExitStack() as stack:
        one, other = stack.enter_context(new_node(20)), stack.enter_context(new_node(21))
        connect(one, other)
        one.settings = {"HOSTD_DISCOVERY_LISTEN": "0.0.0.0:1111"}
        one.up()
        bundle, authority = other.folder / "host.pem", one.state_dir / "tls" / "ca.pem"
        made = one.hostd("tls", "client", "other", "--role", "host")
        assert made.returncode == 0, made.stderr
        bundle.write_text(made.stdout)
        other.subnet = "100.103.0.0/24"
        other.settings = {
            "HOSTD_HOST_ID": "other",
            "HOSTD_DISCOVERY_MEMBERS": f"https://{FIRST}:1111",
            "HOSTD_DISCOVERY_CA": str(authority),
            "HOSTD_DISCOVERY_CERT": str(bundle),
        }
        other.up()
        yield one, other
        other.down()
        one.down()


def store(node: Node) -> BlockingCaller:
    return BlockingCaller(f"unix://{node.run_dir}/discovery/discovery.sock", timeout_s=30)


def instances(node: Node, service: str) -> list[str]:
    found = store(node).request("GET", f"/services/{service}/instances", into=list[Instance])
    return [instance.host for instance in found]


def test_a_host_without_a_vote_follows_the_store(hosts: tuple[Node, Node]) -> None:
    one, other = hosts
    status = wait_until("it follows", lambda: store(other).request("GET", "/status", into=StoreStatus))
    assert (status.role, status.follows) == ("agent", f"https://{FIRST}:1111")
    wait_until("hosts know each other", lambda: instances(one, "hostd") == instances(other, "hostd") == [FIRST, SECOND])
    other.start(other.web("there", "web"))
    wait_until("a service of the second is seen by the first", lambda: instances(one, "web") == [SECOND])
    port = other.job("there").ports[0]
    wait_until("it answers across", lambda: one.curl(f"http://{SECOND}:{port}/").strip() == "there")
    other.stop("there")
    wait_until("it is gone", lambda: instances(one, "web") == [])


def test_jobs_of_neither_host_reach_the_port(hosts: tuple[Node, Node]) -> None:
    wait_until("hosts know each other", lambda: len(instances(hosts[1], "hostd")) == 2)
    for node in hosts:
        program = (TRY, f"{FIRST}:1111", f"{FIRST}:22")
        for job_id, closed, more in (
            ("inside", "ConnectionRefusedError", {}),
            ("outside", "open", {"has_host_network": True}),
        ):
            node.start(node.spec(job_id, "python3", "-c", *program, image="system", **more))
            assert node.wait_ended(job_id).exit_status == 0
            assert node.log(job_id) == [f"{FIRST}:1111 {closed}", f"{FIRST}:22 ConnectionRefusedError"], node.name


def test_what_the_host_of_the_store_grants_the_other_cannot(hosts: tuple[Node, Node]) -> None:
    one, other = hosts
    granted = ("sh", "-c", "echo $STORE_URL; test -s $STORE_CERT")
    one.start(one.spec("granted", *granted, store_prefixes=("/app/",)))
    assert one.wait_ended("granted").exit_status == 0
    assert one.log("granted") == ["https://100.102.0.1:1111"]
    other.start(other.spec("granted", *granted, store_prefixes=("/app/",)))
    ended = other.wait_ended("granted")
    assert ended.error is not None
    assert (ended.status, ended.error.code) == ("failed", "invalid_spec"), msgspec.to_builtins(ended.error)
