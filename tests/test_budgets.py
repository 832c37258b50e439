"""The code stays short enough to be read beside the paper, and nothing hangs on what it should not."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STAGES = ("clip_embed", "prior", "decoder", "upsample")
LINES, BYTES = {name: 550 for name in (*STAGES, "sample", "manipulate")} | {"train": 650}, {"train": 32_000}
TREES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
         for pattern in ("*.py", "data/*.py", "weights/*.py") for path in ROOT.glob(pattern)}


def functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def test_the_seven_files_keep_their_budgets(capsys):
    """In lines, bytes, columns and lines a function; prints the table."""
    table = {}
    for name in LINES:
        text = (ROOT / f"{name}.py").read_text(encoding="utf-8")
        lengths = [node.end_lineno - node.lineno + 1 for node in functions(TREES[f"{name}.py"])]
        table[name] = text.count("\n"), len(text.encode()), max(map(len, text.splitlines())), max(lengths)
    total = [sum(column) for column in list(zip(*table.values()))[:2]]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    with capsys.disabled():
        print("\n\nfile          lines    bytes  columns  longest function")
        for name, (lines, size, columns, longest) in table.items():
            print(f"{name + '.py':13} {lines:5} {size:8,} {columns:8} {longest:17}")
        print(f"{'together':13} {total[0]:5} {total[1]:8,}\n{'README.md':13} {readme.count(chr(10)):5} {len(readme.encode()):8,}")
    for name, (lines, size, columns, longest) in table.items():
        assert lines <= LINES[name] and size <= BYTES.get(name, 28_000) and columns <= 100 and longest <= 60, name
    assert total[0] <= 3400 and total[1] <= 175_000
    assert readme.count("\n") <= 150 and len(readme.encode()) <= 10_000


def imports(tree):
    """(module, whether inside a function) of each import."""
    inside = {id(node) for function in functions(tree) for node in ast.walk(function)}
    for node in ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) else []
        yield from ((name.split(".")[0], id(node) in inside) for name in names)


@pytest.mark.parametrize("path", sorted(TREES))
def test_arrows_point_one_way(path):
    """A stage imports nothing of the project, but inside a function CLIP and weights/; data/ at most CLIP and itself."""
    name, room = Path(path).stem, Path(path).parent.name
    ours = {*STAGES, "sample", "train", "manipulate", "data", "weights"}
    for module, inside in imports(TREES[path]):
        if module not in ours:
            assert module in {"torch", "numpy", "PIL", "tqdm"} or module in sys.stdlib_module_names, (path, module)
        elif room == "data":
            assert module in ("clip_embed", "data")
        elif room == "weights":
            assert module in ("clip_embed", "weights") or name in ("karlo", "stack") and module in STAGES
        elif name in STAGES:
            assert inside and module in ("clip_embed", "weights") or name == "clip_embed" and module == "clip_embed"
        elif name == "train":
            assert module in (*STAGES, "sample", "data", "weights")
        else:
            assert module in (*STAGES, "weights") or name == "manipulate" and module == "sample"


def test_every_public_function_says_what_it_is():
    for path, tree in TREES.items():
        nodes = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
        bare = [node.name for node in nodes if node.name not in ("main", "parse_arguments") and not ast.get_docstring(node)]
        assert not bare, (path, bare)
