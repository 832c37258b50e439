"""Grade a student copy: points, and for each exercise the first statement that does not hold.

    python exercises/grade.py COPY                       # prints a table, writes results.json as Gradescope reads it
    python exercises/grade.py COPY --only 3 7

Each stage file runs in a process of its own (child.py), which only computes: the inputs come from here and the comparing is done
here, against closed forms, properties and this repository's own results (checks.py). So a submission cannot report points, nor
gain any by ending early, looping, crashing or starting processes, and one file's mistakes cost only its own exercises: the other
stage files that it imports are blank ones, and other exercises' functions, where an exercise's code calls them, are this
repository's. The submission runs as the same user, however, and can read and change every file that you can: grade what you do
not trust in a container (INSTRUCTOR.md). Linux; macOS was not tried.
"""

import argparse
import ctypes
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from catalogue import EXERCISES, choose
from checks import CHECKS, Failed
from child import limit_memory, pack, receive, send, unpack
from hand_out import ROOT, UserError, one_line_errors, sources

STARTING = 30  # seconds that importing torch and a stage file may take
LARGEST = 1 << 20  # bytes of a stage file


def clean(text):
    """A submission's words on one line, without control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())[:300]


class Student:
    """A stage file in a process of its own. `content` is its bytes; a process that failed is replaced at the next call."""

    def __init__(self, stage, content, seconds):
        self.stage, self.content, self.seconds = stage, content, seconds
        self.process = self.sock = self.folder = self.helper = None
        self.deadline = math.inf
        self.broken = None  # why the file cannot be imported

    def begin(self):
        """Start a process that will import the file, and the socket to it. Raises OSError."""
        self.folder = tempfile.mkdtemp()
        for name, source in sources(EXERCISES).items():
            Path(self.folder, name).write_text(source, encoding="utf-8")
        Path(self.folder, f"{self.stage}.py").write_bytes(self.content)
        shutil.copytree(ROOT / "weights", Path(self.folder, "weights"), ignore=lambda folder, names: [
            name for name in names if not name.endswith(".py")])  # the code alone: manipulate.py imports it
        self.sock, theirs = socket.socketpair()
        command = [sys.executable, "-I", "-B", Path(__file__).parent / "child.py", str(theirs.fileno()), self.folder, self.stage]
        environment = {"PATH": os.defpath, "HOME": self.folder, "TMPDIR": self.folder, "OMP_NUM_THREADS": "1",
                       "MKL_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, cwd=self.folder, env=environment, pass_fds=[theirs.fileno()],
                                        start_new_session=True,
                                        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        theirs.close()

    def start(self):
        """Start the process, wait until it has imported the file. Raises Failed, at once where that failed before; UserError."""
        if self.broken:
            raise Failed(self.broken)
        began = time.monotonic()
        try:
            self.begin()
        except OSError as error:  # not the submission's fault
            raise UserError(f"cannot start a process for {self.stage}.py: {error}") from None
        try:
            self.talk([], began + STARTING)
        except Failed as failed:
            self.end()
            self.broken = f"{self.stage}.py cannot be imported: {failed}"
            raise Failed(self.broken) from None
        self.deadline += time.monotonic() - began

    def talk(self, functions, deadline):
        """Answer what the process asks of `functions`, until it sends a value. Where it raises Failed the process has ended."""
        def special(kind, content):
            if kind != "function":
                raise ValueError(f"a {kind}")
            return functions[content[0]]

        try:
            while True:
                reply = unpack(receive(self.sock, deadline), special)
                if "function" not in reply:
                    break
                try:
                    answer = pack({"value": functions[reply["function"]](*reply["args"], **reply["kwargs"])}, functions)
                except (Failed, UserError):
                    raise
                except Exception as error:
                    answer = pack({"error": clean(f"{type(error).__name__}: {error}")})
                send(self.sock, answer, deadline)
            if "error" not in reply:
                return reply["value"]
            kind, message, line = (reply["error"][k] for k in ("kind", "message", "line"))
            where = f" ({self.stage}.py, line {line})" if isinstance(line, int) else ""
        except (Failed, UserError):
            self.end()
            raise
        except TimeoutError:
            self.end()
            raise Failed("it took too long: an endless loop?") from None
        except (EOFError, OSError):
            raise Failed(f"its process ended before it answered (status {self.end()})") from None
        except Exception:
            self.end()
            raise Failed("its process sent something that is no answer") from None
        if kind == "NotImplementedError" and str(message).startswith("exercise"):
            raise Failed("not written yet", "blank")
        raise Failed(clean(f"it raised {kind}: {message}{where}"), kind)

    def call(self, name, *args, given=None, alone=True, **kwargs):
        """name(*args, **kwargs), computed by the process. Raises Failed.

        given: functions of this side, put in the places of the file's own of those names. alone: other exercises' functions
        are so replaced by this repository's.
        """
        if not self.process:
            self.start()
        others = [f.partition(".")[2] for e in EXERCISES for f in e.functions if f.partition(".")[0] == self.stage]
        places = {other: partial(self.reference, other) for other in others if alone and other != name and "." not in other}
        functions = []
        request = pack({"call": name, "args": args, "kwargs": kwargs, "given": places | (given or {})}, functions)
        try:
            send(self.sock, request, self.deadline)
        except OSError:
            pass  # receiving tells why
        return self.talk(functions, self.deadline)

    def reference(self, name, *args, **kwargs):
        """This repository's function of that name, in a process too: its arguments are the submission's."""
        if self.helper is None:
            self.helper = Student(self.stage, (ROOT / f"{self.stage}.py").read_bytes(), self.seconds)
        if not self.helper.process:
            began = time.monotonic()
            self.helper.start()
            self.deadline += time.monotonic() - began
        self.helper.deadline = self.deadline
        return self.helper.call(name, *args, alone=False, **kwargs)

    def end(self):
        """End the process and all that it started; returns its exit status."""
        if self.helper:
            self.helper.end()
        if not self.process:
            return None
        self.sock.close()
        try:
            self.process.wait(0.2)  # one that ended by itself has a status of its own
        except subprocess.TimeoutExpired:
            pass
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass
        status = self.process.wait()
        self.process = None
        shutil.rmtree(self.folder, ignore_errors=True)
        return status


def adopt_orphans():
    """Make processes that a submission's process leaves behind children of this one (Linux), so that sweep can end them."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def sweep(seconds=5):
    """End every process that submissions left behind in sessions of their own (Linux; after all Students have ended)."""
    children, until = Path(f"/proc/self/task/{os.getpid()}/children"), time.monotonic() + seconds
    while time.monotonic() < until and children.exists() and (left := children.read_text().split()):
        for pid in map(int, left):
            try:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            except (ProcessLookupError, ChildProcessError):
                pass


def content_of(path):
    """The bytes of a submission's file. Raises Failed where there is none, or none that one could read safely."""
    if path.is_symlink() or not path.is_file():
        raise Failed(f"{path.name} is {'missing' if not path.exists() else 'no ordinary file'}")
    if path.stat().st_size > LARGEST:
        raise Failed(f"{path.name} has more than {LARGEST >> 20} MB")
    return path.read_bytes()


def verdict(student, function):
    """None where the function passes its check, else what is wrong with it, in words."""
    name = function.partition(".")[2]
    student.deadline = time.monotonic() + student.seconds
    try:
        CHECKS[function](partial(student.call, name))
    except Failed as failed:
        return str(failed)
    except UserError:
        raise
    except Exception:  # what it returned cannot even be compared
        return "what it returns does not have the form that its docstring promises"


def grade(folder, numbers=(), seconds=5, progress=lambda exercise: None):
    """[(exercise, points, {function: what is wrong with it or None})] of a student copy. Raises ValueError, UserError."""
    results, stages = {}, {}
    chosen = choose(numbers) if not numbers else [e for e in choose(numbers) if e.number in numbers]
    for exercise in chosen:
        for function in exercise.functions:
            stages.setdefault(function.partition(".")[0], []).append(function)
    for stage, functions in stages.items():
        try:
            student = Student(stage, content_of(Path(folder, f"{stage}.py")), seconds)
        except Failed as failed:
            results |= dict.fromkeys(functions, str(failed))
            continue
        for function in functions:
            progress(function)
            results[function] = verdict(student, function)
        student.end()
    verdicts = [(e, {f: results[f] for f in e.functions}) for e in chosen]
    return [(e, round(e.points * list(v.values()).count(None) / len(v), 2), v) for e, v in verdicts]


def table(results):
    """The table of points, with the first failing statement of each exercise."""
    lines = []
    for exercise, points, verdicts in results:
        lines.append(f"{exercise.number:>3}  {exercise.title:<28}{points:>6g} / {exercise.points}")
        wrong = {}
        for function, statement in verdicts.items():
            wrong.setdefault(statement, []).append(function)
        lines += [f"     {', '.join(functions)}: {statement}" for statement, functions in wrong.items() if statement]
    total, most = sum(points for _, points, _ in results), sum(exercise.points for exercise, _, _ in results)
    return "\n".join([*lines, f"{'together':<33}{total:>6g} / {most}"])


def gradescope(results, seconds):
    """The dictionary that Gradescope reads as results.json."""
    return {"execution_time": round(seconds), "tests": [
        {"name": f"Exercise {exercise.number}: {exercise.title}", "number": str(exercise.number), "score": points,
         "max_score": exercise.points, "status": "passed" if points == exercise.points else "failed",
         "output": "\n".join(f"{function}: {statement or 'right'}" for function, statement in verdicts.items())}
        for exercise, points, verdicts in results]}


def main():
    parser = argparse.ArgumentParser(description="Grade a student copy: a table of points, the first statement that does not "
                                     "hold for "
                                     "each exercise, and results.json as Gradescope reads it.")
    parser.add_argument("folder", type=Path, metavar="COPY", help="the folder that holds the student's clip_embed.py, "
                        "prior.py, …")
    parser.add_argument("--only", type=int, nargs="+", default=[], metavar="N",
                        help="the numbers of some exercises (default: all)")
    parser.add_argument("--seconds", type=float, default=5, help="time that a function's check may take (default 5)")
    parser.add_argument("--out", type=Path, default=Path("results.json"), help="where the results go (default results.json)")
    args = parser.parse_args()
    with one_line_errors():
        if not args.folder.is_dir():
            raise UserError(f"{args.folder}: no such folder")
        if not 0.1 <= args.seconds <= 1000:
            raise UserError(f"--seconds {args.seconds:g}: must be between 0.1 and 1000")
        torch.set_num_threads(1)
        limit_memory(4 << 30)
        adopt_orphans()
        began = time.monotonic()
        try:
            results = grade(args.folder, args.only, args.seconds, lambda function: print(f"\r{function:<50}", end="",
                file=sys.stderr))
        except ValueError as error:
            raise UserError(str(error)) from None
        finally:
            print(f"\r{'':<50}\r", end="", file=sys.stderr)
            sweep()
        args.out.write_text(json.dumps(gradescope(results, time.monotonic() - began), indent=1, ensure_ascii=False),
                            encoding="utf-8")
        print(table(results))


if __name__ == "__main__":
    main()
