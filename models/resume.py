"""Where a run stands, on disk, so that one that was interrupted goes on from there."""

from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch


@dataclass(frozen=True)
class Snapshot:
    """A file that holds the state after an epoch, for as long as the run is not done.

    Args:
        path: Its folder is made when the first epoch is done.
        run: Everything that decides on the result; a file of another run is of no use.
    """

    path: Path
    run: str

    def save(self, state: dict[str, Any]) -> None:
        """Replace the file in one step: a kill leaves the state of this epoch or of the one before.

        Args:
            state: Tensors, numbers and texts, in dicts and lists.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_name(f"{self.path.name}.new")
        torch.save({"run": self.run, "state": state}, unfinished)
        unfinished.replace(self.path)

    def load(self) -> dict[str, Any] | None:
        """The state, or None if there is none, or one of another run, or a damaged one."""
        try:
            # Tensors and plain values only: no code in the file is run.
            saved = torch.load(self.path, map_location="cpu", weights_only=True)
        except (UnpicklingError, RuntimeError, EOFError, OSError):
            return None
        return saved["state"] if saved["run"] == self.run else None

    def remove(self) -> None:
        """The run is done."""
        self.path.unlink(missing_ok=True)
