"""Regenerates every table and figure of the paper, and says claim by claim whether it holds, with the evidence.

  python -m experiments.paper --scale=cpu

runs the parts of that scale one after another, each below runs/paper_cpu/ as its own experiment would, and writes
report.html, one page that needs nothing else, and the same as report.md beside figures/. The same command goes on where
it was stopped, runs no finished part again, and writes the report anew.

| scale | sphere | toy, toy_plain | ribbon | digits | MNIST | tangents on MNIST | CelebA |
|---|---|---|---|---|---|---|---|
| seeds, smoke | 1 | 2 | 2 | 2 | | | |
| seeds, cpu | 2 | 10 | 5 | 10 | 2 | 2 | |
| seeds, full | 10 | 10 | 10 | 10 | 10 | 10 | 10 |
| steps, smoke | 20 | 20 | 20 | 300 | | | |
| steps, cpu | 2,000 | 3,000 | 3,000 | 1,500 | 2 epochs | 4 epochs | |
| steps, full | 6,000 | 3,000 | 3,000 | 1,500 | 1,000 epochs | 100 epochs | 200 epochs |

digits and MNIST are trained twice: by the density of the pixels, as in the paper, and by the probability of their grey
levels, as digits_codes and mnist_codes (at the scale full). Tangents are trained on MNIST twice: with 4 and with 256
latent dimensions. toy_range and digits_range train one model for all sigmas, with as many seeds as the toy and, at the
scale cpu, two. full is for an accelerator. Priors are fitted to the models of toy, digits and MNIST, and the
headroom of those of digits and MNIST is measured.
"""

import functools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from experiments import (
    claims,
    command,
    headroom,
    hypersphere,
    latents,
    page,
    quality,
    report,
    results,
    second_stage,
    sigma_sweep,
    sweep,
)
from experiments.claims import Claim, Finished, Part
from experiments.results import AnyResult, Headroom, Quality, SecondStage, SphereSummary, Summary
from lvae_jax import runs

Config = hypersphere.Config | sweep.Config

TOY = sweep.configure(
    sigma=(1.0, 0.3, 0.1, 0.03, 0.01),
    variants=("f", "ls", "lv", "optimal", "f_star", "replay", "geometric", "kl_warmup"),
    num_seeds=10,
)
# By plain Adam, one constant rate for all parameters: is it our optimiser that shapes sigma(t)?
TOY_PLAIN = sweep.configure(variants=("ls",), decay=False, sigma_rate=1.0, num_seeds=10)
# By densities, at sigma^2 = 1/2, the usual sum of squares; and by probabilities.
IMAGES: dict[str, Any] = {
    "sigma": (0.7071,),
    "variants": ("f", "ls", "lv", "learned_map", "lv_star"),
    "discretise": False,
}
CODES: dict[str, Any] = {"variants": ("ls", "lv", "logistic")}
# One latent dimension and one tangent: all that the ribbon needs.
RIBBON = sweep.configure(dataset="ribbon", variants=("ls", "lv", "tangent"), rank=(1,), latent_size=1, num_seeds=5)
# One model for all sigmas of the toy part, whose F-VAEs it meets there; and both together on images. There it is worst
# at the small end of its range, so the range begins below the smallest sigma of the table.
TOY_RANGE = TOY._replace(variants=("conditioned",))
DIGITS_RANGE = sweep.configure(
    dataset="digits", variants=("f", "conditioned"), sigma=(0.1, 0.18, 0.32, 0.56, 1.0), sigma_range=(0.05, 1.0)
)
TANGENTS = sweep.configure(dataset="mnist", variants=("ls", "lv", "tangent"), dequantize=True, num_steps=60_000)
SMALL: dict[str, Any] = {"num_seeds": 2, "num_blocks": 1}
SMALL_IMAGES = SMALL | {"num_steps": 2000, "batch_size": 128, "widths": (16, 32, 32)}

SCALES: dict[str, dict[str, Config]] = {
    "smoke": {
        "sphere": hypersphere.Config(dims=(3,), sigma=(0.5, 1.3), num_seeds=1, num_steps=20),
        "toy": TOY._replace(sigma=(1.0, 0.1), num_steps=20, widths=(8,), **SMALL),
        "toy_plain": TOY_PLAIN._replace(num_steps=20, widths=(8,), **SMALL),
        "ribbon": RIBBON._replace(num_steps=20, widths=(8,), **SMALL),
        claims.TOY_RANGE: TOY_RANGE._replace(sigma=(1.0, 0.1), num_steps=20, widths=(8,), **SMALL),
        "digits": sweep.configure(dataset="digits", num_seeds=2, num_steps=300, **IMAGES),
        "digits_codes": sweep.configure(dataset="digits", num_seeds=2, num_steps=300, **CODES),
    },
    "cpu": {
        "sphere": hypersphere.Config(),
        "toy": TOY,
        "toy_plain": TOY_PLAIN,
        "ribbon": RIBBON,
        claims.TOY_RANGE: TOY_RANGE,
        claims.DIGITS_RANGE: DIGITS_RANGE._replace(num_seeds=2),
        "digits": sweep.configure(dataset="digits", num_seeds=10, **IMAGES),
        "digits_codes": sweep.configure(dataset="digits", num_seeds=10, **CODES),
        "mnist": sweep.configure(dataset="mnist", num_seeds=2, num_steps=1200, **IMAGES),
        claims.FEW: TANGENTS._replace(latent_size=4, **SMALL_IMAGES),
        claims.AMPLE: TANGENTS._replace(latent_size=256, **SMALL_IMAGES),
    },
    "full": {
        "sphere": hypersphere.Config(num_seeds=10, num_steps=6000),
        "toy": TOY,
        "toy_plain": TOY_PLAIN,
        "ribbon": RIBBON._replace(num_seeds=10),
        claims.TOY_RANGE: TOY_RANGE,
        claims.DIGITS_RANGE: DIGITS_RANGE._replace(num_seeds=10),
        "digits": sweep.configure(dataset="digits", num_seeds=10, **IMAGES),
        "digits_codes": sweep.configure(dataset="digits", num_seeds=10, **CODES),
        "mnist": sweep.configure(dataset="mnist", num_seeds=10, num_steps=600_000, **IMAGES),
        "mnist_codes": sweep.configure(dataset="mnist", num_seeds=10, num_steps=600_000, **CODES),
        claims.FEW: TANGENTS._replace(latent_size=4, num_seeds=10),
        claims.AMPLE: TANGENTS._replace(latent_size=256, num_seeds=10),
        "celeb_a": sweep.configure(dataset="celeb_a", num_seeds=10, num_steps=325_600, **IMAGES),
    },
}
PARTS = tuple(SCALES["full"])

# The second stages of the parts that have one.
STAGES: dict[str, latents.Config] = {
    "toy": latents.Config(variant=("ls", "lv"), num_steps=1000),
    "digits": latents.Config(variant=("f", "ls", "lv"), num_steps=1000),
    "digits_codes": latents.Config(variant=("ls", "lv"), num_steps=1000),
    "mnist": latents.Config(variant=("f", "ls", "lv")),
    "mnist_codes": latents.Config(variant=("ls", "lv")),
}
JUDGED = ("digits", "digits_codes", "mnist", "mnist_codes")  # by a classifier of their labels
MEASURED = ("digits", "mnist")  # for their headroom
SMALL_STAGE: dict[str, Any] = {"prior": ("flow",), "num_examples": 1000, "num_steps": 20, "classifier_steps": 20}


def run(
    scale: str,
    *,
    parts: Sequence[str] = PARTS,
    run_dir: str | None = None,
    data_dir: str | None = None,
    manual_dir: str | None = None,
    celeba_dir: str | None = None,
    echo: Callable[[str], None] = print,
) -> list[Claim]:
    """Runs or resumes the scale's `parts` that are not finished, writes the report of all finished ones, and returns
    its claims.

    Raises:
      command.UsageError, runs.RunError, datasets.DatasetError: as their docstrings say, before anything is trained.
    """
    places = command.paths(data_dir=data_dir, manual_dir=manual_dir, celeba_dir=celeba_dir)
    chosen = {name: config for name, config in SCALES[scale].items() if name in parts}
    if set(parts) - set(PARTS) or not chosen:
        raise command.UsageError(f"--parts={','.join(parts)}: give some of {', '.join(SCALES[scale])}")
    path = Path("runs", f"paper_{scale}") if run_dir is None else command.path("run_dir", run_dir)
    runs.find_run(path, {"scale": scale}, defaults={}, writes=[*PARTS, "times.json", "report.md", "report.html"])
    for config in chosen.values():
        if isinstance(config, hypersphere.Config):
            hypersphere.check(config)
        else:
            sigma_sweep.check(config, **places)
    with runs.lock(path):
        runs.make_run(path, {"scale": scale})
        for name, config in chosen.items():
            echo(f"{name}: {command_line(config)}")
            began = time.monotonic()
            try:
                run_part(scale, name, str(path / name), places, echo)
            finally:  # an interrupted part has taken time, too
                times = read_times(path)
                times[name] = times.get(name, 0.0) + time.monotonic() - began
                runs.write_json(path / "times.json", times)
        return write_report(scale, path, echo)


def run_part(scale: str, name: str, run_dir: str, places: Mapping[str, Any], echo: Callable[[str], None]) -> None:
    """Runs one experiment, and what the tables above say of its models."""
    config = SCALES[scale][name]
    if isinstance(config, hypersphere.Config):
        hypersphere.run(config, run_dir=run_dir, echo=echo)
        return
    sigma_sweep.run(config, run_dir=run_dir, **places, echo=echo)
    if name in JUDGED:
        quality.run(run_dir, data_dir=places["data_dir"], manual_dir=places["manual_dir"], echo=echo)
    if name in STAGES:
        stage = STAGES[name]._replace(**SMALL_STAGE) if scale == "smoke" else STAGES[name]
        second_stage.run(run_dir, stage, **places, echo=echo)
    if name in MEASURED:
        headroom.run(run_dir, **places, echo=echo)


def read_times(path: Path) -> dict[str, float]:
    """The seconds that each part has taken so far, over all calls."""
    file = path / "times.json"
    return runs.read_json(file) if file.exists() else {}


def command_line(config: Config) -> str:
    """The command that runs this part alone."""
    if isinstance(config, hypersphere.Config):
        name, defaults = "hypersphere", hypersphere.Config()._asdict()
    else:
        named = sweep.configure(dataset=config.dataset, dequantize=config.dequantize)
        same_kind = sweep.configure(dataset=config.dataset, discretise=config.discretise)
        name, defaults = "sigma_sweep", same_kind._asdict()
        defaults |= {"dataset": sweep.Config().dataset, "discretise": named.discretise}

    def flag(key: str, value: Any) -> str:
        if key == "discretise" and not value:
            return "--density"
        if isinstance(value, bool):
            return f"--{'' if value else 'no'}{key}"
        values = value if isinstance(value, tuple) else (value,)
        return f"--{key}=" + ",".join(f"{each:g}" if isinstance(each, float) else str(each) for each in values)

    given = [flag(key, value) for key, value in config._asdict().items() if value != defaults[key]]
    return " ".join([f"python -m experiments.{name}", *given])


def read_parts(scale: str, path: Path) -> Finished:
    """The scale's finished parts, with what was measured of their models."""

    def read(kind: type[AnyResult], file: str, parts: Iterable[str] = SCALES[scale]) -> dict[str, AnyResult]:
        files = {name: path / name / file for name in parts}
        return {name: results.read(file, kind) for name, file in files.items() if file.exists()}

    sweeps = read(Summary, "summary.json", [name for name in SCALES[scale] if name != "sphere"])
    return Finished(
        sphere=read(SphereSummary, "summary.json", ["sphere"]).get("sphere"),
        sweeps={name: Part(summary, runs.read_curves(path / name)) for name, summary in sweeps.items()},
        quality=read(Quality, "quality.json"),
        stages=read(SecondStage, f"{latents.FOLDER}/summary.json"),
        headroom=read(Headroom, f"{report.HEADROOM}/summary.json"),
    )


def write_report(scale: str, path: Path, echo: Callable[[str], None]) -> list[Claim]:
    """Writes report.md, figures/ and report.html from the parts that are finished; returns the claims."""
    finished = read_parts(scale, path)
    found = claims.all_claims(finished)
    figures = page.figures(path, page.names(finished))
    commands = {name: command_line(config) for name, config in SCALES[scale].items()}
    text = page.compose(scale, found, finished, commands=commands, times=read_times(path))
    for name, png in figures.items():
        runs.replace(path / name, functools.partial(Path.write_bytes, data=png))
    runs.replace(path / "report.md", functools.partial(Path.write_text, data=text))
    runs.replace(path / "report.html", functools.partial(Path.write_text, data=page.html(text, figures)))
    for claim in found:
        echo(f"{claim.name:10} {claim.verdict:15} {claim.title}")
    echo(f"the report: {path / 'report.html'}, {path / 'report.md'}")
    return found


def define_flags() -> None:
    command.define_places()
    with command.group("the report"):
        flags.DEFINE_enum("scale", "cpu", list(SCALES), "how much to run")
        flags.DEFINE_list("parts", list(PARTS), "parts of the scale to run now; the report has all finished ones")


def main() -> None:
    run(flags.FLAGS.scale, **command.values(("parts", "run_dir", "data_dir", "manual_dir", "celeba_dir")))


if __name__ == "__main__":
    define_flags()
    command.start("paper", main)
