"""The layout and the public names: who imports whom, and what every signature and docstring promises."""

import ast
import doctest
import importlib
import inspect
import itertools
import re
from pathlib import Path

import pytest

import lvae_jax

PACKAGE = Path(lvae_jax.__file__).parent

# Each file may import only from those before it.
LEVELS = [
    "keys",
    "gaussians",
    "low_rank",
    "logistics",
    "bessel",
    "theory",
    "toy",
    "ribbon",
    "cache",
    "celeba",
    "images",
    "files",
    "datasets",
    "figures",
    "likelihoods",
    "convolutions",
    "networks",
    "priors",
    "sigma_range",
    "vae",
    "training",
    "devices",
    "diagnostics",
    "evaluation",
    "headroom",
    "measures",
    "runs",
]
# The files that know a package.
OWNERS = {
    "flax": {"networks", "priors"},
    "sklearn": {"images", "priors", "headroom"},
    "orbax": {"runs"},
    "matplotlib": {"figures"},
    "tensorflow_datasets": {"images"},
    "PIL": {"celeba", "files"},
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
    for package, owners in OWNERS.items():
        assert module in owners or not any(name.split(".")[0] == package for name in imports(module))
    assert not any(
        name.startswith(("absl", "experiments", "tensorflow.")) or name == "tensorflow" for name in imports(module)
    )


def public_functions():
    """(dotted name, function) of all public functions of the library."""
    for name in LEVELS:
        module = importlib.import_module(f"lvae_jax.{name}")
        for function_name, function in inspect.getmembers(module, inspect.isfunction):
            if not function_name.startswith("_") and function.__module__ == module.__name__:
                yield f"{name}.{function_name}", function


FUNCTIONS = dict(public_functions())
EXPORTED = [getattr(lvae_jax, name) for name in lvae_jax.__all__ if inspect.isfunction(getattr(lvae_jax, name))]
INFORMATION = r"elbo|log_prob|entropy|kl_|bound|evidence|objective"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_docstrings_add_to_the_signature(name):
    function, module = FUNCTIONS[name], importlib.import_module(f"lvae_jax.{name.partition('.')[0]}")
    assert function.__doc__
    signature = inspect.signature(function)
    for parameter in (*signature.parameters.values(), signature.return_annotation):
        annotation = str(getattr(parameter, "annotation", parameter))
        bare = re.sub(r"(jaxtyping\.)?\w+\[(\w+\.)*(Array|ndarray), '[^']*'\]", "", annotation)
        if re.search(r"\b(Array|ndarray)\b", bare):
            assert re.search(r"\[[^\]]*\]", function.__doc__), f"{parameter}: its shape, by jaxtyping or as [B, *S]"
    if re.search(INFORMATION, name) and not name.startswith("figures."):
        said = re.search(r"\bnats\b", function.__doc__) or re.search(r"\bin nats\b", module.__doc__)
        assert said, "the unit, here or for the whole module"
    if re.search(r"^\s+raise \w+", inspect.getsource(function), re.MULTILINE):
        assert "Raises:" in function.__doc__


@pytest.mark.parametrize("function", EXPORTED, ids=lambda function: function.__name__)
def test_signatures(function):
    parameters = list(inspect.signature(function).parameters.values())
    assert function.__doc__.strip().endswith((".", ":", "`"))
    assert all(parameter.annotation is not parameter.empty for parameter in parameters)
    keys = [index for index, parameter in enumerate(parameters) if parameter.name in ("key", "keys")]
    assert keys in ([], [0]), "the key comes first"
    options = [p for p in parameters[1:] if p.default is not p.empty and p.name != "sigma"]  # the head's own
    assert all(p.kind is p.KEYWORD_ONLY for p in options), "options are keyword-only"


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


def test_examples_in_docstrings_are_there_to_run():
    finder = doctest.DocTestFinder()
    found = {test.name for name in FUNCTIONS for test in finder.find(FUNCTIONS[name], name) if test.examples}
    assert {"theory.optimal_radius", "likelihoods.discretised", "evaluation.rate", "gaussians.kl_to_standard"} <= found


def test_names_are_sorted_and_all_there():
    assert lvae_jax.__all__ == sorted(
        lvae_jax.__all__, key=lambda name: (not name.isupper(), not name[0].isupper(), name)
    )
    assert all(hasattr(lvae_jax, name) for name in lvae_jax.__all__)
