"""The networks: what may see what, what each input reaches, sizes of the paper's presets, and that each can learn."""

import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import clip_embed
import decoder
import prior
import upsample
from clip_embed import UserError
from conftest import ROOT
from data.embeddings import scale
from weights import checkpoints

TINY_CLIP = clip_embed.CLIPConfig(embed_dim=8, image_size=64, vision_patch_size=16, vision_width=32, vision_layers=2, vision_heads=2,
                                  vocab_size=50, text_width=16, text_layers=2, text_heads=2)
TINY_PRIOR = prior.PriorConfig(embed_dim=8, clip_text_width=16, text_context=77, width=32, layers=2, heads=2)
TINY_DECODER = decoder.DecoderConfig(image_size=16, channels=16, depth=1, multiples=(1, 2), attention=(8,), head_channels=16, norm_groups=8,
                                     dropout=0.0, embed_dim=8, clip_text_width=16, text_layers=0, text_width=16, text_heads=2,
                                     text_context=77, vocab_size=50)
TINY_UPSAMPLER = upsample.UpsamplerConfig(low_size=8, image_size=32, channels=16, depth=1, multiples=(1, 2), norm_groups=8, dropout=0.0)


def awaken(model):
    """Give zero-initialised branches random weights: an untrained network would hide every mistake."""
    for p in model.parameters():
        if not p.abs().sum():
            torch.nn.init.normal_(p, std=0.2)
    return model.eval().requires_grad_(False)


def test_paper_presets_have_the_sizes_of_table_3():
    with torch.device("meta"):
        count = lambda model: sum(p.numel() for p in model.parameters()) / 1e9
        assert 0.9 <= count(prior.DiffusionPrior(prior.PRESETS["paper"])) <= 1.25
        assert 3.2 <= count(decoder.Decoder(decoder.PRESETS["paper"])) <= 3.8
        assert 0.6 <= count(upsample.Upsampler(upsample.PRESETS["paper"][256])) <= 0.8
        assert 0.25 <= count(upsample.Upsampler(upsample.PRESETS["paper"][1024])) <= 0.36
        assert 0.9 <= count(clip_embed.CLIP(clip_embed.PRESETS["paper"])) <= 1.1  # ViT-H/16 and its text tower


TINY_NETWORKS = [(clip_embed.CLIP, TINY_CLIP), (prior.DiffusionPrior, TINY_PRIOR), (decoder.Decoder, TINY_DECODER),
                 (upsample.Upsampler, TINY_UPSAMPLER), (prior.ARPrior, prior.ARConfig(8, 16, 5, 32, 16, 1, 2)),
                 (decoder.Decoder, replace(TINY_DECODER, text_layers=1))]


@pytest.mark.parametrize("network, config", TINY_NETWORKS)
def test_a_network_without_weights_has_the_same_tensors_draws_nothing_and_keeps_its_limit(network, config):
    state = torch.get_rng_state()
    with checkpoints.WithoutWeights(1 << 20):
        empty = network(config)
    assert torch.equal(state, torch.get_rng_state())
    sizes = lambda model: {name: (value.shape, value.dtype) for name, value in model.state_dict().items()}
    assert sizes(empty) == sizes(network(config))
    with pytest.raises(ValueError, match="much larger than its weights"), checkpoints.WithoutWeights(1000):
        network(config)


@pytest.mark.parametrize("build", [
    lambda n: torch.zeros(n, n), lambda n: torch.randn((n, n)), lambda n: torch.nn.Linear(n, n), lambda n: torch.nn.Embedding(n, n), torch.eye,
    lambda n: torch.arange(n)[:, None] * torch.arange(n), lambda n: torch.cat([torch.zeros(n)] * n), lambda n: torch.arange(n * n),
    lambda n: prior.DiffusionPrior(prior.PriorConfig(embed_dim=n, width=1, heads=1))])
def test_what_is_larger_than_its_limit_is_stopped_before_it_takes_memory(build):
    build(8)
    with pytest.raises(ValueError, match="much larger than its weights"), checkpoints.WithoutWeights(1 << 21):
        build(1 << 20)  # 4 TB


def test_a_prior_of_before_embeddings_were_standardized_multiplies_them_by_one_number():
    new = {"mean", "components", "deviation"}
    model = {name: value for name, value in prior.DiffusionPrior(TINY_PRIOR).state_dict().items() if name not in new}
    loaded = checkpoints.load_model(prior.DiffusionPrior, prior.PriorConfig,
                                    {"stage": "prior", "config": vars(TINY_PRIOR), "model": model}, "x.pt")
    z_i = F.normalize(torch.randn(5, 8), dim=1)
    assert torch.allclose(loaded.standardize(z_i), z_i * scale(8)) and torch.allclose(loaded.embedding(3 * z_i), z_i)


def test_a_config_or_a_stretched_tensor_that_asks_for_more_than_the_file_holds_is_refused(tmp_path):
    weights = upsample.Upsampler(TINY_UPSAMPLER).state_dict()
    wide = vars(TINY_UPSAMPLER) | {"channels": 1 << 16}
    stretched = {name: torch.zeros(()).expand(value.shape) for name, value in upsample.Upsampler(TINY_UPSAMPLER).state_dict().items()}
    load = lambda config, model: checkpoints.load_model(upsample.Upsampler, upsample.UpsamplerConfig,
                                                        {"stage": "upsample-256", "config": config, "model": model}, "x.pt")
    assert load(vars(TINY_UPSAMPLER), dict(weights)).config == TINY_UPSAMPLER
    with pytest.raises(UserError, match="no network can be built from its config .it would be much larger"):
        load(wide, dict(weights))
    with pytest.raises(UserError, match="no network can be built from its config .it would be much larger"):
        load(vars(replace(TINY_UPSAMPLER, channels=512)), stretched)
    with pytest.raises(UserError, match="no network can be built .*SparseTensorImpl"):
        load(vars(TINY_UPSAMPLER), {name: value.to_sparse() for name, value in weights.items()})


def test_loading_and_sampling_import_no_compiler():
    """torch._dynamo takes longer to import than the shipped weights to load."""
    code = "import sys, sample; sample.generate(sample.load_stack(), ['a star'], candidates=1); sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_clip_text_tower_leaks_nothing_from_later_tokens():
    clip = awaken(clip_embed.CLIP(TINY_CLIP))
    a = torch.randint(1, 49, (1, 12))
    b = a.clone()
    b[0, 7:] = torch.randint(1, 49, (5,))
    states_a, states_b = clip.encode_text(a)[0], clip.encode_text(b)[0]
    assert torch.allclose(states_a[:, :7], states_b[:, :7], atol=1e-6)
    assert not torch.allclose(states_a[:, 7:], states_b[:, 7:], atol=1e-3)


def test_z_t_does_not_depend_on_padding():
    clip = awaken(clip_embed.CLIP(TINY_CLIP))
    ids = torch.tensor([[48, 5, 6, 7, 49]])
    for fill in (0, 49):  # 49 is the end token: pool at the first one
        padded = F.pad(ids, (0, 72), value=fill)
        assert torch.allclose(clip.encode_text(padded)[1], clip.encode_text(ids)[1], atol=1e-6)


def test_clip_attention_equals_torchs_own():
    ours = clip_embed.MultiheadAttention(32, 4)
    theirs = torch.nn.MultiheadAttention(32, 4, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 5, 32)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(5)
    assert torch.allclose(ours(x, True), theirs(x, x, x, attn_mask=mask, need_weights=False)[0], atol=1e-5)


def test_contrastive_loss_is_log_b_for_equal_embeddings_and_small_for_matched_ones():
    z = F.normalize(torch.ones(8, 4), dim=1)
    assert float(clip_embed.contrastive_loss(z, z, torch.tensor(2.0))) == pytest.approx(math.log(8), rel=1e-5)
    z = torch.eye(4)
    s = math.exp(1.5)
    assert float(clip_embed.contrastive_loss(z, z, torch.tensor(1.5))) == pytest.approx(math.log(1 + 3 * math.exp(-s)), rel=1e-4)
    for highest in (100.0, 7.0):  # what the temperature's inverse is held under
        got = clip_embed.contrastive_loss(z, z, torch.tensor(9.0), highest=highest)
        assert float(got) == pytest.approx(math.log1p(3 * math.exp(-highest)), rel=1e-4, abs=1e-7)


def test_groups_are_compared_as_if_each_were_a_batch():
    z_i, z_t, scale = (*(F.normalize(torch.randn(2, 12, 5), dim=2)), torch.tensor(1.2))
    apart = [clip_embed.contrastive_loss(z_i[k:k + 4], z_t[k:k + 4], scale) for k in (0, 4, 8)]
    assert torch.allclose(clip_embed.contrastive_loss(z_i, z_t, scale, 4), sum(apart) / 3)


def test_prior_sequence_is_causal_and_its_padding_unseen(text):
    """Text places must not see z_t, t, z_i or the final token; nothing may see padding; the output sees everything."""
    model = awaken(prior.DiffusionPrior(TINY_PRIOR))
    inside = []
    model.blocks[-1].register_forward_hook(lambda module, args, out: inside.append(out.clone()))
    t, z, y = torch.tensor([300, 700]), torch.randn(2, 8), text(padding=2)
    out = model(z, t, y)
    out_2 = model(torch.randn(2, 8), torch.tensor([5, 6]), y | {"z_t": torch.randn(2, 8)})
    assert torch.allclose(inside[0][:, :4], inside[1][:, :4], atol=1e-6)  # four real tokens of six
    assert not torch.allclose(out, out_2, atol=1e-3)
    states = y["states"].clone()
    states[:, 4:] = 9.0
    assert torch.allclose(model(z, t, y | {"states": states}), out, atol=1e-6)
    states = y["states"].clone()
    states[:, 3] += 1
    assert not torch.allclose(model(z, t, y | {"states": states}), out, atol=1e-4)
    for changed in ((z + 1, t, y), (z, t + 100, y), (z, t, y | {"z_t": y["z_t"] + 1})):
        assert not torch.allclose(model(*changed), out, atol=1e-4)


@pytest.mark.parametrize("text_layers", [0, 2])
def test_decoder_hears_z_i_caption_and_timestep_but_not_padding(text, text_layers):
    model = awaken(decoder.Decoder(replace(TINY_DECODER, text_layers=text_layers)))
    x, t, z_i, y = torch.randn(2, 3, 16, 16), torch.tensor([10, 800]), torch.randn(2, 8), text()
    eps, v = model(x, t, z_i, y)
    longer = {"tokens": F.pad(y["tokens"], (0, 3), value=7), "states": F.pad(y["states"], (0, 0, 0, 3), value=9.0), "z_t": y["z_t"],
              "mask": F.pad(y["mask"], (0, 3))}
    assert torch.allclose(model(x, t, z_i, longer)[0], eps, atol=1e-5)
    said = y | ({"tokens": (y["tokens"] + 1) % 50} if text_layers else {"states": y["states"] + torch.randn_like(y["states"])})
    for changed in ((x, t + 50, z_i, y), (x, t, z_i + 1, y), (x, t, z_i, said)):
        assert not torch.allclose(model(*changed)[0], eps, atol=1e-4)


@pytest.mark.parametrize("silenced", ["z_i_to_emb", "z_i_to_context"])
def test_each_of_the_two_injections_of_z_i_reaches_the_output(text, silenced):
    model = awaken(decoder.Decoder(TINY_DECODER))
    for p in getattr(model, silenced).parameters():
        p.zero_()
    x, t, y = torch.randn(1, 3, 16, 16), torch.tensor([400]), text(B=1)
    assert not torch.allclose(model(x, t, torch.randn(1, 8), y)[0], model(x, t, torch.randn(1, 8), y)[0], atol=1e-5)


def test_a_decoder_with_coordinates_is_told_where_each_cell_lies(text):
    model, seen = awaken(decoder.Decoder(replace(TINY_DECODER, coordinates=True, patch_size=2, attention=(4,)))), []
    model.conv_in.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    told = (torch.randn(2, 3, 16, 16), torch.tensor([10, 800]), torch.randn(2, 8), text())
    eps, _ = model(*told)
    assert seen[0].shape == (2, 3 * 4 + 2, 8, 8)
    for corner, place in {(0, 0): (-1, -1), (0, 7): (-1, 1), (7, 0): (1, -1), (7, 7): (1, 1)}.items():  # rows go down, columns right
        assert (seen[0][:, -2:, *corner] == torch.tensor(place)).all()
    model.conv_in.weight[:, -2:] = 0
    assert not torch.allclose(model(*told)[0], eps, atol=1e-4)


def test_context_attention_equals_a_plain_loop_over_heads():
    block = awaken(decoder.AttentionBlock(32, 16, 12, 8))
    x, context = torch.randn(1, 32, 2, 3), torch.randn(1, 4, 12)
    mask = torch.tensor([[True, True, False, True] + [True] * 6])
    h = F.group_norm(x, 8, block.norm.weight, block.norm.bias).flatten(2).transpose(1, 2)[0]
    q, k, v = (h @ block.qkv.weight.T + block.qkv.bias).split(32, 1)
    ck, cv = (context[0] @ block.context_kv.weight.T + block.context_kv.bias).split(32, 1)
    k, v = torch.cat([ck, k])[mask[0]], torch.cat([cv, v])[mask[0]]
    heads = [torch.softmax(q[:, s] @ k[:, s].T / 4, 1) @ v[:, s] for s in (slice(0, 16), slice(16, 32))]
    want = x + (torch.cat(heads, 1) @ block.proj_out.weight.T + block.proj_out.bias).T.view(1, 32, 2, 3)
    assert torch.allclose(block(x, context, mask), want, atol=1e-5)


def test_the_text_transformer_equals_torchs_encoder_layers():
    ours = awaken(decoder.TextTransformer(replace(TINY_DECODER, text_layers=2)))
    x, mask = torch.randint(50, (3, 9)), torch.arange(9) < torch.tensor([[9], [4], [1]])
    want = ours.token_embedding(x) + ours.positional_embedding[:9]
    for layer in ours.layers:
        theirs = torch.nn.TransformerEncoderLayer(16, 2, 64, 0.0, "gelu", batch_first=True, norm_first=True).eval()
        names = {"self_attn.in_proj_": "qkv.", "self_attn.out_proj.": "proj.", "linear1.": "fc.", "linear2.": "fc_proj.", "norm1.": "ln_1.",
                 "norm2.": "ln_2."}
        theirs.load_state_dict({a + end: layer.state_dict()[b + end] for a, b in names.items() for end in ("weight", "bias")})
        want = theirs(want, src_key_padding_mask=~mask)
    assert torch.allclose(ours(x, mask)[mask], ours.norm(want)[mask], atol=1e-5)


def test_the_upsampler_has_no_attention_and_takes_any_size():
    model = awaken(upsample.Upsampler(TINY_UPSAMPLER))
    assert not any("ttention" in type(m).__name__ for m in model.modules())
    for low in (8, 10, 32):
        assert model(torch.randn(1, 3, 4 * low, 4 * low), torch.tensor([5]), torch.randn(1, 3, low, low)).shape == (1, 3, 4 * low, 4 * low)


def test_dropping_the_caption_puts_the_null_one_in_its_place(text):
    y, null = text(B=3), text(B=1)
    out = decoder.drop_text(y, null, torch.tensor([False, True, False]))
    for k in y:
        assert torch.equal(out[k][0], y[k][0]) and torch.equal(out[k][1], null[k][0]) and torch.equal(out[k][2], y[k][2])


def overfit(loss, parameters, steps, rate=2e-3):
    """The mean loss(generators) before and after `steps` of Adam on one batch, over the same noise."""
    def generators(seed):
        return [torch.Generator().manual_seed(10 * seed + row) for row in range(4)]
    def measure():
        with torch.no_grad():
            return sum(float(loss(generators(-k))) for k in range(1, 21)) / 20
    before, optimizer = measure(), torch.optim.Adam(parameters, rate)
    for step in range(steps):
        optimizer.zero_grad()
        loss(generators(step)).backward()
        optimizer.step()
    return before, measure()


def test_clip_can_overfit_one_batch():
    model, images, ids = clip_embed.CLIP(TINY_CLIP), torch.randn(6, 3, 64, 64), torch.randint(1, 49, (6, 8))
    loss = lambda generators: clip_embed.contrastive_loss(model.encode_image(images), model.encode_text(ids)[1], model.logit_scale)
    before, after = overfit(loss, model.parameters(), 60)
    assert before > 1.5 and after < 0.1


def test_prior_can_overfit_one_batch(text):
    model, z_i, y = prior.DiffusionPrior(TINY_PRIOR), F.normalize(torch.randn(4, 8), dim=1), text(B=4)
    before, after = overfit(lambda g: prior.prior_loss(model, z_i, y, text(B=1), g, drop_caption=0), model.parameters(), 300)
    assert before > 0.25 and after < 0.03


@pytest.mark.parametrize("text_layers", [0, 1])
def test_decoder_can_overfit_one_batch(text, text_layers):
    model = decoder.Decoder(replace(TINY_DECODER, text_layers=text_layers))
    x, z_i, y, null = torch.rand(2, 3, 1, 1).expand(2, 3, 16, 16) * 2 - 1, torch.randn(2, 8), text(), text(B=1)
    before, after = overfit(lambda g: decoder.decoder_loss(model, x, z_i, y, null, g[:2]), model.parameters(), 200, 4e-3)
    assert before > 0.9 and after < 0.25


def test_upsampler_can_overfit_one_batch():
    model = upsample.Upsampler(TINY_UPSAMPLER)
    low = torch.rand(2, 3, 8, 8) * 2 - 1
    high = F.interpolate(low, (32, 32), mode="nearest")
    before, after = overfit(lambda g: upsample.upsampler_loss(model, high, low, g[:2]), model.parameters(), 200, 4e-3)
    assert before > 0.9 and after < 0.2
