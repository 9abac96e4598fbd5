"""Elementwise arithmetic of Gaussians, in nats.

A Gaussian is a mean and a `log_stddev`, both of any shapes that broadcast. Nothing here sums: a density or a divergence
has the broadcast shape of its arguments, and the caller decides over which axes to add.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

HALF_LOG_TWO_PI = 0.5 * math.log(2.0 * math.pi)

# Numerical Recipes (Press et al., 2nd ed., 6.2): erfc(y) = t exp(-y^2 + polynomial(t)), t = 2 / (2 + y), for y >= 0, to
# a relative error of 1.2e-7. Highest power first.
_ERFC = (
    *(0.17087277, -0.82215223, 1.48851587, -1.13520398, 0.27886807),
    *(-0.18628806, 0.09678418, 0.37409196, 1.00002368, -1.26551223),
)


def log_prob(x: Float[Array, "..."], mean: Float[Array, "..."], log_stddev: Float[Array, "..."]) -> Float[Array, "..."]:
    """log N(x; mean, stddev^2) in nats, elementwise.

    The residual is standardised before it is squared, so that a small stddev neither overflows nor divides by zero.

    >>> log_prob(jnp.array([0.0, 1.0]), jnp.zeros(()), jnp.zeros(())).round(3)
    Array([-0.919, -1.419], dtype=float32)
    """
    standardised = (x - mean) * jnp.exp(-log_stddev)
    return -0.5 * standardised**2 - log_stddev - HALF_LOG_TWO_PI


def log_cdf(x: Float[Array, "..."], mean: Float[Array, "..."], log_stddev: Float[Array, "..."]) -> Float[Array, "..."]:
    """log P(X < x) in nats, X ~ N(mean, stddev^2), elementwise; exact to float32, as are its gradients, in both tails.

    (The gradient of `jax.scipy.special.log_ndtr` is wrong from some 10^3 stddevs on: it subtracts large logarithms.)
    """
    t = (x - mean) * jnp.exp(-log_stddev)
    tail = _log_upper_tail(jnp.abs(t))
    return jnp.where(t < 0.0, tail, jnp.log1p(-jnp.exp(tail)))


def log_bin_mass(
    x: Float[Array, "..."], mean: Float[Array, "..."], log_stddev: Float[Array, "..."]
) -> Float[Array, "..."]:
    """log P(x - 1/2 < X < x + 1/2) in nats, X ~ N(mean, stddev^2), elementwise; exact to float32, as are its gradients,
    for bins of any width in stddevs and far into the tails. Never above zero.

    The difference of two normal cdfs loses all digits in three ways, and there are three ways around them. With c the
    distance of the bin from the mean, w its half width, a = c - w its near edge and b = c + w its far one, in stddevs:

      narrow, w and c w < 1/2:  log phi(c) + log 2w + log(1 + sum_n He_2n(c) w^2n / (2n + 1)!), Taylor's series,
      beside the mean, a > 0:   log Q(a) + log(1 - Q(b) / Q(a)), Q the upper tail,
      around the mean, a <= 0:  log(1 - Q(-a) - Q(b)).
    """
    precision = jnp.exp(-log_stddev)
    distance = jnp.abs(x - mean)
    a, b = (distance - 0.5) * precision, (distance + 0.5) * precision
    c, w = distance * precision, 0.5 * precision
    narrow, beside = w * jnp.maximum(c, 1.0) < 0.5, a > 0.0

    # Every formula is kept finite outside its own domain by limits that do nothing inside: what `where` discards must
    # have a finite gradient, and a compiled program may round twice, and find the two sides of an edge at once.
    c_w, w_2 = jnp.minimum(c * w, 0.5), jnp.minimum(w**2, 0.25)
    excess = jnp.zeros_like(c_w)
    before, term = jnp.ones_like(c_w), c_w  # He_n(c) w^n, by the recursion of the Hermite polynomials
    for n in range(1, 8):
        before, term = term, c_w * term - n * w_2 * before
        if n % 2:
            excess += term / math.factorial(n + 2)
    narrow_mass = -0.5 * c**2 - HALF_LOG_TWO_PI - log_stddev + jnp.log1p(excess)

    near, far = jnp.where(beside, a, -a), b
    log_q_near, log_q_far = _log_upper_tail(near), _log_upper_tail(far)
    # Q(b) / Q(a) = R(b) / R(a) exp(-2 c w), R the Mills ratio; below exp(-1/2) beside the mean.
    drop = jnp.maximum(2.0 * c * w + _log_mills_ratio(near) - _log_mills_ratio(far), 0.5)
    beside_mass = log_q_near + jnp.log1p(-jnp.exp(-drop))
    around_mass = jnp.log1p(-jnp.minimum(jnp.exp(log_q_near) + jnp.exp(log_q_far), 0.7))
    return jnp.where(narrow, narrow_mass, jnp.where(beside, beside_mass, around_mass))


def sample(key: Key[Array, ""], mean: Float[Array, "..."], log_stddev: Float[Array, "..."]) -> Float[Array, "..."]:
    """A reparameterised draw mean + stddev * noise, of the broadcast shape of mean and log_stddev."""
    shape = jnp.broadcast_shapes(mean.shape, log_stddev.shape)
    return mean + jnp.exp(log_stddev) * jax.random.normal(key, shape, mean.dtype)


def kl_to_standard(mean: Float[Array, "..."], log_stddev: Float[Array, "..."]) -> Float[Array, "..."]:
    """KL(N(mean, stddev^2) || N(0, 1)) in nats, elementwise: (mean^2 + stddev^2 - 1) / 2 - log stddev.

    expm1 keeps the digits where the posterior is close to the prior.

    >>> kl_to_standard(jnp.array([0.0, 1.0]), jnp.zeros(())).round(3)
    Array([0. , 0.5], dtype=float32)
    """
    return 0.5 * (mean**2 + jnp.expm1(2.0 * log_stddev)) - log_stddev


def soft_clip(value: Float[Array, "..."], low: float, high: float, *, softness: float = 0.5) -> Float[Array, "..."]:
    """Clips smoothly to the open interval (low, high).

    The exact identity on [low + softness, high - softness]; outside, an exponential approach to the limit with a
    continuous slope that is never negative and vanishes only by underflow. Unlike a clip made of softplus, it leaves
    ordinary values untouched to the last bit.

    >>> [round(float(soft_clip(jnp.float32(value), -1.0, 1.0)), 3) for value in (-3.0, -0.6, 0.25, 3.0)]
    [-0.997, -0.591, 0.25, 0.997]
    """
    lower_knee, upper_knee = low + softness, high - softness
    # Each exponential sees only arguments at or below zero: the branch that `where` discards must not overflow, or its
    # gradient would be NaN.
    below = low + softness * jnp.exp(jnp.minimum(value - lower_knee, 0.0) / softness)
    above = high - softness * jnp.exp(jnp.minimum(upper_knee - value, 0.0) / softness)
    return jnp.where(value < lower_knee, below, jnp.where(value > upper_knee, above, value))


def _log_upper_tail(t: Float[Array, "..."]) -> Float[Array, "..."]:
    """log P(Z > t), Z ~ N(0, 1), for t >= 0."""
    return _log_mills_ratio(t) - 0.5 * t**2 - HALF_LOG_TWO_PI


def _log_mills_ratio(t: Float[Array, "..."]) -> Float[Array, "..."]:
    """log(P(Z > t) / density of Z at t), Z ~ N(0, 1), for t >= 0: what of the tail varies slowly."""
    u = 1.0 / (1.0 + t * math.sqrt(0.125))
    polynomial = functools.reduce(lambda value, coefficient: value * u + coefficient, _ERFC, jnp.zeros_like(u))
    return jnp.log(u) + polynomial + 0.5 * math.log(0.5 * math.pi)
