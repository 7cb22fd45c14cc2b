"""The nouns of the platform: app, artifact, release, formation, job, deployment, key, event."""

from __future__ import annotations

import re
from typing import Any, Literal

from controller.errors import InvalidName
from hostd.types import ImageConfig, Layer, Port, Resources, Strict, VolumeMount

_APP_NAME = re.compile(r"(?!.*--)[a-z](?:[a-z0-9-]{0,38}[a-z0-9])?")
_PROCESS_TYPE = re.compile(r"[a-z0-9](?:[a-z0-9_-]{0,30}[a-z0-9])?", re.IGNORECASE)


def parse_app_name(text: str) -> str:
    """Accept an app name: 1 to 40 of `a-z 0-9 -`, a letter first, no dash last nor two in a row (it is a DNS label).

    Raises:
        InvalidName: it is anything else.
    """
    if not _APP_NAME.fullmatch(text):
        shown = text if len(text) <= 60 else text[:57] + "..."
        raise InvalidName(
            f"app name {shown!r} is not allowed",
            hint="1 to 40 lowercase letters, digits and single dashes, starting with a letter, not ending with a dash",
        )
    return text


def parse_process_type(text: str) -> str:
    """Accept a process type as a Procfile names it.

    Raises:
        InvalidName: it is anything else.
    """
    if not _PROCESS_TYPE.fullmatch(text):
        raise InvalidName(f"process type {text[:60]!r} is not allowed", hint="letters, digits, dash, underscore")
    return text


def service_name(app_name: str, type: str) -> str:
    """Return the service that instances of a web process type register under: `APP-web`, for others `APP--TYPE`.

    App names have no two dashes in a row, so no Procfile can name a process type that answers for another app.
    """
    return f"{app_name}-{type}" if type == "web" else f"{app_name}--{type}"


class App(Strict, frozen=True, kw_only=True):
    """An app; `release_id` is its current release, empty before the first. `meta["system"]` marks ours."""

    id: str
    name: str
    release_id: str = ""
    meta: dict[str, str] = {}
    deploy_timeout_s: float = 120.0
    created_at: float = 0
    updated_at: float = 0


class NewApp(Strict, frozen=True, kw_only=True):
    """Empty `name`: one is made up. `id` may be given so that a retry is harmless."""

    name: str = ""
    id: str = ""
    meta: dict[str, str] = {}


class AppChange(Strict, frozen=True, kw_only=True):
    meta: dict[str, str] | None = None
    deploy_timeout_s: float | None = None


class AppDeleted(Strict, frozen=True, kw_only=True):
    app_id: str
    routes: int
    releases: int


class Artifact(Strict, frozen=True, kw_only=True):
    """Files to run: an image or a slug, as layers (bottom first). `kind` is `image` or `slug`."""

    id: str
    kind: Literal["image", "slug"]
    layers: tuple[Layer, ...]
    config: ImageConfig = ImageConfig()
    meta: dict[str, str] = {}
    created_at: float = 0


class NewArtifact(Strict, frozen=True, kw_only=True):
    """`id` may be given so that a retry is harmless."""

    id: str = ""
    kind: Literal["image", "slug"]
    layers: tuple[Layer, ...]
    config: ImageConfig = ImageConfig()
    meta: dict[str, str] = {}


class ProcessType(Strict, frozen=True, kw_only=True):
    """How one type of process of a release runs. Fields as in `hostd.types.JobSpec`.

    `grants` names host interfaces that the platform's own jobs may use: `discovery`, `hostd`; others get none, and no
    `store_prefixes`.
    """

    args: tuple[str, ...] = ()
    env: dict[str, str] = {}
    ports: tuple[Port, ...] = ()
    volumes: tuple[VolumeMount, ...] = ()
    resources: Resources = Resources()
    has_host_network: bool = False
    user_namespace: Literal["job", "host"] = "job"
    capabilities_add: tuple[str, ...] = ()
    grants: tuple[str, ...] = ()
    store_prefixes: tuple[str, ...] = ()
    restart: Literal["never", "always"] = "never"
    stop_grace_s: float = 10.0
    user: str = "0"
    working_dir: str = ""


class Release(Strict, frozen=True, kw_only=True):
    """An immutable version of an app: artifacts (bottom first), environment, process types. `number` from 1."""

    id: str
    app_id: str
    number: int
    artifact_ids: tuple[str, ...]
    env: dict[str, str] = {}
    processes: dict[str, ProcessType] = {}
    meta: dict[str, str] = {}
    created_at: float = 0


class NewRelease(Strict, frozen=True, kw_only=True):
    """`id` may be given so that a retry is harmless."""

    id: str = ""
    artifact_ids: tuple[str, ...]
    env: dict[str, str] = {}
    processes: dict[str, ProcessType] = {}
    meta: dict[str, str] = {}


class ReleaseRef(Strict, frozen=True, kw_only=True):
    release_id: str


class Formation(Strict, frozen=True, kw_only=True):
    """How many of each process type of a release should run."""

    app_id: str
    release_id: str
    processes: dict[str, int] = {}
    updated_at: float = 0


class Scale(Strict, frozen=True, kw_only=True):
    """Wanted counts; types not named keep theirs. Empty `release_id` = the app's current release."""

    processes: dict[str, int]
    release_id: str = ""


JobState = Literal["pending", "starting", "up", "stopping", "down", "crashed", "failed"]


class ActualJob(Strict, frozen=True, kw_only=True):
    """A job of an app as the controller saw it last. `state` `up` = running and serving (healthy where it has a check).

    `type` is empty for a one-off. `down` ended as told or with status 0.
    """

    id: str
    app_id: str
    release_id: str
    type: str
    host_id: str
    state: JobState
    args: tuple[str, ...] = ()
    host_ip: str = ""
    ports: tuple[int, ...] = ()
    created_at: float = 0
    started_at: float = 0
    ended_at: float = 0
    exit_status: int | None = None
    error: str = ""


class NewJob(Strict, frozen=True, kw_only=True):
    """A one-off job. Empty `release_id` = the current release; `artifact_ids` given = those instead of the release's.

    `is_detached=False`: the job waits for its creator to attach. `volumes`, `resources` and `inherits_proxy`
    are honoured as in `hostd.types.JobSpec`; `release_env=False` leaves the release's environment out.
    """

    args: tuple[str, ...]
    release_id: str = ""
    artifact_ids: tuple[str, ...] = ()
    env: dict[str, str] = {}
    release_env: bool = True
    has_tty: bool = False
    rows: int = 24
    columns: int = 80
    is_detached: bool = False
    has_log: bool = True
    volumes: tuple[VolumeMount, ...] = ()
    resources: Resources = Resources()
    inherits_proxy: bool = False
    working_dir: str = ""
    labels: dict[str, str] = {}


DeploymentStatus = Literal["pending", "running", "complete", "failed"]


class Deployment(Strict, frozen=True, kw_only=True):
    """A move from one release to the next. On `failed`, `error` says why and the old release serves again.

    `processes` are the counts that the new release ends with, `old_processes` what a failure returns to;
    `timeout_s` bounds each single step.
    """

    id: str
    app_id: str
    old_release_id: str
    new_release_id: str
    status: DeploymentStatus
    timeout_s: float
    processes: dict[str, int] = {}
    old_processes: dict[str, int] = {}
    error: str = ""
    created_at: float = 0
    finished_at: float = 0


class NewDeployment(Strict, frozen=True, kw_only=True):
    release_id: str
    timeout_s: float = 0


class DeploymentEvent(Strict, frozen=True, kw_only=True):
    """A step of a deployment; the last has status `complete` or `failed`."""

    deployment_id: str
    status: DeploymentStatus
    at: float
    job_type: str = ""
    job_id: str = ""
    job_state: str = ""
    error: str = ""


class NewRoute(Strict, frozen=True, kw_only=True):
    """`kind="http"`: `domain`, `path`; `kind="tcp"`: `port` (0 = choose). Empty `service` = `APP-web`."""

    kind: Literal["http", "tcp"] = "http"
    domain: str = ""
    path: str = "/"
    port: int = 0
    service: str = ""
    is_sticky: bool = False
    certificate: str = ""
    private_key: str = ""


class Key(Strict, frozen=True, kw_only=True):
    """An SSH public key that may push. `fingerprint` is MD5 hex with colons, `sha256` OpenSSH's."""

    fingerprint: str
    sha256: str
    public_key: str
    comment: str = ""
    created_at: float = 0


class NewKey(Strict, frozen=True, kw_only=True):
    public_key: str


class Event(Strict, frozen=True, kw_only=True):
    """Something that happened to an app, release, deployment, scale, job, route or key (`kind`, + `_deleted`).

    `id` grows, with gaps. A stream of events has one of kind `current` (no data) where history ends.
    """

    id: int
    at: float
    kind: str
    app_id: str = ""
    object_id: str = ""
    data: dict[str, Any] = {}


class ClusterInfo(Strict, frozen=True, kw_only=True):
    version: str
    domain: str
    git_address: str
    host_count: int = 0
