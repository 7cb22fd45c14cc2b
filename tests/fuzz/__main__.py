"""`python -m tests.fuzz TARGET --seconds 600`: see `harness`."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import shlex
import sys
import tempfile
from pathlib import Path

from tests.fuzz.harness import HERE, Session, Target, replay, search, search_by_coverage

TARGETS = {
    "layers": "images:LayerTars",
    "archives": "images:Archives",
    "documents": "images:Documents",
    "specs": "inputs:JobSpecs",
    "frames": "inputs:AttachFrames",
    "spawner": "spawner:Messages",
    "dns": "stored:DnsQueries",
    "etcd": "stored:EtcdRequests",
    "services": "stored:ServiceDocuments",
    "stored": "stored:StoredBytes",
    "peers": "spoken:PeerMessages",
    "streams": "spoken:Streams",
}
MODULES = {
    "layers": ("rootfs", "tarfile"),
    "archives": ("rootfs", "tarfile"),
    "documents": ("rootfs",),
    "specs": ("hostd", "rootfs"),
    "frames": ("discovery.wire",),
    "dns": ("discovery", "dns"),
    "etcd": ("discovery",),
    "services": ("discovery",),
    "stored": ("discovery",),
    "peers": ("discovery",),
    "streams": ("discovery",),
}
"""What is watched for coverage; has to be known before it is imported."""
_BOXED = "HOSTD_FUZZ_BOXED"


def target_of(name: str) -> Target:
    module, _, kind = TARGETS[name].partition(":")
    made: Target = getattr(importlib.import_module(f"tests.fuzz.{module}"), kind)()
    return made


def box(findings: Path) -> None:
    """Go on in namespaces of our own, with everything but /run and /dev/shm read-only: what is fuzzed runs as root."""
    if os.environ.get(_BOXED):
        return
    findings.mkdir(parents=True, exist_ok=True)
    script = (
        f"mount --make-rprivate / && d={shlex.quote(str(findings))} && mount --bind $d $d && ip link set lo up;"
        " mount -t tmpfs tmpfs /run && mount -t tmpfs tmpfs /dev/shm;"
        " mount -o remount,bind,ro / && for d in /sys /sys/fs/cgroup/*; do mount -o remount,bind,ro $d; done 2>/dev/null;"
        ' exec "$@"'
    )
    command = ["unshare", "-m", "-u", "-i", "-n", "-p", "-f", "--kill-child", "--mount-proc", "sh", "-c", script, "sh"]
    os.execvpe("unshare", [*command, sys.executable, "-m", "tests.fuzz", *sys.argv[1:]], os.environ | {_BOXED: "1"})


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("target", choices=sorted(TARGETS))
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--findings", type=Path, default=HERE / "findings")
    parser.add_argument("--replay", action="store_true", help="only the seeds and the kept corpus")
    parser.add_argument("--one", type=Path, help="only this input")
    parser.add_argument("--plain", action="store_true", help="without atheris even if it is there")
    given = parser.parse_args()
    if given.target == "spawner":
        box(given.findings.absolute())
    has_coverage = importlib.util.find_spec("atheris") is not None and not given.plain and given.target != "spawner"
    if has_coverage and not (given.replay or given.one):
        import atheris

        with atheris.instrument_imports(include=list(MODULES[given.target])):
            target = target_of(given.target)
    else:
        target = target_of(given.target)
    target.open()
    try:
        if given.one:
            print(target.run(given.one.read_bytes()))
            return 0
        if given.replay:
            print(f"{given.target}: {replay(given.target, target)} inputs, nothing found")
            return 0
        session = Session(given.target, target, given.findings)
        if has_coverage:
            search_by_coverage(session, given.seconds, given.seed, Path(tempfile.mkdtemp(prefix="fuzz-corpus-")))
        search(session, given.seconds, given.seed)
        print(f"{given.target}: {session.report()}")
        return 1 if session.findings else 0
    finally:
        target.close()


if __name__ == "__main__":
    sys.exit(main())
