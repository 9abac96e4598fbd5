"""Missing values: the density of those that were observed, against models that never had the others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import lvae_jax as lv
from lvae_jax import diagnostics, likelihoods
from lvae_jax import vae as vae_lib

KEY = jax.random.key(0)
LEVELS = 17
HEADS = {name: make(0.3) for name, make in lv.HEADS.items()} | {
    "learned_map": lv.learned_map((5,), jnp.float32(0.3)),
    "balanced": lv.learned_vector(0.3, balance=lambda step: 0.5 + 0.0 * step),
    "discretised": lv.discretised(lv.learned_vector(0.3), levels=LEVELS),
    "rescaled": likelihoods.rescaled(lv.learned_vector(0.3), centre=np.arange(5.0) - 2.0, scale=10.0),
}
OBSERVED = np.array([[1, 1, 1, 1, 1], [1, 0, 1, 1, 0], [0, 0, 0, 1, 0]], bool)
heads = pytest.mark.parametrize("name", HEADS)


def example(head):
    """(params, outputs [3, 5, K], x on the grid of levels)."""
    outputs = 0.5 * jax.random.normal(jax.random.key(1), (3, 5, head.outputs))
    return head.init(), outputs, jax.random.randint(jax.random.key(2), (3, 5), 0, LEVELS) / (LEVELS - 1.0)


@heads
def test_log_prob_and_gradients_are_those_of_the_observed_dimensions(name):
    head = HEADS[name]
    params, outputs, x = example(head)
    with_gaps = jnp.where(OBSERVED, x, jnp.nan)

    def of_observed(outputs, x):  # one value at a time, by the head itself
        return sum(head.log_each(params, outputs, x)[row, column] for row, column in np.argwhere(OBSERVED))

    def of_gaps(outputs, x):
        return lv.masked(head).log_prob(params, outputs, x).sum()

    for found, expected in zip(
        jax.value_and_grad(of_gaps, argnums=(0, 1))(outputs, with_gaps),
        jax.value_and_grad(of_observed, argnums=(0, 1))(outputs, x),
        strict=True,
    ):
        jax.tree.map(lambda *pair: np.testing.assert_allclose(*pair, rtol=1e-5, atol=1e-6), found, expected)
    if name != "balanced":  # the weights of whose gradients sum over dimensions
        moved = jax.grad(of_gaps)(outputs, with_gaps)
        assert not moved[~OBSERVED].any()
    np.testing.assert_array_equal(lv.masked(head).log_prob(params, outputs, x), head.log_prob(params, outputs, x))


def test_log_prob_is_scipys():
    head = lv.masked(lv.learned_vector(0.3))
    params, outputs, x = example(head)
    each = stats.norm.logpdf(x, outputs[..., 0], 0.3 * np.exp(outputs[..., 1]))
    found = head.log_prob(params, outputs, jnp.where(OBSERVED, x, jnp.nan))
    np.testing.assert_allclose(found, np.sum(each, axis=-1, where=OBSERVED), rtol=1e-4)


def linear():
    """A linear Gaussian model of data in R^3, and the covariance of its x."""
    weights = np.array([[1.0, 0.3], [-0.5, 0.8], [0.2, -1.1]], np.float32)
    decoder = lv.Decoder(lambda key: {}, lambda params, z: (z @ weights.T)[..., None])
    encoder = lv.mlp_encoder((3,), 2, width=4, num_blocks=0)
    vae = vae_lib.masked(lv.VAE(encoder, decoder, lv.fixed(0.4), 2), fill=0.5)
    params = lv.init(KEY, vae)
    return vae, params, weights @ weights.T + 0.16 * np.eye(3)


def points(covariance, num=6):
    x = np.random.default_rng(0).multivariate_normal(np.zeros(3), covariance, size=num)
    observed = np.random.default_rng(1).random((num, 3)) < 0.6
    observed[:, 1] |= ~observed.any(axis=1)
    return jnp.asarray(np.where(observed, x, np.nan), jnp.float32), observed


def test_evidence_is_the_marginal_density_of_a_linear_gaussian_model():
    vae, params, covariance = linear()
    x, observed = points(covariance)
    exact = [
        stats.multivariate_normal.logpdf(row[there], np.zeros(there.sum()), covariance[np.ix_(there, there)])
        for row, there in zip(np.asarray(x, np.float64), observed, strict=True)
    ]
    np.testing.assert_allclose(vae_lib.evidence(vae, params, x, num_nodes=200), exact, rtol=1e-4)
    keys = jax.random.split(KEY, len(x))
    bound = np.mean([lv.elbo(jax.random.split(jax.random.key(i), len(x)), vae, params, x).elbo for i in range(20)])
    tighter = lv.importance_bound(keys, vae, params, x, num_samples=2000)
    assert bound < np.mean(exact)
    np.testing.assert_allclose(tighter, exact, atol=0.2)


def test_scores_and_diagnostics_are_of_the_observed_dimensions():
    vae, params, covariance = linear()
    x, observed = points(covariance)
    keys = jax.random.split(KEY, len(x))
    terms = lv.elbo(keys, vae, params, x)
    assert np.isfinite(jax.tree.leaves(jax.tree.map(np.sum, terms))).all()
    np.testing.assert_array_equal(terms.observed, observed)
    errors = np.asarray(x - terms.mean)
    np.testing.assert_allclose(lv.scores(terms, x).mse, np.nanmean(errors**2, axis=1), rtol=1e-5)
    details = diagnostics.details(terms, floor=1.0)
    np.testing.assert_allclose(details.residual, np.nanmean(errors / 0.4, axis=1), rtol=1e-4)
    np.testing.assert_allclose(details.residual_square, np.nanmean((errors / 0.4) ** 2, axis=1), rtol=1e-4)
    inside = np.sum(np.abs(errors / 0.4) < 1.645, axis=1) / observed.sum(axis=1)
    np.testing.assert_allclose(details.covered[1], inside)
    np.testing.assert_array_equal(details.at_floor, 1.0)
    mean, _ = lv.reconstruct(vae, params, x)
    assert np.isfinite(mean).all(), "missing values are imputed"
    assert np.isfinite(
        jax.grad(lambda params: lv.elbo(keys, vae, params, x).elbo.sum())(params)["encoder"]["params"]["Dense_0"][
            "kernel"
        ]
    ).all()


def test_whole_data_have_the_same_bits():
    plain = lv.mlp_vae((3,), lv.learned_vector(0.3), latent_size=2, width=8, num_blocks=1)
    params, x = lv.init(KEY, plain), jax.random.normal(KEY, (7, 3))
    keys = jax.random.split(KEY, 7)
    ours, theirs = (lv.elbo(keys, vae, params, x) for vae in (vae_lib.masked(plain), plain))
    jax.tree.map(np.testing.assert_array_equal, ours._replace(observed=None), theirs)
    assert ours.observed.all()


def test_heads_that_cannot_leave_values_out_are_refused():
    head = lv.fixed()
    with pytest.raises(ValueError, match="no log_each"):
        lv.masked(head._replace(log_each=None))
    with pytest.raises(ValueError, match="put masked round the rescaled head"):
        likelihoods.rescaled(lv.masked(head), centre=0.0, scale=2.0)
    with pytest.raises(ValueError, match="no log_mass"):
        lv.discretised(lv.masked(head))
