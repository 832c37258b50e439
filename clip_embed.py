"""CLIP: captions and pictures in one space (unCLIP §2; Radford et al. 2021, "the CLIP paper").

In:   captions (list of str), pictures (Pillow images, or tensors (B, 3, H, W) in [-1, 1])
Out:  tokens (B, 77), the text tower's states (B, 77, text_width), z_t (B, d) and z_i (B, d), unit-norm

unCLIP inverts the image encoder: z_i is what the prior predicts from a caption and what the decoder
paints from. The two towers are trained so that a picture and its own caption point the same way, and
stay frozen afterwards. Read the file from top to bottom: byte-level BPE, the two transformers under
the names that OpenAI's code gave them (so that published weights fit), the contrastive loss, the
pictures' way in, and checkpoints.

    python clip_embed.py picture.png "a red circle" "a blue star"
"""

import argparse
import contextlib
import hashlib
import html
import re
import sys
import unicodedata
import warnings
from collections import Counter
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps

MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's pixel statistics, for pixels in [0, 1]
STD = (0.26862954, 0.26130258, 0.27577711)
START, END = "<|startoftext|>", "<|endoftext|>"


class UserError(Exception):
    """Something the user can mend: scripts print it as one line and exit with status 2."""


@contextlib.contextmanager
def one_line_errors():
    """Turn a UserError, and what a disk refuses, into one line on stderr and exit status 2, Ctrl-C into status 130."""
    try:
        yield
    except (UserError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


def pick_device(name):
    """The torch device called `name`; "auto" takes cuda, else mps, else cpu. Raises UserError."""
    have = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available, "cpu": lambda: True}
    if name == "auto":
        name = next(kind for kind in have if have[kind]())
    if name.split(":")[0] not in have or not have[name.split(":")[0]]():
        raise UserError(f"--device {name}: not available here (use auto, or one of "
                        f"{', '.join(kind for kind in have if have[kind]())})")
    try:
        torch.empty(0, device=name)
    except RuntimeError as error:
        raise UserError(f"--device {name}: not available here ({str(error).splitlines()[0]})") from None
    return torch.device(name)


# ----------------------------------------------------------------------------- captions into tokens

@lru_cache
def bytes_to_unicode():
    """The printable character that stands for each of the 256 bytes (GPT-2's table, kept by CLIP)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + n) for n, b in enumerate(rest)}


def split_words(text):
    """Cut cleaned text into CLIP's words: contractions, runs of letters, single digits, runs of the rest.

    CLIP's pattern is 's|'t|'re|'ve|'m|'ll|'d|[\\p{L}]+|[\\p{N}]|[^\\s\\p{L}\\p{N}]+; the standard library has
    no \\p, so the Unicode category of each character decides.
    """
    kind = lambda c: " " if c.isspace() else {"L": "L", "N": "N"}.get(unicodedata.category(c)[0], "other")
    words, i = [], 0
    while i < len(text):
        contraction = re.match(r"'(?:s|t|re|ve|m|ll|d)", text[i:i + 3])
        j = i + (contraction.end() if contraction else 1)
        if not contraction and kind(text[i]) != "N":
            while j < len(text) and kind(text[j]) == kind(text[i]):
                j += 1
        if not text[i].isspace():
            words.append(text[i:j])
        i = j
    return words


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
    """Learn up to `most` merges from captions: join the commonest pair, again and again (Sennrich et al. 2016)."""
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
    """CLIP's byte-level BPE: any text in, (B, context_length) token numbers out.

    The vocabulary is the 256 bytes, the 256 bytes that end a word, one entry a merge, start and end:
    what CLIP's `bpe_simple_vocab` and `vocab.json` hold, in their order. No text is outside it.
    """

    def __init__(self, merges, context_length=77):
        self.merges = [tuple(m) for m in merges]
        self.rank = {pair: n for n, pair in enumerate(self.merges)}
        alphabet = list(bytes_to_unicode().values())
        vocab = alphabet + [c + "</w>" for c in alphabet] + ["".join(m) for m in self.merges] + [START, END]
        self.ids = {token: n for n, token in enumerate(vocab)}
        self.tokens, self.known = vocab, {}
        self.start, self.end = self.ids[START], self.ids[END]
        self.context_length = context_length

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
        """Captions → (B, context_length) int64: start, tokens, end, padded with 0. Long ones are cut, with a warning."""
        out = torch.zeros(len(texts), self.context_length, dtype=torch.long)
        for row, text in zip(out, texts):
            ids = self.encode(text)
            if len(ids) > self.context_length - 2:
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
    vision_layers: int = 6
    vision_heads: int = 2
    context_length: int = 77
    vocab_size: int = 0           # 512 + merges + 2; 49408 in the published models
    text_width: int = 128
    text_layers: int = 4
    text_heads: int = 2
    hidden_act: str = "gelu"      # LAION's models and ours; OpenAI's use "quick_gelu", x·σ(1.702x)


PRESETS = {
    "shapes": CLIPConfig(),
    "laptop": CLIPConfig(embed_dim=512, image_size=224, vision_patch_size=32, vision_width=768, vision_layers=12,
                         vision_heads=12, vocab_size=49408, text_width=512, text_layers=12, text_heads=8),  # ViT-B/32
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
        B, L, C = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.view(B, L, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)  # each (B, nh, L, hs)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.out_proj(y.transpose(1, 2).reshape(B, L, C))


class ResidualAttentionBlock(nn.Module):
    """Pre-norm transformer block: x + attention, then x + MLP."""

    def __init__(self, width, heads, hidden_act):
        super().__init__()
        self.attn = MultiheadAttention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})
        self.ln_2 = nn.LayerNorm(width)
        self.act = {"quick_gelu": lambda x: x * torch.sigmoid(1.702 * x), "gelu": F.gelu}[hidden_act]

    def forward(self, x, causal):
        x = x + self.attn(self.ln_1(x), causal)
        return x + self.mlp["c_proj"](self.act(self.mlp["c_fc"](self.ln_2(x))))


class Transformer(nn.Module):
    """A stack of blocks; `causal` hides every later position."""

    def __init__(self, width, layers, heads, hidden_act, causal):
        super().__init__()
        self.causal = causal
        self.resblocks = nn.ModuleList(ResidualAttentionBlock(width, heads, hidden_act) for _ in range(layers))

    def forward(self, x):
        for block in self.resblocks:
            x = block(x, self.causal)
        return x


def positions(side, width):
    """(side², width) sines and cosines of each patch's row and column: what the image tower's positions start from.

    Ours. CLIP starts from noise a tenth as large as a patch's content; the small towers here then take thousands of
    steps to tell left from right.
    """
    angle = torch.arange(side)[:, None] * 100.0 ** -torch.linspace(0, 1, width // 4)
    wave = torch.cat([angle.sin(), angle.cos()], 1)
    return torch.cat([wave.repeat_interleave(side, 0), wave.repeat(side, 1)], 1)


class VisionTransformer(nn.Module):
    """The image tower: patches and a class token through a transformer; the class token is projected."""

    def __init__(self, config):
        super().__init__()
        width, patches = config.vision_width, (config.image_size // config.vision_patch_size) ** 2
        self.conv1 = nn.Conv2d(3, width, config.vision_patch_size, config.vision_patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width) * width ** -0.5)
        self.positional_embedding = nn.Parameter(torch.cat([torch.zeros(1, width), positions(round(patches ** 0.5), width)]))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, config.vision_layers, config.vision_heads, config.hidden_act, causal=False)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.randn(width, config.embed_dim) * width ** -0.5)

    def forward(self, pixels):
        x = self.conv1(pixels).flatten(2).transpose(1, 2)  # (B, patches, width)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1).to(x.dtype), x], 1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class CLIP(nn.Module):
    """Both towers and the temperature (§2; the CLIP paper, fig. 3)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        width = config.text_width
        self.visual = VisionTransformer(config)
        self.transformer = Transformer(width, config.text_layers, config.text_heads, config.hidden_act, causal=True)
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.randn(config.context_length, width) * 0.01)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, config.embed_dim) * width ** -0.5)
        self.logit_scale = nn.Parameter(torch.tensor(float(np.log(1 / 0.07))))
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        for tower in (self.visual.transformer, self.transformer):  # CLIP's own initial scales
            for block in tower.resblocks:
                w, deep = block.ln_1.weight.shape[0], (2 * len(tower.resblocks)) ** -0.5
                nn.init.normal_(block.attn.out_proj.weight, std=w ** -0.5 * deep)
                nn.init.normal_(block.mlp["c_fc"].weight, std=(2 * w) ** -0.5)
                nn.init.normal_(block.mlp["c_proj"].weight, std=w ** -0.5 * deep)

    def encode_image(self, pixels):
        """z_i (B, d), unit-norm, of CLIP-normalized pixels (B, 3, image_size, image_size)."""
        return F.normalize(self.visual(pixels).float(), dim=-1)

    def encode_text(self, ids):
        """(states (B, L, text_width) after the last LayerNorm, z_t (B, d) unit-norm) of ids (B, L), L ≤ context.

        z_t is read at the end token: the first of the largest id, since `end` is the vocabulary's last. The
        tower is causal, so the columns after every caption's end may be cut off without changing anything.
        """
        x = self.token_embedding(ids) + self.positional_embedding[:ids.shape[1]]
        states = self.ln_final(self.transformer(x))
        end = ids.argmax(1)
        z_t = states[torch.arange(len(ids), device=ids.device), end] @ self.text_projection
        return states, F.normalize(z_t.float(), dim=-1)


def contrastive_loss(z_i, z_t, logit_scale):
    """Symmetric cross-entropy over rows and columns of the scaled cosines (§2; the CLIP paper, fig. 3).

    z_i, z_t (B, d) unit-norm, row k of one belonging to row k of the other; logit_scale is the log of the
    inverse temperature, held at or under log 100 as in the CLIP paper.
    """
    with torch.autocast(z_i.device.type, enabled=False):  # bfloat16 would round logits near 100 to halves: near misses drown
        logits = logit_scale.clamp(max=float(np.log(100))).exp() * z_i.float() @ z_t.float().T
    target = torch.arange(len(z_i), device=z_i.device)
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

def open_picture(path):
    """A picture file as an RGB Pillow image: turned upright by its EXIF tag, transparency on white. Raises UserError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as file:
                picture = ImageOps.exif_transpose(file)
                if picture.mode.startswith("I"):  # 16 bit and more: Pillow would clip, not scale
                    picture = Image.fromarray((np.asarray(picture, np.float64) / 256).clip(0, 255).astype(np.uint8))
                if picture.has_transparency_data:
                    picture = picture.convert("RGBA")
                    picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
                return picture.convert("RGB")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(f"{path}: not a picture that can be read ({error})") from None


def preprocess_tensor(images, size):
    """CLIP's way in for square tensors (B, 3, H, H) in [-1, 1]: bicubic to `size`, CLIP's mean and deviation."""
    if images.shape[-1] != size:
        images = F.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(-1, 1)
    mean, std = (torch.tensor(v, device=images.device)[:, None, None] for v in (MEAN, STD))
    return ((images + 1) / 2 - mean) / std


def preprocess(picture, size):
    """CLIP's way in for a Pillow picture: shorter side to `size` by bicubic, centre crop, normalize. (3, size, size)."""
    picture = ImageOps.fit(picture.convert("RGB"), (size, size), Image.Resampling.BICUBIC)
    return preprocess_tensor(torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1, size)[0]


# ----------------------------------------------------------------------------- checkpoints

def read_checkpoint(path, stage):
    """The dictionary of a checkpoint file, its stage checked. Raises UserError, naming what was expected."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected the {stage} checkpoint that `python train.py {stage}` writes") from None
    except Exception as error:  # a foreign file can fail in any way that zip, pickle and torch know
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
        raise UserError(f"{path}: damaged, or no checkpoint ({reason}); expected a {stage} checkpoint") from None
    if not isinstance(checkpoint, dict) or not all(isinstance(checkpoint.get(k), t) for k, t in
                                                   (("stage", str), ("config", dict), ("model", dict))):
        raise UserError(f"{path}: holds no stage, config and model; expected a {stage} checkpoint")
    if checkpoint["stage"] != stage:
        raise UserError(f"{path}: is a {checkpoint['stage']!r} checkpoint, expected {stage!r}")
    return checkpoint


def load_model(build, config_class, checkpoint, path):
    """Build a stage's network from a checkpoint and fill it, float32, in eval mode. Raises UserError.

    The network is built on the meta device, which allocates nothing, and every tensor's name, shape and
    values are checked before it takes the place of a parameter: a damaged or hostile file is named as such.
    """
    config, known = checkpoint["config"], sorted(f.name for f in fields(config_class))
    if sorted(config) != known:
        raise UserError(f"{path}: its config has the fields {sorted(config)}, expected {known}")
    for field, value in config.items():
        most = len(checkpoint["model"]) if "layers" in field or field == "depth" else 1 << 20  # no more layers than tensors
        if any(isinstance(n, int) and not 0 <= n <= most for n in (value if isinstance(value, tuple) else (value,))):
            raise UserError(f"{path}: its config says {field} = {value}, a number outside 0…{most}")
    try:
        with torch.device("meta"):
            model = build(config_class(**config))
    except Exception as error:  # a foreign config can be wrong in any way
        raise UserError(f"{path}: no network can be built from its config ({error})") from None
    want, have = model.state_dict(), checkpoint["model"]
    for name in want.keys() | have.keys():
        if name not in have:
            raise UserError(f"{path}: tensor {name} is missing, expected shape {tuple(want[name].shape)}")
        if name not in want:
            raise UserError(f"{path}: tensor {name} is surplus, the {checkpoint['stage']} has none of that name")
        if not isinstance(have[name], torch.Tensor) or have[name].shape != want[name].shape:
            raise UserError(f"{path}: tensor {name} has shape {tuple(getattr(have[name], 'shape', ()))}, "
                            f"expected {tuple(want[name].shape)}")
        if not torch.isfinite(have[name]).all():
            raise UserError(f"{path}: tensor {name} holds values that are not finite (NaN or infinity)")
    model.load_state_dict({k: v.float() for k, v in have.items()}, assign=True)
    return model.eval().requires_grad_(False)


def fingerprint(clip):
    """Sixteen hex digits that name a CLIP by its weights, equal for float32 and its half-precision copy."""
    digest = hashlib.sha256()
    for name, tensor in sorted(clip.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().half().numpy().tobytes())
    return digest.hexdigest()[:16]


def load_clip(path):
    """(CLIP in eval mode, Tokenizer) of the project's own checkpoint. Raises UserError."""
    checkpoint = read_checkpoint(path, "clip")
    clip = load_model(CLIP, CLIPConfig, checkpoint, path)
    tokenizer = Tokenizer([m.split(" ") for m in checkpoint.get("merges", [])], clip.config.context_length)
    if len(tokenizer) != clip.config.vocab_size:
        raise UserError(f"{path}: its merges make {len(tokenizer)} tokens, its config says {clip.config.vocab_size}")
    return clip, tokenizer


def main():
    """The script: what --help says."""
    parser = argparse.ArgumentParser(description="How well does each caption fit each picture? Cosine of z_i and z_t, "
                                     "and the softmax over the captions at CLIP's own temperature.")
    parser.add_argument("inputs", nargs="+", metavar="PICTURE|CAPTION", help="picture files first, then captions")
    parser.add_argument("--clip", default=Path(__file__).parent / "weights/shapes/clip.pt", help="CLIP checkpoint")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    args = parser.parse_args()
    with one_line_errors(), torch.no_grad():
        device = pick_device(args.device)
        paths = [p for p in args.inputs if Path(p).suffix.lower() in Image.registered_extensions() or Path(p).is_file()]
        captions = [c for c in args.inputs if c not in paths]
        if not paths or not captions:
            raise UserError("give at least one picture and one caption, as in: picture.png \"a red circle\" \"a blue star\"")
        clip, tokenizer = load_clip(args.clip)
        clip.to(device)
        z_t = encode_captions(clip, tokenizer, captions)[0]["z_t"]
        for path in paths:
            z_i = clip.encode_image(preprocess(open_picture(path), clip.config.image_size)[None].to(device))
            cosine = (z_i @ z_t.T)[0]
            share = (clip.logit_scale.exp() * cosine).softmax(0)
            print(path, "  cosine  softmax", sep="\n")
            for k in cosine.argsort(descending=True).tolist():
                print(f"{cosine[k]:8.3f}  {share[k]:7.1%}  {captions[k]}")


if __name__ == "__main__":
    main()
