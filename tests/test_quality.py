"""The quality of generated images: the classifier learns, its numbers tell good images from bad ones, and a run's rows
are those of its trained members."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import call, run_command

from experiments import command, latents, quality, realism, report, sigma_sweep, sweep
from lvae_jax import datasets, images, measures, runs

pytestmark = pytest.mark.usefixtures("plain_sweep")

TRAIN, TEST = images.fake_images((12, 12, 1))
CONFIG = sigma_sweep.configure(
    dataset="mnist",
    discretise=False,
    variants=("f", "ls", "replay"),
    sigma=(0.5,),
    num_seeds=2,
    num_steps=6,
    batch_size=8,
    latent_size=3,
    widths=(4,),
    num_blocks=1,
    ema_decay=0.5,
)


def classes(array):
    """1 for dark images, 2 for middle ones, 0 for bright ones."""
    return np.array([1, 2, 0], np.int32)[np.digitize(array.mean(axis=(1, 2, 3)), [110, 145])]


@pytest.fixture(scope="module")
def small_mnist():
    """A data set of that name, with labels, made up."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "tfds_images", lambda name, **options: (TRAIN, TEST))
        patch.setattr(images, "tfds_labels", lambda name, **options: (classes(TRAIN), classes(TEST)))
        yield


@pytest.fixture(scope="module")
def finished(small_mnist, tmp_path_factory):
    path = tmp_path_factory.mktemp("finished")
    return path, sigma_sweep.run(CONFIG, run_dir=str(path), echo=lambda line: None)


@pytest.fixture
def run_dir(finished, tmp_path):
    return shutil.copytree(finished[0], tmp_path / "run")


@pytest.fixture(scope="module")
def classifier():
    return realism.train_classifier(jax.random.key(0), TRAIN, classes(TRAIN), num_steps=200, batch_size=32)


def run(run_dir, **options):
    return quality.run(str(run_dir), echo=lambda line: None, **options)


SEEN = np.asarray(datasets.to_float(TEST))


def test_classifier_learns(classifier):
    assert np.bincount(classes(TEST)).min() > 20
    assert np.mean(classifier.classify(SEEN) == classes(TEST)) > 0.9


def test_classifier_is_a_function_of_its_key():
    one, again, other = (
        realism.train_classifier(jax.random.key(seed), TRAIN, classes(TRAIN), num_steps=3).features(SEEN)
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 1e-3


def test_features_depend_on_their_image_alone(classifier):
    features = classifier.features(SEEN)
    assert features.shape == (128, 64)
    np.testing.assert_allclose(classifier.features(SEEN[5:8]), features[5:8], rtol=1e-5, atol=1e-5)
    many = np.tile(SEEN, (9, 1, 1, 1))  # more than one chunk
    np.testing.assert_allclose(classifier.features(many), np.tile(features, (9, 1)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("labels", [classes(TRAIN)[1:], classes(TRAIN)[:, None], classes(TRAIN) - 1])
def test_labels_that_do_not_fit(labels):
    with pytest.raises(ValueError, match="give 384 labels from 0 on, one for each image"):
        realism.train_classifier(jax.random.key(0), TRAIN, labels, num_steps=1)


def test_noise_worsens_scores(classifier):
    real = classifier.features(SEEN)
    noise = np.random.default_rng(0).normal(size=SEEN.shape).astype(np.float32)
    scores = [realism.score(classifier.features, real, SEEN + stddev * noise) for stddev in (0.0, 0.1, 0.3, 1.0)]
    distances = [score["classifier_frechet_distance"] for score in scores]
    assert distances[0] == pytest.approx(0.0, abs=1e-4)
    assert distances == sorted(distances)
    assert (scores[0]["precision"], scores[0]["recall"]) == (1.0, 1.0)
    assert scores[3]["precision"] < 1.0
    assert scores[3]["recall"] < 1.0


def test_images_are_clipped():
    shown = np.clip(3.0 * SEEN - 1.0, 0.0, 1.0)
    score = realism.score(corner, corner(SEEN), 3.0 * SEEN - 1.0)
    assert score["classifier_frechet_distance"] == measures.frechet_distance(corner(SEEN), corner(shown))
    assert (score["precision"], score["recall"]) == measures.precision_and_recall(corner(SEEN), corner(shown))


def corner(x):
    return x[:, :3, :3].reshape(len(x), -1)


@pytest.mark.slow
def test_rows_are_means_of_members(run_dir, generators, monkeypatch):
    monkeypatch.setattr(
        realism,
        "train_classifier",
        lambda *arguments, **options: realism.Classifier(corner, lambda x: classes(255 * x)),
    )
    result = run(run_dir)
    assert json.loads((run_dir / "quality.json").read_text()) == result.to_json()
    assert (result.num_images, result.num_seeds, result.classifier_accuracy) == (128, 2, 1.0)
    rows = {row.pop("row"): row for row in result.to_json()["rows"]}
    titles = ["F-VAE, sigma = 0.5", "LS-VAE", "replayed F-VAE"]
    expected = [f"{title}: {kind}" for title in titles for kind in ("samples", "means")]
    assert list(rows) == ["training images", *expected]
    assert rows["training images"] == realism.score(corner, corner(SEEN), np.asarray(datasets.to_float(TRAIN[:128])))
    for title, part in report.by_row(sweep.read_run(run_dir)[1].members).items():
        pairs = [generators[member.group, member.sigma](num_samples=128) for member in part]
        for kind, index in (("samples", 0), ("means", 1)):
            scores = [realism.score(corner, corner(SEEN), pair[index]) for pair in pairs]
            row = rows[f"{title}: {kind}"]
            assert row.keys() == {*scores[0], *(f"{name}_sd" for name in scores[0])}
            for name in scores[0]:
                values = [score[name] for score in scores]
                assert row[name] == pytest.approx(np.mean(values), rel=1e-12)
                assert row[f"{name}_sd"] == pytest.approx(np.std(values, ddof=1), rel=1e-9, abs=1e-12)


@pytest.fixture(scope="module")
def generators(finished):
    return quality.generators(finished[0], *sweep.read_run(finished[0]))


@pytest.mark.slow
def test_samples_come_from_their_member(generators, finished):
    """Their distance to the means is the member's sigma, which the summary has."""
    all_means = {}
    for member in finished[1].members:
        samples, means = generators[member.group, member.sigma](num_samples=700)
        assert len(samples) == 700
        rms = np.sqrt(np.mean((samples - means) ** 2))
        assert rms == pytest.approx(member.sigma, rel=0.02), member
        assert len(np.unique(samples.reshape(700, -1), axis=0)) == 700, "no chunk is like another"
        all_means[member.group] = means
    assert len(all_means) == 6
    for name, means in all_means.items():
        same = [other for other in all_means if np.array_equal(means, all_means[other])]
        assert same in ([name], [f"ls-{name[-1]}", f"replay-{name[-1]}"]), "replaying sigma(t) may repeat the LS-VAE"


def test_scored_run_is_only_reported(run_dir, monkeypatch):
    monkeypatch.setattr(quality, "generators", lambda path, config, summary, prior: fakes(summary))
    first = run(run_dir, classifier_steps=2)
    monkeypatch.setattr(datasets, "load", None)
    lines = []
    assert quality.run(str(run_dir), classifier_steps=2, echo=lines.append) == first
    assert "F-VAE, sigma = 0.5: samples" in lines[0]
    assert all(len(line) <= 120 for line in lines[0].splitlines())
    before = (run_dir / "quality.json").read_bytes()
    with pytest.raises(command.UsageError, match="was made with --classifier_steps=2: give the same, or move"):
        run(run_dir, classifier_steps=3)
    assert (run_dir / "quality.json").read_bytes() == before


def test_scores_of_an_earlier_fit_are_refused(run_dir, monkeypatch):
    monkeypatch.setattr(quality, "generators", lambda path, config, summary, prior: fakes(summary))
    monkeypatch.setattr(latents, "read", lambda path: None)
    monkeypatch.setattr(latents, "digest", lambda path: "one")
    first = run(run_dir, classifier_steps=2, prior="flow")
    monkeypatch.setattr(datasets, "load", None)
    assert run(run_dir, classifier_steps=2, prior="flow") == first
    monkeypatch.setattr(latents, "digest", lambda path: "another")
    with pytest.raises(command.UsageError, match=r"quality-flow\.json is of a prior that has been fitted anew"):
        run(run_dir, classifier_steps=2, prior="flow")


def fakes(summary):
    places = [(member.group, member.sigma) for member in summary.members]
    return {place: lambda num_samples: (SEEN[:num_samples], SEEN[:num_samples]) for place in places}


def edit(run_dir, file, **changes):
    values = json.loads((run_dir / file).read_text())
    (run_dir / file).write_text(json.dumps(values | changes))


FAULTS = {
    "nothing there": (shutil.rmtree, "flags.json cannot be read"),
    "unfinished": (lambda path: (path / "summary.json").unlink(), "holds an unfinished run"),
    "damaged": (lambda path: (path / "summary.json").write_text("{"), "summary.json cannot be read"),
    "another experiment": (
        lambda path: edit(path, "flags.json", radius=1.0),
        "holds no run of this version of experiments.sigma_sweep",
    ),
    "the toy": (lambda path: edit(path, "flags.json", dataset="toy"), "a run of the toy, give one of real images"),
    "fakes": (lambda path: edit(path, "flags.json", fake_data=True), "a run with --fake_data, give one of real"),
    "no checkpoint": (lambda path: shutil.rmtree(path / "checkpoints" / "f-1"), "f-1 is missing"),
    "a torn checkpoint": (
        lambda path: [file.write_bytes(b"") for file in (path / "checkpoints" / "f-0").rglob("*") if file.is_file()],
        "f-0",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_run_that_cannot_be_scored(run_dir, monkeypatch, fault):
    """Said before the classifier is trained; nothing is written."""
    spoil, message = FAULTS[fault]
    spoil(run_dir)
    monkeypatch.setattr(realism, "train_classifier", None)
    with pytest.raises((command.UsageError, runs.RunError), match=message) as error:
        run(run_dir)
    assert "\n" not in str(error.value)
    assert not (run_dir / "quality.json").exists()


def test_data_set_with_too_few_images(run_dir, monkeypatch):
    """Precision and recall need neighbours: said before the classifier is trained."""
    monkeypatch.setattr(images, "tfds_images", lambda name, **options: (TRAIN, TEST[:3]))
    monkeypatch.setattr(realism, "train_classifier", None)
    with pytest.raises(command.UsageError, match="384 training and 3 test images, give a run of one with more than 3"):
        run(run_dir)


BAD_FLAGS = {
    "": "--run_dir: give the directory of a finished run",
    "--run_dir=. --classifier_steps=0": "--classifier_steps=0: must be at least 1",
    "--run_dir=.": "flags.json cannot be read",
}


@pytest.mark.parametrize("words", BAD_FLAGS)
def test_bad_flags(words):
    with pytest.raises((command.UsageError, runs.RunError), match=BAD_FLAGS[words]) as error:
        call(quality, words.split())
    assert "\n" not in str(error.value)


def test_command_ends_in_one_line(tmp_path):
    result = run_command("experiments.quality", f"--run_dir={tmp_path}")
    assert result.returncode == 1
    assert "flags.json cannot be read" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_features_are_the_input_of_the_last_layer():
    network, x = realism.FeatureNetwork(10), jax.random.uniform(jax.random.key(1), (5, 12, 12, 1))
    params, apply = jax.jit(network.init)(jax.random.key(0), x), jax.jit(network.apply)
    features, logits = apply(params, x)
    assert features.shape == (5, 64)
    last = [leaf for leaf in jax.tree.leaves(params) if leaf.shape == (64, 10)]
    np.testing.assert_allclose(logits, features @ last[0], rtol=1e-5, atol=1e-6)  # biases start at zero
    others, _ = apply(params, x.at[:3].set(0.7))
    np.testing.assert_allclose(others[3:], features[3:], rtol=1e-5, atol=1e-6)


def test_every_parameter_of_the_classifier_gets_a_gradient():
    network = realism.FeatureNetwork(4, widths=(4, 6, 8), num_features=5)
    x = jax.random.uniform(jax.random.key(1), (5, 9, 7, 3))
    weights = jax.random.normal(jax.random.key(2), (5, 4))
    gradient = jax.jit(jax.grad(lambda params: jnp.sum(weights * network.apply(params, x)[1])))
    gradients = gradient(jax.jit(network.init)(jax.random.key(0), x))
    assert sum(leaf.ndim == 4 for leaf in jax.tree.leaves(gradients)) == 3
    assert all((leaf != 0).any() for leaf in jax.tree.leaves(gradients))
