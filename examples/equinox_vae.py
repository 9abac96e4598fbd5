"""A likelihood head in a VAE written in Equinox: `python -m examples.equinox_vae`, 13 seconds on a CPU.

The model, the loss and the optimiser are one's own; of lvae_jax only the observation model is used. Its parameters are
a leaf of the model like any other, here log sigma of an LS-VAE, and gradients reach it. The decoder ends in
`head.outputs` channels for each data dimension; LV-VAE is `lv.learned_vector()` in the place of the head, no more.

Expect an ELBO of -0.99 nats, of at most -0.40, at sigma 0.083; a model that encodes nothing has -3.48.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import lvae_jax as lv
from lvae_jax import gaussians, toy

LATENT_SIZE = 2
HEAD = lv.learned_scalar()


class VAE(eqx.Module):
    """x [2] -> q(z|x) and z [L] -> decoder outputs [2, K], for one example; `head` is log sigma."""

    encoder: eqx.nn.MLP
    decoder: eqx.nn.MLP
    head: dict[str, jax.Array]

    def __init__(self, key: jax.Array):
        encoder_key, decoder_key = jax.random.split(key)
        self.encoder = eqx.nn.MLP(2, 2 * LATENT_SIZE, 64, 2, jax.nn.silu, key=encoder_key)
        self.decoder = eqx.nn.MLP(LATENT_SIZE, 2 * HEAD.outputs, 64, 2, jax.nn.silu, key=decoder_key)
        self.head = HEAD.init()


def elbo(key: jax.Array, model: VAE, x: jax.Array) -> jax.Array:
    """log p(x|z) - KL(q(z|x) || p(z)) of the examples x [B, 2]: [B], in nats."""
    mean, log_stddev = jnp.split(jax.vmap(model.encoder)(x), 2, axis=-1)
    z = gaussians.sample(key, mean, log_stddev)
    outputs = jax.vmap(model.decoder)(z).reshape(*x.shape, HEAD.outputs)
    return HEAD.log_prob(model.head, outputs, x) - gaussians.kl_to_standard(mean, log_stddev).sum(axis=-1)


def main(num_steps: int = 2000, num_test: int = 10_000) -> tuple[float, float]:
    """Trains on the toy; returns the ELBO of fresh points in nats and sigma in the toy's lengths."""
    optimizer = optax.adam(2e-3)
    model = VAE(jax.random.key(0))
    opt_state = optimizer.init(eqx.filter(model, eqx.is_array))

    @eqx.filter_jit
    def step(key: jax.Array, model: VAE, opt_state: optax.OptState) -> tuple[VAE, optax.OptState]:
        data_key, noise_key = jax.random.split(key)
        x = toy.sample(jax.random.split(data_key, 100))
        gradients = eqx.filter_grad(lambda model: -elbo(noise_key, model, x).mean())(model)
        updates, opt_state = optimizer.update(gradients, opt_state)
        return eqx.apply_updates(model, updates), opt_state

    for index in range(num_steps):
        model, opt_state = step(jax.random.fold_in(jax.random.key(1), index), model, opt_state)
    x = toy.sample(jax.random.split(jax.random.key(2), num_test))
    sigma = HEAD.stddev(model.head, jnp.zeros((1, 1, HEAD.outputs)))
    return float(elbo(jax.random.key(3), model, x).mean()), float(sigma[0, 0])


if __name__ == "__main__":
    elbo_, sigma_ = main()
    print(f"ELBO {elbo_:.2f} nats, of at most {-toy.entropy():.2f}; sigma {sigma_:.3f}")
