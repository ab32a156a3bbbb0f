"""Access tokens for tests, and who has them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from serve.access import TokenChange, digest_of_token

NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)


def token_text(seed: int) -> str:
    """A token; the same seed makes the same."""
    return f"hs_{seed:012x}_{seed:064x}"


def bearer(seed: int) -> dict[str, str]:
    """The header of who has that token."""
    return {"authorization": f"Bearer {token_text(seed)}"}


def token_for(seed: int, *scopes: str, name: str = "", **fields: Any) -> TokenChange:
    """What the log says of the token of that seed."""
    return TokenChange(
        token_id=f"{seed:012x}",
        sha256=digest_of_token(token_text(seed)),
        name=name or f"token{seed}",
        scopes=scopes,
        **fields,
    )
