"""The command line called in this process."""

from typing import Any

from typer.testing import CliRunner

from gdjax.commands import app


def call(*arguments: object, status: int = 0) -> Any:
    """What `gdjax ARGUMENTS` prints, once it has ended with this status; an error that is no exit is raised."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status, result.output
    return result


def refused(*arguments: object) -> str:
    """What `gdjax ARGUMENTS` says on stderr of a mistake of its user: it ends with status 2 and prints nothing else."""
    result = call(*arguments, status=2)
    assert result.stdout == ""
    return result.stderr
