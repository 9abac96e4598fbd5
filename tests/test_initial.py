"""Runs that begin with the weights of a finished one."""

import numpy as np
import pytest

from experiments import command, initial, loop, sigma_sweep, sweep
from lvae_jax import runs

pytestmark = pytest.mark.usefixtures("plain_sweep")

TINY = {"num_seeds": 2, "num_steps": 30, "latent_size": 2, "widths": (8,), "num_blocks": 1, "batch_size": 16}


def silent(line):
    del line


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A finished run of F-, LS-, LV- and F*-VAEs on the toy."""
    path = tmp_path_factory.mktemp("initial") / "first"
    config = sigma_sweep.configure(sigma=(0.5, 0.2), variants=("f", "ls", "lv", "f_star"), **TINY)
    return path, config, sigma_sweep.run(config, run_dir=str(path), echo=silent)


def test_more_steps_go_on_from_the_weights(first, tmp_path, monkeypatch):
    """With a learning rate of next to nothing every model stays what it was; subsets of seeds and sigmas are found."""
    path, config, summary = first
    more = {"variants": ("f", "ls", "lv", "f_star"), "sigma": (0.2,), "learning_rate": 1e-12, "num_steps": 3}
    config = sigma_sweep.configure(init_from=str(path), **TINY | {"num_seeds": 1} | more)._replace(seed=1)
    assert (config.balance, config.warm_start) == (0.0, 0.0)
    again = sigma_sweep.run(config, run_dir=str(tmp_path / "more"), echo=silent)
    before = {(m.variant, m.seed, m.sigma if m.variant == "f" else None): m for m in summary.members}
    for member in again.members:
        same = before[member.variant, member.seed, member.sigma if member.variant == "f" else None]
        assert member.elbo == pytest.approx(same.elbo, abs=1e-4), member.variant
        assert member.sigma_max == pytest.approx(same.sigma_max, rel=1e-5)
    # The place of the run does not matter once its weights are taken; its results do.
    (path.parent / "moved").symlink_to(path)
    lines = []
    moved = config._replace(init_from=str(path.parent / "moved"))
    sigma_sweep.run(moved, run_dir=str(tmp_path / "more"), echo=lines.append)
    assert "is finished" in lines[0]
    assert sweep.read_run(tmp_path / "more")[0].init_from == "first"


@pytest.mark.slow
def test_more_steps_improve(first, tmp_path):
    path, _, summary = first
    config = sigma_sweep.configure(init_from=str(path), variants=("lv",), **TINY | {"num_steps": 200})
    again = sigma_sweep.run(config, run_dir=str(tmp_path / "more"), echo=silent)
    before = [member.elbo for member in summary.members if member.variant == "lv"]
    assert np.all(np.array([member.elbo for member in again.members]) > np.array(before))


def test_resumed_run_needs_no_weights(first, tmp_path, monkeypatch):
    """It resumes from its checkpoint, to the same bits."""
    path, _, _ = first
    config = sigma_sweep.configure(init_from=str(path), variants=("ls",), **TINY)
    whole = sigma_sweep.run(config, run_dir=str(tmp_path / "whole"), echo=silent)
    write_metrics = loop.write_metrics

    def stopping(run_dir, group, metrics, step):
        if step > 20:
            raise KeyboardInterrupt
        return write_metrics(run_dir, group, metrics, step)

    monkeypatch.setattr(loop, "write_metrics", stopping)
    every = loop.Pace(checkpoint_seconds=0.0)
    with pytest.raises(KeyboardInterrupt):
        sigma_sweep.run(config, run_dir=str(tmp_path / "cut"), echo=silent, pace=every)
    monkeypatch.setattr(loop, "write_metrics", write_metrics)
    monkeypatch.setattr(initial.sweep, "restore", None)
    assert sigma_sweep.run(config, run_dir=str(tmp_path / "cut"), echo=silent) == whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latent_size": 3}, "made with --latent_size=2, give the same here"),
        ({"gain": 0.5}, "made with --gain=1.0, give the same here"),
        ({"widths": (4,)}, "made with --widths=8, give the same here"),
        ({"num_seeds": 3}, "no model --variants=ls of --seed=2: ask for those that it has"),
        ({"variants": ("f",), "sigma": (0.3,)}, "no model --variants=f of --seed=0 at --sigma=0.3"),
        ({"variants": ("optimal",)}, "no model --variants=optimal of --seed=0"),
        ({"variants": ("ls", "lv_star")}, "--variants=lv_star begins with this run's own LS-VAE: leave it or"),
        ({"init_from": "none"}, "--init_from=none: there is no finished run"),
        ({"init_from": " "}, "--init_from: the name is empty"),
    ],
)
def test_runs_that_do_not_fit_are_refused_before_anything_is_made(change, message, first, tmp_path):
    path, _, _ = first
    config = sigma_sweep.configure(**TINY | {"init_from": str(path), "variants": ("ls",)} | change)
    with pytest.raises(command.UsageError, match=message):
        sigma_sweep.run(config, run_dir=str(tmp_path / "more"), echo=silent)
    assert not (tmp_path / "more").exists()


def test_data_of_another_form_are_refused(first, tmp_path):
    path, _, _ = first
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(40, 2)))
    config = sigma_sweep.configure(
        dataset=str(tmp_path / "x.npy"), init_from=str(path), variants=("ls",), **TINY | {"num_seeds": 1}
    )
    with pytest.raises(command.UsageError, match="the centre of its data is not that of these"):
        sigma_sweep.run(config, run_dir=str(tmp_path / "more"), echo=silent)
    assert not (tmp_path / "more").exists()


# Evaluation of a trained run


def test_options_of_the_evaluation_change_without_training(tmp_path, monkeypatch):
    config = sigma_sweep.configure(variants=("ls",), **TINY)
    path = tmp_path / "run"
    plain = sigma_sweep.run(config, run_dir=str(path), echo=silent)
    metrics = (path / "metrics.jsonl").read_bytes()
    monkeypatch.setattr(loop, "feed", None)  # which training needs
    more = config._replace(num_importance_samples=3)
    bounded = sigma_sweep.run(more, run_dir=str(path), echo=silent)
    assert (path / "metrics.jsonl").read_bytes() == metrics
    assert [member.elbo for member in bounded.members] == [member.elbo for member in plain.members]
    assert all(member.importance_bound > member.elbo for member in bounded.members)
    lines = []
    assert sigma_sweep.run(more, run_dir=str(path), echo=lines.append) == bounded
    assert "is finished" in lines[0]
    with pytest.raises(runs.RunError, match=r"num_importance_samples was 3 and is 0\)"):
        sigma_sweep.run(config, run_dir=str(path), echo=silent)
    with pytest.raises(runs.RunError, match=r"flags \(latent_size was 2 and is 3\)"):
        sigma_sweep.run(more._replace(latent_size=3, num_importance_samples=4), run_dir=str(path), echo=silent)
    (path / "summary.json").unlink()  # as if its evaluation had failed
    assert sigma_sweep.run(config, run_dir=str(path), echo=silent) == plain
    assert runs.read_json(path / "flags.json")["num_importance_samples"] == 0
