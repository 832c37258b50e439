"""What the experiments on the paper's claims share: pictures read back, numbers with standard errors, conclusions, charts.

An observation is one picture, read: {"said": the parsed caption, "found": the scene read from pixels, "right": verdicts,
"image": (3, 64, 64) in [-1, 1]}. An experiment gathers, for each of its settings, one list of observations a seed; the same
captions and the same noise serve every setting, so that differences are the setting's. Every number is then a list of
jackknife pseudo-values, one a seed, whose mean and standard error are the number's own.
"""

import argparse
import json
import math
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import decoder
import prior
import sample
from caption_accuracy import judge, parse_caption, read_scene, relation_of, scene_of
from clip_embed import UserError, fingerprint, load_model, read_checkpoint
from manipulate import draw_strip, in_batches
from manipulations import to_images
from priors import cell, frechet
from train import BACKGROUNDS, COLOURS, FILLS, SHAPES, SIZES

NETWORKS = {"prior": (prior.DiffusionPrior, prior.PriorConfig), "ar-prior": (prior.ARPrior, prior.ARConfig),
            "decoder": (decoder.Decoder, decoder.DecoderConfig)}
LINES = ("royalblue", "darkorange", "seagreen", "crimson", "purple", "gray")

# ----------------------------------------------------------------------------- settings


def options(description, n, of, steps=20):
    """The command line that the experiments have in common; `of` says what --n counts for each seed."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--n", type=int, default=n, help=f"{of}, for each seed (default {n})")
    parser.add_argument("--seeds", type=int, default=5, help="how often, with other captions, scenes and noise (default 5)")
    parser.add_argument("--steps", type=int, default=steps, help=f"of the decoder (default {steps})")
    parser.add_argument("--weights", type=Path, default=sample.SHIPPED, metavar="DIR", help="folder of checkpoints")
    parser.add_argument("--json", type=Path, help="file for each seed's numbers")
    parser.add_argument("--picture", type=Path, metavar="PNG", help="where the picture goes")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    return parser


def parse(parser):
    """The command line's options. Raises UserError."""
    args = parser.parse_args()
    for name, low, high in (("n", 2, 100_000), ("seeds", 2, 1000), ("steps", 2, 950)):
        if not low <= getattr(args, name) <= high:
            raise UserError(f"--{name} {getattr(args, name)}: must be between {low} and {high}")
    return args


def load_network(path, stage, stack, given=None):
    """The network in a checkpoint of train.py, beside a stack whose CLIP it must have been trained with. Raises UserError.

    given: what a decoder must have been trained on, in place of z_i (train.py --given).
    """
    checkpoint = read_checkpoint(path, stage, clip=(fingerprint(stack["clip"]), "that of --weights"))
    if given and checkpoint.get("given") != given:
        raise UserError(f"{path}: was not trained with --given {given}")
    return load_model(*NETWORKS[stage], checkpoint, path).to(stack["clip"].logit_scale.device, memory_format=torch.channels_last)


# ----------------------------------------------------------------------------- pictures


def noises(stage, seed, n):
    """n generators for a stage, no two alike over seeds and pictures."""
    return sample.generators(stage, seed << 24, range(n))


def draw(stack, captions, seed, kind, guidance=None, steps=None):
    """z_i (n, d) for n captions: from the "diffusion" or the "ar" prior, z_t in its place ("text"), or zeros ("none")."""
    noise = noises("prior", seed, len(captions))

    def run(some, text, null):
        if kind == "diffusion":
            return prior.sample(stack["prior"], text, null, noise[some], guidance, steps)
        if kind == "ar":
            return prior.ar_sample(stack["ar-prior"], text, null, noise[some], 1.0 if guidance is None else guidance)
        return text["z_t"] * (kind == "text")

    return in_batches(stack, captions, run)


def decode(stack, z_i, captions, seed, guidance=None, steps=None):
    """Images (n, 3, 64, 64) in [-1, 1] of z_i (n, d) and n captions, ancestral, each from noise of its own."""
    noise, device = noises("decoder", seed, len(captions)), stack["clip"].logit_scale.device
    return in_batches(stack, captions, lambda some, text, null: decoder.sample(
        stack["decoder"], z_i[some].to(device), text, null, noise[some], guidance, steps))


def observe(images, captions):
    """Observations of images (n, 3, 64, 64) of n captions, read from their pixels."""
    result = []
    for image, caption in zip(images, captions):
        said, found = parse_caption(caption), read_scene(sample.to_picture(image))
        result.append({"said": said, "found": found, "right": judge(found, said), "image": image})
    return result


def true_scenes(captions, seed):
    """A scene of the world for each caption, what it leaves open drawn as training draws it."""
    return [scene_of(parse_caption(caption), np.random.default_rng([seed, 1 << 53, k])) for k, caption in enumerate(captions)]


# ----------------------------------------------------------------------------- what is measured


def right(attribute):
    """The statistic that says how often an attribute is right, of the observations whose captions say it."""
    def share(observations):
        verdicts = [o["right"][attribute] for o in observations if attribute in o["right"]]
        return float(np.mean(verdicts)) if verdicts else math.nan
    return share


def attributes(scene):
    """What a scene shows as a vector (26,): how many things, of each shape, colour, size, fill; background; mean place, radius.

    Lengths are scaled so that a quarter of the side in place, or the step from small to large, weighs as much as one attribute.
    """
    count = lambda name, values: [sum(getattr(t, name) == v for t in scene.things) for v in values]
    mean = lambda name: float(np.mean([getattr(t, name) for t in scene.things])) if scene.things else 0.0
    return torch.tensor([len(scene.things), *count("shape", (*SHAPES, None)), *count("colour", COLOURS), *count("size", SIZES),
                         *count("fill", FILLS), *(scene.background == b for b in BACKGROUNDS),
                         4 * mean("x"), 4 * mean("y"), 10 * mean("radius")], dtype=torch.float64)


def random_features(images):
    """Features (n, 32) of images (n, 3, 64, 64): mean outputs of three convolutions with fixed random weights.

    Each filter sums to zero in every channel, so that it answers to edges and grain: the background the reader sees.
    """
    generator, h = torch.Generator().manual_seed(0), images
    for channels, wide in ((3, 16), (16, 32), (32, 32)):
        weight = torch.randn(wide, channels, 5, 5, generator=generator) * (2 / (25 * channels)) ** 0.5
        h = F.relu(F.conv2d(h, weight - weight.mean((2, 3), keepdim=True), stride=2))
    return h.mean((2, 3)).double()


def fidelity(captions, seed=0, least=1000):
    """Two statistics of observations, {"distance, attributes", "distance, features"}: Fréchet distances to true renderings.

    Of what the reader reads, and of random features in units of their true deviation, all of them together. The renderings are
    of the captions, of each as many, and at least so many.
    """
    scenes = true_scenes(captions * -(-least // len(captions)), seed)
    features = random_features(to_images(scenes))
    unit, shown = features.var(0).sum().sqrt(), torch.stack([attributes(scene) for scene in scenes])
    return {"distance, attributes": lambda seen: frechet(torch.stack([attributes(o["found"]) for o in seen]), shown),
            "distance, features": lambda seen: frechet(random_features(torch.stack([o["image"] for o in seen])) / unit,
                                                      features / unit)}


def matched(said, found):
    """A read scene's things in the order of a parsed caption's, by their shapes, or the only one; None where they can't be told."""
    shapes = {thing.shape: thing for thing in found.things}
    if len(said.things) == len(found.things) == 1:
        return found.things
    told = len(said.things) == len(found.things) and {thing.shape for thing in said.things} == set(shapes)
    return [shapes[thing.shape] for thing in said.things] if told and len(shapes) == len(found.things) else None


def variety(pairs):
    """How two pictures of a caption differ in what it leaves open, {"attribute, number of things": a number for each comparison}.

    Of background, relation, colour, size and fill: whether they do. Of place, radius (within a size) and tilt: half the square of
    the difference, whose mean is the variance.
    """
    parts = {}
    for a, b in pairs:
        said, count = a["said"], len(a["said"].things)
        add = lambda name, value: parts.setdefault(f"{name}, {count}", []).append(float(value))
        if not said.background:
            add("background", a["found"].background != b["found"].background)
        one, other = matched(said, a["found"]), matched(said, b["found"])
        if not one or not other:
            continue
        if count == 2 and not said.relation:
            add("relation", relation_of(*one) != relation_of(*other))
        for t, u, v in zip(said.things, one, other):
            for name in ("colour", "size", "fill"):
                if not getattr(t, name):
                    add(name, getattr(u, name) != getattr(v, name))
            add("place", ((u.x - v.x) ** 2 + (u.y - v.y) ** 2) / 2)
            if u.size == v.size:
                add("radius", (u.radius - v.radius) ** 2 / 2)
            if u.shape == v.shape != "circle":
                add("tilt", (u.tilt - v.tilt) ** 2 / 2)
    return parts


def diversity(captions, least=2000):
    """The statistic of pairs of observations, two of one caption: the mean of variety's comparisons, as shares of the world's.

    1 where pictures are as varied as true scenes of their captions, 0 where they are all alike.
    """
    captions = captions * -(-least // len(captions))
    scenes = zip(*(true_scenes(captions, seed) for seed in range(2)))
    world = variety([[{"said": parse_caption(c), "found": s} for s in two] for c, two in zip(captions, scenes)])
    world = {name: np.mean(values) for name, values in world.items()}

    def share(pairs):
        shares = [value / world[name] for name, values in variety(pairs).items() if world.get(name) for value in values]
        return float(np.mean(shares)) if shares else math.nan
    return share


def quality(captions):
    """Table 1's three questions about these captions: a function of lists of pairs of observations, one a seed.

    It gives {column: pseudo-values}: Fréchet distances for fidelity, captions all right, diversity.
    """
    columns, share = {"all right": right("all"), **fidelity(captions)}, diversity(captions)

    def measured(groups):
        flat = [[o for pair in pairs for o in pair] for pairs in groups]
        return {name: jackknife(statistic, flat) for name, statistic in columns.items()} | {"diversity": jackknife(share, groups)}
    return measured


# ----------------------------------------------------------------------------- statistics


def jackknife(statistic, groups):
    """Pseudo-values of statistic(observations), one for each seed's list in `groups` (Tukey 1958).

    S θ − (S − 1) θ without seed k: their mean is θ less its bias of order 1/n, their spread gives θ's standard error; of a
    plain mean over equally many observations they are the seeds' own means.
    """
    joined = lambda groups: [observation for group in groups for observation in group]
    whole, count = statistic(joined(groups)), len(groups)
    return [count * whole - (count - 1) * statistic(joined(groups[:k] + groups[k + 1:])) for k in range(count)]


@lru_cache
def t_quantile(freedom):
    """What 95% of Student's t with so many degrees of freedom stay within (2.776 for 4): its density, integrated by steps."""
    t = np.linspace(0, 40, 400_001)
    density = (1 + t ** 2 / freedom) ** (-(freedom + 1) / 2)
    density *= math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    inside = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) * (t[1] - t[0]))])  # of both tails
    return float(t[np.searchsorted(inside, 0.95)])


def conclude(what, a, b, more="more", less="less"):
    """One sentence: is a above b, lists of one number a seed, or b one number? As the 95% interval of the difference has it."""
    difference = np.array(a, float) - np.array(b, float)
    mean, error = difference.mean(), difference.std(ddof=1) / len(difference) ** 0.5
    if math.isnan(mean):
        return f"{what}: cannot be told, too little could be read."
    reach = t_quantile(len(difference) - 1) * error
    verdict = f"{more if mean > 0 else less}" if abs(mean) > reach else "no difference shown"
    return f"{what}: {verdict} ({mean:+.3f} ± {error:.3f}; 95% interval {mean - reach:+.3f} to {mean + reach:+.3f})."


# ----------------------------------------------------------------------------- output


def show(rows, head=""):
    """A Markdown table of {row: {column: one number a seed}}, mean ± standard error."""
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


def chart(panels):
    """A picture of lines with one standard error up and down, from 0: {title: {name: [(label, mean, error)]}} side by side."""
    width, height, left, top, bottom = 420, 320, 46, 30, 60
    picture = Image.new("RGB", (width * len(panels), height), "white")
    pen = ImageDraw.Draw(picture)
    for n, (title, lines) in enumerate(panels.items()):
        most = max([1e-9, *(mean + error for points in lines.values() for _, mean, error in points if not math.isnan(mean))])
        most = 1 if 0.5 < most <= 1 else most
        count = max(len(points) for points in lines.values())
        to_xy = lambda k, value: (n * width + left + 20 + (width - left - 60) * k / max(1, count - 1),
                                  top + (height - top - bottom) * (1 - max(0, value) / most))
        pen.text((n * width + left, 8), title, "black")
        for k, (label, *_) in enumerate(max(lines.values(), key=len)):
            pen.text((to_xy(k, 0)[0], height - bottom + 8), str(label), "black", anchor="ma")
        for value in np.linspace(0, most, 6):
            y = to_xy(0, value)[1]
            pen.line([(n * width + left, y), ((n + 1) * width - 20, y)], "gainsboro")
            pen.text((n * width + 8, y - 6), f"{value:.2g}", "black")
        for row, (colour, (name, points)) in enumerate(zip(LINES, lines.items())):
            points = [(k, *point) for k, point in enumerate(points) if not math.isnan(point[1])]
            pen.line([to_xy(k, mean) for k, _, mean, _ in points], colour, 2)
            for k, _, mean, error in points:
                pen.line([to_xy(k, mean - error), to_xy(k, mean + error)], colour, 2)
            pen.text((n * width + left + 8 + 120 * (row % 3), height - 32 + 14 * (row // 3)), name, colour)
    return picture


def first_pictures(images):
    """Up to eight pictures of each row of {name: images (n, 3, H, H)}, named, the rows one under the other."""
    return draw_strip([[(name, image) for image in some[:8]] for name, some in images.items()])


def under(*pictures):
    """Pictures one under the other, as one."""
    sheet = Image.new("RGB", (max(p.width for p in pictures), sum(p.height for p in pictures)), "white")
    for k, picture in enumerate(pictures):
        sheet.paste(picture, (0, sum(p.height for p in pictures[:k])))
    return sheet


def points(rows, column):
    """A chart's line through the rows of one column: [(label, mean, error)] of {label: {column: one number a seed}}."""
    return [(label, float(np.mean(row[column])), float(np.std(row[column], ddof=1) / len(row[column]) ** 0.5))
            for label, row in rows.items()]
