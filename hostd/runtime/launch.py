"""Launch a job: the ordered list of steps, cgroup, network, files, process, each undone if a later one fails.

Called by `jobs`. It refuses a user or capability that it cannot read (`InvalidSpec`); what a step
refuses comes up as `LaunchFailed(step)`, or unchanged when the step already says what is wrong
(any other `ServiceError`, such as `PortTaken`).
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from discovery.wire.errors import Internal
from hostd.errors import InvalidSpec, JobNotFound, LaunchFailed, SpawnerUnavailable
from hostd.runtime import adoption
from hostd.runtime.adoption import Living
from hostd.runtime.cgroup import CgroupState
from hostd.runtime.connection import close_fds
from hostd.runtime.files import FilesState
from hostd.runtime.network import NetworkState
from hostd.runtime.process import JOB_NAMESPACES, Belongings, ExecRequest, ProcessStep, Spawned, SpawnRequest
from hostd.runtime.seccomp import SeccompCache
from hostd.runtime.users import Users
from hostd.types import ExecSpec, JobSpec, Port, Resources, SecretFile
from netns.syscalls import CAPABILITIES

_NOTE = msgspec.json.Encoder()
_LOG = logging.getLogger(__name__)

DEFAULT_CAPABILITIES = (
    "CHOWN DAC_OVERRIDE FOWNER FSETID KILL NET_BIND_SERVICE SETFCAP SETGID SETPCAP SETUID SYS_CHROOT"
).split()
"""What root inside a job may do. Source: `default_capabilities` of containers-common (a test compares)."""

NETWORK_CAPABILITIES = frozenset({"NET_ADMIN", "NET_RAW", "NET_BROADCAST", "SYS_ADMIN"})
"""With one of these the job's network namespace is its own, and the firewall holds it to its address."""

FORKS_AT_THE_LIMIT = 8
"""So many forks at a time get as far as being refused, and counted, by the pids limit."""
STORE_FILES = {
    "STORE_CA": "/run/secrets/store/ca.pem",
    "STORE_CERT": "/run/secrets/store/cert.pem",
    "STORE_KEY": "/run/secrets/store/key.pem",
}
"""Where a job finds its certificate for the store, by the variable that says so."""
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_USER = re.compile(r"(\d{1,9})(?::(\d{1,9}))?")


class Cgroups(Protocol):
    """The first step: `hostd.runtime.cgroup`."""

    async def apply(self, job_id: str, resources: Resources) -> CgroupState: ...
    def limit_disk(self, job_id: str, resources: Resources, device: str) -> None: ...
    def procs(self, job_id: str) -> tuple[str, ...]: ...
    async def undo(self, job_id: str) -> None: ...
    def pids(self, job_id: str) -> tuple[int, ...]: ...


class Network(Protocol):
    """The second step: `hostd.runtime.network`."""

    async def apply(
        self,
        job_id: str,
        ports: tuple[Port, ...],
        has_host_network: bool,
        *,
        reaches_metadata: bool,
        reaches_store: bool,
        has_power: bool,
        uid_base: int,
    ) -> NetworkState: ...
    async def undo(self, job_id: str) -> None: ...


class Granting(Protocol):
    """What a job gets of the store, if its spec says so, before its files are made: `hostd.grants`."""

    @property
    def url(self) -> str: ...
    async def apply(self, spec: JobSpec) -> tuple[SecretFile, ...]: ...
    async def undo(self, job_id: str) -> None: ...


class NoStore:
    """For a host whose store jobs cannot be granted."""

    url = ""

    async def apply(self, spec: JobSpec) -> tuple[SecretFile, ...]:
        """Refuse whoever asks for some of it.

        Raises:
            InvalidSpec: the spec does.
        """
        if spec.store_prefixes:
            raise InvalidSpec(
                "store_prefixes: no store listens for jobs here",
                hint="a host with a member of the store, and `discovery_listen` in its settings",
                field="store_prefixes",
            )
        return ()

    async def undo(self, job_id: str) -> None:
        return


class Files(Protocol):
    """The third step: `hostd.runtime.files`."""

    async def apply(
        self, spec: JobSpec, *, hostname: str, nameserver: str, ip: str, uid_base: int, cgroups: Mapping[str, str]
    ) -> FilesState: ...
    async def undo(self, job_id: str) -> None: ...
    def note(self, job_id: str, content: bytes) -> str: ...
    def noted(self, job_id: str) -> bytes: ...


class Note(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a job from just before its program may run until its record says so.

    The process that becomes the program adds a byte to it in the last moment, hence `has_begun`.
    """

    network: NetworkState
    uid_base: int
    device: str = ""
    has_begun: bool = False


@dataclass(frozen=True, kw_only=True)
class Launched:
    """A running job (or one that waits before exec, if the spec asks for a terminal or stdin).

    `fds` are the caller's to close. `network` is what `NetworkStep.reconcile` wants back after a restart, `uid_base`
    what `Ranges.hold` does.
    """

    job_id: str
    fds: Spawned
    network: NetworkState
    is_waiting: bool
    uid_base: int = 0

    @property
    def pid(self) -> int:
        return self.fds.pid


@dataclass(frozen=True, kw_only=True)
class Launcher:
    """The steps of this host, in order. `proxy_env` is for the jobs that ask for the host's proxy variables."""

    cgroups: Cgroups
    network: Network
    files: Files
    process: ProcessStep
    seccomp: SeccompCache
    users: Users = field(default_factory=Users)
    grants: Granting = field(default_factory=NoStore)
    nameserver: str = ""
    proxy_env: Mapping[str, str] = field(default_factory=dict)

    async def launch(self, spec: JobSpec) -> Launched:
        """Take every step; a failure undoes all.

        Raises:
            LaunchFailed: a step failed; `detail["step"]` is cgroup, network, grants, files or process. For process,
                `at` says which part of becoming the program (such as exec or working_dir), with errno and target.
            ServiceError: a step refused the spec (`InvalidSpec`, `PortTaken`, `HostFull`…), unchanged.
        """
        user_of(spec)  # what cannot be read is refused before anything is done
        capabilities = capabilities_of(spec)
        seccomp_path = str(self.seccomp.path_for(capabilities))
        async with contextlib.AsyncExitStack() as undo:
            undo.push_async_callback(_try_to, "cgroup", spec.id, self.cgroups.undo)
            with _step("cgroup"):
                cgroup = await self.cgroups.apply(spec.id, spec.resources)
            undo.push_async_callback(_try_to, "users", spec.id, self.users.give_back)
            uid_base = self.users.take(spec)
            undo.push_async_callback(_try_to, "network", spec.id, self.network.undo)
            with _step("network"):
                network = await self.network.apply(
                    spec.id,
                    spec.ports,
                    spec.has_host_network,
                    reaches_metadata=spec.reaches_metadata,
                    reaches_store=bool(spec.store_prefixes),
                    has_power=not NETWORK_CAPABILITIES.isdisjoint(capabilities),
                    uid_base=uid_base,
                )
            undo.push_async_callback(_try_to, "grants", spec.id, self.grants.undo)
            with _step("grants"):
                granted = await self.grants.apply(spec)
            undo.push_async_callback(_try_to, "files", spec.id, self.files.undo)
            with _step("files"):
                hostname = spec.hostname or spec.id
                files = await self.files.apply(
                    msgspec.structs.replace(spec, secrets=spec.secrets + granted) if granted else spec,
                    hostname=hostname,
                    nameserver=self.nameserver,
                    ip=network.ip,
                    uid_base=uid_base,
                    cgroups=cgroup.view,
                )
                if files.device:
                    self.cgroups.limit_disk(spec.id, spec.resources, files.device)
            undo.push_async_callback(_try_to, "process", spec.id, self.process.discard)
            with _step("process"):
                env = environment(spec, network.numbers, self.proxy_env, self.grants.url)
                request = request_for(spec, cgroup, network, files, capabilities, seccomp_path, env, uid_base)
                note = Note(network=network, uid_base=uid_base, device=files.device)
                request = msgspec.structs.replace(request, note_path=self.files.note(spec.id, _NOTE.encode(note)))
                fds = await self._run(request, note)
            undo.pop_all()
        return Launched(job_id=spec.id, fds=fds, network=network, is_waiting=request.waits, uid_base=uid_base)

    async def _run(self, request: SpawnRequest, note: Note) -> Spawned:
        """Have the program run; if the spawner is killed meanwhile, `SpawnerUnavailable` says that it never began.

        Raises:
            SpawnerUnavailable, LaunchFailed
        """
        try:
            return await self.process.apply(request)
        except JobNotFound as error:  # what was made for it went with a spawner that was killed
            raise SpawnerUnavailable(error.message) from error
        except SpawnerUnavailable:
            if living := self.find(request.id):
                names = ("stdout", "stderr", "stdin") if request.has_stdin else ("stdout", "stderr")
                return await self.adopt(request.id, living, note.network, note.uid_base, names)
            if (noted := self.noted(request.id)) is not None and noted.has_begun:
                return await self.process.adopt(request.id, None, Belongings())
            raise

    def find(self, job_id: str) -> Living | None:
        """Return the job's first process if it lives, whether the spawner knows of it or not."""
        return adoption.find_job(self.cgroups.pids(job_id))

    async def adopt(
        self, job_id: str, living: Living, network: NetworkState, uid_base: int, names: Sequence[str]
    ) -> Spawned:
        """Tell the spawner of a job that another one started, and take it from there; `living` is ours from here on."""
        _LOG.info("job %s lives on: process %d is adopted", job_id, living.pid)
        streams = adoption.open_streams(living.pid, names)
        try:
            belongings = Belongings(network.netns_name or "", uid_base, 0, streams)
            return await self.process.adopt(job_id, living, belongings)
        finally:
            close_fds(streams.values())

    def noted(self, job_id: str) -> Note | None:
        """Return what a launch that came as far as the process step noted."""
        content = self.files.noted(job_id)
        try:
            note = msgspec.json.decode(content, type=Note)
        except msgspec.MsgspecError:
            return None
        return msgspec.structs.replace(note, has_begun=content.endswith(b"\n"))

    def exec_request(self, process_id: str, job: JobSpec, numbers: Sequence[int], spec: ExecSpec) -> ExecRequest:
        """Translate a program that is to run beside a job's own: what it does not say itself is as for the job."""
        capabilities = capabilities_of(job)
        like = msgspec.structs.replace(job, user=spec.user or job.user, env=job.env | spec.env, has_tty=spec.has_tty)
        uid, gid = user_of(like)
        return ExecRequest(
            id=process_id,
            job_id=job.id,
            args=spec.args,
            env=environment(like, numbers, self.proxy_env, self.grants.url),
            working_dir=spec.working_dir or job.working_dir,
            uid=uid,
            gid=gid,
            cgroup_procs=self.cgroups.procs(job.id),
            rlimits=rlimits_of(job),
            capabilities=capabilities,
            seccomp_path=str(self.seccomp.path_for(capabilities)),
            has_tty=spec.has_tty,
            rows=spec.rows,
            columns=spec.columns,
            has_stdin=spec.has_stdin,
        )

    async def undo(self, job_id: str) -> None:
        """Kill what lives of the job and remove all that it had; works from the id alone, any number of times.

        Every step is undone even if another fails; the first failure is raised at the end. How the process
        ended stays with the spawner until `Spawner.ack`.
        """
        failures = [
            await _try_to(name, job_id, act)
            for name, act in (
                ("process", self.process.undo),
                ("cgroup", self.cgroups.undo),  # kills what is left; before its files go: nothing may still use them
                ("files", self.files.undo),
                ("network", self.network.undo),
                ("grants", self.grants.undo),
            )
        ]
        if failures[:2] == [None, None]:  # else something of it may live
            await self.users.give_back(job_id)
        for failure in failures:
            if failure is not None:
                raise failure


@contextlib.contextmanager
def _step(name: str) -> Iterator[None]:
    """Say which step it was. Refusals of the spec stay what they are; bugs of ours do, too."""
    try:
        yield
    except LaunchFailed as error:
        detail = {key: value for key, value in error.detail.items() if key != "step"}
        raise LaunchFailed(
            error.message, hint=error.hint, step=name, at=error.detail.get("step", ""), **detail
        ) from error
    except (OSError, Internal) as error:
        number = getattr(error, "errno", None) or 0
        raise LaunchFailed(f"{name}: {error}", step=name, errno=number) from error


async def _try_to(step: str, job_id: str, act: Callable[[str], Awaitable[None]]) -> Exception | None:
    """Undo one step; a failure is logged and returned, for the others have to be undone as well."""
    try:
        await act(job_id)
    except Exception as error:  # noqa: BLE001 — every other undo has to run, whatever this one met
        _LOG.warning("undo %s of job %s: %s", step, job_id, error, exc_info=not isinstance(error, OSError))
        return error
    return None


def capabilities_of(spec: JobSpec) -> tuple[str, ...]:
    """Return the names, without `CAP_`, of all that the job may ever have.

    Raises:
        InvalidSpec: the spec adds one that does not exist.
    """
    added = [name.upper().removeprefix("CAP_") for name in spec.capabilities_add]
    for name in added:
        if name not in CAPABILITIES:
            raise InvalidSpec(f"capability {name!r}", hint="such as NET_ADMIN; see capabilities(7)")
    return tuple(sorted({*DEFAULT_CAPABILITIES, *added}))


def rlimits_of(spec: JobSpec) -> dict[str, int]:
    """Return the limits that each process, or (NPROC, where the job's users are its own) each user of a job has.

    The pids limit does the same, but so late in a fork that the parent's memory has been copied by then, under locks
    that it shares with every job that runs the same program. NPROC lets no more than a few get that far at a time.
    """
    limits = {"NOFILE": spec.resources.open_files_max}
    if spec.user_namespace != "host":
        limits["NPROC"] = spec.resources.pids_max + FORKS_AT_THE_LIMIT
    return limits


def user_of(spec: JobSpec) -> tuple[int, int]:
    """Return the job's uid and gid; the gid is the uid's number unless given.

    Raises:
        InvalidSpec: the user is not `uid` or `uid:gid`.
    """
    match = _USER.fullmatch(spec.user)
    if match is None:
        raise InvalidSpec(f"user {spec.user[:80]!r}", hint="uid or uid:gid, as numbers")
    uid = int(match[1])
    return uid, int(match[2]) if match[2] else uid


def environment(
    spec: JobSpec, numbers: Sequence[int], proxy_env: Mapping[str, str], store_url: str = ""
) -> dict[str, str]:
    """Return the job's whole environment: defaults, host's proxy and store if asked for, the spec's, then the ports."""
    env = {"PATH": DEFAULT_PATH, "HOME": "/root" if user_of(spec)[0] == 0 else "/"}
    env["HOSTNAME"] = spec.hostname or spec.id
    if spec.has_tty:
        env["TERM"] = "xterm"
    if spec.inherits_proxy:
        env.update(proxy_env)
    if spec.store_prefixes:
        env |= {"STORE_URL": store_url, **STORE_FILES}
    env.update(spec.env)
    for index, number in enumerate(numbers):
        env[f"PORT_{index}"] = str(number)
    if numbers:
        env["PORT"] = str(numbers[0])
    return env


def request_for(
    spec: JobSpec,
    cgroup: CgroupState,
    network: NetworkState,
    files: FilesState,
    capabilities: tuple[str, ...],
    seccomp_path: str,
    env: Mapping[str, str],
    uid_base: int,
) -> SpawnRequest:
    """Translate a job and what its steps prepared into what the spawner is told."""
    uid, gid = user_of(spec)
    return SpawnRequest(
        id=spec.id,
        args=spec.args,
        env=dict(env),
        working_dir=spec.working_dir,
        uid=uid,
        gid=gid,
        uid_base=uid_base,
        hostname=spec.hostname or spec.id,
        netns=network.netns_name or "",
        namespaces=JOB_NAMESPACES,
        mounts=files.plan,
        root=files.root,
        cgroup_procs=cgroup.procs,
        rlimits=rlimits_of(spec),
        capabilities=capabilities,
        seccomp_path=seccomp_path,
        has_no_new_privs=True,
        has_init=True,
        has_tty=spec.has_tty,
        rows=spec.rows,
        columns=spec.columns,
        has_stdin=spec.has_stdin,
        waits=spec.has_tty or spec.has_stdin,
    )
