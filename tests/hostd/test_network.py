from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import msgspec
import pytest

from discovery.wire.errors import Unavailable
from hostd.errors import HostFull, PortTaken
from hostd.runtime.network import NetworkConfig, NetworkState, NetworkStep, remove_leftovers
from hostd.types import Port
from netns import namespaces, nat_legacy, sysctls
from netns.links import index_of
from tests.netns import lab

pytestmark = pytest.mark.needs_root


@pytest.fixture
def outside() -> Iterator[lab.Outside]:
    with lab.node() as outside:
        yield outside


@pytest.fixture
def source(outside: lab.Outside) -> Iterator[lab.Source]:
    source = lab.Source()
    yield source
    source.close()


@pytest.fixture(params=["nft", "legacy"])
def config(request: pytest.FixtureRequest, tmp_path: Path) -> NetworkConfig:
    if request.param == "legacy" and not nat_legacy.is_installed():
        pytest.skip("needs python-iptables: pip install hostd[legacy]")
    return NetworkConfig(
        bridge="tnet0",
        subnet=IPv4Network("100.100.0.0/24"),
        host_ip=IPv4Address(lab.NODE),
        nat_name="testnet",
        nat_backend=request.param,
        state_file=tmp_path / "network.json",
        pool_size=2,
    )


def picture() -> dict[str, str]:
    """Return all that a node could leave behind in the node's namespace."""
    legacy = ""
    for table in ("nat", "filter"):
        saved = subprocess.run(["iptables-legacy", "-t", table, "-S"], capture_output=True, text=True, check=True)
        legacy += saved.stdout
    return {
        "links": str([link["ifname"] for link in json.loads(lab.ip("-j", "link"))]),
        "nft": subprocess.run(["nft", "list", "ruleset"], capture_output=True, text=True, check=True).stdout,
        "legacy": legacy,
        "forward": sysctls.read("ipv4/ip_forward") or "",
        "reserved": sysctls.read("ipv4/ip_local_reserved_ports") or "",
        "close_wait": sysctls.read("netfilter/nf_conntrack_tcp_timeout_close_wait") or "",
        "bridge": sysctls.read("bridge/bridge-nf-call-iptables") or "",
    }


@pytest.fixture
async def step(config: NetworkConfig, source: lab.Source) -> AsyncIterator[NetworkStep]:
    before = picture()
    step = NetworkStep(config, source)
    await step.prepare()
    await step.reconcile({})
    yield step
    await step.teardown()
    assert picture() == before
    assert source.held == {}


async def test_a_job_is_reached_by_its_number_and_gone_after_undo(
    step: NetworkStep, source: lab.Source, outside: lab.Outside
) -> None:
    state = await step.apply("web-1", (Port(), Port(is_public=True)), False)
    assert state.numbers == (55000, 55001)
    with lab.serve(55000, source.netns_of(state.netns_name)) as listener:
        lab.connect(lab.NODE, 55000).close()
        lab.connect(state.ip, 55000).close()
        assert lab.peer_seen_by(listener) == lab.NODE
    await step.undo("web-1")
    await step.undo("web-1")
    await step.undo("never-applied")
    with pytest.raises(ConnectionRefusedError):
        lab.connect(lab.NODE, 55000)


async def test_members_get_in(step: NetworkStep, source: lab.Source, outside: lab.Outside) -> None:
    state = await step.apply("web-1", (Port(),), False)
    with lab.serve(55000, source.netns_of(state.netns_name)):
        with pytest.raises(TimeoutError):
            outside.connect(lab.NODE, 55000, lab.MEMBER, timeout_s=0.3)
        await step.set_members([IPv4Address(lab.MEMBER)])
        outside.connect(lab.NODE, 55000, lab.MEMBER).close()


async def test_a_number_that_a_job_or_a_process_holds_is_refused(step: NetworkStep) -> None:
    await step.apply("router", (Port(number=80, is_public=True),), True)
    with pytest.raises(PortTaken) as refused:
        await step.apply("other", (Port(number=80),), False)
    assert refused.value.detail == {"number": 80}
    with lab.serve(8080), pytest.raises(PortTaken):
        await step.apply("other", (Port(), Port(number=8080)), False)
    state = await step.apply("other", (Port(), Port(number=8080)), False)
    assert state.numbers == (55000, 8080)


async def test_an_automatic_number_goes_round_a_process_of_the_host(step: NetworkStep) -> None:
    with lab.serve(55000):
        assert (await step.apply("web-1", (Port(),), False)).numbers == (55001,)
    assert (await step.apply("web-2", (Port(),), False)).numbers == (55000,)


async def test_a_job_on_the_hosts_network_gets_a_number_and_no_namespace(step: NetworkStep) -> None:
    state = await step.apply("router", (Port(is_public=True),), True)
    assert (state.netns_name, state.ip, state.numbers) == (None, lab.NODE, (55000,))


async def test_the_pool_is_filled_in_the_background_and_used(step: NetworkStep, source: lab.Source) -> None:
    async with asyncio.TaskGroup() as group:
        running = group.create_task(step.run())
        await lab.until(lambda: source.creations == 2)
        ready = set(source.held)
        state = await step.apply("web-1", (), False)
        assert state.netns_name in ready
        await lab.until(lambda: source.creations == 3)
        running.cancel()


async def test_the_namespace_of_an_ended_job_goes_behind_its_end_and_frees_its_address_then(
    step: NetworkStep, source: lab.Source
) -> None:
    async with asyncio.TaskGroup() as group:
        running = group.create_task(step.run())
        await lab.until(lambda: source.creations == 2)
        state = await step.apply("web-1", (), False)
        address = IPv4Address(state.ip)
        await step.undo("web-1")
        assert state.netns_name in source.held
        assert address in step._addresses.taken
        await lab.until(lambda: address not in step._addresses.taken)
        assert state.netns_name not in source.held
        running.cancel()


async def test_a_restarted_node_takes_over_living_jobs_and_forgets_the_dead(
    config: NetworkConfig, step: NetworkStep, source: lab.Source
) -> None:
    living = await step.apply("living", (Port(),), False)
    dead = await step.apply("dead", (Port(),), False)
    with lab.serve(55000, source.netns_of(living.netns_name)) as listener:
        await step.close()
        successor = NetworkStep(config, source)
        await successor.prepare()
        await successor.reconcile({"living": living})
        lab.connect(lab.NODE, 55000).close()
        assert lab.peer_seen_by(listener) == lab.NODE
    assert set(source.held) == {living.netns_name}
    with pytest.raises(ConnectionRefusedError):
        lab.connect(lab.NODE, 55001)
    fresh = await successor.apply("fresh", (Port(),), False)
    assert fresh.numbers == (55001,)
    assert fresh.ip not in (living.ip, dead.ip)
    await successor.undo("living")
    await successor.close()


def run(command: str) -> None:
    subprocess.run(command.split(), check=True)


async def test_rules_that_vanish_come_back(config: NetworkConfig, step: NetworkStep, source: lab.Source) -> None:
    state = await step.apply("web-1", (Port(),), False)
    if step.backend == "nft":
        run("nft flush ruleset")
    else:
        run("iptables-legacy -w -t nat -F")
    sysctls.write("ipv4/ip_forward", "0")
    await step.prepare()
    with lab.serve(55000, source.netns_of(state.netns_name)):
        lab.connect(lab.NODE, 55000).close()
    assert step.sysctls()["ipv4.ip_forward"] == "1"
    assert step.obstacles() == ()


async def test_a_reloaded_firewall_stops_neither_a_start_nor_an_end(step: NetworkStep, source: lab.Source) -> None:
    if step.backend != "nft":
        pytest.skip("flushed legacy chains raise no error; they are put back by comparing, once a minute")

    def reload() -> None:
        run("nft flush ruleset")

    reload()
    state = await step.apply("web-1", (Port(),), False)
    with lab.serve(55000, source.netns_of(state.netns_name)):
        lab.connect(lab.NODE, 55000).close()
    reload()
    await step.set_members([IPv4Address("192.0.2.77")])
    reload()
    await step.undo("web-1")


async def test_leftovers_of_a_killed_node_are_removed_by_name(
    config: NetworkConfig, source: lab.Source, outside: lab.Outside
) -> None:
    before = picture()
    killed = NetworkStep(config, source)
    await killed.prepare()
    await killed.apply("web-1", (Port(is_public=True),), False)
    await killed.close()
    await remove_leftovers(config)
    assert picture() == before
    await remove_leftovers(config)


async def test_a_full_subnet_is_said_and_freed_again(
    config: NetworkConfig, source: lab.Source, outside: lab.Outside
) -> None:
    small = NetworkStep(dataclasses.replace(config, subnet=IPv4Network("100.100.0.0/30")), source)
    await small.prepare()
    await small.apply("only", (Port(),), False)
    with pytest.raises(HostFull):
        await small.apply("second", (Port(),), False)
    await small.undo("only")
    assert (await small.apply("second", (Port(),), False)).numbers == (55000,)
    await small.undo("second")
    await small.teardown()


async def test_before_prepare_everything_says_not_yet(config: NetworkConfig, source: lab.Source) -> None:
    with pytest.raises(Unavailable):
        await NetworkStep(config, source).apply("early", (), False)


async def test_a_udp_client_that_keeps_sending_is_led_to_the_successor(
    step: NetworkStep, source: lab.Source, outside: lab.Outside
) -> None:
    port = Port(number=5353, protocol="udp", is_public=True)
    with namespaces.inside(outside.netns_fd):
        client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with client:
        for job_id in ("first", "second"):
            state = await step.apply(job_id, (port,), False)
            with lab.serve(5353, source.netns_of(state.netns_name), is_udp=True) as listener:
                listener.settimeout(0.2)

                def heard(listener: socket.socket = listener, sent: bytes = job_id.encode()) -> bool:
                    client.sendto(sent, (lab.NODE, 5353))  # the bridge takes a moment to see that its port is up
                    with contextlib.suppress(TimeoutError):
                        return listener.recv(20) == sent
                    return False

                await lab.until(heard)
            await step.undo(job_id)


async def test_jobs_are_led_round_the_bridge_filter_whatever_the_machine_had_set(
    config: NetworkConfig, source: lab.Source, outside: lab.Outside
) -> None:
    if sysctls.read("bridge/bridge-nf-call-iptables") is None:
        pytest.skip("needs br_netfilter")
    sysctls.write("bridge/bridge-nf-call-iptables", "1")
    step = NetworkStep(config, source)
    await step.prepare()
    one, two = await step.apply("one", (Port(),), False), await step.apply("two", (Port(),), False)
    with lab.serve(55000, source.netns_of(one.netns_name)):
        for caller in (one, two):
            lab.connect(lab.NODE, 55000, source.netns_of(caller.netns_name)).close()
    await step.teardown()
    assert sysctls.read("bridge/bridge-nf-call-iptables") == "1"


async def test_a_state_survives_its_way_through_json(step: NetworkStep) -> None:
    state = await step.apply("web-1", (Port(service="web"),), False)
    assert msgspec.json.decode(msgspec.json.encode(state), type=NetworkState) == state
    assert index_of(state.netns_name or "") > 0


async def test_a_shared_port_is_handed_over_without_a_moment_closed(step: NetworkStep) -> None:
    port = (Port(number=8080, is_public=True, is_shared=True),)
    await step.apply("old", port, True)
    with socket.create_server(("0.0.0.0", 8080), reuse_port=True):
        await step.apply("new", port, True)
        with pytest.raises(PortTaken):
            await step.apply("other", (Port(number=8080),), True)
        assert await published(step, 8080) >= {"new"}
        await step.undo("old")
        assert await published(step, 8080) == {"new"}
        await step.apply("failing", port, True)
        await step.undo("failing")
        assert await published(step, 8080) == {"new"}
    await step.undo("new")
    assert await published(step, 8080) == set()


async def published(step: NetworkStep, number: int) -> set[str]:
    assert step._nat is not None
    return {p.job_id for p in await step._nat.publications() if p.number == number}
