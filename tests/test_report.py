"""The sweep's rows, table and figures from members made by hand."""

import dataclasses
import functools
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import filled

from experiments import domains, report
from experiments.programs import Pictures
from experiments.results import Member, Row, Summary
from experiments.variants import VARIANTS, Sigma
from lvae_jax import diagnostics, figures, runs, toy
from lvae_jax.datasets import Form
from lvae_jax.evaluation import Kind

RNG = np.random.default_rng(0)
best_elbo = functools.cache(toy.best_elbo)  # takes a second
LATENT_SIZE, STEPS = 2, (5, 10, 15)
SHAPES = {"points": (2,), "density": (4, 4, 1), "dequantised": (4, 4, 1), "discretised": (4, 4, 1)}


def members(variant, *, sigma=0.1, num_seeds=3, first=0, **others):
    """Members of one row with random numbers; sigma is fixed, or of each seed."""
    made = []
    for seed in range(num_seeds):
        elbo, kl, mse = -RNG.uniform(1.0, 5.0), RNG.uniform(0.5, 3.0), RNG.uniform(0.001, 0.01)
        scores = {"elbo": elbo, "log_likelihood": elbo + kl, "kl": kl, "mse": mse, "best_sigma": np.sqrt(mse)}
        own = sigma if variant in ("f", "f_star") else sigma + 0.01 * seed
        sigmas = {"sigma": own, "sigma_min": own, "sigma_mean": own, "sigma_max": own}
        found = {
            "latent_kl": [kl, 0.0],
            "active_units": 1 + seed % 2,
            "active_directions": 1,
            "floor_fraction": 0.0,
            "sigma_factor": 1.0,
            "residual_mean": 0.0,
            "residual_stddev": 1.0,
            "coverage": list(diagnostics.INTERVALS),
            "diagnosis": "calibrated",
        }
        place = {"group": variant, "member": first + seed}
        made.append(Member(**{"variant": variant, "seed": seed} | scores | sigmas | found | place | others))
    return made


def as_row(kind):
    """Arguments of `report.row`."""
    points = kind == "points"
    return {"form": Form(SHAPES[kind], None if points else 256), "kind": Kind.DENSITY if points else Kind(kind)}


def summarise(parts, *, kind="points", **others):
    """What summary.json holds of these members."""
    shape = SHAPES[kind]
    everyone = list(itertools.chain(*parts))
    return filled(
        Summary,
        rows=[report.row(part, **as_row(kind)) for part in report.by_row(everyone).values()],
        members=everyone,
        shape=list(shape),
        levels=as_row(kind)["form"].levels,
        kind=kind,
        num_dimensions=int(np.prod(shape)),
        latent_size=LATENT_SIZE,
        num_test_examples=10_000,
        num_importance_samples=32,
        num_evidence_examples=1000,
        unit="toy length" if kind == "points" else "pixel on [0, 1]",
        **others,
    )


def with_limits(row, test_log_prob):
    return report.with_limits(row, test_log_prob, entropy=toy.entropy(), best_elbo=toy.best_elbo)


def toys(parts):
    """The summary of a run on the toy, with its limits."""
    summary = summarise(parts, entropy=toy.entropy())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "best_elbo", best_elbo)
        return dataclasses.replace(summary, rows=[with_limits(row, 0.1) for row in summary.rows])


# Rows


@pytest.mark.parametrize("kind", SHAPES)
def test_row_is_the_mean_of_its_members(kind):
    part = members("ls", importance_bound=-1.0)
    row = report.row(part, **as_row(kind))
    for name in ("elbo", "log_likelihood", "kl", "mse", "sigma", "sigma_max", "best_sigma", "active_units"):
        assert getattr(row, name) == pytest.approx(np.mean([getattr(member, name) for member in part]))
    assert row.elbo_sd == pytest.approx(np.std([member.elbo for member in part], ddof=1))
    assert row.num_seeds == 3
    assert row.variant == "ls"
    assert row.importance_bound == -1.0
    n = np.prod(SHAPES[kind])
    if kind == "discretised":
        assert row.elbo_paper is None
        assert row.bits_per_dimension == pytest.approx(-row.elbo / n / np.log(2.0))
    else:
        assert row.elbo_paper == pytest.approx(row.elbo + n / 2.0 * np.log(2.0 * np.pi))
    assert (row.bits_per_dimension is None) == (kind == "points")
    assert (row.importance_bits_per_dimension is None) == (kind == "points")
    if kind in ("density", "dequantised"):
        assert row.importance_bits_per_dimension == pytest.approx(8.0 + 1.0 / n / np.log(2.0))
        assert row.bits_per_dimension == pytest.approx(8.0 - row.elbo / n / np.log(2.0))
        assert row.is_code == (kind == "dequantised")


def test_row_of_one_seed():
    assert report.row(members("lv", num_seeds=1), **as_row("points")).elbo_sd == 0.0


def test_diagnosis_counts_seeds():
    def diagnosis(*findings):
        part = [members("ls", num_seeds=1, diagnosis=finding)[0] for finding in findings]
        return report.row(part, **as_row("points")).diagnosis

    collapsed = "posterior collapse: none of 2; sigma at its floor in 9% of the dimensions"
    low = [f"sigma at its floor in {part}% of the dimensions" for part in (7, 12)]
    assert diagnosis("calibrated", "calibrated", "calibrated") == "calibrated"
    assert diagnosis("calibrated", collapsed, low[1]) == (
        "calibrated (in 1 of 3 seeds); posterior collapse: none of 2 (in 1 of 3 seeds); "
        "sigma at its floor in 9% of the dimensions (in 2 of 3 seeds)"
    )
    assert diagnosis(*low) == low[0]


def test_rows_pool_seeds():
    everyone = [*members("f", sigma=1.0), *members("f", sigma=0.1), *members("ls"), *members("f_star")]
    rows = report.by_row(everyone)
    assert list(rows) == ["F-VAE, sigma = 1.0", "F-VAE, sigma = 0.1", "LS-VAE", "F*-VAE"]
    assert [len(part) for part in rows.values()] == [3, 3, 3, 3]
    assert list(itertools.chain(*rows.values())) == everyone


# The limits of the toy


def test_gap_and_its_part_due_to_sigma(monkeypatch):
    monkeypatch.setattr(toy, "best_elbo", best_elbo)
    rows = [
        with_limits(filled(Row, variant=variant, sigma=sigma, elbo=-1.2), -0.35)
        for variant, sigma in (("f", 1.0), ("f", 0.01), ("ls", 0.07), ("lv", 0.07))
    ]
    assert [row.gap for row in rows] == pytest.approx(4 * [0.85])
    wide, narrow, learned, vector = rows
    assert vector.sigma_gap is vector.best_elbo is None, "its sigma is not one number"
    np.testing.assert_allclose(narrow.sigma_gap, 0.0, atol=1e-6)  # below all noise, a mixture can be exact
    for row in rows[:3]:
        low, high = row.sigma_gap
        assert 0.0 <= low <= high
        best = toy.best_elbo(row.sigma)
        np.testing.assert_allclose(row.best_elbo, best)
        np.testing.assert_allclose([low, high], [-toy.entropy() - b for b in best[::-1]])
    assert wide.sigma_gap[0] > learned.sigma_gap[1] > 0.0
    assert wide.sigma_gap[1] - wide.sigma_gap[0] < 0.01


def test_part_due_to_sigma_bounds_an_independent_model():
    """An independent model: a mixture of N(curve(u), sigma^2 I), u uniform, which EM may only improve."""
    sigma = 0.1
    u = (np.arange(4000) + 0.5) / 2000.0 - 1.0
    centres = np.asarray(toy.curve(jnp.float32(u)), np.float64)
    rng = np.random.default_rng(0)
    drawn = rng.uniform(-1.0, 1.0, 4000)
    x = np.asarray(toy.curve(jnp.float32(drawn)), np.float64)
    x += np.asarray(toy.noise(jnp.float32(drawn)), np.float64)[:, None] * rng.standard_normal((4000, 2))
    distances = ((x[:, None] - centres[None]) ** 2).sum(-1)
    model = np.log(np.exp(-0.5 * distances / sigma**2).mean(1)) - np.log(2.0 * np.pi * sigma**2)
    loss = np.asarray(toy.log_prob(jnp.float32(x)), np.float64) - model
    row = with_limits(filled(Row, variant="f", sigma=sigma, elbo=float(model.mean())), 0.0)
    assert row.sigma_gap[0] < loss.mean() + 4.0 * loss.std() / np.sqrt(len(x))


# The table


def header(text):
    return text.splitlines()[0]


def notes(text):
    return " ".join(text.split())


OPTIONAL = ("paper's ELBO", "IW bound", "gap", "due to sigma", "to model", "to posterior", "nats/dim", "bits/dim")
PAPER, RATES, GAPS = {"paper's ELBO"}, {"nats/dim", "bits/dim"}, {"gap", "due to sigma"}


@pytest.mark.parametrize(
    ("make", "columns"),
    [
        (lambda: summarise([members("ls")]), PAPER),
        (lambda: summarise([members("ls")], kind="density"), PAPER | RATES),
        (lambda: summarise([members("ls")], kind="dequantised"), PAPER | RATES),
        (lambda: summarise([members("ls")], kind="discretised"), RATES),
        (lambda: summarise([members("ls", importance_bound=-0.7)]), PAPER | {"IW bound"}),
        (lambda: toys([members("lv")]), PAPER | {"gap"}),
        (lambda: toys([members("ls")]), PAPER | GAPS),
        (
            lambda: toys([members("f"), members("lv", model_gap=0.2, posterior_gap=0.3)]),
            PAPER | GAPS | {"to model", "to posterior"},
        ),
    ],
)
def test_columns_and_their_notes(make, columns):
    summary = make()
    text = report.table(summary)
    title = header(text)
    assert {column for column in OPTIONAL if f"  {column}" in title} == columns
    said = notes(text)
    assert ("IW bound: importance-weighted, with 32 draws" in said) == ("IW bound" in columns)
    assert ("-H(x) = " in said) == ("gap" in columns)
    assert ("on 1000 examples" in said) == ("to model" in columns)
    assert ("The paper drops the density's constant" in said) == ("paper's ELBO" in columns)
    assert ("bits/dim" in said) == ("bits/dim" in columns)
    assert ("not likelihoods of images" in said) == (summary.kind == "density")
    assert ("a bound on the code length" in said) == (summary.kind in ("dequantised", "discretised"))
    assert f"mean +- standard deviation over 3 seeds, on {summary.num_test_examples} test examples" in said
    assert f"in the unit {summary.unit}" in said
    assert f"latent dimensions in use, out of {LATENT_SIZE}" in said


def test_bits_are_those_of_probabilities():
    """Whatever a model was trained with, beside those of histograms."""
    part = members("lv", code_elbo=-40.0, importance_bound=-0.7, code_importance_bound=-30.0)
    summary = summarise([part], kind="density", histograms={"histogram of each pixel": 1.6888})
    (row,) = summary.rows
    assert row.bits_per_dimension == pytest.approx(40.0 / 16 / np.log(2.0))
    assert row.importance_bits_per_dimension == pytest.approx(30.0 / 16 / np.log(2.0))
    assert row.nats_per_dimension == pytest.approx(row.elbo / 16), "of the density"
    title, line, histogram, *_ = report.table(summary).splitlines()
    end = title.index("  bits/dim") + len("  bits/dim")
    assert line[:end].endswith(f" {row.bits_per_dimension:.4f}")
    assert histogram.startswith("histogram of each pixel ")
    assert histogram[:end].endswith(" 1.6888")
    said = notes(report.table(summary))
    assert "not likelihoods of images" in said
    assert "bits/dim: a bound on the code length of the 256 grey levels" in said
    assert "is not a code length" not in said


def test_bits_of_models_without_probabilities_are_told_apart():
    with_them, without = members("lv", code_elbo=-40.0), members("tangent_2")
    kinds = {"density": "are no code length.", "dequantised": "are those of the density of noisy images."}
    for kind, expected in kinds.items():
        said = notes(report.table(summarise([with_them, without], kind=kind)))
        formula = "the bits, (n ln 256 - ELBO) / (n ln 2), "
        assert f"tangent VAE, rank 2: no such probabilities; {formula}{expected}" in said
    for part in (with_them, without):
        assert "no such probabilities" not in notes(report.table(summarise([part], kind="dequantised")))


def test_notes_name_the_numbers_of_their_columns():
    said = notes(report.table(summarise([members("ls")], kind="density")))
    assert "constant (n/2) log 2 pi, n = 16:" in said
    assert f"no ELBO can exceed n ln 256 = {16 * np.log(256.0):.1f} nats" in said
    assert "is not a code length here" in said, "a run from before probabilities were computed"
    said = notes(report.table(toys([members("f")])))
    assert f"-H(x) = {-toy.entropy():.4f} nats" in said


def test_cells_are_the_rows_numbers():
    summary = toys([members("f"), members("lv", importance_bound=-0.5)])
    lines = report.table(summary).splitlines()
    columns = ("KL", "gap", "IW bound", "due to sigma")
    ends = {column: lines[0].index(f"  {column}") + 2 + len(column) for column in columns}

    def cell(line, column):
        up_to = line.ljust(ends[column])[: ends[column]]
        return "" if up_to.endswith(" ") else up_to.rsplit("  ", 1)[-1]

    fixed, vector = summary.rows
    for line, row in zip(lines[1:3], (fixed, vector), strict=True):
        assert line.startswith(VARIANTS[row.variant].title)
        assert f"{row.elbo:.4f} +- {row.elbo_sd:.4f}" in line
        assert cell(line, "KL") == f"{row.kl:.4f}"
        assert cell(line, "gap") == f"{row.gap:.4f}"
    assert cell(lines[1], "due to sigma") == f"{fixed.sigma_gap[0]:.3f}"
    assert cell(lines[2], "due to sigma") == "", "an LV-VAE has none"
    assert cell(lines[1], "IW bound") == "", "only the other has one"
    assert cell(lines[2], "IW bound") == "-0.5000"
    assert lines[-2:] == [f"F-VAE, sigma = {fixed.sigma}: calibrated", "LV-VAE: calibrated"]
    assert max(map(len, lines[3:])) <= 118


def test_table_of_one_seed():
    text = report.table(toys([members("f", num_seeds=1)]))
    assert "+-" not in text
    assert "higher is better: one seed, on" in text


# Figures


def metrics(path, everyone):
    """Lines of metrics.jsonl for each member, and what they hold of elbo."""
    for member in everyone:
        lines = [
            {"group": member.group, "member": member.member, "seed": member.seed, "step": step}
            | {name: float(RNG.uniform(0.1, 1.0)) for name in figures.Curves._fields[1:]}
            for step in STEPS
        ]
        runs.append_metrics(path, lines)


CASES = {
    "one seed": lambda: toys([members("f", num_seeds=1), members("ls", num_seeds=1), members("lv", num_seeds=1)]),
    "no F-VAE": lambda: toys([members("ls"), members("lv"), members("optimal")]),
    "F-VAEs alone": lambda: toys([members("f", sigma=1.0), members("f", sigma=0.1, first=3)]),
    "one LV-VAE": lambda: toys([members("lv", num_seeds=1)]),
    "LV-VAEs alone": lambda: toys([members("lv")]),
    "all": lambda: toys([members(variant) for variant in VARIANTS]),
    "images": lambda: summarise([members("f"), members("ls"), members("lv")], kind="density"),
    "images, LV-VAE alone": lambda: summarise([members("lv", num_seeds=1)], kind="dequantised"),
    "discretised": lambda: summarise([members("f"), members("ls")], kind="discretised"),
}


@pytest.mark.parametrize("case", CASES)
def test_any_run_is_drawn(case, tmp_path, monkeypatch):
    summary, drawn = CASES[case](), {}
    for name in ("losses", "sigma_and_elbo", "elbo_against_sigma"):
        original = getattr(figures, name)

        def keep(*arguments, name=name, original=original, **options):
            drawn[name] = arguments, options
            return original(*arguments, **options)

        monkeypatch.setattr(figures, name, functools.wraps(original)(keep))
    metrics(tmp_path, summary.members)
    shape = summary.shape
    panels = [figures.Panel("LS-VAE", *(RNG.uniform(size=(6, *shape)) for _ in range(5)))]
    draw_panels = figures.image_panels if len(shape) == 3 else figures.plane_panels
    report.draw(tmp_path, summary, panels, draw_panels=draw_panels)
    for name in ("samples", "losses", "sigma", "elbo"):
        assert (tmp_path / "figures" / f"{name}.png").stat().st_size > 5_000

    (curves,), _ = drawn["losses"]
    rows = report.by_row(summary.members)
    # The metrics of a conditioned model are of all sigmas at once.
    shown = {title: part for title, part in rows.items() if not VARIANTS[part[0].variant].conditioned}
    assert list(curves) == list(shown)
    by_place = {}
    for line in runs.read_metrics(tmp_path):
        by_place.setdefault((line["group"], line["member"]), []).append(line["elbo"])
    for title, part in shown.items():
        np.testing.assert_array_equal(curves[title].steps, STEPS)
        np.testing.assert_array_equal(curves[title].elbo, [by_place[m.group, m.member] for m in part])
    (learned,), _ = drawn["sigma_and_elbo"]
    fixed = all(m.variant in ("f", "f_star") for m in summary.members)
    assert fixed or not any(title.startswith("F") for title in learned), "a constant is no curve of sigma"

    (points, lines), options = drawn["elbo_against_sigma"]
    titles = {VARIANTS[m.variant].title for m in summary.members}
    assert "LV-VAE" not in points
    varying = {variant.title for variant in VARIANTS.values() if variant.sigma is Sigma.MAP}
    assert set(lines) == titles & {"LS-VAE", *varying}
    assert {*points, *lines} == titles
    assert options["bound"] == (-summary.entropy if summary.kind == "points" else None)
    reused_at, reused = options["reused"]
    assert set(reused) == (set() if summary.kind == "discretised" else titles - varying)
    for title, elbos in reused.items():
        part = [m for m in summary.members if VARIANTS[m.variant].title == title]
        n, at = summary.num_dimensions, reused_at[50]
        expected = [-n / 2 * (np.log(2 * np.pi * at**2) + m.mse / at**2) - m.kl for m in part]
        np.testing.assert_allclose(elbos[:, 50], expected)
    limited = {row.sigma: row.best_elbo[1] for row in summary.rows if row.best_elbo}
    np.testing.assert_array_equal(options["limits"], np.reshape(sorted(limited.items()), (-1, 2)).T)


def test_figure_that_cannot_be_drawn_is_left_out(tmp_path):
    summary, lines = summarise([members("ls")], kind="density"), []
    metrics(tmp_path, summary.members)

    def draw_panels(panels, unit):
        raise ValueError("no\nimage")

    report.draw(tmp_path, summary, [], draw_panels=draw_panels, echo=lines.append)
    assert {file.stem for file in (tmp_path / "figures").iterdir()} == {"losses", "sigma", "elbo"}
    assert lines == [f"{tmp_path / 'figures' / 'samples.png'} is left out, it cannot be drawn: no image"]


def test_measures_that_an_image_lacks_are_left_out():
    for shape in ((4, 1, 1, 1), (4, 2, 5, 3)):
        images = RNG.uniform(size=shape)
        pictures = Pictures(*4 * [images[None]])
        assert domains.image_measures(pictures, images, None) == {}
