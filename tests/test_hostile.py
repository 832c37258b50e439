"""Files from others, damaged in every way that chance finds: each reader takes one or refuses it in one line, soon and in little memory."""

import io
import json
import math
import pickletools
import re
import shutil
import struct
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import clip_embed
import sample
from clip_embed import UserError, load_clip
from data import folder
from test_chain import weights  # noqa: F401 (a fixture)
from test_clip_published import BPE, TINY, archive, openai_archive, random_weights  # noqa: F401 (a fixture)
from test_data import write_tar
from weights.checkpoints import fingerprint
from weights.latents import load_latent
from weights.stack import load_stack

CASES, SECONDS, MEGABYTES = 500, 3.0, 300  # of each reader; of a case; of a reader's cases beyond the first fifth
NUMBERS = [b"\x00", b"\xff", b"\x00" * 8, b"\xff" * 8, b"\x7f" * 4, b"-1", b"1e999", b"99999999999999", b"null", b"{", b"\"", b"\n", b".."]


def mutated(data, rng):
    """Bytes damaged once to eight times: flipped, cut, doubled, overwritten, or with something odd inside."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 9)):
        # headers are at the start or the end, and most bytes are numbers of tensors
        place = int(rng.integers(len(data) + 1) if rng.random() < 0.4 else abs(rng.integers(-400, 400)) % (len(data) + 1))
        place = len(data) - place if rng.random() < 0.3 else place
        size, kind = int(rng.integers(1, 64)), rng.integers(6)
        if kind == 0 and place < len(data):
            data[place] ^= 1 << rng.integers(8)
        elif kind == 1:
            del data[place:place + size]
        elif kind == 2:
            data[place:place] = data[place:place + size]
        elif kind == 3:
            data[place:place + size] = rng.bytes(size)
        elif kind == 4:
            odd = NUMBERS[rng.integers(len(NUMBERS))]
            data[place:place + len(odd) * rng.integers(2)] = odd
        elif kind == 5 and rng.random() < 0.2:
            del data[place:]
    return bytes(data)


def hold_out(read, files, rng, cases=CASES):
    """Read damaged versions of files; assert that each is taken, or refused by a UserError of one line, soon and in little memory.

    files: [(path, its bytes)], of which one at a time is damaged and its path given to `read`. Returns how many were refused.
    """
    refused, began = 0, None
    for case in range(cases):
        path, data = files[rng.integers(len(files))]
        path.write_bytes(mutated(data, rng))
        start = time.process_time()
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                read(path)
            except UserError as error:
                refused += 1
                assert str(error).count("\n") == 0 and len(str(error)) < 1000, error
        assert not warned, (case, str(warned[0].message))  # a warning would be a second line
        assert time.process_time() - start < SECONDS, (case, path)
        path.write_bytes(data)
        if case == cases // 5:
            began = forget_peak()
    read(files[0][0])  # undamaged
    assert megabytes("VmHWM") - began < MEGABYTES
    return refused


def megabytes(name):
    """A line of Linux's /proc/self/status: VmRSS, the memory of this process; VmHWM, its peak."""
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def forget_peak():
    """Let the peak begin anew, at the memory of now, which is returned in MB."""
    Path("/proc/self/clear_refs").write_text("5")
    return megabytes("VmRSS")


def costs(read, message):
    """Assert that read() is refused in one line that matches `message`, in little memory."""
    began = forget_peak()
    with pytest.raises(UserError, match=message) as error:
        read()
    assert "\n" not in str(error.value) and megabytes("VmHWM") - began < 100


def test_a_pickle_that_asks_for_memory_by_a_number_gets_none(tmp_path):
    memo = pickletools.opcodes[[code.name for code in pickletools.opcodes].index("LONG_BINPUT")].code.encode()
    archive(tmp_path / "ViT.pt", b"\x80\x02}" + memo + struct.pack("<I", 1 << 26) + b".")  # C's unpickler: 1 GB
    costs(lambda: load_clip(tmp_path / "ViT.pt"), "holds no stage|damaged")


def test_tensors_that_are_larger_than_their_file_or_no_plain_numbers_are_refused(weights, tmp_path):  # noqa: F811
    own = shutil.copytree(weights, tmp_path / "weights")

    def case(stage, message, size=64, kind="none", config=None, **tensors):
        checkpoint = torch.load(weights / f"{stage}.pt", weights_only=True)
        checkpoint["config"] |= config or {}
        checkpoint["model"] |= tensors
        torch.save(checkpoint, own / f"{stage}.pt")
        costs(lambda: load_stack(own, size=size, prior_kind=kind), message)
        shutil.copy(weights / f"{stage}.pt", own / f"{stage}.pt")

    name, shape = "conv_in.bias", torch.load(weights / "decoder.pt", weights_only=True)["model"]["conv_in.bias"].shape
    case("prior", "positional_embedding is .*without values", kind="diffusion", config={"text_context": 1 << 20},
         positional_embedding=torch.empty(1 << 30, device="meta"))
    case("decoder", "conv_in.bias is .*complex", **{name: torch.zeros(shape, dtype=torch.complex64)})
    case("decoder", "conv_in.bias is sparse", **{name: torch.zeros(shape).to_sparse()})
    one = torch.zeros(1 << 20)
    case("decoder", "no network can be built", config={"embed_dim": 1 << 20},  # one storage, as if it were a hundred
         **{f"more.{k}": one for k in range(100)})
    case("prior", "errors holds negative", kind="diffusion", errors=torch.full((1000,), -1.0))
    for merges in ([3], [None], 5, ["a b c"], ["ab"], {"a": 1}):
        checkpoint = torch.load(weights / "clip.pt", weights_only=True)
        torch.save(checkpoint | {"merges": merges}, own / "clip.pt")
        costs(lambda: load_clip(own / "clip.pt"), "damaged, or no checkpoint")


ODD = (-1, 0, 1, 2, 3, 7, 5000, 1 << 19, -1.0, 0.0, 0.5, 1.5, 1e6, 1e-30, math.nan, math.inf, "x", "", None, True, False, (), (1,), (1, 2),
       (1, 2, 3), (0, 1), (-1,), ("x",), (1.5, 2), {"a": 1}, [1, 2])


@pytest.mark.slow
@pytest.mark.parametrize("stage, size, kind", [("clip", 64, "none"), ("prior", 64, "diffusion"), ("ar-prior", 64, "ar"), ("decoder", 64, "none"),
                                               ("upsample-256", 256, "none"), ("upsample-1024", 1024, "none")])
def test_with_an_odd_value_in_its_config_a_checkpoint_is_refused_or_draws(stage, size, kind, weights, tmp_path):  # noqa: F811
    own = shutil.copytree(weights, tmp_path / "weights")
    checkpoint, refused, drawn = torch.load(own / f"{stage}.pt", weights_only=True), 0, 0
    for field in checkpoint["config"]:
        for value in ODD:
            torch.save(checkpoint | {"config": checkpoint["config"] | {field: value}}, own / f"{stage}.pt")
            start = time.process_time()
            try:
                stack = load_stack(own, size=size, prior_kind=kind)
                drawn += 1
                steps = {"prior_steps": 2, "decoder_steps": None if field == "steps" else 2}
                images = sample.generate(stack, ["a red circle"], size=size, prior_kind=kind, candidates=1, **steps)
                assert images.shape[-1] <= 4096
            except UserError as error:
                refused += 1
                assert "\n" not in str(error)
            assert time.process_time() - start < 2 * SECONDS, (field, value)
    assert refused > 5 * drawn > 0


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.slow
def test_hugging_face_folders(tmp_path, rng):
    clip = shutil.copytree(TINY, tmp_path / "clip")
    files = [(clip / name, (clip / name).read_bytes()) for name in ("model.safetensors", "config.json", "merges.txt", "vocab.json")]
    assert hold_out(lambda path: load_clip(clip), files, rng) > CASES / 10


@pytest.mark.slow
def test_openais_archives_and_merges(tmp_path, rng, random_weights):  # noqa: F811
    openai_archive(tmp_path / "ViT.pt", random_weights)
    paths = [tmp_path / "ViT.pt"] * 3 + [tmp_path / BPE]
    assert hold_out(lambda path: load_clip(tmp_path / "ViT.pt"), [(path, path.read_bytes()) for path in paths], rng) > CASES / 10


@pytest.mark.slow
def test_pickled_weights(tmp_path, rng):
    clip = shutil.copytree(TINY, tmp_path / "clip")
    tensors = load_clip(clip)[0].state_dict()
    from weights.published import read_safetensors
    torch.save(dict(read_safetensors(clip / "model.safetensors")), clip / "pytorch_model.bin")
    (clip / "model.safetensors").unlink()
    assert tensors.keys() == load_clip(clip)[0].state_dict().keys()
    path = clip / "pytorch_model.bin"
    assert hold_out(lambda path: load_clip(clip), [(path, path.read_bytes())], rng) > CASES / 10


@pytest.mark.slow
def test_checkpoints_of_every_stage(weights, tmp_path, rng):  # noqa: F811
    own = shutil.copytree(weights, tmp_path / "weights")
    files = [(path, path.read_bytes()) for path in sorted(own.glob("*.pt"))]
    wanted = {"prior": (64, "diffusion"), "ar-prior": (64, "ar"), "upsample-256": (256, "none"), "upsample-1024": (1024, "none")}

    def read(damaged):
        """Only what the damaged file is needed for."""
        size, kind = wanted.get(damaged.stem, (64, "none"))
        load_stack(own, size=size, prior_kind=kind)

    assert hold_out(read, files, rng) > CASES / 10


@pytest.mark.slow
def test_latents(weights, tmp_path, rng):  # noqa: F811
    stack = load_stack(weights)
    c, path = stack["decoder"].config, tmp_path / "code.pt"
    torch.save({"stage": "latent", "config": {"decoder": fingerprint(stack["decoder"], torch.bfloat16), "caption": "a star", "steps": 50},
                "model": {"z_i": torch.randn(1, c.embed_dim), "x_T": torch.randn(1, 3, 64, 64)}}, path)
    assert hold_out(lambda path: load_latent(path, stack), [(path, path.read_bytes())], rng) > CASES / 10


@pytest.mark.slow
def test_pictures(tmp_path, rng):
    pixels = np.kron(rng.integers(0, 255, (12, 16, 3), np.uint8), np.ones((8, 8, 1), np.uint8))
    files = []
    for kind in ("png", "jpeg", "webp", "gif", "bmp"):
        path = tmp_path / f"picture.{kind}"
        Image.fromarray(pixels).save(path, kind)
        files.append((path, path.read_bytes()))
    assert hold_out(lambda path: clip_embed.to_square(clip_embed.open_picture(path), 64), files, rng) > CASES / 10


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tar", "jsonl", "csv", "txt"])
def test_folders_of_pictures(layout, tmp_path, rng):
    data, png = tmp_path / "photos", io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(png, "PNG")
    names = [f"{k}.png" for k in range(4)]
    if layout == "tar":
        write_tar(data, {name: (png.getvalue(), [f"a picture {name}"]) for name in names})
        paths = [*data.glob("*.tar")]
    else:
        data.mkdir()
        rows = [{"file_name": name, "text": f"a picture, {name}"} for name in names]
        texts = {"jsonl": "".join(json.dumps(row) + "\n" for row in rows),
                 "csv": "file_name,text\n" + "".join(f'{row["file_name"]},"{row["text"]}"\n' for row in rows)}
        for name in names:
            (data / name).write_bytes(png.getvalue())
            if layout == "txt":
                (data / name).with_suffix(".txt").write_text("a picture\nanother caption\n")
        if layout != "txt":
            (data / f"metadata.{layout}").write_text(texts[layout])
        paths = [*data.glob("*.txt"), *data.glob("metadata.*")] + [data / names[0]]

    def read(path):
        found, wrong = folder.list_pictures(str(data))
        for row, (side, _, fault) in zip(found, folder.check(str(data), found)):
            assert (side >= 64) == (fault == "") and "\n" not in fault

    hold_out(read, [(path, path.read_bytes()) for path in paths], rng, CASES // 4)


@pytest.mark.slow
def test_answers_of_submissions(rng):
    """What a student's process sends is refused by a ValueError of one kind or another; nothing else comes of it."""
    sys.path.insert(0, str(TINY.parents[2] / "exercises"))
    import child
    answer = child.pack({"z": [torch.randn(3, 4), (1, None, "x")], "n": torch.arange(5)})
    refused = 0

    def special(kind, content):
        raise ValueError(f"an answer holds no {kind}")

    for case in range(4 * CASES):
        start = time.process_time()
        try:
            child.unpack(mutated(answer, rng), special)
        except Exception as error:  # grade.py: "no answer that can be read"
            refused += 1
            assert not isinstance(error, (MemoryError, SystemExit)), error
        assert time.process_time() - start < SECONDS
    assert refused > CASES
