"""Grey levels: everything that follows from their number, at 8 bits and at the 17 of the digits."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from experiments import domains, variants
from lvae_jax import datasets, evaluation, likelihoods
from lvae_jax.evaluation import Kind

LEVELS = (17, 256)


@pytest.fixture(params=LEVELS)
def levels(request):
    return request.param


@pytest.fixture(params=[False, True], ids=["centred", "dequantised"])
def dequantised(request):
    return request.param


def log_bin_masses(levels, mean, sigma, *, dequantised=False, family=scipy.stats.norm):
    """log P(k), by scipy, of a distribution rounded to the grid k / (levels - 1), or of its mass on [k / levels,
    (k + 1) / levels)."""
    inner = np.arange(1, levels) / levels if dequantised else (np.arange(levels - 1) + 0.5) / (levels - 1)
    edges = np.concatenate([[-np.inf], inner, [np.inf]])
    return np.log(np.diff(family.cdf(edges, mean, sigma / family.std())))


def middles(levels, *, dequantised=False):
    """An x [levels, 1] of each level."""
    return (jnp.arange(levels)[:, None] + 0.5) / levels if dequantised else jnp.linspace(0.0, 1.0, levels)[:, None]


FAMILIES = {"fixed": scipy.stats.norm, "logistic": scipy.stats.logistic}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("mean", "sigma"), [(0.3, 0.1), (0.98, 0.3)])
def test_discretised_against_scipy(levels, dequantised, name, mean, sigma):
    head = likelihoods.discretised(getattr(likelihoods, name)(sigma), levels=levels, dequantised=dequantised)
    outputs = jnp.zeros((levels, 1, head.outputs)).at[..., 0].set(mean)
    log_prob = head.log_prob(head.init(), outputs, middles(levels, dequantised=dequantised))
    expected = log_bin_masses(levels, mean, sigma, dequantised=dequantised, family=FAMILIES[name])
    probable = expected > -15.0  # below, differences of cdfs have lost their digits, scipy's
    np.testing.assert_allclose(log_prob[probable], expected[probable], rtol=2e-4)
    assert float(jnp.exp(log_prob).sum()) == pytest.approx(1.0, abs=1e-5)


def test_discretised_draws_have_their_probabilities(levels, dequantised):
    head = likelihoods.discretised(likelihoods.fixed(0.2), levels=levels, dequantised=dequantised)
    outputs = jnp.full((20_000, 1, 1), 0.1)
    drawn = np.asarray(head.sample(jax.random.key(0), head.init(), outputs)).ravel()
    k = drawn * levels - 0.5 if dequantised else drawn * (levels - 1)
    np.testing.assert_allclose(k, np.rint(k), atol=1e-4)
    counts = np.bincount(np.rint(k).astype(int), minlength=levels)
    expected = 20_000 * np.exp(log_bin_masses(levels, 0.1, 0.2, dequantised=dequantised))
    pooled = np.add.reduceat(np.stack([counts, expected]), np.arange(0, levels, -(-levels // 16)), axis=1)
    pooled = pooled[:, pooled[1] > 5.0]
    chi_square = np.sum((pooled[0] - pooled[1]) ** 2 / pooled[1])
    assert chi_square < scipy.stats.chi2.isf(1e-4, pooled.shape[1] - 1)


def test_dequantised_pixels_lie_in_their_cells(levels):
    k = jnp.arange(levels, dtype=jnp.uint8)[:, None]
    x = datasets.dequantize(jax.random.split(jax.random.key(0), levels), jnp.repeat(k, 500, axis=1), levels=levels)
    np.testing.assert_array_equal(jnp.floor(x * levels), jnp.repeat(k, 500, axis=1))
    inside = np.asarray(x * levels - k).ravel()
    assert scipy.stats.kstest(inside, "uniform").pvalue > 1e-4


def test_dequantised_bins_hold_their_pixels(levels):
    """Each x of [k / L, (k + 1) / L) has the probability of level k, both ends of the bin in float32 included."""
    head = likelihoods.discretised(likelihoods.fixed(0.5), levels=levels, dequantised=True)

    def log_prob(x):  # falls with the level: each has its own
        return head.log_prob(head.init(), jnp.full((levels, 1, 1), -0.2), jnp.array(x, jnp.float32)[:, None])

    k = np.arange(levels)
    expected = log_prob((k + 0.5) / levels)
    assert np.all(np.diff(expected[:-1]) < 0.0)
    keys = jax.random.split(jax.random.key(0), levels)
    drawn = datasets.dequantize(keys, jnp.array(k[:, None], jnp.uint8), levels=levels)[:, 0]
    for x in (np.float32(k / levels), np.nextafter(np.float32((k + 1) / levels), np.float32(0.0)), drawn):
        np.testing.assert_array_equal(log_prob(x), expected)
    below, above = np.float32([-0.3, 1.2])
    np.testing.assert_array_equal(log_prob(np.full(levels, below)), expected[0])
    np.testing.assert_array_equal(log_prob(np.full(levels, above)), expected[-1])


@pytest.mark.parametrize("sigma", [0.1, 0.5])
def test_dequantised_density_bounds_the_probability(levels, sigma):
    """By Jensen: the mean over u of log p((k + u) / L) - ln L is at most log P(k)."""
    head = likelihoods.discretised(likelihoods.fixed(sigma), levels=levels, dequantised=True)
    log_prob = head.log_prob(head.init(), jnp.full((levels, 1, 1), 0.4), middles(levels, dequantised=True))
    u = (np.arange(1000) + 0.5) / 1000.0
    x = (np.arange(levels)[:, None] + u) / levels
    bound = scipy.stats.norm.logpdf(x, 0.4, sigma).mean(axis=1) - math.log(levels)
    slack = 1e-6 * (1.0 + abs(bound))  # of float32
    assert np.all(bound <= log_prob + slack)
    # Near it where the density hardly changes within a bin; the first and the last one are open.
    smooth = abs(x - 0.4).max(axis=1)[1:-1] / sigma**2 / levels < 0.5
    assert smooth.any()
    assert np.all((log_prob - bound)[1:-1][smooth] < 0.02)


def test_dequantised_elbo_bounds_the_probability(levels):
    """E_u log p((k + u) / L) - ln L is at most log P(k), the mass of p on the cell, and near it for a smooth p."""
    u = (np.arange(1000) + 0.5) / 1000.0
    k = np.arange(levels)[:, None]
    bound = scipy.stats.norm.logpdf((k + u) / levels, 0.4, 0.5).mean(axis=1)
    mass = np.log(np.diff(scipy.stats.norm.cdf(np.arange(levels + 1) / levels, 0.4, 0.5)))
    rates = [evaluation.rate(value, (1,), kind=Kind.DEQUANTISED, levels=levels) for value in bound]
    lengths = np.array([rate.bits_per_dimension for rate in rates]) * math.log(2.0)
    assert (lengths >= -mass).all()
    np.testing.assert_allclose(lengths, -mass, rtol=1e-3)


def test_uniform_noise_has_all_bits(levels):
    for kind, elbo in ((Kind.DENSITY, 0.0), (Kind.DEQUANTISED, 0.0), (Kind.DISCRETISED, -6.0 * math.log(levels))):
        rate = evaluation.rate(elbo, (2, 3, 1), kind=kind, levels=levels)
        assert rate.bits_per_dimension == pytest.approx(math.log2(levels))
        assert rate.bound == (0.0 if kind == Kind.DISCRETISED else pytest.approx(6.0 * math.log(levels)))


def test_quantisation_noise_is_that_of_rounding(levels):
    x = np.random.default_rng(0).uniform(0.0, 1.0, 200_000)
    error = np.rint(x * (levels - 1)) / (levels - 1) - x
    assert likelihoods.quantisation_noise(levels) == pytest.approx(error.std(), rel=1e-2)
    vae = variants.make_vae("ls", domains.IMAGES, datasets.Form((8, 8, 1), levels), 2, 1.0, widths=(4,), num_blocks=1)
    assert vae.likelihood.floor == likelihoods.quantisation_noise(levels)


def test_black_and_white_are_0_and_1(levels):
    x = np.array([[0, levels - 1]], np.uint8)
    np.testing.assert_array_equal(datasets.to_float(x, levels=levels), [[0.0, 1.0]])


def test_reduced_levels_drop_low_bits():
    full, reduced = (datasets.load("mnist", fake_data=True, levels=levels) for levels in (None, 32))
    assert (full.levels, reduced.levels) == (256, 32)
    for name in ("train", "test"):
        np.testing.assert_array_equal(getattr(reduced, name), getattr(full, name) // 8)
    seen = reduced.test_batch(reduced.test, jax.random.key(0), jnp.arange(len(reduced.test)))
    np.testing.assert_allclose(np.unique(seen), np.unique(reduced.test) / 31.0, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "levels", "message"),
    [("mnist", 17, "`levels`=17: must be one of 2, 4, "), ("toy", 32, "is for images"), ("digits", 8, "is for 8-bit")],
)
def test_refused_levels(name, levels, message):
    with pytest.raises(datasets.DatasetError, match=message):
        datasets.check(name, levels=levels)


@pytest.mark.parametrize(
    "call",
    [
        lambda: likelihoods.discretised(likelihoods.fixed(), levels=1),
        lambda: likelihoods.quantisation_noise(1),
        lambda: evaluation.rate(0.0, (1,), kind=Kind.DENSITY, levels=1),
    ],
)
def test_one_level_is_refused(call):
    with pytest.raises(ValueError, match="levels must be at least 2, got 1"):
        call()
