"""The nouns of hostd: what a job is told to be (`JobSpec`) and what it is (`Job`).

Frozen, decoded once at the edge with unknown fields refused. `labels` are for the caller: hostd
stores, filters and returns them, and never reads meaning into them.
"""

from __future__ import annotations

import re
from typing import Literal, NewType

import msgspec

from discovery.wire.errors import ErrorBody, Invalid

JobId = NewType("JobId", str)
HostId = NewType("HostId", str)

_JOB_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
API_VERSION = 1
"""Every path of the API is there as it is and under `/v1`; what a client of `/v1` relies on never changes."""
MIB = 1024 * 1024
TEMP_DISK_BYTES_MIN, TEMP_DISK_BYTES_MAX = 8 * MIB, 2**20 * MIB
PORT_LOW, PORT_HIGH = 55000, 65535


def parse_job_id(text: str) -> JobId:
    """Accept a job id: 1 to 63 of `a-z 0-9 -`, starting with a letter or digit (it is a hostname, too).

    Raises:
        Invalid: it is anything else.
    """
    if not _JOB_ID.fullmatch(text):
        raise Invalid(f"job id {text[:80]!r}", hint="1 to 63 lowercase letters, digits and dashes")
    return JobId(text)


class Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of what arrives from outside."""


class HealthCheck(Strict, frozen=True, kw_only=True):
    """How to see that a port serves: `tcp` connects, `http` wants a status below 400 from `path`, `none` trusts.

    `command` runs inside the job, as the job's user, and has to end with 0 within `timeout_s`.
    A job whose port does not serve `start_timeout_s` after its start is complained about; with `has_to_start_in_time`
    it is killed, and its restart policy decides.
    """

    kind: Literal["tcp", "http", "command", "none"] = "tcp"
    path: str = "/"
    command: tuple[str, ...] = ()
    interval_s: float = 2.0
    timeout_s: float = 2.0
    start_timeout_s: float = 30.0
    failures_until_down: int = 3
    has_to_start_in_time: bool = False


class ExecSpec(Strict, frozen=True, kw_only=True):
    """A program to run inside a living job, beside its own; what is empty is as in the job's spec.

    `env` comes on top of the job's. `has_tty` gives a terminal of `rows` x `columns`; `has_stdin` keeps stdin open.
    """

    args: tuple[str, ...]
    env: dict[str, str] = {}
    working_dir: str = ""
    user: str = ""
    has_tty: bool = False
    rows: int = 24
    columns: int = 80
    has_stdin: bool = False


class ExecStarted(msgspec.Struct, frozen=True, kw_only=True):
    """A program that was started inside a job and left alone. `pid` is the host's number of it."""

    id: str
    job_id: str
    pid: int


class Port(Strict, frozen=True, kw_only=True):
    """A port that the job listens on, published as `host_ip:number`; the same number inside and outside.

    `number=0` takes the lowest free from 55000. The first port is `PORT` in the environment, each is `PORT_i`.
    `service` registers the instance under that name once `check` passes. `is_public` opens it to everyone.
    `is_shared`: the program listens with SO_REUSEPORT and drains by itself when told to stop, so that a successor may
    take over the same fixed number while this job still has it; only on the host's network.
    """

    number: int = 0
    protocol: Literal["tcp", "udp"] = "tcp"
    service: str = ""
    check: HealthCheck = HealthCheck()
    is_public: bool = False
    is_shared: bool = False


class Layer(Strict, frozen=True, kw_only=True):
    """One image layer. `url` may be empty when the layer lies in the host's own image store.

    `url` is `http://HOST:PORT/PATH` or `http://SERVICE.discoverd/PATH`, resolved when fetched.
    """

    digest: str
    size_bytes: int
    media_type: str = "application/vnd.oci.image.layer.v1.tar"
    url: str = ""


class ImageConfig(Strict, frozen=True, kw_only=True):
    """What an image asks of its jobs, from the OCI config."""

    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    env: dict[str, str] = {}
    working_dir: str = "/"
    user: str = ""
    volumes: tuple[str, ...] = ()
    exposed_ports: tuple[str, ...] = ()
    stop_signal: str = ""
    labels: dict[str, str] = {}


class Image(Strict, frozen=True, kw_only=True):
    """An image of the host's store: bottom layer first. `reference` is what it was pulled by, if it was."""

    name: str
    digest: str
    layers: tuple[Layer, ...]
    config: ImageConfig = ImageConfig()
    reference: str = ""


class ImageUser(Strict, frozen=True, kw_only=True):
    """Whom a name means in an image, by its own /etc/passwd and /etc/group; `home` may be empty."""

    uid: int
    gid: int
    home: str = ""


class Pruned(Strict, frozen=True, kw_only=True):
    """What `hostd image prune` removed: bytes of blobs and of broken-off pulls, and unpacked layers."""

    freed_bytes: int
    layers: int


class VolumeMount(Strict, frozen=True, kw_only=True):
    """A persistent directory of this host by name, made on first use, kept when the job ends.

    `is_exclusive`: no other job may have it at the same time, as a database needs it. Shared is the default, so that
    a successor can start while its predecessor still runs.
    """

    name: str
    path: str
    is_read_only: bool = False
    is_exclusive: bool = False


class BindMount(Strict, frozen=True, kw_only=True):
    """A path of the host inside the job. Privileged: only the platform's own jobs get one."""

    source: str
    path: str
    is_read_only: bool = True


class SecretFile(Strict, frozen=True, kw_only=True):
    """A file that the job finds read-only and that never lies on a disk outside hostd's own records.

    `path` is absolute, or a name below `/run/secrets`. The content is a text, or bytes as base64; hostd takes it and
    never shows it again. `uid` and `gid` are the job's.
    """

    path: str
    content: str = ""
    content_base64: str = ""
    mode: int = 0o400
    uid: int = 0
    gid: int = 0

    def __repr__(self) -> str:
        return f"SecretFile(path={self.path!r})"  # wherever a spec may be printed


def without_content(secrets: tuple[SecretFile, ...]) -> tuple[SecretFile, ...]:
    """Return what may be shown of secrets."""
    return tuple(msgspec.structs.replace(secret, content="", content_base64="") for secret in secrets)


class Resources(Strict, frozen=True, kw_only=True):
    """Limits of one job. `cpu_millis` is a weight (1000 = one full share); `cpu_quota_millis` 0 = no hard cap.

    `swap_bytes` may be swapped out beyond `memory_bytes`. `io_weight` (1 to 1000) and the io limits (0 = none) are for
    the disk under the state directory; on cgroup v1 they do not hold for buffered writes.
    `temp_disk_bytes` bounds all that the job writes outside its volumes, `/tmp` included; it goes with the job.
    `shm_bytes` is the size of `/dev/shm`, which is memory.
    """

    memory_bytes: int = 1024 * MIB
    swap_bytes: int = 0
    temp_disk_bytes: int = 4096 * MIB
    shm_bytes: int = 64 * MIB
    cpu_millis: int = 1000
    cpu_quota_millis: int = 0
    pids_max: int = 1024
    open_files_max: int = 10000
    io_weight: int = 100
    io_read_bytes_per_s: int = 0
    io_write_bytes_per_s: int = 0
    io_read_ops_per_s: int = 0
    io_write_ops_per_s: int = 0


class JobSpec(Strict, frozen=True, kw_only=True):
    """Everything that hostd needs to run one job.

    `args` is the full command. `user` is `uid[:gid]` numeric (0 = root of the job). `restart="always"`
    makes hostd start a successor (fresh id, same spec) whenever the job ends unasked, also after
    a power cut, `"on-failure"` unless it ended by itself with 0; everything else is for a scheduler to decide.
    `has_tty` gives a pseudo-terminal of `rows` x `columns`; `has_stdin` keeps stdin open until an attached client
    ends it (a job with either waits, before exec, until the first client is attached or `attach_timeout_s` has
    passed). `has_log=False`
    keeps output out of the log (it goes only to attached clients). `inherits_proxy` adds the host's proxy variables.
    `store_prefixes`: it may read and write the keys of discovery's store that begin with one of these (`/app` is how
    `/apple` begins, too), at `STORE_URL`, with the certificate that `STORE_CERT`, `STORE_KEY` and `STORE_CA` name.
    `reaches_metadata`: it may ask the cloud's metadata addresses (with the host's network it can anyway).
    `user_namespace="host"` is privileged: root of the job is the host's, held only by its capabilities and seccomp.
    """

    id: str
    layers: tuple[Layer, ...]
    args: tuple[str, ...]
    env: dict[str, str] = {}
    working_dir: str = "/"
    user: str = "0"
    hostname: str = ""
    has_tty: bool = False
    rows: int = 24
    columns: int = 80
    has_stdin: bool = False
    has_log: bool = True
    attach_timeout_s: float = 30.0
    ports: tuple[Port, ...] = ()
    volumes: tuple[VolumeMount, ...] = ()
    mounts: tuple[BindMount, ...] = ()
    secrets: tuple[SecretFile, ...] = ()
    resources: Resources = Resources()
    capabilities_add: tuple[str, ...] = ()
    has_host_network: bool = False
    reaches_metadata: bool = False
    store_prefixes: tuple[str, ...] = ()
    user_namespace: Literal["job", "host"] = "job"
    inherits_proxy: bool = False
    restart: Literal["never", "on-failure", "always"] = "never"
    stop_signal: int = 15
    stop_grace_s: float = 10.0
    drain_timeout_s: float = 10.0
    labels: dict[str, str] = {}


JobStatus = Literal["pending", "starting", "running", "stopping", "done", "crashed", "failed"]
ENDED: frozenset[str] = frozenset({"done", "crashed", "failed"})


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """A job as hostd knows it. Times are seconds since the epoch, 0 = not yet.

    `done` ended with 0 or was told to stop; `crashed` ended otherwise unasked; `failed` never ran (`error` says why).
    `exit_status` is the exit code, 128+N for signal N, `None` while running or unknown.
    `is_stop_asked`: somebody told it to end.
    `end_reason` is `exited`, `signaled`, `oom` (killed because memory ran out), `disk-full` (it failed with its temp
    disk full), `stopped` (told to end), `start-failed`, `start-timeout` (killed because it did not serve in time),
    `lost` (it went down with the machine) or `unknown` (nobody could see how it ended); empty while it lives.
    `is_up`: running and every service port registered. `ports` are the published numbers, in the spec's order.
    """

    spec: JobSpec
    host_id: str
    status: JobStatus
    host_ip: str = ""
    ip: str = ""
    ports: tuple[int, ...] = ()
    pid: int = 0
    is_up: bool = False
    created_at: float = 0
    started_at: float = 0
    ended_at: float = 0
    exit_status: int | None = None
    is_stop_asked: bool = False
    end_reason: str = ""
    error: ErrorBody | None = None


class Pressure(msgspec.Struct, frozen=True, kw_only=True):
    """For how long, since the beginning, `some` tasks waited, and all of them did (PSI)."""

    some_s: float
    full_s: float


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """What a job uses now, and what it has used since it began; 0 where the machine cannot say.

    `memory_bytes` is without the page cache that can be dropped at once. `forks_refused` counts new processes and
    threads that the limit forbade.
    """

    memory_bytes: int = 0
    cpu_s: float = 0.0
    cpu_throttled_s: float = 0.0
    pids: int = 0
    io_read_bytes: int = 0
    io_write_bytes: int = 0
    io_read_ops: int = 0
    io_write_ops: int = 0
    oom_kills: int = 0
    forks_refused: int = 0


class JobStats(msgspec.Struct, frozen=True, kw_only=True):
    """One living job at one moment. `network_*` are what its veth carried, `log_bytes` all that it has ever printed."""

    id: str
    usage: Usage
    memory_limit_bytes: int
    pids_limit: int
    started_at: float = 0.0
    restarts: int = 0
    network_received_bytes: int = 0
    network_sent_bytes: int = 0
    log_bytes: int = 0
    log_dropped_bytes: int = 0
    temp_disk_bytes: int = 0
    temp_disk_limit_bytes: int = 0
    pressure: dict[str, Pressure] = {}


class NodeStats(msgspec.Struct, frozen=True, kw_only=True):
    """The machine at one moment; `cpu_s` is what all its cores were busy since it booted."""

    cpus: int
    cpu_s: float
    memory_bytes: int
    memory_available_bytes: int
    disk_bytes: int
    disk_free_bytes: int
    networks_ready: int
    networks_wanted: int
    hostd_memory_bytes: int
    hostd_cpu_s: float
    spawner_memory_bytes: int
    spawner_cpu_s: float
    pressure: dict[str, Pressure] = {}


class Stats(msgspec.Struct, frozen=True, kw_only=True):
    """What `hostd stats` shows. Rates come from two of these."""

    at: float
    node: NodeStats
    jobs: tuple[JobStats, ...]


class JobEvent(msgspec.Struct, frozen=True, kw_only=True):
    """A change of one job, with the job after it. The stream begins with a `snapshot` of each job, then `current`.

    `sequence` grows by one per event of this host.
    """

    sequence: int
    kind: Literal["snapshot", "current", "created", "started", "up", "down", "stopping", "ended", "removed"]
    at: float
    job: Job | None = None


class LogLine(msgspec.Struct, frozen=True, kw_only=True):
    """One line of a job's output. `stream` is 1 stdout, 2 stderr, 0 hostd's own word. `sequence` is per job."""

    job_id: str
    sequence: int
    at: float
    stream: int
    text: str
    labels: dict[str, str] = {}


class SignalRequest(Strict, frozen=True, kw_only=True):
    number: int


class HostStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What `hostd status` shows."""

    host_id: str
    version: str
    host_ip: str
    subnet: str
    bridge: str
    nat_backend: str
    cgroup_version: int
    jobs_running: int
    discovery: str
    gateway: str = ""
    run_dir: str = ""
    features: dict[str, str] = {}
    sysctls: dict[str, str] = {}


class Volume(msgspec.Struct, frozen=True, kw_only=True):
    """A persistent directory of this host; `used_by` are the jobs that have it mounted now."""

    name: str
    path: str
    used_by: tuple[str, ...] = ()


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """A volume as it was; `frozen` are the jobs that were held still while it was copied."""

    volume: str
    name: str
    created_at: float
    frozen: tuple[str, ...] = ()


class DiskUse(msgspec.Struct, frozen=True, kw_only=True):
    """What one kind of thing takes on the host's disk, and how much of it a `gc` would free now."""

    kind: str
    count: int
    size_bytes: int
    reclaimable_bytes: int = 0


class Removed(msgspec.Struct, frozen=True, kw_only=True):
    """Something that nobody needed, and what it took on the disk."""

    kind: str
    name: str
    size_bytes: int
