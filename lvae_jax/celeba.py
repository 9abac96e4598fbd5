"""CelebA (Liu et al., ICCV 2015): its aligned JPEGs or PNGs, 178 x 218 pixels, in the official splits, from a folder.

Of each face the 148 x 148 pixels in the middle are scaled to `image_size` by Pillow's bilinear filter, a triangle that
widens with the scale, so that nothing aliases.
"""

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
    """The train and test images, uint8 [N, H, W, C], from a folder of aligned JPEGs or PNGs, 000001.jpg to 202599.jpg
    or some of them, or from the first folder in it that holds such images.

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
    for split in ("train", "test"):
        if not members[split]:
            raise DatasetError(
                f"`celeba_dir`={celeba_dir} holds no image of the {split} split: "
                f"add some, officially {SPLITS[split][0]:06}.jpg to {SPLITS[split][-1]:06}.jpg"
            )

    def decoded(split: str) -> np.ndarray:
        names = members[split]
        made_of = cache.key({name: jpegs[name] for name in names})
        file = cache_dir / NAME / f"folder-{made_of}-{cache_name(split, image_size)}"
        faces = (face(folder / name, image_size, name=str(folder / name)) for name in names)
        shape = (len(names), image_size, image_size, 3)
        return cache.array(file, shape, np.uint8, faces, description=f"decoding {NAME} {split}")

    return decoded("train"), decoded("test")


def fingerprint(celeba_dir: str) -> str:
    """A digest of the names, sizes and splits of the images in the folder. A copy of the folder has the same one.

    Raises:
      DatasetError: the folder cannot be read, or holds no images.
    """
    _, files, split_of = _folder(celeba_dir)
    lines = [f"{name} {files[name].st_size} {split_of(name)}" for name in sorted(files)]
    return cache.digest(lines)


def face(jpeg: Path | io.BytesIO, image_size: int, *, name: str) -> np.ndarray:
    """The face in one of CelebA's aligned JPEGs, or PNGs, uint8 [image_size, image_size, 3]: cut out, then scaled, as
    the module's docstring says. `name` stands for the image in errors. Damage that leaves all rows decodable is not
    detected.

    Raises:
      DatasetError: it is not a whole JPEG or PNG, or of another size than CelebA's.
    """
    import PIL.Image

    try:
        with PIL.Image.open(jpeg, formats=["JPEG", "PNG"]) as image:
            if image.size != (178, 218):
                width, height = image.size
                raise DatasetError(
                    f"{name} has {width} x {height} pixels, CelebA's aligned images have 178 x 218: take the original"
                )
            left, top = (178 - CROP) // 2, (218 - CROP) // 2
            cut = image.convert("RGB").crop((left, top, left + CROP, top + CROP))
    except (OSError, PIL.Image.DecompressionBombError) as error:  # what Pillow raises for anything it cannot decode
        raise DatasetError(f"{name} is not a whole JPEG or PNG ({error}): take the original") from error
    return np.asarray(cut.resize((image_size, image_size), PIL.Image.Resampling.BILINEAR))


def cache_name(split: str, image_size: int) -> str:
    """The name of the file of a split's faces of this size, which tells how they were made."""
    return f"{split}-crop{CROP}-bilinear{image_size}.npy"


def _folder(celeba_dir: str) -> tuple[Path, dict[str, os.stat_result], Callable[[str], str | None]]:
    """The folder, its images by name, and the split that a name belongs to."""
    given = Path(celeba_dir).expanduser().resolve()
    try:
        folder, files = given, _images(given)
        if not files:
            # Archives unpack into a folder of the same name, often inside another one.
            inside = {sub: _images(sub) for sub in sorted(given.iterdir()) if sub.is_dir()}
            folder, files = next((item for item in inside.items() if item[1]), (given, files))
        split_of = _partition(folder)
    except OSError as error:
        raise DatasetError(
            f"`celeba_dir`={celeba_dir}: {error.filename} cannot be read ({error.strerror}): "
            "give the folder that holds 000001.jpg, with every image whole"
        ) from None
    if not files:
        there = sorted(path.name for path in given.iterdir())
        holds = f"but {', '.join(there[:3])}{', ...' if len(there) > 3 else ''}" if there else "nor anything else"
        raise DatasetError(
            f"`celeba_dir`={celeba_dir} holds no image called like 000001.jpg or 000001.png, {holds}: give the folder "
            "img_align_celeba"
        )
    return folder, files, split_of


def _images(folder: Path) -> dict[str, os.stat_result]:
    """The images in the folder itself, by name."""
    with os.scandir(folder) as entries:
        return {entry.name: entry.stat() for entry in entries if re.fullmatch(r"\d{6}\.(jpe?g|png)", entry.name, re.I)}


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
        return lambda name: split_of.get(f"{name[:6]}.jpg")  # the list has these names, whatever the images have
    return lambda name: next((split for split, numbers in SPLITS.items() if int(name[:6]) in numbers), None)
