"""What hostd says to a service manager."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from hostd import systemd


@pytest.mark.parametrize("is_abstract", [False, True])
def test_it_says_when_it_is_ready_and_nobody_else_hears_of_the_socket(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, is_abstract: bool
) -> None:
    name = f"{tmp_path}/notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as service:
        service.bind("\0" + name if is_abstract else name)
        service.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + name if is_abstract else name)
        teller = systemd.Teller()
        assert "NOTIFY_SOCKET" not in os.environ
        teller.tell(systemd.READY)
        assert service.recv(100) == b"READY=1"


def test_without_one_and_with_one_that_is_gone_nothing_happens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    systemd.Teller().tell(systemd.READY)
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "none"))
    systemd.Teller().tell(systemd.READY)
