"""Removes whole trees that strangers made, however deep or odd they are.

`shutil.rmtree` needs a stack frame and an open file per level: a job that nests a thousand directories would
break the daemon that cleans up after it. Here what lies deeper than a few levels is moved up to the top before it is
emptied, so that few files are open at any depth and no path is long. Follows no symlink. Blocking; called by `layers`
and by hostd.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path

OnError = Callable[[str, OSError], None]
_LEVELS = 8  # most trees are no deeper
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def remove_tree(path: Path, on_error: OnError | None = None) -> None:
    """Remove `path` and all that is in it; one that is not there is fine.

    With `on_error` what cannot be removed is told to it and stays; without, it is raised.

    Raises:
        OSError: something cannot be removed, and there is no `on_error`.
    """
    tell = on_error or _raise
    try:
        kind = path.lstat().st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        return tell(str(path), error)
    try:
        if not stat.S_ISDIR(kind):
            path.unlink(missing_ok=True)
            return
        top = os.open(path, _FOLDER)
    except OSError as error:
        return tell(str(path), error)
    try:
        _empty(top, tell)
    finally:
        os.close(top)
    try:
        path.rmdir()
    except FileNotFoundError:
        pass
    except OSError as error:
        tell(str(path), error)


def _raise(_: str, error: OSError) -> None:
    raise error


def _empty(top: int, tell: OnError) -> None:
    """Empty the directory `top`; what the easy way leaves goes one by one, each after its directories moved here."""
    if _is_emptied(top, _LEVELS):
        return
    mark, count = secrets.token_hex(8), 0  # nobody can have taken such a name
    waiting = _remove_files(top, tell)
    while waiting:
        name = waiting.pop()
        try:
            folder = os.open(name, _FOLDER, dir_fd=top)
        except FileNotFoundError:
            continue
        except OSError as error:
            tell(name, error)
            continue
        try:
            for inner in _remove_files(folder, tell):
                count += 1
                moved = f".{mark}-{count}"
                try:
                    os.rename(inner, moved, src_dir_fd=folder, dst_dir_fd=top)
                    waiting.append(moved)
                except OSError as error:
                    tell(inner, error)
        finally:
            os.close(folder)
        try:
            os.rmdir(name, dir_fd=top)
        except OSError as error:
            tell(name, error)


def _is_emptied(folder: int, levels: int) -> bool:
    """Remove all that can be removed without ado, to so many levels; tell whether that was everything."""
    is_all = True
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                try:
                    if not entry.is_dir(follow_symlinks=False):
                        os.unlink(entry.name, dir_fd=folder)
                    elif not _is_removed(entry.name, folder, levels):
                        is_all = False
                except OSError:
                    is_all = False
    except OSError:
        return False
    return is_all


def _is_removed(name: str, folder: int, levels: int) -> bool:
    with contextlib.suppress(OSError):
        os.rmdir(name, dir_fd=folder)  # most of what a short job leaves behind is empty
        return True
    if levels == 0:
        return False
    try:
        inner = os.open(name, _FOLDER, dir_fd=folder)
        try:
            is_empty = _is_emptied(inner, levels - 1)
        finally:
            os.close(inner)
        if is_empty:
            os.rmdir(name, dir_fd=folder)
    except OSError:
        return False
    return is_empty


def _remove_files(folder: int, tell: OnError) -> list[str]:
    """Remove what is no directory and return the names of what is."""
    folders = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                try:
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.name)
                    else:
                        os.unlink(entry.name, dir_fd=folder)
                except FileNotFoundError:
                    pass
                except OSError as error:
                    tell(entry.name, error)
    except OSError as error:
        tell("", error)
    return folders
