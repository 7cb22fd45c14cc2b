"""The settings of one hostd, and the paths that follow from them.

Read once, by `daemon` and `cli`; everything below receives values. Several nodes on one machine
differ in `state_dir`, `run_dir`, `bridge`, `subnet`, `nat_name`, `cgroup_parent` and `host_id`.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from discovery.wire import config
from discovery.wire.config import Setting
from discovery.wire.errors import Invalid, Unavailable

DEFAULT_FILE = Path("/etc/hostd/hostd.toml")
DEFAULT_RUN_DIR = Path("/run/hostd")
ANY_ADDRESS = "0.0.0.0"  # noqa: S104 — compared, not bound
_UNIX_PATH_MAX = 107
LEAN_MALLOC = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_TRIM_THRESHOLD_": "131072",
    "MALLOC_MMAP_THRESHOLD_": "65536",
}
"""How our daemons give memory back: without it hostd keeps 16 MiB more after unpacking an image (measured)."""
NO_AUTHORITIES = {"SSL_CERT_FILE": os.devnull, "SSL_CERT_DIR": os.devnull}
"""For whoever imports aiohttp, which loads the world's certificate authorities meanwhile: 1.7 MiB (measured)."""


def _name(text: str) -> str:
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,31}", text):
        raise ValueError("1 to 32 of a-z 0-9 - _")
    return text


def _nat_name(text: str) -> str:
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,14}", text):
        raise ValueError("1 to 15 of a-z 0-9 _, a letter first")
    return text


def _host_id(text: str) -> str:
    if text and not re.fullmatch(r"[a-z0-9]{1,32}", text):
        raise ValueError("1 to 32 of a-z 0-9, no dashes")
    return text


def _bridge(text: str) -> str:
    if not re.fullmatch(r"[a-z][a-z0-9]{0,9}", text):
        raise ValueError("1 to 10 of a-z 0-9, a letter first (the kernel allows 15, our links add a suffix)")
    return text


def _subnet(text: str) -> str:
    network = ipaddress.IPv4Network(text)
    if not 16 <= network.prefixlen <= 28:
        raise ValueError("a network of /16 to /28")
    return str(network)


def _address(text: str) -> str:
    return str(ipaddress.IPv4Address(text)) if text else ""


def _backend(text: str) -> str:
    if text not in ("auto", "nft", "legacy"):
        raise ValueError("auto, nft or legacy")
    return text


def _listen(text: str) -> str:
    host, colon, port = text.rpartition(":")
    if text:
        ipaddress.ip_address(host.strip("[]"))
        if not colon or not 0 <= int(port) <= 65535:
            raise ValueError("ADDRESS:PORT")
    return text


def _store_listen(text: str) -> str:
    host, _, port = text.rpartition(":")
    if text and not 0 < int(port) <= 65535:
        raise ValueError("gateway:PORT or IPv4:PORT")
    if text and host != "gateway":
        ipaddress.IPv4Address(host)
    return text


def _port(text: str) -> int:
    number = int(text)
    if not 1 <= number <= 65535:
        raise ValueError("1 to 65535")
    return number


def _count(text: str) -> int:
    number = int(text)
    if not 0 <= number <= 1_000_000:
        raise ValueError("0 to 1000000")
    return number


def _size(text: str) -> int:
    number = int(text)
    if number < 4096:
        raise ValueError("at least 4096 bytes")
    return number


def _percent(text: str) -> int:
    number = int(text)
    if not 1 <= number <= 100:
        raise ValueError("1 to 100")
    return number


def _seconds(text: str) -> float:
    number = float(text)
    if not 0 <= number <= 366 * 86400:
        raise ValueError("0 to a year, in seconds")
    return number


SETTINGS: tuple[Setting, ...] = (
    Setting("state_dir", "/var/lib/hostd", str, "what survives a reboot: records, images, layers, volumes, logs"),
    Setting("run_dir", str(DEFAULT_RUN_DIR), str, "sockets and pid files of the running daemon"),
    Setting("cache_dir", "/var/cache/hostd/images", str, "what image builds keep between runs"),
    Setting("host_id", "", _host_id, "this host's name in the cluster; empty takes the machine's hostname"),
    Setting("host_ip", "", _address, "the address that others reach this host at; empty asks the default route"),
    Setting("bridge", "hostd0", _bridge, "the bridge that jobs hang on"),
    Setting("subnet", "100.100.0.0/22", _subnet, "the addresses of jobs; the first is the gateway"),
    Setting("nat_backend", "auto", _backend, "nft, legacy (python-iptables), or auto"),
    Setting("nat_name", "hostd", _nat_name, "name of our nftables table, or prefix of our iptables chains"),
    Setting("cgroup_parent", "hostd", _name, "our directory under each cgroup controller"),
    Setting("api_listen", "", _listen, "ADDRESS:PORT of the API for holders of a certificate; empty: not over TCP"),
    Setting("port_low", 55000, _port, "lowest port given to a job that asks for any"),
    Setting("port_high", 65535, _port, "highest port given to a job"),
    Setting("default_registry", "", str, "the registry of images whose name does not say one; empty: none"),
    Setting("raft_address", "127.0.0.1:4001", str, "where discovery's Raft listens"),
    Setting("discovery_members", "", str, "https://HOST:PORT,… of the store's members: follow them, without a vote"),
    Setting("discovery_ca", "", str, "the authority that those members' certificates are from"),
    Setting("discovery_cert", "", str, "this host's certificate for them, with its key, of unit host"),
    Setting(
        "discovery_listen",
        "gateway:1111",
        _store_listen,
        "ADDRESS:PORT of the store for holders of a certificate; gateway: the bridge's, for jobs with a grant only; "
        "0.0.0.0: for other hosts, too; empty: nowhere",
    ),
    Setting("has_discovery", True, config.to_bool, "start discovery on this host (tests without it turn it off)"),
    Setting("is_kept", True, config.to_bool, "a daemon that `hostd up` started is started again when it is killed"),
    Setting("netns_pool", 4, _count, "network namespaces kept ready for the next jobs"),
    Setting("temp_disk_pool", 4, _count, "temp disks kept ready for the next jobs; 0: no disks, jobs write unbounded"),
    Setting("starts_max", 4, _count, "jobs that may be starting at the same time"),
    Setting("log_segment_bytes", 16 * 1024 * 1024, _size, "a job's log keeps its newest two segments of this size"),
    Setting("ended_keep_count", 100, _count, "ended jobs that stay listed, newest first"),
    Setting("gc_layer_keep_s", 86400.0, _seconds, "seconds for which an unpacked layer stays that nobody needs"),
    Setting("gc_disk_high_percent", 85, _percent, "above this use of the disk, unused layers, logs and images go"),
    Setting("gc_disk_low_percent", 75, _percent, "and they go until its use is below this"),
    Setting("ended_keep_s", 3600.0, _seconds, "seconds for which every ended job stays listed"),
)


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """The settings' values, checked; see `SETTINGS` for what each means."""

    state_dir: Path
    run_dir: Path
    cache_dir: Path
    host_id: str
    host_ip: str
    bridge: str
    subnet: str
    nat_backend: str
    nat_name: str
    cgroup_parent: str
    api_listen: str
    port_low: int
    port_high: int
    default_registry: str
    raft_address: str
    discovery_members: str
    discovery_ca: str
    discovery_cert: str
    discovery_listen: str
    has_discovery: bool
    is_kept: bool
    netns_pool: int
    temp_disk_pool: int
    starts_max: int
    log_segment_bytes: int
    ended_keep_count: int
    ended_keep_s: float
    gc_layer_keep_s: float
    gc_disk_high_percent: int
    gc_disk_low_percent: int

    @property
    def gateway(self) -> str:
        """Return the bridge's own address: the first of the subnet."""
        return str(ipaddress.IPv4Network(self.subnet)[1])

    @property
    def discovery_api(self) -> str:
        """Return the ADDRESS:PORT where discovery listens for holders of a certificate; empty: nowhere."""
        if not self.has_discovery or self.discovery_members or not self.discovery_listen:
            return ""
        host, _, port = self.discovery_listen.rpartition(":")
        return f"{self.gateway}:{port}" if host == "gateway" else self.discovery_listen

    @property
    def store_url(self) -> str:
        """Return where jobs of this host find the store, if their spec grants any of it; empty: nowhere."""
        return f"https://{self.store_address}" if self.store_address else ""

    @property
    def store_address(self) -> str:
        """Return the ADDRESS:PORT of `store_url`; empty: nowhere."""
        host, _, port = self.discovery_api.rpartition(":")
        return f"{self.gateway if host == ANY_ADDRESS else host}:{port}" if port else ""

    @property
    def guarded_ports(self) -> tuple[int, ...]:
        """Return the ports of hosts' APIs that no job may reach: ours (taken to be the others' too), the members'."""
        addresses = (self.discovery_listen, self.api_listen, *self.discovery_members.split(","))
        ports = (address.strip().rstrip("/").rpartition(":")[2] for address in addresses)
        return tuple(sorted({int(port) for port in ports if port.isdigit() and port != "0"}))

    @property
    def api_socket(self) -> Path:
        return self.run_dir / "api" / "hostd.sock"

    @property
    def discovery_socket(self) -> Path:
        return self.run_dir / "discovery" / "discovery.sock"

    @property
    def spawner_socket(self) -> Path:
        return self.run_dir / "spawner.sock"

    @property
    def pid_file(self) -> Path:
        return self.run_dir / "hostd.pid"

    @property
    def keeper_file(self) -> Path:
        """Return where the pid of the daemon's keeper is, if `hostd up` started one."""
        return self.state_dir / "keeper.pid"

    @property
    def daemon_log(self) -> Path:
        """Return where the daemon's own log goes when no supervisor collects it."""
        return self.state_dir / "hostd.log"

    @property
    def database(self) -> Path:
        return self.state_dir / "hostd.db"

    @property
    def logs_dir(self) -> Path:
        return self.state_dir / "logs"

    @property
    def volumes_dir(self) -> Path:
        return self.state_dir / "volumes"

    @property
    def images_dir(self) -> Path:
        return self.state_dir / "images"

    @property
    def tls_dir(self) -> Path:
        return self.state_dir / "tls"

    @property
    def registry_credentials(self) -> Path:
        """Return where `hostd image login` keeps names and passwords."""
        return self.state_dir / "registries.json"

    @property
    def discovery_state_dir(self) -> Path:
        return self.state_dir / "discovery"

    def flags(self) -> list[str]:
        """Return the flags that give another process exactly these settings."""
        found = []
        for setting in SETTINGS:
            value = getattr(self, setting.name)
            found += [setting.flag, str(value).lower() if isinstance(value, bool) else str(value)]
        return found


def load(flags: Mapping[str, Any] | None = None, *, file: Path | None = None) -> Config:
    """Read the settings from file, environment (`HOSTD_…`) and flags.

    `host_ip` may still be empty; `with_host_ip` fills it when the daemon starts.

    Raises:
        Invalid: a value is nonsense, an unknown key is in the file, or paths are too long for a socket.
    """
    chosen = file or Path(os.environ.get("HOSTD_CONFIG", str(DEFAULT_FILE)))
    values = config.load(SETTINGS, prefix="HOSTD", file=chosen, flags=flags)
    values["host_id"] = values["host_id"] or machine_host_id()
    for name in ("state_dir", "run_dir", "cache_dir"):
        values[name] = Path(values[name]).absolute()
    try:
        read = msgspec.convert(values, Config, strict=False)
    except msgspec.ValidationError as error:
        raise Invalid(f"settings: {error}") from error
    if read.port_low > read.port_high:
        raise Invalid(f"port_low {read.port_low} is above port_high {read.port_high}")
    if len(str(read.discovery_socket)) > _UNIX_PATH_MAX:
        raise Invalid(f"run_dir {read.run_dir} is too long", hint="socket paths have at most 107 bytes")
    return read


def machine_host_id() -> str:
    """Return the machine's hostname without what a host id may not have."""
    return re.sub(r"[^a-z0-9]", "", socket.gethostname().split(".")[0].lower())[:32] or "host"


def with_host_ip(settings: Config) -> Config:
    """Return the settings with `host_ip` filled: the source address of the default route.

    Raises:
        Unavailable: no default route says which address others would use.
    """
    if settings.host_ip:
        return settings
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # TEST-NET: nothing is sent, the kernel only picks a route
        except OSError as error:
            raise Unavailable(
                "no default route tells this host's address", hint="set host_ip in /etc/hostd/hostd.toml or --host-ip"
            ) from error
        return msgspec.structs.replace(settings, host_ip=probe.getsockname()[0])
