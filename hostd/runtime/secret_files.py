"""Gives a job files that never lie on a disk: a small tmpfs that hostd writes and the job finds read-only.

The content takes no other way: not through the plan, the spawner, an argument or the environment. The tmpfs hangs
nowhere on the host; it goes with the job's last process and hostd's last fd of it, whoever crashes. Called by
`hostd.runtime.files`; `check` by `hostd.admission`. Refuses more than `BYTES_MAX` together and paths that lead
elsewhere.

Source: tmpfs(5), `noswap` in Documentation/filesystems/tmpfs.rst (Linux 6.4; older kernels may swap it out).
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import os
import posixpath
from collections.abc import Sequence

from hostd.errors import InvalidSpec
from hostd.types import SecretFile
from netns import syscalls
from netns.errors import KernelError
from rootfs import mounts
from rootfs.errors import NameInvalid
from rootfs.mounts import Bind

FOLDER = "/run/secrets"
BYTES_MAX = 1024 * 1024
_COUNT_MAX = 64
_ID_MAX = 65535
_FOLDER_MODE = 0o755  # whatever the daemon's umask
_SIZE = "4m"  # whole pages, and directories
_IN_FOLDER, _ELSEWHERE = "folder", "file-{}"
_ATTRIBUTES = syscalls.MOUNT_ATTR_NOSUID | syscalls.MOUNT_ATTR_NODEV | syscalls.MOUNT_ATTR_NOEXEC


def path_of(secret: SecretFile) -> str:
    """Return where the job finds it; a plain name is one below `FOLDER`."""
    return secret.path if secret.path.startswith("/") else f"{FOLDER}/{secret.path}"


def content_of(secret: SecretFile) -> bytes:
    """Return its bytes.

    Raises:
        InvalidSpec: `content_base64` is none.
    """
    if not secret.content_base64:
        return secret.content.encode()
    try:
        return base64.b64decode(secret.content_base64, validate=True)
    except binascii.Error:
        raise _refusal(secret, "content_base64 is not base64") from None


def check(secrets: Sequence[SecretFile]) -> None:
    """Check all that can be known of a job's secrets; no message shows any content.

    Raises:
        InvalidSpec: says which one by its path, and why.
    """
    if len(secrets) > _COUNT_MAX:
        raise InvalidSpec(f"{len(secrets)} secrets", hint=f"at most {_COUNT_MAX}", field="secrets")
    total, paths = 0, set()
    for secret in secrets:
        try:
            path = mounts.check_target(path_of(secret))
        except NameInvalid as error:
            raise InvalidSpec(str(error), hint=error.hint, field="secrets.path") from error
        if path in paths or path == FOLDER:
            raise _refusal(secret, "each path once")
        paths.add(path)
        if secret.content and secret.content_base64:
            raise _refusal(secret, "content or content_base64, not both")
        if not (0 <= secret.mode <= 0o777 and 0 <= secret.uid <= _ID_MAX and 0 <= secret.gid <= _ID_MAX):
            raise _refusal(secret, "a mode up to 0777, owners up to 65535")
        total += len(content_of(secret))
    if total > BYTES_MAX:
        raise InvalidSpec(f"secrets of {total} bytes", hint=f"at most {BYTES_MAX} together", field="secrets")
    for path in paths:
        if any(other.startswith(path + "/") for other in paths):
            raise InvalidSpec(f"secret {path!r} would have to be a directory as well", field="secrets.path")


def _refusal(secret: SecretFile, why: str) -> InvalidSpec:
    return InvalidSpec(f"secret {secret.path[:100]!r}: {why}", field="secrets")


def make(secrets: Sequence[SecretFile], uid_base: int) -> int:
    """Return an fd of a mount that holds them, owned as the job with this range of ids sees it."""
    mount = _mount()
    try:
        os.chown(".", uid_base, uid_base, dir_fd=mount)
        for index, secret in enumerate(secrets):
            _write(mount, _inner_path(index, secret), secret, uid_base)
    except BaseException:
        os.close(mount)
        raise
    return mount


def binds(secrets: Sequence[SecretFile], place: str) -> list[Bind]:
    """Say what to bind where, once the mount hangs on `place`."""
    found, has_folder = [], False
    for index, secret in enumerate(secrets):
        inner = _inner_path(index, secret)
        if inner.startswith(_IN_FOLDER + "/"):
            has_folder = True
            continue
        source = f"{place}/{inner}"
        found.append(
            Bind(source=source, target=path_of(secret), is_read_only=True, is_file=True, flags=mounts.MS_NOEXEC)
        )
    if has_folder:
        source = f"{place}/{_IN_FOLDER}"
        found.append(Bind(source=source, target=FOLDER, is_read_only=True, flags=mounts.MS_NOEXEC))
    return found


def _inner_path(index: int, secret: SecretFile) -> str:
    path = path_of(secret)
    if path.startswith(FOLDER + "/"):
        return _IN_FOLDER + path.removeprefix(FOLDER)
    return _ELSEWHERE.format(index)


def _mount() -> int:
    try:
        return _mount_with("noswap")
    except KernelError:
        return _mount_with("")


def _mount_with(option: str) -> int:
    configured = syscalls.fsopen("tmpfs")
    try:
        syscalls.fsconfig(configured, "size", _SIZE)
        syscalls.fsconfig(configured, "mode", "0755")
        if option:
            syscalls.fsconfig(configured, option)
        syscalls.fsconfig_create(configured)
        return syscalls.fsmount(configured, _ATTRIBUTES)
    finally:
        os.close(configured)


def _write(mount: int, path: str, secret: SecretFile, uid_base: int) -> None:
    made = ""
    for part in filter(None, posixpath.dirname(path).split("/")):
        made = posixpath.join(made, part)
        with contextlib.suppress(FileExistsError):
            os.mkdir(made, dir_fd=mount)
        os.chmod(made, _FOLDER_MODE, dir_fd=mount)
        os.chown(made, uid_base, uid_base, dir_fd=mount)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=mount)
    with os.fdopen(fd, "wb") as file:
        file.write(content_of(secret))
        os.fchown(fd, uid_base + secret.uid, uid_base + secret.gid)
        os.fchmod(fd, secret.mode)
