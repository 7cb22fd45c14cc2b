"""Run tests in a Debian virtual machine of its own kernel, systemd and cgroup v2: `make test-vm`.

    python -m tests.vm [--part NAME] [--memory-mib N] [--monitor PATH] [--shell COMMAND | pytest arguments...]

The machine is emulated in software (no KVM needed), so everything in it takes about ten times as long. Its root is
built once with mmdebstrap from this machine's own Debian sources and cached by the list of its packages; this
checkout, its virtual environment and the images of the cache go in on a second disk, at the same paths as here.
The virtual machine has no network and writes to nothing of ours. Needs root and an image cache (`make images`).
Ends with the status of pytest; 70 when the virtual machine itself failed.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rootfs import sources

ROOT = Path(__file__).parents[2]
CACHE = Path("/var/cache/hostd/vm")
IMAGES = Path("/var/cache/hostd/images")
FAILED = 70
SLOW = {"HOSTD_TEST_SLOWNESS": "3"}
"""Deadlines of tests are multiplied by it: every instruction is emulated."""
EVERYTHING = (
    "tests/hostd",
    "tests/netns",
    "tests/rootfs/test_mounts.py",
    "tests/rootfs/test_unpack.py",
    "tests/rootfs/test_layers.py",
)
"""What has to do with the kernel, as far as it needs root: the rest is the same everywhere, only ten times as slow."""
LEFT_OUT = {
    "tests/hostd/test_fault_points.py": "a node for each of 99 kills, an hour here; name it to run it",
    "tests/hostd/test_rounds.py": "35 restarts beside twelve jobs, half an hour here; name it to run it",
}
"""What of it is not run unless it is asked for, and why."""
STORY = "tests/vm/test_systemd.py"
PARTS = {
    "isolation": tuple(f"tests/hostd/{name}" for name in ("escape", "test_default_job.py", "test_users.py")),
    "kernel": (
        *(f"tests/hostd/test_{name}.py" for name in ("spawner", "adoption", "cgroup", "process", "exec", "network")),
        *EVERYTHING[1:],
    ),
    "jobs": (),
    "story": (STORY,),
}
"""What may be run by itself, for somebody without the hour that all takes; `jobs` is what is in no other part."""
CLOCK = ("-smp", "1", "-icount", "shift=1,sleep=on")
"""Two nanoseconds pass for each instruction: however busy the host is, no deadline inside comes too early. One
processor, because with two that clock would have them take turns, at a tenth of the speed."""
CPU = "max,-erms,-fsrm"
"""Without the fast string instructions, which are the slow ones here: they are emulated byte by byte."""
PACKAGES = (
    "systemd systemd-sysv dbus udev kmod initramfs-tools linux-image-cloud-amd64 python3 python3-venv "
    "nftables iptables iproute2 tini zstd libseccomp2 golang-github-containers-common ca-certificates e2fsprogs "
    "git openssh-client openssl procps util-linux curl mmdebstrap strace gcc libc6-dev"
).split()
DISK = Path(__file__).with_name("disk")
"""What is laid over the root that mmdebstrap makes."""
UNITS = {"vm-payload.service": "local-fs.target", "vm-tests.service": "multi-user.target"}


class Failed(Exception):
    """The virtual machine could not be made or run."""


def key() -> str:
    """Return what the root disk is made from, as a name."""
    laid_over = [f"{path.relative_to(DISK)}\n{path.read_text()}" for path in sorted(DISK.rglob("*")) if path.is_file()]
    text = "\n".join([*PACKAGES, *laid_over, sources.codename()])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def build(say: bool = True) -> Path:
    """Make the root disk, its kernel and its initrd unless they are there; return their folder.

    Raises:
        Failed: mmdebstrap or mkfs failed, with its last words.
    """
    done = CACHE / key()
    if done.exists():
        return done
    if say:
        print("vm: building the root disk, which takes two minutes", flush=True)
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="new-") as name:
        folder, tree = Path(name), Path(name) / "tree"
        suite = sources.codename()
        archive = [source.line() for source in sources.debian_sources(suite)]
        _run(
            "mmdebstrap", "--variant=minbase", "--mode=root", "--format=directory",
            '--aptopt=Acquire::Languages "none"', '--aptopt=APT::Install-Recommends "false"',
            "--dpkgopt=path-exclude=/usr/share/doc/*", "--dpkgopt=path-exclude=/usr/share/locale/*",
            "--dpkgopt=path-exclude=/usr/share/man/*",
            *(f"--aptopt={line}" for line in sources.apt_options()),
            f"--include={','.join(PACKAGES)}", suite, str(tree), *archive,
        )  # fmt: skip
        shutil.copytree(DISK, tree, dirs_exist_ok=True)
        for unit, target in UNITS.items():
            wants = tree / "etc/systemd/system" / f"{target}.wants"
            wants.mkdir(parents=True, exist_ok=True)
            (wants / unit).symlink_to(f"/etc/systemd/system/{unit}")
        for what in ("vmlinuz", "initrd.img"):
            shutil.copy(next(iter(sorted((tree / "boot").glob(f"{what}-*")))), folder / what)
        _disk(folder / "root.raw", tree, "6G")
        shutil.rmtree(tree)
        folder.rename(done)
        folder.mkdir()  # for TemporaryDirectory
    return done


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Wait until no other run of ours has the machine; throw away what a killed one, or an older disk, left."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for old in CACHE.iterdir():
            if old.is_dir() and old.name != key():
                shutil.rmtree(old, ignore_errors=True)
        yield


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise Failed(f"{command[0]}: {done.returncode}\n{(done.stdout + done.stderr)[-3000:]}")


def _disk(path: Path, tree: Path, size: str) -> None:
    _run("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=1,root_owner=0:0", "-d", str(tree), str(path), size)


def payload(folder: Path, command: str, cuts_power: bool) -> Path:
    """Make the disk with this checkout, its virtual environment, and the images that tests start jobs from."""
    tree = folder / "payload"
    root = tree / "root"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, root / name)
    # compiling is what an emulated machine would do most of its time
    _run(sys.executable, "-m", "compileall", "-q", "-j", "2", str(root))
    skipped = shutil.ignore_patterns("mypy", "mypy-*", "ruff*", "state")
    shutil.copytree(ROOT / ".venv", root / ".venv", symlinks=True, ignore=skipped, copy_function=_link)
    images = tree / "images"
    images.mkdir()
    for kind in ("base", "system", "deps", "code", "tools"):
        if newest := sorted(IMAGES.glob(f"{kind}-*.tar.zst"), key=lambda path: path.stat().st_mtime)[-1:]:
            for path in IMAGES.glob(newest[0].name.removesuffix(".tar.zst") + "*"):
                _link(str(path), str(images / path.name))
            # a layer's note may bear the shorter name
            for path in IMAGES.glob(newest[0].name.split(".")[0].rsplit("-", 1)[0] + "*.json"):
                if not (images / path.name).exists():
                    _link(str(path), str(images / path.name))
    values = {"ROOT": str(ROOT), "COMMAND": command, "CUTS_POWER": "1" if cuts_power else "", **SLOW}
    (tree / "vm.env").write_text("".join(f"export {name}={shlex.quote(value)}\n" for name, value in values.items()))
    disk = folder / "payload.raw"
    _disk(disk, tree, "6G")
    return disk


def _link(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)
    return target


def boot(folder: Path, root: Path, disk: Path, memory_mib: int, monitor: str) -> int:
    """Run the machine until it powers off; print what its console says; return the status of what it ran.

    It may be reset in the middle, as if its power were cut: what it had not synced is gone, and it starts again.

    Raises:
        Failed: it ended without having said a status.
    """
    command = [
        "setpriv", "--pdeathsig", "KILL",
        "qemu-system-x86_64", "-accel", "tcg,thread=single,tb-size=1536", "-cpu", CPU, *CLOCK,
        "-m", str(memory_mib), "-nodefaults", "-display", "none", "-no-reboot", "-serial", "stdio",
        *(["-monitor", f"unix:{monitor},server,nowait"] if monitor else []),
        "-kernel", str(folder / "vmlinuz"), "-initrd", str(folder / "initrd.img"),
        "-append",
        "root=/dev/vda rw console=ttyS0 mitigations=off quiet panic=-1 systemd.show_status=false systemd.getty_auto=0",
        "-drive", f"file={root},format=qcow2,if=virtio,cache=unsafe",
        "-drive", f"file={disk},format=raw,if=virtio,cache=unsafe",
        "-device", "virtio-rng-pci",
    ]  # fmt: skip
    status = _watch(command)
    if status == _CUT:
        status = _watch(command)
    if status is None or status == _CUT:
        raise Failed("the virtual machine ended without a result")
    return status


_CUT = -1


def _watch(command: list[str]) -> int | None:
    status = None
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as vm:
        assert vm.stdout is not None
        try:
            for raw in vm.stdout:
                line = raw.decode(errors="replace").rstrip()
                print(line, flush=True)
                if "vm-tests: cut" in line:
                    status = _CUT
                elif found := re.search(r"vm-tests: status (\d+)", line):
                    status = int(found[1])
        finally:
            vm.kill()
    return status


def selection(part: str) -> list[str]:
    """Return what pytest is to run: all of it, or a part."""
    others = [path for name, paths in PARTS.items() if name not in (part, "story") for path in paths]
    paths = PARTS[part] if part else (*EVERYTHING, STORY)
    ignored = [*LEFT_OUT, *(others if part == "jobs" else ())]
    return [*(paths or EVERYTHING[:1]), "-m", "needs_root", *(f"--ignore={path}" for path in ignored)]


def main() -> int:
    """Build what is missing, boot, run, return pytest's status."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.vm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", default="", choices=["", *PARTS], help="run a part only")
    parser.add_argument("--memory-mib", type=int, default=3072, help="memory of the virtual machine")
    parser.add_argument("--monitor", default="", help="path of a socket to talk to qemu through (stop, info registers)")
    parser.add_argument("--shell", default="", help="a shell command to run instead of pytest")
    arguments, words = parser.parse_known_args()
    pytest = "python -m pytest -p no:cacheprovider -p tests.vm.telling -v --durations=25 --color=no --timeout 1200 "
    if not words and not arguments.shell:
        for path, why in LEFT_OUT.items():
            print(f"vm: left out: {path} ({why})")
        print("vm: left out: tests that need no root, for they do not care which kernel this is", flush=True)
    chosen = shlex.join(words or selection(arguments.part))
    has_story = not arguments.shell and STORY in chosen
    first = arguments.shell or pytest + chosen
    command = f"if [ $VM_TESTS_BOOT = 1 ]; then {first}; else {pytest} {STORY}; fi"
    try:
        with alone(), tempfile.TemporaryDirectory(dir=CACHE, prefix="run-") as name:
            folder = build()
            root = Path(name) / "root.qcow2"
            _run("qemu-img", "create", "-q", "-f", "qcow2", "-b", str(folder / "root.raw"), "-F", "raw", str(root))
            disk = payload(Path(name), command, has_story)
            return boot(folder, root, disk, arguments.memory_mib, arguments.monitor)
    except Failed as error:
        print(f"vm: {error}", file=sys.stderr)
        return FAILED


if __name__ == "__main__":
    sys.exit(main())
