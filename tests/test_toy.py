import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, special, stats
from scipy.spatial import cKDTree

from lvae_jax import toy

# The definition in toy's docstring, in float64.
THIRDS = np.array([-1.0, -1.0 / 3.0, 1.0 / 3.0, 1.0])
NOISE = (0.05, 0.02, 0.1)
POINTS = 100_000


def curve(u):
    return np.stack([np.pi * u, np.cos(np.pi * u)], -1)


def log_normal(u, x, noise):
    """log N(x; curve(u), noise^2 I), x [2]."""
    return -((x - curve(u)) ** 2).sum(-1) / (2.0 * noise**2) - np.log(2.0 * np.pi * noise**2)


def log_mass(x, low, high, noise):
    """The log of the integral over a region's u, adaptive on either side of the nearest point of the curve."""
    u = np.linspace(low, high, 20_001)
    values = log_normal(u, x, noise)
    nearest, peak = u[values.argmax()], values.max()

    def mass(low, high):
        return integrate.quad(lambda v: np.exp(log_normal(v, x, noise) - peak), low, high, epsabs=1e-12, limit=500)[0]

    return peak + np.log(mass(low, nearest) + mass(nearest, high))


def reference(x):
    """log p(x), x [2]."""
    return np.logaddexp.reduce(list(map(log_mass, [x] * 3, THIRDS, THIRDS[1:], NOISE))) - np.log(2.0)


@pytest.fixture(scope="module")
def points():
    return toy.sample(jax.random.split(jax.random.key(0), POINTS))


@pytest.fixture(scope="module")
def grid():
    """Log densities on a grid that leaves out nothing, and the area of a cell.

    The trapezoid rule converges exponentially: at a spacing of the smallest noise its error is 2 exp(-2 pi^2).
    """
    spacing = min(NOISE)
    axes = np.arange(-4.0, 4.0, spacing), np.arange(-2.0, 2.0, spacing)
    cells = jnp.array(np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 2), jnp.float32)
    log_prob = jax.lax.map(lambda x: toy.log_prob(x[None])[0], cells, batch_size=1_000)
    return np.float64(log_prob), spacing**2


def test_curve_and_noise_are_the_documented_ones():
    u = np.array([-0.99, -0.5, -0.34, -0.33, 0.0, 0.33, 0.34, 0.99])
    np.testing.assert_allclose(toy.curve(jnp.array(u)), curve(u), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(toy.noise(jnp.array(u)), [0.05, 0.05, 0.05, 0.02, 0.02, 0.02, 0.1, 0.1])


ON_CURVE = curve(np.array([-0.999, -0.6, -1 / 3, 0.0, 0.2, 1 / 3, 0.8, 1.0]))
OFF_CURVE = np.array(
    [(0, 1.1), (1.07, 0.48), (0, 0), (1, 1), (-3.3, -1.2), (3.5, -0.5), (-1, 3), (0, -4), (8, 5), (-9, 0)]
)


def test_log_prob_is_that_of_adaptive_quadrature():
    x = np.float32([*ON_CURVE, *OFF_CURVE])
    np.testing.assert_allclose(toy.log_prob(jnp.array(x)), [*map(reference, np.float64(x))], rtol=2e-6, atol=1e-5)


def test_log_prob_is_converged_in_its_nodes(points):
    x = jnp.concatenate([points[:200], jnp.array(ON_CURVE)])
    coarse, fine = np.float64(toy.log_prob(x)), np.float64(toy.log_prob(x, num_nodes=800))
    np.testing.assert_allclose(coarse, fine, rtol=2e-6, atol=1e-5)


def test_density_integrates_to_one(grid):
    log_prob, area = grid
    np.testing.assert_allclose(np.exp(log_prob).sum() * area, 1.0, rtol=1e-5)


def test_samples_have_the_densitys_entropy(points, grid):
    log_prob, area = grid
    draws = np.float64(jax.lax.map(lambda x: toy.log_prob(x[None])[0], points[:20_000], batch_size=1_000))
    error = abs(draws.mean() - (np.exp(log_prob) * log_prob).sum() * area) / (draws.std() / np.sqrt(len(draws)))
    assert error < 4.0, f"{error:.1f} standard errors"


def test_samples_fill_a_coarse_grid_as_the_definition_does(points):
    edges = np.linspace(-3.6, 3.6, 61), np.linspace(-1.4, 1.4, 29)
    counts, *_ = np.histogram2d(*np.float64(points).T, edges)
    # The mass of a cell given u is a product of two differences of normal distribution functions.
    u = -1.0 + (2.0 * np.arange(6_000) + 1.0) / 6_000
    noise = np.repeat(NOISE, 2_000)
    masses = [np.diff(stats.norm.cdf((e[:, None] - c) / noise), axis=0) for e, c in zip(edges, curve(u).T, strict=True)]
    expected = POINTS * np.einsum("iu,ju->ij", *masses) / len(u)
    full = expected > 10.0
    observed, expected = (np.append(cells[full], POINTS - cells[full].sum()) for cells in (counts, expected))
    assert stats.chisquare(observed, expected).pvalue > 1e-3


def test_each_region_has_a_third_of_the_samples_and_its_own_noise(points):
    x = np.float64(points)
    edges = np.pi * THIRDS
    # At an edge as many leave a region as enter it, but for the difference of two noises.
    fractions = np.histogram(x[:, 0].clip(-np.pi, np.pi), edges)[0] / POINTS
    np.testing.assert_allclose(fractions, 1.0 / 3.0, atol=4.0 * np.sqrt(2.0 / 9.0 / POINTS))
    # To first order the residual is the noise in x[1] and, times the slope of the curve, the noise in x[0].
    residual = (x[:, 1] - np.cos(x[:, 0])) / np.sqrt(1.0 + np.sin(x[:, 0]) ** 2)
    for low, high, noise in zip(edges, edges[1:], NOISE, strict=False):
        inside = residual[(low + 0.3 < x[:, 0]) & (x[:, 0] < high - 0.3)]
        np.testing.assert_allclose(inside.std(), noise, rtol=0.03)


def test_there_is_one_point_for_each_key(points):
    keys = jax.random.split(jax.random.key(0), POINTS)
    np.testing.assert_array_equal(toy.sample(keys[:7]), points[:7])
    np.testing.assert_array_equal(toy.sample(keys[5:9][::-1]), points[5:9][::-1])
    assert len(np.unique(points, axis=0)) > 0.999 * POINTS


def test_critical_sigma_is_the_documented_one(points):
    critical = np.sqrt(np.linalg.eigvalsh(np.cov(np.float64(points).T))[-1])
    np.testing.assert_allclose(critical, np.sqrt(np.pi**2 / 3.0 + np.mean(np.square(NOISE))), rtol=5e-3)
    np.testing.assert_allclose(critical, 1.81, atol=0.01)


def test_nearest_point_of_the_curve_is_the_nearest():
    x = np.random.default_rng(0).uniform([-4.0, -2.0], [4.0, 2.0], (500, 2)).astype(np.float32)
    u = np.float64(toy.nearest(jnp.asarray(x)))
    assert np.abs(u).max() <= 1.0
    distance = np.linalg.norm(x - curve(u), axis=-1)
    best = np.min(np.linalg.norm(x[:, None] - curve(np.linspace(-1.0, 1.0, 20_001))[None], axis=-1), axis=1)
    np.testing.assert_allclose(distance, best, atol=2e-6)


def test_nearest_point_at_a_centre_of_curvature():
    # The circle that touches y = cos x at (0, 1) has radius 1: from its centre the distance has no curvature.
    np.testing.assert_allclose(toy.nearest(jnp.array([[0.0, 0.0]])), 0.0, atol=2e-2)


def test_offsets_undo_displacements_along_the_normal():
    u = np.linspace(-0.95, 0.95, 200)
    slope = -np.sin(np.pi * u)
    normal = np.stack([-slope, np.ones_like(u)], -1) / np.sqrt(1.0 + slope**2)[:, None]
    shift = np.random.default_rng(1).uniform(-0.08, 0.08, 200)  # within the smallest radius of curvature
    x = jnp.asarray(curve(u) + shift[:, None] * normal, jnp.float32)
    np.testing.assert_allclose(toy.nearest(x), u, atol=1e-5)
    np.testing.assert_allclose(toy.offset(x, jnp.asarray(u, jnp.float32)), shift, atol=2e-6)
    for part in (1.0, 0.5, 0.0, -0.25):
        kept = jnp.asarray(curve(u) + part * shift[:, None] * normal, jnp.float32)
        np.testing.assert_allclose(toy.noise_kept(kept, x), part, atol=1e-4)
        along = kept + 0.3 * jnp.asarray(np.stack([normal[:, 1], -normal[:, 0]], -1), jnp.float32)
        np.testing.assert_allclose(toy.noise_kept(along, x), part, atol=1e-4, err_msg="moved along the tangent")


def test_band_of_true_points_has_the_true_noise(points):
    x = np.float64(points[:20_000])
    dense = np.linspace(-1.0, 1.0, 40_001)
    distance, u = cKDTree(curve(dense)).query(x)
    region = np.digitize(dense[u], THIRDS[1:3])
    widths = toy.band_widths(points[:20_000])
    np.testing.assert_allclose(
        widths, [np.quantile(distance[region == index], 0.6827) for index in range(3)], rtol=1e-3
    )
    # Some points of the wide regions lie nearest to the narrow one.
    np.testing.assert_allclose(widths, NOISE, rtol=0.05)
    wide = toy.curve(jnp.linspace(-0.3, 0.3, 50)) + jnp.array([[0.0, 0.4]])
    widths = toy.band_widths(wide)
    assert widths[0] == widths[2] == 0.0, "a region without points"
    assert widths[1] > 0.2


# The limits of VAEs


@functools.cache
def cloud():
    """Points of the toy and their log density by `toy.log_prob`: another quadrature than the entropy's."""
    x = toy.sample(jax.random.split(jax.random.key(0), 10_000))
    return np.float64(x), np.float64(jax.jit(toy.log_prob)(x))


@functools.cache
def limit(sigma):
    return toy.best_elbo(sigma)


def test_entropy_is_that_of_the_density():
    x, log_prob = cloud()
    assert abs(-log_prob.mean() - toy.entropy()) < 4.0 * log_prob.std() / np.sqrt(len(x))


def test_entropy_is_converged(monkeypatch):
    coarse = toy.entropy()
    monkeypatch.setattr(toy, "_CELL", toy._CELL / 2.0)
    monkeypatch.setattr(toy, "_cells", toy._cells.__wrapped__)
    np.testing.assert_allclose(coarse, toy.entropy(), atol=1e-6)


def test_small_sigmas_reach_the_entropy():
    assert toy.best_elbo(0.02) == toy.best_elbo(1e-3) == (-toy.entropy(),) * 2


def test_large_sigmas_lose_the_curve():
    """Above the critical sigma, 1.81, the best mixture is one Gaussian at the mean."""
    for sigma in (1.85, 3.0):
        square = np.pi**2 / 3.0 + 0.5 + 2.0 * np.mean(np.square(toy.NOISE))
        gaussian = -square / (2.0 * sigma**2) - np.log(2.0 * np.pi * sigma**2)
        low, high = limit(sigma)
        assert high - 0.01 <= low <= gaussian + 1e-6
        assert gaussian - 1e-6 <= high <= gaussian + 0.01
    assert limit(1.7)[0] > -square / (2.0 * 1.7**2) - np.log(2.0 * np.pi * 1.7**2)


@pytest.mark.parametrize("sigma", [0.1, 1.0])
def test_no_mixture_exceeds_the_limit_and_em_comes_close(sigma):
    """Gaussians with free centres, fitted by EM to a sample and judged on another: a method without a grid."""
    x, _ = cloud()
    train, test = x[:2_000], x[2_000:]
    rng = np.random.default_rng(0)
    centres, log_weight = train[rng.choice(len(train), 100, replace=False)], np.full(100, -np.log(100.0))

    def joint(x):
        squared_distance = (x**2).sum(-1)[:, None] - 2.0 * x @ centres.T + (centres**2).sum(-1)
        return log_weight - squared_distance / (2.0 * sigma**2) - np.log(2.0 * np.pi * sigma**2)

    for _ in range(60):
        share = np.exp(joint(train) - joint(train).max(axis=1, keepdims=True))
        share /= share.sum(axis=1, keepdims=True)
        centres, log_weight = share.T @ train / share.sum(0)[:, None], np.log(share.mean(0))
    log_prob = special.logsumexp(joint(test), axis=1)
    low, high = limit(sigma)
    error = log_prob.std() / np.sqrt(len(test))
    assert 0.0 < high - low <= 0.01
    assert log_prob.mean() < high + 4.0 * error
    assert log_prob.mean() > low - 0.02 - 4.0 * error


def test_limit_falls_with_sigma():
    highs = [limit(sigma)[1] for sigma in (0.02, 0.1, 0.4, 1.0, 1.7)]
    assert highs == sorted(highs, reverse=True)


@pytest.mark.parametrize("sigma", [0.0, -1.0, np.nan, np.inf])
def test_limit_refuses_what_is_not_a_sigma(sigma):
    with pytest.raises(ValueError, match="positive"):
        toy.best_elbo(sigma)


def test_band_widths_are_quantiles_and_make_no_nan():
    x = toy.sample(jax.random.split(jax.random.key(0), 200))
    u = np.asarray(toy.nearest(x))
    distance, region = np.linalg.norm(x - toy.curve(jnp.asarray(u)), axis=-1), np.digitize(u, (-1 / 3, 1 / 3))
    with jax.debug_nans(True):
        np.testing.assert_allclose(
            toy.band_widths(x), [np.quantile(distance[region == index], 0.6827) for index in range(3)], rtol=1e-4
        )
        assert (toy.band_widths(x[region == 1])[np.array([0, 2])] == 0.0).all()
