"""The sigma above which a Gaussian decoder learns nothing, for any data set, in the data's unit.

  python -m experiments.critical_sigma --dataset=mnist

prints and draws how many principal directions of the training examples a decoder with a fixed sigma can use, at each
sigma: those whose stddev exceeds it. The largest stddev is the critical sigma; for MNIST on [0, 1], 2.262. It also
says whether VAEs with a learned sigma can collapse for good. With --compare=RUN_DIR, the latent dimensions that the
F-VAEs of a finished sigma_sweep use, and their ELBOs, stand beside.
"""

import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from experiments import command, hosts, options, results, sweep, tables
from experiments.options import Option, Range
from experiments.results import POINTS, CriticalSigma, Directions, Row, Summary
from experiments.variants import VARIANTS
from lvae_jax import celeba, datasets, figures, runs, theory
from lvae_jax.evaluation import Kind
from lvae_jax.keys import of_seed

CHUNK = 1000
STREAM_SIZE = 100_000


TABLE = "the table"


class Config(NamedTuple):
    """The options of a run."""

    dataset: Annotated[str, Option(sweep.DATA, sweep.DATASETS)] = "mnist"
    sigma: Annotated[
        tuple[float, ...] | None,
        Option(
            TABLE,
            "sigmas of the rows (default: 12 up to the critical sigma, geometrically)",
            Range(lambda value: 1e-6 <= value <= 1e6, "a number from 1e-6 to 1e6"),
        ),
    ] = None
    image_size: sweep.ImageSize = None
    levels: sweep.Levels = None
    fake_data: sweep.FakeData = False
    compare: Annotated[
        str | None,
        Option(TABLE, "folder of a finished sigma_sweep of this data set, whose F-VAEs the table shows as well"),
    ] = None
    test_fraction: sweep.TestFraction = 0.1
    celeba_files: str | None = None  # no flag: `run` sees which images --celeba_dir holds
    own_files: str | None = None  # no flag: `run` sees what --dataset=PATH holds


def run(
    config: Config, *, run_dir: str | None = None, echo: Callable[[str], None] = print, **places: Any
) -> CriticalSigma:
    """Computes or reports the principal stddevs. `places` are folders of `datasets.load`.

    Raises:
      command.UsageError, runs.RunError, datasets.DatasetError: as their docstrings say, before anything is written.
    """
    options.check(config)
    places = command.paths(**places)
    config = config._replace(**command.paths(compare=config.compare))
    source, names = config.dataset, ("image_size", "levels", "fake_data", "test_fraction")
    data: dict[str, Any] = {name: getattr(config, name) for name in names}
    datasets.check(source, **data, **places)
    config = sweep.recorded(config)
    if places.get("celeba_dir") is not None:
        config = config._replace(celeba_files=celeba.fingerprint(places["celeba_dir"]))
    trained = f_vaes(config)

    def prepare(path: Path) -> Callable[[], CriticalSigma]:
        dataset = hosts.in_turn(lambda: datasets.load(source, **data, **places))
        return functools.partial(measure, config, path, dataset, trained)

    name = f"critical-sigma_{command.file_name(config.dataset)}"
    return command.run(config, name, run_dir, CriticalSigma, prepare=prepare, table=table, echo=echo)


def f_vaes(config: Config) -> list[Row]:
    """The F-VAEs' rows of the sweep to compare with; an empty list without one.

    Raises:
      command.UsageError: it is unfinished, of another data set or has no F-VAE.
    """
    if config.compare is None:
        return []
    path = Path(config.compare)
    if not (path / "summary.json").exists():
        raise command.UsageError(f"--compare={path}: no finished run there")
    theirs, summary = runs.read_json(path / "flags.json"), results.read(path / "summary.json", Summary)
    for name in ("dataset", "image_size", "levels", "fake_data", "test_fraction", "celeba_files", "own_files"):
        if theirs.get(name, Config._field_defaults[name]) != getattr(config, name):
            raise command.UsageError(f"--compare={path}: made with --{name}={theirs.get(name)}, give the same here")
    if summary.kind not in (POINTS, Kind.DENSITY):
        raise command.UsageError(
            f"--compare={path}: its ELBOs are not of the data's density, run its command without --discretise and "
            "--dequantize"
        )
    rows = [row for row in summary.rows if VARIANTS[row.variant].per_sigma]
    if not rows:
        raise command.UsageError(f"--compare={path}: has no F-VAE, run its command with f in --variants")
    return rows


def measure(config: Config, path: Path, dataset: datasets.Dataset, trained: list[Row]) -> CriticalSigma:
    """Computes the principal stddevs and draws the figure; returns the summary."""
    spread = theory.spread(chunks(dataset))
    stddevs = spread.principal_stddevs
    size = int(np.prod(dataset.shape))
    sigmas = sorted({*(config.sigma or np.geomspace(1e-2, 1.0, 12) * stddevs[0]), *(row.sigma for row in trained)})
    elbos = theory.linear_best_elbo(np.array(sigmas), stddevs, num_dimensions=size, latent_size=size)
    names = ("active_units", "active_directions", "elbo", "elbo_sd", "num_seeds")
    by_sigma = {row.sigma: {f"trained_{name}": getattr(row, name) for name in names} for row in trained}
    rows = [
        Directions(
            sigma=float(sigma),
            directions=int(np.sum(stddevs > sigma)),
            linear_elbo=float(elbo),
            **by_sigma.get(sigma, {}),
        )
        for sigma, elbo in zip(sigmas, elbos, strict=True)
    ]
    # Finer than the table, and beyond the critical sigma, to show where the curve becomes flat.
    grid = np.geomspace(min(sigmas[0], 0.01 * stddevs[0]), 1.5 * max(stddevs[0], sigmas[-1]), 400)
    figure = figures.directions(
        stddevs,
        grid,
        theory.linear_best_elbo(grid, stddevs, num_dimensions=size, latent_size=size),
        trained=np.array([[row.sigma, row.active_directions, row.elbo] for row in trained]).reshape(-1, 3).T,
        unit=dataset.unit,
    )
    runs.replace(path / "figures" / "directions.png", functools.partial(figure.savefig, dpi=120))
    return CriticalSigma(
        critical_sigma=float(stddevs[0]),
        mean_sigma=float(np.sqrt(np.mean(spread.stddevs**2))),
        correlation=spread.correlation,
        chance=spread.chance,
        principal_stddevs=stddevs.tolist(),
        rows=rows,
        dataset=config.dataset,
        num_dimensions=size,
        num_examples=STREAM_SIZE if dataset.train is None else len(dataset.train),
        unit=dataset.unit,
        jax=jax.__version__,
    )


def chunks(dataset: datasets.Dataset) -> Iterator[np.ndarray]:
    """All training examples as the model sees them, or the first `STREAM_SIZE` of a stream, with a progress bar."""
    size = STREAM_SIZE if dataset.train is None else len(dataset.train)
    for start in tqdm.trange(0, size, CHUNK, desc="covariance", unit="k"):
        index = np.arange(start, min(start + CHUNK, size), dtype=np.int32)
        examples = None if dataset.train is None else jnp.asarray(dataset.train[index])
        yield np.asarray(dataset.batch(examples, of_seed(0), jnp.asarray(index)))


def table(summary: CriticalSigma) -> str:
    """The summary as a table with notes."""
    columns = tables.directions(summary.num_dimensions)
    first = (
        f"critical sigma: {summary.critical_sigma:.4g}, unit: {summary.unit}. With a larger one, fixed, a Gaussian "
        "decoder learns nothing but the mean."
    )
    notes = [
        f"directions: principal ones of {summary.num_examples} training examples whose stddev exceeds sigma, of "
        f"{summary.num_dimensions}.",
        "linear VAE: the largest ELBO of a linear encoder and decoder, exact (probabilistic PCA).",
    ]
    if "active" in tables.titles(columns, summary.rows):
        notes.append(
            "Right of it, trained F-VAEs. active, units: principal directions, and dimensions, of the latent space "
            "along which the posterior's mean varies by more than 0.01."
        )
    return first + "\n" + tables.Table(columns, summary.rows, notes=[*notes, *collapse(summary)]).text()


def collapse(summary: CriticalSigma) -> list[str]:
    """Sentences that say whether an LS-VAE and an LV-VAE that encode nothing can stay so; none for a summary from
    before that was computed."""
    if summary.correlation is None or summary.mean_sigma is None or summary.chance is None:
        return []
    even = (1.0 + math.sqrt(summary.num_dimensions / summary.num_examples)) * summary.mean_sigma
    ls = f"An LS-VAE that encodes nothing has sigma = {summary.mean_sigma:.4g}, the root of the mean variance. "
    lv = (
        "An LV-VAE that encodes nothing has the stddev of each dimension as its sigma. The largest eigenvalue of the "
        f"correlation matrix is {summary.correlation:.4g}; by chance, independent dimensions have "
        f"{summary.chance:.4g}. "
    )
    stays = "It can stay there, as no direction stands out."
    leaves = "It does not stay there, as it gains by encoding."
    return [
        ls + (leaves if summary.critical_sigma > even else stays),
        lv + (leaves if summary.correlation > summary.chance else stays),
    ]


def define_flags() -> None:
    options.define(Config, (TABLE, sweep.DATA))
    command.define_places()


def main() -> None:
    values = options.read(Config)
    if values["dataset"].partition(":")[0] == celeba.NAME and values["image_size"] is None:
        values["image_size"] = sweep.CELEBA_DEFAULTS["image_size"]
    run(Config(**values), **command.values(("run_dir", "data_dir", "manual_dir", "celeba_dir")))


if __name__ == "__main__":
    define_flags()
    command.start("critical_sigma", main)
