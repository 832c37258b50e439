"""Does it help to draw two z_i and to keep the one nearer to z_t? (§2.2)

In:   a folder of checkpoints
Out:  on stdout, a table for 1, 2 and 8 draws of the diffusion prior, of which the one with the
      largest dot product with z_t is kept: how often a picture shows its whole caption, Fréchet
      distances to true renderings, and diversity, as in experiments/guidance.py. Its last column,
      "skew", is about z_i of captions such as "a heart": how far the shares of colours, sizes,
      fills and backgrounds are from the world's. It is the total variation distance, the share of
      the draws that would have to change; the row of the true z_i shows how much of it is chance.
      A linear probe reads them from z_i. Then the conclusions. --picture: pictures of one caption,
      one number of draws per row

    python experiments/candidates.py --picture runs/candidates.png
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from clip_embed import UserError, one_line_errors
from common import (OPEN, SHOWN, conclude, decode, draw, finish, gallery, jackknife, load, observe, options, parse, quality,
                    seeds, show, true_scenes)
from linear_probes import fit_probe, places
from priors import embed
from sweep import captions_of
from data.shapes import BACKGROUNDS, HELD_OUT, SHAPES, VALUES, random_scene

FITTED = 4000  # scenes of one thing, for the probes
READ = {name: list(values) for name, values in (VALUES | {"background": BACKGROUNDS}).items() if name != "shape"}


def shown(scene):
    """{attribute: its value} of a scene of one thing."""
    return {name: scene.background if name == "background" else getattr(scene.things[0], name) for name in READ}


def fit_probes(stack):
    """{attribute: a function from z_i (n, d) of one thing to the places of n values in READ}."""
    rng = np.random.default_rng([0, 1 << 52])
    scenes = [random_scene(rng, 1) for _ in range(FITTED)]
    z_i, truth = embed(stack, scenes), list(map(shown, scenes))
    return {name: fit_probe(z_i, places(values, [found[name] for found in truth])) for name, values in READ.items()}


def skew(draws):
    """The total variation distance from the world, mean over shapes and attributes.

    draws: (shape, {attribute: value}) of each z_i.
    """
    distances = []
    for shape in SHAPES:
        some = [found for own, found in draws if own == shape]
        for name, values in READ.items():
            possible = [v for v in values if (v, shape) not in HELD_OUT]
            shares = [np.mean([found[name] == v for found in some]) for v in values]
            distances.append(sum(abs(share - (v in possible) / len(possible)) for v, share in zip(values, shares)) / 2)
    return float(np.mean(distances))


def measure(stack, args):
    """({draws: {column: pseudo-values}}, the skew of true z_i)."""
    groups, drawn, captions, probes = {}, {}, [], fit_probes(stack)
    shapes = [shape for shape in SHAPES for _ in range(args.n)]
    simple = [f"a {shape}" for shape in shapes]

    def attributes_of(z_i):
        found = {name: [READ[name][k] for k in probe(z_i)] for name, probe in probes.items()}
        return [(shape, dict(zip(READ, values))) for shape, *values in zip(shapes, *found.values())]

    for seed in seeds(args):
        twice = [caption for caption in captions_of(args.n, seed) for _ in range(2)]
        captions.append(twice[::2])
        drawn.setdefault("true", []).append(attributes_of(embed(stack, true_scenes(simple, 1000 + seed))))
        for count in args.draws:
            z_i = draw(stack, twice, seed, "diffusion", candidates=count)
            observed = observe(decode(stack, z_i, twice, seed, steps=args.steps), twice)
            groups.setdefault(count, []).append(list(zip(observed[::2], observed[1::2])))
            drawn.setdefault(count, []).append(attributes_of(draw(stack, simple, 1000 + seed, "diffusion", candidates=count)))
    measured, skews = quality(captions), {count: {"skew": jackknife(skew, some)} for count, some in drawn.items()}
    return {str(count): measured(groups[count]) | skews[count] for count in args.draws}, skews["true"]


def pictures(stack, args):
    """Pictures of the caption OPEN for each number of draws, {row: images}."""
    captions, rows = [OPEN] * SHOWN, {}
    for count in args.draws:
        z_i = draw(stack, captions, 0, "diffusion", candidates=count)
        rows[f"{count} draw{'s' * (count > 1)}"] = decode(stack, z_i, captions, 0, steps=args.steps)
    return rows


def conclusions(rows):
    """Each number of draws against the smallest."""
    first, *others = rows
    return [conclude(f"{column}, {other} draws against {first}", rows[other][column], rows[first][column], "higher", "lower")
            for other in others for column in rows[first]]


def main():
    parser = options("Keep the best of 1, 2 and 8 z_i by the dot product with z_t, and read back accuracy, fidelity, diversity "
                     "and what the kept ones have in common.", 32,
                     "captions, half of one thing, half of two, each drawn twice; and z_i of each shape")
    parser.add_argument("--draws", type=int, nargs="+", default=[1, 2, 8], help="numbers of z_i (default 1 2 8)")
    with one_line_errors(), torch.no_grad():
        args = parse(parser)
        args.draws = sorted(set(args.draws))
        if args.draws[0] < 1 or args.draws[-1] > 64:
            raise UserError("--draws: each must be between 1 and 64")
        stack = load(args)
        rows, true = measure(stack, args)
        show(rows | {"true z_i": true}, "draws")
        finish(args, conclusions(rows), gallery(pictures(stack, args)) if args.picture else None, rows=rows, true=true)


if __name__ == "__main__":
    main()
