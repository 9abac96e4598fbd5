import math

import numpy as np
import pytest
from scipy import stats

from experiments import claims
from experiments.claims import Part

RNG = np.random.default_rng(0)
SEEDS = 10
STEPS = np.arange(1, 101)
TRUE = {"curve_distance": 0.065, "noise_kept": 1.0, "band_widths": [0.05, 0.02, 0.1], "sliced_wasserstein": 0.05}

# Of one variant: mean ELBO, reconstruction's squared error, noise kept, distance, Wasserstein; as the paper tells it.
STORY = {
    ("f", 1.0): (-3.0, 0.5, 0.1, 0.9, 0.9),
    ("f", 0.3): (-1.8, 0.04, 0.1, 0.05, 0.3),
    ("f", 0.1): (-0.9, 0.006, 0.1, 0.03, 0.06),
    ("f", 0.03): (-0.8, 0.001, 0.7, 0.04, 0.08),
    ("f", 0.01): (-1.9, 0.0001, 0.95, 0.06, 0.2),
    ("ls", None): (-0.75, 0.004, 0.2, 0.03, 0.06),
    ("lv", None): (-0.5, 0.004, 0.2, 0.03, 0.05),
    ("optimal", None): (-0.75, 0.004, 0.2, 0.03, 0.06),
    ("f_star", None): (-1.0, 0.004, 0.2, 0.03, 0.06),
    ("replay", None): (-0.75, 0.004, 0.2, 0.03, 0.06),
    ("geometric", None): (-0.75, 0.004, 0.2, 0.03, 0.06),
    ("kl_warmup", None): (-0.75, 0.004, 0.2, 0.03, 0.06),
}


def sigma_of_t():
    """A fall in two jumps."""
    return np.exp(-sum(1.0 / (1.0 + np.exp(-(STEPS - at) / 1.5)) for at in (40, 70)))


def toy_part(change=None):
    """A toy part whose numbers tell the paper's story; `change(member)` edits each member."""
    members, metrics = [], {}
    common = 0.02 * RNG.standard_normal(SEEDS)  # of a seed, in all variants
    for (variant, sigma), (elbo, mse, kept, distance, wasserstein) in STORY.items():
        for seed in range(SEEDS):
            own = 0.0 if variant == "replay" else 0.001 * RNG.standard_normal()
            member = {"variant": variant, "sigma": sigma or 0.07, "seed": seed, "group": f"{variant}{sigma}"}
            member |= {"member": seed, "elbo": elbo + common[seed] + own + (-0.002 if variant == "ls" else 0.0)}
            member |= {"kl": (3.5 if variant == "f_star" else 3.3) + own, "mse": mse, "noise_kept": kept}
            member |= {"log_likelihood": 2.5 + common[seed] + own, "curve_distance": distance}
            member |= {"sliced_wasserstein": wasserstein}
            member["band_widths"] = TRUE["band_widths"] if variant == "lv" else [0.06, 0.05, 0.07]
            if change is not None:
                change(member)
            members.append(member)
            start = -1e4 if sigma == 0.01 else -2.0
            log_likelihood = np.linspace(start, 2.5, 100)
            curve = -2.0 * np.log(sigma_of_t()) + common[seed] + (0.1 * own)
            metrics[member["group"], seed] = {
                "log_likelihood": log_likelihood,
                "kl": np.full(100, 3.0),
                "elbo": curve,
                "sigma_mean": sigma_of_t(),
            }
    return Part({"members": members, "true_measures": TRUE, "num_dimensions": 2, "entropy": 0.4}, metrics)


def sphere_part(radius_at):
    members = [
        {
            "variant": "f",
            "dim": dim,
            "seed": 0,
            "sigma": 2.0 * relative / math.sqrt(dim),
            "relative_sigma": relative,
            "exact_radius": (exact := 2.0 * math.sqrt(max(1.0 - relative**2, 0.0))),
            "radius": radius_at(relative, exact),
        }
        for dim in (2, 10)
        for relative in (0.3, 0.7, 0.9, 1.1)
    ]
    return Part({"members": members}, {})


def image_part(lv_elbo=2000.0, f_noise=0.7, lv_mse=1e-4):
    members = [
        {"variant": variant, "sigma": 0.7071, "seed": 0, "elbo": elbo, "mse": mse, "sample_noise": noise}
        | {"group": variant, "member": 0}
        for variant, elbo, mse, noise in (
            ("f", -475.0, 0.02, f_noise),
            ("ls", 1000.0, 1e-3, 0.03),
            ("lv", lv_elbo, lv_mse, 0.05),
        )
    ]
    metrics = {("ls", 0): {"sigma_mean": sigma_of_t(), "elbo": -784 * np.log(sigma_of_t())}}
    return Part({"members": members, "shape": [28, 28, 1], "num_dimensions": 784}, metrics)


def image_quality(f_means=5.0, f_samples=50.0, lv_means=10.0):
    values = {"F-VAE, sigma = 0.7071: samples": f_samples, "F-VAE, sigma = 0.7071: means": f_means}
    values |= {"LV-VAE: samples": 12.0, "LV-VAE: means": lv_means}
    return {"rows": [{"row": row, "classifier_frechet_distance": value} for row, value in values.items()]}


def verdicts(parts, quality=None):
    return {claim.name: claim.verdict for claim in claims.all_claims(parts, quality or {})}


def test_numbers_that_tell_the_paper_s_story_make_every_claim_hold():
    parts = {"sphere": sphere_part(lambda relative, exact: exact), "toy": toy_part(), "mnist": image_part()}
    found = claims.all_claims(parts, {"mnist": image_quality()})
    for claim in found[:-1]:
        assert all(check.holds for check in claim.checks), claim
        assert claim.verdict == "holds"
    annealing = found[-1]
    assert annealing.verdict == "holds in part"
    assert [check.holds for check in annealing.checks] == [True, True, True, True, False], "no poor optimum here"


def test_what_was_not_run_has_no_verdict():
    assert set(verdicts({}).values()) == {"not run"}
    assert verdicts({"sphere": sphere_part(lambda relative, exact: exact)}) == {
        name: "holds" if name == "C1" else "not run" for name in verdicts({})
    }


@pytest.mark.parametrize(
    ("radius_at", "holds"),
    [
        (lambda relative, exact: exact + 0.03, [True, True, True]),  # R = 2: within 2 %
        (lambda relative, exact: exact + 0.05, [False, False, False]),
        (lambda relative, exact: exact if relative < 0.8 or relative > 1.0 else 0.0, [True, False, True]),
        (lambda relative, exact: exact if relative < 1.0 else 0.5, [True, True, False]),
    ],
)
def test_c1_tells_where_theorem_1_fails(radius_at, holds):
    assert [check.holds for check in claims.c1(sphere_part(radius_at))] == holds


@pytest.mark.parametrize(
    ("claim", "statement", "change"),
    [
        (claims.c2, "LV-VAE > LS-VAE", lambda m: m.update(elbo=-0.75) if m["variant"] == "lv" else None),
        (claims.c2, "LS-VAE > F-VAE at 0.03", lambda m: m.update(elbo=-0.5) if m["sigma"] == 0.03 else None),
        (claims.c2, "LS-VAE > F*-VAE", lambda m: m.update(elbo=-0.75) if m["variant"] == "f_star" else None),
        (claims.c2, "F-VAE at 0.1 > F*-VAE", lambda m: m.update(elbo=-0.7) if m["variant"] == "f_star" else None),
        (claims.c3, "At sigma = 1 the error", lambda m: m.update(mse=0.01) if m["sigma"] == 1.0 else None),
        (claims.c3, "At a sigma between", lambda m: m.update(noise_kept=0.6)),
        (claims.c3, "At sigma = 0.01 recon", lambda m: m.update(noise_kept=0.7) if m["sigma"] == 0.01 else None),
        (claims.c3, "At both ends", lambda m: m.update(sliced_wasserstein=0.1) if m["sigma"] == 1.0 else None),
        (claims.c3, "LS- and LV-VAE gen", lambda m: m.update(sliced_wasserstein=0.1) if m["variant"] == "lv" else None),
        (claims.c3, "The LS-VAE's band", lambda m: m.update(band_widths=[0.05, 0.02, 0.1])),
        (claims.c3, "The LV-VAE's band", lambda m: m.update(band_widths=[0.05, 0.03, 0.1])),
        (claims.c4, "F* and LS end", lambda m: m.update(log_likelihood=2.4) if m["variant"] == "f_star" else None),
        (claims.c4, "The KL of F*", lambda m: m.update(kl=3.6) if m["variant"] == "ls" else None),
        (claims.c6, "The final ELBO", lambda m: m.update(elbo=-0.9) if m["variant"] == "replay" else None),
    ],
)
def test_each_check_fails_where_its_numbers_do(claim, statement, change):
    (found,) = [check for check in claim(toy_part(change)) if check.statement.startswith(statement)]
    assert found.holds is False, found
    (found,) = [check for check in claim(toy_part()) if check.statement.startswith(statement)]
    assert found.holds is True, found


def test_c5_needs_jumps_and_their_coincidence():
    part = toy_part()
    for curves in part.metrics.values():
        curves["elbo"] = 2.0 * sum(1.0 / (1.0 + np.exp(-(STEPS - at) / 1.5)) for at in (20, 55, 90))
    assert [check.holds for check in claims.c5({"toy": part})] == [True, False]
    for curves in part.metrics.values():
        curves["sigma_mean"] = np.exp(-STEPS / 30.0)
    assert [check.holds for check in claims.c5({"toy": part})] == [False, None]


def test_images_are_judged_each_by_itself():
    parts = {"mnist": image_part(lv_elbo=0.0, lv_mse=0.01), "celeb_a": image_part(f_noise=0.1)}
    assert [check.holds for check in claims.c7(parts)] == [False, False, True, True]
    judged = {"mnist": image_quality(f_means=60.0, lv_means=4.0)}
    assert [check.holds for check in claims.c8(parts, judged)] == [True, False, False, False, None]


def test_paired_comparisons_are_scipy_s():
    a, b = RNG.standard_normal((2, 12))
    found = claims.paired(a, b)
    test = stats.ttest_rel(a, b)
    assert found.p == pytest.approx(test.pvalue, rel=1e-12)
    assert (found.low, found.high) == pytest.approx(test.confidence_interval(), rel=1e-12)
    assert found.p_wilcoxon == pytest.approx(stats.wilcoxon(a, b).pvalue, rel=1e-12)
    assert found.effect == pytest.approx(test.statistic / np.sqrt(12), rel=1e-12), "d of paired data is t / sqrt(n)"
    assert found.wins == np.sum(a > b)
    swapped = claims.paired(b, a)
    assert (swapped.difference, swapped.p) == pytest.approx((-found.difference, found.p), rel=1e-12)
    assert claims.paired(a[:2], b[:2]) is None
    assert claims.paired(a, a + 1.0) is None, "no spread over seeds"


def test_holm_s_correction_by_hand():
    # Sorted .01, .02, .03, .04 times 4, 3, 2, 1, never decreasing.
    np.testing.assert_allclose(claims.holm([0.03, 0.01, 0.04, 0.02]), [0.06, 0.04, 0.06, 0.06])
    np.testing.assert_allclose(claims.holm([0.9, 0.8]), [1.0, 1.0])
    assert claims.holm([]) == []


def test_poor_optima_are_those_far_below_the_rest():
    good = -0.5 + 0.01 * np.arange(9)
    assert claims.poor_optima(good) == 0
    assert claims.poor_optima(np.append(good, -0.85)) == 1
    assert claims.poor_optima(np.append(good, 0.5)) == 0, "a lucky seed is not poor"
    assert claims.poor_optima(np.array([-0.5, -0.5, -0.5, -0.54])) == 0, "less than 0.05 nats"
