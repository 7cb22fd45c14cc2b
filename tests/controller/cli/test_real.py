"""The command against the real controller, discovery and a host whose jobs are records: the article's commands."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from controller.client import ControllerClient
from controller.daemon import Controller
from controller.types import NewDeployment, ProcessType
from tests.controller.cli.conftest import Done
from tests.controller.conftest import DOMAIN, KEY, Discovery, new_release, running_controller
from tests.controller.fake_host import FakeHost

Flynn = Callable[..., Awaitable[Done]]


@pytest.fixture
async def running(discovery: Discovery, host: FakeHost) -> AsyncIterator[Controller]:
    async with running_controller(discovery) as controller:
        yield controller


@pytest.fixture
async def type_(running: Controller, home: Path) -> Flynn:
    """Types a command, while the controller answers from this process's loop."""

    async def run(*words: str, code: int = 0, stdin: bytes = b"") -> Done:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "controller.cli.main", *words, env={**os.environ, "FLYNN_APP": "example"},
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        async with asyncio.timeout(60):
            out, err = await process.communicate(stdin)
        assert process.returncode == code, (words, out, err)
        return Done(process.returncode, out.decode(), err.decode())

    await run("cluster", "add", "default", f"http://127.0.0.1:{running.port}", KEY)
    return run


async def test_the_articles_commands(type_: Flynn, running: Controller, host: FakeHost, home: Path) -> None:
    (home / ".ssh").mkdir()
    keygen = ("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(home / ".ssh/id_ed25519"))
    assert await (await asyncio.create_subprocess_exec(*keygen)).wait() == 0
    assert re.fullmatch(r"Key ([0-9a-f]{2}:){15}[0-9a-f]{2} added\n", (await type_("key-add")).out)
    assert (await type_("key-add", code=73)).err.startswith("flynn: ")
    assert (await type_("create", "example")).out == "Created example\n"
    assert "git push flynn master" in (await type_("scale", "web=1", code=75)).err

    async with ControllerClient(f"http://127.0.0.1:{running.port}", KEY) as client:
        app = await client.app("example")
        processes = {"web": ProcessType(args=("serve",)), "bad": ProcessType(args=("crash", "7"))}
        release = await new_release(client, app, processes=processes)
        await client.create_deployment(app.id, NewDeployment(release_id=release.id))

    scaled = (await type_("scale", "web=3")).out.splitlines()
    assert scaled[0].startswith("scaling web: ")
    assert scaled[-1].startswith("scale completed in ")
    table = (await type_("ps")).out.splitlines()
    assert table[0].split() == ["ID", "TYPE", "STATE", "CREATED", "RELEASE"]
    assert [line.split()[1:3] for line in table[1:]] == [["web", "up"]] * 3
    assert [line.split()[-1] for line in table[1:]] == ["v1"] * 3
    assert (await type_("scale")).out.split() == ["web=3"]
    assert "nosuch" in (await type_("scale", "nosuch=1", code=64)).err

    assert "http://www.example.test" in (await type_("route-add-http", "www.example.test")).out
    await type_("route", "add", "http", "www.example.test", code=73)
    routes = (await type_("route")).out
    assert f"http:example.{DOMAIN}" in routes
    assert "http:www.example.test" in routes
    await type_("route", "remove", "www.example.test")
    assert "www.example.test" not in (await type_("info")).out

    job = table[1].split()[0]
    await type_("kill", job)
    await type_("log", "-n", "5")
    await type_("key", "list")
    assert (await type_("delete", "-y")).out.startswith("Deleted example (releases: 1, routes: 1)")
    assert (await type_("apps")).out.split() == ["ID", "NAME"]


async def test_environment_releases_and_rollback(type_: Flynn, running: Controller, host: FakeHost) -> None:
    await type_("create", "example")
    assert (await type_("env", "set", "EARLY=1")).out == "Created release v1\n"
    async with ControllerClient(f"http://127.0.0.1:{running.port}", KEY) as client:
        app = await client.app("example")
        release = await new_release(client, app, "serve", env={"EARLY": "1"})
        await client.create_deployment(app.id, NewDeployment(release_id=release.id))
    await type_("scale", "web=2")
    changed = (await type_("env", "set", "COLOUR=blue")).out.splitlines()
    assert changed[0] == "Created release v3"
    assert changed[-1].startswith("Deployed v3 in ")
    assert any(line.endswith(" up") and " ==> web " in line for line in changed)
    assert (await type_("env")).out == "COLOUR=blue\nEARLY=1\n"
    assert all(job.spec.env["COLOUR"] == "blue" for job in host.up())
    assert "Deployed v2 in " in (await type_("release", "rollback")).out
    assert (await type_("env", "get", "COLOUR", code=66)).err
    listed = (await type_("deployment")).out.splitlines()
    assert [line.split()[3] for line in listed[1:3]] == ["v2", "v3"]


async def test_a_type_that_crashes_is_told(type_: Flynn, running: Controller) -> None:
    await type_("create", "example")
    async with ControllerClient(f"http://127.0.0.1:{running.port}", KEY) as client:
        app = await client.app("example")
        release = await new_release(client, app, processes={"bad": ProcessType(args=("crash", "7"))})
        await client.create_deployment(app.id, NewDeployment(release_id=release.id))
    done = await type_("scale", "bad=1", code=1)
    assert "crashed (exit status 7)" in done.out
    assert "flynn log -t bad" in done.err
    assert "cannot find module express" in (await type_("log", "-t", "bad")).out


async def test_one_offs_wait_for_their_terminal(type_: Flynn, running: Controller, host: FakeHost) -> None:
    await type_("create", "example")
    async with ControllerClient(f"http://127.0.0.1:{running.port}", KEY) as client:
        app = await client.app("example")
        release = await new_release(client, app)
        await client.create_deployment(app.id, NewDeployment(release_id=release.id))
    id = (await type_("run", "-d", "slow")).out.strip()
    assert id in (await type_("ps", "-q")).out
    await type_("run", "--", "refuse", code=64)
    attached = await type_("run", "slow", code=42, stdin=b"hello")
    assert attached.out == "HELLO"
