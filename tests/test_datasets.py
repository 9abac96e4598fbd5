"""Batches as pure functions of (seed, step); the TFDS path is tested on real MNIST in test_sigma_sweep."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvae_jax import datasets, toy


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
    x = images.batch(images.train, jax.random.key(0), np.array([6, 0]))
    np.testing.assert_allclose(x[:, 0, 0, 0], [6 / 255, 0.0], rtol=1e-7)
    assert x.shape == (2, 2, 3, 1)
    assert x.dtype == np.float32
    np.testing.assert_array_equal(datasets.to_float(np.array([0, 255], np.uint8)), [0.0, 1.0])
    np.testing.assert_array_equal(datasets.to_float(np.array([0.5, -3.0], np.float32)), [0.5, -3.0])


def test_the_toy_streams_fresh_points_and_holds_out_others():
    stream = datasets.load("toy")
    indices = jnp.asarray(stream.indices(0, 0, 50))
    batches = [np.asarray(stream.batch(None, jax.random.key(seed), indices)) for seed in range(2)]
    together = np.concatenate([*batches, stream.test])
    assert len(np.unique(together, axis=0)) == len(together)
    assert stream.test.shape == (datasets.TOY_TEST_SIZE, *toy.SHAPE)
    np.testing.assert_array_equal(stream.test, datasets.load("toy").test)


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
        datasets.check_name(name)
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
        datasets.DatasetError, match=r"cannot be downloaded.*train-images-idx3-ubyte\.gz.*--manual_dir"
    ) as error:
        datasets.load("mnist", data_dir=str(tmp_path), manual_dir=manual and str(tmp_path / manual))
    assert "\n" not in str(error.value)
