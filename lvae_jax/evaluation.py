"""Held-out bounds, their rates in bits, diagnostics of a model and measures of its images.

What is computed on the device is per example, so that `over_split` can run it over a whole split in chunks and count
every example once; what sums up the split runs on the host, in float64, and keeps leading axes of sweep members.
"""

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import scipy.ndimage
import scipy.signal
from jaxtyping import Array, Float, Int, Key, UInt8

from lvae_jax import datasets, gaussians, likelihoods
from lvae_jax import vae as vae_lib
from lvae_jax.vae import VAE, Params, Scores, Terms

Tree = TypeVar("Tree")

INTERVALS = (0.5, 0.9, 0.95)
"""The probabilities of the central intervals whose coverage is measured."""


class Details(NamedTuple):
    """What `diagnostics` needs to know of each of B examples; the last axis is theirs, L is the latent size.

    Standardised residuals are (x - mean) / stddev of p(x|z), z ~ q(z|x), one for each data dimension.

    Attributes:
      latent_kl: [L, B], KL(q(z|x) || p(z)) in nats of each latent dimension.
      posterior_mean: [L, B], the mean of q(z|x).
      at_floor: [B], the fraction of data dimensions whose stddev is within 5 % of the head's floor.
      residual, residual_square: [B], means over data dimensions of the standardised residuals and of their squares.
      covered: [3, B], the fraction of data dimensions within the central intervals `INTERVALS` of p(x|z).
    """

    latent_kl: Float[Array, "..."]
    posterior_mean: Float[Array, "..."]
    at_floor: Float[Array, "..."]
    residual: Float[Array, "..."]
    residual_square: Float[Array, "..."]
    covered: Float[Array, "..."]


class Diagnostics(NamedTuple):
    """How a model uses its latent space and its sigma, over a set of examples; float64, [...] for sweep members.

    For data from the model itself and the exact posterior, the standardised residuals are standard Gaussian: mean 0,
    stddev 1, coverage as `INTERVALS` says.

    Attributes:
      latent_kl: [..., L], mean KL in nats of each latent dimension; their sum is the KL of `Scores`.
      active_units: [...], the number of latent dimensions whose posterior mean has a variance above 0.01 over the
        examples (Burda et al., Importance Weighted Autoencoders, ICLR 2016, 5.2).
      active_directions: [...], the same of principal directions of the posterior means: no rotation of the latent space
        changes it, where one direction can make many units active.
      floor_fraction: [...], of stddevs of p(x|z), those within 5 % of the head's floor; 0 where it has none.
      sigma_factor: [...], sigma* / sigma: by what all stddevs would have to be multiplied to maximise log p(x|z), in
        closed form the root mean square of the standardised residuals. With a scalar sigma, sigma* = sqrt(mse). Not of
        a discretised head, whose mean is clipped to [0, 1].
      residual_mean, residual_stddev: [...], of the standardised residuals of all examples and data dimensions.
      coverage: [..., 3], the fraction of values within the central intervals `INTERVALS` of p(x|z).
    """

    latent_kl: Float[np.ndarray, "..."]
    active_units: Int[np.ndarray, "..."]
    active_directions: Int[np.ndarray, "..."]
    floor_fraction: Float[np.ndarray, "..."]
    sigma_factor: Float[np.ndarray, "..."]
    residual_mean: Float[np.ndarray, "..."]
    residual_stddev: Float[np.ndarray, "..."]
    coverage: Float[np.ndarray, "..."]


def examine(key: Key[Array, ""], vae: VAE, params: Params, x: Array, index: Int[Array, " B"]) -> tuple[Scores, Details]:
    """The scores [B] and the details, which `diagnostics` sums up, of the examples x [B, *S] as the model sees them;
    their global indices `index` [B] decide the draws of z."""
    terms = vae_lib.elbo(datasets.example_keys(key, index), vae, params, x)
    return vae_lib.scores(terms, x), details(terms, x, floor=vae.likelihood.floor)


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
            rows = np.asarray(examples[start : start + 1000]).reshape(-1, size)
            cells = rows + levels * np.arange(size)[None]
            total += np.bincount(cells.ravel(), minlength=total.size).reshape(total.shape)
        return total

    def log_prob(seen: Int[np.ndarray, "H L"], asked: Int[np.ndarray, "H L"]) -> float:
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
    keys = datasets.example_keys(key, index)
    return vae_lib.importance_bound(keys, vae, params, x, num_samples=num_samples)


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
    log_stddev = np.log(np.asarray(sigma, np.float64))
    error = 0.5 * mse * np.exp(-2.0 * log_stddev)
    return np.asarray(-num_dimensions * (error + log_stddev + gaussians.HALF_LOG_TWO_PI) - kl)


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


def rate(
    elbo: float, shape: Sequence[int], *, kind: Literal["density", "dequantised", "discretised"], levels: int = 256
) -> Rate:
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

    >>> round(rate(-800.0, (28, 28, 1), kind="discretised").bits_per_dimension, 3)
    1.472
    >>> density = rate(1000.0, (28, 28, 1), kind="density")
    >>> round(density.bound, 1), density.is_code
    (4347.4, False)

    Raises:
      ValueError: an ELBO of probabilities is above 0, `kind` is unknown, or `levels` is below 2.
    """
    n = math.prod(shape)
    if kind not in ("density", "dequantised", "discretised"):
        raise ValueError(f"kind must be density, dequantised or discretised, got {kind!r}")
    if levels < 2:
        raise ValueError(f"levels must be at least 2, got {levels}")
    if kind == "discretised" and elbo > 0.0:
        raise ValueError(f"an ELBO of probabilities cannot be positive, got {elbo}: is it of a density?")
    bound = 0.0 if kind == "discretised" else n * math.log(levels)
    return Rate(elbo / n, (bound - elbo) / (n * math.log(2.0)), bound, is_code=kind != "density")


def details(terms: Terms, x: Float[Array, "B *S"], *, floor: float) -> Details:
    """The details of each example x, given the terms of its bound and the `floor` of the head's stddev."""
    axes = tuple(range(1, x.ndim))
    residual = (x - terms.mean) / terms.stddev
    limits = [NormalDist().inv_cdf(0.5 + 0.5 * probability) for probability in INTERVALS]
    return Details(
        latent_kl=gaussians.kl_to_standard(terms.posterior_mean, terms.posterior_log_stddev).T,
        posterior_mean=terms.posterior_mean.T,
        at_floor=jnp.mean(terms.stddev <= 1.05 * floor, axis=axes),
        residual=jnp.mean(residual, axis=axes),
        residual_square=jnp.mean(residual**2, axis=axes),
        covered=jnp.stack([jnp.mean(jnp.abs(residual) <= limit, axis=axes) for limit in limits]),
    )


def diagnostics(details: Details) -> Diagnostics:
    """The diagnostics of a set of examples, the last axis of the details."""
    latent_kl, posterior_mean, at_floor, residual, residual_square, covered = (
        np.asarray(field, np.float64) for field in details
    )
    mean, mean_square = residual.mean(axis=-1), residual_square.mean(axis=-1)
    centred = posterior_mean - posterior_mean.mean(axis=-1, keepdims=True)
    covariance = centred @ np.swapaxes(centred, -1, -2) / centred.shape[-1]
    return Diagnostics(
        latent_kl=latent_kl.mean(axis=-1),
        active_units=np.sum(posterior_mean.var(axis=-1) > 0.01, axis=-1),
        active_directions=np.sum(np.linalg.eigvalsh(covariance) > 0.01, axis=-1),
        floor_fraction=at_floor.mean(axis=-1),
        sigma_factor=np.sqrt(mean_square),
        residual_mean=mean,
        residual_stddev=np.sqrt(np.maximum(mean_square - mean**2, 0.0)),
        coverage=covered.mean(axis=-1),
    )


def diagnosis(diagnostics: Diagnostics, *, discretised: bool = False, relative_error: float | None = None) -> str:
    """One model's diagnostics in plain words, on one line: "calibrated", or everything that is wrong.

    In this order: a value that is not finite; posterior collapse, no active unit; data explained by variance, if the
    model's root mean squared error is more than 1.5 times what one scalar sigma reaches with the same networks,
    `relative_error` (None where that is not known); sigma at its floor in more than 5 % of the dimensions;
    overconfident or underconfident, sigma* / sigma above 1.1 or below 1 / 1.1; residuals biased by more than 0.1
    stddevs; or, where sigma fits, not Gaussian: the coverage of an interval off by more than 0.05. The residuals of a
    `discretised` head are skipped: they use its clipped mean and say little about its probabilities.
    """
    if not all(np.isfinite(field).all() for field in diagnostics):
        return "diverged: a diagnostic is not finite"
    size, factor, bias = diagnostics.latent_kl.shape[-1], diagnostics.sigma_factor, diagnostics.residual_mean
    findings = []
    if diagnostics.active_units == 0:
        findings.append(f"posterior collapse: none of the latent dimensions, {size}, is active")
    if relative_error is not None and relative_error > 1.5:
        findings.append(f"explains data by variance: its error is {relative_error:.2f} times the LS-VAE's")
    if diagnostics.floor_fraction > 0.05:
        findings.append(f"sigma at its floor in {diagnostics.floor_fraction:.0%} of the dimensions")
    if discretised:
        return "; ".join(findings) or "calibrated"
    if not 1.0 / 1.1 <= factor <= 1.1:
        confidence = "overconfident" if factor > 1.0 else "underconfident"
        findings.append(f"{confidence}: {factor:.3g} times its sigma would be optimal")
    if abs(bias) > 0.1:
        findings.append(f"biased: data lie {bias:+.2f} sigma from the mean on average")
    worst = int(np.argmax(np.abs(diagnostics.coverage - np.array(INTERVALS))))
    if 1.0 / 1.1 <= factor <= 1.1 and abs(diagnostics.coverage[worst] - INTERVALS[worst]) > 0.05:
        holds = f"the central {INTERVALS[worst]:.0%} interval holds {diagnostics.coverage[worst]:.0%}"
        findings.append(f"residuals not Gaussian: {holds}")
    return "; ".join(findings) or "calibrated"


def jumps(
    values: Float[np.ndarray, " T"], *, least: float = 0.05, ratio: float = 2.0
) -> tuple[Int[np.ndarray, " J"], Float[np.ndarray, " J"]]:
    """The change points at which a curve rises from one plateau to a higher one: (indices, rises).

    A jump is a peak of the rate of rise, smoothed over its neighbours, that stands out by the factor `ratio` from the
    rates on both sides of it (a rise from the first value on, however steep, is none), and between the points where the
    rate has fallen by that factor the curve rises by at least `least`. For -log sigma, 0.05 is a fall of 5 %.

    Raises:
      ValueError: `least` is not positive, or `ratio` not above 1.
    """
    if least <= 0.0 or ratio <= 1.0:
        raise ValueError(f"least must be positive and ratio above 1, got {least} and {ratio}")
    rate = scipy.ndimage.gaussian_filter1d(np.diff(np.asarray(values, np.float64)), 1.0)
    level = np.log(np.maximum(rate, least / max(len(rate), 1)))  # slower than that is a plateau
    peaks, found = scipy.signal.find_peaks(level, prominence=math.log(ratio))
    within = (np.full(len(peaks), math.log(ratio)), found["left_bases"], found["right_bases"])
    _, _, left, right = scipy.signal.peak_widths(level, peaks, rel_height=1.0, prominence_data=within)
    rises = values[np.ceil(right).astype(int) + 1] - values[left.astype(int)]
    return peaks[rises >= least], rises[rises >= least]


def laplacian_energy(images: Float[Array, "B H W C"]) -> Float[Array, " B"]:
    """The mean square of the discrete Laplacian, four neighbours less four times the pixel, over the interior pixels:
    how much fine detail an image has, in squared units of the data.

    Raises:
      ValueError: the images have no interior.
    """
    if min(images.shape[1:3]) < 3:
        raise ValueError(f"images must have at least 3 x 3 pixels, got {images.shape[1]} x {images.shape[2]}")
    centre = images[:, 1:-1, 1:-1]
    vertical = images[:, :-2, 1:-1] + images[:, 2:, 1:-1]
    horizontal = images[:, 1:-1, :-2] + images[:, 1:-1, 2:]
    return jnp.mean((vertical + horizontal - 4.0 * centre) ** 2, axis=(1, 2, 3))


def sharpness(images: Float[Array, "B H W C"], originals: Float[Array, "N H W C"]) -> Float[Array, ""]:
    """The mean Laplacian energy of images, such as reconstructions or samples, by that of originals: 1 if they are as
    sharp, below if blurred, above if noisy."""
    return jnp.mean(laplacian_energy(images)) / jnp.mean(laplacian_energy(originals))


class Noise(NamedTuple):
    """The distance of samples from their means. rms: root mean square, in units of the data; relative: rms by the
    data's stddev."""

    rms: Float[Array, ""]
    relative: Float[Array, ""]


def sample_noise(samples: Float[Array, "B *S"], means: Float[Array, "B *S"], data: Float[Array, "N *S"]) -> Noise:
    """How noisy samples of p(x|z) look beside their means (Figs. 13-18). The data's stddev is the root, over
    dimensions, of the mean variance over examples: the error of predicting the mean example always."""
    rms = jnp.sqrt(jnp.mean((samples - means) ** 2))
    return Noise(rms, rms / jnp.sqrt(jnp.mean(jnp.var(data, axis=0))))
