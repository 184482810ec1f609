"""Makes reader.pt, the weights that evaluate.py takes when --ckpt is left out, of checkpoints of
finetune.py: half precision, and no optimizer.

    python assets/make_reader.py out/ship_reader/best.pt

Of several it takes the mean of each weight. They have to start from the same recognizer
(finetune.py --init): then their mean reads more than any of them ("model soups",
https://arxiv.org/abs/2203.05482).
"""
import pathlib
import sys

import torch

ASSETS = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(ASSETS.parent))

from common import Parser, UserError, read_checkpoint, run_main                 # noqa: E402

ABOUT = ("vit_mini, pre-trained by mnsp and fine-tuned on rendered words and on the training crops "
         "of IIIT5k, SVT and ICDAR 2015, which are for research")
ARGS = ["model", "max_length", "spell", "rotate_tall"]  # the flags that evaluate.py looks at


def main():
    parser = Parser(__doc__)
    parser.add_argument("checkpoints", nargs="+", help="of finetune.py, with the same charset")
    parser.add_argument("--out", default=str(ASSETS / "reader.pt"), help="where to write")
    args = parser.parse_args()

    checkpoints = [read_checkpoint(path) for path in args.checkpoints]
    first = checkpoints[0]
    weights = {}
    for name in first["model"]:
        weights[name] = mean(name, checkpoints, args.checkpoints).half()

    flags = {name: first["args"][name] for name in ARGS}
    reader = dict(
        model=weights, charset=first["charset"], args=flags, step=first["step"], about=ABOUT)
    torch.save(reader, args.out)
    print(f"{args.out}: {pathlib.Path(args.out).stat().st_size / 1e6:.1f} MB")


def mean(name, checkpoints, paths):
    """The mean of a weight over the checkpoints. UserError if they are not of one kind."""
    first = checkpoints[0]
    total = torch.zeros(first["model"][name].shape)
    for checkpoint, path in zip(checkpoints, paths):
        weight = checkpoint["model"].get(name)
        if weight is None or weight.shape != total.shape or checkpoint["charset"] != first["charset"]:
            raise UserError(f"{path}: another --model or --charset than {paths[0]}'s; name "
                            "checkpoints that started from the same recognizer")
        total += weight.float()
    return total / len(checkpoints)


if __name__ == "__main__":
    run_main(main)
