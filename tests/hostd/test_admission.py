"""A spec that can never run is refused before anything is recorded, and the refusal names the field."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from discovery.wire.errors import Invalid
from hostd.admission import check
from hostd.types import BindMount, HealthCheck, JobSpec, Layer, Port, Resources, SecretFile, VolumeMount

GOOD = JobSpec(id="web-1", layers=(Layer(digest="sha256:" + "a" * 64, size_bytes=1),), args=("/bin/true",))


def test_a_plain_spec_is_fine() -> None:
    check(GOOD)
    check(msgspec.structs.replace(GOOD, store_prefixes=("/a/", "b"), secrets=(SecretFile(path="store/mine"),)))


@pytest.mark.parametrize(
    "change",
    [
        {"id": ""},
        {"id": ".."},
        {"id": "A b"},
        {"id": "x" * 64},
        {"id": "discovery"},
        {"layers": ()},
        {"layers": (Layer(digest="../../etc", size_bytes=1),)},
        {"args": ()},
        {"args": ("",)},
        {"args": ("a\0b",)},
        {"args": ("x" * 2_000_000,)},
        {"env": {"": "x"}},
        {"env": {"A=B": "x"}},
        {"env": {"A": "\0"}},
        {"working_dir": "relative"},
        {"working_dir": "/a/../b"},
        {"user": "root"},
        {"user": "-1"},
        {"hostname": "a b"},
        {"volumes": (VolumeMount(name="..", path="/data"),)},
        {"volumes": (VolumeMount(name="a", path="data"),)},
        {"volumes": (VolumeMount(name="a", path="/d"), VolumeMount(name="b", path="/d"))},
        {"mounts": (BindMount(source="etc", path="/x"),)},
        {"ports": (Port(number=-1),)},
        {"ports": (Port(number=70000),)},
        {"ports": (Port(number=80), Port(number=80))},
        {"ports": (Port(service="Bad_Name"),)},
        {"ports": (Port(number=80, is_shared=True),)},
        {"ports": (Port(is_shared=True),), "has_host_network": True},
        {"ports": (Port(service="a", protocol="udp"),)},
        {"ports": (Port(check=HealthCheck(kind="http", path="x\r\ny")),)},
        {"ports": (Port(check=HealthCheck(interval_s=0)),)},
        {"ports": (Port(check=HealthCheck(timeout_s=float("nan"))),)},
        {"ports": (Port(check=HealthCheck(failures_until_down=0)),)},
        {"resources": Resources(memory_bytes=-1)},
        {"resources": Resources(swap_bytes=-1)},
        {"resources": Resources(io_weight=0)},
        {"resources": Resources(io_weight=1001)},
        {"resources": Resources(io_read_bytes_per_s=1)},
        {"resources": Resources(io_write_ops_per_s=2**32)},
        {"resources": Resources(memory_bytes=4096)},
        {"resources": Resources(pids_max=0)},
        {"resources": Resources(open_files_max=1)},
        {"resources": Resources(cpu_millis=0)},
        {"stop_signal": 0},
        {"stop_signal": 65},
        {"stop_grace_s": -1.0},
        {"drain_timeout_s": float("inf")},
        {"rows": 0},
        {"labels": {"k": "v" * 5000}},
        {"capabilities_add": ("EVERYTHING",)},
        {"store_prefixes": ("",)},
        {"store_prefixes": ("/",)},
        {"store_prefixes": ("/discoverd/grants/",)},
        {"store_prefixes": ("/a", "/a")},
        {"store_prefixes": ("/a\n",)},
        {"store_prefixes": ("/a\ud800",)},
        {"store_prefixes": ("/" + "ä" * 256,)},
        {"store_prefixes": tuple(f"/{number}" for number in range(17))},
        {"store_prefixes": ("/a",), "secrets": (SecretFile(path="store"),)},
        {"store_prefixes": ("/a",), "secrets": (SecretFile(path="store/key.pem"),)},
    ],
)
def test_nonsense_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(Invalid):
        check(msgspec.structs.replace(GOOD, **change))


@given(st.text(max_size=70))
def test_any_id_is_accepted_or_refused_but_never_crashes(text: str) -> None:
    try:
        check(msgspec.structs.replace(GOOD, id=text))
    except Invalid:
        return
    assert text.replace("-", "").isalnum()
    assert text.isascii()
