"""The variants that a sweep compares: one row of a table for each, the only place that knows their names besides the
claims of the paper. A new one is one more row."""

import enum
import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import optax
from jaxtyping import Array, Float

from experiments.domains import Domain
from lvae_jax import likelihoods, networks
from lvae_jax import vae as vae_lib
from lvae_jax.datasets import Form
from lvae_jax.likelihoods import Likelihood, Schedule
from lvae_jax.sigma_range import SigmaRange

Record = Float[np.ndarray, "M T+1"]
"""sigma(t) of the leader's runs, one row for each seed, in force at each step from 0 to T."""


class Sigma(enum.Enum):
    """The kinds of sigma that a model can have."""

    CONSTANT = "one number for the whole training"
    SCHEDULED = "one number for each step, given"
    LEARNED = "one number, learned"
    MAP = "one number for each data dimension, learned"


def last(record: Record, half_way: int) -> Float[np.ndarray, " M"]:
    """The leader's final sigma."""
    return record[:, -1]


def whole(record: Record, half_way: int) -> Record:
    """The leader's sigma at every step."""
    return record


def geometric(record: Record, half_way: int) -> Record:
    """From the leader's first sigma to its last by a constant factor for each step, up to the step `half_way`."""
    progress = np.minimum(np.arange(record.shape[1]) / half_way, 1.0)
    return record[:, :1] * (record[:, -1:] / record[:, :1]) ** progress


def scheduled(sigma: Float[Array, " T+1"]) -> Likelihood:
    """The head whose sigma is given for each step."""
    return likelihoods.fixed(likelihoods.replay(sigma))


def tangent(sigma: Any, *, rank: int = 10, ramp: Schedule | None = None, **options: Any) -> Likelihood:
    """The head of `learned_vector` with tangents: first z learns, then both log sigma and the tangents."""
    return likelihoods.tangent(likelihoods.learned_vector(sigma, ramp=ramp, **options), rank=rank, ramp=ramp)


class Variant(NamedTuple):
    """A kind of VAE in a sweep.

    Attributes:
      title: in tables and figures.
      head: (sigma, options) -> the observation model; sigma is the initial one where it is learned.
      sigma: what its sigma is.
      takes: the names of the options that `head` takes, of those that `make_vae` has.
      swept: it has one row for each value of --sigma, instead of one alone.
      conditioned: its networks are told sigma: one model gives all of its rows.
      leads: the sigma(t) of its runs is that of the variants that follow.
      follow: (record, half_way) -> the members' sigmas [M] or [M, T + 1], made of the leader's; None if it does not
        follow.
      warmup: the weight of the KL rises from 0, over the first half of the steps.
      after_leader: encoder and mean are the leader's, trained and frozen.
      ranked: it has one member for each value of --rank; `VARIANTS` has each by its name and its rank.
      discrete: grey levels have probabilities under its head.
    """

    title: str
    head: Callable[..., Likelihood]
    sigma: Sigma
    takes: tuple[str, ...] = ()
    swept: bool = False
    conditioned: bool = False
    leads: bool = False
    follow: Callable[[Record, int], np.ndarray] | None = None
    warmup: bool = False
    after_leader: bool = False
    ranked: bool = False
    discrete: bool = True

    @property
    def program(self) -> tuple[Any, ...]:
        """Variants with the same differ only in the values of sigma: one compiled program serves them all."""
        return self.head, self.takes, self.warmup, self.after_leader, self.conditioned

    @property
    def per_sigma(self) -> bool:
        """Tells whether one model is trained for each value of --sigma."""
        return self.swept and not self.conditioned


LEARNED_BY_DECODER = ("gain", "balance", "ramp", "floor")


class Variants(dict[str, Variant]):
    """Variants by name; a ranked one also by its name and a rank, as tangent_10."""

    def __missing__(self, name: str) -> Variant:
        base, rank = self.base(name), name.rpartition("_")[2]
        if base == name or not rank.isdecimal() or not self[base].ranked:
            raise KeyError(name)
        return _of_rank(self[base], int(rank))

    def __contains__(self, name: object) -> bool:
        try:
            self[str(name)]
        except KeyError:
            return False
        return True

    def base(self, name: str) -> str:
        """The name without a rank."""
        return name if name in self.keys() else name.rpartition("_")[0]

    def with_ranks(self, names: Iterable[str], ranks: Iterable[int]) -> tuple[str, ...]:
        """The names, each that is ranked once for each rank."""
        ranked = {name for name, variant in self.items() if variant.ranked}
        found = [[f"{name}_{rank}" for rank in ranks] if name in ranked else [name] for name in names]
        return tuple(itertools.chain.from_iterable(found))

    def in_order(self, names: Iterable[str]) -> list[str]:
        """The names in the order of the table, of which followers come after their leader."""
        return sorted(names, key=lambda name: list(self).index(self.base(name)))


@functools.cache  # one object for each: programs are found by their head
def _of_rank(variant: Variant, rank: int) -> Variant:
    return variant._replace(
        title=f"{variant.title}, rank {rank}", head=functools.partial(variant.head, rank=rank), ranked=False
    )


VARIANTS = Variants(
    {
        "f": Variant("F-VAE", likelihoods.fixed, Sigma.CONSTANT, swept=True),
        "ls": Variant("LS-VAE", likelihoods.learned_scalar, Sigma.LEARNED, takes=("floor",), leads=True),
        "lv": Variant("LV-VAE", likelihoods.learned_vector, Sigma.MAP, takes=LEARNED_BY_DECODER),
        "optimal": Variant("sigma-VAE", likelihoods.optimal, Sigma.LEARNED, takes=("floor",)),
        "f_star": Variant("F*-VAE", likelihoods.fixed, Sigma.CONSTANT, follow=last),
        "replay": Variant("replayed F-VAE", scheduled, Sigma.SCHEDULED, follow=whole),
        "geometric": Variant("annealed F-VAE", scheduled, Sigma.SCHEDULED, follow=geometric),
        "kl_warmup": Variant("F*-VAE, KL warm-up", likelihoods.fixed, Sigma.CONSTANT, follow=last, warmup=True),
        "learned_map": Variant("learned-map VAE", likelihoods.learned_map, Sigma.MAP, takes=("shape", "floor")),
        "lv_star": Variant(
            "LV*-VAE",
            # With a ramp, even a constant one, the leader's sigma is a parameter, which checkpoints keep.
            functools.partial(likelihoods.learned_vector, ramp=optax.constant_schedule(1.0)),
            Sigma.MAP,
            takes=("gain", "floor"),
            follow=last,
            after_leader=True,
        ),
        "logistic": Variant("logistic VAE", likelihoods.logistic, Sigma.MAP, takes=LEARNED_BY_DECODER),
        "mixture": Variant("mixture VAE", likelihoods.mixture, Sigma.MAP, takes=("gain", "num_components", "floor")),
        "tangent": Variant(
            "tangent VAE", tangent, Sigma.MAP, takes=("gain", "ramp", "floor"), ranked=True, discrete=False
        ),
        "conditioned": Variant("conditioned VAE", likelihoods.fixed, Sigma.CONSTANT, swept=True, conditioned=True),
    }
)
LEADER = next(name for name, variant in VARIANTS.items() if variant.leads)
FOLLOWERS = tuple(name for name, variant in VARIANTS.items() if variant.follow is not None)


def make_vae(
    name: str,
    domain: Domain,
    form: Form,
    latent_size: int,
    sigma: Any,
    *,
    gain: float = 1.0,
    balance: Schedule | None = None,
    ramp: Schedule | None = None,
    num_components: int = 5,
    discretise: bool = False,
    sigma_range: tuple[float, ...] = (),
    **network: Any,
) -> vae_lib.VAE:
    """The paper's networks for data of this kind and form, under the observation model of the variant `name`.

    `sigma` is a number or, for the scheduled variants, one for each step, in units of the data; a sigma that is learned
    from the start begins at `sigma` times the data's scale. `gain`, `balance`, `ramp` and `num_components` are those of
    `likelihoods.learned_vector` and `mixture`. No learned sigma goes below the noise of quantisation of grey levels.
    `sigma_range` is that of conditioned variants, in units of the data. `network` are the prior and options of both
    networks.
    """
    variant, shape, levels = VARIANTS[name], form.shape, form.levels
    options: dict[str, Any] = {
        "shape": shape,
        "gain": gain,
        "balance": balance,
        "ramp": ramp,
        "num_components": num_components,
    }
    if levels is not None:
        options["floor"] = likelihoods.quantisation_noise(levels)
    if variant.swept or variant.follow is not None:
        sigma = sigma / form.scale
    likelihood = variant.head(sigma=sigma, **{option: options[option] for option in variant.takes if option in options})
    if discretise and levels is not None:
        likelihood = likelihoods.discretised(likelihood, levels=levels)
    if variant.conditioned:
        low, high = sigma_range
        network["sigma_range"] = SigmaRange(low / form.scale, high / form.scale)
    make = functools.partial(domain.make_vae, latent_size=latent_size, **network)
    vae = make(shape, likelihood)
    if variant.after_leader:
        mean = make(shape, VARIANTS[LEADER].head()).decoder  # the leader's, beside one of the same form for log sigma
        decoder = networks.side_by_side(networks.frozen(mean), mean)
        vae = vae._replace(encoder=networks.frozen(vae.encoder), decoder=decoder)
    if form.scale != 1.0:
        vae = vae_lib.rescaled(vae, centre=form.centre, scale=form.scale)
    return vae_lib.masked(vae, fill=form.centre) if form.masked else vae
