"""A variant of the decoder, trained for a short time on the same batches as the others, and measured.

In:   a CLIP (--clip); the name of a variant
Out:  on stdout: the paired loss of probes.py at six timesteps, and how often the pictures show
      captions of two things, from the true z_i and from the caption alone. Short trainings differ
      in the loss long before they differ in the pictures.

    python experiments/trials.py base --steps 700
"""

import argparse
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import decoder
import sample
import train
from caption_accuracy import rates, score
from clip_embed import one_line_errors, pick_device, to_floats, to_tensor
from data.shapes import attributes_in_caption, describe, random_scene, render
from probes import TIMES, everything, paired_loss, scenes_of

VARIANTS = {  # (changes of the config, changes of the loss's options)
    "base": ({}, {}),
    "even": ({}, {"time_power": 1.0}),
    "paper": ({}, {"time_power": 1.0, "drop_z_i": 0.1, "drop_caption": 0.5}),
    "own-text": ({"text_layers": 2, "text_heads": 2, "text_context": 77}, {}),
    "wide": ({"multiples": (1, 2, 3)}, {}),
}


def train_variant(args, device):
    """The EMA of a variant's decoder after args.steps steps, and the FrozenCLIP."""
    change, options = VARIANTS[args.variant]
    recipe = train.RECIPES["shapes"]["decoder"]
    recipe = replace(recipe, steps=args.steps, loss=recipe.loss | options, ema_decay=0.99)
    train.RECIPES["shapes"]["decoder"] = recipe
    decoder.PRESETS["shapes"] = replace(decoder.PRESETS["shapes"], **change)
    run = train.build("decoder", train.prepare("decoder", args, device))
    loader = DataLoader(run.batches("train"), batch_size=None, num_workers=args.workers,
                        sampler=range(args.steps), prefetch_factor=4 if args.workers else None)
    began = time.time()
    for step, batch in enumerate(loader):
        for group in run.optimizer.param_groups:
            group["lr"] = train.learning_rate(step, recipe)
        run.optimizer.zero_grad(set_to_none=True)
        loss = train.add_gradients(run.loss, batch, step, run.context)
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
        run.optimizer.step()
        train.update_ema(run.ema, run.model, step, recipe.ema_decay)
        if step % 100 == 99:
            print(f"{args.variant}: step {step + 1}, loss {loss:.4f}, {time.time() - began:.0f} s", flush=True)
    return run.ema, run.context.frozen


def main():
    parser = argparse.ArgumentParser(description="Train a variant of the decoder for a short time and measure it.")
    parser.add_argument("variant", choices=VARIANTS, help="what to change")
    parser.add_argument("--steps", type=int, default=700, help="of training, 256 rows each (default 700)")
    parser.add_argument("--n", type=int, default=200, help="scenes to measure (default 200)")
    parser.add_argument("--clip", default=str(sample.SHIPPED / "clip.pt"),
                        help="(default: the shipped one)")
    parser.add_argument("--workers", type=int, default=1, help="processes that draw pictures")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    args = parser.parse_args()
    args.__dict__.update(preset="shapes", data=None, dry_run=False, precision="auto", seed=0, out=Path("runs/trials"),
                         bpe=None, given="z_i", batch_size=None, learning_rate=None)
    with one_line_errors():
        device = pick_device(args.device)
        model, frozen = train_variant(args, device)
        with torch.no_grad():
            measure(model, frozen, args, device)


def z_i_of(frozen, scenes, device):
    """z_i (n, d) of the pictures of n scenes."""
    pictures = torch.stack([to_tensor(render(s, 64)) for s in scenes]).to(device)
    return frozen.encode_pictures(to_floats(pictures))


def measure(model, frozen, args, device):
    """Print the paired loss and the shares of captions shown."""
    scenes = scenes_of(args.n, 1, 1)
    text, null = frozen.encode_texts([everything(s, 1) for s in scenes])
    print(args.variant)
    paired_loss(model, scenes, z_i_of(frozen, scenes, device), text, null, 1, (300, *TIMES))
    rngs = [np.random.default_rng([1, 1 << 53, k]) for k in range(args.n)]
    scenes = [random_scene(rng, 2) for rng in rngs]
    captions = [describe(s, attributes_in_caption(s, rng), rng) for s, rng in zip(scenes, rngs)]
    z_i = z_i_of(frozen, scenes, device)
    text, null = frozen.encode_texts(captions)
    nothing = {k: v.expand(args.n, *v.shape[1:]) for k, v in null.items()}
    for name, z, words in (("true z_i", z_i, nothing), ("true z_i, caption", z_i, text), ("caption alone", 0 * z_i, text)):
        images = decoder.sample(model, z, words, null, sample.generators("decoder", 0, range(args.n)), steps=30)
        with ProcessPoolExecutor(4) as pool:
            verdicts = list(pool.map(score, map(sample.to_picture, images.cpu()), captions, chunksize=10))
        got = rates([(c, v, None) for c, v in zip(captions, verdicts)])
        print(f"| {args.variant} | {name} | " + ", ".join(f"{a} {got[a]['all'][0] / max(1, got[a]['all'][1]):.1%}" for a in got), flush=True)


if __name__ == "__main__":
    main()
