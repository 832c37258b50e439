"""Training that resumes exactly, the whole chain on a tiny untrained stack, and how wrong use is told."""

import argparse
import itertools
import platform
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import clip_embed
import decoder
import manipulate
import prior
import sample
import train
import upsample
from clip_embed import UserError
from data import embeddings, shapes
from weights import checkpoints
from weights import stack as stack_module

ROOT = Path(__file__).resolve().parent.parent
TINY = {
    clip_embed: clip_embed.CLIPConfig(embed_dim=16, image_size=64, vision_patch_size=32, vision_width=16, vision_layers=1, vision_heads=1,
                                      text_width=16, text_layers=1, text_heads=1),
    prior: prior.PriorConfig(embed_dim=16, clip_text_width=16, text_context=77, width=16, layers=1, heads=1),
    "ar-prior": prior.ARConfig(embed_dim=16, clip_text_width=16, components=4, buckets=1024, width=16, layers=1, heads=1),
    decoder: decoder.DecoderConfig(patch_size=8, channels=16, depth=1, multiples=(1, 2), attention=(4,), head_channels=16, norm_groups=8,
                                   embed_dim=16, clip_text_width=16, text_layers=0, text_width=16, text_heads=1, text_context=77),
    upsample: {256: upsample.UpsamplerConfig(patch_size=16, channels=16, depth=1, multiples=(1, 2), norm_groups=8, dropout=0.1),
               1024: upsample.UpsamplerConfig(**upsample.SECOND | {"patch_size": 64, "channels": 16, "depth": 1, "multiples": (1, 2), "norm_groups": 8, "dropout": 0.1})},
}


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Every preset and recipe replaced by tiny ones (dropout included); returns train's arguments."""
    for module, config in TINY.items():
        monkeypatch.setitem(prior.AR_PRESETS if module == "ar-prior" else module.PRESETS, "shapes", config)
    monkeypatch.setitem(train.RECIPES, "shapes", {stage: train.Recipe(4, 4, 1e-3, 0.1, ema_decay=0.9, warmup=2) for stage in train.STAGES})
    monkeypatch.setattr(shapes, "FIXED_SCENES", 20)
    monkeypatch.setattr(train, "VALIDATION", 2)
    monkeypatch.setattr(shapes, "corpus", lambda: ["a red circle", "a small blue star"])
    monkeypatch.setattr(decoder, "ladder", lambda steps, top, power: [0, 500, top])
    monkeypatch.setattr(upsample, "ladder", lambda steps, top, power: [0, 500, top])
    return argparse.Namespace(preset="shapes", out=tmp_path / "runs", steps=None, batch_size=None, learning_rate=None, seed=3, resume=False,
                              init=None, data=None, clip=None, bpe=None, precision="float32", workers=0, log_every=3, save_every=2,
                              dry_run=False, given="z_i")


def stopped_after(monkeypatch, saves):
    """Make train die, as by a power cut, right after its `saves`-th checkpoint."""
    write, count = checkpoints.save_atomically, itertools.count(1)

    def save(content, path):
        write(content, path)
        if next(count) == saves:
            raise KeyboardInterrupt

    monkeypatch.setattr(train, "save_atomically", save)


@pytest.mark.parametrize("stage, precision", [*((stage, "float32") for stage in train.STAGES), ("clip", "bfloat16"), ("decoder", "bfloat16")])
def test_resuming_equals_never_having_stopped(stage, precision, tiny, monkeypatch):
    tiny.precision = precision
    if stage in ("prior", "ar-prior", "decoder"):
        train.train("clip", tiny, torch.device("cpu"))
    whole, parts = argparse.Namespace(**vars(tiny)), argparse.Namespace(**vars(tiny))
    parts.out = tiny.out.parent / "parts"
    parts.out.mkdir()
    if (tiny.out / "clip.pt").exists() and stage != "clip":
        (parts.out / "clip.pt").write_bytes((tiny.out / "clip.pt").read_bytes())
    train.train(stage, whole, torch.device("cpu"))
    with monkeypatch.context() as patch:
        stopped_after(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            train.train(stage, parts, torch.device("cpu"))
    parts.resume, parts.workers = True, 1
    assert torch.load(parts.out / f"{stage}.pt", weights_only=True)["training"]["step"] == 2
    train.train(stage, parts, torch.device("cpu"))
    a, b = (torch.load(args.out / f"{stage}.pt", weights_only=True) for args in (whole, parts))
    assert [(row[0], row[3] is None) for row in a["training"]["rows"]] == [(2, False), (3, True), (4, False)]
    assert [row[:2] + row[3:] for row in a["training"]["rows"]] == [row[:2] + row[3:] for row in b["training"]["rows"]]
    for x, y in ((a["model"], b["model"]), (a["training"]["model"], b["training"]["model"])):
        assert all(torch.equal(x[k], y[k]) for k in x)
    assert any(not torch.equal(a["model"][k], a["training"]["model"][k]) for k in a["model"])  # EMA is not the model
    assert Image.open(parts.out / f"{stage}-loss.png").size == (640, 360)
    assert Image.open(parts.out / f"{stage}-samples.png").size[0] >= 64
    assert (parts.out / f"{stage}.csv").read_text().splitlines()[0] == "step,loss,images_per_second,held_out_loss"


def test_a_run_is_not_overwritten_and_a_bad_loss_stops_it(tiny, monkeypatch):
    train.train("upsample-256", tiny, torch.device("cpu"))
    with pytest.raises(UserError, match="--resume"):
        train.train("upsample-256", tiny, torch.device("cpu"))
    before = (tiny.out / "upsample-256.pt").read_bytes()
    tiny.resume, tiny.steps = True, 6
    monkeypatch.setattr(upsample, "upsampler_loss", lambda model, high, low, generators, **options: model(
        high, torch.zeros(len(high), dtype=torch.long), low).mean() * float("nan"))
    with pytest.raises(UserError, match="loss at step 4 is nan"):
        train.train("upsample-256", tiny, torch.device("cpu"))
    assert (tiny.out / "upsample-256.pt").read_bytes() == before


def test_init_starts_from_a_checkpoints_weights(tiny):
    train.train("upsample-256", tiny, torch.device("cpu"))
    tiny.init, first = tiny.out / "upsample-256.pt", torch.load(tiny.out / "upsample-256.pt", weights_only=True)["model"]
    tiny.out, tiny.steps, tiny.learning_rate = tiny.out.parent / "fine", 1, 1e-9
    train.train("upsample-256", tiny, torch.device("cpu"))
    second = torch.load(tiny.out / "upsample-256.pt", weights_only=True)["training"]["model"]
    assert all(torch.allclose(first[k], second[k], atol=1e-7) for k in first)
    tiny.out = tiny.out.parent / "other"
    with pytest.raises(UserError, match="has other sizes"):
        train.train("upsample-1024", argparse.Namespace(**vars(tiny) | {"init": resaved(tiny.init, stage="upsample-1024")}), torch.device("cpu"))


def test_a_clip_that_starts_from_another_keeps_its_words(tiny, tmp_path, monkeypatch):
    """Merges learned from other captions would number other words by the same numbers."""
    monkeypatch.setattr(shapes, "corpus", lambda: ["a red circle", "a red star"] * 3)
    clip = argparse.Namespace(**vars(tiny) | {"steps": 1})
    train.train("clip", clip, torch.device("cpu"))
    monkeypatch.setattr(shapes, "corpus", lambda: ["green hearts", "blue hearts", "green crosses"] * 3)
    other = argparse.Namespace(**vars(clip) | {"out": tmp_path / "other", "init": clip.out / "clip.pt"})
    train.train("clip", other, torch.device("cpu"))
    first, second = (clip_embed.load_clip(args.out / "clip.pt")[1] for args in (clip, other))
    assert first.merges == second.merges and len(second.encode("red")) == 1 < len(second.encode("green"))


def test_a_decoder_that_reads_no_tokens_starts_from_one_of_another_vocabulary():
    sizes = {"text_layers": 0, "vocab_size": 514, "channels": 64, "steps": 10}
    assert checkpoints.same_sizes(sizes, sizes | {"vocab_size": 600, "steps": 20})
    assert not checkpoints.same_sizes(sizes | {"text_layers": 2}, sizes | {"text_layers": 2, "vocab_size": 600})
    assert not checkpoints.same_sizes(sizes, sizes | {"channels": 32})


def resaved(path, **changes):
    """The path of a copy of a checkpoint in which some entries are others."""
    copy = path.with_name("copy.pt")
    torch.save(torch.load(path, weights_only=True) | changes, copy)
    return copy


def test_a_failed_write_leaves_the_old_checkpoint_whole(tmp_path, monkeypatch):
    path = tmp_path / "x.pt"
    checkpoints.save_atomically({"a": 1}, path)
    monkeypatch.setattr(torch, "save", lambda content, to: (to.write(b"half"), (_ for _ in ()).throw(OSError("disk full")))[1].__next__())
    with pytest.raises(UserError, match="x.pt: could not be written .disk full.; what was there before still is: make room"):
        checkpoints.save_atomically({"a": 2}, path)
    assert [file.name for file in tmp_path.iterdir()] == ["x.pt"]
    assert torch.load(path, weights_only=True) == {"a": 1}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder of tiny random checkpoints of every stage, no branch left at zero."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    clip = clip_embed.CLIP(replace(TINY[clip_embed], vocab_size=514))
    models = {"clip": clip, "prior": prior.DiffusionPrior(TINY[prior]), "ar-prior": prior.ARPrior(TINY["ar-prior"]), "decoder": decoder.Decoder(replace(TINY[decoder], vocab_size=514)),
              "upsample-256": upsample.Upsampler(TINY[upsample][256]), "upsample-1024": upsample.Upsampler(TINY[upsample][1024])}
    for stage, model in models.items():
        for p in model.parameters():
            if not p.abs().sum():
                torch.nn.init.normal_(p, std=0.05)
        for b in model.buffers():
            torch.nn.init.uniform_(b, 0.01, 0.1)
        mark = {"clip": checkpoints.fingerprint(clip)} if stage in ("prior", "ar-prior", "decoder") else {}
        torch.save({"stage": stage, "config": asdict(model.config), "model": model.state_dict(), "merges": [], **mark}, folder / f"{stage}.pt")
    return folder


OPTIONS = dict(prior_steps=3, decoder_steps=3, upsample_steps=(2, 2))


@pytest.mark.parametrize("size", sample.SIZES)
def test_the_whole_chain_makes_pictures_of_the_right_size(weights, size):
    stack = sample.load_stack(weights, "cpu", size)
    images = sample.generate(stack, ["a red circle", ""], size=size, **OPTIONS)
    assert images.shape == (2, 3, size, size) and images.isfinite().all() and images.abs().max() <= 1
    assert images.std() > 0.05 and not torch.allclose(images[0], images[1], atol=0.05)


@pytest.mark.parametrize("kind, want", [("none", 0.0), ("text", 1.0)])
def test_z_t_or_nothing_can_stand_in_z_is_place(kind, want, weights, monkeypatch):
    stack, seen = sample.load_stack(weights, prior_kind=kind), {}
    assert set(stack) == {"clip", "tokenizer", "decoder"}
    monkeypatch.setattr(decoder, "sample", lambda model, z_i, text, *rest, **options: (seen.update(z_i=z_i, text=text), torch.zeros(len(z_i), 3, 64, 64))[1])
    sample.generate(stack, ["a red circle", "a star"], prior_kind=kind)
    assert torch.equal(seen["z_i"], want * seen["text"]["z_t"]) and seen["z_i"].shape == (2, 16)


def test_the_two_priors_make_other_pictures_of_a_caption_and_a_missing_one_is_one_line(weights, tmp_path):
    pictures = [sample.generate(sample.load_stack(weights, prior_kind=kind), ["a star"], prior_kind=kind, **OPTIONS) for kind in ("diffusion", "ar")]
    assert all(p.isfinite().all() for p in pictures) and all(not torch.equal(p, q) for p, q in itertools.combinations(pictures, 2))
    for file in weights.iterdir():
        if file.name != "ar-prior.pt":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    sample.load_stack(tmp_path)
    with pytest.raises(UserError, match="ar-prior.pt: no such file; expected the ar-prior checkpoint that `python train.py ar-prior` writes"):
        sample.load_stack(tmp_path, prior_kind="ar")


@pytest.mark.parametrize("kind", ["diffusion", "ar"])
def test_a_picture_is_the_same_alone_and_in_any_batch(kind, weights):
    stack = sample.load_stack(weights, "cpu", 256, kind)
    captions = ["a star"] + ["a very long caption about many things that are not here"] * 18 + ["a blue heart"]
    together = sample.generate(stack, captions, seed=5, size=256, prior_kind=kind, **OPTIONS)
    for k in (0, 19):
        alone = sample.generate(stack, [captions[k]], seed=5 + k, size=256, prior_kind=kind, **OPTIONS)
        assert (alone[0] - together[k]).abs().max() * 127.5 <= 2


def test_bfloat16_draws_nearly_the_same_picture_by_the_same_priors(weights):
    exact, half = (sample.load_stack(weights, size=256, precision=precision) for precision in ("float32", "bfloat16"))
    kinds = {stage: next(network.parameters()).dtype for stage, network in half.items() if stage != "tokenizer"}
    assert kinds == {"clip": torch.float32, "prior": torch.bfloat16, "decoder": torch.bfloat16, "upsample-256": torch.bfloat16}
    a, b = (sample.generate(stack, ["a star", "a red circle"], size=256, **OPTIONS) for stack in (exact, half))
    assert 0 < (a - b).abs().mean() < 0.02 * a.std() and b.dtype == torch.float32


@pytest.mark.parametrize("asked, device, abilities, large, want", [
    ("auto", "cpu", {}, False, torch.float32), ("auto", "cpu", {"avx512_bf16": True}, False, torch.bfloat16),
    ("auto", "cpu", {"amx_bf16": True}, True, torch.bfloat16), ("auto", "mps", {"amx_bf16": True}, False, torch.float32),
    ("float32", "cpu", {"avx512_bf16": True}, True, torch.float32), ("bfloat16", "cpu", {}, False, torch.bfloat16),
    ("auto", "cuda", {"older": False}, False, torch.bfloat16), ("auto", "cuda", {"older": True}, False, torch.float16),
    ("auto", "cuda", {"older": False}, True, torch.float16), ("float32", "cuda", {"older": False}, True, torch.float32)])
def test_auto_computes_in_half_the_digits_where_the_device_does(asked, device, abilities, large, want, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: abilities)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: not abilities["older"])
    assert stack_module.pick_dtype(asked, device, large) == want


@pytest.mark.parametrize("asked, abilities, bf16", [("auto", {}, False), ("auto", {"avx512_bf16": True}, True),
                                                    ("float32", {"avx512_bf16": True}, False), ("bfloat16", {}, True)])
def test_training_computes_in_what_precision_names(asked, abilities, bf16, tiny, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: abilities)
    tiny.precision = asked
    context = train.prepare("clip", tiny, torch.device("cpu"))
    computed = []
    train.Loss(None, lambda *_: computed.append(torch.ones(1, 1) @ torch.ones(1, 1)), context)((), 0, range(1), False)
    assert computed[0].dtype == (torch.bfloat16 if bf16 else torch.float32)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_used_again_not_zeroed_by_the_system():
    code = """if 1:
        import resource, torch
        from weights.stack import keep_freed_memory

        def work():
            a = torch.ones(4, 1 << 20)
            return (a + a) * a

        def page_faults():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for _ in range(20):
                work()
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        without = page_faults()
        keep_freed_memory()
        work()
        print(without, page_faults())"""
    without, kept = map(int, subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split())
    assert kept < without / 4


def test_every_picture_stage_and_candidate_has_noise_of_its_own():
    cases = [(stage, seed, k, c) for stage in sample.STAGE_NUMBER for seed in (0, 10, 1 << 32, 1 << 40) for k in range(3) for c in (0, 1, 999)]
    assert len({float(torch.randn((), generator=sample.generators(s, seed, [k], c)[0], dtype=torch.float64)) for s, seed, k, c in cases}) == len(cases)
    assert torch.equal(*(torch.randn(9, generator=sample.generators("decoder", seed, [12 - seed])[0]) for seed in (3, 5)))  # seed + k counts


def candidates(stack, captions, monkeypatch, **options):
    """(pictures kept, [(z_t, pictures) of each round of candidates]) of generate, its decoder overheard."""
    rounds, draw = [], decoder.sample

    def spy(model, z_i, text, null, generators, *rest, **named):
        rounds.append((text["z_t"], draw(model, z_i, text, null, generators, *rest, **named)))
        return rounds[-1][1]
    with monkeypatch.context() as patch:
        patch.setattr(decoder, "sample", spy)
        return sample.generate(stack, captions, **options, **OPTIONS), rounds


def surprise_of(stack, picture, caption):
    """The surprise of one picture's z_i, seen as a file's would be."""
    clip = stack["clip"]
    text = clip_embed.encode_captions(clip, stack["tokenizer"], [caption])[0]
    pixels = clip_embed.preprocess(clip_embed.to_square(clip_embed.to_picture(picture), clip.config.image_size), clip.config.image_size)
    return float(sample.surprise(stack["prior"], clip.encode_image(pixels), text))


@pytest.mark.parametrize("kind", sample.PRIORS)
def test_of_several_candidates_the_one_is_kept_that_surprises_the_prior_least(kind, weights, monkeypatch):
    checkpoint = torch.load(weights / "decoder.pt", weights_only=True)
    checkpoint["config"]["enough"] = 0
    torch.save(checkpoint, weights / "decoder.pt")
    stack, captions = sample.load_stack(weights, prior_kind=kind, judge=True), ["a star", "", "a blue heart", "a red circle on mint"]
    first = sample.generate(stack, captions, seed=30, prior_kind=kind, candidates=1, **OPTIONS)
    kept, rounds = candidates(stack, captions, monkeypatch, seed=30, prior_kind=kind, candidates=4)
    assert [len(drawn) for _, drawn in rounds] == [4, 3, 3, 3] and torch.equal(rounds[0][1], first)
    assert torch.equal(kept[1], first[1])  # "" has no caption to fit
    choices = []
    for k, caption in ((0, captions[0]), (2, captions[2]), (3, captions[3])):
        drawn = [rounds[0][1][k], *(pictures[max(0, k - 1)] for _, pictures in rounds[1:])]
        choices.append(min(range(4), key=lambda c: surprise_of(stack, drawn[c], caption)))
        assert torch.equal(kept[k], drawn[choices[-1]])
    assert len(set(choices)) > 1
    alone = sample.generate(stack, captions[2:3], seed=32, prior_kind=kind, candidates=4, **OPTIONS)
    assert (alone[0] - kept[2]).abs().max() * 127.5 <= 2
    monkeypatch.setattr(stack_module, "LARGE", 0)
    lean = sample.load_stack(weights, prior_kind=kind, lean=True, judge=True)
    assert (sample.generate(lean, captions, seed=30, prior_kind=kind, candidates=4, **OPTIONS) - kept).abs().max() * 127.5 <= 2


def test_no_more_candidates_are_drawn_of_a_caption_once_one_surprises_little(weights, monkeypatch):
    stack, captions = sample.load_stack(weights), ["a star", "a blue heart", "a red circle on mint", "a cross"]
    first = sample.generate(stack, captions, seed=30, candidates=1, **OPTIONS)
    surprises = [surprise_of(stack, *pair) for pair in zip(first, captions)]
    enough = sum(sorted(surprises)[1:3]) / 2  # two of the first pictures do
    stack["decoder"].config = replace(stack["decoder"].config, enough=enough)
    kept, rounds = candidates(stack, captions, monkeypatch, seed=30, candidates=9)
    happy = [k for k in range(4) if surprises[k] < enough]
    assert len(happy) == 2 and all(torch.equal(kept[k], first[k]) for k in happy)
    z_t = clip_embed.encode_captions(stack["clip"], stack["tokenizer"], captions)[0]["z_t"]
    for seen, drawn in rounds[1:]:
        assert len(drawn) == len(seen) <= 2 and not any((seen == z_t[k]).all(1).any() for k in happy)


@pytest.mark.parametrize("missing", ["the prior", "its errors", "CLIP's eyes"])
def test_candidates_want_clips_eyes_and_a_prior_that_was_measured(missing, weights):
    stack = sample.load_stack(weights, prior_kind="none", judge=missing != "the prior")
    assert ("prior" in stack) == (missing != "the prior")
    if missing == "its errors":
        stack["prior"].errors.zero_()
    if missing == "CLIP's eyes":
        stack["clip"].visual = None
    one = sample.generate(stack, ["a star"], candidates=1, prior_kind="none", **OPTIONS)
    with pytest.raises(UserError, match="compared by CLIP's image tower and the diffusion prior's errors .*: draw one"):
        sample.generate(stack, ["a star"], candidates=2, prior_kind="none", **OPTIONS)
    stack["decoder"].config = replace(stack["decoder"].config, candidates=5)  # a default is no demand
    assert torch.equal(sample.generate(stack, ["a star"], prior_kind="none", **OPTIONS), one)


def run(script, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, arguments)])
    script.main()


def test_sample_writes_pngs_with_their_settings_and_never_over_an_old_one(weights, tmp_path, monkeypatch, capsys):
    words = ["--weights", weights, "--out", tmp_path, "--size", 64, "--prior-steps", 2, "--decoder-steps", 2, "--n", 2, "--seed", 7, "--device", "cpu", "--precision", "float32"]
    (tmp_path / "c.txt").write_text("a red star\n\nünïcode ☃\n", encoding="utf-8")
    run(sample, monkeypatch, "a RED/circle\0", "", *words, "--file", tmp_path / "c.txt", "--grid")
    out, err = capsys.readouterr()
    paths = [Path(line) for line in out.splitlines()]
    assert len(paths) == 9 and all(p.parent == tmp_path and p.exists() for p in paths)
    assert Image.open(paths[0]).text["seed"] == "7" and Image.open(paths[7]).text["caption"] == "ünïcode ☃"
    settings = Image.open(paths[0]).text["settings"]
    assert settings == "prior-kind diffusion, prior-steps 2, decoder-steps 2, precision float32" and "unconditional" in paths[2].name
    assert Image.open(paths[8]).size == (128, 256) and "seconds: prior" in err
    old = paths[0].read_bytes()
    run(sample, monkeypatch, "a RED/circle", *words)
    assert paths[0].read_bytes() == old and len(list(tmp_path.glob("*.png"))) == 11


@pytest.mark.parametrize("arguments, message", [
    (["--steps", "0"], "--steps 0: must be between 1"), (["--seed", "-1"], "--seed -1: must be between 0"),
    (["--learning-rate", "nan"], "--learning-rate nan"), (["--device", "toaster"], "not available here"),
    ([], "clip.pt: no such file; expected the clip checkpoint that `python train.py clip` writes"),
])
def test_wrong_use_of_train_is_one_line_and_exit_status_2(arguments, message, monkeypatch, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        run(train, monkeypatch, "prior", "--out", tmp_path, *arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1


@pytest.mark.parametrize("script, arguments, message", [
    (prior, ["x", "--steps", "0"], "--steps 0: must be between"), (prior, ["x", "--n", "1"], "--n 1: must be between"),
    (prior, ["x", "--guidance", "101"], "--guidance 101.0: must be between"), (prior, ["x", "--guidance", "nan"], "--guidance nan: must be between"),
    (decoder, ["p.png", "--steps", "991"], "--steps 991: must be between"), (decoder, ["p.png", "--out", "strip"], "--out strip: must end in .png"),
    (upsample, ["p.png", "--out", "strip"], "--out strip: must end in .png"), (upsample, ["missing.png"], "missing.png: no such file"),
])
def test_wrong_use_of_a_stage_is_one_line_and_exit_status_2(script, arguments, message, weights, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (80, 80)).save("p.png")
    with pytest.raises(SystemExit) as stop:
        run(script, monkeypatch, *arguments, "--weights", weights)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1


@pytest.mark.parametrize("arguments, message", [
    ([], "no caption"),
    (["x", "--seed", "-1"], "--seed -1: must be between 0"),
    (["x", "--n", "0"], "--n 0: must be between 1"),
    (["x", "--decoder-steps", "0"], "--decoder-steps 0"),
    (["x", "--decoder-guidance", "nan"], "--decoder-guidance nan"),
    (["x", "--eta", "2"], "--eta 2.0: must be between 0 and 1"),
    (["x", "--device", "cuda"], "--device cuda: not available here"),
    (["x", "--device", "toaster"], "--device toaster: not available here"),
    (["x", "--weights", "/nowhere"], "clip.pt: no such file; expected the clip checkpoint"),
    (["--file", "/nowhere.txt"], "--file /nowhere.txt: cannot be read"),
])
def test_wrong_use_is_one_line_and_exit_status_2(arguments, message, weights, monkeypatch, capsys, tmp_path):
    if "--device" in arguments and torch.cuda.is_available():
        pytest.skip("this machine has a cuda device")
    with pytest.raises(SystemExit) as stop:
        run(sample, monkeypatch, *([] if "--weights" in arguments else ["--weights", weights]), "--out", tmp_path, *arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1


def test_a_stage_in_anothers_place_and_another_clip_are_named(weights, tmp_path):
    for file in weights.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "prior.pt").write_bytes((weights / "decoder.pt").read_bytes())
    with pytest.raises(UserError, match="is a 'decoder' checkpoint, expected 'prior'"):
        sample.load_stack(tmp_path)
    other = torch.load(weights / "prior.pt", weights_only=True) | {"clip": "0123456789abcdef"}
    torch.save(other, tmp_path / "prior.pt")
    with pytest.raises(UserError, match="trained with CLIP 0123456789abcdef, but .* is CLIP"):
        sample.load_stack(tmp_path)


def test_every_script_of_a_stage_runs(weights, tmp_path, monkeypatch, capsys):
    picture = tmp_path / "p.png"
    shapes.render(shapes.random_scene(np.random.default_rng(0)), 64).save(picture)
    run(clip_embed, monkeypatch, picture, "a red circle", "a star", "--clip", weights / "clip.pt", "--device", "cpu")
    assert "a star" in capsys.readouterr().out
    run(prior, monkeypatch, "a red circle", "--weights", weights, "--steps", 3, "--n", 3, "--device", "cpu")
    assert capsys.readouterr().out.count("mean cosine with z_t") == 2
    run(decoder, monkeypatch, picture, "--weights", weights, "--steps", 3, "--out", tmp_path / "d.png", "--device", "cpu")
    assert Image.open(tmp_path / "d.png").size == (320, 64)
    run(upsample, monkeypatch, picture, "--weights", weights, "--out", tmp_path / "u.png", "--device", "cpu")
    assert Image.open(tmp_path / "u.png").size == (512, 256)


def test_export_writes_half_precision_copies_that_sample_reads(tiny, tmp_path, capsys):
    for stage in train.STAGES:
        train.train(stage, tiny, torch.device("cpu"))
    checkpoints.export(tiny.out, tmp_path / "shipped", train.STAGES)
    (tiny.out / "ar-prior.pt").unlink()
    capsys.readouterr()
    checkpoints.export(tiny.out, tmp_path / "without", train.STAGES)
    assert "ar-prior.pt: not trained yet, left out" in capsys.readouterr().err and len(list((tmp_path / "without").iterdir())) == 5
    small = torch.load(tmp_path / "shipped" / "decoder.pt", weights_only=True)
    assert "training" not in small and {v.dtype for v in small["model"].values()} == {torch.float16} and small["trained"]["step"] == 4
    for kind in sample.PRIORS:
        stack = sample.load_stack(tmp_path / "shipped", prior_kind=kind)
        assert sample.generate(stack, ["a circle"], prior_kind=kind, prior_steps=2, decoder_steps=2).shape == (1, 3, 64, 64)


def test_the_priors_checkpoints_hold_what_sampling_needs(tiny, monkeypatch):
    """The diffusion prior's errors, measured at the end; the autoregressive prior's components and buckets."""
    directions = torch.randn(48, TINY[prior].embed_dim, generator=torch.Generator().manual_seed(0))

    def differ(clip, images):  # z_i that differ, as a trained CLIP's do; those of so small a CLIP are nearly the same
        colours = torch.nn.functional.adaptive_avg_pool2d(images, 4).flatten(1)
        return torch.nn.functional.normalize((colours - 0.2) @ directions, dim=1)

    monkeypatch.setattr(embeddings, "encode_pictures", differ)
    longer = {"prior": {"steps": 600, "learning_rate": 0.003, "save_every": 600}}  # until the error tells one t from another
    for stage in ("clip", "prior", "ar-prior"):
        train.train(stage, argparse.Namespace(**vars(tiny) | longer.get(stage, {})), torch.device("cpu"))
    checkpoint = torch.load(tiny.out / "prior.pt", weights_only=True)
    errors = checkpoint["model"]["errors"]
    assert errors.shape == (1000,) and (errors > 0).all() and errors.isfinite().all()
    assert errors[0] < errors[500] < errors[999] and not checkpoint["training"]["model"]["errors"].any()
    z_i = torch.from_numpy(np.load(next(tiny.out.glob("z_i-*.npy"))))
    standardized = embeddings.standard(z_i, "shapes")
    assert all(torch.allclose(checkpoint["model"][name], value.float(), atol=1e-6) for name, value in standardized.items())
    given = checkpoint["model"]
    checkpoint = torch.load(tiny.out / "ar-prior.pt", weights_only=True)
    model = checkpoints.load_model(prior.ARPrior, prior.ARConfig, checkpoint, "ar-prior.pt")
    lost = (model.decode(model.encode(z_i)) - z_i).square().sum() / (z_i - z_i.mean(0)).square().sum()
    assert lost < 0.02 and (model.dot_edges.diff() >= 0).all() and model.dot_edges.abs().max() <= 1
    begun = {"init": tiny.out / "ar-prior.pt", "clip": tiny.out / "clip.pt", "out": tiny.out / "other", "seed": 7}
    train.train("ar-prior", argparse.Namespace(**vars(tiny) | begun), torch.device("cpu"))  # other scenes, the codes of its weights
    torch.save(checkpoint | {"config": checkpoint["config"] | {"components": "many"}}, tiny.out / "strange.pt")
    with pytest.raises(UserError, match="strange.pt: .*config"):
        train.train("ar-prior", argparse.Namespace(**vars(tiny) | begun | {"init": tiny.out / "strange.pt", "out": tiny.out / "third"}),
                    torch.device("cpu"))
    begun["init"] = tiny.out / "prior.pt"
    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
        stopped_after(patch, 1)
        train.train("prior", argparse.Namespace(**vars(tiny) | begun), torch.device("cpu"))
    begun["resume"] = True
    assert not torch.load(tiny.out / "other/prior.pt", weights_only=True)["model"]["errors"].any()  # not those of --init
    train.train("prior", argparse.Namespace(**vars(tiny) | begun), torch.device("cpu"))
    tuned = torch.load(tiny.out / "other/prior.pt", weights_only=True)["model"]
    assert all(torch.equal(tuned[name], given[name]) for name in standardized)
    tuned = torch.load(tiny.out / "other/ar-prior.pt", weights_only=True)["model"]
    assert all(torch.equal(tuned[name], buffer) for name, buffer in model.named_buffers())


def test_z_i_that_cannot_be_coded_stops_training_with_one_line(tiny, monkeypatch):
    train.train("clip", tiny, torch.device("cpu"))
    monkeypatch.setattr(shapes, "FIXED_SCENES", 10)
    with pytest.raises(UserError, match="ar-prior: z_i of 10 pictures: PCA: 10 embeddings cannot give 16 components"):
        train.train("ar-prior", tiny, torch.device("cpu"))
