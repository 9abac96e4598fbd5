"""The main job, end to end: interrupted and resumed, and given nonsense."""

import collections
import errno
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import PIL.Image
import pytest
from absl import flags
from conftest import call, filled, interruption, run_command

from experiments import command, domains, hosts, loop, options, programs, report, results, sigma_sweep, sweep
from experiments.programs import Group, Programs
from experiments.results import Row, Summary
from experiments.variants import FOLLOWERS
from lvae_jax import datasets, evaluation, likelihoods, networks, runs, toy, training
from lvae_jax import vae as vae_lib

ROOT = Path(__file__).parents[1]
SWEEP = "experiments.sigma_sweep"
ALL = ("f", "ls", "lv", "optimal", "f_star", "replay", "geometric", "kl_warmup")
SMALL = sigma_sweep.Config(num_steps=5, num_seeds=1, batch_size=10, widths=(8,), num_blocks=1)
NUMBERS = ("sigma", "num_seeds", "elbo", "elbo_sd", "elbo_paper", "log_likelihood", "kl", "mse")

pytestmark = pytest.mark.usefixtures("plain_sweep")


def run_sweep(config, run_dir, **options):
    return sigma_sweep.run(config, run_dir=str(run_dir), echo=lambda line: None, **options)


def summary_of(run):
    return sweep.read_run(run.path)[1]


def config_of(run):
    return sweep.read_run(run.path)[0]


def test_command_compares_all_variants(toy_run):
    summary = summary_of(toy_run)
    rows, members = summary.rows, summary.members
    assert [row.variant for row in rows] == ["f", *ALL]
    assert [row.sigma for row in rows[:2]] == [1.0, 0.1]
    assert [(m.sigma, m.seed) for m in members[:4]] == [(1.0, 3), (1.0, 4), (0.1, 3), (0.1, 4)]
    for row in rows:
        assert all(np.isfinite(getattr(row, name)) for name in NUMBERS)
        assert row.num_seeds == 2
        assert row.elbo == pytest.approx(row.log_likelihood - row.kl, abs=1e-4)
        assert row.elbo_paper == pytest.approx(row.elbo + np.log(2 * np.pi), abs=1e-6)  # n = 2
        assert row.kl > 0
        assert f"{row.elbo:.4f}" in toy_run.stdout
    for member in members:
        assert member.best_sigma == pytest.approx(np.sqrt(member.mse), rel=1e-6)
    assert re.search(r"100%.*step/s, ELBO -?[\d.]+ nats", toy_run.stderr), "the progress bar"
    for name in ("samples", "losses", "sigma", "elbo"):
        assert (toy_run.path / "figures" / f"{name}.png").stat().st_size > 10_000
    lines = runs.read_metrics(toy_run.path)
    assert len(lines) == (2 + 7) * 2 * 40
    assert {*evaluation.Scores._fields, "gradient_norm", "seed", "step"} <= set(lines[0])


def test_followers_take_sigma_from_their_seed(toy_run):
    members = summary_of(toy_run).members
    record = np.load(toy_run.path / "ls_sigma.npy")
    assert record.shape == (2, 41)
    assert np.isfinite(record).all()
    assert (record[:, 0] == 1.0).all()
    following = [variant for variant in FOLLOWERS if variant in ALL]
    final = {variant: [m.sigma for m in members if m.variant == variant] for variant in ("ls", *following)}
    np.testing.assert_allclose(final["ls"], record[:, -1], rtol=1e-6)
    for variant in following:
        np.testing.assert_allclose(final[variant], final["ls"], rtol=1e-6)
    assert final["ls"][0] != final["ls"][1]
    lines = runs.read_metrics(toy_run.path)
    learned, replayed = ([line["sigma_max"] for line in lines if line["group"] == group] for group in ("ls", "replay"))
    np.testing.assert_allclose(replayed, learned, rtol=1e-5)
    annealed = np.array([line["sigma_max"] for line in lines if line["group"] == "geometric" and line["member"] == 1])
    half_way = np.minimum(np.arange(40) / 20.0, 1.0)
    np.testing.assert_allclose(annealed, record[1, -1] ** half_way, rtol=1e-5)


def test_kl_warmup(toy_run):
    lines = runs.read_metrics(toy_run.path)
    warmed, constant = ([line for line in lines if line["group"] == group] for group in ("kl_warmup", "f_star"))
    assert warmed[0] == constant[0] | {"group": "kl_warmup", "gradient_norm": warmed[0]["gradient_norm"]}, "one start"
    assert np.mean([line["kl"] for line in warmed]) > 1.05 * np.mean([line["kl"] for line in constant])
    for line in warmed:
        assert line["elbo"] == pytest.approx(line["log_likelihood"] - line["kl"], abs=1e-4)


def test_toy_measures(toy_run):
    test = jnp.asarray(datasets.load("toy").test)
    x, bare = test[:1000], toy.curve(toy.nearest(test[:1000]))
    copied, denoised = (domains.toy_measures(*map(np.asarray, (r, test, x, test))) for r in (x, bare))
    assert copied.noise_kept == pytest.approx(1.0, abs=1e-6)
    assert denoised.noise_kept == pytest.approx(0.0, abs=1e-3)
    noise = np.sqrt(np.mean(np.sum((np.asarray(x) - np.asarray(bare)) ** 2, axis=-1)))
    assert copied.curve_distance == pytest.approx(noise, rel=1e-4)
    assert denoised.curve_distance < 1e-5
    assert copied.sliced_wasserstein == 0.0
    np.testing.assert_allclose(copied.band_widths, toy.NOISE, rtol=0.05)
    summary = summary_of(toy_run)
    assert summary.true_measures.sliced_wasserstein > 0.0, "of other points"
    assert summary.true_measures.to_json().keys() <= summary.members[0].to_json().keys()


def test_evidence_and_importance_bound(tmp_path):
    """The two gaps add up to that from the ELBO to the toy's density, and the bound lies between ELBO and evidence."""
    config = SMALL._replace(variants=("ls",), latent_size=1, evidence=True, num_importance_samples=16)
    (member,) = run_sweep(config, tmp_path).members
    x = datasets.load("toy").test
    of_density = np.float64(toy.log_prob(jnp.asarray(x[: sigma_sweep.NUM_EVIDENCE_EXAMPLES])))
    gap = of_density.mean() - member.elbo
    assert member.model_gap + member.posterior_gap == pytest.approx(gap, abs=5.0 * of_density.std() / 1000**0.5)
    assert member.model_gap > 0.0
    assert member.posterior_gap > 0.01
    assert member.elbo + 0.001 < member.importance_bound < member.elbo + member.posterior_gap + 0.1
    assert member.evidence_error < 1e-3


def test_finished_run_is_only_reported(toy_run, tmp_path, monkeypatch, capsys):
    run_dir = shutil.copytree(toy_run.path, tmp_path / "run")
    before = {file: file.stat().st_mtime_ns for file in run_dir.rglob("*")}
    monkeypatch.delattr(sigma_sweep, "train_all")
    call(sigma_sweep, [*toy_run.flags, f"--run_dir={run_dir}"])
    first, *table = capsys.readouterr().out.splitlines()
    assert first.endswith("is finished")
    assert "\n".join(table) in toy_run.stdout, "the same table"
    assert {file: file.stat().st_mtime_ns for file in run_dir.rglob("*")} == before


def test_directory_of_other_flags_is_refused(toy_run):
    before = {file: file.stat().st_mtime_ns for file in toy_run.path.rglob("*")}
    with pytest.raises(runs.RunError, match="other flags") as error:
        run_sweep(config_of(toy_run)._replace(sigma=(0.5,)), toy_run.path)
    assert "\n" not in str(error.value)
    assert {file: file.stat().st_mtime_ns for file in toy_run.path.rglob("*")} == before


def test_run_that_another_process_writes_is_refused(tmp_path, monkeypatch):
    """Before its data are loaded; and one that the other has just finished is reported."""
    monkeypatch.setattr(sigma_sweep, "train_all", lambda *arguments: pytest.fail("it trains"))
    monkeypatch.setattr(report, "table", lambda summary, **options: "")
    with monkeypatch.context() as patch, runs.lock(tmp_path):
        patch.delattr(datasets, "load")
        with pytest.raises(runs.RunError, match="another process writes in"):
            run_sweep(SMALL, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [runs.LOCK]
    theirs = filled(Summary, kind="points", rows=[filled(Row)])

    def load_slowly(*arguments, **options):
        runs.make_run(tmp_path, SMALL._asdict())
        runs.write_json(tmp_path / "summary.json", theirs.to_json())
        return datasets.toy_stream()

    monkeypatch.setattr(datasets, "load", load_slowly)
    assert run_sweep(SMALL, tmp_path) == theirs


def test_sigma_from_another_run(toy_run, tmp_path):
    config = config_of(toy_run)._replace(variants=("f_star", "replay"), sigma_from=str(toy_run.path))
    there = run_sweep(config, tmp_path / "run").members
    here = [member for member in summary_of(toy_run).members if member.variant in ("f_star", "replay")]
    assert there == here, "the same seeds, the same numbers"
    copy = shutil.copytree(toy_run.path, tmp_path / "copy")
    assert run_sweep(config._replace(sigma_from=f"{copy}/./"), tmp_path / "run").members == there, "wherever it lies"
    sigma_sweep.keep_record(copy, np.load(copy / "ls_sigma.npy") + 1.0)
    with pytest.raises(runs.RunError, match="sigma_from was"):
        run_sweep(config._replace(sigma_from=str(copy)), tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 5}, "--seed=3"),
        ({"num_seeds": 1}, "--num_seeds=2"),
        ({"num_steps": 41}, "--num_steps=40"),
        ({"sigma_from": "nowhere"}, "no finished run"),
    ],
)
def test_sigma_that_does_not_fit_is_refused(toy_run, tmp_path, change, message):
    config = config_of(toy_run)._replace(variants=("replay",), sigma_from=str(toy_run.path))._replace(**change)
    with pytest.raises(command.UsageError, match=message):
        run_sweep(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_damaged_copy_of_sigma(toy_run, tmp_path):
    config = config_of(toy_run)._replace(variants=("f_star",), sigma_from=str(toy_run.path))
    runs.make_run(tmp_path, config._asdict())
    copy = tmp_path / "ls_sigma.npy"
    for content in (b"", b"\x93NUMPY"):
        copy.write_bytes(content)
        with pytest.raises(command.UsageError, match=r"ls_sigma\.npy is damaged: delete it"):
            run_sweep(config, tmp_path)
    record = np.load(toy_run.path / "ls_sigma.npy")
    for other in (record[0], record[:1], record[:, :1], record.astype(str), -record, record * np.nan, np.float64(1.0)):
        np.save(copy, other)
        with pytest.raises(command.UsageError, match=r"ls_sigma\.npy is damaged: delete it"):
            sigma_sweep.imported_record(config, tmp_path)
    np.save(copy, record[:, :-1])
    with pytest.raises(command.UsageError, match="is damaged"):
        sigma_sweep.imported_record(config._replace(variants=("replay",)), tmp_path)
    copy.unlink()
    np.testing.assert_array_equal(sigma_sweep.imported_record(config, tmp_path), record)
    sigma_sweep.keep_record(tmp_path, 2.0 * record)
    np.testing.assert_array_equal(sigma_sweep.imported_record(config, tmp_path), 2.0 * record)


def test_killed_run_resumes_to_the_same_bits(toy_run, tmp_path):
    """Those of the run that was never killed."""
    config, run_dir = config_of(toy_run)._replace(variants=("f", "ls")), tmp_path / "run"
    code = (
        "from experiments import loop, sigma_sweep; "
        f"sigma_sweep.run(sigma_sweep.{config!r}, run_dir={str(run_dir)!r}, pace=loop.Pace(checkpoint_seconds=0.0))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while process.poll() is None and len(runs.read_metrics(run_dir)) < 4 * 40 + 2 * 15:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it must be killed in the middle of the LS runs"
    resumed_from = [child.name for child in (run_dir / "checkpoints" / "ls").iterdir() if child.name.isdigit()]
    assert resumed_from
    assert 0 < max(map(int, resumed_from)) < 40
    assert not (run_dir / "summary.json").exists()

    resumed = run_sweep(config, run_dir)
    assert resumed.members == [m for m in summary_of(toy_run).members if m.variant in config.variants]
    lines = [line for line in runs.read_metrics(toy_run.path) if line["group"] in config.variants]
    assert runs.read_metrics(run_dir) == lines
    np.testing.assert_array_equal(*(np.load(path / "ls_sigma.npy") for path in (run_dir, toy_run.path)))


@pytest.mark.slow
def test_signal_waits_for_a_checkpoint(tmp_path, monkeypatch):
    """At the end of a step, be it between two lines of metrics; the same bits follow."""
    config = SMALL._replace(variants=("ls",), num_steps=200)  # a line for every 2 steps
    whole = run_sweep(config, tmp_path / "whole")
    feed = loop.feed

    def signalling(*arguments, **options):
        for step, batch in enumerate(feed(*arguments, **options)):
            if step == 6:
                signal.raise_signal(signal.SIGINT)
            yield batch

    monkeypatch.setattr(loop, "feed", signalling)
    for seconds, kept in ((loop.PACE.checkpoint_seconds, "7"), (0.0, "14")):
        pace = loop.Pace(checkpoint_seconds=seconds, fuse=False)
        with pytest.raises(KeyboardInterrupt):
            run_sweep(config, tmp_path / "run", pace=pace)
        assert [child.name for child in (tmp_path / "run/checkpoints/ls").iterdir() if child.name.isdigit()] == [kept]
    monkeypatch.setattr(loop, "feed", feed)
    assert run_sweep(config, tmp_path / "run").members == whole.members
    assert runs.read_metrics(tmp_path / "run") == runs.read_metrics(tmp_path / "whole")
    np.testing.assert_array_equal(*(np.load(tmp_path / name / "ls_sigma.npy") for name in ("run", "whole")))


def test_damaged_checkpoint_stops_the_run_and_is_kept(toy_run, tmp_path):
    run_dir = shutil.copytree(toy_run.path, tmp_path / "run")
    (run_dir / "summary.json").unlink()
    shards = [file for file in (run_dir / "checkpoints").rglob("*") if file.is_file() and file.stat().st_size > 1000]
    assert shards
    for file in shards:
        os.truncate(file, file.stat().st_size // 2)
    before = {file: file.stat().st_size for file in shards}
    result = run_command(SWEEP, *toy_run.flags, f"--run_dir={run_dir}")
    assert result.returncode != 0
    assert "damaged, or of another shape or version: delete" in result.stderr
    assert len(result.stderr.splitlines()) == 1, "before any work, the progress bar included"
    assert {file: file.stat().st_size for file in shards} == before


@pytest.mark.parametrize(
    ("rate", "num_steps", "message"), [(1e30, 5, "diverged before"), (float("inf"), 1, "diverged in its last steps")]
)
def test_divergence_is_an_error(tmp_path, monkeypatch, rate, num_steps, message):
    monkeypatch.setattr(programs.training, "optimizer", lambda num_steps, **schedule: optax.sgd(rate))
    with pytest.raises(runs.RunError, match=message):
        run_sweep(SMALL._replace(variants=("f",), num_steps=num_steps), tmp_path)
    assert not (tmp_path / "summary.json").exists()


def test_overflowing_gradient_is_an_error(tmp_path):
    with pytest.raises(runs.RunError, match="diverged"):
        run_sweep(SMALL._replace(variants=("f",), sigma=(1e-12,)), tmp_path)


def test_non_finite_result_is_an_error_in_one_line(tmp_path, monkeypatch):
    def bound(*args, **options):
        return np.full((1, 4), np.nan)

    monkeypatch.setattr(Programs, "importance_bound", bound)
    config = SMALL._replace(variants=("f",), num_seeds=1, num_importance_samples=2)
    with pytest.raises(runs.RunError, match="importance_bound of f is not finite: its checkpoints are kept"):
        run_sweep(config, tmp_path)
    assert not (tmp_path / "summary.json").exists()


@pytest.mark.slow
def test_fused_steps_train_and_resume_alike(tmp_path, monkeypatch):
    """Several steps in one call, as is the default where steps are short: here 2 of every 4."""
    config = SMALL._replace(variants=("ls",), num_steps=402)
    feed, numbers = loop.feed, []

    def counting(group, dataset, layout, firsts, num_fused, *rest, **options):
        numbers.append(num_fused)
        return feed(group, dataset, layout, firsts, num_fused, *rest, **options)

    monkeypatch.setattr(loop, "feed", counting)
    single = run_sweep(config, tmp_path / "single", pace=loop.Pace(fuse=False)).members[0]
    fused = run_sweep(config, tmp_path / "fused").members[0]
    assert numbers == [1, 2]
    assert fused.elbo == pytest.approx(single.elbo, abs=0.1)
    with interruption(group="ls", after=40):
        run_sweep(config, tmp_path / "resumed", pace=loop.Pace(checkpoint_seconds=0.0))
    assert run_sweep(config, tmp_path / "resumed").members[0] == fused
    assert runs.read_metrics(tmp_path / "resumed") == runs.read_metrics(tmp_path / "fused")


def test_options_of_training_reach_the_result(tmp_path, monkeypatch):
    """Those of the optimiser reach it; each of the others changes what is trained or evaluated."""
    optimisers, make = [], training.optimizer

    def optimizer(num_steps, **schedule):
        optimisers.append({"num_steps": num_steps} | schedule)
        return make(num_steps, **schedule)

    monkeypatch.setattr(programs.training, "optimizer", optimizer)
    options = {"learning_rate": 1e-2, "decay": False, "sigma_rate": 1.0, "clip_norm": 1e-2, "warmup_steps": 3}
    plain = SMALL._replace(variants=("ls",), **options)
    changes = [{}, {"ema_decay": 0.9}, {"bfloat16": True}, {"num_blocks": 2}]
    elbos = [run_sweep(plain._replace(**change), tmp_path / str(i)).rows[0].elbo for i, change in enumerate(changes)]
    assert len(set(elbos)) == len(changes)
    assert optimisers == len(changes) * [{"num_steps": 5} | options]


def test_finished_checkpoint_holds_only_weights(toy_run, tmp_path, monkeypatch):
    config = config_of(toy_run)
    weights = jax.eval_shape(
        functools.partial(vae_lib.init, vae=sweep.model(config, "ls", datasets.Form((2,)))(1.0)), jax.random.key(0)
    )
    floats = config.num_seeds * sum(leaf.size for leaf in jax.tree.leaves(weights))
    stored = sum(file.stat().st_size for file in (toy_run.path / "checkpoints" / "ls").rglob("*") if file.is_file())
    assert stored < 1.5 * 4 * floats + 20_000, "without Adam's moments; the rest describes it"
    run_dir = shutil.copytree(toy_run.path, tmp_path / "run")
    (run_dir / "summary.json").unlink()
    runs.write_json(run_dir / "flags.json", config._replace(variants=("f", "ls"))._asdict())
    monkeypatch.setattr(training, "members_steps", lambda *args, **options: pytest.fail("it trains"))
    again = run_sweep(config._replace(variants=("f", "ls")), run_dir).members
    assert again == [member for member in summary_of(toy_run).members if member.variant in ("f", "ls")]


def on_images(monkeypatch, train, test, **values):
    """The config of a small sweep of these images, which it finds as its data set."""
    monkeypatch.setattr(datasets, "check", lambda name, **options: None)
    monkeypatch.setattr(datasets, "load", lambda name, **options: datasets.image_dataset(train, test))
    small = {"dataset": "fake", "batch_size": 8, "latent_size": 2, "widths": (4,), "num_blocks": 1}
    return sigma_sweep.configure(**small | values)


NOISE = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), dtype=np.uint8)


def test_image_run(tmp_path, monkeypatch):
    """Trained on the train split, scored on the test split; member by member, interrupted and resumed."""
    black = np.random.default_rng(0).integers(0, 30, (30, 8, 8, 1), dtype=np.uint8)  # and each of them another black
    white = np.full((23, 8, 8, 1), 255, np.uint8)
    options = {"variants": ("f", "lv"), "sigma": (0.5,), "num_seeds": 2, "num_steps": 20, "widths": (16,)}
    config = on_images(monkeypatch, black, white, discretise=False, **options)
    whole = run_sweep(config, tmp_path / "whole")
    assert whole.num_test_examples == 23
    assert [member.group for member in whole.members] == ["f-0", "f-1", "lv-0", "lv-1"]
    for member in whole.members:
        assert member.mse == pytest.approx(1.0, abs=0.2), "white test images, black reconstructions"
    assert sweep.model(config, "ls", datasets.Form((8, 8, 1), 256))(1.0).likelihood.floor == pytest.approx(
        1 / (255 * 12**0.5)
    )
    trained = [line["mse"] for line in runs.read_metrics(tmp_path / "whole") if line["step"] == 20]
    assert max(trained) < 0.1

    append = runs.append_metrics

    # In the middle; while log sigma gets its deviations; and while the balance of gradients falls.
    stops = [("f-1", 15), ("lv-0", 8), ("lv-1", 19)]

    def interrupted(run_dir, lines):
        append(run_dir, lines)
        if (lines[0]["group"], lines[0]["step"]) in stops:
            stops.remove((lines[0]["group"], lines[0]["step"]))
            raise KeyboardInterrupt  # before the checkpoint: these metrics are written once more

    monkeypatch.setattr(runs, "append_metrics", interrupted)
    while stops:
        with pytest.raises(KeyboardInterrupt):
            run_sweep(config, tmp_path / "resumed", pace=loop.Pace(checkpoint_seconds=0.0))
    monkeypatch.setattr(runs, "append_metrics", append)
    assert run_sweep(config, tmp_path / "resumed").members == whole.members
    assert runs.read_metrics(tmp_path / "resumed") == runs.read_metrics(tmp_path / "whole")


def test_relatives_of_the_learned_vector(tmp_path, monkeypatch):
    """On images, by densities. LV* has the LS-VAE's encoder and mean, seed by seed."""
    options = {"variants": ("ls", "learned_map", "lv_star", "logistic", "mixture"), "num_components": 2}
    options |= {"num_seeds": 2, "num_steps": 4, "num_importance_samples": 2}
    config = on_images(monkeypatch, NOISE, NOISE[:15], discretise=False, **options)
    summary = run_sweep(config, tmp_path / "run")
    members = {(member.variant, member.seed): member for member in summary.members}
    params = {
        key: sweep.restore(tmp_path / "run", config, f"{key[0]}-{key[1]}", key[0], datasets.Form((8, 8, 1), 256))
        for key in members
    }
    for seed in (0, 1):
        ls, star = params["ls", seed], params["lv_star", seed]
        jax.tree.map(np.testing.assert_array_equal, star["encoder"], ls["encoder"])
        jax.tree.map(np.testing.assert_array_equal, star["decoder"]["first"], ls["decoder"])
        for name in ("kl", "mse"):
            star_s, ls_s = (getattr(members[variant, seed], name) for variant in ("lv_star", "ls"))
            assert star_s == pytest.approx(ls_s, rel=1e-6)
        assert members["lv_star", seed].elbo != members["ls", seed].elbo
    assert params["learned_map", 0]["likelihood"]["log_stddev"].shape == (1, 8, 8, 1)
    for member in members.values():
        assert -20.0 * 64 < member.code_elbo < 0.0, "a log probability of 64 pixels"
        assert member.code_importance_bound > member.code_elbo - 1.0
    nats = members["ls", 0].code_elbo + members["ls", 1].code_elbo
    assert summary.rows[0].bits_per_dimension == pytest.approx(-0.5 * nats / 64 / np.log(2.0))
    assert list(summary.histograms) == ["histogram of each pixel", "histogram of all pixels"]
    assert all(6.0 < bits < 8.5 for bits in summary.histograms.values()), "of noise"


def test_probabilities_of_a_model_trained_on_them_are_its_elbo(tmp_path, monkeypatch):
    options = {"variants": ("lv",), "num_seeds": 1, "num_steps": 2}
    summary = run_sweep(on_images(monkeypatch, NOISE, NOISE[:15], **options), tmp_path / "run")
    assert summary.kind == "discretised", "the default on images"
    (member,) = summary.members
    assert member.code_elbo == pytest.approx(member.elbo, rel=1e-6)


def test_values_that_a_notebook_gives():
    config = sigma_sweep.configure(sigma=np.array([0.1, 1.0]), widths=8, variants="ls", num_steps=np.int64(7))
    assert config == sigma_sweep.configure(sigma=(0.1, 1.0), widths=(8,), variants=("ls",), num_steps=7)
    json.dumps(config._asdict())
    assert sigma_sweep.configure(sigma=0.1).sigma == (0.1,)


def test_command_runs_twice_in_one_process(monkeypatch, capsys):
    """As a notebook's %run does; and signals and flags are as before."""
    handlers, names = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)], set(flags.FLAGS)
    for words in (["--seed=-1", "--run_dir=x"], ["--seed=-1"]):
        monkeypatch.setattr(sys, "argv", ["sigma_sweep", *words])
        sigma_sweep.define_flags()
        with pytest.raises(SystemExit, match="--seed=-1: must be from 0"):
            command.start("sigma_sweep", sigma_sweep.main)
        assert flags.FLAGS["run_dir"].value is None
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert names <= set(flags.FLAGS)
    assert "seed" not in flags.FLAGS


def test_defaults_of_each_kind_of_data():
    assert sigma_sweep.configure(dataset="mnist").discretise
    assert not sigma_sweep.configure(dataset="mnist", dequantize=True).discretise
    assert not sigma_sweep.configure(dataset="mnist", discretise=False).discretise
    assert not sigma_sweep.configure().discretise
    densities = [sigma_sweep.configure(), sigma_sweep.configure(dataset="mnist", discretise=False)]
    densities.append(sigma_sweep.configure(dataset="digits", dequantize=True))
    assert {(config.gain, config.balance, config.warm_start) for config in densities} == {(1.0, 0.7, 0.4)}
    codes = sigma_sweep.configure(dataset="mnist")
    assert (codes.gain, codes.balance, codes.warm_start) == (1.0, 0.0, 0.2)
    assert sigma_sweep.configure(dataset="mnist", warm_start=0.0).warm_start == 0.0
    old = sigma_sweep.Config()  # what the flags of an old run do not tell
    assert (old.gain, old.balance, old.warm_start, old.discretise) == (0.03, 0.0, 0.0, False)


def test_command_on_fake_celeba(tmp_path):
    words = ["--dataset=celeb_a", "--fake_data", "--image_size=8", "--dequantize", "--flip", "--variants=lv"]
    words += ["--num_steps=2", "--num_seeds=1", "--batch_size=16", "--latent_size=2", "--widths=4", "--num_blocks=1"]
    result = run_command(SWEEP, *words, f"--run_dir={tmp_path / 'run'}")
    assert result.returncode == 0, result.stderr
    recorded = json.loads((tmp_path / "run" / "flags.json").read_text())
    options = ("dataset", "fake_data", "image_size", "dequantize", "flip")
    assert [recorded[name] for name in options] == ["celeb_a", True, 8, True, True]
    summary = results.read(tmp_path / "run" / "summary.json", Summary)
    assert (summary.num_test_examples, summary.num_dimensions) == (128, 192)


def test_celeba_from_a_folder(tmp_path):
    """Black training images, white test images."""
    folder = tmp_path / "img_align_celeba"
    folder.mkdir()
    for number, colour in ((1, "black"), (162770, "black"), (182637, "grey"), (182638, "white"), (202599, "white")):
        PIL.Image.new("RGB", (178, 218), colour).save(folder / f"{number:06}.jpg")
    config = sigma_sweep.configure(
        **{"dataset": "celeb_a", "variants": ("f",), "num_seeds": 1, "num_steps": 2, "batch_size": 2},
        **{"latent_size": 2, "image_size": 8, "widths": (4,), "num_blocks": 1},
    )
    summary = run_sweep(config, tmp_path / "run", data_dir=str(tmp_path / "data"), celeba_dir=str(folder))
    assert summary.num_test_examples == 2
    assert summary.rows[0].mse == pytest.approx(1.0, abs=0.05)
    assert summary.members[0].sigma == 0.1
    assert runs.read_metrics(tmp_path / "run")[0]["mse"] < 0.01
    # The run belongs to these images, wherever they lie; others do not go on with it, nor are its numbers theirs.
    places = {"data_dir": str(tmp_path / "data")}
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert run_sweep(config, tmp_path / "run", celeba_dir=str(copy), **places) == summary
    PIL.Image.new("RGB", (178, 218), "black").save(copy / "000002.jpg")
    with pytest.raises(runs.RunError, match=r"celeba_files was .*: give another `path`"):
        run_sweep(config, tmp_path / "run", celeba_dir=str(copy), **places)


def test_size_of_celebas_images():
    assert sigma_sweep.configure(dataset="celeb_a").image_size == 64
    assert sigma_sweep.configure(dataset="celeb_a", image_size=32).image_size == 32
    assert sigma_sweep.configure(dataset="celeb_a:2.1.0") == sigma_sweep.configure(dataset="celeb_a")._replace(
        dataset="celeb_a:2.1.0"
    )
    assert sigma_sweep.configure(dataset="mnist").image_size is None


@pytest.mark.parametrize("dequantized", [False, True])
def test_held_out_images_are_dequantised(dequantized):
    """Black images under a decoder that says black: all that is left is the noise, of mean square 1 / (3 256^2)."""
    black = np.zeros((50, 8, 8, 1), np.uint8)
    dataset = datasets.image_dataset(black, black, dequantized=dequantized)

    def make_vae(sigma):
        encoder = networks.Encoder(lambda key: {}, lambda params, x: (jnp.zeros((len(x), 1)), jnp.zeros((len(x), 1))))
        decoder = networks.Decoder(lambda key: {}, lambda params, z: jnp.zeros((len(z), 8, 8, 1, 1)))
        return vae_lib.VAE(encoder, decoder, likelihoods.fixed(sigma), 1)

    compiled = Programs(dataset, make_vae, num_steps=1, beta=1.0)
    group = Group("", np.arange(2, dtype=np.int32), np.ones(2))
    scores, *_ = compiled.evaluate(group, compiled.init(group))
    expected = 1 / 3 / 256**2 if dequantized else 0.0
    assert np.mean(scores.mse) == pytest.approx(expected, rel=0.05)
    assert len(np.unique(scores.mse)) == (100 if dequantized else 1), "noise of its own for each image and seed"


@pytest.mark.parametrize(("name", "value"), [("sigma", 0.1), ("num_steps", "5"), ("decay", 1), ("levels", [3])])
def test_flags_of_wrong_types_are_refused(tmp_path, name, value):
    runs.write_json(tmp_path / "flags.json", SMALL._asdict() | {name: value})
    runs.write_json(tmp_path / "summary.json", {})
    with pytest.raises(runs.RunError, match=rf"flags\.json is damaged: {name} cannot be"):
        sweep.read_run(tmp_path)


def test_full_disk_is_told_from_other_errors():
    assert command.is_full(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    wrapped = ValueError("RESOURCE_EXHAUSTED: writing: No space left on device")
    assert command.is_full(wrapped)
    outer = RuntimeError("save failed")
    outer.__cause__ = wrapped
    assert command.is_full(outer)
    assert not command.is_full(OSError(errno.EIO, "Input/output error"))


BAD = {
    "--prior=vamp": "--prior=vamp: must be one of standard_normal, gaussian, mixture, flow",
    "--prior=flow --latent_size=1": "--prior=flow --latent_size=1: a flow couples latent dimensions, and needs two",
    "--prior=flow --evidence": "--evidence is for --prior=standard_normal",
    "--sigma=0": "positive",
    "--sigma=-1": "positive",
    "--sigma=1e-300": "positive",
    "--sigma=nan": "positive",
    "--sigma=inf": "positive",
    "--sigma=small": "must be a number",
    "--sigma=0.1,0.1": "only once",
    "--variants=f,vq": "unknown 'vq'",
    "--variants=f,f": "only once",
    "--variants=f_star": "add ls",
    "--variants=replay": "--sigma_from",
    "--sigma_from=somewhere": "f_star",
    "--dataset=nonesuch": "unknown data set",
    "--dataset=imdb_reviews": "no 8-bit `image`",
    "--dataset=mnist:9.9.9": "unknown data set",
    "--dataset=celeb_a --image_size=149": "from 8 to 148",
    "--dataset=celeb_a --celeba_dir=nowhere": "give the folder that holds 000001.jpg",
    "--dataset=mnist --celeba_dir=.": "`celeba_dir` is for CelebA",
    "--flip": "`flip` is for images",
    "--variants=lv_star": "add ls",
    "--variants=lv_star --sigma_from=nowhere": "its mean from LS runs: add ls",
    "--balance=-1": "from 0, for none, to 2",
    "--balance=nan": "from 0, for none, to 2",
    "--warm_start=0.9": "from 0, for none, to 0.8",
    "--gain=0": "positive",
    "--num_components=0": "at least 1",
    "--density": "--density is for images with grey levels",
    "--dataset=mnist --density --discretise": "exclude each other",
    "--dataset=mnist --density --dequantize": "exclude each other",
    "--dataset=mnist --discretise --dequantize": "exclude each other",
    "--discretise": "--discretise is for images with grey levels",
    "--discretize": "--discretise is for images with grey levels",
    "--dequantise": "`dequantize` is for images",
    "--levels=32": "`levels` is for images",
    "--dataset=mnist --evidence": "--evidence is for --dataset=toy",
    "--num_importance_samples=-1": "must be 0, for none, or more, and at most 2147483646",
    "--sigma_from=nowhere --variants=replay": "no finished run",
    "--run_dir=/dev/null/run": "cannot be written",
    "--run_dir=gs://bucket/run": "--run_dir=gs://bucket/run: a URL",
    "--run_dir=~nobody_of_this_name/run": "no such user",
    "--run_dir=": "--run_dir: the name is empty",
    "--dataset=mnist --data_dir=s3://bucket": "--data_dir=s3://bucket: a URL",
    "--dataset=mnist --manual_dir=https://host/mnist": "a URL",
    "--dataset=celeb_a --celeba_dir=gs:/faces": "a URL",
    "--variants=f_star --sigma_from=gs://bucket/run": "--sigma_from=gs://bucket/run: a URL",
    "--num_seeds=0": "at least 1",
    "--num_steps=0": "at least 1",
    "--batch_size=-3": "at least 1",
    "--seed=-1": "from 0",
    "--num_seeds=100000000000": "--num_seeds=100000000000: must be at least 1, and at most 100000",
    "--sigma=1e400": "--sigma=1e400: larger than any",
    "--dataset=mnist --manual_dir=/nowhere/at/all": "--manual_dir=/nowhere/at/all: there is no such folder",
    "--seed=2147483647": "from 0",
    "--beta=-1": "beta",
    "--beta=nan": "beta",
    "--widths=200,100": "one positive number",
    "--widths=": "positive number",
    "--widths=wide": "whole number",
    "--dataset=mnist --widths=32,0": "positive numbers",
    "--num_blocks=0": "at least 1",
    "--learning_rate=0": "positive",
    "--sigma_rate=0": "positive",
    "--clip_norm=0": "positive",
    "--warmup_steps=3000": "num_steps - 1",
    "--ema_decay=1": "below 1",
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_is_refused(words, tmp_path):
    run_dir = tmp_path / "run"
    with pytest.raises((command.UsageError, datasets.DatasetError, runs.RunError)) as error:
        call(sigma_sweep, [f"--run_dir={run_dir}", *words.split()])
    assert BAD[words] in str(error.value)
    assert "\n" not in str(error.value)
    assert not run_dir.exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [((None, None, 0), "give all three"), (("localhost:1", 2, 2), "from 0 to num_processes - 1 = 1")],
)
def test_processes_that_cannot_be_joined(given, message):
    names = ("coordinator_address", "num_processes", "process_id")
    with pytest.raises(runs.RunError, match=message):
        hosts.connect(distributed=False, **dict(zip(names, given, strict=True)))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--sigma=-1", "--sigma=-1: every value must be a positive number"),
        ("--dataset=nonesuch", "unknown data set 'nonesuch'"),
        ("--levels=32", "--levels is for images: leave it out, or give an image data set as --dataset"),
        ("--distributed", "give --coordinator_address"),
        ("--latent_size=none", "latent_size"),
        ("--no_such_flag", "no_such_flag"),
        ("stray", "unexpected argument 'stray'"),
    ],
)
def test_command_ends_in_one_line(words, message, tmp_path):
    """Whichever way it fails."""
    result = run_command(SWEEP, f"--run_dir={tmp_path / 'run'}", words)
    assert result.returncode != 0
    assert message in result.stderr
    assert result.stderr.startswith("sigma_sweep: ")
    assert len(result.stderr.strip().splitlines()) == 1
    assert result.stdout == ""
    assert not (tmp_path / "run").exists()


def test_help_lists_every_flag():
    result = run_command(SWEEP, "--help")
    for name in (*options.declared(sigma_sweep.Config), "run_dir", "data_dir", "manual_dir", "celeba_dir"):
        assert f"--{name}" in result.stdout or f"--[no]{name}" in result.stdout
    assert "python -m experiments.sigma_sweep --sigma=0.1" in result.stdout


def test_same_flags_name_the_same_directory():
    path = command.run_path(SMALL, "toy", None)
    assert path == command.run_path(SMALL, "toy", None)
    assert path != command.run_path(SMALL._replace(seed=1), "toy", None)


def test_equal_paths_have_equal_texts(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert command.paths(run_dir="./runs//a/", out="~/a b", data_dir=None) == {
        "run_dir": "runs/a",
        "out": "/home/me/a b",
        "data_dir": None,
    }


def test_later_flag_keeps_directories_names():
    fields = sigma_sweep.Config.__annotations__ | {"later": int}
    defaults = sigma_sweep.Config._field_defaults | {"later": 7}
    later = collections.namedtuple("later", fields, defaults=defaults.values())(**SMALL._asdict())
    path = command.run_path(SMALL, "toy", None)
    assert command.run_path(later, "toy", None) == path
    assert command.run_path(later._replace(later=8), "toy", None) != path


def test_prior_learns_with_the_networks(tmp_path):
    sizes = {"num_seeds": 1, "num_steps": 30, "widths": (8,), "num_blocks": 1, "batch_size": 16}
    config = sweep.configure(variants=("ls",), prior="gaussian", **sizes)
    lines = []
    summary = sigma_sweep.run(config, run_dir=str(tmp_path / "run"), echo=lines.append)
    assert summary.prior == "gaussian"
    assert "p(z) is a prior that learned with the networks: gaussian." in lines[-2]
    config, summary = sweep.read_run(tmp_path / "run")
    member = summary.members[0]
    vae, params = sweep.trained(tmp_path / "run", config, member, summary.form)
    assert np.all(params["prior"]["log_scale"] != 0.0)
    mean, log_stddev = vae_lib.encode(vae, params, jnp.asarray(datasets.toy_stream().test))
    kl = vae.prior.kl(params["prior"], mean, log_stddev, mean)
    assert member.kl == pytest.approx(float(kl.mean()), rel=1e-4)


def test_lv_star_goes_on_with_its_leader_s_prior():
    config = sweep.configure(variants=("ls", "lv_star"), num_seeds=2, prior="gaussian", num_steps=3)
    prior = {"mean": np.arange(4.0).reshape(2, 2)}
    trained = {"encoder": {}, "decoder": {}, "prior": prior}
    group = sweep.groups(config, "lv_star", sweep.any_record(config), trained=trained)[0]
    begun = group.begin({"encoder": {}, "decoder": {}, "prior": {"mean": np.zeros((2, 2))}})
    np.testing.assert_array_equal(begun["prior"]["mean"], prior["mean"])
