"""Elementwise arithmetic of logistic distributions, in nats, as `gaussians` has it of Gaussians.

A logistic distribution is a mean and a `log_stddev`, both of any shapes that broadcast. Its scale, by which the
literature describes it, is stddev sqrt(3) / pi. Compared with a Gaussian of the same stddev it has a sharper peak and
longer tails: its log density falls as |t|, not as t^2 / 2. Its cdf is the sigmoid, so that the mass of an interval is
in closed form.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

LOG_SCALE = 0.5 * math.log(3.0) - math.log(math.pi)  # of the logistic distribution with stddev 1


def log_prob(x: Float[Array, "..."], mean: Float[Array, "..."], log_stddev: Float[Array, "..."]) -> Float[Array, "..."]:
    """The log density at x in nats, elementwise.

    >>> [round(float(value), 2) for value in log_prob(jnp.array([0.0, 1.0]), jnp.zeros(()), jnp.zeros(()))]
    [-0.79, -1.52]
    """
    log_scale = log_stddev + LOG_SCALE
    # By symmetry of |x - mean|, so that the exponential cannot overflow.
    t = jnp.abs(x - mean) * jnp.exp(-log_scale)
    return -t - 2.0 * jnp.log1p(jnp.exp(-t)) - log_scale


def log_cdf(x: Float[Array, "..."], mean: Float[Array, "..."], log_stddev: Float[Array, "..."]) -> Float[Array, "..."]:
    """log P(X < x) in nats, elementwise; exact to float32, as are its gradients, in both tails."""
    return jax.nn.log_sigmoid((x - mean) * jnp.exp(-(log_stddev + LOG_SCALE)))


def log_bin_mass(
    x: Float[Array, "..."], mean: Float[Array, "..."], log_stddev: Float[Array, "..."]
) -> Float[Array, "..."]:
    """log P(x - 1/2 < X < x + 1/2) in nats, elementwise; exact to float32, as are its gradients, for bins of any width
    in stddevs and far into the tails. Never above zero.

    With s the sigmoid, s(b) - s(a) = s(b) s(-a) (1 - exp(a - b)), in which nothing cancels.
    """
    width = jnp.exp(-(log_stddev + LOG_SCALE))
    # By symmetry in the right tail, where log_sigmoid keeps its digits.
    near, far = ((jnp.abs(x - mean) + half) * width for half in (-0.5, 0.5))
    return jax.nn.log_sigmoid(far) + jax.nn.log_sigmoid(-near) + jnp.log(-jnp.expm1(-width))


def sample(key: Key[Array, ""], mean: Float[Array, "..."], log_stddev: Float[Array, "..."]) -> Float[Array, "..."]:
    """A reparameterised draw mean + stddev * noise, of the broadcast shape of mean and log_stddev."""
    shape = jnp.broadcast_shapes(mean.shape, log_stddev.shape)
    return mean + jnp.exp(log_stddev + LOG_SCALE) * jax.random.logistic(key, shape, mean.dtype)
