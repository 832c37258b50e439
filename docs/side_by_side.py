"""Build the pages that show each passage of the paper beside its code (docs/side_by_side/*.html).

In:   docs/side_by_side/*.md, docs/reading-map.md, the files that they quote
Out:  docs/side_by_side/*.html, and the line numbers in the links of docs/reading-map.md

A page's source has a title (#), passages (##), and in a passage:

    paragraphs       with `code`, *emphasis*, [links](target) and $formulas$; tables
    $$ formula       on a line of its own; formulas are written as in docstrings: √ᾱ_t x_0
    ![text](file)    a picture
    code: FILE NAME                     a function, a class, or a class's method, whole
    code: FILE NAME | FIRST | LAST      its lines from the one with FIRST to the one with LAST
    row: TEXT                           a row of the reading map, by the start of its first cell:
                                        its choices and its tests are printed
    exercise: NUMBER

Standard library alone. Raises SystemExit with one line if a quotation, a row or a link is gone.

    python docs/side_by_side.py
"""

import ast
import html
import io
import keyword
import re
import sys
import tokenize
import unicodedata
from functools import lru_cache
from pathlib import Path

DOCS = Path(__file__).resolve().parent
ROOT, PAGES = DOCS.parent, DOCS / "side_by_side"
ORDER = ("clip", "decoder", "upsample", "prior", "manipulate", "train")


@lru_cache
def source(file):
    """The text of a file of the repository. Exits if it is gone."""
    path = ROOT / file
    if not path.is_file():
        sys.exit(f"docs/side_by_side: there is no file {file}")
    return path.read_text(encoding="utf-8")


@lru_cache
def definitions(file):
    """{name or Class.name: (first line, last line)} of a file's functions, classes, constants."""
    found = {}

    def visit(body, prefix=""):
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                first = min([node.lineno] + [d.lineno for d in node.decorator_list])
                found[prefix + node.name] = first, node.end_lineno
                if isinstance(node, ast.ClassDef):
                    visit(node.body, f"{node.name}.")
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                found[prefix + node.targets[0].id] = node.lineno, node.end_lineno

    visit(ast.parse(source(file)).body)
    return found


def lines_of(file, name, first=None, last=None):
    """(first line, last line) of a quotation. Exits if it is gone."""
    if name not in definitions(file):
        sys.exit(f"docs/side_by_side: there is no {name} in {file}")
    begin, end = definitions(file)[name]
    lines = source(file).splitlines()
    for text in filter(None, (first, last)):
        found = [n for n in range(begin, end + 1) if text in lines[n - 1]]
        if not found:
            sys.exit(f"docs/side_by_side: {name} in {file} has no line with {text!r}")
        if text is first:
            begin = found[0]
        else:
            end = found[0]
    return begin, end


@lru_cache
def coloured(file):
    """The lines of a Python file as HTML, keywords, strings, comments and names marked."""
    lines = source(file).splitlines(keepends=True)
    marks = {n: [] for n in range(1, len(lines) + 2)}
    before = ""
    for token in tokenize.generate_tokens(io.StringIO(source(file)).readline):
        kind = None
        if token.type == tokenize.COMMENT:
            kind = "c"
        elif token.type in (tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", -1),
                            getattr(tokenize, "FSTRING_START", -1),
                            getattr(tokenize, "FSTRING_END", -1)):
            kind = "s"
        elif token.type == tokenize.NUMBER:
            kind = "n"
        elif token.type == tokenize.NAME and keyword.iskeyword(token.string):
            kind = "k"
        elif token.type == tokenize.NAME and before in ("def", "class"):
            kind = "d"
        before = token.string
        if kind:
            (row, start), (last, end) = token.start, token.end
            for n in range(row, last + 1):
                marks[n].append((start if n == row else 0, end if n == last else None, kind))
    out = []
    for n, line in enumerate(lines, 1):
        line, parts, at = line.rstrip("\n"), [], 0
        for start, end, kind in sorted(marks[n]):
            end = len(line) if end is None else end
            if start < at or start == end:
                continue
            parts += [html.escape(line[at:start]), f'<span class="{kind}">',
                      html.escape(line[start:end]), "</span>"]
            at = end
        out.append("".join(parts) + html.escape(line[at:]))
    return out


def quote(file, name, first=None, last=None):
    """A quotation as HTML: file, name, line numbers, coloured lines."""
    begin, end = lines_of(file, name, first, last)
    lines = coloured(file)[begin - 1:end]
    indent = min(len(x) - len(x.lstrip(" ")) for x in lines if x.strip())
    rows = "\n".join(f'<span class="l">{n}</span>{line[indent:]}'
                     for n, line in enumerate(lines, begin))
    label = html.escape(f"{file}, {name}")
    return (f'<figure><figcaption><a href="../../{file}#L{begin}">{label}, '
            f"{'line' if begin == end else 'lines'} {begin}"
            f"{'' if begin == end else f'–{end}'}</a></figcaption>"
            f'<pre tabindex="0" role="region" aria-label="{label}, line {begin}"><code>{rows}'
            "</code></pre></figure>")


class Formula:
    """A formula in the notation of docstrings, as MathML: √(1 − ᾱ_t) ε, a/b, x_T, 10^{-4}."""
    TOKEN = re.compile(r"\s+|[0-9]+(?:\.[0-9]+)?|[A-Za-z]{2,}|[_^]\{[^}]*\}"
                       r"|[_^](?:[0-9]+|[A-Za-z]+[0-9]*|\([^)]*\)|\w)|.[\u0300-\u036f]*", re.S)
    POWERS = {"²": "2", "³": "3"}
    BRACKETS = {"(": ")", "[": "]", "‖": "‖"}
    THIN = '<mspace width="0.17em"></mspace>'  # around the names of functions

    def __init__(self, text):
        self.tokens, self.at = self.TOKEN.findall(text), 0

    def peek(self):
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def atom(self):
        """The next letter, number, root or bracket, with its scripts."""
        token = self.peek()
        self.at += 1
        if token == "√":
            return self.scripts(f"<msqrt>{self.bare(self.atom())}</msqrt>")
        if token in self.BRACKETS:
            inner = self.row(self.BRACKETS[token])
            closing = self.peek()
            self.at += 1
            return self.scripts(f'<mrow class="b"><mo>{token}</mo>{inner}<mo>{closing}</mo></mrow>')
        if token[0].isdigit():
            return self.scripts(f"<mn>{token}</mn>")
        if token[0].isalpha() or token[0] in "∅ℒ":
            letter = unicodedata.normalize("NFD", token)
            accents = {"\u0304": "‾", "\u0302": "ˆ", "\u0303": "˜"}
            if len(letter) == 2 and letter[1] in accents:
                return self.scripts(f'<mover><mi>{letter[0]}</mi>'
                                    f'<mo stretchy="false">{accents[letter[1]]}</mo></mover>')
            name = self.scripts(f"<mi>{html.escape(token)}</mi>")
            before = self.at > 1 and self.tokens[max(0, self.at - 2)].isspace()
            if len(token) == len(letter) == 1:
                return name
            return self.THIN * before + name + self.THIN * self.peek().isspace()
        return self.scripts(f'<mo stretchy="false">{html.escape(token)}</mo>')

    def scripts(self, base):
        """`base` with the subscript and superscript that follow it."""
        below = above = ""
        while self.peek()[:1] in ("_", "^", "²", "³") and self.peek():
            token = self.peek()
            self.at += 1
            inner = self.POWERS.get(token) or token[1:].strip("{}")
            inner = re.sub(r"^([a-z]+)([0-9])$", r"\1,\2", inner)  # z_t0
            inner = Formula(inner).row()
            if token[0] == "_":
                below = f"<mrow>{inner}</mrow>"
            else:
                above = f"<mrow>{inner}</mrow>"
        if below and above:
            return f"<msubsup>{base}{below}{above}</msubsup>"
        if below:
            return f"<msub>{base}{below}</msub>"
        return f"<msup>{base}{above}</msup>" if above else base

    @staticmethod
    def bare(part):
        """A bracket's content, for roots and fractions, which need no bracket."""
        match = re.fullmatch(r'<mrow class="b"><mo>\(</mo>(.*)<mo>\)</mo></mrow>', part)
        return f"<mrow>{match[1]}</mrow>" if match else part

    def row(self, closing=""):
        """All parts up to a closing bracket or the end; a/b without blanks is a fraction."""
        parts = []
        while self.peek() and self.peek() != closing:
            if self.peek().isspace():
                self.at += 1
            elif self.peek() == "/" and parts and self.at and not self.tokens[self.at - 1].isspace():
                self.at += 1
                above = self.bare(parts.pop())
                parts.append(f"<mfrac>{above}{self.bare(self.atom())}</mfrac>")
            else:
                parts.append(self.atom())
        return "".join(parts)


def formula(text, display=False):
    """A formula as a <math> element; its text is the alternative."""
    kind = ' display="block"' if display else ""
    return f'<math{kind} alttext="{html.escape(text)}">{Formula(text).row()}</math>'


def inline(text, folder=""):
    """Markdown's code, emphasis and links, and $formulas$, of one paragraph as HTML.

    folder: where the text's links start, seen from the pages' folder.
    """
    kept = []

    def keep(piece):
        kept.append(piece)
        return f"\0{len(kept) - 1}\0"

    def link(match):
        label, target = match.groups()
        if not re.match(r"[a-z]+://|#", target):
            target = folder + target
            if not (PAGES / target.partition("#")[0]).resolve().is_file():
                sys.exit(f"docs/side_by_side: a link leads to {target}, which is not there")
        return keep(f'<a href="{html.escape(target)}">') + label + keep("</a>")

    text = re.sub(r"`([^`]+)`", lambda m: keep(f"<code>{html.escape(m[1])}</code>"), text)
    text = re.sub(r"\$([^$]+)\$", lambda m: keep(formula(m[1])), text)
    text = re.sub(r"\[([^\]]+)\]\(([^)]+)\)", link, text)
    text = html.escape(text, quote=False)
    text = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", text)
    text = re.sub(r"\*(.+?)\*", r"<em>\1</em>", text)
    while "\0" in text:
        text = re.sub("\0(\\d+)\0", lambda m: kept[int(m[1])], text)
    return text


@lru_cache
def map_rows():
    """{first cell without asterisks: (choices, tests)} of the reading map's rows, Markdown."""
    found = {}
    for line in renumbered_map().partition("\n## ")[0].splitlines():
        cells = [c.strip().replace("\\|", "|") for c in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) == 4 and cells[1] != "code" and not set(cells[0]) <= set("-"):
            found[cells[0].replace("*", "")] = cells[1:]
    return found


def row_of(start):
    """(title, code, choices, tests) of the only row whose first cell starts so. Exits if not."""
    found = [(title, *cells) for title, cells in map_rows().items() if title.startswith(start)]
    exact = [row for row in found if row[0] == start]
    if len(exact or found) != 1:
        sys.exit(f"docs/side_by_side: {len(found)} rows of docs/reading-map.md start with {start!r}")
    return (exact or found)[0]


def test_line(label, path):
    """The line of a test, by its name's words. Exits if it is gone."""
    return lines_of(path, "test_" + label.replace(" ", "_"))[0]


def aside(rows, exercises):
    """What the paper leaves open, the tests and the exercises of a passage, as HTML."""
    choices, tests = [], []
    for start in rows:
        title, _, choice, checked = row_of(start)
        if choice != "–":
            title = f"<em>{html.escape(title)}</em>: " if len(rows) > 1 else ""
            choices.append(f"<p>{title}{inline(choice, '../')}</p>")
        for label, path in re.findall(r"\[(.+?)\]\(\.\./(tests/\w+\.py)", checked):
            if (label, path) not in tests:
                tests.append((label, path))
    out = ""
    if choices:
        out += "<h3>What the paper leaves open, and what we do</h3>" + "".join(choices)
    if tests:
        links = (f'<li><a href="../../{path}#L{test_line(label, path)}">{html.escape(label)}</a></li>'
                 for label, path in tests)
        out += "<h3>Checked by</h3><ul>" + "".join(links) + "</ul>"
    for number in exercises:
        page = next((ROOT / "exercises/pages").glob(f"{number:0>2}-*.md"), None)
        if page is None:
            sys.exit(f"docs/side_by_side: there is no exercise {number}")
        title = page.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        out += (f'<p class="e"><a href="../../exercises/pages/{page.name}">Exercise: '
                f"{html.escape(title)}</a></p>")
    return f'<aside aria-label="Choices and tests">{out}</aside>' if out else ""


def table(lines):
    """A Markdown table as HTML; its first row and first column are headings."""
    cells = [[inline(cell.strip()) for cell in line.strip("|").split("|")] for line in lines]
    head = "".join(f'<th scope="col">{cell}</th>' for cell in cells[0])
    body = "".join(f'<tr><th scope="row">{row[0]}</th>'
                   + "".join(f"<td>{cell}</td>" for cell in row[1:]) + "</tr>" for row in cells[2:])
    return (f'<div class="f" tabindex="0" role="region" aria-label="table"><table><thead><tr>{head}'
            f"</tr></thead><tbody>{body}</tbody></table></div>")


def passage(title, body):
    """One passage as HTML: the paper's words, the choices, the code."""
    text, code, rows, exercises, paragraph = [], [], [], [], []

    def close():
        if paragraph and paragraph[0].startswith("|"):
            text.append(table(paragraph))
        elif paragraph:
            text.append(f"<p>{inline(' '.join(paragraph))}</p>")
        paragraph.clear()

    for line in body:
        picture = re.fullmatch(r"!\[(.*)\]\((.*)\)", line)
        word, _, rest = line.partition(": ")
        if not line.strip():
            close()
        elif word == "code":
            where, *ends = (part.strip() for part in rest.split(" | "))
            code.append(quote(*where.split(" ", 1), *ends))
        elif word == "row":
            rows.append(rest)
        elif word == "exercise":
            exercises.append(rest)
        elif line.startswith("$$ "):
            close()
            text.append(f'<div class="f" tabindex="0" role="region" aria-label="formula">'
                        f"{formula(line[3:], True)}</div>")
        elif picture:
            close()
            if not (PAGES / picture[2]).is_file():
                sys.exit(f"docs/side_by_side: there is no picture {picture[2]}")
            text.append(f'<p class="i"><a href="{picture[2]}"><img src="{picture[2]}" '
                        f'alt="{html.escape(picture[1])}"></a><br>{inline(picture[1])}</p>')
        else:
            paragraph.append(line.strip())
    close()
    name = anchor(title)
    return (f'<section id="{name}"><h2><a href="#{name}">{inline(title)}</a></h2><div class="g">'
            f'<div class="p">{"".join(text)}</div>{aside(rows, exercises)}'
            f'<div class="q">{"".join(code)}</div></div></section>')


def anchor(title):
    """A passage's anchor: the words of its title."""
    plain = re.sub(r"[$`*]", "", title).lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")


def parse(name):
    """(title, lead lines, [(passage title, its lines)]) of a page's source."""
    lines = source(f"docs/side_by_side/{name}.md").splitlines()
    lead, passages = [], []
    for line in lines[1:]:
        if line.startswith("## "):
            passages.append((line[3:], []))
        else:
            (passages[-1][1] if passages else lead).append(line)
    return lines[0].removeprefix("# "), lead, passages


def page(name):
    """A whole page as HTML."""
    title, lead, passages = parse(name)
    links = "".join(f'<a href="{other}.html"{" aria-current=page" if other == name else ""}>'
                    f"{html.escape(parse(other)[0].partition(':')[0] if n else 'Contents')}</a>"
                    for n, other in enumerate(("index", *ORDER)))
    lead = "".join(f"<p>{inline(' '.join(part.split()))}</p>"
                   for part in "\n".join(lead).split("\n\n") if part.strip())
    body = "".join(passage(*each) for each in passages)
    contents = ""
    if name == "index":
        contents = "".join(
            f'<h2 id="{other}"><a href="{other}.html">{html.escape(parse(other)[0])}</a></h2><ul>'
            + "".join(f'<li><a href="{other}.html#{anchor(part)}">{inline(part)}</a></li>'
                      for part, _ in parse(other)[2]) + "</ul>" for other in ORDER)
    elif len(passages) > 1:
        items = "".join(f'<li><a href="#{anchor(part)}">{inline(part)}</a></li>'
                        for part, _ in passages)
        contents = f'<nav class="contents" aria-label="Passages"><ul>{items}</ul></nav>'
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<link rel="stylesheet" href="style.css">
</head>
<body>
<nav aria-label="Pages">{links}</nav>
<main>
<h1>{html.escape(title)}</h1>
{lead}{contents}
{body}
</main>
</body>
</html>
"""


@lru_cache
def renumbered_map():
    """docs/reading-map.md with each link to a function opening its line."""
    def link(match):
        label, path = match.groups()
        name = label if label == path else label.partition(".")[2]
        begin = 1 if label == path else lines_of(path, name)[0]
        return f"[`{label}`](../{path}" + ("" if label == path else f"#L{begin}") + ")"

    text = source("docs/reading-map.md")
    text = re.sub(r"\[`([\w/.]+)`\]\(\.\./([\w/.]+\.py)(?:#L\d+)?\)", link, text)

    def test(match):
        label, path = match.groups()
        return f"[{label}](../{path}#L{test_line(label, path)})"

    return re.sub(r"\[([^\]`/]+)\]\(\.\./(tests/\w+\.py)(?:#L\d+)?\)", test, text)


def build():
    """{path: text} of all that this script writes."""
    pages = {PAGES / f"{name}.html": page(name) for name in ("index", *ORDER)}
    return pages | {DOCS / "reading-map.md": renumbered_map()}


if __name__ == "__main__":
    for path, text in build().items():
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(ROOT))
