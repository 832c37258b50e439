"""The experiments on the paper's claims: their statistics against closed forms, their measures on pictures whose answer is known,
and each script from its command line to its files on a tiny untrained stack."""

import json
import math
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_chain import run, tiny, weights  # noqa: F401, fixtures: tiny presets and recipes; a folder of tiny random checkpoints

import binding
import candidates
import common
import components
import composition
import figure8
import guidance
import guided_prior
import priors
import sample
import table2
import train
import train_words
import typographic
from caption_accuracy import parse_caption, score
from clip_embed import UserError
from common import attributes, conclude, jackknife, observe, to_images, true_scenes
from data import shapes
from sweep import captions_of
from weights import checkpoints

OPEN = ["a circle and a star", "a heart", "a large cross", "a red square on pink"]


# ----------------------------------------------------------------------------- statistics

def test_pseudo_values_of_a_mean_are_the_seeds_means_and_their_error_is_monte_carlos():
    rng = np.random.default_rng(0)
    groups = rng.exponential(size=(5, 40)).tolist()
    assert np.allclose(jackknife(np.mean, groups), np.mean(groups, 1))
    ratio = lambda pairs: np.mean([a for a, _ in pairs]) / np.mean([b for _, b in pairs])  # not linear
    draws, errors = [], []
    for _ in range(400):
        sample_ = rng.exponential(size=(5, 40, 2)) + 0.5
        values = jackknife(ratio, sample_.tolist())
        draws.append(np.mean(values)), errors.append(np.var(values, ddof=1) / 5)
    assert np.mean(errors) ** 0.5 == pytest.approx(np.std(draws), rel=0.15)
    assert np.mean(draws) == pytest.approx(1, abs=3 * np.std(draws) / 20)


def test_the_jackknife_takes_most_of_the_bias_from_a_frechet_distance_known_in_closed_form():
    d, true = 8, torch.randn(20_000, 8).double()
    shift, stretch = 0.5, 1.5  # between N(0, 1) and N(0.5, 1.5²) in each coordinate: 0.5² + (1.5 − 1)²
    want, plain, mended = d * (shift ** 2 + (stretch - 1) ** 2), [], []
    distance = lambda rows: priors.frechet(torch.stack(rows), true)
    for _ in range(20):
        groups = [list(shift + stretch * torch.randn(16, d).double()) for _ in range(5)]
        plain.append(distance(sum(groups, []))), mended.append(np.mean(jackknife(distance, groups)))
    assert abs(np.mean(mended) - want) < 0.5 * abs(np.mean(plain) - want)
    assert np.mean(mended) == pytest.approx(want, abs=3 * np.std(mended) / 20 ** 0.5 + 0.02)


@pytest.mark.parametrize("freedom, quantile", [(1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (30, 2.042), (120, 1.980)])
def test_students_t_is_that_of_the_printed_tables(freedom, quantile):
    assert common.t_quantile(freedom) == pytest.approx(quantile, abs=2e-3)


def test_a_conclusion_is_drawn_both_ways_and_by_chance_in_a_twentieth_of_the_cases():
    a = [0.5, 0.6, 0.55, 0.52, 0.58]
    b = np.subtract(a, [0.1, 0.1001, 0.0999, 0.1, 0.1])
    assert "what: higher (+0.100 ± 0.000" in conclude("what", a, b, "higher", "lower")
    assert "what: lower (-0.100 ± 0.000" in conclude("what", b, a, "higher", "lower")
    assert "no difference shown (-0.000 ± 0.0" in conclude("what", a, np.mean(a) + 1e-9)
    assert all("same difference in every seed" in conclude("what", *same) for same in ((a, a), ([1, 1, 1], 0.5)))
    assert "cannot be told" in conclude("what", [math.nan, 1], 0)
    rng = np.random.default_rng(1)
    wrong = np.mean(["no difference" not in conclude("", rng.normal(size=5), 0) for _ in range(400)])
    assert 0.025 < wrong < 0.08


# ----------------------------------------------------------------------------- measures

def test_true_renderings_are_observed_right_and_drawings_of_other_captions_wrong():
    images = to_images(true_scenes(OPEN * 3, 7))
    seen = observe(images, OPEN * 3)
    groups = lambda some: [some[:6], some[6:]]
    assert common.right("all")(groups(seen)) == [1, 1] and np.isnan(common.right("relation")(groups(seen))).all()
    wrong = observe(images, np.roll(OPEN * 3, 1).tolist())
    assert common.right("all")(groups(wrong)) == [0, 0]
    for image, caption, one in zip(images, OPEN, wrong[1:]):
        assert score(sample.to_picture(image), caption) == seen[OPEN.index(caption)]["right"]


def test_true_pictures_are_at_distance_0_from_the_world_and_damaged_ones_further():
    """Each seed with captions of its own, as the scripts have them: a seed left out must leave the renderings too."""
    captions = [captions_of(32, seed) for seed in range(5)]
    distances = common.fidelity(captions)
    groups = [observe(to_images(true_scenes(some, 30 + k)), some) for k, some in enumerate(captions)]
    for name, change in (("distance, attributes", lambda o: o | {"found": replace(o["found"], background="white")}),
                         ("distance, features", lambda o: o | {"image": F.avg_pool2d(o["image"], 3, 1, 1)})):
        true, hurt = (distances[name]([list(map(f, g)) for g in groups]) for f in (dict, change))
        error = np.std(true, ddof=1) / 5 ** 0.5
        assert abs(np.mean(true)) < 4 * error + 0.02 and np.mean(hurt) > np.mean(true) + 4 * error


def test_true_pairs_are_as_diverse_as_the_world_copies_are_not_and_half_copies_are_by_half():
    share = common.diversity(OPEN)
    scenes = [true_scenes(OPEN * 200, seed) for seed in (11, 12)]
    pair = lambda caption, *two: [{"asked": parse_caption(caption), "found": scene} for scene in two]
    true = [pair(c, a, b) for c, a, b in zip(OPEN * 200, *scenes)]
    copies = [[a, a] for a, _ in true]
    assert share(true) == pytest.approx(1, abs=0.05) and share(copies) == 0
    assert share(true[:400] + copies[400:]) == pytest.approx(0.5, abs=0.05)
    assert math.isnan(share([pair("a red heart on white", *[replace(s, things=()) for s in scenes[0][:2]])]))


def test_what_a_caption_says_is_not_counted_as_diversity():
    said = {"a heart": {"colour", "size", "fill", "background", "place", "radius", "tilt"},
            "a large red circle on pink": {"fill", "place", "radius"},
            "a small solid red heart left of a large striped blue star on pink": {"place", "radius", "tilt"},
            "a small solid red heart and a large striped blue star on pink": {"relation", "place", "radius", "tilt"}}
    for caption, open_ in said.items():
        pairs = [[{"asked": parse_caption(caption), "found": s} for s in true_scenes([caption] * 2, seed)] for seed in range(30)]
        assert {name.split(",")[0] for name in common.variety(pairs)} == open_


def test_variety_of_true_pairs_is_that_of_the_worlds_uniform_numbers():
    seen = [{"asked": parse_caption("a square"), "found": scene} for scene in true_scenes(["a square"] * 3000, 50)]
    found = {name: np.mean(values) for name, values in common.variety(list(zip(seen[::2], seen[1::2]))).items()}
    width = {"small": 0.02, "large": 0.03}  # of the radii in each size; tilts are within 12 degrees
    want = {"colour, 1": 6 / 7, "size, 1": 1 / 2, "fill, 1": 1 / 2, "background, 1": 3 / 4, "tilt, 1": 24 ** 2 / 12,
            "radius, 1": np.mean([w ** 2 / 12 for w in width.values()])}
    assert all(found[name] == pytest.approx(value, rel=0.15) for name, value in want.items())


def test_attributes_tell_apart_whatever_a_caption_can_say():
    scenes = true_scenes(["a red circle", "a blue circle", "a red star", "a red circle on pink", "a small striped red circle",
                          "a red circle and a red circle"], 0)
    vectors = torch.stack([attributes(scene) for scene in scenes])
    assert vectors.shape == (6, 26) and torch.cdist(vectors, vectors)[~torch.eye(6, dtype=bool)].min() > 0.5


# ----------------------------------------------------------------------------- each script's own

def test_swapped_pairs_are_told_from_right_ones_and_from_neither():
    pairs = binding.pairs_of(6, 0)
    assert pairs[0][0][0] == pairs[1][1][0] and [s for _, s in pairs[0]] == [s for _, s in pairs[1]]
    assert not shapes.HELD_OUT & {pair for both in pairs for pair in both}
    captions = [f"{common.phrase(*one)} and {common.phrase(*other)}" for one, other in pairs]
    images = to_images(true_scenes(captions, 0))
    order = [1, 0, 3, 2, 5, 4]
    assert binding.verdicts(images, pairs) == [1] * 6 and binding.verdicts(images[order], pairs) == [0] * 6
    assert np.isnan(binding.verdicts(images.roll(2, 0), pairs)).all()  # other things
    neither = binding.verdicts(torch.ones(6, 3, 64, 64), pairs)
    assert np.isnan(neither).all() and binding.decided([1, 0, 1, 1, *neither]) == 0.75 and math.isnan(binding.decided(neither))
    z, others = F.normalize(torch.randn(6, 8), dim=1), torch.randn(6, 3, 8)
    own = torch.cat([z[:, None], others], 1)  # z itself is the nearest of its own
    assert (binding.preference(z, own) > 0).all() and (binding.preference(z[order], own) < 0).all()


def test_references_of_a_swapped_caption_are_the_same_scenes_with_their_colours_exchanged(monkeypatch):
    monkeypatch.setattr(binding, "embed", lambda stack, scenes: to_images(scenes).flatten(1))
    pairs = binding.pairs_of(4, 1)
    captions = [f"{common.phrase(*one)} and {common.phrase(*other)}" for one, other in pairs]
    images = binding.references(None, captions, 3).unflatten(2, (3, 64, 64))
    assert images.shape[:2] == (4, binding.REFERENCES)
    for k in range(4):
        assert all(score(sample.to_picture(image), captions[k])["bound"] for image in images[k, :3])
    differ = (images[0] - images[1]).abs().amax(1) > 0.05  # only where the things are
    assert (differ.flatten(1).double().mean(1) < 0.4).all()


def test_pairs_never_trained_stand_beside_all_trained_ones_of_the_same_colours_and_shapes():
    assert not shapes.HELD_OUT & set(composition.TRAINED) and len(set(composition.TRAINED)) == 12
    for k in range(2):
        assert sorted(p[k] for p in composition.TRAINED) == sorted(3 * [p[k] for p in composition.NEW])


def test_articles_are_those_of_the_captions_that_training_hears():
    assert common.phrase("orange", "star") == "an orange star" and common.phrase("red", "circle") == "a red circle"


def test_earliness_is_1_for_what_the_first_component_brings_and_less_for_what_comes_last(monkeypatch):
    first = [[{"a": 0, "b": 0, "c": k % 2}] + [{"a": 1, "b": n == 3, "c": k % 2 or k == 0} for n in range(4)] for k in range(40)]
    assert components.earliness("a")(first) == 1 and components.earliness("b")(first) == 0.25
    assert math.isnan(components.earliness("c")(first))  # right by chance alone
    early = {"a": {"how early": [1, 0.9, 1.1]}, "b": {"how early": [0.2, 0.3, 0.1]}, "c": {"how early": [math.nan] * 3}}
    monkeypatch.setattr(components, "QUESTIONS", (("a", "b"), ("a", "c")))
    said = components.conclusions(early)
    assert said[0].endswith(": c.") and said[1].endswith(": a, b.") and said[2].startswith("a before b: earlier (+0.8") and len(said) == 3


def test_shapes_are_read_under_the_words_and_words_are_other_shapes():
    plain, worded = typographic.scenes_of(48, 3)
    for scenes in (plain, worded):
        assert [typographic.read_shape(image) for image in to_images(scenes)] == [s.things[0].shape for s in plain]
    assert all(s.things[0].word not in ("", s.things[0].shape) for s in worded) and not any(s.things[0].word for s in plain)
    assert (to_images(plain) - to_images(worded)).abs().flatten(1).amax(1).min() > 0.5
    assert typographic.read_shape(torch.ones(3, 64, 64)) is None


def test_who_reads_is_told_from_who_names_the_thing_or_another_word(monkeypatch):
    _, scenes = typographic.scenes_of(5, 3)
    captions = [f"a {a} that says {b}" for a in shapes.SHAPES for b in shapes.SHAPES]
    monkeypatch.setattr(typographic, "z_t", lambda stack, some: torch.eye(len(captions))[[captions.index(c) for c in some]])
    says = lambda word_of: torch.eye(len(captions))[[captions.index(f"a {s.things[0].shape} that says {word_of(s.things[0])}") for s in scenes]]
    other = lambda thing: next(word for word in shapes.SHAPES if word not in (thing.word, thing.shape))
    assert all(typographic.reads(None, says(lambda thing: thing.word), scenes)) and not any(typographic.reads(None, says(other), scenes))


def test_skew_is_chance_for_the_worlds_own_draws_and_what_is_missing_for_others():
    rng = np.random.default_rng(0)
    scenes = [shapes.random_scene(rng, 1) for _ in range(6000)]
    world = [(s.things[0].shape, candidates.shown(s)) for s in scenes]
    assert candidates.skew(world) < 0.025
    solid = [(shape, found | {"fill": "solid"}) for shape, found in world]  # half of the fills would have to change
    assert candidates.skew(solid) == pytest.approx(0.5 / 4, abs=0.025)
    one = [(shape, {"colour": "red", "size": "large", "fill": "solid", "background": "pink"}) for shape in shapes.SHAPES]
    colours = [1 - 1 / (7 - any(s == shape for _, s in shapes.HELD_OUT)) for shape in shapes.SHAPES]
    assert candidates.skew(one) == pytest.approx((np.mean(colours) + 1 / 2 + 1 / 2 + 3 / 4) / 4)


def test_equal_training_compute_is_said_where_it_is_and_else_what_would_make_it_so():
    assert "1.03 times as much, so what follows is at nearly equal" in table2.balance({"prior": (100, 3e9), "ar-prior": (310, 1e9)})
    assert "prior trained for 100 steps; what follows is not" in table2.balance({"prior": (300, 3e9), "ar-prior": (300, 1e9)})


# ----------------------------------------------------------------------------- from the command line to the files

@pytest.fixture
def few(monkeypatch):
    """Few renderings for what needs many."""
    for function in (common.fidelity, common.diversity):
        monkeypatch.setattr(function, "__defaults__", (*function.__defaults__[:-1], 20))
    for script in (components, candidates):
        monkeypatch.setattr(script, "FITTED", 64)
    monkeypatch.setattr(binding, "REFERENCES", 2)


LONG = [pytest.param(*case, marks=pytest.mark.slow)
        for case in ((figure8, "caption"), (guided_prior, None), (typographic, None), (components, None), (composition, None))]


@pytest.mark.parametrize("script, given", [(guidance, "caption"), (candidates, None), (figure8, "z_t"), (table2, None), (binding, None), *LONG])
def test_every_script_writes_its_table_numbers_and_picture(script, given, weights, few, tmp_path, monkeypatch, capsys):  # noqa: F811
    torch.save(torch.load(weights / "decoder.pt", weights_only=True) | {"given": given}, tmp_path / "given.pt")
    if script is table2:  # which counts the operations of a training step
        weights = shutil.copytree(weights, tmp_path / "weights")
        for stage, loss in (("prior", {"draws": 2}), ("ar-prior", {})):
            record = {"step": 100, "recipe": {"batch_size": 3, "loss": loss}}
            torch.save(torch.load(weights / f"{stage}.pt", weights_only=True) | {"trained": record}, weights / f"{stage}.pt")
    files = ["--weights", str(weights), "--json", str(tmp_path / "new/a.json"), "--picture", str(tmp_path / "a.png")]
    monkeypatch.setattr(sys, "argv", [script.__name__, "--n", "2", "--seeds", "2", "--steps", "2", "--device", "cpu", *files,
                                      *(["--guidance", "1", "2"] if script is guidance else []),
                                      *(["--precision", "bfloat16"] if script is table2 else []),
                                      *([{"caption": "--glide", "z_t": "--z-t"}[given], str(tmp_path / "given.pt")] if given else [])])
    script.main()
    out, kept = capsys.readouterr().out, json.loads((tmp_path / "new/a.json").read_text("utf-8"))
    rows = [line for line in out.splitlines() if line.startswith("| ")]
    assert len(rows) >= 4 and len({line.count("|") for line in rows}) <= 2 and all(said in out for said in kept["conclusions"])
    assert kept["settings"]["n"] == 2 and kept["conclusions"] and kept["rows"]
    assert min(Image.open(tmp_path / "a.png").size) > 100


@pytest.mark.parametrize("option", ["--glide", None])
def test_the_model_of_the_caption_alone_is_its_own_decoder_or_unclips_without_z_i(option, weights, tmp_path, monkeypatch):  # noqa: F811
    checkpoint = torch.load(weights / "decoder.pt", weights_only=True) | {"given": "caption"}
    checkpoint["model"] = checkpoint["model"] | {"conv_out.bias": torch.full_like(checkpoint["model"]["conv_out.bias"], 7)}
    torch.save(checkpoint, tmp_path / "given.pt")
    monkeypatch.setattr(sys, "argv", ["guidance", "--weights", str(weights), "--device", "cpu",
                                      *([option, str(tmp_path / "given.pt")] if option else [])])
    seen = []
    monkeypatch.setattr(guidance, "measure", lambda models, args: seen.extend(models.values()) or ({}, {}))
    for name in ("show", "chart", "conclusions", "finish"):
        monkeypatch.setattr(guidance, name, lambda *args, **numbers: None)
    guidance.main()
    (alone, its), (unclip, drawn) = seen
    assert (its, drawn) == ("none", "diffusion") and not (unclip["decoder"].conv_out.bias == 7).any()
    assert bool((alone["decoder"].conv_out.bias == 7).all()) == bool(option)


@pytest.mark.parametrize("script, arguments, message", [
    (guidance, ["--n", "1"], "--n 1: must be between 2"), (figure8, ["--seeds", "1"], "--seeds 1: must be between 2"),
    (binding, ["--steps", "1"], "--steps 1: must be"), (guided_prior, ["--guidance", "-1"], "--guidance -1"),
    (guidance, ["--glide", "nowhere.pt"], "nowhere.pt"), (guidance, ["--glide", "DECODER"], "was not trained with --given caption"),
    (figure8, ["--z-t", "CLIP"], "is a 'clip' checkpoint, expected 'decoder'"),
    (figure8, ["--z-t", "DECODER"], "was not trained with --given z_t")])
def test_wrong_use_is_one_line_and_exit_status_2(script, arguments, message, weights, monkeypatch, capsys):  # noqa: F811
    arguments = [str(weights / f"{a.lower()}.pt") if a.isupper() else a for a in arguments]
    monkeypatch.setattr(sys, "argv", [script.__name__, "--weights", str(weights), "--device", "cpu", *arguments])
    with pytest.raises(SystemExit) as stop:
        script.main()
    err = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and message in err[-1]


# ----------------------------------------------------------------------------- what train.py trains for them

def test_words_are_written_across_a_share_of_large_single_things_and_often_alone_tell_captions_apart(monkeypatch):
    drawn, render = [], shapes.render
    monkeypatch.setattr(shapes, "render", lambda scene, side: drawn.append(scene) or render(scene, side))
    batches = train_words.WordBatches("clip", 16, 0, None, words=0.5)
    captions = [caption for k in range(12) for caption in batches[k][1]]
    worded = [scene for scene in drawn if any(thing.word for thing in scene.things)]
    assert 0.3 < len(worded) / len(drawn) < 0.7
    assert all(len(s.things) == 1 and s.things[0].size == "large" and s.things[0].colour != "black" for s in worded)
    says = [caption for caption in captions if "that says" in caption]
    assert 0.4 < len(says) / len(worded) < 0.9
    for scene, caption in zip(drawn, captions):
        assert "that says" not in caption or f"{scene.things[0].shape} that says {scene.things[0].word}" in caption
    first, later = (shapes.ShapeBatches("clip", 16, 0, None)[k][1] for k in (0, shapes.SINGLES))
    assert not any("that says" in caption for caption in first + later)
    plain = train_words.WordBatches("clip", 16, 0, None, words=0)
    assert plain[shapes.SINGLES][1] == later and plain[0][1] != first  # the CLIP that it begins with knows single things


def train_by(script, monkeypatch, *arguments):
    """Run a script that changes train.py for its run only."""
    with monkeypatch.context() as patch:
        for name in ("prepare", "build", "ShapeBatches"):
            patch.setattr(train, name, getattr(train, name))  # put back afterwards
        run(script, patch, *arguments, "--device", "cpu", "--workers", 0, "--precision", "float32")


def test_the_share_of_words_is_recorded_and_a_training_resumes_with_no_other(tiny, monkeypatch, capsys):  # noqa: F811
    arguments = ["clip", "--out", tiny.out, "--steps", 2, "--batch-size", 4]
    train_by(train_words, monkeypatch, *arguments, "--words", 0.5)
    assert torch.load(tiny.out / "clip.pt", weights_only=True)["words"] == 0.5
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        train_by(train_words, patch, *arguments[:3], "--steps", 3, "--batch-size", 4, "--resume", "--words", 0.25)
    assert "trained with another words: 0.5, not 0.25" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["z_t", "caption"])
def test_a_decoder_given_z_t_or_the_caption_alone_never_sees_the_pictures_z_i(given):
    z_i, dropped = [], []
    text = {"z_t": torch.ones(200, 4), "mask": torch.ones(200, 1)}
    null = {"z_t": torch.zeros(1, 4), "mask": torch.zeros(1, 1)}
    frozen = SimpleNamespace(encode_texts=lambda captions: (text, null), encode_pictures=lambda images: torch.full((200, 4), 9.0))

    class Net(torch.nn.Module):
        config = SimpleNamespace(prediction="eps")

        def forward(self, x_t, t, given_z_i, text):
            z_i.append(given_z_i), dropped.append(text["mask"] == 0)
            return x_t, torch.zeros_like(x_t)

    context = SimpleNamespace(frozen=frozen, given=given, recipe=SimpleNamespace(loss={}))
    batch = torch.zeros(200, 3, 8, 8), [""] * 200
    train.decoder_batch_loss(Net(), batch, context, train.row_generators(0, 0, range(200)))
    z_i, dropped = z_i[0], dropped[0].double().mean()
    assert not (z_i == 9).any() and (0.8 < float((z_i == 1).double().mean()) < 1) == (given == "z_t")
    assert float(dropped) == pytest.approx(0.5 if given == "z_t" else 0.2, abs=0.12)


def test_such_decoders_start_from_the_shipped_kind_record_it_and_do_not_resume_as_another(tiny, tmp_path):  # noqa: F811
    for stage in ("clip", "decoder"):
        train.train(stage, tiny, torch.device("cpu"))
    tiny.init, tiny.out, tiny.clip, tiny.given = tiny.out / "decoder.pt", tmp_path / "glide", tiny.out / "clip.pt", "caption"
    train.train("decoder", tiny, torch.device("cpu"))
    assert torch.load(tiny.out / "decoder.pt", weights_only=True)["given"] == "caption"
    common.load_network(tiny.out / "decoder.pt", "decoder", sample.load_stack(tmp_path / "runs", prior_kind="none"))
    tiny.resume, tiny.given = True, "z_i"
    with pytest.raises(UserError, match="another given: caption, not z_i"):
        train.train("decoder", tiny, torch.device("cpu"))
