"""Held-out scores: every example once, whatever the chunks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvae_jax import evaluation, likelihoods, networks, toy
from lvae_jax import vae as vae_lib

SIZE = 23


@pytest.fixture(scope="module")
def score():
    head = likelihoods.learned_vector()
    decoder = networks.mlp_decoder((2,), head.outputs, 2, width=8, num_blocks=1)
    vae = vae_lib.VAE(networks.mlp_encoder((2,), 2, width=8, num_blocks=1), decoder, head, 2)
    params = vae_lib.init(jax.random.key(0), vae)
    return jax.jit(lambda x, index: evaluation.score(jax.random.key(1), vae, params, x, index))


@pytest.fixture(scope="module")
def examples():
    return np.asarray(toy.sample(jax.random.split(jax.random.key(2), SIZE)))


@pytest.mark.parametrize("chunk_size", [1, 5, 22, 23, 24, 1000])
def test_chunks_do_not_change_the_scores(score, examples, chunk_size):
    whole = score(examples, jnp.arange(SIZE))
    chunked = evaluation.over_split(score, examples, chunk_size=chunk_size)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), chunked, whole)


def test_chunks_have_one_shape_and_the_fill_is_dropped(examples):
    shapes = []

    def sums(x, index):
        shapes.append(x.shape)
        return vae_lib.Scores(*7 * [np.stack([x[:, 0], index])])  # [2, B]: the last axis is the examples'

    scores = evaluation.over_split(sums, examples, chunk_size=5)
    assert shapes == [(5, 2)] * 5
    np.testing.assert_array_equal(scores.elbo, [examples[:, 0], np.arange(SIZE)])


def test_draws_belong_to_the_example_s_index(score, examples):
    repeated = np.repeat(examples[:1], 2, axis=0)
    same, other = score(repeated, jnp.array([4, 4])), score(repeated, jnp.array([4, 5]))
    np.testing.assert_array_equal(same.elbo[0], same.elbo[1])
    assert other.elbo[0] != other.elbo[1]


def test_the_paper_s_convention_drops_the_constant_of_a_standard_gaussian():
    # At x = mean and sigma = 1 the paper's log p(x|z) is 0; the density's is that of n standard Gaussians at 0.
    assert evaluation.paper_elbo(784 * -0.9189385332, (28, 28, 1)) == pytest.approx(0.0, abs=1e-5)
