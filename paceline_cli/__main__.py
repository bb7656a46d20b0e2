"""Runs the `paceline` command as `python -m paceline_cli`; `paceline serve` starts its children this way."""

from paceline_cli.main import run

run()
