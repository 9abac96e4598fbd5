"""The hypersphere experiment, end to end: its numbers beside Theorem 1's by scipy, and given nonsense."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import call, filled, interruption, run_command
from scipy import optimize, special

from experiments import command, hypersphere, loop, results
from experiments.results import SphereMember, SphereSummary
from lvae_jax import datasets, likelihoods, networks, runs, theory
from lvae_jax import vae as vae_lib

SMALL = hypersphere.Config(dims=(3,), sigma=(0.3, 1.3), radius=2.0, num_seeds=1, seed=3, num_steps=20, batch_size=20)


def compute(config, run_dir, **pace):
    lines = []
    summary = hypersphere.run(config, run_dir=str(run_dir), echo=lines.append, pace=loop.Pace(**pace))
    return summary, "\n".join(lines)


def theorem(sigma, radius, dim):
    """The best radius and ELBO by Theorem 1: modified Bessel functions and a search for the root."""

    def ratio(k):
        return special.ive(dim / 2, k) / special.ive(dim / 2 - 1, k)

    if sigma >= radius / np.sqrt(dim):
        rho = 0.0
    else:
        # k = rho R / sigma^2: the equation divided by rho, which has no root at 0.
        k = optimize.brentq(lambda k: ratio(k) / k - (sigma / radius) ** 2, 1e-6, dim * (radius / sigma) ** 2)
        rho = k * sigma**2 / radius
    k = max(rho * radius / sigma**2, 1e-9)
    order = dim / 2 - 1
    log_mean = special.gammaln(dim / 2) + order * np.log(2.0 / k) + np.log(special.ive(order, k)) + k
    return rho, log_mean - (radius**2 + rho**2) / (2.0 * sigma**2) - dim / 2 * np.log(2.0 * np.pi * sigma**2)


def assert_not_better_than_theory(member, radius):
    """The spread of an ELBO is mostly that of |x - mu|^2 / (2 sigma^2), which lies between those of |mu| = radius of
    the outputs on the near and on the far side of the sphere."""
    half_range = 2.0 * radius * member.posterior_radius / member.sigma**2
    assert member.elbo < member.exact_elbo + 4.0 * half_range / np.sqrt(datasets.TEST_SIZE) + 1e-4


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """A finished run of SMALL by the command, and what it printed."""
    run_dir = tmp_path_factory.mktemp("hypersphere") / "run"
    words = ["--dims=3", "--sigma=0.3,1.3", "--radius=2", "--num_seeds=1", "--seed=3", "--num_steps=20"]
    result = run_command("experiments.hypersphere", *words, "--batch_size=20", f"--run_dir={run_dir}")
    assert result.returncode == 0, result.stderr
    return run_dir, result


def test_command(small_run):
    run_dir, result = small_run
    summary = results.read(run_dir / "summary.json", SphereSummary)
    members = summary.members
    assert [(m.dim, m.variant, m.seed) for m in members] == [(3, v, 3) for v in ("f", "f", "ls", "ls")]
    critical = 2.0 / np.sqrt(3)
    for member in members:
        sigma = member.sigma
        radius, elbo = theorem(sigma, 2.0, 3)
        assert member.relative_sigma == pytest.approx(sigma / critical)
        assert member.exact_radius == pytest.approx(radius, rel=1e-4)
        assert member.exact_elbo == pytest.approx(elbo, rel=1e-4)
        assert (member.exact_radius == 0.0) == (member.relative_sigma >= 1.0)
        assert member.kl >= 0.0
        assert member.elbo == pytest.approx(member.log_likelihood - member.kl, abs=1e-3)
        assert_not_better_than_theory(member, 2.0)
        assert member.radius > 0.0
        assert member.posterior_radius > 0.0
    np.testing.assert_allclose([member.start for member in members], [0.3, 1.3, np.sqrt(3), 0.5])
    np.testing.assert_allclose([member.relative_sigma for member in members[:2]], [0.3, 1.3], rtol=1e-6)
    for row in summary.rows:
        for name in ("radius", "elbo", "exact_radius", "exact_elbo", "kl"):
            assert f"{getattr(row, name):.4f}" in result.stdout
    assert len(summary.rows) == len(members)
    assert f"for z ~ q(z|x) of {datasets.TEST_SIZE} test examples" in " ".join(result.stdout.split())
    assert "+-" not in result.stdout, "one seed has no spread"
    for name in ("objective", "radius"):
        assert (run_dir / "figures" / f"{name}.png").stat().st_size > 10_000
    lines = runs.read_metrics(run_dir)
    assert len(lines) == 4 * 20
    assert {line["group"] for line in lines} == {"f-3", "ls-3"}


def test_finished_run_is_only_reported(small_run, monkeypatch):
    run_dir, first = small_run
    before = {file: file.stat().st_mtime_ns for file in run_dir.rglob("*")}
    monkeypatch.delattr(hypersphere, "train_all")
    summary, text = compute(SMALL, run_dir)
    assert summary == results.read(run_dir / "summary.json", SphereSummary)
    assert text.splitlines()[0] == f"{run_dir} is finished"
    assert hypersphere.table(summary) in first.stdout
    assert hypersphere.table(summary) in text
    with pytest.raises(runs.RunError, match=r"radius was 2\.0 and is 1\.0") as error:
        compute(SMALL._replace(radius=1.0), run_dir)
    assert "\n" not in str(error.value)
    assert {file: file.stat().st_mtime_ns for file in run_dir.rglob("*")} == before


def test_interrupted_run_resumes_to_the_same_bits(small_run, tmp_path):
    with interruption(group="ls-3", after=10):
        compute(SMALL, tmp_path, checkpoint_seconds=0.0)
    assert not (tmp_path / "summary.json").exists()
    resumed, _ = compute(SMALL, tmp_path)
    assert resumed.members == results.read(small_run[0] / "summary.json", SphereSummary).members
    assert runs.read_metrics(tmp_path) == runs.read_metrics(small_run[0])


def test_every_sphere_is_trained(tmp_path, monkeypatch):
    """With every sigma and seed, in units of its own critical sigma; without the training itself."""
    trained = []

    def evaluate(variant, group, dataset, states, radius):
        trained.append((group.name, dataset.shape, radius, group.seeds.tolist(), group.sigmas.tolist()))
        return []

    monkeypatch.setattr(hypersphere, "Programs", lambda dataset, *arguments, **options: dataset)
    monkeypatch.setattr(loop, "fit", lambda *arguments, **options: (None, None))
    monkeypatch.setattr(hypersphere, "evaluate", evaluate)
    compute(SMALL._replace(dims=(2, 5), num_seeds=2), tmp_path)
    for dim, (f, ls) in zip((2, 5), (trained[:2], trained[2:]), strict=True):
        assert f[:-1] == (f"f-{dim}", (dim,), 2.0, [3, 4, 3, 4])
        assert ls[:-1] == (f"ls-{dim}", (dim,), 2.0, [3, 4, 3, 4])
        critical = 2.0 / np.sqrt(dim)
        np.testing.assert_allclose(f[-1], np.array([0.3, 0.3, 1.3, 1.3]) * critical)
        np.testing.assert_allclose(ls[-1], [2.0, 2.0, 0.5 * critical, 0.5 * critical])


def test_no_steps_draw_exact_figures(tmp_path):
    summary, text = compute(hypersphere.Config(num_steps=0), tmp_path / "run")
    assert summary.rows == summary.members == []
    assert "nothing was trained (--num_steps=0)" in text
    assert not (tmp_path / "run" / "checkpoints").exists()
    for name in ("objective", "radius"):
        assert (tmp_path / "run" / "figures" / f"{name}.png").stat().st_size > 10_000


@pytest.mark.parametrize(("dim", "radius"), [(2, 1.0), (3, 3.0), (10, 3.0)])
def test_curves_are_those_of_theorem_1(dim, radius):
    member = filled(SphereMember, dim=dim, variant="f", relative_sigma=0.5, radius=2.4, elbo=-1.5)
    drawn = hypersphere.exact(dim, hypersphere.Config(radius=radius), [member])
    inner = drawn.sigma[::25]
    critical = radius / np.sqrt(dim)
    expected = np.array([theorem(fraction * critical, radius, dim) for fraction in inner]).T
    np.testing.assert_allclose(drawn.radius[::25], expected[0] / radius, rtol=1e-4, atol=2e-3)
    np.testing.assert_allclose(drawn.elbo[::25], expected[1], rtol=1e-4, atol=1e-3)
    assert drawn.objective.shape == (len(drawn.map_sigma), len(drawn.map_rho))
    best = drawn.map_rho[drawn.objective.argmax(axis=1)]
    exact = [theorem(fraction * critical, radius, dim)[0] / radius for fraction in drawn.map_sigma]
    # Where the ridge leaves 0 it is so flat that float32 sees a plateau.
    far = np.abs(drawn.map_sigma - 1.0) > 0.03
    np.testing.assert_allclose(best[far], np.array(exact)[far], atol=0.02)
    ((sigmas, radii, elbos),) = drawn.trained.values()
    np.testing.assert_allclose([sigmas[0], radii[0], elbos[0]], [0.5, 2.4 / radius, -1.5])


def test_rows_are_means_over_seeds():
    rng = np.random.default_rng(0)
    names = ("sigma", "relative_sigma", "radius", "posterior_radius", "exact_radius", "elbo", "exact_elbo", "kl")
    members = [
        filled(
            SphereMember,
            dim=dim,
            variant=variant,
            seed=seed,
            start=start,
            **dict(zip(names, rng.normal(size=len(names)), strict=True)),
        )
        for dim in (2, 3)
        for variant, start in (("f", 0.5), ("f", 1.3), ("ls", 0.5))
        for seed in range(3)
    ]
    rows = hypersphere.rows(members)
    assert [(row.dim, row.variant, row.start) for row in rows] == [
        (dim, variant, start) for dim in (2, 3) for variant, start in (("f", 0.5), ("f", 1.3), ("ls", 0.5))
    ]
    for index, row in enumerate(rows):
        part = members[3 * index : 3 * index + 3]
        assert row.num_seeds == 3
        for name in names:
            assert getattr(row, name) == pytest.approx(np.mean([getattr(member, name) for member in part]))
        for name in ("radius", "elbo"):
            expected = np.std([getattr(member, name) for member in part], ddof=1)
            assert getattr(row, f"{name}_over_seeds_sd") == pytest.approx(expected)
    text = hypersphere.table(filled(SphereSummary, rows=rows, num_test_examples=7))
    assert text.count("+-") == 2 * len(rows) + 1
    assert max(map(len, text.splitlines())) <= 118
    assert len({len(line) for line in text.splitlines()[: 1 + len(rows)]}) == 1, "columns are aligned"
    (alone,) = hypersphere.rows(members[:1])
    assert alone.radius_over_seeds_sd == alone.elbo_over_seeds_sd == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dims": (1,)}, "--dims=1: every value must be at least 2"),
        ({"dims": (2, 2)}, "--dims=2,2: give"),
        ({"dims": ()}, "--dims=: give"),
        ({"sigma": (0.0,)}, "--sigma=0: every value must be a number from 0.001 to 1000"),
        ({"sigma": (0.3, 0.3)}, "--sigma=0.3,0.3: give"),
        ({"sigma": (float("nan"),)}, "--sigma=nan: every value must be a number"),
        ({"sigma": ()}, "--sigma=: give"),
        ({"radius": -1.0}, "--radius=-1: must be a number"),
        ({"radius": float("inf")}, "--radius=inf: must be a number"),
        ({"radius": 5.0}, "--radius=5: LS-VAEs here learn sigmas from half the critical one"),
        ({"radius": 0.005, "dims": (3,)}, "--radius=0.005: LS-VAEs here learn"),
        ({"num_seeds": 0}, "--num_seeds=0: must be at least 1"),
        ({"num_steps": -1}, "--num_steps=-1: must be at least 0"),
        ({"batch_size": 0}, "--batch_size=0: must be at least 1"),
        ({"latent_size": 0}, "--latent_size=0: must be at least 1"),
        ({"seed": -1}, "--seed=-1: must be from 0"),
        ({"seed": 2**31 - 1}, "--seed=2147483647: must be from 0"),
    ],
)
def test_nonsense_is_refused(tmp_path, change, message):
    with pytest.raises(command.UsageError, match=message) as error:
        compute(SMALL._replace(**change), tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--dims=two", "--dims=two: must be a whole number"),
        ("--dims=1", "--dims=1: every value must be at least 2"),
        ("--sigma=0.3,0.3", "--sigma=0.3,0.3: give at least one, and each only once"),
    ],
)
def test_bad_flags(tmp_path, words, message):
    with pytest.raises(command.UsageError, match=message):
        call(hypersphere, [words, f"--run_dir={tmp_path / 'run'}"])
    assert not (tmp_path / "run").exists()


def test_command_ends_in_one_line(tmp_path):
    result = run_command("experiments.hypersphere", "--dims=1", f"--run_dir={tmp_path / 'run'}")
    assert result.returncode != 0
    assert "--dims=1: every value must be at least 2" in result.stderr
    assert result.stderr.startswith("hypersphere: ")
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_trained_radius(tmp_path):
    config = hypersphere.Config(dims=(2,), sigma=(0.3, 1.3), num_seeds=1, num_steps=1500)
    members = compute(config, tmp_path / "run")[0].members
    below, above = members[:2]
    assert below.radius == pytest.approx(theorem(0.3 / np.sqrt(2.0), 1.0, 2)[0], rel=0.02)
    assert above.radius < 0.02
    assert above.posterior_radius < 0.02
    assert above.elbo == pytest.approx(theorem(1.3 / np.sqrt(2.0), 1.0, 2)[1], abs=0.01)
    for member in members:
        assert_not_better_than_theory(member, 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("relative_sigma", [0.5, 0.85])
def test_radius_with_exact_posterior(relative_sigma):
    """A decoder trained on log p(x) by quadrature, which has no Gaussian posterior to suffer from."""
    sigma, steps, circle = relative_sigma * theory.critical_sigma(dim=2), 1500, datasets.sphere_stream(2)
    decoder = networks.mlp_decoder((2,), 1, 1, width=64, num_blocks=2)
    none = networks.Encoder(lambda key: {}, lambda params, x: (jnp.zeros((len(x), 1)), jnp.zeros((len(x), 1))))
    model = vae_lib.VAE(none, decoder, likelihoods.fixed(sigma), 1)
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, steps))

    @jax.jit
    def step(params, opt_state, index):
        x = circle.batch(None, jax.random.fold_in(jax.random.key(1), index), jnp.arange(100))
        loss = lambda params: -vae_lib.evidence(model, params, x, num_nodes=200, reach=5.0).mean()  # noqa: E731
        updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state)
        return optax.apply_updates(params, updates), opt_state

    params = vae_lib.init(jax.random.key(0), model)
    opt_state = optimizer.init(params)
    for index in range(steps):
        params, opt_state = step(params, opt_state, index)
    _, means, _ = vae_lib.generate(jax.random.key(2), model, params, num_samples=10_000)
    radius = np.linalg.norm(means, axis=-1).mean()
    np.testing.assert_allclose(radius, theory.optimal_radius(sigma, dim=2), rtol=0.01)
    log_prob = vae_lib.evidence(model, params, jnp.asarray(circle.test[:2000]), num_nodes=400, reach=5.0)
    np.testing.assert_allclose(log_prob.mean(), theory.best_elbo(sigma, dim=2), atol=2e-3)
