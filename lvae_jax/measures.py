"""How well generated data match real data: distances between two sets of points or features, [N, D] and [M, D], and
the sharpness and the noise of images.

Distances run on the host, in float64. For images the points are features, and every number is one of these features:
none of those here is an FID unless the features are Inception's.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, Real


class PrecisionRecall(NamedTuple):
    """precision: the fraction of generated points that look real; recall: the fraction of real points that are
    generated; both in [0, 1], 1 is best."""

    precision: float
    recall: float


def frechet_distance(features_a: Float[np.ndarray, "N D"], features_b: Float[np.ndarray, "M D"]) -> float:
    """The squared Frechet distance, in squared units of the features, of the Gaussians with the sets' means m and
    unbiased covariances C,

      |m_a - m_b|^2 + tr C_a + tr C_b - 2 tr (C_a^(1/2) C_b C_a^(1/2))^(1/2)

    which is also their squared Wasserstein-2 distance (Dowson and Landau, J. Multivariate Anal., 1982; of Inception's
    features, the FID: Heusel et al., NeurIPS 2017). It is biased upwards by finite sets: compare only sets of the same
    sizes.

    With C = R^T R the last trace is the nuclear norm, the sum of singular values, of R_a R_b^T. Triangles R by QR of
    the centred features are exact to rounding where a covariance, which squares them, has lost half of the digits.

    Raises:
      ValueError: a set has fewer than 2 points, or values that are not finite.
    """
    features_a, features_b = _points(features_a, at_least=2), _points(features_b, at_least=2)
    mean_a, mean_b = features_a.mean(axis=0), features_b.mean(axis=0)
    _, root_a = np.linalg.qr((features_a - mean_a) / np.sqrt(len(features_a) - 1))
    _, root_b = np.linalg.qr((features_b - mean_b) / np.sqrt(len(features_b) - 1))
    cross = np.sum(np.linalg.svd(root_a @ root_b.T, compute_uv=False))
    square = np.sum((mean_a - mean_b) ** 2) + np.sum(root_a**2) + np.sum(root_b**2) - 2.0 * cross
    return max(float(square), 0.0)


def precision_and_recall(
    real: Float[np.ndarray, "N D"],
    generated: Float[np.ndarray, "M D"],
    *,
    k: int = 3,
    chunk_size: int = 500,
    real_squares: Float[np.ndarray, " N"] | None = None,
) -> PrecisionRecall:
    """Improved precision and recall (Kynkäänniemi et al., NeurIPS 2019, Eqs. 1 and 2).

    The manifold of a set is the union of balls around its points, each as large as the distance to the k-th nearest
    other point. Precision is the fraction of generated points in the real manifold, recall the fraction of real points
    in the generated one.

    Args:
      chunk_size: points whose distances to all others, at most [chunk_size, max(N, M)], lie in memory at once.
      real_squares: `neighbour_squares(real, k=k)`, if it is known: a third of the work.

    Raises:
      ValueError: k is not positive, a set has no more than k points, or values that are not finite.
    """
    if real_squares is None:
        real_squares = neighbour_squares(real, k=k, chunk_size=chunk_size)
    generated_squares = neighbour_squares(generated, k=k, chunk_size=chunk_size)
    real, generated = _points(real, at_least=k + 1), _points(generated, at_least=k + 1)
    centre = real.mean(axis=0)
    real, generated = real - centre, generated - centre
    looks_real, is_generated = np.zeros(len(generated), bool), 0
    for start in range(0, len(real), chunk_size):
        squares = _squared_distances(real[start : start + chunk_size], generated)
        looks_real |= np.any(squares <= real_squares[start : start + chunk_size, None], axis=0)
        is_generated += int(np.any(squares <= generated_squares[None], axis=1).sum())
    return PrecisionRecall(precision=float(looks_real.mean()), recall=is_generated / len(real))


def sliced_wasserstein(
    key: Key[Array, ""], a: Float[np.ndarray, "N D"], b: Float[np.ndarray, "M D"], *, num_directions: int = 256
) -> float:
    """The sliced Wasserstein-2 distance of two sets of points, in their units,

      SW_2 = (E_d[W_2(<d, a>, <d, b>)^2])^(1/2),    d uniform on the unit sphere

    by the mean over P = `num_directions` directions [P, D] (Bonneel et al., J. Math. Imaging Vis., 2015). In one
    dimension, W_2^2 is the mean squared difference of the quantile functions: steps, of which the integral is exact for
    sets of any sizes.

    Raises:
      ValueError: num_directions is not positive, a set is empty, or values are not finite.
    """
    if num_directions < 1:
        raise ValueError(f"num_directions must be at least 1, got {num_directions}")
    a, b = _points(a, at_least=1), _points(b, at_least=1)
    directions = np.asarray(jax.random.normal(key, (num_directions, a.shape[1])), np.float64)
    directions = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    size_a, size_b = len(a), len(b)
    # Where either quantile function steps, in units of 1 / (N M).
    steps = np.union1d(size_b * np.arange(size_a + 1), size_a * np.arange(size_b + 1))
    quantiles_a = np.sort(directions @ a.T, axis=1)[:, steps[:-1] // size_b]
    quantiles_b = np.sort(directions @ b.T, axis=1)[:, steps[:-1] // size_a]
    squares = (quantiles_a - quantiles_b) ** 2 @ (np.diff(steps) / (size_a * size_b))
    return float(np.sqrt(np.mean(squares)))


def nearest(
    points: Float[np.ndarray, "M D"], others: Real[np.ndarray, "N D"], *, chunk_size: int = 2000
) -> tuple[Int[np.ndarray, " M"], Float[np.ndarray, " M"]]:
    """The index of the nearest of `others` to each point, and its Euclidean distance, in units of the points.

    Args:
      chunk_size: others whose distances to all points, [M, chunk_size], lie in memory at once.

    Raises:
      ValueError: a set is empty, or values are not finite.
    """
    points = _points(points, at_least=1)
    index, squares, row = np.zeros(len(points), np.int64), np.full(len(points), np.inf), np.arange(len(points))
    if len(others) == 0:
        raise ValueError("a set of 0 points is too small: give at least 1")
    for start in range(0, len(others), chunk_size):
        found = _squared_distances(points, _points(others[start : start + chunk_size], at_least=1))
        best = found.argmin(axis=1)
        closer = found[row, best] < squares
        index[closer], squares[closer] = start + best[closer], found[row, best][closer]
    return index, np.sqrt(squares)


def _points(points: np.ndarray, *, at_least: int) -> np.ndarray:
    if len(points) < at_least:
        raise ValueError(f"a set of {len(points)} points is too small: give at least {at_least}")
    if not np.isfinite(points).all():
        raise ValueError("all values must be finite")
    return np.asarray(points, np.float64)


def neighbour_squares(
    points: Float[np.ndarray, "N D"], *, k: int = 3, chunk_size: int = 500
) -> Float[np.ndarray, " N"]:
    """The squared distance of each point to the k-th nearest other one.

    Raises:
      ValueError: k is not positive, the set has no more than k points, or values that are not finite.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    points = _points(points, at_least=k + 1)
    points = points - points.mean(axis=0)  # distances are the same, and lose fewer digits
    squared = np.empty(len(points))
    for start in range(0, len(points), chunk_size):
        squares = _squared_distances(points[start : start + chunk_size], points)
        row = np.arange(len(squares))
        squares[row, start + row] = np.inf  # a point is not its own neighbour
        squared[start + row] = np.partition(squares, k - 1, axis=1)[:, k - 1]
    return squared


def _squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[N, M]; exactly 0 between points that coincide."""
    scale = np.sum(a**2, axis=1)[:, None] + np.sum(b**2, axis=1)[None]
    squares = scale - 2.0 * (a @ b.T)
    # Where points coincide, rounding leaves less than this, of either sign.
    squares[squares <= 4.0 * a.shape[1] * np.finfo(np.float64).eps * scale] = 0.0
    return squares


def laplacian_energy(images: Float[Array, "B H W C"]) -> Float[Array, " B"]:
    """The mean square of the discrete Laplacian, four neighbours less four times the pixel, over the interior pixels:
    how much fine detail an image has, in squared units of the data.

    Raises:
      ValueError: the images have no interior.
    """
    if min(images.shape[1:3]) < 3:
        raise ValueError(f"images must have at least 3 x 3 pixels, got {images.shape[1]} x {images.shape[2]}")
    centre = images[:, 1:-1, 1:-1]
    vertical = images[:, :-2, 1:-1] + images[:, 2:, 1:-1]
    horizontal = images[:, 1:-1, :-2] + images[:, 1:-1, 2:]
    return jnp.mean((vertical + horizontal - 4.0 * centre) ** 2, axis=(1, 2, 3))


def sharpness(images: Float[Array, "B H W C"], originals: Float[Array, "N H W C"]) -> Float[Array, ""]:
    """The mean Laplacian energy of images, such as reconstructions or samples, divided by that of originals: 1 if they
    are as sharp, below if blurred, above if noisy."""
    return jnp.mean(laplacian_energy(images)) / jnp.mean(laplacian_energy(originals))


def sample_noise(samples: Float[Array, "B *S"], means: Float[Array, "B *S"]) -> Float[Array, ""]:
    """The root mean square distance of samples of p(x|z) from their means, in units of the data: the noise of Figs. 13
    to 18."""
    return jnp.sqrt(jnp.mean((samples - means) ** 2))
