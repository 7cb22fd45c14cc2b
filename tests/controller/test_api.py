"""The API over a real discovery daemon: what people ask, and what they are refused."""

from __future__ import annotations

import asyncio
import base64
import os
from pathlib import Path

import msgspec
import pytest

from controller import jobs
from controller.client import ControllerClient
from controller.daemon import Controller
from controller.errors import (
    AppExists,
    AppNotFound,
    AppProtected,
    ArtifactNotFound,
    InvalidName,
    JobNotFound,
    KeyExists,
    KeyNotFound,
    NoRelease,
    ReleaseNotFound,
    UnknownProcessType,
)
from controller.types import (
    AppChange,
    Event,
    NewApp,
    NewDeployment,
    NewJob,
    NewKey,
    NewRelease,
    NewRoute,
    ProcessType,
    Scale,
)
from discovery.wire import attach
from discovery.wire.call import Caller
from discovery.wire.errors import Invalid, Unauthorized, Unavailable
from discovery.wire.serve import frames
from router.errors import RouteExists, RouteNotFound
from tests.controller.conftest import DOMAIN, KEY, Discovery, eventually, new_release, running_app
from tests.controller.fake_host import FakeHost

PUBLIC_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIKfJmJdkQrWKZ4q0ZsHwyoPPPVx6m7b3nXoVx8tsxIvN me@laptop"


async def test_only_ping_and_the_api_document_are_public(controller: Controller) -> None:
    address = f"http://127.0.0.1:{controller.port}"
    async with Caller(address) as nobody, Caller(address, key="x" * 32) as stranger:
        assert await nobody.request("GET", "/ping") == b"ok\n"
        document = msgspec.json.decode(await nobody.request("GET", "/openapi.json"))
        for path, operations in document["paths"].items():
            for method in operations:
                for caller in (nobody, stranger):
                    with pytest.raises(Unauthorized):
                        await caller.request(method.upper(), path.replace("{", "").replace("}", ""))


async def test_the_cluster_says_what_it_is(client: ControllerClient, controller: Controller) -> None:
    await eventually("the host is known", lambda: controller.hosts.all)
    info = await client.cluster()
    assert (info.domain, info.git_address, info.host_count) == (DOMAIN, "127.0.0.1:2222", 1)


async def test_an_app_is_found_by_name_and_id_and_gets_its_default_route(client: ControllerClient) -> None:
    app = await client.create_app(NewApp(name="example"))
    assert await client.app("example") == await client.app(app.id) == app
    assert [a.name for a in await client.apps()] == ["example"]
    (route,) = await client.routes("example")
    assert (route.domain, route.service, route.owner) == (f"example.{DOMAIN}", "example-web", app.id)


@pytest.mark.parametrize("name", ["..", "A b", "x" * 200, "-a", "a-", "1a", "a/b", "ünder"])
async def test_a_bad_app_name_is_refused_and_leaves_nothing(client: ControllerClient, name: str) -> None:
    with pytest.raises(InvalidName):
        await client.create_app(NewApp(name=name))
    assert await client.apps() == []
    assert await client.all_routes() == []


async def test_an_app_without_a_name_gets_one(client: ControllerClient) -> None:
    assert (await client.create_app(NewApp())).name


async def test_a_second_app_of_the_same_name_is_refused_and_the_first_keeps_its_route(client: ControllerClient) -> None:
    first = await client.create_app(NewApp(name="example"))
    with pytest.raises(AppExists):
        await client.create_app(NewApp(name="example"))
    assert [route.owner for route in await client.all_routes()] == [first.id]


async def test_creating_an_app_again_with_its_id_is_harmless(client: ControllerClient) -> None:
    first = await client.create_app(NewApp(name="example", id="abc"))
    assert await client.create_app(NewApp(name="example", id="abc")) == first
    assert len(await client.all_routes()) == 1


async def test_releases_are_numbered_and_found_by_number(client: ControllerClient) -> None:
    app = await client.create_app(NewApp(name="example"))
    with pytest.raises(NoRelease):
        await client.current_release("example")
    first, second = await new_release(client, app), await new_release(client, app)
    assert [r.number for r in await client.releases("example")] == [2, 1]
    assert await client.release("example", "v1") == first
    assert await client.set_release("example", second.id) == second
    assert await client.current_release("example") == second
    with pytest.raises(ReleaseNotFound):
        await client.release("example", "v3")


async def test_releases_made_at_once_get_different_numbers(client: ControllerClient) -> None:
    app = await client.create_app(NewApp(name="example"))
    made = await asyncio.gather(*(new_release(client, app) for _ in range(5)))
    assert sorted(release.number for release in made) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "new",
    [
        NewRelease(artifact_ids=(), processes={"../x": ProcessType()}),
        NewRelease(artifact_ids=(), env={"A=B": "c"}),
        NewRelease(artifact_ids=(), env={"A": "nul\0"}),
        NewRelease(artifact_ids=(), processes={"web": ProcessType(grants=("discovery",))}),
        NewRelease(artifact_ids=(), processes={"web": ProcessType(store_prefixes=("/app/",))}),
        NewRelease(artifact_ids=(), processes={"web": ProcessType(has_host_network=True)}),
    ],
)
async def test_a_release_that_could_not_or_must_not_run_is_refused(client: ControllerClient, new: NewRelease) -> None:
    await client.create_app(NewApp(name="example"))
    with pytest.raises(Invalid):
        await client.create_release("example", new)
    assert await client.releases("example") == []


async def test_a_release_of_unknown_artifacts_is_refused(client: ControllerClient) -> None:
    await client.create_app(NewApp(name="example"))
    with pytest.raises(ArtifactNotFound):
        await client.create_release("example", NewRelease(artifact_ids=("nope",)))


async def test_scaling_to_nonsense_is_refused(client: ControllerClient) -> None:
    app = await client.create_app(NewApp(name="example"))
    with pytest.raises(NoRelease):
        await client.scale("example", Scale(processes={"web": 1}))
    release = await new_release(client, app)
    await client.set_release("example", release.id)
    for count in (-1, 1_000_000):
        with pytest.raises(Invalid):
            await client.scale("example", Scale(processes={"web": count}))
    with pytest.raises(UnknownProcessType):
        await client.scale("example", Scale(processes={"nosuch": 1}))
    assert await client.formations("example") == []


async def test_scaling_keeps_types_that_it_does_not_name(client: ControllerClient) -> None:
    app = await client.create_app(NewApp(name="example"))
    processes = {"web": ProcessType(args=("serve",)), "clock": ProcessType(args=("serve",))}
    release = await new_release(client, app, processes=processes)
    await client.set_release("example", release.id)
    await client.scale("example", Scale(processes={"web": 2}))
    assert (await client.scale("example", Scale(processes={"clock": 1}))).processes == {"web": 2, "clock": 1}


async def test_system_apps_can_neither_be_deleted_nor_scaled_to_nothing(
    client: ControllerClient, host: FakeHost
) -> None:
    app = await client.create_app(NewApp(name="router", meta={"system": "true"}))
    assert await client.routes("router") == []
    release = await new_release(client, app)
    await client.set_release("router", release.id)
    await client.scale("router", Scale(processes={"web": 1}))
    with pytest.raises(AppProtected):
        await client.scale("router", Scale(processes={"web": 0}))
    with pytest.raises(AppProtected):
        await client.delete_app("router")


async def test_deleting_an_app_stops_its_jobs_and_removes_everything(
    client: ControllerClient, host: FakeHost, controller: Controller
) -> None:
    app = await running_app(client, host)
    one_off = await client.run_job("example", NewJob(args=("serve",), is_detached=True))
    await eventually("the one-off runs", lambda: one_off.id in {job.spec.id for job in host.up()})
    deleted = await client.delete_app("example")
    assert (deleted.app_id, deleted.routes, deleted.releases) == (app.id, 1, 1)
    with pytest.raises(AppNotFound):
        await client.app("example")
    await eventually("all its jobs ended", lambda: not host.running() and not host.running(""))
    assert await client.all_routes() == []
    again = await client.create_app(NewApp(name="example"))
    assert again.id != app.id
    assert await client.releases("example") == []


async def test_a_one_off_runs_the_current_release_with_its_environment(
    client: ControllerClient, host: FakeHost
) -> None:
    app = await client.create_app(NewApp(name="example"))
    with pytest.raises(NoRelease):
        await client.run_job("example", NewJob(args=("serve",)))
    release = await new_release(client, app, env={"A": "1", "B": "2"})
    await client.set_release("example", release.id)
    job = await client.run_job("example", NewJob(args=("serve", "x"), env={"B": "3"}, is_detached=True))
    assert (job.type, job.release_id, job.args) == ("", release.id, ("serve", "x"))
    spec = host.starts[-1]
    assert (spec.env["A"], spec.env["B"], spec.env["FLYNN_APP_NAME"]) == ("1", "3", "example")
    assert not spec.has_stdin
    states = [seen.state async for seen in _until_up(client, job.id)]
    assert states[-1] == "up"


async def test_a_one_off_waits_for_a_hostd_that_restarts_and_not_for_ever(
    client: ControllerClient, host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = await client.create_app(NewApp(name="example"))
    await client.set_release("example", (await new_release(client, app)).id)
    host.starting_up = 2
    job = await client.run_job("example", NewJob(args=("serve",), is_detached=True))
    assert [spec.id for spec in host.starts] == [job.id]
    monkeypatch.setattr(jobs, "HOSTS_KNOWN_S", 0.5)
    host.starting_up = 1_000_000
    with pytest.raises(Unavailable):
        await client.run_job("example", NewJob(args=("serve",), is_detached=True))
    assert len(host.starts) == 1


async def _until_up(client: ControllerClient, job_id: str):  # type: ignore[no-untyped-def]
    async for seen in client.wait_job("example", job_id):
        yield seen
        if seen.state == "up":
            return


async def test_attach_carries_frames_both_ways_and_the_exit_status(client: ControllerClient, host: FakeHost) -> None:
    app = await client.create_app(NewApp(name="example"))
    await client.set_release("example", (await new_release(client, app)).id)
    job = await client.run_job("example", NewJob(args=("serve",)))
    assert host.starts[-1].has_stdin
    async with client.attach("example", job.id) as websocket:
        await websocket.send_bytes(attach.encode(attach.Data(attach.STDIN, b"hello")))
        await websocket.send_bytes(attach.encode(attach.Data(attach.STDIN, b"")))
        got = [frame async for frame in frames(websocket)]
    assert got == [attach.Data(attach.STDOUT, b"HELLO"), attach.Exit(42)]
    last = [seen async for seen in client.wait_job("example", job.id)][-1]
    assert (last.state, last.exit_status) == ("crashed", 42)


async def test_a_killed_job_is_replaced_and_listed_as_ended(client: ControllerClient, host: FakeHost) -> None:
    await running_app(client, host)
    victim = (await client.jobs("example"))[0]
    await client.stop_job("example", victim.id)
    await eventually("a new one is up", lambda: len(host.up()) == 2)
    assert victim.id not in {job.id for job in await client.jobs("example")}
    assert victim.id in {job.id for job in await client.jobs("example", is_all=True)}
    with pytest.raises(JobNotFound):
        await client.job("example", "nosuch")


async def test_a_job_of_another_app_is_not_shown(client: ControllerClient, host: FakeHost) -> None:
    await running_app(client, host)
    await client.create_app(NewApp(name="other"))
    job = (await client.jobs("example"))[0]
    with pytest.raises(JobNotFound):
        await client.job("other", job.id)


async def test_the_log_merges_jobs_by_time_and_filters_by_type(client: ControllerClient, host: FakeHost) -> None:
    await running_app(client, host)
    first, second = host.up()
    for text, job in (("a", first), ("b", second), ("c", first)):
        host.write(job.spec.id, text)
    assert [line.text async for line in client.log("example")] == ["a", "b", "c"]
    assert [line.text async for line in client.log("example", lines=1)] == ["c"]
    assert [line.text async for line in client.log("example", type="clock")] == []
    assert [line.text async for line in client.log("example", job=second.spec.id)] == ["b"]


async def test_following_the_log_shows_what_comes(client: ControllerClient, host: FakeHost) -> None:
    await running_app(client, host, count=1)
    job_id = host.up()[0].spec.id
    host.write(job_id, "before")
    texts = []
    async with asyncio.timeout(10):
        async for line in client.log("example", is_follow=True):
            texts.append(line.text)
            if line.text == "before":
                host.write(job_id, "after")
            else:
                break
    assert texts == ["before", "after"]


async def test_the_log_follows_hosts_that_join(
    client: ControllerClient, host: FakeHost, controller: Controller, discovery: Discovery, tmp_path: Path
) -> None:
    await running_app(client, host, count=1)
    (first,) = host.up()
    other = FakeHost("two", discovery.folder / "two", discovery.address)
    texts = []
    async with other.served(), asyncio.timeout(20):
        host.write(first.spec.id, "from one")
        async for line in client.log("example", is_follow=True):
            texts.append(line.text)
            if line.text == "from one":
                async with other.registered():
                    await client.scale("example", Scale(processes={"web": 2}))
                    await eventually("it runs on the second host", lambda: other.up())
                    other.write(other.up()[0].spec.id, "from two")
                    break
        async with other.registered():
            await eventually("both are known", lambda: len(controller.hosts.all) == 2 and controller.hosts.is_known(0))
            assert [line.text async for line in client.log("example")] == ["from one", "from two"]
            async for line in client.log("example", is_follow=True):
                texts.append(line.text)
                if len(texts) == 3:
                    break
    assert sorted(texts[1:]) == ["from one", "from two"]


async def test_routes_belong_to_their_app(client: ControllerClient) -> None:
    app = await client.create_app(NewApp(name="example"))
    await client.create_app(NewApp(name="other"))
    route = await client.add_route("example", NewRoute(domain="www.example.test", certificate="", private_key=""))
    assert (route.service, route.owner) == ("example-web", app.id)
    with pytest.raises(RouteExists):
        await client.add_route("other", NewRoute(domain="www.example.test"))
    with pytest.raises(RouteNotFound):
        await client.remove_route("other", route.id)
    await client.remove_route("example", route.id)
    assert [r.domain for r in await client.routes("example")] == [f"example.{DOMAIN}"]


async def test_private_keys_of_routes_are_never_shown(client: ControllerClient) -> None:
    await client.create_app(NewApp(name="example"))
    await client.add_route("example", NewRoute(domain="a.test", certificate="CERT", private_key="SECRET"))
    assert all(not route.private_key for route in await client.all_routes())


async def test_ssh_keys_are_found_by_either_fingerprint(client: ControllerClient) -> None:
    key = await client.add_key(NewKey(public_key=PUBLIC_KEY))
    assert len(key.fingerprint.split(":")) == 16
    assert key.comment == "me@laptop"
    assert await client.key(key.fingerprint) == await client.key(key.sha256) == key
    with pytest.raises(KeyExists):
        await client.add_key(NewKey(public_key=PUBLIC_KEY))
    await client.remove_key(key.fingerprint)
    with pytest.raises(KeyNotFound):
        await client.key(key.sha256)
    assert await client.keys() == []


async def test_a_fingerprint_with_a_slash_is_found(client: ControllerClient) -> None:
    sha256 = ""
    while "/" not in sha256:
        blob = b"\0\0\0\x0bssh-ed25519\0\0\0 " + os.urandom(32)
        key = await client.add_key(NewKey(public_key="ssh-ed25519 " + base64.b64encode(blob).decode()))
        sha256 = key.sha256
    assert (await client.key(sha256)).fingerprint == key.fingerprint


@pytest.mark.parametrize(
    "text",
    ["", "hello", "ssh-dss AAAA x", PUBLIC_KEY[:50], "-----BEGIN OPENSSH PRIVATE KEY-----\nx", "ssh-ed25519 !!!! x"],
)
async def test_what_is_no_public_key_is_refused(client: ControllerClient, text: str) -> None:
    with pytest.raises(Invalid):
        await client.add_key(NewKey(public_key=text))


async def test_events_have_history_a_marker_and_news(client: ControllerClient) -> None:
    app = await client.create_app(NewApp(name="example"))
    await client.create_app(NewApp(name="noise"))
    seen: list[Event] = []
    async with asyncio.timeout(10):
        async for event in client.events(app="example", since=0):
            seen.append(event)
            if event.kind == "current":
                await client.change_app("example", AppChange(meta={"a": "b"}))
            if len(seen) == 3:
                break
    assert [event.kind for event in seen] == ["app", "current", "app"]
    assert seen[0].id < seen[1].id < seen[2].id
    assert seen[2].data["meta"] == {"a": "b"}
    assert {event.app_id for event in seen} <= {"", app.id}


async def test_job_events_tell_a_scale_as_it_happens(client: ControllerClient, host: FakeHost) -> None:
    app = await client.create_app(NewApp(name="example"))
    await client.set_release("example", (await new_release(client, app)).id)
    states = []
    async with asyncio.timeout(10):
        async for event in client.events(app="example"):
            if event.kind == "current":
                await client.scale("example", Scale(processes={"web": 1}))
            if event.kind == "job":
                states.append(event.data["state"])
                if event.data["state"] == "up":
                    break
    assert states[-1] == "up"


async def test_everything_is_there_after_a_restart(
    client: ControllerClient, controller: Controller, host: FakeHost
) -> None:
    app = await client.create_app(NewApp(name="example"))
    release = await new_release(client, app)
    await client.create_deployment("example", NewDeployment(release_id=release.id))
    async with ControllerClient(f"http://127.0.0.1:{controller.port}", KEY) as another:
        assert (await another.app("example")).release_id == release.id
