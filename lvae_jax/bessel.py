"""Ratios and logarithms of modified Bessel functions of the first kind, for Theorem 1.

SciPy's `ive` has no gradient in JAX and underflows at large orders. Both functions here have one, and are right to the
last few digits of the type of their argument.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from numpy.polynomial import Polynomial

# The uniform expansion of Bessel functions in 1 / order is used from this order on, with this many terms: float64
# needs no more. Lower orders follow by recurrence.
_ORDER, _NUM_TERMS = 24, 10


def ratio(k: Float[Array, "*S"] | float, *, dim: int) -> Float[Array, "*S"]:
    """A_n(k) = I_{n/2}(k) / I_{n/2 - 1}(k) for k >= 0 and n = `dim` >= 2: E u_1 under the density exp(k u_1) on the
    unit sphere of R^n.

    To the last few digits for all k and n. A_n = k / (n + k A_{n+2}) leads down from orders at which the expansion of
    Olver (DLMF 10.41) converges, without a subtraction.

    Raises:
      ValueError: dim is below 2.
    """
    return _ratio(floating(k), dim)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _ratio(k: Array, dim: int) -> Array:
    return _ratios(k, dim)[-1][0]


@_ratio.defjvp
def _ratio_jvp(dim: int, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    # The derivative of the recurrence as it stands would lose all digits at large k, where the ratio nears 1.
    ratio, slope = _ratios(primals[0], dim)[-1]
    return ratio, slope * tangents[0]


def log_mean_exp(k: Float[Array, "*S"] | float, *, dim: int, scaled: bool = False) -> Float[Array, "*S"]:
    """log E exp(k u_1) over u uniform on the unit sphere of R^n, n = `dim` >= 2, for k >= 0; with `scaled`, log E
    exp(k (u_1 - 1)), which keeps its digits where k is large.

    Equals log Gamma(n/2) + (n/2 - 1) log(2 / k) + log I_{n/2 - 1}(k); relative to its own size it is right to the last
    few digits, however small k is.

    Raises:
      ValueError: dim is below 2.
    """
    return _log_mean_exp(floating(k), dim, scaled)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _log_mean_exp(k: Array, dim: int, scaled: bool) -> Array:
    order, num_steps = _order(dim)
    z = k / order
    root = jnp.hypot(1.0, z)
    half = 0.5 * z * (z / (1.0 + root))  # (root - 1) / 2
    series = _series(order)
    remainder, _ = divmod(series - series(1.0), Polynomial([-1.0, 1.0]))  # the series less its value at k = 0 is this
    correction = -2.0 * half / root * _polynomial(remainder, 1.0 / root)  # times 1 / root - 1
    leading = -(z + 2.0 * half) / (root + z) if scaled else 2.0 * half
    log_mean = order * (leading - jnp.log1p(half)) - 0.5 * jnp.log1p(2.0 * half) + correction
    for step, (ratio, _) in enumerate(_ratios(k, dim)[:num_steps]):
        log_mean += jnp.log1p(k * ratio / (dim + 2 * (num_steps - 1 - step)))
    return log_mean


@_log_mean_exp.defjvp
def _log_mean_exp_jvp(dim: int, scaled: bool, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (k,), (tangent,) = primals, tangents
    slope = _ratio(k, dim)
    return _log_mean_exp(k, dim, scaled), (slope - 1.0 if scaled else slope) * tangent


def floating(x: Array | np.ndarray | float) -> Float[Array, "..."]:
    """x as an array [...] of floats, of the type that JAX gives to Python's floats unless x has one of its own."""
    return jnp.asarray(x, jnp.result_type(x, float))


def _order(dim: int) -> tuple[float, int]:
    """The order at which the expansion is used, and the steps of the recurrence from there down to dim / 2 - 1."""
    check_dim(dim)
    num_steps = max(0, math.ceil(_ORDER - (dim / 2 - 1)))
    return dim / 2 - 1 + num_steps, num_steps


def check_dim(dim: int) -> None:
    """Raises if R^dim has no sphere of at least one dimension.

    Raises:
      ValueError: dim is below 2.
    """
    if dim < 2:
        raise ValueError(f"dim must be at least 2, got {dim}")


def _ratios(k: Array, dim: int) -> list[tuple[Array, Array]]:
    """(A_m(k), A_m'(k)) for every second m from that of the expansion down to `dim`."""
    order, num_steps = _order(dim)
    z = k / order
    root = jnp.hypot(1.0, z)
    t = 1.0 / root
    # The derivative of order (root - 1 - log((1 + root) / 2)) - log(root) / 2 + series(t) by k, and its own.
    t_ = Polynomial([0.0, 1.0])
    bend = t_**2 * (0.5 + t_ * _series(order).deriv()) / order
    ratio = z * (1.0 / (1.0 + root) - _polynomial(bend, t))
    slope = t / (1.0 + root) - _polynomial(bend, t) + (z * t) ** 2 * t * _polynomial(bend.deriv(), t)
    ratios = [(ratio, slope / order)]
    for step in reversed(range(num_steps)):
        upper, upper_slope = ratios[-1]
        denominator = dim + 2 * step + k * upper
        ratios.append((k / denominator, (dim + 2 * step - (k * upper_slope) * k) / denominator**2))
    return ratios


@functools.cache
def _expansion() -> list[Polynomial]:
    """D_1, D_2, ...: log sum_j U_j(t) / order^j = sum_j D_j(t) / order^j, with U_j as in DLMF 10.41.9."""
    t = Polynomial([0.0, 1.0])
    u = [Polynomial([1.0])]
    for _ in range(_NUM_TERMS):
        u.append(0.5 * t**2 * (1 - t**2) * u[-1].deriv() + ((1 - 5 * t**2) * u[-1]).integ() / 8)
    d: list[Polynomial] = []
    for j in range(1, _NUM_TERMS + 1):
        d.append(u[j] - sum(((i * d[i - 1] * u[j - i]) for i in range(1, j)), Polynomial([0.0])) / j)
    return d


@functools.cache
def _series(order: float) -> Polynomial:
    return sum((d / order**j for j, d in enumerate(_expansion(), start=1)), Polynomial([0.0]))


def _polynomial(polynomial: Polynomial, t: Array) -> Array:
    return jnp.polyval(jnp.asarray(polynomial.coef[::-1], t.dtype), t)
