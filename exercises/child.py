"""The process in which a submission runs: it computes what grade.py asks for and sends back what came out, raw.

    python -I child.py SOCKET FOLDER STAGE       (grade.py starts it)

A message is a length, then JSON, then the bytes of the tensors in it: no pickle. Of what the child sends, only numbers,
strings, lists, dictionaries and tensors can be read; whether they are right is decided in the other process.
"""

import contextlib
import importlib
import json
import math
import os
import resource
import socket
import struct
import sys
import time
import traceback
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

MOST = 64 << 20  # bytes of a message
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
    torch.bool)}
REFUSED = {"os.fork", "os.forkpty", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "subprocess.Popen", "pty.spawn",
           "os.kill",
           "os.killpg", "socket.connect", "ctypes.dlopen", "ctypes.dlsym"}  # what a submission has no business with


class Made:
    """A request to build something on the other side: module.name(*args, **kwargs), filled with weights where there are any."""

    def __init__(self, name, *args, weights=None, **kwargs):
        self.parts = [name, list(args), kwargs, weights]


class Given:
    """In the child, a function that runs in the other process."""

    def __init__(self, number, attributes, ask):
        self.number, self.ask = number, ask
        vars(self).update(attributes)

    def __call__(self, *args, **kwargs):
        return self.ask({"function": self.number, "args": args, "kwargs": kwargs})


def pack(value, functions=None):
    """The bytes of nested lists, tuples, dictionaries, numbers, strings, None and tensors. Raises TypeError for other things.

    Where `functions`, a list, is given, also those that only grade.py sends: functions (they stay here, in the list, and their
    number goes), Made, generators just seeded, pictures, dataclasses (as plain namespaces).
    """
    blobs = []

    def plain(v):
        if v is None or isinstance(v, (bool, int, float, str)):
            return v
        if isinstance(v, torch.Tensor):
            flat = v.detach().cpu().clone(memory_format=torch.contiguous_format).reshape(-1)
            blobs.append(flat.view(torch.uint8).numpy().tobytes())
            return {"tensor": [str(v.dtype).removeprefix("torch."), list(v.shape), v.requires_grad]}
        if isinstance(v, (list, tuple)):
            return {"tuple" if isinstance(v, tuple) else "list": [plain(part) for part in v]}
        if isinstance(v, dict):
            return {"dict": [[plain(k), plain(part)] for k, part in v.items()]}
        if isinstance(v, Given):
            return {"function": [v.number, plain({})]}
        if functions is not None:
            if isinstance(v, Made):
                return {"made": plain(v.parts)}
            if isinstance(v, torch.Generator):
                return {"generator": v.initial_seed()}
            if isinstance(v, np.random.SeedSequence):
                return {"rng": v.entropy}
            if isinstance(v, Image.Image):
                return {"picture": plain(torch.from_numpy(np.array(v)))}
            if hasattr(v, "__dataclass_fields__"):
                return {"namespace": plain(vars(v))}
            if callable(v):
                functions.append(v)
                return {"function": [len(functions) - 1, plain(vars(v) if hasattr(v, "__dict__") else {})]}
        raise TypeError(f"a {type(v).__name__} cannot be compared: expected tensors, numbers, strings, lists, tuples or "
                        f"dictionaries")

    head = json.dumps(plain(value)).encode()
    return struct.pack("<Q", len(head)) + head + b"".join(blobs)


def unpack(data, special):
    """What pack made bytes of; special(kind, content) makes the things beyond plain data. Raises ValueError on anything odd."""
    data = bytearray(data)
    start, = struct.unpack_from("<Q", data)
    place = start + 8

    def value(v):
        nonlocal place
        if not isinstance(v, dict):
            if isinstance(v, list):
                raise ValueError("a list that has no kind")
            return v
        (kind, content), = v.items()
        if kind == "tensor":
            name, shape, grad = content
            dtype, count = DTYPES[name], math.prod(shape)
            if min(shape, default=0) < 0 or place + count * dtype.itemsize > len(data):
                raise ValueError("a tensor larger than its message")
            tensor = torch.empty(shape, dtype=dtype)
            if count:
                size = count * dtype.itemsize
                tensor = torch.frombuffer(data, dtype=torch.uint8, count=size, offset=place).clone().view(dtype).view(shape)
                place += size
            return tensor.requires_grad_() if grad else tensor
        if kind in ("list", "tuple"):
            return (list if kind == "list" else tuple)([value(part) for part in content])
        if kind == "dict":
            return {value(k): value(part) for k, part in content}
        if kind == "function":
            return special(kind, [content[0], value(content[1])])
        return special(kind, value(content) if isinstance(content, dict) else content)

    return value(json.loads(data[8:start + 8]))


def send(sock, data, deadline=math.inf):
    """Write one message. Raises OSError (TimeoutError past the deadline, by time.monotonic), ValueError for one too large."""
    if len(data) > MOST:
        raise ValueError(f"the answer has {len(data) >> 20} MB, far more than the right one")
    left = memoryview(struct.pack("<Q", len(data)) + data)
    while left:
        wait(sock, deadline)
        left = left[sock.send(left):]


def receive(sock, deadline=math.inf):
    """Read one message. Raises EOFError where the other side has gone, OSError (TimeoutError past the deadline), ValueError."""
    def read(count):
        data = bytearray()
        while len(data) < count:
            wait(sock, deadline)
            part = sock.recv(min(1 << 20, count - len(data)))
            if not part:
                raise EOFError
            data += part
        return bytes(data)

    length, = struct.unpack("<Q", read(8))
    if length > MOST:
        raise ValueError("an answer far larger than the right one")
    return read(length)


def wait(sock, deadline):
    """Give the socket's next operation what is left of the time."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    sock.settimeout(None if left == math.inf else left)


def find(module, name):
    """(what holds it, last name) of a dotted name: a method of a class, a function of a module that the stage imports."""
    *path, last = name.split(".")
    for part in path:
        module = getattr(module, part)
    return module, last


def complaint(error, path):
    """What to tell of an exception: its kind, message, and the last line of the submission's file that it passed."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    if isinstance(error, SyntaxError):
        lines = [error.lineno]
    return {"kind": type(error).__name__, "message": str(getattr(error, "msg", error))[:300],
            "line": lines[-1] if lines else None}


def serve(sock, module):
    """Answer calls until the other side closes: {"call": name, "args", "kwargs", "given": {name: function}}.

    `given` are other exercises' functions, put in their places while this one runs, and taken out after it.
    """
    def ask(question):
        send(sock, pack(question))
        reply = unpack(receive(sock), make)
        if "error" in reply:
            raise RuntimeError(reply["error"])
        return reply["value"]

    def make(kind, content):
        if kind == "function":
            return Given(*content, ask)
        if kind == "made":
            name, args, kwargs, weights = content
            built = getattr(module, name)(*args, **kwargs)
            if weights is not None:
                built.load_state_dict(weights)
                built.requires_grad_(False).eval()
            return built
        return {"generator": lambda seed: torch.Generator().manual_seed(seed), "rng": np.random.default_rng,
                "picture": lambda pixels: Image.fromarray(pixels.numpy()),
                "namespace": lambda v: SimpleNamespace(**v)}[kind](content)

    while True:
        try:
            data = receive(sock)
        except EOFError:
            return
        places = []
        try:
            request = unpack(data, make)
            for name, function in request["given"].items():
                holder, last = find(module, name)
                places.append((holder, last, getattr(holder, last)))
                setattr(holder, last, function)
            holder, last = find(module, request["call"])
            torch.manual_seed(0)
            answer = pack({"value": getattr(holder, last)(*request["args"], **request["kwargs"])})
            if len(answer) > MOST:
                raise ValueError(f"what it returns has {len(answer) >> 20} MB, far more than the right answer")
        except BaseException as error:  # SystemExit and KeyboardInterrupt too: a submission may raise anything
            answer = pack({"error": complaint(error, getattr(module, "__file__", None))})
        for holder, last, own in reversed(places):
            setattr(holder, last, own)
        send(sock, answer)


def limit_memory(more):
    """Let this process have `more` bytes of address space beyond what it has, where /proc tells (not on macOS)."""
    try:
        with open("/proc/self/statm") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + more,) * 2)
    except (OSError, ValueError):  # no /proc, or less is allowed already
        pass


def limit_processes(more):
    """Let this process's user have `more` processes and threads beyond those there are (Linux; the superuser is exempt)."""
    mine = 0
    for pid in filter(str.isdigit, os.listdir("/proc") if sys.platform == "linux" else []):
        with contextlib.suppress(OSError):  # one that has just ended
            mine += len(os.listdir(f"/proc/{pid}/task")) * (os.stat(f"/proc/{pid}").st_uid == os.getuid())
    with contextlib.suppress(ValueError):  # fewer are allowed already
        if mine:
            resource.setrlimit(resource.RLIMIT_NPROC, (mine + more,) * 2)


def restrain():
    """Take from this process what a submission does not need: memory, large files, new processes, signals, the network."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    limit_memory(2 << 30)
    limit_processes(256)

    def hook(event, args):
        if event in REFUSED:
            raise PermissionError(f"a submission may not call {event}")
    sys.addaudithook(hook)


def main():
    """Import the submission's file, say whether that went well, serve."""
    sock = socket.socket(fileno=int(sys.argv[1]))
    folder, stage = sys.argv[2:]
    torch.set_num_threads(1)
    sys.path.insert(0, folder)
    sys.dont_write_bytecode = True
    restrain()
    try:
        module = importlib.import_module(stage)
        report = {"value": None}
    except BaseException as error:
        report = {"error": complaint(error, f"{folder}/{stage}.py")}
    send(sock, pack(report))
    if "value" in report:
        serve(sock, module)


if __name__ == "__main__":
    main()
