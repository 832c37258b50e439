"""Which stage loses what? Three quick measurements that tell trainings apart long before pictures do.

In:   a folder of checkpoints
Out:  on stdout, Markdown tables

prior: a small network (MLP), trained in seconds on true z_i of scenes of two things, reads ten attributes back from z_i: shape,
colour, size and fill of either thing, the relation, the background. Then it reads the prior's draws for captions that name
everything. *All* is the share with all ten right. Below it, the mean of z_i that the prior predicts from noise alone, at t = 999:
its squared error as a share of the variance of each group of principal components. An exact prior errs by no more than what
captions leave open.

decoder: its loss at five timesteps on the same scenes with the same noise each time (the paired loss), given z_i, the caption,
both or neither. *Heard* is the share of the gap between neither and z_i that the caption alone closes.

    python experiments/probes.py prior --n 500
    python experiments/probes.py decoder --weights runs/shapes
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import decoder
import prior
import sample
from clip_embed import check_ranges, encode_captions, one_line_errors, pick_device, to_floats, to_tensor
from data.embeddings import scale
from data.shapes import BACKGROUNDS, RELATIONS, VALUES, all_attributes, describe, order, random_scene, render
from priors import embed

STREAM = 1 << 54  # of random numbers: these scenes are no other script's, and no training's
TIMES = (600, 750, 850, 900, 950)
GROUPS = ((0, 8), (8, 16), (16, 24), (24, 40), (40, 128))  # of principal components, the largest variance first


def scenes_of(n, seed, part):
    """n scenes of two things; part: 0 to train the probe, 1 to measure."""
    return [random_scene(np.random.default_rng([seed, STREAM, part, k]), 2) for k in range(n)]


def everything(scene, seed):
    """A caption that names all attributes of a scene of two things."""
    return describe(scene, all_attributes(scene), np.random.default_rng([seed, STREAM, 2]))


def answers(scene):
    """The indices of a scene's ten attributes, the upper or left thing's first: (10,)."""
    places = order(scene)
    relation = scene.relation if places == (0, 1) else RELATIONS[scene.relation]
    found = [list(values).index(getattr(scene.things[k], a)) for k in places for a, values in VALUES.items()]
    return torch.tensor(found + [("left of", "above").index(relation), list(BACKGROUNDS).index(scene.background)])


SIZES = [len(values) for values in VALUES.values()] * 2 + [2, len(BACKGROUNDS)]
PLACES = ("first", "second")  # of two things: the left or upper one, and the other
NAMES = [f"{place} {a}" for place in PLACES for a in VALUES] + ["relation", "background"]


def train_probe(z_i, targets, epochs=40):
    """An MLP that reads the ten attributes (n, 10) from z_i (n, d), trained by cross-entropy."""
    torch.manual_seed(0)
    probe = nn.Sequential(nn.Linear(z_i.shape[1], 384), nn.GELU(), nn.Linear(384, 384), nn.GELU(), nn.Linear(384, sum(SIZES)))
    optimizer = torch.optim.AdamW(probe.parameters(), 2e-3, weight_decay=0.01)
    steps = epochs * (len(z_i) // 256)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    size = scale(z_i.shape[1])
    for step in range(steps):
        rows = torch.randint(len(z_i), (256,))
        logits = probe(z_i[rows] * size).split(SIZES, 1)
        loss = sum(F.cross_entropy(part, target) for part, target in zip(logits, targets[rows].T))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return lambda z: torch.stack([part.argmax(1) for part in probe(z * size).split(SIZES, 1)], 1)


def probe_prior(args, device):
    """Print what the probe reads from true z_i and from the prior's, and the prior's error at t = 999."""
    stack = sample.load_stack(args.weights, device, prior_kind="diffusion", clip_path=args.clip)
    model, known = stack["prior"], scenes_of(args.known, args.seed, 0)
    z_known = embed(stack, known)
    with torch.enable_grad():
        read = train_probe(z_known, torch.stack([answers(s) for s in known]))
    scenes = scenes_of(args.n, args.seed, 1)
    truth, z_true = torch.stack([answers(s) for s in scenes]), embed(stack, scenes)
    captions = [everything(s, args.seed) for s in scenes]
    text, null = encode_captions(stack["clip"], stack["tokenizer"], captions)
    rows = {"true z_i": z_true}
    for steps in args.steps:
        noise = sample.generators("prior", args.seed << 20, range(args.n))
        rows[f"the prior's, {steps} steps"] = sample.in_batches(model, args.n, 128, lambda part: prior.sample(
            model, sample.rows(text, part), null, noise[part], steps=steps))
    print(f"| z_i | all | {' | '.join(NAMES)} |\n|{'---|' * 12}")
    for name, z_i in rows.items():
        right = (read(z_i.cpu()) == truth).float()
        print(f"| {name} | {right.all(1).float().mean():.3f} | {' | '.join(f'{share:.3f}' for share in right.mean(0))} |")
    t = torch.full((args.n,), 999, device=device)
    noise = torch.randn(z_true.shape, generator=torch.Generator().manual_seed(args.seed)).to(device)
    mean = sample.in_batches(model, args.n, 128, lambda part: model(noise[part], t[part], sample.rows(text, part)))
    centre, components, variances = prior.pca([z_known])
    off = (mean.to(device) - model.standardize(z_true.to(device))) * model.deviation  # along the prior's components
    error = ((off @ model.components).cpu().double() @ components.T).square().mean(0)
    print("\n| components | error at t = 999, share of their variance |\n|---|---|")
    for first, last in GROUPS:
        print(f"| {first + 1} to {last} | {error[first:last].sum() / variances[first:last].sum():.4f} |")


def paired_loss(model, scenes, z_i, text, null, seed, times=TIMES):
    """Print a decoder's loss given z_i, the caption, both or neither, with the same noise each time.

    z_i (n, d) and text are those of n scenes, null is the empty caption.
    """
    n, device = len(scenes), z_i.device
    nothing = {k: v.expand(n, *v.shape[1:]) for k, v in null.items()}
    given = {"z_i": (z_i, nothing), "caption": (0 * z_i, text), "both": (z_i, text), "neither": (0 * z_i, nothing)}
    x_0 = torch.stack([to_floats(to_tensor(render(s, model.config.image_size))) for s in scenes]).to(device)
    noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(seed)).to(device)
    alphas = decoder.cosine_schedule()
    print("| t | z_i | caption | both | neither | heard |\n|---|---|---|---|---|---|")
    for step in times:
        t, loss = torch.full((n,), step, device=device), {}
        x_t = decoder.q_sample(x_0, t, noise, alphas)
        for name, (z, captions) in given.items():
            eps = sample.in_batches(model, n, 32, lambda part: model(
                x_t[part], t[part], z[part], sample.rows(captions, part))[0])
            loss[name] = float((eps - noise.cpu()).square().mean() / alphas[step])  # that of the velocity
        gap = loss["neither"] - loss["z_i"]  # 0 before any training
        heard = f"{(loss['neither'] - loss['caption']) / gap:.0%}" if gap else "–"
        print(f"| {step} | {' | '.join(f'{loss[name]:.4f}' for name in given)} | {heard} |", flush=True)


def probe_decoder(args, device):
    """Print the paired loss of a folder's decoder."""
    stack = sample.load_stack(args.weights, device, prior_kind="none", clip_path=args.clip)
    scenes = scenes_of(args.n, args.seed, 1)
    text, null = encode_captions(stack["clip"], stack["tokenizer"], [everything(s, args.seed) for s in scenes])
    paired_loss(stack["decoder"], scenes, embed(stack, scenes).to(device), text, null, args.seed)


def main():
    parser = argparse.ArgumentParser(description="Read attributes back from the prior's z_i, or compare a decoder's losses under "
                                     "different conditions.")
    parser.add_argument("stage", choices=["prior", "decoder"])
    parser.add_argument("--weights", type=Path, default=sample.SHIPPED, help="folder of checkpoints (default: the shipped ones)")
    parser.add_argument("--clip", metavar="PATH", help="their CLIP, if it is not that folder's clip.pt")
    parser.add_argument("--n", type=int, default=500, help="scenes to measure (default 500)")
    parser.add_argument("--known", type=int, default=8000, help="scenes that the probe learns from (default 8000)")
    parser.add_argument("--steps", type=int, nargs="+", default=[64, 10], help="of the prior (default 64 10)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    args = parser.parse_args()
    with one_line_errors(), torch.no_grad():
        check_ranges(args, n=(2, 10 ** 6), known=(256, 10 ** 6), steps=(1, 1000), seed=(0, 1 << 20))
        (probe_prior if args.stage == "prior" else probe_decoder)(args, pick_device(args.device))


if __name__ == "__main__":
    main()
