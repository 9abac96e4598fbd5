"""The headroom: gains against closed forms on residuals of known covariance, and of a finished run."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import call
from scipy import stats

from experiments import command, report, sigma_sweep, sweep
from experiments import headroom as experiment
from experiments.results import Headroom
from lvae_jax import headroom, runs
from lvae_jax import vae as vae_lib

SHAPE = (6, 5, 1)
SIZE = 30


def gains(train, test, **options):
    return {gain.kind: gain for gain in headroom.headroom(train, test, **options)}


def drawn(covariance, number=20_000, seed=0, shape=(SIZE,)):
    root = np.linalg.cholesky(covariance)
    return (np.random.default_rng(seed).standard_normal((number, len(covariance))) @ root.T).reshape(number, *shape)


def expected(covariance, truth):
    """The mean of log N(e; 0, covariance) - log N(e; 0, I) in nats, e ~ N(0, truth)."""
    inverse = np.linalg.inv(covariance)
    return 0.5 * (np.trace(truth) - np.trace(inverse @ truth) - np.linalg.slogdet(covariance)[1])


def near(gain, value):
    return abs(gain.nats - value) < 5.0 * gain.error + 0.01


def test_right_model_has_no_headroom():
    found = gains(drawn(np.eye(SIZE), shape=SHAPE), drawn(np.eye(SIZE), seed=1, shape=SHAPE), ranks=(1, 3))
    assert len(found) == 10
    assert all(abs(gain.nats) < 0.15 for gain in found.values())


def test_gains_are_those_of_the_fitted_gaussians():
    rng = np.random.default_rng(2)
    scales = np.exp(rng.normal(size=SIZE))
    factor = rng.normal(size=(SIZE, 2))
    truth = np.diag(scales) @ (np.eye(SIZE) + factor @ factor.T) @ np.diag(scales)
    found = gains(drawn(truth), drawn(truth, seed=1), ranks=(2, SIZE))
    variances, eigenvalues = np.diag(truth), np.linalg.eigvalsh(truth)[::-1]
    assert near(found["one variance"], expected(np.eye(SIZE) * variances.mean(), truth))
    assert near(found["a variance for each dimension"], expected(np.diag(variances), truth))
    rest = eigenvalues[2:].mean()
    principal = np.linalg.eigh(truth)[1][:, ::-1][:, :2]
    probabilistic_pca = rest * np.eye(SIZE) + principal @ np.diag(eigenvalues[:2] - rest) @ principal.T
    assert near(found["one variance, and rank 2"], expected(probabilistic_pca, truth))
    assert near(found["a full covariance, shrunk"], expected(truth, truth))
    assert not any(f"rank {SIZE}" in kind for kind in found), "that is a full covariance"
    order = ["one variance", "a variance for each dimension", "a variance for each dimension, and rank 2"]
    nats = [found[kind].nats for kind in (*order, "a full covariance, shrunk")]
    assert nats == sorted(nats)


def test_low_rank_is_scipys():
    e = drawn(np.eye(SIZE), number=7)
    factors, variance = headroom.principal(drawn(np.diag(np.arange(1.0, SIZE + 1)), number=500), 3)
    covariance = variance * np.eye(SIZE) + factors @ factors.T
    np.testing.assert_allclose(
        headroom.low_rank(e, factors, variance), stats.multivariate_normal.logpdf(e, np.zeros(SIZE), covariance)
    )


@pytest.mark.parametrize("rank", [1, 5, SIZE - 1])
def test_variance_beside_the_factors_is_the_mean_of_the_rest(rank):
    e = drawn(np.diag(np.arange(1.0, SIZE + 1)), number=500)
    eigenvalues = np.linalg.eigvalsh(e.T @ e / len(e))[::-1]
    factors, variance = headroom.principal(e, rank)
    np.testing.assert_allclose(variance, eigenvalues[rank:].mean(), rtol=0.02)
    np.testing.assert_allclose(variance + np.sum(factors**2, axis=0), eigenvalues[:rank], rtol=0.02)


@pytest.mark.parametrize("transform", [headroom.cosines, headroom.haar])
@pytest.mark.parametrize("shape", [(8, 8, 1), (7, 10, 3), (2, 3, 1)])
def test_bases_are_orthonormal(transform, shape):
    size = int(np.prod(shape))
    matrix = transform(np.eye(size).reshape(size, *shape)).reshape(size, size)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), atol=1e-12)
    flat = transform(np.ones((1, *shape)))
    assert np.count_nonzero(np.abs(flat) > 1e-12) < size, "smooth images have few coefficients"


def test_filter_sees_only_pixels_before():
    """Its matrix is triangular with ones on the diagonal."""
    taps = np.arange(1.0, len(headroom.TAPS) + 1.0)
    matrix = headroom.innovations(np.eye(SIZE).reshape(SIZE, *SHAPE), taps).reshape(SIZE, SIZE)
    np.testing.assert_array_equal(np.tril(matrix, -1), 0.0)
    np.testing.assert_array_equal(np.diag(matrix), 1.0)
    assert np.count_nonzero(matrix) > 4 * SIZE


def test_filter_finds_an_autoregression():
    """x_ij = .5 x_i,j-1 + noise along each row: the gain over one variance is that of its innovations."""
    rng = np.random.default_rng(3)
    noise = rng.standard_normal((20_000, 6, 8, 1))
    x = noise.copy()
    x[:, :, 0] /= np.sqrt(1.0 - 0.25)
    for column in range(1, 8):
        x[:, :, column] += 0.5 * x[:, :, column - 1]
    x *= np.sqrt(0.75)
    taps = headroom.causal_taps(x)
    np.testing.assert_allclose(taps[0], 0.5, atol=0.02)
    assert np.abs(taps[1:]).max() < 0.02
    found = gains(x[:10_000], x[10_000:], ranks=())
    assert near(found["a causal filter, and a variance for each dimension"], -6 * 7 * 0.5 * np.log(0.75))


@pytest.mark.parametrize("bad", [np.zeros((1, 3)), np.full((5, 3), np.nan)])
def test_what_cannot_be_fitted(bad):
    with pytest.raises(ValueError, match="`train`: give at least 2 examples, all of whose residuals are finite"):
        headroom.headroom(bad, np.zeros((5, 3)))


def test_residuals_that_never_vary_are_no_infinite_gain():
    e = drawn(np.eye(3), shape=(3,), number=1000)
    e[:, 1] = 0.0
    assert all(np.isfinite(gain.nats) for gain in gains(e, e).values())


# The command


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of correlated points, and one of images by their probabilities."""
    folder = tmp_path_factory.mktemp("finished")
    root = np.array([[1.0, 0.0, 0.0], [0.9, 0.3, 0.0], [0.0, 0.0, 0.1]])
    points = np.random.default_rng(0).standard_normal((3000, 3)) @ root.T
    np.save(folder / "points.npy", points.astype(np.float32))
    small = {"num_seeds": 2, "num_steps": 5, "widths": (8,), "num_blocks": 1, "batch_size": 16, "latent_size": 1}
    patch = pytest.MonkeyPatch()
    patch.setattr("experiments.report.draw", lambda *arguments, **options: None)
    for name, data, variants in (
        ("points", str(folder / "points.npy"), ("ls",)),
        ("digits", "digits", ("logistic",)),
    ):
        config = sweep.configure(dataset=data, variants=variants, **small)
        sigma_sweep.run(config, run_dir=str(folder / name), echo=lambda line: None)
    patch.undo()
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "runs")


def run(path, config=None, **options):
    return experiment.run(str(path), config, echo=lambda line: None, **options)


def test_gain_is_that_of_another_head(folder):
    """Of a model of independent dimensions that keeps its networks, with the variances of its residuals: its own log
    density, computed anew."""
    points = str(folder / "points.npy")
    found = run(folder / "points", experiment.Config(num_train=1000, num_test=300), dataset=points)
    assert found.num_test == 300
    assert json.loads((folder / "points/headroom/summary.json").read_text()) == found.to_json()
    assert max(row.nats for row in found.rows) > 0.3, "the correlation of the first two"
    assert all(np.isfinite(row.nats) and np.isfinite(row.error) for row in found.rows)
    row = found.rows[0]
    assert row.bits == pytest.approx(row.nats / 3 / np.log(2.0))


def test_other_families_are_judged_by_their_own_density(folder):
    found = run(folder / "digits", experiment.Config(num_train=300, num_test=200))
    assert found.dequantised
    config, summary = sweep.read_run(folder / "digits")
    member = summary.members[0]
    vae, params = sweep.trained(folder / "digits", config._replace(discretise=False), member, summary.form)
    x = jax.random.uniform(jax.random.key(0), (5, 8, 8, 1))
    terms = vae_lib.elbo(jax.random.split(jax.random.key(1), 5), vae, params, x)
    density = experiment.log_density(vae, terms)
    scaled = stats.logistic.logpdf(np.float64(terms.residual), scale=np.sqrt(3.0) / np.pi)
    np.testing.assert_allclose(density, scaled.reshape(5, -1).sum(axis=1), rtol=1e-4)


def test_finished_headroom_is_only_reported(folder, monkeypatch):
    first = run(folder / "digits", experiment.Config(num_train=300, num_test=200))
    monkeypatch.setattr(experiment, "measure", None)
    lines = []
    assert (
        experiment.run(str(folder / "digits"), experiment.Config(num_train=300, num_test=200), echo=lines.append)
        == first
    )
    verdicts = lines[-1].splitlines()[-2:]
    assert "a variance for each dimension would win" in verdicts[0]
    config, summary = sweep.read_run(folder / "digits")
    assert sigma_sweep.run(config, run_dir=str(folder / "digits"), echo=lines.append) == summary
    assert lines[-1].splitlines()[-2:] == verdicts, "the diagnosis of the sweep has them, too"
    with pytest.raises(runs.RunError, match="other flags"):
        run(folder / "digits", experiment.Config(num_train=301, num_test=200))


BAD = {
    "": "--run_dir: give the directory of a finished run",
    "--run_dir=RUN --rank=0": "--rank=0: every value must be at least 1",
    "--run_dir=RUN --num_train=99": "--num_train=99: must be at least 100",
    "--run_dir=RUN --dataset=./x": "--dataset: leave it out, this is no run on data of your own",
    "--run_dir=RUN/nowhere": "cannot be read",
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_ends_in_one_line(folder, words):
    with pytest.raises((command.UsageError, runs.RunError), match=BAD[words]) as error:
        call(experiment, words.replace("RUN", str(folder / "digits")).split())
    assert "\n" not in str(error.value)
    assert not (folder / "digits/headroom").exists()


def test_verdict_says_what_is_left_in_words():
    row = {"variant": "ls", "sigma": 0.1, "nats_sd": 0.0, "error": 0.1}
    kinds = {"one variance": 0.0, "a variance for each dimension": 8.0, "a full covariance, shrunk": 10.0}
    rows = [experiment.HeadroomRow(kind=kind, nats=nats, bits=nats / 100.0, **row) for kind, nats in kinds.items()]
    result = Headroom(
        rows=rows, num_seeds=1, num_train=100, num_test=100, dequantised=False, device="", jax=jax.__version__
    )
    first, second = report.verdicts(result)
    assert first == "LS-VAE: a variance for each dimension would win +8 nats, +0.080 bits/dim;"
    assert second.strip() == "the best of all, a full covariance, shrunk, 2 nats more, 0.020 bits/dim"
    assert dataclasses.is_dataclass(rows[0])
    assert jnp.isfinite(rows[0].nats)
