"""Names the keys under which the controller's state lies in discovery's store.

`/controller/wanted/` holds what the scheduler and deployer follow as one watch; what never changes
once written (releases, artifacts) and what only people ask for lies beside it.
"""

from __future__ import annotations

ROOT = "/controller/"
WANTED = ROOT + "wanted/"
APPS = WANTED + "apps/"
FORMATIONS = WANTED + "formations/"
DEPLOYMENTS = WANTED + "deployments/"
DELETED = WANTED + "deleted/"
PINS = WANTED + "pins/"

APP_NAMES = ROOT + "app_names/"
ARTIFACTS = ROOT + "artifacts/"
RELEASES = ROOT + "releases/"
RELEASE_NUMBERS = ROOT + "release_numbers/"
DEPLOYING = ROOT + "deploying/"
DEPLOYMENT_EVENTS = ROOT + "deployment_events/"
SSH_KEYS = ROOT + "ssh_keys/"
EVENTS = ROOT + "events/"
LEADER = ROOT + "leader"


def app(app_id: str) -> str:
    return APPS + app_id


def app_name(name: str) -> str:
    return APP_NAMES + name


def artifact(artifact_id: str) -> str:
    return ARTIFACTS + artifact_id


def releases(app_id: str) -> str:
    return f"{RELEASES}{app_id}/"


def release(app_id: str, release_id: str) -> str:
    return releases(app_id) + release_id


def release_number(app_id: str) -> str:
    return RELEASE_NUMBERS + app_id


def formations(app_id: str) -> str:
    return f"{FORMATIONS}{app_id}/"


def formation(app_id: str, release_id: str) -> str:
    return formations(app_id) + release_id


def deployment(deployment_id: str) -> str:
    return DEPLOYMENTS + deployment_id


def deploying(app_id: str) -> str:
    """The lock that lets one deployment per app run; its value is the deployment's id."""
    return DEPLOYING + app_id


def deployment_events(deployment_id: str) -> str:
    return f"{DEPLOYMENT_EVENTS}{deployment_id}/"


def deleted(app_id: str) -> str:
    """The mark of a deleted app, kept until its last job has ended."""
    return DELETED + app_id


def pin(volume: str) -> str:
    """The host that has a volume."""
    return PINS + volume


def ssh_key(fingerprint: str) -> str:
    return SSH_KEYS + fingerprint.replace(":", "")
