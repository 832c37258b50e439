"""How good are the upsamplers on true small pictures? Error and sharpness beside bicubic enlargement and the truth.

In:   a folder of checkpoints; scenes never seen in training, drawn at 64, 256 and 1024 pixels
Out:  on stdout, a Markdown table: PSNR against the true rendering (dB, over all pictures), and the width of edges:
      how many pixels a circle's outline takes to go from 10% to 90% of its colour (median over circles and directions)

1024 is made from the true 64 by both upsamplers, one after the other, as in sample.py.

    python experiments/upsamplers.py
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sample
import upsample
from clip_embed import UserError, one_line_errors, pick_device, to_floats, to_tensor
from data import shapes


def edge_widths(pixels, thing, plain, sectors=16):
    """The 10–90% widths, in pixels, of a circle's outline in each of `sectors` directions (one value a direction).

    pixels (H, H, 3); thing the Thing drawn there, a solid circle; plain the same picture without it. In each sector the
    share of the circle's colour is averaged over rings half a pixel wide, and its crossings of 90% and 10% interpolated.
    """
    side = len(pixels)
    colour = np.array(shapes.COLOURS[thing.colour], float) - plain
    share = ((pixels - plain) * colour).sum(-1) / (colour ** 2).sum(-1)  # 1 inside, 0 outside
    y, x = (np.mgrid[:side, :side] + 0.5)
    x, y = x - thing.x * side, y - thing.y * side
    distance, sector = np.hypot(x, y) - thing.radius * side, ((np.arctan2(y, x) / (2 * np.pi) + 1) * sectors).astype(int) % sectors
    reach = 0.7 * thing.radius * side
    rings = np.arange(-reach, min(reach, 0.02 * side) + 0.5, 0.5)
    widths = []
    for k in range(sectors):
        chosen = (sector == k) & (distance >= rings[0]) & (distance < rings[-1])
        ring = np.digitize(distance[chosen], rings) - 1
        count = np.bincount(ring, minlength=len(rings) - 1)
        mean = np.bincount(ring, share[chosen], minlength=len(rings) - 1)[count > 0] / count[count > 0]
        at = (rings[:-1] + 0.25)[count > 0]
        level = np.minimum.accumulate(mean)[::-1]  # falling outwards: reversed it rises, as np.interp wants
        widths.append(np.interp(0.1, level, at[::-1]) - np.interp(0.9, level, at[::-1]))
    return widths


def scene_with_circle(seed, k):
    """A scene that training never shows (its own seeds), of one solid circle."""
    scene = shapes.random_scene(np.random.default_rng([seed, 1 << 21, k]), 1)
    return replace(scene, things=(replace(scene.things[0], shape="circle", fill="solid"),))


def main():
    parser = argparse.ArgumentParser(description="PSNR and width of edges of the upsamplers on true renderings at 64 pixels, beside "
                                     "bicubic enlargement and the true renderings.")
    parser.add_argument("--n", type=int, default=50, help="scenes (default 50); half hold one circle, for the edges")
    parser.add_argument("--size", type=int, default=1024, choices=(256, 1024), help="the largest size to make (default 1024)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weights", type=Path, default=sample.SHIPPED, metavar="DIR", help="folder of checkpoints")
    parser.add_argument("--sheet", type=Path, metavar="PNG", help="draw the first scenes: bicubic, upsampled, true")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    args = parser.parse_args()
    with one_line_errors():
        if not 2 <= args.n <= 100_000:
            raise UserError(f"--n {args.n}: must be between 2 and 100000")
        device = pick_device(args.device)
        stack = sample.load_stack(args.weights, device, args.size)
        errors, widths, rows = {}, {}, []
        for k in tqdm(range(args.n), "scenes"):
            scene = scene_with_circle(args.seed, k) if k % 2 else shapes.random_scene(np.random.default_rng([args.seed, 1 << 21, k]))
            small = shapes.render(scene, 64)
            image = to_floats(to_tensor(small)[None].to(device))
            for size in sample.SIZES[1:sample.SIZES.index(args.size) + 1]:
                image = upsample.sample(stack[f"upsample-{size}"], image, sample.generators(f"upsample-{size}", args.seed, [k]))
                versions = {"bicubic": small.resize((size, size), Image.Resampling.BICUBIC), "upsampled": sample.to_picture(image[0]),
                            "true": shapes.render(scene, size)}
                pixels = {name: np.asarray(picture, float) for name, picture in versions.items()}
                for name in versions:
                    errors.setdefault((size, name), []).append(np.mean((pixels[name] - pixels["true"]) ** 2))
                    if k % 2:
                        plain = np.asarray(shapes.render(replace(scene, things=()), size), float)
                        widths.setdefault((size, name), []).extend(edge_widths(pixels[name], scene.things[0], plain))
                if size == args.size and len(rows) < 9:
                    rows += [torch.from_numpy(p).permute(2, 0, 1) / 127.5 - 1 for p in pixels.values()]
        print("| size | | PSNR (dB) | edges, 10–90% (pixels) | of the true edges' |\n|---|---|---|---|---|")
        for (size, name), values in errors.items():
            width = np.median(widths[size, name])
            psnr = "–" if name == "true" else f"{10 * np.log10(255 ** 2 / np.mean(values)):.2f}"
            print(f"| {size} | {name} | {psnr} | {width:.2f} | {width / np.median(widths[size, 'true']):.2f} |")
        if args.sheet:
            sample.grid(rows, 3).save(args.sheet)


if __name__ == "__main__":
    main()
