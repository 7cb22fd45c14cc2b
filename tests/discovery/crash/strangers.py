"""Strangers at a member's port: what they cost the clients that are served, in time, memory and state.

`python -m tests.discovery.crash.strangers --seconds 600 --idle 2000` (`make strangers`). From another network
namespace: a port scan, random bytes, TLS records and frames that announce more than they bring, idle connections, and
certificates of another authority, expired, or of another role. Meanwhile a client writes and reads.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import socket
import ssl
import statistics
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from hostd.authority import Authority
from tests.discovery.crash import rounds
from tests.discovery.crash.arms import PORT, ROOT, Ours, environment
from tests.discovery.crash.rounds import Cluster

MODULE = "tests.discovery.crash.strangers"
ATTACKS = ("scan", "noise", "bombs", "idle", "certificates")
MEMORY_BYTES_MAX = 96 * 1024 * 1024
SAMPLES = 150


# The stranger's side: a process of its own


async def _noise(address: tuple[str, int], end_s: float) -> int:
    count = 0
    dice = random.Random(1)
    while time.monotonic() < end_s:
        count += 1
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection(*address)
            writer.write(dice.randbytes(dice.choice([1, 5, 100, 5000, 200_000])))
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(0.5):
                    await writer.drain()
            writer.close()
        await asyncio.sleep(0.005)
    return count


async def _scan(address: tuple[str, int], end_s: float) -> int:
    """Return how many ports but the one that we know of are open."""
    found = 0
    for port in range(1, 12_000):
        with socket.socket() as one:
            one.settimeout(0.2)
            found += one.connect_ex((address[0], port)) == 0 and port != address[1]
    del end_s
    return found


async def _idle(address: tuple[str, int], end_s: float, count: int) -> int:
    """Hold as many connections as there may be, half of them in a handshake; come again when sent away."""
    held: list[socket.socket] = []
    opened = 0
    while time.monotonic() < end_s:
        if len(held) >= count:
            held.pop(0).close()
            await asyncio.sleep(0.01)
        one = socket.socket()
        one.setblocking(False)
        one.connect_ex(address)
        held.append(one)
        opened += 1
        if opened % 2:
            await asyncio.sleep(0)
            with contextlib.suppress(OSError):
                one.send(b"\x16\x03\x01\x02\x00\x01")
        if opened > count:
            await asyncio.sleep(0.002)
    return opened


def _context(folder: Path, name: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if name:
        context.load_cert_chain(folder / f"{name}.pem")
    return context


async def _speak(address: tuple[str, int], context: ssl.SSLContext, raw: bytes) -> bytes:
    """Return what the member says to somebody with a certificate and some bytes; nothing, if it hangs up."""
    try:
        async with asyncio.timeout(3.0):
            reader, writer = await asyncio.open_connection(*address, ssl=context)
            try:
                writer.write(raw)
                await writer.drain()
                return await reader.read(1000)
            finally:
                writer.transport.abort()
    except (OSError, TimeoutError):
        return b""


async def _bombs(address: tuple[str, int], end_s: float, folder: Path) -> int:
    """Announce 4 GiB, as TLS records and, with a certificate of the cluster's, as a frame."""
    count = 0
    while time.monotonic() < end_s:
        await _speak(address, _context(folder, "z"), b"\xff\xff\xff\xff" + bytes(100_000))
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection(*address)
            writer.write(b"\x16\x03\x03\xff\xff" + bytes(70_000))
            writer.close()
        count += 2
        await asyncio.sleep(0.02)
    return count


async def _certificates(address: tuple[str, int], end_s: float, folder: Path) -> int:
    """Return how often somebody who must not was told anything."""
    told = 0
    while time.monotonic() < end_s:
        for name in ("", "other", "expired", "role"):
            told += bool(await _speak(address, _context(folder, name), b"\x00\x00\x00\x05hello"))
        await asyncio.sleep(0.05)
    return told


async def attack(kind: str, address: tuple[str, int], seconds: float, folder: Path, idle: int) -> int:
    end_s = time.monotonic() + seconds
    if kind == "noise":
        return await _noise(address, end_s)
    if kind == "scan":
        return await _scan(address, end_s)
    if kind == "idle":
        return await _idle(address, end_s, idle)
    return await (_bombs if kind == "bombs" else _certificates)(address, end_s, folder)


# Our side


def _make_certificates(folder: Path, authority: Authority) -> None:
    long_ago = datetime.now(UTC) - timedelta(days=30)
    for name, raw in (
        ("z", authority.member("z")),
        ("other", Authority.make().member("a")),
        ("expired", authority.member("a", days=1, begin=long_ago)),
        ("role", authority.client("a")),
    ):
        (folder / f"{name}.pem").write_bytes(raw)


async def _latency_s(made: Cluster) -> float:
    """Return the median time of a write and a read."""
    store = made.stores["a"]
    taken = []
    for number in range(SAMPLES):
        began = time.monotonic()
        await store.put("served", b"served:0:", wants_previous=False)
        await store.get("served")
        taken.append(time.monotonic() - began)
        await asyncio.sleep(0.005)
        del number
    return statistics.median(taken)


def _memory_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def run(seconds: float, idle: int, kinds: Sequence[str] = ATTACKS) -> list[str]:
    """Have these kinds of strangers come, one after the other; return a line for each."""
    lines = []
    async with rounds.cluster(Ours(sync_s=0.0, compact_entries=20_000)) as made:
        tls = made.folder / "tls"
        assert made.authority is not None
        _make_certificates(tls, made.authority)
        victim = made.members[0]
        for kind in kinds:
            before_s, memory = await _latency_s(made), _memory_bytes(victim.pid)
            others, _ = await made.stores["a"].names("t")
            process = await asyncio.create_subprocess_exec(
                *made.network.inside("b", sys.executable, "-m", MODULE, "--attack", kind, "--folder", str(tls)),
                "--address", made.network.address("a"), "--seconds", str(seconds), "--idle", str(idle),
                stdout=asyncio.subprocess.PIPE, env=environment(), cwd=ROOT,
            )  # fmt: skip
            async with asyncio.TaskGroup() as group:
                telling = group.create_task(process.communicate())
                await asyncio.sleep(min(2.0, seconds / 3))
                looks_s: list[float] = []
                grown = 0
                while not looks_s or not telling.done():
                    looks_s.append(await _latency_s(made))
                    grown = max(grown, _memory_bytes(victim.pid) - memory)
            told, _ = await telling
            count, during_s = int(told), statistics.median(looks_s)
            lines.append(
                f"{kind}: {count}; a write and a read {before_s * 1000:.1f} ms before, {during_s * 1000:.1f} ms during "
                f"({during_s / before_s:.2f}x, at worst {max(looks_s) / before_s:.2f}x in {len(looks_s)} looks); "
                f"memory {grown / 2**20:+.1f} MiB"
            )
            print(lines[-1], flush=True)
            assert process.returncode == 0
            assert grown < MEMORY_BYTES_MAX, lines[-1]
            assert kind not in ("scan", "certificates") or count == 0, lines[-1]
            assert (await made.stores["a"].names("t"))[0] == others
        assert await made.wait_ready()
        assert [problem for member in made.members for problem in member.problems] == []
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.discovery.crash.strangers")
    parser.add_argument("--seconds", type=float, default=120.0, help="how long each kind of stranger stays")
    parser.add_argument("--idle", type=int, default=2000)
    parser.add_argument("--kinds", nargs="+", choices=ATTACKS, default=ATTACKS, help="which of them come")
    parser.add_argument("--attack", choices=ATTACKS, help="be that stranger")
    parser.add_argument("--address", default="")
    parser.add_argument("--folder", type=Path, default=Path())
    asked = parser.parse_args()
    if asked.attack:
        print(asyncio.run(attack(asked.attack, (asked.address, PORT), asked.seconds, asked.folder, asked.idle)))
    else:
        asyncio.run(run(asked.seconds, asked.idle, asked.kinds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
