"""The paired test: against published figures, against every possible outcome, against McNemar's."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from math import comb

import numpy as np
import pytest
from numpy.typing import NDArray

from serve.tango import Paired, interval, is_worse, score, smallest_visible_drop

MARGINS = (0.0, 0.01, 0.02, 0.05)


@pytest.mark.parametrize(
    ("paired", "low", "high"),
    [
        # Fagerland, Lydersen, Laake 2014, Statistics in Medicine 33:2850, airways of 21 children.
        (Paired(21, 1, 7), -0.517, -0.026),
        # Two items without any difference: the interval's ends are z^2 / (n + z^2).
        (Paired(32, 0, 0), -0.1072, 0.1072),
        (Paired(68, 0, 0), -0.0535, 0.0535),
    ],
)
def test_published_intervals_end_where_the_score_is_1_96(
    paired: Paired, low: float, high: float
) -> None:
    """Tango's interval of 95 %, by his statistic at its ends; the figures have three digits."""
    before, after = score(paired, low - 6e-4), score(paired, low + 6e-4)
    assert before > 1.959964 > after
    before, after = score(paired, high - 6e-4), score(paired, high + 6e-4)
    assert before > -1.959964 > after


def test_without_a_margin_the_score_is_mcnemars() -> None:
    """(wins - losses) / sqrt(wins + losses)."""
    for wins, losses in ((3, 12), (0, 5), (40, 41)):
        mcnemar = (wins - losses) / np.sqrt(wins + losses)
        assert score(Paired(300, wins, losses), 0.0) == pytest.approx(mcnemar, rel=1e-12)


def likeliest(paired: Paired, difference: float) -> float:
    """The share of losses that makes the counts likeliest, by trying a fine grid of shares."""
    shares = np.linspace(max(0.0, -difference), (1 - difference) / 2, 200_001)[1:-1]
    wins, losses = paired.wins, paired.losses
    rest = paired.num - wins - losses
    chances = wins * np.log(shares + difference) + losses * np.log(shares)
    chances += rest * np.log(1 - 2 * shares - difference)
    return float(shares[chances.argmax()])


@pytest.mark.parametrize("difference", [-0.2, -0.05, -0.01, 0.03, 0.3])
@pytest.mark.parametrize("counts", [(21, 1, 7), (100, 4, 4), (250, 30, 12)])
def test_the_variance_is_that_of_the_likeliest_share(
    counts: tuple[int, int, int], difference: float
) -> None:
    """The closed form against a search for the maximum of the likelihood."""
    paired = Paired(*counts)
    share = likeliest(paired, difference)
    variance = paired.num * (2 * share + difference - difference**2)
    expected = (paired.wins - paired.losses - paired.num * difference) / np.sqrt(variance)

    assert score(paired, difference) == pytest.approx(expected, rel=1e-3, abs=1e-6)


@cache
def refusals(num: int, margin: float) -> NDArray[np.bool_]:
    """Whether each outcome, [wins, losses], is called worse."""
    refused = np.zeros((num + 1, num + 1), bool)
    for wins in range(num + 1):
        for losses in range(num + 1 - wins):
            refused[wins, losses] = is_worse(Paired(num, wins, losses), margin=margin)
    return refused


def chance_of_refusal(num: int, margin: float, *, win: float, loss: float) -> float:
    """Exact: the trinomial chances of all outcomes that are called worse, summed."""
    refused = refusals(num, margin)
    total = 0.0
    for wins, losses in zip(*np.nonzero(refused), strict=True):
        rest = num - int(wins) - int(losses)
        ways = comb(num, int(wins)) * comb(num - int(wins), int(losses))
        total += ways * win ** int(wins) * loss ** int(losses) * (1 - win - loss) ** rest
    return total


def shares() -> Iterator[float]:
    """How often the second alone is right."""
    yield from np.arange(0.005, 0.1, 0.005)
    yield from np.arange(0.1, 0.5, 0.05)


@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize("num", [20, 50, 100])
def test_a_head_at_the_margin_is_refused_in_at_most_five_percent_of_samples(
    num: int, margin: float
) -> None:
    """By every outcome's chance, however often the two differ; a better head even less often."""
    for loss in shares():
        if loss < margin:
            continue
        at_margin = chance_of_refusal(num, margin, win=loss - margin, loss=loss)
        equal = chance_of_refusal(num, margin, win=loss, loss=loss)

        assert at_margin <= 0.05
        assert equal <= at_margin + 1e-12


@pytest.mark.parametrize(
    ("num", "win", "loss", "power"),
    [
        (100, 0.0, 0.10, 0.90),  # ten points lost
        (100, 0.05, 0.25, 0.90),  # twenty, by heads that differ much
        (200, 0.02, 0.10, 0.70),
        (200, 0.0, 0.10, 0.99),
    ],
)
def test_a_head_that_is_clearly_worse_is_refused(
    num: int, win: float, loss: float, power: float
) -> None:
    """With the default margin of one point; exact, as above."""
    assert chance_of_refusal(num, 0.01, win=win, loss=loss) >= power


@pytest.mark.parametrize("counts", [(200, 3, 20), (200, 0, 0), (50, 10, 12), (30, 0, 30)])
def test_the_interval_agrees_with_the_test(counts: tuple[int, int, int]) -> None:
    """Worse than a margin exactly where the interval's upper end is below it."""
    paired = Paired(*counts)
    low, high = interval(paired)

    assert low <= paired.difference <= high
    for margin in np.linspace(0, 0.99, 100):
        if abs(high + margin) > 1e-9:
            assert is_worse(paired, margin=margin) == (high < -margin)


def test_the_smallest_visible_drop_is_the_first_that_is_refused() -> None:
    """Fewer losses pass; and very few pictures show nothing at all."""
    drop = smallest_visible_drop(Paired(200, 2, 2), margin=0.01)
    assert drop is not None
    losses = round(200 * drop) + 2

    assert is_worse(Paired(200, 2, losses), margin=0.01)
    assert not is_worse(Paired(200, 2, losses - 1), margin=0.01)
    assert smallest_visible_drop(Paired(2, 0, 0), margin=0.01) is None
