"""Prompts: text files, tables, JSON, Hugging Face datasets; and how many of them an encoder would cut."""

from __future__ import annotations

import codecs
import csv
import importlib
import io
import itertools
import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hasten.core.errors import ConfigError, unknown

COLUMNS = ("prompt", "Prompt", "caption", "text")  # the first of these that a table has holds its prompts
SUFFIXES = (".txt", ".csv", ".tsv", ".jsonl", ".json")
SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can escape half a character, which no tokenizer takes
QUOTED = re.compile(r'\A"((?:[^"]|"")*)"\Z')
Row = tuple[str, Mapping[str, Any]]  # ("line 3", {column: value})
DATASET = r"\w[\w.-]*/\w[\w.-]*"
UNLIMITED = 10**6  # tokenizers without a limit say model_max_length = 1e30


def read_prompts(spec: str | Path | Sequence[str], column: str | None = None, limit: int | None = None) -> list[str]:
    """The prompts that ``spec`` names, in order; one that is written twice counts twice.

    A sequence is taken as it is, but for blank prompts. A .txt file has a prompt a line, a .csv or .tsv file a header
    row, a .jsonl file an object a line, a .json file a list of objects; their prompts stand under one of ``COLUMNS``
    (.jsonl and .json may hold bare strings instead). Anything else names a Hugging Face dataset, whose ``train`` split
    has such a column (needs ``pip install datasets``). Files are UTF-8; surrounding whitespace and blank prompts in
    them are dropped.

    Args:
        column: The column, or key, that holds the prompts, where it has another name; ``NAME:COLUMN`` as ``spec`` says
            the same.
        limit: At most so many prompts, the first ones.

    Raises:
        ConfigError: For anything that is missing, empty or unreadable, an unknown column, or a value that is no
            text; names the file and the line.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"The limit of prompts must be at least 1, not {limit}.")
    if isinstance(spec, str | Path):
        spec, column = split_column(str(spec), column, os.path.isfile)
        name, rows = _named(spec, column)
        found = filter(None, map(str.strip, _texts(rows, name, column)))
    else:
        name, rows = "the list", ((f"entry {i}", {"prompt": prompt}) for i, prompt in enumerate(spec, 1))
        found = filter(str.strip, _texts(rows, name, column))
    prompts = list(itertools.islice(found, limit))
    if not prompts:
        raise ConfigError(f"There is no prompt in {name}; give at least one.")
    return prompts


def split_column(spec: str, column: str | None, there: Callable[[str], bool]) -> tuple[str, str | None]:
    """(name, column) of ``NAME:COLUMN``, where NAME is ``there`` or that of a dataset; else ``spec`` as it is."""
    name, colon, last = spec.rpartition(":")
    if not colon or column is not None or there(os.path.expanduser(spec)):
        return spec, column
    return (name, last) if there(os.path.expanduser(name)) or re.fullmatch(DATASET, name) else (spec, column)


def too_long(tokenizers: Iterable[Any], prompts: Sequence[str], stacklevel: int = 2) -> int:
    """How many prompts have more tokens than the shortest limit among the tokenizers; warns once if any has.

    Tokens that a tokenizer adds itself count. A limit of 1e6 or more is none. A processor stands for its tokenizer;
    None, as a pipeline without its third encoder has it, is skipped.

    Args:
        stacklevel: As in :func:`warnings.warn`; 2 blames the caller.
    """
    every = [getattr(t, "tokenizer", t) for t in tokenizers if t is not None]
    shortest = min((t.model_max_length for t in every), default=UNLIMITED)
    over: set[int] = set()
    for tokenizer in (t for t in every if t.model_max_length == shortest < UNLIMITED):
        for start in range(0, len(prompts), 1024):  # the ids of a million prompts would be gigabytes
            ids = tokenizer(list(prompts[start : start + 1024]), verbose=False)["input_ids"]
            over.update(start + i for i, tokens in enumerate(ids) if len(tokens) > shortest)
    if over:
        warnings.warn(
            f"{len(over)} of {len(prompts)} prompts are longer than {shortest} tokens, the shortest limit of a text "
            f"encoder, which does not see what is beyond it (first: prompt {min(over) + 1}).",
            stacklevel=stacklevel,
        )
    return len(over)


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a file; a bare string, such as a line of a .txt file, is a row with the one column ``prompt``."""
    name, suffix, text = path.name, path.suffix.lower(), read_text(path)
    if suffix not in SUFFIXES:
        raise ConfigError(f"Cannot read {name!r}: text is read from {', '.join(SUFFIXES)}.")
    if not text.strip():
        raise ConfigError(f"{name} is empty.")
    if suffix in (".csv", ".tsv"):
        rows = _table(text, name, suffix == ".tsv")
    elif suffix == ".json":
        entries = _json(text, name)
        if not isinstance(entries, list):
            raise ConfigError(f"{name} holds no list; a list of prompts is expected.")
        rows = ((f"entry {i}", entry) for i, entry in enumerate(entries, 1))
    else:
        lines = ((i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip())
        rows = ((f"line {i}", line if suffix == ".txt" else _json(line, name, i)) for i, line in lines)
    yield from ((place, row if isinstance(row, dict) else {"prompt": row}) for place, row in rows)


def read_text(path: Path) -> str:
    """A UTF-8 file with or without byte order mark, its line ends made plain. Raises ConfigError with the line."""
    try:
        raw = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise ConfigError(f"Cannot read {str(path)!r}: {error.strerror}.") from error
    raw = raw.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    try:
        text, bad = raw.decode(), raw.find(b"\0")  # a zero is what UTF-16 without its mark looks like
    except UnicodeDecodeError as error:
        text, bad = "", error.start
    if bad >= 0:
        line = raw.count(b"\n", 0, bad) + 1
        raise ConfigError(f"{path.name}, line {line}: not UTF-8; save the file as UTF-8.")
    return text


def column_of(columns: Iterable[str], name: str, column: str | None = None, whole: str | None = None) -> str:
    """``column``, or the first of ``COLUMNS`` that is there. Raises ConfigError where it is not.

    Args:
        whole: What a person gave, where the table is only part of it.
    """
    columns = list(columns)
    if column is not None and column not in columns:
        raise unknown(f"column of {name} (it has {', '.join(columns)})", column, columns)
    found = column or next((c for c in COLUMNS if c in columns), None)
    if found is None:
        known, names = ", ".join(columns) or "(none)", ", ".join(COLUMNS)
        texts = [c for c in columns if c != "file_name"]
        fix = f", as in {whole or name}:{texts[-1]}" if texts else ""
        raise ConfigError(
            f"{name} has the columns {known}; text is looked for under {names}; name the column behind a colon{fix}."
        )
    return found


def text_of(row: Mapping[str, Any], column: str, name: str, place: str) -> str:
    """The text under ``column``. Raises ConfigError with the place where there is none."""
    if not isinstance(value := row.get(column), str):
        found = type(value).__name__ if column in row else "nothing"
        raise ConfigError(f"{name}, {place}: expected text under {column!r}, found {found}.")
    if SURROGATE.search(value):
        raise ConfigError(f"{name}, {place}: the text has half a character (an unpaired surrogate); correct it.")
    return value


def _texts(rows: Iterable[Row], name: str, column: str | None) -> Iterator[str]:
    key = None
    for place, row in rows:
        key = key or column_of(row, name, column)
        yield text_of(row, key, name, place)


def _named(spec: str, column: str | None) -> tuple[str, Iterator[Row]]:
    path = Path(os.path.expanduser(spec))
    if os.path.isfile(path):  # unlike Path.is_file, False where the "name" is a prompt too long for one
        return path.name, read_rows(path)
    if os.path.isdir(path):
        raise ConfigError(f"{spec!r} is a folder; name a file of prompts ({', '.join(SUFFIXES)}).")
    if path.suffix.lower() in SUFFIXES or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", spec):
        raise ConfigError(f"There is no file {spec!r}; if it is a prompt, put it into a list.")
    return spec, _hub(spec, column)


def _table(text: str, name: str, tabs: bool) -> Iterator[Row]:
    # Tab-separated text knows no quoting: a quotation mark that opens a prompt is part of it.
    how: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {"strict": True}
    reader = csv.reader(io.StringIO(text, newline=""), **how)
    lines = (cells for cells in reader if any(map(str.strip, cells)))
    try:
        header = [cell.strip() for cell in next(lines, [])]
        for cells in lines:
            place = f"line {reader.line_num}"
            if len(cells) != len(header):
                fix = "remove stray tabs" if tabs else "put quotes around text that has commas"
                raise ConfigError(f"{name}, {place}: {len(cells)} columns, but the header has {len(header)}; {fix}.")
            if tabs:  # but a cell that is quoted as a whole comes from a program that quotes
                cells = [QUOTED.sub(lambda m: m[1].replace('""', '"'), cell) for cell in cells]
            yield place, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise ConfigError(f"{name}, line {reader.line_num}: {error}.") from error


def _json(text: str, name: str, line: int = 1) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # no JSON, a number of 5,000 digits, a thousand brackets
        line += getattr(error, "lineno", 1) - 1
        raise ConfigError(f"{name}, line {line}: no valid JSON ({getattr(error, 'msg', error)}).") from error


def _hub(spec: str, column: str | None) -> Iterator[Row]:
    try:
        hub = importlib.import_module("datasets")
    except ImportError:
        raise ConfigError(f"{spec!r} is no file; to load the Hugging Face dataset, pip install datasets.") from None
    try:
        table = hub.load_dataset(spec, split="train")
    except Exception as error:  # offline, unknown, gated: the hub raises a dozen types for them
        why = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ConfigError(f"Cannot load the dataset {spec!r} ({why}); check name and network.") from error
    key = column_of(table.features, spec, column)
    yield from ((f"row {i}", {key: text}) for i, text in enumerate(table[key]))
