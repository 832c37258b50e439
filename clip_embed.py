"""CLIP: captions and pictures in one space (unCLIP §2; Radford et al. 2021, "the CLIP paper").

In:   captions (list of str), pictures (Pillow images, or tensors (B, 3, H, W) in [-1, 1])
Out:  tokens (B, 77), the text tower's states (B, 77, text_width), z_t and z_i (B, d), unit-norm

    caption ─► tokens ─► causal transformer ─► states ─► state at the end token, projected ─► z_t
    picture ─► class token and patches ─► transformer ─► class token's state, projected ─► z_i

unCLIP inverts the image tower: the prior predicts z_i from a caption, the decoder paints from z_i.
Both towers are frozen while prior and decoder train. CLIP's own objective (contrastive_loss): match
each caption to its picture and each picture to its caption, by cross-entropy over the rows and the
columns of the B × B matrix of cosines, divided by a learned temperature.

Unlike the papers: patches have sines as first positions; in `shapes` and `laptop` they also pass
convolutions, and projections start large; batches hold near misses, no caption twice; no SAM.

    python clip_embed.py picture.png "a red circle" "a blue star"
    python clip_embed.py --clip ViT-B-32.pt pictures/*.jpg "a photo of a dog" "a photo of a cat"
"""

import argparse
import contextlib
import html
import io
import math
import os
import re
import sys
import unicodedata
import warnings
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError

MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's pixel statistics, for pixels in [0, 1]
STD = (0.26862954, 0.26130258, 0.27577711)
START, END = "<|startoftext|>", "<|endoftext|>"
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # for training: no others


@lru_cache
def bytes_to_unicode():
    """A printable character for each of the 256 bytes (GPT-2's table, kept by CLIP)."""
    ranges = (("!", "~"), ("¡", "¬"), ("®", "ÿ"))
    printable = [b for first, last in ranges for b in range(ord(first), ord(last) + 1)]
    rest = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + n) for n, b in enumerate(rest)}


def split_words(text):
    """Cut clean text into CLIP's words: contractions, letters, single digits, runs of the rest.

    CLIP's pattern uses \\p{L} and \\p{N}, which Python's re lacks. So the pattern runs on a copy of
    the text: each character outside ASCII becomes "a" (a letter), "0" (a number), " " or "-".
    """
    known = {"L": "a", "N": "0"}
    kind = lambda c: " " if c.isspace() else known.get(unicodedata.category(c)[0], "-")
    pattern = r"<\|(?:start|end)oftext\|>|'(?:s|t|re|ve|m|ll|d)|[a-z]+|[0-9]|[^\sa-z0-9]+"
    ascii_text = "".join(c if c.isascii() else kind(c) for c in text)
    return [text[m.start():m.end()] for m in re.finditer(pattern, ascii_text, re.I)]


def clean(text):
    """Lower-case text, HTML entities decoded twice, spaces collapsed (OpenAI's also runs ftfy)."""
    return " ".join(html.unescape(html.unescape(text)).split()).lower()


def to_symbols(word):
    """A word's first symbols in BPE: one a byte, the last marked as the word's end."""
    symbols = [bytes_to_unicode()[b] for b in word.encode("utf-8", "replace")]
    return (*symbols[:-1], symbols[-1] + "</w>")


def merge_pair(symbols, pair):
    """Join each adjacent `pair` in a tuple of symbols into one symbol."""
    out, i = [], 0
    while i < len(symbols):
        step = 2 if symbols[i:i + 2] == pair else 1
        out.append("".join(symbols[i:i + step]))
        i += step
    return tuple(out)


def learn_bpe(captions, most=1000):
    """Up to `most` merges: join the commonest pair, again and again (§2; Sennrich 2016)."""
    words = Counter(to_symbols(w) for caption in captions for w in split_words(clean(caption)))
    merges = []
    while len(merges) < most:
        pairs = Counter()
        for symbols, count in words.items():
            for pair in zip(symbols, symbols[1:]):
                pairs[pair] += count
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))  # spelling breaks ties
        merges.append(best)
        words = Counter({merge_pair(symbols, best): count for symbols, count in words.items()})
    return merges


class Tokenizer:
    """CLIP's byte-level BPE: any text → (B, context_length) token numbers (§2; CLIP paper §2.4).

    The vocabulary: 256 bytes, 256 bytes at a word's end, one entry per merge, start and end. `pad`
    fills a row after its end token: 0 in OpenAI's code, often the end token in Hugging Face's.
    """

    def __init__(self, merges, context_length=77, pad=0):
        self.merges = [tuple(m) for m in merges]
        self.rank = {pair: n for n, pair in enumerate(self.merges)}
        alphabet = list(bytes_to_unicode().values())
        vocab = alphabet + [c + "</w>" for c in alphabet]
        vocab += ["".join(m) for m in self.merges] + [START, END]
        self.ids = {token: n for n, token in enumerate(vocab)}
        self.start, self.end, self.pad = self.ids[START], self.ids[END], pad
        self.tokens, self.context_length, self.warned = vocab, context_length, False
        self.known = {START: [self.start], END: [self.end]}  # text may spell them (OpenAI)

    def __len__(self):
        return len(self.tokens)

    def encode_word(self, word):
        """Token numbers of one word, remembered for the next time."""
        if word not in self.known:
            symbols = to_symbols(word)
            while len(symbols) > 1:  # the earliest-learned merge first
                pairs = zip(symbols, symbols[1:])
                pair = min(pairs, key=lambda pair: self.rank.get(pair, math.inf))
                if pair not in self.rank:
                    break
                symbols = merge_pair(symbols, pair)
            self.known[word] = [self.ids[s] for s in symbols]
        return self.known[word]

    def encode(self, text):
        """Token numbers of a text, without start and end."""
        return [token for word in split_words(clean(text)) for token in self.encode_word(word)]

    def decode(self, ids):
        """The text of token numbers without padding; start and end are left out."""
        byte = {c: b for b, c in bytes_to_unicode().items()}
        raw = b""
        for i in ids:
            word = self.tokens[i].removesuffix("</w>") if i < self.start else ""
            raw += bytes(byte[c] for c in word) + b" " * self.tokens[i].endswith("</w>")
        return raw.decode("utf-8", "replace").strip()

    def __call__(self, texts):
        """Captions → (B, context_length) int64, longer ones cut."""
        ids = [self.encode(text) for text in texts]
        self.warn_of_cuts([len(row) + 2 for row in ids])
        out = torch.full((len(texts), self.context_length), self.pad)
        for row, tokens in zip(out, ids):
            tokens = [self.start, *tokens[:self.context_length - 2], self.end]
            row[:len(tokens)] = torch.tensor(tokens)
        return out

    def warn_of_cuts(self, lengths):
        """Warn, the first time only, how many captions of these lengths will be cut."""
        cut = sum(length > self.context_length for length in lengths)
        if cut and not self.warned:
            print(f"{cut} of {len(lengths)} captions have more than {self.context_length - 2} "
                  "tokens and are cut (said once)", file=sys.stderr)
            self.warned = True

    def mask(self, ids):
        """(B, L) bool: True up to and with each caption's first end token, False on padding."""
        end = (ids == self.end).int().argmax(1, keepdim=True)  # the first: padding may be END too
        return torch.arange(ids.shape[1], device=ids.device) <= end


@dataclass
class CLIPConfig:
    """Sizes of both towers (appendix C)."""
    embed_dim: int = 128          # d of z_i and z_t
    image_size: int = 64          # pixels a side that the image tower reads
    vision_patch_size: int = 8
    vision_width: int = 128
    vision_layers: int = 4
    vision_heads: int = 2
    context_length: int = 77
    vocab_size: int = 0           # 512 + merges + 2 (0: train.py sets it); published: 49408
    text_width: int = 128
    text_layers: int = 4
    text_heads: int = 2
    hidden_act: str = "gelu"      # as in LAION's models; OpenAI's: "quick_gelu", x·σ(1.702x)
    unit_norm: bool = True        # of z_i and z_t; False: not normalized (Karlo)
    stem: bool = False            # convolutions beside the patch embedding (not in the paper)


PRESETS = {
    "shapes": CLIPConfig(stem=True),
    "laptop": CLIPConfig(embed_dim=512, image_size=128, vision_patch_size=16, vision_width=384,
                         vision_layers=8, vision_heads=6, vocab_size=49408, text_width=512,
                         text_layers=6, text_heads=8, stem=True),
    "paper": CLIPConfig(embed_dim=1024, image_size=256, vision_patch_size=16, vision_width=1280,
                        vision_layers=32, vision_heads=16, vocab_size=49408, text_width=1024,
                        text_layers=24, text_heads=16),  # ViT-H/16
}


class MultiheadAttention(nn.Module):
    """Self-attention with the parameter names of torch.nn.MultiheadAttention."""

    def __init__(self, width, heads):
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"a width of {width} cannot be shared by {heads} heads")
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.randn(3 * width, width) * width ** -0.5)
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x, causal):
        B, L, C = x.shape  # C = width
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.view(B, L, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # each (B, nh, L, hs)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.out_proj(y.transpose(1, 2).reshape(B, L, C))


class ResidualAttentionBlock(nn.Module):
    """Pre-norm transformer block: x + attention, then x + MLP. `causal` hides later positions."""

    def __init__(self, width, heads, hidden_act, causal):
        super().__init__()
        self.causal = causal
        self.attn = MultiheadAttention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width),
                                  "c_proj": nn.Linear(4 * width, width)})
        self.ln_2 = nn.LayerNorm(width)
        self.act = {"gelu": F.gelu, "quick_gelu": lambda x: x * (1.702 * x).sigmoid()}[hidden_act]

    def forward(self, x):
        x = x + self.attn(self.ln_1(x), self.causal)
        return x + self.mlp["c_proj"](self.act(self.mlp["c_fc"](self.ln_2(x))))


def transformer(width, layers, **options):
    """A stack of blocks with CLIP's names and initial scales: (B, L, width) → (B, L, width)."""
    blocks = nn.Sequential(*(ResidualAttentionBlock(width, **options) for _ in range(layers)))
    for block in blocks:
        nn.init.normal_(block.attn.out_proj.weight, std=(width * 2 * layers) ** -0.5)
        nn.init.normal_(block.mlp["c_fc"].weight, std=(2 * width) ** -0.5)
        nn.init.normal_(block.mlp["c_proj"].weight, std=(width * 2 * layers) ** -0.5)
    return nn.ModuleDict({"resblocks": blocks})


def positions(side, width):
    """(side², width) sines and cosines of each patch's row and column: the initial positions.

    Not in the paper: from CLIP's small noise, small towers hardly learn left and right.
    """
    angle = torch.arange(side)[:, None] * 100.0 ** -torch.linspace(0, 1, width // 4)
    wave = 2 * torch.cat([angle.sin(), angle.cos()], 1)  # doubled, to match the patches in size
    return torch.cat([wave.repeat_interleave(side, 0), wave.repeat(side, 1)], 1)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, H, W), each place by itself, so that colours stay."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def conv_stem(width, patch_size):
    """(B, 3, H, W) → (B, width, H/patch_size, W/patch_size): two 3×3 convolutions per halving.

    Not in the paper, after Xiao et al. 2021: `shapes` needs a sixth of the training steps with it.
    """
    layers, channels = [], 3
    while patch_size > 1:
        for stride in (2, 1):
            layers += [nn.Conv2d(channels, 2 * width // patch_size, 3, stride, 1, bias=False)]
            channels = 2 * width // patch_size
            layers += [ChannelNorm(channels), nn.GELU()]
        patch_size //= 2
    return nn.Sequential(*layers, nn.Conv2d(width, width, 1, bias=False))


class VisionTransformer(nn.Module):
    """The image tower: class token and patches through a transformer, then a projection."""

    def __init__(self, config):
        super().__init__()
        width, size = config.vision_width, config.vision_patch_size
        self.conv1 = nn.Conv2d(3, width, size, size, bias=False)
        self.stem = conv_stem(width, size) if config.stem else None
        self.class_embedding = nn.Parameter(torch.randn(width) * width ** -0.5)
        places = torch.cat([torch.zeros(1, width), positions(config.image_size // size, width)])
        self.positional_embedding = nn.Parameter(places)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = transformer(width, config.vision_layers, heads=config.vision_heads,
                                       hidden_act=config.hidden_act, causal=False)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.randn(width, config.embed_dim) * width ** -0.5)

    def forward(self, pixels):
        """pixels (B, 3, image_size, image_size), CLIP-normalized → (B, d), not normalized."""
        x = self.conv1(pixels) + (self.stem(pixels) if self.stem else 0)
        x = x.flatten(2).transpose(1, 2)  # (B, patches, width)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1).to(x.dtype), x], 1)
        x = x + self.positional_embedding  # (B, 1 + patches, width)
        x = self.transformer["resblocks"](self.ln_pre(x))
        return self.ln_post(x[:, 0]) @ self.proj


class CLIP(nn.Module):
    """Both towers and the temperature (§2; the CLIP paper, fig. 3)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        width = config.text_width
        self.visual = VisionTransformer(config) if config.vision_layers else None  # None: Karlo
        self.transformer = transformer(width, config.text_layers, heads=config.text_heads,
                                       hidden_act=config.hidden_act, causal=True)
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.randn(config.context_length, width) * 0.01)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, config.embed_dim) * width ** -0.5)
        self.logit_scale = nn.Parameter(torch.tensor(float(np.log(1 / 0.07))))
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        for p in (self.visual.proj, self.text_projection) if config.stem else ():
            p.data *= 10  # not in the paper: without it z_i used only 16 of its 128 directions

    def encode_image(self, pixels):
        """z_i (B, d) of CLIP-normalized pixels (B, 3, image_size, image_size). Raises UserError."""
        if not self.visual:
            raise UserError("this CLIP reads no pictures: it has no image tower")
        return self.normalize(self.visual(pixels))

    def encode_text(self, ids):
        """(states (B, L, text_width) after the last LayerNorm, z_t (B, d)) of ids (B, L).

        z_t is the projected state at the first end token, which has the largest id.
        """
        x = self.token_embedding(ids) + self.positional_embedding[:ids.shape[1]]
        states = self.ln_final(self.transformer["resblocks"](x))
        at_end = states[torch.arange(len(ids), device=ids.device), ids.argmax(1)]
        return states, self.normalize(at_end @ self.text_projection)

    def normalize(self, z):
        """An embedding for the later stages: float32 and, unless it is Karlo's, unit-norm."""
        return F.normalize(z.float(), dim=-1) if self.config.unit_norm else z.float()


def contrastive_loss(z_i, z_t, logit_scale, group=None, highest=100.0):
    """Symmetric cross-entropy over rows and columns of the scaled cosines (§2; CLIP paper, fig. 3).

    z_i, z_t (B, d) unit-norm, row k of z_i belonging to row k of z_t. logit_scale: log of the
    inverse temperature, at most log `highest` (100 in the CLIP paper). group (not in the paper):
    compare each row only within its group of `group` successive rows.
    """
    scale = logit_scale.clamp(max=math.log(highest)).exp()
    with torch.autocast(z_i.device.type, enabled=False):  # bfloat16 rounds logits near 100 to 0.5
        logits = scale * z_i.float() @ z_t.float().T  # (B, B)
    target = torch.arange(len(z_i), device=z_i.device)
    if group:
        logits = logits.masked_fill(target[:, None] // group != target // group, -torch.inf)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def encode_captions(clip, tokenizer, captions):
    """(text, null): CLIP's reading of B captions and of the empty one, the null condition.

    Both are {"tokens" (B, L), "states" (B, L, text_width), "z_t" (B, d), "mask" (B, L)}, mask
    True on real tokens, L the longest caption's length. null has one row.
    """
    tokens = tokenizer([*captions, ""])
    mask, device = tokenizer.mask(tokens), clip.logit_scale.device
    tokens, mask = (part[:, :mask.sum(1).max()].to(device) for part in (tokens, mask))
    states, z_t = clip.encode_text(tokens)
    text = {"tokens": tokens, "states": states.float(), "z_t": z_t, "mask": mask}
    return {k: v[:-1] for k, v in text.items()}, {k: v[-1:] for k, v in text.items()}


def open_picture(path, data=None, side=None):
    """A picture file as an RGB Pillow image, upright by its EXIF tag, transparency on white.

    data: the picture's bytes, in one of FORMATS; `path` then only names it in errors. side: a JPEG
    is decoded smaller, for speed, but with at least 2 · side pixels a side. Raises UserError.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            source = (path,) if data is None else (io.BytesIO(data), "r", FORMATS)
            with Image.open(*source) as file:
                if data and file.format != "JPEG" and file.width * file.height > 1 << 24:
                    raise ValueError("only a JPEG may have more than 4096 × 4096 pixels")
                if side:
                    file.draft(None, (2 * side, 2 * side))
                picture = ImageOps.exif_transpose(file)
                if picture.mode.startswith("I"):  # 16 bits and more: Pillow would clip them
                    pixels = np.asarray(picture, np.float64) / 256
                    picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
                if picture.has_transparency_data:
                    white = Image.new("RGBA", picture.size, "white")
                    picture = Image.alpha_composite(white, picture.convert("RGBA"))
                return picture.convert("RGB")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:  # a foreign file can make Pillow raise anything
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "its format is unknown" if unknown else str(error) or type(error).__name__
        raise UserError(f"{path}: not a picture that can be read ({reason})") from None


def to_tensor(picture):
    """A Pillow RGB image → uint8 tensor (3, H, W)."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def to_floats(pixels):
    """uint8 tensors of 0 … 255 → floats in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def to_picture(image):
    """A tensor (3, H, W) in [-1, 1] → a Pillow image."""
    pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def to_square(picture, size):
    """The middle square of a Pillow picture, resized: (1, 3, size, size) in [-1, 1]."""
    picture = ImageOps.fit(picture.convert("RGB"), (size, size), Image.Resampling.BICUBIC)
    return to_floats(to_tensor(picture)[None])


def preprocess(images, size):
    """Square tensors (B, 3, H, H) in [-1, 1] → CLIP's input: bicubic to `size`, normalized."""
    if images.shape[-1] != size:
        images = F.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(-1, 1)
    mean, std = torch.tensor([MEAN, STD], device=images.device)[..., None, None]
    return ((images + 1) / 2 - mean) / std


def encode_pictures(clip, images):
    """z_i (B, d) of square images (B, 3, H, H) in [-1, 1], on CLIP's device. Raises UserError."""
    return clip.encode_image(preprocess(images.to(clip.logit_scale.device), clip.config.image_size))


def psnr(a, b):
    """Peak signal-to-noise ratio in dB of images in [-1, 1], at most 120."""
    return -10 * math.log10(max(1e-12, float(((a - b) / 2).square().mean())))


class UserError(Exception):
    """An error that the user can mend: scripts print one line and exit with status 2."""


@contextlib.contextmanager
def one_line_errors():
    """Turn UserError and OSError into one line on stderr and exit status 2, Ctrl-C into 130."""
    try:
        yield
    except (UserError, OSError) as error:
        message = "".join(str(error).strip().splitlines()[-1:])  # a data worker's: a traceback
        message = message.removeprefix("clip_embed.UserError: ")
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        print(str(stop) or "stopped", file=sys.stderr)
        sys.exit(130)


def pick_device(name):
    """The torch device called `name`; "auto" takes cuda, else mps, else cpu. Raises UserError."""
    if name == "auto":
        mps = "mps" if torch.backends.mps.is_available() else "cpu"
        name = "cuda" if torch.cuda.is_available() else mps
    try:
        torch.zeros(1, device=name).cpu()  # fails where the device is not there
    except (RuntimeError, AssertionError) as error:
        error = str(error).splitlines()[0]
        raise UserError(f"--device {name}: not available here ({error})") from None
    return torch.device(name)


def check_ranges(args, **ranges):
    """Raise UserError unless each named option of args, if set, lies in its range (low, high)."""
    for name, (low, high) in ranges.items():
        for value in np.atleast_1d(getattr(args, name, None)):
            if value is not None and not low <= value <= high:
                name = name.replace("_", "-")
                raise UserError(f"--{name} {value}: must be between {low} and {high}")


def load_clip(path, bpe=None):
    """(CLIP in eval mode, Tokenizer) of any CLIP with a ViT. Raises UserError.

    path: a Hugging Face folder, or the weights in one (model.safetensors, pytorch_model.bin);
    OpenAI's .pt; a checkpoint of train.py. bpe: a merges file, if none lies beside the weights.
    """
    from weights.published import read_clip
    return read_clip(Path(path), bpe)


def main():
    parser = argparse.ArgumentParser(
        description="How well does each caption fit each picture? Prints the cosine of z_i and "
        "z_t, and the softmax over the captions at CLIP's own temperature.")
    shipped, add = Path(__file__).parent / "weights/shapes/clip.pt", parser.add_argument
    add("inputs", nargs="+", metavar="PICTURE|CAPTION", help="picture files first, then captions")
    add("--clip", default=shipped, metavar="PATH", help="OpenAI's .pt, a Hugging Face folder, or a "
        "checkpoint of train.py (default: the shipped one)")
    add("--bpe", metavar="PATH", help="CLIP's merges file, if none lies beside the weights")
    add("--device", default="auto", help="auto, cuda, mps or cpu")
    args = parser.parse_args()
    import clip_embed as ce  # weights/ raises its UserError, another class than this script's
    with ce.one_line_errors(), torch.no_grad():
        device = ce.pick_device(args.device)
        known = Image.registered_extensions()
        paths = [p for p in args.inputs if Path(p).suffix.lower() in known or os.path.isfile(p)]
        captions = [c for c in args.inputs if c not in paths]
        if not paths or not captions:
            raise ce.UserError("give at least one picture and one caption, as in: "
                               'picture.png "a red circle" "a blue star"')
        clip, tokenizer = ce.load_clip(args.clip, args.bpe)
        clip.to(device)
        z_t = encode_captions(clip, tokenizer, captions)[0]["z_t"]
        for path in paths:
            z_i = encode_pictures(clip, to_square(ce.open_picture(path), clip.config.image_size))
            cosine = F.cosine_similarity(z_i, z_t)
            share = (clip.logit_scale.exp() * cosine).softmax(0)
            print(path, "  cosine  softmax", sep="\n")
            for k in cosine.argsort(descending=True).tolist():
                print(f"{cosine[k]:8.3f}  {share[k]:7.1%}  {captions[k]}")


if __name__ == "__main__":
    main()
