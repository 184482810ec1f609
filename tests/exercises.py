"""Checks of the exercises in docs/course.md: each fails on the repository as it is, and passes once
the exercise is solved.

    python tests/exercises.py 1            checks the first
    git apply tests/solutions/1.diff       one way to solve it; `git apply -R` takes it back

If an exercise is not solved yet, the exit status is 1, and one line says what is missing."""
import argparse
import contextlib
import io
import os
import sys
import tempfile
from types import SimpleNamespace

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), ".."))
sys.path.insert(0, ROOT)
import torch

import evaluate
import finetune
import pretrain
from data import open_source, read_batch, read_charset
from model import METHODS, MODELS, Pretrainer, ViT, normalize_pixels, sincos_2d

FOUR = ("mim", "nsp", "lmim", "mnsp")               # the rows that METHODS comes with
CHARSET = "charset.txt"                             # where exercise 1 wants it


class NotYet(AssertionError):
    """What is still missing, in one sentence."""


def check(done, missing):
    if not done:
        raise NotYet(missing)


# ---- what several checks need

def words(n=8):
    """n rendered words, uint8 (n, 3, 32, 128)."""
    return read_batch(open_source("synth"), range(n)).images


def inputs(net, images, mask="random", mask_ratio=0.8):
    """What Pretrainer.forward is given: the crop, mim's guide, nsp's views, ids_keep, ids_mask."""
    flags = SimpleNamespace(seed=0, mask=mask)
    grid, patch = net.encoder.grid, net.encoder.patch
    numbers = pretrain.draw_numbers(0, len(images), net.method, flags, grid)
    guide, coarse = pretrain.make_views(images, net.method, net.scales, numbers, strength=1.0)
    ids_keep, ids_mask = pretrain.make_mask(numbers["mask"], mask, mask_ratio, grid, patch)
    return normalize_pixels(images), guide, coarse, ids_keep, ids_mask


def check_flags(*flags):
    """pretrain.py must take these flags."""
    sys.argv = ["pretrain.py", *flags]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            pretrain.parse_args()
    except SystemExit:
        raise NotYet(f"{' '.join(flags)} is refused: {said.getvalue().strip()}") from None


# ---- the exercises

def new_alphabet():
    """charset.txt holds another script's letters, fonts here have them, and a recognizer can be
    trained on it."""
    check(os.path.exists(CHARSET), f"there is no {CHARSET} in {os.getcwd()}")
    chars = read_charset(CHARSET)
    check(not chars.isascii(), f"{CHARSET} has only ASCII")
    with tempfile.TemporaryDirectory() as out:
        flags = (f"--model vit_nano --charset {CHARSET} --data synth:64 --val synth:16:1 "
                 "--max_steps 4 --batch_size 16 --workers 0").split()
        sys.argv = ["finetune.py", *flags, "--out_dir", out]
        finetune.main()
        net = evaluate.load_recognizer(os.path.join(out, "last.pt"))
    check(net.charset == chars, f"the recognizer knows {net.charset}")


def hide_columns():
    """--mask column hides whole columns of patches."""
    check_flags("--method", "mim", "--mask", "column")
    net = Pretrainer("mim", "vit_tiny")
    _, _, _, _, hidden = inputs(net, words(5), mask="column", mask_ratio=0.75)
    mask = torch.zeros(5, 256).scatter(1, hidden, 1.0).view(5, *net.encoder.grid)
    check((mask == mask[:, :1]).all(), "a column of patches is hidden in part")
    check(mask.mean() == 0.75, f"{mask.mean():.2f} of the patches are hidden, and not 0.75")
    check(not (mask[0] == mask[1]).all(), "every crop has the same columns hidden")


def square_places():
    """Places on a square grid, as MAERec and LMIM store them for 8 x 32 patches: a row of the crop is
    two rows of places."""
    encoder = ViT(**MODELS["vit_small"]["encoder"])
    square = sincos_2d(384, (16, 16), (16, 16))
    check(torch.allclose(encoder.pos_embed[0, 1:], square, atol=1e-6), "places are not those of 16 x 16")
    check(encoder.grid == (8, 32), "the patches themselves must stay where they are, 8 x 32")
    check((encoder.pos_embed[0, 0] == 0).all(), "[cls] has no place, and now it has a code")


def let_nsp_cheat():
    """NSP sees the fine scale: what it predicts changes with the crop though its views do not."""
    torch.manual_seed(0)
    net = Pretrainer("nsp", "vit_nano").eval()
    image, guide, coarse, ids_keep, ids_mask = inputs(net, words())
    with torch.no_grad():
        _, _, pred = net(image, guide, coarse, ids_keep, ids_mask)
        _, _, other = net(-image, guide, coarse, ids_keep, ids_mask)
    check(not torch.equal(pred["nsp"], other["nsp"]),
          "the prediction does not depend on the crop: nothing of it is seen")


def drop_mla():
    """Without MLA nothing keeps mnsp's [cls] tokens apart."""
    check(METHODS["mnsp"]["align"] == 0, "mnsp still aligns [cls]")
    torch.manual_seed(0)
    net = Pretrainer("mnsp", "vit_nano")
    given = inputs(net, words(16))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    for _ in range(60):
        loss, terms, _ = net(*given)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    check("align" not in terms, "there is a term align")
    check(terms["spread"] < 0.8, f"spread is {terms['spread']:.2f}: something keeps [cls] tokens apart")


def fifth_method():
    """A fifth row of METHODS, other than the README's, that trains every parameter it has."""
    new = [name for name in METHODS if name not in FOUR]
    check(new, "METHODS has the four rows it came with")
    for name in new:
        readme = dict(guide="coarse", mim=1.0, nsp=1.0, align=0.0)
        check(METHODS[name] != readme, f"{name} is the row of the README")
        check_flags("--method", name)
        net = Pretrainer(name, "vit_nano")
        loss, _, _ = net(*inputs(net, words()))
        loss.backward()
        check(loss.isfinite(), f"{name}: the loss is {loss.item()}")
        for parameter_name, parameter in net.named_parameters():
            trained = parameter.grad is not None or not parameter.requires_grad
            check(trained, f"{name}: nothing trains {parameter_name}")


EXERCISES = [new_alphabet, hide_columns, square_places, let_nsp_cheat, drop_mla, fifth_method]


def main():
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    numbers = range(1, len(EXERCISES) + 1)
    parser.add_argument("numbers", type=int, nargs="+", choices=numbers, help="which exercises")
    for number in parser.parse_args().numbers:
        exercise = EXERCISES[number - 1]
        asked = one_line(exercise.__doc__)
        try:
            exercise()
        except NotYet as missing:
            sys.exit(f"not yet: {asked} But {one_line(missing)}")
        except Exception as error:                  # a change that is half made breaks at any place
            sys.exit(f"not yet: {asked} {type(error).__name__}: {one_line(error)}")
        print(f"solved: {asked}")


def one_line(text):
    return " ".join(str(text).split())


if __name__ == "__main__":
    main()
