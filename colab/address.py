"""Writes the repository's address, `url` in setup.cfg, into the notebooks' badges and clone lines and into the README.

python -m colab.address           # after the address has changed, in a fork for example
python -m colab.address --check   # changes nothing; exits with status 1 if a file has another address
"""

import argparse
import configparser
import re
import sys
from pathlib import Path

GITHUB = "https://github.com/"
REPOSITORY = r"[\w-]+/[\w.-]+"
# The notebooks are matched as text, which keeps their formatting; in JSON, a quote is written \".
BADGE = re.compile(rf"(?<=colab\.research\.google\.com/github/){REPOSITORY}(?=/blob/)")
CLONE = re.compile(rf'(?:(?<=REPOSITORY = \\")|(?<=git clone )){GITHUB}{REPOSITORY}')


def address(root: Path) -> str:
    """The `url` of setup.cfg.

    Raises:
      ValueError: it is not the address of a repository on GitHub, which the badges need.
    """
    config = configparser.ConfigParser()
    config.read(root / "setup.cfg", encoding="utf-8")
    url = config.get("metadata", "url", fallback="")
    if not re.fullmatch(GITHUB + REPOSITORY, url):
        raise ValueError(f"setup.cfg: url = {url!r} must be {GITHUB}OWNER/NAME")
    return url


def stale(root: Path) -> dict[Path, str]:
    """The files whose address is not that of setup.cfg, with the text that they should have."""
    url = address(root)
    texts = {}
    for path in (root / "README.md", *sorted((root / "colab").glob("*.ipynb"))):
        text = path.read_bytes().decode()
        expected = CLONE.sub(url, BADGE.sub(url.removeprefix(GITHUB), text))
        if expected != text:
            texts[path] = expected
    return texts


def main(arguments: list[str] | None = None, root: Path = Path(__file__).parents[1]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m colab.address", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="only say which files have another address")
    check = parser.parse_args(arguments).check
    try:
        texts = stale(root)
    except ValueError as error:
        sys.exit(str(error))
    names = ", ".join(str(path.relative_to(root)) for path in texts)
    if check and texts:
        sys.exit(f"not the address in setup.cfg: {names}; run python -m colab.address")
    for path, text in texts.items():
        path.write_bytes(text.encode())
        print(f"{path.relative_to(root)}: {address(root)}")


if __name__ == "__main__":
    main()
