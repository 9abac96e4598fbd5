"""New priors, correlated heads and conditioned networks need no change of the library: one of each, written here."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import integrate, stats

import lvae_jax as lv
from lvae_jax import diagnostics, evaluation
from lvae_jax import vae as vae_lib

KEY = jax.random.key(0)


# A prior of two components


def two_normals(distance=2.0):
    """(N(-m, I) + N(m, I)) / 2 with m learned: no closed form of its KL."""

    def components(params):
        return jnp.stack([-params["mean"], params["mean"]])

    def log_prob(params, z):
        squares = jnp.sum((z[:, None] - components(params)[None]) ** 2, axis=-1)
        log_density = -0.5 * squares - 0.5 * z.shape[-1] * jnp.log(2.0 * jnp.pi)
        return jax.nn.logsumexp(log_density, axis=1) - jnp.log(2.0)

    def kl(params, mean, log_stddev, z):
        return lv.sampled_kl(log_prob(params, z), mean, log_stddev, z)

    def sample(key, params, shape):
        sign_key, noise_key = jax.random.split(key)
        index = jax.random.randint(sign_key, shape[:1], 0, 2)
        return components(params)[index] + jax.random.normal(noise_key, shape)

    return lv.Prior(lambda key: {"mean": jnp.full((1,), distance)}, log_prob, kl, sample)


def vae_with(prior):
    return lv.mlp_vae((2,), lv.fixed(0.5), latent_size=1, prior=prior, width=8, num_blocks=1)


@pytest.fixture(scope="module")
def bimodal():
    vae = vae_with(two_normals())
    params = jax.tree.map(lambda leaf: 2.0 * leaf, lv.init(KEY, vae)) | {"likelihood": vae.likelihood.init()}
    return vae, params | {"prior": {"mean": jnp.array([1.5])}}


def log_evidence(vae, params, x):
    """log p(x), by scipy's quadrature of p(x|z) p(z)."""

    def density(z):
        outputs = vae.decoder.apply(params["decoder"], jnp.full((1, 1), z, jnp.float32))
        prior = 0.5 * (stats.norm.pdf(z, -1.5) + stats.norm.pdf(z, 1.5))
        return prior * np.exp(float(vae.likelihood.log_prob(params["likelihood"], outputs, x[None])[0]))

    return np.log(integrate.quad(density, -8.0, 8.0, limit=200, epsabs=1e-7)[0])


def test_every_bound_is_one_under_another_prior(bimodal):
    vae, params = bimodal
    x = jnp.array([0.3, -0.4])
    exact = log_evidence(vae, params, x)
    found = vae_lib.evidence(vae, params, x[None], num_nodes=400, reach=8.0)
    np.testing.assert_allclose(found, [exact], rtol=1e-4)
    keys, copies = jax.random.split(KEY, 20_000), jnp.tile(x[None], (20_000, 1))
    elbo = np.float64(jax.jit(lv.elbo, static_argnums=1)(keys, vae, params, copies).elbo)
    bound = functools.partial(lv.importance_bound, vae=vae, num_samples=64)
    tight = np.float64(
        jax.jit(lambda keys, params, x: bound(keys, params=params, x=x))(keys[:500], params, copies[:500])
    )
    assert elbo.mean() < exact + 4.0 * elbo.std() / np.sqrt(20_000)
    assert elbo.mean() < tight.mean() < exact + 4.0 * tight.std() / np.sqrt(500)
    assert tight.mean() == pytest.approx(exact, abs=0.02)


def test_samples_come_from_the_prior_of_the_model(bimodal):
    vae, params = bimodal
    z = vae.prior.sample(KEY, params["prior"], (20_000, 1))[:, 0]
    assert stats.kstest(z, lambda z: 0.5 * (stats.norm.cdf(z, -1.5) + stats.norm.cdf(z, 1.5))).pvalue > 1e-3
    outputs = vae.decoder.apply(params["decoder"], vae.prior.sample(jax.random.split(KEY)[0], params["prior"], (50, 1)))
    np.testing.assert_allclose(lv.generate(KEY, vae, params, num_samples=50)[1], outputs[..., 0], rtol=1e-6)


def test_prior_learns_and_adds_no_parameters_without_any():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(40, 2)), jnp.float32)
    vae, optimizer = vae_with(two_normals()), lv.optimizer(5)
    state = lv.init_state(KEY, vae, optimizer)
    trained, _ = lv.train_steps(KEY, vae, optimizer, state, jnp.tile(x[None], (5, 1, 1)))
    assert trained.params["prior"]["mean"] != state.params["prior"]["mean"]
    assert lv.init(KEY, vae_with(lv.standard_normal())).keys() == {"encoder", "decoder", "likelihood"}
    plain = lv.init(KEY, vae_with(lv.standard_normal()))
    jax.tree.map(np.testing.assert_array_equal, plain["decoder"], state.params["decoder"])


# A head with a full covariance in the plane

ROOT = np.array([[0.5, 0.0], [0.7, 0.2]])


def correlated():
    """N(mean, L L^T), the same L everywhere."""
    root = jnp.asarray(ROOT, jnp.float32)

    def standardise(params, outputs, x):
        return jax.scipy.linalg.solve_triangular(root, (x - outputs[..., 0]).T, lower=True).T

    def log_prob(params, outputs, x):
        squares = jnp.sum(standardise(params, outputs, x) ** 2, axis=-1)
        return -0.5 * squares - jnp.log(2.0 * jnp.pi) - jnp.sum(jnp.log(jnp.diagonal(root)))

    def sample(key, params, outputs):
        noise = jax.random.normal(key, outputs.shape[:-1])
        return outputs[..., 0] + noise @ root.T

    def stddev(params, outputs):
        return jnp.broadcast_to(jnp.sqrt(jnp.sum(root**2, axis=-1)), outputs.shape[:-1])

    return lv.Likelihood(
        outputs=1,
        floor=0.0,
        init=dict,
        update=lambda params, step, mse: params,
        mean=lambda params, outputs: outputs[..., 0],
        stddev=stddev,
        log_prob=log_prob,
        sample=sample,
        standardise=standardise,
    )


def test_correlated_head_is_judged_by_residuals_without_correlations():
    """Data of the model itself are calibrated, although each coordinate alone would say so of a wrong model too."""
    vae = lv.mlp_vae((2,), correlated(), latent_size=1, width=8, num_blocks=1)
    params = lv.init(KEY, vae)
    params["decoder"] = jax.tree.map(jnp.zeros_like, params["decoder"])  # z is ignored: p(x) is the head's
    noise = np.random.default_rng(0).standard_normal((20_000, 2))

    def found(x):
        _, details = evaluation.examine(KEY, vae, params, jnp.asarray(x, jnp.float32), jnp.arange(len(x)))
        return diagnostics.summarise(details)

    right, wrong = found(noise @ ROOT.T), found(noise * np.sqrt(np.sum(ROOT**2, axis=1)))
    assert right.sigma_factor == pytest.approx(1.0, abs=0.02)
    np.testing.assert_allclose(right.coverage, diagnostics.INTERVALS, atol=0.02)
    assert wrong.sigma_factor > 1.5, "the same stddevs, without the correlation"
    with pytest.raises(ValueError, match="no log_mass"):
        lv.discretised(vae.likelihood)


def test_evidence_factors_a_covariance_once_for_each_node():
    """Not once for each node and example: what depends on the decoder's outputs alone has no axis of examples."""

    def log_prob(params, outputs, x):
        covariance = jnp.eye(2)[None] + outputs[..., 0, None] * outputs[..., None, :, 0]
        root = jnp.linalg.cholesky(covariance)
        gap = jax.scipy.linalg.solve_triangular(root, x[..., None], lower=True)[..., 0]
        return -0.5 * jnp.sum(gap**2, axis=-1) - jnp.sum(jnp.log(jnp.diagonal(root, axis1=-2, axis2=-1)), axis=-1)

    vae = lv.mlp_vae((2,), correlated()._replace(log_prob=log_prob), latent_size=1, width=8, num_blocks=1)
    params, x = lv.init(KEY, vae), jnp.zeros((7, 2))
    jaxpr = jax.make_jaxpr(lambda x: vae_lib.evidence(vae, params, x, num_nodes=11))(x)
    shapes = [
        equation.outvars[0].aval.shape
        for equation in jax.tree_util.tree_leaves(list(equations(jaxpr.jaxpr)))
        if equation.primitive.name == "cholesky"
    ]
    assert shapes == [(11, 2, 2)]


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


# Networks that read a condition


def shifted(vae):
    """The decoder's mean moves by the condition, and the encoder takes it away again."""

    def encode(params, x, condition):
        return vae.encoder.apply(params, x - condition)

    def decode(params, z, condition):
        return vae.decoder.apply(params, z) + condition[..., None]

    return vae._replace(encoder=vae.encoder._replace(apply=encode), decoder=vae.decoder._replace(apply=decode))


def test_condition_reaches_encoder_and_decoder():
    plain = lv.mlp_vae((2,), lv.fixed(0.5), latent_size=2, width=8, num_blocks=1)
    vae, params = shifted(plain), jax.tree.map(lambda leaf: 2.0 * leaf, lv.init(KEY, plain))
    x, condition = jax.random.normal(KEY, (5, 2)), jnp.arange(10.0).reshape(5, 2)
    keys = jax.random.split(KEY, 5)
    expected, found = lv.elbo(keys, plain, params, x), lv.elbo(keys, vae, params, x + condition, condition=condition)
    np.testing.assert_allclose(found.elbo, expected.elbo, rtol=1e-4)
    np.testing.assert_allclose(found.mean, expected.mean + condition, rtol=1e-5, atol=1e-5)
    mean, _ = lv.reconstruct(vae, params, x + condition, condition=condition)
    np.testing.assert_allclose(mean, lv.reconstruct(plain, params, x)[0] + condition, rtol=1e-5, atol=1e-5)
    samples, *_ = lv.generate(KEY, vae, params, num_samples=5, condition=condition)
    np.testing.assert_allclose(samples, lv.generate(KEY, plain, params, num_samples=5)[0] + condition, atol=1e-5)


# Training steps as one scan


def test_steps_in_one_scan_or_in_several_are_single_steps():
    vae, optimizer = vae_with(lv.standard_normal()), optax.adam(1e-2)
    batches, state = jax.random.normal(KEY, (6, 10, 2)), lv.init_state(KEY, vae, optimizer, ema_decay=0.9)
    options = {"beta": lambda step: 0.1 * step, "ema_decay": 0.9}
    at_once = jax.jit(lambda state, batches: lv.train_steps(KEY, vae, optimizer, state, batches, **options))
    whole, metrics = at_once(state, batches)
    halves = at_once(at_once(state, batches[:3])[0], batches[3:])[0]
    single = jax.jit(lambda key, state, x: lv.train_step(key, vae, optimizer, state, x, jnp.arange(10), **options))
    elbos = []
    for number, x in enumerate(batches):
        state, of_step = single(jax.random.fold_in(KEY, number), state, x)
        elbos.append(of_step.scores.elbo)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), (whole, halves), (state, state))
    np.testing.assert_allclose(metrics.scores.elbo, elbos, rtol=1e-5)
