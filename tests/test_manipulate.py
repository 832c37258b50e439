"""manipulate.py: slerp against its definition, the four manipulations on the tensors they promise, files, and wrong use."""

import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_chain import TINY

import clip_embed
import decoder
import manipulate
import manipulations
import prior
import sample
import train
import upsample
from caption_accuracy import read_scene
from clip_embed import UserError
from data import shapes
from data.embeddings import scale
from manipulate import decode, interpolate, invert, pca_reconstruct, restored, slerp, text_diff, variations
from weights import checkpoints


@pytest.fixture(scope="module")
def stack():
    """A whole tiny stack, untrained, but with something in the weights that begin at zero: its decoder heeds all its inputs."""
    torch.manual_seed(0)
    tokenizer = clip_embed.Tokenizer(clip_embed.learn_bpe(["a red circle", "a small blue star"]))
    sizes = clip_embed.CLIPConfig(**vars(TINY[clip_embed]) | {"vocab_size": len(tokenizer)})
    networks = {"clip": clip_embed.CLIP(sizes), "ar-prior": prior.ARPrior(replace(TINY["ar-prior"], components=16)), "decoder": decoder.Decoder(TINY[decoder]),
                "upsample-256": upsample.Upsampler(TINY[upsample][256]), "upsample-1024": upsample.Upsampler(TINY[upsample][1024])}
    for p in networks["decoder"].parameters():
        torch.nn.init.normal_(p, std=0.05) if not p.any() else None
    return {k: v.eval().requires_grad_(False) for k, v in networks.items()} | {"tokenizer": tokenizer}


@pytest.fixture
def weights(stack, tmp_path):
    """The stack and a diffusion prior as a folder of checkpoints."""
    mark, folder = checkpoints.fingerprint(stack["clip"]), tmp_path / "weights"
    stack = stack | {"prior": prior.DiffusionPrior(TINY[prior])}
    folder.mkdir()
    for stage in ("clip", "prior", "ar-prior", "decoder", "upsample-256", "upsample-1024"):
        torch.save({"stage": stage, "config": vars(stack[stage].config), "model": stack[stage].state_dict(), "clip": mark,
                    "merges": [" ".join(m) for m in stack["tokenizer"].merges]}, folder / f"{stage}.pt")
    return folder


@pytest.fixture
def picture(tmp_path):
    """A path to a picture of a red square."""
    image = Image.new("RGB", (64, 64), "white")
    image.paste((220, 40, 40), (20, 20, 44, 44))
    image.save(tmp_path / "picture.png")
    return str(tmp_path / "picture.png")


def unit(*shape):
    return torch.nn.functional.normalize(torch.randn(shape), dim=-1)


# ----------------------------------------------------------------------------- slerp

def test_slerp_keeps_the_norm_turns_by_equal_angles_and_ends_exactly():
    a, b = unit(5, 16), unit(5, 16)
    path = torch.stack([slerp(a, b, k / 8) for k in range(9)])
    assert torch.allclose(path.norm(dim=-1), torch.ones(9, 5), atol=1e-6)
    steps = torch.acos((path[1:].double() * path[:-1].double()).sum(-1))
    assert torch.allclose(steps, torch.acos((a.double() * b.double()).sum(-1)).expand(8, 5) / 8, atol=1e-5)
    assert torch.allclose(path[0], a, atol=1e-7) and torch.allclose(path[-1], b, atol=1e-7)
    assert torch.linalg.matrix_rank(torch.stack([a[0], b[0], path[3, 0]]), atol=1e-5) == 2  # in their plane


def test_slerp_of_a_right_angle_is_the_circle():
    a, b = torch.tensor([[1.0, 0]]), torch.tensor([[0, 1.0]])
    for theta in (0.1, 0.5, 0.8):
        want = torch.tensor([[math.cos(theta * math.pi / 2), math.sin(theta * math.pi / 2)]])
        assert torch.allclose(slerp(a, b, theta), want, atol=1e-7)


def test_slerp_interpolates_norms_and_keeps_noise_as_large_as_noise():
    a, b = torch.tensor([[2.0, 0]]), torch.tensor([[0, 4.0]])
    assert float(slerp(a, b, 0.25).norm()) == pytest.approx(2.5)
    x, y = torch.randn(2, 1, 3, 64, 64)
    assert float(slerp(x, y, 0.5).var()) == pytest.approx(1, abs=0.05)  # the mean of the two has one half


def test_slerp_of_identical_vectors_is_the_vector_and_of_opposite_ones_an_error():
    a = unit(3, 8)
    for theta in (0, 0.3, 1):
        assert torch.equal(slerp(a, a, theta), slerp(a, a, 0)) and torch.allclose(slerp(a, a, theta), a, atol=1e-7)
    near = torch.nn.functional.normalize(a + 1e-6 * torch.randn(3, 8), dim=1)
    assert torch.allclose(slerp(a, near, 0.5), a, atol=2e-6)
    assert torch.allclose(slerp(a, 3 * a, 0.5), 2 * a, atol=1e-6)
    with pytest.raises(UserError, match="opposite"):
        slerp(a, torch.cat([a[:2], -a[2:]]), 0.5)
    with pytest.raises(UserError, match="theta 1.2"):
        slerp(a, a, 1.2)


# ----------------------------------------------------------------------------- the manipulations

@pytest.fixture
def code(stack):
    """(z_i, x_T) of two flat pictures."""
    images = torch.full((2, 3, 64, 64), 0.6)
    images[0, 0, 16:40, 16:40], images[1, 1, 30:50, 10:30] = -0.5, -0.8
    return *invert(stack, images, steps=20, seed=3), images


def test_inversion_and_decoding_ask_the_decoder_alike_and_z_i_is_clips(stack, monkeypatch):
    """The same caption and steps, unguided and unclamped: only then does the one undo the other (paper, §3)."""
    images, asked = torch.rand(2, 3, 64, 64) * 2 - 1, []
    spy = lambda name, function: monkeypatch.setattr(decoder, name, lambda *given: (asked.append((name, given)), function(*given))[1])
    spy("invert", decoder.invert)
    calls, draw = [], decoder.sample
    monkeypatch.setattr(decoder, "sample", lambda *given, **named: (calls.append((given, named)), draw(*given, **named))[1])
    z_i, x_T = invert(stack, images, ["a red circle", "a small blue star"], steps=4, seed=1)
    decode(stack, z_i[:, None], x_T[:, None], ["a red circle", "a small blue star"], steps=4)
    want = stack["clip"].encode_image(clip_embed.preprocess(images, stack["clip"].config.image_size))
    assert torch.allclose(z_i, want, atol=1e-6) and torch.allclose(z_i.norm(dim=1), torch.ones(2), atol=1e-5)
    (_, (_, _, inverted_z_i, inverted_text, _, inverted_steps, _)), = asked
    ((_, decoded_z_i, text, _, _, guidance, steps, eta, start), named), = calls
    assert torch.equal(inverted_z_i, decoded_z_i) and torch.equal(start, x_T) and (guidance, eta, named["clamp"]) == (1, 0, False)
    assert steps == inverted_steps == 4 and text.keys() == inverted_text.keys()
    assert all(torch.equal(text[k], inverted_text[k]) for k in text) and not torch.equal(text["tokens"][0], text["tokens"][1])


def test_two_pictures_are_inverted_with_noise_of_their_own(stack, picture, monkeypatch):
    monkeypatch.setattr(decoder, "invert", lambda model, x_0, z_i, text, noise, *rest: decoder.randn(noise, x_0.shape, "cpu"))
    (_, a), (_, b) = manipulate.read_latents(stack, [picture, picture], None, 3, 5)[0]
    (_, alone), = manipulate.read_latents(stack, [picture], None, 3, 6)[0]  # picture k has seed + k
    assert torch.equal(alone, b) and abs(float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])) < 0.05


@pytest.mark.parametrize("wrong, said", [
    (lambda stack, z, x: variations(stack, z, x, 1, (1.5,), steps=2), "eta 1.5: must be between 0 and 1"),
    (lambda stack, z, x: variations(stack, z, x, 1, (math.nan,), steps=2), "eta nan"),
    (lambda stack, z, x: interpolate(stack, (z, x), (z, x), 1, steps=2), "1 frames: must be"),
    (lambda stack, z, x: interpolate(stack, (z, x), (z, x), 3, "slrep", steps=2), "'slrep'"),
    (lambda stack, z, x: text_diff(stack, z, x, "a star", frames=1, steps=2), "1 frames: must be at least 2")])
def test_functions_refuse_what_the_command_line_refuses(wrong, said, stack, code):
    with pytest.raises(UserError, match=said):
        wrong(stack, *code[:2])


def test_eta_0_gives_every_variation_the_reconstruction_and_more_eta_wanders_further(stack, code, monkeypatch):
    z_i, x_T, _ = code
    again = decode(stack, z_i[:, None], x_T[:, None], steps=20)[:, 0]
    made = variations(stack, z_i, x_T, 3, (0, 0.4, 1), steps=20, seed=5)
    assert made.shape == (2, 3, 3, 3, 64, 64)
    assert torch.allclose(made[:, 0], again[:, None].expand(-1, 3, -1, -1, -1), atol=1e-4)
    near, far = ((made[:, k] - again[:, None]).square().mean() for k in (1, 2))
    assert 0 < near < far
    assert not torch.allclose(made[0, 2, 0], made[0, 2, 1], atol=0.05)
    alone = variations(stack, z_i[:1], x_T[:1], 3, (1,), steps=20, seed=5)
    assert torch.allclose(alone[0, 0], made[0, 2], atol=2 / 255)
    scales = []
    monkeypatch.setattr(manipulate, "decode", lambda *given, **named: scales.append(given[8] if len(given) > 8 else 1) or x_T[:, None])
    monkeypatch.setattr(stack["decoder"], "config", replace(stack["decoder"].config, guidance=3.0))
    variations(stack, z_i, x_T, 1, (0, 0.5, 1))
    assert scales == [1, 2, 3]  # guidance grows with eta


def test_interpolations_end_in_both_reconstructions_and_fixed_noise_stays(stack, code, monkeypatch):
    z_i, x_T, _ = code
    again = decode(stack, z_i[:, None], x_T[:, None], steps=20)[:, 0]
    a, b = zip(z_i.split(1), x_T.split(1))
    made = interpolate(stack, a, b, 5, steps=20)
    assert made.shape == (1, 1, 5, 3, 64, 64)
    assert torch.allclose(made[0, 0, 0], again[0], atol=1e-3) and torch.allclose(made[0, 0, -1], again[1], atol=1e-3)
    seen = []
    monkeypatch.setattr(manipulate, "decode", lambda stack, z, x, *rest, **named: seen.append((z, x)) or torch.zeros_like(x))
    interpolate(stack, a, b, 5, "fixed", rows=2, seed=7)
    assert len(seen) == 2 and all(torch.equal(x[:, :1].expand_as(x), x) for _, x in seen)  # one noise along a row
    assert not torch.allclose(seen[0][1], seen[1][1]) and torch.equal(seen[0][0], seen[1][0])
    assert torch.allclose(seen[0][0][0, 2], slerp(a[0], b[0], 0.5)[0])


def test_a_text_diff_moves_z_i_by_a_share_of_the_angle_to_the_difference_and_keeps_x_T(stack, code, monkeypatch):
    z_i, x_T, _ = code
    seen = []
    monkeypatch.setattr(manipulate, "decode", lambda stack, z, x, *rest, **named: seen.append((z, x)) or x)
    text_diff(stack, z_i, x_T, "a blue star", "a red circle", maximum=0.4, frames=5)
    read = lambda caption: clip_embed.encode_captions(stack["clip"], stack["tokenizer"], [caption])[0]["z_t"]
    z_d = torch.nn.functional.normalize(read("a blue star") - read("a red circle"), dim=1)
    angle = lambda u, v: 2 * torch.asin((u.double() - v.double()).norm(dim=-1) / 2)
    z, x = seen[0]
    assert torch.allclose(z[:, 0], z_i, atol=1e-6) and torch.equal(x, x_T[:, None].expand_as(x))
    whole = angle(z_i, z_d)
    for k in range(5):
        assert torch.allclose(angle(z[:, k], z_i), 0.1 * k * whole, atol=1e-3)
        assert torch.allclose(angle(z[:, k], z_d), (1 - 0.1 * k) * whole, atol=1e-3)
    text_diff(stack, z_i, x_T, "a blue star", maximum=1, frames=2)
    assert torch.allclose(seen[1][0][:, 1], read("a blue star").expand_as(z_i), atol=1e-5)  # no source: towards z_t itself
    with pytest.raises(UserError, match="must differ"):
        text_diff(stack, z_i, x_T, "a star", "a star")
    with pytest.raises(UserError, match="3 captions for 2 pictures"):
        text_diff(stack, z_i, x_T, ["a star"] * 3)


class GaussianPrior(torch.nn.Module):
    """The exact E[x_0|x_t] of z_i ~ N(mean, diag(s²)), in a diffusion prior's place; it keeps each t and text."""

    def __init__(self, mean, s, **config):
        super().__init__()
        self.mean, self.s = torch.nn.Parameter(mean), s
        self.config, self.asked = prior.PriorConfig(**config), []

    def standardize(self, z_i):
        return z_i * scale(16)

    def embedding(self, z):
        return z / scale(16)

    def forward(self, x, t, text):
        self.asked.append((t, text))
        a, m, v = prior.cosine_schedule()[t][:, None], self.mean * scale(16), (self.s * scale(16)) ** 2
        return (m + a.sqrt() * v / (a * v + 1 - a) * (x - a.sqrt() * m)).float()


@pytest.mark.parametrize("t", [40, 160, 400])
def test_a_prior_restores_a_move_in_the_directions_in_which_pictures_vary(t, stack):
    """For Gaussian z_i the noise cancels. In each direction, Bayes' rule lets the move have the signal's share of the variance at t."""
    mean, s, z_i, z_theta = 0.8 * unit(16), torch.linspace(0, 0.3, 16), unit(3, 16), unit(3, 16)
    model = GaussianPrior(mean, s)
    found = restored(stack | {"prior": model}, z_i, z_theta, t)
    f = lambda u: math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    signal = f((t + 1) / 1000) / f(0) * (s * 17.2 * math.sqrt(16 / 1024)) ** 2
    weight = signal / (signal + 1 - f((t + 1) / 1000) / f(0))
    assert weight[0] == 0 and weight.max() > 0.3  # in the first direction all pictures are equal
    want = torch.nn.functional.normalize(z_i + weight * (z_theta - z_i), dim=1)
    assert torch.allclose(found, want, atol=1e-5)
    assert torch.allclose(found.norm(dim=1), torch.ones(3), atol=1e-6)
    empty = clip_embed.encode_captions(stack["clip"], stack["tokenizer"], [""])[0]["tokens"].expand(6, -1)
    (asked, text), = model.asked
    assert torch.equal(asked, torch.full((6,), t)) and torch.equal(text["tokens"], empty)


def test_a_row_is_restored_alike_alone_and_in_a_batch_and_no_move_is_none_after_it(stack):
    with_prior, z_i, z_theta = stack | {"prior": prior.DiffusionPrior(TINY[prior])}, unit(200, 16), unit(200, 16)  # two batches
    found = restored(with_prior, z_i, z_theta)
    assert torch.equal(restored(with_prior, z_i, z_theta), found) and not torch.allclose(found, z_i, atol=0.01)
    assert torch.allclose(restored(with_prior, z_i[180:181], z_theta[180:181]), found[180:181], atol=1e-5)
    assert torch.allclose(restored(with_prior, z_i.flip(0), z_theta.flip(0)).flip(0), found, atol=1e-5)
    assert torch.allclose(restored(with_prior, z_i, z_i), z_i, atol=1e-5)
    standardized = stack | {"prior": GaussianPrior(torch.zeros(16), torch.ones(16), unit_norm=False)}
    assert torch.equal(restored(standardized, 9 * z_i, 9 * z_theta), 9 * z_theta)


def test_the_prior_restores_each_frame_only_if_asked(stack, code, monkeypatch):
    z_i, x_T, _ = code
    seen, captions = [], ("a blue star", "a red circle")
    monkeypatch.setattr(manipulate, "decode", lambda stack, z, x, *rest, **named: seen.append((z, x)) or x)
    monkeypatch.setattr(manipulate, "restored", lambda stack, z_i, z_theta: z_i + 2 * (z_theta - z_i))
    text_diff(stack, z_i, x_T, *captions, maximum=0.4, frames=5)
    text_diff(stack | {"prior": None}, z_i, x_T, *captions, maximum=0.4, frames=5, restore=True)
    text_diff(stack | {"prior": None}, z_i, x_T, *captions, maximum=0.4, frames=5)
    (moved, _), (found, x), (whole, _) = seen
    assert torch.allclose(found, 2 * moved - z_i[:, None], atol=1e-6) and torch.equal(whole, moved)
    assert torch.equal(x, x_T[:, None].expand_as(x))


def test_the_first_k_components_keep_the_most_and_all_of_them_keep_z_i(stack, monkeypatch):
    """Embeddings that vary along three directions, more along the first: the projection's error falls as theory says."""
    d, n, deviations = 16, 4000, torch.tensor([0.3, 0.2, 0.1])
    axes = torch.linalg.qr(torch.randn(d, d))[0]
    z_i = torch.nn.functional.normalize(axes[3] + (torch.randn(n, 3) * deviations) @ axes[:3], dim=1)
    variances, vectors = torch.linalg.eigh(z_i.T.double().cov(correction=0))
    mean, components = z_i.mean(0), vectors.flip(1).T.float()
    seen, counts = [], (0, 1, 2, 3, d)
    monkeypatch.setattr(manipulate, "decode", lambda stack, z, *rest, **named: seen.append(z) or z)
    pca_reconstruct(stack, z_i, torch.zeros(n, 3, 4, 4), mean, components, counts)
    errors = (seen[0] - z_i[:, None]).double().square().sum(-1).mean(0)
    left = torch.stack([variances[:d - k].sum() for k in counts])  # of the components that are not kept
    assert torch.allclose(errors, left, rtol=1e-4, atol=1e-9) and (left[:-1] > left[1:]).all()
    assert torch.allclose(seen[0][:, 0], mean.expand(n, -1), atol=1e-6)
    with pytest.raises(UserError, match="between 0 and 16"):
        pca_reconstruct(stack, z_i, torch.zeros(n, 3, 4, 4), mean, components, (17,))


def test_decode_reads_one_caption_for_all_or_one_each(stack, code):
    z_i, x_T, _ = code
    make = lambda captions: decode(stack, z_i[:, None], x_T[:, None], captions, steps=5)
    one, each, other = make("a red circle"), make(["a red circle"] * 2), make(["a red circle", "a small blue star"])
    assert torch.equal(one, each) and torch.allclose(one[0], other[0], atol=1e-4) and not torch.allclose(one[1], other[1], atol=1e-3)
    with pytest.raises(UserError, match="1 captions for 2 pictures"):
        make(["a star"])


@pytest.mark.parametrize("part, tables", [("inversion", 2), ("variations", 2), ("interpolation", 0), ("textdiff", 1), ("reconstruction", 1)])
def test_a_perfect_codec_measures_as_perfect(part, tables, monkeypatch, capsys):
    """experiments/manipulations.py with the picture itself as its z_i, handed out whatever the noise, and edits from θ = 0.3 on."""
    def edit(stack, z_i, x_T, to, source, maximum, frames, restore, **options):
        assert restore
        rows = []
        for image, caption in zip(z_i.unflatten(-1, (3, 64, 64)), to):
            scene, (_, word, *shape) = read_scene(sample.to_picture(image)), caption.split()
            name = next(a for a, values in shapes.VALUES.items() if word in values)
            scene = shapes.lay_out(replace(scene, things=(replace(scene.things[0], **{name: word}),)), np.random.default_rng(0))
            edited = manipulations.to_images([scene])[0]
            rows.append(torch.stack([edited if maximum * k / (frames - 1) > 0.29 else image for k in range(frames)]))
        return torch.stack(rows)

    monkeypatch.setattr(manipulate, "invert", lambda stack, images, **options: (images.flatten(1), torch.randn(len(images), 3, 64, 64)))
    monkeypatch.setattr(manipulate, "decode", lambda stack, z_i, *rest, **options: z_i.unflatten(-1, (3, 64, 64)))
    monkeypatch.setattr(manipulate, "text_diff", edit)
    monkeypatch.setattr(manipulations, "z_t", lambda stack, captions: torch.randn(len(captions), 3 * 64 * 64))
    monkeypatch.setattr(manipulate, "pca_reconstruct", lambda stack, z_i, x_T, mean, components, counts, **options:
                        z_i.unflatten(-1, (3, 64, 64))[:, None].expand(-1, len(counts), -1, -1, -1))
    pca = SimpleNamespace(mean=torch.zeros(9), components=torch.eye(9, 3 * 64 * 64))
    network = SimpleNamespace(config=SimpleNamespace(guidance=3))
    result = manipulations.PARTS[part]({"ar-prior": pca, "decoder": network}, SimpleNamespace(n=4, seed=0, steps=[50], whole=False))
    assert sum(line.startswith("|---") for line in capsys.readouterr().out.splitlines()) == tables
    if part == "inversion":
        median = {name: values[0] for name, values in result[50].items()}
        assert median["PSNR of the reconstruction, dB"] > 100 and abs(median["variance of x_T"] - 1) < 0.05
        assert abs(median["correlation of neighbours"]) < 0.05 and abs(median["correlation with the noise put in"]) < 0.05
        assert abs(median["… of means of 8×8 pixels, ×64"] - 1) < 0.3  # 192 means: a deviation of 0.1
        groups = result["swapped"].values()
    elif part == "variations":
        assert all(w["distance"] < 1e-6 and not w["moved"] > 0.01 for w in result["wander"].values())
        groups = result["kept"].values()
    elif part == "textdiff":
        assert [r["maximum"] for r in result.values()] == [0.3] * 3 and all(r["chosen among"][0.2][0] == 0 for r in result.values())
        assert all(r[what] == [1, 1, 1] for r in result.values() for what in ("text diff", "true z_i"))
        assert all(r["untouched"] == [0, 1, 0] for r in result.values())
        groups = []
    elif part == "reconstruction":
        assert list(result) == ["1", "2", "4", "8", "9", "whole z_i (12288)"]
        groups = result.values()
    else:
        assert result["largest difference"] < 1e-3 and result["psnr of the ends"] > 100
        groups = []
    assert all(value == 1 or math.isnan(value) for group in groups for value in group.values())


def test_psnr_and_the_correlation_of_neighbours_know_their_units(monkeypatch, capsys):
    """An error of 0.02 in a range of 2 is one of a hundredth: 40 dB. Noise smoothed over two pixels has neighbours at 0.5."""
    images = torch.zeros(3, 3, 64, 64)
    assert torch.allclose(manipulations.psnr(images, images + 0.02), torch.full((3,), 40.0), atol=1e-3)
    wide = torch.randn(4, 3, 65, 65)
    smooth = 3 + wide[..., 1:, 1:] + wide[..., 1:, :-1] + wide[..., :-1, 1:] + wide[..., :-1, :-1]
    monkeypatch.setattr(manipulate, "invert", lambda stack, images, **options: (images.flatten(1), smooth))
    monkeypatch.setattr(manipulate, "decode", lambda stack, z_i, *rest, **options: z_i.unflatten(-1, (3, 64, 64)))
    result = manipulations.inversion(None, SimpleNamespace(n=4, seed=0, steps=[50]))[50]
    assert result["correlation of neighbours"][0] == pytest.approx(0.5, abs=0.03)
    assert result["mean of x_T"][0] == pytest.approx(3, abs=0.1) and result["variance of x_T"][0] == pytest.approx(4, abs=0.3)


def test_scenes_of_the_measurements_are_none_of_the_trainings():
    """numpy pads seeds with zeros: [0, 1] and [0, 1, 0, 0] are one stream, the first picture of a training's first step."""
    trained = {float(np.random.default_rng([0, step, row, last]).random()) for step in range(12) for row in range(64) for last in range(4)}
    first = lambda make: (drawn.append(float(make.random())) or drawn[-1])
    drawn = []
    for part in range(1, 8):
        manipulations.scenes_of(part, 5, 0, first)
    assert len(set(drawn)) == 35 and not trained & set(drawn)


# ----------------------------------------------------------------------------- the way in

def test_any_kind_of_picture_comes_in_upright_on_white_and_at_full_range(stack, tmp_path):
    """The same 120×80 picture, black at its left and white at its right, in every mode: the same square tensor."""
    ramp = np.tile(np.linspace(0, 255, 120).astype(np.uint8), (80, 1))
    grey = Image.fromarray(ramp)
    exif = Image.Exif()
    exif[0x0112] = 6  # the file lies on its side: turn it by 90° clockwise to look at it
    transparent = Image.merge("LA", (Image.new("L", grey.size, 0), Image.fromarray(255 - ramp)))  # black, fading out
    files = {"grey.png": grey, "rgb.png": grey.convert("RGB"), "cmyk.tif": grey.convert("CMYK"), "palette.png": grey.convert("P"),
             "deep.png": Image.fromarray(ramp.astype(np.uint16) * 257), "transparent.png": transparent, "large.png": grey.resize((1200, 800))}
    for name, image in files.items():
        image.save(tmp_path / name)
    grey.rotate(90, expand=True).convert("RGB").save(tmp_path / "turned.png", exif=exif)
    want = manipulate.load_picture(stack, tmp_path / "grey.png")
    assert want.shape == (1, 3, 64, 64) and want.abs().max() <= 1 and float(want[..., -1].mean() - want[..., 0].mean()) > 1.2
    for name in [*files, "turned.png"]:
        assert torch.allclose(manipulate.load_picture(stack, tmp_path / name), want, atol=0.03), name


# ----------------------------------------------------------------------------- the script

def run(monkeypatch, *arguments):
    """manipulate.py as a user runs it, but in this process; the exit status."""
    monkeypatch.setattr(sys, "argv", ["manipulate.py", *map(str, arguments), "--device", "cpu"])
    try:
        manipulate.main()
    except SystemExit as exit:
        return exit.code
    return 0


@pytest.mark.parametrize("size", [64, 256])
@pytest.mark.parametrize("command, frames, rows", [
    (["variations", "PICTURE", "--n", "2", "--eta", "0", "1"], 3, (2, 2)),
    (["interpolate", "PICTURE", "PICTURE", "--frames", "3"], 3, (3, 1)),
    (["interpolate", "PICTURE", "PICTURE", "--frames", "3", "--noise", "fixed", "--rows", "2"], 6, (3, 2)),
    (["textdiff", "PICTURE", "--from", "a red circle", "--to", "a blue star", "--frames", "3"], 3, (3, 1)),
    (["reconstruct", "PICTURE", "--components", "1", "4", "16", "--rows", "2"], 6, (3, 2)),
    (["reconstruct", "PICTURE", "--rows", "1"], 5, (5, 1))])  # 1, 2, 4, 8 and all 16
def test_each_command_writes_a_strip_and_its_frames(command, frames, rows, size, weights, picture, tmp_path, monkeypatch, capsys):
    command = [picture if c == "PICTURE" else c for c in command]
    assert run(monkeypatch, *command, "--steps", "3", "--size", size, "--weights", weights, "--out", tmp_path / "out", "--gif") == 0
    out, err = capsys.readouterr()
    *paths, gif = out.split()
    assert len(paths) == 1 + frames and "dB of the picture" in err
    cell = max(128, size)
    assert Image.open(paths[0]).size == (rows[0] * cell, rows[1] * (cell + cell // 6))
    assert all(Image.open(p).size == (size, size) for p in paths[1:])
    assert Image.open(paths[1]).info["settings"].startswith(command[0])
    with Image.open(gif) as animation:
        assert animation.size == (size, size)
    labels = np.asarray(Image.open(paths[0]).convert("L"))[cell:cell + cell // 6]
    assert (labels < 128).sum() > 20  # something is written under the pictures


def test_a_latent_file_stands_for_its_picture(weights, picture, tmp_path, monkeypatch, capsys):
    common = ["variations", "--n", "1", "--eta", "0", "--weights", weights]
    assert run(monkeypatch, *common, picture, "--steps", "5", "--caption", "a star", "--save-latent", tmp_path / "a.pt", "--out",
               tmp_path / "first.png") == 0
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(decoder, "invert", None)  # no need for it
        assert run(patch, *common, tmp_path / "a.pt", "--out", tmp_path / "second.png") == 0
    assert "dB" not in capsys.readouterr().err
    assert (tmp_path / "first.png").read_bytes() == (tmp_path / "second.png").read_bytes()


def test_a_poor_reconstruction_is_told_with_what_to_do(weights, picture, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(decoder, "invert", lambda model, x_0, *rest: torch.randn_like(x_0))
    assert run(monkeypatch, "variations", picture, "--n", "1", "--steps", "4", "--weights", weights, "--out", tmp_path / "x.png") == 0
    assert "warning: a poor one. Try --steps 20" in capsys.readouterr().err


def damaged(tmp_path, weights, **change):
    """A latent file for the stack's decoder, changed."""
    model = checkpoints.load_model(decoder.Decoder, decoder.DecoderConfig, checkpoints.read_checkpoint(weights / "decoder.pt", "decoder"), "")
    latent = {"stage": "latent", "config": {"decoder": checkpoints.fingerprint(model, torch.bfloat16), "caption": "", "steps": 3},
              "model": {"z_i": unit(1, 16), "x_T": torch.randn(1, 3, 64, 64)}}
    for key, value in change.items():
        latent["model" if key in ("z_i", "x_T") else "config"][key] = value
    torch.save(latent, tmp_path / "latent.pt")
    return tmp_path / "latent.pt"


@pytest.mark.parametrize("arguments, said", [
    (["variations", "nowhere.png"], "no such file"),
    (["variations", "TEXT"], "not a picture that can be read"),
    (["variations", "PICTURE", "--eta", "1.5"], "--eta 1.5: must be between 0 and 1"),
    (["variations", "PICTURE", "--eta", "nan"], "--eta nan: must be between 0 and 1"),
    (["textdiff", "PICTURE", "--to", "a star", "--max", "1.1"], "--max 1.1: must be between 0 and 1"),
    (["textdiff", "PICTURE", "--to", "a star", "--from", "a star"], "must differ"),
    (["textdiff", "PICTURE"], "--to"),
    (["textdiff", "PICTURE", "--to", "a", "b"], "unrecognized arguments: b"),
    (["interpolate", "PICTURE"], "PICTURE"),
    (["interpolate", "PICTURE", "PICTURE", "--frames", "1"], "--frames 1: must be between 2 and 1000"),
    (["interpolate", "PICTURE", "PICTURE", "--save-latent", "a.pt"], "a NAME.pt for each of the 2 pictures"),
    (["variations", "PICTURE", "--save-latent", "a.png"], "a NAME.pt for each of the 1 pictures"),
    (["reconstruct", "PICTURE", "--components", "17"], "--components 17: "),
    (["variations", "PICTURE", "--steps", "1"], "--steps 1: must be between 2 and 950"),
    (["variations", "nowhere.pt"], "expected the latent checkpoint that `python manipulate.py --save-latent` writes"),
    (["variations", "PICTURE", "--out", "strip.jpg"], "a strip is a PNG file"),
    (["variations", "TEXT.pt"], "damaged"),
    (["variations", "PICTURE", "--out", "/dev/null/x"], "cannot write there"),
    (["variations", "GIF", "--out", "OUT", "--gif"], "a.gif: would be overwritten")])
def test_wrong_use_is_one_clear_line(arguments, said, weights, picture, tmp_path, monkeypatch, capsys):
    for name in ("text", "text.pt"):
        (tmp_path / name).write_text("no picture")
    Image.open(picture).save(tmp_path / "a.gif")  # the animation of a.png would lie over it
    names = {"PICTURE": picture, "TEXT": tmp_path / "text", "TEXT.pt": tmp_path / "text.pt", "GIF": tmp_path / "a.gif", "OUT": tmp_path / "a.png"}
    extra = [] if "--steps" in arguments else ["--steps", "2"]
    extra += [] if "--out" in arguments else ["--out", tmp_path / "out"]
    assert run(monkeypatch, *(names.get(a, a) for a in arguments), *extra, "--weights", weights) == 2
    err = capsys.readouterr().err
    assert said in err.splitlines()[-1].split("\r")[-1] and "Traceback" not in err


@pytest.mark.parametrize("change, said", [
    ({"decoder": "0123456789abcdef"}, "another decoder"),
    ({"x_T": torch.randn(1, 3, 32, 32)}, "x_T should be finite floats of shape (1, 3, 64, 64), is (1, 3, 32, 32)"),
    ({"z_i": torch.full((1, 16), math.nan)}, "z_i should be finite floats"),
    ({"z_i": torch.ones(1, 16, dtype=torch.long)}, "z_i should be finite floats"),
    ({"z_i": "a string"}, "z_i should be finite floats"),
    ({"steps": 10 ** 9}, "in how many steps"), ({"steps": "3"}, "in how many steps"), ({"caption": 7}, "with what caption")])
def test_a_foreign_or_damaged_latent_file_is_refused_in_one_line(change, said, weights, tmp_path, monkeypatch, capsys):
    path = damaged(tmp_path, weights, **change)
    assert run(monkeypatch, "variations", path, "--weights", weights, "--out", tmp_path / "out") == 2
    err = capsys.readouterr().err
    assert said in err and str(path) in err and len(err.splitlines()) == 1


def test_a_latent_file_fits_its_decoder_in_either_precision(weights, tmp_path, monkeypatch):
    path = damaged(tmp_path, weights)
    for precision in ("float32", "bfloat16"):
        out = tmp_path / f"{precision}.png"
        assert run(monkeypatch, "variations", path, "--weights", weights, "--out", out, "--precision", precision, "--n", "1") == 0
    strips = [np.asarray(Image.open(tmp_path / f"{precision}.png"), float) for precision in ("float32", "bfloat16")]
    assert 0 < abs(strips[0] - strips[1]).mean() < 2


def test_textdiff_and_reconstruct_compute_in_bfloat16_too(weights, picture, tmp_path, monkeypatch):
    for command in (["textdiff", picture, "--to", "a star"], ["reconstruct", picture]):
        strips = []
        for precision in ("float32", "bfloat16"):
            out = tmp_path / f"{precision}.png"
            assert run(monkeypatch, *command, "--steps", "3", "--weights", weights, "--out", out, "--precision", precision) == 0
            strips.append(np.asarray(Image.open(out), float))
        assert 0 < abs(strips[0] - strips[1]).mean() < 0.1 * strips[0].std()


def test_a_latent_file_is_decoded_as_it_was_inverted_or_not_at_all(weights, tmp_path, monkeypatch, capsys):
    path = damaged(tmp_path, weights)
    assert run(monkeypatch, "variations", path, "--steps", "4", "--weights", weights) == 2
    assert "was inverted with caption '' in 3 steps" in capsys.readouterr().err
    assert run(monkeypatch, "variations", path, "--caption", "a star", "--weights", weights) == 2
    assert "so not with 'a star' in 3" in capsys.readouterr().err


def test_without_a_diffusion_prior_a_text_diff_is_the_papers(weights, picture, tmp_path, monkeypatch, capsys):
    command = ["textdiff", picture, "--to", "a blue star", "--frames", "2", "--steps", "3", "--weights", weights, "--out"]
    assert run(monkeypatch, *command, tmp_path / "restored.png") == run(monkeypatch, *command, tmp_path / "whole.png", "--whole") == 0
    (weights / "prior.pt").unlink()
    assert run(monkeypatch, *command, tmp_path / "without.png") == 0
    files = [(tmp_path / f"{name}.png").read_bytes() for name in ("whole", "without", "restored")]
    assert files[0] == files[1] != files[2]


def test_without_an_autoregressive_prior_there_are_no_components(weights, picture, monkeypatch, capsys):
    (weights / "ar-prior.pt").unlink()
    assert run(monkeypatch, "reconstruct", picture, "--weights", weights) == 2
    assert "ar-prior.pt: no such file" in capsys.readouterr().err
