"""Which archives count as this machine's Debian."""

from pathlib import Path

import pytest

from rootfs import sources
from rootfs.errors import BuildFailed

DEB822 = """Types: deb
# a remark
URIs: http://archive.invalid/debian
Suites: bookworm bookworm-updates
Components: main contrib
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb deb-src
URIs: http://archive.invalid/security
Suites: bookworm-security
Components: main

Types: deb
URIs: http://vendor.invalid/apt
Suites: bookworm
Components: main
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 abc
 -----END PGP PUBLIC KEY BLOCK-----

Enabled: no
Types: deb
URIs: http://off.invalid/debian
Suites: bookworm
Components: main
"""
ONE_LINE = """# deb http://remark.invalid bookworm main
deb [arch=amd64 signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://archive.invalid/one bookworm main
deb [signed-by=/etc/apt/keyrings/vendor.gpg] http://vendor.invalid/two bookworm main
deb http://vendor.invalid/three bookworm stable
deb http://vendor.invalid/four cloud-bookworm main
deb http://unkeyed.invalid/five bookworm main
deb-src http://archive.invalid/one bookworm main
"""


@pytest.fixture
def apt(tmp_path: Path) -> Path:
    (tmp_path / "sources.list.d").mkdir()
    return tmp_path


def found(apt: Path, lists: Path | None = None) -> list[tuple[str, str]]:
    return [(each.uri, each.suite) for each in sources.debian_sources("bookworm", apt, lists or apt / "lists")]


def test_deb822_gives_release_updates_and_security(apt: Path) -> None:
    (apt / "sources.list.d/debian.sources").write_text(DEB822)
    assert found(apt) == [
        ("http://archive.invalid/debian", "bookworm"),
        ("http://archive.invalid/debian", "bookworm-updates"),
        ("http://archive.invalid/security", "bookworm-security"),
    ]
    lines = [each.line() for each in sources.debian_sources("bookworm", apt, apt / "lists")]
    key = "/usr/share/keyrings/debian-archive-keyring.gpg"
    assert lines[0] == f"deb [signed-by={key}] http://archive.invalid/debian bookworm main"
    assert lines[2] == "deb http://archive.invalid/security bookworm-security main"


def test_one_line_sources_of_vendors_are_skipped(apt: Path) -> None:
    (apt / "sources.list").write_text(ONE_LINE)
    assert found(apt) == [("http://archive.invalid/one", "bookworm"), ("http://unkeyed.invalid/five", "bookworm")]


def test_archive_that_says_it_is_another_one_is_skipped(apt: Path) -> None:
    (apt / "sources.list").write_text(ONE_LINE)
    lists = apt / "lists"
    lists.mkdir()
    (lists / "unkeyed.invalid_five_dists_bookworm_InRelease").write_text("Origin: vendor\nSuite: bookworm\n")
    (lists / "archive.invalid_one_dists_bookworm_InRelease").write_text("Origin: Debian\nSuite: stable\n")
    assert found(apt, lists) == [("http://archive.invalid/one", "bookworm")]


def test_machine_without_its_own_release_is_told(apt: Path) -> None:
    (apt / "sources.list").write_text("deb http://vendor.invalid bookworm-updates main\n")
    with pytest.raises(BuildFailed, match="bookworm"):
        found(apt)


def test_codename_needs_debian(tmp_path: Path) -> None:
    path = tmp_path / "os-release"
    path.write_text('ID=debian\nVERSION_CODENAME=bookworm\nNAME="Debian GNU/Linux"\n')
    assert sources.codename(path) == "bookworm"
    path.write_text("ID=fedora\n")
    with pytest.raises(BuildFailed):
        sources.codename(path)
