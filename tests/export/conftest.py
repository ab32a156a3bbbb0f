"""A small student, its exported trunk, and pictures to show it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from jaxtyping import UInt8
from torch import Tensor

from export.bundle import Provenance
from export.trunk import TrunkReport, export_trunk
from models.architectures import find_architecture
from models.backbones import Backbone
from models.pictures import Preprocessing

BuildBackbone = Callable[..., Backbone]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Sums keep their order, whatever the machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def provenance() -> Provenance:
    """A fixed origin, so that everything made with it is reproducible."""
    return Provenance(
        command="headstock export student --out trunk",
        created_at="2026-11-21T09:00:00+00:00",
        seed=0,
        versions={"torch": "2.12.1"},
    )


@pytest.fixture(scope="session")
def build() -> BuildBackbone:
    """Builds a backbone of random weights whose batch statistics are not the identity."""

    def build_backbone(name: str, *, size_px: int = 32, seed: int = 0) -> Backbone:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            architecture, reference = find_architecture(name)
            preprocessing = Preprocessing(
                size_px, size_px, architecture.preprocessing.mean, architecture.preprocessing.std
            )
            backbone = Backbone(
                replace(architecture, preprocessing=preprocessing), reference=reference
            ).train()
            with torch.no_grad():
                for _ in range(3):
                    backbone(torch.randint(0, 256, (4, size_px, size_px, 3), dtype=torch.uint8))
        return backbone.eval()

    return build_backbone


@pytest.fixture(scope="session")
def student(build: BuildBackbone) -> Backbone:
    """A student of 32 px."""
    return build("small32")


@pytest.fixture(scope="session")
def pictures() -> UInt8[Tensor, "pictures height width 3"]:
    """40 pictures of 32 px, from flat to noisy."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.rand(40, 32, 32, 3, generator=generator)
    colour = torch.rand(40, 1, 1, 3, generator=generator)
    share = torch.linspace(0, 1, 40).view(40, 1, 1, 1)
    return (255 * (share * noise + (1 - share) * colour)).round().to(torch.uint8)


@pytest.fixture(scope="session")
def trunk_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `trunk` is."""
    return tmp_path_factory.mktemp("trunk")


@pytest.fixture(scope="session")
def trunk(
    student: Backbone, pictures: Tensor, trunk_folder: Path, provenance: Provenance
) -> TrunkReport:
    """The student's trunk, written to `trunk_folder`."""
    return export_trunk(student, pictures, trunk_folder, provenance=provenance)
