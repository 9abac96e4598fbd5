import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from scipy import stats

from lvae_jax import logistics

KEY = jax.random.key(0)
LOGISTICS = [(0.0, 0.0), (0.7, -1.5), (-3.0, 0.5), (2.0, 1.2)]  # (mean, log_stddev)
FUNCTIONS = {name: getattr(logistics, name) for name in ("log_prob", "log_cdf", "log_bin_mass")}


def scipys(mean, log_stddev):
    return stats.logistic(mean, np.exp(log_stddev) / stats.logistic.std())


def test_log_prob_is_scipys_from_the_centre_to_far_tails():
    deviation = [-1e4, -1e3, -30.0, -5.0, -1.0, 0.0, 0.3, 2.0, 9.0, 1e4]
    log_stddev, deviation, mean = np.meshgrid(np.linspace(-7.0, 5.0, 25), deviation, [0.0, 1.0, -250.0])
    x, m, s = (np.float32(v) for v in (mean + deviation * np.exp(log_stddev), mean, log_stddev))
    ours = logistics.log_prob(*map(jnp.asarray, (x, m, s)))
    expected = scipys(np.float64(m), np.float64(s)).logpdf(np.float64(x))
    np.testing.assert_allclose(ours, expected, rtol=3e-6, atol=3e-6)


def test_stddev_is_the_distributions_own():
    """The scale by which the literature describes it is smaller, by sqrt(3) / pi."""
    x = np.linspace(-60.0, 60.0, 4001)
    density = np.exp(np.float64(logistics.log_prob(jnp.array(x, jnp.float32), jnp.array(0.5), jnp.array(1.0))))
    np.testing.assert_allclose(np.trapezoid(density, x), 1.0, rtol=1e-6)
    np.testing.assert_allclose(np.trapezoid(density * (x - 0.5) ** 2, x), np.exp(2.0), rtol=1e-6)


def test_nothing_sums_and_everything_broadcasts():
    x, mean, log_stddev = jnp.zeros((2, 1, 4)), jnp.zeros((1, 3, 1)), jnp.zeros(())
    for function in FUNCTIONS.values():
        assert function(x, mean, log_stddev).shape == (2, 3, 4)
    draws = logistics.sample(KEY, x, mean)
    assert draws.shape == (2, 3, 4)
    assert len(np.unique(draws)) == draws.size, "broadcasting repeated the noise"


def sigmoid(t):
    return 1 / (1 + mpmath.exp(-t))


def density_and_gradients(t, scale):
    """The log density at t scales from the mean, with its derivatives by the mean and by log stddev."""
    slope = mpmath.tanh(t / 2)
    return mpmath.log(sigmoid(t) * sigmoid(-t) / scale), slope / scale, t * slope - 1


def mass_and_gradients(a, b, scale):
    """log P(a < T < b), T = (X - mean) / scale, with its derivatives by the mean and by log stddev; a may be -inf."""
    low, high = (-b, -a) if a + b > 0 else (a, b)  # on the side of the mean where nothing cancels
    mass = sigmoid(high) - (sigmoid(low) if mpmath.isfinite(low) else 0)
    density_a, density_b = (sigmoid(t) * sigmoid(-t) if mpmath.isfinite(t) else mpmath.mpf(0) for t in (a, b))
    by_log_stddev = (a * density_a if mpmath.isfinite(a) else 0) - b * density_b
    return mpmath.log(mass), (density_a - density_b) / scale / mass, by_log_stddev / mass


EXPECTED = {  # (x - mean, scale) -> the value and its derivatives by the mean and by log stddev
    "log_prob": lambda x, scale: density_and_gradients(x / scale, scale),
    "log_cdf": lambda x, scale: mass_and_gradients(-mpmath.inf, x / scale, scale),
    "log_bin_mass": lambda x, scale: mass_and_gradients((x - 0.5) / scale, (x + 0.5) / scale, scale),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_and_gradients_are_right_to_float32(name):
    rng = np.random.default_rng(0)
    # Stddevs from 10^-4 bins to 10^4 bins; x beside the mean, near the edges of a bin, and up to 10^4 stddevs away.
    log_stddev = np.float32(rng.uniform(-np.log(1e4), np.log(1e4), 400))
    far = rng.choice([-1.0, 1.0], 400) * 10.0 ** rng.uniform(0.0, 4.0, 400)
    deviation = np.where(rng.random(400) < 0.5, rng.normal(size=400), far)
    x = np.float32(deviation * np.exp(log_stddev) + rng.choice([0.0, 0.499, 0.5, 0.501, -0.5], 400))
    x[:40] = np.repeat(np.float32([0.0, 0.5, -0.5, 1.0]), 10)
    value_and_gradients = jax.jit(jax.vmap(jax.value_and_grad(FUNCTIONS[name], (1, 2)), (0, None, 0)))
    value, (by_mean, by_log_stddev) = value_and_gradients(jnp.array(x), jnp.array(0.0), jnp.array(log_stddev))
    with mpmath.workdps(60):
        scales = [mpmath.exp(mpmath.mpf(float(s))) * mpmath.sqrt(3) / mpmath.pi for s in log_stddev]
        pairs = zip(map(mpmath.mpf, map(float, x)), scales, strict=True)
        expected = np.array([[float(number) for number in EXPECTED[name](*pair)] for pair in pairs]).T
        inverse_scales = np.array([float(1 / scale) for scale in scales])
    np.testing.assert_allclose(value, expected[0], rtol=1e-6, atol=1e-6)
    # A gradient by the mean is the difference of sigmoids, of the size of 1 / scale.
    np.testing.assert_allclose(by_mean / inverse_scales, expected[1] / inverse_scales, rtol=1e-5, atol=5e-7)
    np.testing.assert_allclose(by_log_stddev, expected[2], rtol=1e-5, atol=5e-6)
    if name != "log_prob":
        assert np.all(value <= 0.0)


def test_bins_are_symmetric_about_the_mean():
    x, log_stddev = (jnp.array(v.ravel()) for v in np.float32(np.meshgrid([0.3, 0.5, 7.0], [-9.0, 0.0, 9.0])))
    below, above = (logistics.log_bin_mass(sign * x, jnp.array(sign * 0.3), log_stddev) for sign in (-1.0, 1.0))
    np.testing.assert_array_equal(below, above)


def test_bins_tile_the_line():
    log_stddev, mean = np.meshgrid([-30.0, -3.0, -0.7, 0.0, 2.0], [0.0, 0.3, 0.5, -7.7])
    x = jnp.arange(-300.0, 300.0)[None]
    mean, log_stddev = (jnp.array(v.reshape(-1, 1), jnp.float32) for v in (mean, log_stddev))
    log_mass = jax.jit(logistics.log_bin_mass)(x, mean, log_stddev)
    assert np.all(log_mass <= 0.0)
    np.testing.assert_allclose(np.exp(np.float64(log_mass)).sum(axis=1), 1.0, rtol=1e-6)
    # A cdf is the sum of the bins below it.
    below, masses = (
        np.exp(np.float64(log)) for log in (jax.jit(logistics.log_cdf)(x + 0.5, mean, log_stddev), log_mass)
    )
    np.testing.assert_allclose(below, masses.cumsum(axis=1), rtol=1e-6, atol=2e-7)


def test_values_and_gradients_are_finite_anywhere():
    x, log_stddev = (
        jnp.array(v.ravel())
        for v in np.float32(
            np.meshgrid([0.0, 0.5, -0.5, 0.49999997, 0.50000006, 1.0, 255.0, 1e6, -1e6], np.linspace(-28.0, 60.0, 45))
        )
    )
    for name, function in FUNCTIONS.items():
        found = jax.jit(jax.vmap(jax.value_and_grad(function, (0, 1, 2)), (0, None, 0)))(x, jnp.array(0.0), log_stddev)
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(found)), name
        assert name == "log_prob" or np.all(found[0] <= 0.0), name


@pytest.mark.parametrize(("mean", "log_stddev"), LOGISTICS)
def test_sample_has_its_distribution(mean, log_stddev):
    n, stddev = 20_000, np.exp(log_stddev)
    draws = np.float64(logistics.sample(KEY, jnp.full((n,), mean), jnp.array(log_stddev)))
    assert abs(draws.mean() - mean) < 4.0 * stddev / np.sqrt(n)
    # Var (X - mean)^2 = 3.2 stddev^4: the kurtosis is 4.2, a Gaussian's 3.
    assert abs(draws.std() - stddev) < 4.0 * stddev * np.sqrt(0.8 / n)
    assert stats.kstest(draws, scipys(mean, log_stddev).cdf).pvalue > 1e-3


def test_sample_is_reparameterised_and_a_function_of_its_key():
    mean, log_stddev = jnp.array(0.7), jnp.array(-1.5)
    draw, gradients = jax.value_and_grad(lambda args: logistics.sample(KEY, *args))((mean, log_stddev))
    np.testing.assert_allclose(gradients, (1.0, draw - mean), rtol=1e-5)
    assert draw == logistics.sample(KEY, mean, log_stddev)
    assert draw != logistics.sample(jax.random.key(1), mean, log_stddev)
