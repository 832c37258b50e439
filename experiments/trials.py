"""Train a variant of the shapes decoder for a short time: train.py with one thing changed.

In:   the name of a variant, then train.py's own arguments
Out:  as of train.py. Compare variants by their losses (probes.py): short trainings differ there long
      before they differ in the pictures. All variants see the same scenes, timesteps and noise.

    python experiments/trials.py base --steps 700 --clip weights/shapes/clip.pt --out runs/base
    python experiments/probes.py decoder --weights runs/base --clip weights/shapes/clip.pt
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import decoder
import train
from train_words import record

VARIANTS = {  # (changes of the config, changes of the loss's options)
    "base": ({}, {}),
    "even": ({}, {"time_power": 1.0}),
    "paper": ({}, {"time_power": 1.0, "drop_z_i": 0.1, "drop_caption": 0.5}),
    "own-text": ({"text_layers": 2, "text_heads": 2, "text_context": 77}, {}),
    "wide": ({"multiples": (1, 2, 3)}, {}),
    "narrow": ({"channels": 32, "multiples": (1, 4, 4)}, {}),  # less at 32×32, more at 8×8
    "patch-4": ({"patch_size": 4, "channels": 128, "depth": 2, "multiples": (1, 1)}, {}),  # no level of 32×32
}


def main():
    parser = argparse.ArgumentParser(
        description="train.py decoder, with one change. All other arguments are train.py's.", allow_abbrev=False)
    parser.add_argument("variant", choices=VARIANTS, help="the change: base is none")
    args, others = parser.parse_known_args()
    sizes, options = VARIANTS[args.variant]
    recipe = train.RECIPES["shapes"]["decoder"]  # a long EMA would still hold the first weights
    train.RECIPES["shapes"]["decoder"] = replace(recipe, ema_decay=0.99, loss=recipe.loss | options)
    decoder.PRESETS["shapes"] = replace(decoder.PRESETS["shapes"], **sizes)
    record(variant=args.variant)
    sys.argv = ["train.py", "decoder", *others]
    train.main()


if __name__ == "__main__":
    main()
