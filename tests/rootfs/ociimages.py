"""Makes small images as files by name: OCI layouts and what `docker save` writes, honest ones and others."""

import copy
import gzip
import hashlib
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

from rootfs.documents import ARCHITECTURES
from tests.rootfs.tars import file, folder, packed, tar_of

ARCHITECTURE = ARCHITECTURES[os.uname().machine]
OTHER = "arm64" if ARCHITECTURE == "amd64" else "amd64"
OCI = "application/vnd.oci.image."
Files = dict[str, bytes]

LAYER_ONE = tar_of(
    folder("etc"), file("etc/passwd", b"root:x:0:0::/root:/bin/sh\napp:x:1001:1002::/srv:/bin/sh\n"), file("gone", b"g")
)
LAYER_TWO = tar_of(file(".wh.gone"), file("etc/group", b"staff:x:50:app\n"), file("srv/data", b"data"))
RUNTIME: dict[str, Any] = {
    "Entrypoint": ["/bin/echo"],
    "Cmd": ["hello"],
    "Env": ["A=1", "PATH=/bin"],
    "WorkingDir": "/srv",
    "User": "app",
    "Volumes": {"/data": {}},
    "ExposedPorts": {"8080/tcp": {}},
    "StopSignal": "SIGQUIT",
    "Labels": {"a": "b"},
}


def sha(content: bytes) -> str:
    return "sha256:" + hashlib.sha256(content).hexdigest()


def dump(document: object) -> bytes:
    return json.dumps(document).encode()


def put(files: Files, content: bytes, media_type: str, **more: Any) -> dict[str, Any]:
    """Add a blob and return its descriptor."""
    files[f"blobs/sha256/{sha(content)[7:]}"] = content
    return {"mediaType": media_type, "digest": sha(content), "size": len(content), **more}


def config(*layers: bytes, **more: Any) -> dict[str, Any]:
    document = {"architecture": ARCHITECTURE, "os": "linux", "config": copy.deepcopy(RUNTIME)}  # callers change it
    return document | {"rootfs": {"type": "layers", "diff_ids": [sha(layer) for layer in layers]}} | more


def manifest(
    files: Files, layers: tuple[bytes, ...] = (LAYER_ONE, LAYER_TWO), how: str = "gzip", **more: Any
) -> dict[str, Any]:
    """Add an image's blobs to `files`; return its manifest's descriptor."""
    ending = "" if how == "plain" else f"+{how}"
    parts = [put(files, packed(layer, how), OCI + "layer.v1.tar" + ending) for layer in layers]
    of = {"schemaVersion": 2, "mediaType": OCI + "manifest.v1+json", "layers": parts}
    of["config"] = put(files, dump(config(*layers, **more)), OCI + "config.v1+json")
    return put(files, dump(of), OCI + "manifest.v1+json")


def layout(*manifests: dict[str, Any], files: Files) -> Files:
    index = {"schemaVersion": 2, "mediaType": OCI + "index.v1+json", "manifests": list(manifests)}
    return {"oci-layout": b'{"imageLayoutVersion":"1.0.0"}', "index.json": dump(index)} | files


def image(how: str = "gzip", **more: Any) -> Files:
    """Return an honest image with two layers as an OCI layout."""
    files: Files = {}
    return layout(manifest(files, how=how, **more), files=files)


def saved(tags: tuple[str, ...] = ("registry.test/team/app:1.2",)) -> Files:
    """Return the same as `docker save` writes it."""
    content = dump(config(LAYER_ONE, LAYER_TWO))
    name = sha(content)[7:] + ".json"
    list_ = [{"Config": name, "RepoTags": list(tags), "Layers": ["1/layer.tar", "2/layer.tar"]}]
    return {name: content, "manifest.json": dump(list_), "1/layer.tar": LAYER_ONE, "2/layer.tar": LAYER_TWO}


def archive(files: Files, how: str = "plain") -> bytes:
    return packed(tar_of(*(file(name, content) for name, content in files.items())), how)


def write(folder: Path, files: Files) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def tar_with_links(files: Files, links: dict[str, str], kind: bytes = tarfile.SYMTYPE) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, content in files.items():
            tar.addfile(_sized(name, content), io.BytesIO(content))
        for name, to in links.items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, to
            tar.addfile(member)
    return out.getvalue()


def _sized(name: str, content: bytes) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    return member


def bomb(size_bytes: int) -> bytes:
    """Return a gzip'ed tar that is much larger inside."""
    return gzip.compress(tar_of(file("zero", bytes(size_bytes))))
