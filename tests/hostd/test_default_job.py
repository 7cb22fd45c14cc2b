"""What a program sees that gets the defaults and means harm: tried from inside a real job of a real node."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hostd.types import Port
from netns import namespaces
from tests.hostd.node import Node, sh, snapshot, wait_until
from tests.hostd.node import node as new_node

pytestmark = [
    pytest.mark.needs_root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(os.uname().machine != "x86_64", reason="the system calls' numbers are those of x86_64"),
]

PROBE = Path(__file__).with_name("hostile.py")
GATEWAY, HOST, OUTSIDE = "100.102.0.1", "192.0.2.1", "192.0.2.2"
METADATA = ("169.254.169.254", "169.254.170.2", "168.63.129.16", "100.100.100.200")
"""Where clouds tell a machine its secrets: most of them, Amazon's containers, Azure, Alibaba."""


@pytest.fixture(scope="module")
def machine() -> Iterator[Node]:
    with new_node() as made:
        outside = f"{made.name}_out"  # somebody out there who answers for every address
        sh("ip", "netns", "add", outside)
        try:
            sh(*made.inside("ip", "link", "set", "out0", "netns", outside))
            for address in (f"{OUTSIDE}/24", *(f"{each}/32" for each in METADATA)):
                sh("ip", "-n", outside, "addr", "add", address, "dev", "out0")
            sh("ip", "-n", outside, "link", "set", "out0", "up")
            before = snapshot(made)
            made.up()
            yield made
            made.down()
            assert snapshot(made) == before
        finally:
            sh("ip", "netns", "del", outside)


def tried(machine: Node, job_id: str, what: str, *arguments: str, **fields: object) -> dict[str, Any]:
    """Run one part of the probe in a default job (but for `fields`) and return what it reports."""
    command = ("python3", "-c", PROBE.read_text(), what, *arguments)
    machine.start(machine.spec(job_id, *command, image="system", **fields))
    assert machine.wait_ended(job_id).exit_status == 0, machine.log(job_id)
    found: dict[str, Any] = json.loads(machine.log(job_id)[-1])
    return found


def test_no_system_call_leads_to_namespaces_mounts_devices_or_keys(machine: Node) -> None:
    found = tried(machine, "calls", "calls")
    allowed = {name for name, result in found.items() if result == "OK"}
    assert allowed <= {"ptrace of itself", "chroot"}, found
    assert {found[name] for name in found if name.startswith(("unshare", "mount", "mknod", "clone "))} == {"EPERM"}


def test_no_socket_but_those_of_programs(machine: Node) -> None:
    found = tried(machine, "sockets", "sockets")
    assert {name for name, result in found.items() if result == "OK"} == {"tcp", "udp", "unix", "netlink route"}, found


def test_the_kernels_settings_are_read_only_and_its_secrets_hidden(machine: Node) -> None:
    before = Path("/dev/null").stat()
    found = tried(machine, "files", "files")
    assert found["writable"] == []
    assert found["readable"] == []
    assert found["changed"]  # what hides them is the job's own, none of the host's
    after = Path("/dev/null").stat()
    assert (after.st_mode, after.st_uid) == (before.st_mode, before.st_uid)


def test_of_the_host_it_reaches_the_name_server_alone(machine: Node) -> None:
    listening = [(HOST, "8080"), (GATEWAY, "8080"), (GATEWAY, "4001"), (GATEWAY, "22")]
    found = tried(machine, "ports", "connect", *(f"{host}:{port}" for host, port in [*listening, (GATEWAY, "53")]))
    assert found.pop(f"{GATEWAY}:53") == "OK"
    assert set(found.values()) == {"ECONNREFUSED"}


def test_a_clouds_metadata_is_out_of_reach(machine: Node) -> None:
    found = tried(machine, "metadata", "connect", *(f"{address}:80" for address in (OUTSIDE, *METADATA)))
    assert found.pop(f"{OUTSIDE}:80") == "ECONNREFUSED"
    assert set(found.values()) == {"timeout"}, found


def test_a_clouds_metadata_is_there_for_who_asks_for_it_by_name(machine: Node) -> None:
    addresses = [f"{address}:80" for address in METADATA]
    found = tried(machine, "reader", "connect", *addresses, reaches_metadata=True)
    assert set(found.values()) == {"ECONNREFUSED"}, found
    assert set(tried(machine, "no-reader", "connect", *addresses).values()) == {"timeout"}


def test_other_jobs_ports_are_out_of_reach_and_published_ones_are_not(machine: Node) -> None:
    script = "python3 -m http.server 9000 & exec python3 -m http.server $PORT"
    machine.start(machine.spec("tenant", "/bin/sh", "-c", script, image="system", ports=(Port(service="tenant"),)))
    other = machine.wait_up("tenant")
    wait_until("it serves", lambda: machine.curl(f"http://{other.ip}:9000/"))
    number = other.ports[0]
    direct = (f"{other.ip}:{number}", f"{other.ip}:9000")
    found = tried(machine, "neighbour", "connect", *direct, f"{HOST}:{number}", f"{HOST}:9000")
    assert found == {
        direct[0]: "timeout",
        direct[1]: "timeout",
        f"{HOST}:{number}": "OK",
        f"{HOST}:9000": "ECONNREFUSED",
    }
    machine.stop("tenant")


def test_the_nodes_own_apis_are_out_of_reach(machine: Node) -> None:
    """Whatever listens on the host, on any of its addresses: hostd's API, discovery's and its raft."""
    listeners = []
    with Path(f"/run/netns/{machine.name}").open() as netns, namespaces.inside(netns.fileno()):
        listeners = [socket.create_server(("0.0.0.0", port)) for port in (1113, 2379, 4001, 22)]
    ports = [listener.getsockname()[1] for listener in listeners]
    wanted = [f"{host}:{port}" for host in (HOST, GATEWAY, "127.0.0.1") for port in ports]
    found = tried(machine, "apis", "connect", *wanted)
    assert set(found.values()) == {"ECONNREFUSED"}, found
    found = tried(machine, "apis-host", "connect", *wanted, has_host_network=True)
    assert set(found.values()) == {"OK"}, found
    for listener in listeners:
        listener.close()


def test_ipv6_leads_neither_to_the_host_nor_to_another_job(machine: Node) -> None:
    machine.start(machine.spec("six", "python3", "-m", "http.server", "9000", "--bind", "::", image="system"))
    other = wait_until("it has an address", lambda: machine.job("six").ip)
    found = tried(machine, "from-six", "connect6", GATEWAY, other)
    assert set(found.values()) <= {"timeout", "EHOSTUNREACH"}, found
    machine.stop("six")


def test_it_speaks_with_its_own_address_only(machine: Node) -> None:
    found = tried(machine, "spoof", "spoof", "100.102.0.200", GATEWAY)
    assert "OK" not in found.values(), found


def test_a_tree_without_an_end_goes_with_its_job_and_breaks_nothing(machine: Node) -> None:
    daemon = machine.pid
    tried(machine, "deep", "deep", "5000")
    wait_until("its files are gone", lambda: list((machine.state_dir / "jobs").iterdir()) == [])
    assert machine.pid == daemon
    assert machine.log("deep")
