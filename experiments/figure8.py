"""What does the decoder draw for a caption with each kind of z_i? (§5.1, fig. 8)

In:   a folder of checkpoints; --glide, a decoder trained on the caption alone (python train.py
      decoder --given caption); --z-t, one trained on z_t in z_i's place (--given z_t)
Out:  on stdout, a table: how often each attribute of the caption is shown, and Fréchet distances to
      true renderings. The rows are the caption alone (z_i = 0), z_t in z_i's place, z_i from the
      autoregressive prior, z_i from the diffusion prior, z_i of a true picture of the caption, and
      the decoders of --glide and --z-t. Then the conclusions. --picture: the first captions'
      pictures, one kind of z_i per row

    python experiments/figure8.py --glide weights/glide/decoder.pt --picture runs/figure8.png
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from clip_embed import one_line_errors
from common import (conclude, decode, draw, fidelity, finish, gallery, load, load_network, observe, options, parse, right, seeds,
                    show, true_scenes)
from priors import embed
from sweep import captions_of

KINDS = {"caption alone": "none", "z_t": "text", "AR prior": "ar", "diffusion prior": "diffusion"}
TRAINED = "{}, decoder trained on it"


def measure(stack, args, others):
    """({kind: {column: pseudo-values}}, a picture of the first captions).

    others: {a kind of z_i: a decoder trained on it}.
    """
    observations, first, captions = {}, {}, []
    for seed in seeds(args):
        some = captions_of(args.n, seed)
        captions.append(some)
        z_i = {name: draw(stack, some, seed, kind) for name, kind in KINDS.items()}
        z_i["true z_i"] = embed(stack, true_scenes(some, 1000 + seed))
        given = {name: (stack, z) for name, z in z_i.items()}
        given |= {TRAINED.format(name): (stack | {"decoder": other}, z_i[name]) for name, other in others.items()}
        for name, (networks, z) in given.items():
            images = decode(networks, z, some, seed, steps=args.steps)
            observations.setdefault(name, []).append(observe(images, some))
            first.setdefault(name, images)
    columns = {name: right(name) for name in ("all", "bound", "count", "shape", "colour", "relation")} | fidelity(captions)
    return {name: {c: column(groups) for c, column in columns.items()} for name, groups in observations.items()}, gallery(first, captions[0])


def conclusions(rows):
    """Each prior's z_i against each replacement, and against a true picture's z_i."""
    diffusion, ar = "diffusion prior", "AR prior"
    pairs = [(diffusion, other) for other in rows if other != diffusion] + [(ar, other) for other in rows if other not in (diffusion, ar)]
    sentences = []
    for best, other in pairs:
        sentences += [conclude(f"{what}, {best} against {other}", rows[best][c], rows[other][c], "higher", "lower")
                 for c, what in (("all", "Captions shown"), ("distance, attributes", "Distance of what is shown"),
                                 ("distance, features", "Distance of features"))]
    return sentences


def main():
    parser = options("Give the decoder a caption with each kind of z_i, and read back its "
                     "pictures.", 36, "captions, half of one thing, half of two")
    parser.add_argument("--glide", type=Path, metavar="PATH", help="a decoder trained with --given caption (default: left out)")
    parser.add_argument("--z-t", type=Path, metavar="PATH", help="a decoder trained with --given z_t (default: left out)")
    with one_line_errors(), torch.no_grad():
        args = parse(parser)
        stack = load(args)
        stack["ar-prior"] = load_network(args.weights / "ar-prior.pt", "ar-prior", stack)
        trained = {"caption alone": (args.glide, "caption"), "z_t": (args.z_t, "z_t")}
        others = {name: load_network(path, "decoder", stack, given) for name, (path, given) in trained.items() if path}
        rows, picture = measure(stack, args, others)
        show(rows, "z_i")
        finish(args, conclusions(rows), picture, rows=rows)


if __name__ == "__main__":
    main()
