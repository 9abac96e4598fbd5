"""What is shipped: the files of both archives, what importing does to a process, and how all public names read."""

import doctest
import importlib
import inspect
import itertools
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = {path.stem: f"lvae_jax.{path.stem}" for path in sorted((ROOT / "lvae_jax").glob("[!_]*.py"))}

# absl arrives with flax; its flags and its app stay out of an importing program's way.
SMOKE = """
import sys
import jax
before = dict(jax.config.values)
import lvae_jax as lv
assert dict(jax.config.values) == before, "importing changes jax.config"
loaded = {name.partition(".")[0] for name in sys.modules}
assert not loaded & {"experiments", "matplotlib", "orbax", "tensorflow", "tensorflow_datasets"}, loaded
assert "absl.app" not in sys.modules
head = lv.learned_scalar()
vae = lv.VAE(lv.mlp_encoder((2,), 2), lv.mlp_decoder((2,), head.outputs, 2), head, latent_size=2)
params = lv.init(jax.random.key(0), vae)
x = jax.random.normal(jax.random.key(1), (5, 2))
elbo = lv.elbo(jax.random.split(jax.random.key(2), 5), vae, params, x).elbo
assert elbo.shape == (5,) and bool((elbo < 0.0).all()), elbo
sys.stderr.write(lv.__file__)
"""


def smoke(python, folder, **environment):
    """Where the package is that `python` imports, and what it printed; no warning passes."""
    command = [str(python), "-W", "error", "-c", SMOKE]
    done = subprocess.run(command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr, done.stdout


def test_importing_prints_nothing_and_changes_nothing(tmp_path):
    file, printed = smoke(sys.executable, tmp_path, PYTHONPATH=str(ROOT))
    assert Path(file) == ROOT / "lvae_jax" / "__init__.py"
    assert not printed


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """The (wheel, sdist) of a copy of the checkout, so that no build leaves anything in it; nothing is downloaded."""
    pytest.importorskip("build", reason="needs build")
    copy, out = tmp_path_factory.mktemp("copy") / "lvae_jax", tmp_path_factory.mktemp("dist")
    names = ("lvae_jax", "tests", "setup.cfg", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
    copy.mkdir()
    for name in names:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, copy / name)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl")), next(out.glob("*.tar.gz"))


@pytest.mark.slow
def test_the_archives_are_complete(archives):
    wheel, sdist = archives
    with zipfile.ZipFile(wheel) as file:
        shipped = set(file.namelist())
        (metadata,) = (file.read(name).decode() for name in shipped if name.endswith("METADATA"))
    with tarfile.open(sdist) as file:
        sources = {name.partition("/")[2] for name in file.getnames()}
    package = {f"lvae_jax/{path.name}" for path in (ROOT / "lvae_jax").iterdir() if path.suffix in (".py", ".typed")}
    assert "lvae_jax/py.typed" in package
    assert {name for name in shipped if ".dist-info/" not in name} == package
    assert any(re.fullmatch(r".*\.dist-info/(licenses/)?LICENSE", name) for name in shipped)
    assert package | {"LICENSE", "README.md", "setup.cfg", "pyproject.toml"} <= sources
    assert not any(name.startswith("tests") for name in sources), "some without the others would be of no use"
    assert re.search(r"^License(-Expression)?: Apache-2\.0$", metadata, re.MULTILINE)


@pytest.mark.slow
def test_the_wheel_works_in_an_empty_environment(archives, tmp_path):
    """Its dependencies are this environment's, by a path file: downloading them again would test nothing of ours."""
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.check_output([python, "-c", code], text=True).strip())
    (site / "dependencies.pth").write_text("\n".join({sysconfig.get_path(name) for name in ("purelib", "platlib")}))
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site]
    subprocess.run([*install, archives[0]], check=True, capture_output=True)
    file, printed = smoke(python, tmp_path)
    assert Path(file) == site / "lvae_jax" / "__init__.py"
    assert not printed


def public_functions():
    """(dotted name, function) of all public functions of the library."""
    for name, module in MODULES.items():
        for function_name, function in inspect.getmembers(importlib.import_module(module), inspect.isfunction):
            if not function_name.startswith("_") and function.__module__ == module:
                yield f"{name}.{function_name}", function


FUNCTIONS = dict(public_functions())


def positional(function):
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [name for name, parameter in inspect.signature(function).parameters.items() if parameter.kind in kinds]


def test_arguments_stand_in_one_order_everywhere():
    """Where two functions share two arguments, both take them in the same order."""
    first_seen, wrong = {}, []
    for name, function in FUNCTIONS.items():
        for pair in itertools.combinations(positional(function), 2):
            first_seen.setdefault(pair, name)
            if pair[::-1] in first_seen:
                wrong.append((name, *pair, first_seen[pair[::-1]]))
    assert len(first_seen) > 50
    assert not wrong


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_array_has_its_shape_written_down(name):
    """In the signature, by jaxtyping, or where it is any array, in the docstring as [B, *S]."""
    function = FUNCTIONS[name]
    assert function.__doc__
    for parameter in (*inspect.signature(function).parameters.values(), inspect.signature(function).return_annotation):
        annotation = str(getattr(parameter, "annotation", parameter))
        bare = re.sub(r"(jaxtyping\.)?\w+\[(\w+\.)*(Array|ndarray), '[^']*'\]", "", annotation)
        if re.search(r"\b(Array|ndarray)\b", bare):
            assert re.search(r"\[[^\]]*\]", function.__doc__), f"{parameter}: no shape"


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in FUNCTIONS
        if re.search(r"elbo|log_prob|entropy|kl_|bound|evidence|objective", name) and not name.startswith("figures.")
    ],
)
def test_information_is_in_nats(name):
    """The function says so, or its module for all of its functions."""
    module = importlib.import_module(MODULES[name.partition(".")[0]])
    assert re.search(r"\bnats\b", FUNCTIONS[name].__doc__) or re.search(r"\bin nats\b", module.__doc__)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_raises_says_so(name):
    if re.search(r"^\s+raise \w+", inspect.getsource(FUNCTIONS[name]), re.MULTILINE):
        assert "Raises:" in FUNCTIONS[name].__doc__


def test_examples_in_docstrings_are_there_to_run():
    finder = doctest.DocTestFinder()
    found = {test.name for name in FUNCTIONS for test in finder.find(FUNCTIONS[name], name) if test.examples}
    assert {"theory.optimal_radius", "likelihoods.discretised", "evaluation.rate", "gaussians.kl_to_standard"} <= found
