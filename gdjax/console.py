"""The terminal of the command line: where answers go, where errors go."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.markup import escape


class Terminal(Console):
    """A console that a closed pipe does not stop: `gdjax solve ... | head` has the exit status of `gdjax solve`."""

    def on_broken_pipe(self) -> None:
        """Let the rest go nowhere: whoever was reading has seen enough."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


output = Terminal()
errors = Terminal(stderr=True)


@contextmanager
def bad_input_told() -> Iterator[None]:
    """Tell a ValueError as one message on stderr and exit with 2."""
    try:
        yield
    except ValueError as error:
        errors.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        raise typer.Exit(2) from None
