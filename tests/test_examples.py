"""Every example runs at a small size, and does what it says."""

import csv
import io
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.stats

import lvae_jax as lv
from examples import bring_your_own, sigma_gradients, vmapped_sweep
from lvae_jax import theory, toy

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def limits():
    """Of the mean ELBO on the toy in nats: of any Gaussian that ignores z, and of any model."""
    stddevs = theory.principal_stddevs([np.asarray(toy.sample(jax.random.split(jax.random.key(5), 20_000)))])
    sigma = np.sqrt(np.mean(stddevs**2))
    collapsed = theory.linear_best_elbo(sigma, stddevs, num_dimensions=2, latent_size=0)
    return float(collapsed), -toy.entropy()


def test_equinox_vae_learns_the_toy_and_its_sigma(limits):
    equinox_vae = pytest.importorskip("examples.equinox_vae", reason="needs equinox")
    elbo, sigma = equinox_vae.main(num_steps=300, num_test=2000)
    assert limits[0] + 0.5 < elbo < limits[1] + 0.1
    assert 0.05 < sigma < 0.8, "the head's parameter has moved from 1 with the networks"


def test_haiku_networks_in_the_vae(limits):
    haiku_vae = pytest.importorskip("examples.haiku_vae", reason="needs dm-haiku")
    scores = haiku_vae.main(num_steps=300, num_test=2000)
    assert limits[0] + 0.5 < scores.elbo < limits[1] + 0.1
    assert scores.sigma_max > 1.05 * scores.sigma_min, "the second output of the decoder is in use"


@pytest.fixture
def numpyro_vae():
    with jax.numpy_rank_promotion("allow"):  # NumPyro broadcasts ranks
        yield pytest.importorskip("examples.numpyro_vae", reason="needs numpyro")


class TestNumPyro:
    def test_svi_learns_the_toy_and_means_the_library_s_elbo(self, numpyro_vae, limits):
        params, elbo, draws = numpyro_vae.main(num_steps=300, num_test=5000)
        assert limits[0] + 0.5 < elbo < limits[1] + 0.1
        x = toy.sample(jax.random.split(jax.random.key(2), 5000))
        ours = lv.elbo(jax.random.split(jax.random.key(9), 5000), numpyro_vae.VAE, params, x).elbo
        assert abs(elbo - ours.mean()) < 5.0 * np.sqrt(2.0 / 5000) * ours.std(), "other noise, the same expectation"
        stddevs = np.std(np.asarray(x), axis=0)
        np.testing.assert_allclose(np.std(np.asarray(draws), axis=0), stddevs, atol=0.5)

    @pytest.mark.parametrize("head", [lv.learned_scalar(0.3), lv.learned_vector(0.3, gain=1.0)], ids=["ls", "lv"])
    def test_a_head_is_a_distribution(self, numpyro_vae, head):
        outputs = np.asarray(jax.random.normal(jax.random.key(0), (4, 3, 2, head.outputs)))
        observation = numpyro_vae.Observation(head, head.init(), jnp.asarray(outputs))
        stddev = 0.3 * np.exp(outputs[..., 1]) if head.outputs == 2 else 0.3
        x = jax.random.normal(jax.random.key(1), (4, 3, 2))
        expected = scipy.stats.norm.logpdf(x, outputs[..., 0], stddev).sum(axis=(1, 2))
        np.testing.assert_allclose(observation.log_prob(x), expected, rtol=1e-5)
        draws = observation.sample(jax.random.key(2), (50, 40))
        assert draws.shape == (50, 40, 4, 3, 2)
        standardised = (np.asarray(draws) - outputs[..., 0]) / stddev
        assert scipy.stats.kstest(standardised.ravel(), "norm").pvalue > 1e-4


@pytest.fixture
def numpyro_prior():
    with jax.numpy_rank_promotion("allow"):
        yield pytest.importorskip("examples.numpyro_prior", reason="needs numpyro")


def test_numpyro_flow_as_a_prior(numpyro_prior, limits):
    vae, params, elbo = numpyro_prior.main(num_steps=200, num_test=2000)
    assert limits[0] + 0.2 < elbo < limits[1] + 0.1
    side = jnp.linspace(-8.0, 8.0, 161)
    z = jnp.stack(jnp.meshgrid(side, side), axis=-1).reshape(-1, 2)
    assert jnp.exp(vae.prior.log_prob(params["prior"], z)).sum() * 0.1**2 == pytest.approx(1.0, abs=2e-3)
    draws = vae.prior.sample(jax.random.key(0), params["prior"], (4000, 2))
    mean = (jnp.exp(vae.prior.log_prob(params["prior"], z))[:, None] * z).sum(axis=0) * 0.1**2
    np.testing.assert_allclose(draws.mean(axis=0), mean, atol=0.08)


def test_own_parts_train_in_an_own_loop():
    file = io.StringIO()
    *_, scores = bring_your_own.main(num_steps=500, file=file)
    test, sigma = bring_your_own.data(10_000, 1), 0.1 + 0.4 * np.exp(-5.0)
    collapsed = scipy.stats.laplace.logpdf(test, np.median(test, axis=0), sigma / np.sqrt(2.0)).sum(axis=1).mean()
    free = [scipy.stats.laplace.fit(column) for column in test.T]
    best = sum(scipy.stats.laplace.logpdf(column, *fit).mean() for column, fit in zip(test.T, free, strict=True))
    assert collapsed < best < scores.elbo, "above any Laplace distribution that ignores z"
    rows = list(csv.DictReader(file.getvalue().splitlines()))
    assert [int(row["step"]) for row in rows] == list(range(50, 501, 50))
    sigmas = [0.1 + 0.4 * np.exp(-5.0 * (int(row["step"]) - 1) / 500) for row in rows]  # in force before the step
    np.testing.assert_allclose([float(row["sigma"]) for row in rows], sigmas, atol=1e-4)


def test_own_head_is_the_laplace_distribution():
    head = bring_your_own.laplace(lambda step: 0.2 + 0.1 * step)
    params = head.update(head.init(), jnp.int32(3), jnp.float32(1.0))
    outputs, x = jax.random.normal(jax.random.key(0), (5, 2, 1)), jax.random.normal(jax.random.key(1), (5, 2))
    expected = scipy.stats.laplace.logpdf(x, outputs[..., 0], 0.5 / np.sqrt(2.0)).sum(axis=1)
    np.testing.assert_allclose(head.log_prob(params, outputs, x), expected, rtol=1e-5)
    np.testing.assert_allclose(head.stddev(params, outputs), np.full((5, 2), 0.5), rtol=1e-6)
    draws = head.sample(jax.random.key(2), params, jnp.zeros((5000, 2, 1)))
    assert scipy.stats.kstest(np.ravel(draws), "laplace", (0.0, 0.5 / np.sqrt(2.0))).pvalue > 1e-4


def test_gradients_by_sigma():
    sigmas = (0.2, 0.3, 0.5)
    radius, elbo, slope, scores = sigma_gradients.main(sigmas)

    def best_radius(sigma):  # for n = 3, A_n(k) = coth k - 1/k
        def excess(rho):
            return 1.0 / np.tanh(rho / sigma**2) - sigma**2 / rho - rho

        return scipy.optimize.brentq(excess, 0.05, 1.0, xtol=1e-14)

    def best_elbo(sigma):
        rho = best_radius(sigma)
        k = rho / sigma**2
        log_mean_exp = k + np.log(-np.expm1(-2.0 * k) / (2.0 * k))
        return log_mean_exp - (1.0 + rho**2) / (2.0 * sigma**2) - 1.5 * np.log(2.0 * np.pi * sigma**2)

    for function, gradient in ((best_radius, radius), (best_elbo, elbo)):
        expected = [(function(sigma + 1e-5) - function(sigma - 1e-5)) / 2e-5 for sigma in sigmas]
        np.testing.assert_allclose(gradient, expected, rtol=1e-4)
    np.testing.assert_allclose(slope, 2.0 * (scores.mse / scores.sigma_mean**2 - 1.0), rtol=1e-4)


def test_vmapped_sweep_obeys_theorem_1():
    sigmas, scores = vmapped_sweep.main(num_steps=400, ratios=(0.4, 1.2))
    best = theory.best_elbo(sigmas, dim=3)
    variance = sigmas**2
    collapsed = -1.5 * np.log(2.0 * np.pi * variance) - 1.0 / (2.0 * variance)
    assert np.all(scores.elbo < best + 0.05)
    assert scores.elbo[0] > collapsed[0] + 0.5 * (best[0] - collapsed[0])
    assert scores.kl[0] > 1.0
    assert scores.kl[1] < 0.02


def test_member_of_the_vmapped_sweep_is_a_run_of_its_own():
    sigmas, swept = vmapped_sweep.main(num_steps=5, ratios=(0.3, 0.9))
    train = jax.jit(vmapped_sweep.train, static_argnums=1)
    for member, sigma in enumerate(sigmas):
        for ours, alone in zip(swept, train(sigma, 5), strict=True):
            np.testing.assert_allclose(ours[member], alone, rtol=2e-4)


def test_sharded_batch_trains_to_the_same_numbers():
    code = "from examples import sharded_batch; import jax; print(jax.device_count(), sharded_batch.main(num_steps=10))"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    devices, difference = done.stdout.split()
    assert int(devices) == 4
    assert float(difference) < 1e-3
