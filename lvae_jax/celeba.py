"""CelebA (Liu et al., ICCV 2015): its aligned JPEGs, 178 x 218 pixels, in the official splits, from a folder.

Of each face the 148 x 148 pixels in the middle are scaled to `image_size` by Pillow's bilinear filter, a triangle that
widens with the scale, so that nothing aliases.
"""

import hashlib
import io
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lvae_jax import cache
from lvae_jax.cache import DatasetError

NAME = "celeb_a"  # as TFDS calls it
CROP = 148
SIDES = range(8, CROP + 1)  # to which faces may be scaled
SPLITS = {"train": range(1, 162_771), "validation": range(162_771, 182_638), "test": range(182_638, 202_600)}


def images(celeba_dir: str, *, image_size: int, cache_dir: Path) -> tuple[np.ndarray, np.ndarray]:
    """The train and test images, uint8 [N, H, W, C], from a folder of aligned JPEGs, 000001.jpg to 202599.jpg or some
    of them.

    The splits are those of list_eval_partition.txt in the folder or beside it, or else the official ones by number.
    The images are cached below `cache_dir`, anew when the names, sizes or times of the files change.

    Raises:
      DatasetError: no folder, no images in it or none of one split, an image that has no split, is broken or of
        another size, a damaged cache or no room for one.
    """
    folder, jpegs, split_of = _folder(celeba_dir)
    members: dict[str, list[str]] = {split: [] for split in SPLITS}
    for name in sorted(jpegs):
        split = split_of(name)
        if split is None:
            raise DatasetError(f"{folder / name} belongs to none of CelebA's splits: remove it from the folder")
        members[split].append(name)
    files = {}
    for split in ("train", "test"):
        if not members[split]:
            raise DatasetError(
                f"`celeba_dir`={celeba_dir} holds no image of the {split} split: "
                f"add some, officially {SPLITS[split][0]:06}.jpg to {SPLITS[split][-1]:06}.jpg"
            )
        source = [f"{name} {jpegs[name].st_size} {jpegs[name].st_mtime_ns}" for name in members[split]]
        digest = hashlib.sha256("\n".join(source).encode()).hexdigest()[:16]
        files[split] = cache_dir / NAME / f"folder-{digest}-{cache_name(split, image_size)}"
    for split, file in files.items():
        if not file.exists():
            faces = (face(folder / name, image_size, name=str(folder / name)) for name in members[split])
            shape = (len(members[split]), image_size, image_size, 3)
            cache.write(file, shape, np.uint8, faces, description=f"decoding {NAME} {split}")
    return cache.load(files["train"]), cache.load(files["test"])


def fingerprint(celeba_dir: str) -> str:
    """A digest of the names, sizes and splits of the images in the folder. A copy of the folder has the same one.

    Raises:
      DatasetError: the folder cannot be read, or holds no images.
    """
    _, files, split_of = _folder(celeba_dir)
    lines = [f"{name} {files[name].st_size} {split_of(name)}" for name in sorted(files)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def face(jpeg: Path | io.BytesIO, image_size: int, *, name: str) -> np.ndarray:
    """The face in one of CelebA's aligned JPEGs, uint8 [image_size, image_size, 3]: cut out, then scaled, as the
    module's docstring says. `name` stands for the image in errors. Damage that leaves all
    rows decodable is not detected.

    Raises:
      DatasetError: it is not a whole JPEG, or of another size than CelebA's.
    """
    import PIL.Image

    try:
        with PIL.Image.open(jpeg, formats=["JPEG"]) as image:
            if image.size != (178, 218):
                width, height = image.size
                raise DatasetError(
                    f"{name} has {width} x {height} pixels, CelebA's aligned images have 178 x 218: take the original"
                )
            left, top = (178 - CROP) // 2, (218 - CROP) // 2
            cut = image.convert("RGB").crop((left, top, left + CROP, top + CROP))
    except (OSError, PIL.Image.DecompressionBombError) as error:  # what Pillow raises for anything it cannot decode
        raise DatasetError(f"{name} is not a whole JPEG ({error}): take the original") from error
    return np.asarray(cut.resize((image_size, image_size), PIL.Image.Resampling.BILINEAR))


def cache_name(split: str, image_size: int) -> str:
    """The name of the file of a split's faces of this size, which tells how they were made."""
    return f"{split}-crop{CROP}-bilinear{image_size}.npy"


def _folder(celeba_dir: str) -> tuple[Path, dict[str, os.stat_result], Callable[[str], str | None]]:
    """The folder, its images by name, and the split that a name belongs to."""
    folder = Path(celeba_dir).expanduser().resolve()
    try:
        with os.scandir(folder) as entries:
            files = {file.name: file.stat() for file in entries if re.fullmatch(r"\d{6}\.jpg", file.name)}
        split_of = _partition(folder)
    except OSError as error:
        raise DatasetError(
            f"`celeba_dir`={celeba_dir}: {error.filename} cannot be read ({error.strerror}): "
            "give the folder that holds 000001.jpg, with every image whole"
        ) from None
    if not files:
        raise DatasetError(
            f"`celeba_dir`={celeba_dir} holds no image called like 000001.jpg: give the folder img_align_celeba"
        )
    return folder, files, split_of


def _partition(folder: Path) -> Callable[[str], str | None]:
    """The split that a file name belongs to: by list_eval_partition.txt, lines like `000001.jpg 0`, or by number."""
    for listing in (folder / "list_eval_partition.txt", folder.parent / "list_eval_partition.txt"):
        if not listing.exists():
            continue
        split_of: dict[str, str] = {}
        splits = dict(zip("012", SPLITS, strict=True))
        for number, line in enumerate(listing.read_text(errors="replace").splitlines(), start=1):
            name, split = (*line.split(), "", "")[:2]
            if split not in splits or split_of.setdefault(name, splits[split]) != splits[split]:
                raise DatasetError(
                    f"{listing}, line {number}: expected an image and its one split, 0, 1 or 2, as in `000001.jpg 0`"
                )
        return split_of.get
    return lambda name: next((split for split, numbers in SPLITS.items() if int(name[:6]) in numbers), None)
