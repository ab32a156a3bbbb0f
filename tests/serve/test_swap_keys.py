"""Trust in keys goes through the fleet like a push, and every replica verifies what it loads."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from export.bundle import Bundle, digest_of
from export.sign import sign
from serve.messages import Swapped
from serve.record import Record
from tests.serve.harness import LocalFleet, until
from tests.serve.oracle import Crowd, Heads, judge
from tests.serve.signers import key_of, trusting
from tests.serve.test_swap_faults import crash_at, heal, refusal


def signed(bundle: Bundle, *, key: int = 1, minute: int = 0) -> Bundle:
    """Signed by the key of that seed, so many minutes from an hour ago."""
    at = datetime.now(UTC) - timedelta(minutes=60 - minute)
    return sign(bundle, key_of(key), task=bundle.manifest.task, signed_at=at)


def test_a_trusted_keys_bundle_is_live_and_its_record_names_the_signature(
    tmp_path: Path, trunk_folder: Path, heads: Heads
) -> None:
    """Trust is a record of its own; the version names key, time and the blob of the signature."""
    with LocalFleet(tmp_path, trunk_folder, replicas=2) as fleet:
        assert isinstance(fleet.trust(trusting(1)), Swapped)
        bundle = signed(heads(1))
        fleet.must_push(bundle)
        log = fleet.view()
        (version,) = log.tasks["colours"]

        assert fleet.live_versions("colours") == {1}
        assert version.change.signed is not None
        assert version.change.signed.key_id == trusting(1).key_id
        assert fleet.log.get_blob(version.change.signed.envelope) == bundle.signature
        assert log.signing_keys == {trusting(1).key_id: trusting(1)}


def test_no_row_waits_and_nothing_is_dropped_while_trust_changes(
    tmp_path: Path, trunk_folder: Path, heads: Heads
) -> None:
    """Ten changes of trust under traffic: every request is answered by the version that is live."""
    with LocalFleet(tmp_path, trunk_folder, replicas=2) as fleet:
        fleet.must_push(heads(1))
        with Crowd(fleet, (("colours",),)) as crowd:
            for seed in range(2, 7):
                assert isinstance(fleet.trust(trusting(seed)), Swapped)
                assert isinstance(fleet.revoke(trusting(seed).key_id), Swapped)
                crowd.wait_for(5)
        log = fleet.view()

    assert judge(crowd.seen, log, heads.seeds) == []
    assert [key.is_revoked for key in log.signing_keys.values()] == [True] * 5
    assert len(log.tasks["colours"]) == 1


def test_what_is_live_stays_live_when_its_key_is_revoked_also_after_restarts(
    tmp_path: Path, trunk_folder: Path, heads: Heads
) -> None:
    """Who starts later does not ask again; a new push by that key is refused."""
    with LocalFleet(tmp_path, trunk_folder, replicas=1) as fleet:
        fleet.trust(trusting(1))
        fleet.must_push(signed(heads(1), minute=1))
        later = signed(heads(2), minute=2)
        fleet.log.put_bundle(later)
        fleet.revoke(trusting(1).key_id)
        fleet.start_conductor()
        fleet.kill("replica-1")
        fleet.wait_admitted(fleet.start_replica())
        by = fleet.view().tasks["colours"][0].change.signed
        answer = fleet.push(replace(later, signature=None), signed=by)

        assert fleet.live_versions("colours") == {1}
        assert "which was revoked" in refusal(answer)[1]


def test_a_rollback_needs_no_signature(tmp_path: Path, trunk_folder: Path, heads: Heads) -> None:
    """Nor a key that is trusted still, nor the blob of the signature that there was."""
    with LocalFleet(tmp_path, trunk_folder, replicas=2) as fleet:
        fleet.must_push(heads(1))
        fleet.trust(trusting(1))
        fleet.must_push(signed(heads(2), minute=1))
        fleet.must_push(signed(heads(3), minute=2))
        fleet.revoke(trusting(1).key_id)
        by = fleet.view().tasks["colours"][1].change.signed
        assert by is not None
        kind, _, name = by.envelope.partition(":")
        (tmp_path / "blobs" / kind / name).unlink()
        to_signed = fleet.roll_back("colours", key="a")
        to_unsigned = fleet.roll_back("colours", key="b", to=1)
        bundles = [version.change.bundle for version in fleet.view().tasks["colours"]]

        assert isinstance(to_signed, Swapped)
        assert isinstance(to_unsigned, Swapped)
        assert bundles[-2:] == [heads(2).digest, heads(1).digest]


@pytest.mark.parametrize("share", [None, 0.5, 0.0], ids=["push", "canary", "shadow"])
@pytest.mark.parametrize("what", ["another key's", "of another bundle", "of another time"])
def test_every_replica_verifies_the_signature_that_the_record_names(
    tmp_path: Path, trunk_folder: Path, heads: Heads, what: str, share: float | None
) -> None:
    """Whoever asked for the push may have lied about it: each replica vetoes, nothing changes."""
    with LocalFleet(tmp_path, trunk_folder, replicas=2) as fleet:
        fleet.trust(trusting(1))
        fleet.must_push(signed(heads(1), minute=1))
        true = fleet.view().tasks["colours"][0].change.signed
        assert true is not None
        envelopes = {
            "another key's": signed(heads(2), key=2, minute=5),
            "of another bundle": signed(heads(3), minute=5),
            "of another time": signed(heads(2), minute=0),
        }
        lie = envelopes[what]
        assert lie.signature is not None
        claim = {
            "signed_at": true.signed_at + timedelta(minutes=4),
            "envelope": digest_of(lie.signature),
        }
        fleet.log.put_blob(lie.signature)
        told = true.model_copy(update=claim)
        kind, reason = refusal(fleet.push(heads(2), signed=told, share=share))

        assert kind == "gate"
        assert "(says replica replica-" in reason
        assert fleet.live_versions("colours") == {1}


def test_a_key_that_is_revoked_between_gate_and_record_signs_nothing(
    tmp_path: Path, trunk_folder: Path, heads: Heads
) -> None:
    """The push waits behind the revocation, and is then asked of the log as it stands."""
    with LocalFleet(tmp_path, trunk_folder, replicas=1) as fleet:
        fleet.trust(trusting(1))
        started = []

        def push_meanwhile(record: Record) -> None:
            if record.signing_keys:
                fleet.log.before_put = lambda _: None
                started.append(fleet.start_push(signed(heads(1))))

        fleet.log.before_put = push_meanwhile
        fleet.revoke(trusting(1).key_id)

        assert "which was revoked" in refusal(started[0].result(10))[1]
        assert "colours" not in fleet.view().tasks


def test_an_old_signature_is_refused_and_a_new_one_is_not(
    tmp_path: Path, trunk_folder: Path, heads: Heads
) -> None:
    """The bundle may be the same."""
    with LocalFleet(tmp_path, trunk_folder, replicas=1) as fleet:
        fleet.trust(trusting(1))
        old = signed(heads(1), minute=1)
        fleet.must_push(old)
        fleet.must_push(signed(heads(2), minute=2))
        kind, reason = refusal(fleet.push(old, key="again"))

        assert (kind, "an old signature does not bring an old bundle back" in reason) == (
            "conflict",
            True,
        )
        assert fleet.must_push(signed(heads(1), minute=3), key="anew") == 3


@pytest.mark.parametrize(("moment", "is_made"), [("held", False), ("after the commit", True)])
def test_a_conductor_that_crashes_leaves_a_key_trusted_or_not(
    tmp_path: Path, trunk_folder: Path, heads: Heads, moment: str, *, is_made: bool
) -> None:
    """The record decides; the same request again makes it so, once."""
    with LocalFleet(tmp_path, trunk_folder, replicas=2, hold_s=0.4) as fleet:
        fleet.must_push(heads(1))
        crash_at(fleet, moment)
        fleet.start_trust(trusting(1), key="k")
        until(lambda: fleet.conductor is None)
        heal(fleet)
        fleet.start_conductor()
        again = fleet.start_trust(trusting(1), key="k").result(10)
        log = fleet.view()

    assert isinstance(again, Swapped)
    assert again.is_repeat == is_made
    assert [len(history) for history in log.key_history.values()] == [1]
