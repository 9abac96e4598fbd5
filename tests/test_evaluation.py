"""Held-out scores and bounds: every example once, whatever the chunks, against closed forms and scipy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from scipy import optimize, stats

from lvae_jax import diagnostics, evaluation, likelihoods, networks, toy
from lvae_jax import vae as vae_lib
from lvae_jax.evaluation import Kind
from lvae_jax.networks import Decoder, Encoder

SIZE = 23


@pytest.fixture(scope="module")
def model():
    head = likelihoods.learned_vector(0.5, floor=0.2)
    decoder = networks.mlp_decoder((2,), head.outputs, 3, width=8, num_blocks=1)
    vae = vae_lib.VAE(networks.mlp_encoder((2,), 3, width=8, num_blocks=1), decoder, head, 3)
    # Far from the small last layers of the start, where nothing depends on x.
    return vae, jax.jit(lambda key: jax.tree.map(lambda p: 3.0 * p, vae_lib.init(key, vae)))(jax.random.key(0))


@pytest.fixture(scope="module")
def examine(model):
    return jax.jit(lambda x, index: evaluation.examine(jax.random.key(1), *model, x, index))


@pytest.fixture(scope="module")
def examples():
    return np.asarray(toy.sample(jax.random.split(jax.random.key(2), SIZE)))


@pytest.mark.parametrize("chunk_size", [5, 1000])
def test_chunks_change_neither_scores_nor_diagnostics(examine, examples, chunk_size):
    whole = examine(examples, jnp.arange(SIZE))
    chunked = evaluation.over_split(examine, examples, chunk_size=chunk_size)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, chunked[0], whole[0])
    whole, chunked = diagnostics.summarise(whole[1]), diagnostics.summarise(chunked[1])
    jax.tree.map(close, chunked, whole)
    assert all(leaf.dtype in (np.float64, np.int64) for leaf in jax.tree.leaves(whole))


@pytest.mark.parametrize("chunk_size", [1, 5, 22, 23, 24, 1000])
def test_chunks_have_one_shape_and_the_fill_is_dropped(examples, chunk_size):
    shapes = []

    def sums(x, index):
        shapes.append(x.shape)
        return vae_lib.Scores(*7 * [np.stack([x[:, 0], index])])  # [2, B]: the last axis is the examples'

    scores = evaluation.over_split(sums, examples, chunk_size=chunk_size)
    size = min(chunk_size, SIZE)
    assert shapes == [(size, 2)] * -(-SIZE // size)
    np.testing.assert_array_equal(scores.elbo, [examples[:, 0], np.arange(SIZE)])


def test_draws_depend_on_the_example_index(examine, examples):
    repeated, index = np.repeat(examples[:1], SIZE, axis=0), jnp.arange(SIZE).at[1].set(0)
    scores, _ = examine(repeated, index)
    assert scores.elbo[0] == scores.elbo[1] != scores.elbo[2]


def test_paper_elbo_drops_the_constant():
    # At x = mean and sigma = 1 the paper's log p(x|z) is 0; the density's is that of n standard Gaussians at 0.
    assert evaluation.paper_elbo(784 * -0.9189385332, (28, 28, 1)) == pytest.approx(0.0, abs=1e-5)


def test_elbo_at_another_sigma_is_that_of_the_same_networks(model, examples):
    """Of fixed heads that differ in nothing else, to the same draws of z."""
    learned, params = model
    decoder = Decoder(learned.decoder.init, lambda params, z: learned.decoder.apply(params, z)[..., :1])

    vae = learned._replace(decoder=decoder, likelihood=likelihoods.fixed())

    @jax.jit
    def summary(head_params):
        used = params | {"likelihood": head_params}
        scores, _ = evaluation.examine(jax.random.key(1), vae, used, jnp.array(examples), jnp.arange(SIZE))
        return vae_lib.summary(scores)

    one, *others = (summary(likelihoods.fixed(sigma).init()) for sigma in (0.3, 0.05, 0.7, 4.0))
    moved = evaluation.elbo_at(np.array([0.05, 0.7, 4.0]), mse=float(one.mse), kl=float(one.kl), num_dimensions=2)
    np.testing.assert_allclose(moved, [other.elbo for other in others], rtol=1e-5)
    assert evaluation.elbo_at(0.3, mse=float(one.mse), kl=float(one.kl), num_dimensions=2) == pytest.approx(
        float(one.elbo), rel=1e-5
    )


@pytest.mark.parametrize(("mse", "kl", "n"), [(0.04, 3.0, 2), (2.5, 0.0, 784), (1e-6, 7.0, 1)])
def test_best_other_sigma_is_the_root_mean_squared_error(mse, kl, n):
    options = {"mse": mse, "kl": kl, "num_dimensions": n}
    found = optimize.minimize_scalar(
        lambda log_sigma: -evaluation.elbo_at(np.exp(log_sigma), **options) / n,
        bounds=(-9.0, 3.0),
        options={"xatol": 1e-9},
    )
    assert np.exp(found.x) == pytest.approx(np.sqrt(mse), rel=1e-5)
    # There, each dimension is a Gaussian's entropy.
    entropy = stats.norm(0.0, np.sqrt(mse)).entropy()
    assert evaluation.elbo_at(np.sqrt(mse), **options) == pytest.approx(-n * entropy - kl, rel=1e-12)


# Importance-weighted bounds of a model whose posterior is known

SIGMA = 0.5
POSTERIOR_VARIANCE = SIGMA**2 / (1.0 + SIGMA**2)


def linear(sigma=SIGMA, *, shift=0.0, unused=1):
    """x = z + noise of stddev 1/2 in one dimension, decoded with `sigma`; the posterior of z is exact but for a `shift`
    of its mean. `unused` further latent dimensions are left at the prior."""

    def encode(params, x):
        mean = jnp.pad(x / (1.0 + SIGMA**2) + shift, ((0, 0), (0, unused)))
        return mean, jnp.zeros_like(mean).at[:, 0].set(0.5 * jnp.log(POSTERIOR_VARIANCE))

    nothing = Encoder(lambda key: {}, encode), Decoder(lambda key: {}, lambda params, z: z[:, :1, None])
    vae = vae_lib.VAE(*nothing, likelihoods.fixed(sigma), 1 + unused)
    return vae, vae_lib.init(jax.random.key(0), vae)


EVIDENCE = stats.norm(0.0, np.sqrt(1.0 + SIGMA**2))
POINTS = np.float32(EVIDENCE.rvs((20_000, 1), random_state=0))


def examined(vae, params, points=POINTS, **options):
    def both(x, index):
        return evaluation.examine(jax.random.key(1), vae, params, x, index)

    return evaluation.over_split(jax.jit(both), points, **options)


def test_importance_score_is_the_evidence_at_the_exact_posterior():
    def score(x, index):
        return evaluation.importance_score(jax.random.key(1), *linear(), x, index, num_samples=3)

    bound = evaluation.over_split(jax.jit(score), POINTS[:23], chunk_size=5)
    np.testing.assert_allclose(bound, EVIDENCE.logpdf(POINTS[:23, 0]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_samples", [1, 16])
def test_importance_score_lies_between_elbo_and_evidence(num_samples):
    model = linear(shift=0.4)
    gap = 0.4**2 / (2.0 * POSTERIOR_VARIANCE)

    def score(x, index):
        return evaluation.importance_score(jax.random.key(1), *model, x, index, num_samples=num_samples)

    points = POINTS[:4000]
    bound = evaluation.over_split(jax.jit(score), points)
    below = EVIDENCE.logpdf(points[:, 0]) - np.float64(bound)
    error = below.std() / np.sqrt(4000)
    assert abs(below.mean() - gap) < 4.0 * error if num_samples == 1 else -4.0 * error < below.mean() < gap / 1.5


# Rates in bits


def test_rate_of_mnist_knows_the_bound_of_its_codes():
    rate = evaluation.rate(5000.0, (28, 28, 1), kind=Kind.DENSITY)
    assert rate.bound == pytest.approx(4347.4, abs=0.05)
    assert rate.bits_per_dimension < 0.0, "more nats than any code could have"
    assert not rate.is_code
    assert rate.nats_per_dimension == pytest.approx(5000.0 / 784)
    at_bound = evaluation.rate(rate.bound, (28, 28, 1), kind=Kind.DEQUANTISED)
    assert at_bound.bits_per_dimension == pytest.approx(0.0, abs=1e-12)
    assert at_bound.is_code


@pytest.mark.parametrize("dequantised", [False, True])
def test_any_model_of_grey_levels_has_their_probabilities(model, dequantised):
    """Those of the same Gaussians; at the same z, with levels as data, the ELBO of a model with a discretised head."""
    (vae, params), levels, rng = model, 17, np.random.default_rng(0)
    params = params | {"decoder": jax.tree.map(lambda p: 0.3 * p, params["decoder"])}  # so that no mass underflows
    k = rng.integers(0, levels, (SIZE, 2))
    x = jnp.float32((k + rng.uniform(size=k.shape)) / levels if dequantised else k / (levels - 1))
    code = evaluation.as_probabilities(vae, levels=levels, dequantised=dequantised)
    keys = jax.random.split(jax.random.key(3), SIZE)
    terms = vae_lib.elbo(keys, code, params, x)
    mean, stddev = (np.float64(value) for value in (terms.mean, terms.stddev))
    edges = np.stack([k, k + 1]) / levels if dequantised else np.stack([k - 0.5, k + 0.5]) / (levels - 1)
    low, high = np.where(k == 0, -np.inf, edges[0]), np.where(k == levels - 1, np.inf, edges[1])
    raw = np.float64(vae_lib.elbo(keys, vae, params, x).mean)
    np.testing.assert_array_equal(mean, raw.clip(0.0, 1.0).astype(np.float32))
    masses = stats.norm.cdf(high, raw, stddev) - stats.norm.cdf(low, raw, stddev)
    np.testing.assert_allclose(terms.log_likelihood, np.log(masses).sum(axis=1), rtol=1e-4)
    np.testing.assert_array_equal(terms.kl, vae_lib.elbo(keys, vae, params, x).kl)
    if dequantised:  # Jensen: within a bin the mean of the log density is below the log of the mean
        u = (np.arange(200) + 0.5) / 200
        inside = stats.norm.logpdf((k[..., None] + u) / levels, raw[..., None], stddev[..., None]).mean(axis=-1)
        assert np.all(np.log(masses) >= inside - np.log(levels) - 1e-6)


def test_histograms_are_numpy_s():
    rng = np.random.default_rng(0)
    train, test = (rng.integers(0, 5, (n, 3, 2, 1), dtype=np.uint8) for n in (1003, 20))
    train[:, 0, 0] = 4  # no other level is ever seen there
    test[0, 0, 0] = 0
    found = evaluation.histograms(train, test, levels=5)
    flat, asked = train.reshape(-1, 6), test.reshape(-1, 6)
    each = [[(np.sum(flat[:, i] == k) + 0.5) / (1003 + 2.5) for k in range(5)] for i in range(6)]
    every = [(np.sum(flat == k) + 0.5) / (6 * 1003 + 2.5) for k in range(5)]
    np.testing.assert_allclose(np.sum(each, axis=1), 1.0)
    expected = [
        np.mean([sum(np.log(each[i][k]) for i, k in enumerate(row)) for row in asked]),
        np.mean([sum(np.log(every[k]) for k in row) for row in asked]),
    ]
    np.testing.assert_allclose(list(found.values()), expected, rtol=1e-12)
    assert list(found) == ["histogram of each pixel", "histogram of all pixels"]


@pytest.mark.parametrize("shape", [(1,), (4, 4, 3)])
def test_uniform_noise_costs_8_bits_in_every_convention(shape):
    n = np.prod(shape)
    discretised = evaluation.rate(-n * np.log(256.0), shape, kind=Kind.DISCRETISED)
    assert discretised.bits_per_dimension == pytest.approx(8.0)
    assert discretised.nats_per_dimension == pytest.approx(-np.log(256.0))
    assert discretised.bound == 0.0
    assert discretised.is_code
    for kind in (Kind.DENSITY, Kind.DEQUANTISED):  # of the uniform density on [0, 1], 1
        assert evaluation.rate(0.0, shape, kind=kind).bits_per_dimension == pytest.approx(8.0)


@pytest.mark.parametrize("sigma", [0.02, 0.1, 0.5])
@pytest.mark.parametrize("k", [0, 100, 255])
def test_dequantised_rate_bounds_the_discretised_rate(sigma, k):
    p = stats.norm(100.5 / 256.0, sigma)
    u = (np.arange(2000) + 0.5) / 2000
    dequantised = evaluation.rate(p.logpdf((k + u) / 256.0).mean(), (1,), kind=Kind.DEQUANTISED)
    low, high = k / 256.0, (k + 1) / 256.0
    # Mass and logarithm on the side of the mean where nothing cancels.
    mass = p.cdf(high) - p.cdf(low) if k <= 100 else p.sf(low) - p.sf(high)
    exact = evaluation.rate(np.log(mass), (1,), kind=Kind.DISCRETISED)
    assert exact.bits_per_dimension <= dequantised.bits_per_dimension + 1e-9
    if sigma >= 0.1:
        assert dequantised.bits_per_dimension == pytest.approx(exact.bits_per_dimension, abs=0.02)


def test_rate_refuses_a_positive_log_probability_and_an_unknown_kind():
    with pytest.raises(ValueError, match="density"):
        evaluation.rate(0.1, (2,), kind=Kind.DISCRETISED)
    with pytest.raises(Exception, match="kind"):
        evaluation.rate(0.1, (2,), kind="bits")


def test_information_bound_of_a_gaussian_channel():
    """z = x + noise, x ~ N(0, 1): the information is log(1 + 1 / s^2) / 2 for each dimension."""
    rng = np.random.default_rng(0)
    mean = rng.normal(size=(3000, 2)).astype(np.float32)
    for stddev in (0.5, 2.0):
        log_stddev = np.full_like(mean, np.log(stddev))
        z = (mean + stddev * rng.normal(size=mean.shape)).astype(np.float32)
        expected = 2.0 * 0.5 * np.log1p(1.0 / stddev**2)
        assert evaluation.information_bound(mean, log_stddev, z) == pytest.approx(expected, abs=0.05)
    part = slice(600)
    log_probs = scipy.stats.norm.logpdf(z[part, None], mean[None, part], stddev).sum(axis=-1)
    direct = np.mean(np.diag(log_probs) - scipy.special.logsumexp(log_probs, axis=1)) + np.log(600)
    assert evaluation.information_bound(mean[part], log_stddev[part], z[part]) == pytest.approx(direct, rel=1e-6)
    sharp = evaluation.information_bound(mean[part], np.full_like(mean[part], -20.0), mean[part])
    assert sharp == pytest.approx(np.log(600)), "no more than the logarithm of their number"


def test_quadrature_is_refined_until_it_settles():
    asked = []

    def evidence(*, num_nodes):
        asked.append(num_nodes)
        return np.full(3, 1.0 / num_nodes)

    values, change = evaluation.refined(evidence)
    assert asked == [128, 256, 512, 1024]
    np.testing.assert_allclose(values, 1.0 / 1024)
    np.testing.assert_allclose(change, 1.0 / 512 - 1.0 / 1024)
    assert evaluation.refined(evidence, tolerance=0.0)[0][0] == 1.0 / 2048
