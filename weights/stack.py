"""The networks of a folder of checkpoints, for sample.py and manipulate.py."""

import ctypes
import math
import sys
from functools import partial
from pathlib import Path

import torch

import clip_embed
import decoder
import prior
import upsample
from weights.checkpoints import fingerprint, load_stage

SHIPPED = Path(__file__).parent / "shapes"
SIZES = (64, 256, 1024)
PRIORS = {"diffusion": "prior", "ar": "ar-prior", "none": None, "text": None}  # --prior: its stage
PRECISIONS = ("auto", "float32", "bfloat16")  # auto: see pick_dtype
LARGE = 1e9  # bytes of checkpoints that are read only when they are used


class Stages(dict):
    """{stage: network}; a network given as a partial is built anew at each use, then freed.

    dtype: of all networks but CLIP.
    """

    def __getitem__(self, stage):
        value = super().__getitem__(stage)
        return value() if isinstance(value, partial) else value


def pick_dtype(precision, device, large=False):
    """The torch.dtype that networks compute in: `precision`, the name of one, or "auto":
    bfloat16 on GPUs and CPUs that compute in it; float16 on older GPUs, and on all for `large`
    networks; else float32."""
    kind, known = torch.device(device).type, torch.cpu.get_capabilities()
    if precision != "auto":
        return getattr(torch, precision)
    if kind == "cuda":
        older = not torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.float16 if large or older else torch.bfloat16
    fast = kind == "cpu" and (known.get("avx512_bf16") or known.get("amx_bf16"))
    return torch.bfloat16 if fast else torch.float32


def keep_freed_memory():
    """Lets glibc (Linux) keep freed memory for the next tensors. It would return it to the system,
    which zeroes each page before it hands it out again: a tenth to a seventh of a CPU's time."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return
    mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD: bytes that may lie free
    if not mallopt(-3, 2 ** 30):  # M_MMAP_THRESHOLD: larger tensors are returned
        mallopt(-3, 2 ** 25)  # the most that older versions allow


def warn_of_unknown_words(tokenizer, captions):
    """Name on stderr the words of captions that CLIP's tokenizer knows only in parts.

    A CLIP of train.py makes each common word of its captions one token, unless it has its 1,000
    merges already. So a word of several tokens was rare or absent in its training.
    """
    if not 0 < len(tokenizer.merges) < 1000:
        return
    words = {word: None for caption in captions  # once each, in their order
             for word in clip_embed.split_words(clip_embed.clean(caption))
             if len(tokenizer.encode_word(word)) > 1}
    if words:
        print(f"these words were rare or absent in CLIP's training: {', '.join(words)} (--help "
              "lists what the shipped weights know)", file=sys.stderr)


def load_stack(weights=SHIPPED, device="cpu", size=64, prior_kind="diffusion", clip_path=None,
               bpe=None, lean=False, judge=False, precision="float32"):
    """{"clip", "tokenizer", "prior", …}: the networks for pictures of `size`, from a folder.

    prior_kind: one of PRIORS. clip_path, bpe: a CLIP to use in place of the folder's clip.pt, as
    clip_embed.load_clip reads it. lean: if the checkpoints are LARGE together, read each at each
    use. judge: load the diffusion prior too, if there is one: it judges candidates and restores
    text diffs. precision: of all networks but CLIP (pick_dtype; `dtype` is the one picked). Raises
    UserError for a checkpoint that is missing, damaged, or of another CLIP.
    """
    keep_freed_memory()
    weights = Path(weights)
    clip_path = clip_path or weights / "clip.pt"
    clip, tokenizer = clip_embed.load_clip(clip_path, bpe)
    kinds = {"prior": (prior.DiffusionPrior, prior.PriorConfig),
             "ar-prior": (prior.ARPrior, prior.ARConfig)}
    wanted = {PRIORS[prior_kind], "prior" if judge and (weights / "prior.pt").exists() else None}
    kinds = {stage: kind for stage, kind in kinds.items() if stage in wanted}
    kinds["decoder"] = (decoder.Decoder, decoder.DecoderConfig)
    for large in SIZES[1:SIZES.index(size) + 1]:
        kinds[f"upsample-{large}"] = (upsample.Upsampler, upsample.UpsamplerConfig)
    mark = fingerprint(clip)
    paths = {stage: weights / f"{stage}.pt" for stage in kinds}
    bytes_of = [path.stat().st_size if path.exists() else -math.inf for path in paths.values()]
    large = lean and sum(bytes_of) > LARGE
    dtype = pick_dtype(precision, device, large)

    def load(stage):
        network = load_stage(paths[stage], *kinds[stage], (mark, clip_path), mmap=large)
        # channels_last convolves faster, but its copies take memory
        layout = torch.preserve_format if large else torch.channels_last
        return network.to(device, dtype, memory_format=layout)

    networks = {stage: partial(load, stage) if large else load(stage) for stage in kinds}
    stack = Stages({"clip": clip.to(device), "tokenizer": tokenizer} | networks)
    stack.dtype = dtype
    return stack
