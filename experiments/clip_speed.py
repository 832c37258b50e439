"""Speed and memory of a published CLIP: loading from disk and embedding (Linux only).

The script writes a folder in Hugging Face's layout, with random weights of the true sizes. It drops
the file from the page cache and loads it in a fresh process. Memory means anonymous memory, RssAnon
of /proc/self/status, sampled every 5 ms. The mapped pages of the weights file do not count, because
the kernel can drop them at any time.

    python experiments/clip_speed.py                      # ViT-L/14, 428M parameters, float16
    python experiments/clip_speed.py --dtype F32 --model ViT-B/32
"""

import argparse
import json
import os
import struct
import subprocess
import sys
import tempfile
import threading
import time
from itertools import islice, product
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import clip_embed
from weights import checkpoints, published

MODELS = {"ViT-B/32": clip_embed.CLIPConfig(512, 224, 32, 768, 12, 12, 77, 49408, 512, 12, 8),
          "ViT-L/14": clip_embed.CLIPConfig(embed_dim=768, image_size=224, vision_patch_size=14, vision_width=1024, vision_layers=24,
                                            vision_heads=16, vocab_size=49408, text_width=768, text_layers=12, text_heads=12)}


def write_folder(folder, config, dtype):
    """Write a Hugging Face folder of random weights: config.json, model.safetensors, merges.txt.

    merges.txt has as many merges as the vocabulary needs.
    """
    with torch.device("meta"):
        tensors = published.hugging_face(clip_embed.CLIP(config).state_dict())
    header, at = {}, 0
    for name, t in tensors.items():
        end = at + t.numel() * published.DTYPES[dtype].itemsize
        header[name], at = {"dtype": dtype, "shape": list(t.shape), "data_offsets": [at, end]}, end
    with open(folder / "model.safetensors", "wb") as file:
        text = json.dumps(header).encode()
        file.write(struct.pack("<Q", len(text)) + text)
        for t in tensors.values():
            file.write((torch.randn(t.shape) * 0.02).to(published.DTYPES[dtype]).numpy().tobytes())
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # the next read is from disk
    sizes = {"hidden_size": config.text_width, "num_hidden_layers": config.text_layers, "num_attention_heads": config.text_heads,
             "vocab_size": config.vocab_size, "hidden_act": config.hidden_act}
    (folder / "config.json").write_text(json.dumps({
        "model_type": "clip", "projection_dim": config.embed_dim, "text_config": sizes, "vision_config": {
            "hidden_size": config.vision_width, "num_hidden_layers": config.vision_layers, "num_attention_heads": config.vision_heads,
            "image_size": config.image_size, "patch_size": config.vision_patch_size, "hidden_act": config.hidden_act}}))
    letters = clip_embed.bytes_to_unicode().values()
    merges = islice(product(letters, [c + "</w>" for c in letters]), config.vocab_size - 514)
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]), "utf-8")


def anonymous():
    """Bytes of anonymous memory of this process."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


def measure(folder, images, captions):
    """Load the folder and embed. Prints one line per figure."""
    before, peak, done = anonymous(), 0, threading.Event()

    def watch():
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    clip, tokenizer = clip_embed.load_clip(folder)
    seconds = time.perf_counter() - began
    done.set()
    watcher.join()
    size = sum(4 * p.numel() for p in clip.parameters())
    print(f"from disk to ready: {seconds:.1f} s ({size / 4e6:.0f}M parameters)")
    print(f"peak anonymous memory: {peak / 1e9:.2f} GB, {peak / size:.2f} x the weights in float32 ({before / 1e9:.2f} GB of it python "
          "and torch)")
    began = time.perf_counter()
    checkpoints.fingerprint(clip)
    print(f"fingerprint: {time.perf_counter() - began:.1f} s")
    with torch.no_grad():
        for name, count, embed in (
                ("images", images, lambda: clip.encode_image(torch.zeros(images, 3, *[clip.config.image_size] * 2))),
                ("captions", captions, lambda: clip_embed.encode_captions(clip, tokenizer, [f"picture {k}" for k in range(captions)]))):
            began = time.perf_counter()
            embed()
            print(f"{count / (time.perf_counter() - began):.2f} {name}/s")


def main():
    parser = argparse.ArgumentParser(
        description="Load random weights of a published CLIP's sizes and embed with them: seconds, "
        "peak anonymous memory, images/s, captions/s.")
    parser.add_argument("--model", default="ViT-L/14", choices=MODELS, help="default ViT-L/14")
    parser.add_argument("--dtype", default="F16", choices=["F16", "F32"],
                        help="type of the weights on the disk (default F16)")
    parser.add_argument("--images", type=int, default=16, help="images in one batch (default 16)")
    parser.add_argument("--captions", type=int, default=100,
                        help="captions in one batch (default 100)")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        return measure(args.measure, args.images, args.captions)
    with clip_embed.one_line_errors(), tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder), MODELS[args.model], args.dtype)
        print(f"{args.model}, {args.dtype}, {(Path(folder) / 'model.safetensors').stat().st_size / 1e9:.2f} GB on the disk, "
              f"{torch.get_num_threads()} threads", flush=True)
        subprocess.run([sys.executable, __file__, "--measure", folder, "--images", str(args.images), "--captions", str(args.captions)],
                       check=True)


if __name__ == "__main__":
    main()
