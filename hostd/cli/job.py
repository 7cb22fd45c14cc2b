"""Jobs: ps, inspect, stop, signal, forget."""

from __future__ import annotations

import argparse
import signal
from typing import Any

import msgspec

from discovery.wire.errors import Invalid
from hostd.cli.command import add
from hostd.cli.connect import caller_of, job_path, labels_query
from hostd.cli.output import age, print_json, print_table
from hostd.types import ENDED, Job, SignalRequest


def without_env(job: Job) -> Job:
    """Leave the values of the environment out: they may be keys, and terminals are seen and recorded."""
    spec = msgspec.structs.replace(job.spec, env=dict.fromkeys(job.spec.env, "***"))
    return msgspec.structs.replace(job, spec=spec)


def _why(job: Job) -> str:
    """Say what the status alone does not."""
    if job.status == "running":
        return "" if job.is_up else " (not up)"
    return f" ({job.end_reason})" if job.end_reason not in ("", "exited", "start-failed") else ""


def list_jobs(arguments: argparse.Namespace) -> int:
    query = "&".join(filter(None, [labels_query(arguments.label), "" if arguments.all else "active"]))
    jobs = caller_of(arguments).request("GET", "/jobs" + (f"?{query}" if query else ""), into=list[Job])
    if arguments.json:
        print_json(jobs if arguments.env else [without_env(job) for job in jobs])
        return 0
    rows = [
        (
            job.spec.id,
            job.status + _why(job),
            age(job.started_at or job.created_at),
            job.ip or "-",
            ",".join(map(str, job.ports)) or "-",
            "-" if job.exit_status is None else str(job.exit_status),
            " ".join(job.spec.args)[:60],
        )
        for job in jobs
    ]
    print_table(("ID", "STATUS", "AGE", "IP", "PORTS", "EXIT", "COMMAND"), rows)
    return 0


def stop_jobs(arguments: argparse.Namespace) -> int:
    caller = caller_of(arguments, timeout_s=600.0)
    for job_id in arguments.id:
        caller.request("POST", job_path(job_id) + "/stop", into=Job, query={"wait": ""})
        print(f"{job_id} stopped")
    return 0


def signal_number(text: str) -> int:
    if text.isdigit():
        return int(text)
    name = text.upper() if text.upper().startswith("SIG") else "SIG" + text.upper()
    try:
        return signal.Signals[name].value
    except KeyError:
        raise Invalid(f"signal {text!r}", hint="a number or a name such as HUP") from None


def signal_job(arguments: argparse.Namespace) -> int:
    number = signal_number(arguments.signal)
    caller_of(arguments).request("POST", job_path(arguments.id) + "/signal", body=SignalRequest(number=number))
    return 0


def kill_jobs(arguments: argparse.Namespace) -> int:
    caller, number = caller_of(arguments), signal_number(arguments.signal)
    for job_id in arguments.id:
        caller.request("POST", job_path(job_id) + "/signal", body=SignalRequest(number=number))
    return 0


def inspect_job(arguments: argparse.Namespace) -> int:
    job = caller_of(arguments).request("GET", job_path(arguments.id), into=Job)
    print_json(job if arguments.env else without_env(job))
    return 0


def forget_jobs(arguments: argparse.Namespace) -> int:
    caller = caller_of(arguments)
    ids = arguments.id
    if not ids:
        ids = [job.spec.id for job in caller.request("GET", "/jobs", into=list[Job]) if job.status in ENDED]
    for job_id in ids:
        caller.request("DELETE", job_path(job_id))
        print(f"{job_id} forgotten")
    return 0


def declare(commands: Any) -> None:
    ps = add(commands, "ps", list_jobs, "list jobs", "hostd ps --label app=example", has_json=True)
    ps.add_argument("-a", "--all", action="store_true", help="ended jobs, too")
    ps.add_argument("--env", action="store_true", help="show the environment's values in JSON")
    ps.add_argument("-l", "--label", action="append", default=[], metavar="KEY=VALUE", help="only with this label")
    stop = add(commands, "stop", stop_jobs, "end jobs and wait for it", "hostd stop run-0123456789ab")
    stop.add_argument("id", nargs="+", metavar="ID")
    send = add(commands, "signal", signal_job, "send a signal to a job", "hostd signal run-0123456789ab HUP")
    send.add_argument("id", metavar="ID")
    send.add_argument("signal", metavar="SIGNAL")
    kill = add(commands, "kill", kill_jobs, "kill jobs, or send them another signal", "hostd kill run-0123456789ab")
    kill.add_argument("-s", "--signal", default="KILL", metavar="SIGNAL", help="name or number (default: KILL)")
    kill.add_argument("id", nargs="+", metavar="ID")
    inspect = add(commands, "inspect", inspect_job, "print everything about a job, as JSON", "hostd inspect ID")
    inspect.add_argument("id", metavar="ID")
    inspect.add_argument("--env", action="store_true", help="show the environment's values")
    inspect.add_argument("--json", action="store_true", help="(always)")
    forget = add(
        commands, "forget", forget_jobs, "remove ended jobs and their logs (all if none is named)", "hostd forget"
    )
    forget.add_argument("id", nargs="*", metavar="ID")
