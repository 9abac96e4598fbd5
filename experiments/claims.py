"""The paper's claims C1 to C8, its two perspectives and three claims of our own, each as checks that finished
experiments pass or fail.

Every threshold stands here, and none is moved to make a claim hold: a check that fails stays, with its evidence.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import stats

from experiments import statistics
from experiments.latents import FITTED
from experiments.report import by_row
from experiments.results import Headroom, Member, Quality, SecondStage, SphereMember, SphereSummary, Summary
from experiments.statistics import Paired
from experiments.variants import VARIANTS
from lvae_jax import evaluation
from lvae_jax.headroom import VARIANCES

IMAGES = ("digits", "mnist", "celeb_a")  # trained by densities, as in the paper
CODES = ("digits_codes", "mnist_codes")  # trained by probabilities of grey levels
TANGENTS = (FEW, AMPLE) = ("mnist_tangents_4", "mnist_tangents_256")  # by their numbers of latent dimensions
ONE_RUN = (TOY_RANGE, DIGITS_RANGE) = ("toy_range", "digits_range")  # with conditioned models, for all sigmas
ANNEALED = ("replay", "geometric", "kl_warmup", "f_star")  # end at the LS-VAE's sigma
ROUNDING = 1e-6  # of gains in nats, in float32
LEVEL = 0.05  # of every test, after Holm's correction over the tests of one kind in a claim


class Check(NamedTuple):
    """One thing that a claim says. holds: None if it is undecided: what was run shows neither it nor its opposite."""

    statement: str
    holds: bool | None
    evidence: str


class Claim(NamedTuple):
    name: str
    title: str
    checks: list[Check]

    @property
    def verdict(self) -> str:
        """The verdict of all checks together: with an undecided one, the claim holds in part at most."""
        answers = [check.holds for check in self.checks]
        if not answers:
            return "not run"
        if any(answers):
            return "holds" if all(answers) else "holds in part"
        return "does not hold" if False in answers else "undecided"


class Part(NamedTuple):
    """A finished sweep: its summary, and its metrics by (group, member), each a column of values over steps."""

    summary: Summary
    metrics: Mapping[tuple[str, int], Mapping[str, Float[np.ndarray, " T"]]]

    def members(self, variant: str, sigma: float | None = None) -> list[Member]:
        """The members of a variant by seed, in whose order they are paired; of F-VAEs, those of one sigma."""
        chosen = [member for member in self.summary.members if member.variant == variant]
        chosen = [member for member in chosen if sigma is None or member.sigma == sigma]
        return sorted(chosen, key=lambda member: member.seed)

    def values(self, name: str, variant: str, sigma: float | None = None) -> Float[np.ndarray, "M *K"]:
        """The values of the members under `name`."""
        return np.array([getattr(member, name) for member in self.members(variant, sigma)])

    def curves(self, name: str, variant: str, sigma: float | None = None) -> Float[np.ndarray, "M T"]:
        """The training curves of the members."""
        return np.array([self.metrics[m.group, m.member][name] for m in self.members(variant, sigma)])

    @property
    def highest_level(self) -> int:
        """The grey level of white pixels: 255 for 8 bits."""
        assert self.summary.levels is not None, "points have no grey levels"
        return self.summary.levels - 1

    @property
    def sigmas(self) -> list[float]:
        """Sigmas of the F-VAEs, the largest first."""
        return sorted({member.sigma for member in self.members("f")}, reverse=True)


class Finished(NamedTuple):
    """The finished parts of a scale. sweeps: toy, toy_plain, ribbon, `IMAGES`, `CODES`, `TANGENTS` and `ONE_RUN` by
    their names; quality, stages, headroom: of their images, their second stages, and what other covariances would win,
    by the same names, where there is one."""

    sphere: SphereSummary | None = None
    sweeps: Mapping[str, Part] = {}
    quality: Mapping[str, Quality] = {}
    stages: Mapping[str, SecondStage] = {}
    headroom: Mapping[str, Headroom] = {}


def poor_optima(elbos: Float[np.ndarray, " M"], *, best: float | None = None) -> int:
    """The number of seeds that ended in a poor optimum: more than 0.1 nats below the `best` run that ends at the same
    sigma, by default the best of these."""
    return int(np.sum((elbos.max() if best is None else best) - elbos > 0.1))


Selection = tuple[Any, ...]  # (variant,) or, of F-VAEs, (variant, sigma)


class Ordering(NamedTuple):
    """One "better > worse" that the paper claims."""

    better: str
    worse: str
    paired: Paired | None


def more_poor_optima(
    elbos: Float[np.ndarray, " M"], other: Float[np.ndarray, " N"], *, best: float | None = None
) -> tuple[int, int, float]:
    """The numbers of `poor_optima` below the `best`, by default of both, and the p of as many more in `elbos`: Fisher's
    exact test, one-sided."""
    best = max(elbos.max(), other.max()) if best is None else best
    poor, fewer = poor_optima(elbos, best=best), poor_optima(other, best=best)
    outcomes = [[poor, len(elbos) - poor], [fewer, len(other) - fewer]]
    return poor, fewer, float(stats.fisher_exact(outcomes, "greater").pvalue)


def title(variant: str, sigma: float | None = None) -> str:
    return VARIANTS[variant].title + (f" at {sigma:g}" if sigma is not None else "")


def compare(part: Part, pairs: Iterable[tuple[Selection, Selection, str]]) -> list[Ordering]:
    """Paired tests of each (better, worse) on the named quantity, with p corrected for their number by Holm."""
    found = [
        Ordering(
            title(*better), title(*worse), statistics.paired(part.values(name, *better), part.values(name, *worse))
        )
        for better, worse, name in pairs
    ]
    tested = [ordering.paired for ordering in found if ordering.paired is not None]
    # Pairs that could not be tested take no part in the correction.
    p = iter(statistics.holm([each.p for each in tested]))
    p_wilcoxon = iter(statistics.holm([each.p_wilcoxon for each in tested]))
    return [
        ordering
        if ordering.paired is None
        else ordering._replace(paired=ordering.paired._replace(p=next(p), p_wilcoxon=next(p_wilcoxon)))
        for ordering in found
    ]


def table_1_orderings(toy: Part) -> list[Ordering]:
    """Those of Table 1: LV > LS > every F; F* below LS, and below the F-VAE of the next larger sigma."""
    final = float(np.mean(toy.values("sigma", "f_star")))
    pairs: list[tuple[Selection, Selection]] = [(("lv",), ("ls",))]
    pairs += [(("ls",), ("f", sigma)) for sigma in toy.sigmas]
    pairs.append((("ls",), ("f_star",)))
    larger = [sigma for sigma in toy.sigmas if sigma > final]
    if larger:
        pairs.append((("f", min(larger)), ("f_star",)))
    return compare(toy, [(*pair, "elbo") for pair in pairs])


def annealing_orderings(toy: Part) -> list[Ordering]:
    """LS against everything else that ends at its sigma."""
    return compare(toy, [(("ls",), (other,), "elbo") for other in ANNEALED])


def check_ordering(ordering: Ordering) -> Check:
    """A check of the sign of the difference; undecided if the difference is not significant."""
    statement = f"{ordering.better} > {ordering.worse}"
    found = ordering.paired
    if found is None:
        return Check(statement, None, "too few seeds for a paired test")
    evidence = (
        f"{found.difference:+.4f} nats [{found.low:.4f}, {found.high:.4f}], positive in {found.wins} of "
        f"{found.num_seeds} seeds, p = {found.p:.2g}, d = {found.effect:.2f}"
    )
    return Check(statement, found.difference > 0.0 if found.p < LEVEL else None, evidence)


def c1(sphere: SphereSummary) -> list[Check]:
    """Theorem 1."""
    members = [member for member in sphere.members if member.variant == "f"]

    def furthest(statement: str, low: float, high: float) -> Check:
        part = [member for member in members if low <= member.relative_sigma <= high]
        if not part:
            return Check(statement, None, "not run")

        def error(member: SphereMember) -> float:
            radius = member.sigma / member.relative_sigma * math.sqrt(member.dim)
            return abs(member.radius - member.exact_radius) / radius

        worst = max(part, key=error)
        return Check(
            statement,
            error(worst) < 0.02,
            f"worst of {len(part)}: {worst.radius:.4f} for {worst.exact_radius:.4f}, n = {worst.dim}, "
            f"{worst.relative_sigma:.3g} times the critical sigma",
        )

    close = "the decoder's mean radius is Theorem 1's to 2 % of R"
    return [
        furthest(f"Up to 0.75 of the critical sigma, {close}", 0.0, 0.75),
        furthest(f"From there to the critical sigma, {close}", 0.75, 1.0),
        furthest("Above it, the radius is 0, to 2 % of R", 1.0 + 1e-9, math.inf),
    ]


def c2(toy: Part) -> list[Check]:
    """Table 1."""
    return [check_ordering(ordering) for ordering in table_1_orderings(toy)]


def c3(toy: Part) -> list[Check]:
    """Figs. 4, 6 and 7."""
    true, sigmas = toy.summary.true_measures, toy.sigmas
    assert true is not None, "a run of the toy has them"

    def mean(name: str, variant: str, sigma: float | None = None) -> Any:
        return np.mean(toy.values(name, variant, sigma), axis=0)

    def denoises(kept: float, distance: float) -> bool:
        return bool(kept < 0.5 and distance < true.curve_distance)

    def listed(values: Mapping[float, float]) -> str:
        return ", ".join(f"{value:.3g} at {sigma:g}" for sigma, value in values.items())

    error = {sigma: math.sqrt(mean("mse", "f", sigma)) for sigma in sigmas}
    learned = math.sqrt(mean("mse", "ls"))
    distance = {sigma: float(mean("curve_distance", "f", sigma)) for sigma in sigmas}
    kept = {sigma: float(mean("noise_kept", "f", sigma)) for sigma in sigmas}
    spread = {sigma: float(mean("sliced_wasserstein", "f", sigma)) for sigma in sigmas}
    learners = [(mean("noise_kept", v), mean("curve_distance", v)) for v in ("ls", "lv")]
    between = min(spread[sigma] for sigma in sigmas[1:-1] or sigmas)
    widths = {variant: mean("band_widths", variant) for variant in ("ls", "lv")}
    in_words = {variant: ", ".join(f"{width:.4f}" for width in widths[variant]) for variant in widths}
    return [
        Check(
            f"At sigma = {sigmas[0]:g} the error of reconstructions is more than three times the LS-VAE's",
            error[sigmas[0]] > 3.0 * learned,
            f"root mean squared error {listed(error)}; LS-VAE {learned:.3g}",
        ),
        Check(
            "At a sigma between, reconstructions keep less than half of the noise and lie nearer to the curve than "
            "the data",
            any(denoises(kept[sigma], distance[sigma]) for sigma in sigmas[1:-1]),
            f"noise kept {listed(kept)}; distance from the curve {listed(distance)}, of the data "
            f"{true.curve_distance:.3g}",
        ),
        Check(
            f"At sigma = {sigmas[-1]:g} reconstructions keep more than 80 % of the noise",
            kept[sigmas[-1]] > 0.8,
            f"{kept[sigmas[-1]]:.3g}",
        ),
        Check(
            "At both ends, generated points are more than twice as far from the test points as at the best sigma "
            "between",
            min(spread[sigmas[0]], spread[sigmas[-1]]) > 2.0 * between,
            f"sliced Wasserstein distance {listed(spread)}; of true points {true.sliced_wasserstein:.3g}",
        ),
        Check(
            "LS- and LV-VAE reconstruct well, by the same measure as that sigma between",
            all(denoises(*learner) for learner in learners),
            "noise kept, distance from the curve: "
            + "; ".join(f"{v} {kept:.3g}, {d:.3g}" for v, (kept, d) in zip(("LS", "LV"), learners, strict=True)),
        ),
        Check(
            "LS- and LV-VAE generate as well as the best F-VAE: within 10 % of its distance, or nearer",
            bool(max(mean("sliced_wasserstein", v) for v in ("ls", "lv")) < 1.1 * min(spread.values())),
            f"LS {mean('sliced_wasserstein', 'ls'):.3g}, LV {mean('sliced_wasserstein', 'lv'):.3g}, best F "
            f"{min(spread.values()):.3g}",
        ),
        Check(
            "The LS-VAE's band has one width: the widest region is less than 1.5 times the narrowest",
            bool(widths["ls"].max() < 1.5 * widths["ls"].min()),
            f"widths {in_words['ls']}",
        ),
        Check(
            "The LV-VAE's band has the true width of each region to 25 %",
            bool(np.all(np.abs(widths["lv"] / true.band_widths - 1.0) < 0.25)),
            f"widths {in_words['lv']}, true {', '.join(f'{width:.4f}' for width in true.band_widths)}",
        ),
    ]


def c4(toy: Part) -> list[Check]:
    """Figs. 8 and 9, Eq. 12."""
    smallest = toy.sigmas[-1]
    start = -toy.curves("log_likelihood", "f", smallest)[:, 0]
    learned = max(np.abs(toy.curves("log_likelihood", "ls")).max(), toy.curves("kl", "ls").max())
    kl, elbo = compare(toy, [(("f_star",), ("ls",), "kl"), (("ls",), ("f_star",), "elbo")])
    loss = statistics.paired(-toy.values("log_likelihood", "f_star"), -toy.values("log_likelihood", "ls"))
    return [
        Check(
            f"At sigma = {smallest:g} the reconstruction loss starts above 100 times the LS-VAEs' largest loss",
            bool(start.min() > 100.0 * learned),
            f"first logged {start.min():.4g} to {start.max():.4g} nats; the LS-VAEs' largest, of either kind, "
            f"{learned:.3g}",
        ),
        Check(
            "F* and LS end at the same reconstruction loss: the 95 % interval of the difference is within 0.05",
            None if loss is None else statistics.within(loss.low, loss.high, least=-0.05, most=0.05),
            "too few seeds"
            if loss is None
            else f"F* less LS {loss.difference:+.4f} nats [{loss.low:.4f}, {loss.high:.4f}]",
        ),
        check_ordering(kl)._replace(statement="The KL of F* is higher than that of LS"),
        check_ordering(elbo)._replace(statement="The ELBO of LS is higher than that of F*"),
    ]


class Jumps(NamedTuple):
    """The jumps of sigma in LS runs, by `statistics.jumps`. counts: of each run; coincident: the fraction of all at
    which the ELBO jumps within 2 % of the run; expected: that fraction, were the ELBO another run's; p: of the
    permutation test that it matters not whose ELBO it is, one-sided. None without any jump, or with fewer runs than can
    be significant."""

    counts: list[int]
    coincident: float | None = None
    expected: float | None = None
    p: float | None = None


def sigma_jumps(part: Part) -> Jumps:
    """The jumps of -log sigma, and of the ELBO by dimension, which a lower log sigma raises by as much."""
    sigmas, elbos = part.curves("sigma_mean", "ls"), part.curves("elbo", "ls") / part.summary.num_dimensions
    falls = [statistics.jumps(-np.log(sigma))[0] for sigma in sigmas]
    # Steps at which the ELBO of a run jumps, give or take 2 % of the run.
    near = np.zeros(elbos.shape, bool)
    reach = max(1, round(0.02 * elbos.shape[1]))
    for run, elbo in enumerate(elbos):
        for step in statistics.jumps(elbo)[0]:
            near[run, max(step - reach, 0) : step + reach + 1] = True
    counts = [len(steps) for steps in falls]
    runs = np.arange(len(counts))
    if not sum(counts) or LEVEL * math.factorial(len(counts)) < 1.0:
        return Jumps(counts)
    hits = np.array([near[:, steps].sum(axis=1) for steps in falls])  # [r, s]: of run r's jumps, at which s's ELBO does
    own = np.trace(hits)
    # Whole curves change places: the jumps of one run are not independent of each other.
    permuted = hits[runs, np.random.default_rng(0).permuted(np.tile(runs, (9999, 1)), axis=1)].sum(axis=1)
    return Jumps(
        counts,
        coincident=float(own / sum(counts)),
        expected=float((hits.sum() - own) / (sum(counts) * (len(counts) - 1))),
        p=float((1 + np.sum(permuted >= own)) / 10_000),
    )


def c5(parts: Mapping[str, Part]) -> list[Check]:
    """Fig. 10."""
    checks = []
    found = {name: sigma_jumps(part) for name, part in parts.items()}
    corrected = iter(statistics.holm([jumps.p for jumps in found.values() if jumps.p is not None]))
    for name, jumps in found.items():
        counts = ", ".join(map(str, jumps.counts))
        checks.append(Check(f"{name}: sigma jumps in every run", min(jumps.counts) > 0, f"jumps in each run: {counts}"))
        statement = f"{name}: at most of the jumps the ELBO jumps too, and more often than that of another run"
        if jumps.coincident is None:
            checks.append(Check(statement, None, "no jump, or too few runs"))
            continue
        p = next(corrected)
        evidence = (
            f"{jumps.coincident:.0%} of {sum(jumps.counts)}, of other runs {jumps.expected:.0%}, p = {p:.2g} "
            "(permutation of the runs, one-sided)"
        )
        checks.append(Check(statement, False if jumps.coincident <= 0.5 else True if p < LEVEL else None, evidence))
    return checks


def c6(toy: Part) -> list[Check]:
    """Appendix A.2."""
    ls, replayed = (toy.values("elbo", variant) for variant in ("ls", "replay"))
    curves, others = (toy.curves("elbo", variant) for variant in ("ls", "replay"))
    if len(ls) < 2:
        return []
    spread = float(ls.std(ddof=1))
    gap = float(np.abs(ls - replayed).max())
    # The first tenth is the fall from the initial loss, where the seeds differ most.
    settled = slice(curves.shape[1] // 10, None)
    curve_gap = float(np.sqrt(np.mean((curves - others)[:, settled] ** 2)))
    curve_spread = float(np.sqrt(np.mean(curves.std(axis=0, ddof=1)[settled] ** 2)))
    return [
        Check(
            "The final ELBO of each seed differs by less than the standard deviation over seeds",
            gap < spread,
            f"largest difference {gap:.4f} nats, standard deviation {spread:.4f}",
        ),
        Check(
            "So do the curves after the first tenth, in the root mean square",
            curve_gap < curve_spread,
            f"{curve_gap:.4f} nats between the two, {curve_spread:.4f} over seeds",
        ),
    ]


def c7(parts: Mapping[str, Part]) -> list[Check]:
    """Table 2."""
    checks = []
    for name, part in parts.items():
        f, lv = (
            evaluation.paper_elbo(float(np.mean(part.values("elbo", variant))), part.summary.shape)
            for variant in ("f", "lv")
        )
        highest = part.highest_level
        errors = {v: highest * math.sqrt(np.mean(part.values("mse", v))) for v in ("f", "ls", "lv")}
        checks.extend(
            [
                Check(
                    f"{name}: the LV-VAE's ELBO is more than five times the F-VAE's, in the paper's convention",
                    lv > 5.0 * f > 0.0,
                    f"{lv:.1f} against {f:.1f} nats: {lv / f:.1f} times",
                ),
                Check(
                    f"{name}: the LV-VAE's root mean squared error is below {5.0 * highest / 255.0:.2g} of {highest} "
                    "grey levels",
                    errors["lv"] < 5.0 * highest / 255.0,
                    f"LV {errors['lv']:.1f}, LS {errors['ls']:.1f}, F {errors['f']:.1f} grey levels",
                ),
                _no_larger_error(name, part),
            ]
        )
    return checks


def _no_larger_error(name: str, part: Part, variant: str = "lv", other: str = "ls") -> Check:
    ratios = np.sqrt(part.values("mse", variant) / part.values("mse", other))
    return Check(
        f"{name}: in every seed the root mean squared error of the {title(variant)} is at most 1.1 times that of the "
        f"{title(other)}",
        bool(ratios.max() <= 1.1),
        f"{ratios.min():.3f} to {ratios.max():.3f} times",
    )


def sharpness_maps(parts: Mapping[str, Part], codes: Mapping[str, Part]) -> list[Check]:
    """Beyond the paper's own evidence: what the map of sigma wins, and what learning the code with it."""
    checks = []

    def ordered(name: str, part: Part, better: str, worse: str, *, column: str = "elbo", what: str = "ELBO") -> Check:
        gains = part.values(column, better) - part.values(column, worse)
        return Check(
            f"{name}: in every seed the {what} of the {title(better)} is above that of the {title(worse)}",
            bool(gains.min() > 0.0),
            f"by {gains.min():.2f} to {gains.max():.2f} nats, {len(gains)} seeds",
        )

    for name, part in parts.items():
        if part.members("lv_star"):
            checks += [ordered(name, part, "lv_star", "ls"), ordered(name, part, "lv", "lv_star")]
        if part.members("learned_map"):
            checks.append(ordered(name, part, "learned_map", "ls"))
        if part.members("lv") and part.members("lv")[0].code_elbo is not None:
            checks.append(ordered(name, part, "lv", "ls", column="code_elbo", what="log probability of grey levels"))
    for name, part in codes.items():
        checks += [ordered(name, part, "lv", "ls", what="log probability of grey levels"), _no_larger_error(name, part)]
    return checks


def c8(parts: Mapping[str, Part], quality: Mapping[str, Quality]) -> list[Check]:
    """Figs. 13 to 18."""
    checks = []
    for name, part in parts.items():
        noise = {v: float(np.mean(part.values("sample_noise", v))) for v in ("f", "lv")}
        checks.append(
            Check(
                f"{name}: the LV-VAE's samples are more than three times as near to their means as the F-VAE's",
                noise["f"] > 3.0 * noise["lv"],
                f"root mean square distance: F {noise['f']:.3f}, LV {noise['lv']:.3f} of the grey scale",
            )
        )
        checks.append(
            Check(
                f"{name}: the LV-VAE's samples are within 5 % of the grey scale of their means",
                noise["lv"] < 0.05,
                f"root mean square distance {noise['lv']:.3f}",
            )
        )
        if name not in quality:
            checks.append(Check(f"{name}: realism", None, "no labels to train a classifier on"))
            continue
        rows = {row.row: row.classifier_frechet_distance for row in quality[name].rows}
        f, lv = (next(iter(by_row(part.members(variant)))) for variant in ("f", "lv"))
        f_means, f_samples, lv_means = rows[f"{f}: means"], rows[f"{f}: samples"], rows[f"{lv}: means"]
        # Before it reconstructs anything, its means are unreal for another reason than the paper's.
        has_learned = bool(np.mean(part.values("mse", "lv")) < np.mean(part.values("mse", "f")))
        checks.extend(
            [
                Check(
                    f"{name}: the F-VAE's means look more real than its samples",
                    f_means < f_samples,
                    f"classifier Frechet distance {f_means:.4g} and {f_samples:.4g}",
                ),
                Check(
                    f"{name}: the LV-VAE's means look less real than the F-VAE's, and its reconstructions are better",
                    lv_means > f_means if has_learned else None,
                    f"classifier Frechet distance {lv_means:.4g} and {f_means:.4g}"
                    + "; its reconstructions are not better yet" * (not has_learned),
                ),
            ]
        )
    return checks


def perspective_1(stages: Mapping[str, SecondStage]) -> list[Check]:
    """The paper's first perspective: a distribution on the manifold in place of N(0, I)."""
    checks = []
    for name, stage in stages.items():
        fitted = [member for member in stage.members if member.prior in FITTED]
        gains = {
            title(variant): [member.gain for member in fitted if member.variant == variant and member.gain is not None]
            for variant in dict.fromkeys(member.variant for member in fitted)
        }
        checks.append(
            Check(
                f"{name}: no fitted prior makes a model worse on the test split, in any seed",
                all(min(values) > -ROUNDING for values in gains.values()),
                "gains in nats: " + ", ".join(f"{v} {min(each):.3f} to {max(each):.3f}" for v, each in gains.items()),
            )
        )
        best = {
            variant: max(row.gain for row in stage.rows if title(row.variant) == variant and row.gain is not None)
            for variant in gains
        }
        if title("lv") in best and len(best) > 1:
            most = max(best, key=lambda variant: best[variant])
            checks.append(
                Check(
                    f"{name}: of all observation models, the LV-VAE gains most by its best prior",
                    most == title("lv"),
                    "nats: " + ", ".join(f"{variant} {gain:.3f}" for variant, gain in best.items()),
                )
            )
        if stage.quality is not None:
            checks += _realism_of_priors(name, stage, stage.quality)
    return checks


def _realism_of_priors(name: str, stage: SecondStage, quality: Quality) -> list[Check]:
    """Does a second stage close the LV-VAE's loss in realism (C8)?"""
    distances = {row.row: row.classifier_frechet_distance for row in quality.rows}

    def of(variant: str) -> tuple[float, float, float]:
        """The distance of means under N(0, I), under the best fitted prior, and of reconstructions."""
        row = next(row for row in stage.rows if row.variant == variant)
        prefix = title(variant) + (f", sigma = {row.sigma}" if VARIANTS[variant].swept else "")
        fitted = [
            distances[f"{prefix}, {prior}: means"] for prior in FITTED if f"{prefix}, {prior}: means" in distances
        ]
        return distances[f"{prefix}, N(0, I): means"], min(fitted), distances[f"{prefix}, q(z): means"]

    found = {row.variant: of(row.variant) for row in stage.rows}
    checks = []
    for variant in [variant for variant in ("ls", "lv") if variant in found]:
        before, after, least = found[variant]
        evidence = (
            f"classifier Frechet distance {before:.4g} under N(0, I), {after:.4g} under the best, {least:.4g} of "
            "reconstructions"
        )
        checks += [
            Check(
                f"{name}: the best prior brings the {title(variant)}'s means to a third of their distance, or less",
                after <= before / 3.0,
                evidence,
            ),
            Check(
                f"{name}: and to within twice that of its reconstructions, which is all that a prior can reach",
                after <= 2.0 * least,
                evidence,
            ),
        ]
    if {"f", "lv"} <= found.keys():
        checks.append(
            Check(
                f"{name}: with its best prior the LV-VAE's means look at least as real as the F-VAE's under N(0, I)",
                found["lv"][1] <= found["f"][0],
                f"classifier Frechet distance {found['lv'][1]:.4g} and {found['f'][0]:.4g}; the F-VAE's under its best "
                f"prior {found['f'][1]:.4g}",
            )
        )
    return checks


def perspective_2(parts: Mapping[str, Part], headroom: Mapping[str, Headroom]) -> list[Check]:
    """The paper's second perspective: an observation model that identifies the local tangent of the manifold."""
    return [
        *(_tangent_of_the_ribbon(parts["ribbon"]) if "ribbon" in parts else []),
        *_tangents_of_images({name: parts[name] for name in TANGENTS if name in parts}),
        *_correlations(headroom),
    ]


def _span(values: Float[np.ndarray, " M"], form: str) -> str:
    return f"{values.min():{form}} to {values.max():{form}} nats, {len(values)} seeds"


def _tangent_of_the_ribbon(ribbon: Part) -> list[Check]:
    assert ribbon.summary.entropy is not None, "the ribbon's is known"
    short = {v: -ribbon.summary.entropy - ribbon.values("elbo", v) for v in ("lv", "tangent_1")}
    cosines = ribbon.values("alignment", "tangent_1")
    return [
        Check(
            f"ribbon: in every seed the {title('lv')}, whose covariance is diagonal, ends at least 0.5 nats below "
            "-H(x)",
            bool(short["lv"].min() >= 0.5),
            _span(short["lv"], ".3f"),
        ),
        Check(
            "ribbon: with one tangent, every seed ends at most 0.1 nats below -H(x)",
            bool(short["tangent_1"].max() <= 0.1),
            _span(short["tangent_1"], ".3f"),
        ),
        Check(
            "ribbon: in four of five seeds or more, the mean cosine of the angle between the tangent and the true "
            "direction is at least 0.99",
            bool(np.mean(cosines >= 0.99) >= 0.8),
            f"{cosines.min():.4f} to {cosines.max():.4f}",
        ),
    ]


def _tangents_of_images(parts: Mapping[str, Part]) -> list[Check]:
    checks = []
    gains = {name: part.values("elbo", "tangent_10") - part.values("elbo", "lv") for name, part in parts.items()}
    if FEW in gains:
        checks.append(
            Check(
                f"{FEW}: in every seed ten tangents bring the ELBO at least 10 nats above the {title('lv')}'s",
                bool(gains[FEW].min() >= 10.0),
                _span(gains[FEW], "+.2f"),
            )
        )
    if len(gains) == len(TANGENTS):
        checks.append(
            Check(
                "Where z has many dimensions, they win less than half of that",
                bool(gains[AMPLE].mean() < 0.5 * gains[FEW].mean()),
                f"{AMPLE}: " + _span(gains[AMPLE], "+.2f"),
            )
        )
    for name in gains:
        noise = {v: float(np.mean(parts[name].values("sample_noise", v))) for v in ("lv", "tangent_10")}
        checks += [
            _no_larger_error(name, parts[name], "tangent_10", "lv"),
            Check(
                f"{name}: the samples of the {title('tangent_10')} are at most 1.5 times as far from their means as "
                f"the {title('lv')}'s",
                noise["tangent_10"] <= 1.5 * noise["lv"],
                f"root mean square distance {noise['tangent_10']:.3f} and {noise['lv']:.3f} of the grey scale",
            ),
        ]
    return checks


def _correlations(headroom: Mapping[str, Headroom]) -> list[Check]:
    checks = []
    for name, result in headroom.items():
        nats = {row.kind: row.nats for row in result.rows if row.variant == "ls"}
        variances, best = nats[VARIANCES], max(nats.values())
        checks.append(
            Check(
                f"{name}: in the residuals of the {title('ls')}, all correlations together would win less than a "
                "variance for each dimension does",
                best - variances < variances,
                f"the variances {variances:+.1f} nats; the best, {max(nats, key=lambda kind: nats[kind])}, "
                f"{best - variances:.1f} nats more",
            )
        )
    return checks


def annealing(toy: Part) -> list[Check]:
    """Beyond the paper's own evidence: is it the right sigma, or getting there slowly?"""
    orderings = {ordering.worse: ordering for ordering in annealing_orderings(toy)}
    ends = {variant: toy.values("elbo", variant) for variant in ("ls", *ANNEALED)}
    best = max(elbos.max() for elbos in ends.values())
    counts = ", ".join(f"{title(variant)} {poor_optima(elbos, best=best)}" for variant, elbos in ends.items())
    *_, p = more_poor_optima(ends["f_star"], ends["ls"], best=best)
    return [
        check_ordering(orderings[title("f_star")])._replace(
            statement="Started at the final sigma, without any annealing, the ELBO is lower than the LS-VAE's"
        ),
        *(
            _no_worse(orderings[title(variant)], statement)
            for variant, statement in (
                ("replay", "The LS-VAE's own sigma(t), replayed"),
                ("geometric", "A geometric schedule to the same sigma, over half of the steps,"),
                ("kl_warmup", "The final sigma with a KL warmed up over half of the steps"),
            )
        ),
        Check(
            "More runs of F* than of LS end in a poor optimum",
            True if p < LEVEL else None,
            f"of {len(ends['ls'])} each: {counts}; p = {p:.2g} (Fisher's exact test, one-sided)",
        ),
    ]


def _no_worse(ordering: Ordering, statement: str) -> Check:
    """A check that the LS-VAE's lead is at most 0.01 nats, with 95 % confidence: then the way replaces learning."""
    statement += " ends within 0.01 nats of the LS-VAE, or above"
    if ordering.paired is None:
        return Check(statement, None, "too few seeds for a paired test")
    found = ordering.paired
    evidence = f"LS-VAE's lead {found.difference:+.4f} nats [{found.low:.4f}, {found.high:.4f}]"
    return Check(statement, statistics.within(found.low, found.high, most=0.01), evidence)


def one_run(parts: Mapping[str, Part]) -> list[Check]:
    """A model that is told sigma, beside one model for each: does sharing weights over sigma anneal, without time?"""
    checks = []
    if "toy" in parts and TOY_RANGE in parts:
        checks += _one_run_of_the_toy(parts["toy"], parts[TOY_RANGE])
    if DIGITS_RANGE in parts:
        part = parts[DIGITS_RANGE]
        found = {sigma: [part.values("elbo", v, sigma).mean() for v in ("conditioned", "f")] for sigma in part.sigmas}
        checks.append(
            Check(
                f"{DIGITS_RANGE}: at each sigma its mean ELBO is at most 1 % below the {title('f')}s'",
                all(dedicated - told <= 0.01 * abs(dedicated) for told, dedicated in found.values()),
                ", ".join(f"{sigma:g}: {told:.2f} for {own:.2f} nats" for sigma, (told, own) in found.items()),
            )
        )
    return checks


def _one_run_of_the_toy(toy: Part, told: Part) -> list[Check]:
    rows = [row for row in told.summary.rows if row.variant == "conditioned"]
    sigmas = [row.sigma for row in rows if row.sigma in toy.sigmas]
    elbos = {sigma: (told.values("elbo", "conditioned", sigma), toy.values("elbo", "f", sigma)) for sigma in sigmas}
    large = {sigma: own.mean() - dedicated.mean() for sigma, (own, dedicated) in elbos.items() if sigma >= 0.1}
    small = {sigma: np.median(own) - np.median(dedicated) for sigma, (own, dedicated) in elbos.items() if sigma < 0.1}
    limits = {row.sigma: row.best_elbo[1] - row.elbo for row in rows if row.best_elbo is not None}
    checks = [
        Check(
            f"{TOY_RANGE}: at sigmas of 0.1 and more, its mean ELBO is at most 0.03 nats below the {title('f')}s'",
            all(gap >= -0.03 for gap in large.values()),
            ", ".join(f"{sigma:g}: {gap:+.3f} nats" for sigma, gap in large.items()),
        ),
        Check(
            f"{TOY_RANGE}: no ELBO is above the best of any networks at its sigma",
            min(limits.values()) >= 0.0,
            ", ".join(f"{sigma:g}: {gap:.3f} nats below" for sigma, gap in limits.items()),
        ),
    ]
    if small:
        checks.append(
            Check(
                f"{TOY_RANGE}: at smaller sigmas, its median ELBO is at least the {title('f')}s'",
                all(gap >= 0.0 for gap in small.values()),
                ", ".join(f"{sigma:g}: {gap:+.3f} nats" for sigma, gap in small.items()),
            )
        )
    for sigma in small:
        own, dedicated = elbos[sigma]
        poor, fewer, p = more_poor_optima(dedicated, own)
        checks.append(
            Check(
                f"{TOY_RANGE}: at {sigma:g}, fewer of its seeds end in a poor optimum",
                True if p < LEVEL / len(small) else None,
                f"{fewer} of {len(own)}, {title('f')} {poor} of {len(dedicated)}; p = {p:.2g} (Fisher's exact "
                "test, one-sided, before Bonferroni's correction)",
            )
        )
    return checks


def all_claims(found: Finished) -> list[Claim]:
    """Every claim, judged by what was run."""
    sphere, parts, toy = found.sphere, found.sweeps, found.sweeps.get("toy")
    images = {name: part for name, part in parts.items() if name in IMAGES}
    codes = {name: part for name, part in parts.items() if name in CODES}
    paper = {name: part for name, part in parts.items() if name in ("toy", "toy_plain", *IMAGES)}

    def on_toy(checks: Callable[[Part], list[Check]]) -> list[Check]:
        return checks(toy) if toy else []

    return [
        Claim(
            "C1",
            "A sigma of R / sqrt(n) or more loses the sphere; below it, the decoder's radius follows rho(sigma)",
            c1(sphere) if sphere else [],
        ),
        Claim(
            "C2",
            "ELBO: LV-VAE > LS-VAE > every F-VAE; F*-VAE below LS-VAE and below some larger sigma",
            on_toy(c2),
        ),
        Claim(
            "C3",
            "F-VAEs reconstruct poorly at a large sigma, denoise at a medium one, copy noise at a small one, and "
            "generate well only between; LS generates a band of one width, LV one of three",
            on_toy(c3),
        ),
        Claim(
            "C4",
            "A small fixed sigma starts with an amplified reconstruction loss, LS does not; F* and LS end at the same "
            "reconstruction loss, LS with a lower KL",
            on_toy(c4),
        ),
        Claim(
            "C5", "The LS-VAE's sigma decreases in jumps to lower plateaus, which coincide with the ELBO's", c5(paper)
        ),
        Claim("C6", "An F-VAE driven by an LS-VAE's sigma(t) has the same loss curves and final ELBO", on_toy(c6)),
        Claim(
            "C7",
            "On images the LV-VAE's ELBO exceeds that of the F-VAE (sigma^2 = 1/2) by about an order of magnitude; its "
            "reconstructions are nearly pixel-perfect",
            c7(images),
        ),
        Claim(
            "C8",
            "F-VAE's samples look like noise while their means look clean; LV-VAE's samples are close to their means; "
            "its means look less realistic than F-VAE's",
            c8(images, found.quality),
        ),
        Claim(
            "Perspective 1",
            "A prior fitted to the aggregate posterior, in place of N(0, I), mends the samples of LV-VAEs",
            perspective_1(found.stages),
        ),
        Claim(
            "Perspective 2",
            "A covariance of low rank, from the decoder, identifies the local tangent of the manifold; where z has "
            "room for all of it, it wins little",
            perspective_2(parts, found.headroom),
        ),
        Claim(
            "Annealing",
            "Learning sigma anneals: the way to the final sigma matters, not only its value",
            on_toy(annealing),
        ),
        Claim(
            "All sigmas",
            "One model that is told sigma replaces one model for each, and sharing its weights over sigma anneals "
            "without time: it avoids the poor optima of small sigmas",
            one_run(parts),
        ),
        Claim(
            "Maps",
            "On images a sigma for each pixel wins over one for all: if it is fitted to a finished LS-VAE (LV*-VAE), "
            "and more if it is learned with the code (LV-VAE); in densities and in probabilities",
            sharpness_maps(images, codes),
        ),
    ]
