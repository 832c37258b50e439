"""Train every stage of unCLIP on captioned pictures (appendix C).

In:   a stage (clip, prior, ar-prior, decoder, upsample-256, upsample-1024), all or export
Out:  in --out, per stage: NAME.pt, NAME.csv, NAME-loss.png, NAME-samples.png

Each stage's file defines its loss. This file has the recipes, each loss's inputs, and one loop for
all: AdamW and an exponential moving average of weights (EMA). Pictures come from a built-in world
of shapes (data/shapes.py), or from --data.

Row n of step k draws its scene, caption, timestep and noise from (--seed, k, n). So `--resume` with
the same options is exact (on a CPU, bit for bit). Processes and pieces change only dropout.

    python train.py all --preset shapes
    python train.py all --preset laptop --dry-run    # memory and hours
    python train.py all --data my-photos --clip ViT-B-32.pt --preset laptop
    python train.py decoder --resume                 # one stage, after a stop
    torchrun --nproc-per-node 4 train.py decoder     # on four GPUs
"""

import argparse
import contextlib
import copy
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from tqdm import tqdm

import clip_embed
import decoder
import prior
import upsample
from clip_embed import UserError, check_ranges, one_line_errors, to_floats, to_tensor
from data import shapes
from data.charts import write_report
from data.embeddings import FrozenCLIP, embed_folder, embed_scenes, standard
from data.folder import FolderBatches, TooFew, gather
from data.processes import (asked_to_stop, attention_kernel, first_before_others, gather_rows,
                            ignore_stops, join_processes, machine_memory, mean_of_ranks,
                            one_at_a_time, only_first_prints, ranks)
from data.shapes import ShapeBatches
from sample import generators, grid, seeded
from weights.checkpoints import (config_of, export, fingerprint, load_model, read_checkpoint,
                                 resume, same_sizes, save_atomically)
from weights.stack import PRECISIONS, keep_freed_memory, pick_dtype

VALIDATION = 8   # held-out batches
EXPLODED = 1000  # a loss this many times the last CSV row's stops the run


@dataclass
class Recipe:
    """How a stage is trained (appendix C, table 3): AdamW with β1 = 0.9."""
    batch_size: int            # of all processes
    steps: int
    learning_rate: float
    weight_decay: float = 0.0
    beta2: float = 0.999
    eps: float = 1e-8
    ema_decay: float = 0.9999
    warmup: int = 500          # steps in which the learning rate rises
    at_once: int = 1 << 20     # rows of a micro-batch; not for clip
    recompute: bool = False    # clip: gradient checkpointing of each block
    loss: dict = field(default_factory=dict)  # options of the stage's loss function
    near: tuple = (0.0, 0.0)   # clip: from, to (shares of the steps): only near misses compared
    scale: float = 100.0       # clip: upper limit of the inverse temperature


# Not in the paper: z_i holds all that a caption says, so only rows without z_i teach the caption
DROPS = {"drop_z_i": 0.3, "drop_caption": 0.3, "time_power": 0.5}
RECIPES = {  # batch size, steps, learning rate, weight decay, β2, ε, EMA, warm-up; the rest by name
    "shapes": {
        "clip": Recipe(64, 16000, 1e-3, 0.1, 0.98, 1e-6, 0.998, near=(0.25, 0.75), scale=15.0),
        "prior": Recipe(256, 12600, 1e-3, 0.06, 0.96, 1e-6, 0.9995, loss={"draws": 4}),
        "ar-prior": Recipe(128, 8000, 1e-3, 0.04, 0.91, 1e-10, 0.999),
        "decoder": Recipe(256, 17400, 1e-3, ema_decay=0.9995, at_once=64, loss=DROPS),
        "upsample-256": Recipe(64, 6000, 2e-3, ema_decay=0.999, loss={"time_power": 2}),
        "upsample-1024": Recipe(64, 6000, 2e-3, ema_decay=0.999, loss={"time_power": 2})},
    "laptop": {
        "clip": Recipe(256, 20000, 5e-4, 0.1, 0.98, 1e-6, 0.999, 1000, recompute=True),
        "prior": Recipe(256, 100000, 1.1e-4, 0.06, 0.96, 1e-6, at_once=128),
        "ar-prior": Recipe(256, 100000, 1.6e-4, 0.04, 0.91, 1e-10, 0.999, at_once=16),
        "decoder": Recipe(32, 200000, 1.2e-4, at_once=8),
        "upsample-256": Recipe(16, 100000, 1.2e-4, at_once=8),
        "upsample-1024": Recipe(8, 100000, 1e-4, at_once=2)},
    "paper": {
        "clip": Recipe(32768, 400000, 3e-4, 0.2, 0.98, 1e-6, warmup=2000),  # no SAM
        "prior": Recipe(4096, 600000, 1.1e-4, 0.06, 0.96, 1e-6),
        "ar-prior": Recipe(4096, 1000000, 1.6e-4, 0.04, 0.91, 1e-10, 0.999),
        "decoder": Recipe(2048, 800000, 1.2e-4),
        "upsample-256": Recipe(1024, 1000000, 1.2e-4),
        "upsample-1024": Recipe(512, 1000000, 1e-4)},
}


@dataclass
class Context:
    """What a stage's loss and sheet need beside network and batch."""
    batches: Callable          # (stage, batch_size, seed, config, …) → Dataset of batches
    picture: Callable          # (number, side) → a Pillow picture of the training set
    device: torch.device
    seed: int
    bf16: bool                 # compute in bfloat16
    recipe: Recipe
    config: object = None      # sizes of the stage's network
    tokenizer: object = None   # clip's
    frozen: object = None      # priors, decoder: their FrozenCLIP
    codes: dict = field(default_factory=dict)  # priors: what they keep of all z_i
    given: str = "z_i"         # decoder: --given
    shown: tuple = (0, 1)      # upsamplers: pictures of the sample sheet
    alone: bool = False        # clip: near misses only, at this step
    extra: dict = field(default_factory=dict)  # in the checkpoint: CLIP's fingerprint, …


def clip_batch_loss(model, batch, context, generators):
    """The contrastive loss of (images, captions), over the rows of all processes (§2).

    Not in the paper: during Recipe.near each row is compared with its near misses only, since
    binding is learned last. With CLIP's scale of up to 100, not Recipe.scale, a few directions held
    nearly all of z_i's variance.
    """
    images, captions = batch
    model.logit_scale.data.clamp_(max=math.log(context.recipe.scale))  # above: no gradient
    text, _ = clip_embed.encode_captions(model, context.tokenizer, captions)
    z_i, z_t = gather_rows(clip_embed.encode_pictures(model, images)), gather_rows(text["z_t"])
    group = 4 if context.alone else None  # a scene and its three near misses
    return clip_embed.contrastive_loss(z_i, z_t, model.logit_scale, group, context.recipe.scale)


def prior_batch_loss(model, batch, context, generators, loss=prior.prior_loss):
    """A prior's loss of a batch of (numbers of pictures, captions) (§2.2)."""
    z_i = context.frozen.z_i_of(batch[0])
    text, null = context.frozen.encode_texts(batch[1])
    return loss(model, z_i, text, null, generators, **context.recipe.loss)


def decoder_batch_loss(model, batch, context, generators):
    """The decoder's loss of (images, captions[, numbers in a folder]) (§2.1).

    With --given caption z_i is always dropped, the caption in 20%, as in GLIDE.
    """
    text, null = context.frozen.encode_texts(batch[1])
    z_i = z_i_of_batch(batch, text, context)
    dropped = {"drop_z_i": 1, "drop_caption": 0.2} if context.given == "caption" else {}
    options = context.recipe.loss | dropped
    return decoder.decoder_loss(model, batch[0], z_i, text, null, generators, **options)


def z_i_of_batch(batch, text, context):
    """The decoder's z_i (B, d): the pictures', or z_t with --given z_t (§5.1)."""
    if context.given == "z_t":
        return text["z_t"]
    if len(batch) > 2:  # a folder's pictures, embedded beforehand
        return context.frozen.z_i_of(batch[2])
    return context.frozen.encode_pictures(batch[0])


def upsampler_batch_loss(model, batch, context, generators):
    """An upsampler's loss of a batch of (high, low) crops (§2.1)."""
    return upsample.upsampler_loss(model, *batch, generators, **context.recipe.loss)


def learning_rate(step, recipe):
    """Up in `warmup` steps, down to zero in the last quarter (the paper names only the peak)."""
    up, down = (step + 1) / recipe.warmup, 4 * (1 - step / recipe.steps)
    return recipe.learning_rate * min(1, up, down)


@torch.no_grad()
def update_ema(ema, model, step, decay):
    """Move the averaged weights towards the model's (table 3); faster at first."""
    decay = min(decay, (1 + step) / (10 + step))  # or the initial weights would linger
    get_ema_multi_avg_fn(decay)(list(ema.parameters()), list(model.parameters()), None)


def row_generators(seed, step, rows, held_out=False):
    """A torch.Generator a row, seeded by seed, step, row and split (1 or 3; scenes: 0 or 2)."""
    return [seeded(seed, step, row, 2 * held_out + 1) for row in rows]


class Loss(torch.nn.Module):
    """A stage's loss as a module, for DistributedDataParallel."""

    def __init__(self, model, loss_of, context):
        super().__init__()
        self.model, self.loss_of, self.context = model, loss_of, context

    def forward(self, batch, step, rows, held_out):
        c, recipe = self.context, self.context.recipe
        first, last = (round(share * recipe.steps) for share in recipe.near)
        context = replace(c, alone=first <= step < last and not held_out)
        torch.manual_seed(c.seed + step * recipe.batch_size + rows[0])  # dropout, drawn by piece
        with torch.autocast(c.device.type, torch.bfloat16, enabled=c.bf16):
            generators = row_generators(c.seed, step, rows, held_out)
            return self.loss_of(self.model, batch, context, generators)


def add_gradients(loss, batch, step, context, held_out=False):
    """The mean loss of this process's rows; adds its gradients piece by piece, if they are on."""
    (rank, world), recipe = ranks(), context.recipe
    batch, total, count = to_device(batch, context.device), 0, recipe.batch_size // world
    for first in range(0, count, recipe.at_once):
        last = min(first + recipe.at_once, count)
        waits = last < count and isinstance(loss, DistributedDataParallel)
        sync = loss.no_sync() if waits else contextlib.nullcontext()  # averaged at the last
        with sync, attention_kernel(context.device, context.bf16):
            rows = range(rank * count + first, rank * count + last)
            value = loss(tuple(part[first:last] for part in batch), step, rows, held_out)
            value = value * ((last - first) / count)
            if value.requires_grad:
                value.backward()
        total = total + value.detach()
    return float(total)


def to_device(batch, device):
    """uint8 pictures of a batch to the device, as floats in [-1, 1]; the rest as it is."""
    return tuple(to_floats(x.to(device)) if getattr(x, "dtype", None) == torch.uint8 else x
                 for x in batch)


@dataclass
class Run:
    """A stage in training."""
    stage: str
    context: Context
    model: torch.nn.Module
    ema: torch.nn.Module
    optimizer: torch.optim.Optimizer
    loss: torch.nn.Module       # Loss of the model
    step: int = 0               # steps done
    rows: list = field(default_factory=list)    # of the CSV: step, loss, images/s, held-out loss
    recent: list = field(default_factory=list)  # losses since the last row

    def batches(self, split):
        """The Dataset of this process's rows; split is "train" or "validation"."""
        c = self.context
        return c.batches(self.stage, c.recipe.batch_size, c.seed, c.config, *ranks(), split)


@one_at_a_time
def train(stage, args, device):
    """Train one stage from its start, or from its checkpoint with --resume. Raises UserError.

    Ctrl-C and SIGTERM raise KeyboardInterrupt after the step is saved. Gradients are clipped to a
    norm of 1 (not in the paper).
    """
    path = args.out / f"{stage}.pt"
    run = begin(stage, args, device, path)
    context, recipe, began, first = run.context, run.context.recipe, time.perf_counter(), run.step
    held_out = list(map(run.batches("validation").__getitem__, range(VALIDATION)))
    loader = DataLoader(run.batches("train"), batch_size=None, num_workers=args.workers,
                        sampler=range(run.step, recipe.steps), worker_init_fn=ignore_stops,
                        prefetch_factor=4 if args.workers else None)
    with asked_to_stop() as asked, tqdm(loader, stage, recipe.steps, initial=run.step, unit="step",
                                        dynamic_ncols=True, disable=ranks()[0] > 0) as bar:
        for batch in bar:
            for group in run.optimizer.param_groups:
                group["lr"] = learning_rate(run.step, recipe)
            run.optimizer.zero_grad(set_to_none=True)
            loss = add_gradients(run.loss, batch, run.step, context)
            loss, stop = mean_of_ranks([loss, len(asked) > 0], device)
            norm = float(torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0))
            check_loss(run, loss, norm, path)
            run.optimizer.step()
            update_ema(run.ema, run.model, run.step, recipe.ema_decay)
            run.step += 1
            run.recent.append(loss)
            speed = (run.step - first) * recipe.batch_size / (time.perf_counter() - began)
            bar.set_postfix(loss=np.mean(run.recent[-100:]), images_s=speed, refresh=False)
            due = run.step == recipe.steps or run.step % args.save_every == 0
            measured = held_out_loss(run, held_out) if due else None
            if due or run.step % args.log_every == 0:
                run.rows.append((run.step, float(np.mean(run.recent)), speed, measured))
                run.recent = []
            if (due or stop) and ranks()[0] == 0:
                save(run, path)
            if due and ranks()[0] == 0:
                report(run, batch, path)
            if stop:
                raise KeyboardInterrupt(f"{stage}: stopped after step {run.step}, saved in "
                                        f"{path}; go on with --resume and the same options")


def begin(stage, args, device, path):
    """The Run of a stage: new, from --init's weights, or resumed from `path`. Raises UserError."""
    if not path.exists():
        return build(stage, prepare(stage, args, device), args.init)
    if not args.resume:
        raise UserError(f"{path} exists: go on with --resume, or train elsewhere by --out")
    run = build(stage, prepare(stage, args, device))
    settings = {"seed": args.seed, "batch size": run.context.recipe.batch_size}
    resume(run, run.context.extra | settings, path, args.steps)
    return run


def build(stage, context, init=None):
    """A stage's Run at its start, or from the weights `init`. Raises UserError."""
    recipe, config, network = context.recipe, context.config, STAGES[stage].network
    if init:
        other = load_model(network, type(config), read_checkpoint(init, stage), init)
        if not same_sizes(asdict(other.config), asdict(config)):
            raise UserError(f"{init}: has other sizes than the {stage} of this preset")
    torch.manual_seed(context.seed)
    model = network(config).to(context.device, memory_format=torch.channels_last)
    if init:
        model.load_state_dict(other.state_dict())
    model.load_state_dict(context.codes, strict=False)
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    for block in model.modules():
        if recipe.recompute and isinstance(block, clip_embed.ResidualAttentionBlock):
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    decayed, others = [], []  # biases and norms don't decay
    kept = "positional", "visual.proj", "text_projection"  # else CLIP loses places and directions
    for name, p in model.named_parameters():
        (decayed if p.ndim > 1 and not any(k in name for k in kept) else others).append(p)
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0}]
    optimizer = torch.optim.AdamW(groups, recipe.learning_rate, (0.9, recipe.beta2), recipe.eps,
                                  recipe.weight_decay, fused=context.device.type != "mps")
    loss = Loss(model, STAGES[stage].loss, context)
    if ranks()[1] > 1:
        loss = DistributedDataParallel(loss)
    return Run(stage, context, model, ema, optimizer, loss)


def check_loss(run, loss, norm, path):
    """Raise UserError if a loss or its gradient's norm is not finite, or the loss has exploded."""
    before = run.rows[-1][1] if run.rows else math.inf
    if not math.isfinite(loss + norm) or loss > EXPLODED * before:
        good = f"the last good checkpoint is {path}" if path.exists() else "none is saved yet"
        raise UserError(f"{run.stage}: the loss at step {run.step} is {loss:.4g} (before: "
                        f"{before:.4g}), its gradient's norm {norm:.4g}; {good}: go on with "
                        "--resume and a lower --learning-rate, or with --precision float32")


@torch.no_grad()
def held_out_loss(run, batches):
    """The EMA's mean loss on held-out batches."""
    loss = Loss(run.ema, STAGES[run.stage].loss, run.context)
    losses = [add_gradients(loss, batch, k, run.context, True) for k, batch in enumerate(batches)]
    return mean_of_ranks([float(np.mean(losses))], run.context.device)[0]


def save(run, path):
    """Write a checkpoint, a finished prior's with `errors` for the analytic variance."""
    context = run.context
    if run.stage == "prior":
        run.ema.errors.zero_()  # stale after --init
        if run.step == context.recipe.steps:
            generator = torch.Generator().manual_seed(context.seed)
            run.ema.errors.copy_(prior.estimate_errors(run.ema, captioned(context, 4), generator))
    state = {"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict(),
             "step": run.step, "rows": run.rows, "recent": run.recent, "extra": context.extra,
             "recipe": asdict(context.recipe), "seed": context.seed}
    save_atomically({"stage": run.stage, "config": asdict(context.config), **context.extra,
                     "model": run.ema.state_dict(), "training": state}, path)


@torch.no_grad()
def report(run, batch, path):
    """Write CSV, curve and sample sheet beside the checkpoint. Raises UserError."""
    sheet = STAGES[run.stage].sheet(run.ema, to_device(batch, run.context.device), run.context)
    write_report(run.rows, sheet, path)


def prepare(stage, args, device):
    """A stage's Context. Raises UserError."""
    changes = {k: v for k, v in vars(args).items() if v and k in Recipe.__dataclass_fields__}
    if args.data:
        changes["near"] = (0.0, 0.0)  # a folder has no near misses
    recipe = replace(RECIPES[args.preset][stage], **changes)
    if recipe.batch_size % ranks()[1]:
        raise UserError(f"--batch-size {recipe.batch_size}: cannot be shared equally by "
                        f"{ranks()[1]} processes")
    batches, picture = ShapeBatches, partial(shapes.fixed_picture, args.seed)
    if args.data and not args.dry_run:
        batches, picture = partial(FolderBatches, args.data), args.data.picture
    bf16 = pick_dtype(args.precision, device) == torch.bfloat16
    context = Context(partial(batches, crops=upsample.training_crops), picture, device, args.seed,
                      bf16, recipe, extra={"data": args.data and args.data.mark})
    with first_before_others():
        STAGES[stage].prepare(context, args)
    return context


def prepare_clip(context, args):
    """A tokenizer and a config. Merges: --init's, or up to 1,000 learned from 2,000 captions."""
    captions = args.data.captions if args.data else shapes.corpus()
    merges = (clip_embed.load_clip(args.init)[1].merges if args.init and not args.dry_run else
              clip_embed.learn_bpe(captions[::math.ceil(len(captions) / 2000)]))
    context.tokenizer = clip_embed.Tokenizer(merges)
    context.config = replace(clip_embed.PRESETS[args.preset], vocab_size=len(context.tokenizer))
    context.extra["merges"] = [" ".join(pair) for pair in merges]


def prepare_frozen_clip(context, args):
    """The CLIP of --clip or --out, and its embeddings of a folder's pictures."""
    path = Path(args.clip or args.out / "clip.pt")
    if args.dry_run and not (args.clip or path.exists()):  # an untrained one is as fast
        prepare_clip(context, args)
        clip, tokenizer = clip_embed.CLIP(context.config).eval(), context.tokenizer
    else:
        clip, tokenizer = clip_embed.load_clip(path, args.bpe)
    context.extra["clip"] = fingerprint(clip)
    clip.requires_grad_(False).to(context.device)
    context.frozen = FrozenCLIP(clip, tokenizer, context.extra["clip"])
    if args.data and not args.dry_run:
        embed_folder(context.frozen, args.data, args.out, args.workers)


def prepare_prior(context, args, presets=prior.PRESETS):
    """The frozen CLIP, and z_i of the scenes."""
    prepare_frozen_clip(context, args)
    frozen, c = context.frozen, context.frozen.clip.config
    context.config = replace(presets[args.preset], embed_dim=c.embed_dim,
                             clip_text_width=c.text_width)
    if args.dry_run:
        frozen.z_i = torch.zeros(shapes.FIXED_SCENES, c.embed_dim)
    elif not args.data:
        embed_scenes(frozen, args.out, args.seed, args.workers)
    if presets is prior.PRESETS and not (args.dry_run or args.init):
        context.codes = standard(frozen.z_i, args.preset)


def prepare_ar_prior(context, args):
    """As the diffusion prior, and the codes' components and buckets."""
    prepare_prior(context, args, prior.AR_PRESETS)
    if args.init:  # its weights fit its codes
        saved = read_checkpoint(args.init, "ar-prior", mmap=True)
        saved = config_of(prior.ARConfig, saved, args.init)
        context.config = replace(context.config, components=saved.components)
    if args.dry_run or args.init:
        return
    z_i, buckets = context.frozen.z_i, context.config.buckets
    try:
        context.codes = prior.fit_codes(z_i, buckets)
    except ValueError as error:
        raise TooFew(f"ar-prior: z_i of {len(z_i)} pictures: {error}") from None
    dots = torch.cat([(z_i * text["z_t"]).sum(1) for z_i, text in captioned(context, 16)])
    context.codes["dot_edges"], _ = prior.quantile_buckets(dots.cpu(), buckets)
    context.config = replace(context.config, components=len(context.codes["components"]))


def captioned(context, count):
    """(z_i, text) of `count` batches of 256. Training never reaches batch 1 << 41."""
    batches = context.batches("prior", 256, context.seed, None)
    for numbers, captions in (batches[(1 << 41) + k] for k in range(count)):
        yield context.frozen.z_i_of(numbers), context.frozen.encode_texts(captions)[0]


def prepare_decoder(context, args):
    """The frozen CLIP, a config that fits it, and --given."""
    prepare_frozen_clip(context, args)
    c, context.given = context.frozen.clip.config, args.given
    context.config = replace(decoder.PRESETS[args.preset], embed_dim=c.embed_dim,
                             clip_text_width=c.text_width, vocab_size=c.vocab_size)
    context.extra["given"] = args.given


def prepare_upsampler(context, args, size):
    """The config; two large pictures for the sheet. Raises TooFew."""
    context.config = upsample.PRESETS[args.preset][size]
    if args.data:
        args.data.check_count(size, context.recipe.batch_size)
        rows = args.data.rows
        context.shown = [*rows("validation", size), *rows("train", size)][:2]


def clip_sheet(model, batch, context):
    """Eight pictures, and their cosines with eight captions as greys."""
    images, captions = batch[0][:8], batch[1][:8]
    z_t = clip_embed.encode_captions(model, context.tokenizer, captions)[0]["z_t"]
    cosine = (clip_embed.encode_pictures(model, images) @ z_t.T).clamp(0, 1)
    greys = (2 * cosine - 1)[..., None, None, None].expand(-1, -1, *images.shape[1:])
    return grid([*torch.cat([images[:, None], greys], 1).flatten(0, 1)], 1 + len(images))


def prior_sheet(model, batch, context, sample=prior.sample):
    """Eight pictures; below each, those nearest to three z_i drawn for its caption."""
    numbers, captions = batch[0][:8].tolist(), batch[1][:8]
    text, null = context.frozen.encode_texts(captions)
    known = context.frozen.z_i_of(slice(shapes.FIXED_SCENES))
    rows = list(numbers)
    for n in range(3):
        z_i = sample(model, text, null, generators("prior", 8 * n, range(len(captions))))
        rows += (z_i @ known.T).argmax(1).tolist()
    return grid([to_floats(to_tensor(context.picture(n, 64))) for n in rows], len(numbers))


def decoder_sheet(model, batch, context):
    """Eight pictures above decodings of z_i (or --given) and captions."""
    batch = [part[:8] for part in batch]
    text, null = context.frozen.encode_texts(batch[1])
    z_i = z_i_of_batch(batch, text, context) * (context.given != "caption")
    noise = generators("decoder", 0, range(len(z_i)))
    return grid([*batch[0], *decoder.sample(model, z_i, text, null, noise, steps=25)], len(z_i))


def upsampler_sheet(model, batch, context):
    """Two pictures: enlarged bicubically, upsampled, and the truth."""
    size, images = model.config.image_size, []
    for n in context.shown:
        truth = context.picture(n, size)
        low = to_floats(to_tensor(truth.reduce(size // model.config.low_size)))[None]
        enlarged = torch.nn.functional.interpolate(low, (size, size), mode="bicubic")
        x_0 = upsample.sample(model, low.to(context.device), generators(f"upsample-{size}", 0, [0]))
        images += [enlarged[0], x_0[0], to_floats(to_tensor(truth))]
    return grid(images, 3)


class Stage(NamedTuple):
    """The functions of a stage."""
    prepare: Callable  # (context, args): fills in the context
    network: type
    loss: Callable     # (model, batch, context, generators)
    sheet: Callable    # (model, batch, context) → Pillow image


UPSAMPLER = upsample.Upsampler, upsampler_batch_loss, upsampler_sheet
STAGES = {
    "clip": Stage(prepare_clip, clip_embed.CLIP, clip_batch_loss, clip_sheet),
    "prior": Stage(prepare_prior, prior.DiffusionPrior, prior_batch_loss, prior_sheet),
    "ar-prior": Stage(prepare_ar_prior, prior.ARPrior,
                      partial(prior_batch_loss, loss=prior.ar_loss),
                      partial(prior_sheet, sample=prior.ar_sample)),
    "decoder": Stage(prepare_decoder, decoder.Decoder, decoder_batch_loss, decoder_sheet),
    "upsample-256": Stage(partial(prepare_upsampler, size=256), *UPSAMPLER),
    "upsample-1024": Stage(partial(prepare_upsampler, size=1024), *UPSAMPLER),
}


def dry_run(stage, args, device):
    """Print a stage's parameters, memory (no activations), speed and hours."""
    context = prepare(stage, args, device)
    steps, size = context.recipe.steps, context.recipe.batch_size
    with torch.device("meta"):
        parameters = sum(p.numel() for p in STAGES[stage].network(context.config).parameters())
    speed = "too large to measure here"
    if 20 * parameters < machine_memory(device) / 2:
        rate = max(images_a_second(stage, context) for _ in range(3))
        hours = steps * size / rate / 3600
        speed = f"{rate:.3g} images/s here, {steps} steps of {size}: {hours:.3g} hours"
    print(f"{stage}: {parameters / 1e6:.1f} M parameters; weights, gradients, moments, EMA "
          f"{20 * parameters / 1e9:.2f} GB; {speed}", flush=True)


def images_a_second(stage, context):
    """The speed of a training step with a piece of a batch."""
    rows = min(context.recipe.at_once * ranks()[1], context.recipe.batch_size)
    run = build(stage, replace(context, recipe=replace(context.recipe, batch_size=rows)))
    began = time.perf_counter()
    add_gradients(run.loss, run.batches("train")[0], 0, run.context)
    run.optimizer.step()
    update_ema(run.ema, run.model, 0, 0.9999)
    next(run.ema.parameters()).sum().item()  # waits for a GPU
    return rows / (time.perf_counter() - began)


def parse_arguments():
    """The command line's options."""
    parser = argparse.ArgumentParser(
        description="Train unCLIP on the built-in world of shapes, or on --data. Priors and "
        "decoder need the CLIP of --out, or --clip.",
        epilog="Several GPUs: torchrun --nproc-per-node N train.py …")
    add = parser.add_argument
    add("stage", choices=["all", *STAGES, "export"], help="one stage; all in order; or export: "
        "copy a finished run in half precision from --out runs/NAME to weights/NAME")
    add("--preset", default="shapes", choices=RECIPES, help="sizes and recipe (default shapes, "
        "for CPUs; laptop: a laptop's GPU; paper: table 3)")
    add("--data", metavar="FOLDER", help="train on these pictures (docs/training.md)")
    add("--out", type=Path, help="folder of checkpoints, curves, samples (default runs/PRESET)")
    add("--clip", metavar="PATH", help="use this CLIP, frozen")
    add("--bpe", metavar="PATH", help="its merges file, if none lies beside it")
    add("--steps", type=int, help="in all (default: the recipe's, as for the next two)")
    add("--batch-size", type=int, help="rows, of all processes together")
    add("--learning-rate", type=float, help="its peak")
    add("--given", default="z_i", choices=["z_i", "z_t", "caption"], help="decoder's condition "
        "beside the caption (default z_i; z_t: §5.1; caption: none, GLIDE)")
    add("--seed", type=int, default=0)
    add("--init", type=Path, metavar="CHECKPOINT", help="start from these weights")
    add("--resume", action="store_true", help="go on from the checkpoints in --out")
    add("--dry-run", action="store_true", help="print parameters, memory, speed and hours")
    add("--precision", default="auto", choices=PRECISIONS, help="auto: bfloat16 where it is faster")
    add("--workers", type=int, default=1, help="processes that draw pictures (1)")
    add("--log-every", type=int, default=50, help="steps a row of the CSV (50)")
    add("--save-every", type=int, default=500, help="steps between checkpoints (500)")
    add("--device", default="auto", help="auto, cuda, mps or cpu")
    args = parser.parse_args()
    args.out = args.out or Path("runs") / args.preset
    many = (1, 10 ** 9)
    check_ranges(args, steps=many, batch_size=(1, 10 ** 6), learning_rate=(1e-12, 10),
                 seed=(0, 1 << 30), workers=(0, 1024), log_every=many, save_every=many)
    if args.clip and args.stage == "clip":
        raise UserError("--clip is for the other stages; --init trains a CLIP further")
    if args.init and args.stage not in STAGES:
        raise UserError(f"--init {args.init}: a checkpoint is one stage's; train that stage alone")
    return args


def main():
    with one_line_errors():
        args = parse_arguments()
        device = join_processes(args.device)
        keep_freed_memory()
        torch.backends.cudnn.benchmark = True  # find the fastest kernels
        stages = [stage for stage in STAGES if not (args.clip and stage == "clip")]
        if args.stage == "export":
            export(args.out, Path(__file__).parent / "weights" / args.out.resolve().name, stages)
            return
        if args.data:
            with first_before_others(), only_first_prints():
                args.data = gather(args.data, args.out, args.workers, few=not args.init)
        for stage in stages if args.stage == "all" else [args.stage]:
            try:
                (dry_run if args.dry_run else train)(stage, args, device)
            except TooFew as error:
                if args.stage != "all":
                    raise
                print(error, file=sys.stderr)
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
