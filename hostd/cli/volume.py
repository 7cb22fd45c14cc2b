"""The host's persistent directories."""

from __future__ import annotations

import argparse
from typing import Any
from urllib.parse import quote

from hostd.cli.command import add
from hostd.cli.connect import caller_of
from hostd.cli.output import print_json, print_table
from hostd.types import Volume


def list_volumes(arguments: argparse.Namespace) -> int:
    volumes = caller_of(arguments).request("GET", "/volumes", into=list[Volume])
    if arguments.json:
        print_json(volumes)
        return 0
    print_table(("NAME", "USED BY", "PATH"), [(v.name, ",".join(v.used_by) or "-", v.path) for v in volumes])
    return 0


def remove_volume(arguments: argparse.Namespace) -> int:
    caller_of(arguments, timeout_s=600.0).request("DELETE", "/volumes/" + quote(arguments.name, safe=""))
    print(f"volume {arguments.name} removed")
    return 0


def declare(commands: Any) -> None:
    volume = commands.add_parser("volume", help="list and remove volumes", description="The host's volumes.")
    volume_commands = volume.add_subparsers(metavar="COMMAND", required=True)
    add(volume_commands, "list", list_volumes, "list the volumes", "hostd volume list", has_json=True)
    remove = add(volume_commands, "remove", remove_volume, "delete an unused volume", "hostd volume remove data")
    remove.add_argument("name", metavar="NAME")
