"""Prompts: every way to write them down, every file that is refused with its line, and the count of those too long."""

from __future__ import annotations

import json
import os
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest

from hasten.core.errors import ConfigError
from hasten.prompts import read_prompts, too_long

DATA = Path(os.environ.get("HASTEN_DATA", "../shared/data")) / "prompts"
real = pytest.mark.skipif(not DATA.is_dir(), reason=f"there are no prompts in {DATA}")


def write(folder: Path, name: str, text: str | bytes) -> Path:
    """A file of these very bytes."""
    (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return folder / name


READ: dict[str, tuple[str, str | bytes, list[str]]] = {
    "lines": ("a.txt", "a cat\n\n  a dog \t\na cat\n", ["a cat", "a dog", "a cat"]),
    "windows": ("a.txt", b"\xef\xbb\xbfa cat\r\n\r\nein M\xc3\xa4dchen\r\n", ["a cat", "ein Mädchen"]),
    "old mac, no last line end": ("a.TXT", "a cat\ra dog", ["a cat", "a dog"]),
    "line separators inside": ("a.txt", "a\u2028cat\x0bsat\na dog", ["a\u2028cat\x0bsat", "a dog"]),
    "csv": ("a.csv", 'id,prompt\n1,"a cat, ""big"""\n2,a dog\n', ['a cat, "big"', "a dog"]),
    "csv of windows": ("a.csv", b"\xef\xbb\xbfprompt\r\na cat\r\n", ["a cat"]),
    "csv with a line end in a cell": ("a.csv", 'caption,n\r\n"a cat\r\nsat",1\r\n', ["a cat\nsat"]),
    "csv with blanks": ("a.csv", "n, text \n\n1,\n2, a cat \n", ["a cat"]),
    "prompt before text": ("a.csv", "text,prompt\nno,a cat\n", ["a cat"]),
    "tsv keeps quotes": ("a.tsv", 'Prompt\tn\n"GO" on a wall\t1\n7" of rain\t2\n', ['"GO" on a wall', '7" of rain']),
    "tsv of a program that quotes": ("a.tsv", 'Prompt\tn\n"a ""GO"" sign"\t1\n', ['a "GO" sign']),
    "jsonl": ("a.jsonl", '{"n": 1, "prompt": " a cat "}\r\n\n{"prompt": "a\u2028dog"}', ["a cat", "a\u2028dog"]),
    "jsonl of strings": ("a.jsonl", '"a cat"\n"a \\"dog\\""\n', ["a cat", 'a "dog"']),
    "json": ("a.json", '["a cat", "", "a dog"]', ["a cat", "a dog"]),
    "json of objects": ("a.json", '[{"caption": "a cat"}, {"caption": "a dog"}]', ["a cat", "a dog"]),
}


@pytest.mark.parametrize("case", READ)
def test_what_is_read(case: str, tmp_path: Path):
    name, text, prompts = READ[case]
    path = write(tmp_path, name, text)
    assert read_prompts(path) == read_prompts(str(path)) == prompts
    assert read_prompts(path, limit=1) == prompts[:1]


def test_a_sequence_is_taken_as_it_is():
    assert read_prompts((" a cat", "a cat\n")) == [" a cat", "a cat\n"]
    assert read_prompts(["a", "b", "c"], limit=2) == ["a", "b"]


def test_a_column_of_any_name(tmp_path: Path):
    table = write(tmp_path, "a.csv", "prompt,long\na cat,a cat on a mat\n")
    assert read_prompts(table, "long") == ["a cat on a mat"]
    objects = write(tmp_path, "a.jsonl", '{"prompt": 3, "long": "a cat on a mat"}')
    assert read_prompts(objects, column="long") == ["a cat on a mat"]


def test_the_limit_stops_before_what_is_wrong_behind_it(tmp_path: Path):
    path = write(tmp_path, "a.jsonl", '{"prompt": "a"}\n{"prompt": " "}\n{"prompt": "b"}\nnonsense')
    assert read_prompts(path, limit=2) == ["a", "b"]
    with pytest.raises(ConfigError, match=r"a\.jsonl, line 4: no valid JSON \(Expecting value\)"):
        read_prompts(path, limit=3)


REFUSED: dict[str, tuple[str, str | bytes, str]] = {
    "empty": ("a.txt", "", r"a\.txt is empty"),
    "only a mark": ("a.csv", b"\xef\xbb\xbf\r\n", r"a\.csv is empty"),
    "blank": ("a.txt", " \n\n\t\n", r"a\.txt is empty"),
    "only a header": ("a.csv", "prompt,n\n", r"no prompt in a\.csv"),
    "blank cells": ("a.tsv", "prompt\tn\n \t1\n", r"no prompt in a\.tsv"),
    "no entry": ("a.json", "[]", r"no prompt in a\.json"),
    "blank entry": ("a.jsonl", '{"prompt": ""}', r"no prompt in a\.jsonl"),
    "no header": ("a.csv", "a cat\na dog\n", "has the columns a cat; text is looked for under prompt, Prompt, caption"),
    "no known key": (
        "a.jsonl",
        '{"tag": "x", "n": 1}',
        "has the columns tag, n; .* name the column behind a colon, as in a.jsonl:n",
    ),
    "a later row without the key": (
        "a.jsonl",
        '{"text": "x"}\n\n{"txt": "y"}',
        "line 3: .* under 'text', found nothing",
    ),
    "a number": ("a.jsonl", '{"prompt": "x"}\n{"prompt": 7}', "line 2: expected text under 'prompt', found int"),
    "null": ("a.json", '["x", null]', "entry 2: expected text under 'prompt', found NoneType"),
    "captions in a list": ("a.json", '[{"text": ["x"]}]', "entry 1: expected text under 'text', found list"),
    "half a character": ("a.json", '["x", "\\ud83d"]', "entry 2: the text has half a character"),
    "no list": ("a.json", '{"prompt": "x"}', "holds no list"),
    "bad json": ("a.json", '["a",\n"b"\n"c"]', r"a\.json, line 3: no valid JSON \(Expecting ',' delimiter\)"),
    "bad line": ("a.jsonl", '{"prompt": "x"}\n\n{"prompt": x}', r"a\.jsonl, line 3: no valid JSON"),
    "deep": ("a.json", "[" * 200_000, r"a\.json, line 1: no valid JSON"),
    "bad utf-8": ("a.txt", b"\xef\xbb\xbfa\r\nb\rc M\xe4dchen\r\n", r"a\.txt, line 3: not UTF-8"),
    "utf-16": ("a.txt", "a cat\nb".encode("utf-16"), r"a\.txt, line 1: not UTF-8"),
    "utf-16 without a mark": ("a.txt", "a\nb".encode("utf-16-le"), r"a\.txt, line 1: not UTF-8"),
    "bare commas": ("a.csv", "prompt\na cat\na cat, big\n", "line 3: 2 columns, but the header has 1; put quotes"),
    "a tab too many": ("a.tsv", "prompt\tn\na\tcat\t1\n", "line 2: 3 columns, but the header has 2; remove stray tabs"),
    "too few": ("a.csv", "n,prompt\n1,a cat\n2\n", "line 3: 1 columns, but the header has 2"),
    "an open quote": ("a.csv", 'prompt\na\n"b\nc\n', r"a\.csv, line 4: unexpected end of data"),
    "no text file": ("a.md", "a cat", r"Cannot read 'a\.md': text is read from \.txt, \.csv"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str, tmp_path: Path):
    name, text, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        read_prompts(write(tmp_path, name, text))


def test_an_unknown_column_names_the_known_ones(tmp_path: Path):
    table = write(tmp_path, "a.tsv", "Prompt\tCategory\na cat\tAnimals\n")
    with pytest.raises(ConfigError, match=r"'Promt'; did you mean 'Prompt'\?") as error:
        read_prompts(table, "Promt")
    assert "column of a.tsv (it has Prompt, Category)" in str(error.value)
    for spec in (["a cat"], write(tmp_path, "a.txt", "a cat"), write(tmp_path, "a.json", '["a cat"]')):
        with pytest.raises(ConfigError, match="Unknown column of .* 'Category'"):
            read_prompts(spec, "Category")


def test_a_column_is_named_behind_a_colon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    table = write(tmp_path, "a.csv", "title,n:o\na cat,1\na dog,2\n")
    assert read_prompts(f"{table}:title") == ["a cat", "a dog"] and read_prompts(table, "n:o") == ["1", "2"]
    with pytest.raises(ConfigError, match="Unknown column of a.csv .it has title, n:o. 'titel'; did you mean 'title'"):
        read_prompts(f"{table}:titel")
    odd = write(tmp_path, "a.csv:title.txt", "a cow")  # a file of such a name is that file
    assert read_prompts(odd) == ["a cow"]
    asked: list[Any] = []
    monkeypatch.setattr("hasten.prompts._hub", lambda *a: asked.append(a) or iter([("row 0", {"long": "x"})]))
    assert read_prompts("owner/set:long") == ["x"] and asked == [("owner/set", "long")]


def test_blank_prompts_of_a_list_are_dropped_as_a_file_s_are():
    assert read_prompts(["a", "", " b", "\n"]) == ["a", " b"]
    with pytest.raises(ConfigError, match="There is no prompt in the list"):
        read_prompts(["", " "])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("gone.txt", r"There is no file 'gone\.txt'"),
        (Path("gone/deep/er"), "There is no file"),
        ("a red bicycle", "if it is a prompt, put it into a list"),
        ("a red bicycle, " * 400, "if it is a prompt, put it into a list"),  # too long for a file's name
        (".", "is a folder"),
        ([], "There is no prompt in the list"),
        ((), "There is no prompt in the list"),
        (["a", 3], "the list, entry 2: expected text under 'prompt', found int"),
        ("owner/set", "pip install datasets"),
    ],
)
def test_what_is_not_there_is_refused(spec: Any, message: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # as where it is not installed
    with pytest.raises(ConfigError, match=message):
        read_prompts(spec)


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_of_nothing_is_refused(limit: int):
    with pytest.raises(ConfigError, match=f"at least 1, not {limit}"):
        read_prompts(["a"], limit=limit)


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write(tmp_path, "a.txt", "a cat")

    def denied(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", denied)  # root may read everything
    with pytest.raises(ConfigError, match=r"Cannot read '.*a\.txt': Permission denied"):
        read_prompts(path)


def test_a_dataset_of_the_hub(monkeypatch: pytest.MonkeyPatch):
    class Table(dict):
        @property
        def features(self) -> dict[str, str]:
            return dict.fromkeys(self, "Value")

    asked = []

    def load_dataset(name: str, split: str) -> Table:
        asked.append((name, split))
        if name == "owner/offline":
            raise ConnectionError("Couldn't reach the Hub\nmore")
        return Table(id=[1, 2, 3], text=["a cat", " ", "a dog "])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert read_prompts("owner/set") == ["a cat", "a dog"]
    assert read_prompts("owner/set", limit=1) == ["a cat"]
    assert asked == [("owner/set", "train")] * 2
    with pytest.raises(ConfigError, match=r"column of owner/set \(it has id, text\) 'txt'; did you mean 'text'"):
        read_prompts("owner/set", "txt")
    with pytest.raises(ConfigError, match="owner/set, row 0: expected text under 'id', found int"):
        read_prompts("owner/set", "id")
    with pytest.raises(ConfigError, match=r"Cannot load the dataset 'owner/offline' \(Couldn't reach the Hub\)"):
        read_prompts("owner/offline")


@real
def test_real_prompts():
    parti = read_prompts(DATA / "PartiPrompts.tsv")
    assert len(parti) == 1632 and parti[0] == "bond"
    assert sum(p.startswith('"G I G G L E" painted') for p in parti) == 1  # opens with a quotation mark
    geneval = read_prompts(DATA / "geneval_metadata.jsonl")
    assert len(geneval) == 553 and all(p.startswith("a photo of ") for p in geneval)
    vbench = read_prompts(DATA / "vbench_all_dimension.txt", limit=900)
    assert len(vbench) == 900 and vbench[0] == "In a still frame, a stop sign"
    assert len(read_prompts(DATA / "vbench_all_dimension.txt")) == 946
    assert {*read_prompts(DATA / "PartiPrompts.tsv", "Category")} >= {"Animals", "Abstract"}


@real
@pytest.mark.parametrize("suffix", ["csv", "jsonl", "json", "txt"])
def test_real_prompts_survive_another_format(suffix: str, tmp_path: Path):
    import csv

    parti = read_prompts(DATA / "PartiPrompts.tsv")
    path = tmp_path / f"a.{suffix}"
    with path.open("w", newline="", encoding="utf-8") as file:
        if suffix == "csv":
            csv.writer(file).writerows([["prompt"], *([p] for p in parti)])
        elif suffix == "json":
            json.dump(parti, file)
        else:
            file.writelines((json.dumps({"prompt": p}) if suffix == "jsonl" else p) + "\n" for p in parti)
    assert read_prompts(path) == parti


class Words:
    """A tokenizer that makes a token of every word, and adds two."""

    def __init__(self, model_max_length: float):
        self.model_max_length, self.longest_call = model_max_length, 0

    def __call__(self, prompts: list[str], verbose: bool) -> dict[str, list[list[int]]]:
        assert not verbose
        self.longest_call = max(self.longest_call, len(prompts))
        return {"input_ids": [[0, *range(len(p.split())), 0] for p in prompts]}


def test_too_long_counts_against_the_shortest_limit():
    prompts = ["a b", "a b c", "a b c d", "a b c d e f g"]  # 4, 5, 6 and 9 tokens
    with pytest.warns(UserWarning, match=r"^2 of 4 prompts are longer than 5 tokens, .*first: prompt 3") as caught:
        assert too_long([Words(8), Words(1e30), None, Words(5)], prompts) == 2
    assert len(caught) == 1 and caught[0].filename == __file__
    with pytest.warns(UserWarning, match="1 of 4 prompts are longer than 8 tokens"):
        assert too_long([types.SimpleNamespace(tokenizer=Words(8))], prompts) == 1  # a processor


class Letters(Words):
    """A tokenizer that makes a token of every character."""

    def __call__(self, prompts: list[str], verbose: bool) -> dict[str, list[list[int]]]:
        return {"input_ids": [[0] * len(p) for p in prompts]}


def test_equal_limits_count_a_prompt_once():
    with pytest.warns(UserWarning, match="^3 of 4 .*first: prompt 1"):
        assert too_long([Words(5), Letters(5)], ["abcdef", "a", "a b c d", "abcdefg"]) == 3


def test_a_tokenizer_with_a_longer_limit_counts_nothing():
    with pytest.warns(UserWarning, match="^1 of 2 .*first: prompt 2"):
        assert too_long([Letters(6), Words(5)], ["abcdefg", "a b c d"]) == 1


def test_too_long_is_silent_where_nothing_is():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert too_long([Words(5)], ["a b c"]) == 0
        assert too_long([endless := Words(1e30), None], ["a " * 99]) == 0 and not endless.longest_call
        assert too_long([], ["a"]) == 0


def test_many_prompts_go_through_in_pieces():
    words = Words(3)
    prompts = ["a b" if i % 1000 == 999 else "a" for i in range(3000)]
    with pytest.warns(UserWarning, match="^3 of 3000 .*first: prompt 1000"):
        assert too_long([words], prompts) == 3
    assert words.longest_call == 1024


def test_a_real_tokenizer_counts_its_own_tokens(capfd: pytest.CaptureFixture[str]):
    transformers = pytest.importorskip("transformers")
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = ["<|startoftext|>", "<pad>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters)]
    clip = transformers.CLIPTokenizer(
        vocab={t: i for i, t in enumerate(tokens)}, merges=[], pad_token="<pad>", model_max_length=77
    )
    with pytest.warns(UserWarning, match="^1 of 2 prompts are longer than 77 tokens"):
        assert too_long([clip, clip], ["x" * 75, "x" * 76]) == 1  # 77 and 78 with the start and the end
    assert "longer than the specified maximum" not in "".join(capfd.readouterr())  # its own, second warning
