"""Which keys may sign for which tasks: what the log says of them, and what follows from it.

Pure: the log says who is trusted, the caller says what time it is.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from export.bundle import Digest, Sha256
from export.keys import KEY_NAME_PATTERN
from export.sign import UtcTime, key_id_of

# The clocks of those who sign may be wrong by so much; a later time would keep everybody else from
# pushing until it has come.
MAX_AHEAD = timedelta(minutes=10)
SHORT_ID = 12
MAX_GLOBS = 100

KeyName = Annotated[str, Field(pattern=KEY_NAME_PATTERN)]
TaskGlob = Annotated[str, Field(pattern=r"^[a-z0-9_*?-]{1,63}$")]


def _raw_key(text: str) -> str:
    if base64.b64encode(base64.b64decode(text, validate=True)).decode() != text:
        raise ValueError("it is not plain base64")
    return text


class UntrustedError(Exception):
    """No key, or one that may not sign this now."""


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class KeyChange(_Entry):
    """A key, as it is trusted from here on.

    Args:
        key_id: The sha256 of the raw public key.
        public_key: Its 32 raw bytes as base64.
        tasks: For which it may sign: names with `*` for any characters and `?` for one.
        valid_until: The first moment at which it may not sign any more; None: for ever.
    """

    key_id: Sha256
    public_key: Annotated[str, AfterValidator(_raw_key)]
    name: KeyName
    tasks: Annotated[tuple[TaskGlob, ...], Field(min_length=1, max_length=MAX_GLOBS)] = ("*",)
    valid_until: UtcTime | None = None
    is_revoked: bool = False

    @model_validator(mode="after")
    def _has_its_id(self) -> KeyChange:
        if self.key_id != key_id_of(self.raw):
            raise ValueError("key_id is not the sha256 of public_key")
        return self

    @property
    def raw(self) -> bytes:
        """The 32 bytes of the public key."""
        return base64.b64decode(self.public_key)

    def state(self, now: datetime) -> str:
        """In one word: revoked, expired or trusted."""
        if self.is_revoked:
            return "revoked"
        is_over = self.valid_until is not None and now >= self.valid_until
        return "expired" if is_over else "trusted"


class SignedBy(_Entry):
    """A signature that was verified.

    Args:
        envelope: Digest of the blob that holds `signature.json`.
    """

    key_id: Sha256
    signed_at: UtcTime
    envelope: Digest


def trusted_key(
    keys: Mapping[str, KeyChange], key_id: str, *, task: str, now: datetime
) -> KeyChange:
    """The key that a signature names, if it may sign for this task now.

    Args:
        keys: Every key that was ever trusted, by its id, as it is trusted now.

    Raises:
        UntrustedError: unknown, revoked, expired, or for other tasks.
    """
    short = key_id[:SHORT_ID]
    if key_id not in keys:
        raise UntrustedError(
            f"The bundle is signed by key {short}, which nobody has trusted; trusted are "
            f"{_names(keys, now)}. Sign with one of those, or trust this one."
        )
    key = keys[key_id]
    who = f"The bundle is signed by key {key.name} ({short}), which"
    if key.is_revoked:
        raise UntrustedError(f"{who} was revoked. Sign it with another key.")
    if key.valid_until is not None and now >= key.valid_until:
        raise UntrustedError(
            f"{who} was trusted until {key.valid_until:%Y-%m-%d %H:%M} UTC only. Sign it with "
            "another key, or trust this one for longer."
        )
    if not any(fnmatchcase(task, glob) for glob in key.tasks):
        raise UntrustedError(
            f"{who} may sign for {', '.join(key.tasks)} and not for {task}. Sign it with another "
            "key, or trust this one for more tasks."
        )
    return key


def unsigned_reason(keys: Mapping[str, KeyChange], now: datetime) -> str:
    """Why a bundle without a signature is refused, once a key was trusted."""
    return (
        "The bundle is not signed, and this service takes signed ones only; trusted are "
        f"{_names(keys, now)}. Push it with --key FILE."
    )


def valid_until(text: str) -> datetime:
    """A moment from a date, which means its first moment, or a time; UTC unless it says otherwise.

    Raises:
        ValueError: it is neither.
    """
    moment = datetime.fromisoformat(text)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _names(keys: Mapping[str, KeyChange], now: datetime) -> str:
    names = [
        f"{key.name} ({key.key_id[:SHORT_ID]})"
        for key in keys.values()
        if key.state(now) == "trusted"
    ]
    return ", ".join(sorted(names)) or "no keys at present"
