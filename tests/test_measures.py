"""Distances between sets of points, sharpness and noise of images: against scipy, linear programming, closed forms and
sets whose answer is known."""

import itertools
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.spatial
from scipy import linalg, ndimage, optimize, spatial, stats

from lvae_jax import likelihoods, measures

RNG = np.random.default_rng


def cloud(seed, size, dim):
    """Correlated points far from zero."""
    rng = RNG(seed)
    return rng.normal(size=(size, dim)) @ rng.normal(size=(dim, dim)) + 3.0 * rng.normal(size=dim)


def exactly(mean, covariance_root, size):
    """Gaussian points [size, D] whose sample mean and covariance, root root^T, are exactly these."""
    points = RNG(size).normal(size=(size, len(mean)))
    points -= points.mean(axis=0)
    whitened = points @ np.linalg.inv(np.linalg.cholesky(np.cov(points.T))).T
    return whitened @ covariance_root.T + mean


# The Frechet distance


def by_scipy(a, b):
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    root = linalg.sqrtm(cov_a @ cov_b)
    return np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(cov_a + cov_b - 2.0 * root.real)


@pytest.mark.parametrize(("size_a", "size_b", "dim"), [(50, 70, 2), (500, 400, 16), (1000, 300, 64)])
def test_frechet_distance_is_scipy_s(size_a, size_b, dim):
    a, b = cloud(1, size_a, dim), cloud(2, size_b, dim)
    assert measures.frechet_distance(a, b) == pytest.approx(by_scipy(a, b), rel=1e-8)


def test_frechet_distance_of_diagonal_gaussians():
    """sum (m_a - m_b)^2 + (s_a - s_b)^2"""
    mean_a, mean_b = np.array([1.0, -2.0, 0.5]), np.array([0.0, -2.0, 2.5])
    stddev_a, stddev_b = np.array([1.0, 2.0, 0.1]), np.array([3.0, 2.0, 0.6])
    a, b = exactly(mean_a, np.diag(stddev_a), 100), exactly(mean_b, np.diag(stddev_b), 30)
    expected = (1.0 + 0.0 + 4.0) + (4.0 + 0.0 + 0.25)
    assert measures.frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)


def test_frechet_distance_of_orthogonal_lines():
    """Singular covariances without a common direction, where their product is 0."""
    line = RNG(0).normal(size=(20, 1))
    line -= line.mean()
    a, b = line * np.array([[2.0, 0.0, 0.0]]), line * np.array([[0.0, 3.0, 0.0]])
    expected = (4.0 + 9.0) * line.var(ddof=1)
    assert measures.frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)


def test_frechet_distance_to_itself_is_zero():
    """To all digits, also of fewer points than dimensions."""
    for size, dim in ((200, 8), (5, 40), (2, 3), (2, 1), (300, 64)):
        points = RNG(3).normal(size=(size, dim))
        for scale in (1e-6, 1.0, 1e6):
            distance = measures.frechet_distance(scale * points, scale * RNG(4).permutation(points))
            assert 0.0 <= distance < 1e-13 * dim * scale**2


def test_frechet_distance_with_fewer_points_than_dimensions():
    """By the eigenvalues of A^T A B^T B, in the space of the few points."""
    a, b = cloud(1, 6, 30), cloud(2, 9, 30)
    centred_a, centred_b = (a - a.mean(0)) / np.sqrt(5), (b - b.mean(0)) / np.sqrt(8)
    products = centred_a @ centred_b.T @ centred_b @ centred_a.T
    cross = np.sqrt(np.maximum(linalg.eigvalsh(products), 0.0)).sum()
    traces = np.trace(np.cov(a.T)) + np.trace(np.cov(b.T))
    expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + traces - 2.0 * cross
    assert measures.frechet_distance(a, b) == pytest.approx(expected, rel=1e-7)


def test_frechet_distance_keeps_its_digits_on_tiny_variances():
    """Stddevs from 1 to 1e-7: in a covariance the last is at the rounding error of the first."""
    stddevs = np.array([1.0, 1e-3, 1e-7])
    rotation = stats.special_ortho_group.rvs(3, random_state=0)
    a = exactly(np.zeros(3), np.diag(stddevs), 40)
    b = exactly(np.zeros(3), np.diag(stddevs * np.array([1.0, 1.0, 3.0])), 40)
    distance = measures.frechet_distance(a @ rotation, b @ rotation)
    assert distance == pytest.approx(0.0, abs=1e-13)


def test_frechet_distance_is_invariant():
    a, b = cloud(1, 80, 5), cloud(2, 60, 5)
    distance = measures.frechet_distance(a, b)
    assert measures.frechet_distance(b, a) == pytest.approx(distance, rel=1e-10)
    assert measures.frechet_distance(a[::-1], b) == pytest.approx(distance, rel=1e-10)
    rotation, shift = stats.ortho_group.rvs(5, random_state=0), np.arange(5.0)
    assert measures.frechet_distance(a @ rotation + shift, b @ rotation + shift) == pytest.approx(distance, rel=1e-10)
    assert measures.frechet_distance(10.0 * a, 10.0 * b) == pytest.approx(100.0 * distance, rel=1e-10)
    moved = measures.frechet_distance(a, a + shift)
    assert moved == pytest.approx(np.sum(shift**2), rel=1e-10)


def test_frechet_distance_of_float32_is_computed_in_float64():
    a, b = cloud(1, 80, 5).astype(np.float32), cloud(2, 60, 5).astype(np.float32)
    expected = measures.frechet_distance(a.astype(np.float64), b.astype(np.float64))
    assert measures.frechet_distance(a, b) == expected


# Precision and recall


def by_the_definition(real, generated, k):
    def fraction(points, others):
        radii = np.sort(spatial.distance.cdist(others, others), axis=1)[:, k]
        return np.mean((spatial.distance.cdist(points, others) <= radii[None]).any(axis=1))

    return fraction(generated, real), fraction(real, generated)


@pytest.mark.parametrize(("k", "chunk_size"), [(1, 17), (3, 1), (3, 150), (5, 1000)])
def test_precision_and_recall_are_the_definition_s(k, chunk_size):
    real, generated = RNG(0).normal(size=(150, 3)), 1.4 * RNG(1).normal(size=(90, 3)) + 1.0
    result = measures.precision_and_recall(real, generated, k=k, chunk_size=chunk_size)
    expected = by_the_definition(real, generated, k)
    assert tuple(result) == pytest.approx(expected, abs=1e-12)
    assert 0.0 < result.precision < 1.0
    assert 0.0 < result.recall < 1.0
    assert result.precision != result.recall


def test_three_neighbours_are_the_default():
    real, generated = RNG(0).normal(size=(150, 3)), 1.4 * RNG(1).normal(size=(90, 3))
    assert measures.precision_and_recall(real, generated) == measures.precision_and_recall(real, generated, k=3)
    assert measures.precision_and_recall(real, generated) != measures.precision_and_recall(real, generated, k=4)


@pytest.mark.parametrize("offset", [0.0, 1e5])
@pytest.mark.parametrize("repeats", [1, 5])
def test_identical_sets(offset, repeats):
    """Repeated more often than k, each point has a ball of radius 0, and is in it."""
    points = np.repeat(RNG(0).normal(size=(60, 8)), repeats, axis=0) + offset
    assert measures.precision_and_recall(points, RNG(1).permutation(points)) == (1.0, 1.0)


def test_disjoint_sets():
    real = RNG(0).normal(size=(60, 8))
    assert measures.precision_and_recall(real, RNG(1).normal(size=(70, 8)) + 100.0) == (0.0, 0.0)


def test_dropping_half_of_the_data_halves_the_recall():
    """Two clusters far apart, of which only one is generated, by points of the set itself."""
    points = RNG(0).normal(size=(200, 4))
    real = np.concatenate([points[:100], points[100:] + 1000.0])
    assert measures.precision_and_recall(real, real[:100]) == (1.0, 0.5)
    assert measures.precision_and_recall(real[:100], real) == (0.5, 1.0)


def test_collapsed_model_has_precision_but_no_recall():
    real = RNG(0).normal(size=(100, 4))
    collapsed = np.repeat(real.mean(0, keepdims=True), 50, axis=0)
    assert measures.precision_and_recall(real, collapsed, k=20) == (1.0, 0.0)


def test_points_on_a_line_by_hand():
    """k = 1: the real balls are [-1, 1], [0, 2] and [1, 7]; the generated ones all have radius 1."""
    real, generated = np.array([[0.0], [1.0], [4.0]]), np.array([[7.5], [8.5], [20.0], [21.0]])
    assert measures.precision_and_recall(real, generated, k=1) == (0.0, 0.0)
    assert measures.precision_and_recall(real, generated - 0.6, k=1) == (0.25, 0.0), "6.9 is in the last ball"
    assert measures.precision_and_recall(real, generated - 4.0, k=1) == (0.5, 1 / 3), "3.5 and 4.5 against 4"


def test_distances_never_lie_in_memory_at_once():
    """3,000 x 3,000 distances take 72 MB."""
    points = RNG(0).normal(size=(3000, 4))
    tracemalloc.start()
    measures.precision_and_recall(points, points + 0.01, chunk_size=100)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20e6


# The sliced Wasserstein distance


def distance(a, b, *, seed=0, **options):
    return measures.sliced_wasserstein(jax.random.key(seed), a, b, **options)


def by_linear_programming(a, b):
    """W_2 of points [N] and [M] on a line, as optimal transport: no sorting, no quantiles."""
    cost = (a[:, None] - b[None]) ** 2
    rows = np.kron(np.eye(len(a)), np.ones(len(b)))
    columns = np.kron(np.ones(len(a)), np.eye(len(b)))
    masses = np.concatenate([np.full(len(a), 1 / len(a)), np.full(len(b), 1 / len(b))])
    return np.sqrt(optimize.linprog(cost.ravel(), A_eq=np.concatenate([rows, columns]), b_eq=masses).fun)


@pytest.mark.parametrize(("size_a", "size_b"), [(1, 1), (1, 5), (6, 6), (4, 6), (7, 5), (3, 12)])
def test_on_a_line_it_is_optimal_transport(size_a, size_b):
    a, b = RNG(0).normal(size=size_a), 2.0 * RNG(1).normal(size=size_b) + 1.0
    for num_directions in (1, 4):  # both of a line's are alike
        result = distance(a[:, None], b[:, None], num_directions=num_directions)
        assert result == pytest.approx(by_linear_programming(a, b), rel=1e-6)


@pytest.mark.parametrize(("size_a", "size_b"), [(300, 300), (300, 470)])
def test_sliced_wasserstein_bounds_w1_on_a_line(size_a, size_b):
    a, b = RNG(0).normal(size=size_a), 2.0 * RNG(1).normal(size=size_b) + 1.0
    assert distance(a[:, None], b[:, None]) > stats.wasserstein_distance(a, b)
    shifted = np.repeat(a, 3) + 0.7  # the same distribution, moved, in a larger set
    moved = distance(a[:, None], shifted[:, None])
    assert moved == pytest.approx(stats.wasserstein_distance(a, shifted), rel=1e-10) == pytest.approx(0.7)


def test_gaussians_on_a_line():
    """W_2^2 = (m_a - m_b)^2 + (s_a - s_b)^2, on the quantiles of sets of different sizes."""
    a = stats.norm(1.0, 2.0).ppf((np.arange(40_000) + 0.5) / 40_000)
    b = stats.norm(-0.5, 0.5).ppf((np.arange(30_000) + 0.5) / 30_000)
    assert distance(a[:, None], b[:, None], num_directions=1) == pytest.approx(np.sqrt(1.5**2 + 1.5**2), rel=1e-3)


@pytest.mark.parametrize("dim", [2, 3, 10])
def test_isotropic_gaussians(dim):
    """SW_2^2 = |m_a - m_b|^2 / D + (s_a - s_b)^2: the mean of <d, m>^2 is 1 / D."""
    shift = np.arange(1.0, dim + 1)
    a, b = exactly(np.zeros(dim), np.eye(dim), 2000), exactly(shift, 1.5 * np.eye(dim), 1500)
    expected = np.sqrt(np.sum(shift**2) / dim + 0.25)
    # <d, m>^2 has a stddev of at most sqrt(2) of its mean: the root of the mean of 1,000 has 2.2 %.
    assert distance(a, b, num_directions=1000) == pytest.approx(expected, rel=0.08)
    centred = distance(a, b - shift, num_directions=20)
    assert centred == pytest.approx(0.5, rel=0.02), "the same in every direction"


def test_sliced_wasserstein_of_a_shift_converges_in_directions():
    a, shift = RNG(0).normal(size=(50, 3)), np.array([3.0, 0.0, 4.0])

    def errors(num_directions):
        results = [distance(a, a + shift, seed=seed, num_directions=num_directions) for seed in range(30)]
        return np.sqrt(np.mean((np.square(results) - 25.0 / 3.0) ** 2))

    few, many = errors(10), errors(1000)
    # <d, m>^2 for d on the sphere in R^3 has mean |m|^2 / 3 and variance 4 |m|^4 / 45.
    assert few == pytest.approx(np.sqrt(4.0 * 25.0**2 / 45.0 / 10), rel=0.4)
    assert many == pytest.approx(np.sqrt(4.0 * 25.0**2 / 45.0 / 1000), rel=0.4)


def test_more_points_of_one_distribution_come_nearer():
    sizes = (100, 1000, 10_000)
    distances = [distance(RNG(0).normal(size=(n, 2)), RNG(1).normal(size=(n, 2))) for n in sizes]
    assert all(fewer > 2.0 * more for fewer, more in itertools.pairwise(distances))


def test_it_is_a_distance_of_sets():
    a, b, c = RNG(0).normal(size=(40, 3)), RNG(1).normal(size=(60, 3)) + 1.0, 3.0 * RNG(2).normal(size=(50, 3))
    assert distance(a, b) == pytest.approx(distance(b, a), rel=1e-12)
    assert distance(a, b) == pytest.approx(distance(RNG(3).permutation(a), np.repeat(b, 2, axis=0)), rel=1e-10)
    assert distance(a, np.repeat(a, 3, axis=0)) == pytest.approx(0.0, abs=1e-12)
    assert distance(a, c) <= distance(a, b) + distance(b, c)
    assert distance(5.0 * a - 2.0, 5.0 * b - 2.0) == pytest.approx(5.0 * distance(a, b), rel=1e-10)
    assert distance(a, b) == distance(a, b), "a function of its key"
    assert distance(a, b) != distance(a, b, seed=1)


# Bad input

SET = np.ones((5, 2)) * np.arange(5.0)[:, None]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: measures.frechet_distance(SET[:1], SET), "a set of 1 points is too small: give at least 2"),
        (lambda: measures.frechet_distance(SET, SET[:0]), "a set of 0 points is too small"),
        (lambda: measures.frechet_distance(SET, SET * np.nan), "all values must be finite"),
        (lambda: measures.precision_and_recall(SET[:3], SET), "a set of 3 points is too small: give at least 4"),
        (lambda: measures.precision_and_recall(SET, SET, k=5), "a set of 5 points is too small: give at least 6"),
        (lambda: measures.precision_and_recall(SET, SET, k=0), "k must be at least 1"),
        (lambda: measures.precision_and_recall(SET * np.inf, SET), "finite"),
        (lambda: distance(SET[:0], SET), "a set of 0 points is too small"),
        (lambda: distance(SET, SET * np.nan), "finite"),
        (lambda: distance(SET, SET, num_directions=0), "num_directions must be at least 1"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value")
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Images


def test_laplacian_energy_is_scipys_on_the_interior():
    images = np.random.default_rng(0).normal(size=(3, 7, 9, 2))
    expected = [np.mean([ndimage.laplace(image[..., c])[1:-1, 1:-1] ** 2 for c in range(2)]) for image in images]
    np.testing.assert_allclose(measures.laplacian_energy(jnp.float32(images)), expected, rtol=1e-5)


def test_laplacian_energy_grows_with_noise_and_frequency():
    rows, columns = np.meshgrid(np.arange(64.0), np.arange(64.0), indexing="ij")
    plane = jnp.float32(0.1 * rows - 0.2 * columns + 3.0)[None, :, :, None]
    np.testing.assert_allclose(measures.laplacian_energy(plane), 0.0, atol=1e-9)
    noise = jax.random.normal(jax.random.key(0), (50, 64, 64, 1))
    np.testing.assert_allclose(measures.laplacian_energy(0.1 * noise).mean(), 20.0 * 0.01, rtol=0.02)
    for frequency in (1, 4, 16):
        wave = np.cos(2.0 * np.pi * frequency * columns / 64)
        energy = (2.0 * np.cos(2.0 * np.pi * frequency / 64) - 2.0) ** 2 * np.mean(wave[:, 1:-1] ** 2)
        np.testing.assert_allclose(measures.laplacian_energy(jnp.float32(wave)[None, :, :, None]), [energy], rtol=1e-3)
    with pytest.raises(ValueError, match="3 x 3"):
        measures.laplacian_energy(jnp.zeros((1, 2, 9, 1)))


def test_sharpness_falls_with_blur_and_rises_with_noise():
    sharpness, rng = jax.jit(measures.sharpness), np.random.default_rng(0)
    originals = rng.uniform(size=(8, 16, 16, 1)).astype(np.float32)
    blurs = [ndimage.gaussian_filter(originals, (0, width, width, 0)) for width in (0.4, 0.8, 1.6)]
    ratios = [float(sharpness(images, originals)) for images in [originals, *blurs]]
    assert ratios[0] == 1.0
    assert all(more > 1.5 * less for more, less in itertools.pairwise(ratios))
    noisy = originals + np.std(originals) * rng.normal(size=originals.shape).astype(np.float32)
    # White noise on white noise of the same variance.
    np.testing.assert_allclose(sharpness(noisy, originals), 2.0, rtol=0.1)
    np.testing.assert_allclose(sharpness(0.5 * originals, originals), 0.25, rtol=1e-6)


@pytest.mark.parametrize("sigma", [0.01, 0.3])
def test_sample_noise_is_sigma(sigma):
    means = jnp.float32(RNG(0).uniform(size=(500, 6, 6, 1)))
    samples = likelihoods.fixed(sigma).sample(jax.random.key(0), likelihoods.fixed(sigma).init(), means[..., None])
    np.testing.assert_allclose(measures.sample_noise(samples, means), sigma, rtol=4.0 / np.sqrt(2.0 * means.size))
    np.testing.assert_allclose(measures.sample_noise(means, means), 0.0)


def test_sliced_wasserstein_runs_in_float64():
    points = np.random.default_rng(0).normal(size=(10, 2))
    with jax.enable_x64(True):
        found = measures.sliced_wasserstein(jax.random.key(0), points, points + 1.0)
    assert found == pytest.approx(1.0, abs=0.2)  # |shift|^2 / D, by directions


def test_nearest_is_scipys():
    rng = np.random.default_rng(0)
    points, others = rng.normal(size=(40, 5)), rng.integers(0, 3, size=(130, 5)).astype(np.uint8)
    distances = scipy.spatial.distance.cdist(points, others.astype(float))
    index, distance = measures.nearest(points, others, chunk_size=30)
    np.testing.assert_allclose(distance, distances.min(axis=1), rtol=1e-12)
    np.testing.assert_allclose(distances[np.arange(40), index], distance, rtol=1e-12)
    for bad in (others[:0], np.full((3, 5), np.nan)):
        with pytest.raises(ValueError, match=r"too small|finite"):
            measures.nearest(points, bad)


def test_known_squares_change_nothing():
    rng = np.random.default_rng(0)
    real, generated = rng.normal(size=(60, 3)), rng.normal(size=(50, 3)) + 0.5
    squares = measures.neighbour_squares(real, k=2)
    distances = np.sort(scipy.spatial.distance.cdist(real, real), axis=1)[:, 2]
    np.testing.assert_allclose(squares, distances**2, rtol=1e-12)
    found = measures.precision_and_recall(real, generated, k=2, real_squares=squares)
    assert found == measures.precision_and_recall(real, generated, k=2)
