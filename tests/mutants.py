"""Faults that the tests must notice: each breaks one line in a copy of the checkout, and a test there has to fail.

  python -m tests.mutants
  python -m tests.mutants --names=kl_without_half,crop_off_by_one --processes=1 --record=mutants.txt

The tests run unchanged first, then against each mutant those that ought to kill it. One line for each says which test
killed it, or that it SURVIVED: then a test is missing, or the fault is none. The process fails if one survives.

To add one, add it to `MUTANTS`: a mistake that people make, in a fragment of a line that occurs once in its file, and
if they are not those of the same name the narrowest tests that should see it. The changed line must still run: a test
that cannot import the code shows nothing.
"""

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
TIME_LIMIT = 900.0  # seconds, of the tests of one mutant


class Mutant(NamedTuple):
    """A fault: in `file`, `old` becomes `new`. tests: pytest's arguments, separated by spaces; by default the test file
    of the same name."""

    name: str
    file: str
    old: str
    new: str
    tests: str = ""

    @property
    def arguments(self) -> str:
        return self.tests or f"tests/test_{Path(self.file).name}"


def _tests(name: str, *functions: str) -> tuple[str, ...]:
    return tuple(f"tests/test_{name}.py::test_{function}" for function in functions)


(MEMORY,) = _tests("sizes", "kept_memory_is_not_cleared_by_the_system_again")
# What takes its time: it trains something or starts a command, or is one of many such
COMPARES, EVIDENCE, FOLLOWS, WARMED, KEPT, IMAGE_RUN, RELATIVES, BAD_FLAG, BAD_SIGMA = _tests(
    "sigma_sweep",
    "command_compares_all_variants",
    "evidence_and_importance_bound",
    "followers_take_sigma_from_their_seed",
    "kl_warmup",
    "finished_checkpoint_keeps_weights_alone_and_is_only_evaluated",
    "image_run",
    "relatives_of_the_learned_vector",
    "bad_input_is_refused",
    "sigma_that_does_not_fit_is_refused",
)
SCHEDULES = "tests/test_likelihoods.py::test_scheduled_head_is_at_each_step_the_fixed_one"
CELLS, MIRRORED = _tests(
    "datasets", "dequantised_pixels_fill_their_cells", "every_other_training_image_is_mirrored_left_to_right"
)
NETWORK_TESTS = "tests/test_golden.py tests/test_networks.py"
AVERAGE, BETA, IN_FORCE = _tests(
    "training",
    "the_average_of_the_weights",
    "beta_weighs_the_kl_in_training_only",
    "sigma_in_force_at_step_t_is_the_schedule_at_t",
)
(RATIO,) = _tests("bessel", "three_dimensions_are_in_closed_form")
(SPHERES_STDDEV,) = _tests("theory", "the_spheres_critical_sigma_is_its_first_principal_stddev")
(ENTROPY,) = _tests("toy", "entropy_is_that_of_the_density")
SPHERE_RUN, SPHERE_NONSENSE = _tests("hypersphere", "command", "nonsense_is_refused")
TRAINED_RADIUS = "-m slow tests/test_hypersphere.py::test_trained_radius"
FAKE_IMAGES, ITS_FILES, BESIDE, CRITICAL_NONSENSE = _tests(
    "critical_sigma",
    "fake_images_beside_trained_vaes",
    "finished_run_is_of_its_files",
    "unfit_comparison_is_refused",
    "nonsense_is_refused",
)
WEIGHTS, MOMENTS, NOT_THERE = _tests(
    "generate",
    "toy_samples_by_trained_weights",
    "samples_have_their_means_and_stddevs",
    "unknown_members_are_refused",
)
(LATE,) = _tests("initial", "options_of_the_evaluation_change_without_training")
PRODUCT, EVENLY, LINEAR, CLOSES, OWN_DRAWS = _tests(
    "sigma_range",
    "posterior_is_the_product_of_its_two_parts",
    "draws_cover_the_range_evenly",
    "gates_hold_the_linear_optimum_at_every_sigma",
    "root_gate_closes_without_nan",
    "each_example_is_taken_at_sigmas_of_its_own",
)
TOLD, CURVES, RATES = _tests(
    "conditioned",
    "trained_model_is_told_its_sigma",
    "curves_go_through_the_rows",
    "rates_of_gaussian_data_meet_their_limit",
)
GAIN, DROPPED, DIVIDED, UNUSED, BEST = _tests(
    "second_stage",
    "gain_is_the_change_of_the_elbo",
    "prior_that_is_worse_on_the_held_out_part_is_dropped",
    "steps_are_the_same_however_they_are_divided",
    "unused_dimensions_keep_their_prior",
    "ascent_keeps_its_best_parameters",
)
SCORE, BAD_FLAGS = _tests("quality", "images_are_clipped", "bad_flags")
ITS_OWN = "-m slow tests/test_quality.py::test_samples_come_from_their_member"
LIKELIHOODS, DATASETS, IMAGES, FIGURES = (f"lvae_jax/{n}.py" for n in ("likelihoods", "datasets", "images", "figures"))
GAUSSIANS, EVALUATION, TRAINING = (f"lvae_jax/{name}.py" for name in ("gaussians", "evaluation", "training"))
VAE, PRIORS, TOY, RUNS, NETWORKS = (f"lvae_jax/{n}.py" for n in ("vae", "priors", "toy", "runs", "networks"))
BESSEL, THEORY, CELEBA, DIAGNOSTICS = (f"lvae_jax/{n}.py" for n in ("bessel", "theory", "celeba", "diagnostics"))
CONVOLUTIONS = "lvae_jax/convolutions.py"
SWEEP, LOOP, REPORT, CLAIMS = (f"experiments/{name}.py" for name in ("sigma_sweep", "loop", "report", "claims"))
MEMBERS, VARIANTS = "experiments/sweep.py", "experiments/variants.py"
SPHERE, CRITICAL = "experiments/hypersphere.py", "experiments/critical_sigma.py"
GENERATE, QUALITY, STATISTICS = (f"experiments/{name}.py" for name in ("generate", "quality", "statistics"))
PROGRAMS, INITIAL = "experiments/programs.py", "experiments/initial.py"
REALISM, LATENTS, STAGE = (f"experiments/{name}.py" for name in ("realism", "latents", "second_stage"))
MASKED, TANGENT = "tests/test_masked.py", "tests/test_tangent.py"
LOW_RANK, HEADROOM = "lvae_jax/low_rank.py", "lvae_jax/headroom.py"
RANGE = "lvae_jax/sigma_range.py"

ROWS = "tests/test_digits.py::test_each_row_is_printed_when_it_is_done"

MUTANTS = [
    # The library
    Mutant("kl_without_half", GAUSSIANS, "return 0.5 * (mean**2 +", "return (mean**2 +"),
    Mutant("density_without_half", GAUSSIANS, "-0.5 * standardised**2", "-1.0 * standardised**2"),
    Mutant("sigma_may_grow", LIKELIHOODS, "RANGE = (-7.0, 2.0)", "RANGE = (-7.0, 3.0)"),
    Mutant(
        "edge_of_the_last_bin",
        LIKELIHOODS,
        "jnp.where(last, 0.5 - grid.last, 0.5)",
        "jnp.where(last, 0.0 - grid.last, 0.5)",
        "tests/test_levels.py",
    ),
    Mutant("balance_changes_the_density", LIKELIHOODS, "(extra - jax.lax.stop_gradient(extra))", "extra"),
    Mutant("weights_by_half_the_exponent", LIKELIHOODS, "softmax(2.0 * params", "softmax(params"),
    Mutant("ramp_learns", LIKELIHOODS, 'jax.lax.stop_gradient(params["ramp"]) * dev', 'params["ramp"] * dev'),
    Mutant("logistic_without_twice", "lvae_jax/logistics.py", "return -t - 2.0 * jnp", "return -t - jnp"),
    Mutant("mixture_of_unnormalised_weights", LIKELIHOODS, "jax.nn.log_softmax(logits)", "logits"),
    Mutant(
        "frozen_learns", "lvae_jax/networks.py", "return jax.lax.stop_gradient(network.apply(", "return (network.apply("
    ),
    Mutant("histogram_without_halves", "lvae_jax/evaluation.py", "(seen + 0.5) / (", "(seen + 1.0) / ("),
    Mutant("correlation_is_covariance", THEORY, "scatter /= scales[:, None]", "scatter /= 1.0"),
    Mutant("noise_by_any_generator", "lvae_jax/keys.py", "if str(jax.random.key_impl(keys)) == GENERATOR:", "if True:"),
    Mutant("missing_values_count", LIKELIHOODS, "jnp.where(missing, 0.0, each(", "(each(", MASKED),
    Mutant("error_of_missing_values", VAE, "where=terms.observed", "where=None", MASKED),
    Mutant("old_sigma_in_force", VAE, '{"likelihood": likelihood.init()}', "{}"),
    Mutant("evaluation_forgotten", RUNS, "or asked[name] != defaults[name]", "or True", LATE),
    Mutant(
        "fixed_sigma_learns",
        LIKELIHOODS,
        'given = jax.lax.stop_gradient(params["log_stddev"])',
        'given = params["log_stddev"]',
    ),
    Mutant("optimal_sigma_squared", LIKELIHOODS, "clip(0.5 * jnp.log(mse))", "clip(jnp.log(mse))"),
    Mutant("replayed_late", LIKELIHOODS, "jnp.take(sigmas, step,", "jnp.take(sigmas, step - 1,", SCHEDULES),
    Mutant("order_off_by_one", DATASETS, "first, last = step * batch_size,", "first, last = step * batch_size + 1,"),
    Mutant("one_order_for_ever", DATASETS, "default_rng((seed, epoch))", "default_rng((seed, 0))"),
    Mutant("dequantised_by_255", DATASETS, "/ float(levels)", "/ float(levels - 1)", CELLS),
    Mutant("flipped_upside_down", DATASETS, "examples[:, :, ::-1]", "examples[:, ::-1]", MIRRORED),
    Mutant("crop_off_by_one", CELEBA, "(218 - CROP) // 2", "(218 - CROP) // 2 + 1"),
    Mutant("split_off_by_one", CELEBA, '"test": range(182_638,', '"test": range(182_637,'),
    Mutant("cache_of_any_size", CELEBA, "-bilinear{image_size}", "-bilinear"),
    Mutant("one_key_for_u_and_noise", TOY, "jax.random.normal(noise_key, SHAPE)", "jax.random.normal(u_key, SHAPE)"),
    Mutant("bessel_recurrence", BESSEL, "= dim + 2 * step + k * upper", "= dim + step + k * upper", RATIO),
    Mutant("critical_without_root", THEORY, "return radius / math.sqrt(dim)", "return radius / dim", SPHERES_STDDEV),
    Mutant("entropy_in_bits", TOY, "np.log(np.maximum(mass, 1e-300) /", "np.log2(np.maximum(mass, 1e-300) /", ENTROPY),
    Mutant(
        "no_skip_connection",
        NETWORKS,
        "h = h + _gated(self.gating, residual, condition)\n        return nn.Dense",
        "h = _gated(self.gating, residual, condition)\n        return nn.Dense",
        NETWORK_TESTS,
    ),
    Mutant(
        "kl_averaged",
        PRIORS,
        "return jnp.sum(gaussians.kl",
        "return jnp.mean(gaussians.kl",
        "tests/test_vae.py",
    ),
    Mutant("log_det_twice", LOW_RANK, "log_det + 0.5 * jnp.log1p", "log_det + jnp.log1p"),
    Mutant("projected_once", LOW_RANK, "rest - _times(basis, second), first + second", "rest, first"),
    Mutant("sigma_by_its_own_square", LOW_RANK, "(a**2 - diagonal) * of", "(a**2 - 1.0) * of"),
    Mutant(
        "tangents_from_the_start",
        LIKELIHOODS,
        'stop_gradient(params["tangent_ramp"]) * f',
        "stop_gradient(1.0) * f",
        TANGENT,
    ),
    Mutant("band_turns_twice", "lvae_jax/ribbon.py", "return 0.5 * jnp.pi * (u + 1.0)", "return jnp.pi * (u + 1.0)"),
    Mutant("rest_of_all_directions", HEADROOM, "/ (e.shape[1] - rank)", "/ e.shape[1]"),
    Mutant("filter_sees_its_pixel", HEADROOM, "TAPS = ((0, -1),", "TAPS = ((0, 0),"),
    Mutant("posterior_of_one_sigma", RANGE, "- log_stddev - log_sigma.reshape(-1, 1))", "- log_stddev)", PRODUCT),
    Mutant("not_beyond_the_ends", RANGE, "math.log(self.low / MARGIN)", "math.log(self.low * MARGIN)", EVENLY),
    Mutant("condition_of_sigma", RANGE, "return 2.0 * log_stddev.reshape", "return log_stddev.reshape", LINEAR),
    Mutant("rates_too_high", THEORY, "- best_elbo, axis=1), 0.0)", "+ best_elbo, axis=1), 0.0)", RATES),
    Mutant("padding_turned", CONVOLUTIONS, "((0, 0), *padding, (0, 0))", "((0, 0), *padding[::-1], (0, 0))"),
    Mutant("dilation_forgotten", CONVOLUTIONS, "any(factor != 1 for factor in dilations)", "False"),
    Mutant("kernel_not_flipped", CONVOLUTIONS, "kernel[::-1, ::-1].reshape(", "kernel.reshape("),
    Mutant("pairs_shifted", CONVOLUTIONS, "(p, 1 - p), (s", "(1 - p, p), (s"),
    Mutant("memory_not_kept", "experiments/sizes.py", "in MALLOC_OPTIONS.items():", "in ():", MEMORY),
    Mutant("ratio_inverted", "benchmarks/peers.py", "theirs / our for", "our / theirs for"),
    Mutant("root_without_guard", NETWORKS, "is_open = square > 1e-4", "is_open = square > -9.0", CLOSES),
    Mutant(
        "same_draw_twice", TRAINING, "+ jnp.arange(NUM_DRAWS)[None]", "+ 0 * jnp.arange(NUM_DRAWS)[None]", OWN_DRAWS
    ),
    Mutant(
        "told_the_first_sigma", MEMBERS, "params |= told(config, member.variant,", "told(config, member.variant,", TOLD
    ),
    Mutant(
        "curve_of_one_sigma",
        SWEEP,
        "group, states, sigma, programs.dataset.form)",
        "group, states, high, programs.dataset.form)",
        CURVES,
    ),
    Mutant("volume_sign", PRIORS, "log_volume - jnp.sum(log_scale", "log_volume + jnp.sum(log_scale"),
    Mutant("weights_unnormalised", PRIORS, 'jax.nn.log_softmax(params["log_weight"])', 'params["log_weight"]'),
    Mutant("posterior_without_width", PRIORS, "(between + np.diag(within))[None]", "between[None]"),
    Mutant("one_component_drawn", PRIORS, "jnp.take_along_axis(turned, k[None, :, None], axis=0)[0]", "turned[0]"),
    Mutant("sampled_kl_sign", PRIORS, "return to_standard + (", "return to_standard - ("),
    Mutant("flow_begins_elsewhere", PRIORS, "kernel_init=nn.initializers.zeros", "kernel_init=nn.initializers.ones"),
    Mutant("importance_sign", VAE, "+ log_prior - log_posterior", "+ log_prior + log_posterior"),
    Mutant("one_key_for_z_and_x", VAE, "head.sample(likelihood_key,", "head.sample(prior_key,"),
    Mutant("beta_ignored", TRAINING, "(beta_now * terms.kl", "(terms.kl", BETA),
    Mutant("schedule_late", TRAINING, 'params["likelihood"], step,', 'params["likelihood"], state.step,', IN_FORCE),
    Mutant("average_unused", TRAINING, "self.params if self.ema is None else self.ema", "self.params", AVERAGE),
    Mutant(
        "last_chunk_dropped", EVALUATION, "range(0, size, chunk_size)", "range(0, size - chunk_size + 1, chunk_size)"
    ),
    Mutant("constant_s_sign", EVALUATION, "return elbo + math.prod(shape)", "return elbo - math.prod(shape)"),
    Mutant("nats_for_bits", EVALUATION, "(bound - elbo) / (n * math.log(2.0))", "(bound - elbo) / n"),
    Mutant("active_by_stddev", DIAGNOSTICS, "posterior_mean.var(axis=-1) > 0.01", "posterior_mean.std(axis=-1) > 0.01"),
    Mutant("rewound_too_far", RUNS, 'row["step"] <= step]', 'row["step"] < step]'),
    Mutant("panels_swapped", FIGURES, "*panel.reconstructions.T", "*panel.sample_means.T"),
    Mutant("bound_of_8_bits", EVALUATION, "n * math.log(levels)", "n * math.log(256)", "tests/test_levels.py"),
    Mutant("noise_of_8_bits", LIKELIHOODS, "(_last_level(levels) * math", "(255.0 * math", "tests/test_levels.py"),
    Mutant("split_not_stratified", IMAGES, "np.arange(np.sum(labels == label))", "0", "tests/test_digits.py"),
    # The experiments, by tests of their parts
    Mutant("sd_of_the_population", STATISTICS, "np.std(values, ddof=1)", "np.std(values)"),
    Mutant("gap_s_sign", REPORT, "test_log_prob - row.elbo", "row.elbo - test_log_prob"),
    Mutant("bonferroni_for_holm", STATISTICS, "np.arange(len(values), 0, -1)", "np.full(len(values), len(values))"),
    Mutant("threshold_inverted", CLAIMS, 'noise["lv"] < 0.05,', 'noise["lv"] > 0.05,'),
    Mutant("not_in_grey_levels", CLAIMS, "highest * math.sqrt(np.mean(", "math.sqrt(np.mean("),
    Mutant("seeds_not_paired", CLAIMS, "sorted(chosen, key=lambda member: member.seed)", "chosen"),
    Mutant("precision_and_recall_swapped", REALISM, "recall(real, theirs,", "recall(theirs, real,", SCORE),
    Mutant("row_of_the_first_variant", SWEEP, "report.line(title, rows[-1])", "report.line(title, rows[0])", ROWS),
    # Flags that are not checked
    Mutant("any_sigma", MEMBERS, "1e-15 < value", "0.0 < value", f"{BAD_FLAG}[--sigma=1e-300]"),
    Mutant("any_warmup", SWEEP, "warmup_steps < config", "warmup_steps <= config", f"{BAD_FLAG}[--warmup_steps=3000]"),
    Mutant("sigma_of_other_seeds", SWEEP, '"seed", "num_seeds"]', '"num_seeds"]', BAD_SIGMA),
    Mutant("sphere_in_one_dimension", SPHERE, "at_least(2)", "at_least(1)", SPHERE_NONSENSE),
    Mutant("a_sigma_twice", "experiments/options.py", "or len(set(value)) < len(value))", ")"),
    Mutant("critical_sigma_of_zero", CRITICAL, "1e-6 <= value", "0.0 <= value", CRITICAL_NONSENSE),
    Mutant("beside_probabilities", CRITICAL, "(POINTS, Kind.DENSITY)", "(POINTS, *Kind)", BESIDE),
    Mutant("no_samples", GENERATE, "if num_samples < 1:", "if num_samples < 0:", NOT_THERE),
    Mutant("no_classifier_steps", QUALITY, "if classifier_steps < 1:", "if classifier_steps < 0:", BAD_FLAGS),
    # The experiments, from end to end
    Mutant("wrong_split", PROGRAMS, "score_chunk, self.dataset.test[", "score_chunk, self.dataset.train[", IMAGE_RUN),
    Mutant("not_rewound", LOOP, "group.name, step)", "group.name, num_steps)", IMAGE_RUN),
    Mutant("saved_at_another_step", LOOP, "save(step, (kept, record))", "save(step - 1, (kept, record))", KEPT),
    Mutant("data_from_the_start_again", LOOP, "range(step, num_steps, fused)", "range(0, num_steps, fused)", IMAGE_RUN),
    Mutant("first_step_skipped", LOOP, "int(states.step[0]),", "int(states.step[0]) + 1,", SPHERE_RUN),
    Mutant("record_shifted", LOOP, ": step] = columns", " + 1 : step + 1] = columns", FOLLOWS),
    Mutant("seeds_of_others", MEMBERS, "np.tile(seeds,", "np.repeat(seeds,", COMPARES),
    Mutant("f_star_at_the_start", VARIANTS, "return record[:, -1]", "return record[:, 0]", FOLLOWS),
    Mutant("annealed_slowly", MEMBERS, "return max(1, config.num_steps // 2)", "return config.num_steps", FOLLOWS),
    Mutant("lv_star_from_its_own_start", MEMBERS, "begin if trained is not None else None", "None", RELATIVES),
    Mutant("kl_not_warmed_up", SWEEP, "warmup if VARIANTS[variant].warmup else config", "config", WARMED),
    Mutant("best_sigma_squared", SWEEP, 'np.sqrt(columns["mse"])', 'columns["mse"]', COMPARES),
    Mutant("model_gap_s_sign", SWEEP, "- evidence, axis=-1)", "+ evidence, axis=-1)", EVIDENCE),
    Mutant(
        "images_without_floor",
        VARIANTS,
        "    if levels is not None:\n",
        "    if False:\n",
        IMAGE_RUN,
    ),
    Mutant("sigma_in_another_unit", SPHERE, "np.array(config.sigma) * critical", "np.array(config.sigma)", SPHERE_RUN),
    Mutant("radius_of_noise", SPHERE, "x in (pictures.sample_means,", "x in (pictures.samples,", TRAINED_RADIUS),
    Mutant("last_images_dropped", CRITICAL, "(0, size, CHUNK,", "(0, size - CHUNK + 1, CHUNK,", FAKE_IMAGES),
    Mutant("run_of_any_files", CRITICAL, "config = config._replace(celeba", "config._replace(celeba", ITS_FILES),
    Mutant("first_weights_for_all", INITIAL, "leaf[m.member]", "leaf[0]"),
    Mutant("learned_sigma_anew", INITIAL, "if name not in SCHEDULED", "if name in SCHEDULED"),
    Mutant(
        "first_member_for_all",
        MEMBERS,
        "lambda leaf: leaf[member.member], weights",
        "lambda leaf: leaf[0], weights",
        WEIGHTS,
    ),
    Mutant("means_for_samples", GENERATE, 'arrays = {"samples": samples,', 'arrays = {"samples": means,', MOMENTS),
    Mutant("gain_of_training", STAGE, "jax.jit(vae.prior.kl)", "jax.jit(STANDARD_NORMAL.kl)", GAIN),
    Mutant("last_not_best", LATENTS, "jnp.where(better, new, old)", "jnp.where(True, new, old)", BEST),
    Mutant("always_fitted", LATENTS, "if gain > max(best, 2.0 * error):", "if gain > -1e9:", DROPPED),
    Mutant(
        "steps_again", LATENTS, "jax.random.fold_in(key, index))", "jax.random.fold_in(key, index - first))", DIVIDED
    ),
    Mutant("all_dimensions", LATENTS, "codes.kl() > IN_USE", "codes.kl() > -1.0", UNUSED),
    Mutant("chunks_alike", REALISM, "fold_in(key, chunk)", "fold_in(key, 0)", ITS_OWN),
]


class Result(NamedTuple):
    """What pytest found. code: its exit code, None beyond the time limit; failed: the first test that failed, if one
    did; output: all that it printed."""

    code: int | None
    failed: str
    output: str
    seconds: float

    @property
    def verdict(self) -> str:
        if self.code == 0:
            return "SURVIVED"
        if self.code == 1 and self.failed:
            return f"killed by {self.failed}"
        return "NO ANSWER: " + ("beyond the time limit" if self.code is None else f"pytest ends with {self.code}")


def broken(mutant: Mutant) -> str:
    """The mutant's file with its fault.

    Raises:
      SystemExit: the fragment is not there, or not once.
    """
    text = (ROOT / mutant.file).read_text()
    count = text.count(mutant.old)
    if count != 1:
        sys.exit(f"{mutant.name}: {mutant.old!r} occurs {count} times in {mutant.file}, and has to occur once")
    return text.replace(mutant.old, mutant.new)


def copy_checkout(folder: Path) -> None:
    """Copies the files that git tracks, as they are now, and new ones that it does not ignore."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():  # not one that was deleted
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def environment(folder: Path) -> dict[str, str]:
    """In which Python imports the copy, wherever the package is installed from."""
    return os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}


running: set[subprocess.Popen[str]] = set()


def end(process: subprocess.Popen[str]) -> None:
    """Ends pytest, and the commands that its tests have started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def run_tests(arguments: str, mutant: Mutant | None = None) -> Result:
    """Runs these tests in a copy of the checkout, which has the mutant's fault."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutant-") as temporary:
        folder = Path(temporary, "checkout")
        copy_checkout(folder)
        if mutant is not None:
            (folder / mutant.file).write_text(broken(mutant))
        options = ["-x", "-q", "-n", "0", "-p", "no:cacheprovider", f"--basetemp={temporary}/pytest"]
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", *options, *arguments.split()],
            cwd=folder,
            env=environment(folder),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        running.add(process)
        try:
            output, _ = process.communicate(timeout=TIME_LIMIT)
            code: int | None = process.returncode
        except subprocess.TimeoutExpired:
            end(process)
            output, _ = process.communicate()
            code = None
        running.remove(process)
    failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - |$)", output, re.MULTILINE)
    return Result(code, failed[1] if failed else "", output, time.monotonic() - began)


def imported_from() -> str:
    """Where the library is imported from in a copy."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as temporary:
        folder = Path(temporary)
        copy_checkout(folder)
        words = [sys.executable, "-c", "import lvae_jax; print(lvae_jax.__file__)"]
        where = subprocess.check_output(words, cwd=folder, env=environment(folder), text=True).strip()
        if not Path(where).is_relative_to(folder):
            sys.exit(f"the tests of a copy import {where}, and would see no fault")
    return where


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", default="", help="of the mutants, separated by commas (default: all)")
    parser.add_argument("--processes", type=int, default=2, help="mutants that are tested at once")
    parser.add_argument("--record", type=Path, help="a file that gets the same lines")
    arguments = parser.parse_args()
    names = list(filter(None, arguments.names.split(",")))
    unknown = set(names) - {mutant.name for mutant in MUTANTS}
    if unknown:
        parser.error(f"no mutant is called {', '.join(sorted(unknown))}")
    chosen = [mutant for mutant in MUTANTS if not names or mutant.name in names]
    for mutant in chosen:
        broken(mutant)
    lines: list[str] = []

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)
        if arguments.record:
            arguments.record.write_text("\n".join(lines) + "\n")

    say(f"imported: {imported_from()}")
    by_file: dict[str, dict[str, None]] = {}  # whose tests share what they train
    for mutant in chosen:
        by_file.setdefault(mutant.arguments.partition("::")[0], {})[mutant.arguments] = None
    needed = [" ".join(of_file) for of_file in by_file.values()]
    results: list[Result] = []
    with ThreadPoolExecutor(arguments.processes) as pool:
        try:
            for tests, result in zip(needed, pool.map(run_tests, needed), strict=True):
                if result.code != 0:
                    sys.exit(f"{result.output}\nwithout any fault, {tests} does not pass: {result.verdict}")
            say("without any fault, all of these tests pass")
            found = pool.map(run_tests, [mutant.arguments for mutant in chosen], chosen)
            for mutant, result in zip(chosen, found, strict=True):
                say(f"{mutant.name:36}{result.verdict} ({result.seconds:.0f} s)")
                results.append(result)
        except BaseException:  # an interruption, too
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(running):
                end(process)
            raise
    killed = sum(result.verdict.startswith("killed") for result in results)
    say(f"{killed} of {len(chosen)} mutants killed, {sum(result.code == 0 for result in results)} survived")
    if killed < len(chosen):
        sys.exit(1)


if __name__ == "__main__":
    main()
