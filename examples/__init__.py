"""Short programs to copy from: `python -m examples.NAME`, after `pip install -e '.[examples]'`."""
