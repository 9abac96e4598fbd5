"""A flow of NumPyro as the prior of a VAE: `python -m examples.numpyro_prior`, half a minute on a CPU.

`flow` puts a masked autoregressive flow behind the tuple `lv.priors.Prior`, so that the ELBO, the importance-weighted
bound and generation take it like any prior. It learns with the networks here; `lv.with_prior` would put one that was
fitted to the codes of a trained model on that model.
"""

import functools

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from numpyro.distributions.flows import InverseAutoregressiveTransform
from numpyro.nn import AutoregressiveNN

import lvae_jax as lv
from lvae_jax import toy


def flow(latent_size: int, *, num_layers: int = 2, width: int = 32) -> lv.priors.Prior:
    """A masked autoregressive flow as a prior: layer by layer, each dimension is shifted and scaled by a function of
    those before it, with the order reversed in between."""
    init_network, apply_network = AutoregressiveNN(latent_size, [width, width], skip_connections=True)

    def distribution(params: dict) -> dist.Distribution:
        transforms = []
        for name in sorted(params):
            transform = InverseAutoregressiveTransform(functools.partial(apply_network, params[name]))
            # Its inverse draws one dimension after the other, and has the density at once: as a VAE needs it.
            transforms += [transform.inv, dist.transforms.PermuteTransform(jnp.arange(latent_size)[::-1])]
        return dist.TransformedDistribution(dist.Normal(jnp.zeros(latent_size), 1.0).to_event(1), transforms)

    def init(key: jax.Array) -> dict:
        keys = jax.random.split(key, num_layers)
        return {f"layer_{index}": init_network(each, (latent_size,))[1] for index, each in enumerate(keys)}

    def log_prob(params: dict, z: jax.Array) -> jax.Array:
        return distribution(params).log_prob(z)

    def kl(params: dict, mean: jax.Array, log_stddev: jax.Array, z: jax.Array) -> jax.Array:
        return lv.priors.sampled_kl(log_prob(params, z), mean, log_stddev, z)

    def sample(key: jax.Array, params: dict, shape: tuple[int, int]) -> jax.Array:
        return distribution(params).sample(key, shape[:1])

    return lv.priors.Prior(init, log_prob, kl, sample)


def main(num_steps: int = 2000, num_test: int = 5000) -> tuple[lv.VAE, dict, float]:
    """Trains an LS-VAE with this prior on the toy; returns it with its parameters and the ELBO of fresh points in
    nats."""
    vae = lv.mlp_vae((2,), lv.learned_scalar(), latent_size=2, prior=flow(2), width=64, num_blocks=2)
    optimizer = lv.optimizer(num_steps=num_steps)
    state = lv.init_state(jax.random.key(0), vae, optimizer)
    batches = toy.sample(jax.random.split(jax.random.key(1), num_steps * 100)).reshape(num_steps, 100, 2)
    state, _ = jax.jit(lambda state: lv.train_steps(jax.random.key(2), vae, optimizer, state, batches))(state)
    x, keys = toy.sample(jax.random.split(jax.random.key(3), num_test)), jax.random.split(jax.random.key(4), num_test)
    terms = jax.jit(lambda params: lv.elbo(keys, vae, params, x))(state.params)
    return vae, state.params, float(terms.elbo.mean())


if __name__ == "__main__":
    _, params, elbo = main()
    print(f"ELBO {elbo:.2f} nats, of at most {-toy.entropy():.2f}", end="; ")
    print(f"sigma {jnp.exp(params['likelihood']['log_stddev']):.3f}")
