"""What the benchmarks serve: MobileNetV3-small with untrained weights, a head, and a photograph."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from export.adapter import Adapter
from export.bundle import TRUNK_ADAPTED, TRUNK_GRAPH, Bundle, TrunkManifest, read_trunk_folder
from export.head import bundle_head
from export.provenance import provenance_of
from export.trunk import export_trunk
from models.adapters import adapt
from models.backbones import build_backbone
from models.heads import LinearHead
from models.pictures import Preprocessing, load_picture
from models.record import DataRecord

BACKBONE = "mobilenet_v3_small"
TARGET_BYTES = 12_000
LABELS = tuple(f"label{number}" for number in range(10))


def photograph() -> bytes:
    """A real photograph (scikit-learn's) of 256 x 256 px as a JPEG of about 12 kB."""
    square = Image.fromarray(load_sample_image("china.jpg")).crop((0, 0, 427, 427))
    picture = square.resize((256, 256), Image.Resampling.BILINEAR)
    files = []
    for quality in range(30, 96):
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=quality)
        files.append(buffer.getvalue())
    return min(files, key=lambda data: abs(len(data) - TARGET_BYTES))


def make_trunk(folder: Path, *, name: str = BACKBONE) -> TrunkManifest:
    """Export the untrained backbone."""
    backbone, _ = build_backbone(name, weights=None, allow_untrained=True)
    pictures = torch.from_numpy(_pictures(backbone.preprocessing, 4))
    provenance = provenance_of(command="benchmark", seed=0)
    return export_trunk(backbone, pictures, folder, provenance=provenance).manifest


def make_bundle(trunk: Path, *, task: str, seed: int, has_adapter: bool = False) -> Bundle:
    """A linear head with random weights; with an adapter, LoRA of rank 4 on the untrained trunk."""
    manifest, files = read_trunk_folder(trunk)
    head = LinearHead(manifest.num_features, len(LABELS))
    chance = torch.Generator().manual_seed(seed)
    torch.nn.init.normal_(head.weight, generator=chance)
    return bundle_head(
        head,
        task=task,
        labels=LABELS,
        trunk=manifest,
        trunk_graph=files[TRUNK_GRAPH],
        adapter=_adapter(seed) if has_adapter else None,
        adapted_graph=files[TRUNK_ADAPTED],
        pictures=torch.from_numpy(_pictures(manifest.preprocessing, 1)),
        picture_labels=torch.zeros(1, dtype=torch.int64),
        data=DataRecord(name="none", sha256="0" * 64, num_pictures={}),
        metrics={},
        provenance=provenance_of(command="benchmark", seed=seed),
    )


@contextlib.contextmanager
def running(*command: str) -> Iterator[dict[str, Any]]:
    """A program that prints one JSON line when it is ready; it is ended by SIGTERM."""
    with subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, text=True, env=_environment()
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise RuntimeError(f"{' '.join(command)} ended before it was ready.")
            yield json.loads(line)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=60)


def serving(store: Path, *, trunk: Path, replicas: int = 2) -> Any:
    """`headstock serve` as a user starts it."""
    options = ["--store", str(store), "--trunk", str(trunk), "--replicas", str(replicas)]
    main = "import serve.cli; serve.cli.main()"
    return running("-c", main, "serve", *options, "--port", str(free_port()), "--json")


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _adapter(seed: int) -> Adapter:
    backbone, _ = build_backbone(BACKBONE, weights=None, allow_untrained=True)
    weights = adapt(backbone, "lora", width=4, seed=seed).weights()
    chance = torch.Generator().manual_seed(seed)
    noisy = {n: w + 0.01 * torch.randn(w.shape, generator=chance) for n, w in weights.items()}
    return Adapter("lora", noisy)


def _pictures(preprocessing: Preprocessing, number: int) -> np.ndarray:
    return np.stack([load_picture(photograph(), preprocessing)] * number)


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("HEADSTOCK_")}
