"""The images of the host's store."""

from __future__ import annotations

import argparse
from typing import Any
from urllib.parse import quote

from discovery.wire.config import add_flags
from discovery.wire.errors import Invalid
from hostd.cli.command import add
from hostd.cli.connect import caller_of, config_of
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

    config = config_of(arguments)
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


def inspect_image(arguments: argparse.Namespace) -> int:
    print_json(caller_of(arguments).request("GET", "/images/" + quote(arguments.name, safe=""), into=Image))
    return 0


def declare(commands: Any) -> None:
    image = commands.add_parser("image", help="list, build and inspect images", description="The host's images.")
    image_commands = image.add_subparsers(metavar="COMMAND", required=True)
    add(image_commands, "list", list_images, "list the images", "hostd image list", has_json=True)
    build = add(image_commands, "build", build_images, "build images (all if none is named)", "hostd image build")
    build.add_argument("name", nargs="*", metavar="NAME")
    build.add_argument("--fresh", action="store_true", help="with the archive's newest packages")
    add_flags(build, SETTINGS)
    inspect = add(image_commands, "inspect", inspect_image, "print an image, as JSON", "hostd image inspect base")
    inspect.add_argument("name", metavar="NAME")
    inspect.add_argument("--json", action="store_true", help="(always)")
