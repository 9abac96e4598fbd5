"""Batches as pure functions of (seed, step); the TFDS path is tested on real MNIST in test_sigma_sweep."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from lvae_jax import datasets, toy
from lvae_jax.keys import example_keys

KEY = jax.random.key(0)
INDEX = jnp.arange(64)


def gathered(dataset, key, indices):
    return np.asarray(dataset.batch(dataset.train[indices], key, indices))


@pytest.fixture
def images():
    train = np.arange(7, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 3, 1), np.uint8)
    return datasets.image_dataset(train, train[:2] + 100)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 20])
def test_every_epoch_visits_every_image_once(images, batch_size):
    stream = np.concatenate([images.indices(5, step, batch_size) for step in range(21)])
    for epoch in stream[: len(stream) // 7 * 7].reshape(-1, 7):
        assert sorted(epoch) == list(range(7))


def test_order_depends_on_seed_and_epoch_alone(images):
    def epoch(seed, number):
        return tuple(images.indices(seed, number, 7))

    assert epoch(0, 3) == epoch(0, 3)
    assert len({epoch(0, 0), epoch(0, 1), epoch(1, 0), epoch(1, 1)}) == 4
    # The same stream cut otherwise.
    np.testing.assert_array_equal(
        images.indices(0, 0, 14), np.concatenate([images.indices(0, 0, 7), images.indices(0, 1, 7)])
    )


def test_images_become_floats_on_the_grid(images):
    x = gathered(images, KEY, jnp.array([6, 0]))
    np.testing.assert_allclose(x[:, 0, 0, 0], [6 / 255, 0.0], rtol=1e-7)
    assert x.shape == (2, 2, 3, 1)
    assert x.dtype == np.float32
    np.testing.assert_array_equal(images.test_batch(images.test, KEY, jnp.arange(2)), datasets.to_float(images.test))
    np.testing.assert_array_equal(datasets.to_float(np.array([0, 255], np.uint8)), [0.0, 1.0])
    np.testing.assert_array_equal(datasets.to_float(np.array([0.5, -3.0], np.float32)), [0.5, -3.0])


def test_toy_streams_fresh_points_and_holds_out_others():
    stream = datasets.load("toy")
    indices = jnp.asarray(stream.indices(0, 0, 50))
    batches = [np.asarray(stream.batch(None, jax.random.key(seed), indices)) for seed in range(2)]
    together = np.concatenate([*batches, stream.test])
    assert len(np.unique(together, axis=0)) == len(together)
    assert stream.test.shape == (datasets.TEST_SIZE, *toy.SHAPE)
    np.testing.assert_array_equal(stream.test, datasets.load("toy").test)
    np.testing.assert_array_equal(stream.test_batch(stream.test[:9], KEY, jnp.arange(9)), stream.test[:9])


@pytest.mark.parametrize(("dim", "radius"), [(2, 1.0), (3, 2.5), (10, 0.1)])
def test_sphere_points_are_uniform_on_the_sphere(dim, radius):
    stream = datasets.sphere_stream(dim, radius=radius)
    batch = stream.batch(None, KEY, jnp.asarray(stream.indices(0, 0, 10_000)))
    assert stream.shape == (dim,)
    for points in (np.float64(batch), np.float64(stream.test)):
        assert points.shape == (10_000, dim)
        np.testing.assert_allclose(np.linalg.norm(points, axis=1), radius, rtol=1e-6)
        # Along any direction, the first axis and another one: u^2 is Beta((1/2, (n - 1)/2), and either sign as likely.
        for direction in (np.eye(dim)[0], np.ones(dim) / np.sqrt(dim)):
            u = points @ direction / radius
            assert stats.kstest(u**2, stats.beta(0.5, (dim - 1) / 2).cdf).pvalue > 1e-3
            assert stats.binomtest(int(np.sum(u > 0)), len(u)).pvalue > 1e-3
        # The mean is 0 and the covariance R^2 / n, to the errors of 10,000 independent points.
        unit = points / radius
        assert np.abs(unit.mean(0)).max() < 4.5 / np.sqrt(dim * 10_000)
        assert np.abs(unit.T @ unit / 10_000 - np.eye(dim) / dim).max() < 4.5 * np.sqrt(2.0) / dim / 100.0
    # Theorem 1's own cases: in the plane the angle is uniform, in space each coordinate is (Archimedes).
    if dim == 2:
        angle = np.arctan2(*np.float64(batch).T)
        assert stats.kstest(angle, stats.uniform(-np.pi, 2 * np.pi).cdf).pvalue > 1e-3
    if dim == 3:
        for coordinate in np.float64(batch).T:
            assert stats.kstest(coordinate, stats.uniform(-radius, 2 * radius).cdf).pvalue > 1e-3


def test_sphere_streams_fresh_points_and_holds_out_others():
    stream = datasets.sphere_stream(3)
    indices = jnp.asarray(stream.indices(0, 0, 50))
    batches = [np.asarray(stream.batch(None, jax.random.key(seed), indices)) for seed in (0, 1, datasets.TEST_SEED - 1)]
    together = np.concatenate([*batches, stream.test])
    assert len(np.unique(together, axis=0)) == len(together)
    np.testing.assert_array_equal(stream.batch(None, KEY, indices), batches[0])
    # Programs of another size may round the last digit of a norm otherwise.
    np.testing.assert_allclose(stream.batch(None, KEY, indices[::-3]), batches[0][::-3], 5e-7, 0, err_msg="a share")
    np.testing.assert_array_equal(stream.test, datasets.sphere_stream(3).test)
    np.testing.assert_array_equal(stream.test_batch(stream.test[:9], KEY, jnp.arange(9)), stream.test[:9])
    assert stream.train is None


PICTURES = np.random.default_rng(0).integers(0, 256, (64, 5, 4, 3), dtype=np.uint8)


def test_every_other_training_image_is_mirrored_left_to_right():
    dataset = datasets.image_dataset(PICTURES, PICTURES, flip=True)
    mirrored = []
    for step in range(20):
        batch = np.rint(255 * gathered(dataset, jax.random.key(step), INDEX))
        flipped = (batch == PICTURES[:, :, ::-1]).all(axis=(1, 2, 3))
        assert (flipped | (batch == PICTURES).all(axis=(1, 2, 3))).all(), "no image changes otherwise"
        mirrored.append(flipped)
    assert stats.binomtest(int(np.sum(mirrored)), 20 * 64).pvalue > 1e-3
    # Independent over steps and over images.
    assert stats.chisquare(np.unique(2 * mirrored[0] + mirrored[1], return_counts=True)[1]).pvalue > 1e-3
    assert len(np.unique(mirrored, axis=0)) == 20
    np.testing.assert_array_equal(dataset.test_batch(PICTURES, KEY, INDEX), datasets.to_float(PICTURES))


@pytest.mark.parametrize("options", [{"flip": True}, {"dequantized": True}, {"flip": True, "dequantized": True}])
def test_randomness_of_an_example_depends_on_step_and_index(options):
    dataset = datasets.image_dataset(PICTURES, PICTURES, **options)
    whole = gathered(dataset, KEY, INDEX)
    picked = INDEX[40:10:-1]
    np.testing.assert_array_equal(gathered(dataset, KEY, picked), whole[picked], "a device's share of the batch")
    np.testing.assert_array_equal(gathered(dataset, KEY, INDEX), whole)
    assert not np.array_equal(gathered(dataset, jax.random.key(1), INDEX), whole)
    by_member = jax.vmap(dataset.batch, in_axes=(None, 0, None))
    keys = jnp.stack([jax.random.key(1), KEY])
    np.testing.assert_array_equal(by_member(PICTURES, keys, INDEX)[1], whole)


def test_dequantised_pixels_fill_their_cells():
    k = np.tile(np.arange(256, dtype=np.uint8)[None], (20_000, 1))
    x = np.float64(datasets.dequantize(example_keys(KEY, jnp.arange(20_000)), k))
    assert x.min() >= 0.0
    assert x.max() < 1.0
    np.testing.assert_array_equal(np.floor(256 * x), k, "no rounding up to the next value")
    u = 256 * x - k
    for value in (0, 1, 128, 255):
        assert stats.kstest(u[:, value], stats.uniform.cdf).pvalue > 1e-3
    assert abs(u.mean() - 0.5) < 4 * np.sqrt(1 / 12 / u.size)
    assert abs(np.corrcoef(u[:, :2].T)[0, 1]) < 4 / np.sqrt(len(u)), "pixels share their noise"
    assert abs(np.corrcoef(u[:2])[0, 1]) < 4 / np.sqrt(256), "examples share their noise"


@pytest.mark.parametrize("stddev", [0.001, 0.01, 1.0])
def test_dequantised_density_bounds_the_image_probability(stddev):
    """n pixels under a Gaussian of which the probability of every cell is known."""
    n, k, mean = 3, 200, 200.5 / 256
    density = stats.norm(mean, stddev)
    log_probability = n * np.log(density.cdf((k + 1) / 256) - density.cdf(k / 256))
    x = datasets.dequantize(example_keys(KEY, jnp.arange(20_000)), np.full((20_000, n), k, np.uint8))
    log_p = density.logpdf(np.float64(x)).sum(axis=1)
    bound = log_p.mean() - n * np.log(256)
    error = log_p.std() / np.sqrt(len(log_p))
    assert bound < log_probability + 4 * error
    expected = n * integrate.quad(lambda u: density.logpdf((k + u) / 256), 0, 1)[0] - n * np.log(256)
    assert bound == pytest.approx(expected, abs=4 * error)
    if stddev == 1.0:
        assert bound == pytest.approx(log_probability, abs=1e-4), "tight where the density is flat within a cell"


NONSENSE = [
    ("toy", {"flip": True}, "`flip` is for images"),
    ("toy", {"dequantize": True}, "`dequantize` is for images"),
    ("toy", {"fake_data": True}, "`fake_data` is for images"),
    ("toy", {"image_size": 0}, "`image_size` is for CelebA"),
    ("mnist", {"image_size": 28}, "`image_size` is for CelebA"),
    ("mnist", {"celeba_dir": "."}, "`celeba_dir` is for CelebA"),
    ("celeb_a", {}, "`image_size`=None: must be from 8 to 148"),
    ("celeb_a", {"image_size": 7}, "`image_size`=7: must be from 8 to 148"),
    ("celeb_a", {"image_size": 149, "celeba_dir": "."}, "`image_size`=149: must be from 8 to 148"),
    ("celeb_a", {"image_size": 0, "fake_data": True}, "`image_size`=0: must be from 8 to 148"),
    ("celeb_a", {"image_size": 64, "celeba_dir": ".", "manual_dir": "."}, "one source, leave one out"),
    ("celeb_a", {"image_size": 64, "celeba_dir": ".", "fake_data": True}, "one source, leave one out"),
    ("mnist", {"fake_data": True, "manual_dir": "."}, "`fake_data` and `manual_dir`: .* leave one out"),
    ("nonesuch", {"fake_data": True}, "unknown data set 'nonesuch'"),
    ("CelebA", {}, "TFDS calls it 'celeb_a', give this name"),
]


@pytest.mark.parametrize(("name", "options", "message"), NONSENSE)
def test_options_that_make_no_sense_are_refused_in_one_line(name, options, message):
    for function in (datasets.check, datasets.load):
        with pytest.raises(datasets.DatasetError, match=message) as error:
            function(name, **options)
        assert "\n" not in str(error.value)


def test_options_that_make_sense_pass():
    for image_size in (8, 148):
        datasets.check("celeb_a", image_size=image_size, flip=True, dequantize=True)
        datasets.check("celeb_a:2.1.0", image_size=image_size, celeba_dir="nowhere yet")
    loaded = datasets.load("celeb_a", image_size=8, flip=True, dequantize=True, fake_data=True)
    assert loaded.shape == (8, 8, 3)
    index = jnp.arange(20)
    drawn = gathered(loaded, KEY, index)
    expected = datasets.image_dataset(loaded.train, loaded.test, flip=True, dequantized=True)
    np.testing.assert_array_equal(drawn, gathered(expected, KEY, index))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nonesuch", "unknown data set 'nonesuch'.*mnist"),
        ("not a name!", "unknown data set"),
        ("imagenette", "no 8-bit `image` of a fixed shape"),
        ("imdb_reviews", "no 8-bit `image` of a fixed shape"),
    ],
)
def test_unknown_or_unfit_names_are_refused_in_one_line(name, message):
    with pytest.raises(datasets.DatasetError, match=message) as error:
        datasets.check(name)
    assert "\n" not in str(error.value)


def test_preparing_without_tensorflow_names_the_extra(tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "tensorflow" else find_spec(name, *rest)
    )
    with pytest.raises(datasets.DatasetError, match=r"pip install .*\[prepare\]"):
        datasets.load("mnist", data_dir=str(tmp_path))


@pytest.mark.parametrize("manual", [None, "empty"])
def test_neither_network_nor_archives(tmp_path, monkeypatch, manual):
    import requests

    def head(*args, **kwargs):
        raise requests.ConnectionError("no network")

    monkeypatch.setattr(requests, "head", head)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: True)
    if manual:
        (tmp_path / manual).mkdir()
    with pytest.raises(
        datasets.DatasetError, match=r"cannot be downloaded.*train-images-idx3-ubyte\.gz.*`manual_dir`"
    ) as error:
        datasets.load("mnist", data_dir=str(tmp_path), manual_dir=manual and str(tmp_path / manual))
    assert "\n" not in str(error.value)
