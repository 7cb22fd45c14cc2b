"""Bootstrap on a host that keeps records, with a real discovery daemon and a real controller process."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from controller import bootstrap
from controller.bootstrap import MANIFEST, Printer, check_domain, router_ports
from controller.client import ControllerClient
from controller.errors import DomainFixed, HostPortTaken, StepFailed
from controller.inception import actions, ports, secrets
from controller.inception.steps import Manifest, Wait, filled, read_manifest
from discovery.client import Services, Store
from discovery.wire.errors import Invalid
from tests.controller.conftest import Discovery, eventually
from tests.controller.fake_host import FakeHost

LINE = re.compile(r"\d\d:\d\d:\d\d\.\d{6} ([a-z-]+) ([a-z-]+)( .*)?")


@pytest.fixture
def manifest() -> Manifest:
    """Our own manifest without the steps that look at ports of the machine."""
    whole = read_manifest(MANIFEST.read_bytes())
    return Manifest(steps=tuple(s for s in whole.steps if not isinstance(s, Wait) or s.service))


@pytest.fixture
async def bare_host(discovery: Discovery) -> AsyncIterator[FakeHost]:
    fake = FakeHost("one", discovery.folder, discovery.address, programs=["controller.daemon"])
    async with fake.served(), fake.registered():
        yield fake


async def run(discovery: Discovery, manifest: Manifest, domain: str = "lab.test") -> None:
    await bootstrap.bootstrap(discovery.folder, domain, Printer(is_json=False), manifest=manifest)


async def controller_of(discovery: Discovery, key: str) -> ControllerClient:
    async with Services(discovery.address) as services:
        (instance,) = await services.instances("controller")
        return ControllerClient(f"http://{instance.host}:{instance.port}", key)


def live(host: FakeHost) -> dict[str, str]:
    return {job.spec.labels["app_name"]: job.spec.id for job in host.up()}


async def test_a_bare_host_becomes_a_cluster_and_again_changes_nothing(
    discovery: Discovery, bare_host: FakeHost, manifest: Manifest, capsys: pytest.CaptureFixture[str]
) -> None:
    await run(discovery, manifest)
    printed = capsys.readouterr().out
    shown = [match[1] + " " + match[2] for line in printed.splitlines() if (match := LINE.fullmatch(line))]
    order = [
        "gen-random controller-key", "run-app controller", "wait controller-wait", "add-app controller-inception",
        "deploy-app shelf", "deploy-app router", "gen-ssh-key gitreceive-key", "deploy-app gitreceive",
        "gen-tls-cert controller-cert", "add-route gitreceive-route", "add-route controller-route", "log log-complete",
    ]  # fmt: skip
    assert [step for step in dict.fromkeys(shown) if step in order] == order
    key = re.search(r"gen-random controller-key ([0-9a-f]{32})", printed)
    last = printed.splitlines()[-1]
    assert key is not None
    assert re.findall(r"\b[0-9a-f]{32}\b", printed) == [key[1]] * 2  # no other key is shown
    assert "PRIVATE KEY" not in printed
    assert re.fullmatch(
        rf"flynn cluster add -g 127.0.0.1:2222 -p \S{{44}} -a 127.0.0.1 default lab.test {key[1]}", last
    )
    assert set(live(bare_host)) == {"controller", "blobstore", "router", "gitreceive"}

    async with await controller_of(discovery, key[1]) as client:
        assert {app.name: app.meta["system"] for app in await client.apps()} == dict.fromkeys(live(bare_host), "true")
        assert {(r.kind, r.domain, r.port, r.service) for r in await client.all_routes()} == {
            ("http", "controller.lab.test", 0, "controller"),
            ("tcp", "", 2222, "gitreceive"),
        }
        (job,) = await client.jobs("controller")
        assert job.id == live(bare_host)["controller"]

    before, starts = live(bare_host), len(bare_host.starts)
    await run(discovery, manifest)
    assert capsys.readouterr().out.splitlines()[-1] == last
    assert (live(bare_host), len(bare_host.starts)) == (before, starts)


async def test_a_new_image_is_deployed_everywhere_the_controller_included(
    discovery: Discovery, bare_host: FakeHost, manifest: Manifest
) -> None:
    await run(discovery, manifest)
    before = live(bare_host)
    newer = msgspec.structs.replace(bare_host.images["system"].layers[0], digest="sha256:" + "b" * 64)
    bare_host.images["system"] = msgspec.structs.replace(bare_host.images["system"], layers=(newer,))
    await run(discovery, manifest)
    after = live(bare_host)
    assert set(after) == set(before)
    assert not set(after.values()) & set(before.values())
    assert all(job.spec.layers == (newer,) for job in bare_host.up())


async def test_a_controller_of_an_older_image_that_does_not_come_up_is_replaced(
    discovery: Discovery, bare_host: FakeHost, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actions, "SOUND_S", 0.3)
    monkeypatch.setattr(actions, "STEADY_S", 0.05)
    await run(discovery, manifest)
    before = live(bare_host)
    newer = msgspec.structs.replace(bare_host.images["system"].layers[0], digest="sha256:" + "b" * 64)
    bare_host.images["system"] = msgspec.structs.replace(bare_host.images["system"], layers=(newer,))
    (broken,) = [job for job in bare_host.up() if job.spec.labels["app_name"] == "controller"]
    bare_host.jobs[broken.spec.id] = msgspec.structs.replace(broken, is_up=False)
    await run(discovery, manifest)
    await eventually("all is up", lambda: set(live(bare_host)) == set(before))
    assert bare_host.jobs[broken.spec.id].status == "done"
    assert all(job.spec.layers == (newer,) for job in bare_host.up())


async def test_after_everything_stopped_it_all_comes_back(
    discovery: Discovery, bare_host: FakeHost, manifest: Manifest
) -> None:
    await run(discovery, manifest)
    before = live(bare_host)
    await bare_host.kill_processes()
    for id in list(bare_host.jobs):
        bare_host.end(id, status="done", exit_status=0)  # told to, as by hostd down
    async with Store(discovery.address) as store:
        for instance in await Services(discovery.address).instances("controller"):
            await Services(discovery.address).deregister("controller", instance.id)
        await store.delete("/controller/leader")
    await run(discovery, manifest)
    await eventually("all is up", lambda: set(live(bare_host)) == set(before))
    assert not set(live(bare_host).values()) & set(before.values())


async def test_a_failed_step_is_told_and_the_next_run_goes_on(
    discovery: Discovery, bare_host: FakeHost, manifest: Manifest, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = msgspec.json.decode(msgspec.json.encode(manifest).replace(b'"buildpack.blobstore"', b'"x"'), type=Manifest)
    text = msgspec.json.encode(broken).replace(b'["python3","-m","x"]', b'["fail"]')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("controller.inception.actions.JOBS_UP_S", 2.0)
        with pytest.raises(StepFailed, match="blobstore was not up"):
            await run(discovery, read_manifest(text))
    assert re.search(r"deploy-app shelf error: blobstore was not up.*no layer", capsys.readouterr().out)
    await run(discovery, manifest)
    assert set(live(bare_host)) == {"controller", "blobstore", "router", "gitreceive"}


async def test_the_domain_is_kept_and_cannot_change(
    discovery: Discovery, bare_host: FakeHost, manifest: Manifest
) -> None:
    short = Manifest(steps=manifest.steps[:1])
    await run(discovery, short, "one.test")
    await run(discovery, short, "")
    with pytest.raises(DomainFixed):
        await run(discovery, short, "two.test")


def test_the_router_needs_these_ports() -> None:
    assert router_ports(read_manifest(MANIFEST.read_bytes())) == [80, 443, 2222]


def test_a_taken_port_is_refused_with_the_name_of_who_holds_it() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        with pytest.raises(HostPortTaken, match=rf"port {port} is taken by \S.* \(pid {os.getpid()}\)"):
            ports.check([port], {})
    ports.check([port], {})


def test_a_port_that_our_own_router_holds_is_fine(tmp_path: Path) -> None:
    def holder(cgroups: str) -> ports.Holder:
        return ports.Holder(80, 7, "haproxy", cgroups)

    assert holder("4:memory:/hostd/router-web-0123456789\n").is_ours("hostd")
    assert not holder("4:memory:/hostd/example-web-0123456789\n").is_ours("hostd")
    assert not holder("4:memory:/system.slice/haproxy.service\n").is_ours("hostd")
    assert not holder("4:memory:/hostd/router-web-0123456789\n").is_ours("lab")


@pytest.mark.parametrize(
    "steps",
    [
        '[{"action": "no-such", "id": "a"}]',
        '[{"action": "log", "id": "a", "text": "x", "more": 1}]',
        '[{"action": "log", "id": "a", "text": "{{b.c}}"}, {"action": "gen-ssh-key", "id": "b"}]',
        '[{"action": "gen-ssh-key", "id": "a"}, {"action": "gen-ssh-key", "id": "a"}]',
    ],
)
def test_a_manifest_that_cannot_work_is_refused(steps: str) -> None:
    with pytest.raises(Invalid):
        read_manifest(b'{"steps": ' + steps.encode() + b"}")


def test_a_reference_is_replaced_wherever_it_stands() -> None:
    (step,) = read_manifest(b'{"steps": [{"action": "log", "id": "a", "text": "x {{cluster.domain}} y"}]}').steps
    assert filled(step, {"cluster": {"domain": "lab.test"}}).text == "x lab.test y"  # type: ignore[union-attr]
    with pytest.raises(Invalid):
        filled(step, {"cluster": {}})


def test_the_pin_is_of_the_certificate_that_is_served(tmp_path: Path) -> None:
    import ssl

    from discovery.wire.blocking import certificate_pin

    made = secrets.tls_certificate(["controller.lab.test", "*.lab.test"], 1_800_000_000)
    (tmp_path / "pem").write_text(made["certificate"] + made["private_key"])
    ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(tmp_path / "pem")
    assert certificate_pin(ssl.PEM_cert_to_DER_cert(made["certificate"])) == made["pin"]
    assert len(made["pin"]) == 44


@pytest.mark.parametrize("text", ["", "a b", "../x", "a..b", "x" * 300])
def test_what_is_no_domain_is_refused(text: str) -> None:
    with pytest.raises(Invalid):
        check_domain(text)


def test_help_shows_an_example_and_nobody_is_left_without_hostd(short_dir: Path) -> None:
    command = [sys.executable, "-m", "controller.bootstrap"]
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True).stdout
    assert "hostd bootstrap --domain example.test" in shown
    bad = subprocess.run([*command, "--domain", "a b"], capture_output=True, text=True, check=False)
    assert (bad.returncode, bad.stdout) == (64, "")
