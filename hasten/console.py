"""What the command line says and how it ends: one sentence and an exit code for every failure."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

from hasten.core.errors import HastenError

out_console = Console(highlight=False)
err_console = Console(stderr=True, highlight=False)


class Commands(TyperGroup):
    """The commands, every failure told in one sentence with an exit code; ``--debug`` anywhere shows the traceback."""

    def main(self, args: Sequence[str] | None = None, *positional: Any, **extra: Any) -> Any:
        """Run the arguments and exit: 2 for what a person can put right, 130 for an interrupt, 1 for a defect."""
        args = sys.argv[1:] if args is None else list(args)
        self.given, debug = args, "--debug" in args
        extra["standalone_mode"] = False
        extra["prog_name"] = "hasten"
        try:
            code = super().main([a for a in args if a != "--debug"], *positional, **extra)
        except Exception as error:
            if debug:
                raise
            code = tell(error)
        if code == 130:
            fail("Interrupted; training and synthesis go on from their last checkpoint with the same command.")
        sys.exit(code if isinstance(code, int) else 0)


def tell(error: Exception) -> int:
    """Print one sentence about ``error`` and return the exit code."""
    if isinstance(error, HastenError):
        fail(str(error))
        return 2
    if hasattr(error, "format_message"):  # typer's own: an unknown option, a missing argument
        fail(error.format_message())  # type: ignore[attr-defined]
        return 2
    if isinstance(error, OSError):
        from hasten.run import reason

        fail(f"Cannot write or read {error.filename or 'the output'}: {reason(error)}; what was saved before is whole.")
        return 2
    if type(error).__name__ == "OutOfMemoryError":
        fail("The device is out of memory; lower --batch, or accumulate with --set fit.accumulate=2.")
        return 2
    first = (str(error).splitlines() or [""])[0]
    fail(f"This is a defect of hasten ({type(error).__name__}: {first}); --debug shows where, please report it.")
    return 1


def fail(message: str) -> None:
    """One sentence on stderr."""
    err_console.print(f"[bold red]error:[/] {escape(' '.join(message.split()))}", soft_wrap=True)


def note(message: str) -> None:
    """One remark on stderr."""
    err_console.print(f"[dim]{escape(message)}[/]", soft_wrap=True)


def quietly(call: Callable[..., Any], *args: Any) -> Any:
    """``call(*args)`` with its warnings shown as notes."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        result = call(*args)
    for warning in caught:
        if issubclass(warning.category, UserWarning):
            note(f"Note: {warning.message}")
    return result
