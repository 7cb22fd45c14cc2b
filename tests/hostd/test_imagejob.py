"""What an image's config means for a job."""

import signal

import pytest

from discovery.wire.errors import Invalid
from hostd import imagejob
from hostd.types import ImageConfig, Port


@pytest.mark.parametrize(
    ("entrypoint", "cmd", "args", "own", "wanted"),
    [
        (("/e",), ("c",), (), None, ("/e", "c")),
        (("/e",), ("c",), ("a", "b"), None, ("/e", "a", "b")),
        ((), ("c",), (), None, ("c",)),
        (("/e",), ("c",), ("a",), "/own", ("/own", "a")),
        (("/e",), ("c",), (), "/own", ("/own",)),
        (("/e",), ("c",), ("a",), "", ("a",)),
    ],
)
def test_command(
    entrypoint: tuple[str, ...], cmd: tuple[str, ...], args: tuple[str, ...], own: str | None, wanted: tuple[str, ...]
) -> None:
    assert imagejob.command(ImageConfig(entrypoint=entrypoint, cmd=cmd), args, own) == wanted


def test_nothing_to_run() -> None:
    with pytest.raises(Invalid, match="what to run"):
        imagejob.command(ImageConfig(), ())


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("", 15),
        ("SIGQUIT", 3),
        ("quit", 3),
        ("9", 9),
        ("SIGRTMIN+3", signal.SIGRTMIN + 3),
        ("RTMAX-1", signal.SIGRTMAX - 1),
    ],
)
def test_stop_signal(text: str, number: int) -> None:
    assert imagejob.stop_signal(ImageConfig(stop_signal=text)) == number


@pytest.mark.parametrize("text", ["0", "65", "SIGNOTHING", "-1", "9999999999", "RTMIN+99", "²"])
def test_stop_signal_that_is_none(text: str) -> None:
    with pytest.raises(Invalid):
        imagejob.stop_signal(ImageConfig(stop_signal=text))


def test_exposed_ports() -> None:
    config = ImageConfig(exposed_ports=("53/udp", "8080", "90-91/tcp"))
    assert imagejob.exposed(config) == (
        Port(number=53, protocol="udp"), Port(number=90), Port(number=91), Port(number=8080)
    )  # fmt: skip


@pytest.mark.parametrize("text", ["", "0", "70000/tcp", "x", "9-1", "1-60000", "5/sctp"])
def test_ports_that_are_none(text: str) -> None:
    with pytest.raises(Invalid):
        imagejob.exposed(ImageConfig(exposed_ports=(text,)))


def test_labels_are_marked_as_the_images_own() -> None:
    config = ImageConfig(
        labels={"app": "x", "long": "y" * 300, "a=b": "z"} | {f"k{i:03}": "v" * 200 for i in range(50)}
    )
    found = imagejob.labels(config)
    assert found["image.app"] == "x"
    assert all(key.startswith("image.") and "=" not in key for key in found)
    assert sum(len(key) + len(value) for key, value in found.items()) <= 2048


def test_volumes_that_nobody_keeps() -> None:
    config = ImageConfig(volumes=("/data", "/srv/www", "/db"))
    assert imagejob.forgotten(config, ["/data", "/srv"]) == ("/db",)
