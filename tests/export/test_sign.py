"""What a signature of a bundle says, compared with DSSE's reference implementation."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import ValidationError
from securesystemslib.dsse import Envelope as ReferenceEnvelope
from securesystemslib.exceptions import VerificationError
from securesystemslib.signer import CryptoSigner, SSlibKey

from export.bundle import Bundle
from export.sign import SignatureError, key_id_of, read_envelope, sign, signed_bytes, verify
from tests.export.test_bundle import pack

KEY, OTHER = (Ed25519PrivateKey.from_private_bytes(bytes([seed]) * 32) for seed in (1, 2))
PUBLIC = KEY.public_key().public_bytes_raw()
NOON = datetime(2026, 11, 21, 12, tzinfo=UTC)


def signed(
    bundle: Bundle | None = None,
    key: Ed25519PrivateKey = KEY,
    *,
    task: str = "fruit",
    signed_at: datetime = NOON,
) -> Bundle:
    """A signed bundle."""
    return sign(bundle or pack(), key, task=task, signed_at=signed_at)


def envelope_of(bundle: Bundle) -> dict[str, Any]:
    """Its `signature.json`, as JSON says it."""
    assert bundle.signature is not None
    return json.loads(bundle.signature)


def reference_key(key: Ed25519PrivateKey = KEY) -> SSlibKey:
    """The public key for the reference implementation."""
    raw = key.public_key().public_bytes_raw()
    return SSlibKey(key_id_of(raw), "ed25519", "ed25519", {"public": raw.hex()})


def reference_envelope(payload: bytes, key: Ed25519PrivateKey = KEY) -> dict[str, Any]:
    """An envelope that the reference implementation makes."""
    envelope = ReferenceEnvelope(payload, "application/vnd.in-toto+json", {})
    envelope.sign(CryptoSigner(key, reference_key(key)))
    return envelope.to_dict()


def statement(bundle: Bundle) -> dict[str, Any]:
    """What is signed, as the in-toto and DSSE pages say it, written by hand."""
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [
            {"name": "manifest.json", "digest": {"sha256": bundle.digest.removeprefix("sha256:")}}
        ],
        "predicateType": "urn:headstock:bundle-signature:1",
        "predicate": {"task": "fruit", "signed_at": "2026-11-21T12:00:00Z"},
    }


def test_the_reference_implementation_verifies_what_is_signed_here() -> None:
    """By this key and not by another."""
    envelope = ReferenceEnvelope.from_dict(envelope_of(signed()))

    assert list(envelope.verify([reference_key()], 1)) == [key_id_of(PUBLIC)]
    with pytest.raises(VerificationError):
        ReferenceEnvelope.from_dict(envelope_of(signed())).verify([reference_key(OTHER)], 1)


def test_what_the_reference_implementation_signs_is_verified_here() -> None:
    """With a statement that was written by hand."""
    bundle = pack()
    data = json.dumps(reference_envelope(json.dumps(statement(bundle)).encode())).encode()
    claim = verify(read_envelope(data), PUBLIC)

    assert (claim.bundle, claim.task, claim.signed_at) == (bundle.digest, "fruit", NOON)


def test_the_payload_is_an_in_toto_statement_about_the_manifest() -> None:
    """Field by field."""
    payload = base64.b64decode(envelope_of(signed())["payload"])

    assert json.loads(payload) == statement(pack())


def test_the_signed_bytes_are_dsses() -> None:
    """Written out by hand, after the example of DSSE's protocol.md."""
    assert signed_bytes(b"{}") == b"DSSEv1 28 application/vnd.in-toto+json 2 {}"


def test_a_key_is_named_by_the_sha256_of_its_raw_bytes() -> None:
    """`sha256sum` of the 32 bytes 8a88e3dd… (RFC 8032's derivation of the seed 0101…)."""
    assert PUBLIC.hex().startswith("8a88e3dd7409f195")
    assert envelope_of(signed())["signatures"][0]["keyid"] == key_id_of(PUBLIC)
    assert key_id_of(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_a_signature_changes_neither_digest_nor_files() -> None:
    """So a bundle can be signed after it was made, and signed again."""
    once = signed()
    again = signed(once, OTHER)

    assert once.digest == again.digest == pack().digest
    assert replace(again, signature=None) == pack()
    assert [s["keyid"] for s in envelope_of(again)["signatures"]] == [
        key_id_of(OTHER.public_key().public_bytes_raw())
    ]


def test_times_are_written_in_utc() -> None:
    """Wherever it was signed, to the microsecond."""
    there = datetime(2026, 11, 21, 14, 0, 0, 5, tzinfo=timezone(timedelta(hours=2)))
    bundle = signed(signed_at=there)

    assert b'"2026-11-21T12:00:00.000005Z"' in base64.b64decode(envelope_of(bundle)["payload"])
    assert verify(read_envelope(bundle.signature or b""), PUBLIC).signed_at == there


@pytest.mark.parametrize(
    "fields",
    [{"task": "Fruit"}, {"signed_at": NOON.replace(tzinfo=None)}],
    ids=["no task's name", "a time without its zone"],
)
def test_what_no_one_could_verify_is_not_signed(fields: dict[str, Any]) -> None:
    """The signer hears of it, and not the pusher."""
    with pytest.raises(ValidationError):
        signed(**fields)


def test_any_bit_of_a_signature_matters() -> None:
    """Every single flip, of 5,000 and more: unreadable, or another key's, or not verified."""
    data = signed().signature
    assert data is not None
    passed = []
    for place in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[place // 8] ^= 1 << place % 8
        try:
            envelope = read_envelope(bytes(flipped))
            if envelope.key_id == key_id_of(PUBLIC):
                verify(envelope, PUBLIC)
                passed.append(place)
        except SignatureError:
            pass

    assert passed == []


def _edit(change: Callable[[dict[str, Any]], object]) -> bytes:
    envelope = envelope_of(signed())
    change(envelope)
    return json.dumps(envelope).encode()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "signature.json is no DSSE envelope with one signature"),
        (b"\x00\xff", "is no DSSE envelope"),
        (b"[]", "is no DSSE envelope"),
        (b"[" * 10_000, "is no DSSE envelope"),
        (_edit(lambda e: e.pop("payload")), "payload: Field required"),
        (_edit(lambda e: e.update(more=1)), "more: Extra inputs"),
        (_edit(lambda e: e.update(payloadType="text/plain")), "payloadType: Input should be"),
        (_edit(lambda e: e["signatures"].clear()), "signatures"),
        (_edit(lambda e: e["signatures"].append(e["signatures"][0])), "signatures"),
        (_edit(lambda e: e["signatures"][0].update(keyid="8A")), "keyid"),
        (_edit(lambda e: e["signatures"][0].pop("keyid")), "keyid"),
        (_edit(lambda e: e["signatures"][0].update(sig="?")), "which is not base64"),
        (_edit(lambda e: e["signatures"][0].update(sig="é")), "which is not base64"),
        (_edit(lambda e: e.update(payload="YWI")), "which is not base64"),
        (_edit(lambda e: e.update(payload="YWK=")), "bits that mean nothing"),
    ],
)
def test_what_is_no_envelope_says_why(data: bytes, reason: str) -> None:
    """Whatever bytes come."""
    with pytest.raises(SignatureError, match=reason):
        read_envelope(data)


TOO_LATE = "9999-12-31T23:59:59-01:00"
NO_CLAIMS: dict[str, Callable[[dict[str, Any]], object]] = {
    "an older statement": lambda s: s.update(_type="https://in-toto.io/Statement/v0.1"),
    "another predicate": lambda s: s.update(predicateType="https://slsa.dev/provenance/v1"),
    "two subjects": lambda s: s["subject"].append(s["subject"][0]),
    "no subject": lambda s: s["subject"].clear(),
    "another file": lambda s: s["subject"][0].update(name="head.onnx"),
    "another digest": lambda s: s["subject"][0]["digest"].update(sha512="0"),
    "no task's name": lambda s: s["predicate"].update(task="Fruit"),
    "a space": lambda s: s["predicate"].update(task="fruit "),
    "no time": lambda s: s["predicate"].update(signed_at="yesterday"),
    "a number as the time": lambda s: s["predicate"].update(signed_at=0),
    "a time without its zone": lambda s: s["predicate"].update(signed_at="2026-11-21T12:00:00"),
    "a year that UTC does not have": lambda s: s["predicate"].update(
        signed_at="9999-12-31T23:59:59-01:00"
    ),
    "a field more": lambda s: s["predicate"].update(more=1),
}


@pytest.mark.parametrize("what", NO_CLAIMS)
def test_a_signature_of_something_else_is_none_of_a_bundle(what: str) -> None:
    """Verified, and yet nothing that this service understands: the key may sign other things."""
    other = statement(pack())
    NO_CLAIMS[what](other)
    data = json.dumps(reference_envelope(json.dumps(other).encode())).encode()

    with pytest.raises(SignatureError, match="holds no in-toto statement about a bundle"):
        verify(read_envelope(data), PUBLIC)


@pytest.mark.parametrize("size", [0, 32, 63, 65])
def test_a_signature_of_another_length_does_not_verify(size: int) -> None:
    """An Ed25519 signature has 64 bytes."""
    envelope = replace(read_envelope(signed().signature or b""), signature=bytes(size))

    with pytest.raises(SignatureError, match=r"not one of key [0-9a-f]{12}: it was forged"):
        verify(envelope, PUBLIC)
