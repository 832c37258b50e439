"""Weights that others published: safetensors, PyTorch archives, Hugging Face folders, merges files.

Everything is read without running what is in it: a safetensors header is JSON, and the pickle in a
.pt or .bin may call nothing but the makers of tensors. Tensors are memory-mapped.
"""

import gzip
import json
import math
import pickle
import re
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch

from clip_embed import CLIP, END, CLIPConfig, Tokenizer, UserError
from weights.checkpoints import load_model, read_checkpoint, reading

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
          "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16,
          "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
STORAGES = "Double Float Half BFloat16 Long Int Short Char Byte Bool".split()  # as DTYPES
HARMLESS = {  # all that a pickle of tensors needs to call
    "collections.OrderedDict": OrderedDict,
    "torch._utils._rebuild_tensor_v2":
        lambda flat, offset, size, stride, *_: flat.as_strided(size, stride, offset),
    **{f"torch.{kind}Storage": dtype for kind, dtype in zip(STORAGES, DTYPES.values())}}
# tensors in some files that are not weights
NO_WEIGHT = r"(^|\.)(position_ids|attn_mask|input_resolution|context_length|vocab_size)$"
MERGES = "bpe_simple_vocab_16e6.txt.gz"


def read_safetensors(path):
    """{name: tensor} of a .safetensors file, memory-mapped. Raises UserError.

    The format: the header's length (8 bytes, little-endian); the header, JSON,
    {name: {"dtype", "shape", "data_offsets"}}; the tensors' bytes without gap or overlap.
    """
    with reading(path, "a .safetensors file", ".safetensors file"):
        memory = np.memmap(path, mode="c")  # c: what is written to the tensors stays in memory
        start = end = 8 + int.from_bytes(memory[:8].tobytes(), "little")
        if start > len(memory):
            raise UserError(f"{path}: says that its header ends at byte {start}, "
                            f"but has {len(memory)}: damaged or truncated")
        header, tensors = json.loads(memory[8:start].tobytes()), {}
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
            place = [start + n for n in entry["data_offsets"]]
            begin, count = end, math.prod(shape)
            end = begin + count * dtype.itemsize
            if place != [begin, end] or end > len(memory) or min(shape, default=0) < 0:
                raise UserError(f"{path}: tensor {name}, {shape}, is at bytes {place} "
                                f"of {len(memory)}, expected {[begin, end]}")
            flat = torch.empty(0, dtype=dtype)
            if count:
                flat = torch.frombuffer(memory, dtype=dtype, count=count, offset=begin)
            tensors[name] = flat.view(shape)
        if end != len(memory):
            raise UserError(f"{path}: has {len(memory)} bytes, but its tensors end at {end}")
        return tensors


class Inert(dict):
    """Stands for an object of a TorchScript module: its contents by dotted names."""

    def __setstate__(self, state):
        for name, value in state.items():
            if isinstance(value, Inert):  # popped: one owner each, whatever a hostile pickle does
                self.update({f"{name}.{part}": value.pop(part) for part in [*value]})
            else:
                self[name] = value


def read_archive(path):
    """The dictionary in a file of torch.save or torch.jit.save, tensors memory-mapped.

    Both are a zip file of a pickle, data.pkl, and each storage's bytes, data/N. The pickle may call
    nothing but the HARMLESS; a TorchScript module becomes Inert, its code is not run. Raises
    UserError.
    """
    expected = ("the clip checkpoint that `python train.py clip` writes, OpenAI's .pt "
                "or a Hugging Face folder")
    with reading(path, expected), zipfile.ZipFile(path) as archive:
        memory = np.memmap(path, mode="c")
        stored = {member.filename.partition("/")[2]: member
                  for member in archive.infolist() if not member.compress_type}

        class Restricted(pickle._Unpickler):  # in C one opcode could ask for any amount of memory
            def find_class(self, module, name):
                if module.split(".")[0] == "__torch__":
                    return Inert
                if module == "torch.jit._pickle":  # typed lists, which hold no weights
                    return lambda *_: None
                if f"{module}.{name}" not in HARMLESS:
                    raise pickle.UnpicklingError(f"refused: its pickle would call {module}.{name}")
                return HARMLESS[f"{module}.{name}"]

            def persistent_load(self, storage):
                _, dtype, key, _, count = storage
                member = stored[f"data/{key}"]
                if member.file_size != count * dtype.itemsize:
                    raise ValueError(f"{member.filename} has {member.file_size} bytes, "
                                     f"expected {count * dtype.itemsize}")
                # a zip member: 30 bytes, of which 26 … 29 hold the lengths of name and extra field
                names = np.frombuffer(memory, "<u2", 2, member.header_offset + 26)
                start = member.header_offset + 30 + int(names.sum())
                return torch.frombuffer(memory, dtype=dtype, count=count, offset=start)

        content = Restricted(archive.open(stored["data.pkl"])).load()
        return content if isinstance(content, dict) else {}


def openai_config(tensors, path):
    """CLIPConfig of OpenAI's weights, from the tensors' shapes. Raises UserError."""
    if "visual.layer1.0.conv1.weight" in tensors:
        raise UserError(f"{path}: is a ResNet CLIP; only those with a ViT can be loaded")
    with reading(path, "the tensors of OpenAI's CLIP"):
        width, _, patch, _ = tensors["visual.conv1.weight"].shape
        text_width, embed_dim = tensors["text_projection"].shape
        patches = len(tensors["visual.positional_embedding"])
        context = len(tensors["positional_embedding"])
        vocab = len(tensors["token_embedding.weight"])
        towers = ((3, "visual.transformer.resblocks."), (2, "transformer.resblocks."))
        layers = [len({name.split(".")[n] for name in tensors if name.startswith(tower)})
                  for n, tower in towers]
        return CLIPConfig(embed_dim, math.isqrt(patches) * patch, patch, width, layers[0],
                          width // 64, context, vocab, text_width, layers[1], text_width // 64,
                          "quick_gelu")


def read_json(path, expected):
    """The dictionary in a JSON file. Raises UserError."""
    with reading(path, expected, "JSON"):
        return dict(json.loads(path.read_text("utf-8")))


VISION = {"image_size": 224, "patch_size": 32, "hidden_size": 768, "num_hidden_layers": 12,
          "num_attention_heads": 12, "hidden_act": "quick_gelu"}  # Hugging Face's defaults
TEXT = {"max_position_embeddings": 77, "vocab_size": 49408, "hidden_size": 512,
        "num_hidden_layers": 12, "num_attention_heads": 8, "hidden_act": "quick_gelu"}


def hugging_face_config(path, config=None):
    """CLIPConfig of a Hugging Face config.json, or of `config`, its content. Raises UserError."""
    config = config or read_json(path, "the config.json of a Hugging Face CLIP")
    with reading(path, "a CLIP with both towers"):
        towers = config["vision_config"], config["text_config"]
        (*vision, vision_act), (*text, text_act) = (
            [tower.get(k, v) for k, v in default.items()]  # in CLIPConfig's order
            for tower, default in zip(towers, (VISION, TEXT)))
        eps = {tower.get("layer_norm_eps", 1e-5) for tower in towers}
        if vision_act != text_act or eps != {1e-5}:
            raise UserError(f"{path}: hidden_act is {vision_act!r} for images, {text_act!r} for "
                            "text; expected one, and layer_norm_eps 1e-5")
        return CLIPConfig(config.get("projection_dim", 512), *vision, *text, text_act)


HUGGING_FACE = {  # parts of our names and of theirs, replaced in this order
    "visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight",
    "visual.": "vision_model.", "transformer.resblocks": "encoder.layers", "attn": "self_attn",
    "c_fc": "fc1", "c_proj": "fc2", "conv1": "embeddings.patch_embedding",
    "class_emb": "embeddings.class_emb", "token_emb": "embeddings.token_emb",
    "positional_embedding": "embeddings.position_embedding.weight", "ln_pre": "pre_layrnorm",
    "ln_post": "post_layernorm", "ln_final": "final_layer_norm", "ln_": "layer_norm"}


def hugging_face(ours):
    """CLIP's state_dict under Hugging Face's names, as views: q, k, v apart, matrices transposed."""
    theirs = {}
    for name, tensor in ours.items():
        for part, their_part in HUGGING_FACE.items():
            name = name.replace(part, their_part)
        if not name.startswith(("vis", "text", "logit")):
            name = f"text_model.{name}"
        if "in_proj_" in name:
            for part, third in zip("qkv", tensor.chunk(3)):
                theirs[name.replace("in_proj_", f"{part}_proj.")] = third
        else:
            theirs[name] = tensor.T if name.endswith("projection.weight") else tensor
    return theirs


def read_merges(path, config):
    """The merges in a file, merges.txt or OpenAI's .gz, each line checked. Raises UserError."""
    with reading(path, f"beside the weights, or given by --bpe, {MERGES} from "
                 "https://github.com/openai/CLIP (folder clip), or merges.txt from the model's "
                 "page on https://huggingface.co", "merges"):
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            lines = file.read(1 << 26).decode().splitlines()
    if path.suffix == ".gz":  # OpenAI's file has more merges than its models use
        lines = lines[:config.vocab_size - 513]
    known = {*Tokenizer([]).ids}
    for number, line in enumerate(lines[1:], 2):  # after the title
        if len(line.split()) != 2 or not known.issuperset(line.split()):
            raise UserError(f"{path}: line {number} is {line[:60]!r}, expected two symbols, "
                            "each a byte's or merged before")
        known.add("".join(line.split()))
    return [line.split() for line in lines[1:]]


def read_tokenizer(folder, config, bpe=None):
    """A published CLIP's Tokenizer, of the merges in `folder` or in the file `bpe`.

    vocab.json, if it lies beside the merges, is checked. The padding token is that of the folder's
    tokenizer_config.json, else 0, as in OpenAI's code. Raises UserError.
    """
    paths = [Path(bpe)] if bpe else [folder / "merges.txt", folder / MERGES]
    path = next((p for p in paths if p.is_file()), paths[-1])
    tokenizer = Tokenizer(read_merges(path, config), config.context_length)
    vocabulary, settings = path.with_name("vocab.json"), folder / "tokenizer_config.json"
    ids = read_json(vocabulary, "a vocabulary") if vocabulary.exists() else tokenizer.ids
    if ids != tokenizer.ids or len(tokenizer) != config.vocab_size:
        raise UserError(f"{path}: makes {len(tokenizer)} tokens, the weights have "
                        f"{config.vocab_size}, vocab.json {len(ids)}; expected the same")
    if settings.exists():
        pad = read_json(settings, "a tokenizer's settings").get("pad_token", END)
        pad = pad.get("content") if isinstance(pad, dict) else pad
        tokenizer.pad = tokenizer.ids.get(str(pad), tokenizer.end)
    return tokenizer


def read_clip(path, bpe=None):
    """(CLIP in eval mode, Tokenizer) of the file or folder that clip_embed.load_clip describes."""
    if path.is_dir():
        names = ("model.safetensors", "pytorch_model.bin")
        if (path / "clip.pt").exists() and not any((path / name).exists() for name in names):
            raise UserError(f"{path}: is a run's folder; give its {path / 'clip.pt'}")
        path /= next((name for name in names if (path / name).exists()), names[0])
    tensors = read_safetensors(path) if path.suffix == ".safetensors" else read_archive(path)
    layout, weights = dict, {k: v for k, v in tensors.items() if isinstance(v, torch.Tensor)
                             and not re.search(NO_WEIGHT, str(k))}
    if isinstance(tensors, Inert):
        config = openai_config(weights, path)
    elif path.suffix in (".safetensors", ".bin"):
        config, layout = hugging_face_config(path.with_name("config.json")), hugging_face
    else:
        return read_own_clip(path)
    checkpoint = {"stage": "clip", "config": vars(config), "model": weights}
    clip = load_model(CLIP, CLIPConfig, checkpoint, path, layout)
    return clip, read_tokenizer(path.parent, config, bpe)


def read_own_clip(path):
    """(CLIP in eval mode, Tokenizer) of a checkpoint that train.py wrote. Raises UserError."""
    checkpoint = read_checkpoint(path, "clip")
    clip = load_model(CLIP, CLIPConfig, checkpoint, path)
    with reading(path, "the clip checkpoint that `python train.py clip` writes"):
        merges = [(first, second) for first, second in
                  (str.split(merge, " ") for merge in checkpoint.get("merges", []))]
        tokenizer = Tokenizer(merges, clip.config.context_length)
    if len(tokenizer) != clip.config.vocab_size:
        raise UserError(f"{path}: its merges make {len(tokenizer)} tokens, "
                        f"its config says {clip.config.vocab_size}")
    return clip, tokenizer
