"""The images of the host's store."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from discovery.wire.config import add_flags
from discovery.wire.errors import AlreadyExists, Invalid, NotFound, Unauthorized, Unavailable
from hostd.cli.command import add
from hostd.cli.connect import caller_of, local_config
from hostd.cli.output import print_json, print_table
from hostd.config import SETTINGS
from hostd.types import MIB, Image


def list_images(arguments: argparse.Namespace) -> int:
    images = caller_of(arguments).request("GET", "/images", into=list[Image])
    if arguments.json:
        print_json(images)
        return 0
    rows = [
        (
            image.name,
            image.digest.removeprefix("sha256:")[:12],
            str(len(image.layers)),
            f"{sum(layer.size_bytes for layer in image.layers) / MIB:.1f} MiB",
        )
        for image in images
    ]
    print_table(("NAME", "DIGEST", "LAYERS", "SIZE"), rows)
    return 0


def build_images(arguments: argparse.Namespace) -> int:
    from rootfs.errors import RootfsError
    from rootfs.images import build_images as build

    config = local_config(arguments)
    try:
        images = build(
            config.images_dir,
            config.cache_dir,
            names=arguments.name or None,
            progress=lambda text: print(text, flush=True),
            is_fresh=arguments.fresh,
        )
    except RootfsError as error:
        raise Invalid(str(error), hint=getattr(error, "hint", "")) from error
    for image in images:
        print(f"{image.name} {image.digest}")
    return 0


def import_images(arguments: argparse.Namespace) -> int:
    from rootfs.intake import import_images as import_them
    from rootfs.store import Store

    store = Store(local_config(arguments).images_dir)
    with _told():
        images = import_them(
            store,
            Path(arguments.path),
            name=arguments.name,
            is_replacing=arguments.replace,
            progress=lambda text: print(text, file=sys.stderr, flush=True),
        )
    for image in images:
        print(f"{image.name} {image.digest}")
    return 0


@contextmanager
def _told() -> Iterator[None]:
    """Say what rootfs refuses in the words that have exit codes."""
    from rootfs import errors

    try:
        yield
    except errors.ImageExists as error:
        raise AlreadyExists(str(error), hint=error.hint) from error
    except (errors.ImageMissing, errors.BlobMissing) as error:
        raise NotFound(str(error), hint=error.hint) from error
    except errors.AccessDenied as error:
        raise Unauthorized(str(error), hint=error.hint) from error
    except (errors.FetchFailed, errors.DiskFull) as error:
        raise Unavailable(str(error), hint=error.hint) from error
    except errors.RootfsError as error:
        raise Invalid(str(error), hint=error.hint) from error
    except PermissionError as error:
        raise Unauthorized(f"only root may change the images: {error}", hint="try again with sudo") from error


def inspect_image(arguments: argparse.Namespace) -> int:
    print_json(caller_of(arguments).request("GET", "/images/" + quote(arguments.name, safe=""), into=Image))
    return 0


def declare(commands: Any) -> None:
    image = commands.add_parser("image", help="list, build, import, inspect", description="The host's images.")
    image_commands = image.add_subparsers(metavar="COMMAND", required=True)
    add(image_commands, "list", list_images, "list the images", "hostd image list", has_json=True)
    build = add(image_commands, "build", build_images, "build images (all if none is named)", "hostd image build")
    build.add_argument("name", nargs="*", metavar="NAME")
    build.add_argument("--fresh", action="store_true", help="with the archive's newest packages")
    add_flags(build, SETTINGS)
    take = add(
        image_commands,
        "import",
        import_images,
        "import an OCI archive or layout directory, or what `docker save` wrote",
        "hostd image import app.tar --name app",
    )
    take.add_argument("path", metavar="FILE|DIR")
    take.add_argument("--name", default="", metavar="NAME", help="what it is called here (default: as it says itself)")
    take.add_argument("--replace", action="store_true", help="even if another image has the name")
    add_flags(take, SETTINGS)
    inspect = add(image_commands, "inspect", inspect_image, "print an image, as JSON", "hostd image inspect base")
    inspect.add_argument("name", metavar="NAME")
    inspect.add_argument("--json", action="store_true", help="(always)")
