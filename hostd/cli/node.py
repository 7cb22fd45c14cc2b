"""The node itself: daemon, up, down, status, version. Only these touch the machine rather than ask the daemon."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

import msgspec

from discovery.wire.config import add_flags
from discovery.wire.version import VERSION
from hostd.cli.command import add
from hostd.cli.connect import caller_of, local_config
from hostd.cli.output import print_json
from hostd.config import LEAN_MALLOC, NO_AUTHORITIES, SETTINGS
from hostd.types import HostStatus


def run_daemon(arguments: argparse.Namespace) -> int:
    config = local_config(arguments)
    if not LEAN_MALLOC.items() <= os.environ.items():
        os.execve(sys.executable, sys.orig_argv, os.environ | LEAN_MALLOC)  # noqa: S606 — ourselves, leaner
    environment = dict(os.environ)
    os.environ.update(NO_AUTHORITIES)  # for this import only: who fetches from elsewhere is to find them
    from hostd import daemon

    os.environ.clear()
    os.environ.update(environment)
    return daemon.main(config)


def bring_up(arguments: argparse.Namespace) -> int:
    if arguments.foreground:
        return run_daemon(arguments)
    from hostd import background

    status = background.up(local_config(arguments))
    print(f"hostd is up: host {status.host_id} at {status.host_ip}, {status.jobs_running} jobs")
    return 0


def take_down(arguments: argparse.Namespace) -> int:
    from hostd import background

    background.down(local_config(arguments), print)
    print("hostd is down")
    return 0


def show_status(arguments: argparse.Namespace) -> int:
    status = caller_of(arguments).request("GET", "/status", into=HostStatus)
    if arguments.json:
        print_json(status)
        return 0
    fields = msgspec.structs.asdict(status)
    extra = [*fields.pop("features").items(), *fields.pop("sysctls").items()]
    for name, value in [*((name.replace("_", " "), value) for name, value in fields.items()), *extra]:
        print(f"{name + ':':<40} {value}")
    return 0


def show_version(arguments: argparse.Namespace) -> int:
    if arguments.json:
        print_json({"version": VERSION})
    else:
        print(f"hostd {VERSION}")
    return 0


def declare(commands: Any) -> None:
    add_flags(add(commands, "daemon", run_daemon, "run the daemon in the foreground", "hostd daemon"), SETTINGS)
    up = add(commands, "up", bring_up, "start the daemon unless it runs, and wait until it is ready", "hostd up")
    up.add_argument("--foreground", action="store_true", help="stay in the foreground, for a supervisor")
    add_flags(up, SETTINGS)
    down = add(commands, "down", take_down, "end every job and the daemon, and remove all traces", "hostd down")
    add_flags(down, SETTINGS)
    add(commands, "status", show_status, "show the state of this host", "hostd status --json", has_json=True)
    add(commands, "version", show_version, "show the version", "hostd version", has_json=True)
