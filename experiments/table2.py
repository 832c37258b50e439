"""Which prior is better, at equal training compute and at equal sampling time?

The paper prefers the diffusion prior (table 2, §2.2).

In:   a folder of checkpoints; --prior and --ar-prior, other checkpoints of the priors, such as two
      trained for this comparison
Out:  on stdout, the training cost of each prior: the operations that torch counts in one step,
      times the steps. Then a table of the autoregressive prior, the diffusion prior, and the
      diffusion prior with fewer steps, so that it takes no longer than the autoregressive prior.
      Its columns: seconds, the Fréchet distance of z_i to true ones, how often a picture decoded
      from z_i shows its whole caption, and the Fréchet distance of those pictures. Then the
      conclusions. --picture: pictures, one prior per row

The counts show if training compute is equal. If they differ by more than a quarter, the script
prints the number of steps that would make them equal. Equal sampling time is measured, or set by
--equal-steps.

    python experiments/table2.py
    python experiments/table2.py --prior runs/equal/prior.pt --ar-prior runs/equal/ar-prior.pt
"""

import copy
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import prior
import sample
from clip_embed import UserError, encode_captions, one_line_errors
from weights.checkpoints import read_checkpoint
from common import (conclude, decode, draw, fidelity, finish, gallery, jackknife, load, load_network, observe, options, parse,
                    right, seeds, show, true_scenes)
from priors import embed, frechet
from speed import operations
from sweep import captions_of

LOSSES = {"prior": prior.prior_loss, "ar-prior": prior.ar_loss}
MORE = 10  # embeddings for each picture: they are cheap, and Fréchet distances need many


def training(path, stage, stack):
    """(steps, operations of one step) of a prior's training. Raises UserError."""
    checkpoint = read_checkpoint(path, stage)
    try:
        record = checkpoint.get("trained") or checkpoint["training"]
        steps, batch, loss = record["step"], record["recipe"]["batch_size"], record["recipe"].get("loss", {})
    except (KeyError, TypeError):
        raise UserError(f"{path}: does not say how long it was trained") from None
    one = captions_of(batch, 0)  # as in training: operations grow with the longest caption
    text, null = encode_captions(stack["clip"], stack["tokenizer"], one)
    z_i = embed(stack, true_scenes(one, 0)).to(text["z_t"].device)
    network = copy.deepcopy(stack[stage]).float().requires_grad_(True)  # codes are too fine for bfloat16
    with torch.enable_grad():
        count = operations(lambda: LOSSES[stage](network, z_i, text, null, sample.generators("prior", 0, range(batch)),
                                                 **loss).backward())
    return steps, count


def equal_steps(stack, captions):
    """(seconds of the AR prior, seconds of the diffusion prior, steps at equal time) for captions.

    The last is the number of diffusion steps that take no longer than the AR prior.
    """
    def seconds(kind, steps=None):
        times = []
        for _ in range(4):
            began = time.perf_counter()
            draw(stack, captions, 0, kind, steps=steps)
            times.append(time.perf_counter() - began)
        return min(times[1:])  # the first one warms up

    ar, one, full = seconds("ar"), seconds("diffusion", 1), seconds("diffusion")
    each = (full - one) / max(1, stack["prior"].config.steps - 1)
    return ar, full, int(np.clip(1 + (ar - one) / max(each, 1e-9), 1, stack["prior"].config.steps))


def measure(stack, args, steps):
    """({prior: {column: one number per seed}}, a picture of the first captions).

    steps: those of the diffusion prior at equal time.
    """
    kinds = {"AR": ("ar", None), "diffusion": ("diffusion", None), "diffusion, AR's time": ("diffusion", steps)}
    observations, z, seconds, true, first, captions = ({k: [] for k in kinds}, {k: [] for k in kinds}, {k: [] for k in kinds}, [], {}, [])
    for seed in seeds(args):
        many = captions_of(MORE * args.n, seed)
        some = many[:args.n]
        captions.append(some)
        true.append(list(embed(stack, true_scenes(many, 1000 + seed))))
        for name, (kind, number) in kinds.items():
            began = time.perf_counter()
            z_i = draw(stack, many, seed, kind, steps=number)
            seconds[name].append((time.perf_counter() - began) * 1000 / len(many))
            images = decode(stack, z_i[:args.n], some, seed, steps=args.steps)
            z[name].append(list(z_i))
            observations[name].append(observe(images, some))
            first.setdefault(name, images)
    columns = {"all right": right("all"), **fidelity(captions)}
    distance = lambda z_i, true: 1000 * frechet(torch.stack(z_i), torch.stack(true))
    return {name: {"seconds for 1,000": seconds[name], "distance of z_i, ×1000": jackknife(distance, z[name], true)}
            | {c: column(observations[name]) for c, column in columns.items()} for name in kinds}, gallery(first, captions[0])


def conclusions(rows):
    """The diffusion prior, with all steps and at equal time, against the autoregressive one."""
    ar, *diffusion = rows
    return [conclude(f"{name} against {ar}, {c}", rows[name][c], rows[ar][c], "higher", "lower")
            for name in diffusion for c in rows[ar] if c != "seconds for 1,000"]


def balance(costs):
    """A sentence on the training of both priors: equal, or the steps that would make it equal.

    costs: {stage: (steps, operations of one)}.
    """
    totals = {stage: steps * each for stage, (steps, each) in costs.items()}
    spent = "; ".join(f"{stage} {steps:,} steps of {each / 1e9:,.1f} GFLOP, {totals[stage] / 1e12:,.0f} TFLOP in all"
                     for stage, (steps, each) in costs.items())
    less, more = sorted(totals, key=totals.get)
    ratio = totals[more] / totals[less]
    if ratio < 1.25:
        return f"Training: {spent}: {more} {ratio:.2f} times as much, so what follows is at nearly equal training compute."
    return (f"Training: {spent}: {more} {ratio:.2f} times as much. Equal to {less} would be {more} trained for "
            f"{round(totals[less] / costs[more][1]):,} steps; what follows is not at equal training compute.")


def main():
    parser = options("Compare the autoregressive with the diffusion prior, as trained and at equal "
                     "sampling time.", 48,
                     f"captions whose pictures are decoded; {MORE} times as many z_i are drawn")
    for stage in LOSSES:
        parser.add_argument(f"--{stage}", type=Path, metavar="PATH", help=f"default: {stage}.pt of --weights")
    parser.add_argument("--equal-steps", type=int,
                        help="steps of the diffusion prior in the last row (default: as many as "
                        "take no longer than the autoregressive prior, by the clock)")
    with one_line_errors(), torch.no_grad():
        args = parse(parser)
        if args.equal_steps is not None and not 1 <= args.equal_steps <= 1000:
            raise UserError(f"--equal-steps {args.equal_steps}: must be between 1 and 1000")
        stack = load(args, prior_kind="none")
        paths = {"prior": args.prior or args.weights / "prior.pt", "ar-prior": args.ar_prior or args.weights / "ar-prior.pt"}
        stack |= {stage: load_network(path, stage, stack) for stage, path in paths.items()}
        spent = balance({stage: training(path, stage, stack) for stage, path in paths.items()})
        ar, full, steps = equal_steps(stack, captions_of(64, 0))
        steps = args.equal_steps or steps
        print(f"{spent}\nSampling 64 z_i: AR {ar:.2f} s, diffusion {full:.2f} s; the last row has {steps} of its steps.\n",
              flush=True)
        rows, picture = measure(stack, args, steps)
        show(rows, "prior")
        finish(args, conclusions(rows), picture, training=spent, steps=steps, rows=rows)


if __name__ == "__main__":
    main()
