"""Signatures of bundles: which key vouches for which bundle, for which task, since when.

`signature.json` is a DSSE envelope around an in-toto Statement whose subject is the bundle's
`manifest.json`, and through it every file. An envelope has one signature, by Ed25519; a bundle that
is signed again gets another envelope.

Sources: https://github.com/secure-systems-lab/dsse (protocol.md and envelope.md, version 1),
https://github.com/in-toto/attestation/blob/main/spec/v1/statement.md, RFC 8032 (Ed25519).
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Annotated, Literal

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from export.bundle import MANIFEST, SIGNATURE, Bundle, Sha256, TaskName, digest_of

PAYLOAD_TYPE = "application/vnd.in-toto+json"


def _utc(time: datetime) -> datetime:
    try:
        return time.astimezone(UTC)
    except OverflowError as error:
        raise ValueError("the year is past the calendar's end in UTC") from error


UtcTime = Annotated[AwareDatetime, AfterValidator(_utc)]


class SignatureError(ValueError):
    """A signature that is none, is not of this format, or does not verify."""


class _Part(BaseModel):
    # Strict, so that a time is written as one, and not as a number of seconds.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_by_name=True)


class _Signature(_Part):
    keyid: Sha256
    sig: str


class _Envelope(_Part):
    payload_type: Literal["application/vnd.in-toto+json"] = Field(PAYLOAD_TYPE, alias="payloadType")
    payload: str
    signatures: tuple[_Signature]


class _Digests(_Part):
    sha256: Sha256


class _Subject(_Part):
    name: Literal["manifest.json"] = MANIFEST
    digest: _Digests


class _Predicate(_Part):
    task: TaskName
    signed_at: UtcTime


class _Statement(_Part):
    type_: Literal["https://in-toto.io/Statement/v1"] = Field(
        "https://in-toto.io/Statement/v1", alias="_type"
    )
    subject: tuple[_Subject]
    predicate_type: Literal["urn:headstock:bundle-signature:1"] = Field(
        "urn:headstock:bundle-signature:1", alias="predicateType"
    )
    predicate: _Predicate


@dataclass(frozen=True)
class Envelope:
    """What `signature.json` holds, not verified yet; the key's id is only a hint so far."""

    key_id: Sha256
    payload: bytes
    signature: bytes


@dataclass(frozen=True)
class Claim:
    """What a verified signature says: this bundle is meant for this task, as of then."""

    bundle: str
    task: str
    signed_at: datetime


def key_id_of(public_key: bytes) -> Sha256:
    """Name of a key: the sha256 of its 32 raw bytes, in hexadecimal."""
    return digest_of(public_key).removeprefix("sha256:")


def sign(bundle: Bundle, key: Ed25519PrivateKey, *, task: str, signed_at: datetime) -> Bundle:
    """The same bundle with a signature, in place of any that it had.

    Raises:
        ValidationError: no name of a task, or a time without its zone.
    """
    digests = _Digests(sha256=bundle.digest.removeprefix("sha256:"))
    statement = _Statement(
        subject=(_Subject(digest=digests),),
        predicate=_Predicate(task=task, signed_at=signed_at),
    )
    payload = statement.model_dump_json(by_alias=True).encode()
    envelope = _Envelope(
        payload=base64.b64encode(payload).decode(),
        signatures=(
            _Signature(
                keyid=key_id_of(key.public_key().public_bytes_raw()),
                sig=base64.b64encode(key.sign(signed_bytes(payload))).decode(),
            ),
        ),
    )
    return replace(bundle, signature=envelope.model_dump_json(by_alias=True).encode())


def read_envelope(data: bytes) -> Envelope:
    """Parse `signature.json`.

    Raises:
        SignatureError: it is not of this format.
    """
    try:
        envelope = _Envelope.model_validate_json(data)
    except ValidationError as error:
        raise SignatureError(
            f"{SIGNATURE} is no DSSE envelope with one signature: {_first_problem(error)}."
        ) from error
    (signature,) = envelope.signatures
    return Envelope(signature.keyid, _decoded(envelope.payload), _decoded(signature.sig))


def verify(envelope: Envelope, public_key: bytes) -> Claim:
    """Check the signature first, and only then read what it says.

    Args:
        public_key: 32 raw bytes.

    Raises:
        SignatureError: the signature is not this key's, or says nothing about a bundle.
    """
    try:
        key = Ed25519PublicKey.from_public_bytes(public_key)
        key.verify(envelope.signature, signed_bytes(envelope.payload))
    except InvalidSignature as error:
        raise SignatureError(
            f"The signature in {SIGNATURE} is not one of key {envelope.key_id[:12]}: it was forged "
            "or damaged."
        ) from error
    try:
        statement = _Statement.model_validate_json(envelope.payload)
    except ValidationError as error:
        raise SignatureError(
            f"{SIGNATURE} holds no in-toto statement about a bundle: {_first_problem(error)}."
        ) from error
    (subject,) = statement.subject
    return Claim(
        f"sha256:{subject.digest.sha256}", statement.predicate.task, statement.predicate.signed_at
    )


def signed_bytes(payload: bytes) -> bytes:
    """The bytes that are really signed: DSSE's pre-authentication encoding of type and payload."""
    kind = PAYLOAD_TYPE.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


def _decoded(text: str) -> bytes:
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise SignatureError(f"{SIGNATURE} holds {text[:40]!r}, which is not base64.") from error
    # The last character may have bits to spare; one signature has one spelling.
    if base64.b64encode(data).decode() != text:
        raise SignatureError(f"{SIGNATURE} holds base64 with bits that mean nothing.")
    return data


def _first_problem(error: ValidationError) -> str:
    problem = error.errors(include_url=False, include_context=False)[0]
    place = ".".join(str(part) for part in problem["loc"]) or "the whole"
    return f"{place}: {problem['msg']} (got {str(problem['input'])[:80]!r})"
