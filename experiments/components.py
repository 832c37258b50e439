"""Which attributes of a picture come back first as z_i gets more principal components? (§4, fig. 7)

In:   a folder of checkpoints (clip.pt, decoder.pt)
Out:  on stdout, a table: for each number of components how often pictures of one thing, decoded from fresh noise, show its
      colour, shape, size, fill, background, and its place to within a tenth of the side; how early each comes; then the
      conclusions. --picture: eight pictures, more and more components from top to bottom, over the curves

Components are those of 2,048 scenes' z_i. How early: the mean, over the numbers of components, of the share that is gained over
none at all, of all that is gained in the end: 1 for what the first component holds alone. Shares are a decoder's: what z_i holds
and the decoder does not draw is not counted. As in manipulate.py the decodings are DDIM's, unguided, elsewhere here they are ancestral
and guided.

    python experiments/components.py --picture docs/components.png
"""

import math
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import prior
import sample
from caption_accuracy import read_scene
from clip_embed import one_line_errors, pick_device
from common import chart, conclude, finish, gallery, jackknife, noises, options, parse, points, seeds, show, to_images, under
from decoder import randn
from manipulate import pca_reconstruct
from manipulations import scenes_of
from priors import embed
from data.shapes import random_scene

ATTRIBUTES = ("colour", "shape", "size", "fill", "background", "place")
QUESTIONS = (("colour", "shape"), ("colour", "place"), ("place", "shape"))  # chosen before the answers
NEAR = 0.1  # of the side
FITTED = 2048  # scenes


def recovered(scene, found):
    """{attribute: whether a read scene has it as the scene of one thing has} (place: to within NEAR)."""
    thing = scene.things[0]
    other = found.things[0] if len(found.things) == 1 else None
    return {name: other is not None and getattr(other, name) == getattr(thing, name) for name in ATTRIBUTES[:4]} | {
        "background": found.background == scene.background,
        "place": other is not None and math.hypot(other.x - thing.x, other.y - thing.y) < NEAR}


def earliness(name):
    """The statistic of observations, each a list of recovered's over growing numbers of components from 0: the mean share gained.

    NaN where nothing is gained in the end, or by less than two standard errors.
    """
    def share(observations):
        rates = np.mean([[found[name] for found in each] for each in observations], 0)
        gain, variance = rates[-1] - rates[0], rates[-1] * (1 - rates[-1]) + rates[0] * (1 - rates[0])
        error = math.sqrt(variance / len(observations))
        return float((rates[1:] - rates[0]).mean() / gain) if gain > 2 * error else math.nan
    return share


def measure(stack, args):
    """({components: {attribute: pseudo-values}}, {attribute: {"how early"}}, {row: images of the first seed})."""
    one = lambda rng: random_scene(rng, 1)
    mean, components, _ = (v.float() for v in prior.pca([embed(stack, scenes_of(20, FITTED, 0, one))]))
    counts = sorted({k for k in (0, 1, 2, 4, 8, 16, 32, 64) if k < len(components)} | {len(components)})
    groups, first = [], None
    for seed in seeds(args):
        scenes = scenes_of(21, args.n, seed, one)
        noise = randn(noises("decoder", seed, args.n), (args.n, 3, *[stack["decoder"].config.image_size] * 2), "cpu")
        made = pca_reconstruct(stack, embed(stack, scenes), noise, mean, components, counts, steps=args.steps)
        groups.append([[recovered(scene, read_scene(sample.to_picture(image))) for image in images]
                       for scene, images in zip(scenes, made)])
        if first is None:
            first = {"true": to_images(scenes)} | {f"{k} component{'s' * (k != 1)}": made[:, n] for n, k in enumerate(counts)}
    rate = lambda name, n: lambda observations: float(np.mean([each[n][name] for each in observations]))
    rows = {str(k): {name: jackknife(rate(name, n), groups) for name in ATTRIBUTES} for n, k in enumerate(counts)}
    return rows, {name: {"how early": jackknife(earliness(name), groups)} for name in ATTRIBUTES}, first


def conclusions(early):
    """Those that do not come, the order of the others, and fig. 7's question: which of colour, place and shape is earlier?"""
    of = {name: row["how early"] for name, row in early.items()}
    come = sorted((name for name in of if not np.isnan(of[name]).any()), key=lambda name: -np.mean(of[name]))
    said = [f"Not recovered for sure, however many components: {', '.join(n for n in of if n not in come) or 'none'}.",
            f"In the order of their means: {', '.join(come) or 'none'}."]
    return said + [conclude(f"{a} before {b}", of[a], of[b], "earlier", "later") for a, b in QUESTIONS if {a, b} <= set(come)]


def main():
    parser = options("Decode z_i's first principal components, and read back which attributes they bring.", 40,
                     "pictures of one thing")
    with one_line_errors(), torch.no_grad():
        args = parse(parser)
        stack = sample.load_stack(args.weights, pick_device(args.device), prior_kind="none")
        rows, early, first = measure(stack, args)
        show(rows, "components")
        show(early)
        curves = chart({f"{', '.join(some)}, against components": {name: points(rows, name) for name in some}
                        for some in (ATTRIBUTES[:3], ATTRIBUTES[3:])})
        finish(args, conclusions(early), under(gallery({name: images[:8] for name, images in first.items()}), curves), rows=rows, early=early)


if __name__ == "__main__":
    main()
