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
from functools import lru_cache
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "exercises"))
import child  # noqa: E402
import grade  # noqa: E402
import hand_out  # noqa: E402
import wrong  # noqa: E402
from catalogue import EXERCISES, choose, rows  # noqa: E402
from checks import CHECKS  # noqa: E402

FUNCTIONS = {function: exercise for exercise in EXERCISES for function in exercise.functions}
STAGES = {stage: (ROOT / f"{stage}.py").read_text(encoding="utf-8") for stage in ("clip_embed", "decoder", "prior", "upsample",
    "manipulate")}


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
        if self.sock:
            self.sock.close()
        self.process = None

    def reference(self, name, *args, **kwargs):
        self.helper = REFERENCES.setdefault(self.stage, Threaded(self.stage, STAGES[self.stage], 60))
        return super().reference(name, *args, **kwargs)


REFERENCES = {}  # started once


def verdict_of(function, source):
    student = Threaded(function.partition(".")[0], source, 60)
    try:
        return grade.verdict(student, function)
    finally:
        student.end()


def body(node):
    return node.body[1:] if ast.get_docstring(node) else node.body


# ----------------------------------------------------------------------------- handing out

def test_a_blank_keeps_signature_and_docstring_and_touches_nothing_else():
    source = '''
class A:
    x = 1  # kept

    @staticmethod
    def f(a, b=2):
        """What it does,

        in two paragraphs.
        """
        # how it does it
        return a + b  # the solution
        # and why

    def g(self):
        return 3
'''
    blank = hand_out.blank(source, {"A.f": "exercise 1: x"})
    start, end = source.index("        # how"), source.index("\n    def g")
    assert blank == source[:start] + '        raise NotImplementedError("exercise 1: x")\n' + source[end:]
    assert 'def g(self):\n        raise NotImplementedError("n")\n' in hand_out.blank(source, {"A.g": "n"})


def test_blanks_of_the_stage_files_differ_from_them_in_the_exercises_bodies_alone():
    for stage, source in STAGES.items():
        text = hand_out.sources(EXERCISES)[f"{stage}.py"]
        blank = ast.parse(text)
        reference = ast.parse(source)
        for function in (f.partition(".")[2] for f in FUNCTIONS if f.startswith(f"{stage}.")):
            node, own = hand_out.find(blank, function), hand_out.find(reference, function)
            assert ast.get_docstring(node) == ast.get_docstring(own) and ast.dump(node.args) == ast.dump(own.args)
            exercise = FUNCTIONS[f"{stage}.{function}"]
            raised = ast.parse(f'raise NotImplementedError("exercise {exercise.number}: {exercise.title}")').body
            assert [ast.dump(part) for part in body(node)] == [ast.dump(part) for part in raised]
            assert " #" not in ast.get_source_segment(text, node)  # no comment of the solution's either
            node.body = own.body
        assert ast.dump(blank) == ast.dump(reference)


COMMON = {  # what a solution has in common with other code, and gives nothing of it away
    "torch.autocast(z_i.device.type, enabled=False)", "math.sqrt(c.embed_dim) if c.unit_norm else 1",
    "text['mask'][:, :c.text_context]", "alpha_t = float(alphas_cumprod[t])",
    # random numbers, row by row, as in all losses
    "torch.randint(1000, (1,), generator=g)",
    "[torch.rand(1, generator=g) for g in generators]", "torch.cat([torch.rand(1, generator=g) for g in generators])",
    "torch.cat([torch.rand(1, generator=g) for g in generators]) < drop_caption",
    "drop = torch.cat([torch.rand(1, generator=g) for g in generators]) < drop_caption",
    "[torch.randint(1000, (1,), generator=g) for g in generators]", "torch.cat([torch.randint(1000, (1,), generator=g) for g in generators])",
    "torch.cat([torch.randint(1000, (1,), generator=g) for g in generators]).to",
    "drop_text(text, null, drop.to(z_i.device))", "text = drop_text(text, null, drop.to(z_i.device))",
    "q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))",  # heads, as in every transformer here
    "(y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))", "y.unflatten(-1, (self.heads, -1)).transpose(1, 2)",
    "y.unflatten(-1, (self.heads, -1)).transpose", "y.unflatten(-1, (self.heads, -1))"}


@lru_cache(None)
def expressions(source):
    """Statements and expressions of some size, as text."""
    return {ast.unparse(e) for e in ast.walk(ast.parse(source)) if isinstance(e,
        (ast.expr, ast.stmt)) and sum(1 for _ in ast.walk(e)) >= 12}


def test_no_part_of_a_solution_is_left_in_a_student_copy():
    """Neither as code in a file that is copied nor as a line of a page, whatever exercises are handed out."""
    for numbers in [[], *([exercise.number] for exercise in EXERCISES)]:
        exercises = choose(numbers)
        sources = [*hand_out.sources(exercises).values(),
                   *(path.read_text(encoding="utf-8") for room in ("data", "weights") for path in (ROOT / room).glob("*.py"))]
        pages = [ROOT / "exercises/pages" / exercise.page for exercise in exercises]
        text = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "README.md", ROOT / "exercises/README.md", *(ROOT / "docs").glob("*.md"), *pages))
        left = set()
        for lines in map(str.splitlines, sources):  # definition by definition: most are the same in all copies
            nodes = ast.parse("\n".join(lines)).body
            left |= set().union(*(expressions("\n".join(lines[node.lineno - 1:node.end_lineno])) for node in nodes))
        for function in (f for exercise in exercises for f in exercise.functions):
            stage, _, name = function.partition(".")
            node = hand_out.find(ast.parse(STAGES[stage]), name)
            solution = set().union(*(expressions(ast.unparse(part)) for part in body(node)))
            assert not solution & (left - COMMON), (numbers, function, solution & (left - COMMON))
            lines = STAGES[stage].splitlines()[body(node)[0].lineno - 1:node.end_lineno]
            lines = [line.split("  #")[0].strip() for line in lines]
            assert not [line for line in lines if len(line) > 20 and line in text], (numbers, function)


def test_a_student_copy_imports_shows_help_and_has_a_readme_without_dead_links(tmp_path):
    copy = tmp_path / "copy"
    assert hand_out.hand_out(copy) == list(EXERCISES)
    names = {path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file()}
    assert not [name for name in names if name.startswith(("tests", "experiments", ".ci",
                                                           ".git/")) or name.startswith("exercises/") and name.endswith(".py")]
    scripts = sorted({name for name in names if name.endswith(".py") and "argparse" in (copy / name).read_text(encoding="utf-8")})
    modules = {name for name in names if name.endswith(".py")} - {*scripts}
    assert modules == {f"{room}/{path.name}" for room in ("data", "weights") for path in (ROOT / room).glob("*.py")} - {*scripts}
    run = ("import runpy, sys\nnames, sys.path[0] = sys.argv[1:], '.'\nfor name in names:\n    sys.argv = [name, '--help']\n"
           "    try:\n        runpy.run_path(name, run_name='__main__')\n"
           "    except SystemExit as stop:\n        assert not stop.code, name\n")
    out = subprocess.run([sys.executable, "-c", run, *scripts], cwd=copy, capture_output=True, text=True)
    assert out.returncode == 0 and out.stdout.count("usage:") == len(scripts) == 9, out.stderr
    for page in (name for name in names if name.endswith(".md")):
        text = (copy / page).read_text(encoding="utf-8")
        assert "pytest" not in text
        for link in re.findall(r"\]\(([^)#\s]+)\)", text):
            assert "://" in link or (copy / page).parent.joinpath(link).exists(), (page, link)
    readme = (copy / "README.md").read_text(encoding="utf-8")
    assert not any(word in readme for word in ("Clone", "your clone", "side_by_side", "walkthrough"))  # they are not in a copy
    assert "A student copy." in readme.split("\n\n")[1] and "grade.py" not in readme
    assert "weights/emoji \"" not in readme and not [*copy.rglob("emoji*.md"), *copy.rglob("emoji*.png")]
    with pytest.raises(hand_out.UserError, match="not an empty folder"):
        hand_out.hand_out(copy)


def test_only_hands_out_what_was_asked_for_and_what_would_give_it_away(tmp_path):
    assert [exercise.number for exercise in hand_out.hand_out(tmp_path / "copy", [5])] == [5, 11, 17]
    index = (tmp_path / "copy/exercises/README.md").read_text(encoding="utf-8")
    assert index.count("](pages/") == 3 == len(list((tmp_path / "copy/exercises/pages").glob("*.md")))
    assert (tmp_path / "copy/manipulate.py").read_text(encoding="utf-8") == STAGES["manipulate"]
    with pytest.raises(hand_out.UserError, match="no exercise 21"):
        hand_out.hand_out(tmp_path / "other", [3, 21])


def test_each_exercise_has_its_row_a_page_with_its_signatures_and_two_wrong_answers():
    assert [exercise.number for exercise in EXERCISES] == list(range(1, len(EXERCISES) + 1)) and CHECKS.keys() == FUNCTIONS.keys()
    assert rows(EXERCISES) in (ROOT / "exercises/README.md").read_text(encoding="utf-8")
    assert len(list((ROOT / "exercises/pages").glob("*.md"))) == len(EXERCISES)
    for exercise in EXERCISES:
        page = (ROOT / "exercises/pages" / exercise.page).read_text(encoding="utf-8")
        assert page.startswith(f"# {exercise.number}. {exercise.title}\n\n**Read** ")
        for function in exercise.functions:
            stage, _, name = function.partition(".")
            arguments = ast.unparse(hand_out.find(ast.parse(STAGES[stage]), name).args).replace("'", '"')
            assert f"def {name.split('.')[-1]}({arguments})" in page and f"`{stage}.py`" in page
        assert len(wrong.WRONG[exercise.number]) >= 2


# ----------------------------------------------------------------------------- right, blank and wrong

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


# ----------------------------------------------------------------------------- the grader, with real processes

def attacked(stage, first):
    """A stage file in which functions begin with the statements of `first`, {"function": "statement; statement"}."""
    lines = STAGES[stage].splitlines()
    for name, statements in sorted(first.items(), key=lambda item: -hand_out.find(ast.parse(STAGES[stage]), item[0]).lineno):
        node = hand_out.find(ast.parse(STAGES[stage]), name)
        first, indent = body(node)[0].lineno - 1, " " * node.body[0].col_offset
        lines[first:first] = [indent + line for line in statements.split("\n")]
    return "\n".join(lines)


def wrongs(results):
    """{function: what is wrong with it} of grade's results."""
    return {function: statement for _, _, verdicts in results for function, statement in verdicts.items() if statement}


def test_early_exits_loops_syntax_errors_and_missing_files_cost_their_exercises_alone(tmp_path):
    first = {"cosine_schedule": "import os; os._exit(0)", "q_sample": "while True: pass"}
    (tmp_path / "upsample.py").write_text(attacked("upsample", first), encoding="utf-8")
    (tmp_path / "prior.py").write_text(STAGES["prior"] + "\nthis is no Python\n", encoding="utf-8")
    results = grade.grade(tmp_path, [4, 3, 11], seconds=1)
    found = wrongs(results)
    assert found.pop("upsample.cosine_schedule") == "its process ended before it answered (status 0)"
    assert "endless loop" in found.pop("upsample.q_sample")
    line = len(STAGES["prior"].splitlines()) + 2
    for name in ("cosine_schedule", "q_sample"):
        assert found.pop(f"prior.{name}") == f"prior.py cannot be imported: it raised SyntaxError: invalid syntax (prior.py, line {line})"
    assert set(found.values()) == {"decoder.py is missing"} and [points for _, points, _ in results] == [0, 0, 2]


def grader(*arguments, **options):
    """Run grade.py; (its standard output, results.json)."""
    run = subprocess.run([sys.executable, ROOT / "exercises/grade.py", *map(str, arguments)], capture_output=True, text=True,
                         **options)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.alone
@pytest.mark.slow
def test_grading_a_full_copy_takes_under_three_minutes_and_gives_all_points_or_none(tmp_path):
    began = time.monotonic()
    out = grader(ROOT, "--out", tmp_path / "right.json")
    assert time.monotonic() - began < 180 and out.splitlines()[-1].split() == ["together", "100", "/", "100"]
    tests = json.loads((tmp_path / "right.json").read_text(encoding="utf-8"))["tests"]
    assert len(tests) == len(EXERCISES)
    assert all(test["score"] == test["max_score"] and test["status"] == "passed" for test in tests)
    hand_out.hand_out(tmp_path / "copy")
    out = grader(tmp_path / "copy", "--out", tmp_path / "blank.json")
    assert time.monotonic() - began < 300 and out.splitlines()[-1].split() == ["together", "0", "/", "100"]
    tests = json.loads((tmp_path / "blank.json").read_text(encoding="utf-8"))["tests"]
    assert all(test["score"] == 0 and test["output"].count("not written yet") == len(e.functions) for test,
               e in zip(tests, EXERCISES))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_submission_cannot_talk_the_grader_into_points_or_outlive_it(tmp_path):
    report = "print('together 100 / 100', flush=True); open('results.json', 'w').write('{}'); raise SystemExit(0)"
    leave = ("from multiprocessing.util import spawnv_passfds\nimport os\n"  # beyond the audit hook, in a session of its own
             "spawnv_passfds(b'/usr/bin/setsid', [b'setsid', b'sleep', b'4321.25'], ())\nos._exit(0)")
    hostile = {"cosine_schedule": report, "q_sample": "import os\nwhile True: os.fork()",
               "posterior": "import os; os.kill(os.getppid(), 9)",
               "learned_log_variance": "import os; os.abort()", "normal_kl": "return torch.zeros(1 << 26)",
               "guided": "import gc\nfor s in [o for o in gc.get_objects() if type(o).__name__ == 'socket']: s.send(b'\\xff' "
               "* 64)\nwhile True: pass",
               "ddim_step": "import sys; sys.setrecursionlimit(1 << 30); f = lambda: f(); f()",
               "invert": "x = [torch.ones(1 << 28) for _ in range(99)]",
               "decoder_loss": "import builtins; builtins.isinstance = lambda *a: True; return 'all right\\x1b[2J\\n100 / 100'"}
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "decoder.py").write_text(attacked("decoder", hostile), encoding="utf-8")
    (copy / "upsample.py").write_text(attacked("upsample", {"gaussian_blur": leave}), encoding="utf-8")
    (copy / "prior.py").symlink_to(ROOT / "prior.py")
    os.mkfifo(copy / "manipulate.py")
    out = grader(copy, "--seconds", 8, "--out", tmp_path / "results.json", cwd=tmp_path, timeout=180)
    tests = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["tests"]
    right = {line.partition(":")[0] for test in tests for line in test["output"].splitlines() if line.endswith(": right")}
    assert right == {"decoder.AttentionBlock.forward", "decoder.Decoder.inject", "upsample.cosine_schedule", "upsample.q_sample",
                     "upsample.ddim_step", "upsample.training_crops"}, out
    assert out.count("together") == 1 and "\x1b" not in out and "clip_embed.py is missing" in out and "no ordinary file" in out
    assert "may not call os.fork" in out and "may not call os.kill" in out
    running = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not [command for command in running if b"4321.25" in command]
