"""Compares VAEs that differ only in the sigma of their Gaussian observation model: fixed, learned and scheduled.

  python -m experiments.sigma_sweep --sigma=0.1

trains, on the toy, an F-VAE at sigma = 0.1, an LS-VAE and an LV-VAE, three seeds each, prints one table and leaves
metrics, checkpoints, figures and summary.json in a directory below runs/. The same command resumes an interrupted run,
and reports a finished one again. It takes some two minutes on two CPU cores; expect ELBOs of about -0.90, -0.75 and
-0.48 nats.
"""

import functools
import hashlib
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tqdm
from absl import app, flags, logging

from experiments import loop
from lvae_jax import datasets, evaluation, figures, likelihoods, networks, runs, training
from lvae_jax import vae as vae_lib

VARIANTS = {
    "f": "F-VAE",
    "ls": "LS-VAE",
    "lv": "LV-VAE",
    "optimal": "sigma-VAE",
    "f_star": "F*-VAE",
    "replay": "replayed F-VAE",
}


class Config(NamedTuple):
    """What a sweep computes. The one place of the defaults: the toy's; `configure` knows the others."""

    sigma: tuple[float, ...] = (0.1,)
    variants: tuple[str, ...] = ("f", "ls", "lv")
    dataset: str = "toy"
    num_seeds: int = 3
    seed: int = 0
    num_steps: int = 3000
    batch_size: int = 100
    latent_size: int = 2
    beta: float = 1.0
    sigma_from: str | None = None


IMAGE_DEFAULTS = {"num_steps": 600, "latent_size": 256}  # an epoch of MNIST; the paper trains 1,000


def configure(**values: Any) -> Config:
    """The config of these values, and of the data set's defaults for what is not given or None."""
    given = {name: value for name, value in values.items() if value is not None}
    return Config(**(IMAGE_DEFAULTS if given.get("dataset", "toy") != "toy" else {}) | given)


class UsageError(Exception):
    """The flags ask for something impossible; the message, one line, names the fix."""


def run(
    config: Config,
    *,
    run_dir: str | None = None,
    data_dir: str | None = None,
    manual_dir: str | None = None,
    echo: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Runs, resumes or reports the sweep; returns what summary.json holds.

    Raises:
      UsageError, runs.RunError, datasets.DatasetError: as their docstrings say, before anything is trained or
      overwritten.
    """
    check(config, data_dir=data_dir)
    path = Path(run_dir).expanduser() if run_dir else default_run_dir(config)
    finished = runs.find_run(path, config._asdict())
    if finished is not None:
        echo(f"{path} is finished")
        echo(table(finished))
        return finished
    record = imported_record(config, path)
    dataset = datasets.load(config.dataset, data_dir=data_dir, manual_dir=manual_dir)
    runs.make_run(path, config._asdict())
    summary = train_all(config, path, dataset, record)
    runs.write_json(path / "summary.json", summary)
    echo(table(summary))
    echo(f"metrics, checkpoints, figures and summary.json: {path}")
    return summary


def check(config: Config, *, data_dir: str | None = None) -> None:
    """Returns if the config can be run.

    Raises:
      UsageError, datasets.DatasetError: it cannot.
    """
    for sigma in config.sigma:
        if not 1e-15 < sigma < 1e15:  # squares have to fit into float32
            raise UsageError(f"--sigma={sigma:g}: every sigma must be a positive number, from 1e-15 to 1e15")
    for name, values in (("sigma", config.sigma), ("variants", config.variants)):
        if not values or len(set(values)) < len(values):
            raise UsageError(f"--{name}={','.join(map(str, values))}: give at least one, and each only once")
    unknown = [variant for variant in config.variants if variant not in VARIANTS]
    if unknown:
        raise UsageError(f"--variants: unknown {unknown[0]!r}, known are {', '.join(VARIANTS)}")
    needing = [variant for variant in ("f_star", "replay") if variant in config.variants]
    if needing and "ls" not in config.variants and config.sigma_from is None:
        raise UsageError(
            f"--variants={needing[0]} takes its sigma from LS runs: add ls to --variants, or give --sigma_from=RUN_DIR"
        )
    if config.sigma_from is not None and (not needing or "ls" in config.variants):
        raise UsageError(
            "--sigma_from serves f_star and replay in place of ls: name one of those in --variants, not ls"
        )
    if not (0.0 <= config.beta < math.inf):
        raise UsageError(f"--beta={config.beta:g}: must be a number from 0 on")
    for name in ("num_seeds", "num_steps", "batch_size", "latent_size"):
        value = getattr(config, name)
        if value < 1:
            raise UsageError(f"--{name}={value}: must be at least 1")
    if not 0 <= config.seed < 2**31 - config.num_seeds:
        raise UsageError(f"--seed={config.seed}: must be from 0 to 2^31 - num_seeds - 1")
    datasets.check_name(config.dataset, data_dir=data_dir)


def default_run_dir(config: Config) -> Path:
    """runs/ and a name made of the flags alone: the same command finds its run again."""
    digest = hashlib.sha256(json.dumps(config._asdict()).encode()).hexdigest()[:8]
    return Path("runs", f"{config.dataset.replace('/', '-')}_{'-'.join(config.variants)}_{digest}")


def imported_record(config: Config, path: Path) -> np.ndarray | None:
    """sigma(t) of the LS runs in --sigma_from, [num_seeds, T + 1], or None without that flag; a run keeps its copy.

    Raises:
      UsageError: that run is unfinished, or another data set, seeds or (for replay) number of steps were used.
    """
    if config.sigma_from is None:
        return None
    copy, source = path / "ls_sigma.npy", Path(config.sigma_from).expanduser()
    if not copy.exists():
        if not (source / "summary.json").exists() or not (source / "ls_sigma.npy").exists():
            raise UsageError(f"--sigma_from={source}: no finished run with LS-VAEs there")
        theirs = runs.read_json(source / "flags.json")
        names = ["dataset", "seed", "num_seeds"] + (["num_steps"] if "replay" in config.variants else [])
        for name in names:
            if theirs.get(name) != getattr(config, name):
                raise UsageError(f"--sigma_from={source}: made with --{name}={theirs.get(name)}, give the same here")
    try:
        return np.load(copy if copy.exists() else source / "ls_sigma.npy")
    except (OSError, ValueError):
        raise UsageError(f"--sigma_from={source}: its ls_sigma.npy is damaged, run its command again") from None


def make_vae(variant: str, shape: tuple[int, ...], latent_size: int, sigma: Any) -> vae_lib.VAE:
    """The paper's networks for data of this shape, under the variant's observation model.

    `sigma` is a number or, for replay, one for each step. The gain of the LV-VAE on points in the plane is such that
    every seed finds the curve, see `likelihoods.learned_vector`.
    """
    images = len(shape) == 3
    if variant == "lv":
        likelihood = likelihoods.learned_vector(sigma, gain=1.0 if images else 0.03)
    elif variant == "replay":
        likelihood = likelihoods.fixed(likelihoods.replay(sigma))
    else:
        likelihood = likelihoods.HEADS["f" if variant == "f_star" else variant](sigma)
    encoder = networks.conv_encoder if images else networks.mlp_encoder
    decoder = networks.conv_decoder if images else networks.mlp_decoder
    return vae_lib.VAE(
        encoder(shape, latent_size), decoder(shape, likelihood.outputs, latent_size), likelihood, latent_size
    )


def groups(config: Config, variant: str, record: np.ndarray | None, *, alone: bool) -> list[loop.Group]:
    """The sweep members of a variant, all together or each alone; for f, they are every sigma with every seed.

    `record` is sigma(t) of LS runs, [num_seeds, T + 1], which f_star and replay need.
    """
    seeds = np.arange(config.seed, config.seed + config.num_seeds, dtype=np.int32)
    sigmas = np.ones(config.num_seeds)
    if variant == "f":
        sigmas, seeds = np.repeat(config.sigma, config.num_seeds), np.tile(seeds, len(config.sigma))
    elif variant in ("f_star", "replay"):
        assert record is not None, "checked before"
        sigmas = record[:, -1] if variant == "f_star" else record
    if not alone:
        return [loop.Group(variant, seeds, sigmas)]
    return [
        loop.Group(f"{variant}-{index}", seeds[index : index + 1], sigmas[index : index + 1])
        for index in range(len(seeds))
    ]


def train_all(config: Config, path: Path, dataset: datasets.Dataset, record: np.ndarray | None) -> dict[str, Any]:
    """Trains and evaluates every variant and draws the figures; returns the summary.

    `record` is sigma(t) of LS runs elsewhere; those of this sweep take its place, and are written to ls_sigma.npy.
    """
    train = jax.device_put(dataset.train)
    order = [variant for variant in VARIANTS if variant in config.variants]
    num_members = config.num_seeds * sum(len(config.sigma) if variant == "f" else 1 for variant in order)
    schedule = {"num_steps": config.num_steps, "batch_size": config.batch_size}
    # A vmapped convolution with a kernel for each member is a grouped one, which is slow: images train one by one.
    alone = len(dataset.shape) == 3
    programs = {}
    for variant in order:
        model = functools.partial(make_vae, variant, dataset.shape, config.latent_size)
        programs[variant] = loop.compile_programs(dataset, model, num_steps=config.num_steps, beta=config.beta)
    if record is not None:
        keep_record(path, record)
    for variant in order:  # a damaged checkpoint has to come to light before any work
        for group in groups(config, variant, np.ones((config.num_seeds, config.num_steps + 1)), alone=alone):
            if (path / "checkpoints" / group.name).exists():
                loop.start(path, group, programs[variant], num_steps=config.num_steps)
    members: list[dict[str, Any]] = []
    panels: list[figures.Panel] = []
    with tqdm.tqdm(total=num_members * config.num_steps, unit="step", dynamic_ncols=True, mininterval=0.5) as bar:
        for variant in order:
            bar.set_description(VARIANTS[variant])
            records = []
            for group in groups(config, variant, record, alone=alone):
                states, sigmas = loop.fit(path, group, programs[variant], dataset, train, **schedule, bar=bar)
                of_group, its_panels = evaluate(variant, group, programs[variant], states, dataset)
                sigmas[:, -1] = [member["sigma_max"] for member in of_group]
                records.append(sigmas)
                members += of_group
                panels += [panel for seed, panel in zip(group.seeds, its_panels, strict=True) if seed == config.seed]
            if variant == "ls":
                record = np.concatenate(records)
                keep_record(path, record)
    draw(path, members, panels, dataset)
    return {
        "rows": [row(part, dataset.shape) for part in by_row(members).values()],
        "members": members,
        "dataset": config.dataset,
        "num_dimensions": math.prod(dataset.shape),
        "num_test_examples": len(dataset.test),
        "unit": dataset.unit,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
    }


def keep_record(path: Path, record: np.ndarray) -> None:
    """Writes sigma(t) of the LS runs, [num_seeds, T + 1], to where `imported_record` of another run finds it."""
    runs.replace(path / "ls_sigma.npy", functools.partial(np.save, arr=record))


def evaluate(
    variant: str, group: loop.Group, programs: loop.Programs, states: training.TrainState, dataset: datasets.Dataset
) -> tuple[list[dict[str, Any]], list[figures.Panel]]:
    """The final scores of each member on the whole test split, and its pictures of the first test examples.

    Raises:
      runs.RunError: the scores are not finite.
    """
    models = (group.seeds, group.sigmas, states)
    chunk_size = max(1, min(1000, 2**20 // math.prod(dataset.shape)))
    score = functools.partial(programs.score, *models)
    scores = vae_lib.summary(evaluation.over_split(score, dataset.test, chunk_size=chunk_size))
    if not np.isfinite(scores.elbo).all():
        raise runs.RunError(f"training of {group.name} diverged in its last steps: give another --sigma or --beta")
    shown = dataset.test[: 1000 if len(dataset.shape) == 1 else 12]
    pictures = jax.device_get(programs.pictures(*models, shown))
    members, panels = [], []
    for index, seed in enumerate(group.seeds):
        final = {name: float(values[index]) for name, values in scores._asdict().items()}
        sigma = float(group.sigmas[index]) if variant in ("f", "f_star") else final["sigma_mean"]
        place = {"group": group.name, "member": index}  # of its lines in metrics.jsonl
        members.append({"variant": variant, "sigma": sigma, "seed": int(seed)} | final | place)
        title = f"{VARIANTS[variant]}, sigma = {sigma:.3g}"
        data = np.asarray(datasets.to_float(shown))
        panels.append(figures.Panel(title, data, *(field[index] for field in pictures)))
    return members, panels


def by_row(members: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Members by the title of their row: seeds are pooled, and F-VAEs told apart by their sigma."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for member in members:
        title = VARIANTS[member["variant"]] + (f", sigma = {member['sigma']}" if member["variant"] == "f" else "")
        rows.setdefault(title, []).append(member)
    return rows


def row(members: Sequence[dict[str, Any]], shape: tuple[int, ...]) -> dict[str, Any]:
    """The mean over a row's members, with the standard deviation of the ELBO over seeds (0 for a single one)."""
    elbos = [member["elbo"] for member in members]
    names = ("sigma", "elbo", "log_likelihood", "kl", "mse", "sigma_min", "sigma_max")
    mean = {name: float(np.mean([member[name] for member in members])) for name in names}
    return mean | {
        "variant": members[0]["variant"],
        "num_seeds": len(members),
        "elbo_sd": float(np.std(elbos, ddof=1)) if len(members) > 1 else 0.0,
        "elbo_paper": evaluation.paper_elbo(mean["elbo"], shape),
    }


def table(summary: dict[str, Any]) -> str:
    """The summary for people."""
    rows = [
        f"{VARIANTS[row['variant']]:16}{row['sigma']:9.4g}{row['elbo']:12.4f} +- {row['elbo_sd']:<6.4f}"
        f"{row['elbo_paper']:13.4f}{row['log_likelihood']:13.4f}{row['kl']:10.4f}{row['mse']:12.4g}"
        for row in summary["rows"]
    ]
    return f"""\
{"":16}{"sigma":>9}{"ELBO [nats]":>21}{"in the paper":>14}{"log p(x|z)":>13}{"KL":>10}{"MSE":>12}
{chr(10).join(rows)}
ELBO = log p(x|z) - KL, in nats, higher is better: mean +- standard deviation over {summary["rows"][0]["num_seeds"]} \
seeds, on {summary["num_test_examples"]} test examples.
It bounds the log density of x, which is positive where sigma is small. The paper leaves out a constant: its ELBO is
higher by (n/2) log 2 pi, n = {summary["num_dimensions"]}.
sigma: final, mean over seeds (LV-VAE: and dimensions); unit: {summary["unit"]}. MSE: per dimension, that unit squared.
"""


def draw(
    path: Path, members: Sequence[dict[str, Any]], panels: Sequence[figures.Panel], dataset: datasets.Dataset
) -> None:
    """Writes the run's figures."""
    metrics: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for line in runs.read_metrics(path):
        metrics.setdefault((line["group"], line["member"]), []).append(line)

    def curves(part: Sequence[dict[str, Any]]) -> figures.Curves:
        lines = [metrics[member["group"], member["member"]] for member in part]
        steps, *values = (
            [[line[name] for line in of_member] for of_member in lines]
            for name in ("step", *figures.Curves._fields[1:])
        )
        return figures.Curves(np.array(steps[0]), *map(np.array, values))

    rows = by_row(members)
    all_curves = {title: curves(part) for title, part in rows.items()}
    elbos = {
        variant: np.array([member["elbo"] for member in members if member["variant"] == variant])
        for variant in VARIANTS
    }
    sigmas = {
        variant: np.array([member["sigma"] for member in members if member["variant"] == variant])
        for variant in VARIANTS
    }
    present = [variant for variant in VARIANTS if len(elbos[variant])]
    learned = {
        title: curve
        for (title, part), curve in zip(rows.items(), all_curves.values(), strict=True)
        if part[0]["variant"] not in ("f", "f_star")
    }
    drawings = {
        "samples": (figures.image_panels if len(dataset.shape) == 3 else figures.plane_panels)(panels),
        "losses": figures.losses(all_curves),
        "sigma": figures.sigma_and_elbo(learned or all_curves, unit=dataset.unit),
        "elbo": figures.elbo_against_sigma(
            {
                VARIANTS[variant]: (sigmas[variant], elbos[variant])
                for variant in present
                if variant not in ("ls", "lv")
            },
            {VARIANTS[variant]: elbos[variant] for variant in present if variant in ("ls", "lv")},
            unit=dataset.unit,
        ),
    }
    for name, figure in drawings.items():
        runs.replace(path / "figures" / f"{name}.png", functools.partial(figure.savefig, dpi=120))


_DEFAULTS = Config()
flags.DEFINE_list(
    "sigma",
    [str(sigma) for sigma in _DEFAULTS.sigma],
    "sigma of the F-VAEs in units of the data: one value or several, separated by commas",
)
flags.DEFINE_list(
    "variants",
    list(_DEFAULTS.variants),
    f"what to compare, separated by commas: {', '.join(f'{k} ({v})' for k, v in VARIANTS.items())}",
)
flags.DEFINE_string(
    "dataset",
    _DEFAULTS.dataset,
    "toy, mnist, or another TFDS image data set with train and test splits, by its TFDS name",
)
flags.DEFINE_integer(
    "num_seeds", _DEFAULTS.num_seeds, "training runs for each variant and sigma; figures show the first"
)
flags.DEFINE_integer("seed", _DEFAULTS.seed, "first of the consecutive seeds")
flags.DEFINE_integer(
    "num_steps", None, f"gradient steps (default: {_DEFAULTS.num_steps}; for images {IMAGE_DEFAULTS['num_steps']})"
)
flags.DEFINE_integer("batch_size", _DEFAULTS.batch_size, "examples in each step")
flags.DEFINE_integer(
    "latent_size",
    None,
    f"dimensions of z (default: {_DEFAULTS.latent_size}; for images {IMAGE_DEFAULTS['latent_size']})",
)
flags.DEFINE_float(
    "beta",
    _DEFAULTS.beta,
    "weight of the KL in training (beta-VAE); results are always reported as ELBOs, with weight 1",
)
flags.DEFINE_string(
    "sigma_from",
    _DEFAULTS.sigma_from,
    "run directory whose LS runs give f_star and replay their sigma, instead of this run's own",
)
flags.DEFINE_string("run_dir", None, "where everything is written (default: a name below runs/ made of the flags)")
flags.DEFINE_string("data_dir", None, "where TFDS keeps prepared data sets (default: ~/tensorflow_datasets)")
flags.DEFINE_string("manual_dir", None, "folder with the data set's original archives, instead of downloading them")


def parse_flags(argv: Sequence[str]) -> list[str]:
    """The arguments left after the flags; a bad flag ends the program with one line."""
    try:
        rest = flags.FLAGS(list(argv))
    except flags.Error as error:
        sys.exit(f"sigma_sweep: {' '.join(str(error).split())} (--help lists all flags)")
    if len(rest) > 1:
        sys.exit(f"sigma_sweep: unexpected argument {rest[1]!r} (--help lists all flags)")
    return rest


def main(argv: Sequence[str]) -> None:
    del argv
    logging.set_verbosity(logging.ERROR)  # Orbax, TFDS and JAX narrate
    values = {name: getattr(flags.FLAGS, name) for name in Config._fields}
    try:
        try:
            values["sigma"] = tuple(float(sigma) for sigma in values["sigma"])
        except ValueError:
            raise UsageError(f"--sigma={','.join(values['sigma'])}: every sigma must be a positive number") from None
        config = configure(**values | {"variants": tuple(values["variants"])})
        run(config, run_dir=flags.FLAGS.run_dir, data_dir=flags.FLAGS.data_dir, manual_dir=flags.FLAGS.manual_dir)
    except (UsageError, datasets.DatasetError, runs.RunError) as error:
        sys.exit(f"sigma_sweep: {error}")
    except KeyboardInterrupt:
        sys.exit("sigma_sweep: interrupted; the same command goes on from the last checkpoint, a minute old at most")


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
