"""The handbook: each alert has its page, and each disaster a test that exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import yaml

from serve.settings import ServeSettings

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "operations"
RULES = ROOT / "k8s" / "components" / "monitoring" / "prometheus-rules.yaml"
(GROUP,) = yaml.safe_load(RULES.read_text())["spec"]["groups"]
DISASTERS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (FOLDER / "disasters.md").read_text().splitlines()
    if line.startswith("| ") and not line.startswith(("| what dies", "| ---"))
]


def test_every_alert_has_a_section_and_no_other_has() -> None:
    """By its name."""
    sections = re.findall(r"^## (\w+)$", (FOLDER / "alerts.md").read_text(), re.MULTILINE)

    assert sorted(sections) == sorted(rule["alert"] for rule in GROUP["rules"])


@pytest.mark.parametrize("disaster", DISASTERS, ids=[cells[0] for cells in DISASTERS])
def test_every_disaster_is_shown_by_a_test(disaster: list[str]) -> None:
    """The last column names a file with tests, and one of them if it is one."""
    assert len(disaster) == 5
    file, _, function = disaster[-1].strip("`").partition("::")
    tests = {
        node.name: node
        for node in ast.parse((ROOT / "tests" / file).read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }

    assert tests
    assert not function or function in tests


@pytest.mark.parametrize("page", sorted(FOLDER.glob("*.md")), ids=lambda page: page.name)
def test_settings_that_the_handbook_names_exist(page: Path) -> None:
    """`HEADSTOCK_*` is a setting, or one of the two variables that are none."""
    named = set(re.findall(r"HEADSTOCK_[A-Z_]+\b", page.read_text()))
    known = {f"HEADSTOCK_{name.upper()}" for name in ServeSettings.model_fields}

    assert named <= known | {"HEADSTOCK_TOKEN", "HEADSTOCK_SERVER", "HEADSTOCK_ADMIN_TOKEN"}
