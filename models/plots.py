"""The pictures of a report, as SVG data URIs: a page needs no network and no script for them."""

import base64
import io
import warnings
from collections.abc import Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from models.learning_curve import CurvePoint
from models.logbook import Curve
from models.metrics import CalibrationBin

INK, FAINT, BLUE, ORANGE = "#1f2430", "#c9ced8", "#2f6fde", "#e0812b"
MAX_NAMED = 30  # with more classes their names would be too small to read
MAX_COUNTED = 16
_STYLE = {
    "font.size": 10,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    # Text stays text: the reader's browser has letters that no font here has.
    "svg.fonttype": "none",
    "svg.hashsalt": "headstock",
}


def confusion_plot(counts: Sequence[Sequence[int]], labels: Sequence[str]) -> str:
    """Right labels downwards, named ones across; a row's shades are its shares."""
    num = len(labels)
    side = min(9.0, 2.5 + 0.42 * min(num, MAX_NAMED))
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(side, side), layout="constrained")
        axes = figure.add_subplot()
        shares = [[count / max(1, sum(row)) for count in row] for row in counts]
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        names = [_short(label) for label in labels] if num <= MAX_NAMED else []
        places = range(len(names))
        axes.set_xticks(places, names, rotation=45, ha="right", parse_math=False)
        axes.set_yticks(places, names, parse_math=False)
        axes.tick_params(length=0)
        axes.set_xlabel("named")
        axes.set_ylabel("right")
        if num <= MAX_COUNTED:
            for row, values in enumerate(counts):
                for column, count in enumerate(values):
                    colour = "white" if shares[row][column] > 0.5 else INK  # noqa: PLR2004
                    text = str(count) if count else ""
                    axes.text(column, row, text, ha="center", va="center", color=colour)
        return _uri(figure)


def learning_curve_plot(points: Sequence[CurvePoint]) -> str:
    """Accuracy with its interval over the number of pictures, which doubles."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(5.2, 3.2), layout="constrained")
        axes = figure.add_subplot()
        counts = [point.num_pictures for point in points]
        values = [point.accuracy.value for point in points]
        lows = [point.accuracy.low for point in points]
        highs = [point.accuracy.high for point in points]
        axes.fill_between(counts, lows, highs, color=BLUE, alpha=0.15, linewidth=0)
        axes.plot(counts, values, "o-", color=BLUE)
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.minorticks_off()
        axes.set_xlabel("pictures learned from")
        axes.set_ylabel("accuracy, cross-validated")
        axes.grid(axis="y", color=FAINT, linewidth=0.5)
        return _uri(figure)


def training_plot(curves: Sequence[Curve]) -> str:
    """Losses and accuracies of one stage over its epochs."""
    groups = {
        name: [curve for curve in curves if curve.name.endswith(name)]
        for name in ("loss", "accuracy")
    }
    kept = {name: members for name, members in groups.items() if members}
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(4.2 * len(kept), 3.0), layout="constrained")
        for place, (name, members) in enumerate(kept.items(), start=1):
            axes = figure.add_subplot(1, len(kept), place)
            for curve, colour in zip(members, (BLUE, ORANGE), strict=False):
                epochs = range(curve.first, curve.first + len(curve.values))
                axes.plot(epochs, curve.values, ".-", color=colour, label=curve.name)
            axes.set_xlabel("epoch")
            axes.set_ylabel(name)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.grid(axis="y", color=FAINT, linewidth=0.5)
            axes.legend(frameon=False)
        return _uri(figure)


def calibration_plot(bins: Sequence[CalibrationBin]) -> str:
    """Accuracy over confidence; the larger a dot, the more pictures."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(3.6, 3.2), layout="constrained")
        axes = figure.add_subplot()
        num = sum(one.num_pictures for one in bins)
        axes.plot([0, 1], [0, 1], color=FAINT, linestyle="--")
        axes.scatter(
            [one.confidence for one in bins],
            [one.accuracy for one in bins],
            s=[10 + 400 * one.num_pictures / num for one in bins],
            color=BLUE,
            alpha=0.7,
            linewidth=0,
        )
        _unit_square(axes)
        axes.set_xlabel("confidence")
        axes.set_ylabel("accuracy")
        return _uri(figure)


def _unit_square(axes: Axes) -> None:
    axes.set_xlim(-0.03, 1.03)
    axes.set_ylim(-0.03, 1.03)
    axes.set_aspect("equal")


def _short(label: str) -> str:
    return label if len(label) <= 18 else label[:17] + "…"  # noqa: PLR2004


def _uri(figure: Figure) -> str:
    """An image of its own, so that nothing in it can run or reach the page around it."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        # A label in letters that the font here lacks is measured a little wrong, no more.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode()
