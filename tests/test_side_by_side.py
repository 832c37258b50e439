"""docs/side_by_side: as new as its sources, whole, readable, and asking nothing of any network."""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "docs"))
import side_by_side  # noqa: E402

PAGES = sorted((ROOT / "docs/side_by_side").glob("*.html"))
STYLE = (ROOT / "docs/side_by_side/style.css").read_text(encoding="utf-8")
EMPTY = {"meta", "img", "br", "link"}


class Page(HTMLParser):
    """A page's ids, links, sources of pictures, headings, and whether each element is closed."""

    def __init__(self, path):
        super().__init__()
        self.open, self.ids, self.links, self.loads, self.pictures, self.headings, self.math = [], [], [], [], [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self.open, f"{path.name}: {self.open} stay open"

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.ids += [values["id"]] if "id" in values else []
        self.links += [values["href"]] if tag == "a" else []
        self.loads += [values[k] for k in ("src", "srcset", "data") if k in values] + ([values["href"]] if tag == "link" else [])
        self.pictures += [values] if tag == "img" else []
        self.headings += [int(tag[1])] if re.fullmatch(r"h\d", tag) else []
        self.math += [values["alttext"]] if tag == "math" else []
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes another element"


def test_the_pages_and_the_maps_line_numbers_are_as_new_as_their_sources():
    old = [path.name for path, text in side_by_side.build().items() if path.read_text(encoding="utf-8") != text]
    assert not old, f"run python docs/side_by_side.py: {old} are older than their sources"
    assert {path.stem for path in PAGES} == {"index", *side_by_side.ORDER}


def test_every_row_and_formula_of_the_reading_map_has_a_place_on_a_page():
    lines = [line for name in ("index", *side_by_side.ORDER) for _, body in side_by_side.parse(name)[2] for line in body]
    shown = {side_by_side.row_of(line.removeprefix("row: "))[0] for line in lines if line.startswith("row: ")}
    assert sorted(set(side_by_side.map_rows()) - shown) == []
    quoted = " ".join(line for line in lines if line.startswith("code: "))
    for title, (code, _, _) in side_by_side.map_rows().items():
        names = re.findall(r"\[`\w+\.(\w+)`\]", code)
        assert not names or any(name in quoted for name in names), f"{title}: none of {names} is quoted"
    from test_reading_map import FORMULAS
    plain = re.sub(r"\s", "", "".join(formula for path in PAGES for formula in Page(path).math))
    in_words = {"cross-entropy over rows and columns", "z_i times 17.2"}
    wanted = [re.sub(r"\s", "", f.removesuffix(", β̃_t")) for f in FORMULAS if f not in in_words]
    assert [f for f in wanted if f not in plain] == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_elements_close_links_lead_somewhere_and_nothing_is_loaded(path):
    page = Page(path)
    assert len(set(page.ids)) == len(page.ids) and page.headings[0] == 1 and page.headings.count(1) == 1
    assert all(b <= a + 1 for a, b in zip(page.headings, page.headings[1:])), "a level of headings is left out"
    for link in page.links:
        if re.match("https?://", link):
            continue
        target, _, place = link.partition("#")
        file = (path.parent / target).resolve() if target else path
        assert file.is_file() and file.is_relative_to(ROOT), link
        if re.fullmatch(r"L\d+", place):
            assert 0 < int(place[1:]) <= len(file.read_text(encoding="utf-8").splitlines()), link
        elif place and file.suffix == ".html":
            assert place in Page(file).ids, link
    assert not [source for source in page.loads if "//" in source or source.startswith("data:")]
    assert all((path.parent / picture["src"]).is_file() and len(picture["alt"]) > 10 for picture in page.pictures)
    assert page.loads.count("style.css") == 1
    assert not re.search(r"<script|@import|url\(", path.read_text(encoding="utf-8") + STYLE)


def test_the_pages_are_small():
    assert sum(path.stat().st_size for path in (ROOT / "docs/side_by_side").iterdir()) < 4 << 20


def luminance(colour):
    """Of "#rrggbb", as WCAG 2 defines it."""
    channels = [int(colour[k:k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_every_colour_of_text_has_a_contrast_of_at_least_4_5_in_light_and_dark():
    light, dark = re.findall(r":root \{(.*?)\}", STYLE, re.S)
    for part in (light, light + dark):
        colours = dict(re.findall(r"--(\w+): (#\w{6})", part))  # dark's come later and win
        for text in ("ink", "link", "k", "s", "n", "c", "d"):
            for ground in ("ground", "soft", "choice"):
                a, b = sorted((luminance(colours[text]), luminance(colours[ground])))
                assert (b + 0.05) / (a + 0.05) >= 4.5, (text, ground)


@pytest.mark.parametrize("text, want", [
    ("√ᾱ_t x_0", "<msqrt><msub><mover><mi>α</mi><mo>‾</mo></mover><mrow><mi>t</mi></mrow></msub></msqrt><msub><mi>x</mi><mrow><mn>0</mn></mrow></msub>"),
    ("(a + b)/√(1 − c)", "<mfrac><mrow><mi>a</mi><mo>+</mo><mi>b</mi></mrow><msqrt><mrow><mn>1</mn><mo>−</mo><mi>c</mi></mrow></msqrt></mfrac>"),
    ("a / b", "<mi>a</mi><mo>/</mo><mi>b</mi>"),
    ("z_i^(t)", "<msubsup><mi>z</mi><mrow><mi>i</mi></mrow><mrow><mrow><mo>(</mo><mi>t</mi><mo>)</mo></mrow></mrow></msubsup>"),
    ("‖x‖² L_simple z_θ", "<msup><mrow><mo>‖</mo><mi>x</mi><mo>‖</mo></mrow><mrow><mn>2</mn></mrow></msup><msub><mi>L</mi><mrow><mi>simple</mi></mrow></msub>"
     "<msub><mi>z</mi><mrow><mi>θ</mi></mrow></msub>"),
])
def test_a_formula_becomes_mathml(text, want):
    got = re.sub(r' (class|stretchy|accent)="\w+"', "", side_by_side.Formula(text).row())
    assert got == want


def test_quotations_are_found_by_name_and_text_and_what_is_gone_is_one_line():
    assert side_by_side.lines_of("decoder.py", "guided")[0] == side_by_side.definitions("decoder.py")["guided"][0]
    first, last = side_by_side.lines_of("decoder.py", "Decoder.forward", "c = self.config", "self.inject(")
    lines = (ROOT / "decoder.py").read_text(encoding="utf-8").splitlines()
    assert "c = self.config" in lines[first - 1] and "self.inject(" in lines[last - 1] and first < last
    for call in (lambda: side_by_side.lines_of("decoder.py", "guide"), lambda: side_by_side.lines_of("decode.py", "guided"),
                 lambda: side_by_side.lines_of("decoder.py", "guided", "no such line"), lambda: side_by_side.row_of("§2.9"),
                 lambda: side_by_side.inline("[a](nowhere.md)"), lambda: side_by_side.passage("x", ["![a picture](nowhere.png)"])):
        with pytest.raises(SystemExit, match="docs/side_by_side: .*(no|not there|start with)"):
            call()


def test_code_is_marked_and_its_text_unchanged():
    for file in ("decoder.py", "train.py", "data/shapes.py"):
        text = re.sub("<[^>]+>", "", "\n".join(side_by_side.coloured(file)))
        import html
        assert html.unescape(text) == "\n".join((ROOT / file).read_text(encoding="utf-8").splitlines())
    line = side_by_side.coloured("decoder.py")[side_by_side.definitions("decoder.py")["guided"][0] - 1]
    assert line.startswith('<span class="k">def</span> <span class="d">guided</span>(')
