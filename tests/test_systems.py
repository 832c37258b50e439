"""What other systems do otherwise, as far as it can be tried on one: Windows' paths and names, workers by spawn."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import sample
import upsample
from data import folder, shapes
from data.processes import ignore_stops
from conftest import ROOT

RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(10))}  # with any suffix


def photos(root, *file_names):
    """A folder of a/0.png, a/1.png, …, and a metadata.jsonl that calls them by these names."""
    (root / "a").mkdir(parents=True)
    for k, name in enumerate(file_names):
        Image.new("RGB", (64, 64), (60 * k % 256, 0, k)).save(root / f"a/{k}.png")
        with open(root / "metadata.jsonl", "a") as file:
            file.write('{"file_name": "%s", "text": "number %d"}\n' % (name.replace("\\", "\\\\"), k))
    return root


def test_a_table_written_on_windows_names_pictures_with_backslashes(tmp_path):
    data = folder.gather(photos(tmp_path / "photos", "a\\0.png", ".\\a\\1.png", "a/2.png"), tmp_path / "runs", 0)
    assert dict(zip(data.names, data.captions)) == {"a/0.png": "number 0", "a/1.png": "number 1", "a/2.png": "number 2"}


@pytest.mark.parametrize("name", ["C:\\Windows\\0.png", "C:0.png", "\\\\server\\share\\0.png", "..\\..\\0.png", "\\0.png"])
def test_no_drive_server_or_backslash_leads_out_of_a_folder(name, tmp_path):
    root = photos(tmp_path / "photos", "a/0.png", name)
    try:
        data = folder.gather(root, tmp_path / "runs", 0)
    except folder.UserError as error:
        assert "leads out of the folder" in str(error)
    else:
        assert [*data.names] == ["a/0.png"] and name.replace("\\", "/") in (tmp_path / "runs/skipped.txt").read_text()


def test_pictures_names_are_allowed_on_every_system_and_never_clash(tmp_path):
    captions = ["con", "CON", "aux.txt", "nul", "com1", "a:b", 'what? "x" <y> | *', "trailing dot.", "", "x" * 300, "…", "../up", "C:\\x"]
    names = [sample.save_png(Image.new("RGB", (8, 8)), tmp_path, caption).name for caption in captions]
    assert all(re.fullmatch(r"\d{4}-[a-z0-9-]{1,60}\.png", name) for name in names)
    assert not RESERVED & {name.split(".")[0] for name in names}
    assert len({name.lower() for name in names}) == len(captions) == len([*tmp_path.iterdir()])


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["clip", "prior", "upsample-256", "photos"])
def test_workers_can_be_spawned_as_windows_and_macos_do(stage, tmp_path, monkeypatch):
    """A spawned worker is a new interpreter: its dataset is pickled, and nothing set in this one is there."""
    config = upsample.PRESETS["shapes"][256]
    if stage == "photos":
        data = folder.gather(photos(tmp_path / "photos", *(f"a/{k}.png" for k in range(4))), tmp_path / "runs", 0)
        batches = folder.FolderBatches(data, "clip", 2, 0, config)
    else:
        batches = shapes.ShapeBatches(stage, 4, 0, config, crops=upsample.training_crops)
    loader = DataLoader(batches, batch_size=None, num_workers=1, sampler=[1], multiprocessing_context="spawn", worker_init_fn=ignore_stops)
    (got,), want = list(loader), batches[1]
    assert len(got) == len(want)
    assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else np.array_equal(a, b) for a, b in zip(got, want))


SPAWNED = """
import multiprocessing, sys
multiprocessing.set_start_method("spawn")
import torch, train
from data import shapes
shapes.FIXED_SCENES = 512
train.prior.estimate_errors = lambda *_: torch.ones(1000)  # minutes, and no workers
options = sys.argv[1:]
for stage in ("clip", "prior"):
    sys.argv = ["train.py", stage, *options]
    train.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("world", [True, False])
def test_scenes_and_folders_are_checked_embedded_and_trained_on_by_spawned_workers(world, tmp_path):
    options = ["--steps", "1", "--batch-size", "4", "--device", "cpu", "--workers", "1", "--out", tmp_path / "runs"]
    if not world:
        options += ["--data", photos(tmp_path / "photos", *(f"a/{k}.png" for k in range(8)))]
    run = subprocess.run([sys.executable, "-c", SPAWNED, *map(str, options)], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert len([*(tmp_path / "runs").glob("z_i-*.npy" if world else "cache-*")]) == 1 and (tmp_path / "runs/prior.pt").exists()
