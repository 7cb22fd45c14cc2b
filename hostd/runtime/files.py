"""The files step of a launch: layers present, volumes there, an own upper directory, and the plan of mounts.

Refuses names that lead out of the state directory and mounts of paths that are not there. Mounts nothing:
the plan is carried out by the spawner's child in the job's own namespace, so `undo` only removes
`jobs/<id>` and may be called at any time after the job's last process is gone, twice, or without `apply`.
It gives the directory another name at once and empties it in the background, one job after the other; what a crash
cuts short the next `open` removes, by that name.
Called by `hostd.runtime.launch` and, for reconciling, by the daemon.

What is the same for all jobs of this host (its CA bundle, the init, mount points that a foreign image may
lack) is one more read-only layer on top, made once; what is the job's own (resolv.conf, hosts, hostname) is
written straight into its upper directory. Both save mounts, which are what a start spends its time on.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import ipaddress
import logging
import os
import re
import secrets
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from discovery.wire.errors import Unavailable
from hostd.errors import HostFull, ImageNotFound, InvalidSpec, LaunchFailed
from hostd.runtime import init, secret_files
from hostd.runtime.disks import POOL_SIZE, ROOT, SECRETS, UPPER, WORK, Disk, Disks, DiskUsage
from hostd.types import BindMount, ImageUser, JobSpec, Layer, Resources, parse_job_id
from hostd.volumes import Volumes, check_volume_name
from rootfs import mounts
from rootfs.artifacts import Artifacts, Resolve
from rootfs.errors import (
    BlobMissing,
    DiskFull,
    FetchFailed,
    ImageMissing,
    NameInvalid,
    RootfsError,
)
from rootfs.layers import Layers
from rootfs.mounts import Bind, Step
from rootfs.passwd import find_user
from rootfs.removal import remove_tree
from rootfs.store import Store
from rootfs.types import hex_of

_HOSTNAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,62})?")
_GONE = ".gone-"
_NOTE = "launch.json"
_HOST_DIRS = ("proc", "sys", "dev", ".hostd", "etc", "etc/ssl", "etc/ssl/certs")
_CA_BUNDLE = "etc/ssl/certs/ca-certificates.crt"
_log = logging.getLogger(__name__)


class FilesState(msgspec.Struct, frozen=True, kw_only=True):
    """What the process step needs: the mount point `root` (a directory of the host) and the `plan` for it.

    `writable` is where this process finds `upper` and `work`; `device` is `MAJOR:MINOR` of the job's own disk, if it
    has one: its io limits have to be set for it, too.
    """

    root: str
    plan: tuple[Step, ...]
    writable: str = ""
    device: str = ""


class FilesStep:
    """Owns `layers`, `downloads`, `host`, `jobs`, `volumes`, `snapshots` of a state directory; reads `images`."""

    def __init__(
        self,
        state_dir: Path,
        *,
        resolve: Resolve | None = None,
        init_path: Path | None = None,
        ca_bundle: Path = Path("/etc/ssl/certs/ca-certificates.crt"),
        disk_pool: int = POOL_SIZE,
    ) -> None:
        """Begin nothing yet; `init_path` is for tests, a program in the place of the usual init."""
        self.images = Store(state_dir / "images")
        self.layers = Layers(state_dir / "layers")
        self._downloads = Store(state_dir / "downloads")
        self._artifacts = Artifacts(self._downloads, resolve=resolve)
        self._state_dir = state_dir
        self._jobs = state_dir / "jobs"
        self.volumes = Volumes(state_dir)
        self._init_path = init_path
        self._ca_bundle = ca_bundle
        self._host_layer = Path()
        self._own_mounts: list[str] = []
        self._kernel = mounts.probe()
        self._in_use: dict[str, tuple[str, ...]] = {}
        self.disks = Disks(state_dir, size_bytes=Resources().temp_disk_bytes, pool_size=disk_pool)
        self._held: dict[str, Disk] = {}
        self._secrets: dict[str, int] = {}
        self._closing: deque[Disk] = deque()
        self._removals = ThreadPoolExecutor(1, thread_name_prefix="hostd-removal")

    async def open(self) -> None:
        """Make the directories, throw away what a crash left half done.

        Raises:
            Unavailable: there is no init to start jobs with.
        """
        await asyncio.to_thread(self._open)

    def _open(self) -> None:
        self._jobs.mkdir(parents=True, exist_ok=True)
        self.volumes.open()
        for path in self._jobs.glob(_GONE + "*"):
            remove_tree(path, _log_removal)
        if self._downloads.path.exists():
            remove_tree(self._downloads.path)
        self.layers.open()
        self.disks.open()
        self._host_layer = _make_host_layer(self._state_dir / "host", self._init_path, self._ca_bundle)
        parts = (self.layers.path, self._host_layer.parent, self._jobs, self.volumes.path)
        self._own_mounts = [str(self._state_dir), *(str(path) for path in parts if path.is_mount())]

    async def apply(
        self,
        spec: JobSpec,
        *,
        hostname: str,
        nameserver: str = "",
        ip: str = "",
        uid_base: int = 0,
        cgroups: Mapping[str, str] | None = None,
    ) -> FilesState:
        """Make the job's directories and return its plan; `nameserver=""` copies the host's resolv.conf.

        `uid_base` is what the host calls the job's uid 0; on disk everything is owned as the job sees it. `cgroups` are
        the job's own, by controller, to be seen at /sys/fs/cgroup.
        Fetches and unpacks layers that are missing, which takes seconds; otherwise well under a millisecond's work.

        Raises:
            InvalidSpec: a name, path or mount source that cannot be.
            ImageNotFound: a layer that is nowhere. Unavailable: it cannot be fetched now. HostFull: no disk left.
            LaunchFailed: a layer is not what it should be.
        """
        check_spec(spec)
        with _told():
            self._in_use[spec.id] = tuple(layer.digest for layer in spec.layers)
            self.volumes.hold(spec.id, spec.volumes)
            lower = await self._lower(spec.layers)
            etc = _EtcFiles.of(hostname, nameserver, ip)
            if not self.disks.refusal:
                self._hold(spec.id, await self.disks.take(spec.resources.temp_disk_bytes))
            if spec.volumes or spec.mounts or (self._jobs / spec.id).exists():  # a disk to sync, paths of strangers
                return await asyncio.to_thread(self._prepare, spec, lower, etc, uid_base, cgroups)
            # a few names on the disk: less than it takes to wake a thread
            return self._prepare(spec, lower, etc, uid_base, cgroups)

    async def _lower(self, layers: tuple[Layer, ...]) -> list[Path]:
        missing = {layer.digest: layer for layer in layers if not self.layers.has(layer.digest)}
        try:
            async with asyncio.TaskGroup() as group:
                for layer in missing.values():
                    group.create_task(self._ensure(layer))
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None
        for layer in layers:
            self.layers.touch(layer.digest)
        return [self.layers.path_of(layer.digest) for layer in layers]

    async def _ensure(self, layer: Layer) -> None:
        async def get_blob() -> Path:
            if self.images.has_blob(layer.digest):
                return self.images.blob(layer.digest)
            if not layer.url:
                raise BlobMissing(
                    f"layer {layer.digest} is not on this host and has no URL",
                    hint="`hostd image list` shows what there is, `hostd image build` builds the images",
                )
            return await self._artifacts.fetch(layer.url, layer.digest, layer.size_bytes)

        try:
            await self.layers.ensure(layer.digest, get_blob)
        finally:
            self._downloads.remove_blob(layer.digest)

    async def user_in(self, layers: tuple[Layer, ...], text: str) -> ImageUser:
        """Return whom `USER[:GROUP]` means in an image; its layers are unpacked first if they are not.

        Raises:
            InvalidSpec: the image knows nobody of that name. As `apply`, for layers.
        """
        with _told():
            found = await asyncio.to_thread(find_user, await self._lower(layers), text)
        return ImageUser(uid=found.uid, gid=found.gid, home=found.home)

    async def warm(self) -> None:
        """Unpack the layers of all stored images, small images first, so that no first job has to wait for them.

        Raises:
            HostFull, LaunchFailed: as `apply`.
        """
        with _told():
            images = await asyncio.to_thread(self.images.images)
            for image in sorted(images, key=lambda image: sum(layer.size_bytes for layer in image.layers)):
                for layer in image.layers:
                    await self._ensure(Layer(digest=layer.digest, size_bytes=layer.size_bytes))

    async def trial(self, job_id: str, *, uid_base: int, bind: str) -> FilesState:
        """Prepare a root that holds nothing but the init, and a directory of the host if `bind` names one."""
        binds = (BindMount(source=bind, path="/bound"),) if bind else ()
        spec = JobSpec(id=job_id, layers=(), args=(), mounts=binds)
        etc = _EtcFiles.of(job_id, "127.0.0.1", "")
        return await asyncio.to_thread(self._prepare, spec, [], etc, uid_base, None)

    def _prepare(
        self, spec: JobSpec, lower: list[Path], etc: _EtcFiles, uid_base: int, cgroups: Mapping[str, str] | None
    ) -> FilesState:
        job = self._jobs / spec.id
        if job.exists():
            self._discard(spec.id)  # an attempt that a crash cut short
        secrets_place = str(job / SECRETS)
        binds = [*self._binds(spec), *secret_files.binds(spec.secrets, secrets_place)]
        disk = self._held.get(spec.id)
        attached = [] if disk is None else [(disk.source, str(job), True)]
        if spec.secrets:
            fd = self._secrets[spec.id] = secret_files.make(spec.secrets, uid_base)
            attached.append((f"/proc/{os.getpid()}/fd/{fd}", secrets_place, False))
        steps = mounts.plan(
            lower=[*lower, self._host_layer],
            upper=job / UPPER,
            work=job / WORK,
            kernel=self._kernel,
            binds=binds,
            cgroups=cgroups,
            uid_base=uid_base,
            idmaps=self._idmaps(binds) if uid_base else (),
            shm_bytes=spec.resources.shm_bytes,
            attached=attached,
        )
        if spec.working_dir != "/":
            steps.append(("mkdir", spec.working_dir, 0o755))
        writable = job if disk is None else disk.path
        try:
            job.mkdir(mode=0o700)  # nobody inside the job passes through this, nor through `work` and `root`
            if disk is None:
                _make_dir(job / UPPER)
                for name in (WORK, ROOT, SECRETS):
                    (job / name).mkdir(mode=0o700)
            etc.write(writable / UPPER)
        except BaseException:
            self._discard(spec.id)
            raise
        return FilesState(
            root=str(job / ROOT),
            plan=tuple(steps),
            writable=str(writable),
            device="" if disk is None else disk.device,
        )

    def _hold(self, job_id: str, disk: Disk) -> None:
        """Keep the disk until `undo`, so that the job's last process need not wait for the unmounting."""
        self._let_go(job_id)
        self._held[job_id] = disk

    def _let_go(self, job_id: str) -> None:
        disk = self._held.pop(job_id, None)
        if disk is not None:
            self._closing.append(disk)
            asyncio.get_running_loop().call_soon(self._close_disks)  # who ends need not share the interpreter with that
        if (secrets_fd := self._secrets.pop(job_id, -1)) >= 0:
            os.close(secrets_fd)

    def _close_disks(self) -> None:
        while self._closing:
            self._removals.submit(self._closing.popleft().close)

    def adopt(self, spec: JobSpec, pid: int, device: str = "") -> None:
        """Hold disk and volumes of a job from before a restart of hostd again.

        `pid` is of one of its processes, `device` what `FilesState` said.
        """
        self.volumes.hold(spec.id, spec.volumes)
        try:
            root = os.open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:  # it has just ended
            return
        disk = Disk(root, spec.resources.temp_disk_bytes, device)
        if disk.is_own():
            self._hold(spec.id, disk)
        else:
            disk.close()

    def usage(self, job_id: str) -> DiskUsage | None:
        """Return how full the job's temp disk is; `None` if it has none of its own or has ended."""
        disk = self._held.get(job_id)
        return None if disk is None else disk.usage()

    def device(self, job_id: str) -> str:
        """Return the device of the job's temp disk, as `MAJOR:MINOR`; nothing if there is none, or nobody knows it."""
        disk = self._held.get(job_id)
        return "" if disk is None else disk.device

    def go_direct(self, job_id: str) -> None:
        """Have the job's temp disk written past the host's page cache; blocking, for as long as writing that takes."""
        disk = self._held.get(job_id)
        if disk is not None and not self.disks.direct_refusal:
            try:
                disk.go_direct()
            except OSError as error:
                _log.warning("the temp disk of job %s stays in the page cache: %s", job_id, error)

    def _binds(self, spec: JobSpec) -> list[Bind]:
        binds = [
            Bind(source=str(self.volumes.ensure(each.name)), target=each.path, is_read_only=each.is_read_only)
            for each in spec.volumes
        ]
        for each in spec.mounts:
            source = Path(each.source)
            if not source.exists():
                raise InvalidSpec(f"mount source {each.source} is not there", hint="mounts never make their source")
            is_file = not source.is_dir()
            # by its own name: only what is seen to lie in the state directory is mapped together with it
            place = os.path.realpath(source)
            binds.append(Bind(source=place, target=each.path, is_read_only=each.is_read_only, is_file=is_file))
        return binds

    def _idmaps(self, binds: list[Bind]) -> list[str]:
        """Say which paths to map: our directory, what else is mounted in it, and what a bind takes from elsewhere."""
        ours = (f"{self._state_dir}/", f"{os.path.realpath(self._state_dir)}/")
        of_binds = {bind.source for bind in binds if not bind.source.startswith(ours) or os.path.ismount(bind.source)}
        return [*self._own_mounts, *sorted(of_binds - {*self._own_mounts})]

    def note(self, job_id: str, content: bytes) -> str:
        """Write down about a job that is prepared what a hostd killed in this moment would not know; return the path.

        It lives as long as the job's other files; no power cut has to be survived, for no job survives one.
        """
        path = str(self._jobs / job_id / _NOTE)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, content)
        finally:
            os.close(fd)
        return path

    def noted(self, job_id: str) -> bytes:
        """Return what was noted, nothing if nothing was."""
        try:
            return (self._jobs / parse_job_id(job_id) / _NOTE).read_bytes()
        except OSError:
            return b""

    async def undo(self, job_id: str) -> None:
        """Remove `jobs/<id>`; nothing happens if it is not there."""
        self._in_use.pop(parse_job_id(job_id), None)
        self.volumes.let_go(job_id)
        self._let_go(job_id)
        if not self._rename(job_id):
            await asyncio.to_thread(remove_tree, self._jobs / job_id, _log_removal)

    def _discard(self, job_id: str) -> None:
        if not self._rename(job_id):
            remove_tree(self._jobs / job_id, _log_removal)

    def _rename(self, job_id: str) -> bool:
        """Free the job's name, its files go in the background; False if they have to go in their place."""
        with suppress(OSError):
            (self._jobs / job_id / _NOTE).unlink(missing_ok=True)
            (self._jobs / job_id).rmdir()  # all that a job with a disk has here
            return True
        gone = self._jobs / f"{_GONE}{secrets.token_hex(6)}"
        try:
            (self._jobs / job_id).rename(gone)
        except FileNotFoundError:
            return True
        except OSError:  # a directory without room for one more name: the disk is full
            return False
        self._removals.submit(remove_tree, gone, _log_removal)
        return True

    def orphans(self, known: Iterable[str]) -> tuple[str, ...]:
        """Return the ids that have a directory here and are not in `known`."""
        ids = set(known)
        found = (path.name for path in self._jobs.iterdir() if not path.name.startswith("."))
        return tuple(sorted(name for name in found if name not in ids))

    def in_use(self) -> set[str]:
        """Return the layers of all jobs that this hostd has started, until they are undone."""
        return {digest for digests in self._in_use.values() for digest in digests}

    async def collect(self, keep: Iterable[str]) -> int:
        """Remove unpacked layers, of any age, that are neither in `keep` nor part of a stored image; return how many.

        `keep` has to name the layers of all jobs that live, also those from before a restart.
        """
        wanted = set(keep)
        for image in await asyncio.to_thread(self.images.images):
            wanted.update(layer.digest for layer in image.layers)
        return await self.layers.collect(wanted | self.in_use())

    async def close(self) -> None:
        """Wait for the background threads, so that nothing of ended jobs is left."""
        for job_id in {*self._held, *self._secrets}:
            self._let_go(job_id)
        self._close_disks()
        await asyncio.to_thread(self._removals.shutdown)
        await asyncio.to_thread(self.disks.close)
        await asyncio.to_thread(self.layers.close)


class _EtcFiles(msgspec.Struct, frozen=True):
    """The files under `/etc` that are the job's own."""

    hostname: str
    hosts: str
    resolv_conf: str

    @classmethod
    def of(cls, hostname: str, nameserver: str, ip: str) -> _EtcFiles:
        if not _HOSTNAME.fullmatch(hostname):
            raise InvalidSpec(f"hostname {hostname[:80]!r}", hint="1 to 63 letters, digits, dots and dashes")
        own = ipaddress.ip_address(ip) if ip else "127.0.1.1"
        if nameserver:
            resolv_conf = f"nameserver {ipaddress.ip_address(nameserver)}\n"
        else:
            path = Path("/etc/resolv.conf")
            resolv_conf = path.read_text() if path.exists() else ""
        hosts = f"127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n{own}\t{hostname}\n"
        return cls(hostname + "\n", hosts, resolv_conf)

    def write(self, upper: Path) -> None:
        etc = upper / "etc"
        _make_dir(etc)
        files = (("hostname", self.hostname), ("hosts", self.hosts), ("resolv.conf", self.resolv_conf))
        for name, content in files:  # as few calls as it takes: a start waits for each
            fd = os.open(etc / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC)
            try:
                os.fchmod(fd, 0o644)
                os.write(fd, content.encode())
            finally:
                os.close(fd)


def check_spec(spec: JobSpec) -> None:
    """Check every name and path of a spec that has to do with files; touches nothing.

    Raises:
        InvalidSpec: says which one, and what it should look like.
    """
    parse_job_id(spec.id)
    if not spec.layers:
        raise InvalidSpec("a job needs at least one layer")
    with _told():
        for layer in spec.layers:
            hex_of(layer.digest)
        paths = [*(volume.path for volume in spec.volumes), *(mount.path for mount in spec.mounts)]
        targets = [mounts.check_target(path) for path in paths]
        if spec.working_dir != "/":
            _check_working_dir(spec.working_dir)
    if doubled := {path for path in targets if targets.count(path) > 1}:
        raise InvalidSpec(f"two mounts at {min(doubled)}")
    for volume in spec.volumes:
        check_volume_name(volume.name)
    for mount in spec.mounts:
        if not mount.source.startswith("/") or "\0" in mount.source:
            raise InvalidSpec(f"mount source {mount.source[:100]!r}", hint="an absolute path of the host")


def _check_working_dir(path: str) -> None:
    if not path.startswith("/") or "\0" in path or ".." in path.split("/") or len(path) > 1024:
        raise NameInvalid(f"working directory {path[:100]!r}", hint="an absolute path without `..`, such as /app")


@contextmanager
def _told() -> Iterator[None]:
    """Say what rootfs refuses in hostd's own words."""
    try:
        yield
    except NameInvalid as error:
        raise InvalidSpec(str(error), hint=error.hint) from error
    except (BlobMissing, ImageMissing) as error:
        raise ImageNotFound(str(error), hint=error.hint) from error
    except FetchFailed as error:
        raise Unavailable(str(error), hint=error.hint) from error
    except DiskFull as error:
        raise HostFull(str(error), hint=error.hint) from error
    except RootfsError as error:
        raise LaunchFailed(str(error), hint=error.hint, step="files") from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise HostFull(f"no room for the job's files: {error}", hint="free some disk space") from error


def _make_host_layer(parent: Path, init_path: Path | None, ca_bundle: Path) -> Path:
    """Return the layer of this host's own files, made anew after each boot and when one of them changed.

    The ones of this boot stay, since jobs from before a restart of hostd may stand on them.
    """
    program = init.program(init_path)
    certificates = ca_bundle.read_bytes() if ca_bundle.is_file() else b""
    content = hashlib.sha256(certificates + program).hexdigest()[:16]
    boot = Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
    parent.mkdir(parents=True, exist_ok=True)
    for path in parent.iterdir():
        if not path.name.startswith(boot + "-"):
            remove_tree(path)
    target = parent / f"{boot}-{content}"
    if target.is_dir():
        return target
    staging = Path(tempfile.mkdtemp(dir=parent, prefix="new-"))
    staging.chmod(0o755)
    for name in _HOST_DIRS:
        _make_dir(staging / name)
    (staging / ".hostd/init").write_bytes(program)
    (staging / ".hostd/init").chmod(0o755)
    if certificates:
        (staging / _CA_BUNDLE).write_bytes(certificates)
        (staging / _CA_BUNDLE).chmod(0o644)
    staging.rename(target)
    return target


def _make_dir(path: Path) -> None:
    path.mkdir(exist_ok=True)
    path.chmod(0o755)  # whatever the daemon's umask: users of jobs who are not root pass through here


def _log_removal(path: str, error: OSError) -> None:
    _log.warning("cannot remove %s, the next start tries again: %s", path, error)
