"""What does z_i hold, and which captions does CLIP distinguish? (appendix A)

Probes of the embedding, on the world of shapes: linear ones, and a small network.

In:   a CLIP of train.py; scenes that training never drew
Out:  on stdout, four Markdown tables:
        the number of directions that hold z_i's variance: the participation ratio (Σλ)² / Σλ² of
          its covariance's eigenvalues, and the share of the variance in the largest ones
        how often a linear probe of z_i names each attribute of a thing that is alone, of the left
          of two things, and of the right one. The probe is ridge regression to one-hot vectors,
          fitted to four fifths of the scenes and tested on the last fifth. And of a thing that is
          alone, by a probe fitted to the five other shapes: does z_i say "large" of a star as it
          says it of a circle? If not, a text diff from circle to star changes the size too
        how often a small network (the MLP of probes.py) reads each attribute of two things, and
          all ten of a scene. What it can't read, prior and decoder will hardly find, we think
        how often the cosine of a picture of two things prefers the full caption to a wrong one:
          with the inverse relation, with one attribute of the two things swapped, or with one
          attribute of one thing changed. To tell a swap apart, one thing is enough; a CLIP can
          know all swaps and not see the second thing's shape

    python experiments/linear_probes.py --clip runs/shapes/clip.pt
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from clip_embed import UserError, load_clip, one_line_errors, pick_device
import probes
from priors import draw, embed
from probes import PLACES
from sample import SHIPPED
from data.shapes import BACKGROUNDS, RELATIONS, VALUES, all_attributes, altered, describe, is_held_out, order, random_scene, swapped

RIDGE = 1e-6  # of the mean square of a coordinate


def fit_probe(z, labels):
    """A linear probe of z (n, d), fitted to labels (n,), integers: a function from z to labels."""
    mean, scale = z.mean(0), z.shape[1] ** 0.5
    extend = lambda z: F.pad((z - mean).double() * scale, (0, 1), value=1)
    rows = extend(z)
    gram = rows.T @ rows / len(rows)
    weights = torch.linalg.solve(gram + RIDGE * torch.eye(len(gram), dtype=rows.dtype), rows.T @ F.one_hot(labels).double())
    return lambda z: (extend(z) @ weights).argmax(1)


def named(z, labels):
    """How often a linear probe of z (n, d) names the labels (n,), integers.

    It is fitted to four fifths of the rows and tested on the rest.
    """
    train = len(z) * 4 // 5
    return float((fit_probe(z[:train], labels[:train])(z[train:]) == labels[train:]).double().mean())


def carried_over(z, labels, shapes):
    """How often a linear probe of z (n, d), fitted to all shapes but one, names the labels of that one; the mean over shapes.

    labels, shapes: (n,), integers. Each shape's mean z is taken away first.
    """
    centred, shares = z.clone(), []
    for shape in shapes.unique():
        centred[shapes == shape] -= z[shapes == shape].mean(0)
    for shape in shapes.unique():
        probe = fit_probe(centred[shapes != shape], labels[shapes != shape])
        shares.append((probe(centred[shapes == shape]) == labels[shapes == shape]).double().mean())
    return float(torch.stack(shares).mean())


def directions(z):
    """Eigenvalues of the covariance of z (n, d), and their participation ratio (Σλ)² / Σλ².

    The largest eigenvalue comes first.
    """
    values = torch.linalg.eigvalsh(torch.cov(z.double().T)).flip(0).clamp(min=0)
    return values, float(values.sum() ** 2 / values.square().sum())


def places(values, found):
    """The index of each of `found` in a sequence of values, as a tensor."""
    return torch.tensor([list(values).index(each) for each in found])


def left_and_right(scene):
    """The two things of a scene with the relation left of or right of, the left one first."""
    return tuple(scene.things[k] for k in order(scene))


def rivals(scene):
    """{name: a scene whose caption is wrong for this scene of two things}.

    The relation is inverted, an attribute is swapped, or an attribute of one thing has the next
    value of VALUES. The first thing is the left or upper one.
    """
    a, b = scene.things
    alike = all(getattr(a, k) == getattr(b, k) for k in VALUES)  # the inverse relation is true too
    found = {f"{k} swapped": swapped(scene, k) for k in VALUES if getattr(a, k) != getattr(b, k)}
    found |= {} if alike else {"relation inverted": replace(scene, relation=RELATIONS[scene.relation])}
    for place, k in zip(PLACES, order(scene)):
        for name, values in VALUES.items():
            after = values.index(getattr(scene.things[k], name)) + 1
            changed = (altered(scene, k, **{name: value}) for value in values[after:] + values[:after])
            found[f"{place} {name} changed"] = next(other for other in changed if not is_held_out(other))
    return found


def preferred(stack, scenes, z_i):
    """{name of a rival: (how often z_i (n, d) prefers its own caption to the rival's, scenes)}."""
    def embed_captions(some):  # captions name everything, in the same wording
        return draw(stack, [describe(scene, all_attributes(scene), np.random.default_rng(k)) for k, scene in some], 0, {})[0]

    own, result = (z_i * embed_captions(enumerate(scenes))).sum(1), {}
    others = [rivals(scene) for scene in scenes]
    for name in ("relation inverted", *(f"{a} swapped" for a in VALUES), *(f"{place} {a} changed" for place in PLACES for a in VALUES)):
        some = [(k, each[name]) for k, each in enumerate(others) if name in each]
        rows = [k for k, _ in some]
        result[name] = (float((own[rows] > (z_i[rows] * embed_captions(some)).sum(1)).double().mean()), len(rows))
    return result


def main():
    parser = argparse.ArgumentParser(
        description="Probe CLIP's image embedding of scenes of shapes: the number of directions "
        "it uses, the attributes that a linear map reads from it, and the captions that it "
        "distinguishes.")
    parser.add_argument("--clip", type=Path, default=SHIPPED / "clip.pt", help="a checkpoint of train.py (default: the shipped one)")
    parser.add_argument("--n", type=int, default=6000, help="scenes of one thing, and of two in each direction (default 6000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    args = parser.parse_args()
    with one_line_errors(), torch.no_grad():
        if not 100 <= args.n <= 1_000_000 or not 0 <= args.seed < 1 << 48:
            raise UserError("--n must be between 100 and 1000000, --seed between 0 and 2^48")
        clip, tokenizer = load_clip(args.clip)
        stack, rng = {"clip": clip.to(pick_device(args.device)), "tokenizer": tokenizer}, np.random.default_rng([args.seed, 1 << 55])
        one = [random_scene(rng, 1) for _ in range(args.n)]
        two, beside = [], []  # beside: which ones have the relation left of or right of
        while sum(beside) < args.n:
            two.append(random_scene(rng, 2))
            beside.append(two[-1].relation in ("left of", "right of"))
        mixed = [random_scene(rng) for _ in range(args.n)]
        z_one, z_all, z_mixed = (embed(stack, scenes) for scenes in tqdm((one, two, mixed), "z_i of scenes"))
        z_two, side_by_side = z_all[beside], [scene for scene, found in zip(two, beside) if found]
        values, ratio = directions(z_mixed)
        counts = [k for k in (1, 4, 16, 32) if k < len(values)]
        print(f"| directions | participation ratio | {' | '.join(f'variance in the first {k}' for k in counts)} |")
        print("|---" * (2 + len(counts)) + "|")
        print(f"| {len(values)} | {ratio:.1f} | {' | '.join(f'{float(values[:k].sum() / values.sum()):.1%}' for k in counts)} |\n")
        print("| a linear probe names | alone | the left of two | the right of two | alone, of a shape not fitted to | by chance |\n|---|---|---|---|---|---|")
        shapes = places(VALUES["shape"], [s.things[0].shape for s in one])
        for a, options in VALUES.items():
            labels = places(options, [getattr(s.things[0], a) for s in one])
            shares = [named(z_one, labels)]
            shares += [named(z_two, places(options, [getattr(left_and_right(s)[k], a) for s in side_by_side])) for k in range(2)]
            other = "–" if a == "shape" else f"{carried_over(z_one, labels, shapes):.1%}"
            print(f"| {a} | {' | '.join(f'{share:.1%}' for share in shares)} | {other} | {1 / len(options):.1%} |")
        labels = places(BACKGROUNDS, [s.background for s in one])
        print(f"| background | {named(z_one, labels):.1%} | – | – | {carried_over(z_one, labels, shapes):.1%} | {1 / len(BACKGROUNDS):.1%} |\n")
        pairs = [scene for scene in mixed if len(scene.things) == 2]
        z_pairs = z_mixed[[len(scene.things) == 2 for scene in mixed]]
        with torch.enable_grad():
            read = probes.train_probe(z_all, torch.stack([probes.answers(s) for s in two]))
        right = read(z_pairs) == torch.stack([probes.answers(s) for s in pairs])
        shares = {name: f"{float(share):.1%}" for name, share in zip(probes.NAMES, right.double().mean(0))}
        print("| a small network reads, of two things | the first's | the second's |\n|---|---|---|")
        for a in VALUES:
            print(f"| {a} | {' | '.join(shares[f'{place} {a}'] for place in PLACES)} |")
        for name in ("relation", "background"):
            print(f"| {name} | {shares[name]} | – |")
        print(f"| all ten | {float(right.all(1).double().mean()):.1%} of {len(pairs):,} | – |\n")
        print("| two things: the true caption against | preferred | of |\n|---|---|---|")
        for name, (share, of) in preferred(stack, pairs, z_pairs).items():
            print(f"| {name} | {share:.1%} | {of:,} |")


if __name__ == "__main__":
    main()
