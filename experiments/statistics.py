"""The statistics of the claims: paired comparisons over seeds, corrections for their number, and jumps of curves."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.ndimage
import scipy.signal
from jaxtyping import Float, Int
from scipy import stats


class Paired(NamedTuple):
    """a - b over seeds: its mean with the 95 % confidence interval of a paired t-test, in nats; p of that test and of
    Wilcoxon's signed-rank test, two-sided; Cohen's d of the differences; how many are positive. `compare` corrects
    both p."""

    difference: float
    low: float
    high: float
    p: float
    p_wilcoxon: float
    effect: float
    wins: int
    num_seeds: int


def paired(a: Float[np.ndarray, " M"], b: Float[np.ndarray, " M"]) -> Paired | None:
    """The paired comparison of two variants, in which seed m has a[m] and b[m]; None for fewer than three seeds.

    Without any difference p is 1 and d is 0; the same one in every seed leaves the t-test p = 0 and an infinite d.
    """
    gap = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    if len(gap) < 3:
        return None
    mean, stddev = float(gap.mean()), float(gap.std(ddof=1))
    # Differences that are equal but for rounding would pass for a huge effect.
    if stddev > 1e-9 * abs(mean):
        test = stats.ttest_1samp(gap, 0.0)
        (low, high), p, effect = test.confidence_interval(0.95), test.pvalue, mean / stddev
    else:
        low, high, p, effect = mean, mean, float(mean == 0.0), math.copysign(math.inf, mean) if mean else 0.0
    return Paired(
        difference=mean,
        low=float(low),
        high=float(high),
        p=float(p),
        p_wilcoxon=float(stats.wilcoxon(gap).pvalue) if gap.any() else 1.0,
        effect=effect,
        wins=int(np.sum(gap > 0.0)),
        num_seeds=len(gap),
    )


def stddev(values: Sequence[float]) -> float:
    """The standard deviation over seeds, by n - 1; 0 for a single one."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def holm(values: Sequence[float]) -> list[float]:
    """p-values, corrected by Holm's step-down for their number."""
    # The smallest p is multiplied by their number, the next by one less; none may fall below one before it.
    order = np.argsort(values)
    factors = np.arange(len(values), 0, -1)
    corrected = np.empty(len(values))
    corrected[order] = np.minimum(np.maximum.accumulate(np.asarray(values)[order] * factors), 1.0)
    return corrected.tolist()


def within(low: float, high: float, *, least: float = -math.inf, most: float) -> bool | None:
    """True if the interval lies between `least` and `most`, False if outside, None if it crosses a limit."""
    if least < low and high < most:
        return True
    return False if low > most or high < least else None


def jumps(
    values: Float[np.ndarray, " T"], *, least: float = 0.05, ratio: float = 2.0
) -> tuple[Int[np.ndarray, " J"], Float[np.ndarray, " J"]]:
    """The change points at which a curve rises from one plateau to a higher one: (indices, rises).

    A jump is a peak of the rate of rise, smoothed over its neighbours, that stands out by the factor `ratio` from the
    rates on both sides of it (a rise from the first value on, however steep, is none), and between the points where the
    rate has fallen by that factor the curve rises by at least `least`. For -log sigma, 0.05 is a fall of 5 %.

    Raises:
      ValueError: `least` is not positive, or `ratio` not above 1.
    """
    if least <= 0.0 or ratio <= 1.0:
        raise ValueError(f"least must be positive and ratio above 1, got {least} and {ratio}")
    rate = scipy.ndimage.gaussian_filter1d(np.diff(np.asarray(values, np.float64)), 1.0)
    level = np.log(np.maximum(rate, least / max(len(rate), 1)))  # slower than that is a plateau
    peaks, found = scipy.signal.find_peaks(level, prominence=math.log(ratio))
    within = (np.full(len(peaks), math.log(ratio)), found["left_bases"], found["right_bases"])
    _, _, left, right = scipy.signal.peak_widths(level, peaks, rel_height=1.0, prominence_data=within)
    rises = values[np.ceil(right).astype(int) + 1] - values[left.astype(int)]
    return peaks[rises >= least], rises[rises >= least]
