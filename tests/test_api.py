"""The layout and the public names: who imports whom, what importing costs, and what every signature promises."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import lvae_jax

PACKAGE = Path(lvae_jax.__file__).parent

# Each file may import only from those before it.
LEVELS = [
    "gaussians",
    "toy",
    "theory",
    "images",
    "datasets",
    "figures",
    "likelihoods",
    "networks",
    "vae",
    "training",
    "evaluation",
    "generation",
    "runs",
]
# Packages that only one file knows.
OWNERS = {
    "flax": "networks",
    "orbax": "runs",
    "matplotlib": "figures",
    "tensorflow_datasets": "images",
    "PIL": "images",
}


def imports(module):
    """The dotted names that a file imports, also those inside functions."""
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_file_has_a_level():
    assert sorted(file.stem for file in PACKAGE.glob("*.py")) == sorted([*LEVELS, "__init__"])


@pytest.mark.parametrize("module", LEVELS)
def test_files_import_only_from_the_levels_above(module):
    ours = {name.split(".")[1] for name in imports(module) if name.startswith("lvae_jax.")}
    assert ours <= set(LEVELS[: LEVELS.index(module)])
    for package, owner in OWNERS.items():
        assert owner == module or not any(name.split(".")[0] == package for name in imports(module))
    assert not any(
        name.startswith(("absl", "experiments", "tensorflow.")) or name == "tensorflow" for name in imports(module)
    )


def test_importing_the_library_is_light():
    code = "import sys, lvae_jax; print(*sys.modules)"
    modules = set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    assert "flax.linen" in modules
    heavy = {"tensorflow", "tensorflow_datasets", "orbax.checkpoint", "matplotlib", "scipy.stats", "tqdm", "PIL"}
    assert not heavy & modules


FUNCTIONS = [name for name in lvae_jax.__all__ if inspect.isfunction(getattr(lvae_jax, name))]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_signatures(name):
    function = getattr(lvae_jax, name)
    parameters = list(inspect.signature(function).parameters.values())
    assert function.__doc__
    assert function.__doc__.strip().endswith((".", ":", "`"))
    assert all(parameter.annotation is not parameter.empty for parameter in parameters)
    keys = [index for index, parameter in enumerate(parameters) if parameter.name in ("key", "keys")]
    assert keys in ([], [0]), "the key comes first"
    options = [p for p in parameters if p.default is not p.empty and p.name != "sigma"]
    assert all(p.kind is p.KEYWORD_ONLY for p in options), "options are keyword-only"


def test_names_are_sorted_and_all_there():
    assert lvae_jax.__all__ == sorted(
        lvae_jax.__all__, key=lambda name: (not name.isupper(), not name[0].isupper(), name)
    )
    assert all(hasattr(lvae_jax, name) for name in lvae_jax.__all__)
