"""The two priors compared: with each other, with z_t, and with true embeddings (§2.2, §5.1).

In:   a folder with clip.pt, prior.pt and ar-prior.pt
Out:  on stdout, Markdown tables, mean ± standard error over --seeds; --json keeps each seed's numbers

Neither prior was trained on these captions: the script draws the training captions again, from the
record in the checkpoints, and avoids them. Columns:
  cosine with z_t     of one z_i per caption
  nearest fits        how often the caption describes the scene of the nearest of 1,000 true
                      embeddings (one per caption)
  Fréchet             distance ×1000 between the embeddings of all captions and true ones (means and
                      covariances)
  distance, one draw  of one z_i to the mean of a caption's true embeddings, in units of their
                      spread (root mean square)
  …, mean of 32       the same for the mean of 32 z_i of the caption; for true embeddings it is not
                      0 either, because there are 32 of them as well
  diversity           1 − mean cosine of two z_i of one under-specified caption, as a share of the
                      value for true embeddings
  diversity, all named  the same for captions that name all but places, tilts, radii and shading
  seconds             for 1,000 z_i, without encoding the captions
"True, as codes" is what the autoregressive prior could reach: true embeddings with its components
alone, in its buckets. "Any z_i·z_t" draws that product from its whole distribution, not from the top
half (§2.2).

    python experiments/priors.py --weights runs/shapes --json priors.json
"""

import argparse
import copy
import json
import os
import sys
import time
from itertools import permutations
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import prior
from caption_accuracy import parse_caption, relation_of, scene_of
from clip_embed import (UserError, encode_captions, encode_pictures, load_clip, one_line_errors, pick_device, to_floats,
                        to_tensor)
from data.shapes import VALUES, ShapeBatches, attributes_in_caption, describe, random_scene, render
from sample import SHIPPED, generators
from weights.checkpoints import fingerprint, load_stage, read_checkpoint

OPEN = ("a red circle", "a blue star", "a yellow heart", "a large square", "a striped triangle", "a small cross")
ROWS = ("true", "true, as codes", "diffusion", "autoregressive", "autoregressive, any z_i·z_t", "z_t shifted", "z_t")
NAMED = ("a large solid red circle on white", "a small striped blue star on pink", "a large striped yellow heart on gray",
         "a small solid green square on mint", "a large solid purple cross above a small striped orange triangle on white",
         "a small striped red heart left of a large solid black circle on mint")
STEPS = (64, 10)
DISTANCES = ("distance, one draw", "distance, mean of 32")

# ----------------------------------------------------------------------------- captions and scenes


def trained_on(path, stage):
    """The captions that a prior was trained on, drawn again.

    Raises UserError if the checkpoint has no record of them.
    """
    checkpoint = read_checkpoint(path, stage)
    try:
        record = checkpoint.get("trained") or checkpoint["training"]
        batches, steps = ShapeBatches(stage, record["recipe"]["batch_size"], record["seed"], None), range(record["step"])
    except (KeyError, TypeError):
        raise UserError(f"{path}: does not say which captions it was trained on") from None
    loader = DataLoader(batches, batch_size=None, sampler=steps, num_workers=os.cpu_count())
    return {caption for _, captions in tqdm(loader, f"captions of {stage}") for caption in captions}


def unseen_captions(n, seed, used):
    """n captions of random scenes, without those in `used`.

    The omitted captions are mostly short, since there are few short ones.
    """
    rng, captions = np.random.default_rng([seed, 1 << 50]), []
    while len(captions) < n:
        scene = random_scene(rng)
        caption = describe(scene, attributes_in_caption(scene, rng), rng)
        captions += [caption] if caption not in used else []
    return captions


def fits(scene, asked):
    """Does a scene fit a parsed caption?"""
    if len(scene.things) != len(asked.things) or asked.background not in (None, scene.background):
        return False
    return any(all(getattr(s, a) in (None, getattr(t, a)) for s, t in zip(asked.things, things) for a in VALUES)
               and (not asked.relation or relation_of(*things) == asked.relation) for things in permutations(scene.things))

# ----------------------------------------------------------------------------- embeddings


def load(weights, device):
    """{"clip", "tokenizer", "prior", "ar-prior"} of a folder.

    Raises UserError, also if they belong to different CLIPs.
    """
    clip, tokenizer = load_clip(weights / "clip.pt")
    mark, stack = (fingerprint(clip), weights / "clip.pt"), {"clip": clip.to(device), "tokenizer": tokenizer}
    kinds = {"prior": (prior.DiffusionPrior, prior.PriorConfig), "ar-prior": (prior.ARPrior, prior.ARConfig)}
    for stage, (network, config) in kinds.items():
        stack[stage] = load_stage(weights / f"{stage}.pt", network, config, mark).to(device)
    return stack


def embed(stack, scenes):
    """z_i (n, d) of scenes, rendered at CLIP's image size."""
    size, parts = stack["clip"].config.image_size, []
    for first in range(0, len(scenes), 250):
        images = torch.stack([to_tensor(render(s, size)) for s in scenes[first:first + 250]])
        parts.append(encode_pictures(stack["clip"], to_floats(images)).cpu())
    return torch.cat(parts)


def draw(stack, captions, seed, methods):
    """z_t (n, d), {name: z_i (n, d)} and {name: seconds} of each method.

    Each z_i has its own generator.
    """
    z_t, z_i, seconds = [], {name: [] for name in methods}, dict.fromkeys(methods, 0.0)
    for first in tqdm(range(0, len(captions), 250), ", ".join(methods), leave=False):
        some = captions[first:first + 250]
        text, null = encode_captions(stack["clip"], stack["tokenizer"], some)
        z_t.append(text["z_t"].cpu())
        for name, method in methods.items():
            noise = generators("prior", (seed << 32) + first, range(len(some)))
            began = time.perf_counter()
            z_i[name].append(method(text, null, noise).cpu())  # .cpu() waits for the device
            seconds[name] += time.perf_counter() - began
    return torch.cat(z_t), {name: torch.cat(parts) for name, parts in z_i.items()}, seconds

# ----------------------------------------------------------------------------- measures


def frechet(a, b):
    """Fréchet distance between Gaussians fitted to a (n, d) and b (m, d): ‖μ₁−μ₂‖² + tr(C₁ + C₂ − 2 (C₁C₂)^½)."""
    a, b = a.double(), b.double()
    c_a, c_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(c_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ c_b @ root).clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + c_a.trace() + c_b.trace() - 2 * cross)


def spread_out(z):
    """1 − mean cosine of two of z (groups, n, d), for each group."""
    n = z.shape[1]
    return 1 - (z.sum(1).square().sum(1) - n) / (n * (n - 1))


def off(z, true):
    """Distance of z (groups, n, d) to the means of true (groups, m, d), in units of true's spread.

    Returns (distance of one draw, distance of the mean).
    """
    mean = true.mean(1, keepdim=True)
    variance = (true - mean).square().sum((1, 2)) / (true.shape[1] - 1)
    one = ((z - mean).square().sum(2).mean(1) / variance).mean().sqrt()
    return float(one), float(((z.mean(1) - mean[:, 0]).norm(dim=1) / variance.sqrt()).mean())


def measure(stack, seed, n, used, shift):
    """All numbers of one seed.

    {"priors": {row: {column: number}}, "variances": {"steps, variance": Fréchet}}.
    """
    methods = {"diffusion": lambda text, null, noise: prior.sample(stack["prior"], text, null, noise),
               "autoregressive": lambda text, null, noise: prior.ar_sample(stack["ar-prior"], text, null, noise),
               "autoregressive, any z_i·z_t": lambda text, null, noise: prior.ar_sample(
                   stack["ar-prior"], text, null, noise, percentile=0),
               "z_t shifted": lambda text, null, noise: F.normalize(text["z_t"] + shift, dim=1),
               "z_t": lambda text, null, noise: text["z_t"]}
    captions, rng = unseen_captions(n, seed, used), np.random.default_rng([seed, 1 << 51])

    def with_truth(captions, seed):
        """The result of draw, with one more method "true": other scenes of the same captions."""
        z_t, z_i, seconds = draw(stack, captions, seed, methods)
        true, codes = embed(stack, [scene_of(parse_caption(c), rng) for c in captions]), stack["ar-prior"]
        coded = codes.decode(codes.encode(true.to(codes.mean.device))).cpu()
        return z_t, z_i | {"true": true, "true, as codes": coded}, seconds

    asked = [parse_caption(caption) for caption in captions]
    scenes = [scene_of(s, rng) for s in asked]
    reference = embed(stack, scenes)
    z_t, z_i, seconds = with_truth(captions, seed)
    few = [caption for caption in captions[:100] for _ in range(32)]
    many = [caption for caption in OPEN + NAMED for _ in range(64)]
    group = lambda z, size: z.unflatten(0, (-1, size))
    true_few, true_many = (embed(stack, [scene_of(parse_caption(c), rng) for c in some]) for some in (few, many))
    few, many = with_truth(few, seed + 1000)[1], with_truth(many, seed + 2000)[1]
    shares = {name: spread_out(group(many[name], 64)) / spread_out(group(true_many, 64)) for name in ROWS}
    rows = {}
    for name in ROWS:
        near = (z_i[name][:1000] @ reference[:1000].T).argmax(1).tolist()
        rows[name] = {"cosine with z_t": float((z_i[name] * z_t).sum(1).mean()),
                      "nearest fits": float(np.mean([fits(scenes[j], s) for j, s in zip(near, asked)])),
                      "Fréchet": 1000 * frechet(z_i[name], reference),
                      **dict(zip(DISTANCES, off(group(few[name], 32), group(true_few, 32)))),
                      "diversity": float(shares[name][:len(OPEN)].mean()), "diversity, all named": float(shares[name][len(OPEN):].mean()),
                      "seconds": seconds[name] * 1000 / n if name in seconds else float("nan")}
    networks = {"analytic": stack["prior"], "fixed-small": copy.deepcopy(stack["prior"])}
    networks["fixed-small"].errors.zero_()
    variances = {f"{steps} steps, {variance}": lambda text, null, noise, steps=steps, network=network: prior.sample(
        network, text, null, noise, steps=steps, candidates=1)
        for steps in STEPS for variance, network in networks.items()}
    drawn = draw(stack, captions, seed, variances)[1]
    return {"priors": rows, "variances": {name: 1000 * frechet(z, reference) for name, z in drawn.items()}}


def cell(values):
    """Mean ± standard error of one number per seed; – if there is none."""
    values = np.array(values)
    if np.isnan(values).any():
        return "–"
    return f"{values.mean():.3f} ± {values.std(ddof=1) / len(values) ** 0.5:.3f}" if len(values) > 1 else f"{values[0]:.3f}"


def report(results):
    """Markdown tables of measure's results, one per seed, and of their paired differences."""
    rows = [r["priors"] for r in results]
    columns = list(rows[0]["true"])
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(cell([r[name][c] for r in rows]) for c in columns)} |" for name in ROWS]
    variances = [r["variances"] for r in results]
    lines += ["", "| Fréchet, one z_i a caption | analytic | fixed-small | difference |", "|---|---|---|---|"]
    for steps in STEPS:
        a, b = (np.array([v[f"{steps} steps, {variance}"] for v in variances]) for variance in ("analytic", "fixed-small"))
        lines.append(f"| {steps} steps | {cell(a)} | {cell(b)} | {cell(a - b)} |")
    lines += ["", f'| difference from "z_t shifted" | Fréchet | {" | ".join(DISTANCES)} |', "|---|---|---|---|"]
    for name in ("diffusion", "autoregressive"):
        less = [cell([r[name][c] - r["z_t shifted"][c] for r in rows]) for c in ("Fréchet", *DISTANCES)]
        lines.append(f"| {name} | {' | '.join(less)} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(
        description="Compare both priors with each other, with z_t and with true embeddings, on "
        "captions that neither was trained on. Also compare analytic with fixed-small variance.")
    parser.add_argument("--weights", type=Path, default=SHIPPED, help="folder of clip.pt, prior.pt and ar-prior.pt")
    parser.add_argument("--seeds", type=int, default=5,
                        help="repetitions with other captions and noise (default 5)")
    parser.add_argument("--n", type=int, default=5000, help="captions per seed (default 5000)")
    parser.add_argument("--json", type=Path, help="file for each seed's numbers")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    args = parser.parse_args()
    with one_line_errors(), torch.no_grad():
        if not 1 <= args.seeds <= 1000 or not 2 <= args.n <= 10 ** 6:
            raise UserError("--seeds must be between 1 and 1000, --n between 2 and 1000000")
        stack = load(args.weights, pick_device(args.device))
        used = set().union(*(trained_on(args.weights / f"{stage}.pt", stage) for stage in ("prior", "ar-prior")))
        rng = np.random.default_rng(1 << 52)
        scenes = [random_scene(rng) for _ in range(2000)]
        z_t = draw(stack, [describe(s, attributes_in_caption(s, rng), rng) for s in scenes], 0, {})[0]
        shift = (embed(stack, scenes).mean(0) - z_t.mean(0)).to(stack["clip"].logit_scale.device)
        results = []
        for seed in tqdm(range(args.seeds), "seeds"):
            results.append(measure(stack, seed, args.n, used, shift))
            if args.json:  # keep finished seeds
                args.json.write_text(json.dumps({"captions": args.n, "results": results}, indent=1, ensure_ascii=False), "utf-8")
        print(f"{args.n:,} captions, {args.seeds} seeds, on {stack['clip'].logit_scale.device}; {len(used):,} captions of the "
              f"training avoided\n\n{report(results)}")


if __name__ == "__main__":
    main()
