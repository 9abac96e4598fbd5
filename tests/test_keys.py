"""Keys of examples, and the noise of examples whatever JAX's default generator is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lvae_jax as lv
from lvae_jax import datasets, evaluation, toy, training
from lvae_jax.keys import as_threefry, example_keys, of_seed

KEY = jax.random.key(0)


@pytest.fixture(params=["threefry2x32", "rbg", "unsafe_rbg"])
def generator(request):
    with jax.default_prng_impl(request.param):
        yield request.param


def test_example_keys_depend_on_the_key_and_the_global_index_alone():
    def data(key, index):
        return np.array(jax.random.key_data(example_keys(key, index)))

    index = jnp.arange(1_000)
    everything = data(KEY, index)
    assert len(np.unique(everything, axis=0)) == len(index)
    picked = jnp.array([3, 999, 3, 0])
    np.testing.assert_array_equal(data(KEY, picked), everything[picked])
    assert not np.any(np.all(data(jax.random.key(1), index) == everything, axis=-1))


def test_keys_of_every_generator_serve(generator):
    key = jax.random.key(3)
    assert str(jax.random.key_impl(key)) == generator
    np.testing.assert_array_equal(jax.random.key_data(as_threefry(key)), jax.random.key_data(of_seed(3)))
    together = jax.random.key_data(example_keys(key, jnp.arange(8)))
    np.testing.assert_array_equal(jax.random.key_data(example_keys(key, jnp.array([5])))[0], together[5])
    with jax.default_prng_impl("threefry2x32"):
        of_threefry = example_keys(jax.random.key(3), jnp.arange(8))
    np.testing.assert_array_equal(together, jax.random.key_data(of_threefry))


def test_noise_belongs_to_the_example(generator):
    vae = lv.mlp_vae((2,), lv.fixed(0.1), latent_size=2, width=4, num_blocks=1)
    params = lv.init(of_seed(0), vae)
    x = np.random.default_rng(0).normal(size=(12, 2)).astype(np.float32)

    @jax.jit
    def examine(x, index):
        return evaluation.examine(jax.random.key(2), vae, params, x, index)[0].elbo

    whole = evaluation.over_split(examine, x)
    np.testing.assert_allclose(evaluation.over_split(examine, x, chunk_size=5), whole, rtol=2e-6)
    keys, x = jax.random.split(jax.random.key(3), 12), jnp.asarray(x)
    for bound in (lambda *given: lv.elbo(*given).elbo, lambda *given: lv.importance_bound(*given, num_samples=2)):
        together, alone = bound(keys, vae, params, x), bound(keys[7:8], vae, params, x[7:8])
        np.testing.assert_allclose(alone, together[7:8], rtol=2e-6)
    np.testing.assert_array_equal(toy.sample(keys[7:8]), toy.sample(keys)[7:8])
    k = np.full((12, 3), 4, np.uint8)
    np.testing.assert_array_equal(datasets.dequantize(keys[7:8], k[:1]), datasets.dequantize(keys, k)[7:8])


def test_members_of_one_seed_see_the_same(generator):
    stream, optimizer = datasets.toy_stream(), lv.optimizer(10)

    def losses(*seeds):
        seeds, sigmas = jnp.array(seeds), jnp.full(len(seeds), 0.1)

        def make_vae(sigma):
            return lv.mlp_vae((2,), lv.fixed(sigma), latent_size=2, width=4, num_blocks=1)

        states = training.members_init(seeds, sigmas, make_vae, optimizer)
        indices = jnp.broadcast_to(jnp.arange(6), (2, len(seeds), 6))
        options = {"make_vae": make_vae, "optimizer": optimizer, "batch": stream.batch}
        return np.asarray(training.members_steps(seeds, sigmas, states, None, indices, **options)[1].scores.elbo)

    together = losses(0, 0, 1)
    np.testing.assert_array_equal(together[:, 0], together[:, 1])
    np.testing.assert_allclose(losses(1)[:, 0], together[:, 2], rtol=1e-5)
    with jax.default_prng_impl("threefry2x32"):
        np.testing.assert_array_equal(losses(0, 0, 1), together)
