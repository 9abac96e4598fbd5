"""Priors against scipy, scikit-learn and quadrature, and as what the bounds and samples of a model need."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import scipy.stats as stats
import sklearn.mixture

import lvae_jax as lv
from lvae_jax import gaussians, priors
from lvae_jax import vae as vae_lib
from lvae_jax.keys import example_keys, of_seed

KEY = of_seed(0)
PRIORS = {
    "standard_normal": priors.standard_normal(),
    "gaussian": priors.gaussian(2),
    "mixture": priors.mixture(2, 3),
    "flow": priors.flow(2, num_layers=3, width=8),
}
every_prior = pytest.mark.parametrize("name", PRIORS)


def drawn_params(name, scale=0.2):
    """Parameters some way from the initial ones, as training would leave them."""
    leaves, tree = jax.tree.flatten(PRIORS[name].init(KEY))
    keys = jax.random.split(jax.random.fold_in(KEY, 1), max(1, len(leaves)))
    moved = [leaf + scale * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=False)]
    return jax.tree.unflatten(tree, moved)


def plane(reach=40.0, num_nodes=401):
    """Nodes of the trapezoid rule, and the area of a cell."""
    nodes = np.linspace(-reach, reach, num_nodes)
    z = np.stack(np.meshgrid(nodes, nodes), axis=-1).reshape(-1, 2)
    return jnp.asarray(z, jnp.float32), (nodes[1] - nodes[0]) ** 2


@every_prior
def test_density_integrates_to_one(name):
    z, area = plane()
    density = np.exp(np.asarray(PRIORS[name].log_prob(drawn_params(name), z), np.float64))
    assert density.sum() * area == pytest.approx(1.0, abs=1e-3)


@every_prior
def test_samples_fit_the_density(name):
    # For z ~ p, E[grad log p] = 0 and E[z . grad log p] = -L, by parts.
    prior, params = PRIORS[name], drawn_params(name)
    z = prior.sample(KEY, params, (10_000, 2))
    score = jax.grad(lambda z: prior.log_prob(params, z).sum())(z)
    terms = np.asarray(jnp.concatenate([score, jnp.sum(z * score, axis=-1, keepdims=True) + 2.0], axis=-1), np.float64)
    assert (np.abs(terms.mean(axis=0)) < 5.0 * terms.std(axis=0) / np.sqrt(len(z))).all()


@every_prior
def test_mean_kl_is_that_of_quadrature(name):
    prior, params = PRIORS[name], drawn_params(name)
    mean, log_stddev = jnp.array([[0.7, -0.4]]), jnp.array([[-0.5, -1.0]])
    grid, area = plane()
    log_q = np.asarray(jnp.sum(gaussians.log_prob(grid, mean, log_stddev), axis=-1), np.float64)
    exact = np.sum(np.exp(log_q) * (log_q - np.asarray(prior.log_prob(params, grid), np.float64))) * area
    n = 10_000
    z = mean + jnp.exp(log_stddev) * jax.random.normal(KEY, (n, 2))
    kl = np.asarray(prior.kl(params, jnp.tile(mean, (n, 1)), jnp.tile(log_stddev, (n, 1)), z), np.float64)
    assert kl.mean() == pytest.approx(exact, abs=5.0 * kl.std() / np.sqrt(n) + 1e-4)


@every_prior
def test_gradients_are_finite_far_away(name):
    prior, params = PRIORS[name], drawn_params(name)
    z = jnp.array([[1e3, -1e3], [0.0, 0.0]])
    gradients = jax.grad(lambda params, z: prior.log_prob(params, z).sum(), argnums=(0, 1))(params, z)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize("name", ["gaussian", "flow"])
def test_it_begins_as_the_standard_normal_to_the_bit(name):
    prior = PRIORS[name]
    z = jax.random.normal(KEY, (100, 2))
    np.testing.assert_array_equal(
        jax.jit(prior.log_prob)(prior.init(KEY), z), jax.jit(PRIORS["standard_normal"].log_prob)({}, z)
    )


def test_bound_under_a_new_flow_is_the_bound_before_to_the_bit():
    vae = lv.mlp_vae((2,), lv.fixed(0.5), latent_size=16, width=8, num_blocks=1)
    params = lv.init(KEY, vae)
    x, keys = jax.random.normal(KEY, (50, 2)), example_keys(KEY, jnp.arange(50))
    prior = priors.flow(16)
    second, second_params = lv.with_prior(vae, params, prior, prior.init(KEY))
    before, after = (
        jax.jit(lambda params, vae=model: lv.elbo(keys, vae, params, x).elbo)(of_model)
        for model, of_model in ((vae, params), (second, second_params))
    )
    np.testing.assert_array_equal(after, before)


def test_gaussian_is_scipys():
    params = drawn_params("gaussian")
    factor = np.tril(params["below"], -1) + np.diag(np.exp(params["log_scale"]))
    z = jax.random.normal(KEY, (50, 2))
    reference = stats.multivariate_normal(params["mean"], factor @ factor.T)
    np.testing.assert_allclose(PRIORS["gaussian"].log_prob(params, z), reference.logpdf(z), rtol=1e-5, atol=1e-5)


def test_fitted_mixture_is_scikit_learns():
    rng = np.random.default_rng(0)
    z = np.concatenate([rng.normal(size=(300, 3)) * [1.0, 0.1, 2.0], rng.normal(size=(300, 3)) + 4.0])
    params = priors.fit_mixture(z, num_components=2, seed=3)
    theirs = sklearn.mixture.GaussianMixture(2, random_state=3).fit(z)
    ours = priors.mixture(3, 2).log_prob(params, jnp.asarray(z, jnp.float32))
    np.testing.assert_allclose(ours, theirs.score_samples(z), atol=1e-3)


def test_gain_of_the_fitted_gaussian_is_the_divergence_of_the_aggregate_posterior():
    # q(z) = N(m, S) if the means are N(m, S - diag s^2): the encoder of linear Gaussian data, wrongly scaled.
    rng = np.random.default_rng(0)
    m, stddev = np.array([0.5, -1.0, 0.0]), np.array([0.3, 0.6, 1.0])
    factor = np.array([[1.5, 0.0, 0.0], [0.7, 0.4, 0.0], [0.0, 0.2, 0.1]])
    covariance = factor @ factor.T + np.diag(stddev**2)
    exact = 0.5 * (np.trace(covariance) + m @ m - 3.0 - np.linalg.slogdet(covariance)[1])
    mean = m + rng.normal(size=(50_000, 3)) @ factor.T
    log_stddev = np.broadcast_to(np.log(stddev), mean.shape)
    q = [jnp.asarray(value, jnp.float32) for value in (mean, log_stddev)]
    params = priors.fit_gaussian(mean, log_stddev)
    gain = priors.standard_normal().kl({}, *q, q[0]) - priors.gaussian(3).kl(params, *q, q[0])
    assert float(gain.mean()) == pytest.approx(exact, rel=0.01)


def test_sampled_kl_has_less_noise_than_the_difference_of_logarithms():
    prior, params = PRIORS["mixture"], drawn_params("mixture")
    mean, log_stddev = jnp.zeros((4000, 2)), jnp.full((4000, 2), -2.0)
    z = jnp.exp(log_stddev) * jax.random.normal(KEY, (4000, 2))
    log_prior = prior.log_prob(params, z)
    plain = jnp.sum(gaussians.log_prob(z, mean, log_stddev), axis=-1) - log_prior
    ours = priors.sampled_kl(log_prior, mean, log_stddev, z)
    assert float(ours.mean()) == pytest.approx(float(plain.mean()), abs=5.0 * float(plain.std()) / 4000**0.5)
    assert ours.std() < 0.5 * plain.std()


@pytest.mark.parametrize(("latent_size", "num_layers"), [(2, 1), (5, 4), (16, 3)])
def test_layers_invert_and_their_volume_is_that_of_their_jacobian(latent_size, num_layers):
    layers = priors.couplings(latent_size, num_layers=num_layers, width=8)
    params = jax.tree.map(lambda leaf: leaf + 0.2 * jax.random.normal(KEY, leaf.shape), layers.init(KEY))
    z = jax.random.normal(KEY, (20, latent_size))
    noise, log_volume = jax.jit(layers.to_noise)(params, z)
    np.testing.assert_allclose(layers.from_noise(params, noise), z, atol=1e-5)
    jacobian = jax.jit(jax.vmap(jax.jacobian(lambda z: layers.to_noise(params, z[None])[0][0])))(z)
    np.testing.assert_allclose(log_volume, jnp.linalg.slogdet(jacobian)[1], atol=1e-4)


def test_two_layers_change_every_dimension():
    layers = priors.couplings(5, num_layers=2, width=8)
    params = jax.tree.map(lambda leaf: leaf + 0.2, layers.init(KEY))
    assert (layers.to_noise(params, jnp.zeros((1, 5)))[0] != 0.0).all()


@pytest.mark.parametrize("name", ["gaussian", "mixture", "flow"])
def test_bounds_and_samples_take_it(name):
    vae = lv.mlp_vae((2,), lv.fixed(0.5), latent_size=2, width=8, num_blocks=1)
    params = lv.init(KEY, vae)
    vae, params = lv.with_prior(vae, params, PRIORS[name], drawn_params(name))
    x = 0.5 * jax.random.normal(KEY, (5, 2))
    z = vae_lib.sample_prior(KEY, vae, params, num_samples=100_000)
    outputs = vae_lib.decode(vae, params, z)
    log_likelihood = jax.vmap(
        lambda x: vae.likelihood.log_prob(params["likelihood"], outputs, jnp.tile(x[None], (len(z), 1)))
    )(x)
    evidence = vae_lib.evidence(vae, params, x, num_nodes=500, reach=30.0)
    np.testing.assert_allclose(evidence, jax.nn.logsumexp(log_likelihood, axis=1) - np.log(len(z)), atol=0.05)
    copies, keys = jnp.tile(x[:1], (1000, 1)), example_keys(KEY, jnp.arange(1000))
    elbo = lv.elbo(keys, vae, params, copies).elbo
    bound = np.float64(lv.importance_bound(keys, vae, params, copies, num_samples=32))
    assert elbo.mean() < bound.mean() < evidence[0] + 4.0 * bound.std() / np.sqrt(1000)
    samples, _, _ = lv.generate(KEY, vae, params, num_samples=7)
    assert samples.shape == (7, 2)


@pytest.mark.parametrize("name", ["gaussian", "mixture", "flow"])
def test_it_learns_the_density_of_its_draws(name):
    prior, target = PRIORS[name], jnp.array([1.0, -0.5])[None] + 0.3 * jax.random.normal(KEY, (500, 2))
    params = prior.init(KEY)

    def loss(params):
        return -prior.log_prob(params, target).mean()

    start, slopes = loss(params), jax.jit(jax.grad(loss))
    for _ in range(60):
        params = jax.tree.map(lambda leaf, slope: leaf - 0.05 * slope, params, slopes(params))
    assert loss(params) < start - 0.3


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: priors.flow(1), "two or more"),
        (lambda: priors.flow(2, num_layers=0), "num_layers"),
        (lambda: priors.mixture(2, 0), "num_components"),
        (lambda: priors.fit_mixture(np.zeros((5, 2)), num_components=2), "need 6 draws, got 5"),
        (lambda: priors.fit_mixture(np.full((9, 2), np.nan), num_components=2), "finite"),
        (lambda: priors.fit_gaussian(np.full((9, 2), np.inf), np.zeros((9, 2))), "finite"),
    ],
)
def test_impossible_priors_are_refused(call, text):
    with pytest.raises(ValueError, match=text):
        call()


@pytest.mark.parametrize("num_components", [None, 3])
def test_widened_prior_is_the_product_of_both(num_components):
    """That of the chosen dimensions, and N(0, I) of the others."""
    rng, dims = np.random.default_rng(0), np.array([1, 2, 4])
    z = rng.normal(size=(200, 3)) * [0.3, 2.0, 1.0] + [1.0, 0.0, -2.0]
    z[:, 1] += z[:, 0]
    if num_components is None:
        narrow, wide = priors.gaussian(3), priors.gaussian(5)
        params = priors.fit_gaussian(z, np.full_like(z, -2.0))
    else:
        narrow, wide = priors.mixture(3, num_components), priors.mixture(5, num_components)
        params = priors.fit_mixture(z, num_components=num_components)
    whole = priors.widened(params, dims=dims, latent_size=5)
    assert jax.tree.map(jnp.shape, whole) == jax.tree.map(jnp.shape, jax.eval_shape(wide.init, jax.random.key(0)))
    x = jnp.asarray(rng.normal(size=(9, 5)), jnp.float32)
    expected = narrow.log_prob(params, x[:, dims]) + jnp.asarray(scipy.stats.norm.logpdf(x[:, [0, 3]]).sum(axis=1))
    np.testing.assert_allclose(wide.log_prob(whole, x), expected, rtol=1e-5)
