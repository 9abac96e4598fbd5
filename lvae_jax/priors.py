"""Priors p(z) of the latent variables [B, L], in nats. The VAE's default is `standard_normal`, N(0, I)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from lvae_jax import gaussians

Params = dict[str, Any]


class Prior(NamedTuple):
    """A prior as pure functions of its parameters, which the VAE keeps under the key prior, if it has any.

    Attributes:
      init: key -> params, a (possibly empty) dict of arrays.
      log_prob: (params, z [B, L]) -> [B], log p(z) in nats.
      kl: (params, mean [B, L], log_stddev [B, L], z [B, L]) -> [B], KL(q || p) in nats for q = N(mean, diag stddev^2),
        in closed form or by its draws z: `sampled_kl`.
      sample: (key, params, (B, L)) -> z [B, L].
    """

    init: Callable[[Key[Array, ""]], Params]
    log_prob: Callable[[Params, Float[Array, "B L"]], Float[Array, " B"]]
    kl: Callable[[Params, Float[Array, "B L"], Float[Array, "B L"], Float[Array, "B L"]], Float[Array, " B"]]
    sample: Callable[[Key[Array, ""], Params, tuple[int, int]], Float[Array, "B L"]]


def standard_normal() -> Prior:
    """N(0, I), with the KL in closed form."""

    def log_prob(params: Params, z: Float[Array, "B L"]) -> Float[Array, " B"]:
        # Scalars broadcast: no array of zeros is made.
        return jnp.sum(gaussians.log_prob(z, jnp.zeros(()), jnp.zeros(())), axis=-1)

    def kl(
        params: Params, mean: Float[Array, "B L"], log_stddev: Float[Array, "B L"], z: Float[Array, "B L"]
    ) -> Float[Array, " B"]:
        # The closed form does not need the draws z, and has no sampling noise.
        return jnp.sum(gaussians.kl_to_standard(mean, log_stddev), axis=-1)

    def sample(key: Key[Array, ""], params: Params, shape: tuple[int, int]) -> Float[Array, "B L"]:
        return jax.random.normal(key, shape)

    return Prior(lambda key: {}, log_prob, kl, sample)


def sampled_kl(
    log_prior: Float[Array, " B"], mean: Float[Array, "B L"], log_stddev: Float[Array, "B L"], z: Float[Array, "B L"]
) -> Float[Array, " B"]:
    """log q(z) - log p(z) in nats, [B]: unbiased for KL(q || p), q = N(mean, diag stddev^2), if z is drawn from q.
    `log_prior` is log p(z). For priors whose KL has no closed form."""
    return jnp.sum(gaussians.log_prob(z, mean, log_stddev), axis=-1) - log_prior
