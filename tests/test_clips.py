"""Captioned videos: their frames, what is refused, and a student of a video pipeline that learns from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import hasten
from hasten.captioned import Captions, load_captioned
from hasten.core.errors import ConfigError
from hasten.fit import FitConfig
from hasten.hosted import host
from hasten.pipelines import distill
from tests.pipelines import FAMILIES

SIZE = (32, 48)  # height, width


def levels(count: int) -> list[int]:
    """A grey for each frame."""
    return [20 + 14 * k for k in range(count)]


def video(file: Path, count: int) -> Path:
    """Grey frames that become lighter; an .mp4 by PyAV, else a moving picture without loss."""
    if file.suffix == ".mp4":
        av = pytest.importorskip("av")
        with av.open(str(file), "w") as out:
            stream = out.add_stream("mpeg4", rate=8)
            stream.height, stream.width, stream.pix_fmt = *SIZE, "yuv420p"
            for level in levels(count):
                frame = av.VideoFrame.from_ndarray(np.full((*SIZE, 3), level, np.uint8), format="rgb24")
                out.mux(stream.encode(frame))
            out.mux(stream.encode())
        return file
    frames = [Image.new("RGB", (SIZE[1], SIZE[0]), (level,) * 3) for level in levels(count)]
    how: dict[str, Any] = {"lossless": True} if file.suffix == ".webp" else {}
    frames[0].save(file, save_all=True, append_images=frames[1:], **how)
    return file


@pytest.mark.parametrize("suffix", ["mp4", "gif", "webp"])
def test_a_clip_is_the_middle_of_a_video_at_its_own_pace(suffix: str, tmp_path: Path):
    found = Captions([video(tmp_path / f"a.{suffix}", 12)], ["it gets lighter"])
    assert found.length(0) == 12 and found.size(0) == SIZE
    clip = found.clip(0, (16, 16), 5)
    assert clip.shape == (3, 5, 16, 16)
    wanted = torch.tensor(levels(12)[3:8]).float().div(127.5).sub(1)
    assert torch.allclose(clip.mean((0, 2, 3)), wanted, atol=6 / 127.5)
    assert clip.amax() - clip.amin() > 0.3, "frames differ"
    with pytest.raises(ConfigError, match=f"a.{suffix} has 12 frames, and the pipeline's videos have 13; give longer"):
        found.clip(0, (16, 16), 13)


def test_pictures_and_videos_are_told_apart(tmp_path: Path):
    found = Captions([video(tmp_path / "a.mp4", 3)], ["x"])
    with pytest.raises(ConfigError, match=r"a.mp4 is a video, and this pipeline makes pictures"):
        found.load(0, (8, 8))
    still = Captions(np.zeros((1, 8, 8, 3), np.uint8), ["x"])
    assert still.length(0) == 1
    with pytest.raises(ConfigError, match="number 0 has 1 frame, and"):
        still.clip(0, (8, 8), 2)


def test_broken_videos_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("av")
    file = tmp_path / "a.mp4"
    file.write_bytes(b"no video")
    found = Captions([file], ["x"])
    for read in (lambda: found.size(0), lambda: found.length(0), lambda: found.clip(0, (8, 8), 1)):
        with pytest.raises(ConfigError, match=r"Cannot read the video .*a.mp4.*repair it"):
            read()
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(ConfigError, match="needs PyAV: pip install av"):
        found.size(0)


def prepared() -> tuple[Any, dict[str, Any]]:
    pipe, call = FAMILIES["wan"]()
    return pipe, {k: v for k, v in call.items() if k != "prompt"}


def test_a_folder_of_videos_trains_a_pipeline_of_videos(tmp_path: Path):
    pipe, call = prepared()
    folder = tmp_path / "clips"
    folder.mkdir()
    for name, count in (("a.mp4", 11), ("b.gif", 9)):
        video(folder / name, count).with_suffix(".txt").write_text(f"clip {name}")
    assert load_captioned(folder).captions == ["clip a.mp4", "clip b.gif"]
    method = hasten.CM(from_teacher=True, cfg_scale=2.0)
    fit = FitConfig(iterations=2, batch=2)
    student = distill(pipe, method, steps=1, data=folder, call=call, fit=fit, out=tmp_path / "run")
    x0 = load_file(next((tmp_path / "run").rglob("latents-*.safetensors")))["x0"]
    there = student.hosted
    where = there.layouts[there.net.shape]
    for i in range(2):
        clip = load_captioned(folder).clip(i, where.pixels[-2:], where.pixels[1])
        assert torch.allclose(x0[i], where.encode(pipe.vae, clip[None])[0].float(), atol=1e-5)
    assert x0.shape == (2, *there.net.shape) and not torch.equal(x0[0], x0[1])


def test_what_is_no_video_is_refused_before_anything_is_written(tmp_path: Path):
    pipe, call = prepared()
    folder = tmp_path / "clips"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    (folder / "a.txt").write_text("a cup")
    with pytest.raises(ConfigError, match=r"a.png has 1 frame, and the pipeline's videos have 9; give longer clips"):
        host(pipe, data=folder, call=call, work=tmp_path / "work")
    assert not (tmp_path / "work").exists()
