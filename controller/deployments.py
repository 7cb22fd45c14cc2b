"""Keeps deployments in discovery's store: one at a time an app, guarded by a lock key, each with its steps.

Whatever a deployment changes is compared with that lock, so that of two controllers that both believe
to lead only one gets further. Called by `deploy` and `api`.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Sequence

import msgspec

from controller import keys
from controller.errors import AppNotFound, DeploymentNotFound
from controller.store import SWAP_TRIES, ControllerStore, encode, event_put
from controller.types import App, Deployment, DeploymentEvent, Formation
from discovery.client import compare_exists, compare_missing, compare_revision, compare_value
from discovery.types import Compare, Delete, Operation, Put
from discovery.wire import clock
from discovery.wire.errors import Conflict

PER_APP_MAX = 20


class Deployments:
    """The deployments of one cluster."""

    def __init__(self, store: ControllerStore) -> None:
        self._store = store

    async def of_app(self, app_id: str) -> list[Deployment]:
        """List an app's deployments, newest first."""
        found = [d for d in await self._store.list_of(keys.DEPLOYMENTS, Deployment) if d.app_id == app_id]
        return sorted(found, key=lambda d: -d.created_at)

    async def get(self, deployment_id: str) -> Deployment:
        """Raise `DeploymentNotFound` if there is none."""
        found = await self._store.get(keys.deployment(deployment_id), Deployment)
        if found is None:
            raise DeploymentNotFound(f"no deployment {deployment_id[:64]!r}")
        return found[0]

    async def base_of(self, app_id: str, new_release_id: str) -> tuple[App, list[Formation], list[Compare]]:
        """Return what a deployment plans from, and what must hold for the plan to be true still."""
        at = await self._store.get(keys.app(app_id), App)
        if at is None:
            raise AppNotFound("the app was deleted meanwhile")
        app, revision = at
        found: list[Formation] = []
        unchanged = [compare_missing(keys.deploying(app_id)), compare_revision(keys.app(app_id), revision)]
        for release_id in sorted({app.release_id, new_release_id} - {""}):
            key = keys.formation(app_id, release_id)
            formation = await self._store.get(key, Formation)
            unchanged.append(compare_revision(key, formation[1] if formation else 0))
            found += [formation[0]] if formation else []
        return app, found, unchanged

    async def complete_at_once(self, app: App, deployment: Deployment, unchanged: Sequence[Compare]) -> bool:
        """Record a deployment that had nothing to replace; `False` when `unchanged` does not hold.

        Raises:
            DeploymentInProgress: one runs already.
        """
        after = msgspec.structs.replace(app, release_id=deployment.new_release_id, updated_at=clock.now_s())
        done = await self._store.raw.txn(
            unchanged,
            [
                Put(keys.app(app.id), encode(after)),
                Put(keys.deployment(deployment.id), encode(deployment)),
                self.event(deployment, status=deployment.status),
                event_put("deployment", app.id, deployment.id, deployment),
                *([Delete(keys.formation(app.id, deployment.old_release_id))] if deployment.old_release_id else []),
                *await self._prune(app.id),
            ],
        )
        if not done.succeeded:
            await self._store.explain(app.id, "")
        return done.succeeded

    async def begin(self, deployment: Deployment, unchanged: Sequence[Compare]) -> bool:
        """Record a deployment for the deployer and lock the app; `False` when `unchanged` does not hold.

        Raises:
            DeploymentInProgress: one runs already.
        """
        lock = keys.deploying(deployment.app_id)
        done = await self._store.raw.txn(
            unchanged,
            [
                Put(keys.deployment(deployment.id), encode(deployment)),
                Put(lock, deployment.id.encode()),
                self.event(deployment, status="pending"),
                event_put("deployment", deployment.app_id, deployment.id, deployment),
                *await self._prune(deployment.app_id),
            ],
        )
        if not done.succeeded:
            await self._store.explain(deployment.app_id, "")
        return done.succeeded

    async def _prune(self, app_id: str) -> list[Operation]:
        old = [d for d in await self.of_app(app_id) if d.finished_at][PER_APP_MAX:]
        writes: list[Operation] = []
        for deployment in old:
            writes.append(Delete(keys.deployment(deployment.id)))
            writes.append(Delete(keys.deployment_events(deployment.id), is_prefix=True))
        return writes

    def event(
        self,
        deployment: Deployment,
        *,
        status: str,
        job_type: str = "",
        job_id: str = "",
        job_state: str = "",
        error: str = "",
    ) -> Put:
        """Make the write that records one step of a deployment."""
        now = clock.now_s()
        event = msgspec.convert(
            {
                "deployment_id": deployment.id,
                "status": status,
                "at": now,
                "job_type": job_type,
                "job_id": job_id,
                "job_state": job_state,
                "error": error,
            },
            DeploymentEvent,
        )
        name = f"{int(now * 1e6):017d}-{secrets.token_hex(2)}"
        return Put(keys.deployment_events(deployment.id) + name, encode(event))

    async def add_events(self, deployment: Deployment, events: Sequence[Put]) -> None:
        """Record steps, unless the app was deleted meanwhile."""
        await self._store.raw.txn([compare_exists(keys.deployment(deployment.id))], list(events))

    async def finish(self, deployment: Deployment, *, release_id: str = "", error: str = "") -> Deployment:
        """Record the end, free the app and, with `release_id`, make that release the current one.

        The formations must already be what the outcome wants; those left empty are removed.
        """
        status = "failed" if error else "complete"
        ended = msgspec.structs.replace(deployment, status=status, error=error, finished_at=clock.now_s())
        lock = keys.deploying(deployment.app_id)
        for _ in range(SWAP_TRIES):
            found = await self._store.get(keys.app(deployment.app_id), App)
            if found is None:
                raise AppNotFound("the app was deleted meanwhile")
            app, revision = found
            after = msgspec.structs.replace(app, release_id=release_id or app.release_id, updated_at=clock.now_s())
            keep = release_id or deployment.old_release_id
            spent = [f for f in await self._store.formations(app.id) if not f.processes and f.release_id != keep]
            done = await self._store.raw.txn(
                [compare_revision(keys.app(app.id), revision), compare_value(lock, deployment.id.encode())],
                [
                    Put(keys.app(app.id), encode(after)),
                    Put(keys.deployment(ended.id), encode(ended)),
                    Delete(lock),
                    *(Delete(keys.formation(app.id, formation.release_id)) for formation in spent),
                    self.event(ended, status=status, error=error),
                    event_put("deployment", app.id, ended.id, ended),
                ],
            )
            if done.succeeded:
                return ended
            await self._store.explain(app.id, deployment.id)
        raise Conflict("this app changes too fast", retry=True)

    async def steps(self, deployment_id: str) -> AsyncIterator[DeploymentEvent]:
        """Yield a deployment's events from the first; ends with the last."""
        await self.get(deployment_id)
        async for change in self._store.raw.watch(keys.deployment_events(deployment_id)):
            if change.value is None:
                if not change.is_current:
                    return  # pruned, or its app was deleted
                continue
            event = msgspec.json.decode(change.value, type=DeploymentEvent)
            yield event
            if event.status in ("complete", "failed"):
                return
