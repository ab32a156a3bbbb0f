"""What a run of `headstock head` reports: its answers, beside those without the trunk."""

import torch

from models.backbones import Backbone
from models.checkpoint import package_versions
from models.data import PictureData, join
from models.learning_curve import learning_curve
from models.logbook import Logbook
from models.report import Report, StrategyRow, report_task
from models.train_task import TrainedTask
from models.untrained import PIXELS, UNTRAINED, untrained_logits


def head_report(
    name: str,
    backbone: Backbone,
    data: PictureData,
    trained: TrainedTask,
    *,
    trunk: str,
    logbook: Logbook,
    command: str,
    seed: int,
) -> Report:
    """A head, an adapter or a tail, against a head without the source and one on pixels.

    Args:
        name: Of the task.
        trunk: Its digest.
    """
    features = trained.head.features
    curve = learning_curve(
        torch.cat([features["train"], features["validation"]]),
        join(data.train, data.validation).labels,
        num_classes=len(data.labels),
        seed=seed,
        progress=logbook,
    )
    rivals = {
        PIXELS: trained.head.baseline_logits,
        UNTRAINED: untrained_logits(backbone, data, seed=seed, progress=logbook),
    }
    rows = tuple(
        StrategyRow(
            strategy=row.strategy,
            cross_validated=row.cross_validated,
            test=row.test,
            against_head=row.against_head.value,
            num_bytes=row.num_bytes,
            seconds=row.seconds,
        )
        for row in trained.rows
    )
    task = report_task(
        data, trained.test_logits, metrics=trained.metrics, rivals=rivals, learning_curve=curve,
        strategies=rows, notes=trained.notes, seed=seed,
    )  # fmt: skip
    kind = trained.head.kind if trained.strategy == "head" else trained.strategy
    facts = {"strategy": kind, "trunk": trunk, "backbone": backbone.name}
    return Report(
        kind="head", title=f"Head of {name}", facts=facts, tasks=(task,), phases=logbook.phases,
        curves=logbook.curves, command=command, seed=seed, versions=package_versions(),
    )  # fmt: skip
