"""git-receive: takes `git push` over SSH, as a job of the platform, and turns it into a release.

Knows its pushers by the SSH keys that the controller has. Allows `git-receive-pack` and `git-upload-pack` on
the repository of an existing app and nothing else: no shell, terminal, forwarding or files. Bounds the number
of connections, the time to log in, the size and the duration of a push. Started as
`python3 -m buildpack.receive`; reached through the router's TCP route 2222.

Environment: `PORT`, `SSH_PRIVATE_KEYS` (PEM, one or more), `CONTROLLER_URL` (http://controller.discoverd),
`CONTROLLER_KEY`, `BLOBSTORE_URL` (http://blobstore.discoverd), `BLOBSTORE_KEY`, `BUILD_ARTIFACT` and `STACK_ARTIFACT`
(ids of the images' artifacts), `GIT_DATA` (/data/repos), `BUILD_MEMORY_MIB` (2048), `GIT_RESERVE_MIB` (256).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import shlex
import signal
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncssh

from buildpack.build import Builder, BuildSettings
from buildpack.doorkeeper import Doorkeeper
from buildpack.errors import PushRefused
from buildpack.push import Hooks, Push
from buildpack.repositories import Repositories, git_environment
from buildpack.shelf import Shelf
from controller.client import ControllerClient
from controller.errors import AppNotFound, AppProtected
from controller.types import App, parse_app_name
from discovery.wire import logging as wire_logging
from discovery.wire.errors import Invalid, NotFound, ServiceError
from hostd.types import MIB

log = logging.getLogger("buildpack.receive")  # it is started as __main__

LOGIN_TIMEOUT_S = 20
PUSH_TIMEOUT_S = 3600.0
COMMANDS_MAX = 32
CHUNK_BYTES = 64 * 1024
FORGET_EVERY_S = 3600.0
GIT_STOP_S = 5.0
_PEM = re.compile(r"-----BEGIN [^-]+-----.+?-----END [^-]+-----", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the daemon is told."""

    port: int
    host_keys: str
    controller_url: str
    controller_key: str
    blobstore_url: str
    blobstore_key: str
    data: Path
    reserve_bytes: int
    build: BuildSettings

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> Settings:
        """Read the job's environment.

        Raises:
            Invalid: an entry is missing or is no number.
        """
        get = environment.get
        try:
            return cls(
                port=int(get("PORT", "0")),
                host_keys=environment["SSH_PRIVATE_KEYS"],
                controller_url=get("CONTROLLER_URL", "http://controller.discoverd"),
                controller_key=environment["CONTROLLER_KEY"].split(",")[0],
                blobstore_url=get("BLOBSTORE_URL", "http://blobstore.discoverd"),
                blobstore_key=environment["BLOBSTORE_KEY"],
                data=Path(get("GIT_DATA", "/data/repos")),
                reserve_bytes=int(get("GIT_RESERVE_MIB", "256")) * MIB,
                build=BuildSettings(
                    build_artifact=environment["BUILD_ARTIFACT"],
                    stack_artifact=environment["STACK_ARTIFACT"],
                    memory_bytes=int(get("BUILD_MEMORY_MIB", "2048")) * MIB,
                    temp_disk_bytes=int(get("BUILD_DISK_MIB", "16384")) * MIB,
                ),
            )
        except KeyError as error:
            raise Invalid(f"{error.args[0]} is not set") from error
        except ValueError as error:
            raise Invalid(f"the environment has a number that is none: {error}") from error


def host_keys(text: str) -> list[asyncssh.SSHKey]:
    """Read the server's private keys.

    Raises:
        Invalid: there is none, or one does not parse.
    """
    try:
        keys = [asyncssh.import_private_key(pem + "\n") for pem in _PEM.findall(text.replace("\\n", "\n"))]
    except asyncssh.KeyImportError as error:
        raise Invalid(f"SSH_PRIVATE_KEYS: {error}") from error
    if not keys:
        raise Invalid("SSH_PRIVATE_KEYS holds no private key", hint="PEM, as ssh-keygen writes it")
    return keys


@dataclass(frozen=True)
class Request:
    """A command that we know: `service` is `receive-pack` or `upload-pack`."""

    service: str
    app: str


def parse_command(command: str | None) -> Request:
    """Read what the client's git asks for.

    Raises:
        PushRefused: it is not git, or not a command that we serve.
        InvalidName: the path is no app's name.
    """
    if not command:
        raise PushRefused("you are known here, but there is no shell: only git push and git clone work")
    try:
        words = shlex.split(command)
    except ValueError:
        words = []
    if words[:1] == ["git"] and len(words) == 3:
        words = [f"git-{words[1]}", words[2]]
    if len(words) != 2 or words[0] not in ("git-receive-pack", "git-upload-pack"):
        raise PushRefused("only git push and git clone work here")
    name = words[1].removeprefix("/").removesuffix("/").removesuffix(".git")
    return Request(words[0].removeprefix("git-"), parse_app_name(name))


class GitServer:
    """Serves git to clients that are known."""

    def __init__(self, controller: ControllerClient, repositories: Repositories, hooks: Hooks) -> None:
        self._controller = controller
        self._repositories = repositories
        self._hooks = hooks
        self._slots = asyncio.Semaphore(COMMANDS_MAX)

    async def handle(self, process: asyncssh.SSHServerProcess[bytes]) -> None:
        """Serve one command of a client; whatever is wrong with it is told to the client."""
        status = 1
        try:
            async with asyncio.timeout(PUSH_TIMEOUT_S), self._slots:
                status = await self._serve(process)
        except ServiceError as error:
            _refuse(process, error)
        except TimeoutError:
            _refuse(process, PushRefused(f"the push took longer than {PUSH_TIMEOUT_S:g} s"))
        except (OSError, asyncssh.Error):
            log.info("a client went away")
        except Exception:
            log.exception("a command failed")
            _refuse(process, PushRefused("internal error; the log of the gitreceive app has the cause"))
        with contextlib.suppress(OSError, asyncssh.Error):
            await process.stdout.drain()
            process.exit(status)

    async def _serve(self, process: asyncssh.SSHServerProcess[bytes]) -> int:
        command: Any = process.command  # bytes when the session has no encoding
        request = parse_command(command.decode("utf-8", "replace") if isinstance(command, bytes) else command)
        app = await self._app(request.app)
        repository = await self._repositories.prepare(app.id)
        if request.service == "upload-pack":
            return await _bridge(process, self._repositories.upload_command(repository), {})
        if "system" in app.meta:
            raise AppProtected(f"{app.name} is part of the platform: it is not deployed by a push")
        self._repositories.check_space()
        log.info("push to %s by %s", app.name, process.get_extra_info("peername"))
        with self._hooks.admitted(Push(app, repository)) as token:
            extra = {"HOSTD_PUSH_TOKEN": token, "HOSTD_PUSH_SOCKET": str(self._hooks.socket)}
            return await _bridge(process, self._repositories.receive_command(repository), extra)

    async def forget_deleted(self) -> None:
        """Remove the repositories of apps that are no more, now and then; only on the controller's clear word."""
        while True:
            for id in self._repositories.ids():
                try:
                    await self._controller.app(id)
                except AppNotFound:
                    log.info("app %s is deleted: removing its repository", id)
                    await self._repositories.remove(id)
                except ServiceError as error:
                    log.info("app %s cannot be checked: %s", id, error)
            await asyncio.sleep(FORGET_EVERY_S)

    async def _app(self, name: str) -> App:
        try:
            return await self._controller.app(name)
        except (AppNotFound, NotFound) as error:
            raise AppNotFound(f"there is no app named {name!r}", hint=f"to make it: flynn create {name}") from error


def _refuse(process: asyncssh.SSHServerProcess[bytes], error: ServiceError) -> None:
    """Tell git in its own protocol, so that it prints nothing about access rights; tell people on stderr."""
    text = f"{error.message}\n{error.hint}".strip()
    with contextlib.suppress(OSError, asyncssh.Error):
        if isinstance(error, PushRefused):
            process.stderr.write(f"{text}\n".encode())
        else:
            payload = f"ERR {text}".encode()[:60000]
            process.stdout.write(b"%04x" % (len(payload) + 4) + payload)


async def _bridge(process: asyncssh.SSHServerProcess[bytes], command: list[str], extra: Mapping[str, str]) -> int:
    """Run git between the client's streams; if the client goes away, git and its hook are ended."""
    git = await asyncio.create_subprocess_exec(
        *command,
        env={**git_environment(), **extra},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
        limit=CHUNK_BYTES * 4,
    )
    assert git.stdin is not None
    assert git.stdout is not None
    assert git.stderr is not None
    try:
        async with asyncio.TaskGroup() as tasks:
            feed = tasks.create_task(_feed(process, git.stdin))
            watch = tasks.create_task(_end_with_client(process, git))
            out = tasks.create_task(_relay(git.stdout, process.stdout))
            err = tasks.create_task(_relay(git.stderr, process.stderr))
            status = await git.wait()
            await asyncio.wait({out, err}, timeout=GIT_STOP_S)
            for task in (feed, watch, out, err):
                task.cancel()
    finally:
        _signal_group(git, signal.SIGKILL)
    return status if status >= 0 else 128 - status


async def _feed(process: asyncssh.SSHServerProcess[bytes], stdin: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError, asyncssh.Error):  # git has ended, or the client: others see to it
        while chunk := await process.stdin.read(CHUNK_BYTES):
            stdin.write(chunk)
            await stdin.drain()
        stdin.close()


async def _relay(source: asyncio.StreamReader, target: asyncssh.SSHWriter[bytes]) -> None:
    with contextlib.suppress(OSError, asyncssh.Error):
        while chunk := await source.read(CHUNK_BYTES):
            target.write(chunk)
            await target.drain()


async def _end_with_client(process: asyncssh.SSHServerProcess[bytes], git: asyncio.subprocess.Process) -> None:
    await process.channel.wait_closed()
    _signal_group(git, signal.SIGTERM)
    await asyncio.sleep(GIT_STOP_S)
    _signal_group(git, signal.SIGKILL)


def _signal_group(git: asyncio.subprocess.Process, number: signal.Signals) -> None:
    """Signal git and the programs that it started; its group is its own."""
    if git.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(git.pid, number)


@asynccontextmanager
async def running(settings: Settings, host: str = "0.0.0.0") -> AsyncIterator[int]:  # noqa: S104
    """Run git-receive and yield its port."""
    keys = host_keys(settings.host_keys)
    with tempfile.TemporaryDirectory(prefix="git-receive-") as scratch:
        repositories = Repositories(settings.data, Path(scratch, "hooks"), reserve_bytes=settings.reserve_bytes)
        repositories.open()
        shelf = Shelf(settings.blobstore_url, settings.blobstore_key)
        async with ControllerClient(settings.controller_url, settings.controller_key) as controller:
            hooks = Hooks(Builder(controller, shelf, settings.build), repositories, Path(scratch, "push.sock"))
            server = GitServer(controller, repositories, hooks)
            async with hooks.listening(), asyncio.TaskGroup() as tasks:
                forgetting = tasks.create_task(server.forget_deleted())
                acceptor = await asyncssh.create_server(
                    Doorkeeper(controller).connection,
                    host,
                    settings.port,
                    server_host_keys=keys,
                    process_factory=server.handle,
                    encoding=None,
                    line_editor=False,
                    allow_pty=False,
                    agent_forwarding=False,
                    x11_forwarding=False,
                    login_timeout=LOGIN_TIMEOUT_S,
                    keepalive_interval=30,
                    keepalive_count_max=4,
                    server_version="hostd",
                )
                try:
                    yield acceptor.get_port()
                finally:
                    forgetting.cancel()
                    acceptor.close()
                    await acceptor.wait_closed()


async def serve(environment: Mapping[str, str]) -> None:
    """Run git-receive until told to stop."""
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    async with running(Settings.read(environment)) as port:
        log.info("git-receive listens on %d", port)
        await stopped.wait()


def main() -> None:
    """Start the daemon."""
    wire_logging.configure()
    asyncio.run(serve(os.environ))


if __name__ == "__main__":
    main()
