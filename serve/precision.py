"""Which variant of a trunk is served: its precision."""

from __future__ import annotations

from typing import Literal

from export.bundle import Precision, TrunkManifest


class PrecisionError(Exception):
    """The trunk has no variant of the precision that was asked for."""

    def __init__(self, wanted: Precision, manifest: TrunkManifest) -> None:
        super().__init__(
            f"Setting precision is {wanted}, but trunk {manifest.digest} has "
            f"{', '.join(manifest.precisions)} only. Export it with --precision {wanted}, or serve "
            "one that it has."
        )


def choose_precision(manifest: TrunkManifest, wanted: Precision | Literal["auto"]) -> Precision:
    """The precision asked for; "auto" is the one that the trunk's export picked.

    Raises:
        PrecisionError: the trunk has no such variant.
    """
    if wanted == "auto":
        return manifest.picked
    if wanted not in manifest.precisions:
        raise PrecisionError(wanted, manifest)
    return wanted
