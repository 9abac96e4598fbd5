"""The notebooks in colab/: each starts anywhere, imports what it shows, keeps small clean outputs, and runs through."""

import ast
import base64
import io
import re
import shutil
from pathlib import Path

import nbformat
import numpy as np
import PIL.Image
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NAMES = ("images", "paper_in_ten_minutes", "theorem_1", "your_data")
ABSOLUTE_PATH = re.compile(r"(?<![\w.:/~])/[A-Za-z_][\w.-]*/")


def test_shipped_runs_hold_no_absolute_path():
    texts = [file for file in (ROOT / "colab" / "runs").rglob("*") if file.suffix in (".txt", ".json", ".jsonl")]
    assert len(texts) > 10
    assert not [str(file) for file in texts if ABSOLUTE_PATH.search(file.read_text())]


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def notebook(name):
    return read(name)


def read(name):
    notebook = nbformat.read(ROOT / "colab" / f"{name}.ipynb", 4)
    nbformat.validate(notebook)
    return notebook


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tree(cell):
    """The syntax tree of a cell, without the lines that only IPython understands."""
    return ast.parse(re.sub(r"^(\s*)[!%].*$", r"\1pass", cell.source, flags=re.MULTILINE))


def outputs(notebook):
    return [output for cell in code(notebook) for output in cell.outputs]


def pictures(notebook):
    """The PNGs of the outputs, [H, W, 3] each."""
    encoded = [output.data["image/png"] for output in outputs(notebook) if "image/png" in output.get("data", {})]
    return [np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")) for png in encoded]


def texts(notebook):
    """All text in the outputs."""
    for output in outputs(notebook):
        yield from [output.text] if output.output_type == "stream" else []
        yield from (text for kind, text in output.get("data", {}).items() if kind.startswith("text/"))


def test_every_notebook_is_tested():
    assert {file.stem for file in (ROOT / "colab").iterdir() if file.suffix == ".ipynb"} == set(NAMES)


def test_imports_and_does_not_define(notebook):
    imported, defined = set(), []
    for cell in code(notebook):
        for node in ast.walk(tree(cell)):
            assert not isinstance(node, ast.ClassDef), node.name
            if isinstance(node, ast.Import | ast.ImportFrom):
                imported |= {node.module} if isinstance(node, ast.ImportFrom) else {alias.name for alias in node.names}
            if isinstance(node, ast.FunctionDef):
                defined.append(node.name)
            if isinstance(node, ast.Attribute):
                assert node.attr not in ("grad", "value_and_grad", "erf", "logsumexp"), ast.unparse(node)
    packages = {module.partition(".")[0] for module in imported}
    assert packages & {"lvae_jax", "experiments"}
    assert not packages & {"flax", "optax", "scipy", "tensorflow"}
    assert len(defined) <= 2, "glue, not a library"


def test_outputs_are_of_one_run(notebook):
    assert [cell.execution_count for cell in code(notebook)] == list(range(1, len(code(notebook)) + 1))
    assert all(output.output_type != "error" and output.get("name") != "stderr" for output in outputs(notebook))
    assert "widgets" not in notebook.metadata
    assert not any("execution" in cell.metadata for cell in notebook.cells)
    for text in texts(notebook):
        assert not ABSOLUTE_PATH.search(text), text
    check_pictures(pictures(notebook))


def check_pictures(pictures):
    assert len(pictures) >= 3
    for picture in pictures:
        assert min(picture.shape[:2]) > 200
        assert 0.02 < np.mean(picture != 255) < 0.98  # neither blank nor all ink


# nbclient can wait for ever for a cell whose output goes into a widget (its issue 312): the function is called once.
INTERACT = (
    "import ipywidgets\n"
    "ipywidgets.interact = lambda function, **sliders: function(**{n: slider.value for n, slider in sliders.items()})"
)


def execute(notebook, **parameters):
    """Runs the notebook where a user's Jupyter would, its parameters replaced; a failing cell raises."""
    [place] = [index for index, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])]
    lines = "\n".join([INTERACT, *(f"{name} = {value}" for name, value in parameters.items())])
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(lines))
    for cell in code(notebook):
        cell.outputs = []
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(ROOT / "colab")}}).execute()
    return notebook


@pytest.fixture
def smoke(monkeypatch):
    monkeypatch.setenv("LVAE_SMOKE", "1")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")


@pytest.mark.slow
def test_runs(name, notebook, smoke, tmp_path):
    kept = len(pictures(notebook))
    done = execute(notebook, RUNS=f"Path({str(tmp_path)!r})")
    shown = pictures(done)
    assert len(shown) == kept
    check_pictures(shown)
    trained = {"images": 4, "paper_in_ten_minutes": 1, "theorem_1": 1, "your_data": 0}
    assert len(list(tmp_path.glob("*/summary.json"))) == trained[name]  # in place of the checkout's runs/


@pytest.mark.slow
def test_images_loads_finished_runs(tmp_path, monkeypatch):
    """One of the user's, and on a CPU those that come with it, without a data set."""
    monkeypatch.delenv("LVAE_SMOKE", raising=False)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "none"))
    before = {file: file.stat().st_mtime_ns for file in (ROOT / "colab" / "runs").rglob("*")}
    mine = shutil.copytree(ROOT / "colab" / "runs" / "mnist_6000", tmp_path / "mine")
    runs = {"RUNS": f"Path({str(tmp_path / 'runs')!r})", "FINISHED_RUN": repr(str(mine))}
    done = execute(read("images"), **runs, DIGITS_STEPS=2)
    loaded = [text for text in texts(done) if "is finished" in text]
    assert len(loaded) == 2, "of a version with other flags: repeat the commands that made these runs"
    kept = "".join(texts(read("images")))
    for number in re.findall(r"VAE .*? (-?\d+\.\d{4})", "".join(loaded)):
        assert number in kept, "the outputs that are kept are of these runs"
    samples = np.asarray(PIL.Image.open(mine / "figures" / "samples.png").convert("RGB"))
    assert pictures(done)[0].shape == samples.shape
    assert {file: file.stat().st_mtime_ns for file in (ROOT / "colab" / "runs").rglob("*")} == before
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["digits_discretised_2"]
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_your_data_takes_images(smoke):
    x = "__import__('lvae_jax.images').images.fake_images((8, 8, 3))[0]"
    done = execute(read("your_data"), X=x, NUM_STEPS=4, BATCH_SIZE=16)
    check_pictures(pictures(done))
    assert any("192 dimensions" in text for text in texts(done))
