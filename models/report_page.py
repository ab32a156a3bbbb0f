"""`report.html`: one page that needs nothing else, made of a report and its pictures."""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image, ImageOps

from models.data import PictureData
from models.metrics import SCORES
from models.plots import calibration_plot, confusion_plot, learning_curve_plot, training_plot
from models.report import Report, TaskReport

JSON, PAGE = "report.json", "report.html"
THUMBNAIL_PX = 112
MAX_CLASSES = 200

# Whatever is put into the template is escaped: names of files and labels are anybody's text.
_TEMPLATES = Environment(
    loader=PackageLoader("models", "."),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def write_report(folder: Path, report: Report, data: Sequence[PictureData]) -> None:
    """Write `report.json` and `report.html` into a folder, made if it is missing.

    Args:
        data: Of each task of the report, for the pictures that it shows.

    Raises:
        DataError: a picture cannot be read any more.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / JSON).write_text(report.model_dump_json(indent=2) + "\n")
    (folder / PAGE).write_text(report_page(report, data), encoding="utf-8")


def report_page(report: Report, data: Sequence[PictureData]) -> str:
    """The page as HTML."""
    stages = dict.fromkeys(curve.stage for curve in report.curves)
    return _TEMPLATES.get_template("report.html.jinja").render(
        report=report,
        tasks=[
            {"task": task, "plots": _plots(task), "thumbnails": _thumbnails(task, own)}
            for task, own in zip(report.tasks, data, strict=True)
        ],
        training={
            stage: training_plot([curve for curve in report.curves if curve.stage == stage])
            for stage in stages
        },
        total_seconds=sum(phase.seconds for phase in report.phases),
        scores=SCORES,
        max_classes=MAX_CLASSES,
    )


def _plots(task: TaskReport) -> Mapping[str, str]:
    plots = {
        "confusion": confusion_plot(task.confusion, task.labels),
        "calibration": calibration_plot(task.calibration),
    }
    if task.learning_curve:
        plots["learning_curve"] = learning_curve_plot(task.learning_curve)
    return plots


def _thumbnails(task: TaskReport, data: PictureData) -> list[str]:
    """A small square of every picture that the report calls a mistake, as data URIs."""
    return [_thumbnail(data.test.pictures[one.place].open(THUMBNAIL_PX)) for one in task.mistakes]


def _thumbnail(picture: Image.Image) -> str:
    file = io.BytesIO()
    size = (THUMBNAIL_PX, THUMBNAIL_PX)
    ImageOps.fit(picture.convert("RGB"), size).save(file, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
