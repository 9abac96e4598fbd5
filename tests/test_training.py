"""One gradient step against hand-made references; sweeps against single runs; no recompilation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lvae_jax import datasets, likelihoods, networks, toy, training
from lvae_jax import vae as vae_lib

BATCH = 20
INDEX = jnp.arange(BATCH)


def make_vae(sigma, head=likelihoods.fixed):
    likelihood = head(sigma)
    return vae_lib.VAE(
        networks.mlp_encoder((2,), 2, width=8, num_blocks=1),
        networks.mlp_decoder((2,), likelihood.outputs, 2, width=8, num_blocks=1),
        likelihood,
        2,
    )


def points(seed=0):
    return toy.sample(jax.random.split(jax.random.key(seed), BATCH))


def take_steps(head, sigma, num_steps, *, beta=1.0, **options):
    vae = make_vae(sigma, head)
    optimizer = training.optimizer(num_steps, **options)
    state = training.init_state(jax.random.key(0), vae, optimizer)
    step = jax.jit(functools.partial(training.train_step, vae=vae, optimizer=optimizer, beta=beta))
    for index in range(num_steps):
        state, metrics = step(jax.random.key(index), state=state, x=points(index), index=INDEX)
    return state, metrics


def members(seeds, sigmas, num_steps, *, fused=1, head=likelihoods.fixed, replayed=False):
    dataset = datasets.toy_stream()

    def model(sigma):
        return make_vae(likelihoods.replay(sigma) if replayed else sigma, head)

    optimizer = training.optimizer(num_steps)
    seeds, sigmas = jnp.asarray(seeds), jnp.asarray(sigmas)
    states = training.members_init(seeds, sigmas, model, optimizer)
    steps = jax.jit(functools.partial(training.members_steps, make_vae=model, optimizer=optimizer, batch=dataset.batch))
    history = []
    for start in range(0, num_steps, fused):
        indices = [[dataset.indices(int(seed), step, BATCH) for seed in seeds] for step in range(start, start + fused)]
        states, metrics = steps(seeds, sigmas, states, None, np.asarray(indices))
        history.append(metrics)
    return states, jax.tree.map(lambda *parts: np.concatenate(parts), *history)


def assert_close(left, right, **tolerances):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerances), left, right)


def test_first_step_is_adam_on_the_clipped_gradient_of_the_mean_negative_elbo():
    vae, x, key = make_vae(0.5), points(), jax.random.key(7)
    optimizer = training.optimizer(10, learning_rate=1e-2, clip_norm=0.1)
    state = training.init_state(jax.random.key(0), vae, optimizer)
    after, metrics = training.train_step(key, vae, optimizer, state, x, INDEX)

    keys = jnp.stack([jax.random.fold_in(key, index) for index in range(BATCH)])
    gradients = jax.grad(lambda params: -jnp.mean(vae_lib.elbo(keys, vae, params, x).elbo))(state.params)
    norm = optax.tree.norm(gradients)
    assert norm > 0.1, "the clip must bite for this test to see it"
    np.testing.assert_allclose(metrics.gradient_norm, norm, rtol=1e-5)
    # Adam's first step in closed form: learning rate times g / (|g| + eps), with both moments debiased.
    for part in ("encoder", "decoder"):
        expected = jax.tree.map(
            lambda p, g: p - 1e-2 * (g * 0.1 / norm) / (jnp.abs(g * 0.1 / norm) + 1e-8),
            state.params[part],
            gradients[part],
        )
        assert_close(after.params[part], expected, rtol=1e-4, atol=1e-6)
    assert after.step == 1


def test_without_options_the_optimizer_is_the_plain_one_to_the_bit():
    plain = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(2e-3, 7)))
    ours = training.optimizer(7)
    params = {"decoder": jnp.ones(5), "likelihood": {"log_stddev": jnp.zeros(())}}
    states = plain.init(params), ours.init(params)
    for step in range(7):
        noise = jax.random.normal(jax.random.key(step), (6,))
        gradients = {"decoder": noise[:5], "likelihood": {"log_stddev": noise[5]}}
        (left, plain_state), (right, state) = plain.update(gradients, states[0]), ours.update(gradients, states[1])
        np.testing.assert_array_equal(left["decoder"], right["decoder"])
        states = plain_state, state


@pytest.mark.parametrize("decay", [True, False])
@pytest.mark.parametrize("warmup_steps", [0, 1, 4])
def test_the_rate_rises_on_a_line_and_falls_on_a_half_cosine_or_stays(warmup_steps, decay):
    num_steps, rate = 10, 0.1
    optimizer = training.optimizer(num_steps, learning_rate=rate, decay=decay, warmup_steps=warmup_steps, clip_norm=1e9)
    params = {"decoder": jnp.zeros(()), "likelihood": {}}
    state, seen = optimizer.init(params), []
    for _ in range(num_steps):
        # Under a constant gradient Adam's step is the learning rate.
        updates, state = optimizer.update({"decoder": jnp.float32(3.0), "likelihood": {}}, state, params)
        seen.append(-updates["decoder"])
    step = np.arange(num_steps)
    cosine = 0.5 * (1 + np.cos(np.pi * (step - warmup_steps) / (num_steps - warmup_steps)))
    expected = rate * np.where(step < warmup_steps, step / max(warmup_steps, 1), cosine if decay else 1.0)
    np.testing.assert_allclose(seen, expected, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize(
    ("head", "sigma"),
    [
        (likelihoods.learned_scalar, 1.0),
        (likelihoods.fixed, 0.3),
        (likelihoods.fixed, likelihoods.geometric(1.0, 0.1, 4)),
        (likelihoods.optimal, 1.0),
    ],
)
def test_the_average_of_the_weights(head, sigma):
    vae, optimizer = make_vae(sigma, head), training.optimizer(10)
    state = training.init_state(jax.random.key(0), vae, optimizer, ema_decay=0.4)
    alone = training.init_state(jax.random.key(0), vae, optimizer)
    step = functools.partial(training.train_step, vae=vae, optimizer=optimizer, x=points(), index=INDEX)
    averaging, step = jax.jit(functools.partial(step, ema_decay=0.4)), jax.jit(step)
    expected = jax.tree.map(np.asarray, state.params)
    assert_close(state.weights, expected, rtol=0)
    for index in range(10):
        state, _ = averaging(jax.random.key(index), state=state)
        alone, _ = step(jax.random.key(index), state=alone)
        decay = min(0.4, (index + 1) / (index + 10))  # 0.4 from the sixth step on
        expected = jax.tree.map(lambda a, p, d=decay: d * a + (1 - d) * np.asarray(p), expected, state.params)
        assert_close(state.params, alone.params, rtol=1e-5, atol=1e-6)
    for part in ("encoder", "decoder"):
        assert_close(state.weights[part], expected[part], rtol=1e-4, atol=1e-6)
    assert alone.ema is None
    assert alone.weights is alone.params
    average = state.weights["likelihood"]["log_stddev"]
    if head is likelihoods.learned_scalar:
        np.testing.assert_allclose(average, expected["likelihood"]["log_stddev"], rtol=1e-4)
        assert average != state.params["likelihood"]["log_stddev"]
    else:
        np.testing.assert_array_equal(average, state.params["likelihood"]["log_stddev"])


def test_metrics_are_those_of_the_parameters_before_the_step():
    vae, x, key = make_vae(0.5), points(), jax.random.key(7)
    optimizer = training.optimizer(10)
    state = training.init_state(jax.random.key(0), vae, optimizer)
    _, metrics = training.train_step(key, vae, optimizer, state, x, INDEX)
    terms = vae_lib.elbo(datasets.example_keys(key, jnp.arange(BATCH)), vae, state.params, x)
    np.testing.assert_allclose(metrics.scores.elbo, np.mean(terms.log_likelihood - terms.kl), rtol=1e-5)
    np.testing.assert_allclose(metrics.scores.mse, np.mean((x - terms.mean) ** 2), rtol=1e-5)
    np.testing.assert_allclose(metrics.scores.sigma_max, 0.5, rtol=1e-6)


@pytest.mark.parametrize("options", [{}, {"sigma_rate": 1.0}])
def test_fixed_sigma_never_moves_and_learned_sigma_moves_at_its_own_rate(options):
    fixed, _ = take_steps(likelihoods.fixed, 0.3, 5)
    np.testing.assert_array_equal(fixed.params["likelihood"]["log_stddev"], jnp.log(jnp.float32(0.3)))
    learned, _ = take_steps(likelihoods.learned_scalar, 1.0, 1, learning_rate=1e-3, **options)
    # Adam's first step is one learning rate.
    expected = 1e-3 * options.get("sigma_rate", 10.0)
    np.testing.assert_allclose(abs(learned.params["likelihood"]["log_stddev"]), expected, rtol=1e-3)


def test_learned_scalar_settles_where_sigma_squared_is_the_mean_squared_error():
    vae, x = make_vae(1.0, likelihoods.learned_scalar), points()
    outputs = vae.decoder.apply(vae.decoder.init(jax.random.key(1)), jnp.zeros((BATCH, 2)))
    optimizer = training.optimizer(400, learning_rate=1e-2)
    params = {"likelihood": vae.likelihood.init()}
    opt_state = optimizer.init(params)
    gradient = jax.jit(jax.grad(lambda params: -jnp.mean(vae.likelihood.log_prob(params["likelihood"], outputs, x))))
    for _ in range(400):
        updates, opt_state = optimizer.update(gradient(params), opt_state, params)
        params = optax.apply_updates(params, updates)
    mse = jnp.mean((x - vae.likelihood.mean(params["likelihood"], outputs)) ** 2)
    np.testing.assert_allclose(jnp.exp(2 * params["likelihood"]["log_stddev"]), mse, rtol=1e-3)


def test_sigma_in_force_at_step_t_is_the_schedule_at_t():
    schedule = likelihoods.geometric(1.0, 0.1, 4)
    for num_steps in (1, 3):
        state, metrics = take_steps(likelihoods.fixed, schedule, num_steps)
        np.testing.assert_allclose(metrics.scores.sigma_max, 0.1 ** ((num_steps - 1) / 4), rtol=1e-5)
        np.testing.assert_allclose(jnp.exp(state.params["likelihood"]["log_stddev"]), 0.1 ** (num_steps / 4), rtol=1e-5)


def test_optimal_sigma_is_the_error_of_the_batch_before():
    state, metrics = take_steps(likelihoods.optimal, 1.0, 2)
    np.testing.assert_allclose(jnp.exp(2 * state.params["likelihood"]["log_stddev"]), metrics.scores.mse, rtol=1e-5)


def test_beta_weighs_the_kl_in_training_only():
    def kl(beta):
        state, _ = take_steps(likelihoods.fixed, 0.3, 200, beta=beta, learning_rate=1e-2)
        vae = make_vae(0.3)
        keys = jax.random.split(jax.random.key(3), BATCH)
        terms = vae_lib.elbo(keys, vae, state.params, points(99))
        np.testing.assert_array_equal(terms.elbo, terms.log_likelihood - terms.kl)
        return float(terms.kl.mean())

    assert kl(0.1) > 1.2 * kl(1.0) > 1.44 * kl(10.0)


def test_beta_may_be_a_function_of_the_step():
    vae, optimizer = make_vae(0.3), training.optimizer(10)

    def three_steps(beta_at):
        state = training.init_state(jax.random.key(0), vae, optimizer)
        for index in range(3):
            key = jax.random.key(index)
            state, _ = training.train_step(key, vae, optimizer, state, points(index), INDEX, beta=beta_at(index))
        return state.params

    def ramp(step):
        return 5.0 * step

    by_number, by_step = three_steps(lambda index: 5.0 * index), three_steps(lambda index: ramp)
    assert_close(by_step, by_number, rtol=1e-6)
    with pytest.raises(AssertionError):
        assert_close(by_step, three_steps(lambda index: 0.0), rtol=1e-6)


def test_a_vmapped_sweep_equals_its_members_alone():
    together, history = members([0, 1, 0], np.array([0.3, 0.3, 1.0]), 6)
    for index, (seed, sigma) in enumerate([(0, 0.3), (1, 0.3), (0, 1.0)]):
        alone, single = members([seed], np.array([sigma]), 6)
        for left, right in zip(jax.tree.leaves(together.params), jax.tree.leaves(alone.params), strict=True):
            # Adam divides a gradient by its own size: rounding in a small one can move a parameter by a learning rate.
            np.testing.assert_allclose(left[index], right[0], atol=2e-3)
        np.testing.assert_allclose(history.scores.elbo[:, index], single.scores.elbo[:, 0], rtol=1e-3)
    # Equal seeds share data and noise, other seeds do not.
    assert history.scores.kl[0, 0] == history.scores.kl[0, 2] != history.scores.kl[0, 1]


def test_fused_steps_equal_single_steps():
    single, single_history = members([0, 1], np.array([0.3, 1.0]), 6)
    fused, fused_history = members([0, 1], np.array([0.3, 1.0]), 6, fused=3)
    assert_close(fused_history, single_history, rtol=1e-3, atol=1e-5)
    assert (fused.step == 6).all()
    assert (single.step == 6).all()


def test_replaying_a_learned_sigma_repeats_its_run():
    _, learned = members([0, 1], np.ones(2), 30, head=likelihoods.learned_scalar)
    _, replayed = members([0, 1], learned.scores.sigma_max.T, 30, replayed=True)
    np.testing.assert_allclose(replayed.scores.sigma_max, learned.scores.sigma_max, rtol=1e-6)
    # The gradient of log sigma takes part in the clipping of one and not of the other: equal up to that.
    np.testing.assert_allclose(replayed.scores.elbo, learned.scores.elbo, atol=0.05)
    assert np.ptp(learned.scores.sigma_max) > 0.05


SCHEDULES = [
    likelihoods.constant(0.5),
    likelihoods.geometric(1.0, 0.1, 4),
    lambda step: 0.5,
    lambda step: jnp.where(step < 2, 1.0, 0.5),
]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_schedule_makes_the_second_step_compile_again(schedule):
    vae, optimizer = make_vae(schedule), training.optimizer(10)
    state = training.init_state(jax.random.key(0), vae, optimizer)
    step = jax.jit(functools.partial(training.train_step, vae=vae, optimizer=optimizer, x=points(), index=INDEX))
    for index in range(3):
        state, _ = step(jax.random.key(index), state=state)
    assert step._cache_size() == 1


@pytest.mark.parametrize("head", likelihoods.HEADS.values(), ids=likelihoods.HEADS)
def test_nothing_is_traced_again_after_the_first_step(head):
    traces = []

    def model(sigma):
        traces.append(sigma)
        return make_vae(sigma, head)

    dataset, optimizer = datasets.toy_stream(), training.optimizer(10)
    steps = jax.jit(
        functools.partial(training.members_steps, make_vae=model, optimizer=optimizer, batch=dataset.batch),
        donate_argnums=2,
    )
    for sigmas in (jnp.array([1.0, 0.1]), jnp.array([0.5, 0.01])):  # another sigma is no reason either
        states = training.members_init(jnp.arange(2), sigmas, functools.partial(make_vae, head=head), optimizer)
        for _ in range(3):
            states, _ = steps(jnp.arange(2), sigmas, states, None, np.zeros((1, 2, BATCH), np.int32))
    assert len(traces) == 1


@pytest.mark.parametrize("head", likelihoods.HEADS.values(), ids=likelihoods.HEADS)
@pytest.mark.parametrize("sigma", [1e-3, 5.0])
def test_steps_stay_finite_from_extreme_sigmas_and_data(head, sigma):
    vae = make_vae(sigma, head)
    optimizer = training.optimizer(10)
    state = training.init_state(jax.random.key(0), vae, optimizer)
    for x in (points(), 1e3 * points(), jnp.zeros((BATCH, 2))):
        state, metrics = training.train_step(jax.random.key(0), vae, optimizer, state, x, INDEX)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((state.params, metrics)))


def test_a_share_of_the_batch_draws_its_own_noise():
    vae, optimizer, x, key = make_vae(0.5), training.optimizer(10), points(), jax.random.key(7)
    state = training.init_state(jax.random.key(0), vae, optimizer)
    half = BATCH // 2
    _, whole = training.train_step(key, vae, optimizer, state, x, INDEX)
    shares = [
        training.train_step(key, vae, optimizer, state, x[part], INDEX[part])[1]
        for part in (slice(half), slice(half, None))
    ]
    np.testing.assert_allclose(np.mean([share.scores.elbo for share in shares]), whole.scores.elbo, rtol=1e-5)


@pytest.mark.parametrize("head", [likelihoods.learned_vector, likelihoods.optimal])
def test_mapped_shares_of_the_batch_make_the_step_of_the_whole(head):
    vae, optimizer, x, key = make_vae(0.5, head), training.optimizer(10, clip_norm=0.1), points(), jax.random.key(7)
    state = training.init_state(jax.random.key(0), vae, optimizer)
    whole = training.train_step(key, vae, optimizer, state, x, INDEX)
    step = functools.partial(training.train_step, key, vae, optimizer, axis_name="shares")
    mapped = jax.vmap(step, in_axes=(None, 0, 0), axis_name="shares")(
        state, x.reshape(4, BATCH // 4, 2), INDEX.reshape(4, BATCH // 4)
    )
    for share in range(4):
        metrics = jax.tree.map(lambda leaf, share=share: leaf[share], mapped[1])
        assert_close(metrics, whole[1], rtol=1e-5)
    after = jax.tree.map(lambda leaf: leaf[2], mapped[0].params)
    assert_close(after, whole[0].params, rtol=1e-4, atol=1e-5)
    if head is likelihoods.learned_vector:
        assert metrics.scores.sigma_min < metrics.scores.sigma_max


def test_examples_draw_noise_by_their_index_and_steps_by_their_number():
    dataset = datasets.toy_stream()
    key = jax.random.key(0)
    first = dataset.batch(None, key, jnp.arange(8))
    np.testing.assert_allclose(dataset.batch(None, key, jnp.arange(4, 8)), first[4:], rtol=1e-6)
    assert len(np.unique(np.asarray(first), axis=0)) == 8
    _, history = members([0], np.ones(1), 4)
    assert len(np.unique(history.scores.mse)) == 4
