"""Key files: private from the first byte, and read only if they are."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from export.keys import KeyFileError, load_private_key, new_key, read_public_key

# RFC 8410, section 4: what stands before the 32 bytes of an Ed25519 key in DER.
SPKI_PREFIX = bytes.fromhex("302a300506032b6570032100")
NOT_ED25519 = generate_private_key(SECP256R1())


def no_passphrase() -> str:
    """Asked for a passphrase where none is needed."""
    raise AssertionError("nobody should ask")


def mode_of(path: Path) -> int:
    """Its permissions."""
    return stat.S_IMODE(path.stat().st_mode)


def test_a_new_pair_belongs_together(tmp_path: Path) -> None:
    """The public file is that of the private one, in the form of RFC 8410."""
    private_path, public_path = new_key("ci", tmp_path / "made")
    raw = read_public_key(public_path.read_bytes())
    key = load_private_key(private_path, no_passphrase).public_key()

    assert (private_path.name, public_path.name) == ("ci.key", "ci.pub")
    assert key.public_bytes_raw() == raw
    der = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    assert der == SPKI_PREFIX + raw


def test_two_keys_are_two(tmp_path: Path) -> None:
    """Chance is the system's."""
    one, other = (read_public_key(new_key(n, tmp_path)[1].read_bytes()) for n in ("a", "b"))

    assert one != other


def test_a_private_key_is_private_from_its_first_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the umask says: no moment in which others could open it."""
    modes: list[int] = []
    fdopen = os.fdopen

    def spy(descriptor: int, how: str) -> object:
        modes.append(stat.S_IMODE(os.fstat(descriptor).st_mode))
        assert os.fstat(descriptor).st_size == 0
        return fdopen(descriptor, how)

    monkeypatch.setattr(os, "fdopen", spy)
    before = os.umask(0)
    try:
        private_path, _ = new_key("ci", tmp_path)
    finally:
        os.umask(before)

    assert modes[0] == mode_of(private_path) == 0o600


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o610, 0o620, 0o602, 0o644, 0o660])
def test_a_private_key_that_others_can_reach_is_not_used(tmp_path: Path, mode: int) -> None:
    """Who can read it can sign; who can write it can put his own in its place."""
    private_path, _ = new_key("ci", tmp_path)
    private_path.chmod(mode)

    with pytest.raises(KeyFileError, match=f"has mode {mode:04o}: others can .* Expected 0600"):
        load_private_key(private_path, no_passphrase)


def test_a_passphrase_encrypts_the_key(tmp_path: Path) -> None:
    """It opens with this passphrase and with no other."""
    words = "open sesame é"
    private_path, public_path = new_key("ci", tmp_path, passphrase=words)
    key = load_private_key(private_path, lambda: words)

    assert b"BEGIN ENCRYPTED PRIVATE KEY" in private_path.read_bytes()
    assert key.public_key().public_bytes_raw() == read_public_key(public_path.read_bytes())
    with pytest.raises(KeyFileError, match="or the passphrase is another"):
        load_private_key(private_path, lambda: "sesam")


@pytest.mark.parametrize("there", ["ci.key", "ci.pub"])
def test_no_key_is_written_over(tmp_path: Path, there: str) -> None:
    """Nothing is written at all then."""
    (tmp_path / there).write_text("precious")

    with pytest.raises(KeyFileError, match="is there already"):
        new_key("ci", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [there]
    assert (tmp_path / there).read_text() == "precious"


@pytest.mark.parametrize("name", ["", "../ci", "a/b", ".ci", "a b", "é", "a" * 64, "ci\n"])
def test_a_name_that_is_none_is_refused(tmp_path: Path, name: str) -> None:
    """No key lands in another folder."""
    with pytest.raises(KeyFileError, match="cannot be a key's name"):
        new_key(name, tmp_path / "keys")
    assert not (tmp_path / "keys").exists()


def test_a_file_that_is_no_private_key_says_so(tmp_path: Path) -> None:
    """Something else, another kind of key, or nothing."""
    path = tmp_path / "some.key"
    with pytest.raises(FileNotFoundError, match="There is no key at"):
        load_private_key(path, no_passphrase)
    path.touch(0o600)
    with pytest.raises(KeyFileError, match="is no private key in PEM form\\."):
        load_private_key(path, no_passphrase)
    path.write_bytes(NOT_ED25519.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    with pytest.raises(KeyFileError, match="is not an Ed25519 key"):
        load_private_key(path, no_passphrase)


def test_a_public_key_that_is_none_says_so(tmp_path: Path) -> None:
    """A private one too: it is not to be sent."""
    private_path, _ = new_key("ci", tmp_path)
    for data in (b"", b"ssh-ed25519 AAAA", private_path.read_bytes()):
        with pytest.raises(KeyFileError, match="no public key in PEM form"):
            read_public_key(data)
    other = NOT_ED25519.public_key()
    with pytest.raises(KeyFileError, match="not an Ed25519 key"):
        read_public_key(other.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
