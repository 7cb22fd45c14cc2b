"""The host's authority: made once, private, and its server certificate renews itself."""

from __future__ import annotations

import stat
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509

from discovery.wire.errors import Invalid, NotFound
from hostd.authority import Authority, authority_file, ensure_server, expiry, server_file


def test_it_is_made_once_and_only_root_may_read_it(tmp_path: Path) -> None:
    folder = tmp_path / "tls"
    first = Authority.ensure(folder)
    assert Authority.ensure(folder).certificate == first.certificate
    assert Authority.ensure(folder, is_fresh=True).certificate != first.certificate
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}


def test_many_who_make_it_at_once_make_one(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "hostd.authority", "server", str(tmp_path / "tls"), "192.0.2.1"]
    for process in [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(4)]:
        assert process.wait(30) == 0
    authority = Authority.open(tmp_path / "tls")
    made = x509.load_pem_x509_certificate(server_file(tmp_path / "tls").read_bytes())
    made.verify_directly_issued_by(authority.certificate)


def test_a_folder_without_one_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(NotFound) as refusal:
        Authority.open(tmp_path)
    assert refusal.value.hint == "hostd tls init"


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    Authority.ensure(tmp_path / "a")
    Authority.ensure(tmp_path / "b")
    (tmp_path / "b" / "ca.key").replace(tmp_path / "a" / "ca.key")
    with pytest.raises(Invalid):
        Authority.open(tmp_path / "a")
    (tmp_path / "a" / "ca.pem").write_text("nonsense")
    with pytest.raises(Invalid):
        Authority.open(tmp_path / "a")


def test_the_server_certificate_is_kept_while_it_is_good(tmp_path: Path) -> None:
    names = ["192.0.2.1", "host.example"]
    assert ensure_server(tmp_path, names)
    before = server_file(tmp_path).read_bytes()
    assert not ensure_server(tmp_path, names)
    assert server_file(tmp_path).read_bytes() == before
    assert b"PRIVATE KEY" in before


@pytest.mark.parametrize("why", ["old", "other names", "torn", "gone", "of another authority", "from the future"])
def test_the_server_certificate_is_renewed(tmp_path: Path, why: str) -> None:
    ensure_server(tmp_path, ["192.0.2.1"])
    authority, path = Authority.open(tmp_path), server_file(tmp_path)
    names, now = ["192.0.2.1"], datetime.now(UTC)
    match why:
        case "old":
            path.write_bytes(authority.server(names, days=90, begin=now - timedelta(days=61)))
        case "other names":
            names = ["192.0.2.2"]
        case "torn":
            path.write_bytes(path.read_bytes()[:100])
        case "gone":
            path.unlink()
        case "of another authority":
            path.write_bytes(Authority.make().server(names))
        case _:
            path.write_bytes(authority.server(names, begin=now + timedelta(days=1)))
    assert ensure_server(tmp_path, names)
    assert expiry(path) > now + timedelta(days=80)


def test_nothing_outlives_the_authority(tmp_path: Path) -> None:
    authority = Authority.ensure(tmp_path)
    bundle = authority.client("alice", days=3650)
    assert x509.load_pem_x509_certificate(bundle).not_valid_after_utc <= expiry(authority_file(tmp_path))


@pytest.mark.parametrize(("name", "days"), [("", 1.0), ("a\nb", 1.0), ("a" * 64, 1.0), ("a", 0.0), ("a", 1e9)])
def test_nonsense_is_refused(name: str, days: float) -> None:
    with pytest.raises(Invalid):
        Authority.make().client(name, days=days)


def test_the_daemons_own_way_is_a_program(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-P",
        "-m",
        "hostd.authority",
        "server",
        str(tmp_path / "tls"),
        "192.0.2.1",
        "::1",
        "host",
    ]
    assert "192.0.2.1, ::1, host" in subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == ""
