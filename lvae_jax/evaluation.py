"""Bounds and diagnostics on held-out examples."""

import math
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jaxtyping import Array, Int, Key

from lvae_jax import datasets, gaussians
from lvae_jax import vae as vae_lib
from lvae_jax.vae import VAE, Params, Scores


def score(key: Key[Array, ""], vae: VAE, params: Params, x: Array, index: Int[Array, " B"]) -> Scores:
    """Scores [B] of the examples x [B, *S] in storage form (see `datasets`); their global indices `index` [B] decide
    the draws of z."""
    x = datasets.to_float(x)
    return vae_lib.scores(vae_lib.elbo(vae_lib.example_keys(key, index), vae, params, x), x)


def over_split(
    score_chunk: Callable[[np.ndarray, np.ndarray], Scores], examples: np.ndarray, *, chunk_size: int = 1000
) -> Scores:
    """`score_chunk(x [B, *S], index [B]) -> Scores [..., B]` over all N `examples`, in chunks of one shape: numpy
    arrays [..., N].

    The last chunk is filled up with repeats of the last example, whose scores are dropped, so that every example counts
    once.
    """
    size = len(examples)
    chunk_size = min(chunk_size, size)
    chunks = []
    for start in range(0, size, chunk_size):
        index = np.arange(start, start + chunk_size, dtype=np.int32)
        chunks.append(jax.device_get(score_chunk(examples[np.minimum(index, size - 1)], index)))
    return jax.tree.map(lambda *parts: np.concatenate(parts, axis=-1)[..., :size], *chunks)


def paper_elbo(elbo: float, shape: Sequence[int]) -> float:
    """The ELBO in the paper's convention, which drops the density's constant: ELBO + (n/2) log 2 pi, with n the product
    of `shape`."""
    return elbo + math.prod(shape) * gaussians.HALF_LOG_TWO_PI
