"""Tails: the last layers of one task, from the prefix map to logits, as one graph."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load
from torch import Tensor, nn

from export.bundle import GOLDEN, TAIL, TRUNK_GRAPH, Bundle, Provenance
from export.errors import ExportError
from export.parity import ParityError, open_session
from export.tail import bundle_tail
from export.trunk import TrunkReport
from models.backbones import Backbone
from models.heads import LinearHead
from models.record import DataRecord

LABELS = ("red", "green", "blue")


@pytest.fixture
def tail(student: Backbone) -> nn.Sequential:
    """The student's suffix, changed, with a head."""
    suffix, head = copy.deepcopy(student.suffix), LinearHead(student.num_features, len(LABELS))
    chance = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (*suffix.parameters(), *head.parameters()):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=chance))
    return nn.Sequential(suffix, head).eval()


def bundled(
    tail: nn.Module, pictures: Tensor, trunk: TrunkReport, folder: Path, provenance: Provenance
) -> Bundle:
    """A tail's bundle."""
    return bundle_tail(
        tail,
        task="colours",
        labels=LABELS,
        trunk=trunk.manifest,
        trunk_graph=(folder / TRUNK_GRAPH).read_bytes(),
        pictures=pictures,
        picture_labels=torch.arange(len(pictures)) % 3,
        data=DataRecord(name="none", sha256="0" * 64, num_pictures={}),
        metrics={},
        provenance=provenance,
    )


def test_a_tail_after_the_prefix_is_the_whole_fine_tuned_network(
    tail: nn.Sequential,
    student: Backbone,
    pictures: Tensor,
    trunk: TrunkReport,
    trunk_folder: Path,
    provenance: Provenance,
) -> None:
    """Prefix by the trunk's graph, tail by its own: logits are those of PyTorch in one piece."""
    bundle = bundled(tail, pictures, trunk, trunk_folder, provenance)
    prefix = open_session((trunk_folder / TRUNK_GRAPH).read_bytes())
    maps = prefix.run(["prefix"], {"images": pictures.numpy()})[0]
    logits = open_session(bundle.files[TAIL]).run(["logits"], {"prefix": maps})[0]
    with torch.no_grad():
        whole = tail(student.prefix(student.normalise(pictures))).numpy()

    np.testing.assert_allclose(np.asarray(logits), whole, atol=1e-4)
    assert bundle.manifest.kind == "tail"
    assert "tail" in bundle.files["card.md"].decode()


def test_its_golden_logits_are_its_own(
    tail: nn.Sequential,
    student: Backbone,
    pictures: Tensor,
    trunk: TrunkReport,
    trunk_folder: Path,
    provenance: Provenance,
) -> None:
    """And not those of the plain trunk with its head."""
    golden = load(bundled(tail, pictures, trunk, trunk_folder, provenance).files[GOLDEN])
    with torch.no_grad():
        maps = student.prefix(student.normalise(torch.from_numpy(golden["pictures"])))
        whole, plain = tail(maps).numpy(), tail[1](student.suffix(maps)).numpy()

    np.testing.assert_allclose(golden["logits"], whole, atol=1e-4)
    assert np.abs(golden["logits"] - plain).max() > 1e-2


def test_a_tail_that_does_not_fit_is_refused(
    student: Backbone,
    pictures: Tensor,
    trunk: TrunkReport,
    trunk_folder: Path,
    provenance: Provenance,
) -> None:
    """Other maps, or other labels."""
    with pytest.raises(ExportError, match="does not take the trunk's prefix maps"):
        bundled(nn.Conv2d(1, 3, 1), pictures, trunk, trunk_folder, provenance)
    with pytest.raises(ExportError, match="there are 3 labels"):
        bundled(student.suffix, pictures, trunk, trunk_folder, provenance)


def test_a_tail_whose_values_are_not_finite_is_refused(
    tail: nn.Sequential,
    pictures: Tensor,
    trunk: TrunkReport,
    trunk_folder: Path,
    provenance: Provenance,
) -> None:
    """Training may have diverged."""
    with torch.no_grad():
        next(tail[1].parameters()).fill_(float("nan"))
    with pytest.raises(ParityError, match="not finite"):
        bundled(tail, pictures, trunk, trunk_folder, provenance)
