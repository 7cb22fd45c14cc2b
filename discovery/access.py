"""Who may do what over TCP: the role that a client's certificate names, and the one place that holds requests to it.

A role is the organizational unit of the certificate's subject (`wire.roles`):

    controller  everything
    host        reads everything; writes what is discovery's own (`/discoverd/`); leases
    read-only   reads everything, changes nothing
    job         reads and writes below its prefixes, nothing else: with none it may ask who is there, and that is all

A job's prefixes are URIs in the certificate's alternative names, `hostd:prefix:` and the prefix, percent-encoded. If
it also names a grant (`hostd:grant:HOST/JOB`, which hostd writes for its jobs), it counts only while the store has that
grant, with this very certificate's number: hostd takes it back when the job ends. A certificate without a role, or with
one that is not in this list, may do nothing. Whoever reaches the unix socket is root already, and has `controller`.
`gateway` and `watchstream` ask before they act, `api` for the services.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from discovery.operations import (
    PERMISSION_DENIED,
    DeleteRequest,
    PutRequest,
    RangeRequest,
    Refused,
    TxnRequest,
    prefix_end,
)
from discovery.wire import roles

_OWN = b"/discoverd/"


@dataclass(frozen=True)
class Role:
    """What somebody may do; `reads` and `writes` are prefixes, `b""` is everything."""

    name: str
    reads: tuple[bytes, ...] = ()
    writes: tuple[bytes, ...] = ()
    may_lease: bool = False
    may_operate: bool = False
    """Membership, compaction, and whatever else concerns the whole store."""
    grant: tuple[bytes, bytes] | None = None
    """The key, and its value, without which the certificate does not count."""

    def now(self, value_of: Callable[[bytes], bytes | None]) -> Role:
        """Return what its holder may do at this moment: this, or nothing once its grant was taken back."""
        if self.grant is None or value_of(self.grant[0]) == self.grant[1]:
            return self
        return NOBODY

    def check_step(self, step: RangeRequest | PutRequest | DeleteRequest | TxnRequest) -> None:
        """Make sure that an operation touches only what this role may touch.

        Raises:
            Refused: it does not.
        """
        match step:
            case RangeRequest():
                self.check_range(step.key, step.range_end)
            case PutRequest():
                _check(self.writes, step.key, b"")
                if step.prev_kv:
                    self.check_range(step.key, b"")
            case DeleteRequest():
                _check(self.writes, step.key, step.range_end)
                if step.prev_kv:
                    self.check_range(step.key, step.range_end)
            case TxnRequest():
                for clause in step.compare:
                    self.check_range(clause.key, clause.range_end)
                for inner in (*step.success, *step.failure):
                    self.check_step(inner)

    def check_range(self, key: bytes, range_end: bytes) -> None:
        """Make sure that all of a range may be read.

        Raises:
            Refused: it may not.
        """
        _check(self.reads, key, range_end)

    def check_lease(self, keys: Iterable[bytes] = ()) -> None:
        """Make sure that a lease may be made or renewed, or ended with these keys.

        Raises:
            Refused: it may not.
        """
        if not self.may_lease:
            raise denied()
        for key in keys:
            _check(self.writes, key, b"")

    def check_look(self, keys: Iterable[bytes]) -> None:
        """Make sure that a lease may be looked at, and the keys that are shown with it.

        Raises:
            Refused: it may not.
        """
        if not self.reads:
            raise denied()
        for key in keys:
            _check(self.reads, key, b"")

    def check_operator(self) -> None:
        """Make sure that this role may look after the store itself.

        Raises:
            Refused: it may not.
        """
        if not self.may_operate:
            raise denied()

    @property
    def may_read_services(self) -> bool:
        """Tell whether the services may be asked for."""
        return self.name in (roles.CONTROLLER, roles.HOST, roles.READ_ONLY)

    @property
    def may_write_services(self) -> bool:
        """Tell whether services may be changed."""
        return self.name in (roles.CONTROLLER, roles.HOST)


CONTROLLER = Role(roles.CONTROLLER, (b"",), (b"",), may_lease=True, may_operate=True)
HOST = Role(roles.HOST, (b"",), (_OWN,), may_lease=True)
READ_ONLY = Role(roles.READ_ONLY, (b"",))
NOBODY = Role("")
_ROLES = {role.name: role for role in (CONTROLLER, HOST, READ_ONLY)}


def denied() -> Refused:
    """Return etcd's refusal of what somebody may not do."""
    return Refused(PERMISSION_DENIED, "permission denied")


def role_of(certificate: roles.Certificate | None) -> Role:
    """Return the role that a certificate (as `ssl` shows it) gives; `None` is a connection without TLS."""
    if certificate is None:
        return CONTROLLER
    unit = roles.unit_of(certificate)
    if unit != roles.JOB:
        return _ROLES.get(unit, NOBODY)
    prefixes = roles.prefixes_of(certificate)
    return Role(roles.JOB, prefixes, prefixes, may_lease=bool(prefixes), grant=roles.grant_of(certificate))


def _check(prefixes: tuple[bytes, ...], key: bytes, range_end: bytes) -> None:
    if not any(_covers(prefix, key, range_end) for prefix in prefixes):
        raise denied()


def _covers(prefix: bytes, key: bytes, range_end: bytes) -> bool:
    if not prefix:
        return True
    if not key.startswith(prefix) or range_end == b"\x00":  # the latter means to the end of all keys
        return False
    return range_end <= key or range_end <= prefix_end(prefix)
