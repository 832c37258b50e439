"""Karlo in the diffusers layout: each network and the whole chain equal to that library's stored outputs."""

import sys
from pathlib import Path

import pytest
import torch

import clip_embed
import decoder
import prior
import sample
import upsample
from test_clip_published import close

ROOT = Path(__file__).parent.parent
TINY = ROOT / "tests/fixtures/karlo-tiny"
sys.path.append(str(ROOT / "weights"))
import karlo


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
