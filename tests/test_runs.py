"""The run directory: what it refuses, what it keeps, and that its files are always whole."""

import errno
import json
import re

import jax.numpy as jnp
import numpy as np
import pytest

from lvae_jax import runs

FLAGS = {"sigma": (0.1,), "seed": 0, "sigma_from": None}


def contents(path):
    return {file.relative_to(path): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_same_flags_open_the_same_run_until_it_is_finished(tmp_path):
    path = tmp_path / "deep" / "run"
    assert runs.find_run(path, FLAGS, defaults={}) is None
    assert not path.exists()
    runs.make_run(path, FLAGS)
    assert runs.find_run(path, FLAGS, defaults={}) is None
    runs.write_json(path / "summary.json", {"rows": []})
    assert runs.find_run(path, FLAGS, defaults={}) == {"rows": []}


def test_new_flags_have_their_defaults_in_old_runs(tmp_path):
    runs.make_run(tmp_path, FLAGS)
    runs.write_json(tmp_path / "summary.json", {"rows": []})
    defaults = {"sigma": (0.5,), "widths": (8, 8)}
    found = runs.find_run(tmp_path, FLAGS | {"widths": (8, 8)}, defaults=defaults)
    assert found == {"rows": []}
    assert runs.read_flags(tmp_path, defaults=defaults) == {**FLAGS, "sigma": [0.1], "widths": [8, 8]}
    with pytest.raises(runs.RunError, match=re.escape("widths was [8, 8] and is [9]")):
        runs.find_run(tmp_path, FLAGS | {"widths": [9]}, defaults=defaults)
    with pytest.raises(runs.RunError, match="seed was 0 and is None"):
        runs.find_run(tmp_path, {"sigma": (0.1,)}, defaults=defaults)  # nor is one forgotten that the run knows


@pytest.mark.parametrize("prepare", ["other flags", "other files", "a file", "damaged flags"])
def test_foreign_directories_are_refused_and_untouched(tmp_path, prepare):
    path = tmp_path / "run"
    if prepare == "a file":
        path.write_text("mine")
    else:
        path.mkdir()
        if prepare == "other files":
            (path / "metrics.jsonl").write_text("mine")
        else:
            (path / "flags.json").write_text(
                json.dumps(FLAGS | {"seed": 1})[: 5 if prepare == "damaged flags" else None]
            )
    before = contents(tmp_path)
    with pytest.raises(runs.RunError) as error:
        runs.find_run(path, FLAGS, defaults={})
    assert contents(tmp_path) == before
    assert "\n" not in str(error.value)
    assert "give" in str(error.value)
    if prepare == "other flags":
        assert "seed was 1 and is 0" in str(error.value)


def test_other_files_are_let_alone(tmp_path):
    """As the log of a batch system; but none that this run would write."""
    (tmp_path / "slurm-1.out").touch()
    (tmp_path / "ls_sigma.npy").touch()
    assert runs.find_run(tmp_path, FLAGS, defaults={}) is None
    with pytest.raises(runs.RunError, match=r"not a run directory and holds ls_sigma\.npy: give another"):
        runs.find_run(tmp_path, FLAGS, defaults={}, writes=["ls_sigma.npy"])


def test_second_writer_is_refused_until_the_first_has_ended(tmp_path):
    path = tmp_path / "run"
    with runs.lock(path, make=False):
        assert not path.exists()
    with runs.lock(path):
        assert runs.find_run(path, FLAGS, defaults={}) is None, "an empty lock is no one else's file"
        for make in (False, True):
            with pytest.raises(runs.RunError, match="another process writes in"):
                runs.lock(path, make=make).__enter__()
        with runs.lock(path / "part"):  # a part of a run is a run of its own
            pass
    with runs.lock(path):
        pass


def test_file_systems_without_locks(tmp_path, monkeypatch):
    def flock(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(runs.fcntl, "flock", flock)
    with runs.lock(tmp_path), runs.lock(tmp_path):
        pass


def test_all_processes_hear_of_a_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(runs.jax, "process_index", lambda: 1)
    monkeypatch.setattr(runs.multihost_utils, "broadcast_one_to_all", lambda failed: np.True_)
    with pytest.raises(runs.RunError, match="process 0 cannot use"):
        runs.lock(tmp_path / "run").__enter__()
    assert not (tmp_path / "run").exists()


def test_metrics_survive_an_interruption_and_are_rewound_by_group(tmp_path):
    assert runs.read_metrics(tmp_path) == []
    rows = [{"group": group, "member": 0, "step": step} for step in (1, 2, 3) for group in ("ls", "lv")]
    runs.append_metrics(tmp_path, rows)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"group": "ls", "st')
    assert runs.read_metrics(tmp_path) == rows
    runs.rewind_metrics(tmp_path, "ls", 1)
    assert runs.read_metrics(tmp_path) == [row for row in rows if row["group"] == "lv" or row["step"] == 1]


@pytest.mark.parametrize("line", [b"5", b"{}", b"{", b"\xff", b'{"group": "ls", "member": 0}'])
def test_damaged_metrics_are_refused(tmp_path, line):
    good = b'{"group": "ls", "member": 0, "step": 1}\n'
    (tmp_path / "metrics.jsonl").write_bytes(good + line + b"\n" + good)
    with pytest.raises(runs.RunError, match=r"metrics\.jsonl is damaged in line 2: restore it, or delete"):
        runs.read_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(runs.RunError, match="is damaged: restore it"):
        runs.read_metrics(tmp_path)


def test_deleted_run_is_not_made_again(tmp_path):
    gone = tmp_path / "run"
    for write in (
        lambda: runs.append_metrics(gone, [{"step": 1}]),
        lambda: runs.rewind_metrics(gone, "ls", 0),
        lambda: runs.Checkpoints(gone, "ls"),
    ):
        with pytest.raises(runs.RunError, match="deleted or moved while its run was under way"):
            write()
    assert not gone.exists()


def test_failed_write_leaves_the_old_file(tmp_path):
    file = tmp_path / "summary.json"
    runs.write_json(file, {"elbo": 1.0})
    with pytest.raises(ValueError, match="JSON"):
        runs.write_json(file, {"elbo": float("nan")})
    assert runs.read_json(file) == {"elbo": 1.0}


def tree(size=3, fill=1.5):
    return {
        "params": {"w": jnp.full((size, 2), fill), "empty": {}},
        "step": jnp.int32(4),
        "record": np.array([1.0, np.nan], np.float32),
    }


def saved(tmp_path):
    with runs.Checkpoints(tmp_path, "ls") as checkpoints:
        assert checkpoints.step is None
        checkpoints.save(4, tree(fill=0.0))
        checkpoints.save(8, tree())
    return tmp_path / "checkpoints" / "ls"


def test_newest_checkpoint_comes_back_to_the_bit(tmp_path):
    folder = saved(tmp_path)
    with runs.Checkpoints(tmp_path, "ls") as checkpoints:
        assert checkpoints.step == 8
        restored = checkpoints.restore(tree())
    np.testing.assert_array_equal(restored["params"]["w"], tree()["params"]["w"])
    np.testing.assert_array_equal(restored["record"], tree()["record"])
    assert restored["step"] == 4
    assert restored["step"].dtype == jnp.int32
    assert [child.name for child in folder.iterdir() if child.name.isdigit()] == ["8"]
    assert runs.Checkpoints(tmp_path, "lv").step is None


def test_checkpoint_of_another_shape_is_refused(tmp_path):
    saved(tmp_path)
    with pytest.raises(runs.RunError, match="damaged, or of another shape or version: delete"):
        runs.Checkpoints(tmp_path, "ls").restore(tree(size=5))


def test_checkpoint_cut_short_is_refused_and_kept(tmp_path):
    folder = saved(tmp_path)
    for file in folder.rglob("*"):
        if file.is_file() and file.stat().st_size > 100:
            with open(file, "r+b") as handle:
                handle.truncate(file.stat().st_size // 2)
    before = contents(tmp_path)
    with pytest.raises(runs.RunError, match="damaged, or of another shape or version: delete"):
        runs.Checkpoints(tmp_path, "ls").restore(tree())
    assert contents(tmp_path) == before
