"""What people may ask for, without a store."""

from __future__ import annotations

import base64
import hashlib

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from hypothesis import given
from hypothesis import strategies as st

from controller import admit
from controller.auth import Doorkeeper, parse_keys, password_of
from controller.types import parse_app_name
from discovery.wire.errors import Invalid, Unauthorized

KEY = "k" * 32


@pytest.mark.parametrize(
    "private",
    [
        ed25519.Ed25519PrivateKey.generate(),
        rsa.generate_private_key(65537, 2048),
        ec.generate_private_key(ec.SECP256R1()),
    ],
    ids=["ed25519", "rsa", "ecdsa"],
)
def test_every_usual_kind_of_key_is_read_with_opensshs_fingerprints(private: ed25519.Ed25519PrivateKey) -> None:
    formats = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    line = private.public_key().public_bytes(*formats).decode()
    key = admit.ssh_key(line + " me@laptop\n", 5.0)
    blob = base64.b64decode(line.split()[1])
    assert key.fingerprint.replace(":", "") == hashlib.md5(blob).hexdigest()
    assert key.sha256 == "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")
    assert (key.public_key, key.comment, key.created_at) == (line, "me@laptop", 5.0)


@given(st.text())
def test_any_other_text_is_refused_not_crashed_on(text: str) -> None:
    with pytest.raises(Invalid):
        admit.ssh_key(text, 0)


@given(st.binary())
def test_any_blob_under_a_known_type_is_refused_or_read(blob: bytes) -> None:
    try:
        admit.ssh_key("ssh-ed25519 " + base64.b64encode(blob).decode(), 0)
    except Invalid:
        pass


def test_made_up_names_are_names() -> None:
    for _ in range(50):
        assert parse_app_name(admit.made_up_name())


def test_the_door_opens_to_each_key_and_to_nothing_else() -> None:
    door = Doorkeeper(parse_keys(f"{KEY},{'l' * 32}"))

    def header(password: str, user: str = "") -> str:
        return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()

    assert door.identify(header(KEY)) != door.identify(header("l" * 32, user="any"))
    for wrong in ("", "Basic", "Basic !!!", "Bearer " + KEY, header(""), header(KEY[:-1]), header(KEY + "x")):
        with pytest.raises(Unauthorized):
            door.identify(wrong)
    assert KEY not in door.identify(header(KEY))


@pytest.mark.parametrize("text", ["", ",", "short"])
def test_a_controller_without_a_good_key_does_not_start(text: str) -> None:
    with pytest.raises(Invalid):
        parse_keys(text)


@given(st.text())
def test_no_header_breaks_the_door(header: str) -> None:
    password_of(header)
