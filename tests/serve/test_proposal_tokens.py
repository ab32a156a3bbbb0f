"""What a request about an access token means for the log as it stands."""

from __future__ import annotations

import pytest

from serve.messages import AnyChange, Swapped, TokenRequest
from serve.proposal import Proposal, overtaken, propose
from serve.record import LogView
from tests.serve.holders import token_for
from tests.serve.test_proposal import NOW, A, after, foreign, log, push, pushed, refused, trust


def issue(seed: int = 1, *, key: str = "new", **fields: str) -> TokenRequest:
    """A token that may predict everything."""
    token = token_for(seed, "predict:*", **fields)
    return TokenRequest(token.token_id, key, token)


def revoke(seed: int = 1, *, key: str = "new") -> TokenRequest:
    """That token, no more."""
    return TokenRequest(token_for(seed, "metrics").token_id, key)


def test_making_a_token_touches_no_task() -> None:
    """The record has the token and nothing else."""
    assert propose(log(A), issue(), NOW) == Proposal(tokens=(token_for(1, "predict:*"),))


def test_a_revoked_token_is_remembered() -> None:
    """With all that it was for."""
    view = after(after(log(), issue(key="a")), revoke(key="b"))
    token = token_for(1, "predict:*")

    assert view.tokens == {token.token_id: token.model_copy(update={"is_revoked": True})}
    history = view.token_history[token.token_id]
    assert [version.change.is_revoked for version in history] == [False, True]


@pytest.mark.parametrize(
    ("view", "change", "kind", "reason"),
    [
        (log(), revoke(), "unknown", "There is no token 000000000001"),
        (after(after(log(), issue(key="a")), revoke(key="b")), issue(), "conflict", "stays as it"),
        (after(log(), issue(key="a")), issue(name="other"), "conflict", "stays as it is"),
        (after(log(), issue(key="a")), issue(2, name="token1"), "conflict", "The name token1 is"),
        (after(log(), issue(key="a")), issue(2, key="a"), "conflict", "token token1"),
        (after(log(), issue(key="a")), revoke(key="a"), "conflict", "token token1"),
        (after(log(), issue(key="a")), push(A, key="a"), "conflict", "token token1"),
        (after(log(), issue(key="a")), trust(key="a"), "conflict", "token token1"),
        (after(log(), trust(key="a")), issue(key="a"), "conflict", "the trust in key key1"),
        (log(A), issue(key="k1"), "conflict", "'k1' already made version 1 of task pets"),
    ],
)
def test_what_cannot_be_said_of_a_token_says_why(
    view: LogView, change: AnyChange, kind: str, reason: str
) -> None:
    """Nothing is proposed then."""
    answer = refused(view, change)

    assert answer.kind == kind
    assert reason in answer.reason


def test_a_name_is_free_again_when_its_token_is_revoked() -> None:
    """So that a token can be replaced by one of the same name."""
    view = after(after(log(), issue(key="a")), revoke(key="b"))

    assert isinstance(propose(view, issue(2, name="token1"), NOW), Proposal)


@pytest.mark.parametrize("change", [issue(key="a"), revoke(key="b"), revoke(key="c")])
def test_a_repeated_request_about_a_token_is_one_change(change: TokenRequest) -> None:
    """Whatever was said of it since; and revoking twice is no error."""
    view = after(after(log(), issue(key="a")), revoke(key="b"))
    outcome = propose(view, change, NOW)

    assert isinstance(outcome, Swapped)
    assert outcome.is_repeat


def test_what_others_write_changes_nothing_about_a_token() -> None:
    """It is proposed anew for the next free number."""
    assert overtaken(issue(), [foreign(1, pushed("pets"))]) is None
