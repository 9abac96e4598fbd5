"""Encoders and decoders: mirrored shapes for any size, a start near the prior, and gradients for every parameter."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import domains, sigma_sweep, variants
from lvae_jax import datasets, networks

# The convolutions' images have sides that halve evenly, 12, and that do not, 9.
PAIRS = {
    "mlp": (networks.mlp_encoder, networks.mlp_decoder, (4, 3, 1), {"width": 16, "num_blocks": 2}),
    "conv": (networks.conv_encoder, networks.conv_decoder, (12, 9, 3), {"widths": (4, 8), "num_blocks": 1}),
}
pairs = pytest.mark.parametrize("name", PAIRS)


@functools.cache
def pair(name, dtype=None):
    """(encoder, decoder, shape, parameters of both) with 3 latent dimensions and 2 outputs, compiled."""
    encoder, decoder, shape, options = PAIRS[name]
    networks_ = encoder(shape, 3, dtype=dtype, **options), decoder(shape, 2, 3, dtype=dtype, **options)
    params = [jax.jit(network.init)(jax.random.key(index)) for index, network in enumerate(networks_)]
    return *(network._replace(apply=jax.jit(network.apply)) for network in networks_), shape, params


def inputs(shape):
    return jax.random.uniform(jax.random.key(2), (4, *shape))


@pairs
def test_pair_starts_near_the_prior_and_near_zero(name):
    encoder, decoder, shape, params = pair(name)
    mean, log_stddev = encoder.apply(params[0], inputs(shape))
    assert mean.shape == log_stddev.shape == (4, 3)
    assert np.abs(mean).max() < 1.0
    assert np.abs(log_stddev).max() < 1.0
    y = decoder.apply(params[1], mean)
    assert y.shape == (4, *shape, 2)
    assert np.abs(y).max() < 1.0
    one = PAIRS[name][1](shape, 1, 3, **PAIRS[name][3])
    y = jax.eval_shape(lambda z: one.apply(one.init(jax.random.key(0)), z), mean)
    assert y.shape == (4, *shape, 1)


@pairs
def test_every_parameter_gets_a_gradient_and_every_output_depends_on_z(name):
    encoder, decoder, shape, params = pair(name)
    x, weights = inputs(shape), jax.random.normal(jax.random.key(3), (4, *shape, 2))

    def loss(params):
        mean, log_stddev = encoder.apply(params[0], x)
        y = decoder.apply(params[1], mean + jnp.exp(log_stddev))
        return jnp.sum(weights * y) + jnp.sum(log_stddev * mean)

    gradients = jax.jit(jax.grad(loss))(params)
    leaves = jax.tree_util.tree_leaves_with_path(gradients)
    assert not [jax.tree_util.keystr(path) for path, leaf in leaves if not np.any(leaf)]
    z = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    moved = [np.asarray(decoder.apply(params[1], jnp.array(z + 0.1 * direction))) for direction in np.eye(3)]
    changes = np.abs(np.asarray(moved) - np.asarray(decoder.apply(params[1], jnp.array(z))))
    assert np.all(changes.max(axis=(0, 1)) > 0)


@pairs
def test_blocks_are_skipped_where_they_give_nothing(name):
    encoder, _, shape, params = pair(name)
    ends = ("['Dense_2']", "['Dense_4']") if name == "mlp" else ("['_ResidualConvolutions_0']['Conv_1']",)

    def silenced(path, leaf):
        return 0.0 * leaf if any(end in jax.tree_util.keystr(path) for end in ends) else leaf

    silent = jax.tree_util.tree_map_with_path(silenced, params[0])
    moved = [np.any(old != new) for old, new in zip(*map(jax.tree.leaves, (params[0], silent)), strict=True)]
    assert sum(moved) == len(ends), "the kernel of each block's last layer"
    mean, _ = encoder.apply(silent, inputs(shape))
    assert np.ptp(np.asarray(mean), axis=0).min() > 0.0


@pairs
def test_examples_do_not_see_each_other(name):
    encoder, _, shape, params = pair(name)
    x = inputs(shape)
    mean, _ = encoder.apply(params[0], x)
    others, _ = encoder.apply(params[0], x.at[jnp.array([0, 1, 3])].set(0.7))
    np.testing.assert_allclose(mean[2], others[2], atol=1e-6)


@pairs
def test_two_decoders_side_by_side(name):
    """Each with its own channels and parameters; a frozen one passes no gradient on, to its own or to what it reads."""
    _, _, shape, _ = pair(name)
    parts = [PAIRS[name][1](shape, outputs, 3, **PAIRS[name][3]) for outputs in (1, 2)]
    both = networks.side_by_side(networks.frozen(parts[0]), parts[1])
    params, z = jax.jit(both.init)(jax.random.key(0)), jax.random.normal(jax.random.key(1), (4, 3))
    assert params.keys() == {"first", "second"}
    y = both.apply(params, z)
    np.testing.assert_array_equal(y[..., :1], parts[0].apply(params["first"], z))
    np.testing.assert_array_equal(y[..., 1:], parts[1].apply(params["second"], z))

    def total(params, z, channels):
        return jnp.sum(both.apply(params, z)[..., channels])

    of_first = jax.tree.leaves(jax.grad(total, (0, 1))(params, z, slice(1)))
    assert not any(np.any(leaf) for leaf in of_first)
    of_second, _ = jax.grad(total, (0, 1))(params, z, slice(1, None))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(of_second["first"]))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(of_second["second"]))


def test_learned_variance_costs_only_twice_the_output_channels():
    def sizes(outputs):
        params = jax.eval_shape(networks.conv_decoder((28, 28, 1), outputs, 256).init, jax.random.key(0))
        return {jax.tree_util.keystr(path): leaf.size for path, leaf in jax.tree_util.tree_leaves_with_path(params)}

    one, two = sizes(1), sizes(2)
    differing = [name for name in one if one[name] != two[name]]
    assert [two[name] / one[name] for name in differing] == [2.0, 2.0]  # one kernel and its bias


def test_sizes_of_the_paper():
    def shapes(network):
        return [leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(network.init, jax.random.key(0)))]

    assert shapes(networks.mlp_encoder((2,), 2)).count((200, 200)) == 2 * 4
    for network in (networks.conv_encoder((28, 28, 1), 256), networks.conv_decoder((28, 28, 1), 1, 256)):
        assert sum(len(shape) == 4 for shape in shapes(network)) == 3 + 2 * 4


def test_sizes_for_celeba():
    def convolutions(network):
        return [
            leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(network.init, jax.random.key(0))) if leaf.ndim == 4
        ]

    config = sigma_sweep.configure(dataset="celeb_a")
    assert config.latent_size == 2048
    vae = variants.make_vae(
        "lv",
        domains.IMAGES,
        datasets.Form((64, 64, 3), 256),
        2048,
        1.0,
        widths=config.widths,
        num_blocks=config.num_blocks,
    )
    encoder, decoder = convolutions(vae.encoder), convolutions(vae.decoder)
    assert len(encoder) == len(decoder) == 4 + 2 * 5
    assert (4, 4, 64, 2 * 3) in decoder, "a mean and a log stddev for each of three colours"
    mean, _ = jax.eval_shape(
        lambda key, x: vae.encoder.apply(vae.encoder.init(key), x), jax.random.key(0), jnp.zeros((2, 64, 64, 3))
    )
    assert mean.shape == (2, 2048)


@pairs
def test_bfloat16_is_for_the_arithmetic_alone(name):
    outputs = {}
    for dtype in (None, jnp.bfloat16):
        encoder, decoder, shape, params = pair(name, dtype)
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
        mean, log_stddev = encoder.apply(params[0], inputs(shape))
        outputs[dtype] = mean, log_stddev, decoder.apply(params[1], jax.random.normal(jax.random.key(2), (4, 3)))
    for coarse, fine in zip(outputs[jnp.bfloat16], outputs[None], strict=True):
        assert coarse.dtype == fine.dtype == jnp.float32
        np.testing.assert_allclose(coarse, fine, atol=0.05 * np.abs(fine).max())
        assert np.any(coarse != fine), "it must make a difference"
        assert np.any(coarse != coarse.astype(jnp.bfloat16)), "the last layer has all digits"


@pytest.mark.parametrize(("size", "dtype"), [((7, 4), None), ((7, 4), jnp.bfloat16)])
def test_transposed_convolutions_are_flax_s(size, dtype):
    ours = networks._ConvTranspose(3, dtype=dtype)
    theirs = nn.ConvTranspose(3, (4, 4), strides=(2, 2), dtype=dtype)
    x = jax.random.normal(jax.random.key(0), (2, *size, 5))
    params = jax.jit(ours.init)(jax.random.key(1), x)
    jax.tree.map(np.testing.assert_array_equal, params, jax.jit(theirs.init)(jax.random.key(1), x))
    params["params"]["bias"] = jnp.arange(3.0)
    weights = jax.random.normal(jax.random.key(2), (2, 2 * size[0], 2 * size[1], 3))

    def value_and_gradients(module):
        def value_and_pullback(params, x):
            y, pull = jax.vjp(lambda params, x: module.apply(params, x).astype(jnp.float32), params, x)
            return y, pull(weights)

        return jax.jit(value_and_pullback)(params, x)

    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype is None else {"rtol": 0.05, "atol": 0.1}
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, **tolerance),
        value_and_gradients(ours),
        value_and_gradients(theirs),
    )


def test_decoder_parameters_have_the_names_of_flax():
    params = jax.eval_shape(networks.conv_decoder((28, 28, 1), 1, 4).init, jax.random.key(0))["params"]
    assert {name for name in params if "Transpose" in name} == {f"ConvTranspose_{index}" for index in range(3)}


def test_transposed_convolutions_cover_all_pixels_alike():
    """Where they do not, a constant becomes a checkerboard (Odena et al., 2016)."""
    decoder = networks.conv_decoder((16, 16, 1), 1, 2, widths=(3, 4), num_blocks=0)
    shapes = jax.eval_shape(decoder.init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: jnp.full(leaf.shape, float(leaf.ndim > 1)), shapes)
    inside = jax.jit(decoder.apply)(params, jnp.ones((1, 2)))[0, 4:-4, 4:-4]
    np.testing.assert_allclose(inside, jnp.full_like(inside, inside.max()), rtol=1e-5)


def test_posterior_stddev_is_bounded():
    encoder = networks.mlp_encoder((2,), 2, width=8, num_blocks=1)
    params = jax.tree.map(lambda leaf: 100.0 * leaf, jax.jit(encoder.init)(jax.random.key(0)))
    _, log_stddev = jax.jit(encoder.apply)(params, 1e6 * jax.random.normal(jax.random.key(1), (50, 2)))
    low, high = networks.LOG_STDDEV_RANGE
    assert (log_stddev >= low).all()
    assert (log_stddev <= high).all()
    assert math.isclose(log_stddev.min(), low)
    assert math.isclose(log_stddev.max(), high)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": (0, 4, 1)}, "shape must be at least 1, got 0"),
        ({"latent_size": 0}, "latent_size must be at least 1"),
        ({"outputs": 0}, "outputs must be at least 1"),
        ({"width": 0}, "width must be at least 1"),
        ({"widths": ()}, "widths must hold at least one number"),
        ({"widths": (4, -1)}, "widths must be at least 1, got -1"),
        ({"num_blocks": -1}, "num_blocks must be at least 0"),
    ],
)
def test_sizes_are_checked_before_anything_is_made(change, message):
    tried = 0
    for encoder, decoder, shape, options in PAIRS.values():
        if set(change) & {"width", "widths"} and not set(change) & set(options):
            continue
        given = {"shape": shape, "latent_size": 2} | options | change
        with pytest.raises(ValueError, match=message):
            decoder(outputs=given.pop("outputs", 1), **given)
        if "outputs" not in change:
            tried += 1
            with pytest.raises(ValueError, match=message):
                encoder(**given)
    assert tried or "outputs" in change
