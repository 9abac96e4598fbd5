"""Diagnostics of a model: its use of the latent space and of sigma, in numbers and in plain words.

`details` runs on the device, for each example; `summarise` runs on the host, in float64, over the examples of a split,
and keeps the leading axes of sweep members.
"""

import functools
from statistics import NormalDist
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lvae_jax import gaussians
from lvae_jax.vae import Terms

INTERVALS = (0.5, 0.9, 0.95)
"""The probabilities of the central intervals whose coverage is measured."""


class Details(NamedTuple):
    """Statistics of each of B examples, which `summarise` averages. The last axis is the example; L is the latent size.

    Standardised residuals, one for each data dimension, are those of `Terms`: where the head has no correlations,
    (x - mean) / stddev of p(x|z), z ~ q(z|x).

    Attributes:
      latent_kl: [L, B], KL(q(z|x) || N(0, I)) in nats of each latent dimension, whatever the prior.
      posterior_mean: [L, B], the mean of q(z|x).
      at_floor: [B], the fraction of data dimensions, here and below those that were observed, whose stddev is within
        5 % of the head's floor.
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
    """The use of the latent space and of sigma over a set of examples; float64, [...] for sweep members.

    For data from the model itself and the exact posterior, the standardised residuals are standard Gaussian: mean 0,
    stddev 1, coverage as `INTERVALS` says.

    Attributes:
      latent_kl: [..., L], mean KL to N(0, 1) in nats of each latent dimension; under the prior N(0, I) their sum is the
        KL of `Scores`.
      active_units: [...], the number of latent dimensions whose posterior mean has a variance above 0.01 over the
        examples (Burda et al., Importance Weighted Autoencoders, ICLR 2016, 5.2).
      active_directions: [...], the number of principal directions of the posterior means with variance above 0.01.
        Unlike `active_units`, it is invariant to rotations of the latent space.
      floor_fraction: [...], the fraction of stddevs of p(x|z) within 5 % of the head's floor; 0 if it has none.
      sigma_factor: [...], sigma* / sigma: the common factor of all stddevs that maximises log p(x|z), in closed form
        the root mean square of the standardised residuals. With a scalar sigma, sigma* = sqrt(mse). It has no such
        meaning for a discretised head, whose mean is clipped to [0, 1].
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


def details(terms: Terms, *, floor: float) -> Details:
    """The details of each example, given the terms of its bound and the `floor` of the head's stddev."""
    # Over the dimensions that were observed.
    mean = functools.partial(jnp.mean, axis=tuple(range(1, terms.residual.ndim)), where=terms.observed)
    # Two-sided: the central interval of probability p ends at the quantile (1 + p) / 2.
    limits = [NormalDist().inv_cdf(0.5 + 0.5 * probability) for probability in INTERVALS]
    return Details(
        latent_kl=gaussians.kl_to_standard(terms.posterior_mean, terms.posterior_log_stddev).T,
        posterior_mean=terms.posterior_mean.T,
        at_floor=mean(terms.stddev <= 1.05 * floor),
        residual=mean(terms.residual),
        residual_square=mean(terms.residual**2),
        covered=jnp.stack([mean(jnp.abs(terms.residual) <= limit) for limit in limits]),
    )


def summarise(details: Details) -> Diagnostics:
    """The diagnostics of a set of examples, the last axis of the details.

    Raises:
      ValueError: there are fewer than 2 examples: one alone has no use of the latent space that could be measured.
    """
    if details.posterior_mean.shape[-1] < 2:
        raise ValueError(f"diagnostics need at least 2 examples, got {details.posterior_mean.shape[-1]}")
    latent_kl, posterior_mean, at_floor, residual, residual_square, covered = (
        np.asarray(field, np.float64) for field in details
    )
    mean, mean_square = residual.mean(axis=-1), residual_square.mean(axis=-1)
    # A rotated latent space spreads one direction over several units: its eigenvalues tell.
    centred = posterior_mean - posterior_mean.mean(axis=-1, keepdims=True)
    covariance = centred @ np.swapaxes(centred, -1, -2) / centred.shape[-1]
    return Diagnostics(
        latent_kl=latent_kl.mean(axis=-1),
        active_units=np.sum(posterior_mean.var(axis=-1) > 0.01, axis=-1),
        active_directions=np.sum(np.linalg.eigvalsh(covariance) > 0.01, axis=-1),
        floor_fraction=at_floor.mean(axis=-1),
        sigma_factor=np.sqrt(mean_square),
        residual_mean=mean,
        # Rounding can make the difference negative where all residuals are alike.
        residual_stddev=np.sqrt(np.maximum(mean_square - mean**2, 0.0)),
        coverage=covered.mean(axis=-1),
    )


def diagnosis(
    diagnostics: Diagnostics,
    *,
    discretised: bool = False,
    relative_error: float | None = None,
    tangents: bool = False,
) -> str:
    """One model's diagnostics in plain words, on one line: "calibrated", or everything that is wrong.

    In this order: a value that is not finite; posterior collapse, no active unit, which is no fault where `tangents` of
    the observation model have taken the place of latent dimensions; data explained by variance, if the model's root
    mean squared error is more than 1.5 times what one scalar sigma reaches with the same networks, `relative_error`
    (None where that is not known); sigma at its floor in more than 5 % of the dimensions; overconfident or
    underconfident, sigma* / sigma above 1.1 or below 1 / 1.1; residuals biased by more than 0.1 stddevs; or, where
    sigma fits, not Gaussian: the coverage of an interval off by more than 0.05. The residuals of a `discretised` head
    are skipped: they use its clipped mean and say little about its probabilities.
    """
    # Comparisons with NaN are false: without this, a model that diverged would be called calibrated.
    if not all(np.isfinite(field).all() for field in diagnostics):
        return "diverged: a diagnostic is not finite"
    size, factor, bias = diagnostics.latent_kl.shape[-1], diagnostics.sigma_factor, diagnostics.residual_mean
    findings = []
    if diagnostics.active_units == 0:
        collapse = f"posterior collapse: none of the latent dimensions, {size}, is active"
        findings.append(collapse + tangents * ", whose place the tangents may have taken")
    if relative_error is not None and relative_error > 1.5:
        findings.append(f"explains data by variance: its error is {relative_error:.2f} times the LS-VAE's")
    if diagnostics.floor_fraction > 0.05:
        findings.append(f"sigma at its floor in {diagnostics.floor_fraction:.0%} of the dimensions")
    if discretised:
        return "; ".join(findings) or "calibrated"
    # Where sigma is wrong, the shape of the residuals follows from that and is not judged.
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
