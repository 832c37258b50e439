"""How fast is every stage, and how near to the machine's limit?

In:   a preset and a device. No weights: networks with random weights are as fast as trained ones
Out:  on stdout, a Markdown table with these columns for each stage: its parameters; images a second
      in training and in sampling; the floating-point operations of one training step (torch's own
      counter); the share of the machine's peak in the training step and in the forward pass. The
      peak is that of a matrix product, measured here

A sampled image is timed over a few of its steps and scaled to all of them. Scenes are drawn
beforehand. With --memory the table shows the memory of a training instead, counted tensor by
tensor.

    python experiments/speed.py
    python experiments/speed.py --memory --preset laptop --precision bfloat16
    python experiments/speed.py --preset laptop --precision bfloat16
"""

import argparse
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
from clip_embed import check_ranges, one_line_errors, pick_device
from sample import generators


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
    args.steps = args.learning_rate = args.data = args.clip = args.bpe = None
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


def measure(stage, args, device, peak):
    """One row of the table of speed, as a list of strings."""
    context = prepare(stage, args, device)
    recipe, low = context.recipe, context.bf16
    model = train.STAGES[stage].network(context.config).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    batch = train.to_device(context.batches(stage, recipe.batch_size, 0, context.config)[0], device)

    def loss():
        with torch.autocast(device.type, torch.bfloat16, enabled=low), train.attention_kernel(device, low):
            return train.STAGES[stage].loss(model, batch, context, train.row_generators(0, 0, range(recipe.batch_size)))

    def step():
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    train_flops, train_seconds = operations(step), seconds(step, device)
    with torch.no_grad():
        forward_flops, forward_seconds = operations(loss), seconds(loss, device)
    rate = "–"
    if stage in ("prior", "decoder") or stage.startswith("upsample"):
        pictures = {"prior": 256, "decoder": 16, "upsample-256": 4}.get(stage, 1)
        run, share = one_image(stage, model.eval(), batch, context, pictures)
        rate = f"{pictures * share / seconds(run, device):.3g}"
    return [stage, f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M", str(recipe.batch_size),
            f"{recipe.batch_size / train_seconds:.3g}", rate, f"{train_flops / 1e9:.3g} G",
            f"{train_flops / train_seconds / peak:.0%}", f"{forward_flops / forward_seconds / peak:.0%}"]


def main():
    parser = argparse.ArgumentParser(
        description="Time every stage's training step and sampler, and compare them with the "
        "fastest matrix product of torch on this machine.")
    parser.add_argument("--preset", default="shapes", choices=train.RECIPES)
    parser.add_argument("--stages", nargs="+", default=list(train.STAGES), choices=train.STAGES, help="default: all")
    parser.add_argument("--batch-size", type=int, help="of training (default: the recipe's)")
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"], help="of training (default float32); "
                        "sampling is float32")
    parser.add_argument("--memory", action="store_true",
                        help="show the memory of training in place of speeds")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    args = parser.parse_args()
    with one_line_errors(), tempfile.TemporaryDirectory() as args.folder:
        check_ranges(args, batch_size=(2, 65536))
        device = pick_device(args.device)
        if args.memory:
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
