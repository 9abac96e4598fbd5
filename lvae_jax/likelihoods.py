"""Observation models p(x|z): isotropic or diagonal Gaussians that differ only in where log sigma comes from.

Shapes: a decoder gives `outputs` [B, *S, K], K = `Likelihood.outputs` channels for each data dimension of x [B, *S].
  Channel 0 is the mean; channel 1, where there is one, the log stddev. Units: sigma has the unit of x; densities are in
  nats, summed over *S and never averaged.

| head | name in the paper | log sigma |
|---|---|---|
| `fixed(0.1)` | F-VAE, F*-VAE | a constant |
| `fixed(schedule)` | F-VAE, external schedule (A.2) | a function of the step |
| `learned_scalar()` | LS-VAE, Eq. 10 | one free parameter |
| `learned_vector()` | LV-VAE, Eq. 11 | a second decoder output for each data dimension |
| `optimal()` | sigma-VAE (Rybkin et al., ICML 2021) | closed form: sigma^2 = mean squared error |

The log stddev of `fixed`, `learned_scalar` and `optimal` lives in the head's parameters, so that one compiled program
serves every sigma.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from lvae_jax import gaussians

Schedule = Callable[[Int[Array, ""]], Float[Array, ""]]
Params = dict[str, Any]

# Learned and closed-form log sigmas, initial values included, are softly clipped to this interval; they are untouched
# from -6.5 to 1.5, sigma from 1.5e-3 to 4.5. Scale data of another magnitude first. The floor, sigma = 9e-4, lies below
# the quantisation noise of 8-bit pixels on [0, 1], 1 / (255 sqrt 12) = 1.1e-3.
LOG_STDDEV_RANGE = (-7.0, 2.0)


class Likelihood(NamedTuple):
    """An observation model as pure functions of its parameters and of the decoder's outputs.

    Attributes:
      outputs: decoder channels for each data dimension, K.
      init: () -> params, a (possibly empty) dict of arrays.
      update: (params, step, mse) -> params in force at `step`, given the mean squared error per dimension of the batch
        before it. What gradients do not set is set here: a schedule, or a closed form. The identity for all other
        heads.
      mean: (params, outputs [B, *S, K]) -> [B, *S].
      stddev: (params, outputs [B, *S, K]) -> [B, *S].
      log_prob: (params, outputs [B, *S, K], x [B, *S]) -> [B], log p(x|z) in nats, the full density.
      sample: (key, params, outputs [B, *S, K]) -> [B, *S], a draw from p(x|z).
    """

    outputs: int
    init: Callable[[], Params]
    update: Callable[[Params, Int[Array, ""], Float[Array, ""]], Params]
    mean: Callable[[Params, Float[Array, "B *S K"]], Float[Array, "B *S"]]
    stddev: Callable[[Params, Float[Array, "B *S K"]], Float[Array, "B *S"]]
    log_prob: Callable[[Params, Float[Array, "B *S K"], Float[Array, "B *S"]], Float[Array, " B"]]
    sample: Callable[[Key[Array, ""], Params, Float[Array, "B *S K"]], Float[Array, "B *S"]]


def fixed(sigma: float | Float[Array, ""] | Schedule = 1.0) -> Likelihood:
    """F-VAE: N(mean, sigma^2 I), sigma a positive constant or a schedule, a pure function of the (traced) step.

    Raises:
      ValueError: sigma is a number that is not positive.
    """
    if callable(sigma):

        def init() -> Params:
            return _log(sigma(jnp.zeros((), jnp.int32)))

        def update(params: Params, step: Int[Array, ""], mse: Float[Array, ""]) -> Params:
            return _log(sigma(step))
    else:
        init, update = _initial(sigma), _unchanged
    return _gaussian(1, init, update, lambda params, outputs: jax.lax.stop_gradient(params["log_stddev"]))


def learned_scalar(sigma: float | Float[Array, ""] = 1.0) -> Likelihood:
    """LS-VAE (Eq. 10): N(mean, sigma^2 I), log sigma one free parameter that starts at log `sigma`.

    Its stationary point is sigma^2 = mean squared error per dimension.

    Raises:
      ValueError: sigma is a number that is not positive.
    """
    return _gaussian(
        1,
        _initial(sigma),
        _unchanged,
        lambda params, outputs: gaussians.soft_clip(params["log_stddev"], *LOG_STDDEV_RANGE),
    )


def learned_vector(sigma: float | Float[Array, ""] = 1.0, *, gain: float = 1.0) -> Likelihood:
    """LV-VAE (Eq. 11): N(mean, diag sigma^2), log sigma = log `sigma` + `gain` * the decoder's second channel.

    `gain` sets how fast log sigma learns against the mean. Where few dimensions carry all the data, an eager log sigma
    settles on their spread before the mean has found them; there sigma is critical, the gradient that would encode
    them vanishes, and some runs never leave. A gain well below 1 prevents that, at the price of a slower sigma.

    Raises:
      ValueError: sigma is a number that is not positive.
    """
    log_sigma = _initial(sigma)()["log_stddev"]

    def log_stddev(params: Params, outputs: Float[Array, "B *S K"]) -> Float[Array, "B *S"]:
        return gaussians.soft_clip(log_sigma + gain * outputs[..., 1], *LOG_STDDEV_RANGE)

    return _gaussian(2, dict, _unchanged, log_stddev)


def optimal(sigma: float | Float[Array, ""] = 1.0) -> Likelihood:
    """sigma-VAE: N(mean, sigma^2 I), sigma^2 = the mean squared error per dimension of the batch before; `sigma` serves
    the first step.

    Rybkin et al. take the error of the same batch. The batch before differs from it by sampling noise alone, and keeps
    p(x|z) a density of one example: no example sets the sigma by which it is judged.

    Raises:
      ValueError: sigma is a number that is not positive.
    """

    def update(params: Params, step: Int[Array, ""], mse: Float[Array, ""]) -> Params:
        return {"log_stddev": gaussians.soft_clip(0.5 * jnp.log(mse), *LOG_STDDEV_RANGE)}

    return _gaussian(1, _initial(sigma), update, lambda params, outputs: jax.lax.stop_gradient(params["log_stddev"]))


HEADS: dict[str, Callable[..., Likelihood]] = {
    "f": fixed,
    "ls": learned_scalar,
    "lv": learned_vector,
    "optimal": optimal,
}
"""Every head by its short name; each takes its (initial) sigma. The command line and the property tests read this
table."""


def constant(sigma: float) -> Schedule:
    """The schedule that stays at `sigma`."""
    return lambda step: jnp.float32(sigma)


def geometric(init: float, end: float, num_steps: int) -> Schedule:
    """A schedule that decays sigma from `init` at step 0 to `end` at `num_steps` by a constant factor, and stays
    there."""
    return lambda step: init * (end / init) ** jnp.minimum(step / num_steps, 1.0)


def replay(sigmas: Float[Array, " T"]) -> Schedule:
    """The schedule recorded in `sigmas`, one for each step; the last one stays."""
    return lambda step: jnp.take(sigmas, step, mode="clip")


def _gaussian(
    outputs: int,
    init: Callable[[], Params],
    update: Callable[[Params, Int[Array, ""], Float[Array, ""]], Params],
    log_stddev: Callable[[Params, Float[Array, "B *S K"]], Float[Array, "..."]],
) -> Likelihood:
    """The head whose log stddev, of a shape that broadcasts to [B, *S], is `log_stddev(params, outputs)`."""

    def mean(params: Params, outputs: Float[Array, "B *S K"]) -> Float[Array, "B *S"]:
        return outputs[..., 0]

    def stddev(params: Params, outputs: Float[Array, "B *S K"]) -> Float[Array, "B *S"]:
        return jnp.broadcast_to(jnp.exp(log_stddev(params, outputs)), outputs.shape[:-1])

    def log_prob(params: Params, outputs: Float[Array, "B *S K"], x: Float[Array, "B *S"]) -> Float[Array, " B"]:
        return jnp.sum(
            gaussians.log_prob(x, outputs[..., 0], log_stddev(params, outputs)), axis=tuple(range(1, x.ndim))
        )

    def sample(key: Key[Array, ""], params: Params, outputs: Float[Array, "B *S K"]) -> Float[Array, "B *S"]:
        return gaussians.sample(key, outputs[..., 0], log_stddev(params, outputs))

    return Likelihood(outputs, init, update, mean, stddev, log_prob, sample)


def _initial(sigma: float | Float[Array, ""]) -> Callable[[], Params]:
    if isinstance(sigma, int | float) and not 0.0 < sigma < float("inf"):
        raise ValueError(f"sigma must be a positive number, got {sigma}")
    return lambda: _log(sigma)


def _log(sigma: float | Float[Array, ""]) -> Params:
    """A strongly typed log sigma: with a weak type, the second step of training would compile again."""
    return {"log_stddev": jnp.log(jnp.asarray(sigma, jnp.float32))}


def _unchanged(params: Params, step: Int[Array, ""], mse: Float[Array, ""]) -> Params:
    return params
