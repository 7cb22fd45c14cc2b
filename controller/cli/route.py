"""`flynn route list|add http|add tcp|remove` (and `route-add-http`): how traffic reaches an app."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from controller.cli import output
from controller.cli.app import route_url
from controller.cli.command import Command, Parser
from controller.cli.session import Session
from controller.types import NewRoute
from discovery.wire.errors import Invalid, NotFound
from router.types import Route


def show(session: Session, arguments: Namespace) -> None:
    """List the app's routes; private keys are never printed."""
    routes = session.ask("GET", session.path("routes"), list[Route])
    if arguments.is_json:
        output.print_json([_public(route) for route in routes])
        return
    rows = [
        (_name(route), route.service, route.id, "yes" if route.is_sticky else "no", "own" if route.certificate else "")
        for route in routes
    ]
    output.table(("ROUTE", "SERVICE", "ID", "STICKY", "TLS"), rows)


def _public(route: Route) -> Route:
    import msgspec

    return msgspec.structs.replace(route, private_key="")


def _name(route: Route) -> str:
    if route.kind == "tcp":
        return f"tcp:{route.port}"
    return f"http:{route.domain}{'' if route.path == '/' else route.path}"


def add_http(session: Session, arguments: Namespace) -> None:
    """Route a domain, or a path of it, to the app."""
    domain, slash, path = arguments.domain.partition("/")
    if "://" in arguments.domain or not domain:
        raise Invalid(f"{arguments.domain!r} is not a domain", hint="such as www.example.test or www.example.test/api")
    if bool(arguments.cert) != bool(arguments.key):
        raise Invalid("a certificate needs its private key", hint="give both -c CERT and -k KEY, PEM files")
    path = f"/{path.strip('/')}/" if slash and path.strip("/") else "/"
    new = NewRoute(
        kind="http",
        domain=domain.lower(),
        path=path,
        service=arguments.service,
        is_sticky=arguments.is_sticky,
        certificate=_read(arguments.cert),
        private_key=_read(arguments.key),
    )
    route = session.ask("POST", session.path("routes"), Route, new)
    print(f"Route {route_url(route)} added ({route.id})")


def add_tcp(session: Session, arguments: Namespace) -> None:
    """Route a TCP port of the cluster to a service of the app."""
    if not 0 <= arguments.port <= 65535:
        raise Invalid(f"{arguments.port} is not a port", hint="1 to 65535, or none to have one chosen")
    new = NewRoute(kind="tcp", port=arguments.port, service=arguments.service)
    route = session.ask("POST", session.path("routes"), Route, new)
    print(f"Route tcp port {route.port} added ({route.id})")


def _read(file: str | None) -> str:
    if not file:
        return ""
    try:
        return Path(file).expanduser().read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise NotFound(f"{file} cannot be read: {error}", hint="a PEM file") from error


def remove(session: Session, arguments: Namespace) -> None:
    """Remove a route, by id or by what it routes."""
    wanted = arguments.route.removesuffix("/")
    routes = session.ask("GET", session.path("routes"), list[Route])
    found = [
        route
        for route in routes
        if wanted in (route.id, f"{route.kind}/{route.id}", _name(route), _name(route).removesuffix("/"))
        or wanted == _name(route).removeprefix("http:").removesuffix("/")
    ]
    if len(found) != 1:
        problem = f"{len(found)} routes match {wanted!r}" if found else f"no route {wanted!r}"
        raise NotFound(problem, hint="`flynn route` lists the app's routes with their ids")
    session.ask("DELETE", session.path("routes", found[0].id))
    print(f"Route {_name(found[0])} removed")


def _http_options(parser: Parser) -> None:
    parser.add_argument(
        "domain", metavar="DOMAIN[/PATH]", help="such as www.example.test, *.example.test, example.test/api"
    )
    parser.add_argument(
        "-s", "--service", metavar="SERVICE", default="", help="the service that answers (default: APP-web)"
    )
    parser.add_argument("-c", "--cert", metavar="FILE", help="PEM certificate chain, for HTTPS")
    parser.add_argument("-k", "--key", metavar="FILE", help="PEM private key of the certificate")
    parser.add_argument(
        "--sticky", action="store_true", dest="is_sticky", help="keep a visitor at one instance (a cookie)"
    )


def _tcp_options(parser: Parser) -> None:
    parser.add_argument("-p", "--port", metavar="PORT", type=int, default=0, help="the port (default: one is chosen)")
    parser.add_argument(
        "-s", "--service", metavar="SERVICE", default="", help="the service that answers (default: APP-web)"
    )


def _remove_options(parser: Parser) -> None:
    parser.add_argument("route", metavar="ROUTE", help="id, DOMAIN[/PATH] or tcp:PORT")


COMMANDS = (
    Command("route list", "list an app's routes", "flynn route", show, has_json=True, needs_app=True),
    Command(
        "route add http",
        "route a domain to the app",
        "flynn route add http www.example.test",
        add_http,
        _http_options,
        needs_app=True,
    ),
    Command(
        "route add tcp",
        "route a TCP port to the app",
        "flynn route add tcp -s example-db -p 3306",
        add_tcp,
        _tcp_options,
        needs_app=True,
    ),
    Command(
        "route remove", "remove a route", "flynn route remove www.example.test", remove, _remove_options, needs_app=True
    ),
)
