"""The command `spread-jax`: train, sample, evaluate, runs, features."""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import sys

from spread_jax.errors import UsageError

__all__ = ["COMMANDS", "main"]

COMMANDS = {
    "train": "train a generator on images, or resume",
    "sample": "draw samples from a run",
    "evaluate": "distances, bounds and a report of a finished run",
    "runs": "list runs with their key numbers",
    "features": "train the features that distances are taken in",
}


def main() -> None:
    """Runs the command that was named; `python -m spread_jax.cli` is the same."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print("usage: spread-jax COMMAND [flags]\n")
        print("".join(f"  {command:10} {what}\n" for command, what in COMMANDS.items()))
        print("spread-jax COMMAND --help shows its flags.")
        sys.exit(0)
    if name == "--version":
        print(importlib.metadata.version("spread-jax"))
        sys.exit(0)
    try:
        from spread_jax.cli.launch import run_program
    except ModuleNotFoundError as error:
        sys.exit(f'error: {error.name} is not installed: pip install "spread-jax[train]".')

    def command() -> int:
        if name not in COMMANDS:
            near = difflib.get_close_matches(name, COMMANDS, 1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise UsageError(f"there is no command {name!r}; there are {', '.join(COMMANDS)}.{hint}")
        return importlib.import_module(f"spread_jax.cli.{name}").main(sys.argv[2:])

    run_program(command, in_all_processes=name == "train")
