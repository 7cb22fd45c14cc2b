"""Keeps one bare git repository per app, and says how git is called on it.

Git sees no configuration but ours, and runs no hook but ours. A repository appears whole by a rename; what a
crash has left in one (locks, half-received objects) is removed at start, when no git can be running.
Called by `receive` and `push`.
"""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import shutil
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

from buildpack.errors import BuildFailed, DiskFull
from discovery.wire.errors import Internal, Invalid

PUSH_BYTES_MAX = 1024**3
CHUNK_BYTES = 256 * 1024
HOOK = Path(__file__).with_name("hook.py")
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}")
QUARANTINE = ("GIT_DIR", "GIT_QUARANTINE_PATH", "GIT_OBJECT_DIRECTORY", "GIT_ALTERNATE_OBJECT_DIRECTORIES")


def git_environment() -> dict[str, str]:
    """Return the whole environment of every git that we start."""
    return {
        "PATH": os.environ.get("PATH", "/usr/local/bin:/usr/bin:/bin"),
        "HOME": "/nonexistent",
        "LANG": "C.UTF-8",
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CONFIG_GLOBAL": "/dev/null",
        "GIT_TERMINAL_PROMPT": "0",
    }


class Repositories:
    """The folder of repositories, and the folder with our hook."""

    def __init__(self, folder: Path, hooks: Path, *, reserve_bytes: int) -> None:
        self.folder = folder
        self.hooks = hooks
        self._reserve_bytes = reserve_bytes

    def open(self) -> None:
        """Make the folders, write the hook, and clean up after a crash."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.hooks.mkdir(parents=True, exist_ok=True)
        hook = self.hooks / "pre-receive"
        hook.write_text(f'#!/bin/sh\nexec "{sys.executable}" -SIE "{HOOK}"\n', encoding="utf-8")
        hook.chmod(0o755)
        for repository in self.folder.iterdir():
            if not repository.name.endswith(".git"):
                shutil.rmtree(repository, ignore_errors=True)
                continue
            for leftover in (*repository.glob("objects/*incoming-*"), *repository.rglob("*.lock")):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()

    def check_space(self) -> None:
        """Raise `DiskFull` when another push might not fit."""
        status = os.statvfs(self.folder)
        free = status.f_bavail * status.f_frsize
        if free < self._reserve_bytes:
            raise DiskFull(
                f"the disk of the git server is full ({free // 1024**2} MiB left)",
                hint="free space on the host, then push again",
            )

    async def prepare(self, app_id: str) -> Path:
        """Return the app's repository, made if it is the first push.

        Raises:
            Invalid: the id is none that can be a folder's name.
        """
        if not _ID.fullmatch(app_id):
            raise Invalid(f"app id {app_id[:80]!r}")
        repository = self.folder / f"{app_id}.git"
        if not repository.is_dir():
            fresh = self.folder / f"new-{secrets.token_hex(8)}"
            await self._git("init", "--quiet", "--bare", "--template=", "--initial-branch=master", str(fresh))
            fresh.rename(repository)
        return repository

    def ids(self) -> list[str]:
        """Return the ids of the apps that have a repository."""
        return sorted(path.name.removesuffix(".git") for path in self.folder.glob("*.git"))

    async def remove(self, app_id: str) -> None:
        """Remove an app's repository."""
        gone = self.folder / f"gone-{secrets.token_hex(8)}"
        (self.folder / f"{app_id}.git").rename(gone)
        await asyncio.to_thread(shutil.rmtree, gone)

    def receive_command(self, repository: Path) -> list[str]:
        """Return the command line that takes a push, through our hook."""
        settings = {
            "core.hooksPath": str(self.hooks),
            "receive.maxInputSize": str(PUSH_BYTES_MAX),
            "receive.denyDeletes": "false",
            "receive.denyNonFastForwards": "false",
            "receive.autogc": "true",
            "gc.autoDetach": "true",
        }
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        return ["git", *options, "receive-pack", str(repository)]

    def upload_command(self, repository: Path) -> list[str]:
        """Return the command line that serves a clone or fetch."""
        return ["git", "-c", f"core.hooksPath={self.hooks / 'none'}", "upload-pack", "--strict", str(repository)]

    async def archive(self, repository: Path, commit: str, quarantine: Mapping[str, str]) -> AsyncIterator[bytes]:
        """Yield a tar of a commit's files, also of one that is not accepted yet."""
        process = await asyncio.create_subprocess_exec(
            "git",
            "archive",
            "--format=tar",
            commit,
            cwd=repository,
            env={**git_environment(), **quarantine},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        assert process.stdout is not None
        try:
            while chunk := await process.stdout.read(CHUNK_BYTES):
                yield chunk
            if await process.wait() != 0:
                raise BuildFailed(f"commit {commit[:12]} cannot be archived")
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()

    async def point_head(self, repository: Path, branch: str) -> None:
        """Make the deployed branch the one that a clone checks out."""
        await self._git("symbolic-ref", "HEAD", f"refs/heads/{branch}", cwd=repository)

    async def _git(self, *arguments: str, cwd: Path | None = None) -> None:
        process = await asyncio.create_subprocess_exec(
            "git",
            *arguments,
            cwd=cwd,
            env=git_environment(),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        _, complaint = await process.communicate()
        if process.returncode != 0:
            text = complaint.decode("utf-8", "replace").strip()
            if "No space left" in text:
                raise DiskFull("the disk of the git server is full", hint="free space on the host, then push again")
            raise Internal(f"git {arguments[0]} failed: {text[-300:]}")
