"""Which layers of a trunk INT8 hurts most."""

import numpy as np
from jaxtyping import Float, UInt8

from export.parity import open_session
from export.quantize import Ranges, Scheme, layers_of, quantize
from export.trial import features
from models.progress import Progress, ProgressCallback, unheard

MAX_GROUPS = 64  # of neighbouring layers, in networks with more


def injuries(
    graph: bytes,
    ranges: Ranges,
    scheme: Scheme,
    pictures: UInt8[np.ndarray, "pictures height width 3"],
    *,
    progress: ProgressCallback = unheard,
) -> list[tuple[float, tuple[str, ...]]]:
    """The error of the features when one layer alone is quantised, largest first.

    One alone, and not one left out: among fifty layers that each add a little, the absence of one
    is lost in the rest, while their own errors add up nearly as squares.

    Args:
        graph: From `prepare`.
        pictures: A few dozen of those that the ranges were found on.

    Returns:
        Relative error and names of the nodes, for each layer or group of neighbours.
    """
    layers = layers_of(graph)
    size = -(-len(layers) // MAX_GROUPS)
    groups = [sum(layers[start : start + size], ()) for start in range(0, len(layers), size)]
    expected = features(open_session(graph), pictures)
    found: list[tuple[float, tuple[str, ...]]] = []
    for group in groups:
        injured = quantize(graph, ranges, scheme, only_nodes=group)
        error = relative_error(expected, features(open_session(injured), pictures))
        found.append((error, group))
        progress(Progress("find layers that hurt", len(found), len(groups)))
    return sorted(found, reverse=True)


def relative_error(
    expected: Float[np.ndarray, "pictures num_features"],
    found: Float[np.ndarray, "pictures num_features"],
) -> float:
    """Length of the differences by length of the features, over all pictures."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
