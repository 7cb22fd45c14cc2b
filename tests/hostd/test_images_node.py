"""An image from elsewhere on a real node: imported, run as it says, kept while it is used, and gone without a trace."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from rootfs.store import Store
from tests.hostd.node import Node, node
from tests.rootfs.ociimages import OCI, config, dump, layout, put, sha, write
from tests.rootfs.tars import file, folder, tar_of

pytestmark = pytest.mark.needs_root

TOP = tar_of(
    folder("etc"),
    file("etc/passwd", b"root:x:0:0::/root:/bin/sh\napp:x:1001:1002::/srv/home:/bin/sh\n"),
    file("etc/group", b"root:x:0:\nstaff:x:50:\n"),
    folder("data"),
    file("data/seed", b"from the image", uid=1001),
)


@pytest.fixture(scope="module")
def machine() -> Iterator[Node]:
    with node(7, has_discovery=False) as found:
        found.up()
        _import(found)
        yield found


def _import(machine: Node) -> None:
    """Put one more layer on `base` and import that."""
    store = Store(machine.state_dir / "images")
    base = store.image("base")
    files: dict[str, bytes] = {}
    parts = [put(files, store.read_blob(each.digest), each.media_type) for each in base.layers]
    parts.append(put(files, TOP, OCI + "layer.v1.tar"))
    document = config(TOP)
    document["rootfs"]["diff_ids"] = [*(each.diff_id for each in base.layers), sha(TOP)]
    document["config"] |= {"Entrypoint": ["/bin/sh", "-c"], "Cmd": ["id; pwd; echo $A $HOME; cat /data/seed"]}
    of = {"schemaVersion": 2, "layers": parts, "config": put(files, dump(document), OCI + "config.v1+json")}
    place = write(machine.folder / "layout", layout(put(files, dump(of), OCI + "manifest.v1+json"), files=files))
    done = machine.hostd("image", "import", str(place), "--name", "app")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("app sha256:")


def test_runs_as_its_config_says(machine: Node) -> None:
    done = machine.hostd("run", "--image", "app")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "uid=1001(app) gid=1002 groups=1002", "/srv", "1 /srv/home", "from the image"
    ]  # fmt: skip
    assert "/data goes with the job" in done.stderr


def test_the_operators_words_win(machine: Node) -> None:
    done = machine.hostd(
        "run", "--image", "app", "-u", "app:staff", "-w", "/data", "-e", "A=2", "--entrypoint", "/bin/sh",
        "--", "-c", "id -u; id -g; pwd; echo $A",
    )  # fmt: skip
    assert done.stdout.split() == ["1001", "50", "/data", "2"], done.stderr
    refused = machine.hostd("run", "--image", "app", "-u", "nobody-of-that-name")
    assert refused.returncode == 64
    assert "has no user" in refused.stderr


def test_an_image_in_use_stays_and_then_goes(machine: Node) -> None:
    started = machine.hostd("run", "--image", "app", "-d", "--name", "sleeper", "--", "sleep 600")
    assert started.returncode == 0, started.stderr
    assert machine.job("sleeper").spec.stop_signal == 3
    assert machine.job("sleeper").spec.labels == {"image.a": "b"}
    refused = machine.hostd("image", "rm", "app")
    assert (refused.returncode, "in use by sleeper" in refused.stderr) == (75, True), refused.stderr
    machine.stop("sleeper")
    assert machine.hostd("image", "rm", "app").returncode == 0
    assert machine.hostd("image", "rm", "app").returncode == 66
    assert "app" not in machine.hostd("image", "ls").stdout
    machine.hostd("forget")
    top = machine.state_dir / "layers" / sha(TOP)[7:]
    assert top.is_dir()
    pruned = json.loads(machine.hostd("image", "prune", "--json").stdout)
    assert pruned["layers"] == 1
    assert pruned["freed_bytes"] > len(TOP)
    assert not top.exists()
    assert machine.hostd("run", "--image", "base", "--", "/bin/true").returncode == 0
