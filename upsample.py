"""The two upsamplers: 64×64 → 256×256 → 1024×1024 (§2.1).

In:   low (B, 3, h, h) in [-1, 1], the picture of the stage before
Out:  images (B, 3, 4h, 4h) in [-1, 1]

Diffusion models P(x|low). The low-resolution picture, enlarged, is concatenated to the noisy one,
and an ADM U-Net of convolutions alone predicts the noise: upsampler_loss is E‖ε − ε(x_t, t, low)‖².
There is no caption, no z_i and no guidance. The networks train on random crops a quarter of the
side and are applied to whole pictures. The condition is damaged in training, so that they repair
errors of the stage before: a Gaussian blur for the first, the BSR mix of blur, resizing, noise and
JPEG for the second. Sampling is DDIM. The first has the cosine schedule, the second the linear one.

Not in the paper: not all crops are damaged; sampling starts below t = 999 (top_step). The small
`shapes` networks fold pixels into channels, predict a residual (eps_from_residual), and train on
crops that hold edges (tries), the second on smaller ones.

    python upsample.py picture.png --size 1024
"""

import argparse
import io
import math
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageFilter
from tqdm import tqdm


@dataclass
class UpsamplerConfig:
    """Sizes of the network, and how it is sampled (table 3, 64→256 and 256→1024; §2.1)."""
    low_size: int = 64
    image_size: int = 256
    schedule: str = "cosine"       # or "linear"
    degradation: str = "blur"      # or "bsr"
    steps: int = 27                # DDIM steps
    ladder_power: float = 1.0      # their spacing (ladder)
    crop: float = 0.25             # side of a training crop, as a share of the picture's
    damaged: float = 0.5           # share of the training crops that are damaged
    tries: int = 1                 # crops drawn for each one kept, which varies most
    patch_size: int = 1
    channels: int = 320
    depth: int = 3                 # residual blocks a level
    multiples: tuple = (1, 2, 3, 4)
    norm_groups: int = 32
    dropout: float = 0.0
    prediction: str = "eps"        # or "residual" (eps_from_residual)
    scale_shift: bool = True       # ADM's blocks; False: the timestep embedding is only added
    enlarge: str = "bilinear"      # interpolation of the condition; or "bicubic"
    top_signal: float = 0.015      # √ᾱ where sampling begins (top_step); 0: at t = 999
    eta: float = 0.0               # DDIM's; 1: ancestral, of variance β̃
    float32: bool = False          # sample with ᾱ rounded, as Karlo's library does
    last: bool = False             # a second network for the last step (Karlo)


SECOND = {"low_size": 256, "image_size": 1024, "schedule": "linear", "degradation": "bsr",
          "damaged": 1.0, "steps": 15, "depth": 2, "multiples": (1, 1, 2, 2, 4, 4)}  # 256→1024
TOY = {"prediction": "residual", "tries": 3, "steps": 2, "channels": 32, "depth": 1,
       "multiples": (1, 2, 2), "norm_groups": 8}
PRESETS = {
    "shapes": {256: UpsamplerConfig(patch_size=2, **TOY),
               1024: UpsamplerConfig(patch_size=4, crop=0.125,
                                     **SECOND | TOY | {"damaged": 0.25})},
    "laptop": {256: UpsamplerConfig(channels=96, depth=2, dropout=0.1),
               1024: UpsamplerConfig(channels=48, norm_groups=16, **SECOND)},
    "paper": {256: UpsamplerConfig(dropout=0.1), 1024: UpsamplerConfig(channels=192, **SECOND)},
}


@lru_cache
def cosine_schedule(T=1000):
    """ᾱ_0 … ᾱ_{T-1}, float64 (T,), of the cosine schedule (table 3; Improved DDPM eq. 17)."""
    f = torch.cos((torch.arange(T + 1, dtype=torch.float64) / T + 0.008) / 1.008 * math.pi / 2) ** 2
    betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    return torch.cumprod(1 - betas, 0)


@lru_cache
def linear_schedule(T=1000):
    """ᾱ_0 … ᾱ_{T-1}, float64 (T,), for β rising evenly from 1e-4 to 0.02 (table 3; DDPM §4)."""
    return torch.cumprod(1 - torch.linspace(1e-4, 0.02, T, dtype=torch.float64), 0)


SCHEDULES = {"cosine": cosine_schedule, "linear": linear_schedule}
RESIDUAL = 0.05  # deviation of x_0 − condition in the world of shapes


def at(values, t, x):
    """values[..., t] as float32, shaped to multiply x: t (B,) → (…, B, 1, 1, …)."""
    return values.float().to(t.device)[..., t].unflatten(-1, (-1, *[1] * (x.ndim - 1)))


def q_sample(x_0, t, eps, alphas_cumprod):
    """x_t ~ q(x_t|x_0) = N(√ᾱ_t x_0, (1 − ᾱ_t) I) from the noise eps (DDPM eq. 4). t (B,) int64."""
    return at(alphas_cumprod.sqrt(), t, x_0) * x_0 + at((1 - alphas_cumprod).sqrt(), t, x_0) * eps


def predict_x_0(x_t, eps, alpha):
    """x̂_0 = (x_t − √(1−ᾱ_t) ε) / √ᾱ_t (DDPM eq. 15)."""
    return (x_t - math.sqrt(1 - alpha) * eps) / math.sqrt(alpha)


def ddim_step(x_0, eps, alpha_t, alpha_s, eta):
    """(mean, deviation) of x_s from the estimates x_0 and eps, by DDIM with η (DDIM eqs. 12, 16).

    alpha_t, alpha_s: ᾱ at the two steps, floats. η = 0 draws nothing, η = 1 as much as DDPM.
    """
    deviation = eta * math.sqrt((1 - alpha_s) / (1 - alpha_t) * (1 - alpha_t / alpha_s))
    return math.sqrt(alpha_s) * x_0 + math.sqrt(1 - alpha_s - deviation ** 2) * eps, deviation


def noisy_residual(x_t, condition, alpha_t):
    """(x_t/√ᾱ_t − condition, σ²): the residual x_0 − condition plus σ ε, σ² = (1−ᾱ_t)/ᾱ_t."""
    return x_t / alpha_t.sqrt() - condition, 1 / alpha_t - 1


def eps_from_residual(x_t, condition, output, alpha_t):
    """ε of x̂_0 = condition + share · r + c_out · (A + B sigmoid(4 g)) (EDM eq. 7).

    r, σ²: noisy_residual's. output (B, 8, H, W): A (3 channels), a, B (3) and g. A and A + B are
    two colours with a switch between them, for sharp edges. For a residual of variance
    v = RESIDUAL² exp(a), Bayes' estimate is share · r, share = v/(v + σ²). Not in the paper: a
    small network cannot carry every pixel's noise to its output. a says where x_t is trusted.
    """
    r, variance = noisy_residual(x_t, condition, alpha_t)
    A, a, B, g = output.split((3, 1, 3, 1), 1)
    share = torch.sigmoid(a + math.log(RESIDUAL ** 2) - variance.log())
    c_out = (variance * RESIDUAL ** 2 / (variance + RESIDUAL ** 2)).sqrt()
    x_0 = condition + share * r + c_out * (A + B * torch.sigmoid(4 * g))
    return (x_t - alpha_t.sqrt() * x_0) / (1 - alpha_t).sqrt()


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


class Upsampler(nn.Module):
    """The U-Net: (x_t, t, low) → ε (B, 3, H, W). Convolutions alone, so any size goes in (§2.1)."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        emb = 4 * c.channels
        self.time_embed = nn.Sequential(nn.Linear(c.channels, emb), nn.SiLU(), nn.Linear(emb, emb))
        res = partial(ResBlock, emb_channels=emb, groups=c.norm_groups, dropout=c.dropout,
                      scale_shift=c.scale_shift)
        widths = [c.channels * c.multiples[0]]  # of each skip connection
        self.conv_in = nn.Conv2d(6 * c.patch_size ** 2, widths[0], 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for k, multiple in enumerate(c.multiples):
            for _ in range(c.depth):
                self.down.append(res(widths[-1], multiple * c.channels))
                widths.append(multiple * c.channels)
            if k < len(c.multiples) - 1:
                self.down.append(res(widths[-1], widths[-1], resample="down"))
                widths.append(widths[-1])
        width = widths[-1]
        self.middle = nn.ModuleList([res(width, width), res(width, width)])
        for k, multiple in reversed(list(enumerate(c.multiples))):
            for n in range(c.depth + 1):
                blocks = [res(width + widths.pop(), multiple * c.channels)]
                width = multiple * c.channels
                if k and n == c.depth:
                    blocks.append(res(width, width, resample="up"))
                self.up.append(nn.ModuleList(blocks))
        self.norm_out = nn.GroupNorm(c.norm_groups, width)
        area = c.patch_size ** 2
        self.conv_out = zero(nn.Conv2d(width, 3 * area, 3, padding=1))
        if c.prediction == "residual":
            self.conv_out = nn.Sequential(nn.Conv2d(width, 128, 3, padding=1), nn.SiLU(),
                                          nn.Conv2d(128, 8 * area, 1))
        if c.last:
            self.last = Upsampler(replace(c, last=False))

    def forward(self, x_t, t, low):
        """x_t (B, 3, H, W), t (B,), low (B, 3, h, h); patch_size · 2^(levels − 1) divides H."""
        c = self.config
        emb = self.time_embed(timestep_embedding(t, c.channels))
        condition = F.interpolate(low, x_t.shape[-2:], mode=c.enlarge,
                                  antialias=c.enlarge == "bicubic")  # (B, 3, H, W)
        alpha_t, x = at(SCHEDULES[c.schedule](), t, x_t), x_t
        if c.prediction == "residual":
            r, variance = noisy_residual(x_t, condition, alpha_t)
            x = r * RESIDUAL / (variance + RESIDUAL ** 2)  # much noise fades
        h = self.conv_in(F.pixel_unshuffle(torch.cat([x, condition], 1), c.patch_size))
        skips = [h]
        for block in self.down:
            h = block(h, emb)
            skips.append(h)
        for block in self.middle:
            h = block(h, emb)
        for blocks in self.up:
            h = torch.cat([h, skips.pop()], 1)
            for block in blocks:
                h = block(h, emb)
        out = F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(h))).float(), c.patch_size)
        if c.prediction == "residual":
            out = eps_from_residual(x_t, condition, out, alpha_t)
        return out


def gaussian_blur(images, sigma=0.6):
    """Blur (B, C, H, W) by a 3×3 Gaussian kernel, its borders mirrored (§2.1; appendix C)."""
    kernel = torch.exp(-torch.tensor([1.0, 0.0, 1.0]) / (2 * sigma ** 2))
    kernel = (kernel / kernel.sum()).to(images)
    C = images.shape[1]
    x = F.pad(images, (1, 1, 1, 1), "reflect")
    x = F.conv2d(x, kernel.view(1, 1, 1, 3).expand(C, 1, 1, 3), groups=C)
    return F.conv2d(x, kernel.view(1, 1, 3, 1).expand(C, 1, 3, 1), groups=C)


def bsr_degrade(picture, rng):
    """Damage a Pillow picture as BSRGAN does, its size kept (§2.1).

    Blur, down-and-up resizing, noise and JPEG in random order, each with probability one half, with
    strengths near latent diffusion's light variant. rng: a numpy Generator.
    """
    filters = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.BOX)

    def blur(p):
        wide, high = rng.uniform(0.2, 1.2, 2)  # pixels, along and across: anisotropic
        return p.filter(ImageFilter.GaussianBlur((wide, high)))

    def resize(p):
        small = tuple(round(side * rng.uniform(0.5, 1)) for side in p.size)
        return p.resize(small, filters[rng.integers(3)]).resize(p.size, filters[rng.integers(3)])

    def noise(p):
        pixels = np.asarray(p, np.float32)
        channels = 1 if rng.random() < 0.4 else 3
        grain = rng.normal(0, rng.uniform(1, 8), (*pixels.shape[:2], channels))
        return Image.fromarray((pixels + grain).round().clip(0, 255).astype(np.uint8))

    def jpeg(p):
        file = io.BytesIO()
        p.save(file, "JPEG", quality=int(rng.integers(50, 96)))
        return Image.open(file).convert("RGB")

    for damage in rng.permutation([blur, resize, noise, jpeg]):
        if rng.random() < 0.5:
            picture = damage(picture)
    return picture


def training_crops(picture, config, rng, count):
    """`count` aligned pairs of one Pillow picture: (high, low), uint8 (count, 3, ·, ·) each.

    low, the area average of high, is damaged whole or not (config.damaged), then cropped where it
    varies most (tries), on its own grid: its pixel (i, j) lies over (4i … 4i+3, 4j … 4j+3) of high
    (§2.1). rng: a numpy Generator.
    """
    factor, side = config.image_size // config.low_size, round(config.low_size * config.crop)
    small = picture.reduce(factor)
    to_tensor = lambda p: torch.from_numpy(np.array(p)).permute(2, 0, 1)
    highs, lows = [], []
    for _ in range(count):
        damaged, chosen = small, rng.random() < config.damaged
        if chosen and config.degradation == "bsr":
            damaged = bsr_degrade(small, rng)
        elif chosen:
            blurred = gaussian_blur(to_tensor(small)[None].float())[0].round().byte()
            damaged = Image.fromarray(blurred.permute(1, 2, 0).numpy())
        places = rng.integers(config.low_size - side + 1, size=(config.tries, 2)).tolist()
        boxes = [(x, y, x + side, y + side) for x, y in places]
        box = max(boxes, key=lambda box: np.asarray(small.crop(box)).std())
        lows.append(to_tensor(damaged.crop(box)))
        highs.append(to_tensor(picture.crop(tuple(factor * place for place in box))))
    return torch.stack(highs), torch.stack(lows)


def randn(generators, shape, device):
    """Noise (B, …), row k from generators[k] (on the CPU): the same alone or in a batch."""
    return torch.stack([torch.randn(shape[1:], generator=g) for g in generators]).to(device)


def upsampler_loss(model, high, low, generators, time_power=1.0):
    """E‖ε − ε(x_t, t, low)‖² of crops (§2.1; DDPM eq. 14).

    high (B, 3, H, W), low (B, 3, H/4, W/4) in [-1, 1]; generators: one torch.Generator a row.
    t = 1000 u^time_power, u uniform: 1 is the paper's; above 1 low t come more often.
    """
    alphas_cumprod = SCHEDULES[model.config.schedule]()
    u = torch.cat([torch.rand(1, generator=g) for g in generators]).to(high.device)
    t = (1000 * u ** time_power).long()
    noise = randn(generators, high.shape, high.device)
    eps = model(q_sample(high, t, noise, alphas_cumprod), t, low)
    error = (eps - noise) ** 2
    if model.config.prediction == "residual":  # the squared error of its output
        error = error * (1 + at(1 / alphas_cumprod - 1, t, eps) / RESIDUAL ** 2)
    return error.mean()


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


@torch.no_grad()
def sample(model, low, generators, steps=None, bar=False):
    """Images (B, 3, 4h, 4h) in [-1, 1] from low (B, 3, h, h) (§2.1, table 3; DDIM eqs. 12, 16).

    generators: one torch.Generator a picture; steps: None for the config's.
    """
    c = model.config
    size = low.shape[-1] * c.image_size // c.low_size
    exact = SCHEDULES[c.schedule]()
    alphas_cumprod = exact.float() if c.float32 else exact
    rungs = ladder(steps or c.steps, top_step(alphas_cumprod, c.top_signal), c.ladder_power)
    x = randn(generators, (len(low), 3, size, size), low.device)
    for t, s in tqdm([*zip(rungs, [None, *rungs])][::-1], f"upsample-{size}", disable=not bar):
        alpha_t = float(alphas_cumprod[t])
        alpha_s = 1.0 if s is None else float(alphas_cumprod[s])
        network = model.last if c.last and s is None else model
        eps = network(x, torch.full((len(x),), t, device=x.device), low)
        x_0 = predict_x_0(x, eps, alpha_t).clamp(-1, 1)
        eps = (x - math.sqrt(alpha_t) * x_0) / math.sqrt(1 - alpha_t)  # of the clamped x̂_0
        x, deviation = ddim_step(x_0, eps, alpha_t, alpha_s, c.eta)
        if s is not None and c.eta:
            x = x + deviation * randn(generators, x.shape, x.device)
    return x * float((1 - exact[0]) / (1 - alphas_cumprod[0]))  # 1, or 0.99947 (Karlo's float32)


def main():
    parser = argparse.ArgumentParser(
        description="Enlarge a picture: it is scaled to 64×64 and goes through the upsamplers. The "
        "shipped ones know flat shapes, not photographs.")
    here, add = Path(__file__).parent / "weights/shapes", parser.add_argument
    add("picture", help="any picture; it is cropped to a square")
    add("--size", type=int, default=256, choices=[256, 1024], help="(default 256)")
    add("--weights", type=Path, default=here, help="folder of checkpoints")
    add("--seed", type=int, default=0)
    add("--device", default="auto", help="auto, cuda, mps or cpu")
    add("--out", type=Path, default=Path("upsample.png"), help="both pictures (upsample.png)")
    args = parser.parse_args()
    import clip_embed as ce
    from weights.checkpoints import check_out, load_stage
    with ce.one_line_errors():
        ce.check_ranges(args, seed=(0, 1 << 48))
        check_out(args.out, args.picture, suffix=".png")
        device = ce.pick_device(args.device)
        x = small = ce.to_square(ce.open_picture(args.picture), 64).to(device)
        for size in (256, 1024) if args.size == 1024 else (256,):
            path = args.weights / f"upsample-{size}.pt"
            model = load_stage(path, Upsampler, UpsamplerConfig).to(device)
            x = sample(model, x, [torch.Generator().manual_seed(args.seed)], bar=True)
        bicubic = F.interpolate(small, (args.size, args.size), mode="bicubic")
        ce.to_picture(torch.cat([bicubic, x], 3)[0]).save(args.out)
        print(args.out)


if __name__ == "__main__":
    main()
