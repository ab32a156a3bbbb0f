"""The gate that asks who vouches for a bundle."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta

import pytest

from export.bundle import Bundle, digest_of
from export.sign import sign
from serve.graph_gate import GateError
from serve.record import TaskChange
from serve.signature_gate import admit_signature, check_signature, check_staged
from serve.trust import MAX_AHEAD, SignedBy
from tests.serve.signers import NOW, key_of, trusted, trusting

BundleMaker = Callable[..., Bundle]
KEYS = trusted(trusting(1, name="ci"), trusting(2, is_revoked=True))


def signed(bundle: Bundle, seed: int = 1, *, signed_at: datetime = NOW) -> Bundle:
    """Signed by the key of that seed."""
    return sign(bundle, key_of(seed), task="colours", signed_at=signed_at)


def refusal(bundle: Bundle, *, task: str = "colours") -> str:
    """Why the gate says no."""
    verdict, by = admit_signature(bundle, task, KEYS, NOW)
    assert (verdict.gate, verdict.passed, by) == ("signature", False, None)
    return verdict.reason


def test_a_bundle_that_a_trusted_key_signed_is_admitted(make_bundle: BundleMaker) -> None:
    """The verdict names the key, and the record gets what was verified."""
    bundle = signed(make_bundle())
    verdict, by = admit_signature(bundle, "colours", KEYS, NOW)

    assert verdict.passed
    assert verdict.reason == (
        f"signed by ci ({trusting(1).key_id[:12]}) at 2026-11-21 12:00:00 UTC"
    )
    assert bundle.signature is not None
    assert by == SignedBy(
        key_id=trusting(1).key_id, signed_at=NOW, envelope=digest_of(bundle.signature)
    )


def test_before_any_key_was_trusted_no_signature_is_asked_for(make_bundle: BundleMaker) -> None:
    """The verdict says so in words, and says nothing was verified where something was signed."""
    plain, by_nobody = admit_signature(make_bundle(), "colours", {}, NOW)
    unchecked, by_somebody = admit_signature(signed(make_bundle()), "colours", {}, NOW)

    assert plain.passed
    assert unchecked.passed
    assert plain.reason == "not signed: no key was ever trusted here, so none is asked for"
    assert unchecked.reason.startswith("signed, which was not checked: no key was ever trusted")
    assert by_nobody is by_somebody is None


def test_once_a_key_was_trusted_a_bundle_has_to_be_signed(make_bundle: BundleMaker) -> None:
    """Also when every key that there was has been revoked since."""
    revoked = trusted(trusting(2, is_revoked=True))
    verdict, _ = admit_signature(make_bundle(), "colours", revoked, NOW)

    assert "The bundle is not signed" in refusal(make_bundle())
    assert not verdict.passed


def test_each_way_to_be_wrong_has_its_reason(make_bundle: BundleMaker) -> None:
    """Keys, bundle, task, time, and what is no signature."""
    bundle, other = make_bundle(), make_bundle(seed=1)
    envelope = json.loads(signed(bundle).signature or b"")
    forged = json.loads(signed(bundle, seed=9).signature or b"")
    forged["signatures"][0]["keyid"] = trusting(1).key_id
    too_far = NOW + MAX_AHEAD + timedelta(seconds=1)

    assert "which nobody has trusted" in refusal(signed(bundle, seed=9))
    assert "which was revoked" in refusal(signed(bundle, seed=2))
    assert "it was forged or damaged" in refusal(replace(bundle, signature=_json(forged)))
    assert "is of another bundle" in refusal(replace(bundle, signature=signed(other).signature))
    assert "signed for task colours, and not for hues" in refusal(signed(bundle), task="hues")
    assert "one of the two clocks is wrong" in refusal(signed(bundle, signed_at=too_far))
    assert "no DSSE envelope" in refusal(replace(bundle, signature=b"{}"))
    assert envelope["signatures"][0]["keyid"] == trusting(1).key_id


def _json(value: object) -> bytes:
    return json.dumps(value).encode()


def test_what_is_no_signature_is_refused_before_any_key_was_trusted(
    make_bundle: BundleMaker,
) -> None:
    """Somebody meant something by it."""
    verdict, _ = admit_signature(replace(make_bundle(), signature=b"{}"), "colours", {}, NOW)

    assert not verdict.passed


@pytest.mark.parametrize("ahead", [timedelta(), MAX_AHEAD])
def test_a_signers_clock_may_be_a_little_ahead(make_bundle: BundleMaker, ahead: timedelta) -> None:
    """By ten minutes and no more."""
    by = check_signature(signed(make_bundle(), signed_at=NOW + ahead), "colours", KEYS, NOW)

    assert by is not None
    assert by.signed_at == NOW + ahead


@pytest.mark.parametrize(
    "field", [{"key_id": "0" * 64}, {"signed_at": NOW - MAX_AHEAD}, {"envelope": digest_of(b"")}]
)
def test_a_record_that_says_more_than_the_signature_is_not_staged(
    make_bundle: BundleMaker, field: dict[str, object]
) -> None:
    """Every replica sees for itself: key, time and envelope are those of the bundle's signature."""
    bundle = signed(make_bundle())
    by = check_signature(bundle, "colours", KEYS, NOW)
    assert by is not None
    change = TaskChange(
        task="colours", version=1, action="push", bundle=bundle.digest, labels=(), signed=by
    )
    other = change.model_copy(update={"signed": by.model_copy(update=field)})

    check_staged(change, bundle, KEYS, NOW)
    with pytest.raises(GateError, match="names another signature"):
        check_staged(other, bundle, KEYS, NOW)
    with pytest.raises(GateError, match="names another signature"):
        check_staged(change.model_copy(update={"signed": None}), bundle, KEYS, NOW)
