"""A training's losses, as a table and as a chart drawn by Pillow."""

import csv
import math

import numpy as np
from PIL import Image, ImageDraw

from clip_embed import UserError


def write_report(rows, sheet, path):
    """Write a training's rows (NAME.csv, NAME-loss.png) and its sample sheet, a Pillow image
    (NAME-samples.png), beside its checkpoint NAME.pt. Raises UserError, for example of a full disk.
    """
    try:
        write_csv(rows, path.with_suffix(".csv"))
        plot_loss(rows, path.with_name(f"{path.stem}-loss.png"))
        sheet.save(path.with_name(f"{path.stem}-samples.png"))
    except OSError as error:
        raise UserError(f"{path.stem}: its curve and samples could not be written to {path.parent} "
                        f"({error}); the checkpoint is whole: make room, and go on with --resume"
                        ) from None


def write_csv(rows, path):
    """Write a training's rows: (step, training loss, images a second, held-out loss or None)."""
    with open(path, "w", newline="") as file:
        title = ("step", "loss", "images_per_second", "held_out_loss")
        csv.writer(file).writerows([title, *rows])


def plot_loss(rows, path):
    """Draw a training's loss against the step, in training and held out.

    rows: (step, training loss, images a second, held-out loss or None).
    """
    plot_lines([(name, colour, [(row[0], row[n]) for row in rows if row[n] is not None], 2)
                for name, colour, n in (("training", "royalblue", 1), ("held out", "darkorange", 3))],
               path)


def plot_lines(lines, path):
    """Draw losses against the step, on a logarithmic scale.

    lines: (name, colour, [(step, loss)], width in pixels) of each.
    """
    lines = [(name, colour, [(step, math.log10(max(loss, 1e-12))) for step, loss in points], thick)
             for name, colour, points, thick in lines]
    width, height, left, bottom = 640, 360, 70, 40
    last = max(step for *_, points, _ in lines for step, _ in points)
    losses = [loss for *_, points, _ in lines for _, loss in points]
    low, high = min(losses) - 0.02, max(losses) + 0.02

    def to_xy(step, loss):
        x = left + (width - left - 15) * step / last
        return x, 15 + (height - bottom - 15) * (high - loss) / (high - low)

    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    for tick in np.linspace(low, high, 5):
        draw.line([to_xy(0, tick), to_xy(last, tick)], "gainsboro")
        draw.text((8, to_xy(0, tick)[1] - 6), f"{10 ** tick:.3g}", "black")
    for tick in np.linspace(0, last, 6):
        draw.text((to_xy(tick, low)[0] - 12, height - bottom + 8), f"{tick:.0f}", "black")
    draw.text((width // 2, height - 16), "step", "black")
    for n, (name, colour, points, thick) in enumerate(lines):
        draw.line([to_xy(*point) for point in points], colour, thick)
        draw.text((width - 20, 20 + 14 * n), name, colour, anchor="ra")
    picture.save(path)
