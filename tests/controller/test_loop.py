"""The scheduler's loop against a host that keeps records: what ends comes back, once, and not too eagerly."""

from __future__ import annotations

import asyncio
from collections import Counter

import msgspec

from controller.client import ControllerClient
from controller.daemon import Controller
from controller.scheduler import loop
from controller.types import ActualJob, NewApp, NewDeployment, ProcessType, Scale
from discovery.client import Services, Store
from discovery.wire import clock
from hostd.types import ENDED, Port, VolumeMount
from tests.controller.conftest import Discovery, eventually, new_release, running_app, running_controller
from tests.controller.fake_host import FakeHost


def ids(host: FakeHost) -> set[str]:
    return {job.spec.id for job in host.up()}


async def scaled(client: ControllerClient, name: str, process: ProcessType, count: int = 1) -> None:
    app = await client.create_app(NewApp(name=name))
    release = await new_release(client, app, processes={"web": process})
    await client.create_deployment(name, NewDeployment(release_id=release.id))
    await client.scale(name, Scale(processes={"web": count}))


async def test_scaling_up_and_down_keeps_the_oldest(client: ControllerClient, host: FakeHost) -> None:
    await running_app(client, host, count=1)
    first = ids(host)
    await client.scale("example", Scale(processes={"web": 4}))
    await eventually("four are up", lambda: len(host.up()) == 4)
    await client.scale("example", Scale(processes={"web": 1}))
    await eventually("the first is left", lambda: ids(host) == first)
    assert len(host.starts) == 4


async def test_a_killed_job_is_replaced_at_once(client: ControllerClient, host: FakeHost) -> None:
    await running_app(client, host, count=2)
    victim = next(iter(ids(host)))
    began = clock.monotonic_s()
    host.end(victim)
    await eventually("two are up again", lambda: len(host.up()) == 2)
    assert clock.monotonic_s() - began < 2
    assert len(host.starts) == 3


async def test_a_crash_loop_is_tried_5_times_and_then_waits(client: ControllerClient, host: FakeHost) -> None:
    await scaled(client, "example", ProcessType(args=("crash", "7")))
    await eventually("five starts", lambda: len(host.starts) == 5)
    await asyncio.sleep(1.0)  # what must not happen has this long to happen
    assert len(host.starts) == 5
    jobs = await client.jobs("example", is_all=True)
    assert {(job.state, job.exit_status) for job in jobs} == {("crashed", 7)}


async def test_a_job_that_its_host_refuses_is_shown_with_the_reason(client: ControllerClient, host: FakeHost) -> None:
    await scaled(client, "example", ProcessType(args=("refuse",)))
    seen: list[ActualJob] = []
    async with asyncio.timeout(10):
        while not seen:
            seen = [job for job in await client.jobs("example", is_all=True) if job.state == "failed"]
            await asyncio.sleep(0.02)
    assert seen[0].error == "not this one"
    assert await client.jobs("example") == []


async def test_a_job_that_restarts_itself_is_left_to_its_host(
    client: ControllerClient, host: FakeHost, discovery: Discovery
) -> None:
    app = await client.create_app(NewApp(name="router", meta={"system": "true"}))
    process = ProcessType(args=("serve",), restart="always")
    release = await new_release(client, app, processes={"web": process})
    await client.create_deployment("router", NewDeployment(release_id=release.id))
    await client.scale("router", Scale(processes={"web": 1}))
    await eventually("it is up", lambda: len(host.up()) == 1)
    (victim,) = host.up()
    host.end(victim.spec.id)
    await asyncio.sleep(0.3)  # as hostd's own pause
    assert len(host.starts) == 1
    host.emit("up", msgspec.structs.replace(victim, spec=msgspec.structs.replace(victim.spec, id="successor")))
    await asyncio.sleep(0.5)
    assert len(host.starts) == 1
    assert ids(host) == {"successor"}


async def test_a_restarted_controller_adopts_what_runs(
    discovery: Discovery, host: FakeHost, client: ControllerClient, controller: Controller
) -> None:
    await running_app(client, host, count=3)
    before = ids(host)
    async with running_controller(discovery, "second") as second:
        await eventually("it knows", lambda: second.wanted.is_current and second.hosts.is_known(0))
        await asyncio.sleep(0.3)
    assert ids(host) == before
    assert len(host.starts) == 3


async def test_only_one_of_two_controllers_acts_and_the_other_takes_over_at_once(
    discovery: Discovery, host: FakeHost
) -> None:
    async with running_controller(discovery, "second") as second:
        async with running_controller(discovery, "first") as first:
            async with ControllerClient(f"http://127.0.0.1:{first.port}", "0123456789abcdef0123456789abcdef") as client:
                await running_app(client, host, count=2)
                assert len(host.starts) == 2
        # whichever led: one is left
        host.end(next(iter(ids(host))))
        await eventually("replaced", lambda: len(host.up()) == 2)
        assert len(host.starts) == 3
        assert second.wanted.is_current


async def test_the_seat_of_a_controller_that_its_host_saw_end_is_taken_before_its_lease_ends(
    discovery: Discovery, host: FakeHost, raw: Store
) -> None:
    async with running_controller(discovery, "second") as second:
        async with ControllerClient(f"http://127.0.0.1:{second.port}", "0123456789abcdef0123456789abcdef") as client:
            await running_app(client, host, count=1)
    dead = host.up()[0].spec.id
    lease = await raw.lease_grant(600)
    await raw.put("/controller/leader", dead.encode(), lease=lease)
    host.end(dead)
    async with running_controller(discovery, "third"):
        await eventually("it acts", lambda: len(host.up()) == 1)


async def test_a_host_that_comes_back_has_its_jobs_still(
    client: ControllerClient, host: FakeHost, controller: Controller, discovery: Discovery
) -> None:
    await running_app(client, host, count=2)
    before = ids(host)
    async with Services(discovery.address) as services:
        (instance,) = await services.instances("hostd")
        await services.deregister("hostd", "one")
        await eventually("gone", lambda: not controller.hosts.all)
        await services.register(instance, lease=host.lease)
    await eventually("back", lambda: controller.hosts.is_known(0) and controller.hosts.all)
    await asyncio.sleep(0.3)
    assert ids(host) == before
    assert len(host.starts) == 2


async def test_jobs_spread_over_hosts_and_those_of_a_lost_host_are_placed_anew(
    client: ControllerClient, host: FakeHost, controller: Controller, discovery: Discovery
) -> None:
    other = FakeHost("two", discovery.folder / "two", discovery.address)
    async with other.served():
        async with other.registered():
            await eventually("both are known", lambda: len(controller.hosts.all) == 2 and controller.hosts.is_known(0))
            app = await client.create_app(NewApp(name="example"))
            release = await new_release(client, app)
            await client.create_deployment("example", NewDeployment(release_id=release.id))
            await client.scale("example", Scale(processes={"web": 4}))
            await eventually("two on each", lambda: (len(host.up()), len(other.up())) == (2, 2))
        await eventually("all on the one that is left", lambda: len(host.up()) == 4)


async def test_discovery_killed_and_back_changes_nothing(
    client: ControllerClient, host: FakeHost, controller: Controller, discovery: Discovery
) -> None:
    await running_app(client, host, count=2)
    before = ids(host)
    discovery.kill()
    await asyncio.sleep(0.3)
    await discovery.start()
    await client.scale("example", Scale(processes={"web": 3}))
    await eventually("the third is up", lambda: len(host.up()) == 3, 15)
    assert before < ids(host)


async def test_a_fixed_port_is_asked_for_once_a_host_and_the_rest_waits(
    client: ControllerClient, host: FakeHost
) -> None:
    process = ProcessType(args=("serve",), ports=(Port(number=8080, service="fixed"),))
    await scaled(client, "example", process, count=2)
    await eventually("one is up", lambda: len(host.up()) == 1)
    await asyncio.sleep(0.3)
    assert len(host.starts) == 1


async def test_a_volume_is_pinned_to_its_first_host(client: ControllerClient, host: FakeHost, raw: Store) -> None:
    await scaled(client, "example", ProcessType(args=("serve",), volumes=(VolumeMount(name="data", path="/data"),)))
    await eventually("it is up", lambda: len(host.up()) == 1)
    kept = await raw.get("/controller/wanted/pins/data")
    assert kept is not None
    assert kept.value == b"one"


async def test_ends_that_were_asked_for_are_not_held_against_a_process(
    client: ControllerClient, host: FakeHost
) -> None:
    await running_app(client, host, count=1)
    for round in range(7):
        (job,) = await client.jobs("example")
        await client.stop_job("example", job.id)
        await eventually(f"replaced {round}", lambda job=job: ids(host) and job.id not in ids(host), 5)  # type: ignore[misc]


async def test_old_events_are_dropped(client: ControllerClient, host: FakeHost, controller: Controller) -> None:
    await running_app(client, host, count=1)
    scheduler = loop.Scheduler(controller.store, controller.wanted, controller.hosts, controller.routes)
    from controller import store

    async def left() -> int:
        await scheduler.sweep()
        kinds = Counter[str]()
        async for event in client.events(since=0):
            kinds[event.kind] += 1
            if event.kind == "current":
                break
        return kinds.total()

    before = store.EVENTS_MAX
    store.EVENTS_MAX = 3
    try:
        for _ in range(50):  # an event that comes after one sweep goes with the next
            if await left() == 4:
                break
        assert await left() == 4
    finally:
        store.EVENTS_MAX = before


async def test_jobs_of_unknown_labels_are_none_of_ours(client: ControllerClient, host: FakeHost) -> None:
    await running_app(client, host, count=1)
    (job,) = host.up()
    alien = msgspec.structs.replace(job, spec=msgspec.structs.replace(job.spec, id="alien", labels={}))
    host.emit("up", alien)
    await client.scale("example", Scale(processes={"web": 2}))
    await eventually("two more", lambda: len(host.up()) == 3)
    assert host.jobs["alien"].status not in ENDED
