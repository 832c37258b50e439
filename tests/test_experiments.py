"""The measurements under experiments/, each on a case whose answer is known."""

import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
from PIL import ImageColor

import caption_accuracy
import linear_probes
import speed
import stages
import sweep
import train
import upsamplers
from clip_embed import to_tensor
from data.shapes import COLOURS, Thing, VALUES, describe, lay_out, random_scene, render


@pytest.mark.parametrize("sigma", [1.0, 3.0])
def test_the_width_of_a_gaussian_edge_is_twice_the_90th_percentile(sigma):
    thing = Thing("circle", "blue", "large", "solid", 0.45, 0.55, 0.2)
    y, x = np.mgrid[:256, :256] + 0.5
    distance = np.hypot(x - 0.45 * 256, y - 0.55 * 256) - 0.2 * 256
    share = torch.special.ndtr(torch.tensor(-distance / sigma)).numpy()[..., None]
    plain = np.full((256, 256, 3), 200.0)
    widths = upsamplers.edge_widths(share * np.array(COLOURS["blue"]) + (1 - share) * plain, thing, plain)
    assert len(widths) == 16 and np.allclose(widths, 2 * 1.28155 * sigma, atol=0.15 * sigma + 0.1)


def test_a_linear_probe_reads_what_is_linear_and_nothing_else():
    rng = torch.Generator().manual_seed(0)
    labels, z = torch.randint(4, (3000,), generator=rng), torch.randn(3000, 12, generator=rng)
    assert abs(linear_probes.named(z, labels) - 0.25) < 0.06  # 600 tested: three standard errors are 0.053
    assert linear_probes.named(torch.cat([z, 5 * torch.nn.functional.one_hot(labels, 4) + z[:, :4]], 1), labels) > 0.99
    signs = torch.randn(3000, 2, generator=rng).sign()
    assert abs(linear_probes.named(signs, (signs.prod(1) > 0).long()) - 0.5) < 0.08  # exclusive or



def test_a_probe_carries_over_to_another_shape_only_if_all_shapes_have_one_code():
    g = torch.Generator().manual_seed(0)
    shapes, labels = torch.arange(1200) % 6, torch.randint(2, (1200,), generator=g)
    z = 0.1 * torch.randn(1200, 16, generator=g) + torch.nn.functional.one_hot(shapes, 16)  # each shape has a place of its own
    sign = 2.0 * labels - 1
    assert linear_probes.carried_over(z + sign[:, None] * torch.eye(16)[9], labels, shapes) > 0.99
    inverted = sign * (1 - 2.0 * (shapes == 3))  # large is written as small, for one shape of six
    z = z + inverted[:, None] * torch.eye(16)[9]
    assert linear_probes.named(z, shapes) > 0.99 and abs(linear_probes.carried_over(z, labels, shapes) - 5 / 6) < 0.01


def test_the_participation_ratio_counts_directions():
    z = torch.randn(20_000, 8, generator=torch.Generator().manual_seed(0)) * torch.tensor([3.0, 3, 3, 0, 0, 0, 0, 0])
    values, ratio = linear_probes.directions(z + 5)
    assert abs(ratio - 3) < 0.05 and torch.allclose(values, torch.tensor([9.0, 9, 9, 0, 0, 0, 0, 0]).double(), atol=0.4)


def test_rivals_are_scenes_that_the_caption_is_wrong_of():
    rng = np.random.default_rng(3)
    everything = {(k, a) for k in range(2) for a in VALUES} | {"relation", "background"}
    for scene in [random_scene(rng, 2) for _ in range(100)]:
        caption = caption_accuracy.parse_caption(describe(scene, everything, rng))
        for name, rival in linear_probes.rivals(scene).items():
            wrong = caption_accuracy.judge(lay_out(rival, rng), caption)
            assert not wrong["all"] and wrong["background"] and wrong["count"], name
            if name.endswith(" changed"):  # only that attribute of only that thing
                k = scene.things.index(min(scene.things, key=lambda t: (t.y if scene.relation in ("above", "below") else t.x)))
                k = k if name.startswith("first") else 1 - k
                found = {(j, a) for j in range(2) for a in VALUES if getattr(rival.things[j], a) != getattr(scene.things[j], a)}
                assert found == {(k, name.split()[1])}, name
        assert sum(name.endswith(" changed") for name in linear_probes.rivals(scene)) == 8
        left, right = linear_probes.left_and_right(scene)
        assert scene.relation not in ("left of", "right of") or left.x < right.x
        assert caption_accuracy.judge(scene, caption)["all"]


def test_a_comparison_with_a_library_that_is_not_installed_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.setattr(sys, "argv", ["speed.py", "--against", "diffusers"])
    with pytest.raises(SystemExit) as stop:
        speed.main()
    assert stop.value.code == 2 and capsys.readouterr().err == "speed.py: --against diffusers: not installed (pip install diffusers)\n"


def test_the_profile_names_the_operations_and_their_shares(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "one_image", lambda *_: (lambda: torch.ones(512, 512) @ torch.ones(512, 512), 1))
    rows = speed.profile(Namespace(preset="shapes", batch_size=2, precision="float32", folder=tmp_path), torch.device("cpu"), shown=100)
    shares = {name: [float(cell.rstrip("%")) for cell in cells] for name, *cells in rows}
    assert all(sum(column) == pytest.approx(100, abs=2) for column in zip(*shares.values()))
    assert shares["mm"][0] > 50 > shares["convolution_backward"][1] > 5 and shares["convolution_backward"][0] == 0


@pytest.mark.alone
@pytest.mark.slow
def test_the_speed_of_every_stage_can_be_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "seconds", lambda run, device: (run(), 2.0)[1])
    args = Namespace(preset="shapes", batch_size=8, precision="float32", folder=tmp_path)
    for stage in train.STAGES:
        name, parameters, batch, images_s, *_ = speed.measure(stage, args, torch.device("cpu"), 1e12)
        assert (name, batch, images_s) == (stage, "8", "4") and float(parameters.split()[0]) > 1


def test_operations_of_a_matrix_product_are_counted():
    a, b = torch.randn(8, 32), torch.randn(32, 4)
    assert speed.operations(lambda: a @ b) == 2 * 8 * 32 * 4


def test_the_sweep_scores_one_thing_and_two_by_turns(monkeypatch):
    captions = sweep.captions_of(6, seed=0)
    assert captions == sweep.captions_of(6, seed=0) and captions != sweep.captions_of(6, seed=1)
    monkeypatch.setattr(sweep.sample, "generate", lambda stack, some, *rest, **options: torch.zeros(len(some), 3, 64, 64))
    monkeypatch.setattr(caption_accuracy, "score", lambda picture, caption: {"all": caption in captions[::2]})
    shares, _ = sweep.measure({}, captions, 0, decoder_steps=1)
    assert shares == {"one thing": (1.0, 0.0), "two things": (0.0, 0.0)}


def test_stages_reads_true_pictures_right_and_others_captions_wrong():
    rng = np.random.default_rng(5)
    scenes = [random_scene(rng, 2) for _ in range(12)]
    everything = {(k, a) for k in (0, 1) for a in VALUES} | {"relation", "background"}
    captions = [describe(scene, everything, rng) for scene in scenes]
    images = torch.stack([to_tensor(render(scene, 64)) for scene in scenes]).float() / 127.5 - 1
    assert all(right == said == 12 for right, said in stages.cells(images, captions).values())
    assert stages.cells(images, captions[1:] + captions[:1])["all"] == [0, 12]


def test_the_sweeps_chart_has_seconds_on_a_logarithmic_axis_and_shares_on_an_even_one():
    points = {"a": (0.1, 0.9), "b": (0.2, 0.9), "c": (0.4, 0.7), "d": (0.8, 0.8)}  # seconds, share
    picture = np.asarray(sweep.plot({name: [(seconds, "", share, 0.02)] for name, (seconds, share) in points.items()}))
    where = {}
    for name, colour in zip(points, sweep.LINES):
        y, x = (picture[:-40] == ImageColor.getrgb(colour)).all(-1).nonzero()  # the legend is below
        where[name] = x.mean(), y.mean()
    x, y = ({name: place[k] for name, place in where.items()} for k in (0, 1))
    steps = [x[b] - x[a] for a, b in zip("abc", "bcd")]  # each doubles the seconds
    assert steps == pytest.approx(3 * [steps[0]], abs=2) and steps[0] > 50
    assert y["a"] == pytest.approx(y["b"], abs=1) and y["c"] - y["d"] == pytest.approx(y["d"] - y["a"], abs=2) and y["d"] - y["a"] > 50
