"""Which link of the chain gives a colour to the wrong shape? (§7, fig. 14, fig. 15)

In:   a folder of checkpoints
Out:  on stdout, a table over pairs of captions with swapped colours, such as "a red circle and a
      blue square" and "a blue circle and a red square". It shows how often each link prefers the
      right caption of the two (0.5 by chance):
        CLIP             compares a true picture with both captions, by the cosine
        z_i              compares a true picture's z_i with other true pictures of both captions,
                         and takes the nearest. z_i holds at least this much; a trained probe finds
                         more (linear_probes.py)
        … prior          the same for z_i that a prior draws for the caption
        decoder          reads pictures decoded from a true picture's z_i, with the caption or
                         without
        … chain          reads pictures made from the caption
      Pictures that show neither pair do not count here. The columns "right pairs" and "swapped
      pairs" are shares of all pictures. Then the conclusions. --picture: pictures of the first
      captions, with true ones above

    python experiments/binding.py --picture runs/binding.png
"""

import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sample
from caption_accuracy import read_scene
from clip_embed import one_line_errors
from common import (conclude, decode, draw, finish, gallery, jackknife, load, load_network, options, parse, phrase, seeds, show,
                    to_images, true_scenes)
from manipulations import z_t
from priors import embed
from data.shapes import COLOURS, HELD_OUT, SHAPES, swapped

REFERENCES = 64  # true pictures of each caption, to find the nearest


def pairs_of(n, seed):
    """n of [(colour, shape), (colour, shape)], all of them trained.

    For even k, number k + 1 is number k with its colours swapped.
    """
    rng, pairs = np.random.default_rng([seed, 1 << 54]), []
    while len(pairs) < n:
        (a, b), (s, t) = (rng.permutation(list(values))[:2].tolist() for values in (COLOURS, SHAPES))
        if not HELD_OUT & {(a, s), (b, t), (b, s), (a, t)}:
            pairs += [[(a, s), (b, t)], [(b, s), (a, t)]]
    return pairs[:n]


def neighbours(rows):
    """Rows 0 and 1, 2 and 3, … exchanged, along the first axis (of even length)."""
    return rows.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def preference(z, own):
    """How much each of z (n, d) prefers its own directions (n, R, d) to the swapped caption's.

    The largest cosine with its own directions, less the largest with the swapped caption's.
    """
    nearest = lambda directions: F.cosine_similarity(z[:, None], directions, dim=-1).amax(1)
    return nearest(own) - nearest(neighbours(own))


def references(stack, captions, seed):
    """z_i (n, R, d) of R true pictures of each caption.

    In each pair of captions, the second's pictures are the first's with colours exchanged.
    """
    first = true_scenes([caption for caption in captions[::2] for _ in range(REFERENCES)], seed)
    both = [embed(stack, scenes).unflatten(0, (-1, REFERENCES)) for scenes in (first, [swapped(scene, "colour") for scene in first])]
    return torch.stack(both, 1).flatten(0, 1)


def verdicts(images, pairs):
    """For each picture: 1 if it shows its colour-shape pairs, 0 if the swapped ones, else NaN."""
    result = []
    for image, ((a, s), (b, t)) in zip(images, pairs):
        found = sorted((thing.colour, str(thing.shape)) for thing in read_scene(sample.to_picture(image)).things)
        result.append(1.0 if found == sorted([(a, s), (b, t)]) else 0.0 if found == sorted([(b, s), (a, t)]) else math.nan)
    return result


def decided(observed):
    """The share of right verdicts among right and swapped ones."""
    clear = [v for v in observed if not math.isnan(v)]
    return float(np.mean(clear)) if clear else math.nan


def measure(stack, args):
    """({link: {column: pseudo-values}}, a picture of the first captions)."""
    links, first, heads = {}, {}, []

    def add(link, observed):
        links.setdefault(link, []).append(observed)

    for seed in seeds(args):
        pairs = pairs_of(args.n, seed)
        captions = [f"{phrase(*one)} and {phrase(*other)}" for one, other in pairs]
        heads = heads or captions
        scenes = true_scenes(captions, 1000 + seed)
        z_i, z_t_of = embed(stack, scenes), z_t(stack, captions)
        known = references(stack, captions, 2000 + seed)
        add("CLIP", (preference(z_i, z_t_of[:, None]) > 0).double().tolist())
        add("z_i", (preference(z_i, known) > 0).double().tolist())
        drawn = {name: draw(stack, captions, seed, kind) for name, kind in (("diffusion", "diffusion"), ("AR", "ar"))}
        for name in drawn:
            add(f"{name} prior", (preference(drawn[name], known) > 0).double().tolist())
        decodings = {"decoder, z_i alone": (z_i, [""] * args.n), "decoder, z_i and caption": (z_i, captions),
                     "diffusion chain": (drawn["diffusion"], captions), "AR chain": (drawn["AR"], captions)}
        first.setdefault("true", to_images(scenes))
        for link, (z, heard) in decodings.items():
            images = decode(stack, z, heard, seed, steps=args.steps)
            add(link, verdicts(images, pairs))
            first.setdefault(link, images)
    share = lambda value: lambda observed: float(np.mean([v == value for v in observed]))
    return {link: {"right of the two": jackknife(decided, groups)} | (
        {"right pairs": jackknife(share(1), groups), "swapped pairs": jackknife(share(0), groups)} if link in first else {})
        for link, groups in links.items()}, gallery(first, heads)


def conclusions(rows):
    """The links up to z_i against chance; then the loss or gain of each further link.

    The latter compares right pairs, and swapped ones, among all pictures. What shows neither is no swap.
    """
    sentences = [conclude(f"{link} against chance", rows[link]["right of the two"], 0.5, "binds", "prefers the swapped one")
            for link in ("CLIP", "z_i", "diffusion prior", "AR prior")]
    right, alone, both = (lambda link: rows[link]["right pairs"]), "decoder, z_i alone", "decoder, z_i and caption"
    sentences.append(conclude("… with the caption, against without", right(both), right(alone), "more", "fewer"))
    return sentences + [conclude(f"{kind.capitalize()} from the {name} prior's z_i, against the true picture's", rows[f"{name} chain"][kind],
                                 rows[both][kind], "more", "fewer") for name in ("diffusion", "AR") for kind in ("right pairs", "swapped pairs")]


def main():
    parser = options("Find the link of the chain that swaps the colours of two things.", 48,
                     "captions, in pairs that swap colours")
    with one_line_errors(), torch.no_grad():
        args = parse(parser)
        args.n += args.n % 2
        stack = load(args)
        stack["ar-prior"] = load_network(args.weights / "ar-prior.pt", "ar-prior", stack)
        rows, picture = measure(stack, args)
        show(rows, "link")
        finish(args, conclusions(rows), picture, rows=rows)


if __name__ == "__main__":
    main()
