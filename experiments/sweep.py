"""A sweep: its config, its models and members, and the weights and the summary of a finished one.

The commands that train, report or use a sweep import this module, and not each other.
"""

import functools
import math
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import command, domains, results, sizes
from experiments.options import Option, Range, at_least, declared, from_none_to, positive
from experiments.programs import Group
from experiments.results import Member, Summary
from experiments.variants import FOLLOWERS, VARIANTS, Record, Sigma, make_vae
from lvae_jax import celeba, datasets, files, runs, training
from lvae_jax import vae as vae_lib
from lvae_jax.keys import of_seed
from lvae_jax.priors import PRIORS

AnyConfig = TypeVar("AnyConfig", bound=Any)

BALANCED = 0.8  # of the steps, the part before the balance of the LV-VAE's gradients falls
MOST = 2**31 - 2  # whose successor 32 bits still hold
RAMP = 0.2  # of the steps, those in which the warm start's log sigma gets its deviations


# What keeps the LV-VAE from explaining data by variance. Densities tempt it more than probabilities do.
DENSITY_DEFAULTS: dict[str, Any] = {"balance": 0.7, "warm_start": 0.4}
PROBABILITY_DEFAULTS: dict[str, Any] = {"warm_start": 0.2}
TOY_DEFAULTS: dict[str, Any] = {"gain": 1.0}
# The paper's networks; an epoch of MNIST, of which the paper trains 1,000.
IMAGE_DEFAULTS: dict[str, Any] = TOY_DEFAULTS | {
    "num_steps": 600,
    "latent_size": 256,
    "widths": (32, 64, 64),
    "num_blocks": 4,
    "discretise": True,
}
DIGITS_NETWORK = {"latent_size": 16, "widths": (16, 32), "num_blocks": 1}
DIGITS_DEFAULTS = IMAGE_DEFAULTS | DIGITS_NETWORK | {"num_steps": 1500}
CELEBA_NETWORK = {"latent_size": 2048, "widths": (64, 128, 256, 256), "num_blocks": 5}
CELEBA_DEFAULTS = IMAGE_DEFAULTS | CELEBA_NETWORK | {"image_size": 64}

KNOWN = ", ".join(f"{name} ({variant.title})" for name, variant in VARIANTS.items())
COMPARISON, DATA, LIKELIHOOD, NETWORKS, TRAINING, EVALUATION = GROUPS = (
    "the comparison",
    "the data",
    "the likelihood of images",
    "the networks",
    "the training",
    "the evaluation",
)


POINT_DEFAULTS = TOY_DEFAULTS | {"latent_size": 16}

# Options that other experiments share.
ImageSize = Annotated[
    int | None,
    Option(
        DATA,
        f"side to which celeb_a's images are scaled, from {celeba.SIDES[0]} to {celeba.SIDES[-1]} "
        f"(default: {CELEBA_DEFAULTS['image_size']}), or those of a folder, of which it takes the square in the middle",
    ),
]
Levels = Annotated[int | None, Option(DATA, "number of grey levels, a power of 2, to which 8-bit images are reduced")]
TestFraction = Annotated[
    float,
    Option(DATA, "part of the examples of a file or folder without a test split that is drawn as one, always the same"),
]
DATASETS = (
    "toy, ribbon, digits, mnist, celeb_a, the TFDS name of another image data set with train and test splits, or a "
    "path like ./faces: a folder of images, or a .npy or .npz file of uint8 images or of floats [N, D], points"
)
FakeData = Annotated[bool, Option(DATA, "synthetic images of the data set's shape, to try the pipeline offline")]


class Config(NamedTuple):
    """The options of a sweep. The default of a field is what was done before the field existed, so that old runs keep
    their meaning; `configure` has the defaults of today."""

    sigma: Annotated[
        tuple[float, ...],
        # Squares have to fit into float32.
        Option(
            COMPARISON,
            "sigma of the F-VAEs, in units of the data",
            Range(lambda value: 1e-15 < value < 1e15, "a positive number, from 1e-15 to 1e15"),
        ),
    ] = (0.1,)
    variants: Annotated[tuple[str, ...], Option(COMPARISON, f"models to compare: {KNOWN}")] = ("f", "ls", "lv")
    dataset: Annotated[
        str,
        Option(DATA, DATASETS),
    ] = "toy"
    rank: Annotated[
        tuple[int, ...],
        Option(COMPARISON, "ranks of tangent's covariance, one model for each", at_least(0)),
    ] = (10,)
    sigma_range: Annotated[
        tuple[float, ...],
        Option(COMPARISON, "lowest and highest sigma that conditioned is trained for, in units of the data"),
    ] = (0.01, 1.0)
    num_seeds: Annotated[
        int, Option(COMPARISON, "runs of each variant and sigma; figures show the first", at_least(1, at_most=100_000))
    ] = 3
    seed: Annotated[int, Option(COMPARISON, "first of the consecutive seeds")] = 0
    num_steps: Annotated[
        int,
        Option(TRAINING, lambda: f"gradient steps ({by_kind('num_steps')})", at_least(1, at_most=MOST), computed=True),
    ] = 3000
    batch_size: Annotated[int, Option(TRAINING, "examples in each step", at_least(1, at_most=MOST))] = 100
    latent_size: Annotated[
        int,
        Option(
            NETWORKS,
            lambda: f"dimensions of z ({by_kind('latent_size')})",
            at_least(1, at_most=MOST),
            computed=True,
        ),
    ] = 2
    widths: Annotated[
        tuple[int, ...],
        Option(
            NETWORKS,
            lambda: (
                "units of the layers of the residual MLP, one number; for images, channels of each convolution "
                f"({by_kind('widths')})"
            ),
            computed=True,
            repeats=True,
        ),
    ] = (200,)
    num_blocks: Annotated[
        int,
        Option(
            NETWORKS,
            lambda: f"residual blocks of the encoder and of the decoder ({by_kind('num_blocks')})",
            at_least(1, at_most=100),
            computed=True,
        ),
    ] = 4
    prior: Annotated[
        str,
        Option(
            NETWORKS,
            f"p(z): {', '.join(PRIORS)}; all but the first learn with the networks",
            Range(lambda value: value in PRIORS, f"one of {', '.join(PRIORS)}"),
        ),
    ] = "standard_normal"
    bfloat16: Annotated[bool, Option(NETWORKS, "compute the networks, except their last layers, in bfloat16")] = False
    gain: Annotated[
        float,
        Option(
            TRAINING,
            "factor of the decoder's output in the log sigma of lv, lv_star, logistic and mixture: sets its speed "
            f"(default: {TOY_DEFAULTS['gain']:g})",
            positive(),
            computed=True,
        ),
    ] = 0.03
    balance: Annotated[
        float,
        Option(
            TRAINING,
            "exponent b of the weights sigma^2b of the gradients of lv and logistic, where densities train them "
            f"(default: {DENSITY_DEFAULTS['balance']}); it falls to 0 after {BALANCED:.0%} of the steps. With 1 all "
            "errors weigh the same; 0 for no weights",
            from_none_to(2.0),
            computed=True,
        ),
    ] = 0.0
    warm_start: Annotated[
        float,
        Option(
            TRAINING,
            "part of the steps in which lv and logistic have one learned sigma for all dimensions "
            f"(default: {DENSITY_DEFAULTS['warm_start']} for densities, {PROBABILITY_DEFAULTS['warm_start']} for "
            f"probabilities); over the next {RAMP:.0%} the decoder's log sigma comes in; 0 for no such start",
            from_none_to(1.0 - RAMP),
            computed=True,
        ),
    ] = 0.0
    num_components: Annotated[
        int, Option(TRAINING, "logistic distributions in each of mixture's pixels", at_least(1))
    ] = 5
    beta: Annotated[
        float,
        Option(
            TRAINING,
            "weight of the KL in training (beta-VAE); results are ELBOs, with weight 1",
            Range(lambda value: 0.0 <= value < math.inf, "a number from 0 on"),
        ),
    ] = 1.0
    learning_rate: Annotated[float, Option(TRAINING, "peak learning rate of Adam", positive())] = 2e-3
    decay: Annotated[bool, Option(TRAINING, "lower the learning rate to zero by a half cosine")] = True
    sigma_rate: Annotated[
        float,
        Option(TRAINING, "learning rate of the LS-VAE's log sigma, as a multiple of the networks'", positive()),
    ] = 10.0
    clip_norm: Annotated[
        float, Option(TRAINING, "largest norm of a gradient; longer ones are scaled down", positive())
    ] = 1.0
    warmup_steps: Annotated[int, Option(TRAINING, "steps in which the learning rate rises from zero")] = 0
    ema_decay: Annotated[
        float,
        Option(
            TRAINING,
            "decay of the moving average of the weights that is evaluated; 0 for none",
            Range(lambda value: 0.0 <= value < 1.0, "from 0, for none, to below 1"),
        ),
    ] = 0.0
    sigma_from: Annotated[
        str | None,
        Option(
            COMPARISON,
            f"folder of a run whose LS-VAEs give {', '.join(FOLLOWERS)} their sigma, instead of this run's own",
        ),
    ] = None
    init_from: Annotated[
        str | None,
        Option(
            TRAINING,
            "folder of a finished run whose models give those of the same variant, sigma and seed their first weights; "
            "balance and warm_start are then 0 by default",
        ),
    ] = None
    num_importance_samples: Annotated[
        int,
        Option(
            EVALUATION,
            "draws of the importance-weighted bound on log p(x), evaluated beside the ELBO; 0 for none",
            Range(lambda value: 0 <= value <= MOST, f"0, for none, or more, and at most {MOST}"),
        ),
    ] = 0
    evidence: Annotated[
        bool,
        Option(
            EVALUATION, "compute log p(x) of the models on the toy by quadrature: splits the gap to the true density"
        ),
    ] = False
    image_size: ImageSize = None
    levels: Levels = None
    flip: Annotated[bool, Option(DATA, "mirror training images left to right at random")] = False
    dequantize: Annotated[
        bool,
        Option(
            LIKELIHOOD,
            "add uniform noise to the grey levels of the n pixels, in training and evaluation: ELBO - n log(levels) "
            "then bounds the log probability of the image (also --dequantise)",
        ),
    ] = False
    discretise: Annotated[
        bool,
        Option(
            LIKELIHOOD,
            "give each grey level a probability: the ELBO then bounds the log probability of the image (also "
            "--discretize; the default, without --density and --dequantize)",
            computed=True,
        ),
    ] = False
    fake_data: FakeData = False
    test_fraction: TestFraction = 0.1
    mask: Annotated[
        bool,
        Option(DATA, "NaN in a file of floats is a value that is missing; the models leave it out of log p(x|z)"),
    ] = False
    celeba_files: str | None = None  # no flag: the command sees which images --celeba_dir holds
    own_files: str | None = None  # no flags: the command sees what --dataset=PATH holds,
    own_kind: str | None = None  # and of which kind, in `domains.OWN`, that is
    init_results: str | None = None  # no flag: a digest of those of the run in --init_from


def configure(**options: Any) -> Config:
    """The config of these values. Those that are missing or None have the defaults of the data set and of densities or
    probabilities. Where several values are allowed, one alone, a list and an array are also taken.

    Raises:
      datasets.DatasetError: the data set is a path that cannot be read.
    """
    several = [name for name, (kind, _) in declared(Config).items() if typing.get_origin(kind) is tuple]
    given = {name: np.asarray(value).tolist() for name, value in options.items() if value is not None}
    for name in set(several) & set(given):
        given[name] = tuple(given[name]) if isinstance(given[name], list) else (given[name],)
    name = given.get("dataset", "toy")
    if files.is_path(name):
        shape, has_levels = files.peek(name, image_size=given.get("image_size"))
        kind = "points" if len(shape) == 1 else "images" if has_levels else "float images"
        of_kind = POINT_DEFAULTS if kind == "points" else IMAGE_DEFAULTS
        defaults = of_kind | {"own_kind": kind, "discretise": has_levels}
    else:
        by_name = dict.fromkeys(datasets.SYNTHETIC, TOY_DEFAULTS)
        by_name |= {"digits": DIGITS_DEFAULTS, "celeb_a": CELEBA_DEFAULTS}
        defaults = by_name.get(name.partition(":")[0], IMAGE_DEFAULTS)  # TFDS takes a version behind a colon
    if given.get("dequantize"):
        defaults = defaults | {"discretise": False}
    values = defaults | given
    variants = values.get("variants", ())
    ranked = VARIANTS.with_ranks(variants, values.get("rank", Config().rank))
    if ranked != variants:  # each rank is a variant, whose name tells it
        values |= {"variants": ranked, "rank": Config().rank}
    learning = PROBABILITY_DEFAULTS if values.get("discretise") else DENSITY_DEFAULTS
    if "init_from" in given:  # these models are past their start
        learning = dict.fromkeys(learning, 0.0)
    return Config(**learning | values)


def recorded(config: AnyConfig) -> AnyConfig:
    """The config of a run as it is kept: files of one's own by their name and content, wherever they lie.

    Raises:
      datasets.DatasetError: they cannot be read.
    """
    if not files.is_path(config.dataset):
        return config
    return config._replace(dataset=files.label(config.dataset), own_files=files.fingerprint(config.dataset))


def domain(config: Config) -> domains.Domain:
    """The kind of the data of a config that `configure` made."""
    return domains.of(config.dataset, config.own_kind)


def by_kind(name: str) -> str:
    """The default of a field for each kind of data, in words."""

    def text(value: Any) -> str:
        return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)

    kinds = {"toy": "toy", "digits": "digits", "celeb_a": "celeb_a", "other images": "mnist"}
    values = {kind: text(getattr(configure(dataset=dataset), name)) for kind, dataset in kinds.items()}
    return "default: " + ", ".join(f"{value} for {kind}" for kind, value in values.items())


def data_options(config: Config) -> dict[str, Any]:
    """The fields that `datasets.load` takes."""
    names = ("image_size", "levels", "flip", "dequantize", "fake_data", "test_fraction", "mask")
    return {name: getattr(config, name) for name in names}


def model(config: Config, variant: str, form: datasets.Form) -> Callable[[Any], vae_lib.VAE]:
    """A function of sigma that gives the variant's model in this config, for data of this form."""
    of_data = domain(config)
    network = of_data.network(config.widths)
    network |= {"num_blocks": config.num_blocks, "dtype": jnp.bfloat16 if config.bfloat16 else None}
    network["prior"] = PRIORS[config.prior](config.latent_size)
    names = ("gain", "num_components", "discretise", "sigma_range")
    head: dict[str, Any] = {name: getattr(config, name) for name in names}
    if config.balance:
        begin = round(BALANCED * config.num_steps)
        head["balance"] = optax.linear_schedule(config.balance, 0.0, max(1, config.num_steps - begin), begin)
    if config.warm_start:
        begin = round(config.warm_start * config.num_steps)
        head["ramp"] = optax.linear_schedule(0.0, 1.0, max(1, round(RAMP * config.num_steps)), begin)
    elif config.init_from is not None:
        # What a warm start learned is a parameter of the head that has a ramp.
        head["ramp"] = optax.constant_schedule(1.0)
    return functools.partial(make_vae, variant, of_data, form, config.latent_size, **head, **network)


def groups(
    config: Config, variant: str, record: Record | None, *, trained: vae_lib.Params | None = None
) -> list[Group]:
    """The models of a variant that are trained, all together or, as the data ask for, each alone: of one that is swept,
    and not conditioned, every sigma with every seed.

    `record` is that of the leader's runs, of which the sigmas of followers are made; others need none. `trained` are
    the params of these runs, leaves [num_seeds, ...], with which a variant begins that continues them.
    """
    of_variant = VARIANTS[variant]
    seeds = np.arange(config.seed, config.seed + config.num_seeds, dtype=np.int32)
    sigmas = np.ones(config.num_seeds)
    if of_variant.per_sigma:
        sigmas, seeds = np.repeat(config.sigma, config.num_seeds), np.tile(seeds, len(config.sigma))
    elif of_variant.follow is not None:
        assert record is not None, "the leader comes before its followers"
        sigmas = of_variant.follow(record, half_way(config))

    def group(name: str, part: slice) -> Group:
        def begin(params: vae_lib.Params) -> vae_lib.Params:
            taken = jax.tree.map(lambda leaf: jnp.asarray(leaf[part]), trained)
            kept = {name: taken[name] for name in ("encoder", "prior") if name in taken}
            return params | kept | {"decoder": params["decoder"] | {"first": taken["decoder"]}}

        return Group(name, seeds[part], sigmas[part], begin if trained is not None else None)

    if not domain(config).alone:
        return [group(variant, slice(None))]
    return [group(f"{variant}-{index}", slice(index, index + 1)) for index in range(len(seeds))]


def memory(config: Config, form: datasets.Form) -> int:
    """Bytes that training and evaluation of the config need at least, on data of this form, from shapes alone: the
    states of the members that are trained together with their gradients, all layers for a batch, the records of sigma,
    and the weights of importance samples of a chunk of the test split. Nothing is made."""
    together, shape = 1 if domain(config).alone else config.num_seeds, form.shape
    records = 8 * config.num_seeds * (config.num_steps + 1)
    # `Programs` takes chunks of this size.
    weights = 4 * config.num_importance_samples * max(1, min(1000, 2**20 // math.prod(shape)))
    largest = 0
    for variant in config.variants:
        num_members = together * (len(config.sigma) if VARIANTS[variant].per_sigma and together > 1 else 1)
        # Neither steps nor sigmas change the shapes of a model.
        vae = trained_vae(config._replace(num_steps=1, warmup_steps=0), variant, form)
        key = jax.eval_shape(lambda: of_seed(0))
        params = jax.eval_shape(functools.partial(vae_lib.init, vae=vae), key)
        keys = jax.ShapeDtypeStruct((config.batch_size,), key.dtype)
        x = jax.ShapeDtypeStruct((config.batch_size, *shape), np.float32)
        batch = sizes.layers(lambda keys, params, x, vae=vae: vae_lib.elbo(keys, vae, params, x), keys, params, x)
        states = sizes.nbytes(params) * (4 + bool(config.ema_decay))  # Adam has two moments
        largest = max(largest, num_members * max(states + batch, weights))
    return largest + records


SIZES = ("widths", "latent_size", "num_blocks", "batch_size", "num_seeds", "num_steps", "num_importance_samples")


def check_memory(config: Config, form: datasets.Form) -> None:
    """Raises if the config needs more memory than there is, on data of this form: before anything is made.

    Raises:
      command.UsageError: the message, one line, names the flag that most of it is due to.
    """
    needed, there = memory(config, form), sizes.available()
    if needed <= there:
        return

    def without(name: str) -> int:
        value = getattr(config, name)
        least: Any = (1,) * len(value) if isinstance(value, tuple) else min(1, value)
        return memory(config._replace(**{name: least}), form)

    # Several may be large; the one to lower is that without which the least is needed.
    name = min(SIZES, key=without)
    value = getattr(config, name)
    text = ",".join(map(str, value)) if isinstance(value, tuple) else value
    raise command.UsageError(
        f"--{name}={text}: the run needs at least {sizes.text(needed)} of memory, of {sizes.text(there)}: give less"
    )


def check_range(sigma_range: Sequence[float], sigmas: Sequence[float]) -> None:
    """Raises if these are not the lowest and the highest sigma of a range in which the `sigmas` lie.

    Raises:
      command.UsageError: the message, one line, names the flag.
    """
    text = ",".join(f"{limit:g}" for limit in sigma_range)
    if len(sigma_range) != 2 or not 0.0 < sigma_range[0] < sigma_range[1] < math.inf:
        raise command.UsageError(f"--sigma_range={text}: give the lowest and the highest sigma, two positive numbers")
    for sigma in sigmas:
        if not sigma_range[0] <= sigma <= sigma_range[1]:
            raise command.UsageError(
                f"--sigma={sigma:g}: conditioned models are for --sigma_range={text}, give a sigma within"
            )


def any_record(config: Config) -> Record:
    """A record of ones, where only its shape matters: the names and sizes of members do not depend on its values."""
    return np.ones((config.num_seeds, config.num_steps + 1))


def half_way(config: Config) -> int:
    """The step at which a geometric schedule and a warm-up of the KL have gone all their way."""
    return max(1, config.num_steps // 2)


def read_run(path: Path) -> tuple[Config, Summary]:
    """The config and the summary of a finished run.

    Raises:
      runs.RunError: there is none in `path`.
    """
    recorded = runs.read_flags(path, defaults=Config._field_defaults)
    if recorded.keys() != set(Config._fields):
        raise runs.RunError(f"{path} holds no run of this version of experiments.sigma_sweep: give another --run_dir")
    if not (path / "summary.json").exists():
        raise runs.RunError(f"{path} holds an unfinished run: repeat its command, which finishes it")
    for name, kind in typing.get_type_hints(Config).items():
        if not results.fits(kind, recorded[name]):
            raise runs.RunError(f"{path / 'flags.json'} is damaged: {name} cannot be {recorded[name]!r}, restore it")
    summary = results.read(path / "summary.json", Summary)
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in recorded.items()}
    return Config._make(values[name] for name in Config._fields), summary


def source(path: Path, config: Config, dataset: str | None, celeba_dir: str | None) -> str:
    """The name or the path of the run's data, which are checked to be the same as then.

    Raises:
      command.UsageError: the message, one line, names the flag.
    """
    if (config.own_files is None) != (dataset is None):
        fix = "give the file or folder of" if dataset is None else "leave it out, this is no run on"
        raise command.UsageError(f"--dataset: {fix} data of your own")
    if dataset is not None and (not files.is_path(dataset) or files.fingerprint(dataset) != config.own_files):
        raise command.UsageError(f"--dataset={dataset}: not the data of the run in {path}, {config.dataset}")
    there = None if celeba_dir is None else celeba.fingerprint(celeba_dir)
    if there != config.celeba_files:
        fix = "give the folder of the run's images" if celeba_dir is None else "not the images of the run"
        raise command.UsageError(f"--celeba_dir: {fix}")
    return config.dataset if dataset is None else dataset


def trained_vae(config: Config, variant: str, form: datasets.Form) -> vae_lib.VAE:
    """The model of a variant in a finished run, for any sigma: that of a trained member is in its parameters, where
    `trained` puts that of a conditioned one."""
    sigma = jnp.ones(config.num_steps + 1) if VARIANTS[variant].sigma is Sigma.SCHEDULED else 1.0
    return model(config, variant, form)(sigma)


def restore(path: Path, config: Config, name: str, variant: str, form: datasets.Form) -> vae_lib.Params:
    """The trained weights of the M members of the group `name`, leaves [M, ...].

    Raises:
      runs.RunError: the checkpoint is missing, damaged, or of another shape or version.
    """
    if not (path / "checkpoints" / name).exists():
        raise runs.RunError(f"{path / 'checkpoints' / name} is missing: give the directory of a whole run")
    members = groups(config, variant, any_record(config))
    group = next(group for group in members if group.name == name)
    init = functools.partial(
        training.members_init,
        make_vae=lambda sigma: trained_vae(config, variant, form),
        optimizer=optax.identity(),  # of whose state a finished run keeps nothing
    )
    record = jax.ShapeDtypeStruct((len(group.seeds), config.num_steps + 1), np.float32)
    with runs.Checkpoints(path, name) as checkpoints:
        if checkpoints.step is None:
            raise runs.RunError(f"{path / 'checkpoints' / name} is empty: give the directory of a whole run")
        states, _ = checkpoints.restore((jax.eval_shape(init, group.seeds, group.sigmas).finished(), record))
    return states.weights


def trained(path: Path, config: Config, member: Member, form: datasets.Form) -> tuple[vae_lib.VAE, vae_lib.Params]:
    """The model of a member of a finished run with its trained parameters.

    Raises:
      runs.RunError: as `restore` says.
    """
    weights = restore(path, config, member.group, member.variant, form)
    params = jax.tree.map(lambda leaf: leaf[member.member], weights)
    if VARIANTS[member.variant].conditioned:
        params |= told(config, member.variant, member.sigma, form)
    return trained_vae(config, member.variant, form), params


def told(config: Config, variant: str, sigma: Any, form: datasets.Form) -> vae_lib.Params:
    """The part of a conditioned model's params that holds its sigma, a number or one for each of M members, in units of
    the data of this form."""
    return {"likelihood": model(config, variant, form)(jnp.asarray(sigma, jnp.float32)).likelihood.init()}
