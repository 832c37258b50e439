"""CLIP: captions and pictures in one space (unCLIP §2; Radford et al. 2021, "the CLIP paper").

In:   captions (list of str), pictures (Pillow images, or tensors (B, 3, H, W) in [-1, 1])
Out:  tokens (B, 77), the text tower's states (B, 77, text_width), z_t (B, d) and z_i (B, d), unit-norm

    caption ─► tokens ─► causal transformer ─► states ─► the one at the end token, projected ─► z_t
    picture ─► patches after a class token ─► transformer ─► the class token's, projected ─► z_i

unCLIP inverts the image tower: z_i is what the prior predicts from a caption and what the decoder paints from.
Both towers stay frozen while those train. The objective (contrastive_loss): among the B pictures of a batch each
caption has to find its own, and among the captions each picture, by a cross-entropy over the rows and the columns
of the B × B cosines, divided by a learned temperature. There is nothing to sample: embeddings are computed.

Where the papers are silent, ours: the cosines are scaled in float32; the image tower's positions start from sines and
cosines, and in the toy convolutions help its patches see; batches hold near misses and no caption twice (train.py);
AdamW trains it, without the paper's SAM.

Read the file from top to bottom: byte-level BPE, the two towers under the names that OpenAI's code gave them (so that
published weights fit), the contrastive loss, the pictures' way in; then what every script needs, devices and errors
in one line, checkpoints, and the CLIPs that others published.

    python clip_embed.py picture.png "a red circle" "a blue star"
    python clip_embed.py --clip ViT-B-32.pt pictures/*.jpg "a photo of a dog" "a photo of a cat"
"""

import argparse
import contextlib
import gzip
import hashlib
import html
import io
import json
import math
import pickle
import re
import sys
import unicodedata
import warnings
import zipfile
from collections import Counter, OrderedDict
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
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # that training reads: Pillow knows some that start other programs


# ----------------------------------------------------------------------------- captions into tokens

@lru_cache
def bytes_to_unicode():
    """The printable character that stands for each of the 256 bytes (GPT-2's table, kept by CLIP)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + n) for n, b in enumerate(rest)}


def split_words(text):
    """Cut cleaned text into CLIP's words: contractions, runs of letters, single digits, runs of the rest.

    CLIP's pattern asks for \\p{L} and \\p{N}, unknown to the standard library: it is put to a copy of the text where "a" stands
    for each letter outside ASCII, "0" for each number, "-" for the rest.
    """
    kind = lambda c: " " if c.isspace() else {"L": "a", "N": "0"}.get(unicodedata.category(c)[0], "-")
    pattern = r"<\|(?:start|end)oftext\|>|'(?:s|t|re|ve|m|ll|d)|[a-z]+|[0-9]|[^\sa-z0-9]+"
    return [text[m.start():m.end()] for m in re.finditer(pattern, "".join(c if c.isascii() else kind(c) for c in text), re.I)]


def clean(text):
    """Lower-case, with HTML entities undone twice and white space collapsed, as CLIP does."""
    return " ".join(html.unescape(html.unescape(text)).split()).lower()


def to_symbols(word):
    """A word as BPE starts with it: one symbol a byte, the last one marked as the word's end."""
    symbols = [bytes_to_unicode()[b] for b in word.encode("utf-8", "replace")]
    return (*symbols[:-1], symbols[-1] + "</w>")


def merge_pair(symbols, pair):
    """Replace each occurrence of the adjacent `pair` in a tuple of symbols by their concatenation."""
    out, i = [], 0
    while i < len(symbols):
        step = 2 if symbols[i:i + 2] == pair else 1
        out.append("".join(symbols[i:i + step]))
        i += step
    return tuple(out)


def learn_bpe(captions, most=1000):
    """Learn up to `most` merges from captions: join the commonest pair, again and again (§2; Sennrich et al. 2016)."""
    words = Counter(to_symbols(w) for caption in captions for w in split_words(clean(caption)))
    merges = []
    while len(merges) < most:
        pairs = Counter()
        for symbols, count in words.items():
            for pair in zip(symbols, symbols[1:]):
                pairs[pair] += count
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))  # ties broken by spelling: reproducible
        merges.append(best)
        words = Counter({merge_pair(symbols, best): count for symbols, count in words.items()})
    return merges


class Tokenizer:
    """CLIP's byte-level BPE: any text in, (B, context_length) token numbers out (§2; the CLIP paper §2.4).

    The vocabulary is the 256 bytes, the 256 bytes that end a word, one entry a merge, start and end:
    what CLIP's `bpe_simple_vocab` and `vocab.json` hold, in their order. No text is outside it. `pad` is the token
    that fills a row after its end: 0 in OpenAI's code, often the end token in Hugging Face's folders.
    """

    def __init__(self, merges, context_length=77, pad=0):
        self.merges = [tuple(m) for m in merges]
        self.rank = {pair: n for n, pair in enumerate(self.merges)}
        alphabet = list(bytes_to_unicode().values())
        vocab = alphabet + [c + "</w>" for c in alphabet] + ["".join(m) for m in self.merges] + [START, END]
        self.ids = {token: n for n, token in enumerate(vocab)}
        self.start, self.end, self.pad = self.ids[START], self.ids[END], pad
        self.tokens, self.known = vocab, {START: [self.start], END: [self.end]}  # as in OpenAI's code, text may spell these two
        self.context_length, self.cuts = context_length, 0

    def __len__(self):
        return len(self.tokens)

    def encode_word(self, word):
        """Token numbers of one word; words already met are remembered."""
        if word not in self.known:
            symbols = to_symbols(word)
            while len(symbols) > 1:  # the earliest-learned merge first
                pair = min(zip(symbols, symbols[1:]), key=lambda p: self.rank.get(p, len(self.rank)))
                if pair not in self.rank:
                    break
                symbols = merge_pair(symbols, pair)
            self.known[word] = [self.ids[s] for s in symbols]
        return self.known[word]

    def encode(self, text):
        """Token numbers of a text, without start and end."""
        return [token for word in split_words(clean(text)) for token in self.encode_word(word)]

    def decode(self, ids):
        """The text of token numbers; start, end and padding are left out."""
        byte = {c: b for b, c in bytes_to_unicode().items()}
        raw = b""
        for token in (self.tokens[i] for i in ids if i < self.start):
            raw += bytes(byte[c] for c in token.removesuffix("</w>")) + b" " * token.endswith("</w>")
        return raw.decode("utf-8", "replace").strip()

    def __call__(self, texts):
        """Captions → (B, context_length) int64: start, tokens, end, padding. Long ones are cut, the first ten with a warning."""
        out = torch.full((len(texts), self.context_length), self.pad)
        for row, text in zip(out, texts):
            ids = self.encode(text)
            if len(ids) > self.context_length - 2:
                self.cuts += 1
                if self.cuts <= 10:
                    print(f"caption cut from {len(ids)} to {self.context_length - 2} tokens: {text[:60]!r}…", file=sys.stderr)
                ids = ids[:self.context_length - 2]
            row[:len(ids) + 2] = torch.tensor([self.start, *ids, self.end])
        return out

    def mask(self, ids):
        """(B, L) bool: True up to and with each caption's first end token, False on padding."""
        end = (ids == self.end).int().argmax(1, keepdim=True)  # first one, also where the padding is the end token
        return torch.arange(ids.shape[1], device=ids.device) <= end


# ----------------------------------------------------------------------------- the two towers

@dataclass
class CLIPConfig:
    """Sizes of both towers (appendix C). Every head is 64 wide unless `heads` says otherwise, as in CLIP."""
    embed_dim: int = 128          # d of z_i and z_t
    image_size: int = 64          # pixels a side that the image tower reads
    vision_patch_size: int = 8
    vision_width: int = 128
    vision_layers: int = 4
    vision_heads: int = 2
    context_length: int = 77
    vocab_size: int = 0           # 512 + merges + 2; 49408 in the published models
    text_width: int = 128
    text_layers: int = 4
    text_heads: int = 2
    hidden_act: str = "gelu"      # LAION's models and ours; OpenAI's use "quick_gelu", x·σ(1.702x)
    unit_norm: bool = True        # of z_i and z_t; False: as they leave the towers, for networks trained so (Karlo)
    stem: bool = False            # whether convolutions help the image tower's patches see (ours; none in published models)


PRESETS = {
    "shapes": CLIPConfig(stem=True),
    "laptop": CLIPConfig(embed_dim=512, image_size=128, vision_patch_size=16, vision_width=384, vision_layers=8, vision_heads=6,
                         vocab_size=49408, text_width=512, text_layers=6, text_heads=8, stem=True),
    "paper": CLIPConfig(embed_dim=1024, image_size=256, vision_patch_size=16, vision_width=1280, vision_layers=32,
                        vision_heads=16, vocab_size=49408, text_width=1024, text_layers=24, text_heads=16),  # ViT-H/16
}


class MultiheadAttention(nn.Module):
    """Self-attention under torch.nn.MultiheadAttention's parameter names, by scaled_dot_product_attention."""

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
        q, k, v = qkv.view(B, L, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)  # each (B, nh, L, hs)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.out_proj(y.transpose(1, 2).reshape(B, L, C))


class ResidualAttentionBlock(nn.Module):
    """Pre-norm transformer block: x + attention, then x + MLP; `causal` hides every later position."""

    def __init__(self, width, heads, hidden_act, causal):
        super().__init__()
        self.causal = causal
        self.attn = MultiheadAttention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})
        self.ln_2 = nn.LayerNorm(width)
        self.act = {"quick_gelu": lambda x: x * torch.sigmoid(1.702 * x), "gelu": F.gelu}[hidden_act]

    def forward(self, x):
        x = x + self.attn(self.ln_1(x), self.causal)
        return x + self.mlp["c_proj"](self.act(self.mlp["c_fc"](self.ln_2(x))))


def transformer(width, layers, heads, hidden_act, causal):
    """A stack of blocks under CLIP's name for it, with CLIP's own initial scales: (B, L, width) → (B, L, width)."""
    blocks = nn.Sequential(*(ResidualAttentionBlock(width, heads, hidden_act, causal) for _ in range(layers)))
    for block in blocks:
        nn.init.normal_(block.attn.out_proj.weight, std=(width * 2 * layers) ** -0.5)
        nn.init.normal_(block.mlp["c_fc"].weight, std=(2 * width) ** -0.5)
        nn.init.normal_(block.mlp["c_proj"].weight, std=(width * 2 * layers) ** -0.5)
    return nn.ModuleDict({"resblocks": blocks})


def positions(side, width):
    """(side², width) sines and cosines of each patch's row and column: what the image tower's positions start from.

    Ours. CLIP starts from noise a tenth as large as a patch's content; the small towers here then hardly learn what stands
    left and what right. Twice as high as sines are, they are as loud as the content.
    """
    angle = torch.arange(side)[:, None] * 100.0 ** -torch.linspace(0, 1, width // 4)
    wave = 2 * torch.cat([angle.sin(), angle.cos()], 1)
    return torch.cat([wave.repeat_interleave(side, 0), wave.repeat(side, 1)], 1)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, H, W), at each place by itself: over a whole picture it would lose the colours."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def conv_stem(width, patch_size):
    """Pictures (B, 3, H, W) → (B, width, H/patch_size, W/patch_size) by two 3×3 convolutions a halving (§2; Xiao et al. 2021).

    Ours. With it a linear probe finds the shape of a single thing in z_i 76% of the time after 1,500 training steps of the toy;
    without it, after 10,000.
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
    """The image tower: patches and a class token through a transformer; the class token is projected."""

    def __init__(self, config):
        super().__init__()
        width, patches = config.vision_width, (config.image_size // config.vision_patch_size) ** 2
        self.conv1 = nn.Conv2d(3, width, config.vision_patch_size, config.vision_patch_size, bias=False)
        self.stem = conv_stem(width, config.vision_patch_size) if config.stem else None
        self.class_embedding = nn.Parameter(torch.randn(width) * width ** -0.5)
        self.positional_embedding = nn.Parameter(torch.cat([torch.zeros(1, width), positions(round(patches ** 0.5), width)]))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = transformer(width, config.vision_layers, config.vision_heads, config.hidden_act, causal=False)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.randn(width, config.embed_dim) * width ** -0.5)

    def forward(self, pixels):
        """pixels (B, 3, image_size, image_size), CLIP-normalized → (B, d), of any length."""
        x = self.conv1(pixels) + (self.stem(pixels) if self.stem else 0)
        x = x.flatten(2).transpose(1, 2)  # (B, patches, width)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1).to(x.dtype), x], 1)
        x = x + self.positional_embedding  # (B, 1 + patches, width)
        return self.ln_post(self.transformer["resblocks"](self.ln_pre(x))[:, 0]) @ self.proj


class CLIP(nn.Module):
    """Both towers and the temperature (§2; the CLIP paper, fig. 3)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        width = config.text_width
        self.visual = VisionTransformer(config) if config.vision_layers else None  # Karlo: captions alone
        self.transformer = transformer(width, config.text_layers, config.text_heads, config.hidden_act, causal=True)
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.randn(config.context_length, width) * 0.01)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, config.embed_dim) * width ** -0.5)
        self.logit_scale = nn.Parameter(torch.tensor(float(np.log(1 / 0.07))))
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def encode_image(self, pixels):
        """z_i (B, d), unit-norm, of CLIP-normalized pixels (B, 3, image_size, image_size)."""
        if not self.visual:
            raise UserError("this CLIP reads no pictures: it has no image tower")
        return self.outward(self.visual(pixels))

    def encode_text(self, ids):
        """(states (B, L, text_width) after the last LayerNorm, z_t (B, d) unit-norm) of ids (B, L), L ≤ context.

        z_t is read at the end token: the first of the largest id, since `end` is the vocabulary's last. The
        tower is causal, so the columns after every caption's end may be cut off without changing anything.
        """
        x = self.token_embedding(ids) + self.positional_embedding[:ids.shape[1]]  # (B, L, text_width)
        states = self.ln_final(self.transformer["resblocks"](x))
        end = ids.argmax(1)
        z_t = states[torch.arange(len(ids), device=ids.device), end] @ self.text_projection
        return states, self.outward(z_t)

    def outward(self, z):
        """An embedding as the later stages want it: float32 and, unless the config says otherwise, unit-norm."""
        return F.normalize(z.float(), dim=-1) if self.config.unit_norm else z.float()


def contrastive_loss(z_i, z_t, logit_scale, group=None, highest=100.0):
    """Symmetric cross-entropy over rows and columns of the scaled cosines (§2; the CLIP paper, fig. 3).

    z_i, z_t (B, d) unit-norm, row k of one belonging to row k of the other; logit_scale is the log of the inverse temperature,
    held at or under log `highest` (100 as in the CLIP paper). With `group` (ours) rows are compared only with those of their own
    group, of so many after each other.
    """
    with torch.autocast(z_i.device.type, enabled=False):  # bfloat16 would round logits near 100 to halves: near misses drown
        logits = logit_scale.clamp(max=math.log(highest)).exp() * z_i.float() @ z_t.float().T  # (B, B)
    target = torch.arange(len(z_i), device=z_i.device)
    if group:
        logits = logits.masked_fill(target[:, None] // group != target // group, -torch.inf)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def encode_captions(clip, tokenizer, captions):
    """What prior and decoder read of B captions, and of the empty one: (text, null), both {"tokens", "states", "z_t", "mask"}.

    tokens (B, L), states (B, L, text_width), z_t (B, d), mask (B, L) True on real tokens, L the longest caption's length;
    null has one row. The empty caption is the null condition of every stage.
    """
    tokens = tokenizer([*captions, ""]).to(clip.logit_scale.device)
    mask = tokenizer.mask(tokens)
    longest = int(mask.sum(1).max())
    tokens, mask = tokens[:, :longest], mask[:, :longest]
    states, z_t = clip.encode_text(tokens)
    text = {"tokens": tokens, "states": states.float(), "z_t": z_t, "mask": mask}
    return {k: v[:-1] for k, v in text.items()}, {k: v[-1:] for k, v in text.items()}


# ----------------------------------------------------------------------------- pictures

def open_picture(path, data=None, side=None):
    """A picture file as an RGB Pillow image: turned upright by its EXIF tag, transparency on white. Raises UserError.

    data: its bytes, for a picture that is part of a file (path then only names it): FORMATS alone. side: a JPEG is decoded as
    small as leaves twice that many pixels a side, many times faster.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) if data is None else Image.open(io.BytesIO(data), formats=FORMATS) as file:
                if side:
                    file.draft(None, (2 * side, 2 * side))
                picture = ImageOps.exif_transpose(file)
                if picture.mode.startswith("I"):  # 16 bit and more: Pillow would clip, not scale
                    picture = Image.fromarray((np.asarray(picture, np.float64) / 256).clip(0, 255).astype(np.uint8))
                if picture.has_transparency_data:
                    picture = picture.convert("RGBA")
                    picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
                return picture.convert("RGB")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:  # a foreign file can make Pillow raise anything
        reason = "its format is unknown" if isinstance(error, UnidentifiedImageError) else str(error) or type(error).__name__
        raise UserError(f"{path}: not a picture that can be read ({reason})") from None


def preprocess_tensor(images, size):
    """CLIP's way in for square tensors (B, 3, H, H) in [-1, 1]: bicubic to `size`, CLIP's mean and deviation."""
    if images.shape[-1] != size:
        images = F.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(-1, 1)
    mean, std = (torch.tensor(v, device=images.device)[:, None, None] for v in (MEAN, STD))
    return ((images + 1) / 2 - mean) / std


def to_square(picture, size):
    """The middle square of a Pillow picture, its side brought to `size` by bicubic: (1, 3, size, size) in [-1, 1]."""
    picture = ImageOps.fit(picture.convert("RGB"), (size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1


def preprocess(picture, size):
    """CLIP's way in for a Pillow picture: shorter side to `size` by bicubic, centre crop, normalize. (1, 3, size, size)."""
    return preprocess_tensor(to_square(picture, size), size)


# ----------------------------------------------------------------------------- scripts: errors in one line, devices

class UserError(Exception):
    """Something the user can mend: scripts print it as one line and exit with status 2."""


@contextlib.contextmanager
def one_line_errors():
    """Turn a UserError, and what a disk refuses, into one line on stderr and exit status 2, Ctrl-C into status 130."""
    try:
        yield
    except (UserError, OSError) as error:
        message = str(error).strip().splitlines()[-1:]  # of what a data worker raises torch makes a traceback that ends with it
        print(f"{Path(sys.argv[0]).name}: {''.join(message).removeprefix('clip_embed.UserError: ')}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        print(str(stop) or "stopped", file=sys.stderr)
        sys.exit(130)


def pick_device(name):
    """The torch device called `name`; "auto" takes cuda, else mps, else cpu. Raises UserError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).cpu()  # torch itself knows best what there is
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: not available here ({str(error).splitlines()[0]})") from None
    return torch.device(name)


# ----------------------------------------------------------------------------- checkpoints

@contextlib.contextmanager
def reading(path, expected, kind="checkpoint"):
    """Turn what reading a foreign file can raise (all that zip, json, pickle and torch know) into one UserError."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected {expected}") from None
    except Exception as error:
        reason = f"{error} is missing or unknown" if isinstance(error, KeyError) else str(error).strip() or type(error).__name__
        raise UserError(f"{path}: damaged, or no {kind} ({reason.splitlines()[0][:120]}); expected {expected}") from None


def read_checkpoint(path, stage, mmap=False, clip=None, writer=None):
    """The dictionary of a checkpoint file, its stage checked; mmap: its tensors stay on the disk until they are used.

    clip: (fingerprint, path) of the CLIP that it has to belong to; writer: the command that writes such files, where it is not
    train.py. Raises UserError, naming what was expected.
    """
    with reading(path, f"the {stage} checkpoint that `python {writer or f'train.py {stage}'}` writes"):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    if not isinstance(checkpoint, dict) or not all(isinstance(checkpoint.get(k), t) for k, t in
                                                   (("stage", str), ("config", dict), ("model", dict))):
        raise UserError(f"{path}: holds no stage, config and model; expected a {stage} checkpoint")
    if checkpoint["stage"] != stage:
        raise UserError(f"{path}: is a {checkpoint['stage']!r} checkpoint, expected {stage!r}")
    if clip and checkpoint.get("clip", clip[0]) != clip[0]:
        raise UserError(f"{path}: was trained with CLIP {checkpoint['clip']}, but {clip[1]} is CLIP {clip[0]}")
    return checkpoint


def load_model(build, config_class, checkpoint, path, layout=dict):
    """Build a stage's network from a checkpoint and fill it, float32, in eval mode. Raises UserError.

    The network is built on the meta device, which allocates nothing, and every tensor's name, shape and values are
    checked before it moves from the checkpoint into its parameter: a damaged or hostile file is named as such. A field that
    its config lacks takes its default: the file may be older than the field. `layout` gives the network's state_dict the
    names and orientations that the file has, as views (hugging_face, for one).
    """
    default = vars(config_class())
    config = default | checkpoint["config"]
    if config.keys() != default.keys():
        raise UserError(f"{path}: its config has the fields {[*config]}, expected {[*default]}")
    for field, value in config.items():
        most = len(checkpoint["model"]) if "layers" in field or field == "depth" else 1 << 20  # no more layers than tensors
        if any(isinstance(n, int) and not 0 <= n <= most for n in (value if isinstance(value, tuple) else (value,))):
            raise UserError(f"{path}: its config says {field} = {value}, a number outside 0…{most}")
    try:
        with torch.device("meta"):
            model = build(config_class(**config))
    except Exception as error:  # a foreign config can be wrong in any way
        raise UserError(f"{path}: no network can be built from its config ({error})") from None
    want, have = layout(model.state_dict()), checkpoint["model"]
    for name in want | have:
        if name not in have:
            raise UserError(f"{path}: tensor {name} is missing, expected shape {tuple(want[name].shape)}")
        if name not in want:
            raise UserError(f"{path}: tensor {name} is surplus, the {checkpoint['stage']} has none of that name")
        if not isinstance(have[name], torch.Tensor) or have[name].shape != want[name].shape:
            raise UserError(f"{path}: tensor {name} has shape {tuple(getattr(have[name], 'shape', ()))}, "
                            f"expected {tuple(want[name].shape)}")
        if not torch.isfinite(have[name]).all():
            raise UserError(f"{path}: tensor {name} holds values that are not finite (NaN or infinity)")
    model.to_empty(device="cpu").requires_grad_(False)
    for name, parameter in layout(model.state_dict()).items():
        parameter.copy_(have.pop(name))  # gone from the checkpoint: a large one is never in memory twice
    return model.eval()


def fingerprint(clip):
    """Sixteen hex digits that name a CLIP by its weights, equal for float32 and its half-precision copy."""
    digest = hashlib.sha256()
    for name, tensor in sorted(clip.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().half().flatten().numpy())
    return digest.hexdigest()[:16]


# ----------------------------------------------------------------------------- published weights

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
HARMLESS = {"collections.OrderedDict": OrderedDict,  # all that a pickle of tensors needs, with torch's names of the dtypes above
            "torch._utils._rebuild_tensor_v2": lambda flat, offset, size, stride, *_: flat.as_strided(size, stride, offset),
            **dict(zip([f"torch.{kind}Storage" for kind in "Double Float Half BFloat16 Long Int Short Char Byte Bool".split()],
                       DTYPES.values()))}
NO_WEIGHT = r"(^|\.)(position_ids|attn_mask|input_resolution|context_length|vocab_size)$"  # tensors that some keep beside
MERGES = "bpe_simple_vocab_16e6.txt.gz"


def read_safetensors(path):
    """{name: tensor} of a .safetensors file, memory-mapped: read when used, so the file must stay as it is. Raises UserError.

    The format: the header's length (8 bytes, little-endian); the header, JSON, {name: {"dtype", "shape", "data_offsets"}};
    the tensors' bytes, one after another without gap or overlap.
    """
    with reading(path, "a .safetensors file", ".safetensors file"):
        memory = np.memmap(path, mode="c")  # c: what is written to the tensors stays in memory
        start = end = 8 + int.from_bytes(memory[:8].tobytes(), "little")
        if start > len(memory):
            raise UserError(f"{path}: says that its header ends at byte {start}, but has {len(memory)}: damaged or truncated")
        header, tensors = json.loads(memory[8:start].tobytes()), {}
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape, place = DTYPES[entry["dtype"]], entry["shape"], [start + n for n in entry["data_offsets"]]
            begin, count = end, math.prod(shape)
            end = begin + count * dtype.itemsize
            if place != [begin, end] or end > len(memory) or min(shape, default=0) < 0:
                raise UserError(f"{path}: tensor {name}, {shape}, is at bytes {place} of {len(memory)}, expected {[begin, end]}")
            flat = torch.frombuffer(memory, dtype=dtype, count=count, offset=begin) if count else torch.empty(0, dtype=dtype)
            tensors[name] = flat.view(shape)
        if end != len(memory):
            raise UserError(f"{path}: has {len(memory)} bytes, but its tensors end at {end}")
        return tensors


class Inert(dict):
    """What stands for an object of a TorchScript module: what is in it and in its parts, by dotted names."""

    def __setstate__(self, state):
        for name, value in state.items():  # pop: each thing has one owner, whatever a hostile pickle says
            self.update({f"{name}.{part}": value.pop(part) for part in [*value]} if isinstance(value, Inert) else {name: value})


def read_archive(path):
    """What torch.save or torch.jit.save wrote, tensors memory-mapped, code neither kept nor run. Raises UserError.

    Both are a zip file of a pickle, data.pkl, and each storage's bytes, data/N. Here the pickle may call nothing but what
    makes tensors of those bytes; a TorchScript module becomes Inert.
    """
    expected = "the clip checkpoint that `python train.py clip` writes, OpenAI's .pt or a Hugging Face folder"
    with reading(path, expected), zipfile.ZipFile(path) as archive:
        memory = np.memmap(path, mode="c")
        stored = {member.filename.partition("/")[2]: member for member in archive.infolist() if not member.compress_type}

        class Restricted(pickle.Unpickler):
            def find_class(self, module, name):
                if module.split(".")[0] == "__torch__":
                    return Inert
                if module == "torch.jit._pickle":  # typed lists, which hold no weights
                    return lambda *_: None
                if f"{module}.{name}" not in HARMLESS:
                    raise pickle.UnpicklingError(f"refused: its pickle would call {module}.{name}")
                return HARMLESS[f"{module}.{name}"]

            def persistent_load(self, storage):
                _, dtype, key, _, count = storage
                member = stored[f"data/{key}"]
                if member.file_size != count * dtype.itemsize:
                    raise ValueError(f"{member.filename} has {member.file_size} bytes, expected {count * dtype.itemsize}")
                names = np.frombuffer(memory, "<u2", 2, member.header_offset + 26)  # lengths of what stands before the bytes
                return torch.frombuffer(memory, dtype=dtype, count=count, offset=member.header_offset + 30 + int(names.sum()))

        content = Restricted(archive.open(stored["data.pkl"])).load()
        return content if isinstance(content, dict) else {}


def openai_config(tensors, path):
    """CLIPConfig of OpenAI's weights, read off the tensors' shapes. Raises UserError."""
    if "visual.layer1.0.conv1.weight" in tensors:
        raise UserError(f"{path}: is a ResNet CLIP; only those that look with a ViT can be loaded")
    with reading(path, "the tensors of OpenAI's CLIP"):
        width, _, patch, _ = tensors["visual.conv1.weight"].shape
        text_width, embed_dim = tensors["text_projection"].shape
        patches, context, vocab = (len(tensors[name]) for name in (
            "visual.positional_embedding", "positional_embedding", "token_embedding.weight"))
        layers = [len({k.split(".")[n] for k in tensors if k.startswith(tower)})
                  for n, tower in ((3, "visual.transformer.resblocks."), (2, "transformer.resblocks."))]
        return CLIPConfig(embed_dim, math.isqrt(patches) * patch, patch, width, layers[0], width // 64,
                          context, vocab, text_width, layers[1], text_width // 64, "quick_gelu")


def read_json(path, expected):
    """The dictionary in a JSON file. Raises UserError."""
    with reading(path, expected, "JSON"):
        return dict(json.loads(path.read_text("utf-8")))


def hugging_face_config(path, config=None):
    """CLIPConfig of a Hugging Face config.json, or of what two of them said, put together. Raises UserError."""
    towers = {"vision_config": {"image_size": 224, "patch_size": 32, "hidden_size": 768, "num_hidden_layers": 12,
                                "num_attention_heads": 12, "hidden_act": "quick_gelu"},  # what may be left out, in our order
              "text_config": {"max_position_embeddings": 77, "vocab_size": 49408, "hidden_size": 512, "num_hidden_layers": 12,
                              "num_attention_heads": 8, "hidden_act": "quick_gelu"}}
    config = config or read_json(path, "the config.json of a Hugging Face CLIP")
    with reading(path, "a CLIP with both towers"):
        (*vision, look), (*text, act) = ([config[tower].get(k, v) for k, v in sizes.items()] for tower, sizes in towers.items())
        if look != act or any(config[tower].get("layer_norm_eps", 1e-5) != 1e-5 for tower in towers):
            raise UserError(f"{path}: hidden_act is {look!r} for images, {act!r} for text; expected one, and layer_norm_eps 1e-5")
        return CLIPConfig(config.get("projection_dim", 512), *vision, *text, act)


HUGGING_FACE = {  # parts of our names and of theirs, replaced in this order
    "visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight", "visual.": "vision_model.",
    "transformer.resblocks": "encoder.layers", "attn": "self_attn", "c_fc": "fc1", "c_proj": "fc2",
    "conv1": "embeddings.patch_embedding", "class_emb": "embeddings.class_emb", "token_emb": "embeddings.token_emb",
    "positional_embedding": "embeddings.position_embedding.weight", "ln_pre": "pre_layrnorm", "ln_post": "post_layernorm",
    "ln_final": "final_layer_norm", "ln_": "layer_norm"}


def hugging_face(ours):
    """CLIP's state_dict under Hugging Face's names, as views: q, k and v apart, the projections transposed."""
    theirs = {}
    for name, tensor in ours.items():
        for part, their_part in HUGGING_FACE.items():
            name = name.replace(part, their_part)
        name = name if name.startswith(("vis", "text", "logit")) else f"text_model.{name}"
        if "in_proj_" in name:
            theirs |= {name.replace("in_proj_", f"{k}_proj."): third for k, third in zip("qkv", tensor.chunk(3))}
        else:
            theirs[name] = tensor.T if name.endswith("projection.weight") else tensor
    return theirs


def read_tokenizer(folder, config, bpe=None):
    """A published CLIP's Tokenizer, of the merges in `folder` (vocab.json is checked, where it lies beside) or the file `bpe`.

    Padding is what the folder's tokenizer_config.json says; without one 0, as in OpenAI's code. Raises UserError.
    """
    paths = [Path(bpe)] if bpe else [folder / "merges.txt", folder / MERGES]
    path = next((p for p in paths if p.is_file()), paths[-1])
    with reading(path, f"beside the weights, or given by --bpe, {MERGES} from https://github.com/openai/CLIP (folder clip), or "
                 "merges.txt from the model's page on https://huggingface.co", "merges"):
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            lines = file.read(1 << 26).decode().splitlines()
    lines = lines[:config.vocab_size - 513] if path.suffix == ".gz" else lines  # OpenAI's go on beyond what its models use
    known = {*Tokenizer([]).ids}
    for number, line in enumerate(lines[1:], 2):  # after the title
        if len(line.split()) != 2 or not known.issuperset(line.split()):
            raise UserError(f"{path}: line {number} is {line[:60]!r}, expected two symbols, each a byte's or merged before")
        known.add("".join(line.split()))
    tokenizer = Tokenizer([line.split() for line in lines[1:]], config.context_length)
    vocabulary, settings = path.with_name("vocab.json"), folder / "tokenizer_config.json"
    ids = read_json(vocabulary, "a vocabulary") if vocabulary.exists() else tokenizer.ids
    if ids != tokenizer.ids or len(tokenizer) != config.vocab_size:
        raise UserError(f"{path}: makes {len(tokenizer)} tokens, the weights have {config.vocab_size}, vocab.json {len(ids)}; "
                        "expected the same")
    if settings.exists():
        pad = read_json(settings, "a tokenizer's settings").get("pad_token", END)
        tokenizer.pad = tokenizer.ids.get(str(pad.get("content") if isinstance(pad, dict) else pad), tokenizer.end)
    return tokenizer


def load_clip(path, bpe=None):
    """(CLIP in eval mode, Tokenizer) of the CLIP at `path`, anyone's with a ViT. Raises UserError.

    A Hugging Face folder, or the weights in one (model.safetensors, pytorch_model.bin); OpenAI's .pt, a TorchScript
    archive; the project's own checkpoint. bpe: a merges file, where none lies beside the weights.
    """
    path, layout = Path(path), dict
    if path.is_dir():
        path /= next((name for name in ("model.safetensors", "pytorch_model.bin") if (path / name).exists()), "model.safetensors")
    tensors = read_safetensors(path) if path.suffix == ".safetensors" else read_archive(path)
    weights = {k: v for k, v in tensors.items() if isinstance(v, torch.Tensor) and not re.search(NO_WEIGHT, str(k))}
    if isinstance(tensors, Inert):
        config = openai_config(weights, path)
    elif path.suffix in (".safetensors", ".bin"):
        config, layout = hugging_face_config(path.with_name("config.json")), hugging_face
    else:
        checkpoint = read_checkpoint(path, "clip")
        clip = load_model(CLIP, CLIPConfig, checkpoint, path)
        tokenizer = Tokenizer([m.split(" ") for m in checkpoint.get("merges", [])], clip.config.context_length)
        if len(tokenizer) != clip.config.vocab_size:
            raise UserError(f"{path}: its merges make {len(tokenizer)} tokens, its config says {clip.config.vocab_size}")
        return clip, tokenizer
    clip = load_model(CLIP, CLIPConfig, {"stage": "clip", "config": vars(config), "model": weights}, path, layout)
    return clip, read_tokenizer(path.parent, config, bpe)


def main():
    """The script: what --help says."""
    parser = argparse.ArgumentParser(description="How well does each caption fit each picture? Cosine of z_i and z_t, "
                                     "and the softmax over the captions at CLIP's own temperature.")
    parser.add_argument("inputs", nargs="+", metavar="PICTURE|CAPTION", help="picture files first, then captions")
    parser.add_argument("--clip", default=Path(__file__).parent / "weights/shapes/clip.pt", metavar="PATH",
                        help="OpenAI's .pt, a Hugging Face folder, or a checkpoint of train.py (default: the shipped one)")
    parser.add_argument("--bpe", metavar="PATH", help="CLIP's merges file, where none lies beside the weights")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    args = parser.parse_args()
    with one_line_errors(), torch.no_grad():
        device = pick_device(args.device)
        paths = [p for p in args.inputs if Path(p).suffix.lower() in Image.registered_extensions() or Path(p).is_file()]
        captions = [c for c in args.inputs if c not in paths]
        if not paths or not captions:
            raise UserError("give at least one picture and one caption, as in: picture.png \"a red circle\" \"a blue star\"")
        clip, tokenizer = load_clip(args.clip, args.bpe)
        clip.to(device)
        z_t = encode_captions(clip, tokenizer, captions)[0]["z_t"]
        for path in paths:
            z_i = clip.encode_image(preprocess(open_picture(path), clip.config.image_size).to(device))
            cosine = (z_i @ z_t.T)[0]
            share = (clip.logit_scale.exp() * cosine).softmax(0)
            print(path, "  cosine  softmax", sep="\n")
            for k in cosine.argsort(descending=True).tolist():
                print(f"{cosine[k]:8.3f}  {share[k]:7.1%}  {captions[k]}")


if __name__ == "__main__":
    main()
