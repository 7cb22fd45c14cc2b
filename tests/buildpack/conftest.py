"""A git-receive with its blob store and a fake controller, and a git client that reads nobody's configuration."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import asyncssh
import pytest

from buildpack import blobstore, receive
from buildpack.build import BuildSettings
from controller.types import Key
from discovery.wire.serve import listen_tcp
from tests.buildpack.fakes import FakeController

DEADLINE_S = 120.0
BLOBSTORE_KEY = "shelf-key"


@dataclass
class Result:
    status: int
    text: str


class Git:
    """Runs git in a folder with an environment of its own."""

    def __init__(self, folder: Path, key: Path | None = None) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(folder.parent),
            "GIT_CONFIG_NOSYSTEM": "1",
            "GIT_CONFIG_GLOBAL": "/dev/null",
            "GIT_AUTHOR_NAME": "t",
            "GIT_AUTHOR_EMAIL": "t@example.test",
            "GIT_COMMITTER_NAME": "t",
            "GIT_COMMITTER_EMAIL": "t@example.test",
            "GIT_TERMINAL_PROMPT": "0",
        }
        if key is not None:
            options = {
                "IdentitiesOnly": "yes",
                "IdentityAgent": "none",
                "StrictHostKeyChecking": "accept-new",
                "UserKnownHostsFile": folder.parent / "known_hosts",
                "GlobalKnownHostsFile": "/dev/null",
                "BatchMode": "yes",
                "LogLevel": "INFO",
            }
            words = [f"-o{name}={value}" for name, value in options.items()]
            self.environment["GIT_SSH_COMMAND"] = " ".join(["ssh", "-F", "/dev/null", "-i", str(key), *words])

    async def start(self, *arguments: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            "git",
            *arguments,
            cwd=self.folder,
            env=self.environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )

    async def __call__(self, *arguments: str) -> Result:
        async with asyncio.timeout(DEADLINE_S):
            process = await self.start(*arguments)
            out, _ = await process.communicate()
        assert process.returncode is not None
        return Result(process.returncode, out.decode())

    async def commit(self, files: dict[str, str], branch: str = "master") -> None:
        if not (self.folder / ".git").exists():
            await self("init", "--quiet", f"--initial-branch={branch}")
        for name, text in files.items():
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            if text.startswith("#!"):
                path.chmod(0o755)
        await self("add", "-A")
        result = await self("commit", "--quiet", "--allow-empty", "-m", "change")
        assert result.status == 0, result.text


@dataclass
class Server:
    """A running git-receive."""

    port: int
    controller: FakeController
    data: Path
    blobs: Path
    scratch: Path
    blobstore_port: int

    def url(self, app: str, user: str = "git") -> str:
        return f"ssh://{user}@127.0.0.1:{self.port}/{app}.git"

    def key(self, name: str = "key", *, is_registered: bool = True) -> Path:
        path = self.scratch / name
        if not path.exists():
            key = asyncssh.generate_private_key("ssh-ed25519")
            path.write_bytes(key.export_private_key())
            path.chmod(0o600)
            if is_registered:
                fingerprint = key.get_fingerprint("sha256")
                self.controller.keys[fingerprint] = Key(
                    fingerprint=key.get_fingerprint("md5"), sha256=fingerprint, public_key=""
                )
        return path

    def git(self, name: str = "work", key: str = "key") -> Git:
        return Git(self.scratch / "home" / name, self.key(key))

    def temporary_blobs(self) -> list[str]:
        return sorted(path.name for name in ("temp", "incoming") for path in (self.blobs / name).iterdir())


@pytest.fixture
def host_key() -> str:
    return asyncssh.generate_private_key("ssh-ed25519").export_private_key().decode()


@pytest.fixture
def work(tmp_path: Path) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


@pytest.fixture
async def server(tmp_path: Path, host_key: str) -> AsyncIterator[Server]:
    controller = FakeController(tmp_path / "jobs")
    shelf = {"BLOBSTORE_KEY": BLOBSTORE_KEY, "BLOBSTORE_DATA": str(tmp_path / "blobs"), "BLOBSTORE_RESERVE_MIB": "1"}
    async with asyncio.TaskGroup() as controller.tasks, blobstore.running(shelf, "127.0.0.1") as blobstore_port:
        async with listen_tcp(controller.application(), "127.0.0.1", 0) as controller_port:
            settings = receive.Settings(
                port=0,
                host_keys=host_key,
                controller_url=f"http://127.0.0.1:{controller_port}",
                controller_key="key",
                blobstore_url=f"http://127.0.0.1:{blobstore_port}",
                blobstore_key=BLOBSTORE_KEY,
                data=tmp_path / "repos",
                reserve_bytes=1024,
                build=BuildSettings(build_artifact="build", stack_artifact="stack"),
            )
            async with receive.running(settings, "127.0.0.1") as port:
                yield Server(port, controller, tmp_path / "repos", tmp_path / "blobs", tmp_path, blobstore_port)
            for id in controller.jobs:
                controller.kill(id)
