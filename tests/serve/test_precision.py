"""Variants of one trunk: which is served, by what tolerance, and how it comes into the store."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from export.bundle import PRECISION_GRAPHS, Precision, TrunkManifest, entry_of
from serve import cli, gates
from serve.engine import Engine
from serve.headlog import HeadLog
from serve.precision import PrecisionError, choose_precision
from serve.record import TrunkChange
from serve.settings import ServeSettings
from serve.trunks import load_engine, store_trunk
from tests.serve.conftest import SIZE_PX, BundleMaker, trunk_graph
from tests.serve.graphs import constant_head
from tests.serve.harness import LocalFleet

PICTURES = np.full((1, SIZE_PX, SIZE_PX, 3), 255, np.uint8)
SCALES: dict[Precision, float] = {"fp32": 1 / 255, "int8": 2 / 255, "fp16": 3 / 255}


@pytest.fixture(scope="module")
def manifest(trunk_manifest: TrunkManifest) -> TrunkManifest:
    """The tiny trunk with variants that can be told apart: white is 1, 2 or 3."""
    return with_fields(
        trunk_manifest,
        golden_tolerance={"fp32": 1e-4, "int8": 0.5, "fp16": 1e-2},
        picked="int8",
        files={PRECISION_GRAPHS[p]: entry_of(trunk_graph(scale)) for p, scale in SCALES.items()},
    )


def with_fields(manifest: TrunkManifest, **fields: object) -> TrunkManifest:
    """The manifest with other fields, checked again."""
    return TrunkManifest.model_validate(manifest.model_dump() | fields)


def stored(log: HeadLog, manifest: TrunkManifest) -> TrunkChange:
    """The trunk with all its graphs, in the store."""
    files = {PRECISION_GRAPHS[precision]: trunk_graph(scale) for precision, scale in SCALES.items()}
    return store_trunk(log, manifest.model_dump_json().encode(), files)


def test_auto_is_what_the_export_picked(manifest: TrunkManifest) -> None:
    """The one measurement that knows is the export's."""
    assert choose_precision(manifest, "auto") == "int8"
    assert choose_precision(with_fields(manifest, picked="fp32"), "auto") == "fp32"
    assert choose_precision(manifest, "fp16") == "fp16"


def test_a_precision_that_the_trunk_lacks_names_those_that_it_has(
    trunk_manifest: TrunkManifest,
) -> None:
    """And how to get it."""
    with pytest.raises(PrecisionError) as error:
        choose_precision(trunk_manifest, "int8")
    assert str(error.value) == (
        f"Setting precision is int8, but trunk {trunk_manifest.digest} has fp32 only. Export it "
        "with --precision int8, or serve one that it has."
    )


def test_the_command_line_names_a_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The flag is the setting; nothing is started here."""

    def service(settings: ServeSettings, **_: object) -> None:
        raise RuntimeError(f"asked for {settings.precision}")

    monkeypatch.setattr("serve.service.Service", service)
    for flag, asked in (("", "auto"), ("--precision int8", "int8")):
        with pytest.raises(RuntimeError, match=f"asked for {asked}"):
            cli.app(["serve", "--store", str(tmp_path), *flag.split()], standalone_mode=False)


def test_each_precision_is_loaded_from_its_own_graph(
    tmp_path: Path, manifest: TrunkManifest
) -> None:
    """All variants are stored, so that a later start may choose another."""
    log = HeadLog(str(tmp_path))
    trunk = stored(log, manifest)

    for precision in manifest.precisions:
        features = load_engine(log, trunk, precision=precision).features(PICTURES)
        np.testing.assert_allclose(features, 255 * SCALES[precision], rtol=1e-6)


def test_golden_samples_are_judged_by_the_tolerance_of_the_precision_in_use(
    manifest: TrunkManifest, make_bundle: BundleMaker
) -> None:
    """A logit that is off by a third passes where half is allowed, and nowhere else."""
    logits = np.array([[1 / 3, 0.0, 0.0]], np.float32)
    data = save({"pictures": PICTURES, "logits": logits})
    bundle = make_bundle(graph=constant_head([0, 0, 0]), golden=data)
    verdicts: dict[Precision, bool] = {}
    for precision in manifest.precisions:
        engine = Engine(trunk_graph(), manifest, precision=precision)
        verdicts[precision] = gates.admit(bundle, engine, max_head_bytes=2**20)[-1].passed

    assert verdicts == {"fp32": False, "int8": True, "fp16": False}


def test_variants_of_the_live_trunk_can_be_installed_later(
    tmp_path: Path, trunk_folder: Path, manifest: TrunkManifest, make_bundle: BundleMaker
) -> None:
    """The next replica serves what the new manifest picked; the heads stay live."""
    with LocalFleet(tmp_path, trunk_folder, replicas=1) as fleet:
        fleet.push(make_bundle())
        trunk = stored(fleet.log, manifest)
        install = fleet.ask(lambda conductor: conductor.install_trunk(trunk))

        assert install.result(10) == manifest.digest
        late = fleet.start_replica()
        fleet.wait_admitted(late)
        assert fleet.replicas[late].engine.precision == "int8"
        assert fleet.replicas[late].history().live("colours") is not None


def test_another_trunk_is_not_installed_over_the_live_one(
    tmp_path: Path, trunk_folder: Path, manifest: TrunkManifest
) -> None:
    """Its heads would not fit."""
    with LocalFleet(tmp_path, trunk_folder, replicas=0) as fleet:
        other = stored(fleet.log, manifest).model_copy(update={"trunk": f"sha256:{'1' * 64}"})
        install = fleet.ask(lambda conductor: conductor.install_trunk(other))

        assert install.result(10) == manifest.digest
