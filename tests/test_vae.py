"""The bounds on a linear Gaussian model, whose evidence and posterior are known in closed form, and quadrature."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from lvae_jax import evaluation, likelihoods, networks, vae
from lvae_jax.networks import Decoder, Encoder

# x = W z + OFFSET + SIGMA noise. The columns of W are orthogonal, so that the posterior of z is diagonal:
# N(GAIN (x - OFFSET), diag POSTERIOR_STDDEV^2).
W = np.array([[1.2, 0.3], [-0.6, 0.6], [0.0, -0.5]])
OFFSET, SIGMA = np.array([0.5, -1.0, 2.0]), 0.5
POSTERIOR_STDDEV = (1.0 + (W**2).sum(0) / SIGMA**2) ** -0.5
GAIN = (POSTERIOR_STDDEV**2)[:, None] * W.T / SIGMA**2
EVIDENCE = stats.multivariate_normal(OFFSET, W @ W.T + SIGMA**2 * np.eye(3))

KEY = jax.random.key(0)
X = np.float32([[0.5, -1.0, 2.0], [2.5, -1.5, 2.3], [-1.0, 0.5, 1.0], [0.0, 0.0, 0.0]])
# How q(z|x) departs from the posterior: (shift, log of the ratio of stddevs), each for the two latent variables.
EXACT = ([0.0, 0.0], [0.0, 0.0])
WRONG = [([0.3, -0.4], [0.0, 0.0]), ([0.0, 0.0], [0.4, 0.2]), ([0.0, 0.1], [-0.25, -0.1]), ([-0.2, 0.2], [0.3, -0.3])]
wrong_posteriors = pytest.mark.parametrize("wrong", WRONG)


def encode(params, x):
    shift, log_ratio = params
    mean = (x - OFFSET.astype(np.float32)[None]) @ GAIN.T.astype(np.float32) + shift[None]
    return mean, jnp.broadcast_to((np.log(POSTERIOR_STDDEV).astype(np.float32) + log_ratio)[None], mean.shape)


def decode(params, z):
    return (z @ params.T + OFFSET.astype(np.float32)[None])[..., None]


LINEAR = vae.VAE(
    Encoder(lambda key: tuple(map(jnp.array, EXACT)), encode),
    Decoder(lambda key: jnp.array(W, jnp.float32), decode),
    likelihoods.fixed(SIGMA),
    2,
)


def linear(wrong=EXACT):
    """(model, parameters): one model, so that one program serves all parameters."""
    return LINEAR, vae.init(KEY, LINEAR) | {"encoder": tuple(map(jnp.array, wrong))}


elbo = jax.jit(vae.elbo, static_argnums=1)
importance_bound = jax.jit(vae.importance_bound, static_argnums=1, static_argnames="num_samples")
evidence = jax.jit(vae.evidence, static_argnums=0, static_argnames=("num_nodes", "reach"))


def posterior_kl(wrong):
    """KL(q(z|x) || p(z|x)), the gap between log p(x) and the ELBO."""
    shift, log_ratio = map(np.array, wrong)
    return ((shift / POSTERIOR_STDDEV) ** 2 + np.exp(2.0 * log_ratio) - 1.0 - 2.0 * log_ratio).sum() / 2.0


def copies(x, n):
    return jax.random.split(KEY, n), jnp.tile(x, (n, 1))


def assert_mean(draws, expected, standard_errors=4.0):
    draws = np.float64(draws)
    error = np.abs(draws.mean(0) - expected) / (draws.std(0) / np.sqrt(len(draws)))
    assert np.max(error) < standard_errors, f"the mean is {np.max(error):.1f} standard errors away"


# Bounds


@pytest.mark.parametrize("wrong", [EXACT, *WRONG])
@pytest.mark.parametrize("x", X[:3])
def test_elbo_is_the_evidence_less_the_posteriors_divergence(wrong, x):
    model, params = linear(wrong)
    keys, xs = copies(x, 8_000)
    bound = elbo(keys, model, params, xs).elbo
    assert bound.shape == (8_000,)
    assert_mean(bound, EVIDENCE.logpdf(x) - posterior_kl(wrong))


@wrong_posteriors
def test_elbo_is_the_log_likelihood_less_the_kl(wrong):
    model, params = linear(wrong)
    terms = elbo(jax.random.split(KEY, len(X)), model, params, jnp.array(X))
    mean = (X - OFFSET) @ GAIN.T + wrong[0]
    stddev = POSTERIOR_STDDEV * np.exp(wrong[1])
    np.testing.assert_allclose(terms.kl, (mean**2 + stddev**2 - 1.0 - 2.0 * np.log(stddev)).sum(-1) / 2.0, rtol=1e-5)
    log_likelihood = stats.norm.logpdf(X, *map(np.float64, (terms.mean, terms.stddev))).sum(-1)
    np.testing.assert_allclose(terms.log_likelihood, log_likelihood, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(terms.elbo, terms.log_likelihood - terms.kl)
    np.testing.assert_allclose(terms.stddev, SIGMA, rtol=1e-6)
    np.testing.assert_allclose(terms.posterior_mean, mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.exp(terms.posterior_log_stddev), np.tile(stddev, (len(X), 1)), rtol=1e-6)


def test_importance_bound_needs_a_sample():
    model, params = linear()
    for num_samples in (0, -3):
        with pytest.raises(ValueError, match="num_samples"):
            vae.importance_bound(jax.random.split(KEY, len(X)), model, params, jnp.array(X), num_samples=num_samples)


@pytest.mark.parametrize("num_samples", [1, 5])
def test_importance_bound_is_exact_at_the_posterior(num_samples):
    model, params = linear()
    bound = importance_bound(jax.random.split(KEY, len(X)), model, params, jnp.array(X), num_samples=num_samples)
    np.testing.assert_allclose(bound, EVIDENCE.logpdf(X), rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize("wrong", WRONG[2:])
def test_importance_bound_rises_from_the_elbo_to_the_evidence(wrong):
    model, params = linear(wrong)
    keys, xs = copies(X[1], 8_000)
    exact, sizes = EVIDENCE.logpdf(X[1]), [1, 4, 32]
    bounds = [np.float64(importance_bound(keys, model, params, xs, num_samples=k)) for k in sizes]
    assert_mean(bounds[0], exact - posterior_kl(wrong))
    for fewer, more in itertools.pairwise(bounds):
        assert more.mean() - fewer.mean() > 3.0 * np.hypot(more.std(), fewer.std()) / np.sqrt(len(xs))
        assert more.std() < 0.8 * fewer.std()
    assert bounds[-1].mean() < exact + 4.0 * bounds[-1].std() / np.sqrt(len(xs))
    assert bounds[-1].mean() > exact - posterior_kl(wrong) / 5.0
    for bound in bounds[1:]:
        assert_mean(np.exp(bound - exact), 1.0)  # The weights are unbiased for any k.


# Evidence by quadrature


def narrowed(latent_size, wrong=EXACT):
    """(model, parameters, exact evidence) of the linear model with its first one or two latent variables."""
    model, params = linear(wrong)
    weights = W[:, :latent_size]
    encoder = Encoder(model.encoder.init, lambda params, x: tuple(part[:, :latent_size] for part in encode(params, x)))
    model = model._replace(encoder=encoder, latent_size=latent_size)
    exact = stats.multivariate_normal(OFFSET, weights @ weights.T + SIGMA**2 * np.eye(3))
    return model, params | {"decoder": params["decoder"][:, :latent_size]}, exact


@pytest.mark.parametrize("latent_size", [1, 2])
def test_evidence_is_exact_and_does_not_ask_the_encoder(latent_size):
    model, params, exact = narrowed(latent_size, WRONG[3])
    # Nodes as far apart as the stddev of the narrowest posterior, and many more.
    for num_nodes in (1 + int(np.ceil(12.0 / POSTERIOR_STDDEV.min())), 200):
        ours = evidence(model, params, jnp.array(X), num_nodes=num_nodes)
        np.testing.assert_allclose(ours, exact.logpdf(X), rtol=2e-6, atol=2e-5)
    coarse = evidence(model, params, jnp.array(X), num_nodes=1 + int(12.0 / POSTERIOR_STDDEV.min() / 4.0))
    assert np.abs(coarse - exact.logpdf(X)).max() > 0.05, "too few nodes show"


def test_evidence_covers_the_prior_as_far_as_it_reaches():
    model, params, exact = narrowed(1)
    column = W[:, 0]
    # The posterior's mean is 7: beyond 6 stddevs of the prior.
    x = np.float32(OFFSET + 7.0 * (1.0 + SIGMA**2 / (column @ column)) * column)[None]
    near, far = (evidence(model, params, jnp.array(x), num_nodes=200, reach=reach) for reach in (6.0, 12.0))
    np.testing.assert_allclose(far, exact.logpdf(x[0]), rtol=1e-5)
    assert near[0] < far[0] - 1.0


def curved(latent_size):
    """A decoder that bends, under a vector of sigmas: its outputs, as numpy and as JAX give them."""

    def decode(params, z, np=jnp):
        first, last = z[..., 0], z[..., -1]
        means = np.stack([np.sin(2.0 * first) + last**2, first * last, np.exp(0.5 * last)], axis=-1)
        log_stddevs = np.stack([0.3 * first - 1.0, -0.5 + 0.0 * first, 0.2 * last - 0.7], axis=-1)
        return np.stack([means, log_stddevs], axis=-1)

    encode = Encoder(lambda key: {}, lambda params, x: (0.3 * x[:, :latent_size], 0.0 * x[:, :latent_size] - 0.3))
    model = vae.VAE(encode, Decoder(lambda key: {}, decode), likelihoods.learned_vector(gain=1.0), latent_size)
    return model, vae.init(KEY, model), lambda z: decode({}, np.array(z), np)


@pytest.mark.parametrize("latent_size", [1, 2])
def test_evidence_of_a_curved_decoder_is_scipys_integral(latent_size):
    model, params, decode = curved(latent_size)
    x = np.array([0.9, -0.4, 1.3])

    def joint(*z):
        mean, log_stddev = decode(z).T
        exponent = ((x - mean) / np.exp(log_stddev)) @ ((x - mean) / np.exp(log_stddev)) + np.dot(z, z)
        return np.exp(-0.5 * exponent - log_stddev.sum()) / (2.0 * np.pi) ** ((3 + latent_size) / 2.0)

    expected, error = integrate.nquad(joint, latent_size * [(-6.0, 6.0)], opts={"epsrel": 1e-5, "epsabs": 0.0})
    assert error < 1e-4 * expected
    ours = evidence(model, params, jnp.float32(x)[None], num_nodes=200)
    np.testing.assert_allclose(ours, [np.log(expected)], rtol=1e-4)


@pytest.mark.parametrize("latent_size", [1, 2])
def test_importance_weights_are_unbiased_on_a_curved_decoder(latent_size):
    model, params, _ = curved(latent_size)
    x = jnp.array([0.9, -0.4, 1.3])
    keys, xs = copies(x, 200)
    bounds = np.float64(importance_bound(keys, model, params, xs, num_samples=500))
    exact = np.float64(evidence(model, params, x[None], num_nodes=200))[0]
    assert_mean(np.exp(bounds - exact), 1.0)
    assert abs(bounds.mean() - exact) < 0.02
    assert bounds.std() > 1e-4, "the posterior is not exact"


def test_evidence_of_three_latent_dimensions_is_refused():
    model, params = linear()
    with pytest.raises(ValueError, match="one or two latent dimensions, not 3"):
        vae.evidence(model._replace(latent_size=3), params, jnp.array(X), num_nodes=8)


# Randomness


def test_results_are_a_function_of_keys():
    model, params = linear(WRONG[0])
    keys, x = jax.random.split(KEY, len(X)), jnp.array(X)
    for f in (elbo, lambda *args: importance_bound(*args, num_samples=3)):
        first, again, other = (f(k, model, params, x) for k in (keys, keys, keys[::-1]))
        jax.tree.map(np.testing.assert_array_equal, first, again)
        assert not np.any(jax.tree.leaves(first)[0] == jax.tree.leaves(other)[0])


def test_examples_result_does_not_depend_on_its_batch():
    model, params = linear(WRONG[0])
    keys, x, batch = jax.random.split(KEY, len(X)), jnp.array(X), np.array([2, 0])
    for f in (elbo, lambda *args: importance_bound(*args, num_samples=3)):
        together, apart = f(keys, model, params, x), f(keys[batch], model, params, x[batch])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b[batch], rtol=1e-5, atol=1e-5), apart, together)


def test_every_example_and_latent_variable_draws_its_own_noise():
    model, params = linear()
    n = 8_000
    keys, xs = copies(X[1], n)
    terms = elbo(keys, model, params, xs)
    z = (np.float64(terms.mean) - OFFSET) @ np.linalg.pinv(W).T
    noise = (z - GAIN @ (X[1] - OFFSET)) / POSTERIOR_STDDEV
    assert len(np.unique(terms.log_likelihood)) > 0.95 * n, "examples share their noise"
    assert abs(np.corrcoef(noise.T)[0, 1]) < 4.0 / np.sqrt(n), "latent variables share their noise"
    for column in noise.T:
        assert stats.kstest(column, stats.norm.cdf).pvalue > 1e-3


def test_init_draws_each_part_from_a_key_of_its_own():
    draw = Encoder(lambda key: jax.random.normal(key, (3,)), lambda params, inputs: inputs)
    params = vae.init(KEY, vae.VAE(draw, draw, likelihoods.learned_scalar(0.3), 2))
    assert set(params) == {"encoder", "decoder", "likelihood"}
    assert not np.any(params["encoder"] == params["decoder"])
    assert params["likelihood"] == likelihoods.learned_scalar(0.3).init()
    np.testing.assert_array_equal(
        vae.init(KEY, vae.VAE(draw, draw, likelihoods.fixed(), 2))["encoder"], params["encoder"]
    )


# What a model shows


@wrong_posteriors
def test_reconstruct_decodes_the_posteriors_mean(wrong):
    model, params = linear(wrong)
    mean, stddev = vae.reconstruct(model, params, jnp.array(X))
    expected = ((X - OFFSET) @ GAIN.T + wrong[0]) @ W.T + OFFSET
    np.testing.assert_allclose(mean, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(stddev, np.full(X.shape, SIGMA), rtol=1e-6)


def test_generate_draws_from_the_models_marginal():
    model, params = linear()
    n = 40_000
    samples, means, stddevs = map(np.float64, vae.generate(KEY, model, params, num_samples=n))
    np.testing.assert_allclose(stddevs, np.full((n, 3), SIGMA), rtol=1e-6)
    for draws, centre, covariance in (
        (samples, OFFSET, EVIDENCE.cov),
        (means, OFFSET, W @ W.T),
        (samples - means, 0.0, SIGMA**2 * np.eye(3)),
    ):
        assert_mean(draws, centre)
        # A product of two Gaussians varies at most as much as their squares.
        variances = np.diag(covariance)
        assert np.all(np.abs(np.cov(draws.T) - covariance) < 4.5 * np.sqrt(2.0 / n * np.outer(variances, variances)))
    z = (means - OFFSET) @ np.linalg.pinv(W).T
    noise = (samples - means) / SIGMA
    across = np.corrcoef(z.T, noise.T)[:2, 2:]
    assert np.abs(across).max() < 4.5 / np.sqrt(n), "z and the observation share their noise"
    flat = np.corrcoef(z.ravel(), noise.ravel()[: z.size])[0, 1]
    assert abs(flat) < 4.5 / np.sqrt(z.size), "z and the observation share their key"


def test_generate_is_a_function_of_its_key():
    model, params = linear()
    first, again, other = (vae.generate(jax.random.key(seed), model, params, num_samples=5) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    for i in range(2):
        assert not np.any(first[i] == other[i])
        assert len(np.unique(first[i])) == first[i].size


# Scores


def assert_close(tree, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), tree, expected)


def test_scores_and_summary_are_numpys():
    rng = np.random.default_rng(0)
    log_likelihood, kl = rng.normal(size=(2, 5)).astype(np.float32)
    x, mean, stddev = rng.uniform(0.1, 2.0, size=(3, 5, 3, 4, 1)).astype(np.float32)
    posterior = 2 * (jnp.zeros((5, 2)),)
    terms = vae.Terms(*map(jnp.array, (log_likelihood, kl, mean, stddev)), *posterior, residual=jnp.zeros_like(mean))
    scores, flat = vae.scores(terms, jnp.array(x)), stddev.reshape(5, -1)
    expected = vae.Scores(
        elbo=log_likelihood - kl,
        log_likelihood=log_likelihood,
        kl=kl,
        mse=((x - mean) ** 2).reshape(5, -1).mean(-1),
        sigma_min=flat.min(-1),
        sigma_mean=flat.mean(-1),
        sigma_max=flat.max(-1),
    )
    assert_close(scores, expected)
    totals = {name: np.mean(values) for name, values in expected._asdict().items()}
    totals |= {"sigma_min": stddev.min(), "sigma_max": stddev.max()}
    assert_close(vae.summary(scores), vae.Scores(**totals))
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf + 1.0]), scores)
    jax.tree.map(
        assert_close, vae.summary(stacked), vae.Scores(*(np.array([t, t + 1.0]) for t in vae.Scores(**totals)))
    )


# Doors


def small(shape=(2,), outputs=1, head=None):
    options = {"width": 4, "num_blocks": 0}
    model = vae.VAE(
        networks.mlp_encoder(shape, 2, **options),
        networks.mlp_decoder(shape, outputs, 2, **options),
        head or likelihoods.fixed(0.5),
        2,
    )
    return model, vae.init(KEY, model)


def test_data_of_another_shape_are_named_beside_the_models():
    model, params = small((1,))
    x, keys = jnp.zeros(3), jax.random.split(KEY, 3)
    doors = [
        lambda: vae.elbo(keys, model, params, x),
        lambda: vae.importance_bound(keys, model, params, x, num_samples=1),
        lambda: vae.evidence(model, params, x, num_nodes=5),
        lambda: vae.reconstruct(model, params, x),
        lambda: vae.scores(vae.elbo(keys, model, params, x[:, None]), x),
    ]
    for door in doors:
        with pytest.raises(ValueError, match=r"shape \[3\], but .* \[B, 1\]"):
            door()
    with pytest.raises(ValueError, match="uint8"):
        networks.check_data(jnp.zeros((3, 1), jnp.uint8), (1,))


def test_decoder_with_too_few_channels_is_refused():
    model, params = small(outputs=1, head=likelihoods.learned_vector())
    with pytest.raises(ValueError, match=r"has 1 outputs .* needs 2"):
        vae.generate(KEY, model, params, num_samples=1)


def test_no_samples_are_refused():
    with pytest.raises(ValueError, match="`num_samples`"):
        vae.generate(KEY, *small(), num_samples=0)


def test_a_trained_model_is_read_under_another_head():
    """Against the closed form of the ELBO at another sigma, mapped over sigmas, and by gradients."""
    model = vae.mlp_vae((2,), likelihoods.fixed(0.5), latent_size=2, width=8, num_blocks=1)
    params = vae.init(KEY, model)
    x = jax.random.normal(jax.random.key(1), (50, 2))
    keys = jax.random.split(jax.random.key(2), 50)
    own = vae.elbo(keys, model, params, x)
    fit = {"mse": float(vae.summary(vae.scores(own, x)).mse), "kl": float(own.kl.mean()), "num_dimensions": 2}

    def mean_elbo(sigma, head=likelihoods.fixed):
        return vae.elbo(keys, *vae.with_likelihood(model, params, head(sigma)), x).elbo.mean()

    sigmas = np.array([0.1, 0.5, 2.0], np.float32)
    np.testing.assert_allclose(jax.vmap(mean_elbo)(jnp.asarray(sigmas)), evaluation.elbo_at(sigmas, **fit), rtol=1e-5)
    slope = jax.grad(mean_elbo)(jnp.float32(0.5), likelihoods.learned_scalar)
    expected = (evaluation.elbo_at(0.501, **fit) - evaluation.elbo_at(0.499, **fit)) / 0.002
    np.testing.assert_allclose(slope, expected, rtol=1e-3)
    assert params["likelihood"]["log_stddev"] == jnp.log(0.5), "the model of before stays as it is"
