"""The single place where a process type of a formation becomes a `JobSpec`, and a host's job an `ActualJob`; pure.

Environment, later wins: images (bottom first), release, process type, and the platform's own
FLYNN_APP_ID, FLYNN_APP_NAME, FLYNN_RELEASE_ID, FLYNN_PROCESS_TYPE. hostd adds PORT. Grants become
bind mounts at the host's own paths, so that an address is true on both sides.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from urllib.parse import urlsplit

from controller.types import ActualJob, App, Artifact, JobState, NewJob, ProcessType, Release, service_name
from discovery.types import Instance
from hostd.types import BindMount, ImageConfig, Job, JobSpec, Layer, Port

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
DEFAULT_RUN_DIR = "/run/hostd"
ORIGIN_BOOTSTRAP = "bootstrap"
SLUG_RUNNER = ("/bin/sh", "/app/.hostd/start")
"""What buildpack puts into every slug: `… TYPE` becomes that process, `… -- COMMAND` any command, in the app's env."""
_GRANTED = {"discovery": "discovery", "hostd": "api"}
_RESERVED = frozenset({"app", "app_name", "release", "type", "origin"})
_STATES: Mapping[str, JobState] = {
    "pending": "pending",
    "starting": "starting",
    "running": "starting",
    "stopping": "stopping",
    "done": "down",
    "crashed": "crashed",
    "failed": "failed",
}


@dataclass(frozen=True, kw_only=True)
class Place:
    """The host that a job is made for."""

    host_id: str
    host_ip: str
    run_dir: str = DEFAULT_RUN_DIR


def place_of(instance: Instance) -> Place:
    """Read where a host keeps its sockets from its registration: `run_dir`, else its unix `url`."""
    run_dir = instance.meta.get("run_dir", "")
    parts = urlsplit(instance.meta.get("url", ""))
    if not run_dir and parts.scheme == "unix":
        run_dir = str(PurePosixPath(parts.path).parent.parent)
    return Place(host_id=instance.id, host_ip=instance.host, run_dir=run_dir or DEFAULT_RUN_DIR)


def is_web(type: str) -> bool:
    """Return whether a process type gets a port unasked."""
    return type == "web" or type.endswith("-web")


def ports_of(app_name: str, type: str, process: ProcessType) -> tuple[Port, ...]:
    """Return the ports of a process type: its own, or one for a web type, or none."""
    if process.ports or not is_web(type):
        return process.ports
    return (Port(service=service_name(app_name, type)),)


def layers_of(artifacts: Sequence[Artifact]) -> tuple[Layer, ...]:
    return tuple(layer for artifact in artifacts for layer in artifact.layers)


def config_of(artifacts: Sequence[Artifact]) -> ImageConfig:
    """Merge what the artifacts ask for; the upper one wins where it says something."""
    merged = ImageConfig()
    for artifact in artifacts:
        config = artifact.config
        merged = ImageConfig(
            entrypoint=config.entrypoint or merged.entrypoint,
            cmd=config.cmd or merged.cmd,
            env={**merged.env, **config.env},
            working_dir=config.working_dir if config.working_dir not in ("", "/") else merged.working_dir,
            user=config.user or merged.user,
        )
    return merged


def has_slug(artifacts: Sequence[Artifact]) -> bool:
    return any(artifact.kind == "slug" for artifact in artifacts)


def _process_args(type: str, process: ProcessType, artifacts: Sequence[Artifact]) -> tuple[str, ...]:
    if process.args:
        return process.args
    config = config_of(artifacts)
    return config.entrypoint + config.cmd or ((*SLUG_RUNNER, type) if has_slug(artifacts) else ())


def _one_off_args(new: NewJob, artifacts: Sequence[Artifact]) -> tuple[str, ...]:
    config = config_of(artifacts)
    entrypoint = config.entrypoint or ((*SLUG_RUNNER, "--") if has_slug(artifacts) else ())
    return entrypoint + (new.args or config.cmd)


def _label_part(text: str, limit: int) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:limit].strip("-")


def job_id(app_name: str, type: str, random_hex: str) -> str:
    """Write a job's id so that people recognise it; it is a host name, too."""
    return f"{_label_part(app_name, 28)}-{_label_part(type or 'run', 16) or 'job'}-{random_hex}"


def _platform_env(app: App, release_id: str, type: str, place: Place, process: ProcessType) -> dict[str, str]:
    env = {
        "FLYNN_APP_ID": app.id,
        "FLYNN_APP_NAME": app.name,
        "FLYNN_RELEASE_ID": release_id,
        "FLYNN_PROCESS_TYPE": type,
    }
    if "discovery" in process.grants:
        env["DISCOVERD"] = f"unix://{place.run_dir}/discovery/discovery.sock"
    if process.has_host_network:
        env["HOST_IP"] = place.host_ip
    return env


def _mounts(process: ProcessType, place: Place) -> tuple[BindMount, ...]:
    paths = [f"{place.run_dir}/{_GRANTED[grant]}" for grant in process.grants]
    return tuple(BindMount(source=path, path=path) for path in paths)


def job_spec(
    *, app: App, release: Release, type: str, artifacts: Sequence[Artifact], place: Place, id: str, origin: str = ""
) -> JobSpec:
    """Make the job of one process of a formation. The release must have the type."""
    process = release.processes[type]
    config = config_of(artifacts)
    labels = {"app": app.id, "app_name": app.name, "release": release.id, "type": type}
    return JobSpec(
        id=id,
        layers=layers_of(artifacts),
        args=_process_args(type, process, artifacts),
        env={"PATH": DEFAULT_PATH}
        | config.env
        | release.env
        | process.env
        | _platform_env(app, release.id, type, place, process),
        working_dir=process.working_dir or config.working_dir or "/",
        user=process.user if process.user != "0" else config.user or "0",
        ports=ports_of(app.name, type, process),
        volumes=process.volumes,
        mounts=_mounts(process, place),
        store_prefixes=process.store_prefixes,
        resources=process.resources,
        capabilities_add=process.capabilities_add,
        has_host_network=process.has_host_network,
        user_namespace=process.user_namespace,
        restart=process.restart,
        stop_grace_s=process.stop_grace_s,
        labels=labels | ({"origin": origin} if origin else {}),
    )


def one_off_spec(
    *, app: App, release: Release | None, new: NewJob, artifacts: Sequence[Artifact], place: Place, id: str
) -> JobSpec:
    """Make a one-off job. The artifacts' entrypoint (a slug's: its runner) comes before the command."""
    config = config_of(artifacts)
    release_id = release.id if release else ""
    inherited = dict(release.env) if release and new.release_env else {}
    terminal = {"TERM": "xterm-256color"} if new.has_tty else {}
    labels = {key: value for key, value in new.labels.items() if key not in _RESERVED}
    return JobSpec(
        id=id,
        layers=layers_of(artifacts),
        args=_one_off_args(new, artifacts),
        env={"PATH": DEFAULT_PATH}
        | config.env
        | inherited
        | terminal
        | new.env
        | _platform_env(app, release_id, "", place, ProcessType()),
        working_dir=new.working_dir or config.working_dir or "/",
        user=config.user or "0",
        has_tty=new.has_tty,
        rows=new.rows,
        columns=new.columns,
        has_stdin=not new.is_detached,
        has_log=new.has_log,
        volumes=new.volumes,
        resources=new.resources,
        inherits_proxy=new.inherits_proxy,
        labels=labels | {"app": app.id, "app_name": app.name, "release": release_id, "type": ""},
    )


def state_of(job: Job) -> JobState:
    """Say a host's job status in the controller's words: `up` is running and serving."""
    return "up" if job.status == "running" and job.is_up else _STATES[job.status]


def actual_job(job: Job) -> ActualJob:
    """Show a host's job as a job of its app."""
    labels = job.spec.labels
    return ActualJob(
        id=job.spec.id,
        app_id=labels.get("app", ""),
        release_id=labels.get("release", ""),
        type=labels.get("type", ""),
        host_id=job.host_id,
        state=state_of(job),
        args=job.spec.args,
        host_ip=job.host_ip,
        ports=job.ports,
        created_at=job.created_at,
        started_at=job.started_at,
        ended_at=job.ended_at,
        exit_status=job.exit_status,
        error=job.error.message if job.error else "",
    )
