"""Theorem 1 against mpmath, quadrature of its definition, and mixtures fitted by EM, on a sphere of radius R; the
limits of any data set against other methods."""

import functools
import tracemalloc

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from scipy import optimize, special
from test_bessel import DIMS, mean_exp, uniform

from lvae_jax import theory

# sigma is given as the fraction sigma sqrt(n) / R of its critical value. Whatever has a new shape is
# compiled anew, and so is each call of what solves for the radius: a test has eight sigmas in one call.


def relative_radius(fraction, dim):
    """rho / R where rho = R A_n(rho R / sigma^2), for a fraction below 1."""
    excess = lambda k: mean_exp(k, dim)[1] - fraction**2 / dim  # noqa: E731
    return mpmath.findroot(excess, (1e-4, dim / fraction**2), solver="anderson", maxsteps=100) * fraction**2 / dim


def log_density(rho, sigma, radius, dim):
    """log p(x) [S], |x| = R: decoder outputs uniform on the sphere of radius rho [S], and noise sigma."""
    u, log_weight = uniform(dim)
    squared_distance = rho[..., None] ** 2 + radius**2 - 2 * radius * rho[..., None] * u
    log_mean = special.logsumexp(log_weight - squared_distance / (2 * sigma**2), axis=-1)
    return log_mean - dim / 2 * np.log(2 * np.pi * sigma**2)


# The best radius and the best bound


@pytest.mark.parametrize(("dim", "radius"), [(2, 5.0), (784, 12.0)])
def test_best_mixture_is_that_of_a_search_over_exact_densities(dim, radius, accuracy):
    fraction = np.array([0.2, 0.5, 0.9, 0.99, 0.999, 1.0, 1.2, 3.0])
    sigma = np.float64(np.float32(fraction * radius / np.sqrt(dim)))
    rho = np.float64(np.float32(np.linspace(0.0, 1.5 * radius, 151)))
    spacing, largest_k = rho[1], 1.5 * dim / fraction**2
    objective = theory.objective(jnp.asarray(rho)[None], jnp.asarray(sigma)[:, None], radius=radius, dim=dim)
    optimal, elbo = (f(jnp.asarray(sigma), radius=radius, dim=dim) for f in (theory.optimal_radius, theory.best_elbo))
    for i in range(len(sigma)):
        exact = functools.partial(log_density, sigma=sigma[i], radius=radius, dim=dim)
        density = exact(rho)
        np.testing.assert_allclose(objective[i], density - density[0], rtol=0.0, atol=accuracy * largest_k[i])
        best = rho[density.argmax()]
        assert abs(optimal[i] - best) < spacing
        bounds = (max(best - spacing, 0.0), best + spacing)
        near = optimize.minimize_scalar(lambda rho, exact=exact: -exact(rho), bounds=bounds)
        expected = max(-near.fun, density.max())
        np.testing.assert_allclose(elbo[i], expected, rtol=accuracy, atol=accuracy * largest_k[i])


def test_mixtures_fitted_by_em_come_close_and_are_no_better():
    fractions = np.array([0.3, 0.9, 1.3])
    rng, angle = np.random.default_rng(0), np.linspace(0.0, 2.0 * np.pi, 257)[1:]
    x = np.stack([np.cos(angle), np.sin(angle)], -1)
    for fraction, best in zip(fractions, theory.best_elbo(jnp.asarray(fractions / np.sqrt(2.0)), dim=2), strict=True):
        sigma = fraction / np.sqrt(2.0)
        centres, log_weight, bounds = rng.uniform(-1.2, 1.2, (64, 2)), np.full(64, -np.log(64.0)), []
        for _ in range(500):
            squared_distance = ((x[:, None] - centres) ** 2).sum(-1)
            joint = log_weight - squared_distance / (2.0 * sigma**2) - np.log(2.0 * np.pi * sigma**2)
            log_prob = special.logsumexp(joint, axis=1, keepdims=True)
            bounds.append(log_prob.mean())
            share = np.exp(joint - log_prob)
            centres, log_weight = share.T @ x / share.sum(0)[:, None], np.log(share.mean(0))
        assert max(bounds) < best + 1e-5
        assert bounds[0] < best - 0.1
        assert bounds[-1] > best - 2e-3


@pytest.mark.parametrize("dim", [2, 10_000])
def test_nothing_overflows_at_the_smallest_sigma(dim, accuracy):
    """Where Hankel's first term is exact: log I_v(k) = k - log(2 pi k) / 2, k = 1 / sigma^2."""
    k = jnp.asarray(10.0 ** np.linspace(18, 37 if accuracy == 1e-5 else 300, 8))[1]
    sigma, log_k = jnp.full(8, k**-0.5), np.log(np.float64(k))
    np.testing.assert_allclose(theory.optimal_radius(sigma, dim=dim), 1.0, rtol=accuracy)
    tilt = special.gammaln(dim / 2) + (dim / 2 - 1) * (np.log(2.0) - log_k) - 0.5 * (np.log(2.0 * np.pi) + log_k)
    limit = tilt - dim / 2 * (np.log(2.0 * np.pi) - log_k)
    np.testing.assert_allclose(theory.best_elbo(sigma, dim=dim), limit, rtol=accuracy)


@functools.cache
def radii_and_slopes(dim, fractions):
    """(sigma, rho / R, its slope by sigma sqrt(n) / R, that of the best ELBO by log sigma), each one for each fraction,
    to 40 digits."""
    rows = []
    with mpmath.workdps(40):
        for fraction in fractions:
            sigma = np.float64(np.float32(fraction / np.sqrt(dim)))
            exact = mpmath.mpf(sigma) * mpmath.sqrt(dim)
            rho, slope = relative_radius(exact, dim), mpmath.diff(functools.partial(relative_radius, dim=dim), exact)
            rows.append([sigma, *map(float, (rho, slope, dim / exact**2 * (1 - rho**2) - dim))])
    return np.transpose(rows)


@pytest.mark.parametrize("dim", [3, 784])
def test_radius_and_slopes_are_mpmaths_up_to_the_transition(dim, accuracy):
    fractions = (0.05, 0.3, 0.5, 0.7, 0.9, 0.99, 0.999, 0.999999)
    sigma, expected, slope, elbo_slope = radii_and_slopes(dim, fractions)
    radius_and_slope, elbo_and_slope = (
        jax.vmap(jax.value_and_grad(functools.partial(f, dim=dim)))(jnp.asarray(sigma))
        for f in (theory.optimal_radius, theory.best_elbo)
    )
    for i, fraction in enumerate(fractions):
        # The radius vanishes as sqrt(1 - sigma^2 n / R^2): an error of A_n counts 1 / (1 - fraction) times there.
        error = accuracy / (1.0 - fraction)
        np.testing.assert_allclose(radius_and_slope[0][i], expected[i], rtol=error)
        # The slope holds A_n' n / sigma^2, a difference of terms of order one multiplied by 2 n / fraction^3.
        atol = 2 * dim / fraction**3 * error
        np.testing.assert_allclose(radius_and_slope[1][i] / np.sqrt(dim), slope[i], rtol=error, atol=atol)
        # By the envelope theorem d ELBO / d log sigma = (R^2 - rho^2) / sigma^2 - n.
        atol = 2 * dim / fraction**2 * accuracy
        np.testing.assert_allclose(elbo_and_slope[1][i] * sigma[i], elbo_slope[i], rtol=error, atol=atol)


@pytest.mark.parametrize(
    ("dim", "radii"),
    [(2, (0.977, 0.930, 0.063, 0.0)), (3, (0.969, 0.908, 0.058, 0.0)), (50, (0.955, 0.869, 0.046, 0.0))],
)
def test_radii_are_the_known_ones(dim, radii):
    sigma = jnp.array([0.3, 0.5, 0.999, 1.001]) / np.sqrt(dim)
    ours = theory.optimal_radius(sigma, radius=1.0, dim=dim)
    np.testing.assert_allclose(ours, radii, atol=5.1e-4, err_msg="Theorem 1's ridge has moved")


@pytest.mark.parametrize(("dim", "radius"), [(2, 0.01), (10_000, 28.0)])
def test_manifold_is_lost_from_the_critical_sigma_on(dim, radius, accuracy):
    np.testing.assert_allclose(theory.critical_sigma(radius=radius, dim=dim), radius / np.sqrt(dim), rtol=1e-6)
    sigma = jnp.asarray([1.0, 1.001, 1.01, 1.1, 1.5, 3.0, 30.0, 1e3]) * theory.critical_sigma(radius=radius, dim=dim)
    options = {"radius": radius, "dim": dim}
    rho, slope = jax.vmap(jax.value_and_grad(functools.partial(theory.optimal_radius, **options)))(sigma)
    np.testing.assert_array_equal(rho, 0.0)
    np.testing.assert_array_equal(slope[1:], 0.0)  # at the critical sigma itself there is none
    elbo, slope = jax.vmap(jax.value_and_grad(functools.partial(theory.best_elbo, **options)))(sigma)
    sigma = np.float64(sigma)
    gaussian = -dim / 2 * np.log(2 * np.pi * sigma**2) - radius**2 / (2 * sigma**2)
    np.testing.assert_allclose(elbo, gaussian, rtol=accuracy, atol=accuracy * dim)
    np.testing.assert_allclose(slope * sigma, radius**2 / sigma**2 - dim, rtol=accuracy, atol=accuracy * dim)


@pytest.mark.parametrize("dim", DIMS)
def test_radius_approaches_the_datas_as_sigma_vanishes(dim):
    with jax.enable_x64(True):
        fraction = jnp.linspace(0.03, 0.1, 8)
        rho = theory.optimal_radius(fraction / np.sqrt(dim), radius=1.0, dim=dim)
        square = fraction**2 / dim
        expansion = (dim - 1) * square / 2 + (dim**2 - 1) * square**2 / 8
        assert np.all(np.abs(1.0 - rho - expansion) < fraction**6)
    sigma = jnp.asarray(1e-4 / np.sqrt(dim))
    np.testing.assert_allclose(theory.optimal_radius(sigma, radius=1.0, dim=dim), 1.0, rtol=1e-5)


def test_units_of_the_data_do_not_matter():
    sigma, accuracy = jnp.linspace(0.1, 1.4, 8) * theory.critical_sigma(radius=2.0, dim=49), 1e-5
    radius, elbo = (f(sigma, radius=2.0, dim=49) for f in (theory.optimal_radius, theory.best_elbo))
    for scale in (1e-3, 1e3):
        ours = theory.optimal_radius(scale * sigma, radius=2.0 * scale, dim=49)
        np.testing.assert_allclose(ours, scale * radius, rtol=10 * accuracy, atol=10 * accuracy * scale)
        ours = theory.best_elbo(scale * sigma, radius=2.0 * scale, dim=49)
        np.testing.assert_allclose(ours, elbo - 49 * np.log(scale), rtol=10 * accuracy, atol=10 * accuracy)


@pytest.mark.parametrize("function", [theory.optimal_radius, theory.best_elbo, theory.objective])
def test_one_program_serves_every_sigma_elementwise(function):
    traces, arguments = [], 2 if function is theory.objective else 1

    @jax.jit
    def compiled(sigma):
        traces.append(sigma)
        return function(*[sigma] * arguments, radius=1.0, dim=49)

    sigma = jnp.linspace(0.2, 4.0, 6).reshape(2, 3) / 14.0
    together = compiled(sigma)
    np.testing.assert_array_equal(compiled(sigma[::-1]), together[::-1])
    np.testing.assert_allclose(jax.vmap(compiled)(sigma), together, rtol=1e-4, atol=1e-4)
    assert len(traces) == 2, "one trace for [2, 3] and one, under vmap, for [3]"
    assert together.dtype == sigma.dtype
    assert jax.eval_shape(lambda: function(*[0.02] * arguments, radius=1.0, dim=49)).dtype == sigma.dtype, "of a number"


# Any data set


@pytest.mark.parametrize("shape", [(50, 7), (7, 50), (8, 8), (1, 5), (400, 3, 2, 1)])
def test_principal_stddevs_are_those_of_the_whole_covariance(shape):
    x = 100.0 + np.random.default_rng(0).standard_normal(shape) * np.linspace(0.1, 3.0, shape[1]).reshape(
        1, -1, *[1] * (len(shape) - 2)
    )
    flat = x.reshape(len(x), -1)
    whole = np.linalg.eigvalsh(np.atleast_2d(np.cov(flat.T, bias=True)))[::-1][: min(flat.shape)]
    for chunk in (1, 3, 1000):
        ours = theory.principal_stddevs(x[i : i + chunk] for i in range(0, len(x), chunk))
        np.testing.assert_allclose(ours**2, np.maximum(whole, 0.0), atol=1e-10)


@pytest.mark.parametrize(("function", "most"), [(theory.principal_stddevs, 2.1), (theory.spread, 3.1)])
@pytest.mark.parametrize("size", [300, 900])
def test_memory_is_that_of_the_smaller_matrix(size, function, most):
    """In units of min(N, D) x D float64 numbers."""
    rng = np.random.default_rng(0)
    function([rng.random((2, 3))])  # imports, which take memory once
    tracemalloc.start()
    function(rng.random((50, 500)).astype(np.float32) for _ in range(size // 50))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < most * 8 * 500 * min(size, 500)


@pytest.mark.parametrize("size", [6, 400])
def test_spread_has_the_correlation_matrix_of_dimensions_that_vary(size):
    """A constant dimension, whatever its value and rounding, is none of them."""
    x = np.random.default_rng(0).standard_normal((size, 8)) @ np.random.default_rng(1).standard_normal((8, 8))
    x[:, 3] = 0.1
    x[:, 5] = 1e3 + 1e-3 * x[:, 5]
    found = theory.spread(x[i : i + 3] for i in range(0, size, 3))
    np.testing.assert_allclose(found.principal_stddevs, theory.principal_stddevs([x]), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found.stddevs, x.std(axis=0), rtol=1e-6, atol=1e-12)
    largest = np.linalg.eigvalsh(np.corrcoef(np.delete(x, 3, axis=1).T))[-1]
    np.testing.assert_allclose(found.correlation, largest, rtol=1e-6)
    assert found.chance == pytest.approx((1.0 + np.sqrt(7 / size)) ** 2)


@pytest.mark.parametrize("size", [20, 4000])
def test_correlation_of_independent_dimensions_is_that_of_chance(size):
    x = np.random.default_rng(0).standard_normal((size, 200)) * np.geomspace(1e-3, 1e3, 200)[None]
    found = theory.spread([x])
    assert found.correlation == pytest.approx(found.chance, rel=0.05)


def test_spread_of_constant_data():
    assert theory.spread([np.full((5, 3), 0.1)]).correlation == 0.0


def test_principal_stddevs_need_an_example():
    for function in (theory.principal_stddevs, theory.spread):
        with pytest.raises(ValueError, match="no example"):
            function([])


def test_critical_sigma_of_the_sphere_is_its_principal_stddev():
    x = np.random.default_rng(0).standard_normal((200_000, 3))
    x *= 2.0 / np.linalg.norm(x, axis=1, keepdims=True)
    np.testing.assert_allclose(theory.principal_stddevs([x]), theory.critical_sigma(radius=2.0, dim=3), rtol=0.01)


@pytest.mark.parametrize("latent_size", [1, 2, 4])
@pytest.mark.parametrize("sigma", [0.3, 0.8, 1.5, 4.0])
def test_linear_limit_is_the_likelihood_of_probabilistic_pca(sigma, latent_size):
    """By an optimiser that knows nothing of eigenvalues, over W in N(x; 0, W W^T + sigma^2 I)."""
    stddevs = np.array([2.0, 1.0, 0.5])
    covariance = np.diag([*stddevs**2, 0.0])
    rng = np.random.default_rng(0)
    rotation = np.linalg.qr(rng.standard_normal((4, 4)))[0]
    covariance = rotation @ covariance @ rotation.T

    def loss(w):
        w = w.reshape(4, latent_size)
        model = w @ w.T + sigma**2 * np.eye(4)
        value = 0.5 * (np.linalg.slogdet(2.0 * np.pi * model)[1] + np.trace(np.linalg.solve(model, covariance)))
        inverse = np.linalg.inv(model)
        return value, ((inverse - inverse @ covariance @ inverse) @ w).ravel()

    best = min(
        optimize.minimize(loss, rng.standard_normal(4 * latent_size), jac=True, options={"gtol": 1e-9}).fun
        for _ in range(3)
    )
    ours = theory.linear_best_elbo(sigma, stddevs, num_dimensions=4, latent_size=latent_size)
    np.testing.assert_allclose(ours, -best, rtol=1e-6)


@pytest.mark.parametrize(
    "function",
    [
        lambda dim: theory.critical_sigma(dim=dim),
        lambda dim: theory.objective(0.5, 0.3, dim=dim),
        lambda dim: theory.optimal_radius(0.3, dim=dim),
        lambda dim: theory.best_elbo(0.3, dim=dim),
    ],
)
def test_there_is_no_sphere_below_two_dimensions(function):
    with pytest.raises(ValueError, match="dim must be at least 2, got 1"):
        function(1)


def test_a_value_that_is_not_finite_is_named_by_its_example():
    x = np.random.default_rng(0).normal(size=(20, 4))
    x[7, 2] = np.nan
    for chunks in ([x], [x[:5], x[5:]], [x[:7], x[7:8]]):
        with pytest.raises(ValueError, match="example 7 has"):
            theory.principal_stddevs(chunks)
