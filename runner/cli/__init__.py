"""The command line. `main` is the console script."""

from runner.cli.app import main

__all__ = ["main"]
