"""Features on disk, so that the next head on the same pictures takes a second."""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from models.backbones import Backbone
from models.checkpoint import package_versions
from models.data import Picture, Split
from models.heads import features_of
from models.pictures import Preprocessing
from models.progress import Progress, ProgressCallback, unheard

# Features of 400,000 pictures from MobileNetV2.
MAX_CACHE_BYTES = 2 * 2**30
STAGE = "features"
_OURS = re.compile(r"[0-9a-f]{64}\.(safetensors|[0-9a-f]{32}\.part)")


def default_folder() -> Path:
    """`headstock/features` in the user's cache folder (XDG base directory specification)."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "headstock" / "features"


@dataclass(frozen=True)
class FeatureCache:
    """One file for each trunk and set of pictures; a user may remove any of them at any time.

    A file is taken only if it names what it is asked for and its content has the sha256 that it
    names; everything else is as if it were not there. Files are renamed into place, so that of two
    runs at once each reads a whole one.

    Args:
        folder: Where the files lie; made when the first is written.
        trunk: Digest of the trunk whose features these are.
        max_bytes: Of all files; those that were used longest ago are removed.
    """

    folder: Path
    trunk: str
    max_bytes: int = MAX_CACHE_BYTES

    def read(
        self, keys: Sequence[str], preprocessing: Preprocessing
    ) -> Float[Tensor, "pictures num_features"] | None:
        """Features of the pictures with these keys, in their order, or None."""
        name = self._name(keys, preprocessing)
        path = self.folder / f"{name}.safetensors"
        try:
            with safe_open(path, framework="pt") as file:
                said, features = file.metadata() or {}, file.get_tensor("features")
        except (OSError, SafetensorError):
            return None
        is_asked_for = said == {"name": name, "sha256": _sha256(features)}
        if not is_asked_for or features.ndim != 2 or len(features) != len(keys):  # noqa: PLR2004
            return None
        with suppress(OSError):
            os.utime(path)
        return features

    def write(
        self,
        keys: Sequence[str],
        preprocessing: Preprocessing,
        features: Float[Tensor, "pictures num_features"],
    ) -> None:
        """Keep features, unless they are too many for the cache.

        Raises:
            OSError: the folder cannot be written, or the disk is full.
        """
        name = self._name(keys, preprocessing)
        data = save({"features": features}, {"name": name, "sha256": _sha256(features)})
        if len(data) > self.max_bytes:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self._make_room(len(data))
        part = self.folder / f"{name}.{uuid4().hex}.part"
        try:
            part.write_bytes(data)
            part.replace(self.folder / f"{name}.safetensors")
        finally:
            part.unlink(missing_ok=True)

    def _make_room(self, num_bytes: int) -> None:
        """Remove the oldest until so much more fits."""
        files: list[tuple[float, int, Path]] = []
        for path in self.folder.iterdir():
            # Another run may have removed it just now.
            with suppress(FileNotFoundError):
                if _OURS.fullmatch(path.name):
                    found = path.stat()
                    files.append((found.st_mtime, found.st_size, path))
        excess = sum(size for _, size, _ in files) + num_bytes - self.max_bytes
        for _, size, path in sorted(files):
            if excess <= 0:
                return
            path.unlink(missing_ok=True)
            excess -= size

    def _name(self, keys: Sequence[str], preprocessing: Preprocessing) -> str:
        what = {
            "trunk": self.trunk,
            "preprocessing": [
                preprocessing.size_px,
                preprocessing.resize_px,
                *preprocessing.mean,
                *preprocessing.std,
            ],
            # Another version of the decoder or of PyTorch may round otherwise.
            "versions": package_versions(),
            "pictures": list(keys),
        }
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def features_by_split(
    backbone: Backbone,
    splits: Mapping[str, Sequence[Picture]],
    *,
    cache: FeatureCache | None,
    progress: ProgressCallback = unheard,
) -> dict[str, Float[Tensor, "rows num_features"]]:
    """Features of every split's pictures, out of the cache if they are there.

    All pictures go through the backbone in the order of their keys, whatever split they are in: so
    features that are read are those that would be computed, to the bit, and another seed finds
    them too.

    Returns:
        Split -> features, in the order of its pictures.
    """
    pictures = {picture.key: picture for split in splits.values() for picture in split}
    keys = sorted(pictures)
    features = cache.read(keys, backbone.preprocessing) if cache else None
    if features is None:
        every = Split(
            tuple(pictures[key] for key in keys), torch.zeros(len(keys), dtype=torch.long)
        )
        features = features_of(backbone, every, stage=STAGE, progress=progress)
        _keep(cache, keys, backbone.preprocessing, features, progress=progress)
    else:
        progress(Progress(STAGE, len(keys), len(keys), "from the cache"))
    place_of = {key: place for place, key in enumerate(keys)}
    return {
        name: features[torch.tensor([place_of[picture.key] for picture in split], dtype=torch.long)]
        for name, split in splits.items()
    }


def _keep(
    cache: FeatureCache | None,
    keys: Sequence[str],
    preprocessing: Preprocessing,
    features: Tensor,
    *,
    progress: ProgressCallback,
) -> None:
    """A cache that cannot be written costs time and nothing else."""
    if cache is None:
        return
    try:
        cache.write(keys, preprocessing, features)
    except OSError as error:
        progress(Progress(STAGE, len(keys), len(keys), f"not cached: {error}"))


def _sha256(features: Tensor) -> str:
    return hashlib.sha256(features.contiguous().numpy().tobytes()).hexdigest()
