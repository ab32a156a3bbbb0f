"""Fixtures that several rooms share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("long", max_examples=1_000_000, deadline=None)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and weights beside the repository; tests skip where it is absent."""
    folder = Path(
        os.environ.get("HEADSTOCK_SHARED", Path(__file__).resolve().parents[2] / "shared")
    )
    if not (folder / "data").is_dir():
        pytest.skip(f"real data is not at {folder}; set HEADSTOCK_SHARED to the folder that has it")
    return folder
