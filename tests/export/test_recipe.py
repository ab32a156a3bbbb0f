"""Specification of export/recipe.py: a folder of pictures to a bundle, in every size."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from export import recipe
from export.bundle import ADAPTER, GOLDEN, TRUNK_ADAPTED
from export.errors import ExportError
from export.recipe import MadeHead, make_head
from export.trunk import TrunkReport
from models.backbones import Backbone
from models.comparison import Strategy


def make(trunk_folder: Path, strategy: Strategy) -> MadeHead:
    return make_head(
        "loop", trunk_folder, task="loop", strategy=strategy, width=2, seed=0, command="test",
        max_train=120,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("strategy", "kind"),
    [("head", "head"), ("ssf", "adapter"), ("lora", "adapter"), ("tail", "tail")],
)
def test_every_size_is_bundled_with_the_logits_that_it_has_in_pytorch(
    strategy: Strategy, kind: str, student: Backbone, trunk: TrunkReport, trunk_folder: Path
) -> None:
    """From training to golden samples: what was trained is what is shipped."""
    made = make(trunk_folder, strategy)

    golden = load(made.bundle.files[GOLDEN])
    with torch.no_grad():
        maps = student.prefix(student.normalise(golden["pictures"]))
        special = made.trained.special
        logits = special.tail(maps) if special else made.trained.head.head(student.suffix(maps))
    assert (made.bundle.manifest.kind, made.bundle.manifest.trunk) == (kind, trunk.digest)
    assert made.trained.strategy == strategy
    scale = max(1.0, float(logits.abs().max()))
    # A head amplifies what ONNX Runtime sums in another order; see `GOLDEN_TOLERANCE`.
    torch.testing.assert_close(golden["logits"], logits, atol=1e-3 * scale, rtol=0)


@pytest.mark.usefixtures("trunk")
def test_an_adapter_is_named_in_its_bundle(trunk_folder: Path) -> None:
    """Kind, rank and weights; its card compares it with the head alone."""
    made = make(trunk_folder, "lora")

    entry = made.bundle.manifest.adapter
    assert entry is not None
    assert (entry.kind, entry.width) == ("lora", 2)
    assert made.trained.special is not None
    assert made.trained.special.adapter is not None
    weights = load(made.bundle.files[ADAPTER])
    for key, values in made.trained.special.adapter[1].items():
        assert torch.equal(weights[key], values)
    card = made.bundle.files["card.md"].decode()
    assert "head\\_only\\_test" in card or "head_only_test" in card
    assert "against the head" in card


@pytest.mark.usefixtures("trunk")
def test_the_smallest_that_does_not_lose_is_bundled(
    trunk_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All are compared, one is shipped, and the card says by which rule."""
    quick = partial(recipe.compare_strategies, num_epochs=1)
    monkeypatch.setattr(recipe, "compare_strategies", quick)

    made = make_head(
        "loop", trunk_folder, task="loop", strategy="auto", seed=0, command="test", max_train=120
    )

    assert len(made.trained.rows) == 6
    assert made.trained.proposed == made.trained.strategy
    card = made.bundle.files["card.md"].decode()
    assert "is the smallest strategy that does not lose" in card


@pytest.mark.usefixtures("trunk")
def test_an_adapter_needs_a_trunk_with_sites(trunk_folder: Path, tmp_path: Path) -> None:
    """A trunk that was exported before there were adapters says what to do."""
    for name in ("trunk.json", "trunk.onnx", "student.safetensors"):
        (tmp_path / name).write_bytes((trunk_folder / name).read_bytes())
    text = (tmp_path / "trunk.json").read_text()
    (tmp_path / "trunk.json").write_text(_without(text, TRUNK_ADAPTED))

    with pytest.raises(ExportError, match=r"no trunk_adapted.onnx.*Export the student again"):
        make(tmp_path, "lora")


def _without(manifest: str, name: str) -> str:
    """The manifest as if this file had never been there."""
    record = json.loads(manifest)
    del record["files"][name]
    return json.dumps(record)
