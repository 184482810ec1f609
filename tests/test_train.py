"""pretrain.py and finetune.py: training arithmetic, resuming, what goes wrong and how it is said. Rendered words, tiny runs."""
import json
import math
import os
import signal
import subprocess
import sys

import pytest
import torch

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), ".."))
import finetune
import pretrain
from data import UserError

TINY = ["--model", "vit_nano", "--data", "synth:64", "--max_steps", "6", "--batch_size", "16", "--dtype", "float32", "--workers", "0",
        "--device", "cpu", "--log_every", "1", "--save_every", "2", "--sample_every", "1000"]


@pytest.fixture
def go(monkeypatch, tmp_path):
    """Runs a script's main() with TINY and more flags; gives back its out_dir."""
    def call(script, *flags, out="run"):
        out = str(tmp_path / out)
        monkeypatch.setattr(sys, "argv", [script.__name__ + ".py", *TINY, *flags, "--out_dir", out])
        script.main()
        return out
    yield call
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def losses(out):
    return [row["loss"] for row in map(json.loads, open(os.path.join(out, "log.jsonl"))) if "loss" in row]


def weights(out, name="last.pt"):
    return torch.load(os.path.join(out, name), weights_only=True)["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---- one process, two, or accumulated gradients

METHOD_FLAGS = {"mim": [], "nsp": [], "lmim": [], "mnsp": ["--align", "mse"]}       # InfoNCE's negatives are the micro-batch's own


@pytest.mark.parametrize("method", METHOD_FLAGS)
def test_accumulated_gradients_equal_one_large_batch(go, method):
    """A loss that is not divided by accum_iter, or other masks, views or crops for the parts than for the whole."""
    flags = ["--method", method, *METHOD_FLAGS[method]]
    whole = losses(go(pretrain, *flags, out="whole"))
    parts = losses(go(pretrain, *flags, "--batch_size", "4", "--accum_iter", "4", out="parts"))
    assert parts == pytest.approx(whole, abs=1e-5) and len(set(whole)) == 6


def test_accumulated_gradients_equal_one_large_batch_in_fine_tuning(go):
    """Means over a micro-batch's characters: words would weigh differently in parts than in the whole."""
    whole = losses(go(finetune, "--clip_grad", "0", out="whole"))
    parts = losses(go(finetune, "--clip_grad", "0", "--batch_size", "4", "--accum_iter", "4", out="parts"))
    assert parts == pytest.approx(whole, rel=1e-5)


def torchrun(script, *flags, port):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}", os.path.join(ROOT, script)]
    return subprocess.run([*command, *TINY, "--batch_size", "8", *flags], capture_output=True, text=True, timeout=120,
                          env=dict(os.environ, OMP_NUM_THREADS="1"))


def test_two_processes_equal_one(go, tmp_path):
    """Ranks that draw the same crops or masks, InfoNCE without the other rank's negatives, gradients summed and not averaged."""
    one = losses(go(pretrain, "--method", "mnsp"))
    done = torchrun("pretrain.py", "--method", "mnsp", "--out_dir", str(tmp_path / "two"), port=29611)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "two") == pytest.approx(one, abs=1e-5)


def test_two_processes_equal_one_in_fine_tuning(go, tmp_path):
    """As above, for words: also that validation over two ranks reads each word once."""
    flags = ["--clip_grad", "0", "--val", "synth:37:1", "--max_steps", "3"]
    one = go(finetune, *flags)
    done = torchrun("finetune.py", *flags, "--out_dir", str(tmp_path / "two"), port=29612)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(one), rel=1e-5)


# ---- schedule

def test_learning_rate(go):
    """A first step at rate 0, a warm-up that never ends, a cosine that ends early."""
    out = go(pretrain, "--method", "mim", "--lr", "1e-3", "--min_lr", "1e-5", "--warmup_epochs", "0.25", "--epochs", "0.5")
    rates = [json.loads(line)["lr"] for line in open(os.path.join(out, "log.jsonl"))]
    cosine = [1e-5 + (1e-3 - 1e-5) * (1 + math.cos(math.pi * i / 3)) / 2 for i in range(3)]
    assert rates == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3, *cosine])


def test_decay_groups():
    """Decay on biases, norms or tokens; a parameter in two groups or in none; the layers' rates upside down."""
    from model import MODELS, Pretrainer, Recognizer, ViT
    model = Pretrainer("mnsp", "vit_nano")
    decay, plain = (len(g["params"]) for g in pretrain.weight_groups(model, 0.05))
    assert decay + plain == sum(p.requires_grad for p in model.parameters())
    config = {k: v for k, v in MODELS["vit_nano"].items() if k not in ("decoder", "reader")}
    reader = Recognizer(ViT(**config), "abc", **MODELS["vit_nano"]["reader"])
    groups = finetune.layer_groups(reader, 0.05, 0.5)
    scale = {id(p): g["lr_scale"] for g in groups for p in g["params"]}
    decays = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    named = dict(reader.named_parameters())
    assert scale[id(named["classifier.weight"])] == 1 and scale[id(named["encoder.norm.weight"])] == 1
    assert scale[id(named["encoder.blocks.5.mlp.fc1.weight"])] == 0.5 and scale[id(named["encoder.blocks.0.mlp.fc1.weight"])] == 0.5 ** 6
    assert scale[id(named["encoder.patch_embed.proj.weight"])] == 0.5 ** 7 and decays[id(named["encoder.cls_token"])] == 0
    assert decays[id(named["encoder.blocks.0.norm1.weight"])] == 0 and decays[id(named["classifier.weight"])] == 0.05


# ---- stopping and going on

def interrupt(monkeypatch, at, act):
    """Calls `act` when step `at` has been logged."""
    log = pretrain.Run.log

    def logged(run):
        log(run)
        if run.step == at:
            act()
    monkeypatch.setattr(pretrain.Run, "log", logged)


@pytest.mark.parametrize("script, flags", [(pretrain, ["--method", "mnsp"]), (finetune, ["--dropout", "0.1", "--drop_path", "0.1"])])
def test_resume_is_bit_identical(go, monkeypatch, script, flags):
    """Anything that a checkpoint forgets: moments, position in the data, masks, dropout, the log. SIGTERM saves and leaves."""
    whole = go(script, *flags, out="whole")
    with monkeypatch.context() as patch:
        interrupt(patch, 3, lambda: signal.raise_signal(signal.SIGTERM))
        cut = go(script, *flags, out="cut")
    assert torch.load(os.path.join(cut, "last.pt"), weights_only=True)["step"] == 3
    go(script, *flags, "--resume", out="cut")
    assert same(weights(whole), weights(cut)) and losses(whole) == losses(cut)


def test_crash_and_torn_checkpoint(go, monkeypatch, capsys):
    """A crash between two checkpoints, then a torn file: the run must go back to the one before it and say so."""
    whole = go(pretrain, "--method", "mim", out="whole")

    def crash():
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        interrupt(patch, 5, crash)
        with pytest.raises(KeyboardInterrupt):
            go(pretrain, "--method", "mim", out="cut")
    last = os.path.join(os.path.dirname(whole), "cut", "last.pt")
    with open(last, "r+b") as f:
        f.truncate(os.path.getsize(last) // 2)
    capsys.readouterr()
    cut = go(pretrain, "--method", "mim", "--resume", out="cut")
    assert "falling back" in capsys.readouterr().out
    assert same(weights(whole), weights(cut)) and losses(whole) == losses(cut)


def test_out_dir_and_arguments_are_guarded(go):
    """A finished run overwritten in silence, or resumed as another method."""
    go(pretrain, "--method", "mim")
    with pytest.raises(UserError, match="add --resume"):
        go(pretrain, "--method", "mim")
    with pytest.raises(UserError, match="--mask_ratio 0.8 there, 0.6 here.*16 crops a step there, 8 here"):
        go(pretrain, "--method", "mim", "--mask_ratio", "0.6", "--batch_size", "8", "--resume")
    go(pretrain, "--method", "mim", "--resume")                                     # at its end: nothing to do, nothing lost


# ---- what goes wrong

def test_bad_steps_are_skipped_and_counted(go, monkeypatch):
    """One NaN that poisons the weights, or a run that goes on for ever with nothing but NaN."""
    normalize, calls = pretrain.normalize, []

    def planted(images):
        calls.append(0)
        return normalize(images) * (math.nan if len(calls) in bad else 1)
    monkeypatch.setattr(pretrain, "normalize", planted)
    bad = {3}
    out = go(pretrain, "--method", "mim", out="once")
    rows = [json.loads(line) for line in open(os.path.join(out, "log.jsonl"))]
    assert rows[-1]["bad_steps"] == 1 and all(v.isfinite().all() for v in weights(out).values() if v.is_floating_point())
    bad = set(range(1000))
    with pytest.raises(UserError, match="3 steps in a row had a non-finite gradient.*last.pt"):
        go(pretrain, "--method", "mim", "--max_bad_steps", "3", out="always")


def test_full_disk_keeps_the_old_checkpoint(go, monkeypatch, capsys):
    """A half-written last.pt in place of a whole one, or a run that dies because the disk was full for a while."""
    save, calls = torch.save, []

    def full(state, file):
        calls.append(0)
        if len(calls) == 2:
            file.write(b"half")
            raise OSError(28, "No space left on device")
        save(state, file)
    monkeypatch.setattr(torch, "save", full)
    out = go(pretrain, "--method", "mim")
    assert "training goes on" in capsys.readouterr().out
    assert torch.load(os.path.join(out, "prev.pt"), weights_only=True)["step"] == 2 and len(losses(out)) == 6
    assert not [name for name in os.listdir(out) if name.endswith(".tmp")]


def test_loader_processes_end_with_the_run(tmp_path):
    """Workers that ignore signals and are never told to end: a finished or failed script would hang at its exit."""
    command = [sys.executable, os.path.join(ROOT, "pretrain.py"), *TINY, "--workers", "1", "--max_steps", "2"]
    for flags, status in ((["--method", "mim"], 0), (["--method", "mim", "--lr", "1e30", "--max_bad_steps", "1", "--max_steps", "40"], 2)):
        done = subprocess.run([*command, *flags, "--out_dir", str(tmp_path / str(status))], capture_output=True, text=True, timeout=60)
        assert done.returncode == status, done.stderr


@pytest.mark.parametrize("script, flags, said", [
    ("pretrain.py", ["--data", "nowhere"], "nowhere"),
    ("pretrain.py", ["--method", "byol"], "byol"),
    ("pretrain.py", ["--mask_ratio", "1.4"], "1.4: expected a number in (0, 1)"),
    ("pretrain.py", ["--teacher", "README.md"], "README.md"),
    ("pretrain.py", ["--scales", "16"], "16x64"),
    ("pretrain.py", ["--scales", "12x50"], "12x50"),
    ("pretrain.py", ["--method", "nsp", "--align", "mse"], "--method nsp"),
    ("pretrain.py", ["--device", "gpu"], "gpu"),
    ("finetune.py", ["--init", "README.md"], "README.md"),
    ("finetune.py", ["--label_fraction", "0"], "--label_fraction"),
    ("finetune.py", ["--charset", "nowhere.txt"], "nowhere.txt"),
])
def test_wrong_commands_are_one_line(tmp_path, script, flags, said):
    """A traceback for what the person who typed it can mend."""
    done = subprocess.run([sys.executable, script, "--model", "vit_nano", "--max_steps", "1", "--out_dir", str(tmp_path / "o"), *flags],
                          capture_output=True, text=True, cwd=ROOT, env=dict(os.environ, OMP_NUM_THREADS="1"))
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr


# ---- fine-tuning's own

def test_fine_tuning_takes_over_the_encoder(go, tmp_path):
    """An --init that is parsed and not loaded; a new alphabet that throws the decoder away, or keeps letters that mean others."""
    out = go(pretrain, "--method", "mnsp", "--max_steps", "2", out="pre")
    first = go(finetune, "--init", os.path.join(out, "last.pt"), "--freeze_encoder", "--max_steps", "1", out="fine")
    old, new = weights(out), weights(first)
    assert all(torch.equal(new[k], old[k]) for k in new if k.startswith("encoder."))
    (tmp_path / "greek.txt").write_text("αβγδ")
    from argparse import Namespace
    args = Namespace(init=os.path.join(first, "last.pt"), dropout=0.0, drop_path=0.0, model="vit_nano", max_length=25, spell=1.0,
                     freeze_encoder=False)
    model, said = finetune.build(args, "αβγδ")
    state = model.state_dict()
    kept = [k for k in state if k in new and state[k].shape == new[k].shape and not k.startswith(("embed", "classifier", "char_head"))]
    assert all(torch.equal(state[k], new[k]) for k in kept) and len(kept) > 100 and "anew: " in said and "classifier.weight" in said


def test_labels_become_classes():
    """A missing end, an end that counts as padding, or a patch that is given its neighbour's letter."""
    from model import MODELS, Recognizer, ViT
    config = {k: v for k, v in MODELS["vit_nano"].items() if k not in ("decoder", "reader")}
    model = Recognizer(ViT(**config), "abc", **MODELS["vit_nano"]["reader"])
    targets = finetune.encode(["ab", "c"], model)
    assert targets.tolist() == [[0, 1, model.end, model.pad], [2, model.end, model.pad, model.pad]]
    masks = torch.zeros(2, 32, 128, dtype=torch.uint8)
    masks[0, 8:16, 0:8], masks[0, 0:8, 120:128] = 1, 2                     # patch (1, 0) holds 'a', patch (0, 15) holds 'b'
    chars = finetune.under_patches(masks, targets, model).view(2, 4, 16)
    assert chars[0, 1, 0] == 0 and chars[0, 0, 15] == 1 and (chars[1] == model.pad).all() and (chars != model.pad).sum() == 2


def test_label_fraction_is_the_same_every_time():
    """Another subset for every run: a table over methods would compare subsets."""
    from data import open_source
    source = open_source("synth:200")
    one, two, other = (finetune.label_fraction(source, 0.1, seed) for seed in (0, 0, 1))
    words = lambda s: [s.label(i) for i in range(len(s))]
    assert len(one) == 20 and words(one) == words(two) != words(other)


def test_case_folded_words_are_drawn_in_both_cases(go, monkeypatch):
    """The 36-character set taken for what is drawn: upper case would never be seen in training."""
    seen, fit = [], finetune.fit_label
    monkeypatch.setattr(finetune, "fit_label", lambda label, *rest: seen.append(label) or fit(label, *rest))
    go(finetune, "--charset", "36", "--max_steps", "2")
    assert any(label != label.lower() for label in seen) and all(c.isalnum() for label in seen for c in label)
