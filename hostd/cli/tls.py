"""Who may reach this host's API over TCP: its certificate authority, and certificates for clients."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from discovery.wire import roles
from discovery.wire.errors import Invalid
from hostd.cli.command import add
from hostd.cli.connect import local_config
from hostd.cli.output import print_json


def make_authority(arguments: argparse.Namespace) -> int:
    from hostd.authority import Authority, authority_file, expiry

    folder = local_config(arguments).tls_dir
    Authority.ensure(folder, is_fresh=arguments.fresh)
    print(f"the authority of this host is in {folder}, good until {expiry(authority_file(folder)):%Y-%m-%d}")
    if arguments.fresh:
        print("every earlier certificate is void once hostd is started again (jobs live on)")
    return 0


def make_client(arguments: argparse.Namespace) -> int:
    from hostd.authority import Authority

    authority = Authority.ensure(local_config(arguments).tls_dir)
    if sys.stdout.isatty():
        raise Invalid("this would print a private key on the terminal", hint="hostd tls client NAME > FILE")
    bundle = authority.client(
        arguments.name,
        is_read_only=arguments.read_only,
        role=arguments.role,
        prefixes=arguments.prefix,
        days=arguments.days,
    )
    print(bundle.decode(), end="")
    return 0


def show(arguments: argparse.Namespace) -> int:
    from hostd.authority import Authority, authority_file, expiry, server_file

    config = local_config(arguments)
    Authority.open(config.tls_dir)
    found = {"api_listen": config.api_listen}
    for what, path in (("authority", authority_file(config.tls_dir)), ("server", server_file(config.tls_dir))):
        found[what] = str(path)
        found[f"{what}_expires"] = expiry(path).isoformat() if path.exists() else ""
    if arguments.json:
        print_json(found)
        return 0
    for name, value in found.items():
        print(f"{name.replace('_', ' ') + ':':<20} {value or '-'}")
    return 0


_CLIENT = """Whoever has it is as good as root on this host until it expires: no single one can be taken back
(`hostd tls init --fresh` takes back all). One made with --read-only may look at everything, but neither start,
stop, attach to nor run anything. Keep the file as you would a private key, because it has one.

On the client: hostd --host https://HOST:PORT --cert FILE ps"""


def declare(commands: Any) -> None:
    """Add these commands."""
    tls = commands.add_parser("tls", help="let others reach this host over TCP", description="Mutual TLS.")
    tls_commands = tls.add_subparsers(metavar="COMMAND", required=True)
    init = add(tls_commands, "init", make_authority, "make this host's certificate authority", "hostd tls init")
    init.add_argument("--fresh", action="store_true", help="a new one: every certificate made so far is void")
    client = add(
        tls_commands,
        "client",
        make_client,
        "print a new client certificate with its key",
        "hostd tls client alice --days 30",
        details=_CLIENT,
    )
    client.add_argument("name", metavar="NAME")
    client.add_argument("--read-only", action="store_true", help="it may look, but change nothing")
    client.add_argument(
        "--role",
        default="",
        choices=roles.ROLES,
        help="what it may do in discovery, where without one it may do nothing; host and job may do nothing at hostd",
    )
    client.add_argument(
        "--prefix",
        action="append",
        default=[],
        help="a prefix of keys that a job may use (with --role job; repeatable)",
    )
    client.add_argument("--days", type=float, default=365.0, metavar="COUNT", help="how long it is good (default: 365)")
    add(
        tls_commands,
        "show",
        show,
        "show where the certificates are and when they expire",
        "hostd tls show",
        has_json=True,
    )
