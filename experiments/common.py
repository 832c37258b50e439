"""Shared by the experiments on the paper's claims: pictures, standard errors, conclusions, charts.

An observation is one picture and its reading: {"asked": the parsed caption, "found": the scene read
from pixels, "right": verdicts, "image": (3, 64, 64) in [-1, 1]}. An experiment collects one list of
observations per seed, for each of its settings. All settings share captions and noise, so only the
setting makes a difference. Each number becomes a list of jackknife pseudo-values, one per seed.
Their mean and standard error are those of the number. Seeds begin at 1, because guidance and steps of
the shipped weights were chosen on captions of seed 0. The standard errors are those of captions, scenes
and noise; each network was trained once.
"""

import argparse
import json
import math
import sys
import textwrap
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import decoder
import prior
import sample
from caption_accuracy import judge, parse_caption, read_scene, relation_of, scene_of
from clip_embed import UserError, encode_captions, pick_device
from weights.checkpoints import fingerprint, load_model, read_checkpoint
from sample import BATCH, in_batches, rows
from manipulations import to_images
from priors import cell, frechet
from data.shapes import BACKGROUNDS, COLOURS, FILLS, RADII, SHAPES, phrase  # noqa: F401, phrase: for the scripts

NETWORKS = {"prior": (prior.DiffusionPrior, prior.PriorConfig), "ar-prior": (prior.ARPrior, prior.ARConfig),
            "decoder": (decoder.Decoder, decoder.DecoderConfig)}
OPEN = "a heart"  # the caption of the pictures in the sheets
GUIDANCE = 1.25  # of the decoder, where an experiment doesn't vary it: the paper's for table 2
SHOWN = 5  # pictures in a row of a sheet, which is then 800 pixels wide
LINES = ("royalblue", "darkorange", "seagreen", "crimson", "purple", "gray")

# ----------------------------------------------------------------------------- settings


def options(description, n, of):
    """The command line of the experiments; `of` names the things that --n counts for each seed."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--n", type=int, default=n, help=f"{of}, for each seed (default {n})")
    parser.add_argument("--seeds", type=int, default=5,
                        help="repetitions with other captions, scenes and noise (default 5)")
    parser.add_argument("--steps", type=int, default=10, help="steps of the decoder (default 10)")
    parser.add_argument("--weights", type=Path, default=sample.SHIPPED, metavar="DIR", help="folder of checkpoints")
    parser.add_argument("--json", type=Path, help="file for each seed's numbers")
    parser.add_argument("--picture", type=Path, metavar="PNG", help="file for the picture")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    parser.add_argument("--precision", default="float32", choices=sample.PRECISIONS, help="as in sample.py (default float32)")
    return parser


def parse(parser):
    """The command line's options. Raises UserError."""
    args = parser.parse_args()
    for name, low, high in (("n", 2, 100_000), ("seeds", 2, 1000), ("steps", 2, 950)):
        if not low <= getattr(args, name) <= high:
            raise UserError(f"--{name} {getattr(args, name)}: must be between {low} and {high}")
    for path in filter(None, (args.json, args.picture)):
        path.parent.mkdir(parents=True, exist_ok=True)  # now, not after ten minutes
    return args


def seeds(args):
    """The seeds, with a progress bar."""
    return tqdm(range(1, args.seeds + 1), "seeds")


def load(args, **options):
    """The networks of --weights, as sample.load_stack gives them. Raises UserError."""
    return sample.load_stack(args.weights, pick_device(args.device), precision=args.precision, **options)


def load_network(path, stage, stack, given=None):
    """The network of a checkpoint, trained with the stack's CLIP. Raises UserError.

    given: the input that replaced z_i in a decoder's training (train.py --given).
    """
    checkpoint = read_checkpoint(path, stage, clip=(fingerprint(stack["clip"]), "that of --weights"))
    if given and checkpoint.get("given") != given:
        raise UserError(f"{path}: was not trained with --given {given}")
    network = load_model(*NETWORKS[stage], checkpoint, path)
    return network.to(stack["clip"].logit_scale.device, stack.dtype, memory_format=torch.channels_last)


# ----------------------------------------------------------------------------- pictures


def noises(stage, seed, n):
    """n generators for a stage, different for each seed and picture."""
    return sample.generators(stage, seed << 24, range(n))


def draw(stack, captions, seed, kind, guidance=None, steps=None, candidates=2):
    """z_i (n, d) for n captions.

    kind: a prior's z_i ("diffusion", "ar"), z_t in its place ("text"), or zeros ("none").
    candidates: the diffusion prior's draws, of which the nearest to z_t is kept.
    """
    text, null = encode_captions(stack["clip"], stack["tokenizer"], captions)
    if kind in ("text", "none"):
        return text["z_t"].cpu() * (kind == "text")
    noise = noises("prior", seed, len(captions))

    def run(some):
        some_text, some_noise = rows(text, some), noise[some]
        if kind == "diffusion":
            return prior.sample(stack["prior"], some_text, null, some_noise, guidance, steps, candidates)
        return prior.ar_sample(stack["ar-prior"], some_text, null, some_noise, 1.0 if guidance is None else guidance)

    return in_batches(stack[sample.PRIORS[kind]], len(captions), BATCH[64], run)


def decode(stack, z_i, captions, seed, guidance=GUIDANCE, steps=None):
    """Images (n, 3, 64, 64) in [-1, 1] of z_i (n, d) and n captions.

    Ancestral sampling; each image has its own noise. guidance, steps: None for the network's own.
    """
    noise, device = noises("decoder", seed, len(captions)), stack["clip"].logit_scale.device
    text, null = encode_captions(stack["clip"], stack["tokenizer"], captions)
    return in_batches(stack["decoder"], len(captions), BATCH[64], lambda some: decoder.sample(
        stack["decoder"], z_i[some].to(device), rows(text, some), null, noise[some], guidance, steps))


def observe(images, captions):
    """Observations of images (n, 3, 64, 64) of n captions, read from their pixels."""
    result = []
    for image, caption in zip(images, captions):
        asked, found = parse_caption(caption), read_scene(sample.to_picture(image))
        result.append({"asked": asked, "found": found, "right": judge(found, asked), "image": image})
    return result


def true_scenes(captions, seed):
    """A scene of the world for each caption. Open attributes are drawn as in training."""
    return [scene_of(parse_caption(caption), np.random.default_rng([seed, 1 << 53, k])) for k, caption in enumerate(captions)]


# ----------------------------------------------------------------------------- measures


def right(attribute):
    """The column of an attribute: how often it is right if the caption names it (see jackknife)."""
    def share(observations):
        verdicts = [o["right"][attribute] for o in observations if attribute in o["right"]]
        return float(np.mean(verdicts)) if verdicts else math.nan
    return partial(jackknife, share)


def attributes(scene):
    """A scene as a vector (26,).

    The number of things; the number of each shape, colour, size and fill; the background; mean
    place and radius. Lengths are scaled: a quarter of the side in place weighs as much as one
    attribute, and so does the step from small to large.
    """
    count = lambda name, values: [sum(getattr(t, name) == v for t in scene.things) for v in values]
    mean = lambda name: float(np.mean([getattr(t, name) for t in scene.things])) if scene.things else 0.0
    return torch.tensor([len(scene.things), *count("shape", (*SHAPES, None)), *count("colour", COLOURS), *count("size", RADII),
                         *count("fill", FILLS), *(scene.background == b for b in BACKGROUNDS),
                         4 * mean("x"), 4 * mean("y"), 10 * mean("radius")], dtype=torch.float64)


def random_features(images):
    """Features (n, 32) of images (n, 3, 64, 64): mean outputs of three convolutions with fixed random weights.

    Each filter sums to zero in every channel, so it responds to edges and grain. The reader already
    sees the background.
    """
    generator, h = torch.Generator().manual_seed(0), images
    for channels, wide in ((3, 16), (16, 32), (32, 32)):
        weight = torch.randn(wide, channels, 5, 5, generator=generator) * (2 / (25 * channels)) ** 0.5
        h = F.relu(F.conv2d(h, weight - weight.mean((2, 3), keepdim=True), stride=2))
    return h.mean((2, 3)).double()


def fidelity(captions, least=1000):
    """Two columns of Fréchet distances to true renderings of the same captions.

    "distance, attributes" compares the attributes that the reader sees. "distance, features"
    compares random features, in units of the deviation of all true features together. captions: one
    list per seed. Each caption is rendered equally often, with at least `least` renderings in all.
    The jackknife leaves a seed out of both sides. Otherwise pictures that follow their captions
    would gain, and others would lose.
    """
    scenes = [true_scenes(some * -(-least // sum(map(len, captions))), 3000 + seed) for seed, some in enumerate(captions)]
    features = [list(random_features(to_images(some))) for some in scenes]
    unit, shown = torch.stack(sum(features, [])).var(0).sum().sqrt(), [list(map(attributes, some)) for some in scenes]
    features_of = lambda observed: random_features(torch.stack([o["image"] for o in observed])) / unit
    return {"distance, attributes": lambda groups: jackknife(lambda observed, true: frechet(
                torch.stack([attributes(o["found"]) for o in observed]), torch.stack(true)), groups, shown),
            "distance, features": lambda groups: jackknife(lambda observed, true: frechet(
                features_of(observed), torch.stack(true) / unit), groups, features)}


def matched(asked, found):
    """The found things in the caption's order, by their shapes.

    None unless the scene shows exactly the caption's shapes.
    """
    wanted, shapes = [thing.shape for thing in asked.things], {thing.shape: thing for thing in found.things}
    clear = sorted(wanted) == sorted(str(thing.shape) for thing in found.things) and len(shapes) == len(wanted)
    return [shapes[shape] for shape in wanted] if clear else None


def variety(pairs):
    """How two pictures of a caption differ in the attributes that it leaves open.

    Returns {"attribute, number of things": one number per comparison}. For background, relation,
    colour, size and fill the number is 1 if they differ, else 0. For place, radius (within a size)
    and tilt it is half the squared difference, whose mean is the variance. Only pairs count in
    which both pictures show the caption's shapes.
    """
    parts = {}
    for a, b in pairs:
        asked, count = a["asked"], len(a["asked"].things)
        add = lambda name, value: parts.setdefault(f"{name}, {count}", []).append(float(value))
        one, other = matched(asked, a["found"]), matched(asked, b["found"])
        if not one or not other:
            continue
        if not asked.background:
            add("background", a["found"].background != b["found"].background)
        if count == 2 and not asked.relation:
            add("relation", relation_of(*one) != relation_of(*other))
        for t, u, v in zip(asked.things, one, other):
            for name in ("colour", "size", "fill"):
                if not getattr(t, name):
                    add(name, getattr(u, name) != getattr(v, name))
            add("place", ((u.x - v.x) ** 2 + (u.y - v.y) ** 2) / 2)
            if u.size == v.size:
                add("radius", (u.radius - v.radius) ** 2 / 2)
            if u.shape != "circle":
                add("tilt", (u.tilt - v.tilt) ** 2 / 2)
    return parts


def diversity(captions, least=2000):
    """The diversity statistic of pairs of observations, two per caption, as a share of the world's.

    1 if the pictures vary as much as true scenes of their captions, 0 if all are alike. The world's
    variety comes from at least `least` pairs of scenes, and the jackknife takes it as exact.
    variety's comparisons are averaged first for each attribute and number of things, then over
    these. So all weigh the same, whatever the number of readable pictures.
    """
    captions = captions * -(-least // len(captions))
    scenes = zip(*(true_scenes(captions, seed) for seed in range(2)))
    world = variety([[{"asked": parse_caption(c), "found": s} for s in two] for c, two in zip(captions, scenes)])
    world = {name: np.mean(values) for name, values in world.items()}

    def share(pairs):
        shares = [np.mean(values) / world[name] for name, values in variety(pairs).items() if world.get(name)]
        return float(np.mean(shares)) if shares else math.nan
    return share


def quality(captions):
    """Table 1's three questions: a function of lists of pairs of observations, one list per seed.

    captions: one list per seed. The function returns {column: pseudo-values}: captions all right,
    Fréchet distances for fidelity, diversity, and the share of pairs that diversity can compare.
    """
    columns, share = {"all right": right("all"), **fidelity(captions)}, diversity(sum(captions, []))
    readable = lambda pairs: float(np.mean([all(matched(o["asked"], o["found"]) is not None for o in pair) for pair in pairs]))

    def measured(groups):
        flat = [[o for pair in pairs for o in pair] for pairs in groups]
        return {name: column(flat) for name, column in columns.items()} | {
            "diversity": jackknife(share, groups), "pairs compared": jackknife(readable, groups)}
    return measured


# ----------------------------------------------------------------------------- statistics


def jackknife(statistic, *groups):
    """Pseudo-values of statistic(observations), one for each seed's list in `groups` (Tukey 1958).

    With several groups, the statistic has several arguments, and a seed is left out of all. The
    pseudo-value is S θ − (S − 1) θ without seed k. The mean is θ less its bias of order 1/n; the
    spread gives the standard error of θ. For a plain mean over equally many observations the
    pseudo-values are the seeds' means.
    """
    without = lambda k: statistic(*([o for n, some in enumerate(group) if n != k for o in some] for group in groups))
    whole, count = without(None), len(groups[0])
    return [count * whole - (count - 1) * without(k) for k in range(count)]


@lru_cache
def t_quantile(freedom):
    """The bound on |t| of 95% of Student's t, by its degrees of freedom (2.776 for 4).

    The density is integrated numerically.
    """
    t = np.linspace(0, 40, 400_001)
    density = (1 + t ** 2 / freedom) ** (-(freedom + 1) / 2)
    density *= math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    inside = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) * (t[1] - t[0]))])  # of both tails
    return float(t[np.searchsorted(inside, 0.95)])


def conclude(what, a, b, more="more", less="less"):
    """One sentence: is a above b, by the 95% interval of the difference?

    a, b: lists of one number per seed; b can be one number.
    """
    difference = np.array(a, float) - np.array(b, float)
    mean, error = difference.mean(), difference.std(ddof=1) / len(difference) ** 0.5
    if math.isnan(mean):
        return f"{what}: cannot be told, too little could be read."
    reach = t_quantile(len(difference) - 1) * error
    if error < 1e-12:
        return f"{what}: the same difference in every seed ({mean:+.3f}), so there is no interval."
    verdict = f"{more if mean > 0 else less}" if abs(mean) > reach + 1e-9 else "no difference shown"
    return f"{what}: {verdict} ({mean:+.3f} ± {error:.3f}; 95% interval {mean - reach:+.3f} to {mean + reach:+.3f})."


# ----------------------------------------------------------------------------- output


def show(rows, head=""):
    """Print a Markdown table of {row: {column: one number per seed}}: mean ± standard error."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    print(f"| {head} | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for name, row in rows.items():
        print(f"| {name} | {' | '.join(cell(row[c]) if c in row else '–' for c in columns)} |")
    print(flush=True)


def finish(args, conclusions, picture, **numbers):
    """Print the conclusions; write the numbers to --json and the picture to --picture."""
    print(*conclusions, sep="\n")
    if args.json:
        settings = {k: v if isinstance(v, (int, float, list, type(None))) else str(v) for k, v in vars(args).items()}
        text = json.dumps({"settings": settings, **numbers, "conclusions": conclusions})
        numbers = json.loads(text, parse_constant=lambda _: None)  # JSON knows no NaN: null
        args.json.write_text(json.dumps(numbers, indent=1, ensure_ascii=False), "utf-8")
    if args.picture:
        picture.save(args.picture)


def panel(title, lines):
    """One panel of a chart. lines: {name: [(label, mean, error)]}."""
    width, height, left, top, bottom, font = 400, 330, 46, 34, 64, ImageFont.load_default(13)
    picture = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(picture)
    ends = [mean + sign * error for points in lines.values() for _, mean, error in points if not math.isnan(mean) for sign in (-1, 1)]
    least, most = min([0, *ends]), max([1e-9, *ends])
    least, most = 0 if least > -1e-9 else least, 1 if 0.5 < most <= 1 else most
    count = max(len(points) for points in lines.values())
    to_xy = lambda k, value: (left + 20 + (width - left - 60) * k / max(1, count - 1),
                              top + (height - top - bottom) * (most - value) / (most - least))
    pen.text((left, 8), title, "black", font)
    for k, (label, *_) in enumerate(max(lines.values(), key=len)):
        pen.text((to_xy(k, 0)[0], height - bottom + 6), str(label), "black", font, anchor="ma")
    for value in np.linspace(least, most, 6):
        y = to_xy(0, value)[1]
        pen.line([(left, y), (width - 20, y)], "gainsboro")
        pen.text((8, y), f"{value:.2g}", "black", font, anchor="lm")
    for row, (colour, (name, points)) in enumerate(zip(LINES, lines.items())):
        points = [(k, *point) for k, point in enumerate(points) if not math.isnan(point[1])]
        pen.line([to_xy(k, mean) for k, _, mean, _ in points], colour, 2)
        for k, _, mean, error in points:
            pen.line([to_xy(k, mean - error), to_xy(k, mean + error)], colour, 2)
        pen.text((left + 8 + 110 * (row % 3), height - 38 + 17 * (row // 3)), name, colour, font)
    return picture


def chart(panels):
    """Panels of lines, two in a row, with one standard error up and down.

    panels: {title: {name: [(label, mean, error)]}}. Each panel's axis includes 0.
    """
    drawn = [panel(title, lines) for title, lines in panels.items()]
    width, height = drawn[0].size
    picture = Image.new("RGB", (width * min(2, len(drawn)), height * -(-len(drawn) // 2)), "white")
    for n, one in enumerate(drawn):
        picture.paste(one, (n % 2 * width, n // 2 * height))
    return picture


def gallery(rows, heads=()):
    """Pictures in rows, the first SHOWN of {name: images (n, 3, H, H)}, with the name at the left.

    heads: one text above each column, such as a caption.
    """
    side, margin, font = 128, 150, ImageFont.load_default(13)
    heads = [textwrap.wrap(head, 18) for head in heads[:SHOWN]]
    top, columns = 6 + 16 * max(map(len, heads), default=0), min(SHOWN, max(len(images) for images in rows.values()))
    picture = Image.new("RGB", (margin + columns * (side + 4), top + len(rows) * (side + 4)), "white")
    pen = ImageDraw.Draw(picture)
    for column, lines in enumerate(heads[:columns]):
        pen.multiline_text((margin + column * (side + 4) + side / 2, 2), "\n".join(lines), "black", font, anchor="ma", align="center")
    for row, (name, images) in enumerate(rows.items()):
        y = top + row * (side + 4)
        pen.multiline_text((6, y + side / 2), "\n".join(textwrap.wrap(name, 19)), "black", font, anchor="lm")
        for column, image in enumerate(images[:columns]):
            picture.paste(sample.to_picture(image).resize((side, side), Image.Resampling.NEAREST), (margin + column * (side + 4), y))
    return picture


def under(*pictures):
    """One picture of several, one under the other."""
    sheet = Image.new("RGB", (max(p.width for p in pictures), sum(p.height for p in pictures)), "white")
    for k, picture in enumerate(pictures):
        sheet.paste(picture, (0, sum(p.height for p in pictures[:k])))
    return sheet


def points(rows, column):
    """A chart's line [(label, mean, error)] of one column.

    rows: {label: {column: one number per seed}}.
    """
    return [(label, float(np.mean(row[column])), float(np.std(row[column], ddof=1) / len(row[column]) ** 0.5))
            for label, row in rows.items()]
