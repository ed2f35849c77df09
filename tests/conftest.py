"""Settings of the whole suite: one thread (tiny tensors, exact repeats), no model hub, a seed for every test."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, so that no pool is started
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

torch.set_num_threads(1)
settings.register_profile("hasten", deadline=None, derandomize=True, max_examples=30, database=None)
settings.load_profile("hasten")


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test draws the same numbers, alone or in the suite."""
    torch.manual_seed(0)
