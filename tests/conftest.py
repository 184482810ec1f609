"""The scripts lie one folder up and are imported from there. One thread a process: another number
of threads changes the last bits of a sum.

MODELS has one more row here, vit_square: a small grid of patches, 4 x 16. In one row of patches nobody sees
that rows and columns were exchanged."""
import os
import sys

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.pop("PYTHONUNBUFFERED", None)      # scripts that tests start would need no flush
sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), "..")))

from model import MODELS                                    # noqa: E402

MODELS["vit_square"] = dict(
    encoder=dict(depth=6, width=128, heads=4, patch=(8, 8)),
    decoder=dict(layers=2, width=128, heads=4, ffn=256, dropout=0.0),
    reader=dict(layers=2, width=128, heads=4, ffn=256))
