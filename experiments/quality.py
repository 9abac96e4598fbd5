"""How real the images of a finished sweep look: samples and means of p(x|z), z from the prior, beside the test split.

  python -m experiments.quality --run_dir=RUN

trains a small classifier on the labels of the run's training images, and prints for each row of the run the Frechet
distance, the precision and the recall of its features, between as many generated images and the whole test split. As a
yardstick, the same for as many training images. They go to RUN/quality.json; the same command reports them again.

The numbers belong to this classifier: they compare the rows of a table, and are no FIDs.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from jaxtyping import Array, Float, Int, Key, UInt8

from experiments import command, report, results, sweep, tables
from experiments.results import Member, Quality, Realism, Summary
from lvae_jax import datasets, evaluation, measures, runs
from lvae_jax import vae as vae_lib
from lvae_jax.keys import Stream, of_seed, stream_key

Features = Callable[[Float[np.ndarray, "N H W C"]], Float[np.ndarray, "N D"]]
"""Features of images in [0, 1]; a pretrained network can take the place of `train_classifier`'s."""

Generated = tuple[Float[np.ndarray, "N H W C"], Float[np.ndarray, "N H W C"]]

CHUNK = 500  # images that are generated at once
NEIGHBOURS = 3  # k of precision and recall


class Classifier(NamedTuple):
    """features: of images, 64 of each, see `Features`; classify: their most probable labels."""

    features: Features
    classify: Callable[[Float[np.ndarray, "N H W C"]], Int[np.ndarray, " N"]]


class FeatureNetwork(nn.Module):
    """A small classifier of images [B, H, W, C]: a stride-2 convolution for each width and two dense layers.

    Gives (features [B, num_features], logits [B, num_classes]); the features are the input of the last layer.
    """

    num_classes: int
    widths: tuple[int, ...] = (32, 64)
    num_features: int = 64

    @nn.compact
    def __call__(self, h: Array) -> tuple[Array, Array]:
        for width in self.widths:
            h = nn.silu(nn.Conv(width, (3, 3), strides=(2, 2))(h))
        features = nn.silu(nn.Dense(self.num_features)(h.reshape(h.shape[0], -1)))
        return features, nn.Dense(self.num_classes)(features)


def train_classifier(
    key: Key[Array, ""],
    images: UInt8[np.ndarray, "N H W C"],
    labels: Int[np.ndarray, " N"],
    *,
    levels: int | None = 256,
    num_steps: int = 1000,
    batch_size: int = 128,
    learning_rate: float = 2e-3,
) -> Classifier:
    """Trains a `FeatureNetwork` on the cross entropy of batches drawn with replacement, by Adam, whose rate a half
    cosine lowers to zero.

    Raises:
      ValueError: there is not one label from 0 on for each image.
    """
    if labels.shape != images.shape[:1] or labels.min() < 0:
        raise ValueError(f"give {len(images)} labels from 0 on, one for each image")
    network = FeatureNetwork(int(labels.max()) + 1)
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, num_steps))
    init_key, batch_key = jax.random.split(key)
    del key

    def loss(params: Any, x: Array, y: Array) -> Array:
        _, logits = network.apply(params, x)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state: tuple[Any, Any], step: Array, images: Array, labels: Array) -> tuple[Any, Any]:
        params, opt_state = state
        index = jax.random.randint(jax.random.fold_in(batch_key, step), (batch_size,), 0, len(images))
        gradients = jax.grad(loss)(params, datasets.to_float(images[index], levels=levels), labels[index])
        with jax.numpy_dtype_promotion("standard"):  # as `training.train_step`
            updates, opt_state = optimizer.update(gradients, opt_state)
        return optax.apply_updates(params, updates), opt_state

    params = network.init(init_key, jnp.zeros((1, *images.shape[1:])))
    state = (params, optimizer.init(params))
    examples = jax.device_put((np.asarray(images), np.asarray(labels)))
    for step in range(num_steps):
        state = train_step(state, np.int32(step), *examples)
    params, _ = state

    @jax.jit
    def apply(x: Array, index: Array) -> tuple[Array, Array]:
        features, logits = network.apply(params, x)
        return features.T, jnp.argmax(logits, axis=-1)

    return Classifier(
        features=lambda x: evaluation.over_split(apply, x)[0].T,
        classify=lambda x: evaluation.over_split(apply, x)[1],
    )


def score(
    features: Features, real: Float[np.ndarray, "N D"], generated: Float[np.ndarray, "M H W C"]
) -> dict[str, float]:
    """The numbers of generated images, clipped to [0, 1] as they are shown, against the features of real ones."""
    # Samples leave [0, 1] by the noise of the observation model; a viewer would clip them, too.
    theirs = features(np.clip(generated, 0.0, 1.0))
    frechet = {"classifier_frechet_distance": measures.frechet_distance(real, theirs)}
    return frechet | measures.precision_and_recall(real, theirs, k=NEIGHBOURS)._asdict()


def run(
    run_dir: str | None,
    *,
    classifier_steps: int = 1000,
    data_dir: str | None = None,
    manual_dir: str | None = None,
    echo: Callable[[str], None] = print,
) -> Quality:
    """Scores a finished run of `sigma_sweep` on images with labels, or reports the scores in RUN/quality.json again.

    Raises:
      command.UsageError, runs.RunError, datasets.DatasetError: as their docstrings say; nothing has been written then.
    """
    if run_dir is None:
        raise command.UsageError("--run_dir: give the directory of a finished run of experiments.sigma_sweep")
    if classifier_steps < 1:
        raise command.UsageError(f"--classifier_steps={classifier_steps}: must be at least 1")
    path = command.path("run_dir", run_dir)
    config, summary = sweep.read_run(path)
    if config.fake_data or not sweep.domain(config).has_levels:
        what = "with --fake_data" if config.fake_data else f"of the {config.dataset}"
        raise command.UsageError(f"--run_dir={path}: a run {what}, give one of real images with labels, like digits")
    file = path / "quality.json"
    if file.exists():
        quality = results.read(file, Quality)
        if quality.classifier_steps != classifier_steps:
            steps = quality.classifier_steps
            raise command.UsageError(
                f"{file} was made with --classifier_steps={steps}: give the same, or move the file"
            )
        echo(table(quality))
        return quality
    places: dict[str, Any] = command.paths(data_dir=data_dir, manual_dir=manual_dir)
    train_labels, test_labels = datasets.labels(config.dataset, **places)
    dataset = datasets.load(config.dataset, **sweep.data_options(config), **places)
    if min(len(dataset.train), len(dataset.test)) <= NEIGHBOURS:
        raise command.UsageError(
            f"--run_dir={path}: its data set has {len(dataset.train)} training and {len(dataset.test)} test images, "
            f"give a run of one with more than {NEIGHBOURS} of each"
        )
    drawn = generators(path, config, summary)

    to_float = functools.partial(datasets.to_float, levels=dataset.levels)
    classifier = train_classifier(
        of_seed(0), dataset.train, train_labels, levels=dataset.levels, num_steps=classifier_steps
    )
    test = np.asarray(to_float(dataset.test))
    against_test = functools.partial(score, classifier.features, classifier.features(test))
    rows = [Realism(row="training images", **against_test(np.asarray(to_float(dataset.train[: len(test)]))))]
    for title, part in report.by_row(summary.members).items():
        pairs = [drawn[member.group](len(test)) for member in part]
        for kind, of_members in zip(("samples", "means"), zip(*pairs, strict=True), strict=True):
            scores = [against_test(generated) for generated in of_members]
            columns = {name: [values[name] for values in scores] for name in scores[0]}
            mean = {name: float(np.mean(values)) for name, values in columns.items()}
            several = columns if len(scores) > 1 else {}
            spread = {f"{name}_sd": float(np.std(values, ddof=1)) for name, values in several.items()}
            rows.append(Realism(row=f"{title}: {kind}", **mean, **spread))
    quality = Quality(
        rows=rows,
        num_images=len(test),
        num_seeds=config.num_seeds,
        classifier_accuracy=float(np.mean(classifier.classify(test) == test_labels)),
        classifier_steps=classifier_steps,
    )
    runs.write_json(file, quality.to_json())
    echo(table(quality))
    return quality


def generators(path: Path, config: sweep.Config, summary: Summary) -> dict[str, Callable[[int], Generated]]:
    """Functions of N, one for each trained member by the name of its group, that draw N samples x ~ p(x|z), z ~ p(z),
    and return them with the means of p(x|z).

    Raises:
      runs.RunError: a checkpoint is missing or damaged.
    """
    form = summary.form

    def program(variant: str) -> Callable[..., tuple[Array, ...]]:
        vae = sweep.trained_vae(config, variant, form)
        return jax.jit(lambda key, params: vae_lib.generate(key, vae, params, num_samples=CHUNK)[:2])

    def generator(draw: Callable[..., tuple[Array, ...]], member: Member) -> Callable[[int], Generated]:
        weights = sweep.restore(path, config, member.group, member.variant, form)
        params = jax.tree.map(lambda leaf: leaf[0], weights)  # a group of images has one member
        key = stream_key(member.seed, Stream.QUALITY)

        def generate_many(num_samples: int) -> Generated:
            # In chunks of one size: one compiled program, and the same images for any number of them.
            keys = [jax.random.fold_in(key, chunk) for chunk in range(-(-num_samples // CHUNK))]
            chunks = [jax.device_get(draw(chunk_key, params)) for chunk_key in keys]
            samples, means = (np.concatenate(parts)[:num_samples] for parts in zip(*chunks, strict=True))
            return samples, means

        return generate_many

    programs = {variant: program(variant) for variant in config.variants}
    return {member.group: generator(programs[member.variant], member) for member in summary.members}


def table(quality: Quality) -> str:
    """The scores as a table with a note."""
    return tables.realism(quality).text()


def define_flags() -> None:
    command.define_places(celeba=False)
    with command.group("the classifier"):
        flags.DEFINE_integer("classifier_steps", 1000, "gradient steps of the classifier, 128 images each")


def main() -> None:
    run(**command.values(("run_dir", "classifier_steps", "data_dir", "manual_dir")))


if __name__ == "__main__":
    define_flags()
    command.start("quality", main)
