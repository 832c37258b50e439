"""Karlo in the diffusers layout: each network and the whole chain equal to that library's stored outputs."""

import json
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from PIL import Image

import clip_embed
import decoder
import prior
import sample
import upsample
from clip_embed import UserError
from data.embeddings import FrozenCLIP
from weights.published import read_safetensors
from test_clip_published import close, edit, write_safetensors

ROOT = Path(__file__).parent.parent
TINY = ROOT / "tests/fixtures/karlo-tiny"
sys.path.append(str(ROOT / "weights"))
import karlo
from weights import checkpoints, published
from weights import stack as stack_module


@pytest.fixture(scope="module")
def expected():
    return torch.load(TINY / "expected.pt", weights_only=True)


@pytest.fixture(scope="module")
def text(expected):
    """The caption as the public library read it."""
    return {"tokens": expected["input_ids"], "states": expected["text_hidden"], "z_t": expected["text_embeds"],
            "mask": expected["attention_mask"].bool()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The fixture, converted."""
    out = tmp_path_factory.mktemp("karlo")
    with torch.no_grad():
        assert [path.name for path in karlo.convert(TINY, out)] == ["clip.pt", "prior.pt", "decoder.pt", "upsample-256.pt"]
    return out


@pytest.fixture(scope="module")
def stack(folder):
    return sample.load_stack(folder, size=256)


# ----------------------------------------------------------------------------- single calls

@torch.no_grad()
def test_the_text_encoder_is_that_of_the_public_library(stack, expected):
    text, _ = clip_embed.encode_captions(stack["clip"], stack["tokenizer"], [expected["prompt"]])
    length = int(expected["attention_mask"].sum())
    assert text["tokens"].tolist() == expected["input_ids"][:, :length].tolist() and text["mask"].all()
    assert close(text["states"], expected["text_hidden"][:, :length]) and close(text["z_t"], expected["text_embeds"])
    assert not torch.allclose(text["z_t"].norm(), torch.ones(()))


@torch.no_grad()
def test_the_prior_is_that_of_the_public_library(stack, expected, text):
    assert close(stack["prior"](expected["z_noisy"], expected["t"], text), expected["prior_out"])
    short = {k: v[:, :int(text["mask"].sum())] if k != "z_t" else v for k, v in text.items()}  # padding cut off, and a cache
    cache = []
    for _ in range(2):
        assert close(stack["prior"](expected["z_noisy"], expected["t"], short, cache), expected["prior_out"])


@torch.no_grad()
def test_the_decoder_is_that_of_the_public_library(stack, expected, text):
    eps, v = stack["decoder"](expected["decoder_x"], expected["t"], expected["z_noisy"], text)  # any embedding will do
    assert close(torch.cat([eps, 2 * v - 1], 1), expected["decoder_out"])


@torch.no_grad()
def test_the_upsampler_is_that_of_the_public_library(stack, expected):
    assert close(stack["upsample-256"](expected["sr_x"], expected["t"], expected["sr_low"]), expected["sr_out"])


# ----------------------------------------------------------------------------- the chain

def test_the_whole_chain_from_one_generator_makes_the_public_library_s_picture(stack, expected):
    noise, steps = [torch.Generator().manual_seed(expected["pipeline_seed"])], expected["pipeline_steps"]
    with torch.no_grad():
        text, null = clip_embed.encode_captions(stack["clip"], stack["tokenizer"], [expected["prompt"]])
    z_i = prior.sample(stack["prior"], text, null, noise, expected["pipeline_prior_guidance"],
                       steps["prior_num_inference_steps"], candidates=1)
    image = decoder.sample(stack["decoder"], z_i, text, null, noise, expected["pipeline_decoder_guidance"],
                           steps["decoder_num_inference_steps"])
    image = upsample.sample(stack["upsample-256"], image, noise, steps["super_res_num_inference_steps"])
    theirs = 2 * expected["pipeline_image"].permute(0, 3, 1, 2) - 1
    assert float((image - theirs).abs().max()) < 2e-3


def test_the_chain_s_defaults_are_the_library_s_and_its_largest_size_is_made(folder, tmp_path, monkeypatch, capsys):
    seen = {}
    for stage in (prior, decoder, upsample):
        def spy(steps, top, power=1.0, stage=stage, ladder=stage.ladder):
            seen[stage.__name__] = (steps, top)
            assert power == 1
            return ladder(2, top)
        monkeypatch.setattr(stage, "ladder", spy)
    monkeypatch.setattr(sys, "argv", ["sample.py", "a party hat", "--weights", str(folder), "--out", str(tmp_path)])
    sample.main()
    assert seen == {"prior": (25, 999), "decoder": (25, 999), "upsample": (7, 999)}
    assert Image.open(capsys.readouterr().out.strip()).size == (32, 32)


@torch.no_grad()
def test_large_checkpoints_are_read_when_asked_for_and_make_the_same_picture(folder, stack, monkeypatch):
    options = dict(size=256, prior_steps=2, decoder_steps=2, upsample_steps=(2, None))
    want = sample.generate(stack, ["a party hat"], **options)
    monkeypatch.setattr(stack_module, "LARGE", 0)
    lean = sample.load_stack(folder, size=256, lean=True)
    assert lean["decoder"] is not lean["decoder"] and stack["decoder"] is stack["decoder"]
    difference = (sample.generate(lean, ["a party hat"], **options) - want).abs() * 127.5
    assert difference.max() <= 1 and difference.mean() < 0.01  # shades: networks in another memory layout round otherwise


# ----------------------------------------------------------------------------- other files

@pytest.fixture
def copy(tmp_path):
    """A copy of the fixture to damage."""
    return Path(shutil.copytree(TINY, tmp_path / "copy"))


@torch.no_grad()
def test_half_precision_and_bin_files_convert_to_the_same_network_rounded(copy, tmp_path, stack):
    for part in ("prior", "decoder", "text_proj", "super_res_first", "super_res_last", "text_encoder"):
        path = next((copy / part).glob("*.safetensors"))
        tensors = {name: tensor.half() for name, tensor in read_safetensors(path).items()}
        if part == "text_encoder":  # older files begin with this
            tensors = {"text_model.embeddings.position_ids": torch.arange(77)[None]} | tensors
        path.unlink()
        torch.save(tensors, path.with_name("pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"))
    for path in karlo.convert(copy, tmp_path / "out"):
        assert all(t.dtype == torch.float16 for t in torch.load(path, weights_only=True)["model"].values())
    half = sample.load_stack(tmp_path / "out", size=256)
    with pytest.raises(UserError, match="was trained with CLIP"):  # another norm, another picture: only its own will do
        sample.load_stack(tmp_path / "out", clip_path=ROOT / "tests/fixtures/clip-hf-tiny")
    for stage in ("clip", "prior", "decoder", "upsample-256"):
        ours, want = half[stage].state_dict(), stack[stage].state_dict()
        assert ours.keys() == want.keys() and all(torch.equal(ours[name], want[name].half().float()) for name in want)


@torch.no_grad()
def test_an_image_tower_beside_the_others_reads_pictures(copy, tmp_path, stack):
    with pytest.raises(UserError, match="reads no pictures"):
        stack["clip"].encode_image(torch.zeros(1, 3, 8, 8))
    sizes = dict(embed_dim=32, image_size=16, vision_patch_size=8, vision_width=16, vision_layers=1, vision_heads=2)
    clip = clip_embed.CLIP(clip_embed.CLIPConfig(**sizes, vocab_size=734, text_width=32, text_heads=4, hidden_act="quick_gelu"))
    vision = {k: v for k, v in published.hugging_face(clip.state_dict()).items() if k.startswith("vis")}
    (copy / "image_encoder").mkdir()
    write_safetensors(copy / "image_encoder/model.safetensors", vision)
    (copy / "image_encoder/config.json").write_text(json.dumps({
        "image_size": 16, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "projection_dim": 32, "hidden_act": "quick_gelu"}))
    ours, pixels = karlo.load_towers(copy)[0], torch.randn(2, 3, 16, 16)
    assert torch.equal(ours.encode_image(pixels), clip.visual(pixels))

    whole = tmp_path / "whole"  # the same towers as one CLIP of Hugging Face's
    shutil.copytree(copy / "tokenizer", whole)
    write_safetensors(whole / "model.safetensors", published.hugging_face(ours.state_dict()))
    read = lambda part: json.loads((copy / part / "config.json").read_text())
    (whole / "config.json").write_text(json.dumps({"projection_dim": 32, "text_config": read("text_encoder"),
                                                   "vision_config": read("image_encoder")}))
    shutil.rmtree(copy / "image_encoder")
    again = karlo.load_towers(copy, whole)[0]
    assert checkpoints.fingerprint(again) == checkpoints.fingerprint(ours) and not again.config.unit_norm
    assert karlo.load_towers(copy)[0].visual is None
    damage(copy, "text_encoder", lambda t: t["text_projection.weight"].neg_())
    with pytest.raises(UserError, match="is not the CLIP that Karlo was trained with: tensor text_projection.weight differs"):
        karlo.load_towers(copy, whole)


def test_no_stage_trains_on_embeddings_that_are_not_unit_vectors():
    with pytest.raises(UserError, match="Karlo's CLIP keeps the length"):
        FrozenCLIP(types.SimpleNamespace(config=clip_embed.CLIPConfig(unit_norm=False)), None)


def damage(copy, part, change):
    """Change the tensors of one part."""
    path = next((copy / part).glob("*.safetensors"))
    tensors = {name: tensor.clone() for name, tensor in read_safetensors(path).items()}
    change(tensors)
    write_safetensors(path, tensors)


@pytest.mark.parametrize("hurt, message", [
    (lambda c: shutil.rmtree(c / "text_proj"), "text_proj: no such folder; expected Karlo in the diffusers layout"),
    (lambda c: (c / "decoder/config.json").unlink(), "decoder/config.json: no such file"),
    (lambda c: next((c / "super_res_last").glob("*.safetensors")).unlink(), "super_res_last/diffusion.*: no such file"),
    (lambda c: damage(c, "prior", lambda t: t.pop("norm_out.bias")), r"prior.norm_out.bias is missing, expected shape \(24,\)"),
    (lambda c: damage(c, "decoder", lambda t: t.update(more=torch.zeros(1))), "tensor decoder.more is surplus"),
    (lambda c: damage(c, "text_encoder", lambda t: t.update(more=torch.zeros(1))), "tensor more is surplus"),
    (lambda c: damage(c, "super_res_first", lambda t: t.update({"conv_in.bias": torch.zeros(3)})),
     r"first.conv_in.bias has shape \(3,\), expected \(16,\)"),
    (lambda c: edit(c / "decoder/config.json", layers_per_block=2), "tensor decoder.* is missing|tensor decoder.* has shape"),
    (lambda c: edit(c / "decoder/config.json", block_out_channels=[16, 24]), "expected multiples of the first"),
    (lambda c: edit(c / "decoder/config.json", freq_shift=1), "freq_shift = 1, expected 0"),
    (lambda c: edit(c / "prior/config.json", num_layers=None), "damaged, or no config"),
    (lambda c: edit(c / "super_res_last/config.json", norm_num_groups=4), "its sizes are not those of super_res_first"),
    (lambda c: damage(c, "prior", lambda t: t.clear()), "holds no weights"),
    (lambda c: (next((c / "prior").glob("*.safetensors")).unlink(),
                torch.save({"n": 3, "ids": torch.arange(3)}, c / "prior/diffusion_pytorch_model.bin")), "holds no weights"),
])
def test_what_is_missing_surplus_or_misshapen_is_named_in_one_line(copy, tmp_path, hurt, message):
    hurt(copy)
    with pytest.raises(UserError, match=message) as error, torch.no_grad():
        list(karlo.convert(copy, tmp_path / "out"))
    assert "\n" not in str(error.value)


def test_the_script_ends_with_one_line_and_status_2(tmp_path):
    run = subprocess.run([sys.executable, ROOT / "weights/karlo.py", tmp_path, tmp_path / "out"], capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and "prior: no such folder" in run.stderr


# ----------------------------------------------------------------------------- the true sizes

ONE_STEP_EACH = """
import sys, threading, torch, sample
from pathlib import Path
anonymous = lambda: int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024
peak, largest, done = 0, 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.005):
        peak = max(peak, anonymous())
threading.Thread(target=watch).start()
try:
    with torch.no_grad():
        stack = sample.load_stack(sys.argv[1], size=256, lean=True)
        text, null = sample.clip_embed.encode_captions(stack["clip"], stack["tokenizer"], ["a portrait of an old monk"])
        t, z, x = torch.tensor([500]), torch.randn(1, 768), torch.randn(1, 3, 64, 64)
        for stage, call in (("prior", lambda f: f(z, t, text)), ("decoder", lambda f: f(x, t, z, text)[0]),
                            ("upsample-256", lambda f: f.last(x, t, f(x, t, x[..., ::4, ::4])))):
            network = stack[stage]
            largest = max(largest, sum(4 * p.numel() for p in network.parameters()))
            assert torch.isfinite(call(network)).all()
            print(stage, sum(p.numel() for p in network.parameters()), flush=True)
            del network
finally:
    done.set()
print(peak, largest)
"""


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's count of anonymous memory")
def test_at_the_true_sizes_a_step_of_each_stage_needs_little_more_than_the_largest_stage(tmp_path):
    """Random weights, float16 on disk; sizes as the public library's conversion of Karlo has them."""
    unet = dict(channels=320, depth=3, multiples=(1, 2, 3, 4), dropout=0.0, top_signal=0.0, float32=True)
    towers = dict(embed_dim=768, vision_layers=0, text_width=768, text_layers=12, text_heads=12, hidden_act="quick_gelu")
    for stage, network, config in (
            ("clip", clip_embed.CLIP, clip_embed.CLIPConfig(**towers, vocab_size=514, unit_norm=False)),
            ("prior", prior.DiffusionPrior, prior.PriorConfig(768, 768, 77, 2048, 20, 32, unit_norm=False, clamp=5.0)),
            ("decoder", decoder.Decoder, decoder.DecoderConfig(**unet, embed_dim=768, unit_norm=False, clip_text_width=768,
                                                               text_layers=0, text_width=1536)),
            ("upsample-256", upsample.Upsampler, upsample.UpsamplerConfig(**unet, scale_shift=False, enlarge="bicubic", eta=1.0,
                                                                          last=True))):
        with torch.device("meta"):
            tensors = network(config).state_dict()
        noise = (torch.randn(1 << 16) * 0.02).half()
        model = {name: noise.repeat(-(-t.numel() // len(noise)))[:t.numel()].view(t.shape).clone() for name, t in tensors.items()}
        if stage == "prior":
            model["errors"].zero_()  # as converted: variances, never negative
        torch.save({"stage": stage, "config": vars(config), "model": model, "merges": []}, tmp_path / f"{stage}.pt")
        del model
    run = subprocess.run([sys.executable, "-c", ONE_STEP_EACH, tmp_path], cwd=ROOT, capture_output=True, text=True)
    shutil.rmtree(tmp_path)  # 7 GB
    print(run.stdout, run.stderr)
    peak, largest = map(int, run.stdout.splitlines()[-1].split())
    assert run.returncode == 0 and peak < 1.3 * largest
