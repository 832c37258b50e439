"""Captioned folders of pictures: found, checked, and drawn in batches.

Three layouts, in any mixture: pictures with a .txt of the same name, a caption a line;
metadata.jsonl or metadata.csv with the columns file_name and text; .tar shards, read where they
lie. Nothing outside of the folder is opened, and every picture is decoded once beforehand.
"""

import csv
import hashlib
import io
import json
import math
import os
import re
import sys
import zlib
from dataclasses import dataclass
from functools import partial
from itertools import chain, groupby
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from clip_embed import FORMATS, UserError, open_picture, to_tensor
from data.processes import make_once, make_out

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
SMALLEST = 64     # pixels a side: smaller pictures are left out
LONGEST = 10_000  # characters: longer captions are left out
SURROGATES = re.compile("[\ud800-\udfff]")
BUFFER = 10_000   # places within which the pictures of shards are shuffled


class TooFew(UserError):
    """The pictures are too few or too small for a stage; train.py `all` goes on without it."""


@dataclass
class Pictures:
    """The captioned pictures of a folder in any layout; picture k is some bytes of a file.

    Captions first[k] … first[k + 1] − 1 belong to picture k.
    """
    root: str
    names: tuple
    places: tuple       # (file, offset, length) of each picture's bytes
    captions: list
    first: np.ndarray   # (n + 1,)
    sides: np.ndarray   # (n,) pixels of the shorter side
    mark: str           # sixteen hex digits that name this set: names, captions and the pictures' bytes

    def picture(self, k, side, rng=None):
        """Picture k, RGB, side × side: its middle square, scaled. Raises UserError.

        rng: a random square instead, of 80% to 100% of its shorter side, as CLIP's own training
        cut pictures. Never mirrored, since captions say left and right.
        """
        data = read_part(self.root, *self.places[k])
        picture = open_picture(self.names[k], data, side)
        cut, x, y = rng.uniform((0.8, 0, 0), 1) if rng else (1, 0.5, 0.5)
        cut *= min(picture.size)
        left, top = x * (picture.width - cut), y * (picture.height - cut)
        box = left, top, left + cut, top + cut
        return picture.resize((side, side), Image.Resampling.BICUBIC, box)

    def tensors(self, numbers, side, rngs=None):
        """Pictures as uint8 (B, 3, side, side); `rngs`, one a picture, cut them at random."""
        rngs = rngs or [None] * len(numbers)
        return torch.stack([to_tensor(self.picture(k, side, rng)) for k, rng in zip(numbers, rngs)])

    def thing(self, k):
        """What picture k shows: its name up to "@", which pictures of the same thing share."""
        return re.sub("@[^/]*$", "", self.names[k])

    def rows(self, split, side=0):
        """Numbers of a split's pictures of `side` pixels or more.

        "validation" is the 3% of the things that hash lowest, with all their pictures. If there is
        but one thing, it is in both splits.
        """
        large = np.flatnonzero(self.sides >= side)
        things = [self.thing(k).encode("utf-8", "surrogateescape") for k in large]
        hashes = np.array([zlib.crc32(thing) for thing in things])
        most = np.sort(hashes)[:math.ceil(0.03 * len(large))].max(initial=0)
        held_out = hashes <= most
        return large[held_out if split == "validation" or held_out.all() else ~held_out]

    def check_count(self, size, batch_size):
        """Raise TooFew unless an upsampler to `size` pixels can fill a batch."""
        count = len(self.rows("train", size))
        if count < batch_size:
            raise TooFew(f"upsample-{size}: {count} pictures have {size} pixels a side, a batch "
                         f"takes {batch_size}: it stays untrained, pictures end at {size // 4}")


def read_part(root, file, offset, size):
    """`size` bytes of a file, from `offset` on."""
    with open(os.path.join(root, file), "rb", buffering=0) as file:
        file.seek(offset)
        return file.read(size)


def leads_out(path):
    """Whether a relative path, of any system, leads above its start."""
    parts = path.replace("\\", "/").split("/")
    return ".." in parts or not parts[0] or "\0" in path


def is_inside(root, path):
    """Whether a path below root, its links followed, stays there."""
    return Path(os.path.realpath(os.path.join(root, path))).is_relative_to(root)


def read_shard(path):
    """{name: (offset, length)} of the files in a .tar, from the headers alone. Raises UserError.

    A header has 512 bytes, numbers in octal: the name at 0 and its prefix at 345; the length at
    124; the sum of all bytes, its own counted as blanks, at 148; the kind at 156. The file follows,
    filled up to a multiple of 512. A longer name comes before, as a file of kind L (GNU) or in one
    of kind x (POSIX). An empty header ends the archive.
    """
    members, long, at, end = {}, None, 0, os.path.getsize(path)
    with open(path, "rb") as file:
        while (header := file.read(512)) != bytes(512):
            try:
                size = int(header[124:136].strip(b" \0") or b"0", 8)
                total = int(header[148:156].strip(b" \0"), 8)
            except ValueError:
                size = total = -1
            # the lower half of Adler-32 is one more than the sum of the bytes
            added = zlib.adler32(header[:148] + b" " * 8 + header[156:]) & 0xFFFF
            if size < 0 or added != (total + 1) % 65521 or at + 512 + size > end:
                raise UserError(f"{path}: damaged or truncated: "
                                f"no whole file begins at byte {at} of {end}")
            kind, name = header[156:157], header[:100].split(b"\0", 1)[0]
            if kind in b"Lx":
                name = file.read(min(size, 1 << 16))
                record = re.search(rb"(?:^|\n)\d+ path=([^\n]*)", name)
                long = name.rstrip(b"\0") if kind == b"L" else record and record[1]
            elif kind in b"0\0":
                if header[345] and header[257:263] == b"ustar\0":
                    name = header[345:500].split(b"\0", 1)[0] + b"/" + name
                name = (long or name).decode("utf-8", "surrogateescape").removeprefix("./")
                if leads_out(name):
                    raise UserError(f"{path}: its member {name!r} leads out of the folder")
                members[name] = at + 512, size
            if kind not in b"LxKg":  # not one of the headers before an entry
                long = None
            at += 512 + -(-size // 512) * 512
            file.seek(at)
    return members


def read_metadata(path):
    """(line number, file_name, text) of each line of a metadata.jsonl or .csv. Raises UserError."""
    table, number, columns = path.suffix == ".csv", 0, None
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        lines = csv.reader(file, strict=True) if table else file
        try:
            csv.field_size_limit(1 << 30)
            for number, line in enumerate(lines, 1):
                if not "".join(line).strip():
                    continue
                title = table and not columns
                columns = columns or line
                if table:
                    pairs = list(zip(columns, line))
                else:
                    pairs = json.loads(line, object_pairs_hook=list)
                row = dict(pairs)
                if len(row) < len(pairs):
                    raise ValueError("two columns have one name")
                if table and len(line) != len(columns):
                    raise ValueError(f"{len(line)} fields for {len(columns)} columns")
                found = lines.line_num if table else number, row["file_name"], row["text"]
                if not title:
                    yield found
        except (ValueError, csv.Error, RecursionError, KeyError, TypeError) as error:
            reasons = {KeyError: f"no column {error}", TypeError: "no object"}
            number = lines.line_num if table else number
            raise UserError(f"{path}, line {number}: {reasons.get(type(error), error)}; expected "
                            "the columns file_name and text, each once") from None


def list_files(root):
    """{name: ((file, offset, length), time)} of a folder, its subfolders and .tar shards.

    Raises UserError, also for a link that leads out of the folder.
    """
    found, folders = {}, [""]
    while folders:
        folder = folders.pop()
        for entry in sorted(os.scandir(os.path.join(root, folder)), key=lambda entry: entry.name):
            name = folder + entry.name
            if entry.is_symlink() and not is_inside(root, name):
                raise UserError(f"{name!r} is a link that leads out of {root}")
            if entry.is_dir(follow_symlinks=False) and entry.name[0] != ".":
                folders.append(name + "/")
            elif entry.is_file() and entry.name[0] != ".":
                size, changed = entry.stat().st_size, entry.stat().st_mtime_ns
                found[name] = (name, 0, size), changed
                members = read_shard(entry.path) if name.endswith(".tar") else {}
                for part, place in members.items():
                    found[f"{name}/{part}"] = (name, *place), changed
    return found


def captions_beside(root, found, pictures):
    """(picture, caption, where it stands) of each .txt with a picture's name, a caption a line."""
    texts = [(name, os.path.splitext(name)[0] + ".txt") for name in pictures]
    texts = [(name, text, *found[text][0]) for name, text in texts if text in found]
    for file, rows in groupby(texts, key=lambda row: row[2]):
        with open(os.path.join(root, file), "rb", buffering=0) as opened:  # a shard: once
            for name, text, _, offset, size in rows:
                opened.seek(offset)
                content = opened.read(min(size, 1 << 20))
                lines = content.decode("utf-8-sig", "surrogateescape").splitlines()
                for line in [*filter(str.strip, lines)] or [""]:
                    yield name, line, text


def captions_in_metadata(root, found):
    """(picture, caption, where it stands) of each line of each metadata file. Raises UserError."""
    for name in found:
        folder, slash, file = name.rpartition("/")
        in_shard = found[name][0][1] > 0
        if file not in ("metadata.jsonl", "metadata.csv") or in_shard:
            continue
        for line, file_name, caption in read_metadata(Path(root, name)):
            file_name = str(file_name).encode("utf-8", "replace").decode()
            picture = folder + slash + file_name.removeprefix("./")
            if picture not in found:  # a table written on Windows
                picture = folder + slash + file_name.replace("\\", "/").removeprefix("./")
            if picture not in found and (leads_out(file_name) or not is_inside(root, picture)):
                raise UserError(f"{Path(root, name)}, line {line}: file_name {file_name!r} "
                                "leads out of the folder")
            yield picture, caption, f"{name}, line {line}, {picture}"


def list_pictures(root):
    """([(name, place, time, captions)] of a folder's pictures, unopened, [what is left out, why]).

    Found in subfolders too: pictures with a .txt of the same name; metadata.jsonl or metadata.csv
    with the columns file_name and text; .tar shards of pictures and their .txt. Raises UserError.
    """
    found, named, wrong = list_files(root), set(), []
    pictures = {name: (name, *place, []) for name, place in found.items()
                if name.lower().endswith(SUFFIXES)}
    captions = chain(captions_beside(root, found, pictures), captions_in_metadata(root, found))
    for name, caption, where in captions:
        caption = " ".join(caption.split()) if isinstance(caption, str) else ""
        reason = ""
        if name not in pictures:
            reason = "no such picture"
        elif not caption:
            reason = "its caption is empty"
        elif SURROGATES.search(caption):  # Python's stand-ins for bytes of no UTF-8
            reason = "its caption is not UTF-8"
        elif len(caption) > LONGEST:
            reason = f"its caption has {len(caption):,} characters, more than {LONGEST:,}"
        if reason:
            wrong.append(f"{where}: {reason}")
            named.add(name)
        else:
            pictures[name][3].append(caption)
    wrong += [f"{name}: has no caption" for name, *_, captions in pictures.values()
              if not captions and name not in named]
    known = (*SUFFIXES, ".txt", ".json", ".tar", "metadata.jsonl", "metadata.csv")
    wrong += [f"{name}: is none of {', '.join(SUFFIXES)}" for name in found
              if not name.lower().endswith(known)]
    return [row for row in pictures.values() if row[3]], wrong


def check(root, rows):
    """[(shorter side, CRC-32 of the bytes, fault or "")] of pictures, each decoded once."""
    return [check_one(root, *row[:2]) for row in rows]


def check_one(root, name, place):
    """check's answer for one picture."""
    try:
        if not 0 < place[2] <= 1 << 28:
            raise UserError(f"{name}: has {place[2]:,} bytes")
        data = read_part(root, *place)
        open_picture(name, data, SMALLEST)
        width, height = Image.open(io.BytesIO(data), formats=FORMATS).size
        if min(width, height) < SMALLEST:
            raise UserError(f"{name}: has {width}×{height} pixels, expected at least "
                            f"{SMALLEST} a side")
        return min(width, height), zlib.crc32(data), ""
    except (OSError, UserError) as error:
        return 0, 0, str(error)


def digest(content):
    """Sixteen hex digits that name a content."""
    return hashlib.sha256(repr(content).encode()).hexdigest()[:16]


def check_all(root, rows, cache, workers):
    """check's answers for all pictures, kept in the file `cache`."""
    def write(path):
        loader = DataLoader(rows, 64, collate_fn=partial(check, root), num_workers=workers)
        batches = tqdm(loader, desc="checking pictures", unit="batch") if rows else []
        path.write_text(json.dumps([*chain(*batches)]), "utf-8")

    return make_once(cache, lambda path: json.loads(path.read_text("utf-8")), write)


def gather(folder, out, workers, few=False):
    """The Pictures of a folder that can be trained on, summed up on stderr.

    Each picture is decoded once as a check. The answers are kept in `out`, and out/skipped.txt
    lists the pictures left out. few: warn if there are too few to learn from scratch. Raises
    UserError, also if none is left.
    """
    root = os.path.realpath(folder)
    if not os.path.isdir(root):
        raise UserError(f"--data {folder}: no such folder")
    rows, wrong = list_pictures(root)
    make_out(out)
    cache = out / f"checked-{digest([row[:3] for row in rows])}.json"
    checks = check_all(root, rows, cache, workers)
    wrong = [reason for *_, reason in checks if reason] + wrong
    wrong = [re.sub(r"[\x00-\x1f\x7f]", "?", line) for line in wrong]
    lines = "".join(line + "\n" for line in wrong)
    (out / "skipped.txt").write_text(lines, "utf-8", "backslashreplace")
    if wrong:
        print(f"{len(wrong):,} left out, listed in {out / 'skipped.txt'}:", *wrong[:10],
              sep="\n  ", file=sys.stderr)
    good = [(*row, *answer[:2]) for row, answer in zip(rows, checks) if not answer[2]]
    if not good:
        usable = " that can be used" if wrong else ""
        raise UserError(f"--data {folder}: no picture with a caption is there{usable}; expected "
                        "pictures with a .txt of the same name, metadata.jsonl or metadata.csv, "
                        "or .tar shards")
    names, places, _, captions, sides, sums = zip(*good)
    sides, first = np.array(sides), np.cumsum([0, *map(len, captions)])
    large = ", ".join(f"{(sides >= n).sum():,} of {n} or more" for n in (256, 1024))
    print(f"{folder}: {len(names):,} pictures with {first[-1]:,} captions, shorter sides "
          f"{sides.min():,} to {sides.max():,} pixels, {large}", file=sys.stderr)
    if few and len(names) < 1000:
        print(f"{len(names)} pictures are too few to learn from scratch: thousands are needed, or "
              "--init CHECKPOINT to fine-tune", file=sys.stderr)
    mark = digest((names, captions, sums))
    return Pictures(root, names, places, [*chain(*captions)], first, sides, mark)


# ------------------------------ batches

class FolderBatches(Dataset):
    """Rows of batch k of a stage's training on Pictures: those of process `rank` of `world`.

    Row n depends on (seed, k, n) alone. Rows follow one endless order: each epoch has every picture
    of the split once, files (pictures, or shards) in random order, then shuffled within BUFFER
    places, so that shards are read nearly as they lie on the disk. A caption is drawn each time.
    clip: images (b, 3, H, W) uint8, cut at random in training, and captions, no thing and no
    caption twice in a batch (a held-out batch is as large as that allows). Priors: numbers of
    pictures, and of captions. Decoder: images, numbers of captions, and of pictures. Upsamplers:
    (high, low) crops by upsample.training_crops, one of each picture. Raises UserError if a batch
    of clip needs more pictures.
    """

    def __init__(self, data, stage, batch_size, seed, config, rank=0, world=1, split="train",
                 crops=None):
        self.data, self.stage, self.seed, self.config = data, stage, seed, config
        self.side, self.crops = getattr(config, "image_size", 0), crops
        self.cut = split == "train"
        self.rows = data.rows(split, self.side if stage.startswith("upsample") else 0)
        files = [data.places[k][0] for k in self.rows]
        self.files = np.unique(files, return_inverse=True)[1]
        self.epoch, self.order = None, None
        if stage == "clip":
            captions = {data.captions[c] for k in self.rows for c in range(*data.first[k:k + 2])}
            most = min(len({data.thing(k) for k in self.rows}), len(captions))
            if most < batch_size and split == "train":
                raise UserError(f"--batch-size {batch_size}: clip's batches hold nothing twice, and "
                                f"there are {len(self.rows):,} pictures with {len(captions):,} "
                                f"different captions to train on: at most {most}")
            batch_size = min(batch_size, max(1, most // world) * world)
        self.batch_size = batch_size
        self.own = range(batch_size * rank // world, batch_size * (rank + 1) // world)

    def where(self, position):
        """The index within `rows` of a position of the endless order."""
        epoch, within = divmod(position, len(self.rows))
        if epoch != self.epoch:
            rng = np.random.default_rng([self.seed, 1 << 42, epoch])
            order = np.argsort(rng.permutation(len(self.rows))[self.files], kind="stable")
            places = np.arange(len(order)) + rng.uniform(0, BUFFER, len(order))
            self.epoch, self.order = epoch, order[np.argsort(places)]
        return self.order[within]

    def draw(self, k):
        """[(number of a picture, of a caption, rng)] of the process's own rows of batch k."""
        data, rows, taken, drawn = self.data, self.rows, set(), []
        clip = self.stage == "clip"
        for n in range(self.batch_size) if clip else self.own:  # clip: nothing twice in any process
            rng = np.random.default_rng([self.seed, k, n])
            start = self.where(k * self.batch_size + n)
            for j in range(len(rows)):
                number = int(rows[(start + j) % len(rows)])
                caption = int(rng.integers(*data.first[number:number + 2]))
                both = {data.thing(number), data.captions[caption]}
                if not clip or not taken & both:
                    break
            taken |= both
            if n in self.own:
                drawn.append((number, caption, rng))
        return drawn

    def __getitem__(self, k):
        data, drawn = self.data, self.draw(k)
        numbers, captions, rngs = zip(*drawn)
        if self.stage.startswith("upsample"):
            pairs = [self.crops(data.picture(number, self.side), self.config, rng, 1)
                     for number, _, rng in drawn]
            return tuple(map(torch.cat, zip(*pairs)))
        if self.stage == "clip":
            images = data.tensors(numbers, self.side, self.cut and rngs)
            return images, [data.captions[c] for c in captions]
        numbers_and_captions = torch.tensor(numbers), torch.tensor(captions)
        if self.stage == "decoder":
            return data.tensors(numbers, self.side), *numbers_and_captions[::-1]
        return numbers_and_captions
