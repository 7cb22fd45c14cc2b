"""One real node, up to down: jobs run, are found, logged, attached, adopted, restarted, and leave nothing."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest

from discovery.client import Services
from discovery.wire import attach, serve
from discovery.wire.errors import Conflict, Invalid, NotFound, ServiceError
from hostd.client import HostClient
from hostd.drain import connections
from hostd.errors import JobExists, JobNotRunning
from hostd.store import Record
from hostd.types import HealthCheck, Job, Layer, Port, VolumeMount
from tests.hostd.isolation import HAS_EXIT_INFO
from tests.hostd.node import Node, sh, snapshot, up_node, wait_until
from tests.hostd.node import node as new_node
from tests.pace import SLOWNESS

pytestmark = [pytest.mark.needs_root, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]


@pytest.fixture(scope="module")
def machine() -> Iterator[Node]:
    with up_node() as made:
        yield made


@pytest.fixture
def node(machine: Node) -> Iterator[Node]:
    """The module's node; every test leaves it without jobs."""
    yield machine
    for job in machine.jobs(active=""):
        machine.stop(job.spec.id)
    assert machine.jobs(active="") == []
    wait_until("the files of ended jobs are gone", lambda: not list((machine.state_dir / "jobs").iterdir()))


@pytest.fixture
async def client(node: Node) -> AsyncIterator[HostClient]:
    async with HostClient(f"unix://{node.run_dir}/api/hostd.sock") as made:
        yield made


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


async def instances(node: Node, service: str) -> dict[str, int]:
    async with Services(f"unix://{node.run_dir}/discovery/discovery.sock") as services:
        return {f"{i.meta['job_id']}": i.port for i in await services.instances(service)}


def found(node: Node, service: str) -> dict[str, int]:
    return asyncio.run(instances(node, service))


# a job's life


def test_run_prints_and_exits_as_the_program_does(node: Node) -> None:
    done = node.hostd("run", "--", "/bin/sh", "-c", "echo out; echo err >&2; exit 42")
    assert (done.returncode, done.stdout, done.stderr) == (42, "out\n", "err\n")


def test_an_ended_job_keeps_its_log_and_status(node: Node) -> None:
    node.start(node.spec("short", "/bin/sh", "-c", "echo one; echo two >&2; exit 3"))
    job = node.wait_ended("short")
    assert (job.status, job.exit_status) == ("crashed", 3)
    assert job.ended_at >= job.started_at >= job.created_at > 0
    assert set(node.log("short")) == {"one", "two", "hostd: ended with exit status 3"}


def test_the_same_spec_again_is_the_same_job(node: Node) -> None:
    spec = node.spec("same", "/bin/true")
    first = node.start(spec)
    node.wait_ended("same")
    assert node.start(spec).created_at == first.created_at
    with pytest.raises(JobExists):
        node.start(node.spec("same", "/bin/false"))


def test_a_program_that_is_not_there_fails_with_its_name_and_leaves_nothing(node: Node) -> None:
    node.start(node.spec("absent", "nosuchprogram"))
    job = node.wait_ended("absent")
    assert job.status == "failed"
    assert job.error is not None
    assert "nosuchprogram" in job.error.message
    assert any("could not be started" in line for line in node.log("absent"))


def test_bad_specs_are_refused_before_anything_is_recorded(node: Node) -> None:
    with pytest.raises(Invalid):
        node.start(node.spec("bad", "/bin/true", user="root"))
    with pytest.raises(NotFound):
        node.job("bad")


def test_a_taken_port_fails_the_second_job(node: Node) -> None:
    node.start(node.spec("first", "/bin/sleep", "60", ports=(Port(number=55999),)))
    wait_until("first runs", lambda: node.job("first").status == "running")
    node.start(node.spec("second", "/bin/sleep", "60", ports=(Port(number=55999),)))
    job = node.wait_ended("second")
    assert (job.status, job.error and job.error.code) == ("failed", "port_taken")


def test_a_job_whose_layer_does_not_come_can_be_stopped(node: Node) -> None:
    listener = subprocess.Popen(
        node.inside(sys.executable, "-c", "import socket, time; s = socket.create_server(('', 8099)); time.sleep(600)")
    )
    try:
        layer = Layer(digest="sha256:" + "1" * 64, size_bytes=1000, url=f"http://{node.host_ip}:8099/never")
        node.start(msgspec.structs.replace(node.spec("unlayered", "/bin/true"), layers=(layer,)))
        wait_until("it is being started", lambda: node.job("unlayered").status == "starting")
        assert node.stop("unlayered").status == "done"
    finally:
        listener.kill()
        listener.wait()


def test_a_layer_that_is_nowhere_fails_the_job_with_a_hint(node: Node) -> None:
    layer = Layer(digest="sha256:" + "2" * 64, size_bytes=1000)
    node.start(msgspec.structs.replace(node.spec("nowhere", "/bin/true"), layers=(layer,)))
    job = node.wait_ended("nowhere")
    assert (job.status, job.error and job.error.code) == ("failed", "image_not_found")


def test_memory_limit_kills_and_the_log_says_why(node: Node) -> None:
    node.start(node.spec("hungry", "/bin/sh", "-c", "x=a; while :; do x=$x$x; done"))
    job = node.wait_ended("hungry")
    assert job.status == "crashed"
    assert any("memory limit of 256 MiB" in line for line in node.log("hungry"))


def test_a_killed_job_is_noticed_at_once(node: Node) -> None:
    node.start(node.spec("victim", "/bin/sleep", "600"))
    job = wait_until("it runs", lambda: running(node, "victim"))
    os.kill(job.pid, signal.SIGKILL)
    assert node.wait_ended("victim").exit_status == 137


def running(node: Node, job_id: str) -> Job | None:
    job = node.job(job_id)
    return job if job.status == "running" else None


def test_stop_asks_first_and_kills_what_does_not_listen(node: Node) -> None:
    polite = "trap 'echo bye; exit 0' TERM; echo ready; while :; do sleep 0.1; done"
    node.start(node.spec("polite", "/bin/sh", "-c", polite))
    stubborn = "trap '' TERM; echo ready; while :; do sleep 0.1; done"
    node.start(node.spec("stubborn", "/bin/sh", "-c", stubborn, stop_grace_s=0.5))
    wait_until("both listen", lambda: node.log("polite") == ["ready"] and node.log("stubborn") == ["ready"])
    assert (node.stop("polite").status, node.log("polite")[-1]) == ("done", "bye")
    job = node.stop("stubborn")
    assert (job.status, job.exit_status) == ("done", 137)


def test_signals_reach_the_program(node: Node) -> None:
    node.start(
        node.spec("listener", "/bin/sh", "-c", "trap 'echo got it' HUP; echo ready; while :; do sleep 0.1; done")
    )
    wait_until("it listens", lambda: node.log("listener") == ["ready"])
    assert node.hostd("signal", "listener", "HUP").returncode == 0
    wait_until("it heard", lambda: node.log("listener") == ["ready", "got it"])
    node.stop("listener")
    with pytest.raises(JobNotRunning):
        node.caller().request("POST", "/jobs/listener/signal", body={"number": 1})


def test_forgetting_needs_an_ended_job_and_takes_the_log_along(node: Node) -> None:
    node.start(node.spec("keeper", "/bin/sleep", "600"))
    with pytest.raises(Conflict):
        node.caller().request("DELETE", "/jobs/keeper")
    node.stop("keeper")
    node.caller().request("DELETE", "/jobs/keeper")
    with pytest.raises(NotFound):
        node.job("keeper")
    assert not (node.state_dir / "logs" / "keeper").exists()


def test_volumes_outlive_jobs_and_cannot_be_removed_in_use(node: Node) -> None:
    mount = (VolumeMount(name="data", path="/data"),)
    node.start(node.spec("writer", "/bin/sh", "-c", "echo kept > /data/file; sleep 600", volumes=mount))
    wait_until("it runs", lambda: running(node, "writer"))
    with pytest.raises(Conflict):
        node.caller().request("DELETE", "/volumes/data")
    node.stop("writer")
    node.start(node.spec("reader", "/bin/cat", "/data/file", volumes=mount))
    node.wait_ended("reader")
    assert node.log("reader") == ["kept"]
    node.caller().request("DELETE", "/volumes/data")
    assert not (node.state_dir / "volumes" / "data").exists()


# services


def test_a_web_job_is_found_reached_and_taken_back(node: Node) -> None:
    node.start(node.web("web-1"))
    job = node.wait_up("web-1")
    assert job.ports[0] >= 55000
    assert found(node, "web") == {"web-1": job.ports[0]}
    assert node.curl(f"http://{node.host_ip}:{job.ports[0]}/").strip() == "web-1"
    node.stop("web-1")
    assert found(node, "web") == {}


def test_a_port_that_stops_answering_is_taken_back_and_comes_back(node: Node) -> None:
    check = HealthCheck(interval_s=0.2, timeout_s=0.5)
    node.start(msgspec.structs.replace(node.web("flaky"), ports=(Port(service="flaky", check=check),)))
    job = node.wait_up("flaky")
    pids = [int(pid) for pid in Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    wait_until("it is down", lambda: not node.job("flaky").is_up and found(node, "flaky") == {})
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    node.wait_up("flaky")
    assert found(node, "flaky") == {"flaky": job.ports[0]}
    assert any("is down" in line for line in node.log("flaky"))


def test_jobs_find_services_by_name(node: Node) -> None:
    node.start(node.web("named", service="hello"))
    port = node.wait_up("named").ports[0]
    script = f"import urllib.request as u; print(u.urlopen('http://hello.discoverd:{port}/').read().decode().strip())"
    node.start(node.spec("asker", "/usr/bin/python3", "-c", script, image="system"))
    assert node.wait_ended("asker").exit_status == 0, node.log("asker")
    assert node.log("asker") == ["named"]


def test_stopping_waits_for_requests_under_way(node: Node) -> None:
    script = (
        "import http.server, os, time\n"
        "class H(http.server.BaseHTTPRequestHandler):\n"
        "    def do_GET(self):\n"
        "        time.sleep(1.5); self.send_response(200); self.end_headers(); self.wfile.write(b'whole')\n"
        "http.server.ThreadingHTTPServer(('', int(os.environ['PORT'])), H).serve_forever()\n"
    )
    node.start(node.spec("slow", "/usr/bin/python3", "-c", script, image="system", ports=(Port(service="slow"),)))
    port = node.wait_up("slow").ports[0]
    request = subprocess.Popen(
        node.inside("curl", "-sS", f"http://{node.host_ip}:{port}/"), stdout=subprocess.PIPE, text=True
    )
    wait_until("the request is under way", lambda: _established(node.job("slow").pid, port))
    node.stop("slow")
    assert request.communicate(timeout=10 * SLOWNESS)[0] == "whole"


def _established(pid: int, port: int) -> bool:
    return connections(pid, [port]) > 0


# attach


async def talk(
    client: HostClient, job_id: str, *sent: attach.Frame, has_logs: bool = False
) -> tuple[bytes, attach.Frame]:
    """Send frames, then read to the end; return what was printed, and the last frame."""
    printed, last = b"", None
    async with asyncio.timeout(20 * SLOWNESS), client.attach(job_id, has_logs=has_logs) as websocket:
        for frame in sent:
            await websocket.send_bytes(attach.encode(frame))
        async for frame in serve.frames(websocket):
            if isinstance(frame, attach.Data):
                printed += frame.payload
            last = frame
    assert last is not None
    return printed, last


async def test_stdin_goes_through_and_its_end_too(node: Node, client: HostClient) -> None:
    await client.start(node.spec("sorter", "/usr/bin/sort", has_stdin=True))
    typed = attach.Data(attach.STDIN, b"b\na\n"), attach.Data(attach.STDIN, b"")
    assert await talk(client, "sorter", *typed) == (b"a\nb\n", attach.Exit(0))


async def test_a_terminal_has_the_size_it_was_given_and_hears_of_resizes(node: Node, client: HostClient) -> None:
    script = "trap 'stty size; exit 7' WINCH; stty size; while :; do sleep 0.1; done"
    await client.start(node.spec("term", "/bin/sh", "-c", script, has_tty=True, has_stdin=True, rows=30, columns=99))
    printed = b""
    async with asyncio.timeout(20 * SLOWNESS), client.attach("term") as websocket:
        async for frame in serve.frames(websocket):
            if isinstance(frame, attach.Data):
                printed += frame.payload
                if printed == b"30 99\r\n":
                    await websocket.send_bytes(attach.encode(attach.Resize(40, 120)))
    assert (printed, frame) == (b"30 99\r\n40 120\r\n", attach.Exit(7))


async def test_control_c_reaches_the_program_behind_a_terminal(node: Node, client: HostClient) -> None:
    script = "echo ready; exec sleep 600"
    await client.start(node.spec("shell", "/bin/sh", "-c", script, has_tty=True, has_stdin=True))
    printed = b""
    async with asyncio.timeout(20 * SLOWNESS), client.attach("shell") as websocket:
        async for frame in serve.frames(websocket):
            if isinstance(frame, attach.Data):
                printed += frame.payload
                if printed == b"ready\r\n":
                    await websocket.send_bytes(attach.encode(attach.Data(attach.STDIN, b"\x03")))
    assert (printed, frame) == (b"ready\r\n^C", attach.Exit(130))


async def test_a_late_client_gets_the_log_first_and_every_byte_once(node: Node, client: HostClient) -> None:
    script = "i=0; while [ $i -lt 2000 ]; do echo line $i; i=$((i+1)); done; sleep 0.3; echo end"
    await client.start(node.spec("printer", "/bin/sh", "-c", script))
    printed, last = await talk(client, "printer", has_logs=True)
    assert printed.decode().splitlines() == [*(f"line {n}" for n in range(2000)), "end"]
    assert last == attach.Exit(0)
    assert await talk(client, "printer", has_logs=True) == (printed, last)  # after its end, too


async def test_a_job_whose_client_never_comes_begins_alone(node: Node, client: HostClient) -> None:
    await client.start(node.spec("lonely", "/bin/echo", "alone", has_tty=True, attach_timeout_s=0.3))
    assert (await client.wait("lonely", timeout_s=20 * SLOWNESS)).exit_status == 0
    assert node.log("lonely") == ["alone"]


async def test_a_waiting_job_can_be_stopped(node: Node, client: HostClient) -> None:
    await client.start(node.spec("unborn", "/bin/echo", "never", has_stdin=True))
    wait_until("it waits", lambda: node.job("unborn").pid)
    job = await client.stop("unborn", is_waiting=True)
    assert job.status == "done"
    assert node.log("unborn") == []


async def test_a_client_hears_why_a_job_never_ran(node: Node, client: HostClient) -> None:
    await client.start(node.spec("never", "nosuchprogram", has_tty=True))
    _, last = await talk(client, "never")
    assert isinstance(last, attach.Error)
    assert "nosuchprogram" in last.body.message


async def test_attaching_to_nothing_is_refused(client: HostClient) -> None:
    with pytest.raises(ServiceError):
        await talk(client, "nosuch")


async def test_a_job_without_a_log_writes_none(node: Node, client: HostClient) -> None:
    await client.start(node.spec("quiet", "/bin/cat", has_stdin=True, has_log=False))
    typed = attach.Data(attach.STDIN, b"secret\n"), attach.Data(attach.STDIN, b"")
    assert await talk(client, "quiet", *typed) == (b"secret\n", attach.Exit(0))
    assert not (node.state_dir / "logs" / "quiet").exists()


# events and merged logs


async def test_the_event_stream_tells_the_whole_life(node: Node, client: HostClient) -> None:
    kinds: list[str] = []
    async with asyncio.timeout(30 * SLOWNESS):
        async for event in client.events({"app": "life"}):
            kinds.append(event.kind)
            if event.kind == "current":
                await client.start(node.web("life", service="life", labels={"app": "life"}))
            if event.kind == "up":
                await client.stop("life")
            if event.kind == "ended":
                break
    assert kinds == ["current", "created", "started", "up", "stopping", "ended"]


async def test_logs_of_several_jobs_are_merged_and_new_jobs_join(node: Node, client: HostClient) -> None:
    labels = {"app": "choir"}
    await client.start(node.spec("choir-1", "/bin/sh", "-c", "echo first; sleep 600", labels=labels))
    await client.start(node.spec("soloist", "/bin/echo", "other"))
    seen: list[tuple[str, str]] = []
    async with asyncio.timeout(20 * SLOWNESS):
        async for line in client.logs(labels, is_following=True):
            seen.append((line.job_id, line.text))
            if len(seen) == 1:
                await client.start(node.spec("choir-2", "/bin/echo", "second", labels=labels))
            if len(seen) == 2:
                break
    assert seen == [("choir-1", "first"), ("choir-2", "second")]
    assert [line.text async for line in client.logs(labels, lines=1)] == ["second"]
    assert [line.text async for line in client.log("choir-1", lines=5)] == ["first"]


# the API's refusals


@pytest.mark.parametrize(
    ("method", "path", "body", "code"),
    [
        ("GET", "/jobs/nosuch", None, "job_not_found"),
        ("GET", "/jobs/nosuch/log", None, "job_not_found"),
        ("POST", "/jobs/nosuch/stop", None, "job_not_found"),
        ("DELETE", "/jobs/nosuch", None, "job_not_found"),
        ("POST", "/jobs/nosuch/signal", {"number": 0}, "invalid"),
        ("PUT", "/jobs/a", {"id": "a"}, "invalid"),
        ("PUT", "/jobs/a", {"id": "a", "layers": [], "args": ["x"], "nosuchfield": 1}, "invalid"),
        ("PUT", "/jobs/a", {"id": "b", "layers": [], "args": ["x"]}, "invalid"),
        ("PUT", "/jobs/a", {"id": "a", "layers": [], "args": ["x"]}, "invalid_spec"),
        ("GET", "/jobs?label=nonsense", None, "invalid"),
        ("GET", "/log?lines=-1", None, "invalid"),
        ("GET", "/log?stream=7", None, "invalid"),
        ("GET", "/images/nosuch", None, "image_not_found"),
        ("GET", "/images/..%2F..%2Fetc", None, "image_not_found"),
        ("DELETE", "/volumes/..", None, "invalid_spec"),
        ("DELETE", "/volumes/nosuch", None, "not_found"),
        ("GET", "/nosuch", None, "not_found"),
    ],
)
def test_refusals_say_what_kind_they_are(node: Node, method: str, path: str, body: object, code: str) -> None:
    with pytest.raises(ServiceError) as refusal:
        node.caller().request(method, path, body=body)
    assert refusal.value.code == code


def test_the_api_describes_itself(node: Node) -> None:
    document = msgspec.json.decode(node.caller().request("GET", "/openapi.json"))
    assert {"/jobs/{id}", "/jobs/{id}/attach", "/log", "/events", "/status"} <= document["paths"].keys()


# what outlives what


def test_jobs_outlive_a_killed_hostd_and_nothing_is_lost(node: Node) -> None:
    node.start(node.web("survivor", service="survivor"))
    job = node.wait_up("survivor")
    count = "i=0; while [ $i -lt 40 ]; do echo tick $i; i=$((i+1)); sleep 0.1; done; exit 5"
    node.start(node.spec("counter", "/bin/sh", "-c", count))
    node.start(node.spec("brief", "/bin/sh", "-c", "sleep 1; echo unheard; exit 6"))
    wait_until("they run", lambda: running(node, "counter") and running(node, "brief"))
    old_status = node.status()
    node.kill_daemon()
    wait_until("it ended while hostd was away", lambda: not alive(node_child(node, "brief")), patience_s=10)
    assert node.curl(f"http://{node.host_ip}:{job.ports[0]}/").strip() == "survivor"
    node.up()
    assert node.job("survivor").pid == job.pid
    assert node.job("survivor").is_up
    assert found(node, "survivor") == {"survivor": job.ports[0]}
    assert node.wait_ended("brief").exit_status == 6
    assert node.log("brief") == ["unheard", "hostd: ended with exit status 6"]
    assert node.wait_ended("counter").exit_status == 5
    assert node.log("counter")[:40] == [f"tick {n}" for n in range(40)]
    assert node.status().features["discovery"] == old_status.features["discovery"]


def node_child(node: Node, job_id: str) -> int:
    """The pid of a job as the record on disk has it (hostd may be dead)."""
    database = sqlite3.connect(node.state_dir / "hostd.db")
    try:
        (blob,) = database.execute("SELECT record FROM jobs WHERE id = ?", (job_id,)).fetchone()
    finally:
        database.close()
    pid = msgspec.msgpack.decode(blob, type=Record).job.pid
    stat = Path(f"/proc/{pid}/stat")
    return pid if stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z" else 2**22 + 1


@pytest.mark.parametrize("delay_s", [0.0, 0.03, 0.08, 0.2, 0.5])
def test_hostd_can_be_killed_at_any_moment_of_a_start(node: Node, delay_s: float) -> None:
    specs = [node.spec(f"chaos-{int(delay_s * 100)}-{n}", "/bin/sh", "-c", f"echo {n}; exit {n}") for n in range(8)]
    for spec in specs:
        node.start(spec)
    time.sleep(delay_s)  # the point in time is what is tested
    node.kill_daemon()
    node.up()
    for n, spec in enumerate(specs):
        job = node.wait_ended(spec.id)
        if job.error is None:
            assert (job.exit_status, node.log(spec.id)[0]) == (n, str(n))
        else:
            assert job.error.code == "job_lost"


def test_a_stopped_daemon_leaves_jobs_and_a_new_one_adopts_them(node: Node) -> None:
    node.start(node.spec("calm", "/bin/sleep", "600"))
    pid = wait_until("it runs", lambda: running(node, "calm")).pid
    daemon = node.pid
    os.kill(daemon, signal.SIGTERM)
    wait_until("hostd has gone", lambda: not (node.run_dir / "hostd.pid").exists())
    assert alive(pid)
    node.up()
    assert node.job("calm").pid == pid
    assert node.stop("calm").status == "done"


def test_a_job_that_waits_for_its_client_still_waits_after_a_restart(node: Node) -> None:
    node.start(node.spec("patient", "/bin/cat", has_stdin=True))
    wait_until("it waits", lambda: node.job("patient").pid)
    node.kill_daemon()
    node.up()
    assert node.job("patient").status == "starting"
    done = node.hostd("attach", "patient", stdin="hello\n")
    assert (done.returncode, done.stdout) == (0, "hello\n")


def test_jobs_that_always_restart_do_so_with_a_growing_pause(node: Node) -> None:
    node.start(node.spec("phoenix", "/bin/sh", "-c", "exit 1", restart="always"))
    chain = wait_until("it came back twice", lambda: [j for j in node.jobs() if j.spec.id.startswith("phoenix")][2:])
    assert all(job.spec.id.startswith("phoenix-") for job in chain)
    for job in node.jobs():
        if job.spec.id.startswith("phoenix"):
            node.stop(job.spec.id)
    wait_until("it is over", lambda: not [j for j in node.jobs(active="") if j.spec.id.startswith("phoenix")])


def test_a_killed_discovery_comes_back_with_everything_in_it(node: Node) -> None:
    node.start(node.web("steady", service="steady"))
    port = node.wait_up("steady").ports[0]
    old = node.status().features["discovery"]
    os.kill(int(old.removeprefix("pid ")), signal.SIGKILL)
    wait_until("there is a new one", lambda: node.status().features["discovery"] not in (old, "not running"))
    wait_until("it knows the job", lambda: found(node, "steady") == {"steady": port})


def test_jobs_outlive_a_killed_spawner(node: Node) -> None:
    old = node.status().features["spawner"]
    assert node.status().features["spawner's children"].startswith("copies of ")
    discovery = node.status().features["discovery"]
    script = "for i in 1 2 3; do read line; echo got $line; echo err $i >&2; done; exit 9"
    talker = node.start(node.spec("talker", "/bin/sh", "-c", script, has_stdin=True, attach_timeout_s=0.1))
    web = node.start(node.web("outliver", service="outliver"))
    web = node.wait_up("outliver")
    talker = wait_until("it runs", lambda: running(node, "talker"))
    os.kill(int(old.removeprefix("pid ")), signal.SIGKILL)
    wait_until("there is a new one", lambda: node.status().features["spawner"] != old)
    fresh = node.start(node.spec("fresh", "/bin/sh", "-c", "echo hi"))
    assert node.wait_ended("fresh").exit_status == 0
    assert fresh.spec.id == "fresh"
    for job, name in ((talker, "talker"), (web, "outliver")):
        now = node.job(name)
        assert (now.pid, now.status, now.is_up) == (job.pid, "running", True)
    assert node.status().features["discovery"] == discovery
    assert "outliver" in node.curl(f"http://{web.host_ip}:{web.ports[0]}/")
    done = node.hostd("attach", "talker", stdin="a\nb\nc\n")
    ended = node.wait_ended("talker")
    if HAS_EXIT_INFO or ended.exit_status is not None:
        assert done.returncode == 9, done.stderr
        assert (ended.exit_status, ended.end_reason) == (9, "exited")
    else:
        assert ended.end_reason == "unknown"
    assert sorted(node.log("talker"))[:6] == ["err 1", "err 2", "err 3", "got a", "got b", "got c"]
    node.stop("outliver")


def test_jobs_outlive_hostd_and_the_spawner_at_once(node: Node) -> None:
    script = "i=0; while [ ! -e /tmp/stop ]; do i=$((i+1)); echo line $i; sleep 0.05; done; exit 3"
    node.start(node.spec("tally", "/bin/sh", "-c", script))
    web = node.start(node.web("both", service="both"))
    web = node.wait_up("both")
    counter = wait_until("it counts", lambda: running(node, "tally"))
    wait_until("it has counted", lambda: len(node.log("tally")) > 3)
    status = node.status()
    spawner = int(status.features["spawner"].removeprefix("pid "))
    node.kill_daemon()
    os.kill(spawner, signal.SIGKILL)
    node.up()
    assert node.status().features["spawner"] != status.features["spawner"]
    wait_until("discovery is back", lambda: node.status().features["discovery"] == status.features["discovery"])
    for job, name in ((counter, "tally"), (web, "both")):
        now = node.job(name)
        assert (now.pid, now.status) == (job.pid, "running"), now
    before = len(node.log("tally"))
    wait_until("it goes on", lambda: len(node.log("tally")) > before + 3)
    sh("nsenter", "-t", str(counter.pid), "-U", "-m", "-r", "-S", "0", "-G", "0", "touch", "/tmp/stop")
    ended = node.wait_ended("tally")
    assert ended.exit_status in (3, None)
    assert ended.end_reason == ("unknown" if ended.exit_status is None else "exited")
    lines = [line for line in node.log("tally") if line.startswith("line ")]
    assert lines == [f"line {number}" for number in range(1, len(lines) + 1)]
    assert "both" in node.curl(f"http://{web.host_ip}:{web.ports[0]}/")
    node.stop("both")


def test_a_job_that_ended_unseen_has_no_invented_status(node: Node) -> None:
    node.start(node.spec("unseen", "/bin/sleep", "600"))
    job = wait_until("it runs", lambda: running(node, "unseen"))
    spawner = int(node.status().features["spawner"].removeprefix("pid "))
    node.kill_daemon()
    for pid in (spawner, job.pid):
        os.kill(pid, signal.SIGKILL)
    wait_until("it is dead", lambda: not alive(job.pid))
    node.up()
    ended = node.job("unseen")
    assert (ended.status, ended.exit_status, ended.end_reason) == ("crashed", None, "unknown")


# down and up


def test_a_killed_hostd_comes_back_by_itself_until_down() -> None:
    with new_node(3, has_discovery=False) as node:
        node.is_kept = True
        before = snapshot(node)
        node.up()
        job = node.start(node.spec("steady", "/bin/sleep", "600"))
        job = wait_until("it runs", lambda: running(node, "steady"))
        for _ in range(2):
            old = node.pid
            node.kill_daemon()
            wait_until("it is back", lambda old=old: node.pid != old and node.status())  # type: ignore[misc]
        assert node.job("steady").pid == job.pid
        assert "(not up)" not in node.hostd("ps").stdout
        node.kill_daemon()
        node.down()
        assert snapshot(node) == before


def test_after_a_power_cut_jobs_come_back_in_the_order_of_their_first_start() -> None:
    names = [f"job-{number}" for number in (3, 1, 4, 2, 5)]
    with new_node(4, has_discovery=False) as node:
        node.up()
        for name in names:
            node.start(node.spec(name, "/bin/sh", "-c", "sleep 600", restart="always"))
            wait_until("it runs", lambda name=name: running(node, name))  # type: ignore[misc]
        os.kill(node.job("job-1").pid, signal.SIGKILL)  # it gets a successor, which is the youngest
        wait_until("it is followed", lambda: [j for j in node.jobs(active="") if j.spec.id.startswith("job-1-")])
        wait_until("all run", lambda: len([j for j in node.jobs(active="") if j.status == "running"]) == 5)
        pids = [job.pid for job in node.jobs(active="")]
        spawner = int(node.status().features["spawner"].removeprefix("pid "))
        node.kill_daemon()
        for pid in (spawner, *pids):
            os.kill(pid, signal.SIGKILL)
        with sqlite3.connect(node.state_dir / "hostd.db") as database:
            database.execute("UPDATE facts SET value = 'another' WHERE name = 'boot_id'")
        database.close()
        node.up()
        back = wait_until("all are back", lambda: (found := node.jobs(active=""))[4:] and found)
        assert [job.spec.id[:5] for job in back] == names
        wait_until("all run", lambda: len([j for j in node.jobs(active="") if j.status == "running"]) == 5)
        started = [job.started_at for job in node.jobs(active="")]
        assert started == sorted(started)
        assert {job.end_reason for job in node.jobs() if job.spec.id in names} <= {"lost", "signaled"}


def test_a_job_that_does_not_serve_in_time_is_killed_and_tried_again(node: Node) -> None:
    check = HealthCheck(start_timeout_s=0.3, has_to_start_in_time=True)
    port = Port(service="late", check=check)
    node.start(node.spec("late", "/bin/sleep", "600", ports=(port,), restart="on-failure"))
    job = node.wait_ended("late")
    assert (job.status, job.exit_status, job.end_reason) == ("crashed", 137, "start-timeout")
    (again,) = wait_until("it is tried again", lambda: node.jobs(active=""))
    assert again.spec.id.startswith("late-")
    for job in node.jobs(active=""):
        node.stop(job.spec.id)


def test_down_leaves_nothing_and_up_brings_back_what_always_restarts() -> None:
    with new_node(1) as node:
        before = snapshot(node)
        node.up()
        node.up()  # again changes nothing
        node.start(node.spec("eternal", "/bin/sleep", "600", restart="always"))
        node.start(node.spec("once", "/bin/sleep", "600"))
        wait_until("they run", lambda: running(node, "eternal") and running(node, "once"))
        node.down()
        assert snapshot(node) == before
        node.down()  # again is fine
        node.up()
        (back,) = wait_until("it is back", lambda: node.jobs(active=""))
        assert back.spec.id.startswith("eternal-")
        # now the same with a dead daemon
        wait_until("it runs", lambda: running(node, back.spec.id))
        node.kill_daemon()
        node.down()
        assert snapshot(node) == before
