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

import lvae_jax
from lvae_jax import evaluation, figures, theory, training, vae

ROOT = Path(__file__).parents[1]
NAMES = ("images", "paper_in_ten_minutes", "theorem_1", "your_data")
MAX_BYTES = 600_000
MAX_LINES = 20  # of a definition: glue, not a library
BADGE = re.compile(
    r"\[!\[Open in Colab\]\(https://colab\.research\.google\.com/assets/colab-badge\.svg\)\]"
    r"\(https://colab\.research\.google\.com/github/([\w-]+/[\w-]+)/blob/main/(colab/\w+\.ipynb)\)"
)
ABSOLUTE_PATH = re.compile(r"(?<![\w.:/~])/[A-Za-z_][\w.-]*/")


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


def test_the_badge_opens_this_notebook_from_the_repository_that_is_cloned(name, notebook):
    [(badge_repository, path)] = BADGE.findall(notebook.cells[0].source)
    assert path == f"colab/{name}.ipynb"
    first, *others = code(notebook)
    [repository] = re.findall(r'^REPOSITORY = "https://github\.com/([\w-]+/[\w-]+)"', first.source, re.MULTILINE)
    assert badge_repository == repository
    assert "git clone" in first.source
    assert "pip install" in first.source
    assert "{REPOSITORY}" in first.source
    assert not any("github.com" in cell.source or "pip install" in cell.source for cell in others)


def test_one_cell_says_how_much_to_compute(notebook):
    [parameters] = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assert parameters is code(notebook)[1]
    assert 'SMOKE = bool(os.environ.get("LVAE_SMOKE"))' in parameters.source


def test_models_bounds_and_optimisers_are_imported(notebook):
    imported, defined = set(), []
    for cell in code(notebook):
        for node in ast.walk(tree(cell)):
            assert not isinstance(node, ast.ClassDef), node.name
            if isinstance(node, ast.Import | ast.ImportFrom):
                imported |= {node.module} if isinstance(node, ast.ImportFrom) else {alias.name for alias in node.names}
            if isinstance(node, ast.FunctionDef):
                defined.append(node.name)
                assert node.end_lineno - node.lineno < MAX_LINES, node.name
            if isinstance(node, ast.Attribute):
                assert node.attr not in ("grad", "value_and_grad", "erf", "logsumexp"), ast.unparse(node)
    assert {module.partition(".")[0] for module in imported} & {"lvae_jax", "experiments"}
    assert not {module.partition(".")[0] for module in imported} & {"flax", "optax", "scipy", "tensorflow"}
    assert len(defined) <= 2
    library = (lvae_jax, evaluation, figures, theory, training, vae)
    assert not set(defined) & {name for module in library for name in dir(module)}


def test_kept_outputs_are_of_one_run_from_top_to_bottom(notebook):
    assert [cell.execution_count for cell in code(notebook)] == list(range(1, len(code(notebook)) + 1))
    for output in outputs(notebook):
        assert output.output_type != "error"
        assert output.get("name") != "stderr"
    assert "widgets" not in notebook.metadata
    assert not any("execution" in cell.metadata for cell in notebook.cells)


def test_kept_outputs_are_small_and_tell_nothing_of_the_machine(name, notebook):
    assert (ROOT / "colab" / f"{name}.ipynb").stat().st_size <= MAX_BYTES
    for text in texts(notebook):
        assert not ABSOLUTE_PATH.search(text), text
        assert not re.search(r"\d+:\d\d<|step/s|s/step", text), text  # a progress bar


def test_the_pattern_of_absolute_paths_finds_them():
    found = ["finished: /mnt/someone/run", "(/content/lvae_jax/runs)", "'/scratch/run'"]
    assert all(ABSOLUTE_PATH.search(text) for text in found)
    not_found = ["runs/notebook_toy: figures/elbo.png", "sigma / (R / sqrt n)", "bits/dim", "https://arxiv.org/abs/1"]
    assert not any(ABSOLUTE_PATH.search(text) for text in not_found)


def test_figures_are_kept(notebook):
    check_pictures(pictures(notebook))


def check_pictures(pictures):
    assert len(pictures) >= 3
    for picture in pictures:
        assert min(picture.shape[:2]) > 200
        assert 0.02 < np.mean(picture != 255) < 0.98  # neither blank nor all ink


def execute(notebook, **parameters):
    """Runs the notebook where a user's Jupyter would, its parameters replaced; a failing cell raises."""
    [place] = [index for index, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])]
    lines = "\n".join(f"{name} = {value}" for name, value in parameters.items())
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(lines))
    for cell in code(notebook):
        cell.outputs = []
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT / "colab")}}).execute()
    return notebook


@pytest.fixture
def smoke(monkeypatch):
    monkeypatch.setenv("LVAE_SMOKE", "1")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")


@pytest.mark.slow
def test_runs_from_top_to_bottom(name, notebook, smoke, tmp_path):
    kept = len(pictures(notebook))
    done = execute(notebook, RUNS=f"Path({str(tmp_path)!r})")
    shown = pictures(done)
    assert len(shown) == kept
    check_pictures(shown)
    trained = {"images": 2, "paper_in_ten_minutes": 1, "theorem_1": 1, "your_data": 0}
    assert len(list(tmp_path.glob("*/summary.json"))) == trained[name]  # in place of the checkout's runs/
    if name == "images":
        loads_a_finished_run(next(tmp_path.glob("mnist_[0-9]*")), tmp_path / "none")


def loads_a_finished_run(run_dir, runs):
    """The part of `images` up to its first figure, with FINISHED_RUN."""
    notebook = read("images")
    end = next(index for index, cell in enumerate(notebook.cells) if "samples.png" in cell.source)
    notebook.cells = notebook.cells[: end + 1]
    done = execute(notebook, RUNS=f"Path({str(runs)!r})", FINISHED_RUN=repr(str(run_dir)))
    assert not runs.exists()
    assert any("LV-VAE" in text for text in texts(done))
    [picture] = pictures(done)
    assert picture.shape == np.asarray(PIL.Image.open(run_dir / "figures" / "samples.png").convert("RGB")).shape


@pytest.mark.slow
def test_images_on_a_cpu_loads_the_runs_that_come_with_it_and_needs_no_data_set(tmp_path, monkeypatch):
    monkeypatch.delenv("LVAE_SMOKE", raising=False)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "none"))
    copy = shutil.copytree(ROOT / "colab" / "runs", tmp_path / "runs", ignore=shutil.ignore_patterns("generated"))
    before = {file: file.stat().st_mtime_ns for file in copy.rglob("*") if file.is_file()}
    done = execute(read("images"), RUNS=f"Path({str(copy)!r})")
    said = "".join(texts(done))
    assert said.count("is finished") == 2, "of a version with other flags: repeat the commands that made these runs"
    check_pictures(pictures(done))
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert not (tmp_path / "none").exists()
    kept = "".join(texts(read("images")))
    for number in re.findall(r"(?:VAE) .*? (-?\d+\.\d{4})", said):
        assert number in kept, "the outputs that are kept are of these runs"


@pytest.mark.slow
def test_your_data_takes_images(smoke):
    x = "__import__('lvae_jax.images').images.fake_images((8, 8, 3))[0]"
    done = execute(read("your_data"), X=x, NUM_STEPS=4, BATCH_SIZE=16)
    check_pictures(pictures(done))
    assert any("192 dimensions" in text for text in texts(done))
