import functools

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from scipy import integrate, stats

from lvae_jax import gaussians

KEY = jax.random.key(0)
GAUSSIANS = [(0.0, 0.0), (0.7, -1.5), (-3.0, 0.5), (2.0, 1.2)]  # (mean, log_stddev)
CLIPS = [(-7.0, 2.0, 0.5), (-10.0, 1.0, 0.5), (-1.0, 1.0, 0.25), (-0.25, 8.0, 0.125)]  # (low, high, softness)


def float32(*values):
    """The values as the library sees them, for it and, exactly the same, for a float64 reference."""
    arrays = [np.float32(v) for v in values]
    return [jnp.asarray(a) for a in arrays], [np.float64(a) for a in arrays]


def test_log_prob_is_scipys_from_the_centre_to_far_tails():
    deviation = [-1e3, -30.0, -5.0, -1.0, 0.0, 0.3, 2.0, 9.0, 1e4]
    log_stddev, deviation, mean = np.meshgrid(np.linspace(-7.0, 5.0, 25), deviation, [0.0, 1.0, -250.0])
    ours, (x, m, s) = float32(mean + deviation * np.exp(log_stddev), mean, log_stddev)
    expected = stats.norm.logpdf(x, m, np.exp(s))
    np.testing.assert_allclose(gaussians.log_prob(*ours), expected, rtol=3e-6, atol=3e-6)


def test_log_prob_survives_a_stddev_whose_square_underflows():
    stddev = float(np.exp(-60.0))
    value = gaussians.log_prob(jnp.array([0.0, 2.0 * stddev]), jnp.array(0.0), jnp.array(-60.0))
    np.testing.assert_allclose(value, 60.0 - 0.5 * np.log(2.0 * np.pi) - np.array([0.0, 2.0]), rtol=1e-5)


def test_nothing_sums_and_everything_broadcasts():
    x, mean, log_stddev = jnp.zeros((2, 1, 4)), jnp.zeros((1, 3, 1)), jnp.zeros(())
    assert gaussians.log_prob(x, mean, log_stddev).shape == (2, 3, 4)
    assert gaussians.kl_to_standard(x, mean).shape == (2, 3, 4)
    draws = gaussians.sample(KEY, x, mean)
    assert draws.shape == (2, 3, 4)
    assert len(np.unique(draws)) == draws.size, "broadcasting repeated the noise"


def upper_tail(t):
    with mpmath.workdps(60):
        return mpmath.erfc(t / mpmath.sqrt(2)) / 2


def log_mass_and_gradients(a, b, stddev):
    """log P(a < Z < b) to 60 digits, with its derivatives by the mean and by log stddev; b may be infinite."""
    with mpmath.workdps(60):
        mass = upper_tail(a) - upper_tail(b) if a > 0 else 1 - upper_tail(-a) - upper_tail(b)
        density_a, density_b = (mpmath.npdf(t) for t in (a, b))
        by_log_stddev = a * density_a - (b * density_b if mpmath.isfinite(b) else 0)
        return map(float, (mpmath.log(mass), (density_a - density_b) / stddev / mass, by_log_stddev / mass))


def assert_log_masses(function, x, log_stddev, edges):
    """`function(x, mean, log_stddev)` at mean 0 against mpmath, value and gradients; `edges(x, stddev)` gives the edges
    of the reflected bin in stddevs."""
    value_and_gradients = jax.jit(jax.vmap(jax.value_and_grad(function, (1, 2)), (0, None, 0)))
    ours = value_and_gradients(jnp.array(x), jnp.array(0.0), log_stddev)
    with mpmath.workdps(60):
        stddevs = [mpmath.exp(mpmath.mpf(float(s))) for s in log_stddev]
        expected = np.array(
            [
                list(log_mass_and_gradients(*edges(mpmath.mpf(float(value)), stddev), stddev))
                for value, stddev in zip(x, stddevs, strict=True)
            ]
        ).T
    value, (by_mean, by_log_stddev) = ours
    np.testing.assert_allclose(value, expected[0], rtol=5e-7, atol=5e-7)
    np.testing.assert_allclose(by_mean, expected[1], rtol=3e-5, atol=1e-7)
    np.testing.assert_allclose(by_log_stddev, expected[2], rtol=3e-5, atol=5e-6)


def test_log_cdf_and_gradients_are_right_to_float32():
    log_stddev = np.float32(np.random.default_rng(0).uniform(-7.0, 3.0, 400))
    t = np.concatenate([np.linspace(-8.0, 5.0, 200), -np.geomspace(5.0, 1e5, 200)])
    x = np.float32(t * np.exp(log_stddev))

    def edges(x, stddev):
        return -x / stddev, mpmath.inf

    def reflected(x, mean, log_stddev):  # the cdf falls with the mean as the upper tail rises
        return gaussians.log_cdf(x, -mean, log_stddev)

    assert_log_masses(reflected, x, log_stddev, edges)


def test_log_bin_mass_and_gradients_are_right_to_float32():
    rng = np.random.default_rng(0)
    # From stddevs of a hundredth of a bin to 10^4 bins; near the mean, near the bin's edges, and up to 255 bins away.
    log_stddev = np.float32(rng.uniform(-5.0, 9.0, 1000))
    near = rng.normal(size=1000) * np.exp(log_stddev) + rng.choice([0.0, 0.499, 0.5, 0.501], 1000)
    x = np.float32(np.where(rng.random(1000) < 0.5, near, rng.uniform(0.0, 255.0, 1000)))
    x[:200] = np.where(log_stddev[:200] < 0.0, 0.5, x[:200])  # the mean exactly on the edge

    def edges(x, stddev):
        return (abs(x) - mpmath.mpf(0.5)) / stddev, (abs(x) + mpmath.mpf(0.5)) / stddev

    def reflected(x, mean, log_stddev):
        return gaussians.log_bin_mass(jnp.abs(x), mean, log_stddev)

    assert_log_masses(reflected, x, log_stddev, edges)
    x, log_stddev = jnp.array(x), jnp.array(log_stddev)
    log_mass = jax.jit(gaussians.log_bin_mass)
    below, above = (log_mass(sign * x, jnp.array(sign * 0.3), log_stddev) for sign in (-1.0, 1.0))
    np.testing.assert_array_equal(below, above)


def test_bins_tile_the_line():
    log_stddev, mean = np.meshgrid([-30.0, -3.0, -0.7, -0.6, 0.0, 3.0], [0.0, 0.3, 0.5, -7.7])
    (x, mean, log_stddev), _ = float32(np.arange(-300.0, 300.0)[None], mean.reshape(-1, 1), log_stddev.reshape(-1, 1))
    log_mass = jax.jit(gaussians.log_bin_mass)(x, mean, log_stddev)
    assert np.all(log_mass <= 0.0)
    np.testing.assert_allclose(np.exp(np.float64(log_mass)).sum(axis=1), 1.0, rtol=1e-6)
    # A cdf is the sum of the bins below it.
    below, masses = (
        np.exp(np.float64(log)) for log in (jax.jit(gaussians.log_cdf)(x + 0.5, mean, log_stddev), log_mass)
    )
    np.testing.assert_allclose(below, masses.cumsum(axis=1), rtol=1e-6, atol=1e-7)


def test_log_masses_and_gradients_are_finite_anywhere():
    x, log_stddev = (
        jnp.array(v.ravel())
        for v in np.float32(
            np.meshgrid([0.0, 0.5, -0.5, 0.49999997, 0.50000006, 1.0, 255.0, 1e6, -1e6], np.linspace(-28.0, 60.0, 45))
        )
    )
    for function in (gaussians.log_cdf, gaussians.log_bin_mass):
        found = jax.jit(jax.vmap(jax.value_and_grad(function, (0, 1, 2)), (0, None, 0)))
        for value in found(x, jnp.array(0.0), log_stddev):
            assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(value))


@pytest.mark.parametrize(("mean", "log_stddev"), GAUSSIANS)
def test_sample_has_its_gaussians_distribution(mean, log_stddev):
    n, stddev = 20_000, np.exp(log_stddev)
    draws = np.float64(gaussians.sample(KEY, jnp.full((n,), mean), jnp.array(log_stddev)))
    assert abs(draws.mean() - mean) < 4.0 * stddev / np.sqrt(n)
    assert abs(draws.std() - stddev) < 4.0 * stddev / np.sqrt(2.0 * n)
    assert stats.kstest(draws, stats.norm(mean, stddev).cdf).pvalue > 1e-3


def test_sample_is_reparameterised_and_a_function_of_its_key():
    mean, log_stddev = jnp.array(0.7), jnp.array(-1.5)
    draw, gradients = jax.value_and_grad(lambda args: gaussians.sample(KEY, *args))((mean, log_stddev))
    np.testing.assert_allclose(gradients, (1.0, draw - mean), rtol=1e-5)
    assert draw == gaussians.sample(KEY, mean, log_stddev)
    assert draw != gaussians.sample(jax.random.key(1), mean, log_stddev)


def test_kl_is_its_closed_form():
    ours, (m, s) = float32(*np.meshgrid(np.linspace(-30.0, 30.0, 13), np.linspace(-10.0, 3.0, 14)))
    np.testing.assert_allclose(gaussians.kl_to_standard(*ours), (m**2 + np.exp(2 * s) - 1 - 2 * s) / 2, rtol=2e-6)


def test_kl_is_the_integral_of_its_definition():
    def integral(mean, log_stddev):
        q, p = stats.norm(mean, np.exp(log_stddev)), stats.norm()
        low, high = mean - 12.0 * q.std(), mean + 12.0 * q.std()
        return integrate.quad(lambda z: q.pdf(z) * (q.logpdf(z) - p.logpdf(z)), low, high)[0]

    ours, values = float32(*np.transpose(GAUSSIANS))
    expected = [integral(*pair) for pair in zip(*values, strict=True)]
    np.testing.assert_allclose(gaussians.kl_to_standard(*ours), expected, rtol=1e-6, atol=1e-7)


def test_kl_keeps_its_digits_near_the_prior():
    near = [(0.0, 1e-3), (0.0, -1e-3), (0.0, 1e-4), (1e-4, 0.0), (1e-5, -1e-4)]
    ours, (m, s) = float32(*np.transpose(near))
    series = m**2 / 2 + s**2 + 2 * s**3 / 3 + s**4 / 3
    # exp(2 s) - 1, rounded, is off by 6e-8: 3 % of the KL at s = 1e-3, and six times the KL at 1e-4.
    np.testing.assert_allclose(gaussians.kl_to_standard(*ours), series, rtol=2e-3)


def test_kl_vanishes_at_the_prior_with_its_gradient():
    value, gradients = jax.value_and_grad(gaussians.kl_to_standard, (0, 1))(jnp.array(0.0), jnp.array(0.0))
    assert (value, *gradients) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit])
def test_soft_clip_is_the_identity_to_the_last_bit(transform):
    for low, high, softness in CLIPS:
        value = np.linspace(low + softness, high - softness, 1001, dtype=np.float32)
        value = jnp.array(value.clip(low + softness, high - softness))
        clip = functools.partial(gaussians.soft_clip, low=low, high=high, softness=softness)
        np.testing.assert_array_equal(transform(clip)(value), value)


def test_soft_clip_softens_the_last_half_by_default():
    value = jnp.linspace(-9.0, 4.0, 101)
    expected = gaussians.soft_clip(value, -7.0, 2.0, softness=0.5)
    np.testing.assert_array_equal(gaussians.soft_clip(value, -7.0, 2.0), expected)


@pytest.mark.parametrize(("low", "high", "softness"), CLIPS)
def test_soft_clip_approaches_its_limits_exponentially(low, high, softness):
    (value,), (v,) = float32(np.linspace(low - 5.0 * softness, high + 5.0 * softness, 4001))
    clip = jax.vmap(jax.value_and_grad(lambda v: gaussians.soft_clip(v, low, high, softness=softness)))
    clipped, slope = map(np.asarray, jax.jit(clip)(value))
    # Value and slope match the identity's at the knee: that leaves one exponential.
    knee = np.clip(v, low + softness, high - softness)
    expected_slope = np.exp(-abs(v - knee) / softness)
    np.testing.assert_allclose(
        clipped, knee + softness * np.sign(v - knee) * (1.0 - expected_slope), rtol=3e-7, atol=1e-6
    )
    np.testing.assert_allclose(slope, expected_slope, rtol=1e-4)
    assert np.all(np.diff(clipped) >= 0.0)
    assert np.all((low < clipped) & (clipped < high) & (slope > 0.0))


def test_soft_clip_and_its_slope_stay_finite_at_any_value():
    value = np.float32([1e2, 1e10, 1e30, np.finfo(np.float32).max, np.inf])
    value = jnp.array(np.concatenate([value, -value]))
    clipped, slope = jax.vmap(jax.value_and_grad(lambda v: gaussians.soft_clip(v, -7.0, 2.0)))(value)
    np.testing.assert_array_equal(clipped, np.where(value > 0.0, 2.0, -7.0))
    assert np.all((slope >= 0.0) & (slope < 1e-30))
