"""The real MNIST: needs its four archives, see conftest.py. No test here has parameters: a function is one test."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import results
from experiments.results import Summary
from lvae_jax import datasets, evaluation, images

ROOT = Path(__file__).parents[1]
# TensorFlow and TFDS warn about their own use of other packages while they prepare a data set.
pytestmark = [pytest.mark.mnist, pytest.mark.filterwarnings("default")]


@pytest.fixture(scope="module")
def mnist_dir(tmp_path_factory):
    """MNIST as TFDS prepares it."""
    data_dir = str(tmp_path_factory.mktemp("tfds"))
    datasets.load("mnist", data_dir=data_dir, manual_dir=os.environ["MNIST_ARCHIVES"])
    return data_dir


def test_known_statistics(mnist_dir):
    mnist = datasets.load("mnist", data_dir=mnist_dir)
    assert mnist.train.shape == (60000, 28, 28, 1)
    assert mnist.test.shape == (10000, 28, 28, 1)
    # The mean and standard deviation by which everybody normalises MNIST.
    assert mnist.train.mean() / 255 == pytest.approx(0.1307, abs=5e-5)
    assert mnist.train.std() / 255 == pytest.approx(0.3081, abs=5e-5)
    assert not {image.tobytes() for image in mnist.train} & {image.tobytes() for image in mnist.test}


def test_damaged_records(mnist_dir, tmp_path):
    shutil.copytree(mnist_dir, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.npy"))
    (record,) = tmp_path.glob("mnist/*/mnist-train.array_record*")
    for size in (1000, 0):
        with open(record, "r+b") as file:
            file.truncate(size)
        with pytest.raises(datasets.DatasetError, match=r"the data in .* are damaged: delete it") as error:
            datasets.load("mnist", data_dir=str(tmp_path))
        assert "\n" not in str(error.value)
        assert not list(tmp_path.rglob("*.npy"))


def test_labels(mnist_dir, monkeypatch):
    import tensorflow_datasets as tfds

    mnist, labels = datasets.load("mnist", data_dir=mnist_dir), images.tfds_labels("mnist", data_dir=mnist_dir)
    builder = tfds.builder("mnist", data_dir=mnist_dir, file_format="array_record")
    for array, of_split, split in zip((mnist.train, mnist.test), labels, ("train", "test"), strict=True):
        assert of_split.dtype == np.int32
        examples = builder.as_data_source(split=split).__getitems__(range(0, len(array), 37))
        np.testing.assert_array_equal(of_split[::37], [example["label"] for example in examples])
        np.testing.assert_array_equal(array[::37], [example["image"] for example in examples])
    # How often each digit is known to be there.
    assert np.bincount(labels[0]).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert np.bincount(labels[1]).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    monkeypatch.setattr(images, "_items", None)
    again = images.tfds_labels("mnist", data_dir=mnist_dir)
    np.testing.assert_array_equal(again[0], labels[0])
    assert isinstance(again[1], np.memmap), "read once, mapped from then on"


def test_reading_needs_no_tensorflow(mnist_dir, tmp_path):
    images.tfds_labels("mnist", data_dir=mnist_dir)  # those of the larger split stay cached
    shutil.copytree(Path(mnist_dir, "mnist"), tmp_path / "mnist", ignore=shutil.ignore_patterns("*test-*.npy"))
    code = (
        "import sys; from lvae_jax import datasets, images; "
        f"print(datasets.load('mnist', data_dir={str(tmp_path)!r}).test.shape, "
        f"images.tfds_labels('mnist', data_dir={str(tmp_path)!r})[1].shape, 'tensorflow' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.strip() == "(10000, 28, 28, 1) (10000,) False", result.stderr


def test_sweep(mnist_dir, tmp_path):
    flags = ["--dataset=mnist", "--density", "--variants=ls", f"--data_dir={mnist_dir}", f"--run_dir={tmp_path}"]
    flags += ["--num_steps=4", "--num_seeds=1", "--batch_size=16", "--latent_size=8", "--widths=8", "--num_blocks=1"]
    command = [sys.executable, "-m", "experiments.sigma_sweep", *flags]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert result.returncode == 0, result.stderr
    summary = results.read(tmp_path / "summary.json", Summary)
    assert summary.num_test_examples == 10000
    assert summary.num_dimensions == 784
    assert summary.unit == "pixel on [0, 1]"
    assert [round(bits, 4) for bits in summary.histograms.values()] == [1.6888, 1.9673]
    # An untrained LS-VAE: the mean near zero, and the density of the whole test split in closed form.
    (ls,) = summary.rows
    x = np.asarray(datasets.to_float(datasets.load("mnist", data_dir=mnist_dir).test))
    expected = -0.5 * 784 * np.log(2 * np.pi * ls.sigma**2) - 784 * ls.mse / (2 * ls.sigma**2)
    assert ls.log_likelihood == pytest.approx(expected, rel=1e-4)
    assert ls.mse == pytest.approx(float(jnp.mean(x**2)), rel=0.2)
    assert (tmp_path / "figures" / "samples.png").stat().st_size > 10_000


def test_partial_chunk_counts(mnist_dir):
    test = datasets.load("mnist", data_dir=mnist_dir).test

    def pixel_sums(x, index):
        sums = x.reshape(len(x), -1).sum(axis=1, dtype=np.float64)
        return evaluation.Scores(*7 * [sums])

    scores = evaluation.over_split(pixel_sums, test, chunk_size=768)
    np.testing.assert_array_equal(scores.elbo, test.reshape(10000, -1).sum(axis=1))


@pytest.fixture
def copy(mnist_dir, tmp_path):
    """A folder with the prepared data and their caches."""
    shutil.copytree(mnist_dir, tmp_path / "copy")
    return tmp_path / "copy"


def test_damaged_caches(copy):
    for split in ("train", "test"):
        cache = next((copy / "mnist").glob(f"*-{split}-images.npy"))
        cache.write_bytes(cache.read_bytes()[:5000])
    with pytest.raises(datasets.DatasetError, match="damaged: delete"):
        datasets.load("mnist", data_dir=str(copy))


def test_data_that_were_prepared_again_are_decoded_again(copy):
    """Under the same name and version: the files tell."""
    before = set((copy / "mnist").glob("*-test-images.npy"))
    shard = next((copy / "mnist").glob("*/*test.array_record*"))
    os.utime(shard, ns=(1, 1))
    datasets.load("mnist", data_dir=str(copy))
    assert len(set((copy / "mnist").glob("*-test-images.npy")) - before) == 1


def test_other_file_format(mnist_dir, tmp_path):
    """As anybody has it who prepared MNIST with TFDS's own defaults."""
    shutil.copytree(Path(mnist_dir, "mnist"), tmp_path / "mnist", ignore=shutil.ignore_patterns("*.npy"))
    info = next((tmp_path / "mnist").glob("*/dataset_info.json"))
    for shard in info.parent.glob("*.array_record*"):
        shard.rename(shard.with_name(shard.name.replace("array_record", "tfrecord")))
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    with pytest.raises(datasets.DatasetError, match=r"another file format.*`data_dir`"):
        datasets.load("mnist", data_dir=str(tmp_path))
