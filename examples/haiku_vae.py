"""Encoder and decoder written in Haiku: `python -m examples.haiku_vae`, 15 seconds on a CPU.

`hk.transform` makes the pair of pure functions that an `lv.Network` is; from there on everything works as with the
library's own networks: any head, `lv.elbo`, `lv.train_step`. The head here is that of the LV-VAE, which asks the
decoder for two outputs for each data dimension.

Expect an ELBO of -1.41 nats, of at most -0.40; a model that encodes nothing has -3.48.
"""

import haiku as hk
import jax
import jax.numpy as jnp

import lvae_jax as lv
from lvae_jax import toy

LATENT_SIZE = 2
HEAD = lv.learned_vector()


def encode(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x [B, 2] to the mean and the log stddev of q(z|x), both [B, L]."""
    mean, log_stddev = jnp.split(hk.nets.MLP([64, 64, 2 * LATENT_SIZE], activation=jax.nn.silu)(x), 2, axis=-1)
    return mean, log_stddev


def decode(z: jax.Array) -> jax.Array:
    """z [B, L] to the outputs [B, 2, K]."""
    outputs = hk.nets.MLP([64, 64, 2 * HEAD.outputs], activation=jax.nn.silu)(z)
    return outputs.reshape(-1, 2, HEAD.outputs)


def make_vae() -> lv.VAE:
    encoder, decoder = (hk.without_apply_rng(hk.transform(function)) for function in (encode, decode))
    return lv.VAE(
        lv.Network(lambda key: encoder.init(key, jnp.zeros((1, 2))), encoder.apply),
        lv.Network(lambda key: decoder.init(key, jnp.zeros((1, LATENT_SIZE))), decoder.apply),
        HEAD,
        LATENT_SIZE,
    )


def main(num_steps: int = 2000, num_test: int = 10_000) -> lv.Scores:
    """Trains on the toy; returns the scores of fresh points, each the mean over them but for the extremes of sigma."""
    vae, optimizer = make_vae(), lv.optimizer(num_steps)
    state = lv.init_state(jax.random.key(0), vae, optimizer)

    @jax.jit
    def step(key: jax.Array, state: lv.TrainState) -> lv.TrainState:
        data_key, noise_key = jax.random.split(key)
        x = toy.sample(jax.random.split(data_key, 100))
        return lv.train_step(noise_key, vae, optimizer, state, x, jnp.arange(100))[0]

    for index in range(num_steps):
        state = step(jax.random.fold_in(jax.random.key(1), index), state)
    x = toy.sample(jax.random.split(jax.random.key(2), num_test))
    terms = lv.elbo(jax.random.split(jax.random.key(3), num_test), vae, state.params, x)
    return lv.summary(lv.scores(terms, x))


if __name__ == "__main__":
    scores = main()
    print(f"ELBO {scores.elbo:.2f} nats, of at most {-toy.entropy():.2f}", end="; ")
    print(f"sigma from {scores.sigma_min:.3f} to {scores.sigma_max:.3f}")
