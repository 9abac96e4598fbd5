"""Held-out bounds over a whole split, and their rates in bits.

What is computed on the device is per example, so that `over_split` can run it over a whole split in chunks and count
every example once; what sums up the split runs on the host, in float64, and keeps leading axes of sweep members.
"""

import enum
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import jax
import numpy as np
from jaxtyping import Array, Float, Int, Key, UInt8

from lvae_jax import diagnostics, gaussians, likelihoods
from lvae_jax import vae as vae_lib
from lvae_jax.keys import example_keys
from lvae_jax.vae import VAE, Params, Scores

Tree = TypeVar("Tree")


def examine(
    key: Key[Array, ""], vae: VAE, params: Params, x: Array, index: Int[Array, " B"]
) -> tuple[Scores, diagnostics.Details]:
    """The scores [B] of the examples x [B, *S] as the model sees them, and their details, which `diagnostics.summarise`
    averages; their global indices `index` [B] decide the draws of z."""
    terms = vae_lib.elbo(example_keys(key, index), vae, params, x)
    return vae_lib.scores(terms, x), diagnostics.details(terms, floor=vae.likelihood.floor)


def as_probabilities(vae: VAE, *, levels: int, dequantised: bool = False) -> VAE:
    """The model of data with grey levels, whatever it was trained with, as probabilities of these levels: its head
    `likelihoods.discretised`. Its ELBO is the one that compares models.

    Raises:
      ValueError: as `likelihoods.discretised` says.
    """
    head = likelihoods.discretised(vae.likelihood, levels=levels, dequantised=dequantised)
    return vae._replace(likelihood=head)


def histograms(train: UInt8[np.ndarray, "N *S"], test: UInt8[np.ndarray, "M *S"], *, levels: int) -> dict[str, float]:
    """The mean log probability in nats of the test examples under two models without any learning: a histogram of the
    training examples for each dimension, and one for all dimensions. A model of images has to beat the first.

    A level that was seen c times in N dimensions of L = `levels` has the probability (c + 1/2) / (N + L/2) (Krichevsky
    and Trofimov, The performance of universal encoding, 1981).
    """

    def count(examples: UInt8[np.ndarray, "N *S"]) -> Int[np.ndarray, "D L"]:
        total = np.zeros((size, levels), np.int64)
        for start in range(0, len(examples), 1000):
            # One histogram over (dimension, level) pairs, in chunks: 60,000 images as int64 would take 376 MB.
            rows = np.asarray(examples[start : start + 1000]).reshape(-1, size)
            cells = rows + levels * np.arange(size)[None]
            total += np.bincount(cells.ravel(), minlength=total.size).reshape(total.shape)
        return total

    def log_prob(seen: Int[np.ndarray, "H L"], asked: Int[np.ndarray, "H L"]) -> float:
        # Half a count for every level: a level that training never showed must not cost infinitely many nats.
        probabilities = (seen + 0.5) / (seen.sum(axis=1, keepdims=True) + 0.5 * levels)
        return float(np.sum(asked * np.log(probabilities)) / len(test))

    size = math.prod(test.shape[1:])
    seen, asked = count(train), count(test)
    return {
        "histogram of each pixel": log_prob(seen, asked),
        "histogram of all pixels": log_prob(seen.sum(axis=0)[None], asked.sum(axis=0)[None]),
    }


def importance_score(
    key: Key[Array, ""], vae: VAE, params: Params, x: Array, index: Int[Array, " B"], *, num_samples: int
) -> Float[Array, " B"]:
    """`vae.importance_bound` [B] in nats of the examples x [B, *S] as the model sees them; their global indices `index`
    [B] decide the draws of z.

    Raises:
      ValueError: num_samples is not positive.
    """
    keys = example_keys(key, index)
    return vae_lib.importance_bound(keys, vae, params, x, num_samples=num_samples)


def information_bound(
    mean: Float[np.ndarray, "N L"], log_stddev: Float[np.ndarray, "N L"], z: Float[np.ndarray, "N L"]
) -> float:
    """A lower bound, in expectation, on the mutual information in nats of x and z ~ q(z|x) = N(mean, diag stddev^2),
    from the posteriors of N examples with a draw z of each:

      (1/N) sum_n log [q(z_n|x_n) / ((1/N) sum_m q(z_n|x_m))]  <=  log N

    (Poole et al., On variational bounds of mutual information, ICML 2019, Eq. 12 with the true conditional). It is
    close only where the information is well below log N.
    """
    import scipy.special  # here, so that the library's import need not wait for it

    mean, log_stddev, z = (np.asarray(array, np.float64) for array in (mean, log_stddev, z))
    precision = np.exp(-2.0 * log_stddev)
    # log q(z|x_m) as a quadratic function of z: its coefficients are products of matrices. The constants cancel.
    offset = -0.5 * np.sum(precision * mean**2, axis=1) - np.sum(log_stddev, axis=1)
    total = 0.0
    for start in range(0, len(z), 500):
        part = z[start : start + 500]
        log_probs = offset[None] + part @ (precision * mean).T - 0.5 * part**2 @ precision.T
        row = np.arange(len(part))
        total += float(np.sum(log_probs[row, start + row] - scipy.special.logsumexp(log_probs, axis=1)))
    return total / len(z) + math.log(len(z))


def refined(
    evidence: Callable[..., Float[Array, "*M N"]], *, tolerance: float = 1e-3
) -> tuple[Float[np.ndarray, "*M N"], Float[np.ndarray, "*M"]]:
    """`evidence(num_nodes=...)`, log p(x) in nats by quadrature, with so many nodes that its mean changed by less than
    `tolerance` when their number was last doubled, or with 2,048; and that change."""
    num_nodes = 128
    coarse = jax.device_get(evidence(num_nodes=num_nodes))
    while True:
        num_nodes *= 2
        fine = jax.device_get(evidence(num_nodes=num_nodes))
        change = np.asarray(np.abs(fine.mean(axis=-1) - coarse.mean(axis=-1)))
        if num_nodes == 2048 or change.max() < tolerance:
            return fine, change
        coarse = fine


def over_split(
    score_chunk: Callable[[np.ndarray, np.ndarray], Tree], examples: np.ndarray, *, chunk_size: int = 1000
) -> Tree:
    """`score_chunk(x [B, *S], index [B])`, a tree of arrays [..., B] such as `Scores`, over all N `examples`, in chunks
    of one shape: numpy arrays [..., N].

    The last chunk is filled up with repeats of the last example, whose scores are dropped, so that every example counts
    once.
    """
    size = len(examples)
    chunk_size = min(chunk_size, size)
    chunks = []
    for start in range(0, size, chunk_size):
        # Every chunk has the same shape, so that one compiled program serves all.
        index = np.arange(start, start + chunk_size, dtype=np.int32)
        chunks.append(jax.device_get(score_chunk(examples[np.minimum(index, size - 1)], index)))
    return jax.tree.map(lambda *parts: np.concatenate(parts, axis=-1)[..., :size], *chunks)


def paper_elbo(elbo: float, shape: Sequence[int]) -> float:
    """The ELBO in nats in the paper's convention, which drops the density's constant: ELBO + (n/2) log 2 pi, with n the
    product of `shape`. Not for discretised heads, whose probabilities have no such constant."""
    return elbo + math.prod(shape) * gaussians.HALF_LOG_TWO_PI


def elbo_at(
    sigma: Float[np.ndarray, "*T"] | float, *, mse: float, kl: float, num_dimensions: int
) -> Float[np.ndarray, "*T"]:
    """The mean ELBO in nats at another isotropic sigma, encoder and decoder unchanged: a valid bound, from what is
    stored of any model with a Gaussian head.

      -(n/2) log(2 pi sigma^2) - n mse / (2 sigma^2) - KL,  largest at sigma^2 = mse

    Args:
      mse: mean squared error per dimension. kl: mean KL in nats.
    """
    # In float64: at a small sigma the error is a difference of large numbers.
    log_stddev = np.log(np.asarray(sigma, np.float64))
    error = 0.5 * mse * np.exp(-2.0 * log_stddev)
    return np.asarray(-num_dimensions * (error + log_stddev + gaussians.HALF_LOG_TWO_PI) - kl)


class Kind(enum.StrEnum):
    """The quantities that ELBOs of data with grey levels bound: see `rate`."""

    DENSITY = "density"
    DEQUANTISED = "dequantised"
    DISCRETISED = "discretised"


class Rate(NamedTuple):
    """An ELBO of data with grey levels, per dimension.

    Attributes:
      nats_per_dimension: the ELBO divided by the number of dimensions; higher is better.
      bits_per_dimension: of a code for the grey levels; lower is better, uniform noise has log2(levels).
      bound: the largest ELBO in nats that a model of these data can have.
      is_code: whether bits_per_dimension bounds the length of a code from above. If not, it is a density in other
        units, a lower number is no shorter code, and below 0, where the ELBO exceeds `bound`, none could be.
    """

    nats_per_dimension: float
    bits_per_dimension: float
    bound: float
    is_code: bool


def rate(elbo: float, shape: Sequence[int], *, kind: Kind, levels: int = 256) -> Rate:
    """The rate of an ELBO in nats of examples of `shape` with n dimensions, each a grey level k = 0, ..., L - 1; L is
    `levels`.

    | kind | the ELBO bounds | bits per dimension | bound |
    |---|---|---|---|
    | density | log p(x), x = k / (L - 1) | (n ln L - ELBO) / (n ln 2), no code | n ln L; 4347.4 for MNIST |
    | dequantised | E_u log p(x), x = (k + u) / L, u uniform on [0, 1) | the same | n ln L |
    | discretised | log P(k), of a `likelihoods.discretised` head | -ELBO / (n ln 2) | 0 |

    A bin of x has the volume L^-n. By Jensen's inequality log P(k) = log E_u p(x) - n ln L >= E_u log p(x) - n ln L
    (Theis et al., A note on the evaluation of generative models, ICLR 2016, 3.1), where P(k) is the integral of p over
    the bin of k. A density at the points k / (L - 1) alone bounds nothing: narrow peaks there make it as large as one
    likes.

    >>> round(rate(-800.0, (28, 28, 1), kind=Kind.DISCRETISED).bits_per_dimension, 3)
    1.472
    >>> density = rate(1000.0, (28, 28, 1), kind=Kind.DENSITY)
    >>> round(density.bound, 1), density.is_code
    (4347.4, False)

    Raises:
      ValueError: an ELBO of probabilities is above 0, `kind` is unknown, or `levels` is below 2.
    """
    n = math.prod(shape)
    if kind not in list(Kind):
        raise ValueError(f"kind must be {', '.join(Kind)}, got {kind!r}")
    if levels < 2:
        raise ValueError(f"levels must be at least 2, got {levels}")
    if kind == Kind.DISCRETISED and elbo > 0.0:
        raise ValueError(f"an ELBO of probabilities cannot be positive, got {elbo}: is it of a density?")
    bound = 0.0 if kind == Kind.DISCRETISED else n * math.log(levels)
    return Rate(elbo / n, (bound - elbo) / (n * math.log(2.0)), bound, is_code=kind != Kind.DENSITY)
