"""A whole sweep of sigma as one vmapped program: `python -m examples.vmapped_sweep`, 20 seconds on two cores.

Training with one sigma is a pure function of sigma, which may be traced; `jax.vmap` makes a sweep of it. The data are
uniform on the unit sphere of R^3, for which the best ELBO of any VAE is known: below the critical sigma, 1 / sqrt(3),
the models come close to it, above they collapse, with no KL, as Theorem 1 says.

Expect an ELBO of -1.441 nats at 0.2 of the critical sigma, of at most -1.284, and -2.698, the best, at 1.2 of it.
"""

import jax
import jax.numpy as jnp

import lvae_jax as lv
from lvae_jax import theory

DIM, LATENT_SIZE, BATCH_SIZE = 3, 2, 100


def sphere(key: jax.Array, size: int) -> jax.Array:
    normal = jax.random.normal(key, (size, DIM))
    return normal / jnp.linalg.norm(normal, axis=1, keepdims=True)


def train(sigma: jax.Array, num_steps: int) -> lv.Scores:
    """The scores of fresh points after `num_steps` with this sigma."""
    head = lv.fixed(sigma)
    vae = lv.mlp_vae((DIM,), head, latent_size=LATENT_SIZE, width=64, num_blocks=1)
    optimizer = lv.optimizer(num_steps)
    state = lv.init_state(jax.random.key(0), vae, optimizer)
    batches = sphere(jax.random.key(1), num_steps * BATCH_SIZE).reshape(num_steps, BATCH_SIZE, DIM)
    state, _ = lv.train_steps(jax.random.key(2), vae, optimizer, state, batches)
    x = sphere(jax.random.key(3), 10_000)
    terms = lv.elbo(jax.random.split(jax.random.key(4), len(x)), vae, state.params, x)
    return lv.summary(lv.scores(terms, x))


def main(num_steps: int = 2000, ratios: tuple[float, ...] = (0.2, 0.4, 0.6, 1.2)) -> tuple[jax.Array, lv.Scores]:
    """The sigmas, `ratios` times the critical one, and the scores of a model with each, [T]."""
    sigmas = jnp.array(ratios) * theory.critical_sigma(dim=DIM)
    return sigmas, jax.jit(jax.vmap(lambda sigma: train(sigma, num_steps)))(sigmas)


if __name__ == "__main__":
    sigmas, scores = main()
    print("sigma  KL [nats]  ELBO [nats]  best possible")
    for row in zip(sigmas, scores.kl, scores.elbo, theory.best_elbo(sigmas, dim=DIM), strict=True):
        print("{:.3f} {:9.3f} {:12.3f} {:14.3f}".format(*row))
