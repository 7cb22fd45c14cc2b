"""Tells a service manager that started us how we are: `Type=notify` of systemd, and nobody else.

Without one nothing happens. Its socket is taken out of the environment at once, so that no process of ours, and no
job, inherits it. Called by `daemon`.

Source: sd_notify(3).
"""

from __future__ import annotations

import logging
import os
import socket

READY, STOPPING = "READY=1", "STOPPING=1"
_log = logging.getLogger(__name__)


class Teller:
    """Where the service manager listens, if there is one."""

    def __init__(self) -> None:
        address = os.environ.pop("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address

    def tell(self, state: str) -> None:
        """Say one of the states; one that cannot be heard is logged."""
        if not self._address:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as out:
            try:
                out.sendto(state.encode(), self._address)
            except OSError as error:
                _log.warning("systemd cannot be told %s: %s", state, error.strerror)
