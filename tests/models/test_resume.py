"""Specification of models/resume.py: a run that was killed goes on as if nothing had been."""

import dataclasses
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from models import recipe, transfer
from models.resume import Snapshot

# Teaches a few digits with all that is drawn at random or looks back. With "kill" it kills itself
# in the middle of an epoch; else it goes on, and then teaches the same without an interruption.
SCRIPT = """
import os, signal, sys
from pathlib import Path
import torch
from models import tuned
from models.augment import RANDAUGMENT
from models.backbones import build_backbone
from models.data import PictureData, Split
from models.digits import load_digit_task
from models.fine_tuning import fine_tuning
from models.resume import Snapshot
from models.transfer import teach
from safetensors.torch import save_file

folder, is_killed = Path(sys.argv[1]), sys.argv[2] == "kill"
torch.set_num_threads(1)
how = fine_tuning(
    "scratch", num_epochs=4, batch_size=20, dropout=0.2, mix="mixup", average_epochs=1.0,
    schedule="one-cycle",
)
digits = load_digit_task("digits", seed=0)
few = [
    Split(split.pictures[::20], split.labels[::20])
    for split in (digits.train, digits.validation, digits.test)
]
data = PictureData("digits", digits.labels, *few, fingerprint="0" * 64)
now = {"epoch": 0, "batches": 0}
prepare, loss = tuned.Tuned.prepare, tuned.Tuned.loss

def prepare_and_tell(self, epoch, **more):
    now.update(epoch=epoch, batches=0)
    print(epoch, end=" ", flush=True)
    prepare(self, epoch, **more)

def loss_or_death(self, batch):
    now["batches"] += 1
    if is_killed and (now["epoch"], now["batches"]) == (3, 2):
        os.kill(os.getpid(), signal.SIGKILL)
    return loss(self, batch)

tuned.Tuned.prepare, tuned.Tuned.loss = prepare_and_tell, loss_or_death
for name in ("broken", "whole"):
    net, _ = build_backbone("small32", weights=None, allow_untrained=True, seed=3)
    snapshot = Snapshot(folder / f"{name}.unfinished", "run")
    taught = teach(net, data, how, augmentation=RANDAUGMENT, seed=3, snapshot=snapshot)
    save_file(
        {**net.state_dict(), "head": taught.head.weight.detach()}, folder / f"{name}.safetensors"
    )
    print(taught.best_epoch, [epoch.loss for epoch in taught.epochs])
"""


def run(folder: Path, what: str) -> tuple[int, list[str]]:
    """Exit code and what was told: the epochs that were begun, then what came of them."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), what],
        check=False, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode in {0, -signal.SIGKILL}, done.stderr
    return done.returncode, done.stdout.splitlines()


def test_a_run_that_was_killed_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    """In the middle of an epoch, which is done again."""
    killed, before = run(tmp_path, "kill")
    left = [path.name for path in tmp_path.iterdir()]
    _, (resumed, whole) = run(tmp_path, "go on")

    assert (killed, before, left) == (-signal.SIGKILL, ["1 2 3 "], ["broken.unfinished"])
    assert resumed.startswith("3 4 ")
    assert whole == f"1 2 {resumed}"
    one, other = (tmp_path / f"{name}.safetensors" for name in ("broken", "whole"))
    assert one.read_bytes() == other.read_bytes()


def test_a_teachers_snapshot_is_beside_its_folder_and_of_its_run_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other settings would make another teacher of it."""
    used: list[Snapshot] = []

    def interrupted(*_args: Any, snapshot: Snapshot, **_more: Any) -> None:
        used.append(snapshot)
        raise KeyboardInterrupt

    monkeypatch.setattr(transfer, "teach", interrupted)
    for seed, epochs in ((0, 1), (0, 1), (1, 1), (0, 2)):
        with pytest.raises(KeyboardInterrupt):
            recipe.make_teacher(
                "loop", tmp_path / "teacher", backbone="small32", weights=None, augmentation=None,
                how=recipe.fine_tuning("scratch", num_epochs=epochs), seed=seed, command="",
            )  # fmt: skip

    assert {one.path for one in used} == {tmp_path / "teacher.unfinished"}
    assert used[0] == used[1]
    assert len({one.run for one in used}) == 3


@pytest.fixture
def snapshot(tmp_path: Path) -> Snapshot:
    return Snapshot(tmp_path / "new" / "run.unfinished", run="seed 1")


def test_what_was_saved_comes_back(snapshot: Snapshot) -> None:
    """Tensors to the bit, numbers as they were; the later state replaces the earlier one."""
    snapshot.save({"epoch": 1})
    snapshot.save({"epoch": 2, "weights": torch.tensor([0.1, -0.0]), "loss": 0.1})

    state = snapshot.load()

    assert state is not None
    assert (state["epoch"], state["loss"]) == (2, 0.1)
    assert state["weights"].numpy().tobytes() == torch.tensor([0.1, -0.0]).numpy().tobytes()


def test_a_snapshot_of_another_run_is_of_no_use(snapshot: Snapshot) -> None:
    """Its weights would have learned by other settings."""
    snapshot.save({"epoch": 1})

    assert dataclasses.replace(snapshot, run="seed 2").load() is None


@pytest.mark.parametrize("keep", [0, 10, 400])
def test_a_damaged_snapshot_starts_the_run_anew(snapshot: Snapshot, keep: int) -> None:
    """Whatever is left of it."""
    snapshot.save({"weights": torch.zeros(1000)})
    snapshot.path.write_bytes(snapshot.path.read_bytes()[:keep])

    assert snapshot.load() is None


def test_no_code_in_a_snapshot_is_run(snapshot: Snapshot, tmp_path: Path) -> None:
    """A pickle that would make a file makes none."""

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return Path.touch, (tmp_path / "run",)

    snapshot.save({"evil": Evil()})

    assert snapshot.load() is None
    assert not (tmp_path / "run").exists()


def test_a_finished_run_leaves_nothing(snapshot: Snapshot) -> None:
    """Removing is not an error where nothing was saved."""
    snapshot.remove()
    snapshot.save({})
    snapshot.remove()

    assert list(snapshot.path.parent.iterdir()) == []
