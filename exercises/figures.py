"""Draw the pages' pictures: what right looks like, and beside it a common mistake, made by the wrong answers of wrong.py.

    python exercises/figures.py
"""

import argparse
import math
import types

import numpy as np
import torch
from PIL import Image, ImageDraw

from hand_out import ROOT
from wrong import WRONG, apply

PAGES = ROOT / "exercises/pages"
SIDE, GAP = 160, 12


def stage(name, exercise=None, mistake=None):
    """A stage file as a module, with one of an exercise's wrong answers in it."""
    source = (ROOT / f"{name}.py").read_text(encoding="utf-8")
    if mistake:
        function, _, _, changes = next(case for case in WRONG[exercise] if case[1] == mistake)
        source = apply(source, function, changes)
    module = types.ModuleType(name)
    module.__file__ = str(ROOT / f"{name}.py")
    exec(compile(source, name, "exec"), vars(module))
    return module


def row(pictures):
    """Pillow pictures side by side on white."""
    sheet = Image.new("RGB", (sum(p.width + GAP for p in pictures) + GAP, max(p.height for p in pictures) + 2 * GAP), "white")
    x = GAP
    for picture in pictures:
        sheet.paste(picture, (x, GAP))
        x += picture.width + GAP
    return sheet


def panel(lines, dots=(), low=(0, 0), high=(1, 1)):
    """A framed square with lines and dots, each a list of (x, y)."""
    picture = Image.new("RGB", (SIDE, SIDE), "white")
    draw, place = ImageDraw.Draw(picture), lambda p: tuple(
        8 + (SIDE - 16) * (v - a) / (b - a) if k == 0 else SIDE - 8 - (SIDE - 16) * (v - a) / (b - a)
        for k, (v, a, b) in enumerate(zip(p, low, high)))
    draw.rectangle((0, 0, SIDE - 1, SIDE - 1), outline="gray")
    for line in lines:
        draw.line([place(p) for p in line], "royalblue", 2)
    for x, y in map(place, dots):
        draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill="firebrick")
    return picture


def enlarged(image, side=SIDE):
    """A tensor (3, H, W) in [-1, 1] as a Pillow picture, its pixels visible."""
    pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)


def schedule():
    """ᾱ over t: right, without the square, with the β multiplied."""
    curves = [stage("decoder", 3, mistake).cosine_schedule() for mistake in (None, "forgets the square", "multiplies the β")]
    return row([panel([[(t / 999, float(a[t])) for t in range(0, 1000, 9)]]) for a in curves])


def scene():
    """The shipped picture of a circle, (1, 3, 64, 64)."""
    picture = Image.open(ROOT / "docs/pictures/circle.png").convert("RGB").resize((64, 64), Image.Resampling.BOX)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1


def noise():
    """A picture at five timesteps, right above, with the roots swapped below."""
    rows = []
    for mistake in (None, "swaps √ᾱ and √(1−ᾱ)"):
        decoder, t = stage("decoder", 4, mistake), torch.tensor([0, 250, 500, 750, 999])
        eps = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)).expand(5, -1, -1, -1)
        images = decoder.q_sample(scene().expand(5, -1, -1, -1), t, eps, decoder.cosine_schedule())
        rows.append(row([enlarged(image, 96) for image in images]))
    sheet = Image.new("RGB", (rows[0].width, 2 * rows[0].height - GAP), "white")
    sheet.paste(rows[0], (0, 0)), sheet.paste(rows[1], (0, rows[0].height - GAP))
    return sheet


def crops():
    """A blurred corner, right and with zeros around; a low crop over its high crop, in place and one pixel off."""
    flat = scene()[..., :8, :8]
    blurs = [stage("upsample", 12, mistake).gaussian_blur((flat + 1) / 2) * 2 - 1 for mistake in (None, "pads with zeros")]
    low = torch.nn.functional.avg_pool2d(scene(), 4)
    pairs = []
    for off in (0, 1):
        high, small = scene()[0, :, 16:48, 16:48], low[0, :, 4:12, 4 + off:12 + off]
        pairs.append(Image.blend(enlarged(high), enlarged(small), 0.5))
    return row([enlarged(b[0]) for b in blurs] + pairs)


def mask():
    """The prior's mask: right, off by one, padding left in."""
    squares = []
    for mistake in (None, "is off by one", "padding"):
        prior = stage("prior", 13, mistake if mistake == "is off by one" else None)
        model = prior.DiffusionPrior(prior.PriorConfig(embed_dim=4, clip_text_width=4, text_context=5, width=4, layers=0,
                                                       heads=1))
        seen = torch.tensor([[True] * 3 + [mistake == "padding"] * 2])
        text = {"states": torch.zeros(1, 5, 4), "z_t": torch.zeros(1, 4), "mask": seen}
        grid = model.sequence(torch.zeros(1, 4), torch.tensor([0]), text)[1][0, 0]
        squares.append(enlarged(grid.float().expand(3, -1, -1) * 2 - 1, 153))
    picture = row(squares)
    for k in range(3):
        for n in range(10):
            x, y = GAP + k * (153 + GAP), GAP
            ImageDraw.Draw(picture).line([(x + 17 * n, y), (x + 17 * n, y + 153)], "gray")
            ImageDraw.Draw(picture).line([(x, y + 17 * n), (x + 153, y + 17 * n)], "gray")
    return picture


def buckets():
    """A histogram with the edges of eight buckets, equally full above, equally wide below."""
    values = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    heights, edges = np.histogram(values.numpy(), 80, (-3.5, 3.5))
    panels = []
    for mistake in (None, "makes the buckets equally wide"):
        cuts = stage("prior", 16, mistake).quantile_buckets(values[values.abs() < 3.5], 8)[0].tolist()
        picture = Image.new("RGB", (560, 100), "white")
        draw = ImageDraw.Draw(picture)
        for k, height in enumerate(heights):
            draw.rectangle((7 * k, 99 - 90 * height / heights.max(), 7 * k + 6, 99), fill="lightsteelblue")
        for cut in cuts:
            draw.line([((cut + 3.5) * 80, 0), ((cut + 3.5) * 80, 99)], "firebrick", 2)
        panels.append(picture)
    sheet = Image.new("RGB", (560 + 2 * GAP, 200 + 3 * GAP), "white")
    sheet.paste(panels[0], (GAP, GAP)), sheet.paste(panels[1], (GAP, 100 + 2 * GAP))
    return sheet


def slerps():
    """Five steps between two vectors, right and by two mistakes; noise halfway, right and by the straight line."""
    a, b = (torch.tensor([[math.cos(x), math.sin(x)]]) for x in (0.1, 2.7))
    x, y = torch.randn(2, 1, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    arc = [(math.cos(t), math.sin(t)) for t in np.linspace(0, math.pi, 60)]
    kinds = {m: stage("manipulate", 18, m).slerp for m in (None, "goes straight", "goes straight and normalizes")}
    panels = [panel([arc], [tuple(f(a, b, k / 6)[0].tolist()) for k in range(7)], (-1.1, -0.6),
                    (1.1, 1.6)) for f in kinds.values()]
    halves = [kinds[m](x, y, 0.5)[0] / 2.5 for m in (None, "goes straight")]
    return row(panels + [enlarged(half) for half in halves])


def main():
    argparse.ArgumentParser(description="Draw the pictures of the exercises' pages, exercises/pages/*.png.").parse_args()
    for name, draw in {"03-schedule": schedule, "04-noise": noise, "12-crops": crops, "13-mask": mask, "16-buckets": buckets,
                       "18-slerp": slerps}.items():
        draw().quantize(64).save(PAGES / f"{name}.png", optimize=True)
        print(PAGES / f"{name}.png")


if __name__ == "__main__":
    main()
