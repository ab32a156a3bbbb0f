"""The model card of a head: what it is for, how good, on which data, how made, and its limits."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from export.bundle import AdapterEntry, Provenance, TrunkManifest
from models.evaluate import Estimate
from models.metrics import SCORES
from models.record import DataRecord

FEW_PICTURES = 20
MAX_LISTED = 50
BASELINE = "baseline_"
TEST_SCORES = {f"test_{name}": name for name in SCORES}

LINKS = {
    "softmax": "exactly one label is right; scores are probabilities that sum to 1",
    "sigmoid": "each label is right or wrong by itself; each score is a probability",
    "none": "scores are the head's raw outputs",
}


def write_card(
    *,
    task: str,
    labels: Sequence[str],
    link: Literal["softmax", "sigmoid", "none"],
    temperature: float,
    trunk: TrunkManifest,
    data: DataRecord,
    metrics: Mapping[str, Estimate],
    provenance: Provenance,
    kind: Literal["head", "adapter", "tail"],
    adapter: AdapterEntry | None,
    model_bytes: int,
    verdict: str,
    notes: Sequence[str],
) -> str:
    """The card as Markdown.

    Args:
        metrics: Accuracies by name; `baseline_NAME` is what `NAME` is compared with. Those named
            as in `SCORES`, after "test_", are other scores of the test split.
        model_bytes: Size of the graph, and of the adapter if there is one.
        verdict: Whether transfer pays; where it is empty, accuracy and baseline are compared.
        notes: Sentences added to the limits.
    """
    parts = (
        f"# {task}",
        f"Assigns a picture to {len(labels)} labels ({_listed(labels)}): {LINKS[link]}.",
        "## Accuracy",
        *_accuracy(metrics, verdict),
        *_scores(metrics),
        "## Data",
        *_data(data, labels),
        "## How it was made",
        (
            f"{_what(kind, adapter)} of {model_bytes:,} bytes on the trunk `{trunk.digest}` "
            f"({trunk.backbone}, {trunk.num_features} features)."
        ),
        *_origin(provenance),
        "## Limits",
        "\n".join(f"- {limit}" for limit in (*_limits(trunk, data, temperature, link), *notes)),
    )
    return "\n\n".join(parts) + "\n"


def _what(kind: str, adapter: AdapterEntry | None) -> str:
    if adapter is None:
        return {"head": "A head", "tail": "A tail (the trunk's last stage and its head)"}[kind]
    rank = f", rank {adapter.width}" if adapter.width else ""
    return f"A head and an adapter ({adapter.kind}{rank})"


def _accuracy(metrics: Mapping[str, Estimate], verdict: str) -> Iterator[str]:
    names = [name for name in metrics if not name.startswith(BASELINE) and name not in TEST_SCORES]
    if not names:
        yield "Nothing was measured."
        return
    yield "Each value with its 95 % interval and the number of pictures behind it."
    rows = ["| | this head | baseline |", "| --- | --- | --- |"]
    rows += [
        f"| {_cell(name)} | {_value(metrics[name])} | {_value(metrics.get(BASELINE + name))} |"
        for name in names
    ]
    yield "\n".join(rows)
    if verdict:
        yield f"**{_cell(verdict)}**"
        return
    for name in names:
        yield from _comparison(name, metrics[name], metrics.get(BASELINE + name))


def _scores(metrics: Mapping[str, Estimate]) -> Iterator[str]:
    """What accuracy does not say, of the same pictures."""
    rows = [
        f"| {score.replace('_', ' ')} | {_value(metrics[name])} | {SCORES[score][1]} |"
        for name, score in TEST_SCORES.items()
        if name in metrics
    ]
    if rows:
        yield "\n".join(
            ["| score on test | this head | what it is |", "| --- | --- | --- |", *rows]
        )


def _comparison(name: str, head: Estimate, baseline: Estimate | None) -> Iterator[str]:
    """Say where the trunk has brought nothing: that is what a reader must not overlook."""
    if baseline is None:
        return
    if head.value < baseline.value:
        doubt = " (the intervals overlap, so it may be chance)" if head.high > baseline.low else ""
        yield (
            f"**Negative transfer**: on {name} this head is at {head.value:.3f}, "
            f"below the baseline's {baseline.value:.3f}{doubt}. The trunk's features do harm here: "
            "use another trunk or a simpler model."
        )
    elif head.low <= baseline.high:
        yield (
            f"On {name} the intervals of head and baseline overlap: "
            "that the trunk helps is not shown."
        )


def _data(data: DataRecord, labels: Sequence[str]) -> Iterator[str]:
    yield f"{_cell(data.name)}, fingerprint `{data.sha256}`."
    splits = list(data.num_pictures)
    rows = [f"| label | {' | '.join(splits)} |", "| --- |" + " ---: |" * len(splits)]
    rows += [
        f"| {_cell(label)} | "
        + " | ".join(str(data.num_pictures[split].get(label, 0)) for split in splits)
        + " |"
        for label in labels[:MAX_LISTED]
    ]
    if len(labels) > MAX_LISTED:
        rows.append(f"| and {len(labels) - MAX_LISTED} more |" + " |" * len(splits))
    yield "\n".join(rows)
    counts = {label: data.num_pictures.get("train", {}).get(label, 0) for label in labels}
    most, least = max(counts, key=counts.__getitem__), min(counts, key=counts.__getitem__)
    yield (
        f"In training the most frequent label is {_cell(most)} ({counts[most]} pictures), "
        f"the rarest {_cell(least)} ({counts[least]})."
    )


def _origin(provenance: Provenance) -> Iterator[str]:
    yield f"    {' '.join(provenance.command.split())}"
    versions = ", ".join(f"{name} {number}" for name, number in provenance.versions.items())
    yield f"{provenance.created_at}, seed {provenance.seed}, with {versions}."


def _limits(trunk: TrunkManifest, data: DataRecord, temperature: float, link: str) -> Iterator[str]:
    size_px = trunk.preprocessing.size_px
    yield f"It sees the centre square of a picture at {size_px} x {size_px} px, and nothing else."
    if link == "softmax":
        yield "It names one of its labels for every picture, also for one that shows none of them."
    yield "Pictures from other sources than its data may be answered worse than measured."
    if temperature == 1.0 and link != "none":
        yield "Its scores are not calibrated: a score of 0.9 need not be right 9 times in 10."
    training = data.num_pictures.get("train", {})
    if few := [label for label, count in training.items() if count < FEW_PICTURES]:
        yield f"Fewer than {FEW_PICTURES} training pictures: {_listed(few)}."


def _listed(labels: Sequence[str]) -> str:
    more = f" and {len(labels) - MAX_LISTED} more" if len(labels) > MAX_LISTED else ""
    return ", ".join(_cell(label) for label in labels[:MAX_LISTED]) + more


def _value(estimate: Estimate | None) -> str:
    return f"{estimate} of {estimate.num_samples}" if estimate else "not measured"


def _cell(text: str) -> str:
    """Text that cannot end a table's cell or become markup."""
    escaped = text.replace("\\", "\\\\")
    for character in "|<>*_`[]":
        escaped = escaped.replace(character, f"\\{character}")
    return escaped
