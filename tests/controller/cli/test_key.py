from __future__ import annotations

import base64
import json
import subprocess
from pathlib import Path

import pytest

from tests.controller.cli.conftest import Shell
from tests.controller.cli.fake import Controller

BLOB = base64.b64encode(b"\0\0\0\x0bssh-ed25519\0\0\0\x20" + bytes(range(32))).decode()
PUBLIC = f"ssh-ed25519 {BLOB} me@home"


def fingerprint(controller: Controller) -> str:
    return controller.keys[-1].fingerprint


def test_add_takes_the_default_key(flynn: Shell, controller: Controller, home: Path) -> None:
    (home / ".ssh").mkdir()
    (home / ".ssh/id_rsa.pub").write_text("ssh-rsa AAAAB3 other\n")
    (home / ".ssh/id_ed25519.pub").write_text(PUBLIC + "\n")
    assert flynn.ok("key-add") == f"Key {fingerprint(controller)} added\n"
    assert len(fingerprint(controller).split(":")) == 16
    assert controller.keys[0].comment == "me@home"


def test_the_fingerprint_is_that_of_ssh_keygen(flynn: Shell, home: Path) -> None:
    (home / ".ssh").mkdir()
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(home / ".ssh/id_ed25519")], check=True)
    shown = subprocess.run(
        ["ssh-keygen", "-l", "-E", "md5", "-f", str(home / ".ssh/id_ed25519.pub")],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert flynn.ok("key", "add").split()[1] in shown


def test_add_takes_a_file_or_stdin(
    flynn: Shell, controller: Controller, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    (home / "k.pub").write_text(f"# a comment\n{PUBLIC}\n")
    flynn.ok("key", "add", "k.pub")
    controller.keys.clear()
    monkeypatch.setattr("sys.stdin", io.StringIO(PUBLIC))
    flynn.ok("key", "add", "-")
    assert controller.keys[0].public_key == f"ssh-ed25519 {BLOB}"


def test_no_key_anywhere_says_how_to_make_one(flynn: Shell) -> None:
    done = flynn("key-add")
    assert done.code == 66
    assert "ssh-keygen" in done.err


def test_a_private_key_is_never_sent(flynn: Shell, controller: Controller, home: Path) -> None:
    (home / "id").write_text("-----BEGIN OPENSSH PRIVATE KEY-----\nabc\n")
    done = flynn("key", "add", "id")
    assert done.code == 64
    assert "id.pub" in done.err
    assert controller.requests == []


def test_something_else_is_refused(flynn: Shell, home: Path) -> None:
    (home / "x").write_text("hello\n")
    assert flynn("key", "add", "x").code == 64
    assert flynn("key", "add", "missing").code == 66
    assert flynn("key", "add", str(home)).code == 66


def test_the_same_key_twice_is_told(flynn: Shell, home: Path) -> None:
    (home / "k.pub").write_text(PUBLIC)
    flynn.ok("key", "add", "k.pub")
    assert flynn("key", "add", "k.pub").code == 73


def test_list_and_remove(flynn: Shell, controller: Controller, home: Path) -> None:
    (home / "k.pub").write_text(PUBLIC)
    for name in ("fingerprint", "sha256", "comment"):
        flynn.ok("key", "add", "k.pub")
        lines = flynn.ok("key").splitlines()
        assert lines[1].split() == [fingerprint(controller), "me@home"]
        assert json.loads(flynn.ok("key", "list", "--json"))[0]["comment"] == "me@home"
        flynn.ok("key", "remove", getattr(controller.keys[0], name))
        assert controller.keys == []
    assert flynn("key", "remove", "no:such").code == 66
