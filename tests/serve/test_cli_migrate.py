"""`headstock migrate`: a new trunk under old tasks, or the tasks that stand in its way."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from export.bundle import Bundle, read_trunk_folder
from export.provenance import provenance_of
from export.recipe import make_head
from export.trunk import export_trunk
from models.backbones import Backbone, build_backbone
from models.digits import load_digit_task
from models.head_kinds import HeadKind
from serve.cli_migrate import Origin, origin_of
from serve.client import Client
from tests.serve.commands import Run
from tests.serve.harness import LocalFleet
from tests.serve.specialised import SpecialisedTrunk, some_pictures


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of light and dark pictures."""
    folder = tmp_path_factory.mktemp("photos")
    chance = np.random.default_rng(0)
    for number in range(40):
        label, level = ("dark", 60) if number % 2 else ("light", 200)
        (folder / label).mkdir(exist_ok=True)
        noise = chance.integers(-50, 50, (40, 40, 3))
        Image.fromarray((level + noise).astype(np.uint8)).save(folder / label / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def bundles(small_trunk: SpecialisedTrunk, photos: Path) -> dict[str, Bundle]:
    """Heads as `headstock head` makes them: two of digits by a strategy each, one of the folder."""
    asked: dict[str, tuple[str | Path, HeadKind]] = {
        "digits": ("digits", "cosine"),
        "loop": ("loop", "linear"),
        "light": (photos, "knn"),
    }
    made = {}
    for task, (source, strategy) in asked.items():
        command = f"headstock head {source} --trunk T --task {task} --out B --strategy={strategy}"
        made[task] = make_head(
            str(source), small_trunk.folder, task=task, strategy=strategy, seed=3, command=command
        ).bundle
    return made


@pytest.fixture
def fleet(tmp_path: Path, small_trunk: SpecialisedTrunk) -> Iterator[LocalFleet]:
    """One replica of the old trunk."""
    with LocalFleet(tmp_path / "store", small_trunk.folder, replicas=1) as fleet:
        yield fleet


@pytest.fixture
def _live_heads(connect: Callable[..., Client], bundles: dict[str, Bundle]) -> None:
    """All three are pushed, each with its held-out sample."""
    with connect() as client:
        for bundle in bundles.values():
            client.push(bundle)


def exported(folder: Path, change: Callable[[Backbone], None]) -> Path:
    """The small trunk with other weights."""
    backbone, _ = build_backbone("small32", weights=None, allow_untrained=True)
    with torch.no_grad():
        change(backbone)
    pictures = torch.from_numpy(some_pictures(8, seed=0))
    export_trunk(backbone, pictures, folder, provenance=provenance_of(command="test", seed=0))
    return folder


@pytest.fixture(scope="module")
def near(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trunk whose features are as good."""

    def shake(backbone: Backbone) -> None:
        for parameter in backbone.suffix.parameters():
            parameter.mul_(1.01)

    return exported(tmp_path_factory.mktemp("near"), shake)


@pytest.fixture(scope="module")
def dull(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trunk that tells little of a picture: one feature, and the others are always the same."""

    def blunt(backbone: Backbone) -> None:
        for parameter in backbone.suffix.parameters():
            if len(parameter) == backbone.num_features:
                parameter[1:] = 0

    return exported(tmp_path_factory.mktemp("dull"), blunt)


@pytest.fixture(scope="module")
def blind(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trunk that gives every picture the same features."""

    def close_eyes(backbone: Backbone) -> None:
        next(iter(backbone.prefix.parameters())).zero_()

    return exported(tmp_path_factory.mktemp("blind"), close_eyes)


def live(connect: Callable[..., Client]) -> tuple[str | None, dict[str, str | None]]:
    """The trunk, and the bundle of each task."""
    with connect() as client:
        told = client.tasks()
    return told["trunk"], {state["task"]: state["bundle"] for state in told["tasks"]}


@pytest.mark.usefixtures("_live_heads")
def test_every_task_is_learned_anew_and_all_go_live_with_the_trunk(
    run: Run, connect: Callable[..., Client], near: Path, tmp_path: Path, bundles: dict[str, Bundle]
) -> None:
    """By what each was learned from and by, which the new heads say again of themselves."""
    done = run("migrate", "--to", str(near), "--out", str(tmp_path / "heads"), "--json")
    told = json.loads(done.out)
    written = {task: Bundle.of_folder(tmp_path / "heads" / task) for task in bundles}

    assert done.code == 0
    trunk, _ = read_trunk_folder(near)
    assert live(connect) == (
        trunk.digest,
        {task: bundle.digest for task, bundle in written.items()},
    )
    assert {head["task"]: head["is_same_data"] for head in told["heads"]} == dict.fromkeys(
        bundles, True
    )
    for task, bundle in written.items():
        before = origin_of(bundles[task].manifest.model_dump(mode="json"), task)
        again = origin_of(bundle.manifest.model_dump(mode="json"), task)
        assert (again.source, again.strategy, again.seed) == (before.source, before.strategy, 3)
    test = load_digit_task("digits", seed=3).test
    source = test.pictures[0].source
    assert isinstance(source, np.ndarray)
    Image.fromarray(source).save(tmp_path / "digit.png")
    with connect() as client:
        assert client.predict("digits", tmp_path / "digit.png").version == 2


@pytest.mark.usefixtures("_live_heads")
def test_a_dry_run_asks_the_gates_and_changes_nothing(
    run: Run, connect: Callable[..., Client], near: Path, tmp_path: Path
) -> None:
    """The bundles are there to be pushed."""
    before = live(connect)
    done = run("migrate", "--to", str(near), "--out", str(tmp_path / "heads"), "--dry-run")

    assert done.code == 0
    assert "nothing was changed" in done.out
    assert live(connect) == before
    assert {path.name for path in (tmp_path / "heads").iterdir()} >= {"digits", "loop", "light"}


@pytest.mark.usefixtures("_live_heads")
def test_a_worse_trunk_is_refused_by_the_tasks_that_lose(
    run: Run, connect: Callable[..., Client], dull: Path, tmp_path: Path
) -> None:
    """Their gates say by how much."""
    before = live(connect)
    done = run("migrate", "--to", str(dull), "--out", str(tmp_path / "heads"))

    assert done.code == 1
    assert "The head is worse than what is live" in done.err
    assert live(connect) == before


@pytest.mark.usefixtures("_live_heads")
def test_a_task_that_cannot_be_learned_stands_in_the_way(
    run: Run, connect: Callable[..., Client], blind: Path, tmp_path: Path
) -> None:
    """And says why."""
    before = live(connect)
    done = run("migrate", "--to", str(blind), "--out", str(tmp_path / "heads"))

    assert done.code == 1
    assert "In the way: digits. Every picture has the same features" in done.err
    assert live(connect) == before


@pytest.mark.usefixtures("_live_heads")
def test_a_task_whose_data_is_gone_or_changed_stands_in_the_way(
    run: Run, connect: Callable[..., Client], near: Path, photos: Path, tmp_path: Path
) -> None:
    """Before anything is learned; with data that is named it goes on."""
    before, moved = live(connect), photos.with_name("moved")
    photos.rename(moved)
    try:
        gone = run("migrate", "--to", str(near), "--out", str(tmp_path / "heads"))
        for label in ("light", "dark"):
            (photos / label).mkdir(parents=True)
            for picture in list((moved / label).iterdir())[:10]:
                (photos / label / picture.name).write_bytes(picture.read_bytes())
        changed = run("migrate", "--to", str(near), "--out", str(tmp_path / "heads"))
        assert not (tmp_path / "heads").exists()
        named = run(
            "migrate", "--to", str(near), "--out", str(tmp_path / "heads"), "--dry-run",
            "--data", f"light={photos}", "--json",
        )  # fmt: skip
    finally:
        for picture in photos.glob("*/*"):
            picture.unlink()
        for folder in photos.iterdir():
            folder.rmdir()
        photos.rmdir()
        moved.rename(photos)

    assert (gone.code, changed.code) == (1, 1)
    assert f"In the way: light (its data is not at {photos})" in gone.err
    assert f"In the way: light (its data at {photos} has changed since)" in changed.err
    assert live(connect) == before
    assert named.code == 0
    assert {h["task"]: h["is_same_data"] for h in json.loads(named.out)["heads"]} == {
        "digits": True,
        "loop": True,
        "light": False,
    }


@pytest.mark.usefixtures("_live_heads")
@pytest.mark.parametrize(
    ("given", "expected"),
    [("cats=./cats", "--data names cats; live are"), ("./cats", "expected TASK=DATA")],
)
def test_data_that_fits_no_task_is_refused(
    run: Run, near: Path, tmp_path: Path, given: str, expected: str
) -> None:
    """A slip is no reason to learn from something else."""
    done = run("migrate", "--to", str(near), "--out", str(tmp_path), "--data", given)

    assert done.code == 1
    assert expected in done.err


def test_a_head_of_another_command_has_no_known_data(bundles: dict[str, Bundle]) -> None:
    """Its strategy is then the usual one."""
    manifest = bundles["loop"].manifest
    other = manifest.provenance.model_copy(update={"command": "python make_heads.py"})
    found = origin_of(
        manifest.model_copy(update={"provenance": other}).model_dump(mode="json"), "loop"
    )

    assert found == Origin(
        "loop", "", "head", 4, 3, manifest.data.sha256, manifest.metrics["test"].value
    )
