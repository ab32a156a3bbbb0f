"""Somebody has to be able to make the first token, where callers are asked for one."""

from __future__ import annotations

from datetime import UTC, datetime

from serve.access import has_admin
from serve.headlog import HeadLog
from serve.record import LogView
from serve.settings import ServeSettings


class NoTokenError(Exception):
    """Callers have to bring a token, and nobody could make one."""


def refuse_without_admin(settings: ServeSettings) -> None:
    """Do not start what nobody could enter.

    Raises:
        NoTokenError: neither the settings nor the head log have a valid admin token.
        StoreError: the log cannot be read.
    """
    if not settings.needs_tokens or settings.admin_sha256:
        return
    tokens = HeadLog(settings.store).follow(LogView()).tokens.values()
    if has_admin(tokens, datetime.now(UTC)):
        return
    raise NoTokenError(
        f"Callers of {settings.host} have to bring a token, and nobody could make one: "
        "the head log has no valid admin token. Set HEADSTOCK_ADMIN_TOKEN to what "
        "`openssl rand -hex 32` prints, and make tokens with it (headstock tokens new); or "
        "set HEADSTOCK_ACCESS=off if whoever reaches the port may do everything."
    )
