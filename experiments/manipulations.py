"""Do the manipulations of §3 work? Measured on pictures never trained on, read back from pixels.

In:   weights (CLIP, decoder, both priors); --n pictures for each part
Out:  on stdout, a Markdown table for each part; all numbers in --json

Each picture is a scene drawn for this script alone, so its content is known exactly.
experiments/caption_accuracy.py reads the content of decoded pictures from their pixels, without any
network.

    python experiments/manipulations.py --weights weights/shapes
    python experiments/manipulations.py textdiff --n 40
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import decoder
import manipulate
import sample
from caption_accuracy import read_scene, score
from clip_embed import UserError, encode_captions, one_line_errors, pick_device, to_tensor
from data.shapes import HELD_OUT, Thing, VALUES, all_attributes, describe, lay_out, pick, random_scene, render

KEPT = ("shape", "colour", "size", "relation")
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128)  # of principal components
THETAS = 8  # maxima of text diffs to choose from, 0.1 apart


def scenes_of(part, n, seed, make=random_scene):
    """n scenes for one part, from random numbers that no training uses."""
    return [make(np.random.default_rng([seed, 1 << 56, part, k])) for k in range(n)]


def to_images(scenes):
    """Renderings of scenes, (n, 3, 64, 64) in [-1, 1]."""
    return torch.stack([to_tensor(render(scene, 64)) for scene in scenes]).float() / 127.5 - 1


def psnr(images, others):
    """Peak signal-to-noise ratio in decibels, (B,), of images (B, 3, H, W) in [-1, 1]."""
    return -10 * torch.log10(((images - others) / 2).square().flatten(1).mean(1).clamp(min=1e-12))


def shown(image, scene):
    """{attribute: does an image (3, H, W) show it as in the scene?}, all that captions can name."""
    return score(sample.to_picture(image), describe(scene, all_attributes(scene), np.random.default_rng(0)))


def share(verdicts, *attributes):
    """The share of pictures with all of these attributes right, of those that their scene has."""
    return float(np.mean([v["count"] and all(v.get(a, True) for a in attributes) for v in verdicts]))


def table(head, rows):
    """A Markdown table."""
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for row in rows:
        print(f"| {' | '.join(cell if isinstance(cell, str) else f'{cell:.1%}' for cell in row)} |")
    print(flush=True)


def read_table(name, groups):
    """Print and return how often each attribute is right, for {label: verdicts}."""
    heads = ("count", "shape", "colour", "size", "fill", "background", "relation")
    numbers = {label: {a: float(np.mean([v[a] for v in verdicts if a in v] or [np.nan])) for a in heads}
               | {"kept": share(verdicts, *KEPT)} for label, verdicts in groups.items()}
    table((name, *heads, "shape, colour, size and relation"), [(label, *row.values()) for label, row in numbers.items()])
    return numbers


def inversion(stack, args):
    """The reconstruction, x_T as noise, and x_T with another picture's z_i."""
    scenes, result, rows = scenes_of(1, args.n, args.seed), {}, []
    images = to_images(scenes)
    for steps in args.steps:
        z_i, x_T = manipulate.invert(stack, images, steps=steps, seed=args.seed, bar=True)
        again = manipulate.decode(stack, z_i[:, None], x_T[:, None], steps=steps, bar=True)[:, 0]
        # the noise that decoder.invert puts in
        put_in = decoder.randn(sample.generators("prior", args.seed, range(args.n)), x_T.shape, "cpu")
        pixels, centred = x_T.flatten(1), x_T - x_T.mean((1, 2, 3), keepdim=True)
        along = lambda x, y: (x * y).flatten(1).mean(1) / pixels.var(1)  # the correlation of x and y, of x_T's variance both
        beside = torch.stack([along(centred[..., 1:], centred[..., :-1]), along(centred[..., 1:, :], centred[..., :-1, :])])
        measured = {"PSNR of the reconstruction, dB": psnr(images, again), "mean of x_T": pixels.mean(1),
                    "variance of x_T": pixels.var(1), "… of means of 8×8 pixels, ×64": 64 * F.avg_pool2d(x_T, 8).flatten(1).var(1),
                    "correlation of neighbours": beside.flatten(),
                    "correlation with the noise put in": F.cosine_similarity(pixels, put_in.flatten(1))}
        of = lambda x: [float(q) for q in torch.quantile(x, torch.tensor([0.5, 0.05, 0.95]))]
        result[steps] = {name: of(values) for name, values in measured.items()}
        rows.append((str(steps), *("{:.{n}f} ({:.{n}f} … {:.{n}f})".format(*v, n=1 if "dB" in name else 2 if "×64" in name else 3)
                                   for name, v in result[steps].items())))
        if steps == args.steps[0]:
            kept = z_i, x_T
    print(f"Inversion of {args.n} pictures: median (5% … 95%)\n")
    table(("steps", *measured), rows)
    z_i, x_T = kept
    noise = decoder.randn(sample.generators("decoder", args.seed, range(args.n)), x_T.shape, "cpu")
    others, groups = scenes[1:] + scenes[:1], {}
    for label, x in (("another picture's inverted x_T", x_T), ("fresh noise", noise)):
        made = manipulate.decode(stack, z_i.roll(-1, 0)[:, None], x[:, None], steps=args.steps[0], bar=True)[:, 0]
        groups[label] = [shown(*pair) for pair in zip(made, others)]
    print("A picture's z_i decoded from other noise: what is shown as that picture has it\n")
    return result | {"swapped": read_table("z_i with", groups)}


def variations(stack, args):
    """The attributes that variations keep, and their distance from the picture."""
    scenes, etas = scenes_of(2, args.n, args.seed), (0, 0.5, 1)
    images = to_images(scenes)
    z_i, x_T = manipulate.invert(stack, images, steps=args.steps[0], seed=args.seed, bar=True)
    made = manipulate.variations(stack, z_i, x_T, 1, etas, steps=args.steps[0], seed=args.seed, bar=True)[:, :, 0]
    groups, wander = {}, {}
    for k, eta in enumerate(etas):
        groups[f"{eta:g}"] = [shown(*pair) for pair in zip(made[:, k], scenes)]
        moved, turned = [], []
        for image, scene in zip(made[:, k], scenes):
            found = read_scene(sample.to_picture(image)).things
            if len(found) == len(scene.things) == 1:
                a, b = found[0], scene.things[0]
                moved.append(np.hypot(a.x - b.x, a.y - b.y))
                turned += [abs(a.tilt - b.tilt)] if a.shape == b.shape != "circle" else []
        distance = float((made[:, k] - images).square().flatten(1).mean(1).sqrt().mean()) / 2
        mean = lambda values: float(np.mean(values or [np.nan]))
        wander[f"{eta:g}"] = {"distance": distance, "moved": mean(moved), "turned": mean(turned)}
    print(f"Variations of {args.n} pictures: what stays\n")
    kept = read_table("η", groups)
    print("… and what does not: root mean square distance from the picture (share of the range), and for single things how far "
          "(share of the side) and how much (degrees) they move and turn, as read from pixels\n")
    table(("η", "distance", "moved", "turned"), [(eta, f"{w['distance']:.3f}", f"{w['moved']:.3f}", f"{w['turned']:.1f}")
                                                 for eta, w in wander.items()])
    return {"kept": kept, "wander": wander}


def interpolation(stack, args):
    """Are the ends of an interpolation with slerped noise the reconstructions?"""
    images = to_images(scenes_of(3, 2 * (args.n // 2), args.seed))
    z_i, x_T = manipulate.invert(stack, images, steps=args.steps[0], seed=args.seed, bar=True)
    again = manipulate.decode(stack, z_i[:, None], x_T[:, None], steps=args.steps[0], bar=True)[:, 0]
    a, b = zip(z_i.chunk(2), x_T.chunk(2))
    made = manipulate.interpolate(stack, a, b, 3, steps=args.steps[0], bar=True)[:, 0]
    ends = torch.cat([made[:, 0], made[:, -1]])
    result = {"pairs": len(ends) // 2, "largest difference": float((ends - again).abs().max()) * 127.5,
              "psnr of the ends": float(psnr(images, ends).median())}
    print(f"Interpolation with slerped noise, {result['pairs']} pairs: the ends differ from the reconstructions by at most "
          f"{result['largest difference']:.4f} of 255 shades; median PSNR of the ends {result['psnr of the ends']:.1f} dB\n")
    return result


def z_t(stack, captions):
    """CLIP's embeddings (n, d) of captions."""
    return encode_captions(stack["clip"], stack["tokenizer"], captions)[0]["z_t"].cpu()


def single(rng, **fixed):
    """A scene of one thing with the attributes `fixed`."""
    while True:
        thing = Thing(**{k: fixed.get(k) or pick(rng, v) for k, v in VALUES.items()})
        if (thing.colour, thing.shape) not in HELD_OUT:
            return lay_out(replace(random_scene(rng, 1), things=(thing,)), rng)


# name: (attributes of the picture, attribute that changes, its new value, caption before, caption after)
EDITS = {
    "red circle → blue circle": ({"shape": "circle", "colour": "red"}, "colour", "blue", "a red circle", "a blue circle"),
    "circle → star": ({"shape": "circle"}, "shape", "star", "a circle", "a star"),
    "small → large": ({"size": "small"}, "size", "large", "a small {shape}", "a large {shape}"),
}


def textdiff(stack, args):
    """How often a text diff changes the wanted attribute and keeps the rest.

    Its maximum is chosen on other pictures.
    """
    result, rows = {}, []
    steps = args.steps[0]
    for part, (name, (fixed, attribute, value, source, to)) in enumerate(EDITS.items(), 4):
        def make(rng):
            while True:
                scene = single(rng, **fixed)
                new = replace(scene.things[0], **{attribute: value})
                if (new.colour, new.shape) not in HELD_OUT:
                    return scene

        def measured(images, scenes):
            """The shares of images (with the wanted attribute changed, all else kept, both)."""
            found = [read_scene(sample.to_picture(image)) for image in images]
            changed, kept = np.zeros((2, len(found)), bool)
            for k, (f, s) in enumerate(zip(found, scenes)):
                one = len(f.things) == 1
                changed[k] = one and getattr(f.things[0], attribute) == value
                kept[k] = one and f.background == s.background and all(
                    getattr(f.things[0], a) == getattr(s.things[0], a) for a in VALUES if a != attribute)
            return [float(x.mean()) for x in (changed, kept, changed & kept)]

        n = args.n + args.n // 4
        scenes = scenes_of(part, n, args.seed, make)
        say = lambda pattern: [pattern.format(shape=s.things[0].shape) for s in scenes]
        z_i, x_T = manipulate.invert(stack, to_images(scenes), steps=steps, seed=args.seed, bar=True)
        rest, test = slice(args.n, n), slice(0, args.n)
        tried = manipulate.text_diff(stack, z_i[rest], x_T[rest], say(to)[rest], say(source)[rest], THETAS / 10, THETAS + 1,
                                     steps=steps, bar=True, restore=not args.whole)
        scores = {k / 10: measured(tried[:, k], scenes[rest]) for k in range(1, THETAS + 1)}
        best = max(scores, key=lambda theta: (scores[theta][2], -theta))
        made = manipulate.text_diff(stack, z_i[test], x_T[test], say(to)[test], say(source)[test], best, 2, steps=steps, bar=True,
                                    restore=not args.whole)
        edited = [replace(s, things=(replace(s.things[0], **{attribute: value}),)) for s in scenes[test]]
        if attribute == "size":
            edited = [lay_out(s, np.random.default_rng([args.seed, 1 << 57, part, k])) for k, s in enumerate(edited)]
        z_true = manipulate.invert(stack, to_images(edited), steps=2)[0]
        true = manipulate.decode(stack, z_true[:, None], x_T[test][:, None], steps=steps, bar=True)[:, 0]
        z_d = z_t(stack, say(to)[test]) - z_t(stack, say(source)[test])
        cosine = float(F.cosine_similarity(z_d, z_true - z_i[test]).mean())
        result[name] = {"maximum": best, "cosine": cosine, "text diff": measured(made[:, -1], scenes), "true z_i": measured(true, scenes),
                        "untouched": measured(made[:, 0], scenes), "chosen among": scores}
        rows.append((name, f"{cosine:.3f}", f"{best:g}", *result[name]["text diff"], *result[name]["true z_i"], result[name]["untouched"][1]))
    print(f"Text diffs, {args.n} pictures each: the cosine of z_d with the difference of the true z_i, edited less given; the "
          f"maximum, chosen on {args.n // 4} others; the wanted attribute changed, all "
          "else that captions can say kept, both; the same of the decoder given the true z_i of the edited scene, from the same "
          "x_T; and what is kept of the picture's own code, decoded untouched\n")
    table(("text diff", "cosine", "maximum", "changed", "kept", "both", "true z_i: changed", "kept", "both", "untouched: kept"), rows)
    return result


def reconstruction(stack, args):
    """The attributes in decodings of z_i's first k principal components, from fresh noise."""
    mean, components = (getattr(stack["ar-prior"], name).cpu().float() for name in ("mean", "components"))
    scenes = scenes_of(7, args.n, args.seed)
    z_i = manipulate.invert(stack, to_images(scenes), steps=2)[0]
    counts = [k for k in COUNTS if k < len(components)] + [len(components)]
    noise = decoder.randn(sample.generators("decoder", args.seed, range(args.n)), (args.n, 3, 64, 64), "cpu")
    made = manipulate.pca_reconstruct(stack, z_i, noise, mean, components, counts, steps=args.steps[0], bar=True)
    whole = manipulate.decode(stack, z_i[:, None], noise[:, None], steps=args.steps[0], bar=True)
    labels = [*map(str, counts), f"whole z_i ({z_i.shape[1]})"]
    print(f"{args.n} pictures decoded from the first k principal components of z_i: what is still shown\n")
    return read_table("k", {label: [shown(*pair) for pair in zip(row, scenes)]
                            for label, row in zip(labels, torch.cat([made, whole], 1).unbind(1))})


PARTS = {"inversion": inversion, "variations": variations, "interpolation": interpolation, "textdiff": textdiff,
         "reconstruction": reconstruction}


def main():
    parser = argparse.ArgumentParser(description="Measure the manipulations of §3 and the probe of fig. 7 on unseen scenes.")
    parser.add_argument("parts", nargs="*", metavar="PART",
                        help=f"one of {', '.join(PARTS)} (default: all of them)")
    parser.add_argument("--n", type=int, default=200, help="pictures for each part (default 200)")
    parser.add_argument("--steps", type=int, nargs="+", default=[50, 250],
                        help="numbers of DDIM steps to compare "
                        "inversions; all else uses the first (default 50 250)")
    parser.add_argument("--whole", action="store_true",
                        help="leave the z_i of text diffs as moved, as in manipulate.py --whole")
    parser.add_argument("--seed", type=int, default=0, help="seed of scenes and noise (default 0)")
    parser.add_argument("--weights", type=Path, default=sample.SHIPPED, metavar="DIR", help="default: the shipped ones")
    parser.add_argument("--json", type=Path, default=Path("runs/manipulations.json"), help="default runs/manipulations.json")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    parser.add_argument("--precision", default="float32", choices=sample.PRECISIONS, help="as in manipulate.py (default float32)")
    args = parser.parse_args()
    with one_line_errors():
        if set(args.parts) - set(PARTS):
            raise UserError(f"{' '.join(args.parts)}: each must be one of {', '.join(PARTS)}")
        if not 4 <= args.n <= 100_000 or not all(2 <= s <= 950 for s in args.steps) or not 0 <= args.seed < 1 << 30:
            raise UserError("--n must be between 4 and 100000, --steps between 2 and 950, --seed between 0 and 2^30")
        args.json.parent.mkdir(parents=True, exist_ok=True)
        stack = sample.load_stack(args.weights, pick_device(args.device), 64, "ar", judge=True, precision=args.precision)
        numbers = {"n": args.n, "seed": args.seed, "steps": args.steps}
        for part in args.parts or PARTS:
            numbers[part] = PARTS[part](stack, args)
            args.json.write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main()
