"""The facts about a data set, found before anything is trained on it."""

import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from lvae_jax import datasets, theory
from lvae_jax.datasets import Dataset

CHUNK = 1000
LARGEST_COVARIANCE = 1e11  # multiplications that are worth it before each run: MNIST takes 4e10, a few seconds


class Survey(NamedTuple):
    """The facts about a data set.

    Attributes:
      dataset: the data set.
      low, high: the least and the largest value of both splits, as the model sees them.
      missing: the fraction of the values of both splits that are missing.
      num_constant: the number of dimensions in which the training examples do not vary.
      num_repeats: the number of training examples that are repeats of an earlier one.
      num_shared: the number of test examples that are training examples as well.
      principal_stddevs: [D], in falling order, of the training examples; None where they would take long, or values are
        missing.
    """

    dataset: Dataset
    low: float
    high: float
    missing: float
    num_constant: int
    num_repeats: int
    num_shared: int
    principal_stddevs: Float[np.ndarray, " D"] | None


def survey(dataset: Dataset) -> Survey:
    """The facts about a data set that has a training split."""
    size = math.prod(dataset.shape)
    lows, highs, missing = np.full(size, np.inf), np.full(size, -np.inf), 0
    for split in (dataset.test, dataset.train):
        # fmin and fmax pass over NaN, a value that is missing.
        lowest, highest = np.full(size, np.inf), np.full(size, -np.inf)  # in the end those of training
        for part in _chunks(dataset, split):
            rows = part.reshape(-1, size)
            np.fmin(lowest, np.fmin.reduce(rows, axis=0), out=lowest)
            np.fmax(highest, np.fmax.reduce(rows, axis=0), out=highest)
            missing += int(np.isnan(rows).sum())
        lows, highs = np.fmin(lows, lowest), np.fmax(highs, highest)
    seen = set(map(_digest, dataset.train))
    worthwhile = len(dataset.train) * size**2 <= LARGEST_COVARIANCE and not missing
    return Survey(
        dataset=dataset,
        low=float(lows.min()),
        high=float(highs.max()),
        missing=missing / (size * (len(dataset.train) + len(dataset.test))),
        num_constant=int(np.sum(lowest == highest)),
        num_repeats=len(dataset.train) - len(seen),
        num_shared=sum(_digest(example) in seen for example in dataset.test),
        principal_stddevs=theory.principal_stddevs(_chunks(dataset, dataset.train)) if worthwhile else None,
    )


def text(survey: Survey, sigmas: Sequence[float]) -> str:
    """The facts in plain words, a few lines, with the number of directions that each of `sigmas` can use."""
    dataset = survey.dataset
    levels = "" if dataset.levels is None else f", {dataset.levels} grey levels"
    size = math.prod(dataset.shape)
    lines = [
        f"data: {len(dataset.train)} training and {len(dataset.test)} test examples of shape {list(dataset.shape)}, "
        f"values from {survey.low:.4g} to {survey.high:.4g}{levels}; unit: {dataset.unit}"
    ]
    found = {
        f"{survey.missing:.1%} of the values are missing": survey.missing,
        f"{survey.num_constant} of {size} dimensions do not vary": survey.num_constant,
        f"{survey.num_repeats} training examples repeat an earlier one": survey.num_repeats,
        f"{survey.num_shared} test examples are training examples as well": survey.num_shared,
    }
    if any(found.values()):
        lines.append("  " + ", ".join(words for words, number in found.items() if number))
    if survey.principal_stddevs is None:
        reason = "it needs all values" if survey.missing else "experiments.critical_sigma computes it"
        lines.append(f"  critical sigma: left out, {reason}")
    else:
        usable = ", ".join(f"{sigma:g} can use {np.sum(survey.principal_stddevs > sigma)}" for sigma in sigmas)
        critical = survey.principal_stddevs[0]
        lines.append(f"  critical sigma {critical:.4g}; of {size} directions a fixed sigma of {usable}")
    return "\n".join(lines)


def _digest(example: np.ndarray) -> bytes:
    return hashlib.blake2b(example.tobytes(), digest_size=16).digest()


def _chunks(dataset: Dataset, split: np.ndarray) -> Iterator[np.ndarray]:
    return (_chunk(dataset, split, start) for start in range(0, len(split), CHUNK))


def _chunk(dataset: Dataset, split: np.ndarray, start: int) -> np.ndarray:
    return np.asarray(datasets.to_float(split[start : start + CHUNK], levels=dataset.levels))
