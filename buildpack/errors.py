"""What git-receive, the builder and the blob store can refuse."""

from __future__ import annotations

from discovery.wire.errors import AlreadyExists, Conflict, Invalid, NotFound, Unauthorized, Unavailable


class BlobNotFound(NotFound):
    code = "blob_not_found"


class BlobExists(AlreadyExists):
    """A ticket was used already."""

    code = "blob_exists"


class BlobTooLarge(Invalid):
    code = "blob_too_large"
    http_status = 413


class DigestMismatch(Invalid):
    """The content is not what its name says: it was cut or changed on the way."""

    code = "digest_mismatch"


class TicketRefused(Unauthorized):
    """A signed URL has ended, was changed, or is for something else."""

    code = "ticket_refused"


class DiskFull(Unavailable):
    """No space is left for another blob or push; trying again does not help before somebody frees some."""

    code = "disk_full"
    http_status = 507
    retry = False


class PushRefused(Invalid):
    """The push itself is not one that deploys."""

    code = "push_refused"


class PushInProgress(Conflict):
    """Only one push per app is built at a time."""

    code = "push_in_progress"


class BuildFailed(Invalid):
    """The build job did not make a slug; what it printed says why."""

    code = "build_failed"


class DeploymentFailed(Conflict):
    """The new release did not come up; the old one serves on."""

    code = "deployment_failed"
