"""Does unCLIP keep its diversity as guidance grows? (§5.3; figs. 9–11; table 1)

A model of the caption alone should lose it.

In:   a folder of checkpoints, and a model of the caption alone. --glide: a decoder trained with
      python train.py decoder --given caption. Without it, unCLIP's own decoder gets the caption
      alone, which it saw in 21% of its training (paper: 5%)
Out:  on stdout, a table for each model and guidance scale: how often a picture shows its whole
      caption; Fréchet distances to true renderings, of the attributes that the reader finds and of
      random features; how much two pictures of a caption differ in the things that it leaves open,
      as a share of the world's diversity. Then the conclusions. --picture: five pictures of one
      caption as guidance grows (fig. 9), and the curves below (figs. 10, 11)

The model of the caption alone reads CLIP's states of the caption and its z_t. So it is like GLIDE
with a pretrained text encoder; it lacks the draw of z_i. Table 1's questions are asked about the
means over all scales of the sweep. So no scale is chosen by the measure that judges it.

    python experiments/guidance.py --glide weights/glide/decoder.pt --picture runs/guidance.png
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from clip_embed import UserError, one_line_errors
from common import (OPEN, SHOWN, chart, conclude, decode, draw, finish, gallery, load, load_network, observe, options, parse,
                    points, quality, seeds, show, to_images, true_scenes, under)
from sweep import captions_of

COLUMNS = ("all right", "distance, attributes", "distance, features", "diversity")


def measure(models, args):
    """({model: {scale: {column: pseudo-values}}}, the same columns of true renderings).

    models: {name: (stack, kind of z_i)}.
    """
    groups, true, captions = {}, [], []
    pairs = lambda observed: list(zip(observed[::2], observed[1::2]))
    for seed in seeds(args):
        twice = [caption for caption in captions_of(args.n, seed) for _ in range(2)]
        captions.append(twice[::2])
        true.append(pairs(observe(to_images(true_scenes(twice, 1000 + seed)), twice)))
        for model, (stack, kind) in models.items():
            z_i = draw(stack, twice, seed, kind)
            for scale in args.guidance:
                images = decode(stack, z_i, twice, seed, scale, args.steps)
                groups.setdefault((model, scale), []).append(pairs(observe(images, twice)))
    measured = quality(captions)
    rows = {model: {f"{scale:g}": measured(groups[model, scale]) for scale in args.guidance} for model in models}
    return rows, measured(true)


def pictures(models, args):
    """Pictures of the caption OPEN for each model and scale, {row: images}."""
    rows = {}
    for model, (stack, kind) in models.items():
        z_i = draw(stack, [OPEN] * SHOWN, 0, kind)
        rows |= {f"{model}, guidance {scale:g}": decode(stack, z_i, [OPEN] * SHOWN, 0, scale, args.steps) for scale in args.guidance}
    return rows


def conclusions(rows):
    """Table 1's three questions and figs. 9 to 11, for unCLIP against the other model."""
    (other, alone), (_, unclip) = ((model, list(scales.values())) for model, scales in rows.items())
    mean = lambda settings, column: np.mean([s[column] for s in settings], 0)
    names = {"all right": f"Captions shown, unCLIP against the {other}",
             "distance, features": f"Distance from true pictures (features), unCLIP against the {other}",
             "diversity": f"Diversity, unCLIP against the {other}"}
    sentences = [conclude(what, mean(unclip, c), mean(alone, c), "higher", "lower") for c, what in names.items()]
    lost = [np.subtract(s[0]["diversity"], s[-1]["diversity"]) for s in (unclip, alone)]
    return sentences + [conclude(f"Diversity lost from the lowest to the highest guidance, unCLIP against the {other}", *lost)]


def main():
    parser = options("Sweep guidance for unCLIP and for a decoder of the caption alone, like "
                     "GLIDE: accuracy, fidelity and diversity.", 16,
                     "captions, half of one thing, half of two, each drawn twice")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1, 2, 4, 8], help="scales (default 1 2 4 8)")
    parser.add_argument("--glide", type=Path, metavar="PATH",
                        help="a decoder trained with --given caption (default: unCLIP's, z_i = 0)")
    with one_line_errors(), torch.no_grad():
        args = parse(parser)
        if any(not 0 <= scale <= 100 for scale in args.guidance):
            raise UserError("--guidance: each must be between 0 and 100")
        args.guidance = sorted(set(args.guidance))
        stack = load(args)
        alone = {**stack, "decoder": load_network(args.glide, "decoder", stack, "caption")} if args.glide else stack
        print(f"The caption alone is given to {args.glide or 'the decoder of unCLIP, with z_i = 0'}.\n", flush=True)
        models = {"caption alone": (alone, "none"), "unCLIP": (stack, "diffusion")}
        rows, true = measure(models, args)
        show({"true renderings": true} | {f"{model}, guidance {scale}": row for model, scales in rows.items()
                                          for scale, row in scales.items()})
        curves = chart({column: {model: points(scales, column) for model, scales in rows.items()} for column in COLUMNS})
        finish(args, conclusions(rows), under(gallery(pictures(models, args)), curves) if args.picture else None, rows=rows, true=true)


if __name__ == "__main__":
    main()
