"""Should guidance be in the prior, in the decoder, or in both? (§5.5, where guiding the prior hurt)

In:   a folder of checkpoints
Out:  on stdout, a table for guidance of neither, of one and of both: how often a picture shows its
      whole caption, Fréchet distances to true renderings, and diversity as in
      experiments/guidance.py. Then the conclusions. --picture: five pictures of one caption, one
      setting per row

    python experiments/guided_prior.py --picture runs/guided-prior.png
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from clip_embed import UserError, one_line_errors
from common import (OPEN, SHOWN, conclude, decode, draw, finish, gallery, load, observe, options, parse, quality, seeds, show)
from sweep import captions_of

SETTINGS = {"neither": (0, 0), "prior": (1, 0), "decoder": (0, 1), "both": (1, 1)}  # guided or not: prior, decoder


def measure(stack, args):
    """{setting: {column: pseudo-values}}."""
    groups, captions = {name: [] for name in SETTINGS}, []
    scale = {0: 1, 1: args.guidance}
    for seed in seeds(args):
        twice = [caption for caption in captions_of(args.n, seed) for _ in range(2)]
        captions.append(twice[::2])
        z_i = {guided: draw(stack, twice, seed, "diffusion", scale[guided]) for guided in scale}
        for name, (in_prior, in_decoder) in SETTINGS.items():
            images = decode(stack, z_i[in_prior], twice, seed, scale[in_decoder], args.steps)
            observed = observe(images, twice)
            groups[name].append(list(zip(observed[::2], observed[1::2])))
    measured = quality(captions)
    return {name: measured(groups[name]) for name in SETTINGS}


def pictures(stack, args):
    """Pictures of the caption OPEN for each setting, {row: images}."""
    scale, captions = {0: 1, 1: args.guidance}, [OPEN] * SHOWN
    z_i = {guided: draw(stack, captions, 0, "diffusion", scale[guided]) for guided in scale}
    return {f"guided: {name}": decode(stack, z_i[in_prior], captions, 0, scale[in_decoder], args.steps)
            for name, (in_prior, in_decoder) in SETTINGS.items()}


def conclusions(rows):
    """§5.5's question: the prior guided beside a guided decoder. Then the effect of each.

    The effect is the mean over guiding and not guiding the other.
    """
    sentences = [conclude(f"Guiding the prior beside a guided decoder, {column}", rows["both"][column], rows["decoder"][column], "higher",
                     "lower") for column in rows["neither"]]
    for what, guided, free in (("the prior", ("prior", "both"), ("neither", "decoder")),
                               ("the decoder", ("decoder", "both"), ("neither", "prior"))):
        mean = lambda names, column: np.mean([rows[name][column] for name in names], 0)
        sentences += [conclude(f"Guiding {what}, {column}", mean(guided, column), mean(free, column), "higher", "lower")
                 for column in rows["neither"]]
    return sentences


def main():
    parser = options("Guide the prior, the decoder, both or neither, and read back accuracy, "
                     "fidelity and diversity.", 32,
                     "captions, half of one thing, half of two, each drawn twice")
    parser.add_argument("--guidance", type=float, default=2.0,
                        help="scale with guidance (default 2; without it is 1)")
    with one_line_errors(), torch.no_grad():
        args = parse(parser)
        if not 0 <= args.guidance <= 100:
            raise UserError(f"--guidance {args.guidance:g}: must be between 0 and 100")
        stack = load(args)
        rows = measure(stack, args)
        show(rows, "guided")
        finish(args, conclusions(rows), gallery(pictures(stack, args)) if args.picture else None, rows=rows)


if __name__ == "__main__":
    main()
