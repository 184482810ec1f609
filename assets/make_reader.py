"""Makes reader.pt, the weights that evaluate.py takes when --ckpt is left out, of a checkpoint
of finetune.py: half precision, and no optimizer.

    python assets/make_reader.py out/ship_reader/best.pt
"""
import pathlib
import sys

import torch

ABOUT = ("vit_mini, pre-trained by mnsp and fine-tuned on rendered words and on the training crops "
         "of IIIT5k, SVT and ICDAR 2015, which are for research")
ARGS = ["model", "max_length", "spell", "charset"]      # the flags that evaluate.py looks at


def main():
    checkpoint = torch.load(sys.argv[1], map_location="cpu", weights_only=True)
    weights = {}
    for name, x in checkpoint["model"].items():
        weights[name] = x.half() if x.is_floating_point() else x
    args = {name: checkpoint["args"][name] for name in ARGS}
    reader = dict(
        model=weights, charset=checkpoint["charset"], args=args, step=checkpoint["step"],
        about=ABOUT)
    path = pathlib.Path(__file__).with_name("reader.pt")
    torch.save(reader, path)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
