"""Variational auto-encoders whose observation model knows, or learns, its own sharpness: pure functions for JAX.

  import jax, lvae_jax as lv

  head = lv.learned_scalar()  # LS-VAE; also fixed, learned_vector, optimal, logistic, ...
  vae = lv.mlp_vae((2,), head, latent_size=2)
  params = lv.init(jax.random.key(0), vae)
  terms = lv.elbo(jax.random.split(jax.random.key(1), len(x)), vae, params, x)  # x [B, 2]; terms.elbo is [B], in nats

Importing it needs jax, flax, optax and jaxtyping. Nothing here compiles, prints or reads flags. (Two of the modules
that have to be imported by name do: `devices.Layout.map` is `jax.jit` or `jax.pmap`, for a program to call, and
`datasets` shows its progress while it downloads or prepares images.)
"""

from lvae_jax import priors, theory
from lvae_jax.datasets import dequantize
from lvae_jax.keys import example_keys
from lvae_jax.likelihoods import (
    HEADS,
    Likelihood,
    Schedule,
    discretised,
    fixed,
    learned_map,
    learned_scalar,
    learned_vector,
    logistic,
    masked,
    mixture,
    optimal,
    quantisation_noise,
    replay,
    tangent,
)
from lvae_jax.networks import Decoder, Encoder, conv_decoder, conv_encoder, mlp_decoder, mlp_encoder
from lvae_jax.priors import Prior, sampled_kl, standard_normal
from lvae_jax.sigma_range import SigmaRange
from lvae_jax.training import TrainState, init_state, optimizer, train_step, train_steps
from lvae_jax.vae import (
    VAE,
    Scores,
    Terms,
    conv_vae,
    elbo,
    generate,
    importance_bound,
    init,
    mlp_vae,
    reconstruct,
    rescaled,
    scores,
    summary,
    with_likelihood,
    with_prior,
)

__all__ = [
    "HEADS",
    "VAE",
    "Decoder",
    "Encoder",
    "Likelihood",
    "Prior",
    "Schedule",
    "Scores",
    "SigmaRange",
    "Terms",
    "TrainState",
    "conv_decoder",
    "conv_encoder",
    "conv_vae",
    "dequantize",
    "discretised",
    "elbo",
    "example_keys",
    "fixed",
    "generate",
    "importance_bound",
    "init",
    "init_state",
    "learned_map",
    "learned_scalar",
    "learned_vector",
    "logistic",
    "masked",
    "mixture",
    "mlp_decoder",
    "mlp_encoder",
    "mlp_vae",
    "optimal",
    "optimizer",
    "priors",
    "quantisation_noise",
    "reconstruct",
    "replay",
    "rescaled",
    "sampled_kl",
    "scores",
    "standard_normal",
    "summary",
    "tangent",
    "theory",
    "train_step",
    "train_steps",
    "with_likelihood",
    "with_prior",
]
