"""A process type of a formation as the job that a host is told to run."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.errors import InvalidName
from controller.translate import Place, actual_job, job_id, job_spec, one_off_spec, place_of, ports_of, state_of
from controller.types import App, Artifact, NewJob, ProcessType, Release, parse_app_name
from discovery.types import Instance
from hostd.types import BindMount, ImageConfig, Job, JobSpec, Layer, Port, parse_job_id

APP = App(id="app1", name="example")
PLACE = Place(host_id="one", host_ip="10.0.0.1", run_dir="/run/lab")
STACK = Artifact(
    id="s",
    kind="image",
    layers=(Layer(digest="sha256:" + "1" * 64, size_bytes=1),),
    config=ImageConfig(env={"PATH": "/bin", "LANG": "C.UTF-8"}, user="0"),
)
SLUG = Artifact(
    id="g",
    kind="slug",
    layers=(Layer(digest="sha256:" + "2" * 64, size_bytes=1),),
    config=ImageConfig(env={"HOME": "/app"}, working_dir="/app"),
)


def spec(process: ProcessType, type: str = "web", artifacts: tuple[Artifact, ...] = (STACK, SLUG)) -> JobSpec:
    release = Release(
        id="r1", app_id="app1", number=1, artifact_ids=("s", "g"), env={"LANG": "de", "A": "release"},
        processes={type: process},
    )  # fmt: skip
    return job_spec(app=APP, release=release, type=type, artifacts=artifacts, place=PLACE, id="job-1")


def test_layers_are_stacked_and_the_later_environment_wins() -> None:
    made = spec(ProcessType(args=("a",), env={"A": "process", "FLYNN_APP_ID": "forged"}))
    assert [layer.digest[-1] for layer in made.layers] == ["1", "2"]
    assert made.env == {
        "PATH": "/bin", "LANG": "de", "HOME": "/app", "A": "process",
        "FLYNN_APP_ID": "app1", "FLYNN_APP_NAME": "example", "FLYNN_RELEASE_ID": "r1", "FLYNN_PROCESS_TYPE": "web",
    }  # fmt: skip
    assert made.working_dir == "/app"
    assert made.labels == {"app": "app1", "app_name": "example", "release": "r1", "type": "web"}


@pytest.mark.parametrize(("type", "services"), [("web", ["example-web"]), ("api-web", ["example--api-web"]), ("clock", [])])  # fmt: skip  # noqa: E501
def test_web_types_get_a_port_and_a_service_others_none(type: str, services: list[str]) -> None:
    assert [port.service for port in ports_of("example", type, ProcessType())] == services


def test_no_process_type_answers_for_another_app() -> None:
    assert ports_of("a", "b-web", ProcessType()) != ports_of("a-b", "web", ProcessType())
    with pytest.raises(InvalidName):
        parse_app_name("a--b")
    assert parse_app_name("a-b-c") == "a-b-c"


def test_ports_of_the_process_type_are_kept() -> None:
    ports = (Port(number=80, is_public=True),)
    assert ports_of("router", "web", ProcessType(ports=ports)) == ports


def test_a_grant_mounts_the_hosts_own_directory_at_the_same_path() -> None:
    made = spec(ProcessType(args=("a",), grants=("discovery", "hostd")))
    assert made.mounts == (
        BindMount(source="/run/lab/discovery", path="/run/lab/discovery"),
        BindMount(source="/run/lab/api", path="/run/lab/api"),
    )
    assert made.env["DISCOVERD"] == "unix:///run/lab/discovery/discovery.sock"
    assert "DISCOVERD" not in spec(ProcessType(args=("a",))).env


def test_prefixes_of_the_store_are_for_the_host_to_grant() -> None:
    assert spec(ProcessType(args=("a",), store_prefixes=("/x/",))).store_prefixes == ("/x/",)
    assert spec(ProcessType(args=("a",))).store_prefixes == ()


def test_a_slug_runs_through_its_runner() -> None:
    assert spec(ProcessType()).args == ("/bin/sh", "/app/.hostd/start", "web")
    assert spec(ProcessType(args=("node",))).args == ("node",)
    release = Release(id="r1", app_id="app1", number=1, artifact_ids=())
    made = one_off_spec(
        app=APP, release=release, new=NewJob(args=("ls",)), artifacts=[STACK, SLUG], place=PLACE, id="job-1"
    )
    assert made.args == ("/bin/sh", "/app/.hostd/start", "--", "ls")


def test_a_one_off_waits_for_its_client_unless_detached_and_cannot_forge_labels() -> None:
    new = NewJob(args=("bash",), has_tty=True, rows=50, columns=100, labels={"app": "other", "why": "x"})
    made = one_off_spec(app=APP, release=None, new=new, artifacts=[STACK], place=PLACE, id="job-1")
    assert (made.has_stdin, made.has_tty, made.rows, made.columns) == (True, True, 50, 100)
    assert made.env["TERM"] == "xterm-256color"
    assert made.labels == {"app": "app1", "app_name": "example", "release": "", "type": "", "why": "x"}
    assert made.args == ("bash",)


def test_a_host_says_where_its_sockets_are() -> None:
    def told(**meta: str) -> str:
        return place_of(Instance(id="one", service="hostd", host="10.0.0.1", port=1113, meta=meta)).run_dir

    assert told(url="unix:///run/lab/api/hostd.sock") == "/run/lab"
    assert told(url="https://10.0.0.1:1113", run_dir="/run/x") == "/run/x"
    assert told(url="https://10.0.0.1:1113") == "/run/hostd"


@given(st.from_regex(r"[a-z](?:[a-z0-9-]{0,38}[a-z0-9])?", fullmatch=True), st.from_regex(r"(?:[A-Za-z0-9](?:[A-Za-z0-9_-]{0,30}[A-Za-z0-9])?)?", fullmatch=True))  # fmt: skip  # noqa: E501
def test_job_ids_are_always_accepted_by_hosts(app_name: str, type: str) -> None:
    assert parse_job_id(job_id(app_name, type, "0123456789"))


@pytest.mark.parametrize(
    ("status", "is_up", "state"),
    [("running", False, "starting"), ("running", True, "up"), ("done", False, "down"), ("crashed", False, "crashed")],
)
def test_a_job_is_up_only_when_it_serves(status: str, is_up: bool, state: str) -> None:
    job = Job(spec=spec(ProcessType(args=("a",))), host_id="one", status=status, is_up=is_up)  # type: ignore[arg-type]
    assert state_of(job) == actual_job(job).state == state
