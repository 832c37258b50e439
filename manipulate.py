"""Manipulations of pictures through their code (z_i, x_T) (§3; the probe of fig. 7).

    picture ─┬─► CLIP's image tower ─► z_i ──────┐   what is shown
             └─► DDIM run backwards ─► x_T ──────┴─► DDIM ─► picture   z_i and x_T together: all of it

In:   pictures of any size or kind, or latent files, a (z_i, x_T) kept by --save-latent
Out:  in --out a labelled strip and its single frames, under new numbers; their paths on stdout, all else on stderr. --out
      NAME.png and --save-latent NAME.pt take the place of a file of that name

Variations draw fresh noise on the way from x_T (§3.1), interpolations turn one code into another (§3.2), text diffs push
z_i along the difference of two captions (§3.3), reconstructions keep z_i's first principal components (§4). Nothing is
trained here, and the only sampler is the decoder's DDIM, with η = 0 but for variations.

Where the paper is silent, ours: decoding is unguided, unclamped, and repeats the inversion's caption and steps, for only then
are the two each other's inverse; of variations, which are to differ, guidance grows with η; slerp of x_T turns the directions and
changes the norms evenly; the principal components are the autoregressive prior's, and what is left of z_i stays short (pca_reconstruct); the
difference of two captions is brought into their span before it moves z_i (text_diff).

    python manipulate.py variations picture.png --n 8 --eta 0 0.5 1
    python manipulate.py interpolate a.png b.png --frames 9 --gif
    python manipulate.py textdiff picture.png --from "a red circle" --to "a blue circle"
    python manipulate.py reconstruct picture.png --components 1 2 4 8
"""

import argparse
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

import clip_embed
import decoder
import upsample
from clip_embed import UserError, one_line_errors, pick_device, read_checkpoint
from sample import BATCH, SHIPPED, SIZES, generators, load_stack, save_png, to_picture

# ----------------------------------------------------------------------------- picture → (z_i, x_T) → picture

def load_picture(stack, path):
    """A picture file's middle square: (1, 3, S, S) in [-1, 1], S what CLIP or the decoder reads. Raises UserError."""
    side = max(stack["clip"].config.image_size, stack["decoder"].config.image_size)
    return clip_embed.to_square(clip_embed.open_picture(path), side)


def in_batches(stack, captions, run):
    """run(slice, text, null) over all captions, as many at once as memory takes; what it gives, joined, on the CPU."""
    text, null = clip_embed.encode_captions(stack["clip"], stack["tokenizer"], captions)
    slices = [slice(first, first + BATCH[64]) for first in range(0, len(captions), BATCH[64])]
    return torch.cat([run(some, {k: v[some] for k, v in text.items()}, null).cpu() for some in slices])


def one_each(captions, n):
    """A list of n captions from one for all or one each. Raises UserError on another count."""
    captions = [captions] * n if isinstance(captions, str) else list(captions)
    if len(captions) != n:
        raise UserError(f"{len(captions)} captions for {n} pictures: give one for all, or one each")
    return captions


@torch.no_grad()
def invert(stack, images, captions="", steps=50, seed=0, bar=False):
    """The code of images (B, 3, S, S) in [-1, 1]: z_i (B, d) and x_T (B, 3, 64, 64), by DDIM run backwards (§3).

    captions: one for all or one each; the decoding must use the same, and as many steps. Many x_T give one picture:
    the seed picks one (decoder.invert says why). Raises UserError.
    """
    model, clip, device = stack["decoder"], stack["clip"], stack["clip"].logit_scale.device
    x_0 = F.interpolate(images, model.config.image_size, mode="bicubic", antialias=True).clamp(-1, 1)
    z_i = torch.cat([clip.encode_image(clip_embed.preprocess_tensor(some.to(device), clip.config.image_size)).cpu()
                     for some in images.split(BATCH[64])])
    noise = generators("prior", seed, range(len(images)))  # no prior runs here; the decoder's numbers are for variations
    return z_i, in_batches(stack, one_each(captions, len(images)), lambda some, text, null: decoder.invert(
        model, x_0[some].to(device), z_i[some].to(device), text, noise[some], steps, bar))


def decode(stack, z_i, x_T, captions="", eta=0.0, steps=50, seed=0, bar=False, guidance=1.0):
    """Images (B, n, 3, 64, 64) in [-1, 1] on the CPU, by DDIM, of z_i (B, n, d) from x_T (B, n, 3, 64, 64).

    captions: one for all or one for each of B. Of the B · n pictures the k-th draws its noise from seed + k, where η asks
    for any. Raises UserError.
    """
    if not 0 <= eta <= 1:
        raise UserError(f"eta {eta:g}: must be between 0 and 1")
    (B, n, _), device = z_i.shape, stack["clip"].logit_scale.device
    captions = [caption for caption in one_each(captions, B) for _ in range(n)]
    z_i, x_T, noise = z_i.flatten(0, 1), x_T.flatten(0, 1), generators("decoder", seed, range(B * n))
    return in_batches(stack, captions, lambda some, text, null: decoder.sample(
        stack["decoder"], z_i[some].to(device), text, null, noise[some], guidance, steps, eta, x_T[some].to(device),
        clamp=False, bar=bar)).unflatten(0, (B, n))


# ----------------------------------------------------------------------------- the manipulations

def slerp(a, b, theta):
    """Spherical interpolation from a (theta 0) to b (theta 1), row by row of (B, …): equal angles for equal steps (§3.2, fig. 4).

    The directions turn along the great circle and the norms change evenly, so unit vectors stay so, and noise stays as
    large as noise is. Parallel ones keep their direction; opposite ones have no great circle. Raises UserError.
    """
    if not 0 <= theta <= 1:
        raise UserError(f"theta {theta:g}: must be between 0 and 1")
    u, v = (x.flatten(1).cpu().double() for x in (a, b))
    size_u, size_v = u.norm(dim=1, keepdim=True), v.norm(dim=1, keepdim=True)
    u, v = u / size_u.clamp(min=1e-12), v / size_v.clamp(min=1e-12)
    angle = 2 * torch.atan2((u - v).norm(dim=1, keepdim=True), (u + v).norm(dim=1, keepdim=True))  # exact at 0 and π too
    if (angle > math.pi - 1e-4).any():
        raise UserError("opposite vectors: no shortest way leads from one to the other")
    arc = (((1 - theta) * angle).sin() * u + (theta * angle).sin() * v) / angle.sin()
    between = torch.where(angle < 1e-9, u, arc) * ((1 - theta) * size_u + theta * size_v)
    return between.view_as(a).to(a)


def variations(stack, z_i, x_T, n=8, etas=(0, 0.5, 1), captions="", steps=50, seed=0, bar=False):
    """n pictures of each code and η: z_i kept, the way from x_T left the more, the larger η (§3.1, fig. 3).

    z_i (B, d), x_T (B, 3, 64, 64), as invert gives them → (B, len(etas), n, 3, 64, 64). η = 0 draws nothing and gives n times
    the picture back. Guidance, which would spoil that, grows with η from none to the decoder's own, 1 + η (w − 1) (ours): the less
    x_T holds the picture, the more must z_i.
    """
    z_i, x_T = z_i[:, None].expand(-1, n, -1), x_T[:, None].expand(-1, n, -1, -1, -1)
    guidance = lambda eta: 1 + eta * (stack["decoder"].config.guidance - 1)
    return torch.stack([decode(stack, z_i, x_T, captions, eta, steps, seed, bar, guidance(eta)) if eta else
                        decode(stack, z_i[:, :1], x_T[:, :1], captions, 0, steps, bar=bar).expand_as(x_T) for eta in etas], 1)


def interpolate(stack, a, b, frames=9, noise="slerp", rows=3, captions="", steps=50, seed=0, bar=False):
    """Pictures on the way from codes a to codes b, each (z_i, x_T): (B, rows, frames, 3, 64, 64) (§3.2, fig. 4).

    noise "slerp": x_T turns along with z_i, one row, whose ends are both reconstructions. "fixed": each row keeps noise
    of its own, the same for every pair, and only what is shown changes. Raises UserError.
    """
    if noise not in ("slerp", "fixed") or frames < 2:
        raise UserError(f'noise {noise!r}, {frames} frames: must be "slerp" or "fixed", and at least 2')
    z_i, between = (torch.stack([slerp(*ends, k / (frames - 1)) for k in range(frames)], 1) for ends in zip(a, b))
    fixed = decoder.randn(generators("decoder", seed, range(rows)), (rows, *a[1].shape[1:]), "cpu")
    return torch.stack([decode(stack, z_i, x_T.expand_as(between), captions, 0, steps, bar=bar)
                        for x_T in ([between] if noise == "slerp" else fixed)], 1)


@torch.no_grad()
def text_diff(stack, z_i, x_T, to, source=None, maximum=0.5, frames=7, captions="", steps=50, bar=False, components=None):
    """Pictures moved from what caption `source` says to what `to` says, (B, frames, 3, 64, 64) (§3.3, fig. 5).

    z_d = z_t − z_t0, normalized, and z_θ = slerp(z_i, z_d, θ), θ from 0 to maximum; x_T stays. source None: z_d = z_t (the
    paper's footnote). to, source: one for all or one each. components (K, d): z_d loses what lies outside of their span (ours):
    captions vary in directions in which z_i never does, and there a decoder has learnt nothing of what to draw. Raises UserError,
    also where two captions say the same to CLIP.
    """
    if frames < 2:
        raise UserError(f"{frames} frames: must be at least 2")
    read = lambda said: clip_embed.encode_captions(stack["clip"], stack["tokenizer"], one_each(said, len(z_i)))[0]["z_t"].cpu()
    z_d = read(to) if source is None else read(to) - read(source)
    if (z_d.norm(dim=1) < 1e-4).any():
        raise UserError("the two captions of a text diff must differ: their difference is the direction to go")
    z_d = z_d if components is None else z_d @ components.T @ components
    z_d = F.normalize(z_d, dim=1) * z_i.norm(dim=1, keepdim=True)
    z_theta = torch.stack([slerp(z_i, z_d, maximum * k / (frames - 1)) for k in range(frames)], 1)
    return decode(stack, z_theta, x_T[:, None].expand(-1, frames, -1, -1, -1), captions, 0, steps, bar=bar)


def pca_reconstruct(stack, z_i, x_T, mean, components, counts, captions="", steps=50, bar=False):
    """Decodings of z_i's first k principal components, for each k of counts, from one x_T (§4, fig. 7).

    z_i (B, d), x_T (B, 3, 64, 64), mean (d,), components (K, d), orthonormal, a row each, the largest variance first
    → (B, len(counts), 3, 64, 64). Raises UserError. The sum is not normalized (ours): with few components it is short, near to no
    z_i at all, and the decoder fills in what it does not say; a long one lies where no picture's z_i does, and is decoded as noise.
    """
    if not all(0 <= k <= len(components) for k in counts):
        raise UserError(f"components {' '.join(map(str, counts))}: must be between 0 and {len(components)}")
    z_k = [mean + (z_i - mean) @ components[:k].T @ components[:k] for k in counts]
    x_T = x_T[:, None].expand(-1, len(counts), -1, -1, -1)
    return decode(stack, torch.stack(z_k, 1), x_T, captions, 0, steps, bar=bar)


# ----------------------------------------------------------------------------- files

def save_latent(path, stack, z_i, x_T, caption, steps):
    """Keep one picture's code, z_i (1, d) and x_T (1, 3, 64, 64), and what its decoding must repeat."""
    config = {"decoder": clip_embed.fingerprint(stack["decoder"]), "caption": caption, "steps": steps}
    with open(path, "wb") as file:  # opened here, so that what the disk refuses is an OSError
        torch.save({"stage": "latent", "config": config, "model": {"z_i": z_i.clone(), "x_T": x_T.clone()}}, file)


def load_latent(path, stack):
    """(z_i (1, d), x_T (1, 3, 64, 64), caption, steps) of a latent file. Raises UserError, also for another decoder's."""
    checkpoint, c = read_checkpoint(path, "latent", writer="manipulate.py --save-latent"), stack["decoder"].config
    config, halves = checkpoint["config"], checkpoint["model"]
    if config.get("decoder") != clip_embed.fingerprint(stack["decoder"]):
        raise UserError(f"{path}: belongs to another decoder than the one in --weights; make it anew")
    for name, shape in {"z_i": (1, c.embed_dim), "x_T": (1, 3, c.image_size, c.image_size)}.items():
        x = halves.get(name)
        if not isinstance(x, torch.Tensor) or x.shape != shape or not x.is_floating_point() or not torch.isfinite(x).all():
            raise UserError(f"{path}: {name} should be finite floats of shape {shape}, is {tuple(getattr(x, 'shape', ()))}")
    caption, steps = config.get("caption"), config.get("steps")
    if not isinstance(caption, str) or not isinstance(steps, int) or not 2 <= steps <= 950:
        raise UserError(f"{path}: does not say with what caption and in how many steps (2 to 950) it was inverted")
    return halves["z_i"].float(), halves["x_T"].float(), caption, steps


def codes(stack, paths, caption, steps, seed):
    """([(z_i (1, d), x_T (1, 3, 64, 64)) of each], caption, steps) of pictures and latent files; new pictures are inverted.

    caption and steps None: as the latent files say, else none and 50. Picture k is inverted with seed + k, so that two have
    noise of their own. How well each inversion decodes goes to stderr. Raises UserError.
    """
    latents = {path: load_latent(path, stack) for path in paths if Path(path).suffix == ".pt"}
    for path, (*_, said, taken) in latents.items():
        caption, steps = said if caption is None else caption, steps or taken
        if (said, taken) != (caption, steps):
            raise UserError(f"{path}: was inverted with caption {said!r} in {taken} steps, so not with {caption!r} in {steps}")
    caption, steps, pairs = caption or "", steps or 50, []
    for k, path in enumerate(paths):
        if path in latents:
            pairs.append(latents[path][:2])
            continue
        image = load_picture(stack, path)
        pairs.append(invert(stack, image, caption, steps, seed + k, bar=True))
        again = decode(stack, *(half[:, None] for half in pairs[-1]), caption, 0, steps, bar=True)[:, 0]
        x_0 = F.interpolate(image, again.shape[-1], mode="bicubic", antialias=True).clamp(-1, 1)
        quality = -10 * math.log10(max(1e-12, float(((x_0 - again) / 2).square().mean())))
        poor = f"; warning: hardly it. Try --steps {min(950, 5 * steps)}; if that fails, this decoder never learnt such pictures"
        print(f"{path}: its code decodes to {quality:.1f} dB of the picture{poor if quality < 20 else ''}", file=sys.stderr)
    return pairs, caption, steps


@torch.no_grad()
def enlarge(stack, images, size, seed=0, bar=False):
    """Images (N, 3, 64, 64) through the upsamplers to (N, 3, size, size), from one noise for all: frames don't flicker."""
    for large in SIZES[1:SIZES.index(size) + 1]:
        model, noise = stack[f"upsample-{large}"], lambda n: generators(f"upsample-{large}", seed, [0] * n)
        images = torch.cat([upsample.sample(model, some.to(model.conv_in.weight.device), noise(len(some)), bar=bar).cpu()
                            for some in images.split(BATCH[large])])
    return images


def draw_strip(rows):
    """Rows of (label, image (3, H, H)) as one Pillow image, each label under its picture, small pictures enlarged twice."""
    side = max(128, rows[0][0][1].shape[-1])
    font, band = ImageFont.load_default(side // 9), side // 6
    sheet = Image.new("RGB", (side * max(map(len, rows)), (side + band) * len(rows)), "white")
    for y, row in enumerate(rows):
        for x, (label, image) in enumerate(row):
            sheet.paste(to_picture(image).resize((side, side), Image.Resampling.NEAREST), (x * side, y * (side + band)))
            ImageDraw.Draw(sheet).text(((x + 0.5) * side, (y + 1) * (side + band) - band / 2), label, "black", font, anchor="mm")
    return sheet


def save_all(rows, name, out, gif):
    """Write the strip of rows of (label, image), the frames, the animation if asked for; print the paths. Raises UserError."""
    strip, frames = draw_strip(rows), [(f"{name} {label}", to_picture(image)) for row in rows for label, image in row]
    if out.suffix == ".png":
        strip.save(out)
    paths = [out] if out.suffix == ".png" else [save_png(picture, out, label, settings=" ".join(sys.argv[1:]))
                                                for label, picture in [(name, strip), *frames]]
    if gif:
        paths.append(paths[0].with_suffix(".gif"))
        frames[0][1].save(paths[-1], save_all=True, append_images=[picture for _, picture in frames[1:]], duration=150, loop=0)
    print(*paths, sep="\n")


def main():
    """The script: what --help says."""
    parser = argparse.ArgumentParser(description="Take pictures apart into z_i and x_T, change one of them, decode (§3).")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, pictures, text):
        add = commands.add_parser(name, help=text, description=text[0].upper() + text[1:]).add_argument
        add("pictures", nargs=pictures, metavar="PICTURE", help="a picture, cropped to a square, or a latent file")
        add("--caption", help="what the decoder is told while it inverts and decodes (default: nothing, z_i says it all)")
        add("--steps", type=int, help="DDIM steps each way; more are closer to the picture (default 50; the paper: 250)")
        add("--size", type=int, default=64, choices=SIZES, help="pixels a side, by the upsamplers (default 64)")
        add("--gif", action="store_true", help="also save the frames as an animation, beside the strip")
        add("--save-latent", nargs="+", default=[], metavar="FILE", help="keep each picture's code, as NAME.pt, to give for it")
        add("--seed", type=int, default=0, help="of all noise (default 0)")
        add("--weights", type=Path, default=SHIPPED, help="folder of checkpoints (default: the shipped ones)")
        add("--clip", metavar="PATH", help="the CLIP they were trained with, where it is not that folder's clip.pt")
        add("--bpe", metavar="PATH", help="its merges file, where none lies beside it")
        add("--out", type=Path, default=Path("manipulations"), help="folder (default manipulations/); NAME.png: the strip alone")
        add("--device", default="auto", help="auto, cuda, mps or cpu")
        return add

    add = command("variations", 1, "decode (z_i, x_T) with fresh noise on the way: what z_i holds stays (§3.1)")
    add("--n", type=int, default=8, help="pictures for each eta (default 8)")
    add("--eta", type=float, nargs="+", default=[0, 0.5, 1], help="noise, 0 to 1; 0 gives the picture back (default 0 0.5 1)")
    add = command("interpolate", 2, "walk from one picture's z_i to another's (§3.2)")
    add("--frames", type=int, default=9, help="pictures in a row (default 9)")
    add("--noise", default="slerp", choices=["slerp", "fixed"], help="slerp (default): x_T goes along; fixed: random noise")
    add("--rows", type=int, default=3, help="with --noise fixed, how many noises, each a row (default 3)")
    add = command("textdiff", 1, "edit a picture by the difference of two captions, its x_T kept (§3.3)")
    add("--from", dest="source", metavar="CAPTION", help="what the picture shows (left out: go towards --to itself)")
    add("--to", required=True, metavar="CAPTION", help="what it should show")
    add("--max", type=float, default=0.5, help="how far, as a share of the whole angle (default 0.5; the paper: 0.25 to 0.5)")
    add("--frames", type=int, default=7, help="pictures from none of it to all (default 7)")
    add("--whole", action="store_true", help="the whole difference of the captions, as in the paper; else, where there is an "
        "ar-prior.pt, only its part along the principal components of z_i")
    add = command("reconstruct", 1, "decode z_i from its first k principal components: what comes first? (fig. 7)")
    add("--components", type=int, nargs="+", metavar="K", help="how many (default 1 2 4 8 … and all that ar-prior.pt keeps)")
    add("--rows", type=int, default=2, help="the first with the picture's own x_T, the others with random noise (default 2)")
    args = parser.parse_args()
    with one_line_errors():
        for name, low, high in (("n", 1, 1000), ("eta", 0, 1), ("frames", 2, 1000), ("rows", 1, 100), ("max", 0, 1),
                                ("components", 0, 1 << 20), ("steps", 2, 950), ("seed", 0, 1 << 48)):
            values = getattr(args, name, None)
            if values is not None and not all(low <= v <= high for v in (values if isinstance(values, list) else [values])):
                raise UserError(f"--{name} {values}: must be between {low} and {high}")
        if args.save_latent and [Path(path).suffix for path in args.save_latent] != [".pt"] * len(args.pictures):
            raise UserError(f"--save-latent {' '.join(args.save_latent)}: give a NAME.pt for each of the "
                            f"{len(args.pictures)} pictures")
        if args.out.suffix != ".png" and args.out.suffix.lower() in Image.registered_extensions():
            raise UserError(f"--out {args.out}: a strip is a PNG file, NAME.png; any other name is a folder's")
        for path in [*map(Path, args.save_latent), args.out / "frame" if args.out.suffix != ".png" else args.out]:
            try:  # now, not after minutes of work
                path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"{path.parent}: cannot write there ({error})") from None
        needs = args.command == "reconstruct" or (
            args.command == "textdiff" and not args.whole and (args.weights / "ar-prior.pt").exists())
        kind, components = "ar" if needs else "none", None  # the autoregressive prior keeps z_i's principal components
        stack = load_stack(args.weights, pick_device(args.device), args.size, kind, args.clip, args.bpe)
        if needs:
            mean, components = stack["ar-prior"].mean.cpu(), stack["ar-prior"].components.cpu()
        if args.command == "reconstruct":
            kept = len(components)
            counts = args.components or [*(2 ** n for n in range(20) if 2 ** n < kept), kept]
            if max(counts) > kept:
                raise UserError(f"--components {max(counts)}: {args.weights}'s ar-prior.pt keeps {kept} components of z_i")
        pairs, caption, steps = codes(stack, args.pictures, args.caption, args.steps, args.seed)
        for path, pair in zip(args.save_latent, pairs):
            save_latent(path, stack, *pair, caption, steps)
        z_i, x_T = pairs[0]
        options = {"captions": caption, "steps": steps, "bar": True}
        thetas = [f"theta {theta:.3g}" for theta in np.linspace(0, getattr(args, "max", 1), getattr(args, "frames", 0))]
        if args.command == "variations":
            images = variations(stack, z_i, x_T, args.n, args.eta, seed=args.seed, **options)[0]
            labels = [[f"eta {eta:g}"] * (args.n if eta else 1) for eta in args.eta]  # the same picture n times says no more
        elif args.command == "interpolate":
            images = interpolate(stack, *pairs, args.frames, args.noise, args.rows, seed=args.seed, **options)[0]
            labels = [thetas] * len(images)
        elif args.command == "textdiff":
            images, labels = text_diff(stack, z_i, x_T, args.to, args.source, args.max, args.frames, components=components, **options), [thetas]
        else:
            noise = decoder.randn(generators("decoder", args.seed, range(args.rows)), (args.rows, *x_T.shape[1:]), "cpu")
            z_i, x_T = z_i.expand(args.rows, -1), torch.cat([x_T, noise])[:args.rows]
            images = pca_reconstruct(stack, z_i, x_T, mean, components, counts, **options)
            labels = [[f"k {k}" for k in counts]] * args.rows
        made = torch.cat([row[:len(names)] for row, names in zip(images, labels)])
        frames = iter(enlarge(stack, made, args.size, args.seed, bar=True))
        save_all([[(name, next(frames)) for name in names] for names in labels], args.command, args.out, args.gif)


if __name__ == "__main__":
    main()
