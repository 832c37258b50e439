"""Fine-tune only some parameters of a stage: train.py --init, and the names of these parameters.

In:   train.py's own arguments, with --init, and --only with parts of parameters' names
Out:  as of train.py; all other parameters keep the very bytes of --init

    python experiments/train_only.py decoder --given z_t --only qkv proj_out --init weights/shapes/decoder.pt --out runs/z_t
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train
from clip_embed import UserError, one_line_errors
from train_words import record


def freeze(run, only):
    """Train only the parameters of a Run with one of `only` in their names. Raises UserError."""
    parameters = dict(run.model.named_parameters())
    for part in only:
        if not any(part in name for name in parameters):
            raise UserError(f"--only {part}: no parameter of the {run.stage} is called so; some are "
                            f"{', '.join([*parameters][:3])}")
    for name, p in parameters.items():
        p.requires_grad_(any(part in name for part in only))


def main():
    parser = argparse.ArgumentParser(
        description="train.py for some parameters only, in one process. All other arguments are "
        "train.py's.", allow_abbrev=False)
    parser.add_argument("--only", nargs="+", required=True, metavar="NAME", help="parts of the names of the parameters to train")
    args, others = parser.parse_known_args()
    build = train.build

    def build_and_freeze(*arguments):
        run = build(*arguments)
        freeze(run, args.only)
        return run

    train.build = build_and_freeze
    record(only=tuple(args.only))
    with one_line_errors():
        if "--init" not in others:
            raise UserError(f"--only {' '.join(args.only)}: the rest needs weights; say by --init which")
    sys.argv = ["train.py", *others]
    train.main()


if __name__ == "__main__":
    main()
