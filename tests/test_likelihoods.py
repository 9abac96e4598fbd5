import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from scipy import stats

from lvae_jax import gaussians, likelihoods
from lvae_jax.likelihoods import HEADS

KEY = jax.random.key(0)
MSE = jnp.float32(0.04)
SHAPE = (3, 4, 1)

# Every property that takes `make` is one of all heads: a new row of HEADS inherits it, as a density, discretised, or
# both.
DISCRETISED = {
    f"discretised {name}": lambda sigma=1.0, make=make: likelihoods.discretised(make(sigma))
    for name, make in HEADS.items()
}
every_head = pytest.mark.parametrize("make", [*HEADS.values(), *DISCRETISED.values()], ids=[*HEADS, *DISCRETISED])
every_density = pytest.mark.parametrize("make", HEADS.values(), ids=HEADS)
every_discretised = pytest.mark.parametrize("make", DISCRETISED.values(), ids=DISCRETISED)
scalar_heads = pytest.mark.parametrize("make", [HEADS[name] for name in ("ls", "optimal")], ids=("ls", "optimal"))


def outputs_for(head, *shape):
    """Decoder outputs [*shape, K]: means of order one, and further channels that move a log sigma by half a nat."""
    outputs = np.random.default_rng(7).normal(size=(*shape, head.outputs))
    outputs[..., 1:] *= 0.5 / likelihoods.GAIN
    return jnp.array(outputs, jnp.float32)


def start(make, sigma, outputs, x):
    """(log_prob, mean, stddev) of the head `make(sigma)` as it starts. Tests share shapes: each is compiled."""
    head = make(sigma)
    params = head.init()
    return head.log_prob(params, outputs, x), head.mean(params, outputs), head.stddev(params, outputs)


@functools.cache
def gradient_of_log_sigma(make):
    """(sigma, outputs, x) -> d log p(x|z) / d log sigma, summed: by the one parameter, or by the decoder's second
    channel."""

    def gradient(sigma, outputs, x):
        head = make(sigma)
        of_params, of_outputs = jax.grad(lambda *args: head.log_prob(*args, x).sum(), (0, 1))(head.init(), outputs)
        return sum(leaf.sum() for leaf in jax.tree.leaves(of_params)) + of_outputs[..., 1:].sum() / likelihoods.GAIN

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
    expected = stats.norm.logpdf(*map(np.float64, (x, mean, stddev))).sum(tuple(range(1, x.ndim)))
    np.testing.assert_allclose(start(make, sigma, outputs, x)[0], expected, rtol=1e-5, atol=1e-4)


@every_density
def test_density_integrates_to_one(make):
    outputs = outputs_for(make(), 1, 1).repeat(201, 0)
    _, mean, stddev = start(make, 0.05, outputs, jnp.zeros((201, 1)))
    # The trapezoid rule converges exponentially on a Gaussian.
    x = mean + np.linspace(-10.0, 10.0, 201, dtype=np.float32)[:, None] * stddev
    density = np.exp(np.float64(start(make, 0.05, outputs, x)[0]))
    np.testing.assert_allclose(np.trapezoid(density, x[:, 0]), 1.0, rtol=1e-5)


@every_density
def test_mean_is_the_first_channel(make):
    head = make(0.3)
    outputs = outputs_for(head, 5, *SHAPE)
    np.testing.assert_array_equal(head.mean(head.init(), outputs), outputs[..., 0])


@every_head
def test_stddev_starts_at_sigma(make):
    head = make(0.3)
    outputs = outputs_for(head, 5, *SHAPE)
    np.testing.assert_allclose(head.stddev(head.init(), outputs.at[..., 1:].set(0.0)), 0.3, rtol=1e-6)


@pytest.mark.parametrize(("sigma", "gain"), [(0.3, 1.0), (0.3, 0.03), (2.0, 0.5)])
def test_learned_vector_takes_log_sigma_from_the_second_channel(sigma, gain):
    head = likelihoods.learned_vector(sigma, gain=gain)
    outputs = outputs_for(head, 5, *SHAPE).at[..., 1].multiply(likelihoods.GAIN)
    expected = sigma * np.exp(gain * np.float64(outputs[..., 1]))
    np.testing.assert_allclose(head.stddev({}, outputs), expected, rtol=1e-6)


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
    low, high = options.get("floor", np.exp(-7.0)), np.exp(2.0)
    for value in (-1e30, -1e3, 1e3, 1e30):
        outputs = jnp.array([[[0.0, value]]])
        for stddev in (scalar.stddev({"log_stddev": jnp.array(value)}, outputs[..., :1]), vector.stddev({}, outputs)):
            np.testing.assert_allclose(stddev, low if value < 0 else high, rtol=1e-5)
    assert scalar.floor == vector.floor == low


@pytest.mark.parametrize("make", [HEADS[name] for name in ("ls", "lv", "optimal")], ids=("ls", "lv", "optimal"))
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


@pytest.mark.parametrize("make", [HEADS[name] for name in ("ls", "lv", "optimal")], ids=("ls", "lv", "optimal"))
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
    assert stats.kstest(noise.ravel(), stats.norm.cdf).pvalue > 1e-3
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
    """P of the 256 values of one pixel, for each of MEANS [M, 256], with a second channel of 0.3."""
    outputs = np.stack([np.repeat(MEANS, 256), np.full(256 * len(MEANS), 0.3)], -1)[:, None, : make().outputs]
    x = jnp.array(np.tile(PIXELS, len(MEANS))[:, None])
    return np.exp(np.float64(start(make, sigma, jnp.array(outputs, jnp.float32), x)[0])).reshape(len(MEANS), 256)


def pixel_outputs(head, *shape):
    """As `outputs_for`, with means on [0, 1], the ends included."""
    outputs = outputs_for(head, *shape)
    return outputs.at[..., 0].set(jnp.clip(0.5 + 0.4 * outputs[..., 0], 0.0, 1.0))


# A stddev of a bin lies between these sigmas: the Taylor series of the mass serves from there on.
@every_discretised
@pytest.mark.parametrize(("sigma", "shape"), [(0.003, (2,)), (0.003, SHAPE), (0.03, SHAPE)])
def test_discretised_log_prob_is_that_of_scipys_masses(make, sigma, shape):
    outputs = pixel_outputs(make(), 5, *shape)
    _, mean, stddev = map(np.float64, start(make, sigma, outputs, jnp.zeros((5, *shape))))
    mean = np.float64(outputs[..., 0])
    k = np.clip(np.round(255.0 * (mean + 2.0 * stddev * np.random.default_rng(0).normal(size=mean.shape))), 0, 255)
    k[0] = np.resize([0, 255, 0], k[0].shape)
    low = np.where(k == 0, -np.inf, (k - 0.5) / 255.0)
    high = np.where(k == 255, np.inf, (k + 0.5) / 255.0)
    # Mass and logarithm on the side of the mean where nothing cancels.
    below = high < mean
    mass = np.where(
        below,
        stats.norm.cdf(high, mean, stddev) - stats.norm.cdf(low, mean, stddev),
        stats.norm.sf(low, mean, stddev) - stats.norm.sf(high, mean, stddev),
    )
    far = mass < 1e-300
    ours = start(make, sigma, outputs, jnp.float32(k / 255.0))[0]
    expected = np.log(np.where(far, 1.0, mass))
    expected = expected.sum(tuple(range(1, k.ndim)))
    judged = ~far.any(tuple(range(1, k.ndim)))  # test_gaussians has the far tails
    assert judged[1:].all()
    np.testing.assert_allclose(ours[judged], expected[judged], rtol=1e-5, atol=1e-5)
    assert np.all(ours <= 0.0)


@every_discretised
def test_the_256_probabilities_sum_to_one(make):
    for sigma in (1e-10, 1e-4, 0.001, 0.03, 0.3, 4.0, 100.0):
        masses = probabilities(make, sigma)
        assert masses.max() <= 1.0
        np.testing.assert_allclose(masses.sum(axis=1), 1.0, rtol=1e-6)


@every_discretised
def test_probability_is_density_times_bin_where_sigma_is_wide(make):
    density = HEADS["f"](0.3)
    outputs, x = pixel_outputs(make(), 5, *SHAPE).at[..., 1:].set(0.0), jnp.full((5, *SHAPE), 100 / 255)
    expected = density.log_prob(density.init(), outputs[..., :1], x) - 12 * np.log(255.0)
    np.testing.assert_allclose(start(make, 0.3, outputs, x)[0], expected, atol=1e-4)


@every_discretised
def test_sum_of_probabilities_has_no_gradient(make):
    outputs = jnp.stack([jnp.array(MEANS[:-1]), jnp.full(len(MEANS) - 1, 0.3)], axis=-1)[:, None, : make().outputs]

    def total(sigma, params, outputs):
        x = jnp.tile(PIXELS, len(outputs))[:, None]
        return jnp.exp(make(sigma).log_prob(params, outputs.repeat(256, axis=0), x)).sum()

    gradient = jax.jit(jax.grad(total, (1, 2)))
    for sigma in (0.002, 0.1, 1.0):
        of_params, of_outputs = gradient(sigma, make(sigma).init(), outputs)
        np.testing.assert_allclose(sigma * of_outputs[..., 0], 0.0, atol=2e-5)
        for of_log_sigma in (of_outputs[..., 1:], *jax.tree.leaves(of_params)):
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
    gaussian, n = HEADS[name](0.02), 100_000
    head = likelihoods.discretised(gaussian)
    params = head.init()

    def p_value(draws, expected):
        common = expected > 5.0
        counts = np.bincount(np.clip(np.round(255.0 * np.float64(draws[:, 0])), 0, 255).astype(int), minlength=256)
        rest = counts[~common].sum(), expected[~common].sum()
        pairs = np.array([*zip(counts[common], expected[common], strict=True), rest])
        return stats.chisquare(*pairs.T, sum_check=False).pvalue

    for mean, expected in zip(SAMPLED, n * probabilities(DISCRETISED[f"discretised {name}"], 0.02), strict=False):
        outputs = jnp.tile(jnp.array([mean, 0.3])[: head.outputs], (n, 1, 1))
        draws = head.sample(KEY, params, outputs)
        np.testing.assert_array_equal(draws, jnp.clip(jnp.round(255.0 * draws), 0.0, 255.0) / 255.0)
        assert p_value(draws, expected) > 1e-3
        for wrong_name, wrong in WRONG_PIXELS.items():
            if wrong_name == "not clipped but wrapped" and mean == 0.6:  # 15 sigma from either end
                continue
            wrong_draws = wrong(gaussian.sample(KEY, params, outputs), mean)
            assert p_value(wrong_draws, expected) < 1e-9, f"{wrong_name} passes for the head's own"


@every_discretised
def test_discretised_gradients_of_log_sigma_are_differences(make):
    for sigma in (0.003, 1.0):
        outputs = pixel_outputs(make(), 5, *SHAPE).at[..., 1:].set(0.0)
        mean, step = np.float64(outputs[..., 0]), 1e-5
        noise = np.random.default_rng(3).normal(size=mean.shape)
        k = np.clip(np.round(255.0 * (mean + 2.0 * sigma * noise)), 0, 255)
        gradient = gradient_of_log_sigma(make)(sigma, outputs, jnp.float32(k / 255))
        if make in (DISCRETISED["discretised f"], DISCRETISED["discretised optimal"]):
            assert gradient == 0.0, "no gradient reaches a sigma that is given"
            continue

        def log_prob(sigma, k=k, mean=mean):
            low, high = np.where(k == 0, -np.inf, (k - 0.5) / 255), np.where(k == 255, np.inf, (k + 0.5) / 255)
            return np.log(stats.norm.cdf(high, mean, sigma) - stats.norm.cdf(low, mean, sigma)).sum()

        difference = (log_prob(sigma * np.exp(step)) - log_prob(sigma * np.exp(-step))) / (2.0 * step)
        np.testing.assert_allclose(gradient, difference, rtol=1e-4, atol=1e-3)


def test_discretised_heads_keep_everything_else():
    head = likelihoods.learned_vector(0.3, floor=0.01)
    other = likelihoods.discretised(head)
    assert other._replace(mean=head.mean, log_prob=head.log_prob, sample=head.sample) == head


@every_discretised
def test_discretised_mean_is_clipped_but_probabilities_are_not(make):
    centres = np.float32([[-3.0, -0.2], [0.0, 0.3], [1.0, 1.2], [3.0, 0.5], [0.0, 1.0]])
    outputs = jnp.zeros((5, 2, make().outputs)).at[..., 0].set(centres)
    first, mean, _ = start(make, 0.4, outputs, jnp.zeros((5, 2)))
    last, *_ = start(make, 0.4, outputs, jnp.ones((5, 2)))
    np.testing.assert_array_equal(mean, np.clip(centres, 0.0, 1.0))
    expected = (stats.norm.logcdf(0.5 / 255.0, centres, 0.4), stats.norm.logsf(254.5 / 255.0, centres, 0.4))
    for ours, log_mass in zip((first, last), expected, strict=True):
        np.testing.assert_allclose(ours, log_mass.sum(axis=1), rtol=1e-4, atol=1e-6)
    head = make(0.4)
    draws = head.sample(KEY, head.init(), jnp.full((1000, 1, head.outputs), -3.0).at[..., 1:].set(0.0))
    assert np.all(draws == 0.0)


def test_values_off_the_grid_count_as_the_nearest():
    make, outputs = DISCRETISED["discretised f"], jnp.full((5, 2, 1), 0.45)
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
    for make in (
        lambda: likelihoods.constant(bad),
        lambda: likelihoods.geometric(bad, 0.1, 10),
        lambda: likelihoods.geometric(1.0, bad, 10),
        lambda: likelihoods.replay(jnp.array([1.0, bad, 0.5])),
    ):
        with pytest.raises(ValueError, match="sigma"):
            make()
    with pytest.raises(ValueError, match="num_steps"):
        likelihoods.geometric(1.0, 0.1, 0)


@pytest.mark.parametrize("make", [*HEADS.values(), lambda sigma: likelihoods.fixed(lambda step: sigma / (1.0 + step))])
def test_update_keeps_strong_types(make):
    """Else the second step, or the first after a restored checkpoint, would compile again."""
    head = make(0.3)
    before, after = (jax.tree.map(jax.typeof, p) for p in (head.init(), head.update(head.init(), jnp.int32(3), MSE)))
    assert before == after
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(before))


@pytest.mark.parametrize("name", ["f", "ls", "lv"])
def test_update_leaves_other_sigmas_alone(name):
    head = HEADS[name](0.3)
    assert head.update(head.init(), jnp.int32(3), MSE) == head.init()


@every_density
def test_gradients_reach_sigma_only_where_it_is_learned(make):
    outputs = outputs_for(make(), 5, *SHAPE).at[..., 1:].set(0.0)
    residual = np.float32(0.5 * np.random.default_rng(1).normal(size=(5, *SHAPE)))
    for sigma in (0.05, 0.3, 2.0):
        gradient = gradient_of_log_sigma(make)(sigma, outputs, outputs[..., 0] + residual)
        if make in (likelihoods.learned_scalar, likelihoods.learned_vector):
            expected = (np.float64(residual) ** 2 / sigma**2 - 1.0).sum()
            np.testing.assert_allclose(gradient, expected, rtol=1e-4)
        else:
            assert gradient == 0.0


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
def test_a_vmapped_sweep_is_the_loop_over_sigma(make):
    sigmas, outputs = jnp.geomspace(0.01, 1.0, 3), pixel_outputs(make(), 5, *SHAPE)
    x = jnp.full((5, *SHAPE), 100 / 255)
    together = jax.vmap(functools.partial(start, make), in_axes=(0, None, None))(sigmas, outputs, x)
    for index, sigma in enumerate(sigmas):
        for ours, alone in zip(together, start(make, sigma, outputs, x), strict=True):
            np.testing.assert_allclose(ours[index], alone, rtol=2e-5)


# Schedules

RECORDED = (1.0, 0.7, 0.71, 0.2)
SCHEDULES = {  # name: (schedule, its definition in float64)
    "geometric": (likelihoods.geometric(1.0, 0.05, 10), lambda t: 0.05 ** (min(t, 10) / 10)),
    "rising": (likelihoods.geometric(0.2, 2.0, 4), lambda t: 0.2 * 10.0 ** (min(t, 4) / 4)),
    "replay": (likelihoods.replay(jnp.array(RECORDED)), lambda t: RECORDED[min(t, 3)]),
    "constant": (likelihoods.constant(0.3), lambda t: 0.3),
    "lambda": (lambda step: 1.0 / (1.0 + step), lambda t: 1.0 / (1.0 + t)),
}


@pytest.mark.parametrize(("schedule", "definition"), SCHEDULES.values(), ids=SCHEDULES)
def test_a_scheduled_head_is_at_each_step_the_fixed_one(schedule, definition):
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


def test_geometric_changes_sigma_by_a_constant_factor():
    sigmas = np.float64(jax.vmap(likelihoods.geometric(2.0, 0.02, 20))(jnp.arange(30)))
    np.testing.assert_allclose(sigmas[[0, 20, 29]], [2.0, 0.02, 0.02], rtol=1e-6)
    np.testing.assert_allclose(sigmas[1:21] / sigmas[:20], 0.01 ** (1 / 20), rtol=1e-5)


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
