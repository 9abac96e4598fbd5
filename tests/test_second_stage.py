"""The second stage: what fitted priors gain is what an independent count says, no prior makes a model worse, and a fit
that is stopped goes on to the bit."""

import contextlib
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.spatial
import scipy.special
import scipy.stats
import tqdm
from conftest import arrays_in, call, filled, once

from experiments import command, generate, latents, quality, realism, second_stage, sigma_sweep, signals, sweep
from experiments.latents import Codes, Config, Split
from experiments.results import Member, SecondStage
from lvae_jax import datasets, images, priors, runs
from lvae_jax import vae as vae_lib

pytestmark = pytest.mark.usefixtures("plain_sweep")

# With little weight on the KL, codes are far from N(0, I).
TOY = sweep.configure(variants=("f", "ls"), num_seeds=2, seed=3, num_steps=200, widths=(16,), num_blocks=1, beta=0.05)
SMALL = Config(variant=("ls",), num_examples=600, num_components=3, num_layers=2, width=8, num_steps=60, batch_size=32)
IMAGES = sweep.configure(dataset="digits", variants=("ls",), num_seeds=1, num_steps=30)._replace(
    batch_size=16, latent_size=3, widths=(4,)
)
STANDARD, POSTERIOR = second_stage.STANDARD, second_stage.POSTERIOR


def run(run_dir, config=SMALL, **options):
    return second_stage.run(str(run_dir), config, echo=lambda line: None, **options)


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A finished run on the toy, whose codes are far from N(0, I)."""

    def make(folder):
        sigma_sweep.run(TOY, run_dir=str(folder / "run"), echo=lambda line: None)

    return once(tmp_path_factory, "swept", make) / "run"


@pytest.fixture(scope="module")
def staged(swept, tmp_path_factory):
    """A copy of that run with a finished second stage."""

    def make(folder):
        shutil.copytree(swept, folder / "run")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(second_stage, "NUM_EVIDENCE_EXAMPLES", 20)
            run(folder / "run", SMALL._replace(evidence=True))

    return once(tmp_path_factory, "staged", make) / "run"


@pytest.fixture
def toy(swept, tmp_path):
    return shutil.copytree(swept, tmp_path / "toy")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    path = tmp_path_factory.mktemp("digits") / "run"
    sigma_sweep.run(IMAGES, run_dir=str(path), echo=lambda line: None)
    return path


def results(path):
    return SecondStage.from_json(json.loads((path / "second_stage" / "summary.json").read_text()))


@pytest.mark.parametrize("name", latents.FITTED)
def test_gain_is_the_change_of_the_elbo(staged, name):
    config, summary = sweep.read_run(staged)
    member = next(member for member in summary.members if member.seed == 4 and member.variant == "ls")
    vae, params = latents.model(staged, config, member=member, form=summary.form, prior=name)
    found = {each.prior: each for each in results(staged).members if each.seed == 4}
    assert found[STANDARD].elbo == member.elbo
    assert found[STANDARD].gain == 0.0
    mean, log_stddev = vae_lib.encode(vae, params, jnp.asarray(datasets.toy_stream().test))
    z = np.random.default_rng(0).normal(np.tile(mean, (5, 1)), np.exp(np.tile(log_stddev, (5, 1))))
    log_prior = vae.prior.log_prob(params["prior"], jnp.asarray(z, jnp.float32))
    gains = np.asarray(log_prior, np.float64) - scipy.stats.norm.logpdf(z).sum(axis=1)
    assert found[name].gain == pytest.approx(gains.mean(), abs=5.0 * gains.std() / np.sqrt(10_000))
    assert found[name].elbo == pytest.approx(member.elbo + found[name].gain)
    assert found[name].kl == pytest.approx(found[STANDARD].kl - found[name].gain)
    assert found[name].gain > 0.05, "it has learned something"
    assert found[name].information[0] <= found[name].information[1] <= found[name].kl


def test_gap_is_the_sum_of_its_parts(staged):
    """By another quadrature of log p(x): all nodes of one grid, in float64."""
    config, summary = sweep.read_run(staged)
    member = next(member for member in summary.members if member.variant == "ls" and member.seed == 3)
    found = {each.prior: each for each in results(staged).members if (each.variant, each.seed) == ("ls", 3)}
    x = jnp.asarray(datasets.toy_stream().test[:20])
    true = np.asarray(sweep.domain(config).log_prob(x), np.float64)
    side = np.linspace(-8.0, 8.0, 501)
    nodes = jnp.asarray(np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2), jnp.float32)
    for name, each in found.items():
        if name == POSTERIOR:
            assert each.gap is None
            continue
        assert each.prior_gap + each.model_gap + each.posterior_gap == pytest.approx(each.gap, abs=1e-3)
        assert each.posterior_gap > -0.3
        vae, params = latents.model(
            staged, config, member=member, form=summary.form, prior=None if name == STANDARD else name
        )
        means = vae_lib.decode(vae, params, nodes)[..., 0]
        stddev = float(np.exp(params["likelihood"]["log_stddev"]))
        log_prior = np.asarray(vae.prior.log_prob(params.get("prior", {}), nodes), np.float64)
        squares = scipy.spatial.distance.cdist(x, means, "sqeuclidean")
        log_joint = log_prior - squares / (2.0 * stddev**2) - 2.0 * np.log(stddev) - np.log(2.0 * np.pi)
        evidence = scipy.special.logsumexp(log_joint, axis=1) + 2.0 * np.log(side[1] - side[0])
        assert each.model_gap == pytest.approx(np.mean(true - evidence), abs=5e-3)


def test_rows_are_means_over_seeds(staged):
    stage = results(staged)
    assert [row.prior for row in stage.rows] == [STANDARD, *latents.FITTED, POSTERIOR]
    for row in stage.rows:
        part = [member for member in stage.members if member.prior == row.prior]
        assert len(part) == row.num_seeds == 2
        for name in ("gain", "kl", "sliced_wasserstein"):
            values = [getattr(member, name) for member in part]
            if values[0] is not None:
                assert getattr(row, name) == pytest.approx(np.mean(values))
        if row.gain is not None:
            assert row.gain_sd == pytest.approx(np.std([m.gain for m in part], ddof=1))
    assert (staged / "second_stage" / "figures" / "samples.png").exists()
    assert (staged / "second_stage" / "figures" / "latents.png").exists()


def test_finished_stage_is_only_reported(staged, monkeypatch):
    monkeypatch.setattr(datasets, "load", None)
    lines = []
    stage = second_stage.run(str(staged), SMALL._replace(evidence=True), echo=lines.append)
    assert stage == results(staged)
    assert "is finished" in lines[0]
    assert "flow" in lines[1]
    with pytest.raises(runs.RunError, match="num_steps was 60 and is 61"):
        run(staged, SMALL._replace(evidence=True, num_steps=61))


def codes(mean, stddev, *, size=2000, seed=0):
    """Codes whose aggregate posterior is N(mean, stddev^2 + 0.01)."""
    rng = np.random.default_rng(seed)
    values = rng.normal(mean, stddev, size=(size, len(mean))).astype(np.float32)
    return Codes(values, np.full_like(values, np.log(0.1)))


def fit(tmp_path, name, split, config, seed=0):
    member = filled(Member, variant="ls", group="ls", member=0, seed=seed)
    fitter = latents.Fitter(name, split.train.mean.shape[1], config)
    with tqdm.tqdm(disable=True) as bar:
        return fitter, fitter.fit(tmp_path, member, split, bar)


@pytest.mark.parametrize("name", latents.FITTED)
def test_priors_come_near_the_best_gain(tmp_path, name):
    mean, stddev = np.array([1.0, -0.5, 0.0]), np.array([0.5, 0.7, 1.0])
    split = Split(*(codes(mean, stddev, seed=seed) for seed in range(3)))
    config = Config(num_components=2, num_layers=2, width=16, num_steps=400, learning_rate=1e-2)
    fitter, params = fit(tmp_path, name, split, config)
    gain = float(fitter.gains(params, split.test.draw(jax.random.key(5), num_draws=5)).mean())
    variance = stddev**2 + 0.01
    best = 0.5 * np.sum(variance + mean**2 - 1.0 - np.log(variance))
    assert 0.93 * best < gain < 1.05 * best


@pytest.mark.parametrize("name", latents.FITTED)
def test_prior_that_is_worse_on_the_held_out_part_is_dropped(tmp_path, name):
    """What fits the training part alone, as here, is N(0, I) in the end."""
    train, other = codes([0.0, 0.0], [0.3, 0.3]), codes([0.0, 0.0], [1.5, 1.5])
    config = Config(num_components=2, num_layers=2, width=8, num_steps=50, learning_rate=1e-2)
    fitter, params = fit(tmp_path, name, Split(train, other, other), config)
    z = other.draw(jax.random.key(0))
    np.testing.assert_allclose(fitter.gains(params, z), 0.0, atol=1e-5)


def test_ascent_keeps_its_best_parameters():
    """Of two looks at the held-out part, the second is worse than what was found before the first."""
    fitter = latents.Fitter("flow", 2, Config(num_layers=2, width=8, num_steps=10))
    params, some = fitter.prior.init(jax.random.key(0)), Codes(*map(jnp.asarray, codes([1.0, -1.0], [0.5, 0.5])))
    best = jax.tree.map(lambda leaf: leaf + 1.0, params)
    state = latents.State(params, fitter._optimizer.init(params), best, jnp.asarray(1e9))
    after = fitter._steps(state, jax.random.key(1), some, some.mean, 0, 5)
    jax.tree.map(np.testing.assert_array_equal, after.best, best)
    assert after.gain == 1e9
    better = fitter._steps(state._replace(gain=jnp.asarray(-1e9)), jax.random.key(1), some, some.mean, 0, 5)
    jax.tree.map(np.testing.assert_array_equal, better.best, better.params)


def test_steps_are_the_same_however_they_are_divided():
    """Each step has draws of its own: two calls of three steps are one of six."""
    fitter = latents.Fitter("flow", 2, Config(num_layers=2, width=8, num_steps=10, learning_rate=0.1))
    params, some = fitter.prior.init(jax.random.key(0)), Codes(*map(jnp.asarray, codes([1.0, -1.0], [0.5, 0.5])))
    state = latents.State(params, fitter._optimizer.init(params), params, jnp.zeros(()))
    steps = functools.partial(fitter._steps, key=jax.random.key(1), codes=some, held_out=some.mean)
    whole, parts = steps(state, first=0, last=6), steps(steps(state, first=0, last=3), first=3, last=6)
    jax.tree.map(np.testing.assert_array_equal, whole.params, parts.params)


def test_gain_within_chance_is_not_taken(tmp_path):
    """Draws of the same few examples are no more evidence than these."""
    fitter = latents.Fitter("gaussian", 2, Config())
    params = priors.fit_gaussian(np.zeros((9, 2)), np.full((9, 2), np.log(0.8)))
    z = np.random.default_rng(0).normal(size=(4, 2)).astype(np.float32)
    gains = np.asarray(fitter.gains(params, z))
    assert 0.0 < gains.mean() < 2.0 * gains.std(ddof=1) / 2.0
    for copies in (1, 1000):
        kept = fitter.best([params], np.tile(z, (copies, 1)), 4)
        assert all(not leaf.any() for leaf in jax.tree.leaves(kept))
    many = np.random.default_rng(0).normal(0.8, 0.1, size=(1000, 2)).astype(np.float32) * 0.5
    assert fitter.best([params], many, 1000)["log_scale"].any()


def test_mixture_is_no_worse_than_a_gaussian(tmp_path):
    """Of few codes of a Gaussian, expectation maximisation learns the noise."""
    split = Split(*(codes([1.0] * 4, [0.5] * 4, size=size, seed=size) for size in (60, 400, 500)))
    _, mixture = fit(tmp_path, "mixture", split, Config(num_components=10))
    _, gaussian = fit(tmp_path, "gaussian", split, Config())
    for part, whole in zip(mixture["mean"], 10 * [gaussian["mean"]], strict=True):
        np.testing.assert_allclose(part, whole, rtol=1e-6)


def test_unused_dimensions_keep_their_prior(tmp_path):
    used = codes([1.0, 0.5], [0.5, 0.5])
    unused = Codes(np.zeros((2000, 3), np.float32), np.zeros((2000, 3), np.float32))
    both = Codes(*(np.concatenate([u[:, :1], n, u[:, 1:]], axis=1) for u, n in zip(used, unused, strict=True)))
    np.testing.assert_array_equal(latents.in_use(both), [0, 4])
    _, params = fit(tmp_path, "mixture", Split(both, both, both), Config(num_components=2))
    np.testing.assert_array_equal(params["mean"][:, 1:4], 0.0)
    np.testing.assert_array_equal(params["log_scale"][:, 1:4], 0.0)
    assert np.all(params["log_scale"][:, [0, 4]] < 0.0)


class Stop:
    """Stands for `signals.deferred`: the signal comes after so many questions."""

    def __init__(self, questions):
        self.left = questions

    @contextlib.contextmanager
    def deferred(self):
        def asked():
            self.left -= 1
            return self.left < 0

        yield asked
        if self.left < 0:
            raise signals.Stopped


def test_fit_goes_on_to_the_bit(tmp_path, monkeypatch):
    split = Split(*(codes([1.0, -1.0], [0.3, 2.0], seed=seed) for seed in range(3)))
    config = Config(num_layers=2, width=8, num_steps=100)
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    _, whole = fit(tmp_path / "whole", "flow", split, config)
    monkeypatch.setattr(latents, "signals", Stop(21))
    with pytest.raises(signals.Stopped):
        fit(tmp_path / "parts", "flow", split, config)
    monkeypatch.setattr(latents, "signals", Stop(10**6))
    with runs.Checkpoints(tmp_path / "parts", "ls-0-flow") as checkpoints:
        assert 0 < checkpoints.step < 100
    _, parts = fit(tmp_path / "parts", "flow", split, config)
    jax.tree.map(np.testing.assert_array_equal, whole, parts)
    _, again = fit(tmp_path / "parts", "flow", split, config)
    jax.tree.map(np.testing.assert_array_equal, whole, again)


def test_codes_draw_from_their_posteriors():
    some = Codes(np.array([[1.0, -2.0]], np.float32), np.log(np.array([[0.5, 3.0]], np.float32)))
    z = some.draw(jax.random.key(0), num_draws=20_000)
    assert z.shape == (20_000, 2)
    np.testing.assert_allclose(z.mean(axis=0), [1.0, -2.0], atol=0.1)
    np.testing.assert_allclose(z.std(axis=0), [0.5, 3.0], rtol=0.02)
    np.testing.assert_allclose(some.kl(), [0.5 * (0.25 + 1.0 - 1.0) + np.log(2.0), 6.0 - np.log(3.0)], rtol=1e-6)


def test_images_with_labels(digits, tmp_path):
    path = shutil.copytree(digits, tmp_path / "run")
    config = SMALL._replace(variant=(), prior=("gaussian",), classifier_steps=5)
    stage = run(path, config)
    rows = [row.row for row in stage.quality.rows]
    expected = [
        f"LS-VAE, {prior}: {kind}" for prior in (STANDARD, "gaussian", POSTERIOR) for kind in ("samples", "means")
    ]
    assert rows == ["training images", *expected]
    assert stage.test_neighbour_distance > 0.0
    assert all(row.neighbour_distance > 0.0 for row in stage.rows)
    assert {file.name for file in (path / "second_stage" / "figures").iterdir()} == {
        "samples.png",
        "latents.png",
        "neighbours.png",
    }
    before = quality.run(str(path), classifier_steps=5, echo=lambda line: None)
    after = quality.run(str(path), classifier_steps=5, prior="gaussian", echo=lambda line: None)
    theirs = {row.row: row for row in stage.quality.rows}
    for name, found in ((STANDARD, before), ("gaussian", after)):
        for row in found.rows[1:]:
            assert row.to_json() | {"row": ""} == theirs[row.row.replace(": ", f", {name}: ")].to_json() | {"row": ""}
    assert (path / "quality-gaussian.json").exists()


def test_nearest_training_images(digits):
    config, summary = sweep.read_run(digits)
    data = datasets.load("digits")
    stage = second_stage.Stage(digits, config, summary, SMALL._replace(variant=(), num_examples=10_000), data)
    wanted = np.array([5, 700, 31])
    shown = np.asarray(datasets.to_float(data.train[wanted], levels=17))
    index, distance = stage.neighbours(shown + 0.01)
    np.testing.assert_array_equal(index, wanted)
    np.testing.assert_allclose(distance, 0.01, rtol=1e-4)


def test_generate_under_a_fitted_prior(staged, tmp_path):
    echo = {"echo": lambda line: None}
    record = generate.run(
        str(staged), variants=["ls"], prior="mixture", out=str(tmp_path / "out"), num_samples=300, **echo
    )
    assert record.prior == "mixture"
    config, summary = sweep.read_run(staged)
    member = next(member for member in summary.members if member.variant == "ls")
    vae, params = latents.model(staged, config, member=member, form=summary.form, prior="mixture")
    expected = vae_lib.generate(jax.random.split(jax.random.key(0))[0], vae, params, num_samples=300)
    arrays = arrays_in(tmp_path / "out" / f"{record.files[0]}.npz")
    np.testing.assert_allclose(arrays["means"], expected[1], atol=1e-5)
    z = vae_lib.sample_prior(jax.random.split(jax.random.key(0))[1], vae, params, num_samples=16).reshape(2, 8, 2)
    middle = vae_lib.decode(vae, params, z[0] + (z[1] - z[0]) * 3 / 7)
    np.testing.assert_allclose(arrays["interpolations"][:, 3], middle[..., 0], atol=1e-4)


def test_prior_that_was_not_fitted(staged, toy):
    with pytest.raises(runs.RunError, match="no finished second stage: run experiments"):
        generate.run(str(toy), prior="flow", echo=lambda line: None)
    with pytest.raises(runs.RunError, match="has no flow prior of f"):
        generate.run(str(staged), variants=["f"], prior="flow", echo=lambda line: None)


def test_second_stage_of_other_results(staged, tmp_path):
    path = shutil.copytree(staged, tmp_path / "run")
    summary = json.loads((path / "summary.json").read_text())
    (path / "summary.json").write_text(json.dumps(summary | {"jax": "0"}))
    with pytest.raises(runs.RunError, match="is of other results of this run: move it"):
        generate.run(str(path), variants=["ls"], prior="flow", echo=lambda line: None)
    with pytest.raises(runs.RunError, match="belongs to a run with other flags"):
        run(path, SMALL._replace(evidence=True))


def edit(path, file, **changes):
    values = json.loads((path / file).read_text())
    (path / file).write_text(json.dumps(values | changes))


FAULTS = {
    "": (lambda path: None, "--run_dir: give the directory of a finished run"),
    "--run_dir=RUN --prior=vamp": (lambda path: None, "--prior=vamp: give some of gaussian, mixture, flow"),
    "--run_dir=RUN --prior=flow,flow": (lambda path: None, "--prior=flow,flow: give at least one, and each only once"),
    "--run_dir=RUN --variant=logistic": (lambda path: None, "--variant=logistic is not in the run, which has f, ls"),
    "--run_dir=RUN --num_steps=0": (lambda path: None, "--num_steps=0: must be at least 1"),
    "--run_dir=RUN --dataset=./x": (lambda path: None, "--dataset: leave it out, this is no run on data of your own"),
    "--run_dir=RUN": (lambda path: (path / "summary.json").unlink(), "holds an unfinished run"),
    "--run_dir=RUN --prior=gaussian": (
        lambda path: edit(path, "flags.json", radius=1.0),
        "holds no run of this version of experiments.sigma_sweep",
    ),
    "--run_dir=RUN --prior=flow": (
        lambda path: edit(path, "flags.json", prior="flow"),
        "its models have learned a prior, --prior=flow, give a run with N",
    ),
    "--run_dir=RUN --num_layers=2": (
        lambda path: edit(path, "flags.json", latent_size=1),
        "--prior=flow: a flow couples latent dimensions",
    ),
    "--run_dir=RUN --evidence": (
        lambda path: edit(path, "flags.json", latent_size=3),
        "--evidence is for runs of the toy with one or two latent dimensions",
    ),
    "--run_dir=RUN --num_examples=60 --num_components=50": (
        lambda path: None,
        r"--num_components=50: the F-VAE, sigma = 0\.1 uses \d latent dimensions, .* of 54: give at most \d\d, or",
    ),
}


@pytest.mark.parametrize("words", FAULTS)
def test_bad_input_ends_in_one_line(toy, monkeypatch, words):
    """Nothing is fitted, and the run stays as it was."""
    spoil, message = FAULTS[words]
    spoil(toy)
    before = sorted(file.name for file in toy.iterdir())
    monkeypatch.setattr(latents.Fitter, "fit", None)
    monkeypatch.setattr(realism, "train_judge", None)
    with pytest.raises((command.UsageError, runs.RunError), match=message) as error:
        call(second_stage, words.replace("RUN", str(toy)).split())
    assert "\n" not in str(error.value)
    assert sorted(file.name for file in toy.iterdir() if file.name != "second_stage") == before


@pytest.mark.slow
def test_data_of_ones_own_are_asked_for(tmp_path):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "points.npy", rng.normal(size=(200, 3)).astype(np.float32))
    config = sweep.configure(dataset=str(tmp_path / "points.npy"), variants=("ls",), num_seeds=1, num_steps=20)
    config = config._replace(widths=(8,), num_blocks=1, latent_size=2, batch_size=16)
    sigma_sweep.run(config, run_dir=str(tmp_path / "run"), echo=lambda line: None)
    stage = SMALL._replace(variant=(), num_steps=10)
    with pytest.raises(command.UsageError, match="--dataset: give the file or folder of data of your own"):
        run(tmp_path / "run", stage)
    np.save(tmp_path / "others.npy", rng.normal(size=(200, 3)).astype(np.float32))
    with pytest.raises(command.UsageError, match="not the data of the run"):
        run(tmp_path / "run", stage, dataset=str(tmp_path / "others.npy"))
    found = run(tmp_path / "run", stage, dataset=str(tmp_path / "points.npy"))
    assert all(row.sliced_wasserstein > 0.0 for row in found.rows)
    assert found.quality is None


def test_all_zero_parameters_are_the_standard_normal():
    z = jax.random.normal(jax.random.key(0), (7, 4))
    expected = priors.STANDARD_NORMAL.log_prob({}, z)
    for name in latents.FITTED:
        prior = priors.PRIORS[name](4)
        zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(prior.init, jax.random.key(1)))
        np.testing.assert_allclose(prior.log_prob(zeros, z), expected, rtol=1e-6)


@pytest.mark.slow
def test_fake_images_are_read_as_fakes(tmp_path):
    config = sweep.configure(
        dataset="celeb_a", image_size=8, fake_data=True, variants=("lv",), num_seeds=1, num_steps=4
    )
    config = config._replace(batch_size=8, latent_size=3, widths=(4,), num_blocks=1)
    sigma_sweep.run(config, run_dir=str(tmp_path / "run"), echo=lambda line: None)
    stage = run(tmp_path / "run", SMALL._replace(variant=(), prior=("flow",), num_steps=5, num_examples=50))
    assert stage.quality is None
    assert stage.num_examples == 50
    assert len(images.fake_images((8, 8, 3))[1]) == stage.num_test_examples
