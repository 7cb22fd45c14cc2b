"""Small changes that a parser does not like: of bytes, of JSON, of tars (with their checksums put right again)."""

from __future__ import annotations

import gzip
import json
import random
from typing import Any

import zstandard

NUMBERS = (0, 1, -1, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, -(2**63), 10**30, 0.5, 1e308, 65536, 16 * 2**30)
TEXTS = (
    "", "/", "..", "../../etc/passwd", "/etc/passwd", "\0", "a\0b", "x" * 300, "x" * 5000, "é" * 100, "\ud800", "💥",
    "sha256:" + "0" * 64, "sha512:" + "0" * 128, ".wh.x", ".wh..wh..opq", "%s%n", "-1", "65536:65536", " ", "\n",
)  # fmt: skip
VALUES: tuple[Any, ...] = (None, True, False, [], {}, [[]], *NUMBERS, *TEXTS)


def of_bytes(data: bytes, dice: random.Random) -> bytes:
    out = bytearray(data)
    at = dice.randrange(len(out) + 1)
    kind = dice.randrange(7)
    if kind == 0 and out:
        out[at % len(out)] ^= 1 << dice.randrange(8)
    elif kind == 1 and out:
        out[at % len(out)] = dice.choice((0, 1, 0x7F, 0x80, 0xFF, dice.randrange(256)))
    elif kind == 2:
        out[at:at] = dice.randbytes(dice.randrange(1, 9))
    elif kind == 3:
        del out[at : at + dice.choice((1, 2, 8, 64, 512))]
    elif kind == 4:
        del out[at:]
    elif kind == 5:
        length = dice.choice((1, 8, 64, 512, 1024))
        start = dice.randrange(len(out) + 1)
        out[at:at] = out[start : start + length]
    else:
        out[at : at + 4] = dice.choice((b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"0000"))
    return bytes(out)


def of_json(value: Any, dice: random.Random) -> Any:
    """Return a copy with one thing changed somewhere."""
    if isinstance(value, dict) and value and dice.random() < 0.8:
        key = dice.choice(list(value))
        copy = dict(value)
        kind = dice.randrange(8)
        if kind == 0:
            del copy[key]
        elif kind == 1:
            copy[dice.choice(TEXTS)] = copy[key]
        elif kind == 2:
            copy[key] = copy[dice.choice(list(value))]
        else:
            copy[key] = of_json(copy[key], dice)
        return copy
    if isinstance(value, list) and value and dice.random() < 0.85:
        copy_list = list(value)
        at = dice.randrange(len(value))
        kind = dice.randrange(8)
        if kind == 0:
            del copy_list[at]
        elif kind == 1:
            copy_list.insert(at, copy_list[dice.randrange(len(value))])
        elif kind == 2:
            copy_list = copy_list * dice.choice((2, 3, 50))
        else:
            copy_list[at] = of_json(copy_list[at], dice)
        return copy_list
    if isinstance(value, str) and value and dice.random() < 0.5:
        return of_bytes(value.encode("utf-8", "surrogatepass"), dice).decode("utf-8", "replace")
    if isinstance(value, int) and dice.random() < 0.4:
        return value + dice.choice((-1, 1, 1000, -1000))
    if dice.random() < 0.03:
        deep: Any = value
        for _ in range(dice.choice((5, 500, 5000))):
            deep = [deep]
        return deep
    if dice.random() < 0.6:  # of another type it hardly comes past the decoder
        alike = [each for each in VALUES if type(each) is type(value)]
        return dice.choice(alike or VALUES)
    return dice.choice(VALUES)


def of_json_text(data: bytes, dice: random.Random) -> bytes:
    try:
        return dump(of_json(json.loads(data), dice))
    except (ValueError, RecursionError):
        return of_bytes(data, dice)


def dump(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


_FIELDS = {"name": (0, 100), "mode": (100, 108), "uid": (108, 116), "gid": (116, 124), "size": (124, 136)} | {
    "mtime": (136, 148), "type": (156, 157), "link": (157, 257), "magic": (257, 265), "major": (329, 337), "prefix": (345, 500)
}  # fmt: skip
_NAMES = (
    b"../x",
    b"/etc/x",
    b"a",
    b"a/b",
    b"a/../../x",
    b".wh.a",
    b".wh..wh..opq",
    b"./",
    b"",
    b"x" * 100,
    b"\xff\xfe",
)
_LINKS = (b"/", b"..", b"a", b"a/b", b"../../..", b"", b"/etc/passwd", b"x" * 100)
_TYPES = b"0123456789gxLKSDVNM\0AXZ"
_SIZES = (
    b"00000000000\0", b"00000000001\0", b"00000001000\0", b"77777777777\0", b"\x80" + b"\0" * 10 + b"\x01",
    b"\xff" * 12, b"\x80" + b"\xff" * 11, b"-0000000001\0",
)  # fmt: skip
_PAX = (
    b"path=../x", b"path=" + b"d/" * 2000, b"linkpath=/etc", b"size=-1", b"size=99999999999999", b"uid=-1", b"mtime=nan",
    b"mtime=1e999", b"GNU.sparse.major=1", b"GNU.sparse.map=0,1,0,5", b"SCHILY.xattr.trusted.overlay.redirect=/etc",
    b"SCHILY.xattr.user.a=b", b"SCHILY.xattr.security.capability=x", b"hdrcharset=BINARY", b"path=\xff\xfe", b"=", b"x",
)  # fmt: skip


def of_tar(data: bytes, dice: random.Random) -> bytes:
    """Change a tar, packed or not, and pack it again."""
    if dice.random() < 0.15:
        return of_bytes(data, dice)
    how, plain = _plain(data)
    plain = _of_plain_tar(plain, dice)
    if dice.random() < 0.1:
        how = dice.choice(("plain", "gzip", "zstd"))
    if how == "gzip":
        return gzip.compress(plain, 1, mtime=0)
    return zstandard.ZstdCompressor().compress(plain) if how == "zstd" else plain


def _plain(data: bytes) -> tuple[str, bytes]:
    try:
        if data[:2] == b"\x1f\x8b":
            return "gzip", gzip.decompress(data)[: 1 << 20]
        if data[:4] == b"\x28\xb5\x2f\xfd":
            return "zstd", zstandard.ZstdDecompressor().decompress(data, max_output_size=1 << 20)
    except Exception:
        pass
    return "plain", data


def _of_plain_tar(data: bytes, dice: random.Random) -> bytes:
    blocks = [data[at : at + 512] for at in range(0, len(data), 512)]
    heads = [at for at, block in enumerate(blocks) if len(block) == 512 and block[257:262] == b"ustar"]
    if not heads:
        return of_bytes(data, dice)
    at = dice.choice(heads)
    kind = dice.randrange(8)
    if kind < 4:
        blocks[at] = _of_header(blocks[at], dice)
    elif kind == 4:
        blocks[at:at] = _pax_member(dice)
    elif kind == 5:
        other = dice.choice(heads)
        blocks[at:at] = blocks[other : other + dice.choice((1, 2, 3))]
    elif kind == 6:
        del blocks[at : at + dice.choice((1, 2))]
    else:
        blocks[at] = of_bytes(blocks[at], dice)
    return b"".join(blocks)


def _of_header(block: bytes, dice: random.Random) -> bytes:
    name = dice.choice(list(_FIELDS))
    start, end = _FIELDS[name]
    if name in ("name", "prefix"):
        value = dice.choice(_NAMES)
    elif name == "link":
        value = dice.choice(_LINKS)
    elif name == "type":
        value = bytes((dice.choice(_TYPES),))
    else:
        value = dice.choice(_SIZES) if dice.random() < 0.7 else dice.randbytes(end - start)
    out = bytearray(block)
    out[start:end] = value[: end - start].ljust(end - start, b"\0")
    return summed(out)


def summed(block: bytearray) -> bytes:
    """Put a header's checksum right."""
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % (sum(block) & 0o777777)
    return bytes(block)


def _pax_member(dice: random.Random) -> list[bytes]:
    records = b""
    for _ in range(dice.choice((1, 2, 5))):
        body = b" " + dice.choice(_PAX) + b"\n"
        length = len(body) + 1
        while len(str(length)) + len(body) != length:
            length = len(str(length)) + len(body)
        records += str(length).encode() + body
    head = bytearray(512)
    head[0:3] = b"pax"
    head[100:108], head[108:116], head[116:124] = (b"0000644\0",) * 3
    head[124:136] = b"%011o\0" % len(records)
    head[136:148] = b"00000000000\0"
    head[156:157] = dice.choice((b"x", b"g", b"L", b"K"))
    head[257:265] = b"ustar\00000"
    return [summed(head), *(records[at : at + 512].ljust(512, b"\0") for at in range(0, len(records), 512))]
