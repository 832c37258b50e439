"""Which attributes of a picture return first, as z_i gets more principal components? (§4, fig. 7)

In:   a folder of checkpoints (clip.pt, decoder.pt)
Out:  on stdout, a table: for each number of components, how often decodings of one-thing pictures
      show the thing's colour, shape, size, fill, background, and its place to within a tenth of the
      side. Then how early each comes, and the conclusions. --picture: five pictures with more and
      more components from top to bottom, and the curves below

The components are those of z_i of 2,048 scenes; each picture has fresh noise. How early: the mean,
over the numbers of components, of the gain divided by the gain of all components. A gain is
relative to no component. It is 1 if the first component holds everything. The shares are those of a decoder: it
may fail to draw attributes that z_i holds. The decodings are DDIM's and unguided, as in
manipulate.py. The other experiments here sample ancestrally, with guidance.

    python experiments/components.py --picture runs/components.png
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
from clip_embed import one_line_errors
from common import (chart, conclude, finish, gallery, jackknife, load, noises, options, parse, points, seeds, show, to_images,
                    under)
from decoder import randn
from manipulate import pca_reconstruct
from manipulations import scenes_of
from priors import embed
from data.shapes import random_scene

ATTRIBUTES = ("colour", "shape", "size", "fill", "background", "place")
QUESTIONS = (("colour", "shape"), ("colour", "place"), ("place", "shape"))  # chosen beforehand
NEAR = 0.1  # of the side
FITTED = 2048  # scenes


def recovered(scene, found):
    """{attribute: is it the same in the found scene as in the scene of one thing?}.

    A place is the same within NEAR.
    """
    thing = scene.things[0]
    other = found.things[0] if len(found.things) == 1 else None
    return {name: other is not None and getattr(other, name) == getattr(thing, name) for name in ATTRIBUTES[:4]} | {
        "background": found.background == scene.background,
        "place": other is not None and math.hypot(other.x - thing.x, other.y - thing.y) < NEAR}


def earliness(name):
    """The mean share of the final gain, as a statistic of observations.

    An observation is a list of results of `recovered`, for growing numbers of components from 0.
    NaN if the final gain is under two standard errors.
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
    """Attributes that do not come, the order of the others, and fig. 7's question.

    The question: which of colour, place and shape is earlier?
    """
    of = {name: row["how early"] for name, row in early.items()}
    come = sorted((name for name in of if not np.isnan(of[name]).any()), key=lambda name: -np.mean(of[name]))
    sentences = [f"Not recovered for sure, however many components: {', '.join(n for n in of if n not in come) or 'none'}.",
            f"In the order of their means: {', '.join(come) or 'none'}."]
    return sentences + [conclude(f"{a} before {b}", of[a], of[b], "earlier", "later") for a, b in QUESTIONS if {a, b} <= set(come)]


def main():
    parser = options("Decode z_i's first principal components, and read back the attributes they "
                     "bring.", 40, "pictures of one thing")
    with one_line_errors(), torch.no_grad():
        args = parse(parser)
        stack = load(args, prior_kind="none")
        rows, early, first = measure(stack, args)
        show(rows, "components")
        show(early)
        curves = chart({f"{', '.join(some)}, against components": {name: points(rows, name) for name in some}
                        for some in (ATTRIBUTES[:3], ATTRIBUTES[3:])})
        finish(args, conclusions(early), under(gallery(first), curves), rows=rows, early=early)


if __name__ == "__main__":
    main()
