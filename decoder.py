"""The decoder: a 64×64 picture from a CLIP image embedding and, optionally, its caption (§2.1).

In:   z_i (B, d) unit-norm, or zeros; {"tokens", "states", "z_t", "mask"} of captions
Out:  images (B, 3, 64, 64) in [-1, 1]; x_T (B, 3, 64, 64), the noise that DDIM inversion finds

A diffusion model P(x|z_i, y). The network is GLIDE's: ADM's U-Net, whose attention also sees a
context: the caption's states and four tokens made from z_i. z_i and one vector of the caption are
added to the timestep embedding too. The network predicts the noise ε and each step's variance
(Improved DDPM). The objective (decoder_loss) is L_simple + 0.001 L_vlb. In training z_i is dropped
10% of the time and the caption 50%, for guidance (guided).

Sampling is ancestral or by DDIM. DDIM run backwards gives x_T: (z_i, x_T) is a picture's code (§3).
Not in the paper: sampling starts below t = 999 (top_step), inversion with a little noise (invert).
For `shapes`, pixels are folded into channels (`patch_size`), `coordinates` are input too, and a
velocity is predicted (eps_from_velocity).

    python decoder.py picture.png            # picture → (z_i, x_T) → picture; three more from noise
"""

import argparse
import math
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.special import ndtr
from tqdm import tqdm


@dataclass
class DecoderConfig:
    """Sizes of the network and how to sample it (table 3, column 64; §2.1)."""
    image_size: int = 64
    patch_size: int = 1
    channels: int = 512
    depth: int = 3                   # residual blocks a level
    multiples: tuple = (1, 2, 3, 4)  # of `channels`, at each level
    attention: tuple = (32, 16, 8)   # sides that attend, in patches
    head_channels: int = 64
    norm_groups: int = 32
    dropout: float = 0.1
    coordinates: bool = False        # input each pixel's place
    scale_shift: bool = True         # of ADM's blocks; False: only a shift
    prediction: str = "eps"          # or "velocity" (eps_from_velocity)
    top_signal: float = 0.015        # √ᾱ where sampling begins (top_step); 0: at t = 999 (Karlo)
    guidance: float = 2.0            # of sampling (table 2: 1.25; Karlo: 8)
    steps: int = 50                  # of sampling (the paper: 250; Karlo: 25)
    ladder_power: float = 1.0        # their spacing (ladder)
    candidates: int = 1              # at most, for sample.py to choose from
    enough: float = 1.2              # stops at a sample.surprise below this
    float32: bool = False            # ᾱ rounded in sampling (Karlo)
    embed_dim: int = 1024            # d of z_i and z_t
    unit_norm: bool = True           # of z_i, z_t; False: CLIP's norm, a learned null z_i (Karlo)
    z_i_tokens: int = 4              # context tokens of z_i
    clip_text_width: int = 1024      # of CLIP's text states
    text_layers: int = 24            # the caption's own transformer; 0: CLIP's states straight in
    text_width: int = 2048
    text_heads: int = 32
    text_context: int = 256
    vocab_size: int = 49408


PRESETS = {
    "shapes": DecoderConfig(
        patch_size=2, channels=64, depth=1, multiples=(1, 2, 2), attention=(16, 8), norm_groups=8,
        dropout=0.0, coordinates=True, prediction="velocity", guidance=1.0, steps=14,
        ladder_power=0.6, candidates=8, enough=3.0, embed_dim=128, clip_text_width=128,
        text_layers=0, text_width=128),
    "laptop": DecoderConfig(channels=128, depth=2, embed_dim=512, clip_text_width=512,
                            text_layers=6, text_width=512, text_heads=8, text_context=77),
    "paper": DecoderConfig(guidance=1.25, steps=250),
}


@lru_cache
def cosine_schedule(T=1000):
    """ᾱ_0 … ᾱ_{T-1}, float64 (T,), of the cosine schedule (table 3; Improved DDPM eq. 17)."""
    f = torch.cos((torch.arange(T + 1, dtype=torch.float64) / T + 0.008) / 1.008 * math.pi / 2) ** 2
    betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    return torch.cumprod(1 - betas, 0)


def at(values, t, x):
    """values[..., t] as float32, shaped to multiply x: t (B,) → (…, B, 1, 1, …)."""
    return values.float().to(t.device)[..., t].unflatten(-1, (-1, *[1] * (x.ndim - 1)))


def q_sample(x_0, t, eps, alphas_cumprod):
    """x_t ~ q(x_t|x_0) = N(√ᾱ_t x_0, (1 − ᾱ_t) I) from the noise eps (DDPM eq. 4). t (B,) int64."""
    return at(alphas_cumprod.sqrt(), t, x_0) * x_0 + at((1 - alphas_cumprod).sqrt(), t, x_0) * eps


def predict_x_0(x_t, eps, alpha):
    """x̂_0 = (x_t − √(1−ᾱ_t) ε) / √ᾱ_t (DDPM eq. 15)."""
    return (x_t - math.sqrt(1 - alpha) * eps) / math.sqrt(alpha)


def posterior(alpha_t, alpha_s):
    """q(x_s|x_t, x_0) for s < t: (factor of x_0, factor of x_t, variance β̃) (DDPM eqs. 6, 7).

    alpha_t, alpha_s: ᾱ at the two steps, floats or tensors, at any stride (Improved DDPM §4).
    """
    beta = 1 - alpha_t / alpha_s
    from_x_0 = alpha_s ** 0.5 * beta / (1 - alpha_t)
    from_x_t = (1 - beta) ** 0.5 * (1 - alpha_s) / (1 - alpha_t)
    return from_x_0, from_x_t, beta * (1 - alpha_s) / (1 - alpha_t)


def ddim_step(x_0, eps, alpha_t, alpha_s, eta):
    """(mean, deviation) of x_s from the estimates x_0 and eps, by DDIM with η (DDIM eqs. 12, 16).

    alpha_t, alpha_s: ᾱ at the two steps, floats. η = 0 draws nothing, η = 1 as much as DDPM.
    """
    deviation = eta * math.sqrt((1 - alpha_s) / (1 - alpha_t) * (1 - alpha_t / alpha_s))
    return math.sqrt(alpha_s) * x_0 + math.sqrt(1 - alpha_s - deviation ** 2) * eps, deviation


def learned_log_variance(v, beta, beta_tilde):
    """log Σ = v log β + (1 − v) log β̃ (§2.1; Improved DDPM eq. 15); tensors that broadcast."""
    return v * torch.log(beta) + (1 - v) * torch.log(beta_tilde)


def eps_from_velocity(x_t, velocity, alpha_t):
    """ε = √ᾱ_t u + √(1−ᾱ_t) x_t of a predicted velocity u = √ᾱ ε − √(1−ᾱ) x_0 (Salimans & Ho 2022).

    Not in the paper. In x̂_0 an error in ε is multiplied by √(1−ᾱ)/√ᾱ, one in u only by √(1−ᾱ).
    """
    return alpha_t.sqrt() * velocity + (1 - alpha_t).sqrt() * x_t


def timestep_embedding(t, dim):
    """Sinusoids of the timesteps t (B,) → (B, dim), cosines first, as guided-diffusion has them."""
    freqs = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = t[:, None].float() * freqs
    return torch.cat([angles.cos(), angles.sin()], 1)


def zero(module):
    """The module with its parameters set to zero: a residual branch that starts as nothing."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


class ResBlock(nn.Module):
    """ADM's residual block; the embedding scales and shifts the second norm, or is added before it
    (scale_shift). `resample` halves ("down") or doubles ("up") the side (§2.1)."""

    def __init__(self, channels, out_channels, emb_channels, groups, dropout, scale_shift,
                 resample=None):
        super().__init__()
        changes = {"down": nn.AvgPool2d(2), "up": nn.Upsample(scale_factor=2)}
        self.resample = changes.get(resample, nn.Identity())
        self.in_norm = nn.GroupNorm(groups, channels)
        self.in_conv = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.emb = nn.Linear(emb_channels, (1 + scale_shift) * out_channels)
        self.out_norm = nn.GroupNorm(groups, out_channels)
        self.dropout = nn.Dropout(dropout)
        self.out_conv = zero(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        same = channels == out_channels
        self.skip = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x, emb):
        """x (B, channels, H, W), emb (B, emb_channels) → (B, out_channels, ·, ·)."""
        h = self.in_conv(self.resample(F.silu(self.in_norm(x))))
        emb = self.emb(F.silu(emb))[:, :, None, None]
        if emb.shape[1] == h.shape[1]:  # no scale_shift
            h = self.out_norm(h + emb)
        else:
            scale, shift = emb.chunk(2, 1)
            h = self.out_norm(h) * (1 + scale) + shift
        return self.skip(self.resample(x)) + self.out_conv(self.dropout(F.silu(h)))


class AttentionBlock(nn.Module):
    """Self-attention, the context's keys and values before the picture's own (§2.1; GLIDE)."""

    def __init__(self, channels, head_channels, context_width, groups):
        super().__init__()
        if head_channels < 1 or channels % head_channels:
            raise ValueError(f"heads of {head_channels} cannot share {channels} channels")
        self.heads = channels // head_channels
        self.norm = nn.GroupNorm(groups, channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.context_kv = nn.Linear(context_width, 2 * channels)
        self.proj_out = zero(nn.Linear(channels, channels))

    def forward(self, x, context, mask):
        """x (B, C, H, W), context (B, K, context_width), mask (B, K + H·W): the visible keys."""
        H, W = x.shape[2:]
        q, k, v = self.qkv(self.norm(x).flatten(2).transpose(1, 2)).chunk(3, -1)  # (B, H·W, C) each
        context_k, context_v = self.context_kv(context).chunk(2, -1)
        k, v = torch.cat([context_k, k], 1), torch.cat([context_v, v], 1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        y = self.proj_out(y.transpose(1, 2).flatten(2))  # (B, H·W, C)
        return x + y.transpose(1, 2).unflatten(2, (H, W))


class TextTransformer(nn.Module):
    """The caption's own bidirectional transformer (§2.1). Unlike GLIDE's, it masks padding."""

    def __init__(self, config):
        super().__init__()
        self.heads, width = config.text_heads, config.text_width
        if self.heads < 1 or width % self.heads:
            raise ValueError(f"{self.heads} heads cannot share a width of {width}")
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.randn(config.text_context, width))
        self.layers = nn.ModuleList(nn.ModuleDict({
            "ln_1": nn.LayerNorm(width), "ln_2": nn.LayerNorm(width),
            "qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width),
            "fc": nn.Linear(width, 4 * width), "fc_proj": nn.Linear(4 * width, width)})
            for _ in range(config.text_layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens, mask):
        """tokens (B, L), mask (B, L) True on real tokens → states (B, L, text_width)."""
        x = self.token_embedding(tokens) + self.positional_embedding[:tokens.shape[1]]
        for layer in self.layers:
            qkv = layer["qkv"](layer["ln_1"](x)).unflatten(-1, (3 * self.heads, -1))
            q, k, v = qkv.transpose(1, 2).chunk(3, 1)  # (B, nh, L, hs) each
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.view(len(x), 1, 1, -1))
            x = x + layer["proj"](y.transpose(1, 2).flatten(2))
            x = x + layer["fc_proj"](F.gelu(layer["fc"](layer["ln_2"](x))))
        return self.norm(x)


class Decoder(nn.Module):
    """The U-Net, z_i injected twice: (x_t, t, z_i, text) → (ε, v), (B, 3, H, W) each (§2.1)."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        emb = 4 * c.channels
        self.time_embed = nn.Sequential(nn.Linear(c.channels, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.z_i_to_emb = nn.Linear(c.embed_dim, emb)  # first injection of z_i (§2.1)
        self.z_i_to_context = nn.Linear(c.embed_dim, c.z_i_tokens * c.text_width)  # second
        if not c.unit_norm:
            self.null_z_i = nn.Parameter(torch.zeros(c.embed_dim))
        if c.text_layers:
            self.text = TextTransformer(c)
            self.text_to_emb = nn.Linear(c.text_width, emb)
        else:
            self.text = nn.Sequential(nn.Linear(c.clip_text_width, c.text_width),
                                      nn.LayerNorm(c.text_width))
            self.text_to_emb = nn.Linear(c.embed_dim, emb)

        res = partial(ResBlock, emb_channels=emb, groups=c.norm_groups, dropout=c.dropout,
                      scale_shift=c.scale_shift)
        attend = partial(AttentionBlock, head_channels=c.head_channels, context_width=c.text_width,
                         groups=c.norm_groups)

        def layer(channels, out_channels, side):
            attention = [attend(out_channels)] if side in c.attention else []
            return nn.ModuleList([res(channels, out_channels), *attention])

        side, area = c.image_size // c.patch_size, c.patch_size ** 2
        levels = [multiple * c.channels for multiple in c.multiples]
        widths = levels[:1]  # of each skip connection
        self.conv_in = nn.Conv2d(3 * area + 2 * c.coordinates, widths[0], 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for k, level in enumerate(levels):
            for _ in range(c.depth):
                self.down.append(layer(widths[-1], level, side))
                widths.append(level)
            if k < len(levels) - 1:
                self.down.append(nn.ModuleList([res(widths[-1], widths[-1], resample="down")]))
                widths.append(widths[-1])
                side //= 2
        width = widths[-1]
        self.middle = nn.ModuleList([res(width, width), attend(width), res(width, width)])
        for k, level in reversed(list(enumerate(levels))):
            for _ in range(c.depth + 1):
                self.up.append(layer(width + widths.pop(), level, side))
                width = level
            if k:
                self.up[-1].append(res(width, width, resample="up"))
                side *= 2
        self.norm_out = nn.GroupNorm(c.norm_groups, width)
        self.conv_out = zero(nn.Conv2d(width, 6 * area, 3, padding=1))

    def inject(self, emb, z_i, states, mask):
        """Both injections of z_i (B, d), already times √d: (emb, context, mask) (§2.1).

        z_i is added to emb (B, 4 · channels), and becomes four tokens before the caption's states
        (B, L, text_width): context is (B, 4 + L, text_width), mask (B, 4 + L).
        """
        tokens = self.z_i_to_context(z_i).unflatten(1, (self.config.z_i_tokens, -1))
        mask = F.pad(mask, (self.config.z_i_tokens, 0), value=True)  # always visible
        return emb + self.z_i_to_emb(z_i), torch.cat([tokens, states], 1), mask

    def forward(self, x_t, t, z_i, text):
        """x_t (B, 3, H, W), t (B,), z_i (B, d) or zeros, text of B captions → (ε, v)."""
        c = self.config
        emb = self.time_embed(timestep_embedding(t, c.channels))
        gain = math.sqrt(c.embed_dim)
        if not c.unit_norm:
            gain, z_i = 1, torch.where((z_i == 0).all(1, keepdim=True), self.null_z_i, z_i)
        if c.text_layers:
            tokens, mask = text["tokens"][:, :c.text_context], text["mask"][:, :c.text_context]
            states = self.text(tokens, mask)
            caption = states[torch.arange(len(states), device=t.device), mask.sum(1) - 1]
        else:
            states, mask, caption = self.text(text["states"]), text["mask"], text["z_t"] * gain
        emb, context, mask = self.inject(emb + self.text_to_emb(caption), gain * z_i, states, mask)

        def run(blocks, h):
            for block in blocks:
                if isinstance(block, AttentionBlock):
                    h = block(h, context, F.pad(mask, (0, h[0, 0].numel()), value=True))
                else:
                    h = block(h, emb)
            return h

        h = F.pixel_unshuffle(x_t, c.patch_size)
        if c.coordinates:  # too shallow to infer them from padding
            lines = (torch.linspace(-1, 1, side, device=t.device) for side in h.shape[2:])
            places = torch.stack(torch.meshgrid(*lines, indexing="ij"))
            h = torch.cat([h, places.expand(len(h), -1, -1, -1)], 1)
        h = self.conv_in(h)  # (B, channels, H/patch_size, W/patch_size)
        skips = [h]
        for blocks in self.down:
            h = run(blocks, h)
            skips.append(h)
        h = run(self.middle, h)
        for blocks in self.up:
            h = run(blocks, torch.cat([h, skips.pop()], 1))
        h = self.conv_out(F.silu(self.norm_out(h))).float()
        eps, v = F.pixel_shuffle(h, c.patch_size).chunk(2, 1)
        if c.prediction == "velocity":  # eps was the velocity
            eps = eps_from_velocity(x_t, eps, at(cosine_schedule(), t, x_t))
        return eps, (v + 1) / 2  # 0: variance β̃, 1: β


def normal_kl(mean_1, log_variance_1, mean_2, log_variance_2):
    """KL(N(mean_1, …) ‖ N(mean_2, …)), nats."""
    log_ratio = log_variance_1 - log_variance_2
    distance = (mean_1 - mean_2) ** 2 * torch.exp(-log_variance_2)
    return 0.5 * (torch.exp(log_ratio) - log_ratio - 1 + distance)


def discretized_log_likelihood(x, mean, log_variance):
    """log-probability of 8-bit pixels x in [-1, 1] under a Gaussian in 256 bins (DDPM eq. 13)."""
    scale = torch.exp(-0.5 * log_variance)
    upper, lower = scale * (x - mean + 1 / 255), scale * (x - mean - 1 / 255)
    inner, ends = ndtr(upper) - ndtr(lower), torch.where(x > 0.999, ndtr(-lower), ndtr(upper))
    return torch.log(torch.where(x.abs() > 0.999, ends, inner).clamp(min=1e-12))


def vlb_term(x_0, x_t, t, eps, v, alphas_cumprod):
    """The t-th term of the bound L_vlb in bits per dimension, (B,) (§2.1; DDPM eq. 5).

    A KL divergence; at t = 0 the negative log-likelihood. β̃_1 replaces β̃_0 = 0, as in Improved
    DDPM's code. Unlike there, x̂_0 is clamped as in sampling. eps, v: the network's.
    """
    before = torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])
    from_x_0, from_x_t, beta_tilde = posterior(alphas_cumprod, before)
    beta_tilde = beta_tilde.clamp(min=float(beta_tilde[1]))
    signal, noise = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
    from_x_0, from_x_t, beta, beta_tilde, signal, noise = at(torch.stack([
        from_x_0, from_x_t, 1 - alphas_cumprod / before, beta_tilde, signal, noise]), t, x_0)
    log_variance = learned_log_variance(v, beta, beta_tilde)
    estimate = ((x_t - noise * eps) / signal).clamp(-1, 1)
    true_mean, mean = (from_x_0 * x + from_x_t * x_t for x in (x_0, estimate))
    kl = normal_kl(true_mean, torch.log(beta_tilde), mean, log_variance)
    nll = -discretized_log_likelihood(x_0, mean, log_variance)
    return torch.where(t == 0, nll.flatten(1).mean(1), kl.flatten(1).mean(1)) / math.log(2)


def drop_text(text, null, drop):
    """Replace captions by the null caption (one row) where drop (B,) is True (§2.1, §2.2)."""
    return {k: torch.where(drop.view(-1, *[1] * (v.ndim - 1)), null[k], v) for k, v in text.items()}


def randn(generators, shape, device):
    """Noise (B, …), row k from generators[k] (on the CPU): the same alone or in a batch."""
    return torch.stack([torch.randn(shape[1:], generator=g) for g in generators]).to(device)


def decoder_loss(model, x_0, z_i, text, null, generators, drop_z_i=0.1, drop_caption=0.5,
                 time_power=1.0):
    """L_simple + 0.001 L_vlb, both conditions dropped at random (§2.1; Improved DDPM eq. 16).

    x_0 (B, 3, H, W) in [-1, 1], z_i (B, d), text of B captions, null of the empty one, generators:
    one torch.Generator a row. L_vlb reaches v, not ε; one of its T terms is drawn, times T.
    t = T u^time_power, u uniform: 1 is the paper's; below 1 high t count more, in L_vlb too.
    """
    alphas_cumprod, T, device = cosine_schedule(), 1000, x_0.device
    u = torch.stack([torch.rand((), generator=g) for g in generators])
    t = (T * u ** time_power).long().clamp(max=T - 1).to(device)  # u ** 0.5 may be 1
    noise = randn(generators, x_0.shape, device)
    dice = torch.stack([torch.rand(2, generator=g) for g in generators]).to(device)
    x_t = q_sample(x_0, t, noise, alphas_cumprod)
    z_i = torch.where(dice[:, :1] < drop_z_i, torch.zeros_like(z_i), z_i)
    eps, v = model(x_t, t, z_i, drop_text(text, null, dice[:, 1] < drop_caption))
    simple = (eps - noise) ** 2
    if model.config.prediction == "velocity":
        simple = simple / at(alphas_cumprod, t, eps)  # ‖Δε‖²/ᾱ is ‖Δvelocity‖²
    vlb = vlb_term(x_0, x_t, t, eps.detach(), v, alphas_cumprod)
    return simple.mean() + 0.001 * T * vlb.mean()


def ladder(steps, top, power=1.0):
    """`steps` timesteps from 0 to `top`, ascending; one step is [top] (§2.1; Improved DDPM §4).

    Evenly spaced with power 1. Not in the paper: below 1 they are denser near `top`, above 1 near
    0, and equal ones are left out. Raises ValueError.
    """
    if not 1 <= steps <= top + 1:
        raise ValueError(f"steps must be between 1 and {top + 1}, not {steps}")
    shares = torch.linspace(0, 1, steps, dtype=torch.float64) ** power
    return (top * shares).round().long().unique().tolist() if steps > 1 else [top]


def top_step(alphas_cumprod, signal=0.015):
    """The highest timestep with √ᾱ_t ≥ signal, where sampling starts (§2.1; chosen here).

    At t = 999 √ᾱ is 5e-5 (cosine; linear: 0.006): an error of 0.001 in ε becomes 20 in x̂_0.
    """
    return int((alphas_cumprod.sqrt() >= signal).nonzero().max())


def guided(model, x_t, t, z_i, text, null, guidance_scale):
    """(ε, v) with classifier-free guidance on ε alone: ε(∅) + w (ε(c) − ε(∅)) (§2.1; GLIDE eq. 5).

    w = 1 is none (§5.3, figs. 9–11: its effect). t: an integer; null: the empty caption.
    """
    t = torch.full((len(x_t),), t, device=x_t.device)
    if guidance_scale == 1:
        return model(x_t, t, z_i, text)
    both = {k: torch.cat([v, null[k].expand_as(v)]) for k, v in text.items()}
    z_i = torch.cat([z_i, torch.zeros_like(z_i)])
    eps, v = model(x_t.repeat(2, 1, 1, 1), t.repeat(2), z_i, both)  # (2B, 3, H, W) each
    given, free = eps.chunk(2)
    return free + guidance_scale * (given - free), v[:len(x_t)]


@torch.no_grad()
def sample(model, z_i, text, null, generators, guidance_scale=None, steps=None, eta=None, x_T=None,
           clamp=True, bar=False):
    """Images (B, 3, H, W) in [-1, 1] from z_i and captions (§2.1, table 3).

    generators: one torch.Generator a picture. guidance_scale, steps: None for the config's. eta: η
    of DDIM (DDIM eqs. 12, 16); None: ancestral sampling. x_T: invert's. Its picture comes
    back with the same z_i, text and steps, guidance 1, eta 0, clamp False.
    """
    c, exact = model.config, cosine_schedule()
    alphas_cumprod = exact.float() if c.float32 else exact
    guidance_scale = c.guidance if guidance_scale is None else guidance_scale
    if x_T is None:
        x = randn(generators, (len(z_i), 3, c.image_size, c.image_size), z_i.device)
        rungs = ladder(steps or c.steps, top_step(alphas_cumprod, c.top_signal), c.ladder_power)
    else:
        x, rungs = x_T, inversion_ladder(steps or c.steps)
    for t, s in tqdm([*zip(rungs, [None, *rungs])][::-1], "decoder", disable=not bar):  # s: below t
        alpha_t = alphas_cumprod[t]
        eps, v = guided(model, x, t, z_i, text, null, guidance_scale)
        x_0 = predict_x_0(x, eps, float(alpha_t))
        if clamp:
            x_0 = x_0.clamp(-1, 1)  # which implies another ε
            eps = (x - float(alpha_t.sqrt()) * x_0) / float((1 - alpha_t).sqrt())
        if s is None:  # the factor: 1, or Karlo's 0.99947
            return x_0.clamp(-1, 1) * float((1 - exact[0]) / (1 - alphas_cumprod[0]))
        alpha_s = alphas_cumprod[s]
        if eta is None:
            from_x_0, from_x_t, beta_tilde = (part.float() for part in posterior(alpha_t, alpha_s))
            log_variance = learned_log_variance(v, (1 - alpha_t / alpha_s).float(), beta_tilde)
            x, deviation = from_x_0 * x_0 + from_x_t * x, torch.exp(0.5 * log_variance)
        else:
            x, deviation = ddim_step(x_0, eps, float(alpha_t), float(alpha_s), eta)
        if eta != 0:
            x = x + deviation * randn(generators, x.shape, x.device)


def inversion_ladder(steps, noise=0.04):
    """Inversion's timesteps: from √(1−ᾱ_t) ≥ noise up to top_step. Raises ValueError."""
    alphas_cumprod = cosine_schedule()
    bottom = int(((1 - alphas_cumprod).sqrt() >= noise).nonzero().min())
    return [bottom + t for t in ladder(steps, top_step(alphas_cumprod) - bottom)]


@torch.no_grad()
def invert(model, x_0, z_i, text, generators, steps=50, bar=False):
    """x_T (B, 3, H, W), from which DDIM with η = 0, unguided, unclamped, decodes x_0 (§3).

    generators: one torch.Generator a picture. Not in the paper: inversion starts with noise of
    0.04 (five shades). In a clean picture the network predicts almost no noise, and x_T gets
    some 6% of noise's variance. A step s → t needs ε at the yet unknown x_t (DDIM eq. 13):
    the last ε gives a guess of x_t, then ε at the guess gives x_t.
    """
    alphas_cumprod, rungs = cosine_schedule(), inversion_ladder(steps)
    alpha_s = float(alphas_cumprod[rungs[0]])
    bottom = torch.full((len(x_0),), rungs[0], device=x_0.device)
    x = q_sample(x_0, bottom, randn(generators, x_0.shape, x_0.device), alphas_cumprod)
    eps, _ = guided(model, x, rungs[0], z_i, text, None, 1)
    for t in tqdm(rungs[1:], desc="inversion", disable=not bar):
        alpha_t = float(alphas_cumprod[t])

        def climb(eps):
            return math.sqrt(alpha_t) * predict_x_0(x, eps, alpha_s) + math.sqrt(1 - alpha_t) * eps

        eps, _ = guided(model, climb(eps), t, z_i, text, None, 1)
        x, alpha_s = climb(eps), alpha_t
    return x


def main():
    parser = argparse.ArgumentParser(
        description="Picture → (z_i, x_T) → picture: a strip of both and three decodings of "
        "z_i from noise (§3).")
    here, add = Path(__file__).parent / "weights/shapes", parser.add_argument
    add("picture", help="cropped to a square")
    add("--caption", default="", help="of the picture")
    add("--weights", type=Path, default=here, help="with clip.pt, decoder.pt")
    add("--steps", type=int, default=50, help="each way (50)")
    add("--seed", type=int, default=0)
    add("--device", default="auto", help="auto, cuda, mps or cpu")
    add("--out", type=Path, default=Path("decoder.png"), help="strip (decoder.png)")
    args = parser.parse_args()
    import clip_embed as ce
    from weights.checkpoints import check_out, fingerprint, load_stage
    with ce.one_line_errors():
        ce.check_ranges(args, steps=(2, 950), seed=(0, 1 << 48))
        check_out(args.out, args.picture, suffix=".png")
        device, picture = ce.pick_device(args.device), ce.open_picture(args.picture)
        path, clip_path = args.weights / "decoder.pt", args.weights / "clip.pt"
        clip, tokenizer = ce.load_clip(clip_path)
        model = load_stage(path, Decoder, DecoderConfig, (fingerprint(clip), clip_path)).to(device)
        x_0 = ce.to_square(picture, model.config.image_size).to(device)
        z_i = ce.encode_pictures(clip.to(device), ce.to_square(picture, clip.config.image_size))
        text, null = ce.encode_captions(clip, tokenizer, [args.caption])
        three = [torch.Generator().manual_seed(args.seed + k) for k in range(3)]
        x_T = invert(model, x_0, z_i, text, three[:1], args.steps, bar=True)
        again = sample(model, z_i, text, null, None, guidance_scale=1, steps=args.steps, eta=0,
                       x_T=x_T, clamp=False, bar=True)
        text = {k: v.expand(3, *v.shape[1:]) for k, v in text.items()}
        fresh = sample(model, z_i.repeat(3, 1), text, null, three, steps=args.steps, bar=True)
        ce.to_picture(torch.cat([*x_0, *again, *fresh], 2)).save(args.out)  # (3, H, 5 W)
        print(f"x_T: mean {x_T.mean():.3f}, variance {x_T.var():.3f}; "
              f"reconstruction {ce.psnr(x_0, again):.1f} dB; {args.out}")


if __name__ == "__main__":
    main()
