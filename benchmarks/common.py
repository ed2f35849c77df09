"""What every benchmark shares: where results go, and what each must say about itself."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from hasten.measure.clock import machine

RESULTS = Path(__file__).parent / "results"


def save(name: str, numbers: dict[str, Any], seed: int, device: str = "cpu") -> Path:
    """Write ``numbers`` with machine, versions, seed and command to results/NAME.json, and print them."""
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    about = {"machine": machine(device), "seed": seed, "command": command, **numbers}
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{name}.json"
    file.write_text(json.dumps(about, indent=1) + "\n")
    print(json.dumps(numbers, indent=1))
    print(f"-> {file}")
    return file
