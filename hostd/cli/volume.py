"""The host's persistent directories and their snapshots."""

from __future__ import annotations

import argparse
from typing import Any
from urllib.parse import quote

from hostd.cli.command import add
from hostd.cli.connect import caller_of
from hostd.cli.output import age, mebibytes, print_json, print_table
from hostd.types import DiskUse, Snapshot, Volume


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


def _snapshots_path(name: str, snapshot: str) -> str:
    return f"/volumes/{quote(name, safe='')}/snapshots/{quote(snapshot, safe='')}"


def list_snapshots(arguments: argparse.Namespace) -> int:
    path = f"/volumes/{quote(arguments.name, safe='')}/snapshots" if arguments.name else "/snapshots"
    found = caller_of(arguments).request("GET", path, into=list[Snapshot])
    if arguments.json:
        print_json(found)
        return 0
    print_table(("VOLUME", "SNAPSHOT", "AGE"), [(each.volume, each.name, age(each.created_at)) for each in found])
    return 0


def make_snapshot(arguments: argparse.Namespace) -> int:
    query = {"freeze": ""} if arguments.freeze else None
    path = _snapshots_path(arguments.name, arguments.snapshot)
    made = caller_of(arguments, timeout_s=3600.0).request("PUT", path, into=Snapshot, query=query)
    held = f", {', '.join(made.frozen)} held still meanwhile" if made.frozen else ""
    print(f"snapshot {made.name} of volume {made.volume} made{held}")
    return 0


def restore_snapshot(arguments: argparse.Namespace) -> int:
    path = _snapshots_path(arguments.name, arguments.snapshot)
    caller_of(arguments, timeout_s=3600.0).request("POST", path + "/restore")
    print(f"volume {arguments.name} is what it was at {arguments.snapshot}")
    return 0


def remove_snapshot(arguments: argparse.Namespace) -> int:
    caller_of(arguments, timeout_s=600.0).request("DELETE", _snapshots_path(arguments.name, arguments.snapshot))
    print(f"snapshot {arguments.snapshot} of volume {arguments.name} removed")
    return 0


def measure_volumes(arguments: argparse.Namespace) -> int:
    found = caller_of(arguments, timeout_s=600.0).request("GET", "/df", into=list[DiskUse], query={"volumes": ""})
    if arguments.json:
        print_json(found)
        return 0
    print_table(("NAME", "SIZE"), [(each.kind, mebibytes(each.size_bytes)) for each in found])
    return 0


def declare(commands: Any) -> None:
    volume = commands.add_parser("volume", help="volumes and their snapshots", description="The host's volumes.")
    words = volume.add_subparsers(metavar="COMMAND", required=True)
    for name in ("list", "ls"):
        add(words, name, list_volumes, "list the volumes", f"hostd volume {name}", has_json=True)
    add(words, "df", measure_volumes, "measure volumes and snapshots", "hostd volume df", has_json=True)
    for name in ("remove", "rm"):
        remove = add(words, name, remove_volume, "delete an unused volume", f"hostd volume {name} data")
        remove.add_argument("name", metavar="NAME")
    listing = add(words, "snapshots", list_snapshots, "list snapshots", "hostd volume snapshots data", has_json=True)
    listing.add_argument("name", nargs="?", default="", metavar="NAME")
    example = "hostd volume snapshot data before-upgrade"
    make = add(words, "snapshot", make_snapshot, "copy a volume as it is now", example)
    make.add_argument("--freeze", action="store_true", help="hold jobs that use it still meanwhile, do not refuse")
    example = "hostd volume restore data before-upgrade"
    restore = add(words, "restore", restore_snapshot, "make an unused volume what it was", example)
    example = "hostd volume remove-snapshot data before-upgrade"
    gone = add(words, "remove-snapshot", remove_snapshot, "delete a snapshot", example)
    for command in (make, restore, gone):
        command.add_argument("name", metavar="NAME")
        command.add_argument("snapshot", metavar="SNAPSHOT")
