"""Emoji as a captioned folder (data/emoji.py), from small packages that the tests write; foreign files are read with care.

And what experiments/emoji.py measures, on cases whose answer is known.
"""

import json
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont
from test_chain import run as run_script
from test_chain import tiny, weights  # noqa: F401, fixtures: tiny presets; a folder of tiny random checkpoints

import emoji as measured

from data import charts, emoji
from data import folder as captioned

WORDS = {"😀": ["grinning_face", "face", "smile", "happy"], "👋": ["waving_hand", "hello"], "❤️": ["red_heart"], "🇫🇷": ["flag_france"]}
ROWS = {"1f600": ("GRINNING FACE", "Smileys & Emotion", "face-smiling"), "1f44b": ("WAVING HAND SIGN", "People & Body", "hands"),
        "2764-fe0f": ("HEAVY BLACK HEART", "Smileys & Emotion", "heart"), "1f1eb-1f1f7": ("France Flag", "Flags", "country-flag"),
        "1f46a": ("FAMILY", "People & Body", "family"), "1f3fb": ("EMOJI MODIFIER", "Component", "skin-tone")}


def row(stem, **changes):
    name, category, subcategory = ROWS[stem]
    image = {"image": f"{stem}.png", "has_img_google": True, "has_img_twitter": True}
    more = {"skin_variations": {"1F3FB": image | {"image": "1f44b-1f3fb.png"}}} if stem == "1f44b" else {}
    return image | {"name": name, "category": category, "subcategory": subcategory} | more | changes


@pytest.fixture
def packages(tmp_path):
    """The folder node_modules of small packages; each picture has a colour of its own, in the middle of transparency."""
    modules, shade = tmp_path / "packages/node_modules", iter(range(0, 250, 5))
    for artist, side in zip(emoji.ARTISTS.values(), (64, 64, 256)):
        for stem in (*ROWS, "1f44b-1f3fb"):
            path = modules / artist.package / artist.path.format(stem)
            path.parent.mkdir(parents=True, exist_ok=True)
            picture = Image.new("RGBA", (side, side + side // 32))
            picture.paste((next(shade), 90, 200, 255), (side // 4, side // 4, side // 2, side // 2))
            picture.save(path)
    (modules / "emoji-datasource-google/emoji.json").write_text(json.dumps([*map(row, ROWS)]))
    (modules / "emojilib/dist").mkdir(parents=True)
    (modules / "emojilib/dist/emoji-en-US.json").write_text(json.dumps(WORDS))
    return modules


def run(monkeypatch, folder, *options):
    """What the command writes to `folder`/photos/emoji: {name of a picture: captions}."""
    out = folder / "photos/emoji"
    monkeypatch.setattr(sys, "argv", ["emoji.py", "--from", str(folder / "packages"), "--out", str(out), *map(str, options)])
    emoji.main()
    captions = {}
    for line in (out / "metadata.jsonl").read_text("utf-8").splitlines():
        captions.setdefault(json.loads(line)["file_name"], []).append(json.loads(line)["text"])
    return captions


def refused(monkeypatch, capsys, folder, *options):
    """The one line with which the command ends; it leaves nothing behind."""
    before = {*folder.rglob("*")} | {folder / "photos"}
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, folder, *options)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("emoji.py: ")]
    assert stop.value.code == 2 and len(lines) == 1 and {*folder.rglob("*")} <= before
    return lines[0]


def test_packages_become_a_folder_of_square_pictures_on_white_with_captions(packages, tmp_path, monkeypatch, capsys):
    captions = run(monkeypatch, tmp_path)
    assert captions["1f600@noto.png"] == ["grinning face", "grinning face, noto emoji", "face, smile, happy", "grinning face, face smiling, noto emoji"]
    assert captions["2764-fe0f@fluent.png"] == ["red heart", "red heart, fluent 3d", "heavy black heart", "red heart, heart, fluent 3d"]
    assert Counter(name.partition("@")[0] for name in captions) == {"1f600": 3, "1f44b": 3, "2764-fe0f": 3, "1f46a": 2}  # Fluent's family is not free
    for name in captions:
        picture = Image.open(tmp_path / "photos/emoji" / name)
        side = 264 if "fluent" in name else 66
        assert picture.format == "PNG" and picture.mode == "RGB" and picture.size == (side, side)
        assert picture.getpixel((0, side - 1)) == (255, 255, 255) and picture.getpixel((side // 3, side // 3))[1:] == pytest.approx((90, 200), abs=4)
    licences = (tmp_path / "photos/emoji/LICENCES.txt").read_text("utf-8")
    assert all(artist.licence in licences for artist in emoji.ARTISTS.values()) and licences in capsys.readouterr().out
    data = captioned.gather(tmp_path / "photos/emoji", tmp_path / "runs", 0)
    assert sorted(data.names) == sorted(captions) and not (tmp_path / "runs/skipped.txt").read_text()


def test_flags_and_skin_tones_come_when_asked_for_and_versions_of_an_emoji_share_their_name_up_to_the_at(packages, tmp_path, monkeypatch):
    captions = run(monkeypatch, tmp_path, "--flags", "--skin-tones")
    versions = Counter(name.partition("@")[0] for name in captions)
    assert versions["1f1eb-1f1f7"] == 2 and versions["1f44b"] == 6 and "1f3fb" not in versions
    assert captions["1f44b@twemoji-1f3fb.png"][:2] == ["waving hand, light skin tone", "waving hand, light skin tone, twemoji"]


def test_pictures_that_the_artist_did_not_draw_are_not_read_and_equal_ones_are_written_once(packages, tmp_path, monkeypatch):
    source = packages / "emoji-datasource-google"
    (source / "emoji.json").write_text(json.dumps([row("1f600", has_img_google=False), row("1f44b"), row("2764-fe0f")]))
    (source / "img/google/64/1f600.png").write_bytes(b"of another maker")
    (source / "img/apple/64").mkdir(parents=True)
    (source / "img/apple/64/1f44b.png").write_bytes(b"of another maker")
    heart, hand = (packages / "emoji-datasource-twitter/img/twitter/64" / name for name in ("2764-fe0f.png", "1f44b.png"))
    hand.write_bytes(heart.read_bytes())
    captions = run(monkeypatch, tmp_path)
    assert {"1f600@twemoji.png", "1f44b@noto.png", "2764-fe0f@twemoji.png"} <= {*captions}
    assert not {"1f600@noto.png", "1f44b@twemoji.png"} & {*captions}


def link_out(path):
    path.rename(path.parents[5] / "secret.png")
    path.unlink(missing_ok=True)
    path.symlink_to(path.parents[5] / "secret.png")


HOSTILE = {
    "a link": (lambda picture, rows: link_out(picture), "1f600.png: is a link that leads out of the package"),
    "a bomb": (lambda picture, rows: Image.new("1", (9999, 9999)).save(picture), "not a picture that can be read (Image size (99980001 pixels)"),
    "a strip": (lambda picture, rows: Image.new("1", (9000, 1)).save(picture), "1f600.png: has more than 1024 pixels a side"),
    "many bytes": (lambda picture, rows: picture.write_bytes(bytes(emoji.MOST_PICTURE + 1)), "1f600.png: has more than 1,048,576 bytes"),
    "no picture": (lambda picture, rows: picture.write_bytes(b"%!PS-Adobe-3.0"), "1f600.png: not a picture that can be read (its format is unknown)"),
    "a long list": (lambda picture, rows: rows.write_bytes(bytes(emoji.MOST_JSON + 1)), "emoji.json: has more than 16,777,216 bytes"),
    "a deep list": (lambda picture, rows: rows.write_text("[" * 100_000), "emoji.json or emojilib is not as expected (RecursionError"),
    "no JSON": (lambda picture, rows: rows.write_text("{"), "not as expected (JSONDecodeError"),
    "no rows": (lambda picture, rows: rows.write_text('["x"]'), "not as expected (TypeError"),
    "no name": (lambda picture, rows: rows.write_text('[{"category": "Objects"}]'), "not as expected (KeyError: 'image')"),
    "a path": (lambda picture, rows: rows.write_text(json.dumps([row("1f600", image="../../1f600.png")])), "not as expected (ValueError"),
    "an absolute path": (lambda picture, rows: rows.write_text(json.dumps([row("1f600", image="/1f600.png")])), "not as expected (ValueError"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_package_is_refused_in_one_line_and_leaves_nothing(case, packages, tmp_path, monkeypatch, capsys):
    spoil, message = HOSTILE[case]
    source = packages / "emoji-datasource-google"
    spoil(source / "img/google/64/1f600.png", source / "emoji.json")
    assert message in refused(monkeypatch, capsys, tmp_path)


def test_what_is_missing_is_refused_with_the_command_that_gets_it_and_no_folder_is_overwritten(packages, tmp_path, monkeypatch, capsys):
    (packages / "emojilib").rename(packages / "other")
    line = refused(monkeypatch, capsys, tmp_path)
    assert f"lacks emojilib; to get all packages: npm install --prefix {tmp_path / 'packages'} emoji-datasource-google" in line
    (packages / "other").rename(packages / "emojilib")
    run(monkeypatch, tmp_path)
    assert f"--out {tmp_path / 'photos/emoji'}: is there already" in refused(monkeypatch, capsys, tmp_path)


def test_an_interrupted_run_leaves_nothing(packages, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        drawn = iter([Image.new("RGB", (64, 64)), Image.new("RGB", (65, 65))])
        patch.setattr(emoji, "draw_file", lambda *_: next(drawn, None) or (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(SystemExit) as stop:
            run(monkeypatch, tmp_path)
    assert stop.value.code == 130 and not [*(tmp_path / "photos").iterdir()]


def test_a_font_gives_its_characters_with_their_names_in_unicode(tmp_path, monkeypatch, capsys):
    font = tmp_path / "packages"  # Pillow's own, since Noto's is large
    font.write_bytes(b"no font")
    assert "not the font Noto Color Emoji with bitmaps" in refused(monkeypatch, capsys, tmp_path)
    font.write_bytes(ImageFont.load_default(20).path.getvalue())
    assert "not the font Noto Color Emoji, whose licence is known" in refused(monkeypatch, capsys, tmp_path)
    monkeypatch.setattr(emoji, "FONT", ImageFont.truetype(str(font)).getname()[0])
    monkeypatch.setattr(emoji, "CODES", (0x41, 0x42, 0x1F3FB))
    captions = run(monkeypatch, tmp_path)
    assert captions == {f"{code}@noto.png": [name, f"{name}, noto emoji"] for code, name in
                        (("41", "latin capital letter a"), ("42", "latin capital letter b"))}
    assert np.asarray(Image.open(tmp_path / "photos/emoji/41@noto.png")).std() > 10
    assert "emojilib" not in (tmp_path / "photos/emoji/LICENCES.txt").read_text("utf-8")


# ----------------------------------------------------------------------------- experiments/emoji.py


def test_what_is_found_by_chance_is_what_random_orders_find():
    right = torch.zeros(3, 30, dtype=torch.bool)
    right[0, 4] = right[1, :3] = right[2, 5:25] = True
    orders = torch.rand(20_000, 3, 30, generator=torch.Generator().manual_seed(0))
    for most in (1, 5):
        mean = np.mean([measured.found(cosines, right, most) for cosines in orders])
        assert abs(mean - measured.by_chance(right, most)) < 0.006  # three standard errors are 0.0056
    cosines = torch.zeros(3, 30)
    cosines[0, :4], cosines[0, 4], cosines[1, 2], cosines[2, 0] = 2, 1, 1, 1
    assert measured.found(cosines, right, 1) == pytest.approx(1 / 3) and measured.found(cosines, right, 5) == 1


def test_the_nearest_picture_is_told_with_its_distance_in_shades():
    images, others = torch.zeros(2, 3, 4, 4), torch.zeros(5, 3, 4, 4)
    others += torch.tensor([1.0, 0.5, 0.2, -0.1, 0.75])[:, None, None, None]
    images[1] += 0.6
    distances, places = measured.nearest(images, others)
    assert places.tolist() == [3, 1] and distances.tolist() == pytest.approx([0.1 * 127.5] * 2, rel=1e-4)


def test_a_subset_has_whole_things_and_their_captions(packages, tmp_path, monkeypatch, capsys):
    captions = run(monkeypatch, tmp_path, "--flags", "--skin-tones")
    run_script(measured, monkeypatch, "subset", tmp_path / "photos/emoji", "--n", "4", "--out", tmp_path / "few")
    few, whole = (captioned.gather(folder, tmp_path / "runs", 0) for folder in (tmp_path / "few", tmp_path / "photos/emoji"))
    things = {few.thing(k) for k in range(len(few.names))}
    assert sorted(few.names) == sorted(name for name in captions if name.partition("@")[0] in things)
    assert 4 <= len(few.names) < len(whole.names) and [few.captions[c] for c in range(*few.first[:2])] == captions[few.names[0]]
    with pytest.raises(SystemExit):
        run_script(measured, monkeypatch, "subset", tmp_path / "photos/emoji", "--n", "4", "--out", tmp_path / "few")
    assert "exists already" in capsys.readouterr().err


def test_curves_tell_where_the_held_out_loss_was_lowest(tmp_path, monkeypatch, capsys):
    for name, losses in (("a", (3, 2, 2.5)), ("b", (3, 2, 1))):
        (tmp_path / name).mkdir()
        charts.write_csv([(10 * k + 10, 1 / (k + 1), 5.0, loss) for k, loss in enumerate(losses)], tmp_path / name / "decoder.csv")
    run_script(measured, monkeypatch, "curves", tmp_path / "a", tmp_path / "b", "--picture", tmp_path / "c.png")
    rows = [line.split(" | ")[-3:] for line in capsys.readouterr().out.splitlines()[2:4]]
    assert rows == [["2.5000", "2.0000", "20 |"], ["1.0000", "1.0000", "30 |"]]
    assert len(Image.open(tmp_path / "c.png").getcolors(1 << 20)) > 4


def test_measure_prints_three_tables_and_draws_two_sheets(packages, weights, tmp_path, monkeypatch, capsys):  # noqa: F811
    run(monkeypatch, tmp_path)
    capsys.readouterr()
    run_script(measured, monkeypatch, "measure", tmp_path / "photos/emoji", "--weights", weights, "--n", "2", "--pairs", tmp_path / "p.png",
                          "--sheet", tmp_path / "s.png")
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("|---") for line in lines) == 3 and "| pictures held out |" in "\n".join(lines)
    assert lines[0].startswith("| held out: 3 pictures of 1 things") and lines[2].startswith("| for a caption, its thing | 100% (100%)") and lines[4].endswith("| 100% (100%) |")
    assert all(Image.open(tmp_path / name).width > 900 for name in ("p.png", "s.png"))
