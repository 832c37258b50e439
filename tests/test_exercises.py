"""The exercises: blanks, checks, wrong answers, and a grader that a submission cannot talk into anything."""

import ast
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "exercises"))
import child  # noqa: E402
import grade  # noqa: E402
import hand_out  # noqa: E402
import wrong  # noqa: E402
from catalogue import EXERCISES, choose  # noqa: E402
from checks import CHECKS  # noqa: E402

FUNCTIONS = {function: exercise for exercise in EXERCISES for function in exercise.functions}
STAGES = {stage: (ROOT / f"{stage}.py").read_text(encoding="utf-8") for stage in ("clip_embed", "decoder", "prior", "upsample", "manipulate")}


class Threaded(grade.Student):
    """A Student in a thread of this process: the same messages, without seconds of importing torch."""

    def begin(self):
        self.sock, theirs = socket.socketpair()
        self.process = threading.Thread(target=self.run, args=(theirs,), daemon=True)
        self.process.start()

    def run(self, sock):
        module = types.ModuleType(self.stage)
        module.__file__ = f"{self.stage}.py"
        sys.modules[module.__name__], own = module, sys.modules.get(module.__name__)  # dataclasses look there
        try:
            exec(compile(self.content, module.__file__, "exec"), vars(module))
        finally:
            sys.modules[module.__name__] = own or module
        child.send(sock, child.pack({"value": None}))
        child.serve(sock, module)

    def end(self):
        for student in filter(None, (self.helper, self)):
            if student.sock:
                student.sock.close()
            student.process = None

    def start(self):
        if self.helper is None and self.content != STAGES[self.stage]:
            self.helper = REFERENCES.setdefault(self.stage, Threaded(self.stage, STAGES[self.stage], 60))
        super().start()


REFERENCES = {}


def verdict_of(function, source):
    student = Threaded(function.partition(".")[0], source, 60)
    try:
        return grade.verdict(student, function)
    finally:
        student.helper = None
        student.end()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_reference_is_right_and_the_blank_is_not(function):
    stage, _, name = function.partition(".")
    assert verdict_of(function, STAGES[stage]) is None
    assert verdict_of(function, hand_out.blank(STAGES[stage], {name: "exercise 0: x"})) == "not written yet"


@pytest.mark.parametrize("number, case", [(number, k) for number, cases in wrong.WRONG.items() for k in range(len(cases))])
def test_a_wrong_answer_is_refused_with_a_message_that_points_at_it(number, case):
    name, _, says, changes = wrong.WRONG[number][case]
    for function in (f for f, exercise in FUNCTIONS.items() if exercise.number == number and f.partition(".")[2] == name):
        stage = function.partition(".")[0]
        assert says in (verdict_of(function, wrong.apply(STAGES[stage], name, changes)) or "accepted")
