"""Random kills of tiny runs, each resumed to the bits of the run that was left alone."""

import kills
import pytest


@pytest.mark.slow
def test_killed_runs_resume_to_the_same_bits(capsys):
    assert kills.check(2, 1) == 2
    assert capsys.readouterr().out.endswith("2 of 2\n")


@pytest.mark.slow
def test_changed_bits_are_seen(monkeypatch, capsys):
    monkeypatch.setitem(kills.RUNS, "toy", (*kills.TOY[1:], "--variants=f"))
    found = kills.results
    monkeypatch.setattr(kills, "results", lambda path: found(path) | {"weights": path.name})
    assert kills.check(1, 1) == 0
    assert "weights differ" in capsys.readouterr().out
