"""Write a student copy of the repository: the functions of the exercises are blank, and nothing else in it solves them.

    python exercises/hand_out.py COPY                  # all exercises
    python exercises/hand_out.py COPY --only 3 7       # two of them, the other functions as they are

A blank keeps its signature and docstring and raises NotImplementedError("exercise 7: …"). Blanks are cut by syntax tree from
this repository's files, so there is one source of truth. Only what a student needs is copied: the stage files, the README,
docs/ without the pages that quote the code, data/, weights/, and the exercises' pages; not tests/ and experiments/, nor what grades,
which would give solutions away.
"""

import argparse
import ast
import os
import re
import shutil
import sys
from pathlib import Path

from catalogue import choose, rows

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))
from clip_embed import UserError, one_line_errors  # noqa: E402

COPIED = ("*.py", "README.md", "LICENSE", "requirements.txt", ".gitignore", "docs/*.md", "docs/*.png", "docs/*.txt",
          "docs/pictures/*", "weights/*.py", "data/*.py", "weights/shapes/*", "exercises/pages/*.png")


def find(tree, name):
    """The definition of "function" or "Class.method" in a module's syntax tree. Raises KeyError."""
    for part in name.split("."):
        tree = {node.name: node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}[part]
    return tree


def blank(source, solutions):
    """A module's source in which functions are blank; solutions: {"function" or "Class.method": the message to raise}.

    Of each body the docstring stays; the rest goes, its comments too. All other lines are as they were.
    """
    tree, lines = ast.parse(source), source.splitlines()
    for node, message in sorted(((find(tree, name), text) for name, text in solutions.items()), key=lambda pair: -pair[0].lineno):
        indent = " " * node.body[0].col_offset
        has_docstring = ast.get_docstring(node, clean=False) is not None
        first = node.body[0].end_lineno if has_docstring else node.body[0].lineno - 1  # lines that stay, counted from the top
        last = node.end_lineno
        while last < len(lines) and lines[last].startswith(indent + "#"):
            last += 1
        lines[first:last] = [f'{indent}raise NotImplementedError("{message}")']
    return "\n".join(lines) + "\n"


def sources(exercises):
    """{"prior.py": source, …} of the top-level files, with the functions of these exercises blank."""
    solutions = {}
    for exercise in exercises:
        for function in exercise.functions:
            stage, _, name = function.partition(".")
            solutions.setdefault(f"{stage}.py", {})[name] = f"exercise {exercise.number}: {exercise.title}"
    return {path.name: blank(path.read_text(encoding="utf-8"), solutions.get(path.name,
        {})) for path in sorted(ROOT.glob("*.py"))}


def student_readme(text, exercises, names):
    """README.md for a copy of these files (relative names): a note on top, no word of what is not there."""
    blanks = ", ".join(str(exercise.number) for exercise in exercises)
    note = (f"> **A student copy.** The functions of these exercises are blank: {blanks}. Begin with [the exercises' page]"
            "(exercises/README.md). Every script already shows its `--help`; what meets a blank stops with `NotImplementedError` "
            "and the exercise's number, and works when that exercise is done. So the first command below installs everything and then "
            "stops at the first blank: that is right. The pictures and figures below were made with "
            "all of them done. `tests/` and `experiments/` belong to the whole repository and are not in this copy.")
    text = re.sub(r"\n## Exercises\n.*?(?=\n## |\Z)", "", text, flags=re.S)
    text = re.sub(r"[^\n]+:\n\n```sh\n[^`]*pytest[^`]*```\n\n", "", text)
    text = text.replace("Clone this repository with `git clone --depth 1`: its history holds older weights. In the clone, with",
                        "In this folder, with")
    text = re.sub(r"(?s)\*\*Beside the paper:\*\* open .*?\[reading map\]\(docs/reading-map.md\) has the same in tables",
                  "**Beside the paper:** the [reading map](docs/reading-map.md) shows the paper in tables", text)
    text = re.sub(r"(?m)^- \[docs/(?:side_by_side|walkthrough)[^\n]*\n(?:  [^\n]*\n)*", "", text)
    text = re.sub(r"(?m)^- [^\n]*emoji[^\n]*\n(?:  [^\n]*\n)*", "", text)  # their weights are not copied
    title, rest = text.split("\n\n", 1)
    return unlink("\n\n".join([title, note, rest]), "", names)


def unlink(text, folder, names):
    """Markdown whose links to files that are not among `names` have become plain text."""
    def plain(match):
        target = os.path.normpath(os.path.join(folder, match[2].split("#")[0])).replace("\\", "/")
        there = "://" in match[2] or match[2].startswith("#") or any(n == target or n.startswith(target + "/") for n in names)
        return match[0] if there else match[1]
    return re.sub(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)", plain, text)


def hand_out(folder, numbers=()):
    """Write the student copy of these exercises (none: all) to a new or empty folder; returns the exercises. Raises UserError."""
    try:
        exercises = choose(numbers)
    except ValueError as error:
        raise UserError(str(error)) from None
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists and is not an empty folder; give a new one")
    files = {path.relative_to(ROOT).as_posix(): path for pattern in COPIED for path in ROOT.glob(pattern)
             if path.is_file() and "__pycache__" not in path.parts}
    pages = {f"exercises/pages/{exercise.page}": exercise for exercise in exercises}
    shown = "".join((ROOT / page).read_text(encoding="utf-8") for page in pages)
    files = {name: path for name, path in files.items()
             if not name.startswith("docs/emoji") and (not name.startswith("exercises/") or path.name in shown)}
    names = [*files, *pages, "exercises/README.md"]
    index = (ROOT / "exercises/README.md").read_text(encoding="utf-8")
    index = re.sub(r"(?m)(^\| \d+ \|.*\n)+", lambda _: rows(exercises), index)
    docs = {name: unlink(path.read_text(encoding="utf-8"), "docs", names) for name, path in files.items()
            if name.startswith("docs/") and name.endswith(".md")}
    docs = {name: re.sub(r"\.py#L\d+", ".py", text) for name, text in docs.items()}  # blanks move the lines
    written = {**sources(exercises), **docs, "exercises/README.md": unlink(index, "exercises", names),
               "README.md": student_readme(files["README.md"].read_text(encoding="utf-8"), exercises, names),
               **{page: unlink((ROOT / page).read_text(encoding="utf-8"), "exercises/pages", names) for page in pages}}
    for name in {*names, *written}:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name in written:
            path.write_text(written[name], encoding="utf-8")
        else:
            shutil.copyfile(files[name], path)
    return exercises


def main():
    parser = argparse.ArgumentParser(description="Write a student copy of the repository, in which the functions of the "
                                     "exercises "
                                     "are blank.")
    parser.add_argument("folder", type=Path, metavar="COPY", help="a new folder")
    parser.add_argument("--only", type=int, nargs="+", default=[], metavar="N",
                        help="the numbers of some exercises (default: all); "
                        "those whose solution would give one of them away come along")
    args = parser.parse_args()
    with one_line_errors():
        exercises = hand_out(args.folder, args.only)
        also = [exercise for exercise in exercises if args.only and exercise.number not in args.only]
        print(f"{args.folder}: {len(exercises)} exercises, {sum(e.points for e in exercises)} points: "
              + ", ".join(str(e.number) for e in exercises))
        for exercise in also:
            print(f"exercise {exercise.number} ({exercise.title}) is blank too: it would give another one away")


if __name__ == "__main__":
    main()
