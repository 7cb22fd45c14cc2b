"""Check a `JobSpec` before anything is recorded: pure, and says which field is wrong.

What only a launch step can know (a taken port, a missing layer, no memory) is not asked here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath

from hostd.errors import InvalidSpec
from hostd.runtime import secret_files
from hostd.runtime.files import check_spec as check_files
from hostd.runtime.launch import STORE_FILES, capabilities_of
from hostd.runtime.users import PROBE_ID, RANGE_IDS
from hostd.types import (
    MIB,
    TEMP_DISK_BYTES_MAX,
    TEMP_DISK_BYTES_MIN,
    ExecSpec,
    JobSpec,
    Port,
    Resources,
    SecretFile,
    parse_job_id,
)

RESERVED_IDS = frozenset({"discovery", "spawner", "hostd", PROBE_ID})
_EXEC_MARK = ".exec-"
_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._-]{0,62}")
_SERVICE = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_USER = re.compile(r"\d{1,9}(:\d{1,9})?")
_TEXT_BYTES_MAX = 1024 * 1024
_LABEL_BYTES_MAX = 4096
_WAIT_S_MAX = 86400.0
_STORE_PREFIXES_MAX, _STORE_PREFIX_BYTES_MAX, _STORE_OWN = 16, 512, "/discoverd/"
_IO_LIMITS = {
    "io_read_bytes_per_s": 2**50,
    "io_write_bytes_per_s": 2**50,
    "io_read_ops_per_s": 2**32 - 1,
    "io_write_ops_per_s": 2**32 - 1,
}


def _refuse(field: str, value: object, hint: str = "") -> InvalidSpec:
    shown = repr(value)
    return InvalidSpec(f"{field}: {shown[:100]} is not possible", hint=hint, field=field)


def _check_path(field: str, path: str) -> None:
    pure = PurePosixPath(path)
    if not path.startswith("/") or ".." in pure.parts or "\0" in path or len(path) > 4096:
        raise _refuse(field, path, "an absolute path without ..")


def _check_wait(field: str, seconds: float, low: float = 0.0) -> None:
    if not math.isfinite(seconds) or not low <= seconds <= _WAIT_S_MAX:
        raise _refuse(field, seconds, f"seconds, {low:g} to {_WAIT_S_MAX:g}")


def _check_texts(field: str, texts: Iterable[str]) -> None:
    total = 0
    for text in texts:
        total += len(text.encode("utf-8", "surrogatepass")) + 1
        if "\0" in text:
            raise _refuse(field, text, "no NUL bytes")
    if total > _TEXT_BYTES_MAX:
        raise InvalidSpec(f"{field}: {total} bytes together", hint=f"at most {_TEXT_BYTES_MAX}", field=field)


def _check_port(port: Port, *, has_host_network: bool) -> None:
    if not 0 <= port.number <= 65535:
        raise _refuse("ports.number", port.number, "0 (any) to 65535")
    if port.service and not _SERVICE.fullmatch(port.service):
        raise _refuse("ports.service", port.service, "1 to 63 of a-z 0-9 -, no dash at either end")
    if port.service and port.protocol == "udp" and port.check.kind not in ("none", "command"):
        raise _refuse("ports.check.kind", port.check.kind, "an udp port can only have the checks command and none")
    if bool(port.check.command) != (port.check.kind == "command"):
        raise _refuse("ports.check.command", port.check.command, "the check command has one, the others have none")
    _check_texts("ports.check.command", port.check.command)
    if port.is_shared and not (port.number and has_host_network):
        raise _refuse("ports.is_shared", port.number, "only a fixed number on the host's network can be shared")
    if not port.check.path.startswith("/") or any(ord(char) < 33 for char in port.check.path):
        raise _refuse("ports.check.path", port.check.path, "begins with / and has no spaces")
    _check_wait("ports.check.interval_s", port.check.interval_s, 0.1)
    _check_wait("ports.check.timeout_s", port.check.timeout_s, 0.05)
    _check_wait("ports.check.start_timeout_s", port.check.start_timeout_s)
    if not 1 <= port.check.failures_until_down <= 1000:
        raise _refuse("ports.check.failures_until_down", port.check.failures_until_down, "1 to 1000")


def _check_ports(ports: tuple[Port, ...], *, has_host_network: bool) -> None:
    for port in ports:
        _check_port(port, has_host_network=has_host_network)
    wanted = [(port.protocol, port.number) for port in ports if port.number]
    if len(wanted) != len(set(wanted)):
        raise _refuse("ports", wanted, "each number once")
    if len(ports) > 64:
        raise _refuse("ports", len(ports), "at most 64")


def _check_resources(resources: Resources) -> None:
    if not 4 * MIB <= resources.memory_bytes <= 2**50:
        raise _refuse("resources.memory_bytes", resources.memory_bytes, "at least 4 MiB")
    if not TEMP_DISK_BYTES_MIN <= resources.temp_disk_bytes <= TEMP_DISK_BYTES_MAX:
        raise _refuse("resources.temp_disk_bytes", resources.temp_disk_bytes, "8 MiB to 1 TiB")
    if not 64 * 1024 <= resources.shm_bytes <= 2**40:
        raise _refuse("resources.shm_bytes", resources.shm_bytes, "64 KiB to 1 TiB")
    if not 2 <= resources.cpu_millis <= 256_000:
        raise _refuse("resources.cpu_millis", resources.cpu_millis, "2 to 256000")
    if resources.cpu_quota_millis and not 10 <= resources.cpu_quota_millis <= 1_024_000:
        raise _refuse("resources.cpu_quota_millis", resources.cpu_quota_millis, "0 (no cap) or 10 to 1024000")
    if not 2 <= resources.pids_max <= 4_000_000:
        raise _refuse("resources.pids_max", resources.pids_max, "2 to 4000000")
    if not 0 <= resources.swap_bytes <= 2**50:
        raise _refuse("resources.swap_bytes", resources.swap_bytes, "0 (none) or more")
    if not 1 <= resources.io_weight <= 1000:
        raise _refuse("resources.io_weight", resources.io_weight, "1 to 1000, 100 is everybody's")
    for name, high in _IO_LIMITS.items():
        value = getattr(resources, name)
        if value and not 2 <= value <= high:
            raise _refuse(f"resources.{name}", value, f"0 (no limit) or 2 to {high}")
    if not 16 <= resources.open_files_max <= 1_000_000:
        raise _refuse("resources.open_files_max", resources.open_files_max, "16 to 1000000")


def _check_store(prefixes: Sequence[str]) -> None:
    """Refuse prefixes that are none; and those that lead to what discovery itself keeps, such as the grants."""
    if len(prefixes) > _STORE_PREFIXES_MAX or len(set(prefixes)) != len(prefixes):
        raise _refuse("store_prefixes", prefixes, f"each once, at most {_STORE_PREFIXES_MAX}")
    for prefix in prefixes:
        if not 0 < len(prefix.encode("utf-8", "surrogatepass")) <= _STORE_PREFIX_BYTES_MAX or "\0" in prefix:
            raise _refuse("store_prefixes", prefix, f"1 to {_STORE_PREFIX_BYTES_MAX} bytes, no NUL")
        if not prefix.isprintable():
            raise _refuse("store_prefixes", prefix, "printable characters")
        if _STORE_OWN.startswith(prefix) or prefix.startswith(_STORE_OWN):
            raise _refuse("store_prefixes", prefix, f"{_STORE_OWN} is discovery's own")


def exec_id(job_id: str, token: str) -> str:
    """Return what the spawner calls a process beside a job's own: no job id, for it has a dot."""
    return f"{job_id}{_EXEC_MARK}{token}"


def is_exec(process_id: str) -> bool:
    """Tell whether a process of the spawner is one beside a job's own."""
    return _EXEC_MARK in process_id


def is_job(process_id: str) -> bool:
    """Tell whether a process of the spawner is a job's own: not a part of the node, and not beside a job's own."""
    return process_id not in RESERVED_IDS and not is_exec(process_id)


def _check_env(env: Mapping[str, str]) -> None:
    _check_texts("env", [f"{name}={value}" for name, value in env.items()])
    for name in env:
        if not name or "=" in name:
            raise _refuse("env", name, "names are not empty and have no =")


def _check_args(args: Sequence[str]) -> None:
    if not args or not args[0]:
        raise InvalidSpec("args: a command is needed", hint="the full command, program first", field="args")
    _check_texts("args", args)


def _check_terminal(rows: int, columns: int) -> None:
    if not (0 < rows <= 65535 and 0 < columns <= 65535):
        raise _refuse("rows, columns", (rows, columns), "1 to 65535")


def check_exec(spec: ExecSpec) -> None:
    """Refuse what can never run inside any job.

    Raises:
        Invalid: `detail["field"]` names the field.
    """
    _check_args(spec.args)
    _check_env(spec.env)
    if spec.working_dir:
        _check_path("working_dir", spec.working_dir)
    if spec.user and not _USER.fullmatch(spec.user):
        raise _refuse("user", spec.user, "uid or uid:gid, as numbers")
    _check_terminal(spec.rows, spec.columns)


def check(spec: JobSpec) -> None:
    """Refuse a spec that can never run.

    Raises:
        Invalid: `detail["field"]` names the field.
    """
    parse_job_id(spec.id)
    if spec.id in RESERVED_IDS:
        raise _refuse("id", spec.id, "the name is taken by a part of the node")
    if not spec.layers:
        raise InvalidSpec("layers: a job needs at least one", hint="name an image", field="layers")
    _check_args(spec.args)
    _check_env(spec.env)
    _check_path("working_dir", spec.working_dir)
    if not _USER.fullmatch(spec.user):
        raise _refuse("user", spec.user, "uid or uid:gid, as numbers")
    if spec.user_namespace == "job" and any(int(number) >= RANGE_IDS for number in spec.user.split(":")):
        raise _refuse("user", spec.user, f"at most {RANGE_IDS - 1}, a job's user namespace has no more")
    if spec.hostname and not _NAME.fullmatch(spec.hostname):
        raise _refuse("hostname", spec.hostname, "1 to 63 letters, digits, dots and dashes")
    for volume in spec.volumes:
        if not _NAME.fullmatch(volume.name):
            raise _refuse("volumes.name", volume.name, "1 to 63 of a-z A-Z 0-9 . _ -, a letter or digit first")
        _check_path("volumes.path", volume.path)
    for mount in spec.mounts:
        _check_path("mounts.source", mount.source)
        _check_path("mounts.path", mount.path)
    _check_store(spec.store_prefixes)
    granted = STORE_FILES.values() if spec.store_prefixes else ()
    secret_files.check((*spec.secrets, *(SecretFile(path=path) for path in granted)))
    _check_ports(spec.ports, has_host_network=spec.has_host_network)
    _check_resources(spec.resources)
    if not 1 <= spec.stop_signal <= 64:
        raise _refuse("stop_signal", spec.stop_signal, "1 to 64")
    for field in ("stop_grace_s", "drain_timeout_s", "attach_timeout_s"):
        _check_wait(field, getattr(spec, field))
    _check_terminal(spec.rows, spec.columns)
    if sum(len(key) + len(value) for key, value in spec.labels.items()) > _LABEL_BYTES_MAX:
        raise _refuse("labels", f"{len(spec.labels)} labels", f"at most {_LABEL_BYTES_MAX} bytes together")
    check_files(spec)
    capabilities_of(spec)
