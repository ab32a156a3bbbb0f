"""Who may do what: access tokens as the log has them, and what follows from their scopes.

Pure: the log says which tokens there are, the caller says what time it is.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from fnmatch import fnmatchcase
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from export.bundle import Sha256
from export.sign import UtcTime
from serve.trust import KeyName

# `read` is no scope of its own: who may do anything with a task may read what there is to know.
Action = Literal["open", "predict", "push", "rollback", "read", "metrics", "admin"]

MAX_SCOPES = 100
MAX_TOKEN_LENGTH = 256
NO_DIGEST = "0" * 64  # of nothing that anybody knows
ADMIN_SETTING = "admin_token"  # the id and name of whoever has that setting's token

TokenId = Annotated[str, Field(pattern=r"^[0-9a-f]{12}$")]
Scope = Annotated[
    str, Field(pattern=r"^((predict|push):[a-z0-9_*?-]{1,63}|rollback|metrics|admin)$")
]
Rate = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]


class NoAccessError(Exception):
    """No token, or one that opens nothing."""


class TokenChange(BaseModel):
    """An access token, as it is known from here on.

    Only a digest is kept, and a fast one: a token is 256 bits of chance, so there is nothing to
    guess from it. Slow hashes are for passwords, which people choose.

    Args:
        token_id: The part of the token that is no secret.
        sha256: Of the whole token as text.
        valid_until: The first moment at which it opens nothing any more; None: never.
        rate_per_s: Requests that the whole fleet answers it each second; None: no limit.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    token_id: TokenId
    sha256: Sha256
    name: KeyName
    scopes: Annotated[tuple[Scope, ...], Field(min_length=1, max_length=MAX_SCOPES)]
    valid_until: UtcTime | None = None
    rate_per_s: Rate | None = None
    is_revoked: bool = False

    def state(self, now: datetime) -> str:
        """In one word: revoked, expired or valid."""
        if self.is_revoked:
            return "revoked"
        is_over = self.valid_until is not None and now >= self.valid_until
        return "expired" if is_over else "valid"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, and for what he may ask.

    Args:
        token_id: Of his token; "" where none is asked for.
        name: Of his token.
    """

    token_id: str = ""
    name: str = ""
    scopes: tuple[str, ...] = ("admin",)
    rate_per_s: float | None = None

    def may(self, action: Action, task: str | None = None) -> bool:
        """Whether he may do that: to this task, or without one to any task at all."""
        if "admin" in self.scopes or action == "open":
            return True
        return any(_allows(scope, action, task) for scope in self.scopes)


ANYONE = Caller()


def new_token() -> tuple[str, str]:
    """A token that nobody has, and its id; the form lets scanners of leaked secrets find it."""
    token_id = secrets.token_hex(6)
    return f"hs_{token_id}_{secrets.token_hex(32)}", token_id


def digest_of_token(token: str) -> str:
    """What is known of a token where it is checked."""
    return hashlib.sha256(token.encode()).hexdigest()


def caller_of(
    token: str, tokens: Mapping[str, TokenChange], *, admin_sha256: str, now: datetime
) -> Caller:
    """Who has this token.

    Every token goes the same way, known or not: it is hashed once and two digests are compared in
    constant time. What is said of a token that is over is said only to who has it.

    Args:
        tokens: Every token that was ever made, by its id, as it is known now.
        admin_sha256: Of the token that a setting names; "" if it names none.

    Raises:
        NoAccessError: unknown, revoked or expired.
    """
    presented = digest_of_token(token[:MAX_TOKEN_LENGTH])
    known = tokens.get(token[3:15])
    is_admin = hmac.compare_digest(presented, admin_sha256 or NO_DIGEST)
    is_known = hmac.compare_digest(presented, known.sha256 if known else NO_DIGEST)
    if is_admin:
        return Caller(ADMIN_SETTING, ADMIN_SETTING)
    if known is None or not is_known:
        raise NoAccessError("The token is not one of this service's.")
    if known.state(now) != "valid":
        raise NoAccessError(f"The token {known.name} ({known.token_id}) is {known.state(now)}.")
    return Caller(known.token_id, known.name, known.scopes, known.rate_per_s)


def has_admin(tokens: Iterable[TokenChange], now: datetime) -> bool:
    """Whether somebody may make tokens now."""
    return any("admin" in token.scopes and token.state(now) == "valid" for token in tokens)


def scope_for(action: Action, task: str | None) -> str:
    """The scope that a caller lacks."""
    if action in {"predict", "push"}:
        return f"{action}:{task or 'TASK'}"
    return f"predict:{task or 'TASK'}" if action == "read" else action


def _allows(scope: str, action: Action, task: str | None) -> bool:
    kind, _, glob = scope.partition(":")
    if kind != action and not (action == "read" and kind in {"predict", "push", "rollback"}):
        return False
    return task is None or not glob or fnmatchcase(task, glob)
