"""What rootfs can refuse. hostd turns these into what its API says; nothing here knows of a wire."""

from __future__ import annotations


class RootfsError(Exception):
    """Base of all refusals of this room; `hint` says what the operator can do."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class NameInvalid(RootfsError):
    """A digest, path or name that cannot be one of ours; nothing was touched."""


class ImageMissing(RootfsError):
    """The store has no image of that name."""


class BlobMissing(RootfsError):
    """The store has no blob of that digest and nobody said where to get it."""


class BlobMismatch(RootfsError):
    """Bytes that are not what their digest or size promised; they were thrown away."""


class LayerInvalid(RootfsError):
    """A layer that no honest tool makes (a path outside of the tree, a device) or that is too large."""


class ImageInvalid(RootfsError):
    """An archive, manifest or config that is not what its format says, or that this host cannot run."""


class ImageExists(RootfsError):
    """The name is taken by an image from elsewhere."""


class StoreBusy(RootfsError):
    """Somebody is bringing an image in; what it would need could not be told from rubbish."""


class FetchFailed(RootfsError):
    """An artifact could not be fetched now; trying again may help."""


class BuildFailed(RootfsError):
    """An image could not be built; the cache holds no half result."""


class AccessDenied(RootfsError):
    """The registry wants other credentials, or none would be enough."""


class DiskFull(RootfsError):
    """The disk has no room for it; what was begun was removed."""
