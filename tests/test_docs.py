"""The documentation names what there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic.fields import FieldInfo
from typer.main import get_command

from serve.cli import app
from serve.console import settings_text
from serve.settings import ServeSettings
from serve.task_settings import TaskSettings
from tests.serve.every_metric import metric_names

ROOT = Path(__file__).parents[1]
SERVING = (ROOT / "docs" / "serving.md").read_text()
OBSERVABILITY = (ROOT / "docs" / "observability.md").read_text()
README = (ROOT / "README.md").read_text()


CONFORMANCE = re.findall(
    r"`(tests/[\w/]+\.py)::(test_\w+)`", (ROOT / "docs" / "open-inference-protocol.md").read_text()
)


def test_every_clause_of_the_protocol_names_a_test() -> None:
    """No line of the conformance table stands there without one."""
    text = (ROOT / "docs" / "open-inference-protocol.md").read_text()
    rows = text.partition("| clause | shown by |")[2].partition("\n\n")[0].splitlines()[2:]

    assert len(rows) > 30
    assert [row for row in rows if "::test_" not in row] == []


@pytest.mark.parametrize(("file", "test"), sorted(set(CONFORMANCE)))
def test_the_tests_that_the_conformance_table_names_are_there(file: str, test: str) -> None:
    """Under that name, in that file."""
    assert f"def {test}(" in (ROOT / file).read_text()


@pytest.mark.parametrize("setting", ServeSettings.model_fields)
def test_every_setting_is_documented_with_its_description(setting: str) -> None:
    """A setting's row carries the sentence of its definition."""
    description = ServeSettings.model_fields[setting].description

    assert any(
        line.startswith(f"| `{setting}` |") and line.endswith(f"| {description} |")
        for line in SERVING.splitlines()
    )


@pytest.mark.parametrize(("setting", "field"), TaskSettings.model_fields.items())
def test_every_setting_of_a_task_is_documented_with_its_default(
    setting: str, field: FieldInfo
) -> None:
    """A row carries the default as it is typed, and the sentence of its definition."""
    (row,) = [line for line in SERVING.splitlines() if line.startswith(f"| `{setting}` |")]

    _, _, default = settings_text({setting: field.default}).partition("=")
    assert row == f"| `{setting}` | {default} | {field.description} |"


@pytest.mark.parametrize("command", sorted(get_command(app).commands))  # pyrefly: ignore
def test_every_command_is_in_the_readme_and_has_an_example(command: str) -> None:
    """A user finds each command in the README, and an example in its help."""
    help_text = get_command(app).commands[command].epilog  # pyrefly: ignore

    assert f"`headstock {command}" in README
    assert f"Example: headstock {command}" in (help_text or "")


@pytest.mark.parametrize("metric", sorted(metric_names()))
def test_every_metric_is_documented_and_every_documented_one_exists(metric: str) -> None:
    """A row each, by the name under which it is scraped."""
    assert f"| `{metric}` |" in OBSERVABILITY
    assert set(re.findall(r"\| `(headstock_\w+)` \|", OBSERVABILITY)) == metric_names()
