"""Captioned pictures: every way to caption them, every folder that is refused, and sizes without distortion."""

from __future__ import annotations

import csv
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hasten.captioned import Captions, buckets, crop, load_captioned, nearest
from hasten.core.errors import ConfigError

EMOJI = Path(os.environ.get("HASTEN_DATA", "../shared/data")) / "noto_emoji64.npz"
real = pytest.mark.skipif(not EMOJI.is_file(), reason=f"there is no {EMOJI}")


def picture(file: Path, colour: Any = "white", size: tuple[int, int] = (6, 4), mode: str = "RGB", **how: Any) -> Path:
    """A plain picture of size (width, height)."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(file, **how)
    return file


def one(image: Image.Image, folder: Path, suffix: str = "png", **how: Any) -> Captions:
    """A set of this one picture, from a file."""
    image.save(folder / f"one.{suffix}", **how)
    return Captions([folder / f"one.{suffix}"], ["one"])


def table(folder: Path, rows: list[dict[str, Any]], name: str = "metadata.jsonl") -> None:
    """The table of a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / name).open("w", newline="") as file:
        if name.endswith("csv"):
            writer = csv.DictWriter(file, [*rows[0]])
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def names(found: Captions) -> list[str]:
    """The files' names."""
    assert not isinstance(found.pictures, np.ndarray)
    return [file.name for file in found.pictures]


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
@pytest.mark.parametrize("column", ["text", "caption", "long"])
def test_a_table_names_pictures_and_captions(name: str, column: str, tmp_path: Path):
    for i, file in enumerate(("b.png", "a.jpg", "deep/c.webp")):
        picture(tmp_path / file, (0, 0, 0) if i else (255, 255, 255))
    (tmp_path / "README.txt").write_text("not a caption")
    rows = [("b.png", "a cat, big"), ("./a.jpg", " a dog "), ("deep/c.webp", "a cow"), ("b.png", "a cat again")]
    table(tmp_path, [{"n": 1, "file_name": file, column: text} for file, text in rows], name)
    found = load_captioned(str(tmp_path), "long" if column == "long" else None)
    assert names(found) == ["b.png", "a.jpg", "c.webp", "b.png"] and len(found) == 4
    assert list(found.captions) == ["a cat, big", "a dog", "a cow", "a cat again"]
    assert found.load(0, (4, 6)).eq(1).all() and found.load(2, (4, 6)).eq(-1).all()
    assert found.name == tmp_path.name


def test_a_column_of_captions_is_named_behind_a_colon(tmp_path: Path):
    picture(tmp_path / "a.png")
    table(tmp_path, [{"file_name": "a.png", "title": "a cat", "label": 1}])
    assert list(load_captioned(f"{tmp_path}:title").captions) == ["a cat"]
    with pytest.raises(ConfigError, match=f"name the column behind a colon, as in {tmp_path}:label"):
        load_captioned(tmp_path)


def test_a_text_beside_every_picture(tmp_path: Path):
    for file in ("b.png", "a.PNG", "deep/a.jpg", ".hidden.png", ".cache/x.png"):
        picture(tmp_path / file)
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfa cat,\r\n  big\r\n")
    (tmp_path / "a.txt").write_text("a dog")
    (tmp_path / "deep" / "a.txt").write_text("a cow")
    (tmp_path / "notes.txt").write_text("of no picture")
    found = load_captioned(tmp_path)
    assert dict(zip(names(found), found.captions, strict=True)) == {
        "a.PNG": "a dog", "b.png": "a cat, big", "a.jpg": "a cow",
    }  # fmt: skip


def test_an_npz(tmp_path: Path):
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 6, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=images, captions=np.array(["a cat", " a dog", "a cow"]))
    found = load_captioned(tmp_path / "a.npz")
    assert list(found.captions) == ["a cat", "a dog", "a cow"] and found.name == "a.npz" and found.size(1) == (4, 6)
    assert found.load(1, (4, 6)).equal(torch.from_numpy(images[1]).permute(2, 0, 1).float() / 127.5 - 1)
    assert found.load(1, (8, 12)).shape == (3, 8, 12)


def test_nothing_is_read_before_it_is_asked_for(tmp_path: Path):
    picture(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no picture")
    for stem in "ab":
        (tmp_path / f"{stem}.txt").write_text(stem)
    found = load_captioned(tmp_path)
    assert found.load(0, (4, 4)).shape == (3, 4, 4)
    for read in (found.size, lambda i: found.load(i, (4, 4))):
        with pytest.raises(ConfigError, match=r"Cannot read the image '.*b\.png'"):
            read(1)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "tif"])
def test_a_truncated_picture_is_named(suffix: str, tmp_path: Path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    found = one(Image.fromarray(noise), tmp_path, suffix)
    file = tmp_path / f"one.{suffix}"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ConfigError, match=rf"Cannot read the image '.*one\.{suffix}' \(.+\); repair it\.$"):
        found.load(0, (8, 8))


def fill(folder: Path, count: int = 3) -> None:
    """Pictures without captions."""
    for i in range(count):
        picture(folder / f"{i}.png")


def without_text(folder: Path) -> None:
    fill(folder)
    (folder / "1.txt").write_text("a cat")


def blank_text(folder: Path) -> None:
    fill(folder, 2)
    (folder / "0.txt").write_text("a cat")
    (folder / "1.txt").write_text(" \n")


def listed(*rows: dict[str, Any]) -> Any:
    def make(folder: Path) -> None:
        fill(folder)
        table(folder, list(rows))

    return make


def two_tables(folder: Path) -> None:
    for name in ("metadata.jsonl", "metadata.csv"):
        table(folder, [{"file_name": "0.png", "text": "x"}], name)
    fill(folder)


def bad_text(folder: Path) -> None:
    fill(folder, 1)
    (folder / "0.txt").write_bytes(b"a\nM\xe4dchen")


def arrays(**found: Any) -> Any:
    return lambda folder: np.savez(folder / "set.npz", **found)


U8, TEXTS = np.zeros((2, 4, 4, 3), np.uint8), np.array(["a", "b"])
ROW = {"file_name": "0.png", "text": "x"}
REFUSED: dict[str, tuple[Any, str]] = {
    "no images": (lambda folder: table(folder, [ROW]), "holds no images"),
    "some without text": (without_text, r"2 of 3 images have no caption \(first: 0\.png\)"),
    "a blank text": (blank_text, r"1 of 2 images have no caption \(first: 1\.png\)"),
    "not listed": (listed(ROW, {"file_name": "2.png", "text": "y"}), r"1 of 3 .* \(first: 1\.png\)"),
    "a blank caption": (listed(ROW, {"file_name": "2.png", "text": " "}), r"2 of 3 .* \(first: 2\.png\)"),
    "a missing image": (listed(ROW, {"file_name": "no.png", "text": "y"}), r"metadata\.jsonl, line 2: .* 'no\.png'"),
    "no file name": (listed({"text": "x"}), "line 1: expected text under 'file_name', found nothing"),
    "no caption column": (listed({"file_name": "0.png", "label": 1}), "has the columns file_name, label"),
    "a caption that is none": (listed(ROW, {"file_name": "1.png", "text": None}), "line 2: .* found NoneType"),
    "two tables": (two_tables, "keep one of the two"),
    "bad text": (bad_text, r"0\.txt, line 2: not UTF-8"),
    "no captions": (arrays(images=U8, labels=TEXTS), "has the keys images, labels; images and captions are needed"),
    "grey": (arrays(images=U8[..., 0], captions=TEXTS), r"uint8 \[N, H, W, 3\], not uint8 \[2, 4, 4\]"),
    "four channels": (arrays(images=U8[..., [0, 1, 2, 2]], captions=TEXTS), r"not uint8 \[2, 4, 4, 4\]"),
    "floats": (arrays(images=U8 / 2, captions=TEXTS), "not float64"),
    "none": (arrays(images=U8[:0], captions=TEXTS[:0]), r"not uint8 \[0, 4, 4, 3\]"),
    "too few": (arrays(images=U8, captions=TEXTS[:1]), r"2 images need as many captions of text, not <U1 \[1\]"),
    "numbers": (arrays(images=U8, captions=np.arange(2)), "captions of text, not int64"),
    "blank": (arrays(images=U8, captions=np.array(["a", " "])), r"set\.npz: 1 of 2 .* \(first: number 1\)"),
    "pickled": (arrays(images=U8, captions=np.array(["a", None])), r"Cannot read set\.npz: Object arrays"),
    "no npz": (lambda folder: (folder / "set.npz").write_text("x"), r"Cannot read set\.npz"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str, tmp_path: Path):
    make, message = REFUSED[case]
    make(tmp_path)
    file = tmp_path / "set.npz"
    with pytest.raises(ConfigError, match=message):
        load_captioned(file if file.exists() else tmp_path)


@pytest.mark.parametrize("spec", ["gone", "gone.npz", __file__])
def test_what_is_not_there_is_refused(spec: str):
    with pytest.raises(ConfigError, match="No captioned images at .*; name a folder or an .npz file"):
        load_captioned(spec)


# --- pictures ---


def disc(width: int, height: int, radius: float) -> Image.Image:
    """A black disc in the exact middle of a white picture; a pixel at its edge is as dark as it is covered."""
    y, x = ((np.arange(4 * n) + 0.5) / 4 - n / 2 for n in (height, width))
    outside = (y[:, None] ** 2 + x**2 > radius**2).reshape(height, 4, width, 4).mean((1, 3))
    return Image.fromarray((outside * 255).round().astype(np.uint8)).convert("RGB")


@pytest.mark.parametrize("size", [(64, 64), (96, 64), (64, 96), (40, 120), (256, 128), (33, 47)])
@pytest.mark.parametrize("shape", [(301, 200), (200, 300), (128, 128), (1000, 150)])
def test_a_disc_stays_a_disc(shape: tuple[int, int], size: tuple[int, int], tmp_path: Path):
    radius = 0.3 * min(shape) * min(1, size[0] / size[1], size[1] / size[0])  # small enough to stay inside the crop
    found = one(disc(*shape, radius), tmp_path).load(0, size)
    dark = (1 - found[0].double()) / 2
    scale = max(size[1] / shape[0], size[0] / shape[1])
    y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) + 0.5 for n in size), indexing="ij")
    mass = dark.sum()
    my, mx = ((dark * p).sum() / mass for p in (y, x))
    vy, vx = ((dark * (p - m) ** 2).sum() / mass for p, m in ((y, my), (x, mx)))
    vxy = (dark * (y - my) * (x - mx)).sum() / mass
    r = radius * scale
    assert found.shape == (3, *size)
    assert abs(my - size[0] / 2) < 0.02 and abs(mx - size[1] / 2) < 0.02, "the crop is not central"
    assert abs(math.sqrt(mass / math.pi) - r) < 0.02 * r + 0.1, "the scale is not the one that fills the bucket"
    assert abs(vy / vx - 1) < 0.02 + 0.3 / r**2 and abs(vxy) < 0.01 * vx, "the disc is an ellipse"


def ramps(width: int, height: int) -> Image.Image:
    """Red runs from 0 to 255 along x and green along y, so a pixel's colour says where it comes from."""
    x, y = np.linspace(0, 255, width), np.linspace(0, 255, height)
    red, green = np.broadcast_to(x, (height, width)), np.broadcast_to(y[:, None], (height, width))
    return Image.fromarray(np.stack([red, green, red * 0], -1).round().astype(np.uint8))


def seen(found: torch.Tensor) -> tuple[float, float, float, float]:
    """(left, right, top, bottom) of a loaded ramp: which share of the picture its outermost pixels show."""
    share = (found.double() + 1) / 2
    return tuple(
        float(v) for v in (share[0, :, 0].mean(), share[0, :, -1].mean(), share[1, 0].mean(), share[1, -1].mean())
    )  # type: ignore[return-value]


@pytest.mark.parametrize("bucket", buckets(None, 64 * 64, 16, 2.0))
@pytest.mark.parametrize("times", [0.5, 1, 4, 5.3])
def test_a_picture_with_a_ratio_of_the_buckets_is_not_cropped(bucket: tuple[int, int], times: float, tmp_path: Path):
    width, height = round(bucket[1] * times), round(bucket[0] * times)
    data = one(ramps(width, height), tmp_path)
    size = data.size(0)
    assert size == (height, width) and nearest(size, buckets(None, 64 * 64, 16, 2.0)) == bucket
    left, top, right, bottom = crop(size, bucket)
    assert left < 0.5 and top < 0.5 and width - right < 0.5 and height - bottom < 0.5
    edge = 0.5 / min(bucket) + 0.5 / min(size) + 1 / 255
    for low, high in (seen(data.load(0, bucket))[:2], seen(data.load(0, bucket))[2:]):
        assert low < edge and high > 1 - edge


def test_a_crop_takes_both_ends_of_the_longer_side_alone(tmp_path: Path):
    wide = one(ramps(400, 200), tmp_path).load(0, (100, 100))
    left, right, top, bottom = seen(wide)
    assert left == pytest.approx(0.25, abs=0.01) and right == pytest.approx(0.75, abs=0.01)
    assert top < 0.01 and bottom > 0.99
    left, right, top, bottom = seen(one(ramps(200, 400), tmp_path).load(0, (100, 200)))
    assert top == pytest.approx(0.375, abs=0.01) and bottom == pytest.approx(0.625, abs=0.01)
    assert left < 0.01 and right > 0.99


SIDE = st.integers(1, 5000)


@given(st.tuples(SIDE, SIDE), st.tuples(SIDE, SIDE))
def test_a_crop_is_the_largest_central_box_of_the_ratio(size: tuple[int, int], target: tuple[int, int]):
    left, top, right, bottom = crop(size, target)
    assert 0 <= left < right <= size[1] and 0 <= top < bottom <= size[0]
    assert (bottom - top) / (right - left) == pytest.approx(target[0] / target[1], rel=1e-6)
    assert left == pytest.approx(size[1] - right) and top == pytest.approx(size[0] - bottom)
    assert left == 0 or top == 0


@pytest.mark.parametrize("size", [(1, 640), (640, 1), (1, 1)])
def test_extreme_shapes_are_loaded(size: tuple[int, int], tmp_path: Path):
    for shape in ((1, 1), (3000, 1), (1, 3000)):
        found = one(Image.new("RGB", shape, (255, 0, 255)), tmp_path).load(0, size)
        assert found.shape == (3, *size) and found[0].eq(1).all() and found[1].eq(-1).all()


def test_shrinking_is_antialiased(tmp_path: Path):
    board = np.indices((128, 128)).sum(0) % 2 * 255
    found = one(Image.fromarray(board.astype(np.uint8)), tmp_path).load(0, (16, 16))
    assert found.abs().max() < 0.02  # the mean of black and white, where skipping pixels shows one of them


def test_every_kind_of_picture_becomes_rgb(tmp_path: Path):
    kinds: dict[str, tuple[str, Any, str, list[float]]] = {
        "grey": ("L", 51, "png", [-0.6] * 3),
        "one bit": ("1", 1, "png", [1.0] * 3),
        "transparent": ("RGBA", (0, 0, 0, 0), "png", [1.0] * 3),
        "half transparent": ("LA", (0, 102), "png", [0.2] * 3),
        "palette": ("P", 0, "gif", [-1.0] * 3),
        "cmyk": ("CMYK", (0, 255, 255, 0), "jpg", [1.0, -1.0, -1.0]),
    }
    for kind, (mode, colour, suffix, expected) in kinds.items():
        found = one(Image.new(mode, (8, 8), colour), tmp_path, suffix).load(0, (4, 4))
        want = torch.tensor(expected)[:, None, None].expand(3, 4, 4)
        assert torch.allclose(found, want, atol=0.02), kind
        assert found.dtype == torch.float32 and found.is_contiguous()
    with pytest.raises(ConfigError, match="more than 8 bits"):
        one(Image.new("I;16", (8, 8), 300), tmp_path).load(0, (4, 4))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_stand_upright(orientation: int, tmp_path: Path):
    upright = ramps(60, 30)
    stored = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = upright.transpose(stored[orientation]) if orientation > 1 else upright
    data = one(image, tmp_path, exif=exif)
    assert data.size(0) == (30, 60)
    expected = torch.from_numpy(np.array(upright, np.float32)).permute(2, 0, 1) / 127.5 - 1
    assert torch.allclose(data.load(0, (30, 60)), expected, atol=1e-6)


@pytest.mark.parametrize("size", [(0, 8), (8, 0), (-1, 8)])
def test_a_size_of_nothing_is_refused(size: tuple[int, int]):
    with pytest.raises(ConfigError, match="at least"):
        Captions(U8, ["a", "b"]).load(0, size)


# --- buckets ---


@given(st.integers(1, 64), st.floats(1, 40), st.floats(1, 8))
def test_buckets_are_divisible_and_have_the_area(step: int, root: float, max_ratio: float):
    area = math.ceil((step * root) ** 2)
    found = buckets(None, area, step, max_ratio)
    assert found == sorted({*found}) and {(w, h) for h, w in found} == {*found}
    for h, w in found:
        assert h % step == 0 and w % step == 0 and max(h, w) <= max_ratio * min(h, w)
        assert abs(h * w / area - 1) <= 1.25 * step / math.sqrt(area) + 1e-9
    assert any(h == w for h, w in found)


def test_buckets_of_a_megapixel():
    found = buckets(None, 1024 * 1024, 64, 2.0)
    assert {(1024, 1024), (832, 1280), (1280, 832), (896, 1152), (768, 1344)} <= {*found}
    assert len(found) == 9 and (640, 1664) not in found and (1664, 640) in buckets(None, 1024 * 1024, 64, 3.0)
    assert buckets(None, 1000 * 1000, 64, 1.0) == [(1024, 1024)]


@given(st.tuples(SIDE, SIDE))
def test_the_nearest_bucket_crops_least(size: tuple[int, int]):
    every = buckets(None, 512 * 512, 64, 4.0)

    def lost(bucket: tuple[int, int]) -> float:
        left, top, right, bottom = crop(size, bucket)
        return 1 - (right - left) * (bottom - top) / (size[0] * size[1])

    assert lost(nearest(size, every)) == pytest.approx(min(map(lost, every)), abs=1e-9)


def test_only_the_buckets_in_use_are_kept():
    sizes = [(1000, 1000), (640, 480), (480, 640), (1080, 1920), (100, 9000)]
    found = buckets(sizes, 256 * 256, 32, 2.0)
    every = buckets(None, 256 * 256, 32, 2.0)
    assert found == [(192, 352), (224, 288), (256, 256), (288, 224)] and every == [*found, (352, 192)]
    assert nearest((100, 9000), every) == max(every, key=lambda b: b[1] / b[0])


@pytest.mark.parametrize(("area", "step", "ratio"), [(100, 64, 2), (4096, 0, 2), (4096, 16, 0.5), (4096, 16, math.nan)])
def test_impossible_buckets_are_refused(area: int, step: int, ratio: float):
    with pytest.raises(ConfigError, match=f"not step {step}, area {area}"):
        buckets(None, area, step, ratio)
    with pytest.raises(ConfigError, match="no buckets"):
        nearest((4, 4), [])


# --- real pictures ---


@real
def test_real_emoji_from_the_array():
    found = load_captioned(EMOJI)
    assert len(found) == 3554 and found.size(7) == (64, 64) and "grinning face" in found.captions
    assert buckets([found.size(i) for i in range(len(found))], 64 * 64, 8) == [(64, 64)]
    with np.load(EMOJI) as raw:
        i = list(found.captions).index("grinning face")
        expected = torch.from_numpy(raw["images"][i]).permute(2, 0, 1).float() / 127.5 - 1
    assert found.load(i, (64, 64)).equal(expected)  # the very bytes, where nothing is to be resized
    small = found.load(i, (32, 32))
    mean = torch.nn.functional.avg_pool2d(expected[None], 2)[0]
    assert (small - mean).abs().mean() < 0.03 and small.amin() >= -1 and small.amax() <= 1


@real
@pytest.mark.parametrize("how", ["text", "table"])
def test_real_emoji_from_files(how: str, tmp_path: Path):
    source = load_captioned(EMOJI)
    assert isinstance(source.pictures, np.ndarray)
    rows = []
    for i in range(0, 3554, 200):
        image = Image.fromarray(source.pictures[i]).crop((0, 0, 64, 64 - i % 3 * 12))
        image.save(tmp_path / f"{i:04d}.png")
        rows.append({"file_name": f"{i:04d}.png", "text": source.captions[i]})
        if how == "text":
            (tmp_path / f"{i:04d}.txt").write_text(source.captions[i], encoding="utf-8")
    if how == "table":
        table(tmp_path, rows)
    found = load_captioned(tmp_path)
    assert list(found.captions) == [row["text"] for row in rows]
    sizes = [found.size(k) for k in range(len(found))]
    used = buckets(sizes, 64 * 64, 4)
    assert {*sizes} == {(64, 64), (52, 64), (40, 64)} and len(used) == 3
    for k, size in enumerate(sizes):
        bucket = nearest(size, used)
        x = found.load(k, bucket)
        assert x.shape == (3, *bucket) and abs(math.log(size[0] / size[1] * bucket[1] / bucket[0])) < 0.08
    square = sizes.index((64, 64))
    assert found.load(square, (64, 64)).equal(source.load(200 * square, (64, 64)))
