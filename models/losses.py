"""What a student is taught by: labels, a teacher's softened predictions, a teacher's features."""

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from models.batches import UNKNOWN


def distillation_loss(
    student_logits: Float[Tensor, "batch num_classes"],
    teacher_logits: Float[Tensor, "batch num_classes"],
    labels: Int[Tensor, " batch"],
    *,
    temperature: float,
    soft_weight: float,
) -> Float[Tensor, ""]:
    """Mix cross-entropy on labels with the teacher's softened predictions.

    Args:
        labels: Class indices, or `UNKNOWN` for pictures that only the teacher speaks about.
        temperature: Softening factor, above 0; 1 leaves the logits as they are.
        soft_weight: Share of the teacher term, from 0 (labels only) to 1 (teacher only).

    Returns:
        Mean loss over the batch, in nats; the label term is a mean over the labelled rows.

    Source: Hinton et al. 2015, arXiv:1503.02531, section 2.
    """
    soft_student = F.log_softmax(student_logits / temperature, dim=-1)
    soft_teacher = F.softmax(teacher_logits / temperature, dim=-1)
    # Softening shrinks gradients by 1/T^2; the factor keeps both terms on one scale.
    soft_loss = F.kl_div(soft_student, soft_teacher, reduction="batchmean") * temperature**2
    return soft_weight * soft_loss + (1 - soft_weight) * label_loss(student_logits, labels)


def label_loss(
    logits: Float[Tensor, "batch num_classes"], labels: Int[Tensor, " batch"]
) -> Float[Tensor, ""]:
    """Mean cross-entropy over the rows whose label is known; zero where none is."""
    total = F.cross_entropy(logits, labels, ignore_index=UNKNOWN, reduction="sum")
    return total / (labels != UNKNOWN).sum().clamp(min=1)


def feature_loss(
    projected: Float[Tensor, "batch features"], target: Float[Tensor, "batch features"]
) -> Float[Tensor, ""]:
    """How far the student's projected features point away from the teacher's: 0 to 2.

    One minus the cosine, so that neither network's scale of features matters.

    Source: hints through a learned regressor, Romero et al. 2015, arXiv:1412.6550, section 2.2,
    here between the pooled features and with both sides normalised.
    """
    return (1 - F.cosine_similarity(projected, target, dim=-1)).mean()
