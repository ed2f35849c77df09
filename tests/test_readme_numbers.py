"""The README's tables are what the JSON files under benchmarks/results/ say."""

from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_no_number_of_the_tables_is_typed_by_hand():
    text = (ROOT / "README.md").read_text()
    assert runpy.run_path(str(ROOT / "benchmarks" / "readme.py"))["filled"](text) == text
