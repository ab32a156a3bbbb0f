"""The Dockerfile's own steps, read from it and run without a container.

What it puts under `/opt`, `/src` and `/usr/local/bin` lands under a scratch folder instead. Steps
of Debian's package manager are left out, and so is what comes from other images: uv and Python are
this machine's.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MOVED = re.compile(r"(?<![\w./:-])/(?=(?:opt|src|usr/local/bin)\b)")


@dataclass(frozen=True)
class Instruction:
    """One line of a Dockerfile, continued lines joined."""

    name: str
    text: str

    @property
    def words(self) -> list[str]:
        """Its arguments, of either form: words or a JSON list."""
        return json.loads(self.text) if self.text.startswith("[") else shlex.split(self.text)


@dataclass
class Stage:
    """What stands between one FROM and the next."""

    base: str
    name: str
    steps: list[Instruction] = field(default_factory=list)

    def of(self, name: str) -> list[Instruction]:
        """Its instructions of one kind."""
        return [step for step in self.steps if step.name == name]


def read_instructions() -> Iterator[Instruction]:
    """Every instruction of the Dockerfile, in order."""
    text = re.sub(r"(?m)^\s*#.*\n", "", (ROOT / "Dockerfile").read_text())
    for line in text.replace("\\\n", " ").splitlines():
        if line.strip():
            name, _, rest = line.strip().partition(" ")
            yield Instruction(name, rest.strip())


def read_stages() -> dict[str, Stage]:
    """The stages by name."""
    stages: dict[str, Stage] = {}
    for step in read_instructions():
        if step.name == "FROM":
            base, _, name = step.words
            stages[name] = Stage(base, name)
        elif stages:
            list(stages.values())[-1].steps.append(step)
    return stages


@dataclass
class Scratch:
    """A folder that stands for the image's root, and the variables that its steps have set."""

    folder: Path
    python: Path
    variables: dict[str, str] = field(default_factory=dict)
    work: str = "/"
    skipped: list[str] = field(default_factory=list)

    def run(self, stage: Stage) -> None:
        """Run the steps of a stage, one after the other."""
        for step in stage.steps:
            match step.name:
                case "ENV" | "ARG":
                    self._set(step)
                case "WORKDIR":
                    self.work = step.text
                case "COPY":
                    self._copy(step)
                case "RUN":
                    self._run(step)
                case _:
                    pass

    def path(self, inside: str) -> Path:
        """Where a path of the image is here."""
        return Path(MOVED.sub(f"{self.folder}/", inside))

    def _set(self, step: Instruction) -> None:
        for word in step.words:
            name, _, value = word.partition("=")
            for known, already in {"PATH": os.environ["PATH"], **self.variables}.items():
                value = value.replace(f"${{{known}}}", already)
            self.variables[name] = MOVED.sub(f"{self.folder}/", value)

    def _copy(self, step: Instruction) -> None:
        *sources, target = step.words
        if sources[0].startswith("--from="):  # the stage's folder is this one's already
            self.skipped.append(f"COPY {step.text}")
            return
        for source in sources:
            base = self.path(f"{self.work}/")
            to = base / target / source if target.endswith("/") else base / target
            to.parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / source).is_dir():
                unwanted = shutil.ignore_patterns("__pycache__")
                shutil.copytree(ROOT / source, to, ignore=unwanted, dirs_exist_ok=True)
            else:
                shutil.copy(ROOT / source, to)

    def _run(self, step: Instruction) -> None:
        if step.text.startswith("apt-get"):
            self.skipped.append(f"RUN {step.text}")
            return
        work = self.path(f"{self.work}/")
        for needed in (work, self.path("/usr/local/bin/")):
            needed.mkdir(parents=True, exist_ok=True)
        # Bytecode and copies instead of links change nothing but the time this takes.
        quick = {"UV_COMPILE_BYTECODE": "0", "UV_LINK_MODE": "hardlink"}
        subprocess.run(
            ["/bin/sh", "-c", MOVED.sub(f"{self.folder}/", step.text)],
            check=True,
            capture_output=True,
            text=True,
            cwd=work,
            env=os.environ | self.variables | quick | {"UV_PYTHON": str(self.python)},
        )
