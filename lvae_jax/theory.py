"""The limits of the best possible VAE, computed exactly: the yardsticks of every experiment.

Two kinds of data have limits here; `toy` has its own. All lengths share the unit of the data and of sigma; densities
and ELBOs are in nats.

  the sphere      Theorem 1: data uniform on the sphere of radius R in R^n, an F-VAE with arbitrarily powerful networks
  any data set    the principal stddevs: a fixed-sigma decoder ignores every direction whose stddev is below sigma; and
                  the largest eigenvalue of the correlation matrix, which is the same for a learned sigma of each
                  dimension

A VAE with a fixed isotropic sigma models x by a mixture of Gaussians N(m, sigma^2 I), m the decoder's output: its
mean ELBO is at most max over mixing laws of E_x log E_m N(x; m, sigma^2 I), the limit of ideal networks. By symmetry
the best law on the sphere is uniform on a concentric one. Tangents, a covariance sigma^2 I + U U^T, do not move this
limit: such a Gaussian is itself a mixture of N(m, sigma^2 I).
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lvae_jax import bessel

# Theorem 1


def critical_sigma(*, radius: float = 1.0, dim: int) -> float:
    """R / sqrt(n): an F-VAE with this sigma or a larger one loses the sphere of radius R in R^n.

    >>> critical_sigma(radius=2.0, dim=4)
    1.0

    Raises:
      ValueError: dim is below 2.
    """
    bessel.check_dim(dim)
    return radius / math.sqrt(dim)


def objective(
    rho: Float[Array, "..."] | float, sigma: Float[Array, "..."] | float, *, radius: float = 1.0, dim: int
) -> Float[Array, "..."]:
    """f(rho) of Eq. 8, in nats: the part of the best ELBO that depends on the radius rho >= 0 of the decoder's outputs.

    f(rho) = -rho^2 / (2 sigma^2) + log E exp(rho R u_1 / sigma^2),  u uniform on the unit sphere of R^n

    Raises:
      ValueError: dim is below 2.
    """
    rho, sigma = bessel.floating(rho), bessel.floating(sigma)
    tilt = bessel.log_mean_exp(rho * radius / sigma**2, dim=dim, scaled=True)
    return tilt + (radius**2 - (radius - rho) ** 2) / (2.0 * sigma**2)


def optimal_radius(sigma: Float[Array, "*S"] | float, *, radius: float = 1.0, dim: int) -> Float[Array, "*S"]:
    """The radius rho >= 0 that maximises `objective`: Theorem 1.

    0 if and only if sigma >= R / sqrt(n); below, the one positive solution of rho = R A_n(rho R / sigma^2). Its slope
    is unbounded at the transition.

    >>> [round(float(optimal_radius(sigma, dim=3)), 3) for sigma in (0.1, 0.3, 0.5, 0.6)]  # 0.577 is critical
    [0.99, 0.9, 0.6, 0.0]

    Raises:
      ValueError: dim is below 2.
    """
    sigma = bessel.floating(sigma)
    concentration = (radius / sigma) ** 2
    above = sigma >= critical_sigma(radius=radius, dim=dim)
    concentration = jnp.where(above, 2.0 * dim, concentration)  # a value at which nothing is singular
    # With x = rho / R and c = R^2 / sigma^2: the root of the concave g(x) = A_n(c x) - x. Amos' bound A_n(k) < k / (n/2
    # - 1 + sqrt(k^2 + (n/2 + 1)^2)) gives a start above it, exact in both limits, from which Newton's steps descend.
    fixed = jax.lax.stop_gradient(concentration)

    def ratio_and_slope(x: Array) -> tuple[Array, Array]:
        return jax.jvp(lambda k: bessel.ratio(k, dim=dim), (fixed * x,), (fixed,))

    def newton(_: Any, x: Array) -> Array:
        ratio, slope = ratio_and_slope(x)
        return x - (ratio - x) / (slope - 1.0)

    x = jax.lax.fori_loop(0, 6, newton, jnp.sqrt(fixed - dim) * jnp.sqrt(fixed + 2.0) / fixed)
    slope = ratio_and_slope(x)[1]
    # x is a constant until here; its slope is that of the implicit function: dx = A'(c x) (x dc + c dx).
    k = fixed * x + x / (1.0 - slope) * (concentration - fixed)
    return jnp.where(above, 0.0, radius * bessel.ratio(k, dim=dim))


def best_elbo(sigma: Float[Array, "*S"] | float, *, radius: float = 1.0, dim: int) -> Float[Array, "*S"]:
    """The largest ELBO, in nats, that a VAE with this fixed sigma can reach on the sphere of radius R in R^n:
    -(n/2) log(2 pi sigma^2) - R^2 / (2 sigma^2) + max f. It grows without bound as sigma -> 0: the data have no noise.

    Raises:
      ValueError: dim is below 2.
    """
    sigma = bessel.floating(sigma)
    rho = jax.lax.stop_gradient(optimal_radius(sigma, radius=radius, dim=dim))
    # What objective adds and this takes away would cost digits where sigma is small.
    tilt = bessel.log_mean_exp(rho * radius / sigma**2, dim=dim, scaled=True)
    return tilt - 0.5 * ((radius - rho) / sigma) ** 2 - 0.5 * dim * jnp.log(2.0 * jnp.pi * sigma**2)


# Any data set


class Spread(NamedTuple):
    """The spread of data about their mean.

    Attributes:
      principal_stddevs: see the function of this name.
      stddevs: [D], of each dimension. An LV-VAE that encodes nothing has them as its sigma, and an LS-VAE the root of
        their mean square.
      correlation: the largest eigenvalue of the correlation matrix of the dimensions that vary: 1 if they are
        uncorrelated, at most their number; 0 if none varies. Measured in the sigma of an LV-VAE that encodes nothing,
        the data have this matrix as their covariance, so that it can stay there only if `correlation` is 1.
      chance: about the largest `correlation` of N examples whose D dimensions, those that vary, are independent:
        (1 + sqrt(D / N))^2 (Marchenko and Pastur, 1967).
    """

    principal_stddevs: Float[np.ndarray, " R"]
    stddevs: Float[np.ndarray, " D"]
    correlation: float
    chance: float


def spread(chunks: Iterable[Float[np.ndarray, "B *S"]]) -> Spread:
    """The spread of the data in `chunks`, in their unit; arguments and errors are those of `principal_stddevs`. It
    takes once more the memory for these numbers."""
    size, mean, rows, scatter = _second_moments(chunks)
    squares = np.square(rows).sum(axis=0) if scatter is None else np.diagonal(scatter)
    stddevs = np.sqrt(squares / size)
    varies = stddevs > 1e-9 * max(stddevs.max(), np.abs(mean).max())  # the mean of equal numbers is off by rounding
    scales = np.where(varies, stddevs, np.inf)
    found = _principal_stddevs(size, rows.copy(), None if scatter is None else scatter.copy(order="F"))
    rows /= scales[None]
    if scatter is not None:
        scatter /= scales[:, None]
        scatter /= scales[None]
    correlation = float(_principal_stddevs(size, rows, scatter)[0]) ** 2
    return Spread(found, stddevs, correlation, chance=(1.0 + math.sqrt(varies.sum() / size)) ** 2)


def principal_stddevs(chunks: Iterable[Float[np.ndarray, "B *S"]]) -> Float[np.ndarray, " R"]:
    """The stddev of the data along each principal direction, largest first, in the data's unit: the square roots of
    the eigenvalues of their covariance. The first is the critical sigma: a Gaussian decoder with a larger one, fixed,
    learns nothing but the mean.

    Args:
      chunks: the N examples in parts, each read once, of D dimensions each. Memory holds min(N, D) x D float64 numbers
        and, in the type that they came in, at most D examples and a chunk.

    Returns:
      R = min(N, D) values; all others are 0.

    Raises:
      ValueError: there is no example, or one has a value that is not finite.
    """
    size, _, rows, scatter = _second_moments(chunks)
    return _principal_stddevs(size, rows, scatter)


def _principal_stddevs(size: int, rows: np.ndarray, scatter: np.ndarray | None) -> Float[np.ndarray, " R"]:
    """The principal stddevs, given what `_second_moments` returns, which is overwritten."""
    import scipy.linalg  # here, so that the library's import need not wait for it

    if scatter is None:
        return scipy.linalg.svdvals(rows.T, overwrite_a=True, check_finite=False) / math.sqrt(size)
    eigenvalues = scipy.linalg.eigvalsh(scatter, lower=False, overwrite_a=True, check_finite=False)
    return np.sqrt(np.maximum(eigenvalues[::-1] / size, 0.0))


def _second_moments(
    chunks: Iterable[Float[np.ndarray, "B *S"]],
) -> tuple[int, Float[np.ndarray, " D"], Float[np.ndarray, "N D"], Float[np.ndarray, "D D"] | None]:
    """The number of examples, their mean, and either the centred examples, which serve where they are fewer than their
    dimensions, or the sums of their products, of which the upper triangle is filled."""
    import scipy.linalg

    size, seen, mean = 0, 0, np.zeros(())
    scatter: np.ndarray | None = None
    waiting: list[np.ndarray] = []

    def merge(rows: np.ndarray) -> None:
        # Chan, Golub and LeVeque 1983: exact sums of squares about the mean so far, in one pass.
        nonlocal size, mean
        centre = rows.mean(axis=0, dtype=np.float64)
        step, total = centre - mean, size + len(rows)
        # The shift of the mean is one more row. The product is added in place: D x D numbers once, not three times.
        centred = np.vstack([rows - centre[None], math.sqrt(size * len(rows) / total) * step[None]])
        scipy.linalg.blas.dsyrk(1.0, centred.T, beta=1.0, c=scatter, overwrite_c=True)
        size, mean = total, mean + (len(rows) / total) * step

    for chunk in chunks:
        rows = np.asarray(chunk).reshape(len(chunk), -1)
        bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
        if len(bad):
            raise ValueError(f"`chunks`: example {seen + bad[0]} has a value that is not finite")
        seen += len(rows)
        waiting.append(rows)
        if seen > rows.shape[1]:  # more examples than dimensions: their covariance is smaller
            scatter = np.zeros(2 * rows.shape[1:], order="F") if scatter is None else scatter
            while waiting:
                merge(waiting.pop(0))
    if scatter is not None:
        return size, mean, np.zeros((0, len(mean))), scatter
    if not seen:
        raise ValueError("there is no example")
    rows = np.concatenate(waiting, dtype=np.float64)
    mean = rows.mean(axis=0)
    rows -= mean[None]
    return seen, mean, rows, None


def linear_best_elbo(
    sigma: Float[np.ndarray, "*T"] | float, stddevs: Float[np.ndarray, " R"], *, num_dimensions: int, latent_size: int
) -> Float[np.ndarray, "*T"]:
    """The largest mean ELBO, in nats, of a VAE with this fixed sigma whose encoder and decoder are linear, on data with
    these principal stddevs.

    It is the likelihood of probabilistic PCA (Tipping and Bishop, 1999) at its maximum: the bound is tight, and the
    decoder uses those directions, `latent_size` at most, whose stddev exceeds sigma (Lucas et al., Don't blame the
    ELBO, 2019). Networks that are not linear may exceed it. With `likelihoods.tangent` of rank r it is that of
    `latent_size` + r.
    """
    variances = np.asarray(stddevs, np.float64) ** 2
    noise = np.asarray(sigma, np.float64)[..., None] ** 2
    used = (variances > noise) & (np.arange(len(variances)) < latent_size)
    covariance = np.where(used, variances, noise)
    terms = np.log(covariance) + variances / covariance
    unseen = (num_dimensions - len(variances)) * np.log(noise[..., 0])
    return np.asarray(-0.5 * (num_dimensions * math.log(2.0 * math.pi) + terms.sum(axis=-1) + unseen))


def least_rate(
    distortion: Float[np.ndarray, " P"],
    sigma: Float[np.ndarray, " T"],
    best_elbo: Float[np.ndarray, " T"],
    *,
    num_dimensions: int,
) -> Float[np.ndarray, " P"]:
    """A lower bound on the rate, E KL(q(z|x) || p(z)) in nats, of every VAE whose squared error of an example is
    `distortion` on average, given the largest ELBO of any networks at each of T fixed sigmas; not below 0.

    At a fixed sigma, ELBO = -D / (2 sigma^2) - (n/2) log(2 pi sigma^2) - R, for a distortion D and a rate R that do not
    depend on it. No VAE is above the best ELBO at any sigma: each bounds the rate by a line in D, and this is the
    largest of these bounds.

    >>> best = linear_best_elbo(np.array([0.5, 1.0]), np.array([2.0]), num_dimensions=1, latent_size=1)
    >>> least_rate(np.array([1.0]), np.array([0.5, 1.0]), best, num_dimensions=1).round(3)  # log(2 / 1): Gaussian
    array([0.693])
    """
    log_likelihood = -0.5 * (distortion[:, None] / sigma**2 + num_dimensions * np.log(2.0 * np.pi * sigma**2))
    return np.maximum(np.max(log_likelihood - best_elbo, axis=1), 0.0)
