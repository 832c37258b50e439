"""The decoder: a 64×64 picture from a CLIP image embedding and, optionally, its caption (§2.1).

In:   z_i (B, d) unit-norm, or zeros for none; a caption as CLIP read it, {"tokens" (B, L), "states" (B, L, text_width),
      "z_t" (B, d), "mask" (B, L)}
Out:  images (B, 3, 64, 64) in [-1, 1]; x_T (B, 3, 64, 64), the noise that DDIM inversion finds

A diffusion model P(x|z_i, y). The network is GLIDE's: ADM's U-Net, whose attention also looks at a context, here the
caption's states and four tokens made from z_i; z_i is added to the timestep embedding too. It predicts the noise ε and, with
a second set of channels, the variance of each step (Improved DDPM). The objective (decoder_loss) is L_simple + 0.001 L_vlb.
In training z_i is dropped 10% of the time and the caption 50% of the time, so that sampling can be guided:
ε = ε(∅) + w (ε(z_i, y) − ε(∅)).

The sampler takes every n-th of the 1000 steps, ancestral with the learned variance (the paper's), or DDIM with any η; DDIM
run backwards gives x_T, and the pair (z_i, x_T) is the picture's whole code (§3).

Where the paper is silent, ours: padding is masked (GLIDE learns a padding embedding instead), so that what lies beyond the
longest caption of a batch can be cut off; z_i enters times √d, so that its coordinates are of order 1; sampling starts below
t = 999 (top_step); inversion starts with a little noise (invert). The `shapes` preset's network, made for a laptop's CPU, folds
pixels into channels (`patch_size`, 1 in the paper), is told where they lie (`coordinates`), and puts out a velocity, from which
ε follows (eps_from_velocity).

    python decoder.py picture.png            # picture → z_i and x_T → picture again, and three variations
"""

import argparse
import math
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm


@dataclass
class DecoderConfig:
    """Sizes of the network, and how it is sampled (table 3, column 64; §2.1)."""
    image_size: int = 64
    patch_size: int = 1
    channels: int = 512
    depth: int = 3                        # residual blocks a level
    multiples: tuple = (1, 2, 3, 4)       # channels of each level, in units of `channels`
    attention: tuple = (32, 16, 8)        # the resolutions that attend, after patching
    head_channels: int = 64
    norm_groups: int = 32
    dropout: float = 0.1
    coordinates: bool = False             # whether the network is told where each pixel lies (ours; see Decoder.forward)
    scale_shift: bool = True              # ADM's blocks; False: the timestep's embedding is only added
    prediction: str = "eps"               # what the network puts out; "velocity": see eps_from_velocity
    top_signal: float = 0.015             # √ᾱ where sampling begins (top_step); 0: at t = 999 (Karlo)
    guidance: float = 2.0                 # of sampling (Karlo: 8)
    steps: int = 50                       # of sampling (the paper: 250; Karlo: 25)
    candidates: int = 1                   # pictures that sample.py draws at most, for one that fits the caption
    float32: bool = False                 # sample with ᾱ rounded to that, as the library that runs Karlo does
    embed_dim: int = 1024                 # d of z_i and z_t
    unit_norm: bool = True                # of z_i and z_t; False: both at CLIP's own norm, a learned vector for no z_i (Karlo)
    z_i_tokens: int = 4                   # context tokens made from z_i
    clip_text_width: int = 1024           # width of CLIP's text states
    text_layers: int = 24                 # the caption's own transformer; 0: CLIP's states straight in
    text_width: int = 2048
    text_heads: int = 32
    text_context: int = 256
    vocab_size: int = 49408


PRESETS = {
    "shapes": DecoderConfig(patch_size=2, channels=64, depth=1, multiples=(1, 2, 2), attention=(16, 8), norm_groups=8,
                            dropout=0.0, coordinates=True, prediction="velocity", guidance=3.0, steps=10, candidates=8, embed_dim=128,
                            clip_text_width=128, text_layers=2, text_width=128, text_heads=2, text_context=77),
    "laptop": DecoderConfig(channels=128, depth=2, multiples=(1, 2, 3, 4), embed_dim=512, clip_text_width=512,
                            text_layers=6, text_width=512, text_heads=8, text_context=77),
    "paper": DecoderConfig(steps=250),
}


# ----------------------------------------------------------------------------- Gaussian diffusion

@lru_cache
def cosine_schedule(T=1000):
    """ᾱ_0 … ᾱ_{T-1}, float64 (T,), of the cosine schedule (table 3; Improved DDPM eq. 17; β clipped at 0.999)."""
    f = torch.cos((torch.arange(T + 1, dtype=torch.float64) / T + 0.008) / 1.008 * math.pi / 2) ** 2
    betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    return torch.cumprod(1 - betas, 0)


def at(values, t, x):
    """values[t] as float32, shaped to multiply x: t (B,) → (B, 1, 1, …)."""
    return values.float().to(t.device)[t].view(-1, *[1] * (x.ndim - 1))


def q_sample(x_0, t, eps, alphas_cumprod):
    """x_t ~ q(x_t|x_0) = N(√ᾱ_t x_0, (1 − ᾱ_t) I), made from the noise eps (DDPM eq. 4). t (B,) int64."""
    return at(alphas_cumprod.sqrt(), t, x_0) * x_0 + at((1 - alphas_cumprod).sqrt(), t, x_0) * eps


def predict_x_0(x_t, eps, alpha):
    """x̂_0 = (x_t − √(1−ᾱ_t) ε) / √ᾱ_t (DDPM eq. 15)."""
    return (x_t - math.sqrt(1 - alpha) * eps) / math.sqrt(alpha)


def posterior(alpha_t, alpha_s):
    """q(x_s|x_t, x_0) for s before t: (factor of x_0, factor of x_t, variance β̃) (DDPM eqs. 6, 7).

    alpha_t, alpha_s are ᾱ at the two steps, floats or tensors; neighbours or strides apart alike, since a strided
    chain is the chain whose β are recomputed from the ᾱ it keeps (Improved DDPM §4).
    """
    beta = 1 - alpha_t / alpha_s
    from_x_0 = alpha_s ** 0.5 * beta / (1 - alpha_t)
    from_x_t = (1 - beta) ** 0.5 * (1 - alpha_s) / (1 - alpha_t)
    return from_x_0, from_x_t, beta * (1 - alpha_s) / (1 - alpha_t)


def ddim_step(x_0, eps, alpha_t, alpha_s, eta):
    """(mean, deviation) of x_s given x_t, of which x_0 and eps are the estimates, by DDIM with η (DDIM eqs. 12, 16).

    alpha_t, alpha_s are ᾱ at the two steps, floats. η = 0 draws nothing; η = 1 draws as much as the posterior does.
    """
    deviation = eta * math.sqrt((1 - alpha_s) / (1 - alpha_t) * (1 - alpha_t / alpha_s))
    return math.sqrt(alpha_s) * x_0 + math.sqrt(1 - alpha_s - deviation ** 2) * eps, deviation


def learned_log_variance(v, beta, beta_tilde):
    """log Σ = v log β + (1 − v) log β̃ (§2.1; Improved DDPM eq. 15); beta, beta_tilde tensors that broadcast with v."""
    return v * torch.log(beta) + (1 - v) * torch.log(beta_tilde)


def eps_from_velocity(x_t, velocity, alpha_t):
    """ε = √ᾱ_t velocity + √(1−ᾱ_t) x_t, for a network that predicts velocity = √ᾱ ε − √(1−ᾱ) x_0 (Salimans & Ho 2022, §4).

    The paper's networks predict ε, which takes long to learn finely enough: at high noise an error in ε is multiplied by
    √(1−ᾱ)/√ᾱ in x̂_0, one in the velocity only by √(1−ᾱ). The `shapes` presets, trained for minutes, predict this instead.
    """
    return alpha_t.sqrt() * velocity + (1 - alpha_t).sqrt() * x_t


# ----------------------------------------------------------------------------- the U-Net (ADM, guided-diffusion)

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
    """ADM's residual block (§2.1); the embedding scales and shifts the second norm, or, without scale_shift, is added before
    it; `resample` halves or doubles the side."""

    def __init__(self, channels, out_channels, emb_channels, groups, dropout, scale_shift, resample=None):
        super().__init__()
        self.resample = {None: nn.Identity(), "down": nn.AvgPool2d(2), "up": nn.Upsample(scale_factor=2)}[resample]
        self.in_norm = nn.GroupNorm(groups, channels)
        self.in_conv = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.emb = nn.Linear(emb_channels, (1 + scale_shift) * out_channels)
        self.out_norm = nn.GroupNorm(groups, out_channels)
        self.dropout = nn.Dropout(dropout)
        self.out_conv = zero(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x, emb):
        """x (B, channels, H, W), emb (B, emb_channels) → (B, out_channels, H, W), H and W halved or doubled by `resample`."""
        h = self.in_conv(self.resample(F.silu(self.in_norm(x))))
        emb = self.emb(F.silu(emb))[:, :, None, None]
        if emb.shape[1] == h.shape[1]:
            h = self.out_norm(h + emb)
        else:
            scale, shift = emb.chunk(2, 1)
            h = self.out_norm(h) * (1 + scale) + shift
        return self.skip(self.resample(x)) + self.out_conv(self.dropout(F.silu(h)))


class AttentionBlock(nn.Module):
    """Self-attention over the picture's positions, with the context's keys and values before the picture's (§2.1; GLIDE)."""

    def __init__(self, channels, head_channels, context_width, groups):
        super().__init__()
        if head_channels < 1 or channels % head_channels:
            raise ValueError(f"{channels} channels cannot be shared by heads of {head_channels}")
        self.heads = channels // head_channels
        self.norm = nn.GroupNorm(groups, channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.context_kv = nn.Linear(context_width, 2 * channels)
        self.proj_out = zero(nn.Linear(channels, channels))

    def forward(self, x, context, mask):
        """x (B, C, H, W), context (B, L, context_width), mask (B, L + H·W) True where a key may be looked at."""
        B, C, H, W = x.shape
        q, k, v = self.qkv(self.norm(x).flatten(2).transpose(1, 2)).chunk(3, -1)  # (B, H·W, C) each
        context_k, context_v = self.context_kv(context).chunk(2, -1)
        k, v = torch.cat([context_k, k], 1), torch.cat([context_v, v], 1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))  # (B, nh, ·, hs)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        return x + self.proj_out(y.transpose(1, 2).flatten(2)).transpose(1, 2).unflatten(2, (H, W))


class TextTransformer(nn.Module):
    """The caption's own transformer (§2.1; GLIDE): bidirectional over tokens, padding masked (ours)."""

    def __init__(self, config):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.text_width)
        self.positional_embedding = nn.Parameter(torch.randn(config.text_context, config.text_width))  # as large as the tokens'
        layer = lambda: nn.TransformerEncoderLayer(config.text_width, config.text_heads, 4 * config.text_width, 0.0, "gelu",
                                                   batch_first=True, norm_first=True)
        self.layers = nn.ModuleList(layer() for _ in range(config.text_layers))
        self.norm = nn.LayerNorm(config.text_width)

    def forward(self, tokens, mask):
        """tokens (B, L), mask (B, L) True on real ones → states (B, L, text_width)."""
        x = self.token_embedding(tokens) + self.positional_embedding[:tokens.shape[1]]
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=~mask)
        return self.norm(x)


class Decoder(nn.Module):
    """The U-Net, z_i injected twice (§2.1): (x_t, t, z_i, text) → (ε, v), both (B, 3, H, W); v is 0 for the variance β̃ and 1
    for β, unconstrained."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        emb = 4 * c.channels
        self.time_embed = nn.Sequential(nn.Linear(c.channels, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.z_i_to_emb = nn.Linear(c.embed_dim, emb)                                    # first injection of z_i (§2.1)
        self.z_i_to_context = nn.Linear(c.embed_dim, c.z_i_tokens * c.text_width)        # second: four extra tokens
        if not c.unit_norm:
            self.null_z_i = nn.Parameter(torch.zeros(c.embed_dim))
        if c.text_layers:
            self.text = TextTransformer(c)
            self.text_to_emb = nn.Linear(c.text_width, emb)
        else:
            self.text = nn.Sequential(nn.Linear(c.clip_text_width, c.text_width), nn.LayerNorm(c.text_width))
            self.text_to_emb = nn.Linear(c.embed_dim, emb)

        res = partial(ResBlock, emb_channels=emb, groups=c.norm_groups, dropout=c.dropout, scale_shift=c.scale_shift)
        attend = partial(AttentionBlock, head_channels=c.head_channels, context_width=c.text_width, groups=c.norm_groups)
        level = lambda channels, out_channels, side: nn.ModuleList(
            [res(channels, out_channels)] + ([attend(out_channels)] if side in c.attention else []))
        side, widths = c.image_size // c.patch_size, [c.channels * c.multiples[0]]  # widths: of each skip connection
        self.conv_in = nn.Conv2d(3 * c.patch_size ** 2 + 2 * c.coordinates, widths[0], 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for k, multiple in enumerate(c.multiples):
            for _ in range(c.depth):
                self.down.append(level(widths[-1], multiple * c.channels, side))
                widths.append(multiple * c.channels)
            if k < len(c.multiples) - 1:
                self.down.append(nn.ModuleList([res(widths[-1], widths[-1], resample="down")]))
                widths.append(widths[-1])
                side //= 2
        width = widths[-1]
        self.middle = nn.ModuleList([res(width, width), attend(width), res(width, width)])
        for k, multiple in reversed(list(enumerate(c.multiples))):
            for _ in range(c.depth + 1):
                self.up.append(level(width + widths.pop(), multiple * c.channels, side))
                width = multiple * c.channels
            if k:
                self.up[-1].append(res(width, width, resample="up"))
                side *= 2
        self.norm_out = nn.GroupNorm(c.norm_groups, width)
        self.conv_out = zero(nn.Conv2d(width, 6 * c.patch_size ** 2, 3, padding=1))

    def inject(self, emb, z_i, states, mask):
        """The two ways in of z_i (B, d), already at the network's scale (§2.1): added to emb (B, 4 · channels), and as four tokens
        before the caption's states (B, L, text_width). Returns (emb, context (B, 4 + L, text_width), its mask (B, 4 + L))."""
        tokens = self.z_i_to_context(z_i).unflatten(1, (self.config.z_i_tokens, -1))
        mask = F.pad(mask, (self.config.z_i_tokens, 0), value=True)  # the four can always be looked at
        return emb + self.z_i_to_emb(z_i), torch.cat([tokens, states], 1), mask

    def forward(self, x_t, t, z_i, text):
        """x_t (B, 3, H, W), t (B,), z_i (B, d) or zeros, text {"tokens", "states", "z_t", "mask"} of B captions."""
        c = self.config
        emb = self.time_embed(timestep_embedding(t, c.channels))
        norm = math.sqrt(c.embed_dim) if c.unit_norm else 1
        z_i = norm * (z_i if c.unit_norm else torch.where((z_i == 0).all(1, keepdim=True), self.null_z_i, z_i))
        if c.text_layers:
            tokens, mask = text["tokens"][:, :c.text_context], text["mask"][:, :c.text_context]
            states = self.text(tokens, mask)
            caption = states[torch.arange(len(states), device=t.device), mask.sum(1) - 1]  # read at the end token
        else:
            states, mask, caption = self.text(text["states"]), text["mask"], text["z_t"] * norm
        emb, context, mask = self.inject(emb + self.text_to_emb(caption), z_i, states, mask)

        def run(blocks, h):
            for block in blocks:
                if isinstance(block, AttentionBlock):
                    h = block(h, context, F.pad(mask, (0, h.shape[2] * h.shape[3]), value=True))
                else:
                    h = block(h, emb)
            return h

        h = F.pixel_unshuffle(x_t, c.patch_size)
        if c.coordinates:  # ADM's deep networks find out from their padding where left is; a small one takes long to
            places = torch.meshgrid(*(torch.linspace(-1, 1, side, device=t.device) for side in h.shape[2:]), indexing="ij")
            h = torch.cat([h, torch.stack(places).expand(len(h), -1, -1, -1)], 1)
        h = self.conv_in(h)  # (B, channels, H / patch_size, W / patch_size)
        skips = [h]
        for blocks in self.down:
            h = run(blocks, h)
            skips.append(h)
        h = run(self.middle, h)
        for blocks in self.up:
            h = run(blocks, torch.cat([h, skips.pop()], 1))
        h = self.conv_out(F.silu(self.norm_out(h))).float()
        eps, v = F.pixel_shuffle(h, c.patch_size).chunk(2, 1)
        if c.prediction == "velocity":
            eps = eps_from_velocity(x_t, eps, at(cosine_schedule(), t, x_t))
        return eps, (v + 1) / 2


# ----------------------------------------------------------------------------- training

def normal_kl(mean_1, log_variance_1, mean_2, log_variance_2):
    """KL(N(mean_1, …) ‖ N(mean_2, …)) in nats, elementwise."""
    return 0.5 * (log_variance_2 - log_variance_1 - 1 + torch.exp(log_variance_1 - log_variance_2)
                  + (mean_1 - mean_2) ** 2 * torch.exp(-log_variance_2))


def discretized_log_likelihood(x, mean, log_variance):
    """log-probability of an 8-bit pixel x in [-1, 1] under a Gaussian cut into 256 bins (DDPM eq. 13), elementwise."""
    scale = torch.exp(-0.5 * log_variance)
    upper, lower = scale * (x - mean + 1 / 255), scale * (x - mean - 1 / 255)
    inner = torch.special.ndtr(upper) - torch.special.ndtr(lower)
    ends = torch.where(x > 0.999, torch.special.ndtr(-lower), torch.special.ndtr(upper))
    return torch.log(torch.where(x.abs() > 0.999, ends, inner).clamp(min=1e-12))


def vlb_term(x_0, x_t, t, eps, v, alphas_cumprod):
    """The t-th term of the bound L_vlb in bits per dimension, (B,): a KL, or at t = 0 the likelihood (§2.1; DDPM eq. 5).

    eps and v are the network's; x̂_0 is clamped as it will be in sampling. At t = 0, where β̃ is 0, the next smallest β̃
    takes its place, as in Improved DDPM's code.
    """
    before = torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])
    from_x_0, from_x_t, beta_tilde = posterior(alphas_cumprod, before)
    beta, beta_tilde = 1 - alphas_cumprod / before, beta_tilde.clamp(min=float(beta_tilde[1]))
    from_x_0, from_x_t, beta, beta_tilde, signal, noise = (
        at(c, t, x_0) for c in (from_x_0, from_x_t, beta, beta_tilde, alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()))
    log_variance = learned_log_variance(v, beta, beta_tilde)
    estimate = ((x_t - noise * eps) / signal).clamp(-1, 1)
    true_mean, mean = (from_x_0 * x + from_x_t * x_t for x in (x_0, estimate))
    kl = normal_kl(true_mean, torch.log(beta_tilde), mean, log_variance)
    nll = -discretized_log_likelihood(x_0, mean, log_variance)
    return torch.where(t == 0, nll.flatten(1).mean(1), kl.flatten(1).mean(1)) / math.log(2)


def drop_text(text, null, drop):
    """Put the null caption (one row) in the place of those where drop (B,) is True (§2.1, §2.2)."""
    return {k: torch.where(drop.view(-1, *[1] * (v.ndim - 1)), null[k], v) for k, v in text.items()}


def decoder_loss(model, x_0, z_i, text, null, drop_z_i=0.1, drop_caption=0.5):
    """L_simple + 0.001 L_vlb of a batch (§2.1; Improved DDPM eq. 16), with both conditions dropped at random.

    x_0 (B, 3, H, W) in [-1, 1], z_i (B, d), text of B captions, null of the empty caption. The bound trains only
    the variance: its mean is detached. Each of its terms stands for all T, hence T · 0.001.
    """
    alphas_cumprod = cosine_schedule()
    T, B = len(alphas_cumprod), len(x_0)
    t = torch.randint(T, (B,)).to(x_0.device)  # drawn on the CPU: the same numbers on every device
    noise = torch.randn(x_0.shape).to(x_0.device)
    drop = torch.rand(B, 2).to(x_0.device)
    x_t = q_sample(x_0, t, noise, alphas_cumprod)
    z_i = torch.where(drop[:, :1] < drop_z_i, torch.zeros_like(z_i), z_i)
    eps, v = model(x_t, t, z_i, drop_text(text, null, drop[:, 1] < drop_caption))
    weight = 1 / at(alphas_cumprod, t, eps) if model.config.prediction == "velocity" else 1  # ‖Δε‖²/ᾱ is ‖Δvelocity‖²
    simple = (weight * (eps - noise) ** 2).mean()
    return simple + 0.001 * T * vlb_term(x_0, x_t, t, eps.detach(), v, alphas_cumprod).mean()


# ----------------------------------------------------------------------------- sampling

def ladder(steps, top):
    """The timesteps that a sampler visits, ascending: `steps` integers from 0 to `top`, evenly spaced (§2.1, §2.2; Improved
    DDPM §4). Raises ValueError."""
    if not 1 <= steps <= top + 1:
        raise ValueError(f"steps must be between 1 and {top + 1}, not {steps}")
    return torch.linspace(0, top, steps, dtype=torch.float64).round().long().tolist() if steps > 1 else [top]


def top_step(alphas_cumprod, signal=0.015):
    """The highest timestep that still holds the share `signal` of x_0: the largest t with √ᾱ_t ≥ signal (§2.1; ours).

    Samplers of ε-predictors start here, not at T − 1: there √ᾱ is 5e-5 in the cosine schedule, and
    x̂_0 = (x − √(1−ᾱ) ε)/√ᾱ turns an error of 0.001 in ε into 20 in x̂_0, which is a colour cast where x̂_0 is clamped and
    a lost picture where it is inverted. What the starting noise lacks of the signal is small beside the noise.
    """
    return int((alphas_cumprod.sqrt() >= signal).nonzero().max())


def randn(generators, shape, device):
    """Noise (B, …) of which row k comes from generators[k] (on the CPU): the same alone or in a batch."""
    return torch.stack([torch.randn(shape[1:], generator=g) for g in generators]).to(device)


def guided(model, x_t, t, z_i, text, null, guidance_scale):
    """(ε, v) with classifier-free guidance on ε alone: ε(∅) + w (ε(c) − ε(∅)) (§2.1; GLIDE eq. 5). w = 1 is none.

    What growing w does to the pictures is the subject of §5.3, figs. 9–11. t is an integer; null: the empty caption, one row.
    """
    t = torch.full((len(x_t),), t, device=x_t.device)
    if guidance_scale == 1:
        return model(x_t, t, z_i, text)
    both = {k: torch.cat([v, null[k].expand_as(v)]) for k, v in text.items()}
    eps, v = model(x_t.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([z_i, torch.zeros_like(z_i)]), both)  # (2B, 3, H, W) each
    given, free = eps.chunk(2)
    return free + guidance_scale * (given - free), v[:len(x_t)]


@torch.no_grad()
def sample(model, z_i, text, null, generators, guidance_scale=None, steps=None, eta=None, x_T=None, clamp=True, bar=False):
    """Images (B, 3, H, W) in [-1, 1] from z_i and captions (§2.1, table 3).

    generators: one torch.Generator a picture; guidance and steps are the config's where None. eta None is ancestral sampling
    with the learned variance (the paper: 250 steps); a number is DDIM with that η (DDIM eqs. 12, 16), deterministic at 0. x_T:
    start from this noise and take its inversion's steps. clamp: hold x̂_0 in [-1, 1]; switch it off to decode an inverted x_T.
    """
    c, exact = model.config, cosine_schedule()
    alphas_cumprod = exact.float() if c.float32 else exact
    guidance_scale, steps = c.guidance if guidance_scale is None else guidance_scale, steps or c.steps
    rungs = ladder(steps, top_step(alphas_cumprod, c.top_signal)) if x_T is None else inversion_ladder(steps)
    x = randn(generators, (len(z_i), 3, c.image_size, c.image_size), z_i.device) if x_T is None else x_T
    for n in tqdm(reversed(range(len(rungs))), total=len(rungs), desc="decoder", disable=not bar):
        alpha_t = alphas_cumprod[rungs[n]]
        alpha_s = alphas_cumprod[rungs[n - 1]] if n else torch.ones_like(alpha_t)
        eps, v = guided(model, x, rungs[n], z_i, text, null, guidance_scale)
        x_0 = predict_x_0(x, eps, float(alpha_t))
        if clamp:
            x_0 = x_0.clamp(-1, 1)
            eps = (x - float(alpha_t.sqrt()) * x_0) / float((1 - alpha_t).sqrt())  # the ε that the clamped x̂_0 means
        if not n:
            return x_0.clamp(-1, 1) * float((1 - exact[0]) / (1 - alphas_cumprod[0]))  # 1; in float32, 0.99947
        if eta is None:
            from_x_0, from_x_t, beta_tilde = (float(factor) for factor in posterior(alpha_t, alpha_s))
            log_variance = learned_log_variance(v, torch.tensor(float(1 - alpha_t / alpha_s)), torch.tensor(beta_tilde))
            deviation = torch.exp(0.5 * log_variance)
            x = from_x_0 * x_0 + from_x_t * x
        else:
            x, deviation = ddim_step(x_0, eps, float(alpha_t), float(alpha_s), eta)
        if eta != 0:
            x = x + deviation * randn(generators, x.shape, x.device)


# ----------------------------------------------------------------------------- inversion

def inversion_ladder(steps, noise=0.04):
    """The timesteps that invert climbs and that sample, given x_T, descends. Raises ValueError.

    From the smallest t with √(1−ᾱ_t) ≥ noise, five of 255 shades (ours; why, says invert), to top_step.
    """
    alphas_cumprod = cosine_schedule()
    bottom = int(((1 - alphas_cumprod).sqrt() >= noise).nonzero().min())
    return [bottom + t for t in ladder(steps, top_step(alphas_cumprod) - bottom)]


@torch.no_grad()
def invert(model, x_0, z_i, text, generators, steps=50, bar=False):
    """x_T (B, 3, H, W): the noise from which DDIM with η = 0, unguided and unclamped, decodes x_0 (§3; DDIM eq. 14).

    The sampler's last step only takes noise away, so it has many inverses. Ours puts noise in: it starts from
    x_t ~ q(x_t|x_0) on the lowest rung, drawn from the generators, one a picture. Started at x_0 itself, DDIM meets pictures
    without noise, as drawn or 8-bit ones are; the network rightly sees none, and the x_T that it ends with has less than a
    tenth of the variance that noise has. The price is what the decoder loses in taking noise of 0.04 away: about 49 dB are
    left. x_T is then nearly the noise put in, plus a little in which the rest of the picture is written.
    Above, the step t → s moves along ε(x_t, t), yet x_t is what is sought: the ε of the rung below gives a first guess
    of x_t, and ε at the guess gives x_t, for one network call a step.
    """
    alphas_cumprod, rungs = cosine_schedule(), inversion_ladder(steps)
    alpha_s = float(alphas_cumprod[rungs[0]])
    bottom = torch.full((len(x_0),), rungs[0], device=x_0.device)
    x = q_sample(x_0, bottom, randn(generators, x_0.shape, x_0.device), alphas_cumprod)
    eps, _ = guided(model, x, rungs[0], z_i, text, None, 1)
    for t in tqdm(rungs[1:], desc="inversion", disable=not bar):
        alpha_t = float(alphas_cumprod[t])
        climb = lambda eps: math.sqrt(alpha_t) * predict_x_0(x, eps, alpha_s) + math.sqrt(1 - alpha_t) * eps
        eps, _ = guided(model, climb(eps), t, z_i, text, None, 1)
        x, alpha_s = climb(eps), alpha_t
    return x


def main():
    """The script: what --help says."""
    here = Path(__file__).parent / "weights/shapes"
    parser = argparse.ArgumentParser(
        description="Take a picture apart into (z_i, x_T) and put it together again: the strip shows the picture, its "
        "reconstruction, and three decodings of z_i from fresh noise (§3).")
    parser.add_argument("picture", help="any picture; it is cropped to a square")
    parser.add_argument("--caption", default="", help="what it shows (default: nothing, z_i alone)")
    parser.add_argument("--weights", type=Path, default=here, help="folder of clip.pt and decoder.pt")
    parser.add_argument("--steps", type=int, default=50, help="steps each way, and of the fresh ones; more: closer (default 50)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    parser.add_argument("--out", type=Path, default=Path("decoder.png"), help="where the strip goes")
    args = parser.parse_args()
    from PIL import Image
    import clip_embed as ce
    with ce.one_line_errors():
        if not 2 <= args.steps <= 950 or not 0 <= args.seed < 1 << 48 or args.out.suffix != ".png":
            raise ce.UserError("--steps must be between 2 and 950, --seed at least 0, and --out end in .png")
        device = ce.pick_device(args.device)
        picture = ce.open_picture(args.picture)
        path, clip_path = args.weights / "decoder.pt", args.weights / "clip.pt"
        clip, tokenizer = ce.load_clip(clip_path)
        checkpoint = ce.read_checkpoint(path, "decoder", clip=(ce.fingerprint(clip), clip_path))
        model = ce.load_model(Decoder, DecoderConfig, checkpoint, path).to(device)
        x_0 = ce.to_square(picture, model.config.image_size).to(device)
        z_i = clip.to(device).encode_image(ce.preprocess(picture, clip.config.image_size).to(device))
        text, null = ce.encode_captions(clip, tokenizer, [args.caption])
        generators = [torch.Generator().manual_seed(args.seed + k) for k in range(3)]
        x_T = invert(model, x_0, z_i, text, generators[:1], args.steps, bar=True)
        again = sample(model, z_i, text, null, None, 1, args.steps, eta=0, x_T=x_T, clamp=False, bar=True)
        thrice = {k: v.repeat_interleave(3, 0) for k, v in text.items()}
        fresh = sample(model, z_i.repeat(3, 1), thrice, null, generators, steps=args.steps, bar=True)
        strip = torch.cat([x_0, again, fresh]).permute(2, 0, 3, 1).flatten(1, 2)  # (H, 5 W, 3), side by side
        Image.fromarray(((strip + 1) * 127.5).round().byte().cpu().numpy()).save(args.out)
        psnr = -10 * math.log10(float(((x_0 - again) / 2).square().mean()))
        print(f"x_T: mean {float(x_T.mean()):.3f}, variance {float(x_T.var()):.3f}; reconstruction {psnr:.1f} dB; {args.out}")


if __name__ == "__main__":
    main()
