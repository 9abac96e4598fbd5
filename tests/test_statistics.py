"""Paired tests against scipy, Holm's correction by hand, and jumps of curves that have them, or none."""

import numpy as np
import pytest
from scipy import stats

from experiments import statistics


def test_paired_comparisons_are_scipy_s():
    a, b = np.random.default_rng(0).standard_normal((2, 12))
    found = statistics.paired(a, b)
    test = stats.ttest_rel(a, b)
    assert found.p == pytest.approx(test.pvalue, rel=1e-12)
    assert (found.low, found.high) == pytest.approx(test.confidence_interval(), rel=1e-12)
    assert found.p_wilcoxon == pytest.approx(stats.wilcoxon(a, b).pvalue, rel=1e-12)
    assert found.effect == pytest.approx(test.statistic / np.sqrt(12), rel=1e-12), "d of paired data is t / sqrt(n)"
    assert found.wins == np.sum(a > b)
    swapped = statistics.paired(b, a)
    assert (swapped.difference, swapped.p) == pytest.approx((-found.difference, found.p), rel=1e-12)
    assert statistics.paired(a[:2], b[:2]) is None


def test_paired_comparisons_without_variation():
    a = np.random.default_rng(0).standard_normal(10)
    same, shifted = statistics.paired(a, a), statistics.paired(np.ones(10), np.zeros(10))
    assert same == statistics.Paired(0.0, 0.0, 0.0, p=1.0, p_wilcoxon=1.0, effect=0.0, wins=0, num_seeds=10)
    assert (shifted.difference, shifted.low, shifted.high, shifted.p, shifted.wins) == (1.0, 1.0, 1.0, 0.0, 10)
    assert shifted.p_wilcoxon == pytest.approx(2.0**-9), "all ten signs agree"


def test_holm_s_correction_by_hand():
    # Sorted .01, .02, .03, .04 times 4, 3, 2, 1, never decreasing.
    np.testing.assert_allclose(statistics.holm([0.03, 0.01, 0.04, 0.02]), [0.06, 0.04, 0.06, 0.06])
    np.testing.assert_allclose(statistics.holm([0.9, 0.8]), [1.0, 1.0])
    assert statistics.holm([]) == []


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(-0.04, 0.04, True), (0.01, 0.06, None), (-0.06, 0.06, None), (0.06, 0.09, False), (-0.09, -0.06, False)],
)
def test_interval_is_within_limits_beyond_or_neither(low, high, expected):
    assert statistics.within(low, high, least=-0.05, most=0.05) is expected


def staircase(heights, times, length=100, width=1.5):
    t = np.arange(length)
    return sum(h / (1.0 + np.exp(-(t - at) / width)) for h, at in zip(heights, times, strict=True))


def test_jumps_are_found_where_and_as_high_as_they_are():
    indices, rises = statistics.jumps(staircase([1.0, 0.2, 0.5], [20, 50, 75]))
    np.testing.assert_allclose(indices, [20, 50, 75], atol=1)
    # Between the points where a logistic rises half as fast as at its middle: tanh(arccosh(sqrt 2)) of it.
    np.testing.assert_allclose(rises, np.array([1.0, 0.2, 0.5]) * np.sqrt(0.5), rtol=0.3)


@pytest.mark.parametrize(
    "values",
    [
        3.0 * (1.0 - np.exp(-np.arange(100) / 15.0)),  # a steep start is no jump: no plateau came before
        0.02 * np.arange(100.0),
        np.zeros(100),
        staircase([0.04, 0.04], [30, 70]),  # too low
        -staircase([1.0, 0.5], [30, 70]),  # falls
        np.zeros(3),
    ],
    ids=["relaxation", "line", "constant", "low", "falling", "short"],
)
def test_curve_without_jumps_has_none(values):
    indices, rises = statistics.jumps(values)
    assert len(indices) == len(rises) == 0


def test_jumps_do_not_depend_on_where_the_curve_starts():
    values = staircase([0.3, 0.6], [40, 60])
    np.testing.assert_array_equal(statistics.jumps(values)[0], statistics.jumps(values + 1e3)[0])
    assert len(statistics.jumps(values, least=0.5)[0]) < len(statistics.jumps(values)[0]) == 2


@pytest.mark.parametrize("options", [{"least": 0.0}, {"ratio": 1.0}])
def test_jumps_refuse_impossible_thresholds(options):
    with pytest.raises(ValueError, match="least must be positive and ratio above 1"):
        statistics.jumps(np.arange(9.0), **options)
