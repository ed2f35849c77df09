"""README and docs: every Python example runs, every command line names commands and options that exist.

The Python blocks of one file run in order, in one namespace, in an empty folder. A block that needs what a test has
not (a GPU, a download, minutes) stands under a line ``<!-- not run: why -->``; it must still compile.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

ROOT = Path(__file__).parent.parent
PAGES = [
    p for p in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("**/*.md"))] if p.exists()
]
FENCE = re.compile(r"(<!-- not run: [^\n]+ -->\n+)?^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))


def blocks(page: Path, *languages: str) -> list[tuple[bool, str]]:
    """(runs, text) of the page's fenced blocks in these languages."""
    return [(not skip, text) for skip, lang, text in FENCE.findall(page.read_text()) if lang in languages]


@every_page
def test_python_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    for number, (runs, text) in enumerate(blocks(page, "python"), 1):
        code = compile(text, f"{page.name}, example {number}", "exec")
        if runs:
            exec(code, names)


def hasten_lines(page: Path) -> list[list[str]]:
    """The words of every ``hasten ...`` command, continued lines joined, comments dropped."""
    texts = [text.replace("\\\n", " ") for _, text in blocks(page, "bash", "sh", "console")]
    lines = [line.removeprefix("$ ").strip() for text in texts for line in text.splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("hasten ")]


@every_page
def test_commands_and_options_exist(page):
    from hasten.cli import app

    root: Any = typer.main.get_command(app)  # a click Group; typer may bring its own click
    for words in hasten_lines(page):
        command, options = root, [w.split("=")[0] for w in words if w.startswith("--")]
        if words and not words[0].startswith("-"):
            assert words[0] in root.commands, f"hasten has no command {words[0]!r}"
            command = root.commands[words[0]]
        known = {o for p in command.params for o in (*p.opts, *p.secondary_opts)} | {"--help"}
        assert set(options) <= known, f"hasten {words[0]} has no {set(options) - known}"


@every_page
def test_links_inside_the_repository_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"
