"""The shipped weights: their size, that they load, and (slow) how fast, how lean and how right they are."""

import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from PIL import Image

import clip_embed
import manipulate
import sample
import train
from caption_accuracy import draw_and_score, read_scene
from weights.checkpoints import read_checkpoint
from common import decode, draw, load_network, observe
from manipulations import psnr, scenes_of, shown, single, to_images
from sweep import captions_of
from data import shapes
from data.shapes import random_scene
from weights import stack as stack_module

ROOT = Path(__file__).parent.parent
GLIDE = ROOT / "weights/glide"
SCRIPT = [sys.executable, str(ROOT / "sample.py"), "--device", "cpu"]


def test_shipped_weights_fit_together_and_in_40_megabytes():
    stack = sample.load_stack(sample.SHIPPED, "cpu", 1024)
    assert set(stack) == {"clip", "tokenizer", "prior", "decoder", "upsample-256", "upsample-1024"}
    assert sum(p.stat().st_size for p in sample.SHIPPED.iterdir()) < 40e6
    config = stack["decoder"].config  # as --help says
    assert (config.steps, config.candidates, config.guidance, stack["prior"].config.steps) == (14, 8, 1.0, 64)


@pytest.mark.parametrize("stage", ["prior", "ar-prior", "upsample-256", "upsample-1024"])  # docs/weights.md tells of the others
def test_a_recipe_is_what_made_the_shipped_weights(stage):
    recipe = train.RECIPES["shapes"][stage]
    trained = read_checkpoint(sample.SHIPPED / f"{stage}.pt", stage)["trained"]
    assert trained == {"step": recipe.steps, "recipe": asdict(recipe), "seed": 0}


def test_the_emoji_weights_fit_together_and_name_whose_pictures_they_learned_from():
    folder = ROOT / "weights/emoji"
    stack = sample.load_stack(folder, "cpu", 256)
    assert set(stack) == {"clip", "tokenizer", "prior", "decoder", "upsample-256"}
    assert sum(p.stat().st_size for p in folder.iterdir()) < 40e6
    licences = (folder / "LICENCES.txt").read_text()
    assert all(name in licences for name in ("Noto", "Twemoji", "Fluent", "CC BY 4.0", "Apache", "MIT"))


def test_the_baseline_stands_beside_the_shipped_clip():
    other = load_network(GLIDE / "decoder.pt", "decoder", sample.load_stack(), given="caption")
    assert other.config.embed_dim == sample.load_stack()["decoder"].config.embed_dim


# A process begins with its parent's peak memory as its own: so a small one stands between it and the tests.
MEASURE = ("import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stderr=subprocess.DEVNULL); "
           "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)")  # Linux counts KiB


def run_for(arguments):
    """(paths printed, seconds, peak memory in bytes) of sample.py run as a user runs it, in a process of its own."""
    began = time.perf_counter()
    out = subprocess.run([sys.executable, "-c", MEASURE, *SCRIPT, *arguments], stdout=subprocess.PIPE, text=True, check=True).stdout
    *paths, peak = out.splitlines()
    return [Path(path) for path in paths], time.perf_counter() - began, int(peak)


@pytest.mark.alone
@pytest.mark.slow
def test_a_caption_becomes_1024_pixels_in_a_minute_and_2_gigabytes(tmp_path):
    paths, seconds, peak = run_for(["a large red circle above a small blue star", "--out", str(tmp_path)])
    print(f"{seconds:.1f} s, {peak / 1e9:.2f} GB")
    assert Image.open(paths[0]).size == (1024, 1024) and seconds < 60 and peak < 2e9


@pytest.mark.alone
@pytest.mark.slow
def test_16_captions_at_64_pixels_in_45_seconds(tmp_path):
    paths, seconds, _ = run_for(["a striped heart left of a cross"] * 16 + ["--size", "64", "--out", str(tmp_path)])
    print(f"{seconds:.1f} s")
    assert len(paths) == 16 and seconds < 45


@pytest.mark.slow
def test_shapes_and_their_colours_are_mostly_right():
    bound = [verdict["bound"] for _, verdict, _ in draw_and_score(sample.load_stack(), captions_of(32, seed=7), seed=7)]
    one, two = sum(bound[::2]), sum(bound[1::2])
    print(f"one thing {one} / 16, two things {two} / 16")
    assert one >= 15 and two >= 14


@pytest.mark.slow
def test_the_decoder_hears_captions_without_z_i():
    stack, captions = sample.load_stack(prior_kind="none"), captions_of(32, seed=7)
    z_i = draw(stack, captions, 7, "none")
    bound = sum(o["right"]["bound"] for o in observe(decode(stack, z_i, captions, 7), captions))
    print(f"from the caption alone, shapes and colours are right in {bound} of 32")
    assert not z_i.any() and bound >= 27


@pytest.mark.slow
def test_inversion_gives_pictures_back_and_z_i_its_colour_to_anothers_noise():
    stack, scenes = sample.load_stack(prior_kind="none"), scenes_of(90, 8, 0, lambda rng: random_scene(rng, 1))
    images = to_images(scenes)
    z_i, x_T = manipulate.invert(stack, images, steps=50)
    again, swapped = (manipulate.decode(stack, z[:, None], x_T[:, None], steps=50)[:, 0] for z in (z_i, z_i.roll(-1, 0)))
    others = [shown(*pair)["colour"] for pair in zip(swapped, scenes[1:] + scenes[:1])]
    print(f"{psnr(images, again).median():.1f} dB, colours {sum(others)} / 8, variance {x_T.var():.3f}")
    assert psnr(images, again).median() >= 28 and sum(others) >= 6 and abs(float(x_T.var()) - 1) < 0.05


@pytest.mark.slow
def test_a_text_diff_makes_red_circles_blue_and_keeps_all_else_that_captions_say():
    stack, scenes = sample.load_stack(), scenes_of(91, 8, 0, lambda rng: single(rng, shape="circle", colour="red"))
    z_i, x_T = manipulate.invert(stack, to_images(scenes), steps=25)
    made = manipulate.text_diff(stack, z_i, x_T, "a blue circle", "a red circle", 0.3, 2, steps=25, restore=True)[:, 1]
    found, right = [read_scene(sample.to_picture(image)) for image in made], 0
    for new, old in zip(found, scenes):
        things = [(t.colour, t.shape, t.size, t.fill) for t in new.things]
        right += things == [("blue", "circle", old.things[0].size, old.things[0].fill)] and new.background == old.background
    print(f"{right} of 8 right")
    assert right >= 7


def test_words_that_clip_did_not_learn_are_named_once_and_those_of_the_world_are_not(capsys):
    tokenizer = sample.load_stack(sample.SHIPPED, "cpu", 64, "none")["tokenizer"]
    stack_module.warn_of_unknown_words(tokenizer, [*shapes.corpus(), "", "A Red circle, left of a star!"])
    assert not capsys.readouterr().err
    stack_module.warn_of_unknown_words(tokenizer, ["three red circles", "a grey dog", "three stars"])
    assert "in CLIP's training: three, circles, grey, dog, stars (--help" in capsys.readouterr().err
    for merges in ([], [("a", "b")] * 1000):  # no words at all, and as many as there may be
        stack_module.warn_of_unknown_words(clip_embed.Tokenizer(merges), ["three red circles"])
    assert not capsys.readouterr().err
