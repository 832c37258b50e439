"""From captions to pictures: the whole chain (fig. 2, §5).

    caption ─► clip_embed ─► states, z_t (B, d) ─► prior ─► z_i (B, d) ─► decoder ─► (B, 3, 64, 64)
    ─► upsample ─► (B, 3, 256, 256) ─► upsample ─► (B, 3, 1024, 1024)

In:   captions, as arguments or one a line in a file
Out:  PNG files in --out, caption, seed and settings in their text chunks; their paths on stdout

Unset options come from the checkpoints' configs. Picture k of a run draws its noise from generators
of its own, seeded by seed + k and the stage: it is the same picture alone or in a batch.

Not in the paper: prior and decoder may draw several candidates for one picture. The diffusion prior
then says how badly the z_i of each fits the caption (surprise), and the first that fits well enough
is kept, or else the best. `--candidates 1` is the paper's chain.

    python sample.py "a large red circle above a small blue star"
    python sample.py "a red circle" "a striped heart on pink" --n 8 --size 64 --grid
"""

import argparse
import io
import itertools
import math
import re
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
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
from clip_embed import UserError, check_ranges, one_line_errors, pick_device, to_picture
from weights.checkpoints import check_out
from weights.stack import PRECISIONS, PRIORS, SHIPPED, SIZES, load_stack, warn_of_unknown_words

STAGE_NUMBER = {"prior": 0, "decoder": 1, "upsample-256": 2, "upsample-1024": 3}
BATCH = {64: 16, 256: 4, 1024: 1}  # pictures at once, to stay under 2 GB


def seeded(*numbers):
    """A torch.Generator of mixed numbers: on the CPU a Generator uses only 32 bits of its seed."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


def generators(stage, seed, pictures, candidate=0):
    """One torch.Generator for each picture number, seeded by seed + number, stage and candidate."""
    return [seeded(STAGE_NUMBER[stage], candidate, seed + k) for k in pictures]


def rows(text, pictures):
    """Some rows of a batch of captions, {name: (B, …)}."""
    return {k: v[pictures] for k, v in text.items()}


def in_batches(network, count, most, run):
    """run(slice) for `count` pictures, `most` at a time, in autocast if half; joined on the CPU."""
    p, parts = next(network.parameters()), []
    for first in range(0, count, most):
        with torch.autocast(p.device.type, p.dtype, enabled=p.dtype != torch.float32):
            parts.append(run(slice(first, first + most)).float().cpu())
    return torch.cat(parts)


@dataclass
class Chain:
    """The networks of a stack at work on n captions (fig. 2). None: as the checkpoint's config."""
    stack: dict                          # {stage: network}, as load_stack gives it
    captions: list                       # "" is unconditional
    seed: int = 0                        # picture k draws from seed + k
    bar: bool = False
    seconds: dict = field(default_factory=dict)  # the time that each stage took
    prior_kind: str = "diffusion"        # or "ar". z_i is z_t for "text", 0 for "none" (fig. 8)
    prior_guidance: float | None = None
    prior_steps: int | None = None
    decoder_guidance: float | None = None
    decoder_steps: int | None = None
    eta: float | None = None             # of DDIM; None: ancestral with the learned variance
    upsample_steps: tuple = (None, None)

    def __post_init__(self):
        clip, tokenizer = self.stack["clip"], self.stack["tokenizer"]
        self.device, self.configs = clip.logit_scale.device, {}
        self.text, self.null = clip_embed.encode_captions(clip, tokenizer, self.captions)
        self.z_i = self.text["z_t"].cpu() * (self.prior_kind == "text")  # (n, d): z_t or zeros

    def run(self, stage, pictures, most, sample, candidate=0, network=None):
        """sample(network, picture numbers, generators) in batches; the time goes to `seconds`."""
        began, network = time.perf_counter(), self.stack[network or stage]
        self.configs[stage] = network.config
        drawn = in_batches(network, len(pictures), most, lambda part: sample(
            network, pictures[part], generators(stage, self.seed, pictures[part], candidate)))
        self.seconds[stage] = self.seconds.get(stage, 0) + time.perf_counter() - began
        return drawn

    def draw(self, pictures, candidate=0):
        """Images (·, 3, 64, 64) of some captions, each from a z_i of its own (§2.1, §2.2)."""
        bar = self.bar and not candidate

        def diffusion(network, some, noise):
            return prior.sample(network, rows(self.text, some), self.null, noise,
                                self.prior_guidance, self.prior_steps, bar=bar)

        def autoregressive(network, some, noise):
            guidance = 1.0 if self.prior_guidance is None else self.prior_guidance
            text = rows(self.text, some)
            return prior.ar_sample(network, text, self.null, noise, guidance, bar=bar)

        def decode(network, some, noise):
            return decoder.sample(network, self.z_i[some].to(self.device), rows(self.text, some),
                                  self.null, noise, self.decoder_guidance,
                                  self.decoder_steps, self.eta, bar=bar)

        if network := PRIORS[self.prior_kind]:
            sample = diffusion if network == "prior" else autoregressive
            self.z_i[pictures] = self.run("prior", pictures, 256, sample, candidate, network)
        return self.run("decoder", pictures, BATCH[64], decode, candidate)

    def enlarge(self, images, size):
        """Images (n, 3, 64, 64) → (n, 3, size, size) by the upsamplers (§2.1)."""
        for large, steps in zip(SIZES[1:SIZES.index(size) + 1], self.upsample_steps):
            def upsampled(network, some, noise, small=images, steps=steps):
                return upsample.sample(network, small[some].to(self.device), noise, steps, self.bar)

            pictures = list(range(len(images)))
            images = self.run(f"upsample-{large}", pictures, BATCH[large], upsampled)
        return images


@torch.no_grad()
def surprise(model, z_i, text, steps=32):
    """How badly a diffusion prior restores each z_i (B, d) from noise, given its caption: (B,).

    ‖x_0 − x̂_0‖²/d in units of the prior's `errors`, the mean over `steps` timesteps: 1 on average
    for training pairs. Not in the paper (compare the diffusion classifier, Li et al. 2023).
    """
    alphas_cumprod, generator = prior.cosine_schedule(), torch.Generator().manual_seed(0)
    z_0, cache, total = model.standardize(z_i), [], 0
    for rung in prior.ladder(steps, len(alphas_cumprod) - 1):
        t = torch.full((len(z_0),), rung, device=z_0.device)
        eps = torch.randn(z_0.shape[1], generator=generator).to(z_0.device)
        x_0 = model(prior.q_sample(z_0, t, eps, alphas_cumprod), t, text, cache)
        total = total + (z_0 - x_0).square().mean(1) / model.errors[rung]
    return total / steps


def can_choose(stack):
    """Whether a stack has CLIP's image tower and a diffusion prior's errors, to choose by."""
    return bool(stack["clip"].visual and "prior" in stack and stack["prior"].errors.any())


def surprises(chain, pictures, images):
    """The surprise of z_i of each image (·, 3, 64, 64), given its picture's caption."""
    began, clip, judge = time.perf_counter(), chain.stack["clip"], chain.stack["prior"]
    z_i = in_batches(clip, len(pictures), BATCH[64], lambda part: clip_embed.encode_pictures(
        clip, images[part]))
    values = in_batches(judge, len(pictures), BATCH[64], lambda part: surprise(
        judge, z_i[part].to(chain.device), rows(chain.text, pictures[part])))
    chain.seconds["judge"] = chain.seconds.get("judge", 0) + time.perf_counter() - began
    return values


def choose(chain, images, candidates):
    """Replace images by candidates that surprise the prior less, until `enough` or the last.

    Each candidate has a z_i and noise of its own. Unconditional pictures stay.
    """
    left = [k for k, caption in enumerate(chain.captions) if caption]
    best = torch.full((len(images),), math.inf)
    if left:
        best[left] = surprises(chain, left, images[left])
    for candidate in tqdm(range(1, candidates), "candidates", disable=not (chain.bar and left)):
        left = [k for k in left if best[k] > chain.configs["decoder"].enough]
        if not left:
            break
        drawn = chain.draw(left, candidate)
        for k, image, value in zip(left, drawn, surprises(chain, left, drawn)):
            if value < best[k]:
                images[k], best[k] = image, value
    return images


@torch.no_grad()
def generate(stack, captions, seed=0, size=64, candidates=None, seconds=None, **options):
    """Images (n, 3, size, size) in [-1, 1] on the CPU, one for each of n captions (§2, fig. 2).

    candidates: pictures drawn at most for each; None is the decoder's config, or 1 without a judge.
    seconds: a dictionary for each stage's time. options: Chain's (§5.1, fig. 8). Raises UserError.
    """
    chain = Chain(stack, captions, seed, seconds={} if seconds is None else seconds, **options)
    if candidates and candidates > 1 and not can_choose(stack):
        raise UserError("candidates are compared by CLIP's image tower and the diffusion prior's "
                        "errors (prior.pt, trained to its end), and one of them is missing: draw "
                        "one (--candidates 1)")
    images = chain.draw(list(range(len(captions))))
    candidates = candidates or chain.configs["decoder"].candidates
    if candidates > 1 and can_choose(stack):
        images = choose(chain, images, candidates)
    return chain.enlarge(images, size)


def gather_captions(arguments, file):
    """The captions given as arguments and those in a file, one a line. Raises UserError."""
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").splitlines() if file else []
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--file {file}: cannot be read as UTF-8 text ({error})") from None
    captions = [*arguments, *(line.strip() for line in lines if line.strip())]
    if not captions:
        raise UserError(f"no caption{f' in --file {file}' if file else ''}: give one, as in  "
                        'python sample.py "a large red circle above a small blue star"')
    return captions


def grid(images, columns):
    """Tensors (3, H, W) in [-1, 1] side by side, `columns` a row, as one Pillow image."""
    side = images[0].shape[-1]
    sheet = Image.new("RGB", (columns * side, -(-len(images) // columns) * side), "white")
    for k, image in enumerate(images):
        sheet.paste(to_picture(image), (k % columns * side, k // columns * side))
    return sheet


def save_png(picture, folder, name, **chunks):
    """Write folder/NNNN-name.png under a free number, with text chunks. Raises UserError."""
    info, file = PngInfo(), io.BytesIO()
    for key, value in chunks.items():
        info.add_itxt(key, str(value).encode("utf-8", "replace").decode())
    picture.save(file, "PNG", pnginfo=info)
    name = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:60].strip("-") or "unconditional"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        taken = [int(p.name[:4]) for p in folder.glob("[0-9][0-9][0-9][0-9]-*.png")]
        for number in itertools.count(max(taken, default=-1) + 1):
            path = folder / f"{number:04d}-{name}.png"
            with suppress(FileExistsError), open(path, "xb") as out:  # x: never over a file
                out.write(file.getvalue())
                return path
    except OSError as error:
        raise UserError(f"{folder}: cannot write there ({error})") from None


def parse_arguments():
    """The command line's options. Raises UserError."""
    parser = argparse.ArgumentParser(
        description="Make pictures from captions: prior, decoder, upsamplers. The shipped weights "
        "know a world of one or two shapes: circle, square, triangle, star, heart, cross; red, "
        "orange, yellow, green, blue, purple, black; small or large; solid or striped; left of, "
        "right of, above, below; on a white, gray, pink or mint background.",
        epilog="An empty caption makes an unconditional picture. Guidance 1 is none, 0 ignores "
        "the condition. The defaults of guidance and steps are those of weights/shapes.")
    add = parser.add_argument
    add("captions", nargs="*", metavar="CAPTION", help="what to draw")
    add("--file", help="a text file of captions, one per line")
    add("--n", type=int, default=1, help="pictures per caption (default 1)")
    add("--seed", type=int, default=0, help="picture k is drawn with seed + k (default 0)")
    add("--size", type=int, choices=SIZES, help="pixels a side (default: the weights' largest)")
    add("--prior", dest="prior_kind", default="diffusion", choices=PRIORS, help="z_i's source: "
        "diffusion (default) or ar (autoregressive) prior; text: z_t; none: no z_i (fig. 8)")
    add("--prior-guidance", type=float, help="default 1, no guidance (§5.5: in the prior it hurt)")
    add("--prior-steps", type=int, help="of the diffusion prior (default 64, as in the paper)")
    add("--decoder-guidance", type=float, help="default 1, none (the paper, table 2: 1.25)")
    add("--decoder-steps", type=int, help="default 14, for a laptop (the paper: 250)")
    add("--candidates", type=int, help="draw at most so many for each picture, until the prior "
        "finds one that fits the caption; else keep the best (default 8; the paper: 1)")
    add("--eta", type=float, help="decode by DDIM with this eta (default: ancestral)")
    add("--upsample-steps", type=int, nargs=2, default=(None, None),
        help="default 2 2 (the paper: 27 15)")
    add("--grid", action="store_true", help="also save one sheet; with --n, a caption a row")
    add("--weights", type=Path, default=SHIPPED, help="folder of checkpoints (default: shipped)")
    add("--clip", metavar="PATH", help="their CLIP, if it is not that folder's clip.pt")
    add("--bpe", metavar="PATH", help="its merges file, if none lies beside it")
    add("--out", type=Path, default=Path("samples"), help="folder (default samples/)")
    add("--device", default="auto", help="auto, cuda, mps or cpu")
    add("--precision", default="auto", choices=PRECISIONS, help="auto: bfloat16 where it is faster")
    args = parser.parse_args()
    check_ranges(args, n=(1, 10_000), seed=(0, 1 << 48), prior_steps=(1, 1000),
                 decoder_steps=(1, 990), prior_guidance=(0, 100), decoder_guidance=(0, 100),
                 eta=(0, 1), candidates=(1, 1000), upsample_steps=(1, 900))
    return args


def main():
    with one_line_errors():
        args = parse_arguments()
        captions = gather_captions(args.captions, args.file)
        check_out(args.out)
        size = args.size or max(s for s in SIZES if s == 64
                                or (args.weights / f"upsample-{s}.pt").exists())
        stack = load_stack(args.weights, pick_device(args.device), size, args.prior_kind,
                           args.clip, args.bpe, lean=True, judge=args.candidates != 1,
                           precision=args.precision)
        warn_of_unknown_words(stack["tokenizer"], captions)
        captions = [caption for caption in captions for _ in range(args.n)]
        names = ("prior_kind", "prior_guidance", "prior_steps", "decoder_guidance",
                 "decoder_steps", "eta", "candidates", "upsample_steps")
        options = {name: getattr(args, name) for name in names}
        shown = options | {"precision": str(stack.dtype)[6:]}
        settings = ", ".join(f"{k.replace('_', '-')} {v}" for k, v in shown.items()
                             if v not in (None, (None, None)))
        seconds, sheet = {}, []
        for first in range(0, len(captions), BATCH[64]):  # each batch is saved before the next
            some = captions[first:first + BATCH[64]]
            images = generate(stack, some, args.seed + first, size, seconds=seconds, bar=True,
                              **options)
            for k, (caption, image) in enumerate(zip(some, images), args.seed + first):
                print(save_png(to_picture(image), args.out, caption, caption=caption, seed=k,
                               settings=settings), flush=True)
            sheet += images if args.grid else []
        if args.grid:
            columns = args.n if args.n > 1 else math.ceil(len(sheet) ** 0.5)
            print(save_png(grid(sheet, columns), args.out, "grid", captions="\n".join(captions),
                           seed=args.seed, settings=settings))
        print("seconds:", *(f"{stage} {s:.1f}" for stage, s in seconds.items()), file=sys.stderr)


if __name__ == "__main__":
    main()
