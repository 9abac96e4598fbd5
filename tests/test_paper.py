"""The paper's report: from made-up parts in a moment, and, marked slow, a small scale from end to end."""

import contextlib
import functools
import importlib
import io
import json
import re
import shlex
import shutil
import typing
from html.parser import HTMLParser

import numpy as np
import PIL.Image
import pytest
from conftest import call, filled

from experiments import claims, command, hypersphere, page, paper, quality, sigma_sweep, sweep, tables
from experiments.results import Headroom, HeadroomRow, Member, Quality, Realism, Row, SphereRow, SphereSummary, Summary
from experiments.variants import VARIANTS
from lvae_jax import runs


class Reader(HTMLParser):
    """The tags of a page, and whether they are closed in order."""

    VOID = ("meta", "img", "br", "hr")

    def __init__(self, text):
        super().__init__()
        self.tags = set()
        self.images, self.headings, self.open, self.cells, self.text = [], [], [], 0, ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            self.images.append(dict(attrs))
        self.tags.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        self.cells += tag == "td"

    def handle_endtag(self, tag):
        if tag not in self.VOID:  # <img /> comes here too
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] in ("h1", "h2", "h3"):
            self.headings.append(data)


def test_command_of_each_part():
    line = paper.command_line(sigma_sweep.configure(dataset="mnist", sigma=(0.7071,), num_steps=7, fake_data=True))
    assert line == "python -m experiments.sigma_sweep --sigma=0.7071 --dataset=mnist --num_steps=7 --fake_data"
    line = paper.command_line(hypersphere.Config(dims=(3, 4), num_seeds=5))
    assert line == "python -m experiments.hypersphere --dims=3,4 --num_seeds=5"
    assert paper.command_line(sigma_sweep.configure()) == "python -m experiments.sigma_sweep"
    line = paper.command_line(sigma_sweep.configure(dataset="mnist", discretise=False))
    assert line == "python -m experiments.sigma_sweep --dataset=mnist --density"
    line = paper.command_line(sigma_sweep.configure(dataset="mnist", dequantize=True))
    assert line == "python -m experiments.sigma_sweep --dataset=mnist --dequantize", "which implies densities"


def test_scales():
    for parts in paper.SCALES.values():
        assert set(parts) <= set(paper.PARTS)
        assert {"f", "ls", "lv", *claims.ANNEALED} <= set(parts["toy"].variants)
        for name, config in parts.items():
            if name in claims.IMAGES:
                assert not config.discretise, "as in the paper"
                assert {"f", "ls", "lv", "lv_star"} <= set(config.variants)
            assert name not in claims.CODES or config.discretise
    assert len(paper.SCALES["cpu"]["toy"].sigma) == 5
    assert {config.num_seeds for config in (paper.SCALES["cpu"]["toy"], *paper.SCALES["full"].values())} == {10}
    assert paper.SCALES["full"]["mnist"].num_steps == 1000 * 60_000 // 100
    assert paper.SCALES["full"]["celeb_a"].num_steps == 200 * -(-162_770 // 100)


def test_page_needs_no_other_file():
    text = "# Title\n\n| a | b |\n| --- | --- |\n| 1 \\| 2 | < 3 |\n\n![one](figures/one.png)\n"
    reader = Reader(page.html(text, {"figures/one.png": b"\x89PNG"}))
    assert not reader.open, "every tag is closed"
    assert reader.headings == ["Title"]
    assert reader.cells == 2
    assert reader.images == [{"alt": "one", "src": "data:image/png;base64,iVBORw=="}]


HOSTILE = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "![i](https://a.b/c.png) [j](javascript:k) <https://a.b>",
    "`code` *stars* _lines_ a \\* | b &lt; &copy",
    "line one\n\n# heading\n\n- item",
)


@pytest.mark.parametrize("text", HOSTILE)
def test_strings_of_files_are_shown_as_they_are(text):
    """In every string of what was measured: nobody's browser may run them."""

    def hostile(kind, /, **given):
        texts = [name for name, hint in typing.get_type_hints(kind).items() if hint is str and name not in given]
        return filled(kind, **dict.fromkeys(texts, text), **given)

    made = [hostile(Row, variant=variant, num_seeds=1, is_code=True) for variant in ("f", "ls")]
    members = [hostile(Member, variant=variant) for variant in ("f", "ls")]
    summary = hostile(Summary, rows=made, members=members, kind="discretised", levels=256, histograms={text: 1.0})
    sphere = hostile(SphereSummary, rows=[hostile(SphereRow, variant="f", num_seeds=1)])
    scores = hostile(Quality, rows=[hostile(Realism)], num_seeds=1)
    gains = hostile(Headroom, rows=[hostile(HeadroomRow, variant="f")])
    parts = {"digits": claims.Part(summary, {})}
    finished = claims.Finished(sphere, parts, quality={"digits": scores}, headroom={"digits": gains})
    found = [claims.Claim("C1", text, [claims.Check(text, True, text)])]
    composed = page.compose("smoke", found, finished, commands=dict.fromkeys(("sphere", "digits"), "c"), times={})
    drawn = {name: b"" for part in ("sphere", "digits") for name in re.findall(rf"figures/{part}-\w+.png", composed)}
    reader = Reader(page.html(composed, drawn))
    assert not reader.open
    assert not {"script", "a"} & reader.tags
    assert {image["src"] for image in reader.images} == {"data:image/png;base64,"}
    assert len(reader.headings) == 9
    assert " ".join(reader.text.split()).count(" ".join(text.split())) == 14
    assert composed.count("\n\n# ") == 0


def test_palette_keeps_colours_of_thin_lines(tmp_path):
    pixels = np.random.default_rng(0).normal(128.0, 40.0, (200, 200, 3)).clip(0, 255).astype(np.uint8)
    pixels[:20] = np.eye(3, dtype=np.uint8)[np.arange(200) % 3] * 200  # a few of three pure hues
    (tmp_path / "toy" / "figures").mkdir(parents=True)
    for name in page.TOY_FIGURES:
        PIL.Image.fromarray(pixels).save(tmp_path / "toy" / "figures" / f"{name}.png")
    drawn = page.figures(tmp_path, ["toy"])
    assert set(drawn) == {f"figures/toy-{name}.png" for name in page.TOY_FIGURES}
    assert page.figures(tmp_path, ["digits"]) == {}, "none where none was drawn"
    png = drawn["figures/toy-elbo.png"]
    assert len(png) < 0.5 * (tmp_path / "toy" / "figures" / "elbo.png").stat().st_size
    with PIL.Image.open(io.BytesIO(png)) as image:
        error = np.abs(np.asarray(image.convert("RGB")).astype(int) - pixels)
    assert error[:20].max() <= 32
    assert error[0, 0].max() == 0, "the background keeps its colour"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parts": ["toys"]}, "--parts=toys: give some of sphere, toy, toy_plain, ribbon, toy_range, digits"),
        ({"parts": ["celeb_a"]}, "--parts=celeb_a: give some of sphere, toy, toy_plain, ribbon, toy_range, digits"),
        ({"parts": []}, "--parts=: give some of"),
    ],
)
def test_unknown_parts_are_refused(tmp_path, options, message):
    with pytest.raises(command.UsageError, match=message):
        paper.run("smoke", run_dir=str(tmp_path / "run"), **options)
    assert not (tmp_path / "run").exists()


def test_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / "report.md").write_text("mine")
    with pytest.raises(runs.RunError, match=r"is not a run directory and holds report\.md"):
        paper.run("smoke", run_dir=str(tmp_path))
    assert [file.name for file in tmp_path.iterdir()] == ["report.md"]


@pytest.fixture(scope="module")
def smoke(toy_run, tmp_path_factory):
    """What the command of the smoke scale leaves and prints, with the toy of `toy_run`, and of the rest a few steps."""
    path, stdout = tmp_path_factory.mktemp("paper") / "run", io.StringIO()
    parts = {"toy": sweep.read_run(toy_run.path)[0]}
    parts["sphere"] = hypersphere.Config(dims=(2,), sigma=(0.5, 1.3), num_seeds=1, num_steps=3)
    for name in ("toy_plain", "ribbon", claims.TOY_RANGE, "digits", "digits_codes"):
        config = paper.SCALES["smoke"][name]
        parts[name] = config._replace(num_steps=3, num_blocks=1, widths=(4, 4)[: len(config.widths)])
    runs.make_run(path, {"scale": "smoke"})
    shutil.copytree(toy_run.path, path / "toy")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(paper.SCALES, "smoke", {name: parts[name] for name in paper.SCALES["smoke"]})
        patch.setattr(quality, "run", functools.partial(quality.run, classifier_steps=10))
        with contextlib.redirect_stdout(stdout):
            call(paper, ["--scale=smoke", f"--run_dir={path}"])
        yield path, stdout.getvalue()


@pytest.mark.slow
def test_report_has_every_claim(smoke):
    path, printed = smoke
    text, page_text = (path / "report.md").read_text(), (path / "report.html").read_text()
    reader = Reader(page_text)
    assert not reader.open
    own = ("Perspective 1", "Perspective 2", "Annealing", "All sigmas", "Maps")
    for name in (*(f"C{number}" for number in range(1, 9)), *own):
        assert f"### {name}: " in text
        assert any(heading.startswith(f"{name}: ") for heading in reader.headings)
        assert f"\n{name} " in printed
    assert "its verdicts say nothing of the paper" in text
    for config in paper.SCALES["smoke"].values():
        for variant in getattr(config, "variants", ()):
            assert f"| {tables.literal(VARIANTS[variant].title)} | " in text
    assert text.count("| histogram of each pixel | ") == 2, "by densities and by probabilities"
    assert len(reader.images) == 2 + 4 + 1 + 3 + 3 + 3 * 2 + 1 + 2, (
        "of the parts, of three second stages, the ribbon and one run"
    )
    assert "### ribbon" in text
    assert "### digits: headroom" in text
    for image in reader.images:
        assert image["src"].startswith("data:image/png;base64,")
        assert image["alt"]
    assert all((path / name).read_bytes()[:4] == b"\x89PNG" for name in page.figures(path, ["toy"]))
    assert "nan" not in text.lower().split()


@pytest.mark.slow
def test_finished_parts_are_found(smoke, monkeypatch, capsys):
    """By the command of the scale and by that of each part."""
    path, _ = smoke
    before = {file: file.stat().st_mtime_ns for part in paper.SCALES["smoke"] for file in (path / part).rglob("*")}
    times = json.loads((path / "times.json").read_text())
    for module in (sigma_sweep, hypersphere):
        monkeypatch.delattr(module, "train_all")
    call(paper, ["--scale=smoke", f"--run_dir={path}"])
    assert capsys.readouterr().out.count("is finished") == 7 + 3 + 1, "parts, second stages and headroom"
    assert json.loads((path / "times.json").read_text()).keys() == times.keys()
    for name, config in paper.SCALES["smoke"].items():
        _, _, program, *words = shlex.split(paper.command_line(config))
        call(importlib.import_module(program), [*words, f"--run_dir={path / name}"])
        assert "is finished" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in before} == before


@pytest.mark.slow
def test_interrupted_scale(smoke, tmp_path, monkeypatch):
    """It goes on where it was, to the same report."""
    path = shutil.copytree(smoke[0], tmp_path / "run", ignore=shutil.ignore_patterns("report.*", "toy_plain"))
    kept = {file: file.stat().st_mtime_ns for file in path.glob("*/*")}
    run_part, started = paper.run_part, []

    def interrupted(scale, name, *others):
        started.append(name)
        if name == "toy_plain":
            raise KeyboardInterrupt
        run_part(scale, name, *others)

    monkeypatch.setattr(paper, "run_part", interrupted)
    with pytest.raises(KeyboardInterrupt):
        paper.run("smoke", run_dir=str(path), echo=lambda line: None)
    assert started == ["sphere", "toy", "toy_plain"]
    assert not (path / "report.md").exists()
    monkeypatch.setattr(paper, "run_part", run_part)
    paper.run("smoke", run_dir=str(path), echo=lambda line: None)
    assert {file: file.stat().st_mtime_ns for file in kept if file.parent.name != "figures"} == {
        file: time for file, time in kept.items() if file.parent.name != "figures"
    }, "what was finished was not run again"

    def timeless(report):
        return re.sub(r"\| [\d.]+ \| 1 x cpu", "| 1 x cpu", report.read_text())

    assert timeless(path / "report.md") == timeless(smoke[0] / "report.md")


@pytest.mark.slow
def test_report_of_some_parts(smoke, tmp_path):
    ignored = shutil.ignore_patterns("report.*", "toy*", "ribbon", "digits*")
    path = shutil.copytree(smoke[0], tmp_path / "run", ignore=ignored)
    found = paper.run("smoke", parts=["sphere"], run_dir=str(path), echo=lambda line: None)
    assert [claim.verdict == "not run" for claim in found] == [False, *12 * [True]]
    text = (path / "report.md").read_text()
    assert text.count("**not run**") == 12 + 6, "claims and parts"
