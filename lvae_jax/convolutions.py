"""Convolutions of images [B, H, W, C], in the form that is fast on the backend: the same values and derivatives.

On a CPU, XLA's convolutions and above all their gradients are slow. Matrix products are not, so that a convolution is
there the product of all patches with the kernel (im2col), and a transposed one the product of all pixels with the
kernel, whose parts are then added where they overlap. `benchmarks.peers` measures what that wins.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def by_products() -> bool:
    """Tells whether convolutions are matrix products here. Nothing else chooses."""
    return jax.default_backend() == "cpu"


def convolve(
    x: Float[Array, "B H W C"],
    kernel: Float[Array, "h w c F"],
    strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    **options: Any,
) -> Float[Array, "B I J F"]:
    """`jax.lax.conv_general_dilated` of images, for `flax.linen.Conv(conv_general_dilated=convolve)`.

    Args:
      options: dilations and groups as there; with any of these, the convolution is XLA's on a CPU, too.
    """
    dilations = [*(options.get("lhs_dilation") or ()), *(options.get("rhs_dilation") or ())]
    if not by_products() or options.get("feature_group_count", 1) != 1 or any(factor != 1 for factor in dilations):
        options.setdefault("dimension_numbers", ("NHWC", "HWIO", "NHWC"))
        return jax.lax.conv_general_dilated(x, kernel, tuple(strides), padding, **options)
    height, width, channels, features = kernel.shape
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(x.shape[1:3], (height, width), strides, padding)
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    down, right = strides
    patches = [
        x[:, i : x.shape[1] - height + i + 1 : down, j : x.shape[2] - width + j + 1 : right]
        for i in range(height)
        for j in range(width)
    ]
    columns = jnp.concatenate(patches, axis=-1)
    products = columns.reshape(-1, height * width * channels) @ kernel.reshape(-1, features)
    return products.reshape(*columns.shape[:3], features)


def double(x: Float[Array, "B H W C"], kernel: Float[Array, "4 4 C F"]) -> Float[Array, "B 2*H 2*W F"]:
    """The transposed convolution of stride 2 that `flax.linen.ConvTranspose` has: it doubles both sides.

    A kernel of twice the stride covers every pixel equally often, which avoids checkerboards.
    """
    if not by_products():
        return jax.lax.conv_transpose(x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    batch, rows, columns, channels = x.shape
    # Along a side, x[i] adds x[i] kernel[3 - t] to y[2 i - 1 + t], t = 2 p + q: to the pixel q of the pair i + p.
    flipped = kernel[::-1, ::-1].reshape(2, 2, 2, 2, channels, -1).transpose(4, 0, 2, 1, 3, 5).reshape(channels, -1)
    products = x.reshape(-1, channels) @ flipped
    parts = iter(jnp.split(products.reshape(batch, rows, columns, -1), 4, axis=-1))
    placed = [jnp.pad(next(parts), ((0, 0), (p, 1 - p), (s, 1 - s), (0, 0))) for p in range(2) for s in range(2)]
    pixels = functools.reduce(jnp.add, placed).reshape(batch, rows + 1, columns + 1, 2, 2, -1).swapaxes(2, 3)
    y = pixels.reshape(batch, 2 * rows + 2, 2 * columns + 2, -1)
    return y[:, 1:-1, 1:-1]
