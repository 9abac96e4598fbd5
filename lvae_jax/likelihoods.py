"""Observation models p(x|z): isotropic or diagonal Gaussians that differ only in where log sigma comes from, as
densities or, for images with grey levels, as probabilities.

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
| `discretised(head)` | | as the head's |

The log stddev of `fixed`, `learned_scalar` and `optimal` lives in the head's parameters, so that one compiled program
serves every sigma.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from lvae_jax import gaussians

Schedule = Callable[[Int[Array, ""]], Float[Array, ""]]
Params = dict[str, Any]

# Learned and closed-form log sigmas, initial values included, are softly clipped to this interval; they are untouched
# from -6.5 to 1.5, sigma from 1.5e-3 to 4.5. Scale data of another magnitude first. A head's `floor` replaces the lower
# limit, sigma = 9e-4, which lies below the quantisation noise of 8-bit pixels, 1.1e-3.
LOG_STDDEV_RANGE = (-7.0, 2.0)
FLOOR = math.exp(LOG_STDDEV_RANGE[0])

GAIN = 0.03  # of `learned_vector`


class Likelihood(NamedTuple):
    """An observation model as pure functions of its parameters and of the decoder's outputs.

    Attributes:
      outputs: decoder channels for each data dimension, K.
      floor: the limit below which no learned or closed-form sigma goes; 0 where sigma is given.
      init: () -> params, a (possibly empty) dict of arrays.
      update: (params, step, mse) -> params in force at `step`, given the mean squared error per dimension of the batch
        before it. What gradients do not set is set here: a schedule, or a closed form. The identity for all other
        heads.
      mean: (params, outputs [B, *S, K]) -> [B, *S].
      stddev: (params, outputs [B, *S, K]) -> [B, *S].
      log_prob: (params, outputs [B, *S, K], x [B, *S]) -> [B], log p(x|z) in nats, the full density; of a discretised
        head, the probability.
      sample: (key, params, outputs [B, *S, K]) -> [B, *S], a draw from p(x|z).
    """

    outputs: int
    floor: float
    init: Callable[[], Params]
    update: Callable[[Params, Int[Array, ""], Float[Array, ""]], Params]
    mean: Callable[[Params, Float[Array, "B *S K"]], Float[Array, "B *S"]]
    stddev: Callable[[Params, Float[Array, "B *S K"]], Float[Array, "B *S"]]
    log_prob: Callable[[Params, Float[Array, "B *S K"], Float[Array, "B *S"]], Float[Array, " B"]]
    sample: Callable[[Key[Array, ""], Params, Float[Array, "B *S K"]], Float[Array, "B *S"]]


def fixed(sigma: float | Float[Array, ""] | Schedule = 1.0) -> Likelihood:
    """F-VAE: N(mean, sigma^2 I), sigma a positive constant or a schedule, a pure function of the (traced) step.

    Raises:
      ValueError: sigma is a number, or a concrete array, that is not positive.
    """
    if callable(sigma):

        def init() -> Params:
            return _log(sigma(jnp.zeros((), jnp.int32)))

        def update(params: Params, step: Int[Array, ""], mse: Float[Array, ""]) -> Params:
            return _log(sigma(step))
    else:
        _check_sigma(sigma)
        init, update = lambda: _log(sigma), _unchanged
    return _gaussian(1, 0.0, init, update, lambda params, outputs: jax.lax.stop_gradient(params["log_stddev"]))


def learned_scalar(sigma: float | Float[Array, ""] = 1.0, *, floor: float = FLOOR) -> Likelihood:
    """LS-VAE (Eq. 10): N(mean, sigma^2 I), log sigma one free parameter that starts at log `sigma`.

    Its stationary point is sigma^2 = mean squared error per dimension.

    >>> head = learned_scalar(0.1)
    >>> outputs, x = jnp.zeros((1, 2, head.outputs)), jnp.array([[0.0, 0.1]])
    >>> log_prob = head.log_prob(head.init(), outputs, x)
    >>> round(float(log_prob[0]), 3)  # positive, as that of a sharp density may be
    2.267

    Raises:
      ValueError: sigma is a number, or a concrete array, that is not positive, or `floor` is not from 0 to e.
    """
    _check_sigma(sigma)
    clip = _soft_clip(floor)
    return _gaussian(1, floor, lambda: _log(sigma), _unchanged, lambda params, outputs: clip(params["log_stddev"]))


def learned_vector(sigma: float | Float[Array, ""] = 1.0, *, gain: float = GAIN, floor: float = FLOOR) -> Likelihood:
    """LV-VAE (Eq. 11): N(mean, diag sigma^2), log sigma = log `sigma` + `gain` * the decoder's second channel.

    `gain` sets how fast log sigma learns against the mean. Where few dimensions carry all the data, an eager log sigma
    settles on their spread before the mean has found them; there sigma is critical, the gradient that would encode
    them vanishes, and some runs never leave. A gain well below 1, the plain network's, prevents that, at the price of a
    slower sigma.

    Raises:
      ValueError: sigma is a number, or a concrete array, that is not positive, or `floor` is not from 0 to e.
    """
    _check_sigma(sigma)
    clip, log_sigma = _soft_clip(floor), _log(sigma)["log_stddev"]
    return _gaussian(2, floor, dict, _unchanged, lambda params, outputs: clip(log_sigma + gain * outputs[..., 1]))


def optimal(sigma: float | Float[Array, ""] = 1.0, *, floor: float = FLOOR) -> Likelihood:
    """sigma-VAE: N(mean, sigma^2 I), sigma^2 = the mean squared error per dimension of the batch before; `sigma` serves
    the first step.

    Rybkin et al. take the error of the same batch. The batch before differs from it by sampling noise alone, and keeps
    p(x|z) a density of one example: no example sets the sigma by which it is judged.

    Raises:
      ValueError: sigma is a number, or a concrete array, that is not positive, or `floor` is not from 0 to e.
    """
    _check_sigma(sigma)
    clip = _soft_clip(floor)

    def init() -> Params:
        return jax.tree.map(clip, _log(sigma))

    def update(params: Params, step: Int[Array, ""], mse: Float[Array, ""]) -> Params:
        return {"log_stddev": clip(0.5 * jnp.log(mse))}

    return _gaussian(1, floor, init, update, lambda params, outputs: jax.lax.stop_gradient(params["log_stddev"]))


def quantisation_noise(levels: int = 256) -> float:
    """The stddev of the rounding error of pixels k / (levels - 1) on [0, 1], which is uniform over one bin: 1.1e-3 for
    8-bit pixels.

    A smaller sigma claims to know more than the data hold. As the `floor` of a density on images it keeps that claim
    out of the ELBO.

    Raises:
      ValueError: `levels` is below 2.
    """
    return 1.0 / (_last_level(levels) * math.sqrt(12.0))


def discretised(likelihood: Likelihood, *, levels: int = 256) -> Likelihood:
    """The Gaussian `likelihood` as a distribution over the grey levels k = 0, ..., `levels` - 1 of pixels x = k /
    (levels - 1): P(k) is its mass on the bin of width 1 / (levels - 1) around x. The first and the last bin are open to
    -inf and inf, so that the probabilities sum to one.

    >>> head = discretised(fixed(0.1), levels=17)
    >>> outputs, x = jnp.full((17, 1, 1), 0.2), jnp.linspace(0.0, 1.0, 17)[:, None]
    >>> round(float(jnp.exp(head.log_prob(head.init(), outputs, x)).sum()), 5)
    1.0

    log_prob takes any other x for the nearest level. It is never above 0: minus log_prob is the length of a code for
    the image, in nats, and a density has no such limit. The draws of `sample` are on the grid and have no gradients.
    mean is the Gaussian's, clipped to [0, 1], because that of a black or a white pixel may lie anywhere. stddev is that
    of the Gaussian before rounding. `optimal` remains the optimum of the density; if sigma is well above a bin, it is
    the optimum of the probabilities as well.

    Raises:
      ValueError: `levels` is below 2.
    """
    last_level = _last_level(levels)

    def mean(params: Params, outputs: Float[Array, "B *S K"]) -> Float[Array, "B *S"]:
        return jnp.clip(likelihood.mean(params, outputs), 0.0, 1.0)

    def log_prob(params: Params, outputs: Float[Array, "B *S K"], x: Float[Array, "B *S"]) -> Float[Array, " B"]:
        # In units of the bins' width, in which the bins tile the line without gaps in float32 too.
        k = jnp.clip(jnp.round(last_level * x), 0.0, last_level)
        centre = last_level * likelihood.mean(params, outputs)
        log_stddev = jnp.log(last_level * likelihood.stddev(params, outputs))
        first, last = k == 0.0, k == last_level
        # P(X > 254.5) = P(-X < -254.5): one cdf serves both ends.
        end = gaussians.log_cdf(jnp.where(last, 0.5 - last_level, 0.5), jnp.where(last, -centre, centre), log_stddev)
        mass = jnp.where(first | last, end, gaussians.log_bin_mass(k, centre, log_stddev))
        return jnp.sum(mass, axis=tuple(range(1, x.ndim)))

    def sample(key: Key[Array, ""], params: Params, outputs: Float[Array, "B *S K"]) -> Float[Array, "B *S"]:
        return jnp.clip(jnp.round(last_level * likelihood.sample(key, params, outputs)), 0.0, last_level) / last_level

    return likelihood._replace(mean=mean, log_prob=log_prob, sample=sample)


HEADS: dict[str, Callable[..., Likelihood]] = {
    "f": fixed,
    "ls": learned_scalar,
    "lv": learned_vector,
    "optimal": optimal,
}
"""Every head by its short name; each takes its (initial) sigma, and can be `discretised`. The command line and the
property tests read this table."""


def constant(sigma: float) -> Schedule:
    """The schedule that stays at `sigma`.

    Raises:
      ValueError: sigma is not positive.
    """
    _check_sigma(sigma)
    return lambda step: jnp.float32(sigma)


def geometric(init: float, end: float, num_steps: int) -> Schedule:
    """A schedule that decays sigma from `init` at step 0 to `end` at `num_steps` by a constant factor, and stays
    there.

    >>> sigma = geometric(1.0, 0.01, 100)
    >>> [round(float(sigma(jnp.int32(step))), 4) for step in (0, 50, 100, 500)]
    [1.0, 0.1, 0.01, 0.01]

    Raises:
      ValueError: `init`, `end` or `num_steps` is not positive.
    """
    _check_sigma(init)
    _check_sigma(end)
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    return lambda step: init * (end / init) ** jnp.minimum(step / num_steps, 1.0)


def replay(sigmas: Float[Array, " T"]) -> Schedule:
    """The schedule recorded in `sigmas`, one for each step; the last one stays.

    Raises:
      ValueError: `sigmas` is a concrete array, and one of them is not positive.
    """
    _check_sigma(sigmas)
    return lambda step: jnp.take(sigmas, step, mode="clip")


def _gaussian(
    outputs: int,
    floor: float,
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

    return Likelihood(outputs, floor, init, update, mean, stddev, log_prob, sample)


def _last_level(levels: int) -> float:
    if levels < 2:
        raise ValueError(f"levels must be at least 2, got {levels}")
    return float(levels - 1)


def _check_sigma(sigma: float | Float[Array, "..."]) -> None:
    if isinstance(sigma, jax.core.Tracer):
        return
    values = np.asarray(sigma).ravel()
    with np.errstate(over="ignore", under="ignore"):
        in_float32 = values.astype(np.float32)
    wrong = values[~((in_float32 > 0.0) & (in_float32 < np.inf))]
    if len(wrong):
        raise ValueError(f"sigma must be a positive number, got {wrong[0]}")


def _soft_clip(floor: float) -> Callable[[Float[Array, "..."]], Float[Array, "..."]]:
    high = LOG_STDDEV_RANGE[1]
    if not 0.0 < floor < math.exp(high - 1.0):  # a softness of 1/2 at either end
        raise ValueError(f"floor must be a positive sigma below {math.exp(high - 1.0):.3g}, got {floor}")
    return lambda log_stddev: gaussians.soft_clip(log_stddev, math.log(floor), high)


def _log(sigma: float | Float[Array, ""]) -> Params:
    """A strongly typed log sigma: with a weak type, the second step of training would compile again."""
    return {"log_stddev": jnp.log(jnp.asarray(sigma, jnp.float32))}


def _unchanged(params: Params, step: Int[Array, ""], mse: Float[Array, ""]) -> Params:
    return params
