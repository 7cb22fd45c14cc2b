"""What discovery can refuse."""

from __future__ import annotations

from discovery.wire.errors import Conflict, Invalid, NotFound


class KeyNotFound(NotFound):
    code = "key_not_found"


class ServiceNotFound(NotFound):
    code = "service_not_found"


class LeaseNotFound(NotFound):
    code = "lease_not_found"


class Compacted(Invalid):
    """The revision asked for is older than what the store keeps; `detail["compact_revision"]` is the oldest."""

    code = "compacted"


class TransactionFailed(Conflict):
    """A compare of the transaction did not hold: somebody was first."""

    code = "transaction_failed"
