"""The adapted graph: rows of many adapters in one batch, against each alone and against PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load
from torch import Tensor, nn
from typing_extensions import override

from export.adapted import adapted_graph
from export.adapted_parity import adapted_parity
from export.adapter import FAMILY_OF, Adapter, banks_of
from export.bundle import ADAPTER, GOLDEN, HEAD, TRUNK_ADAPTED, TRUNK_GRAPH, Bundle, Provenance
from export.errors import ExportError
from export.head import bundle_head
from export.parity import ParityError, open_session
from export.trunk import TrunkReport
from models.adapters import AdapterKind, adapt, merged
from models.backbones import Architecture, Backbone
from models.heads import LinearHead
from models.pictures import Preprocessing
from models.record import DataRecord

KINDS: tuple[AdapterKind, ...] = ("lora", "adapter", "ssf", "bias")
Family = Literal["low_rank", "scale_shift"]


class Tokens(nn.Module):
    """A suffix of linear layers: on every pixel of a map, then on the largest values.

    Not on the mean: ONNX Runtime rounds a mean over a middle axis by the size of the batch.
    """

    def __init__(self) -> None:
        super().__init__()
        self.each = nn.Linear(6, 10)
        self.whole = nn.Linear(10, 7, bias=False)

    @override
    def forward(self, maps: Tensor) -> Tensor:
        """Maps [batch, 6, height, width] to features [batch, 7]."""
        tokens = self.each(maps.flatten(2).transpose(1, 2)).tanh()
        return self.whole(tokens.amax(dim=1)).relu()


def with_linear_layers() -> Backbone:
    """A backbone whose suffix is `Tokens`."""
    network = nn.Sequential(nn.Conv2d(3, 6, 4, 4), Tokens())
    preprocessing = Preprocessing(16, 16, mean=(127.5,) * 3, std=(127.5,) * 3)
    architecture = Architecture("tokens", network, network[0], network[1], "1", preprocessing)
    return Backbone(architecture, reference="tokens").eval()


def random_adapter(backbone: Backbone, kind: AdapterKind, seed: int, width: int) -> Adapter:
    """An adapter that changes features visibly."""
    suffix = adapt(backbone, kind, width=width, seed=seed)
    chance = torch.Generator().manual_seed(seed)
    weights = {
        name: weight + 0.2 * torch.randn(weight.shape, generator=chance)
        for name, weight in suffix.weights().items()
    }
    return Adapter(kind, weights)


def torch_features(backbone: Backbone, adapter: Adapter, maps: Tensor) -> NDArray[np.float32]:
    """What PyTorch computes, with the adapter merged into the weights where it can be."""
    with torch.no_grad():
        if adapter.kind != "adapter":
            return merged(backbone, adapter.kind, adapter.weights)(maps).numpy()
        suffix = adapt(backbone, "adapter", width=adapter.entry.width, seed=0)
        for name, weight in adapter.weights.items():
            site, _, part = name.rpartition("/")
            getattr(suffix.suffix.get_submodule(site), part).copy_(weight)
        return suffix(maps).numpy()


class Graph:
    """The adapted graph with adapters of one family in its banks, from slot 1 on."""

    def __init__(self, graph: bytes, family: str, adapters: list[Adapter]) -> None:
        self._session, self._family = open_session(graph), family
        self._feeds = banks_of(adapters)
        for given in self._session.get_inputs():
            if "/" in given.name or given.name == "slope":
                shape = [len(adapters) + 1 if isinstance(d, str) else d for d in given.shape]
                self._feeds.setdefault(given.name, np.zeros(shape, np.float32))

    def __call__(self, maps: Tensor, images: list[int], slots: list[int]) -> NDArray[np.float32]:
        """Features of the rows."""
        feeds = {
            "prefix": maps.numpy(),
            "image_of": np.array(images),
            "slot_of": np.array(slots),
            **self._feeds,
        }
        return np.asarray(self._session.run([self._family], feeds)[0])


@pytest.fixture(scope="module", params=["small32", "linear layers"])
def backbone(request: pytest.FixtureRequest, student: Backbone) -> Backbone:
    """One suffix of convolutions, one of linear layers."""
    return student if request.param == "small32" else with_linear_layers()


@pytest.fixture(scope="module")
def graph(backbone: Backbone) -> bytes:
    """Its adapted graph."""
    found = adapted_graph(backbone)
    assert found is not None
    return found


def maps_of(backbone: Backbone, number: int) -> Tensor:
    """Prefix maps of random pictures."""
    size_px = backbone.preprocessing.size_px
    pictures = torch.randint(0, 256, (number, size_px, size_px, 3), dtype=torch.uint8)
    with torch.no_grad():
        return backbone.prefix(backbone.normalise(pictures))


@pytest.mark.parametrize("family", ["low_rank", "scale_shift"])
def test_a_mixed_batch_is_each_row_alone_bit_for_bit_and_pytorch(
    backbone: Backbone, graph: bytes, family: Family
) -> None:
    """Random mixtures of tasks and pictures, kinds of one family side by side."""
    kinds = [kind for kind in KINDS if FAMILY_OF[kind] == family]
    adapters = [random_adapter(backbone, kinds[seed % 2], seed, width=4) for seed in range(6)]
    run = Graph(graph, family, adapters)
    maps = maps_of(backbone, 5)
    truths = [torch_features(backbone, adapter, maps) for adapter in adapters]
    chance = np.random.default_rng(0)
    for num_rows in (1, 2, 7, 24):
        images = chance.integers(0, 5, num_rows).tolist()
        slots = chance.integers(0, 7, num_rows).tolist()
        together = run(maps, images, slots)
        for row, (image, slot) in enumerate(zip(images, slots, strict=True)):
            alone = run(maps[image : image + 1], [0], [slot])
            np.testing.assert_array_equal(together[row], alone[0])
            if slot:
                np.testing.assert_allclose(together[row], truths[slot - 1][image], atol=1e-5)


@pytest.mark.parametrize("family", ["low_rank", "scale_shift"])
def test_slot_0_is_the_plain_suffix(backbone: Backbone, graph: bytes, family: Family) -> None:
    """Whatever the other slots hold."""
    kinds = [kind for kind in KINDS if FAMILY_OF[kind] == family]
    run = Graph(graph, family, [random_adapter(backbone, kinds[0], 1, width=3)])
    maps = maps_of(backbone, 4)
    with torch.no_grad():
        plain = backbone.suffix(maps).numpy()

    np.testing.assert_allclose(run(maps, [0, 1, 2, 3], [0] * 4), plain, atol=1e-5)
    assert np.abs(run(maps, [0, 1, 2, 3], [1] * 4) - plain).max() > 1e-3


def test_a_lower_rank_padded_with_zeros_changes_nothing(backbone: Backbone, graph: bytes) -> None:
    """Ranks share a bank; the columns that an adapter has not are zero."""
    adapter = random_adapter(backbone, "lora", 3, width=3)
    padded = Adapter("lora", {name: _wider(name, w) for name, w in adapter.weights.items()})
    maps = maps_of(backbone, 3)
    narrow = Graph(graph, "low_rank", [adapter])(maps, [0, 1, 2], [1] * 3)
    wide = Graph(graph, "low_rank", [padded])(maps, [0, 1, 2], [1] * 3)

    np.testing.assert_allclose(wide, narrow, atol=1e-6)


def _wider(name: str, weight: Tensor) -> Tensor:
    axis = 0 if name.endswith("/down") else 1
    shape = list(weight.shape)
    shape[axis] = 2
    return torch.cat([weight, torch.zeros(shape)], dim=axis)


def test_the_families_share_the_weights_of_the_suffix(
    student: Backbone, trunk_folder: Path, trunk: TrunkReport
) -> None:
    """Two suffixes in the file, one set of weights."""
    weights = sum(parameter.numel() for parameter in student.suffix.parameters())
    graph = (trunk_folder / TRUNK_ADAPTED).read_bytes()

    assert trunk.manifest.files[TRUNK_ADAPTED].size_bytes == len(graph)
    assert len(graph) < 1.2 * 4 * weights + 60_000


def test_the_trunks_digest_covers_the_adapted_graph(trunk: TrunkReport) -> None:
    """Adapters depend on it as heads on the plain one."""
    files = dict(trunk.manifest.files)
    files[TRUNK_ADAPTED] = files[TRUNK_GRAPH]

    assert trunk.manifest.model_copy(update={"files": files}).digest != trunk.digest


def test_a_fault_in_the_adapted_graph_is_found(student: Backbone, pictures: Tensor) -> None:
    """One weight of a shared layer nudged."""
    graph = adapted_graph(student)
    assert graph is not None
    model = onnx.load_model_from_string(graph)
    weight = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    values = onnx.numpy_helper.to_array(weight).copy()
    values.flat[::100] += 0.05
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))

    with pytest.raises(ParityError, match="not what was trained"):
        adapted_parity(student, model.SerializeToString(), pictures[:4])


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_bundled_with_its_head_and_golden_samples(
    kind: AdapterKind,
    student: Backbone,
    pictures: Tensor,
    trunk: TrunkReport,
    trunk_folder: Path,
    provenance: Provenance,
) -> None:
    """The golden logits are those of PyTorch with the adapter, not of the plain trunk."""
    adapter = random_adapter(student, kind, 5, width=2)
    head = LinearHead(student.num_features, 3)
    nn.init.normal_(head.weight)
    bundle = _bundle(head, adapter, pictures, trunk, trunk_folder, provenance)
    golden = load(bundle.files[GOLDEN])
    with torch.no_grad():
        maps = student.prefix(student.normalise(torch.from_numpy(golden["pictures"])))
        truth = head(torch.from_numpy(torch_features(student, adapter, maps))).numpy()

    assert bundle.manifest.kind == "adapter"
    assert bundle.manifest.adapter == adapter.entry
    assert set(bundle.files) >= {HEAD, ADAPTER}
    assert set(load(bundle.files[ADAPTER])) == set(adapter.weights)
    np.testing.assert_allclose(golden["logits"], truth, atol=1e-4)
    assert adapter.kind in bundle.files["card.md"].decode()


def test_an_adapter_for_a_trunk_without_sites_is_refused(
    student: Backbone,
    pictures: Tensor,
    trunk: TrunkReport,
    trunk_folder: Path,
    provenance: Provenance,
) -> None:
    """Said before anything is packed."""
    adapter = random_adapter(student, "lora", 5, width=2)
    head = LinearHead(student.num_features, 3)
    with pytest.raises(ExportError, match="serves no adapters"):
        _bundle(head, adapter, pictures, trunk, trunk_folder, provenance, has_sites=False)


def _bundle(
    head: LinearHead,
    adapter: Adapter,
    pictures: Tensor,
    trunk: TrunkReport,
    folder: Path,
    provenance: Provenance,
    *,
    has_sites: bool = True,
) -> Bundle:
    return bundle_head(
        head,
        task="colours",
        labels=("red", "green", "blue"),
        trunk=trunk.manifest,
        trunk_graph=(folder / TRUNK_GRAPH).read_bytes(),
        adapted_graph=(folder / TRUNK_ADAPTED).read_bytes() if has_sites else None,
        adapter=adapter,
        pictures=pictures,
        picture_labels=torch.arange(len(pictures)) % 3,
        data=DataRecord(name="none", sha256="0" * 64, num_pictures={}),
        metrics={},
        provenance=provenance,
    )
