"""Parity of the adapted graph with PyTorch: its identity slot, and adapters of every kind."""

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from export.adapter import FAMILY_OF, Adapter, banks_of
from export.parity import PARITY_TOLERANCE, Parity, compare, open_session
from models.adapters import AdaptedSuffix, AdapterKind, adapt
from models.backbones import Backbone

WIDTH = 3


def adapted_parity(
    backbone: Backbone,
    graph: bytes,
    pictures: UInt8[Tensor, "pictures height width 3"],
    *,
    tolerance: float = PARITY_TOLERANCE,
) -> dict[str, Parity]:
    """Compare the adapted graph with the plain suffix and with random adapters, in one batch.

    Args:
        backbone: In evaluation mode, on the CPU.

    Returns:
        For each family its identity, "low_rank identity", and every kind of adapter that it has.

    Raises:
        ParityError: out of tolerance, not finite, or the graph cannot be run.
    """
    session = open_session(graph)
    families = [output.name for output in session.get_outputs()]
    adapted = {
        kind: _random(backbone, kind, seed)
        for seed, (kind, family) in enumerate(FAMILY_OF.items())
        if family in families
    }
    banks = banks_of([Adapter(kind, suffix.weights()) for kind, suffix in adapted.items()])
    with torch.no_grad():
        maps = backbone.prefix(backbone.normalise(pictures))
        expected = {kind: suffix(maps).numpy() for kind, suffix in adapted.items()}
        plain = backbone.suffix(maps).numpy()
    image_of = np.arange(len(maps)).repeat(len(adapted) + 1)
    slot_of = np.tile(np.arange(len(adapted) + 1), len(maps))
    rows = session.run(
        families, {"prefix": maps.numpy(), "image_of": image_of, "slot_of": slot_of, **banks}
    )
    found = dict(zip(families, map(np.asarray, rows), strict=True))
    report: dict[str, Parity] = {}
    for family in families:
        name = f"{family} identity"
        report[name] = compare(name, plain, found[family][slot_of == 0], tolerance=tolerance)
    for slot, (kind, truth) in enumerate(expected.items(), start=1):
        rows_of_kind = found[FAMILY_OF[kind]][slot_of == slot]
        report[kind] = compare(kind, truth, rows_of_kind, tolerance=tolerance)
    return report


def _random(backbone: Backbone, kind: AdapterKind, seed: int) -> AdaptedSuffix:
    """An adapter that changes the features by about as much as training would."""
    suffix = adapt(backbone, kind, width=WIDTH, seed=seed)
    chance = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in suffix.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=chance))
    return suffix
