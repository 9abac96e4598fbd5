"""The headroom of an observation model: the nats that another Gaussian could still win on a trained model's residuals.

The standardised residuals e = L^-1 (x - mean), L L^T the covariance of p(x|z), are N(0, I) if the model is right. With
a covariance C of e in place of I, the covariance of p(x|z) becomes L C L^T, and log p(x|z) changes by

  log N(e; 0, C) - log N(e; 0, I)

nats, at the same encoder, decoder and z. Each kind of C below is fitted to residuals of training examples, and its gain
is the mean of that over others. None depends on z, so that a trained model of the kind may win more; but where the gain
is small, a change of the observation model alone promises little.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

MOST_DIMENSIONS = 4096  # of which a full covariance is fitted
VARIANCES = "a variance for each dimension"
LEAST_VARIANCE = 1e-12  # of residuals that never vary
# The neighbours before a pixel, in the order of rows: two to the left, five above, three above these.
TAPS = ((0, -1), (0, -2), *((-1, j) for j in range(-2, 3)), *((-2, j) for j in range(-1, 2)))


class Gain(NamedTuple):
    """The gain by one kind of covariance.

    Attributes:
      kind: its name.
      nats: the mean over held-out examples.
      error: the standard error of that mean.
    """

    kind: str
    nats: float
    error: float


def headroom(
    train: Float[np.ndarray, "N *S"],
    test: Float[np.ndarray, "M *S"],
    *,
    ranks: Sequence[int] = (1, 10, 50),
    base: Float[np.ndarray, " M"] | None = None,
) -> list[Gain]:
    """The gain of each kind of covariance on the standardised residuals `test`, fitted to those in `train`.

    Images [H, W, C] also have bases of cosines and of Haar wavelets, and a causal filter. A rank of n or more is left
    out, and so is a full covariance of more than `MOST_DIMENSIONS` dimensions.

    Args:
      base: the log density of each of `test` in nats under the model itself, by default that of N(0, I). A model that
        is not Gaussian has another: log p(x|z) + log det L.

    Raises:
      ValueError: there are fewer than 2 examples in a part, or a residual is not finite.
    """
    for name, part in (("train", train), ("test", test)):
        if len(part) < 2 or not np.isfinite(part).all():
            raise ValueError(f"`{name}`: give at least 2 examples, all of whose residuals are finite")
    shape = train.shape[1:]
    fit, held = (np.asarray(part, np.float64).reshape(len(part), -1) for part in (train, test))
    base = log_normal(held) if base is None else base

    def gain(kind: str, log_probs: Float[np.ndarray, " M"]) -> Gain:
        gains = log_probs - base
        return Gain(kind, float(gains.mean()), float(gains.std(ddof=1) / math.sqrt(len(gains))))

    return [gain(kind, log_probs) for kind, log_probs in _kinds(fit, held, shape, ranks)]


def _kinds(
    fit: Float[np.ndarray, "N D"], held: Float[np.ndarray, "M D"], shape: tuple[int, ...], ranks: Sequence[int]
) -> Iterator[tuple[str, Float[np.ndarray, " M"]]]:
    """The log density in nats of the held-out residuals under each kind."""
    size = fit.shape[1]
    yield "one variance", independent(held, np.full(size, np.mean(fit**2)))
    variances = np.mean(fit**2, axis=0)
    yield VARIANCES, independent(held, variances)
    if len(shape) == 3:
        for name, transform in (("cosine", cosines), ("Haar", haar)):
            coefficients = [transform(part.reshape(-1, *shape)).reshape(len(part), -1) for part in (fit, held)]
            yield (
                f"a variance for each {name} coefficient",
                independent(coefficients[1], np.mean(coefficients[0] ** 2, 0)),
            )
    scale = np.sqrt(np.maximum(variances, LEAST_VARIANCE))
    scaled, held_scaled, log_det = fit / scale, held / scale, np.sum(np.log(scale))
    ranks = [rank for rank in ranks if rank < size]
    for rank in ranks:
        yield f"one variance, and rank {rank}", low_rank(held, *principal(fit, rank))
    for rank in ranks:
        yield (
            f"{VARIANCES}, and rank {rank}",
            low_rank(held_scaled, *principal(scaled, rank)) - log_det,
        )
    if len(shape) == 3:
        taps = causal_taps(scaled.reshape(-1, *shape))
        left, held_left = (innovations(part.reshape(-1, *shape), taps) for part in (scaled, held_scaled))
        yield (
            f"a causal filter, and {VARIANCES}",
            independent(held_left.reshape(held.shape), np.mean(left.reshape(fit.shape) ** 2, axis=0)) - log_det,
        )
    if size <= MOST_DIMENSIONS:
        yield "a full covariance, shrunk", full(held_scaled, scaled) - log_det


def log_normal(e: Float[np.ndarray, "M D"]) -> Float[np.ndarray, " M"]:
    """log N(e; 0, I) in nats."""
    return -0.5 * np.sum(e**2, axis=1) - 0.5 * e.shape[1] * math.log(2.0 * math.pi)


def independent(e: Float[np.ndarray, "M D"], variances: Float[np.ndarray, " D"]) -> Float[np.ndarray, " M"]:
    """log N(e; 0, diag variances) in nats."""
    stddevs = np.sqrt(np.maximum(variances, LEAST_VARIANCE))
    return log_normal(e / stddevs) - np.sum(np.log(stddevs))


def principal(e: Float[np.ndarray, "N D"], rank: int) -> tuple[Float[np.ndarray, "D r"], float]:
    """The factors and the variance beside them of probabilistic PCA (Tipping and Bishop, 1999) at its maximum
    likelihood."""
    from sklearn.utils.extmath import randomized_svd  # here, so that the library's import need not wait for it

    _, lengths, directions = randomized_svd(e, rank, random_state=0)
    eigenvalues = lengths**2 / len(e)
    rest = max((np.mean(np.sum(e**2, axis=1)) - eigenvalues.sum()) / (e.shape[1] - rank), LEAST_VARIANCE)
    return directions.T * np.sqrt(np.maximum(eigenvalues - rest, 0.0)), float(rest)


def low_rank(
    e: Float[np.ndarray, "M D"], factors: Float[np.ndarray, "D r"], variance: float
) -> Float[np.ndarray, " M"]:
    """log N(e; 0, variance I + F F^T) in nats, the columns of F orthogonal."""
    lengths = np.sum(factors**2, axis=0)
    directions = factors / np.sqrt(np.maximum(lengths, LEAST_VARIANCE))
    along = e @ directions
    squares = (np.sum(e**2, axis=1) - np.sum(along**2, axis=1)) / variance
    squares += np.sum(along**2 / (variance + lengths), axis=1)
    log_det = (e.shape[1] - len(lengths)) * math.log(variance) + np.sum(np.log(variance + lengths))
    return -0.5 * (squares + log_det + e.shape[1] * math.log(2.0 * math.pi))


def full(e: Float[np.ndarray, "M D"], train: Float[np.ndarray, "N D"]) -> Float[np.ndarray, " M"]:
    """log N(e; 0, C) in nats, C the second moments of `train`, shrunk as Ledoit and Wolf (2004) say."""
    import scipy.linalg
    from sklearn.covariance import ledoit_wolf

    covariance, _ = ledoit_wolf(train, assume_centered=True)
    root = np.linalg.cholesky(covariance)
    whitened = scipy.linalg.solve_triangular(root, e.T, lower=True).T
    return log_normal(whitened) - np.sum(np.log(np.diagonal(root)))


def cosines(images: Float[np.ndarray, "N H W C"]) -> Float[np.ndarray, "N H W C"]:
    """The orthonormal cosine transform of each channel."""
    import scipy.fft

    return scipy.fft.dctn(images, axes=(1, 2), norm="ortho")


def haar(images: Float[np.ndarray, "N H W C"], *, levels: int = 2) -> Float[np.ndarray, "N H W C"]:
    """The orthonormal Haar transform of each channel, on so many scales; an odd last row or column stays as it is."""
    images = images.copy()
    height, width = images.shape[1:3]
    for _ in range(levels):
        height, width = height // 2 * 2, width // 2 * 2
        part = images[:, :height, :width].copy()
        for axis in (1, 2):
            even, odd = (np.take(part, range(start, part.shape[axis], 2), axis) for start in (0, 1))
            part = np.concatenate([even + odd, even - odd], axis) / math.sqrt(2.0)
        images[:, :height, :width] = part
        height, width = height // 2, width // 2
    return images


def neighbours(images: Float[np.ndarray, "N H W C"]) -> Iterator[Float[np.ndarray, "N H W C"]]:
    """The value before each pixel at each of `TAPS`, 0 outside."""
    height, width = images.shape[1:3]
    for row, column in TAPS:
        shifted = np.zeros_like(images)
        into = slice(max(0, -row), height), slice(max(0, -column), width - max(0, column))
        out = slice(0, height + min(0, row)), slice(max(0, column), width + min(0, column))
        if height > -row and width > abs(column):
            shifted[:, into[0], into[1]] = images[:, out[0], out[1]]
        yield shifted


def causal_taps(images: Float[np.ndarray, "N H W C"]) -> Float[np.ndarray, " T"]:
    """The least-squares weights of `TAPS`, the same everywhere."""
    before = list(neighbours(images))
    gram = np.array([[np.vdot(a, b) for b in before] for a in before])
    # Taps that never meet a pixel have no weight.
    return np.linalg.lstsq(gram, np.array([np.vdot(a, images) for a in before]), rcond=1e-10)[0]


def innovations(images: Float[np.ndarray, "N H W C"], taps: Float[np.ndarray, " T"]) -> Float[np.ndarray, "N H W C"]:
    """The errors of predicting each pixel from those before it: a map of determinant 1."""
    return images - sum(tap * before for tap, before in zip(taps, neighbours(images), strict=True))
