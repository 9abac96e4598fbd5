"""The repository's address stands in setup.cfg alone, and the notebooks find the code without it."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from colab import address

ROOT = Path(__file__).parents[1]
URL = address.address(ROOT)
NEW = "https://github.com/some-one/their.fork_2"
NOTEBOOKS = sorted((ROOT / "colab").glob("*.ipynb"))
# How often each file names the owner and the repository: a notebook in its badge and in its first cell.
PLACES = {"setup.cfg": 1, "README.md": 1} | {f"colab/{path.name}": 2 for path in NOTEBOOKS}


def name_of(url):
    return url.removeprefix("https://github.com/")


@pytest.fixture
def copy(tmp_path):
    """A copy of the files that hold the address."""
    for place in PLACES:
        (tmp_path / place).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / place, tmp_path / place)
    return tmp_path


def move(root, url):
    config = root / "setup.cfg"
    config.write_text(config.read_text().replace(URL, url))


def contents(root):
    return {place: (root / place).read_bytes() for place in PLACES}


def test_checked_in_files_agree_with_setup_cfg():
    assert address.stale(ROOT) == {}
    address.main(["--check"], ROOT)


def test_address_is_nowhere_else():
    files = list(PLACES)
    if (ROOT / ".git").exists():  # which an uploaded folder may lack
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        files = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    texts = {file: (ROOT / file).read_bytes() for file in files if (ROOT / file).is_file()}
    assert {file: n for file, text in texts.items() if (n := text.count(name_of(URL).encode()))} == PLACES


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_badge_opens_its_notebook(path):
    text = "".join(json.loads(path.read_text())["cells"][0]["source"])
    link = f"https://colab.research.google.com/github/{name_of(URL)}/blob/main/colab/{path.name}"
    assert f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({link})" in text


def test_new_address_is_written_everywhere_and_nothing_else_changes(copy, capsys):
    move(copy, NEW)
    expected = {
        place: text.replace(name_of(URL).encode(), name_of(NEW).encode()) for place, text in contents(ROOT).items()
    }
    address.main([], copy)
    assert contents(copy) == expected
    assert len(capsys.readouterr().out.splitlines()) == len(PLACES) - 1  # setup.cfg is the source
    address.main([], copy)
    assert contents(copy) == expected
    assert capsys.readouterr().out == ""
    address.main(["--check"], copy)


def test_check_names_the_files_and_the_command_and_changes_nothing(copy):
    notebook = copy / "colab" / "images.ipynb"
    notebook.write_text(notebook.read_text().replace(f'REPOSITORY = \\"{URL}', f'REPOSITORY = \\"{NEW}'))
    before = contents(copy)
    with pytest.raises(SystemExit) as end:
        address.main(["--check"], copy)
    assert end.value.code == "not the address in setup.cfg: colab/images.ipynb; run python -m colab.address"
    assert contents(copy) == before


@pytest.mark.parametrize("url", ["", "https://example.org/a/b", "https://github.com/a", "git@github.com:a/b"])
def test_address_must_be_a_github_repository(copy, url):
    move(copy, url)
    with pytest.raises(SystemExit, match=r"^setup.cfg: url = .* must be https://github.com/OWNER/NAME$"):
        address.main([], copy)


# The first cell of the notebooks.


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def first_cell(request, monkeypatch):
    """Runs the first code cell in a folder; returns its shell commands. `clone` stands in for git."""
    source = next(
        "".join(c["source"]) for c in json.loads(request.param.read_text())["cells"] if c["cell_type"] == "code"
    )
    program = re.sub(r"^(\s*)[!%](.*)$", r"\1shell(f'''\2''')", source, flags=re.MULTILINE)

    def run(folder, *, clone=lambda: None, installed=True):
        def shell(command):
            commands.append(command)
            if "git clone" in command:
                clone()

        commands = []
        monkeypatch.chdir(folder)
        monkeypatch.setattr("importlib.metadata.distributions", lambda name: ["lvae_jax"] * installed)
        exec(program, {"shell": shell})
        return commands

    return run


def make_code(folder):
    (folder / "experiments").mkdir(parents=True)
    (folder / "experiments" / "sigma_sweep.py").touch()
    (folder / "colab").mkdir()
    return folder


@pytest.mark.parametrize("start", ["code/colab", "code", "."], ids=["in colab", "in the root", "beside an upload"])
@pytest.mark.parametrize("installed", [True, False])
def test_first_cell_finds_code_that_is_there(first_cell, tmp_path, start, installed):
    code = make_code(tmp_path / "code")
    commands = first_cell(tmp_path / start, installed=installed)
    assert Path.cwd() == code
    assert len(commands) == (0 if installed else 1)
    assert all(command.startswith("pip install ") for command in commands)


def test_first_cell_clones_where_there_is_no_code(first_cell, tmp_path):
    clone, install = first_cell(tmp_path, clone=lambda: make_code(tmp_path / "lvae_jax"), installed=False)
    assert Path.cwd() == tmp_path / "lvae_jax"
    assert clone.endswith(f"git clone --quiet --depth 1 {URL} lvae_jax")
    assert install.startswith("pip install ")
    assert first_cell(tmp_path) == []  # a restarted machine keeps the clone
    assert Path.cwd() == tmp_path / "lvae_jax"


def test_first_cell_says_what_to_do_if_cloning_fails(first_cell, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"could not clone {URL}: set REPOSITORY .*upload the folder") as error:
        first_cell(tmp_path)
    assert str(tmp_path) in str(error.value)
