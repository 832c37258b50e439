"""The training loop: shared among processes, split into pieces, stopped, killed, out of disk; and what it costs beforehand."""

import argparse
import csv
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm

import clip_embed
import decoder
import prior
import train
import upsample
from clip_embed import UserError
from data import shapes
from data.embeddings import FrozenCLIP
import speed
from test_chain import TINY, run, tiny  # noqa: F401 (tiny is a fixture)

CPU = torch.device("cpu")
fork = multiprocessing.get_context("fork") if "fork" in multiprocessing.get_all_start_methods() else None
needs_fork = pytest.mark.skipif(fork is None, reason="starts processes by fork")


# ----------------------------------------------------------------------------- batches and noise by row

@pytest.mark.parametrize("stage", train.STAGES)
def test_a_row_of_a_batch_is_the_same_in_any_process(stage, monkeypatch):
    """Shares of 6 cut through CLIP's groups of a scene and its near misses, and through four crops of a scene."""
    monkeypatch.setattr(shapes, "FIXED_SCENES", 40)
    config = upsample.UpsamplerConfig(image_size=256, low_size=64)
    make = lambda rank=0, world=1, split="train": shapes.ShapeBatches(stage, 12, 7, config, rank, world, split, upsample.training_crops)[3]
    whole, parts = make(), [make(rank, 2) for rank in (0, 1)]
    for n, part in enumerate(whole):
        first, second = (p[n] for p in parts)
        assert len(first) == len(second) == 6
        assert first + second == part if isinstance(part, list) else torch.equal(torch.cat([first, second]), part)
    held_out = make(0, 1, "validation")
    assert not all(a == b if isinstance(a, list) else torch.equal(a, b) for a, b in zip(whole, held_out))


def test_the_priors_never_train_on_the_scenes_that_are_held_out(monkeypatch):
    monkeypatch.setattr(shapes, "FIXED_SCENES", 1280)
    scenes = lambda split: {n for k in range(40) for n in shapes.ShapeBatches("prior", 64, 0, None, 0, 1, split)[k][0].tolist()}
    trained, held_out = scenes("train"), scenes("validation")
    assert held_out == set(range(1270, 1280)) and max(trained) < 1270 and len(trained) > 1000


def test_noise_belongs_to_its_row_and_is_what_torch_would_draw():
    def draw(rows, step=2):
        def each(function, *shape):
            return torch.stack([function(*shape, generator=g) for g in generators])
        generators = train.row_generators(5, step, rows)
        return each(lambda generator: torch.randint(1000, (), generator=generator)), each(torch.randn, 3, 8, 8), each(torch.rand, 2), each(torch.rand, ())
    whole, parts = draw(range(4000)), [draw(range(1500)), draw(range(1500, 4000))]
    t, noise, pair, single = whole
    assert all(torch.equal(x, torch.cat(both)) for x, both in zip(whole, zip(*parts)))
    assert not any(torch.equal(x, y) for x, y in zip(whole, draw(range(4000), step=3)))
    assert t.dtype == torch.int64 and noise.dtype == pair.dtype == torch.float32 and noise.shape == (4000, 3, 8, 8)
    assert t.min() >= 0 and t.max() <= 999 and abs(t.double().mean() - 499.5) < 4 * 288.7 / 4000 ** 0.5
    assert abs(noise.mean()) < 4 / noise.numel() ** 0.5 and abs(noise.var() - 1) < 4 * (2 / noise.numel()) ** 0.5
    assert abs(pair.mean() - 0.5) < 4 * 0.289 / 8000 ** 0.5 and pair.min() >= 0 and single.max() < 1
    assert len({*single.tolist()}) > 3900 and torch.corrcoef(noise.flatten(1))[0, 1:].abs().max() < 0.5


# ----------------------------------------------------------------------------- one batch, however it is shared

def first_gradients(stage, rank, world, **changes):
    """{name: gradient} of a tiny network's first step, float64 all through, of 12 rows shared by `world` processes."""
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double  # what the code keeps in float32 would hide all but seven digits
    torch.manual_seed(1)
    tokenizer = clip_embed.Tokenizer([])
    clip = clip_embed.CLIP(replace(TINY[clip_embed], vocab_size=len(tokenizer))).eval()
    config = {"clip": clip.config, "prior": TINY[prior], "ar-prior": TINY["ar-prior"],
              "decoder": replace(TINY[decoder], dropout=0.0)}.get(stage) or replace(TINY[upsample][int(stage[9:])], dropout=0.0)
    recipe = replace(train.Recipe(12, 1, 1e-3), **changes)
    z_i = torch.nn.functional.normalize(torch.randn(shapes.FIXED_SCENES, 16), dim=1)
    frozen = FrozenCLIP(clip, tokenizer, z_i=z_i)
    context = train.Context(shapes.ShapeBatches, None, CPU, 3, False, recipe, config, tokenizer, frozen)
    if stage == "ar-prior":
        codes = prior.fit_codes(z_i, 1024)
        context.codes = codes | {"dot_edges": torch.linspace(-1, 1, 1023)}
        context.config = replace(config, components=len(codes["components"]))
    start = train.build(stage, context)
    model, loss = start.model, start.loss
    torch.manual_seed(2)
    for p in model.parameters():
        if not p.abs().sum():
            torch.nn.init.normal_(p, std=0.05)
    batch = shapes.ShapeBatches(stage, 12, 3, context.config, rank, world, crops=upsample.training_crops)[5]
    value = train.mean_of_ranks([train.add_gradients(loss, batch, 5, context)], CPU)[0]
    return {"loss": torch.tensor(value), **{name: p.grad for name, p in model.named_parameters()}}


def in_processes(world, folder, jobs):
    """Results of first_gradients(**job) for each job, as the last of `world` forked processes under gloo sees them."""
    def work(rank):
        shapes.FIXED_SCENES = 40
        if world > 1:
            torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=world)
        torch.save([first_gradients(rank=rank, world=world, **job) for job in jobs], folder / f"{world}-{rank}.pt")

    processes = [fork.Process(target=work, args=(rank,), daemon=True) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
        assert process.exitcode == 0
    return torch.load(folder / f"{world}-{world - 1}.pt", weights_only=True)


def assert_same(a, b, within):
    assert a.keys() == b.keys() and all(g is not None and g.abs().max() > 0 for g in a.values())
    for name in a:
        assert (a[name] - b[name]).abs().max() <= within * a[name].abs().max(), name


@needs_fork
def test_processes_and_pieces_have_the_gradients_of_the_whole_batch(tmp_path):
    """Two processes, each in pieces of 5 and 1 rows, or in one; one process in pieces; CLIP's batch is never in pieces."""
    stages, pieces = list(train.STAGES), [stage for stage in train.STAGES if stage != "clip"]
    one = in_processes(1, tmp_path, [{"stage": s} for s in stages] + [{"stage": s, "at_once": 5} for s in pieces])
    two = in_processes(2, tmp_path, [{"stage": s} for s in stages] + [{"stage": s, "at_once": 5} for s in pieces])
    whole = dict(zip(stages, one))
    for stage, alone, shared in zip(stages + pieces, one, two):
        assert_same(whole[stage], alone, 1e-10)
        assert_same(whole[stage], shared, 1e-10)


@needs_fork
def test_recomputed_blocks_have_the_same_gradients(tmp_path):
    assert_same(*in_processes(1, tmp_path, [{"stage": "clip", "recompute": again} for again in (False, True)]), 1e-12)


@pytest.mark.parametrize("low", [False, True])
def test_recomputing_keeps_less_and_spares_the_ema(low):
    """bfloat16 too: its attention must be of one kind in both passes."""
    kept, tokenizer = {}, clip_embed.Tokenizer([])
    config = replace(TINY[clip_embed], vocab_size=len(tokenizer), vision_layers=6, vision_patch_size=8)
    for again in (False, True):
        recipe = replace(train.Recipe(8, 1, 1e-3), recompute=again)
        context = train.Context(shapes.ShapeBatches, None, CPU, 0, low, recipe, config, tokenizer)
        start = train.build("clip", context)
        model, ema, loss = start.model, start.ema, start.loss
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: (sizes.append(x.nbytes), x)[1], lambda x: x):
            train.add_gradients(loss, shapes.ShapeBatches("clip", 8, 0, config)[0], 0, context)
        kept[again] = sum(sizes)
        with torch.no_grad():
            before = model.encode_image(torch.ones(1, 3, 64, 64))
            for p in model.parameters():
                p.zero_()
            assert torch.equal(ema.encode_image(torch.ones(1, 3, 64, 64)), before)
    assert kept[True] < 0.5 * kept[False]


@pytest.mark.slow
def test_two_processes_under_torchrun_train_what_one_does(tmp_path):
    """By the command line: the shapes upsampler, three steps."""
    weights, options = [], ["upsample-256", "--batch-size", "4", "--steps", "3", "--save-every", "9", "--device", "cpu",
                        "--precision", "float32", "--out"]
    for name, launch in (("one", []), ("two", ["-m", "torch.distributed.run", "--nproc-per-node", "2"])):
        subprocess.run([sys.executable, *launch, train.__file__, *options, tmp_path / name], check=True, timeout=150)
        files = [p for p in (tmp_path / name).iterdir() if p.name != ".upsample-256.lock"]
        assert sorted(p.suffix for p in files) == [".csv", ".png", ".png", ".pt"]
        weights.append(torch.load(tmp_path / name / "upsample-256.pt", weights_only=True))
    assert all(torch.allclose(v, weights[1]["model"][k], atol=1e-6) for k, v in weights[0]["model"].items())
    rows = [np.array(checkpoint["training"]["rows"])[:, [0, 1, 3]].astype(float) for checkpoint in weights]
    assert rows[0].shape == (1, 3) and np.allclose(*rows, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the two processes in /proc")
def test_one_of_two_processes_under_torchrun_is_killed_and_they_end_as_if_it_never_was(tmp_path):
    """By the command line, to the bit. The process that is killed is drawn; torchrun then stops the other."""
    def command(out, *more):
        return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", train.__file__, "upsample-256", "--batch-size", "4",
                "--steps", "4", "--save-every", "2", "--device", "cpu", "--out", tmp_path / out, *more]

    subprocess.run(command("never"), check=True, timeout=240)
    path, rng, deadline = tmp_path / "killed/upsample-256.pt", np.random.default_rng(), time.monotonic() + 240
    torchrun = subprocess.Popen(command("killed"))
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(rng.uniform(0, 0.5))
    two = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
    assert len(two) == 2
    os.kill(int(rng.choice(two)), signal.SIGKILL)
    assert torchrun.wait(timeout=240) != 0
    assert torch.load(path, weights_only=True)["training"]["step"] == 2
    subprocess.run(command("killed", "--resume"), check=True, timeout=240)
    assert_same_end(*(argparse.Namespace(out=tmp_path / name) for name in ("never", "killed")))


# ----------------------------------------------------------------------------- stopped, in every way

class Noise(Dataset):
    """Batches of an upsampler that cost nothing to draw, with the interface of ShapeBatches."""

    def __init__(self, stage, batch_size, seed, config, rank=0, world=1, split="train"):
        self.share, self.held_out = batch_size // world, split != "train"

    def __getitem__(self, k):
        g = torch.Generator().manual_seed(2 * k + self.held_out)
        return torch.randn(self.share, 3, 64, 64, generator=g), torch.randn(self.share, 3, 16, 16, generator=g)


@pytest.fixture
def quick(tiny, monkeypatch):  # noqa: F811
    """Arguments of a training whose steps take milliseconds: an upsampler on noise."""
    def prepare(context, args):
        context.config, context.batches = TINY[upsample][256], Noise

    sheet = lambda model, batch, context: Image.new("RGB", (8, 8))
    monkeypatch.setitem(train.STAGES, "upsample-256", train.STAGES["upsample-256"]._replace(prepare=prepare, sheet=sheet))
    return tiny


def final(args, stage="upsample-256"):
    return torch.load(args.out / f"{stage}.pt", weights_only=True)


def assert_same_end(a, b, stage="upsample-256"):
    """Bit for bit: the EMA, the weights, the optimizer's moments, and the losses of every row."""
    a, b = final(a, stage), final(b, stage)
    for x, y in ((a["model"], b["model"]), (a["training"]["model"], b["training"]["model"])):
        assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)
    moments = [checkpoint["training"]["optimizer"]["state"] for checkpoint in (a, b)]
    assert all(torch.equal(moments[0][n][k], moments[1][n][k]) for n in moments[0] for k in moments[0][n])
    assert [(r[0], r[1], r[3]) for r in a["training"]["rows"]] == [(r[0], r[1], r[3]) for r in b["training"]["rows"]]


def also(args, **changes):
    return argparse.Namespace(**vars(args) | changes)


def train_to_be_killed(args):
    """In a fork. Forks share tqdm's lock; a process killed while it holds the lock would leave the others waiting for ever."""
    tqdm.set_lock(threading.RLock())
    train.train("upsample-256", args, CPU)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_finishes_the_step_saves_and_says_how_to_go_on(number, quick, monkeypatch):
    stopped = also(quick, out=quick.out.parent / "stopped", save_every=100, workers=1)
    loss, calls, before = upsample.upsampler_loss, [], signal.getsignal(number)

    def interrupted(*batch):
        calls.append(batch)
        if len(calls) == 2:  # terminals and service managers signal the data workers as well
            workers = [worker.pid for worker in multiprocessing.active_children()]
            for process in (*workers, os.getpid()):
                os.kill(process, number)
            assert len(workers) == 1
            time.sleep(0.5)
        return loss(*batch)

    train.train("upsample-256", also(quick, save_every=100), CPU)
    with monkeypatch.context() as patch:
        patch.setattr(upsample, "upsampler_loss", interrupted)
        with pytest.raises(KeyboardInterrupt, match=r"upsample-256: stopped after step 2, saved in .*upsample-256.pt; go on with --resume and the same"):
            train.train("upsample-256", stopped, CPU)
    assert final(stopped)["training"]["step"] == 2 and signal.getsignal(number) is before
    train.train("upsample-256", also(stopped, resume=True), CPU)
    assert_same_end(quick, stopped)


@needs_fork
def test_a_second_training_of_a_checkpoint_is_refused_until_the_first_ends_or_dies(quick, monkeypatch):
    loss, begun = upsample.upsampler_loss, fork.Event()

    def slow(*batch):
        begun.set()
        time.sleep(60)
        return loss(*batch)

    with monkeypatch.context() as patch:
        patch.setattr(upsample, "upsampler_loss", slow)
        child = fork.Process(target=train_to_be_killed, args=[also(quick, workers=1)])
        child.start()
    assert begun.wait(60)
    with pytest.raises(UserError, match="upsample-256.pt: another process trains it now; wait for its end, or train elsewhere by --out"):
        train.train("upsample-256", quick, CPU)
    elsewhere = also(quick, out=quick.out / "elsewhere")
    train.train("upsample-256", elsewhere, CPU)
    child.kill()  # its data worker still lives for some seconds
    child.join()
    train.train("upsample-256", quick, CPU)
    assert_same_end(quick, elsewhere)


def test_a_second_ctrl_c_stops_at_once():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
    try:
        with pytest.raises(KeyboardInterrupt), train.asked_to_stop() as asked:
            os.kill(os.getpid(), signal.SIGINT)
            assert asked == [signal.SIGINT]
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_full_disk_leaves_the_last_good_checkpoint_and_the_error_says_so(quick):
    train.train("upsample-256", also(quick, steps=2), CPU)
    before, resource = (quick.out / "upsample-256.pt").read_bytes(), pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))  # a longer file cannot be written
    try:
        with pytest.raises(UserError, match="could not be written .*File too large.*; what was there before still is: .*--resume"):
            train.train("upsample-256", also(quick, resume=True), CPU)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (quick.out / "upsample-256.pt").read_bytes() == before and not list(quick.out.glob("*.part"))
    train.train("upsample-256", also(quick, resume=True), CPU)
    assert final(quick)["training"]["step"] == 4


def test_a_clock_that_jumps_back_changes_nothing(quick, monkeypatch):
    train.train("upsample-256", also(quick, steps=4), CPU)
    now, hours = time.time(), iter(range(1 << 30))
    monkeypatch.setattr(time, "time", lambda: now - 3600 * next(hours))  # an hour back, each time that it is asked
    turned = also(quick, out=quick.out.parent / "turned", steps=4)
    train.train("upsample-256", turned, CPU)
    assert_same_end(quick, turned)
    assert all(0 < row[2] < 1e6 for row in final(turned)["training"]["rows"])  # images a second


def test_an_exploding_loss_stops_training_and_keeps_the_checkpoint(quick, monkeypatch):
    train.train("upsample-256", also(quick, steps=2), CPU)
    before, loss = (quick.out / "upsample-256.pt").read_bytes(), upsample.upsampler_loss
    monkeypatch.setattr(upsample, "upsampler_loss", lambda *arguments: 2e4 * loss(*arguments))
    with pytest.raises(UserError, match=r"the loss at step 2 is [\d.]+e\+04 .before: [\d.]+.*; the last good checkpoint is .*lower --learning-rate"):
        train.train("upsample-256", also(quick, resume=True), CPU)
    assert (quick.out / "upsample-256.pt").read_bytes() == before


def test_other_defaults_of_sampling_resume_and_other_sizes_do_not(quick):
    train.train("upsample-256", also(quick, steps=2), CPU)
    old = final(quick)
    torch.save(old | {"config": old["config"] | {"steps": 99}}, quick.out / "upsample-256.pt")
    train.train("upsample-256", also(quick, resume=True), CPU)
    assert final(quick)["training"]["step"] > 2 and final(quick)["config"]["steps"] == old["config"]["steps"] != 99
    for other in ({"channels": 99}, {"unheard of": 1}):
        torch.save(old | {"config": old["config"] | other}, quick.out / "upsample-256.pt")
        with pytest.raises(UserError, match="cannot be resumed, it has other sizes"):
            train.train("upsample-256", also(quick, resume=True), CPU)


def test_a_run_is_not_resumed_with_batches_of_another_size(quick):
    """Its rows would be others. More steps are as good as the rest of them."""
    train.train("upsample-256", also(quick, steps=2), CPU)
    with pytest.raises(UserError, match="cannot be resumed, it was trained with another batch size: 4, not 8"):
        train.train("upsample-256", also(quick, batch_size=8, resume=True), CPU)
    train.train("upsample-256", also(quick, steps=3, resume=True), CPU)
    assert final(quick)["training"]["step"] == 3


@needs_fork
@pytest.mark.slow
def test_killed_fifty_times_also_while_saving_it_ends_as_if_it_never_was(quick):
    """Every other kill comes while the checkpoint is being written: the parent watches for the half-written file."""
    rng, killed = np.random.default_rng(), also(quick, out=quick.out.parent / "killed", resume=True)
    path, steps, halves = killed.out / "upsample-256.pt", 150, 0
    began = time.time()
    train.train("upsample-256", also(quick, steps=steps, save_every=1), CPU)
    a_step = (time.time() - began) / steps
    stamp = lambda file: file.stat().st_mtime_ns if file.exists() else 0
    for kill in range(50):
        child = fork.Process(target=train_to_be_killed, args=[also(killed, steps=steps, save_every=1)], daemon=True)
        before, deadline = stamp(path), time.monotonic() + 120
        going = lambda: child.is_alive() and time.monotonic() < deadline
        child.start()
        while going() and stamp(path) == before:  # one step on: never is nothing done
            time.sleep(0.0005)
        if kill % 2:
            while going() and not path.with_suffix(".part").exists():
                time.sleep(0.0005)
            time.sleep(rng.uniform(0, 0.002))
        else:
            time.sleep(rng.uniform(0, 2 * a_step))
        assert child.is_alive(), f"done before kill {kill}"
        assert time.monotonic() < deadline, f"nothing done in two minutes before kill {kill}"
        child.kill()
        child.join()
        halves += path.with_suffix(".part").exists()
        assert final(killed)["training"]["step"] > 0  # readable
    assert halves >= 8
    train.train("upsample-256", also(killed, steps=steps, save_every=1), CPU)
    assert_same_end(quick, killed)


def test_clip_meets_near_misses_alone_for_a_while_but_not_on_a_folders_pictures(tiny, monkeypatch):  # noqa: F811
    """Of four steps the middle two in groups; the others and all held-out batches whole."""
    seen, loss = [], clip_embed.contrastive_loss
    monkeypatch.setattr(clip_embed, "contrastive_loss", lambda *args: (seen.append((torch.is_grad_enabled(), args[3])), loss(*args))[1])
    monkeypatch.setitem(train.RECIPES["shapes"], "clip", train.Recipe(8, 4, 1e-3, near=(0.25, 0.75)))
    train.train("clip", also(tiny, batch_size=None, steps=None, save_every=1), CPU)
    assert [group for training, group in seen if training] == [None, 4, 4, None]
    assert {group for training, group in seen if not training} == {None}
    monkeypatch.setitem(train.STAGES, "clip", train.STAGES["clip"]._replace(prepare=lambda context, args: None))
    folder = types.SimpleNamespace(mark="0", picture=None)
    assert train.prepare("clip", also(tiny, batch_size=None, steps=None, data=folder), CPU).recipe.near == (0, 0)


def test_clips_places_and_projections_do_not_decay_and_the_toys_projections_begin_larger(tiny):  # noqa: F811
    """Else CLIP loses places, and directions of z_i (docs/trials.md). Vectors of tokens decay with the matrices."""
    run = train.build("clip", train.prepare("clip", tiny, CPU))
    names = {id(p): name for name, p in run.model.named_parameters()}
    free = {names[id(p)] for p in run.optimizer.param_groups[1]["params"] if p.ndim > 1}
    assert free == {"visual.positional_embedding", "positional_embedding", "visual.proj", "text_projection"}
    for stem, size in ((False, 1), (True, 10)):
        clip = clip_embed.CLIP(clip_embed.CLIPConfig(stem=stem))
        for p in (clip.visual.proj, clip.text_projection):
            assert float(p.detach().std()) == pytest.approx(size * len(p) ** -0.5, rel=0.05)


def test_the_temperature_still_learns_after_it_passed_its_limit():
    """CLIP clips the parameter. If only the value used were clipped, no gradient would bring it down again."""
    z_i = torch.nn.functional.normalize(torch.randn(4, 8), dim=-1)
    model = types.SimpleNamespace(logit_scale=torch.nn.Parameter(torch.tensor(9.0)))
    context = types.SimpleNamespace(tokenizer=None, alone=False, recipe=train.Recipe(4, 1, 1e-3, scale=15.0))
    with pytest.MonkeyPatch.context() as patch:  # captions that fit the wrong pictures: a lower scale is better
        patch.setattr(clip_embed, "encode_captions", lambda *args: ({"z_t": z_i.flip(0)}, None))
        patch.setattr(clip_embed, "encode_pictures", lambda *args: z_i)
        train.clip_batch_loss(model, (None, None), context, None).backward()
    assert float(model.logit_scale.exp()) == pytest.approx(15) and float(model.logit_scale.grad) > 0


# ----------------------------------------------------------------------------- what is measured

def test_the_held_out_loss_is_of_the_same_batches_each_time(quick):
    """With the learning rate at nothing the EMA stays as it is: so does its loss, while the training loss goes with the batch."""
    train.train("upsample-256", also(quick, steps=6, learning_rate=1e-12), CPU)
    rows = final(quick)["training"]["rows"]
    held_out = [row[3] for row in rows if row[3] is not None]
    assert len(held_out) == 3 and np.ptp(held_out) < 1e-6 and np.ptp([row[1] for row in rows]) > 1e-3
    with open(quick.out / "upsample-256.csv") as file:
        read = list(csv.DictReader(file))
    assert [float(row["held_out_loss"]) for row in read if row["held_out_loss"]] == held_out
    assert [row["step"] for row in read if not row["held_out_loss"]] == ["3"]
    colours = {colour for _, colour in Image.open(quick.out / "upsample-256-loss.png").getcolors(1 << 16)}
    assert {(65, 105, 225), (255, 140, 0)} <= colours


@torch.no_grad()
def test_the_held_out_loss_is_the_emas(quick):
    """Measured here over again."""
    with torch.enable_grad():
        train.train("upsample-256", also(quick, steps=8, learning_rate=0.02), CPU)
    checkpoint, losses = final(quick), []
    model = upsample.Upsampler(TINY[upsample][256]).eval()
    model.load_state_dict(checkpoint["model"])
    for k in range(train.VALIDATION):
        generators = train.row_generators(3, k, range(4), held_out=True)
        losses.append(float(upsample.upsampler_loss(model, *Noise("", 4, 3, None, split="validation")[k], generators)))
    assert checkpoint["training"]["rows"][-1][3] == pytest.approx(np.mean(losses), rel=1e-6)


def test_a_dry_run_writes_nothing_and_counts_what_training_would_take(tiny, monkeypatch, capsys, tmp_path):  # noqa: F811
    monkeypatch.setitem(train.RECIPES, "shapes", {s: train.Recipe(8, 1000, 1e-3, at_once=8 if s == "clip" else 4) for s in train.STAGES})
    run(train, monkeypatch, "all", "--dry-run", "--out", tmp_path / "runs", "--workers", 0, "--device", "cpu")
    lines, figure = capsys.readouterr().out.splitlines(), lambda pattern, line: float(re.search(pattern, line)[1])
    assert [line.split(":")[0] for line in lines] == list(train.STAGES) and not (tmp_path / "runs").exists()
    for line in lines:
        assert figure(r"([\d.e+-]+) images/s", line) * figure(r"([\d.e+-]+) hours", line) * 3600 == pytest.approx(8000, rel=0.02)
    model = upsample.Upsampler(TINY[upsample][256])
    n = sum(p.numel() for p in model.parameters())
    assert figure(r"([\d.]+) M parameters", lines[4]) == pytest.approx(n / 1e6, abs=0.05)
    assert figure(r"moments, EMA ([\d.]+)", lines[4]) == pytest.approx(20 * n / 1e9, abs=0.005)
    monkeypatch.setattr(os, "sysconf", lambda name: 1)
    run(train, monkeypatch, "upsample-256", "--dry-run", "--out", tmp_path / "runs", "--device", "cpu")
    assert "too large to measure here" in capsys.readouterr().out


def test_speed_counts_the_memory_of_training_without_training(tiny, monkeypatch, capsys):  # noqa: F811
    """The backward pass grows by the row: twice the rows need less than twice the memory, but more than once."""
    sizes = {}
    for at_once in (4, 8):
        monkeypatch.setitem(train.RECIPES, "shapes", {s: train.Recipe(8, 1000, 1e-3, at_once=at_once) for s in train.STAGES})
        monkeypatch.setattr(sys, "argv", ["speed.py", "--memory", "--device", "cpu"])
        speed.main()
        rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
        assert [row[0].strip("| ") for row in rows] == list(train.STAGES)
        sizes[at_once] = {row[0].strip("| "): [float(figure.strip(" |") or 0) for figure in row[2:]] for row in rows}
        assert all(row[1].split()[0] == f"{at_once}" for row in rows)
    n = sum(p.numel() for p in upsample.Upsampler(TINY[upsample][256]).parameters())
    for stage in train.STAGES:
        state, clip, backward, whole = sizes[4][stage]
        assert whole == pytest.approx(state + clip + backward, rel=2e-3) and backward > 0
        assert (clip > 0) == (stage in ("prior", "ar-prior", "decoder"))
        assert backward < sizes[8][stage][2] < 2.01 * backward
    assert sizes[4]["upsample-256"][0] == pytest.approx(20 * n / 1e6, abs=0.01)


@pytest.mark.parametrize("stage", train.STAGES)
def test_every_batch_of_the_laptop_can_be_cut_and_clips_is_not(stage):
    recipe = train.RECIPES["laptop"][stage]
    assert recipe.batch_size % min(recipe.at_once, recipe.batch_size) == 0 and (stage != "clip" or recipe.at_once >= recipe.batch_size)
