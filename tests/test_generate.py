"""Samples, interpolations and reconstructions of finished runs: by the weights that were scored, without the data."""

import contextlib
import functools
import json
import os
import shutil
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import scipy.stats
from conftest import arrays_in, call, run_command

from experiments import command, generate, loop, sigma_sweep, sweep
from experiments.programs import Programs
from lvae_jax import datasets, figures, images, likelihoods, networks, runs, training
from lvae_jax import vae as vae_lib

pytestmark = pytest.mark.usefixtures("plain_sweep")

IMAGES = sigma_sweep.configure(
    dataset="celeb_a", image_size=8, fake_data=True, variants=("lv",), num_seeds=2, num_steps=10
)._replace(batch_size=16, latent_size=3, widths=(4, 8), num_blocks=1)


@pytest.fixture(scope="module")
def toy(toy_run, tmp_path_factory):
    """A copy of the run, to write into."""
    return shutil.copytree(toy_run.path, tmp_path_factory.mktemp("toy") / "run")


@pytest.fixture(scope="module")
def image_run(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("images") / "run"
    sigma_sweep.run(IMAGES, run_dir=str(run_dir), echo=lambda line: None)
    return run_dir


@pytest.fixture(scope="module")
def photos():
    return images.fake_images((8, 8, 3))[1][:11]


@contextlib.contextmanager
def data_out_of_reach():
    """Also as a stream or a fake."""

    def refuse(*arguments, **options):
        raise AssertionError("the data set is not needed")

    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((datasets, "load"), (datasets, "toy_stream"), (images, "fake_images")):
            patch.setattr(module, name, refuse)
        yield


@pytest.fixture
def no_data():
    with data_out_of_reach():
        yield


def run(run_dir, **options):
    return generate.run(str(run_dir), echo=lambda line: None, **options)


def restored(run_dir, member):
    """The member's weights and model, by the programs that trained it."""
    config, _ = sweep.read_run(run_dir)
    dataset = datasets.load(config.dataset, **sweep.data_options(config))
    model = sweep.model(config, member.variant, dataset.form)
    programs = Programs(dataset, model, num_steps=config.num_steps, beta=1.0, ema_decay=config.ema_decay)
    file = run_dir / "ls_sigma.npy"
    record = np.load(file) if file.exists() else None
    groups = sweep.groups(config, member.variant, record)
    group = next(group for group in groups if group.name == member.group)
    states, *_ = loop.start(run_dir, group, programs, num_steps=config.num_steps)
    return jax.tree.map(lambda leaf: leaf[member.member], states.weights), model(
        jnp.asarray(group.sigmas[member.member])
    )


def members_of(run_dir, **wanted):
    _, summary = sweep.read_run(run_dir)
    return [
        member for member in summary.members if all(getattr(member, name) == value for name, value in wanted.items())
    ]


def test_images_by_trained_weights(image_run, photos, tmp_path):
    np.save(tmp_path / "photos.npy", photos)
    run(image_run, out=str(tmp_path / "out"), seeds=[1], images=[str(tmp_path / "photos.npy")], num_samples=5)
    member = members_of(image_run, seed=1)[0]
    arrays = arrays_in(tmp_path / "out" / f"{generate.file_name(member)}.npz")
    params, vae = restored(image_run, member)
    x = datasets.to_float(photos)
    np.testing.assert_array_equal(arrays["images"], x)
    expected = jax.jit(functools.partial(vae_lib.reconstruct, vae))(params, x)
    np.testing.assert_array_equal(arrays["reconstructions"], expected[0])
    np.testing.assert_array_equal(arrays["reconstruction_stddevs"], expected[1])
    key = jax.random.split(jax.random.key(0))[0]
    expected = jax.jit(functools.partial(vae_lib.generate, vae=vae, num_samples=5))(key, params=params)
    for name, value in zip(("samples", "means", "stddevs"), expected, strict=True):
        np.testing.assert_array_equal(arrays[name], value)
    # From each of the first nine images to the next: the ends are their reconstructions.
    assert arrays["interpolations"].shape == (8, 8, 8, 8, 3)
    for name in ("interpolations", "interpolation_stddevs"):
        whole = arrays[name.replace("interpolation", "reconstruction")]
        np.testing.assert_allclose(arrays[name][:, 0], whole[:8], atol=1e-6)
        np.testing.assert_allclose(arrays[name][:, -1], whole[1:9], atol=1e-6)


def test_command(image_run, photos, tmp_path):
    for name, photo in zip("ab", photos, strict=False):
        PIL.Image.fromarray(photo).save(tmp_path / f"{name}.png")
    result = run_command(
        "experiments.generate",
        f"--run_dir={image_run}",
        f"--out={tmp_path / 'out'}",
        "--variant=lv",
        "--seed=0,1",
        f"--images={tmp_path / 'a.png'},{tmp_path / 'b.png'}",
        "--num_samples=10",
        "--key_seed=5",
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    record = json.loads((tmp_path / "out" / "generated.json").read_text())
    assert record["files"] == ["lv-seed0", "lv-seed1"]
    assert (record["unit"], record["shape"], record["key_seed"]) == ("pixel on [0, 1]", [8, 8, 3], 5)
    titles = [f"LV-VAE, sigma = {member.sigma:.3g}, seed {member.seed}" for member in members_of(image_run)]
    assert [line.split(":")[0] for line in result.stdout.splitlines()] == titles
    arrays = arrays_in(tmp_path / "out" / "lv-seed1.npz")
    assert arrays["samples"].shape == (10, 8, 8, 3)
    assert arrays["interpolations"].shape == (1, 8, 8, 8, 3)
    np.testing.assert_array_equal(arrays["images"], np.asarray(datasets.to_float(photos[:2])))
    assert np.ptp(arrays["stddevs"]) > 0


@pytest.mark.parametrize("variant", ["f", "lv", "replay"])
def test_toy_samples_by_trained_weights(toy, tmp_path, variant):
    member = members_of(toy, variant=variant, seed=4)[-1]  # not the first of its group
    run(toy, out=str(tmp_path), variants=[variant], seeds=[4], num_samples=50, key_seed=7)
    arrays = arrays_in(tmp_path / f"{generate.file_name(member)}.npz")
    params, vae = restored(toy, member)
    key = jax.random.split(jax.random.key(7))[0]
    expected = jax.jit(functools.partial(vae_lib.generate, vae=vae, num_samples=50))(key, params=params)
    for name, value in zip(("samples", "means", "stddevs"), expected, strict=True):
        assert arrays[name].dtype == np.float32
        np.testing.assert_array_equal(arrays[name], value)


def test_weights_are_those_that_the_summary_scored(toy):
    """The average of the weights, not the last ones: their ELBOs on the test split, again."""
    dataset, (config, _) = datasets.load("toy"), sweep.read_run(toy)
    for variant in ("f", "lv"):
        weights = sweep.restore(toy, config, variant, variant, datasets.Form((2,)))
        (group,) = sweep.groups(config, variant, None)
        model = sweep.model(config, variant, datasets.Form((2,)))
        programs = Programs(dataset, model, num_steps=config.num_steps, beta=1.0)
        scores, *_ = programs.evaluate(group, training.TrainState(None, weights, None))
        elbos = [member.elbo for member in members_of(toy, variant=variant)]
        np.testing.assert_allclose(scores.elbo.mean(axis=-1), elbos, rtol=1e-6)


@pytest.fixture(scope="module")
def by_default(toy):
    """What generated.json holds, beside the files."""
    with data_out_of_reach():
        return run(toy, num_samples=200)


def test_default_is_first_seed_of_every_row(toy, by_default):
    folder, record = toy / "generated", by_default
    variants = ("ls", "lv", "optimal", "f_star", "replay", "geometric", "kl_warmup")
    names = ["f-1.0-seed3", "f-0.1-seed3", *(f"{variant}-seed3" for variant in variants)]
    assert record.to_json() == json.loads((folder / "generated.json").read_text())
    assert record.files == names
    assert (record.unit, record.shape) == ("toy length", [2])
    wanted = {f"{name}.{ending}" for name in names for ending in ("npz", "png")} | {"generated.json"}
    assert {file.name for file in folder.iterdir()} == wanted
    for name in names:
        with PIL.Image.open(folder / f"{name}.png") as image:
            assert len(np.unique(np.asarray(image.convert("L")))) > 50


def test_sigma_is_that_of_the_member(toy, by_default):
    record = np.load(toy / "ls_sigma.npy")
    stddevs = {name: arrays_in(toy / "generated" / f"{name}.npz")["stddevs"] for name in by_default.files}
    for name, sigma in {
        "f-1.0-seed3": 1.0,
        "f-0.1-seed3": 0.1,
        "ls-seed3": members_of(toy, variant="ls", seed=3)[0].sigma,
        "f_star-seed3": record[0, -1],
        "replay-seed3": record[0, -1],
    }.items():
        np.testing.assert_allclose(stddevs[name], sigma, rtol=1e-6)
    assert len(np.unique(stddevs["lv-seed3"])) > 200


def test_ls_sigma_need_not_be_there(toy, tmp_path, no_data):
    """sigma, that of f_star and replay too, is in the checkpoints."""
    copy = shutil.copytree(toy, tmp_path / "run", ignore=shutil.ignore_patterns("generated", "ls_sigma.npy"))
    sigma = np.load(toy / "ls_sigma.npy")[1, -1]
    run(copy, variants=["f_star", "replay"], seeds=[4], num_samples=3)
    for variant in ("f_star", "replay"):
        np.testing.assert_allclose(arrays_in(copy / "generated" / f"{variant}-seed4.npz")["stddevs"], sigma, rtol=1e-6)


def test_samples_have_their_means_and_stddevs(toy, tmp_path, no_data):
    run(toy, out=str(tmp_path), variants=["f", "lv"], num_samples=3000)
    noises = []
    for name in ("f-1.0-seed3", "f-0.1-seed3", "lv-seed3"):
        arrays = arrays_in(tmp_path / f"{name}.npz")
        noises.append((arrays["samples"] - arrays["means"]) / arrays["stddevs"])
        assert scipy.stats.kstest(noises[-1].ravel(), "norm").pvalue > 0.01
        assert len(np.unique(arrays["means"], axis=0)) > 2900, "a z of its own for each"
    np.testing.assert_allclose(noises[0], noises[1], atol=1e-4)
    np.testing.assert_allclose(noises[0], noises[2], atol=1e-4)


def test_same_command_writes_same_bytes(toy, tmp_path, no_data):
    options = {"out": str(tmp_path), "variants": ["lv"], "num_samples": 5}
    run(toy, **options)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    run(toy, **options)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before
    run(toy, **options | {"out": str(tmp_path / "other"), "key_seed": 1})
    first, other = (arrays_in(folder / "lv-seed3.npz")["means"] for folder in (tmp_path, tmp_path / "other"))
    assert not np.isin(first, other).any()


def transparent_vae():
    """z is the mean of p(x|z), and x that of q(z|x)."""
    encoder = networks.Encoder(lambda key: {}, lambda params, x: (x, jnp.zeros(x.shape)))
    decoder = networks.Decoder(lambda key: {}, lambda params, z: z[..., None])
    return vae_lib.VAE(encoder, decoder, likelihoods.fixed(0.1), 2)


def test_paths_between_prior_draws(monkeypatch):
    monkeypatch.setattr(generate, "NUM_PATHS", 5000)
    vae = transparent_vae()
    params = vae_lib.init(jax.random.key(0), vae)
    for x in (None, jnp.ones((1, 2))):  # a single image has no neighbour
        arrays = generate.pictures(jax.random.key(1), vae=vae, params=params, x=x, num_samples=5000)
        z = np.asarray(arrays["interpolations"])
        assert z.shape == (5000, 8, 2)
        for point in range(8):
            assert scipy.stats.kstest(z[:, point].ravel(), "norm").pvalue > 0.01
        # An ellipse around the origin: z'' = -(pi / 2)^2 z, here in equal steps of pi / 14.
        np.testing.assert_allclose(z[:, :-2] + z[:, 2:], 2 * np.cos(np.pi / 14) * z[:, 1:-1], atol=1e-5)
        draws = [z[:, 0], z[:, -1], np.asarray(arrays["means"])]
        correlations = np.corrcoef(np.stack([draw.ravel() for draw in draws]))
        assert np.abs(correlations - np.eye(3)).max() < 0.05, "the ends, and the samples' z, are independent"


def test_scores_of_images(image_run, photos, tmp_path):
    """The codes are the posteriors'; the ELBOs are those of other draws, up to chance."""
    noise = np.random.default_rng(0).integers(0, 256, photos[:1].shape, np.uint8)
    np.save(tmp_path / "photos.npy", np.concatenate([photos, noise]))
    run(image_run, out=str(tmp_path / "out"), images=[str(tmp_path / "photos.npy")], num_samples=1)
    arrays = arrays_in(tmp_path / "out" / "lv-seed0.npz")
    params, vae = restored(image_run, members_of(image_run, seed=0)[0])
    x = jnp.asarray(arrays["images"])
    mean, log_stddev = jax.jit(functools.partial(vae_lib.encode, vae))(params, x)
    np.testing.assert_allclose(arrays["codes"], mean, atol=1e-6)
    np.testing.assert_allclose(arrays["code_stddevs"], np.exp(log_stddev), rtol=1e-5)
    keys = jax.random.split(jax.random.key(9), (200, 12))
    elbo = jax.jit(lambda keys: vae_lib.elbo(keys, vae, params, x).elbo)
    draws = np.stack([elbo(each) for each in keys])
    error = 5.0 * draws.std(axis=0) * np.sqrt(1 / 16 + 1 / 200)
    assert (np.abs(arrays["elbos"] - draws.mean(axis=0)) < error + 1e-3).all()
    np.testing.assert_allclose(arrays["elbos"], arrays["log_likelihoods"] - arrays["kls"], rtol=1e-5)


@pytest.mark.parametrize(("size", "num_paths"), [(2, 1), (9, 8), (12, 8)])
def test_paths_between_images(size, num_paths):
    vae = transparent_vae()
    x = jax.random.normal(jax.random.key(0), (size, 2))
    params = vae_lib.init(jax.random.key(0), vae)
    z = generate.pictures(jax.random.key(1), vae=vae, params=params, x=x, num_samples=1)["interpolations"]
    expected = np.stack([np.linspace(x[i], x[i + 1], 8) for i in range(num_paths)])
    np.testing.assert_allclose(z, expected, atol=1e-6)


def test_images_from_files(photos, tmp_path):
    """A .npy, a PNG, a JPEG, and a folder in the order of its names; the JPEG as Pillow reads it."""
    np.save(tmp_path / "two.npy", photos[:2])
    PIL.Image.fromarray(photos[2]).save(tmp_path / "three.png")
    PIL.Image.fromarray(photos[3]).save(tmp_path / "four.JPG", format="JPEG")
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, photo in (("b.png", photos[5]), ("a.png", photos[4]), ("._a.png", photos[6])):
        PIL.Image.fromarray(photo).save(folder / name)
    (folder / "notes.txt").write_text("not an image")
    sources = [str(tmp_path / name) for name in ("two.npy", "three.png", "four.JPG", "folder")]
    read = generate.read_images(sources, datasets.Form((8, 8, 3), 256))
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read[[0, 1, 2, 4, 5]], photos[[0, 1, 2, 4, 5]])
    np.testing.assert_array_equal(read[3], np.asarray(PIL.Image.open(tmp_path / "four.JPG")))
    assert len(read) == 6

    grey = photos[0][..., :1]
    PIL.Image.fromarray(grey[..., 0]).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(
        generate.read_images([str(tmp_path / "grey.png")], datasets.Form((8, 8, 1), 256)), grey[None]
    )


def test_points_from_a_file(toy, tmp_path, no_data):
    points = np.random.default_rng(0).normal(size=(30, 2))
    np.save(tmp_path / "points.npy", points)
    run(toy, out=str(tmp_path / "out"), variants=["lv"], images=[str(tmp_path / "points.npy")])
    arrays = arrays_in(tmp_path / "out" / "lv-seed3.npz")
    np.testing.assert_array_equal(arrays["images"], points.astype(np.float32))
    assert arrays["reconstructions"].shape == (30, 2)
    np.testing.assert_allclose(arrays["interpolations"][:, 0], arrays["reconstructions"][:8], atol=1e-5)


BAD_IMAGES = {
    "nowhere.png": "no such file",
    "empty_folder": "no PNG or JPEG",
    "text.png": "cannot be read as",
    "cut.png": "cannot be read as",
    "cut.npy": "cannot be read as",
    "empty.npy": "cannot be read as",
    "pickled.npy": "cannot be read as",
    "archive.npy": "cannot be read as",
    "garbled.npy": "cannot be read as",
    "endless.npy": "cannot be read as",
    "small.png": "4 x 4 pixels, scale it to 8 x 8",
    "grey.png": "are 8-bit grey, save it in 8-bit RGB",
    "palette.png": "mode P",
    "transparent.png": "mode RGBA",
    "deep.png": "16-bit, save it in 8-bit RGB",
    "deep_colours.png": "16-bit, save it in 8-bit RGB",
    "animated.png": "an animation of 3 frames",
    "float.npy": "uint8",
    "one.npy": "not [8, 8, 3]",
    "none.npy": "not [0, 8, 8, 3]",
}


def deep_png(pixels):
    """A PNG file of RGB with 16 bits each, which Pillow does not write."""

    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = b"".join(size.to_bytes(4, "big") for size in pixels.shape[1::-1]) + bytes([16, 2, 0, 0, 0])
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in pixels)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(lines)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.fixture(scope="module")
def bad_images(tmp_path_factory, photos):
    folder = tmp_path_factory.mktemp("bad")
    (folder / "empty_folder").mkdir()
    (folder / "text.png").write_text("no image")
    image = PIL.Image.fromarray(photos[0])
    image.save(folder / "cut.png")
    np.save(folder / "cut.npy", photos)
    for name in ("cut.png", "cut.npy"):
        os.truncate(folder / name, (folder / name).stat().st_size // 2)
    (folder / "empty.npy").touch()
    np.save(folder / "pickled.npy", np.array([{}], dtype=object), allow_pickle=True)
    with open(folder / "archive.npy", "wb") as file:
        np.savez(file, photos)
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000000000, 8, 8, 3), }"
    for name, text in (("garbled", header.replace(b"(", b"[")), ("endless", header)):
        text = text.ljust(117) + b"\n"
        (folder / f"{name}.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text)
    image.resize((4, 4)).save(folder / "small.png")
    image.convert("L").save(folder / "grey.png")
    image.convert("P").save(folder / "palette.png")
    image.convert("RGBA").save(folder / "transparent.png")
    PIL.Image.fromarray(np.zeros((8, 8), np.uint16)).save(folder / "deep.png")
    (folder / "deep_colours.png").write_bytes(deep_png(photos[0].astype(np.uint16) * 257))
    frames = [PIL.Image.fromarray(photo) for photo in photos[:3]]
    frames[0].save(folder / "animated.png", save_all=True, append_images=frames[1:])
    np.save(folder / "float.npy", photos / 255.0)
    np.save(folder / "one.npy", photos[0])
    np.save(folder / "none.npy", photos[:0])
    return folder


@pytest.fixture
def nothing_computed(monkeypatch):
    monkeypatch.setattr(generate, "pictures", lambda *arguments, **options: pytest.fail("compiled"))


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_bad_images_are_refused(image_run, bad_images, tmp_path, nothing_computed, name):
    with pytest.raises(command.UsageError) as error:
        run(image_run, out=str(tmp_path / "out"), images=[str(bad_images / name)])
    assert BAD_IMAGES[name] in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_random_damage_of_files(photos, tmp_path):
    """Whatever Pillow or numpy make of a damaged file."""
    rng = np.random.default_rng(0)
    PIL.Image.fromarray(photos[0]).save(tmp_path / "whole.png")
    PIL.Image.fromarray(photos[0]).save(tmp_path / "whole.jpg")
    np.save(tmp_path / "whole.npy", photos)
    for name in ("whole.png", "whole.jpg", "whole.npy"):
        whole = np.frombuffer((tmp_path / name).read_bytes(), np.uint8)
        for trial in range(200):
            damaged = whole.copy()
            damaged[rng.integers(len(whole), size=1 + trial % 4)] ^= rng.integers(1, 256, dtype=np.uint8)
            file = tmp_path / f"damaged{Path(name).suffix}"
            file.write_bytes(damaged.tobytes())
            with contextlib.suppress(command.UsageError):
                assert generate.read_images([str(file)], datasets.Form((8, 8, 3), 256)).shape[1:] == (8, 8, 3)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (np.full((3, 2), np.nan), "finite"),
        (np.full((3, 2), 1e300), "finite"),
        (np.zeros((3, 3)), "not [3, 3]"),
        (np.zeros((3, 2), complex), "not complex128"),
        (np.zeros((3, 2), bool), "not bool"),
    ],
)
def test_bad_points_are_refused(toy, tmp_path, nothing_computed, points, message):
    np.save(tmp_path / "points.npy", points)
    with pytest.raises(command.UsageError) as error:
        run(toy, out=str(tmp_path / "out"), images=[str(tmp_path / "points.npy")])
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variants": ["vq"]}, "--variant=vq is not in the run, which has f, ls, lv, optimal, f_star, replay"),
        ({"sigmas": [0.2]}, "--sigma=0.2 is not in the run, which has 1.0, 0.1"),
        ({"seeds": [0]}, "--seed=0 is not in the run, which has 3, 4"),
        ({"variants": ["ls"], "sigmas": [0.1]}, "--sigma chooses among F-VAEs"),
        ({"num_samples": 0}, "at least 1"),
        ({"num_samples": 10**12}, "--num_samples=1000000000000: needs at least 21.8 TiB of memory"),
        ({"key_seed": -1}, "from 0"),
        ({"key_seed": 2**31}, "from 0"),
    ],
)
def test_unknown_members_are_refused(toy, tmp_path, nothing_computed, options, message):
    with pytest.raises(command.UsageError) as error:
        run(toy, out=str(tmp_path / "out"), **options)
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "files"),
    [
        ({"sigmas": [0.1], "seeds": [4, 3]}, ["f-0.1-seed3", "f-0.1-seed4"]),
        ({"variants": ["ls", "f"], "sigmas": [1]}, ["f-1.0-seed3", "ls-seed3"]),
        ({"variants": ["lv"], "seeds": [4]}, ["lv-seed4"]),
    ],
)
def test_members_are_chosen(toy, options, files):
    members = members_of(toy)
    chosen = generate.choose(members, **{"variants": [], "sigmas": [], "seeds": [3]} | options)
    assert [generate.file_name(member) for member in chosen] == files


def damaged_run(toy, folder, damage):
    copy = shutil.copytree(toy, folder, ignore=shutil.ignore_patterns("generated"))
    damage(copy)
    return copy


def change(name, **values):
    return lambda path: runs.write_json(path / name, json.loads((path / name).read_text()) | values)


def empty_checkpoint(path):
    for child in (path / "checkpoints" / "lv").iterdir():
        shutil.rmtree(child) if child.is_dir() else child.unlink()


BAD_RUNS = {
    "missing": (shutil.rmtree, "flags.json cannot be read"),
    "other kind": (lambda path: runs.write_json(path / "flags.json", {"dims": [2]}), "no run of this version"),
    "other version": (change("flags.json", no_such_field=1), "no run of this version"),
    "unfinished": (lambda path: (path / "summary.json").unlink(), "unfinished"),
    "damaged summary": (lambda path: (path / "summary.json").write_text("{"), "summary.json cannot be read"),
    "old summary": (lambda path: runs.write_json(path / "summary.json", {"members": []}), "older version"),
    "no checkpoint": (lambda path: shutil.rmtree(path / "checkpoints" / "lv"), "is missing"),
    "empty checkpoint": (empty_checkpoint, "is empty"),
}


@pytest.mark.parametrize("name", BAD_RUNS)
def test_incomplete_run_is_refused(toy, tmp_path, nothing_computed, name):
    damage, message = BAD_RUNS[name]
    copy = damaged_run(toy, tmp_path / "run", damage)
    before = sorted(copy.rglob("*"))
    with pytest.raises(runs.RunError) as error:
        run(copy, variants=["lv"])
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert sorted(copy.rglob("*")) == before, "nothing is made or removed"


def test_damaged_checkpoint_is_refused(toy, tmp_path):
    def truncate(path):
        for file in (path / "checkpoints" / "lv").rglob("*"):
            if file.is_file() and file.stat().st_size > 1000:
                os.truncate(file, file.stat().st_size // 2)

    copy = damaged_run(toy, tmp_path / "run", truncate)
    result = run_command("experiments.generate", f"--run_dir={copy}")
    assert result.returncode != 0
    assert "damaged, or of another shape or version: delete" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (copy / "generated").exists()


def test_other_files_are_never_overwritten(toy, tmp_path, monkeypatch, no_data):
    points = tmp_path / "points.npy"
    np.save(points, np.zeros((2, 2)))
    options = {"out": str(tmp_path / "out"), "variants": ["lv"], "num_samples": 5, "images": [str(points)]}
    run(toy, **options)
    monkeypatch.setattr(generate, "pictures", lambda *arguments, **options: pytest.fail("compiled"))
    before = {file: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    for other in ({"num_samples": 6}, {"key_seed": 1}, {"variants": ["ls"]}, {"seeds": [4]}, {"images": []}):
        with pytest.raises(command.UsageError, match="another command: give another --out"):
            run(toy, **options | other)
    np.save(points, np.ones((2, 2)))
    with pytest.raises(command.UsageError, match="another command: give another --out"):
        run(toy, **options)
    assert {file: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
    with pytest.raises(command.UsageError, match="another command: give another --out"):
        run(toy, out=str(toy))
    for place in (str(points), "/dev/null/out"):
        with pytest.raises(command.UsageError, match=r"cannot be written.*give another --out"):
            run(toy, out=place)


def test_interrupted_command(toy, tmp_path, monkeypatch, no_data):
    options = {"out": str(tmp_path), "variants": ["ls", "lv"], "num_samples": 5}
    whole = np.savez

    def interrupted(file, **arrays):
        if "lv" in Path(file).name:
            raise KeyboardInterrupt
        whole(file, **arrays)

    monkeypatch.setattr(np, "savez", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(toy, **options)
    assert not (tmp_path / "lv-seed3.npz").exists()
    monkeypatch.setattr(np, "savez", whole)
    run(toy, **options)
    assert arrays_in(tmp_path / "lv-seed3.npz")["samples"].shape == (5, 2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "give the directory of a finished run"),
        ("--run_dir=nowhere", "flags.json cannot be read"),
        ("--run_dir=nowhere --sigma=small", "must be a number"),
        ("--run_dir=nowhere --seed=0.5", "must be a whole number"),
    ],
)
def test_bad_flags(words, message):
    with pytest.raises((command.UsageError, runs.RunError), match=message) as error:
        call(generate, words.split())
    assert "\n" not in str(error.value)


def test_gallery_of_images():
    """Of eleven images, the last stands third in the second row; sigma maps stand below."""
    values = np.arange(11, dtype=np.float32)[:, None, None, None] / 20 + np.zeros((11, 4, 5, 1), np.float32)
    figure = figures.gallery("", {"images": (values, None), "means": (values, 2 * values)}, unit="pixel")
    top, bottom = np.reshape(figure.axes[:4], (2, 2))
    grid = np.asarray(top[1].images[0].get_array())
    assert grid.shape == (8, 40)
    for index in range(11):
        row, column = divmod(index, 8)
        np.testing.assert_allclose(grid[4 * row : 4 * row + 4, 5 * column : 5 * column + 5], index / 20)
    assert (grid[4:, 15:] == 1.0).all(), "white where there is none"
    assert not bottom[0].images
    sigma_map = bottom[1].images[0].get_array()
    np.testing.assert_allclose(sigma_map[:, :15], 2 * grid[:, :15])
    assert np.ma.getmaskarray(sigma_map).sum() == 4 * 25
    assert bottom[1].images[0].get_clim() == (0.0, pytest.approx(1.0))


def test_gallery_of_one_sigma():
    values = np.random.default_rng(0).uniform(size=(3, 4, 5, 3))
    figure = figures.gallery("", {"images": (values, None), "means": (values, 0.1 + 0 * values)}, unit="pixel")
    assert len(figure.axes) == 2, "neither maps nor a colour bar"


def test_gallery_of_points():
    points = np.random.default_rng(0).normal(size=(100, 2))
    stddevs = np.abs(points)
    figure = figures.gallery("", {"samples": (points, None), "means": (points, stddevs)}, unit="length")
    dots = figure.axes[1].collections[0]
    np.testing.assert_array_equal(dots.get_offsets(), points)
    np.testing.assert_array_equal(dots.get_array(), stddevs.mean(axis=1))
