"""One gradient step against hand-made references; sweeps against single runs; no recompilation."""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest

from lvae_jax import datasets, likelihoods, networks, toy, training
from lvae_jax import vae as vae_lib
from lvae_jax.keys import example_keys

BATCH = 20
INDEX = jnp.arange(BATCH)


def make_vae(sigma, head=likelihoods.fixed):
    likelihood = head(sigma)
    return vae_lib.VAE(
        networks.mlp_encoder((2,), 2, width=8, num_blocks=0),
        networks.mlp_decoder((2,), likelihood.outputs, 2, width=8, num_blocks=0),
        likelihood,
        2,
    )


# What is compiled serves all tests that ask for the same model and optimiser, and so these are made once.
model_of, optimizer_of = functools.cache(make_vae), functools.cache(training.optimizer)
stream = functools.cache(datasets.toy_stream)
init_state = jax.jit(training.init_state, static_argnums=(1, 2), static_argnames="ema_decay")
train_step = jax.jit(training.train_step, static_argnums=(1, 2), static_argnames=("beta", "ema_decay", "axis_name"))
elbo = jax.jit(vae_lib.elbo, static_argnums=1)
members_init = jax.jit(training.members_init, static_argnums=(2, 3))
members_steps = jax.jit(training.members_steps, static_argnames=("make_vae", "optimizer", "batch"))


@functools.cache
def points(seed=0):
    return jax.jit(toy.sample)(jax.random.split(jax.random.key(seed), BATCH))


def take_steps(head, sigma, num_steps, *, beta=1.0, **options):
    """The states from the first one on, and the metrics, of each step, with the rate of the longest of these runs."""
    vae, optimizer = model_of(sigma, head), optimizer_of(200, **options)
    states, metrics = [init_state(jax.random.key(0), vae, optimizer)], []
    for index in range(num_steps):
        key = jax.random.key(index)
        state, of_step = train_step(key, vae, optimizer, states[-1], points(index % 10), INDEX, beta=beta)
        states.append(state)
        metrics.append(of_step)
    return states, metrics


@functools.cache
def model_by_sigma(head, replayed):
    return lambda sigma: make_vae(likelihoods.replay(sigma) if replayed else sigma, head)


def members(seeds, sigmas, num_steps, *, fused=1, head=likelihoods.fixed, replayed=False):
    dataset, model, optimizer = stream(), model_by_sigma(head, replayed), optimizer_of(num_steps)
    seeds, sigmas = jnp.asarray(seeds), jnp.asarray(sigmas, jnp.float32)
    states, history = members_init(seeds, sigmas, model, optimizer), []
    for start in range(0, num_steps, fused):
        indices = [[dataset.indices(int(seed), step, BATCH) for seed in seeds] for step in range(start, start + fused)]
        states, metrics = members_steps(
            seeds,
            sigmas,
            states,
            None,
            np.asarray(indices),
            make_vae=model,
            optimizer=optimizer,
            batch=dataset.batch,
        )
        history.append(metrics)
    return states, jax.tree.map(lambda *parts: np.concatenate(parts), *history)


def assert_close(left, right, **tolerances):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerances), left, right)


def test_first_step_is_adam_on_the_clipped_gradient():
    vae, x, key = model_of(0.5), points(), jax.random.key(7)
    optimizer = optimizer_of(10, learning_rate=1e-2, clip_norm=0.1)
    state = init_state(jax.random.key(0), vae, optimizer)
    after, metrics = train_step(key, vae, optimizer, state, x, INDEX)

    keys = jnp.stack([jax.random.fold_in(key, index) for index in range(BATCH)])
    gradients = jax.jit(jax.grad(lambda params: -jnp.mean(vae_lib.elbo(keys, vae, params, x).elbo)))(state.params)
    norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(gradients)))
    assert norm > 0.1, "the clip must bite for this test to see it"
    np.testing.assert_allclose(metrics.gradient_norm, norm, rtol=1e-5)
    # Adam's first step in closed form: learning rate times g / (|g| + eps), with both moments debiased.
    for part in ("encoder", "decoder"):
        expected = jax.tree.map(
            lambda p, g: p - 1e-2 * (g * 0.1 / norm) / (np.abs(g * 0.1 / norm) + 1e-8),
            *(jax.tree.map(np.asarray, tree[part]) for tree in (state.params, gradients)),
        )
        assert_close(after.params[part], expected, rtol=1e-4, atol=1e-6)
    assert after.step == 1


def test_optimizer_without_options_is_plain_adam():
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
def test_rate_rises_on_a_line_and_falls_on_a_half_cosine(warmup_steps, decay):
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
        (likelihoods.fixed, optax.exponential_decay(1.0, 4, 0.1, end_value=0.1)),
        (likelihoods.optimal, 1.0),
    ],
)
def test_average_of_the_weights(head, sigma):
    vae, optimizer, learned = model_of(sigma, head), optimizer_of(10), head is likelihoods.learned_scalar
    state = init_state(jax.random.key(0), vae, optimizer, ema_decay=0.4)
    alone = init_state(jax.random.key(0), vae, optimizer)
    expected = jax.tree.map(np.asarray, state.params)
    assert_close(state.weights, expected, rtol=0)
    for index in range(10):
        key = jax.random.key(index)
        state, _ = train_step(key, vae, optimizer, state, points(), INDEX, ema_decay=0.4)
        decay = min(0.4, (index + 1) / (index + 10))  # 0.4 from the sixth step on
        params = jax.tree.map(np.asarray, state.params)
        expected = jax.tree.map(lambda a, p, d=decay: d * a + (1 - d) * p, expected, params)
        if learned:
            alone, _ = train_step(key, vae, optimizer, alone, points(), INDEX)
            assert_close(params, alone.params, rtol=1e-5, atol=1e-6)
    for part in ("encoder", "decoder"):
        assert_close(state.weights[part], expected[part], rtol=1e-4, atol=1e-6)
    assert alone.ema is None
    assert alone.weights is alone.params
    average = state.weights["likelihood"]["log_stddev"]
    if learned:
        np.testing.assert_allclose(average, expected["likelihood"]["log_stddev"], rtol=1e-4)
        assert average != state.params["likelihood"]["log_stddev"]
    else:
        np.testing.assert_array_equal(average, state.params["likelihood"]["log_stddev"])


def test_metrics_are_those_of_the_parameters_before_the_step():
    vae, x, key, optimizer = model_of(0.5), points(), jax.random.key(7), optimizer_of(200)
    state = init_state(jax.random.key(0), vae, optimizer)
    _, metrics = train_step(key, vae, optimizer, state, x, INDEX)
    terms = elbo(example_keys(key, jnp.arange(BATCH)), vae, state.params, x)
    np.testing.assert_allclose(metrics.scores.elbo, np.mean(terms.log_likelihood - terms.kl), rtol=1e-5)
    np.testing.assert_allclose(metrics.scores.mse, np.mean((x - terms.mean) ** 2), rtol=1e-5)
    np.testing.assert_allclose(metrics.scores.sigma_max, 0.5, rtol=1e-6)


def test_sigma_moves_at_its_own_rate_or_not_at_all():
    states, _ = take_steps(likelihoods.fixed, 0.5, 5)
    np.testing.assert_array_equal(states[-1].params["likelihood"]["log_stddev"], jnp.log(jnp.float32(0.5)))
    # Adam's first step is one learning rate.
    (_, learned), _ = take_steps(likelihoods.learned_scalar, 1.0, 1)
    np.testing.assert_allclose(abs(learned.params["likelihood"]["log_stddev"]), 10.0 * 2e-3, rtol=1e-3)
    optimizer = training.optimizer(10, learning_rate=1e-3, sigma_rate=3.0)
    params = {"decoder": jnp.zeros(()), "likelihood": {"log_stddev": jnp.zeros(())}}
    updates, _ = optimizer.update(jax.tree.map(lambda leaf: leaf + 0.5, params), optimizer.init(params), params)
    np.testing.assert_allclose(updates["decoder"], -1e-3, rtol=1e-4)
    np.testing.assert_allclose(updates["likelihood"]["log_stddev"], -3e-3, rtol=1e-4)


def test_learned_scalar_settles_at_the_mean_squared_error():
    head, x, optimizer = likelihoods.learned_scalar(), points(), optimizer_of(400, learning_rate=1e-2)
    outputs, params = 0.3 * x[..., None], {"likelihood": head.init()}
    opt_state = optimizer.init(params)

    @jax.jit
    def step(params, opt_state):
        gradient = jax.grad(lambda params: -jnp.mean(head.log_prob(params["likelihood"], outputs, x)))(params)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for _ in range(400):
        params, opt_state = step(params, opt_state)
    mse = np.mean((x - head.mean(params["likelihood"], outputs)) ** 2)
    np.testing.assert_allclose(jnp.exp(2 * params["likelihood"]["log_stddev"]), mse, rtol=1e-3)


def test_sigma_in_force_at_step_t_is_the_schedule_at_t():
    states, metrics = take_steps(likelihoods.fixed, optax.exponential_decay(1.0, 4, 0.1, end_value=0.1), 3)
    for step in range(3):
        np.testing.assert_allclose(metrics[step].scores.sigma_max, 0.1 ** (step / 4), rtol=1e-5)
        log_stddev = states[step + 1].params["likelihood"]["log_stddev"]
        np.testing.assert_allclose(np.exp(log_stddev), 0.1 ** ((step + 1) / 4), rtol=1e-5)


def test_optimal_sigma_is_the_error_of_the_batch_before():
    states, metrics = take_steps(likelihoods.optimal, 1.0, 2)
    variance = np.exp(2 * states[-1].params["likelihood"]["log_stddev"])
    np.testing.assert_allclose(variance, metrics[-1].scores.mse, rtol=1e-5)


def test_beta_weighs_the_kl_in_training_only():
    def kl(beta):
        states, _ = take_steps(likelihoods.fixed, 0.3, 200, beta=beta, learning_rate=1e-2)
        terms = elbo(jax.random.split(jax.random.key(3), BATCH), model_of(0.3), states[-1].params, points(99))
        np.testing.assert_array_equal(terms.elbo, terms.log_likelihood - terms.kl)
        return float(terms.kl.mean())

    assert kl(0.1) > 1.44 * kl(10.0)


def test_beta_may_be_a_function_of_the_step():
    vae, optimizer = model_of(0.3), optimizer_of(10)

    def two_steps(*betas):
        state = init_state(jax.random.key(0), vae, optimizer)
        for index, beta in enumerate(betas):
            state, _ = train_step(jax.random.key(index), vae, optimizer, state, points(index), INDEX, beta=beta)
        return state.params

    def ramp(step):
        return 5.0 * step

    by_step = two_steps(ramp, ramp)
    assert_close(by_step, two_steps(0.0, 5.0), rtol=1e-6)
    with pytest.raises(AssertionError):
        assert_close(by_step, two_steps(0.0, 0.0), rtol=1e-6)


def test_vmapped_sweep_equals_its_members_alone():
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
    single, single_history = members([0, 1, 0], np.array([0.3, 0.3, 1.0]), 6)
    fused, fused_history = members([0, 1, 0], np.array([0.3, 0.3, 1.0]), 6, fused=3)
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


PARTS = {
    **{name: (head, 0.3) for name, head in likelihoods.HEADS.items()},
    "constant": (likelihoods.fixed, optax.constant_schedule(0.5)),
    "geometric": (likelihoods.fixed, optax.exponential_decay(1.0, 4, 0.1, end_value=0.1)),
    "number": (likelihoods.fixed, lambda step: 0.5),
    "where": (likelihoods.fixed, lambda step: jnp.where(step < 2, 1.0, 0.5)),
}


@pytest.mark.parametrize(("head", "sigma"), PARTS.values(), ids=PARTS)
def test_step_keeps_the_types_of_the_state(head, sigma):
    """Else the second step would compile again."""
    vae, optimizer = make_vae(sigma, head), optimizer_of(10)
    before = jax.eval_shape(lambda: training.init_state(jax.random.key(0), vae, optimizer))
    step = functools.partial(training.train_step, jax.random.key(0), vae, optimizer, x=points(), index=INDEX)
    after, _ = jax.eval_shape(lambda state: step(state=state), before)

    def types(state):
        return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), state)

    assert types(after) == types(before)


def test_nothing_is_traced_again_after_the_first_step():
    traces = []

    def model(sigma):
        traces.append(sigma)
        return make_vae(sigma, likelihoods.learned_vector)

    optimizer = optimizer_of(10)
    steps = jax.jit(
        functools.partial(training.members_steps, make_vae=model, optimizer=optimizer, batch=stream().batch),
        donate_argnums=2,
    )
    for sigmas in (jnp.array([1.0, 0.1]), jnp.array([0.5, 0.01])):  # another sigma is no reason either
        states = members_init(jnp.arange(2), sigmas, model_by_sigma(likelihoods.learned_vector, False), optimizer)
        for _ in range(3):
            states, _ = steps(jnp.arange(2), sigmas, states, None, np.zeros((1, 2, BATCH), np.int32))
    assert len(traces) == 1


@pytest.mark.parametrize("head", likelihoods.HEADS.values(), ids=likelihoods.HEADS)
def test_steps_stay_finite_from_extreme_sigmas_and_data(head):
    optimizer, key = optimizer_of(10), jax.random.key(0)

    @jax.jit
    def step(sigma, state, x):
        return training.train_step(key, make_vae(sigma, head), optimizer, state, x, INDEX)

    for sigma in (1e-3, 5.0):
        state = init_state(key, model_of(1.0, head), optimizer)
        state.params["likelihood"] = head(sigma).init()
        for x in (points(), 1e3 * points(), jnp.zeros((BATCH, 2))):
            state, metrics = step(sigma, state, x)
            assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((state.params, metrics)))


def test_share_of_the_batch_draws_its_own_noise():
    vae, optimizer, x, key = model_of(0.5), optimizer_of(200), points(), jax.random.key(7)
    state = init_state(jax.random.key(0), vae, optimizer)
    half = BATCH // 2
    _, whole = train_step(key, vae, optimizer, state, x, INDEX)
    shares = [
        train_step(key, vae, optimizer, state, x[part], INDEX[part])[1] for part in (slice(half), slice(half, None))
    ]
    np.testing.assert_allclose(np.mean([share.scores.elbo for share in shares]), whole.scores.elbo, rtol=1e-5)


@pytest.mark.parametrize("head", [likelihoods.learned_vector, likelihoods.optimal])
def test_mapped_shares_make_the_step_of_the_whole_batch(head):
    vae, optimizer, x, key = model_of(0.5, head), optimizer_of(10, clip_norm=0.1), points(), jax.random.key(7)
    state = init_state(jax.random.key(0), vae, optimizer)
    whole = train_step(key, vae, optimizer, state, x, INDEX)
    step = functools.partial(training.train_step, key, vae, optimizer, axis_name="shares")
    mapped = jax.jit(jax.vmap(step, in_axes=(None, 0, 0), axis_name="shares"))(
        state, x.reshape(4, BATCH // 4, 2), INDEX.reshape(4, BATCH // 4)
    )
    for share in range(4):
        metrics = jax.tree.map(lambda leaf, share=share: leaf[share], mapped[1])
        assert_close(metrics, whole[1], rtol=1e-5)
    after = jax.tree.map(lambda leaf: leaf[2], mapped[0].params)
    assert_close(after, whole[0].params, rtol=1e-4, atol=1e-5)
    if head is likelihoods.learned_vector:
        assert metrics.scores.sigma_min < metrics.scores.sigma_max


def test_noise_belongs_to_index_and_step():
    dataset, key = stream(), jax.random.key(0)
    first = dataset.batch(None, key, jnp.arange(8))
    np.testing.assert_allclose(dataset.batch(None, key, jnp.arange(4, 8)), first[4:], rtol=1e-6)
    assert len(np.unique(np.asarray(first), axis=0)) == 8
    _, history = members([0], np.ones(1), 6)
    assert len(np.unique(history.scores.mse)) == 6


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (jnp.zeros((4, 2), jnp.uint8), "of type uint8, but the model is of floating-point data: scale grey levels"),
        (jnp.zeros((4, 3)), r"the shape \[4, 3\], but the model is of data \[B, 2\]"),
        (jnp.zeros((4,)), r"the shape \[4\]"),
    ],
)
def test_data_of_another_type_or_shape_are_refused(x, message, monkeypatch):
    model = vae_lib.mlp_vae((2,), likelihoods.fixed(), latent_size=2, width=4, num_blocks=0)
    optimizer = training.optimizer(10)
    state = training.init_state(jax.random.key(0), model, optimizer)
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # which users have not got
    with pytest.raises(ValueError, match=message):
        training.train_step(jax.random.key(1), model, optimizer, state, x, jnp.arange(4))
