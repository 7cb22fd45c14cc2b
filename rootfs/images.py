"""Builds the images that this host starts jobs from, with mmdebstrap and this machine's own Debian sources.

Every layer is cached by what it is made from, in a folder that nodes and tests share, so only the first build
takes minutes; the `code` layer is made anew each time, the same sources giving the same digest. A layer enters the
cache whole or not at all. One build at a time per cache; another one waits. Refuses to run on anything but Debian,
and as anybody but root. Called by `hostd image build`.
"""

from __future__ import annotations

import collections
import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from time import monotonic

import msgspec

from rootfs import layertar, pythonlayers, recipes, sources
from rootfs.errors import BuildFailed, DiskFull
from rootfs.recipes import Recipe
from rootfs.store import Store, digest_of, sync_dir
from rootfs.types import Image, Layer, hex_of

CACHE_DIR = Path("/var/cache/hostd/images")
_FREE_BYTES_MIN = 4 * 1024**3
_KEPT_OF_A_KIND = 8
_AT_A_TIME = 2  # dpkg keeps a core busy and waits for the disk in between
# A builder that is killed takes mmdebstrap and all that runs under it along: the end of its pid namespace.
_DIE_TOGETHER = ("setpriv", "--pdeathsig", "KILL", "unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
_OPTIONS = (
    "--variant=minbase",
    "--mode=root",
    "--format=tar",
    '--aptopt=Acquire::Languages "none"',
    '--aptopt=APT::Install-Recommends "false"',
    "--dpkgopt=path-exclude=/usr/share/man/*",
    "--dpkgopt=path-exclude=/usr/share/locale/*",
    "--dpkgopt=path-exclude=/usr/share/info/*",
    "--dpkgopt=path-exclude=/usr/share/doc/*",
    "--dpkgopt=path-include=/usr/share/doc/*/copyright",
)

Progress = Callable[[str], None]


def build_images(
    store_dir: Path,
    cache_dir: Path = CACHE_DIR,
    repo_or_site_packages: Path | None = None,
    names: Iterable[str] | None = None,
    progress: Progress = print,
    *,
    is_fresh: bool = False,
) -> tuple[Image, ...]:
    """Build the named images (all if `None`) into the store at `store_dir` and return them.

    `repo_or_site_packages` is where our packages lie, by default those that are running. `is_fresh` builds
    the Debian and tool layers anew, with the archive's newest packages.

    Raises:
        ImageMissing: a name without a recipe.
        BuildFailed: says which image and why, with the last words of what failed.
        DiskFull: less than 4 GiB are free for a build, or it ran full.
    """
    if os.geteuid() != 0:
        raise BuildFailed("images are built as root", hint="sudo")
    code_root = repo_or_site_packages or Path(__file__).resolve().parent.parent
    store = Store(store_dir)
    with _Cache.opened(cache_dir, progress) as cache, store.busy():
        return _Build(cache, code_root, progress, is_fresh=is_fresh).run(store, names)


class _Cache:
    """Finished layers by key: `<key>.tar.zst` and `<key>.json`, the second written last."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.scratch = path / "tmp"

    @classmethod
    @contextmanager
    def opened(cls, path: Path, progress: Progress) -> Iterator[_Cache]:
        path.mkdir(parents=True, exist_ok=True)
        cache = cls(path)
        with (path / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                progress("waiting for another build to end")
                fcntl.flock(lock, fcntl.LOCK_EX)
            shutil.rmtree(cache.scratch, ignore_errors=True)  # what an interrupted build left
            cache.scratch.mkdir(exist_ok=True)
            try:
                yield cache
            finally:
                shutil.rmtree(cache.scratch, ignore_errors=True)

    def file(self, key: str) -> Path:
        return self.path / f"{key}.tar.zst"

    def get(self, key: str) -> Layer | None:
        """Return a finished layer; one whose file is not as long as it should be counts as none."""
        try:
            layer = msgspec.json.decode((self.path / f"{key}.json").read_bytes(), type=Layer)
            is_whole = self.file(key).stat().st_size == layer.size_bytes
        except (FileNotFoundError, msgspec.MsgspecError):
            return None
        return layer if is_whole else None

    def forget(self, key: str) -> None:
        (self.path / f"{key}.json").unlink(missing_ok=True)

    def prune(self, spared: Iterable[str]) -> None:
        """Remove the oldest layers of each kind beyond a few; edits leave a `code` layer each."""
        kept = set(spared)
        newest_first = sorted(self.path.glob("*.json"), key=lambda path: -path.stat().st_mtime_ns)
        seen: collections.Counter[str] = collections.Counter()
        for note in newest_first:
            seen[note.stem.partition("-")[0]] += 1
            if seen[note.stem.partition("-")[0]] > _KEPT_OF_A_KIND and note.stem not in kept:
                note.unlink()
                self.file(note.stem).unlink(missing_ok=True)

    def put(self, key: str, make: Callable[[Path], Layer]) -> Layer:
        """Let `make` write a layer's file and keep it."""
        temporary = self.scratch / f"{key}.tar.zst"
        layer = make(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(self.file(key))
        note = self.scratch / f"{key}.json"
        note.write_bytes(msgspec.json.encode(layer))
        note.replace(self.path / note.name)
        sync_dir(self.path)
        return layer


class _Build:
    def __init__(self, cache: _Cache, code_root: Path, progress: Progress, *, is_fresh: bool) -> None:
        self._cache = cache
        self._code_root = code_root
        self._progress = progress
        self._is_fresh = is_fresh
        self._recipes = recipes.load()
        self._suite = sources.codename()
        self._archive = [source.line() for source in sources.debian_sources(self._suite)]
        self._apt_options = sources.apt_options()
        self._done: dict[str, tuple[str, Layer]] = {}

    def run(self, store: Store, names: Iterable[str] | None) -> tuple[Image, ...]:
        wanted = recipes.chosen(self._recipes, names)
        with ThreadPoolExecutor(_AT_A_TIME, thread_name_prefix="image") as threads:
            packages: dict[str, Future[Layer]] = {}
            # Lower recipes come first in the list and in the queue, so whoever waits for one finds it running.
            for recipe in wanted:
                if recipe.packages:
                    packages[recipe.name] = threads.submit(self._package_layer, recipe, packages.get(recipe.extends))
                    self._wait_if_cached(recipe, packages[recipe.name])
            extras = {(each.name, kind): self._extra_layer(each, kind) for each in wanted for kind in each.layers}
            layers = {name: future.result() for name, future in packages.items()}
        images = []
        for recipe in wanted:
            parts = []
            for each in recipes.lineage(self._recipes, recipe.name):
                parts += [layers[each.name]] if each.name in layers else []
                parts += [extras[each.name, kind] for kind in each.layers]
            images.append(self._store(store, recipe.name, parts))
        self._cache.prune(key for key, _ in self._done.values())
        return tuple(images)

    def _store(self, store: Store, name: str, layers: list[Layer]) -> Image:
        keys = {layer.digest: key for key, layer in self._done.values()}
        for layer in layers:
            source = self._cache.file(keys[layer.digest])
            if not store.has_blob(layer.digest):
                if digest_of(source) != layer.digest:
                    self._cache.forget(keys[layer.digest])
                    raise BuildFailed(f"{source} has rotted; it is forgotten", hint="build again")
                store.add_blob(source, layer.digest, layer.size_bytes)
        image = store.set_image(name, layers, recipes.config_of(self._recipes, name))
        size_mib = sum(layer.size_bytes for layer in layers) / 2**20
        self._progress(f"{name}: {image.digest[:19]}, {len(layers)} layers, {size_mib:.1f} MiB")
        return image

    def _layer(self, what: str, key: str, make: Callable[[Path], Layer], *, can_age: bool = True) -> Layer:
        """Take a layer from the cache or make it, and say how long that took."""
        found = None if self._is_fresh and can_age else self._cache.get(key)
        if found is None:
            began = monotonic()
            found = self._cache.put(key, make)
            self._progress(f"{what}: {found.size_bytes / 2**20:.1f} MiB in {monotonic() - began:.1f} s")
        self._done[what] = (key, found)
        return found

    # --- Debian

    def _package_layer(self, recipe: Recipe, below: Future[Layer] | None) -> Layer:
        key = f"{recipe.name}-{self._packages_key(recipe.name)}"
        if below is None:
            return self._layer(recipe.name, key, lambda target: self._write(recipe, self._bootstrap(recipe), target))
        # While the layer below is being made, this one's tree can be, too; only the comparison has to wait.
        tree = self._bootstrap(recipe) if self._is_fresh or not below.done() else None
        below_layer = below.result()

        def make(target: Path) -> Layer:
            return self._write(recipe, tree or self._bootstrap(recipe), target, below_layer)

        # A difference is good for exactly that layer below, so that one is part of the key.
        return self._layer(recipe.name, f"{key}-{hex_of(below_layer.digest)[:12]}", make)

    def _wait_if_cached(self, recipe: Recipe, layer: Future[Layer]) -> None:
        """Let a layer that takes no work be done before the ones above it look at it."""
        if (
            not self._is_fresh
            and not recipe.extends
            and self._cache.get(f"{recipe.name}-{self._packages_key(recipe.name)}")
        ):
            layer.result()

    def _write(self, recipe: Recipe, tree: Path, target: Path, below: Layer | None = None) -> Layer:
        if below is None:
            layer = layertar.from_tree(tree, target)
        else:
            self._progress(f"{recipe.name}: comparing with {recipe.extends}")
            below_key, _ = self._done[recipe.extends]
            layer = layertar.from_difference(self._cache.file(below_key), tree, target)
        tree.unlink()
        return layer

    def _packages_key(self, name: str) -> str:
        return recipes.packages_key(self._recipes, name, self._suite, os.uname().machine)

    def _bootstrap(self, recipe: Recipe) -> Path:
        """Run mmdebstrap and return the tar of the whole tree."""
        free_bytes = shutil.disk_usage(self._cache.scratch).free
        if free_bytes < _FREE_BYTES_MIN:
            raise DiskFull(
                f"{self._cache.path} has {free_bytes / 2**30:.1f} GiB free", hint="building needs about 4 GiB"
            )
        if shutil.which("mmdebstrap") is None:
            raise BuildFailed("mmdebstrap is not installed", hint="apt-get install mmdebstrap")
        folder = Path(tempfile.mkdtemp(dir=self._cache.scratch, prefix=f"{recipe.name}-"))
        tree = folder / "tree.tar"
        packages = recipes.all_packages(self._recipes, recipe.name)
        command = [
            *_DIE_TOGETHER,
            "mmdebstrap",
            *_OPTIONS,
            *(f"--aptopt={line}" for line in self._apt_options),
        ]
        command += [f"--include={','.join(packages)}", self._suite, str(tree), *self._archive]
        self._progress(f"{recipe.name}: Debian {self._suite} with {len(packages)} packages named")
        last = self._follow(recipe.name, command, {**os.environ, "TMPDIR": str(folder), "LC_ALL": "C.UTF-8"})
        if last is not None:
            is_full = any("No space left" in line for line in last)
            text = "\n  ".join(["mmdebstrap failed:", *last])
            if is_full:
                raise DiskFull(f"image {recipe.name}: {text}", hint="free some disk space, then try again")
            raise BuildFailed(f"image {recipe.name}: {text}", hint="can this machine `apt-get update`?")
        return tree

    def _follow(self, name: str, command: list[str], env: dict[str, str]) -> list[str] | None:
        """Run a command, pass its steps on as progress, and return its last lines if it failed."""
        last: collections.deque[str] = collections.deque(maxlen=15)
        with subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                last.append(line.rstrip())
                if line.startswith("I: ") and line.rstrip().endswith("..."):
                    self._progress(f"{name}: {line.removeprefix('I: ').strip()}")
        return list(last) if process.returncode != 0 else None

    # --- tools and Python

    def _extra_layer(self, recipe: Recipe, kind: recipes.ExtraLayer) -> Layer:
        if kind == "tools":
            return self._tools(recipe)
        return self._deps() if kind == "deps" else self._code()

    def _tools(self, recipe: Recipe) -> Layer:
        what = f"{recipe.name} tools"
        wheels = msgspec.json.encode(recipe.wheels, order="deterministic").decode()
        key = f"tools-{recipes.key_of('tools', os.uname().machine, wheels)}"

        def make(target: Path) -> Layer:
            self._progress(f"{what}: fetching {', '.join(wheel.requirement for wheel in recipe.wheels)}")
            found = [pythonlayers.wheel_files(wheel, self._cache.scratch) for wheel in recipe.wheels]
            return layertar.from_files((file for files in found for file in files), target)

        return self._layer(what, key, make)

    def _deps(self) -> Layer:
        self._check_python()
        distributions = pythonlayers.deps()
        versions = [f"{each.name}=={each.version}" for each in distributions]
        key = f"deps-{recipes.key_of('deps', pythonlayers.PYTHON_VERSION, os.uname().machine, *versions)}"

        def make(target: Path) -> Layer:
            self._progress(f"deps: compiling {len(versions)} Python distributions")
            return layertar.from_files(pythonlayers.compiled(pythonlayers.deps_files(distributions)), target)

        return self._layer("deps", key, make)

    def _code(self) -> Layer:
        self._check_python()
        files = pythonlayers.code_files(self._code_root)
        key = f"code-{recipes.key_of('code', pythonlayers.PYTHON_VERSION, pythonlayers.hash_of(files))}"
        return self._layer(
            "code", key, lambda target: layertar.from_files(pythonlayers.compiled(files), target), can_age=False
        )

    def _check_python(self) -> None:
        """Compare with the machine's own Python, which is that of the image: both are of the same Debian release."""
        debians = Path("/usr/bin/python3").resolve().name.removeprefix("python")
        if debians != pythonlayers.PYTHON_VERSION:
            raise BuildFailed(
                f"this is Python {pythonlayers.PYTHON_VERSION}, Debian's is {debians or 'missing'}",
                hint="run hostd with /usr/bin/python3, e.g. from a venv made with it",
            )
