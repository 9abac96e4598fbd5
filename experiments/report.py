"""The results of a sweep as rows over seeds, one table and figures."""

import functools
import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.variants import LEADER, VARIANTS, Sigma
from lvae_jax import evaluation, figures, runs, toy
from lvae_jax.evaluation import Kind

POINTS = "points"  # what a summary has as its kind for data without grey levels
# One colour for a variant in all figures.
COLOURS = dict(zip((variant.title for variant in VARIANTS.values()), figures.MODEL_COLOURS, strict=False))


def by_row(members: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Members by the title of their row: seeds are pooled, and F-VAEs told apart by their sigma."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for member in members:
        variant = VARIANTS[member["variant"]]
        title = variant.title + (f", sigma = {member['sigma']}" if variant.swept else "")
        rows.setdefault(title, []).append(member)
    return rows


def row(members: Sequence[dict[str, Any]], shape: Sequence[int], *, kind: Kind, levels: int | None) -> dict[str, Any]:
    """The mean over a row's members, with the standard deviation of the ELBO over seeds (0 for a single one). `kind`
    and `levels` are those of `evaluation.rate`; levels is None for points, which have no rate."""
    elbos = [member["elbo"] for member in members]
    numbers = [name for name, value in members[0].items() if isinstance(value, int | float) and name != "seed"]
    mean = {name: float(np.mean([member[name] for member in members])) for name in numbers if name != "member"}
    result = mean | {
        "variant": members[0]["variant"],
        "sigma": members[0]["sigma"] if VARIANTS[members[0]["variant"]].swept else mean["sigma"],  # exact, if a flag
        "num_seeds": len(members),
        "elbo_sd": float(np.std(elbos, ddof=1)) if len(members) > 1 else 0.0,
    }
    result["diagnosis"] = _diagnosis([member["diagnosis"] for member in members])
    if kind != Kind.DISCRETISED:
        result["elbo_paper"] = evaluation.paper_elbo(mean["elbo"], shape)
    if levels is None:
        return result
    result |= evaluation.rate(mean["elbo"], shape, kind=kind, levels=levels)._asdict()
    if "importance_bound" in mean:
        rate = evaluation.rate(mean["importance_bound"], shape, kind=kind, levels=levels)
        result["importance_bits_per_dimension"] = rate.bits_per_dimension
    # The bits of probabilities replace those of a density, which are no code length.
    for name, bits in (("code_elbo", "bits_per_dimension"), ("code_importance_bound", "importance_bits_per_dimension")):
        if name in mean:
            rate = evaluation.rate(mean[name], shape, kind=Kind.DISCRETISED, levels=levels)
            result |= {bits: rate.bits_per_dimension, "is_code": True}
    return result


def _diagnosis(diagnoses: Sequence[str]) -> str:
    """The findings of a row's members, each in the words for the first member that has it, with the number of seeds if
    not all have it."""
    findings: dict[str, list[str]] = {}
    for diagnosis in diagnoses:
        for finding in diagnosis.split("; "):
            findings.setdefault(re.split(r"[:\d]", finding)[0], []).append(finding)
    total = len(diagnoses)
    return "; ".join(
        found[0] + (f" (in {len(found)} of {total} seeds)" if len(found) < total else "") for found in findings.values()
    )


def add_toys_limits(rows: Sequence[dict[str, Any]], test_log_prob: float) -> None:
    """Adds to each row its gap: the mean log p(x) of the test examples less the ELBO, in nats; and where sigma is one
    number, the part of it that this sigma imposes on any networks, an interval."""
    for row in rows:
        row["gap"] = test_log_prob - row["elbo"]
        if VARIANTS[row["variant"]].sigma is not Sigma.MAP:
            low, high = toy.best_elbo(row["sigma"])
            row["best_elbo"] = [low, high]
            row["sigma_gap"] = [-toy.entropy() - high, -toy.entropy() - low]


def line(title: str, row: Mapping[str, Any]) -> str:
    """A row in one line, for those who wait for the table."""
    cells = _cells(row)
    sigma = "" if VARIANTS[row["variant"]].swept else f", sigma = {cells['sigma']}"
    return f"{title}{sigma}: ELBO {cells['ELBO [nats]'].strip()} nats, KL {cells['KL']}; {row['diagnosis']}"


def table(summary: Mapping[str, Any]) -> str:
    """The summary as a table with notes."""
    lines = [_cells(row) for row in summary["rows"]]
    lines += [{"": title, "bits/dim": f"{bits:.4f}"} for title, bits in summary.get("histograms", {}).items()]
    titles = list(dict.fromkeys(title for line in lines for title in line))
    widths = [max(len(title), *(len(line.get(title, "")) for line in lines)) + 2 for title in titles]
    text = ["".join(f"{title:{'>' if title else '<'}{width}}" for title, width in zip(titles, widths, strict=True))]
    for line in lines:
        cells = [line.get(title, "") for title in titles]
        text.append(
            "".join(f"{c:{'>' if t else '<'}{w}}" for t, c, w in zip(titles, cells, widths, strict=True)).rstrip()
        )
    diagnoses = [f"{title}: {part[0]['diagnosis']}" for title, part in by_row(summary["rows"]).items()]
    return "\n".join([*text, *_notes(summary, titles), *diagnoses])


def _cells(row: Mapping[str, Any]) -> dict[str, str]:
    cells = {
        "": VARIANTS[row["variant"]].title,
        "sigma": f"{row['sigma']:.4g}",
        "best sigma": f"{row['best_sigma']:.4g}",
        "ELBO [nats]": f"{row['elbo']:.4f}" + (f" +- {row['elbo_sd']:<6.4f}" if row["num_seeds"] > 1 else ""),
    }
    if "elbo_paper" in row:
        cells["paper's ELBO"] = f"{row['elbo_paper']:.4f}"
    cells |= {"log p(x|z)": f"{row['log_likelihood']:.4f}", "KL": f"{row['kl']:.4f}"}
    cells["active units"] = f"{row['active_units']:.4g}"
    if "importance_bound" in row:
        cells["IW bound"] = f"{row['importance_bound']:.4f}"
    if "gap" in row:
        cells["gap"] = f"{row['gap']:.4f}"
    if "sigma_gap" in row:
        cells["due to sigma"] = f"{row['sigma_gap'][0]:.3f}"
    if "model_gap" in row:
        cells |= {"to model": f"{row['model_gap']:.4f}", "to posterior": f"{row['posterior_gap']:.4f}"}
    if "sharpness" in row:
        cells |= {"sharpness": f"{row['sharpness']:.3f}", "sample noise": f"{row['sample_noise']:.4f}"}
    if "bits_per_dimension" in row:
        cells |= {"nats/dim": f"{row['nats_per_dimension']:.4f}", "bits/dim": f"{row['bits_per_dimension']:.4f}"}
    if "importance_bits_per_dimension" in row:
        cells["IW bits/dim"] = f"{row['importance_bits_per_dimension']:.4f}"
    return cells


def _notes(summary: Mapping[str, Any], titles: Sequence[str]) -> list[str]:
    first, n = summary["rows"][0], summary["num_dimensions"]
    seeds = first["num_seeds"]
    spread = f"mean +- standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    levels = summary.get("levels") or 256  # runs from before the number was recorded have 8 bits
    notes = [
        f"ELBO = log p(x|z) - KL, in nats, higher is better: {spread}, on {summary['num_test_examples']} test "
        "examples. sigma: the final one, mean over seeds and, where it varies, over dimensions. best sigma: the root "
        f"mean squared error, which is optimal for these reconstructions. Both in the unit {summary['unit']}. active "
        f"units: latent dimensions in use, out of {summary['latent_size']}."
    ]
    if "paper's ELBO" in titles:
        notes.append(f"The paper drops the density's constant (n/2) log 2 pi, n = {n}: its ELBO is higher by that.")
    if "IW bound" in titles:
        notes.append(f"IW bound: importance-weighted, with {summary['num_importance_samples']} draws.")
    if "gap" in titles:
        notes.append(
            f"gap: the exact log p(x) minus the ELBO. No model exceeds -H(x) = {-summary['entropy']:.4f} nats on "
            "average. due to sigma: the part of the gap that no networks can close at this one fixed sigma, at least."
        )
    if "to model" in titles:
        notes.append(
            "The gap is also the sum of two parts, on "
            f"{summary['num_evidence_examples']} examples. to model: the KL from the true density to the model's. to "
            "posterior: the model's log p(x) minus the ELBO."
        )
    if "sharpness" in titles:
        notes.append(
            "sharpness: Laplacian energy of reconstructions divided by that of the originals; 1 is as sharp. sample "
            "noise: root mean square distance between generated samples and their means. Both use "
            f"{min(100, summary['num_test_examples'])} images."
        )
    if summary["kind"] == Kind.DENSITY:
        notes.append(
            f"These ELBOs are of densities at the pixel values k/{levels - 1}, not likelihoods of images: as a "
            f"likelihood, no ELBO can exceed n ln {levels} = {first['bound']:.1f} nats."
        )
    if "bits/dim" in titles and first["is_code"]:
        notes.append(
            f"bits/dim: a bound on the code length of the {levels} grey levels, from the probabilities that the model "
            f"gives them, whatever it was trained with; uniform noise has {math.log2(levels):.4g}."
        )
    elif "bits/dim" in titles:
        notes.append(f"bits/dim = (n ln {levels} - ELBO) / (n ln 2) is not a code length here.")
    if summary.get("histograms"):
        notes.append("The histograms count the grey levels of the training split. They know nothing of the image.")
    if "bits/dim" in titles and "paper's ELBO" not in titles:
        notes.append(
            "sigma belongs to the distribution before rounding. best sigma uses means clipped to [0, 1]: it is not "
            "optimal here."
        )
    return [textwrap.fill(note, 118) for note in notes]


def draw(
    path: Path,
    summary: Mapping[str, Any],
    panels: Sequence[figures.Panel],
    *,
    draw_panels: Callable[..., figures.Figure],
) -> None:
    """Writes the run's figures; `draw_panels` is that of the data's `Domain`."""
    metrics = runs.read_curves(path)

    def curves(part: Sequence[dict[str, Any]]) -> figures.Curves:
        columns = [metrics[member["group"], member["member"]] for member in part]
        values = (np.array([column[name] for column in columns]) for name in figures.Curves._fields[1:])
        return figures.Curves(columns[0]["step"], *values)

    rows = by_row(summary["members"])
    all_curves = {title: curves(part) for title, part in rows.items()}
    learned = {
        title: curve
        for (title, part), curve in zip(rows.items(), all_curves.values(), strict=True)
        if VARIANTS[part[0]["variant"]].sigma is not Sigma.CONSTANT
    }
    colours = COLOURS if learned else None  # where all models are F-VAEs, colours tell their sigmas apart
    drawings = {
        "samples": draw_panels(panels, unit=summary["unit"]),
        "losses": figures.losses(all_curves),
        "sigma": figures.sigma_and_elbo(learned or all_curves, unit=summary["unit"], colours=colours),
        "elbo": _elbo_against_sigma(summary),
    }
    for name, figure in drawings.items():
        runs.replace(path / "figures" / f"{name}.png", functools.partial(figure.savefig, dpi=120))


def _elbo_against_sigma(summary: Mapping[str, Any]) -> Any:
    columns: dict[str, dict[str, np.ndarray]] = {}
    maps = [variant.title for variant in VARIANTS.values() if variant.sigma is Sigma.MAP]
    for name, variant in VARIANTS.items():
        part = [member for member in summary["members"] if member["variant"] == name]
        if part:
            columns[variant.title] = {
                name: np.array([member[name] for member in part]) for name in ("sigma", "elbo", "mse", "kl")
            }
    sigmas = np.concatenate([column["sigma"] for column in columns.values()])
    grid = np.geomspace(0.3 * sigmas.min(), 3.0 * sigmas.max(), 200)
    reused = {
        title: np.array(
            [
                evaluation.elbo_at(grid, mse=mse, kl=kl, num_dimensions=math.prod(summary["shape"]))
                for mse, kl in zip(column["mse"], column["kl"], strict=True)
            ]
        )
        for title, column in columns.items()
        if title not in maps and summary["kind"] != Kind.DISCRETISED
    }
    limited = sorted({(row["sigma"], row["best_elbo"][1]) for row in summary["rows"] if "best_elbo" in row})
    return figures.elbo_against_sigma(
        {title: (column["sigma"], column["elbo"]) for title, column in columns.items() if title not in maps},
        {title: column["elbo"] for title, column in columns.items() if title in {VARIANTS[LEADER].title, *maps}},
        reused=(grid, reused),
        limits=np.array(limited).reshape(-1, 2).T,
        bound=-summary["entropy"] if "entropy" in summary else None,
        unit=summary["unit"],
        colours=COLOURS,
    )
