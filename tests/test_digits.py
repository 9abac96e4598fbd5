"""The digits that scikit-learn ships: real images with no download, end to end."""

import math

import numpy as np
import pytest
import sklearn.datasets

from experiments import command, critical_sigma, generate, quality, sigma_sweep
from lvae_jax import datasets, runs

SMALL = {"discretise": False, "num_seeds": 1, "num_steps": 4, "latent_size": 2, "widths": (4,), "num_blocks": 1}


@pytest.fixture(scope="module")
def sweep(plain_sweep, tmp_path_factory):
    """A finished run, by densities, its summary, and the lines that it printed."""
    run_dir, lines = tmp_path_factory.mktemp("digits") / "run", []
    config = sigma_sweep.configure(dataset="digits", sigma=(0.7071,), **SMALL)
    return run_dir, sigma_sweep.run(config, run_dir=str(run_dir), echo=lines.append), lines


def test_splits_hold_every_image_once():
    digits, data = datasets.load("digits"), sklearn.datasets.load_digits()
    assert (digits.train.shape, digits.test.shape, digits.levels) == ((1433, 8, 8, 1), (364, 8, 8, 1), 17)
    both = np.concatenate([digits.train, digits.test])[..., 0]
    labels = np.concatenate(datasets.labels("digits"))
    found = sorted((int(label), image.tobytes()) for label, image in zip(labels, both, strict=True))
    images = data.images.astype(np.uint8)
    assert found == sorted((int(label), image.tobytes()) for label, image in zip(data.target, images, strict=True))


def test_split_is_stratified():
    train, test = (np.bincount(labels) for labels in datasets.labels("digits"))
    np.testing.assert_allclose(test / (train + test), 0.2, atol=0.005)


def test_defaults_are_small():
    config, mnist = sigma_sweep.configure(dataset="digits"), sigma_sweep.configure(dataset="mnist")
    assert config.latent_size < mnist.latent_size
    assert len(config.widths) < len(mnist.widths)
    assert 8 % 2 ** len(config.widths) == 0, "each convolution halves the side"


def test_rates_are_of_17_levels(sweep):
    _, summary, lines = sweep
    assert (summary.levels, summary.kind) == (17, "density")
    for row in summary.rows:
        assert row.bound == pytest.approx(64 * math.log(17))
        assert row.bits_per_dimension == pytest.approx(-row.code_elbo / (64 * math.log(2)))
    assert [round(bits, 4) for bits in summary.histograms.values()] == [2.4231, 2.9764]
    assert "k/16, not likelihoods" in " ".join(lines)


def test_each_row_is_printed_when_it_is_done(sweep):
    _, summary, lines = sweep
    titles = ["F-VAE, sigma = 0.7071", "LS-VAE, sigma = ", "LV-VAE, sigma = "]
    assert lines[0].startswith("data: 1433 training and 364 test examples of shape [8, 8, 1]")
    for line, title, row in zip(lines[1:], titles, summary.rows, strict=False):
        assert line.startswith(title)
        assert f"ELBO {row.elbo:.4f} nats" in line
        assert line.endswith(row.diagnosis)
    assert len(lines) == 6, "the data, three rows, the table, where everything is"


def test_generate_takes_grey_levels(sweep, tmp_path):
    run_dir, _, _ = sweep
    test = datasets.load("digits").test[:3]
    np.save(tmp_path / "levels.npy", test)
    np.save(tmp_path / "bytes.npy", (15.9375 * test).astype(np.uint8))
    options = {"variants": ["ls"], "num_samples": 2, "echo": lambda line: None}
    generate.run(str(run_dir), images=[str(tmp_path / "levels.npy")], out=str(tmp_path / "out"), **options)
    with np.load(tmp_path / "out" / "ls-seed0.npz") as arrays:
        np.testing.assert_allclose(arrays["images"], test / 16.0, rtol=1e-6)
    with pytest.raises(command.UsageError, match=r"bytes\.npy: has a pixel of \d+, give grey levels from 0 to 16"):
        generate.run(str(run_dir), images=[str(tmp_path / "bytes.npy")], out=str(tmp_path / "no"), **options)
    assert not (tmp_path / "no").exists()


def test_quality_knows_the_labels(sweep):
    run_dir, _, _ = sweep
    scores = quality.run(str(run_dir), classifier_steps=60, echo=lambda line: None)
    assert scores.num_images == 364
    assert scores.classifier_accuracy > 0.5, "a tenth, if labels and images did not belong together"


def test_critical_sigma(tmp_path):
    config = critical_sigma.Config(dataset="digits")
    summary = critical_sigma.run(config, run_dir=str(tmp_path / "run"), echo=lambda line: None)
    x = datasets.load("digits").train.reshape(1433, 64) / 16.0
    assert summary.critical_sigma == pytest.approx(np.sqrt(np.linalg.eigvalsh(np.cov(x.T, bias=True))[-1]), rel=1e-4)


@pytest.mark.parametrize("option", [{"fake_data": True}, {"manual_dir": "."}])
def test_downloads_options_are_refused(option):
    with pytest.raises(datasets.DatasetError, match="come with scikit-learn: leave it out"):
        datasets.check("digits", **option)


def test_run_from_before_levels_were_recorded(sweep, tmp_path):
    run_dir, _, _ = sweep
    for name, key in (("flags.json", "levels"), ("summary.json", "levels")):
        content = runs.read_json(run_dir / name)
        del content[key]
        runs.write_json(tmp_path / name, content)
    lines = []
    config = sigma_sweep.configure(dataset="digits", sigma=(0.7071,), **SMALL)
    sigma_sweep.run(config, run_dir=str(tmp_path), echo=lines.append)
    assert lines[0] == f"{tmp_path} is finished"
