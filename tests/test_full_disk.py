"""A training whose disk is full: one line that names the file, nothing lost, and it goes on as if nothing had been.

The disk is a small tmpfs, so these tests run as root on Linux only. (RLIMIT_FSIZE in test_training.py stands in elsewhere.)
"""

import argparse
import os
import shutil
import subprocess

import pytest
import torch
from PIL import Image

import train
from test_data import drawn, run, tiny, write_texts  # noqa: F401 (fixtures)
from test_training import assert_same_end


@pytest.fixture
def disk(tmp_path):
    """A folder that is a disk of 12 MB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if not mount or subprocess.run([mount, "-t", "tmpfs", "-o", "size=12m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(disk, left):
    """Leave `left` bytes free."""
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    (disk / "junk").write_bytes(bytes(free - left))


def full(monkeypatch, capsys, *arguments):
    """The one line with which train.py stops on a full disk."""
    with pytest.raises(SystemExit) as stop:
        run(train, monkeypatch, *arguments)
    said = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if line.startswith("train.py: ")]
    assert stop.value.code == 2 and len(said) == 1 and "No space left" in said[0]
    return said[0]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["checkpoint", "cache", "samples"])
def test_a_full_disk_costs_one_line_and_nothing_else(what, disk, drawn, tiny, tmp_path, monkeypatch, capsys):  # noqa: F811
    write_texts(tmp_path / "photos", drawn)
    arguments = ["--data", tmp_path / "photos", "--workers", 0, "--device", "cpu", "--save-every", 1]
    never = tmp_path / "never full"
    for out in (never, disk):
        run(train, monkeypatch, "clip", *arguments, "--out", out)
    run(train, monkeypatch, "prior", *arguments, "--out", never)
    clip, side = (disk / "clip.pt").read_bytes(), {"checkpoint": 8, "samples": 300}.get(what)
    capsys.readouterr()
    with monkeypatch.context() as patch:
        if what == "cache":
            fill(disk, 4096)
        else:  # full after the first step's checkpoint: a sheet of 8 pixels finds room, the next checkpoint does not
            sheet = lambda *_: fill(disk, {"checkpoint": 40_000, "samples": 4096}[what]) or Image.effect_noise((side, side), 90)
            patch.setitem(train.STAGES, "prior", train.STAGES["prior"]._replace(sheet=sheet))
        line = full(patch, capsys, "prior", *arguments, "--out", disk)
    assert {"checkpoint": "prior.pt: ", "cache": "cache-", "samples": "curve and samples"}[what] in line
    assert "make room" in line and "--resume" in line
    assert (disk / "clip.pt").read_bytes() == clip and not list(disk.glob("*.part"))  # nothing half written fills the disk
    if what != "cache":
        assert torch.load(disk / "prior.pt", weights_only=True)["training"]["step"] == 1
    (disk / "junk").unlink()
    run(train, monkeypatch, "prior", *arguments, "--out", disk, "--resume")
    assert_same_end(argparse.Namespace(out=never), argparse.Namespace(out=disk), "prior")
