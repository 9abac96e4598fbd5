"""Compares VAEs that differ only in the sigma of their Gaussian observation model: fixed, learned and scheduled.

  python -m experiments.sigma_sweep --sigma=0.1

trains, on the toy, an F-VAE at sigma = 0.1, an LS-VAE and an LV-VAE, three seeds each, prints one table and leaves
metrics, checkpoints, figures and summary.json in a directory below runs/. The same command resumes an interrupted run,
and reports a finished one again. It takes from one and a half to ten minutes on two CPU cores; expect ELBOs of about
-0.90, -0.75 and -0.46 nats.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
from absl import flags

from experiments import command, hosts, initial, loop, options, report, results, sizes, survey, sweep
from experiments.programs import Group, Programs
from experiments.results import POINTS, Curve, Headroom, Member, Row, Summary
from experiments.sweep import Config, configure, data_options
from experiments.variants import FOLLOWERS, LEADER, VARIANTS, Record, Sigma
from lvae_jax import celeba, datasets, diagnostics, evaluation, figures, runs, training
from lvae_jax import vae as vae_lib
from lvae_jax.evaluation import Kind
from lvae_jax.priors import PRIORS

NUM_EVIDENCE_EXAMPLES = 1000
NUM_CURVE_EXAMPLES = 1000
NUM_CURVE_POINTS = 25
EXCLUDING = "--density, --discretise and --dequantize exclude each other: give one of them"


def run(
    config: Config,
    *,
    run_dir: str | None = None,
    data_dir: str | None = None,
    manual_dir: str | None = None,
    celeba_dir: str | None = None,
    echo: Callable[[str], None] = print,
    pace: loop.Pace = loop.PACE,
) -> Summary:
    """Runs, resumes or reports the sweep. The folders are those of `datasets.load`; `pace` is
    how it uses the machine.

    Raises:
      command.UsageError, runs.RunError, datasets.DatasetError: as their docstrings say, before anything is trained or
      overwritten.
    """
    places: dict[str, Any] = command.paths(data_dir=data_dir, manual_dir=manual_dir, celeba_dir=celeba_dir)
    folders = command.paths(sigma_from=config.sigma_from, init_from=config.init_from)
    config, name_or_path = config._replace(**folders), config.dataset
    check(config, **places)
    source = initial.source(config)
    config = initial.recorded(sweep.recorded(config), source)
    if celeba_dir is not None:
        config = config._replace(celeba_files=celeba.fingerprint(places["celeba_dir"]))
    name = f"{command.file_name(config.dataset)}_{'-'.join(config.variants)}"
    config = config._replace(sigma_from=recorded_source(config, command.run_path(config, name, run_dir)))

    def prepare(path: Path) -> Callable[[], Summary]:
        record = imported_record(config, path)
        dataset = hosts.in_turn(lambda: datasets.load(name_or_path, **data_options(config), **places))
        if dataset.train is not None and jax.process_index() == 0:
            echo(survey.text(survey.survey(dataset), config.sigma))
        sweep.check_memory(config, dataset.form)
        fix = "give a smaller network or --batch_size, or fewer --num_importance_samples or --num_seeds"
        if source is not None:
            initial.check_form(source, dataset.form)
        return sizes.told(fix)(functools.partial(train_all, config, path, dataset, record, source, echo, pace))

    files: dict[str, Any] = {"writes": ["ls_sigma.npy"], "late": options.of_group(Config, sweep.EVALUATION)}
    table = functools.partial(report.table, headroom=headroom_of(command.run_path(config, name, run_dir)))
    return command.run(config, name, run_dir, Summary, prepare=prepare, table=table, echo=echo, **files)


def headroom_of(path: Path) -> Headroom | None:
    """The result of experiments.headroom for the run in `path`; None if there is none."""
    file = path / report.HEADROOM / "summary.json"
    return results.read(file, Headroom) if file.exists() else None


def check(config: Config, **places: Any) -> None:
    """Raises if the config cannot be run on the data in `places`, the folders that `datasets.load` takes.

    Raises:
      command.UsageError, datasets.DatasetError: the message, one line, names the fix.
    """
    options.check(config)
    unknown = [variant for variant in config.variants if variant not in VARIANTS]
    if unknown:
        raise command.UsageError(f"--variants: unknown {unknown[0]!r}, known are {', '.join(VARIANTS)}")
    if config.rank != Config().rank:
        raise command.UsageError("--rank is for tangent: add it to --variants, or leave --rank out")
    for variant in config.variants:
        if config.discretise and not VARIANTS[variant].discrete:
            raise command.UsageError(
                f"--variants={variant} gives grey levels no probabilities: add --dequantize or --density"
            )
    if any(VARIANTS[variant].conditioned for variant in config.variants):
        sweep.check_range(config.sigma_range, config.sigma)
    elif config.sigma_range != Config().sigma_range:
        raise command.UsageError("--sigma_range is for conditioned: add it to --variants, or leave --sigma_range out")
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
    domain = sweep.domain(config)
    if max(config.widths, default=0) > sweep.MOST or len(config.widths) > 16:
        raise command.UsageError(f"--widths: give at most 16 numbers, up to {sweep.MOST}")
    if min(config.widths, default=0) < 1 or (domain.one_width and len(config.widths) > 1):
        number = "one positive number" if domain.one_width else "positive numbers"
        raise command.UsageError(f"--widths={','.join(map(str, config.widths))}: give {number}")
    if config.discretise and not domain.has_levels:
        raise command.UsageError("--discretise is for images with grey levels: leave it out, or give another --dataset")
    if config.discretise and config.dequantize:
        raise command.UsageError(EXCLUDING)
    if config.evidence and (domain.log_prob is None or config.latent_size > 2):
        raise command.UsageError(
            f"--evidence is for --dataset={' and '.join(datasets.SYNTHETIC)} with --latent_size 1 or 2: use "
            "--num_importance_samples elsewhere"
        )
    if config.evidence and config.prior != Config().prior:
        raise command.UsageError(
            "--evidence is for --prior=standard_normal, whose mass quadrature knows: use --num_importance_samples"
        )
    try:
        PRIORS[config.prior](config.latent_size)
    except ValueError as error:
        raise command.UsageError(f"--prior={config.prior} --latent_size={config.latent_size}: {error}") from None
    if not 0 <= config.warmup_steps < config.num_steps:
        raise command.UsageError(f"--warmup_steps={config.warmup_steps}: must be from 0 to num_steps - 1")
    options.check_seeds(config)
    datasets.check(config.dataset, **data_options(config), **places)
    if domain.alone and config.batch_size % jax.device_count():
        raise command.UsageError(
            f"--batch_size={config.batch_size}: the {jax.device_count()} devices share each batch of images, give a "
            f"multiple of {jax.device_count()}"
        )


def recorded_source(config: Config, path: Path) -> str | None:
    """--sigma_from as the run in `path` has recorded it, if that LS run lies elsewhere now: the run's own copy tells
    that it is the same."""
    copy, file = path / "ls_sigma.npy", path / "flags.json"
    if config.sigma_from is None or not copy.exists() or not file.exists():
        return config.sigma_from
    source, recorded = Path(config.sigma_from, copy.name), runs.read_json(file).get("sigma_from")
    same = source.exists() and source.read_bytes() == copy.read_bytes()
    return recorded if same and isinstance(recorded, str) else config.sigma_from


def imported_record(config: Config, path: Path) -> Record | None:
    """sigma(t) of the LS runs in --sigma_from, [num_seeds, T + 1], or None without that flag; a run keeps its copy.

    Raises:
      command.UsageError: that run is unfinished, or of another data set, other seeds or (for a schedule) another number
        of steps.
    """
    if config.sigma_from is None:
        return None
    copy, source = path / "ls_sigma.npy", Path(config.sigma_from)
    scheduled = any(VARIANTS[variant].sigma is Sigma.SCHEDULED for variant in config.variants)
    if not copy.exists():
        if not (source / "summary.json").exists() or not (source / "ls_sigma.npy").exists():
            raise command.UsageError(f"--sigma_from={source}: no finished run with LS-VAEs there")
        theirs = runs.read_flags(source, defaults=config._field_defaults)
        names = ["dataset", *data_options(config), "celeba_files", "own_files", "discretise", "seed", "num_seeds"]
        names += ["num_steps"] if scheduled else []
        for name in names:
            if theirs.get(name) != getattr(config, name):
                raise command.UsageError(
                    f"--sigma_from={source}: made with --{name}={theirs.get(name)}, give the same here"
                )
    file = copy if copy.exists() else source / "ls_sigma.npy"
    try:
        record = np.load(file)
        long_enough = record.shape[1] == config.num_steps + 1 if scheduled else record.shape[1] > 1
        whole = long_enough and record.shape[0] == config.num_seeds and record.ndim == 2 and record.dtype.kind == "f"
        if whole and np.isfinite(record).all() and (record > 0.0).all():
            return record
    except (OSError, ValueError, EOFError, IndexError):
        pass
    again = (
        "to have it copied again" if file == copy else f"and {source / 'summary.json'}, and repeat that run's command"
    )
    raise command.UsageError(f"{file} is damaged: delete it, {again}")


def train_all(
    config: Config,
    path: Path,
    dataset: datasets.Dataset,
    record: Record | None,
    source: initial.Source | None,
    echo: Callable[[str], None],
    pace: loop.Pace,
) -> Summary:
    """Trains and evaluates every variant, echoes its results when it is done, and draws the figures; returns the
    summary.

    `record` is sigma(t) of LS runs elsewhere; those of this sweep take its place, and are written to ls_sigma.npy.
    `source` is a run with whose weights the models begin.
    """
    train = loop.place(dataset, pace)
    order = VARIANTS.in_order(config.variants)
    programs = compile_all(config, dataset, order)
    # The run keeps its own copy: it must resume to the same bits if the other run is gone.
    if record is not None:
        keep_record(path, record)
    check_checkpoints(config, path, programs)
    kind = kind_of(config)
    members: list[Member] = []
    panels: list[figures.Panel] = []
    rows: list[Row] = []
    curves: list[Curve] = []
    trained: vae_lib.Params | None = None  # of the leader
    quiet = jax.process_index() != 0
    num_members = config.num_seeds * sum(len(config.sigma) if VARIANTS[variant].per_sigma else 1 for variant in order)
    total = num_members * config.num_steps
    # smoothing=0: the time that is left follows from the mean rate, in which every variant's compilation counts.
    with tqdm.tqdm(total=total, unit="step", dynamic_ncols=True, mininterval=0.5, smoothing=0, disable=quiet) as bar:
        for variant in order:
            bar.set_description(VARIANTS[variant].title)
            begin = trained if VARIANTS[variant].after_leader else None
            groups = sweep.groups(config, variant, record, trained=begin)
            if source is not None:
                groups = initial.begin(source, variant, groups, dataset.form)
            errors = {member.seed: member.mse for member in members if member.variant == LEADER}
            done = train_variant(config, path, variant, groups, programs[variant], train, errors, bar, pace)
            if VARIANTS[variant].leads:
                record, trained = done.record, done.weights
                keep_record(path, record)
            members += done.members
            panels += done.panels
            curves += done.curves
            for title, part in report.by_row(done.members).items():
                rows.append(report.row(part, dataset.form, kind=kind))
                if not quiet:
                    with tqdm.tqdm.external_write_mode():
                        echo(report.line(title, rows[-1]))
    summary = summarise(config, dataset, rows, members, curves)
    if jax.process_index() == 0:  # which has all metrics
        domain = sweep.domain(config)
        report.draw(path, summary, panels, draw_panels=domain.draw, best_elbo=domain.best_elbo, echo=echo)
    return summary


def kind_of(config: Config) -> Kind:
    """The quantity that the ELBOs bound."""
    return Kind.DEQUANTISED if config.dequantize else Kind.DISCRETISED if config.discretise else Kind.DENSITY


def compile_all(config: Config, dataset: datasets.Dataset, order: Sequence[str]) -> dict[str, Programs]:
    """The programs of each variant; variants that differ only in the values of sigma share theirs."""
    names = ("num_steps", "learning_rate", "decay", "sigma_rate", "clip_norm", "warmup_steps", "ema_decay")
    training_options: dict[str, Any] = {name: getattr(config, name) for name in names}
    warmup = optax.linear_schedule(0.0, config.beta, sweep.half_way(config))
    compiled: dict[Any, Programs] = {}
    for variant in order:
        # Sigma is an argument of the programs: variants of one head differ in its values alone.
        program = VARIANTS[variant].program
        if program not in compiled:
            make = sweep.model(config, variant, dataset.form)
            beta = warmup if VARIANTS[variant].warmup else config.beta
            compiled[program] = Programs(dataset, make, beta=beta, dequantised=config.dequantize, **training_options)
    return {variant: compiled[VARIANTS[variant].program] for variant in order}


def check_checkpoints(config: Config, path: Path, programs: Mapping[str, Programs]) -> None:
    """Raises if a checkpoint of the run cannot be restored: before any work, not after the variants before it.

    Raises:
      runs.RunError: the checkpoint is damaged, or of another shape or version.
    """
    for variant in programs:
        for group in sweep.groups(config, variant, sweep.any_record(config)):
            if (path / "checkpoints" / group.name).exists():
                loop.start(path, group, programs[variant], num_steps=config.num_steps)


class Trained(NamedTuple):
    """The results of a variant. members, panels: see `evaluate`, the panels of the first seed; record: sigma(t) of all
    members; weights: their trained params, leaves [M, ...], if a variant of the sweep begins with them, else None;
    curves: of those that are conditioned."""

    members: list[Member]
    panels: list[figures.Panel]
    record: Record
    weights: vae_lib.Params | None
    curves: list[Curve]


def train_variant(
    config: Config,
    path: Path,
    variant: str,
    groups: Sequence[Group],
    programs: Programs,
    train: Any,
    errors: Mapping[int, float],
    bar: tqdm.tqdm,
    pace: loop.Pace,
) -> Trained:
    """Trains and evaluates the groups of a variant. `train` is what `loop.place` returned; `errors` are those of
    `evaluate`.

    Raises:
      runs.RunError: a checkpoint is damaged, or training diverged.
    """
    members: list[Member] = []
    panels: list[figures.Panel] = []
    records: list[Record] = []
    weights: list[vae_lib.Params] = []
    curves: list[Curve] = []
    schedule = {"num_steps": config.num_steps, "batch_size": config.batch_size}
    continued = any(VARIANTS[other].after_leader for other in config.variants)
    for group in groups:
        states, sigmas = loop.fit(path, group, programs, train, **schedule, bar=bar, pace=pace)
        if continued and VARIANTS[variant].leads:
            weights.append(jax.device_get(states.weights))
        for at_sigma, read in readings(config, variant, group, states, programs.dataset.form):
            found, drawn = evaluate(config, variant, at_sigma, programs, read, errors)
            members += found
            panels += [panel for seed, panel in zip(group.seeds, drawn, strict=True) if seed == config.seed]
            # The sigma after the last update is known only now: fit leaves this entry to the evaluation.
            sigmas[:, -1] = [member.sigma_max for member in found]
        records.append(sigmas)
        if VARIANTS[variant].conditioned:
            curves += measure_curves(config, variant, group, programs, states)
    together = jax.tree.map(lambda *parts: np.concatenate(parts), *weights) if weights else None
    return Trained(members, panels, np.concatenate(records), together, curves)


def readings(
    config: Config, variant: str, group: Group, states: training.TrainState, form: datasets.Form
) -> list[tuple[Group, training.TrainState]]:
    """The group with its states as it is evaluated: as it was trained or, if it is conditioned, at each --sigma."""
    if not VARIANTS[variant].conditioned:
        return [(group, states)]
    return [at(config, variant, group, states, sigma, form) for sigma in config.sigma]


def at(
    config: Config, variant: str, group: Group, states: training.TrainState, sigma: float, form: datasets.Form
) -> tuple[Group, training.TrainState]:
    """The conditioned group at this sigma."""
    sigmas = np.full(len(group.seeds), sigma)
    params = states.weights | sweep.told(config, variant, sigmas, form)
    return group._replace(sigmas=sigmas), states._replace(params=params, ema=None)


def measure_curves(
    config: Config, variant: str, group: Group, programs: Programs, states: training.TrainState
) -> list[Curve]:
    """The curve of each member of a conditioned group over its range of sigma, on the first test examples."""
    low, high = config.sigma_range
    sigmas = np.geomspace(low, high, NUM_CURVE_POINTS)
    found = []
    for sigma in sigmas:
        scores = programs.score(*at(config, variant, group, states, sigma, programs.dataset.form), NUM_CURVE_EXAMPLES)
        found.append([np.asarray(field, np.float64).mean(axis=-1) for field in (scores.elbo, scores.kl, scores.mse)])
    elbo, kl, mse = np.moveaxis(np.array(found), 0, -1)  # each [M, number of sigmas]
    return [
        Curve(
            variant=variant,
            seed=int(seed),
            sigma=sigmas.tolist(),
            elbo=elbo[index].tolist(),
            kl=kl[index].tolist(),
            mse=mse[index].tolist(),
        )
        for index, seed in enumerate(group.seeds)
    ]


def summarise(
    config: Config, dataset: datasets.Dataset, rows: list[Row], members: list[Member], curves: list[Curve]
) -> Summary:
    """The content of summary.json. Rows get the limits of the data, if these are known."""
    domain = sweep.domain(config)
    limits = domain.limits(dataset)
    if domain.log_prob is not None and limits.entropy is not None:
        log_prob = np.concatenate([domain.log_prob(jnp.asarray(part)) for part in np.split(dataset.test, 10)])
        known: dict[str, Any] = {"entropy": limits.entropy, "best_elbo": domain.best_elbo}
        rows = [report.with_limits(row, float(log_prob.mean()), **known) for row in rows]
    return Summary(
        rows=rows,
        members=members,
        curves=curves or None,
        dataset=config.dataset,
        shape=list(dataset.shape),
        levels=dataset.levels,
        centre=None if dataset.scale == 1.0 else np.asarray(dataset.centre, np.float64).tolist(),
        scale=None if dataset.scale == 1.0 else dataset.scale,
        missing=float(np.isnan(dataset.test).mean()) if dataset.masked else None,
        kind=POINTS if dataset.levels is None else kind_of(config),
        num_dimensions=math.prod(dataset.shape),
        latent_size=config.latent_size,
        num_test_examples=len(dataset.test),
        prior=None if config.prior == Config().prior else config.prior,
        num_importance_samples=config.num_importance_samples,
        num_evidence_examples=NUM_EVIDENCE_EXAMPLES,
        histograms={} if dataset.levels is None else histograms(dataset),
        unit=dataset.unit,
        device=f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        jax=jax.__version__,
        entropy=limits.entropy,
        true_measures=limits.true_measures,
    )


def histograms(dataset: datasets.Dataset) -> dict[str, float]:
    """`evaluation.histograms` of the data set, in bits per dimension."""
    assert dataset.levels is not None, "checked by the caller"
    found = evaluation.histograms(dataset.train, dataset.test, levels=dataset.levels)
    return {
        title: evaluation.rate(nats, dataset.shape, kind=Kind.DISCRETISED).bits_per_dimension
        for title, nats in found.items()
    }


def keep_record(path: Path, record: Record) -> None:
    """Writes sigma(t) of the LS runs, [num_seeds, T + 1], to where `imported_record` of another run finds it."""
    runs.replace(path / "ls_sigma.npy", functools.partial(np.save, arr=record))


def evaluate(
    config: Config,
    variant: str,
    group: Group,
    programs: Programs,
    states: training.TrainState,
    errors: Mapping[int, float],
) -> tuple[list[Member], list[figures.Panel]]:
    """The final scores and diagnostics of each member on the whole test split, and its pictures of the first test
    examples. `errors` are the mean squared errors of the LS runs by seed, as far as there are any.

    Raises:
      runs.RunError: a result is not finite.
    """
    dataset = programs.dataset
    scores, found, code_elbo = programs.evaluate(group, states)
    columns = {name: values for name, values in vae_lib.summary(scores)._asdict().items()}
    columns |= found._asdict() | {"best_sigma": np.sqrt(columns["mse"])}
    if code_elbo is not None:
        columns["code_elbo"] = code_elbo.mean(axis=-1)
    if config.num_importance_samples:
        bound = functools.partial(programs.importance_bound, group, states)
        columns["importance_bound"] = bound(num_samples=config.num_importance_samples).mean(axis=-1)
        if code_elbo is not None and not config.discretise:
            bounds = bound(num_samples=config.num_importance_samples, as_code=True)
            columns["code_importance_bound"] = bounds.mean(axis=-1)
    domain = sweep.domain(config)
    if config.evidence:
        assert domain.log_prob is not None, "checked"
        x = dataset.test[:NUM_EVIDENCE_EXAMPLES]
        evidence, columns["evidence_error"] = programs.evidence(group, states, x)
        columns["model_gap"] = np.mean(domain.log_prob(jnp.asarray(x))[None] - evidence, axis=-1)
        columns["posterior_gap"] = np.mean(evidence - scores.elbo[:, :NUM_EVIDENCE_EXAMPLES], axis=-1)
    stored = dataset.test[: domain.num_pictures]
    data = np.asarray(datasets.to_float(stored, levels=dataset.levels))
    pictures = programs.pictures(group, states, stored)
    if not dataset.masked:  # all of them compare whole examples
        columns |= domain.measure(pictures, data, dataset)
    # JSON has no NaN: better one line now than a traceback after hours of training.
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
        constant = VARIANTS[variant].sigma is Sigma.CONSTANT
        sigma = float(group.sigmas[index]) if constant else final["sigma_mean"]
        member = Member(
            variant=variant,
            sigma=sigma,
            seed=int(seed),
            group=group.name,
            member=index,
            diagnosis=diagnostics.diagnosis(
                of_member,
                discretised=config.discretise,
                relative_error=relative,
                tangents=pictures.axes is not None,
            ),
            **final,
        )
        members.append(member)
        title = f"{VARIANTS[variant].title}, sigma = {sigma:.3g}"
        drawn = slice(domain.num_in_panels)
        shown: Any = (None if field is None else field[index][drawn] for field in pictures)
        panels.append(figures.Panel(title, data[drawn], *shown))
    return members, panels


def define_flags() -> None:
    options.define(Config, sweep.GROUPS)
    command.define_places()
    with command.group(sweep.LIKELIHOOD):
        flags.DEFINE_bool("density", False, "take the density at the grey levels instead, as the paper does")
    for alias, name in command.ALIASES.items():
        flags.DEFINE_alias(alias, name)


def main() -> None:
    values = options.read(Config)
    if flags.FLAGS.density:
        if values["discretise"] or values["dequantize"]:
            raise command.UsageError(EXCLUDING)
        if not sweep.domain(configure(**values)).has_levels:
            raise command.UsageError(
                "--density is for images with grey levels: leave it out, or give another --dataset"
            )
        values["discretise"] = False
    run(configure(**values), **command.values(("run_dir", "data_dir", "manual_dir", "celeba_dir")))


if __name__ == "__main__":
    define_flags()
    command.start("sigma_sweep", main)
