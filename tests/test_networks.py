"""Encoders and decoders: mirrored shapes for any size, a start near the prior, and gradients for every parameter."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import sigma_sweep
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
        params = jax.eval_shape(networks.conv_decoder((28, 28, 1), outputs, 256).init, jax.random.key(0))
        return {jax.tree_util.keystr(path): leaf.size for path, leaf in jax.tree_util.tree_leaves_with_path(params)}

    one, two = sizes(1), sizes(2)
    differing = [name for name in one if one[name] != two[name]]
    assert [two[name] / one[name] for name in differing] == [2.0, 2.0]  # one kernel and its bias


def test_the_paper_s_sizes():
    def shapes(network):
        return [leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(network.init, jax.random.key(0)))]

    assert shapes(networks.mlp_encoder((2,), 2)).count((200, 200)) == 2 * 4
    for network in (networks.conv_encoder((28, 28, 1), 256), networks.conv_decoder((28, 28, 1), 1, 256)):
        assert sum(len(shape) == 4 for shape in shapes(network)) == 3 + 2 * 4


def test_celeba_s_sizes():
    def convolutions(network):
        return [
            leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(network.init, jax.random.key(0))) if leaf.ndim == 4
        ]

    config = sigma_sweep.configure(dataset="celeb_a")
    assert config.latent_size == 2048
    vae = sigma_sweep.make_vae("lv", (64, 64, 3), 2048, 1.0, widths=config.widths, num_blocks=config.num_blocks)
    encoder, decoder = convolutions(vae.encoder), convolutions(vae.decoder)
    assert len(encoder) == len(decoder) == 4 + 2 * 5
    assert (4, 4, 64, 2 * 3) in decoder, "a mean and a log stddev for each of three colours"
    mean, _ = jax.eval_shape(
        lambda key, x: vae.encoder.apply(vae.encoder.init(key), x), jax.random.key(0), jnp.zeros((2, 64, 64, 3))
    )
    assert mean.shape == (2, 2048)


@pairs
def test_bfloat16_is_for_the_arithmetic_alone(encoder, decoder, shape, options):
    x = jax.random.uniform(jax.random.key(0), (3, *shape))
    outputs = {}
    for dtype in (None, jnp.bfloat16):
        ours = encoder(shape, 3, dtype=dtype, **options), decoder(shape, 2, 3, dtype=dtype, **options)
        params = [network.init(jax.random.key(1)) for network in ours]
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
        mean, log_stddev = ours[0].apply(params[0], x)
        outputs[dtype] = mean, log_stddev, ours[1].apply(params[1], jax.random.normal(jax.random.key(2), (3, 3)))
    for coarse, fine in zip(outputs[jnp.bfloat16], outputs[None], strict=True):
        assert coarse.dtype == fine.dtype == jnp.float32
        scale = jnp.abs(fine).max()
        np.testing.assert_allclose(coarse, fine, atol=0.05 * scale)
        assert (coarse != fine).any(), "it must make a difference"
        assert (coarse != coarse.astype(jnp.bfloat16)).any(), "the last layer has all digits"


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
@pytest.mark.parametrize("size", [(4, 4), (7, 5), (1, 1)])
def test_transposed_convolutions_are_flax_s(size, dtype):
    ours = networks._ConvTranspose(3, dtype=dtype)
    theirs = nn.ConvTranspose(3, (4, 4), strides=(2, 2), dtype=dtype)
    x = jax.random.normal(jax.random.key(0), (2, *size, 5))
    params = ours.init(jax.random.key(1), x)
    jax.tree.map(np.testing.assert_array_equal, params, theirs.init(jax.random.key(1), x))
    params["params"]["bias"] = jnp.arange(3.0)
    weights = jax.random.normal(jax.random.key(2), (2, 2 * size[0], 2 * size[1], 3))

    def value_and_gradients(module):
        y, pull = jax.vjp(lambda params, x: module.apply(params, x).astype(jnp.float32), params, x)
        return y, pull(weights)

    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype is None else {"rtol": 0.05, "atol": 0.1}
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, **tolerance),
        value_and_gradients(ours),
        value_and_gradients(theirs),
    )


def test_the_decoder_s_parameters_have_flax_s_names():
    params = jax.eval_shape(networks.conv_decoder((28, 28, 1), 1, 4).init, jax.random.key(0))["params"]
    assert {name for name in params if "Transpose" in name} == {f"ConvTranspose_{index}" for index in range(3)}


def test_transposed_convolutions_cover_all_pixels_alike():
    """Where they do not, a constant becomes a checkerboard (Odena et al., 2016)."""
    decoder = networks.conv_decoder((16, 16, 1), 1, 2, widths=(3, 4), num_blocks=0)
    params = jax.tree.map(lambda leaf: jnp.full_like(leaf, leaf.ndim > 1), decoder.init(jax.random.key(0)))
    inside = decoder.apply(params, jnp.ones((1, 2)))[0, 4:-4, 4:-4]
    np.testing.assert_allclose(inside, jnp.full_like(inside, inside.max()), rtol=1e-5)


def test_the_posterior_s_stddev_is_bounded():
    encoder = networks.mlp_encoder((2,), 2, width=8, num_blocks=1)
    params = jax.tree.map(lambda leaf: 100.0 * leaf, encoder.init(jax.random.key(0)))
    _, log_stddev = encoder.apply(params, 1e6 * jax.random.normal(jax.random.key(1), (50, 2)))
    low, high = networks.LOG_STDDEV_RANGE
    assert (log_stddev >= low).all()
    assert (log_stddev <= high).all()
    assert math.isclose(log_stddev.min(), low)
    assert math.isclose(log_stddev.max(), high)


def test_the_classifier_s_features_are_all_that_its_last_layer_sees():
    network = networks.classifier((28, 28, 1), 10)
    params = network.init(jax.random.key(0))
    x = jax.random.uniform(jax.random.key(1), (5, 28, 28, 1))
    features, logits = network.apply(params, x)
    assert features.shape == (5, 64)
    last = [leaf for leaf in jax.tree.leaves(params) if leaf.shape == (64, 10)]
    np.testing.assert_allclose(logits, features @ last[0], rtol=1e-5, atol=1e-6)  # biases start at zero
    np.testing.assert_allclose(network.apply(params, x[3:4])[0], features[3:4], rtol=1e-5, atol=1e-6)


def test_every_parameter_of_the_classifier_gets_a_gradient():
    network = networks.classifier((9, 7, 3), 4, widths=(4, 6, 8), num_features=5)
    x = jax.random.uniform(jax.random.key(1), (5, 9, 7, 3))
    weights = jax.random.normal(jax.random.key(2), (5, 4))
    gradients = jax.grad(lambda p: jnp.sum(weights * network.apply(p, x)[1]))(network.init(jax.random.key(0)))
    assert sum(leaf.ndim == 4 for leaf in jax.tree.leaves(gradients)) == 3
    assert all((leaf != 0).any() for leaf in jax.tree.leaves(gradients))
