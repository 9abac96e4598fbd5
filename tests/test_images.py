"""Fake images, and what TFDS refuses; MNIST's own images are in test_mnist."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lvae_jax import datasets, images

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("shape", [(28, 28, 1), (16, 24, 3)])
def test_fake_images_have_structure_and_are_always_the_same(shape):
    train, test = images.fake_images(shape)
    assert (train.dtype, train.shape, test.shape) == (np.uint8, (384, *shape), (128, *shape))
    for one, other in zip((train, test), images.fake_images(shape), strict=True):
        np.testing.assert_array_equal(one, other)
    together = np.concatenate([train, test]).astype(np.float64)
    assert len(np.unique(together.reshape(512, -1), axis=0)) == 512, "all differ, between the splits too"
    assert together.min() == 0
    assert together.max() == 255
    # Neighbours are alike, as in pictures and unlike noise; but not everywhere, nor without noise.
    pixels = together - together.mean(axis=(1, 2), keepdims=True)
    correlation = np.mean(pixels[:, :, 1:] * pixels[:, :, :-1]) / np.mean(pixels**2)
    assert 0.8 < correlation < 0.99
    steps = np.abs(np.diff(together, axis=2))
    assert np.median(steps) == pytest.approx(0.02 * 255 * np.sqrt(2) * 0.6745, rel=0.3), (
        "median of a difference of noises"
    )


@pytest.mark.parametrize("name", ["celeb_a", "omniglot/none"])
def test_missing_labels(name, tmp_path):
    message = "has no `label`, one class for each image" if name == "celeb_a" else "unknown data set"
    with pytest.raises(datasets.DatasetError, match=message) as error:
        images.tfds_labels(name, data_dir=str(tmp_path))
    assert "\n" not in str(error.value)
    assert not list(tmp_path.rglob("*.npy"))


def test_fake_images_need_neither_network_nor_files_nor_tensorflow(tmp_path):
    code = """if True:
        import importlib.machinery, socket
        finder = importlib.machinery.PathFinder
        find_spec = finder.find_spec
        finder.find_spec = lambda name, *rest: None if name == "tensorflow" else find_spec(name, *rest)
        assert importlib.util.find_spec("tensorflow") is None
        def refuse(*arguments, **options):
            raise AssertionError("the network")
        socket.socket.connect = socket.getaddrinfo = refuse
        from lvae_jax import datasets
        for name, size in (("celeb_a", 24), ("mnist", None), ("cifar10", None)):
            print(datasets.load(name, image_size=size, fake_data=True).shape)
    """
    environment = {**os.environ, "HOME": str(tmp_path), "TFDS_DATA_DIR": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert result.stdout.splitlines() == ["(24, 24, 3)", "(28, 28, 1)", "(32, 32, 3)"], result.stderr
    assert not [file for file in tmp_path.rglob("*.npy")]


def test_fakes_do_not_mind_a_data_set_in_another_format(tmp_path):
    """--data_dir with what TFDS's own defaults prepared."""
    info = tmp_path / "mnist" / "3.0.1" / "dataset_info.json"
    info.parent.mkdir(parents=True)
    info.write_text('{"name": "mnist", "version": "3.0.1", "fileFormat": "tfrecord"}')
    (info.parent / "features.json").write_text("{}")
    assert datasets.load("mnist", fake_data=True, data_dir=str(tmp_path)).shape == (28, 28, 1)
