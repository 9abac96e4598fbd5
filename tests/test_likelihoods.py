import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from scipy import special, stats

from examples import bring_your_own
from lvae_jax import gaussians, likelihoods
from lvae_jax.likelihoods import HEADS

KEY = jax.random.key(0)
MSE = jnp.float32(0.04)
SHAPE = (3, 4, 1)
MAP = functools.partial(likelihoods.learned_map, SHAPE)  # a head for data of this shape only

# Every property that takes `make` is one of all heads: a new row of HEADS inherits it, as a density, discretised, or
# both.
DISCRETISED = {
    f"discretised {name}": lambda sigma=1.0, make=make: likelihoods.discretised(make(sigma))
    for name, make in HEADS.items()
}
every_head = pytest.mark.parametrize("make", [*HEADS.values(), *DISCRETISED.values()], ids=[*HEADS, *DISCRETISED])
every_density = pytest.mark.parametrize("make", HEADS.values(), ids=HEADS)
every_discretised = pytest.mark.parametrize("make", DISCRETISED.values(), ids=DISCRETISED)


def heads_named(*names):
    return pytest.mark.parametrize("make", [HEADS[name] for name in names], ids=names)


scalar_heads = heads_named("ls", "optimal")
DENSITIES = dict(zip(DISCRETISED.values(), HEADS.values(), strict=True))  # what each discretised head makes discrete


def channels(head):
    """How many of the K channels are means; where those that move a log sigma lie."""
    num_means = max(1, head.outputs // 3)
    return num_means, slice(num_means, 2 * num_means if head.outputs > 2 else None)


def outputs_for(head, *shape):
    """Decoder outputs [*shape, K]: means of order one, and further channels that move a log sigma by half a nat."""
    outputs = np.random.default_rng(7).normal(size=(*shape, head.outputs))
    outputs[..., 1:] *= 0.5
    return jnp.array(outputs, jnp.float32)


def outputs_at(head, means, deviation=0.0):
    """Decoder outputs [*S, K]: these means [*S], for all components, and log sigmas moved by `deviation`."""
    num_means, log_sigmas = channels(head)
    outputs = jnp.zeros((*np.shape(means), head.outputs)).at[..., log_sigmas].set(deviation)
    return outputs.at[..., :num_means].set(np.float32(means)[..., None])


class Reference(NamedTuple):
    """By scipy, in float64: the mixture of distributions of one family whose components lie on the last axis."""

    family: Any
    weights: np.ndarray
    means: np.ndarray
    stddevs: np.ndarray

    def each(self, name, x):
        scale = self.stddevs / self.family.std()
        return getattr(self.family, name)(np.float64(x)[..., None], self.means, scale)

    def log(self, name, x):
        return special.logsumexp(self.each(name, x), b=self.weights, axis=-1)

    def mass(self, low, high):
        """P(low < X < high), by differences on the side of each component's mean where nothing cancels."""
        below = self.each("cdf", high) - self.each("cdf", low)
        above = self.each("sf", low) - self.each("sf", high)
        return np.sum(self.weights * np.where(np.float64(high)[..., None] < self.means, below, above), axis=-1)

    def mass_of_levels(self, k):
        return self.mass(np.where(k == 0, -np.inf, (k - 0.5) / 255.0), np.where(k == 255, np.inf, (k + 0.5) / 255.0))

    def mean(self):
        return np.sum(self.weights * self.means, axis=-1)

    def stddev(self):
        return np.sqrt(np.sum(self.weights * (self.stddevs**2 + self.means**2), axis=-1) - self.mean() ** 2)

    def by_log_sigma(self, log_prob, step=1e-5):
        """The derivative of `log_prob(reference)` by the log sigma of all components, a difference."""
        above, below = (log_prob(self._replace(stddevs=self.stddevs * np.exp(change))) for change in (step, -step))
        return (above - below) / (2.0 * step)


def spread_of(sigma, deviations):
    """sigma exp(deviations), in float64, softly clipped where it leaves e^-6.5 to e^1.5."""
    log_sigma = np.log(sigma) + deviations
    knee = log_sigma.clip(-6.5, 1.5)
    return np.exp(knee + 0.5 * np.sign(log_sigma - knee) * (1.0 - np.exp(-2.0 * abs(log_sigma - knee))))


def reference(make, sigma, outputs):
    """The distribution of each dimension of x of the head `make(sigma)`, or of the one that it makes discrete, as it
    starts."""
    make, outputs, sigma = DENSITIES.get(make, make), np.float64(outputs), float(np.float32(sigma))
    if make is not likelihoods.mixture:
        deviations = outputs[..., 1:] if outputs.shape[-1] > 1 else np.zeros_like(outputs)
        family = stats.logistic if make is likelihoods.logistic else stats.norm
        return Reference(family, np.ones(1), outputs[..., :1], spread_of(sigma, deviations))
    moves, deviations, logits = np.split(outputs, 3, axis=-1)
    means = moves + sigma * np.array([-1.0, -0.5, 0.0, 0.5, 1.0])
    return Reference(stats.logistic, special.softmax(logits, axis=-1), means, spread_of(sigma, deviations))


def start(make, sigma, outputs, x):
    """(log_prob, mean, stddev) of the head `make(sigma)` as it starts. Tests share shapes: each is compiled."""
    head = make(sigma)
    params = head.init()
    return head.log_prob(params, outputs, x), head.mean(params, outputs), head.stddev(params, outputs)


@functools.cache
def gradient_of_log_sigma(make):
    """(sigma, outputs, x) -> d log p(x|z) / d log sigma, summed: by the one parameter, or by the decoder's channels."""

    def gradient(sigma, outputs, x):
        head = make(sigma)
        of_params, of_outputs = jax.grad(lambda *args: head.log_prob(*args, x).sum(), (0, 1))(head.init(), outputs)
        return sum(leaf.sum() for leaf in jax.tree.leaves(of_params)) + of_outputs[..., channels(head)[1]].sum()

    return jax.jit(gradient)


def standard_errors(draws):
    """How many standard errors the mean over the first axis is away from zero; 0 for what is always zero."""
    draws = np.float64(draws)
    return np.abs(draws.mean(0)) / (draws.std(0) / np.sqrt(len(draws)) + 1e-12)


# Densities


@every_density
@pytest.mark.parametrize(("sigma", "shape"), [(0.01, (2,)), (4.0, SHAPE)])
def test_log_prob_is_scipys_summed_over_dimensions(make, sigma, shape):
    outputs = outputs_for(make(), 5, *shape)
    _, mean, stddev = start(make, sigma, outputs, jnp.zeros((5, *shape)))
    assert mean.shape == stddev.shape == (5, *shape)
    x = mean + 2.0 * stddev * np.random.default_rng(8).normal(size=mean.shape).astype(np.float32)
    expected = reference(make, sigma, outputs).log("logpdf", x).sum(tuple(range(1, x.ndim)))
    np.testing.assert_allclose(start(make, sigma, outputs, x)[0], expected, rtol=1e-5, atol=1e-4)


@every_density
def test_density_integrates_to_one(make):
    n = 201 if make is not likelihoods.mixture else 4001  # for components far apart
    outputs = outputs_for(make(), 1, 1).repeat(n, 0)
    _, mean, stddev = start(make, 0.05, outputs, jnp.zeros((n, 1)))
    # The trapezoid rule converges exponentially on a Gaussian and on a logistic distribution.
    x = mean + np.linspace(-10.0, 10.0, n, dtype=np.float32)[:, None] * stddev
    density = np.exp(np.float64(start(make, 0.05, outputs, x)[0]))
    np.testing.assert_allclose(np.trapezoid(density, x[:, 0]), 1.0, rtol=1e-5)


@every_head
def test_mean_and_stddev_are_the_distributions(make):
    outputs = pixel_outputs(make(), 5, *SHAPE)
    expected = reference(make, 0.3, outputs)
    _, mean, stddev = start(make, 0.3, outputs, jnp.zeros((5, *SHAPE)))
    within = (0.0, 1.0) if make in DENSITIES else (-np.inf, np.inf)
    np.testing.assert_allclose(mean, expected.mean().clip(*within), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(stddev, expected.stddev(), rtol=1e-5)


@heads_named("f", "ls", "lv", "optimal", "logistic")
def test_mean_is_the_first_channel(make):
    head = make(0.3)
    outputs = outputs_for(head, 5, *SHAPE)
    np.testing.assert_array_equal(head.mean(head.init(), outputs), outputs[..., 0])


@every_head
def test_stddev_starts_at_sigma(make):
    head = make(0.3)
    outputs = outputs_for(head, 5, *SHAPE)
    # The components' means spread over -sigma, -sigma / 2, ..., sigma, of variance sigma^2 / 2.
    expected = 0.3 * np.sqrt(1.5) if DENSITIES.get(make, make) is likelihoods.mixture else 0.3
    stddev = head.stddev(head.init(), outputs_at(head, outputs[..., 0]))
    np.testing.assert_allclose(stddev, expected, rtol=1e-6)


@heads_named("lv", "logistic")
@pytest.mark.parametrize(("sigma", "gain"), [(0.3, 1.0), (0.3, 0.03), (2.0, 0.5), (0.3, None)])
def test_learned_vector_takes_log_sigma_from_the_second_channel(make, sigma, gain):
    head = make(sigma) if gain is None else make(sigma, gain=gain)
    outputs = outputs_for(head, 5, *SHAPE)
    expected = sigma * np.exp((1.0 if gain is None else gain) * np.float64(outputs[..., 1]))
    np.testing.assert_allclose(head.stddev({}, outputs), expected, rtol=1e-6)


def test_mixture_of_one_is_logistic():
    mixture, logistic = likelihoods.mixture(0.3, num_components=1, gain=0.5), likelihoods.logistic(0.3, gain=0.5)
    outputs, x = outputs_for(mixture, 5, *SHAPE), jnp.zeros((5, *SHAPE))
    for make in (lambda head: head, likelihoods.discretised):
        ours, expected = (
            (head.log_prob({}, part, x), head.mean({}, part), head.stddev({}, part))
            for head, part in ((make(mixture), outputs), (make(logistic), outputs[..., :2]))
        )
        for one, other in zip(ours, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6)


def test_mixture_starts_as_equal_components_from_minus_to_plus_sigma():
    head = likelihoods.mixture(0.3, num_components=3)
    assert head.outputs == 9
    expected = Reference(stats.logistic, np.full(3, 1.0 / 3.0), np.array([-0.3, 0.0, 0.3]), np.float64(0.3))
    x = np.linspace(-2.0, 2.0, 41, dtype=np.float32)[:, None]
    log_prob = head.log_prob({}, jnp.zeros((41, 1, head.outputs)), jnp.array(x))
    np.testing.assert_allclose(log_prob, expected.log("logpdf", x)[:, 0], rtol=1e-5, atol=1e-6)


def test_mixture_keeps_each_components_sigma_above_the_floor():
    head = likelihoods.mixture(1.0, num_components=1, floor=0.2)
    for deviation, expected in ((-1e3, 0.2), (0.0, 1.0), (1e3, np.exp(2.0))):
        np.testing.assert_allclose(head.stddev({}, outputs_at(head, [[0.7]], deviation)), expected, rtol=1e-5)
    assert (head.floor, likelihoods.mixture().floor) == (0.2, likelihoods.FLOOR)


def test_mixture_needs_a_component():
    with pytest.raises(ValueError, match="num_components must be at least 1, got 0"):
        likelihoods.mixture(num_components=0)


@every_head
def test_density_and_gradients_are_finite_at_extremes(make):
    values = list(itertools.product([0.0, 1e3, -1e3], [0.0, 1e3, -1e3]))
    x, extra = jnp.array(values).T
    outputs = jnp.stack([jnp.zeros_like(x), *[extra] * (make().outputs - 1)], -1)[:, None]
    value_and_gradients = jax.jit(
        jax.value_and_grad(lambda sigma, *args: make(sigma).log_prob(*args, x[:, None]).sum(), (1, 2))
    )
    for sigma in (1e-4, 1.0, 100.0):
        head = make(sigma)
        for params in (
            head.init(),
            jax.tree.map(lambda p: p - 10.0, head.init()),
            head.update(head.init(), jnp.int32(3), 0 * MSE),
        ):
            found = value_and_gradients(sigma, params, outputs)
            assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(found))


@pytest.mark.parametrize("options", [{}, {"floor": likelihoods.quantisation_noise()}, {"floor": 0.2}])
def test_learned_sigmas_stay_in_their_range(options):
    scalar, vector = likelihoods.learned_scalar(**options), likelihoods.learned_vector(**options)
    each, logistic = likelihoods.learned_map((1,), **options), likelihoods.logistic(**options)
    low, high = options.get("floor", np.exp(-7.0)), np.exp(2.0)
    for value in (-1e30, -1e3, 1e3, 1e30):
        outputs = jnp.array([[[0.0, value]]])
        for stddev in (
            scalar.stddev({"log_stddev": jnp.array(value)}, outputs[..., :1]),
            each.stddev({"log_stddev": jnp.array([value])}, outputs[..., :1]),
            vector.stddev({}, outputs),
            logistic.stddev({}, outputs),
        ):
            np.testing.assert_allclose(stddev, low if value < 0 else high, rtol=1e-5)
    assert scalar.floor == each.floor == vector.floor == logistic.floor == low


@heads_named("ls", "lv", "optimal", "logistic")
def test_floors_bound_initial_and_closed_form_sigmas_alone(make):
    sigmas = [1e-30, 1e-4, 0.19, 0.35, 0.7, 4.0, 1e6]
    outputs = jnp.zeros((1, 1, 2))
    for sigma in sigmas:
        for head in (make(sigma, floor=0.2), make(sigma)):
            stddev = float(head.stddev(head.init(), outputs[..., : head.outputs])[0, 0])
            assert head.floor * (1.0 - 1e-6) <= stddev <= np.exp(2.0) * (1.0 + 1e-6)
            if 1.7 * head.floor < sigma < 4.2:
                assert stddev == float(jnp.exp(jnp.log(jnp.float32(sigma))))
    if make is likelihoods.optimal:
        for mse, expected in ((0.0, 0.2), (0.25, 0.5)):
            head = make(floor=0.2)
            params = head.update(head.init(), jnp.int32(3), jnp.float32(mse))
            np.testing.assert_allclose(head.stddev(params, outputs[..., :1]), expected, rtol=1e-6)


@pytest.mark.parametrize(
    "make",
    [*(HEADS[name] for name in ("ls", "lv", "optimal", "logistic", "mixture")), MAP],
    ids=("ls", "lv", "optimal", "logistic", "mixture", "map"),
)
def test_floor_must_be_positive_and_leave_room(make):
    for floor in (0.0, -1.0, 2.8, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="floor"):
            make(floor=floor)


def test_quantisation_noise_is_that_of_rounding():
    x = np.random.default_rng(0).uniform(0.0, 1.0, 1_000_000)
    np.testing.assert_allclose(likelihoods.quantisation_noise(), np.std(x - np.round(255.0 * x) / 255.0), rtol=2e-3)


# Samplers


def identities(head, params, outputs, x):
    """Functions of x whose expectations are zero where x is drawn from the head's own density, whatever that is.

    The score, E d/dtheta log p = 0; and by parts E d/dx log p = 0 and E [(x - mean) d/dx log p] = -1, which also test
    the sigma of a head that gives it no gradient.
    """
    score = jax.grad(lambda *args: head.log_prob(*args, x)[0], (0, 1))(params, outputs)
    slope = jax.grad(lambda x: head.log_prob(params, outputs, x)[0])(x)
    return ravel_pytree((score, slope, (x - head.mean(params, outputs)) * slope + 1.0))[0]


def many_draws(head, params, outputs, *, n=20_000):
    return jax.jit(jax.vmap(lambda key: head.sample(key, params, outputs)))(jax.random.split(KEY, n))


WRONG_SAMPLERS = {
    "too wide": lambda x, mean, stddev: mean + 1.1 * (x - mean),
    "too narrow": lambda x, mean, stddev: mean + 0.9 * (x - mean),
    "shifted": lambda x, mean, stddev: x + 0.1 * stddev,
    "variance for stddev": lambda x, mean, stddev: mean + stddev * (x - mean),
}


@every_density
def test_sampler_matches_the_density(make):
    head = make(0.3)
    params, outputs = head.init(), outputs_for(head, 1, 2)
    mean, stddev = head.mean(params, outputs)[None], head.stddev(params, outputs)[None]
    draws = many_draws(head, params, outputs)
    check = jax.jit(jax.vmap(lambda x: identities(head, params, outputs, x)))
    assert standard_errors(check(draws)).max() < 4.5
    for name, wrong in WRONG_SAMPLERS.items():
        assert standard_errors(check(wrong(draws, mean, stddev))).max() > 9.0, f"{name} passes for the head's own"


@every_density
def test_samples_have_the_heads_moments_and_independent_noise(make):
    head, n = make(0.3), 5_000
    params, outputs = head.init(), outputs_for(head, 3, 2, 2)
    draws = np.asarray(many_draws(head, params, outputs, n=n))
    noise = ((draws - head.mean(params, outputs)[None]) / np.asarray(head.stddev(params, outputs))[None]).reshape(n, -1)
    assert standard_errors(noise).max() < 4.5
    assert standard_errors(noise**2 - 1.0).max() < 4.5
    rank = np.exp(reference(make, 0.3, outputs).log("logcdf", draws))
    assert stats.kstest(rank.ravel(), stats.uniform.cdf).pvalue > 1e-3
    correlations = np.corrcoef(noise.T) - np.eye(noise.shape[1])
    assert np.abs(correlations).max() < 4.5 / np.sqrt(n), "examples or dimensions share their noise"


@every_head
def test_sample_is_a_function_of_its_key(make):
    head = make(0.3)
    params, outputs = head.init(), outputs_for(head, 3, 2) * 0.1 + 0.5
    first, again, other = (head.sample(jax.random.key(seed), params, outputs) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)


# Discretised heads

PIXELS = np.arange(256, dtype=np.float32) / 255.0
SAMPLED = (0.02, 0.6, 0.99)
MEANS = (*SAMPLED, -0.5, 0.0, 127.5 / 255.0, 1.0, 30.0)


def probabilities(make, sigma):
    """P of the 256 values of one pixel, for each of MEANS [M, 256], with log sigmas moved by 0.3."""
    outputs = outputs_at(make(), np.repeat(MEANS, 256)[:, None], 0.3)
    x = jnp.array(np.tile(PIXELS, len(MEANS))[:, None])
    return np.exp(np.float64(start(make, sigma, outputs, x)[0])).reshape(len(MEANS), 256)


def pixel_outputs(head, *shape):
    """As `outputs_for`, with means on [0, 1], the ends included."""
    outputs, means = outputs_for(head, *shape), np.s_[..., : channels(head)[0]]
    return outputs.at[means].set(jnp.clip(0.5 + 0.4 * outputs[means], 0.0, 1.0))


# A stddev of a bin lies between these sigmas: the Taylor series of the mass serves from there on.
@every_discretised
@pytest.mark.parametrize(("sigma", "shape"), [(0.003, (2,)), (0.003, SHAPE), (0.03, SHAPE)])
def test_discretised_log_prob_matches_scipy(make, sigma, shape):
    outputs = pixel_outputs(make(), 5, *shape)
    distribution = reference(make, sigma, outputs)
    noise = 2.0 * np.random.default_rng(0).normal(size=(5, *shape))
    k = np.clip(np.round(255.0 * (distribution.mean() + distribution.stddev() * noise)), 0, 255)
    k[0] = np.resize([0, 255, 0], k[0].shape)
    mass = distribution.mass_of_levels(k)
    far = mass < 1e-300
    ours = start(make, sigma, outputs, jnp.float32(k / 255.0))[0]
    expected = np.log(np.where(far, 1.0, mass))
    expected = expected.sum(tuple(range(1, k.ndim)))
    judged = ~far.any(tuple(range(1, k.ndim)))  # test_gaussians has the far tails
    assert judged[1:].all()
    np.testing.assert_allclose(ours[judged], expected[judged], rtol=1e-5, atol=1e-5)
    assert np.all(ours <= 0.0)


@every_discretised
def test_256_probabilities_sum_to_one(make):
    for sigma in (1e-10, 1e-4, 0.001, 0.03, 0.3, 4.0, 100.0):
        masses = probabilities(make, sigma)
        assert masses.max() <= 1.0
        np.testing.assert_allclose(masses.sum(axis=1), 1.0, rtol=1e-6)


@every_discretised
def test_probability_is_density_times_bin_where_sigma_is_wide(make):
    sigma = 0.3 if reference(make, 0.3, np.zeros(make().outputs)).family is stats.norm else 0.6  # a sharper peak
    outputs, x = outputs_at(make(), pixel_outputs(make(), 5, *SHAPE)[..., 0]), jnp.full((5, *SHAPE), 100 / 255)
    expected = start(DENSITIES[make], sigma, outputs, x)[0] - 12 * np.log(255.0)
    np.testing.assert_allclose(start(make, sigma, outputs, x)[0], expected, atol=1e-4)


@every_discretised
def test_sum_of_probabilities_has_no_gradient(make):
    outputs, num_means = outputs_at(make(), np.array(MEANS[:-1])[:, None], 0.3), channels(make())[0]

    def total(sigma, params, outputs):
        x = jnp.tile(PIXELS, len(outputs))[:, None]
        return jnp.exp(make(sigma).log_prob(params, outputs.repeat(256, axis=0), x)).sum()

    gradient = jax.jit(jax.grad(total, (1, 2)))
    for sigma in (0.002, 0.1, 1.0):
        of_params, of_outputs = gradient(sigma, make(sigma).init(), outputs)
        np.testing.assert_allclose(sigma * of_outputs[..., :num_means], 0.0, atol=2e-5)
        for of_log_sigma in (of_outputs[..., num_means:], *jax.tree.leaves(of_params)):
            np.testing.assert_allclose(of_log_sigma, 0.0, atol=2e-5)


# The draws of a sampler of 8-bit values, made wrong.
WRONG_PIXELS = {
    "too wide": lambda draw, mean: mean + 1.1 * (draw - mean),
    "too narrow": lambda draw, mean: mean + 0.9 * (draw - mean),
    "shifted by half a step": lambda draw, mean: draw + 0.5 / 255.0,
    "rounded down": lambda draw, mean: jnp.floor(255.0 * draw) / 255.0,
    "not clipped but wrapped": lambda draw, mean: draw % (256.0 / 255.0),
}


@pytest.mark.parametrize("name", HEADS)
def test_discretised_sampler_matches_the_probabilities(name):
    density, n = HEADS[name](0.02), 100_000
    head = likelihoods.discretised(density)
    params = head.init()

    def p_value(draws, expected):
        common = expected > 5.0
        counts = np.bincount(np.clip(np.round(255.0 * np.float64(draws[:, 0])), 0, 255).astype(int), minlength=256)
        rest = counts[~common].sum(), expected[~common].sum()
        pairs = np.array([*zip(counts[common], expected[common], strict=True), rest])
        return stats.chisquare(*pairs.T, sum_check=False).pvalue

    for mean, expected in zip(SAMPLED, n * probabilities(DISCRETISED[f"discretised {name}"], 0.02), strict=False):
        outputs = outputs_at(head, np.full((n, 1), mean), 0.3)
        draws = head.sample(KEY, params, outputs)
        np.testing.assert_array_equal(draws, jnp.clip(jnp.round(255.0 * draws), 0.0, 255.0) / 255.0)
        assert p_value(draws, expected) > 1e-3
        for wrong_name, wrong in WRONG_PIXELS.items():
            if wrong_name == "not clipped but wrapped" and mean == 0.6:  # 15 sigma from either end
                continue
            wrong_draws = wrong(density.sample(KEY, params, outputs), mean)
            assert p_value(wrong_draws, expected) < 1e-9, f"{wrong_name} passes for the head's own"


@every_discretised
def test_discretised_gradients_of_log_sigma_are_differences(make):
    for sigma in (0.003, 1.0):
        outputs = outputs_at(make(), pixel_outputs(make(), 5, *SHAPE)[..., 0])
        noise = np.random.default_rng(3).normal(size=(5, *SHAPE))
        k = np.clip(np.round(255.0 * (np.float64(outputs[..., 0]) + 2.0 * sigma * noise)), 0, 255)
        gradient = gradient_of_log_sigma(make)(sigma, outputs, jnp.float32(k / 255))
        if make in (DISCRETISED["discretised f"], DISCRETISED["discretised optimal"]):
            assert gradient == 0.0, "no gradient reaches a sigma that is given"
            continue
        difference = reference(make, sigma, outputs).by_log_sigma(lambda r, k=k: np.log(r.mass_of_levels(k)).sum())
        np.testing.assert_allclose(gradient, difference, rtol=1e-4, atol=1e-3)


def test_discretised_heads_keep_everything_else():
    head = likelihoods.learned_vector(0.3, floor=0.01)
    other = likelihoods.discretised(head)
    own = {name: getattr(head, name) for name in ("mean", "log_prob", "sample", "log_each", "log_stddev")}
    assert other._replace(**own) == head


@every_discretised
def test_discretised_mean_is_clipped_but_probabilities_are_not(make):
    centres = np.float32([[-3.0, -0.2], [0.0, 0.3], [1.0, 1.2], [3.0, 0.5], [0.0, 1.0]])
    outputs = outputs_at(make(), centres)
    first, mean, _ = start(make, 0.4, outputs, jnp.zeros((5, 2)))
    last, *_ = start(make, 0.4, outputs, jnp.ones((5, 2)))
    np.testing.assert_allclose(mean, np.clip(centres, 0.0, 1.0), rtol=0.0, atol=0.0 if make().outputs < 3 else 1e-6)
    distribution = reference(make, 0.4, outputs)
    expected = (
        distribution.log("logcdf", np.full((5, 2), 0.5) / 255),
        distribution.log("logsf", np.full((5, 2), 254.5) / 255),
    )
    for ours, log_mass in zip((first, last), expected, strict=True):
        np.testing.assert_allclose(ours, log_mass.sum(axis=1), rtol=1e-4, atol=1e-6)
    head = make(0.4)
    draws = head.sample(KEY, head.init(), outputs_at(head, np.full((1000, 1), -3.0)))
    assert np.all(draws == 0.0)


def test_probabilities_are_right_where_two_formulas_meet():
    """A compiled sum may compute the same pixel twice, rounded differently, and so on both sides of the edge."""
    rng = np.random.default_rng(0)
    distance, level = rng.uniform(1.01, 100.0, 20_000), rng.integers(1, 255, 20_000)  # in bins
    mean = np.float32((level + distance) / 255.0)
    log_sigma = np.float32(0.5 * np.log(distance) - np.log(255.0))  # c w = 1/2, in the names of gaussians.log_bin_mass
    outputs, x = np.stack([mean, log_sigma], axis=-1)[:, None], jnp.float32(level / 255.0)[:, None]
    head = likelihoods.discretised(likelihoods.learned_vector())
    value, gradients = jax.jit(
        lambda outputs: jax.value_and_grad(lambda outputs: head.log_prob({}, outputs, x).sum())(outputs)
    )(jnp.array(outputs))
    assert np.isfinite(value)
    assert np.all(np.isfinite(gradients))
    ours = jax.jit(lambda outputs: head.log_prob({}, outputs, x))(jnp.array(outputs))
    edges = [
        (255.0 * np.float64(mean) - level + half) / (255.0 * np.exp(np.float64(log_sigma))) for half in (-0.5, 0.5)
    ]
    near, far = map(stats.norm.logsf, edges)
    np.testing.assert_allclose(ours, near + np.log1p(-np.exp(far - near)), rtol=1e-5, atol=2e-5)


def test_heads_without_log_mass_cannot_be_discretised():
    laplace = bring_your_own.laplace(lambda step: 0.1)
    with pytest.raises(ValueError, match="this head has no log_mass"):
        likelihoods.discretised(laplace)

    def log_mass(params, outputs, k, grid):
        def cdf(edge):
            return jax.scipy.stats.laplace.cdf((edge + grid.offset) / grid.scale, outputs[..., 0], 0.1 / np.sqrt(2.0))

        low, high = jnp.where(k == 0.0, -jnp.inf, k - 0.5), jnp.where(k == grid.last, jnp.inf, k + 0.5)
        return jnp.log(cdf(high) - cdf(low))

    for dequantised, edges in (
        (False, np.array([-np.inf, 0.25, 0.75, np.inf])),
        (True, [-np.inf, 1 / 3, 2 / 3, np.inf]),
    ):
        head = likelihoods.discretised(laplace._replace(log_mass=log_mass), levels=3, dequantised=dequantised)
        outputs, x = outputs_at(head, np.full((3, 1), 0.4)), jnp.array([[0.1], [0.5], [0.9]])
        expected = np.diff(stats.laplace.cdf(edges, 0.4, 0.1 / np.sqrt(2.0)))
        np.testing.assert_allclose(jnp.exp(head.log_prob(head.init(), outputs, x)), expected, rtol=1e-4)


@every_discretised
def test_values_off_the_grid_count_as_the_nearest(make):
    outputs = outputs_at(make(), np.full((5, 2), 0.45))
    x, nearest = np.full((2, 5, 2), 0.4, np.float32)
    x[:, 1], nearest[:, 1] = (-0.3, 0.4005, 0.4, 1.2, 1e3), (0.0, 102 / 255, 102 / 255, 1.0, 1.0)
    ours, expected = (start(make, 0.05, outputs, jnp.array(values))[0] for values in (x, nearest))
    np.testing.assert_array_equal(ours, expected)


# Where sigma comes from


@every_head
def test_sigma_must_be_a_positive_number_of_float32(make):
    for bad in (0.0, -1.0, float("nan"), float("inf"), 1e-50):
        for value in (bad, np.float64(bad), jnp.float32(bad)):
            with pytest.raises(ValueError, match="sigma"):
                make(value)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan")])
def test_sigmas_of_schedules_must_be_positive(bad):
    with pytest.raises(ValueError, match="sigma"):
        likelihoods.replay(jnp.array([1.0, bad, 0.5]))


def half(step):
    return 0.5  # a Python number, of a weak type


def growing(step):
    return step / 10


def scheduled(sigma):
    return likelihoods.fixed(lambda step: sigma / (1.0 + step))


@pytest.mark.parametrize(
    "make",
    [
        *HEADS.values(),
        MAP,
        scheduled,
        functools.partial(likelihoods.learned_vector, balance=half, ramp=growing),
        functools.partial(likelihoods.logistic, balance=growing, ramp=half),
    ],
    ids=[*HEADS, "map", "scheduled", "lv with schedules", "logistic with schedules"],
)
def test_update_keeps_strong_types(make):
    """Else the second step, or the first after a restored checkpoint, would compile again."""
    head = make(0.3)
    before, after = (jax.tree.map(jax.typeof, p) for p in (head.init(), head.update(head.init(), jnp.int32(3), MSE)))
    assert before == after
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(before))


@heads_named("f", "ls", "lv", "logistic", "mixture")
def test_update_leaves_other_sigmas_alone(make):
    head = make(0.3)
    assert head.update(head.init(), jnp.int32(3), MSE) == head.init()
    assert bool(head.init()) == (make in (likelihoods.fixed, likelihoods.learned_scalar))


@every_density
def test_gradients_reach_sigma_only_where_it_is_learned(make):
    outputs = outputs_at(make(), outputs_for(make(), 5, *SHAPE)[..., 0])
    residual = np.float32(0.5 * np.random.default_rng(1).normal(size=(5, *SHAPE)))
    for sigma in (0.05, 0.3, 2.0):
        x = outputs[..., 0] + residual
        gradient = gradient_of_log_sigma(make)(sigma, outputs, x)
        if make in (likelihoods.fixed, likelihoods.optimal):
            assert gradient == 0.0
        else:
            expected = reference(make, sigma, outputs).by_log_sigma(lambda r, x=x: r.log("logpdf", x).sum())
            np.testing.assert_allclose(gradient, expected, rtol=1e-4)


def test_learned_scalar_settles_at_the_mean_squared_error():
    head = likelihoods.learned_scalar(1.0)
    outputs, x = outputs_for(head, 50, *SHAPE), jnp.ones((50, *SHAPE))
    gradient = jax.jit(jax.grad(lambda params: head.log_prob(params, outputs, x).mean()))
    params = head.init()
    for _ in range(50):  # Ascent, slowed down to half the curvature's limit: 2 for each dimension.
        params = jax.tree.map(lambda p, g: p + 0.25 * g / np.prod(SHAPE), params, gradient(params))
    rmse = np.sqrt(np.mean(np.square(np.float64(x) - np.float64(outputs[..., 0]))))
    np.testing.assert_allclose(head.stddev(params, outputs), rmse, rtol=1e-5)
    above, below = (gradient({"log_stddev": jnp.log(jnp.float32(rmse * f))})["log_stddev"] for f in (1.02, 0.98))
    assert above < 0.0 < below


@pytest.mark.parametrize("mse", [1e-4, 9.0])
def test_optimal_sigma_maximises_the_density(mse):
    head = likelihoods.optimal(0.3)
    params = head.update(head.init(), jnp.int32(3), jnp.array(mse))
    outputs = outputs_for(head, 5, *SHAPE)
    np.testing.assert_allclose(head.stddev(params, outputs), np.sqrt(mse), rtol=1e-6)
    # Residuals of exactly this mean square: no other sigma does better.
    x = head.mean(params, outputs) + np.sqrt(mse)
    best = head.log_prob(params, outputs, x)
    for factor in (0.9, 1.1):
        fixed = likelihoods.fixed(np.sqrt(mse) * factor)
        assert jnp.all(fixed.log_prob(fixed.init(), outputs, x) < best)


@scalar_heads
def test_scalar_heads_of_one_sigma_are_one_density(make):
    for sigma in (0.01, 4.0):
        fixed, other = likelihoods.fixed(sigma), make(sigma)
        outputs = outputs_for(fixed, 5, *SHAPE)
        x = outputs[..., 0] + 2.0 * sigma
        np.testing.assert_array_equal(
            other.log_prob(other.init(), outputs, x), fixed.log_prob(fixed.init(), outputs, x)
        )


@every_head
def test_vmapped_sweep_is_the_loop_over_sigma(make):
    sigmas, outputs = jnp.geomspace(0.01, 1.0, 3), pixel_outputs(make(), 5, *SHAPE)
    x = jnp.full((5, *SHAPE), 100 / 255)
    together = jax.vmap(functools.partial(start, make), in_axes=(0, None, None))(sigmas, outputs, x)
    for index, sigma in enumerate(sigmas):
        for ours, alone in zip(together, start(make, sigma, outputs, x), strict=True):
            np.testing.assert_allclose(ours[index], alone, rtol=2e-5)


# A log sigma for each dimension


def map_of_errors():
    """A map, outputs and x [100, *SHAPE] of a different spread in each dimension, and v [*SHAPE], the mean squared
    errors in float64."""
    head = MAP(0.3)
    outputs = outputs_for(head, 100, *SHAPE)
    spreads = np.geomspace(0.02, 2.0, 12).reshape(SHAPE)
    x = outputs[..., 0] + np.float32(spreads * np.random.default_rng(4).normal(size=(100, *SHAPE)))
    return head, outputs, x, np.square(np.float64(x) - np.float64(outputs[..., 0])).mean(axis=0)


def test_learned_map_starts_as_the_learned_scalar():
    head, outputs, x, _ = map_of_errors()
    scalar = likelihoods.learned_scalar(0.3)
    assert head.init()["log_stddev"].shape == SHAPE
    np.testing.assert_array_equal(head.log_prob(head.init(), outputs, x), scalar.log_prob(scalar.init(), outputs, x))
    assert head.update(head.init(), jnp.int32(3), MSE).keys() == {"log_stddev"}


def test_learned_map_settles_at_each_dimensions_mean_squared_error():
    head, outputs, x, v = map_of_errors()
    gradient = jax.jit(jax.grad(lambda s: head.log_prob({"log_stddev": s}, outputs, x).mean()))
    best = jnp.array(0.5 * np.log(v), jnp.float32)
    np.testing.assert_allclose(head.stddev({"log_stddev": best}, outputs), np.sqrt(v)[None].repeat(100, 0), rtol=1e-5)
    np.testing.assert_allclose(gradient(best), 0.0, atol=1e-5)
    above, below = gradient(best + 0.02), gradient(best - 0.02)
    assert jnp.all((above < -0.03) & (below > 0.03))


def test_learned_map_gain_is_the_closed_form():
    head, outputs, x, v = map_of_errors()
    scalar, gain = likelihoods.learned_scalar(), 6.0 * (np.log(v.mean()) - np.log(v).mean())
    of_v, of_mean = (
        stats.norm.logpdf(np.float64(x), np.float64(outputs[..., 0]), np.sqrt(each)).sum(axis=(1, 2, 3)).mean()
        for each in (v, v.mean())
    )
    np.testing.assert_allclose(of_v - of_mean, gain, rtol=1e-12)
    ours, scalars = (
        np.float64(h.log_prob({"log_stddev": jnp.array(0.5 * np.log(each), jnp.float32)}, outputs, x)).mean()
        for h, each in ((head, v), (scalar, v.mean()))
    )
    np.testing.assert_allclose(ours - scalars, gain, rtol=1e-5)


def test_learned_map_draws_each_dimensions_stddev():
    head = MAP(0.3)
    log_stddev = jnp.linspace(-3.0, 1.0, 12).reshape(SHAPE)
    draws = np.asarray(head.sample(KEY, {"log_stddev": log_stddev}, outputs_at(head, np.full((2000, *SHAPE), 0.7))))
    noise = ((draws - 0.7) / np.exp(log_stddev)[None]).reshape(2000, 12)
    assert standard_errors(noise).max() < 4.5
    assert standard_errors(noise**2 - 1.0).max() < 4.5
    assert np.abs(np.corrcoef(noise.T) - np.eye(12)).max() < 4.5 / np.sqrt(2000)


# Balance and ramp


def gradients(head, params, outputs, x):
    """log p(x|z) [B], and the gradients of its sum by the parameters and by the outputs."""

    def total(params, outputs):
        log_prob = head.log_prob(params, outputs, x)
        return log_prob.sum(), log_prob

    (_, log_prob), found = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(params, outputs)
    return log_prob, *found


VECTORS = pytest.mark.parametrize("family", [likelihoods.GAUSSIAN, likelihoods.LOGISTIC], ids=["gaussian", "logistic"])


def vector_data():
    outputs = outputs_for(likelihoods.learned_vector(), 5, *SHAPE)
    return outputs, outputs[..., 0] + np.float32(0.5 * np.random.default_rng(5).normal(size=(5, *SHAPE)))


def one_dimensions_gradient(family, outputs, x, sigma):
    """d log p / d mean and d log p / d log sigma of each dimension [5, *SHAPE], in float64."""
    residual, sigma = np.float64(x) - np.float64(outputs[..., 0]), np.float64(sigma)
    if family is likelihoods.GAUSSIAN:
        by_mean = residual / sigma**2
    else:
        scale = sigma * np.sqrt(3.0) / np.pi
        by_mean = np.tanh(0.5 * residual / scale) / scale
    return by_mean, residual * by_mean - 1.0


@VECTORS
@pytest.mark.parametrize("b", [0.0, 0.5, 1.0, 2.0])
def test_balance_weighs_gradients_and_keeps_the_density(family, b):
    """At b = 0 all weights are 1; at b = 1 all errors of a Gaussian weigh the same."""
    plain = likelihoods.learned_vector(0.3, gain=0.7, family=family)
    head = likelihoods.learned_vector(0.3, gain=0.7, family=family, balance=lambda step: b)
    outputs, x = vector_data()
    log_prob, of_params, of_outputs = gradients(head, head.init(), outputs, x)
    np.testing.assert_array_equal(log_prob, gradients(plain, {}, outputs, x)[0])
    np.testing.assert_array_equal(of_params["balance"], 0.0)
    sigma = 0.3 * np.exp(0.7 * np.float64(outputs[..., 1]))
    weights = sigma ** (2.0 * b) / np.mean(sigma ** (2.0 * b), axis=(1, 2, 3), keepdims=True)
    by_mean, by_log_sigma = one_dimensions_gradient(family, outputs, x, sigma)
    np.testing.assert_allclose(of_outputs[..., 0], weights * by_mean, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(of_outputs[..., 1], 0.7 * weights * by_log_sigma, rtol=2e-5, atol=1e-5)


def test_balance_follows_its_schedule():
    head = likelihoods.learned_vector(0.3, balance=lambda step: 1.0 - step / 10)
    outputs, x = vector_data()
    for step in (0, 4, 10):
        ours = gradients(head, head.update(head.init(), jnp.int32(step), MSE), outputs, x)
        constant = likelihoods.learned_vector(0.3, balance=lambda _, step=step: 1.0 - step / 10)
        for one, other in zip(ours, gradients(constant, constant.init(), outputs, x), strict=True):
            jax.tree.map(np.testing.assert_array_equal, one, other)


def test_discretised_heads_leave_the_weights_out():
    plain, head = likelihoods.learned_vector(0.3), likelihoods.learned_vector(0.3, balance=half)
    outputs, x = vector_data()
    ours = gradients(likelihoods.discretised(head), head.init(), outputs, x)
    expected = gradients(likelihoods.discretised(plain), plain.init(), outputs, x)
    np.testing.assert_array_equal(ours[0], expected[0])
    np.testing.assert_array_equal(ours[2], expected[2])


@pytest.mark.parametrize("log_sigma", [None, -0.4])
def test_ramp_starts_at_the_learned_scalar(log_sigma):
    head, scalar = likelihoods.learned_vector(0.3, gain=0.7, ramp=growing), likelihoods.learned_scalar(0.3)
    outputs, x = vector_data()
    learned = {} if log_sigma is None else {"log_stddev": jnp.float32(log_sigma)}
    log_prob, of_params, of_outputs = gradients(head, head.init() | learned, outputs, x)
    expected = gradients(scalar, scalar.init() | learned, outputs[..., :1], x)
    np.testing.assert_array_equal(log_prob, expected[0])
    np.testing.assert_array_equal(of_outputs[..., 0], expected[2][..., 0])
    np.testing.assert_array_equal(of_outputs[..., 1], 0.0)
    np.testing.assert_allclose(of_params["log_stddev"], expected[1]["log_stddev"], rtol=1e-6)
    assert of_params["ramp"] == 0.0


@VECTORS
@pytest.mark.parametrize("log_sigma", [None, -0.4])
def test_ramp_ends_at_the_learned_vector(family, log_sigma):
    options = {"gain": 0.7, "family": family}
    head = likelihoods.learned_vector(0.3, ramp=growing, **options)
    vector = likelihoods.learned_vector(0.3 if log_sigma is None else np.exp(log_sigma), **options)
    outputs, x = vector_data()
    params = head.update(head.init(), jnp.int32(10), MSE)
    if log_sigma is not None:
        params |= {"log_stddev": jnp.float32(log_sigma)}
    log_prob, of_params, of_outputs = gradients(head, params, outputs, x)
    expected, _, of_vector = gradients(vector, {}, outputs, x)
    if log_sigma is None:
        np.testing.assert_array_equal(log_prob, expected)
        np.testing.assert_array_equal(of_outputs, of_vector)
    np.testing.assert_allclose(log_prob, expected, rtol=1e-6)
    np.testing.assert_allclose(of_outputs, of_vector, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(0.7 * of_params["log_stddev"], of_vector[..., 1].sum(), rtol=1e-5, atol=1e-4)


def test_ramp_blends_the_log_sigmas():
    head = likelihoods.learned_vector(0.3, gain=0.7, ramp=growing)
    outputs, _ = vector_data()
    for step in (0, 3, 10):
        params = head.update(head.init() | {"log_stddev": jnp.float32(-0.4)}, jnp.int32(step), MSE)
        expected = np.exp(-0.4 + 0.1 * step * 0.7 * np.float64(outputs[..., 1]))
        np.testing.assert_allclose(head.stddev(params, outputs), expected, rtol=1e-6)


def test_balance_weighs_by_the_ramped_sigma():
    both = likelihoods.learned_vector(0.3, balance=lambda step: 1.0, ramp=growing)
    outputs, x = vector_data()
    *_, of_outputs = gradients(both, both.init(), outputs, x)  # one sigma: all weights are 1
    np.testing.assert_allclose(of_outputs[..., 0], (x - outputs[..., 0]) / 0.3**2, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("names", [(), ("balance",), ("ramp",), ("balance", "ramp")], ids=" and ".join)
def test_update_sets_the_schedules_and_leaves_the_sigma_alone(names):
    head = likelihoods.learned_vector(0.3, **{name: {"balance": half, "ramp": growing}[name] for name in names})
    params, learned = head.init(), {"log_stddev": jnp.float32(-0.4)} if "ramp" in names else {}
    assert params.keys() == {*names, *learned}
    for step in (0, 3, 10):
        params = jax.jit(head.update)(params | learned, jnp.int32(step), MSE)
        expected = {name: {"balance": 0.5, "ramp": step / 10}[name] for name in names} | learned
        assert params.keys() == expected.keys()
        for name, value in params.items():
            assert (value.dtype, value.weak_type, value.shape) == (jnp.float32, False, ())
            np.testing.assert_array_equal(value, np.float32(expected[name]))


# Schedules

RECORDED = (1.0, 0.7, 0.71, 0.2)
SCHEDULES = {  # name: (schedule, its definition in float64)
    "geometric": (optax.exponential_decay(1.0, 10, 0.05, end_value=0.05), lambda t: 0.05 ** (min(t, 10) / 10)),
    "rising": (optax.exponential_decay(0.2, 4, 10.0, end_value=2.0), lambda t: 0.2 * 10.0 ** (min(t, 4) / 4)),
    "replay": (likelihoods.replay(jnp.array(RECORDED)), lambda t: RECORDED[min(t, 3)]),
    "constant": (optax.constant_schedule(0.3), lambda t: 0.3),
    "lambda": (lambda step: 1.0 / (1.0 + step), lambda t: 1.0 / (1.0 + t)),
}


@pytest.mark.parametrize(("schedule", "definition"), SCHEDULES.values(), ids=SCHEDULES)
def test_scheduled_head_is_at_each_step_the_fixed_one(schedule, definition):
    scheduled = likelihoods.fixed(schedule)
    outputs, x, update = jnp.zeros((4, 2, 1)), jax.random.normal(KEY, (4, 2)), jax.jit(scheduled.update)
    params = scheduled.init()
    for step in (0, 1, 2, 3, 4, 9, 10, 11, 1000):
        params = update(params, jnp.int32(step), MSE)
        fixed = likelihoods.fixed(definition(step))
        np.testing.assert_allclose(schedule(jnp.int32(step)), definition(step), rtol=1e-6)
        np.testing.assert_allclose(scheduled.stddev(params, outputs), definition(step), rtol=1e-5)
        expected = fixed.log_prob(fixed.init(), outputs, x)
        np.testing.assert_allclose(scheduled.log_prob(params, outputs, x), expected, rtol=1e-4)


# beta-VAE


@pytest.mark.parametrize(("sigma", "beta"), [(0.3, 4.0), (1.0, 0.1), (0.05, 100.0)])
def test_beta_is_a_fixed_sigma_in_disguise(sigma, beta):
    """Dividing -|r|^2 / (2 sigma^2) - beta KL by beta leaves -|r|^2 / (2 (sigma sqrt beta)^2) - KL."""
    x, noise = jax.random.normal(KEY, (6, 2)), jax.random.normal(jax.random.key(1), (6, 2))

    def gradient(sigma, beta):
        head = likelihoods.fixed(sigma)

        def objective(mean, log_stddev, decoder):
            outputs = jnp.tanh((mean + jnp.exp(log_stddev) * noise) @ decoder)[..., None]
            kl = gaussians.kl_to_standard(mean, log_stddev).sum(-1)
            return (head.log_prob(head.init(), outputs, x) - beta * kl).mean()

        return jax.grad(objective, (0, 1, 2))(0.5 * x, -1.0 + 0.1 * x, jnp.array([[1.0, -0.5], [0.3, 2.0]]))

    for ours, equivalent in zip(gradient(sigma, beta), gradient(sigma * np.sqrt(beta), 1.0), strict=True):
        np.testing.assert_allclose(ours, beta * equivalent, rtol=1e-4, atol=1e-5 * float(jnp.abs(ours).max()))


@pytest.mark.parametrize("name", likelihoods.HEADS)
def test_update_keeps_the_type_of_the_parameters(name):
    head = likelihoods.HEADS[name](0.5)
    with jax.enable_x64(True):
        before = head.init()
        after = head.update(before, jnp.zeros((), jnp.int32), jnp.asarray(0.1, jnp.float64))
    assert jax.tree.map(lambda leaf: leaf.dtype, after) == jax.tree.map(lambda leaf: leaf.dtype, before)
