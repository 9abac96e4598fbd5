"""How real generated images look: a classifier's features, the numbers that compare them, and the images of a run.

The numbers belong to one classifier: they compare the rows of a table, and are no FIDs.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key, UInt8

from experiments import command
from experiments.results import Realism
from experiments.statistics import stddev
from lvae_jax import datasets, evaluation, measures
from lvae_jax import vae as vae_lib
from lvae_jax.keys import Stream, of_seed, stream_key

Features = Callable[[Float[np.ndarray, "N H W C"]], Float[np.ndarray, "N D"]]
"""Features of images in [0, 1]; a pretrained network can take the place of `train_classifier`'s."""

Scores = dict[str, float]
"""The fields of `Realism` that are numbers, by name."""

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
    features: Features,
    real: Float[np.ndarray, "N D"],
    generated: Float[np.ndarray, "M H W C"],
    *,
    real_squares: Float[np.ndarray, " N"] | None = None,
) -> Scores:
    """The numbers of generated images, clipped to [0, 1] as they are shown, against the features of real ones.
    `real_squares` are those of `measures.precision_and_recall`."""
    # Samples leave [0, 1] by the noise of the observation model; a viewer would clip them, too.
    theirs = features(np.clip(generated, 0.0, 1.0))
    frechet = {"classifier_frechet_distance": measures.frechet_distance(real, theirs)}
    return frechet | measures.precision_and_recall(real, theirs, k=NEIGHBOURS, real_squares=real_squares)._asdict()


def generator(vae: vae_lib.VAE) -> Callable[..., Generated]:
    """A function (params, seed, num_samples=N) that draws N samples x ~ p(x|z), z ~ p(z), of a model with these
    parameters, and returns them with the means of p(x|z)."""
    program = jax.jit(lambda key, params: vae_lib.generate(key, vae, params, num_samples=CHUNK)[:2])

    def generate(params: vae_lib.Params, seed: int, *, num_samples: int) -> Generated:
        # In chunks of one size: one compiled program, and the same images for any number of them.
        key = stream_key(seed, Stream.QUALITY)
        chunks = [
            jax.device_get(program(jax.random.fold_in(key, chunk), params)) for chunk in range(-(-num_samples // CHUNK))
        ]
        samples, means = (np.concatenate(parts)[:num_samples] for parts in zip(*chunks, strict=True))
        return samples, means

    return generate


class Judge(NamedTuple):
    """A classifier of a data set's images, and what it makes of the test split.

    Attributes:
      classifier: trained on the training split.
      test: its features of the test split, [N, D].
      accuracy: the fraction of the test images that it classifies rightly.
      squares: those of `measures.precision_and_recall` of the test split.
    """

    classifier: Classifier
    test: Float[np.ndarray, "N D"]
    accuracy: float
    squares: Float[np.ndarray, " N"]

    def score(self, images: Float[np.ndarray, "M H W C"]) -> Scores:
        """The numbers of images against the test split."""
        return score(self.classifier.features, self.test, images, real_squares=self.squares)


def train_judge(
    dataset: datasets.Dataset,
    labels: tuple[Int[np.ndarray, " M"], Int[np.ndarray, " N"]],
    *,
    num_steps: int,
) -> Judge:
    """The judge of a data set, always the same; `labels` are those of `datasets.labels`."""
    train_labels, test_labels = labels
    classifier = train_classifier(of_seed(0), dataset.train, train_labels, levels=dataset.levels, num_steps=num_steps)
    test = np.asarray(datasets.to_float(dataset.test, levels=dataset.levels))
    accuracy = float(np.mean(classifier.classify(test) == test_labels))
    features = classifier.features(test)
    return Judge(classifier, features, accuracy, measures.neighbour_squares(features, k=NEIGHBOURS))


def check_size(path: Path, dataset: datasets.Dataset) -> None:
    """Raises if the data set of the run in `path` has too few images for precision and recall.

    Raises:
      command.UsageError: the message, one line, names the fix.
    """
    if min(len(dataset.train), len(dataset.test)) <= NEIGHBOURS:
        raise command.UsageError(
            f"--run_dir={path}: its data set has {len(dataset.train)} training and {len(dataset.test)} test images, "
            f"give a run of one with more than {NEIGHBOURS} of each"
        )


def row(title: str, scores: Sequence[Scores]) -> Realism:
    """The scores of the seeds of one model as a row: their mean and, of several, the standard deviation."""
    columns = {name: [values[name] for values in scores] for name in scores[0]}
    mean = {name: float(np.mean(values)) for name, values in columns.items()}
    several = columns if len(scores) > 1 else {}
    return Realism(row=title, **mean, **{f"{name}_sd": stddev(values) for name, values in several.items()})


def training_row(judge: Judge, dataset: datasets.Dataset) -> Realism:
    """The scores of as many training images as there are test images: a yardstick."""
    train = dataset.train[: len(dataset.test)]
    return row("training images", [judge.score(np.asarray(datasets.to_float(train, levels=dataset.levels)))])
