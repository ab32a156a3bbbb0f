"""A service that nobody could enter does not start."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from serve.first_token import NoTokenError, refuse_without_admin
from serve.headlog import HeadLog
from serve.record import LogView, Record
from serve.settings import ServeSettings
from tests.serve.holders import token_for


def settings_of(store: Path, **settings: Any) -> ServeSettings:
    """Settings of a service on that store."""
    return ServeSettings.model_validate({"store": str(store), **settings})


def test_a_service_that_nobody_could_enter_does_not_start(tmp_path: Path) -> None:
    """It says both ways out: a first token, or none at all."""
    with pytest.raises(NoTokenError, match="HEADSTOCK_ADMIN_TOKEN") as refused:
        refuse_without_admin(settings_of(tmp_path, host="0.0.0.0"))  # noqa: S104

    assert "HEADSTOCK_ACCESS=off" in str(refused.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"host": "127.0.0.1"},
        {"host": "192.0.2.1", "access": "off"},
        {"host": "192.0.2.1", "admin_token": "a" * 32},
    ],
)
def test_a_service_that_somebody_can_enter_starts(tmp_path: Path, settings: dict[str, str]) -> None:
    """Everybody on loopback or where it is said so, else who has the setting's token."""
    refuse_without_admin(settings_of(tmp_path, **settings))


@pytest.mark.parametrize(
    ("fields", "is_admitted"),
    [
        ({}, True),
        ({"is_revoked": True}, False),
        ({"valid_until": datetime(2020, 1, 1, tzinfo=UTC)}, False),
    ],
)
def test_an_admin_of_the_log_is_enough_while_his_token_is_valid(
    tmp_path: Path, fields: dict[str, Any], *, is_admitted: bool
) -> None:
    """The setting is for the first start only."""
    tip = LogView().tip
    token = token_for(1, "admin", **fields)
    HeadLog(str(tmp_path)).put_record(
        Record(number=1, kind="commit", previous=tip, writer="", written_at="", tokens=(token,))
    )
    asked = settings_of(tmp_path, access="on")
    if is_admitted:
        refuse_without_admin(asked)
        return
    with pytest.raises(NoTokenError):
        refuse_without_admin(asked)
