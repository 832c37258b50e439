"""Can the chain draw the four colour-shape pairs that training never shows?

Not in the paper, which shows new compositions and counts none.

In:   a folder of checkpoints
Out:  on stdout, a table for the pairs never trained and for the twelve other pairs of the same
      colours and shapes: how often all is right (one thing, with both attributes), the colour, the shape, for
        CLIP                      the nearest of the captions of all 42 pairs to a true picture's z_i
        decoder, z_i alone        pictures decoded from a true picture's z_i, read from their pixels
        decoder, z_i and caption  the same, but the decoder hears the caption too, as in a chain
        … chain                   pictures from the caption
      Then the conclusions. They are about these four pairs; another four might differ. --picture:
      pictures of each kind, with true ones above

    python experiments/composition.py --picture runs/composition.png
"""

import sys
from itertools import product
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from clip_embed import one_line_errors
from common import (conclude, decode, draw, finish, gallery, load, load_network, observe, options, parse, phrase, right, seeds,
                    show, to_images, true_scenes, under)
from manipulations import z_t
from priors import embed
from data.shapes import COLOURS, HELD_OUT, SHAPES

NEW = sorted(HELD_OUT)
TRAINED = [(colour, shape) for colour, _ in NEW for _, shape in NEW if (colour, shape) not in HELD_OUT]  # the other twelve
ALL = list(product(COLOURS, SHAPES))


def named(stack, scenes, captions):
    """Observations of CLIP's label of true pictures.

    The label is the nearest of the 42 captions "a colour shape" to z_i.
    """
    z_t_all = z_t(stack, [phrase(c, s) for c, s in ALL])
    result = []
    for best, caption in zip((embed(stack, scenes) @ z_t_all.T).argmax(1).tolist(), captions):
        _, colour, shape = caption.split()
        verdict = {"colour": ALL[best][0] == colour, "shape": ALL[best][1] == shape}
        result.append({"right": verdict | {"all": all(verdict.values())}})
    return result


def measure(stack, args):
    """({"link, kind": {column: pseudo-values}}, {kind: a picture of the first seed})."""
    observations, sheets = {}, {}

    def add(name, observed):
        observations.setdefault(name, []).append(observed)

    for seed in seeds(args):
        for kind, pairs in (("never trained", NEW), ("trained", TRAINED)):
            captions = [phrase(*pair) for pair in (pairs * args.n)[:args.n]]
            scenes = true_scenes(captions, 1000 + seed)
            add(f"CLIP, {kind}", named(stack, scenes, captions))
            first = {f"true, {kind}": to_images(scenes)}
            true = embed(stack, scenes)
            decodings = {"decoder, z_i alone": (true, [""] * args.n), "decoder, z_i and caption": (true, captions)} | {
                f"{name} chain": (draw(stack, captions, seed, prior), captions) for name, prior in
                (("diffusion", "diffusion"), ("AR", "ar"))}
            for link, (z_i, heard) in decodings.items():
                images = decode(stack, z_i, heard, seed, steps=args.steps)
                add(f"{link}, {kind}", observe(images, captions))
                first[f"{link}, {kind}"] = images
            if kind not in sheets:
                sheets[kind] = gallery(first, captions)
    columns = {"all right": right("all"), "colour": right("colour"), "shape": right("shape")}
    rows = {name: {c: column(groups) for c, column in columns.items()} for name, groups in observations.items()}
    return dict(sorted(rows.items(), key=lambda row: list(rows).index(row[0].replace("never trained", "trained")))), sheets


def conclusions(rows):
    """The cost of pairs never trained, link by link; then what each prior adds to the decoder's cost."""
    cost = lambda link: np.subtract(rows[f"{link}, trained"]["all right"], rows[f"{link}, never trained"]["all right"])
    links = dict.fromkeys(name.rpartition(", ")[0] for name in rows)
    sentences = [conclude(f"{link}, {c.split()[0]} right, pairs never trained against trained ones", rows[f"{link}, never trained"][c],
                          rows[f"{link}, trained"][c], "higher", "lower") for link in links for c in ("all right", "colour", "shape")]
    return sentences + [conclude(f"Cost of pairs never trained, {chain} against the decoder with true z_i and caption, all right",
                                 cost(chain), cost("decoder, z_i and caption"), "higher", "lower")
                        for chain in ("diffusion chain", "AR chain")]


def main():
    parser = options("Name, decode and draw the four colour-shape pairs that training never shows, "
                     "beside twelve that it shows.",
                     36, "pictures of pairs never trained, and as many of trained ones")
    with one_line_errors(), torch.no_grad():
        args = parse(parser)
        stack = load(args)
        stack["ar-prior"] = load_network(args.weights / "ar-prior.pt", "ar-prior", stack)
        rows, sheets = measure(stack, args)
        show(rows, "link, pairs")
        finish(args, conclusions(rows), under(*sheets.values()), rows=rows)


if __name__ == "__main__":
    main()
