"""Samples and reconstructions of the models of a finished `experiments.sigma_sweep`, without its data set.

  python -m experiments.generate --run_dir=RUN

writes into RUN/generated, for the first seed of each row of the run's table, the arrays below as .npz, in float32, and
a figure of them as .png; generated.json beside them names the unit. The same `--key_seed` means the same z for all.
With --prior=flow, z comes from that prior, fitted by experiments.second_stage, and the folder is RUN/generated-flow.

  samples [B, *S]                           x ~ p(x|z), z from the prior
  means, stddevs [B, *S]                    of that p(x|z)
  interpolations, interpolation_stddevs     the mean and stddev of p(x|z) for z along P paths, both [P, 8, *S]
  images [N, *S]                            what --images gives, if anything
  reconstructions, reconstruction_stddevs   the mean and stddev of p(x|z) at its posterior's mean, both [N, *S]
  codes, code_stddevs [N, L]                of the posterior q(z|x) of each image
  elbos, log_likelihoods, kls [N]           the ELBO of each image in nats and its two terms, the mean of 16 draws of z

*S is the shape of the data; a stddev is sigma, that of an image its sigma map. The paths join draws from the prior or,
if there are two or more images, each of the first nine to the next.
"""

import dataclasses
import functools
import hashlib
import math
import tokenize
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
from absl import flags
from jaxtyping import Array, Float, Key

from experiments import command, latents, results, sizes, sweep
from experiments.results import Chosen, Generated, Member
from experiments.variants import VARIANTS
from lvae_jax import datasets, figures, runs
from lvae_jax import vae as vae_lib
from lvae_jax.keys import example_keys, of_seed

NUM_PATHS = 8
NUM_POINTS = 8  # on each path, the ends included
NUM_DRAWS = 16  # of z, for the ELBO of an image
CHANNELS = {1: "L", 3: "RGB"}  # Pillow's modes
MODES = {"L": "8-bit grey", "RGB": "8-bit RGB"}


def run(
    run_dir: str,
    *,
    out: str | None = None,
    variants: Sequence[str] = (),
    sigmas: Sequence[float] = (),
    seeds: Sequence[int] = (),
    images: Sequence[str] = (),
    num_samples: int = 64,
    key_seed: int = 0,
    prior: str | None = None,
    echo: Callable[[str], None] = print,
) -> Generated:
    """Writes what the chosen members of the run generate into `out`; returns what generated.json holds.

    Raises:
      command.UsageError, runs.RunError: as their docstrings say, before anything is compiled or overwritten.
    """
    path = command.path("run_dir", run_dir)
    default = "generated" if prior is None else f"generated-{prior}"
    folder = path / default if out is None else command.path("out", out)
    config, summary = sweep.read_run(path)
    shape = tuple(summary.shape)
    if num_samples < 1:
        raise command.UsageError(f"--num_samples={num_samples}: must be at least 1")
    if not 0 <= key_seed < 2**31:
        raise command.UsageError(f"--key_seed={key_seed}: must be from 0 to 2^31 - 1")
    there = [*summary.members, *between(config, summary.members, variants, sigmas)]
    members = choose(there, variants, sigmas, seeds or (config.seed,))
    levels, form = summary.levels, summary.form
    given = read_images(images, form) if images else None
    models = [latents.model(path, config, member=member, form=form, prior=prior) for member in members]
    record = Generated(
        run=str(path.resolve()),
        summary=latents.digest(path),
        shape=list(shape),
        unit=summary.unit,
        num_samples=num_samples,
        key_seed=key_seed,
        images=None if given is None else hashlib.sha256(given.tobytes()).hexdigest(),
        members=[Chosen(variant=member.variant, sigma=member.sigma, seed=member.seed) for member in members],
        files=[file_name(member) for member in members],
        prior=prior,
    )
    needed = 3 * 4 * num_samples * math.prod(shape)  # three arrays in float32
    if needed > sizes.available():
        raise command.UsageError(
            f"--num_samples={num_samples}: needs at least {sizes.text(needed)} of memory, of "
            f"{sizes.text(sizes.available())}: give less, and several --key_seed"
        )
    claim(folder, record)

    key, x = of_seed(key_seed), None if given is None else datasets.to_float(given, levels=levels)
    keys = example_keys(key, jnp.arange(0 if given is None else len(given)))
    # The ELBO is that of the data as the model was trained on them.
    seen = datasets.dequantize(keys, given, levels=levels or 256) if given is not None and config.dequantize else x
    shown = sweep.domain(config).num_in_gallery
    # One program for all members of a variant: sigma is in the parameters.
    vaes = {member.variant: vae for member, (vae, _) in zip(members, models, strict=True)}
    round_paths = prior is None and config.prior == sweep.Config().prior
    programs = {
        variant: jax.jit(functools.partial(pictures, vae=vae, num_samples=num_samples, round_paths=round_paths))
        for variant, vae in vaes.items()
    }
    scorers = {variant: jax.jit(functools.partial(scores, vae=vae)) for variant, vae in vaes.items()}
    for member, (_, params), name in zip(members, models, record.files, strict=True):
        with sizes.told("give a smaller --num_samples, or fewer --images"):
            arrays = jax.device_get(programs[member.variant](key, params=params, x=x))
            if seen is not None:
                arrays |= jax.device_get(scorers[member.variant](keys, params=params, x=seen))
        runs.replace(folder / f"{name}.npz", functools.partial(np.savez, **arrays))
        title = f"{VARIANTS[member.variant].title}, sigma = {member.sigma:.3g}, seed {member.seed}"
        figure = figures.gallery(title, panels(arrays, shape, shown=shown), unit=summary.unit)
        runs.replace(folder / f"{name}.png", functools.partial(figure.savefig, dpi=120))
        echo(f"{title}: {folder / name}.npz and .png")
    return record


def between(
    config: sweep.Config, members: Sequence[Member], variants: Sequence[str], sigmas: Sequence[float]
) -> list[Member]:
    """The conditioned models among these variants, or all if none is given, at those of the `sigmas` at which the run
    has no model.

    Raises:
      command.UsageError: a sigma is outside their range.
    """
    told = [m for m in members if VARIANTS[m.variant].conditioned and (not variants or m.variant in variants)]
    first = [member for member in told if member.sigma == config.sigma[0]]
    known = {member.sigma for member in members}
    new = [sigma for sigma in sigmas if sigma not in known]
    if first:
        sweep.check_range(config.sigma_range, new)
    return [dataclasses.replace(member, sigma=sigma) for sigma in new for member in first]


def choose(
    members: Sequence[Member], variants: Sequence[str], sigmas: Sequence[float], seeds: Sequence[int]
) -> list[Member]:
    """The members of these variants, sigmas and seeds; all variants or sigmas if none is given. Sigmas choose among
    F-VAEs, and only these if no variant is given.

    Raises:
      command.UsageError: one of them is not in the run.
    """
    there = list(dict.fromkeys(member.variant for member in members))
    swept = [name for name in there if VARIANTS[name].swept]
    f_sigmas = [member.sigma for member in members if member.variant in swept]
    for name, asked, known in (
        ("variant", variants, there),
        ("sigma", sigmas, f_sigmas),
        ("seed", seeds, [member.seed for member in members]),
    ):
        for value in asked:
            if value not in known:
                words = ", ".join(map(str, dict.fromkeys(known))) or "no F-VAE"
                raise command.UsageError(f"--{name}={value} is not in the run, which has {words}")
    if sigmas and variants and not set(swept) & set(variants):
        raise command.UsageError(
            f"--sigma chooses among F-VAEs: leave it out, or add {swept[0]} to --variant={variants[0]}"
        )
    variants = variants or (swept if sigmas else there)
    return [
        member
        for member in members
        if member.variant in variants
        and member.seed in seeds
        and (not sigmas or member.variant not in swept or member.sigma in sigmas)
    ]


def read_images(sources: Sequence[str], form: datasets.Form) -> np.ndarray:
    """The examples of this form in .npy, PNG and JPEG files, and in folders of PNG and JPEG files by name, in storage
    form [N, *S]: uint8 images of grey levels, or float32 points.

    Raises:
      command.UsageError: a file cannot be read, or its examples have the wrong shape or grey levels for this model.
    """
    files: list[Path] = []
    for source in sources:
        path = command.path("images", source)
        if path.is_dir():
            found = sorted(file for file in path.glob("[!.]*") if file.suffix.lower() in (".png", ".jpg", ".jpeg"))
            if not found:
                raise command.UsageError(f"--images={source}: no PNG or JPEG files in this folder")
            files += found
        else:
            files.append(path)
    levels = form.levels
    examples = [read_file(file, form) for file in files]
    for file, value in zip(files, examples, strict=True):
        if levels is not None and value.max() >= levels:
            raise command.UsageError(
                f"--images={file}: has a pixel of {value.max()}, give grey levels from 0 to {levels - 1}"
            )
    return np.concatenate(examples)


def read_file(file: Path, form: datasets.Form) -> np.ndarray:
    """The examples in one file, as `read_images` says."""
    shape, levels = form.shape, form.levels
    try:
        if file.suffix.lower() == ".npy":
            with open(file, "rb") as stream:
                value = np.lib.format.read_array(stream)
        else:
            with PIL.Image.open(file, formats=["PNG", "JPEG"]) as image:
                value = read_picture(file, image, shape)
    except FileNotFoundError:
        raise command.UsageError(f"--images={file}: there is no such file") from None
    except (
        OSError,
        ValueError,
        EOFError,
        SyntaxError,
        tokenize.TokenError,
        MemoryError,
        PIL.Image.DecompressionBombError,
    ) as error:
        reason = " ".join(str(error).split())
        raise command.UsageError(f"--images={file} cannot be read as a .npy, PNG or JPEG file: {reason}") from None
    if value.ndim == len(shape) == 3 and shape[2] == 1:
        value = value[..., None]  # as files of grey images often are
    if value.ndim != len(shape) + 1 or value.shape[1:] != shape or len(value) == 0:
        raise command.UsageError(f"--images={file}: give [N, {', '.join(map(str, shape))}], not {list(value.shape)}")
    if value.dtype != np.uint8 if levels is not None else value.dtype.kind not in "fiu":
        wanted = "real numbers" if levels is None else "8-bit pixels (uint8)"
        raise command.UsageError(f"--images={file}: give {wanted}, not {value.dtype}")
    if levels is not None:
        return value
    with np.errstate(over="ignore"):
        points = value.astype(np.float32)
    if not (np.isfinite(points) | (np.isnan(points) & form.masked)).all():
        raise command.UsageError(f"--images={file}: every coordinate must be a finite float32")
    return points


def read_picture(file: Path, image: PIL.Image.Image, shape: tuple[int, ...]) -> np.ndarray:
    """The pixels [1, H, W, C] of an opened PNG or JPEG file.

    Raises:
      command.UsageError: they are not those of the model's images: the message names the fix for an image.
    """
    if len(shape) != 3:
        raise command.UsageError(f"--images={file}: the model is of points, give them as .npy [N, {shape[0]}]")
    height, width, channels = shape
    mode, frames = CHANNELS[channels], getattr(image, "n_frames", 1)
    # Pillow keeps the high bytes of deep colours alone, and says nothing.
    deep = image.mode[:1] in "IF" or any("16" in str(tile[3]) for tile in getattr(image, "tile", ()))
    if image.format == "PNG" and frames > 1:
        raise command.UsageError(f"--images={file}: an animation of {frames} frames, save each as an image of its own")
    if deep or image.mode != mode:
        found = "16-bit" if deep else MODES.get(image.mode, f"in mode {image.mode}")
        raise command.UsageError(f"--images={file}: its pixels are {found}, save it in {MODES[mode]}")
    if image.size != (width, height):
        raise command.UsageError(
            f"--images={file}: it has {image.width} x {image.height} pixels, scale it to {width} x {height}"
        )
    return np.asarray(image).reshape(1, *shape)


def claim(folder: Path, record: Generated) -> None:
    """Writes generated.json into a new or empty folder; one with the same record is used again.

    Raises:
      command.UsageError: the folder holds anything else, or cannot be written.
    """
    file = folder / "generated.json"
    try:
        mine = file.exists() and record.same(results.read(file, Generated))
        if not mine and folder.exists() and any(folder.iterdir()):
            raise command.UsageError(f"{folder} holds files of another command: give another --out")
        runs.write_json(file, record.to_json())
    except OSError as error:
        raise command.UsageError(f"{folder} cannot be written ({error.strerror}): give another --out") from None


def file_name(member: Member) -> str:
    """The name of a member's files, without their endings."""
    sigma = f"-{member.sigma}" if VARIANTS[member.variant].swept else ""
    return f"{member.variant}{sigma}-seed{member.seed}"


def pictures(
    key: Key[Array, ""],
    *,
    vae: vae_lib.VAE,
    params: vae_lib.Params,
    x: Float[Array, "N *S"] | None,
    num_samples: int,
    round_paths: bool = True,
) -> dict[str, Array]:
    """The arrays of one model, by the names in the module's docstring. Paths between draws from the prior are quarters
    of ellipses if it is N(0, I), `round_paths`, else straight."""
    generate_key, ends_key = jax.random.split(key)
    samples, means, stddevs = vae_lib.generate(generate_key, vae, params, num_samples=num_samples)
    arrays = {"samples": samples, "means": means, "stddevs": stddevs}
    t = jnp.linspace(0.0, 1.0, NUM_POINTS)[None, :, None]
    if x is None or len(x) < 2:
        ends = vae_lib.sample_prior(ends_key, vae, params, num_samples=2 * NUM_PATHS)
        first, last = ends.reshape(2, NUM_PATHS, 1, vae.latent_size)
        # Under N(0, I) each point is a draw from the prior; those on a straight line would be too close to the origin.
        # No path is known on which that holds of other priors.
        weights = (jnp.cos(0.5 * jnp.pi * t), jnp.sin(0.5 * jnp.pi * t)) if round_paths else (1.0 - t, t)
        z = weights[0] * first + weights[1] * last
    else:
        ends, _ = vae_lib.encode(vae, params, x[: NUM_PATHS + 1])
        z = (1.0 - t) * ends[:-1, None] + t * ends[1:, None]
    outputs = vae_lib.decode(vae, params, z.reshape(-1, vae.latent_size))
    for name, of_outputs in (("interpolations", vae.likelihood.mean), ("interpolation_stddevs", vae.likelihood.stddev)):
        flat = of_outputs(params["likelihood"], outputs)
        arrays[name] = flat.reshape(*z.shape[:2], *flat.shape[1:])
    if x is not None:
        reconstructions, reconstruction_stddevs = vae_lib.reconstruct(vae, params, x)
        arrays |= {"images": x, "reconstructions": reconstructions, "reconstruction_stddevs": reconstruction_stddevs}
    return arrays


def scores(
    keys: Key[Array, " N"], *, vae: vae_lib.VAE, params: vae_lib.Params, x: Float[Array, "N *S"]
) -> dict[str, Array]:
    """The posterior and the ELBO of each image of one model, by the names in the module's docstring."""

    def draw(index: Array) -> tuple[Array, ...]:
        draw_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, index)
        terms = vae_lib.elbo(draw_keys, vae, params, x)
        return terms.elbo, terms.log_likelihood, terms.kl

    codes, log_stddevs = vae_lib.encode(vae, params, x)
    elbos, log_likelihoods, kls = (values.mean(axis=0) for values in jax.lax.map(draw, jnp.arange(NUM_DRAWS)))
    return {
        "codes": codes,
        "code_stddevs": jnp.exp(log_stddevs),
        "elbos": elbos,
        "log_likelihoods": log_likelihoods,
        "kls": kls,
    }


def panels(
    arrays: dict[str, np.ndarray], shape: tuple[int, ...], *, shown: int | None
) -> dict[str, tuple[np.ndarray, np.ndarray | None]]:
    """The panels of a figure of one model's arrays, at most `shown` examples each: title -> (examples, their
    stddevs)."""
    drawn = [name for name in arrays if name not in ("codes", "code_stddevs", "elbos", "log_likelihoods", "kls")]
    flat = {name: arrays[name].reshape(-1, *shape)[:shown] for name in drawn}
    of_prior = {
        "samples": (flat["samples"], None),
        "means": (flat["means"], flat["stddevs"]),
        "interpolations": (flat["interpolations"], flat["interpolation_stddevs"]),
    }
    if "images" not in flat:
        return of_prior
    return of_prior | {
        "images": (flat["images"], None),
        "reconstructions": (flat["reconstructions"], flat["reconstruction_stddevs"]),
    }


def define_flags() -> None:
    with command.group("what to generate"):
        flags.DEFINE_string("run_dir", None, "a finished run of experiments.sigma_sweep", allow_override=True)
        flags.DEFINE_string("out", None, "folder to write into, new or empty (default: RUN_DIR/generated)")
        flags.DEFINE_list("variant", [], "variants of the run, separated by commas (default: all)")
        flags.DEFINE_list("sigma", [], "sigmas of the run's F-VAEs, separated by commas (default: all)")
        flags.DEFINE_list("seed", [], "seeds of the run, separated by commas (default: its first)")
        flags.DEFINE_list(
            "images",
            [],
            "what to reconstruct: a folder or files, separated by commas; images of the run's size as PNG, JPEG or "
            "uint8 .npy [N, H, W, C], points as .npy [N, 2]",
        )
        flags.DEFINE_integer("num_samples", 64, "draws from each model; figures show no more than 64 images")
        flags.DEFINE_integer("key_seed", 0, "of all random draws")
    latents.define_prior()


def main() -> None:
    values = command.values(("run_dir", "out", "images", "num_samples", "key_seed", "prior"))
    if values["run_dir"] is None:
        raise command.UsageError("give the directory of a finished run of experiments.sigma_sweep as --run_dir")
    chosen = command.values(("variant", "sigma", "seed"))
    run(
        **values,
        variants=chosen["variant"],
        sigmas=command.numbers("sigma", chosen["sigma"]),
        seeds=command.numbers("seed", chosen["seed"], int),
    )


if __name__ == "__main__":
    define_flags()
    command.start("generate", main)
