"""Draw the pictures of the side-by-side pages from the code and the shipped weights.

Out:  beside this file: schedule.svg, mask.svg, steps.png. Half a minute

    python docs/side_by_side/draw.py
"""

import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
import decoder
import prior
import sample
import upsample

CAPTION = "a large red circle above a small blue star"
TEXT = 'font-family="sans-serif" font-size="13" fill="#1b1f24"'


def schedule():
    """√ᾱ_t and √(1 − ᾱ_t) of both schedules, as SVG."""
    wide, high, left, top = 460, 220, 40, 10
    curves = (("cosine: √ᾱ", decoder.cosine_schedule().sqrt(), "#0b57a4", ""),
              ("cosine: √(1 − ᾱ)", (1 - decoder.cosine_schedule()).sqrt(), "#0b57a4", "5 4"),
              ("linear: √ᾱ", upsample.linear_schedule().sqrt(), "#b0480a", ""),
              ("linear: √(1 − ᾱ)", (1 - upsample.linear_schedule()).sqrt(), "#b0480a", "5 4"))
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide + 60} {high + 110}">',
             f'<rect x="{left}" y="{top}" width="{wide}" height="{high}" fill="none" stroke="#888"/>']
    for n, (name, values, colour, dashes) in enumerate(curves):
        points = " ".join(f"{left + wide * t / 999:.1f},{top + high * (1 - float(values[t])):.1f}"
                          for t in range(0, 1000, 9))
        line = f'fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dashes or "none"}"'
        x, y = left + 240 * (n % 2), top + high + 50 + 24 * (n // 2)
        parts += [f'<polyline points="{points}" {line}/>',
                  f'<path d="M{x} {y - 4} h36" {line}/><text x="{x + 44}" y="{y}" {TEXT}>{name}</text>']
    for t in (0, 500, 999):
        x = left + wide * t / 999
        parts.append(f'<text x="{x}" y="{top + high + 18}" text-anchor="middle" {TEXT}>t = {t}</text>')
    for value in (0, 1):
        parts.append(f'<text x="{left - 8}" y="{top + high * (1 - value) + 5}" text-anchor="end" '
                     f"{TEXT}>{value}</text>")
    return "\n".join([*parts, "</svg>\n"])


def mask():
    """The diffusion prior's mask for a caption of three tokens and one of padding, as SVG."""
    c = prior.PriorConfig(embed_dim=8, clip_text_width=8, width=16, layers=1, heads=2)
    network = prior.DiffusionPrior(c)
    text = {"states": torch.zeros(1, 4, 8), "mask": torch.tensor([[True, True, True, False]]),
            "z_t": torch.zeros(1, 8)}
    visible = network.sequence(torch.zeros(1, 8), torch.zeros(1, dtype=torch.long), text)[1][0, 0]
    names = ("start", "red", "end", "padding", "z_t", "timestep", "noised z_i", "learned token")
    side, left, top = 26, 110, 96
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + 9 * side + 40} '
             f'{top + 8 * side + 10}">']
    for n, name in enumerate(names):
        x, y = left + n * side + 17, top - 8
        parts += [f'<text x="{left - 8}" y="{top + n * side + 18}" text-anchor="end" {TEXT}>{name}</text>',
                  f'<text x="{x}" y="{y}" transform="rotate(-50 {x} {y})" {TEXT}>{name}</text>']
        for k in range(len(names)):
            fill = "#0b57a4" if visible[n, k] else "#e6e8eb"
            parts.append(f'<rect x="{left + k * side}" y="{top + n * side}" width="{side - 2}" '
                         f'height="{side - 2}" fill="{fill}"/>')
    return "\n".join([*parts, "</svg>\n"])


@torch.no_grad()
def steps():
    """x_t and x̂_0 at eight of the decoder's steps, without guidance, as a Pillow picture."""
    stack = sample.load_stack(size=64)
    chain = sample.Chain(stack, [CAPTION], decoder_guidance=1)
    alphas, seen = decoder.cosine_schedule(), []

    def note(network, given, output):
        x_t, t, eps = given[0], int(given[1][0]), output[0]
        seen.append((x_t[0], decoder.predict_x_0(x_t, eps, float(alphas[t]))[0]))

    hook = stack["decoder"].register_forward_hook(note)
    chain.draw([0])
    hook.remove()
    some = [seen[round(k * (len(seen) - 1) / 7)] for k in range(8)]
    pairs = [pair for pair in zip(*some)]
    return sample.grid([x.clamp(-1, 1) for row in pairs for x in row], 8)


if __name__ == "__main__":
    (HERE / "schedule.svg").write_text(schedule(), encoding="utf-8")
    (HERE / "mask.svg").write_text(mask(), encoding="utf-8")
    steps().save(HERE / "steps.png")
