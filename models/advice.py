"""What to do next, in words, from what a test split and a learning curve say."""

from collections.abc import Iterator

from models.learning_curve import CurvePoint
from models.metrics import CalibrationBin, Judgement

# An interval wider than this cannot tell apart models that differ by what people argue about.
WIDE_POINTS = 10.0
WEAK_RECALL_BELOW = 0.15
LARGE_CALIBRATION_ERROR = 0.1


def advice(
    judged: Judgement, curve: tuple[CurvePoint, ...], *, num_skipped: int
) -> tuple[str, ...]:
    """Sentences, the most useful first.

    Args:
        num_skipped: Files that were left out.
    """
    return tuple(
        sentence
        for part in (
            _of_curve(curve),
            _of_classes(judged),
            _of_width(judged),
            _of_calibration(judged),
            _of_skipped(num_skipped),
        )
        for sentence in part
    )


def _of_curve(curve: tuple[CurvePoint, ...]) -> Iterator[str]:
    if len(curve) < 2 or (gained := curve[-1].gained) is None:  # noqa: PLR2004
        return
    points = 100 * gained.value.value
    low, high = 100 * gained.value.low, 100 * gained.value.high
    interval = f"{points:+.1f} points [{low:+.1f}, {high:+.1f}]"
    last = f"from {curve[-2].num_pictures} to {curve[-1].num_pictures} pictures"
    if gained.value.low > 0:
        yield (
            f"Add pictures: the last doubling ({last}) gained {interval}, so more are likely to "
            "help."
        )
    elif high > 1:
        yield f"More pictures may help: the last doubling ({last}) changed accuracy by {interval}."
    else:
        yield (
            f"More pictures of the same kind would hardly help: the last doubling ({last}) changed "
            f"accuracy by {interval}. Another trunk or strategy might."
        )


def _of_classes(judged: Judgement) -> Iterator[str]:
    tested = [one for one in judged.classes if one.support]
    weakest = min(tested, key=lambda one: (one.recall, one.label))
    mean = judged.scores["balanced_accuracy"].value
    if weakest.recall > mean - WEAK_RECALL_BELOW:
        return
    names = [one.label for one in judged.classes]
    row = judged.confusion[names.index(weakest.label)].clone()
    row[names.index(weakest.label)] = 0
    taken_for = names[int(row.argmax())]
    yield (
        f"Look at {weakest.label!r}: only {weakest.recall:.0%} of its {weakest.support} test "
        f"pictures are named; most often they are taken for {taken_for!r} ({int(row.max())}). "
        "Check the labels of both, and add pictures in which they differ."
    )


def _of_width(judged: Judgement) -> Iterator[str]:
    right = judged.scores["accuracy"]
    width = 100 * (right.high - right.low)
    if width > WIDE_POINTS:
        yield (
            f"Add test pictures: with {right.num_samples} the interval of accuracy is {width:.0f} "
            "points wide, so differences of a few points stay unseen."
        )


def _of_calibration(judged: Judgement) -> Iterator[str]:
    error = judged.scores["calibration_error"]
    if error.value < LARGE_CALIBRATION_ERROR:
        return
    confidence = _mean(judged.calibration)
    right = judged.scores["accuracy"].value
    way = "surer than it is right" if confidence > right else "less sure than it is right"
    yield (
        f"Do not read its scores as chances: it is {way} (mean confidence {confidence:.2f}, "
        f"accuracy {right:.2f}, calibration error {error.value:.2f})."
    )


def _of_skipped(num_skipped: int) -> Iterator[str]:
    if num_skipped:
        yield f"{num_skipped} files were left out: unreadable, or copies of others."


def _mean(bins: tuple[CalibrationBin, ...]) -> float:
    num = sum(one.num_pictures for one in bins)
    return sum(one.confidence * one.num_pictures for one in bins) / num
