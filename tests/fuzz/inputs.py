"""Targets: what the API reads, job specs and attach frames."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path

import msgspec

from discovery.wire import attach
from discovery.wire.errors import ErrorBody, Invalid, ServiceError
from hostd import admission
from hostd.runtime import launch
from hostd.runtime.cgroup import CgroupState
from hostd.runtime.files import FilesState
from hostd.runtime.network import NetworkState
from hostd.types import BindMount, HealthCheck, Job, JobSpec, Layer, Port, Resources, VolumeMount
from rootfs import mounts
from tests.fuzz import mutation
from tests.fuzz.harness import Violation


def spec(**more: object) -> JobSpec:
    fields: dict[str, object] = {
        "id": "job-1",
        "layers": (Layer(digest="sha256:" + "a" * 64, size_bytes=10, url="http://blobs.discoverd/x"),),
        "args": ("/bin/sh", "-c", "true"),
        "env": {"A": "1"},
        "hostname": "name",
        "ports": (Port(number=80, service="web", check=HealthCheck(kind="http")), Port(protocol="udp")),
        "volumes": (VolumeMount(name="data", path="/data"),),
        "mounts": (BindMount(source="/tmp", path="/mnt"),),
        "capabilities_add": ("NET_ADMIN",),
        "labels": {"app": "x"},
        "resources": Resources(),
    }
    return JobSpec(**(fields | more))  # type: ignore[arg-type]


class JobSpecs:
    """Decode, admit and translate a job: the spawner's request is made, or the refusal is typed."""

    def open(self) -> None:
        self._kernel = mounts.probe()

    def close(self) -> None: ...

    def seeds(self) -> Iterable[bytes]:
        for made in (spec(), spec(has_tty=True, user="1000:1000", has_host_network=True, working_dir="/srv")):
            document = msgspec.to_builtins(made)
            yield mutation.dump(document)
            document["resources"] |= {"memory_bytes": 2**30}
            yield mutation.dump(document)

    def mutate(self, data: bytes, dice: random.Random) -> bytes:
        return mutation.of_bytes(data, dice) if dice.random() < 0.05 else mutation.of_json_text(data, dice)

    def run(self, data: bytes) -> str:
        try:
            made = msgspec.json.decode(data, type=JobSpec)
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
            return "undecodable"
        try:
            admission.check(made)
        except ServiceError as error:
            msgspec.json.encode(error.message)
            return f"{error.code}:{error.detail.get('field', '')}"
        state = NetworkState(
            netns_name="n", ip="100.100.0.2", numbers=tuple(55000 for _ in made.ports), ports=made.ports
        )
        env = launch.environment(made, state.numbers, {})
        capabilities = launch.capabilities_of(made)
        paths = [*(each.path for each in made.volumes), *(each.path for each in made.mounts)]
        binds = [mounts.Bind(source="/x", target=path, is_read_only=True) for path in paths]
        plan = mounts.plan(lower=[Path("/l")], upper=Path("/u"), work=Path("/w"), kernel=self._kernel, binds=binds)
        files = FilesState(root="/r", plan=tuple(plan))
        request = launch.request_for(made, CgroupState(procs=()), state, files, capabilities, "", env, 0)
        sent = json.dumps(msgspec.to_builtins(request)).encode()
        if any("\0" in text for text in (*request.args, *request.env, *request.env.values(), request.working_dir)):
            raise Violation("a zero byte comes through")
        if len(sent) > 16 * 2**20:
            raise Violation(f"a request of {len(sent)} bytes")
        kept = msgspec.json.encode(Job(spec=made, host_id="h", status="pending"))
        if msgspec.json.decode(kept, type=Job).spec != made:
            raise Violation("what is kept is not what was asked")
        return "fine"


class AttachFrames:
    """Decode a frame: what comes out goes in again, all else is `Invalid`."""

    def open(self) -> None: ...
    def close(self) -> None: ...

    def seeds(self) -> Iterable[bytes]:
        body = ErrorBody(code="x", message="y")
        for frame in (
            *(attach.Data(0, b"hello"), attach.Data(1, b""), attach.Signal(15), attach.Resize(24, 80), attach.Exit(-1)),
            attach.Error(body),
        ):
            yield attach.encode(frame)

    def mutate(self, data: bytes, dice: random.Random) -> bytes:
        if data[:1] == b"\x04" and dice.random() < 0.6:
            return data[:1] + mutation.of_json_text(data[1:], dice)
        return mutation.of_bytes(data, dice)

    def run(self, data: bytes) -> str:
        try:
            frame = attach.decode(data)
        except Invalid as error:
            return f"Invalid:{data[0] if data else ''}:{error.message[:30]}"
        if attach.decode(attach.encode(frame)) != frame:
            raise Violation(f"{frame} comes back as another")
        return type(frame).__name__
