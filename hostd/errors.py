"""What hostd can refuse."""

from __future__ import annotations

from discovery.wire.errors import AlreadyExists, Conflict, Internal, Invalid, NotFound, Unavailable


class JobNotFound(NotFound):
    code = "job_not_found"


class ImageNotFound(NotFound):
    code = "image_not_found"


class JobExists(AlreadyExists):
    """The id is taken by a job with another spec (the same spec is answered with that job)."""

    code = "job_exists"


class JobNotRunning(Conflict):
    code = "job_not_running"


class VolumeInUse(Conflict):
    code = "volume_in_use"


class InvalidSpec(Invalid):
    code = "invalid_spec"


class PortTaken(Conflict):
    code = "port_taken"


class LaunchFailed(Internal):
    """A launch step failed; `detail["step"]` names it, and every earlier step was undone."""

    code = "launch_failed"


class SpawnerUnavailable(Unavailable):
    code = "spawner_unavailable"


class HostFull(Unavailable):
    """No address, port, disk or memory is left for another job."""

    code = "host_full"
