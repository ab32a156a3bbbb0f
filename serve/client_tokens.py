"""What a client can ask about access tokens, and how it brings its own."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from datetime import datetime

from serve.access import digest_of_token, new_token
from serve.answers import AccessToken, AccessTokens
from serve.client_calls import path
from serve.client_sending import Ask, Steps


def headers(token: str) -> dict[str, str]:
    """How a token is brought; "" is none."""
    return {"authorization": f"Bearer {token}"} if token else {}


def tokens() -> Steps[AccessTokens]:
    """Every access token that was ever made, and whether one is asked for.

    Raises:
        ClientError: the service said no.
    """
    return (yield Ask("GET", "/tokens"))


def make_token(
    name: str,
    scopes: Sequence[str],
    *,
    until: datetime | None = None,
    rate_per_s: float | None = None,
    message: str = "",
) -> Steps[tuple[str, AccessToken]]:
    """Make an access token here, and tell the service its digest.

    Args:
        scopes: `predict:TASK`, `push:TASK` (with `*` and `?`), `rollback`, `metrics`, `admin`.
        until: When it ends; None: never.
        rate_per_s: Most requests of the whole fleet; None: no limit.

    Returns:
        The token, which nobody can show again, and what the service knows of it.

    Raises:
        ClientError: the service said no.
    """
    token, token_id = new_token()
    wanted = {
        "token_id": token_id,
        "sha256": digest_of_token(token),
        "name": name,
        "scopes": list(scopes),
        "valid_until": until and until.isoformat(),
        "rate_per_s": rate_per_s,
        "message": message,
    }
    about = {"content-type": "application/json", "idempotency-key": uuid.uuid4().hex}
    return token, (yield Ask("POST", "/tokens", content=json.dumps(wanted), headers=about))


def revoke_token(token_id: str, *, message: str = "") -> Steps[AccessToken]:
    """Let a token open nothing any more, for ever; returns when no replica takes it.

    Raises:
        ClientError: the service said no.
    """
    params, key = {"message": message}, {"idempotency-key": uuid.uuid4().hex}
    return (yield Ask("DELETE", path("tokens", token_id), params=params, headers=key))
