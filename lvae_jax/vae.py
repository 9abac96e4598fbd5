"""The variational auto-encoder and its bounds on log p(x), in nats.

Model: p(z) from `priors`, by default N(0, I); p(x|z), an observation model from `likelihoods`; q(z|x) = N(mean, diag
  stddev^2) from the encoder. Every bound is per example, [B]; the mean over examples is the caller's last line.
  Randomness comes from `keys` [B], one for each example: no number depends on how a batch is split over devices.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from lvae_jax import gaussians, likelihoods, networks
from lvae_jax.keys import as_threefry
from lvae_jax.likelihoods import Likelihood
from lvae_jax.networks import Decoder, Encoder
from lvae_jax.priors import STANDARD_NORMAL, Prior
from lvae_jax.sigma_range import SigmaRange

Params = dict[str, Any]


class VAE(NamedTuple):
    """A model. Its parameters are a dict with the keys encoder, decoder and likelihood, and prior if that has any.

    The sigma of a head is among the parameters: to put another head on a trained model, take `with_likelihood`.
    With a `sigma_range`, encoder and decoder are conditioned networks, which are told that of the head
    `likelihoods.fixed`: one model for all sigmas of the range.
    """

    encoder: Encoder
    decoder: Decoder
    likelihood: Likelihood
    latent_size: int
    prior: Prior = STANDARD_NORMAL
    sigma_range: SigmaRange | None = None


class Terms(NamedTuple):
    """The terms of the bound for each of B examples of shape *S, with L latent dimensions.

    Attributes:
      log_likelihood: [B], log p(x|z) in nats, z drawn from q(z|x).
      kl: [B], KL(q(z|x) || p(z)) in nats.
      mean: [B, *S], the mean of p(x|z): the reconstruction.
      stddev: [B, *S], the standard deviation of p(x|z).
      posterior_mean, posterior_log_stddev: [B, L], of q(z|x).
      residual: [B, *S], the standardised residuals of x: `Likelihood.standardise`; 0 for values that are missing.
      observed: [B, *S], whether a value of x is there; None if all are.
      factors: [B, *S, r], U of a covariance diag(stddev^2) + U U^T; None for a head without any.
    """

    log_likelihood: Float[Array, " B"]
    kl: Float[Array, " B"]
    mean: Float[Array, "B *S"]
    stddev: Float[Array, "B *S"]
    posterior_mean: Float[Array, "B L"]
    posterior_log_stddev: Float[Array, "B L"]
    residual: Float[Array, "B *S"]
    observed: Bool[Array, "B *S"] | None = None
    factors: Float[Array, "B *S r"] | None = None

    @property
    def elbo(self) -> Float[Array, " B"]:
        """ELBO(x) = E_q[log p(x|z)] - KL(q(z|x) || p(z)) <= log p(x), one draw of z for each example, [B] nats."""
        return self.log_likelihood - self.kl


class Scores(NamedTuple):
    """Scores of examples; each field is [B], one value for each example, or the summary of a set.

    Attributes:
      elbo, log_likelihood, kl: in nats, as in `Terms`.
      mse: squared error of the mean per dimension that was observed, in squared units of the data.
      sigma_min, sigma_mean, sigma_max: of p(x|z)'s stddev over the example's dimensions, in units of the data.
    """

    elbo: Float[Array, "..."]
    log_likelihood: Float[Array, "..."]
    kl: Float[Array, "..."]
    mse: Float[Array, "..."]
    sigma_min: Float[Array, "..."]
    sigma_mean: Float[Array, "..."]
    sigma_max: Float[Array, "..."]


def mlp_vae(
    shape: Sequence[int],
    likelihood: Likelihood,
    *,
    latent_size: int,
    prior: Prior = STANDARD_NORMAL,
    sigma_range: SigmaRange | None = None,
    **network: Any,
) -> VAE:
    """The VAE of `networks.mlp_encoder` and `networks.mlp_decoder`, whose options `network` are, for data of this
    shape.

    Raises:
      ValueError: a size of the networks is not positive, or the `sigma_range` is none.
    """
    network |= _told(sigma_range)
    encoder = networks.mlp_encoder(shape, latent_size, **network)
    decoder = networks.mlp_decoder(shape, likelihood.outputs, latent_size, **network)
    return VAE(encoder, decoder, likelihood, latent_size, prior, sigma_range)


def conv_vae(
    shape: Sequence[int],
    likelihood: Likelihood,
    *,
    latent_size: int,
    prior: Prior = STANDARD_NORMAL,
    sigma_range: SigmaRange | None = None,
    **network: Any,
) -> VAE:
    """The VAE of `networks.conv_encoder` and `networks.conv_decoder`, whose options `network` are, for images of this
    shape [H, W, C].

    Raises:
      ValueError: as `mlp_vae`.
    """
    network |= _told(sigma_range)
    encoder = networks.conv_encoder(shape, latent_size, **network)
    decoder = networks.conv_decoder(shape, likelihood.outputs, latent_size, **network)
    return VAE(encoder, decoder, likelihood, latent_size, prior, sigma_range)


def rescaled(vae: VAE, *, centre: Float[np.ndarray, "*S"] | float, scale: float) -> VAE:
    """The VAE of data x = `centre` + `scale` x', where `vae` is that of x'; all that it takes and gives is in the unit
    of x. See `likelihoods.rescaled`.

    Raises:
      ValueError: `scale` is not a positive number.
    """
    middle = jnp.asarray(centre, jnp.float32)[None]

    def apply(params: Params, x: Float[Array, "B *S"], *condition: Array) -> tuple[Array, Array]:
        return vae.encoder.apply(params, (x - middle) / scale, *condition)

    head = likelihoods.rescaled(vae.likelihood, centre=centre, scale=scale)
    return vae._replace(encoder=vae.encoder._replace(apply=apply), likelihood=head)


def masked(vae: VAE, *, fill: Float[np.ndarray, "*S"] | float = 0.0) -> VAE:
    """The VAE of data with missing values, which are NaN in x: its bounds are on the log density of those that were
    observed. The encoder sees `fill` in the place of the others, as Mattei and Frellsen (MIWAE, ICML 2019) have it;
    `reconstruct` imputes them.

    Raises:
      ValueError: as `likelihoods.masked` says.
    """
    filling = jnp.asarray(fill, jnp.float32)[None]

    def apply(params: Params, x: Float[Array, "B *S"], *condition: Array) -> tuple[Array, Array]:
        return vae.encoder.apply(params, jnp.where(jnp.isnan(x), filling, x), *condition)

    return vae._replace(encoder=vae.encoder._replace(apply=apply), likelihood=likelihoods.masked(vae.likelihood))


def with_likelihood(vae: VAE, params: Params, likelihood: Likelihood) -> tuple[VAE, Params]:
    """The model under another head, at its initial values, with the parameters `params` of all other parts: a trained
    model read at another sigma.

    >>> trained = mlp_vae((2,), likelihoods.fixed(0.5), latent_size=1)
    >>> params = init(jax.random.key(0), trained)
    >>> vae, params = with_likelihood(trained, params, likelihoods.fixed(0.1))
    >>> _, stddev = reconstruct(vae, params, jnp.zeros((1, 2)))
    >>> [round(float(sigma), 3) for sigma in stddev[0]]
    [0.1, 0.1]

    `vae._replace` alone would leave the old head's sigma in force, which is in `params`.
    """
    return vae._replace(likelihood=likelihood), params | {"likelihood": likelihood.init()}


def with_prior(vae: VAE, params: Params, prior: Prior, prior_params: Params) -> tuple[VAE, Params]:
    """The model under another prior with these parameters, all other parts unchanged: a second stage.

    >>> trained = mlp_vae((2,), likelihoods.fixed(0.5), latent_size=3)
    >>> params = init(jax.random.key(0), trained)
    >>> from lvae_jax import priors
    >>> mean, log_stddev = encode(trained, params, jax.random.normal(jax.random.key(1), (100, 2)))
    >>> fitted = priors.fit_gaussian(np.asarray(mean), np.asarray(log_stddev))
    >>> vae, params = with_prior(trained, params, priors.gaussian(3), fitted)
    >>> sample_prior(jax.random.key(2), vae, params, num_samples=5).shape
    (5, 3)

    A prior without parameters takes {}.
    """
    rest = {name: value for name, value in params.items() if name != "prior"}
    return vae._replace(prior=prior), rest | ({"prior": prior_params} if prior_params else {})


def init(key: Key[Array, ""], vae: VAE) -> Params:
    """Initial parameters of all parts, a dict as `VAE` says."""
    encoder_key, decoder_key = jax.random.split(key)
    params = {
        "encoder": vae.encoder.init(encoder_key),
        "decoder": vae.decoder.init(decoder_key),
        "likelihood": vae.likelihood.init(),
    }
    # A prior without parameters leaves no trace: checkpoints from before priors were chosen stay as they are.
    prior = vae.prior.init(jax.random.fold_in(key, 2))
    return params | ({"prior": prior} if prior else {})


def encode(
    vae: VAE, params: Params, x: Float[Array, "B *S"], *, condition: Float[Array, "B C"] | None = None
) -> tuple[Float[Array, "B L"], Float[Array, "B L"]]:
    """The mean and the log stddev of q(z|x), both [B, L]. Only a network that is conditioned gets a condition, by
    default the sigma of the head if the model has a `sigma_range`."""
    mean, log_stddev = vae.encoder.apply(params["encoder"], x, *_conditions(vae, params, condition))
    if vae.sigma_range is None:
        return mean, log_stddev
    return vae.sigma_range.posterior(mean, log_stddev, params["likelihood"]["log_stddev"])


def decode(
    vae: VAE, params: Params, z: Float[Array, "B L"], *, condition: Float[Array, "B C"] | None = None
) -> Float[Array, "B *S K"]:
    """The outputs [B, *S, K] of which the likelihood head makes p(x|z).

    Raises:
      ValueError: the decoder has another number of channels than the head needs.
    """
    outputs = vae.decoder.apply(params["decoder"], z, *_conditions(vae, params, condition))
    # JAX clamps an index that is out of range: a head would read another channel without a word.
    if outputs.shape[-1] != vae.likelihood.outputs:
        raise ValueError(
            f"the decoder has {outputs.shape[-1]} outputs for each data dimension, but the likelihood head needs "
            f"{vae.likelihood.outputs}: give the decoder outputs=head.outputs"
        )
    return outputs


def elbo(
    keys: Key[Array, " B"],
    vae: VAE,
    params: Params,
    x: Float[Array, "B *S"],
    *,
    condition: Float[Array, "B C"] | None = None,
) -> Terms:
    """The evidence lower bound (Eq. 3) on log p(x), x [B, *S], by its terms, [B] nats each, at a reparameterised
    z ~ q(z|x), for which each example has its key. A `condition` goes to encoder and decoder: the bound is then on
    log p(x|condition)."""
    mean, log_stddev = encode(vae, params, x, condition=condition)
    # A key for each example: its noise then does not depend on the batch, or on the device, that it is in.
    z = jax.vmap(gaussians.sample)(as_threefry(keys), mean, log_stddev)
    outputs = decode(vae, params, z, condition=condition)
    networks.check_data(x, outputs.shape[1:-1])
    head, head_params = vae.likelihood, params["likelihood"]
    means, stddevs = head.mean(head_params, outputs), head.stddev(head_params, outputs)
    log_likelihood = head.log_prob(head_params, outputs, x)
    standardise, observed = head.standardise, None
    if head.masked:
        observed = ~jnp.isnan(x)
        x = jnp.where(observed, x, means)
    return Terms(
        log_likelihood=log_likelihood,
        kl=vae.prior.kl(_of_prior(params), mean, log_stddev, z),
        mean=means,
        stddev=stddevs,
        posterior_mean=mean,
        posterior_log_stddev=log_stddev,
        residual=(x - means) / stddevs if standardise is None else standardise(head_params, outputs, x),
        observed=observed,
        factors=None if head.factors is None else head.factors(head_params, outputs),
    )


def scores(terms: Terms, x: Float[Array, "B *S"]) -> Scores:
    """The scores of each example x, [B], given the terms of its bound."""
    networks.check_data(x, terms.mean.shape[1:])
    axes = tuple(range(1, x.ndim))
    return Scores(
        elbo=terms.elbo,
        log_likelihood=terms.log_likelihood,
        kl=terms.kl,
        mse=jnp.mean((x - terms.mean) ** 2, axis=axes, where=terms.observed),
        sigma_min=jnp.min(terms.stddev, axis=axes),
        sigma_mean=jnp.mean(terms.stddev, axis=axes),
        sigma_max=jnp.max(terms.stddev, axis=axes),
    )


def summary(scores: Scores) -> Scores:
    """The scores of a set of examples, the last axis: its mean, but the least sigma_min and the largest sigma_max."""
    return Scores(*(field.mean(axis=-1) for field in scores))._replace(
        sigma_min=scores.sigma_min.min(axis=-1), sigma_max=scores.sigma_max.max(axis=-1)
    )


def importance_bound(
    keys: Key[Array, " B"], vae: VAE, params: Params, x: Float[Array, "B *S"], *, num_samples: int
) -> Float[Array, " B"]:
    """log (1/k) sum_k p(x|z_k) p(z_k) / q(z_k|x), z_k ~ q(z|x): a bound on log p(x) in nats that is tighter the larger
    k = num_samples.

    Burda et al., Importance Weighted Autoencoders, ICLR 2016, Eq. 8. Its expectation lies between the ELBO (k = 1) and
    log p(x).

    Raises:
      ValueError: num_samples is not positive.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    keys = as_threefry(keys)
    mean, log_stddev = encode(vae, params, x)

    def log_weight(k: Int[Array, ""]) -> Float[Array, " B"]:
        z = jax.vmap(gaussians.sample)(jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, k), mean, log_stddev)
        log_prior = vae.prior.log_prob(_of_prior(params), z)
        log_posterior = jnp.sum(gaussians.log_prob(z, mean, log_stddev), axis=-1)
        outputs = decode(vae, params, z)
        networks.check_data(x, outputs.shape[1:-1])
        return vae.likelihood.log_prob(params["likelihood"], outputs, x) + log_prior - log_posterior

    # One draw after another: memory for one set of outputs, however many draws.
    log_weights = jax.lax.map(log_weight, jnp.arange(num_samples))
    return jax.nn.logsumexp(log_weights, axis=0) - jnp.log(num_samples)


def evidence(
    vae: VAE, params: Params, x: Float[Array, "B *S"], *, num_nodes: int, reach: float = 6.0
) -> Float[Array, " B"]:
    """log p(x) = log of the integral of p(x|z) p(z) over z in nats, [B], for one or two latent dimensions.

    By the trapezoid rule with `num_nodes` nodes along each dimension from -reach to reach, which must contain the mass
    of the prior. Its error falls exponentially once neighbouring nodes are no further apart than the stddev of the true
    posterior; compare with half as many nodes.

    Raises:
      ValueError: there are more latent dimensions.
    """
    if vae.latent_size > 2:
        raise ValueError(f"quadrature takes one or two latent dimensions, not {vae.latent_size}: see importance_bound")
    nodes = jnp.linspace(-reach, reach, num_nodes)
    spacing = nodes[1] - nodes[0]

    def add_row(total: Float[Array, " B"], node: Float[Array, ""]) -> tuple[Float[Array, " B"], None]:
        row = nodes[:, None] if vae.latent_size == 1 else jnp.stack([jnp.full_like(nodes, node), nodes], axis=-1)
        outputs = decode(vae, params, row)
        networks.check_data(x, outputs.shape[1:-1])
        # The end nodes weigh as much as the others: beyond `reach` the prior has no mass, so they do not matter.
        log_weight = vae.prior.log_prob(_of_prior(params), row) + vae.latent_size * jnp.log(spacing)

        def one(x: Float[Array, "*S"]) -> Float[Array, ""]:
            copies = jnp.broadcast_to(x[None], (num_nodes, *x.shape))
            log_likelihood = vae.likelihood.log_prob(params["likelihood"], outputs, copies)
            return jax.nn.logsumexp(log_likelihood + log_weight)

        return jnp.logaddexp(total, jax.vmap(one)(x)), None

    # Row by row: all nodes of the plane at once would need num_nodes times the memory.
    rows = nodes if vae.latent_size == 2 else nodes[:1]
    return jax.lax.scan(add_row, jnp.full(len(x), -jnp.inf), rows)[0]


def reconstruct(
    vae: VAE, params: Params, x: Float[Array, "B *S"], *, condition: Float[Array, "B C"] | None = None
) -> tuple[Float[Array, "B *S"], Float[Array, "B *S"]]:
    """The (mean, stddev) of p(x|z) at the posterior's mean, both [B, *S]."""
    # One z for each example, without noise: what the model keeps of it.
    mean, _ = encode(vae, params, x, condition=condition)
    outputs = decode(vae, params, mean, condition=condition)
    return vae.likelihood.mean(params["likelihood"], outputs), vae.likelihood.stddev(params["likelihood"], outputs)


def sample_prior(key: Key[Array, ""], vae: VAE, params: Params, *, num_samples: int) -> Float[Array, "B L"]:
    """`num_samples` draws of z ~ p(z), [B, L]."""
    return vae.prior.sample(key, _of_prior(params), (num_samples, vae.latent_size))


def generate(
    key: Key[Array, ""],
    vae: VAE,
    params: Params,
    *,
    num_samples: int,
    condition: Float[Array, "B C"] | None = None,
) -> tuple[Float[Array, "B *S"], Float[Array, "B *S"], Float[Array, "B *S"]]:
    """`num_samples` draws x ~ p(x|z), z ~ p(z), with the means and stddevs of p(x|z) that they were drawn from:
    (samples, means, stddevs).

    Raises:
      ValueError: `num_samples` is not positive.
    """
    if num_samples < 1:
        raise ValueError(f"`num_samples` must be at least 1, got {num_samples}")
    prior_key, likelihood_key = jax.random.split(key)
    z = sample_prior(prior_key, vae, params, num_samples=num_samples)
    outputs = decode(vae, params, z, condition=condition)
    head, head_params = vae.likelihood, params["likelihood"]
    return (
        head.sample(likelihood_key, head_params, outputs),
        head.mean(head_params, outputs),
        head.stddev(head_params, outputs),
    )


def _told(sigma_range: SigmaRange | None) -> dict[str, int]:
    """The option of networks that makes them conditioned on sigma."""
    if sigma_range is None:
        return {}
    sigma_range.check()
    return {"condition_size": 1}


def _conditions(vae: VAE, params: Params, condition: Array | None) -> tuple[Array, ...]:
    if condition is not None:
        return (condition,)
    return () if vae.sigma_range is None else (vae.sigma_range.condition(params["likelihood"]["log_stddev"]),)


def _of_prior(params: Params) -> Params:
    return params.get("prior", {})
