"""Turns a commit into a running release: starts the build job, follows it, makes the release, follows its deployment.

Asks the controller for everything and holds no state: a push that is cut off before the release exists
leaves neither job nor blob, afterwards the controller goes on alone. Everything that happens is said line by line
to the pusher. Called by `push`; raises the controller's own errors, `BuildFailed` and `DeploymentFailed`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

import msgspec

from buildpack.errors import BlobNotFound, BuildFailed, DeploymentFailed
from buildpack.shelf import Shelf
from buildpack.types import BuildResult
from controller.client import ControllerClient
from controller.errors import NoRelease
from controller.types import (
    ActualJob,
    App,
    Artifact,
    Deployment,
    NewArtifact,
    NewDeployment,
    NewJob,
    NewRelease,
    ProcessType,
    Release,
    service_name,
)
from discovery.wire import clock
from discovery.wire.errors import NotFound, ServiceError, Unavailable
from hostd.types import MIB, ImageConfig, Layer, Port, Resources, VolumeMount

log = logging.getLogger(__name__)

Say = Callable[[str], Awaitable[None]]

COMPILE = ("/usr/bin/python3", "-P", "-m", "buildpack.compile")
RUNNER = ("/bin/sh", "/app/.hostd/start")
SLUG_BYTES_MAX = 1024**3
RESULT_BYTES_MAX = 1024**2
ENVIRONMENT_BYTES_MAX = 100 * 1024  # one variable of a process may have 128 KiB
PATIENCE_S = 60.0
RETRY_S = 0.5
SILENCE_S = 2.0
TIDY_S = 10.0
_ENDED = frozenset({"down", "crashed", "failed"})


@dataclass(frozen=True, kw_only=True)
class BuildSettings:
    """What a build job is made of; the artifacts are the controller's ids of the `build` and `stack` images."""

    build_artifact: str
    stack_artifact: str
    memory_bytes: int = 2048 * MIB
    cpu_millis: int = 500
    pids_max: int = 2048
    temp_disk_bytes: int = 16384 * MIB
    timeout_s: float = 1800.0


@dataclass(frozen=True, kw_only=True)
class Source:
    """What is to be built; `content` is a tar of the commit's files."""

    app: App
    commit: str
    branch: str
    content: AsyncIterator[bytes]


@dataclass(frozen=True)
class _Blobs:
    """The temporary blobs of one build, on one instance of the blob store."""

    place: str
    source: str
    slug: str
    result: str

    def names(self) -> tuple[str, ...]:
        return (self.source, self.slug, self.result)


class Builder:
    """Builds and deploys; safe for many pushes at once."""

    def __init__(self, controller: ControllerClient, shelf: Shelf, settings: BuildSettings) -> None:
        self._controller = controller
        self._shelf = shelf
        self._settings = settings

    async def deploy(self, source: Source, say: Say) -> Release:
        """Do all of it, from source to serving release.

        Raises:
            BuildFailed: there is no slug. DeploymentFailed: the release did not come up.
            ServiceError: the controller or the blob store refused something or cannot be reached.
        """
        await say(f"-----> Building {source.app.name}...")
        current = await self._current(source.app)
        result, slug = await self._build(source, current, say)
        await say("-----> Creating release...")
        release = await self._release(source, current, result, slug)
        deployment = await self._controller.create_deployment(source.app.id, NewDeployment(release_id=release.id))
        await self._follow_deployment(deployment, current, say)
        await say("=====> Application deployed")
        return release

    async def _current(self, app: App) -> Release | None:
        try:
            return await self._controller.current_release(app.id)
        except NoRelease:
            return None

    # the build job

    async def _build(self, source: Source, current: Release | None, say: Say) -> tuple[BuildResult, Artifact]:
        stem = secrets.token_hex(16)
        place = await self._shelf.place()
        blobs = _Blobs(place, f"{stem}-source", f"{stem}-slug", f"{stem}-result")
        try:
            await self._shelf.put(place, blobs.source, source.content)
            await self._run(source, current, blobs, say)
            return await self._take_result(source, blobs)
        finally:
            await self._tidy(blobs)

    async def _tidy(self, blobs: _Blobs) -> None:
        """Remove the temporary blobs; if that fails, they end by themselves."""
        with contextlib.suppress(ServiceError, TimeoutError):
            async with asyncio.timeout(TIDY_S):
                for name in blobs.names():
                    await self._shelf.drop(blobs.place, name)

    async def _run(self, source: Source, current: Release | None, blobs: _Blobs, say: Say) -> None:
        await self._stop_orphans(source.app)
        job = await self._controller.run_job(source.app.id, self._job(source, current, blobs))
        ended: ActualJob | None = None
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                ended = await self._follow_job(source.app, job, say)
        except TimeoutError as error:
            raise BuildFailed(f"the build took longer than {self._settings.timeout_s:g} s and was stopped") from error
        finally:
            if ended is None:
                await self._stop(source.app, job)
        _judge(ended)

    async def _stop_orphans(self, app: App) -> None:
        """Stop build jobs of the app that a crashed git-receive left: two would share one cache."""
        for job in await self._controller.jobs(app.id):
            if job.args == COMPILE and job.state not in _ENDED:
                log.warning("stopping the build job %s that nobody waits for", job.id)
                await self._stop(app, job)

    def _job(self, source: Source, current: Release | None, blobs: _Blobs) -> NewJob:
        settings, shelf = self._settings, self._shelf
        app_environment = json.dumps(current.env if current else {})
        if len(app_environment.encode()) > ENVIRONMENT_BYTES_MAX:
            raise BuildFailed(
                f"the app's environment is too large to build with (above {ENVIRONMENT_BYTES_MAX} bytes)",
                hint="unset what is not needed: flynn env unset NAME",
            )
        lasts_s = settings.timeout_s + TIDY_S
        ticket = shelf.ticket
        return NewJob(
            args=COMPILE,
            artifact_ids=(settings.build_artifact,),
            release_env=False,
            is_detached=True,
            env={
                "APP_NAME": source.app.name,
                "APP_ENV": app_environment,
                "SOURCE_VERSION": source.commit,
                "SOURCE_URL": ticket(blobs.place, "GET", blobs.source, for_s=lasts_s),
                "SLUG_URL": ticket(blobs.place, "PUT", blobs.slug, for_s=lasts_s, bytes_max=SLUG_BYTES_MAX),
                "RESULT_URL": ticket(blobs.place, "PUT", blobs.result, for_s=lasts_s, bytes_max=RESULT_BYTES_MAX),
            },
            volumes=(VolumeMount(name=f"build-cache-{source.app.id}", path="/cache"),),
            resources=Resources(
                memory_bytes=settings.memory_bytes,
                cpu_millis=settings.cpu_millis,
                pids_max=settings.pids_max,
                temp_disk_bytes=settings.temp_disk_bytes,
            ),
            inherits_proxy=True,
            labels={"purpose": "build"},
        )

    async def _follow_job(self, app: App, job: ActualJob, say: Say) -> ActualJob:
        """Relay the job's log until it has ended, every line once and none left out."""
        seen = -1

        async def relay(*, is_follow: bool) -> None:
            nonlocal seen
            async for line in self._controller.log(app.id, is_follow=is_follow, job=job.id):
                if line.sequence > seen:
                    seen = line.sequence
                    await say(line.text)

        async def relay_live() -> None:
            while True:
                with contextlib.suppress(Unavailable, NotFound):  # the controller may be restarting
                    await relay(is_follow=True)
                await asyncio.sleep(RETRY_S)

        async def reassure() -> None:
            await asyncio.sleep(SILENCE_S)
            if seen < 0:
                await say("-----> Preparing the builder: the first build on a host takes longer...")

        try:
            async with asyncio.TaskGroup() as tasks:
                live = [tasks.create_task(relay_live()), tasks.create_task(reassure())]
                ended = await self._wait(app, job)
                for task in live:
                    task.cancel()
        except* (ServiceError, OSError) as group:
            raise group.exceptions[0] from None  # one thing went wrong; the group only says where
        await relay(is_follow=False)
        return ended

    async def _wait(self, app: App, job: ActualJob) -> ActualJob:
        """Return the job once it has ended; bears a controller that is away for a while."""
        heard_s = clock.monotonic_s()
        while True:
            try:
                async for seen in self._controller.wait_job(app.id, job.id):
                    heard_s = clock.monotonic_s()
                    if seen.state in _ENDED:
                        return seen
            except Unavailable:
                if clock.monotonic_s() - heard_s > PATIENCE_S:
                    raise
            except NotFound as error:
                raise BuildFailed("the build job is gone", hint="did its host stop? push again") from error
            await asyncio.sleep(RETRY_S)

    async def _stop(self, app: App, job: ActualJob) -> None:
        try:
            async with asyncio.timeout(TIDY_S):
                await self._controller.stop_job(app.id, job.id)
        except (ServiceError, TimeoutError) as error:
            log.warning("build job %s cannot be stopped: %s", job.id, error)

    async def _take_result(self, source: Source, blobs: _Blobs) -> tuple[BuildResult, Artifact]:
        try:
            result: BuildResult = await self._shelf.read(blobs.place, blobs.result, BuildResult)
            blob = await self._shelf.keep(blobs.place, blobs.slug)
        except BlobNotFound as error:
            raise BuildFailed("the build ended without a slug", hint="push again") from error
        except msgspec.MsgspecError as error:  # the job runs the app's own code: its word is input
            raise BuildFailed(f"the build's result does not parse: {error}") from error
        if blob.digest != result.digest:
            raise BuildFailed("the slug is not the one that the build made", hint="push again")
        layer = Layer(
            digest=blob.digest,
            size_bytes=blob.size_bytes,
            media_type=result.media_type,
            url=self._shelf.layer_url(blob.digest),
        )
        artifact = await self._controller.create_artifact(
            NewArtifact(
                kind="slug",
                layers=(layer,),
                config=ImageConfig(env={"HOME": "/app"}, working_dir="/app"),
                meta={"git.commit": source.commit, "buildpack": result.buildpack[:100]},
            )
        )
        return result, artifact

    # the release

    async def _release(self, source: Source, current: Release | None, result: BuildResult, slug: Artifact) -> Release:
        kept = current.processes if current else {}
        processes = {
            type: _process(source.app, type, kept.get(type, ProcessType())) for type in sorted(result.processes)
        }
        return await self._controller.create_release(
            source.app.id,
            NewRelease(
                artifact_ids=(self._settings.stack_artifact, slug.id),
                env=current.env if current else {},
                processes=processes,
                meta={"git": "true", "git.commit": source.commit, "git.branch": source.branch},
            ),
        )

    async def _follow_deployment(self, deployment: Deployment, current: Release | None, say: Say) -> None:
        said: set[tuple[str, str]] = set()
        heard_s = clock.monotonic_s()
        while True:
            try:
                async for event in self._controller.deployment_events(deployment.id):
                    heard_s = clock.monotonic_s()
                    if event.job_id and (event.job_id, event.job_state) not in said:
                        said.add((event.job_id, event.job_state))
                        await say(f"       {event.job_type} {event.job_id} is {event.job_state}")
                    if event.status == "complete":
                        return
                    if event.status == "failed":
                        raise DeploymentFailed(
                            f"the new release did not come up: {event.error}",
                            hint="the old release keeps serving" if current else "flynn log shows more",
                        )
            except Unavailable:
                if clock.monotonic_s() - heard_s > PATIENCE_S:
                    raise
            await asyncio.sleep(RETRY_S)


def _process(app: App, type: str, before: ProcessType) -> ProcessType:
    """Return how a process type runs: as in the release before, but through the slug's runner."""
    is_web = type == "web" or type.endswith("-web")
    ports = before.ports or ((Port(service=service_name(app.name, type)),) if is_web else ())
    return ProcessType(
        args=(*RUNNER, type),
        env=before.env,
        ports=ports,
        volumes=before.volumes,
        resources=before.resources,
        stop_grace_s=before.stop_grace_s,
        working_dir=before.working_dir,
    )


def _judge(job: ActualJob) -> None:
    if job.state == "failed":
        raise BuildFailed(f"the build job could not be started: {job.error}", hint="push again")
    if job.exit_status == 137:
        raise BuildFailed(
            "the build was killed", hint="most likely it took more memory than a build may have; its log is above"
        )
    if job.exit_status != 0:
        raise BuildFailed("the build failed", hint="the lines above say why; nothing was released")
