"""Serving starts in an image that has no torch: shown in a process where importing it fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.serve.oracle import Heads, expected_scores, some_picture

LEARNING = ("torch", "torchvision", "onnxscript", "sklearn", "jaxtyping", "matplotlib")

BLOCK = f"""
import importlib.abc
import sys

class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {LEARNING!r}:
            raise ImportError(f"{{name}} is not in the serving image")

sys.meta_path.insert(0, Block())
"""

IMPORT_EVERYTHING = """
import importlib
import pkgutil
import serve

names = ["export.bundle", "models.pictures"]
names += [found.name for found in pkgutil.walk_packages(serve.__path__, "serve.")]
for name in names:
    importlib.import_module(name)
print(*sorted(names))
"""

PREDICT = """
import sys
from pathlib import Path
from export.bundle import Bundle
from serve.jobs import Job
from tests.serve.harness import LocalFleet
from tests.serve.oracle import some_picture

store, trunk, bundle = map(Path, sys.argv[1:])
with LocalFleet(store, trunk, replicas=2) as fleet:
    fleet.must_push(Bundle.of_zip(bundle.read_bytes()))
    for replica in fleet.replicas.values():
        answers = replica.batcher.submit(Job([some_picture(0)], ("colours",))).result(10)
        print(answers[0][0].live.version, *answers[0][0].scores)
"""


def run(program: str, *arguments: object) -> list[str]:
    """The lines that a program prints in a process that cannot import what learning needs."""
    command = [sys.executable, "-c", BLOCK + program, *map(str, arguments)]
    root = Path(__file__).resolve().parents[2]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, cwd=root)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return ended.stdout.splitlines()


def test_every_module_of_serving_imports_without_what_learning_needs() -> None:
    """The command line and Ray's part too."""
    (names,) = run(IMPORT_EVERYTHING)

    expected = {"serve.engine", "serve.http.routes", "serve.app", "serve.cli", "models.pictures"}
    assert expected <= set(names.split())


def test_the_block_blocks() -> None:
    """Or the other tests here would show nothing."""
    lines = run("try:\n    import torch.nn\nexcept ImportError as error:\n    print(error)")

    assert lines == ["torch is not in the serving image"]


def test_a_fleet_pushes_and_predicts_without_what_learning_needs(
    tmp_path: Path, trunk_folder: Path, heads: Heads
) -> None:
    """The whole way, from the bundle to the scores."""
    (tmp_path / "bundle.zip").write_bytes(heads(1).to_zip())
    lines = run(PREDICT, tmp_path / "store", trunk_folder, tmp_path / "bundle.zip")

    truth = expected_scores(some_picture(0), 1)
    assert len(lines) == 2
    for line in lines:
        version, *scores = map(float, line.split())
        assert version == 1
        assert abs(truth - scores).max() < 1e-5
