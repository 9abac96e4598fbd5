"""Observation models p(x|z): Gaussians that differ only in where log sigma comes from, and logistic distributions, as
densities or, for data with grey levels, as probabilities.

Shapes: a decoder gives `outputs` [B, *S, K], K = `Likelihood.outputs` channels for each data dimension of x [B, *S].
  Channel 0 is the mean; channel 1, where there is one, moves the log stddev. Units: sigma has the unit of x; densities
  are in nats, summed over *S and never averaged.

| head | name in the paper | log sigma |
|---|---|---|
| `fixed(0.1)` | F-VAE, F*-VAE | a constant |
| `fixed(schedule)` | F-VAE, external schedule (A.2) | a function of the step, such as those of optax |
| `learned_scalar()` | LS-VAE, Eq. 10 | one free parameter |
| `learned_map(shape)` | | one free parameter for each data dimension |
| `learned_vector()` | LV-VAE, Eq. 11 | a second decoder output for each data dimension |
| `optimal()` | sigma-VAE (Rybkin et al., ICML 2021) | closed form: sigma^2 = mean squared error |
| `logistic()` | | as `learned_vector`, of a logistic distribution |
| `mixture()` | | three decoder outputs for each component, a logistic distribution, of each data dimension |
| `tangent(head, rank=r)` | | as the head's, of the noise beside r correlated directions, which r outputs give |
| `discretised(head)` | | as the head's |
| `rescaled(head)` | | as the head's, for data in other units |
| `masked(head)` | | as the head's, for data with missing values |

The log stddev of `fixed`, `learned_scalar`, `learned_map` and `optimal` lives in the head's parameters, so that one
compiled program serves every sigma.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from lvae_jax import gaussians, logistics, low_rank

Schedule = Callable[[Int[Array, ""]], Float[Array, ""]]
Params = dict[str, Any]

# Learned and closed-form log sigmas, initial values included, are softly clipped to this interval; they are untouched
# from -6.5 to 1.5, sigma from 1.5e-3 to 4.5. Data of another magnitude need `rescaled`. A head's `floor` replaces the
# lower limit, sigma = 9e-4, which lies below the quantisation noise of 8-bit pixels, 1.1e-3.
LOG_STDDEV_RANGE = (-7.0, 2.0)
FLOOR = math.exp(LOG_STDDEV_RANGE[0])


class Family(NamedTuple):
    """A symmetric distribution of one dimension, by elementwise functions of x, mean and log stddev; `gaussians` says
    what each of them is."""

    log_prob: Callable[[Array, Array, Array], Array]
    log_cdf: Callable[[Array, Array, Array], Array]
    log_bin_mass: Callable[[Array, Array, Array], Array]
    sample: Callable[[Key[Array, ""], Array, Array], Array]


GAUSSIAN = Family(gaussians.log_prob, gaussians.log_cdf, gaussians.log_bin_mass, gaussians.sample)
LOGISTIC = Family(logistics.log_prob, logistics.log_cdf, logistics.log_bin_mass, logistics.sample)


class Grid(NamedTuple):
    """The bins of the grey levels k = 0, ..., `last`: k - 1/2 < `scale` x - `offset` < k + 1/2, the first bin open to
    -inf and the last to inf."""

    last: float
    scale: float
    offset: float


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
      log_mass: (params, outputs [B, *S, K], levels k [B, *S], grid) -> [B, *S], the log probability of each dimension's
        level in nats, if the dimensions are independent given z and the head knows it. `discretised` needs it.
      standardise: (params, outputs [B, *S, K], x [B, *S]) -> [B, *S], L^-1 (x - mean), where L L^T is the covariance of
        p(x|z): residuals whose covariance is the identity if x is drawn from it. None if the dimensions are
        uncorrelated given z; then it is (x - mean) / stddev.
      log_each: (params, outputs [B, *S, K], x [B, *S]) -> [B, *S], each dimension's part of log_prob in nats, if the
        dimensions are independent given z. `masked` needs it.
      log_stddev: (params, outputs [B, *S, K]) -> [B, *S], if p(x|z) is a Gaussian and the dimensions are independent
        given z. `tangent` needs it.
      factors: (params, outputs [B, *S, K]) -> U [B, *S, r] of a covariance diag(stddev^2) + U U^T; None without any.
      masked: whether a value of x may be NaN, which is one that is missing.
    """

    outputs: int
    floor: float
    init: Callable[[], Params]
    update: Callable[[Params, Int[Array, ""], Float[Array, ""]], Params]
    mean: Callable[[Params, Float[Array, "B *S K"]], Float[Array, "B *S"]]
    stddev: Callable[[Params, Float[Array, "B *S K"]], Float[Array, "B *S"]]
    log_prob: Callable[[Params, Float[Array, "B *S K"], Float[Array, "B *S"]], Float[Array, " B"]]
    sample: Callable[[Key[Array, ""], Params, Float[Array, "B *S K"]], Float[Array, "B *S"]]
    log_mass: Callable[[Params, Float[Array, "B *S K"], Float[Array, "B *S"], Grid], Float[Array, "B *S"]] | None = None
    standardise: Callable[[Params, Float[Array, "B *S K"], Float[Array, "B *S"]], Float[Array, "B *S"]] | None = None
    log_each: Callable[[Params, Float[Array, "B *S K"], Float[Array, "B *S"]], Float[Array, "B *S"]] | None = None
    log_stddev: Callable[[Params, Float[Array, "B *S K"]], Float[Array, "B *S"]] | None = None
    factors: Callable[[Params, Float[Array, "B *S K"]], Float[Array, "B *S r"]] | None = None
    masked: bool = False


def fixed(sigma: float | Float[Array, "*B"] | Schedule = 1.0) -> Likelihood:
    """F-VAE: N(mean, sigma^2 I), sigma a positive constant, one for each of B examples, or a schedule, a pure function
    of the (traced) step.

    The sigma in force is in the parameters, which `init` gives: `vae.with_likelihood` sets it in a trained model. It
    has no gradient; for that take `learned_scalar`.

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

    def log_stddev(params: Params, outputs: Float[Array, "B *S K"]) -> Float[Array, "..."]:
        given = jax.lax.stop_gradient(params["log_stddev"])
        return given if given.ndim == 0 else given.reshape(-1, *(1,) * (outputs.ndim - 2))

    return _elementwise(GAUSSIAN, 1, 0.0, init, update, log_stddev)


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
    return _elementwise(
        GAUSSIAN, 1, floor, lambda: _log(sigma), _unchanged, lambda params, outputs: clip(params["log_stddev"])
    )


def learned_map(shape: Sequence[int], sigma: float | Float[Array, ""] = 1.0, *, floor: float = FLOOR) -> Likelihood:
    """N(mean, diag sigma^2) with one free log sigma for each dimension of data of this `shape`, the same for all
    examples.

    Its stationary point is sigma_i^2 = v_i, the mean squared error of dimension i. There log p(x|z) exceeds that of
    `learned_scalar` by (n/2) (log mean v - mean log v) nats for the same means.

    Raises:
      ValueError: sigma is a number, or a concrete array, that is not positive, or `floor` is not from 0 to e.
    """
    _check_sigma(sigma)
    clip = _soft_clip(floor)

    def init() -> Params:
        return jax.tree.map(lambda leaf: jnp.full(tuple(shape), leaf), _log(sigma))

    return _elementwise(GAUSSIAN, 1, floor, init, _unchanged, lambda params, outputs: clip(params["log_stddev"])[None])


def learned_vector(
    sigma: float | Float[Array, ""] = 1.0,
    *,
    gain: float = 1.0,
    floor: float = FLOOR,
    balance: Schedule | None = None,
    ramp: Schedule | None = None,
    family: Family = GAUSSIAN,
) -> Likelihood:
    """LV-VAE (Eq. 11): N(mean, diag sigma^2), log sigma = log `sigma` + `gain` * d, d the decoder's second channel.

    The gradient of log p(x|z) weighs the error of dimension i by 1 / sigma_i^2. An eager log sigma settles on the
    spread of the data before the mean has found them; then the dimensions with a large sigma, those that are left to
    encode, have next to no weight, and the model explains them by variance. Three options act against that. None
    changes the value of log_prob, and where `balance` has come to 0 and `ramp` to 1, neither changes a gradient.

    Args:
      gain: the speed of log sigma against the mean; 1 is the plain network's.
      balance: a schedule of b >= 0. The gradient of dimension i is weighted by sigma_i^2b, divided by the mean of that
        over the example's dimensions. At b = 1 all errors weigh the same, as in an LS-VAE. Without the division these
        are the weights of Seitzer et al., On the pitfalls of heteroscedastic uncertainty estimation, ICLR 2022. A
        `discretised` head leaves the weights out.
      ramp: a schedule r, from 0 to 1, of a warm start: log sigma = s + r * gain * d, where s is a free parameter that
        starts at log `sigma`. At r = 0 this is the LS-VAE.
      family: GAUSSIAN or LOGISTIC.

    Raises:
      ValueError: sigma is a number, or a concrete array, that is not positive, or `floor` is not from 0 to e.
    """
    _check_sigma(sigma)
    clip, start = _soft_clip(floor), _log(sigma)
    schedules = {name: value for name, value in {"balance": balance, "ramp": ramp}.items() if value is not None}

    def init() -> Params:
        return update({} if ramp is None else start, jnp.zeros((), jnp.int32), jnp.zeros(()))

    def update(params: Params, step: Int[Array, ""], mse: Float[Array, ""]) -> Params:
        return params | {name: jnp.asarray(schedule(step), jnp.float32) for name, schedule in schedules.items()}

    def log_stddev(params: Params, outputs: Float[Array, "B *S K"]) -> Float[Array, "B *S"]:
        deviation = gain * outputs[..., 1]
        if ramp is not None:
            # A schedule lives in the parameters, so that checkpoints keep it; no gradient may move it.
            deviation = jax.lax.stop_gradient(params["ramp"]) * deviation
        return clip((start | params)["log_stddev"] + deviation)

    return _elementwise(family, 2, floor, init, update, log_stddev)


def logistic(sigma: float | Float[Array, ""] = 1.0, **options: Any) -> Likelihood:
    """`learned_vector`, whose options it takes, of logistic distributions: a sharper peak and longer tails than a
    Gaussian of the same stddev, sigma. Kingma et al. (Improved variational inference with inverse autoregressive flow,
    NeurIPS 2016) discretise it for 8-bit images.

    Raises:
      ValueError: as `learned_vector` says.
    """
    return learned_vector(sigma, family=LOGISTIC, **options)


def mixture(
    sigma: float | Float[Array, ""] = 1.0, *, num_components: int = 5, gain: float = 1.0, floor: float = FLOOR
) -> Likelihood:
    """A mixture of K = `num_components` logistic distributions for each dimension (Salimans et al., PixelCNN++, ICLR
    2017). Of the decoder's 3K channels the first K move the components' means, the next K, times `gain`, their log
    stddevs, and the last K are the logits of their weights.

    Where all channels are 0, the components have the stddev `sigma` and means from -sigma to sigma.

    Raises:
      ValueError: sigma is a number, or a concrete array, that is not positive, `floor` is not from 0 to e, or
        num_components is below 1.
    """
    _check_sigma(sigma)
    if num_components < 1:
        raise ValueError(f"num_components must be at least 1, got {num_components}")
    clip, log_sigma = _soft_clip(floor), _log(sigma)["log_stddev"]
    # Components that start alike would have the same gradients, and stay alike.
    spread = np.linspace(-1.0, 1.0, num_components) if num_components > 1 else np.zeros(1)

    def components(outputs: Float[Array, "B *S K"]) -> tuple[Array, Array, Array]:
        """Means, log stddevs and log weights of the components, [B, *S, K] each."""
        moves, deviations, logits = jnp.split(outputs, 3, axis=-1)
        means = moves + jnp.exp(log_sigma) * spread.reshape([1] * (moves.ndim - 1) + [-1])
        return means, clip(log_sigma + gain * deviations), jax.nn.log_softmax(logits)

    def mean(params: Params, outputs: Float[Array, "B *S K"]) -> Float[Array, "B *S"]:
        means, _, log_weights = components(outputs)
        return jnp.sum(jnp.exp(log_weights) * means, axis=-1)

    def stddev(params: Params, outputs: Float[Array, "B *S K"]) -> Float[Array, "B *S"]:
        means, log_stddevs, log_weights = components(outputs)
        # Law of total variance: within the components, and between their means.
        gaps = means - mean(params, outputs)[..., None]
        return jnp.sqrt(jnp.sum(jnp.exp(log_weights) * (jnp.exp(2.0 * log_stddevs) + gaps**2), axis=-1))

    def log_each(params: Params, outputs: Float[Array, "B *S K"], x: Float[Array, "B *S"]) -> Float[Array, "B *S"]:
        means, log_stddevs, log_weights = components(outputs)
        return jax.nn.logsumexp(log_weights + LOGISTIC.log_prob(x[..., None], means, log_stddevs), axis=-1)

    def sample(key: Key[Array, ""], params: Params, outputs: Float[Array, "B *S K"]) -> Float[Array, "B *S"]:
        means, log_stddevs, log_weights = components(outputs)
        choice_key, noise_key = jax.random.split(key)
        choice = jax.random.categorical(choice_key, log_weights)[..., None]
        chosen = (jnp.take_along_axis(value, choice, axis=-1)[..., 0] for value in (means, log_stddevs))
        return LOGISTIC.sample(noise_key, *chosen)

    def log_mass(
        params: Params, outputs: Float[Array, "B *S K"], k: Float[Array, "B *S"], grid: Grid
    ) -> Float[Array, "B *S"]:
        means, log_stddevs, log_weights = components(outputs)
        return jax.nn.logsumexp(log_weights + _log_mass(LOGISTIC, k[..., None], means, log_stddevs, grid), axis=-1)

    return Likelihood(
        3 * num_components, floor, dict, _unchanged, mean, stddev, _summed(log_each), sample, log_mass, None, log_each
    )


def tangent(likelihood: Likelihood, *, rank: int, ramp: Schedule | None = None) -> Likelihood:
    """N(mean, diag(stddev^2) + U U^T): the Gaussian head `likelihood` beside U, [*S, r] with r = `rank`, of the r last
    outputs of the decoder. The columns of U can be the tangents of the data manifold at z, along which the data vary.

    It is the integral over e ~ N(0, I) of N(mean + U e, diag stddev^2): e is r more latent dimensions, in which the
    decoder is linear, with their exact posterior. So no limit of ideal networks moves: that of a model with a `fixed`
    sigma is still `theory.best_elbo`, or `toy.best_elbo`. For linear networks it is `theory.linear_best_elbo` with r
    more latent dimensions; how z and e share the work is then left open, and KL and U mean nothing by themselves.

    A column grows only where the residuals vary by more than the head's variance, and only from a start that is not
    zero, as that of `networks`. It needs no encoder, so that it wins against z where both could learn a direction.

    stddev is that of each dimension, sqrt(stddev^2 + sum of U^2). The balance of a `learned_vector` is left out.

    Args:
      ramp: a schedule r, from 0 to 1, by which U is multiplied: as that of `learned_vector`, first z, then U.

    Raises:
      ValueError: `rank` is below 0, or the head has no `log_stddev`.
    """
    if rank < 0:
        raise ValueError(f"rank must be at least 0, got {rank}")
    if likelihood.log_stddev is None:
        raise ValueError("this head has no log_stddev: give a Gaussian one whose dimensions are independent given z")
    log_stddev = likelihood.log_stddev

    def ramped(step: Int[Array, ""]) -> Params:
        return {} if ramp is None else {"tangent_ramp": jnp.asarray(ramp(step), jnp.float32)}

    def init() -> Params:
        return likelihood.init() | ramped(jnp.zeros((), jnp.int32))

    def update(params: Params, step: Int[Array, ""], mse: Float[Array, ""]) -> Params:
        return likelihood.update(params, step, mse) | ramped(step)

    def gaussian(params: Params, outputs: Float[Array, "B *S K"]) -> tuple[Array, Array, Array]:
        own, factors = outputs[..., : likelihood.outputs], outputs[..., likelihood.outputs :]
        if ramp is not None:
            factors = jax.lax.stop_gradient(params["tangent_ramp"]) * factors
        return likelihood.mean(params, own), log_stddev(params, own), factors

    def mean(params: Params, outputs: Float[Array, "B *S K"]) -> Float[Array, "B *S"]:
        return likelihood.mean(params, outputs[..., : likelihood.outputs])

    def stddev(params: Params, outputs: Float[Array, "B *S K"]) -> Float[Array, "B *S"]:
        return low_rank.stddev(*gaussian(params, outputs)[1:])

    def log_prob(params: Params, outputs: Float[Array, "B *S K"], x: Float[Array, "B *S"]) -> Float[Array, " B"]:
        return jax.vmap(low_rank.log_prob)(x, *gaussian(params, outputs))

    def sample(key: Key[Array, ""], params: Params, outputs: Float[Array, "B *S K"]) -> Float[Array, "B *S"]:
        return jax.vmap(low_rank.sample)(jax.random.split(key, len(outputs)), *gaussian(params, outputs))

    def standardise(params: Params, outputs: Float[Array, "B *S K"], x: Float[Array, "B *S"]) -> Float[Array, "B *S"]:
        return jax.vmap(low_rank.standardise)(x, *gaussian(params, outputs))

    return Likelihood(
        outputs=likelihood.outputs + rank,
        floor=likelihood.floor,
        init=init,
        update=update,
        mean=mean,
        stddev=stddev,
        log_prob=log_prob,
        sample=sample,
        standardise=standardise,
        factors=lambda params, outputs: gaussian(params, outputs)[2],
    )


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
        # The clip also catches log 0, where reconstructions are exact.
        # The type of the state must not change with that of the data: a scan would refuse it.
        return {"log_stddev": jnp.asarray(clip(0.5 * jnp.log(mse)), jnp.float32)}

    return _elementwise(
        GAUSSIAN, 1, floor, init, update, lambda params, outputs: jax.lax.stop_gradient(params["log_stddev"])
    )


def quantisation_noise(levels: int = 256) -> float:
    """The stddev of the rounding error of pixels k / (levels - 1) on [0, 1], which is uniform over one bin: 1.1e-3 for
    8-bit pixels.

    A smaller sigma claims to know more than the data hold. As the `floor` of a density on images it keeps that claim
    out of the ELBO.

    Raises:
      ValueError: `levels` is below 2.
    """
    return 1.0 / (_last_level(levels) * math.sqrt(12.0))


def discretised(likelihood: Likelihood, *, levels: int = 256, dequantised: bool = False) -> Likelihood:
    """The head `likelihood` as a distribution over the grey levels k = 0, ..., L - 1 of pixels, L = `levels`: P(k) is
    its mass on the bin of level k. The first and the last bin are open to -inf and inf, so that the probabilities sum
    to one.

    Pixels are x = k / (L - 1), each in the middle of its bin of width 1 / (L - 1); or, if the head is of data that were
    `dequantised`, x in [k / L, (k + 1) / L), which is the bin.

    >>> head = discretised(fixed(0.1), levels=17)
    >>> outputs, x = jnp.full((17, 1, 1), 0.2), jnp.linspace(0.0, 1.0, 17)[:, None]
    >>> round(float(jnp.exp(head.log_prob(head.init(), outputs, x)).sum()), 5)
    1.0

    log_prob takes any other x for the nearest level. It is never above 0: minus log_prob is the length of a code for
    the image, in nats, and a density has no such limit. The draws of `sample` are on the grid and have no gradients.
    mean is the head's, clipped to [0, 1], because that of a black or a white pixel may lie anywhere. stddev is that
    of the head before rounding. `optimal` remains the optimum of the density; if sigma is well above a bin, it is
    the optimum of the probabilities as well.

    Raises:
      ValueError: `levels` is below 2, or the head has no `log_mass`.
    """
    last = _last_level(levels)
    grid = Grid(last, float(levels), 0.5) if dequantised else Grid(last, last, 0.0)
    if likelihood.log_mass is None:
        raise ValueError(
            "this head has no log_mass, the log probability of each dimension's grey level: give it one, or train on "
            "dequantised images (--dequantize)"
        )
    log_mass = likelihood.log_mass

    def mean(params: Params, outputs: Float[Array, "B *S K"]) -> Float[Array, "B *S"]:
        return jnp.clip(likelihood.mean(params, outputs), 0.0, 1.0)

    def level(x: Float[Array, "B *S"]) -> Float[Array, "B *S"]:
        return jnp.clip(jnp.floor(grid.scale * x - (grid.offset - 0.5)), 0.0, grid.last)

    def log_each(params: Params, outputs: Float[Array, "B *S K"], x: Float[Array, "B *S"]) -> Float[Array, "B *S"]:
        return log_mass(params, outputs, level(x), grid)

    def sample(key: Key[Array, ""], params: Params, outputs: Float[Array, "B *S K"]) -> Float[Array, "B *S"]:
        return (level(likelihood.sample(key, params, outputs)) + grid.offset) / grid.scale

    return likelihood._replace(mean=mean, log_prob=_summed(log_each), sample=sample, log_each=log_each, log_stddev=None)


def rescaled(likelihood: Likelihood, *, centre: Float[np.ndarray, "*S"] | float, scale: float) -> Likelihood:
    """The head of data x = `centre` + `scale` x', where `likelihood` is that of x'. Its sigmas, and so those that it is
    given, are in units of x': they are `scale` times as large here, and densities are n log `scale` nats lower, n the
    number of dimensions.

    The limits of learned sigmas, `LOG_STDDEV_RANGE`, suit data of about unit stddev; this makes them suit any.

    Raises:
      ValueError: `scale` is not a positive number, or the head is `masked`.
    """
    if not 0.0 < scale < math.inf:
        raise ValueError(f"scale must be a positive number, got {scale}")
    if likelihood.masked:
        raise ValueError("put masked round the rescaled head: values that are missing have no scale")
    middle = jnp.asarray(centre, jnp.float32)[None]

    def inner(x: Float[Array, "B *S"]) -> Float[Array, "B *S"]:
        return (x - middle) / scale

    def log_prob(params: Params, outputs: Float[Array, "B *S K"], x: Float[Array, "B *S"]) -> Float[Array, " B"]:
        return likelihood.log_prob(params, outputs, inner(x)) - math.prod(x.shape[1:]) * math.log(scale)

    each, standardise, each_stddev = likelihood.log_each, likelihood.standardise, likelihood.log_stddev
    factors = likelihood.factors
    return likelihood._replace(
        floor=scale * likelihood.floor,
        update=lambda params, step, mse: likelihood.update(params, step, mse / scale**2),
        mean=lambda params, outputs: middle + scale * likelihood.mean(params, outputs),
        stddev=lambda params, outputs: scale * likelihood.stddev(params, outputs),
        log_prob=log_prob,
        sample=lambda key, params, outputs: middle + scale * likelihood.sample(key, params, outputs),
        log_each=each and (lambda params, outputs, x: each(params, outputs, inner(x)) - math.log(scale)),
        log_mass=None,  # of grey levels, which other units do not have
        log_stddev=each_stddev and (lambda params, outputs: each_stddev(params, outputs) + math.log(scale)),
        standardise=standardise and (lambda params, outputs, x: standardise(params, outputs, inner(x))),
        factors=factors and (lambda params, outputs: scale * factors(params, outputs)),
    )


def masked(likelihood: Likelihood) -> Likelihood:
    """The head `likelihood` for data with missing values, which are NaN in x: log_prob leaves them out. It is the
    marginal density, or probability, of the values that were observed, given z.

    Put it round all other heads: `masked(discretised(head))`. `vae.masked` also gives an encoder such data.

    >>> head = masked(fixed(0.1))
    >>> outputs, x = jnp.zeros((2, 2, 1)), jnp.array([[0.0, jnp.nan], [0.0, 0.1]])
    >>> [round(float(log_prob), 3) for log_prob in head.log_prob(head.init(), outputs, x)]
    [1.384, 2.267]

    Raises:
      ValueError: the head has no `log_each`.
    """
    each = likelihood.log_each
    if each is None:
        raise ValueError("this head has no log_each, the log density of each dimension: give it one")

    def log_each(params: Params, outputs: Float[Array, "B *S K"], x: Float[Array, "B *S"]) -> Float[Array, "B *S"]:
        missing = jnp.isnan(x)
        # Filled before and after: the gradient of what is not taken must be finite as well.
        return jnp.where(missing, 0.0, each(params, outputs, jnp.where(missing, likelihood.mean(params, outputs), x)))

    return likelihood._replace(
        log_prob=_summed(log_each), log_each=log_each, log_mass=None, log_stddev=None, masked=True
    )


HEADS: dict[str, Callable[..., Likelihood]] = {
    "f": fixed,
    "ls": learned_scalar,
    "lv": learned_vector,
    "optimal": optimal,
    "logistic": logistic,
    "mixture": mixture,
}
"""Every head that needs nothing but its (initial) sigma, by its short name; each can be `discretised`. The property
tests read this table."""


def replay(sigmas: Float[Array, " T"]) -> Schedule:
    """The schedule recorded in `sigmas`, one for each step; the last one stays.

    Raises:
      ValueError: `sigmas` is a concrete array, and one of them is not positive.
    """
    _check_sigma(sigmas)
    return lambda step: jnp.take(sigmas, step, mode="clip")


def _elementwise(
    family: Family,
    outputs: int,
    floor: float,
    init: Callable[[], Params],
    update: Callable[[Params, Int[Array, ""], Float[Array, ""]], Params],
    log_stddev: Callable[[Params, Float[Array, "B *S K"]], Float[Array, "..."]],
) -> Likelihood:
    """The head of this family whose log stddev, of a shape that broadcasts to [B, *S], is `log_stddev(params,
    outputs)`. A parameter called balance is the exponent b of the weights of `learned_vector`."""

    def mean(params: Params, outputs: Float[Array, "B *S K"]) -> Float[Array, "B *S"]:
        return outputs[..., 0]

    def full_log_stddev(params: Params, outputs: Float[Array, "B *S K"]) -> Float[Array, "B *S"]:
        return jnp.broadcast_to(log_stddev(params, outputs), outputs.shape[:-1])

    def stddev(params: Params, outputs: Float[Array, "B *S K"]) -> Float[Array, "B *S"]:
        return jnp.broadcast_to(jnp.exp(log_stddev(params, outputs)), outputs.shape[:-1])

    def log_each(params: Params, outputs: Float[Array, "B *S K"], x: Float[Array, "B *S"]) -> Float[Array, "B *S"]:
        log_sigma, axes = log_stddev(params, outputs), tuple(range(1, x.ndim))
        each = family.log_prob(x, outputs[..., 0], log_sigma)
        if "balance" in params:
            weights = math.prod(x.shape[1:]) * jax.nn.softmax(2.0 * params["balance"] * log_sigma, axis=axes)
            extra = jax.lax.stop_gradient(weights - 1.0) * each
            each = each + (extra - jax.lax.stop_gradient(extra))  # adds 0, and the gradient of `extra`
        return each

    def sample(key: Key[Array, ""], params: Params, outputs: Float[Array, "B *S K"]) -> Float[Array, "B *S"]:
        return family.sample(key, outputs[..., 0], log_stddev(params, outputs))

    def log_mass(
        params: Params, outputs: Float[Array, "B *S K"], k: Float[Array, "B *S"], grid: Grid
    ) -> Float[Array, "B *S"]:
        return _log_mass(family, k, outputs[..., 0], log_stddev(params, outputs), grid)

    return Likelihood(
        outputs=outputs,
        floor=floor,
        init=init,
        update=update,
        mean=mean,
        stddev=stddev,
        log_prob=_summed(log_each),
        sample=sample,
        log_mass=log_mass,
        log_each=log_each,
        log_stddev=full_log_stddev if family is GAUSSIAN else None,
    )


def _log_mass(family: Family, k: Array, mean: Array, log_stddev: Array, grid: Grid) -> Array:
    """The log probability of the levels k of a distribution of this family, elementwise."""
    # In units of the bins' width, in which the bins tile the line without gaps in float32 too.
    centre, log_width = grid.scale * mean - grid.offset, log_stddev + math.log(grid.scale)
    first, last = k == 0.0, k == grid.last
    # P(X > 254.5) = P(-X < -254.5): one cdf serves both ends.
    end = family.log_cdf(jnp.where(last, 0.5 - grid.last, 0.5), jnp.where(last, -centre, centre), log_width)
    return jnp.where(first | last, end, family.log_bin_mass(k, centre, log_width))


def _summed(
    log_each: Callable[[Params, Float[Array, "B *S K"], Float[Array, "B *S"]], Float[Array, "B *S"]],
) -> Callable[[Params, Float[Array, "B *S K"], Float[Array, "B *S"]], Float[Array, " B"]]:
    """log_prob of dimensions that are independent given z."""

    def log_prob(params: Params, outputs: Float[Array, "B *S K"], x: Float[Array, "B *S"]) -> Float[Array, " B"]:
        return jnp.sum(log_each(params, outputs, x), axis=tuple(range(1, x.ndim)))

    return log_prob


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


def _log(sigma: float | Float[Array, "..."]) -> Params:
    """A strongly typed log sigma: with a weak type, the second step of training would compile again."""
    return {"log_stddev": jnp.log(jnp.asarray(sigma, jnp.float32))}


def _unchanged(params: Params, step: Int[Array, ""], mse: Float[Array, ""]) -> Params:
    return params
