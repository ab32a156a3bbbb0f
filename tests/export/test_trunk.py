"""A student becomes one graph with normalisation inside, equal to PyTorch, in a whole folder."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from jaxtyping import UInt8
from numpy.typing import NDArray
from torch import Tensor, nn
from typing_extensions import override

from export import trunk as trunk_module
from export.bundle import (
    STUDENT,
    TRUNK_ADAPTED,
    TRUNK_GRAPH,
    TRUNK_MANIFEST,
    BundleError,
    Provenance,
    read_trunk_folder,
)
from export.errors import ExportError
from export.parity import ParityError, open_session
from export.trunk import TrunkReport, export_trunk, trunk_graph
from models.backbones import Backbone, build_backbone
from models.checkpoint import restore_backbone
from models.pictures import load_picture

BuildBackbone = Callable[..., Backbone]

# What training leaves behind if an export goes wrong, and what `as_strided` becomes.
UNWANTED = {"BatchNormalization", "Dropout", "Gather", "Range", "Identity", "Expand"}


@pytest.fixture
def session(trunk: TrunkReport, trunk_folder: Path) -> onnxruntime.InferenceSession:
    """The exported trunk as serving would run it."""
    assert trunk.graph_bytes
    return open_session((trunk_folder / TRUNK_GRAPH).read_bytes())


@pytest.fixture
def other_graph(build: BuildBackbone) -> bytes:
    """The graph of another student, traced once."""
    return _traced(build, 1)


@functools.cache
def _traced(build: BuildBackbone, seed: int) -> bytes:
    return trunk_graph(build("small32", seed=seed))


@pytest.fixture
def traced_once(build: BuildBackbone, student: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that look at what surrounds the graph: that of the student or of another."""
    weights = next(student.parameters())

    def give_traced(backbone: Backbone) -> bytes:
        return _traced(build, 0 if torch.equal(next(backbone.parameters()), weights) else 1)

    monkeypatch.setattr(trunk_module, "trunk_graph", give_traced)


def features_of(
    session: onnxruntime.InferenceSession, pictures: UInt8[Tensor, "batch height width 3"]
) -> NDArray[np.float32]:
    """Features as serving asks for them: without the prefix."""
    return np.asarray(session.run(["features"], {"images": pictures.numpy()})[0])


def torch_features(backbone: Backbone, pictures: Tensor) -> NDArray[np.float32]:
    """PyTorch's own answer."""
    with torch.no_grad():
        return backbone(pictures).numpy()


def relative_difference(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Largest difference as a share of the largest value."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


# The graph


def test_a_trunk_takes_pixels_and_gives_features_and_the_map_at_the_cut(
    session: onnxruntime.InferenceSession,
) -> None:
    """Names, types and shapes are the contract with serving; only the batch is free."""
    described = [
        (value.name, value.type, value.shape)
        for value in (*session.get_inputs(), *session.get_outputs())
    ]

    assert described == [
        ("images", "tensor(uint8)", ["batch", 32, 32, 3]),
        ("features", "tensor(float)", ["batch", 128]),
        ("prefix", "tensor(float)", ["batch", 64, 8, 8]),
    ]


@pytest.mark.parametrize("batch_size", [1, 2, 7, 32])
def test_features_are_those_of_pytorch_at_every_batch_size(
    session: onnxruntime.InferenceSession, student: Backbone, pictures: Tensor, batch_size: int
) -> None:
    """Float rounding only: measured 1e-6 of the features' scale."""
    batch = pictures[:batch_size]

    found = features_of(session, batch)
    assert found.shape == (batch_size, 128)
    assert relative_difference(found, torch_features(student, batch)) < 1e-5


def test_the_prefix_followed_by_the_suffix_gives_the_features(
    session: onnxruntime.InferenceSession, student: Backbone, pictures: Tensor
) -> None:
    """So a tail can go on from it."""
    images = {"images": pictures.numpy()}
    maps, features = session.run(["prefix", "features"], images)
    with torch.no_grad():
        continued = student.suffix(torch.from_numpy(np.asarray(maps))).numpy()

    assert relative_difference(continued, np.asarray(features)) < 1e-5


def test_a_picture_has_the_same_features_alone_and_in_a_batch(
    session: onnxruntime.InferenceSession, pictures: Tensor
) -> None:
    """Who else asks at the same moment must not matter."""
    together = features_of(session, pictures)
    alone = np.concatenate([features_of(session, pictures[i : i + 1]) for i in range(40)])

    assert relative_difference(alone, together) < 1e-6


@pytest.mark.parametrize("shape", [(1, 31, 32, 3), (1, 32, 32, 1), (1, 3, 32, 32)])
def test_pictures_of_another_size_are_refused_by_the_graph(
    session: onnxruntime.InferenceSession, shape: tuple[int, ...]
) -> None:
    """Height and width are fixed, so nothing is quietly computed on another scale."""
    with pytest.raises(Exception, match="Got invalid dimensions"):
        session.run(["features"], {"images": np.zeros(shape, dtype=np.uint8)})


@pytest.mark.parametrize(
    "name",
    [
        "squeezenet1_1",
        pytest.param("resnet18", marks=pytest.mark.slow),
        pytest.param("mobilenet_v2", marks=pytest.mark.slow),
        pytest.param("mobilenet_v3_small", marks=pytest.mark.slow),
        pytest.param("efficientnet_b0", marks=pytest.mark.slow),
        pytest.param("resnet50", marks=pytest.mark.slow),
    ],
)
def test_architectures_export_to_what_they_need_and_agree(
    build: BuildBackbone, name: str, tmp_path: Path, provenance: Provenance
) -> None:
    """Batch statistics are folded, pooling is one operator, and nothing of training is left."""
    backbone, folder = build(name, size_px=64), tmp_path
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (8, 64, 64, 3), dtype=torch.uint8, generator=generator)

    report = export_trunk(backbone, pictures, folder, provenance=provenance)
    model = onnx.load_model(folder / TRUNK_GRAPH)
    operators = Counter(node.op_type for node in model.graph.node)
    first_conv = [node.op_type for node in model.graph.node].index("Conv")
    assert not UNWANTED & operators.keys()
    assert first_conv <= 4  # Transpose, Cast, Sub, Div
    assert max(parity.largest_relative for parity in report.parity.values()) < 1e-5


def test_pictures_stay_bytes_until_their_axes_are_in_order(trunk_folder: Path) -> None:
    """Moving one byte a value is cheaper than moving four."""
    model = onnx.load_model(trunk_folder / TRUNK_GRAPH)

    assert [node.op_type for node in model.graph.node][:4] == ["Transpose", "Cast", "Sub", "Div"]


# Reproducible, and nothing of the machine in it


def test_a_student_exports_to_the_same_bytes_again(student: Backbone, trunk: TrunkReport) -> None:
    """The trunk's digest is the student's, not the run's."""
    again = hashlib.sha256(trunk_graph(student)).hexdigest()

    assert again == trunk.manifest.files[TRUNK_GRAPH].sha256


def test_a_student_in_training_mode_exports_the_same_and_stays_as_it_is(
    build: BuildBackbone, trunk: TrunkReport, pictures: Tensor, tmp_path: Path,
    provenance: Provenance,
) -> None:  # fmt: skip
    """Exporting in the middle of training has no side effect."""
    learning = build("small32").train()
    learning.prefix.eval()
    before = {key: tensor.clone() for key, tensor in learning.state_dict().items()}

    report = export_trunk(learning, pictures, tmp_path, provenance=provenance)
    assert report.digest == trunk.digest
    assert learning.training
    assert not learning.prefix.training
    assert all(parameter.requires_grad for parameter in learning.parameters())
    for key, tensor in learning.state_dict().items():
        torch.testing.assert_close(tensor, before[key], rtol=0, atol=0)


@pytest.mark.slow
def test_another_process_exports_the_same_bytes(trunk: TrunkReport) -> None:
    """With hashes in another order, which sets and dicts of the exporter may depend on."""
    code = (
        "import sys, hashlib; sys.path.insert(0, 'tests/export')\n"
        "import conftest, torch\n"
        "torch.set_num_threads(1)\n"
        "from export.trunk import trunk_graph\n"
        "build = conftest.build.__wrapped__()\n"
        "print(hashlib.sha256(trunk_graph(build('small32'))).hexdigest())"
    )

    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONHASHSEED": "7"},
    )  # fmt: skip
    assert done.stdout.strip() == trunk.manifest.files[TRUNK_GRAPH].sha256


def test_another_student_has_another_digest(other_graph: bytes, trunk: TrunkReport) -> None:
    """Same architecture, other weights."""
    other = hashlib.sha256(other_graph).hexdigest()

    assert other != trunk.manifest.files[TRUNK_GRAPH].sha256


def test_a_trunk_names_nothing_of_the_machine(trunk: TrunkReport, trunk_folder: Path) -> None:
    """Neither paths nor stack traces, in any file."""
    assert trunk.graph_bytes == (trunk_folder / TRUNK_GRAPH).stat().st_size
    for path in trunk_folder.iterdir():
        data = path.read_bytes()
        for trace in (b".py", b"site-packages", b'File "', bytes(Path.cwd()), bytes(Path.home())):
            assert trace not in data, (path.name, trace)


# The folder


def test_a_trunk_is_four_files(trunk: TrunkReport, trunk_folder: Path) -> None:
    """No weights in a fifth."""
    manifest, files = read_trunk_folder(trunk_folder)

    assert manifest == trunk.manifest
    assert set(files) == {TRUNK_GRAPH, TRUNK_ADAPTED, STUDENT}
    assert {path.name for path in trunk_folder.iterdir()} == {*files, TRUNK_MANIFEST}


def test_a_trunk_says_what_it_was_made_of(
    trunk: TrunkReport, student: Backbone, provenance: Provenance
) -> None:
    """Everything that a head needs to know of it."""
    manifest = trunk.manifest

    assert (manifest.backbone, manifest.cut) == ("small32", student.cut)
    assert manifest.num_features == 128
    assert manifest.preprocessing == student.preprocessing
    assert manifest.provenance == provenance
    assert manifest.golden_tolerance == {"fp32": 1e-3}


def test_the_students_weights_can_be_trained_on(
    trunk: TrunkReport, student: Backbone, pictures: Tensor, trunk_folder: Path
) -> None:
    """`student.safetensors` gives the backbone again, bit for bit."""
    restored = restore_backbone(trunk.manifest.backbone, trunk_folder / STUDENT)

    np.testing.assert_array_equal(
        torch_features(restored, pictures), torch_features(student, pictures)
    )


@pytest.mark.usefixtures("traced_once")
def test_an_older_trunk_is_replaced(
    build: BuildBackbone, pictures: Tensor, tmp_path: Path, provenance: Provenance
) -> None:
    """The same --out may be used again."""
    first = export_trunk(build("small32"), pictures, tmp_path, provenance=provenance)
    second = export_trunk(build("small32", seed=1), pictures, tmp_path, provenance=provenance)

    assert read_trunk_folder(tmp_path)[0].digest == second.digest != first.digest


@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize("broken", [TRUNK_GRAPH, STUDENT])
def test_an_export_that_breaks_off_leaves_no_trunk(
    student: Backbone, pictures: Tensor, tmp_path: Path, provenance: Provenance, broken: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Also where an older one was: never a mixture."""
    (tmp_path / TRUNK_MANIFEST).write_text("{}")
    write_bytes = Path.write_bytes

    def write_or_break(path: Path, data: bytes) -> int:
        if path.name == broken:
            write_bytes(path, data[: len(data) // 2])
            raise OSError("disk full")
        return write_bytes(path, data)

    monkeypatch.setattr(Path, "write_bytes", write_or_break)
    with pytest.raises(OSError, match="disk full"):
        export_trunk(student, pictures, tmp_path, provenance=provenance)

    with pytest.raises(BundleError, match="is not a trunk"):
        read_trunk_folder(tmp_path)


# Refusals


def test_a_graph_that_is_not_the_student_is_not_written(
    student: Backbone, pictures: Tensor, tmp_path: Path, provenance: Provenance,
    other_graph: bytes, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The exporter is made to give another student's graph."""

    def give_other(_backbone: Backbone) -> bytes:
        return other_graph

    monkeypatch.setattr(trunk_module, "trunk_graph", give_other)

    with pytest.raises(ParityError, match="is not what was trained"):
        export_trunk(student, pictures, tmp_path / "out", provenance=provenance)
    assert not (tmp_path / "out").exists()


class _OneWayTraced(nn.Module):
    """A layer that tracing and running take for two different things."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    @override
    def forward(self, maps: Tensor) -> Tensor:
        return self.layer(maps) * (0.9 if torch.compiler.is_exporting() else 1.0)


def test_a_student_that_cannot_be_traced_faithfully_is_refused(
    build: BuildBackbone, pictures: Tensor, tmp_path: Path, provenance: Provenance
) -> None:
    """A user's own network may depend on how it is run."""
    odd = build("small32")
    odd.suffix = _OneWayTraced(odd.suffix)

    with pytest.raises(ParityError, match="is not what was trained"):
        export_trunk(odd, pictures, tmp_path / "out", provenance=provenance)
    assert not (tmp_path / "out").exists()


class _Mixing(nn.Module):
    """Takes the batch's mean from every row, as batch statistics in training mode would."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    @override
    def forward(self, maps: Tensor) -> Tensor:
        features = self.layer(maps)
        return features - features.mean(dim=0)


def test_a_student_that_mixes_pictures_is_refused(
    build: BuildBackbone, pictures: Tensor, tmp_path: Path, provenance: Provenance
) -> None:
    """An answer must not depend on who else asks at the same moment."""
    odd = build("small32")
    odd.suffix = _Mixing(odd.suffix)

    with pytest.raises(ParityError, match="mixes the rows"):
        export_trunk(odd, pictures, tmp_path / "out", provenance=provenance)


def test_a_student_whose_training_diverged_is_refused(
    build: BuildBackbone, pictures: Tensor, tmp_path: Path, provenance: Provenance
) -> None:
    """NaN equals nothing, so there would be nothing to compare."""
    diverged = build("small32")
    with torch.no_grad():
        next(diverged.suffix.parameters()).fill_(float("nan"))

    with pytest.raises(ParityError, match="training may have diverged"):
        export_trunk(diverged, pictures, tmp_path / "out", provenance=provenance)


@pytest.mark.parametrize("shape", [(0, 32, 32, 3), (4, 33, 32, 3)])
def test_pictures_to_compare_on_are_needed_in_the_right_size(
    student: Backbone, tmp_path: Path, provenance: Provenance, shape: tuple[int, ...]
) -> None:
    """The message names the size."""
    pictures = torch.zeros(shape, dtype=torch.uint8)

    with pytest.raises(ExportError, match="at least one of 32 x 32 px"):
        export_trunk(student, pictures, tmp_path, provenance=provenance)


def test_a_report_is_plain_data(trunk: TrunkReport) -> None:
    """So that a command line can print it as JSON."""
    plain = {name: dataclasses.asdict(parity) for name, parity in trunk.parity.items()}

    assert json.loads(json.dumps(plain))["features"]["num_pictures"] == 40


# Real photos


@pytest.mark.slow
def test_imagenet_weights_agree_on_real_photos(
    shared: Path, tmp_path: Path, provenance: Provenance
) -> None:
    """MobileNetV2 on pictures of clothes, as serving decodes them."""
    weights = shared / "weights" / "mobilenet_v2_imagenet_trunk_rebn.pth"
    backbone, _ = build_backbone("mobilenet_v2", weights=weights)
    photos = sorted((shared / "data" / "clothing10" / "test").glob("*/*.jpg"))[::8]
    pictures = torch.stack(
        [
            torch.from_numpy(load_picture(photo.read_bytes(), backbone.preprocessing).copy())
            for photo in photos
        ]
    )

    report = export_trunk(backbone, pictures, tmp_path, provenance=provenance)
    assert report.parity["features"].num_pictures == len(photos) == 15
    assert report.parity["features"].largest_relative < 1e-5
    assert report.parity["features"].argmax_agreement == 1.0
