"""Data in any unit: heads and models in the unit of the data, and whole runs that do not depend on it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import scipy.stats
from conftest import arrays_in

import lvae_jax as lv
from experiments import command, critical_sigma, generate, report, sigma_sweep, survey
from lvae_jax import datasets, likelihoods, theory

CENTRE, SCALE = np.array([300.0, -2.0, 0.0]), 40.0
HEADS = {name: (head, sigma) for name, head in lv.HEADS.items() for sigma in (0.7,)}


def outputs_and_data(head, seed=0):
    rng = np.random.default_rng(seed)
    outputs = jnp.asarray(rng.normal(size=(5, 3, head.outputs)), jnp.float32)
    return outputs, jnp.asarray(CENTRE[None] + SCALE * rng.normal(size=(5, 3)), jnp.float32)


def test_rescaled_density_against_scipy():
    head = likelihoods.rescaled(lv.fixed(0.5), centre=CENTRE, scale=SCALE)
    outputs, x = outputs_and_data(head)
    params = head.init()
    mean = CENTRE + SCALE * np.asarray(outputs[..., 0], np.float64)
    expected = scipy.stats.norm(mean, 0.5 * SCALE).logpdf(np.asarray(x, np.float64)).sum(axis=1)
    np.testing.assert_allclose(head.log_prob(params, outputs, x), expected, rtol=1e-5)
    np.testing.assert_allclose(head.mean(params, outputs), mean, rtol=1e-6)
    np.testing.assert_allclose(head.stddev(params, outputs), 0.5 * SCALE, rtol=1e-6)


@pytest.mark.parametrize("name", lv.HEADS)
def test_every_head_in_other_units_is_the_same_model(name):
    inner = lv.HEADS[name](0.7)
    head = likelihoods.rescaled(inner, centre=CENTRE, scale=SCALE)
    outputs, x = outputs_and_data(inner)
    params, scaled = inner.init(), (x - CENTRE[None]) / SCALE
    log_det = 3 * np.log(SCALE)
    np.testing.assert_allclose(
        head.log_prob(params, outputs, x), inner.log_prob(params, outputs, scaled) - log_det, rtol=1e-4
    )
    np.testing.assert_allclose(head.stddev(params, outputs), SCALE * inner.stddev(params, outputs), rtol=1e-6)
    key = jax.random.key(0)
    drawn = CENTRE[None] + SCALE * inner.sample(key, params, outputs)
    np.testing.assert_allclose(head.sample(key, params, outputs), drawn, rtol=1e-5, atol=1e-3)
    step, mse = jnp.array(3), jnp.array(4.0)
    for mine, theirs in zip(
        jax.tree.leaves(head.update(params, step, SCALE**2 * mse)),
        jax.tree.leaves(inner.update(params, step, mse)),
        strict=True,
    ):
        np.testing.assert_allclose(mine, theirs, rtol=1e-6)
    assert head.floor == pytest.approx(SCALE * inner.floor)
    with pytest.raises(ValueError, match="log_mass"):
        lv.discretised(head)


def test_residuals_of_a_head_with_correlations_have_no_unit():
    inner = lv.fixed(0.5)._replace(standardise=lambda params, outputs, x: 2.0 * (x - outputs[..., 0]))
    head = likelihoods.rescaled(inner, centre=CENTRE, scale=SCALE)
    outputs, x = outputs_and_data(head)
    expected = 2.0 * ((x - CENTRE[None]) / SCALE - outputs[..., 0])
    np.testing.assert_allclose(head.standardise({}, outputs, x), expected, rtol=1e-5, atol=1e-5)


def test_rescaled_model_is_the_model_of_scaled_data():
    inner = lv.mlp_vae((3,), lv.learned_vector(), latent_size=2, width=8, num_blocks=1)
    vae = lv.rescaled(inner, centre=CENTRE, scale=SCALE)
    params, keys = lv.init(jax.random.key(0), inner), jax.random.split(jax.random.key(1), 5)
    _, x = outputs_and_data(inner.likelihood)
    mine, theirs = lv.elbo(keys, vae, params, x), lv.elbo(keys, inner, params, (x - CENTRE[None]) / SCALE)
    np.testing.assert_allclose(mine.elbo, theirs.elbo - 3 * np.log(SCALE), rtol=1e-4)
    np.testing.assert_allclose(mine.kl, theirs.kl, rtol=1e-5)
    np.testing.assert_allclose(mine.residual, theirs.residual, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(mine.mean, CENTRE[None] + SCALE * theirs.mean, rtol=1e-5)
    for wrong in (0.0, -1.0, np.inf):
        with pytest.raises(ValueError, match="scale must be a positive number"):
            lv.rescaled(inner, centre=0.0, scale=wrong)


TINY = {"num_seeds": 1, "num_steps": 60, "latent_size": 2, "widths": (8,), "num_blocks": 1, "batch_size": 32}
LINE = np.random.default_rng(1).normal(size=(400, 1)) * np.array([[1.0, 0.5, -1.0]])
DATA = LINE + 0.1 * np.random.default_rng(2).normal(size=(400, 3)) + np.array([[0.0, 5.0, 1.0]])


def sweep_without_figures(config, **options):
    """The summary of the sweep: drawing takes longer than the training of a small one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "draw", lambda *arguments, **options: None)
        return sigma_sweep.run(config, **options)


@pytest.fixture(scope="module")
def sweeps(tmp_path_factory):
    """Sweeps of the same points in three units, by the factor of the unit."""
    results = {}
    for factor in (1.0, 1e3, 1e-3):
        folder = tmp_path_factory.mktemp("own")
        np.save(folder / "points.npy", factor * DATA)
        config = sigma_sweep.configure(
            dataset=str(folder / "points.npy"), sigma=(0.2 * factor,), variants=("f", "lv"), **TINY
        )
        lines = []
        summary = sweep_without_figures(config, run_dir=str(folder / "run"), echo=lines.append)
        results[factor] = folder, config, summary, lines
    return results


@pytest.mark.parametrize("factor", [1e3, 1e-3])
def test_results_do_not_depend_on_the_unit(factor, sweeps):
    """The same models to what float32 keeps: ELBOs shifted by n log of the factor, sigmas multiplied by it."""
    for one, other in zip(sweeps[1.0][2].members, sweeps[factor][2].members, strict=True):
        assert other.elbo == pytest.approx(one.elbo - 3 * np.log(factor), abs=0.02)
        assert other.kl == pytest.approx(one.kl, abs=0.02)
        assert other.sigma_mean == pytest.approx(factor * one.sigma_mean, rel=0.01)
        assert other.mse == pytest.approx(factor**2 * one.mse, rel=0.02)
        assert other.sliced_wasserstein == pytest.approx(factor * one.sliced_wasserstein, rel=0.05)
    assert sweeps[factor][2].scale == pytest.approx(factor * sweeps[1.0][2].scale)


def test_learned_sigmas_start_at_the_scale_of_the_data(sweeps):
    folder, _, summary, _ = sweeps[1e3]
    lines = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    starts = [line["sigma_mean"] for line in lines if line["group"] == "lv" and line["step"] == 1]
    assert len(starts) == 1
    np.testing.assert_allclose(starts, summary.scale, rtol=0.05)


def test_a_run_of_own_points_generates_in_its_unit(sweeps, tmp_path):
    folder, _, summary, _ = sweeps[1e3]
    generate.run(str(folder / "run"), out=str(tmp_path / "out"), num_samples=500, images=[str(folder / "points.npy")])
    arrays = arrays_in(tmp_path / "out" / "lv-seed0.npz")
    assert arrays["samples"].shape == (500, 3)
    np.testing.assert_allclose(arrays["samples"].mean(axis=0), 1e3 * DATA.mean(axis=0), atol=0.3 * summary.scale)
    error = np.sqrt(np.mean((arrays["reconstructions"] - 1e3 * DATA) ** 2))
    assert error < summary.scale
    assert (tmp_path / "out" / "lv-seed0.png").stat().st_size > 10_000


def test_a_finished_run_is_reported_wherever_its_data_lie(sweeps, tmp_path):
    folder, config, summary, _ = sweeps[1.0]
    np.save(tmp_path / "points.npy", DATA)
    moved = config._replace(dataset=str(tmp_path / "points.npy"))
    lines = []
    assert sigma_sweep.run(moved, run_dir=str(folder / "run"), echo=lines.append) == summary
    assert "is finished" in lines[0]
    np.save(tmp_path / "points.npy", DATA + 1.0)
    with pytest.raises(sigma_sweep.runs.RunError, match="own_files was"):
        sigma_sweep.run(moved, run_dir=str(folder / "run"))


def test_critical_sigma_takes_the_same_file(sweeps, tmp_path):
    folder, _, summary, lines = sweeps[1e3]
    config = critical_sigma.Config(dataset=str(folder / "points.npy"))
    found = critical_sigma.run(config, run_dir=str(tmp_path / "run"), echo=lambda line: None)
    train = datasets.load(str(folder / "points.npy")).train.astype(np.float64)
    largest = np.sqrt(np.linalg.eigvalsh(np.cov(train.T, bias=True))[-1])
    assert found.critical_sigma == pytest.approx(largest, rel=1e-4)
    assert f"critical sigma {largest:.4g}; of 3 directions a fixed sigma of 200 can use" in lines[0]
    assert found.unit == summary.unit


def test_survey_counts(tmp_path):
    x = np.random.default_rng(0).integers(0, 200, (30, 4, 4, 1), dtype=np.uint8)
    x[:, 0, 0] = 7
    train = np.concatenate([x[:20], x[:3]])
    data = datasets.image_dataset(train, np.concatenate([x[20:], x[5:7]]))
    found = survey.survey(data)
    assert (found.num_constant, found.num_repeats, found.num_shared) == (1, 3, 2)
    assert (found.low, found.high) == pytest.approx((x.min() / 255, x.max() / 255))
    np.testing.assert_allclose(found.principal_stddevs, theory.principal_stddevs([train / 255.0]), rtol=1e-4, atol=1e-6)
    words = survey.text(found, (0.1, 100.0))
    assert "23 training and 12 test examples of shape [4, 4, 1]" in words
    assert "256 grey levels" in words
    assert "1 of 16 dimensions do not vary, 3 training examples repeat an earlier one, 2 test examples are" in words
    assert "100 can use 0" in words


def test_survey_leaves_out_what_takes_long(monkeypatch):
    data = datasets.point_dataset(DATA[:300].astype(np.float32), DATA[300:].astype(np.float32))
    monkeypatch.setattr(survey, "LARGEST_COVARIANCE", 100)
    found = survey.survey(data)
    assert found.principal_stddevs is None
    assert "experiments.critical_sigma computes it" in survey.text(found, (0.1,))


GAPS = np.random.default_rng(3).random(DATA.shape) < 0.3
GAPS[:, 0] &= ~GAPS.all(axis=1)


def masked_run(folder, factor, run=sigma_sweep.run):
    """A run of points with gaps, in a unit: its config, its summary and what it printed."""
    np.save(folder / f"{factor}.npy", factor * np.where(GAPS, np.nan, DATA))
    more = TINY | {"num_steps": 400, "num_importance_samples": 4}
    config = sigma_sweep.configure(
        dataset=str(folder / f"{factor}.npy"), sigma=(0.2 * factor,), variants=("f", "lv"), mask=True, **more
    )
    lines = []
    return config, run(config, run_dir=str(folder / f"run{factor}"), echo=lines.append), "\n".join(lines)


def test_missing_values_are_left_out_and_imputed(tmp_path):
    config, summary, said = masked_run(tmp_path, 1.0)
    _, scaled, _ = masked_run(tmp_path, 1e3, sweep_without_figures)
    data = datasets.load(config.dataset, mask=True)
    observed = 3.0 * (1.0 - np.isnan(data.test).mean())
    for one, other in zip(summary.members, scaled.members, strict=True):
        assert other.elbo == pytest.approx(one.elbo - observed * np.log(1e3), abs=0.1)
        assert one.importance_bound > one.elbo
        assert one.sliced_wasserstein is None
    assert f"{np.isnan(np.concatenate([data.train, data.test])).mean():.1%} of the values are missing" in said
    assert "critical sigma: left out, it needs all values" in said
    assert f"{summary.missing:.1%} of the test values are missing" in said
    assert "Both in the unit of the data." in " ".join(said.split())
    assert summary.rows[0].elbo_paper is None
    assert (tmp_path / "run1.0" / "figures" / "elbo.png").exists()
    lines = []
    assert sigma_sweep.run(config, run_dir=str(tmp_path / "run1.0"), echo=lines.append) == summary
    options = {"variants": ["lv"], "images": [config.dataset], "num_samples": 10}
    generate.run(str(tmp_path / "run1.0"), out=str(tmp_path / "out"), **options, echo=lines.append)
    arrays = arrays_in(tmp_path / "out" / "lv-seed0.npz")
    assert np.isfinite(arrays["elbos"]).all()
    error = (arrays["reconstructions"] - DATA)[GAPS]
    spread = (DATA - DATA.mean(axis=0))[GAPS]
    assert np.mean(error**2) < 0.5 * np.mean(spread**2), "closer than the mean of their dimension"


@pytest.mark.parametrize(
    ("change", "mask", "message"),
    [
        (lambda x: x, False, "the first is 1: leave them out, or, if NaN marks a missing value, train with `mask`"),
        (lambda x: np.where(np.arange(3) == 2, np.inf, x), True, "not finite, the first is 0: leave them out$"),
        (lambda x: np.where(np.arange(10)[:, None] == 4, np.nan, x), True, "example 4 has no value at all: leave"),
        (lambda x: np.where(np.arange(3) == 2, np.nan, x), True, "dimension 2 has no value at all: leave"),
        (lambda x: np.where(np.isnan(x), x, 7.0), True, "are the same: give examples that differ"),
    ],
)
def test_gaps_that_leave_nothing_to_learn_from_are_refused(change, mask, message, tmp_path):
    x = np.random.default_rng(0).normal(size=(10, 3))
    x[1, 0] = np.nan
    np.save(tmp_path / "x.npy", change(x))
    with pytest.raises(datasets.DatasetError, match=message):
        datasets.load(str(tmp_path / "x.npy"), mask=mask)


def test_dimension_without_a_training_value_is_refused(tmp_path):
    x = np.random.default_rng(0).normal(size=(10, 3))
    np.savez(tmp_path / "x.npz", train=np.where(np.arange(3) == 2, np.nan, x), test=x)
    with pytest.raises(datasets.DatasetError, match="dimension"):
        datasets.load(str(tmp_path / "x.npz"), mask=True)


@pytest.mark.parametrize(
    ("name", "message"),
    [("toy", "`mask` is for files of your own"), ("grey.npy", "`mask` is for floats, .* holds grey levels")],
)
def test_data_without_gaps_take_no_mask(name, message, tmp_path):
    np.save(tmp_path / "grey.npy", np.arange(160, dtype=np.uint8).reshape(10, 4, 4))
    with pytest.raises(datasets.DatasetError, match=message):
        datasets.load(str(tmp_path / name) if name.endswith("npy") else name, mask=True)


@pytest.mark.slow
def test_float_images_with_gaps(tmp_path):
    x = np.random.default_rng(0).random((40, 8, 8)).astype(np.float32)
    x[x > 0.9] = np.nan
    np.save(tmp_path / "x.npy", x)
    tiny = TINY | {"widths": (4, 4), "num_steps": 3}
    config = sigma_sweep.configure(dataset=str(tmp_path / "x.npy"), variants=("ls", "lv"), mask=True, **tiny)
    summary = sigma_sweep.run(config, run_dir=str(tmp_path / "run"), echo=lambda line: None)
    assert np.isfinite(summary.rows[0].elbo)
    generate.run(str(tmp_path / "run"), images=[str(tmp_path / "x.npy")], num_samples=4)


@pytest.mark.slow
def test_a_folder_of_images_from_the_command_line(tmp_path):
    """Grey images of several sizes, with sub-folders: trained, reported again, and generated from."""
    rng = np.random.default_rng(0)
    for index in range(60):
        place = tmp_path / "faces" / f"part{index % 2}"
        place.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(rng.integers(0, 256, (9 + index % 3, 12), dtype=np.uint8)).save(place / f"{index}.png")
    config = sigma_sweep.configure(
        dataset=str(tmp_path / "faces"), image_size=8, variants=("ls",), **TINY | {"widths": (4, 4), "num_steps": 3}
    )
    places = {"run_dir": str(tmp_path / "run"), "data_dir": str(tmp_path / "cache")}
    lines = []
    summary = sigma_sweep.run(config, **places, echo=lines.append)
    assert (summary.dataset, summary.shape, summary.levels, summary.kind) == ("./faces", [8, 8, 1], 256, "discretised")
    assert "54 training and 6 test examples" in lines[0]
    assert sigma_sweep.run(config, **places, echo=lambda line: None) == summary
    generate.run(str(tmp_path / "run"), num_samples=4)


@pytest.mark.slow
def test_float_images_are_trained_by_their_density(tmp_path):
    x = np.random.default_rng(0).random((40, 8, 8)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    tiny = TINY | {"widths": (4, 4), "num_steps": 3}
    config = sigma_sweep.configure(dataset=str(tmp_path / "x.npy"), variants=("ls",), **tiny)
    summary = sigma_sweep.run(config, run_dir=str(tmp_path / "run"), echo=lambda line: None)
    assert (summary.levels, summary.kind, summary.unit) == (None, "points", "pixel on [0, 1]")
    assert summary.rows[0].bits_per_dimension is None
    with pytest.raises(command.UsageError, match="--discretise"):
        sigma_sweep.run(config._replace(discretise=True), run_dir=str(tmp_path / "other"))
