"""Makes reader.pt, the weights that evaluate.py takes when --ckpt is left out, of a checkpoint
of finetune.py: half precision, and no optimizer.

    python assets/make_reader.py out/ship_reader/best.pt
"""
import pathlib
import sys

import torch

ASSETS = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(ASSETS.parent))

from common import Parser, read_checkpoint, run_main                            # noqa: E402

ABOUT = ("vit_mini, pre-trained by mnsp and fine-tuned on rendered words and on the training crops "
         "of IIIT5k, SVT and ICDAR 2015, which are for research")
ARGS = ["model", "max_length", "spell", "rotate_tall"]  # the flags that evaluate.py looks at


def main():
    parser = Parser(__doc__)
    parser.add_argument("checkpoint", help="best.pt of finetune.py")
    checkpoint = read_checkpoint(parser.parse_args().checkpoint)

    weights = {name: x.half() for name, x in checkpoint["model"].items()}
    args = {name: checkpoint["args"][name] for name in ARGS}
    reader = dict(
        model=weights, charset=checkpoint["charset"], args=args, step=checkpoint["step"],
        about=ABOUT)
    path = ASSETS / "reader.pt"
    torch.save(reader, path)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_main(main)
