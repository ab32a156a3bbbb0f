"""The commands that learn and export: `teach`, `distil`, `export`, `head`, `demo`.

Part of the composition root: `models` and `export` are imported when a command runs, so that the
command line works in an image without torch.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

console = Console()
notes = Console(stderr=True)

Data = Annotated[
    str,
    typer.Argument(
        help="Folder DATA/[train|test/]CLASS/*.jpg, or one of scikit-learn's digits tasks: "
        "digits, parity, loop, at_least_five. For head also a folder with a labels.csv of pictures "
        "and their labels, or digit_traits."
    ),
]
Out = Annotated[Path, typer.Option(help="Folder to write.")]
Seed = Annotated[int, typer.Option(help="Same seed, same result.")]
Weights = Annotated[
    str | None,
    typer.Option(
        help="torchvision (downloads), or a .safetensors or .pth file; none if not given."
    ),
]
Augment = Annotated[
    Literal["photos", "randaugment", "drawings", "none"] | None,
    typer.Option("--augment", help="By the kind of data unless given."),
]
HELD_BACK: Any = {"rich_help_panel": "Regularisation"}
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON value and nothing else.")]


def add_to(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    for command, example in (
        (teach, "teach ./pets --weights torchvision --out ./teacher"),
        (distil, "distil --teacher ./teacher --data ./pets --student resnet18 --out ./student"),
        (export, "export ./student --out ./trunk"),
        (head, "head ./pets --trunk ./trunk --task pets --out ./bundle"),
        (demo, "demo"),
    ):
        app.command(epilog=f"Example: headstock {example}")(command)


def teach(
    data: Data,
    out: Out,
    backbone: Annotated[
        str, typer.Option(help="Name, or your own: my_nets.py:function.")
    ] = "mobilenet_v2",
    weights: Weights = None,
    strategy: Annotated[
        Literal["full", "last", "linear", "surgical", "gradual", "direct", "scratch"],
        typer.Option(
            help="linear: the head alone. All but direct and scratch fit it first, then teach: the "
            "last block (last), one block (surgical), one more from the last in each epoch "
            "(gradual), everything (full). direct: everything at once; scratch: so without weights."
        ),
    ] = "full",
    block: Annotated[
        int | None,
        typer.Option(help="Of surgical; 1 is nearest the pictures. By gradients unless given."),
    ] = None,
    batch_norm: Annotated[
        Literal["frozen", "follow"] | None,
        typer.Option(help="Running statistics; frozen unless from scratch."),
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Most epochs; 12 unless given.")] = None,
    rate: Annotated[
        float | None,
        typer.Option(help="Highest learning rate, of the head; 0.001, or 0.003 from scratch."),
    ] = None,
    rate_decay: Annotated[
        float | None,
        typer.Option(help="Rate of a block by that of the one above it, up to 1."),
    ] = None,
    schedule: Annotated[
        Literal["cosine", "one-cycle"] | None, typer.Option(help="Of the rates; cosine.")
    ] = None,
    find_rate: Annotated[
        bool,
        typer.Option(
            "--find-rate", help="Teach nothing: raise the rate step by step, and plot the loss."
        ),
    ] = False,
    augment: Augment = None,
    mix: Annotated[
        Literal["none", "mixup", "cutmix"] | None,
        typer.Option(help="Blend pictures, or patch them into each other.", **HELD_BACK),
    ] = None,
    balance: Annotated[
        Literal["none", "weights", "sampling"] | None,
        typer.Option(help="Rare classes weigh more, or are drawn more often.", **HELD_BACK),
    ] = None,
    label_smoothing: Annotated[
        float | None, typer.Option(help="Share spread over all labels.", **HELD_BACK)
    ] = None,
    dropout: Annotated[
        float | None, typer.Option(help="Share of features hidden from the head.", **HELD_BACK)
    ] = None,
    weight_decay: Annotated[
        float | None, typer.Option(help="Pull of weights to zero; 0.05.", **HELD_BACK)
    ] = None,
    l2_sp: Annotated[
        float | None,
        typer.Option("--l2-sp", help="Pull of weights to where they started.", **HELD_BACK),
    ] = None,
    average_epochs: Annotated[
        float | None,
        typer.Option("--average", help="Epochs over which weights are averaged.", **HELD_BACK),
    ] = None,
    compare: Annotated[
        bool,
        typer.Option(
            help="Train the same network from random weights too, to see whether the weights help."
        ),
    ] = True,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a teacher by one of seven strategies; the best epoch on validation is kept.

    A run that was interrupted goes on when the same command is given again.
    """
    from models import recipe  # noqa: PLC0415

    how = recipe.fine_tuning(
        strategy,
        block=block,
        batch_norm=batch_norm,
        schedule=schedule,
        num_epochs=epochs,
        rate=rate,
        rate_decay=rate_decay,
        mix=mix,
        balance=balance,
        label_smoothing=label_smoothing,
        dropout=dropout,
        weight_decay=weight_decay,
        l2_sp=l2_sp,
        average_epochs=average_epochs,
    )
    about: dict[str, Any] = {
        "backbone": backbone,
        "weights": weights,
        "how": how,
        "augmentation": augment,
        "seed": seed,
    }
    if find_rate:
        with _progress() as progress:
            sweep = recipe.find_rate(data, out, **about, progress=progress)
        if as_json:
            _print_json({"suggestion": sweep.suggestion, "out": str(out)})
        else:
            console.print(f"--rate {sweep.suggestion:.1e} is suggested; see {out / 'rates.svg'}")
        return
    with _progress() as progress:
        made = recipe.make_teacher(
            data, out, **about, command=_command(), compare=compare, progress=progress
        )
    _say(str(made.weights), *_left_out(made.data), *made.taught.notes)
    more = {
        "strategy": strategy,
        "parameters": made.taught.backbone.num_parameters,
        "best_epoch": made.taught.best_epoch,
        "seconds": round(made.taught.seconds, 1),
        "pictures": made.data.counts,
        "out": str(out),
    }
    told = _told(made.report, out)
    _show("teacher", made.taught.metrics, more, told, as_json=as_json)


def distil(
    teacher: Annotated[list[Path], typer.Option(help="Teacher folder; once for each teacher.")],
    data: Annotated[list[str], typer.Option(help="Its data, in the same order.")],
    student: Annotated[str, typer.Option(help="Backbone: a name, or my_nets.py:function.")],
    out: Out,
    weights: Weights = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Most epochs.")] = None,
    method: Annotated[
        Literal[
            "cosine",
            "kd",
            "standardised",
            "dkd",
            "dist",
            "patient",
            "fitnets",
            "attention",
            "rkd",
            "labels",
        ],
        typer.Option(
            help="What teaches beside labels. Logits: kd (soft targets), standardised, dkd, dist; "
            "patient: the teachers alone, on pictures blended in pairs, for many epochs. Features: "
            "cosine (with kd), rkd (relations). Maps at the cut: fitnets, attention. labels: no "
            "teacher, for comparison."
        ),
    ] = "cosine",
    temperature: Annotated[
        float | None, typer.Option(help="Softening factor, above 0; by the method unless given.")
    ] = None,
    label_weight: Annotated[float | None, typer.Option(help="Weight of labels.")] = None,
    soft_weight: Annotated[
        float | None, typer.Option(help="Weight of the teachers' predictions.")
    ] = None,
    hint_weight: Annotated[
        float | None, typer.Option(help="Weight of features or maps, whichever it compares.")
    ] = None,
    unlabelled: Annotated[
        list[Path] | None,
        typer.Option(help="Folder of more pictures, of any kind, that teachers speak about."),
    ] = None,
    views: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Fixed crops of each picture, about which teachers are asked only once; a new "
            "one in every epoch unless given.",
        ),
    ] = None,
    last: Annotated[
        bool, typer.Option("--last", help="Keep the last epoch, not the best on validation.")
    ] = False,
    augment: Augment = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Distil one student trunk from one or several teachers."""
    from models.recipe import make_student  # noqa: PLC0415

    weights_given = {
        "label_weight": label_weight,
        "soft_weight": soft_weight,
        "hint_weight": hint_weight,
        "temperature": temperature,
    }
    with _progress() as progress:
        made = make_student(
            teacher,
            data,
            out,
            student=student,
            weights=weights,
            augmentation=augment,
            seed=seed,
            command=_command(),
            num_epochs=epochs,
            method=method,
            changes={name: value for name, value in weights_given.items() if value is not None},
            unlabelled=unlabelled or (),
            num_views=views,
            keep_last=last,
            progress=progress,
        )
    _say(str(made.weights), *(line for lesson in made.lessons for line in _left_out(lesson.data)))
    more = {
        "method": method,
        "parameters": made.distilled.student.num_parameters,
        "teacher_parameters": list(made.teacher_parameters),
        "best_epoch": made.distilled.best_epoch,
        "seconds": round(made.distilled.seconds, 1),
        "pictures": made.distilled.num_pictures,
        "out": str(out),
    }
    told = _told(made.report, out)
    _show("student", made.distilled.metrics, more, told, as_json=as_json)


def export(
    student: Annotated[Path, typer.Argument(help="Student folder.")],
    out: Out,
    precision: Annotated[
        Literal["fp32", "int8", "fp16", "auto"],
        typer.Option(help="Also write this variant; auto: int8 if it is faster and as good."),
    ] = "fp32",
    data: Annotated[
        list[str] | None,
        typer.Option(help="Real tasks that calibrate and judge, as `headstock head` takes them."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Export a student as a trunk, and prove that the graph computes the same."""
    from export.recipe import PrecisionRefusedError, make_trunk  # noqa: PLC0415

    try:
        with _progress() as progress:
            report = make_trunk(
                student,
                out,
                precision=precision,
                sources=data or (),
                command=_command(),
                progress=progress,
            )
    except PrecisionRefusedError as refusal:
        if not as_json:
            console.print(_precision_table(refusal.candidates))
        raise
    if as_json:
        parity = {name: vars(value) for name, value in report.parity.items()}
        size = {"trunk": report.digest, "graph_bytes": report.graph_bytes}
        candidates = [candidate.summary() for candidate in report.candidates]
        found = {"precisions": candidates, "picked": report.manifest.picked}
        _print_json({**size, "parity": parity, **found, "out": str(out)})
        return
    table = Table("output", "largest difference", "of its scale", "limit", "same largest value")
    for name, parity in report.parity.items():
        table.add_row(
            name,
            f"{parity.largest_absolute:.1e}",
            f"{parity.largest_relative:.1e}",
            f"{parity.tolerance:.0e}",
            f"{parity.argmax_agreement:.1%} of {parity.num_pictures}",
        )
    console.print(table)
    if report.candidates:
        console.print(_precision_table(report.candidates))
        written = ", ".join(report.manifest.precisions)
        console.print(f"written {written}; a CPU serves {report.manifest.picked}")
    console.print(f"trunk {report.digest}, {report.graph_bytes / 1e6:.2f} MB, in {out}")


def head(
    data: Data,
    trunk: Annotated[Path, typer.Option(help="Trunk folder.")],
    task: Annotated[str, typer.Option(help="Name that callers will use.")],
    out: Out,
    strategy: Annotated[
        Literal[
            "head",
            "linear",
            "cosine",
            "linear_svm",
            "rbf_svm",
            "knn",
            "mlp",
            "bias",
            "ssf",
            "lora",
            "adapter",
            "tail",
            "auto",
        ],
        typer.Option(
            help="head: by the number of pictures linear or cosine prototypes; or another kind of "
            "head (linear_svm, rbf_svm, knn, mlp); an adapter (bias, ssf, lora, adapter) or a tail "
            "with its head; auto: compare head, adapters and tail, and take the smallest that does "
            "not lose in cross-validation."
        ),
    ] = "head",
    width: Annotated[
        int, typer.Option(min=1, max=64, help="Rank of lora, channels of adapter.")
    ] = 4,
    cache: Annotated[
        Path | None,
        typer.Option(
            file_okay=False,
            help="Folder of computed features, at most 2 GiB; remove it at any time. "
            "~/.cache/headstock/features unless given.",
        ),
    ] = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Train a head, an adapter or a tail on a trunk and write it as a bundle, ready to push."""
    from export.recipe import (  # noqa: PLC0415
        default_folder,
        make_head,
        make_label_head,
        read_label_data,
        report_folder,
    )

    cache = cache or default_folder()
    with _progress() as progress:
        if labelled := read_label_data(data, seed=seed, progress=progress):
            several = make_label_head(
                labelled, trunk, task=task, strategy=strategy, seed=seed, command=_command(),
                cache=cache, progress=progress,
            )  # fmt: skip
            several.bundle.write(out)
            _say(*_left_out(several.data), *several.trained.notes)
            about = _about_bundle(several.bundle, several.data, out)
            more = {"strategy": several.trained.strategy, **about}
            _show(f"labels of {task}", several.trained.metrics, more, {}, as_json=as_json)
            return
        made = make_head(
            data,
            trunk,
            task=task,
            strategy=strategy,
            cache=cache,
            width=width,
            seed=seed,
            command=_command(),
            progress=progress,
        )
    made.write(out)
    _say(*_left_out(made.data), *made.trained.notes)
    more = {"strategy": made.trained.strategy, **_about_bundle(made.bundle, made.data, out)}
    if made.trained.strategy == "head":
        more["strategy"] = made.trained.head.kind
    if as_json and made.trained.rows:
        more["compared"] = [dataclasses.asdict(row) for row in made.trained.rows]
    told = _told(made.report, report_folder(out))
    _show(f"{made.trained.strategy} of {task}", made.trained.metrics, more, told, as_json=as_json)
    if made.trained.rows and not as_json:
        console.print(_comparison(made.trained.rows))


def demo(
    stay: Annotated[bool, typer.Option("--stay", help="Leave the service up.")] = False,
    as_json: AsJson = False,
) -> None:
    """Tell the whole story on real handwritten digits, in about two minutes."""
    from serve.demo import run_demo  # noqa: PLC0415

    report = run_demo(stay=stay, is_quiet=as_json)
    if as_json:
        _print_json(vars(report))
    if report.failures:
        raise typer.Exit(1)


def _about_bundle(bundle: Any, data: Any, out: Path) -> dict[str, Any]:
    return {
        "bundle": bundle.digest,
        "bundle_bytes": bundle.size_bytes,
        "pictures": data.counts,
        "out": str(out),
    }


@contextmanager
def _progress() -> Iterator[Callable[[Any], None]]:
    """Show each stage as a bar, on standard error."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} {task.fields[note]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=notes) as bars:
        stages: dict[str, TaskID] = {}

        def show(step: Any) -> None:
            if step.stage not in stages:
                stages[step.stage] = bars.add_task(step.stage, total=step.total, note="")
            bars.update(stages[step.stage], completed=step.done, total=step.total, note=step.note)

        yield show


def _show(
    what: str,
    metrics: Mapping[str, Any],
    more: dict[str, Any],
    told: Mapping[str, str],
    *,
    as_json: bool,
) -> None:
    """The accuracies with their intervals, and what else is known."""
    if as_json:
        values = {name: vars(value) for name, value in metrics.items()}
        _print_json({"metrics": values, **more, **told})
        return
    table = Table(what, "value", "95 % interval", "pictures")
    for name, value in metrics.items():
        interval = f"{value.low:.3f} to {value.high:.3f}"
        table.add_row(name, f"{value.value:.3f}", interval, str(value.num_samples))
    console.print(table)
    if isinstance(more.get("pictures"), dict):
        console.print(_balance(more.pop("pictures")))
    console.print(", ".join(f"{name} {value}" for name, value in more.items()), soft_wrap=True)
    for name, text in told.items():
        console.print(f"{name}: {text}", markup=False, highlight=False, soft_wrap=True)


def _told(report: Any, folder: Path) -> dict[str, str]:
    """Whether transfer pays, and where the report is."""
    verdicts = {f"verdict on {task.name}": task.verdict for task in report.tasks}
    return {**verdicts, "report": str(folder / "report.html")}


def _precision_table(candidates: Sequence[Any]) -> Table:
    """What was measured of each precision, and what speaks against it."""
    table = Table(
        "precision",
        "how",
        "accuracy",
        "agreement",
        "change, points",
        "smaller",
        "faster",
        "verdict",
    )
    for candidate in candidates:
        row = [candidate.precision, candidate.how, "", "", ""]
        verdict = "as exported"
        if candidate.precision != "fp32":
            verdict = "accepted, no heads tried"
        if (found := candidate.agreement) is not None:
            change = found.accuracy_change
            row[2:] = [
                f"{found.accuracy_after.value:.3f} of {found.accuracy_before.value:.3f}",
                f"{found.agreement.value:.1%}",
                f"{100 * change.value:+.2f} ({100 * change.low:+.2f} to {100 * change.high:+.2f})",
            ]
            verdict = "; ".join(found.objections) or f"accepted by {found.num_heads} heads"
        speed = f"{candidate.speed_ratio.value:.2f} x"
        table.add_row(*row, f"{candidate.size_ratio:.2f} x", speed, verdict)
    return table


def _balance(counts: dict[str, dict[str, int]]) -> Table:
    """Pictures of each class in each split."""
    table = Table("pictures", *counts)
    for label in next(iter(counts.values())):
        table.add_row(label, *(str(split[label]) for split in counts.values()))
    return table


def _comparison(rows: Any) -> Table:
    """Every strategy that was trained, on the same pictures."""
    columns = ("strategy", "cross-validated", "test", "against the head", "bytes", "seconds")
    table = Table(*columns, title="accuracy with 95 % intervals")
    for row in rows:
        unseen = str(row.cross_validated) if row.cross_validated else "-"
        versus = str(row.against_head.value)
        table.add_row(
            row.strategy, unseen, str(row.test), versus, f"{row.num_bytes:,}", f"{row.seconds:.1f}"
        )
    return table


def _left_out(data: Any) -> list[str]:
    return [f"left out {skipped.path}: {skipped.reason}" for skipped in data.skipped]


def _say(*lines: str) -> None:
    for line in lines:
        notes.print(line, markup=False, highlight=False, soft_wrap=True)


def _command() -> str:
    return shlex.join(["headstock", *sys.argv[1:]])


def _print_json(value: object) -> None:
    sys.stdout.write(json.dumps(value, indent=2) + "\n")
