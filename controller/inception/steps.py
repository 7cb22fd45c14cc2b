"""The bootstrap manifest as values: what each step says, and how one step's output gets into another's input; pure.

`{{step.field}}` in any string stands for an output of an earlier step, `{{cluster.field}}` for what
is known of the cluster. Refuses a manifest with unknown actions, fields or references. Called by `bootstrap`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec

from controller.types import NewRoute, ProcessType
from discovery.wire.errors import Invalid
from hostd.types import Strict

_REFERENCE = re.compile(r"\{\{([a-z0-9-]+)\.([a-z0-9_]+)\}\}")
Outputs = Mapping[str, Mapping[str, str]]


class AppPlan(Strict, frozen=True, kw_only=True):
    """An app of the platform: what runs, from which image of the host, and how many of each at least."""

    name: str
    image: str
    env: dict[str, str] = {}
    processes: dict[str, ProcessType]
    scale: dict[str, int]


class Step(Strict, frozen=True, kw_only=True, tag_field="action"):
    id: str

    @property
    def action(self) -> str:
        return str(self.__struct_config__.tag)


class GenRandom(Step, frozen=True, kw_only=True, tag="gen-random"):
    """Make up a key. It is printed only if people need it: what is printed lands in logs."""

    size_bytes: int = 16
    is_shown: bool = False


class GenSshKey(Step, frozen=True, kw_only=True, tag="gen-ssh-key"):
    pass


class GenTlsCert(Step, frozen=True, kw_only=True, tag="gen-tls-cert"):
    hosts: tuple[str, ...]


class RunApp(Step, frozen=True, kw_only=True, tag="run-app"):
    """Start an app's jobs on the host itself, as long as there is no controller to ask."""

    app: AppPlan


class AddApp(Step, frozen=True, kw_only=True, tag="add-app"):
    """Tell the controller of the app that step `app` runs: from now on it is like any other."""

    app: str


class DeployApp(Step, frozen=True, kw_only=True, tag="deploy-app"):
    app: AppPlan


class ScaleApp(Step, frozen=True, kw_only=True, tag="scale-app"):
    app: str
    processes: dict[str, int]


class CreateArtifact(Step, frozen=True, kw_only=True, tag="create-artifact"):
    image: str


class AddRoute(Step, frozen=True, kw_only=True, tag="add-route"):
    app: str
    route: NewRoute


class Wait(Step, frozen=True, kw_only=True, tag="wait"):
    """Wait until a service or URL answers with `status`, or `tcp` accepts connections."""

    service: str = ""
    path: str = "/"
    url: str = ""
    host: str = ""
    status: int = 200
    tcp: str = ""
    timeout_s: float = 120.0


class Log(Step, frozen=True, kw_only=True, tag="log"):
    text: str


AnyStep = (
    GenRandom | GenSshKey | GenTlsCert | RunApp | AddApp | DeployApp | ScaleApp | CreateArtifact | AddRoute | Wait | Log
)


class Manifest(Strict, frozen=True, kw_only=True):
    steps: tuple[AnyStep, ...]


def read_manifest(raw: bytes) -> Manifest:
    """Read a manifest and check that every reference points to an earlier step.

    Raises:
        Invalid: it does not parse, an id is used twice, or a reference leads nowhere.
    """
    try:
        manifest = msgspec.json.decode(raw, type=Manifest)
    except msgspec.MsgspecError as error:
        raise Invalid(f"the manifest does not parse: {error}") from error
    known = {"cluster"}
    for step in manifest.steps:
        if step.id in known:
            raise Invalid(f"the manifest has two steps {step.id}")
        for name, _ in _REFERENCE.findall(msgspec.json.encode(step).decode()):
            if name not in known:
                raise Invalid(f"step {step.id} refers to {name}, which does not come before it")
        known.add(step.id)
    return manifest


def filled(step: AnyStep, outputs: Outputs) -> AnyStep:
    """Return the step with every reference replaced.

    Raises:
        Invalid: a step has no such output.
    """
    return msgspec.convert(_fill(msgspec.to_builtins(step), outputs, step.id), AnyStep)  # type: ignore[no-any-return]


def _fill(value: Any, outputs: Outputs, step: str) -> Any:
    if isinstance(value, str):

        def output(match: re.Match[str]) -> str:
            try:
                return outputs[match[1]][match[2]]
            except KeyError as error:
                raise Invalid(f"step {step}: there is no {match[1]}.{match[2]}") from error

        return _REFERENCE.sub(output, value)
    if isinstance(value, dict):
        return {key: _fill(item, outputs, step) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_fill(item, outputs, step) for item in value]
    return value
