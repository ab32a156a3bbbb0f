"""A head becomes a small graph, and with golden samples, card and manifest a bundle."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.numpy import load
from torch import Tensor, nn
from typing_extensions import override

from export import head as head_module
from export.bundle import CARD, GOLDEN, HEAD, TRUNK_GRAPH, Bundle, BundleError, Provenance
from export.errors import ExportError
from export.head import NUM_GOLDEN, bundle_head, export_head, spread
from export.parity import ParityError, open_session
from export.trunk import TrunkReport
from models.backbones import Backbone
from models.evaluate import share
from models.heads import CosineHead, LinearHead
from models.record import DataRecord
from serve.affine import recognise

LABELS = ("apple", "fig", "kiwi", "pear")
DATA = DataRecord(name="fruit", sha256="ab" * 32, num_pictures={"train": dict.fromkeys(LABELS, 25)})
METRICS = {"test": share(36, 40), "baseline_test": share(20, 40)}


def linear_head(num_features: int = 128) -> nn.Module:
    """An affine head with random weights."""
    head = LinearHead(num_features, len(LABELS))
    generator = torch.Generator().manual_seed(0)
    for parameter in head.parameters():
        nn.init.normal_(parameter, generator=generator)
    return head.eval()


def cosine_head(num_features: int = 128) -> nn.Module:
    """Prototypes with a scale."""
    head = CosineHead(num_features, len(LABELS))
    generator = torch.Generator().manual_seed(0)
    nn.init.normal_(head.centre, generator=generator)
    nn.init.normal_(head.prototypes, generator=generator)
    head.scale.fill_(12.0)
    return head.eval()


def small_network(num_features: int = 128) -> nn.Module:
    """A head with a hidden layer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.LayerNorm(num_features), nn.Linear(num_features, 16), nn.GELU(),
            nn.Dropout(0.5), nn.Linear(16, len(LABELS)),
        ).eval()  # fmt: skip


def torch_linear(num_features: int = 128) -> nn.Module:
    """PyTorch's own affine layer, wrapped."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(num_features, len(LABELS))).eval()


HEADS = [linear_head, cosine_head, small_network, torch_linear]


@functools.cache
def graph_of(make: Callable[[], nn.Module]) -> bytes:
    """The head's graph, traced once."""
    return export_head(make(), num_features=128)


def operators_of(graph: bytes) -> list[str]:
    """Operators in their order."""
    return [node.op_type for node in onnx.load_model_from_string(graph).graph.node]


# The graph


@pytest.mark.parametrize("num_rows", [1, 2, 7, 300])
@pytest.mark.parametrize("make", HEADS)
def test_logits_are_those_of_pytorch_for_any_number_of_rows(
    make: Callable[[], nn.Module], num_rows: int
) -> None:
    """Sums of 128 products in another order: 1e-5 of the scale is generous."""
    head = make()
    features = torch.randn(num_rows, 128, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = head(features).numpy()

    session = open_session(graph_of(make))
    found = np.asarray(session.run(["logits"], {"features": features.numpy()})[0])
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize("make", [linear_head, cosine_head, torch_linear])
def test_serving_packs_the_heads_that_are_affine(make: Callable[[], nn.Module]) -> None:
    """It knows linear and cosine heads from their graph, and multiplies as PyTorch does."""
    head = make()
    features = torch.randn(7, 128, generator=torch.Generator().manual_seed(1))
    packed = recognise(onnx.load_model_from_string(graph_of(make)))

    assert packed is not None
    with torch.no_grad():
        expected = head(features).numpy()
    # Sums of 128 products in another order.
    tolerance = 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(packed(features.numpy()), expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("make", HEADS)
def test_a_heads_graph_takes_features_and_gives_logits(make: Callable[[], nn.Module]) -> None:
    """Names, types and shapes are the contract with serving; only the rows are free."""
    session = open_session(graph_of(make))

    described = [
        (value.name, value.type, value.shape)
        for value in (*session.get_inputs(), *session.get_outputs())
    ]
    assert described == [
        ("features", "tensor(float)", ["rows", 128]),
        ("logits", "tensor(float)", ["rows", 4]),
    ]


@pytest.mark.parametrize("make", [linear_head, torch_linear])
def test_an_affine_head_is_one_gemm_of_its_own_weights(make: Callable[[], nn.Module]) -> None:
    """Logits = features W^T + b, read back from the graph."""
    head = make()
    graph = onnx.load_model_from_string(graph_of(make)).graph

    (node,) = graph.node
    assert node.op_type == "Gemm"
    attributes = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
    assert {"transA": 0, "alpha": 1.0, "beta": 1.0} | attributes == {
        "transA": 0, "transB": 1, "alpha": 1.0, "beta": 1.0,
    }  # fmt: skip
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    weight, bias = (parameter.detach().numpy() for parameter in head.parameters())
    assert node.input[0] == "features"
    np.testing.assert_array_equal(tensors[node.input[1]], weight)
    np.testing.assert_array_equal(tensors[node.input[2]], bias)


def test_a_cosine_head_needs_plain_arithmetic_only() -> None:
    """No operators that look at shapes, which serving would refuse."""
    assert operators_of(graph_of(cosine_head)) == [
        "Sub", "ReduceL2", "Clip", "Div", "Gemm", "Mul",
    ]  # fmt: skip


@pytest.mark.parametrize("make", HEADS)
def test_a_heads_graph_is_hardly_larger_than_its_weights(make: Callable[[], nn.Module]) -> None:
    """Ten thousand heads are kept in a process."""
    head = make()
    weight_bytes = sum(4 * tensor.numel() for tensor in head.state_dict().values())

    assert len(graph_of(make)) < weight_bytes + 1500


def test_dropout_is_gone() -> None:
    """It belongs to training."""
    assert operators_of(graph_of(small_network)) == [
        "LayerNormalization", "Gemm", "Gelu", "Gemm",
    ]  # fmt: skip


# Golden samples


def test_golden_pictures_are_spread_over_labels() -> None:
    """Each label once before any comes twice."""
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2, 3])

    picked = spread(labels, 6)
    assert sorted(labels[picked].tolist()) == [0, 0, 1, 1, 2, 3]
    assert len(set(picked)) == 6


def test_with_more_labels_than_golden_pictures_they_are_spread_evenly() -> None:
    """From the first label to the last."""
    labels = torch.arange(100).repeat(3)

    assert labels[spread(labels, 4)].tolist() == [0, 33, 66, 99]


def test_few_pictures_are_all_golden() -> None:
    """No picture is taken twice to fill up."""
    assert sorted(spread(torch.tensor([5, 5, 1]), 8)) == [0, 1, 2]


def test_without_pictures_there_are_no_golden_samples() -> None:
    """A bundle cannot be admitted without."""
    with pytest.raises(ExportError, match="no pictures for golden samples"):
        spread(torch.zeros(0, dtype=torch.int64), 8)


# Bundles


@pytest.fixture
def bundle_with(
    trunk: TrunkReport, trunk_folder: Path, pictures: Tensor, provenance: Provenance
) -> Callable[..., Bundle]:
    """Bundles a linear head for the session's trunk, with some arguments changed."""

    def bundle_changed(head: nn.Module | None = None, **changes: Any) -> Bundle:
        arguments: dict[str, Any] = {
            "task": "fruit",
            "labels": LABELS,
            "trunk": trunk.manifest,
            "trunk_graph": (trunk_folder / TRUNK_GRAPH).read_bytes(),
            "pictures": pictures,
            "picture_labels": torch.arange(len(pictures)) % len(LABELS),
            "data": DATA,
            "metrics": METRICS,
            "provenance": provenance,
        }
        return bundle_head(head or linear_head(), **arguments | changes)

    return bundle_changed


@pytest.fixture
def traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that look at what surrounds the graph of a linear head."""

    def give_traced(_head: nn.Module, *, num_features: int) -> bytes:
        assert num_features == 128
        return graph_of(linear_head)

    monkeypatch.setattr(head_module, "export_head", give_traced)


@pytest.mark.usefixtures("traced_once")
def test_a_bundle_says_what_it_is_of(
    bundle_with: Callable[..., Bundle], trunk: TrunkReport, provenance: Provenance
) -> None:
    """Every argument is found in the manifest."""
    manifest = bundle_with(link="sigmoid", temperature=1.5).manifest

    assert (manifest.task, manifest.labels, manifest.kind) == ("fruit", LABELS, "head")
    assert (manifest.link, manifest.temperature) == ("sigmoid", 1.5)
    assert (manifest.trunk, manifest.num_features) == (trunk.digest, 128)
    assert manifest.preprocessing == trunk.manifest.preprocessing
    assert manifest.data.model_dump() == DATA.model_dump()
    assert manifest.metrics["test"].value == 0.9
    assert manifest.metrics["test"].num_samples == 40
    assert manifest.provenance == provenance


@pytest.mark.parametrize("make", HEADS)
def test_golden_samples_reproduce_bit_for_bit_on_this_machine(
    bundle_with: Callable[..., Bundle], trunk_folder: Path, make: Callable[[], nn.Module]
) -> None:
    """They are pixels, so that a replica replays them through trunk and head."""
    bundle = bundle_with(make())
    golden = load(bundle.files[GOLDEN])
    trunk_session = open_session((trunk_folder / TRUNK_GRAPH).read_bytes())
    features = trunk_session.run(["features"], {"images": golden["pictures"]})[0]
    logits = open_session(bundle.files[HEAD]).run(["logits"], {"features": features})[0]

    assert golden["pictures"].shape == (NUM_GOLDEN, 32, 32, 3)
    np.testing.assert_array_equal(np.asarray(logits), golden["logits"])


@pytest.mark.usefixtures("traced_once")
def test_golden_samples_are_what_pytorch_computes(
    bundle_with: Callable[..., Bundle], student: Backbone
) -> None:
    """Backbone and head, end to end, within a tenth of the trunk's tolerance."""
    head = linear_head()
    golden = load(bundle_with(head).files[GOLDEN])
    with torch.no_grad():
        expected = head(student(torch.from_numpy(golden["pictures"]))).numpy()

    scale = max(1.0, float(np.abs(expected).max()))
    assert np.abs(golden["logits"] - expected).max() <= 1e-4 * scale


@pytest.mark.usefixtures("traced_once")
def test_golden_pictures_are_real_ones_of_every_label(
    bundle_with: Callable[..., Bundle], pictures: Tensor
) -> None:
    """Two of each of four labels."""
    golden = load(bundle_with().files[GOLDEN])["pictures"]
    places = [
        next(i for i, picture in enumerate(pictures.numpy()) if np.array_equal(picture, sample))
        for sample in golden
    ]

    assert sorted(place % len(LABELS) for place in places) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_bundling_twice_gives_the_same_digest(bundle_with: Callable[..., Bundle]) -> None:
    """With the same provenance, which holds the only clock."""
    assert bundle_with().digest == bundle_with().digest


@pytest.mark.usefixtures("traced_once")
def test_a_bundle_can_be_read_again(bundle_with: Callable[..., Bundle], tmp_path: Path) -> None:
    """As a folder and as a zip."""
    bundle = bundle_with()
    bundle.write(tmp_path)

    assert Bundle.of_folder(tmp_path).digest == bundle.digest
    assert Bundle.of_zip(bundle.to_zip()).digest == bundle.digest


@pytest.mark.usefixtures("traced_once")
def test_the_card_is_of_this_head(bundle_with: Callable[..., Bundle], trunk: TrunkReport) -> None:
    """The card's own tests look at the rest."""
    bundle = bundle_with(notes=("Two pictures were skipped.",))
    card = bundle.files[CARD].decode()

    assert trunk.digest in card
    assert f"{len(bundle.files[HEAD]):,} bytes" in card
    assert "- Two pictures were skipped." in card


def test_the_head_is_left_as_it_is(bundle_with: Callable[..., Bundle]) -> None:
    """Also in the middle of training."""
    head = small_network().train()
    before = copy.deepcopy(head.state_dict())
    bundle_with(head)

    assert head.training
    assert all(parameter.requires_grad for parameter in head.parameters())
    for key, tensor in head.state_dict().items():
        torch.testing.assert_close(tensor, before[key], rtol=0, atol=0)


# Refusals


def test_a_head_for_another_trunk_is_refused(bundle_with: Callable[..., Bundle]) -> None:
    """It takes another number of features."""
    with pytest.raises(ExportError, match="does not take the trunk's 128 features"):
        bundle_with(linear_head(64))


def test_labels_that_do_not_fit_the_head_are_refused(bundle_with: Callable[..., Bundle]) -> None:
    """The message has both numbers."""
    with pytest.raises(ExportError, match=r"gives \[4\] logits a row; there are 3 labels"):
        bundle_with(labels=LABELS[:3])


def test_a_graph_that_is_not_the_head_is_refused(
    bundle_with: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exporter is made to give another head's graph."""
    wrong = graph_of(cosine_head)

    def export_wrong(_head: nn.Module, *, num_features: int) -> bytes:
        assert num_features == 128
        return wrong

    monkeypatch.setattr(head_module, "export_head", export_wrong)
    with pytest.raises(ParityError, match="logits differ"):
        bundle_with()


def test_a_head_with_nan_is_refused(bundle_with: Callable[..., Bundle]) -> None:
    """NaN never leaves."""
    head = linear_head()
    with torch.no_grad():
        next(head.parameters())[0, 0] = float("nan")

    with pytest.raises(ParityError, match="not finite"):
        bundle_with(head)


@pytest.mark.usefixtures("traced_once")
def test_a_field_out_of_range_is_refused(bundle_with: Callable[..., Bundle]) -> None:
    """The bundle's format decides."""
    with pytest.raises(BundleError, match="task"):
        bundle_with(task="Fruit!")
    with pytest.raises(BundleError, match="temperature"):
        bundle_with(temperature=0.0)


def test_a_head_that_looks_at_other_rows_is_refused(bundle_with: Callable[..., Bundle]) -> None:
    """An answer must not depend on who else asks at the same moment."""

    class Centred(nn.Module):
        @override
        def forward(self, features: Tensor) -> Tensor:
            return (features - features.mean(dim=0))[:, : len(LABELS)]

    with pytest.raises(ParityError, match="mixes the rows"):
        bundle_with(Centred())
