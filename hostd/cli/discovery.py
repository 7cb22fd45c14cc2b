"""The store of a node: how it is, snapshots of it. Speaks to the discovery daemon of this machine."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec

from discovery.types import StoreStatus
from discovery.wire import clock
from discovery.wire.blocking import BlockingCaller
from discovery.wire.errors import Conflict, ErrorBody, Internal, Invalid, ServiceError, Unauthorized, Unavailable
from hostd.cli.command import add
from hostd.cli.connect import local_config
from hostd.cli.output import mebibytes, print_json, print_table
from hostd.config import Config

_RESTART_S = 30.0


class _Contents(msgspec.Struct):
    """What a snapshot holds, as `discovery.offline` says it."""

    revision: int = 0
    keys: int = 0
    leases: int = 0


def _caller(config: Config, timeout_s: float = 30.0) -> BlockingCaller:
    path = config.discovery_socket
    try:
        if not path.exists():
            raise Unavailable(f"discovery is not running here: there is no {path}", hint="sudo hostd up")
    except PermissionError:
        raise Unauthorized(f"only root may speak to {path}", hint="try again with sudo") from None
    return BlockingCaller(f"unix://{path}", timeout_s=timeout_s)


def show_status(arguments: argparse.Namespace) -> int:
    status = _caller(local_config(arguments)).request("GET", "/status", into=StoreStatus)
    if arguments.json:
        print_json(status)
        return 0
    for name, value in msgspec.structs.asdict(status).items():
        if name == "members":
            value = ", ".join(member.id for member in status.members) or "-"
        elif name == "disk_bytes":
            value = mebibytes(status.disk_bytes)
        print(f"{name.replace('_', ' ') + ':':<22} {value}")
    return 0


def list_members(arguments: argparse.Namespace) -> int:
    status = _caller(local_config(arguments)).request("GET", "/status", into=StoreStatus)
    if arguments.json:
        print_json(status.members)
        return 0
    rows = [
        (each.id, each.address or "-", "leader" if each.is_leader else "voter" if each.is_voter else "learner")
        for each in status.members
    ]
    print_table(("MEMBER", "ADDRESS", "ROLE"), rows)
    return 0


def change_member(arguments: argparse.Namespace) -> int:
    """Promote or demote; the leader carries it out, wherever it is."""
    verb = "remove" if getattr(arguments, "remove", False) else arguments.verb
    query = {"address": arguments.address} if getattr(arguments, "address", "") else None
    path = f"/members/{quote(arguments.member, safe='')}/{verb}"
    _caller(local_config(arguments)).request("POST", path, query=query)
    said = {"promote": "will have a vote once it has caught up", "demote": "has no vote", "remove": "is no member"}
    print(f"{arguments.member} {said[verb]}")
    return 0


def force_new_cluster(arguments: argparse.Namespace) -> int:
    config = local_config(arguments)
    pid = _pid_of_daemon(config)
    status = _caller(config).request("GET", "/status", into=StoreStatus) if pid else None
    if status and status.leader_id and not arguments.despite_leader:
        raise Conflict(
            f"the store has a leader, {status.leader_id}: nothing needs to be forced",
            hint="--despite-leader says that this is meant; what other members write from now on is not seen here",
        )
    if not arguments.lose_what_others_have:
        raise Invalid(
            "this member would go on alone with what it has; what only the others have is lost",
            hint="--lose-what-others-have says that this is meant. Choose the member with the highest revision",
        )
    if pid:
        _offline("force", "--state-dir", str(config.discovery_state_dir), "--when-it-starts")
        os.kill(pid, signal.SIGTERM)
        _wait_for_another(config, pid)
    else:
        _offline("force", "--state-dir", str(config.discovery_state_dir))
    print("this member is a cluster of its own now; wipe the others and promote them to have them back")
    return 0


def save_snapshot(arguments: argparse.Namespace) -> int:
    """Write beside, check, sync, rename: the file is there as a whole or not at all."""
    path = Path(arguments.file)
    if path.exists() and not arguments.replace:
        raise Conflict(f"{path} exists", hint="another name, or --replace")
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    caller = _caller(local_config(arguments), timeout_s=600.0)
    try:
        try:
            fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)  # everything is in it, secrets too
            with os.fdopen(fd, "wb") as file:
                for part in caller.stream("/snapshot"):
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            contents = _offline("verify", str(draft))
            draft.rename(path)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise Internal(f"{path}: {error.strerror}", hint="nothing was written there") from error
    if arguments.json:
        print_json({"file": str(path), "size_bytes": path.stat().st_size} | msgspec.structs.asdict(contents))
    else:
        size = mebibytes(path.stat().st_size)
        print(f"{path}: {contents.keys} keys as of revision {contents.revision}, {size}")
    return 0


def restore_snapshot(arguments: argparse.Namespace) -> int:
    config = local_config(arguments)
    directory = config.discovery_state_dir
    flags = [f"--address={config.raft_address}", *(["--discard-current"] if arguments.discard_current else [])]
    contents = _offline("restore", arguments.file, "--state-dir", str(directory), *flags)
    pid = _pid_of_daemon(config)
    if pid:
        os.kill(pid, signal.SIGTERM)  # hostd starts it again, and it takes the new store as it starts
        _wait_for_another(config, pid)
    else:
        _offline("adopt", "--state-dir", str(directory))
    print(f"restored {contents.keys} keys as of revision {contents.revision}")
    aside = sorted(directory.parent.glob(directory.name + ".before-*"), key=lambda path: path.stat().st_mtime)
    if aside:
        print(f"what was there before is in {aside[-1]}")
    return 0


def _offline(*words: str) -> _Contents:
    """Run the part that knows the files, in a process of its own.

    Raises:
        ServiceError: what it refuses.
    """
    done = subprocess.run([sys.executable, "-I", "-m", "discovery.offline", *words], capture_output=True)
    if done.returncode:
        try:
            raise ServiceError.from_body(msgspec.json.decode(done.stderr, type=ErrorBody, strict=False))
        except msgspec.MsgspecError:
            raise Internal(f"discovery.offline: {done.stderr[-2000:].decode(errors='replace')}") from None
    return msgspec.json.decode(done.stdout, type=_Contents)


def _pid_of_daemon(config: Config) -> int:
    """Return who answers on discovery's socket, 0 if nobody does."""
    with socket.socket(socket.AF_UNIX) as one:
        try:
            one.connect(str(config.discovery_socket))
        except OSError:
            return 0
        return int(struct.unpack("iII", one.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0])


def _wait_for_another(config: Config, pid: int) -> None:
    deadline_s = clock.monotonic_s() + _RESTART_S
    while True:
        now = _pid_of_daemon(config)
        if now not in (0, pid):
            try:
                _caller(config).request("GET", "/status", into=StoreStatus)
                return
            except ServiceError:
                pass
        if clock.monotonic_s() > deadline_s:
            log = config.state_dir / "discovery.log"
            raise Unavailable(
                "discovery does not come back", hint=f"is hostd running? see {log}; the new store is ready"
            )
        time.sleep(0.1)


def declare(commands: Any) -> None:
    store = commands.add_parser("discovery", help="look after the store", description="The store of the cluster.")
    verbs = store.add_subparsers(metavar="COMMAND", required=True)
    add(verbs, "status", show_status, "show how the store is here", "hostd discovery status --json", has_json=True)
    add(verbs, "members", list_members, "list the members of the store", "hostd discovery members", has_json=True)
    promote = add(
        verbs, "promote", change_member, "give a member a vote once it has caught up", "hostd discovery promote host-4"
    )
    promote.add_argument("member", metavar="MEMBER")
    promote.add_argument("--address", default="", metavar="HOST:PORT", help="where it is, if it is no member yet")
    promote.set_defaults(verb="promote")
    demote = add(
        verbs, "demote", change_member, "take a member's vote; it goes on following", "hostd discovery demote host-4"
    )
    demote.add_argument("member", metavar="MEMBER")
    demote.add_argument("--remove", action="store_true", help="and take it off the list")
    demote.set_defaults(verb="demote")
    force = add(
        verbs,
        "force-new-cluster",
        force_new_cluster,
        "go on with this member alone, when most members are lost for good",
        "hostd discovery force-new-cluster --lose-what-others-have",
        details="Keeps all that this member has. The store of before is set aside, never removed.",
    )
    force.add_argument("--lose-what-others-have", action="store_true", help="say that this is meant")
    force.add_argument("--despite-leader", action="store_true", help="even though the store works")
    snapshots = verbs.add_parser("snapshot", help="save or restore the whole store", description="Snapshots.")
    kinds = snapshots.add_subparsers(metavar="COMMAND", required=True)
    save = add(
        kinds,
        "save",
        save_snapshot,
        "save the whole store as a file, and check it",
        "hostd discovery snapshot save /root/store.snapshot",
        has_json=True,
        details="The file holds all keys, secrets too; only its owner may read it.",
    )
    save.add_argument("file", metavar="FILE")
    save.add_argument("--replace", action="store_true", help="even if FILE exists")
    restore = add(
        kinds,
        "restore",
        restore_snapshot,
        "make the store what a snapshot holds",
        "hostd discovery snapshot restore /root/store.snapshot --discard-current",
        details="The present store is set aside, never removed. The restored one begins a new cluster of this member.",
    )
    restore.add_argument("file", metavar="FILE")
    restore.add_argument(
        "--discard-current",
        action="store_true",
        help="even if there is a store; it is kept, but not in use",
    )
