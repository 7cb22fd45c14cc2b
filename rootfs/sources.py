"""Reads from which archive this machine installs Debian, so that images come from the same one.

Only Debian's own suites count: the machine's release, its updates and its security updates, with `main`. What
other vendors add to `/etc/apt` is skipped, told by suite, key and (where apt has it) the archive's stated origin.
Nothing here names an archive. apt's proxy and CA settings are passed on. Called by `rootfs.images`.

Source: sources.list(5), apt.conf(5), os-release(5).
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rootfs.errors import BuildFailed

_ONE_LINE = re.compile(r"deb\s+(?:\[(?P<options>[^\]]*)\]\s+)?(?P<uri>\S+)\s+(?P<suite>\S+)\s+(?P<components>.+)")
_PASSED_ON = re.compile(r"Acquire::(https?::.*|Retries|ForceIPv[46]) ", re.IGNORECASE)


@dataclass(frozen=True)
class Source:
    """One suite of one archive."""

    uri: str
    suite: str
    components: tuple[str, ...]
    signed_by: str = ""

    def line(self) -> str:
        """Say it as one line of sources.list, with `main` only."""
        options = f"[signed-by={self.signed_by}] " if self.signed_by else ""
        return f"deb {options}{self.uri} {self.suite} main"


def codename(os_release: Path = Path("/etc/os-release")) -> str:
    """Return the machine's Debian release, such as `bookworm`.

    Raises:
        BuildFailed: the machine does not run Debian.
    """
    fields = dict(line.split("=", 1) for line in os_release.read_text().splitlines() if "=" in line)
    if fields.get("ID", "").strip('"') != "debian" or "VERSION_CODENAME" not in fields:
        raise BuildFailed("images are built on Debian", hint="run this on Debian 12 or newer")
    return fields["VERSION_CODENAME"].strip('"')


def debian_sources(suite: str, apt: Path = Path("/etc/apt"), lists: Path = Path("/var/lib/apt/lists")) -> list[Source]:
    """Return Debian's own sources of this machine, in its order.

    Raises:
        BuildFailed: the release itself is not among them.
    """
    suites = (suite, f"{suite}-updates", f"{suite}-security", f"{suite}/updates")
    found: list[Source] = []
    for source in _all(apt):
        is_wanted = source.suite in suites and "main" in source.components and _is_debians(source, lists)
        if is_wanted and source not in found:
            found.append(source)
    if not any(source.suite == suite for source in found):
        raise BuildFailed(
            f"apt on this machine knows no archive with {suite} main",
            hint=f"add Debian's {suite} to /etc/apt/sources.list, then `apt-get update`",
        )
    return found


def _is_debians(source: Source, lists: Path) -> bool:
    if source.signed_by and not Path(source.signed_by).name.startswith("debian-archive-"):
        return False
    stem = re.sub(r"^[a-z+]+://", "", source.uri).strip("/").replace("/", "_")
    for name in ("InRelease", "Release"):
        path = lists / f"{stem}_dists_{source.suite.replace('/', '_')}_{name}"
        if path.is_file():
            return re.search(r"^Origin: Debian$", path.read_text(errors="replace"), re.MULTILINE) is not None
    return True


def _all(apt: Path) -> Iterator[Source]:
    one_line = [apt / "sources.list", *sorted((apt / "sources.list.d").glob("*.list"))]
    for path in one_line:
        if path.is_file():
            yield from _read_one_line(path.read_text())
    for path in sorted((apt / "sources.list.d").glob("*.sources")):
        yield from _read_deb822(path.read_text())


def _read_one_line(text: str) -> Iterator[Source]:
    for line in text.splitlines():
        match = _ONE_LINE.fullmatch(line.split("#")[0].strip())
        if match:
            options = dict(part.split("=", 1) for part in (match["options"] or "").split() if "=" in part)
            yield Source(match["uri"], match["suite"], tuple(match["components"].split()), options.get("signed-by", ""))


def _read_deb822(text: str) -> Iterator[Source]:
    for stanza in re.split(r"\n\s*\n", text):
        fields: dict[str, str] = {}
        name = ""
        for line in stanza.splitlines():
            if line.startswith("#"):
                continue
            if line[:1].isspace():
                fields[name] = fields.get(name, "") + "\n" + line.strip()
            elif ":" in line:
                name, value = line.split(":", 1)
                name = name.lower()
                fields[name] = value.strip()
        if "deb" not in fields.get("types", "").split() or fields.get("enabled", "yes").lower() == "no":
            continue
        signed_by = fields.get("signed-by", "")
        for uri in fields.get("uris", "").split():
            for suite in fields.get("suites", "").split():
                components = tuple(fields.get("components", "").split())
                yield Source(uri, suite, components, signed_by)


def apt_options() -> list[str]:
    """Return apt's own settings for reaching archives (proxy, CA, retries), as lines of apt.conf."""
    done = subprocess.run(
        ["apt-config", "dump", "--no-empty", "--format", '%F "%v";%n', "Acquire"],
        capture_output=True,
        text=True,
        check=True,
    )
    return [line.rstrip(";") for line in done.stdout.splitlines() if _PASSED_ON.match(line)]
