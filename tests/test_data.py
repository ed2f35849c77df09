"""Data: what is read, how it is mapped, and every input that is refused, in one sentence that names the culprit."""

from __future__ import annotations

import io
import sys
import types
from pathlib import Path as File
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hasten.core.errors import ConfigError
from hasten.data import Conditions, Images, digits, from_arrays, load
from hasten.models.dit import DiT, DiTConfig
from hasten.pairs import make_pairs


def u8(*shape: int) -> np.ndarray:
    """Random bytes."""
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def seeded(seed: int) -> torch.Generator:
    """A generator."""
    return torch.Generator().manual_seed(seed)


def test_digits_are_the_1797_in_range():
    data = digits()
    assert (len(data), data.shape, data.classes) == (1797, (1, 8, 8), 10)
    assert float(data.x.min()) == -1 and float(data.x.max()) == 1
    assert load("digits").x.equal(data.x)


def test_a_batch_is_a_function_of_the_generator():
    data = digits()
    a, b, c = (data.batch(32, seeded(s)) for s in (1, 1, 2))
    assert a.data.equal(b.data) and a.cond["label"].equal(b.cond["label"])
    assert not a.data.equal(c.data)
    assert a.shape == (32, 1, 8, 8) and a.data.shape == a.shape and a.uncond["label"].eq(10).all()


def test_a_batch_keeps_images_with_their_labels():
    x = torch.linspace(-1, 1, 5).view(5, 1, 1, 1).expand(5, 1, 2, 2).contiguous()
    batch = Images(x, torch.arange(5)).batch(64, seeded(0))
    assert batch.data[:, 0, 0, 0].equal(torch.linspace(-1, 1, 5)[batch.cond["label"]])


def test_conditions_have_no_data_and_uniform_labels():
    batch = Conditions((1, 4, 4), 3).batch(600, seeded(0))
    assert batch.x0 is None and batch.shape == (600, 1, 4, 4)
    assert torch.bincount(batch.cond["label"], minlength=3).min() > 150
    assert Conditions((1, 4, 4)).batch(2, seeded(0)).cond == {}


def test_split_is_disjoint_stratified_and_deterministic():
    data = digits()
    parts = data.split((0.5, 0.3, 0.2), seed=3)
    assert sum(map(len, parts)) == len(data)
    images = [{tuple(row.tolist()) for row in part.x.flatten(1)} for part in parts]
    whole = {tuple(row.tolist()) for row in data.x.flatten(1)}
    assert len(set.union(*images)) == len(whole) == sum(map(len, images))
    share = torch.bincount(data.labels)  # type: ignore[arg-type]
    for fraction, part in zip((0.5, 0.3, 0.2), parts, strict=True):
        assert part.classes == 10 and part.labels is not None
        assert (torch.bincount(part.labels) - fraction * share).abs().max() < 1.5
    assert all(a.x.equal(b.x) for a, b in zip(parts, data.split((0.5, 0.3, 0.2), seed=3), strict=True))
    assert not parts[0].x.equal(data.split((0.5,), seed=4)[0].x)
    assert sum(map(len, Images(data.x[:10]).split((0.25, 0.25)))) == 5


@pytest.mark.parametrize("fractions", [(), (0.5, 0.6), (0.0, 1.0), (1e-4,)])
def test_split_refuses(fractions: tuple[float, ...]):
    with pytest.raises(ConfigError, match="fraction|empty"):
        digits().split(fractions)


def test_bytes_and_floats_are_mapped():
    images = u8(4, 5, 6)
    assert from_arrays(images).x.equal(torch.from_numpy(images).float()[:, None] / 127.5 - 1)
    assert from_arrays(u8(4, 8, 8, 3)).shape == (3, 8, 8)
    assert from_arrays(u8(4, 3, 8, 8)).shape == (3, 8, 8)
    signed = np.linspace(-1, 1, 64).reshape(4, 4, 4)
    assert torch.allclose(from_arrays(signed).x.flatten(), torch.linspace(-1, 1, 64), atol=1e-6)
    with pytest.warns(UserWarning, match=r"read as \[0, 1\]"):
        assert float(from_arrays((signed + 1) / 2).x.min()) == -1


def test_npz_and_npy(tmp_path: File):
    np.savez(tmp_path / "a.npz", x_train=u8(6, 8, 8), y_train=np.arange(6)[:, None], x_test=u8(2, 8, 8))
    found = load(str(tmp_path / "a.npz"))
    assert (len(found), found.shape, found.classes, found.name) == (6, (1, 8, 8), 6, "a.npz")
    np.save(tmp_path / "b.npy", u8(3, 8, 8))
    assert load(str(tmp_path / "b.npy")).labels is None


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no images": ({"photos": u8(2, 4, 4), "y": np.zeros(2)}, "has the keys photos, y"),
    "wrong shape": ({"x": u8(4, 4)}, r"not \[4, 4\]"),
    "no image at all": ({"x": u8(0, 4, 4)}, r"not \[0, 4, 4\]"),
    "nan": ({"x": np.array([[[0.0, np.nan]]])}, "1 of 1 images hold NaN"),
    "infinite": ({"x": np.array([[[0.0]], [[np.inf]]])}, "first: 1"),
    "out of range": ({"x": np.array([[[0.0, 200.0]]])}, "range from 0 to 200"),
    "integers": ({"x": np.zeros((2, 4, 4), int)}, "uint8 or float, not int64"),
    "negative label": ({"x": u8(2, 4, 4), "y": np.array([0, -1])}, "label -1 of image 1 is out of range"),
    "too few labels": ({"x": u8(3, 4, 4), "y": np.array([0, 1])}, "3 images need labels"),
    "float labels": ({"x": u8(2, 4, 4), "y": np.array([0.0, 1.0])}, "must be integers"),
    "pickled": ({"x": np.array([object()], dtype=object)}, "pickled objects"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_npz_is_refused(case: str, tmp_path: File):
    arrays, message = REFUSED[case]
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ConfigError, match=message) as error:
        load(str(tmp_path / "bad.npz"))
    assert "bad.npz" in str(error.value)


def test_labels_beyond_the_classes_are_refused():
    with pytest.raises(ConfigError, match="label 7 of image 1 is out of range; labels are 0 to 4"):
        Images(torch.zeros(2, 1, 4, 4), torch.tensor([0, 7]), 5)


def test_truncated_and_foreign_files_are_refused(tmp_path: File):
    buffer = io.BytesIO()
    np.savez(buffer, x=u8(50, 8, 8))
    (tmp_path / "cut.npz").write_bytes(buffer.getvalue()[:500])
    (tmp_path / "text.npy").write_text("hello")
    (tmp_path / "table.csv").write_text("1,2")
    for name in ("cut.npz", "text.npy", "table.csv"):
        with pytest.raises(ConfigError, match=name):
            load(str(tmp_path / name))


def pictures(folder: File, count: int = 2, mode: str = "L", size: tuple[int, int] = (6, 4)) -> None:
    """Pictures in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new(mode, size, 40 * i).save(folder / f"{i}.png")


def test_a_folder_of_classes(tmp_path: File):
    pictures(tmp_path / "b", 1)
    pictures(tmp_path / "a", 3)
    (tmp_path / "empty").mkdir()
    found = load(str(tmp_path))
    assert found.shape == (1, 4, 6) and found.classes == 2
    assert found.labels is not None and found.labels.tolist() == [0, 0, 0, 1]


def test_one_colour_picture_makes_the_folder_rgb_and_transparency_white(tmp_path: File):
    pictures(tmp_path, 1)
    Image.new("RGBA", (6, 4), (0, 0, 0, 0)).save(tmp_path / "z.png")
    found = load(str(tmp_path))
    assert found.shape == (3, 4, 6) and found.labels is None
    assert found.x[0].eq(-1).all() and found.x[1].eq(1).all()


def test_bad_folders_are_refused(tmp_path: File):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no images"):
        load(str(tmp_path / "empty"))

    pictures(tmp_path / "corrupt", 3)
    good = (tmp_path / "corrupt" / "1.png").read_bytes()
    for broken in (good[: len(good) // 2], b"no picture"):
        (tmp_path / "corrupt" / "1.png").write_bytes(broken)
        with pytest.raises(ConfigError, match=r"1\.png"):
            load(str(tmp_path / "corrupt"))

    pictures(tmp_path / "sizes", 1)
    Image.new("L", (9, 9)).save(tmp_path / "sizes" / "z.png")
    with pytest.raises(ConfigError, match=r"z\.png' is 9x9 but '0\.png' is 6x4"):
        load(str(tmp_path / "sizes"))

    pictures(tmp_path / "both", 1)
    pictures(tmp_path / "both" / "a", 1)
    with pytest.raises(ConfigError, match="beside class folders"):
        load(str(tmp_path / "both"))

    pictures(tmp_path / "deep", 1, "I;16")
    with pytest.raises(ConfigError, match="0.png"):
        load(str(tmp_path / "deep"))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("digit", "did you mean 'digits'"),
        ("nowhere/a/b", "no such file or folder"),
        ("gone.npz", "no such file or folder"),
        ("owner/set", "pip install datasets"),
    ],
)
def test_what_is_not_there_is_refused(spec: str, message: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # as where it is not installed
    with pytest.raises(ConfigError, match=message):
        load(spec)


def test_a_dataset_of_the_hub(monkeypatch: pytest.MonkeyPatch):
    kinds = {n: type(n, (), {"num_classes": 4}) for n in ("Image", "ClassLabel", "Value")}

    class Table(dict):
        features = {"id": kinds["Value"](), "picture": kinds["Image"](), "digit": kinds["ClassLabel"]()}

    table = Table(picture=[Image.new("L", (4, 4), 255)] * 3, digit=[0, 1, 2])

    def load_dataset(name: str, split: str) -> Table:
        if name == "owner/offline":
            raise ConnectionError("Couldn't reach the Hub\nmore")
        return table

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    found = load("owner/set")
    assert found.shape == (1, 4, 4) and found.classes == 4 and found.x.eq(1).all()
    with pytest.raises(ConfigError, match=r"Cannot load the dataset 'owner/offline' \(Couldn't reach the Hub\)"):
        load("owner/offline")
    Table.features = {"id": kinds["Value"]()}
    with pytest.raises(ConfigError, match="no image column; its columns are id"):
        load("owner/set")


def test_pairs_are_the_teachers_and_repeat():
    teacher = DiT(DiTConfig(size=(4, 4), width=8, depth=1, heads=1, classes=3)).eval()
    (*_, a), (*_, b) = (make_pairs(teacher, 7, points=2, substeps=2, seed=5, batch=4) for _ in range(2))
    assert a.trajectories.shape == (7, 3, 1, 4, 4) and a.trajectories.equal(b.trajectories)
    batch = a.batch(16, seeded(0))
    assert batch.pairs is not None and batch.pairs.shape == (16, 3, 1, 4, 4) and batch.x0 is None
    assert a.labels is not None and len(a.labels) == 7
    before = torch.get_rng_state()
    list(make_pairs(teacher, 2, 1))
    assert torch.get_rng_state().equal(before)
    with pytest.raises(ConfigError, match="positive"):
        next(make_pairs(teacher, 0, 1))
