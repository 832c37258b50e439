"""Latent files: a picture's code (z_i, x_T), kept by manipulate.py --save-latent."""

from pathlib import Path

import torch

from clip_embed import UserError
from weights.checkpoints import fingerprint, read_checkpoint, save_atomically


def save_latent(path, stack, z_i, x_T, caption, steps):
    """Write a picture's z_i (1, d), x_T (1, 3, 64, 64), and the settings its decoding repeats."""
    mark = fingerprint(stack["decoder"], torch.bfloat16)
    config = {"decoder": mark, "caption": caption, "steps": steps}
    model = {"z_i": z_i.clone(), "x_T": x_T.clone()}
    save_atomically({"stage": "latent", "config": config, "model": model}, Path(path))


def load_latent(path, stack):
    """(z_i (1, d), x_T (1, 3, 64, 64), caption, steps) of a latent file. Raises UserError."""
    checkpoint = read_checkpoint(path, "latent", writer="manipulate.py --save-latent")
    config, halves, c = checkpoint["config"], checkpoint["model"], stack["decoder"].config
    if config.get("decoder") != fingerprint(stack["decoder"], torch.bfloat16):
        raise UserError(f"{path}: belongs to another decoder than the one in --weights; "
                        "make it anew")
    for name, shape in {"z_i": (1, c.embed_dim), "x_T": (1, 3, c.image_size, c.image_size)}.items():
        x = halves.get(name)
        if (not isinstance(x, torch.Tensor) or x.shape != shape or not x.is_floating_point()
                or not torch.isfinite(x).all()):
            raise UserError(f"{path}: {name} should be finite floats of shape {shape}, "
                            f"is {tuple(getattr(x, 'shape', ()))}")
    caption, steps = config.get("caption"), config.get("steps")
    if not isinstance(caption, str) or not isinstance(steps, int) or not 2 <= steps <= 950:
        raise UserError(f"{path}: does not say with what caption and in how many steps (2 to 950) "
                        "it was inverted")
    return halves["z_i"].float(), halves["x_T"].float(), caption, steps
