"""The held-out sample that a bundle brings for its task: pictures that no head learned from."""

import numpy as np
from jaxtyping import Int
from safetensors.torch import save
from torch import Tensor

from export.bundle import MAX_HELDOUT_BYTES, MAX_HELDOUT_PICTURES
from models.data import Split, to_batch
from models.multilabel import MultiLabelSplit
from models.pictures import Preprocessing

HEADER_BYTES = 4096  # more than safetensors takes for two tensors


def heldout_of(test: Split | MultiLabelSplit, preprocessing: Preprocessing, *, seed: int) -> bytes:
    """`heldout.safetensors`: some of the test split's pictures as serving decodes them.

    As many as the format's limits allow, each class (or set of labels) with its share of the split.

    Raises:
        DataError: a picture cannot be read any more.
    """
    picture_bytes = 3 * preprocessing.size_px**2 + 8
    num = min(MAX_HELDOUT_PICTURES, (MAX_HELDOUT_BYTES - HEADER_BYTES) // picture_bytes)
    classes = test.labels if isinstance(test, Split) else test.combinations
    places = stratified(classes, num, seed=seed)
    pictures = to_batch([test.pictures[place] for place in places], preprocessing)
    return save({"pictures": pictures, "labels": test.labels[places].long().contiguous()})


def stratified(labels: Int[Tensor, " pictures"], num_picked: int, *, seed: int) -> list[int]:
    """Places of so many pictures, or of all: of each class as many as its share, by chance which.

    Every n-th of the pictures, which stand class by class and in each class in random order.
    """
    classes = labels.numpy()
    shuffled = np.random.default_rng(seed).permutation(len(classes))
    by_class = shuffled[np.argsort(classes[shuffled], kind="stable")]
    num = min(num_picked, len(by_class))
    picks = (np.arange(num) + 0.5) * len(by_class) / max(1, num)
    return sorted(by_class[picks.astype(int)].tolist())
