"""What a job prints, to the disk with a time for each line, and read back with the times: beside podman's conmon.

Both run the same shell script in a container without a network: it prints a file of numbered lines of 100 bytes again
and again, and says on stderr when it began and when the last byte had been taken from it; the log has both. Ours goes
through a real hostd, and what is in the log is compared with what was printed, byte for byte. Reading back is what a
person types: `hostd log --time` and `podman logs --timestamps`, to `wc -l`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench import peers
from bench.measure import Row, interleave, row, show
from hostd.logtext import decode
from hostd.types import Resources
from tests.hostd.node import Node, node

LINES = 200_000
COPIES = 20
LINE_BYTES = 100
PRINTED_BYTES = LINES * COPIES * LINE_BYTES
PEER_READ_LINES = 400_000
"""Of the peer's log only so much is read: it takes a minute for all."""
SCRIPT = (
    f"seq -f %099.0f 0 {LINES - 1} > /tmp/lines; date +%s.%N >&2; cat{' /tmp/lines' * COPIES}; date +%s.%N >&2; exit 0"
)


def rate(times: list[str]) -> float:
    """Return MB/s from the two lines on stderr."""
    begin, end = map(float, times)
    return PRINTED_BYTES / (end - begin) / 1e6


def printed() -> bytes:
    return b"".join(b"%099d\n" % number for number in range(LINES))


class Ours:
    """hostd's arm."""

    def __init__(self, lab: Node) -> None:
        self._lab = lab
        self._number = 0
        self._wanted = hashlib.sha256(printed() * COPIES).digest()

    @property
    def _job_id(self) -> str:
        return f"b{self._number}"

    def write(self) -> float:
        if self._number:
            self._lab.caller().request("DELETE", f"/jobs/{self._job_id}")
        self._number += 1
        spec = self._lab.spec(self._job_id, "/bin/sh", "-c", SCRIPT, resources=Resources(memory_bytes=512 * 2**20))
        self._lab.start(spec)
        job = self._lab.wait_ended(self._job_id)
        assert job.status == "done", job
        found, errors = hashlib.sha256(), b""
        for stream, _, text in decode(self._lab.caller().stream(f"/jobs/{self._job_id}/output", {"raw": "true"})):
            if stream == 1:
                found.update(text)
            else:
                errors += text
        assert found.digest() == self._wanted, "the log is not what the job printed"
        return rate(errors.decode().split())

    def read(self) -> float:
        """Read the last job's log."""
        begin = time.perf_counter()
        command = self._lab.inside(sys.executable, "-m", "hostd.cli", "log", "--time", self._job_id)
        count = _count_lines(command, self._lab.environment())
        assert count == LINES * COPIES, count
        return PRINTED_BYTES / (time.perf_counter() - begin) / 1e6


class Podman(peers.Podman):
    """The peer: crun, conmon and its k8s-file log."""

    def fill(self) -> None:
        """Give it an image with the programs that the script wants."""
        root = self._folder / "root"
        for program in ("/bin/sh", "/bin/cat", "/bin/date", "/usr/bin/seq"):
            listed = subprocess.run(["ldd", program], check=True, capture_output=True, text=True).stdout.split()
            for path in [program, *(word for word in listed if word.startswith("/"))]:
                (root / path[1:]).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, root / path[1:])
        (root / "tmp").mkdir()
        self.open(root)

    def write(self) -> float:
        self.run("rm", "--force", "--ignore", "logs")
        self.run("run", "-d", "--name", "logs", "--net", "none", self.cgroup_option, "--memory", "512m", peers.IMAGE,
                 "/bin/sh", "-c", SCRIPT)  # fmt: skip
        assert self.run("wait", "logs") == "0"
        path = self.run("inspect", "--format", "{{.HostConfig.LogConfig.Path}}", "logs")
        errors = subprocess.run(["grep", " stderr F ", path], check=True, capture_output=True, text=True).stdout
        return rate([line.split()[-1] for line in errors.splitlines()])

    def read(self) -> float:
        """Read the begin of the last container's log."""
        begin = time.perf_counter()
        count = _count_lines(["sh", "-c", 'n=$1; shift; "$@" 2>/dev/null | head -n $n', "sh", str(PEER_READ_LINES),
                              *self.command, "logs", "--timestamps", "logs"])  # fmt: skip
        assert count == PEER_READ_LINES, count
        return PEER_READ_LINES * LINE_BYTES / (time.perf_counter() - begin) / 1e6


def _count_lines(command: list[str], environment: dict[str, str] | None = None) -> int:
    reading = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)
    counted = subprocess.run(["wc", "-l"], stdin=reading.stdout, check=True, capture_output=True, text=True)
    assert reading.stdout is not None
    reading.stdout.close()
    assert reading.wait() == 0
    return int(counted.stdout)


def measure(rounds: int) -> list[Row]:
    """Return the rows `log_write` and `log_read`."""
    with node() as lab, tempfile.TemporaryDirectory(prefix=f"hostd-bench-{os.getpid()}-") as name:
        lab.settings["HOSTD_LOG_SEGMENT_BYTES"] = str(2**30)
        lab.up()
        ours, peer = Ours(lab), Podman(Path(name) / "podman")
        try:
            peer.fill()
            wrote = interleave({"ours": ours.write, "podman": peer.write}, rounds)
            read = interleave({"ours": ours.read, "podman": peer.read}, rounds)
        finally:
            peer.close()
    return [
        row("log_write", wrote["ours"], wrote["podman"], "podman (conmon)", "MB/s", rounds),
        row("log_read", read["ours"], read["podman"], "podman logs", "MB/s", rounds),
    ]


if __name__ == "__main__":
    print(show(measure(int(next(iter(sys.argv[1:]), "3")))))
