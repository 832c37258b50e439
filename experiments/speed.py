"""How fast is every stage, and how near to the machine's limit?

In:   a preset and a device. No weights: networks with random weights are as fast as trained ones
Out:  on stdout, a Markdown table with these columns for each stage: its parameters; images a second
      in training and in sampling; the floating-point operations of one training step (torch's own
      counter); the share of the machine's peak in the training step and in the forward pass. The
      peak is that of a matrix product, measured here

A sampled image is timed over a few of its steps and scaled to all of them. Scenes are drawn
beforehand. With --memory the table shows the memory of a training instead, counted tensor by
tensor. With --profile it shows which operations take the decoder's time. With --against diffusers
it shows the decoder beside diffusers' U-Net of the same sizes, the two timed in turn, that U-Net
called as diffusers' own unCLIP pipeline calls it (`pip install diffusers`: no other file needs it).

    python experiments/speed.py
    python experiments/speed.py --memory --preset laptop --precision bfloat16
    python experiments/speed.py --preset laptop --precision bfloat16
    python experiments/speed.py --profile --precision bfloat16
    python experiments/speed.py --against diffusers
"""

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import decoder
import prior
import train
import upsample
from clip_embed import UserError, check_ranges, one_line_errors, pick_device
from sample import generators
from weights.stack import keep_freed_memory


def seconds(run, device, least=2.0):
    """The shortest time of one call of run().

    There is one call to warm up, then at least three calls and `least` seconds.
    """
    times = []
    for k in range(1000):
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times += [time.perf_counter() - began] if k else []
        if len(times) >= 3 and sum(times) > least:
            break
    return min(times)


def matmul_peak(device, dtype, side=2048):
    """Floating-point operations a second in torch's product of two side × side matrices."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side ** 3 / seconds(lambda: a @ b, device)


def operations(run):
    """Floating-point operations of one call of run(), by torch's counter.

    It counts matrix products and convolutions.
    """
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def one_image(stage, model, batch, context, pictures):
    """(run, share): run() samples `pictures` images of a stage in a few steps.

    share: these steps as a share of the default number.
    """
    seeds = generators(stage, 0, range(pictures))
    if stage in ("prior", "decoder"):
        text, null = context.frozen.encode_texts(["a red circle"] * pictures)
        if stage == "prior":
            return lambda: prior.sample(model, text, null, seeds, steps=8), 8 / model.config.steps
        return lambda: decoder.sample(model, text["z_t"], text, null, seeds, steps=5), 5 / model.config.steps
    low = torch.zeros(pictures, 3, model.config.low_size, model.config.low_size, device=batch[0].device)
    return lambda: upsample.sample(model, low, seeds, steps=3), 3 / model.config.steps


def prepare(stage, args, device):
    """The Context of a stage's training, with an untrained CLIP if the stage needs one."""
    args.out, args.seed, args.workers, args.given = Path(args.folder), 0, 0, "z_i"
    args.steps = args.learning_rate = args.data = args.clip = args.bpe = args.init = None
    args.dry_run = True
    return train.prepare(stage, args, device)


def count_memory(stage, args, device):
    """One row of the table of memory, in megabytes.

    Weights, gradients, moments and EMA; CLIP and z_i; the backward pass of a piece of a batch
    (Recipe.at_once). There each tensor that autograd keeps counts once, and parameters do not
    count. Pieces of one row and of two rows are counted; each further row adds their difference.
    """
    context = prepare(stage, args, device)
    frozen, rows = context.frozen, min(context.recipe.at_once, context.recipe.batch_size)
    state = 20 * sum(p.numel() for p in train.STAGES[stage].network(context.config).parameters())
    given = [p.nbytes for p in frozen.clip.parameters()] if frozen else []
    given += [frozen.z_i.nbytes] if frozen and frozen.z_i is not None else []

    def backward(rows):
        kept, run = {}, train.build(stage, replace(context, recipe=replace(context.recipe, batch_size=rows)))

        def note(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        batch = run.batches("train")[0]
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            train.add_gradients(run.loss, batch, 0, run.context)
        return sum(kept.values()) - sum(kept.get(p.data_ptr(), 0) for p in run.model.parameters())

    one, two = backward(1), backward(2)
    sizes = [state, sum(given), one + (two - one) * (rows - 1)]
    return [stage, str(rows), *(f"{size / 1e6:.4g}" for size in [*sizes, sum(sizes)])]


def halved(model, low):
    """The network as load_stack gives it for sampling: in bfloat16, or as it is."""
    return model.eval().to(torch.bfloat16 if low else torch.float32)


def step_of(network, loss):
    """step(): one training step of a network on loss(), as in train.py but for its schedule and EMA."""
    device = next(network.parameters()).device.type
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5, fused=device != "mps")

    def step():
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
    return step


def training(stage, context, device):
    """(network, batch, loss(), step()) of a stage's training."""
    recipe, low = context.recipe, context.bf16
    model = train.STAGES[stage].network(context.config).to(device, memory_format=torch.channels_last)
    batch = train.to_device(context.batches(stage, recipe.batch_size, 0, context.config)[0], device)

    def loss():
        with torch.autocast(device.type, torch.bfloat16, enabled=low), train.attention_kernel(device, low):
            return train.STAGES[stage].loss(model, batch, context, train.row_generators(0, 0, range(recipe.batch_size)))
    return model, batch, loss, step_of(model, loss)


def profile(args, device, shown=12):
    """Rows of a table: the share of the decoder's time that each of torch's operations takes."""
    context = prepare("decoder", args, device)
    context = replace(context, recipe=replace(context.recipe, batch_size=min(64, context.recipe.batch_size)))
    model, batch, _, step = training("decoder", context, device)

    def shares(run):
        run()  # warms up
        with torch.profiler.profile() as found:
            run()
        times = {event.key.removeprefix("aten::"): event.self_cpu_time_total for event in found.key_averages()}
        return {name: time / sum(times.values()) for name, time in times.items()}

    trained, low = shares(step), context.bf16
    run, _ = one_image("decoder", halved(model, low), batch, context, 16)
    with torch.autocast(device.type, torch.bfloat16, enabled=low):
        sampled = shares(run)
    names = sorted(trained | sampled, key=lambda name: -trained.get(name, 0) - sampled.get(name, 0))
    rows = [[name, *(f"{column.get(name, 0):.1%}" for column in (sampled, trained))] for name in names[:shown]]
    return [*rows, ["all others", *(f"{sum(column.get(name, 0) for name in names[shown:]):.1%}" for column in (sampled, trained))]]


def measure(stage, args, device, peak):
    """One row of the table of speed, as a list of strings."""
    context = prepare(stage, args, device)
    recipe, low = context.recipe, context.bf16
    model, batch, loss, step = training(stage, context, device)
    train_flops, train_seconds = operations(step), seconds(step, device)
    with torch.no_grad():
        forward_flops, forward_seconds = operations(loss), seconds(loss, device)
    rate = "–"
    if stage in ("prior", "decoder") or stage.startswith("upsample"):
        pictures = {"prior": 256, "decoder": 16, "upsample-256": 4}.get(stage, 1)
        run, share = one_image(stage, halved(model, low), batch, context, pictures)
        with torch.autocast(device.type, torch.bfloat16, enabled=low):
            rate = f"{pictures * share / seconds(run, device):.3g}"
    return [stage, f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M", str(recipe.batch_size),
            f"{recipe.batch_size / train_seconds:.3g}", rate, f"{train_flops / 1e9:.3g} G",
            f"{train_flops / train_seconds / peak:.0%}", f"{forward_flops / forward_seconds / peak:.0%}"]


GUIDED = {"steps": 10, "guidance_scale": 1.25}  # beside diffusers, whose pipeline always guides


def diffusers_decoder(c):
    """diffusers' U-Net with a DecoderConfig's sizes and Karlo's kinds of blocks."""
    from diffusers import UNet2DConditionModel
    attends = [c.image_size // c.patch_size >> k in c.attention for k in range(len(c.multiples))]
    area = c.patch_size ** 2
    return UNet2DConditionModel(
        c.image_size // c.patch_size, 3 * area, 6 * area,
        down_block_types=[f"{'SimpleCrossAttn' if a else 'ResnetDownsample'}{'Down' if a else ''}Block2D" for a in attends],
        up_block_types=[f"{'SimpleCrossAttnUp' if a else 'ResnetUpsample'}Block2D" for a in attends[::-1]],
        mid_block_type="UNetMidBlock2DSimpleCrossAttn", block_out_channels=[c.channels * m for m in c.multiples],
        layers_per_block=c.depth, attention_head_dim=c.head_channels, cross_attention_dim=c.text_width, dropout=c.dropout,
        norm_num_groups=c.norm_groups, resnet_time_scale_shift="scale_shift", class_embed_type="identity")


def against_diffusers(args, device, pictures=16, tokens=16):
    """Rows of a table: seconds of our decoder and of diffusers' U-Net at the same work, in turn. Raises UserError."""
    try:
        from diffusers import UnCLIPScheduler
    except ImportError:
        raise UserError("--against diffusers: not installed (pip install diffusers)") from None
    c, low = prepare("decoder", args, device).config, args.precision == "bfloat16"
    ours, theirs = (network.to(device, memory_format=torch.channels_last) for network in (decoder.Decoder(c), diffusers_decoder(c)))
    side, area, n = c.image_size // c.patch_size, c.patch_size ** 2, pictures
    text = {"states": torch.randn(n, tokens, c.clip_text_width), "z_t": torch.randn(n, c.embed_dim), "mask": torch.ones(n, tokens, dtype=torch.bool),
            "tokens": torch.zeros(n, tokens, dtype=torch.long)}
    text = {k: v.to(device) for k, v in text.items()}
    null, z_i, t = {k: v[:1] for k, v in text.items()}, text["z_t"], torch.full((n,), 500, device=device)
    x, patched = torch.randn(n, 3, *2 * [c.image_size], device=device), torch.randn(n, 3 * area, side, side, device=device)
    context, added = torch.randn(2 * n, tokens + c.z_i_tokens, c.text_width, device=device), torch.randn(2 * n, 4 * c.channels, device=device)
    mask = torch.ones(2 * n, tokens + c.z_i_tokens, dtype=torch.bool, device=device)

    def their_pass(x, t):
        return theirs(x, t, context[:len(x)], class_labels=added[:len(x)], attention_mask=mask[:len(x)]).sample

    def their_sampling():  # as in UnCLIPPipeline
        scheduler, latents = UnCLIPScheduler(variance_type="learned_range", clip_sample_range=1.0), patched
        scheduler.set_timesteps(GUIDED["steps"])
        steps = scheduler.timesteps.tolist()
        for t, before in zip(steps, [*steps[1:], None]):
            free, given = their_pass(torch.cat([latents] * 2), t).chunk(2)
            (free, _), (given, variance) = free.chunk(2, 1), given.chunk(2, 1)
            noise = torch.cat([free + GUIDED["guidance_scale"] * (given - free), variance], 1)
            latents = scheduler.step(noise, t, latents, prev_timestep=before).prev_sample

    seeds = [torch.Generator() for _ in range(n)]
    work = {"forward pass": (lambda: ours(x, t, z_i, text), lambda: their_pass(patched, t)),
            "training step": (step_of(ours, lambda: torch.cat(ours(x, t, z_i, text), 1).square().mean()),
                              step_of(theirs, lambda: their_pass(patched, t).square().mean())),
            f"{GUIDED['steps']} guided steps": (lambda: decoder.sample(ours, z_i, text, null, seeds, **GUIDED), their_sampling)}
    with torch.no_grad():
        rows = [["parameters", *(f"{sum(p.numel() for p in network.parameters()) / 1e6:.2f} M" for network in (ours, theirs)), ""],
                ["operations of a pass", *(f"{operations(run) / 1e9:.4g} G" for run in work["forward pass"]), ""]]
    for name, runs in tqdm(work.items(), "work"):
        with torch.autocast(device.type, torch.bfloat16, enabled=low), torch.set_grad_enabled("training" in name):
            times = [[seconds(run, device, 0.0) for run in runs] for _ in range(args.turns)]
        mine, other = (statistics.median(column) for column in zip(*times))
        ratios = sorted(b / a for a, b in times)
        rows.append([name, f"{mine:.3f} s", f"{other:.3f} s", f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"])
    return rows


def main():
    parser = argparse.ArgumentParser(
        description="Time every stage's training step and sampler, and compare them with the "
        "fastest matrix product of torch on this machine.")
    parser.add_argument("--preset", default="shapes", choices=train.RECIPES)
    parser.add_argument("--stages", nargs="+", default=list(train.STAGES), choices=train.STAGES, help="default: all")
    parser.add_argument("--batch-size", type=int, help="of training (default: the recipe's)")
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"], help="default float32")
    parser.add_argument("--memory", action="store_true",
                        help="show the memory of training in place of speeds")
    parser.add_argument("--profile", action="store_true", help="show which operations take the decoder's time")
    parser.add_argument("--against", choices=["diffusers"], help="compare the decoder with this library's U-Net")
    parser.add_argument("--turns", type=int, default=5, help="of --against (default 5)")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    args = parser.parse_args()
    with one_line_errors(), tempfile.TemporaryDirectory() as args.folder:
        check_ranges(args, batch_size=(2, 65536), turns=(1, 1000))
        device = pick_device(args.device)
        keep_freed_memory()  # as train.py and sample.py do
        if args.profile:
            rows = profile(args, device)
            print(f"Preset {args.preset}, {args.precision}, {device}, {torch.get_num_threads()} threads: shares of the decoder's time.\n")
            print("| operation of torch | sampling 16 pictures | a training step |\n|---|---|---|")
        elif args.against:
            rows = against_diffusers(args, device)
            print(f"Preset {args.preset}, {args.precision}, {device}, {torch.get_num_threads()} threads, 16 pictures.\n")
            print("| | ours | diffusers | its time / ours, median (lowest to highest) |\n|---|---|---|---|")
        elif args.memory:
            rows = [count_memory(stage, args, device) for stage in tqdm(args.stages, "stages")]
            print(f"Preset {args.preset}, {args.precision}: megabytes that training needs.\n")
            print("| stage | rows a piece | weights, gradients, moments, EMA | CLIP, z_i | the backward pass | together |\n"
                  "|---|---|---|---|---|---|")
        else:
            peak = matmul_peak(device, torch.bfloat16 if args.precision == "bfloat16" else torch.float32)
            rows = [measure(stage, args, device, peak) for stage in tqdm(args.stages, "stages")]
            print(f"Preset {args.preset}, {args.precision}, {device}, {torch.get_num_threads()} threads; a matrix product "
                  f"reaches {peak / 1e9:.3g} G operations a second.\n")
            print("| stage | parameters | batch | trained, images/s | sampled, images/s | operations a step | "
                  "of peak, training | of peak, forward |\n|---|---|---|---|---|---|---|---|")
        print("\n".join(f"| {' | '.join(row)} |" for row in rows))


if __name__ == "__main__":
    main()
