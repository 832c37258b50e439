"""The frozen CLIP's embeddings of the pictures and captions that priors and decoder train on.

A folder's pictures and captions are encoded once and kept in memory-mapped .npy files. The world's
fixed scenes are encoded once too; their captions are drawn anew each time.
"""

import contextlib
import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from clip_embed import (CLIP, Tokenizer, UserError, encode_captions, encode_pictures,
                        to_floats)
from data.processes import make_once
from data.shapes import FixedScenes


@dataclass
class FrozenCLIP:
    """CLIP in eval mode, and its embeddings that were computed beforehand. Raises UserError."""
    clip: CLIP
    tokenizer: Tokenizer
    mark: str = ""                   # CLIP's fingerprint, in the names of cached files
    z_i: torch.Tensor | None = None  # (n, d) of the fixed scenes, or of a folder's pictures
    texts: dict | None = None        # of a folder's captions, as load_embeddings gives them

    def __post_init__(self):
        if not self.clip.config.unit_norm:  # the stages scale embeddings of length 1
            raise UserError("Karlo's CLIP keeps the length of its embeddings, and training expects "
                            "length 1: train on another CLIP")

    @property
    def device(self):
        return self.clip.logit_scale.device

    @torch.no_grad()
    def encode_texts(self, captions):
        """(text, null) of B captions, or of the numbers (B,) of a folder's captions.

        As clip_embed.encode_captions gives them, in float32.
        """
        if self.texts is None:
            with torch.autocast(self.device.type, enabled=False):
                return encode_captions(self.clip, self.tokenizer, captions)
        texts = self.texts
        empty = torch.tensor([len(texts["z_t"]) - 1])  # the last of all captions is the empty one
        captions = torch.cat([captions, empty])
        begin, end = texts["ends"][captions], texts["ends"][captions + 1]
        place = torch.arange(int((end - begin).max()))
        mask = place < (end - begin)[:, None]  # (B + 1, L)
        place = (begin[:, None] + place).where(mask, 0)
        text = {"tokens": texts["tokens"][place].to(self.device),
                "states": texts["states"][place].to(self.device, torch.float32),
                "z_t": texts["z_t"][captions].to(self.device, torch.float32),
                "mask": mask.to(self.device)}
        return {k: v[:-1] for k, v in text.items()}, {k: v[-1:] for k, v in text.items()}

    @torch.no_grad()
    def encode_pictures(self, images):
        """z_i (B, d) of images (B, 3, H, H) in [-1, 1]."""
        with torch.autocast(self.device.type, enabled=False):
            return encode_pictures(self.clip, images)

    def z_i_of(self, numbers):
        """z_i (B, d) of the pictures with these numbers (B,), on CLIP's device."""
        return self.z_i[numbers].to(self.device)


def embed_scenes(frozen, out, seed, workers):
    """Set frozen.z_i to z_i of the world's fixed scenes, computed once and kept in `out`."""
    scenes = FixedScenes(seed)
    path = out / f"z_i-{frozen.mark}-{seed}-{scenes.fixed_scenes}.npy"

    def write(path):
        loader = DataLoader(scenes, batch_size=None, num_workers=workers)
        bar = tqdm(loader, desc="z_i of the priors' scenes", unit="batch")
        z_i = torch.cat([frozen.encode_pictures(to_floats(images.to(frozen.device))).cpu()
                         for images in bar])
        with open(path, "wb") as file:
            np.save(file, z_i.numpy())

    frozen.z_i = torch.from_numpy(make_once(path, np.load, write)).to(frozen.device)


def scale(d):
    """The factor of unit embeddings in the diffusion: 17.2 at d = 1024 (§2.2, appendix C).

    At any d a coordinate then has the deviation 17.2 / √1024 = 0.54, that of ImageNet's pixels.
    """
    return 17.2 * math.sqrt(d / 1024)


def standard(z_i, preset):
    """How the diffusion prior standardizes z_i (N, d): {"mean", "components", "deviation"}.

    The paper, and the preset `paper`, multiply by `scale` alone (§2.2, appendix C). A prior of
    shapes then learned little but the mean of places: they lie in components with less than 5% of
    the largest one's variance. Not in the paper: each component is divided by √(its variance + the
    mean variance). One more factor makes the mean square of all coordinates 0.54², as with `scale`.
    From at most 131,072 rows. Raises UserError if z_i are not finite.
    """
    if preset == "paper":
        return {}  # the network begins so
    some = z_i[::1 + len(z_i) // 131072].cpu().double()
    if not torch.isfinite(some).all():
        raise UserError("prior: an embedding of a picture holds NaN or infinity")
    mean = some.mean(0)
    centred = some - mean
    variances, components = torch.linalg.eigh(centred.T @ centred / len(some))
    variances = variances.clamp(min=0) + 1e-12  # if all z_i are equal
    softened = variances + variances.mean()
    deviation = (softened * (variances / softened).sum()).sqrt() / scale(len(mean))
    return {"mean": mean, "components": components.T, "deviation": deviation}


NAMES = ("z_i", "ends", "tokens", "states", "z_t")


def load_embeddings(folder):
    """(z_i, texts) of a folder that embed_folder wrote, memory-mapped.

    z_i (pictures, d). texts: of caption k z_t[k], and rows ends[k] … ends[k + 1] − 1 of tokens and
    states (half precision); the last caption is the empty one.
    """
    z_i, *texts = (torch.from_numpy(np.load(folder / f"{name}.npy", mmap_mode="c"))
                   for name in NAMES)
    return z_i, dict(zip(NAMES[1:], texts))


def embed_folder(frozen, data, out, workers):
    """Set frozen.z_i and frozen.texts to those of a folder's Pictures, computed once.

    They are kept in a folder of `out` that is named by data and CLIP, and only when all is written.
    Raises UserError, of a full disk too.
    """
    folder = out / f"cache-{data.mark}-{frozen.mark}"
    write = partial(write_embeddings, frozen, data, workers=workers)
    frozen.z_i, frozen.texts = make_once(folder, load_embeddings, write)


def write_embeddings(frozen, data, folder, workers):
    """Write what load_embeddings reads: z_i of a folder's Pictures, and texts of its captions."""
    c, captions, tokenizer = frozen.clip.config, [*data.captions, ""], frozen.tokenizer
    ids = [tokenizer.encode(caption) for caption in captions]
    tokenizer.warn_of_cuts([len(row) + 2 for row in ids[:-1]])
    lengths = [min([*row, tokenizer.end].index(tokenizer.end) + 2, c.context_length)
               for row in ids]  # a caption may spell the end token, where its mask ends
    n, rows = len(captions), sum(lengths)
    shapes = (("<f4", (len(data.names), c.embed_dim)), ("<i8", (n + 1,)), ("<i8", (rows,)),
              ("<f2", (rows, c.text_width)), ("<f4", (n, c.embed_dim)))
    kinds = {name: kind for name, (kind, _) in zip(NAMES, shapes)}
    folder.mkdir()
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(open(folder / f"{name}.npy", "wb")) for name in NAMES}

        def write(name, values):
            files[name].write(np.asarray(values.cpu(), kinds[name]).tobytes())

        # written, not mapped: a full disk is then an error and no crash
        for name, (kind, shape) in zip(NAMES, shapes):
            header = {"descr": kind, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(files[name], header)
        write("ends", torch.tensor([0, *lengths]).cumsum(0))
        pictures = DataLoader(range(len(data.names)), 64, num_workers=workers,
                              collate_fn=partial(data.tensors, side=c.image_size))
        for images in tqdm(pictures, desc="z_i of the pictures", unit="batch"):
            write("z_i", frozen.encode_pictures(to_floats(images.to(frozen.device))))
        for first in tqdm(range(0, n, 256), desc="states of the captions", unit="batch"):
            text, _ = frozen.encode_texts(captions[first:first + 256])
            write("tokens", text["tokens"][text["mask"]])
            write("states", text["states"][text["mask"]])
            write("z_t", text["z_t"])
