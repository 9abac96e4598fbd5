"""Conditioned models in a sweep: one model for each seed gives a row at each sigma, a curve over the range, and what
`generate` asks of it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import arrays_in, interruption, once

from experiments import command, generate, loop, report, results, sigma_sweep, sweep
from experiments.results import Curve, Summary
from lvae_jax import runs, theory, toy
from lvae_jax import vae as vae_lib

TINY = {"num_seeds": 2, "num_steps": 20, "batch_size": 16, "widths": (8,), "num_blocks": 1}
CONFIG = sweep.configure(variants=("ls", "conditioned"), sigma=(0.2, 0.5), sigma_range=(0.1, 0.5), **TINY)
QUIETLY = {"echo": lambda line: None}


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A finished run whose curves are of the whole test split."""

    def make(folder):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sigma_sweep, "NUM_CURVE_EXAMPLES", 10_000)
            sigma_sweep.run(CONFIG, run_dir=str(folder / "run"), **QUIETLY)

    return once(tmp_path_factory, "conditioned", make) / "run"


def members(run_dir):
    summary = results.read(run_dir / "summary.json", Summary)
    return summary, [member for member in summary.members if member.variant == "conditioned"]


def test_one_model_gives_a_row_at_each_sigma(swept):
    summary, found = members(swept)
    assert [(member.sigma, member.seed, member.member) for member in found] == [
        (0.2, 0, 0),
        (0.2, 1, 1),
        (0.5, 0, 0),
        (0.5, 1, 1),
    ]
    for member in found:
        assert member.sigma_min == pytest.approx(member.sigma, rel=1e-6)
        assert member.sigma_max == pytest.approx(member.sigma, rel=1e-6)
    rows = [row for row in summary.rows if row.variant == "conditioned"]
    assert [(row.sigma, row.num_seeds) for row in rows] == [(0.2, 2), (0.5, 2)]
    for row in rows:
        assert row.best_elbo == pytest.approx(toy.best_elbo(row.sigma))
    lines = runs.read_metrics(swept)
    assert {(line["group"], line["member"]) for line in lines if line["group"] == "conditioned"} == {
        ("conditioned", 0),
        ("conditioned", 1),
    }
    figures = {file.stem for file in (swept / "figures").iterdir()}
    assert figures == {"samples", "losses", "sigma", "elbo", "rate_distortion"}


def test_curves_go_through_the_rows(swept):
    """At the ends of the range, where a curve and a row are at the same sigma; not those of another seed."""
    summary, found = members(swept)
    assert [curve.seed for curve in summary.curves] == [0, 1]
    for curve in summary.curves:
        assert len(curve.sigma) == sigma_sweep.NUM_CURVE_POINTS
        assert curve.sigma[0] == pytest.approx(0.1)
        (member,) = (member for member in found if member.seed == curve.seed and member.sigma == 0.5)
        assert curve.sigma[-1] == pytest.approx(0.5)
        for name in ("elbo", "kl", "mse"):
            assert getattr(curve, name)[-1] == pytest.approx(getattr(member, name), rel=1e-4)
    assert summary.curves[0].elbo != summary.curves[1].elbo
    assert "conditioned VAE: the largest ELBO at sigma = 0.5" in report.table(summary)
    assert Summary.from_json(summary.to_json()) == summary


def test_best_sigma_is_the_top_of_the_curve():
    """Of n-dimensional Gaussian errors: ELBO(s) = -n (log s + v / (2 s^2)), which is largest at s^2 = v."""
    sigma = np.geomspace(0.01, 1.0, 25)
    curve = Curve(variant="conditioned", seed=0, sigma=sigma.tolist(), elbo=[], kl=[], mse=[])
    for best in (0.05, 0.1234, 0.6):
        elbo = -np.log(sigma) - 0.5 * best**2 / sigma**2
        assert dataclasses.replace(curve, elbo=elbo.tolist()).best_sigma == pytest.approx(best, rel=0.02)
    for rising, end in ((sigma, 1.0), (-sigma, 0.01)):
        assert dataclasses.replace(curve, elbo=rising.tolist()).best_sigma == pytest.approx(end, rel=0.05)


def test_trained_model_is_told_its_sigma(swept):
    """The model that other commands restore gives the member's own squared error."""
    summary, found = members(swept)
    x = sigma_sweep.datasets.load("toy").test
    for member in found:
        vae, params = sweep.trained(swept, CONFIG, member, summary.form)
        np.testing.assert_allclose(jnp.exp(params["likelihood"]["log_stddev"]), member.sigma, rtol=1e-6)
        terms = vae_lib.elbo(jax.random.split(jax.random.key(0), len(x)), vae, params, jnp.asarray(x))
        assert float(terms.kl.mean()) == pytest.approx(member.kl, rel=1e-4)


def test_generate_reads_any_sigma_of_the_range(swept, tmp_path):
    options = {"variants": ("conditioned",), "num_samples": 5, "out": str(tmp_path / "out"), **QUIETLY}
    record = generate.run(str(swept), sigmas=(0.3, 0.5), **options)
    assert [member.sigma for member in record.members] == [0.5, 0.3]
    means = {}
    for member, name in zip(record.members, record.files, strict=True):
        arrays = arrays_in(tmp_path / "out" / f"{name}.npz")
        np.testing.assert_allclose(arrays["stddevs"], member.sigma, rtol=1e-6)
        means[member.sigma] = arrays["means"]
    assert np.abs(means[0.3] - means[0.5]).max() > 1e-6
    with pytest.raises(command.UsageError, match=r"--sigma=0\.7: conditioned models are for --sigma_range=0\.1,0\.5"):
        generate.run(str(swept), sigmas=(0.7,), **options)


def test_interrupted_run_resumes_to_the_same_bits(swept, tmp_path, monkeypatch):
    monkeypatch.setattr(sigma_sweep, "NUM_CURVE_EXAMPLES", 10_000)
    monkeypatch.setattr(report, "write_figures", lambda *arguments, **options: None)
    with interruption(group="conditioned", after=10):
        sigma_sweep.run(CONFIG, run_dir=str(tmp_path), pace=loop.Pace(checkpoint_seconds=0.0), **QUIETLY)
    resumed, expected = sigma_sweep.run(CONFIG, run_dir=str(tmp_path), **QUIETLY), members(swept)[0]
    assert resumed.members == expected.members
    assert resumed.curves == expected.curves
    assert runs.read_metrics(tmp_path) == runs.read_metrics(swept)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variants": ("f",), "sigma_range": (0.1, 0.5)}, "--sigma_range is for conditioned: add it to --variants"),
        ({"sigma": (2.0,)}, r"--sigma=2: conditioned models are for --sigma_range=0\.01,1, give a sigma within"),
        ({"sigma_range": (0.1,)}, r"--sigma_range=0\.1: give the lowest and the highest sigma, two positive numbers"),
        ({"sigma_range": (0.5, 0.1)}, r"--sigma_range=0\.5,0\.1: give the lowest and the highest sigma"),
        ({"sigma_range": (0.0, 0.1)}, r"--sigma_range=0,0\.1: give the lowest"),
    ],
)
def test_bad_flags(options, message):
    with pytest.raises(command.UsageError, match=message):
        sigma_sweep.check(sweep.configure(**{"variants": ("conditioned",)} | options))


def test_rates_of_gaussian_data_meet_their_limit():
    """Of N(0, v) in one dimension: R(D) = log(v / D) / 2, which a linear VAE reaches; the bounds of all sigmas together
    give it, and at each sigma no more than it."""
    variance, sigmas = 4.0, np.geomspace(0.05, 1.9, 400)
    best = theory.linear_best_elbo(sigmas, np.array([variance**0.5]), num_dimensions=1, latent_size=1)
    distortions = np.geomspace(0.01, 3.0, 20)
    rates = 0.5 * np.log(variance / distortions)
    found = theory.least_rate(distortions, sigmas, best, num_dimensions=1)
    np.testing.assert_allclose(found, rates, atol=2e-4)
    one = theory.least_rate(distortions, sigmas[:1], best[:1], num_dimensions=1)
    assert np.all(one <= rates + 1e-12)
    assert one[-1] == 0.0, "a rate is not negative"
