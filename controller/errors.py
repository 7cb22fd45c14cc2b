"""What the controller can refuse."""

from __future__ import annotations

from discovery.wire.errors import AlreadyExists, Conflict, Internal, Invalid, NotFound, Unavailable


class AppNotFound(NotFound):
    code = "app_not_found"


class AppExists(AlreadyExists):
    code = "app_exists"


class ReleaseNotFound(NotFound):
    code = "release_not_found"


class ArtifactNotFound(NotFound):
    code = "artifact_not_found"


class DeploymentNotFound(NotFound):
    code = "deployment_not_found"


class KeyNotFound(NotFound):
    code = "ssh_key_not_found"


class KeyExists(AlreadyExists):
    code = "ssh_key_exists"


class DeploymentInProgress(Conflict):
    """Only one deployment per app runs at a time."""

    code = "deployment_in_progress"


class UnknownProcessType(Invalid):
    code = "unknown_process_type"


class InvalidName(Invalid):
    code = "invalid_name"


class NoRelease(Conflict):
    """The app has no release yet: nothing was pushed."""

    code = "no_release"


class AppProtected(Conflict):
    """A system app cannot be deleted or scaled to nothing."""

    code = "app_protected"


class JobNotFound(NotFound):
    code = "app_job_not_found"


class NoHosts(Unavailable):
    """No host of the cluster can take the job now."""

    code = "no_hosts"


class DomainFixed(Conflict):
    """The cluster was bootstrapped under another domain."""

    code = "domain_fixed"


class HostPortTaken(Conflict):
    """A port that the platform needs on the host belongs to another process."""

    code = "host_port_taken"


class StepFailed(Internal):
    """A bootstrap step failed; `detail["step"]` names it. Running bootstrap again continues there."""

    code = "step_failed"
