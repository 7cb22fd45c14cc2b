"""Says what an image's config means for a job: pure. Called by `hostd run`.

A word of the operator wins over the image's. `VOLUME` paths stay in the job's own writable layer, with what the image
has there and its owners, and go with the job; a volume that somebody names keeps them. `EXPOSE` publishes nothing until
it is asked for, and then under the same number. Labels become `image.KEY`: those without it are the platform's words.
Refuses stop signals and ports that are none.

Source: OCI image-spec `config.md`; Docker's reference of ENTRYPOINT, CMD, VOLUME, EXPOSE, STOPSIGNAL.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence

from discovery.wire.errors import Invalid
from hostd.types import ImageConfig, Port

DEFAULT_STOP_SIGNAL = 15
_LABEL_BYTES_MAX, _LABELS_BYTES_MAX = 256, 2048
_PORT = re.compile(r"(\d{1,5})(?:-(\d{1,5}))?(?:/(tcp|udp|sctp))?")
_REAL_TIME = re.compile(r"RT(MIN|MAX)(?:([+-])(\d{1,2}))?")


def command(config: ImageConfig, args: Sequence[str], entrypoint: str | None = None) -> tuple[str, ...]:
    """Return what to run: the entrypoint, then the operator's arguments or the image's.

    With an `entrypoint` of the operator's (empty: none) the image's arguments are for another program, so they go too.

    Raises:
        Invalid: there is nothing to run.
    """
    if entrypoint is not None:
        words = (*((entrypoint,) if entrypoint else ()), *args)
    else:
        words = (*config.entrypoint, *(args or config.cmd))
    if not words:
        raise Invalid("the image does not say what to run", hint="hostd run --image NAME -- COMMAND")
    return tuple(words)


def stop_signal(config: ImageConfig) -> int:
    """Return the number of the signal that ends the image's program.

    Raises:
        Invalid: it is none.
    """
    text = config.stop_signal.upper().removeprefix("SIG")
    if not text:
        return DEFAULT_STOP_SIGNAL
    number = int(text) if text.isascii() and text.isdigit() and len(text) < 4 else _named(text)
    if not 1 <= number <= 64:
        raise Invalid(f"the image's stop signal {config.stop_signal[:40]!r}", hint="--stop-signal names another")
    return number


def _named(text: str) -> int:
    if match := _REAL_TIME.fullmatch(text):
        base = signal.SIGRTMIN if match[1] == "MIN" else signal.SIGRTMAX
        return int(base) + int(f"{match[2]}{match[3]}" if match[3] else "0")
    try:
        return int(signal.Signals[f"SIG{text}"])
    except KeyError:
        return 0


def exposed(config: ImageConfig) -> tuple[Port, ...]:
    """Return the ports that the image says it listens on, each under its own number.

    Raises:
        Invalid: one is no port, or there are too many.
    """
    found: dict[tuple[int, str], Port] = {}
    for text in config.exposed_ports:
        match = _PORT.fullmatch(text)
        low = int(match[1]) if match else 0
        high = int(match[2]) if match and match[2] else low
        if match is None or match[3] == "sctp" or not 0 < low <= high <= 65535 or high - low > 64:
            raise Invalid(f"the image's port {text[:40]!r}", hint="such as 8080/tcp")
        protocol = "udp" if match[3] == "udp" else "tcp"
        for number in range(low, high + 1):
            found[number, protocol] = Port(number=number, protocol=protocol)  # type: ignore[arg-type]
    return tuple(found[key] for key in sorted(found))


def labels(config: ImageConfig) -> dict[str, str]:
    """Return the image's labels as a job may have them; long ones stay behind, `hostd image inspect` shows all."""
    found: dict[str, str] = {}
    size = 0
    for key, value in sorted(config.labels.items()):
        size_of_both = len(f"image.{key}{value}".encode("utf-8", "replace"))
        if size_of_both <= _LABEL_BYTES_MAX and size + size_of_both <= _LABELS_BYTES_MAX and "=" not in key:
            found[f"image.{key}"] = value
            size += size_of_both
    return found


def forgotten(config: ImageConfig, mounted: Sequence[str]) -> tuple[str, ...]:
    """Return the image's volume paths that nothing is mounted at: what is written there goes with the job."""
    return tuple(path for path in config.volumes if not any(path == at or path.startswith(at + "/") for at in mounted))
