"""Print the licences of everything that is installed beside this interpreter, as Markdown.

Run by the Dockerfile; what the base image brings is listed in its /usr/share/doc/*/copyright.
"""

from __future__ import annotations

import sys
from importlib.metadata import Distribution, distributions
from pathlib import PurePosixPath

LICENCE_FILES = ("LICEN", "COPYING", "NOTICE", "AUTHORS")


def main() -> None:
    """One row a distribution, and where its licence texts are."""
    sys.stdout.write("| package | version | licence | texts |\n| --- | --- | --- | --- |\n")
    for found in sorted(distributions(), key=lambda found: found.name.lower()):
        texts = ", ".join(sorted(_texts(found))) or "none"
        sys.stdout.write(f"| {found.name} | {found.version} | {_licence(found)} | {texts} |\n")


def _licence(found: Distribution) -> str:
    """What the package says of itself, the most exact first."""
    if expressions := found.metadata.get_all("License-Expression"):
        return expressions[0]
    classifiers = found.metadata.get_all("Classifier") or []
    names = [c.rpartition(" :: ")[2] for c in classifiers if c.startswith("License ::")]
    if names:
        return ", ".join(dict.fromkeys(names))
    # Some put the whole text there.
    (text, *_) = found.metadata.get_all("License") or ["not stated"]
    return text.strip().partition("\n")[0]


def _texts(found: Distribution) -> set[str]:
    return {
        str(path)
        for path in map(PurePosixPath, found.files or ())
        if path.name.upper().startswith(LICENCE_FILES)
    }


if __name__ == "__main__":
    main()
