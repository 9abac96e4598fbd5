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
from lvae_jax.keys import Stream, example_keys, stream_key
from lvae_jax.likelihoods import Schedule
from lvae_jax.sigma_range import NUM_DRAWS
from lvae_jax.vae import VAE, Params, Scores


class TrainState(NamedTuple):
    """step: [] int32, gradient steps taken; params, in force at that step; opt_state, of the optimiser; ema, the
    exponential moving average of params, or None if none is kept."""

    step: Int[Array, ""]
    params: Params
    opt_state: Any
    ema: Params | None = None

    @property
    def weights(self) -> Params:
        """The parameters to evaluate: the average if one is kept, else the params."""
        return self.params if self.ema is None else self.ema

    def finished(self) -> "TrainState":
        """The state without what only further steps need: a third of the size, or less."""
        return TrainState(self.step, self.weights, opt_state=())


class Metrics(NamedTuple):
    """Metrics of one training batch, under the parameters before the step; all [] floats.

    scores: the batch's summary; gradient_norm: of the mean loss in nats with respect to all parameters, before
      clipping.
    """

    scores: Scores
    gradient_norm: Float[Array, "..."]


def optimizer(
    num_steps: int,
    *,
    learning_rate: float = 2e-3,
    decay: bool = True,
    sigma_rate: float = 10.0,
    warmup_steps: int = 0,
    clip_norm: float = 1.0,
) -> optax.GradientTransformation:
    """Adam on gradients clipped to a global norm, its rate raised from zero over `warmup_steps` and then, with `decay`,
    lowered to zero by a half cosine up to `num_steps`.

    It is the same for every variant. The parameters of the likelihood, such as an LS-VAE's log sigma, are updated
    `sigma_rate` times as fast. Adam moves a parameter by at most about one learning rate a step, and log sigma has some
    three nats to go: at this multiple, it follows the networks instead of limiting them. Clipping makes the start
    harmless: at sigma = 0.01 the first loss is some 10^4 nats.

    Raises:
      ValueError: num_steps is not above warmup_steps.
    """

    def hasten_likelihood(updates: Params, params: Params | None = None) -> Params:
        return {**updates, "likelihood": jax.tree.map(lambda update: sigma_rate * update, updates["likelihood"])}

    end = 0.0 if decay else learning_rate
    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adam(optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup_steps, num_steps, end)),
        optax.stateless(hasten_likelihood),
    )


def init_state(
    key: Key[Array, ""], vae: VAE, optimizer: optax.GradientTransformation, *, ema_decay: float = 0.0
) -> TrainState:
    """The state before the first step; `ema_decay` is that of `train_step`."""
    params = vae_lib.init(key, vae)
    ema = jax.tree.map(jnp.copy, params) if ema_decay else None  # a donated state must not hold an array twice
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), ema)


def train_step(
    key: Key[Array, ""],
    vae: VAE,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    x: Float[Array, "B *S"],
    index: Int[Array, " B"],
    *,
    beta: float | Schedule = 1.0,
    ema_decay: float = 0.0,
    axis_name: str | None = None,
) -> tuple[TrainState, Metrics]:
    """One step of gradient ascent on the batch mean of log p(x|z) - beta KL; beta = 1 is the ELBO. For a model with a
    `sigma_range`, each example is taken at several sigmas of its own, with a `SigmaRange.weight` each in the mean.

    Args:
      key: the step's; an example draws its z from fold_in(key, index).
      index: of each example in the whole batch, of which x may be one device's share.
      beta: a number, or a function of the step for a warm-up of the KL.
      ema_decay: decay of the average in the state, 0 if there is none. After each step t from 1 on, ema = decay ema +
        (1 - decay) params with decay = min(ema_decay, t / (9 + t)), which forgets the start soon, as TensorFlow's
        ExponentialMovingAverage does. Likelihood parameters that `update` sets, not gradients, are not averaged.
      axis_name: of the mapped axis whose devices share the batch, in equal parts; gradients and metrics are those of
        the whole batch.
    """
    told: Params = {}
    weight: Array | float = 1.0
    if vae.sigma_range is not None:
        sigma_key, key = jax.random.split(key)
        x = jnp.repeat(x, NUM_DRAWS, axis=0)
        index = (NUM_DRAWS * index[:, None] + jnp.arange(NUM_DRAWS)[None]).ravel()
        log_sigma = vae.sigma_range.draw(sigma_key, index)
        told, weight = {"likelihood": {"log_stddev": log_sigma}}, vae.sigma_range.weight(log_sigma)
    keys = example_keys(key, index)
    del key
    beta_now = beta(state.step) if callable(beta) else beta

    def loss(params: Params) -> tuple[Float[Array, ""], vae_lib.Terms]:
        terms = vae_lib.elbo(keys, vae, params | told, x)
        # The only mean over examples; all terms are sums over dimensions.
        return jnp.mean(weight * (beta_now * terms.kl - terms.log_likelihood)), terms

    # Metrics are of the parameters before the step: they cost no second pass.
    gradients, terms = jax.grad(loss, has_aux=True)(state.params)
    scores = vae_lib.summary(vae_lib.scores(terms, x))
    # Devices have equal parts of the batch, so that the mean of their means is that of the batch.
    if axis_name is not None:
        gradients = jax.lax.pmean(gradients, axis_name)
        scores = jax.lax.pmean(scores, axis_name)._replace(
            sigma_min=jax.lax.pmin(scores.sigma_min, axis_name), sigma_max=jax.lax.pmax(scores.sigma_max, axis_name)
        )
    # Optax's own arithmetic mixes types, which a user's strict mode would refuse.
    with jax.numpy_dtype_promotion("standard"):
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    step = state.step + 1
    # After the gradient step, so that the state holds the sigma in force at `step`, which checkpoints then keep.
    params["likelihood"] = vae.likelihood.update(params["likelihood"], step, scores.mse)
    ema = state.ema
    if ema is not None:
        decay = jnp.minimum(ema_decay, step / (9 + step))
        ema = jax.tree.map(lambda average, new: average + (1.0 - decay) * (new - average), ema, params)
        ema["likelihood"] = vae.likelihood.update(ema["likelihood"], step, scores.mse)
    return TrainState(step, params, opt_state, ema), Metrics(scores, optax.tree.norm(gradients))


def train_steps(
    key: Key[Array, ""],
    vae: VAE,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    batches: Float[Array, "K B *S"],
    *,
    beta: float | Schedule = 1.0,
    ema_decay: float = 0.0,
) -> tuple[TrainState, Metrics]:
    """`train_step` on each of K batches in turn, as one scan; metrics are [K].

    A step draws from fold_in(key, state.step): K steps at once, or in several calls with the same key, give the same
    numbers. On a CPU a scan slows convolutions down many times (jax issue 12868): call `train_step` for those.
    """

    def one(state: TrainState, x: Float[Array, "B *S"]) -> tuple[TrainState, Metrics]:
        step_key, index = jax.random.fold_in(key, state.step), jnp.arange(len(x))
        return train_step(step_key, vae, optimizer, state, x, index, beta=beta, ema_decay=ema_decay)

    return jax.lax.scan(one, state, batches)


Batch = Callable[[Any, Key[Array, ""], Int[Array, " B"]], Float[Array, "B *S"]]  # see `datasets.Dataset`


def members_init(
    seeds: Int[Array, " M"],
    sigmas: Float[Array, "M *T"],
    make_vae: Callable[..., VAE],
    optimizer: optax.GradientTransformation,
    *,
    ema_decay: float = 0.0,
) -> TrainState:
    """The states of M sweep members, stacked: member m has the model `make_vae(sigmas[m])` and draws its parameters
    from seeds[m]."""

    def one(seed: Int[Array, ""], sigma: Float[Array, "*T"]) -> TrainState:
        key = stream_key(seed, Stream.INIT)
        return init_state(key, make_vae(sigma), optimizer, ema_decay=ema_decay)

    return jax.vmap(one)(seeds, sigmas)


def members_steps(
    seeds: Int[Array, " M"],
    sigmas: Float[Array, "M *T"],
    states: TrainState,
    train: Array | None,
    indices: Int[Array, "K M B"],
    examples: Array | None = None,
    *,
    make_vae: Callable[..., VAE],
    optimizer: optax.GradientTransformation,
    batch: Batch,
    beta: float | Schedule = 1.0,
    ema_decay: float = 0.0,
    axis_name: str | None = None,
) -> tuple[TrainState, Metrics]:
    """K steps of each of M sweep members, as one program: vmapped over members, scanned over steps. Metrics are [K, M].

    Members with the same seed see the same data and the same noise, whatever their sigma: their differences are paired.

    Args:
      train: what `indices` choose from, on the device; None if `examples` holds what they chose, or for a stream.
      axis_name: of the mapped axis whose devices share each batch: device d has the d-th part of it.
    """

    def one(
        seed: Int[Array, ""],
        sigma: Float[Array, "*T"],
        state: TrainState,
        indices: Int[Array, " B"],
        examples: Array | None,
    ) -> tuple[TrainState, Metrics]:
        step_key = jax.random.fold_in(stream_key(seed, Stream.STEP), state.step)
        # Data and noise from separate keys: streams draw their points from the first.
        data_key, noise_key = jax.random.split(step_key)
        x = batch(examples if train is None else train[indices], data_key, indices)
        first = 0 if axis_name is None else len(x) * jax.lax.axis_index(axis_name)
        index = first + jnp.arange(len(x))
        return train_step(
            noise_key,
            make_vae(sigma),
            optimizer,
            state,
            x,
            index,
            beta=beta,
            ema_decay=ema_decay,
            axis_name=axis_name,
        )

    def step(states: TrainState, batches: tuple[Array, Array | None]) -> tuple[TrainState, Metrics]:
        return jax.vmap(one)(seeds, sigmas, states, *batches)

    if len(indices) == 1:  # even a loop of one step makes convolutions on a CPU many times slower (jax issue 12868)
        states, metrics = step(states, jax.tree.map(lambda leaf: leaf[0], (indices, examples)))
        return states, jax.tree.map(lambda value: value[None], metrics)
    return jax.lax.scan(step, states, (indices, examples))
