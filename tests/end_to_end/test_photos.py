"""Real photographs all the way: ImageNet weights, a teacher, a student of the user's own, HTTP."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from benchmarks.fixtures import serving
from export.recipe import MadeHead, make_head, make_trunk
from models.backbones import Backbone
from models.checkpoint import load_student
from models.data import Picture
from models.recipe import MadeStudent, MadeTeacher, fine_tuning, make_student, make_teacher
from serve.client import Client

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(900)]

TASKS = ("clothing10", "grocery_fruit8", "trash6")
NETS = Path(__file__).with_name("my_nets.py")
NUM_ASKED = 12  # pictures of each task that are compared, over HTTP and in PyTorch


@dataclass(frozen=True)
class Learned:
    """What the learning side made of the photographs."""

    teacher: MadeTeacher
    student: MadeStudent
    folder: Path
    heads: dict[str, MadeHead]


@pytest.fixture(scope="module")
def learned(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Learned:
    """A MobileNetV2 teacher of one task, a MobileNetV1-0.25 student, heads for three tasks."""
    folder = tmp_path_factory.mktemp("photos")
    data, weights = shared / "data", shared / "weights"
    teacher = make_teacher(
        str(data / "clothing10"), folder / "teacher", backbone="mobilenet_v2",
        weights=str(weights / "mobilenet_v2_imagenet_trunk_rebn.pth"),
        how=fine_tuning(num_epochs=2), augmentation=None, seed=0, command="test",
    )  # fmt: skip
    student = make_student(
        [folder / "teacher"], [str(data / "clothing10")], folder / "student",
        student=f"{NETS}:mobilenet_v1_025",
        weights=str(weights / "mobilenet_v1_0.25_128_tfpad_rebn.pth"),
        augmentation=None, seed=0, command="test", num_epochs=4,
    )  # fmt: skip
    make_trunk(folder / "student", folder / "trunk", command="test")
    heads = {
        task: make_head(str(data / task), folder / "trunk", task=task, seed=0, command="test")
        for task in TASKS
    }
    return Learned(teacher, student, folder, heads)


def test_published_weights_load_completely(learned: Learned) -> None:
    """Nothing of the trunks is left at random values."""
    assert learned.teacher.weights.is_trained
    assert learned.student.weights.is_trained
    assert not learned.teacher.weights.missing
    assert not learned.student.weights.missing


def test_teacher_student_and_heads_beat_a_linear_model_on_thumbnails(learned: Learned) -> None:
    """Transfer helps on photographs: even the lower ends of the intervals are above it."""
    teacher = learned.teacher.taught.metrics
    student = learned.student.distilled.metrics["clothing10/test"]

    assert teacher["test"].low > teacher["baseline_test"].value
    assert student.low > teacher["baseline_test"].value
    for made in learned.heads.values():
        metrics = made.trained.metrics
        assert metrics["test"].low > metrics["baseline_test"].value


def test_the_student_is_several_times_smaller_than_its_teacher(learned: Learned) -> None:
    """0.2 M parameters of features against 2.2 M."""
    (teacher_size,) = learned.student.teacher_parameters

    assert teacher_size >= 5 * learned.student.distilled.student.num_parameters


def test_predictions_over_http_equal_pytorch(learned: Learned, tmp_path: Path) -> None:
    """Decoded, batched, run by ONNX Runtime and carried as JSON, scores are those of PyTorch."""
    backbone = load_student(learned.folder / "student").backbone
    trunk = learned.folder / "trunk"
    with serving(tmp_path / "store", trunk=trunk) as service, Client(service["url"]) as client:
        for made in learned.heads.values():
            client.push(made.bundle)
        for made in learned.heads.values():
            for picture in made.data.test.pictures[:: len(made.data.test) // NUM_ASKED]:
                assert isinstance(picture.source, Path)
                answers = client.predict_tasks(TASKS, picture.source)
                features = _features(backbone, picture)

                assert [answer.task for answer in answers] == list(TASKS)
                for answer in answers:
                    asked = learned.heads[answer.task]
                    with torch.no_grad():
                        expected = asked.trained.head.head(features).softmax(dim=-1)[0]
                    found = torch.tensor([answer.scores[label] for label in asked.data.labels])
                    # Logits agree to 1e-4 of their scale (the export's own limit); a softmax
                    # shrinks differences of logits at least fourfold.
                    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def _features(backbone: Backbone, picture: Picture) -> torch.Tensor:
    images = torch.from_numpy(picture.pixels(backbone.preprocessing)[None].copy())
    with torch.no_grad():
        return backbone(images)
