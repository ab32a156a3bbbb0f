"""Specification of models/methods.py: what a student is taught by, by name."""

from typing import get_args

import pytest

from models.distil import DistillationError
from models.methods import METHODS, Method, MethodName, Needed, find_method


@pytest.mark.parametrize(
    ("name", "needs"),
    [
        ("labels", set()),
        ("kd", {"logits"}),
        ("standardised", {"logits"}),
        ("dkd", {"logits"}),
        ("dist", {"logits"}),
        ("patient", {"logits"}),
        ("cosine", {"logits", "features"}),
        ("rkd", {"features"}),
        ("fitnets", {"maps"}),
        ("attention", {"maps"}),
    ],
)
def test_a_method_says_what_it_asks_a_teacher_for(name: MethodName, needs: set[Needed]) -> None:
    """Maps are large, so they are kept only where they are compared."""
    assert METHODS[name].needs == needs


def test_every_name_has_a_method() -> None:
    """What the command line offers is what there is."""
    assert set(METHODS) == set(get_args(MethodName))


def test_a_weight_of_zero_leaves_out_what_it_weighs() -> None:
    """So the teacher is not asked for it."""
    assert find_method("cosine", hint_weight=0.0).needs == {"logits"}
    assert find_method("cosine", soft_weight=0.0, hint_weight=0.0).needs == set()


def test_weights_are_those_of_the_method_unless_given() -> None:
    """One by one."""
    method = find_method("standardised", temperature=3.0)

    assert (method.label_weight, method.soft_weight, method.temperature) == (0.1, 9.0, 3.0)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("kd", {"temperature": 0.0}, "temperature=0.0; expected finite weights of at least 0"),
        ("kd", {"soft_weight": -1.0}, "'kd': label_weight=0.1, soft_weight=-1.0"),
        ("kd", {"soft_weight": float("nan")}, "soft_weight=nan"),
        ("labels", {"label_weight": 0.0}, "one of them above 0"),
        ("kd", {"hint_weight": 1.0}, "hint_weight=1.0, but this method has no such term"),
        ("rkd", {"soft_weight": 1.0}, "soft_weight=1.0, but this method has no such term"),
        ("rkd", {"temperature": 2.0}, "temperature=2.0, but the method 'rkd' has no soft targets"),
        ("patient", {"label_weight": 0.1}, "label_weight=0.1 for pictures that are blended"),
    ],
)
def test_what_a_method_does_not_have_cannot_be_weighed(
    name: MethodName, changes: dict[str, float], message: str
) -> None:
    """The message names the field, its value, and what was expected."""
    with pytest.raises(DistillationError, match=message):
        find_method(name, **changes)


def test_an_own_method_is_checked_alike() -> None:
    """From Python any mixture can be made."""
    with pytest.raises(DistillationError, match=r"soft_weight=1\.0, but this method has no such"):
        Method(1.0, soft_weight=1.0)
