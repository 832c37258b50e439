"""Train every stage of unCLIP, on a built-in world of captioned shapes or a folder of your pictures (appendix C).

What a stage minimizes stands in its own file. Here stand the data, the recipes and one loop for all: AdamW at table 3's
settings, a running average of the weights (EMA) beside it, which is what is kept. Where the paper is silent, ours: the world
of shapes, near misses in CLIP's batches, a learning rate that warms up and falls along half a cosine, an average that is
quicker at first, priors that train on embeddings computed once.

In:   a stage's name, or `all` for the six in order: clip, prior, ar-prior, decoder, upsample-256, upsample-1024
Out:  in --out (default runs/<preset>), per stage: NAME.pt (the checkpoint, EMA weights under "model"),
      NAME.csv and NAME-loss.png (the loss, in training and held out), NAME-samples.png (what the network makes at present)

The world of shapes needs no download: row n of step k draws its scene, its caption, its noise and its timestep from
random numbers seeded by (--seed, k, n) alone, so `--resume` is exact: a run that was stopped goes on as if it never had
been. Nor do they depend on how many processes share a batch, or in how many pieces it goes through the network.

    python train.py all --preset shapes              # everything
    python train.py all --preset laptop --dry-run    # what that would take
    python train.py all --data photos --clip ViT-B-32.pt --preset laptop
    python train.py decoder --resume                 # one stage, continued after a stop
    torchrun --nproc-per-node 4 train.py decoder     # four GPUs, the batch shared
"""

import argparse
import contextlib
import copy
import csv
import hashlib
import io
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import zlib
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.distributed.nn.functional import all_gather
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import clip_embed
import decoder
import prior
import upsample
from clip_embed import UserError, encode_captions, one_line_errors, pick_device, preprocess_tensor
from sample import generators, grid

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


def phrase(*words):
    """Words with their article: "a red circle", "an orange star"."""
    return ("an " if words[0][0] in "aeiou" else "a ") + " ".join(words)


def describe(scene, said, rng):
    """A caption that says `said` of a scene, in one of several wordings."""
    def name(k):
        thing = scene.things[k]
        words = [getattr(thing, a) for a in ("size", "fill", "colour") if (k, a) in said] + [thing.shape]
        words += ["that says", thing.word] if (k, "word") in said else []
        return phrase(*words)

    text = name(0)
    if scene.relation:
        first, second, relation = 0, 1, scene.relation
        if rng.random() < 0.5:
            first, second, relation = 1, 0, RELATIONS[relation]
        link = pick(rng, WORDINGS[relation]) if "relation" in said else "and"
        text = f"{name(first)} {link} {name(second)}"
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


def swapped(scene, attribute):
    """A scene whose two things have exchanged an attribute."""
    return replace(scene, things=tuple(replace(t, **{attribute: getattr(u, attribute)})
                                       for t, u in zip(scene.things, scene.things[::-1])))


def near_misses(scene, said, rng, n=3):
    """n scenes that the same kind of caption tells from this one, and from one another, by one thing it says (§7, fig. 14).

    What is hardest to learn comes oftenest. Where it can be, two things swap an attribute, half of the time their colours
    ("red circle, blue star" beside "blue circle, red star"), or stand otherwise, oftenest the other way round: only a CLIP that
    binds attributes and places to objects can tell those captions apart. Else one attribute changes.
    """
    things, group = scene.things, [scene]
    swaps = [a for a in VALUES if len(things) == 2 and (a == "shape" or {(0, a), (1, a)} <= said)]
    while len(group) <= n:
        a = pick(rng, ["attribute"] + 3 * ["swap"] * bool(swaps) + 2 * ["relation"] * ("relation" in said))
        k = rng.integers(len(things))
        if a == "attribute":
            a = pick(rng, ["shape", *sorted(s[1] for s in said if s[0] == k), *["background"] * ("background" in said)])
        if a == "swap":
            a = "colour" if "colour" in swaps and rng.random() < 0.5 else pick(rng, swaps)
            other = swapped(scene, a)
        elif a == "relation":
            other = replace(scene, relation=pick(rng, [RELATIONS[scene.relation]] * 2 + [*RELATIONS]))
        elif a == "background":
            other = replace(scene, background=pick(rng, [v for v in BACKGROUNDS if v != scene.background]))
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


@lru_cache
def outlines():
    """Each shape's corners (n, 2) within the unit circle, y downwards."""
    turn = lambda n, start=-90: np.deg2rad(start + 360 / n * np.arange(n))
    ring = lambda angle: np.stack([np.cos(angle), np.sin(angle)], -1)
    a, w = turn(90, 0), 0.3  # w: half the width of the cross's arms
    heart = np.stack([16 * np.sin(a) ** 3, -13 * np.cos(a) + 5 * np.cos(2 * a) + 2 * np.cos(3 * a) + np.cos(4 * a)], -1)
    cross = np.array([(w, -1), (w, -w), (1, -w), (1, w), (w, w), (w, 1),
                      (-w, 1), (-w, w), (-1, w), (-1, -w), (-w, -w), (-w, -1)])
    return {"circle": ring(turn(90)), "square": ring(turn(4, -45)), "triangle": ring(turn(3)),
            "star": np.stack([ring(turn(5)), 0.42 * ring(turn(5, -54))], 1).reshape(10, 2),
            "heart": (heart - (0, 2)) / 17.2, "cross": cross / 1.05}


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
        shape = place(outlines()[thing.shape])
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


# ----------------------------------------------------------------------------- a folder of captioned pictures

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
SMALLEST, LONGEST = 64, 10_000  # pixels a side, characters of a caption: what is outside is left out
BUFFER = 10_000                 # how many pictures, in the order of their shards, are shuffled with one another


class TooFew(UserError):
    """These pictures are too few or too small for a stage: `all` goes on without it."""


@dataclass
class Pictures:
    """What a folder holds, in any layout: picture k is some bytes of a file; captions first[k] … first[k + 1] − 1 are its."""
    root: str
    names: tuple
    places: tuple       # (file, offset, length) of each picture's bytes
    captions: list
    first: np.ndarray   # (n + 1,)
    sides: np.ndarray   # (n,) pixels of the shorter side
    mark: str           # sixteen hex digits that name this set: names, captions and the pictures' bytes

    def picture(self, k, side):
        """Picture k, RGB, side × side: its shorter side scaled, its middle cut out. Raises UserError."""
        picture = clip_embed.open_picture(self.names[k], read_part(self.root, *self.places[k]), side)
        return ImageOps.fit(picture, (side, side), Image.Resampling.BICUBIC)

    def tensors(self, numbers, side):
        """Pictures as uint8 (B, 3, side, side)."""
        return torch.stack([to_tensor(self.picture(k, side)) for k in numbers])

    def rows(self, split, side=0):
        """Numbers of the pictures of a split with `side` pixels or more: "validation" is the 3% whose names hash lowest."""
        large = np.flatnonzero(self.sides >= side)
        large = large[np.argsort([zlib.crc32(self.names[k].encode("utf-8", "surrogateescape")) for k in large], kind="stable")]
        held_out = math.ceil(0.03 * len(large)) if len(large) > 1 else 0  # a single picture is in both
        return np.sort(large[held_out:] if split == "train" else large[:max(1, held_out)])


def read_part(root, file, offset, size):
    """`size` bytes of a file, from `offset` on."""
    with open(os.path.join(root, file), "rb", buffering=0) as file:
        file.seek(offset)
        return file.read(size)


def leads_out(path):
    """Whether a relative path, of any system, names something above where it starts."""
    parts = path.replace("\\", "/").split("/")
    return ".." in parts or not parts[0] or "\0" in path


def read_shard(path):
    """{name: (offset, length)} of the files in a .tar, from the headers alone. Raises UserError.

    A header has 512 bytes, numbers in octal: the name at 0, what stands before it at 345; the length at 124; the sum of all
    bytes, its own as blanks, at 148; the kind at 156. The file follows, filled up to a multiple of 512. A longer name comes
    before, as a file of kind L (GNU) or in one of kind x (POSIX). An empty header ends the archive.
    """
    members, long, at, end = {}, None, 0, os.path.getsize(path)
    with open(path, "rb") as file:
        while (header := file.read(512)) != bytes(512):
            try:
                size, total = int(header[124:136].strip(b" \0") or b"0", 8), int(header[148:156].strip(b" \0"), 8)
            except ValueError:
                size = total = -1
            added = zlib.adler32(header[:148] + b" " * 8 + header[156:]) & 0xFFFF  # one more than the sum, fast
            if size < 0 or added != (total + 1) % 65521 or at + 512 + size > end:
                raise UserError(f"{path}: damaged or truncated: no whole file begins at byte {at} of {end}")
            kind, name = header[156:157], header[:100].split(b"\0", 1)[0]
            if kind in b"Lx":
                name = file.read(min(size, 1 << 16))
                record = re.search(rb"(?:^|\n)\d+ path=([^\n]*)", name)
                long = name.rstrip(b"\0") if kind == b"L" else record and record[1]
            elif kind in b"0\0":
                if header[345] and header[257:263] == b"ustar\0":
                    name = header[345:500].split(b"\0", 1)[0] + b"/" + name
                name, long = (long or name).decode("utf-8", "surrogateescape").removeprefix("./"), None
                if leads_out(name):
                    raise UserError(f"{path}: its member {name!r} leads out of the folder")
                members[name] = at + 512, size
            at += 512 + -(-size // 512) * 512
            file.seek(at)
    return members


def read_metadata(path):
    """(line number, file_name, text) of each line of a metadata.jsonl or metadata.csv. Raises UserError."""
    table, number, columns = path.suffix == ".csv", 0, None
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        lines = csv.reader(file, strict=True) if table else file
        try:
            csv.field_size_limit(1 << 30)
            for number, line in enumerate(lines, 1):
                if "".join(line).strip():
                    columns, title = columns or line, table and not columns
                    pairs = list(zip(columns, line)) if table else json.loads(line, object_pairs_hook=list)
                    row = dict(pairs)
                    if len(row) < len(pairs) or table and len(line) != len(columns):
                        raise ValueError("two columns have one name" if len(row) < len(pairs) else
                                         f"{len(line)} fields for {len(columns)} columns")
                    found = lines.line_num if table else number, row["file_name"], row["text"]
                    if not title:
                        yield found
        except (ValueError, csv.Error, RecursionError, KeyError, TypeError) as error:
            reason = {KeyError: f"no column {error}", TypeError: "no object"}.get(type(error), error)
            raise UserError(f"{path}, line {lines.line_num if table else number}: {reason}; expected the columns file_name and "
                            "text, each once") from None


def list_files(root):
    """{name: ((file, offset, length), time)} of all that lies in a folder, its subfolders and .tar shards. Raises UserError."""
    found, folders = {}, [""]
    while folders:
        folder = folders.pop()
        for entry in sorted(os.scandir(os.path.join(root, folder)), key=lambda entry: entry.name):
            name = folder + entry.name
            if entry.is_symlink() and not Path(os.path.realpath(entry.path)).is_relative_to(root):
                raise UserError(f"{name!r} is a link that leads out of {root}")
            if entry.is_dir(follow_symlinks=False) and entry.name[0] != ".":
                folders.append(name + "/")
            elif entry.is_file() and entry.name[0] != ".":
                size, changed = entry.stat().st_size, entry.stat().st_mtime_ns
                found[name] = (name, 0, size), changed
                for part, place in read_shard(entry.path).items() if name.endswith(".tar") else ():
                    found[f"{name}/{part}"] = (name, *place), changed
    return found


def list_pictures(root):
    """The captioned pictures of a folder, unopened: ([(name, place, time, captions)], [what is left out, and why]).

    By looking, in subfolders too: pictures with a .txt of the same name, a caption a line; metadata.jsonl or metadata.csv with
    the columns file_name and text, a caption a line; .tar shards of pictures and their .txt. Raises UserError.
    """
    found, told, wrong, inside = list_files(root), set(), [], lambda path: Path(os.path.realpath(path)).is_relative_to(root)
    pictures = {name: (name, *place, []) for name, place in found.items() if name.lower().endswith(SUFFIXES)}

    def said():
        """(picture, caption, where that stands)"""
        for name in pictures:
            text = os.path.splitext(name)[0] + ".txt"
            if text in found:
                file, offset, size = found[text][0]
                lines = read_part(root, file, offset, min(size, 1 << 20)).decode("utf-8-sig", "surrogateescape").splitlines()
                yield from ((name, line, text) for line in [*filter(str.strip, lines)] or [""])
        for name in found:
            if name.rpartition("/")[2] in ("metadata.jsonl", "metadata.csv") and not found[name][0][1]:  # not in a shard
                for line, file_name, caption in read_metadata(Path(root, name)):
                    file_name = str(file_name).encode("utf-8", "replace").decode()
                    picture = "".join(name.rpartition("/")[:2]) + file_name.removeprefix("./")
                    if picture not in found and (leads_out(file_name) or not inside(os.path.join(root, picture))):
                        raise UserError(f"{Path(root, name)}, line {line}: file_name {file_name!r} leads out of the folder")
                    yield picture, caption, f"{name}, line {line}, {picture}"

    for name, caption, where in said():
        caption = " ".join(caption.split()) if isinstance(caption, str) else ""
        reason = ("no such picture" if name not in pictures else "its caption is empty" if not caption else
                  "its caption is not UTF-8" if re.search("[\ud800-\udfff]", caption) else  # what Python makes of such bytes
                  f"its caption has {len(caption):,} characters, more than {LONGEST:,}" if len(caption) > LONGEST else "")
        if reason:
            wrong.append(f"{where}: {reason}")
            told.add(name)
        else:
            pictures[name][3].append(caption)
    wrong += [f"{name}: has no caption" for name, *_, captions in pictures.values() if not captions and name not in told]
    known = (*SUFFIXES, ".txt", ".json", ".tar", "metadata.jsonl", "metadata.csv")
    wrong += [f"{name}: is none of {', '.join(SUFFIXES)}" for name in found if not name.lower().endswith(known)]
    return [row for row in pictures.values() if row[3]], wrong


def check(root, rows):
    """[(shorter side, CRC-32 of the bytes, what is wrong)] of pictures, each decoded for that."""
    return [check_one(root, *row[:2]) for row in rows]


def check_one(root, name, place):
    """check's answer for one picture."""
    try:
        if not 0 < place[2] <= 1 << 28:
            raise UserError(f"{name}: has {place[2]:,} bytes")
        data = read_part(root, *place)
        clip_embed.open_picture(name, data, SMALLEST)
        width, height = Image.open(io.BytesIO(data), formats=clip_embed.FORMATS).size
        small = f"{name}: has {width}×{height} pixels, expected at least {SMALLEST} a side"
        return min(width, height), zlib.crc32(data), small * (min(width, height) < SMALLEST)
    except (OSError, UserError) as error:
        return 0, 0, str(error)


def gather(folder, out, workers):
    """The Pictures of a folder that can be trained on: listed, each decoded once (remembered in `out`), and summed up on stderr.

    What is left out is listed in out/skipped.txt. Raises UserError, also where nothing is left.
    """
    root, name_of = os.path.realpath(folder), lambda content: hashlib.sha256(repr(content).encode()).hexdigest()[:16]
    if not os.path.isdir(root):
        raise UserError(f"--data {folder}: no such folder")
    rows, wrong = list_pictures(root)
    out.mkdir(parents=True, exist_ok=True)
    cache = out / f"checked-{name_of([row[:3] for row in rows])}.pt"
    if not cache.exists():
        loader = DataLoader(rows, 64, collate_fn=partial(check, root), num_workers=workers) if rows else []
        save_atomically([*chain.from_iterable(tqdm(loader, desc="checking pictures", unit="batch"))], cache)
    checks = torch.load(cache, weights_only=True)
    wrong = [re.sub(r"[\x00-\x1f\x7f]", "?", line) for line in [reason for *_, reason in checks if reason] + wrong]
    (out / "skipped.txt").write_text("".join(line + "\n" for line in wrong), "utf-8", "backslashreplace")
    if wrong:
        print(f"{len(wrong):,} left out, listed in {out / 'skipped.txt'}:", *wrong[:10], sep="\n  ", file=sys.stderr)
    good = [(*row, *seen[:2]) for row, seen in zip(rows, checks) if not seen[2]]
    if not good:
        raise UserError(f"--data {folder}: no picture with a caption is there{' that can be used' if wrong else ''}; expected "
                        "pictures with a .txt of the same name, metadata.jsonl or metadata.csv, or .tar shards")
    names, places, _, captions, sides, sums = zip(*good)
    sides, first = np.array(sides), np.cumsum([0, *map(len, captions)])
    print(f"{folder}: {len(names):,} pictures with {first[-1]:,} captions, shorter sides {sides.min():,} to {sides.max():,} "
          "pixels, " + ", ".join(f"{(sides >= n).sum():,} of {n} or more" for n in (256, 1024)), file=sys.stderr)
    return Pictures(root, names, places, [*chain(*captions)], first, sides, name_of((names, captions, sums)))


# ----------------------------------------------------------------------------- batches

class Batches(Dataset):
    """Rows of batch k of a stage's training, those of process `rank` of `world`; split is "train" or "validation".

    Row n is drawn from (seed, k, n) alone: the same in any process, any worker, any order. clip, decoder: images
    (b, 3, 64, 64) uint8 and captions, of two things three times in four, since these are harder; for clip each scene stands beside
    three near misses, and no caption comes twice (a duplicate would be a false negative); a share recipe.words of the scenes has
    words written across. priors: numbers of scenes in the fixed set whose z_i are computed beforehand (z_i: their pictures, in
    order), and captions. upsamplers: (high, low) crops, four of a scene.
    """

    def __init__(self, stage, recipe, seed, config, rank=0, world=1, split="train"):
        self.stage, self.batch_size, self.seed, self.config, self.fixed_scenes = stage, recipe.batch_size, seed, config, FIXED_SCENES
        self.rows, self.held_out = range(*(recipe.batch_size // world * n for n in (rank, rank + 1))), split != "train"
        self.words = recipe.words

    def __getitem__(self, k):
        draw = lambda n: np.random.default_rng([self.seed, k, n, 2 * self.held_out])
        if self.stage.startswith("upsample"):
            first = self.rows.start // 4 * 4
            crops = [upsample.training_crops(render(random_scene(rng), self.config.image_size), self.config, rng, 4)
                     for rng in map(draw, range(first, self.rows.stop, 4))]
            return tuple(torch.cat(part)[self.rows.start - first:self.rows.stop - first] for part in zip(*crops))
        if self.stage == "z_i":
            numbers = range(k * self.batch_size, min((k + 1) * self.batch_size, self.fixed_scenes))
            return torch.stack([to_tensor(render(fixed_scene(self.seed, n), 64)) for n in numbers])
        if self.stage in ("prior", "ar-prior"):
            kept = self.fixed_scenes - max(1, self.fixed_scenes // 128)  # the last scenes of the set are held out
            rngs = [draw(n) for n in self.rows]
            chosen = [int(rng.integers(*((kept, self.fixed_scenes) if self.held_out else (0, kept)))) for rng in rngs]
            scenes = [fixed_scene(self.seed, n) for n in chosen]
            return torch.tensor(chosen), [describe(s, what_to_say(s, rng), rng) for s, rng in zip(scenes, rngs)]
        clip, scenes, captions, told = self.stage == "clip", [], [], set()
        for n in range(0, self.batch_size, 4) if clip else self.rows:  # clip: all captions must be known to have none twice
            rng, words = draw(n), []
            while not words or clip and len({*words} - told) < 4:
                worded = self.words and rng.random() < self.words
                scene = random_scene(rng, 1 if worded else 2 if rng.random() < 0.5 else None)
                said = what_to_say(scene, rng)
                if clip and scene.relation and rng.random() < 0.7:  # more to bind
                    said |= {(0, "colour"), (1, "colour"), "relation"}
                group = [scene, *near_misses(scene, said, rng)] if clip else [scene]
                group, said = write_words(group, said, rng) if worded else (group, said)
                words = [describe(s, said, rng) for s in group]
            scenes, captions, told = scenes + group, captions + words, told | {*words}
        own = slice(self.rows.start, self.rows.stop) if clip else slice(None)
        return torch.stack([to_tensor(render(s, 64)) for s in scenes[own]]), captions[own]


class FolderBatches(Dataset):
    """Batches, but of Pictures: rows of batch k, those of process `rank` of `world`; row n depends on (seed, k, n) alone.

    Rows follow one endless order: each epoch has every picture of the split once, files (pictures, or shards) in random order,
    then shuffled within BUFFER places, so that shards are read nearly as they lie on the disk. A caption is drawn each time.
    clip: images (b, 3, H, W) uint8 of the config's size and captions, in no batch a picture or a caption twice (held-out ones
    are as large as that allows). priors: numbers of pictures, and of captions. decoder: images, numbers of captions, and of
    pictures. upsamplers: (high, low) crops, one of each picture.
    """

    def __init__(self, data, stage, recipe, seed, config, rank=0, world=1, split="train"):
        self.data, self.stage, self.seed, self.config, B = data, stage, seed, config, recipe.batch_size
        self.side = getattr(config, "image_size", 0)
        self.rows = data.rows(split, self.side if stage.startswith("upsample") else 0)
        self.files = np.unique([data.places[k][0] for k in self.rows], return_inverse=True)[1]
        self.epoch, self.order = None, None
        if stage == "clip":
            captions = {data.captions[c] for k in self.rows for c in range(*data.first[k:k + 2])}
            most = min(len(self.rows), len(captions))
            if most < B and split == "train":
                raise UserError(f"--batch-size {B}: clip's batches hold nothing twice, and there are {len(self.rows):,} pictures "
                                f"with {len(captions):,} different captions to train on: at most {most}")
            B = min(B, max(1, most // world) * world)
        self.batch_size, self.own = B, range(B * rank // world, B * (rank + 1) // world)

    def where(self, position):
        """Which of `rows` stands at a position of the endless order."""
        epoch, within = divmod(position, len(self.rows))
        if epoch != self.epoch:
            rng = np.random.default_rng([self.seed, 1 << 42, epoch])
            order = np.argsort(rng.permutation(len(self.rows))[self.files], kind="stable")
            self.epoch, self.order = epoch, order[np.argsort(np.arange(len(order)) + rng.uniform(0, BUFFER, len(order)))]
        return self.order[within]

    def __getitem__(self, k):
        data, rows, clip, taken, drawn = self.data, self.rows, self.stage == "clip", set(), []
        for n in range(self.batch_size) if clip else self.own:  # clip: what the other processes have is taken, too
            rng, start = np.random.default_rng([self.seed, k, n]), self.where(k * self.batch_size + n)
            for number in (int(rows[(start + j) % len(rows)]) for j in range(len(rows))):
                caption = int(rng.integers(*data.first[number:number + 2]))
                if not clip or not taken & {number, data.captions[caption]}:
                    break
            taken |= {number, data.captions[caption]}
            drawn += [(number, caption, rng)] if n in self.own else []
        numbers, captions, _ = zip(*drawn)
        if self.stage.startswith("upsample"):
            crops = [upsample.training_crops(data.picture(number, self.side), self.config, rng, 1) for number, _, rng in drawn]
            return tuple(map(torch.cat, zip(*crops)))
        if clip:
            return data.tensors(numbers, self.side), [data.captions[caption] for caption in captions]
        told = torch.tensor(captions), torch.tensor(numbers)
        return (data.tensors(numbers, self.side), *told) if self.stage == "decoder" else told[::-1]


FIXED_SCENES = 65536  # the priors' set: they see embeddings, which can be kept, and fresh captions of them


def fixed_scene(seed, n):
    """Scene n of the priors' fixed set."""
    return random_scene(np.random.default_rng([seed, 1 << 40, n]))


# ----------------------------------------------------------------------------- what each stage trains

@dataclass
class Recipe:
    """How a stage is trained (appendix C, table 3): AdamW with β1 = 0.9."""
    batch_size: int  # of all processes together
    steps: int
    learning_rate: float
    weight_decay: float = 0.0
    beta2: float = 0.999
    eps: float = 1e-8
    ema_decay: float = 0.9999
    warmup: int = 500
    at_once: int = 1 << 20  # rows that go through the network together: a larger batch's gradients are added up in pieces
    recompute: bool = False  # clip: keep only each block's input for the backward pass, which computes the rest again
    only: tuple = ()  # parts of parameters' names: train these alone, from --init; the rest stays what it was
    words: float = 0.0  # share of the scenes that have a word written across them (clip and decoder)
    near: tuple = (0.0, 0.0)  # clip compares scenes with their near misses alone from this share of the steps to that one (ours)
    scale: float = 100.0  # clip's cosines are multiplied by no more than this in its loss: see clip_loss


RECIPES = {
    "shapes": {"clip": Recipe(64, 16000, 1e-3, 0.1, 0.98, 1e-6, 0.998, near=(0.5, 0.75), scale=15.0),
               "prior": Recipe(128, 2400, 5e-4, 0.06, 0.96, 1e-6, 0.999),
               "ar-prior": Recipe(64, 4000, 1e-3, 0.04, 0.91, 1e-10, 0.999, 100),
               "decoder": Recipe(16, 34000, 6e-4, ema_decay=0.999),
               "upsample-256": Recipe(16, 4500, 5e-4, ema_decay=0.999),
               "upsample-1024": Recipe(16, 1200, 5e-4, ema_decay=0.999)},
    "laptop": {"clip": Recipe(256, 20000, 5e-4, 0.1, 0.98, 1e-6, 0.999, 1000, recompute=True),  # whole: each row meets all others
               "prior": Recipe(256, 100000, 1.1e-4, 0.06, 0.96, 1e-6, at_once=128),
               "ar-prior": Recipe(256, 100000, 1.6e-4, 0.04, 0.91, 1e-10, 0.999, at_once=16),
               "decoder": Recipe(32, 200000, 1.2e-4, at_once=8),
               "upsample-256": Recipe(16, 100000, 1.2e-4, at_once=8),
               "upsample-1024": Recipe(8, 100000, 1e-4, at_once=2)},
    "paper": {"clip": Recipe(32768, 400000, 3e-4, 0.2, 0.98, 1e-6, warmup=2000),  # CLIP's own batch; the paper adds SAM
              "prior": Recipe(4096, 600000, 1.1e-4, 0.06, 0.96, 1e-6),
              "ar-prior": Recipe(4096, 1000000, 1.6e-4, 0.04, 0.91, 1e-10, 0.999),
              "decoder": Recipe(2048, 800000, 1.2e-4),
              "upsample-256": Recipe(1024, 1000000, 1.2e-4),
              "upsample-1024": Recipe(512, 1000000, 1e-4)},
}


def clip_loss(model, batch, context):
    """The contrastive loss of a batch of (images, captions), each row against all rows of all processes (§2).

    For a while, ours, against its near misses alone (Recipe.near). Once attributes are known, what is where, and which colour
    goes with which shape, is all that is left to learn, but small networks on small batches never do: its gradients drown in
    the noise of all the others'. By themselves they begin to after a thousand steps.

    And, ours, the temperature's inverse stays under Recipe.scale. Where it may grow to the 100 of the CLIP paper, a small world's
    CLIP tells captions apart by hairs: 6 directions of 128 held nearly all of z_i's variance, and what colour stands where lay in
    others a thousand times fainter, which the squared errors of prior and decoder do not see.
    """
    images, captions = batch
    text, _ = encode_captions(model, context["tokenizer"], captions)
    z_i = model.encode_image(preprocess_tensor(images, model.config.image_size))
    gather = lambda z: torch.cat(all_gather(z)) if dist.is_initialized() else z  # gradients find their way back
    group = 4 if context["alone"] else None  # a scene and its three near misses
    return clip_embed.contrastive_loss(gather(z_i), gather(text["z_t"]), model.logit_scale, group, context["scale"])


def clip_picture(model, batch, context):
    """Eight pictures against their eight captions: each picture, then its cosines as shades of grey, from 0 to 1."""
    images, captions = batch[0][:8], batch[1][:8]
    z_t = encode_captions(model, context["tokenizer"], captions)[0]["z_t"]
    cosine = (model.encode_image(preprocess_tensor(images, model.config.image_size)) @ z_t.T).clamp(0, 1)
    shades = (2 * cosine - 1)[..., None, None, None].expand(-1, -1, *images.shape[1:])  # (n, n, 3, H, W)
    return grid([*torch.cat([images[:, None], shades], 1).flatten(0, 1)], 1 + len(images))


@torch.no_grad()
def read(captions, context):
    """What the frozen CLIP says of captions, or said of those with these numbers (embed): (text, null)."""
    if "texts" in context:
        texts, device = context["texts"], context["device"]
        captions = torch.cat([captions, torch.tensor([len(texts["z_t"]) - 1])])  # the last of all is the empty one
        begin, end = texts["ends"][captions], texts["ends"][captions + 1]
        place = torch.arange(int((end - begin).max()))
        mask = place < (end - begin)[:, None]  # (B, L)
        place = (begin[:, None] + place).where(mask, 0)
        text = {"tokens": texts["tokens"][place], "states": texts["states"][place], "z_t": texts["z_t"][captions], "mask": mask}
        text = {k: v.to(device, torch.float32 if v.is_floating_point() else None) for k, v in text.items()}
        return {k: v[:-1] for k, v in text.items()}, {k: v[-1:] for k, v in text.items()}
    with torch.autocast(context["device"].type, enabled=False):
        return encode_captions(context["clip"], context["tokenizer"], captions)


@torch.no_grad()
def look(images, context):
    """What the frozen CLIP says of images in [-1, 1]: z_i."""
    with torch.autocast(context["device"].type, enabled=False):
        return context["clip"].encode_image(preprocess_tensor(images, context["clip"].config.image_size))


def captioned(context, count):
    """z_i and freshly drawn captions, read, of `count` times 256 pictures: for what is measured and not trained."""
    batches = context["batches"]("prior", Recipe(256, 0, 0), context["seed"], None)
    for numbers, captions in (batches[(1 << 41) + k] for k in range(count)):
        yield context["z_i"][numbers].to(context["device"]), read(captions, context)[0]


def prior_loss(model, batch, context, loss=prior.prior_loss):
    """A prior's loss of a batch of (numbers of pictures, captions)."""
    return loss(model, context["z_i"][batch[0]].to(context["device"]), *read(batch[1], context))


def prior_picture(model, batch, context, sample=prior.sample):
    """Eight of the pictures captioned, and under each those of the fixed set nearest to three z_i drawn for its caption."""
    numbers, captions = batch[0][:8].tolist(), batch[1][:8]
    rows, known = [numbers], context["z_i"][:FIXED_SCENES].to(context["device"])
    for n in range(3):
        z_i = sample(model, *read(captions, context), generators("prior", 8 * n, range(len(captions))))
        rows.append((z_i @ known.T).argmax(1).tolist())
    pictures = [to_tensor(context["show"](n, 64)).float() / 127.5 - 1 for row in rows for n in row]
    return grid(pictures, len(numbers))


def decoder_loss(model, batch, context):
    """The decoder's loss of a batch of (images, captions), given what --given says; alone, a caption is dropped as in GLIDE, 20%."""
    (text, null), dropped = read(batch[1], context), {"drop_z_i": 1, "drop_caption": 0.2} if context["given"] == "caption" else {}
    return decoder.decoder_loss(model, batch[0], seen(batch, text, context), text, null, **dropped)


def seen(batch, text, context):
    """What stands for z_i beside a batch's captions: z_t with --given z_t; z_i of a folder's pictures is known by their numbers."""
    if context["given"] == "z_t":
        return text["z_t"]
    return context["z_i"][batch[2]].to(context["device"]) if len(batch) > 2 else look(batch[0], context)


def decoder_picture(model, batch, context):
    """Eight pictures above what the decoder makes of their z_i, or what --given says, and captions."""
    batch = [part[:8] for part in batch]
    images, (text, null) = batch[0], read(batch[1], context)
    z_i = seen(batch, text, context) * (context["given"] != "caption")
    made = decoder.sample(model, z_i, text, null, generators("decoder", 0, range(len(images))), steps=25)
    return grid([*images, *made], len(images))


def upsampler_loss(model, batch, context):
    """The upsampler's loss of a batch of (high, low) crops."""
    return upsample.upsampler_loss(model, *batch)


def upsampler_picture(model, batch, context):
    """Two pictures, whole: the enlarged condition, what the upsampler makes of it, the truth."""
    c, columns = model.config, []
    for n in context["shown"]:
        truth = context["show"](n, c.image_size)
        low = to_tensor(truth.reduce(c.image_size // c.low_size))[None].to(batch[0].device).float() / 127.5 - 1
        enlarged = torch.nn.functional.interpolate(low, (c.image_size,) * 2, mode="bicubic")
        made = upsample.sample(model, low, generators(f"upsample-{c.image_size}", 0, [0]))
        columns += [enlarged[0], made[0], to_tensor(truth).float() / 127.5 - 1]
    return grid(columns, 3)


# ----------------------------------------------------------------------------- the training loop

VALIDATION = 8  # batches of the validation split that the EMA weights are measured on: the same each time, with the same noise
EXPLODED = 1000  # a batch's loss beyond so many times the last row's mean is no chance


def learning_rate(step, recipe):
    """Linear warm-up, then half a cosine down to zero (ours: the paper names only the peak)."""
    ramp = min(1, (step + 1) / recipe.warmup)
    return recipe.learning_rate * ramp * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))


@torch.no_grad()
def update_ema(ema, model, step, decay):
    """Move the averaged weights towards the model's (table 3); early on faster (ours), or the first weights would linger."""
    decay = min(decay, (1 + step) / (10 + step))
    for slow, fast in zip(ema.parameters(), model.parameters()):
        slow.lerp_(fast, 1 - decay)


def save_atomically(content, path):
    """torch.save beside the file, then rename: a crash or a full disk leaves the old checkpoint whole. Raises UserError."""
    beside = path.with_suffix(".part")
    try:
        with open(beside, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:  # torch's own writer raises the latter
        beside.unlink(missing_ok=True)
        raise UserError(f"{path}: could not be written ({str(error).splitlines()[0]}); what was there before still is: make "
                        "room, and if this was training go on with --resume") from None


def plot_loss(rows, path):
    """Draw the loss against the step with Pillow, in training and held out, on a logarithmic scale."""
    lines = [(name, colour, [(r[0], math.log10(max(r[n], 1e-12))) for r in rows if r[n] is not None])
             for name, colour, n in (("training", "royalblue", 1), ("held out", "darkorange", 3))]
    width, height, left, bottom, last = 640, 360, 70, 40, rows[-1][0]
    losses = [loss for *_, points in lines for _, loss in points]
    low, high = min(losses) - 0.02, max(losses) + 0.02
    to_xy = lambda s, l: (left + (width - left - 15) * s / last, 15 + (height - bottom - 15) * (high - l) / (high - low))
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    for tick in np.linspace(low, high, 5):
        draw.line([to_xy(0, tick), to_xy(last, tick)], "gainsboro")
        draw.text((8, to_xy(0, tick)[1] - 6), f"{10 ** tick:.3g}", "black")
    for tick in np.linspace(0, last, 6):
        draw.text((to_xy(tick, low)[0] - 12, height - bottom + 8), f"{tick:.0f}", "black")
    draw.text((width // 2, height - 16), "step", "black")
    for n, (name, colour, points) in enumerate(lines):
        draw.line([to_xy(*point) for point in points], colour, 2)
        draw.text((width - 80, 20 + 14 * n), name, colour)
    picture.save(path)


def ranks():
    """(this process's number, how many there are) under torchrun, else (0, 1)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@contextlib.contextmanager
def first_before_others():
    """Let torchrun's first process go through before the others, which then find its files."""
    rank, world = ranks()
    if rank:
        dist.barrier()
    try:
        yield
    finally:  # what stops the first one will stop the others too
        if world > 1 and not rank:
            dist.barrier()


def mean_of_ranks(values, device):
    """The mean over all processes of a list of numbers."""
    if not dist.is_initialized():
        return values
    values = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(values)
    return (values / ranks()[1]).tolist()


@contextlib.contextmanager
def asked_to_stop():
    """Yields a list that Ctrl-C and SIGTERM add to, so that a step can be finished; alone, a second one stops at once."""
    asked = []

    def note(number, frame):
        asked.append(number)
        if ranks()[1] == 1:  # torchrun passes on a Ctrl-C that the terminal has sent already
            signal.signal(number, before[number])

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave_stopping_to_the_trainer(worker):
    """Ctrl-C reaches the workers too: they go on, and end with the process that they draw for."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class NoiseByRow(TorchFunctionMode):
    """Inside, torch.rand, randn and randint of (b, …) draw each row from numbers of its own, seeded by (seed, step, row).

    So a sample meets the same timestep, noise and dropped conditions in any process, any piece of a batch, on any device.
    Only the networks' dropout is drawn by piece.
    """

    DRAW = {torch.rand: "random", torch.randn: "standard_normal", torch.randint: "integers"}

    def __init__(self, seed, step, rows, held_out=False):
        super().__init__()
        self.rngs = [np.random.default_rng([seed, step, n, 2 * held_out + 1]) for n in rows]
        torch.manual_seed(int(np.random.default_rng([seed, step, rows[0], 4]).integers(1 << 32)))  # dropout's

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if kwargs or function not in self.DRAW:  # with a generator of its own, for one
            return function(*args, **(kwargs or {}))
        *bound, shape = args if isinstance(args[-1], tuple) else (args,)
        rows = torch.from_numpy(np.stack([getattr(rng, self.DRAW[function])(*bound, size=shape[1:]) for rng in self.rngs]))
        return rows.to(torch.get_default_dtype()) if rows.is_floating_point() else rows


class Loss(torch.nn.Module):
    """A stage's loss as a module: what DistributedDataParallel wraps, since CLIP's loss calls its network twice."""

    def __init__(self, model, loss_of, context):
        super().__init__()
        self.model, self.loss_of, self.context = model, loss_of, context

    def forward(self, batch, k, rows, held_out):
        c = self.context | {"alone": k in self.context["near"] and not held_out}
        with torch.autocast(c["device"].type, torch.bfloat16, enabled=c["low"]), NoiseByRow(c["seed"], k, rows, held_out):
            return self.loss_of(self.model, batch, c)


def add_gradients(loss, batch, k, recipe, context, held_out=False):
    """The mean loss of this process's rows of batch k; where gradients are wanted they are added up, piece after piece."""
    (rank, world), batch, total = ranks(), to_device(batch, context["device"]), 0
    rows = recipe.batch_size // world
    for first in range(0, rows, recipe.at_once):
        last = min(first + recipe.at_once, rows)
        apart = last < rows and isinstance(loss, DistributedDataParallel)  # processes exchange gradients with the last piece
        with loss.no_sync() if apart else contextlib.nullcontext(), attention_kernel(context["device"], context["low"]):
            numbers = range(rank * rows + first, rank * rows + last)
            value = loss(tuple(part[first:last] for part in batch), k, numbers, held_out) * ((last - first) / rows)
            if value.requires_grad:
                value.backward()
        total += value.item()
    return total


def prepared(stage, args, device):
    """(recipe, context, extra) of a stage, as the command line wants it. Raises UserError."""
    changes = {k: getattr(args, k) for k in ("batch_size", "steps", "learning_rate", "only", "words") if getattr(args, k)}
    recipe, (_, world) = replace(RECIPES[args.preset][stage], **changes), ranks()
    if recipe.batch_size % world:
        raise UserError(f"--batch-size {recipe.batch_size}: cannot be shared equally by {world} processes")
    with first_before_others():
        context, extra = STAGES[stage][0](args, device)
    low = args.precision == "bfloat16" or args.precision == "auto" and device.type == "cuda"
    near = range(*(0 if args.data else round(share * recipe.steps) for share in recipe.near))  # a folder has no near misses
    return recipe, context | {"device": device, "seed": args.seed, "low": low, "near": near, "scale": recipe.scale}, extra


def differing(saved, config):
    """The fields in which two configs, as dictionaries, are of different networks: not those that only sampling reads."""
    return {k for k in saved | config if saved.get(k) != config.get(k)} - {"guidance", "steps", "candidates"}


def networks(stage, recipe, context, init=None):
    """(model, its EMA, optimizer, loss as a module) as training begins, from the checkpoint `init` if any. Raises UserError."""
    (_, build, loss_of, *_), config = STAGES[stage], context["config"]
    torch.manual_seed(context["seed"])
    model = build(config).to(context["device"], memory_format=torch.channels_last)
    if init:
        given = clip_embed.read_checkpoint(init, stage)
        given = clip_embed.load_model(build, type(config), given, init)
        if differing(asdict(given.config), asdict(config)):
            raise UserError(f"{init}: has other sizes than the {stage} of this preset")
        model.load_state_dict(given.state_dict())
    model.load_state_dict(context.get("codes", {}), strict=False)
    parameters = dict(model.named_parameters())
    for part in recipe.only:
        if not any(part in name for name in parameters):
            raise UserError(f"--only {part}: no parameter of the {stage} is called so; some are {', '.join([*parameters][:3])}")
    for name, p in parameters.items() if recipe.only else ():
        p.requires_grad_(any(part in name for part in recipe.only))
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    for block in model.modules() if recipe.recompute else ():
        if isinstance(block, clip_embed.ResidualAttentionBlock):
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    decays = lambda name, p: p.ndim > 1 and "positional" not in name  # not biases and norms; places that fade are lost to CLIP
    groups = [{"params": [p for name, p in model.named_parameters() if decays(name, p)], "weight_decay": recipe.weight_decay},
              {"params": [p for name, p in model.named_parameters() if not decays(name, p)], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, recipe.beta2), eps=recipe.eps)
    loss = Loss(model, loss_of, context)
    return model, ema, optimizer, DistributedDataParallel(loss) if dist.is_initialized() else loss


def train(stage, args, device):
    """Train one stage from its start, or from its checkpoint with --resume, alone or as one of torchrun's processes.

    Writes the checkpoint, the CSV, the loss curve and the sample picture every --save-every steps. Raises UserError, and
    KeyboardInterrupt once a Ctrl-C or SIGTERM has been obeyed.
    """
    (_, _, loss_of, picture_of), (rank, world) = STAGES[stage], ranks()
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{stage}.pt"
    if path.exists() and not args.resume:
        raise UserError(f"{path} exists: go on from it with --resume, or train elsewhere with --out")
    recipe, context, extra = prepared(stage, args, device)
    config, begun = context["config"], path.exists()
    model, ema, optimizer, loss = networks(stage, recipe, context, None if begun else args.init)
    start, rows, recent = 0, [], []  # rows: step, mean loss since the row before (recent: of what), images a second, held out
    if begun:
        saved = clip_embed.read_checkpoint(path, stage)
        state = saved.get("training")
        if state is None or differing(saved["config"], asdict(config)):
            raise UserError(f"{path}: cannot be resumed, it {'has no optimizer state' if state is None else 'has other sizes'}")
        was = {"data": None, "given": "z_i", "only": (), **state.get("recipe", {}), **state, **saved}  # first what older ones lack
        for name, value in ({"seed": args.seed, "only": recipe.only} | extra).items():
            if was.get(name) != value:
                raise UserError(f"{path}: cannot be resumed, it was trained with another {name}: {was.get(name)!s:.40}, not {value!s:.40}")
        model.load_state_dict(state["model"])
        ema.load_state_dict(saved["model"])
        optimizer.load_state_dict(state["optimizer"])
        start, rows, recent = state["step"], [(*row, None)[:4] for row in state["rows"]], state["recent"]

    batches = partial(context["batches"], stage, recipe, args.seed, config, rank, world)
    held_out, ema_loss = [*map(batches("validation").__getitem__, range(VALIDATION))], Loss(ema, loss_of, context)
    loader = DataLoader(batches("train"), batch_size=None, sampler=range(start, recipe.steps), num_workers=args.workers,
                        worker_init_fn=leave_stopping_to_the_trainer, prefetch_factor=4 if args.workers else None)
    with asked_to_stop() as asked, tqdm(loader, desc=stage, initial=start, total=recipe.steps, unit="step", dynamic_ncols=True,
                                        disable=rank > 0) as bar:
        began, seen = time.time(), 0
        for step, batch in enumerate(bar, start):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, recipe)
            optimizer.zero_grad(set_to_none=True)
            value, stop = mean_of_ranks([add_gradients(loss, batch, step, recipe, context), len(asked) > 0], device)
            recent.append(value)
            norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
            if not math.isfinite(value) or not math.isfinite(norm) or rows and value > EXPLODED * rows[-1][1]:
                last = f"the last good checkpoint is {path}" if path.exists() else "no checkpoint was written yet"
                raise UserError(f"{stage}: the loss at step {step} is {value:.4g} (before: {rows[-1][1] if rows else '–'}), its "
                                f"gradient's norm {norm:.4g}; {last}: go on with --resume and a lower --learning-rate, or with "
                                "--precision float32")
            optimizer.step()
            update_ema(ema, model, step, recipe.ema_decay)
            seen += recipe.batch_size
            done, rate = step + 1, seen / (time.time() - began)
            bar.set_postfix(loss=f"{np.mean(recent[-100:]):.4f}", images_s=f"{rate:.0f}", refresh=False)
            measured = None
            if full := done == recipe.steps or done % args.save_every == 0:
                with torch.no_grad():
                    losses = [add_gradients(ema_loss, batch, k, recipe, context, True) for k, batch in enumerate(held_out)]
                measured = mean_of_ranks([float(np.mean(losses))], device)[0]
            if full or done % args.log_every == 0:
                rows.append((done, float(np.mean(recent)), rate, measured))
                recent = []
            if stage == "prior" and done == recipe.steps and not rank:  # kept beside its weights, for the analytic variance
                ema.errors.copy_(prior.estimate_errors(ema, captioned(context, 4)))
            if not rank and (full or stop):
                save_atomically({"stage": stage, "config": asdict(config), "model": ema.state_dict(), **extra, "training": {
                    "model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": done, "rows": rows, "recent": recent,
                    "recipe": asdict(recipe), "seed": args.seed}}, path)
            if not rank and full:
                with open(path.with_suffix(".csv"), "w", newline="") as file:
                    csv.writer(file).writerows([("step", "loss", "images_per_second", "held_out_loss"), *rows])
                plot_loss(rows, args.out / f"{stage}-loss.png")
                with torch.no_grad():
                    picture_of(ema, to_device(batch, device), context).save(args.out / f"{stage}-samples.png")
            if stop:
                raise KeyboardInterrupt(f"{stage}: stopped after step {done}, saved in {path}; go on with --resume")


def dry_run(stage, args, device):
    """Print a stage's parameters, the memory that its training needs, images a second on this machine and hours to finish.

    Memory: float32 weights, gradients, AdamW's two moments and EMA, the frozen CLIP and z_i, and what the backward pass
    needs of a piece (at_once), counted tensor by tensor. Passing results and what CUDA itself takes (under 1 GB) come on
    top. Time: a batch's pieces, one update, and drawing the batch as far as --workers do not hide it. Where 80% of the
    machine's memory would not do, by what one row and two need, no piece is tried.
    """
    recipe, context, _ = prepared(stage, args, device)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in STAGES[stage][1](context["config"]).parameters())
    frozen = [context.get("z_i", torch.empty(0)), *context.get("clip", torch.nn.Module()).parameters()]
    memory = {"weights, gradients, moments, EMA": 20 * parameters, "CLIP, z_i": sum(t.nbytes for t in frozen)}
    room, piece, speed = math.inf, min(recipe.at_once, recipe.batch_size), "too much for this machine: not measured"
    if device.type == "cuda":
        room = 0.8 * torch.cuda.mem_get_info(device)[1]
    elif hasattr(os, "sysconf"):
        room = 0.8 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

    def measure(rows):  # seconds to draw them, to pass them through, and of an update; bytes kept for the backward pass
        part, kept, times = replace(recipe, batch_size=rows), {}, [time.perf_counter()]
        batch = context["batches"](stage, part, args.seed, context["config"])[0]
        times.append(time.perf_counter())
        note = lambda tensor: (kept.update({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()}), tensor)[1]
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            add_gradients(loss, batch, 0, part, context)
        times.append(time.perf_counter())
        optimizer.step()
        update_ema(ema, model, 0, recipe.ema_decay)
        next(ema.parameters()).sum().item()  # waits for a GPU
        own = sum(kept.get(p.data_ptr(), 0) for p in model.parameters())
        return *np.diff([*times, time.perf_counter()]), sum(kept.values()) - own

    if sum(memory.values()) < room:
        model, ema, optimizer, loss = networks(stage, recipe, context)
        one, two, backward = measure(1)[-1], measure(2)[-1], f"what the backward pass needs of {piece} rows"
        memory[backward] = one + (two - one) * (piece - 1)
        tries, began = [], time.perf_counter()
        while sum(memory.values()) < room and len(tries) < 4 and time.perf_counter() - began < 20:
            tries.append(measure(piece))
        if tries:
            pieces = recipe.batch_size / piece
            drawing, passing, update, memory[backward] = np.min(tries, 0) * [pieces, pieces, 1, 1]
            step = max(passing + update, drawing / args.workers) if args.workers else passing + update + drawing
            speed = (f"{recipe.batch_size / step:.3g} images/s here, {recipe.steps} steps of {recipe.batch_size}: "
                     f"{recipe.steps * step / 3600:.3g} hours")
    print(f"{stage}: {parameters / 1e6:.1f} M parameters; {sum(memory.values()) / 1e9:.2f} GB ("
          + ", ".join(f"{k} {v / 1e9:.2f}" for k, v in memory.items() if v) + f"); {speed}", flush=True)


def attention_kernel(device, low):
    """On CPUs torch's fused attention is slower in bfloat16 than plain matrix products, if these stay in bfloat16: use those."""
    if low and device.type == "cpu":
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # also the CPU's, whatever its name
        return torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    return contextlib.nullcontext()


# What a stage needs before it can train, and what its checkpoint records beside the weights: (context, extra).

def source(args, device):
    """What every stage trains on: (the class of its batches, how to show picture `number` with `side` pixels; data's mark)."""
    batches, show = Batches, lambda number, side: render(fixed_scene(args.seed, number), side)
    if args.data and not args.dry_run:
        batches, show = partial(FolderBatches, args.data), args.data.picture
    return {"device": device, "seed": args.seed, "batches": batches, "show": show}, {"data": args.data and args.data.mark}


def prepare_clip(args, device):
    """The tokenizer, its merges learned from two thousand captions, and a config that fits it."""
    context, extra = source(args, device)
    captions = args.data.captions[::-(-len(args.data.captions) // 2000)] if args.data else corpus()
    tokenizer = clip_embed.Tokenizer(clip_embed.learn_bpe(captions))
    config = replace(clip_embed.PRESETS[args.preset], vocab_size=len(tokenizer))
    return context | {"tokenizer": tokenizer, "config": config}, extra | {"merges": [" ".join(m) for m in tokenizer.merges]}


def frozen_clip(args, device):
    """The CLIP of --clip, or the one that was trained in the same folder; of a folder's pictures, all that it says of them.

    For --dry-run an untrained one does.
    """
    context, extra = source(args, device)
    if args.dry_run and not args.clip and not (args.out / "clip.pt").exists():
        part, _ = prepare_clip(args, device)
        tokenizer, clip = part["tokenizer"], clip_embed.CLIP(part["config"]).eval().requires_grad_(False)
    else:
        clip, tokenizer = clip_embed.load_clip(args.clip or args.out / "clip.pt", args.bpe)
    context |= {"clip": clip.to(device), "tokenizer": tokenizer}
    extra |= {"clip": clip_embed.fingerprint(clip)}
    if args.data and not args.dry_run:
        context |= embed(args.data, context, args.out / f"cache-{extra['data']}-{extra['clip']}", args.workers)
    return context, extra


def embed(data, context, folder, workers):
    """z_i of every picture and the text of every caption, as `context` has them, memory-mapped from .npy files in `folder`.

    z_i (pictures, d); of caption k z_t[k] and rows ends[k] … ends[k + 1] − 1 of tokens and states (half precision), the empty
    caption being the last. Computed once: the folder's name tells data and CLIP, and it gets that name when all is written.
    """
    def load():
        z_i, *texts = (torch.from_numpy(np.load(folder / f"{name}.npy", mmap_mode="c")) for name in names)
        return {"z_i": z_i, "texts": dict(zip(names[1:], texts))}

    names = ("z_i", "ends", "tokens", "states", "z_t")

    with contextlib.suppress(OSError, ValueError, EOFError):  # not there yet, or damaged
        return load()
    shutil.rmtree(folder, ignore_errors=True)
    part, c, captions = folder.with_suffix(".part"), context["clip"].config, [*data.captions, ""]
    lengths, n = [min(len(context["tokenizer"].encode(caption)) + 2, c.context_length) for caption in captions], len(captions)
    shapes = dict(zip(names, (("<f4", (len(data.names), c.embed_dim)), ("<i8", (n + 1,)), ("<i8", (sum(lengths),)),
                              ("<f2", (sum(lengths), c.text_width)), ("<f4", (n, c.embed_dim)))))
    part.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(open(part / f"{name}.npy", "wb")) for name in shapes}
        put = lambda name, values: files[name].write(np.asarray(values.cpu(), shapes[name][0]).tobytes())
        for name, (kind, shape) in shapes.items():  # written, not mapped: a full disk is then an error and no crash
            np.lib.format.write_array_header_1_0(files[name], {"descr": kind, "fortran_order": False, "shape": shape})
        put("ends", torch.tensor([0, *lengths]).cumsum(0))
        pictures = DataLoader(range(len(data.names)), 64, collate_fn=partial(data.tensors, side=c.image_size), num_workers=workers)
        for images in tqdm(pictures, desc="z_i of the pictures", unit="batch"):
            put("z_i", look(*to_device([images], context["device"]), context))
        for first in tqdm(range(0, n, 256), desc="states of the captions", unit="batch"):
            text, _ = read(captions[first:first + 256], context)
            put("tokens", text["tokens"][text["mask"]]), put("states", text["states"][text["mask"]]), put("z_t", text["z_t"])
    os.replace(part, folder)
    return load()


def prepare_prior(args, device):
    """CLIP, and z_i of the fixed set of scenes: computed once, then read from a file named by what they depend on."""
    context, extra = frozen_clip(args, device)
    c = context["clip"].config
    config = replace(prior.PRESETS[args.preset], embed_dim=c.embed_dim, clip_text_width=c.text_width)
    if args.dry_run:  # sizes are all that counts
        return context | {"z_i": torch.zeros(FIXED_SCENES, c.embed_dim, device=device), "config": config}, extra
    if args.data:
        return context | {"config": config}, extra
    cache = args.out / f"z_i-{extra['clip']}-{args.seed}-{FIXED_SCENES}.pt"
    if not cache.exists():
        loader = DataLoader(Batches("z_i", Recipe(256, 0, 0), args.seed, None), batch_size=None,
                            sampler=range(-(-FIXED_SCENES // 256)), num_workers=args.workers)
        save_atomically(torch.cat([look(*to_device([images], device), context).cpu()
                                   for images in tqdm(loader, desc="z_i of the priors' scenes", unit="batch")]), cache)
    return context | {"z_i": torch.load(cache, weights_only=True).to(device), "config": config}, extra


def prepare_ar_prior(args, device):
    """What the diffusion prior needs, and what makes codes of z_i and of z_i·z_t: components and buckets of the fixed set."""
    (context, extra), config = prepare_prior(args, device), prior.AR_PRESETS[args.preset]
    c = context["config"]
    config = replace(config, embed_dim=c.embed_dim, clip_text_width=c.clip_text_width)
    if args.dry_run:
        return context | {"config": config}, extra
    try:
        codes = prior.fit_codes(context["z_i"], config.buckets)
    except ValueError as error:
        raise TooFew(f"ar-prior: z_i of {len(context['z_i'])} pictures: {error}") from None
    dots = torch.cat([(z_i * text["z_t"]).sum(1) for z_i, text in captioned(context, 16)])
    codes["dot_edges"], _ = prior.quantile_buckets(dots.cpu(), config.buckets)
    return context | {"codes": codes, "config": replace(config, components=len(codes["components"]))}, extra


def prepare_decoder(args, device):
    """CLIP, a config that fits it, and what the decoder is given."""
    context, extra = frozen_clip(args, device)
    c = context["clip"].config
    config = replace(decoder.PRESETS[args.preset], embed_dim=c.embed_dim, clip_text_width=c.text_width, vocab_size=c.vocab_size)
    return context | {"config": config, "given": args.given}, extra | {"given": args.given}


def prepare_upsampler(args, device, size):
    """An upsampler needs nothing but pictures that are large enough; samples show those held out, if some are. Raises TooFew."""
    (context, extra), config, shown = source(args, device), upsample.PRESETS[args.preset][size], (0, 1)
    if args.data:
        large, least = args.data.rows("train", size), args.batch_size or RECIPES[args.preset][f"upsample-{size}"].batch_size
        if len(large) < least:
            raise TooFew(f"upsample-{size}: {len(large)} pictures have {size} pixels a side, a batch takes {least}: it stays "
                         f"untrained, pictures end at {config.low_size}")
        shown = [*args.data.rows("validation", size), *large][:2]
    return context | {"config": config, "shown": shown}, extra


def to_device(batch, device):
    """uint8 pictures to the device, as floats in [-1, 1]; captions and numbers as they are."""
    pictures = lambda part: torch.is_tensor(part) and part.dtype == torch.uint8
    return tuple(part.to(device).float() / 127.5 - 1 if pictures(part) else part for part in batch)


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
        # as many digits as bfloat16 has, which is what most training reads: the files compress better. Not CLIP's: they name it
        checkpoint["model"] = {k: (v if stage == "clip" else v.bfloat16()).half() for k, v in checkpoint["model"].items()}
        checkpoint["trained"] = {k: training[k] for k in ("step", "recipe", "seed")}
        save_atomically(checkpoint, folder / f"{stage}.pt")
        print(folder / f"{stage}.pt")


def main():
    """The script: what --help says."""
    parser = argparse.ArgumentParser(
        description="Train unCLIP's stages on the built-in world of shapes, or on --data. The priors and the decoder need the CLIP "
        "of the same --out folder, or --clip; the upsamplers need nothing.",
        epilog="A run that was stopped, by Ctrl-C or anything else, goes on with the same command and --resume, as if it had "
        "never stopped. Several GPUs: torchrun --nproc-per-node N train.py …, with the same options.")
    parser.add_argument("stage", choices=["all", *STAGES, "export"],
                        help="one stage; all six in order; or export: copy a finished run in half precision, from runs/NAME to "
                        "weights/NAME, NAME being that of --out")
    parser.add_argument("--preset", default="shapes", choices=RECIPES, help="sizes and recipe: shapes (a laptop's CPU or any GPU), "
                        "laptop (a laptop GPU), paper (table 3)")
    parser.add_argument("--data", metavar="FOLDER", help="train on these pictures, not on shapes: each with a .txt of the same "
                        "name, all in metadata.jsonl or metadata.csv (file_name, text), or .tar shards of pictures and .txt")
    parser.add_argument("--out", type=Path, help="where checkpoints, curves and samples go (default runs/PRESET)")
    parser.add_argument("--clip", metavar="PATH", help="train prior and decoder on this CLIP, anyone's (see clip_embed.py), in "
                        "place of one trained here")
    parser.add_argument("--bpe", metavar="PATH", help="the merges file of --clip, where none lies beside it")
    parser.add_argument("--steps", type=int, help="training steps in all, in place of the preset's")
    parser.add_argument("--batch-size", type=int, help="of all processes together, in place of the preset's")
    parser.add_argument("--learning-rate", type=float, help="in place of the preset's")
    parser.add_argument("--given", default="z_i", choices=["z_i", "z_t", "caption"], help="what the decoder is trained on beside "
                        "the caption: z_i (default), z_t in its place (§5.1), or nothing, the caption alone: GLIDE")
    parser.add_argument("--words", type=float, default=0.0, help="share of the scenes of clip and decoder that get a word "
                        "written across a thing (fig. 6; default 0)")
    parser.add_argument("--seed", type=int, default=0, help="decides weights, scenes, order, captions and noise (default 0)")
    parser.add_argument("--init", type=Path, metavar="CHECKPOINT", help="start from these weights, as in weights/shapes (one stage)")
    parser.add_argument("--only", nargs="+", default=(), metavar="NAME", help="train only parameters with one of these in their names, "
                        "and leave the others as --init has them")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoints in --out")
    parser.add_argument("--dry-run", action="store_true", help="train nothing: show parameters, memory needed, images a second "
                        "on this machine and hours to finish")
    parser.add_argument("--precision", default="auto", choices=["auto", "float32", "bfloat16"],
                        help="auto: bfloat16 on cuda, else float32; bfloat16 also pays on CPUs with avx512_bf16 or amx_bf16")
    parser.add_argument("--workers", type=int, default=1, help="processes that draw scenes or read pictures (default 1)")
    parser.add_argument("--log-every", type=int, default=50, help="steps between two rows of the CSV (default 50)")
    parser.add_argument("--save-every", type=int, default=500, help="steps between two checkpoints (default 500)")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    args = parser.parse_args()
    args.out, args.only = args.out or Path("runs") / args.preset, tuple(args.only)
    with one_line_errors():
        for name, low, high in (("steps", 1, 1e9), ("batch_size", 1, 1e6), ("learning_rate", 1e-12, 10), ("seed", 0, 1 << 30),
                                ("words", 0, 1), ("workers", 0, 1024), ("log_every", 1, 1e9), ("save_every", 1, 1e9)):
            if getattr(args, name) is not None and not low <= getattr(args, name) <= high:
                raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be between {low:g} and {high:g}")
        if args.init and args.stage not in STAGES:
            raise UserError(f"--init {args.init}: a checkpoint is one stage's; train that stage alone")
        if args.only and not args.init:
            raise UserError(f"--only {' '.join(args.only)}: the rest needs weights; say by --init which")
        device = pick_device(args.device)
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # torchrun's
            if device.type == "cuda":
                device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
                torch.cuda.set_device(device)
            # a day: the others wait while the first one prepares
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=1))
        stages = [stage for stage in STAGES if not (args.clip and stage == "clip")]
        if args.stage == "export":
            export(args.out, Path(__file__).parent / "weights" / args.out.resolve().name, stages)
            return
        with first_before_others(), contextlib.redirect_stderr(io.StringIO() if ranks()[0] else sys.stderr):
            args.data = args.data and gather(args.data, args.out, args.workers)
        if args.data and not args.init and not ranks()[0] and len(args.data.names) < 1000:
            print(f"{len(args.data.names)} pictures are too few to learn from scratch: thousands are needed, or --init "
                  "CHECKPOINT to fine-tune", file=sys.stderr)
        for stage in stages if args.stage == "all" else [args.stage]:
            try:
                (dry_run if args.dry_run else train)(stage, args, device)
            except TooFew as error:
                if args.stage != "all":
                    raise
                print(error, file=sys.stderr)
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
