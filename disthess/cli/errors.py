"""How the command line ends when something goes wrong: one paragraph on standard error and an exit code.

0 done, 1 failed, 2 wrong usage or configuration, 3 an audit raised an alert. A traceback is shown only with ``--debug``.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, final

import typer
from typer.core import TyperGroup

from disthess.errors import DisthessError

# Raised on purpose by the parser: Exit, Abort, and usage errors with every other error of the parser's own.
_OF_THE_PARSER: tuple[type[BaseException], ...] = (typer.Exit, typer.Abort, typer.BadParameter.__mro__[2])


@final
class ErrorReportingGroup(TyperGroup):
    """The command ``disthess``: its verbs, with errors turned into messages and exit codes."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Accept ``--debug`` anywhere on the line, since one adds it to a line that has just failed."""
        if "--debug" in args:
            args = ["--debug", *(argument for argument in args if argument != "--debug")]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the verb."""
        debug = bool(ctx.params.get("debug"))
        try:
            return super().invoke(ctx)
        except _OF_THE_PARSER:
            raise
        except BrokenPipeError:
            raise
        except KeyboardInterrupt as error:
            if debug:
                raise
            _fail("interrupted; what was finished is kept, and the same command resumes from there.", 1, error)
        except DisthessError as error:
            if debug:
                raise
            _fail(" ".join(str(error).split("\n")), error.exit_code, error)
        except Exception as error:
            if debug:
                raise
            said = " ".join(str(error).split())
            message = f"this is a bug in disthess: {type(error).__name__}: {said}; run with --debug for the traceback"
            _fail(message, 1, error)


@contextmanager
def termination_as_interrupt() -> Iterator[None]:
    """Let SIGTERM unwind the program as Ctrl-C does, so that locks are released and the exit code is ours.

    While tiles are computed, the run's own handler takes its place and finishes those in flight.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(number: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt


def _fail(message: str, code: int, error: BaseException) -> None:
    typer.echo(f"disthess: {message}", err=True)
    raise typer.Exit(code) from error
