"""Encoders and decoders as pairs of pure functions. Data have any shape *S, latent variables are [B, L].

An encoder gives the posterior's mean and log stddev, a decoder the outputs [B, *S, K] of which a likelihood head makes
p(x|z). Any pair of functions of the same shapes can take their place.

The last layer starts small: the posterior starts near the prior, the decoder's mean near zero and a learned log sigma
near its initial value. `dtype` is that of the arithmetic up to the last layer, such as bfloat16; parameters, the last
layer and all outputs are float32.

A network with a `condition_size` C > 0 is told a condition [B, C]: a gate after each layer but the last multiplies each
channel by a function of it, 2 sigmoid(A c + b) in encoders and sqrt(relu(2 - exp(A c + b))) in decoders, with A = b = 0
at first: the network starts as the one without gates (Bae et al., Multi-Rate VAE, ICLR 2023). The decoder's form is
exact for linear Gaussian data and c = log sigma: the best weight of a direction of variance l is sqrt(relu(l -
sigma^2)).
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from lvae_jax import convolutions, gaussians

# The posterior's log stddev: 4.5e-5 is sharper than any data here allow, and the prior's is 1.
LOG_STDDEV_RANGE = (-10.0, 1.0)
# That of a conditioned encoder: what x tells about z may be next to nothing, see `SigmaRange.posterior`.
CONDITIONED_RANGE = (-10.0, 10.0)

_small = nn.initializers.variance_scaling(0.01, "fan_in", "truncated_normal")


class Encoder(NamedTuple):
    """q(z|x) = N(mean, diag stddev^2).

    Attributes:
      init: key -> params.
      apply: (params, x [B, *S]) -> (mean, log_stddev), both [B, L]. One that is conditioned takes a third argument,
        the condition [B, C] or, of all examples, [1, C].
    """

    init: Callable[[Key[Array, ""]], Any]
    apply: Callable[..., tuple[Float[Array, "B L"], Float[Array, "B L"]]]


class Decoder(NamedTuple):
    """The outputs that a likelihood head turns into p(x|z).

    Attributes:
      init: key -> params.
      apply: (params, z [B, L]) -> [B, *S, K]. One that is conditioned takes a third argument, the condition [B, C] or,
        of all examples, [1, C].
    """

    init: Callable[[Key[Array, ""]], Any]
    apply: Callable[..., Float[Array, "B *S K"]]


Coder = TypeVar("Coder", Encoder, Decoder)


def check_data(x: Array, shape: Sequence[int]) -> None:
    """Compares the shape and the type of data with those of a model of `shape`, when a program is traced.

    Raises:
      ValueError: x is not [B, *shape], or not of floating point.
    """
    if x.ndim == 0 or x.shape[1:] != tuple(shape):
        expected = ", ".join(("B", *map(str, shape)))
        raise ValueError(f"`x` has the shape {list(x.shape)}, but the model is of data [{expected}]")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"`x` is of type {x.dtype}, but the model is of floating-point data: scale grey levels first")


def _check_sizes(**sizes: int | Sequence[int]) -> None:
    for name, size in sizes.items():
        least = 0 if name in ("num_blocks", "condition_size") else 1
        for value in size if isinstance(size, Sequence) else (size,):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
    if not sizes.get("widths", True):
        raise ValueError("widths must hold at least one number")


def mlp_encoder(
    shape: Sequence[int],
    latent_size: int,
    *,
    width: int = 200,
    num_blocks: int = 4,
    condition_size: int = 0,
    dtype: DTypeLike | None = None,
) -> Encoder:
    """The paper's network for the toy: a residual MLP from flattened data [B, *shape] to a posterior of `latent_size`
    dimensions.

    Raises:
      ValueError: a size is not positive; num_blocks and condition_size may be 0.
    """
    _check_sizes(
        shape=shape, latent_size=latent_size, width=width, num_blocks=num_blocks, condition_size=condition_size
    )
    module = _ResidualMLP(2 * latent_size, width, num_blocks, dtype, _sigmoid_gate)
    return _encoder(module, shape, condition_size)


def mlp_decoder(
    shape: Sequence[int],
    outputs: int,
    latent_size: int,
    *,
    width: int = 200,
    num_blocks: int = 4,
    condition_size: int = 0,
    dtype: DTypeLike | None = None,
) -> Decoder:
    """The mirror image of `mlp_encoder`: latents [B, latent_size] to [B, *shape, outputs].

    Raises:
      ValueError: a size is not positive; num_blocks and condition_size may be 0.
    """
    _check_sizes(
        shape=shape,
        outputs=outputs,
        latent_size=latent_size,
        width=width,
        num_blocks=num_blocks,
        condition_size=condition_size,
    )
    module = _ResidualMLP(math.prod(shape) * outputs, width, num_blocks, dtype, _root_gate)
    return _decoder(module, shape, outputs, latent_size, condition_size)


def conv_encoder(
    shape: Sequence[int],
    latent_size: int,
    *,
    widths: Sequence[int] = (32, 64, 64),
    num_blocks: int = 4,
    condition_size: int = 0,
    dtype: DTypeLike | None = None,
) -> Encoder:
    """The paper's network for images [B, H, W, C]: a stride-2 convolution for each width, then residual blocks (MNIST:
    3 and 4, CelebA: 4 and 5).

    Raises:
      ValueError: a size is not positive, or there is no width; num_blocks and condition_size may be 0.
    """
    _check_sizes(
        shape=shape, latent_size=latent_size, widths=widths, num_blocks=num_blocks, condition_size=condition_size
    )
    return _encoder(_ConvEncoder(2 * latent_size, tuple(widths), num_blocks, dtype), shape, condition_size)


def conv_decoder(
    shape: Sequence[int],
    outputs: int,
    latent_size: int,
    *,
    widths: Sequence[int] = (32, 64, 64),
    num_blocks: int = 4,
    condition_size: int = 0,
    dtype: DTypeLike | None = None,
) -> Decoder:
    """The mirror image of `conv_encoder`, with transposed convolutions: latents [B, latent_size] to [B, H, W, C,
    outputs].

    Raises:
      ValueError: a size is not positive, or there is no width; num_blocks and condition_size may be 0.
    """
    _check_sizes(
        shape=shape,
        outputs=outputs,
        latent_size=latent_size,
        widths=widths,
        num_blocks=num_blocks,
        condition_size=condition_size,
    )
    module = _ConvDecoder(tuple(shape), outputs, tuple(widths), num_blocks, dtype)
    return _decoder(module, shape, outputs, latent_size, condition_size)


def frozen(network: Coder) -> Coder:
    """The encoder or decoder, whose parameters get no gradient, nor do its inputs."""

    def apply(*arguments: Any) -> Any:
        return jax.lax.stop_gradient(network.apply(*arguments))

    return network._replace(apply=apply)


def side_by_side(first: Decoder, second: Decoder) -> Decoder:
    """A decoder whose channels are those of two decoders, with parameters {"first": ..., "second": ...}."""

    def init(key: Key[Array, ""]) -> Any:
        return {name: network.init(k) for (name, network), k in zip(parts.items(), jax.random.split(key), strict=True)}

    def apply(params: Any, *inputs: Float[Array, "..."]) -> Float[Array, "B *S K"]:
        return jnp.concatenate([network.apply(params[name], *inputs) for name, network in parts.items()], axis=-1)

    parts = {"first": first, "second": second}
    return Decoder(init, apply)


Gating = Callable[[Array], Array]
"""The factor of a gate as a function of A c + b, elementwise; 1 at 0."""


def _sigmoid_gate(logits: Array) -> Array:
    return 2.0 * nn.sigmoid(logits)


def _root_gate(logits: Array) -> Array:
    # Where the root closes, its slope is infinite: what `where` discards must be finite as well.
    square = 2.0 - jnp.exp(jnp.minimum(logits, 1.0))
    is_open = square > 1e-4
    return jnp.where(is_open, jnp.sqrt(jnp.where(is_open, square, 1.0)), 0.0)


class _Gate(nn.Module):
    """Multiplies each channel of h [B, ..., F] by a function of the condition [B, C] or [1, C]."""

    gating: Gating

    @nn.compact
    def __call__(self, h: Array, condition: Array) -> Array:
        logits = nn.Dense(h.shape[-1], kernel_init=nn.initializers.zeros_init())(condition)
        factor = self.gating(logits).astype(h.dtype)
        return h * factor.reshape(factor.shape[0], *(1,) * (h.ndim - 2), -1)


def _gated(gating: Gating, h: Array, condition: Array | None) -> Array:
    """h behind a gate, which is a part of the module that calls this; h itself without a condition."""
    return h if condition is None else _Gate(gating)(h, condition)


class _ResidualMLP(nn.Module):
    features: int
    width: int
    num_blocks: int
    dtype: DTypeLike | None
    gating: Gating

    @nn.compact
    def __call__(self, h: Array, condition: Array | None = None) -> Array:
        h = _gated(self.gating, nn.Dense(self.width, dtype=self.dtype)(h.reshape(h.shape[0], -1)), condition)
        for _ in range(self.num_blocks):
            residual = _gated(self.gating, nn.Dense(self.width, dtype=self.dtype)(nn.silu(h)), condition)
            residual = nn.Dense(self.width, kernel_init=_small, dtype=self.dtype)(nn.silu(residual))
            h = h + _gated(self.gating, residual, condition)
        return nn.Dense(self.features, kernel_init=_small)(_full(nn.silu(h)))


_Conv = functools.partial(nn.Conv, kernel_size=(3, 3), conv_general_dilated=convolutions.convolve)


class _ResidualConvolutions(nn.Module):
    num_blocks: int
    dtype: DTypeLike | None
    gating: Gating

    @nn.compact
    def __call__(self, h: Array, condition: Array | None = None) -> Array:
        width = h.shape[-1]
        for _ in range(self.num_blocks):
            residual = _gated(self.gating, _Conv(width, dtype=self.dtype)(nn.silu(h)), condition)
            residual = _Conv(width, kernel_init=_small, dtype=self.dtype)(nn.silu(residual))
            h = h + _gated(self.gating, residual, condition)
        return h


class _ConvEncoder(nn.Module):
    features: int
    widths: tuple[int, ...]
    num_blocks: int
    dtype: DTypeLike | None

    @nn.compact
    def __call__(self, h: Array, condition: Array | None = None) -> Array:
        for width in self.widths:
            h = _Conv(width, strides=(2, 2), dtype=self.dtype)(h)
            h = nn.silu(_gated(_sigmoid_gate, h, condition))
        h = _ResidualConvolutions(self.num_blocks, self.dtype, _sigmoid_gate)(h, condition)
        return nn.Dense(self.features, kernel_init=_small)(_full(nn.silu(h.reshape(h.shape[0], -1))))


class _ConvTranspose(nn.Module):
    """`nn.ConvTranspose` with a 4 x 4 kernel, stride 2 and the same parameters."""

    features: int
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, h: Array) -> Array:
        kernel = self.param("kernel", self.kernel_init, (4, 4, h.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        h, kernel, bias = nn.dtypes.promote_dtype(h, kernel, bias, dtype=self.dtype)
        return convolutions.double(h, kernel) + bias[None, None, None]


class _ConvDecoder(nn.Module):
    shape: tuple[int, ...]
    outputs: int
    widths: tuple[int, ...]
    num_blocks: int
    dtype: DTypeLike | None

    @nn.compact
    def __call__(self, z: Array, condition: Array | None = None) -> Array:
        *size, channels = self.shape
        sizes = [tuple(size)]  # as the encoder's convolutions shrink them, finest first
        for _ in self.widths:
            sizes.append(tuple(-(-side // 2) for side in sizes[-1]))
        h = nn.Dense(math.prod(sizes[-1]) * self.widths[-1], dtype=self.dtype)(z).reshape(
            -1, *sizes[-1], self.widths[-1]
        )
        h = _gated(_root_gate, h, condition)
        h = _ResidualConvolutions(self.num_blocks, self.dtype, _root_gate)(h, condition)
        names = (f"ConvTranspose_{index}" for index in itertools.count())  # flax's, as the parameters are
        for (rows, columns), width in zip(sizes[-2:0:-1], self.widths[-2::-1], strict=True):
            h = _ConvTranspose(width, dtype=self.dtype, name=next(names))(nn.silu(h))[:, :rows, :columns]
            h = _gated(_root_gate, h, condition)
        h = _ConvTranspose(channels * self.outputs, kernel_init=_small, name=next(names))(_full(nn.silu(h)))
        return h[:, : size[0], : size[1]].reshape(-1, *self.shape, self.outputs)


def _full(h: Array) -> Array:
    """The input of the last layer, in at least float32."""
    return h.astype(jnp.float32) if jnp.finfo(h.dtype).bits < 32 else h


def _encoder(module: nn.Module, shape: Sequence[int], condition_size: int) -> Encoder:
    def apply(
        params: Any, x: Float[Array, "B *S"], condition: Float[Array, "N C"] | None = None
    ) -> tuple[Float[Array, "B L"], Float[Array, "B L"]]:
        check_data(x, shape)
        _check_condition(condition, condition_size)
        mean, log_stddev = jnp.split(module.apply(params, x, condition), 2, axis=-1)
        return mean, gaussians.soft_clip(log_stddev, *(CONDITIONED_RANGE if condition_size else LOG_STDDEV_RANGE))

    return Encoder(_initializer(module, shape, condition_size), apply)


def _decoder(module: nn.Module, shape: Sequence[int], outputs: int, latent_size: int, condition_size: int) -> Decoder:
    def apply(
        params: Any, z: Float[Array, "B L"], condition: Float[Array, "N C"] | None = None
    ) -> Float[Array, "B *S K"]:
        _check_condition(condition, condition_size)
        return module.apply(params, z, condition).reshape(-1, *shape, outputs)

    return Decoder(_initializer(module, (latent_size,), condition_size), apply)


def _initializer(module: nn.Module, shape: Sequence[int], condition_size: int) -> Callable[[Key[Array, ""]], Any]:
    inputs = [(1, *shape), (1, condition_size)][: 2 if condition_size else 1]
    # Lazily: outside of `jax.jit`, `init` would run the network, operation by operation.
    return lambda key: module.lazy_init(key, *(jax.ShapeDtypeStruct(of_input, jnp.float32) for of_input in inputs))


def _check_condition(condition: Array | None, size: int) -> None:
    given = 0 if condition is None else condition.shape[-1]
    if given != size:
        raise ValueError(f"the network is told a condition of {size} numbers, not {given}: see condition_size")
