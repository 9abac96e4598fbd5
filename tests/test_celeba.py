"""CelebA from folders and archives in its true format, and caches that are whole or not there."""

import dataclasses
import errno
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from lvae_jax import cache, celeba, datasets, images

ROOT = Path(__file__).parents[1]
# The ends of the official splits, and their lines in list_eval_partition.txt.
OFFICIAL = {1: 0, 162770: 0, 162771: 1, 182637: 1, 182638: 2, 202599: 2}


def jpeg(number, *, size=(178, 218), mode="RGB", kind="JPEG"):
    """A file in the format of CelebA's, of fine structure; each number has a picture of its own."""
    rng = np.random.default_rng(number)
    width, height = size
    coarse = PIL.Image.fromarray(rng.integers(0, 256, (9, 7, 3), dtype=np.uint8)).resize(size)
    fine = rng.integers(-40, 40, (height, width, 1))
    file = io.BytesIO()
    PIL.Image.fromarray(np.clip(np.asarray(coarse) + fine, 0, 255).astype(np.uint8)).convert(mode).save(file, kind)
    return file.getvalue()


def make_folder(path, numbers=OFFICIAL):
    path.mkdir(parents=True)
    for number in numbers:
        (path / f"{number:06}.jpg").write_bytes(jpeg(number))
    return path


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "img_align_celeba")


def load(folder, data_dir, image_size=16):
    return celeba.images(str(folder), image_size=image_size, cache_dir=Path(data_dir))


def triangle(size_in, size_out):
    """The weights [size_out, size_in] of an antialiased bilinear filter, from its definition."""
    scale = size_in / size_out
    centres, places = scale * (np.arange(size_out) + 0.5), np.arange(size_in) + 0.5
    weights = np.maximum(0.0, 1.0 - np.abs(places[None] - centres[:, None]) / scale)
    return weights / weights.sum(axis=1, keepdims=True)


def reference(number, image_size):
    """The face by numpy: columns first, then rows, rounded after each, as Pillow has it."""
    face = np.asarray(PIL.Image.open(io.BytesIO(jpeg(number))))[35:183, 15:163].astype(np.float64)
    weights = triangle(148, image_size)
    narrow = np.rint(np.einsum("iw,hwc->hic", weights, face))
    return np.rint(np.einsum("jh,hic->jic", weights, narrow))


@pytest.mark.parametrize("image_size", [8, 16, 64, 147, 148])
def test_faces_are_cut_out_and_scaled_without_aliasing(image_size):
    face = celeba.face(io.BytesIO(jpeg(7)), image_size, name="7")
    assert face.dtype == np.uint8
    error = np.abs(face - reference(7, image_size))
    assert error.max() <= 1
    assert error.mean() < 0.02
    if image_size == 148:
        assert error.max() == 0


def assert_holds(array, numbers):
    """Exactly these images, in this order."""
    assert len(array) == len(numbers)
    for image, number in zip(array, numbers, strict=True):
        assert np.abs(image - reference(number, len(image))).max() <= 1, number


def test_official_splits_by_number(folder, tmp_path):
    train, test = load(folder, tmp_path / "data")
    assert_holds(train, [1, 162770])
    assert_holds(test, [182638, 202599])
    assert isinstance(train, np.memmap)


def test_splits_are_the_official_ones_and_do_not_overlap():
    """19,867 and 19,962 held-out images, as the data set's paper has them."""
    sizes = {split: len(numbers) for split, numbers in celeba.SPLITS.items()}
    assert sizes == {"train": 162_770, "validation": 19_867, "test": 19_962}
    together = [number for numbers in celeba.SPLITS.values() for number in numbers]
    assert sorted(together) == list(range(1, 202_600))


@pytest.mark.parametrize("place", [".", ".."])
def test_splits_by_the_list_in_the_folder_or_beside_it(folder, tmp_path, monkeypatch, place):
    lines = "000001.jpg 2\n162770.jpg 0\n162771.jpg 0\n182637.jpg 2\n182638.jpg 1\n202599.jpg 1\n000002.jpg 0\n"
    (folder / place / "list_eval_partition.txt").write_text(lines)
    monkeypatch.chdir(folder)  # the folder's parent has to be found from "." too
    for name in (folder, "."):
        train, test = load(name, tmp_path / "data")
        assert_holds(train, [162770, 162771])
        assert_holds(test, [1, 182637])


def test_fingerprint_knows_names_sizes_and_splits(folder, tmp_path):
    first = celeba.fingerprint(str(folder))
    copy = shutil.copytree(folder, tmp_path / "copy" / "folder")
    assert celeba.fingerprint(str(copy)) == first
    official = "".join(f"{file.name} {0 if int(file.stem) < 162771 else 2}\n" for file in folder.glob("*.jpg"))
    (copy / "list_eval_partition.txt").write_text(official)
    listed = celeba.fingerprint(str(copy))
    (copy / "list_eval_partition.txt").write_text(official.replace("000001.jpg 0", "000001.jpg 2"))
    assert celeba.fingerprint(str(copy)) not in (first, listed), "a test image is not to be a training image"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("000001.jpg 0\n", r"000000\.jpg|162770\.jpg belongs to none"),
        ("000001.jpg 0\n000001.jpg 2\n", "line 2: expected an image and its one split"),
        ("000001.jpg 3\n", "line 1: expected"),
        ("000001.jpg\n", "line 1: expected"),
        ("\n", "line 1: expected"),
    ],
)
def test_partition_list_without_splits(folder, tmp_path, lines, message):
    (folder / "list_eval_partition.txt").write_text(lines)
    assert_refused(folder, tmp_path / "data", message)


def assert_refused(folder, data_dir, message):
    """In one line, and nothing is left."""
    with pytest.raises(datasets.DatasetError, match=message) as error:
        load(folder, data_dir)
    assert "\n" not in str(error.value)
    assert not [file for file in Path(data_dir).rglob("*") if file.is_file()]


def remove(folder, *numbers):
    for number in numbers:
        (folder / f"{number:06}.jpg").unlink()


def forged(size):
    """A JPEG whose header tells of another size."""
    header = jpeg(1)
    start = header.index(b"\xff\xc0") + 5
    return header[:start] + size[1].to_bytes(2, "big") + size[0].to_bytes(2, "big") + header[start + 4 :]


FAULTS = {
    "no folder": (shutil.rmtree, "cannot be read .*give the folder that holds 000001"),
    "a file": (lambda folder: (shutil.rmtree(folder), folder.write_text("")), "cannot be read"),
    "a link to nowhere": (lambda folder: (folder / "000002.jpg").symlink_to("gone.jpg"), "000002.jpg cannot be read"),
    "no images": (
        lambda folder: remove(folder, *OFFICIAL),
        "no image called like 000001.jpg or .*, nor anything",
    ),
    "other files": (
        lambda folder: (remove(folder, *OFFICIAL), [(folder / f"{i}.webp").write_text("") for i in range(4)]),
        "or 000001.png, but 0.webp, 1.webp, 2.webp, ...: give the folder img_align_celeba",
    ),
    "no train images": (
        lambda folder: remove(folder, 1, 162770),
        "train split: add some, officially 000001.jpg to 1627",
    ),
    "no test images": (lambda folder: remove(folder, 182638, 202599), "test split: add .*182638.jpg to 202599.jpg"),
    "a number too high": (lambda folder: (folder / "202600.jpg").write_bytes(jpeg(1)), "202600.jpg belongs to none"),
    "cut short": (lambda folder: (folder / "000001.jpg").write_bytes(jpeg(1)[:-1]), "000001.jpg is not a whole JPEG"),
    "empty": (lambda folder: (folder / "000001.jpg").write_bytes(b""), "000001.jpg is not a whole JPEG"),
    "a GIF": (
        lambda folder: (folder / "000001.jpg").write_bytes(jpeg(1, kind="GIF")),
        "000001.jpg is not a whole JPEG",
    ),
    "too large": (
        lambda folder: (folder / "000001.jpg").write_bytes(forged((65000, 65000))),
        "000001.jpg is not a whole",
    ),
    "another size": (
        lambda folder: (folder / "000001.jpg").write_bytes(jpeg(1, size=(218, 178))),
        "000001.jpg has 218 x 178 pixels, .* 178 x 218",
    ),
}


@pytest.mark.parametrize("found", ["a folder of the same name", "PNG", "capitals"])
def test_folders_as_people_have_them(found, folder, tmp_path):
    """As Kaggle's archive unpacks, as CelebA's own folder of PNGs, as some programs write endings."""
    expected = load(folder, tmp_path / "data")
    if found == "a folder of the same name":
        given = folder.parent / "nested"
        shutil.copytree(folder, given / "img_align_celeba")
    else:
        given = folder.parent / found
        given.mkdir()
        for number in OFFICIAL:
            if found == "PNG":
                PIL.Image.open(folder / f"{number:06}.jpg").save(given / f"{number:06}.png")
            else:
                shutil.copy(folder / f"{number:06}.jpg", given / f"{number:06}.JPG")
    for split, same in zip(load(given, tmp_path / "data"), expected, strict=True):
        np.testing.assert_array_equal(split, same)


@pytest.mark.parametrize("fault", FAULTS)
def test_folder_errors_name_their_cause(folder, tmp_path, fault):
    spoil, message = FAULTS[fault]
    spoil(folder)
    assert_refused(folder, tmp_path / "data", message)


def test_other_files_do_not_matter(folder, tmp_path):
    expected = load(folder, tmp_path / "data")
    for name in ("._000001.jpg", "000001.jpg.txt", "0000012.jpg", "README"):
        (folder / name).write_bytes(b"no image")
    (folder / "000001.jpg").write_bytes(jpeg(1, mode="L"))
    grey = load(folder, tmp_path / "data")
    np.testing.assert_array_equal(grey[1], expected[1])
    assert np.ptp(grey[0][0], axis=-1).max() == 0, "a JPEG without colour"


def caches(data_dir):
    return {file.name: file.stat().st_mtime_ns for file in Path(data_dir, "celeb_a").iterdir()}


def test_images_are_decoded_once(folder, tmp_path, monkeypatch, capsys):
    first = load(folder, tmp_path / "data")
    assert "decoding celeb_a train: 100%" in capsys.readouterr().err
    before = caches(tmp_path / "data")
    monkeypatch.setattr(celeba, "face", None)
    folder.rename(tmp_path / "moved")
    again = load(tmp_path / "moved", tmp_path / "data")
    assert caches(tmp_path / "data") == before
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other)


def test_cache_serves_only_what_made_it(folder, tmp_path):
    small = load(folder, tmp_path / "data")
    large = load(folder, tmp_path / "data", image_size=20)
    assert (small[0].shape, large[0].shape) == ((2, 16, 16, 3), (2, 20, 20, 3))
    assert len(caches(tmp_path / "data")) == 4
    (folder / "000001.jpg").write_bytes(jpeg(3))
    changed = load(folder, tmp_path / "data")
    assert_holds(changed[0], [3, 162770])
    assert len(caches(tmp_path / "data")) == 5, "the test split's is found again"
    (folder / "000003.jpg").write_bytes(jpeg(3))
    assert len(load(folder, tmp_path / "data")[0]) == 3


@pytest.mark.parametrize("size", [0, 5, 100, 128, 2000, -1])
def test_cache_cut_short_is_refused_and_kept(folder, tmp_path, size):
    load(folder, tmp_path / "data")
    file = next((tmp_path / "data" / "celeb_a").glob("*-train-*"))
    os.truncate(file, size % file.stat().st_size)
    before = caches(tmp_path / "data")
    with pytest.raises(datasets.DatasetError, match=f"{file} are damaged: delete this file"):
        load(folder, tmp_path / "data")
    assert caches(tmp_path / "data") == before
    file.unlink()
    assert_holds(load(folder, tmp_path / "data")[0], [1, 162770])


def test_cache_with_a_garbled_header_is_refused(folder, tmp_path):
    load(folder, tmp_path / "data")
    file = next((tmp_path / "data" / "celeb_a").glob("*-train-*"))
    file.write_bytes(file.read_bytes().replace(b"(", b"[", 1))
    with pytest.raises(datasets.DatasetError, match=f"{file} are damaged: delete this file"):
        load(folder, tmp_path / "data")


def test_cache_that_may_not_be_read_is_not_called_damaged(folder, tmp_path, monkeypatch):
    load(folder, tmp_path / "data")

    def refused(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(np, "load", refused)
    with pytest.raises(datasets.DatasetError, match=r"cannot be read \(Permission denied\)"):
        load(folder, tmp_path / "data")


def full_from_the_start(monkeypatch):
    monkeypatch.setattr(cache, "open", lambda file, mode: open("/dev/full", mode), raising=False)  # noqa: SIM115


def full_at_the_end(monkeypatch):
    def fsync(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("full", [full_from_the_start, full_at_the_end])
def test_full_disk_leaves_nothing(folder, tmp_path, monkeypatch, full):
    with monkeypatch.context() as disk:
        full(disk)
        assert_refused(folder, tmp_path / "data", "No space left on device.*make room, or give another `data_dir`")
    load(folder, tmp_path / "data")


def test_place_that_cannot_be_written(folder, tmp_path):
    (tmp_path / "data").write_text("a file")
    with pytest.raises(datasets.DatasetError, match="give another `data_dir`"):
        load(folder, tmp_path / "data")


def test_interruption_leaves_nothing(folder, tmp_path, monkeypatch):
    decoded = []

    def face(*arguments, **options):
        if decoded:
            raise KeyboardInterrupt
        decoded.append(arguments)
        return np.zeros((16, 16, 3), np.uint8)

    with monkeypatch.context() as interrupted:
        interrupted.setattr(celeba, "face", face)
        with pytest.raises(KeyboardInterrupt):
            load(folder, tmp_path / "data")
    assert caches(tmp_path / "data") == {}
    assert_holds(load(folder, tmp_path / "data")[0], [1, 162770])


def test_result_is_never_held_in_memory(folder, tmp_path, monkeypatch):
    """80 MB through less than 8. The test counts twice and takes the smaller peak, since a table of the interpreter may
    grow during one count: that of interned strings takes 7.7 MB more at some 350,000 of them."""
    for number in range(2, 1202):
        os.link(folder / "000001.jpg", folder / f"{number:06}.jpg")
    face = np.arange(148 * 148 * 3, dtype=np.uint8).reshape(148, 148, 3)
    monkeypatch.setattr(celeba, "face", lambda *arguments, **options: face.copy())
    peaks = []
    for data_dir in ("first", "second"):
        tracemalloc.start()
        train, _ = load(folder, tmp_path / data_dir, image_size=148)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert train.nbytes > 75e6
        np.testing.assert_array_equal(train[-1], face)
    assert min(peaks) < 8e6


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """The five files of CelebA's own distribution, with 40 attributes, 10 landmarks and 7 images."""
    path = tmp_path_factory.mktemp("archives")
    numbers = {**OFFICIAL, 2: 0}
    names = [f"{number:06}.jpg" for number in numbers]
    with zipfile.ZipFile(path / "img_align_celeba.zip", "w") as archive:
        for number, name in zip(numbers, names, strict=True):
            archive.writestr(f"img_align_celeba/{name}", jpeg(number))

    def table(file, heading, row):
        lines = [str(len(names)), heading, *(f"{name} {row}" for name in names)]
        (path / file).write_text("\n".join(lines) + "\n")

    from tensorflow_datasets.datasets.celeb_a import celeb_a_dataset_builder as builder

    table("list_attr_celeba.txt", " ".join(builder.ATTR_HEADINGS), " ".join(40 * ["-1"]))
    table("list_landmarks_align_celeba.txt", " ".join(builder.LANDMARK_HEADINGS), " ".join(10 * ["69"]))
    lines = [f"{name} {split}\n" for name, split in zip(names, numbers.values(), strict=True)]
    (path / "list_eval_partition.txt").write_text("".join(lines))
    (path / "identity_CelebA.txt").write_text("".join(f"{name} 1\n" for name in names))
    return path


@pytest.fixture
def registered(archives, monkeypatch):
    """TFDS knows the checksums of these archives, as it does those of the real ones."""
    import tensorflow_datasets as tfds

    known = tfds.builder_cls("celeb_a").url_infos
    for url, info in list(known.items()):
        content = (archives / info.filename).read_bytes()
        checksum = hashlib.sha256(content).hexdigest()
        monkeypatch.setitem(known, url, dataclasses.replace(info, size=len(content), checksum=checksum))


# TensorFlow and TFDS warn about their own use of other packages while they prepare a data set.
prepares = pytest.mark.filterwarnings("default")


@prepares
def test_celeba_from_its_archives(archives, registered, tmp_path, monkeypatch):
    """By TFDS's own builder; reading what it prepared needs no TensorFlow."""
    train, test = images.tfds_images("celeb_a", image_size=16, data_dir=str(tmp_path), manual_dir=str(archives))

    def held(array):
        """The numbers of the images, in any order: TFDS shuffles them."""
        faces = {number: reference(number, 16) for number in [*OFFICIAL, 2]}
        return sorted(
            min(faces, key=lambda number: np.abs(faces[number] - image).max())
            for image in array
            if any(np.abs(face - image).max() <= 1 for face in faces.values())
        )

    assert (train.shape, test.shape) == ((3, 16, 16, 3), (2, 16, 16, 3))
    assert held(train) == [1, 2, 162770]
    assert held(test) == [182638, 202599]
    code = (
        "import sys; from lvae_jax import datasets; "
        f"d = datasets.load('celeb_a', image_size=20, data_dir={str(tmp_path)!r}); "
        "print(d.train.shape, d.test.shape, 'tensorflow' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.strip() == "(3, 20, 20, 3) (2, 20, 20, 3) False", result.stderr
    for file in (tmp_path / "celeb_a").glob("*.npy"):
        file.unlink()
    monkeypatch.setattr(images, "_examples", lambda source, feature: iter([jpeg(1), jpeg(2), jpeg(3)[:-1]]))
    with pytest.raises(datasets.DatasetError, match="image 2 of celeb_a's train split is not a whole JPEG"):
        images.tfds_images("celeb_a", image_size=16, data_dir=str(tmp_path))
    assert not list((tmp_path / "celeb_a").glob("*.npy"))


@prepares
def test_archives_that_are_not_the_original_are_refused(archives, tmp_path):
    with pytest.raises(datasets.DatasetError, match="could not prepare 'celeb_a', put") as error:
        images.tfds_images("celeb_a", image_size=16, data_dir=str(tmp_path), manual_dir=str(archives))
    assert "`celeba_dir`" in str(error.value)
    assert "checksum" in str(error.value)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.rglob("*.npy"))
