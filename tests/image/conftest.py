"""The tiny trunk and heads for it."""

from __future__ import annotations

from tests.serve.conftest import engine, heads, make_bundle, trunk_folder, trunk_manifest

__all__ = ["engine", "heads", "make_bundle", "trunk_folder", "trunk_manifest"]
