"""Training on a folder of captioned pictures: every layout, through the command line; bad data; caches; the order of batches."""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import clip_embed
import decoder
import prior
import sample
import train
import upsample
from clip_embed import UserError
from conftest import ROOT
from test_chain import TINY

CAPTIONS = ["ein roter Kreis", "un cercle bleu à gauche", "красная звезда", "青い四角と円", "دائرة حمراء", "a green heart ❤"]


def encoded(picture, kind, **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def drawn():
    """{name: (bytes, captions)} of 26 pictures in three formats, odd sizes and several modes, eight of them large."""
    rng, made = np.random.default_rng(0), {}
    for k in range(26):
        picture = train.render(train.random_scene(rng), 1030 if k % 4 == 0 else 150)
        width, height = (1024 + 3 * k, 1025) if k % 4 == 0 else (65 + 9 * k, 301 - 8 * k)
        picture = picture.resize((width, height)).convert(("RGB", "L", "RGBA", "P", "CMYK", "LA", "1", "I;16")[k % 8])
        kind, suffix = (("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"))[k % 3]
        if kind == "JPEG":
            picture = picture.convert(picture.mode if picture.mode in ("L", "CMYK") else "RGB")
        if kind == "PNG" and picture.mode == "CMYK" or kind == "WEBP" and picture.mode not in ("RGB", "RGBA"):
            picture = picture.convert("RGBA")
        captions = [f"{CAPTIONS[k % 6]} {k}", f"picture number {k}"][:1 + k % 2]
        made[f"{'sub folder/' * (k % 2)}bild {k} é.{suffix}"] = encoded(picture, kind), captions
    return made


def write_texts(folder, drawn):
    for name, (data, captions) in drawn.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        path.with_suffix(".txt").write_text("\n".join(captions) + "\n\n", "utf-8")


def write_jsonl(folder, drawn):
    for name, (data, captions) in drawn.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    lines = [json.dumps({"file_name": name, "text": c, "more": 1}) for name, (_, captions) in drawn.items() for c in captions]
    (folder / "metadata.jsonl").write_text("\n".join(lines), "utf-8")


def write_csv(folder, drawn):
    write_jsonl(folder, drawn)
    (folder / "metadata.jsonl").unlink()
    lines = [f'{c},"{name}"\n' for name, (_, captions) in drawn.items() for c in captions]
    (folder / "metadata.csv").write_text("text,file_name\n" + "".join(lines), "utf-8-sig")


def write_tar(folder, drawn, format=tarfile.PAX_FORMAT):
    folder.mkdir(parents=True, exist_ok=True)
    names = list(drawn)
    for n in range(3):
        with tarfile.open(folder / f"{n:05}.tar", "w", format=format) as tar:
            for name in names[n::3]:
                long = "deep/" * 30 * (n == 1) + name  # longer than a header's name
                for path, data in ((long, drawn[name][0]), (os.path.splitext(long)[0] + ".txt", "\n".join(drawn[name][1]).encode()),
                                   (os.path.splitext(long)[0] + ".json", b"{}")):
                    member = tarfile.TarInfo(path)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


LAYOUTS = {"txt": write_texts, "jsonl": write_jsonl, "csv": write_csv, "tar": write_tar,
           "gnu": lambda folder, drawn: write_tar(folder, drawn, tarfile.GNU_FORMAT)}


@pytest.fixture
def tiny(monkeypatch):
    """Every preset and recipe replaced by tiny ones."""
    for module, config in TINY.items():
        monkeypatch.setitem(prior.AR_PRESETS if module == "ar-prior" else module.PRESETS, "shapes", config)
    monkeypatch.setitem(train.RECIPES, "shapes", {stage: train.Recipe(4, 2, 1e-3, ema_decay=0.9, warmup=2) for stage in train.STAGES})
    monkeypatch.setattr(decoder, "ladder", lambda steps, top: [0, top])
    monkeypatch.setattr(upsample, "ladder", lambda steps, top: [0, top])


def run(script, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, arguments)])
    script.main()


def refused(monkeypatch, capsys, folder, *arguments):
    """The one line with which train.py refuses a folder."""
    with pytest.raises(SystemExit) as stop:
        run(train, monkeypatch, "clip", "--data", folder, "--out", folder.parent / "runs", "--workers", 0, "--device", "cpu", *arguments)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train.py: ")]
    assert stop.value.code == 2 and len(lines) == 1
    return lines[0]


def read_back(data):
    """{caption: bytes} of Pictures."""
    return {data.captions[c]: data.read(k) for k in range(len(data)) for c in range(data.first[k], data.first[k + 1])}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_trains_every_stage_and_samples(layout, drawn, tiny, tmp_path, monkeypatch, capsys):
    LAYOUTS[layout](tmp_path / "photos", drawn)
    data = train.gather(tmp_path / "photos", tmp_path / "seen", 0)
    assert read_back(data) == {c: bytes for bytes, captions in drawn.values() for c in captions}
    assert sorted(data.sides) == sorted(min(Image.open(io.BytesIO(d)).size) for d, _ in drawn.values())
    assert not (tmp_path / "seen/skipped.txt").read_text()
    run(train, monkeypatch, "all", "--data", tmp_path / "photos", "--out", tmp_path / "runs", "--workers", 0, "--device", "cpu")
    said = capsys.readouterr().err
    assert "26 pictures with 39 captions, shorter sides 74 to 1,025 pixels" in said and "too few to learn from scratch" in said
    for stage in train.STAGES:
        checkpoint = torch.load(tmp_path / "runs" / f"{stage}.pt", weights_only=True)
        assert checkpoint["training"]["step"] == 2 and checkpoint["data"] == data.mark
        assert Image.open(tmp_path / "runs" / f"{stage}-samples.png").size[0] >= 64
    run(sample, monkeypatch, CAPTIONS[2], "--weights", tmp_path / "runs", "--out", tmp_path / "made", "--prior-steps", 2,
        "--decoder-steps", 2, "--upsample-steps", 2, 2, "--device", "cpu")
    assert Image.open(capsys.readouterr().out.strip()).size == (1024, 1024)
