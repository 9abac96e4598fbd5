"""The report of `experiments.paper`: Markdown, and the same as one HTML page with its figures inside."""

import base64
import importlib.metadata
import io
import math
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import markdown
import numpy as np
import PIL.Image

from experiments import claims
from experiments.claims import Claim, Ordering, Part
from experiments.variants import VARIANTS
from lvae_jax.evaluation import Kind

TOY_FIGURES = {
    "samples": "Figs. 4, 6 and 7: reconstructions over data, and generated points with their means, one seed.",
    "losses": "Figs. 8 and 9: the losses over steps, all seeds.",
    "sigma": "Fig. 10: sigma and ELBO over steps, all seeds; the bands span the smallest to the largest sigma.",
    "elbo": "Table 1 drawn: every ELBO against its sigma, with the exact limits.",
}
IMAGE_FIGURES = {
    "samples": "Figs. 5 and 11 to 18: data, reconstructions, generated means above generated samples, and sigma.",
    "losses": "The losses over steps, all seeds.",
    "sigma": "Sigma and ELBO over steps, all seeds; the band spans the smallest to the largest sigma.",
}
PLAIN_FIGURES = {
    "sigma": "Fig. 10 again, by plain Adam, one constant learning rate for the networks and log sigma.",
}
SPHERE_FIGURES = {
    "objective": "Fig. 2: Theorem 1's objective over the radius of the decoder's outputs and sigma.",
    "radius": "Theorem 1 beside trained models.",
}

ANSWERS = {True: "yes", False: "**no**", None: "undecided"}

STYLE = """
body { max-width: 62rem; margin: 0 auto; padding: 0 1rem 3rem; font: 1rem/1.5 system-ui, sans-serif; color: #1a1a1a; }
h1, h2, h3 { line-height: 1.25; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ccc; }
img { max-width: 100%; height: auto; } code { font-size: 0.9em; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: 0.9rem; margin: 0.5rem 0 1rem; }
th, td { padding: 0.25rem 0.6rem; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top; }
@media print {
  body { max-width: none; font-size: 9pt; } table { font-size: 7pt; } .scroll { overflow: visible; }
  img { max-height: 22cm; } tr, img { break-inside: avoid; } h2, h3 { break-after: avoid; }
}
"""


def figures(path: Path, parts: Mapping[str, Part]) -> dict[str, bytes]:
    """The PNG of every figure of the finished parts below `path`, by its name in the report, with a palette of 256
    colours: a third of the size or less."""
    found = {}
    for part in parts:
        for name in captions(part):
            with PIL.Image.open(path / part / "figures" / f"{name}.png") as file:
                image = file.convert("RGB")
            small = image.quantize(method=PIL.Image.Quantize.FASTOCTREE, dither=PIL.Image.Dither.NONE)
            # An octree keeps the rare hues of thin lines, but shifts the background, which the first pixel restores.
            palette, first = small.getpalette() or [], int(np.asarray(small)[0, 0])
            palette[3 * first : 3 * first + 3] = np.asarray(image)[0, 0].tolist()
            small.putpalette(palette)
            stream = io.BytesIO()
            small.save(stream, "PNG", optimize=True)
            found[f"figures/{part}-{name}.png"] = stream.getvalue()
    return found


def captions(part: str) -> dict[str, str]:
    """The figures of a part that the report shows, with what they show."""
    return {"sphere": SPHERE_FIGURES, "toy": TOY_FIGURES, "toy_plain": PLAIN_FIGURES}.get(part, IMAGE_FIGURES)


def html(text: str, figures: Mapping[str, bytes]) -> str:
    """The Markdown as a page that needs no other file."""
    body = markdown.markdown(text, extensions=["tables"])
    body = body.replace("<table>", '<div class="scroll"><table>').replace("</table>", "</table></div>")
    for name, png in figures.items():
        body = body.replace(f'src="{name}"', f'src="data:image/png;base64,{base64.b64encode(png).decode()}"')
    title = text.splitlines()[0].strip("# ").replace("*", "")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n"
        "</body>\n</html>\n"
    )


def compose(
    scale: str,
    found: Sequence[Claim],
    parts: Mapping[str, Part],
    judged: Mapping[str, Mapping[str, Any]],
    *,
    commands: Mapping[str, str],
    times: Mapping[str, float],
) -> str:
    """The report in Markdown.

    Args:
      found: the claims.
      judged: what `experiments.quality` says of the images of a part.
      commands: of each part of the scale, run or not.
      times: seconds that each part has taken.
    """
    sections = [
        f"# Variational Auto-Encoder: not all failures are equal. What reproduces, at the scale *{scale}*",
        "Every table, figure and claim of the paper (Berger and Sebag, 2020, arXiv 2003.01972) that was run, by "
        f"`python -m experiments.paper --scale={scale}`. ELBOs are in nats, the full density, higher is better; ± is "
        "one standard deviation over seeds. A claim holds if all of its checks hold; their thresholds stand in "
        "`experiments/claims.py`. A check is undecided if what was run shows neither it nor its opposite. Tests are at "
        "5 %, two-sided where nothing else is said, their p corrected by Holm over one claim or one table; d is "
        "Cohen's, of paired differences."
        + " **This scale tests the machinery; its verdicts say nothing of the paper.**"
        * (scale == "smoke"),
        "## Verdicts",
        table(["claim", "", "verdict", "yes", "no", "undecided"], [verdict(claim) for claim in found]),
        "## What was run",
        ran(parts, commands, times),
    ]
    sphere, toy = parts.get("sphere"), parts.get("toy")
    sections += ["## Claims", *(claim_section(claim) for claim in found)]
    if sphere is not None:
        sections += ["## Theorem 1", sphere_table(sphere), *shown("sphere")]
    if toy is not None:
        sections += [
            "## Table 1: the toy",
            toy_table(toy),
            "A poor optimum lies more than 0.1 nats below the row's best seed; it counts in every mean. No model "
            f"exceeds -H(x) = {-toy.summary['entropy']:.4f} nats. *gap* is the distance to the true density, *due to "
            "sigma* the part of the gap that no networks can close at this fixed sigma, at least. *paper's ELBO* lacks "
            "the density's constant, (n/2) log 2 pi. Paired over seeds:",
            orderings_table(claims.table_1_orderings(toy)),
            "### Figs. 4, 6 and 7 in numbers",
            shapes_table(toy),
            "Root mean squared error of reconstructions from the data, and their distance from the noiseless curve; "
            "the part of the data's noise that they keep, 1 for a copy; the width of the band of generated points in "
            "the regions of moderate, small and large noise; their sliced Wasserstein distance from the test points. "
            "Lengths of the toy.",
            "### Annealing",
            orderings_table(claims.annealing_orderings(toy)),
            *shown("toy"),
        ]
    if "toy_plain" in parts:
        sections += shown("toy_plain")
    for name in (*claims.IMAGES, *claims.CODES):
        if name in parts:
            sections += [f"## Table 2: {name.replace('_codes', ', by probabilities')}", images_table(parts[name])]
            if name in judged:
                sections += [quality_table(judged[name])]
            sections += shown(name)
    return "\n\n".join(sections) + "\n"


def verdict(claim: Claim) -> list[str]:
    """A claim's cells in the table of verdicts."""
    answers = [check.holds for check in claim.checks]
    counts = [str(answers.count(answer)) if answers else "" for answer in ANSWERS]
    return [claim.name, literal(claim.title), f"**{claim.verdict}**", *counts]


def literal(text: str) -> str:
    """Text in which no star is markup."""
    return text.replace("*", "\\*")


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def shown(part: str) -> list[str]:
    return [f"![{caption}](figures/{part}-{name}.png)\n\n*{caption}*" for name, caption in captions(part).items()]


def ran(parts: Mapping[str, Part], commands: Mapping[str, str], times: Mapping[str, float]) -> str:
    """The table of parts: command, seeds, time and device, or that the part was not run."""
    rows = []
    for name, command in commands.items():
        if name not in parts:
            rows.append([name, f"`{command}`", "**not run**", "", ""])
            continue
        summary = parts[name].summary
        seeds = len({member["seed"] for member in summary["members"]})
        minutes = f"{times[name] / 60.0:.1f}" if name in times else ""
        rows.append([name, f"`{command}`", str(seeds), minutes, f"{summary['device']}, jax {summary['jax']}"])
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("lvae_jax", "flax", "optax", "numpy"))
    return (
        table(["part", "command", "seeds", "minutes", "device"], rows)
        + f"\n\nReport written under Python {platform.python_version()}, {versions}, on {processor()}."
    )


def processor() -> str:
    """The host's processor, as Linux names it, with the number of its cores."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} x {names[0] if names else platform.machine()}"


def claim_section(claim: Claim) -> str:
    """A claim with its checks."""
    rows = [[literal(check.statement), ANSWERS[check.holds], literal(check.evidence)] for check in claim.checks]
    heading = f"### {claim.name}: {claim.verdict}\n\n*{literal(claim.title)}.*"
    return heading + ("\n\n" + table(["check", "holds", "evidence"], rows) if rows else "")


def sphere_table(sphere: Part) -> str:
    """Trained radii and ELBOs beside the exact ones."""
    rows = [
        [
            str(row["dim"]),
            f"{row['variant'].upper()}-VAE",
            f"{row['relative_sigma']:.4g}",
            spread(row["radius"], row["radius_over_seeds_sd"], row["num_seeds"]),
            f"{row['exact_radius']:.4f}",
            spread(row["elbo"], row["elbo_over_seeds_sd"], row["num_seeds"]),
            f"{row['exact_elbo']:.4f}",
        ]
        for row in sphere.summary["rows"]
    ]
    return table(["n", "", "sigma / critical", "radius", "exact", "ELBO", "best possible"], rows)


def spread(mean: float, stddev: float, num_seeds: int) -> str:
    return f"{mean:.4f}" + (f"&nbsp;±&nbsp;{stddev:.4f}" if num_seeds > 1 else "")


def over_seeds(values: Sequence[float]) -> str:
    return spread(float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0, len(values))


def rows_of(part: Part) -> list[tuple[str, dict[str, Any], list[dict[str, Any]]]]:
    """The rows of a sweep: title, row, members."""
    return [
        (
            literal(VARIANTS[row["variant"]].title),
            row,
            part.members(row["variant"], row["sigma"] if VARIANTS[row["variant"]].swept else None),
        )
        for row in part.summary["rows"]
    ]


def toy_table(toy: Part) -> str:
    rows = [
        [
            title,
            f"{row['sigma']:.4g}",
            spread(row["elbo"], row["elbo_sd"], row["num_seeds"]),
            f"{row['elbo_paper']:.4f}",
            f"{row['log_likelihood']:.4f}",
            f"{row['kl']:.4f}",
            f"{row['gap']:.4f}",
            f"{row['sigma_gap'][0]:.3f}" if "sigma_gap" in row else "",
            f"{claims.poor_optima(np.array([member['elbo'] for member in members]))} of {len(members)}",
        ]
        for title, row, members in rows_of(toy)
    ]
    titles = ["", "sigma", "ELBO", "paper's ELBO", "log p(x given z)", "KL", "gap", "due to sigma", "poor optima"]
    return table(titles, rows)


def orderings_table(orderings: Sequence[Ordering]) -> str:
    rows = []
    for ordering in orderings:
        found = ordering.paired
        cells = [literal(f"{ordering.better} less {ordering.worse}")]
        if found is None:
            cells += ["too few seeds"] + [""] * 5
        else:
            cells += [
                f"{found.difference:+.4f}",
                f"[{found.low:.4f}, {found.high:.4f}]",
                f"{found.p:.2g}",
                f"{found.p_wilcoxon:.2g}",
                f"{found.effect:.2f}",
                f"{found.wins} of {found.num_seeds}",
            ]
        rows.append(cells)
    return table(["", "difference", "95 % interval", "p", "p, Wilcoxon", "d", "positive"], rows)


def shapes_table(toy: Part) -> str:
    names = ("curve_distance", "noise_kept", "band_widths", "sliced_wasserstein")

    def cells(members: Sequence[Mapping[str, Any]]) -> list[str]:
        columns = np.stack([np.hstack([member[name] for name in names]) for member in members], axis=1)
        return [over_seeds(column) for column in columns]

    rows = [
        [title, f"{row['sigma']:.4g}", over_seeds([math.sqrt(member["mse"]) for member in members]), *cells(members)]
        for title, row, members in rows_of(toy)
    ]
    rows.append(["true points", "", "0", *cells([toy.summary["true_measures"]])])
    titles = ["", "sigma", "error", "from the curve", "noise kept", "band, moderate", "small", "large", "Wasserstein"]
    return table(titles, rows)


def images_table(part: Part) -> str:
    """Rows of the variants, and those of the histograms, which have bits alone."""
    summary = part.summary
    lines = [
        {
            "": title,
            "sigma": f"{row['sigma']:.4g}",
            "ELBO": spread(row["elbo"], row["elbo_sd"], row["num_seeds"]),
            "paper's ELBO": f"{row['elbo_paper']:.2f}" if "elbo_paper" in row else None,
            "nats/dim": f"{row['nats_per_dimension']:.4f}",
            "bits/dim": f"{row['bits_per_dimension']:.4f}",
            "KL": f"{row['kl']:.2f}",
            "error [grey levels]": over_seeds([part.highest_level * math.sqrt(member["mse"]) for member in members]),
            "sharpness": f"{row.get('sharpness', math.nan):.3f}",
            "sample noise": f"{row.get('sample_noise', math.nan):.4f}",
            "diagnosis": row["diagnosis"],
        }
        for title, row, members in rows_of(part)
    ]
    titles = [title for title, cell in lines[0].items() if cell is not None]
    lines += [{"": title, "bits/dim": f"{bits:.4f}"} for title, bits in summary.get("histograms", {}).items()]
    note = (
        "sharpness: Laplacian energy of reconstructions divided by that of the originals; sample noise: root mean "
        "square distance of generated samples from their means, pixels on [0, 1]."
    )
    if summary["kind"] == Kind.DENSITY:
        note = (
            f"Densities at the pixel values k/{part.highest_level}, not likelihoods of images: as likelihoods, no "
            f"model's ELBO can exceed {summary['rows'][0]['bound']:.1f} nats. "
        ) + note
    if summary["rows"][0]["is_code"]:
        note = "bits/dim: a bound on the code length of the grey levels, from the probabilities of each model. " + note
    return table(titles, [[line.get(title) or "" for title in titles] for line in lines]) + "\n\n" + note


def quality_table(quality: Mapping[str, Any]) -> str:
    forms = {"classifier_frechet_distance": ".4g", "precision": ".4f", "recall": ".4f"}

    def cell(row: Mapping[str, Any], name: str, form: str) -> str:
        return f"{row[name]:{form}}" + (f"&nbsp;±&nbsp;{row[f'{name}_sd']:{form}}" if f"{name}_sd" in row else "")

    rows = [[literal(row["row"]), *(cell(row, *each) for each in forms.items())] for row in quality["rows"]]
    note = (
        f"Features of a classifier trained here (test accuracy {quality['classifier_accuracy']:.4f}), "
        f"{quality['num_images']} images of each against the test split; no FIDs."
    )
    return table(["", "classifier Frechet distance", "precision", "recall"], rows) + "\n\n" + note
