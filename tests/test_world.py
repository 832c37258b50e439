"""The world of shapes: what design promises of scenes, captions, pictures and near misses; the upsamplers' crops."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import train
import upsample
from caption_accuracy import parse_caption
from data import shapes


def scenes(n, **options):
    rng = np.random.default_rng(0)
    return [shapes.random_scene(rng, **options) for _ in range(n)]


def test_things_keep_their_sizes_stay_inside_and_never_touch():
    for scene in scenes(1000):
        for thing in scene.things:
            low, high = shapes.RADII[thing.size]
            assert low <= thing.radius <= high and abs(thing.tilt) <= 12
            assert min(thing.x, thing.y) - thing.radius > 0 and max(thing.x, thing.y) + thing.radius < 1
        if scene.relation:
            a, b = scene.things
            along, across = (a.x - b.x, a.y - b.y) if scene.relation in ("left of", "right of") else (a.y - b.y, a.x - b.x)
            assert np.hypot(along, across) > a.radius + b.radius
            assert abs(along) >= 0.3 and abs(across) <= 0.12
            assert (along < 0) == (scene.relation in ("left of", "above"))


def test_held_out_pairs_appear_only_when_asked_for():
    assert not any(shapes.is_held_out(s) for s in scenes(2000))
    assert all(shapes.is_held_out(s) for s in scenes(100, held_out=True))


def test_captions_leave_each_attribute_out_about_a_third_of_the_time():
    rng = np.random.default_rng(0)
    sample = scenes(2000, count=2)
    said = [shapes.attributes_in_caption(s, rng) for s in sample]
    for what in ((0, "colour"), (1, "size"), (0, "fill"), "relation", "background"):
        assert sum(what in s for s in said) / len(said) == pytest.approx(2 / 3, abs=0.04)
    for scene, words in zip(sample, said):
        caption = shapes.describe(scene, words, rng)
        assert all(t.shape in caption for t in scene.things)
        assert (scene.background in caption) == ("background" in words)


def test_near_misses_differ_in_what_the_caption_says_and_from_one_another():
    rng, swaps, relations, inverse = np.random.default_rng(0), 0, 0, 0
    for scene in scenes(300):
        said = shapes.attributes_in_caption(scene, rng)
        group = [scene, *shapes.near_misses(scene, said, rng)]
        facts = [{(k, a): getattr(t, a) for k, t in enumerate(s.things) for a in shapes.VALUES} |
                 {"relation": s.relation, "background": s.background} for s in group]
        for s, fact in zip(group[1:], facts[1:]):
            assert not shapes.is_held_out(s) and len(s.things) == len(scene.things)
            changed = {k for k in fact if fact[k] != facts[0][k]}
            assert changed and all(k in said or k[1] == "shape" for k in changed)
            swaps += len(changed) == 2
            relations += changed == {"relation"}
            inverse += s.relation == shapes.RELATIONS.get(scene.relation, "none")
        captions = [shapes.describe(s, said, np.random.default_rng(5)) for s in group]  # the same wording for all
        assert len(set(captions)) == 4
    assert swaps > 60 and relations > 60
    assert 0.4 < inverse / relations < 0.8  # a CLIP that never meets the others takes "left of" for "above"


def test_almost_alike_things_differ_in_shape_or_colour_alone_and_keep_their_relation():
    rng, differences = np.random.default_rng(0), []
    for scene in scenes(600, count=2):
        alike = shapes.almost_alike(scene, rng)
        a, b = alike.things
        differences.append({k for k in shapes.VALUES if getattr(a, k) != getattr(b, k)})
        assert not shapes.is_held_out(alike) and (alike.relation, alike.background) == (scene.relation, scene.background)
        along = a.x - b.x if scene.relation in ("left of", "right of") else a.y - b.y
        assert abs(along) >= 0.3 and (along < 0) == (scene.relation in ("left of", "above"))
    assert differences.count({"shape"}) + differences.count({"colour"}) == 600 and 250 < differences.count({"shape"}) < 350


def test_crossed_scenes_of_one_thing_differ_in_two_attributes_one_by_one_and_both_at_once():
    rng, pairs, unnamed, place = np.random.default_rng(0), [], [], lambda s: (s.things[0].x, s.things[0].y)
    for _ in range(300):
        group, named = shapes.crossed(rng)
        differences = [{a for a in shapes.VALUES if getattr(s.things[0], a) != getattr(group[0].things[0], a)} for s in group]
        assert differences[0] == set() and differences[3] == differences[1] | differences[2] and list(map(len, differences)) == [0, 1, 1, 2]
        assert len({shapes.meaning(s, named) for s in group}) == 4 and not any(map(shapes.is_held_out, group))
        assert len({s.background for s in group}) == 1 and ("size" in differences[3]) != (len(set(map(place, group))) == 1)
        pairs.append(tuple(sorted(differences[3])))
        said = [shapes.describe(s, named, rng) for s in group]
        assert all(("thing" in text) != (s.things[0].shape in text) for s, text in zip(group, said)) and len({"thing" in text for text in said}) == 1
        assert "thing" not in said[0] or "shape" not in pairs[-1]
        unnamed += ["thing" in said[0]] * ("shape" not in pairs[-1])
    assert abs(np.mean(unnamed) - 0.5) < 0.12  # of some 150
    assert len(set(pairs)) == 6 and min(map(pairs.count, pairs)) > 30  # of 300 / 6


@pytest.mark.parametrize("forward", [0.0, 0.5, 0.8, 1.0])
def test_captions_begin_with_the_left_or_upper_thing_as_often_as_asked_and_stay_true(forward):
    """Read by the parser of the captions' score. Without a relation the order says nothing."""
    rng, first, unordered = np.random.default_rng(0), [], []
    for scene in scenes(1500, count=2):
        a, b = scene.things
        if a.shape == b.shape:
            continue
        caption = shapes.describe(scene, {"relation"}, rng, forward)
        read, by_shape = parse_caption(caption), {t.shape: t for t in scene.things}
        one, other = (by_shape[t.shape] for t in read.things)
        along = one.x - other.x if read.relation in ("left of", "right of") else one.y - other.y
        assert (along < 0) == (read.relation in ("left of", "above"))
        first.append(along < 0)
        earlier = lambda text: text.index(a.shape) < text.index(b.shape)
        unordered.append(earlier(shapes.describe(scene, set(), rng, forward)) == (scene.relation in ("left of", "above")))
    error = 4 * (0.25 / len(first)) ** 0.5
    assert np.mean(first) == pytest.approx(forward, abs=error if 0 < forward < 1 else 0) and np.mean(unordered) == pytest.approx(0.5, abs=error)


def test_captions_that_mean_the_same_have_one_meaning():
    red, blue = (shapes.Thing("circle", c, "small", "solid") for c in ("red", "blue"))
    scene = lambda first, second, relation: shapes.Scene((first, second), relation, "white", 0.0)
    said = {(0, "colour"), (1, "colour"), "relation"}
    assert shapes.meaning(scene(red, blue, "above"), said) == shapes.meaning(scene(blue, red, "below"), said)
    assert shapes.meaning(scene(red, blue, "above"), said) != shapes.meaning(scene(blue, red, "above"), said)
    assert shapes.meaning(scene(red, blue, "above"), said - {"relation"}) == shapes.meaning(scene(blue, red, "above"), said - {"relation"})


@pytest.mark.parametrize("split, k, two", [("train", 0, False), ("train", shapes.SINGLES - 1, False), ("train", shapes.SINGLES, True),
                                           ("validation", 0, True)])
def test_a_batch_for_clip_holds_near_misses_and_no_caption_twice(split, k, two):
    images, captions = shapes.ShapeBatches("clip", 32, 0, None, split=split)[k]
    assert images.shape == (32, 3, 64, 64) and images.dtype == torch.uint8 and len(set(captions)) == 32
    assert any(len(parse_caption(caption.replace("thing", "star")).things) == 2 for caption in captions) == two


def test_batches_depend_on_seed_and_number_alone():
    make = lambda seed: shapes.ShapeBatches("decoder", 3, seed, None)
    (a, words_a), (b, words_b) = make(0)[5], make(0)[5]
    assert torch.equal(a, b) and words_a == words_b
    assert words_a != make(1)[5][1] and words_a != make(0)[6][1]


@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_pictures_show_the_same_scene_at_every_size(shape):
    scene = shapes.Scene((shapes.Thing(shape, "blue", "large", "solid", 0.4, 0.6, 0.19, 5),), None, "gray", 0.05)
    at_64 = np.asarray(shapes.render(scene, 64), float)
    assert tuple(at_64[int(0.6 * 64), int(0.4 * 64)]) == shapes.COLOURS["blue"]
    blue = np.abs(at_64 - shapes.COLOURS["blue"]).sum(-1) < 60
    area = {"circle": 3.14, "square": 2, "triangle": 1.3, "star": 1.23, "heart": 1.9, "cross": 1.85}[shape] * (0.19 * 64) ** 2
    assert blue.sum() == pytest.approx(area, rel=0.12)


@pytest.mark.parametrize("word", ["", "HEART"])
def test_a_large_picture_averaged_is_the_small_one(word):
    """Up to rounding and single points of the grid. Otherwise upsamplers would be asked for what cannot be known."""
    for k, scene in enumerate(scenes(40)):
        if word:  # words are written on single things
            scene = replace(scene, things=(replace(scene.things[0], word=word),), relation=None)
        large, middle, small = (shapes.render(scene, side) for side in (1024, 256, 64))
        for one, other in ((large.reduce(4), middle), (middle.reduce(4), small), (large.reduce(16), small)):
            off = np.abs(np.asarray(one, float) - np.asarray(other, float))
            assert off.max() <= 12 and off.mean() < 0.1, k


@pytest.mark.parametrize("side", [64, 256, 1024])
def test_a_circle_has_its_area_and_its_middle_to_a_hundredth_of_a_pixel_of_64(side):
    for x, y, radius in ((0.41, 0.537, 0.19), (0.6632, 0.28, 0.0911)):
        thing = shapes.Thing("circle", "black", "large", "solid", x, y, radius, 3)
        cover = (250 - np.asarray(shapes.render(shapes.Scene((thing,), None, "white", 0.0), side), float)[..., 0]) / 225
        area, place = cover.sum() / side ** 2, (np.arange(side) + 0.5) / side
        assert area ** 0.5 == pytest.approx((45 * np.sin(np.deg2rad(4)) * radius ** 2) ** 0.5, abs=0.01 / 64 * 2)  # 90 corners
        assert cover.sum(0) @ place / cover.sum() == pytest.approx(x, abs=0.01 / 64)
        assert cover.sum(1) @ place / cover.sum() == pytest.approx(y, abs=0.01 / 64)


def test_stripes_are_the_colour_and_the_colour_with_35_percent_white():
    thing = shapes.Thing("square", "black", "large", "striped", 0.5, 0.5, 0.2, 0)
    picture = np.asarray(shapes.render(shapes.Scene((thing,), None, "white", 0.0), 1024))
    column = picture[380:640, 512, 0]
    assert {25, 106} <= set(column.tolist()) or {25, 105} <= set(column.tolist())


def test_crops_of_the_condition_and_the_target_stay_aligned_for_every_crop():
    """A picture of random pixels: only the right place fits. Undamaged, a low crop is the area average of its high crop."""
    config = upsample.UpsamplerConfig(low_size=16, image_size=64)

    class NoBlur:
        def __init__(self, rng):
            self.integers, self.random = rng.integers, lambda: 0.9

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    highs, lows = upsample.training_crops(picture, config, NoBlur(np.random.default_rng(1)), 300)
    assert highs.shape == (300, 3, 16, 16) and lows.shape == (300, 3, 4, 4)
    average = torch.nn.functional.avg_pool2d(highs.float(), 4)
    assert float((average - lows.float()).abs().max()) <= 1
    assert len({low.numpy().tobytes() for low in lows}) > 120  # of 169 places


def test_of_several_crops_the_one_that_varies_most_is_kept():
    """A dot in a corner of a plain picture: one crop in 169 holds it, but nearly every crop that is kept of 1,000."""
    pixels = np.full((64, 64, 3), 200, np.uint8)
    pixels[:4, :4] = 0
    config = upsample.UpsamplerConfig(low_size=16, image_size=64)
    for tries, least, most in ((1, 0, 6), (1000, 195, 200)):
        highs, lows = upsample.training_crops(Image.fromarray(pixels), replace(config, tries=tries), np.random.default_rng(0), 200)
        held = (highs[:, :, 0, 0] == 0).all(1)
        assert least <= held.sum() <= most and torch.equal(held, lows[:, 0, 0, 0] < 150)


def test_gaussian_blur_is_the_normalized_3_by_3_kernel():
    x = torch.zeros(1, 1, 7, 7)
    x[..., 3, 3] = 1
    g = np.exp(-np.array([-1, 0, 1]) ** 2 / (2 * 0.36))
    want = np.outer(g, g) / g.sum() ** 2
    assert np.allclose(upsample.gaussian_blur(x)[0, 0, 2:5, 2:5], want, atol=1e-6)
    assert torch.allclose(upsample.gaussian_blur(torch.ones(1, 3, 5, 5)), torch.ones(1, 3, 5, 5))


def test_bsr_damages_but_keeps_size_and_mean():
    picture = shapes.render(scenes(1)[0], 256)
    rng = np.random.default_rng(0)
    before = np.asarray(picture, float)
    after = [np.asarray(upsample.bsr_degrade(picture, rng), float) for _ in range(20)]
    assert all(a.shape == before.shape and abs(a.mean() - before.mean()) < 3 for a in after)
    assert sum(np.abs(a - before).max() > 5 for a in after) >= 12
    assert len({a.tobytes() for a in after}) >= 15
    again = np.asarray(upsample.bsr_degrade(picture, np.random.default_rng(0)), float)
    assert np.array_equal(after[0], again)
