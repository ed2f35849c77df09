"""The command line, run in this process; import ``plain_consoles`` too, which acts by itself."""

from __future__ import annotations

from typing import Any

import pytest
from typer.testing import CliRunner

from hasten import cli


@pytest.fixture(autouse=True)
def plain_consoles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Consoles that write to whatever the runner has put in place of stdout and stderr, unwrapped and uncoloured."""
    for console in (cli.out_console, cli.err_console):
        monkeypatch.setattr(console, "_width", 300)
        monkeypatch.setattr(console, "_color_system", None)


def run(*args: str, code: int = 0) -> Any:
    """Run the command line; it must exit with ``code`` and show no traceback."""
    result = CliRunner().invoke(cli.app, list(args))
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


def refused(*args: str, code: int = 2) -> str:
    """The one sentence with which the command is refused."""
    lines = [line for line in run(*args, code=code).stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    return lines[0]
