"""What the best possible VAE can reach, computed exactly: the yardsticks of every experiment.

Three kinds of data have limits here. All lengths share the unit of the data and of sigma; densities, entropies and
ELBOs are in nats.

  the sphere      Theorem 1: data uniform on the sphere of radius R in R^n, an F-VAE with arbitrarily powerful networks
  the toy         the entropy of its density, and the best ELBO of any F-VAE
  any data set    the principal stddevs: a fixed-sigma decoder ignores every direction whose stddev is below sigma; and
                  the largest eigenvalue of the correlation matrix, which is the same for a learned sigma of each
                  dimension

A VAE with a fixed isotropic sigma models x by a mixture of Gaussians N(m, sigma^2 I), m the decoder's output: its
mean ELBO is at most max over mixing laws of E_x log E_m N(x; m, sigma^2 I), the limit of ideal networks. By symmetry
the best law on the sphere is uniform on a concentric one; on the toy it is found by the EM algorithm.
"""

import functools
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from numpy.polynomial import Polynomial

from lvae_jax import toy

# The uniform expansion of Bessel functions in 1 / order is used from this order on, with this many terms: float64
# needs no more. Lower orders follow by recurrence.
_ORDER, _NUM_TERMS = 24, 10


def bessel_ratio(k: Float[Array, "*S"] | float, *, dim: int) -> Float[Array, "*S"]:
    """A_n(k) = I_{n/2}(k) / I_{n/2 - 1}(k) for k >= 0 and n = `dim` >= 2: E u_1 under the density exp(k u_1) on the
    unit sphere of R^n.

    To the last few digits for all k and n. A_n = k / (n + k A_{n+2}) leads down from orders at which the expansion of
    Olver (DLMF 10.41) converges, without a subtraction.

    Raises:
      ValueError: dim is below 2.
    """
    return _bessel_ratio(_floating(k), dim)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _bessel_ratio(k: Array, dim: int) -> Array:
    return _ratios(k, dim)[-1][0]


@_bessel_ratio.defjvp
def _bessel_ratio_jvp(dim: int, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
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
    return _log_mean_exp(_floating(k), dim, scaled)


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
    slope = _bessel_ratio(k, dim)
    return _log_mean_exp(k, dim, scaled), (slope - 1.0 if scaled else slope) * tangent


def _floating(x: Array | np.ndarray | float) -> Array:
    return jnp.asarray(x, jnp.result_type(x, float))


def _order(dim: int) -> tuple[float, int]:
    """The order at which the expansion is used, and the steps of the recurrence from there down to dim / 2 - 1."""
    _check_dim(dim)
    num_steps = max(0, math.ceil(_ORDER - (dim / 2 - 1)))
    return dim / 2 - 1 + num_steps, num_steps


def _check_dim(dim: int) -> None:
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


# Theorem 1


def critical_sigma(*, radius: float = 1.0, dim: int) -> float:
    """R / sqrt(n): an F-VAE with this sigma or a larger one loses the sphere of radius R in R^n.

    >>> critical_sigma(radius=2.0, dim=4)
    1.0

    Raises:
      ValueError: dim is below 2.
    """
    _check_dim(dim)
    return radius / math.sqrt(dim)


def objective(
    rho: Float[Array, "..."] | float, sigma: Float[Array, "..."] | float, *, radius: float = 1.0, dim: int
) -> Float[Array, "..."]:
    """f(rho) of Eq. 8, in nats: the part of the best ELBO that depends on the radius rho >= 0 of the decoder's outputs.

    f(rho) = -rho^2 / (2 sigma^2) + log E exp(rho R u_1 / sigma^2),  u uniform on the unit sphere of R^n

    Raises:
      ValueError: dim is below 2.
    """
    rho, sigma = _floating(rho), _floating(sigma)
    tilt = log_mean_exp(rho * radius / sigma**2, dim=dim, scaled=True)
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
    sigma = _floating(sigma)
    concentration = (radius / sigma) ** 2
    above = sigma >= critical_sigma(radius=radius, dim=dim)
    concentration = jnp.where(above, 2.0 * dim, concentration)  # a value at which nothing is singular
    # With x = rho / R and c = R^2 / sigma^2: the root of the concave g(x) = A_n(c x) - x. Amos' bound A_n(k) < k / (n/2
    # - 1 + sqrt(k^2 + (n/2 + 1)^2)) gives a start above it, exact in both limits, from which Newton's steps descend.
    fixed = jax.lax.stop_gradient(concentration)

    def ratio_and_slope(x: Array) -> tuple[Array, Array]:
        return jax.jvp(lambda k: bessel_ratio(k, dim=dim), (fixed * x,), (fixed,))

    def newton(_: Any, x: Array) -> Array:
        ratio, slope = ratio_and_slope(x)
        return x - (ratio - x) / (slope - 1.0)

    x = jax.lax.fori_loop(0, 6, newton, jnp.sqrt(fixed - dim) * jnp.sqrt(fixed + 2.0) / fixed)
    slope = ratio_and_slope(x)[1]
    # x is a constant until here; its slope is that of the implicit function: dx = A'(c x) (x dc + c dx).
    k = fixed * x + x / (1.0 - slope) * (concentration - fixed)
    return jnp.where(above, 0.0, radius * bessel_ratio(k, dim=dim))


def best_elbo(sigma: Float[Array, "*S"] | float, *, radius: float = 1.0, dim: int) -> Float[Array, "*S"]:
    """The largest ELBO, in nats, that a VAE with this fixed sigma can reach on the sphere of radius R in R^n:
    -(n/2) log(2 pi sigma^2) - R^2 / (2 sigma^2) + max f. It grows without bound as sigma -> 0: the data have no noise.

    Raises:
      ValueError: dim is below 2.
    """
    sigma = _floating(sigma)
    rho = jax.lax.stop_gradient(optimal_radius(sigma, radius=radius, dim=dim))
    # What objective adds and this takes away would cost digits where sigma is small.
    tilt = log_mean_exp(rho * radius / sigma**2, dim=dim, scaled=True)
    return tilt - 0.5 * ((radius - rho) / sigma) ** 2 - 0.5 * dim * jnp.log(2.0 * jnp.pi * sigma**2)


# The toy

_CELL = 0.02  # side of a cell, the smallest noise: the trapezoid rule's error, 2 exp(-2 pi^2), is below 1e-8


def toy_entropy() -> float:
    """H(x) of the toy in nats, to 1e-6: the mean ELBO of any model on it is at most -H(x)."""
    _, _, mass = _toy_cells()
    return float(-np.sum(mass * np.log(np.maximum(mass, 1e-300) / _CELL**2)))


def toy_best_elbo(sigma: float, *, tolerance: float = 2e-3, max_steps: int = 300) -> tuple[float, float]:
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
    if sigma <= min(toy.NOISE):
        return -toy_entropy(), -toy_entropy()
    *axes, mass = _toy_cells()
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
def _toy_cells() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The centres of a grid of cells along both axes, [X] and [Y], and the mass of the toy in each, [X, Y]."""
    with jax.enable_x64(True):
        nodes, weights = np.polynomial.legendre.leggauss(600)
        u = jnp.asarray((nodes + np.array([[-2.0], [0.0], [2.0]])) / 3.0).ravel()
        centres, noise = np.asarray(toy.curve(u)), np.asarray(toy.noise(u))
    reach = 8.0 * max(toy.NOISE)
    axes = [np.arange(c.min() - reach, c.max() + reach, _CELL) for c in centres.T]
    x, y = (np.exp(-0.5 * ((a[:, None] - c) / noise) ** 2) / noise for a, c in zip(axes, centres.T, strict=True))
    density = (x * np.tile(weights, 3) / 6.0) @ y.T / (2.0 * math.pi)
    return *axes, density * _CELL**2


# Any data set


class Spread(NamedTuple):
    """How data spread about their mean.

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
    """How the data in `chunks` spread, in their unit; arguments and errors are those of `principal_stddevs`."""
    size, mean, rows, scatter = _second_moments(chunks)
    squares = np.square(rows).sum(axis=0) if scatter is None else np.diagonal(scatter)
    stddevs = np.sqrt(squares / size)
    varies = stddevs > 1e-9 * max(stddevs.max(), np.abs(mean).max())  # the mean of equal numbers is off by rounding
    scales = np.where(varies, stddevs, np.inf) * math.sqrt(size)
    if scatter is None:
        correlation = np.linalg.svd(rows / scales[None], compute_uv=False)[0] ** 2
    else:
        correlation = np.linalg.eigvalsh(scatter / np.outer(scales, scales))[-1]
    chance = (1.0 + math.sqrt(varies.sum() / size)) ** 2
    return Spread(_principal_stddevs(size, rows, scatter), stddevs, float(correlation), chance)


def principal_stddevs(chunks: Iterable[Float[np.ndarray, "B *S"]]) -> Float[np.ndarray, " R"]:
    """The stddev of the data along each principal direction, largest first, in the data's unit: the square roots of
    the eigenvalues of their covariance. The first is the critical sigma: a Gaussian decoder with a larger one, fixed,
    learns nothing but the mean.

    Args:
      chunks: the N examples in parts, each read once, of D dimensions each; memory holds min(N, D) x D float64 numbers.

    Returns:
      R = min(N, D) values; all others are 0.

    Raises:
      ValueError: there is no example.
    """
    size, _, rows, scatter = _second_moments(chunks)
    return _principal_stddevs(size, rows, scatter)


def _principal_stddevs(size: int, rows: np.ndarray, scatter: np.ndarray | None) -> Float[np.ndarray, " R"]:
    if scatter is None:
        return np.linalg.svd(rows, compute_uv=False) / math.sqrt(size)
    return np.sqrt(np.maximum(np.linalg.eigvalsh(scatter)[::-1] / size, 0.0))


def _second_moments(
    chunks: Iterable[Float[np.ndarray, "B *S"]],
) -> tuple[int, Float[np.ndarray, " D"], Float[np.ndarray, "N D"], Float[np.ndarray, "D D"] | None]:
    """The number of examples, their mean, and either the centred examples, which serve where they are fewer than their
    dimensions, or the sums of their products."""
    size, mean, scatter = 0, np.zeros(()), np.zeros(())
    waiting: list[np.ndarray] = []

    def merge(rows: np.ndarray) -> None:
        # Chan, Golub and LeVeque 1983: exact sums of squares about the mean so far, in one pass.
        nonlocal size, mean, scatter
        centre = rows.mean(axis=0)
        step, total = centre - mean, size + len(rows)
        centred = rows - centre[None]
        scatter = scatter + centred.T @ centred + (size * len(rows) / total) * np.outer(step, step)
        size, mean = total, mean + (len(rows) / total) * step

    for chunk in chunks:
        rows = np.asarray(chunk, np.float64).reshape(len(chunk), -1)
        waiting.append(rows)
        if size or sum(map(len, waiting)) > rows.shape[1]:  # more examples than dimensions: their covariance is smaller
            merge(np.concatenate(waiting))
            waiting.clear()
    if waiting:
        rows = np.concatenate(waiting)
        mean = rows.mean(axis=0)
        return len(rows), mean, rows - mean[None], None
    if not size:
        raise ValueError("there is no example")
    return size, mean, np.zeros((0, len(mean))), scatter


def linear_best_elbo(
    sigma: Float[np.ndarray, "*T"] | float, stddevs: Float[np.ndarray, " R"], *, num_dimensions: int, latent_size: int
) -> Float[np.ndarray, "*T"]:
    """The largest mean ELBO, in nats, of a VAE with this fixed sigma whose encoder and decoder are linear, on data with
    these principal stddevs.

    It is the likelihood of probabilistic PCA (Tipping and Bishop, 1999) at its maximum: the bound is tight, and the
    decoder uses those directions, `latent_size` at most, whose stddev exceeds sigma (Lucas et al., Don't blame the
    ELBO, 2019). Networks that are not linear may exceed it.
    """
    variances = np.asarray(stddevs, np.float64) ** 2
    noise = np.asarray(sigma, np.float64)[..., None] ** 2
    used = (variances > noise) & (np.arange(len(variances)) < latent_size)
    covariance = np.where(used, variances, noise)
    terms = np.log(covariance) + variances / covariance
    unseen = (num_dimensions - len(variances)) * np.log(noise[..., 0])
    return np.asarray(-0.5 * (num_dimensions * math.log(2.0 * math.pi) + terms.sum(axis=-1) + unseen))
