"""`flynn deployment list|show|timeout`, and `deploy`, which other commands use to move to a release and watch it."""

from __future__ import annotations

from argparse import Namespace

from controller.cli import output
from controller.cli.app import number_of
from controller.cli.command import Command, Failed, Parser
from controller.cli.session import Session
from controller.types import App, AppChange, Deployment, DeploymentEvent, NewDeployment, Release
from discovery.wire import clock
from discovery.wire.errors import Invalid, Unavailable

AWAY_S = 30.0


def deploy(session: Session, release: Release) -> None:
    """Move the app to `release`, printing every step.

    Raises:
        Failed: it did not come up; the old release serves again.
    """
    started = clock.monotonic_s()
    deployment = session.ask("POST", session.path("deployments"), Deployment, NewDeployment(release_id=release.id))
    error = _watch(session, deployment)
    if error is not None:
        raise Failed(
            f"deploying v{release.number} failed: {error}", "the release before serves on; flynn log -n 50 says more"
        )
    print(f"Deployed v{release.number} in {clock.monotonic_s() - started:.1f} s")


def _watch(session: Session, deployment: Deployment) -> str | None:
    """Follow a deployment to its end, across restarts of the controller; return the error, or `None`."""
    printed: set[DeploymentEvent] = set()
    heard = clock.monotonic_s()
    with output.Waiting("the deployment") as waiting:
        while True:
            try:
                for event in session.follow(f"/deployments/{deployment.id}/events", DeploymentEvent):
                    heard = clock.monotonic_s()
                    if event in printed:
                        continue
                    printed.add(event)
                    if event.job_id:
                        waiting.line(event_line(event))
                    if event.status == "complete":
                        return None
                    if event.status == "failed":
                        return event.error or "no reason given"
                final = session.caller.request("GET", f"/deployments/{deployment.id}", into=Deployment)
                if final.status in ("complete", "failed"):
                    return None if final.status == "complete" else final.error or "no reason given"
            except Unavailable:
                if clock.monotonic_s() - heard > AWAY_S:
                    raise
            _pause()


def _pause() -> None:
    import time

    time.sleep(0.3)


def event_line(event: DeploymentEvent) -> str:
    """Say one step of a deployment."""
    why = f": {event.error}" if event.error else ""
    return f"{output.time_of_day(event.at)} ==> {event.job_type} {event.job_id} {event.job_state}{why}"


def show_all(session: Session, arguments: Namespace) -> None:
    """List an app's deployments, newest first."""
    deployments = session.ask("GET", session.path("deployments"), list[Deployment])
    if arguments.is_json:
        output.print_json(deployments)
        return
    releases = session.ask("GET", session.path("releases"), list[Release]) if deployments else []
    rows = [
        (
            one.id,
            one.status,
            number_of(releases, one.old_release_id),
            number_of(releases, one.new_release_id),
            output.age(one.created_at),
            f"{one.finished_at - one.created_at:.1f} s" if one.finished_at else "",
        )
        for one in deployments
    ]
    output.table(("ID", "STATUS", "FROM", "TO", "CREATED", "TOOK"), rows)


def show(session: Session, arguments: Namespace) -> None:
    """Show one deployment."""
    from urllib.parse import quote

    if not arguments.id.strip("./"):
        raise Invalid(f"deployment id {arguments.id!r}", hint="as `flynn deployment list` shows it")
    one = session.ask("GET", f"/deployments/{quote(arguments.id, safe='')}", Deployment)
    if arguments.is_json:
        output.print_json(one)
        return
    print(f"ID:       {one.id}\nStatus:   {one.status}\nFrom:     {one.old_release_id or 'nothing'}")
    print(f"To:       {one.new_release_id}\nCreated:  {output.utc(one.created_at)}")
    if one.finished_at:
        print(f"Finished: {output.utc(one.finished_at)}")
    if one.error:
        print(f"Error:    {one.error}")


def timeout(session: Session, arguments: Namespace) -> None:
    """Show or set how long a deployment may take for each job."""
    if arguments.seconds is None:
        app = session.ask("GET", session.path(), App)
    elif 1 <= arguments.seconds <= 86400:
        app = session.ask("POST", session.path(), App, AppChange(deploy_timeout_s=arguments.seconds))
    else:
        raise Invalid(f"{arguments.seconds:g} is no timeout", hint="1 to 86400 seconds")
    output.print_json({"timeout_s": app.deploy_timeout_s}) if arguments.is_json else print(f"{app.deploy_timeout_s:g}")


def _id_option(parser: Parser) -> None:
    parser.add_argument("id", metavar="ID", help="as `flynn deployment list` shows it")


def _seconds_option(parser: Parser) -> None:
    parser.add_argument("seconds", metavar="SECONDS", nargs="?", type=float, help="1 to 86400")


COMMANDS = (
    Command(
        "deployment list",
        "list an app's deployments, newest first",
        "flynn deployment",
        show_all,
        has_json=True,
        needs_app=True,
    ),
    Command(
        "deployment show",
        "show one deployment",
        "flynn deployment show ID",
        show,
        _id_option,
        has_json=True,
        needs_app=True,
    ),
    Command(
        "deployment timeout",
        "show or set how long a deployment may wait for a job, in seconds",
        "flynn deployment timeout 180",
        timeout,
        _seconds_option,
        has_json=True,
        needs_app=True,
    ),
)
