"""Specification of models/report.py, report_page.py, plots.py, advice.py: what a run tells."""

import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from typing_extensions import override

from models.data import Picture, PictureData, Split
from models.logbook import Curve, Phase
from models.report import Report, TaskReport, report_task
from models.report_page import report_page, write_report

HOSTILE = '<script>alert(1)</script>"&{{ 7 * 7 }}$x_$'


def pictures(num: int, *, labels: tuple[str, ...] = ("apple", "pear")) -> PictureData:
    """Grey pictures, half of each class in every split."""
    each = tuple(
        Picture(np.full((16, 16, 3), row % 256, dtype=np.uint8), f"{row:064x}")
        for row in range(num)
    )
    split = Split(each, torch.arange(num) % 2)
    return PictureData("fruit", labels, split, split, split, "ab" * 32)


def logits(data: PictureData, *, num_wrong: int) -> Tensor:
    """Right but for the first pictures, of which each is surer than the next."""
    values = 3.0 * torch.nn.functional.one_hot(data.test.labels, 2).float()
    for row in range(num_wrong):
        values[row] = (9.0 - row) * (1 - values[row] / 3)
    return values


def told(data: PictureData, *, num_wrong: int = 3, rival_wrong: int = 10) -> TaskReport:
    return report_task(
        data, logits(data, num_wrong=num_wrong), metrics={},
        rivals={"pixels": logits(data, num_wrong=rival_wrong)}, seed=0,
    )  # fmt: skip


def whole(task: TaskReport) -> Report:
    return Report(
        kind="head", title=f"Head of {task.name}", facts={"trunk": HOSTILE}, tasks=(task,),
        phases=(Phase("features", 1.5),),
        curves=(
            Curve("lora", "training loss", 1, (2.0, 1.0)),
            Curve("lora", "validation accuracy", 1, (0.5, 0.75)),
        ),
        command="headstock head", seed=7, versions={"torch": "2"},
    )  # fmt: skip


class Page(HTMLParser):
    """Tags, texts and addresses of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.text = ""
        self.feed(html)

    @override
    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        assert not any(name.startswith("on") for name, _ in attrs)

    @override
    def handle_data(self, data: str) -> None:
        self.text += data


def test_mistakes_are_the_surest_first() -> None:
    """With what they are, and how sure the model was of either label."""
    data = pictures(40)

    first, second, third = told(data).mistakes

    assert [one.place for one in (first, second, third)] == [0, 1, 2]
    assert (first.right, first.named) == ("apple", "pear")
    expected = logits(data, num_wrong=3).double().softmax(-1)[0].tolist()
    assert [first.probability_of_right, first.probability] == pytest.approx(expected)


def test_a_report_reads_back_from_its_json(tmp_path: Path) -> None:
    """Every number of the page is in the file, and it is one value."""
    data = pictures(40)
    report = whole(told(data))

    write_report(tmp_path / "out", report, [data])

    text = (tmp_path / "out" / "report.json").read_text()
    assert Report.model_validate_json(text) == report
    assert json.loads(text)["tasks"][0]["scores"]["accuracy"]["value"] == 37 / 40


def test_the_page_needs_nothing_but_itself() -> None:
    """No script, and no address but the pictures that it holds."""
    data = pictures(40)

    page = Page(report_page(whole(told(data)), [data]))

    assert "script" not in page.tags
    assert len(page.sources) == 2 + 3 + 1  # confusion, calibration; mistakes; one training plot
    assert all(re.match(r"data:image/(svg\+xml|jpeg);base64,", one) for one in page.sources)


@pytest.mark.parametrize("place", ["labels", "name", "file", "notes"])
def test_names_and_labels_are_text_and_never_markup(place: str, tmp_path: Path) -> None:
    """A folder may be called anything; so may its files."""
    labels = (HOSTILE, "b") if place == "labels" else ("apple", "pear")
    data = pictures(20, labels=labels)
    if place == "name":
        data = dataclasses.replace(data, name=HOSTILE)
    if place == "file":
        file = tmp_path / f"{HOSTILE.replace('/', '')}.png"
        Image.new("RGB", (20, 30)).save(file)
        hostile = dataclasses.replace(data.test.pictures[0], source=file)
        test = Split((hostile, *data.test.pictures[1:]), data.test.labels)
        data = dataclasses.replace(data, test=test)
    task = told(data)
    if place == "notes":
        task = task.model_copy(update={"notes": (HOSTILE,), "verdict": HOSTILE})

    html = report_page(whole(task), [data])

    page = Page(html)
    assert "script" not in page.tags
    assert "alert(1)" in page.text
    assert "<script" not in html
    assert "49" not in [word.strip('"&$x_') for word in page.text.split()]


def test_the_page_says_what_the_report_says() -> None:
    """The verdict, the scores with intervals, the classes, and what to do."""
    data = pictures(40)
    task = told(data)

    text = " ".join(Page(report_page(whole(task), [data])).text.split())

    right = task.scores["macro_f1"]
    for fact in (
        task.verdict, "92.5 %", f"{right.value:.3f} {right.low:.3f} to {right.high:.3f}",
        "Fingerprint abab", "headstock head", "Seed 7", "1.5 s", *task.next_steps,
    ):  # fmt: skip
        assert fact in text, fact


def test_a_model_below_its_rival_is_not_to_be_shipped() -> None:
    """In the JSON as a flag, on the page in words."""
    data = pictures(40)
    task = told(data, num_wrong=10, rival_wrong=0)

    assert not task.is_fit_to_ship
    page = report_page(whole(task), [data])
    assert "Do not ship: negative transfer" in page
    assert 'class="verdict bad"' in page


def test_advice_names_a_weak_class_and_what_it_is_taken_for() -> None:
    """All wrong answers are of one class here."""
    data = pictures(40)
    values = logits(data, num_wrong=0)
    values[0:20:2] = torch.tensor([0.0, 9.0])
    task = report_task(data, values, metrics={}, rivals={"pixels": values}, seed=0)

    (weak,) = [step for step in task.next_steps if step.startswith("Look at")]

    assert "'apple': only 50% of its 20 test pictures" in weak
    assert "taken for 'pear' (10)" in weak


def test_advice_asks_for_test_pictures_where_the_interval_is_wide() -> None:
    """Wider than 10 points with 40 pictures, not with 4,000."""
    few, many = told(pictures(40)), told(pictures(4000))

    assert any(step.startswith("Add test pictures: with 40") for step in few.next_steps)
    assert not any(step.startswith("Add test pictures") for step in many.next_steps)


def test_advice_calls_overconfidence_by_its_name() -> None:
    """Sure of everything, and wrong in a third."""
    data = pictures(30)
    values = 30.0 * torch.nn.functional.one_hot(data.test.labels, 2).float()
    values[:10] = values[:10].flip(1)
    task = report_task(data, values, metrics={}, rivals={"pixels": values}, seed=0)

    assert any("surer than it is right (mean confidence 1.00" in step for step in task.next_steps)
