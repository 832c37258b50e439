"""Train CLIP and decoder with words written across things (fig. 6).

This is train.py with words in a share of its scenes.

In:   train.py's own arguments, and --words SHARE
Out:  as of train.py

    python experiments/train_words.py clip --words 0.25 --out runs/words --init weights/shapes/clip.pt --steps 3000
"""

import argparse
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train
from clip_embed import check_ranges, one_line_errors
from data.shapes import (SHAPES, SINGLES, ShapeBatches, attributes_in_caption, lay_out, near_misses, random_scene)


def write_words(group, named, rng):
    """(group, named) of scenes of one thing, with a shape's name across each thing.

    Things become large, because a word would hide a small one. A third of the captions leave the
    word out, as for other attributes. If a caption names it, the word alone distinguishes the
    group's scenes, so CLIP must read it.
    """
    if rng.random() < 2 / 3:
        group, named = group[:1] * len(group), named | {(0, "word")}
    things = [replace(s.things[0], size="large", word=str(word)) for s, word in zip(group, rng.permutation(SHAPES))]
    return [lay_out(replace(s, things=(thing,)), rng) for s, thing in zip(group, things)], named


class WordBatches(ShapeBatches):
    """ShapeBatches with words written across a share `words` of the scenes."""

    def __init__(self, *args, words, **options):
        super().__init__(*args, **options)
        self.words = words

    def draw_group(self, k, rng):
        if not self.words or rng.random() >= self.words:
            return super().draw_group(max(k, SINGLES), rng)  # CLIP knows single things
        while True:
            scene = random_scene(rng, 1)
            named = attributes_in_caption(scene, rng)
            group = [scene, *near_misses(scene, named, rng)] if self.stage == "clip" else [scene]
            if all(s.things[0].colour != "black" for s in group):  # black letters would not be seen
                return write_words(group, named, rng)


def main():
    parser = argparse.ArgumentParser(
        description="train.py, with words written across a share of the scenes of clip and "
        "decoder. All other arguments are train.py's.", allow_abbrev=False)
    parser.add_argument("--words", type=float, required=True, help="share of the scenes with a word, 0 to 1")
    args, others = parser.parse_known_args()
    with one_line_errors():
        check_ranges(args, words=(0, 1))
    train.ShapeBatches = partial(WordBatches, words=args.words)
    record(words=args.words)
    sys.argv = ["train.py", *others]
    train.main()


def record(**extra):
    """Make train.py store `extra` in its checkpoints and refuse to resume with another value."""
    prepare = train.prepare

    def prepare_and_record(stage, args, device):
        context = prepare(stage, args, device)
        context.extra |= extra
        return context

    train.prepare = prepare_and_record


if __name__ == "__main__":
    main()
