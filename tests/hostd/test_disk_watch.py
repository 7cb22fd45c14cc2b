"""Whose disk is written much, by the kernel's counts alone."""

from __future__ import annotations

from hostd.disk_watch import HEAVY_BYTES, DiskWatch, written_bytes
from hostd.runtime.disks import DiskUsage

DISKSTATS = """\
 254       0 vda 138214 2 8563154 58914 5031364 6037 181126770 3093108 0 1289392 3152023 0 0 0 0 0 0
   7       0 loop0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0
   7      12 loop12 101 0 1234 14 700 10 2048 33 0 16 47 0 0 0 0 0 0
"""


class Devices:
    """Jobs `a` and `b` have disks; the others have none."""

    def usage(self, job_id: str) -> DiskUsage | None:
        return None

    def device(self, job_id: str) -> str:
        return {"a": "7:1", "b": "7:2"}.get(job_id, "")

    def go_direct(self, job_id: str) -> None:
        raise AssertionError("only `run` does that")


def test_only_loop_devices_that_were_written_are_read() -> None:
    assert written_bytes(DISKSTATS) == {"7:12": 2048 * 512}


def test_much_is_counted_from_when_a_job_was_first_seen_and_told_once() -> None:
    watch = DiskWatch(Devices(), lambda job_id, text: None)
    earlier = 5 * HEAVY_BYTES  # by a job that had the device before
    jobs = {"a", "b", "none"}
    assert watch.heavy(jobs, {"7:1": earlier}) == []
    assert watch.heavy(jobs, {"7:1": earlier + HEAVY_BYTES - 1, "7:2": 1}) == []
    assert watch.heavy(jobs, {"7:1": earlier + HEAVY_BYTES, "7:2": 1}) == ["a"]
    assert watch.heavy(jobs, {"7:1": earlier + 9 * HEAVY_BYTES, "7:2": HEAVY_BYTES}) == ["b"]
    assert watch.heavy({"b"}, {}) == []
    assert watch.heavy({"a", "b"}, {"7:1": earlier}) == []  # another job of that name: it begins anew
