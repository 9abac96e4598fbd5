"""The documents: their links, commands, flags and names exist, and the README's code runs as written."""

import ast
import importlib.util
import json
import pkgutil
import re
import shlex
from pathlib import Path

import pytest

from benchmarks import peers
from experiments import command, options
from experiments.variants import VARIANTS

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", "RESULTS.md", "docs/manual.md", "docs/map.md"]
NOTEBOOKS = sorted(f"colab/{path.name}" for path in (ROOT / "colab").glob("*.ipynb"))
# Of RESULTS.md, what follows is the output of a command.
REPORT = "## The report\n"


def text(page):
    """The Markdown of a page; for a notebook, of its Markdown cells."""
    content = (ROOT / page).read_text()
    if not page.endswith(".ipynb"):
        return content
    cells = json.loads(content)["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def written(page):
    """The part of a page that is written by hand."""
    return text(page).partition(REPORT)[0]


def prose(markdown):
    """The Markdown without its code blocks, in which # is a comment."""
    return re.sub(r"^```.*?^```$", "", markdown, flags=re.MULTILINE | re.DOTALL)


def anchors(page):
    """The anchors that GitHub gives the headings of a page."""
    found = []
    for heading in re.findall(r"^#+ (.+)$", prose(text(page)), flags=re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        earlier = sum(re.fullmatch(rf"{re.escape(slug)}(-\d+)?", anchor) is not None for anchor in found)
        found.append(f"{slug}-{earlier}" if earlier else slug)
    return found


def commands(page):
    """(module, its arguments) of each `python -m` command, with continued and wrapped lines joined."""
    pieces = re.findall(r"^```sh\n(.*?)^```$", written(page), flags=re.MULTILINE | re.DOTALL)
    lines = [line for piece in pieces for line in piece.replace("\\\n", " ").splitlines()]
    lines += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(written(page)))]
    return [match.groups() for line in lines for match in re.finditer(r"python -m ([\w.]+)([^#&]*)", line)]


def flags_of(module):
    """The names of the flags that an experiment defines, with those that all share: read from the source, and declared
    by the fields of its config."""
    names = {"help"}
    config = getattr(importlib.import_module(f"experiments.{module}"), "Config", None)
    if isinstance(config, type):
        declared = options.declared(config)
        names |= {*declared, *(f"no{name}" for name, (kind, _) in declared.items() if kind is bool)}
    for file in (ROOT / "experiments" / f"{module}.py", ROOT / "experiments/command.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name):
                called = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
                if called.startswith("DEFINE_") and isinstance(node.args[0], ast.Constant):
                    names.add(node.args[0].value)
                    if called == "DEFINE_bool":
                        names.add(f"no{node.args[0].value}")
                if called == "DEFINE_alias":  # in a loop over these
                    names |= set(command.ALIASES)
    return names


EXPERIMENTS = [path.stem for path in (ROOT / "experiments").glob("*.py") if "def define_flags()" in path.read_text()]
FLAG = re.compile(r"(?<![\w-])--([a-z]\w*)")


@pytest.mark.parametrize("page", [*PAGES, *NOTEBOOKS])
def test_links_and_anchors_resolve(page):
    links = re.findall(r"\]\(\s*([^)\s]+)\s*\)", text(page))
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = ((ROOT / page).parent / path).resolve().relative_to(ROOT) if path else Path(page)
        assert (ROOT / target).exists(), link
        assert not anchor or anchor in anchors(str(target)), link


@pytest.mark.parametrize("page", PAGES)
def test_commands_exist_and_take_their_flags(page):
    for module, arguments in commands(page):
        assert importlib.util.find_spec(module) is not None, module
        package, _, name = module.partition(".")
        if package == "experiments" and name:
            unknown = set(FLAG.findall(arguments)) - flags_of(name)
            assert not unknown, f"{module} has no {unknown}"
        if module == "benchmarks.peers":
            peers.parser().parse_args(shlex.split(arguments))
        for variants in re.findall(r"--variants=([\w,]+)", arguments):
            assert set(variants.split(",")) <= set(VARIANTS)


@pytest.mark.parametrize("page", PAGES)
def test_flags_exist(page):
    known = set().union(*map(flags_of, EXPERIMENTS), FLAG.findall(peers.parser().format_help()))
    assert set(FLAG.findall(written(page))) <= known


def test_flags_are_those_of_the_source():
    assert {"sigma", "decay", "nodecay", "run_dir"} <= flags_of("sigma_sweep")
    assert "compare" in flags_of("critical_sigma") - flags_of("sigma_sweep")
    assert {"sigma_sweep", "hypersphere", "critical_sigma", "generate", "quality", "paper"} <= set(EXPERIMENTS)


@pytest.mark.parametrize("page", PAGES)
def test_files_exist(page):
    for code in re.findall(r"`([^`\s]+)`", prose(written(page))):
        if re.fullmatch(r"[\w./-]+(\.(py|ipynb|cfg|toml)|/)", code) and not code.startswith("runs/"):
            assert (ROOT / code).exists(), code


@pytest.mark.parametrize("page", PAGES)
def test_names_exist(page):
    """Such as `lv.fixed`, `lvae_jax.theory.principal_stddevs`, `command.run` or `experiments.quality.score(...)`."""
    for name in re.findall(r"`((?:\w+\.)+\w+)(?=[`(])", prose(written(page))):
        first, rest = name.split(".", 1)
        package = {"lv": "lvae_jax"}.get(first, first)
        for folder in ("lvae_jax", "experiments"):
            if (ROOT / folder / f"{first}.py").exists():
                package = f"{folder}.{first}"
        if package.startswith(("lvae_jax", "experiments")) and rest not in ("py", "md"):
            pkgutil.resolve_name(f"{package}.{rest}")


@pytest.mark.parametrize("page", PAGES)
def test_tests_exist(page):
    source = "".join(path.read_text() for path in (ROOT / "tests").glob("*.py"))
    for name in re.findall(r"`(test_\w+)`", text(page)):
        assert f"def {name}(" in source, name


def test_map_has_every_file_in_order():
    files = re.findall(r"^\| `([\w/]+\.py)` \|", text("docs/map.md"), flags=re.MULTILINE)
    for package in ("lvae_jax", "experiments"):
        listed = [file for file in files if file.startswith(package)]
        there = [f"{package}/{path.name}" for path in (ROOT / package).glob("[!_]*.py")]
        assert sorted(listed) == sorted(there)
    levels = next(
        ast.literal_eval(node.value)
        for node in ast.parse((ROOT / "tests/test_api.py").read_text()).body
        if isinstance(node, ast.Assign) and node.targets[0].id == "LEVELS"
    )
    assert [Path(file).stem for file in files if file.startswith("lvae_jax")] == levels


def test_manual_knows_the_table():
    """Its columns, and every variant with its title."""
    manual = text("docs/manual.md")
    source = (ROOT / "experiments/tables.py").read_text()
    table = manual.partition("| column | meaning |")[2].partition("\n\n")[0]
    titles = [title for row in re.findall(r"^\| ([^|]+) \|", table, re.MULTILINE)[1:] for title in row.split(", ")]
    assert len(titles) > 5
    assert all(f'"{title}"' in source for title in titles), titles
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", manual, flags=re.MULTILINE)
    assert {name: title.replace("\\", "") for name, title in rows if name in VARIANTS} == {
        name: variant.title for name, variant in VARIANTS.items()
    }


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize(("page", "package"), [("README.md", "pytest"), ("CONTRIBUTING.md", "pdoc")])
def test_ci_finds_its_command(page, package):
    """.ci/run executes the first line of this form."""
    lines = [line for line in (ROOT / page).read_text().splitlines() if line.startswith("pip install")]
    assert sum(package in line for line in lines) == 1


def test_readmes_code_learns_the_noise(capsys):
    (code,) = re.findall(r"^```python\n(.*?)^```$", text("README.md"), flags=re.MULTILINE | re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    printed = re.fullmatch(r"ELBO (-\d\.\d{3}) nats, sigma (\d\.\d{3})\n", capsys.readouterr().out)
    elbo, sigma = map(float, printed.groups())
    assert 0.09 < sigma < 0.12  # the noise is 0.1, and sigma still falls
    assert elbo > -1.0  # a model that encodes nothing has about -2.5
