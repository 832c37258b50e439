"""Published CLIPs: ids and features equal to public libraries' stored ones, and what damaged files say."""

import gzip
import json
import os
import pickle
import shutil
import struct
import sys
import unicodedata
import zipfile
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import clip_embed
import decoder
import prior
import sample
import train
from clip_embed import CLIPConfig, UserError, load_clip
from data import shapes
from weights.published import read_safetensors
from weights import checkpoints, published

FIXTURES = Path(__file__).parent / "fixtures"
TINY = FIXTURES / "clip-hf-tiny"
NAMES = {v: k for k, v in published.DTYPES.items()}


def close(ours, theirs):
    """Within 1e-4 of the largest value."""
    return float((ours - theirs).abs().max()) <= 1e-4 * float(theirs.abs().max())


def write_safetensors(path, tensors, change=lambda header: header, pad=0, tail=b""):
    """The format as its page describes it; `change` damages the header, `pad` spaces put what follows off alignment."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, t in tensors.items():
        raw = t.contiguous().view(torch.uint8).numpy().tobytes() if t.ndim else t[None].view(torch.uint8).numpy().tobytes()
        header[name] = {"dtype": NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(change(header)).encode() + b" " * pad
    path.write_bytes(struct.pack("<Q", len(text)) + text + data + tail)


@pytest.fixture
def folder(tmp_path):
    """A copy of the fixture to damage."""
    return Path(shutil.copytree(TINY, tmp_path / "clip"))


@pytest.fixture(scope="module")
def expected():
    return torch.load(TINY / "expected.pt", weights_only=True)


# ----------------------------------------------------------------------------- Hugging Face's layout

def check_features(clip, tokenizer, expected, within=close):
    ids = tokenizer(expected["texts"])
    assert torch.equal(ids, expected["input_ids"])
    states, z_t = clip.encode_text(ids)
    z_i = clip.encode_image(expected["pixel_values"])
    assert within(states, expected["text_hidden"])
    assert within(z_t, F.normalize(expected["text_features"], dim=-1))
    assert within(z_i, F.normalize(expected["image_features"], dim=-1))
    assert within(clip.logit_scale.exp() * z_i @ z_t.T, expected["logits_per_image"])


def test_ids_states_features_and_logits_are_those_of_transformers(expected):
    check_features(*load_clip(TINY), expected)
    check_features(*load_clip(TINY / "model.safetensors"), expected)


def test_every_file_kind_and_precision_of_the_same_weights_loads(folder, expected):
    tensors = {k: v.clone() for k, v in read_safetensors(folder / "model.safetensors").items()}
    tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]  # older files keep these buffers
    mark = checkpoints.fingerprint(load_clip(folder)[0])
    for dtype, within in ((torch.float64, close), (torch.float16, lambda a, b: (a - b).abs().max() < 0.02 * b.abs().max())):
        other = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}
        write_safetensors(folder / "model.safetensors", other, pad=1)
        check_features(*load_clip(folder), expected, within)
        (folder / "model.safetensors").unlink()
        torch.save(other, folder / "pytorch_model.bin")
        clip, tokenizer = load_clip(folder)
        check_features(clip, tokenizer, expected, within)
        assert checkpoints.fingerprint(clip) == mark and all(p.dtype == torch.float32 for p in clip.parameters())


def edit(path, **changes):
    """Change or remove (None) keys of a JSON file; a dictionary changes keys one level down."""
    content = json.loads(path.read_text())
    for key, value in changes.items():
        content[key] = content[key] | value if isinstance(value, dict) and isinstance(content.get(key), dict) else value
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def test_hidden_act_and_transformers_defaults_are_honoured(folder, expected):
    quick = load_clip(folder)[0].encode_image(expected["pixel_values"])
    edit(folder / "config.json", text_config={"hidden_act": "gelu"}, vision_config={"hidden_act": "gelu"})
    clip = load_clip(folder)[0]
    assert clip.config.hidden_act == "gelu" and not close(clip.encode_image(expected["pixel_values"]), quick)
    config = json.loads((folder / "config.json").read_text())
    for tower in ("text_config", "vision_config"):
        del config[tower]["hidden_act"]
    (folder / "config.json").write_text(json.dumps(config))
    assert torch.equal(load_clip(folder)[0].encode_image(expected["pixel_values"]), quick)


@pytest.mark.parametrize("pad_token, number", [("!", 0), ({"content": "!"}, 0), ("<|endoftext|>", 733), (None, 733)])
def test_padding_is_what_the_folder_says_and_changes_no_embedding(folder, expected, pad_token, number):
    edit(folder / "tokenizer_config.json", pad_token=pad_token)
    clip, tokenizer = load_clip(folder)
    ids = tokenizer(expected["texts"])
    assert ids[4].tolist() == [732, 733] + [number] * 75 and tokenizer.mask(ids)[4].sum() == 2
    assert close(clip.encode_text(ids)[1], F.normalize(expected["text_features"], dim=-1))
    (folder / "tokenizer_config.json").unlink()
    assert load_clip(folder)[1]([""])[0, -1] == 0


# ----------------------------------------------------------------------------- OpenAI's layout

BPE = "bpe_simple_vocab_16e6.txt.gz"
SIZES = CLIPConfig(embed_dim=24, image_size=32, vision_patch_size=8, vision_width=128, vision_layers=2, vision_heads=2, vocab_size=516,
                   text_width=64, text_layers=3, text_heads=1, hidden_act="quick_gelu")


class Node(nn.Module):
    """Part of a module tree that has parameters of given dotted names, as OpenAI's archives have."""

    def __init__(self, tensors):
        super().__init__()
        for head in dict.fromkeys(name.split(".")[0] for name in tensors):
            inside = {name.partition(".")[2]: t for name, t in tensors.items() if name.split(".")[0] == head}
            if head == "conv1":  # one real layer, with the attributes that real ones keep
                self.conv1 = nn.Conv2d(*inside["weight"].shape[1::-1], inside["weight"].shape[2:], bias=False)
                self.conv1.weight = nn.Parameter(inside["weight"])
            elif "" in inside:
                self.register_parameter(head, nn.Parameter(inside[""], inside[""].is_floating_point()))
            else:
                self.add_module(head, Node(inside))


def openai_archive(path, tensors):
    extra = {name: torch.tensor(number) for name, number in (("input_resolution", 32), ("context_length", 77), ("vocab_size", 516))}
    torch.jit.script(Node(tensors | extra)).save(str(path))
    with gzip.open(path.with_name(BPE), "wt", encoding="utf-8") as file:
        file.write('"bpe_simple_vocab_16e6.txt#version: 0.2\nt h\nth e</w>\nbeyond what</w>\nis used\n')


@pytest.fixture(scope="module")
def random_weights():
    torch.manual_seed(0)
    return {k: torch.randn(v.shape).half() * 0.2 + (k.endswith("weight") and v.ndim == 1) for k, v in clip_embed.CLIP(SIZES).state_dict().items()}


def test_openais_archive_gives_the_features_of_hugging_faces_layout(tmp_path, random_weights):
    openai_archive(tmp_path / "ViT.pt", random_weights)
    clip, tokenizer = load_clip(tmp_path / "ViT.pt")
    assert clip.config == SIZES and len(tokenizer) == 516

    theirs, block = {}, {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2", "attn.out_proj": "self_attn.out_proj"}
    for tower, prefix, layers in (("vision_model", "visual.", 2), ("text_model", "", 3)):
        for n in range(layers):
            ours, their = f"{prefix}transformer.resblocks.{n}.", f"{tower}.encoder.layers.{n}."
            for kind in ("weight", "bias"):
                for a, b in block.items():
                    theirs[f"{their}{b}.{kind}"] = random_weights[f"{ours}{a}.{kind}"]
                q, k, v = random_weights[f"{ours}attn.in_proj_{kind}"].split({"": 64, "visual.": 128}[prefix])
                theirs |= {f"{their}self_attn.q_proj.{kind}": q, f"{their}self_attn.k_proj.{kind}": k, f"{their}self_attn.v_proj.{kind}": v}
    for a, b in {"vision_model.embeddings.class_embedding": "visual.class_embedding", "logit_scale": "logit_scale",
                 "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
                 "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
                 "vision_model.pre_layrnorm.weight": "visual.ln_pre.weight", "vision_model.pre_layrnorm.bias": "visual.ln_pre.bias",
                 "vision_model.post_layernorm.weight": "visual.ln_post.weight", "vision_model.post_layernorm.bias": "visual.ln_post.bias",
                 "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
                 "text_model.embeddings.position_embedding.weight": "positional_embedding",
                 "text_model.final_layer_norm.weight": "ln_final.weight", "text_model.final_layer_norm.bias": "ln_final.bias"}.items():
        theirs[a] = random_weights[b]
    theirs |= {"text_projection.weight": random_weights["text_projection"].T, "visual_projection.weight": random_weights["visual.proj"].T}
    folder = tmp_path / "hf"
    folder.mkdir()
    write_safetensors(folder / "model.safetensors", theirs)
    tower = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    (folder / "config.json").write_text(json.dumps({"model_type": "clip", "projection_dim": 24, "vision_config": tower, "text_config": {
        "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 1, "vocab_size": 516}}))
    (folder / "merges.txt").write_text("#version: 0.2\nt h\nth e</w>\n")

    again, same = load_clip(folder)
    ids, pixels = tokenizer(["the bath", "a"]), torch.randn(2, 3, 32, 32)
    assert torch.equal(ids, same(["the bath", "a"])) and ids[0, -1] == 0 and checkpoints.fingerprint(clip) == checkpoints.fingerprint(again)
    assert torch.equal(clip.encode_image(pixels), again.encode_image(pixels))
    assert all(torch.equal(a, b) for a, b in zip(clip.encode_text(ids), again.encode_text(ids)))


def test_openais_archive_damaged_or_of_a_resnet_is_refused_by_name(tmp_path, random_weights):
    path, gone = tmp_path / "ViT.pt", dict(random_weights)
    for name in ("visual.conv1.weight", "visual.ln_post.bias", "visual.transformer.resblocks.1.ln_1.weight"):
        openai_archive(path, {k: v for k, v in random_weights.items() if k != name})
        with pytest.raises(UserError, match=f"{name}.* is missing"):
            load_clip(path)
    openai_archive(path, gone | {"ln_final.bias": torch.zeros(65)})
    with pytest.raises(UserError, match=r"ln_final.bias has shape \(65,\), expected \(64,\)"):
        load_clip(path)
    openai_archive(path, gone | {"visual.layer1.0.conv1.weight": torch.zeros(1, 1, 1, 1)})
    with pytest.raises(UserError, match="is a ResNet CLIP"):
        load_clip(path)
    openai_archive(path, gone)
    (tmp_path / BPE).unlink()
    with pytest.raises(UserError, match=f"{BPE}: no such file.*--bpe, {BPE} from https://github.com/openai/CLIP"):
        load_clip(path)
    whole = path.read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="damaged, or no checkpoint"):
            load_clip(path)


class Bomb:
    """Touches a file if it is unpickled by pickle itself."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def archive(path, pickled, compression=zipfile.ZIP_STORED, **records):
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in ({"data.pkl": pickled, "constants.pkl": b"", "version": b"3"} | records).items():
            file.writestr(f"archive/{name}", content)


@pytest.mark.parametrize("name", ["ViT.pt", "pytorch_model.bin"])
def test_a_pickle_that_would_run_code_is_refused_and_not_run(folder, name):
    (folder / "model.safetensors").unlink()
    marker, path = folder / "ran", folder / name
    for protocol in (2, 4):
        archive(path, pickle.dumps({"text_projection": Bomb(marker)}, protocol))
        with pytest.raises(UserError, match=r"refused: its pickle would call \w+.mkdir"):
            load_clip(path)
    for code in (b"c__builtin__\neval\n(S'1'\ntR.", b"c__torch__.os\nsystem\n(S'x'\ntR.", b"ctorch\nload\n(S'x'\ntR.", b"cos\nsystem\n."):
        archive(path, code)
        with pytest.raises(UserError):
            load_clip(path)
    assert not marker.exists()
    for content in ([1], {3: 4}, {3: torch.zeros(2)}):
        torch.save(content, path)
        with pytest.raises(UserError, match="holds no stage|vision_layers = 3, a number outside|is surplus|is missing"):
            load_clip(path)


class Storage:
    """Pickles as a tensor of `count` floats in the archive's record data/0."""

    def __init__(self, count, *shape_stride_offset):
        self.count, self.rest = count, shape_stride_offset


class Pickler(pickle.Pickler):
    def persistent_id(self, value):
        return ("storage", torch.FloatStorage, "0", "cpu", value.count) if type(value) is Storage else None


@pytest.mark.parametrize("count, offset, size, stride, compression", [
    (5, 0, (4,), (1,), 0), (1 << 60, 0, (4,), (1,), 0), (-1, 0, (4,), (1,), 0), (4, 1, (4,), (1,), 0), (4, 0, (5,), (1,), 0), (4, 0, (4,), (2,), 0),
    (4, -1, (2,), (1,), 0), (4, 0, (4,), (-1,), 0), (4, 0, (1 << 62, 1 << 62), (1, 1), 0), (4, 0, (4,), (1,), zipfile.ZIP_DEFLATED)])
def test_a_tensor_beyond_its_storage_is_refused(tmp_path, count, offset, size, stride, compression):
    import io

    class Tensor:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (Storage(count), offset, size, stride, False, {})

    stream = io.BytesIO()
    Pickler(stream, 2).dump({"text_projection": Tensor()})
    archive(tmp_path / "x.bin", stream.getvalue(), compression, **{"data/0": bytes(16)})
    with pytest.raises(UserError, match="damaged, or no checkpoint"):
        published.read_archive(tmp_path / "x.bin")


# ----------------------------------------------------------------------------- safetensors

def test_safetensors_of_every_dtype_come_back_and_writing_leaves_the_file_alone(tmp_path):
    tensors = {str(dtype): (torch.randn(3, 5) * 50).to(dtype) for dtype in published.DTYPES.values()}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3), "last": torch.zeros(0, dtype=torch.int64)}
    for pad in range(3):
        write_safetensors(tmp_path / "x.safetensors", tensors, pad=pad)
        before, read = (tmp_path / "x.safetensors").read_bytes(), read_safetensors(tmp_path / "x.safetensors")
        assert read.keys() == tensors.keys()
        assert all(read[k].dtype == v.dtype and torch.equal(read[k], v) for k, v in tensors.items())
        read["scalar"].zero_()
        assert (tmp_path / "x.safetensors").read_bytes() == before


def place(name, *offsets, **entry):
    return lambda header: header | {name: header[name] | {"data_offsets": list(offsets)} | entry}


@pytest.mark.parametrize("change, message", [
    (place("b", 20, 36), r"tensor b, \[2, 2\], is at bytes .* expected"), (place("b", 28, 44), "tensor b"), (place("b", 1 << 60, (1 << 60) + 16), "tensor b"),
    (place("b", 24, 36), "tensor b"), (place("a", -4, 20), "tensor a"), (place("a", 0, 24, shape=[2, 4]), "tensor a"),
    (place("a", 0, 24, shape=[-2, -3]), "tensor a"), (place("b", 24, 20, shape=[-1]), "tensor b"), (place("a", 0, 24, shape=[2.0, 3]), "damaged"),
    (place("a", 0, 24, dtype="F7"), "'F7' is missing or unknown"), (place("a", 0), "damaged"), (lambda h: [1], "damaged"), (lambda h: {"a": 3}, "damaged"),
    (lambda h: {k: v for k, v in h.items() if k != "b"}, "its tensors end at"), (lambda h: {"b": h["b"]}, "tensor b"),
    (lambda h: h | {"c": h["b"]}, "tensor (b|c)"),
])
def test_damaged_safetensors_are_refused_by_name(tmp_path, change, message):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": torch.zeros(2, 3), "b": torch.zeros(2, 2)}, change)
    with pytest.raises(UserError, match=message) as error:
        read_safetensors(path)
    assert "x.safetensors" in str(error.value) and "\n" not in str(error.value)


def test_truncated_safetensors_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": torch.zeros(2, 3)})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError):
            read_safetensors(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(UserError, match="its tensors end at"):
        read_safetensors(path)
    path.write_bytes(struct.pack("<Q", 1 << 62) + whole[8:])
    with pytest.raises(UserError, match=f"its header ends at byte {(1 << 62) + 8}, but has {len(whole)}"):
        read_safetensors(path)


# ----------------------------------------------------------------------------- damaged folders

def with_tensor(name, tensor):
    def damage(folder):
        tensors = {k: v.clone() for k, v in read_safetensors(folder / "model.safetensors").items()} | {name: tensor}
        write_safetensors(folder / "model.safetensors", {k: v for k, v in tensors.items() if v is not None})
    return damage


def replaced(name, old, new):
    return lambda folder: (folder / name).write_text((folder / name).read_text("utf-8").replace(old, new), "utf-8")


K_PROJ = "vision_model.encoder.layers.1.self_attn.k_proj.weight"


@pytest.mark.parametrize("damage, message", [
    (with_tensor(K_PROJ, None), rf"tensor {K_PROJ} is missing, expected shape \(64, 64\)"),
    (with_tensor(K_PROJ, torch.zeros(64, 63)), rf"tensor {K_PROJ} has shape \(64, 63\), expected \(64, 64\)"),
    (with_tensor("text_projection.weight", torch.zeros(48, 32)), r"tensor text_projection.weight has shape \(48, 32\), expected \(32, 48\)"),
    (with_tensor("logit_scale", torch.tensor(float("nan"))), "tensor logit_scale holds values that are not finite"),
    (with_tensor("logit_bias", torch.tensor(0.0)), "tensor logit_bias is surplus"),
    (replaced("config.json", '"patch_size": 8', '"patch_size": 16'), r"position_embedding.weight has shape \(17, 64\), expected \(5, 64\)"),
    (replaced("config.json", '"hidden_size": 64', '"hidden_size": "wide"'), "expected a value like 128"),
    (replaced("config.json", '"hidden_size": 64', '"hidden_size": 1099511627776'), "number outside"),
    (replaced("config.json", '"num_attention_heads": 4', '"num_attention_heads": 5'), "cannot be shared by 5 heads"),
    (replaced("config.json", '"hidden_act": "quick_gelu",\n    "hidden_size": 64', '"hidden_act": "gelu",\n    "hidden_size": 64'), "hidden_act is 'gelu' for images"),
    (replaced("config.json", '"layer_norm_eps": 1e-05,\n    "max', '"layer_norm_eps": 1e-06,\n    "max'), "expected one, and layer_norm_eps 1e-5"),
    (replaced("config.json", '"text_config"', '"words_config"'), "'text_config' is missing"),
    (replaced("config.json", "{", "["), "config.json: damaged, or no JSON"),
    (lambda folder: (folder / "config.json").unlink(), "config.json: no such file; expected the config.json of a Hugging Face CLIP"),
    (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors: no such file"),
    (lambda folder: os.truncate(folder / "model.safetensors", 500_000), "model.safetensors: tensor .* is at bytes"),
    (replaced("merges.txt", "\no n</w>\n", "\non</w>\n"), "merges.txt: line 3 is 'on</w>', expected two symbols"),
    (replaced("merges.txt", "\no n</w>\n", "\no n</w> x\n"), "merges.txt: line 3"),
    (replaced("merges.txt", "\no n</w>\n", "\no never\n"), "merges.txt: line 3"),
    (lambda folder: (folder / "merges.txt").write_text((folder / "merges.txt").read_text("utf-8").rstrip().rpartition("\n")[0], "utf-8"),
     "merges.txt: makes 733 tokens, the weights have 734, vocab.json 734"),
    (lambda folder: (folder / "merges.txt").write_bytes(b"#\n\xff\xff"), "merges.txt: damaged, or no merges"),
    (replaced("vocab.json", '"!": 0, ', ""), "makes 734 tokens, the weights have 734, vocab.json 733"),
    (replaced("vocab.json", '"!": 0, "\\"": 1', '"!": 1, "\\"": 0'), "vocab.json 734; expected the same"),
    (lambda folder: (folder / "merges.txt").unlink(), f"{BPE}: no such file.*or merges.txt"),
])
def test_a_damaged_folder_is_one_line_and_exit_status_2(folder, damage, message, monkeypatch, capsys):
    damage(folder)
    with pytest.raises(UserError, match=message):
        load_clip(folder)
    Image.new("RGB", (8, 8)).save(folder / "p.png")
    monkeypatch.setattr(sys, "argv", ["clip_embed.py", str(folder / "p.png"), "a", "--clip", str(folder), "--device", "cpu"])
    with pytest.raises(SystemExit) as stop:
        clip_embed.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "clip_embed.py: " in error


# ----------------------------------------------------------------------------- the tokenizer

def test_letters_and_numbers_are_unicodes():
    """str's own tables (isalpha, isnumeric, isspace) are others than unicodedata's categories, and agree on all of Unicode."""
    text, expected = [], []
    for c in map(chr, range(sys.maxunicode + 1)):
        text.append(f"a{c}{c}")
        expected += ([f"a{c}{c}"] if c.isalpha() else ["a", c, c] if c.isnumeric() else ["a"] if c.isspace() else ["a", c + c])
    assert clip_embed.split_words(" ".join(text)) == expected
    assert unicodedata.category("Ⅷ") == "Nl" and clip_embed.split_words("xⅧ½") == ["x", "Ⅷ", "½"]


def test_all_captions_get_openais_ids():
    path = Path(os.environ.get("CLIP_BPE", Path(__file__).parents[2] / "shared/fixtures/clip-bpe" / BPE))
    if not path.exists():
        pytest.skip(f"no {path}: get it from https://github.com/openai/CLIP, folder clip, and name it in CLIP_BPE")
    tokenizer = published.read_tokenizer(path.parent, CLIPConfig(vocab_size=49408), path)
    captions = json.loads((FIXTURES / "captions_and_ids.json").read_text("utf-8"))
    assert len(captions) == 1493 and [text for text, ids in captions if tokenizer.encode(text) != ids] == []


# ----------------------------------------------------------------------------- the scripts

def run(script, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, arguments)])
    script.main()


def test_zero_shot_classification_of_several_pictures_with_bpe_from_elsewhere(folder, tmp_path, monkeypatch, capsys):
    shutil.move(folder / "merges.txt", tmp_path / "elsewhere.txt")
    pictures = [tmp_path / f"{k}.jpg" for k in range(3)]
    for k, path in enumerate(pictures):
        Image.new("RGB", (40, 30), (80 * k, 90, 20)).save(path)
    run(clip_embed, monkeypatch, "--clip", folder, "--bpe", tmp_path / "elsewhere.txt", *pictures, "a photo of a dog", "a cat", "--device", "cpu")
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.endswith(".jpg")] == [str(p) for p in pictures]
    assert sum(line.endswith("a photo of a dog") for line in lines) == sum(line.endswith("a cat") for line in lines) == 3


def test_prior_and_decoder_train_on_a_published_clip_and_belong_to_it(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(prior.PRESETS, "shapes", prior.PriorConfig(text_context=77, width=16, layers=1, heads=1))
    monkeypatch.setitem(decoder.PRESETS, "shapes", decoder.DecoderConfig(patch_size=8, channels=16, depth=1, multiples=(1, 2), attention=(4,),
                                                                         head_channels=16, norm_groups=8, text_layers=0, text_width=16))
    monkeypatch.setattr(shapes, "FIXED_SCENES", 8)
    runs, words = tmp_path / "runs", ["--steps", 2, "--batch-size", 4, "--workers", 0, "--device", "cpu", "--out", tmp_path / "runs"]
    for stage in ("prior", "decoder"):
        run(train, monkeypatch, stage, "--clip", folder, *words)
    assert not (runs / "clip.pt").exists()
    mark = checkpoints.fingerprint(load_clip(folder)[0])
    assert {torch.load(runs / f"{stage}.pt", weights_only=True)["clip"] for stage in ("prior", "decoder")} == {mark}
    draw = ["a red circle", "--weights", runs, "--size", 64, "--prior-steps", 2, "--decoder-steps", 2, "--out", tmp_path / "out", "--device", "cpu"]
    run(sample, monkeypatch, *draw, "--clip", folder)
    assert Image.open(next((tmp_path / "out").glob("*.png"))).size == (64, 64)

    with_tensor("logit_scale", torch.tensor(1.0))(folder)
    other = checkpoints.fingerprint(load_clip(folder)[0])
    torch.save({"stage": "clip", "config": asdict(SIZES), "model": clip_embed.CLIP(SIZES).state_dict(), "merges": ["t h", "th e</w>"]}, runs / "clip.pt")
    third = checkpoints.fingerprint(load_clip(runs / "clip.pt")[0])
    for script, arguments, names in ((sample, [*draw, "--clip", folder], (mark, other)), (sample, draw, (mark, third)),
                                     (prior, ["a", "--weights", runs], (mark, third)),
                                     (decoder, [next((tmp_path / "out").glob("*.png")), "--weights", runs], (mark, third)),
                                     (train, ["prior", "--resume", "--clip", folder, *words], (mark, other))):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run(script, monkeypatch, *arguments)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and all(name in error for name in names)
