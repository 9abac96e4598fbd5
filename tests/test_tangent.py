"""The head with a covariance of low rank plus a diagonal: its density, its relatives, and trained models of it against
exact limits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import lvae_jax as lv
from experiments import command, sigma_sweep, sweep
from experiments.variants import VARIANTS
from lvae_jax import diagnostics, evaluation, likelihoods, ribbon, theory, toy, training
from lvae_jax import vae as vae_lib

KEY = jax.random.key(0)
SHAPE = (3, 2)
DIAGONALS = {
    "f": likelihoods.fixed(0.3),
    "ls": likelihoods.learned_scalar(0.3),
    "lv": likelihoods.learned_vector(0.3),
    "map": likelihoods.learned_map(SHAPE, 0.3),
    "optimal": likelihoods.optimal(0.3),
}
diagonals = pytest.mark.parametrize("name", DIAGONALS)


def example(head, size=5, seed=1):
    """(params, outputs, x): no channel is zero."""
    rng = np.random.default_rng(seed)
    outputs = rng.normal(size=(size, *SHAPE, head.outputs))
    x = outputs[..., 0] + 0.5 * rng.normal(size=(size, *SHAPE))
    return head.init(), jnp.asarray(outputs, jnp.float32), jnp.asarray(x, jnp.float32)


@diagonals
def test_log_prob_is_scipys(name):
    head = lv.tangent(DIAGONALS[name], rank=2)
    params, outputs, x = example(head)
    assert head.outputs == DIAGONALS[name].outputs + 2
    found = head.log_prob(params, outputs, x)
    for row in range(len(x)):
        mean, factors = np.float64(outputs[row, ..., 0]).ravel(), np.float64(outputs[row, ..., -2:]).reshape(-1, 2)
        stddev = 0.3 * np.exp(np.float64(outputs[row, ..., 1]).ravel()) if name == "lv" else 0.3 * np.ones(6)
        covariance = np.diag(stddev**2) + factors @ factors.T
        expected = stats.multivariate_normal.logpdf(np.float64(x[row]).ravel(), mean, covariance)
        assert float(found[row]) == pytest.approx(expected, rel=1e-5)
        np.testing.assert_allclose(head.stddev(params, outputs)[row].ravel(), np.sqrt(np.diag(covariance)), rtol=1e-5)


@diagonals
def test_rank_0_is_the_diagonal_head_to_the_bit(name):
    plain, head = DIAGONALS[name], lv.tangent(DIAGONALS[name], rank=0)
    params, outputs, x = example(plain)
    for compiled in (lambda f: f, jax.jit):
        np.testing.assert_array_equal(
            compiled(head.log_prob)(params, outputs, x), compiled(plain.log_prob)(params, outputs, x)
        )
    assert head.outputs == plain.outputs
    np.testing.assert_array_equal(head.mean(params, outputs), plain.mean(params, outputs))
    np.testing.assert_allclose(head.stddev(params, outputs), plain.stddev(params, outputs), rtol=1e-6)


@diagonals
def test_head_goes_on_to_learn_its_own_sigma(name):
    """Params, their update and their gradients are those of the head inside, where U is zero."""
    plain, head = DIAGONALS[name], lv.tangent(DIAGONALS[name], rank=2)
    params, outputs, x = example(plain)
    wider = jnp.concatenate([outputs, jnp.zeros((*outputs.shape[:-1], 2))], axis=-1)

    def gradients(head, outputs):
        return jax.grad(lambda params, outputs: head.log_prob(params, outputs, x).sum(), argnums=(0, 1))(
            params, outputs
        )

    mine, theirs = gradients(head, wider), gradients(plain, outputs)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), mine[0], theirs[0])
    np.testing.assert_allclose(mine[1][..., : plain.outputs], theirs[1], rtol=1e-4, atol=1e-4)
    assert not mine[1][..., plain.outputs :].any(), "U = 0 is a saddle"
    step, mse = jnp.int32(3), jnp.float32(0.5)
    assert head.update(params, step, mse) == plain.update(params, step, mse)
    assert head.floor == plain.floor


def test_draws_have_the_covariance():
    head = lv.tangent(likelihoods.learned_vector(0.3), rank=2)
    params, outputs, _ = example(head, size=1)
    draws = np.float64(jax.jit(head.sample)(KEY, params, jnp.repeat(outputs, 50_000, axis=0))).reshape(-1, 6)
    factors = np.float64(outputs[0, ..., 2:]).reshape(-1, 2)
    expected = np.diag((0.3 * np.exp(np.float64(outputs[0, ..., 1]).ravel())) ** 2) + factors @ factors.T
    errors = np.sqrt((np.outer(np.diag(expected), np.diag(expected)) + expected**2) / len(draws))
    assert np.all(np.abs(np.cov(draws.T) - expected) < 4.0 * errors)
    residuals = np.float64(
        head.standardise(
            params, jnp.repeat(outputs, len(draws), axis=0), jnp.asarray(draws.reshape(-1, *SHAPE), jnp.float32)
        )
    )
    np.testing.assert_allclose(np.cov(residuals.reshape(-1, 6).T), np.eye(6), atol=0.03)


def test_ramp_brings_the_tangents_in():
    head = lv.tangent(likelihoods.learned_vector(0.3), rank=2, ramp=lambda step: step / 10)
    plain = lv.tangent(likelihoods.learned_vector(0.3), rank=2)
    params, outputs, x = example(head)
    at_start = plain.log_prob({}, outputs.at[..., 2:].set(0.0), x)
    np.testing.assert_allclose(head.log_prob(params, outputs, x), at_start, rtol=1e-6)
    half = head.update(params, jnp.int32(5), jnp.zeros(()))
    expected = plain.log_prob({}, outputs.at[..., 2:].multiply(0.5), x)
    np.testing.assert_allclose(head.log_prob(half, outputs, x), expected, rtol=1e-5)
    gradient = jax.grad(lambda params: head.log_prob(params, outputs, x).sum())(half)
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradient)), "the schedule is no parameter to be learned"


def test_tangent_in_other_units():
    inner = lv.tangent(likelihoods.learned_vector(0.3), rank=2)
    head = likelihoods.rescaled(inner, centre=np.ones(SHAPE), scale=20.0)
    params, outputs, x = example(head)
    np.testing.assert_allclose(
        head.log_prob(params, outputs, 1.0 + 20.0 * x), inner.log_prob(params, outputs, x) - 6 * np.log(20.0), rtol=1e-4
    )
    np.testing.assert_allclose(
        head.standardise(params, outputs, 1.0 + 20.0 * x), inner.standardise(params, outputs, x), rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lv.tangent(likelihoods.fixed(), rank=-1), "rank must be at least 0, got -1"),
        (lambda: lv.tangent(likelihoods.logistic(), rank=1), "no log_stddev: give a Gaussian one"),
        (lambda: lv.tangent(likelihoods.mixture(), rank=1), "no log_stddev"),
        (lambda: lv.tangent(likelihoods.discretised(likelihoods.fixed()), rank=1), "no log_stddev"),
        (lambda: lv.tangent(likelihoods.masked(likelihoods.fixed()), rank=1), "no log_stddev"),
        (lambda: lv.discretised(lv.tangent(likelihoods.fixed(), rank=1)), "train on dequantised images .--dequantize"),
        (lambda: lv.masked(lv.tangent(likelihoods.fixed(), rank=1)), "no log_each"),
    ],
)
def test_what_cannot_be_combined(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_diagnostics_see_correlated_residuals():
    """A model whose data are its own samples is calibrated; the same stddevs without U are not."""
    head = lv.tangent(lv.fixed(0.2), rank=1)
    vae = lv.mlp_vae((3,), head, latent_size=1, width=8, num_blocks=1)
    params = lv.init(KEY, vae)
    # z is ignored, and U = (1, 2, 2): the last layer has a bias alone.
    params["decoder"] = jax.tree.map(jnp.zeros_like, params["decoder"])
    bias = next(path for path, leaf in jax.tree.leaves_with_path(params["decoder"]) if leaf.shape == (6,))
    params["decoder"] = jax.tree.map_with_path(
        lambda path, leaf: jnp.array([0.0, 1.0, 0.0, 2.0, 0.0, 2.0]) if path == bias else leaf, params["decoder"]
    )
    x, _, stddevs = lv.generate(KEY, vae, params, num_samples=20_000)
    np.testing.assert_allclose(np.cov(x.T), 0.04 * np.eye(3) + np.outer([1, 2, 2], [1, 2, 2]), atol=0.15)
    np.testing.assert_allclose(stddevs[0], np.sqrt(0.04 + np.array([1.0, 4.0, 4.0])), rtol=1e-5)

    def found(x):
        return diagnostics.summarise(evaluation.examine(KEY, vae, params, x, jnp.arange(len(x)))[1])

    right, wrong = found(x), found(stddevs * jax.random.normal(KEY, x.shape))
    assert right.sigma_factor == pytest.approx(1.0, abs=0.02)
    np.testing.assert_allclose(right.coverage, diagnostics.INTERVALS, atol=0.02)
    assert wrong.sigma_factor > 1.5


# Linear Gaussian data in R^10: a trained model reaches probabilistic PCA with L + r factors

STDDEVS = np.array([5.0, 3.0, 2.0, 1.2, 0.4, 0.3, 0.3, 0.2, 0.1, 0.1])
SIZE, DIM, SIGMA, NUM_STEPS = 256, 10, 0.4, 6000


def gaussian_data():
    """[256, 10], whose own covariance has these principal stddevs."""
    rng = np.random.default_rng(0)
    white = rng.standard_normal((SIZE, DIM))
    white = np.linalg.qr(white - white.mean(0))[0] * np.sqrt(SIZE)
    return np.float32(white * STDDEVS @ np.linalg.qr(rng.standard_normal((DIM, DIM)))[0])


def linear_vae(latent_size, rank):
    """Affine maps, a stddev of q(z|x) that does not depend on x, and U that does not depend on z."""

    def encode(params, x):
        mean = x @ params["w"]
        return mean, jnp.broadcast_to(params["log_stddev"][None], mean.shape)

    def init_encoder(key):
        return {"w": 0.1 * jax.random.normal(key, (DIM, latent_size)), "log_stddev": jnp.zeros(latent_size)}

    def decode(params, z):
        factors = jnp.broadcast_to(params["u"][None], (len(z), DIM, rank))
        return jnp.concatenate([(z @ params["w"])[..., None], factors], axis=-1)

    def init_decoder(key):
        w_key, u_key = jax.random.split(key)
        w, u = jax.random.normal(w_key, (latent_size, DIM)), jax.random.normal(u_key, (DIM, rank))
        return {"w": 0.1 * w, "u": 0.1 * u}

    head = lv.tangent(lv.fixed(SIGMA), rank=rank)
    return lv.VAE(lv.Encoder(init_encoder, encode), lv.Decoder(init_decoder, decode), head, latent_size)


def exact_elbo(x, params):
    """The mean ELBO in nats, the expectation over z in closed form."""
    encoder, decoder = (jax.tree.map(np.float64, params[part]) for part in ("encoder", "decoder"))
    mean, stddev, w = x @ encoder["w"], np.exp(encoder["log_stddev"]), decoder["w"]
    covariance = SIGMA**2 * np.eye(DIM) + decoder["u"] @ decoder["u"].T
    residual = x - mean @ w
    second_moment = residual.T @ residual / len(x) + w.T @ np.diag(stddev**2) @ w
    log_det = np.linalg.slogdet(2.0 * np.pi * covariance)[1]
    log_likelihood = -0.5 * np.trace(np.linalg.solve(covariance, second_moment)) - 0.5 * log_det
    return log_likelihood - 0.5 * np.sum(mean**2 + stddev**2 - 1.0 - 2.0 * np.log(stddev), axis=1).mean()


@pytest.mark.parametrize(("latent_size", "rank"), [(0, 3), (2, 2), (3, 0)])
def test_linear_models_reach_the_limit_of_more_latent_dimensions(latent_size, rank):
    x, vae = gaussian_data(), linear_vae(latent_size, rank)
    optimizer = training.optimizer(NUM_STEPS, learning_rate=3e-2)

    def train(seed):
        def step(state, index):
            key = jax.random.fold_in(jax.random.key(1), index)
            return training.train_step(key, vae, optimizer, state, jnp.array(x), jnp.arange(SIZE))[0], None

        start = training.init_state(jax.random.key(seed), vae, optimizer)
        return jax.lax.scan(step, start, jnp.arange(NUM_STEPS))[0].params

    best = theory.linear_best_elbo(
        SIGMA, theory.principal_stddevs([x]), num_dimensions=DIM, latent_size=latent_size + rank
    )
    worse = theory.linear_best_elbo(
        SIGMA, theory.principal_stddevs([x]), num_dimensions=DIM, latent_size=latent_size + rank - 1
    )
    assert best - worse > 1.0
    params = jax.jit(jax.vmap(train))(jnp.arange(3))
    for seed in range(3):
        of_seed = jax.tree.map(lambda leaf, seed=seed: leaf[seed], params)
        assert best - 0.02 < exact_elbo(np.float64(x), of_seed) < best + 1e-5


# In the sweep

TINY = {"num_seeds": 1, "num_steps": 10, "batch_size": 16, "widths": (8,), "num_blocks": 1, "latent_size": 1}


def test_each_rank_is_a_variant():
    config = sweep.configure(variants=("tangent", "ls"), rank=(1, 10))
    assert config.variants == ("tangent_1", "tangent_10", "ls")
    assert config.rank == sweep.Config().rank, "the names tell"
    assert VARIANTS.in_order(config.variants) == ["ls", "tangent_1", "tangent_10"]
    assert VARIANTS["tangent_10"].title == "tangent VAE, rank 10"
    assert VARIANTS["tangent_10"].head(1.0).outputs == 12
    assert VARIANTS["tangent_10"] == VARIANTS["tangent_10"], "one program for all of its members"
    for wrong in ("tangent_", "tangent_x", "tangent_-1", "ls_3", "tangents"):
        assert wrong not in VARIANTS
        with pytest.raises(KeyError):
            VARIANTS[wrong]
    assert sweep.configure(variants=("tangent",)).variants == ("tangent_10",)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variants": ("ls",), "rank": (3,)}, "--rank is for tangent: add it to --variants, or leave --rank out"),
        (
            {"variants": ("tangent",), "rank": (1, 1)},
            "--variants=tangent_1,tangent_1: give at least one, and each",
        ),
        ({"variants": ("tangent",), "rank": (-1,)}, "unknown 'tangent_-1'"),
        ({"variants": ("tangent",), "dataset": "digits"}, "no probabilities: add --dequantize or --density"),
    ],
)
def test_bad_flags(options, message):
    with pytest.raises(command.UsageError, match=message):
        sigma_sweep.check(sweep.configure(**options))


def test_tangents_are_compared_on_the_ribbon(tmp_path):
    """With all figures, which other tests leave out."""
    config = sweep.configure(dataset="ribbon", variants=("tangent",), rank=(2,), **TINY)
    lines = []
    summary = sigma_sweep.run(config, run_dir=str(tmp_path / "run"), echo=lines.append)
    (member,), (row,) = summary.members, summary.rows
    assert member.variant == row.variant == "tangent_2"
    assert 0.0 < member.alignment <= 1.0 + 1e-6
    assert summary.entropy == pytest.approx(ribbon.entropy())
    assert row.gap > 0.0
    assert row.best_elbo is None, "its sigma is not one number"
    assert "tangent VAE, rank 2" in lines[-2]
    assert {file.stem for file in (tmp_path / "run/figures").iterdir()} == {"samples", "losses", "sigma", "elbo"}


def test_tangents_on_images_have_no_code_length(tmp_path):
    config = sweep.configure(
        dataset="digits", variants=("tangent",), rank=(2,), discretise=False, **TINY | {"widths": (4,)}
    )
    summary = sigma_sweep.run(config, run_dir=str(tmp_path / "run"), echo=lambda line: None)
    assert summary.members[0].code_elbo is None
    assert not summary.rows[0].is_code
    assert (tmp_path / "run/figures/samples.png").stat().st_size > 10_000


@pytest.mark.slow
def test_limit_of_ideal_networks_on_the_toy_stands():
    """An F-VAE with tangents stays below `toy.best_elbo`, and comes nearer to it than one without."""
    sigma, num_steps = 0.3, 1500
    found = {}
    for rank in (0, 1):
        vae = lv.mlp_vae((2,), lv.tangent(lv.fixed(sigma), rank=rank), latent_size=1, width=64, num_blocks=2)
        optimizer = training.optimizer(num_steps)
        batches = toy.sample(jax.random.split(KEY, num_steps * 100)).reshape(num_steps, 100, 2)
        state = training.init_state(KEY, vae, optimizer)
        steps = jax.jit(training.train_steps, static_argnums=(1, 2))
        params = steps(KEY, vae, optimizer, state, batches)[0].params
        x = toy.sample(jax.random.split(jax.random.key(5), 10_000))
        keys = jax.random.split(jax.random.key(6), len(x))
        elbo = np.float64(jax.jit(vae_lib.elbo, static_argnums=1)(keys, vae, params, x).elbo)
        found[rank] = elbo.mean(), elbo.std() / 100.0
    high = toy.best_elbo(sigma)[1]
    for mean, error in found.values():
        assert mean < high + 4.0 * error
    assert found[1][0] > high - 0.1
