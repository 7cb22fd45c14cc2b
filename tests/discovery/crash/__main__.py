"""`python -m tests.discovery.crash`: the crash test from the command line. Exit status 1 if anything was wrong."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from pathlib import Path

from tests.discovery.crash import faults, rounds
from tests.discovery.crash.arms import Arm, Ours, Shipped
from tests.discovery.crash.broken import WAYS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.discovery.crash", description=__doc__)
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--first", type=int, default=0, help="the number of the first round: its dice hang on seed and number"
    )
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--stop-at", type=int, default=10**9, help="end after so many rounds that failed")
    parser.add_argument("--story", choices=list(faults.STORIES), default="", help="tell this one in every round")
    parser.add_argument("--core", choices=["ours", "shipped"], default="ours", help="shipped: pysyncobj as it comes")
    parser.add_argument("--broken", choices=["", *WAYS], default="", help="break this on purpose, in all members")
    parser.add_argument("--reads", choices=["log", "leader"], default="log", help="how pysyncobj as shipped is read")
    parser.add_argument("--out", type=Path, default=Path("/tmp/crash-test"), help="where failing rounds are kept")
    asked = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("the crash test makes network namespaces: run it as root")
    arm: Arm = Shipped(asked.reads) if asked.core == "shipped" else Ours(broken=asked.broken)
    return asyncio.run(_run(arm, asked))


async def _run(arm: Arm, asked: argparse.Namespace) -> int:
    """Run, and clean up and say what was found so far when told to stop."""
    report = rounds.Report()
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(number, task.cancel)
    try:
        await rounds.run(
            arm,
            asked.rounds,
            asked.seed,
            asked.out,
            report,
            first=asked.first,
            clients=asked.clients,
            stop_at=asked.stop_at,
            story=asked.story,
        )
    except asyncio.CancelledError:
        print("stopped early")
    print(report.summary())
    return 0 if report.verdict.is_fine and report.counts["rounds"] == asked.rounds else 1


if __name__ == "__main__":
    sys.exit(main())
