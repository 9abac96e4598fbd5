"""Encoders and decoders: mirrored shapes for any size, a start near the prior, and gradients for every parameter."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvae_jax import networks

PAIRS = [
    ("mlp", networks.mlp_encoder, networks.mlp_decoder, (2,), {"width": 16, "num_blocks": 2}),
    ("mlp on images", networks.mlp_encoder, networks.mlp_decoder, (4, 3, 1), {"width": 16, "num_blocks": 1}),
    ("conv-28", networks.conv_encoder, networks.conv_decoder, (28, 28, 1), {"widths": (4, 4, 8), "num_blocks": 1}),
    ("conv-odd", networks.conv_encoder, networks.conv_decoder, (13, 9, 3), {"widths": (4, 8), "num_blocks": 1}),
]
pairs = pytest.mark.parametrize(
    ("encoder", "decoder", "shape", "options"), [pair[1:] for pair in PAIRS], ids=[pair[0] for pair in PAIRS]
)


@pairs
@pytest.mark.parametrize("outputs", [1, 2])
def test_a_pair_starts_near_the_prior_and_near_zero(encoder, decoder, shape, options, outputs):
    encoder, decoder = encoder(shape, 5, **options), decoder(shape, outputs, 5, **options)
    x = jax.random.uniform(jax.random.key(0), (3, *shape))
    mean, log_stddev = encoder.apply(encoder.init(jax.random.key(1)), x)
    assert mean.shape == log_stddev.shape == (3, 5)
    assert jnp.abs(mean).max() < 1.0
    assert jnp.abs(log_stddev).max() < 1.0
    y = decoder.apply(decoder.init(jax.random.key(2)), mean)
    assert y.shape == (3, *shape, outputs)
    assert jnp.abs(y).max() < 1.0


@pairs
def test_every_parameter_gets_a_gradient_and_every_output_depends_on_z(encoder, decoder, shape, options):
    encoder, decoder = encoder(shape, 3, **options), decoder(shape, 2, 3, **options)
    params = {"encoder": encoder.init(jax.random.key(0)), "decoder": decoder.init(jax.random.key(1))}
    x = jax.random.uniform(jax.random.key(2), (4, *shape))
    weights = jax.random.normal(jax.random.key(3), (4, *shape, 2))

    def loss(params):
        mean, log_stddev = encoder.apply(params["encoder"], x)
        return jnp.sum(weights * decoder.apply(params["decoder"], mean + jnp.exp(log_stddev))) + jnp.sum(
            log_stddev * mean
        )

    gradients = jax.grad(loss)(params)
    dead = [
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradients)
        if not jnp.any(leaf != 0)
    ]
    assert not dead
    jacobian = jax.jacobian(lambda z: decoder.apply(params["decoder"], z).ravel())(jnp.ones((1, 3)))
    assert (jnp.abs(jacobian).sum(axis=(1, 2)) > 0).all()


@pairs
def test_examples_do_not_see_each_other(encoder, decoder, shape, options):
    encoder = encoder(shape, 3, **options)
    params = encoder.init(jax.random.key(0))
    x = jax.random.uniform(jax.random.key(1), (4, *shape))
    alone, _ = encoder.apply(params, x[2:3])
    np.testing.assert_allclose(encoder.apply(params, x)[0][2:3], alone, atol=1e-6)


def test_a_learned_variance_costs_only_twice_the_output_channels():
    def sizes(outputs):
        params = networks.conv_decoder((28, 28, 1), outputs, 256).init(jax.random.key(0))
        return {jax.tree_util.keystr(path): leaf.size for path, leaf in jax.tree_util.tree_leaves_with_path(params)}

    one, two = sizes(1), sizes(2)
    differing = [name for name in one if one[name] != two[name]]
    assert [two[name] / one[name] for name in differing] == [2.0, 2.0]  # one kernel and its bias


def test_the_paper_s_sizes():
    def layers(params, rank):
        return sum(leaf.ndim == rank for leaf in jax.tree.leaves(params))

    toy = networks.mlp_encoder((2,), 2).init(jax.random.key(0))
    assert sum(leaf.shape == (200, 200) for leaf in jax.tree.leaves(toy)) == 2 * 4
    assert layers(networks.conv_encoder((28, 28, 1), 256).init(jax.random.key(0)), 4) == 3 + 2 * 4
    assert layers(networks.conv_decoder((28, 28, 1), 1, 256).init(jax.random.key(0)), 4) == 3 + 2 * 4


def test_the_posterior_s_stddev_is_bounded():
    encoder = networks.mlp_encoder((2,), 2, width=8, num_blocks=1)
    params = jax.tree.map(lambda leaf: 100.0 * leaf, encoder.init(jax.random.key(0)))
    _, log_stddev = encoder.apply(params, 1e6 * jax.random.normal(jax.random.key(1), (50, 2)))
    low, high = networks.LOG_STDDEV_RANGE
    assert (log_stddev >= low).all()
    assert (log_stddev <= high).all()
    assert math.isclose(log_stddev.min(), low)
    assert math.isclose(log_stddev.max(), high)
