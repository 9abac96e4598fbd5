"""Both forms of the convolutions against XLA's own, in values and in derivatives."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvae_jax import convolutions, networks

NUMBERS = ("NHWC", "HWIO", "NHWC")
forms = pytest.mark.parametrize("products", [True, False])


@pytest.fixture
def choose(monkeypatch):
    return lambda products: monkeypatch.setattr(convolutions, "by_products", lambda: products)


def normals(*shapes):
    return [jax.random.normal(jax.random.key(index), shape) for index, shape in enumerate(shapes)]


def derivatives(function, x, kernel):
    """The value, its gradients at a random direction, a directional derivative, and the gradients of that."""
    directions = normals(x.shape, kernel.shape)

    def along(x, kernel):
        return jax.jvp(function, (x, kernel), tuple(directions))[1]

    def all_of_them(x, kernel):
        y, pull = jax.vjp(function, x, kernel)
        slope, pull_slope = jax.vjp(along, x, kernel)
        (weights,) = normals(y.shape)
        return y, pull(weights), slope, pull_slope(weights)

    return jax.jit(all_of_them)(x, kernel)


def assert_same(ours, theirs, x, kernel):
    got, wanted = derivatives(ours, x, kernel), derivatives(theirs, x, kernel)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=2e-5), got, wanted)


@forms
@pytest.mark.parametrize(
    ("strides", "window", "padding"), [((1, 1), (3, 3), "SAME"), ((2, 2), (3, 3), "SAME"), ((2, 1), (2, 3), "VALID")]
)
def test_a_convolution_is_xla_s(choose, products, strides, window, padding):
    choose(products)
    x, kernel = normals((2, 7, 4, 3), (*window, 3, 4))
    theirs = functools.partial(
        jax.lax.conv_general_dilated, window_strides=strides, padding=padding, dimension_numbers=NUMBERS
    )
    assert_same(lambda x, kernel: convolutions.convolve(x, kernel, strides, padding), theirs, x, kernel)


@forms
def test_a_kernel_larger_than_the_image(choose, products):
    choose(products)
    x, kernel = normals((2, 1, 1, 3), (3, 3, 3, 4))
    y = convolutions.convolve(x, kernel, (2, 2), "SAME")
    np.testing.assert_allclose(y[:, 0, 0], x[:, 0, 0] @ kernel[1, 1], rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "channels"),
    [({"feature_group_count": 3}, 1), ({"rhs_dilation": (2, 1)}, 3), ({"lhs_dilation": (1, 2)}, 3)],
)
def test_groups_and_dilations_are_left_to_xla(choose, options, channels):
    choose(True)
    x, kernel = normals((2, 7, 6, 3), (3, 3, channels, 6))
    padding = [(1, 1), (0, 2)]
    theirs = jax.lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=NUMBERS, **options)
    np.testing.assert_array_equal(convolutions.convolve(x, kernel, (1, 1), padding, **options), theirs)


@forms
@pytest.mark.parametrize("size", [(7, 4), (1, 1)])
def test_doubling_is_the_transposed_convolution_of_flax(choose, products, size):
    choose(products)
    x, kernel = normals((2, *size, 5), (4, 4, 5, 3))
    module = nn.ConvTranspose(3, (4, 4), strides=(2, 2), use_bias=False)
    assert_same(convolutions.double, lambda x, kernel: module.apply({"params": {"kernel": kernel}}, x), x, kernel)


@forms
def test_a_kernel_for_each_member(choose, products):
    choose(products)
    x, kernels = normals((2, 5, 5, 3), (4, 3, 3, 3, 2))
    mapped = jax.vmap(lambda kernel: convolutions.convolve(x, kernel, (2, 2), "SAME"))(kernels)
    for y, kernel in zip(mapped, kernels, strict=True):
        np.testing.assert_allclose(y, convolutions.convolve(x, kernel, (2, 2), "SAME"), rtol=1e-5, atol=1e-5)


@forms
def test_one_function_chooses_the_form_of_all_layers(choose, products):
    choose(products)
    encoder = networks.conv_encoder((8, 8, 1), 2, widths=(3, 4), num_blocks=1)
    decoder = networks.conv_decoder((8, 8, 1), 1, 2, widths=(3, 4), num_blocks=1)
    for network, shape, number in ((encoder, (1, 8, 8, 1), 4), (decoder, (1, 2), 4)):
        params = jax.eval_shape(network.init, jax.random.key(0))
        text = jax.jit(network.apply).lower(params, jnp.zeros(shape)).as_text()
        assert text.count("stablehlo.convolution(") == (0 if products else number)


@pytest.mark.parametrize(("backend", "products"), [("cpu", True), ("gpu", False), ("tpu", False)])
def test_products_are_for_cpus(monkeypatch, backend, products):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert convolutions.by_products() == products
