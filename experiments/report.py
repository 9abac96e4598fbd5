"""The results of a sweep as rows over seeds, one table and figures."""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from experiments import statistics, tables
from experiments.results import Curve, Headroom, Member, Row, Scored, Summary
from experiments.variants import LEADER, VARIANTS, Sigma
from lvae_jax import evaluation, figures, runs, theory
from lvae_jax.datasets import Form
from lvae_jax.evaluation import Kind
from lvae_jax.headroom import VARIANCES

# One colour for a variant in all figures.
COLOURS = {variant.title: colour for variant, colour in zip(VARIANTS.values(), figures.MODEL_COLOURS, strict=True)}
HEADROOM = "headroom"  # the folder of experiments.headroom in the directory of a run
AVERAGED = [field.name for field in dataclasses.fields(Scored) if field.name not in ("variant", "diagnosis")]


class OfRow(Protocol):
    """A result of a row of a sweep."""

    @property
    def variant(self) -> str: ...
    @property
    def sigma(self) -> float: ...


BestElbo = Callable[[float], tuple[float, float]]  # see `domains.Domain`
AnyOfRow = TypeVar("AnyOfRow", bound=OfRow)


def by_row(results: Sequence[AnyOfRow]) -> dict[str, list[AnyOfRow]]:
    """Members or rows by the title of their row: seeds are pooled, and F-VAEs told apart by their sigma."""
    rows: dict[str, list[AnyOfRow]] = {}
    for result in results:
        variant = VARIANTS[result.variant]
        title = variant.title + (f", sigma = {result.sigma}" if variant.swept else "")
        rows.setdefault(title, []).append(result)
    return rows


def row(members: Sequence[Member], form: Form, *, kind: Kind) -> Row:
    """The mean over a row's members, with the standard deviation of the ELBO over seeds (0 for a single one), for data
    of this form. `kind` is that of `evaluation.rate`; data without levels have no rate."""
    first, shape, levels = members[0], form.shape, form.levels
    known = [name for name in AVERAGED if getattr(first, name) is not None]
    mean: dict[str, Any] = {name: float(np.mean([getattr(member, name) for member in members])) for name in known}
    # The mean of equal floats can differ from them in the last digit, and rows are found by their sigma.
    if VARIANTS[first.variant].swept:
        mean["sigma"] = first.sigma
    result = Row(
        variant=first.variant,
        diagnosis=_diagnosis([member.diagnosis for member in members]),
        num_seeds=len(members),
        elbo_sd=statistics.stddev([member.elbo for member in members]),
        # Its constant counts all dimensions.
        elbo_paper=None if kind == Kind.DISCRETISED or form.masked else evaluation.paper_elbo(mean["elbo"], shape),
        **mean,
    )
    if levels is None:
        return result
    own = code = evaluation.rate(result.elbo, shape, kind=kind, levels=levels)
    bound, kind_of_bound = result.importance_bound, kind
    # The bits of probabilities replace those of a density, which are no code length.
    if result.code_elbo is not None:
        code = evaluation.rate(result.code_elbo, shape, kind=Kind.DISCRETISED, levels=levels)
    if result.code_importance_bound is not None:
        bound, kind_of_bound = result.code_importance_bound, Kind.DISCRETISED
    weighted = None if bound is None else evaluation.rate(bound, shape, kind=kind_of_bound, levels=levels)
    return dataclasses.replace(
        result,
        nats_per_dimension=own.nats_per_dimension,
        bound=own.bound,
        bits_per_dimension=code.bits_per_dimension,
        is_code=code.is_code,
        importance_bits_per_dimension=None if weighted is None else weighted.bits_per_dimension,
    )


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


def with_limits(row: Row, test_log_prob: float, *, entropy: float, best_elbo: BestElbo | None) -> Row:
    """The row of data of known density with its gap: the mean log p(x) of the test examples less the ELBO, in nats; and
    where sigma is one number and its `best_elbo` is known, the part of the gap that this sigma imposes on any networks,
    an interval."""
    row = dataclasses.replace(row, gap=test_log_prob - row.elbo)
    # No one sigma, no limit at it.
    if best_elbo is None or VARIANTS[row.variant].sigma is Sigma.MAP:
        return row
    low, high = best_elbo(row.sigma)
    return dataclasses.replace(row, best_elbo=[low, high], sigma_gap=[-entropy - high, -entropy - low])


def line(title: str, row: Row) -> str:
    """A row in one line, for those who wait for the table."""
    sigma = "" if VARIANTS[row.variant].swept else f", sigma = {row.sigma:.4g}"
    elbo = tables.spread(row.elbo, row.elbo_sd if row.num_seeds > 1 else None)
    return f"{title}{sigma}: ELBO {elbo} nats, KL {row.kl:.4f}; {row.diagnosis}"


def table(summary: Summary, headroom: Headroom | None = None) -> str:
    """The summary as a table with notes and diagnoses, to which the `headroom` of the run adds, if it was measured."""
    diagnoses = [f"{title}: {rows[0].diagnosis}" for title, rows in by_row(summary.rows).items()]
    lines = [*diagnoses, *best_sigmas(summary), *(verdicts(headroom) if headroom is not None else ())]
    return "\n".join([tables.sweep(summary).text(), *lines])


def best_sigmas(summary: Summary) -> list[str]:
    """A line for conditioned models: the sigma of their largest ELBO, beside the one that the leader has learned."""
    if not summary.curves:
        return []
    found = [("the largest ELBO at", [curve.best_sigma for curve in summary.curves])]
    found.append((f"{VARIANTS[LEADER].title} learned", [m.sigma for m in summary.members if m.variant == LEADER]))
    parts = [
        f"{words} sigma = {tables.spread(float(np.mean(sigmas)), statistics.stddev(sigmas) if sigmas[1:] else None)}"
        for words, sigmas in found
        if sigmas
    ]
    return [f"{VARIANTS[summary.curves[0].variant].title}: {', '.join(parts)}"]


def verdicts(result: Headroom) -> list[str]:
    """Two lines for each model: what variances alone would win, and what correlations would win beside them."""
    lines = []
    for title, rows in by_row(result.rows).items():
        by_kind = {row.kind: row for row in rows}
        variances = by_kind[VARIANCES]
        best = max(rows, key=lambda row: row.nats)
        more = max(best.nats - max(variances.nats, 0.0), 0.0)
        share = best.bits / best.nats if best.nats else 0.0
        lines += [
            f"{title}: {VARIANCES} would win {variances.nats:+.4g} nats, {variances.bits:+.3f} bits/dim;",
            f"    the best of all, {best.kind}, {more:.4g} nats more, {more * share:.3f} bits/dim",
        ]
    return lines


def draw(
    path: Path,
    summary: Summary,
    panels: Sequence[figures.Panel],
    *,
    draw_panels: Callable[..., figures.Figure],
    best_elbo: BestElbo | None = None,
    echo: Callable[[str], None] = print,
) -> None:
    """Writes the run's figures; `draw_panels` and `best_elbo` are those of the data's `Domain`."""
    metrics = runs.read_curves(path)

    def curves(part: Sequence[Member]) -> figures.Curves:
        columns = [metrics[member.group, member.member] for member in part]
        values = (np.array([column[name] for column in columns]) for name in figures.Curves._fields[1:])
        return figures.Curves(columns[0]["step"], *values)

    rows = by_row(summary.members)
    # The metrics of a conditioned model are of all sigmas at once.
    trained = {title: part for title, part in rows.items() if not VARIANTS[part[0].variant].conditioned} or rows
    all_curves = {title: curves(part) for title, part in trained.items()}
    learned = {
        title: curve
        for (title, part), curve in zip(trained.items(), all_curves.values(), strict=True)
        if VARIANTS[part[0].variant].sigma is not Sigma.CONSTANT
    }
    # Where all models are F-VAEs, colours tell their sigmas apart.
    colours = _colours(member.variant for member in summary.members) if learned else None
    drawings: dict[str, Callable[[], figures.Figure]] = {
        "samples": lambda: draw_panels(panels, unit=summary.unit),
        "losses": lambda: figures.losses(all_curves),
        "sigma": lambda: figures.sigma_and_elbo(learned or all_curves, unit=summary.unit, colours=colours),
        "elbo": lambda: _elbo_against_sigma(summary),
    }
    if summary.curves:
        drawings["rate_distortion"] = lambda: _rate_distortion(summary, best_elbo)
    write_figures(path, drawings, echo=echo)


def write_figures(
    path: Path, drawings: Mapping[str, Callable[[], figures.Figure]], *, echo: Callable[[str], None] = print
) -> None:
    """Writes the figures of the run in `path`, by their names. One that cannot be drawn is left out, and a line says
    so: it must not cost the run."""
    for name, drawing in drawings.items():
        file = path / "figures" / f"{name}.png"
        try:
            runs.replace(file, functools.partial(drawing().savefig, dpi=120))
        except (ValueError, TypeError, ArithmeticError, MemoryError) as error:  # of numpy and matplotlib
            echo(f"{file} is left out, it cannot be drawn: {' '.join(str(error).split())}")


def _curves(summary: Summary) -> dict[str, list[Curve]]:
    """The curves of conditioned models by their title."""
    found: dict[str, list[Curve]] = {}
    for curve in summary.curves or ():
        found.setdefault(VARIANTS[curve.variant].title, []).append(curve)
    return found


def _rate_distortion(summary: Summary, best_elbo: BestElbo | None) -> Any:
    """Rate against distortion, n times the mean squared error."""
    n, curves = summary.num_dimensions, _curves(summary)
    names = list(dict.fromkeys(member.variant for member in summary.members))
    points = {}
    for name in names:
        if not VARIANTS[name].conditioned:
            part = [member for member in summary.members if member.variant == name]
            points[VARIANTS[name].title] = np.array([[n * member.mse, member.kl] for member in part]).T
    lines = {title: [np.array([n * np.array(c.mse), c.kl]) for c in found] for title, found in curves.items()}
    limit = None
    if best_elbo is not None:
        sigmas = np.array(next(iter(curves.values()))[0].sigma)
        distortions = np.concatenate([line[0] for found in lines.values() for line in found])
        grid = np.geomspace(distortions.min(), distortions.max(), 200)
        best = np.array([best_elbo(sigma)[1] for sigma in sigmas])
        limit = grid, theory.least_rate(grid, sigmas, best, num_dimensions=n)
    return figures.rate_distortion(points, lines, limit=limit, unit=summary.unit, colours=_colours(names))


def _elbo_against_sigma(summary: Summary) -> Any:
    columns: dict[str, dict[str, np.ndarray]] = {}
    names = list(dict.fromkeys(member.variant for member in summary.members))
    curves = _curves(summary)
    maps = [VARIANTS[name].title for name in names if VARIANTS[name].sigma is Sigma.MAP]
    for name in names:
        part = [member for member in summary.members if member.variant == name]
        columns[VARIANTS[name].title] = {
            name: np.array([getattr(member, name) for member in part]) for name in ("sigma", "elbo", "mse", "kl")
        }
    sigmas = np.concatenate([column["sigma"] for column in columns.values()])
    grid = np.geomspace(0.3 * sigmas.min(), 3.0 * sigmas.max(), 200)
    reused = {
        title: np.array(
            [
                evaluation.elbo_at(grid, mse=mse, kl=kl, num_dimensions=summary.num_dimensions)
                for mse, kl in zip(column["mse"], column["kl"], strict=True)
            ]
        )
        for title, column in columns.items()
        if title not in (*maps, *curves) and summary.kind != Kind.DISCRETISED and summary.missing is None
    }
    limited = sorted({(row.sigma, row.best_elbo[1]) for row in summary.rows if row.best_elbo is not None})
    return figures.elbo_against_sigma(
        {title: (column["sigma"], column["elbo"]) for title, column in columns.items() if title not in maps},
        {title: column["elbo"] for title, column in columns.items() if title in {VARIANTS[LEADER].title, *maps}},
        curves={title: [(np.array(c.sigma), np.array(c.elbo)) for c in found] for title, found in curves.items()},
        reused=(grid, reused),
        limits=np.array(limited).reshape(-1, 2).T,
        bound=None if summary.entropy is None else -summary.entropy,
        unit=summary.unit,
        colours=_colours(names),
    )


def _colours(names: Iterable[str]) -> dict[str, str]:
    """The colours of these variants by title. Those of one kind that differ in rank have that of their kind, from
    light to dark."""
    colours = {VARIANTS[name].title: COLOURS[VARIANTS[VARIANTS.base(name)].title] for name in names}
    for colour in set(colours.values()):
        titles = [title for title, other in colours.items() if other == colour]
        colours |= zip(titles, figures.shades(colour, len(titles)), strict=True)
    return colours
