"""The sweep's results for people: rows over seeds, one table, the figures."""

import functools
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lvae_jax import evaluation, figures, runs, theory

VARIANTS = {
    "f": "F-VAE",
    "ls": "LS-VAE",
    "lv": "LV-VAE",
    "optimal": "sigma-VAE",
    "f_star": "F*-VAE",
    "replay": "replayed F-VAE",
    "geometric": "annealed F-VAE",
    "kl_warmup": "F*-VAE, KL warm-up",
}
FOLLOWING = ("f_star", "replay", "geometric", "kl_warmup")  # take their sigma from the LS-VAE of the same seed
SCHEDULED = ("replay", "geometric")  # have a sigma for each step
CONSTANT = ("f", "f_star", "kl_warmup")  # have one sigma


def by_row(members: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Members by the title of their row: seeds are pooled, and F-VAEs told apart by their sigma."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for member in members:
        title = VARIANTS[member["variant"]] + (f", sigma = {member['sigma']}" if member["variant"] == "f" else "")
        rows.setdefault(title, []).append(member)
    return rows


def row(members: Sequence[dict[str, Any]], shape: Sequence[int], *, kind: Any) -> dict[str, Any]:
    """The mean over a row's members, with the standard deviation of the ELBO over seeds (0 for a single one); `kind` is
    that of `evaluation.rate`, or "points" in the plane."""
    elbos = [member["elbo"] for member in members]
    numbers = [name for name, value in members[0].items() if isinstance(value, int | float) and name != "seed"]
    mean = {name: float(np.mean([member[name] for member in members])) for name in numbers if name != "member"}
    result = mean | {
        "variant": members[0]["variant"],
        "sigma": members[0]["sigma"] if members[0]["variant"] == "f" else mean["sigma"],  # exact, where it is one flag
        "num_seeds": len(members),
        "elbo_sd": float(np.std(elbos, ddof=1)) if len(members) > 1 else 0.0,
    }
    result["diagnosis"] = _diagnosis([member["diagnosis"] for member in members])
    if kind != "discretised":
        result["elbo_paper"] = evaluation.paper_elbo(mean["elbo"], shape)
    if kind in ("density", "dequantised", "discretised"):
        result |= evaluation.rate(mean["elbo"], shape, kind=kind)._asdict()
        if "importance_bound" in mean:
            rate = evaluation.rate(mean["importance_bound"], shape, kind=kind)
            result["importance_bits_per_dimension"] = rate.bits_per_dimension
    return result


def _diagnosis(diagnoses: Sequence[str]) -> str:
    """What is said of a row's members, each finding in the words for the first that has it, and in how many seeds it is
    found, where that is not all."""
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
        if row["variant"] != "lv":
            low, high = theory.toy_best_elbo(row["sigma"])
            row["best_elbo"] = [low, high]
            row["sigma_gap"] = [-theory.toy_entropy() - high, -theory.toy_entropy() - low]


def table(summary: Mapping[str, Any]) -> str:
    """The summary for people."""
    lines = [_cells(row) for row in summary["rows"]]
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
        "": VARIANTS[row["variant"]],
        "sigma": f"{row['sigma']:.4g}",
        "best": f"{row['best_sigma']:.4g}",
        "ELBO [nats]": f"{row['elbo']:.4f}" + (f" +- {row['elbo_sd']:<6.4f}" if row["num_seeds"] > 1 else ""),
    }
    if "elbo_paper" in row:
        cells["in the paper"] = f"{row['elbo_paper']:.4f}"
    cells |= {"log p(x|z)": f"{row['log_likelihood']:.4f}", "KL": f"{row['kl']:.4f}"}
    cells["active"] = f"{row['active_units']:.4g}"
    if "importance_bound" in row:
        cells["IW bound"] = f"{row['importance_bound']:.4f}"
    if "gap" in row:
        cells["gap"] = f"{row['gap']:.4f}"
    if "sigma_gap" in row:
        cells["sigma's"] = f"{row['sigma_gap'][0]:.3f}"
    if "model_gap" in row:
        cells |= {"model's": f"{row['model_gap']:.4f}", "posterior's": f"{row['posterior_gap']:.4f}"}
    if "sharpness" in row:
        cells |= {"sharp": f"{row['sharpness']:.3f}", "noise": f"{row['sample_noise']:.4f}"}
    if "bits_per_dimension" in row:
        cells |= {"nats/dim": f"{row['nats_per_dimension']:.4f}", "bits/dim": f"{row['bits_per_dimension']:.4f}"}
    if "importance_bits_per_dimension" in row:
        cells["IW bits/dim"] = f"{row['importance_bits_per_dimension']:.4f}"
    return cells


def _notes(summary: Mapping[str, Any], titles: Sequence[str]) -> list[str]:
    first, n = summary["rows"][0], summary["num_dimensions"]
    seeds = first["num_seeds"]
    spread = f"mean +- standard deviation over {seeds} seeds" if seeds > 1 else "of one seed"
    notes = [
        f"ELBO = log p(x|z) - KL, in nats, higher is better: {spread}, on {summary['num_test_examples']} test "
        "examples. sigma: final, mean over seeds (LV-VAE: and dimensions); best: the root mean squared error, its "
        f"closed form for these reconstructions. Both in the unit {summary['unit']}. active: latent dimensions in use, "
        f"of {summary['latent_size']}."
    ]
    if "in the paper" in titles:
        notes.append(f"The paper leaves out a constant of the density: its ELBO is higher by (n/2) log 2 pi, n = {n}.")
    if "IW bound" in titles:
        notes.append(f"IW bound: importance-weighted, with {summary['num_importance_samples']} draws.")
    if "gap" in titles:
        notes.append(
            f"gap: log p(x), exact, less the ELBO; no model beats -H(x) = {-summary['entropy']:.4f} nats on average. "
            "sigma's: what it costs any networks, however strong, that this sigma is one fixed number, at least."
        )
    if "model's" in titles:
        notes.append(
            "model's: KL from the true density to the model's; posterior's: log p(x) of the model less the ELBO; both "
            f"on {summary['num_evidence_examples']} examples."
        )
    if "sharp" in titles:
        notes.append(
            "sharp: Laplacian energy of reconstructions by that of the originals, 1 if as sharp; noise: root mean "
            f"square distance of generated samples from their means; both of {min(100, summary['num_test_examples'])} "
            "images."
        )
    if "bits/dim" in titles and not first["is_code"]:
        notes.append(
            "These are densities at the pixel values k/255, not likelihoods of images: no code has more than n ln 256 "
            f"= {first['bound']:.1f} nats, and bits/dim = (n ln 256 - ELBO) / (n ln 2) is no length of a code. For one "
            "use --dequantize or --discretise."
        )
    elif "bits/dim" in titles:
        notes.append("bits/dim: a bound on the length of a code for the 8-bit values; 8 for uniform noise.")
    if "bits/dim" in titles and "in the paper" not in titles:
        notes.append(
            "Here sigma is that of the Gaussian before rounding, and best, from means clipped to [0, 1], no optimum."
        )
    return [textwrap.fill(note, 118) for note in notes]


def draw(path: Path, summary: Mapping[str, Any], panels: Sequence[figures.Panel]) -> None:
    """Writes the run's figures."""
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
        if part[0]["variant"] not in CONSTANT
    }
    draw_panels = figures.image_panels if len(summary["shape"]) == 3 else figures.plane_panels
    drawings = {
        "samples": draw_panels(panels, unit=summary["unit"]),
        "losses": figures.losses(all_curves),
        "sigma": figures.sigma_and_elbo(learned or all_curves, unit=summary["unit"]),
        "elbo": _elbo_against_sigma(summary),
    }
    for name, figure in drawings.items():
        runs.replace(path / "figures" / f"{name}.png", functools.partial(figure.savefig, dpi=120))


def _elbo_against_sigma(summary: Mapping[str, Any]) -> Any:
    columns: dict[str, dict[str, np.ndarray]] = {}
    for variant, title in VARIANTS.items():
        part = [member for member in summary["members"] if member["variant"] == variant]
        if part:
            columns[title] = {
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
        if title != VARIANTS["lv"] and summary["kind"] != "discretised"
    }
    limited = sorted({(row["sigma"], row["best_elbo"][1]) for row in summary["rows"] if "best_elbo" in row})
    return figures.elbo_against_sigma(
        {title: (column["sigma"], column["elbo"]) for title, column in columns.items() if title != VARIANTS["lv"]},
        {title: column["elbo"] for title, column in columns.items() if title in (VARIANTS["ls"], VARIANTS["lv"])},
        reused=(grid, reused),
        limits=np.array(limited).reshape(-1, 2).T,
        bound=-summary["entropy"] if "entropy" in summary else None,
        unit=summary["unit"],
    )
