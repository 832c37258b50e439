"""What do networks learn from some thousand pictures? Measured on emoji, or on another small captioned folder.

In:   the folder, and checkpoints that were trained on it
Out:  `measure`: on stdout, three Markdown tables:
        CLIP's retrieval among the pictures held out: for each caption the nearest picture, and the other way round
        names: how often z_i of a true picture, or of a drawn one, is nearest to its own name among all names
        copies: how far a drawn picture lies from its nearest training picture, beside pictures held out (root mean
          square of the difference at 64 pixels, of 255). Nearer than 95% of those is called a copy
      with --pairs a sheet of drawn pictures, each above its nearest training picture; with --sheet what was drawn
      `subset`: a folder of some of the things, all drawings of each, as the folder has them
      `curves`: one chart of training and held-out losses of several trainings, and where the second was lowest

The first caption of a picture is its name. Pictures whose file names are equal up to "@" show the same thing
(data/folder.py). All of a sheet's captions are drawn at random by --seed; none is chosen.

    python experiments/emoji.py measure photos/emoji --weights runs/emoji --pairs pairs.png --sheet drawn.png
    python experiments/emoji.py subset photos/emoji --n 500 --out photos/emoji-500
    python experiments/emoji.py curves runs/emoji-500 runs/emoji-2000 runs/emoji-4804 --picture curves.png
"""

import argparse
import csv
import json
import os
import sys
import tempfile
import textwrap
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sample
from clip_embed import UserError, encode_captions, encode_pictures, one_line_errors, pick_device, to_floats
from common import LINES
from data.charts import plot_lines
from data.folder import gather, read_part
from data.processes import make_out

# ----------------------------------------------------------------------------- measures


def embed(stack, captions=None, images=None):
    """Embeddings (n, d) on the CPU of n captions, or of images (n, 3, 64, 64) in [-1, 1]."""
    clip, count = stack["clip"], len(captions if images is None else images)

    def run(some):
        if images is None:
            return encode_captions(clip, stack["tokenizer"], captions[some])[0]["z_t"]
        return encode_pictures(clip, images[some].to(clip.logit_scale.device))
    return sample.in_batches(clip, count, 64, run)


def found(cosines, right, most):
    """How often one of the `most` largest of each row of cosines (n, m) is right (n, m) (bool)."""
    top = cosines.topk(min(most, cosines.shape[1]), 1).indices
    return float(right.gather(1, top).any(1).double().mean())


def by_chance(right, most):
    """What `found` is on average if the order is random: 1 − C(m − k, most) / C(m, most) with k of m right."""
    k, m = right.sum(1).double(), right.shape[1]
    missed = torch.ones(len(right), dtype=torch.double)
    for drawn in range(min(most, m)):
        missed *= (m - k - drawn).clamp(min=0) / (m - drawn)
    return float(1 - missed.mean())


def nearest(images, others):
    """(root mean square of the difference, of 255, and number) of the nearest of `others` (m, 3, H, H) to each image (n, 3, H, H)."""
    distances = torch.cdist(images.flatten(1), others.flatten(1)) / images[0].numel() ** 0.5 * 127.5
    return distances.min(1)


class Things:
    """The names of a folder's things: each thing's first caption, one name once."""

    def __init__(self, data):
        self.data, self.number = data, {}  # name → its place in `names`
        for k in range(len(data.names)):
            self.number.setdefault(self.name(k), len(self.number))
        self.names = list(self.number)

    def name(self, k):
        """The first caption of picture k."""
        return self.data.captions[self.data.first[k]]

    def right(self, names):
        """Which of all names is each of n names: (n, m), bool."""
        wanted = torch.tensor([self.number[name] for name in names])
        return wanted[:, None] == torch.arange(len(self.names))

    def drawn(self, pictures, n, rng):
        """n names of pictures, no thing twice."""
        names = sorted({self.name(k) for k in pictures})
        return [names[k] for k in rng.permutation(len(names))[:n]]


def retrieval(stack, data, held_out, images, rng):
    """Rows of a table: how often the right picture or caption is found among those held out.

    Each picture has one of its captions, drawn at random. Right is the very picture, or any of the caption's thing,
    whoever drew it.
    """
    captions = [data.captions[rng.integers(*data.first[k:k + 2])] for k in held_out]
    things = np.array([data.thing(k) for k in held_out])
    cosines, rows = embed(stack, captions) @ embed(stack, images=images).T, []
    for what, right in (("thing", torch.from_numpy(things[:, None] == things)), ("picture", torch.eye(len(things), dtype=torch.bool))):
        for way, c, r in ((f"for a caption, its {what}", cosines, right), (f"for a picture, a caption of its {what}", cosines.T, right.T)):
            rows.append([way, *(f"{found(c, r, most):.0%} ({by_chance(r, most):.0%})" for most in (1, 5))])
    return rows


def table(title, rows):
    """Print a Markdown table."""
    print(f"| {' | '.join(title)} |\n|{'---|' * len(title)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    print(flush=True)


def measure(args):
    """Print the three tables, write the sheets. Raises UserError."""
    device, rng = pick_device(args.device), np.random.default_rng(args.seed)
    stack = sample.load_stack(args.weights, device, 64, "diffusion", args.clip)
    with tempfile.TemporaryDirectory() as cache:
        data = gather(args.data, Path(cache), 1)
    held_out, trained = data.rows("validation"), data.rows("train")
    if not set(trained).isdisjoint(held_out):
        raise UserError(f"{args.data}: has only one thing: none can be held out")
    all_things = Things(data)
    pixels = torch.stack([data.tensors([k], 64)[0] for k in tqdm(range(len(data.names)), "reading pictures")])
    pictures = to_floats(pixels)
    table(["held out: %d pictures of %d things" % (len(held_out), len({data.thing(k) for k in held_out})), "first (by chance)",
           "among five (by chance)"], retrieval(stack, data, held_out, pictures[held_out], rng))

    z_names, rows, distances, drawn = embed(stack, all_things.names), [], {}, {}
    limit = np.quantile(nearest(pictures[held_out], pictures[trained])[0], 0.05)
    names = {"of trained names": all_things.drawn(trained, args.n, rng), "of held-out names": all_things.drawn(held_out, args.n, rng)}
    for kind, some in (("trained on", trained), ("held out", held_out)):
        some = some if len(some) < 1000 else rng.choice(some, 1000, replace=False)
        rows.append([f"pictures {kind}", pictures[some], [all_things.name(k) for k in some]])
    for kind, some in names.items():
        drawn[kind] = sample.generate(stack, some, args.seed, 64, args.candidates, bar=True)
        rows.append([f"drawn {kind}", drawn[kind], some])
    shown = []
    for kind, images, some in rows:
        cosines, right = embed(stack, images=images) @ z_names.T, all_things.right(some)
        shown.append([kind, str(len(images)), *(f"{found(cosines, right, most):.0%}" for most in (1, 5))])
        if kind != "pictures trained on":
            distances[kind] = nearest(images, pictures[trained])
    right = all_things.right(rows[0][2])
    table(["its own name among all %d" % len(all_things.names), "pictures", "first", "among five"],
          shown + [["by chance", "", *(f"{by_chance(right, most):.1%}" for most in (1, 5))]])
    table(["to the nearest training picture", "median", "nearest tenth", "copies"],
          [[kind, f"{d.median():.0f}", f"{d.quantile(0.1):.0f}", f"{(d < limit).double().mean():.0%}"] for kind, (d, _) in distances.items()])
    if args.pairs:
        kinds = {"pictures held out": (pictures[held_out], [all_things.name(k) for k in held_out])}
        kinds |= {f"drawn {kind}": (drawn[kind], names[kind]) for kind in names}
        pairs_sheet(kinds, distances, pictures, trained).save(args.pairs)
    if args.sheet:
        drawn_sheet(drawn, names).save(args.sheet)


# ----------------------------------------------------------------------------- sheets


def labelled(rows, side=96, columns=10):
    """A sheet of rows [(title, [(images under one another, text)])], `columns` columns."""
    font, tall = ImageFont.load_default(11), [max(len(images) for images, _ in row) for _, row in rows]
    picture = Image.new("RGB", (columns * (side + 6) + 6, sum(22 + count * (side + 3) + 34 for count in tall)), "white")
    pen, y = ImageDraw.Draw(picture), 0
    for (title, row), count in zip(rows, tall):
        pen.text((6, y + 4), title, "black", ImageFont.load_default(13))
        for k, (images, text) in enumerate(row):
            x = 6 + k * (side + 6)
            for n, image in enumerate(images):
                shown = sample.to_picture(image).resize((side, side), Image.Resampling.BICUBIC)
                picture.paste(shown, (x, y + 22 + n * (side + 3)))
            pen.multiline_text((x, y + 22 + count * (side + 3)), "\n".join(textwrap.wrap(text, 17)[:2]), "black", font, spacing=1)
        y += 22 + count * (side + 3) + 34
    return picture


def pairs_sheet(kinds, distances, pictures, trained):
    """Ten of each kind above their nearest training pictures: the nearest five of all, then five in even steps of nearness."""
    rows = []
    for kind, (images, names) in kinds.items():
        values, places = distances[kind]
        order = values.argsort().tolist()
        chosen = order[:5] + [order[k] for k in np.linspace(5, len(order) - 1, min(5, len(order[5:]))).round().astype(int)]
        rows.append((f"{kind}, above the nearest training picture: the five nearest, then to the farthest",
                     [((images[k], pictures[trained[places[k]]]), f"{values[k]:.0f}: {names[k]}") for k in chosen]))
    return labelled(rows)


def drawn_sheet(drawn, names):
    """All that was drawn, ten a row."""
    rows = []
    for kind, images in drawn.items():
        for first in range(0, len(images), 10):
            cells = [((image,), name) for image, name in zip(images[first:first + 10], names[kind][first:first + 10])]
            rows.append((f"drawn {kind}" if not first else "", cells))
    return labelled(rows)


# ----------------------------------------------------------------------------- overfitting


def subset(args):
    """Write a folder of --n pictures or a few more: whole things, drawn at random. Raises UserError."""
    if args.out.exists():
        raise UserError(f"{args.out}: exists already")
    with tempfile.TemporaryDirectory() as cache:
        data = gather(args.data, Path(cache), 1)
    things, chosen = {}, []
    for k in range(len(data.names)):
        things.setdefault(data.thing(k), []).append(k)
    for thing in np.random.default_rng(args.seed).permutation(sorted(things)):
        if len(chosen) < args.n:
            chosen += things[thing]
    part = args.out.with_name(args.out.name + ".part")
    make_out(part)
    with open(part / "metadata.jsonl", "w", encoding="utf-8") as table:
        for k in chosen:
            (part / data.names[k]).parent.mkdir(parents=True, exist_ok=True)
            (part / data.names[k]).write_bytes(read_part(data.root, *data.places[k]))
            for caption in data.captions[data.first[k]:data.first[k + 1]]:
                print(json.dumps({"file_name": data.names[k], "text": caption}), file=table)
    os.replace(part, args.out)
    print(f"{args.out}: {len(chosen)} pictures of {len({data.thing(k) for k in chosen})} things")


def curves(args):
    """Print where each training's held-out loss was lowest; draw all losses in one chart. Raises UserError."""
    lines, rows = [], []
    for colour, run in zip(LINES, args.runs):
        path = run / f"{args.stage}.csv"
        try:
            with open(path, newline="") as file:
                points = [(int(r["step"]), float(r["loss"]), float(r["held_out_loss"] or "nan")) for r in csv.DictReader(file)]
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{path}: not a training's table ({error})") from None
        held_out = [(step, loss) for step, _, loss in points if loss == loss]
        if not held_out:
            raise UserError(f"{path}: no held-out loss is in it")
        best, last = min(held_out, key=lambda point: point[1]), held_out[-1]
        after = float(np.mean([loss for _, loss, _ in points[-5:]]))
        rows.append([run.name, str(last[0]), f"{after:.4f}", f"{last[1]:.4f}", f"{best[1]:.4f}", str(best[0])])
        lines += [(f"{run.name}, training", colour, [(step, loss) for step, loss, _ in points], 1),
                  (f"{run.name}, held out", colour, held_out, 3)]
    table(["training", "steps", "training loss at the end", "held-out loss at the end", "its lowest", "at step"], rows)
    if args.picture:
        plot_lines(lines, args.picture)


def parse_arguments():
    """The command line's options. Raises UserError."""
    parser = argparse.ArgumentParser(description="Measure networks trained on a small captioned folder: retrieval, names, copies, overfitting.")
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("measure", help="retrieval, names and copies, as tables and sheets").add_argument
    add("data", type=Path, metavar="FOLDER", help="the folder that was trained on")
    add("--weights", type=Path, required=True, metavar="DIR", help="folder of clip.pt, prior.pt and decoder.pt")
    add("--clip", metavar="PATH", help="their CLIP, if it is not that folder's clip.pt")
    add("--n", type=int, default=64, help="names to draw, of each kind (default 64)")
    add("--candidates", type=int, default=1, help="pictures drawn at most for each, as in sample.py (default 1)")
    add("--seed", type=int, default=0)
    add("--pairs", type=Path, metavar="PNG", help="draw pictures above their nearest training pictures")
    add("--sheet", type=Path, metavar="PNG", help="draw all that was drawn")
    add("--device", default="auto", help="auto, cuda, mps or cpu")
    add = commands.add_parser("subset", help="a folder of some of the things").add_argument
    add("data", type=Path, metavar="FOLDER", help="a folder with metadata.jsonl, as data/emoji.py writes it")
    add("--n", type=int, required=True, help="pictures")
    add("--out", type=Path, required=True, metavar="FOLDER")
    add("--seed", type=int, default=0)
    add = commands.add_parser("curves", help="losses of several trainings in one chart").add_argument
    add("runs", type=Path, nargs="+", metavar="DIR", help="folders of trainings")
    add("--stage", default="decoder", help="default decoder")
    add("--picture", type=Path, metavar="PNG", help="the chart")
    args = parser.parse_args()
    if not 1 <= getattr(args, "n", 1) <= 1_000_000:
        raise UserError(f"--n {args.n}: must be between 1 and 1000000")
    return args


def main():
    with one_line_errors(), torch.no_grad():
        args = parse_arguments()
        {"measure": measure, "subset": subset, "curves": curves}[args.command](args)


if __name__ == "__main__":
    main()
