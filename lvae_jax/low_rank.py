"""Arithmetic of Gaussians whose covariance is a diagonal plus a low rank, N(mean, diag(stddev^2) + U U^T), in nats.

Everything here is of one example: mean and `log_stddev` [*S] and the `factors` U [*S, r], all in the unit of the data;
`jax.vmap` gives the rest. Cost: O(n r^2), n the number of dimensions.

In units of the stddevs, y = (x - mean) / stddev and W = U / stddev, the covariance is I + W W^T. With an orthonormal
basis Q of W's columns, W = Q T, it is I beside Q and I + T T^T within: r numbers of y and an r x r matrix. T T^T is a
sum of r outer products, and so a root of I + T T^T is a product of r simple ones: L_k = L_{k-1} (I + u_k u_k^T)^{1/2}
with u_k the k-th column of T after the steps before it. Each step takes a vector apart into what lies along u_k and
what is orthogonal to it, and divides the first part by sqrt(1 + |u_k|^2) >= 1.

The usual formulas, Woodbury's identity with a Cholesky factor of I + W^T W, subtract numbers as large as n |W|^2. On
images, where stddev may be a thousandth of |U|, float32 keeps no digit of the difference, and the factor is NaN where
two columns are alike.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from lvae_jax.gaussians import HALF_LOG_TWO_PI


@jax.custom_jvp
def log_prob(
    x: Float[Array, "*S"], mean: Float[Array, "*S"], log_stddev: Float[Array, "*S"], factors: Float[Array, "*S r"]
) -> Float[Array, ""]:
    """log N(x; mean, diag(stddev^2) + U U^T) in nats.

    The gradients are in closed form, so that no copy of U is kept for each step. With P = (I + W W^T)^-1, a = P y and
    c = W^T a, the posterior mean of the r coordinates, they are a / stddev for the mean, a^2 - diag P for log stddev,
    and (a c^T - P W) / stddev for U.

    >>> zero, factors = jnp.zeros(2), jnp.array([[3.0**0.5], [0.0]])  # the stddevs are 2 and 1
    >>> round(float(log_prob(zero, zero, zero, factors) - jax.scipy.stats.norm.logpdf(zero, scale=2.0).sum()), 3)
    0.693
    """
    return _log_density(_split(x, mean, log_stddev, factors), log_stddev)


@log_prob.defjvp
def _log_prob_jvp(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    log_stddev, (of_x, of_mean, of_log_stddev, of_factors) = primals[2], tangents
    split = _split(*primals)
    basis, found = split.basis, split.within
    a_within, inverse, removed = _unwhiten(found)
    a = split.beside + _times(basis, a_within)
    # c = (L^-1 T)^T (L^-1 y): the factors are at most 1 here, where W^T a would cancel.
    posterior_mean = found.residual @ found.factors
    by_factors = _times(basis, jnp.outer(a_within, posterior_mean) - inverse)
    by_factors += jnp.tensordot(split.beside, posterior_mean, axes=0)
    diagonal = 1.0 - jnp.sum(_times(basis, removed) ** 2, axis=-1)
    change = a * (of_mean - of_x) + jnp.sum(by_factors * of_factors, axis=-1)
    slope = jnp.sum(change * jnp.exp(-log_stddev) + (a**2 - diagonal) * of_log_stddev)
    return _log_density(split, log_stddev), slope


def standardise(
    x: Float[Array, "*S"], mean: Float[Array, "*S"], log_stddev: Float[Array, "*S"], factors: Float[Array, "*S r"]
) -> Float[Array, "*S"]:
    """L^-1 (x - mean), where L L^T is the covariance: standard normal if x is drawn from this Gaussian."""
    split = _split(x, mean, log_stddev, factors)
    return split.beside + _times(split.basis, split.within.residual)


def stddev(log_stddev: Float[Array, "*S"], factors: Float[Array, "*S r"]) -> Float[Array, "*S"]:
    """The stddev of each dimension."""
    return jnp.sqrt(jnp.exp(2.0 * log_stddev) + jnp.sum(factors**2, axis=-1))


def sample(
    key: Key[Array, ""], mean: Float[Array, "*S"], log_stddev: Float[Array, "*S"], factors: Float[Array, "*S r"]
) -> Float[Array, "*S"]:
    """A reparameterised draw mean + stddev * noise + U e, e ~ N(0, I)."""
    noise_key, key = jax.random.split(key)
    noise = jax.random.normal(noise_key, mean.shape, mean.dtype)
    return mean + jnp.exp(log_stddev) * noise + factors @ jax.random.normal(key, factors.shape[-1:], mean.dtype)


def principal_axes(factors: Float[Array, "*S r"]) -> Float[Array, "*S k"]:
    """The axes of U U^T, longest first, k = min(n, r): orthogonal, and as long as the stddev of U e along each. U
    itself is known only up to a rotation of its columns."""
    left, lengths, _ = jnp.linalg.svd(factors.reshape(-1, factors.shape[-1]), full_matrices=False)
    return (left * lengths[None]).reshape(*factors.shape[:-1], -1)


class _Whitened(NamedTuple):
    """A residual within the span of the factors, in units in which its dimensions are independent; all in r numbers.

    Attributes:
      residual: L^-1 y, where L L^T = I + T T^T.
      log_det: log det L in nats.
      factors: L^-1 T.
      steps: the vectors u_k, of which L is made.
    """

    residual: Float[Array, " r"]
    log_det: Float[Array, ""]
    factors: Float[Array, "r r"]
    steps: Float[Array, "r r"]


class _Split(NamedTuple):
    """A residual y in units of the stddevs: what lies beside the span of the factors, and what within.

    Attributes:
      beside: y - Q Q^T y.
      basis: Q.
    """

    beside: Float[Array, "*S"]
    basis: Float[Array, "*S r"]
    within: _Whitened


def _split(x: Array, mean: Array, log_stddev: Array, factors: Array) -> _Split:
    precision = jnp.exp(-log_stddev)
    y, factors = (x - mean) * precision, factors * precision[..., None]
    basis = _orthonormal(factors)
    beside, along = _apart(y, basis)
    axes = tuple(range(y.ndim))
    return _Split(beside, basis, _whiten(along, jnp.tensordot(basis, factors, axes=(axes, axes))))


def _orthonormal(factors: Float[Array, "*S r"]) -> Float[Array, "*S r"]:
    """An orthonormal basis of the columns; 0 in the place of one that vanishes, or lies in the span of those before."""
    rounding = 10.0 * jnp.finfo(factors.dtype).eps

    def step(index: Int[Array, ""], basis: Float[Array, "*S r"]) -> Float[Array, "*S r"]:
        column = factors[..., index]
        beside, _ = _apart(column, basis)
        is_new = jnp.sum(beside**2) > rounding**2 * jnp.sum(column**2)
        return basis.at[..., index].set(jnp.where(is_new, _direction(beside), 0.0))

    return _repeat(factors.shape[-1], step, jnp.zeros_like(factors))


def _apart(y: Float[Array, "*S"], basis: Float[Array, "*S r"]) -> tuple[Float[Array, "*S"], Float[Array, " r"]]:
    """The part of y that is orthogonal to an orthonormal basis, and the coordinates of the rest."""
    first = jnp.tensordot(y, basis, axes=y.ndim)
    rest = y - _times(basis, first)
    # Rounding leaves as much within as may belong beside: it is taken out once more.
    second = jnp.tensordot(rest, basis, axes=y.ndim)
    return rest - _times(basis, second), first + second


def _times(basis: Float[Array, "*S r"], value: Float[Array, "r ..."]) -> Float[Array, "..."]:
    return jnp.tensordot(basis, value, axes=1)


def _direction(u: Float[Array, "..."]) -> Float[Array, "..."]:
    """The unit vector along u; 0 where that has no digits."""
    square = jnp.sum(u**2)
    vanishes = square < 1e-20
    return jnp.where(vanishes, 0.0, u / jnp.sqrt(jnp.where(vanishes, 1.0, square)))


def _log_density(split: _Split, log_stddev: Float[Array, "*S"]) -> Float[Array, ""]:
    beside = jnp.sum(-0.5 * split.beside**2 - log_stddev - HALF_LOG_TWO_PI)
    return beside - 0.5 * jnp.sum(split.within.residual**2) - split.within.log_det


def _whiten(y: Float[Array, " r"], factors: Float[Array, "r r"]) -> _Whitened:
    """Takes the correlations of N(0, I + T T^T) out of y; T are the `factors`."""

    def step(index: Int[Array, ""], carry: _Whitened) -> _Whitened:
        u = carry.factors[:, index]
        square = jnp.sum(u**2)
        return _Whitened(
            _shrink(carry.residual, u),
            carry.log_det + 0.5 * jnp.log1p(square),
            # Its own column lies along u exactly.
            _shrink(carry.factors, u).at[:, index].set(u / jnp.sqrt(1.0 + square)),
            carry.steps.at[:, index].set(u),
        )

    start = _Whitened(y, jnp.zeros((), y.dtype), factors, jnp.zeros_like(factors))
    return _repeat(len(y), step, start)


def _unwhiten(found: _Whitened) -> tuple[Float[Array, " r"], Float[Array, "r r"], Float[Array, "r r"]]:
    """P y, P T, and V with P = I - V V^T, where P = (I + T T^T)^-1 = L^-T L^-1.

    The columns of V are v_k = L_{k-1}^-T u_k / sqrt(1 + |u_k|^2).
    """
    rank = len(found.residual)

    def step(index: Int[Array, ""], carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        index = rank - 1 - index
        u = found.steps[:, index]
        residual, factors, v = (_shrink(value, u) for value in carry)
        return residual, factors, v.at[:, index].set(u / jnp.sqrt(1.0 + jnp.sum(u**2)))

    return _repeat(rank, step, (found.residual, found.factors, jnp.zeros_like(found.factors)))


def _shrink(value: Float[Array, "r ..."], u: Float[Array, " r"]) -> Float[Array, "r ..."]:
    """(I + u u^T)^{-1/2} times `value`, or times each column of it."""
    direction = _direction(u)
    along = direction @ value
    across = value - jnp.tensordot(direction, along, axes=0)
    # As above, once more.
    rest = direction @ across
    return across + jnp.tensordot(direction, along / jnp.sqrt(1.0 + jnp.sum(u**2)) - rest, axes=0)


def _repeat(rank: int, step: Callable[[Int[Array, ""], Any], Any], carry: Any) -> Any:
    # A loop of no steps is traced, too, and there is no column.
    return jax.lax.fori_loop(0, rank, step, carry) if rank else carry
