"""E exp(k u_1) on the sphere, and the ratio of Bessel functions that is its slope, against mpmath and quadrature."""

import functools

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from scipy import special

from lvae_jax import bessel

# The recurrence takes 24 steps for n = 2, one for 49 and none from 50 on; the orders of odd n are half-integers.
DIMS = [2, 3, 49, 50, 10_000]
K = np.float64(np.float32([0.0, *np.geomspace(1e-8, 1e4, 14), 1e8]))  # the same in both precisions


def mean_exp(k, dim):
    """E exp(k u_1) and A_n(k) / k, to 40 digits: 0F1(; n/2; k^2 / 4), and its neighbour's ratio to it over n."""
    low, high = (mpmath.hyp0f1(mpmath.mpf(dim) / 2 + i, k**2 / 4, maxterms=10**6) for i in (0, 1))
    return low, high / low / dim


@functools.cache
def reference(k, dim):
    """log E exp(k u_1), A_n(k) and its derivative 1 - A_n^2 - (n - 1) A_n / k."""
    with mpmath.workdps(40):
        mean, slope = mean_exp(mpmath.mpf(k), dim)
        return tuple(map(float, (mpmath.log(mean), k * slope, 1 - (k * slope) ** 2 - (dim - 1) * slope)))


@functools.cache
def uniform(dim):
    """Nodes u_1 [2000] and log weights for u uniform on S^(n-1); 2,000 resolve exp(k u_1) up to k = 1e6."""
    node, weight = special.roots_legendre(2_000)
    angle = np.pi / 2 * (1 + node)
    log_weight = np.log(weight) + (dim - 2) * np.log(np.sin(angle))
    return np.cos(angle), log_weight - special.logsumexp(log_weight)


@pytest.mark.parametrize("dim", [2, 10_000])
def test_nothing_overflows_at_the_largest_k(dim, accuracy):
    """Where Hankel's first term is exact: log I_v(k) = k - log(2 pi k) / 2."""
    k = jnp.asarray(10.0 ** np.linspace(18, 37 if accuracy == 1e-5 else 300, 8))
    log_k = np.log(np.asarray(k, np.float64))
    expected = special.gammaln(dim / 2) + (dim / 2 - 1) * (np.log(2.0) - log_k) - 0.5 * (np.log(2.0 * np.pi) + log_k)
    scaled = jax.vmap(jax.value_and_grad(functools.partial(bessel.log_mean_exp, dim=dim, scaled=True)))(k)
    np.testing.assert_allclose(scaled[0], expected, rtol=accuracy)
    np.testing.assert_allclose(scaled[1], 0.0, atol=accuracy)
    np.testing.assert_allclose(bessel.log_mean_exp(k, dim=dim), k, rtol=accuracy)
    ratio, slope = jax.vmap(jax.value_and_grad(functools.partial(bessel.ratio, dim=dim)))(k)
    np.testing.assert_allclose(ratio, 1.0, rtol=accuracy)
    np.testing.assert_allclose(slope, 0.0, atol=accuracy)


@pytest.mark.parametrize("dim", DIMS)
def test_ratio_log_mean_and_their_slopes_are_mpmaths(dim, accuracy):
    log_mean, ratio, slope = np.transpose([reference(k, dim) for k in K])
    functions = [functools.partial(f, dim=dim) for f in (bessel.log_mean_exp, bessel.ratio)]
    ours = [jax.vmap(jax.value_and_grad(f))(jnp.asarray(K)) for f in functions]
    assert {x.dtype for pair in ours for x in pair} == {jnp.asarray(K).dtype}
    np.testing.assert_allclose(ours[0], [log_mean, ratio], rtol=accuracy)
    np.testing.assert_allclose(ours[1][0], ratio, rtol=accuracy)
    # As a difference of terms of order one, the slope may lose its digits where it is itself far below one.
    np.testing.assert_allclose(ours[1][1], slope, rtol=100 * accuracy, atol=accuracy)


@pytest.mark.parametrize("dim", DIMS)
def test_ratio_and_log_mean_match_quadrature_across_seams(dim, accuracy):
    k = np.float64(np.float32(np.geomspace(0.3 * np.sqrt(dim), 1e5, 200)))
    u, log_weight = uniform(dim)
    log_mean = special.logsumexp(log_weight + k[:, None] * u, axis=-1)
    ratio = np.exp(log_weight + k[:, None] * u - log_mean[:, None]) @ u
    np.testing.assert_allclose(bessel.log_mean_exp(jnp.asarray(k), dim=dim), log_mean, rtol=accuracy)
    np.testing.assert_allclose(bessel.ratio(jnp.asarray(k), dim=dim), ratio, rtol=accuracy)


def test_three_dimensions_are_in_closed_form(accuracy):
    k = np.float64(np.float32(np.geomspace(0.1, 700.0, 200)))
    np.testing.assert_allclose(bessel.ratio(jnp.asarray(k), dim=3), 1 / np.tanh(k) - 1 / k, rtol=accuracy)
    np.testing.assert_allclose(bessel.log_mean_exp(jnp.asarray(k), dim=3), np.log(np.sinh(k) / k), rtol=accuracy)


@pytest.mark.parametrize("dim", [2, 100])
def test_normalised_normals_have_this_mean(dim):
    normal = np.random.default_rng(0).standard_normal((20_000, dim))
    u = normal[:, 0] / np.linalg.norm(normal, axis=-1)
    for k in np.array([0.1, 1.0]) * np.sqrt(dim):
        weight = np.exp(k * u - float(bessel.log_mean_exp(k, dim=dim)))
        for draws in (weight - 1.0, weight * (u - float(bessel.ratio(k, dim=dim)))):
            assert abs(draws.mean()) < 4.0 * draws.std() / np.sqrt(len(u))


@pytest.mark.parametrize("dim", [49, 784])
def test_second_derivatives_are_mpmaths(dim):
    functions = (functools.partial(f, dim=dim) for f in (bessel.log_mean_exp, bessel.ratio))
    log_mean, ratio = (jax.vmap(jax.grad(jax.grad(f))) for f in functions)
    with mpmath.workdps(40), jax.enable_x64(True):
        k = jnp.array([0.0, 3.0])
        np.testing.assert_allclose(log_mean(k), [reference(value, dim)[2] for value in (0.0, 3.0)], rtol=1e-8)
        expected = mpmath.diff(lambda k: k * mean_exp(k, dim)[1], 3.0, 2)
        np.testing.assert_allclose(ratio(k)[1], float(expected), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("function", [bessel.ratio, bessel.log_mean_exp])
def test_there_is_no_sphere_below_two_dimensions(function):
    with pytest.raises(ValueError, match="dim must be at least 2, got 1"):
        function(1.0, dim=1)
