"""Decides what a push means, and answers git's pre-receive hook: the push is accepted once the release serves.

`decide` is pure. `Hooks` listens on a unix socket in a folder of its own; a hook shows by a token which push it
belongs to. If the hook goes away (the pusher pressed Ctrl-C), the build is cancelled. Called by `receive`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from buildpack.build import Builder, Source
from buildpack.errors import PushInProgress, PushRefused
from buildpack.repositories import QUARANTINE, Repositories
from controller.types import App
from discovery.wire.errors import ServiceError

log = logging.getLogger(__name__)

BRANCHES = ("main", "master")
REQUEST_BYTES_MAX = 16 * 1024 * 1024
REF_LETTERS_MAX = 255
"""A ref's name is a path of the repository: a name without an end would be folders without an end."""
_NONE = "0" * 40
_HEADS = "refs/heads/"
_HINT = "to deploy another branch: git push flynn BRANCH:main"


@dataclass(frozen=True)
class Wanted:
    """The commit that a push deploys, and the branch that it was pushed to."""

    commit: str
    branch: str


class HookRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the hook sends: git's lines `OLD NEW REF`, and the environment that shows git the new objects."""

    token: str
    updates: list[str]
    environment: dict[str, str]


@dataclass(frozen=True)
class Push:
    """A push in progress."""

    app: App
    repository: Path


def decide(updates: Sequence[str]) -> Wanted:
    """Return what the push deploys; other branches and tags may come along.

    Raises:
        PushRefused: it has no `main` or `master`, or removes it, or has both with different commits;
            or a name is too long.
    """
    found: dict[str, str] = {}
    for update in updates:
        _, new, ref = update.split(" ", 2)
        if len(ref) > REF_LETTERS_MAX:
            raise PushRefused(f"a branch or tag has a name of more than {REF_LETTERS_MAX} letters: {ref[:60]}...")
        branch = ref.removeprefix(_HEADS)
        if ref.startswith(_HEADS) and branch in BRANCHES:
            if new == _NONE:
                raise PushRefused(f"the branch {branch} is what is deployed and cannot be removed")
            found[branch] = new
    if not found:
        raise PushRefused("The push must include a change to the main or master branch to be deployed.", hint=_HINT)
    if len(set(found.values())) > 1:
        raise PushRefused("main and master are different commits: push the one to deploy", hint=_HINT)
    branch = next(iter(found))
    return Wanted(found[branch], branch)


class Hooks:
    """Knows the pushes in progress, one per app, and answers their hooks."""

    def __init__(self, builder: Builder, repositories: Repositories, socket: Path, *, builds_max: int = 2) -> None:
        self._builder = builder
        self._repositories = repositories
        self.socket = socket
        self._pushes: dict[str, Push] = {}
        self._slots = asyncio.Semaphore(builds_max)

    @contextmanager
    def admitted(self, push: Push) -> Iterator[str]:
        """Let a push begin and yield the token for its hook.

        Raises:
            PushInProgress: another one to the same app is not finished.
        """
        if any(other.app.id == push.app.id for other in self._pushes.values()):
            raise PushInProgress(f"another push to {push.app.name} is in progress", hint="push again when it is done")
        token = secrets.token_hex(16)
        self._pushes[token] = push
        try:
            yield token
        finally:
            del self._pushes[token]

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        """Answer hooks."""
        server = await asyncio.start_unix_server(self._answer, self.socket, limit=REQUEST_BYTES_MAX)
        try:
            yield
        finally:
            server.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            request = msgspec.json.decode(await reader.readline(), type=HookRequest)
            push = self._pushes[request.token]
        except (ValueError, KeyError, msgspec.MsgspecError):
            writer.close()
            return
        conversation = _Conversation(writer)
        status = 1
        try:
            async with asyncio.TaskGroup() as tasks:
                work = tasks.create_task(self._deploy(push, request, conversation))
                watch = tasks.create_task(_cancel_at_end(reader, work))
                status = await work
                watch.cancel()
        except* (OSError, asyncio.CancelledError):
            log.info("push to %s: the pusher went away", push.app.name)
        finally:
            conversation.end(status)

    async def _deploy(self, push: Push, request: HookRequest, conversation: _Conversation) -> int:
        quarantine = {name: value for name, value in request.environment.items() if name in QUARANTINE}
        try:
            wanted = decide(request.updates)
            if self._slots.locked():
                await conversation.say("-----> Waiting for other builds to finish...")
            async with self._slots:
                content = self._repositories.archive(push.repository, wanted.commit, quarantine)
                source = Source(app=push.app, commit=wanted.commit, branch=wanted.branch, content=content)
                release = await self._builder.deploy(source, conversation.say)
            await self._repositories.point_head(push.repository, wanted.branch)
        except ServiceError as error:
            log.info("push to %s refused: %s", push.app.name, error.message)
            for text in f"{error.message}\n{error.hint}".strip().splitlines():
                await conversation.say(f" !     {text}")
            return 1
        except OSError:
            raise
        except Exception:
            log.exception("push to %s failed", push.app.name)
            await conversation.say(" !     internal error; the log of the gitreceive app has the cause")
            return 1
        log.info("push to %s: %s is release %d", push.app.name, wanted.commit[:12], release.number)
        return 0


async def _cancel_at_end(reader: asyncio.StreamReader, work: asyncio.Task[int]) -> None:
    """Cancel the work when the hook goes away; it sends nothing after its request."""
    await reader.read(1)
    work.cancel()


class _Conversation:
    """Says lines to one hook, and at last its exit status."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer

    async def say(self, text: str) -> None:
        self._writer.write(json.dumps({"text": text}).encode() + b"\n")
        await self._writer.drain()

    def end(self, status: int) -> None:
        if not self._writer.is_closing():
            self._writer.write(json.dumps({"status": status}).encode() + b"\n")
            self._writer.close()
