"""Freed weights back to the system: glibc keeps blocks that are not at its heap's end, whatever was promised."""

from __future__ import annotations

import ctypes


def trim() -> bool:
    """Hand all freed pages of this process back; False where there is no glibc, whose allocator needs it."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        return False
    return True
