"""`flynn cluster list|add|remove|default` (and `server-add`): which clusters this machine may command."""

from __future__ import annotations

import re
import sys
from argparse import Namespace
from urllib.parse import urlsplit

import msgspec

from controller.cli import config, output
from controller.cli.command import Command, Parser
from controller.cli.session import Session, caller_of
from controller.types import ClusterInfo
from discovery.wire.errors import Invalid, Unavailable

GIT_PORT = 2222
CHECK_TIMEOUT_S = 5.0
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_ADDRESS = re.compile(r"\[?[A-Za-z0-9.:_-]+?\]?:\d{1,5}")
_DOMAIN = re.compile(r"(?=.{1,253}$)[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?(?::\d{1,5})?")


def _add_options(parser: Parser) -> None:
    parser.add_argument("name", metavar="NAME", help="what you call the cluster")
    parser.add_argument("domain", metavar="DOMAIN|URL", help="the cluster's domain, or its controller's URL")
    parser.add_argument("key", metavar="KEY", nargs="?", help="the controller's key; - reads it from stdin")
    parser.add_argument("-g", "--git", metavar="HOST:PORT", help=f"where git pushes go (default: DOMAIN:{GIT_PORT})")
    parser.add_argument("-p", "--pin", metavar="PIN", default="", help="base64 SHA-256 of the controller's certificate")
    parser.add_argument(
        "-a", "--address", metavar="IP", default="", help="dial this instead of asking DNS for the domain"
    )
    parser.add_argument("-d", "--default", action="store_true", dest="is_default", help="make it the default")
    parser.add_argument("-f", "--force", action="store_true", dest="is_forced", help="replace one of the same name")


def add(session: Session, arguments: Namespace) -> None:
    """Check that the cluster answers to the key, and remember it."""
    domain, key = arguments.domain, arguments.key
    if key is None:  # the article's line: NAME KEY, the domain being the git host's
        if not arguments.git:
            raise Invalid("the controller's key is missing", hint="flynn cluster add -p PIN NAME DOMAIN KEY")
        domain, key = arguments.git.rpartition(":")[0], arguments.domain
    if key == "-":  # what stands in a command line, every user of the machine can see
        key = sys.stdin.readline().strip()
    cluster = make_cluster(arguments.name, domain, key, arguments.git or "", arguments.pin, arguments.address)
    changed = session.config.added(cluster, is_default=arguments.is_default, is_forced=arguments.is_forced)
    cluster = _check(cluster, has_git=bool(arguments.git))
    changed = msgspec.structs.replace(changed, clusters=(*changed.clusters[:-1], cluster))
    config.save(changed)
    print(f"Cluster {cluster.name!r} added" + (" (default)" if changed.default == cluster.name else ""))


def make_cluster(name: str, domain: str, key: str, git: str, pin: str, address: str) -> config.Cluster:
    """Put a cluster together from what was typed.

    Raises:
        Invalid: something of it cannot be.
    """
    is_url = "://" in domain
    parts = urlsplit(domain if is_url else f"https://{domain}")
    if not _NAME.fullmatch(name):
        raise Invalid(f"cluster name {name!r} is not allowed", hint="letters, digits, dot, dash, underscore")
    if parts.scheme not in ("https", "http", "unix") or (
        parts.scheme != "unix" and not _DOMAIN.fullmatch(parts.netloc)
    ):
        raise Invalid(
            f"{domain!r} is no domain and no URL", hint="such as example.test or https://controller.example.test"
        )
    if git and not _ADDRESS.fullmatch(git):
        raise Invalid(f"git address {git!r} is not HOST:PORT", hint=f"such as example.test:{GIT_PORT}")
    if pin and not re.fullmatch(r"[A-Za-z0-9+/]{43}=", pin):
        raise Invalid(f"pin {pin!r} is not a pin", hint="44 characters of base64, as `hostd bootstrap` printed it")
    host = parts.hostname or "localhost"
    return config.Cluster(
        name=name,
        url=domain.rstrip("/") if is_url else f"https://controller.{domain}",
        key=key,
        pin=pin,
        git_address=git or f"{address or host.removeprefix('controller.')}:{GIT_PORT}",
        address=address,
    )


def _check(cluster: config.Cluster, *, has_git: bool) -> config.Cluster:
    """Ask the cluster who it is; one that is not up yet is remembered all the same."""
    try:
        with output.Waiting(cluster.url):
            info = caller_of(cluster, CHECK_TIMEOUT_S).request("GET", "/cluster", into=ClusterInfo)
    except Unavailable as error:
        output.note(f"flynn: warning: {error.message}; added unchecked")
        return cluster
    if has_git or cluster.address or not info.git_address:
        return cluster
    return msgspec.structs.replace(cluster, git_address=info.git_address)


def show(session: Session, arguments: Namespace) -> None:
    """List the clusters; JSON leaves the keys out."""
    known = session.config
    if arguments.is_json:
        output.print_json(
            [
                {
                    "name": c.name,
                    "url": c.url,
                    "git_address": c.git_address,
                    "address": c.address,
                    "pin": c.pin,
                    "is_default": c.name == known.default,
                }
                for c in known.clusters
            ]
        )
        return
    rows = [(c.name, c.url, c.git_address, "default" if c.name == known.default else "") for c in known.clusters]
    output.table(("NAME", "CONTROLLER", "GIT", ""), rows)


def remove(session: Session, arguments: Namespace) -> None:
    """Forget a cluster."""
    config.save(session.config.removed(arguments.name))
    print(f"Cluster {arguments.name!r} removed")


def default(session: Session, arguments: Namespace) -> None:
    """Show or set the default cluster."""
    if arguments.name:
        chosen = session.config.find(arguments.name)
        config.save(msgspec.structs.replace(session.config, default=chosen.name))
        print(f"Default cluster is {chosen.name!r}")
    elif arguments.is_json:
        output.print_json({"name": session.config.find("").name})
    else:
        print(session.config.find("").name)


def _name_option(parser: Parser) -> None:
    parser.add_argument("name", metavar="NAME", help="the cluster")


def _default_option(parser: Parser) -> None:
    parser.add_argument("name", metavar="NAME", nargs="?", help="the cluster to become the default")


COMMANDS = (
    Command(
        "cluster list",
        "list the clusters that this machine knows",
        "flynn cluster list",
        show,
        has_json=True,
        needs_cluster=False,
    ),
    Command(
        "cluster add",
        "remember a cluster",
        "flynn cluster add -p Hey8twCAAZtTJBc8QO7zyOhh+EOMRU6MHdAv5Sb32og= default example.test KEY",
        add,
        _add_options,
        description="`hostd bootstrap` ends with the line to paste. It is written to ~/.flynnrc (mode 0600) after the\n"
        "cluster has answered to the key; the first cluster becomes the default.",
        needs_cluster=False,
    ),
    Command(
        "cluster remove", "forget a cluster", "flynn cluster remove staging", remove, _name_option, needs_cluster=False
    ),
    Command(
        "cluster default",
        "show or set the default cluster",
        "flynn cluster default staging",
        default,
        _default_option,
        has_json=True,
        needs_cluster=False,
    ),
)
