"""Carries out the steps of a bootstrap; each can be run again at any time and then changes nothing.

What a step made up (keys, ids) is kept in discovery under `/bootstrap/STEP`; artifacts and releases
have ids made from their content, so the same image and settings are the same release, and other ones a
deployment. Called by `bootstrap`.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets as dice
from collections.abc import Awaitable, Callable
from typing import TypeVar
from urllib.parse import urlsplit

import aiohttp
import msgspec

from controller import translate
from controller.client import ControllerClient
from controller.errors import AppNotFound, ArtifactNotFound, DeploymentInProgress, NoRelease, StepFailed
from controller.inception import secrets
from controller.inception.steps import (
    AddApp,
    AddRoute,
    AnyStep,
    AppPlan,
    CreateArtifact,
    DeployApp,
    GenRandom,
    GenSshKey,
    GenTlsCert,
    Log,
    RunApp,
    ScaleApp,
    Wait,
)
from controller.store import ControllerStore
from controller.types import App, Artifact, Deployment, NewApp, NewArtifact, NewDeployment, NewRelease, Release, Scale
from discovery.client import Services, Store
from discovery.types import Instance
from discovery.wire import clock
from discovery.wire.errors import ServiceError, Unavailable
from hostd.client import HostClient
from hostd.types import ENDED, HostStatus, Job

log = logging.getLogger(__name__)
T = TypeVar("T")
PREFIX = "/bootstrap/"
CONTROLLER_PATIENCE_S = 60.0
JOBS_UP_S = 180.0
REGISTERED_S = 30.0
SOUND_S, STEADY_S = 15.0, 1.0
LOOK_S = 0.1
LAST_LINES = 10
Tell = Callable[[str], None]


def content_id(*parts: object) -> str:
    """Make an id from what it names."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(msgspec.json.encode(part, order="deterministic") + b"\0")
    return digest.hexdigest()[:32]


class Inception:
    """The cluster that comes to be: one host, its discovery, and the outputs of the steps so far."""

    def __init__(self, host: HostClient, store: Store, services: Services, status: HostStatus) -> None:
        self._host = host
        self._store = store
        self._records = ControllerStore(store)
        self._services = services
        self._status = status
        self._plans: dict[str, AppPlan] = {}
        self.outputs: dict[str, dict[str, str]] = {}

    async def carry_out(self, step: AnyStep, tell: Tell) -> dict[str, str]:
        """Run one step and return its outputs; `tell` gets what people should read."""
        match step:
            case GenRandom():
                made = await self.once(step.id, lambda: secrets.random_key(step.size_bytes))
                if step.is_shown:
                    tell(made["value"])
                return made
            case GenSshKey():
                return await self.once(step.id, secrets.ssh_key)
            case GenTlsCert():
                made = await self.once(step.id, lambda: secrets.tls_certificate(step.hosts, clock.now_s()))
                tell(f"pin: {made['pin']}")
                return made
            case RunApp():
                return await self._run_app(step)
            case AddApp():
                return await self._deploy_app(self._plans[step.app])
            case DeployApp():
                return await self._deploy_app(step.app)
            case ScaleApp():
                await self._ask(lambda client: client.scale(step.app, Scale(processes=step.processes)))
                return {}
            case CreateArtifact():
                return {"id": (await self._create_artifact(step.image)).id}
            case AddRoute():
                return await self._add_route(step)
            case Wait():
                await self._wait(step)
                return {}
            case Log():
                tell(step.text)
                return {}

    async def once(self, name: str, make: Callable[[], dict[str, str]]) -> dict[str, str]:
        """Return what `make` made the first time that this cluster was bootstrapped."""
        key = PREFIX + name
        if (kept := await self._store.get(key)) is None:
            made = make()
            await self._store.create(key, msgspec.json.encode(made))
            return made
        return msgspec.json.decode(kept.value, type=dict[str, str])

    # what should run

    async def _image(self, name: str) -> NewArtifact:
        image = await self._host.image(name)
        return NewArtifact(
            id=content_id(image.layers, image.config),
            kind="image",
            layers=image.layers,
            config=image.config,
            meta={"image": name},
        )

    def _release(self, app_id: str, plan: AppPlan, artifact_id: str) -> NewRelease:
        return NewRelease(
            id=content_id(app_id, artifact_id, plan.env, plan.processes),
            artifact_ids=(artifact_id,),
            env=plan.env,
            processes=plan.processes,
        )

    async def _app_id(self, name: str) -> str:
        made = await self.once(f"app-{name}", lambda: {"id": dice.token_hex(16)})
        return made["id"]

    # without a controller

    async def _run_app(self, step: RunApp) -> dict[str, str]:
        """Start the app's jobs on this host unless they run; an app that is known already, as it is known."""
        plan = step.app
        self._plans[step.id] = plan
        app_id = await self._app_id(plan.name)
        running = await self._host.jobs({"app": app_id}, is_active=True)
        if running and not await self._is_sound(app_id, plan):
            await self._stop_all(app_id)
            running = []
        if not [job for job in running if job.status != "stopping"]:
            app, release, artifact = await self._known_or_new(app_id, plan)
            place = translate.Place(
                host_id=self._status.host_id,
                host_ip=self._status.host_ip,
                run_dir=translate.place_of(await self._instance()).run_dir,
            )
            for type, count in plan.scale.items():
                for _ in range(count):
                    spec = translate.job_spec(
                        app=app,
                        release=release,
                        type=type,
                        artifacts=[artifact],
                        place=place,
                        id=translate.job_id(app.name, type, dice.token_hex(5)),
                        origin=translate.ORIGIN_BOOTSTRAP,
                    )
                    await self._until_up(await self._host.start(spec))
        return {"id": app_id}

    async def _is_sound(self, app_id: str, plan: AppPlan) -> bool:
        """Tell whether the app's jobs need no help: an old version that does not come up cannot update itself.

        Such as one that does not understand the host it runs on any more. Of today's image they are left alone.
        """
        layers = (await self._host.image(plan.image)).layers
        steady: set[str] = set()
        deadline = clock.monotonic_s() + SOUND_S
        while clock.monotonic_s() < deadline:
            jobs = await self._host.jobs({"app": app_id}, is_active=True)
            if any(job.spec.layers == layers for job in jobs):
                return True
            up = {job.spec.id for job in jobs if job.is_up and job.status == "running"}
            if up & steady:
                return True
            steady = up
            await asyncio.sleep(STEADY_S)
        return False

    async def _stop_all(self, app_id: str) -> None:
        for job in await self._host.jobs({"app": app_id}):
            await self._host.stop(job.spec.id, is_waiting=True)

    async def _known_or_new(self, app_id: str, plan: AppPlan) -> tuple[App, Release, Artifact]:
        """Return what to run: of an app that exists, its records, brought up to the image of today.

        No controller runs now, so its records may be written here, in the way that it would.
        """
        new = await self._image(plan.image)
        artifact = Artifact(id=new.id, kind=new.kind, layers=new.layers, config=new.config, meta=new.meta)
        wanted = self._release(app_id, plan, artifact.id)
        release = Release(
            id=wanted.id,
            app_id=app_id,
            number=1,
            artifact_ids=wanted.artifact_ids,
            env=wanted.env,
            processes=wanted.processes,
            created_at=clock.now_s(),
        )
        try:
            app = await self._records.app(app_id)
        except AppNotFound:
            return App(id=app_id, name=plan.name, meta={"system": "true"}), release, artifact
        if app.release_id and app.release_id != release.id:
            await self._records.create_artifact(artifact)
            release = await self._records.create_release(release)
            before = (await self._records.formation(app_id, app.release_id)).processes
            await self._records.set_formation(app_id, release.id, lambda _: before or plan.scale)
            await self._records.set_formation(app_id, app.release_id, lambda _: {})
            await self._records.change_app(app_id, lambda a: msgspec.structs.replace(a, release_id=release.id))
        return app, release, artifact

    async def _instance(self) -> Instance:
        """Return the host's registration; a host that has just started is a moment behind with it."""
        deadline = clock.monotonic_s() + REGISTERED_S
        while clock.monotonic_s() < deadline:
            for instance in await self._services.instances("hostd"):
                if instance.id == self._status.host_id:
                    return instance
            await asyncio.sleep(LOOK_S)
        raise Unavailable(f"host {self._status.host_id} is not registered in discovery", hint="hostd status")

    async def _until_up(self, job: Job) -> None:
        deadline = clock.monotonic_s() + JOBS_UP_S
        while not job.is_up:
            if job.status in ENDED or clock.monotonic_s() > deadline:
                raise StepFailed(await self._why(job), hint=f"hostd log {job.spec.id}", job_id=job.spec.id)
            await asyncio.sleep(LOOK_S)
            job = await self._host.job(job.spec.id)

    async def _why(self, job: Job) -> str:
        if job.error is not None:
            return f"job {job.spec.id} could not start: {job.error.message}"
        how = f"ended with status {job.exit_status}" if job.status in ENDED else f"was not up within {JOBS_UP_S:g} s"
        try:
            lines = [line.text async for line in self._host.log(job.spec.id, lines=LAST_LINES)]
        except ServiceError:
            lines = []
        return f"job {job.spec.id} {how}" + "".join(f"\n  {line}" for line in lines)

    # with the controller

    async def _ask(self, act: Callable[[ControllerClient], Awaitable[T]]) -> T:
        """Do something with the controller, wherever it answers now; every use of this may be repeated.

        Raises:
            ServiceError: its own; `Unavailable` when it did not answer for a minute.
        """
        key = self.outputs["controller-key"]["value"]
        deadline = clock.monotonic_s() + CONTROLLER_PATIENCE_S
        last = Unavailable("the controller has no instance", hint="hostd ps, hostd log JOB")
        while clock.monotonic_s() < deadline:
            for instance in await self._services.instances("controller"):
                async with ControllerClient(f"http://{instance.host}:{instance.port}", key) as client:
                    try:
                        return await act(client)
                    except Unavailable as error:
                        last = error
            await asyncio.sleep(LOOK_S)
        raise last

    async def _create_artifact(self, image: str) -> Artifact:
        new = await self._image(image)
        try:
            return await self._ask(lambda client: client.artifact(new.id))
        except ArtifactNotFound:
            return await self._ask(lambda client: client.create_artifact(new))

    async def _deploy_app(self, plan: AppPlan) -> dict[str, str]:
        """Make the app what the plan says, and wait until its jobs are up."""
        app_id = await self._app_id(plan.name)
        new_app = NewApp(id=app_id, name=plan.name, meta={"system": "true"})
        await self._ask(lambda client: client.create_app(new_app))
        artifact = await self._create_artifact(plan.image)
        wanted = self._release(app_id, plan, artifact.id)
        try:
            current = (await self._ask(lambda client: client.current_release(app_id))).id
        except NoRelease:
            current = ""
        if current != wanted.id:
            await self._ask(lambda client: client.create_release(app_id, wanted))
            await self._deploy(app_id, wanted.id)
        await self._scale(app_id, wanted.id, plan)
        await self._until_all_up(app_id, wanted.id, plan)
        return {"id": app_id, "release_id": wanted.id}

    async def _deploy(self, app_id: str, release_id: str) -> None:
        async def begin(client: ControllerClient) -> Deployment:
            try:
                return await client.create_deployment(app_id, NewDeployment(release_id=release_id))
            except DeploymentInProgress:
                # ours, if the answer was lost; else it must end first
                unfinished = [d for d in await client.deployments(app_id) if not d.finished_at]
                if not unfinished:
                    raise
                return unfinished[0]

        deployment = await self._ask(begin)
        while not deployment.finished_at:
            await asyncio.sleep(LOOK_S)
            id = deployment.id
            deployment = await self._ask(lambda client: client.deployment(id))  # noqa: B023 — awaited at once
        if deployment.status == "failed":
            raise StepFailed(f"the deployment failed: {deployment.error}", deployment_id=deployment.id)
        if deployment.new_release_id != release_id:
            await self._deploy(app_id, release_id)

    async def _scale(self, app_id: str, release_id: str, plan: AppPlan) -> None:
        """Scale up to the plan; what people scaled higher stays."""
        formations = await self._ask(lambda client: client.formations(app_id))
        now = next((f.processes for f in formations if f.release_id == release_id), {})
        lacking = {type: count for type, count in plan.scale.items() if now.get(type, 0) < count}
        if lacking:
            await self._ask(lambda client: client.scale(app_id, Scale(processes=lacking, release_id=release_id)))

    async def _until_all_up(self, app_id: str, release_id: str, plan: AppPlan) -> None:
        deadline = clock.monotonic_s() + JOBS_UP_S
        while True:
            jobs = await self._ask(lambda client: client.jobs(app_id, is_all=True))
            jobs = [job for job in jobs if job.release_id == release_id]
            up = [job for job in jobs if job.state == "up"]
            if all(sum(job.type == type for job in up) >= count for type, count in plan.scale.items()):
                return
            ended = [job for job in jobs if job.state in ("crashed", "failed")]
            if clock.monotonic_s() > deadline:
                raise StepFailed(
                    f"{plan.name} was not up within {JOBS_UP_S:g} s"
                    + (f"; {await self._why(await self._host.job(ended[-1].id))}" if ended else ""),
                    hint="hostd ps, hostd log JOB",
                )
            await asyncio.sleep(LOOK_S)

    async def _add_route(self, step: AddRoute) -> dict[str, str]:
        new = step.route
        routes = await self._ask(lambda client: client.routes(step.app))
        for route in routes:
            if (route.kind, route.domain, route.path, route.port) == (new.kind, new.domain, new.path, new.port):
                return {"id": route.id}
        return {"id": (await self._ask(lambda client: client.add_route(step.app, new))).id}

    # waiting

    async def _wait(self, step: Wait) -> None:
        deadline = clock.monotonic_s() + step.timeout_s
        last = "nothing answered"
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session:
            while clock.monotonic_s() < deadline:
                try:
                    if step.tcp:
                        await _connect(step.tcp)
                        return
                    last = await self._status_of(step, session)
                    if last == str(step.status):
                        return
                except (aiohttp.ClientError, OSError, TimeoutError) as error:
                    last = str(error) or type(error).__name__
                await asyncio.sleep(LOOK_S)
        raise StepFailed(
            f"{step.tcp or step.url or step.service} did not answer as it should in {step.timeout_s:g} s: {last}",
            hint="hostd ps, hostd log JOB",
        )

    async def _status_of(self, step: Wait, session: aiohttp.ClientSession) -> str:
        url = step.url
        if step.service:
            instances = await self._services.instances(step.service)
            if not instances:
                return f"service {step.service} has no instance"
            url = f"http://{instances[0].host}:{instances[0].port}{step.path}"
        headers = {"Host": step.host} if step.host else {}
        async with session.get(url, headers=headers, allow_redirects=False) as response:
            return str(response.status)


async def _connect(address: str) -> None:
    parts = urlsplit(f"tcp://{address}")
    async with asyncio.timeout(5):
        _, writer = await asyncio.open_connection(parts.hostname, parts.port)
    writer.close()
