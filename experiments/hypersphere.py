"""Theorem 1 beside trained models: an F-VAE whose sigma exceeds R / sqrt(n) loses the sphere of radius R in R^n.

  python -m experiments.hypersphere

draws the exact objective of the paper's Fig. 2 for the spheres in R^2, R^3 and R^10, trains F-VAEs over a grid of sigma
around the critical one and LS-VAEs on each, and compares the radius of their decoders' outputs and their ELBOs with the
exact ones. LS-VAEs start at sigma = R, as the paper's, and at half the critical sigma. The same command resumes an
interrupted run, and reports a finished one again. It took 20 minutes on two CPU cores with other work to do; expect
radii of 0.970 at 0.3 times the critical sigma for n = 3, and below 0.02 above it.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from absl import flags

from experiments import command, loop, options, statistics, tables
from experiments.options import Option, Range, at_least
from experiments.programs import Group, Programs
from experiments.results import SphereMember, SphereResult, SphereRow, SphereSummary
from experiments.variants import VARIANTS
from lvae_jax import datasets, figures, likelihoods, runs, theory, training
from lvae_jax import vae as vae_lib

GROUP = "the experiment"
NUMBER = Range(lambda value: 1e-3 <= value <= 1e3, "a number from 0.001 to 1000")


class Config(NamedTuple):
    """The options of the experiment."""

    dims: Annotated[tuple[int, ...], Option(GROUP, "dimensions n of the spaces that hold the spheres", at_least(2))] = (
        2,
        3,
        10,
    )
    sigma: Annotated[
        tuple[float, ...], Option(GROUP, "sigma of the F-VAEs in units of the critical one, R / sqrt(n)", NUMBER)
    ] = (0.1, 0.2, 0.3, 0.5, 0.7, 0.85, 0.95, 1.05, 1.3)
    radius: Annotated[float, Option(GROUP, "radius R of the spheres", NUMBER)] = 1.0
    num_seeds: Annotated[int, Option(GROUP, "training runs for each sphere and sigma", at_least(1))] = 2
    seed: Annotated[int, Option(GROUP, "first of the consecutive seeds")] = 0
    num_steps: Annotated[int, Option(GROUP, "gradient steps; 0 draws the exact figures alone", at_least(0))] = 2000
    batch_size: Annotated[int, Option(GROUP, "points in each step", at_least(1))] = 100
    latent_size: Annotated[
        int | None, Option(GROUP, "dimensions of z (default: n - 1, the dimension of the sphere)", at_least(1))
    ] = None


def run(
    config: Config,
    *,
    run_dir: str | None = None,
    echo: Callable[[str], None] = print,
    pace: loop.Pace = loop.PACE,
) -> SphereSummary:
    """Runs, resumes or reports the experiment.

    Raises:
      command.UsageError, runs.RunError: as their docstrings say, before anything is trained or overwritten.
    """
    check(config)

    def prepare(path: Path) -> Callable[[], SphereSummary]:
        return functools.partial(train_all, config, path, pace)

    return command.run(config, "hypersphere", run_dir, SphereSummary, prepare=prepare, table=table, echo=echo)


def check(config: Config) -> None:
    """Raises if the config cannot be run.

    Raises:
      command.UsageError: the message, one line, names the fix.
    """
    options.check(config)
    low, high = (math.exp(limit) for limit in likelihoods.LOG_STDDEV_RANGE)
    narrowest = 0.5 * theory.critical_sigma(radius=config.radius, dim=max(config.dims))
    if config.num_steps and not (math.sqrt(math.e) * low <= narrowest and config.radius <= high / math.sqrt(math.e)):
        raise command.UsageError(
            f"--radius={config.radius:g}: LS-VAEs here learn sigmas from half the critical one, {narrowest:.2g}, to R, "
            f"and none learns any outside {math.sqrt(math.e) * low:.2g} to {high / math.sqrt(math.e):.2g}: give another"
        )
    options.check_seeds(config)


def make_vae(variant: str, dim: int, latent_size: int, sigma: Any) -> vae_lib.VAE:
    """The toy's networks, under an F- or LS-VAE's observation model."""
    return vae_lib.mlp_vae((dim,), VARIANTS[variant].head(sigma), latent_size=latent_size)


def train_all(config: Config, path: Path, pace: loop.Pace) -> SphereSummary:
    """Trains all models, if any are asked for, and draws the figures; returns the summary."""
    seeds = np.arange(config.seed, config.seed + config.num_seeds, dtype=np.int32)
    members: list[SphereMember] = []
    steps = {"num_steps": config.num_steps, "batch_size": config.batch_size}
    num_members = len(config.dims) * config.num_seeds * (len(config.sigma) + 2)
    with tqdm.tqdm(total=num_members * config.num_steps, unit="step", dynamic_ncols=True, mininterval=0.5) as bar:
        for dim in config.dims if config.num_steps else ():
            critical = theory.critical_sigma(radius=config.radius, dim=dim)
            dataset = datasets.sphere_stream(dim, radius=config.radius)
            # An LS-VAE that starts above the critical sigma has to fall through it; one that starts below need not.
            sigmas = {"f": np.array(config.sigma) * critical, "ls": np.array([config.radius, 0.5 * critical])}
            for variant, values in sigmas.items():
                group = Group(f"{variant}-{dim}", np.tile(seeds, len(values)), np.repeat(values, len(seeds)))
                bar.set_description(f"n = {dim}, {variant.upper()}-VAE")
                model = functools.partial(make_vae, variant, dim, config.latent_size or dim - 1)
                programs = Programs(dataset, model, num_steps=config.num_steps, beta=1.0)
                states, _ = loop.fit(path, group, programs, None, **steps, bar=bar, pace=pace)
                members += evaluate(variant, group, programs, states, config.radius)
    spheres = [exact(dim, config, [member for member in members if member.dim == dim]) for dim in config.dims]
    drawings = {"objective": figures.objective_map(spheres), "radius": figures.radius_and_elbo(spheres)}
    for name, figure in drawings.items():
        runs.replace(path / "figures" / f"{name}.png", functools.partial(figure.savefig, dpi=120))
    return SphereSummary(
        rows=rows(members),
        members=members,
        num_test_examples=datasets.TEST_SIZE,
        device=f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        jax=jax.__version__,
    )


def evaluate(
    variant: str,
    group: Group,
    programs: Programs,
    states: training.TrainState,
    radius: float,
) -> list[SphereMember]:
    """The scores of each member on the test split, with the radius of its decoder's outputs, z drawn from the prior or
    from the posterior of these examples, beside the exact values for its sigma."""
    (dim,) = programs.dataset.shape
    scores = vae_lib.summary(programs.evaluate(group, states)[0])
    pictures = programs.pictures(group, states, programs.dataset.test)
    norms, posterior_norms = (np.linalg.norm(x, axis=-1) for x in (pictures.sample_means, pictures.reconstructions))
    critical = theory.critical_sigma(radius=radius, dim=dim)
    members = []
    for index, seed in enumerate(group.seeds):
        final = {name: float(values[index]) for name, values in scores._asdict().items()}
        sigma = final["sigma_mean"]
        member = SphereMember(
            variant=variant,
            dim=dim,
            seed=int(seed),
            sigma=sigma,
            start=float(group.sigmas[index]) / critical,
            relative_sigma=sigma / critical,
            radius=float(norms[index].mean()),
            posterior_radius=float(posterior_norms[index].mean()),
            exact_radius=float(theory.optimal_radius(sigma, radius=radius, dim=dim)),
            exact_elbo=float(theory.best_elbo(sigma, radius=radius, dim=dim)),
            **final,
        )
        members.append(member)
    return members


def exact(dim: int, config: Config, members: list[SphereMember]) -> figures.Sphere:
    """Theorem 1's curves and objective, with the trained members beside them."""
    unit = theory.critical_sigma(dim=dim)
    top = 1.1 * max(1.5, *config.sigma)
    # Denser below 1, where the radius falls like the square root of the distance.
    curve = np.unique(np.concatenate([np.linspace(0.05, top, 400), 1.0 - np.geomspace(1e-5, 0.1, 50)]))
    rho, sigma = np.linspace(0.0, 1.2, 241), np.linspace(0.05, 1.5, 291)
    trained = {}
    for variant in dict.fromkeys(member.variant for member in members):
        part = [member for member in members if member.variant == variant]
        trained[VARIANTS[variant].title] = (
            np.array([member.relative_sigma for member in part]),
            np.array([member.radius for member in part]) / config.radius,
            np.array([member.elbo for member in part]),
        )
    return figures.Sphere(
        dim=dim,
        sigma=curve,
        radius=np.asarray(theory.optimal_radius(jnp.asarray(curve * unit), dim=dim)),
        elbo=np.asarray(theory.best_elbo(jnp.asarray(curve * unit), dim=dim)) - dim * np.log(config.radius),
        map_rho=rho,
        map_sigma=sigma,
        objective=np.asarray(theory.objective(jnp.asarray(rho)[None], jnp.asarray(sigma * unit)[:, None], dim=dim)),
        trained=trained,
    )


def rows(members: list[SphereMember]) -> list[SphereRow]:
    """The mean over seeds for each dimension and sigma, with the standard deviation of radius and ELBO (0 for one)."""
    parts: dict[tuple[Any, ...], list[SphereMember]] = {}
    for member in members:
        parts.setdefault((member.dim, member.variant, member.start), []).append(member)
    names = [field.name for field in dataclasses.fields(SphereResult) if field.name not in ("dim", "variant")]
    return [
        SphereRow(
            dim=dim,
            variant=variant,
            num_seeds=len(part),
            radius_over_seeds_sd=statistics.stddev([member.radius for member in part]),
            elbo_over_seeds_sd=statistics.stddev([member.elbo for member in part]),
            **{name: float(np.mean([getattr(member, name) for member in part])) for name in names},
        )
        for (dim, variant, _), part in parts.items()
    ]


def table(summary: SphereSummary) -> str:
    """The summary as a table with a note."""
    if not summary.rows:
        return "nothing was trained (--num_steps=0): see the figures"
    return tables.sphere(summary).text()


def define_flags() -> None:
    options.define(Config, (GROUP,))


def main() -> None:
    run(Config(**options.read(Config)), run_dir=flags.FLAGS.run_dir)


if __name__ == "__main__":
    define_flags()
    command.start("hypersphere", main)
