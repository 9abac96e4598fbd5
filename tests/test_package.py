"""What is shipped: the files of both archives, and what importing does to a process."""

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

# absl arrives with flax; its flags and its app stay out of an importing program's way.
SMOKE = """
import sys
import jax
before = dict(jax.config.values)
import lvae_jax as lv
assert dict(jax.config.values) == before, "importing changes jax.config"
loaded = {name.partition(".")[0] for name in sys.modules}
assert not loaded & {"experiments", "matplotlib", "orbax", "PIL", "tensorflow", "tensorflow_datasets", "tqdm"}, loaded
assert not {"absl.app", "scipy.stats"} & set(sys.modules)
assert "flax.linen" in sys.modules
head = lv.learned_scalar()
vae = lv.mlp_vae((2,), head, latent_size=2)
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


def test_importing_is_light_prints_nothing_and_changes_nothing(tmp_path):
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
def test_archives_are_complete(archives):
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
def test_wheel_works_in_an_empty_environment(archives, tmp_path):
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
