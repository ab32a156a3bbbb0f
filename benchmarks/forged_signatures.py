"""Bundles that are whole and whose signature is not what the service asks for."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.forgery import (
    OTHER_TASK,
    Kind,
    Make,
    Stock,
    cut,
    files_of,
    flipped,
    kind,
    soon,
    zipped,
)
from export.bundle import MAX_SIGNATURE_BYTES, SIGNATURE, Bundle
from export.sign import key_id_of


def _by(who: str) -> Make:
    return lambda chance, stock: stock.signed(stock.some(chance), by=who).to_zip()


Edit = Callable[[dict[str, Any], np.random.Generator], object]


def _edited(change: Edit) -> Make:
    """A good envelope whose JSON is changed."""

    def make(chance: np.random.Generator, stock: Stock) -> bytes:
        bundle = stock.signed(stock.some(chance))
        envelope = _envelope(bundle)
        change(envelope, chance)
        return replace(bundle, signature=json.dumps(envelope).encode()).to_zip()

    return make


def _bytes(change: Callable[[bytes, np.random.Generator], bytes]) -> Make:
    """The bytes of a good `signature.json` changed."""

    def make(chance: np.random.Generator, stock: Stock) -> bytes:
        bundle = stock.signed(stock.some(chance))
        assert bundle.signature is not None
        return zipped({**files_of(bundle), SIGNATURE: change(bundle.signature, chance)})

    return make


def _impostor(chance: np.random.Generator, stock: Stock) -> bytes:
    """Signed by an unknown key that gives itself out as a trusted one."""
    bundle = stock.signed(stock.some(chance), by="unknown")
    envelope = _envelope(bundle)
    trusted = stock.keys["trusted"].public_key().public_bytes_raw()
    envelope["signatures"][0]["keyid"] = key_id_of(trusted)
    return replace(bundle, signature=json.dumps(envelope).encode()).to_zip()


def _of_another(chance: np.random.Generator, stock: Stock) -> bytes:
    one, other = stock.two(chance)
    return replace(one, signature=stock.signed(other).signature).to_zip()


def _for_another(chance: np.random.Generator, stock: Stock) -> bytes:
    return stock.signed(stock.some(chance), task=OTHER_TASK).to_zip()


def _at(minutes: Callable[[np.random.Generator], float]) -> Make:
    """Signed so many minutes after now."""
    return lambda chance, stock: stock.signed(
        stock.some(chance), signed_at=soon(stock.now, minutes=minutes(chance))
    ).to_zip()


def _replayed(chance: np.random.Generator, stock: Stock) -> bytes:
    """Properly signed, before the version that is live; or at the same moment."""
    minutes = -float(chance.integers(0, 500_000))
    at = soon(stock.last_signed_at, minutes=minutes)
    return stock.signed(stock.some(chance), signed_at=at).to_zip()


def _unwritten(envelope: dict[str, Any], chance: np.random.Generator) -> None:
    """Another moment in what was signed."""
    statement = json.loads(base64.b64decode(envelope["payload"]))
    year = int(chance.integers(2027, 9999))
    statement["predicate"]["signed_at"] = f"{year}-01-01T00:00:00Z"
    envelope["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()


def _random_sig(envelope: dict[str, Any], chance: np.random.Generator) -> None:
    size = int(chance.choice([0, 32, 63, 64, 64, 64, 65, 128]))
    envelope["signatures"][0]["sig"] = base64.b64encode(chance.bytes(size)).decode()


def _envelope(bundle: Bundle) -> dict[str, Any]:
    assert bundle.signature is not None
    return json.loads(bundle.signature)


FORGED = "it was forged or damaged"
NO_ENVELOPE = "no DSSE envelope"

KINDS: Sequence[Kind] = (
    kind("no signature", "signature", "is not signed", lambda c, s: s.some(c).to_zip()),
    kind("unknown key", "signature", "which nobody has trusted", _by("unknown")),
    kind("revoked key", "signature", "which was revoked", _by("revoked")),
    kind("expired key", "signature", "was trusted until", _by("expired")),
    kind("key for other tasks", "signature", "and not for photos", _by("elsewhere")),
    kind("impostor", "signature", FORGED, _impostor),
    kind("random signature", "signature", FORGED, _edited(_random_sig)),
    kind("another moment than was signed", "signature", FORGED, _edited(_unwritten)),
    kind("signature of another bundle", "signature", "is of another bundle", _of_another),
    kind("signature for another task", "signature", "is signed for task others", _for_another),
    kind(
        "signed in the future",
        "signature",
        "one of the two clocks is wrong",
        _at(lambda chance: float(chance.uniform(15, 1_000_000))),
    ),
    kind(
        "replay",
        "replay",
        "an old signature does not bring an old bundle back",
        _replayed,
        # A repeated request is none, and which it is only the conductor knows.
        is_loaded=True,
    ),
    kind(
        "bit flip in signature.json",
        "signature",
        f"{NO_ENVELOPE}|base64|{FORGED}|nobody has trusted",
        _bytes(flipped),
    ),
    kind("truncated signature.json", "signature", NO_ENVELOPE, _bytes(cut)),
    kind(
        "another type of payload",
        "signature",
        NO_ENVELOPE,
        _edited(lambda envelope, _: envelope.update(payloadType="text/plain")),
    ),
    kind(
        "two signatures",
        "signature",
        NO_ENVELOPE,
        _edited(lambda envelope, _: envelope["signatures"].append(envelope["signatures"][0])),
    ),
    kind(
        "endless signature.json",
        "bundle",
        "signature.json is larger than",
        _bytes(lambda data, _: data + b" " * MAX_SIGNATURE_BYTES),
    ),
)
