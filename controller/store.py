"""Keeps the controller's nouns in discovery's store: typed reads, and writes that compare before they swap.

Every change and the `Event` that tells of it are one transaction. It refuses what would break a
rule between records (a name used twice); shapes are checked before, by `admit`. Called by `api`,
`deployments` and `scheduler.loop`; it holds no state but a cache of immutable records.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, TypeVar

import msgspec

from controller import keys
from controller.errors import (
    AppExists,
    AppNotFound,
    ArtifactNotFound,
    DeploymentInProgress,
    KeyExists,
    KeyNotFound,
    ReleaseNotFound,
)
from controller.types import App, Artifact, Deployment, Event, Formation, Key, Release
from discovery.client import Store, compare_exists, compare_missing, compare_revision, compare_value
from discovery.types import Delete, KeyValue, Operation, Put
from discovery.wire import clock
from discovery.wire.errors import Conflict

T = TypeVar("T")
EVENTS_MAX = 1000
CACHE_MAX = 512
SWAP_TRIES = 20


def encode(value: Any) -> bytes:
    return msgspec.json.encode(value)


def new_id() -> str:
    """Make an identifier: 128 random bits, hex."""
    return secrets.token_hex(16)


def event_put(kind: str, app_id: str = "", object_id: str = "", data: Any = None) -> Put:
    """Make the write that records an event; its id is the store's revision, known only when read."""
    now = clock.now_s()
    event = Event(
        id=0, at=now, kind=kind, app_id=app_id, object_id=object_id, data=msgspec.to_builtins(data) if data else {}
    )
    return Put(f"{keys.EVENTS}{int(now * 1e6):017d}-{secrets.token_hex(4)}", encode(event))


def event_from(value: bytes, revision: int) -> Event:
    return msgspec.structs.replace(msgspec.json.decode(value, type=Event), id=revision)


class ControllerStore:
    """The records of one cluster."""

    def __init__(self, store: Store) -> None:
        self.raw = store
        self._cache: dict[str, Any] = {}

    # reading

    async def get(self, key: str, into: type[T]) -> tuple[T, int] | None:
        """Return a record and the revision at which it was last written."""
        found = await self.raw.get(key)
        return None if found is None else (msgspec.json.decode(found.value, type=into), found.mod_revision)

    async def list_of(self, prefix: str, into: type[T]) -> list[T]:
        found = await self.raw.range(prefix)
        return [msgspec.json.decode(item.value, type=into) for item in found.items]

    async def _immutable(self, key: str, into: type[T]) -> T | None:
        if key not in self._cache:
            found = await self.get(key, into)
            if found is None:
                return None
            if len(self._cache) >= CACHE_MAX:
                self._cache.pop(next(iter(self._cache)))
            self._cache[key] = found[0]
        cached: T = self._cache[key]
        return cached

    # apps

    async def apps(self) -> list[App]:
        """List apps by name."""
        return sorted(await self.list_of(keys.APPS, App), key=lambda app: app.name)

    async def app(self, app: str) -> App:
        """Return an app by name or id.

        Raises:
            AppNotFound: there is none.
        """
        named = await self.raw.get(keys.app_name(app))
        found = await self.get(keys.app(named.value.decode() if named else app), App)
        if found is None:
            shown = app if len(app) <= 60 else app[:57] + "..."
            raise AppNotFound(f"no app {shown!r}", hint="flynn apps lists them, flynn create NAME makes one")
        return found[0]

    async def create_app(self, app: App) -> App:
        """Add an app; the same id and name again is the same app.

        Raises:
            AppExists: the name or the id is taken.
        """
        done = await self.raw.txn(
            [compare_missing(keys.app(app.id)), compare_missing(keys.app_name(app.name))],
            [
                Put(keys.app(app.id), encode(app)),
                Put(keys.app_name(app.name), app.id.encode()),
                event_put("app", app.id, app.id, app),
            ],
        )
        if done.succeeded:
            return app
        known = await self.get(keys.app(app.id), App)
        if known is not None and known[0].name == app.name:
            return known[0]
        raise AppExists(f"an app named {app.name} exists already", hint="choose another name, or use that app with -a")

    async def change_app(self, app_id: str, change: Callable[[App], App]) -> App:
        """Change an app by compare-and-swap."""

        def changed(app: App) -> App:
            return msgspec.structs.replace(change(app), updated_at=clock.now_s())

        return await self._swap(keys.app(app_id), App, changed, lambda app: [event_put("app", app.id, app.id, app)])

    async def _swap(
        self,
        key: str,
        into: type[T],
        change: Callable[[T], T],
        beside: Callable[[T], Sequence[Operation]],
    ) -> T:
        for _ in range(SWAP_TRIES):
            found = await self.get(key, into)
            if found is None:
                raise AppNotFound("the app was deleted meanwhile")
            after = change(found[0])
            done = await self.raw.txn([compare_revision(key, found[1])], [Put(key, encode(after)), *beside(after)])
            if done.succeeded:
                return after
        raise Conflict(f"{key} changes too fast", retry=True)

    async def delete_app(self, app: App) -> int:
        """Remove an app and all that hangs on it but its routes; its jobs end soon after. Return its release count."""
        releases = await self.releases(app.id)
        deployments = [d for d in await self.list_of(keys.DEPLOYMENTS, Deployment) if d.app_id == app.id]
        for_deployments: list[Operation] = []
        for deployment in deployments:
            for_deployments.append(Delete(keys.deployment(deployment.id)))
            for_deployments.append(Delete(keys.deployment_events(deployment.id), is_prefix=True))
        done = await self.raw.txn(
            [compare_exists(keys.app(app.id))],
            [
                Delete(keys.app(app.id)),
                Delete(keys.app_name(app.name)),
                Delete(keys.releases(app.id), is_prefix=True),
                Delete(keys.release_number(app.id)),
                Delete(keys.formations(app.id), is_prefix=True),
                Delete(keys.deploying(app.id)),
                Put(keys.deleted(app.id), encode(clock.now_s())),
                event_put("app_deleted", app.id, app.id, {"name": app.name}),
                *for_deployments,
            ],
        )
        if not done.succeeded:
            raise AppNotFound(f"no app {app.name!r}")
        return len(releases)

    async def bury(self, app_id: str) -> None:
        """Forget that an app was deleted: its last job has ended."""
        await self.raw.delete(keys.deleted(app_id))

    # artifacts and releases

    async def create_artifact(self, artifact: Artifact) -> Artifact:
        done = await self.raw.txn(
            [compare_missing(keys.artifact(artifact.id))],
            [
                Put(keys.artifact(artifact.id), encode(artifact)),
                event_put("artifact", "", artifact.id, {"kind": artifact.kind}),
            ],
        )
        return artifact if done.succeeded else await self.artifact(artifact.id)

    async def artifact(self, artifact_id: str) -> Artifact:
        """Raise `ArtifactNotFound` if there is none."""
        found = await self._immutable(keys.artifact(artifact_id), Artifact)
        if found is None:
            raise ArtifactNotFound(f"no artifact {artifact_id[:64]!r}")
        return found

    async def artifacts(self, ids: Sequence[str]) -> list[Artifact]:
        return [await self.artifact(id) for id in ids]

    async def releases(self, app_id: str) -> list[Release]:
        """List an app's releases, newest first."""
        return sorted(await self.list_of(keys.releases(app_id), Release), key=lambda r: -r.number)

    async def release(self, app_id: str, release: str) -> Release:
        """Return a release by id or `vN`.

        Raises:
            ReleaseNotFound: the app has none such.
        """
        if release.startswith("v") and release[1:].isdecimal():
            number = int(release[1:])
            for candidate in await self.releases(app_id):
                if candidate.number == number:
                    return candidate
        else:
            found = await self._immutable(keys.release(app_id, release), Release)
            if found is not None:
                return found
        raise ReleaseNotFound(f"no release {release[:64]!r}", hint="flynn release list shows them")

    async def create_release(self, release: Release) -> Release:
        """Add a release under the app's next number; the same id again is the same release."""
        key = keys.release(release.app_id, release.id)
        counter = keys.release_number(release.app_id)
        for _ in range(SWAP_TRIES):
            last = await self.raw.get(counter)
            number = int(last.value) + 1 if last else 1
            numbered = msgspec.structs.replace(release, number=number)
            done = await self.raw.txn(
                [
                    compare_missing(key),
                    compare_exists(keys.app(release.app_id)),
                    compare_revision(counter, last.mod_revision if last else 0),
                ],
                [
                    Put(key, encode(numbered)),
                    Put(counter, str(number).encode()),
                    event_put("release", release.app_id, release.id, {"number": number}),
                ],
            )
            if done.succeeded:
                return numbered
            if (known := await self.get(key, Release)) is not None:
                return known[0]
            if await self.raw.get(keys.app(release.app_id)) is None:
                raise AppNotFound("the app was deleted meanwhile")
        raise Conflict("releases of this app come too fast", retry=True)

    # formations

    async def formations(self, app_id: str) -> list[Formation]:
        return await self.list_of(keys.formations(app_id), Formation)

    async def formation(self, app_id: str, release_id: str) -> Formation:
        """Return the formation of a release; one that was never scaled is empty."""
        found = await self.get(keys.formation(app_id, release_id), Formation)
        return found[0] if found else Formation(app_id=app_id, release_id=release_id)

    async def set_formation(
        self,
        app_id: str,
        release_id: str,
        change: Callable[[dict[str, int]], dict[str, int]],
        *,
        deployment_id: str = "",
    ) -> Formation:
        """Change counts by compare-and-swap; `deployment_id` is the deployment that does it, if one does.

        Raises:
            DeploymentInProgress: (another) one runs for the app.
        """
        key, lock = keys.formation(app_id, release_id), keys.deploying(app_id)
        guard = compare_value(lock, deployment_id.encode()) if deployment_id else compare_missing(lock)
        for _ in range(SWAP_TRIES):
            found = await self.get(key, Formation)
            before = found[0].processes if found else {}
            after = {name: count for name, count in change(dict(before)).items() if count > 0}
            formation = Formation(app_id=app_id, release_id=release_id, processes=after, updated_at=clock.now_s())
            if found and before == after:
                return found[0]
            done = await self.raw.txn(
                [
                    guard,
                    compare_revision(key, found[1] if found else 0),
                    compare_exists(keys.app(app_id)),
                ],
                [Put(key, encode(formation)), event_put("scale", app_id, release_id, {"processes": after})],
            )
            if done.succeeded:
                return formation
            await self.explain(app_id, deployment_id)
        raise Conflict("this formation changes too fast", retry=True)

    async def explain(self, app_id: str, deployment_id: str) -> None:
        """Say why a guarded write did not happen, unless somebody was merely faster."""
        lock = await self.raw.get(keys.deploying(app_id))
        holder = lock.value.decode() if lock else ""
        if holder != deployment_id:
            raise DeploymentInProgress(
                "a deployment of this app is in progress" if holder else "this deployment is over",
                hint="flynn deployment shows it; try again when it is done",
                deployment_id=holder,
            )
        if await self.raw.get(keys.app(app_id)) is None:
            raise AppNotFound("the app was deleted meanwhile")

    # SSH keys

    async def ssh_keys(self) -> list[Key]:
        return sorted(await self.list_of(keys.SSH_KEYS, Key), key=lambda key: key.created_at)

    async def ssh_key(self, fingerprint: str) -> Key:
        """Return a key by MD5 or `SHA256:` fingerprint. Raises `KeyNotFound`."""
        if fingerprint.upper().startswith("SHA256:"):
            for key in await self.ssh_keys():
                if key.sha256.removeprefix("SHA256:") == fingerprint[7:].rstrip("="):
                    return key
        else:
            found = await self.get(keys.ssh_key(fingerprint.lower().removeprefix("md5:")), Key)
            if found is not None:
                return found[0]
        raise KeyNotFound(f"no SSH key {fingerprint[:80]}", hint="flynn key list shows the registered ones")

    async def add_ssh_key(self, key: Key) -> Key:
        """Raise `KeyExists` when it is registered already."""
        done = await self.raw.txn(
            [compare_missing(keys.ssh_key(key.fingerprint))],
            [
                Put(keys.ssh_key(key.fingerprint), encode(key)),
                event_put("key", "", key.fingerprint, {"comment": key.comment}),
            ],
        )
        if not done.succeeded:
            raise KeyExists(f"key {key.fingerprint} is registered already")
        return key

    async def remove_ssh_key(self, fingerprint: str) -> None:
        """Raise `KeyNotFound` if there is none."""
        key = await self.ssh_key(fingerprint)
        await self.raw.txn(
            [compare_exists(keys.ssh_key(key.fingerprint))],
            [Delete(keys.ssh_key(key.fingerprint)), event_put("key_deleted", "", key.fingerprint)],
        )

    # volumes and events

    async def pin_volume(self, volume: str, host_id: str) -> None:
        """Remember which host has a volume; the first to say so wins."""
        await self.raw.txn([compare_missing(keys.pin(volume))], [Put(keys.pin(volume), host_id.encode())])

    async def pinned(self, volume: str) -> str:
        """Return the host that has a volume, or an empty string."""
        found = await self.raw.get(keys.pin(volume))
        return found.value.decode() if found else ""

    async def add_events(self, events: Sequence[Put]) -> None:
        await self.raw.txn([], list(events))

    async def prune_events(self) -> None:
        """Drop the oldest events beyond `EVENTS_MAX`."""
        found = await self.raw.range(keys.EVENTS)
        surplus = [Delete(item.key) for item in found.items[: max(0, len(found.items) - EVENTS_MAX)]]
        for start in range(0, len(surplus), 100):
            await self.raw.txn([], surplus[start : start + 100])

    async def events(self, *, app_id: str = "", since: int | None = None) -> AsyncIterator[Event]:
        """Yield the kept events after `since` (none if `None`), one of kind `current`, then every new one."""

        def is_wanted(event: Event) -> bool:
            return not app_id or event.app_id == app_id

        past = await self.raw.range(keys.EVENTS)
        if since is not None:
            for item in sorted(past.items, key=_by_revision):
                event = event_from(item.value, item.mod_revision)
                if event.id > since and is_wanted(event):
                    yield event
        async for change in self.raw.watch(keys.EVENTS, from_revision=past.revision + 1):
            if change.is_current:
                yield Event(id=past.revision, at=clock.now_s(), kind="current")
            elif change.value is not None:
                event = event_from(change.value, change.revision)
                if is_wanted(event):
                    yield event


def _by_revision(item: KeyValue) -> int:
    return item.mod_revision
