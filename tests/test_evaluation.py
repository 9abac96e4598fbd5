"""Held-out scores and diagnostics: every example once, whatever the chunks, against closed forms and scipy."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage, optimize, stats

from lvae_jax import evaluation, likelihoods, networks, toy
from lvae_jax import vae as vae_lib
from lvae_jax.evaluation import INTERVALS
from lvae_jax.networks import Network

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
    whole, chunked = evaluation.diagnostics(whole[1]), evaluation.diagnostics(chunked[1])
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


def test_draws_belong_to_the_example_s_index(examine, examples):
    repeated, index = np.repeat(examples[:1], SIZE, axis=0), jnp.arange(SIZE).at[1].set(0)
    scores, _ = examine(repeated, index)
    assert scores.elbo[0] == scores.elbo[1] != scores.elbo[2]


def test_paper_elbo_drops_the_constant():
    # At x = mean and sigma = 1 the paper's log p(x|z) is 0; the density's is that of n standard Gaussians at 0.
    assert evaluation.paper_elbo(784 * -0.9189385332, (28, 28, 1)) == pytest.approx(0.0, abs=1e-5)


def test_elbo_at_another_sigma_is_that_of_the_same_networks_under_it(model, examples):
    """Of fixed heads that differ in nothing else, to the same draws of z."""
    learned, params = model
    decoder = Network(learned.decoder.init, lambda params, z: learned.decoder.apply(params, z)[..., :1])

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
def test_the_best_sigma_to_be_moved_to_is_the_root_mean_squared_error(mse, kl, n):
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


# Importance-weighted bounds and diagnostics of a model whose posterior is known

SIGMA = 0.5
POSTERIOR_VARIANCE = SIGMA**2 / (1.0 + SIGMA**2)


def linear(sigma=SIGMA, *, shift=0.0, unused=1):
    """x = z + noise of stddev 1/2 in one dimension, decoded with `sigma`; the posterior of z is exact but for a `shift`
    of its mean. `unused` further latent dimensions are left at the prior."""

    def encode(params, x):
        mean = jnp.pad(x / (1.0 + SIGMA**2) + shift, ((0, 0), (0, unused)))
        return mean, jnp.zeros_like(mean).at[:, 0].set(0.5 * jnp.log(POSTERIOR_VARIANCE))

    nothing = Network(lambda key: {}, encode), Network(lambda key: {}, lambda params, z: z[:, :1, None])
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


def test_kl_is_the_sum_of_its_latent_dimensions(examine, examples):
    scores, details = examine(examples, jnp.arange(SIZE))
    assert details.latent_kl.shape == (3, SIZE)
    np.testing.assert_allclose(details.latent_kl.sum(0), scores.kl, rtol=1e-5)


def test_diagnostics_keep_the_axes_of_sweep_members(examine, examples):
    _, details = examine(examples, jnp.arange(SIZE))
    other = jax.tree.map(lambda leaf: leaf[..., ::-1] * 0.1, details)
    stacked = evaluation.diagnostics(jax.tree.map(lambda *leaves: np.stack(leaves), details, other))
    for member, alone in enumerate((details, other)):
        jax.tree.map(
            lambda a, b, member=member: np.testing.assert_allclose(a[member], b), stacked, evaluation.diagnostics(alone)
        )
    assert stacked.latent_kl.shape == (2, 3)
    assert stacked.coverage.shape == (2, 3)


def test_diagnostics_of_the_exact_posterior_are_in_closed_form():
    scores, details = examined(*linear())
    found, n = evaluation.diagnostics(details), len(POINTS)
    mean = np.float64(POINTS[:, 0]) / (1.0 + SIGMA**2)
    kl = np.mean(mean**2 + POSTERIOR_VARIANCE - 1.0 - np.log(POSTERIOR_VARIANCE)) / 2.0
    np.testing.assert_allclose(found.latent_kl, [kl, 0.0], rtol=1e-5)
    np.testing.assert_allclose(found.latent_kl.sum(), scores.kl.mean(), rtol=1e-5)
    assert found.active_units == 1
    assert found.floor_fraction == 0.0
    assert abs(found.residual_mean) < 4.0 / np.sqrt(n)
    assert abs(found.residual_stddev - 1.0) < 4.0 / np.sqrt(2.0 * n)
    assert np.all(
        np.abs(found.coverage - INTERVALS) < 4.0 * np.sqrt(np.multiply(INTERVALS, np.subtract(1, INTERVALS)) / n)
    )
    assert evaluation.diagnosis(found) == "calibrated"


@pytest.mark.parametrize("factor", [0.4, 3.0])
def test_a_wrong_sigma_shows_in_sigma_factor_and_coverage(factor):
    scores, details = examined(*linear(SIGMA * factor))
    found, n = evaluation.diagnostics(details), len(POINTS)
    np.testing.assert_allclose(
        found.sigma_factor, np.sqrt(scores.mse.mean(dtype=np.float64)) / (SIGMA * factor), rtol=1e-5
    )
    np.testing.assert_allclose(found.sigma_factor, 1.0 / factor, rtol=4.0 / np.sqrt(2.0 * n))
    expected = stats.norm.cdf(factor * stats.norm.ppf(0.5 + np.divide(INTERVALS, 2.0))) * 2.0 - 1.0
    np.testing.assert_allclose(found.coverage, expected, atol=4.0 * 0.5 / np.sqrt(n))


def terms_of(mean, stddev, posterior_mean=None):
    """Terms [B] with these moments of p(x|z)."""
    zeros = jnp.zeros(len(mean))
    latent = jnp.zeros((len(mean), 1)) if posterior_mean is None else jnp.array(posterior_mean, jnp.float32)
    return vae_lib.Terms(zeros, zeros, mean, stddev, latent, jnp.zeros_like(latent))


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (1.5, 0.3), (0.5, -1.0)])
def test_residuals_of_a_vector_of_sigmas_are_scipys(scale, shift):
    rng, shape = np.random.default_rng(0), (400, 5, 6, 1)
    mean, noise = rng.normal(size=(2, *shape)).astype(np.float32)
    stddev = rng.uniform(0.01, 3.0, shape).astype(np.float32)
    x = jnp.array(mean + stddev * (scale * noise + shift))
    details = evaluation.details(terms_of(jnp.array(mean), jnp.array(stddev)), x, floor=0.0)
    found, true, n = evaluation.diagnostics(details), stats.norm(shift, scale), noise.size
    np.testing.assert_allclose(found.residual_mean, shift, atol=4.0 * scale / np.sqrt(n))
    np.testing.assert_allclose(found.residual_stddev, scale, rtol=4.0 / np.sqrt(2.0 * n))
    limits = stats.norm.ppf(0.5 + np.divide(INTERVALS, 2.0))
    np.testing.assert_allclose(found.coverage, true.cdf(limits) - true.cdf(-limits), atol=2.0 / np.sqrt(n))

    # No other common factor of the sigmas explains the data better.
    def log_prob(factor):
        return stats.norm.logpdf(np.float64(x), mean, factor * np.float64(stddev)).sum()

    best = log_prob(found.sigma_factor)
    assert best > max(log_prob(found.sigma_factor * step) for step in (0.99, 1.01))
    np.testing.assert_allclose(found.sigma_factor, np.hypot(found.residual_mean, found.residual_stddev), rtol=1e-6)


def test_active_units_have_a_variance_above_a_hundredth():
    rng = np.random.default_rng(0)
    means = rng.permuted(np.linspace(-1.0, 1.0, 5000)[:, None].repeat(5, 1), axis=0) * np.sqrt(3.0)
    means = means * np.sqrt([0.0, 0.009, 0.011, 1.0, 0.0])[None] + [5.0, 50.0, -50.0, 0.0, 0.2]
    ones = jnp.ones((5000, 1))
    found = evaluation.diagnostics(evaluation.details(terms_of(ones, ones, means), ones, floor=0.0))
    assert found.active_units == 2


@pytest.mark.parametrize(
    ("variances", "directions"),
    [([0.3, 0.0, 0.0], 1), ([0.0, 0.0, 0.0], 0), ([0.009, 0.011, 1.0], 2), ([0.5, 0.5, 2.0], 3)],
)
def test_active_directions_do_not_depend_on_the_rotation(variances, directions):
    rng = np.random.default_rng(0)
    white = rng.standard_normal((500, 3))
    white = np.linalg.qr(white - white.mean(0))[0] * np.sqrt(500)  # covariance exactly one
    ones, units = jnp.ones((500, 1)), []
    for _ in range(10):
        rotation = stats.special_ortho_group.rvs(3, random_state=rng)
        means = white * np.sqrt(variances) @ rotation + rng.normal(size=3) * 3.0
        found = evaluation.diagnostics(evaluation.details(terms_of(ones, ones, means), ones, floor=0.0))
        assert found.active_directions == directions
        units.append(found.active_units)
    straight = evaluation.details(terms_of(ones, ones, white * np.sqrt(variances)), ones, floor=0.0)
    assert evaluation.diagnostics(straight).active_units == directions, "unrotated, they are the same"
    if 0 < directions < 3:
        assert max(units) > directions


@pytest.mark.parametrize("head", [likelihoods.learned_vector, likelihoods.optimal])
def test_floor_fraction_counts_sigmas_at_the_floor(head):
    vae, x = linear()[0]._replace(likelihood=likelihoods.discretised(head(1e-6, floor=0.3))), POINTS[:8]
    channels = jnp.array([0.0, -9.0]) if head is likelihoods.learned_vector else jnp.zeros(1)
    decoder = Network(vae.decoder.init, lambda params, z: jnp.tile(channels[: vae.likelihood.outputs], (len(z), 1, 1)))
    vae = vae._replace(decoder=decoder)
    found = evaluation.diagnostics(examined(vae, vae_lib.init(jax.random.key(0), vae), x)[1])
    assert found.floor_fraction == 1.0
    stddev = jnp.array([[0.3, 0.31, 0.32, 0.5]])
    details = evaluation.details(terms_of(0 * stddev, stddev), 0 * stddev, floor=0.3)
    np.testing.assert_allclose(details.at_floor, [0.5])
    details = evaluation.details(terms_of(0 * stddev, stddev), 0 * stddev, floor=0.0)
    np.testing.assert_array_equal(details.at_floor, [0.0])


HEALTHY = evaluation.Diagnostics(
    latent_kl=np.array([3.0, 0.1]),
    active_units=np.int64(1),
    active_directions=np.int64(1),
    floor_fraction=np.float64(0.05),
    sigma_factor=np.float64(1.05),
    residual_mean=np.float64(-0.09),
    residual_stddev=np.float64(1.05),
    coverage=np.array([0.54, 0.86, 0.99]),
)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, "calibrated"),
        ({"active_units": 0}, "posterior collapse: none of the latent dimensions, 2, is active"),
        ({"floor_fraction": 0.25}, "sigma at its floor in 25% of the dimensions"),
        ({"sigma_factor": 1.2}, "overconfident: 1.2 times its sigma would be optimal"),
        ({"sigma_factor": 0.5}, "underconfident: 0.5 times its sigma would be optimal"),
        ({"residual_mean": 0.2}, "biased: data lie +0.20 sigma from the mean on average"),
        ({"coverage": np.array([0.8, 0.91, 0.96])}, "residuals not Gaussian: the central 50% interval holds 80%"),
        ({"coverage": np.array([0.5, 0.9, 0.8])}, "residuals not Gaussian: the central 95% interval holds 80%"),
        (
            {"sigma_factor": 2.0, "coverage": np.array([0.2, 0.6, 0.7])},
            "overconfident: 2 times its sigma would be optimal",
        ),
        ({"sigma_factor": np.nan}, "diverged: a diagnostic is not finite"),
        ({"latent_kl": np.array([np.inf, 0.0])}, "diverged: a diagnostic is not finite"),
    ],
)
def test_diagnosis_names_what_is_wrong_in_one_line(change, words):
    changed = HEALTHY._replace(**{name: np.asarray(value) for name, value in change.items()})
    assert evaluation.diagnosis(changed) == words


def test_diagnosis_names_everything_that_is_wrong():
    changed = HEALTHY._replace(active_units=np.int64(0), sigma_factor=np.float64(0.1))
    assert evaluation.diagnosis(changed).split("; ") == [
        "posterior collapse: none of the latent dimensions, 2, is active",
        "underconfident: 0.1 times its sigma would be optimal",
    ]


def test_residuals_of_a_discretised_head_are_not_judged():
    changed = HEALTHY._replace(sigma_factor=np.float64(0.1), residual_mean=np.float64(0.5))
    assert evaluation.diagnosis(changed, discretised=True) == "calibrated"
    collapsed = evaluation.diagnosis(changed._replace(active_units=np.int64(0)), discretised=True)
    assert collapsed == "posterior collapse: none of the latent dimensions, 2, is active"


def test_a_decoder_that_ignores_z_is_diagnosed():
    vae, _ = linear()
    blind = Network(vae.encoder.init, lambda params, x: (jnp.zeros((len(x), 2)), jnp.zeros((len(x), 2))))
    vae = vae._replace(encoder=blind, decoder=Network(vae.decoder.init, lambda params, z: 0.0 * z[:, :1, None]))
    _, details = examined(vae, vae_lib.init(jax.random.key(0), vae))
    assert evaluation.diagnosis(evaluation.diagnostics(details)).startswith("posterior collapse")


# Rates in bits


def test_rate_of_mnist_knows_the_bound_of_its_codes():
    rate = evaluation.rate(5000.0, (28, 28, 1), kind="density")
    assert rate.bound == pytest.approx(4347.4, abs=0.05)
    assert rate.bits_per_dimension < 0.0, "more nats than any code could have"
    assert not rate.is_code
    assert rate.nats_per_dimension == pytest.approx(5000.0 / 784)
    at_bound = evaluation.rate(rate.bound, (28, 28, 1), kind="dequantised")
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
    discretised = evaluation.rate(-n * np.log(256.0), shape, kind="discretised")
    assert discretised.bits_per_dimension == pytest.approx(8.0)
    assert discretised.nats_per_dimension == pytest.approx(-np.log(256.0))
    assert discretised.bound == 0.0
    assert discretised.is_code
    for kind in ("density", "dequantised"):  # of the uniform density on [0, 1], 1
        assert evaluation.rate(0.0, shape, kind=kind).bits_per_dimension == pytest.approx(8.0)


@pytest.mark.parametrize("sigma", [0.02, 0.1, 0.5])
@pytest.mark.parametrize("k", [0, 100, 255])
def test_a_dequantised_rate_bounds_the_rate_of_the_mass_of_the_bin(sigma, k):
    p = stats.norm(100.5 / 256.0, sigma)
    u = (np.arange(2000) + 0.5) / 2000
    dequantised = evaluation.rate(p.logpdf((k + u) / 256.0).mean(), (1,), kind="dequantised")
    low, high = k / 256.0, (k + 1) / 256.0
    # Mass and logarithm on the side of the mean where nothing cancels.
    mass = p.cdf(high) - p.cdf(low) if k <= 100 else p.sf(low) - p.sf(high)
    exact = evaluation.rate(np.log(mass), (1,), kind="discretised")
    assert exact.bits_per_dimension <= dequantised.bits_per_dimension + 1e-9
    if sigma >= 0.1:
        assert dequantised.bits_per_dimension == pytest.approx(exact.bits_per_dimension, abs=0.02)


def test_rate_refuses_a_positive_log_probability_and_an_unknown_kind():
    with pytest.raises(ValueError, match="density"):
        evaluation.rate(0.1, (2,), kind="discretised")
    with pytest.raises(Exception, match="kind"):
        evaluation.rate(0.1, (2,), kind="bits")


# Images


def test_laplacian_energy_is_scipys_on_the_interior():
    images = np.random.default_rng(0).normal(size=(3, 7, 9, 2))
    expected = [np.mean([ndimage.laplace(image[..., c])[1:-1, 1:-1] ** 2 for c in range(2)]) for image in images]
    np.testing.assert_allclose(evaluation.laplacian_energy(jnp.float32(images)), expected, rtol=1e-5)


def test_laplacian_energy_grows_with_noise_and_frequency():
    rows, columns = np.meshgrid(np.arange(64.0), np.arange(64.0), indexing="ij")
    plane = jnp.float32(0.1 * rows - 0.2 * columns + 3.0)[None, :, :, None]
    np.testing.assert_allclose(evaluation.laplacian_energy(plane), 0.0, atol=1e-9)
    noise = jax.random.normal(jax.random.key(0), (50, 64, 64, 1))
    np.testing.assert_allclose(evaluation.laplacian_energy(0.1 * noise).mean(), 20.0 * 0.01, rtol=0.02)
    for frequency in (1, 4, 16):
        wave = np.cos(2.0 * np.pi * frequency * columns / 64)
        energy = (2.0 * np.cos(2.0 * np.pi * frequency / 64) - 2.0) ** 2 * np.mean(wave[:, 1:-1] ** 2)
        np.testing.assert_allclose(
            evaluation.laplacian_energy(jnp.float32(wave)[None, :, :, None]), [energy], rtol=1e-3
        )
    with pytest.raises(ValueError, match="3 x 3"):
        evaluation.laplacian_energy(jnp.zeros((1, 2, 9, 1)))


def test_sharpness_falls_with_blur_and_rises_with_noise():
    sharpness, rng = jax.jit(evaluation.sharpness), np.random.default_rng(0)
    originals = rng.uniform(size=(8, 16, 16, 1)).astype(np.float32)
    blurs = [ndimage.gaussian_filter(originals, (0, width, width, 0)) for width in (0.4, 0.8, 1.6)]
    ratios = [float(sharpness(images, originals)) for images in [originals, *blurs]]
    assert ratios[0] == 1.0
    assert all(more > 1.5 * less for more, less in itertools.pairwise(ratios))
    noisy = originals + np.std(originals) * rng.normal(size=originals.shape).astype(np.float32)
    # White noise on white noise of the same variance.
    np.testing.assert_allclose(sharpness(noisy, originals), 2.0, rtol=0.1)
    np.testing.assert_allclose(sharpness(0.5 * originals, originals), 0.25, rtol=1e-6)


@pytest.mark.parametrize("sigma", [0.01, 0.3])
def test_sample_noise_is_sigma_and_its_share_of_the_datas_stddev(sigma):
    rng = np.random.default_rng(0)
    means = jnp.float32(rng.uniform(size=(500, 6, 6, 1)))
    samples = likelihoods.fixed(sigma).sample(jax.random.key(0), likelihoods.fixed(sigma).init(), means[..., None])
    # The mean example has a variance over pixels, which does not count.
    data = jnp.float32(rng.normal(size=(2000, 6, 6, 1)) * 0.2 + rng.uniform(0.0, 5.0, (6, 6, 1))[None])
    noise = evaluation.sample_noise(samples, means, data)
    np.testing.assert_allclose(noise.rms, sigma, rtol=4.0 / np.sqrt(2.0 * means.size))
    np.testing.assert_allclose(noise.relative, sigma / 0.2, rtol=0.03)
    np.testing.assert_allclose(evaluation.sample_noise(means, means, data), (0.0, 0.0))


def staircase(heights, times, length=100, width=1.5):
    t = np.arange(length)
    return sum(h / (1.0 + np.exp(-(t - at) / width)) for h, at in zip(heights, times, strict=True))


def test_jumps_are_found_where_and_as_high_as_they_are():
    indices, rises = evaluation.jumps(staircase([1.0, 0.2, 0.5], [20, 50, 75]))
    np.testing.assert_allclose(indices, [20, 50, 75], atol=1)
    # Between the points where a logistic rises half as fast as at its middle: tanh(arccosh(sqrt 2)) of it.
    np.testing.assert_allclose(rises, np.array([1.0, 0.2, 0.5]) * np.sqrt(0.5), rtol=0.3)


@pytest.mark.parametrize(
    "values",
    [
        3.0 * (1.0 - np.exp(-np.arange(100) / 15.0)),  # a steep start is no jump: no plateau came before
        0.02 * np.arange(100.0),
        np.zeros(100),
        staircase([0.04, 0.04], [30, 70]),  # too low
        -staircase([1.0, 0.5], [30, 70]),  # falls
        np.zeros(3),
    ],
    ids=["relaxation", "line", "constant", "low", "falling", "short"],
)
def test_a_curve_without_jumps_has_none(values):
    indices, rises = evaluation.jumps(values)
    assert len(indices) == len(rises) == 0


def test_jumps_do_not_depend_on_where_the_curve_starts():
    values = staircase([0.3, 0.6], [40, 60])
    np.testing.assert_array_equal(evaluation.jumps(values)[0], evaluation.jumps(values + 1e3)[0])
    assert len(evaluation.jumps(values, least=0.5)[0]) < len(evaluation.jumps(values)[0]) == 2


@pytest.mark.parametrize("options", [{"least": 0.0}, {"ratio": 1.0}])
def test_jumps_refuse_impossible_thresholds(options):
    with pytest.raises(ValueError, match="least must be positive and ratio above 1"):
        evaluation.jumps(np.arange(9.0), **options)
