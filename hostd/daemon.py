"""The hostd daemon: wiring only. Opens the parts of a node in order, runs them, closes them in reverse.

Started by systemd or by `hostd up`. A SIGTERM ends the daemon and leaves every job running, to be
adopted by the next one; `POST /shutdown?jobs` ends everything. If the spawner dies, another one is started
and takes over all that lives. If a task of ours fails, all parts are closed and opened again, which is the same
as a restart.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import gc
import logging
import os
import resource
import shutil
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from zlib import crc32

import msgspec

from discovery.client import Services
from discovery.types import Instance
from discovery.wire import clock, serve
from discovery.wire import logging as wire_logging
from discovery.wire.errors import AlreadyExists, Conflict, ServiceError, Unauthorized, Unavailable
from discovery.wire.version import VERSION
from hostd import config as settings_of
from hostd import metrics, remote, systemd
from hostd.admission import is_exec
from hostd.api import Api
from hostd.config import Config
from hostd.discovery_process import DiscoveryProcess, log_path
from hostd.discovery_process import beginning as discovery_beginning
from hostd.disk_watch import DiskWatch
from hostd.errors import ImageNotFound, SpawnerUnavailable, VolumeInUse
from hostd.execs import Execs
from hostd.grants import Grants
from hostd.jobs import Jobs
from hostd.lifecycle import Parts
from hostd.limits import LimitWatch
from hostd.logs import Logs
from hostd.records import Records
from hostd.registry import DiscoveryRegistry, NoRegistry
from hostd.runtime import adoption
from hostd.runtime.cgroup import CgroupStep, find_disk, open_cgroups
from hostd.runtime.disks import Disks
from hostd.runtime.files import FilesStep
from hostd.runtime.launch import Launcher, NoStore
from hostd.runtime.network import NetworkConfig, NetworkStep
from hostd.runtime.process import Listing, ProcessStep, Spawner
from hostd.runtime.seccomp import SeccompCache
from hostd.runtime.users import PROBE_ID, Users, probe
from hostd.space import Space
from hostd.store import Store
from hostd.types import (
    DiskUse,
    HostStatus,
    Image,
    ImageConfig,
    ImageUser,
    JobSpec,
    Layer,
    Pruned,
    Removed,
    Snapshot,
    Stats,
    Volume,
)
from hostd.usage import Meter
from rootfs import types as rootfs_types
from rootfs.errors import RootfsError, StoreBusy
from rootfs.removal import remove_tree

log = logging.getLogger(__name__)

HOST_SERVICE = "hostd"
HOST_PORT = 1113
"""Where hostd will answer other hosts; until then the instance's `url` is what counts."""
_HOUSEKEEPING_S = 600.0
_LOG_BYTES_MAX = 16 * 1024 * 1024
_REOPEN_FIRST_S, _REOPEN_MAX_S = 1.0, 30.0
_REVIVE_PAUSES_S = (0.0, 0.1, 0.5, 2.0)
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_PROXY_NAMES = ("http_proxy", "https_proxy", "no_proxy", "all_proxy")


def proxy_env(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the host's proxy variables, in both spellings that programs look for."""
    return {name: value for name, value in environment.items() if name.lower() in _PROXY_NAMES}


def network_config(config: Config) -> NetworkConfig:
    """Return the network step's part of the settings."""
    store = remote.address_of(config.store_address)
    return NetworkConfig(
        bridge=config.bridge,
        subnet=IPv4Network(config.subnet),
        host_ip=IPv4Address(config.host_ip or "0.0.0.0"),  # noqa: S104 — unknown only while cleaning up
        nat_name=config.nat_name,
        state_file=config.run_dir / "network.json",
        nat_backend=config.nat_backend,  # type: ignore[arg-type]  # the setting's parser allows no other
        port_low=config.port_low,
        port_high=config.port_high,
        pool_size=config.netns_pool,
        store=(IPv4Address(store[0]), store[1]) if store[1] else None,
        guarded_ports=config.guarded_ports,
    )


def to_image(image: rootfs_types.Image) -> Image:
    """Say an image of the store in hostd's words."""
    return Image(
        name=image.name,
        digest=image.digest,
        layers=tuple(
            Layer(digest=layer.digest, size_bytes=layer.size_bytes, media_type=layer.media_type)
            for layer in image.layers
        ),
        config=ImageConfig(
            entrypoint=image.config.entrypoint,
            cmd=image.config.cmd,
            env=image.config.env,
            working_dir=image.config.working_dir,
            user=image.config.user,
            volumes=image.config.volumes,
            exposed_ports=image.config.exposed_ports,
            stop_signal=image.config.stop_signal,
            labels=image.config.labels,
        ),
        reference=image.reference,
    )


class Node:
    """The parts of this node, open."""

    def __init__(self, config: Config, parts: Opened, group: asyncio.TaskGroup) -> None:
        self.config = config
        self._store = parts.store
        self.records = parts.records
        self.spawner = parts.spawner
        self.network = parts.network
        self.files = parts.files
        self.cgroups = parts.cgroups
        self.registry = parts.registry
        self.services = parts.services
        self._grants = parts.grants
        self.discovery = DiscoveryProcess(config, parts.spawner) if config.has_discovery else None
        self._counts = metrics.Counts()
        self._meter = Meter(
            cgroups=parts.cgroups,
            limits=parts.limits,
            logs=parts.logs,
            disks=parts.files,
            network=parts.network,
            networks_wanted=config.netns_pool,
            state_dir=config.state_dir,
            spawner_pid=lambda: parts.spawner.pid,  # another one after it was killed
        )
        self.is_ready = False
        self._shutdown: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self.users = Users(run_dir=str(config.run_dir), start=crc32(str(config.state_dir).encode()))
        self._process = ProcessStep(parts.spawner)
        launcher = Launcher(
            cgroups=parts.cgroups,
            network=parts.network,
            files=parts.files,
            process=self._process,
            users=self.users,
            seccomp=SeccompCache(config.state_dir / "seccomp"),
            nameserver=config.gateway if config.has_discovery else "",
            proxy_env=proxy_env(),
            grants=parts.grants,
        )
        self._launcher = launcher
        self.disk_watch = DiskWatch(parts.files, parts.logs.say)
        self.execs = Execs(parts.spawner, parts.records, launcher.exec_request, group)
        of_a_job = Parts(
            host_id=config.host_id,
            host_ip=config.host_ip,
            records=parts.records,
            logs=parts.logs,
            registry=parts.registry,
            launcher=launcher,
            spawner=parts.spawner,
            cgroups=parts.cgroups,
            limits=parts.limits,
            disks=self.disk_watch,
            execs=self.execs,
            starts=asyncio.Semaphore(config.starts_max),
        )
        self.jobs = Jobs(of_a_job, parts.spawner, group)
        self.space = Space(config, parts.files, self.jobs)

    # what the API asks

    async def status(self) -> HostStatus:
        """Return the state of the host."""
        if not self.is_ready:
            raise Unavailable("this host is starting up", hint="try again in a moment")
        return HostStatus(
            host_id=self.config.host_id,
            version=VERSION,
            host_ip=self.config.host_ip,
            subnet=self.config.subnet,
            bridge=self.config.bridge,
            nat_backend=self.network.backend,
            cgroup_version=self.cgroups.version,
            jobs_running=len(self.records.active()),
            discovery=f"unix://{self.config.discovery_socket}" if self.discovery else "",
            gateway=self.config.gateway,
            run_dir=str(self.config.run_dir),
            features=self._features(),
            sysctls=self.network.sysctls(),
        )

    def _features(self) -> dict[str, str]:
        missing = ", ".join(self.cgroups.missing)
        found = {
            "cgroup controllers missing": missing or "none",
            "user namespaces": str(self.users.support),
            "temp disks": _of_temp_disks(self.files.disks),
            "spawner": f"pid {self.spawner.pid}",
            "spawner's children": self.spawner.kind_of_children,
        }
        if self.discovery is not None:
            found["discovery"] = f"pid {self.discovery.pid}" if self.discovery.pid else "not running"
            if self.discovery.pid and not self.discovery.is_as_wanted():
                found["discovery"] += ", with other settings than hostd's: `kill` it, and it comes back with these"
        found["store for jobs"] = self.config.store_url or "no"
        return found

    async def images(self) -> list[Image]:
        """Return the images of the store."""
        return [to_image(image) for image in await asyncio.to_thread(self.files.images.images)]

    async def image(self, name: str) -> Image:
        """Return one image."""
        try:
            return to_image(await asyncio.to_thread(self.files.images.image, name))
        except RootfsError as error:
            raise ImageNotFound(
                f"no image {name[:80]!r}", hint="`hostd image list` shows them, `hostd image build` makes them"
            ) from error

    async def image_user(self, name: str, user: str) -> ImageUser:
        """Return whom a name means in an image (empty: the image's own `User`)."""
        image = await self.image(name)
        return await self.files.user_in(image.layers, user or image.config.user or "0")

    async def remove_image(self, name: str) -> None:
        """Forget an image that no job uses."""
        image = await self.image(name)
        digests = [layer.digest for layer in image.layers]
        for record in self.records.active():
            spec = record.job.spec
            if [layer.digest for layer in spec.layers[: len(digests)]] == digests:
                raise Conflict(f"image {image.name} is in use by {spec.id}", hint="stop that job first")
        await asyncio.to_thread(self.files.images.remove_image, image.name)

    async def prune_images(self) -> Pruned:
        """Remove what no image and no job needs."""
        digests = {layer.digest for record in self.records for layer in record.job.spec.layers}
        try:
            freed_bytes = await asyncio.to_thread(self.files.images.collect, digests)
        except StoreBusy as error:
            raise Conflict(str(error), hint=error.hint) from error
        return Pruned(freed_bytes=freed_bytes, layers=await self.files.collect(digests))

    def volumes(self) -> list[Volume]:
        """Return the volumes."""
        store = self.files.volumes
        return [Volume(name=name, path=str(store.place(name)), used_by=store.users(name)) for name in store.names()]

    async def remove_volume(self, name: str) -> None:
        """Delete a volume that no job uses."""
        await asyncio.to_thread(self.files.volumes.remove, name)

    async def snapshots(self, name: str) -> list[Snapshot]:
        """Return the snapshots of a volume, or of all."""
        return list(await asyncio.to_thread(self.files.volumes.snapshots, name))

    async def snapshot(self, name: str, snapshot: str, *, may_freeze: bool) -> Snapshot:
        """Copy a volume; jobs that write to it are held still meanwhile, if that is allowed."""
        users = self.files.volumes.users(name)
        if users and not may_freeze:
            raise VolumeInUse(
                f"volume {name} is in use by {', '.join(users)}",
                hint="stop these jobs, or have them held still while it is copied: --freeze",
            )
        try:
            for job_id in users:
                await self.cgroups.freeze(job_id)
            copying = asyncio.get_running_loop().run_in_executor(None, self.files.volumes.snapshot, name, snapshot)
            await asyncio.wait({copying})
            made = copying.result()
        finally:
            for job_id in users:
                self.cgroups.thaw(job_id)
        return msgspec.structs.replace(made, frozen=users)

    async def restore(self, name: str, snapshot: str) -> None:
        """Make a volume that no job uses what it was."""
        await asyncio.to_thread(self.files.volumes.restore, name, snapshot)

    async def remove_snapshot(self, name: str, snapshot: str) -> None:
        """Delete a snapshot."""
        await asyncio.to_thread(self.files.volumes.remove_snapshot, name, snapshot)

    async def stats(self, *, has_pressure: bool) -> Stats:
        """Measure the machine and every living job."""
        return await self._meter.stats(self.records.active(), has_pressure=has_pressure)

    async def metrics(self) -> str:
        """Say the same, and what has happened so far, in Prometheus' text format."""
        return metrics.text(await self.stats(has_pressure=True), self._counts)

    async def df(self, *, has_volumes: bool) -> list[DiskUse]:
        """Measure what takes the disk, by kind, or each volume and snapshot."""
        return await (self.space.df_volumes() if has_volumes else self.space.df())

    async def gc(self, *, is_dry_run: bool, is_pressed: bool) -> list[Removed]:
        """Remove what nobody needs."""
        return await self.space.gc(is_dry_run=is_dry_run, is_pressed=is_pressed)

    def shut_down(self, *, has_jobs: bool) -> None:
        """Begin to shut down."""
        if not self._shutdown.done():
            self._shutdown.set_result(has_jobs)

    # its life

    async def open(self) -> None:
        """Make the kernel, the records and the spawner agree, and begin to serve."""
        await self.jobs.find_living({child.id for child in (await self.spawner.listing()).children})
        listing = await self.spawner.listing()
        places = self.jobs.places({child.id for child in listing.children})
        await self.network.prepare()
        await self.network.reconcile({job_id: network for job_id, (network, _) in places.items()})
        await self.files.open()
        for child in listing.children:
            if is_exec(child.id):
                continue
            if not child.job_id and child.id != PROBE_ID:
                self.users.ranges.hold(child.id, child.uid_base)
            self.cgroups.thaw(child.id)  # a hostd that was killed while it copied a volume
            if child.id in self.records and child.state != "exited":
                note = self._launcher.noted(child.id)
                device = "" if note is None else note.device
                self.files.adopt(self.records.get(child.id).job.spec, child.pid, device)
        for record in self.records.active():
            self.users.ranges.hold(record.job.spec.id, record.uid_base)
        granted = os.path.realpath(self.config.api_socket.parent)
        self.users.support = await probe(self.files, self._process, granted)
        if self.discovery is not None:
            self.discovery.adopt(listing)
        host = Instance(
            id=self.config.host_id,
            service=HOST_SERVICE,
            host=self.config.host_ip,
            port=HOST_PORT,
            meta={"url": f"unix://{self.config.api_socket}", "version": VERSION},
        )
        self.registry.want(host)
        await self.execs.open(listing)
        boot_id = _BOOT_ID.read_text().strip()
        old_boot_id = await self._store.fact("boot_id", boot_id)
        await self.jobs.open(listing, self.leftovers(), is_new_boot=boot_id != old_boot_id)
        await self._store.save(facts={"boot_id": boot_id}, is_patient=True)
        self.is_ready = True

    def leftovers(self) -> Iterable[str]:
        """Return the ids that have something in the kernel or on disk and are no living job's."""
        active = {record.job.spec.id for record in self.records.active()}
        return [*(set(self.cgroups.list()) - active), *self.files.orphans(active)]

    async def run(self, group: asyncio.TaskGroup) -> bool:
        """Start the node's own tasks; return when it has to shut down, and whether the jobs go, too."""
        group.create_task(self._pass_on_exits())
        group.create_task(self._counts.follow(self.records))
        group.create_task(self.network.run())
        group.create_task(self._keep_house())
        group.create_task(self.space.run())
        group.create_task(self._warm_up())
        group.create_task(self.disk_watch.run(self._running))
        group.create_task(self.jobs.sweep(self.leftovers))
        if self.discovery is not None:
            group.create_task(self.discovery.run())
        if self.config.discovery_api and not self.config.api_listen:  # else `remote.listen` keeps it
            group.create_task(remote.keep_certificate(self.config))
        if isinstance(self._grants, Grants):
            group.create_task(self._grants.run(lambda: {spec.id for spec in self._running() if spec.store_prefixes}))
        if isinstance(self.registry, DiscoveryRegistry) and self.services is not None:
            group.create_task(self.registry.run())
            group.create_task(self._follow_members(self.services))
        return await self._shutdown

    def _running(self) -> list[JobSpec]:
        return [record.job.spec for record in self.records.active()]

    async def _pass_on_exits(self) -> None:
        self.spawner.has_keeper = True
        while True:
            try:
                async for exited in self.spawner.exits():
                    if self.discovery is not None:
                        self.discovery.on_exit(exited)
                    self.execs.on_exit(exited)
                    self.jobs.on_exit(exited)
            except SpawnerUnavailable:
                await self._revive_spawner()

    async def _revive_spawner(self) -> None:
        """Have a new spawner go on where the one that died left off.

        Raises:
            SpawnerUnavailable: it cannot be done; opening everything again is the last resort.
        """
        self.network.forget_pool()
        log.warning("the spawner %d died; what it started lives on and gets a new one", self.spawner.pid)
        for pause_s in _REVIVE_PAUSES_S:
            await asyncio.sleep(pause_s)
            try:
                await self.spawner.reopen(self.jobs.belongings)
                break
            except SpawnerUnavailable as error:
                log.error("no new spawner: %s", error.message)
        else:
            raise SpawnerUnavailable("the spawner died, and none can be started in its place")
        await self.network.reconcile({})
        log.warning("the spawner is %d now", self.spawner.pid)

    async def _follow_members(self, services: Services) -> None:
        """Let the other hosts through our firewall."""
        members: dict[str, str] = {self.config.host_id: self.config.host_ip}
        async for event in services.watch(HOST_SERVICE):
            if event.instance is not None and event.kind == "down":
                members.pop(event.instance.id, None)
            elif event.instance is not None:
                members[event.instance.id] = event.instance.host
            members[self.config.host_id] = self.config.host_ip
            if event.kind == "current" or event.instance is not None:
                await self.network.set_members({IPv4Address(address) for address in members.values()})

    async def _warm_up(self) -> None:
        try:
            await self.files.warm()
        except ServiceError as error:  # a job that needs the layer will say so, too
            log.warning("images are not unpacked ahead of their first job: %s", error.message)

    async def _keep_house(self) -> None:
        while True:
            await asyncio.sleep(_HOUSEKEEPING_S)
            for path in (log_path(self.config), self.config.daemon_log):
                bound_log(path)

    async def end_all(self) -> None:
        """End every job, then discovery, then the spawner, and remove what we made in the kernel."""
        await self.jobs.stop_all()
        if isinstance(self.registry, DiscoveryRegistry):
            await self.registry.leave()
        if self.discovery is not None:
            await self.discovery.stop()


def bound_log(path: Path) -> None:
    """Begin a log file anew when it is too large; the old content stays beside it as `.1`."""
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_size > _LOG_BYTES_MAX:
            shutil.copyfile(path, path.with_name(path.name + ".1"))
            os.truncate(path, 0)  # its writers append, so they go on at the new end


async def remove_leftovers(config: Config) -> None:
    """Remove everything of this node but its data, from what is found by name; hostd itself must not be running."""
    from hostd.runtime.network import remove_leftovers as remove_network

    try:
        spawner = await Spawner.open(config.run_dir, may_start=False)
    except ServiceError:
        spawner = None
    if spawner is not None:
        await spawner.quit(kill_all=True)
    await asyncio.to_thread(_kill_orphans, config)
    await open_cgroups(config.cgroup_parent).teardown()
    await remove_network(network_config(config))
    for path in (config.state_dir / "jobs").glob("*"):
        remove_tree(path, lambda name, error: log.warning("cannot remove %s: %s", name, error))
    remove_run_dirs(config)


def _kill_orphans(config: Config) -> None:
    """Kill what a spawner that died left running outside of the jobs' cgroups."""
    adoption.kill_stragglers(config.run_dir)
    while living := adoption.find_command(discovery_beginning(config)):
        adoption.kill(living)


class Namespaces:
    """The spawner as the network step wants it."""

    def __init__(self, spawner: Spawner) -> None:
        self._spawner = spawner

    async def create_netns(self, name: str, uid_base: int = 0) -> tuple[int, int]:
        """Make a namespace; return its fd and that of a netlink socket inside."""
        made = await self._spawner.create_netns(name, uid_base)
        return made.netns_fd, made.netlink_fd

    async def drop_netns(self, name: str) -> None:
        """Forget a namespace."""
        await self._spawner.drop_netns(name)

    async def list(self) -> Listing:
        """Say what is held."""
        return await self._spawner.listing()


@dataclass(frozen=True, kw_only=True)
class Opened:
    """The parts of a node that hold something open."""

    store: Store
    records: Records
    logs: Logs
    spawner: Spawner
    network: NetworkStep
    files: FilesStep
    cgroups: CgroupStep
    limits: LimitWatch
    registry: DiscoveryRegistry | NoRegistry
    services: Services | None
    grants: Grants | NoStore


@contextlib.asynccontextmanager
async def open_parts(config: Config) -> AsyncIterator[Opened]:
    """Open the parts; closing them leaves the jobs running."""
    async with contextlib.AsyncExitStack() as stack:
        store = Store(config.database)
        await store.open()
        stack.push_async_callback(store.close)
        records = Records(store)
        await records.load()
        logs = Logs(config.logs_dir, segment_bytes=config.log_segment_bytes)
        stack.callback(logs.close)
        spawner = await Spawner.open(config.run_dir)
        stack.push_async_callback(spawner.close)
        network = NetworkStep(network_config(config), Namespaces(spawner))
        stack.push_async_callback(network.close)
        services: Services | None = None
        registry: DiscoveryRegistry | NoRegistry = NoRegistry()
        if config.has_discovery:
            services = Services(f"unix://{config.discovery_socket}")
            stack.push_async_callback(services.close)
            registry = await _open_registry(config, store)
            stack.push_async_callback(registry.close)
        grants = Grants(config) if config.store_url else NoStore()
        if isinstance(grants, Grants):
            stack.push_async_callback(grants.close)
        files = FilesStep(config.state_dir, resolve=_resolver(services), disk_pool=config.temp_disk_pool)
        stack.push_async_callback(files.close)
        cgroups = open_cgroups(config.cgroup_parent, device=find_disk(config.state_dir))
        limits = LimitWatch(cgroups)
        stack.callback(limits.close)
        yield Opened(
            store=store,
            records=records,
            logs=logs,
            spawner=spawner,
            network=network,
            files=files,
            cgroups=cgroups,
            limits=limits,
            registry=registry,
            services=services,
            grants=grants,
        )


async def _open_registry(config: Config, store: Store) -> DiscoveryRegistry:
    async def save_lease(lease: int) -> None:
        await store.save(facts={"lease": str(lease)}, is_patient=True)

    old_lease = int(await store.fact("lease", "0"))
    return DiscoveryRegistry(f"unix://{config.discovery_socket}", old_lease=old_lease, save_lease=save_lease)


def _resolver(services: Services | None) -> Callable[[str], Awaitable[list[tuple[str, int]]]]:
    async def resolve(service: str) -> list[tuple[str, int]]:
        if services is None:
            return []
        return [(instance.host, instance.port) for instance in await services.instances(service)]

    return resolve


class _Done(Exception):
    """The way out of a task group whose tasks run for ever."""


async def serve_node(config: Config, stop: asyncio.Event, on_ready: Callable[[], None]) -> bool:
    """Open the node and serve until told to end; return whether the jobs were ended, too.

    Raises:
        ServiceError, OSError: the node cannot be opened.
        ExceptionGroup: something failed later.
    """
    has_jobs = False
    async with open_parts(config) as parts:
        try:
            async with asyncio.TaskGroup() as group:
                node = Node(config, parts, group)
                make_app = Api(node.jobs, node.execs, node).application
                async with contextlib.AsyncExitStack() as doors:
                    await doors.enter_async_context(serve.listen_unix(make_app(), config.api_socket))
                    await doors.enter_async_context(remote.listen(config, make_app))
                    await node.open()
                    on_ready()
                    group.create_task(_stop_when_told(node, stop))
                    has_jobs = await node.run(group)
                    if has_jobs:
                        await node.end_all()
                raise _Done
        except* _Done:
            pass
        if has_jobs:
            await parts.network.teardown()
            await parts.cgroups.teardown()
            await parts.spawner.quit(kill_all=True)
    return has_jobs


async def _stop_when_told(node: Node, stop: asyncio.Event) -> None:
    await stop.wait()
    node.shut_down(has_jobs=False)


async def run(config: Config) -> None:
    """Serve until a signal or a request ends the daemon; what fails on the way is opened again.

    Raises:
        ServiceError, OSError: the node could not be opened the first time.
    """
    stop, ready, service = asyncio.Event(), asyncio.Event(), systemd.Teller()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)

    def on_ready() -> None:
        gc.collect()
        gc.freeze()
        ready.set()
        log.info("ready: host %s at %s, API on %s", config.host_id, config.host_ip, config.api_socket)
        service.tell(systemd.READY)

    pause_s = _REOPEN_FIRST_S
    while True:
        began = clock.monotonic_s()
        try:
            if await serve_node(config, stop, on_ready):
                remove_run_dirs(config)
            service.tell(systemd.STOPPING)
            return
        except Exception as error:
            if not ready.is_set():
                raise first_of(error) from error
            log.exception("a part of hostd failed; opening everything again in %g s", pause_s)
        if stop.is_set():
            return
        await asyncio.sleep(pause_s)
        was_calm = clock.monotonic_s() - began > _REOPEN_MAX_S * 2
        pause_s = _REOPEN_FIRST_S if was_calm else min(pause_s * 2, _REOPEN_MAX_S)


def first_of(error: BaseException) -> BaseException:
    """Return the innermost first error of nested groups."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def make_dirs(config: Config) -> None:
    """Make the directories that only root may enter.

    Those that a job may be granted lie on the disk of the state directory, with a link from where everybody looks for
    them: what jobs see of the host they see through an idmapped mount, and a tmpfs can be one only since Linux 6.3.
    One that a hostd before this made in the run directory itself stays until the next boot: jobs hold it.
    """
    for path in (config.state_dir, config.run_dir, granted_dirs(config)):
        path.mkdir(parents=True, exist_ok=True)
        path.chmod(0o700)
    for link in (config.api_socket.parent, config.discovery_socket.parent):
        place = granted_dirs(config) / link.name
        place.mkdir(mode=0o700, exist_ok=True)
        if link.is_symlink() and link.readlink() != place:
            link.unlink()
        with contextlib.suppress(FileExistsError):
            link.symlink_to(place)


def granted_dirs(config: Config) -> Path:
    """Return where the directories are whose sockets jobs may be granted."""
    return config.state_dir / "run"


def remove_run_dirs(config: Config) -> None:
    """Remove what lives only as long as this node is up; nothing there is fine."""
    for path in (config.run_dir, granted_dirs(config)):
        remove_tree(path, lambda name, error: log.warning("cannot remove %s: %s", name, error))


@contextlib.contextmanager
def locked(config: Config) -> Iterator[None]:
    """Hold this node's lock: one hostd for one state directory.

    Raises:
        AlreadyExists: another hostd has it.
    """
    with (config.state_dir / "hostd.lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            raise AlreadyExists(
                f"hostd is already running for {config.state_dir} (pid {owner})", hint="hostd status"
            ) from None
        file.truncate(0)
        with contextlib.suppress(OSError):  # a full disk: the lock is what counts
            file.write(f"{os.getpid()}\n")
            file.flush()
        config.pid_file.write_text(f"{os.getpid()}\n")
        try:
            yield
        finally:
            file.truncate(0)
            config.pid_file.unlink(missing_ok=True)


def _of_temp_disks(disks: Disks) -> str:
    if disks.refusal:
        return f"not bounded: {disks.refusal}"
    if disks.direct_refusal:
        return f"ext4 on loop, all in the host's page cache: {disks.direct_refusal}"
    return "ext4 on loop, direct when written much"


def main(config: Config) -> int:
    """Run the daemon; return its exit status."""
    wire_logging.configure()
    os.umask(0o077)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # a job costs half a dozen
    if os.geteuid() != 0:
        raise Unauthorized("hostd has to run as root", hint="sudo hostd up")
    make_dirs(config)
    with locked(config):
        asyncio.run(run(settings_of.with_host_ip(config)))
    return 0
