"""The README's first command, on the real digits that come with scikit-learn."""

from __future__ import annotations

import re
import signal
import subprocess
from pathlib import Path

import httpx
import pytest

from tests.end_to_end.program import HEADSTOCK, clean_environment

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]  # 80 s on two free cores


def test_the_demo_tells_its_story_stays_up_and_leaves_nothing(tmp_path: Path) -> None:
    """Its own exit code covers swap, rollback, refusals and that nothing was dropped."""
    environment = clean_environment() | {"TMPDIR": str(tmp_path), "COLUMNS": "200"}
    with subprocess.Popen(
        [HEADSTOCK, "demo", "--stay"], env=environment, stdout=subprocess.PIPE, text=True
    ) as demo:
        assert demo.stdout is not None
        told, tasks = "", None
        for line in demo.stdout:
            told += line
            if found := re.search(r"stays up at (\S+);", line):
                tasks = httpx.get(f"{found[1]}/tasks").json()["tasks"]
                demo.send_signal(signal.SIGTERM)

    assert demo.returncode == 0
    assert tasks
    assert len(tasks) == 4
    assert re.search(r"dropped +│ 0 ", told)
    assert list(tmp_path.glob("headstock-demo-*")) == []
