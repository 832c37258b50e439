"""Which prior is better, at equal training compute and at equal sampling time? (table 2 and §2.2 prefer the diffusion prior)

In:   a folder of checkpoints; --prior and --ar-prior, other checkpoints of the priors, such as two trained for this
Out:  on stdout, what each prior's training cost, in operations that torch counts in one step, times its steps; a table of
      the autoregressive prior, the diffusion prior, and the diffusion prior with as many steps as take no longer than the
      autoregressive one: seconds, Fréchet distance of z_i to true ones, how often a picture decoded from z_i shows all that
      its caption says, and the Fréchet distance of those pictures; then the conclusions. --picture: pictures, a prior a row

Which comparison is at equal training compute is for the counts to say: where they differ by more than a tenth, the script says
how many steps would make them equal.

    python experiments/table2.py
    python experiments/table2.py --prior runs/equal/prior.pt --ar-prior runs/equal/ar-prior.pt
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import prior
import sample
from clip_embed import UserError, encode_captions, one_line_errors, pick_device, read_checkpoint
from common import (conclude, decode, draw, fidelity, finish, first_pictures, jackknife, load_network, observe, options,
                    parse, right, show, true_scenes)
from priors import embed, frechet
from speed import operations
from sweep import captions_of

LOSSES = {"prior": prior.prior_loss, "ar-prior": prior.ar_loss}
MORE = 10  # embeddings for each picture: they cost little, and Fréchet distances want many


def training(path, stage, stack):
    """(steps, operations of one step) of a prior's training, as its checkpoint says. Raises UserError."""
    checkpoint = read_checkpoint(path, stage)
    try:
        record = checkpoint.get("trained") or checkpoint["training"]
        steps, batch = record["step"], record["recipe"]["batch_size"]
    except (KeyError, TypeError):
        raise UserError(f"{path}: does not say how long it was trained") from None
    few = captions_of(8, 0)
    text, null = encode_captions(stack["clip"], stack["tokenizer"], few)
    z_i = embed(stack, true_scenes(few, 0)).to(text["z_t"].device)
    network = stack[stage].requires_grad_(True)
    with torch.enable_grad():
        count = operations(lambda: LOSSES[stage](network, z_i, text, null).backward())
    network.requires_grad_(False).zero_grad()
    return steps, count / len(few) * batch


def equal_steps(stack, captions):
    """For these captions (seconds of the AR prior, of the diffusion prior, the latter's steps that take no longer than the former)."""
    def seconds(kind, steps=None):
        began = time.perf_counter()
        draw(stack, captions, 0, kind, steps=steps)
        return time.perf_counter() - began

    ar, one, full = seconds("ar"), seconds("diffusion", 1), seconds("diffusion")
    each = (full - one) / max(1, stack["prior"].config.steps - 1)
    return ar, full, int(np.clip(1 + (ar - one) / max(each, 1e-9), 1, stack["prior"].config.steps))


def measure(stack, args, steps):
    """({prior: {column: one number a seed}}, {prior: images of seed 0}); steps: of the diffusion prior at equal time."""
    kinds = {"AR": ("ar", None), "diffusion": ("diffusion", None), "diffusion, AR's time": ("diffusion", steps)}
    seen, z, seconds, true, first, captions = ({k: [] for k in kinds}, {k: [] for k in kinds}, {k: [] for k in kinds}, [], {}, [])
    for seed in tqdm(range(args.seeds), "seeds"):
        many = captions_of(MORE * args.n, seed)
        some = many[:args.n]
        captions += some
        true += embed(stack, true_scenes(many, 1000 + seed))
        for name, (kind, number) in kinds.items():
            began = time.perf_counter()
            z_i = draw(stack, many, seed, kind, steps=number)
            seconds[name].append((time.perf_counter() - began) * 1000 / len(many))
            images = decode(stack, z_i[:args.n], some, seed, steps=args.steps)
            z[name].append(list(z_i))
            seen[name].append(observe(images, some))
            first.setdefault(name, images)
    columns, true = {"all right": right("all"), **fidelity(captions)}, torch.stack(true)
    distance = lambda z_i: 1000 * frechet(torch.stack(z_i), true)
    return {name: {"seconds for 1,000": seconds[name], "distance of z_i, ×1000": jackknife(distance, z[name])}
            | {c: jackknife(statistic, seen[name]) for c, statistic in columns.items()} for name in kinds}, first


def conclusions(rows):
    """The diffusion prior, with all steps and at equal time, against the autoregressive one."""
    ar, *diffusion = rows
    return [conclude(f"{name} against {ar}, {c}", rows[name][c], rows[ar][c], "higher", "lower")
            for name in diffusion for c in rows[ar] if c != "seconds for 1,000"]


def balance(costs):
    """A sentence on the training of both priors, {stage: (steps, operations of one)}: equal, or what would make it so."""
    totals = {stage: steps * each for stage, (steps, each) in costs.items()}
    said = "; ".join(f"{stage} {steps:,} steps of {each / 1e9:,.1f} GFLOP, {totals[stage] / 1e12:,.0f} TFLOP in all"
                     for stage, (steps, each) in costs.items())
    less, more = sorted(totals, key=totals.get)
    if totals[more] < 1.1 * totals[less]:
        return f"Training: {said}: equal within a tenth. What follows is at equal training compute."
    return (f"Training: {said}: not equal. Equal to {less} would be {more} trained for "
            f"{round(totals[less] / costs[more][1]):,} steps; what follows is not at equal training compute.")


def main():
    """The script: what --help says."""
    parser = options("Compare the autoregressive with the diffusion prior, as trained and at equal sampling time.", 48,
                     f"captions whose pictures are decoded; {MORE} times as many z_i are drawn")
    for stage in LOSSES:
        parser.add_argument(f"--{stage}", type=Path, metavar="PATH", help=f"default: {stage}.pt of --weights")
    with one_line_errors(), torch.no_grad():
        args = parse(parser)
        stack = sample.load_stack(args.weights, pick_device(args.device), prior_kind="none")
        paths = {"prior": args.prior or args.weights / "prior.pt", "ar-prior": args.ar_prior or args.weights / "ar-prior.pt"}
        stack |= {stage: load_network(path, stage, stack) for stage, path in paths.items()}
        said = balance({stage: training(path, stage, stack) for stage, path in paths.items()})
        ar, full, steps = equal_steps(stack, captions_of(64, 0))
        print(f"{said}\nSampling 64 z_i: AR {ar:.2f} s, diffusion {full:.2f} s; AR takes as long as {steps} of its steps.\n",
              flush=True)
        rows, first = measure(stack, args, steps)
        show(rows, "prior")
        finish(args, conclusions(rows), first_pictures(first), training=said, steps=steps, rows=rows)


if __name__ == "__main__":
    main()
