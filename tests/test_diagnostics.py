"""Diagnostics against closed forms and scipy, and the words for each of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from test_evaluation import POINTS, POSTERIOR_VARIANCE, SIGMA, examined, linear

from lvae_jax import diagnostics, likelihoods
from lvae_jax import vae as vae_lib
from lvae_jax.diagnostics import INTERVALS
from lvae_jax.networks import Decoder, Encoder


def test_kl_is_the_sum_of_its_latent_dimensions():
    scores, details = examined(*linear(shift=0.4, unused=2), POINTS[:23])
    assert details.latent_kl.shape == (3, 23)
    np.testing.assert_allclose(details.latent_kl.sum(0), scores.kl, rtol=1e-5)


def test_diagnostics_keep_the_axes_of_sweep_members():
    _, details = examined(*linear(shift=0.4, unused=2), POINTS[:23])
    other = jax.tree.map(lambda leaf: leaf[..., ::-1] * 0.1, details)
    stacked = diagnostics.summarise(jax.tree.map(lambda *leaves: np.stack(leaves), details, other))
    for member, alone in enumerate((details, other)):
        jax.tree.map(
            lambda a, b, member=member: np.testing.assert_allclose(a[member], b), stacked, diagnostics.summarise(alone)
        )
    assert stacked.latent_kl.shape == (2, 3)
    assert stacked.coverage.shape == (2, 3)


def test_diagnostics_of_the_exact_posterior_are_in_closed_form():
    scores, details = examined(*linear())
    found, n = diagnostics.summarise(details), len(POINTS)
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
    assert diagnostics.diagnosis(found) == "calibrated"


@pytest.mark.parametrize("factor", [0.4, 3.0])
def test_wrong_sigma_shows_in_sigma_factor_and_coverage(factor):
    scores, details = examined(*linear(SIGMA * factor))
    found, n = diagnostics.summarise(details), len(POINTS)
    np.testing.assert_allclose(
        found.sigma_factor, np.sqrt(scores.mse.mean(dtype=np.float64)) / (SIGMA * factor), rtol=1e-5
    )
    np.testing.assert_allclose(found.sigma_factor, 1.0 / factor, rtol=4.0 / np.sqrt(2.0 * n))
    expected = stats.norm.cdf(factor * stats.norm.ppf(0.5 + np.divide(INTERVALS, 2.0))) * 2.0 - 1.0
    np.testing.assert_allclose(found.coverage, expected, atol=4.0 * 0.5 / np.sqrt(n))


def terms_of(mean, stddev, posterior_mean=None, *, x=0.0):
    """Terms [B] with these moments of p(x|z)."""
    zeros = jnp.zeros(len(mean))
    latent = jnp.zeros((len(mean), 1)) if posterior_mean is None else jnp.array(posterior_mean, jnp.float32)
    residual = (x - mean) / stddev
    return vae_lib.Terms(zeros, zeros, mean, stddev, latent, jnp.zeros_like(latent), residual)


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (1.5, 0.3), (0.5, -1.0)])
def test_residuals_of_a_vector_of_sigmas_are_scipys(scale, shift):
    rng, shape = np.random.default_rng(0), (400, 5, 6, 1)
    mean, noise = rng.normal(size=(2, *shape)).astype(np.float32)
    stddev = rng.uniform(0.01, 3.0, shape).astype(np.float32)
    x = jnp.array(mean + stddev * (scale * noise + shift))
    details = diagnostics.details(terms_of(jnp.array(mean), jnp.array(stddev), x=x), floor=0.0)
    found, true, n = diagnostics.summarise(details), stats.norm(shift, scale), noise.size
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
    found = diagnostics.summarise(diagnostics.details(terms_of(ones, ones, means), floor=0.0))
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
        found = diagnostics.summarise(diagnostics.details(terms_of(ones, ones, means), floor=0.0))
        assert found.active_directions == directions
        units.append(found.active_units)
    straight = diagnostics.details(terms_of(ones, ones, white * np.sqrt(variances)), floor=0.0)
    assert diagnostics.summarise(straight).active_units == directions, "unrotated, they are the same"
    if 0 < directions < 3:
        assert max(units) > directions


@pytest.mark.parametrize("head", [likelihoods.learned_vector, likelihoods.optimal])
def test_floor_fraction_counts_sigmas_at_the_floor(head):
    vae, x = linear()[0]._replace(likelihood=likelihoods.discretised(head(1e-6, floor=0.3))), POINTS[:8]
    channels = jnp.array([0.0, -9.0]) if head is likelihoods.learned_vector else jnp.zeros(1)
    decoder = Decoder(vae.decoder.init, lambda params, z: jnp.tile(channels[: vae.likelihood.outputs], (len(z), 1, 1)))
    vae = vae._replace(decoder=decoder)
    found = diagnostics.summarise(examined(vae, vae_lib.init(jax.random.key(0), vae), x)[1])
    assert found.floor_fraction == 1.0
    stddev = jnp.array([[0.3, 0.31, 0.32, 0.5]])
    details = diagnostics.details(terms_of(0 * stddev, stddev), floor=0.3)
    np.testing.assert_allclose(details.at_floor, [0.5])
    details = diagnostics.details(terms_of(0 * stddev, stddev), floor=0.0)
    np.testing.assert_array_equal(details.at_floor, [0.0])


HEALTHY = diagnostics.Diagnostics(
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
    assert diagnostics.diagnosis(changed) == words


def test_diagnosis_names_everything_that_is_wrong():
    changed = HEALTHY._replace(active_units=np.int64(0), sigma_factor=np.float64(0.1))
    assert diagnostics.diagnosis(changed).split("; ") == [
        "posterior collapse: none of the latent dimensions, 2, is active",
        "underconfident: 0.1 times its sigma would be optimal",
    ]


def test_residuals_of_a_discretised_head_are_not_judged():
    changed = HEALTHY._replace(sigma_factor=np.float64(0.1), residual_mean=np.float64(0.5))
    assert diagnostics.diagnosis(changed, discretised=True) == "calibrated"
    collapsed = diagnostics.diagnosis(changed._replace(active_units=np.int64(0)), discretised=True)
    assert collapsed == "posterior collapse: none of the latent dimensions, 2, is active"


def test_tangents_may_have_taken_the_place_of_z():
    collapsed = HEALTHY._replace(active_units=np.int64(0))
    collapse = "posterior collapse: none of the latent dimensions, 2, is active"
    assert diagnostics.diagnosis(collapsed, tangents=True) == f"{collapse}, whose place the tangents may have taken"
    assert diagnostics.diagnosis(HEALTHY, tangents=True) == "calibrated"


def test_decoder_that_ignores_z_is_diagnosed():
    vae, _ = linear()
    blind = Encoder(vae.encoder.init, lambda params, x: (jnp.zeros((len(x), 2)), jnp.zeros((len(x), 2))))
    vae = vae._replace(encoder=blind, decoder=Decoder(vae.decoder.init, lambda params, z: 0.0 * z[:, :1, None]))
    _, details = examined(vae, vae_lib.init(jax.random.key(0), vae))
    assert diagnostics.diagnosis(diagnostics.summarise(details)).startswith("posterior collapse")


def test_one_example_alone_is_no_collapse():
    """Its posterior mean has no variance, whatever the model."""
    terms = vae_lib.Terms(*(jnp.ones((1,)),) * 2, *(jnp.ones((1, 2)),) * 5)
    details = diagnostics.details(terms, floor=0.0)
    with pytest.raises(ValueError, match="need at least 2 examples, got 1"):
        diagnostics.summarise(details)
