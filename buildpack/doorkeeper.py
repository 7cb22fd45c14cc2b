"""Decides who may speak to git-receive: counts connections, and asks the controller about SSH keys.

Refuses every user but `git`, every way to log in but a key that is registered, and more connections than fit;
says why in the words that the client shows before it gives up. Called by `receive`.
"""

from __future__ import annotations

import logging

import asyncssh

from controller.client import ControllerClient
from discovery.wire.errors import NotFound, ServiceError

log = logging.getLogger(__name__)

USER = "git"
CONNECTIONS_MAX = 200
UNAUTHENTICATED_MAX = 64


class Doorkeeper:
    """Counts connections and asks the controller about keys."""

    def __init__(self, controller: ControllerClient) -> None:
        self._controller = controller
        self._connections: set[Connection] = set()

    def connection(self) -> Connection:
        """Make the handler of one connection, for asyncssh."""
        return Connection(self)

    def admit(self, connection: Connection) -> bool:
        """Count a connection in, unless there are too many, of all or of those that have not logged in."""
        waiting = sum(not other.is_known for other in self._connections)
        if len(self._connections) >= CONNECTIONS_MAX or waiting >= UNAUTHENTICATED_MAX:
            return False
        self._connections.add(connection)
        return True

    def release(self, connection: Connection) -> None:
        """Count a connection out."""
        self._connections.discard(connection)

    async def complaint(self, key: asyncssh.SSHKey) -> str:
        """Return why a key may not push, empty if it may."""
        fingerprint = key.get_fingerprint("sha256")
        try:
            await self._controller.key(fingerprint)
        except NotFound:
            return f"The key {fingerprint} is not registered here; to add it: flynn key add"
        except ServiceError as error:
            log.warning("key %s cannot be checked: %s", fingerprint, error)
            return "Keys cannot be checked now because the controller does not answer; try again"
        return ""


class Connection(asyncssh.SSHServer):
    """One client, until it is known."""

    def __init__(self, door: Doorkeeper) -> None:
        self._door = door
        self._connection: asyncssh.SSHServerConnection | None = None
        self._has_complained = False
        self.is_known = False

    def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
        self._connection = conn
        if not self._door.admit(self):
            log.warning("too many connections: one refused")
            conn.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._door.release(self)

    def begin_auth(self, username: str) -> bool:
        return True

    def auth_completed(self) -> None:
        self.is_known = True

    def public_key_auth_supported(self) -> bool:
        return True

    async def validate_public_key(self, username: str, key: asyncssh.SSHKey) -> bool:
        text = await self._door.complaint(key) if username == USER else f"Log in as {USER}, not as {username[:40]!r}"
        if text and self._connection is not None and not self._has_complained:
            self._has_complained = True  # a client may try several keys; one word is enough
            self._connection.send_auth_banner(f"{text}\r\n")
        return not text
