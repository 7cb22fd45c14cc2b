"""Puts the runner into a slug: `/app/.hostd/start`, which every process of the app goes through.

The runner reads what the buildpack left in `.profile.d`, then becomes the command of a process type
(`start web`) or any command (`start -- node -e 1`). It finds its app by its own path. Called by
`compile`; standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

RUNNER = """\
#!/bin/sh
# Becomes a process of this app, with the environment that its buildpack prepared.
# usage: start TYPE | start -- COMMAND [ARGUMENT...]
[ -n "${BASH_VERSION-}" ] && [ -z "${POSIXLY_CORRECT-}" ] || {
    unset POSIXLY_CORRECT
    exec /bin/bash "$0" "$@"
}
app=$(cd "${0%/*}/.." && pwd) || exit 1
export HOME=$app
cd "$app" || exit 1
wanted=("$@")
shopt -s nullglob
for profile in "$app"/.profile.d/*.sh "$app"/.profile; do
    [ ! -f "$profile" ] || . "$profile"
done
shopt -u nullglob
cd "$app" || exit 1
if [ "${wanted[0]-}" = -- ]; then
    [ "${#wanted[@]}" -gt 1 ] || { echo "usage: start -- COMMAND [ARGUMENT...]" >&2; exit 64; }
    exec "${wanted[@]:1}"
fi
file=$app/.hostd/processes/${wanted[0]-}
if [ "${#wanted[@]}" -ne 1 ] || [[ ${wanted[0]} == */* ]] || [ ! -f "$file" ]; then
    echo "hostd: this release has no process type '${wanted[0]-}'; it has:" $(ls "$app/.hostd/processes") >&2
    exit 127
fi
exec /bin/bash -c "$(cat "$file")"
"""


def install(app: Path, processes: Mapping[str, str]) -> None:
    """Write the runner and the command of each process type into the app's `.hostd`."""
    folder = app / ".hostd" / "processes"
    folder.mkdir(parents=True, exist_ok=True)
    for name, command in processes.items():
        (folder / name).write_text(command + "\n", encoding="utf-8")
    runner = app / ".hostd" / "start"
    runner.write_text(RUNNER, encoding="utf-8")
    runner.chmod(0o755)
