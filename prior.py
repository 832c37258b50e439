"""The diffusion prior: a CLIP image embedding z_i from a caption (§2.2).

In:   a caption as CLIP read it, {"tokens", "states", "z_t", "mask"}
Out:  z_i (B, d), unit-norm

A diffusion model P(z_i|y) whose network is a decoder-only transformer with a causal mask. Its sequence is

    encoded text (L) | z_t | timestep | noised z_i | a learned token

and what comes out at the last position is the prediction of z_i itself, not of the noise: the loss is
E‖f(z_i^(t), t, y) − z_i‖². The caption is dropped 10% of the time, so that sampling can be guided. To sample:
64 of the 1000 steps, ancestral, twice over; the candidate closer to z_t is kept. (The paper's variance is the
analytic one; ours, so far, is β̃.)

Scale matters: a unit vector in d dimensions has coordinates near 1/√d, lost in noise of deviation 1 at nearly
every step. The paper multiplies by 17.2, which at d = 1024 makes their deviation 0.54, that of ImageNet's
pixels in [−1, 1]; we keep that deviation at any d. Everyone outside this file sees unit vectors.

    python prior.py "a red circle"           # draws z_i for a caption and compares them
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
    """Sizes (table 3, column "diffusion prior")."""
    embed_dim: int = 1024          # d of z_i and z_t
    clip_text_width: int = 1024    # width of CLIP's text states
    text_context: int = 256
    width: int = 2048
    layers: int = 24
    heads: int = 32


PRESETS = {
    "shapes": PriorConfig(embed_dim=128, clip_text_width=128, text_context=77, width=256, layers=4, heads=4),
    "laptop": PriorConfig(embed_dim=512, clip_text_width=512, text_context=77, width=768, layers=12, heads=12),
    "paper": PriorConfig(),
}
PAPER_DEVIATION = 17.2 / 1024 ** 0.5  # of a coordinate of the scaled z_i (appendix C)


# ----------------------------------------------------------------------------- Gaussian diffusion

@lru_cache
def cosine_schedule(T=1000):
    """ᾱ_0 … ᾱ_{T-1}, float64 (T,), of the cosine schedule (Improved DDPM eq. 17; β clipped at 0.999)."""
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
    from_x_t = (alpha_t / alpha_s) ** 0.5 * (1 - alpha_s) / (1 - alpha_t)
    return from_x_0, from_x_t, beta * (1 - alpha_s) / (1 - alpha_t)


def ladder(steps, top):
    """The timesteps that a sampler visits, ascending: `steps` integers from 0 to `top`, evenly spaced. Raises ValueError."""
    if not 1 <= steps <= top + 1:
        raise ValueError(f"steps must be between 1 and {top + 1}, not {steps}")
    return torch.linspace(0, top, steps, dtype=torch.float64).round().long().tolist() if steps > 1 else [top]


# ----------------------------------------------------------------------------- the transformer

def timestep_embedding(t, dim):
    """Sinusoids of the timesteps t (B,) → (B, dim), cosines first, as guided-diffusion has them."""
    freqs = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = t[:, None].float() * freqs
    return torch.cat([angles.cos(), angles.sin()], 1)


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width, heads):
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"a width of {width} cannot be shared by {heads} heads")
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x, mask):
        q, k, v = self.qkv(self.ln_1(x)).chunk(3, -1)
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

    def forward(self, z_i_t, t, text):
        """z_i_t (B, d) noised, t (B,), text {"states", "z_t", "mask"} of B captions → the estimate of z_i (B, d)."""
        c = self.config
        states, mask = text["states"][:, :c.text_context], text["mask"][:, :c.text_context]
        tail = torch.stack([self.z_t_in(text["z_t"] * math.sqrt(c.embed_dim)), self.time_in(timestep_embedding(t, c.width)),
                            self.z_i_in(z_i_t), self.final_token.expand(len(t), -1)], 1)  # (B, 4, width)
        L = states.shape[1]
        x = torch.cat([self.text_in(states), tail], 1)
        x = x + torch.cat([self.positional_embedding[:L], self.positional_embedding[-4:]])
        causal = torch.ones(L + 4, L + 4, dtype=torch.bool, device=t.device).tril()
        mask = causal & F.pad(mask, (0, 4), value=True)[:, None, None]  # (B, 1, S, S): no later place, no padding
        for block in self.blocks:
            x = block(x, mask)
        return self.out(self.ln_out(x[:, -1])).float()


def scale(d):
    """What unit embeddings are multiplied by for the diffusion: 17.2 at d = 1024, the same deviation elsewhere (appendix C)."""
    return PAPER_DEVIATION * math.sqrt(d)


# ----------------------------------------------------------------------------- training

def drop_text(text, null, drop):
    """Put the null caption (one row) in the place of those where drop (B,) is True."""
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


# ----------------------------------------------------------------------------- sampling

def randn(generators, shape, device):
    """Noise (B, …) of which row k comes from generators[k] (on the CPU): the same alone or in a batch."""
    return torch.stack([torch.randn(shape[1:], generator=g) for g in generators]).to(device)


def guided(model, z_i_t, t, text, null, guidance_scale):
    """The estimate of z_i with classifier-free guidance: f(∅) + w (f(y) − f(∅)). w = 1 is none."""
    t = torch.full((len(z_i_t),), t, device=z_i_t.device)
    if guidance_scale == 1:
        return model(z_i_t, t, text)
    both = {k: torch.cat([v, null[k].expand_as(v)]) for k, v in text.items()}
    given, free = model(z_i_t.repeat(2, 1), t.repeat(2), both).chunk(2)
    return free + guidance_scale * (given - free)


@torch.no_grad()
def sample(model, text, null, generators, guidance_scale=1.0, steps=64, candidates=2, bar=False):
    """z_i (B, d), unit-norm, for B captions: of `candidates` each, the one with the largest dot product with z_t (§2.2).

    generators: one torch.Generator a caption. The network predicts z_i, so no step divides by √ᾱ and the ladder
    may start at the very top. Each step draws from the posterior with variance β̃ ("fixed small").
    """
    B, d = text["z_t"].shape
    text = {k: v.repeat_interleave(candidates, 0) for k, v in text.items()}
    device, shape = text["z_t"].device, (B, candidates, d)
    alphas_cumprod = cosine_schedule()
    rungs = ladder(steps, len(alphas_cumprod) - 1)
    z = randn(generators, shape, device).flatten(0, 1)
    for n in tqdm(reversed(range(len(rungs))), total=len(rungs), desc="prior", disable=not bar):
        z_0 = guided(model, z, rungs[n], text, null, guidance_scale)
        if n:
            from_z_0, from_z_t, variance = (float(c) for c in posterior(alphas_cumprod[rungs[n]], alphas_cumprod[rungs[n - 1]]))
            z = from_z_0 * z_0 + from_z_t * z + math.sqrt(variance) * randn(generators, shape, device).flatten(0, 1)
    z_i = F.normalize(z_0, dim=-1)
    best = (z_i * text["z_t"]).sum(1).view(B, candidates).argmax(1)
    return z_i.view(shape)[torch.arange(B, device=device), best]


def main():
    """The script: what --help says."""
    here = Path(__file__).parent / "weights/shapes"
    parser = argparse.ArgumentParser(
        description="Draw image embeddings for a caption and compare them: each one's cosine with z_t, and with the others. "
        "Captions that leave much open spread more.")
    parser.add_argument("captions", nargs="+", metavar="CAPTION")
    parser.add_argument("--n", type=int, default=6, help="how many z_i to draw (default 6)")
    parser.add_argument("--guidance", type=float, default=1.0, help="guidance scale; 1 is none (default 1)")
    parser.add_argument("--steps", type=int, default=64, help="sampling steps (the paper's 64)")
    parser.add_argument("--weights", type=Path, default=here, help="folder of clip.pt and prior.pt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    args = parser.parse_args()
    import clip_embed as ce
    with ce.one_line_errors():
        if not (2 <= args.n <= 1000 and 1 <= args.steps <= 1000 and 0 <= args.guidance <= 100):
            raise ce.UserError("--n must be between 2 and 1000, --steps between 1 and 1000, --guidance between 0 and 100")
        device = ce.pick_device(args.device)
        path, clip_path = args.weights / "prior.pt", args.weights / "clip.pt"
        (clip, tokenizer), checkpoint = ce.load_clip(clip_path), ce.read_checkpoint(path, "prior")
        ce.check_clip(checkpoint, path, ce.fingerprint(clip), clip_path)
        clip, model = clip.to(device), ce.load_model(DiffusionPrior, PriorConfig, checkpoint, path).to(device)
        for caption in args.captions:
            text, null = ce.encode_captions(clip, tokenizer, [caption] * args.n)
            generators = [torch.Generator().manual_seed(args.seed + k) for k in range(args.n)]
            z_i = sample(model, text, null, generators, args.guidance, args.steps, bar=True)
            cosine = z_i @ z_i.T
            print(f"{caption!r}\n       z_t   " + "".join(f"  z_i {k}" for k in range(args.n)))
            for k in range(args.n):
                print(f"z_i {k} {float(z_i[k] @ text['z_t'][k]):6.3f}  " + "".join(f"{float(c):7.3f}" for c in cosine[k]))
            others = cosine[~torch.eye(args.n, dtype=torch.bool, device=device)]
            with_z_t = float((z_i * text["z_t"]).sum(1).mean())
            print(f"mean cosine with z_t {with_z_t:.3f}, with one another {float(others.mean()):.3f}")


if __name__ == "__main__":
    main()
