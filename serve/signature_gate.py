"""The first gate: a key that is trusted for this task vouches for this bundle."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

from export.bundle import Bundle, digest_of
from export.sign import SignatureError, read_envelope, verify
from serve.graph_gate import GateError
from serve.record import TaskChange, Verdict
from serve.trust import (
    MAX_AHEAD,
    SHORT_ID,
    KeyChange,
    SignedBy,
    UntrustedError,
    trusted_key,
    unsigned_reason,
)

Keys = Mapping[str, KeyChange]


def admit_signature(
    bundle: Bundle, task: str, keys: Keys, now: datetime
) -> tuple[Verdict, SignedBy | None]:
    """The gate's verdict, and the signature that the record is to name."""
    try:
        signed = check_signature(bundle, task, keys, now)
    except GateError as error:
        return Verdict(gate="signature", passed=False, reason=str(error)), None
    return Verdict(gate="signature", passed=True, reason=_reason(bundle, keys, signed)), signed


def check_signature(bundle: Bundle, task: str, keys: Keys, now: datetime) -> SignedBy | None:
    """The verified signature of a bundle; None as long as no key was ever trusted.

    Args:
        task: The task that the bundle is pushed to.
        keys: Every key that was ever trusted, by its id, as it is trusted now.

    Raises:
        GateError: not signed, or not by a key that may sign this now.
    """
    if bundle.signature is None:
        if keys:
            raise GateError(unsigned_reason(keys, now))
        return None
    try:
        envelope = read_envelope(bundle.signature)
        if not keys:
            return None
        key = trusted_key(keys, envelope.key_id, task=task, now=now)
        claim = verify(envelope, key.raw)
    except (SignatureError, UntrustedError) as error:
        raise GateError(str(error)) from error
    if claim.bundle != bundle.digest:
        raise GateError(
            f"The signature is of another bundle, {claim.bundle}; this one is {bundle.digest}."
        )
    if claim.task != task:
        raise GateError(f"The bundle is signed for task {claim.task}, and not for {task}.")
    if claim.signed_at > now + MAX_AHEAD:
        raise GateError(
            f"The bundle is signed at {claim.signed_at:%Y-%m-%d %H:%M:%S} UTC, and here it is "
            f"{now:%Y-%m-%d %H:%M:%S}: one of the two clocks is wrong."
        )
    return SignedBy(
        key_id=key.key_id, signed_at=claim.signed_at, envelope=digest_of(bundle.signature)
    )


def check_staged(change: TaskChange, bundle: Bundle, keys: Keys, now: datetime) -> None:
    """The same on a replica that is about to load a pushed bundle: the record says what is so.

    Raises:
        GateError: see `check_signature`, or the record names another signature.
    """
    signed = change.signature_of(bundle.digest)
    if check_signature(bundle, change.task, keys, now) != signed:
        raise GateError("The record of this push names another signature than the bundle has.")


def _reason(bundle: Bundle, keys: Keys, signed: SignedBy | None) -> str:
    if signed is not None:
        name = keys[signed.key_id].name
        return (
            f"signed by {name} ({signed.key_id[:SHORT_ID]}) at "
            f"{signed.signed_at:%Y-%m-%d %H:%M:%S} UTC"
        )
    what = "not signed" if bundle.signature is None else "signed, which was not checked"
    return f"{what}: no key was ever trusted here, so none is asked for"
