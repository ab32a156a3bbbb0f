"""Settings from flags and variables: typed, and a wrong one is named with what was expected."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from serve.settings import ServeSettings, SettingsError, load_settings


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No variables but those of the test."""
    for variable in [name for name in os.environ if name.startswith("HEADSTOCK_")]:
        monkeypatch.delenv(variable)
    return monkeypatch


def test_flags_win_over_variables_and_these_over_defaults(clean: pytest.MonkeyPatch) -> None:
    """A flag that is not given (None) is no flag."""
    clean.setenv("HEADSTOCK_PORT", "9000")
    clean.setenv("HEADSTOCK_REPLICAS", "5")
    settings = load_settings(store="/s", replicas=3, port=None)

    assert (settings.replicas, settings.port, settings.host) == (3, 9000, "127.0.0.1")


def test_a_store_folder_is_meant_from_here(clean: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Replicas run in other folders; a URL is left as it is."""
    clean.chdir(tmp_path)

    assert load_settings(store="store").store == str(tmp_path / "store")
    assert load_settings(store="~/store").store == str(Path.home() / "store")
    assert load_settings(store="file:///store").store == "file:///store"


@pytest.mark.parametrize(
    ("variable", "closest"),
    [
        ("HEADSTOCK_PROT", "HEADSTOCK_PORT"),
        ("HEADSTOCK_MAX_BODY_BYTE", "HEADSTOCK_MAX_BODY_BYTES"),
        ("HEADSTOCK_STOR", "HEADSTOCK_STORE"),
    ],
)
def test_an_unknown_variable_names_the_closest_setting(
    clean: pytest.MonkeyPatch, variable: str, closest: str
) -> None:
    """A misspelt setting would otherwise be a default that nobody meant."""
    clean.setenv(variable, "1")

    with pytest.raises(SettingsError) as error:
        load_settings(store="/s")
    assert str(error.value) == (
        f"The variable {variable} is not a setting. Did you mean {closest}?"
    )


def test_a_variable_that_resembles_nothing_lists_what_is_known(clean: pytest.MonkeyPatch) -> None:
    """With every setting's name."""
    clean.setenv("HEADSTOCK_XYZZY", "1")

    with pytest.raises(SettingsError, match=r"Known are HEADSTOCK_STORE, .*HEADSTOCK_REPLICAS"):
        load_settings(store="/s")


@pytest.mark.parametrize(
    "variable",
    ["HEADSTOCK_SERVER", "HEADSTOCK_TOKEN", "HEADSTOCK_SHARED", "HEADSTOCK_KEY_PASSPHRASE"],
)
def test_the_variables_of_clients_and_tests_are_none_of_ours(
    clean: pytest.MonkeyPatch, variable: str
) -> None:
    """They may be set where a service is started."""
    clean.setenv(variable, "x")

    assert load_settings(store="/s").store == "/s"


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("port", "70000", "less than or equal to 65535"),
        ("port", "0", "greater than or equal to 1"),
        ("port", "http", "valid integer"),
        ("replicas", "0", "greater than 0"),
        ("min_replicas", "-1", "greater than or equal to 0"),
        ("max_replicas", "0", "greater than 0"),
        ("keep_replicas_s", "3601", "less than or equal to 3600"),
        ("swap_hold_s", "-1", "greater than 0"),
        ("max_body_bytes", "1.5", "valid integer"),
        ("store", "", "at least 1 character"),
    ],
)
def test_a_bad_value_names_its_setting_itself_and_what_was_expected(
    clean: pytest.MonkeyPatch, name: str, value: str, expected: str
) -> None:
    """The same for a variable as for a flag."""
    variable = f"HEADSTOCK_{name.upper()}"
    store = {} if name == "store" else {"store": "/s"}
    clean.setenv(variable, value)
    with pytest.raises(SettingsError, match=expected) as by_variable:
        load_settings(**store)
    clean.delenv(variable)
    with pytest.raises(SettingsError, match=expected) as by_flag:
        load_settings(**{**store, name: value})

    for error in (by_variable, by_flag):
        assert str(error.value).startswith(f"Setting {name} ({variable}) is {value!r}: ")


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (
            {"min_replicas": 3, "max_replicas": 2},
            "is '?2'?: .* min_replicas is 3, expected",
        ),
        ({"min_replicas": 1}, "is None: .* min_replicas is given, expected max_replicas beside it"),
        ({"replicas": 2, "max_replicas": 4}, "is '?4'?: .* replicas is 2, expected that or bounds"),
    ],
)
def test_bounds_of_the_replicas_that_do_not_fit_are_refused(
    clean: pytest.MonkeyPatch, given: dict[str, int], problem: str
) -> None:
    """Whether they are flags or variables; nothing is guessed."""
    with pytest.raises(SettingsError, match=problem):
        load_settings(store="/s", **given)
    for name, value in given.items():
        clean.setenv(f"HEADSTOCK_{name.upper()}", str(value))
    with pytest.raises(SettingsError, match=problem):
        load_settings(store="/s")


@pytest.mark.parametrize(
    ("given", "first", "most"),
    [
        ({}, 2, 2),
        ({"replicas": 5}, 5, 5),
        ({"max_replicas": 8}, 1, 8),
        ({"min_replicas": 3, "max_replicas": 8}, 3, 8),
        ({"min_replicas": 0, "max_replicas": 8}, 1, 8),
    ],
)
def test_replicas_to_start_with_and_at_most(
    clean: pytest.MonkeyPatch, given: dict[str, int], first: int, most: int
) -> None:
    """As they are read, and as they travel to every replica."""
    del clean
    settings = load_settings(store="/s", **given)
    there = ServeSettings.model_validate_json(settings.model_dump_json())

    assert (there.first_replicas, there.most_replicas) == (first, most)
    assert there.is_autoscaled == ("max_replicas" in given)
    assert there.may_sleep == (given.get("min_replicas") == 0)


def test_a_missing_store_says_how_to_give_it() -> None:
    """The one setting that has no default."""
    with pytest.raises(SettingsError) as error:
        load_settings()

    assert str(error.value) == (
        "Setting store (HEADSTOCK_STORE) is missing. Where the head log lives: a folder, or an "
        "s3://, gs:// or az:// URL."
    )


def test_the_admin_token_is_hashed_when_it_is_read(clean: pytest.MonkeyPatch) -> None:
    """Settings travel to every replica, through a runtime that keeps and shows them."""
    clean.setenv("HEADSTOCK_ADMIN_TOKEN", "secret" * 8)
    settings = load_settings(store="/s")
    there = ServeSettings.model_validate_json(settings.model_dump_json())

    assert settings.admin_sha256 == hashlib.sha256(b"secret" * 8).hexdigest()
    assert there.admin_sha256 == settings.admin_sha256
    assert load_settings(store="/s", admin_token=f"sha256:{'a' * 64}").admin_sha256 == "a" * 64
    for told in (repr(settings), str(settings), settings.model_dump_json()):
        assert "secret" not in told
    assert settings.admin_sha256 not in repr(settings)


def test_an_admin_token_that_could_be_guessed_is_refused_and_not_shown(
    clean: pytest.MonkeyPatch,
) -> None:
    """Nor is it in the cause, which --debug would show."""
    clean.setenv("HEADSTOCK_ADMIN_TOKEN", "swordfish")
    with pytest.raises(SettingsError) as error:
        load_settings(store="/s")

    assert "it has 9 characters, expected 32 or more" in str(error.value)
    assert "swordfish" not in str(error.value)
    assert error.value.__cause__ is None
    assert error.value.__suppress_context__
