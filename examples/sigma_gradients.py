"""Gradients with respect to sigma, of the theory and of a model: `python -m examples.sigma_gradients`, 9 seconds.

Everything in the library is a differentiable function of its arrays. Of Theorem 1: how fast the best radius and the
best ELBO on the sphere change with sigma. Of a model: the slope of the mean ELBO by log sigma, n (mse / sigma^2 - 1),
which vanishes where sigma^2 is the mean squared error. `lv.with_likelihood` reads one model at any sigma; of the heads
that take one, `lv.fixed` stops gradients by it, `lv.learned_scalar` does not.

Expect, at sigma 0.3, -0.750 and -2.963 on the sphere in R^3, and for the model twice 40.30 nats.
"""

import jax
import jax.numpy as jnp

import lvae_jax as lv
from lvae_jax import theory, toy


def theory_slopes(sigmas: jax.Array, dim: int = 3) -> tuple[jax.Array, jax.Array]:
    """The slopes [T] of the best radius and of the best ELBO, in nats, by sigma on the unit sphere of R^dim."""
    radius = jax.grad(lambda sigma: theory.optimal_radius(sigma, dim=dim))
    elbo = jax.grad(lambda sigma: theory.best_elbo(sigma, dim=dim))
    return jax.jit(jax.vmap(radius))(sigmas), jax.jit(jax.vmap(elbo))(sigmas)


def model_slope(log_sigma: jax.Array) -> tuple[jax.Array, lv.Scores]:
    """The slope of an untrained model's mean ELBO on the toy by log sigma, in nats, and its scores."""
    vae = lv.mlp_vae((2,), lv.learned_scalar(), latent_size=2, width=32)
    params = lv.init(jax.random.key(0), vae)
    x = toy.sample(jax.random.split(jax.random.key(1), 1000))
    keys = jax.random.split(jax.random.key(2), 1000)

    def mean_elbo(log_sigma: jax.Array) -> tuple[jax.Array, lv.Scores]:
        head = lv.learned_scalar(jnp.exp(log_sigma))
        terms = lv.elbo(keys, *lv.with_likelihood(vae, params, head), x)
        return terms.elbo.mean(), lv.summary(lv.scores(terms, x))

    return jax.grad(mean_elbo, has_aux=True)(log_sigma)


def main(sigmas: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5)) -> tuple[jax.Array, jax.Array, jax.Array, lv.Scores]:
    """The two slopes of the theory, and a model's slope with its scores, all [T]."""
    return *theory_slopes(jnp.array(sigmas)), *jax.jit(jax.vmap(model_slope))(jnp.log(jnp.array(sigmas)))


if __name__ == "__main__":
    radius, elbo, slope, scores = main()
    print("sphere: d radius / d sigma", radius, "d ELBO / d sigma", elbo, sep="\n  ")
    print("model: d ELBO / d log sigma, and n (mse / sigma^2 - 1)", slope, sep="\n  ", end="\n  ")
    print(2.0 * (scores.mse / scores.sigma_mean**2 - 1.0))
