"""The columns of every table of results, the notes that explain them, and a table as text and as Markdown."""

import html
import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, NamedTuple, TypeVar

import tabulate

from experiments.results import (
    Directions,
    Headroom,
    HeadroomRow,
    Quality,
    Realism,
    Row,
    SecondStage,
    SphereRow,
    SphereSummary,
    StageRow,
    Summary,
)
from experiments.variants import VARIANTS
from lvae_jax.evaluation import Kind

AnyRow = TypeVar("AnyRow")


class Column(NamedTuple, Generic[AnyRow]):
    """title: the heading; cell: the text of a row's cell, None where it has none."""

    title: str
    cell: Callable[[AnyRow], str | None]


def number(value: float | None, form: str = ".4f") -> str | None:
    """The number in this format; None as None."""
    return None if value is None else format(value, form)


def spread(mean: float, stddev: float | None, form: str = ".4f") -> str:
    """The mean and, if it is known, the standard deviation."""
    return f"{mean:{form}}" + (f" +- {stddev:{form}}" if stddev is not None else "")


def over_seeds(mean: float | None, stddev: float | None, num_seeds: int) -> str | None:
    """The mean, with the standard deviation of several seeds; None as None."""
    return None if mean is None else spread(mean, stddev if num_seeds > 1 else None)


SWEEP: tuple[Column[Row], ...] = (
    Column("", lambda row: VARIANTS[row.variant].title),
    Column("sigma", lambda row: number(row.sigma, ".4g")),
    Column("best sigma", lambda row: number(row.best_sigma, ".4g")),
    Column("ELBO [nats]", lambda row: spread(row.elbo, row.elbo_sd if row.num_seeds > 1 else None)),
    Column("paper's ELBO", lambda row: number(row.elbo_paper)),
    Column("log p(x|z)", lambda row: number(row.log_likelihood)),
    Column("KL", lambda row: number(row.kl)),
    Column("active units", lambda row: number(row.active_units, ".4g")),
    Column("IW bound", lambda row: number(row.importance_bound)),
    Column("gap", lambda row: number(row.gap)),
    Column("due to sigma", lambda row: number(row.sigma_gap[0], ".3f") if row.sigma_gap else None),
    Column("to model", lambda row: number(row.model_gap)),
    Column("to posterior", lambda row: number(row.posterior_gap)),
    Column("alignment", lambda row: number(row.alignment)),
    Column("sharpness", lambda row: number(row.sharpness, ".3f")),
    Column("sample noise", lambda row: number(row.sample_noise)),
    Column("nats/dim", lambda row: number(row.nats_per_dimension)),
    Column("bits/dim", lambda row: number(row.bits_per_dimension)),
    Column("IW bits/dim", lambda row: number(row.importance_bits_per_dimension)),
)
SPHERE: tuple[Column[SphereRow], ...] = (
    Column("", lambda row: VARIANTS[row.variant].title),
    Column("n", lambda row: str(row.dim)),
    Column("start", lambda row: number(row.start, ".4g")),
    Column("sigma", lambda row: number(row.relative_sigma, ".4g")),
    Column("radius", lambda row: spread(row.radius, row.radius_over_seeds_sd if row.num_seeds > 1 else None)),
    Column("posterior", lambda row: number(row.posterior_radius)),
    Column("exact", lambda row: number(row.exact_radius)),
    Column("ELBO [nats]", lambda row: spread(row.elbo, row.elbo_over_seeds_sd if row.num_seeds > 1 else None)),
    Column("best", lambda row: number(row.exact_elbo)),
    Column("KL", lambda row: number(row.kl)),
)
STAGE: tuple[Column[StageRow], ...] = (
    Column("", lambda row: VARIANTS[row.variant].title + (f", {row.sigma:.4g}" if VARIANTS[row.variant].swept else "")),
    Column("prior", lambda row: row.prior),
    Column("ELBO [nats]", lambda row: over_seeds(row.elbo, row.elbo_sd, row.num_seeds)),
    Column("gain", lambda row: over_seeds(row.gain, row.gain_sd, row.num_seeds)),
    Column("KL", lambda row: number(row.kl)),
    Column("information", lambda row: None if row.information is None else "{:.3f} to {:.3f}".format(*row.information)),
    Column("gap", lambda row: number(row.gap)),
    Column("to prior", lambda row: number(row.prior_gap)),
    Column("to model", lambda row: number(row.model_gap)),
    Column("to posterior", lambda row: number(row.posterior_gap)),
    Column("Wasserstein", lambda row: number(row.sliced_wasserstein)),
    Column("to nearest", lambda row: number(row.neighbour_distance)),
)
HEADROOM: tuple[Column[HeadroomRow], ...] = (
    Column("", lambda row: VARIANTS[row.variant].title + (f", {row.sigma:.4g}" if VARIANTS[row.variant].swept else "")),
    Column("covariance of the residuals", lambda row: row.kind),
    Column("gain [nats]", lambda row: number(row.nats, "+.4g")),
    Column("over seeds", lambda row: number(row.nats_sd, ".2g")),
    Column("error", lambda row: number(row.error, ".2g")),
    Column("bits/dim", lambda row: number(row.bits, "+.4f")),
)
REALISM: tuple[Column[Realism], ...] = (
    Column("", lambda row: row.row),
    Column(
        "classifier Frechet distance",
        lambda row: spread(row.classifier_frechet_distance, row.classifier_frechet_distance_sd, ".4g"),
    ),
    Column("precision", lambda row: spread(row.precision, row.precision_sd)),
    Column("recall", lambda row: spread(row.recall, row.recall_sd)),
)


def directions(num_dimensions: int) -> tuple[Column[Directions], ...]:
    """The columns of the critical sigma's table, for data of so many dimensions."""
    return (
        Column("sigma", lambda row: number(row.sigma, ".4g")),
        Column("directions", lambda row: str(row.directions)),
        Column("linear VAE [nats]", lambda row: number(row.linear_elbo)),
        Column("nats/dim", lambda row: number(row.linear_elbo / num_dimensions)),
        Column("active", lambda row: number(row.trained_active_directions, ".4g")),
        Column("units", lambda row: number(row.trained_active_units, ".4g")),
        Column(
            "ELBO [nats]",
            lambda row: None if row.trained_elbo is None else spread(row.trained_elbo, row.trained_elbo_sd),
        ),
    )


def sweep_notes(summary: Summary) -> list[str]:
    """Sentences that explain the columns of `SWEEP`."""
    first, found = summary.rows[0], titles(SWEEP, summary.rows)
    unit = summary.unit if summary.unit.startswith("unit ") else f"unit {summary.unit}"
    seeds = first.num_seeds
    spread = f"mean +- standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    notes = [
        f"ELBO = log p(x|z) - KL, in nats, higher is better: {spread}, on {summary.num_test_examples} test "
        "examples. sigma: the final one, mean over seeds and, where it varies, over dimensions. best sigma: the root "
        f"mean squared error, which is optimal for these reconstructions. Both in the {unit}. active "
        f"units: latent dimensions in use, out of {summary.latent_size}."
    ]
    if first.elbo_paper is not None:
        notes.append(
            f"The paper drops the density's constant (n/2) log 2 pi, n = {summary.num_dimensions}: its ELBO is higher "
            "by that."
        )
    if summary.missing is not None:
        notes.append(
            f"{summary.missing:.1%} of the test values are missing: p(x|z) and the ELBO are those of the others."
        )
    if summary.prior is not None:
        notes.append(f"p(z) is a prior that learned with the networks: {summary.prior}.")
    if "IW bound" in found:
        notes.append(f"IW bound: importance-weighted, with {summary.num_importance_samples} draws.")
    if summary.entropy is not None:
        notes.append(
            f"gap: the exact log p(x) minus the ELBO. No model exceeds -H(x) = {-summary.entropy:.4f} nats on average."
        )
    if "due to sigma" in found:
        notes.append("due to sigma: the part of the gap that no networks can close at this one fixed sigma, at least.")
    if "alignment" in found:
        notes.append("alignment: the mean cosine of the angle between the tangents and the true direction.")
    if "to model" in found:
        notes.append(
            "The gap is also the sum of two parts, on "
            f"{summary.num_evidence_examples} examples. to model: the KL from the true density to the model's. to "
            "posterior: the model's log p(x) minus the ELBO."
        )
    if "sharpness" in found:
        notes.append(
            "sharpness: Laplacian energy of reconstructions divided by that of the originals; 1 is as sharp. sample "
            "noise: root mean square distance between generated samples and their means. Both use "
            f"{min(100, summary.num_test_examples)} images."
        )
    if summary.levels is None:
        return notes
    if summary.kind == Kind.DENSITY:
        notes.append(
            f"These ELBOs are of densities at the pixel values k/{summary.levels - 1}, not likelihoods of images: as a "
            f"likelihood, no ELBO can exceed n ln {summary.levels} = {first.bound:.1f} nats."
        )
    if first.is_code:
        notes.append(
            f"bits/dim: a bound on the code length of the {summary.levels} grey levels, from the probabilities that "
            f"the model gives them, whatever it was trained with; uniform noise has {math.log2(summary.levels):.4g}."
        )
        without = [row for row in summary.rows if row.code_elbo is None]
        if summary.kind != Kind.DISCRETISED and 0 < len(without) < len(summary.rows):
            names = ", ".join(dict.fromkeys(VARIANTS[row.variant].title for row in without))
            others = "no code length" if summary.kind == Kind.DENSITY else "those of the density of noisy images"
            notes.append(
                f"{names}: no such probabilities; the bits, (n ln {summary.levels} - ELBO) / (n ln 2), are {others}."
            )
    else:
        notes.append(f"bits/dim = (n ln {summary.levels} - ELBO) / (n ln 2) is not a code length here.")
    if summary.histograms:
        notes.append("The histograms count the grey levels of the training split. They know nothing of the image.")
    if first.elbo_paper is None:
        notes.append(
            "sigma belongs to the distribution before rounding. best sigma uses means clipped to [0, 1]: it is not "
            "optimal here."
        )
    return notes


def histograms(summary: Summary) -> list[dict[str, str]]:
    """The lines below the rows of a sweep, cells by title: they have bits alone."""
    return [{"": title, "bits/dim": f"{bits:.4f}"} for title, bits in summary.histograms.items()]


def sphere_notes(summary: SphereSummary) -> list[str]:
    """Sentences that explain the columns of `SPHERE`."""
    seeds = summary.rows[0].num_seeds
    return [
        "start, sigma: at the start and at the end, in units of the critical one, R / sqrt(n). radius: mean norm of "
        "the decoder's outputs, z drawn from the prior; posterior: for z ~ q(z|x) of "
        f"{summary.num_test_examples} test examples. exact, best: Theorem 1's, for an F-VAE of this sigma with ideal "
        "networks." + (f" +-: standard deviation over {seeds} seeds." if seeds > 1 else "")
    ]


def realism_notes(quality: Quality) -> list[str]:
    """Sentences that explain the columns of `REALISM`."""
    seeds = f"mean +- standard deviation over {quality.num_seeds} seeds" if quality.num_seeds > 1 else "of one seed"
    return [
        f"Against the test split, {quality.num_images} images of each, {seeds}. samples: x ~ p(x|z), z ~ p(z), "
        "clipped to [0, 1]; means: of p(x|z). precision, recall: improved, k = 3, and Frechet distance, all of the "
        "features of a classifier trained on this data set's labels, test accuracy "
        f"{quality.classifier_accuracy:.4f}: it is no FID, and compares only within this table."
    ]


def stage_notes(stage: SecondStage) -> list[str]:
    """Sentences that explain the columns of `STAGE`."""
    found = titles(STAGE, stage.rows)
    spread = f"mean +- standard deviation over {stage.num_seeds} seeds" if stage.num_seeds > 1 else "one seed"
    notes = [
        f"The same encoders and decoders under priors that were fitted to the codes of {stage.num_examples} training "
        f"examples, of which {stage.num_held_out} were held out; measured on {stage.num_test_examples} test examples, "
        f"{spread}. ELBO, KL and gain, over N(0, I), in nats. information: bounds on the mutual information of x and "
        "z, which is the part of the KL that no prior saves. q(z): z from the posteriors of the test examples, in "
        "place of a prior: the best that any prior can give."
    ]
    if "gap" in found:
        notes.append(
            "gap: the exact log p(x) minus the ELBO under N(0, I). to prior: the part that this prior closes. to "
            "model: the KL from the true density to the model's, under this prior. to posterior: the rest."
        )
    if "Wasserstein" in found:
        notes.append(f"Wasserstein: the sliced distance of samples from the test points, in {stage.unit}.")
    if "to nearest" in found:
        notes.append(
            "to nearest: the root mean square distance of means of p(x|z) from the nearest training image, the "
            f"median of 500, in {stage.unit}: a prior that memorises would have a small one."
        )
    return notes


def titles(columns: Sequence[Column[AnyRow]], rows: Sequence[AnyRow]) -> list[str]:
    """The titles of the columns in which any row has a cell."""
    return [column.title for column in columns if any(column.cell(row) is not None for row in rows)]


class Table(NamedTuple, Generic[AnyRow]):
    """A table that the console and the report print alike, without columns that are empty.

    Attributes:
      more: lines below the rows, cells by title.
      notes: sentences below the table.
    """

    columns: Sequence[Column[AnyRow]]
    rows: Sequence[AnyRow]
    more: Sequence[Mapping[str, str]] = ()
    notes: Sequence[str] = ()

    def cells(self) -> list[list[str]]:
        """The titles, the rows and the lines below."""
        shown = titles(self.columns, self.rows)
        columns = [column for column in self.columns if column.title in shown]
        lines = [[column.cell(row) or "" for column in columns] for row in self.rows]
        return [shown, *lines, *([line.get(title, "") for title in shown] for line in self.more)]

    def text(self) -> str:
        """The table for the console."""
        cells = self.cells()
        align = ["left", *["right"] * (len(cells[0]) - 1)]
        # The titles go as a line: tabulate would widen every column by its padding of headings.
        table = tabulate.tabulate(cells, tablefmt="plain", disable_numparse=True, colalign=align)
        return "\n".join([table, *(textwrap.fill(note, 118) for note in self.notes)])

    def markdown(self) -> str:
        """The table for the report."""
        shown, *lines = self.cells()
        table = grid(shown, [[literal(cell) for cell in line] for line in lines])
        return "\n\n".join([table, "\n".join(map(literal, self.notes))]).rstrip()


def sweep(summary: Summary, *more: Column[Row]) -> Table[Row]:
    """The table of a sweep, with `more` columns."""
    return Table((*SWEEP, *more), summary.rows, histograms(summary), sweep_notes(summary))


def sphere(summary: SphereSummary) -> Table[SphereRow]:
    """The table of `experiments.hypersphere`."""
    return Table(SPHERE, summary.rows, notes=sphere_notes(summary))


def second_stage(stage: SecondStage) -> Table[StageRow]:
    """The table of `experiments.second_stage`."""
    more = []
    if stage.test_neighbour_distance is not None:
        more.append({"": "test images", "to nearest": f"{stage.test_neighbour_distance:.4f}"})
    return Table(STAGE, stage.rows, more, stage_notes(stage))


def headroom(result: Headroom) -> Table[HeadroomRow]:
    """The table of `experiments.headroom`."""
    noise = ", with the noise of dequantisation," if result.dequantised else ""
    return Table(
        HEADROOM,
        result.rows,
        notes=[
            f"gain in log p(x|z), over what the model has, by a Gaussian fitted to the standardised residuals{noise} "
            f"of {result.num_train} training examples, on {result.num_test} test examples: mean over "
            f"{result.num_seeds} seeds, with their standard deviation, and the standard error over test examples. No "
            "covariance depends on z: a model that is trained with one may win more."
        ],
    )


def realism(quality: Quality) -> Table[Realism]:
    """The table of `experiments.quality`."""
    return Table(REALISM, quality.rows, notes=realism_notes(quality))


def grid(titles: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown of cells that are Markdown."""
    # Even within code, a bar would end the cell.
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in (titles, *lines)]
    table = tabulate.tabulate(escaped[1:], escaped[0], tablefmt="github", disable_numparse=True)
    # Without the padding, which one long cell would bring into every row.
    return re.sub(r"-{3,}", "---", re.sub(r" {2,}", " ", table))


def literal(text: str) -> str:
    """Text as Markdown that shows it: nothing in it is HTML, markup or a new line. A spread stays on its line."""
    escaped = re.sub(r"([\\`*_\[])", r"\\\1", re.sub(r"\s+", " ", text))
    return html.escape(escaped, quote=False).replace(" +- ", "&nbsp;±&nbsp;")
