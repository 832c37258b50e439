"""The two priors: a CLIP image embedding z_i from a caption (§2.2).

In:   a caption as CLIP encodes it, {"tokens", "states", "z_t", "mask"} (clip_embed.encode_captions)
Out:  z_i (B, d), unit-norm

The diffusion prior is a diffusion model P(z_i|y). Its network is a causal transformer over

    encoded text (L) | z_t | timestep | noised z_i | a learned token

whose last output predicts z_i itself, not the noise: prior_loss is E‖f(z_i^(t), t, y) − z_i‖².
Sampling takes 64 of the 1000 steps, ancestral with the analytic variance, for two candidates, and
keeps the one closer to z_t. Unit vectors would drown in the noise, so the diffusion works on larger
ones. Not in the paper: each principal component is divided by about its size (standardize).

The autoregressive prior writes z_i as a sequence: the principal components that keep 99% of its
variance, the largest first, each quantized into 1024 buckets. A causal transformer predicts one
after the other, by cross-entropy (ar_loss):

    z_t | bucket of z_i·z_t | code 1 | … | code K − 1      →      code 1, …, code K

When sampling, the second token is drawn from the top half of the training distribution: a z_i that
fits the caption. Both priors drop the caption 10% of the time, for guidance. Not in the paper: the
empty caption is the null condition; buckets are equally full; see also ARPrior.

    python prior.py "a red circle"   # draws z_i from each prior and compares them
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
class PriorConfig:
    """Sizes and sampling of the diffusion prior (table 3)."""
    embed_dim: int = 1024          # d of z_i and z_t
    clip_text_width: int = 1024    # width of CLIP's text states
    text_context: int = 256        # CLIP's tokenizer gives 77 at most
    width: int = 2048
    layers: int = 24
    heads: int = 32
    unit_norm: bool = True         # of z_i and z_t; False: CLIP's norm, z_i standardized (Karlo)
    clamp: float = math.inf        # limit of each coordinate of x̂_0 in sampling (Karlo: 5)
    guidance: float = 1.0          # of sampling (Karlo: 4)
    steps: int = 64                # of sampling (Karlo: 25)


PRESETS = {
    "shapes": PriorConfig(embed_dim=128, clip_text_width=128, text_context=77, width=256, layers=4,
                          heads=4),
    "laptop": PriorConfig(embed_dim=512, clip_text_width=512, text_context=77, width=768,
                          layers=12, heads=12),
    "paper": PriorConfig(),
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


def posterior(alpha_t, alpha_s):
    """q(x_s|x_t, x_0) for s < t: (factor of x_0, factor of x_t, variance β̃) (DDPM eqs. 6, 7).

    alpha_t, alpha_s: ᾱ at the two steps, floats or tensors, at any stride (Improved DDPM §4).
    """
    beta = 1 - alpha_t / alpha_s
    from_x_0 = alpha_s ** 0.5 * beta / (1 - alpha_t)
    from_x_t = (1 - beta) ** 0.5 * (1 - alpha_s) / (1 - alpha_t)
    return from_x_0, from_x_t, beta * (1 - alpha_s) / (1 - alpha_t)


def timestep_embedding(t, dim):
    """Sinusoids of the timesteps t (B,) → (B, dim), cosines first, as guided-diffusion has them."""
    freqs = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = t[:, None].float() * freqs
    return torch.cat([angles.cos(), angles.sin()], 1)


class Block(nn.Module):
    """Pre-norm transformer block, for both priors."""

    def __init__(self, width, heads):
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"a width of {width} cannot be shared by {heads} heads")
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(),
                                 nn.Linear(4 * width, width))

    def forward(self, x, mask, cache):
        """x (B, S, width) → the same shape, mask True where a row may look at a column.

        cache: [keys, values], (B, ·, width) each, of the places before x, or []; x's are appended.
        """
        q, k, v = self.qkv(self.ln_1(x)).chunk(3, -1)
        if cache:
            k, v = torch.cat([cache[0], k], 1), torch.cat([cache[1], v], 1)
        cache[:] = k, v
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, nh, S, hs)
        x = x + self.proj(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.ln_2(x))


class DiffusionPrior(nn.Module):
    """f(z_i^(t), t, y), the transformer that predicts the standardized z_i (§2.2)."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.text_in = nn.Linear(c.clip_text_width, c.width)
        self.z_t_in = nn.Linear(c.embed_dim, c.width)
        self.time_in = nn.Sequential(nn.Linear(c.width, c.width), nn.SiLU(),
                                     nn.Linear(c.width, c.width))
        self.z_i_in = nn.Linear(c.embed_dim, c.width)
        self.final_token = nn.Parameter(torch.randn(c.width) * 0.02)
        # the last four places are those of z_t, timestep, z_i and the final token
        self.positional_embedding = nn.Parameter(torch.randn(c.text_context + 4, c.width) * 0.02)
        self.blocks = nn.ModuleList(Block(c.width, c.heads) for _ in range(c.layers))
        self.ln_out = nn.LayerNorm(c.width)
        self.out = nn.Linear(c.width, c.embed_dim)
        self.register_buffer("mean", torch.zeros(c.embed_dim))  # see standardize
        paper = torch.full([c.embed_dim], 32 / 17.2 / c.embed_dim ** 0.5)  # z_i times 17.2
        self.register_buffer("deviation", paper)
        if c.unit_norm:
            self.register_buffer("components", torch.eye(c.embed_dim))
        self.register_buffer("errors", torch.zeros(1000))  # by estimate_errors, after training

    def standardize(self, z_i):
        """z_i (B, d) → principal components, each over its `deviation` (embeddings.standard)."""
        with torch.autocast(z_i.device.type, enabled=False):  # bfloat16 is too coarse
            z = (z_i.float() - self.mean.float()) @ self.components.float().T
        return z / self.deviation.float()

    def embedding(self, z):
        """Undoes standardize: z → z_i (B, d), unit-norm (but Karlo's)."""
        z = z.float() * self.deviation
        if not self.config.unit_norm:
            return z + self.mean
        with torch.autocast(z.device.type, enabled=False):
            return F.normalize(z @ self.components.float() + self.mean, dim=-1)

    def sequence(self, z_i_t, t, text):
        """The blocks' input: (x (B, L + 4, width), mask (B, 1, L + 4, L + 4)) (§2.2).

        x: the caption's L states, z_t (times √d, to be of order 1), the timestep, z_i_t and the
        final token, each plus its position embedding. mask: True where a row may look.
        """
        c = self.config
        states, mask = text["states"][:, :c.text_context], text["mask"][:, :c.text_context]
        z_t = text["z_t"] * (math.sqrt(c.embed_dim) if c.unit_norm else 1)
        time = self.time_in(timestep_embedding(t, c.width))
        tail = self.z_t_in(z_t), time, self.z_i_in(z_i_t), self.final_token.expand(len(t), -1)
        L = states.shape[1]
        x = torch.cat([self.text_in(states), torch.stack(tail, 1)], 1)  # (B, L + 4, width)
        x = x + torch.cat([self.positional_embedding[:L], self.positional_embedding[-4:]])
        causal = torch.ones(L + 4, L + 4, dtype=torch.bool, device=t.device).tril()
        return x, causal & F.pad(mask, (0, 4), value=True)[:, None, None]

    def forward(self, z_i_t, t, text, cache=None):
        """z_i_t (B, d) noised, t (B,), text of B captions → the estimate of z_i (B, d).

        cache: [], which the first call fills with the keys and values of caption and z_t. Those see
        neither t nor z_i_t (the mask is causal), so later calls with this text reuse them.
        """
        x, mask = self.sequence(z_i_t, t, text)
        if cache:  # timestep, z_i_t and final token alone are new
            x, mask = x[:, -3:], mask[:, :, -3:]
        pairs = [list(pair) for pair in cache] if cache else [[] for _ in self.blocks]  # copies
        for block, pair in zip(self.blocks, pairs):
            x = block(x, mask, pair)
        if cache is not None:
            cache[:] = [(k[:, :-3], v[:, :-3]) for k, v in pairs]
        return self.out(self.ln_out(x[:, -1])).float()


def drop_text(text, null, drop):
    """Replace captions by the null caption (one row) where drop (B,) is True (§2.1, §2.2)."""
    return {k: torch.where(drop.view(-1, *[1] * (v.ndim - 1)), null[k], v) for k, v in text.items()}


def randn(generators, shape, device):
    """Noise (B, …), row k from generators[k] (on the CPU): the same alone or in a batch."""
    return torch.stack([torch.randn(shape[1:], generator=g) for g in generators]).to(device)


def prior_loss(model, z_i, text, null, generators, drop_caption=0.1, draws=1):
    """E‖f(z_i^(t), t, y) − z_i‖² per coordinate, the caption dropped 10% of the time (§2.2, eq. 2).

    z_i (B, d); text of B captions, null of the empty one; generators: one torch.Generator a row.
    Not in the paper: the mean over `draws` pairs (t, noise) a row. They share the cache of caption
    and z_t: for `shapes` four draws cost 1.5 times one.
    """
    alphas_cumprod, cache, total = cosine_schedule(), [], 0
    drop = torch.cat([torch.rand(1, generator=g) for g in generators]) < drop_caption
    text = drop_text(text, null, drop.to(z_i.device))
    z_0 = model.standardize(z_i)
    for _ in range(draws):
        t = torch.cat([torch.randint(1000, (1,), generator=g) for g in generators]).to(z_i.device)
        z_i_t = q_sample(z_0, t, randn(generators, z_i.shape, z_i.device), alphas_cumprod)
        total = total + F.mse_loss(model(z_i_t, t, text, cache), z_0)
    return total / draws


def ladder(steps, top, power=1.0):
    """`steps` timesteps from 0 to `top`, ascending; one step is [top] (§2.1; Improved DDPM §4).

    Evenly spaced with power 1. Not in the paper: below 1 they are denser near `top`, above 1 near
    0, and equal ones are left out. Raises ValueError.
    """
    if not 1 <= steps <= top + 1:
        raise ValueError(f"steps must be between 1 and {top + 1}, not {steps}")
    shares = torch.linspace(0, 1, steps, dtype=torch.float64) ** power
    return (top * shares).round().long().unique().tolist() if steps > 1 else [top]


@torch.no_grad()
def estimate_errors(model, batches, generator, points=112):
    """E‖x_0 − x̂_0‖²/d at every t, (1000,), for the analytic variance (§2.2; Analytic-DPM).

    batches: (z_i, text) of training embeddings and their captions; generator: of the noise.
    Measured at `points` of the t (every ninth), with straight lines between.
    """
    alphas_cumprod, errors = cosine_schedule(), []
    for z_i, text in batches:
        z_0, cache = model.standardize(z_i), []
        for t in ladder(points, len(alphas_cumprod) - 1):
            t = torch.full((len(z_0),), t, device=z_0.device)
            noise = torch.randn(z_0.shape, generator=generator).to(z_0.device)
            z_i_t = q_sample(z_0, t, noise, alphas_cumprod)
            errors.append(F.mse_loss(model(z_i_t, t, text, cache), z_0))
    mean = torch.stack(errors).view(-1, 1, points).mean(0, keepdim=True)  # (1, 1, points)
    return F.interpolate(mean, len(alphas_cumprod), mode="linear", align_corners=True).flatten()


def guided(f, x, text, null, guidance_scale):
    """Classifier-free guidance: f(x, ∅) + w (f(x, y) − f(x, ∅)) (§2.2; GLIDE eq. 5)."""
    if guidance_scale == 1:
        return f(x, text)
    both = {k: torch.cat([v, null[k].expand_as(v)]) for k, v in text.items()}
    given, free = f(x.repeat(2, 1), both).chunk(2)
    return free + guidance_scale * (given - free)


@torch.no_grad()
def sample(model, text, null, generators, guidance_scale=None, steps=None, candidates=2, bar=False):
    """z_i (B, d) for B captions, unit-norm (but Karlo's) (§2.2, table 3).

    Draws `candidates` per caption and keeps the one of largest dot product with z_t.
    generators: one torch.Generator a caption. guidance_scale, steps: None for the config's. Each
    step draws x_s from q(x_s|x_t, x̂_0), which divides by no √ᾱ_t: so the first t can be 999. Its
    variance is the best that all coordinates can share (Analytic-DPM, for an x_0-predictor):
    β̃ + (factor of x̂_0)² · E‖x_0 − x̂_0‖²/d. Without `errors` (Karlo's) it is β̃.
    """
    c, (B, d), alphas_cumprod, cache = model.config, text["z_t"].shape, cosine_schedule(), []
    guidance_scale = c.guidance if guidance_scale is None else guidance_scale
    text = {k: v.repeat_interleave(candidates, 0) for k, v in text.items()}
    device, shape = text["z_t"].device, (B, candidates, d)
    rungs = ladder(steps or c.steps, len(alphas_cumprod) - 1)
    z = randn(generators, shape, device).flatten(0, 1)
    for t, s in tqdm([*zip(rungs, [None, *rungs])][::-1], "prior", disable=not bar):  # s: below t
        f = lambda z, text: model(z, torch.full((len(z),), t, device=device), text, cache)
        z_0 = guided(f, z, text, null, guidance_scale).clamp(-c.clamp, c.clamp)
        if s is not None:
            factors = posterior(alphas_cumprod[t], alphas_cumprod[s])
            from_z_0, from_z_t, beta_tilde = (float(factor) for factor in factors)
            deviation = math.sqrt(beta_tilde + from_z_0 ** 2 * float(model.errors[t]))
            noise = randn(generators, shape, device).flatten(0, 1)
            z = from_z_0 * z_0 + from_z_t * z + deviation * noise
    if not c.unit_norm:  # Karlo's library ends with ᾱ in float32: times 0.99947
        z_0 = z_0 * float((1 - alphas_cumprod[0]) / (1 - alphas_cumprod.float()[0]))
    z_i = model.embedding(z_0)
    best = (F.normalize(z_i, dim=-1) * text["z_t"]).sum(1).view(B, candidates).argmax(1)
    return z_i.view(shape)[torch.arange(B, device=device), best]


@dataclass
class ARConfig:
    """Sizes of the autoregressive prior (table 3, latent decoder)."""
    embed_dim: int = 1024
    clip_text_width: int = 1024
    components: int = 319          # codes per z_i; fit_codes finds their number
    buckets: int = 1024            # values per code
    width: int = 1664
    layers: int = 24
    heads: int = 26


AR_PRESETS = {
    "shapes": ARConfig(embed_dim=128, clip_text_width=128, components=80, width=256, layers=4,
                       heads=4),
    "laptop": ARConfig(embed_dim=512, clip_text_width=512, components=256, width=768, layers=12,
                       heads=12),
    "paper": ARConfig(),
}


def pca(batches):
    """(mean (d,), components (d, d) as rows, variances (d,)), largest first, of batches (n, d).

    Mean and covariance are merged batch by batch in float64 (§2.2). Raises ValueError
    if an embedding is not finite, a coordinate is constant, or embeddings are too few.
    """
    n = mean = scatter = 0
    for z in batches:
        z = z.cpu().double()
        if not torch.isfinite(z).all():
            raise ValueError("PCA: an embedding holds values that are not finite (NaN or infinity)")
        centred, off, share = z - z.mean(0), z.mean(0) - mean, len(z) / max(1, n + len(z))
        scatter = scatter + centred.T @ centred + n * share * torch.outer(off, off)
        n, mean = n + len(z), mean + share * off
    if n < (d := len(mean)):
        raise ValueError(f"PCA: {n} embeddings cannot give {d} components: {d} are needed")
    spread = scatter.diagonal()
    constant = (spread <= 1e-12 * spread.max()).nonzero().flatten().tolist()
    if constant:
        raise ValueError(f"PCA: coordinate {constant[0]} is the same in every embedding")
    variances, vectors = torch.linalg.eigh(scatter / n)  # ascending
    return mean, vectors.T.flip(0), variances.flip(0)


def quantile_buckets(values, buckets):
    """Edges (…, buckets − 1) and centres (…, buckets) of equally full buckets of values (…, n).

    Not in the paper, which names no kind of bucket (§2.2). A code is then a rank, with one meaning
    in all components. Of 1024 equally wide buckets over one range, three of four would be empty.
    """
    values, n = values.sort().values, values.shape[-1]
    shares = torch.arange(1, 2 * buckets, device=values.device) / (2 * buckets)
    where = shares * (n - 1)  # median, edge, median, …
    low = where.floor().long().clamp(max=n - 2)
    quantiles = torch.lerp(values[..., low], values[..., low + 1], (where - low).to(values.dtype))
    return quantiles[..., 1::2].contiguous(), quantiles[..., ::2].contiguous()


def fit_codes(z_i, buckets=1024, lose=0.01):
    """PCA and buckets of z_i (N, d): {"mean", "components", "edges", "centres"} (§2.2).

    Keeps the fewest components with which cutting and quantizing lose under 1% of the variance.
    Raises ValueError as pca does, and for too few buckets.
    """
    mean, components, variances = pca(z_i.split(8192))
    some = z_i[::math.ceil(len(z_i) / 131072)].cpu().double()  # at most 131,072
    values = ((some - mean) @ components.T).T.contiguous()  # (d, n)
    edges, centres = quantile_buckets(values, buckets)
    error = (values - centres.gather(1, torch.searchsorted(edges, values))).square().mean(1)
    lost = 1 - (variances - error).cumsum(0) / variances.sum()
    if not (lost < lose).any():
        raise ValueError(f"{buckets} buckets lose {lost.min():.1%} of the variance, "
                         "however many components are kept")
    K = int((lost < lose).nonzero().min()) + 1
    codes = {"components": components[:K], "edges": edges[:K], "centres": centres[:K]}
    return {"mean": mean.float(), **{k: v.float() for k, v in codes.items()}}


def rank_embedding(buckets, width):
    """(buckets, width): cosines and sines of a bucket's rank, 1/2 to 64 waves over all buckets."""
    half_waves = 128 ** torch.linspace(0, 1, (width + 1) // 2)
    angle = math.pi * (torch.arange(buckets)[:, None] + 0.5) / buckets * half_waves
    return torch.cat([angle.cos(), angle.sin()], 1)[:, :width]


class ARPrior(nn.Module):
    """P(code | earlier codes, z_i·z_t, z_t, y), code by code: a causal transformer (§2.2).

    Not in the paper: each block's keys and values begin with the caption's, made from CLIP's
    states, since table 3's context of 384 is too short for 256 caption tokens beside 319 codes.
    CLIP's text tower is the only text encoder: with table 3's too, there would be 2.2B parameters,
    not that table's 1B. As buckets are ordered, their vectors start as cosines of their rank.
    Logits use the same vectors. Each place of the sequence rescales them.
    """

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.text_in = nn.Linear(c.clip_text_width, c.width)
        self.z_t_in = nn.Linear(c.embed_dim, c.width)
        self.text_kv = nn.ModuleList(nn.Linear(c.width, 2 * c.width) for _ in range(c.layers))
        self.buckets = nn.Parameter(rank_embedding(c.buckets, c.width))
        self.place_scale = nn.Parameter(torch.randn(c.components, c.width))
        self.positional_embedding = nn.Parameter(torch.randn(c.components + 1, c.width) * 0.02)
        self.blocks = nn.ModuleList(Block(c.width, c.heads) for _ in range(c.layers))
        self.ln_out = nn.LayerNorm(c.width)
        self.out = nn.Linear(c.width, c.width)
        for p in self.out.parameters():
            nn.init.zeros_(p)  # at first all buckets are equally likely
        K, n = c.components, c.buckets
        shapes = {"mean": [c.embed_dim], "components": [K, c.embed_dim], "edges": [K, n - 1],
                  "centres": [K, n], "dot_edges": [n - 1]}  # by fit_codes; the last: of z_i·z_t
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape))

    def encode(self, z_i):
        """The codes (B, K) of z_i (B, d): the bucket of each component."""
        with torch.autocast(z_i.device.type, enabled=False):  # bfloat16 is too coarse
            values = (z_i - self.mean) @ self.components.T  # (B, K)
        return torch.searchsorted(self.edges, values.T.contiguous()).T

    def decode(self, codes):
        """z_i (B, d) of codes (B, K): the buckets' centres plus the mean, normalized."""
        values = self.centres[torch.arange(codes.shape[1], device=codes.device), codes]
        return F.normalize(values @ self.components + self.mean, dim=-1)

    def forward(self, tokens, text, cache=None):
        """tokens (B, n): z_i·z_t's bucket, then codes → logits (B, n, buckets) of the next code.

        cache: [], filled with each block's keys and values; later calls give the new tokens alone.
        """
        B, L = text["mask"].shape
        cache = [] if cache is None else cache
        if not cache:
            states = self.text_in(text["states"])
            cache += [list(kv(states).chunk(2, -1)) for kv in self.text_kv]
        # z_t has place 0, the dot product 1, code k has k + 1; the cache holds `begun` places
        begun = cache[0][0].shape[1] - L
        first = max(1, begun) - 1  # row of place_scale for the first token; z_t has no row
        x = F.embedding(tokens, self.buckets) * self.place_scale[first:first + tokens.shape[1]]
        if not begun:
            z_t = self.z_t_in(text["z_t"] * math.sqrt(self.config.embed_dim))
            x = torch.cat([z_t[:, None], x], 1)
        S = x.shape[1]
        x = x + self.positional_embedding[begun:begun + S]
        causal = torch.ones(S, begun + S, dtype=torch.bool, device=x.device).tril(begun)
        mask = torch.cat([text["mask"][:, None].expand(-1, S, -1), causal.expand(B, -1, -1)], 2)
        mask = mask[:, None]  # (B, 1, S, L + begun + S)
        for block, pair in zip(self.blocks, cache):
            x = block(x, mask, pair)
        h = self.out(self.ln_out(x[:, -tokens.shape[1]:]))
        return (h @ self.buckets.T / math.sqrt(self.config.width)).float()


def ar_loss(model, z_i, text, null, generators, drop_caption=0.1):
    """Cross-entropy of each code given the earlier ones, in nats (§2.2).

    The caption is dropped 10% of the time, the dot product never. z_i (B, d) unit-norm; text of B
    captions, null of the empty one; generators: one torch.Generator a row.
    """
    codes = model.encode(z_i)
    dot = torch.searchsorted(model.dot_edges, (z_i * text["z_t"]).sum(1, keepdim=True))
    drop = torch.cat([torch.rand(1, generator=g) for g in generators]) < drop_caption
    text = drop_text(text, null, drop.to(z_i.device))
    logits = model(torch.cat([dot, codes[:, :-1]], 1), text)
    return F.cross_entropy(logits.flatten(0, 1), codes.flatten())


@torch.no_grad()
def draw_codes(model, text, null, generators, guidance_scale=1.0, percentile=50.0, bar=False):
    """Codes (B, K) for B captions, one after the other (§2.2).

    generators: one torch.Generator a caption. The bucket of z_i·z_t is drawn from the training
    distribution above `percentile` (50: the top half). Guidance acts on logits. Raises ValueError.
    """
    if not 0 <= percentile <= 100:
        raise ValueError(f"percentile {percentile} must be between 0 and 100")
    K, buckets, codes, cache = model.config.components, model.config.buckets, [], []
    uniform = torch.stack([torch.rand(K + 1, generator=g) for g in generators])
    uniform = uniform.to(text["z_t"].device)
    rank = percentile / 100 + (1 - percentile / 100) * uniform[:, :1]
    token = (rank * buckets).long().clamp(max=buckets - 1)  # buckets are equally full
    for k in tqdm(range(K), desc="ar-prior", disable=not bar):
        logits = guided(lambda token, text: model(token, text, cache)[:, -1], token, text, null,
                        guidance_scale)
        cdf = logits.softmax(1).cumsum(1)
        token = torch.searchsorted(cdf, uniform[:, k + 1:k + 2] * cdf[:, -1:])
        codes.append(token)
    return torch.cat(codes, 1)


def ar_sample(model, text, null, generators, guidance_scale=1.0, **options):
    """z_i (B, d), unit-norm, of B captions: draw_codes with the same options, decoded (§2.2)."""
    return model.decode(draw_codes(model, text, null, generators, guidance_scale, **options))


def print_cosines(title, z_i, z_t):
    """Print and average cosines of z_i (n, d) with z_t (d,) and with one another."""
    z, n = F.normalize(torch.cat([z_t[None], z_i])).cpu(), len(z_i)
    fit, cosine = z[1:] @ z[0], z[1:] @ z[1:].T
    print(f"{title}\n       z_t   " + "".join(f"  z_i {k}" for k in range(n)))
    for k in range(n):
        print(f"z_i {k} {fit[k]:6.3f}  " + "".join(f"{c:7.3f}" for c in cosine[k]))
    others = cosine[~torch.eye(n, dtype=torch.bool)].mean()
    print(f"mean cosine with z_t {fit.mean():.3f}, with one another {others:.3f}", flush=True)


def main():
    parser = argparse.ArgumentParser(
        description="Draw image embeddings for a caption from each prior and compare them: the "
        "cosines with z_t and with one another. Those of vague captions spread more.")
    here, add = Path(__file__).parent, parser.add_argument
    add("captions", nargs="+", metavar="CAPTION")
    add("--n", type=int, default=6, help="z_i to draw (default 6)")
    add("--guidance", type=float, default=1.0, help="its scale; 1 is none (default 1)")
    add("--steps", type=int, default=64, help="of the diffusion prior (the paper's 64)")
    add("--weights", type=Path, default=here / "weights/shapes", help="folder of checkpoints")
    add("--seed", type=int, default=0)
    add("--device", default="auto", help="auto, cuda, mps or cpu")
    args = parser.parse_args()
    import clip_embed as ce
    from weights.checkpoints import fingerprint, load_stage
    with ce.one_line_errors():
        ce.check_ranges(args, n=(2, 1000), steps=(1, 1000), guidance=(0, 100), seed=(0, 1 << 48))
        clip_path = args.weights / "clip.pt"
        clip, tokenizer = ce.load_clip(clip_path)
        mark, device = (fingerprint(clip), clip_path), ce.pick_device(args.device)
        clip.to(device)
        both = (("prior", DiffusionPrior, PriorConfig, partial(sample, steps=args.steps)),
                ("ar-prior", ARPrior, ARConfig, ar_sample))
        for stage, network, config, draw in both:
            model = load_stage(args.weights / f"{stage}.pt", network, config, mark).to(device)
            for caption in args.captions:
                text, null = ce.encode_captions(clip, tokenizer, [caption] * args.n)
                generators = [torch.Generator().manual_seed(args.seed + k) for k in range(args.n)]
                z_i = draw(model, text, null, generators, args.guidance, bar=True)
                print_cosines(f"{caption!r}, {stage}", z_i, text["z_t"][0])


if __name__ == "__main__":
    main()
