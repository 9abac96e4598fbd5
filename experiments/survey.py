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
      num_constant: the number of dimensions in which the training examples do not vary.
      num_repeats: the number of training examples that are repeats of an earlier one.
      num_shared: the number of test examples that are training examples as well.
      principal_stddevs: [D], in falling order, of the training examples; None where they would take long.
    """

    dataset: Dataset
    low: float
    high: float
    num_constant: int
    num_repeats: int
    num_shared: int
    principal_stddevs: Float[np.ndarray, " D"] | None


def survey(dataset: Dataset) -> Survey:
    """The facts about a data set that has a training split."""
    size = math.prod(dataset.shape)
    constant, low, high = np.ones(size, bool), math.inf, -math.inf
    first = _chunk(dataset, dataset.train, 0)[0].ravel()
    for part in _chunks(dataset, dataset.train):
        constant &= np.all(part.reshape(-1, size) == first, axis=0)
        low, high = min(low, float(part.min())), max(high, float(part.max()))
    for part in _chunks(dataset, dataset.test):
        low, high = min(low, float(part.min())), max(high, float(part.max()))
    seen = set(map(_digest, dataset.train))
    worthwhile = len(dataset.train) * size**2 <= LARGEST_COVARIANCE
    return Survey(
        dataset=dataset,
        low=low,
        high=high,
        num_constant=int(constant.sum()),
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
        f"{survey.num_constant} of {size} dimensions do not vary": survey.num_constant,
        f"{survey.num_repeats} training examples repeat an earlier one": survey.num_repeats,
        f"{survey.num_shared} test examples are training examples as well": survey.num_shared,
    }
    if any(found.values()):
        lines.append("  " + ", ".join(words for words, number in found.items() if number))
    if survey.principal_stddevs is None:
        lines.append("  critical sigma: left out, experiments.critical_sigma computes it")
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
