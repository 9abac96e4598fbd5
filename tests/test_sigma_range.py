"""One model for a range of sigma: conditioned networks, the posterior that is told sigma, and the optimum of linear
models at every sigma."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lvae_jax import gaussians, likelihoods, networks, theory, training, vae
from lvae_jax.keys import example_keys
from lvae_jax.networks import Decoder, Encoder
from lvae_jax.sigma_range import SigmaRange

RANGE = SigmaRange(0.1, 3.0)
SMALL = {"width": 8, "num_blocks": 1}
CODERS = {
    "mlp_encoder": (lambda **options: networks.mlp_encoder((3,), 2, **SMALL, **options), (5, 3)),
    "mlp_decoder": (lambda **options: networks.mlp_decoder((3,), 1, 2, **SMALL, **options), (5, 2)),
    "conv_encoder": (
        lambda **options: networks.conv_encoder((8, 8, 1), 2, widths=(4, 6), num_blocks=1, **options),
        (5, 8, 8, 1),
    ),
    "conv_decoder": (
        lambda **options: networks.conv_decoder((8, 8, 1), 1, 2, widths=(4, 6), num_blocks=1, **options),
        (5, 2),
    ),
}


@pytest.mark.parametrize("name", CODERS)
def test_gates_start_open(name):
    """A conditioned network starts with the weights of the plain one, and gives the same to the bit."""
    make, shape = CODERS[name]
    plain, conditioned, key = make(), make(condition_size=2), jax.random.key(0)
    x = jax.random.normal(jax.random.key(1), shape)
    condition = jax.random.normal(jax.random.key(2), (5, 2))
    expected = plain.apply(plain.init(key), x)
    found = conditioned.apply(conditioned.init(key), x, condition)
    if name.endswith("encoder"):  # its log stddev has wider limits
        expected, found = expected[0], found[0]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", CODERS)
def test_networks_follow_their_condition(name):
    """One condition for all is that of each; another one changes the result once gates have moved."""
    make, shape = CODERS[name]
    network = make(condition_size=1)
    params = jax.tree.map(lambda leaf: leaf + 0.1, network.init(jax.random.key(0)))
    x = jax.random.normal(jax.random.key(1), shape)
    for_all, for_each = (network.apply(params, x, jnp.full((size, 1), 0.5)) for size in (1, 5))
    jax.tree.map(np.testing.assert_array_equal, for_all, for_each)
    other = network.apply(params, x, jnp.full((1, 1), -0.5))
    assert all(
        np.abs(a - b).max() > 1e-3 for a, b in zip(jax.tree.leaves(for_all), jax.tree.leaves(other), strict=True)
    )


@pytest.mark.parametrize("name", CODERS)
def test_condition_of_another_size_is_refused(name):
    make, shape = CODERS[name]
    plain, conditioned = make(), make(condition_size=1)
    with pytest.raises(ValueError, match="a condition of 1 numbers, not 0"):
        conditioned.apply(conditioned.init(jax.random.key(0)), jnp.zeros(shape))
    with pytest.raises(ValueError, match="a condition of 0 numbers, not 1"):
        plain.apply(plain.init(jax.random.key(0)), jnp.zeros(shape), jnp.zeros((1, 1)))


def test_root_gate_closes_without_nan():
    """Beyond logits of log 2 the root is closed: its value and its gradient are 0, not NaN."""
    logits = jnp.array([-20.0, 0.0, 0.5, 0.69, 0.694, 1.0, 50.0])
    value, slope = jax.vmap(jax.value_and_grad(networks._root_gate))(logits)
    square = 2.0 - np.exp(np.asarray(logits, np.float64))
    expected = np.sqrt(np.where(square > 1e-4, square, 0.0))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(slope[:3], -np.exp(logits[:3]) / (2.0 * expected[:3]), rtol=1e-5)
    assert np.isfinite(slope).all()
    assert not slope[4:].any()


def tiny():
    return vae.mlp_vae((3,), likelihoods.fixed(0.5), latent_size=2, sigma_range=RANGE, **SMALL)


def test_head_tells_the_networks_its_sigma():
    """The ELBO of a batch with one sigma for each example is that of each example by itself."""
    model, x = tiny(), jax.random.normal(jax.random.key(1), (4, 3))
    params = jax.tree.map(lambda leaf: leaf + 0.1, vae.init(jax.random.key(0), model))
    sigmas, keys = jnp.array([0.05, 0.3, 1.0, 2.0]), jax.random.split(jax.random.key(2), 4)
    together = vae.elbo(keys, *vae.with_likelihood(model, params, likelihoods.fixed(sigmas)), x)
    for index, sigma in enumerate(sigmas):
        part = slice(index, index + 1)
        alone = vae.elbo(keys[part], *vae.with_likelihood(model, params, likelihoods.fixed(sigma)), x[part])
        np.testing.assert_allclose(together.elbo[part], alone.elbo, rtol=1e-5)
        np.testing.assert_allclose(together.stddev[part], sigma, rtol=1e-6)
        other = vae.elbo(keys[part], *vae.with_likelihood(model, params, likelihoods.fixed(0.7)), x[part])
        assert np.abs(other.mean - alone.mean).max() > 1e-3


@pytest.mark.parametrize("sigma", [0.05 / 1.5, 0.05, 2.0, 3.0])
def test_gradients_are_finite_at_the_ends(sigma):
    model, x = tiny(), jax.random.normal(jax.random.key(1), (4, 3))
    params = jax.tree.map(lambda leaf: leaf + 0.3, vae.init(jax.random.key(0), model))
    model, params = vae.with_likelihood(model, params, likelihoods.fixed(sigma))
    keys = jax.random.split(jax.random.key(2), 4)
    gradients = jax.grad(lambda params: vae.elbo(keys, model, params, x).elbo.mean())(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


def test_posterior_is_the_product_of_its_two_parts():
    """N(z; 0, 1) N(z; t, s^2) normalised on a grid, s in proportion to sigma."""
    z = np.linspace(-12.0, 12.0, 20001)
    for t, log_stddev, sigma in [(1.5, -1.0, 2.0), (-0.7, -3.0, 0.4), (2.0, 0.5, 0.05), (1.0, 4.0, 2.0)]:
        s = np.exp(log_stddev) * sigma / RANGE.high
        log_density = -0.5 * z**2 - 0.5 * ((z - t) / s) ** 2
        density = np.exp(log_density - log_density.max())
        density /= density.sum()
        mean = (density * z).sum()
        variance = (density * (z - mean) ** 2).sum()
        found = RANGE.posterior(jnp.full((1, 1), t), jnp.full((1, 1), log_stddev), jnp.log(sigma))
        np.testing.assert_allclose(found[0], mean, rtol=1e-4)
        np.testing.assert_allclose(found[1], 0.5 * np.log(variance), rtol=1e-3, atol=1e-4)


def test_draws_cover_the_range_evenly():
    """Whatever the number of examples, no part of the range is left out; another key gives other draws."""
    low, high = np.log(RANGE.low / 1.5), np.log(RANGE.high * 1.5)
    for size in (10, 100, 1000):
        draws = np.sort(RANGE.draw(jax.random.key(size), jnp.arange(size)))
        assert low <= draws[0]
        assert draws[-1] <= high
        assert np.diff([low, *draws, high]).max() < 3.0 * (high - low) / size
    first, other = (RANGE.draw(jax.random.key(seed), jnp.arange(10)) for seed in (0, 1))
    assert np.abs(first - other).min() > 0.0
    np.testing.assert_array_equal(RANGE.draw(jax.random.key(0), jnp.arange(5, 10)), first[5:])


def test_each_example_is_taken_at_sigmas_of_its_own():
    """A step's gradient is that of the weighted mean over examples, each at two sigmas with two draws of z."""
    model, x = tiny(), jax.random.normal(jax.random.key(1), (4, 3))
    seen = []

    def draw(self, key, index):
        seen.append(index)
        return jnp.log(jnp.linspace(0.1, 1.0, len(index)))

    class Told(SigmaRange):
        pass

    Told.draw = draw
    model = model._replace(sigma_range=Told(*RANGE))
    optimizer = optax.sgd(1.0)
    state = training.init_state(jax.random.key(0), model, optimizer)
    key, index = jax.random.key(2), jnp.array([2, 3, 4, 5])
    found, _ = training.train_step(key, model, optimizer, state, x, index)
    np.testing.assert_array_equal(seen[0], [4, 5, 6, 7, 8, 9, 10, 11])

    def loss(params):
        sigmas = jnp.linspace(0.1, 1.0, 8)
        keys = example_keys(jax.random.split(key)[1], jnp.arange(4, 12))
        terms = vae.elbo(keys, *vae.with_likelihood(model, params, likelihoods.fixed(sigmas)), jnp.repeat(x, 2, axis=0))
        return -jnp.mean(sigmas / RANGE.high * terms.elbo)

    expected = jax.tree.map(lambda p, g: p - g, state.params, jax.grad(loss)(state.params))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), found.params, expected)


@pytest.mark.parametrize("limits", [(0.0, 1.0), (1.0, 1.0), (2.0, 1.0), (0.1, np.inf)])
def test_no_range(limits):
    with pytest.raises(ValueError, match="a range of sigma needs 0 < low < high"):
        vae.mlp_vae((2,), likelihoods.fixed(), latent_size=1, sigma_range=SigmaRange(*limits))


STDDEVS = np.array([2.0, 1.0, 0.7, 0.5, 0.3, 0.3, 0.2, 0.1, 0.1, 0.02])
AXES = np.linalg.qr(np.random.default_rng(0).normal(size=(10, 10)))[0].astype(np.float32)
LATENTS = 5
SIGMAS = np.geomspace(RANGE.low, RANGE.high, 20)


def linear_vae():
    """A linear encoder and a linear decoder, with gates on z alone: the form that `networks` calls exact."""

    def width(params, condition):
        return networks._root_gate(condition * params["slope"] + params["start"]) + 1e-3

    def gates():
        return {"slope": jnp.zeros((1, LATENTS)), "start": jnp.zeros((1, LATENTS))}

    def init_encoder(key):
        return {"weight": 0.1 * jax.random.normal(key, (10, LATENTS)), "log_stddev": jnp.zeros((1, LATENTS))} | gates()

    def encode(params, x, condition):
        width_of_z = width(params, condition)
        log_stddev = params["log_stddev"] - jnp.log(width_of_z)
        return x @ params["weight"] / width_of_z, jnp.broadcast_to(log_stddev, (len(x), LATENTS))

    def init_decoder(key):
        return {"weight": 0.1 * jax.random.normal(key, (LATENTS, 10))} | gates()

    def decode(params, z, condition):
        return ((z * width(params, condition)) @ params["weight"])[..., None]

    encoder, decoder = Encoder(init_encoder, encode), Decoder(init_decoder, decode)
    return vae.VAE(encoder, decoder, likelihoods.fixed(1.0), LATENTS, sigma_range=RANGE)


def shortfall(model, params):
    """What the model lacks to the best linear ELBO at each of `SIGMAS`, in nats, in expectation over x and z: x has the
    covariance of the data exactly, and z, which acts linearly, is integrated out."""
    x = np.random.default_rng(1).normal(size=(2000, 10))
    x = (x - x.mean(axis=0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T, bias=True))).T * STDDEVS @ AXES.T
    x = jnp.asarray(x, jnp.float32)

    @jax.jit
    def elbo(sigma):
        told = vae.with_likelihood(model, params, likelihoods.fixed(sigma))
        mean, log_stddev = vae.encode(*told, x)
        columns = vae.decode(*told, jnp.eye(LATENTS))[..., 0]
        residual = x - vae.decode(*told, mean)[..., 0]
        square = jnp.sum(residual**2, axis=-1) + jnp.exp(2.0 * log_stddev) @ jnp.sum(columns**2, axis=-1)
        log_likelihood = -0.5 * square / sigma**2 - 10.0 * (jnp.log(sigma) + 0.5 * np.log(2.0 * np.pi))
        return jnp.mean(log_likelihood - jnp.sum(gaussians.kl_to_standard(mean, log_stddev), axis=-1))

    best = theory.linear_best_elbo(SIGMAS, STDDEVS, num_dimensions=10, latent_size=LATENTS)
    return best - np.array([elbo(sigma) for sigma in SIGMAS])


def test_gates_hold_the_linear_optimum_at_every_sigma():
    """In closed form, without any training: the decoder's weight is sqrt(relu(l - sigma^2)) for the variance l."""
    variances = STDDEVS[:LATENTS] ** 2
    gates = {
        "slope": jnp.ones((1, LATENTS)),
        "start": jnp.asarray(np.log(2.0 * RANGE.low * RANGE.high / variances))[None],
    }
    gates = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), gates)
    size = np.sqrt(0.5 * variances).astype(np.float32)  # of the weight where the gate is 1
    encoder = {
        "weight": jnp.asarray(AXES[:, :LATENTS] / size),
        "log_stddev": jnp.asarray(np.log(RANGE.high / size))[None],
    }
    decoder = {"weight": jnp.asarray((AXES[:, :LATENTS] * size).T)}
    params = {"encoder": encoder | gates, "decoder": decoder | gates, "likelihood": {}}
    np.testing.assert_allclose(shortfall(linear_vae(), params), 0.0, atol=1e-4)


def test_one_run_comes_to_the_linear_optimum_at_every_sigma():
    """At twenty sigmas, 0.02 nats from what a model for each of them could reach."""
    model, num_steps = linear_vae(), 10_000
    optimizer = training.optimizer(num_steps, learning_rate=2e-2)
    state = training.init_state(jax.random.key(0), model, optimizer, ema_decay=0.999)

    @jax.jit
    def run(state):
        draws = jax.random.normal(jax.random.key(1), (num_steps, 100, 10))
        x = draws * jnp.asarray(STDDEVS, jnp.float32)[None, None] @ AXES.T
        return training.train_steps(jax.random.key(2), model, optimizer, state, x, ema_decay=0.999)[0]

    found = shortfall(model, run(state).weights)
    assert np.abs(found).max() <= 0.02, found
