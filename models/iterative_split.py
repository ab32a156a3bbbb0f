"""Splits that give every part its share of every label, of pictures with several labels."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor


def iterative_split(
    labels: Int[Tensor, "pictures labels"], shares: Sequence[float], *, seed: int
) -> NDArray[np.int64]:
    """Deal pictures, those of the rarest label first, to the part that lacks that label most.

    Args:
        labels: 0 or 1.
        shares: Of each part, adding up to 1; a part with share 0 gets nothing.

    Returns:
        For each picture the index of its part, int64 [pictures].

    Source: Sechidis, Tsoumakas & Vlahavas 2011, doi:10.1007/978-3-642-23808-6_10, algorithm 1.
    """
    has = labels.numpy().astype(bool)
    order = np.random.default_rng(seed).permutation(len(has))
    # Pictures that a part still lacks: in all [parts], and of each label [labels, parts].
    lacks = np.array(shares) * len(has)
    lacks_of = has.sum(axis=0)[:, None] * np.array(shares)
    part_of = np.full(len(has), -1, np.int64)
    is_part = np.array(shares) > 0
    while (waiting := order[part_of[order] < 0]).size:
        left = has[waiting].sum(axis=0)
        label = int(np.argmin(np.where(left > 0, left, len(has) + 1)))
        is_none_left = not left.any()
        for picture in waiting if is_none_left else waiting[has[waiting, label]]:
            of_label = lacks if is_none_left else lacks_of[label]
            part = max(np.flatnonzero(is_part), key=lambda one: (of_label[one], lacks[one]))
            part_of[picture] = part
            lacks[part] -= 1
            lacks_of[has[picture], part] -= 1
    return part_of
