"""Forty mistakes at the command line: each ends in one line that says what to do, before any work, and nothing is lost.

A row of the table is the mistake, its command, the files that lie there beforehand, and words of the line. A command
runs as its script's main(), in a folder of its own, with tiny random weights. Before the line may only come progress
bars, argparse's usage (of an option that is wrong by itself) and, with --data, the summary of the folder.
"""

import importlib
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from PIL import Image

import decoder
import prior
import train
import upsample
from conftest import ROOT
from data.folder import gather
from test_chain import TINY, tiny, weights  # noqa: F401 (fixtures)
from test_clip_published import TINY as PUBLISHED

BAR = re.compile(r"\d%\||\d(it|step|unit|batch) \[")
SUMMARY = re.compile(r"[\d,]+ left out, listed in |  |\S+: [\d,]+ pictures with |[\d,]+ pictures are too few to learn")
LEFT = re.compile(r"\.[\w.-]+\.lock|skipped\.txt|checked-\w+\.json")  # what a refused training may leave behind


# ----------------------------------------------------------------------------- the files of a row

def nothing():
    """No files but those in weights/."""


def text(path, content="a red circle\n", encoding="utf-8"):
    """Makes a text file."""
    return lambda: Path(path).write_text(content, encoding)


def picture(path="circle.png"):
    """Makes a picture."""
    return lambda: Image.new("RGB", (70, 70), "red").save(path)


def photos(side=70, captions=True, pictures=True):
    """Makes a folder of six pictures with captions, or of one of the two."""
    def make():
        Path("photos").mkdir()
        for k in range(6):
            if pictures:
                Image.new("RGB", (side, side), (40 * k, 90, 200)).save(f"photos/{k}.png")
            if captions:
                Path(f"photos/{k}.txt").write_text(f"number {k}", "utf-8")
    return make


def trained(*arguments):
    """Makes the checkpoint that train.py with these arguments writes after four steps, but trains nothing."""
    def make():
        sys.argv = ["train.py", *arguments]  # the fixture gives back the old ones
        args = train.parse_arguments()
        path = args.out / f"{args.stage}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        if args.data:
            args.data = gather(args.data, args.out, 0)
        run = train.begin(args.stage, args, torch.device("cpu"), path)
        run.step = 4
        train.save(run, path)
    return make


def of_another_clip(path):
    """Makes a checkpoint one that was trained with another CLIP."""
    return lambda: torch.save(torch.load(path, weights_only=True) | {"clip": "0123456789abcdef"}, path)


def copied(source, path):
    """Copies a file or folder."""
    return lambda: shutil.copytree(source, path) if Path(source).is_dir() else shutil.copy(source, path)


def removed(path):
    """Takes a file away."""
    return lambda: Path(path).unlink()


def cut(path):
    """Leaves the first half of a file, as a download that broke off does."""
    return lambda: os.truncate(path, Path(path).stat().st_size // 2)


def wide():
    """Makes wide.pt, an upsampler with more channels than the preset's."""
    model = upsample.Upsampler(replace(TINY[upsample][256], channels=32))
    torch.save({"stage": "upsample-256", "config": asdict(model.config), "model": model.state_dict()}, "wide.pt")


def code():
    """Makes code.pt, a picture's code by another decoder than weights/decoder.pt."""
    config = {"decoder": "0123456789abcdef", "caption": "", "steps": 3}
    model = {"z_i": torch.ones(1, 16), "x_T": torch.ones(1, 3, 64, 64)}
    torch.save({"stage": "latent", "config": config, "model": model}, "code.pt")


def both(*makers):
    """Makes the files of several."""
    return lambda: [make() for make in makers]


# ----------------------------------------------------------------------------- the table

class Mistake(NamedTuple):
    """A row."""
    name: str
    command: list      # a script and its arguments
    prepare: Callable  # makes the files beside weights/
    words: list        # all of them stand in the line


OWN, DATA = ["--weights", "weights"], ["--data", "photos", "--workers", "0"]

MISTAKES = [
    # captions
    Mistake("no caption and no file of captions", ["sample.py"], nothing, ["no caption: give one", "python sample.py"]),
    Mistake("a file of captions in Latin-1", ["sample.py", "--file", "captions.txt"],
            text("captions.txt", "à gauche", "latin-1"), ["--file captions.txt", "UTF-8"]),
    Mistake("an empty file of captions", ["sample.py", "--file", "captions.txt"], text("captions.txt", "\n \n"),
            ["--file captions.txt", "no caption"]),

    # options
    Mistake("a size that no upsampler makes", ["sample.py", "a star", "--size", "128"], nothing,
            ["--size", "128", "64, 256, 1024"]),
    Mistake("a negative seed", ["sample.py", "a star", "--seed", "-1"], nothing, ["--seed -1: must be between 0 and"]),
    Mistake("no candidates", ["sample.py", "a star", "--candidates", "0"], nothing,
            ["--candidates 0: must be between 1 and 1000"]),
    Mistake("a GPU where there is none", ["sample.py", "a star", "--device", "cuda"], nothing,
            ["--device cuda: not available here"]),
    Mistake("a device that torch does not know", ["sample.py", "a star", "--device", "tpu"], nothing,
            ["--device tpu: not available here", "cpu, cuda"]),
    Mistake("an unknown stage", ["train.py", "upsampler"], nothing, ["'upsampler'", "'upsample-256'"]),
    Mistake("an unknown preset", ["train.py", "clip", "--preset", "large"], nothing,
            ["--preset", "'large'", "'laptop'"]),
    Mistake("one picture where two are wanted", ["manipulate.py", "interpolate", "circle.png", *OWN], picture(),
            ["interpolate", "required: PICTURE"]),

    # weights
    Mistake("an empty folder of weights", ["sample.py", "a star", "--weights", "new"], lambda: Path("new").mkdir(),
            ["new/clip.pt: no such file", "python train.py clip"]),
    Mistake("the checkpoint of another stage", ["sample.py", "a star", *OWN],
            copied("weights/decoder.pt", "weights/prior.pt"),
            ["weights/prior.pt: is a 'decoder' checkpoint, expected 'prior'"]),
    Mistake("a prior of another CLIP", ["sample.py", "a star", *OWN], of_another_clip("weights/prior.pt"),
            ["weights/prior.pt: was trained with CLIP 0123456789abcdef, but weights/clip.pt is CLIP"]),
    Mistake("a truncated checkpoint", ["sample.py", "a star", *OWN], cut("weights/decoder.pt"),
            ["weights/decoder.pt: damaged", "python train.py decoder"]),
    Mistake("a text file named .pt", ["sample.py", "a star", *OWN], text("weights/clip.pt"),
            ["weights/clip.pt: damaged, or no checkpoint", "python train.py clip"]),
    Mistake("a size whose upsampler is not trained", ["sample.py", "a star", "--size", "1024", *OWN],
            removed("weights/upsample-1024.pt"),
            ["weights/upsample-1024.pt: no such file", "python train.py upsample-1024"]),
    Mistake("a run's folder in place of its CLIP", ["sample.py", "a star", "--clip", "weights"], nothing,
            ["weights", "clip.pt"]),
    Mistake("a published CLIP without its merges", ["clip_embed.py", "circle.png", "a star", "--clip", "vit"],
            both(picture(), copied(PUBLISHED, "vit"), removed("vit/merges.txt")),
            ["vit/", "no such file", "--bpe", "merges.txt"]),

    # pictures and codes
    Mistake("a text diff between equal captions",
            ["manipulate.py", "textdiff", "circle.png", "--from", "a star", "--to", "a star", *OWN], picture(),
            ["the two captions of a text diff must differ"]),
    Mistake("the code of another decoder", ["manipulate.py", "variations", "code.pt", *OWN], code,
            ["code.pt: belongs to another decoder", "--weights", "make it anew"]),
    Mistake("a code in a checkpoint's place",
            ["manipulate.py", "variations", "circle.png", "--save-latent", "weights/prior.pt", *OWN], picture(),
            ["weights/prior.pt: is a 'prior' checkpoint", "'latent'"]),
    Mistake("an enlargement in its picture's place", ["upsample.py", "circle.png", "--out", "circle.png", *OWN],
            picture(), ["circle.png: ", "another name"]),

    # places to write to
    Mistake("pictures into a file", ["sample.py", "a star", "--size", "64", "--out", "notes", *OWN], text("notes"),
            ["notes: cannot write there"]),
    Mistake("a strip into a file", ["decoder.py", "circle.png", "--out", "notes/strip.png", *OWN],
            both(picture(), text("notes")), ["notes/strip.png: cannot write there"]),
    Mistake("a training into a file", ["train.py", "upsample-256", "--out", "notes"], text("notes"),
            ["notes: cannot write there"]),

    # folders of pictures
    Mistake("pictures that are not there", ["train.py", "clip", *DATA], nothing, ["--data photos: no such folder"]),
    Mistake("pictures without captions", ["train.py", "clip", *DATA], photos(captions=False),
            ["--data photos: no picture with a caption is there", ".txt of the same name", "metadata.csv"]),
    Mistake("captions without pictures", ["train.py", "clip", *DATA], photos(pictures=False),
            ["--data photos: no picture with a caption is there", ".txt of the same name"]),
    Mistake("pictures of one pixel", ["train.py", "clip", *DATA], photos(side=1),
            ["--data photos: no picture with a caption is there that can be used"]),
    Mistake("fewer pictures than a batch", ["train.py", "clip", *DATA, "--batch-size", "64"], photos(),
            ["--batch-size 64", "at most 5"]),

    # runs
    Mistake("a decoder before its CLIP", ["train.py", "decoder"], nothing,
            ["runs/shapes/clip.pt: no such file", "python train.py clip"]),
    Mistake("a CLIP to train, frozen", ["train.py", "clip", "--clip", "clip.pt"], nothing, ["--clip is for the other stages", "--init"]),
    Mistake("weights of another size to begin with", ["train.py", "upsample-256", "--init", "wide.pt"], wide,
            ["wide.pt: has other sizes than the upsample-256 of this preset"]),
    Mistake("a dry run with a CLIP that is not there", ["train.py", "prior", "--dry-run", "--clip", "vit.pt"], nothing,
            ["vit.pt: no such file"]),
    Mistake("a second training of a run", ["train.py", "clip"], trained("clip"),
            ["runs/shapes/clip.pt exists", "--resume", "--out"]),
    Mistake("a run resumed with another seed", ["train.py", "clip", "--resume", "--seed", "1"], trained("clip"),
            ["runs/shapes/clip.pt: cannot be resumed", "another seed: 0, not 1"]),
    Mistake("a run resumed with other captions", ["train.py", "clip", *DATA, "--resume"],
            both(photos(), trained("clip", *DATA), text("photos/1.txt")),
            ["runs/shapes/clip.pt: cannot be resumed", "another data"]),
    Mistake("a run resumed to fewer steps than it has", ["train.py", "clip", "--resume", "--steps", "3"],
            trained("clip"), ["--steps 3", "4"]),
    Mistake("an export without a run", ["train.py", "export", "--out", "runs/new"], nothing,
            ["runs/new/clip.pt: no such file", "python train.py clip"]),
    Mistake("an export of a damaged run", ["train.py", "export"],
            both(trained("clip"), trained("upsample-256"), cut("runs/shapes/upsample-256.pt"),
                 copied("weights", "weights/shapes")),
            ["runs/shapes/upsample-256.pt: damaged"]),
    Mistake("a copy to grade that is not there", ["exercises/grade.py", "copy"], nothing, ["copy: no such folder"]),
]


@pytest.fixture
def work(tiny, weights, tmp_path, monkeypatch):  # noqa: F811
    """Makes the folder in which the commands run, with weights/; what was drawn or trained, as a list that grows."""
    shutil.copytree(weights, tmp_path / "weights")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "__file__", str(tmp_path / "train.py"))  # export writes to weights/ beside it
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT / "exercises")])
    monkeypatch.setattr(decoder, "ladder", lambda steps, top, power=1.0: [0, top])  # the inversion's too
    done = []

    def noted(module, name, function):
        monkeypatch.setattr(module, name, lambda *given, **named: (done.append(name), function(*given, **named))[1])

    for module, name in ((prior, "sample"), (decoder, "sample"), (decoder, "invert"), (upsample, "sample"),
                         (train, "add_gradients")):
        noted(module, name, getattr(module, name))
    return done


def run(command, capsys):
    """(exit status, stdout, lines of stderr that are no progress bars) of a command, in this process."""
    capsys.readouterr()
    sys.argv, status = command, 0
    try:
        importlib.import_module(Path(command[0]).stem).main()
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    err = re.sub(r"\Ausage: .*\n(?= *\S+( \w+)?: error: )", "", err, flags=re.S)
    return status, out, [line for line in re.split(r"[\r\n]", err) if line.strip() and not BAR.search(line)]


def contents():
    """{path: bytes} of the files in this folder."""
    return {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}


def rows(mistakes):
    """The rows as parameters."""
    for mistake in mistakes:
        marks = [pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")] if "cuda" in mistake.command else []
        yield pytest.param(mistake, id=mistake.name, marks=marks)


@pytest.mark.parametrize("mistake", [*rows(MISTAKES)])
def test_a_mistake_ends_in_one_line_that_says_what_to_do(mistake, work, capsys):
    mistake.prepare()
    before = contents()
    status, out, lines = run(mistake.command, capsys)
    if "--data" in mistake.command:
        lines = [line for line in lines if not SUMMARY.match(line)]
    assert (status, out, len(lines)) == (2, "", 1), lines
    assert lines[0].startswith(Path(mistake.command[0]).name) and "Traceback" not in lines[0]
    assert [word for word in mistake.words if word not in lines[0]] == []
    after = contents()
    assert not work and {path: after.get(path) for path in before} == before
    assert [path for path in after if path not in before and not LEFT.fullmatch(path.name)] == []


@pytest.mark.parametrize("stage", train.STAGES)
def test_ctrl_c_in_a_training_ends_in_one_line_and_the_stage_can_go_on(stage, work, monkeypatch, capsys):
    """In the second of four steps. The step is finished and saved."""
    learn, command = train.add_gradients, ["train.py", stage, "--workers", "0", "--device", "cpu"]
    if stage != "clip":
        command += ["--clip", "weights/clip.pt"]

    def interrupted(loss, batch, step, context, held_out=False):
        if step == 1 and not held_out:
            os.kill(os.getpid(), signal.SIGINT)
        return learn(loss, batch, step, context, held_out)

    monkeypatch.setattr(train, "add_gradients", interrupted)
    path = Path("runs/shapes", f"{stage}.pt")
    line = f"{stage}: stopped after step 2, saved in {path}; go on with --resume and the same options"
    status, out, lines = run(command, capsys)
    assert (status, out, [line for line in lines if "are cut (said once)" not in line]) == (130, "", [line])
    sys.argv = [*command, "--resume"]
    assert train.begin(stage, train.parse_arguments(), torch.device("cpu"), path).step == 2


def test_ctrl_c_while_a_picture_is_drawn_ends_in_one_line(work, monkeypatch, capsys):
    monkeypatch.setattr(decoder, "sample", lambda *given, **named: os.kill(os.getpid(), signal.SIGINT))
    before, handler = contents(), signal.signal(signal.SIGINT, signal.default_int_handler)
    try:  # a shell may have started the tests without a handler
        status, out, lines = run(["sample.py", "a star", "--size", "64", "--device", "cpu", *OWN], capsys)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert (status, out, lines, contents()) == (130, "", ["stopped"], before)


def test_the_table_has_42_rows_each_with_a_name_of_its_own():
    assert len(MISTAKES) == 42 == len({mistake.name for mistake in MISTAKES})
