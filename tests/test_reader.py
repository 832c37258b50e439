"""The reader of scenes (experiments/caption_accuracy.py): captions, true renderings, and pictures that are wrong."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter
from PIL.PngImagePlugin import PngInfo

import caption_accuracy
from caption_accuracy import parse_caption, read_scene, score, self_test, table
from clip_embed import UserError
from data.shapes import RELATIONS, Scene, Thing, VALUES, attributes_in_caption, describe, random_scene, render

CAPTION = "a red circle to the left of a blue star on a pink background"
CIRCLE = Thing("circle", "red", "large", "solid", 0.25, 0.5, 0.18)
STAR = Thing("star", "blue", "small", "striped", 0.75, 0.55, 0.1)
CROSS = Thing("cross", "green", "small", "solid", 0.5, 0.15, 0.1)
SCENE = Scene((CIRCLE, STAR), "left of", "pink", 0.03)


def shares(scores):
    """How often each attribute is right, of (caption, score, picture)."""
    return {a: np.mean([s[a] for _, s, _ in scores if a in s]) for a in caption_accuracy.ATTRIBUTES}


def test_a_caption_is_parsed_into_exactly_what_it_says():
    for k in range(500):
        rng = np.random.default_rng([3, k])
        scene = random_scene(rng)
        said = attributes_in_caption(scene, rng)
        things = tuple(Thing(**{a: getattr(t, a) if a == "shape" or (i, a) in said else None for a in VALUES})
                       for i, t in enumerate(scene.things))
        relation = scene.relation if "relation" in said else None
        right = Scene(things, relation, scene.background if "background" in said else None, 0.0)
        other = replace(right, things=things[::-1], relation=RELATIONS.get(relation))  # describe may begin with either
        assert parse_caption(describe(scene, said, rng)) in (right, other)


@pytest.mark.parametrize("caption, things, relation, background", [
    ("A red circle, and a blue star!", [("circle", "red"), ("star", "blue")], None, None),
    ("a photo of the big striped Heart under a star against grey", [("heart", None), ("star", None)], "below", "gray"),
    ("a star that is blue and a circle", [("star", None), ("circle", None)], None, None),
    ("a cross on the right of a pink heart", [("cross", None), ("heart", None)], "right of", None),
    ("a cross over a square on a pink heart", [("cross", None), ("square", None), ("heart", None)], None, None)])
def test_plain_wordings_are_understood_and_unknown_words_passed_over(caption, things, relation, background):
    scene = parse_caption(caption)
    assert [(t.shape, t.colour) for t in scene.things] == things
    assert (scene.relation, scene.background) == (relation, background)


def test_a_caption_without_a_shape_is_an_error():
    with pytest.raises(UserError, match="names none of the shapes"):
        parse_caption("a corgi playing a trumpet")


@pytest.mark.parametrize("size, n", [(64, 200), (256, 20), (1024, 4)])
def test_true_renderings_are_read_right(size, n):
    assert min(shares(self_test(n, seed=1, size=size)).values()) >= 0.99


def test_noise_and_blur_cost_little():
    rng = np.random.default_rng(0)
    blur = ImageFilter.Kernel((3, 3), (1, 2, 1, 2, 4, 2, 1, 2, 1))
    noisy = lambda picture: (np.asarray(picture) + rng.normal(0, 6, (64, 64, 3))).round().clip(0, 255).astype(np.uint8)
    for change in (noisy, lambda picture: picture.filter(blur), lambda picture: noisy(picture.filter(blur))):
        assert min(shares(self_test(40, seed=2, change=change)).values()) >= 0.97


def test_a_scene_that_was_read_can_be_drawn_again():
    read = read_scene(render(SCENE, 64))
    for found, true in zip(read.things, SCENE.things, strict=True):
        assert all(getattr(found, a) == getattr(true, a) for a in VALUES)
        assert np.allclose((found.x, found.y, found.radius), (true.x, true.y, true.radius), atol=0.01)
        assert abs(found.tilt) < 4 or found.shape == "circle"
    assert (read.relation, read.background) == ("left of", "pink") and abs(read.shade - 0.03) < 0.01


def test_the_true_picture_scores_right_and_only_what_is_said_counts():
    result = score(render(SCENE, 64), CAPTION)
    assert result == dict.fromkeys(("count", "shape", "colour", "relation", "background", "bound", "all"), True)


@pytest.mark.parametrize("things, background, wrong", [
    ((replace(CIRCLE, colour="blue"), replace(STAR, colour="red")), "pink", {"colour", "bound"}),
    ((replace(CIRCLE, shape="star"), replace(STAR, shape="circle")), "pink", {"shape", "bound"}),
    ((replace(CIRCLE, x=0.75), replace(STAR, x=0.25)), "pink", {"relation"}),
    ((replace(CIRCLE, x=0.5, y=0.25), replace(STAR, x=0.5, y=0.75)), "pink", {"relation"}),
    ((CIRCLE,), "pink", {"count", "shape", "colour", "relation", "bound"}),
    ((CIRCLE, STAR, CROSS), "pink", {"count"}),
    ((), "pink", {"count", "shape", "colour", "relation", "bound"}),
    ((CIRCLE, STAR), "mint", {"background"})])
def test_a_wrong_picture_scores_wrong_in_what_is_wrong(things, background, wrong):
    picture = render(replace(SCENE, things=things, background=background), 64)
    assert {a for a, right in score(picture, CAPTION).items() if not right} == wrong | {"all"}


def test_size_and_fill_count_where_they_are_said():
    result = score(render(SCENE, 64), "a small circle and a solid star")
    assert {a for a, right in result.items() if not right} == {"size", "fill", "all"}


def test_two_things_of_the_same_description_may_stand_in_either_order():
    scene = replace(SCENE, things=(replace(CIRCLE, shape="heart"), replace(STAR, shape="heart")))
    assert score(render(scene, 64), "a heart right of a heart")["all"]


def test_specks_are_passed_over_and_a_thing_like_no_shape_has_none():
    picture = render(SCENE, 64)
    ImageDraw.Draw(picture).rectangle((30, 5, 32, 7), "black")
    assert score(picture, CAPTION)["all"]
    picture = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(picture).line((10, 10, 10, 50, 50, 50), "red", 6)
    assert [t.shape for t in read_scene(picture).things] == [None]


def test_no_picture_makes_the_reader_fail():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    checkers = np.uint8(np.indices((64, 64, 3))[:2].sum(0) % 2 * 255)
    for picture in (noise, checkers, np.zeros_like(noise), np.kron(noise[:8, :8], np.ones((8, 8, 1), np.uint8))):
        assert not score(picture, CAPTION)["all"]
    for picture in (noise[:60, :60], noise[:, :, 0], noise[:, :, [0]], noise / 255.0):
        with pytest.raises(UserError, match="must be uint8"):
            read_scene(picture)


def test_the_table_gives_right_of_said_for_each_number_of_things():
    scores = [("a red star", {"count": True, "colour": False}, None), ("a star and a star", {"count": True}, None)]
    lines = table(scores).splitlines()
    assert lines[0] == "| | one thing | two things | all |"
    assert "| count | 1 / 1 (100.0%) | 1 / 1 (100.0%) | 2 / 2 (100.0%) |" in lines
    assert "| colour | 0 / 1 (0.0%) | – | 0 / 1 (0.0%) |" in lines
    half = table(scores, {a: {"all": [1, 2]} for a in caption_accuracy.ATTRIBUTES}).splitlines()  # a reader right half the time
    assert any(line.startswith("| count |") and line.endswith("| 2.000 |") for line in half)


def test_a_scene_made_from_a_caption_shows_what_it_says_and_varies_in_the_rest():
    scenes = [caption_accuracy.scene_of(parse_caption("a striped star above a small red circle on mint"), np.random.default_rng(k)) for k in range(60)]
    assert all(score(render(s, 64), "a striped star above a small red circle on mint")["all"] for s in scenes)
    assert len({s.things[0].colour for s in scenes}) == 6 and {s.things[1].fill for s in scenes} == {"solid", "striped"}  # no purple star in training


@pytest.mark.parametrize("places, correlation", [(((0.3, 0.4), (0.7, 0.6)), 1), (((0.3, 0.6), (0.3, 0.4), (0.7, 0.6), (0.7, 0.4)), 0)])
def test_spread_is_the_deviation_of_place_and_radius_and_whether_x_and_y_vary_together(places, correlation):
    scenes = [Scene((Thing("circle", "red", "large", "solid", x, y, 0.18),), None, "white", 0.0) for x, y in places]
    found = caption_accuracy.spread([render(s, 64) for s in scenes])
    assert abs(found["x"] - 0.2) < 0.01 and abs(found["y"] - 0.1) < 0.01 and found["radius"] < 0.01
    assert abs(found["correlation of x and y"] - correlation) < 0.05


def test_the_contact_sheet_holds_the_failures_alone():
    good, bad = render(SCENE, 64), render(Scene((CIRCLE,), None, "pink", 0.0), 64)
    scores = [(CAPTION, score(p, CAPTION), p) for p in (good, bad, good)]
    sheet = caption_accuracy.contact_sheet(scores, columns=2)
    assert sheet.height == caption_accuracy.contact_sheet(scores[1:2], columns=2).height  # one row: one failure
    shown = np.asarray(sheet)[18:18 + 128, 4:132]
    assert (shown == np.asarray(bad.resize((128, 128), 0))).all()


def test_files_carry_their_captions(tmp_path, monkeypatch, capsys):
    chunks = PngInfo()
    chunks.add_itxt("caption", CAPTION)
    render(SCENE, 64).save(tmp_path / "good.png", pnginfo=chunks)
    render(SCENE, 64).save(tmp_path / "mute.png")
    (tmp_path / "text.png").write_text("no picture")

    def run(name, *options):
        monkeypatch.setattr("sys.argv", ["caption_accuracy.py", "--self-test", "0", str(tmp_path / name), *options])
        caption_accuracy.main()

    run("good.png")
    assert "| all | – | 1 / 1 (100.0%) | 1 / 1 (100.0%) |" in capsys.readouterr().out
    run("good.png", "--json", str(tmp_path / "scores.json"), "--sheet", str(tmp_path / "sheet.png"))
    assert json.loads((tmp_path / "scores.json").read_text())["rates"]["all"]["two things"] == [1, 1]
    for name, message in (("mute.png", "no text chunk"), ("text.png", "cannot identify"), ("none.png", "No such file")):
        with pytest.raises(SystemExit) as stop:
            run(name)
        assert stop.value.code == 2 and message in capsys.readouterr().err
