"""Kernel switches under /proc/sys/net of the calling thread's network namespace: wanted values, remembered ones.

What a switch was before our first write goes to a file before the write happens, so that a teardown after any
crash restores it. The file lives as long as the boot (run_dir), as the switches do. Called by
`hostd.runtime.network`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from netns.errors import KernelError

_ROOT = Path("/proc/sys/net")

Wanted = Callable[[str], str]
"""From a switch's present value to the wanted one."""


def to(value: str) -> Wanted:
    """Want this very value."""
    return lambda _present: value


def including(ports: str) -> Wanted:
    """Want a list of port ranges that has this one, too."""
    return lambda present: present if ports in present.split(",") else ",".join(filter(None, (present, ports)))


def read(name: str) -> str | None:
    """Return a switch such as `ipv4/ip_forward`, `None` where the kernel has none."""
    try:
        return (_ROOT / name).read_text().strip()
    except OSError:
        return None


def write(name: str, value: str) -> None:
    """Set a switch."""
    try:
        (_ROOT / name).write_text(value + "\n")
    except OSError as error:
        raise KernelError(error.errno or 0, "write", f"/proc/sys/net/{name}") from error


def ensure(wanted: Mapping[str, Wanted], memory: Path) -> dict[str, str]:
    """Bring every switch that exists to its wanted value; return the values now in force.

    `memory` keeps what each was before our first write.
    """
    present = {name: value for name in wanted if (value := read(name)) is not None}
    changes = {name: want for name, value in present.items() if (want := wanted[name](value)) != value}
    if changes:
        before = _recall(memory)
        _remember(memory, {name: present[name] for name in changes} | before)
    for name, value in changes.items():
        write(name, value)
    return present | changes


def restore(memory: Path) -> None:
    """Write back what `ensure` remembered and forget it; nothing remembered is fine."""
    for name, value in _recall(memory).items():
        if read(name) is not None:
            write(name, value)
    memory.unlink(missing_ok=True)


def _recall(memory: Path) -> dict[str, str]:
    try:
        found = json.loads(memory.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return {str(name): str(value) for name, value in found.items()}


def _remember(memory: Path, values: Mapping[str, str]) -> None:
    memory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    beside = memory.with_name(memory.name + ".new")
    beside.write_text(json.dumps(values))
    beside.replace(memory)
