"""One gradient step, and how it is mapped over sweep members and fused over steps.

Everything random in a run derives from one key: `fold_in` of the step, then of the example's global index. A run that
is resumed, or split over devices, draws the same numbers; nothing but the step needs saving.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from lvae_jax import vae as vae_lib
from lvae_jax.vae import VAE, Params, Scores

# Adam moves a parameter by at most about one learning rate a step, and log sigma of an LS-VAE is a single parameter
# with some three nats to go. At this multiple of the networks' rate, it follows them instead of limiting them.
SIGMA_RATE = 10.0


class TrainState(NamedTuple):
    """step: [] int32, gradient steps taken; params, in force at that step; opt_state, of the optimiser."""

    step: Int[Array, ""]
    params: Params
    opt_state: Any


class Metrics(NamedTuple):
    """Of one training batch, under the parameters that the step began with; all [] floats.

    scores: the batch's summary; gradient_norm: of the mean loss in nats with respect to all parameters, before
      clipping.
    """

    scores: Scores
    gradient_norm: Float[Array, "..."]


def optimizer(num_steps: int, *, learning_rate: float = 2e-3, clip_norm: float = 1.0) -> optax.GradientTransformation:
    """Adam on gradients clipped to a global norm, its rate decayed to zero by a half cosine over `num_steps`.

    The same for every variant; log sigma of an LS-VAE, a parameter that the others have not, learns at `SIGMA_RATE`
    times that rate. Clipping makes the start harmless: at sigma = 0.01 the first loss is some 10^4 nats.
    """

    def hasten_likelihood(updates: Params, params: Params | None = None) -> Params:
        return {**updates, "likelihood": jax.tree.map(lambda update: SIGMA_RATE * update, updates["likelihood"])}

    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adam(optax.cosine_decay_schedule(learning_rate, num_steps)),
        optax.stateless(hasten_likelihood),
    )


def init(key: Key[Array, ""], vae: VAE, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    params = vae_lib.init(key, vae)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def train_step(
    key: Key[Array, ""],
    vae: VAE,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    x: Float[Array, "B *S"],
    index: Int[Array, " B"],
    *,
    beta: float = 1.0,
) -> tuple[TrainState, Metrics]:
    """One step of gradient ascent on the batch mean of log p(x|z) - beta KL; beta = 1 is the ELBO.

    Args:
      key: the step's; an example draws its z from fold_in(key, index).
      index: of each example in the whole batch, of which x may be one device's share.
    """
    keys = vae_lib.example_keys(key, index)
    del key

    def loss(params: Params) -> tuple[Float[Array, ""], vae_lib.Terms]:
        terms = vae_lib.elbo(keys, vae, params, x)
        return jnp.mean(beta * terms.kl - terms.log_likelihood), terms

    gradients, terms = jax.grad(loss, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    scores = vae_lib.summary(vae_lib.scores(terms, x))
    step = state.step + 1
    params["likelihood"] = vae.likelihood.update(params["likelihood"], step, scores.mse)
    return TrainState(step, params, opt_state), Metrics(scores, optax.tree.norm(gradients))


Batch = Callable[[Any, Key[Array, ""], Int[Array, " B"]], Float[Array, "B *S"]]


def members_init(
    seeds: Int[Array, " M"],
    sigmas: Float[Array, "M *T"],
    make_vae: Callable[..., VAE],
    optimizer: optax.GradientTransformation,
) -> TrainState:
    """The states of M sweep members, stacked: member m has the model `make_vae(sigmas[m])` and draws its parameters
    from seeds[m]."""

    def one(seed: Int[Array, ""], sigma: Float[Array, "*T"]) -> TrainState:
        return init(jax.random.fold_in(jax.random.key(seed), 0), make_vae(sigma), optimizer)

    return jax.vmap(one)(seeds, sigmas)


def members_steps(
    seeds: Int[Array, " M"],
    sigmas: Float[Array, "M *T"],
    states: TrainState,
    train: Any,
    indices: Int[Array, "K M B"],
    *,
    make_vae: Callable[..., VAE],
    optimizer: optax.GradientTransformation,
    batch: Batch,
    beta: float = 1.0,
) -> tuple[TrainState, Metrics]:
    """K steps of each of M sweep members, as one program: vmapped over members, scanned over steps. Metrics are [K, M].

    Members with the same seed see the same data and the same noise, whatever their sigma: their differences are paired.
    """

    def one(
        seed: Int[Array, ""], sigma: Float[Array, "*T"], state: TrainState, indices: Int[Array, " B"]
    ) -> tuple[TrainState, Metrics]:
        step_key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 1), state.step)
        data_key, noise_key = jax.random.split(step_key)
        x = batch(train, data_key, indices)
        return train_step(noise_key, make_vae(sigma), optimizer, state, x, jnp.arange(len(x)), beta=beta)

    def step(states: TrainState, indices: Int[Array, "M B"]) -> tuple[TrainState, Metrics]:
        return jax.vmap(one)(seeds, sigmas, states, indices)

    if len(indices) == 1:  # even a loop of one step makes convolutions on a CPU many times slower (jax issue 12868)
        states, metrics = step(states, indices[0])
        return states, jax.tree.map(lambda value: value[None], metrics)
    return jax.lax.scan(step, states, indices)
