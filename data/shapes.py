"""The world of shapes: captioned scenes drawn at any size, and the batches that stages train on.

A scene has one or two things: circle, square, triangle, star, heart or cross, in seven colours,
small or large, solid or striped, on one of four backgrounds. With two, one stands left of, right
of, above or below the other. A caption names the shapes and some of the rest. It never says exact
places, tilts, exact sizes or the background's shading. Four pairs of colour and shape (HELD_OUT)
are kept from training.

Row n of batch k depends on (seed, k, n) alone; for clip on the rows before it too (no caption
twice). So it is the same in any process, any worker, any order.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from PIL import Image, ImageChops, ImageDraw, ImageFont
from torch.utils.data import Dataset

from clip_embed import to_tensor

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")
COLOURS = {"red": (220, 40, 40), "orange": (245, 140, 30), "yellow": (250, 215, 50),
           "green": (40, 160, 70), "blue": (45, 90, 220), "purple": (140, 60, 190),
           "black": (25, 25, 25)}
BACKGROUNDS = {"white": (250, 250, 250), "gray": (165, 165, 165), "pink": (250, 190, 205),
               "mint": (185, 235, 205)}
RADII = {"small": (0.09, 0.11), "large": (0.17, 0.20)}  # least and most, as a share of the side
FILLS = ("solid", "striped")
RELATIONS = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
WORDINGS = {"left of": ("to the left of", "left of", "on the left of"), "above": ("above", "over"),
            "right of": ("to the right of", "right of", "on the right of"),
            "below": ("below", "under")}
HELD_OUT = {("purple", "star"), ("green", "heart"), ("orange", "cross"), ("black", "triangle")}
VALUES = {"shape": SHAPES, "colour": tuple(COLOURS), "size": tuple(RADII), "fill": FILLS}
FIXED_SCENES = 1 << 18  # scenes that the priors train on: their z_i are computed once
FULL = 0.5  # share of the captions of priors and decoder that name everything
ALIKE = 0.5  # clip: share of the scenes of two things in which only shape or colour differs
SINGLES = 1000  # clip: the first batches have one thing a scene (crossed); else fill is not learned.
#                 Not in batches over 8192: there are only some 15,000 captions of one thing
CROSSED = 0.125  # clip: share of later groups that have one thing too
FORWARD = 0.8  # clip: share of the captions with a relation that begin with the left or upper thing;
#                with 0.5 neither order nor relation is a hint, and CLIP learned no places


# ------------------------------ scenes


@dataclass(frozen=True)
class Thing:
    """One object of a scene. Lengths are shares of the side, y grows downwards, tilt in degrees."""
    shape: str
    colour: str
    size: str
    fill: str
    x: float = 0.5
    y: float = 0.5
    radius: float = 0.1  # of the circle around the shape
    tilt: float = 0.0
    word: str = ""       # written across it (experiments/train_words.py)


@dataclass(frozen=True)
class Scene:
    """One or two things. Of two, things[0] stands in `relation` to things[1]."""
    things: tuple
    relation: str | None
    background: str
    shade: float  # how much the background darkens downwards; negative: upwards


def pick(rng, options):
    """One of a sequence, at random."""
    return options[rng.integers(len(options))]


def is_held_out(scene):
    """Whether a scene has a colour-shape pair that training never shows."""
    return any((t.colour, t.shape) in HELD_OUT for t in scene.things)


def order(scene):
    """The numbers of a scene's two things: the left or upper one's first."""
    return (0, 1) if scene.relation in ("left of", "above") else (1, 0)


def lay_out(scene, rng):
    """The scene with fresh places, radii and tilts that fit its sizes and its relation."""
    def room(thing):
        return thing.radius + 0.02, 0.98 - thing.radius

    things = [replace(t, radius=rng.uniform(*RADII[t.size]), tilt=rng.uniform(-12, 12))
              for t in scene.things]
    if len(things) == 1:
        x, y = (rng.uniform(*room(things[0])) for _ in "xy")
        return replace(scene, things=(replace(things[0], x=x, y=y),))
    # the thing with the smaller coordinate first
    first, second = (things[k] for k in order(scene))
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
    things = tuple(replace(t, x=at[id(t)][0], y=at[id(t)][1]) for t in things)
    return replace(scene, things=things)


def random_scene(rng, count=None, held_out=False):
    """A scene of one or two things, or of `count`; held_out: one that training never shows."""
    while True:
        things = tuple(Thing(**{k: pick(rng, v) for k, v in VALUES.items()})
                       for _ in range(count or rng.integers(1, 3)))
        if held_out:
            colour, shape = pick(rng, sorted(HELD_OUT))
            things = (replace(things[0], colour=colour, shape=shape), *things[1:])
        relation = pick(rng, tuple(RELATIONS)) if len(things) == 2 else None
        scene = Scene(things, relation, pick(rng, tuple(BACKGROUNDS)), rng.uniform(-0.06, 0.06))
        if is_held_out(scene) == held_out:
            return lay_out(scene, rng)


def training_scene(rng):
    """A scene to train on: four of five have two things, which are harder."""
    return random_scene(rng, 2 if rng.random() < 0.6 else None)


def almost_alike(scene, rng):
    """A scene of two things whose second is like the first, except for its shape or its colour."""
    first = scene.things[0]
    while True:
        attribute = pick(rng, ("shape", "colour"))
        second = replace(first, **{attribute: pick(rng, VALUES[attribute])})
        other = replace(scene, things=(first, second))
        if second != first and not is_held_out(other):
            return lay_out(other, rng)


def fixed_scene(seed, n):
    """Scene n of the priors' fixed set."""
    return training_scene(np.random.default_rng([seed, 1 << 40, n]))


# ------------------------------ captions

def all_attributes(scene):
    """Each attribute that a caption can name beside the shapes."""
    options = [(k, a) for k in range(len(scene.things)) for a in ("colour", "size", "fill")]
    return options + ["background"] + ["relation"] * bool(scene.relation)


def attributes_in_caption(scene, rng, full=0.0):
    """The attributes that a caption will name: each with probability 2/3, or all, with `full`."""
    if full and rng.random() < full:
        return set(all_attributes(scene))
    return {option for option in all_attributes(scene) if rng.random() < 2 / 3}


def phrase(*words):
    """Words after their article: "a red circle", "an orange star"."""
    return ("an " if words[0][0] in "aeiou" else "a ") + " ".join(words)


def describe(scene, named, rng, forward=0.5):
    """A caption that names the attributes `named` of a scene, in one of several wordings.

    forward: how often one with a relation begins with the left or upper thing.
    """
    def name(k):
        thing = scene.things[k]
        words = [getattr(thing, a) for a in ("size", "fill", "colour") if (k, a) in named]
        words += ["thing" if (k, "thing") in named else thing.shape]
        words += ["that says", thing.word] * ((k, "word") in named)
        return phrase(*words)

    text = name(0)
    if scene.relation:
        first, second, relation = 0, 1, scene.relation
        ordered = relation in ("left of", "above")
        chance = 0.5 if "relation" not in named else 1 - forward if ordered else forward
        if rng.random() < chance:
            first, second, relation = 1, 0, RELATIONS[relation]
        link = pick(rng, WORDINGS[relation]) if "relation" in named else "and"
        text = f"{name(first)} {link} {name(second)}"
    if "background" in named:
        wording = pick(rng, (" on a {} background", " on {}", " with a {} background"))
        text += wording.format(scene.background)
    return pick(rng, ("", "", "there is ", "a picture of ")) + text


def meaning(scene, named):
    """The meaning of a caption that names `named`: equal for captions that mean the same."""
    things = [tuple((a, getattr(t, a)) for a in VALUES if a == "shape" or (k, a) in named)
              for k, t in enumerate(scene.things)]
    relation = scene.relation if "relation" in named else None
    if relation in ("right of", "below"):
        things, relation = things[::-1], RELATIONS[relation]
    things = tuple(things if relation else sorted(things))
    return things, relation, scene.background if "background" in named else None


def altered(scene, k, **values):
    """The scene with other values of its thing k."""
    things = tuple(replace(t, **values) if j == k else t for j, t in enumerate(scene.things))
    return replace(scene, things=things)


def swapped(scene, attribute):
    """A scene whose two things have exchanged an attribute."""
    pairs = zip(scene.things, scene.things[::-1])
    things = tuple(replace(t, **{attribute: getattr(u, attribute)}) for t, u in pairs)
    return replace(scene, things=things)


def another(thing, attribute, rng):
    """A value of an attribute that a thing does not have."""
    return pick(rng, [v for v in VALUES[attribute] if v != getattr(thing, attribute)])


def near_misses(scene, named, rng, n=3):
    """n scenes that differ from this one, and from one another, in one thing that is named.

    Hard cases come often (§7, fig. 14): two things swap an attribute, half of the time their
    colours ("red circle, blue star" beside "blue circle, red star"), or change places. Only a CLIP
    that binds attributes and places to objects tells such captions apart. As often as a swap, one
    attribute of one thing changes, or the background: to see a swap, one thing is enough, so swaps
    alone don't teach CLIP to look at the second one. Scenes with a pair of HELD_OUT are left out.
    """
    things, group = scene.things, [scene]
    swaps = [a for a in VALUES if len(things) == 2 and (a == "shape" or {(0, a), (1, a)} <= named)]
    kinds = 3 * ["attribute"] + 3 * ["swap"] * bool(swaps) + 2 * ["relation"] * ("relation" in named)
    while len(group) <= n:
        kind = pick(rng, kinds)
        k = rng.integers(len(things))
        if kind == "attribute":
            own = sorted(a for (j, a) in (x for x in named if isinstance(x, tuple)) if j == k)
            kind = pick(rng, ["shape", *own, *["background"] * ("background" in named)])
        if kind == "swap":
            colours = "colour" in swaps and rng.random() < 0.5
            kind = "colour" if colours else pick(rng, swaps)
            other = swapped(scene, kind)
        elif kind == "relation":
            inverse = RELATIONS[scene.relation]
            other = replace(scene, relation=pick(rng, [inverse, inverse, *RELATIONS]))
        elif kind == "background":
            values = [v for v in BACKGROUNDS if v != scene.background]
            other = replace(scene, background=pick(rng, values))
        else:
            other = altered(scene, k, **{kind: another(things[k], kind, rng)})
        known = [meaning(s, named) for s in group]
        if not is_held_out(other) and meaning(other, named) not in known:
            group.append(lay_out(other, rng) if kind in ("size", "relation") else other)
    return group[1:]


def crossed(rng):
    """(four scenes, attributes that their captions name) of one thing: as it is, with one attribute
    changed, with another one changed, with both. Scenes with a pair of HELD_OUT are left out.

    Half of the captions that need no shape say "thing". So "large" is written alike for all shapes:
    a CLIP whose captions always named the shape wrote it the other way round for circles.
    """
    while True:
        scene = random_scene(rng, 1)
        thing, = scene.things
        pair = [str(a) for a in rng.choice(list(VALUES), 2, replace=False)]
        first, second = ({a: another(thing, a, rng)} for a in pair)
        group = [altered(scene, 0, **values) for values in ({}, first, second, first | second)]
        if not any(is_held_out(s) for s in group):
            break
    if "size" in pair:
        group = [lay_out(s, rng) for s in group]
    named = attributes_in_caption(scene, rng) | {(0, a) for a in pair}
    if "shape" not in pair and rng.random() < 0.5:
        named |= {(0, "thing")}
    return group, named


# ------------------------------ pictures

@lru_cache
def outlines():
    """Each shape's corners (n, 2) within the unit circle, y downwards."""
    def ring(n, start):
        angle = np.deg2rad(start + 360 / n * np.arange(n))
        return np.stack([np.cos(angle), np.sin(angle)], -1)

    a, w = np.deg2rad(np.arange(0, 360, 4)), 0.3  # w: half the width of the cross's arms
    heart = np.stack([16 * np.sin(a) ** 3, -13 * np.cos(a) + 5 * np.cos(2 * a) + 2 * np.cos(3 * a)
                      + np.cos(4 * a)], -1)
    cross = np.array([(w, -1), (w, -w), (1, -w), (1, w), (w, w), (w, 1),
                      (-w, 1), (-w, w), (-1, w), (-1, -w), (-w, -w), (-w, -1)])
    star = np.stack([ring(5, -90), 0.42 * ring(5, -54)], 1).reshape(10, 2)
    return {"circle": ring(90, -90), "square": ring(4, -45), "triangle": ring(3, -90), "star": star,
            "heart": (heart - (0, 2)) / 17.2, "cross": cross / 1.05}


def render(scene, side):
    """Draw a scene as a Pillow image, side × side, antialiased.

    Each pixel is the mean of a grid of some 2,048 points a side, the same at every size. So a large
    picture, averaged, is the small one, and an upsampler can find the outlines where they are.
    """
    fine = max(2, 2048 // side)  # points a pixel
    n = side * fine
    shading = 1 - abs(scene.shade) * np.linspace(0, 1, n)[::1 if scene.shade > 0 else -1]
    column = shading.reshape(side, fine).mean(1)[:, None] * BACKGROUNDS[scene.background]
    pixels = np.repeat(column.astype(np.float32)[:, None], side, 1)
    for thing in scene.things:
        draw_thing(pixels, thing, fine)
    return Image.fromarray(pixels.round().astype(np.uint8))


def draw_thing(pixels, thing, fine):
    """Draw a thing, its stripes and its word into pixels (side, side, 3), with fine² points each."""
    n, a = len(pixels) * fine, np.deg2rad(thing.tilt)
    turn = [[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]]
    middle, reach = np.array((thing.x, thing.y)), thing.radius + 0.01  # with a rim to spare
    first = np.floor((middle - reach) * len(pixels)).astype(int).clip(0)  # a box of whole pixels
    last = np.ceil((middle + reach) * len(pixels)).astype(int).clip(max=len(pixels))
    size = tuple(((last - first) * fine).tolist())

    def cover(*outlines):
        """The points within outlines (k, 2) in units of the radius, as a mask."""
        mask = Image.new("L", size)
        for corners in outlines:
            points = ((corners @ turn) * thing.radius + middle) * n - first * fine
            ImageDraw.Draw(mask).polygon(list(map(tuple, points.astype(int).tolist())), 255)
        return mask

    def share(mask):
        """The share of each pixel that a mask covers."""
        return np.asarray(mask.reduce(fine), np.float32)[..., None] / 255

    box = pixels[first[1]:last[1], first[0]:last[0]]
    colour, background, bars = np.array(COLOURS[thing.colour]), box.copy(), None
    inside = cover(outlines()[thing.shape])
    if thing.fill == "striped":  # bars, mixed with 35% white, cut out by the outline
        bars = cover(*(np.array([(-1, top), (1, top), (1, top + 0.35), (-1, top + 0.35)])
                       for top in np.arange(-0.9, 1, 0.7)))
        bars = ImageChops.darker(bars, inside)
    if thing.word:  # black, on the thing and beside it
        word = word_mask(thing, n)
        here = word.crop(tuple((np.concatenate([first, last]) * fine).tolist()))
        inside, bars = (mask and ImageChops.subtract(mask, here) for mask in (inside, bars))
        pixels += share(word) * (25 - pixels)
    box += share(inside) * (colour - background)
    if bars:
        box += share(bars) * 0.35 * (255 - colour)


def word_mask(thing, n):
    """A thing's word across it, n × n points, large enough to be read in 64×64 pixels."""
    longest, bold = ImageFont.load_default(100).getlength("triangle"), n // 400
    font = ImageFont.load_default(0.6 * n * 100 / longest)
    half = font.getlength(thing.word) / 2 + 2 * bold
    place, mask = (min(max(thing.x * n, half), n - half), thing.y * n), Image.new("L", (n, n))
    ImageDraw.Draw(mask).text(place, thing.word, 255, font, "mm", stroke_width=bold)
    return mask


def fixed_picture(seed, number, side):
    """A scene of the fixed set as a Pillow image, side × side."""
    return render(fixed_scene(seed, number), side)


# ------------------------------ batches

def corpus(n=2000, seed=0):
    """Captions of the world, for learning BPE merges."""
    rng = np.random.default_rng(seed)
    scenes = [random_scene(rng, held_out=k % 10 == 0) for k in range(n)]
    return [describe(s, attributes_in_caption(s, rng), rng) for s in scenes]


class ShapeBatches(Dataset):
    """Rows of batch k of a stage's training: those of process `rank` of `world`.

    clip, decoder: images (b, 3, 64, 64) uint8 and captions. For clip each scene stands beside three
    near misses (at first `crossed`), and no caption comes twice: else a true pair would count as
    false. Priors: numbers of fixed scenes, and captions. Upsamplers: (high, low) crops, four of a
    scene, by upsample.training_crops. split: "train" or "validation".
    """

    def __init__(self, stage, batch_size, seed, config, rank=0, world=1, split="train", crops=None):
        self.stage, self.batch_size, self.seed, self.config = stage, batch_size, seed, config
        self.rows = range(*(batch_size // world * n for n in (rank, rank + 1)))
        self.held_out, self.crops = split != "train", crops
        self.fixed_scenes = FIXED_SCENES

    def rng(self, k, n):
        """The random numbers of row n of batch k."""
        return np.random.default_rng([self.seed, k, n, 2 * self.held_out])

    def __getitem__(self, k):
        if self.stage.startswith("upsample"):
            return self.upsampler_rows(k)
        if self.stage in ("prior", "ar-prior"):
            return self.prior_rows(k)
        return self.captioned_rows(k)

    def upsampler_rows(self, k):
        """(high, low) crops, uint8, the first row's scene being shared with up to three others."""
        first = self.rows.start // 4 * 4
        pairs = []
        for n in range(first, self.rows.stop, 4):
            rng = self.rng(k, n)
            picture = render(random_scene(rng), self.config.image_size)
            pairs.append(self.crops(picture, self.config, rng, 4))
        own = slice(self.rows.start - first, self.rows.stop - first)
        return tuple(torch.cat(part)[own] for part in zip(*pairs))

    def prior_rows(self, k):
        """Numbers of fixed scenes (b,), the last 1 in 128 being held out, and their captions."""
        kept = self.fixed_scenes - max(1, self.fixed_scenes // 128)
        choice = (kept, self.fixed_scenes) if self.held_out else (0, kept)
        numbers, captions = [], []
        for n in self.rows:
            rng = self.rng(k, n)
            numbers.append(int(rng.integers(*choice)))
            scene = fixed_scene(self.seed, numbers[-1])
            captions.append(describe(scene, attributes_in_caption(scene, rng, FULL), rng))
        return torch.tensor(numbers), captions

    def captioned_rows(self, k):
        """Images (b, 3, 64, 64) uint8 and captions."""
        scenes, captions = [], []
        clip = self.stage == "clip"
        # clip draws all rows, also those of other processes, to have no caption twice
        for n in range(0, self.batch_size, 4) if clip else self.rows:
            rng = self.rng(k, n)
            new = []
            while not new or clip and len({*new} - {*captions}) < 4:
                group, named = self.draw_group(k, rng)
                new = [describe(scene, named, rng, FORWARD if clip else 0.5) for scene in group]
            scenes += group
            captions += new
        own = slice(self.rows.start, self.rows.stop) if clip else slice(None)
        return torch.stack([to_tensor(render(s, 64)) for s in scenes[own]]), captions[own]

    def draw_group(self, k, rng):
        """(scenes, attributes that their captions name) of batch k: for clip a group of four."""
        if self.stage == "clip" and not self.held_out:
            if k < SINGLES and self.batch_size <= 8192 or rng.random() < CROSSED:
                return crossed(rng)
        scene = training_scene(rng)
        if self.stage != "clip":
            return [scene], attributes_in_caption(scene, rng, FULL)
        if scene.relation and rng.random() < ALIKE:
            scene = almost_alike(scene, rng)
        named = attributes_in_caption(scene, rng)
        if scene.relation and rng.random() < 0.7:  # more to bind
            named |= {(0, "colour"), (1, "colour"), "relation"}
        return [scene, *near_misses(scene, named, rng)], named


class FixedScenes(Dataset):
    """Pictures (b, 3, 64, 64) uint8 of the priors' fixed scenes, 256 at once, for embedding."""

    def __init__(self, seed):
        self.seed, self.fixed_scenes = seed, FIXED_SCENES

    def __len__(self):
        return -(-self.fixed_scenes // 256)

    def __getitem__(self, k):
        numbers = range(k * 256, min((k + 1) * 256, self.fixed_scenes))
        return torch.stack([to_tensor(render(fixed_scene(self.seed, n), 64)) for n in numbers])
