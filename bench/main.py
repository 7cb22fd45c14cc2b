"""Run the benchmarks, print their table, write `results.json`, leave nothing behind. Called by `bench/run`.

Each unit runs in a process of its own, in a session of its own, so that Ctrl-C reaches only this one, which passes
it on as a wish: a unit ends between two rounds (or as soon as a command of its own fails), cleans up, and exits. What
a unit names in the kernel has its process id in it; after each unit this looks whether any such name is left.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.measure import RESULTS, Row, ask_stop, is_stop_asked, save, show

ROOT = Path(__file__).parent.parent
CLEAN_UP_S = 120.0
HELP_NAMES = (
    "job_start job_start_network (job_start_docker job_start_podman) job_start_spawner (jobs_per_s_4) exec"
    " job_start_floor job_log (log_write log_read)"
    " router (router_rps router_p99)"
    " push_to_200 idle (idle_pss idle_cpu)"
    " idle_500 (idle_500_pss idle_500_cpu idle_job_pss stats_500 job_memory_docker job_memory_podman)"
    " neighbours (neighbours_p99 neighbours_host_p99) dns (dns_rps dns_p99)"
    " store (store_put_1 store_put_16 store_put_64 store_read_16, each with _p50 and _p99; store_watch_1000"
    " store_restart store_memory)"
)


@dataclass(frozen=True)
class Unit:
    """What is measured together. `names` may be asked for, each may stand for several rows."""

    names: tuple[str, ...]
    measure: Callable[[frozenset[str]], list[Row]]
    has_own_mounts: bool = False


def job_start(_: frozenset[str]) -> list[Row]:
    from bench import job_start as bench

    return bench.measure(10)


def job_start_network(_: frozenset[str]) -> list[Row]:
    from bench import job_start_network as bench

    return bench.measure(7)


def job_start_spawner(_: frozenset[str]) -> list[Row]:
    from bench import job_start_spawner as bench

    return bench.measure(10)


def job_start_floor(_: frozenset[str]) -> list[Row]:
    from bench import job_start_floor as bench

    return bench.measure(10)


def exec_inside(_: frozenset[str]) -> list[Row]:
    from bench import exec as bench

    return bench.measure(10)


def job_log(_: frozenset[str]) -> list[Row]:
    from bench import job_log as bench

    return bench.measure(4)


def router(_: frozenset[str]) -> list[Row]:
    from bench import router as bench

    return bench.main(5)


def idle_500(_: frozenset[str]) -> list[Row]:
    from bench import idle_500 as bench

    return bench.measure()


def neighbours(_: frozenset[str]) -> list[Row]:
    from bench import neighbours as bench

    return bench.measure(5)


def dns(_: frozenset[str]) -> list[Row]:
    from bench import dns as bench

    return bench.measure(4)


def store(_: frozenset[str]) -> list[Row]:
    from bench import store as bench

    return bench.measure(4)


def lab(names: frozenset[str]) -> list[Row]:
    """Measure what needs a whole node: idle first, while it has no app."""
    from bench import idle, push_to_200
    from tests.e2e.conftest import ssh_setup
    from tests.e2e.lab import make_lab

    rows: list[Row] = []
    with make_lab() as machine, commands_end_too():
        ssh_setup(machine)
        up = machine.make("up")
        if up.status:
            raise RuntimeError(f"make up: {up.text[-4000:]}")
        if "idle" in names:
            rows += idle.measure(machine)
        if "push_to_200" in names:
            rows += push_to_200.measure(machine, 6)
    return rows


UNITS = {
    "job_start": Unit(("job_start",), job_start, has_own_mounts=True),
    "job_start_network": Unit(("job_start_network",), job_start_network),
    "job_start_spawner": Unit(("job_start_spawner",), job_start_spawner, has_own_mounts=True),
    "exec": Unit(("exec",), exec_inside, has_own_mounts=True),
    "job_start_floor": Unit(("job_start_floor",), job_start_floor),
    "job_log": Unit(("job_log",), job_log),
    "router": Unit(("router",), router),
    "idle_500": Unit(("idle_500",), idle_500),
    "neighbours": Unit(("neighbours",), neighbours),
    "dns": Unit(("dns",), dns),
    "store": Unit(("store",), store),
    "lab": Unit(("push_to_200", "idle"), lab),
}
OTHER_NAMES = {
    "job_start_docker": "job_start_network",
    "job_start_podman": "job_start_network",
    "job_memory_docker": "idle_500",
    "job_memory_podman": "idle_500",
    "jobs_per_s_4": "job_start_spawner",
    "log_write": "job_log",
    "log_read": "job_log",
    "router_rps": "router",
    "router_p99": "router",
    "idle_pss": "idle",
    "idle_cpu": "idle",
    "neighbours_p99": "neighbours",
    "neighbours_host_p99": "neighbours",
    "dns_rps": "dns",
    "dns_p99": "dns",
}
_STORE_LOADS = ("put_1", "put_16", "put_64", "read_16")
OTHER_NAMES |= {f"store_{load}{what}": "store" for load in _STORE_LOADS for what in ("", "_p50", "_p99")}
OTHER_NAMES |= dict.fromkeys(("store_watch_1000", "store_restart", "store_memory"), "store")
OTHER_NAMES |= dict.fromkeys(("idle_500_pss", "idle_500_cpu", "idle_job_pss", "stats_500"), "idle_500")


# one unit, in its own process


class _Signals:
    ends_commands = False


def on_signal(*_: object) -> None:
    """Note the wish; where it is safe, have the command that is under way end, too."""
    ask_stop()
    if _Signals.ends_commands and os.getpgrp() == os.getpid():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        os.killpg(0, signal.SIGINT)


@contextmanager
def commands_end_too() -> Iterator[None]:
    """Pass Ctrl-C on to the commands that run inside this block, and leave it only when they are gone."""
    _Signals.ends_commands = True
    try:
        yield
    finally:
        _Signals.ends_commands = False
        deadline = time.monotonic() + 10
        while is_stop_asked() and time.monotonic() < deadline and others_of_group():
            time.sleep(0.05)


def others_of_group() -> list[int]:
    """Return the living processes of our group but ourselves."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, group = path.read_text().rpartition(")")[2].split()[:3]
            if int(group) == os.getpgrp() and state != "Z" and int(path.parent.name) != os.getpid():
                found.append(int(path.parent.name))
    return found


def run_unit(name: str, names: frozenset[str], result: Path) -> int:
    """Measure one unit and leave its rows in a file."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    unit = UNITS[name]
    if unit.has_own_mounts:
        from bench.job_start_spawner import in_own_mounts

        in_own_mounts("bench.main")
    try:
        rows = unit.measure(names)
    except Exception:
        if is_stop_asked():  # then it matters little what failed
            return 130
        raise
    result.write_text(json.dumps([asdict(row) for row in rows]))
    return 0


# all units


def start_unit(name: str, names: frozenset[str], folder: Path) -> list[Row]:
    """Run a unit's process to its end, also when interrupted.

    Raises:
        KeyboardInterrupt: somebody wants us to end, and the unit has.
        RuntimeError: it failed, or left something behind.
    """
    result = folder / f"{name}.json"
    command = [sys.executable, "-m", "bench.main", "--unit", name, "--result", str(result), *sorted(names)]
    with (folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stdin=subprocess.DEVNULL, stderr=log)
    try:
        process.wait()
    except KeyboardInterrupt:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # once is enough: a clean-up is never cut short
        print(f"\nbench: cleaning up after {name}, this may take a moment", file=sys.stderr)
        process.send_signal(signal.SIGINT)
        process.wait(CLEAN_UP_S)
        check_nothing_left(process.pid)
        raise
    check_nothing_left(process.pid)
    if process.returncode:
        tail = (folder / f"{name}.log").read_text(errors="replace")[-4000:]
        raise RuntimeError(f"{name} failed with exit status {process.returncode}:\n{tail}")
    rows: list[dict[str, Any]] = json.loads(result.read_text())
    return [Row(**(row | {"spread": tuple(row["spread"])})) for row in rows]


def leftovers(pid: int) -> list[str]:
    """Return what is still there of a unit: cgroups, namespaces, processes and directories named after its pid."""
    marks = (f"hostd-bench-{pid}", f"hostd-bench-floor-{pid}", f"hostd_test_{pid}_", f"hostd-e2e-{pid}")
    found = []
    for place, pattern in (("/sys/fs/cgroup", "*"), ("/sys/fs/cgroup", "*/*"), ("/run/netns", "*"), ("/run", "*")):
        found += [str(path) for path in Path(place).glob(pattern) if path.name.startswith(marks)]
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if any(mark in words for mark in marks):
            found.append(f"process {entry.name}: {words[:100].replace(chr(0), ' ')}")
    return sorted(set(found))


def check_nothing_left(pid: int) -> None:
    if left := leftovers(pid):
        raise RuntimeError("left behind:\n" + "\n".join(left))


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench/run", description="Measure everything beside its peer.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"only these: {HELP_NAMES}")
    parser.add_argument("--unit", choices=UNITS, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    found = parser.parse_args(words)
    known = [name for unit in UNITS.values() for name in unit.names]
    found.names = frozenset(OTHER_NAMES.get(name, name) for name in found.names) or frozenset(known)
    if unknown := found.names - set(known):
        parser.error(f"no benchmark {min(unknown)!r}; there are: {HELP_NAMES}")
    return found


def main(words: list[str] | None = None) -> int:
    wanted = parse(sys.argv[1:] if words is None else words)
    if os.geteuid() != 0:
        print("bench: needs root: it makes namespaces, cgroups and a whole node. Try: sudo bench/run", file=sys.stderr)
        return 1
    if wanted.unit:
        return run_unit(wanted.unit, wanted.names, wanted.result)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    rows: list[Row] = []
    failed = False
    with tempfile.TemporaryDirectory(prefix="hostd-bench-") as name:
        for unit, spec in UNITS.items():
            names = wanted.names & set(spec.names)
            if not names:
                continue
            try:
                print(f"bench: {' and '.join(sorted(names))} …", file=sys.stderr, flush=True)
                begin = time.monotonic()
                rows += start_unit(unit, names, Path(name))
                print(f"bench: {unit} took {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
            except KeyboardInterrupt:
                return 130
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                print(f"bench: {error}", file=sys.stderr)
                failed = True
    save(rows)
    print(show(rows))
    print(f"\nThe rows are in {RESULTS.relative_to(ROOT)}, what they mean in bench/README.md.")
    print("bench/run --readme brings README.md's table and plot up to date.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
