"""The two priors: a CLIP image embedding z_i from a caption (§2.2).

In:   a caption as CLIP read it, {"tokens" (B, L), "states" (B, L, text_width), "z_t" (B, d), "mask" (B, L)}
Out:  z_i (B, d), unit-norm

The diffusion prior is a diffusion model P(z_i|y) whose network is a decoder-only transformer with a causal mask:

    encoded text (L) | z_t | timestep | noised z_i | a learned token

What comes out at the last position is the prediction of z_i itself, not of the noise: the objective (prior_loss) is
E‖f(z_i^(t), t, y) − z_i‖². To sample: 64 of the 1000 steps, ancestral with the analytic variance, twice over; the
candidate closer to z_t is kept. Scale matters: a unit vector in d dimensions has coordinates near 1/√d, lost in noise of
deviation 1 at nearly every step: inside this file they are scaled to the paper's deviation, 0.54 (scale), outside never. The
same network says how well a picture's z_i fits a caption (surprise).

The autoregressive prior writes z_i as a sequence: its principal components, the largest variance first, as many as keep
99% of it, each quantized into 1024 buckets. A causal transformer predicts one after the other, by cross-entropy (ar_loss):

    z_t | bucket of z_i·z_t | code 1 | … | code K − 1      →      code 1, …, code K

To sample, the second token is drawn from the top half of those seen in training: it asks for a z_i that fits the caption.
Both priors drop the caption 10% of the time in training, so that sampling can be guided.

Where the paper is silent, ours: padding is masked; the empty caption is the null condition; z_t enters times √d; errors for
the analytic variance are measured at every ninth t; buckets are equally full; the autoregressive prior hears the caption
through keys and values made from CLIP's states (why, says ARPrior), and guidance leaves its z_i·z_t token alone.

    python prior.py "a red circle"           # draws z_i for a caption from each prior and compares them
"""

import argparse
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm


@dataclass
class PriorConfig:
    """Sizes of the diffusion prior (table 3)."""
    embed_dim: int = 1024          # d of z_i and z_t
    clip_text_width: int = 1024    # width of CLIP's text states
    text_context: int = 256
    width: int = 2048
    layers: int = 24
    heads: int = 32
    unit_norm: bool = True         # of z_i and z_t; False: CLIP's own norm, and z_i is standardized for the diffusion (Karlo)
    clamp: float = math.inf        # the most that sampling lets a coordinate of x̂_0 be (Karlo: 5)
    guidance: float = 1.0          # of sampling (Karlo: 4)
    steps: int = 64                # of sampling (Karlo: 25)


PRESETS = {
    "shapes": PriorConfig(embed_dim=128, clip_text_width=128, text_context=77, width=256, layers=4, heads=4),
    "laptop": PriorConfig(embed_dim=512, clip_text_width=512, text_context=77, width=768, layers=12, heads=12),
    "paper": PriorConfig(),
}


# ----------------------------------------------------------------------------- the diffusion prior: noise

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


def posterior(alpha_t, alpha_s):
    """q(x_s|x_t, x_0) for s before t: (factor of x_0, factor of x_t, variance β̃) (DDPM eqs. 6, 7).

    alpha_t, alpha_s are ᾱ at the two steps, floats or tensors; neighbours or strides apart alike, since a strided
    chain is the chain whose β are recomputed from the ᾱ it keeps (Improved DDPM §4).
    """
    beta = 1 - alpha_t / alpha_s
    from_x_0 = alpha_s ** 0.5 * beta / (1 - alpha_t)
    from_x_t = (1 - beta) ** 0.5 * (1 - alpha_s) / (1 - alpha_t)
    return from_x_0, from_x_t, beta * (1 - alpha_s) / (1 - alpha_t)


def scale(d):
    """What unit embeddings are multiplied by for the diffusion: 17.2 at d = 1024, as wide elsewhere (§2.2, appendix C).

    A coordinate then has the deviation 17.2 / √1024 = 0.54, that of ImageNet's pixels in [−1, 1].
    """
    return 17.2 * math.sqrt(d / 1024)


# ----------------------------------------------------------------------------- its network

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
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x, mask, cache):
        """x (B, S, width); cache: [keys, values], (B, ·, width) each, of what stands before x, or []; x's own are added to it."""
        q, k, v = self.qkv(self.ln_1(x)).chunk(3, -1)
        if cache:
            k, v = (torch.cat(pair, 1) for pair in zip(cache, (k, v)))
        cache[:] = k, v
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))  # (B, nh, S, hs)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))
        return x + self.mlp(self.ln_2(x))


class DiffusionPrior(nn.Module):
    """f(z_i^(t), t, y): the transformer that predicts the unnoised z_i (§2.2). In and out at the diffusion's scale."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.text_in = nn.Linear(c.clip_text_width, c.width)
        self.z_t_in = nn.Linear(c.embed_dim, c.width)
        self.time_in = nn.Sequential(nn.Linear(c.width, c.width), nn.SiLU(), nn.Linear(c.width, c.width))
        self.z_i_in = nn.Linear(c.embed_dim, c.width)
        self.final_token = nn.Parameter(torch.randn(c.width) * 0.02)
        # text, then z_t, timestep, z_i and the final token at places of their own, however long the caption is
        self.positional_embedding = nn.Parameter(torch.randn(c.text_context + 4, c.width) * 0.02)
        self.blocks = nn.ModuleList(Block(c.width, c.heads) for _ in range(c.layers))
        self.ln_out = nn.LayerNorm(c.width)
        self.out = nn.Linear(c.width, c.embed_dim)
        if not c.unit_norm:
            self.register_buffer("mean", torch.zeros(c.embed_dim)), self.register_buffer("deviation", torch.ones(c.embed_dim))
        self.register_buffer("errors", torch.zeros(1000))  # after training, estimate_errors': what the analytic variance needs

    def sequence(self, z_i_t, t, text):
        """What the blocks read: (x (B, L + 4, width), mask (B, 1, L + 4, L + 4), True where a row may look at a column) (§2.2).

        In x the caption's L states, z_t, the timestep, z_i_t and the final token, each with its place's embedding; z_t, unless
        the config says otherwise, times √d, so that its coordinates are of order 1. No later place is seen, and no padding.
        """
        c = self.config
        states, mask = text["states"][:, :c.text_context], text["mask"][:, :c.text_context]
        z_t = text["z_t"] * (math.sqrt(c.embed_dim) if c.unit_norm else 1)
        tail = torch.stack([self.z_t_in(z_t), self.time_in(timestep_embedding(t, c.width)),
                            self.z_i_in(z_i_t), self.final_token.expand(len(t), -1)], 1)  # (B, 4, width)
        L = states.shape[1]
        x = torch.cat([self.text_in(states), tail], 1)  # (B, L + 4, width)
        x = x + torch.cat([self.positional_embedding[:L], self.positional_embedding[-4:]])
        causal = torch.ones(L + 4, L + 4, dtype=torch.bool, device=t.device).tril()
        return x, causal & F.pad(mask, (0, 4), value=True)[:, None, None]

    def forward(self, z_i_t, t, text, cache=None):
        """z_i_t (B, d) noised, t (B,), text {"states", "z_t", "mask"} of B captions → the estimate of z_i (B, d).

        cache: a list, empty at first. What stands before t sees neither t nor z_i: with a cache only the first call computes it.
        """
        x, mask = self.sequence(z_i_t, t, text)
        if cache:
            x, mask = x[:, -3:], mask[:, :, -3:]
        kept = [list(pair) for pair in cache or [[]] * self.config.layers]
        for block, pair in zip(self.blocks, kept):
            x = block(x, mask, pair)
        if cache is not None:
            cache[:] = [(k[:, :-3], v[:, :-3]) for k, v in kept]
        return self.out(self.ln_out(x[:, -1])).float()


# ----------------------------------------------------------------------------- its training

def drop_text(text, null, drop):
    """Put the null caption (one row) in the place of those where drop (B,) is True (§2.1, §2.2)."""
    return {k: torch.where(drop.view(-1, *[1] * (v.ndim - 1)), null[k], v) for k, v in text.items()}


def prior_loss(model, z_i, text, null, drop_caption=0.1):
    """E‖f(z_i^(t), t, y) − z_i‖² per coordinate, the caption (its states and z_t) dropped 10% of the time (§2.2, eq. 2).

    z_i (B, d) unit-norm, text of B captions, null of the empty caption.
    """
    alphas_cumprod, B = cosine_schedule(), len(z_i)
    t = torch.randint(len(alphas_cumprod), (B,)).to(z_i.device)  # drawn on the CPU: the same numbers on every device
    noise = torch.randn(z_i.shape).to(z_i.device)
    drop = torch.rand(B).to(z_i.device) < drop_caption
    z_0 = z_i * scale(z_i.shape[1])
    return F.mse_loss(model(q_sample(z_0, t, noise, alphas_cumprod), t, drop_text(text, null, drop)), z_0)


# ----------------------------------------------------------------------------- its sampler

def ladder(steps, top):
    """The timesteps that a sampler visits, ascending: `steps` integers from 0 to `top`, evenly spaced (§2.1, §2.2; Improved
    DDPM §4). Raises ValueError."""
    if not 1 <= steps <= top + 1:
        raise ValueError(f"steps must be between 1 and {top + 1}, not {steps}")
    return torch.linspace(0, top, steps, dtype=torch.float64).round().long().tolist() if steps > 1 else [top]


@torch.no_grad()
def estimate_errors(model, batches, points=112):
    """E‖x_0 − x̂_0‖²/d at every t, (1000,), at the diffusion's scale: what the analytic variance needs (§2.2; Analytic-DPM).

    batches: (z_i, text) of training embeddings and their captions, which are given and unguided. Measured at `points` of
    the t (every ninth), with straight lines between.
    """
    alphas_cumprod, errors = cosine_schedule(), []
    for z_i, text in batches:
        z_0, cache = z_i * scale(z_i.shape[1]), []
        for t in ladder(points, len(alphas_cumprod) - 1):
            t = torch.full((len(z_0),), t, device=z_0.device)
            z_i_t = q_sample(z_0, t, torch.randn(z_0.shape).to(z_0.device), alphas_cumprod)
            errors.append(F.mse_loss(model(z_i_t, t, text, cache), z_0))
    mean = torch.stack(errors).view(-1, 1, points).mean(0, keepdim=True)  # (1, 1, points): over the batches
    return F.interpolate(mean, len(alphas_cumprod), mode="linear", align_corners=True).flatten()


def randn(generators, shape, device):
    """Noise (B, …) of which row k comes from generators[k] (on the CPU): the same alone or in a batch."""
    return torch.stack([torch.randn(shape[1:], generator=g) for g in generators]).to(device)


def guided(f, x, text, null, guidance_scale):
    """f(x, y) with classifier-free guidance: f(x, ∅) + w (f(x, y) − f(x, ∅)) (§2.2; GLIDE eq. 5). w = 1 is none."""
    if guidance_scale == 1:
        return f(x, text)
    both = {k: torch.cat([v, null[k].expand_as(v)]) for k, v in text.items()}
    given, free = f(x.repeat(2, 1), both).chunk(2)
    return free + guidance_scale * (given - free)


@torch.no_grad()
def sample(model, text, null, generators, guidance_scale=None, steps=None, candidates=2, variance="analytic", bar=False):
    """z_i (B, d), unit-norm, for B captions: of `candidates` each, the one with the largest dot product with z_t (§2.2, table 3).

    generators: one torch.Generator a caption; guidance and steps are the config's where None. The network predicts z_i, so no
    step divides by √ᾱ and the ladder may start at the very top. Each step draws from q(x_s|x_t, x_0) with x̂_0 in x_0's place.
    Its variance β̃ ("fixed-small") knows nothing of x̂_0's own error; "analytic" adds it: β̃ + (factor of x̂_0)² · E‖x_0 −
    x̂_0‖²/d, the best single number at any stride (Analytic-DPM, in the form for an x_0-predictor: no difference of large
    numbers near t = T).
    """
    c, (B, d) = model.config, text["z_t"].shape
    text = {k: v.repeat_interleave(candidates, 0) for k, v in text.items()}
    device, shape = text["z_t"].device, (B, candidates, d)
    alphas_cumprod, cache = cosine_schedule(), []
    rungs = ladder(steps or c.steps, len(alphas_cumprod) - 1)
    z = randn(generators, shape, device).flatten(0, 1)
    for n in tqdm(reversed(range(len(rungs))), total=len(rungs), desc="prior", disable=not bar):
        f = lambda z, text: model(z, torch.full((len(z),), rungs[n], device=device), text, cache)
        z_0 = guided(f, z, text, null, c.guidance if guidance_scale is None else guidance_scale).clamp(-c.clamp, c.clamp)
        if n:
            factors = posterior(alphas_cumprod[rungs[n]], alphas_cumprod[rungs[n - 1]])
            from_z_0, from_z_t, beta_tilde = (float(factor) for factor in factors)
            error = float(model.errors[rungs[n]]) if variance == "analytic" else 0
            deviation = math.sqrt(beta_tilde + from_z_0 ** 2 * error)
            z = from_z_0 * z_0 + from_z_t * z + deviation * randn(generators, shape, device).flatten(0, 1)
    end = float((1 - alphas_cumprod[0]) / (1 - alphas_cumprod.float()[0]))  # 0.99947: Karlo's library ends so, in float32
    z_i = F.normalize(z_0, dim=-1) if c.unit_norm else end * z_0 * model.deviation + model.mean
    best = (F.normalize(z_i, dim=-1) * text["z_t"]).sum(1).view(B, candidates).argmax(1)
    return z_i.view(shape)[torch.arange(B, device=device), best]


@torch.no_grad()
def surprise(model, z_i, text, steps=32):
    """How badly the prior, given their captions, restores z_i (B, d), unit-norm, from noised copies: (B,), on average 1 for training's.

    ‖x_0 − x̂_0‖²/d in units of `errors`, the mean over `steps` timesteps; the noise is the same in every call, so that differences are
    z_i's own. Ours: with other weights, the same errors bound −log p(z_i|y), by which captions can be told apart (diffusion
    classifier, Li et al. 2023), and pictures of one caption as well. Infinite where `errors` were never estimated.
    """
    alphas_cumprod, generator, cache = cosine_schedule(), torch.Generator().manual_seed(0), []
    z_0, total = z_i * scale(z_i.shape[1]), 0
    for rung in ladder(steps, len(alphas_cumprod) - 1):
        t = torch.full((len(z_0),), rung, device=z_0.device)
        noise = torch.randn(z_0.shape[1], generator=generator).to(z_0.device)
        x_0 = model(q_sample(z_0, t, noise, alphas_cumprod), t, text, cache)
        total = total + (z_0 - x_0).square().mean(1) / model.errors[rung]
    return total / steps


# ----------------------------------------------------------------------------- the autoregressive prior: z_i as codes

@dataclass
class ARConfig:
    """Sizes of the autoregressive prior (table 3: latent decoder; what became of the text encoder, says ARPrior)."""
    embed_dim: int = 1024
    clip_text_width: int = 1024
    components: int = 319          # codes a z_i; training finds their number from the embeddings
    buckets: int = 1024            # values a code
    width: int = 1664
    layers: int = 24
    heads: int = 26


AR_PRESETS = {
    "shapes": ARConfig(embed_dim=128, clip_text_width=128, components=80, width=256, layers=4, heads=4),
    "laptop": ARConfig(embed_dim=512, clip_text_width=512, components=256, width=768, layers=12, heads=12),
    "paper": ARConfig(),
}


def pca(batches):
    """Mean (d,), components (d, d), one a row, and variances (d,), the largest first, of embeddings (n, d) in batches (§2.2).

    Float64, in one pass: mean and covariance are merged batch by batch (Chan et al. 1983), so that millions fit. Raises
    ValueError where an embedding is not finite, a coordinate constant, or the embeddings fewer than their dimensions.
    """
    n = mean = scatter = 0
    for z in batches:
        z = z.cpu().double()
        if not torch.isfinite(z).all():
            raise ValueError("PCA: an embedding holds values that are not finite (NaN or infinity)")
        off, share = z.mean(0) - mean, len(z) / max(1, n + len(z))
        scatter = scatter + (z - z.mean(0)).T @ (z - z.mean(0)) + n * share * torch.outer(off, off)
        n, mean = n + len(z), mean + share * off
    if n < len(mean):
        raise ValueError(f"PCA: {n} embeddings cannot give {len(mean)} components; at least as many embeddings are needed")
    covariance = scatter / n
    constant = (covariance.diagonal() <= 1e-12 * covariance.diagonal().max()).nonzero().flatten().tolist()
    if constant:
        raise ValueError(f"PCA: coordinate {constant[0]} is the same in every embedding ({len(constant)} of {len(mean)} are)")
    variances, vectors = torch.linalg.eigh(covariance)  # ascending
    return mean, vectors.T.flip(0), variances.flip(0)


def quantile_buckets(values, buckets):
    """Edges (…, buckets − 1) and centres (…, buckets), the medians, of buckets that hold equally many of values (…, n) (§2.2).

    Equally full buckets are fine where there is much to tell apart, and a bucket's number is a rank: it means the same in
    each dimension, and before anything is known all are equally likely. Equally wide ones leave most of 1024 to the tails.
    """
    values = values.sort().values
    where = torch.arange(1, 2 * buckets, device=values.device) / (2 * buckets) * (values.shape[-1] - 1)  # median, edge, median, …
    low = where.floor().long().clamp(max=values.shape[-1] - 2)
    quantiles = torch.lerp(values[..., low], values[..., low + 1], (where - low).to(values.dtype))
    return quantiles[..., 1::2].contiguous(), quantiles[..., ::2].contiguous()


def fit_codes(z_i, buckets=1024, lose=0.01):
    """The arrays that turn training embeddings z_i (N, d) into codes: {"mean", "components", "edges", "centres"} (§2.2).

    Kept are the fewest components for which what is cut off and what quantization blurs is under 1% of the variance (319 of
    the paper's 1024). At most 131,072 embeddings make the buckets. Raises ValueError as pca does, and for too few buckets.
    """
    mean, components, variances = pca(z_i.split(8192))
    values = ((z_i[::-(-len(z_i) // 131072)].cpu().double() - mean) @ components.T).T.contiguous()  # (d, n)
    edges, centres = quantile_buckets(values, buckets)
    blurred = (values - centres.gather(1, torch.searchsorted(edges, values))).square().mean(1)
    lost = 1 - (variances - blurred).cumsum(0) / variances.sum()
    if not (lost < lose).any():
        raise ValueError(f"{buckets} buckets lose {lost.min():.1%} of the variance, however many components are kept")
    kept = slice(int((lost < lose).nonzero().min()) + 1)
    codes = {"mean": mean, "components": components[kept], "edges": edges[kept], "centres": centres[kept]}
    return {k: v.float() for k, v in codes.items()}


# ----------------------------------------------------------------------------- its network, training and sampler

def cosines(buckets, width):
    """(buckets, width) cosines and sines of each bucket's rank, with half a wave to 64 waves from the first to the last."""
    angle = math.pi * (torch.arange(buckets)[:, None] + 0.5) / buckets * 128 ** torch.linspace(0, 1, (width + 1) // 2)
    return torch.cat([angle.cos(), angle.sin()], 1)[:, :width]


class ARPrior(nn.Module):
    """P(code | earlier codes, z_i·z_t, z_t, y), code by code: a causal transformer (§2.2).

    How the caption comes in, ours: each block's keys and values begin with the caption's, made from CLIP's states, as the
    decoder's attention has them. Table 3's latent decoder has a context of 384: room for z_t, the dot product and 319
    codes, not for 256 caption tokens before them. With the text encoder of that column it would have 2.0 billion parameters
    where the table says 1: CLIP's text tower, which the diffusion prior reads too, is our text encoder, and the latent
    decoder, with its keys and values for the caption, has 0.94 billion.

    Buckets are ordered, so their vectors, which the logits use too, start from cosines of their rank: neighbours are alike and
    need not each be learned. Each place scales them in a way of its own, or all components' third buckets would look alike.
    """

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.text_in, self.z_t_in = nn.Linear(c.clip_text_width, c.width), nn.Linear(c.embed_dim, c.width)
        self.text_kv = nn.ModuleList(nn.Linear(c.width, 2 * c.width) for _ in range(c.layers))
        self.buckets = nn.Parameter(cosines(c.buckets, c.width))
        self.place_scale = nn.Parameter(torch.randn(c.components, c.width))
        self.positional_embedding = nn.Parameter(torch.randn(c.components + 1, c.width) * 0.02)
        self.blocks = nn.ModuleList(Block(c.width, c.heads) for _ in range(c.layers))
        self.ln_out = nn.LayerNorm(c.width)
        self.out = nn.Linear(c.width, c.width)
        nn.init.zeros_(self.out.weight), nn.init.zeros_(self.out.bias)  # all buckets equally likely, which they are
        K, n = c.components, c.buckets
        for name, *shape in (("mean", c.embed_dim), ("components", K, c.embed_dim), ("edges", K, n - 1), ("centres", K, n),
                             ("dot_edges", n - 1)):  # fit_codes' four, and the dot product's from quantile_buckets
            self.register_buffer(name, torch.zeros(shape))

    def encode(self, z_i):
        """The codes (B, K) of z_i (B, d): the bucket of each component."""
        with torch.autocast(z_i.device.type, enabled=False):  # bfloat16 has too few digits for 1024 buckets
            values = (z_i - self.mean) @ self.components.T  # (B, K)
        return torch.searchsorted(self.edges, values.T.contiguous()).T

    def decode(self, codes):
        """z_i (B, d) of codes (B, K): the buckets' centres, the mean added back, unit norm again."""
        values = self.centres[torch.arange(codes.shape[1], device=codes.device), codes]
        return F.normalize(values @ self.components + self.mean, dim=-1)

    def forward(self, tokens, text, cache=None):
        """Logits (B, n, buckets) of what follows each of tokens (B, n): the dot product's bucket, then codes.

        cache: a list, empty at first, of each block's keys and values. With it, only tokens that it has not seen are given.
        """
        cache, (B, L) = [] if cache is None else cache, text["mask"].shape
        if not cache:
            states = self.text_in(text["states"])
            cache += [list(kv(states).chunk(2, -1)) for kv in self.text_kv]
        begun = cache[0][0].shape[1] - L  # how many places have been: z_t has place 0, the dot product 1, code k has k + 1
        place = max(1, begun)
        x = F.embedding(tokens, self.buckets) * self.place_scale[place - 1:place - 1 + tokens.shape[1]]
        if not begun:
            x = torch.cat([self.z_t_in(text["z_t"] * math.sqrt(self.config.embed_dim))[:, None], x], 1)
        S = x.shape[1]
        x = x + self.positional_embedding[begun:begun + S]
        causal = torch.ones(S, begun + S, dtype=torch.bool, device=x.device).tril(begun)
        mask = torch.cat([text["mask"][:, None].expand(-1, S, -1), causal.expand(B, -1, -1)], 2)[:, None]  # (B, 1, S, ·)
        for block, pair in zip(self.blocks, cache):
            x = block(x, mask, pair)
        h = self.out(self.ln_out(x[:, -tokens.shape[1]:]))
        return (h @ self.buckets.T / math.sqrt(self.config.width)).float()


def ar_loss(model, z_i, text, null, drop_caption=0.1):
    """Cross-entropy of each code given those before it, in nats, the caption (its states and z_t) dropped 10% of the time (§2.2).

    z_i (B, d) unit-norm, text of B captions, null of the empty caption. The dot product stays: guidance is for the text.
    """
    codes = model.encode(z_i)
    dot = torch.searchsorted(model.dot_edges, (z_i * text["z_t"]).sum(1, keepdim=True))
    drop = torch.rand(len(z_i)).to(z_i.device) < drop_caption
    logits = model(torch.cat([dot, codes[:, :-1]], 1), drop_text(text, null, drop))
    return F.cross_entropy(logits.flatten(0, 1), codes.flatten())


@torch.no_grad()
def draw_codes(model, text, null, generators, guidance_scale=1.0, temperature=1.0, percentile=50.0, bar=False):
    """Codes (B, K) for B captions, one after the other: a token a step, the earlier ones' keys and values kept (§2.2).

    generators: one torch.Generator a caption. percentile: the token for z_i·z_t is drawn from those above this percentile
    of the training distribution. Guidance is on the logits. A bucket is drawn by its rank, the cumulative probability
    that a uniform number falls in, so that a rounding error can move it to its neighbour at most. Raises ValueError.
    """
    if not 0 <= percentile <= 100 or not temperature > 0:
        raise ValueError(f"percentile {percentile} must be between 0 and 100, temperature {temperature} above 0")
    K, buckets = model.config.components, model.config.buckets
    uniform = torch.stack([torch.rand(K + 1, generator=g) for g in generators]).to(text["z_t"].device)
    rank = percentile / 100 + (1 - percentile / 100) * uniform[:, :1]  # the buckets are equally full: a share is a bucket
    token, codes, cache = (rank * buckets).long().clamp(max=buckets - 1), [], []
    for k in tqdm(range(K), desc="ar-prior", disable=not bar):
        logits = guided(lambda token, text: model(token, text, cache)[:, -1], token, text, null, guidance_scale)
        share = (logits / temperature).softmax(1).cumsum(1)
        token = torch.searchsorted(share, uniform[:, k + 1:k + 2] * share[:, -1:]).clamp(max=buckets - 1)
        codes.append(token)
    return torch.cat(codes, 1)


def ar_sample(model, text, null, generators, guidance_scale=1.0, temperature=1.0, percentile=50.0, bar=False):
    """z_i (B, d), unit-norm, for B captions from the autoregressive prior: draw_codes, decoded (§2.2)."""
    return model.decode(draw_codes(model, text, null, generators, guidance_scale, temperature, percentile, bar))


# ----------------------------------------------------------------------------- both, compared

def main():
    """The script: what --help says."""
    here = Path(__file__).parent / "weights/shapes"
    parser = argparse.ArgumentParser(
        description="Draw image embeddings for a caption from each prior and compare them: each one's cosine with z_t, and with "
        "the others. Captions that leave much open spread more.")
    parser.add_argument("captions", nargs="+", metavar="CAPTION")
    parser.add_argument("--n", type=int, default=6, help="how many z_i to draw (default 6)")
    parser.add_argument("--guidance", type=float, default=1.0, help="guidance scale; 1 is none (default 1)")
    parser.add_argument("--steps", type=int, default=64, help="of the diffusion prior (the paper's 64)")
    parser.add_argument("--variance", default="analytic", choices=["analytic", "fixed-small"], help="(the paper: analytic)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the autoregressive prior (default 1)")
    parser.add_argument("--percentile", type=float, default=50.0, help="of z_i·z_t, drawn above it (the paper: 50)")
    parser.add_argument("--weights", type=Path, default=here, help="folder of clip.pt, prior.pt and ar-prior.pt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    args = parser.parse_args()
    import clip_embed as ce
    with ce.one_line_errors():
        for name, low, high in (("n", 2, 1000), ("steps", 1, 1000), ("guidance", 0, 100), ("temperature", 0.01, 100),
                                ("percentile", 0, 100), ("seed", 0, 1 << 48)):
            if not low <= getattr(args, name) <= high:
                raise ce.UserError(f"--{name} {getattr(args, name)}: must be between {low} and {high}")
        device = ce.pick_device(args.device)
        clip_path = args.weights / "clip.pt"
        clip, tokenizer = ce.load_clip(clip_path)
        mark = ce.fingerprint(clip)
        clip.to(device)
        for stage, network, config in (("prior", DiffusionPrior, PriorConfig), ("ar-prior", ARPrior, ARConfig)):
            path = args.weights / f"{stage}.pt"
            checkpoint = ce.read_checkpoint(path, stage, clip=(mark, clip_path))
            model = ce.load_model(network, config, checkpoint, path).to(device)
            for caption in args.captions:
                text, null = ce.encode_captions(clip, tokenizer, [caption] * args.n)
                generators = [torch.Generator().manual_seed(args.seed + k) for k in range(args.n)]
                if stage == "prior":
                    z_i = sample(model, text, null, generators, args.guidance, args.steps, variance=args.variance, bar=True)
                else:
                    z_i = ar_sample(model, text, null, generators, args.guidance, args.temperature, args.percentile, bar=True)
                cosine, with_z_t = z_i @ z_i.T, (z_i * text["z_t"]).sum(1)
                print(f"{caption!r}, {stage}\n       z_t   " + "".join(f"  z_i {k}" for k in range(args.n)))
                for k in range(args.n):
                    print(f"z_i {k} {float(with_z_t[k]):6.3f}  " + "".join(f"{float(c):7.3f}" for c in cosine[k]))
                others = float(cosine[~torch.eye(args.n, dtype=torch.bool, device=device)].mean())
                print(f"mean cosine with z_t {float(with_z_t.mean()):.3f}, with one another {others:.3f}", flush=True)


if __name__ == "__main__":
    main()
