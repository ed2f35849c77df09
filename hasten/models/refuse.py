"""What a pipeline's own code refuses of a call, as one sentence; a defect of hasten stays what it is."""

from __future__ import annotations

import functools
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path as File
from typing import Any, ParamSpec, TypeVar

import torch

from hasten.core.errors import ConfigError, HastenError

P = ParamSpec("P")
R = TypeVar("R")
THEIRS = ("diffusers", "transformers")
PER_PROMPT = re.compile(r"num_\w+_per_prompt")


def refusing(probe: Callable[P, R]) -> Callable[P, R]:
    """``probe(pipe, call, **more)``, with ConfigError for what diffusers or transformers raise while the call runs.

    Also for a word where the call wants a number, which diffusers only finds out in its arithmetic.
    """

    @functools.wraps(probe)
    def inner(*args: P.args, **kwargs: P.kwargs) -> R:
        pipe: Any = args[0]
        more: dict[str, Any] = {k: v for k, v in kwargs.items() if k != "call"}
        given: Any = kwargs.get("call") or (args[1] if len(args) > 1 else None)
        numbers(pipe, {**(given or {}), **more})
        try:
            return probe(*args, **kwargs)
        except (HastenError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if not by_the_call(pipe, error):
                raise
            why = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise ConfigError(f"{type(pipe).__name__} refuses this call: {why}") from error

    return inner


def one_each(call: Mapping[str, Any]) -> dict[str, Any]:
    """The call with one image or video of a prompt where it asks for several."""
    return {k: 1 if PER_PROMPT.fullmatch(k) and isinstance(v, int) and v > 1 else v for k, v in call.items()}


def several(call: Mapping[str, Any]) -> None:
    """Raise ConfigError for several images of a prompt where every prompt stands for one sample."""
    if asked := [f"{k}={v!r}" for k, v in call.items() if one_each({k: v})[k] != v]:
        raise ConfigError(f"{asked[0]} would do nothing, for every prompt gets one sample; leave it out of the call.")


def numbers(pipe: Any, call: Mapping[str, Any]) -> None:
    """Raise ConfigError for a text that is given for an argument which the pipeline declares to be a number."""
    known = inspect.signature(pipe.__call__).parameters
    for name, value in call.items():
        kind = known[name].annotation if name in known else ""
        kind = getattr(kind, "__name__", "") if isinstance(kind, type) else str(kind)
        if isinstance(value, str) and re.fullmatch(r"(typing\.)?(Optional\[)?(int|float)\]?( \| None)?", kind):
            raise ConfigError(f"{name} of {type(pipe).__name__}'s call is a number, not {value!r}.")


def by_the_call(pipe: Any, error: Exception) -> bool:
    """Whether the pipeline's call ran, and the innermost code that is neither torch's nor Python's is not hasten's.

    What a GPU reports is no refusal.
    """
    if isinstance(error, torch.AcceleratorError) or (isinstance(error, RuntimeError) and "CUDA error" in str(error)):
        return False
    frames = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
    own = inspect.unwrap(type(pipe).__call__).__code__
    if own not in frames:
        return False
    mine = File(__file__).parent.parent
    theirs = {File(str(sys.modules[name].__file__)).parent for name in THEIRS if name in sys.modules}
    for code in reversed(frames):
        file = File(code.co_filename)
        if mine in file.parents:
            return False
        if code.co_filename == own.co_filename or theirs & {*file.parents}:
            return True
    return False
