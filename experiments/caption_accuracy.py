"""How often do generated pictures show what their captions say? Measured by reading the scenes back from pixels.

In:   picture files that carry their caption (PNG text chunk "caption"), or a folder of weights to generate from
Out:  a Markdown table per attribute: right / said (percent), for captions of one thing, of two things, and all

The reader knows how the world of shapes is drawn and nothing of CLIP, so it can't share the models' mistakes.
It explains a picture as background + a · colour + s · lightening, where a is how much of each pixel the thing
covers and s how much of it a light stripe does: for each shape it looks for the position, radius and tilt that
leave least unexplained. Its own errors are measured first, on true renderings of scenes that say everything.

    python experiments/caption_accuracy.py                              # only the reader's own errors
    python experiments/caption_accuracy.py --weights runs/shapes        # generate 200 captions and score them
    python experiments/caption_accuracy.py samples/*.png                # score pictures that are already there
"""

import argparse
import re
import sys
from functools import lru_cache
from itertools import permutations, product
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from clip_embed import UserError, one_line_errors, pick_device
from train import (BACKGROUNDS, COLOURS, FILLS, RELATIONS, SHAPES, SIZES, VALUES, WORDINGS, Scene, Thing, describe,
                   random_scene, render, what_to_say)

SIDE = 64  # every picture is read at this size
CONTRAST = 36  # how far a thing is from its background, at the least (RGB distance; the nearest pair is 59 apart)
UNIT = 46
SPECK = 14  # pixels; the least small thing has 41
ATTRIBUTES = ("count", *VALUES, "background", "relation", "bound", "all")

# ----------------------------------------------------------------------------- pixels into scenes


def fit_background(pixels):
    """The background's name, its colour at each pixel (64, 64, 3) and its shade, of pixels (64, 64, 3)."""
    middle = np.median(pixels, axis=(0, 1))  # things cover less than half of a picture
    gains = np.linspace(0.9, 1.0, 11)[:, None]
    name = min(BACKGROUNDS, key=lambda b: np.linalg.norm(middle - gains * BACKGROUNDS[b], axis=1).min())
    y, x = np.mgrid[:SIDE, :SIDE] / (SIDE - 1)
    basis = np.stack([np.ones_like(x), x, y], -1)
    plane = np.broadcast_to(middle, pixels.shape)
    for _ in range(3):  # a plane through what is near the plane found before
        near = np.linalg.norm(pixels - plane, axis=-1) < CONTRAST
        if near.sum() < SIDE:
            break
        slopes = np.linalg.lstsq(basis[near], pixels[near], rcond=None)[0]
        plane = basis @ slopes
    top, bottom = plane[0].mean(), plane[-1].mean()
    return name, plane, (top - bottom) / max(top, bottom, 1)


def components(mask):
    """Labels (64, 64) of a mask's 4-connected components: 0 outside, the same number throughout each."""
    labels = np.pad(np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0), 1)
    inner = labels[1:-1, 1:-1]
    while True:  # the largest label floods its component
        flooded = np.maximum.reduce([inner, labels[:-2, 1:-1], labels[2:, 1:-1], labels[1:-1, :-2], labels[1:-1, 2:]]) * mask
        if (flooded == inner).all():
            return flooded
        inner[:] = flooded


@lru_cache
def template(shape, blur):
    """Share of a point's surroundings that the thing and its light stripes cover: (2, 2 · 64, 2 · 64), UNIT px a radius.

    Taken from render itself and blurred by a Gaussian of `blur` template pixels.
    """
    def draw(fill):
        scene = Scene((Thing(shape, "black", "large", fill, radius=UNIT / 128),), None, "white", 0.0)
        return np.asarray(render(scene, 128).convert("L").filter(ImageFilter.GaussianBlur(blur)), np.float32)

    solid, striped = draw("solid"), draw("striped")
    return np.stack([(250 - solid) / 225, (striped - solid) / 80])


def cover(shape, poses, blur, xy):
    """What the thing and its light stripes cover of the pixels at xy (P, 2), for poses (K, 4): twice (K, P).

    A pose is x, y and radius in pixels, and the tilt in radians; blur is a Gaussian's sigma in pixels.
    """
    x, y, radius, tilt = poses.T[:, :, None]
    dx, dy = (xy[:, 0] - x) * (UNIT / radius), (xy[:, 1] - y) * (UNIT / radius)
    column, row = np.cos(tilt) * dx + np.sin(tilt) * dy, np.cos(tilt) * dy - np.sin(tilt) * dx
    row, column = ((v + 64).astype(np.int32).clip(0, 127) for v in (row, column))
    return template(shape, max(1, round(blur * UNIT / float(np.median(radius)))))[:, row, column]


def best_pose(shape, poses, blur, xy, difference):
    """The pose that leaves least of difference (P, 3) when it is written as a · u + s · v: (error, shape, pose, blur)."""
    a, s = cover(shape, poses, blur, xy)
    aa, ss, both = (a * a).sum(1)[:, None] + 1e-3, (s * s).sum(1)[:, None] + 1, (a * s).sum(1)[:, None]
    aq, sq = a @ difference, s @ difference  # the normal equations of two unknowns, solved for each channel
    explained = (ss * aq ** 2 - 2 * both * aq * sq + aa * sq ** 2) / (aa * ss - both ** 2)
    error = (difference ** 2).sum() - explained.sum(1)
    return error.min(), shape, poses[error.argmin()], blur


def fit_thing(mask, difference, plane):
    """The Thing that explains best how the pixels (64, 64, 3) of a component differ from the background, and its colour."""
    rows, columns = np.nonzero(mask)
    patch = np.s_[max(0, rows.min() - 2):rows.max() + 3, max(0, columns.min() - 2):columns.max() + 3]
    xy = np.stack([grid[patch].ravel() + 0.5 for grid in np.mgrid[:SIDE, :SIDE][::-1]], -1).astype(np.float32)
    difference = difference[patch].reshape(-1, 3)

    fits = []
    for shape in SHAPES:
        area = template(shape, 1)[0]
        radius = UNIT * np.sqrt(mask.sum() / area.sum())
        low = ((np.arange(128) - 63.5) @ area.sum(1)) / area.sum() / UNIT * radius
        poses = [(columns.mean() + 0.5, rows.mean() + 0.5 - low, radius * scale, np.deg2rad(tilt))
                 for scale, tilt in product((0.92, 1, 1.08), (-15, -9, -3, 3, 9, 15))]
        fits.append(best_pose(shape, np.array(poses, np.float32), 0.3, xy, difference))
    for keep, step in ((3, 1), (2, 0.5), (1, 0.25)):
        fits = sorted(fits, key=lambda fit: fit[0])[:keep]
        if step == 1:
            fits=[min((best_pose(shape, pose[None], b, xy, difference) for b in (0.3, 0.5, 0.9)), key=lambda f:f[0]) for _, shape, pose, *_ in fits]
        around = np.array(list(product((-1, 0, 1), repeat=4)), np.float32) * (0.6 * step, 0.6 * step, 0.5 * step, 0.06 * step)
        fits = [best_pose(shape, (pose + around).astype(np.float32), blur, xy, difference) for _, shape, pose, blur in fits]
        if keep==2: second=sorted(fits, key=lambda fit: fit[0])[1][0]
    error, shape, pose, blur = fits[0]
    a, s = cover(shape, pose[None], blur, xy)
    a, s = a[0, :, None], s[0, :, None]
    bg=plane[mask].mean(0)
    def miss(c, f):
        c=np.array(COLOURS[c]); return ((difference - a*(c-bg) - s*f*.35*(255-c))**2).sum()
    colour=min(COLOURS, key=lambda c: min(miss(c,0),miss(c,1)))
    u, v = np.linalg.lstsq(np.concatenate([a, s], 1), difference, rcond=None)[0]
    light = 0.35 * (255 - np.array(COLOURS[colour]))
    share = v @ light / (light @ light)
    x, y, radius, tilt = pose
    q=(difference**2).sum()
    return (Thing(shape, colour, "large" if radius / SIDE > 0.14 else "small", FILLS[int(share > 0.4)],
           x / SIDE, y / SIDE, radius / SIDE, np.rad2deg(tilt)), share, error / q, np.linalg.norm(u + bg - COLOURS[colour]), blur, second/q)


def read_scene(picture):
    pixels = np.asarray(Image.fromarray(np.asarray(picture)).resize((SIDE, SIDE), Image.BOX), np.float32)
    background, plane, shade = fit_background(pixels)
    difference = (pixels - plane).astype(np.float32)
    contrast = np.linalg.norm(difference, axis=-1)
    labels = components(contrast > CONTRAST)
    things = []
    for label, area in zip(*np.unique(labels[labels > 0], return_counts=True)):
        mask = labels == label
        if area >= SPECK and contrast[mask].max() > 2 * CONTRAST:
            things.append(fit_thing(mask, difference * ((labels == 0) | mask)[..., None], plane))
    return background, things
