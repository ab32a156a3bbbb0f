"""Fixtures that several rooms share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

END_TO_END = Path(__file__).parent / "end_to_end"

settings.register_profile("long", max_examples=1_000_000, deadline=None)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two at once for the whole suite: one takes what needs a cluster, the other the rest."""
    return 0 if config.args_source is pytest.Config.ArgsSource.ARGS else 2


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What starts clusters stays in one process: they share one, and ports and cores."""
    for item in items:
        if item.path.is_relative_to(END_TO_END):
            item.add_marker(pytest.mark.xdist_group("clusters"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and weights beside the repository; tests skip where it is absent."""
    folder = Path(
        os.environ.get("HEADSTOCK_SHARED", Path(__file__).resolve().parents[2] / "shared")
    )
    if not (folder / "data").is_dir():
        pytest.skip(f"real data is not at {folder}; set HEADSTOCK_SHARED to the folder that has it")
    return folder
