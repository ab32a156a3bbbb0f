"""Changes to the code that every process of a service runs, for tests that must see it fail."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

# Run by every Python process that finds it on its path, the replicas and the conductor among them.
SITE = """
import importlib.abc, importlib.util, sys

CHANGES = {changes!r}

class After(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name not in CHANGES:
            return None
        change = CHANGES.pop(name)
        spec = importlib.util.find_spec(name)
        loader = After()
        loader.spec, loader.change = spec, change
        return importlib.util.spec_from_loader(name, loader, origin=spec.origin)

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        self.spec.loader.exec_module(module)
        exec(self.change, vars(module))

sys.meta_path.insert(0, After())
"""


def sabotage(folder: Path, monkeypatch: pytest.MonkeyPatch, changes: Mapping[str, str]) -> None:
    """Have every process that starts from now on run this code after it imported that module."""
    folder.mkdir(parents=True)
    (folder / "sitecustomize.py").write_text(SITE.format(changes=dict(changes)))
    monkeypatch.setenv("PYTHONPATH", str(folder))
