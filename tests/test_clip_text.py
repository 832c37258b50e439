"""Byte-level BPE, cleaning, masks, pictures' way in, and what a damaged checkpoint says."""

import numpy as np
import pytest
import torch
from PIL import Image

import clip_embed
from clip_embed import Tokenizer, UserError
from weights import checkpoints

CORPUS = ["a large red circle", "a small red star above a large blue star", "there is a striped heart", "don't"] * 3


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(clip_embed.learn_bpe(CORPUS))


@pytest.mark.parametrize("text", ["a large red circle", "ünïcode 北京 ☃", "don't stop, it's 42!", "zebra quagga", "🎈🎈", "a_b"])
def test_bpe_round_trip_of_any_text(tokenizer, text):
    decoded = tokenizer.decode(tokenizer.encode(text))
    assert decoded.replace(" ", "") == text.replace(" ", "")


def test_words_of_the_corpus_become_one_token_and_no_text_is_outside_the_vocabulary(tokenizer):
    assert len(tokenizer.encode("a large red circle")) == 4
    assert all(0 <= i < tokenizer.start for i in tokenizer.encode("".join(chr(c) for c in range(1, 3000))))


def test_merges_apply_in_the_order_they_were_learned():
    tokenizer = Tokenizer([("b", "c</w>"), ("a", "b")])  # "abc": b c</w> was learned first, so a stays alone
    assert [tokenizer.tokens[i] for i in tokenizer.encode("abc")] == ["a", "bc</w>"]


def test_learning_bpe_joins_the_commonest_pair_first():
    assert clip_embed.learn_bpe(["ab ab ab cd"], 1) == [("a", "b</w>")]


def test_cleaning_and_splitting_are_clips():
    assert clip_embed.clean("  A&amp;amp;B\n\t RED ") == "a&b red"
    assert clip_embed.split_words("it's 42, we'll 'stop' !?") == ["it", "'s", "4", "2", ",", "we", "'ll", "'s", "top", "'", "!?"]


def test_start_tokens_end_padding_and_mask(tokenizer):
    ids = tokenizer(["a red star", ""])
    assert ids.shape == (2, 77) and ids[0, 0] == tokenizer.start and ids[0, 4] == tokenizer.end
    assert tokenizer.mask(ids).sum(1).tolist() == [5, 2]
    ids[ids == 0] = tokenizer.end
    assert tokenizer.mask(ids).sum(1).tolist() == [5, 2]


def test_captions_over_75_tokens_are_cut_and_said_once_with_their_number(tokenizer, capsys):
    ids = tokenizer(["a " * 100, "a red star", "a " * 76, "a " * 75])
    assert (ids[[0, 2, 3], -1] == tokenizer.end).all() and ids[0, :-1].tolist() == [tokenizer.start, *tokenizer.encode("a " * 75)]
    tokenizer(["a " * 100])
    assert capsys.readouterr().err == "2 of 4 captions have more than 75 tokens and are cut (said once)\n"


def test_a_caption_too_long_for_a_file_name_is_a_caption(tmp_path, monkeypatch, capsys):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "p.png")
    caption = "a large red circle on white " * 20
    monkeypatch.setattr("sys.argv", ["clip_embed.py", str(tmp_path / "p.png"), caption, "--device", "cpu"])
    clip_embed.main()
    assert caption in capsys.readouterr().out


def test_both_ways_in_for_pictures_agree():
    picture = Image.effect_mandelbrot((64, 64), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    tensor = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1
    assert torch.allclose(clip_embed.preprocess(clip_embed.to_square(picture, 64), 64), clip_embed.preprocess(tensor, 64), atol=1e-5)
    assert (clip_embed.preprocess(clip_embed.to_square(picture, 32), 32) - clip_embed.preprocess(tensor, 32)).abs().mean() < 0.02
    grey = clip_embed.preprocess(clip_embed.to_square(Image.new("RGB", (100, 30), (128, 128, 128)), 8), 8)[0]
    assert torch.allclose(grey[0], torch.tensor((128 / 255 - 0.48145466) / 0.26862954), atol=1e-6)


def test_pictures_of_every_mode_open_as_upright_rgb(tmp_path):
    for mode in ("L", "P", "RGBA", "CMYK", "1", "LA", "I;16"):
        path = tmp_path / f"{mode.replace(';', '')}.{'tif' if mode == 'CMYK' else 'png'}"
        Image.new(mode, (6, 4)).save(path)
        assert (clip_embed.open_picture(path).mode, clip_embed.open_picture(path).size) == ("RGB", (6, 4))
    assert clip_embed.open_picture(tmp_path / "RGBA.png").getpixel((0, 0)) == (255, 255, 255)  # transparent: white
    turned = Image.new("RGB", (6, 4))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert clip_embed.open_picture(tmp_path / "turned.jpg").size == (4, 6)


def test_what_is_no_picture_is_refused_by_name(tmp_path, monkeypatch):
    (tmp_path / "text.png").write_text("no picture")
    whole = tmp_path / "whole.png"
    Image.effect_noise((64, 64), 50).save(whole)
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:500])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # 64 × 64 is a bomb now
    for name in ("text.png", "cut.png", "whole.png", "missing.png"):
        with pytest.raises(UserError, match=name):
            clip_embed.open_picture(tmp_path / name)


def checkpoint(**changes):
    torch.manual_seed(0)
    config = clip_embed.CLIPConfig(embed_dim=8, image_size=16, vision_patch_size=8, vision_width=16, vision_layers=1, vision_heads=1,
                                   vocab_size=514, text_width=16, text_layers=1, text_heads=1)
    clip = clip_embed.CLIP(config)
    return {"stage": "clip", "config": vars(config) | changes.pop("config", {}), "model": clip.state_dict() | changes.pop("model", {}), "merges": []} | changes


@pytest.mark.parametrize("change, message", [
    ({"stage": "prior"}, "is a 'prior' checkpoint, expected 'clip'"),
    ({"model": {"extra": torch.zeros(1)}}, "tensor extra is surplus"),
    ({"model": {"logit_scale": torch.zeros(3)}}, r"logit_scale has shape \(3,\), expected \(\)"),
    ({"model": {"ln_final.bias": torch.full((16,), float("nan"))}}, "ln_final.bias holds values that are not finite"),
    ({"config": {"text_width": 1 << 40}}, "number outside"),
    ({"config": {"text_width": -1}}, "number outside"),
    ({"config": {"text_layers": 1 << 19}}, "text_layers = 524288, a number outside"),
    ({"config": {"text_width": "wide"}}, "expected a value like 128"),
    ({"config": {"text_heads": 0}}, "no network can be built|tensor"),
    ({"config": {"hidden_act": "relu"}}, "no network can be built"),
    ({"config": {"wings": 2}}, "its config has the fields"),
    ({"merges": ["a b"]}, "its merges make 515 tokens, its config says 514"),
])
def test_a_wrong_checkpoint_is_named_with_what_was_expected(tmp_path, change, message):
    torch.save(checkpoint(**change), tmp_path / "clip.pt")
    with pytest.raises(UserError, match=message):
        clip_embed.load_clip(tmp_path / "clip.pt")


def test_a_checkpoint_older_than_a_field_of_its_config_takes_the_default(tmp_path):
    old = checkpoint()
    old["config"] = {k: v for k, v in old["config"].items() if k not in ("hidden_act", "unit_norm")}
    torch.save(old, tmp_path / "clip.pt")
    clip, _ = clip_embed.load_clip(tmp_path / "clip.pt")
    assert (clip.config.hidden_act, clip.config.unit_norm) == ("gelu", True)
    assert torch.allclose(clip.encode_text(torch.tensor([[512, 513]]))[1].norm(), torch.ones(()))


def test_missing_tensors_truncated_files_and_code_in_pickles_are_refused(tmp_path):
    path, good = tmp_path / "clip.pt", checkpoint()
    del good["model"]["ln_final.bias"]
    torch.save(good, path)
    with pytest.raises(UserError, match=r"ln_final.bias is missing, expected shape \(16,\)"):
        clip_embed.load_clip(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError, match="damaged, or no checkpoint"):
        clip_embed.load_clip(path)
    with pytest.raises(UserError, match="no such file"):
        clip_embed.load_clip(tmp_path / "none.pt")

    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"stage": "clip", "config": {}, "model": Bomb()}, path)
    with pytest.raises(UserError, match="damaged, or no checkpoint"):
        clip_embed.load_clip(path)
    assert not (tmp_path / "ran").exists()


def test_half_precision_copy_has_the_same_fingerprint_and_features(tmp_path):
    whole = checkpoint()
    torch.save(whole, tmp_path / "clip.pt")
    torch.save(whole | {"model": {k: v.half() for k, v in whole["model"].items()}}, tmp_path / "half.pt")
    (a, _), (b, _) = clip_embed.load_clip(tmp_path / "clip.pt"), clip_embed.load_clip(tmp_path / "half.pt")
    pixels = torch.randn(2, 3, 16, 16)
    assert checkpoints.fingerprint(a) == checkpoints.fingerprint(b)
    assert b.logit_scale.dtype == torch.float32
    assert torch.allclose(a.encode_image(pixels), b.encode_image(pixels), atol=5e-3)
