"""Which stage loses attributes of the caption? (figure 8's rows, measured)

Each stage in turn gets the true input, and the pictures are read back.

In:   a folder of checkpoints; --n scenes never trained on, with a caption for each
Out:  on stdout, a Markdown table: how often each attribute of the captions is right in the
      decoder's pictures. The decoder gets z_i of the true picture, z_i of the prior or none, with
      the caption and without. Then the first --large pictures: true 64s and generated ones,
      enlarged by the upsamplers and scaled back

All rows share scenes, captions and noise, so only the row makes a difference.

    python experiments/stages.py --n 200 --large 100
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sample
import upsample
from caption_accuracy import rates, score
from clip_embed import UserError, check_ranges, one_line_errors, pick_device
from common import decode, draw, to_images
from priors import embed
from data.shapes import attributes_in_caption, describe, random_scene

COLUMNS = ("count", "shape", "colour", "size", "fill", "relation", "background", "bound", "all")


def enlarged(stack, images, seed, device):
    """Images (n, 3, 64, 64) through both upsamplers: {256 and 1024: averaged back to 64}."""
    out = {size: [] for size in sample.SIZES[1:]}
    for k, image in enumerate(tqdm(images, "upsamplers")):
        image = image[None].to(device)
        for size in out:
            image = upsample.sample(stack[f"upsample-{size}"], image, sample.generators(f"upsample-{size}", seed, [k]))
            out[size].append(torch.nn.functional.avg_pool2d(image.cpu(), size // 64)[0])
    return {size: torch.stack(some) for size, some in out.items()}


def cells(images, captions):
    """The table's cells of pictures read back: [right, named] of each attribute."""
    got = rates([(caption, score(sample.to_picture(image), caption), None) for caption, image in zip(captions, images)])
    return {a: got[a]["all"] for a in COLUMNS}


def main():
    parser = argparse.ArgumentParser(
        description="Read back the decoder's pictures from the true z_i, the prior's or none, with "
        "the caption and without, and the attributes that the upsamplers keep.")
    parser.add_argument("--n", type=int, default=200, help="captions (default 200)")
    parser.add_argument("--large", type=int, default=50,
                        help="pictures to send through both upsamplers, twice half a second each (default "
                             "50; 0: none)")
    parser.add_argument("--things", type=int, choices=(1, 2),
                        help="only scenes with this number of things")
    parser.add_argument("--guidance", type=float, help="of the decoder (default: its own)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weights", type=Path, default=sample.SHIPPED, metavar="DIR", help="folder of checkpoints")
    parser.add_argument("--json", type=Path, help="write the numbers")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    args = parser.parse_args()
    with one_line_errors(), torch.no_grad():
        if not 1 <= args.n <= 100_000 or not 0 <= args.large <= args.n or not 0 <= args.seed < 1 << 30:
            raise UserError("--n must be between 1 and 100000, --large between 0 and --n, --seed between 0 and 2^30")
        check_ranges(args, guidance=(0, 100))
        device = pick_device(args.device)
        stack = sample.load_stack(args.weights, device, 1024 if args.large else 64)
        rngs = [np.random.default_rng([args.seed, 1 << 21, k]) for k in range(args.n)]
        scenes = [random_scene(rng, args.things) for rng in rngs]
        captions = [describe(scene, attributes_in_caption(scene, rng), rng) for scene, rng in zip(scenes, rngs)]
        true, empty = to_images(scenes), [""] * args.n
        z_true, z_prior = embed(stack, scenes), draw(stack, captions, args.seed, "diffusion")
        rows = {"the true picture": true}
        for name, z_i, words in tqdm((("true z_i, caption", z_true, captions), ("true z_i alone", z_true, empty),
                                      ("prior's z_i, caption", z_prior, captions), ("prior's z_i alone", z_prior, empty),
                                      ("caption alone", torch.zeros_like(z_true), captions)), "decoder"):
            rows[name] = decode(stack, z_i, words, args.seed, args.guidance)
        if args.large:
            for name, small in (("the true 64s", true), ("the prior's 64s", rows["prior's z_i, caption"])):
                small = small[:args.large]
                rows |= {f"{name}, first {args.large}": small} | {
                    f"{name}, at {size}, scaled back": back for size, back in enlarged(stack, small, args.seed, device).items()}
        print(f"| | {' | '.join(COLUMNS)} |" + "\n|---" + "|---" * len(COLUMNS) + "|")
        numbers = {name: cells(images, captions) for name, images in rows.items()}
        for name, row in numbers.items():
            print(f"| {name} | {' | '.join(f'{right / of:.1%}' if of else '–' for right, of in row.values())} |")
        if args.json:
            args.json.write_text(json.dumps({"n": args.n, "seed": args.seed, "things": args.things, "rows": numbers}, indent=1))


if __name__ == "__main__":
    main()
