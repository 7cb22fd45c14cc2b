"""A machine of its own for the walkthrough: a network namespace with a way out, and every path its own.

`make up` runs inside it exactly as a user would run it, only told by the environment to keep its
files, bridge, cgroups and rules apart, so that it passes beside a running node without touching it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
COMMAND_TIMEOUT_S = 600.0


def sh(*command: str, check: bool = True, timeout_s: float = 60.0) -> str:
    run = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    if check and run.returncode:
        raise AssertionError(f"{' '.join(command)}: {run.returncode}\n{run.stdout}{run.stderr}")
    return run.stdout


@dataclass(frozen=True)
class Done:
    """A command that ended; `text` is what it printed on both streams."""

    status: int
    out: str
    err: str

    @property
    def text(self) -> str:
        return self.out + self.err


def wait_until(what: str, probe: Callable[[], object], deadline_s: float = 30.0) -> float:
    """Wait until `probe` is true and return how long it took; its own AssertionErrors count as not yet."""
    begin = time.monotonic()
    last: object = None
    while time.monotonic() - begin < deadline_s:
        try:
            last = probe()
        except AssertionError as error:
            last = error
        else:
            if last:
                return time.monotonic() - begin
        time.sleep(0.05)
    raise AssertionError(f"not within {deadline_s:g} s: {what}; last: {last}")


class Lab:
    """The machine: commands run in its network with its environment."""

    def __init__(self, name: str, index: int, folder: Path) -> None:
        self.name = name
        self.folder = folder
        self.host_ip = f"198.18.{index}.2"
        self.gateway = f"198.18.{index}.1"
        self.index = index
        self.home = folder / "home"
        self.home.mkdir()
        self.bin = folder / "bin"
        self.state = folder / "state"
        self.run_dir = Path(f"/run/{name}")
        self.environment = {
            "PATH": f"{self.bin}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": str(self.home),
            "LANG": "C.UTF-8",
            "TERM": "xterm",
            "HOSTD_PREFIX": str(folder / "opt"),
            "HOSTD_BIN_DIR": str(self.bin),
            "HOSTD_NO_SYSTEMD": "1",
            "HOSTD_IS_KEPT": "false",  # what a test kills is to stay dead
            "HOSTD_STATE_DIR": str(self.state),
            "HOSTD_RUN_DIR": str(self.run_dir),
            "HOSTD_BRIDGE": f"hte{index}",
            "HOSTD_SUBNET": f"100.101.{index * 4}.0/22",
            "HOSTD_NAT_NAME": f"hostd_e2e_{index}",
            "HOSTD_CGROUP_PARENT": name,
            "HOSTD_HOST_ID": "lab",
            "GIT_CONFIG_GLOBAL": str(self.home / ".gitconfig"),
            "GIT_SSH_COMMAND": f"ssh -F {self.home}/.ssh/config",
            **{k: v for k, v in os.environ.items() if k.endswith("_CERTS") or k.lower().endswith("_proxy")},
            **{k: os.environ[k] for k in ("SSL_CERT_FILE", "PIP_CERT", "REQUESTS_CA_BUNDLE") if k in os.environ},
        }

    def start(
        self, *command: str, cwd: Path | None = None, environment: Mapping[str, str] | None = None, **more: object
    ) -> subprocess.Popen[str]:
        inside = ["nsenter", f"--net=/run/netns/{self.name}", "--", *command]
        env = {**self.environment, **(environment or {})}
        return subprocess.Popen(inside, cwd=cwd or self.folder, env=env, text=True, **more)  # type: ignore[call-overload, no-any-return]

    def try_run(
        self,
        *command: str,
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
        stdin: str = "",
        timeout_s: float = COMMAND_TIMEOUT_S,
    ) -> Done:
        process = self.start(
            *command,
            cwd=cwd,
            environment=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        try:
            out, err = process.communicate(stdin, timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            raise AssertionError(f"{' '.join(command)}: not done in {timeout_s:g} s\n{out}{err}") from None
        print(f"$ {' '.join(command)}\n{out}{err}", file=sys.stderr)
        return Done(process.returncode, out, err)

    def run(self, *command: str, **more: object) -> Done:
        done = self.try_run(*command, **more)  # type: ignore[arg-type]
        assert done.status == 0, f"{' '.join(command)}: {done.status}\n{done.text}"
        return done

    def make(self, target: str, **environment: str) -> Done:
        return self.try_run("make", "-C", str(ROOT), "--no-print-directory", target, environment=environment)

    def curl(self, host: str, path: str = "/", *options: str) -> Done:
        url = f"http://{self.host_ip}{path}"
        return self.try_run("curl", "-sS", "-m", "20", "-H", f"Host: {host}", *options, url)

    def status_of(self, host: str, path: str = "/") -> int:
        return int(self.curl(host, path, "-o", "/dev/null", "-w", "%{http_code}").out or 0)


def rules(netns: str = "") -> dict[str, str]:
    """Return what the kernel holds of networks: links and both kinds of firewall, of a namespace or of ours."""
    inside = ["nsenter", f"--net=/run/netns/{netns}", "--"] if netns else []
    found = {"link": sh(*inside, "ip", "-br", "link"), "addr": sh(*inside, "ip", "-br", "addr")}
    found["route"] = sh(*inside, "ip", "route")
    found["nft"] = sh(*inside, "nft", "list", "ruleset")
    for flavour in ("legacy", "nft"):
        for table in ("filter", "nat", "mangle"):
            found[f"iptables-{flavour} {table}"] = sh(*inside, f"iptables-{flavour}", "-t", table, "-S", check=False)
    listening = sh(*inside, "ss", "-Hltnu")
    found["listening"] = "\n".join(sorted(" ".join(line.split()[:5]) for line in listening.splitlines()))
    return found


def cgroups() -> list[Path]:
    """Return all cgroups but those that are not ours to look at; they may come and go meanwhile (glob would raise)."""
    return [Path(path) for path, _, _ in os.walk("/sys/fs/cgroup") if "process_api" not in path]


def machine(marks: Sequence[str]) -> dict[str, str]:
    """Return what the machine holds beside networks: named namespaces, mounts, cgroups, processes with our marks."""

    def ours(text: str) -> str:
        """Leave out what other tests and labs have, which come and go on a shared machine."""
        others = re.compile(r"hostd[-_](?:e2e|test|bench)[-_]")

        def is_ours(line: str) -> bool:
            return any(mark in line for mark in marks) or not others.search(line)

        return "\n".join(sorted(line for line in text.splitlines() if is_ours(line)))

    processes = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                words = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
            except OSError:
                continue
            if any(mark.encode() in words for mark in marks):
                processes.append(words[:300].replace(b"\0", b" ").decode("utf-8", "replace"))
    return {
        "netns": ours("\n".join(line.split()[0] for line in sh("ip", "netns").splitlines())),
        "mounts": ours(Path("/proc/mounts").read_text()),
        "cgroups": ours("\n".join(map(str, cgroups()))),
        "processes": "\n".join(sorted(processes)),
    }


def take_index(netns: str) -> int:
    """Make the lab's link to the outside under the first number that nobody has (the kernel decides races)."""
    for index in range(1, 64):
        made = subprocess.run(
            ["ip", "link", "add", f"hte{index}o", "type", "veth", "peer", "name", "eth0", "netns", netns],
            capture_output=True,
            text=True,
        )
        if made.returncode == 0:
            return index
    raise AssertionError(f"no number is free for a lab: {made.stderr}")


@contextmanager
def make_lab(suffix: str = "") -> Iterator[Lab]:
    """Make the machine and remove it again, whatever happened inside; a second one needs a suffix."""
    name = f"hostd-e2e-{os.getpid()}{suffix}"
    sh("ip", "netns", "add", name)
    folder = Path(tempfile.mkdtemp(prefix="hostd-e2e-", dir="/var/tmp"))
    forward = Path("/proc/sys/net/ipv4/ip_forward")
    before = forward.read_text()
    table = name.replace("-", "_") + "_out"
    lab: Lab | None = None
    try:
        lab = Lab(name, take_index(name), folder)
        outside = f"hte{lab.index}o"
        sh("ip", "addr", "add", f"{lab.gateway}/30", "dev", outside)
        sh("ip", "link", "set", outside, "up")
        for command in (
            ("addr", "add", f"{lab.host_ip}/30", "dev", "eth0"),
            ("link", "set", "eth0", "up"),
            ("link", "set", "lo", "up"),
            ("route", "add", "default", "via", lab.gateway),
        ):
            sh("ip", "-n", name, *command)
        forward.write_text("1")
        sh("nft", f"add table ip {table}")
        sh("nft", f"add chain ip {table} post {{ type nat hook postrouting priority 100 ; }}")
        sh("nft", f"add rule ip {table} post ip saddr {lab.host_ip} masquerade")
        yield lab
    finally:
        if lab is not None and (lab.bin / "hostd").exists():
            lab.try_run("hostd", "down")
        sh("nft", f"delete table ip {table}", check=False)
        if lab is not None:
            sh("ip", "link", "del", f"hte{lab.index}o", check=False)
        if not list(Path("/sys/class/net").glob("hte*o")):  # else another lab still needs it
            forward.write_text(before)
        sh("ip", "netns", "del", name, check=False)
        shutil.rmtree(folder, ignore_errors=True)
        if lab is not None:
            shutil.rmtree(lab.run_dir, ignore_errors=True)
