"""The first process of every job's pid namespace, as a program: `init.c`, compiled, for the machines that we know.

Others have tini, whose command line is the same. Called by `files`, which puts it where every job's root has it. It is
kept here as bytes because a host has no compiler; a test compiles the source again and compares, and tries both.

After a change of `init.c`: `python -m hostd.runtime.init < init.c`, and put what it prints here.
"""

from __future__ import annotations

import base64
import os
import struct
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

from discovery.wire.errors import Unavailable

TINI = Path("/usr/bin/tini-static")
COMPILER: tuple[str, ...] = (
    *("gcc", "-Os", "-static", "-nostdlib", "-ffreestanding", "-fno-stack-protector", "-fno-pic", "-no-pie"),
    *("-fno-asynchronous-unwind-tables", "-fcf-protection=none", "-fno-ident"),
    *("-Wl,--build-id=none,-z,noseparate-code,-z,noexecstack,-s", "-x", "c", "-"),
)
_SECTIONS_AT, _PROGRAM_HEADERS_AT = 0x28, 0x20

IMAGES = {
    "x86_64": """
f0VMRgIBAQAAAAAAAAAAAAIAPgABAAAAsABAAAAAAABAAAAAAAAAAAAAAAAAAAAAAAAAAEAAOAACAAAAAAAAAAEAAAAFAAAAAAAAAAAAAAAAAE
AAAAAAAAAAQAAAAAAAGwUAAAAAAAAbBQAAAAAAAAAQAAAAAAAAUeV0ZAYAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA
AAAAEAAAAAAAAAAx7UiJ50iD5PDosQEAAEiJ/jHSgDwWAHQFSP/C6/VFMdK4AQAAAL8CAAAADwXDQVdJifhIifJBVkFVQVRVU0iB7IgPAABIiz
9IifiKCITJdEmA+S91P0G5OwAAAEUx0kyJxkyJyA8FSIP4+A+FPAEAAEmLGEmNcPhJiThMichJx0D4mQRAAL+ZBEAADwVJiRjpGAEAAEj/wOux
SInQTIsITYXJdE1BgDlQdUFBgHkBQXU6QYB5AlR1M0GAeQNIdSxBgHkEPXUlSYPBBUjHw/7///9IjWwkiEG8OwAAAEG+mQRAAE2NaPjpmAAAAE
iDwAjrq0G5CgVAAOvRgPk6dBlIPf8PAAB3B4hMBIhI/8BJ/8FBigmEyXXiSI1I/0iB+f4PAAB3CMZEBIgvSP/ASYsISCnBSD3/DwAAdk2AfASH
AHVmRTHSTIngSInvTInGDwVIg/j4dRxNizhMieBJiShMifdJx0D4mQRAAEyJ7g8FTYk4SIP483UkQYA5AHQvSf/BSInDMcDriUj/wECKdAH/QI
h0BIdAhPZ1meufSIP4/nQGSIP47HUFSInY68tIgcSIDwAAW11BXEFdQV5BX8NBV7oIAAAAMcBBVkiJ0UFVQVRVSIn9U0iD7EBMiw9Ix0QkEAf7
/79IjXwkIPOrMcCJRCQISYP5An8TSInKRTHSuOcAAABIic9Iic4PBUUx9kG6CAAAALgNAAAAvxEAAABIjXQkIEyJ8g8FQbwCAAAATI1sJBhBuA
4AAABMicBMiedIjXQkEEyJ6g8FuzgAAABFMdK/EUEAAEyJ9kiJ2EyJ8g8FSInDSIXAD4WkAAAAuCcAAABIid9Iid5IidoPBYlEJAy4bQAAAA8F
uBAAAABIjVQkDL4QVAAADwVBuggAAABMicBMiedMie5IidoPBUqNdM0QSI19GOhy/f//v6EEQABJicDoRf3//0iLfRjoPP3//0mD+P51Eb+pBE
AA6Cz9//+/fwAAAOsav/UEQABJg/jzdAW/2wRAAOgQ/f//v34AAAAx0kUx0rjnAAAASInW6x95H78LBUAA6PD8//9FMdK45wAAAEyJ9r9+AAAA
TInyDwVFMcC9gAAAAEG/PgAAAEmDzf9BvgEAAABBvD0AAAAx9kG6CAAAAEiNfCQQSInoSInyDwVJicFIhcB+HkiD+BF0GEiNQOtIg/gBdg5FMd
JMifhIid9Mic4PBUUxyUUx0kyJ4EyJ70yJ8kiNdCQIDwVIhcB+JUg5w3Xji0QkCInCg+J/RI2CgAAAAHUGD7bEQYnAQbkBAAAA68NFhcl0gElj
+EG45wAAADHSRTHSTInASInWDwXr8S9iaW4vc2gAZXhlYzogIgAiOiBubyBzdWNoIGZpbGUgb3IgZGlyZWN0b3J5LCBvciBpdHMgaW50ZXJwcm
V0ZXIKACI6IGl0IGNhbm5vdCBiZSBleGVjdXRlZAoAIjogcGVybWlzc2lvbiBkZW5pZWQKAGNsb25lOiByZWZ1c2VkCgA=
    """,
}
"""By machine, in base64."""


def program(path: Path | None = None) -> bytes:
    """Return the program, an ELF file; with `path` the one that is there, in the place of ours.

    Raises:
        Unavailable: there is none for this machine, and no tini.
    """
    text = IMAGES.get(os.uname().machine)
    if path is None and text is not None:
        return base64.b64decode("".join(text.split()))
    path = path or TINI
    if not path.is_file():
        raise Unavailable(f"{path} is missing, jobs need it as their init", hint="apt-get install tini", retry=False)
    return path.read_bytes()


def compiled(source: bytes) -> bytes:
    """Return what the compiler of this machine makes of the source, without all that the kernel does not read.

    Raises:
        FileNotFoundError, CalledProcessError: there is no compiler, or it refuses.
    """
    with tempfile.TemporaryDirectory(prefix="hostd-init-") as folder:
        path = Path(folder) / "init"
        subprocess.run([*COMPILER, "-o", str(path)], input=source, check=True)
        elf = bytearray(path.read_bytes())
    (headers_at,) = struct.unpack_from("=Q", elf, _PROGRAM_HEADERS_AT)
    size, count = struct.unpack_from("=HH", elf, 0x36)
    segments = [struct.unpack_from("=IIQQQQQQ", elf, headers_at + size * index) for index in range(count)]
    del elf[max(offset + length for _, _, offset, _, _, length, _, _ in segments) :]
    struct.pack_into("=Q", elf, _SECTIONS_AT, 0)
    struct.pack_into("=HHH", elf, 0x3A, 0, 0, 0)
    return bytes(elf)


if __name__ == "__main__":
    sys.stdout.write(textwrap.fill(base64.b64encode(compiled(sys.stdin.buffer.read())).decode(), 110) + "\n")
