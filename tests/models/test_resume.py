"""Specification of models/resume.py: a run that was killed goes on as if nothing had been."""

import dataclasses
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models.checkpoint import load_teacher
from models.resume import Snapshot

# Teaches a few digits with all that is drawn at random or looks back, and kills itself in the
# middle of an epoch if one is named.
SCRIPT = """
import dataclasses, os, signal, sys
from pathlib import Path
import torch
from models import recipe, tuned
from models.data import Split
out, killed_in = Path(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
prepare = tuned.Tuned.prepare
loss = tuned.Tuned.loss
now = {"epoch": 0, "batches": 0}

def every_eighth(split):
    return Split(split.pictures[::8], split.labels[::8])

def few_digits(source, **about):
    data = read_data(source, **about)
    few = {name: every_eighth(split) for name, split in data.splits.items()}
    return dataclasses.replace(data, **few)

read_data, recipe.read_data = recipe.read_data, few_digits

def prepare_and_count(self, epoch, **more):
    now.update(epoch=epoch, batches=0)
    print("epoch", epoch, flush=True)
    prepare(self, epoch, **more)

def loss_or_death(self, batch):
    now["batches"] += 1
    if now["epoch"] == killed_in and now["batches"] == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return loss(self, batch)

tuned.Tuned.prepare, tuned.Tuned.loss = prepare_and_count, loss_or_death
recipe.make_teacher(
    "parity", out, backbone="small32", weights=None, augmentation="randaugment", seed=3, command="",
    how=recipe.fine_tuning(
        "scratch", num_epochs=4, batch_size=40, dropout=0.2, mix="mixup", average_epochs=1.0,
        schedule="one-cycle",
    ),
)
"""


def teach(out: Path, *, killed_in: int = 0) -> tuple[int, list[str]]:
    """Exit code, and the epochs that were begun."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(out), str(killed_in)],
        check=False, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode in {0, -signal.SIGKILL}, done.stderr
    return done.returncode, done.stdout.splitlines()


def test_a_run_that_was_killed_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    """In the middle of an epoch, which is done again; then nothing is left of the interruption."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"

    _, all_epochs = teach(whole)
    code, before = teach(broken, killed_in=3)
    left = sorted(path.name for path in tmp_path.iterdir())
    _, after = teach(broken)

    assert code == -signal.SIGKILL
    assert left == ["broken.unfinished", "whole"]
    assert before == ["epoch 1", "epoch 2", "epoch 3"]
    assert after == ["epoch 3", "epoch 4"]
    assert all_epochs == ["epoch 1", "epoch 2", "epoch 3", "epoch 4"]
    name = "teacher.safetensors"
    assert (broken / name).read_bytes() == (whole / name).read_bytes()
    assert load_teacher(broken).record == load_teacher(whole).record
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "whole"]


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
