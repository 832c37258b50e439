"""How does caption accuracy depend on guidance, steps and candidates, and what does it cost?

In:   a folder of checkpoints; the decoder's guidance scales, numbers of steps and of candidates to try
Out:  on stdout, a Markdown table for the whole chain: how often the whole caption is right, for one
      thing and two, and the seconds a picture takes. --plot draws the share right against these
      seconds, with one standard error up and down. Each guidance scale is tried with each number of
      steps and one candidate, each number of candidates with the defaults

All settings share captions and noise, so only the setting makes a difference. Guidance 1 is none: a
step needs one pass of the decoder, all other scales need two.

    python experiments/sweep.py --n 200 --plot runs/sweep.png
"""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sample
from caption_accuracy import draw_and_score
from clip_embed import UserError, one_line_errors, pick_device
from common import LINES
from data.shapes import attributes_in_caption, describe, random_scene

THINGS = ("one thing", "two things")


def captions_of(n, seed):
    """n captions, of one thing and of two in turn."""
    captions = []
    for k in range(n):
        rng = np.random.default_rng([seed, 1 << 20, k])
        scene = random_scene(rng, 1 + k % 2)
        captions.append(describe(scene, attributes_in_caption(scene, rng), rng))
    return captions


def measure(stack, captions, seed, **options):
    """({"one thing", "two things": (share right, its standard error)}, the networks' seconds a picture).

    options: those of sample.generate.
    """
    spent = {}
    right = [verdict["all"] for _, verdict, _ in draw_and_score(stack, captions, seed, seconds=spent, **options)]
    groups = {name: np.array(right[k::2], float) for k, name in enumerate(THINGS)}
    return ({name: (float(v.mean()), float(v.std() / len(v) ** 0.5)) for name, v in groups.items()},
            sum(spent.values()) / len(captions))


def plot(lines):
    """A chart of the share right against the seconds a picture takes (a logarithmic axis).

    lines: {name: [(seconds, label, share, standard error)]}.
    """
    width, height, left, right, top, bottom, font = 760, 440, 56, 24, 40, 56, ImageFont.load_default(14)
    picture = Image.new("RGB", (width, height), "white")
    pen, points = ImageDraw.Draw(picture), [point for line in lines.values() for point in line]
    first, last = (math.log2(end(seconds for seconds, *_ in points)) + way for end, way in ((min, -0.2), (max, 0.2)))
    least = math.floor(10 * min(share - error for *_, share, error in points)) / 10
    to_xy = lambda seconds, share: (left + (width - left - right) * (math.log2(seconds) - first) / (last - first),
                                    top + (height - top - bottom) * (1 - share) / (1 - least))
    pen.text((left, 10), "everything right, one thing or two, against seconds a picture", "black", font)
    for share in np.arange(1, least - 1e-9, -0.1 if least < 0.65 else -0.05):
        y = to_xy(1, share)[1]
        pen.line([(left, y), (width - right, y)], "gainsboro")
        pen.text((8, y), f"{share:.0%}", "black", font, anchor="lm")
    for power in range(math.ceil(first), math.floor(last) + 1):
        x = to_xy(2.0 ** power, 1)[0]
        pen.line([(x, top), (x, height - bottom)], "gainsboro")
        pen.text((x, height - bottom + 6), f"{2.0 ** power:.3g} s", "black", font, anchor="ma")
    begin = left
    for colour, (name, line) in zip(LINES, lines.items()):
        line = sorted(line)
        pen.line([to_xy(seconds, share) for seconds, _, share, _ in line], colour, 2)
        for seconds, label, share, error in line:
            pen.line([to_xy(seconds, min(1, share + error)), to_xy(seconds, share - error)], colour, 2)
            x, y = to_xy(seconds, share)
            pen.ellipse([x - 3, y - 3, x + 3, y + 3], colour)
            pen.text((x + 5, y + 3), label, colour, font)
        pen.text((begin, height - 24), name, colour, font)
        begin += pen.textlength(name, font) + 24
    return picture


def main():
    parser = argparse.ArgumentParser(
        description="Sweep the decoder's guidance and steps, then the candidates, and read back how "
        "often the pictures show their whole captions.")
    parser.add_argument("--guidance", type=float, nargs="*", default=[1, 1.25, 2, 4], help="scales (default 1 1.25 2 4)")
    parser.add_argument("--steps", type=int, nargs="*", default=[4, 6, 10, 20], help="steps (default 4 6 10 20)")
    parser.add_argument("--candidates", type=int, nargs="*", default=[2, 4, 8],
                        help="largest numbers of candidates (default 2 4 8)")
    parser.add_argument("--n", type=int, default=100, help="captions, half of one thing, half of two (default 100)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weights", type=Path, default=sample.SHIPPED, metavar="DIR", help="folder of checkpoints")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the sweeps")
    parser.add_argument("--json", type=Path, help="write the numbers")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    parser.add_argument("--precision", default="auto", choices=sample.PRECISIONS, help="as in sample.py (default auto)")
    args = parser.parse_args()
    with one_line_errors():
        for name, low, high in (("n", 2, 100_000), ("guidance", 0, 100), ("steps", 1, 990), ("candidates", 1, 1000)):
            if not all(low <= value <= high for value in np.atleast_1d(getattr(args, name))):
                raise UserError(f"--{name}: must be between {low} and {high}")
        stack = sample.load_stack(args.weights, pick_device(args.device), precision=args.precision)
        captions, rows, lines = captions_of(args.n, args.seed), [], {}
        settings = [(f"guidance {scale:g}", f"{steps} steps", {"decoder_guidance": scale, "decoder_steps": steps, "candidates": 1})
                    for scale in args.guidance for steps in args.steps]
        settings += [("candidates", f"at most {most}", {"candidates": most}) for most in args.candidates]
        print("| | | one thing | two things | seconds a picture |\n|---|---|---|---|---|")
        for line, label, options in tqdm(settings, "settings"):
            shares, seconds = measure(stack, captions, args.seed, **options)
            rows.append({**options, "seconds": seconds, **shares})
            means, errors = zip(*shares.values())
            point = seconds, label.removesuffix(" steps").removeprefix("at most "), sum(means) / 2, math.hypot(*errors) / 2
            lines.setdefault(line, []).append(point)
            cells = [f"{mean:.1%} ± {error:.1%}" for mean, error in shares.values()]
            print(f"| {line} | {label} | {' | '.join(cells)} | {seconds:.3f} |", flush=True)
        if args.plot and lines:
            plot(lines).save(args.plot)
        if args.json:
            args.json.write_text(json.dumps({"n": args.n, "seed": args.seed, "settings": rows}, indent=1))


if __name__ == "__main__":
    main()
