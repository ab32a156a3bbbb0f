"""What a student's logits are taught by: labels, and a teacher's logits in several ways.

Each loss is a mean over the batch. What its paper multiplies it by is in `models.methods`.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from models.batches import UNKNOWN

# Added to variances of logits: those of a fresh head are all alike, and the root has no slope at 0.
_LEAST_VARIANCE = 1e-6


def label_loss(
    logits: Float[Tensor, "batch num_classes"], labels: Int[Tensor, " batch"]
) -> Float[Tensor, ""]:
    """Mean cross-entropy over the rows whose label is known; zero where none is."""
    total = F.cross_entropy(logits, labels, ignore_index=UNKNOWN, reduction="sum")
    return total / (labels != UNKNOWN).sum().clamp(min=1)


def soft_target_loss(
    student_logits: Float[Tensor, "batch num_classes"],
    teacher_logits: Float[Tensor, "batch num_classes"],
    *,
    temperature: float,
) -> Float[Tensor, ""]:
    """Divergence of the student's softened predictions from the teacher's, in nats, times T^2.

    Args:
        temperature: Softening factor, above 0; 1 leaves the logits as they are.

    Source: Hinton et al. 2015, arXiv:1503.02531, section 2.
    """
    soft_student = F.log_softmax(student_logits / temperature, dim=-1)
    soft_teacher = F.log_softmax(teacher_logits / temperature, dim=-1)
    # Softening shrinks gradients by 1/T^2; the factor keeps them on the scale of the labels'.
    divergence = F.kl_div(soft_student, soft_teacher, reduction="batchmean", log_target=True)
    return divergence * temperature**2


def standardised_loss(
    student_logits: Float[Tensor, "batch num_classes"],
    teacher_logits: Float[Tensor, "batch num_classes"],
    *,
    temperature: float,
) -> Float[Tensor, ""]:
    """Soft targets between logits that have mean 0 and deviation 1 in each row.

    So a small student need not reach the range of its teacher's logits, only their proportions.

    Args:
        temperature: Softening factor of the standardised logits, above 0.

    Source: logit standardisation, Sun et al. 2024, arXiv:2403.01427, algorithm 1.
    """
    return soft_target_loss(
        _standardised(student_logits), _standardised(teacher_logits), temperature=temperature
    )


def decoupled_loss(
    student_logits: Float[Tensor, "batch num_classes"],
    teacher_logits: Float[Tensor, "batch num_classes"],
    labels: Int[Tensor, " batch"],
    *,
    temperature: float,
    others_weight: float,
) -> Float[Tensor, ""]:
    """Soft targets in two parts: how sure of the label, and how the other classes compare.

    In plain soft targets the second part is multiplied by the teacher's doubt, so a sure teacher
    says next to nothing of it; here it has a weight of its own.

    Args:
        labels: Class indices; for `UNKNOWN` the teacher's most likely class takes its place.
        temperature: Softening factor, above 0.
        others_weight: Weight of the second part (the paper's beta), at least 0.

    Source: DKD, Zhao et al. 2022, arXiv:2203.08679, equation 7 with alpha 1.
    """
    labels = labels.where(labels != UNKNOWN, teacher_logits.argmax(dim=-1))
    student, student_others = _sides(student_logits / temperature, labels)
    teacher, teacher_others = _sides(teacher_logits / temperature, labels)
    sure = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    others = F.kl_div(student_others, teacher_others, reduction="batchmean", log_target=True)
    return (sure + others_weight * others) * temperature**2


def correlation_loss(
    student_logits: Float[Tensor, "batch num_classes"],
    teacher_logits: Float[Tensor, "batch num_classes"],
    *,
    temperature: float,
) -> Float[Tensor, ""]:
    """How uncorrelated predictions are, within pictures and within classes: 0 to 4, times T^2.

    Asks for the teacher's preferences among classes and among pictures, not for its values.

    Args:
        temperature: Softening factor, above 0.

    Source: DIST, Huang et al. 2022, arXiv:2205.10536, equations 6 to 9.
    """
    student = F.softmax(student_logits / temperature, dim=-1)
    teacher = F.softmax(teacher_logits / temperature, dim=-1)
    within_pictures = 1 - _correlation(student, teacher).mean()
    within_classes = 1 - _correlation(student.T, teacher.T).mean()
    return (within_pictures + within_classes) * temperature**2


def _standardised(logits: Float[Tensor, "rows classes"]) -> Float[Tensor, "rows classes"]:
    variance, mean = torch.var_mean(logits, dim=-1, keepdim=True)
    return (logits - mean) / (variance + _LEAST_VARIANCE).sqrt()


def _sides(
    logits: Float[Tensor, "rows classes"], labels: Int[Tensor, " rows"]
) -> tuple[Float[Tensor, "rows 2"], Float[Tensor, "rows others"]]:
    """Log-probabilities of the label and of all others together; and among the others alone."""
    is_label = F.one_hot(labels, logits.shape[1]).bool()
    others = logits[~is_label].view(len(logits), -1)
    both = torch.stack([logits[is_label], others.logsumexp(dim=-1)], dim=-1)
    return both.log_softmax(dim=-1), others.log_softmax(dim=-1)


def _correlation(
    first: Float[Tensor, "rows columns"], second: Float[Tensor, "rows columns"]
) -> Float[Tensor, " rows"]:
    """Pearson's, row by row; 0 where a row is constant."""
    return F.cosine_similarity(
        first - first.mean(dim=-1, keepdim=True), second - second.mean(dim=-1, keepdim=True), dim=-1
    )
