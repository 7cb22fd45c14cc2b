"""The host's disk: what takes it, and giving back what nobody needs."""

from __future__ import annotations

import argparse
from typing import Any

from hostd.cli.command import add
from hostd.cli.connect import caller_of
from hostd.cli.output import mebibytes, print_json, print_table
from hostd.types import DiskUse, Removed


def measure(arguments: argparse.Namespace) -> int:
    found = caller_of(arguments, timeout_s=600.0).request("GET", "/df", into=list[DiskUse])
    if arguments.json:
        print_json(found)
        return 0
    rows = [
        (each.kind, str(each.count or "-"), mebibytes(each.size_bytes), mebibytes(each.reclaimable_bytes))
        for each in found
    ]
    print_table(("KIND", "COUNT", "SIZE", "RECLAIMABLE"), rows)
    return 0


def collect(arguments: argparse.Namespace) -> int:
    query = {name: "" for name, is_set in (("dry_run", arguments.dry_run), ("pressure", arguments.pressure)) if is_set}
    removed = caller_of(arguments, timeout_s=600.0).request("POST", "/gc", into=list[Removed], query=query)
    if arguments.json:
        print_json(removed)
        return 0
    print_table(("KIND", "NAME", "SIZE"), [(each.kind, each.name, mebibytes(each.size_bytes)) for each in removed])
    word = "would be freed" if arguments.dry_run else "freed"
    print(f"{mebibytes(sum(each.size_bytes for each in removed))} {word}")
    return 0


def declare(commands: Any) -> None:
    add(commands, "df", measure, "measure what takes the host's disk", "hostd df", has_json=True)
    gc = add(commands, "gc", collect, "remove what nobody needs any more", "hostd gc --dry-run", has_json=True)
    gc.add_argument("--dry-run", action="store_true", help="only say what would go")
    gc.add_argument("--pressure", action="store_true", help="as if the disk were full: of any age, and unused images")
