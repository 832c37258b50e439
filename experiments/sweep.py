"""How does caption accuracy depend on guidance, steps and candidates?

In:   a folder of checkpoints; the decoder's guidance scales, numbers of steps and of candidates to try
Out:  on stdout, a Markdown table for the whole chain: how often the whole caption is right, for one
      thing and two, and the seconds a picture takes. --plot draws it, with one standard error up
      and down. Each setting is varied with all others at their defaults; guidance and steps are
      tried with one candidate

All settings share captions and noise, so only the setting makes a difference.

    python experiments/sweep.py --n 200 --plot runs/sweep.png
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sample
from caption_accuracy import draw_and_score
from clip_embed import UserError, one_line_errors, pick_device
from common import chart
from data.shapes import attributes_in_caption, describe, random_scene

LINES = ("one thing", "two things")


def captions_of(n, seed):
    """n captions, of one thing and of two in turn."""
    captions = []
    for k in range(n):
        rng = np.random.default_rng([seed, 1 << 20, k])
        scene = random_scene(rng, 1 + k % 2)
        captions.append(describe(scene, attributes_in_caption(scene, rng), rng))
    return captions


def measure(stack, captions, seed, **options):
    """({"one thing", "two things": (share right, its standard error)}, seconds a picture).

    options: those of sample.generate.
    """
    began = time.perf_counter()
    right = [verdict["all"] for _, verdict, _ in draw_and_score(stack, captions, seed, **options)]
    groups = {name: np.array(right[k::2], float) for k, name in enumerate(LINES)}
    return ({name: (float(v.mean()), float(v.std() / len(v) ** 0.5)) for name, v in groups.items()},
            (time.perf_counter() - began) / len(captions))


def main():
    parser = argparse.ArgumentParser(
        description="Sweep the decoder's guidance, its steps, then its candidates, and read back "
        "how often the pictures show their whole captions.")
    parser.add_argument("--guidance", type=float, nargs="*", default=[1, 1.5, 2, 3, 4, 6], help="scales (default 1 1.5 2 3 4 6)")
    parser.add_argument("--steps", type=int, nargs="*", default=[5, 10, 20, 50], help="steps (default 5 10 20 50)")
    parser.add_argument("--candidates", type=int, nargs="*", default=[1, 2, 4, 8, 16],
                        help="largest numbers of candidates (default 1 2 4 8 16)")
    parser.add_argument("--n", type=int, default=100, help="captions, half of one thing, half of two (default 100)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weights", type=Path, default=sample.SHIPPED, metavar="DIR", help="folder of checkpoints")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the sweeps")
    parser.add_argument("--json", type=Path, help="write the numbers")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    args = parser.parse_args()
    with one_line_errors():
        for name, low, high in (("n", 2, 100_000), ("guidance", 0, 100), ("steps", 1, 990), ("candidates", 1, 1000)):
            if not all(low <= value <= high for value in np.atleast_1d(getattr(args, name))):
                raise UserError(f"--{name}: must be between {low} and {high}")
        stack = sample.load_stack(args.weights, pick_device(args.device))
        captions, panels = captions_of(args.n, args.seed), {}
        print("| | one thing | two things | seconds a picture |\n|---|---|---|---|")
        for title, key, settings in (("guidance", "decoder_guidance", args.guidance), ("steps", "decoder_steps", args.steps),
                                     ("candidates", "candidates", args.candidates)):
            for setting in tqdm(settings, title):
                shares, seconds = measure(stack, captions, args.seed, **{"candidates": 1} | {key: setting})
                panels.setdefault(title, []).append((setting, shares))
                cells = [f"{mean:.1%} ± {error:.1%}" for mean, error in shares.values()]
                print(f"| {title} {setting:g} | {' | '.join(cells)} | {seconds:.2f} |", flush=True)
        if args.plot and panels:
            chart({f"everything right, against {title}": {name: [(f"{setting:g}", *shares[name]) for setting, shares in points]
                                                          for name in LINES} for title, points in panels.items()}).save(args.plot)
        if args.json:
            args.json.write_text(json.dumps({"n": args.n, "seed": args.seed, **panels}, indent=1))


if __name__ == "__main__":
    main()
