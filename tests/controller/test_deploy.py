"""Deployments: nothing is taken away before its replacement serves, and a bad release goes away by itself."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.client import ControllerClient
from controller.daemon import Controller
from controller.deploy import is_instant, plan
from controller.errors import DeploymentInProgress
from controller.types import (
    App,
    AppChange,
    Deployment,
    DeploymentEvent,
    Formation,
    NewApp,
    NewDeployment,
    NewRelease,
    ProcessType,
    Release,
    Scale,
)
from discovery.wire.errors import Invalid
from hostd.types import Port
from tests.controller.conftest import Discovery, eventually, new_release, running_app, running_controller
from tests.controller.fake_host import FakeHost


async def finished(client: ControllerClient, deployment: Deployment) -> tuple[Deployment, list[DeploymentEvent]]:
    async with asyncio.timeout(30):
        events = [event async for event in client.deployment_events(deployment.id)]
    return await client.deployment(deployment.id), events


def fewest_up(host: FakeHost, from_index: int, before: Sequence[str]) -> int:
    """Replay the host's history and return the fewest jobs that were up at any time."""
    up = set(before)
    fewest = len(up)
    for job_id, _, kind in host.history[from_index:]:
        if kind == "up":
            up.add(job_id)
        elif kind in ("stopping", "ended"):
            up.discard(job_id)
        fewest = min(fewest, len(up))
    return fewest


async def test_with_nothing_running_a_deployment_is_complete_at_once(client: ControllerClient) -> None:
    app = await client.create_app(NewApp(name="example"))
    release = await new_release(client, app)
    deployment = await client.create_deployment("example", NewDeployment(release_id=release.id))
    assert deployment.status == "complete"
    assert (await client.current_release("example")).id == release.id
    _, events = await finished(client, deployment)
    assert [event.status for event in events] == ["complete"]


async def test_every_new_job_is_up_before_an_old_one_goes(client: ControllerClient, host: FakeHost) -> None:
    app = await running_app(client, host, count=3)
    before, at = [job.spec.id for job in host.up()], len(host.history)
    release = await new_release(client, app, "late", "0.05")
    deployment, events = await finished(
        client, await client.create_deployment("example", NewDeployment(release_id=release.id))
    )
    assert deployment.status == "complete"
    await eventually(
        "only the new release is up", lambda: {j.spec.labels["release"] for j in host.up()} == {release.id}
    )
    assert len(host.up()) == 3
    assert fewest_up(host, at, before) == 3
    assert [f.release_id for f in await client.formations("example")] == [release.id]
    assert (await client.current_release("example")).id == release.id
    told = [(event.job_type, event.job_state) for event in events if event.job_id]
    assert told == [("web", "up"), ("web", "down")] * 3
    assert (events[0].status, events[-1].status) == ("pending", "complete")


async def test_a_release_that_crashes_is_taken_back_and_says_what_it_wrote(
    client: ControllerClient, host: FakeHost
) -> None:
    app = await running_app(client, host, count=2)
    before, at = sorted(job.spec.id for job in host.up()), len(host.history)
    release = await new_release(client, app, "crash", "7")
    deployment, _ = await finished(
        client, await client.create_deployment("example", NewDeployment(release_id=release.id))
    )
    assert deployment.status == "failed"
    assert "ended with status 7" in deployment.error
    assert "cannot find module express" in deployment.error
    assert sorted(job.spec.id for job in host.up()) == before
    assert fewest_up(host, at, before) == 2
    assert (await client.current_release("example")).id == app.release_id
    assert [f.release_id for f in await client.formations("example")] == [app.release_id]
    again = await new_release(client, app)
    repaired, _ = await finished(client, await client.create_deployment("example", NewDeployment(release_id=again.id)))
    assert repaired.status == "complete"


async def test_old_jobs_that_were_gone_already_come_back_when_a_later_new_one_fails(
    client: ControllerClient, host: FakeHost
) -> None:
    app = await client.create_app(NewApp(name="example"))
    fine = {"clock": ProcessType(args=("serve",)), "web": ProcessType(args=("serve",))}
    first = await new_release(client, app, processes=fine)
    await client.create_deployment("example", NewDeployment(release_id=first.id))
    await client.scale("example", Scale(processes={"clock": 1, "web": 1}))
    await eventually("both are up", lambda: len(host.up()) == 2)
    second = await new_release(client, app, processes={**fine, "web": ProcessType(args=("fail",))})
    deployment, _ = await finished(
        client, await client.create_deployment("example", NewDeployment(release_id=second.id))
    )
    assert (deployment.status, "no layer" in deployment.error) == ("failed", True)
    await eventually(
        "the old release is whole", lambda: [j.spec.labels["release"] for j in host.up()] == [first.id] * 2
    )


async def test_a_job_that_never_serves_fails_the_deployment_in_time(client: ControllerClient, host: FakeHost) -> None:
    app = await running_app(client, host, count=1)
    release = await new_release(client, app, "slow")
    deployment, _ = await finished(
        client, await client.create_deployment("example", NewDeployment(release_id=release.id, timeout_s=1))
    )
    assert deployment.status == "failed"
    assert "did not listen on $PORT within 1 s" in deployment.error
    await eventually("nothing of it is left", lambda: len(host.running()) == 1)


async def test_types_that_the_new_release_lacks_end(client: ControllerClient, host: FakeHost) -> None:
    app = await client.create_app(NewApp(name="example"))
    both = {"clock": ProcessType(args=("serve",)), "web": ProcessType(args=("serve",))}
    first = await new_release(client, app, processes=both)
    await client.create_deployment("example", NewDeployment(release_id=first.id))
    await client.scale("example", Scale(processes={"clock": 2, "web": 1}))
    await eventually("all are up", lambda: len(host.up()) == 3)
    second = await new_release(client, app)
    await finished(client, await client.create_deployment("example", NewDeployment(release_id=second.id)))
    await eventually("web alone is left", lambda: [j.spec.labels["type"] for j in host.up()] == ["web"])


async def test_one_deployment_at_a_time_and_no_scaling_meanwhile(client: ControllerClient, host: FakeHost) -> None:
    app = await running_app(client, host, count=1)
    release = await new_release(client, app, "slow")
    deployment = await client.create_deployment("example", NewDeployment(release_id=release.id, timeout_s=2))
    with pytest.raises(DeploymentInProgress):
        await client.create_deployment("example", NewDeployment(release_id=release.id))
    with pytest.raises(DeploymentInProgress):
        await client.scale("example", Scale(processes={"web": 2}))
    await finished(client, deployment)
    await client.scale("example", Scale(processes={"web": 2}))


async def test_a_fixed_port_goes_down_before_it_comes_up(client: ControllerClient, host: FakeHost) -> None:
    host.stop_s = 0.1
    app = await client.create_app(NewApp(name="router", meta={"system": "true"}))
    process = ProcessType(args=("serve",), ports=(Port(number=8080, service="router"),))
    first = await new_release(client, app, processes={"web": process})
    await client.create_deployment("router", NewDeployment(release_id=first.id))
    await client.scale("router", Scale(processes={"web": 1}))
    await eventually("it is up", lambda: len(host.up()) == 1)
    second = await new_release(client, app, processes={"web": process})
    deployment, _ = await finished(
        client, await client.create_deployment("router", NewDeployment(release_id=second.id))
    )
    assert deployment.status == "complete"
    assert [job.spec.labels["release"] for job in host.up()] == [second.id]
    broken = await new_release(client, app, processes={"web": ProcessType(args=("crash", "1"), ports=process.ports)})
    deployment, _ = await finished(
        client, await client.create_deployment("router", NewDeployment(release_id=broken.id))
    )
    assert deployment.status == "failed"
    assert [job.spec.labels["release"] for job in host.up()] == [second.id]


async def test_a_controller_that_takes_over_in_the_middle_goes_on(
    client: ControllerClient, host: FakeHost, discovery: Discovery
) -> None:
    app = await client.create_app(NewApp(name="example"))
    async with running_controller(discovery, "next") as successor:
        app = await running_app(client, host, count=3, name="other")
        release = await new_release(client, app, "late", "0.5")
        before, at = [job.spec.id for job in host.up()], len(host.history)
        deployment = await client.create_deployment(app.id, NewDeployment(release_id=release.id))
        await eventually("the first is new", lambda: any(j.spec.labels["release"] == release.id for j in host.up()))
        await successor.store.raw.delete("/controller/leader")  # a fresh election, so that either may win
        async with ControllerClient(f"http://127.0.0.1:{successor.port}", "0123456789abcdef0123456789abcdef") as other:
            ended, _ = await finished(other, deployment)
    assert ended.status == "complete"
    assert fewest_up(host, at, before) >= 3


async def test_deleting_the_app_ends_its_deployment(client: ControllerClient, host: FakeHost) -> None:
    app = await running_app(client, host, count=1)
    release = await new_release(client, app, "slow")
    await client.create_deployment("example", NewDeployment(release_id=release.id))
    await eventually("it begins", lambda: len(host.running()) == 2)
    await client.delete_app("example")
    await eventually("nothing is left", lambda: not host.running())


async def test_what_cannot_be_deployed_is_refused(client: ControllerClient) -> None:
    await client.create_app(NewApp(name="example"))
    empty = await client.create_release("example", NewRelease(artifact_ids=()))
    with pytest.raises(Invalid):
        await client.create_deployment("example", NewDeployment(release_id=empty.id))
    with pytest.raises(Invalid):
        await client.change_app("example", AppChange(deploy_timeout_s=0))


async def test_only_the_newest_deployments_are_kept(client: ControllerClient, controller: Controller) -> None:
    app = await client.create_app(NewApp(name="example"))
    for _ in range(25):
        release = await new_release(client, app)
        last = await client.create_deployment("example", NewDeployment(release_id=release.id))
    kept = await client.deployments("example")
    assert (len(kept), kept[0].id) == (21, last.id)


counts = st.dictionaries(st.sampled_from(["web", "clock", "x-web"]), st.integers(0, 4))


@given(counts, counts, st.sets(st.sampled_from(["web", "clock", "x-web"])), st.booleans())
def test_a_plan_keeps_the_counts_of_every_type_that_is_left(
    old: dict[str, int], new: dict[str, int], types: set[str], is_same: bool
) -> None:
    app = App(id="a", name="example", release_id="r2" if is_same else "r1")
    release = Release(
        id="r2", app_id="a", number=2, artifact_ids=("x",), processes={type: ProcessType() for type in types}
    )
    formations = [
        Formation(app_id="a", release_id="r1", processes=old),
        Formation(app_id="a", release_id="r2", processes=new),
    ]
    made = plan(app, release, formations, id="d", timeout_s=0, now_s=1)
    assert made.timeout_s == app.deploy_timeout_s
    assert set(made.processes) <= types
    assert made.old_release_id == ("" if is_same else "r1")
    if not is_same:
        assert all(made.processes.get(type, 0) >= old.get(type, 0) for type in types)
        assert made.old_processes == old
    assert is_instant(made) == (not any(made.old_processes.values()))
