"""Which keys may sign what, and when: pure, so by examples."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest
from pydantic import ValidationError

from serve.trust import (
    KeyChange,
    UntrustedError,
    trusted_key,
    unsigned_reason,
    valid_until,
)
from tests.serve.signers import NOW, trusted, trusting

A_MOMENT = timedelta(microseconds=1)


def test_a_trusted_key_may_sign() -> None:
    """For any task and for ever, unless said otherwise."""
    key = trusting(1)

    assert trusted_key(trusted(key, trusting(2)), key.key_id, task="pets", now=NOW) == key
    assert key.state(NOW) == "trusted"


@pytest.mark.parametrize(
    ("globs", "task", "may"),
    [
        (("pets",), "pets", True),
        (("pets",), "pets2", False),
        (("pets*",), "pets", True),
        (("pets*",), "pets-new", True),
        (("pets*",), "my-pets", False),
        (("*",), "anything", True),
        (("pet?",), "pets", True),
        (("pet?",), "pet", False),
        (("cars", "pets*"), "pets2", True),
        (("cars", "pets*"), "birds", False),
    ],
)
def test_a_key_signs_for_the_tasks_that_its_globs_name(
    globs: tuple[str, ...], task: str, *, may: bool
) -> None:
    """The whole name, in any of the globs."""
    key = trusting(1, tasks=globs)
    if may:
        assert trusted_key(trusted(key), key.key_id, task=task, now=NOW) == key
        return
    with pytest.raises(UntrustedError, match=f"may sign for {globs[0][:3]}.* and not for {task}"):
        trusted_key(trusted(key), key.key_id, task=task, now=NOW)


def test_a_key_expires_at_its_moment() -> None:
    """The moment before it may still sign."""
    key = trusting(1, valid_until=NOW)
    keys = trusted(key)

    assert trusted_key(keys, key.key_id, task="pets", now=NOW - A_MOMENT) == key
    assert (key.state(NOW - A_MOMENT), key.state(NOW)) == ("trusted", "expired")
    with pytest.raises(UntrustedError, match="was trusted until 2026-11-21 12:00 UTC only"):
        trusted_key(keys, key.key_id, task="pets", now=NOW)


def test_a_revoked_key_may_not_sign_whatever_else_is_said_of_it() -> None:
    """Also before it would have expired."""
    key = trusting(1, is_revoked=True, valid_until=NOW + A_MOMENT)

    assert key.state(NOW) == "revoked"
    with pytest.raises(UntrustedError, match=r"key key1 \([0-9a-f]{12}\), which was revoked"):
        trusted_key(trusted(key), key.key_id, task="pets", now=NOW)


def test_an_unknown_key_is_told_who_is_trusted() -> None:
    """Those that may sign now, by name."""
    revoked = trusting(2, is_revoked=True)
    keys = trusted(trusting(1, name="ci"), revoked, trusting(3, valid_until=NOW))
    with pytest.raises(UntrustedError) as refused:
        trusted_key(keys, trusting(4).key_id, task="pets", now=NOW)

    assert f"which nobody has trusted; trusted are ci ({trusting(1).key_id[:12]})." in str(
        refused.value
    )
    assert "trusted are no keys at present" in unsigned_reason(
        trusted(trusting(3, is_revoked=True)), NOW
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"name": "a b"},
        {"name": ""},
        {"tasks": ()},
        {"tasks": ("Pets",)},
        {"tasks": ("pets[a-z]",)},
        {"tasks": ("",)},
        {"tasks": ("*",) * 101},
        {"valid_until": NOW.replace(tzinfo=None)},
        {"valid_until": datetime(9999, 12, 31, 23, tzinfo=timezone(-timedelta(hours=2)))},
        {"key_id": "0" * 64},
        {"public_key": "AAAA"},
        {"public_key": "?"},
        {"is_revoked": None},
        {"more": 1},
    ],
)
def test_what_is_no_trust_in_a_key_is_refused(fields: dict[str, object]) -> None:
    """Names, globs, times, and an id that is not this key's."""
    with pytest.raises(ValidationError):
        KeyChange.model_validate({**trusting(1).model_dump(), **fields})


def test_one_key_has_one_spelling() -> None:
    """The last character of base64 has bits to spare."""
    key = trusting(1)
    last = key.public_key[-2]
    spare = key.public_key[:-2] + chr(ord(last) + 1) + "="

    with pytest.raises(ValidationError, match="not plain base64"):
        KeyChange.model_validate({**key.model_dump(), "public_key": spare})


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2027-01-01", datetime(2027, 1, 1, tzinfo=UTC)),
        ("2027-01-01T06:30", datetime(2027, 1, 1, 6, 30, tzinfo=UTC)),
        ("2027-01-01T06:30:00Z", datetime(2027, 1, 1, 6, 30, tzinfo=UTC)),
        ("2027-01-01T06:30:00+02:00", datetime(2027, 1, 1, 4, 30, tzinfo=UTC)),
    ],
)
def test_a_date_means_its_first_moment_in_utc(text: str, moment: datetime) -> None:
    """And a time means itself."""
    assert valid_until(text) == moment
