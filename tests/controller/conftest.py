"""A real discovery daemon, a host that only keeps records, and a real controller in this process."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from controller.client import ControllerClient
from controller.daemon import Controller, Settings
from controller.store import ControllerStore
from controller.types import App, NewApp, NewArtifact, NewDeployment, NewRelease, ProcessType, Release, Scale
from discovery.client import Services, Store
from discovery.wire.call import Caller
from discovery.wire.errors import Unavailable
from hostd.types import Layer
from tests.controller.fake_host import DIGEST, FakeHost

KEY = "0123456789abcdef0123456789abcdef"
DOMAIN = "cluster.test"


async def eventually(what: str, is_so: Callable[[], object], timeout_s: float = 10.0) -> None:
    """Wait until `is_so()`, or fail saying what never came to be."""
    try:
        async with asyncio.timeout(timeout_s):
            while not is_so():
                await asyncio.sleep(0.01)
    except TimeoutError:
        pytest.fail(f"never within {timeout_s:g} s: {what}")


@pytest.fixture
def short_dir() -> Iterator[Path]:
    """A folder with a short name: a socket's path has at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="ct-", dir="/tmp") as name:
        yield Path(name)


@dataclass
class Discovery:
    """A discovery daemon of its own that can be stopped and started again."""

    folder: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"unix://{self.folder}/discovery/discovery.sock"

    async def start(self) -> None:
        (self.folder / "discovery").mkdir(exist_ok=True)
        socket = self.folder / "discovery" / "discovery.sock"
        options = ["--state-dir", f"{self.folder}/state", "--socket", str(socket)]
        self.process = subprocess.Popen(  # noqa: ASYNC220 — returns at once
            [sys.executable, "-m", "discovery.daemon", *options], stderr=subprocess.DEVNULL
        )
        async with Caller(self.address) as caller, asyncio.timeout(20):
            while True:
                try:
                    await caller.request("GET", "/ping")
                    return
                except Unavailable:
                    await asyncio.sleep(0.02)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


@pytest.fixture
async def discovery(short_dir: Path) -> AsyncIterator[Discovery]:
    daemon = Discovery(short_dir)
    await daemon.start()
    yield daemon
    daemon.kill()


@pytest.fixture
async def raw(discovery: Discovery) -> AsyncIterator[Store]:
    async with Store(discovery.address) as store:
        yield store


@pytest.fixture
async def store(raw: Store) -> ControllerStore:
    return ControllerStore(raw)


@pytest.fixture
async def host(discovery: Discovery) -> AsyncIterator[FakeHost]:
    fake = FakeHost("one", discovery.folder, discovery.address)
    async with fake.served(), fake.registered():
        yield fake


@asynccontextmanager
async def running_controller(discovery: Discovery, holder: str = "test") -> AsyncIterator[Controller]:
    """Run a controller until the block ends."""
    settings = Settings(
        keys=(KEY,),
        discoverd=discovery.address,
        port=0,
        domain=DOMAIN,
        git_address="127.0.0.1:2222",
        bind_address="127.0.0.1",
        holder=holder,
    )
    async with Store(discovery.address) as store, Services(discovery.address) as services:
        controller = Controller(settings, store, services)
        started = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            task = group.create_task(controller.run(started=started))
            async with asyncio.timeout(20):
                await started.wait()
            yield controller
            task.cancel()


@pytest.fixture
async def controller(discovery: Discovery, host: FakeHost) -> AsyncIterator[Controller]:
    async with running_controller(discovery) as running:
        yield running


@pytest.fixture
async def client(controller: Controller) -> AsyncIterator[ControllerClient]:
    async with ControllerClient(f"http://127.0.0.1:{controller.port}", KEY) as client:
        yield client


async def new_release(
    client: ControllerClient,
    app: App,
    *args: str,
    processes: dict[str, ProcessType] | None = None,
    env: dict[str, str] | None = None,
) -> Release:
    """Add a release whose web jobs run `args`."""
    layers = (Layer(digest=DIGEST, size_bytes=1),)
    artifact = await client.create_artifact(NewArtifact(kind="image", layers=layers))
    return await client.create_release(
        app.id,
        NewRelease(
            artifact_ids=(artifact.id,),
            env=env or {},
            processes=processes or {"web": ProcessType(args=args or ("serve",))},
        ),
    )


async def running_app(client: ControllerClient, host: FakeHost, count: int = 2, name: str = "example") -> App:
    """Make an app whose web jobs are up."""
    app = await client.create_app(NewApp(name=name))
    release = await new_release(client, app)
    await client.create_deployment(app.id, NewDeployment(release_id=release.id))
    await client.scale(app.id, Scale(processes={"web": count}))
    await eventually("the jobs are up", lambda: len([j for j in host.up() if j.spec.labels["app"] == app.id]) == count)
    return await client.app(app.id)
