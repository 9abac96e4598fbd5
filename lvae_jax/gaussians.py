"""Elementwise arithmetic of Gaussians, in nats.

A Gaussian is a mean and a `log_stddev`, both of any shapes that broadcast. Nothing here sums: a density or a divergence
has the broadcast shape of its arguments, and the caller decides over which axes to add.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

HALF_LOG_TWO_PI = 0.5 * math.log(2.0 * math.pi)


def log_prob(x: Float[Array, "..."], mean: Float[Array, "..."], log_stddev: Float[Array, "..."]) -> Float[Array, "..."]:
    """log N(x; mean, stddev^2) in nats, elementwise.

    The residual is standardised before it is squared, so that a small stddev neither overflows nor divides by zero.
    """
    standardised = (x - mean) * jnp.exp(-log_stddev)
    return -0.5 * standardised**2 - log_stddev - HALF_LOG_TWO_PI


def sample(key: Key[Array, ""], mean: Float[Array, "..."], log_stddev: Float[Array, "..."]) -> Float[Array, "..."]:
    """A reparameterised draw mean + stddev * noise, of the broadcast shape of mean and log_stddev."""
    shape = jnp.broadcast_shapes(mean.shape, log_stddev.shape)
    return mean + jnp.exp(log_stddev) * jax.random.normal(key, shape, mean.dtype)


def kl_to_standard(mean: Float[Array, "..."], log_stddev: Float[Array, "..."]) -> Float[Array, "..."]:
    """KL(N(mean, stddev^2) || N(0, 1)) in nats, elementwise: (mean^2 + stddev^2 - 1) / 2 - log stddev.

    expm1 keeps the digits where the posterior is close to the prior.
    """
    return 0.5 * (mean**2 + jnp.expm1(2.0 * log_stddev)) - log_stddev


def soft_clip(value: Float[Array, "..."], low: float, high: float, *, softness: float = 0.5) -> Float[Array, "..."]:
    """Clips smoothly to the open interval (low, high).

    The exact identity on [low + softness, high - softness]; outside, an exponential approach to the limit with a
    continuous slope that is never negative and vanishes only by underflow. Unlike a clip made of softplus, it leaves
    ordinary values untouched to the last bit.
    """
    lower_knee, upper_knee = low + softness, high - softness
    # Each exponential sees only arguments at or below zero: the branch that `where` discards must not overflow, or its
    # gradient would be NaN.
    below = low + softness * jnp.exp(jnp.minimum(value - lower_knee, 0.0) / softness)
    above = high - softness * jnp.exp(jnp.minimum(upper_knee - value, 0.0) / softness)
    return jnp.where(value < lower_knee, below, jnp.where(value > upper_knee, above, value))
