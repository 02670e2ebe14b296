"""The command `gdjax`: sees that what it needs is installed, then hands over to `commands.py`."""

import sys

_EXTRA = {"typer", "rich", "pyarrow", "matplotlib", "optax"}


def main() -> None:
    """Run the command line and exit: 0 all fine, 1 some problem diverged, 2 bad usage or bad input."""
    try:
        from gdjax.commands import app

        app()
    except ModuleNotFoundError as missing:
        if missing.name is None or missing.name.partition(".")[0] not in _EXTRA:
            raise
        print(f'gdjax: the command line needs {missing.name}: pip install "gdjax[cli]"', file=sys.stderr)
        sys.exit(2)
