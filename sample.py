"""From captions to pictures: the whole chain (fig. 2, §5).

    caption ─► clip_embed ─► states, z_t (B, d) ─► prior ─► z_i (B, d) ─► decoder ─► (B, 3, 64, 64) ─► upsample, twice
    ─► (B, 3, 256, 256) ─► (B, 3, 1024, 1024)

In:   captions, as arguments or one a line in a file
Out:  PNG files in --out, never over an old one, each with its caption, seed and settings in its text chunks;
      their paths on stdout, one a line, and all else on stderr

Each stage's own `sample` is called with its own options; what is not asked for, its checkpoint says. The shipped decoder takes
10 steps (the paper: 250), for a laptop's sake, and guidance 3. Ours, where the paper is silent: picture k of a run draws its
noise from generators of its own, seeded by seed + k and the stage, and is the same picture alone or in a batch. As the prior
draws two z_i, prior and decoder may draw several candidates, and keep the one whose own z_i, as CLIP sees it, surprises the prior
least, given the caption; once it surprises it little, no more are drawn. (DALL·E, the first, drew 512, and CLIP chose; for the
shipped weights it is 8 at most, and `--candidates 1` is the paper's chain.)

Read: the chain (generate), its networks (load_stack), captions in and pictures out.

    python sample.py "a large red circle above a small blue star"
    python sample.py "a red circle" "a striped heart on pink" --n 8 --size 64 --grid
"""

import argparse
import io
import math
import re
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

import clip_embed
import decoder
import prior
import upsample
from clip_embed import UserError, one_line_errors, pick_device, read_checkpoint

SHIPPED = Path(__file__).parent / "weights" / "shapes"
SIZES = (64, 256, 1024)
STAGE_NUMBER = {"prior": 0, "decoder": 1, "upsample-256": 2, "upsample-1024": 3}
PRIORS = {"diffusion": "prior", "ar": "ar-prior", "none": None, "text": None}  # --prior, and its checkpoint
BATCH = {64: 16, 256: 4, 1024: 1}  # pictures at once: what fits 2 GB
LARGE = 1e9  # bytes of checkpoints
# of prior.surprise, which is about 1 for true pictures: with the shipped weights, of candidates for captions of two things, two in
# five of those with nothing wrong lie below, and one in fifty of the others
ENOUGH = 1.2


# ----------------------------------------------------------------------------- the chain

def generators(stage, seed, pictures, candidate=0):
    """One torch.Generator for each picture number, seeded by seed + number, the stage and which candidate it is for."""
    # mixed by numpy: torch's generator on the CPU reads 32 bits of its seed, and would be the same 2³² further on
    seeds = [np.random.SeedSequence([STAGE_NUMBER[stage], candidate, seed + k]).generate_state(1)[0] for k in pictures]
    return [torch.Generator().manual_seed(int(number)) for number in seeds]


@torch.no_grad()
def generate(stack, captions, seed=0, size=64, prior_kind="diffusion", prior_guidance=None, prior_steps=None, variance="analytic",
             decoder_guidance=None, decoder_steps=None, eta=None, candidates=None, upsample_steps=(None, None), bar=False,
             seconds=None):
    """Images (n, 3, size, size) in [-1, 1] on the CPU, one for each of n captions; "" is unconditional (§2, fig. 2).

    prior_kind (§5.1, fig. 8): z_i from the "diffusion" or the "ar" prior, z_t in its place ("text"), or zeros ("none"). The other
    options are those of each stage's `sample`; None is what its checkpoint says, eta None ancestral sampling. candidates: pictures
    drawn at most for each caption, of z_i and noise of their own; the first whose z_i, as CLIP sees it, surprises the diffusion prior
    less than ENOUGH is kept, or the one that surprises it least; of "" the first. That takes a CLIP with eyes and a prior in the
    stack whose errors were measured: without, the default is one candidate, and more raise UserError. `seconds`, a dictionary,
    gathers the time that each stage took.
    """
    seconds, configs, everything = {} if seconds is None else seconds, {}, list(range(len(captions)))
    device = stack["clip"].logit_scale.device

    def in_batches(stage, pictures, most, run, candidate=0, kind=None):
        began, parts, network = time.perf_counter(), [], stack[kind or stage]
        half, configs[stage] = next(network.parameters()).dtype == torch.float16, network.config
        for first in range(0, len(pictures), most):
            some = pictures[first:first + most]
            with torch.autocast(device.type, torch.float16, enabled=half):
                parts.append(run(network, some, generators(stage, seed, some, candidate)).float().cpu())
        seconds[stage] = seconds.get(stage, 0) + time.perf_counter() - began
        return torch.cat(parts)

    text, null = clip_embed.encode_captions(stack["clip"], stack["tokenizer"], captions)
    z_i = text["z_t"].cpu() * (prior_kind == "text")
    of = lambda some: {k: v[some] for k, v in text.items()}

    def draw(pictures, candidate, bar):
        if prior_kind == "diffusion":
            z_i[pictures] = in_batches("prior", pictures, 256, lambda network, some, noise: prior.sample(
                network, of(some), null, noise, prior_guidance, prior_steps, variance=variance, bar=bar), candidate)
        elif prior_kind == "ar":
            z_i[pictures] = in_batches("prior", pictures, 256, lambda network, some, noise: prior.ar_sample(
                network, of(some), null, noise, 1.0 if prior_guidance is None else prior_guidance, bar=bar), candidate, "ar-prior")
        return in_batches("decoder", pictures, BATCH[64], lambda network, some, noise: decoder.sample(
            network, z_i[some].to(device), of(some), null, noise, decoder_guidance, decoder_steps, eta, bar=bar), candidate)

    def can_judge():
        return stack["clip"].visual is not None and "prior" in stack and bool(stack["prior"].errors.any())

    def surprise(pictures, drawn):
        began, surprises, clip, judge = time.perf_counter(), [], stack["clip"], stack["prior"]
        for first in range(0, len(pictures), BATCH[64]):
            some = slice(first, first + BATCH[64])
            seen = clip.encode_image(clip_embed.preprocess_tensor(drawn[some].to(device), clip.config.image_size))
            with torch.autocast(device.type, torch.float16, enabled=judge.errors.dtype == torch.float16):
                surprises.append(prior.surprise(judge, seen, of(pictures[some])).float().cpu())
        seconds["judge"] = seconds.get("judge", 0) + time.perf_counter() - began
        return torch.cat(surprises)

    if candidates is not None and candidates > 1 and not can_judge():
        raise UserError("candidates are compared by CLIP's image tower and the diffusion prior's errors (prior.pt, trained to its end), "
                        "and one of them is missing: draw one (--candidates 1)")
    images, best = draw(everything, 0, bar), torch.full((len(captions),), math.inf)
    candidates = candidates or configs["decoder"].candidates
    left = [k for k, caption in enumerate(captions) if caption] if candidates > 1 and can_judge() else []
    if left:
        best[left] = surprise(left, images[left])
    for c in tqdm(range(1, candidates), "candidates", disable=not bar or not left):
        left = [k for k in left if best[k] > ENOUGH]
        if not left:
            break
        drawn = draw(left, c, False)
        for k, image, value in zip(left, drawn, surprise(left, drawn)):
            if value < best[k]:
                images[k], best[k] = image, value
    for large, steps in zip(SIZES[1:SIZES.index(size) + 1], upsample_steps):
        small = images
        images = in_batches(f"upsample-{large}", everything, BATCH[large], lambda network, some, noise: upsample.sample(
            network, small[some].to(device), noise, steps, bar=bar))
    return images


# ----------------------------------------------------------------------------- its networks

class Stages(dict):
    """{stage: network}; a network that is still a recipe (a partial) is made each time it is asked for, and kept by nobody."""

    def __getitem__(self, stage):
        value = super().__getitem__(stage)
        return value() if isinstance(value, partial) else value


def load_stack(weights=SHIPPED, device="cpu", size=64, prior_kind="diffusion", clip_path=None, bpe=None, lean=False, judge=False):
    """The networks that a picture of `size` needs, from a folder of checkpoints: {"clip", "tokenizer", "prior", …}.

    prior_kind is one of PRIORS. clip_path, bpe: a CLIP from elsewhere, as clip_embed.load_clip reads it, in place of the folder's
    clip.pt. Raises UserError where a checkpoint is missing, damaged, of another stage, or belongs to another CLIP. lean: where
    they are LARGE together, read each when it is asked for (Stages), on GPUs in half precision, for which generate is made. judge:
    bring the diffusion prior, if there is one, along to judge candidates, whatever prior_kind is.
    """
    weights = Path(weights)
    clip_path = clip_path or weights / "clip.pt"
    clip, tokenizer = clip_embed.load_clip(clip_path, bpe)
    stack = {"clip": clip, "tokenizer": tokenizer}
    kinds = {"prior": (prior.DiffusionPrior, prior.PriorConfig), "ar-prior": (prior.ARPrior, prior.ARConfig)}
    wanted = {PRIORS[prior_kind], "prior" if judge and (weights / "prior.pt").exists() else None}
    kinds = {k: v for k, v in kinds.items() if k in wanted} | {"decoder": (decoder.Decoder, decoder.DecoderConfig)}
    for large in SIZES[1:SIZES.index(size) + 1]:
        kinds[f"upsample-{large}"] = (upsample.Upsampler, upsample.UpsamplerConfig)
    mark = clip_embed.fingerprint(clip)
    paths = {stage: weights / f"{stage}.pt" for stage in kinds}
    large = lean and all(path.exists() for path in paths.values()) and sum(path.stat().st_size for path in paths.values()) > LARGE

    def load(stage):
        checkpoint = read_checkpoint(paths[stage], stage, mmap=large, clip=(mark, clip_path))
        network = clip_embed.load_model(*kinds[stage], checkpoint, paths[stage])
        half = large and torch.device(device).type == "cuda"
        layout = torch.preserve_format if large else torch.channels_last  # convolves faster, but its copies take memory
        return network.to(device, torch.float16 if half else torch.float32, memory_format=layout)

    clip.to(device)
    return Stages(stack | {stage: partial(load, stage) if large else load(stage) for stage in kinds})


# ----------------------------------------------------------------------------- captions in, pictures out

def gather_captions(arguments, file):
    """The captions given as arguments and those in a file, one a line, blank lines left out. Raises UserError."""
    captions = list(arguments)
    if file:
        try:
            captions += [line.strip() for line in Path(file).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--file {file}: cannot be read as UTF-8 text ({error})") from None
    if not captions:
        raise UserError('no caption: give one, as in  python sample.py "a large red circle above a small blue star"')
    return captions


def to_picture(image):
    """A tensor (3, H, W) in [-1, 1] → a Pillow image."""
    return Image.fromarray(((image.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy())


def grid(images, columns):
    """Tensors (3, H, W) in [-1, 1] side by side, `columns` a row, as one Pillow image."""
    side = images[0].shape[-1]
    sheet = Image.new("RGB", (columns * side, -(-len(images) // columns) * side), "white")
    for k, image in enumerate(images):
        sheet.paste(to_picture(image), (k % columns * side, k // columns * side))
    return sheet


def save_png(picture, folder, name, **chunks):
    """Write folder/NNNN-name.png under the first free number, with text chunks; returns its path. Raises UserError."""
    info, file = PngInfo(), io.BytesIO()
    for key, value in chunks.items():
        info.add_itxt(key, str(value).encode("utf-8", "replace").decode())
    picture.save(file, "PNG", pnginfo=info)
    name = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:60].strip("-") or "unconditional"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        taken = [int(p.name[:4]) for p in folder.glob("[0-9][0-9][0-9][0-9]-*.png")]
        number = max(taken, default=-1) + 1
        while True:
            path = folder / f"{number:04d}-{name}.png"
            try:
                with open(path, "xb") as out:  # x: never over an existing file
                    out.write(file.getvalue())
                return path
            except FileExistsError:
                number += 1
    except OSError as error:
        raise UserError(f"{folder}: cannot write there ({error})") from None


def main():
    """The script: what --help says."""
    parser = argparse.ArgumentParser(
        description="Make pictures from captions: prior, decoder, upsamplers. The shipped weights know a world of one or two "
        "shapes: circle, square, triangle, star, heart, cross; red, orange, yellow, green, blue, purple, black; small or large; "
        "solid or striped; left of, right of, above, below; on a white, gray, pink or mint background.",
        epilog="An empty caption makes an unconditional picture. Guidance 1 is no guidance, 0 ignores the condition. "
        "Defaults of guidance and steps are the shipped weights'; others bring their own.")
    parser.add_argument("captions", nargs="*", metavar="CAPTION", help="what to draw")
    parser.add_argument("--file", help="a text file of captions, one a line")
    parser.add_argument("--n", type=int, default=1, help="pictures a caption (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="picture k is drawn with seed + k (default 0)")
    parser.add_argument("--size", type=int, choices=SIZES, help="pixels a side (default: as many as the weights allow; 1024)")
    parser.add_argument("--prior", dest="prior_kind", default="diffusion", choices=PRIORS, help="where z_i comes from: a prior, "
                        "diffusion (default) or ar (autoregressive); text: z_t in its place; none: the caption alone (fig. 8)")
    parser.add_argument("--prior-guidance", type=float, help="default 1, no guidance (§5: in the prior it hurt)")
    parser.add_argument("--prior-steps", type=int, help="of the diffusion prior: default 64, as in the paper")
    parser.add_argument("--variance", default="analytic", choices=["analytic", "fixed-small"],
                        help="of the diffusion prior's steps (default analytic, as in the paper)")
    parser.add_argument("--decoder-guidance", type=float, help="default 3 (the paper for table 2: 1.25)")
    parser.add_argument("--decoder-steps", type=int, help="default 10, for a laptop (the paper: 250)")
    parser.add_argument("--candidates", type=int, help="pictures drawn at most for one, each of a z_i and noise of its own, until "
                        "the prior finds one that fits the caption; else the best is kept: default 8 (the paper: 1)")
    parser.add_argument("--eta", type=float, help="decode by DDIM with this eta (default: ancestral, with the learned variance, "
                        "as in the paper)")
    parser.add_argument("--upsample-steps", type=int, nargs=2, default=(None, None), metavar=("S256", "S1024"),
                        help="default 27 15, as in the paper")
    parser.add_argument("--grid", action="store_true", help="also save all pictures on one sheet; with --n, a caption a row")
    parser.add_argument("--weights", type=Path, default=SHIPPED, help="folder of checkpoints (default: the shipped ones)")
    parser.add_argument("--clip", metavar="PATH", help="the CLIP they were trained with, where it is not that folder's clip.pt")
    parser.add_argument("--bpe", metavar="PATH", help="its merges file, where none lies beside it")
    parser.add_argument("--out", type=Path, default=Path("samples"), help="folder for the pictures (default samples/)")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    args = parser.parse_args()
    with one_line_errors():
        captions = gather_captions(args.captions, args.file)
        for name, low, high in (("n", 1, 10_000), ("seed", 0, 1 << 48), ("prior_steps", 1, 1000), ("decoder_steps", 1, 990),
                                ("prior_guidance", 0, 100), ("decoder_guidance", 0, 100), ("eta", 0, 1), ("candidates", 1, 1000)):
            value = getattr(args, name)
            if value is not None and not low <= value <= high:
                raise UserError(f"--{name.replace('_', '-')} {value}: must be between {low} and {high}")
        if any(s is not None and not 1 <= s <= 900 for s in args.upsample_steps):
            raise UserError(f"--upsample-steps {' '.join(map(str, args.upsample_steps))}: both must be between 1 and 900")
        size = args.size or max(s for s in SIZES if s == 64 or (args.weights / f"upsample-{s}.pt").exists())
        stack = load_stack(args.weights, pick_device(args.device), size, args.prior_kind, args.clip, args.bpe, lean=True,
                           judge=args.candidates != 1)
        captions = [caption for caption in captions for _ in range(args.n)]
        options = {k: getattr(args, k) for k in ("prior_kind", "prior_guidance", "prior_steps", "variance", "decoder_guidance",
                                                 "decoder_steps", "eta", "candidates", "upsample_steps")}
        unsaid = {"eta": "ancestral"}
        settings = ", ".join(f"{k.replace('_', '-')} {unsaid.get(k, 'default') if v in (None, (None, None)) else v}"
                             for k, v in options.items())
        seconds, sheet = {}, []
        for first in range(0, len(captions), BATCH[64]):  # a batch is saved before the next one begins
            some = captions[first:first + BATCH[64]]
            images = generate(stack, some, args.seed + first, size, **options, bar=True, seconds=seconds)
            for k, (caption, image) in enumerate(zip(some, images), args.seed + first):
                print(save_png(to_picture(image), args.out, caption, caption=caption, seed=k, settings=settings), flush=True)
            sheet += images if args.grid else []
        if args.grid:
            columns = args.n if args.n > 1 else math.ceil(len(sheet) ** 0.5)
            print(save_png(grid(sheet, columns), args.out, "grid", captions="\n".join(captions), seed=args.seed,
                           settings=settings))
        print("seconds: " + ", ".join(f"{stage} {s:.1f}" for stage, s in seconds.items()), file=sys.stderr)


if __name__ == "__main__":
    main()
