"""Karlo, the public unCLIP (Kakao Brain 2022), as checkpoints of this project.

In:   a folder in the diffusers layout: prior/, text_proj/, decoder/, super_res_first/, super_res_last/, text_encoder/,
      tokenizer/; perhaps image_encoder/, which the folder for image variations has
Out:  clip.pt, prior.pt, decoder.pt, upsample-256.pt, in the precision that they were published in

All sizes are read from the folder's configs, and every tensor's name and shape is checked. What differs from the paper, each a
field of our configs that this file sets: embeddings keep CLIP's own norm (unit_norm), the prior works on standardized z_i
and holds x̂_0 within ±5, a learned vector stands for no z_i, sampling begins at t = 999 (top_signal), and the one upsampler
adds the timestep's embedding (scale_shift), is ancestral (eta) and has a second network for its last step (last). Its
condition is enlarged by bicubic. The decoder has no text transformer of its own: CLIP's states go straight in. Guidance and
steps are the library's defaults, float32 is its rounding of ᾱ: 1 − ᾱ_0 is 0.05% off, and each stage's last step with it.

    python weights/karlo.py karlo-v1-alpha weights/karlo
"""

import argparse
import math
import re
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import clip_embed
import decoder
import prior
import upsample
from clip_embed import CLIP, UserError, one_line_errors
from weights.checkpoints import fingerprint, load_model, reading, save_atomically
from weights.published import (NO_WEIGHT, hugging_face, hugging_face_config, read_archive, read_json, read_safetensors,
                               read_tokenizer)

PARTS = ("prior", "text_proj", "decoder", "super_res_first", "super_res_last", "text_encoder", "tokenizer")
WEIGHTS = [f"{name}{kind}" for name, kind in (("diffusion_pytorch_model", ".safetensors"), ("diffusion_pytorch_model", ".bin"),
                                              ("model", ".safetensors"), ("pytorch_model", ".bin"))]

# ----------------------------------------------------------------------------- our names and theirs

PRIOR = {"text_in": "encoder_hidden_states_proj", "z_t_in": "embedding_proj", "time_in.0": "time_embedding.linear_1",
         "time_in.2": "time_embedding.linear_2", "z_i_in": "proj_in", "ln_out": "norm_out", "out": "proj_to_clip_embeddings"}
BARE = {"final_token": ("prd_embedding", 2), "positional_embedding": ("positional_embedding", 1), "mean": ("clip_mean", 1),
        "deviation": ("clip_std", 1)}  # and how many dimensions of 1 theirs begin with
BLOCK = {"ln_1": ["norm1"], "qkv": ["attn1.to_q", "attn1.to_k", "attn1.to_v"], "proj": ["attn1.to_out.0"], "ln_2": ["norm3"],
         "mlp.0": ["ff.net.0.proj"], "mlp.2": ["ff.net.2"]}
TEXT_PROJ = {"z_i_to_emb": "clip_image_embeddings_project_to_time_embeddings", "z_i_to_context": "clip_extra_context_tokens_proj",
             "text.0": "encoder_hidden_states_proj", "text.1": "text_encoder_hidden_states_norm", "text_to_emb": "embedding_proj",
             "null_z_i": "learned_classifier_free_guidance_embeddings"}
UNET = {"time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2", "conv_in": "conv_in",
        "norm_out": "conv_norm_out", "conv_out": "conv_out"}
RES = {"in_norm": ["norm1"], "in_conv": ["conv1"], "emb": ["time_emb_proj"], "out_norm": ["norm2"], "out_conv": ["conv2"],
       "skip": ["conv_shortcut"]}
ATTENTION = {"norm": ["group_norm"], "qkv": ["to_q", "to_k", "to_v"], "context_kv": ["add_k_proj", "add_v_proj"],
             "proj_out": ["to_out.0"]}


def prior_layout(ours):
    """The prior's state_dict under Karlo's names, as views; `errors`, which our training measures, has no counterpart."""
    theirs = {}
    for name, tensor in ours.items():
        module, _, kind = name.rpartition(".")
        if name in BARE:
            name, ones = BARE[name]
            theirs[f"prior.{name}"] = tensor[(None,) * ones]
        elif module in PRIOR:
            theirs[f"prior.{PRIOR[module]}.{kind}"] = tensor
        elif name != "errors":
            _, number, part = module.split(".", 2)
            names = [f"prior.transformer_blocks.{number}.{part}.{kind}" for part in BLOCK[part]]
            theirs |= dict(zip(names, tensor.chunk(len(names))))
    return theirs


def unet_name(module, depth):
    """Karlo's names of a module of our U-Nets: three for an attention's qkv, mostly one. depth: residual blocks a level."""
    if module in UNET:
        return [UNET[module]]
    where, number, *place, part = module.split(".")
    level, n = divmod(int(number), depth + 1)
    table, kind = (ATTENTION, "attentions") if part in ATTENTION else (RES, "resnets")
    if where == "middle":
        block = f"mid_block.{kind}.{min(int(number), 1) if table is RES else 0}"
    elif where == "down" and n == depth:
        block = f"down_blocks.{level}.downsamplers.0"
    elif where == "up" and table is RES and place != ["0"]:
        block = f"up_blocks.{level}.upsamplers.0"
    else:
        block = f"{where}_blocks.{level}.{kind}.{n}"
    return [f"{block}.{theirs}" for theirs in table[part]]


def decoder_layout(ours, depth):
    """The decoder's state_dict under the names of Karlo's decoder and text_proj, as views."""
    theirs = {}
    for name, tensor in ours.items():
        module, _, kind = name.rpartition(".")
        if name in TEXT_PROJ or module in TEXT_PROJ:
            theirs[f"text_proj.{TEXT_PROJ[module]}.{kind}" if module else f"text_proj.{TEXT_PROJ[name]}"] = tensor
        else:
            names = [f"decoder.{n}.{kind}" for n in unet_name(module, depth)]
            theirs |= dict(zip(names, tensor.chunk(len(names))))
    return theirs


def upsampler_layout(ours, depth):
    """The upsampler's state_dict under the names of Karlo's super_res_first and super_res_last."""
    theirs = {}
    for name, tensor in ours.items():
        module, _, kind = name.removeprefix("last.").rpartition(".")
        folder = "super_res_last" if name.startswith("last.") else "super_res_first"
        theirs[f"{folder}.{unet_name(module, depth)[0]}.{kind}"] = tensor
    return theirs


# ----------------------------------------------------------------------------- their files

def read_config(folder, **demanded):
    """The config.json in a folder. Raises UserError where it is missing or a field is not what our networks are built for."""
    path = folder / "config.json"
    config = read_json(path, "the config.json of a part of Karlo in the diffusers layout")
    for field, value in demanded.items():
        if config.get(field, value) != value:
            raise UserError(f"{path}: says {field} = {config[field]!r}, expected {value!r}")
    return config


def read_weights(folder):
    """{"folder.name": tensor} of the weights in a folder, memory-mapped. Raises UserError."""
    path = next((folder / name for name in WEIGHTS if (folder / name).exists()), folder / WEIGHTS[0])
    tensors = read_safetensors(path) if path.suffix == ".safetensors" else read_archive(path)
    tensors = {f"{folder.name}.{name}": tensor for name, tensor in tensors.items()
               if isinstance(tensor, torch.Tensor) and not re.search(NO_WEIGHT, str(name))}
    if not any(tensor.is_floating_point() for tensor in tensors.values()):
        raise UserError(f"{path}: holds no weights")
    return tensors


def sizes(config, path):
    """What our configs call a U-Net's sizes. Raises UserError."""
    with reading(path / "config.json", "the sizes of a U-Net", "config"):
        channels, scale_shift = config["block_out_channels"], {"scale_shift": True, "default": False}
        if any(width % channels[0] for width in channels):
            raise UserError(f"{path / 'config.json'}: block_out_channels are {channels}, expected multiples of the first")
        return {"image_size": config["sample_size"], "channels": channels[0], "depth": config["layers_per_block"],
                "multiples": tuple(width // channels[0] for width in channels), "norm_groups": config.get("norm_num_groups", 32),
                "scale_shift": scale_shift[config.get("resnet_time_scale_shift", "default")], "dropout": 0.0, "top_signal": 0.0,
                "float32": True}


UNET_DEMANDS = {"act_fn": "silu", "center_input_sample": False, "flip_sin_to_cos": True, "freq_shift": 0, "norm_eps": 1e-5,
                "mid_block_scale_factor": 1, "time_embedding_type": "positional"}


def load_prior(karlo):
    """The DiffusionPrior of Karlo's prior/. Raises UserError."""
    c = read_config(karlo / "prior", added_emb_type="prd", additional_embeddings=4, encoder_hid_proj_type="linear",
                    time_embed_act_fn="silu", norm_in_type=None, embedding_proj_norm_type=None)
    text = read_config(karlo / "text_encoder")
    with reading(karlo / "prior/config.json", "the sizes of a prior", "config"):
        heads = c["num_attention_heads"]
        config = prior.PriorConfig(c["embedding_dim"], text["hidden_size"], c["num_embeddings"], heads * c["attention_head_dim"],
                                   c["num_layers"], heads, unit_norm=False, clamp=5.0, guidance=4.0, steps=25)
    model = load(prior.DiffusionPrior, config, "prior", karlo, ["prior"], prior_layout)
    model.errors.zero_()  # not known: the analytic variance becomes β̃, with which Karlo samples
    return model


def load_decoder(karlo):
    """The Decoder of Karlo's decoder/ and text_proj/. Raises UserError."""
    c = read_config(karlo / "decoder", in_channels=3, out_channels=6, class_embed_type="identity", encoder_hid_dim=None,
                    mid_block_type="UNetMidBlock2DSimpleCrossAttn", only_cross_attention=False, **UNET_DEMANDS)
    proj, text = read_config(karlo / "text_proj"), read_config(karlo / "text_encoder")
    size = sizes(c, karlo / "decoder")
    with reading(karlo / "decoder/config.json", "the sizes of a decoder", "config"):
        attention = tuple(size["image_size"] >> k for k, kind in enumerate(c["down_block_types"]) if "CrossAttn" in kind)
        config = decoder.DecoderConfig(**size, attention=attention, head_channels=c["attention_head_dim"],
                                       unit_norm=False, guidance=8.0, steps=25, embed_dim=proj["clip_embeddings_dim"],
                                       z_i_tokens=proj["clip_extra_context_tokens"], clip_text_width=text["hidden_size"],
                                       text_layers=0, text_width=c["cross_attention_dim"])
    model = load(decoder.Decoder, config, "decoder", karlo, ["decoder", "text_proj"], partial(decoder_layout, depth=config.depth))
    for p in model.z_i_to_context.parameters():  # Karlo's projection puts out the tokens' first coordinates, then the second
        p.copy_(p.clone().unflatten(0, (config.text_width, config.z_i_tokens)).transpose(0, 1).flatten(0, 1))
    return model


def load_upsampler(karlo):
    """The Upsampler of Karlo's super_res_first/ and super_res_last/. Raises UserError."""
    first, last = (read_config(karlo / name, in_channels=6, out_channels=3, add_attention=False, **UNET_DEMANDS)
                   for name in ("super_res_first", "super_res_last"))
    size = sizes(first, karlo / "super_res_first")
    if size != sizes(last, karlo / "super_res_last"):
        raise UserError(f"{karlo / 'super_res_last/config.json'}: its sizes are not those of super_res_first, expected the same")
    low = read_config(karlo / "decoder").get("sample_size")
    config = upsample.UpsamplerConfig(low_size=low, **size, steps=7, enlarge="bicubic", eta=1.0, last=True)
    return load(upsample.Upsampler, config, f"upsample-{config.image_size}", karlo, ["super_res_first", "super_res_last"],
                partial(upsampler_layout, depth=config.depth))


def load(network, config, stage, karlo, folders, layout):
    """A network filled from the weights in some of Karlo's folders. Raises UserError."""
    weights = {name: tensor for folder in folders for name, tensor in read_weights(karlo / folder).items()}
    return load_model(network, type(config), {"stage": stage, "config": vars(config), "model": weights}, karlo, layout)


def load_towers(karlo, clip_path=None):
    """(CLIP, Tokenizer) of Karlo's text_encoder/ and tokenizer/; the image tower, if any, from image_encoder/ or clip_path.

    clip_path: the CLIP that Karlo was trained with, ViT-L/14, as load_clip reads it. Raises UserError where it is another.
    """
    folders = ["text_encoder"] + ["image_encoder"] * (not clip_path and (karlo / "image_encoder").is_dir())
    towers = [read_config(karlo / folder) for folder in folders]
    if len(towers) == 1:
        towers.append({"num_hidden_layers": 0, "hidden_act": towers[0].get("hidden_act", "quick_gelu")})
    both = dict(zip(("text_config", "vision_config"), towers)) | {"projection_dim": towers[0].get("projection_dim", 512)}
    config = replace(hugging_face_config(karlo / "text_encoder/config.json", both), unit_norm=False)
    weights = {name.partition(".")[2]: tensor for folder in folders for name, tensor in read_weights(karlo / folder).items()}
    if clip_path:
        other, _ = clip_embed.load_clip(clip_path, karlo / "tokenizer/merges.txt")
        config = replace(other.config, unit_norm=False)
        theirs = hugging_face(other.state_dict())
        for name, tensor in weights.items():
            same = name in theirs and tensor.shape == theirs[name].shape
            if not same or not torch.allclose(tensor.float(), theirs[name], atol=1e-2):
                raise UserError(f"{clip_path}: is not the CLIP that Karlo was trained with: tensor {name} differs")
        weights |= {name: tensor for name, tensor in theirs.items() if name.startswith("vis")}
    weights["logit_scale"] = torch.tensor(math.log(100))  # CLIP's own; neither tower has it
    clip = load_model(CLIP, clip_embed.CLIPConfig, {"stage": "clip", "config": vars(config), "model": weights}, karlo,
                      hugging_face)
    return clip, read_tokenizer(karlo / "tokenizer", config)


def convert(karlo, out, clip_path=None):
    """Write Karlo's stages to `out` as checkpoints, one after the other, each freed before the next; yields their paths.

    clip_path: where the image tower comes from, if not from Karlo's image_encoder/, which only the image variations have.
    Raises UserError where a part of Karlo is missing or is not what its config says.
    """
    for part in PARTS:
        if not (karlo / part).is_dir():
            raise UserError(f"{karlo / part}: no such folder; expected Karlo in the diffusers layout, with {', '.join(PARTS)}")
    out.mkdir(parents=True, exist_ok=True)
    for stage, folder, build in (("clip", "text_encoder", None), ("prior", "prior", load_prior),
                                 ("decoder", "decoder", load_decoder), ("upsample-256", "super_res_first", load_upsampler)):
        dtype = next(t.dtype for t in read_weights(karlo / folder).values() if t.is_floating_point())
        if stage == "clip":
            model, tokenizer = load_towers(karlo, clip_path)
            mark, more = fingerprint(model), {"merges": [" ".join(pair) for pair in tokenizer.merges]}
        else:
            model, more = build(karlo), {"clip": mark}
        path = out / f"{stage}.pt"
        save_atomically({"stage": stage, "config": vars(model.config), "model": model.to(dtype).state_dict()} | more, path)
        del model
        yield path


def main():
    parser = argparse.ArgumentParser(description="Convert Karlo, the public unCLIP, from the diffusers layout to checkpoints for "
                                     "sample.py --weights. Nothing is downloaded: docs/weights.md says where it is published.")
    parser.add_argument("karlo", type=Path, metavar="KARLO", help=f"folder with {', '.join(PARTS)}; and image_encoder, "
                        "if manipulate.py is to read pictures")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for clip.pt, prior.pt, decoder.pt and upsample-256.pt")
    parser.add_argument("--clip", metavar="PATH", help="the same with OpenAI's ViT-L-14.pt or its Hugging Face folder instead")
    args = parser.parse_args()
    with one_line_errors(), torch.no_grad():
        for path in convert(args.karlo, args.out, args.clip):
            print(path, flush=True)


if __name__ == "__main__":
    main()
