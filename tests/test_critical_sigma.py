"""Where a fixed sigma stops a decoder from learning: the exact limit, linear VAEs trained to it, and the experiment."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from conftest import call, filled, run_command

from experiments import command, critical_sigma, sigma_sweep
from experiments.results import Row
from lvae_jax import datasets, diagnostics, likelihoods, runs, theory, toy, training
from lvae_jax import vae as vae_lib
from lvae_jax.keys import example_keys
from lvae_jax.networks import Decoder, Encoder

pytestmark = pytest.mark.usefixtures("plain_sweep")

# Linear VAEs on Gaussian data, whose principal stddevs these are

STDDEVS = np.array([2.0, 1.0, 0.5, 0.2])
SIGMAS = np.float32([0.4, 0.8, 1.6, 2.5])  # between them, and above all
SIZE, LATENT_SIZE, NUM_STEPS = 256, 3, 3000


def gaussian_data():
    """[256, 4], rotated and shifted; the sample's own covariance has these stddevs, and no other number matters."""
    rng = np.random.default_rng(0)
    white = rng.standard_normal((SIZE, 4))
    white = np.linalg.qr(white - white.mean(0))[0] * np.sqrt(SIZE)
    rotation = np.linalg.qr(rng.standard_normal((4, 4)))[0]
    return np.float32(white * STDDEVS @ rotation + [1.0, -2.0, 0.0, 0.5])


def linear_vae(sigma):
    """Of affine maps alone, and a stddev of q(z|x) that does not depend on x."""

    def encode(params, x):
        mean = x @ params["w"] + params["b"][None]
        return mean, jnp.broadcast_to(params["log_stddev"][None], mean.shape)

    def init(key):
        weights = 0.1 * jax.random.normal(key, (4, LATENT_SIZE))
        return {"w": weights, "b": jnp.zeros(LATENT_SIZE), "log_stddev": jnp.zeros(LATENT_SIZE)}

    decoder = Decoder(
        lambda key: {"w": 0.1 * jax.random.normal(key, (LATENT_SIZE, 4)), "b": jnp.zeros(4)},
        lambda params, z: (z @ params["w"] + params["b"][None])[..., None],
    )
    return vae_lib.VAE(Encoder(init, encode), decoder, likelihoods.fixed(sigma), LATENT_SIZE)


@pytest.fixture(scope="module")
def linear_vaes():
    """The data, and the parameters of a linear VAE for each of SIGMAS, trained by full batches of it."""
    x, optimizer = gaussian_data(), training.optimizer(NUM_STEPS, learning_rate=5e-3)

    def train(sigma):
        vae = linear_vae(sigma)

        def step(state, index):
            key = jax.random.fold_in(jax.random.key(1), index)
            return training.train_step(key, vae, optimizer, state, jnp.array(x), jnp.arange(SIZE))[0], None

        return jax.lax.scan(step, training.init_state(jax.random.key(0), vae, optimizer), jnp.arange(NUM_STEPS))[
            0
        ].params

    params = jax.jit(jax.vmap(train))(SIGMAS)
    return x, [jax.tree.map(lambda leaf, index=index: leaf[index], params) for index in range(len(SIGMAS))]


def exact_terms(x, params, sigma):
    """The mean log likelihood and KL, the expectation over z in closed form: E|x - Wz - b|^2 has the trace of W diag
    s^2 W^T beside the error of the mean."""
    encoder, decoder = (jax.tree.map(np.float64, params[part]) for part in ("encoder", "decoder"))
    mean, stddev = x @ encoder["w"] + encoder["b"], np.exp(encoder["log_stddev"])
    error = np.sum((x - mean @ decoder["w"] - decoder["b"]) ** 2, axis=1).mean()
    error += stddev**2 @ np.sum(decoder["w"] ** 2, axis=1)
    kl = 0.5 * np.sum(mean**2 + stddev**2 - 1.0 - 2.0 * np.log(stddev), axis=1).mean()
    return -0.5 * error / sigma**2 - 2.0 * np.log(2.0 * np.pi * sigma**2), kl


@pytest.mark.parametrize("index", range(len(SIGMAS)))
def test_linear_vaes_reach_the_limit(linear_vaes, index):
    x, params = linear_vaes[0], linear_vaes[1][index]
    sigma = float(SIGMAS[index])
    log_likelihood, kl = exact_terms(x, params, sigma)
    stddevs = theory.principal_stddevs([x])
    np.testing.assert_allclose(stddevs, STDDEVS, rtol=1e-5)
    best = theory.linear_best_elbo(sigma, stddevs, num_dimensions=4, latent_size=LATENT_SIZE)
    # Both in closed form, so that no draw blurs them: what is missing is what training left, and nothing exceeds.
    assert best - 2e-3 < log_likelihood - kl < best + 1e-6
    keys = example_keys(jax.random.key(2), jnp.arange(SIZE))
    terms = vae_lib.elbo(keys, linear_vae(sigma), params, jnp.array(x))
    found = diagnostics.summarise(diagnostics.details(terms, floor=0.0))
    assert found.active_directions == np.sum(sigma < STDDEVS)
    draws = np.float64(terms.elbo)
    assert abs(draws.mean() - log_likelihood + kl) < 4.0 * draws.std() / np.sqrt(SIZE), "the bound is that of `elbo`"


def test_collapse_above_the_critical_sigma(linear_vaes):
    x, params = linear_vaes[0], linear_vaes[1][-1]
    assert SIGMAS[-1] > STDDEVS[0]
    assert exact_terms(x, params, float(SIGMAS[-1]))[1] < 1e-3
    assert np.abs(params["decoder"]["w"]).max() < 0.05
    np.testing.assert_allclose(params["decoder"]["b"], x.mean(0), atol=0.05)


# The experiment


def compute(config, run_dir, **options):
    lines = []
    summary = critical_sigma.run(config, run_dir=str(run_dir), echo=lines.append, **options)
    return summary, "\n".join(lines)


def test_critical_sigma_of_the_toy(tmp_path):
    summary, text = compute(critical_sigma.Config(dataset="toy", sigma=(0.5, 1.0, 3.0)), tmp_path / "run")
    n, noise = critical_sigma.STREAM_SIZE, np.mean(np.square(toy.NOISE))
    exact = np.sqrt([np.pi**2 / 3.0 + noise, 0.5 + noise])
    # The square of a uniform variable on (-pi, pi) has variance 4 pi^4 / 45, that of the cosine 1/8.
    errors = np.sqrt([4.0 * np.pi**4 / 45.0, 0.125]) / np.sqrt(n) / (2.0 * exact)
    assert np.all(np.abs(summary.principal_stddevs - exact) < 4.5 * errors)
    assert summary.critical_sigma == summary.principal_stddevs[0]
    assert [row.directions for row in summary.rows] == [2, 1, 0]
    expected = theory.linear_best_elbo(
        np.array([0.5, 1.0, 3.0]), np.array(summary.principal_stddevs), num_dimensions=2, latent_size=2
    )
    np.testing.assert_allclose([row.linear_elbo for row in summary.rows], expected)
    assert summary.num_examples == n
    assert f"critical sigma: {summary.critical_sigma:.4g}, unit: toy length" in text
    # The coordinates are uncorrelated, of different variances.
    assert summary.correlation == pytest.approx(1.0, abs=0.01)
    said = " ".join(text.split())
    assert summary.mean_sigma == pytest.approx(np.sqrt(np.mean(exact**2)), rel=0.01)
    assert "root of the mean variance. It does not stay there" in said
    assert f"by chance, independent dimensions have {summary.chance:.4g}. It can stay there" in said
    old = dataclasses.replace(summary, correlation=None)
    assert "stay there" not in critical_sigma.table(old), "a run from before it was computed"
    assert (tmp_path / "run" / "figures" / "directions.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary.to_json()


@pytest.fixture(scope="module")
def fake_sweep(tmp_path_factory):
    """A finished sweep of fake MNIST, with F-VAEs at two sigmas."""
    config = sigma_sweep.Config(
        dataset="mnist",
        fake_data=True,
        sigma=(0.5, 5.0),
        variants=("f",),
        num_seeds=1,
        num_steps=1,
        batch_size=2,
        latent_size=2,
        widths=(2,),
        num_blocks=1,
    )
    run_dir = tmp_path_factory.mktemp("sweep") / "run"
    return run_dir, sigma_sweep.run(config, run_dir=str(run_dir), echo=lambda line: None)


FAKE = critical_sigma.Config(fake_data=True)


def test_fake_images_beside_trained_vaes(fake_sweep, tmp_path):
    sweep_dir, sweep = fake_sweep
    summary, text = compute(FAKE._replace(sigma=(0.1,), compare=str(sweep_dir)), tmp_path / "run")
    train = datasets.load("mnist", fake_data=True).train
    pixels = np.float64(train.reshape(len(train), -1)) / 255.0
    variances = np.linalg.eigvalsh(np.cov(pixels.T, bias=True))[::-1]
    assert summary.critical_sigma == pytest.approx(np.sqrt(variances[0]), rel=1e-5)
    assert summary.num_examples == len(train)
    assert summary.num_dimensions == 784
    assert summary.unit == "pixel on [0, 1]"
    rows = summary.rows
    assert [row.sigma for row in rows] == [0.1, 0.5, 5.0], "those of the table and those of the sweep"
    assert [row.directions for row in rows] == [int(np.sum(variances > sigma**2)) for sigma in (0.1, 0.5, 5.0)]
    assert rows[0].trained_elbo is None
    for row, theirs in zip(rows[1:], sweep.rows, strict=True):
        for name in ("elbo", "elbo_sd", "active_units", "active_directions", "num_seeds"):
            assert getattr(row, f"trained_{name}") == getattr(theirs, name)
        assert f"{theirs.elbo:.4f}" in text


def test_finished_run_is_of_its_files(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in (1, 2, 3, 182638):
        colour = (80 * (number % 4), 0, 0)
        PIL.Image.new("RGB", (178, 218), colour).save(folder / f"{number:06}.jpg")
    config = critical_sigma.Config(dataset="celeb_a", image_size=8)
    places = {"data_dir": str(tmp_path / "data"), "celeba_dir": str(folder)}
    summary, _ = compute(config, tmp_path / "run", **places)
    assert summary.num_examples == 3
    assert compute(config, tmp_path / "run", **places)[0] == summary
    (folder / "000003.jpg").unlink()
    with pytest.raises(runs.RunError, match=r"celeba_files was .*: give another `path`"):
        compute(config, tmp_path / "run", **places)


def test_default_sigmas(tmp_path, monkeypatch):
    summary, first = compute(FAKE, tmp_path / "run")
    sigmas = [row.sigma for row in summary.rows]
    assert sigmas[-1] == pytest.approx(summary.critical_sigma)
    np.testing.assert_allclose(np.diff(np.log(sigmas)), np.log(100.0) / 11.0, rtol=1e-6)
    directions = [row.directions for row in summary.rows]
    assert directions == sorted(directions, reverse=True)
    monkeypatch.delattr(critical_sigma, "measure")
    again, second = compute(FAKE, tmp_path / "run")
    assert again == summary
    table = critical_sigma.table(summary)
    assert table in first
    assert second.splitlines()[0].endswith("is finished")
    assert second.endswith(table)


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (FAKE, {"flags": {"dataset": "fashion_mnist"}}, "made with --dataset=fashion_mnist, give the same here"),
        (FAKE._replace(fake_data=False), {}, "made with --fake_data=True, give the same here"),
        (FAKE, {"flags": {"celeba_files": "others"}}, "made with --celeba_files=others, give the same here"),
        (FAKE, {"summary": {"kind": "discretised"}}, "its ELBOs are not of the data's density"),
        (
            FAKE,
            {"summary": {"rows": [filled(Row, variant="ls").to_json()]}},
            "has no F-VAE, run its command with f in --variants",
        ),
        (FAKE, {"summary": None}, "no finished run there"),
        (FAKE, {"flags": None}, "cannot be read"),
    ],
)
def test_unfit_comparison_is_refused(fake_sweep, tmp_path, config, change, message):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for name in ("flags", "summary"):
        part = change.get(name, {})
        if part is not None:
            runs.write_json(theirs / f"{name}.json", runs.read_json(fake_sweep[0] / f"{name}.json") | part)
    with pytest.raises((command.UsageError, runs.RunError), match=message) as error:
        compute(config._replace(compare=str(theirs)), tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigma": (0.1, 0.0)}, "--sigma=0: every value must be a number from 1e-6 to 1e6"),
        ({"sigma": (float("nan"),)}, "--sigma=nan"),
        ({"sigma": (-1.0,)}, "--sigma=-1"),
        ({"compare": "nowhere"}, "--compare=nowhere: no finished run there"),
        ({"dataset": "nonesuch"}, "unknown data set 'nonesuch'"),
        ({"dataset": "toy"}, "`fake_data` is for images"),
        ({"image_size": 28}, "`image_size` is for CelebA"),
    ],
)
def test_nonsense_is_refused(tmp_path, change, message):
    with pytest.raises((command.UsageError, datasets.DatasetError), match=message) as error:
        compute(FAKE._replace(**change), tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--sigma=0.1,x", "--sigma=x: must be a number"),
        ("--dataset=toy --compare=nowhere", "no finished run there"),
    ],
)
def test_bad_flags(tmp_path, words, message):
    with pytest.raises(command.UsageError, match=message):
        call(critical_sigma, [*words.split(), f"--run_dir={tmp_path / 'run'}"])
    assert not (tmp_path / "run").exists()


def test_command_ends_in_one_line(tmp_path):
    words = ["--dataset=toy", "--compare=nowhere", f"--run_dir={tmp_path / 'run'}"]
    result = run_command("experiments.critical_sigma", *words)
    assert result.returncode != 0
    assert "no finished run there" in result.stderr
    assert result.stderr.startswith("critical_sigma: ")
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()
