"""How often do generated pictures show their captions? Read from pixels, without any network.

In:   picture files with their caption in the PNG text chunk "caption" (as sample.py saves them).
      Without files, --n pictures are generated from random captions
Out:  on stdout, Markdown tables with right / named (percent) of each attribute, for captions of one
      thing, of two things, and all. The first table is about the reader itself: its scores on true
      renderings show its own errors. The last column of the second table is relative to the first.
      --sheet draws the failures, --json keeps every score

The reader models a picture as background + a · colour + s · lightening. a is the share of each
pixel that a thing covers, s the share that its light stripes cover. For every shape it searches the
position, radius and tilt that leave the smallest error, then the colour.

    python experiments/caption_accuracy.py --weights runs/shapes
    python experiments/caption_accuracy.py samples/*.png
    python experiments/caption_accuracy.py --caption "a red circle" --n 100     # how varied is what it leaves open?
"""

import argparse
import json
import math
import re
import sys
import textwrap
from dataclasses import replace
from functools import lru_cache
from itertools import permutations, product
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sample
from clip_embed import UserError, one_line_errors, pick_device
from data.shapes import BACKGROUNDS, COLOURS, RADII, RELATIONS, SHAPES, Scene, Thing, VALUES, WORDINGS, all_attributes, attributes_in_caption, describe, is_held_out, lay_out, pick, random_scene, render

ATTRIBUTES = ("count", *VALUES, "background", "relation", "bound", "all")
SIDE = 64  # the reader's picture size
CONTRAST = 36  # least RGB distance of a thing's pixels to the background; the clearest has twice it
SPECK = 20  # pixels; a smaller component is no thing (the smallest star covers 41)
UNEXPLAINED = 0.2  # share of the squared contrast; true things leave less than 0.15, however noisy or blurred
BLURS = (0.3, 0.5, 0.9)  # sigmas in pixels; 0.3 is the averaging over a pixel that every picture has
TEMPLATE, UNIT = 128, 46  # a template's side, and the thing's radius in it, in the template's pixels

# ----------------------------------------------------------------------------- pixels into scenes


def fit_background(pixels):
    """The background of pixels (64, 64, 3): its name, its colour at each pixel (64, 64, 3), and its shade."""
    middle = np.median(pixels, axis=(0, 1))  # things cover less than half of a picture
    gains = np.linspace(0.9, 1, 11)[:, None]
    name = min(BACKGROUNDS, key=lambda b: np.linalg.norm(middle - gains * BACKGROUNDS[b], axis=1).min())
    y, x = np.mgrid[:SIDE, :SIDE] / (SIDE - 1)
    basis = np.stack([np.ones_like(x), x, y], -1)
    plane = np.broadcast_to(middle, pixels.shape)
    for _ in range(3):  # a plane through the pixels near the plane before: things stay out
        near = np.linalg.norm(pixels - plane, axis=-1) < CONTRAST
        plane = basis @ np.linalg.lstsq(basis[near], pixels[near], rcond=None)[0]
    top, bottom = plane[0].mean(), plane[-1].mean()
    return name, plane, (top - bottom) / max(top, bottom, 1)


def components(mask):
    """Labels (64, 64) of the 4-connected components of a mask: 0 outside, one number in each."""
    labels = np.pad(np.where(mask, 1 + np.arange(mask.size).reshape(mask.shape), 0), 1)
    inside, sides = labels[1:-1, 1:-1], (labels[:-2, 1:-1], labels[2:, 1:-1], labels[1:-1, :-2], labels[1:-1, 2:])
    while True:  # the largest number floods its component
        flooded = np.maximum.reduce([inside, *sides]) * mask
        if (flooded == inside).all():
            return flooded
        inside[:] = flooded


@lru_cache(maxsize=None)
def template(shape, blur):
    """The cover of a shape and of its light stripes: (2, TEMPLATE, TEMPLATE).

    blur: a sigma, in the template's pixels. The template is made by render, so the reader sees the
    same shapes as training.
    """
    def draw(fill):
        scene = Scene((Thing(shape, "black", "large", fill, radius=UNIT / TEMPLATE),), None, "white", 0.0)
        picture = render(scene, TEMPLATE).convert("L").filter(ImageFilter.GaussianBlur(blur))
        return np.asarray(picture, np.float32)

    solid, striped = draw("solid"), draw("striped")
    return np.stack([(250 - solid) / (250 - 25), (striped - solid) / (0.35 * (255 - 25))])


def cover(shape, poses, blur, xy):
    """The cover of a shape and of its stripes at pixels xy (P, 2): a, s (K, P) for poses (K, 4).

    A pose is x, y and radius in pixels, and tilt in radians; blur is a sigma in pixels.
    """
    x, y, radius, tilt = poses.T[:, :, None]
    dx, dy = (xy[:, 0] - x) * (UNIT / radius), (xy[:, 1] - y) * (UNIT / radius)
    column, row = np.cos(tilt) * dx + np.sin(tilt) * dy, np.cos(tilt) * dy - np.sin(tilt) * dx
    row, column = ((v + TEMPLATE / 2).astype(np.int32).clip(0, TEMPLATE - 1) for v in (row, column))
    return template(shape, max(1, round(blur * UNIT / float(np.median(radius)))))[:, row, column]


def best_pose(shape, poses, blur, xy, contrast):
    """The best of poses (K, 4): a · u + s · v, for any colours u, v, is nearest to contrast (P, 3).

    Returns (squared error, blur, shape, pose), so that the smallest of several is the best.
    """
    a, s = cover(shape, poses, blur, xy)
    aa, ss, both = ((p * q).sum(1)[:, None] for p, q in ((a, a), (s, s), (a, s)))
    aq, sq = a @ contrast, s @ contrast  # two unknowns a channel: the normal equations, solved by hand
    explained = ((ss + 1) * aq ** 2 - 2 * both * aq * sq + aa * sq ** 2) / (aa * (ss + 1) - both ** 2 + 1e-3)
    error = (contrast ** 2).sum() - explained.sum(1)
    return float(error.min()), blur, shape, poses[error.argmin()]


def fit_thing(mask, contrast, plane):
    """The Thing that best explains the contrast (64, 64, 3) to the background around a mask.

    Its shape is None if no shape explains the pixels. Colours are free during the search for the
    pose, so a colour that is a little off costs no shape. Then the thing is compared with its
    rendering in each colour.
    """
    rows, columns = np.nonzero(mask)
    patch = np.s_[max(0, rows.min() - 2):rows.max() + 3, max(0, columns.min() - 2):columns.max() + 3]
    xy = np.stack([v[patch].ravel() + 0.5 for v in np.mgrid[:SIDE, :SIDE][::-1]], -1).astype(np.float32)
    contrast, background = contrast[patch].reshape(-1, 3), plane[mask].mean(0)

    fits = []
    for shape in SHAPES:
        area = template(shape, 1)[0]
        radius = UNIT * np.sqrt(mask.sum() / area.sum())
        low = (np.arange(TEMPLATE) + 0.5 - TEMPLATE / 2) @ area.sum(1) / area.sum() * radius / UNIT  # of the centroid
        poses = np.array([(columns.mean() + 0.5, rows.mean() + 0.5 - low, radius * scale, np.deg2rad(tilt))
                          for scale, tilt in product((0.92, 1, 1.08), (-15, -9, -3, 3, 9, 15))], np.float32)
        fits.append(min(best_pose(shape, poses, blur, xy, contrast) for blur in BLURS))
    around = np.array(list(product((-1, 0, 1), repeat=4)), np.float32) * np.float32([0.6, 0.6, 0.5, 0.06])
    for keep, step in ((3, 1), (2, 0.5), (1, 0.25)):
        fits = sorted(best_pose(shape, pose + step * around, blur, xy, contrast)
                      for _, blur, shape, pose in sorted(fits)[:keep])
    error, blur, shape, pose = fits[0]

    a, s = cover(shape, pose[None], blur, xy)[:, 0, :, None]
    lightening = {c: 0.35 * (255 - np.array(COLOURS[c])) for c in COLOURS}
    misses = {(c, fill): ((contrast - a * (np.array(COLOURS[c]) - background) - s * fill * lightening[c]) ** 2).sum()
              for c in COLOURS for fill in (0, 1)}
    colour = min(misses, key=misses.get)[0]
    light = np.linalg.lstsq(np.concatenate([a, s], 1), contrast, rcond=None)[0][1]
    stripes = light @ lightening[colour] / (lightening[colour] ** 2).sum()  # 0 where solid, 1 where striped
    x, y, radius = (pose[:3] / SIDE).tolist()
    size = "small" if radius < (RADII["small"][1] + RADII["large"][0]) / 2 else "large"
    return Thing(shape if error < UNEXPLAINED * (contrast ** 2).sum() else None, colour, size,
                 "striped" if stripes > 0.45 else "solid", x, y, radius, np.rad2deg(pose[3]).item())


def relation_of(first, second):
    """The relation of the first of two things to the second, along the axis of larger distance."""
    dx, dy = second.x - first.x, second.y - first.y
    if abs(dx) > abs(dy):
        return "left of" if dx > 0 else "right of"
    return "above" if dy > 0 else "below"


def read_scene(picture):
    """The Scene in a picture: a Pillow RGB image or uint8 (H, H, 3), at least 64 pixels a side.

    All things are listed from left to right. If there are two, the Scene has the relation of the
    first to the second. A thing unlike all shapes has shape None. Raises UserError for any other
    array.
    """
    pixels = np.asarray(picture)
    if pixels.dtype != np.uint8 or pixels.shape != (len(pixels), len(pixels), 3) or len(pixels) < SIDE:
        raise UserError(f"a picture must be uint8 (H, H, 3), H at least {SIDE}, not {pixels.dtype} {pixels.shape}")
    pixels = np.asarray(Image.fromarray(pixels).resize((SIDE, SIDE), Image.BOX), np.float32)
    background, plane, shade = fit_background(pixels)
    contrast = (pixels - plane).astype(np.float32)
    distance = np.linalg.norm(contrast, axis=-1)
    labels = components(distance > CONTRAST)
    things = []
    for label, area in zip(*np.unique(labels[labels > 0], return_counts=True)):
        mask = labels == label
        if area >= SPECK and distance[mask].max() > 2 * CONTRAST:
            things.append(fit_thing(mask, contrast * ((labels == 0) | mask)[..., None], plane))
    things.sort(key=lambda t: t.x)
    return Scene(tuple(things), relation_of(*things) if len(things) == 2 else None, background, shade)

# ----------------------------------------------------------------------------- captions into scenes


def parse_caption(caption):
    """The caption as a Scene, things in the caption's order; None stands for attributes not named.

    Words that the world doesn't know are ignored. Raises UserError if the caption names no shape.
    """
    words = re.findall("[a-z]+", caption.lower().replace("grey", "gray"))
    kind = {value: attribute for attribute, values in VALUES.items() for value in values}
    things, ends, named = [], [], {}
    for k, word in enumerate(words):
        if word in kind:
            named[kind[word]] = word
        if word in SHAPES:
            things.append(Thing(**{attribute: named.get(attribute) for attribute in VALUES}))
            ends.append(k)
        if word in (*SHAPES, "a", "an", "the"):  # the next thing's words begin
            named = {}
    if not things:
        raise UserError(f'caption "{caption}": names none of the shapes {", ".join(SHAPES)}')
    said_of_it = rf"\b(?:on|with|against) (?:an? |the )?({'|'.join(BACKGROUNDS)})\b(?! (?:{'|'.join(kind)})\b)"
    background = re.search(said_of_it, " ".join(words))
    between = " ".join(words[ends[0]:ends[1]]) if len(things) == 2 else ""
    relation = next((r for r, wordings in WORDINGS.items() if re.search(rf"\b({'|'.join(wordings)})\b", between)), None)
    return Scene(tuple(things), relation, background and background[1], 0.0)

# ----------------------------------------------------------------------------- scores


def score(picture, caption):
    """judge's verdicts on a picture and a caption. Raises errors of read_scene, parse_caption."""
    asked = parse_caption(caption)
    return judge(read_scene(picture), asked)


def judge(found, asked):
    """{attribute: does the found scene have it as in the parsed caption?}, for attributes it names.

    Found things are matched with the caption's things so that most attributes are right, shapes
    first. "bound": every shape and every named colour is on the right thing. "all": everything at
    once.
    """
    missing = (None,) * (len(asked.things) - len(found.things))

    def verdicts(matched):
        right = {}
        for attribute in VALUES:
            pairs = [(getattr(s, attribute), getattr(f, attribute, None)) for s, f in zip(asked.things, matched)]
            right[attribute] = [s == f for s, f in pairs if s]
        right["relation"] = [None not in matched and relation_of(*matched) == asked.relation] if asked.relation else []
        return right

    right = max(map(verdicts, permutations(found.things + missing, len(asked.things))),
                key=lambda right: (sum(map(sum, right.values())), sum(right["shape"])))
    result = {"count": len(found.things) == len(asked.things)}
    result |= {attribute: all(each) for attribute, each in right.items() if each}
    if asked.background:
        result["background"] = found.background == asked.background
    result["bound"] = result["shape"] and result.get("colour", True)
    return result | {"all": all(result.values())}


def rates(scores):
    """{attribute: {"one thing", "two things", "all": [right, named]}}.

    scores: a list of (caption, score, picture).
    """
    counts = [len(parse_caption(caption).things) for caption, *_ in scores]
    groups = {"one thing": {1}, "two things": {2}, "all": set(counts)}
    right = lambda attribute, group: [bool(s[attribute]) for n, (_, s, _) in zip(counts, scores) if n in group and attribute in s]
    return {a: {name: [sum(right(a, group)), len(right(a, group))] for name, group in groups.items()} for a in ATTRIBUTES}


def table(scores, reader=None):
    """A Markdown table of the rates of a list of (caption, score, picture).

    reader: the reader's own rates, for a column relative to them.
    """
    own, groups = rates(scores), ["one thing", "two things", "all"]
    lines = [f"| | {' | '.join(groups)} |{' relative |' if reader else ''}", "|---" * (4 + bool(reader)) + "|"]
    for attribute in ATTRIBUTES:
        cells = [f"{r} / {n} ({r / n:.1%})" if n else "–" for r, n in (own[attribute][group] for group in groups)]
        if reader:
            (r, n), (best, of) = own[attribute]["all"], reader[attribute]["all"]
            cells.append(f"{r / n / (best / of):.3f}" if n and best else "–")
        lines.append(f"| {' | '.join([attribute, *cells])} |")
    return "\n".join(lines)


def contact_sheet(scores, columns=6, most=60):
    """The pictures that don't show their caption: wrong attributes above, the caption below."""
    failures = [(c, [a for a in s if not s[a] and a not in ("bound", "all")], p) for c, s, p in scores if not s["all"]][:most]
    width, height = 200, 2 * SIDE + 56
    sheet = Image.new("RGB", (columns * width, max(1, -(-len(failures) // columns)) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for k, (caption, wrong, picture) in enumerate(failures):
        x, y = k % columns * width + 4, k // columns * height + 4
        draw.text((x, y), ", ".join(wrong), "crimson")
        sheet.paste(picture.resize((2 * SIDE,) * 2, Image.NEAREST), (x, y + 14))
        for row, line in enumerate(textwrap.wrap(caption, 32)[:3]):
            draw.text((x, y + 16 + 2 * SIDE + 11 * row), line, "black")
    return sheet


def scene_of(asked, rng):
    """A random Scene of a parsed caption. Open attributes are drawn as in training."""
    while True:
        things = tuple(replace(t, **{a: pick(rng, values) for a, values in VALUES.items() if not getattr(t, a)}) for t in asked.things)
        relation = asked.relation or (pick(rng, tuple(RELATIONS)) if len(things) == 2 else None)
        scene = Scene(things, relation, asked.background or pick(rng, tuple(BACKGROUNDS)), rng.uniform(-0.06, 0.06))
        if not is_held_out(scene) or is_held_out(asked):
            return lay_out(scene, rng)


def spread(pictures):
    """{"x", "y", "radius": standard deviation in shares of the side, "correlation of x and y"}, of pictures of one thing."""
    values = np.array([(t.x, t.y, t.radius) for scene in map(read_scene, pictures) if len(scene.things) == 1 for t in scene.things])
    correlation = np.corrcoef(values[:, :2], rowvar=False)[0, 1] if len(values) > 1 else math.nan
    deviations = values.std(0) if len(values) > 1 else [math.nan] * 3
    return dict(zip(("x", "y", "radius", "correlation of x and y"), map(float, (*deviations, correlation))))


def self_test(n, seed=0, size=SIDE, change=lambda picture: picture, bar=False):
    """(caption, score, None) of n true renderings, changed by `change`, for their full captions."""
    scores = []
    for k in tqdm(range(n), "self-test", disable=not bar):
        rng = np.random.default_rng([seed, k])
        scene = random_scene(rng, held_out=k % 8 == 0)
        caption = describe(scene, all_attributes(scene), rng)
        scores.append((caption, score(change(render(scene, size)), caption), None))
    return scores


def draw_and_score(stack, captions, seed, size=64, **options):
    """Yield (caption, score, picture at 64) of each caption.

    Picture k is drawn with seed + k. options: those of sample.generate.
    """
    for first in range(0, len(captions), sample.BATCH[64]):
        some = captions[first:first + sample.BATCH[64]]
        for caption, image in zip(some, sample.generate(stack, some, seed + first, size, **options)):
            picture = sample.to_picture(image)
            yield caption, score(picture, caption), picture.resize((SIDE, SIDE), Image.BOX)


def generated(args):
    """(caption, score, picture) of pictures generated by the command line's options.

    Picture k is drawn with seed + k. Raises UserError.
    """
    stack = sample.load_stack(args.weights, pick_device(args.device), args.size, precision=args.precision)
    options = {k: v for k, v in vars(args).items() if k.startswith(("prior_", "decoder_", "candidates"))}
    captions = []
    for k in range(args.n):
        rng = np.random.default_rng([args.seed, 1 << 22, k])  # no training's numbers
        scene = random_scene(rng, args.things, args.held_out)
        captions.append(args.caption or describe(scene, attributes_in_caption(scene, rng), rng))
    return list(tqdm(draw_and_score(stack, captions, args.seed, args.size, **options), "pictures", args.n))


def read_file(path):
    """(caption, score, picture) of a picture file.

    Raises UserError if it is no picture or has no caption.
    """
    try:
        with Image.open(path) as file:
            picture, caption = file.convert("RGB"), file.info.get("caption")
        if caption is None:
            raise UserError('has no text chunk "caption" (sample.py writes one)')
        return caption, score(picture, caption), picture.resize((SIDE, SIDE), Image.BOX)
    except (UserError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: {error}") from None


def main():
    parser = argparse.ArgumentParser(
        description="Score pictures against their captions, attribute by attribute, by reading them back from pixels. "
        "The reader is first scored on true renderings, so that its own errors are known.")
    add = parser.add_argument
    add("pictures", nargs="*", type=Path, metavar="PICTURE",
        help='files to score, with their caption in the text chunk "caption" (default: generate pictures)')
    add("--self-test", type=int, default=1000, metavar="N", help="true renderings to score first (default 1000)")
    add("--n", type=int, default=200, help="pictures to generate (default 200; 0: only the self-test)")
    add("--seed", type=int, default=0, help="of captions and noise; picture k has noise of seed + k (default 0)")
    add("--size", type=int, default=64, choices=sample.SIZES, help="pixels a side (default 64)")
    add("--caption", help="one caption for all pictures; of a single thing's, the spread of place and radius is printed, and if x and y vary together")
    add("--things", type=int, choices=(1, 2), help="only captions of so many things")
    add("--held-out", action="store_true", help="only scenes with a colour-shape pair that training never shows")
    add("--weights", type=Path, default=sample.SHIPPED, metavar="DIR",
        help="folder of checkpoints (default: the shipped shapes models)")
    for stage in ("prior", "decoder"):
        add(f"--{stage}-guidance", type=float, default=argparse.SUPPRESS, help="as in sample.py")
        add(f"--{stage}-steps", type=int, default=argparse.SUPPRESS, help="as in sample.py")
    add("--candidates", type=int, default=argparse.SUPPRESS, help="as in sample.py")
    add("--sheet", type=Path, metavar="PNG", help="draw the pictures that fail, with what they got wrong")
    add("--json", type=Path, help="write settings, rates and every caption's score")
    add("--device", default="auto", help="auto, cuda, mps or cpu")
    add("--precision", default="float32", choices=sample.PRECISIONS, help="as in sample.py (default float32)")
    args = parser.parse_args()
    with one_line_errors():
        for name, low, high in (("self_test", 0, 1e6), ("n", 0, 1e6), ("seed", 0, 1 << 48), ("prior_guidance", 0, 100),
                                ("prior_steps", 1, 1000), ("decoder_guidance", 0, 100), ("decoder_steps", 1, 990), ("candidates", 1, 1000)):
            if not low <= getattr(args, name, low) <= high:
                option = f"--{name.replace('_', '-')} {getattr(args, name)}"
                raise UserError(f"{option}: must be between {low} and {high:.0f}")
        reader = None
        if args.self_test:
            scores = self_test(args.self_test, args.seed, args.size, bar=True)
            reader = rates(scores)
            print(f"The reader, on {len(scores)} true renderings:\n\n{table(scores)}\n", flush=True)
        scores = [read_file(path) for path in tqdm(args.pictures)] if args.pictures else generated(args) if args.n else []
        if scores:
            print(f"{len(scores)} {'' if args.pictures else 'generated '}pictures:\n\n{table(scores, reader)}")
        if scores and args.caption and len(parse_caption(args.caption).things) == 1:
            true = [render(scene_of(parse_caption(args.caption), np.random.default_rng([args.seed, k])), SIDE) for k in range(1000)]
            for name, pictures in (("generated", [p for _, _, p in scores]), ("true renderings", true)):
                print(f"spread, {name}: " + ", ".join(f"{k} {v:.3f}" for k, v in spread(pictures).items()))
        if args.sheet:
            contact_sheet(scores).save(args.sheet)
        if args.json:
            each = [{"caption": c, **{a: bool(r) for a, r in s.items()}} for c, s, _ in scores]
            settings = {k: v if isinstance(v, (int, float, type(None))) else str(v) for k, v in vars(args).items() if k != "pictures"}
            args.json.write_text(json.dumps({"settings": settings, "reader": reader, "rates": rates(scores), "scores": each}, indent=1))


if __name__ == "__main__":
    main()
