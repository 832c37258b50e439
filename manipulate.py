"""Manipulations of pictures through their code (z_i, x_T) (§3; the probe of fig. 7).

    picture ─┬─► CLIP's image tower ─► z_i ──────┐   the content
             └─► DDIM run backwards ─► x_T ──────┴─► DDIM ─► picture   z_i and x_T together: all

In:   pictures of any size or kind, or latent files: (z_i, x_T), written by --save-latent
Out:  in --out, under new numbers, a labelled strip and its frames; or the strip alone as NAME.png

Variations draw fresh noise on the way from x_T (§3.1). Interpolations turn one code into another
(§3.2). Text diffs push z_i along the difference of two captions (§3.3). Reconstructions keep z_i's
first principal components (§4). Nothing is trained here; the sampler is the decoder's DDIM.

Not in the paper: decoding with η = 0 is unguided, unclamped, and repeats the inversion's caption
and steps, so that it undoes it; the principal components are the autoregressive prior's.

    python manipulate.py variations picture.png --n 8 --eta 0 0.5 1
    python manipulate.py interpolate a.png b.png --frames 9 --gif
    python manipulate.py textdiff picture.png --from "a red circle" --to "a blue circle"
    python manipulate.py reconstruct picture.png --components 1 2 4 8
"""

import argparse
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

import decoder
import prior
import upsample
from clip_embed import (UserError, check_ranges, encode_captions, encode_pictures, one_line_errors,
                        open_picture, pick_device, psnr, to_picture, to_square)
from sample import BATCH, generators, in_batches, rows, save_png
from weights.checkpoints import check_out, read_checkpoint
from weights.latents import load_latent, save_latent
from weights.stack import PRECISIONS, SHIPPED, SIZES, load_stack


def load_picture(stack, path):
    """A picture file's middle square: (1, 3, S, S) in [-1, 1]. Raises UserError."""
    side = max(stack["clip"].config.image_size, stack["decoder"].config.image_size)
    return to_square(open_picture(path), side)


def to_decoder(stack, images):
    """Images (B, 3, S, S) in [-1, 1], resized to the decoder's size."""
    size = stack["decoder"].config.image_size
    return F.interpolate(images, size, mode="bicubic", antialias=True).clamp(-1, 1)


def one_each(captions, n):
    """A list of n captions from one for all or one each. Raises UserError on another count."""
    captions = [captions] * n if isinstance(captions, str) else list(captions)
    if len(captions) != n:
        raise UserError(f"{len(captions)} captions for {n} pictures: give one for all, or one each")
    return captions


@torch.no_grad()
def invert(stack, images, captions="", steps=50, seed=0, bar=False):
    """The code of images (B, 3, S, S) in [-1, 1]: z_i (B, d), x_T (B, 3, 64, 64) (§3).

    captions: one for all or one each; decoding must repeat them and the steps. Raises UserError.
    """
    model, clip, device = stack["decoder"], stack["clip"], stack["clip"].logit_scale.device
    B, x_0 = len(images), to_decoder(stack, images)
    text, _ = encode_captions(clip, stack["tokenizer"], one_each(captions, B))
    z_i = in_batches(clip, B, BATCH[64], lambda part: encode_pictures(clip, images[part]))
    # the prior's random numbers, since no prior runs here; variations draw the decoder's
    x_T = in_batches(model, B, BATCH[64], lambda part: decoder.invert(
        model, x_0[part].to(device), z_i[part].to(device), rows(text, part),
        generators("prior", seed, range(B)[part]), steps, bar))
    return z_i, x_T


@torch.no_grad()
def decode(stack, z_i, x_T, captions="", eta=0.0, steps=50, seed=0, bar=False, guidance=1.0):
    """Images (B, n, 3, 64, 64) in [-1, 1] of z_i (B, n, d) from x_T (B, n, 3, 64, 64), by DDIM.

    captions: one for all or one for each of B. Picture k draws from seed + k. Raises UserError.
    """
    if not 0 <= eta <= 1:
        raise UserError(f"eta {eta:g}: must be between 0 and 1")
    (B, n, _), model, device = z_i.shape, stack["decoder"], stack["clip"].logit_scale.device
    captions = [caption for caption in one_each(captions, B) for _ in range(n)]
    text, null = encode_captions(stack["clip"], stack["tokenizer"], captions)
    z_i, x_T = z_i.flatten(0, 1), x_T.flatten(0, 1)
    images = in_batches(model, B * n, BATCH[64], lambda part: decoder.sample(
        model, z_i[part].to(device), rows(text, part), null,
        generators("decoder", seed, range(B * n)[part]), guidance, steps, eta,
        x_T[part].to(device), clamp=False, bar=bar))
    return images.unflatten(0, (B, n))


def slerp(a, b, theta):
    """Spherical interpolation from a (theta 0) to b (theta 1), row by row of (B, …) (§3.2, fig. 4).

    The directions turn by equal angles, the norms change evenly: unit vectors stay unit, noise as
    large as noise. Raises UserError for opposite vectors, and for a theta outside [0, 1].
    """
    if not 0 <= theta <= 1:
        raise UserError(f"theta {theta:g}: must be between 0 and 1")
    u, v = (x.flatten(1).cpu().double() for x in (a, b))
    size_u, size_v = u.norm(dim=1, keepdim=True), v.norm(dim=1, keepdim=True)
    u, v = u / size_u.clamp(min=1e-12), v / size_v.clamp(min=1e-12)
    angle = 2 * torch.atan2((u - v).norm(dim=1, keepdim=True), (u + v).norm(dim=1, keepdim=True))
    if (angle > math.pi - 1e-4).any():
        raise UserError("opposite vectors: no shortest way leads from one to the other")
    arc = (((1 - theta) * angle).sin() * u + (theta * angle).sin() * v) / angle.sin()
    size = (1 - theta) * size_u + theta * size_v
    return (torch.where(angle < 1e-9, u, arc) * size).view_as(a).to(a)


def variations(stack, z_i, x_T, n=8, etas=(0, 0.5, 1), captions="", steps=50, seed=0, bar=False):
    """n pictures of each code and η: same z_i, same x_T; a larger η wanders farther (§3.1).

    z_i (B, d), x_T (B, 3, 64, 64) → (B, len(etas), n, 3, 64, 64) (fig. 3). η = 0 gives n times the
    picture back. Not in the paper: guidance grows from 1 to the decoder's own w (shapes: 1), as
    1 + η (w − 1): the less x_T holds the picture, the more must z_i.
    """
    made = []
    for eta in etas:
        count = n if eta else 1
        guidance = 1 + eta * (stack["decoder"].config.guidance - 1)
        codes = (half[:, None].expand(-1, count, *half.shape[1:]) for half in (z_i, x_T))
        images = decode(stack, *codes, captions, eta, steps, seed, bar, guidance)
        made.append(images.expand(-1, n, -1, -1, -1))
    return torch.stack(made, 1)


def interpolate(stack, a, b, frames=9, noise="slerp", rows=3, captions="", steps=50, seed=0,
                bar=False):
    """Pictures between codes a and b, each (z_i, x_T): (B, rows, frames, 3, 64, 64) (§3.2, fig. 4).

    noise "slerp": x_T turns along with z_i, one row, whose ends are both reconstructions. "fixed":
    each row keeps its own noise, the same for every pair, and only z_i turns. Raises UserError.
    """
    if noise not in ("slerp", "fixed") or frames < 2:
        raise UserError(f"noise {noise!r}: slerp or fixed; {frames} frames: must be at least 2")
    thetas = [k / (frames - 1) for k in range(frames)]
    z_i, x_T = (torch.stack([slerp(*ends, theta) for theta in thetas], 1) for ends in zip(a, b))
    noises, shape = [x_T], (rows, *a[1].shape[1:])
    if noise == "fixed":
        noises = decoder.randn(generators("decoder", seed, range(rows)), shape, "cpu")
    return torch.stack([decode(stack, z_i, noise.expand_as(x_T), captions, 0, steps, bar=bar)
                        for noise in noises], 1)


@torch.no_grad()
def restored(stack, z_i, z_theta, t=160):
    """z_θ (B, d), to which z_i moved, put back among pictures' z_i by the diffusion prior: (B, d).

    Not in the paper. z_d is not exactly a difference of pictures: z_θ lies outside the z_i that the
    decoder has learned from. The prior has learned the same z_i. Without a caption, it restores z_i
    and z_θ from the same noise of timestep t; z_i moves by the difference. Karlo's z_θ stays.
    """
    model, d = stack["prior"], z_i.shape[1]
    if not model.config.unit_norm:
        return z_theta
    text, _ = encode_captions(stack["clip"], stack["tokenizer"], [""] * 2 * len(z_i))
    z_0 = model.standardize(torch.cat([z_i, z_theta]).to(text["z_t"]))  # (2B, d)
    t = torch.full_like(z_0[:, 0], t, dtype=torch.long)
    eps = torch.randn(d, generator=torch.Generator().manual_seed(0)).to(z_0)  # one for all rows
    noised = prior.q_sample(z_0, t, eps, prior.cosine_schedule())
    own, moved = in_batches(model, len(z_0), BATCH[64], lambda part: model.embedding(
        model(noised[part], t[part], rows(text, part)))).chunk(2)
    return F.normalize(z_i + (moved - own).to(z_i), dim=1)


@torch.no_grad()
def text_diff(stack, z_i, x_T, to, source=None, maximum=0.5, frames=7, captions="", steps=50,
              bar=False, restore=False):
    """Pictures moved from the meaning of `source` to that of `to`, (B, frames, 3, 64, 64) (§3.3).

    z_d = z_t − z_t0, normalized; z_θ = slerp(z_i, z_d, θ), θ from 0 to maximum; x_T stays (fig. 5).
    source None: z_d = z_t. to, source: one for all or one each. Not in the paper: with restore, the
    stack's diffusion prior restores z_θ. Raises UserError, also for captions of the same z_t.
    """
    if frames < 2:
        raise UserError(f"{frames} frames: must be at least 2")

    def z_t(captions):
        each = one_each(captions, len(z_i))
        return encode_captions(stack["clip"], stack["tokenizer"], each)[0]["z_t"].cpu()

    z_d = z_t(to) if source is None else z_t(to) - z_t(source)
    if (z_d.norm(dim=1) < 1e-4).any():
        raise UserError("the two captions of a text diff must differ: z_i moves by the difference")
    z_d = F.normalize(z_d, dim=1) * z_i.norm(dim=1, keepdim=True)
    z_theta = [slerp(z_i, z_d, maximum * k / (frames - 1)) for k in range(frames)]
    if restore:
        z_theta = [restored(stack, z_i, z) for z in z_theta]
    z_theta, x_T = torch.stack(z_theta, 1), x_T[:, None].expand(-1, frames, -1, -1, -1)
    return decode(stack, z_theta, x_T, captions, 0, steps, bar=bar)


def pca_reconstruct(stack, z_i, x_T, mean, components, counts, captions="", steps=50, bar=False):
    """Decodings of z_i's first k principal components, for each k of counts, from x_T (§4, fig. 7).

    z_i (B, d), x_T (B, 3, 64, 64), mean (d,), components (K, d), orthonormal rows, the largest
    variance first → (B, len(counts), 3, 64, 64). Not in the paper: z_i is not normalized again;
    stretched to length 1 it would lie far from any picture's. Raises UserError.
    """
    if not all(0 <= k <= len(components) for k in counts):
        raise UserError(f"components {counts}: must be between 0 and {len(components)}")
    z_k = [mean + (z_i - mean) @ components[:k].T @ components[:k] for k in counts]
    x_T = x_T[:, None].expand(-1, len(counts), -1, -1, -1)
    return decode(stack, torch.stack(z_k, 1), x_T, captions, 0, steps, bar=bar)


def read_latents(stack, paths, caption, steps, seed):
    """([(z_i, x_T) of each], caption, steps) of pictures, which are inverted, and latent files.

    caption and steps None: those of the latent files, else none and 50. Picture k is inverted with
    seed + k. stderr tells how well each code decodes. Raises UserError.
    """
    latents = {path: load_latent(path, stack) for path in paths if Path(path).suffix == ".pt"}
    for path, (*_, its_caption, its_steps) in latents.items():
        caption, steps = its_caption if caption is None else caption, steps or its_steps
        if (its_caption, its_steps) != (caption, steps):
            raise UserError(f"{path}: was inverted with caption {its_caption!r} in {its_steps} "
                            f"steps, so not with {caption!r} in {steps}")
    caption, steps, pairs = caption or "", steps or 50, []
    for k, path in enumerate(paths):
        if path in latents:
            pairs.append(latents[path][:2])
            continue
        image = load_picture(stack, path)
        z_i, x_T = invert(stack, image, caption, steps, seed + k, bar=True)
        pairs.append((z_i, x_T))
        again = decode(stack, z_i[:, None], x_T[:, None], caption, 0, steps, bar=True)[:, 0]
        quality = psnr(to_decoder(stack, image), again)
        note = (f"; warning: a poor one. Try --steps {min(950, 5 * steps)}; if that fails, this "
                "decoder never learnt such pictures") if quality < 20 else ""
        print(f"{path}: its code decodes to {quality:.1f} dB of the picture{note}", file=sys.stderr)
    return pairs, caption, steps


@torch.no_grad()
def enlarge(stack, images, size, seed=0, bar=False):
    """Images (N, 3, 64, 64) → (N, 3, size, size), from one noise for all: no flicker."""
    device = stack["clip"].logit_scale.device
    for large in SIZES[1:SIZES.index(size) + 1]:
        stage, small = f"upsample-{large}", images
        images = in_batches(stack[stage], len(small), BATCH[large], lambda part: upsample.sample(
            stack[stage], small[part].to(device), generators(stage, seed, [0] * len(small[part])),
            bar=bar))
    return images


def draw_strip(rows):
    """Rows of (label, image (3, H, H)) as one Pillow image, each label under its picture."""
    side = max(128, rows[0][0][1].shape[-1])  # 64 pixels are doubled
    font, band = ImageFont.load_default(side // 9), side // 6
    sheet = Image.new("RGB", (side * max(map(len, rows)), (side + band) * len(rows)), "white")
    for y, row in enumerate(rows):
        for x, (label, image) in enumerate(row):
            picture = to_picture(image).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(picture, (x * side, y * (side + band)))
            place = (x + 0.5) * side, (y + 1) * (side + band) - band / 2
            ImageDraw.Draw(sheet).text(place, label, "black", font, anchor="mm")
    return sheet


def save_all(rows, name, out, gif):
    """Write the strip of rows of (label, image), its frames unless out is a .png, and a GIF."""
    strip, paths, settings = draw_strip(rows), [out], " ".join(sys.argv[1:])
    frames = [(f"{name} {label}", to_picture(image)) for row in rows for label, image in row]
    if out.suffix == ".png":
        strip.save(out)
    else:
        paths = [save_png(picture, out, label, settings=settings)
                 for label, picture in [(name, strip), *frames]]
    if gif:
        paths.append(paths[0].with_suffix(".gif"))
        others = [picture for _, picture in frames[1:]]
        frames[0][1].save(paths[-1], save_all=True, append_images=others, duration=150, loop=0)
    print(*paths, sep="\n")


def parse_arguments():
    """The command line's options."""
    parser = argparse.ArgumentParser(description="Change pictures by their code (z_i, x_T) (§3).")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, pictures, text):
        add = commands.add_parser(name, help=text, description=text.capitalize()).add_argument
        add("pictures", nargs=pictures, metavar="PICTURE", help="a picture, or a latent file")
        add("--caption", help="of the decoder in inversion and decoding (default: none)")
        add("--steps", type=int, help="DDIM steps each way (default 50; the paper: 250)")
        add("--size", type=int, default=64, choices=SIZES, help="pixels a side (default 64)")
        add("--gif", action="store_true", help="also save the frames as an animation")
        add("--save-latent", nargs="+", default=[], metavar="PT", help="keep each code as NAME.pt")
        add("--seed", type=int, default=0, help="seed of all noise (default 0)")
        add("--weights", type=Path, default=SHIPPED, help="folder of checkpoints")
        add("--clip", metavar="PATH", help="their CLIP, if it is not that folder's clip.pt")
        add("--bpe", metavar="PATH", help="its merges file, if none lies beside it")
        add("--out", type=Path, default=Path("manipulations"), help="folder, or strip as NAME.png")
        add("--device", default="auto", help="auto, cuda, mps or cpu")
        add("--precision", default="auto", choices=PRECISIONS, help="auto: bfloat16 where faster")
        return add

    add = command("variations", 1, "decode a picture's code with fresh noise on the way (§3.1)")
    add("--n", type=int, default=8, help="pictures for each eta (default 8)")
    add("--eta", type=float, nargs="+", default=[0, 0.5, 1], help="noise (default 0 0.5 1)")
    add = command("interpolate", 2, "walk from one picture's z_i to another's (§3.2)")
    add("--frames", type=int, default=9, help="pictures in a row (default 9)")
    add("--noise", default="slerp", choices=["slerp", "fixed"], help="x_T turns (default) or stays")
    add("--rows", type=int, default=3, help="with --noise fixed, how many noises (default 3)")
    add = command("textdiff", 1, "edit a picture by the difference of two captions (§3.3)")
    add("--from", dest="source", metavar="CAPTION", help="of the picture (default: none)")
    add("--to", required=True, metavar="CAPTION", help="of the wanted picture")
    add("--max", type=float, default=0.5, help="share of the angle (default 0.5; paper: 0.25–0.5)")
    add("--frames", type=int, default=7, help="pictures in a row (default 7)")
    add("--whole", action="store_true", help="leave z_i as moved: the prior doesn't restore it")
    add = command("reconstruct", 1, "decode z_i from its first k principal components (fig. 7)")
    add("--components", type=int, nargs="+", metavar="K", help="how many (default 1 2 4 8 … all)")
    add("--rows", type=int, default=2, help="the picture's x_T, then random noises (default 2)")
    return parser.parse_args()


def check_arguments(args):
    """Refuse impossible numbers and file names before minutes of work. Raises UserError."""
    check_ranges(args, n=(1, 1000), eta=(0, 1), frames=(2, 1000), rows=(1, 100), max=(0, 1),
                 components=(0, 1 << 20), steps=(2, 950), seed=(0, 1 << 48))
    names, n = args.save_latent, len(args.pictures)
    if names and ([Path(name).suffix for name in names] != [".pt"] * n or len({*names}) < n):
        raise UserError(f"--save-latent {' '.join(names)}: give a NAME.pt for each of the {n} "
                        "pictures, each another")
    if args.out.suffix != ".png" and args.out.suffix.lower() in Image.registered_extensions():
        raise UserError(f"--out {args.out}: a strip is a PNG file, NAME.png")
    if args.command == "textdiff" and args.source == args.to:
        raise UserError("--from and --to: the two captions of a text diff must differ")
    for path in map(Path, names):
        check_out(path)
        if path.exists():  # a code may be overwritten, a checkpoint not
            read_checkpoint(path, "latent", writer="manipulate.py --save-latent")
    check_out(args.out, *args.pictures)
    if args.gif and args.out.suffix == ".png":
        check_out(args.out.with_suffix(".gif"), *args.pictures)


def run(args, stack, pairs, caption, steps):
    """([rows of images], [rows of labels]) of a command on the codes of its pictures."""
    (z_i, x_T), options = pairs[0], {"captions": caption, "steps": steps, "bar": True}
    if args.command == "variations":
        images = variations(stack, z_i, x_T, args.n, args.eta, seed=args.seed, **options)[0]
        return images, [[f"eta {eta:g}"] * (args.n if eta else 1) for eta in args.eta]
    if args.command == "reconstruct":
        codes = stack["ar-prior"].cpu().float()
        kept = len(codes.components)
        counts = args.components or [2 ** n for n in range(20) if 2 ** n < kept] + [kept]
        noise = generators("decoder", args.seed, range(args.rows))
        x_T = torch.cat([x_T, decoder.randn(noise, x_T.shape, "cpu")])[:args.rows]
        images = pca_reconstruct(stack, z_i.expand(args.rows, -1), x_T, codes.mean,
                                 codes.components, counts, **options)
        return images, [[f"k {k}" for k in counts]] * args.rows
    maximum = getattr(args, "max", 1)
    labels = [f"theta {maximum * k / (args.frames - 1):.3g}" for k in range(args.frames)]
    if args.command == "interpolate":
        options["seed"] = args.seed
        images = interpolate(stack, *pairs, args.frames, args.noise, args.rows, **options)[0]
    else:
        images = text_diff(stack, z_i, x_T, args.to, args.source, args.max, args.frames,
                           restore="prior" in stack, **options)
    return images, [labels] * len(images)


def main():
    args = parse_arguments()
    with one_line_errors():
        check_arguments(args)
        kind = "ar" if args.command == "reconstruct" else "none"
        stack = load_stack(args.weights, pick_device(args.device), args.size, kind, args.clip,
                           args.bpe, judge=args.command == "textdiff" and not args.whole,
                           precision=args.precision)
        wanted = max(getattr(args, "components", None) or [0])
        if wanted and wanted > (kept := len(stack["ar-prior"].components)):
            raise UserError(f"--components {wanted}: {args.weights}/ar-prior.pt keeps only {kept}")
        pairs, *given = read_latents(stack, args.pictures, args.caption, args.steps, args.seed)
        for path, pair in zip(args.save_latent, pairs):
            save_latent(path, stack, *pair, *given)
        images, labels = run(args, stack, pairs, *given)
        made = torch.cat([row[:len(names)] for row, names in zip(images, labels)])
        frames = iter(enlarge(stack, made, args.size, args.seed, bar=True))
        strip = [[(name, next(frames)) for name in names] for names in labels]
        save_all(strip, args.command, args.out, args.gif)


if __name__ == "__main__":
    main()
