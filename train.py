"""Train every stage of unCLIP, on a built-in world of captioned shapes (appendix C).

In:   a stage's name, or `all` for the six in order: clip, prior, ar-prior, decoder, upsample-256, upsample-1024
Out:  in --out (default runs/<preset>), per stage: NAME.pt (the checkpoint, EMA weights under "model"),
      NAME.csv and NAME-loss.png (the loss), NAME-samples.png (what the network makes at present)

The world of shapes needs no download: step k of a run draws its scenes, its captions, its noise and its
timesteps from random numbers seeded by (--seed, k) alone, so `--resume` is exact: a run that was stopped
goes on as if it never had been.

    python train.py all --preset shapes              # everything
    python train.py decoder --resume                 # one stage, continued after a stop
"""

import argparse
import contextlib
import copy
import csv
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import clip_embed
import decoder
import prior
import upsample
from clip_embed import UserError, encode_captions, one_line_errors, pick_device, preprocess_tensor
from sample import grid, to_picture

# ----------------------------------------------------------------------------- the world of shapes

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")
COLOURS = {"red": (220, 40, 40), "orange": (245, 140, 30), "yellow": (250, 215, 50), "green": (40, 160, 70),
           "blue": (45, 90, 220), "purple": (140, 60, 190), "black": (25, 25, 25)}
BACKGROUNDS = {"white": (250, 250, 250), "gray": (165, 165, 165), "pink": (250, 190, 205), "mint": (185, 235, 205)}
SIZES = {"small": (0.09, 0.11), "large": (0.17, 0.20)}  # radius as a share of the side
FILLS = ("solid", "striped")
RELATIONS = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}  # and its inverse
WORDINGS = {"left of": ("to the left of", "left of", "on the left of"), "above": ("above", "over"),
            "right of": ("to the right of", "right of", "on the right of"), "below": ("below", "under")}
HELD_OUT = {("purple", "star"), ("green", "heart"), ("orange", "cross"), ("black", "triangle")}  # never trained
VALUES = {"shape": SHAPES, "colour": tuple(COLOURS), "size": tuple(SIZES), "fill": FILLS}


@dataclass(frozen=True)
class Thing:
    """One object of a scene. Lengths are shares of the picture's side, y grows downwards, tilt is in degrees."""
    shape: str
    colour: str
    size: str
    fill: str
    x: float = 0.5
    y: float = 0.5
    radius: float = 0.1  # of the circle around the shape
    tilt: float = 0.0
    word: str = ""       # written across it (fig. 6); only with --words


@dataclass(frozen=True)
class Scene:
    """One or two things; with two, things[0] stands in `relation` to things[1]."""
    things: tuple
    relation: str | None
    background: str
    shade: float  # how much the background darkens from top to bottom (from bottom to top where negative)


def pick(rng, options):
    """One of a sequence, at random."""
    return options[rng.integers(len(options))]


def is_held_out(scene):
    """Whether a scene has a colour-shape pair that training never shows."""
    return any((t.colour, t.shape) in HELD_OUT for t in scene.things)


def lay_out(scene, rng):
    """The same scene with fresh positions, radii and tilts that fit its sizes and its relation; nothing touches."""
    things = [replace(t, radius=rng.uniform(*SIZES[t.size]), tilt=rng.uniform(-12, 12)) for t in scene.things]
    room = lambda t: (t.radius + 0.02, 0.98 - t.radius)
    if len(things) == 1:
        return replace(scene, things=(replace(things[0], x=rng.uniform(*room(things[0])), y=rng.uniform(*room(things[0]))),))
    first, second = things if scene.relation in ("left of", "above") else reversed(things)  # smaller coordinate first
    apart = max(0.3, first.radius + second.radius + 0.04)
    (low, _), (_, high) = room(first), room(second)
    apart = rng.uniform(apart, min(high - low, apart + 0.25))
    along = rng.uniform(low, high - apart)
    low, high = max(room(t)[0] for t in things), min(room(t)[1] for t in things)
    across = rng.uniform(low, high)
    other = rng.uniform(max(low, across - 0.12), min(high, across + 0.12))
    at = {id(first): (along, across), id(second): (along + apart, other)}
    if scene.relation in ("above", "below"):
        at = {k: v[::-1] for k, v in at.items()}
    return replace(scene, things=tuple(replace(t, x=at[id(t)][0], y=at[id(t)][1]) for t in things))


def random_scene(rng, count=None, held_out=False):
    """A scene of one or two things (or `count`) from a numpy Generator; with `held_out`, one that training never shows."""
    while True:
        things = tuple(Thing(**{k: pick(rng, v) for k, v in VALUES.items()}) for _ in range(count or rng.integers(1, 3)))
        if held_out:
            colour, shape = pick(rng, sorted(HELD_OUT))
            things = (replace(things[0], colour=colour, shape=shape), *things[1:])
        scene = Scene(things, pick(rng, tuple(RELATIONS)) if len(things) == 2 else None, pick(rng, tuple(BACKGROUNDS)),
                      rng.uniform(-0.06, 0.06))
        if is_held_out(scene) == held_out:
            return lay_out(scene, rng)


def what_to_say(scene, rng):
    """The attributes a caption will name, each left out a third of the time; the shapes are always named."""
    options = [(k, a) for k in range(len(scene.things)) for a in ("colour", "size", "fill")] + ["background"]
    options += ["relation"] if scene.relation else []
    return {option for option in options if rng.random() < 2 / 3}


def describe(scene, said, rng):
    """A caption that says `said` of a scene, in one of several wordings."""
    def phrase(k):
        thing = scene.things[k]
        words = [getattr(thing, a) for a in ("size", "fill", "colour") if (k, a) in said] + [thing.shape]
        words += ["that says", thing.word] if (k, "word") in said else []
        return ("an " if words[0][0] in "aeiou" else "a ") + " ".join(words)

    text = phrase(0)
    if scene.relation:
        first, second, relation = 0, 1, scene.relation
        if rng.random() < 0.5:
            first, second, relation = 1, 0, RELATIONS[relation]
        link = pick(rng, WORDINGS[relation]) if "relation" in said else "and"
        text = f"{phrase(first)} {link} {phrase(second)}"
    if "background" in said:
        text += pick(rng, (" on a {} background", " on {}", " with a {} background")).format(scene.background)
    return pick(rng, ("", "", "there is ", "a picture of ")) + text


def meaning(scene, said):
    """What a caption that says `said` of a scene tells, whatever its wording: equal for captions that mean the same."""
    things = [tuple((a, getattr(t, a)) for a in VALUES if a == "shape" or (k, a) in said) for k, t in enumerate(scene.things)]
    relation = scene.relation if "relation" in said else None
    if relation in ("right of", "below"):
        things, relation = things[::-1], RELATIONS[relation]
    return tuple(things if relation else sorted(things)), relation, scene.background if "background" in said else None


def near_misses(scene, said, rng, n=3):
    """n scenes that the same kind of caption tells from this one, and from one another, by one thing that it says.

    What is hardest to learn comes oftenest. Where it can be, two things swap an attribute ("red circle, blue star" beside
    "blue circle, red star"), or stand in another relation: only a CLIP that binds attributes and places to objects can
    tell those captions apart. Else one attribute changes, half of the time the shape.
    """
    things, group = scene.things, [scene]
    swaps = [a for a in VALUES if len(things) == 2 and (a == "shape" or {(0, a), (1, a)} <= said)]
    while len(group) <= n:
        a = pick(rng, ["attribute"] + ["swap"] * bool(swaps) + ["relation"] * ("relation" in said))
        k = rng.integers(len(things))
        if a == "attribute":
            easy = sorted(s[1] for s in said if s[0] == k) + ["background"] * ("background" in said)
            a = pick(rng, easy) if easy and rng.random() < 0.5 else "shape"
        if a == "swap":
            a = pick(rng, swaps)
            other = replace(scene, things=tuple(replace(t, **{a: getattr(u, a)}) for t, u in zip(things, things[::-1])))
        elif a in ("relation", "background"):
            values = RELATIONS if a == "relation" else BACKGROUNDS
            other = replace(scene, **{a: pick(rng, [v for v in values if v != getattr(scene, a)])})
        else:
            new = replace(things[k], **{a: pick(rng, [v for v in VALUES[a] if v != getattr(things[k], a)])})
            other = replace(scene, things=tuple(new if j == k else t for j, t in enumerate(things)))
        if not is_held_out(other) and meaning(other, said) not in [meaning(s, said) for s in group]:
            group.append(lay_out(other, rng) if a in ("size", "relation") else other)
    return group[1:]


def write_words(group, said, rng):
    """(group, said) of scenes of one thing and what captions say of them, with a shape's name across each thing (fig. 6; ours).

    Things become large, or nobody could read them. Like all else the word is left out of captions a third of the time; where it
    is said, it alone tells the group's scenes apart: a CLIP must read it.
    """
    if rng.random() < 2 / 3:
        group, said = group[:1] * len(group), said | {(0, "word")}
    written = [replace(s.things[0], size="large", word=str(word)) for s, word in zip(group, rng.permutation(SHAPES))]
    return [lay_out(replace(s, things=(thing,)), rng) for s, thing in zip(group, written)], said


def outline(shape):
    """A shape's corners (n, 2) within the unit circle, y downwards."""
    turn = lambda n, start=-90: np.deg2rad(start + 360 / n * np.arange(n))
    ring = lambda angle: np.stack([np.cos(angle), np.sin(angle)], -1)
    if shape == "circle":
        return ring(turn(90))
    if shape == "square":
        return ring(turn(4, -45))
    if shape == "triangle":
        return ring(turn(3))
    if shape == "star":
        return np.stack([ring(turn(5)), 0.42 * ring(turn(5, -54))], 1).reshape(10, 2)
    if shape == "heart":
        a = np.deg2rad(np.arange(0, 360, 4))
        xy = np.stack([16 * np.sin(a) ** 3, -13 * np.cos(a) + 5 * np.cos(2 * a) + 2 * np.cos(3 * a) + np.cos(4 * a)], -1)
        return (xy - (0, 2)) / 17.2
    w = 0.3  # half the width of the cross's arms
    return np.array([(w, -1), (w, -w), (1, -w), (1, w), (w, w), (w, 1),
                     (-w, 1), (-w, w), (-1, w), (-1, -w), (-w, -w), (-w, -1)]) / 1.05


def render(scene, side):
    """Draw a scene as a Pillow image, side × side, antialiased: drawn larger, then averaged."""
    fine = max(2, 256 // side)
    n = side * fine
    shading = 1 - abs(scene.shade) * np.linspace(0, 1, n)[::1 if scene.shade > 0 else -1]
    column = (np.array(BACKGROUNDS[scene.background]) * shading[:, None]).round().astype(np.uint8)
    picture = Image.fromarray(np.ascontiguousarray(np.broadcast_to(column[:, None], (n, n, 3))))
    for thing in scene.things:
        a = np.deg2rad(thing.tilt)
        place = lambda xy: list(map(tuple, ((xy @ [[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]]) * thing.radius
                                            + (thing.x, thing.y)) * n))
        shape = place(outline(thing.shape))
        colour = np.array(COLOURS[thing.colour])
        ImageDraw.Draw(picture).polygon(shape, tuple(colour.tolist()))
        if thing.fill == "striped":  # bars across the thing, mixed with 35% white, cut out by its outline
            bars, inside = Image.new("L", (n, n)), Image.new("L", (n, n))
            for top in np.arange(-0.9, 1, 0.7):
                ImageDraw.Draw(bars).polygon(place(np.array([(-1, top), (1, top), (1, top + 0.35), (-1, top + 0.35)])), 255)
            ImageDraw.Draw(inside).polygon(shape, 255)
            light = tuple((0.65 * colour + 0.35 * 255).round().astype(int).tolist())
            picture.paste(light, mask=Image.composite(bars, Image.new("L", (n, n)), inside))
        if thing.word:  # as wide as the thing
            font = ImageFont.load_default(2 * thing.radius * n * 20 / ImageFont.load_default(20).getlength(thing.word))
            shade = (25,) * 3 if colour.sum() > 400 else (250,) * 3
            ImageDraw.Draw(picture).text((thing.x * n, thing.y * n), thing.word, shade, font, "mm", stroke_width=n // 200)
    return picture.reduce(fine)


def to_tensor(picture):
    """A Pillow RGB image → uint8 tensor (3, H, W)."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def corpus(n=2000, seed=0):
    """Captions of the world, for learning BPE merges from."""
    rng = np.random.default_rng(seed)
    scenes = [random_scene(rng, held_out=k % 10 == 0) for k in range(n)]
    return [describe(s, what_to_say(s, rng), rng) for s in scenes]


# ----------------------------------------------------------------------------- batches

class Batches(Dataset):
    """Batch k of a stage's training, drawn from (seed, k) alone: the same in any worker, in any order.

    clip, decoder: images (B, 3, 64, 64) uint8 and captions; for clip each scene stands beside three near misses, and no
    caption comes twice (a duplicate would be a false negative); a share recipe.words of both stages' scenes has words written
    across. priors: numbers of scenes in the fixed set whose z_i are computed beforehand (z_i: their pictures, in order), and
    captions. upsamplers: (high, low) crops, four of a scene.
    """

    def __init__(self, stage, recipe, seed, config):
        self.stage, self.batch_size, self.seed, self.config, self.fixed_scenes = stage, recipe.batch_size, seed, config, FIXED_SCENES
        self.words = recipe.words

    def __getitem__(self, k):
        rng = np.random.default_rng([self.seed, k])
        if self.stage.startswith("upsample"):
            crops = [upsample.training_crops(render(random_scene(rng), self.config.image_size), self.config, rng,
                                             min(4, self.batch_size - n)) for n in range(0, self.batch_size, 4)]
            return tuple(torch.cat(part) for part in zip(*crops))
        if self.stage == "z_i":
            numbers = range(k * self.batch_size, min((k + 1) * self.batch_size, self.fixed_scenes))
            return torch.stack([to_tensor(render(fixed_scene(self.seed, n), 64)) for n in numbers])
        if self.stage in ("prior", "ar-prior"):
            chosen = rng.integers(self.fixed_scenes, size=self.batch_size)
            scenes = [fixed_scene(self.seed, n) for n in chosen]
            return torch.from_numpy(chosen), [describe(s, what_to_say(s, rng), rng) for s in scenes]
        images, captions = [], []
        while len(images) < self.batch_size:
            worded = self.words and rng.random() < self.words
            scene = random_scene(rng, 1 if worded else None)
            said = what_to_say(scene, rng)
            group = [scene, *near_misses(scene, said, rng)] if self.stage == "clip" else [scene]
            group, said = write_words(group, said, rng) if worded else (group, said)
            words = [describe(s, said, rng) for s in group]
            if self.stage != "clip" or len(set(words) - set(captions)) == len(words):
                images += [to_tensor(render(s, 64)) for s in group]
                captions += words
        return torch.stack(images[:self.batch_size]), captions[:self.batch_size]


FIXED_SCENES = 65536  # the priors' set: they see embeddings, which can be kept, and fresh captions of them


def fixed_scene(seed, n):
    """Scene n of the priors' fixed set."""
    return random_scene(np.random.default_rng([seed, 1 << 40, n]))


# ----------------------------------------------------------------------------- what each stage trains

@dataclass
class Recipe:
    """How a stage is trained (appendix C, table 3): AdamW with β1 = 0.9."""
    batch_size: int
    steps: int
    learning_rate: float
    weight_decay: float = 0.0
    beta2: float = 0.999
    eps: float = 1e-8
    ema_decay: float = 0.9999
    warmup: int = 500
    words: float = 0.0  # share of the scenes that have a word written across them (clip and decoder)


RECIPES = {
    "shapes": {"clip": Recipe(64, 12000, 1e-3, 0.1, 0.98, 1e-6, 0.998),
               "prior": Recipe(256, 1400, 5e-4, 0.06, 0.96, 1e-6, 0.999),
               "ar-prior": Recipe(64, 2500, 1e-3, 0.04, 0.91, 1e-10, 0.999, 100),
               "decoder": Recipe(16, 15300, 8e-4, ema_decay=0.999),
               "upsample-256": Recipe(16, 1500, 5e-4, ema_decay=0.999),
               "upsample-1024": Recipe(16, 400, 5e-4, ema_decay=0.999)},
    "laptop": {"clip": Recipe(256, 20000, 5e-4, 0.1, 0.98, 1e-6, 0.999, 1000),
               "prior": Recipe(256, 100000, 1.1e-4, 0.06, 0.96, 1e-6),
               "ar-prior": Recipe(256, 100000, 1.6e-4, 0.04, 0.91, 1e-10, 0.999),
               "decoder": Recipe(32, 200000, 1.2e-4),
               "upsample-256": Recipe(16, 100000, 1.2e-4),
               "upsample-1024": Recipe(8, 100000, 1e-4)},
    "paper": {"clip": Recipe(32768, 400000, 3e-4, 0.2, 0.98, 1e-6, warmup=2000),  # CLIP's own batch; the paper adds SAM
              "prior": Recipe(4096, 600000, 1.1e-4, 0.06, 0.96, 1e-6),
              "ar-prior": Recipe(4096, 1000000, 1.6e-4, 0.04, 0.91, 1e-10, 0.999),
              "decoder": Recipe(2048, 800000, 1.2e-4),
              "upsample-256": Recipe(1024, 1000000, 1.2e-4),
              "upsample-1024": Recipe(512, 1000000, 1e-4)},
}


def clip_loss(model, batch, context):
    """The contrastive loss of a batch of (images, captions)."""
    images, captions = batch
    text, _ = encode_captions(model, context["tokenizer"], captions)
    z_i = model.encode_image(preprocess_tensor(images, model.config.image_size))
    return clip_embed.contrastive_loss(z_i, text["z_t"], model.logit_scale)


def clip_picture(model, batch, context):
    """Eight pictures against their eight captions: the cosines as a grey square, the pictures along its side."""
    images, captions = batch[0][:8], batch[1][:8]
    z_t = encode_captions(model, context["tokenizer"], captions)[0]["z_t"]
    cosine = (model.encode_image(preprocess_tensor(images, model.config.image_size)) @ z_t.T).clamp(0, 1)
    sheet = Image.fromarray((cosine * 255).byte().cpu().numpy()).resize((512, 512), Image.Resampling.NEAREST).convert("RGB")
    canvas = Image.new("RGB", (576, 512))
    canvas.paste(sheet, (64, 0))
    for k, image in enumerate(images):
        canvas.paste(to_picture(image), (0, 64 * k))
    return canvas


@torch.no_grad()
def read(captions, context):
    """What the frozen CLIP says of captions: (text, null)."""
    with torch.autocast(context["device"].type, enabled=False):
        return encode_captions(context["clip"], context["tokenizer"], captions)


@torch.no_grad()
def look(images, context):
    """What the frozen CLIP says of images in [-1, 1]: z_i."""
    with torch.autocast(context["device"].type, enabled=False):
        return context["clip"].encode_image(preprocess_tensor(images, context["clip"].config.image_size))


def captioned(context, count):
    """z_i and freshly made captions, read, of `count` times 256 of the fixed scenes: for what is measured and not trained."""
    batches = Batches("prior", Recipe(256, 0, 0), context["seed"], None)
    for numbers, captions in (batches[(1 << 41) + k] for k in range(count)):
        yield context["z_i"][numbers.to(context["device"])], read(captions, context)[0]


def prior_loss(model, batch, context, loss=prior.prior_loss):
    """A prior's loss of a batch of (numbers of scenes, captions)."""
    return loss(model, context["z_i"][batch[0]], *read(batch[1], context))


def prior_picture(model, batch, context, sample=prior.sample):
    """Eight of the scenes captioned, and under each the scenes of the fixed set nearest to three z_i drawn for its caption."""
    numbers, captions = batch[0][:8].tolist(), batch[1][:8]
    rows = [numbers]
    for n in range(3):
        z_i = sample(model, *read(captions, context), seeds(len(captions), 8 * n))
        rows.append((z_i @ context["z_i"].T).argmax(1).tolist())
    pictures = [to_tensor(render(fixed_scene(context["seed"], n), 64)).float() / 127.5 - 1 for row in rows for n in row]
    return grid(pictures, len(numbers))


def decoder_loss(model, batch, context):
    """The decoder's loss of a batch of (images, captions), given what --given says; alone, a caption is dropped as in GLIDE, 20%."""
    (text, null), dropped = read(batch[1], context), {"drop_z_i": 1, "drop_caption": 0.2} if context["given"] == "caption" else {}
    z_i = text["z_t"] if context["given"] == "z_t" else look(batch[0], context)
    return decoder.decoder_loss(model, batch[0], z_i, text, null, **dropped)


def decoder_picture(model, batch, context):
    """Eight pictures above what the decoder makes of their z_i, or what --given says, and captions."""
    images, (text, null) = batch[0][:8], read(batch[1][:8], context)
    z_i = look(images, context) if context["given"] == "z_i" else text["z_t"] * (context["given"] == "z_t")
    made = decoder.sample(model, z_i, text, null, seeds(len(images)), steps=25)
    return grid([*images, *made], len(images))


def upsampler_loss(model, batch, context):
    """The upsampler's loss of a batch of (high, low) crops."""
    return upsample.upsampler_loss(model, *batch)


def upsampler_picture(model, batch, context):
    """Two scenes, whole: the enlarged condition, what the upsampler makes of it, the truth."""
    c, columns = model.config, []
    for n in range(2):
        truth = render(fixed_scene(context["seed"], n), c.image_size)
        low = to_tensor(truth.reduce(c.image_size // c.low_size))[None].to(batch[0].device).float() / 127.5 - 1
        enlarged = torch.nn.functional.interpolate(low, (c.image_size,) * 2, mode="bicubic")
        columns += [enlarged[0], upsample.sample(model, low, seeds(1))[0], to_tensor(truth).float() / 127.5 - 1]
    return grid(columns, 3)


def seeds(n, first=0):
    """n generators, seeded first, first + 1, …"""
    return [torch.Generator().manual_seed(first + k) for k in range(n)]


# ----------------------------------------------------------------------------- the training loop

def learning_rate(step, recipe):
    """Linear warm-up, then half a cosine down to zero (ours: the paper names only the peak)."""
    ramp = min(1, (step + 1) / recipe.warmup)
    return recipe.learning_rate * ramp * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))


@torch.no_grad()
def update_ema(ema, model, step, decay):
    """Move the averaged weights towards the model's; early on faster, or the first weights would linger."""
    decay = min(decay, (1 + step) / (10 + step))
    for slow, fast in zip(ema.parameters(), model.parameters()):
        slow.lerp_(fast, 1 - decay)


def save_atomically(content, path):
    """torch.save beside the file, then rename: a crash or a full disk leaves the old checkpoint whole."""
    beside = path.with_suffix(".part")
    torch.save(content, beside)
    os.replace(beside, path)


def plot_loss(rows, path):
    """Draw the loss against the step with Pillow, both axes named, the loss on a logarithmic scale."""
    steps, losses = np.array([r[0] for r in rows], float), np.log10(np.maximum([r[1] for r in rows], 1e-12))
    width, height, left, bottom = 640, 360, 70, 40
    low, high = losses.min() - 0.02, losses.max() + 0.02
    to_xy = lambda s, l: (left + (width - left - 15) * s / max(1, steps[-1]), 15 + (height - bottom - 15) * (high - l) / (high - low))
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    for tick in np.linspace(low, high, 5):
        draw.line([to_xy(0, tick), to_xy(steps[-1], tick)], "gainsboro")
        draw.text((8, to_xy(0, tick)[1] - 6), f"{10 ** tick:.3g}", "black")
    for tick in np.linspace(0, steps[-1], 6):
        draw.text((to_xy(tick, low)[0] - 12, height - bottom + 8), f"{tick:.0f}", "black")
    draw.text((width // 2, height - 16), "step", "black")
    draw.line([to_xy(s, l) for s, l in zip(steps, losses)], "royalblue", 2)
    picture.save(path)


def train(stage, args, device):
    """Train one stage from its start, or from its checkpoint with --resume. Raises UserError.

    Writes the checkpoint, the CSV, the loss curve and the sample picture every --save-every steps.
    """
    (prepare, build, loss_of, picture_of), recipe = STAGES[stage], RECIPES[args.preset][stage]
    recipe = replace(recipe, **{k: getattr(args, k) for k in ("batch_size", "steps", "learning_rate", "words") if getattr(args, k)})
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{stage}.pt"
    if path.exists() and not args.resume:
        raise UserError(f"{path} exists: go on from it with --resume, or train elsewhere with --out")
    torch.manual_seed(args.seed)
    context, extra = prepare(args, device)
    context |= {"device": device, "seed": args.seed}
    config = context["config"]
    model = build(config).to(device, memory_format=torch.channels_last)
    if args.init and not path.exists():
        given = clip_embed.read_checkpoint(args.init, stage)
        if given["config"] != asdict(config):
            raise UserError(f"{args.init}: has other sizes than the {stage} of preset {args.preset}")
        model.load_state_dict(clip_embed.load_model(build, type(config), given, args.init).state_dict())
    model.load_state_dict(context.get("codes", {}), strict=False)
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    groups = [{"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": recipe.weight_decay},
              {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0}]  # biases and norms: none
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, recipe.beta2), eps=recipe.eps)
    start, rows, recent = 0, [], []  # rows: step, mean loss since the row before (recent: of what), images a second
    if path.exists():
        checkpoint = clip_embed.read_checkpoint(path, stage)
        state = checkpoint.get("training")
        if state is None or checkpoint["config"] != asdict(config):
            raise UserError(f"{path}: cannot be resumed, it {'has no optimizer state' if state is None else 'has other sizes'}")
        for name, value in ({"seed": args.seed} | extra).items():
            if (state | checkpoint).get(name, value) != value:  # what an older one lacks is as it is now
                raise UserError(f"{path}: cannot be resumed, it was trained with another {name}: "
                                f"{(state | checkpoint)[name]!s:.40}, not {value!s:.40}")
        model.load_state_dict(state["model"])
        ema.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(state["optimizer"])
        start, rows, recent = state["step"], state["rows"], state["recent"]

    def save(step):
        save_atomically({"stage": stage, "config": asdict(config), "model": ema.state_dict(), **extra, "training": {
            "model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "rows": rows, "recent": recent,
            "recipe": asdict(recipe), "seed": args.seed}}, path)

    low = args.precision == "bfloat16" or args.precision == "auto" and device.type == "cuda"
    loader = DataLoader(Batches(stage, recipe, args.seed, config), batch_size=None,
                        sampler=range(start, recipe.steps), num_workers=args.workers, prefetch_factor=4 if args.workers else None)
    bar = tqdm(loader, desc=stage, initial=start, total=recipe.steps, unit="step", dynamic_ncols=True)
    began, seen = time.time(), 0
    for step, batch in enumerate(bar, start):
        torch.manual_seed((args.seed << 32) + step)  # noise, timesteps and dropout depend on (seed, step) alone
        batch = to_device(batch, device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe)
        with torch.autocast(device.type, torch.bfloat16, enabled=low), attention_kernel(device, low):
            loss = loss_of(model, batch, context)
        recent.append(loss.item())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if not (math.isfinite(recent[-1]) and torch.isfinite(norm)):
            last = f"the last good checkpoint is {path}" if path.exists() else "no checkpoint was written yet"
            raise UserError(f"{stage}: the loss at step {step} is {recent[-1]}, its gradient's norm {float(norm)}; {last}: go on "
                            "with --resume and a lower --learning-rate, or with --precision float32")
        optimizer.step()
        update_ema(ema, model, step, recipe.ema_decay)
        seen += recipe.batch_size
        bar.set_postfix(loss=f"{np.mean(recent[-100:]):.4f}", images_s=f"{seen / (time.time() - began):.0f}", refresh=False)
        done = step + 1
        if done % args.log_every == 0 or done == recipe.steps:
            rows.append((done, float(np.mean(recent)), seen / (time.time() - began)))
            recent = []
        if stage == "prior" and done == recipe.steps:
            ema.errors.copy_(prior.estimate_errors(ema, captioned(context, 4)))
        if done % args.save_every == 0 or done == recipe.steps:
            save(done)
            with open(path.with_suffix(".csv"), "w", newline="") as file:
                csv.writer(file).writerows([("step", "loss", "images_per_second"), *rows])
            if rows:
                plot_loss(rows, args.out / f"{stage}-loss.png")
            with torch.no_grad():
                picture_of(ema, batch, context).save(args.out / f"{stage}-samples.png")


def attention_kernel(device, low):
    """On CPUs torch's fused attention is several times slower in bfloat16 than plain matrix products: use those."""
    if low and device.type == "cpu":
        return torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    return contextlib.nullcontext()


# What a stage needs before it can train, and what its checkpoint records beside the weights: (context, extra).

def prepare_clip(args, device):
    """The tokenizer, its merges learned from the world's captions, and a config that fits it."""
    tokenizer = clip_embed.Tokenizer(clip_embed.learn_bpe(corpus()))
    config = replace(clip_embed.PRESETS[args.preset], vocab_size=len(tokenizer))
    return {"tokenizer": tokenizer, "config": config}, {"merges": [" ".join(m) for m in tokenizer.merges]}


def frozen_clip(args, device):
    """The CLIP of --clip, or the one that was trained in the same folder."""
    clip, tokenizer = clip_embed.load_clip(args.clip or args.out / "clip.pt", args.bpe)
    context = {"clip": clip.to(device), "tokenizer": tokenizer, "device": device, "seed": args.seed}
    return context, {"clip": clip_embed.fingerprint(clip)}


def prepare_prior(args, device):
    """CLIP, and z_i of the fixed set of scenes: computed once, then read from a file named by what they depend on."""
    context, extra = frozen_clip(args, device)
    c = context["clip"].config
    cache = args.out / f"z_i-{extra['clip']}-{args.seed}-{FIXED_SCENES}.pt"
    if not cache.exists():
        loader = DataLoader(Batches("z_i", Recipe(256, 0, 0), args.seed, None), batch_size=None,
                            sampler=range(-(-FIXED_SCENES // 256)), num_workers=args.workers)
        save_atomically(torch.cat([look(images.to(device).float() / 127.5 - 1, context).cpu()
                                   for images in tqdm(loader, desc="z_i of the priors' scenes", unit="batch")]), cache)
    config = replace(prior.PRESETS[args.preset], embed_dim=c.embed_dim, clip_text_width=c.text_width)
    return context | {"z_i": torch.load(cache, weights_only=True).to(device), "config": config}, extra


def prepare_ar_prior(args, device):
    """What the diffusion prior needs, and what makes codes of z_i and of z_i·z_t: components and buckets of the fixed set."""
    (context, extra), config = prepare_prior(args, device), prior.AR_PRESETS[args.preset]
    try:
        codes = prior.fit_codes(context["z_i"], config.buckets)
    except ValueError as error:
        raise UserError(f"z_i of the priors' {len(context['z_i'])} scenes: {error}") from None
    dots = torch.cat([(z_i * text["z_t"]).sum(1) for z_i, text in captioned(context, 16)])
    codes["dot_edges"], _ = prior.quantile_buckets(dots.cpu(), config.buckets)
    c = context["config"]
    config = replace(config, embed_dim=c.embed_dim, clip_text_width=c.clip_text_width, components=len(codes["components"]))
    return context | {"codes": codes, "config": config}, extra


def prepare_decoder(args, device):
    """CLIP, a config that fits it, and what the decoder is given."""
    context, extra = frozen_clip(args, device)
    c = context["clip"].config
    config = replace(decoder.PRESETS[args.preset], embed_dim=c.embed_dim, clip_text_width=c.text_width, vocab_size=c.vocab_size)
    return context | {"config": config, "given": args.given}, extra | {"given": args.given}


def prepare_upsampler(args, device, size):
    """An upsampler needs nothing else."""
    return {"config": upsample.PRESETS[args.preset][size]}, {}


def to_device(batch, device):
    """Tensors to the device, uint8 pictures as floats in [-1, 1]; captions as they are."""
    return tuple(part if isinstance(part, list) else part.to(device).float() / 127.5 - 1 if part.dtype == torch.uint8
                 else part.to(device) for part in batch)


# name: (what it needs, network, loss, sample picture)
STAGES = {
    "clip": (prepare_clip, clip_embed.CLIP, clip_loss, clip_picture),
    "prior": (prepare_prior, prior.DiffusionPrior, prior_loss, prior_picture),
    "ar-prior": (prepare_ar_prior, prior.ARPrior, partial(prior_loss, loss=prior.ar_loss),
                 partial(prior_picture, sample=prior.ar_sample)),
    "decoder": (prepare_decoder, decoder.Decoder, decoder_loss, decoder_picture),
    "upsample-256": (partial(prepare_upsampler, size=256), upsample.Upsampler, upsampler_loss, upsampler_picture),
    "upsample-1024": (partial(prepare_upsampler, size=1024), upsample.Upsampler, upsampler_loss, upsampler_picture),
}


def export(runs, folder, stages=STAGES):
    """Write a run's checkpoints, those there are, in half precision without training state to `folder`. Raises UserError."""
    folder.mkdir(parents=True, exist_ok=True)
    for stage in stages:
        if stage != "clip" and not (runs / f"{stage}.pt").exists():
            print(f"{runs / stage}.pt: not trained yet, left out", file=sys.stderr)
            continue
        checkpoint = clip_embed.read_checkpoint(runs / f"{stage}.pt", stage)
        training = checkpoint.pop("training", None)
        if training is None:
            raise UserError(f"{runs / stage}.pt: has no training state, it is an export already")
        checkpoint["model"] = {k: v.half() for k, v in checkpoint["model"].items()}
        checkpoint["trained"] = {k: training[k] for k in ("step", "recipe", "seed")}
        save_atomically(checkpoint, folder / f"{stage}.pt")
        print(folder / f"{stage}.pt")


def main():
    """The script: what --help says."""
    parser = argparse.ArgumentParser(
        description="Train unCLIP's stages on the built-in world of shapes. The priors and the decoder need the CLIP of the same "
        "--out folder, or --clip; the upsamplers need nothing.",
        epilog="A run that was stopped goes on with the same command and --resume, as if it had never stopped.")
    parser.add_argument("stage", choices=["all", *STAGES, "export"],
                        help="one stage; all six in order; or export: copy a finished run, in half precision, to weights/PRESET")
    parser.add_argument("--preset", default="shapes", choices=RECIPES, help="sizes and recipe: shapes (a laptop's CPU or any GPU), "
                        "laptop (a laptop GPU), paper (table 3)")
    parser.add_argument("--out", type=Path, help="where checkpoints, curves and samples go (default runs/PRESET)")
    parser.add_argument("--clip", metavar="PATH", help="train prior and decoder on this CLIP, anyone's (see clip_embed.py), in "
                        "place of one trained here")
    parser.add_argument("--bpe", metavar="PATH", help="the merges file of --clip, where none lies beside it")
    parser.add_argument("--steps", type=int, help="training steps in all, in place of the preset's")
    parser.add_argument("--batch-size", type=int, help="in place of the preset's")
    parser.add_argument("--learning-rate", type=float, help="in place of the preset's")
    parser.add_argument("--given", default="z_i", choices=["z_i", "z_t", "caption"], help="what the decoder is trained on beside "
                        "the caption: z_i (default), z_t in its place (§5.1), or nothing, the caption alone: GLIDE")
    parser.add_argument("--words", type=float, default=0.0, help="share of the scenes of clip and decoder that get a word "
                        "written across a thing (fig. 6; default 0)")
    parser.add_argument("--seed", type=int, default=0, help="decides weights, scenes, captions and noise (default 0)")
    parser.add_argument("--init", type=Path, metavar="CHECKPOINT", help="start from these weights, as in weights/shapes (one stage)")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoints in --out")
    parser.add_argument("--precision", default="auto", choices=["auto", "float32", "bfloat16"],
                        help="auto: bfloat16 on cuda, else float32; bfloat16 also pays on CPUs with AMX")
    parser.add_argument("--workers", type=int, default=1, help="processes that draw scenes (default 1)")
    parser.add_argument("--log-every", type=int, default=50, help="steps between two rows of the CSV (default 50)")
    parser.add_argument("--save-every", type=int, default=500, help="steps between two checkpoints (default 500)")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    args = parser.parse_args()
    args.out = args.out or Path("runs") / args.preset
    with one_line_errors():
        for name, low, high in (("steps", 1, 1e9), ("batch_size", 1, 1e6), ("learning_rate", 1e-12, 10), ("seed", 0, 1 << 30),
                                ("words", 0, 1), ("workers", 0, 1024), ("log_every", 1, 1e9), ("save_every", 1, 1e9)):
            if getattr(args, name) is not None and not low <= getattr(args, name) <= high:
                raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be between {low:g} and {high:g}")
        if args.init and args.stage not in STAGES:
            raise UserError(f"--init {args.init}: a checkpoint is one stage's; train that stage alone")
        device = pick_device(args.device)
        stages = [stage for stage in STAGES if not (args.clip and stage == "clip")]
        if args.stage == "export":
            export(args.out, Path(__file__).parent / "weights" / args.preset, stages)
        for stage in stages if args.stage == "all" else [args.stage] if args.stage in STAGES else []:
            train(stage, args, device)


if __name__ == "__main__":
    main()
