"""What a token opens: pure, so every scope can be asked about everything."""

from __future__ import annotations

import hashlib
import re
from datetime import timedelta

import pytest
from pydantic import ValidationError

from serve.access import (
    ADMIN_SETTING,
    ANYONE,
    Action,
    Caller,
    NoAccessError,
    TokenChange,
    caller_of,
    digest_of_token,
    has_admin,
    new_token,
)
from tests.serve.holders import NOW, token_for, token_text

ACTIONS: tuple[Action, ...] = ("open", "predict", "push", "rollback", "read", "metrics", "admin")
TASKS = ("pets", "pets-2", "cars")


@pytest.mark.parametrize(
    ("scope", "expected"),
    [
        ("predict:pets*", {(a, t) for a in ("predict", "read") for t in ("pets", "pets-2")}),
        ("predict:*", {(a, t) for a in ("predict", "read") for t in TASKS}),
        ("predict:pet?", {("predict", "pets"), ("read", "pets")}),
        ("push:cars", {("push", "cars"), ("read", "cars")}),
        ("rollback", {(a, t) for a in ("rollback", "read") for t in TASKS}),
        ("metrics", {("metrics", t) for t in TASKS}),
        ("admin", {(a, t) for a in ACTIONS for t in TASKS}),
    ],
)
def test_a_scope_opens_what_it_names_and_nothing_else(
    scope: str, expected: set[tuple[str, str]]
) -> None:
    """Every action on every task, tried one by one; what is open is open to all."""
    caller = Caller("id", "name", (scope,))
    found = {(a, t) for a in ACTIONS for t in TASKS if caller.may(a, t)}

    assert found == expected | {("open", t) for t in TASKS}


def test_without_a_task_it_is_asked_whether_there_is_any() -> None:
    """What a route about several tasks is opened by; it then answers about those alone."""
    caller = Caller("id", "name", ("predict:pets*", "metrics"))

    assert [a for a in ACTIONS if caller.may(a)] == ["open", "predict", "read", "metrics"]


def test_where_no_token_is_asked_for_everybody_may_do_everything() -> None:
    """As on loopback."""
    assert all(ANYONE.may(action, "pets") for action in ACTIONS)


@pytest.mark.parametrize(
    "scope",
    ["predict", "predict:", "push:Pets", "admin:pets", "rollback:pets", "", "all", "pull:a"],
)
def test_a_scope_that_there_is_not_makes_no_token(scope: str) -> None:
    """A misspelt scope would open nothing, or more than was meant."""
    with pytest.raises(ValidationError):
        token_for(1, scope)


def test_a_new_token_is_256_bits_of_chance_in_a_form_that_scanners_find() -> None:
    """Two are never alike; the id in it is no part of the secret."""
    tokens = [new_token() for _ in range(100)]

    for token, token_id in tokens:
        found = re.fullmatch(r"hs_([0-9a-f]{12})_([0-9a-f]{64})", token)
        assert found is not None
        assert found[1] == token_id
    assert len({token[16:] for token, _ in tokens}) == 100


def test_only_the_digest_of_a_token_is_kept() -> None:
    """And it is that of the whole text, as `sha256sum` prints it."""
    token = token_for(5, "admin")

    assert digest_of_token("a") == hashlib.sha256(b"a").hexdigest()
    assert token_text(5) not in token.model_dump_json()
    assert token.sha256 == hashlib.sha256(token_text(5).encode()).hexdigest()


def who(text: str, *tokens: TokenChange, admin: str = "") -> Caller:
    """The caller with this token, in a service that knows those."""
    known = {token.token_id: token for token in tokens}
    admin_sha256 = digest_of_token(admin) if admin else ""
    return caller_of(text, known, admin_sha256=admin_sha256, now=NOW)


def test_who_has_a_token_is_who_it_was_made_for() -> None:
    """With its scopes and its rate."""
    token = token_for(1, "predict:pets", "metrics", rate_per_s=5, valid_until=NOW + timedelta(1))

    caller = who(token_text(1), token, token_for(2, "admin"))
    assert caller == Caller(token.token_id, "token1", ("predict:pets", "metrics"), 5.0)


def test_the_setting_s_token_may_do_everything() -> None:
    """Whatever it looks like."""
    caller = who("x" * 40, token_for(1, "metrics"), admin="x" * 40)

    assert (caller.name, caller.may("admin")) == (ADMIN_SETTING, True)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        token_text(1)[:-1],
        token_text(1) + "0",
        token_text(1)[:-1] + "0",
        token_text(1).upper(),
        token_text(2),
        "hs_" + token_text(1)[3:15],
        digest_of_token(token_text(1)),
        f"sha256:{digest_of_token('y' * 40)}",
        digest_of_token("y" * 40),
        token_text(1) + " " * 300,
        "ä" * 40,
    ],
)
def test_what_is_nearly_a_token_opens_nothing(text: str) -> None:
    """Not its digest either, which the log and the settings hold; and nothing is told of why."""
    with pytest.raises(NoAccessError) as refused:
        who(text, token_for(1, "admin"), admin="y" * 40)

    assert str(refused.value) == "The token is not one of this service's."


def test_without_an_admin_token_nothing_is_it() -> None:
    """Not the empty text, nor what its absence is compared with."""
    for text in ("", "0" * 64, "sha256:"):
        with pytest.raises(NoAccessError):
            who(text)


def test_a_token_ends_at_its_time_and_when_it_is_revoked() -> None:
    """Who has it is told so by its name; who has not is not."""
    over = token_for(1, "admin", valid_until=NOW)
    revoked = token_for(2, "admin", is_revoked=True)

    with pytest.raises(NoAccessError, match=r"token1 .* is expired"):
        who(token_text(1), over)
    with pytest.raises(NoAccessError, match=r"token2 .* is revoked"):
        who(token_text(2), revoked)
    with pytest.raises(NoAccessError, match="not one of"):
        who(token_text(1)[:-1] + "f", over)


def test_an_admin_is_there_only_while_a_token_is_valid() -> None:
    """Neither an expired nor a revoked one can make others."""
    others = [token_for(1, "predict:*"), token_for(2, "admin", is_revoked=True)]

    assert not has_admin([*others, token_for(3, "admin", valid_until=NOW)], NOW)
    assert has_admin([*others, token_for(3, "push:a", "admin")], NOW)
