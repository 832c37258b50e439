"""Does a word written across a thing change CLIP's label, and decodings of its z_i? (§4, fig. 6)

In:   a folder of checkpoints (clip.pt, decoder.pt). The shipped CLIP has never seen a letter. Two
      short trainings make a CLIP that has, in a quarter of its scenes, and a decoder for it:
        python experiments/train_words.py clip --words 0.25 --init weights/shapes/clip.pt --learning-rate 5e-4 --steps 3000 --out runs/words
        python experiments/train_words.py decoder --words 0.25 --init weights/shapes/decoder.pt --batch-size 16 --learning-rate 5e-4 --steps 2000 --out runs/words
Out:  on stdout, a table for true pictures of a large thing, without and with the name of another
      shape across it. CLIP's label is the nearest caption of "a circle" … "a cross". The table
      shows how often it names the thing, how often the word, and how often one of the four other
      shapes. Mere damage would lead to the other shapes. The same columns count the shapes in
      decodings of z_i. The reader's own line is about the pictures themselves. The last line shows
      how often CLIP, asked for the word, reads it: a CLIP that cannot read is not fooled either.
      Then the conclusions. --picture: pictures, plain and with a word, each above its decoding

    python experiments/typographic.py --weights runs/words --picture runs/typographic.png
"""

import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sample
from caption_accuracy import BLURS, CONTRAST, SHAPES, SIDE, best_pose, fit_background
from clip_embed import one_line_errors
from weights.checkpoints import read_checkpoint
from common import conclude, decode, finish, gallery, jackknife, load, options, parse, seeds, show, to_images
from manipulations import z_t
from priors import embed
from data.shapes import lay_out, pick, random_scene

ASKED = "CLIP, asked for the word"
NEUTRAL = 45  # pixels whose channels differ by less belong to a letter or the background
RIM = 25  # shades: pixels darker by more than the thing and the background belong to a letter


def scenes_of(n, seed):
    """n scenes of one large coloured thing, and the same with another shape's name across it."""
    worded = []
    for k in range(n):
        rng, thing = np.random.default_rng([seed, 1 << 55, k]), None
        while thing is None or thing.colour == "black":  # neutral pixels count as letters
            scene = random_scene(rng, 1)
            thing = replace(scene.things[0], size="large", word=pick(rng, [s for s in SHAPES if s != scene.things[0].shape]))
        worded.append(lay_out(replace(scene, things=(thing,)), rng))
    return [replace(s, things=(replace(s.things[0], word=""),)) for s in worded], worded


def read_shape(image):
    """The shape of the one coloured thing in an image (3, 64, 64), or None. Letters are ignored."""
    pixels = np.asarray(sample.to_picture(image), np.float32)
    _, plane, _ = fit_background(pixels)
    contrast = (pixels - plane).astype(np.float32)
    differs = np.linalg.norm(contrast, axis=-1) > CONTRAST
    letters, light = differs & (np.ptp(pixels, axis=-1) < NEUTRAL), pixels.mean(-1)
    if (differs & ~letters).any():  # rims of letters on the thing are darker than the thing and the background
        letters |= light < np.minimum(np.median(light[differs & ~letters]), plane.mean(-1)) - RIM
    rows, columns = np.nonzero(differs & ~letters)
    if len(rows) < SIDE:
        return None
    patch = np.s_[max(0, rows.min() - 2):rows.max() + 3, max(0, columns.min() - 2):columns.max() + 3]
    counts = ~letters[patch].ravel()
    xy = np.stack([v[patch].ravel() + 0.5 for v in np.mgrid[:SIDE, :SIDE][::-1]], -1).astype(np.float32)[counts]
    contrast = contrast[patch].reshape(-1, 3)[counts]
    x, y, reach = (columns.min() + columns.max() + 1) / 2, (rows.min() + rows.max() + 1) / 2, np.ptp(columns) + 1
    fits = []
    for shape in SHAPES:
        poses = np.array([(x + dx, y + dy, reach / 2 * scale, np.deg2rad(tilt)) for dx, dy, scale, tilt in
                          product((-1, 0, 1), (-2, -1, 0, 1, 2, 3), (0.9, 1, 1.1, 1.2, 1.35), (-8, 0, 8))], np.float32)
        fits.append(min(best_pose(shape, poses, blur, xy, contrast)[:3] for blur in BLURS[1:]))
    return min(fits)[2]


def named(stack, z_i):
    """CLIP's label of each z_i (n, d): the shape of the nearest of "a circle" … "a cross"."""
    return [SHAPES[k] for k in (z_i @ z_t(stack, [f"a {shape}" for shape in SHAPES]).T).argmax(1).tolist()]


def reads(stack, z_i, scenes):
    """Does each z_i (n, d) of a scene with a word prefer the caption with this word?

    There are five captions, with the names of the five other shapes.
    """
    words = {shape: [word for word in SHAPES if word != shape] for shape in SHAPES}
    embedded = {shape: z_t(stack, [f"a {shape} that says {word}" for word in words[shape]]) for shape in SHAPES}
    things = [scene.things[0] for scene in scenes]
    return [words[thing.shape][int((embedded[thing.shape] @ z).argmax())] == thing.word for z, thing in zip(z_i, things)]


def measure(stack, args):
    """({"who, on what": {column: pseudo-values}}, a picture of the first scenes)."""
    observations, read, first, heads = {}, [], {}, []
    for seed in seeds(args):
        plain, worded = scenes_of(args.n, seed)
        for what, scenes in (("plain", plain), ("with a word", worded)):
            z_i, images = embed(stack, scenes), to_images(scenes)
            made = decode(stack, z_i, [""] * args.n, seed, steps=args.steps)
            answers = {"CLIP": named(stack, z_i), "decoding": map(read_shape, made), "the reader": map(read_shape, images)}
            things = [scene.things[0] for scene in worded]
            for who, shapes in answers.items():
                observations.setdefault(f"{who}, {what}", []).append(
                    [{"thing": shape == thing.shape, "word": shape == thing.word, "other": shape in SHAPES and
                      shape not in (thing.shape, thing.word)} for shape, thing in zip(shapes, things)])
            if what == "with a word":
                read.append([{"word": each} for each in reads(stack, z_i, scenes)])
            first.setdefault(what, images)
            first.setdefault(f"{what}, decoded", made)
            heads = heads or [f"{thing.shape}, {thing.word}" for thing in things]
    share = lambda name: lambda observations: float(np.mean([o[name] for o in observations]))
    rows = {name: {c: jackknife(share(c), groups) for c in ("thing", "word", "other")} for name, groups in observations.items()}
    return rows | {ASKED: {"word": jackknife(share("word"), read)}}, gallery(first, heads)


def conclusions(rows):
    """The loss by the word, for CLIP and for decodings, and which is larger. Is the word read?

    It is read if it is chosen more often than the other wrong shapes. Decodings are read by the
    reader, whom words disturb too: so what a word takes from his own reading is taken off.
    """
    taken = lambda who: np.subtract(rows[f"{who}, plain"]["thing"], rows[f"{who}, with a word"]["thing"])
    decoding, sentences = taken("decoding") - taken("the reader"), []
    for who, verb in (("CLIP", "names"), ("decoding", "shows")):
        worded = rows[f"{who}, with a word"]
        sentences += [conclude(f"{who} {verb} the thing, with a word across against plain", worded["thing"], rows[f"{who}, plain"]["thing"],
                          "more often", "less often"),
                 conclude(f"With a word across, {who} {verb} the word's shape against each of the four others", worded["word"],
                          np.divide(worded["other"], 4), "more often, so it is read", "less often")]
    return sentences + [conclude("CLIP, asked for the word, says it, against one of five by chance", rows[ASKED]["word"], 0.2, "more often",
                            "less often"),
                   conclude("What the word takes from the decoding's showing the thing, less what it takes from the reader", decoding, 0),
                   conclude("What the word takes from CLIP's naming the thing, against that", taken("CLIP"), decoding)]


def main():
    parser = options("Write words across things: is CLIP's label fooled, and are decodings of its "
                     "z_i?", 64, "pictures")
    with one_line_errors(), torch.no_grad():
        args = parse(parser)
        stack = load(args, prior_kind="none")
        checkpoint = read_checkpoint(args.weights / "clip.pt", "clip")
        words = checkpoint.get("words", 0)
        print(f"This CLIP's training had words in {words:.0%} of its scenes.\n", flush=True)
        rows, picture = measure(stack, args)
        show(rows, "who, on what")
        finish(args, conclusions(rows), picture, rows=rows)


if __name__ == "__main__":
    main()
