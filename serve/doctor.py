"""What `headstock doctor` says: one finding a check, with how to mend what is wrong."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Args:
        says: What is there; with numbers, so that "ok" can be believed.
        mend: What to do; empty if there is nothing to do.
    """

    check: str
    level: Literal["ok", "warning", "problem"]
    says: str
    mend: str = ""


def is_healthy(findings: Iterable[Finding]) -> bool:
    """Whether nothing found is a problem."""
    return all(finding.level != "problem" for finding in findings)
