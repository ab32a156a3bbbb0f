"""Keys that sign bundles: Ed25519, in PEM files."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

PRIVATE_SUFFIX = ".key"
PUBLIC_SUFFIX = ".pub"
MAX_KEY_FILE_BYTES = 16 * 2**10
KEY_NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"


class KeyFileError(ValueError):
    """A file that is no key of ours, or a private key that is not kept private."""


def new_key(name: str, folder: Path, *, passphrase: str = "") -> tuple[Path, Path]:
    """Make a pair of keys, `NAME.key` for its owner alone and `NAME.pub` for everybody.

    Args:
        passphrase: Encrypts the private key (PKCS#8 with PBES2); empty: it is not encrypted.

    Returns:
        Where the private and the public key are.

    Raises:
        KeyFileError: the name cannot be one, or there is such a file already.
    """
    if not re.fullmatch(KEY_NAME_PATTERN, name):
        raise KeyFileError(
            f"{name!r} cannot be a key's name; expected letters, digits, '.', '_' and '-'."
        )
    folder.mkdir(parents=True, exist_ok=True)
    private_path, public_path = folder / (name + PRIVATE_SUFFIX), folder / (name + PUBLIC_SUFFIX)
    for path in (private_path, public_path):
        if path.exists():
            raise KeyFileError(f"{path} is there already; a key is never written over.")
    key = Ed25519PrivateKey.generate()
    encryption = BestAvailableEncryption(passphrase.encode()) if passphrase else NoEncryption()
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    _write_new(private_path, private, mode=0o600)
    _write_new(public_path, public, mode=0o644)
    return private_path, public_path


def load_private_key(path: Path, passphrase: Callable[[], str]) -> Ed25519PrivateKey:
    """Read a private key that only its owner can read.

    Args:
        passphrase: Asked for the passphrase if the key is encrypted.

    Raises:
        KeyFileError: others can read it, or it is no such key, or the passphrase is another.
        FileNotFoundError: there is none.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no key at {path}.")
    with path.open("rb") as file:
        mode = os.fstat(file.fileno()).st_mode & 0o777
        if mode & 0o077:
            raise KeyFileError(
                f"{path} has mode {mode:04o}: others can read it or change it. Expected 0600; if "
                "somebody may have read it, make a new key and revoke this one."
            )
        data = file.read(MAX_KEY_FILE_BYTES)
    is_encrypted = b"ENCRYPTED" in data
    words = passphrase().encode() if is_encrypted else None
    try:
        key = load_pem_private_key(data, words)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        hint = " or the passphrase is another" if is_encrypted else ""
        raise KeyFileError(f"{path} is no private key in PEM form{hint}.") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise KeyFileError(f"{path} is not an Ed25519 key; `headstock keys new` makes one.")
    return key


def read_public_key(pem: bytes) -> bytes:
    """The 32 raw bytes of a public key.

    Raises:
        KeyFileError: it is no such key.
    """
    try:
        key = load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise KeyFileError("This is no public key in PEM form; expected a NAME.pub.") from error
    if not isinstance(key, Ed25519PublicKey):
        raise KeyFileError("This public key is not an Ed25519 key; `headstock keys new` makes one.")
    return key.public_bytes_raw()


def _write_new(path: Path, data: bytes, *, mode: int) -> None:
    # Made with its mode, and never through a link: no moment in which others could open it.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
