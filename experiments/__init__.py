"""Experiments: `python -m experiments.NAME --help`."""

from experiments import signals

signals.exit_while_importing()
