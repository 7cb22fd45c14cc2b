"""`hostd bootstrap`: starts layer 1 on a bare host, step by step, and prints the line that adds the cluster.

Works on the sockets of hostd and discovery. Every step is safe to run again, so after a failure (or
at any other time) the same command goes on where it is needed. Refuses to begin when another program
holds a port that the router needs, or when the cluster was made under another domain.

Example: hostd bootstrap --domain example.test
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import logging
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from controller.errors import DomainFixed, StepFailed
from controller.inception import ports
from controller.inception.actions import Inception
from controller.inception.steps import AnyStep, Manifest, filled, read_manifest
from discovery.client import Services, Store
from discovery.wire import clock
from discovery.wire.errors import Invalid, ServiceError, Unavailable
from hostd.client import HostClient
from hostd.types import HostStatus

DEFAULT_DOMAIN = "cluster.test"
DEFAULT_RUN_DIR = "/run/hostd"
MANIFEST = Path(__file__).parent / "manifest.json"
GIT_PORT = 2222
HOST_PATIENCE_S = 30.0


class Printer:
    """Prints what happens: `HH:MM:SS.micros action id [text]`, or one JSON object a line."""

    def __init__(self, *, is_json: bool) -> None:
        self._is_json = is_json

    def say(self, step: AnyStep, state: str, text: str = "") -> None:
        now = clock.now_s()
        if self._is_json:
            line = {"at": now, "action": step.action, "id": step.id, "state": state, "text": text}
            print(msgspec.json.encode(line).decode(), flush=True)
        elif state != "done":
            at = datetime.datetime.fromtimestamp(now).astimezone()
            failed = "error: " if state == "error" else ""
            print(f"{at:%H:%M:%S.%f} {step.action} {step.id} {failed}{text}".rstrip(), flush=True)


def router_ports(manifest: Manifest) -> list[int]:
    """Return the fixed ports that the manifest's jobs need on the host."""
    plans = [step.app for step in manifest.steps if hasattr(step, "app") and not isinstance(step.app, str)]
    return sorted({p.number for plan in plans for t in plan.processes.values() for p in t.ports if p.number})


async def host_status(host: HostClient) -> HostStatus:
    """Ask the host who it is; wait a while for one that is just starting.

    Raises:
        Unavailable: it does not answer.
    """
    deadline = clock.monotonic_s() + HOST_PATIENCE_S
    while True:
        try:
            return await host.status()
        except Unavailable as error:
            if clock.monotonic_s() > deadline:
                raise Unavailable(f"hostd does not answer: {error.message}", hint="start it: hostd up") from error
        await asyncio.sleep(0.2)


async def settle_domain(inception: Inception, domain: str) -> str:
    """Return the cluster's domain: the one given now, or at the first time.

    Raises:
        DomainFixed: those are two.
    """
    kept = (await inception.once("cluster", lambda: {"domain": domain or DEFAULT_DOMAIN}))["domain"]
    if domain and domain != kept:
        raise DomainFixed(f"this cluster is {kept}, not {domain}", hint="make purge starts over; domains cannot change")
    return kept


async def run_steps(inception: Inception, manifest: Manifest, printer: Printer) -> None:
    """Carry out every step in order; the first that fails ends it."""
    for raw in manifest.steps:
        step = filled(raw, inception.outputs)
        printer.say(step, "start")

        def tell(text: str, step: AnyStep = step) -> None:
            printer.say(step, "info", text)

        try:
            inception.outputs[step.id] = await inception.carry_out(step, tell)
        except ServiceError as error:
            printer.say(step, "error", error.message)
            raise
        printer.say(step, "done")


async def configure_cli(inception: Inception) -> None:
    """Add the cluster to the `flynn` command of whoever runs this.

    Raises:
        StepFailed: the command is not there, or refuses.
    """
    beside = Path(sys.executable).parent / "flynn"
    command = str(beside) if beside.exists() else shutil.which("flynn")
    if command is None:
        raise StepFailed(
            "the flynn command is not installed", hint="pip install the hostd package", step="configure-cli"
        )
    cluster, key = inception.outputs["cluster"], inception.outputs["controller-key"]["value"]
    pin = inception.outputs["controller-cert"]["pin"]
    options = ["-f", "-d", "-g", cluster["git_address"], "-p", pin, "-a", cluster["host_ip"]]
    process = await asyncio.create_subprocess_exec(
        command, "cluster", "add", *options, "default", cluster["domain"], "-", stdin=asyncio.subprocess.PIPE
    )
    await process.communicate(f"{key}\n".encode())
    if process.returncode:
        raise StepFailed(f"flynn cluster add ended with status {process.returncode}", step="configure-cli")


async def bootstrap(run_dir: Path, domain: str, printer: Printer, *, manifest: Manifest, has_cli: bool = False) -> None:
    """Bring layer 1 up on the host whose sockets are in `run_dir`.

    Raises:
        ServiceError: the step that failed has been printed.
    """
    discoverd = f"unix://{run_dir}/discovery/discovery.sock"
    async with (
        HostClient(f"unix://{run_dir}/api/hostd.sock") as host,
        Store(discoverd) as store,
        Services(discoverd) as services,
    ):
        status = await host_status(host)
        inception = Inception(host, store, services, status)
        inception.outputs["cluster"] = {
            "domain": await settle_domain(inception, domain),
            "host_ip": status.host_ip,
            "git_address": f"{status.host_ip}:{GIT_PORT}",
        }
        await run_steps(inception, manifest, printer)
        if has_cli:
            await configure_cli(inception)


def read_file(path: Path) -> Manifest:
    """Read the manifest. Raises `Invalid`, naming the file."""
    try:
        return read_manifest(path.read_bytes())
    except OSError as error:
        raise Invalid(f"{path}: {error.strerror}") from error


def check_domain(text: str) -> str:
    """Accept a cluster domain.

    Raises:
        Invalid: it is none.
    """
    labels = text.lower().rstrip(".").split(".")
    allowed = set("abcdefghijklmnopqrstuvwxyz0123456789-")
    if len(text) > 200 or not all(0 < len(label) < 64 and set(label) <= allowed for label in labels):
        raise Invalid(f"{text[:80]!r} is no domain", hint="such as example.test")
    return ".".join(labels)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hostd bootstrap",
        description="Start the platform on this host: controller, router, git-receive and blob store.\n"
        "Safe to run again at any time.",
        epilog="example: hostd bootstrap --domain example.test\n\n"
        "exit status: 0 done, 75 a port is taken or the domain is another, 69 hostd does not answer, 70 a step failed",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run_dir = os.environ.get("HOSTD_RUN_DIR", DEFAULT_RUN_DIR)
    parser.add_argument(
        "--domain",
        default=os.environ.get("CLUSTER_DOMAIN", ""),
        metavar="DOMAIN",
        help=f"apps are at APP.DOMAIN (default: what it was the first time, else {DEFAULT_DOMAIN})",
    )
    parser.add_argument(
        "--run-dir", default=run_dir, type=Path, metavar="DIR", help=f"where hostd's sockets are (default: {run_dir})"
    )
    parser.add_argument(
        "--manifest",
        default=MANIFEST,
        type=Path,
        metavar="FILE",
        help="the steps, as JSON (default: the platform's own)",
    )
    parser.add_argument("--check", action="store_true", help="only see whether the ports are free; needs no hostd")
    parser.add_argument("--configure-cli", action="store_true", help="add the cluster to your flynn command, too")
    parser.add_argument("--json", action="store_true", dest="is_json", help="print one JSON object a line")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    arguments = parser().parse_args(argv)
    logging.basicConfig(level=logging.ERROR)
    try:
        manifest = read_file(arguments.manifest)
        domain = check_domain(arguments.domain) if arguments.domain else ""
        ports.check(router_ports(manifest), os.environ)
        if not arguments.check:
            asyncio.run(
                bootstrap(
                    arguments.run_dir,
                    domain,
                    Printer(is_json=arguments.is_json),
                    manifest=manifest,
                    has_cli=arguments.configure_cli,
                )
            )
    except ServiceError as error:
        hint = f" ({error.hint})" if error.hint else ""
        print(f"hostd bootstrap: {error.message}{hint}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("hostd bootstrap: interrupted; run it again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
