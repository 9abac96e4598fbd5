"""Counts the nats that other covariances would win on the residuals of a finished run: an observation model's headroom.

  python -m experiments.headroom --run_dir=RUN

takes the standardised residuals of each model of a run of experiments.sigma_sweep, fits one variance for each
dimension, low ranks, bases, a causal filter and a full covariance to those of training examples, and says how many nats
and bits per dimension each wins on test examples over what the model has, at the same networks and the same z. Nothing
is trained. Images get the noise of dequantisation, without which a pixel that never varies would win any number of
nats. The result goes to RUN/headroom; the same command reports it again.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from absl import flags
from jaxtyping import Array, Float, Key

from experiments import command, latents, options, report, statistics, sweep, tables
from experiments.options import Option, at_least
from experiments.results import Headroom, HeadroomRow, Member, Summary
from lvae_jax import datasets, evaluation, headroom
from lvae_jax import vae as vae_lib
from lvae_jax.keys import Stream, example_keys, stream_key

MOST_VALUES = 2**26  # of training residuals, half a gigabyte
GROUPS = (RESIDUALS,) = ("the residuals",)


class Config(NamedTuple):
    """The options of the command."""

    rank: Annotated[tuple[int, ...], Option(RESIDUALS, "ranks of the covariances of low rank", at_least(1))] = (
        1,
        10,
        50,
    )
    num_train: Annotated[int, Option(RESIDUALS, "training examples, at most", at_least(100, at_most=sweep.MOST))] = 8000
    num_test: Annotated[int, Option(RESIDUALS, "test examples, at most", at_least(100, at_most=sweep.MOST))] = 10_000
    summary: str | None = None  # no flag: the SHA-256 hash of the run's summary.json


def run(
    run_dir: str | None,
    config: Config | None = None,
    *,
    dataset: str | None = None,
    data_dir: str | None = None,
    manual_dir: str | None = None,
    celeba_dir: str | None = None,
    echo: Callable[[str], None] = print,
) -> Headroom:
    """Measures or reports the headroom of a finished run of `sigma_sweep`. `dataset` is the file or folder of a run on
    data of one's own; the folders are those of `datasets.load`.

    Raises:
      command.UsageError, runs.RunError, datasets.DatasetError: as their docstrings say, before anything is computed.
    """
    if run_dir is None:
        raise command.UsageError("--run_dir: give the directory of a finished run of experiments.sigma_sweep")
    path, config = command.path("run_dir", run_dir), config or Config()
    options.check(config)
    swept, summary = sweep.read_run(path)
    if swept.mask:
        raise command.UsageError(f"--run_dir={path}: a run with --mask, whose residuals have gaps, give another")
    places = command.paths(data_dir=data_dir, manual_dir=manual_dir, celeba_dir=celeba_dir)
    source = sweep.source(path, swept, dataset, places["celeba_dir"])
    config = config._replace(summary=latents.digest(path))

    def prepare(folder: Path) -> Callable[[], Headroom]:
        data = datasets.load(source, **sweep.data_options(swept), **places)
        return functools.partial(measure, path, swept, summary, config, data)

    return command.run(
        config, report.HEADROOM, str(path / report.HEADROOM), Headroom, prepare=prepare, table=table, echo=echo
    )


def measure(path: Path, swept: sweep.Config, summary: Summary, config: Config, data: datasets.Dataset) -> Headroom:
    """The headroom of all members."""
    size = int(np.prod(data.shape))
    num_train = min(config.num_train, max(100, MOST_VALUES // size))
    if data.train is not None:
        num_train = min(num_train, len(data.train))
    test = data.test[: config.num_test]
    # As a density, whatever it was trained as: residuals do not need its probabilities.
    density = swept._replace(discretise=False)
    noise = data.levels if data.levels is not None and not swept.dequantize else None
    found: dict[str, list[list[headroom.Gain]]] = {}
    rows: list[HeadroomRow] = []
    programs: dict[str, Callable[..., Any]] = {}
    members = report.by_row(summary.members)
    with tqdm.tqdm(total=len(summary.members), unit="model", dynamic_ncols=True, disable=None) as bar:
        for title, part in members.items():
            for member in part:
                vae, params = sweep.trained(path, density, member, summary.form)
                if member.variant not in programs:
                    programs[member.variant] = residuals(data, vae, noise=noise)
                of_split = functools.partial(programs[member.variant], params, member.seed)
                train_residuals, _ = of_split(examples(data, num_train, member.seed), train=True)
                test_residuals, base = of_split(test, train=False)
                gains = headroom.headroom(train_residuals, test_residuals, ranks=config.rank, base=base)
                found.setdefault(title, []).append(gains)
                bar.update()
            rows += rows_of(part[0], found[title], size)
    return Headroom(
        rows=rows,
        num_seeds=swept.num_seeds,
        num_train=num_train,
        num_test=len(test),
        dequantised=data.levels is not None,
        device=f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        jax=jax.__version__,
    )


def examples(data: datasets.Dataset, size: int, seed: int) -> np.ndarray:
    """Training examples in storage form; of a stream, which has none, as many empty ones."""
    if data.train is None:
        return np.zeros((size, 0), np.float32)
    order = np.random.default_rng((seed, Stream.SECOND_STAGE)).permutation(len(data.train))
    return np.asarray(data.train[np.sort(order[:size])])


def residuals(data: datasets.Dataset, vae: vae_lib.VAE, *, noise: int | None) -> Callable[..., Any]:
    """A function (params, seed, examples, train) that gives the standardised residuals [N, *S] of a model with these
    parameters, and the log density of each in nats, [N]. noise: the levels of data to dequantise."""

    @functools.partial(jax.jit, static_argnames="train")
    def of_chunk(
        params: vae_lib.Params, key: Key[Array, ""], x: Array, index: Array, train: bool
    ) -> tuple[Float[Array, "*S B"], Float[Array, " B"]]:
        data_key, noise_key, key = jax.random.split(key, 3)
        x = (data.batch if train else data.test_batch)(None if data.train is None and train else x, data_key, index)
        if noise is not None:
            keys = example_keys(noise_key, index)
            x += jax.vmap(lambda key: jax.random.uniform(key, data.shape, minval=-0.5, maxval=0.5))(keys) / (noise - 1)
        terms = vae_lib.elbo(example_keys(key, index), vae, params, x)
        base = log_density(vae, terms)
        return jnp.moveaxis(terms.residual, 0, -1), base

    def of_split(params: vae_lib.Params, seed: int, x: np.ndarray, *, train: bool) -> tuple[np.ndarray, np.ndarray]:
        key = jax.random.fold_in(stream_key(seed, Stream.EXAMINE), int(train))
        found, base = evaluation.over_split(functools.partial(of_chunk, params, key, train=train), x, chunk_size=500)
        return np.moveaxis(found, -1, 0), np.asarray(base, np.float64)

    return of_split


def log_density(vae: vae_lib.VAE, terms: vae_lib.Terms) -> Float[Array, " B"]:
    """log p(x|z) + log det L in nats: the model's density of the standardised residuals."""
    axes = tuple(range(1, terms.residual.ndim))
    if vae.likelihood.standardise is not None:  # a Gaussian with correlations
        return jnp.sum(-0.5 * terms.residual**2 - 0.5 * jnp.log(2.0 * jnp.pi), axis=axes)
    return terms.log_likelihood + jnp.sum(jnp.log(terms.stddev), axis=axes)


def rows_of(member: Member, found: list[list[headroom.Gain]], size: int) -> list[HeadroomRow]:
    """The rows of a row of the sweep, given the gains for each of its seeds."""
    rows = []
    for kind in zip(*found, strict=True):
        nats = [gain.nats for gain in kind]
        mean = float(np.mean(nats))
        rows.append(
            HeadroomRow(
                variant=member.variant,
                sigma=member.sigma,
                kind=kind[0].kind,
                nats=mean,
                nats_sd=statistics.stddev(nats),
                bits=mean / size / float(np.log(2.0)),
                error=kind[0].error,
            )
        )
    return rows


def table(result: Headroom) -> str:
    """The result as a table with notes, and a verdict on each model in words."""
    return "\n".join([tables.headroom(result).text(), *report.verdicts(result)])


def define_flags() -> None:
    options.define(Config, GROUPS)
    command.define_places()
    with command.group("the data"):
        flags.DEFINE_string("dataset", None, "the file or folder of a run on data of your own")


def main() -> None:
    config = Config(**options.read(Config))
    run(config=config, **command.values(("run_dir", "dataset", "data_dir", "manual_dir", "celeba_dir")))


if __name__ == "__main__":
    define_flags()
    command.start("headroom", main)
