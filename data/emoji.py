"""Emoji as a captioned folder: pictures to train on that come from a package manager.

In:   a folder of npm packages (three artists), or the font NotoColorEmoji.ttf (one artist)
Out:  a folder for `train.py --data`: square PNGs on white, as large as the source has them (64 to
      256 pixels); metadata.jsonl with up to seven captions a picture; LICENCES.txt

Captions of 1f6d2@fluent.png: "shopping cart"; "shopping cart, fluent 3d"; its name in Unicode,
"shopping trolley"; "shopping cart, household, fluent 3d"; keywords. Artists draw an emoji alike.
Their files share the name up to "@", and data/folder.py holds out all of them or none.

    npm install --prefix emoji_packages emoji-datasource-google emoji-datasource-twitter \\
        @lobehub/fluent-emoji-3d emojilib
    python data/emoji.py --from emoji_packages --out photos/emoji
    python train.py clip --data photos/emoji --out runs/emoji --steps 2000
"""

import argparse
import hashlib
import json
import os
import re
import sys
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from clip_embed import UserError, one_line_errors, open_picture
from data.folder import is_inside


class Artist(NamedTuple):
    """Where an artist's pictures lie, the words for their style, and whom to name."""
    package: str
    path: str     # of a picture in the package
    flag: str     # emoji.json's flag of what the artist drew; "" if it has none
    style: str
    licence: str
    left_out: tuple = ()  # categories, and parts of them


ARTISTS = {
    "noto": Artist("emoji-datasource-google", "img/google/64/{}.png", "has_img_google",
                   "noto emoji", "Noto Emoji, copyright Google LLC; pictures: Apache License 2.0, "
                   "www.apache.org/licenses/LICENSE-2.0; font: SIL Open Font License 1.1"),
    "twemoji": Artist("emoji-datasource-twitter", "img/twitter/64/{}.png", "has_img_twitter",
                      "twemoji", "Twemoji, copyright Twitter, Inc and other contributors; CC BY "
                      "4.0, creativecommons.org/licenses/by/4.0; changed: put on white"),
    "fluent": Artist("@lobehub/fluent-emoji-3d", "assets/{}.webp", "", "fluent 3d",
                     "Fluent Emoji, copyright Microsoft Corporation; MIT License; WebP files by "
                     "LobeHub", ("Flags", "family")),  # these are not in Microsoft's own release
}
WORDS = ("Names and keywords: emoji-data, copyright Cal Henderson, and emojilib, copyright Mu-An "
         "Chiou; MIT License")
PACKAGES = (*(artist.package for artist in ARTISTS.values()), "emojilib")
TONES = {"1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark",
         "1F3FF": "dark"}
PARTS = ("combining", "emoji modifier", "regional indicator")  # characters that stand in others
FONT, FONT_SIZE, GLYPH = "Noto Color Emoji", 109, 136  # its bitmaps exist at this size alone
CODES = (*range(0x203C, 0x3300), *range(0x1F000, 0x1FB00))  # where Unicode has emoji
MOST_JSON, MOST_PICTURE, MOST_PIXELS = 1 << 24, 1 << 20, 1024  # bytes; bytes; pixels a side
KEYWORDS = 6  # a caption has the first ones, which fit best


class Picture(NamedTuple):
    """A picture to write."""
    name: str
    artist: str
    captions: list
    draw: Callable  # () → Pillow image


# ------------------------------ sources

def read_inside(package, path, most):
    """The bytes of a package's file. Raises UserError if it leads out or has more than `most`."""
    if not is_inside(os.path.realpath(package), path):
        raise UserError(f"{package / path}: is a link that leads out of the package")
    with open(package / path, "rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise UserError(f"{package / path}: has more than {most:,} bytes")
    return data


def clean(text):
    """A name or keyword in lower case, its words apart: "cat_face" → "cat face"."""
    return " ".join(text.replace("_", " ").lower().split())


def captions_of(names, keywords, style, kind=""):
    """A picture's captions, each once: names, style, kind, first keywords together and by threes.

    A network that never saw a thing's name may know its kind and keywords from other things.
    """
    words = keywords[:KEYWORDS]
    lines = [names[0], f"{names[0]}, {style}", *names[1:], ", ".join(words)]
    if kind:
        lines += [f"{names[0]}, {kind}, {style}", ", ".join(words[:3]), ", ".join(words[3:])]
    return [*dict.fromkeys(filter(None, lines))]


def pictures_of_packages(folder, flags, tones):
    """The Pictures of all artists. Raises UserError; of a missing package with the remedy.

    flags: those too. tones: people in all skin tones, not the neutral alone.
    """
    modules = folder / "node_modules"
    missing = [name for name in PACKAGES if not (modules / name).is_dir()]
    if missing:
        raise UserError(f"{modules} lacks {', '.join(missing)}; to get all packages: "
                        f"npm install --prefix {folder} {' '.join(PACKAGES)}")
    left_out = ("Component",) if flags else ("Component", "Flags")  # Component: plain skin tones
    pictures = []
    try:
        words = json.loads(read_inside(modules / "emojilib", "dist/emoji-en-US.json", MOST_JSON))
        words = {key.replace("\ufe0f", ""): [*map(clean, found)] for key, found in words.items()}
        for row in json.loads(read_inside(modules / PACKAGES[0], "emoji.json", MOST_JSON)):
            if row["category"] not in left_out:
                pictures += pictures_of_row(modules, row, words, tones)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{modules}: emoji.json or emojilib is not as expected "
                        f"({type(error).__name__}: {error})") from None
    return pictures


def pictures_of_row(modules, row, words, tones):
    """The Pictures of a row of emoji.json; words: {character: [name, keywords …]}."""
    whole = row["image"].removesuffix(".png")  # code points, as in 1f44b
    character = "".join(chr(int(code, 16)) for code in whole.split("-") if code != "fe0f")
    name, *keywords = words.get(character) or [clean(row["name"])]
    kind = clean(row["subcategory"].replace("-", " "))
    versions, pictures = [("", row, "")], []
    for key, version in row.get("skin_variations", {}).items() if tones else ():
        tone = " and ".join(dict.fromkeys(TONES[code] for code in key.split("-")))
        versions.append((f"-{key.lower()}", version, f", {tone} skin tone"))
    for suffix, version, tone in versions:
        names = [name + tone, clean(row["name"]) + tone]
        file = version["image"].removesuffix(".png")
        if not re.fullmatch("[0-9a-f]+(-[0-9a-f]+)*", file):
            raise ValueError(f"a picture is called {file!r}")
        for key, artist in ARTISTS.items():
            package, path = modules / artist.package, artist.path.format(file)
            drawn = version.get(artist.flag, not artist.flag) and (package / path).is_file()
            if drawn and not {row["category"], row["subcategory"]} & {*artist.left_out}:
                captions = captions_of(names, keywords, artist.style, kind)
                draw = partial(draw_file, package, path)
                pictures.append(Picture(f"{whole}@{key}{suffix}.png", key, captions, draw))
    return pictures


def draw_file(package, path):
    """A package's picture in the middle of a white square. Raises UserError."""
    picture = open_picture(package / path, read_inside(package, path, MOST_PICTURE))
    side = max(picture.size)
    if side > MOST_PIXELS:
        raise UserError(f"{package / path}: has more than {MOST_PIXELS} pixels a side")
    square = Image.new("RGB", (side, side), "white")
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square


def pictures_of_font(path):
    """The Pictures of the font's single characters, named as in Unicode. Raises UserError."""
    try:
        font = ImageFont.truetype(path, FONT_SIZE, layout_engine=ImageFont.Layout.BASIC)
    except OSError as error:
        raise UserError(f"{path}: not the font {FONT} with bitmaps ({error})") from None
    if font.getname()[0] != FONT:
        raise UserError(f"{path}: not the font {FONT}, whose licence is known")
    pictures = []
    for code in CODES:
        name = clean(unicodedata.name(chr(code), ""))
        _, top, _, bottom = font.getbbox(chr(code))
        if name and not name.startswith(PARTS) and bottom > top:
            captions = captions_of([name], [], ARTISTS["noto"].style)
            draw = partial(draw_character, font, chr(code))
            pictures.append(Picture(f"{code:x}@noto.png", "noto", captions, draw))
    return pictures


def draw_character(font, character):
    """A character of the font on white, 136 × 136."""
    picture = Image.new("RGB", (GLYPH, GLYPH), "white")
    ImageDraw.Draw(picture).text((0, 4), character, "black", font, embedded_color=True)
    return picture


# ------------------------------ the folder

def write_folder(pictures, words, out):
    """Write Pictures, captions and licences as the folder `out`; returns a summary's lines.

    words: the licence of the captions.

    The folder appears whole or not at all. Of identical pictures only the one with the highest code
    points is written. Twemoji draws many families as the same grey people, and there the names that fit
    ("family adult, adult, child") come last. Raises UserError.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    counts, captions, digests = Counter(), [], set()
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as beside:
        folder = Path(beside) / out.name
        folder.mkdir()
        with open(folder / "metadata.jsonl", "w", encoding="utf-8") as metadata:
            pictures = sorted(pictures, key=lambda picture: picture.name, reverse=True)
            for picture in tqdm(pictures, "emoji", unit="picture"):
                image = picture.draw()
                digest = hashlib.sha256(image.tobytes()).digest()
                if digest not in digests:
                    image.save(folder / picture.name)
                    for line in picture.captions:
                        row = {"file_name": picture.name, "text": line}
                        metadata.write(json.dumps(row) + "\n")
                    counts[picture.artist] += 1
                    captions += picture.captions
                digests.add(digest)
        licences = [f"{counts[key]:,} pictures: {artist.licence}"
                    for key, artist in ARTISTS.items() if counts[key]] + [words]
        (folder / "LICENCES.txt").write_text("\n".join(licences) + "\n", "utf-8")
        os.rename(folder, out)
    return [f"{out}: {counts.total():,} pictures, {len(captions):,} captions, "
            f"{len(set(captions)):,} of them different", *licences]


def parse_arguments():
    """The command line's options."""
    parser = argparse.ArgumentParser(
        description="Make a captioned folder of emoji for train.py --data, from packages of Noto "
        "Emoji, Twemoji and Fluent 3D. Get them first: npm install --prefix emoji_packages "
        + " ".join(PACKAGES), epilog="LICENCES.txt in the folder says whom to name if you show the "
        "pictures. Each emoji is kept for training or held out in the drawings of all artists.")
    add = parser.add_argument
    add("--from", dest="source", type=Path, default=Path("emoji_packages"), metavar="PACKAGES",
        help="folder given to npm as --prefix (default emoji_packages). Or the font "
        "NotoColorEmoji.ttf, of Debian's package fonts-noto-color-emoji: one artist, no sequences")
    add("--out", type=Path, default=Path("photos/emoji"), metavar="FOLDER",
        help="the new folder (default photos/emoji)")
    add("--flags", action="store_true", help="with flags, some 260 by two artists each")
    add("--skin-tones", action="store_true", help="people in all skin tones, not the neutral "
        "alone: twice as many pictures, most of them people")
    return parser.parse_args()


def main():
    args = parse_arguments()
    with one_line_errors():
        if args.out.exists():
            raise UserError(f"--out {args.out}: is there already; remove it, or name another")
        if args.source.is_file():
            pictures, words = pictures_of_font(args.source), "Names: Unicode"
        else:
            pictures = pictures_of_packages(args.source, args.flags, args.skin_tones)
            words = WORDS
        print(*write_folder(pictures, words, args.out), sep="\n")
        print(f"Next: python train.py clip --data {args.out} --out runs/emoji --steps 2000")


if __name__ == "__main__":
    main()
