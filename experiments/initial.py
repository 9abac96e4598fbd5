"""The weights of a finished run, with which the models of another begin."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import command, sweep
from experiments.programs import Group
from experiments.results import Member, Summary
from experiments.sweep import Config
from experiments.variants import VARIANTS
from lvae_jax import cache, datasets
from lvae_jax import vae as vae_lib

NETWORK = ("latent_size", "widths", "num_blocks", "prior", "num_components", "gain")  # of which the weights are
SCHEDULED = ("ramp", "balance")  # parameters of heads that are set by a schedule


class Source(NamedTuple):
    """A finished run: its directory, config and summary."""

    path: Path
    config: Config
    summary: Summary


def source(config: Config) -> Source | None:
    """The run in --init_from, None without that flag.

    Raises:
      command.UsageError: there is none, its networks are others, or it lacks a model that this config has.
      runs.RunError: it is damaged.
    """
    if config.init_from is None:
        return None
    path, flag = Path(config.init_from), f"--init_from={config.init_from}"
    if not (path / "summary.json").exists():
        raise command.UsageError(f"{flag}: there is no finished run")
    found = Source(path, *sweep.read_run(path))
    for name in NETWORK:
        if getattr(found.config, name) != getattr(config, name):
            value = getattr(found.config, name)
            text = ",".join(map(str, value)) if isinstance(value, tuple) else value
            raise command.UsageError(f"{flag}: made with --{name}={text}, give the same here")
    for variant in config.variants:
        if VARIANTS[variant].after_leader:
            raise command.UsageError(f"--variants={variant} begins with this run's own LS-VAE: leave it or {flag} out")
        for group in sweep.groups(config, variant, sweep.any_record(config)):
            members(found, variant, group)
    return found


def members(source: Source, variant: str, group: Group) -> list[Member]:
    """The models of the run that a group's begin with: those of the same variant, seed and, if it is given, sigma.

    Raises:
      command.UsageError: the run lacks one of them.
    """
    swept, chosen = VARIANTS[variant].per_sigma, []
    for seed, sigma in zip(group.seeds, group.sigmas, strict=True):
        of_seed = [m for m in source.summary.members if m.variant == variant and m.seed == seed]
        same = [member for member in of_seed if not swept or member.sigma == sigma]
        if not same:
            at = f" at --sigma={sigma:g}" if swept else ""
            raise command.UsageError(
                f"--init_from={source.path}: it has no model --variants={variant} of --seed={seed}{at}: ask for those "
                "that it has"
            )
        chosen += same[:1]
    return chosen


def recorded(config: Config, source: Source | None) -> Config:
    """The config of a run as it is kept: the run in --init_from by its name and its results, wherever it lies."""
    if source is None:
        return config
    results = (f"{member.variant} {member.seed} {member.sigma} {member.elbo}" for member in source.summary.members)
    return config._replace(init_from=source.path.resolve().name, init_results=cache.digest(results))


def check_form(source: Source, form: datasets.Form) -> None:
    """Raises if the run's data have not the form of this one's, in which its weights have a meaning.

    Raises:
      command.UsageError: the message, one line, names the flag.
    """
    theirs: Any = source.summary.form
    ours: Any = form
    for name in form._fields:
        if not np.array_equal(getattr(theirs, name), getattr(ours, name)):
            raise command.UsageError(
                f"--init_from={source.path}: the {name} of its data is not that of these: give a run on data like these"
            )


def begin(source: Source, variant: str, groups: Sequence[Group], form: datasets.Form) -> list[Group]:
    """The groups of a variant, for data of this form, with the weights of the run to begin with.

    A sigma that is learned goes on from where it was; what a schedule or this config sets is as this config has it.
    """
    restore = functools.cache(lambda name: sweep.restore(source.path, source.config, name, variant, form))

    def weights(group: Group, params: vae_lib.Params) -> vae_lib.Params:
        chosen = members(source, variant, group)
        parts = [jax.tree.map(lambda leaf, m=member: leaf[m.member], restore(member.group)) for member in chosen]
        taken: dict[str, Any] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
        head = params["likelihood"]
        if VARIANTS[variant].follow is None and not VARIANTS[variant].swept:
            head = head | {name: taken["likelihood"].get(name, head[name]) for name in head if name not in SCHEDULED}
        return taken | {"likelihood": head}

    return [group._replace(begin=functools.partial(weights, group)) for group in groups]
