"""Makes reader.pt, the weights that evaluate.py takes when --ckpt is left out, of checkpoints of
finetune.py: half precision, and no optimizer.

    python assets/make_reader.py out/ship_reader/best.pt out/ship_1/last.pt out/ship_2/last.pt

Of several it takes the mean of each weight ("model soups", https://arxiv.org/abs/2203.05482). They
have to start from the same recognizer: finetune.py --init.
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
    parser.add_argument("checkpoints", nargs="+", help="of finetune.py")
    parser.add_argument("--out", default=str(ASSETS / "reader.pt"), help="where to write")
    args = parser.parse_args()

    checkpoints = [read_checkpoint(path) for path in args.checkpoints]
    first = checkpoints[0]
    for path, checkpoint in zip(args.checkpoints, checkpoints):
        check_alike(path, checkpoint, first)

    weights = {}
    for name in first["model"]:
        total = sum(checkpoint["model"][name].float() for checkpoint in checkpoints)
        weights[name] = (total / len(checkpoints)).half()
    flags = {name: first["args"][name] for name in ARGS}
    reader = dict(
        model=weights, charset=first["charset"], args=flags, step=first["step"], about=ABOUT)
    torch.save(reader, args.out)
    print(f"{args.out}: {pathlib.Path(args.out).stat().st_size / 1e6:.1f} MB")


def check_alike(path, checkpoint, first):
    """UserError unless a checkpoint is a recognizer whose weights can be added to the first's."""
    if "charset" not in checkpoint:
        raise UserError(f"{path}: no recognizer; expected a checkpoint of finetune.py")
    for name in ARGS:
        if checkpoint["args"][name] != first["args"][name]:
            raise UserError(f"{path}: --{name} {checkpoint['args'][name]}, and the first has "
                            f"{first['args'][name]}; name checkpoints of one kind")
    if checkpoint["charset"] != first["charset"]:
        raise UserError(f"{path}: another --charset than the first's; name checkpoints of one kind")


if __name__ == "__main__":
    run_main(main)
