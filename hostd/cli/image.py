"""The images of the host's store."""

from __future__ import annotations

import argparse
import getpass
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from discovery.wire.config import add_flags
from discovery.wire.errors import AlreadyExists, Conflict, Invalid, NotFound, Unauthorized, Unavailable
from hostd.cli.command import add
from hostd.cli.connect import caller_of, local_config
from hostd.cli.output import print_json, print_table
from hostd.config import SETTINGS
from hostd.types import MIB, Image, Pruned


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


def pull_image(arguments: argparse.Namespace) -> int:
    from rootfs import reference as references
    from rootfs.credentials import CredentialsFile
    from rootfs.registry import pull
    from rootfs.store import Store

    config = local_config(arguments)
    with _told():
        reference = references.parse(arguments.reference, config.default_registry)
        _check_insecure(arguments, reference.registry, is_explicit=reference.is_explicit)
        image = pull(
            Store(config.images_dir),
            reference,
            name=arguments.name,
            credentials=CredentialsFile(config.registry_credentials).get(reference.registry),
            is_insecure=arguments.insecure,
            is_replacing=arguments.replace,
            progress=lambda text: print(text, file=sys.stderr, flush=True),
        )
    print(f"{image.name} {image.digest}")
    return 0


def _check_insecure(arguments: argparse.Namespace, registry: str, *, is_explicit: bool) -> None:
    from rootfs.reference import is_loopback

    if arguments.insecure and not (is_explicit or is_loopback(registry)):
        raise Invalid(f"--insecure with {registry}, which was not named", hint="name the registry: REGISTRY/NAME:TAG")


def log_in(arguments: argparse.Namespace) -> int:
    from rootfs.credentials import Credentials, CredentialsFile
    from rootfs.registry import check_login
    from rootfs.store import Store

    config = local_config(arguments)
    password = sys.stdin.readline().rstrip("\n") if arguments.password_stdin else getpass.getpass("Password: ")
    credentials = Credentials(arguments.user, password)
    with _told():
        check_login(Store(config.images_dir), arguments.registry, credentials, is_insecure=arguments.insecure)
        CredentialsFile(config.registry_credentials).set(arguments.registry, credentials)
    print(f"{arguments.registry} knows {arguments.user}")
    return 0


def log_out(arguments: argparse.Namespace) -> int:
    from rootfs.credentials import CredentialsFile

    with _told():
        if not CredentialsFile(local_config(arguments).registry_credentials).remove(arguments.registry):
            raise NotFound(f"nobody is logged in at {arguments.registry}")
    print(f"{arguments.registry} is forgotten")
    return 0


def remove_images(arguments: argparse.Namespace) -> int:
    caller = caller_of(arguments, timeout_s=600.0)
    for name in arguments.name:
        caller.request("DELETE", "/images/" + quote(name, safe=""))
        print(f"{name} removed")
    return 0


def prune_images(arguments: argparse.Namespace) -> int:
    pruned = caller_of(arguments, timeout_s=600.0).request("POST", "/images/prune", into=Pruned)
    if arguments.json:
        print_json(pruned)
    else:
        print(f"{pruned.freed_bytes / MIB:.1f} MiB freed, {pruned.layers} layers removed")
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
    except errors.StoreBusy as error:
        raise Conflict(str(error), hint=error.hint) from error
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
    image = commands.add_parser("image", help="list, build, import, pull, remove", description="The host's images.")
    image_commands = image.add_subparsers(metavar="COMMAND", required=True)
    for name in ("list", "ls"):
        add(image_commands, name, list_images, "list the images", f"hostd image {name}", has_json=True)
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
    get = add(image_commands, "pull", pull_image, "bring an image from a registry", "hostd image pull REGISTRY/app:1.2")
    get.add_argument("reference", metavar="[REGISTRY/]NAME[:TAG|@DIGEST]")
    get.add_argument("--name", default="", metavar="NAME", help="what it is called here (default: NAME-TAG)")
    get.add_argument("--replace", action="store_true", help="even if another image has the name")
    get.add_argument("--insecure", action="store_true", help="plain http; credentials then only to this very machine")
    add_flags(get, SETTINGS)
    login = add(
        image_commands, "login", log_in, "remember who we are at a registry", "hostd image login REGISTRY -u me"
    )
    login.add_argument("registry", metavar="REGISTRY")
    login.add_argument("-u", "--user", required=True, metavar="USER")
    login.add_argument(
        "--password-stdin", action="store_true", help="read the password from stdin, not from the terminal"
    )
    login.add_argument("--insecure", action="store_true", help="plain http, only to this very machine")
    add_flags(login, SETTINGS)
    logout = add(image_commands, "logout", log_out, "forget who we are at a registry", "hostd image logout REGISTRY")
    logout.add_argument("registry", metavar="REGISTRY")
    add_flags(logout, SETTINGS)
    remove = add(image_commands, "rm", remove_images, "remove images that no job uses", "hostd image rm app")
    remove.add_argument("name", nargs="+", metavar="NAME")
    add(
        image_commands,
        "prune",
        prune_images,
        "remove layers that no image and no job needs, and what pulls left",
        "hostd image prune",
        has_json=True,
    )
    inspect = add(image_commands, "inspect", inspect_image, "print an image, as JSON", "hostd image inspect base")
    inspect.add_argument("name", metavar="NAME")
    inspect.add_argument("--json", action="store_true", help="(always)")
