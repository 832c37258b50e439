"""Processes that share each batch, stop signals, locks, caches, and settings of the machine.

torchrun starts one process for each GPU; each draws and trains on its share of the rows.
"""

import contextlib
import errno
import functools
import io
import math
import os
import shutil
import signal
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.nn.functional import all_gather

from clip_embed import UserError, pick_device


def join_processes(name):
    """Join torchrun's other processes, if there are any; this process's device. Raises UserError.

    name: "auto", or torch's name of a device.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and torch.cuda.is_available():  # before CUDA's first use, or all begin on GPU 0
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    device = pick_device(name)
    if world == 1:
        return device
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    # a day: the others wait while the first one prepares
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=1))
    return device


def ranks():
    """(this process's number, how many there are) under torchrun, else (0, 1)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@contextlib.contextmanager
def first_before_others():
    """Let torchrun's first process go first; the others then find its files."""
    rank, world = ranks()
    if rank:
        dist.barrier()
    try:
        yield
    finally:  # an error in the first process stops the others too
        if world > 1 and not rank:
            dist.barrier()


def only_first_prints():
    """Silence stderr in all processes but torchrun's first."""
    return contextlib.redirect_stderr(io.StringIO() if ranks()[0] else sys.stderr)


def mean_of_ranks(values, device):
    """The mean over all processes of each number in a list."""
    if not dist.is_initialized():
        return values
    values = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(values)
    return (values / ranks()[1]).tolist()


@contextlib.contextmanager
def asked_to_stop():
    """A list that Ctrl-C and SIGTERM append to, so that a step can be finished.

    A second signal stops at once, but not under torchrun, which repeats the terminal's Ctrl-C.
    """
    asked = []

    def note(number, frame):
        asked.append(number)
        if ranks()[1] == 1:
            signal.signal(number, before[number])

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def lock(file):
    """Lock an open file until it is closed or this process ends, killed or not. Raises OSError."""
    if os.name == "nt":
        import msvcrt
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the data workers do not inherit it


def wait_for_lock(file, message):
    """Lock an open file; if another process holds it, print the message once and wait."""
    while True:
        try:
            return lock(file)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
                return  # a file system without locks
        if message:
            print(message, file=sys.stderr)
        message = ""
        time.sleep(0.2)


def make_once(path, read, write):
    """read(path), a file or folder that write(its name) makes if it is missing or damaged.

    It is written beside `path` and then renamed. If another process writes it, wait for that one.
    Raises UserError, of a full disk too.
    """
    unusable, beside = (OSError, ValueError, EOFError), path.with_name(f"{path.name}.part")
    with contextlib.suppress(*unusable):
        return read(path)
    make_out(path.parent)
    with open(path.with_name(f".{path.name}.lock"), "w") as file:
        wait_for_lock(file, f"{path}: waiting for another process that writes it")
        with contextlib.suppress(*unusable):  # another process may have written it by now
            return read(path)
        try:
            remove(path)
            remove(beside)
            write(beside)
            for part in [*beside.iterdir()] if beside.is_dir() else [beside]:
                with open(part, "rb+") as written:
                    os.fsync(written.fileno())
            os.replace(beside, path)
        except OSError as error:
            remove(beside)  # or it would keep the disk full
            raise UserError(f"{path}: could not be written ({error}): make room, and go on with "
                            "--resume") from None
    return read(path)


def remove(path):
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def make_out(out):
    """Make the folder --out. Raises UserError."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot write there ({error})") from None


def one_at_a_time(train):
    """train(stage, args, device), but a second process that trains this checkpoint is refused."""
    @functools.wraps(train)
    def alone(stage, args, device):
        make_out(args.out)
        if ranks()[0]:  # torchrun's first process locks for all
            return train(stage, args, device)
        with open(args.out / f".{stage}.lock", "w") as file:
            try:
                lock(file)
            except OSError:
                raise UserError(f"{args.out / stage}.pt: another process trains it now; wait for "
                                "its end, or train elsewhere by --out") from None
            return train(stage, args, device)
    return alone


def ignore_stops(worker):
    """Data workers ignore Ctrl-C and SIGTERM, which may reach them too; they end with the trainer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def attention_kernel(device, low):
    """On CPUs in bfloat16 plain matrix products are faster than torch's fused attention."""
    if low and device.type == "cpu":
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # the CPU's too
        return torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    return contextlib.nullcontext()


def gather_rows(z):
    """The rows (B, d) of all processes, in their order; gradients are passed back."""
    return torch.cat(all_gather(z)) if dist.is_initialized() else z


def machine_memory(device):
    """Bytes of memory that a device has; infinite if the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return math.inf
