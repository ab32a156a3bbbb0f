"""Keys that tests sign with, and how far they are trusted."""

from __future__ import annotations

import base64
from datetime import UTC, datetime
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from export.sign import key_id_of
from serve.trust import KeyChange

NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)


def key_of(seed: int) -> Ed25519PrivateKey:
    """A private key; the same seed makes the same."""
    return Ed25519PrivateKey.from_private_bytes(bytes([seed]) * 32)


def trusting(seed: int, *, name: str = "", **fields: Any) -> KeyChange:
    """Trust in the key of that seed."""
    raw = key_of(seed).public_key().public_bytes_raw()
    return KeyChange(
        key_id=key_id_of(raw),
        public_key=base64.b64encode(raw).decode(),
        name=name or f"key{seed}",
        **fields,
    )


def trusted(*changes: KeyChange) -> dict[str, KeyChange]:
    """Keys by their id, as the log has them."""
    return {change.key_id: change for change in changes}
