"""Checkpoints: read, checked, saved whole, exported.

A checkpoint is torch.save of {"stage": its name, "config": its fields, "model": its state_dict, …}.
Files from others are hostile until read: only tensors are unpickled (weights_only), and every name,
shape and value is checked before it moves into a network.
"""

import contextlib
import hashlib
import itertools
import math
import os
import sys
import warnings

import torch
from torch.overrides import TorchFunctionMode

from clip_embed import UserError

# of a config's fields that are first used when a picture is drawn
RANGES = {"steps": (1, 900), "candidates": (1, 1000), "guidance": (0, 100), "eta": (0, 1),
          "ladder_power": (0.01, 100), "top_signal": (0, 0.015), "clamp": (0.01, math.inf),
          "multiples": (1, 1024), "patch_size": (1, 64), "low_size": (2, 256),
          "image_size": (2, 1024)}
CHOICES = {"schedule": ("cosine", "linear"), "enlarge": ("bilinear", "bicubic")}


@contextlib.contextmanager
def reading(path, expected, kind="checkpoint"):
    """Turn any error of reading a foreign file (zip, json, pickle, torch) into one UserError."""
    try:
        with warnings.catch_warnings():  # torch warns of odd pickles; UserError says what matters
            warnings.simplefilter("ignore")
            yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected {expected}") from None
    except Exception as error:
        reason = str(error).strip() or type(error).__name__
        if isinstance(error, KeyError):
            reason = f"{error} is missing or unknown"
        reason = reason.splitlines()[0][:120]
        raise UserError(f"{path}: damaged, or no {kind} ({reason}); expected {expected}") from None


def read_checkpoint(path, stage, mmap=False, clip=None, writer=None):
    """The dictionary in a checkpoint file of a stage. Raises UserError.

    mmap: leave tensors on the disk until they are used. clip: (fingerprint, path) of the CLIP that
    the checkpoint must belong to. writer: the command that writes such files, if not train.py.
    """
    writer = writer or f"train.py {stage}"
    with reading(path, f"the {stage} checkpoint that `python {writer}` writes"):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    parts = {"stage": str, "config": dict, "model": dict}
    if not isinstance(checkpoint, dict) or not all(isinstance(checkpoint.get(name), kind)
                                                   for name, kind in parts.items()):
        raise UserError(f"{path}: holds no stage, config and model; expected a {stage} checkpoint")
    if checkpoint["stage"] != stage:
        raise UserError(f"{path}: is a {checkpoint['stage']!r} checkpoint, expected {stage!r}")
    if clip and checkpoint.get("clip", clip[0]) != clip[0]:
        raise UserError(f"{path}: was trained with CLIP {checkpoint['clip']}, "
                        f"but {clip[1]} is CLIP {clip[0]}")
    for name, tensor in checkpoint["model"].items():
        if isinstance(tensor, torch.Tensor) and (
                tensor.layout != torch.strided or tensor.device.type != "cpu"
                or tensor.is_quantized or tensor.is_complex()):
            raise UserError(f"{path}: tensor {name} is sparse, complex, quantized or without "
                            "values; expected plain numbers")
    return checkpoint


def fault(field, value, default, most):
    """What is wrong with a config's value, in words; "" if nothing is. most: the largest number."""
    kind = type(default)
    if type(value) not in ((int, float) if kind is float else (kind,)):
        return f"expected a value like {default!r}"
    if kind is str:
        choices = CHOICES.get(field, (value,))
        return "" if value in choices else f"expected one of {choices}"
    low, high = RANGES.get(field, (0, most))
    if kind is not tuple:
        inside = low <= value <= high
    else:  # of whole numbers
        inside = all(type(n) is int and low <= n <= high for n in value)
    return "" if inside else f"a number outside {low}…{high}"


def config_of(config_class, checkpoint, path):
    """A checkpoint's config as a dataclass, its fields and numbers checked. Raises UserError.

    A missing field takes its default: the file may be older than the field.
    """
    default = vars(config_class())
    config = default | checkpoint["config"]
    if config.keys() != default.keys():
        raise UserError(f"{path}: its config has the fields {[*config]}, expected {[*default]}")
    for field, value in config.items():
        counts_layers = "layers" in field or field == "depth"
        most = len(checkpoint["model"]) if counts_layers else 1 << 20  # no more layers than tensors
        if wrong := fault(field, value, default[field], most):
            raise UserError(f"{path}: its config says {field} = {value!r:.40}, {wrong}")
    if "multiples" in config:  # a U-Net halves the side, an upsampler multiplies it
        side, low = config["image_size"], config.get("low_size", config["image_size"] // 4)
        if side % (config["patch_size"] << max(0, len(config["multiples"]) - 1)) or side > 4 * low:
            raise UserError(f"{path}: its config says image_size = {side}, which its levels do "
                            "not divide or is more than 4 times low_size")
    return config_class(**config)


def check_tensors(want, have, stage, path):
    """Raise UserError unless `have` holds the tensors of `want`: names, shapes, finite values."""
    for name in want | have:
        if name not in have:
            raise UserError(f"{path}: tensor {name} is missing, "
                            f"expected shape {tuple(want[name].shape)}")
        if name not in want:
            raise UserError(f"{path}: tensor {name} is surplus, the {stage} has none of that name")
        shape = tuple(getattr(have[name], "shape", ()))
        if not isinstance(have[name], torch.Tensor) or shape != tuple(want[name].shape):
            raise UserError(f"{path}: tensor {name} has shape {shape}, "
                            f"expected {tuple(want[name].shape)}")
        if not torch.isfinite(have[name]).all():
            raise UserError(f"{path}: tensor {name} holds values that are not finite "
                            "(NaN or infinity)")
        if name == "errors" and (have[name] < 0).any():  # variances
            raise UserError(f"{path}: tensor errors holds negative values")


class WithoutWeights(TorchFunctionMode):
    """Within it networks are built without initial values. Raises ValueError beyond `most` numbers.

    Memory that no value was written to takes no room. The meta device would do as well, but its
    arithmetic imports torch._dynamo, which takes longer than loading the shipped weights.
    """
    FACTORIES = {"empty", "zeros", "ones", "full", "rand", "randn", "eye", "arange", "linspace"}
    VALUES = {"normal_", "uniform_", "zero_", "fill_"}

    def __init__(self, most):
        super().__init__()
        self.left = most

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.__name__, kwargs or {}
        if name in self.VALUES or getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        sizes = [n for n in args if isinstance(n, (int, float))]
        if args and isinstance(args[0], (tuple, list)):
            sizes = args[0]
        tensors = [t for part in args for t in (part if isinstance(part, (tuple, list)) else [part])
                   if isinstance(t, torch.Tensor)]
        needed = 0
        if name in self.FACTORIES:
            needed = math.prod(max(1, int(abs(n))) for n in sizes)
            needed **= 2 if name == "eye" and len(sizes) == 1 else 1
        elif name in ("cat", "stack"):
            needed = sum(t.numel() for t in tensors)
        elif len(tensors) > 1:  # a sum or product: as large as both stretched to one shape
            shapes = (t.shape[::-1] for t in tensors)
            needed = math.prod(map(max, itertools.zip_longest(*shapes, fillvalue=1)))
        if needed > self.left:
            raise ValueError("it would be much larger than its weights are")
        self.left -= needed
        return (torch.empty if name in ("rand", "randn") else func)(*args, **kwargs)


def load_model(build, config_class, checkpoint, path, layout=dict):
    """A stage's network with a checkpoint's weights, float32, in eval mode. Raises UserError.

    The network takes memory only after every tensor is checked. layout: gives its state_dict the
    names and orientations of the file, as views (published.hugging_face is one).
    """
    config, have = config_of(config_class, checkpoint, path), checkpoint["model"]
    try:
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() // t.element_size()
                    for t in have.values() if isinstance(t, torch.Tensor)}
        with WithoutWeights(2 * sum(storages.values()) + (1 << 20)):  # a shared one counts once
            model = build(config)
    except Exception as error:  # a foreign config can be wrong in any way
        raise UserError(f"{path}: no network can be built from its config ({error})") from None
    if hasattr(model, "components") and checkpoint["stage"] == "prior" and "deviation" not in have:
        names = ("mean", "components", "deviation")  # an older prior: z_i times the paper's number
        have |= {name: getattr(model, name).clone() for name in names}
    check_tensors(layout(model.state_dict()), have, checkpoint["stage"], path)
    model.requires_grad_(False)
    for name, parameter in layout(model.state_dict()).items():
        parameter.copy_(have.pop(name))  # popped: a large tensor is never in memory twice
    return model.eval()


def load_stage(path, network, config_class, clip=None, mmap=False):
    """The network in FOLDER/STAGE.pt, as read_checkpoint and load_model give it. Raises UserError."""
    checkpoint = read_checkpoint(path, path.stem, mmap, clip)
    return load_model(network, config_class, checkpoint, path)


def fingerprint(network, digits=torch.float16):
    """Sixteen hex digits that name a network by its weights, the same for its copy in `digits`."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().to(digits).half().flatten().numpy())
    return digest.hexdigest()[:16]


def check_out(out, *inputs, suffix=None):
    """Make out's folder (out itself, if it has no suffix) before the work. Raises UserError.

    inputs: files that out must not be. suffix: the one that out must have.
    """
    if suffix and out.suffix != suffix:
        raise UserError(f"--out {out}: must end in {suffix}")
    try:
        (out.parent if out.suffix else out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot write there ({error})") from None
    if out.exists() and any(os.path.exists(path) and out.samefile(path) for path in inputs):
        raise UserError(f"{out}: would be overwritten; give another name")


def save_atomically(content, path):
    """torch.save beside the file, then rename: a crash or a full disk leaves the old file whole.

    Raises UserError.
    """
    beside = path.with_suffix(".part")
    try:
        with open(beside, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:  # torch's own writer raises RuntimeError
        beside.unlink(missing_ok=True)
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: could not be written ({reason}); what was there before still is: "
                        "make room, and if this was training go on with --resume") from None


def same_sizes(saved, config):
    """Whether two configs, as dictionaries, describe one network.

    Sampling's fields are left out, and the vocabulary of a decoder that reads no tokens.
    """
    differing = {k for k in saved | config if saved.get(k) != config.get(k)}
    unread = {"vocab_size"} if config.get("text_layers") == 0 else set()
    return differing <= {"guidance", "steps", "ladder_power", "candidates", "enough"} | unread


def resume(run, settings, path, steps=None):
    """Set a new train.Run to the state in its checkpoint. Raises UserError if it cannot go on.

    settings: the seed, the batch size, the data's mark, CLIP's fingerprint, … steps: how many are
    asked for, if any are.
    """
    saved = read_checkpoint(path, run.stage)
    state = saved.get("training")
    if state is None:
        raise UserError(f"{path}: cannot be resumed, it has no optimizer state")
    with reading(path, f"a {run.stage} checkpoint with the state of its training"):
        if steps and steps < state["step"]:
            raise UserError(f"--steps {steps}: {path} has {state['step']} steps already")
        was = state["extra"] | {"seed": state["seed"], "batch size": state["recipe"]["batch_size"]}
        for name in was | settings:
            if was.get(name) != settings.get(name):
                raise UserError(f"{path}: cannot be resumed, it was trained with another {name}: "
                                f"{was.get(name)!s:.40}, not {settings.get(name)!s:.40}")
        if not same_sizes(saved["config"], vars(run.context.config)):  # last: captions change them
            raise UserError(f"{path}: cannot be resumed, it has other sizes")
        run.model.load_state_dict(state["model"])
        run.ema.load_state_dict(saved["model"])  # averaged: what others load
        run.optimizer.load_state_dict(state["optimizer"])
        run.step, run.rows, run.recent = state["step"], state["rows"], state["recent"]


def export(runs, folder, stages):
    """Copy a run's checkpoints of `stages` to `folder` in half precision, without training state.

    Stages that are not trained yet are left out, but CLIP must be there. Raises UserError.
    """
    paths = {stage: runs / f"{stage}.pt" for stage in stages}
    there = [stage for stage in stages if stage == "clip" or paths[stage].exists()]
    for stage in there:  # all are read before the first is written
        if read_checkpoint(paths[stage], stage, mmap=True).get("training") is None:
            raise UserError(f"{paths[stage]}: has no training state, it is an export already")
    folder.mkdir(parents=True, exist_ok=True)
    for stage, path in paths.items():
        if stage not in there:
            print(f"{path}: not trained yet, left out", file=sys.stderr)
            continue
        checkpoint = read_checkpoint(path, stage)
        training = checkpoint.pop("training")
        for name, tensor in checkpoint["model"].items():
            if stage != "clip":  # bfloat16's digits compress better; CLIP's name is its fingerprint
                tensor = tensor.bfloat16()
            checkpoint["model"][name] = tensor.half()
        checkpoint["trained"] = {k: training[k] for k in ("step", "recipe", "seed")}
        save_atomically(checkpoint, folder / f"{stage}.pt")
        print(folder / f"{stage}.pt")
