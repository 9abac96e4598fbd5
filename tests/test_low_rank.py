"""Gaussians with a covariance of low rank plus a diagonal, against dense ones in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from lvae_jax import gaussians, low_rank

KEY = jax.random.key(0)
STDDEVS, LENGTHS = (1e-3, 1e-2, 0.1, 1.0), (0.0, 0.1, 1.0, 3.0, 10.0)  # of the noise; of each column of U
KINDS = ("any", "equal", "nearly equal")


def case(size, rank, stddev, length, kind, seed=0, *, centred=False):
    """x, mean, log stddev and U as the library sees them, x drawn from their Gaussian; if `centred`, the mean is 0."""
    rng = np.random.default_rng(seed)
    factors = rng.normal(size=(size, rank))
    if kind != "any" and rank:
        factors = factors[:, :1] + (0.0 if kind == "equal" else 1e-8) * factors
    factors *= length / np.maximum(np.linalg.norm(factors, axis=0), 1e-30)
    mean, log_stddev = (not centred) * rng.normal(size=size), np.log(stddev) + rng.uniform(0.0, 0.5, size)
    x = mean + np.exp(log_stddev) * rng.normal(size=size) + factors @ rng.normal(size=rank)
    return [jnp.asarray(array, jnp.float32) for array in (x, mean, log_stddev, factors)]


def dense(mean, log_stddev, factors):
    """The mean and the covariance in float64."""
    mean, log_stddev, factors = (np.asarray(array, np.float64) for array in (mean, log_stddev, factors))
    return mean, np.diag(np.exp(2.0 * log_stddev)) + factors @ factors.T


def dense_gradients(x, mean, log_stddev, factors):
    """Of log N(x; mean, C): by the mean, by log stddev, by U."""
    mean, covariance = dense(mean, log_stddev, factors)
    precision = np.linalg.inv(covariance)
    a = precision @ (np.float64(x) - mean)
    by_covariance = 0.5 * (np.outer(a, a) - precision)
    by_log_stddev = 2.0 * np.diag(by_covariance) * np.exp(2.0 * np.float64(log_stddev))
    return a, by_log_stddev, 2.0 * by_covariance @ np.float64(factors)


value_and_gradients = jax.jit(jax.value_and_grad(low_rank.log_prob, argnums=(1, 2, 3)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", range(6))
def test_log_prob_is_scipys(rank, kind):
    far = 0
    for stddev in STDDEVS:
        for length in LENGTHS:
            for seed in range(5):
                x, *gaussian = case(5, rank, stddev, length, kind, seed, centred=True)
                expected = stats.multivariate_normal.logpdf(np.float64(x), *dense(*gaussian))
                found, gradients = value_and_gradients(x, *gaussian)
                # Relative to the larger of its two parts, which may have opposite signs.
                constant = stats.multivariate_normal.logpdf(np.zeros(5), np.zeros(5), dense(*gaussian)[1])
                scale = max(abs(expected), abs(constant), abs(expected - constant))
                # Where |U| is 10,000 stddevs, the numbers given are rounded by more than that.
                by_mean, _, by_factors = dense_gradients(x, *gaussian)
                rounding = 0.5 * np.spacing(np.abs(x)) @ np.abs(by_mean)
                rounding += 0.5 * np.sum(np.spacing(np.abs(gaussian[2])) * np.abs(by_factors))
                assert abs(float(found) - expected) < 1e-4 * scale + rounding, (stddev, length, seed)
                far += abs(float(found) - expected) > 1e-4 * scale
                assert all(np.isfinite(gradient).all() for gradient in gradients), (stddev, length, seed)
    assert far <= 2, "of 100"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", range(6))
def test_gradients_are_those_of_the_dense_density(rank, kind):
    """In units of the noise, up to |U| = 10,000: in others, the rounding of x - mean alone would move them by more."""
    for length in (0.0, 1e-3, 1.0, 1e2, 1e4):
        for seed in range(5):
            x, mean, log_stddev, factors = case(5, rank, 1.0, length, kind, seed, centred=True)
            gaussian = (mean, 0.0 * log_stddev, factors)
            _, gradients = value_and_gradients(x, *gaussian)
            for ours, theirs in zip(gradients, dense_gradients(x, *gaussian), strict=True):
                assert np.linalg.norm(ours - theirs) < 2e-3 * (np.linalg.norm(theirs) + 1.0), (length, seed)


@pytest.mark.parametrize("kind", KINDS)
def test_images_of_little_noise(kind):
    """784 dimensions, ten columns a thousand times as long as the noise, where Woodbury's identity loses all digits."""
    for length in (3.0, 10.0):
        x, *gaussian = case(784, 10, 1e-3, length, kind, centred=True)
        mean, covariance = dense(*gaussian)
        residual = np.float64(x) - mean
        expected = -0.5 * residual @ np.linalg.solve(covariance, residual)
        expected -= 0.5 * np.linalg.slogdet(2.0 * np.pi * covariance)[1]
        found, gradients = value_and_gradients(x, *gaussian)
        assert float(found) == pytest.approx(expected, rel=2e-5)
        assert all(np.isfinite(gradient).all() for gradient in gradients)


def test_rank_0_is_the_diagonal_to_the_bit():
    x, *gaussian = case(7, 0, 0.1, 0.0, "any")
    assert low_rank.log_prob(x, *gaussian) == jnp.sum(gaussians.log_prob(x, *gaussian[:2]))


def test_columns_that_vanish_change_nothing():
    x, mean, log_stddev, factors = case(5, 3, 0.1, 1.0, "any")
    expected = low_rank.log_prob(x, mean, log_stddev, factors)
    for tiny in (0.0, 1e-30, 1e-18, 1e-13):
        wider = jnp.concatenate([jnp.full((5, 1), tiny, jnp.float32), factors], axis=1)
        found, gradient = jax.value_and_grad(low_rank.log_prob, argnums=3)(x, mean, log_stddev, wider)
        assert found == pytest.approx(float(expected), rel=1e-6)
        assert np.isfinite(gradient).all()


def test_standardised_residuals_are_independent():
    x, *gaussian = case(6, 3, 0.1, 1.0, "any")
    inverse_root = np.float64(jax.jacfwd(low_rank.standardise)(x, *gaussian))
    mean, covariance = dense(*gaussian)
    np.testing.assert_allclose(inverse_root @ covariance @ inverse_root.T, np.eye(6), atol=1e-5)
    found = low_rank.standardise(x, *gaussian)
    np.testing.assert_allclose(found, inverse_root @ (np.float64(x) - mean), rtol=1e-4, atol=1e-5)


def test_draws_have_this_mean_and_covariance():
    size, number = 4, 100_000
    _, *gaussian = case(size, 2, 0.5, 1.0, "any")
    draws = np.float64(jax.vmap(lambda key: low_rank.sample(key, *gaussian))(jax.random.split(KEY, number)))
    mean, covariance = dense(*gaussian)
    errors = np.sqrt((np.outer(np.diag(covariance), np.diag(covariance)) + covariance**2) / number)
    assert np.all(np.abs(np.cov(draws.T) - covariance) < 4.0 * errors)
    assert np.all(np.abs(draws.mean(axis=0) - mean) < 4.0 * np.sqrt(np.diag(covariance) / number))
    np.testing.assert_allclose(low_rank.stddev(*gaussian[1:]), np.sqrt(np.diag(covariance)), rtol=1e-6)


def test_forward_mode_agrees_with_reverse_mode():
    primals = case(5, 2, 0.1, 1.0, "any")
    direction = case(5, 2, 1.0, 1.0, "any", seed=1)
    _, slope = jax.jvp(low_rank.log_prob, primals, direction)
    gradients = jax.grad(low_rank.log_prob, argnums=(0, 1, 2, 3))(*primals)
    assert slope == pytest.approx(sum(float(jnp.sum(g * d)) for g, d in zip(gradients, direction, strict=True)), 1e-4)


def test_images_keep_their_shape():
    x, *gaussian = case(12, 3, 0.1, 1.0, "any")
    of_image = [array.reshape(2, 3, 2, *array.shape[1:]) for array in (x, *gaussian)]
    assert low_rank.log_prob(*of_image) == pytest.approx(float(low_rank.log_prob(x, *gaussian)), rel=1e-6)
    np.testing.assert_allclose(
        low_rank.standardise(*of_image), low_rank.standardise(x, *gaussian).reshape(2, 3, 2), rtol=1e-5, atol=1e-6
    )


def test_no_copy_of_the_factors_is_kept_for_each_step():
    size, rank = 50, 7
    example = case(size, rank, 0.1, 1.0, "any")
    backward = jax.vjp(low_rank.log_prob, *example)[1]
    kept = [leaf.size for leaf in jax.tree.leaves(backward) if hasattr(leaf, "size")]
    assert sum(kept) < 4 * size * rank, "a tape of the loop has seven copies"
