"""The typed results and their JSON, and the tables that they fill."""

import dataclasses
import json
import re
from pathlib import Path

import markdown
import numpy as np
import pytest
from conftest import filled

from experiments import results, tables
from experiments.results import Member, Quality, Realism, Result, Row, SphereRow, Summary, ToyMeasures
from lvae_jax import runs

RUNS = sorted((Path(__file__).parents[1] / "colab" / "runs").glob("*/summary.json"))
KINDS = [kind for kind in vars(results).values() if isinstance(kind, type) and issubclass(kind, Result)]


@pytest.mark.parametrize("file", RUNS, ids=lambda file: file.parent.name)
def test_shipped_summary_is_read_and_written_unchanged(file):
    assert results.read(file, Summary).to_json() == json.loads(file.read_text())


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_results_survive_a_round_trip(kind):
    value = filled(kind, rows=[filled(Row)]) if kind is Summary else filled(kind)
    text = json.dumps(value.to_json())
    assert kind.from_json(json.loads(text)) == value
    assert "null" not in text or kind in (Summary, results.Generated), "what does not apply is left out"


def test_nested_results_are_results_again(tmp_path):
    row, true = filled(Row, best_elbo=[0.5, 0.75]), filled(ToyMeasures, band_widths=[1.0, 2.0])
    summary = filled(Summary, kind="points", rows=[row], members=[filled(Member, seed=3)], true_measures=true)
    runs.write_json(tmp_path / "summary.json", summary.to_json())
    assert results.read(tmp_path / "summary.json", Summary) == summary


def test_fields_of_other_versions():
    values = filled(Realism, row="some").to_json()
    assert Realism.from_json(values | {"newer": 1}) == Realism.from_json(values)
    del values["recall"]
    with pytest.raises(TypeError, match="recall"):
        Realism.from_json(values)


def test_generated_files_belong_to_a_run_wherever_it_lies():
    here = filled(results.Generated, run="/a", summary="1f")
    assert here.same(dataclasses.replace(here, run="/b"))
    assert not here.same(dataclasses.replace(here, run="/b", summary="2f"))
    assert not here.same(dataclasses.replace(here, run="/b", num_samples=3))
    old = dataclasses.replace(here, summary=None)  # from before the hash was recorded
    assert here.same(old)
    assert not here.same(dataclasses.replace(old, run="/b"))


@pytest.mark.parametrize(("kind", "levels"), [("points", None), ("density", 256)])
def test_levels_of_old_runs(kind, levels):
    values = filled(Summary, kind=kind, levels=17, rows=[filled(Row)]).to_json()
    del values["levels"]
    assert Summary.from_json(values).levels == levels


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[1]", "cannot be read"),
        ("{}", "of an older version: move it, and repeat the command that wrote it"),
        ('{"rows": []}', "of an older version: move it, and repeat the command that wrote it"),
        (json.dumps(filled(Quality).to_json() | {"rows": 5}), "damaged or of an older version"),
        (json.dumps(filled(Quality).to_json() | {"rows": [5]}), "damaged or of an older version"),
        (json.dumps(filled(Quality).to_json() | {"num_images": "5"}), "damaged or of an older version"),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path, content, message):
    (tmp_path / "quality.json").write_text(content)
    with pytest.raises(runs.RunError, match=message) as error:
        results.read(tmp_path / "quality.json", Quality)
    assert "\n" not in str(error.value)


def test_sweep_without_rows_is_damaged(tmp_path):
    runs.write_json(tmp_path / "summary.json", filled(Summary).to_json())
    with pytest.raises(runs.RunError, match="damaged"):
        results.read(tmp_path / "summary.json", Summary)


# Tables


def test_console_and_markdown_have_the_same_cells():
    rows = [
        filled(SphereRow, variant="f", dim=3, radius=0.5, radius_over_seeds_sd=0.25, num_seeds=2),
        filled(SphereRow, variant="f_star", dim=10, radius=1.5, num_seeds=1),
    ]
    text, marked = tables.Table(tables.SPHERE, rows).text(), tables.Table(tables.SPHERE, rows).markdown()
    cells = [re.split(r" {2,}", line.strip()) for line in text.splitlines()]
    assert cells[1][:2] == ["F-VAE", "3"]
    assert "0.5000 +- 0.2500" in cells[1]
    assert "F*-VAE" in cells[2]
    page = markdown.markdown(marked, extensions=["tables"])
    shown = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", line) for line in page.split("</tr>")]
    shown = [[cell.replace("&nbsp;±&nbsp;", " +- ") for cell in line] for line in shown if line]
    shown[0] = shown[0][1:]  # the column of variants has no title
    assert shown == cells


def test_empty_columns_are_left_out_and_empty_cells_stay_empty():
    rows = [filled(Row, variant="f"), filled(Row, variant="lv", importance_bound=np.float64(-0.5))]
    assert tables.titles(tables.SWEEP, rows[:1]) == [
        title for title in tables.titles(tables.SWEEP, rows) if title != "IW bound"
    ]
    heading, first, second = tables.Table(tables.SWEEP, rows).text().splitlines()
    end = heading.index("IW bound") + len("IW bound")
    assert (first[end - 7 : end].strip(), second[end - 7 : end]) == ("", "-0.5000")


def test_lines_below_and_notes():
    rows = [filled(Row, variant="f", bits_per_dimension=2.0)]
    more = [{"": "histogram", "bits/dim": "1.5"}]
    table = tables.Table(tables.SWEEP, rows, more, ["word " * 60])
    heading, _, below, *notes = table.text().splitlines()
    assert below.startswith("histogram ")
    assert below.endswith("1.5")
    assert len(below) == len(heading)
    assert len(notes) > 1
    assert max(map(len, notes)) <= 118
    assert "| histogram |" in table.markdown()


def test_cells_cannot_break_a_table():
    assert tables.grid(["x"], [["p(x|z)"]]).splitlines()[-1] == "| p(x\\|z) |"
    assert tables.literal("F*-VAE, 1 +- 2") == "F\\*-VAE, 1&nbsp;±&nbsp;2"
