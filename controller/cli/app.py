"""`flynn create`, `apps`, `info`, `delete`: apps and their git remotes."""

from __future__ import annotations

import re
import sys
from argparse import Namespace
from typing import Any

from controller.cli import git, output
from controller.cli.command import Command, Failed, Parser
from controller.cli.session import REMOTE, Session
from controller.types import App, AppDeleted, Formation, NewApp, Release, parse_app_name
from discovery.wire.errors import Conflict, Invalid, NotFound
from router.types import Route

_REMOTE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,62}")


def _create_options(parser: Parser) -> None:
    parser.add_argument("name", metavar="NAME", nargs="?", default="", help="the app's name (default: one is made up)")
    parser.add_argument(
        "-r", "--remote", metavar="REMOTE", default=REMOTE, help=f"git remote to add (default: {REMOTE}; '' = none)"
    )
    parser.add_argument("-y", "--yes", action="store_true", dest="is_yes", help="replace a git remote of that name")


def create(session: Session, arguments: Namespace) -> None:
    """Create an app and add the git remote that leads to it."""
    if arguments.name:
        parse_app_name(arguments.name)
    if arguments.remote and not _REMOTE.fullmatch(arguments.remote):
        raise Invalid(
            f"git remote name {arguments.remote!r} is not allowed", hint="letters, digits, dot, dash, underscore"
        )
    remote = arguments.remote if arguments.remote and git.is_repository() else ""
    present = git.remotes().get(remote) if remote else None
    wanted = git.url_of(session.cluster.git_address, arguments.name)
    if present not in (None, wanted) and not arguments.is_yes:
        question = f"The git remote {remote!r} exists ({present}). Replace it?"
        if not sys.stdin.isatty():
            raise Conflict(f"the git remote {remote!r} exists ({present})", hint="-y replaces it, -r NAME uses another")
        if not output.is_asked(question, flag="-y"):
            raise Failed("nothing was created")
    app = session.ask("POST", "/apps", App, NewApp(name=arguments.name))
    url = git.url_of(session.cluster.git_address, app.name)
    if remote:
        git.set_remote(remote, url)
    print(f"Created {app.name}")
    if arguments.remote and not remote:
        output.note(f"There is no git repository here. In yours: git remote add {arguments.remote} {url}")


def show_all(session: Session, arguments: Namespace) -> None:
    """List the apps."""
    apps = session.ask("GET", "/apps", list[App])
    if arguments.is_json:
        output.print_json(apps)
    else:
        output.table(("ID", "NAME"), [(app.id, app.name) for app in sorted(apps, key=lambda app: app.name)])


def _describe(session: Session) -> dict[str, Any]:
    app = session.ask("GET", session.path(), App)
    routes = session.ask("GET", session.path("routes"), list[Route])
    formations = session.ask("GET", session.path("formations"), list[Formation])
    number = session.ask("GET", session.path("releases", app.release_id), Release).number if app.release_id else 0
    counts = next((f.processes for f in formations if f.release_id == app.release_id), {})
    return {
        "app": app,
        "git_url": git.url_of(session.cluster.git_address, app.name),
        "urls": [route_url(route) for route in routes],
        "release": f"v{number}" if number else "",
        "processes": counts,
    }


def route_url(route: Route) -> str:
    """Say a route as the URL that reaches it."""
    if route.kind == "tcp":
        return f"tcp://:{route.port}"
    scheme = "https" if route.certificate else "http"
    return f"{scheme}://{route.domain}{'' if route.path == '/' else route.path}"


def info(session: Session, arguments: Namespace) -> None:
    """Show an app's addresses and state."""
    facts = _describe(session)
    if arguments.is_json:
        output.print_json(facts)
        return
    print(f"=== {facts['app'].name}")
    print(f"Git URL:  {facts['git_url']}")
    for url in facts["urls"]:
        print(f"Web URL:  {url}")
    print(f"Release:  {facts['release'] or 'none yet: git push ' + REMOTE + ' master'}")
    print("Scale:    " + (" ".join(f"{kind}={n}" for kind, n in sorted(facts["processes"].items())) or "nothing runs"))


def _delete_options(parser: Parser) -> None:
    parser.add_argument("-y", "--yes", action="store_true", dest="is_yes", help="do not ask")
    parser.add_argument(
        "-r", "--remote", metavar="REMOTE", default=REMOTE, help=f"git remote to remove (default: {REMOTE})"
    )


def delete(session: Session, arguments: Namespace) -> None:
    """Stop and remove an app."""
    app = session.ask("GET", session.path(), App)
    if not arguments.is_yes and not output.is_asked(f"Delete {app.name} with its releases and routes?", flag="-y"):
        raise Failed("nothing was deleted")
    gone = session.ask("DELETE", session.path(), AppDeleted)
    if git.remotes().get(arguments.remote) == git.url_of(session.cluster.git_address, app.name):
        git.remove_remote(arguments.remote)
    print(f"Deleted {app.name} (releases: {gone.releases}, routes: {gone.routes})")


def number_of(releases: list[Release], release_id: str) -> str:
    """Return a release's short name, `v3`; its id when it is not among `releases`."""
    return next((f"v{release.number}" for release in releases if release.id == release_id), release_id)


def current_release(session: Session) -> Release | None:
    """Return the app's current release, `None` before the first."""
    app = session.ask("GET", session.path(), App)
    if not app.release_id:
        return None
    try:
        return session.ask("GET", session.path("releases", app.release_id), Release)
    except NotFound:
        return None


COMMANDS = (
    Command(
        "create",
        "make an app, and a git remote in the current repository",
        "flynn create example",
        create,
        _create_options,
        description="A name has 1 to 40 lowercase letters, digits and dashes. Its first address is http://NAME.CLUSTER-DOMAIN.",
    ),
    Command("apps", "list the apps: id and name", "flynn apps", show_all, has_json=True),
    Command("info", "show an app's addresses and state", "flynn -a example info", info, has_json=True, needs_app=True),
    Command(
        "delete",
        "stop an app and remove it with its releases, routes and git remote",
        "flynn -a example delete -y",
        delete,
        _delete_options,
        needs_app=True,
    ),
)
