"""The report of `experiments.paper`: Markdown, and the same as one HTML page with its figures inside."""

import base64
import importlib.metadata
import io
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import markdown
import numpy as np
import PIL.Image

from experiments import claims, latents, tables
from experiments.claims import Claim, Finished, Ordering, Part
from experiments.results import Member, Row, ToyMeasures
from experiments.variants import VARIANTS

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
RIBBON_FIGURES = {
    "samples": "Reconstructions with their tangents over data, and generated points with their means, from two sides, "
    "one seed.",
}
TANGENT_FIGURES = {
    "samples": "Data, reconstructions, generated means above generated samples, the first three principal axes of the "
    "tangents, and sigma.",
}
RANGE_FIGURES = {
    "elbo": "The ELBO of each model at every sigma, and at those of the table.",
    "rate_distortion": "The rate, the KL, against the distortion, the squared error, at every sigma.",
}
# Of the second stage, whose files have these names without prior-.
STAGE_FIGURES = {
    "prior-samples": "Samples and means with z from each prior, and from the posteriors of test examples, one seed.",
    "prior-latents": "Draws of z from each prior, and from the posteriors of test examples, one seed.",
}
SPHERE_FIGURES = {
    "objective": "Fig. 2: Theorem 1's objective over the radius of the decoder's outputs and sigma.",
    "radius": "Theorem 1 beside trained models.",
}
FIGURES = {
    "sphere": SPHERE_FIGURES,
    "toy": TOY_FIGURES,
    "toy_plain": PLAIN_FIGURES,
    "ribbon": RIBBON_FIGURES,
    **dict.fromkeys(claims.TANGENTS, TANGENT_FIGURES),
    **dict.fromkeys(claims.ONE_RUN, RANGE_FIGURES),
}

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # no script, and nothing from elsewhere
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


def figures(path: Path, parts: Iterable[str]) -> dict[str, bytes]:
    """The PNG of every figure that the finished parts below `path` have, by its name in the report, with a palette of
    256 colours: a third of the size or less."""
    found = {}
    for part in parts:
        files = {name: path / part / "figures" / f"{name}.png" for name in captions(part)}
        files |= {name: path / part / latents.FOLDER / "figures" / f"{name[6:]}.png" for name in STAGE_FIGURES}
        for name, png in files.items():
            if not png.exists():  # could not be drawn
                continue
            with PIL.Image.open(png) as file:
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
    return FIGURES.get(part, IMAGE_FIGURES)


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
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n"
        "</body>\n</html>\n"
    )


def compose(
    scale: str,
    found: Sequence[Claim],
    finished: Finished,
    *,
    commands: Mapping[str, str],
    times: Mapping[str, float],
) -> str:
    """The report in Markdown.

    Args:
      found: the claims.
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
        tables.grid(["claim", "", "verdict", "yes", "no", "undecided"], [verdict(claim) for claim in found]),
        "## What was run",
        ran(finished, commands, times),
    ]
    sphere, toy = finished.sphere, finished.sweeps.get("toy")
    sections += ["## Claims", *(claim_section(claim) for claim in found)]
    if sphere is not None:
        sections += ["## Theorem 1", tables.sphere(sphere).markdown(), *shown("sphere")]
    if toy is not None:
        sections += [
            "## Table 1: the toy",
            toy_table(toy),
            "A poor optimum lies more than 0.1 nats below the row's best seed; it counts in every mean.",
            "Paired over seeds:",
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
    if "toy_plain" in finished.sweeps:
        sections += shown("toy_plain")
    for name in (*claims.IMAGES, *claims.CODES):
        if name not in finished.sweeps:
            continue
        heading = f"## Table 2: {name.replace('_codes', ', by probabilities')}"
        sections += [heading, images_table(finished.sweeps[name])]
        if name in finished.quality:
            sections += [tables.realism(finished.quality[name]).markdown()]
        sections += shown(name)
    if finished.stages:
        sections.append("## Perspective 1: priors fitted to the codes")
    for name, stage in finished.stages.items():
        sections += [f"### {name}", tables.second_stage(stage).markdown()]
        if stage.quality is not None:
            sections.append(tables.realism(stage.quality).markdown())
        sections += [picture(f"{name}-{figure}", text) for figure, text in STAGE_FIGURES.items()]

    def each(names: Iterable[str]) -> list[str]:
        there = [(name, finished.sweeps[name]) for name in names if name in finished.sweeps]
        return [
            text
            for name, part in there
            for text in (f"### {name}", tables.sweep(part.summary).markdown(), *shown(name))
        ]

    tangents = each(("ribbon", *claims.TANGENTS))
    for name, measured in finished.headroom.items():
        tangents += [f"### {name}: headroom", tables.headroom(measured).markdown()]
    if tangents:
        sections += ["## Perspective 2: tangents of the manifold", *tangents]
    if one_run := each(claims.ONE_RUN):
        sections += ["## One model for all sigmas", *one_run]
    return "\n\n".join(sections) + "\n"


def verdict(claim: Claim) -> list[str]:
    """A claim's cells in the table of verdicts."""
    answers = [check.holds for check in claim.checks]
    counts = [str(answers.count(answer)) if answers else "" for answer in ANSWERS]
    return [claim.name, tables.literal(claim.title), f"**{claim.verdict}**", *counts]


def names(finished: Finished) -> list[str]:
    """The parts that were run."""
    return ["sphere"] * (finished.sphere is not None) + list(finished.sweeps)


def shown(part: str) -> list[str]:
    return [picture(f"{part}-{name}", caption) for name, caption in captions(part).items()]


def picture(name: str, caption: str) -> str:
    return f"![{caption}](figures/{name}.png)\n\n*{caption}*"


def ran(finished: Finished, commands: Mapping[str, str], times: Mapping[str, float]) -> str:
    """The table of parts: command, seeds, time and device, or that the part was not run."""
    rows = []
    for name, command in commands.items():
        if name not in names(finished):
            rows.append([name, f"`{command}`", "**not run**", "", ""])
            continue
        summary = finished.sweeps[name].summary if name in finished.sweeps else finished.sphere
        assert summary is not None, "the sphere is the one part that is no sweep"
        seeds = len({member.seed for member in summary.members})
        minutes = f"{times[name] / 60.0:.1f}" if name in times else ""
        device = tables.literal(f"{summary.device}, jax {summary.jax}")
        rows.append([name, f"`{command}`", str(seeds), minutes, device])
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("lvae_jax", "flax", "optax", "numpy"))
    return (
        tables.grid(["part", "command", "seeds", "minutes", "device"], rows)
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
    rows = [
        [tables.literal(check.statement), ANSWERS[check.holds], tables.literal(check.evidence)]
        for check in claim.checks
    ]
    heading = f"### {claim.name}: {claim.verdict}\n\n*{tables.literal(claim.title)}.*"
    return heading + ("\n\n" + tables.grid(["check", "holds", "evidence"], rows) if rows else "")


def members_of(part: Part, row: Row) -> list[Member]:
    """The members of a row."""
    return part.members(row.variant, row.sigma if VARIANTS[row.variant].swept else None)


def toy_table(toy: Part) -> str:
    """The sweep's table, with the number of poor optima."""

    def poor(row: Row) -> str:
        elbos = np.array([member.elbo for member in members_of(toy, row)])
        return f"{claims.poor_optima(elbos)} of {len(elbos)}"

    return tables.sweep(toy.summary, tables.Column("poor optima", poor)).markdown()


def orderings_table(orderings: Sequence[Ordering]) -> str:
    rows = []
    for ordering in orderings:
        found = ordering.paired
        cells = [tables.literal(f"{ordering.better} less {ordering.worse}")]
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
    return tables.grid(["", "difference", "95 % interval", "p", "p, Wilcoxon", "d", "positive"], rows)


def shapes_table(toy: Part) -> str:
    """Figs. 4, 6 and 7 in numbers: of the rows, and of true points."""
    true = toy.summary.true_measures
    assert true is not None, "a run of the toy has them"

    def cells(measured: Sequence[Member | ToyMeasures]) -> list[str]:
        columns = [[m.curve_distance, m.noise_kept, *(m.band_widths or ()), m.sliced_wasserstein] for m in measured]
        return [over_seeds(column) for column in np.array(columns, float).T]

    rows = []
    for row in toy.summary.rows:
        members = members_of(toy, row)
        error = over_seeds([member.best_sigma for member in members])
        rows.append([tables.literal(VARIANTS[row.variant].title), f"{row.sigma:.4g}", error, *cells(members)])
    rows.append(["true points", "", "0", *cells([true])])
    titles = ["", "sigma", "error", "from the curve", "noise kept", "band, moderate", "small", "large", "Wasserstein"]
    return tables.grid(titles, rows)


def over_seeds(values: Sequence[float]) -> str:
    """Their mean, with the standard deviation of several."""
    stddev = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return tables.literal(tables.spread(float(np.mean(values)), stddev))


def images_table(part: Part) -> str:
    """The sweep's table, with the error in grey levels and the diagnoses."""

    def error(row: Row) -> str:
        return over_seeds([part.highest_level * member.best_sigma for member in members_of(part, row)])

    diagnosis: tables.Column[Row] = tables.Column("diagnosis", lambda row: row.diagnosis)
    return tables.sweep(part.summary, tables.Column("error [grey levels]", error), diagnosis).markdown()
