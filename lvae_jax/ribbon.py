"""The ribbon: points near a twisted band in space, thin across, on which a Gaussian with a diagonal covariance fails
however strong its networks, and one with a single tangent is exact. With u uniform on (-1, 1) and e ~ N(0, I),

  x = (2u + 0.02 e_1, R(phi) (0.5 e_2, 0.02 e_3)),      phi = pi (u + 1) / 2,

R(phi) the rotation of the plane by phi: across its axis the band is wide along (cos phi, sin phi) and thin beside it,
and this direction turns by pi from one end to the other. Lengths are dimensionless.

Given u, x is a Gaussian. The best one with a diagonal covariance lacks log((a + b)^2 / (4 a b)) = 1.911 nats of it on
average over all directions, a = 0.5 and b = 0.02 the two widths; that with one tangent lacks nothing. So with one
latent dimension, which tells u, no VAE with a diagonal covariance comes nearer than about 1.9 nats to -H(x). With two
it may: the second is then spent on the position across the band.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from lvae_jax.keys import as_threefry

SHAPE = (3,)
LENGTH, WIDTH, THICKNESS = 2.0, 0.5, 0.02  # of half the axis; stddevs across it, and beside the band
DIAGONAL_GAP = math.log((WIDTH + THICKNESS) ** 2 / (4.0 * WIDTH * THICKNESS))


def angle(u: Float[Array, " B"]) -> Float[Array, " B"]:
    """The angle phi of the band at each parameter u."""
    return 0.5 * jnp.pi * (u + 1.0)


def across(u: Float[Array, " B"]) -> Float[Array, "B 3"]:
    """The unit vector along which the band is wide at each parameter u."""
    phi = angle(u)
    return jnp.stack([jnp.zeros_like(phi), jnp.cos(phi), jnp.sin(phi)], axis=-1)


def nearest(x: Float[Array, "B 3"]) -> Float[Array, " B"]:
    """The parameter u in [-1, 1] of the place on the axis that is nearest to each x."""
    return jnp.clip(x[:, 0] / LENGTH, -1.0, 1.0)


def point(u: Float[Array, " B"], e: Float[Array, "B 3"]) -> Float[Array, "B 3"]:
    """x at the parameter u with the noise e."""
    wide = across(u)
    thin = jnp.stack([jnp.zeros_like(u), -wide[:, 2], wide[:, 1]], axis=-1)
    along = jnp.stack([LENGTH * u + THICKNESS * e[:, 0], jnp.zeros_like(u), jnp.zeros_like(u)], axis=-1)
    return along + WIDTH * e[:, 1:2] * wide + THICKNESS * e[:, 2:] * thin


def sample(keys: Key[Array, " B"]) -> Float[Array, "B 3"]:
    """One point for each key."""

    def one(key: Key[Array, ""]) -> tuple[Float[Array, ""], Float[Array, " 3"]]:
        u_key, noise_key = jax.random.split(key)
        return jax.random.uniform(u_key, minval=-1.0, maxval=1.0), jax.random.normal(noise_key, SHAPE)

    return point(*jax.vmap(one)(as_threefry(keys)))


def log_prob(x: Float[Array, "B 3"], *, num_nodes: int = 1000) -> Float[Array, " B"]:
    """log p(x) in nats: the mean over u of the Gaussian of x given u.

    By Gauss-Legendre quadrature; twice as many nodes change nothing by more than float32's rounding.
    """
    nodes, weights = np.polynomial.legendre.leggauss(num_nodes)
    u = jnp.asarray(nodes, jnp.float32)
    wide = across(u)
    scale = jnp.array([THICKNESS, WIDTH, THICKNESS])

    def one(x: Float[Array, " 3"]) -> Float[Array, ""]:
        offsets = [x[0] - LENGTH * u, x[1] * wide[:, 1] + x[2] * wide[:, 2], x[2] * wide[:, 1] - x[1] * wide[:, 2]]
        squares = jnp.sum((jnp.stack(offsets, axis=-1) / scale[None]) ** 2, axis=-1)
        return jax.nn.logsumexp(-0.5 * squares + jnp.asarray(np.log(0.5 * weights), jnp.float32))

    return jax.lax.map(one, x, batch_size=100) - jnp.sum(jnp.log(scale)) - 1.5 * jnp.log(2.0 * jnp.pi)


@functools.cache
def entropy() -> float:
    """H(x) of the ribbon in nats, to 1e-4: the mean ELBO of any model on it is at most -H(x)."""
    # By symmetry all places are alike but the ends, and these two. E log p at one place: Gauss-Hermite quadrature.
    edge = 8.0 * THICKNESS / LENGTH
    nodes, weights = np.polynomial.legendre.leggauss(24)
    u = np.append(1.0 - 0.5 * edge * (1.0 + nodes), 0.0)
    of_u = np.append(0.5 * edge * weights, 1.0 - edge)
    nodes, weights = np.polynomial.hermite_e.hermegauss(20)
    e = np.stack(np.meshgrid(nodes, nodes, nodes, indexing="ij"), axis=-1).reshape(-1, 3)
    of_e = np.prod(np.stack(np.meshgrid(weights, weights, weights, indexing="ij")), axis=0).ravel()
    of_e = of_e / of_e.sum()
    likely = of_e > 1e-12
    e, of_e = e[likely], of_e[likely]
    x = point(jnp.repeat(jnp.asarray(u), len(e)), jnp.tile(jnp.asarray(e), (len(u), 1)))
    return -float(of_u @ np.asarray(jax.jit(log_prob)(x), np.float64).reshape(len(u), -1) @ of_e)
