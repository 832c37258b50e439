"""The two upsamplers: 64×64 → 256×256 → 1024×1024 (§2.1).

In:   low (B, 3, h, h) in [-1, 1], the picture that the stage before made
Out:  images (B, 3, 4h, 4h) in [-1, 1]

Diffusion models P(x|low): the low-resolution picture, enlarged, is concatenated to the noisy one, and an ADM U-Net
of convolutions alone predicts the noise; the objective (upsampler_loss) is E‖ε − ε(x_t, t, low)‖². They see neither caption
nor z_i and are not guided. Having no attention, they are trained on random crops a quarter of the side and applied to whole
pictures. So that they repair what the stage before gets wrong, the condition is damaged in training: a Gaussian blur for the
first, the BSR mix of blur, resizing, noise and JPEG for the second. Sampling is DDIM, 27 and 15 steps; the first has the
cosine schedule, the second the linear one.

Where the paper is silent, ours: the condition is blurred in half of the crops, so that sharp ones are known too
(as in cascaded diffusion models); `patch_size` folds pixels into channels, so that a laptop reaches 1024 (1 in the paper);
the `shapes` presets' networks put out what the enlarged picture lacks, from which ε follows (eps_from_residual); sampling
starts below t = 999 (top_step).

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
    """Sizes of the network, and how it is sampled (table 3, columns 64→256 and 256→1024; §2.1)."""
    low_size: int = 64
    image_size: int = 256
    schedule: str = "cosine"       # or "linear"
    degradation: str = "blur"      # or "bsr"
    steps: int = 27                # DDIM steps
    crop: float = 0.25             # side of a training crop, as a share of the picture's
    patch_size: int = 1
    channels: int = 320
    depth: int = 3                 # residual blocks a level
    multiples: tuple = (1, 2, 3, 4)
    norm_groups: int = 32
    dropout: float = 0.1
    prediction: str = "eps"        # what the network puts out; "residual": see eps_from_residual
    scale_shift: bool = True       # ADM's blocks; False: the timestep's embedding is only added (Karlo, and the five below)
    enlarge: str = "bilinear"      # or "bicubic": how the condition is
    top_signal: float = 0.015      # √ᾱ where sampling begins (top_step); 0: at t = 999
    eta: float = 0.0               # DDIM's; 1: ancestral, of variance β̃
    float32: bool = False          # sample with ᾱ rounded to that, as the library that runs Karlo does
    last: bool = False             # another network of the same sizes takes the last step


def second(**sizes):
    """The 256→1024 stage's config: its own schedule, degradation and steps, with the sizes given."""
    return UpsamplerConfig(256, 1024, "linear", "bsr", 15, **sizes)


PRESETS = {
    "shapes": {256: UpsamplerConfig(patch_size=2, channels=32, depth=1, multiples=(1, 2, 2), norm_groups=8, dropout=0.0,
                                    prediction="residual"),
               1024: second(patch_size=4, channels=32, depth=1, multiples=(1, 2, 2), norm_groups=8, dropout=0.0,
                            prediction="residual")},
    "laptop": {256: UpsamplerConfig(channels=96, depth=2),
               1024: second(channels=48, depth=2, multiples=(1, 1, 2, 2, 4, 4), norm_groups=16, dropout=0.0)},
    "paper": {256: UpsamplerConfig(), 1024: second(channels=192, depth=2, multiples=(1, 1, 2, 2, 4, 4), dropout=0.0)},
}


# ----------------------------------------------------------------------------- Gaussian diffusion

@lru_cache
def cosine_schedule(T=1000):
    """ᾱ_0 … ᾱ_{T-1}, float64 (T,), of the cosine schedule (table 3; Improved DDPM eq. 17; β clipped at 0.999)."""
    f = torch.cos((torch.arange(T + 1, dtype=torch.float64) / T + 0.008) / 1.008 * math.pi / 2) ** 2
    betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    return torch.cumprod(1 - betas, 0)


@lru_cache
def linear_schedule(T=1000):
    """ᾱ_0 … ᾱ_{T-1}, float64 (T,), for β rising evenly from 1e-4 to 0.02 (table 3; DDPM §4, given for T = 1000)."""
    return torch.cumprod(1 - torch.linspace(1e-4, 0.02, T, dtype=torch.float64), 0)


SCHEDULES = {"cosine": cosine_schedule, "linear": linear_schedule}


def at(values, t, x):
    """values[t] as float32, shaped to multiply x: t (B,) → (B, 1, 1, …)."""
    return values.float().to(t.device)[t].view(-1, *[1] * (x.ndim - 1))


def q_sample(x_0, t, eps, alphas_cumprod):
    """x_t ~ q(x_t|x_0) = N(√ᾱ_t x_0, (1 − ᾱ_t) I), made from the noise eps (DDPM eq. 4). t (B,) int64."""
    return at(alphas_cumprod.sqrt(), t, x_0) * x_0 + at((1 - alphas_cumprod).sqrt(), t, x_0) * eps


def predict_x_0(x_t, eps, alpha):
    """x̂_0 = (x_t − √(1−ᾱ_t) ε) / √ᾱ_t (DDPM eq. 15)."""
    return (x_t - math.sqrt(1 - alpha) * eps) / math.sqrt(alpha)


def ddim_step(x_0, eps, alpha_t, alpha_s, eta):
    """(mean, deviation) of x_s given x_t, of which x_0 and eps are the estimates, by DDIM with η (DDIM eqs. 12, 16).

    alpha_t, alpha_s are ᾱ at the two steps, floats. η = 0 draws nothing; η = 1 draws as much as the posterior does.
    """
    deviation = eta * math.sqrt((1 - alpha_s) / (1 - alpha_t) * (1 - alpha_t / alpha_s))
    return math.sqrt(alpha_s) * x_0 + math.sqrt(1 - alpha_s - deviation ** 2) * eps, deviation


def eps_from_residual(x_t, residual, condition, alpha_t):
    """The ε that x̂_0 = condition + residual means, for a network that predicts what the enlarged picture lacks. (Ours.)

    The paper's networks predict ε, which takes long to learn finely enough: trained for minutes, they leave grain all over
    the picture. The residual is small from the start, so the `shapes` presets predict it instead.
    """
    return (x_t - alpha_t.sqrt() * (condition + residual)) / (1 - alpha_t).sqrt()


# ----------------------------------------------------------------------------- the U-Net (ADM, convolutions only)

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


class Upsampler(nn.Module):
    """The U-Net: (x_t, t, low) → ε (B, 3, H, W). No attention, in the middle neither: any size goes in (§2.1)."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        emb = 4 * c.channels

        self.time_embed = nn.Sequential(nn.Linear(c.channels, emb), nn.SiLU(), nn.Linear(emb, emb))
        res = partial(ResBlock, emb_channels=emb, groups=c.norm_groups, dropout=c.dropout, scale_shift=c.scale_shift)
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
                self.up.append(nn.ModuleList(blocks + ([res(width, width, resample="up")] if k and n == c.depth else [])))
        self.norm_out = nn.GroupNorm(c.norm_groups, width)
        self.conv_out = zero(nn.Conv2d(width, 3 * c.patch_size ** 2, 3, padding=1))
        if c.last:
            self.last = Upsampler(replace(c, last=False))

    def forward(self, x_t, t, low):
        """x_t (B, 3, H, W), t (B,), low (B, 3, h, h); H a multiple of patch_size · 2^(levels − 1)."""
        c = self.config
        emb = self.time_embed(timestep_embedding(t, c.channels))
        condition = F.interpolate(low, x_t.shape[-2:], mode=c.enlarge, antialias=c.enlarge == "bicubic")  # (B, 3, H, W)
        h = self.conv_in(F.pixel_unshuffle(torch.cat([x_t, condition], 1), c.patch_size))
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
        eps = F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(h))).float(), c.patch_size)
        if c.prediction == "residual":
            eps = eps_from_residual(x_t, eps, condition, at(SCHEDULES[c.schedule](), t, x_t))
        return eps


# ----------------------------------------------------------------------------- training: damaged conditions, crops

def gaussian_blur(images, sigma=0.6):
    """Blur (B, C, H, W) by a 3×3 Gaussian kernel, its borders mirrored (§2.1; appendix C: kernel 3, σ 0.6)."""
    kernel = torch.exp(-torch.tensor([-1.0, 0.0, 1.0]) ** 2 / (2 * sigma ** 2))
    kernel = (kernel / kernel.sum()).to(images)
    C = images.shape[1]
    x = F.conv2d(F.pad(images, (1, 1, 1, 1), "reflect"), kernel.view(1, 1, 1, 3).expand(C, 1, 1, 3), groups=C)
    return F.conv2d(x, kernel.view(1, 1, 3, 1).expand(C, 1, 3, 1), groups=C)


def bsr_degrade(picture, rng):
    """Damage a Pillow picture as BSRGAN does: blur, down-and-up resizing, noise and JPEG in random order (§2.1).

    rng: a numpy Generator. Of the four, each is applied with probability one half; the strengths are ours, milder in
    blur and stronger in noise and JPEG than latent diffusion's light variant. The size stays as it is.
    """
    filters = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.BOX)

    def blur(p):
        wide, high = rng.uniform(0.2, 1.2, 2)  # deviations in pixels, along and across: anisotropic
        return p.filter(ImageFilter.GaussianBlur((wide, high)))

    def resize(p):
        small = tuple(round(side * rng.uniform(0.5, 1)) for side in p.size)
        return p.resize(small, filters[rng.integers(3)]).resize(p.size, filters[rng.integers(3)])

    def noise(p):
        pixels = np.asarray(p, np.float32)
        grey = rng.random() < 0.4
        speckle = rng.normal(0, rng.uniform(1, 8), pixels.shape[:2] + (1 if grey else 3,))
        return Image.fromarray((pixels + speckle).round().clip(0, 255).astype(np.uint8))

    def jpeg(p):
        file = io.BytesIO()
        p.save(file, "JPEG", quality=int(rng.integers(50, 96)))
        return Image.open(file).convert("RGB")

    for damage in rng.permutation([blur, resize, noise, jpeg]):
        if rng.random() < 0.5:
            picture = damage(picture)
    return picture


def training_crops(picture, config, rng, count):
    """`count` aligned pairs from one Pillow picture of image_size: (high, low), uint8 (count, 3, ·, ·) each.

    The low-resolution picture is the area average of the high one; it is damaged whole and then cropped, on its own
    grid, so that pixel (i, j) of a low crop always lies over pixels (4i … 4i+3, 4j … 4j+3) of the high crop (§2.1).
    """
    factor, side = config.image_size // config.low_size, round(config.low_size * config.crop)
    small = picture.reduce(factor)
    to_tensor = lambda p: torch.from_numpy(np.array(p)).permute(2, 0, 1)
    highs, lows = [], []
    for _ in range(count):
        damaged = small
        if config.degradation == "bsr":
            damaged = bsr_degrade(small, rng)
        elif rng.random() < 0.5:
            blurred = gaussian_blur(to_tensor(small)[None].float())[0].round().byte()
            damaged = Image.fromarray(blurred.permute(1, 2, 0).numpy())
        x, y = rng.integers(config.low_size - side + 1, size=2).tolist()
        lows.append(to_tensor(damaged.crop((x, y, x + side, y + side))))
        highs.append(to_tensor(picture.crop(tuple(factor * v for v in (x, y, x + side, y + side)))))
    return torch.stack(highs), torch.stack(lows)


def upsampler_loss(model, high, low):
    """E‖ε − ε(x_t, t, low)‖² of crops high (B, 3, H, W) and damaged low (B, 3, H/4, W/4), in [-1, 1] (§2.1; DDPM eq. 14)."""
    alphas_cumprod = SCHEDULES[model.config.schedule]()
    t = torch.randint(len(alphas_cumprod), (len(high),)).to(high.device)  # drawn on the CPU: the same on every device
    noise = torch.randn(high.shape).to(high.device)
    eps = model(q_sample(high, t, noise, alphas_cumprod), t, low)
    weight = at(1 / alphas_cumprod - 1, t, eps) if model.config.prediction == "residual" else 1  # ‖Δε‖² (1−ᾱ)/ᾱ is ‖Δx_0‖²
    return (weight * (eps - noise) ** 2).mean()


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


@torch.no_grad()
def sample(model, low, generators, steps=None, bar=False):
    """Images (B, 3, 4h, 4h) in [-1, 1] from low (B, 3, h, h), by DDIM with η = 0 (§2.1, table 3: 27 and 15 steps).

    generators: one torch.Generator a picture; steps None takes the config's, as η always is (DDIM eqs. 12, 16).
    """
    c = model.config
    size = low.shape[-1] * c.image_size // c.low_size
    exact = SCHEDULES[c.schedule]()
    alphas_cumprod = exact.float() if c.float32 else exact
    rungs = ladder(steps or c.steps, top_step(alphas_cumprod, c.top_signal))
    x = randn(generators, (len(low), 3, size, size), low.device)
    for n in tqdm(reversed(range(len(rungs))), total=len(rungs), desc=f"upsample-{size}", disable=not bar):
        alpha_t, alpha_s = float(alphas_cumprod[rungs[n]]), float(alphas_cumprod[rungs[n - 1]]) if n else 1.0
        eps = (model.last if c.last and not n else model)(x, torch.full((len(x),), rungs[n], device=x.device), low)
        x_0 = predict_x_0(x, eps, alpha_t).clamp(-1, 1)
        eps = (x - math.sqrt(alpha_t) * x_0) / math.sqrt(1 - alpha_t)  # the ε that the clamped x̂_0 means
        x, deviation = ddim_step(x_0, eps, alpha_t, alpha_s, c.eta)
        if n and c.eta:
            x = x + deviation * randn(generators, x.shape, x.device)
    return x * float((1 - exact[0]) / (1 - alphas_cumprod[0]))  # times 1; in float32, 0.99947


def main():
    """The script: what --help says."""
    here = Path(__file__).parent / "weights/shapes"
    parser = argparse.ArgumentParser(description="Enlarge a picture: it is scaled to 64×64 and goes through the upsamplers. "
                                     "The shipped ones know flat shapes, not photographs.")
    parser.add_argument("picture", help="any picture; it is cropped to a square")
    parser.add_argument("--size", type=int, default=256, choices=[256, 1024], help="pixels a side to reach (default 256)")
    parser.add_argument("--weights", type=Path, default=here, help="folder of upsample-256.pt and upsample-1024.pt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    parser.add_argument("--out", type=Path, default=Path("upsample.png"), help="where it goes, bicubic enlargement to its left")
    args = parser.parse_args()
    import clip_embed as ce
    with ce.one_line_errors():
        if not 0 <= args.seed < 1 << 48 or args.out.suffix != ".png":
            raise ce.UserError("--seed must be at least 0, and --out end in .png")
        device = ce.pick_device(args.device)
        x = small = ce.to_square(ce.open_picture(args.picture), 64).to(device)
        for size in (256, 1024)[:1 + (args.size == 1024)]:
            path = args.weights / f"upsample-{size}.pt"
            model = ce.load_model(Upsampler, UpsamplerConfig, ce.read_checkpoint(path, f"upsample-{size}"), path).to(device)
            x = sample(model, x, [torch.Generator().manual_seed(args.seed)], bar=True)
        bicubic = F.interpolate(small, (args.size, args.size), mode="bicubic").clamp(-1, 1)
        sheet = torch.cat([bicubic, x], 3)[0].permute(1, 2, 0)  # (size, 2 · size, 3), side by side
        Image.fromarray(((sheet + 1) * 127.5).round().byte().cpu().numpy()).save(args.out)
        print(args.out)


if __name__ == "__main__":
    main()
