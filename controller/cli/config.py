"""`~/.flynnrc` (or `FLYNNRC`): which clusters there are and how to reach them, as TOML, readable by its owner only.

default = "default"

[[cluster]]
name = "default"
url = "https://controller.example.test"
key = "…"
pin = "base64 SHA-256 of the certificate"
git_address = "example.test:2222"
address = "IP to dial when the domain is not in DNS"
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import msgspec

from controller.cli.output import note
from discovery.wire.errors import AlreadyExists, Invalid, NotFound


class Cluster(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One cluster, as `cluster add` wrote it."""

    name: str
    url: str
    key: str
    pin: str = ""
    git_address: str = ""
    address: str = ""


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename={"clusters": "cluster"}):
    """All clusters; `default` names the one that is meant when none is given."""

    default: str = ""
    clusters: tuple[Cluster, ...] = ()

    def find(self, name: str) -> Cluster:
        """Return a cluster by name; empty means the default, or the only one.

        Raises:
            NotFound: there is none of that name, or none at all.
        """
        wanted = name or self.default or (self.clusters[0].name if len(self.clusters) == 1 else "")
        for cluster in self.clusters:
            if cluster.name == wanted:
                return cluster
        if not self.clusters:
            raise NotFound(
                "no cluster is configured",
                hint="paste the `flynn cluster add …` line that `hostd bootstrap` printed at its end",
            )
        known = ", ".join(cluster.name for cluster in self.clusters)
        if not wanted:
            raise NotFound("no default cluster is set", hint=f"flynn cluster default NAME; there are: {known}")
        raise NotFound(f"no cluster named {wanted!r}", hint=f"there are: {known}")

    def added(self, cluster: Cluster, *, is_default: bool, is_forced: bool) -> Config:
        """Return the configuration with `cluster`; the first one becomes the default.

        Raises:
            AlreadyExists: the name is taken and `is_forced` is off.
        """
        others = tuple(known for known in self.clusters if known.name != cluster.name)
        if len(others) < len(self.clusters) and not is_forced:
            raise AlreadyExists(f"a cluster named {cluster.name!r} exists already", hint="give -f to replace it")
        default = cluster.name if is_default or not others else self.default
        return Config(default=default, clusters=(*others, cluster))

    def removed(self, name: str) -> Config:
        """Return the configuration without a cluster; a removed default leaves none (or the only one).

        Raises:
            NotFound: there is none of that name.
        """
        self.find(name)
        return Config(
            default="" if self.default == name else self.default,
            clusters=tuple(cluster for cluster in self.clusters if cluster.name != name),
        )


def path() -> Path:
    """Return where the configuration lies."""
    return Path(os.environ.get("FLYNNRC") or Path.home() / ".flynnrc")


def load() -> Config:
    """Read the configuration; a missing file is an empty one.

    Raises:
        Invalid: it does not parse, or has unknown keys.
    """
    import tomllib

    file = path()
    try:
        config = msgspec.convert(tomllib.loads(file.read_text()), Config)
    except FileNotFoundError:
        return Config()
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.ValidationError) as error:
        raise Invalid(f"{file}: {error}", hint="fix or remove the file, then `flynn cluster add` again") from error
    except OSError as error:
        raise Invalid(f"{file} cannot be read: {error.strerror}") from error
    if config.clusters and file.stat().st_mode & 0o077:
        note(f"flynn: warning: {file} holds keys and others may read it: chmod 600 {file}")
    return config


def save(config: Config) -> None:
    """Write the configuration in one step, mode 0600.

    Raises:
        Invalid: the file cannot be written.
    """
    file = path().resolve()
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w") as stream:
            stream.write(_toml(config))
        beside.replace(file)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise Invalid(f"{file} cannot be written: {error.strerror}") from error


def _toml(config: Config) -> str:
    # JSON strings are TOML basic strings but for DEL, which no name, key or address has.
    lines = [f"default = {json.dumps(config.default)}"]
    for cluster in config.clusters:
        lines += ["", "[[cluster]]"]
        lines += [f"{name} = {json.dumps(value)}" for name, value in msgspec.structs.asdict(cluster).items() if value]
    return "\n".join(lines) + "\n"
