"""The ribbon: its density by another method, its entropy, and the gap that a diagonal covariance cannot close."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from lvae_jax import datasets, ribbon


@pytest.fixture(scope="module")
def points():
    return ribbon.sample(jax.random.split(jax.random.key(0), 5_000))


def conditional(u):
    """The Gaussian of x given u, by its mean and covariance."""
    phi = 0.5 * np.pi * (u + 1.0)
    rotation = np.array([[np.cos(phi), -np.sin(phi)], [np.sin(phi), np.cos(phi)]])
    covariance = np.zeros((3, 3))
    covariance[0, 0] = 0.02**2
    covariance[1:, 1:] = rotation @ np.diag([0.5**2, 0.02**2]) @ rotation.T
    return np.array([2.0 * u, 0.0, 0.0]), covariance


def test_density_is_the_mean_of_gaussians(points):
    for x in np.float64(points[:8]):
        centre = x[0] / 2.0
        ends = np.clip([centre - 0.1, centre + 0.1], -1.0, 1.0)
        expected, _ = integrate.quad(
            lambda u, x=x: 0.5 * stats.multivariate_normal.pdf(x, *conditional(u)), *ends, epsabs=0.0, epsrel=1e-7
        )
        assert float(ribbon.log_prob(jnp.asarray(x, jnp.float32)[None])[0]) == pytest.approx(np.log(expected), abs=1e-4)


def test_points_given_u_have_the_covariance():
    key, size = jax.random.key(1), 100_000
    for u in (-1.0, -0.3, 0.8):
        x = np.float64(ribbon.point(jnp.full(size, u), jax.random.normal(key, (size, 3))))
        mean, covariance = conditional(u)
        np.testing.assert_allclose(x.mean(axis=0), mean, atol=0.006)
        np.testing.assert_allclose(np.cov(x.T), covariance, atol=0.004)
        direction = np.float64(ribbon.across(jnp.array([u])))[0]
        assert direction @ covariance @ direction == pytest.approx(0.25, rel=1e-5)


def test_entropy_is_the_mean_of_the_log_density(points):
    log_prob = np.float64(ribbon.log_prob(points))
    assert -ribbon.entropy() == pytest.approx(log_prob.mean(), abs=4.0 * log_prob.std() / np.sqrt(len(log_prob)))
    np.testing.assert_allclose(ribbon.log_prob(points[:500], num_nodes=2000), log_prob[:500], atol=2e-5)


def test_gap_of_diagonal_covariances():
    """The best one has the variances themselves: its loss is the KL from the Gaussian of x given u."""
    gaps = []
    for u in np.linspace(-1.0, 1.0, 401)[:-1]:
        covariance = conditional(u)[1]
        gaps.append(0.5 * (np.log(np.diag(covariance)).sum() - np.linalg.slogdet(covariance)[1]))
    assert np.mean(gaps) == pytest.approx(ribbon.DIAGONAL_GAP, rel=1e-3)
    assert pytest.approx(1.911, abs=1e-3) == ribbon.DIAGONAL_GAP


def test_ribbon_is_a_stream():
    data = datasets.load("ribbon")
    assert data.shape == (3,)
    assert data.test.shape == (10_000, 3)
    assert data.unit == "ribbon length"
    batch = data.batch(None, jax.random.key(3), jnp.arange(5))
    assert len(np.unique(batch, axis=0)) == 5
    np.testing.assert_allclose(ribbon.nearest(batch), np.clip(batch[:, 0] / 2.0, -1.0, 1.0), rtol=1e-6)
    with pytest.raises(datasets.DatasetError, match="`flip` is for images"):
        datasets.load("ribbon", flip=True)
