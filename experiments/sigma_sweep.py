"""Compares VAEs that differ only in the sigma of their Gaussian observation model: fixed, learned and scheduled.

  python -m experiments.sigma_sweep --sigma=0.1

trains, on the toy, an F-VAE at sigma = 0.1, an LS-VAE and an LV-VAE, three seeds each, prints one table and leaves
metrics, checkpoints, figures and summary.json in a directory below runs/. The same command resumes an interrupted run,
and reports a finished one again. It takes from one and a half to ten minutes on two CPU cores; expect ELBOs of about
-0.90, -0.75 and -0.46 nats.
"""

import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
from absl import flags

from experiments import command, hosts, loop, report, sweep
from experiments.sweep import (
    BALANCED,
    CELEBA_DEFAULTS,
    DENSITY_DEFAULTS,
    PROBABILITY_DEFAULTS,
    RAMP,
    Config,
    configure,
    data_options,
)
from experiments.variants import FOLLOWERS, LEADER, VARIANTS, Record, Sigma
from lvae_jax import (
    celeba,
    datasets,
    diagnostics,
    evaluation,
    figures,
    measures,
    runs,
    toy,
    training,
)
from lvae_jax import vae as vae_lib

NUM_EVIDENCE_EXAMPLES = 1000
EXCLUDING = "--density, --discretise and --dequantize exclude each other: give one of them"


def run(
    config: Config,
    *,
    run_dir: str | None = None,
    data_dir: str | None = None,
    manual_dir: str | None = None,
    celeba_dir: str | None = None,
    echo: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Runs, resumes or reports the sweep; returns what summary.json holds.

    Raises:
      command.UsageError, runs.RunError, datasets.DatasetError: as their docstrings say, before anything is trained or
      overwritten.
    """
    places: dict[str, Any] = {"data_dir": data_dir, "manual_dir": manual_dir, "celeba_dir": celeba_dir}
    check(config, **places)
    if celeba_dir is not None:
        config = config._replace(celeba_files=celeba.fingerprint(celeba_dir))

    def compute(path: Path) -> dict[str, Any]:
        record = imported_record(config, path)
        dataset = hosts.in_turn(lambda: datasets.load(config.dataset, **data_options(config), **places))
        runs.make_run(path, config._asdict())
        return train_all(config, path, dataset, record, echo)

    name = f"{config.dataset.replace('/', '-')}_{'-'.join(config.variants)}"
    return command.run(config, name, run_dir, compute=compute, table=report.table, echo=echo)


def check(config: Config, **places: Any) -> None:
    """Raises if the config cannot be run on the data in `places`, the folders that `datasets.load` takes.

    Raises:
      command.UsageError, datasets.DatasetError: the message, one line, names the fix.
    """
    for sigma in config.sigma:
        if not 1e-15 < sigma < 1e15:  # squares have to fit into float32
            raise command.UsageError(f"--sigma={sigma:g}: every sigma must be a positive number, from 1e-15 to 1e15")
    for name, values in (("sigma", config.sigma), ("variants", config.variants)):
        if not values or len(set(values)) < len(values):
            raise command.UsageError(f"--{name}={','.join(map(str, values))}: give at least one, and each only once")
    unknown = [variant for variant in config.variants if variant not in VARIANTS]
    if unknown:
        raise command.UsageError(f"--variants: unknown {unknown[0]!r}, known are {', '.join(VARIANTS)}")
    followers = [variant for variant in FOLLOWERS if variant in config.variants]
    leads = LEADER in config.variants
    if followers and not leads and config.sigma_from is None:
        raise command.UsageError(
            f"--variants={followers[0]} takes its sigma from LS runs: add {LEADER} to --variants, or give "
            "--sigma_from=RUN_DIR"
        )
    for variant in followers:
        if VARIANTS[variant].after_leader and not leads:
            raise command.UsageError(
                f"--variants={variant} takes its encoder and its mean from LS runs: add {LEADER} to --variants"
            )
    if config.sigma_from is not None and (not followers or leads):
        raise command.UsageError(
            f"--sigma_from serves {', '.join(FOLLOWERS)} in place of {LEADER}: name one of those in --variants, not "
            f"{LEADER}"
        )
    if not (0.0 <= config.beta < math.inf):
        raise command.UsageError(f"--beta={config.beta:g}: must be a number from 0 on")
    if min(config.widths, default=0) < 1 or (config.dataset == "toy" and len(config.widths) > 1):
        number = "one positive number" if config.dataset == "toy" else "positive numbers"
        raise command.UsageError(f"--widths={','.join(map(str, config.widths))}: give {number}")
    for name in ("learning_rate", "sigma_rate", "clip_norm", "gain"):
        value = getattr(config, name)
        if not 0.0 < value < math.inf:
            raise command.UsageError(f"--{name}={value:g}: must be a positive number")
    if not 0.0 <= config.ema_decay < 1.0:
        raise command.UsageError(f"--ema_decay={config.ema_decay:g}: must be from 0, for none, to below 1")
    if config.discretise and config.dataset == "toy":
        raise command.UsageError("--discretise is for images: leave it out, or give another --dataset")
    if config.discretise and config.dequantize:
        raise command.UsageError(EXCLUDING)
    if not 0.0 <= config.balance <= 2.0:
        raise command.UsageError(f"--balance={config.balance:g}: must be from 0, for none, to 2")
    if not 0.0 <= config.warm_start <= 1.0 - RAMP:
        raise command.UsageError(f"--warm_start={config.warm_start:g}: must be from 0, for none, to {1.0 - RAMP:g}")
    if config.evidence and (config.dataset != "toy" or config.latent_size > 2):
        raise command.UsageError(
            "--evidence is for --dataset=toy with --latent_size 1 or 2: use --num_importance_samples elsewhere"
        )
    if config.num_importance_samples < 0:
        raise command.UsageError(
            f"--num_importance_samples={config.num_importance_samples}: must be 0, for none, or more"
        )
    for name in ("num_seeds", "num_steps", "batch_size", "latent_size", "num_blocks", "num_components"):
        value = getattr(config, name)
        if value < 1:
            raise command.UsageError(f"--{name}={value}: must be at least 1")
    if not 0 <= config.warmup_steps < config.num_steps:
        raise command.UsageError(f"--warmup_steps={config.warmup_steps}: must be from 0 to num_steps - 1")
    if not 0 <= config.seed < 2**31 - config.num_seeds:
        raise command.UsageError(f"--seed={config.seed}: must be from 0 to 2^31 - num_seeds - 1")
    datasets.check(config.dataset, **data_options(config), **places)
    if config.dataset != "toy" and config.batch_size % jax.device_count():
        raise command.UsageError(
            f"--batch_size={config.batch_size}: the {jax.device_count()} devices share each batch of images, give a "
            f"multiple of {jax.device_count()}"
        )


def imported_record(config: Config, path: Path) -> Record | None:
    """sigma(t) of the LS runs in --sigma_from, [num_seeds, T + 1], or None without that flag; a run keeps its copy.

    Raises:
      command.UsageError: that run is unfinished, or of another data set, other seeds or (for a schedule) another number
        of steps.
    """
    if config.sigma_from is None:
        return None
    copy, source = path / "ls_sigma.npy", Path(config.sigma_from).expanduser()
    if not copy.exists():
        if not (source / "summary.json").exists() or not (source / "ls_sigma.npy").exists():
            raise command.UsageError(f"--sigma_from={source}: no finished run with LS-VAEs there")
        theirs = runs.read_flags(source, defaults=config._field_defaults)
        names = ["dataset", *data_options(config), "celeba_files", "discretise", "seed", "num_seeds"]
        names += ["num_steps"] if any(VARIANTS[v].sigma is Sigma.SCHEDULED for v in config.variants) else []
        for name in names:
            if theirs.get(name) != getattr(config, name):
                raise command.UsageError(
                    f"--sigma_from={source}: made with --{name}={theirs.get(name)}, give the same here"
                )
    file = copy if copy.exists() else source / "ls_sigma.npy"
    try:
        return np.load(file)
    except (OSError, ValueError, EOFError):
        raise command.UsageError(
            f"{file} is damaged: "
            + ("delete it, to have it copied again" if file == copy else "repeat its run in another --run_dir")
        ) from None


def train_all(
    config: Config, path: Path, dataset: datasets.Dataset, record: Record | None, echo: Callable[[str], None]
) -> dict[str, Any]:
    """Trains and evaluates every variant, echoes its results when it is done, and draws the figures; returns the
    summary.

    `record` is sigma(t) of LS runs elsewhere; those of this sweep take its place, and are written to ls_sigma.npy.
    """
    train = loop.place(dataset)
    order = [variant for variant in VARIANTS if variant in config.variants]
    num_members = config.num_seeds * sum(len(config.sigma) if VARIANTS[variant].swept else 1 for variant in order)
    schedule = {"num_steps": config.num_steps, "batch_size": config.batch_size}
    # A vmapped convolution with a kernel for each member is a grouped one, which is slow: images train one by one.
    alone = len(dataset.shape) == 3
    names = ("num_steps", "learning_rate", "decay", "sigma_rate", "clip_norm", "warmup_steps", "ema_decay")
    options: dict[str, Any] = {name: getattr(config, name) for name in names}
    warmup = optax.linear_schedule(0.0, config.beta, sweep.half_way(config))
    compiled: dict[Any, loop.Programs] = {}
    for variant in order:
        program = VARIANTS[variant].program
        if program not in compiled:
            make = sweep.model(config, variant, dataset.shape)
            beta = warmup if VARIANTS[variant].warmup else config.beta
            compiled[program] = loop.compile_programs(
                dataset, make, beta=beta, dequantised=config.dequantize, **options
            )
    programs = {variant: compiled[VARIANTS[variant].program] for variant in order}
    if record is not None:
        keep_record(path, record)
    for variant in order:  # a damaged checkpoint has to come to light before any work
        for group in sweep.groups(config, variant, sweep.any_record(config), alone=alone):
            if (path / "checkpoints" / group.name).exists():
                loop.start(path, group, programs[variant], num_steps=config.num_steps)
    members: list[dict[str, Any]] = []
    panels: list[figures.Panel] = []
    rows: list[dict[str, Any]] = []
    leaders: list[vae_lib.Params] = []  # the trained params of each group
    continued = any(VARIANTS[variant].after_leader for variant in order)
    kind = "points" if dataset.levels is None else "density"
    kind = "dequantised" if config.dequantize else "discretised" if config.discretise else kind
    quiet = jax.process_index() != 0
    total = num_members * config.num_steps
    # smoothing=0: the time that is left follows from the mean rate, in which every variant's compilation counts.
    with tqdm.tqdm(total=total, unit="step", dynamic_ncols=True, mininterval=0.5, smoothing=0, disable=quiet) as bar:
        for variant in order:
            bar.set_description(VARIANTS[variant].title)
            records: list[np.ndarray] = []
            variant_members: list[dict[str, Any]] = []
            trained = None
            if VARIANTS[variant].after_leader:
                trained = jax.tree.map(lambda *parts: np.concatenate(parts), *leaders)
            errors = {member["seed"]: member["mse"] for member in members if member["variant"] == LEADER}
            for group in sweep.groups(config, variant, record, alone=alone, trained=trained):
                states, sigmas = loop.fit(path, group, programs[variant], dataset, train, **schedule, bar=bar)
                group_members, group_panels = evaluate(
                    config, variant, group, programs[variant], states, dataset, errors
                )
                if continued and VARIANTS[variant].leads:
                    leaders.append(jax.device_get(states.weights))
                sigmas[:, -1] = [member["sigma_max"] for member in group_members]
                records.append(sigmas)
                variant_members += group_members
                panels += [panel for seed, panel in zip(group.seeds, group_panels, strict=True) if seed == config.seed]
            if VARIANTS[variant].leads:
                record = np.concatenate(records)
                keep_record(path, record)
            members += variant_members
            for title, part in report.by_row(variant_members).items():
                rows.append(report.row(part, dataset.shape, kind=kind, levels=dataset.levels))
                if not quiet:
                    with tqdm.tqdm.external_write_mode():
                        echo(report.line(title, rows[-1]))
    summary: dict[str, Any] = {
        "rows": rows,
        "members": members,
        "dataset": config.dataset,
        "shape": list(dataset.shape),
        "levels": dataset.levels,
        "kind": kind,
        "num_dimensions": math.prod(dataset.shape),
        "latent_size": config.latent_size,
        "num_test_examples": len(dataset.test),
        "num_importance_samples": config.num_importance_samples,
        "num_evidence_examples": NUM_EVIDENCE_EXAMPLES,
        "histograms": {} if dataset.levels is None else histograms(dataset),
        "unit": dataset.unit,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
    }
    if config.dataset == "toy":
        log_prob = np.concatenate([toy.log_prob(jnp.asarray(part)) for part in np.split(dataset.test, 10)])
        report.add_toys_limits(summary["rows"], float(log_prob.mean()))
        summary["entropy"] = toy.entropy()
        # Of as many true points, in the place of reconstructions and of samples: what the measures are for a model that
        # copies, and for a perfect one.
        key = jax.random.fold_in(jax.random.key(datasets.TEST_SEED), 1)
        true = np.asarray(dataset.batch(None, key, jnp.arange(1000)))
        summary["true_measures"] = toy_measures(true, true, true, dataset.test)
    if jax.process_index() == 0:  # which has all metrics
        report.draw(path, summary, panels)
    return summary


def histograms(dataset: datasets.Dataset) -> dict[str, float]:
    """`evaluation.histograms` of the data set, in bits per dimension."""
    assert dataset.levels is not None, "checked by the caller"
    found = evaluation.histograms(dataset.train, dataset.test, levels=dataset.levels)
    return {
        title: evaluation.rate(nats, dataset.shape, kind="discretised").bits_per_dimension
        for title, nats in found.items()
    }


def keep_record(path: Path, record: Record) -> None:
    """Writes sigma(t) of the LS runs, [num_seeds, T + 1], to where `imported_record` of another run finds it."""
    runs.replace(path / "ls_sigma.npy", functools.partial(np.save, arr=record))


def evaluate(
    config: Config,
    variant: str,
    group: loop.Group,
    programs: loop.Programs,
    states: training.TrainState,
    dataset: datasets.Dataset,
    errors: Mapping[int, float],
) -> tuple[list[dict[str, Any]], list[figures.Panel]]:
    """The final scores and diagnostics of each member on the whole test split, and its pictures of the first test
    examples. `errors` are the mean squared errors of the LS runs by seed, as far as there are any.

    Raises:
      runs.RunError: a result is not finite.
    """
    scores, found, code_elbo = loop.evaluate(group, programs, states, dataset)
    columns = {name: values for name, values in vae_lib.summary(scores)._asdict().items()}
    columns |= found._asdict() | {"best_sigma": np.sqrt(columns["mse"])}
    if code_elbo is not None:
        columns["code_elbo"] = code_elbo.mean(axis=-1)
    if config.num_importance_samples:
        bound = functools.partial(loop.importance_bound, group, programs, states, dataset)
        columns["importance_bound"] = bound(num_samples=config.num_importance_samples).mean(axis=-1)
        if code_elbo is not None and not config.discretise:
            bounds = bound(num_samples=config.num_importance_samples, as_code=True)
            columns["code_importance_bound"] = bounds.mean(axis=-1)
    if config.evidence:
        x = dataset.test[:NUM_EVIDENCE_EXAMPLES]
        evidence, columns["evidence_error"] = loop.evidence(group, programs, states, x)
        columns["model_gap"] = np.mean(toy.log_prob(jnp.asarray(x))[None] - evidence, axis=-1)
        columns["posterior_gap"] = np.mean(evidence - scores.elbo[:, :NUM_EVIDENCE_EXAMPLES], axis=-1)
    images = len(dataset.shape) == 3
    shown = dataset.test[: 100 if images else 1000]
    data = np.asarray(datasets.to_float(shown, levels=dataset.levels))
    pictures = jax.device_get(programs.pictures(group.seeds, group.sigmas, states, shown))
    originals = jnp.asarray(data)
    if images and measures.laplacian_energy(originals).any():  # images without any detail have no sharpness
        columns["sharpness"] = [measures.sharpness(jnp.asarray(mean), originals) for mean in pictures.reconstructions]
        pairs = zip(*map(jnp.asarray, (pictures.samples, pictures.sample_means)), strict=True)
        columns["sample_noise"] = [measures.sample_noise(samples, means) for samples, means in pairs]
    if config.dataset == "toy":
        pairs = zip(pictures.reconstructions, pictures.samples, strict=True)
        measured = [toy_measures(*pair, shown, dataset.test) for pair in pairs]
        columns |= {name: [of_member[name] for of_member in measured] for name in measured[0]}
    for name, values in columns.items():
        if not np.isfinite(np.asarray(values, np.float64)).all():
            raise runs.RunError(
                f"{name} of {group.name} is not finite: its checkpoints are kept, repeat the run in another --run_dir "
                "with another --sigma, or a lower --learning_rate"
            )
    members, panels = [], []
    for index, seed in enumerate(group.seeds):
        final = {name: np.asarray(values[index], np.float64).tolist() for name, values in columns.items()}
        of_member = diagnostics.Diagnostics(*(field[index] for field in found))
        relative = None
        if VARIANTS[variant].sigma is Sigma.MAP and int(seed) in errors:
            relative = math.sqrt(final["mse"] / errors[int(seed)])
        final["diagnosis"] = diagnostics.diagnosis(of_member, discretised=config.discretise, relative_error=relative)
        constant = VARIANTS[variant].sigma is Sigma.CONSTANT
        sigma = float(group.sigmas[index]) if constant else final["sigma_mean"]
        place = {"group": group.name, "member": index}  # of its lines in metrics.jsonl
        members.append({"variant": variant, "sigma": sigma, "seed": int(seed)} | final | place)
        title = f"{VARIANTS[variant].title}, sigma = {sigma:.3g}"
        drawn = slice(12 if images else None)
        panels.append(figures.Panel(title, data[drawn], *(field[index][drawn] for field in pictures)))
    return members, panels


def toy_measures(reconstructions: np.ndarray, samples: np.ndarray, x: np.ndarray, test: np.ndarray) -> dict[str, Any]:
    """Figs. 4, 6 and 7 in numbers, in lengths of the toy: the root mean square distance of reconstructions
    of x from the curve, the part of the noise of x that they keep, and the widths of the band of samples in the three
    regions and their sliced Wasserstein distance from the test points."""
    points = jnp.asarray(reconstructions)
    gap = points - toy.curve(toy.nearest(points))
    return {
        "curve_distance": float(jnp.sqrt(jnp.mean(jnp.sum(gap**2, axis=-1)))),
        "noise_kept": float(toy.noise_kept(points, jnp.asarray(x))),
        "band_widths": np.asarray(toy.band_widths(jnp.asarray(samples)), np.float64).tolist(),
        "sliced_wasserstein": measures.sliced_wasserstein(jax.random.key(0), samples, test),
    }


def define_flags() -> None:
    defaults = configure()
    with command.group("the comparison"):
        flags.DEFINE_list("sigma", list(map(str, defaults.sigma)), "sigma of the F-VAEs, in units of the data")
        names = ", ".join(f"{name} ({variant.title})" for name, variant in VARIANTS.items())
        flags.DEFINE_list("variants", list(defaults.variants), f"models to compare: {names}")
        flags.DEFINE_string(
            "sigma_from",
            defaults.sigma_from,
            f"folder of a run whose LS-VAEs give {', '.join(FOLLOWERS)} their sigma, instead of this run's own",
        )
        flags.DEFINE_integer("num_seeds", defaults.num_seeds, "runs of each variant and sigma; figures show the first")
        flags.DEFINE_integer("seed", defaults.seed, "first of the consecutive seeds")
    with command.group("the data"):
        flags.DEFINE_string(
            "dataset",
            defaults.dataset,
            "toy, digits, mnist, celeb_a, or the TFDS name of another image data set with train and test splits",
        )
        flags.DEFINE_integer(
            "image_size",
            None,
            f"side to which celeb_a's images are scaled, from 8 to 148 (default: {CELEBA_DEFAULTS['image_size']})",
        )
        flags.DEFINE_integer("levels", None, "number of grey levels, a power of 2, to which 8-bit images are reduced")
        flags.DEFINE_bool("flip", defaults.flip, "mirror training images left to right at random")
        flags.DEFINE_bool(
            "fake_data", defaults.fake_data, "synthetic images of the data set's shape, to try the pipeline offline"
        )
    command.define_places()
    with command.group("the likelihood of images"):
        flags.DEFINE_bool(
            "discretise",
            None,
            "give each grey level a probability: the ELBO then bounds the log probability of the image (also "
            "--discretize; the default, without --density and --dequantize)",
        )
        flags.DEFINE_bool("density", False, "take the density at the grey levels instead, as the paper does")
        flags.DEFINE_bool(
            "dequantize",
            defaults.dequantize,
            "add uniform noise to the grey levels of the n pixels, in training and evaluation: ELBO - n log(levels) "
            "then bounds the log probability of the image (also --dequantise)",
        )
    flags.DEFINE_alias("discretize", "discretise")
    flags.DEFINE_alias("dequantise", "dequantize")
    with command.group("the networks"):
        flags.DEFINE_integer("latent_size", None, f"dimensions of z ({_defaults('latent_size')})")
        flags.DEFINE_list(
            "widths",
            None,
            "units of the layers of the residual MLP, one number; for images, channels of each convolution "
            f"({_defaults('widths')})",
        )
        flags.DEFINE_integer(
            "num_blocks", None, f"residual blocks of the encoder and of the decoder ({_defaults('num_blocks')})"
        )
        flags.DEFINE_bool("bfloat16", defaults.bfloat16, "compute the networks, except their last layers, in bfloat16")
    with command.group("the training"):
        flags.DEFINE_integer("num_steps", None, f"gradient steps ({_defaults('num_steps')})")
        flags.DEFINE_integer("batch_size", defaults.batch_size, "examples in each step")
        flags.DEFINE_float("learning_rate", defaults.learning_rate, "peak learning rate of Adam")
        flags.DEFINE_bool("decay", defaults.decay, "lower the learning rate to zero by a half cosine")
        flags.DEFINE_integer("warmup_steps", defaults.warmup_steps, "steps in which the learning rate rises from zero")
        flags.DEFINE_float(
            "sigma_rate",
            defaults.sigma_rate,
            "learning rate of the LS-VAE's log sigma, as a multiple of the networks'",
        )
        flags.DEFINE_float(
            "gain",
            defaults.gain,
            "factor of the decoder's output in the log sigma of lv, lv_star, logistic and mixture: sets its speed",
        )
        flags.DEFINE_float(
            "balance",
            None,
            "exponent b of the weights sigma^2b of the gradients of lv and logistic, where densities train them "
            f"(default: {DENSITY_DEFAULTS['balance']}); it falls to 0 after {BALANCED:.0%} of the steps. With 1 all "
            "errors weigh the same; 0 for no weights",
        )
        flags.DEFINE_float(
            "warm_start",
            None,
            "part of the steps in which lv and logistic have one learned sigma for all dimensions "
            f"(default: {DENSITY_DEFAULTS['warm_start']} for densities, {PROBABILITY_DEFAULTS['warm_start']} for "
            f"probabilities); over the next {RAMP:.0%} the decoder's log sigma comes in; 0 for no such start",
        )
        flags.DEFINE_integer(
            "num_components", defaults.num_components, "logistic distributions in each of mixture's pixels"
        )
        flags.DEFINE_float("clip_norm", defaults.clip_norm, "largest norm of a gradient; longer ones are scaled down")
        flags.DEFINE_float(
            "beta", defaults.beta, "weight of the KL in training (beta-VAE); results are ELBOs, with weight 1"
        )
        flags.DEFINE_float(
            "ema_decay", defaults.ema_decay, "decay of the moving average of the weights that is evaluated; 0 for none"
        )
    with command.group("the evaluation"):
        flags.DEFINE_integer(
            "num_importance_samples",
            defaults.num_importance_samples,
            "draws of the importance-weighted bound on log p(x), evaluated beside the ELBO; 0 for none",
        )
        flags.DEFINE_bool(
            "evidence",
            defaults.evidence,
            "compute log p(x) of the models on the toy by quadrature: splits the gap to the true density",
        )


def _defaults(name: str) -> str:
    """The default of a field for each kind of data, in words."""

    def text(value: Any) -> str:
        return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)

    kinds = {"toy": "toy", "digits": "digits", "celeb_a": "celeb_a", "other images": "mnist"}
    values = {kind: text(getattr(configure(dataset=dataset), name)) for kind, dataset in kinds.items()}
    return "default: " + ", ".join(f"{value} for {kind}" for kind, value in values.items())


def main() -> None:
    values = command.values(name for name in Config._fields if name != "celeba_files")
    values["sigma"] = command.numbers("sigma", values["sigma"])
    values["widths"] = values["widths"] and command.numbers("widths", values["widths"], int)
    if flags.FLAGS.density:
        if values["discretise"] or values["dequantize"]:
            raise command.UsageError(EXCLUDING)
        if values["dataset"] == "toy":
            raise command.UsageError("--density is for images: leave it out, or give another --dataset")
        values["discretise"] = False
    config = configure(**values | {"variants": tuple(values["variants"])})
    run(config, **command.values(("run_dir", "data_dir", "manual_dir", "celeba_dir")))


if __name__ == "__main__":
    define_flags()
    command.start("sigma_sweep", main)
