"""Targets: layers, whole images, and the documents that describe them."""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import random
import re
import shutil
import stat
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path

from rootfs import documents, reference
from rootfs.errors import RootfsError
from rootfs.intake import ImageLimits, import_images
from rootfs.layers import Layers
from rootfs.layerstream import Limits
from rootfs.store import Store
from rootfs.types import hex_of
from rootfs.unpack import look_through
from tests.fuzz import mutation
from tests.fuzz.harness import Violation
from tests.rootfs import ociimages
from tests.rootfs.tars import file, folder, link, packed, tar_of

LIMITS = Limits(bytes_max=2_000_000, free_bytes=1_000_000, ratio_max=10, entries_max=2000)
ROOMS = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path(tempfile.gettempdir())


def check_kinds(path: Path) -> None:
    """Find what no layer may make: devices that are no whiteouts."""
    for parent, dirs, names in os.walk(path):
        for name in (*dirs, *names):
            found = os.lstat(os.path.join(parent, name))
            if stat.S_ISBLK(found.st_mode) or (stat.S_ISCHR(found.st_mode) and found.st_rdev):
                raise Violation(f"device {parent}/{name}")


class LayerTars:
    """Unpack a layer as hostd does: nothing outside, all or nothing, and looking through says the same."""

    def open(self) -> None:
        self._room = Path(tempfile.mkdtemp(prefix="fuzz-layers-", dir=ROOMS))
        self._top = self._room / "a/b/c/d"
        self._top.mkdir(parents=True)
        (self._top / "canary").write_bytes(b"canary")
        self._loop = asyncio.new_event_loop()

    def close(self) -> None:
        self._loop.close()
        shutil.rmtree(self._room)

    def seeds(self) -> Iterable[bytes]:
        capability, _ = file("c", b"x")
        capability.pax_headers = {"SCHILY.xattr.user.note": "hi", "path": "a/long"}
        plain = tar_of(
            *(
                folder("a"),
                file("a/b", b"hello" * 200, mode=0o4755, uid=7),
                link("l", "/etc/passwd"),
                link("a/s", ".."),
            ),
            *(link("h", "a/b", is_hard=True), file("a/.wh.gone"), file("a/.wh..wh..opq"), (capability, b"x")),
        )
        for how in ("plain", "gzip", "zstd"):
            yield packed(plain, how)
        old = io.BytesIO()
        with tarfile.open(fileobj=old, mode="w", format=tarfile.GNU_FORMAT) as tar:
            for name in ("n" * 150, "d/" * 60 + "x"):
                member = tarfile.TarInfo(name)
                member.size = 3
                tar.addfile(member, io.BytesIO(b"abc"))
        yield old.getvalue()

    def mutate(self, data: bytes, dice: random.Random) -> bytes:
        return mutation.of_tar(data, dice)

    def run(self, data: bytes) -> str:
        digest = "sha256:" + hashlib.sha256(data).hexdigest()
        blob = self._top / "blob"
        blob.write_bytes(data)
        try:
            look_through(blob, digest=digest, limits=LIMITS)
            looked = "fine"
        except RootfsError as error:
            looked = _word(error)
        layers = Layers(self._top / "layers", limits=LIMITS, boot_id="fuzz")
        layers.settle = lambda: None  # type: ignore[method-assign]  # syncing the disk is not what is looked at
        layers.open()

        async def get_blob() -> Path:
            return blob

        try:
            self._loop.run_until_complete(layers.ensure(digest, get_blob))
            unpacked = "fine"
        except RootfsError as error:
            unpacked = _word(error)
        finally:
            layers.close()
        found = sorted(path.name for path in layers.path.iterdir())
        wanted = [hex_of(digest), f"{hex_of(digest)}.ready"] if unpacked == "fine" else []
        if found != wanted:
            raise Violation(f"{unpacked}, yet there is {found}")
        is_for_the_disk = "layer has what no disk" in unpacked or "cannot have the attribute" in unpacked
        if (looked == "fine") != (unpacked == "fine") and not is_for_the_disk:
            raise Violation(f"looking through says {looked}, unpacking {unpacked}")
        check_kinds(layers.path)
        if sorted(os.listdir(self._top)) != ["blob", "canary", "layers"] or os.listdir(self._room) != ["a"]:
            raise Violation(f"outside: {list(self._room.rglob('*'))[:20]}")
        if (self._top / "canary").read_bytes() != b"canary":
            raise Violation("the canary has changed")
        shutil.rmtree(layers.path)
        return unpacked


class Archives:
    """Import an image: typed refusals only, whole blobs only, a name only for what unpacks."""

    def open(self) -> None:
        self._room = Path(tempfile.mkdtemp(prefix="fuzz-images-", dir=ROOMS))
        (self._room / "canary").write_bytes(b"canary")

    def close(self) -> None:
        shutil.rmtree(self._room)

    def seeds(self) -> Iterable[bytes]:
        yield ociimages.archive(ociimages.image("plain"))
        yield ociimages.archive(ociimages.image("gzip"), "gzip")
        yield ociimages.archive(ociimages.saved())
        files: ociimages.Files = {}
        own = ociimages.manifest(files) | {"platform": {"os": "linux", "architecture": ociimages.ARCHITECTURE}}
        other = ociimages.manifest(files) | {"platform": {"os": "linux", "architecture": ociimages.OTHER}}
        yield ociimages.archive(ociimages.layout(own, other, files=files), "zstd")
        saved = ociimages.saved()
        saved["blobs/l"] = saved.pop("1/layer.tar")
        yield ociimages.tar_with_links(saved, {"1/layer.tar": "../blobs/l"})

    def mutate(self, data: bytes, dice: random.Random) -> bytes:
        if dice.random() < 0.3:
            return mutation.of_tar(data, dice)
        files = _files_of(data)
        if not files:
            return mutation.of_bytes(data, dice)
        name = dice.choice(list(files))
        if files[name][:1] in (b"{", b"["):
            files[name] = mutation.of_json_text(files[name], dice)
        else:
            files[name] = mutation.of_tar(files[name], dice)
        if dice.random() < 0.85:
            files = relink(files)
        return ociimages.archive(files, dice.choice(("plain", "plain", "gzip", "zstd")))

    def run(self, data: bytes) -> str:
        path = self._room / "image.tar"
        path.write_bytes(data)
        store = Store(self._room / "images")
        try:
            images = import_images(store, path, limits=ImageLimits(layer=LIMITS, bytes_max=4_000_000, entries_max=3000))
            outcome = f"fine:{len(images)}"
        except RootfsError as error:
            images, outcome = (), _word(error)
        try:
            for image in images:
                for layer in image.layers:
                    look_through(store.blob(layer.digest), digest=layer.digest, diff_id=layer.diff_id, limits=LIMITS)
            if len(store.images()) < len({image.name for image in images}):
                raise Violation("an image has no name")
            for blob in store.blobs.iterdir() if store.blobs.is_dir() else ():
                if blob.name != hashlib.sha256(blob.read_bytes()).hexdigest():
                    raise Violation(f"blob {blob.name} is something else")
            if sorted(os.listdir(self._room)) not in (["canary", "image.tar", "images"], ["canary", "image.tar"]):
                raise Violation(f"outside: {os.listdir(self._room)}")
        finally:
            shutil.rmtree(store.path, ignore_errors=True)
        return outcome


def relink(files: ociimages.Files) -> ociimages.Files:
    """Make names and descriptors follow blobs that were changed, from the layers up."""
    for _ in range(4):
        changed = [
            name for name, content in files.items()
            if name.startswith("blobs/sha256/") and name[13:] != hashlib.sha256(content).hexdigest()
        ]  # fmt: skip
        if not changed:
            break
        for name in changed:
            content = files.pop(name)
            old, new = name[13:], hashlib.sha256(content).hexdigest()
            files[f"blobs/sha256/{new}"] = content
            pattern = re.compile(rb'(sha256:)%s("\s*,\s*"size":\s*)\d+' % re.escape(os.fsencode(old)))
            for each, text in list(files.items()):
                if text[:1] == b"{":
                    text = pattern.sub(rb"\g<1>%s\g<2>%d" % (new.encode(), len(content)), text)
                    files[each] = text.replace(os.fsencode(old), new.encode())
    return files


def _files_of(data: bytes) -> ociimages.Files:
    _, plain = mutation._plain(data)
    files: ociimages.Files = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(plain)) as tar:
            for member in tar:
                if member.isreg() and 0 <= member.size < 1 << 20 and (content := tar.extractfile(member)):
                    files[member.name] = content.read()
    except Exception:  # whatever: it is no tar any more
        return {}
    return files


class Documents:
    """Read manifests, indexes, configs and references: values or a typed refusal."""

    def open(self) -> None: ...
    def close(self) -> None: ...

    def seeds(self) -> Iterable[bytes]:
        for files in (ociimages.image(), ociimages.saved()):
            yield from (content for content in files.values() if content[:1] in (b"{", b"["))
        yield from (b"registry.test:5000/a/b_c.d:tag@sha256:" + b"0" * 64, b"alpine", b"localhost/x:1")

    def mutate(self, data: bytes, dice: random.Random) -> bytes:
        return mutation.of_bytes(data, dice) if dice.random() < 0.2 else mutation.of_json_text(data, dice)

    def run(self, data: bytes) -> str:
        words = []
        text = data.decode("utf-8", "replace")
        for act in (
            lambda: documents.media_type_of(data),
            lambda: documents.choose(documents.index_of(data)),
            lambda: documents.manifest_of(data),
            lambda: documents.config_of(data, 2),
            lambda: documents.decode(data, tuple[documents.Saved, ...], "manifest.json"),
            lambda: reference.parse(str(reference.parse(text, "default.test"))),
            lambda: reference.local_name(text),
            lambda: reference.is_loopback(text),
        ):
            try:
                act()
                words.append("y")
            except RootfsError as error:
                words.append(type(error).__name__[:1])
        return "".join(words)


def _word(error: RootfsError) -> str:
    """Return the kind of refusal, without the parts that differ each time."""
    str(error).encode()  # an operator has to be able to read it
    text = re.sub(r"'[^']*'|\"[^\"]*\"|sha256:\w+|/\S+|\d+", "", str(error))
    return f"{type(error).__name__}:{' '.join(text.split())[:60]}"
