"""The toy of the paper's Fig. 3: points on a cosine-like curve in the plane, in three regions of moderate, small and
large noise; its exact density and entropy, and the best ELBO that any VAE with one fixed sigma can reach on it.

The paper's equations are lost; these are ours. With u uniform on (-1, 1),

  curve(u) = (pi u, cos(pi u)),      x ~ N(curve(u), noise(u)^2 I),

noise(u) = 0.05 on the left third, 0.02 on the middle third and 0.1 on the right third. Lengths are dimensionless; the
largest standard deviation of the data along any direction, their critical sigma, is sqrt(pi^2 / 3 + mean of noise^2) =
1.81.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from lvae_jax.keys import as_threefry

SHAPE = (2,)
NOISE = (0.05, 0.02, 0.1)

_CELL = 0.02  # side of a cell, the smallest noise: the trapezoid rule's error, 2 exp(-2 pi^2), is below 1e-8


def curve(u: Float[Array, " B"]) -> Float[Array, "B 2"]:
    """The noiseless point at each parameter u in (-1, 1)."""
    return jnp.stack([jnp.pi * u, jnp.cos(jnp.pi * u)], axis=-1)


def tangent(u: Float[Array, " B"]) -> Float[Array, "B 2"]:
    """The unit vector along the curve at each parameter u."""
    slope = -jnp.sin(jnp.pi * u)
    return jnp.stack([jnp.ones_like(u), slope], axis=-1) / jnp.sqrt(1.0 + slope**2)[:, None]


def noise(u: Float[Array, " B"]) -> Float[Array, " B"]:
    """The stddev of the isotropic noise at each parameter u."""
    left, middle, right = NOISE
    return jnp.where(u < -1 / 3, left, jnp.where(u < 1 / 3, middle, right))


def sample(keys: Key[Array, " B"]) -> Float[Array, "B 2"]:
    """One point for each key."""

    def one(key: Key[Array, ""]) -> tuple[Float[Array, ""], Float[Array, " 2"]]:
        u_key, noise_key = jax.random.split(key)
        return jax.random.uniform(u_key, minval=-1.0, maxval=1.0), jax.random.normal(noise_key, SHAPE)

    u, standard = jax.vmap(one)(as_threefry(keys))
    return curve(u) + noise(u)[:, None] * standard


def nearest(x: Float[Array, "B 2"]) -> Float[Array, " B"]:
    """The parameter u in [-1, 1] of the point on the curve that is nearest to each x.

    By Newton's method from the best of 1,001 points on the curve, which are no further apart than 0.01.
    """
    nodes = jnp.linspace(-1.0, 1.0, 1001)
    u = nodes[jnp.argmin(jnp.sum((x[:, None] - curve(nodes)[None]) ** 2, axis=-1), axis=1)]
    for _ in range(3):
        gap = x - curve(u)
        slope, bend = jnp.pi * jnp.sin(jnp.pi * u), jnp.pi**2 * jnp.cos(jnp.pi * u)  # of -cos(pi u)
        gradient = -jnp.pi * gap[:, 0] + slope * gap[:, 1]
        curvature = jnp.pi**2 + slope**2 + bend * gap[:, 1]
        # At a centre of curvature the distance has no curvature, and the node is good enough.
        u = jnp.clip(u - jnp.where(curvature > 1.0, gradient / curvature, 0.0), -1.0, 1.0)
    return u


def offset(x: Float[Array, "B 2"], u: Float[Array, " B"]) -> Float[Array, " B"]:
    """The signed distance of each x from the curve's tangent at u, positive above it; at u = `nearest`(x) within (-1,
    1) its magnitude is the distance from the curve."""
    slope = -jnp.sin(jnp.pi * u)  # of the tangent: dy / dx
    gap = x - curve(u)
    return (gap[:, 1] - slope * gap[:, 0]) / jnp.sqrt(1.0 + slope**2)


def noise_kept(reconstructions: Float[Array, "B 2"], x: Float[Array, "B 2"]) -> Float[Array, ""]:
    """The part of the noise of x, its offset from the curve, that reconstructions keep: the slope of their offset, from
    the same tangent, on that of x. 1 copies the noise, 0 removes it."""
    u = nearest(x)
    noise = offset(x, u)
    return jnp.sum(offset(reconstructions, u) * noise) / jnp.sum(noise**2)


def band_widths(x: Float[Array, "B 2"]) -> Float[Array, " 3"]:
    """The width of the band of points around the curve in each of its three regions: the quantile of their distances at
    which Gaussian offsets would have their stddev, 0.683. 0 for a region without points."""
    u = nearest(x)
    distance = jnp.linalg.norm(x - curve(u), axis=-1)
    region = jnp.where(u < -1 / 3, 0, jnp.where(u < 1 / 3, 1, 2))
    rank = jnp.arange(len(x), dtype=x.dtype)

    def width(index: int) -> Float[Array, ""]:
        # Points of other regions come last. A NaN as their mark would stop a program under jax_debug_nans.
        size = jnp.sum(region == index, dtype=x.dtype)
        ordered = jnp.sort(jnp.where(region == index, distance, jnp.inf))
        return jnp.interp(0.6827 * (size - 1), rank, jnp.where(rank < size, ordered, 0.0))

    return jnp.stack([width(index) for index in range(3)])


def log_prob(x: Float[Array, "B 2"], *, num_nodes: int = 400) -> Float[Array, " B"]:
    """log p(x) in nats: the mean over u of N(x; curve(u), noise(u)^2 I).

    By Gauss-Legendre quadrature with `num_nodes` nodes in each region, at the middle no further apart on the curve than
    half the smallest noise: 800 nodes change nothing by more than float32's rounding.
    """
    nodes, weights = _legendre(num_nodes)
    u = jnp.asarray(((nodes + np.array([[-2.0], [0.0], [2.0]])) / 3.0).ravel(), jnp.float32)
    log_weights = jnp.log(jnp.asarray(np.tile(weights, 3) / 6.0, jnp.float32))
    stddev = noise(u)
    squared_distance = jnp.sum(((x[:, None] - curve(u)[None]) / stddev[None, :, None]) ** 2, axis=-1)
    log_density = -0.5 * squared_distance - 2.0 * jnp.log(stddev)[None] - jnp.log(2.0 * jnp.pi)
    return jax.nn.logsumexp(log_density + log_weights[None], axis=1)


def entropy() -> float:
    """H(x) of the toy in nats, to 1e-6: the mean ELBO of any model on it is at most -H(x)."""
    _, _, mass = _cells()
    return float(-np.sum(mass * np.log(np.maximum(mass, 1e-300) / _CELL**2)))


def best_elbo(sigma: float, *, tolerance: float = 2e-3, max_steps: int = 300) -> tuple[float, float]:
    """The largest mean ELBO, in nats, that a VAE with this fixed isotropic sigma can reach on the toy, in an interval
    (low, high): no VAE exceeds `high`, and the limit of ideal networks is at least `low`.

    Up to the smallest noise it is -H(x): there the toy is itself such a mixture. Above, the mixing law on a grid
    follows EM, accelerated by Nesterov's momentum on its logarithm, until its own bound is within `tolerance` or for
    `max_steps`. `low` is its log likelihood; `high` adds log max_m E_x[N(x; m, sigma^2 I) / p(x)], which bounds the
    gain of any other law (Lindsay, The geometry of mixture likelihoods, 1983).

    Raises:
      ValueError: sigma is not positive.
    """
    if not 0.0 < sigma < math.inf:
        raise ValueError(f"sigma must be a positive number, got {sigma}")
    if sigma <= min(NOISE):
        return -entropy(), -entropy()
    *axes, mass = _cells()
    mass = np.where(mass > 1e-7 * mass.max(), mass, 0.0)  # the rest, 1e-7 of all, is worth less than 1e-5 nats
    spacing = max(_CELL, 0.125 * sigma)  # of the law's nodes

    def kernels(spacing: float) -> tuple[np.ndarray, np.ndarray]:
        """N(x; m, sigma^2) without its constant, along either axis, [cells, nodes m]."""
        nodes = (np.arange(axis[0], axis[-1] + spacing, spacing) for axis in axes)
        across, along = (np.exp(-0.5 * ((axis[:, None] - m) / sigma) ** 2) for axis, m in zip(axes, nodes, strict=True))
        return across, along

    across, along = kernels(spacing)
    log_constant = -math.log(2.0 * math.pi * sigma**2)
    log_law = momentum = np.zeros((across.shape[1], along.shape[1]))
    num_good, low, high, best = 0, -math.inf, math.inf, mass
    for _ in range(max_steps):
        law = np.exp(momentum - momentum.max())
        mixture = np.maximum(across @ law @ along.T / law.sum(), 1e-300)
        last, low = low, float(np.sum(mass * np.log(mixture)))
        gain = np.maximum(across.T @ (mass / mixture) @ along, 1e-300)
        bound = low + float(np.log(gain.max()))
        if bound < high:
            high, best = bound, mixture
        if high - low <= tolerance:
            break
        num_good = num_good + 1 if low >= last else 1  # restarts where momentum has carried too far
        before, log_law = log_law, momentum + np.log(gain)
        momentum = log_law + (num_good - 1) / (num_good + 2) * (log_law - before)
        momentum = np.maximum(momentum - momentum.max(), -80.0)  # nothing is lost for ever
    # Between nodes the largest gain is larger still, but not by much: its second derivative in any direction is at
    # least -gain / sigma^2, and nodes sigma / 16 apart lie within sigma / sqrt(512) of it.
    across, along = kernels(sigma / 16.0)
    largest = (across.T @ (mass / best) @ along).max() / (1.0 - 1.0 / 1024.0)
    high = float(np.sum(mass * np.log(best)) + np.log(largest))
    return low + log_constant, high + log_constant


@functools.cache
def _cells() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The centres of a grid of cells along both axes, [X] and [Y], and the mass of the toy in each, [X, Y]."""
    with jax.enable_x64(True):
        nodes, weights = _legendre(600)
        u = jnp.asarray((nodes + np.array([[-2.0], [0.0], [2.0]])) / 3.0).ravel()
        centres, stddevs = np.asarray(curve(u)), np.asarray(noise(u))
    reach = 8.0 * max(NOISE)
    axes = [np.arange(c.min() - reach, c.max() + reach, _CELL) for c in centres.T]
    x, y = (np.exp(-0.5 * ((a[:, None] - c) / stddevs) ** 2) / stddevs for a, c in zip(axes, centres.T, strict=True))
    density = (x * np.tile(weights, 3) / 6.0) @ y.T / (2.0 * math.pi)
    return *axes, density * _CELL**2


@functools.cache
def _legendre(num_nodes: int) -> tuple[np.ndarray, np.ndarray]:
    return np.polynomial.legendre.leggauss(num_nodes)
