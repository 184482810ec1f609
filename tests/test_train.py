"""pretrain.py and finetune.py: training arithmetic, resuming, what goes wrong and how it is said. Rendered words."""
import contextlib
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), ".."))
import data
import finetune
import pretrain
from data import UserError

TINY = ("--model vit_nano --data synth:64 --max_steps 6 --batch_size 16 --dtype float32 --workers 0 --device cpu "
        "--log_every 1 --save_every 2 --sample_every 1000").split()


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


def log_of(out):
    return list(map(json.loads, open(os.path.join(out, "log.jsonl"))))


def losses(out):
    return [row["loss"] for row in log_of(out) if "loss" in row]


def moments(out):
    """AdamW's second moments, summed: losses alone cannot show gradients that are a factor too large."""
    state = torch.load(os.path.join(out, "last.pt"), weights_only=True)["optimizer"]["state"]
    return sum(of["exp_avg_sq"].sum().item() for of in state.values())


def weights(out, name="last.pt"):
    return torch.load(os.path.join(out, name), weights_only=True)["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---- one process, two, or accumulated gradients

TEN = "--max_steps 10 --clip_grad 0 --save_every 10".split()
JOBS = {  # all without dropout
    "mim": (pretrain, ["--method", "mim", *TEN]),
    "nsp": (pretrain, ["--method", "nsp", *TEN]),
    "lmim": (pretrain, ["--method", "lmim", *TEN]),
    "mnsp": (pretrain, ["--method", "mnsp", *TEN]),
    "finetune": (finetune, ["--val", "synth:37:1", *TEN, "--max_steps", "20"]),
}
DRIVER = """
import json, math, os, signal, sys
sys.path.insert(0, sys.argv[1])
import torch, data, finetune, model, pretrain
rank, normalize, save, log = int(os.environ["RANK"]), pretrain.normalize, pretrain.Run.save, pretrain.Run.log

def main():
    for script, flags, plant in json.loads(sys.argv[2]):
        calls = []
        def planted(images):
            calls.append(0)
            if plant == "error" and rank == 1 and len(calls) == 3:
                raise ValueError("planted")
            return normalize(images) * (math.nan if plant == "data" and rank == 1 and len(calls) == 3 else 1)
        def logged(run):
            log(run)
            if plant == "weights" and rank == 1 and run.step == 3:
                next(run.raw.decoder.parameters()).data.fill_(math.nan)
            if plant == "stop" and rank == 1 and run.step == 3:
                signal.raise_signal(signal.SIGTERM)
            if plant == "uneven":                                            # rank 1 has three damaged crops
                a, b = (x.split([8, 5])[rank].requires_grad_() for x in torch.randn(2, 13, 8, generator=torch.Generator().manual_seed(0)))
                loss = model.align_infonce(a, b, crops=8)
                loss.backward()
                torch.save([loss.detach(), a.grad, b.grad], f"uneven{rank}.pt")
            if plant == "kill" and rank == 1 and run.step == 3 and not os.path.exists("killed"):
                open("killed", "w").close()
                os.kill(os.getpid(), signal.SIGKILL)
        def saved(run, name="last.pt"):
            torch.save(run.raw.state_dict(), f"{run.out}/rank{rank}.pt.weights")
            return save(run, name)
        pretrain.normalize, pretrain.Run.log, pretrain.Run.save = planted, logged, saved
        sys.argv = [script, *flags, *["--data", "synth:32"] * (plant == "fewer" and rank == 1)]
        try:
            {"pretrain": pretrain, "finetune": finetune}[script].main()
        except (data.UserError, KeyboardInterrupt) as error:
            print(f"rank {rank}: {error!r}", file=sys.stderr)
data.run(main)
"""


def two_ranks(folder, jobs, *flags):
    """Runs {name: (script, flags, what is planted in rank 1)} one after the other, two ranks of 8 crops; more flags of torchrun."""
    jobs = {name: (script.__name__, [*TINY, "--batch_size", "8", *flags, "--out_dir", str(folder / name)], plant)
            for name, (script, flags, plant) in jobs.items()}
    (folder / "driver.py").write_text(DRIVER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *flags]
    return subprocess.run([*command, str(folder / "driver.py"), ROOT, json.dumps(list(jobs.values()))], text=True,
                          capture_output=True, timeout=300, cwd=folder)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Folder of the runs of two ranks, and what the ranks said."""
    folder, mim = tmp_path_factory.mktemp("two"), ["--method", "mim"]
    planted = {"nan in data": (pretrain, mim, "data"),
               "nan in weights": (pretrain, [*mim, "--max_bad_steps", "2"], "weights"), "stop": (pretrain, mim, "stop"),
               "uneven": (pretrain, [*mim, "--max_steps", "1"], "uneven"), "fewer": (pretrain, mim, "fewer")}
    done = two_ranks(folder, {**{k: (*job, "") for k, job in JOBS.items()}, **planted})
    assert done.returncode == 0, done.stderr
    return folder, done.stderr


@pytest.fixture(scope="module")
def whole():
    return {}                                                                # losses, moments of one process with batches of 16


@pytest.mark.parametrize("name", JOBS)
def test_two_processes_equal_one(go, two, whole, name):
    """Ranks that draw the same crops or masks, InfoNCE without the other rank's negatives, gradients summed and not
    averaged, validation that reads a word twice."""
    out = go(JOBS[name][0], *JOBS[name][1])
    one, squares = whole[name] = losses(out), moments(out)
    assert losses(two[0] / name) == pytest.approx(one, abs=1e-5 * max(1, one[0])) and len(set(one)) == len(one) > 5
    assert moments(two[0] / name) == pytest.approx(squares, rel=.02)
    if name == "finetune":
        ned = [log_of(run)[-1]["val_ned"] for run in (out, two[0] / name)]
        assert ned[0] == pytest.approx(ned[1]) and ned[0] > 0


def test_infonce_of_uneven_ranks(two):
    """Padding that counts as a negative, a partner that is another crop, gradients that do not come back from the other rank."""
    a, b = both = torch.randn(2, 13, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    cos = torch.nn.functional.cosine_similarity(a[:, None], b, dim=-1) / 0.2
    found = (torch.logsumexp(cos, 0) + torch.logsumexp(cos, 1)) / 2 - cos.diagonal()
    rows = torch.stack([found[:8].mean(), found[8:].mean()])
    expected, parts = torch.autograd.grad(rows.sum(), both)[0], [torch.load(two[0] / f"uneven{rank}.pt") for rank in (0, 1)]
    assert [part[0].item() for part in parts] == pytest.approx(rows.tolist(), rel=1e-5)
    for side in (0, 1):
        torch.testing.assert_close(torch.cat([part[1 + side] for part in parts]), expected[side], rtol=1e-4, atol=1e-6)


def test_time_of_a_step(go, monkeypatch):
    """Work of the device for which only the log waits, left out; a picture or a checkpoint counted as training."""
    now = [0]
    monkeypatch.setattr(pretrain, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def takes(seconds, where, name):
        plain = getattr(where, name)

        def slow(*args, **kwargs):
            now[0] += seconds(*args)
            return plain(*args, **kwargs)
        monkeypatch.setattr(where, name, slow)

    takes(lambda *_: 1, pretrain, "make_mask")
    takes(lambda run, *numbers: 10 * (len(numbers) > 2), pretrain.Run, "over_ranks")        # of the terms, which the log reads
    takes(lambda *_: 100, pretrain.Run, "save")
    takes(lambda *_: 1000, pretrain, "draw_samples")
    rows = log_of(go(pretrain, "--log_every", "2", "--save_every", "1", "--sample_every", "3"))
    assert [row["ms_per_step"] for row in rows] == [1000 * (1 + 1 + 10) / 2] * 3
    assert [row["crops_per_s"] for row in rows] == [pytest.approx(2 * 16 / 12)] * 3


def test_ranks_of_other_data(two):
    """Nodes whose copies of the data differ: one rank would end first, and the others wait for it."""
    assert all(f"rank {rank} stands at step 0 of {two[0] / 'fewer'} and reads {n} crops" in two[1] for rank, n in ((0, 64), (1, 32)))
    assert not os.path.exists(two[0] / "fewer" / "last.pt")


@pytest.mark.parametrize("name", JOBS)
def test_accumulated_gradients_equal_one_large_batch(go, whole, name):
    """A loss that is not divided by accum_iter, other masks, views or crops for the parts than for the whole, InfoNCE
    without the other parts' negatives, or means over a micro-batch's characters: words would weigh differently."""
    script, flags = JOBS[name]
    parts = go(script, *flags, "--batch_size", "4", "--accum_iter", "4", out="parts")
    if name not in whole:
        out = go(script, *flags, out="whole")
        whole[name] = losses(out), moments(out)
    one, squares = whole[name]
    assert losses(parts) == pytest.approx(one, abs=1e-5 * max(1, one[0])) and moments(parts) == pytest.approx(squares, rel=.02)


def test_one_rank_with_nan_is_everybodys(two):
    """A step that one rank skips and the other takes: their weights would part. Or a rank that leaves alone."""
    folder, said = two
    rows = log_of(folder / "nan in data")
    ranks = [torch.load(folder / "nan in data" / f"rank{r}.pt.weights") for r in (0, 1)]
    assert [row["bad_steps"] for row in rows] == [0, 0, 1, 1, 1, 1] and same(*ranks) and rows[-1]["loss"] < 10
    for r in (0, 1):
        assert f"rank {r}: UserError('step 5: 2 steps in a row had a non-finite gradient" in said
    last = torch.load(folder / "nan in weights" / "last.pt", weights_only=True)
    assert last["step"] == 2 and all(v.isfinite().all() for v in last["model"].values())


def test_one_rank_that_is_told_to_stop_stops_all(two):
    """The other would wait for it for half an hour, or the checkpoint be of two different steps."""
    folder, said = two
    assert torch.load(folder / "stop" / "last.pt", weights_only=True)["step"] == 3
    assert all(f"rank {r}: KeyboardInterrupt()" in said for r in (0, 1))


def test_killed_rank(two, tmp_path):
    """torchrun starts all ranks again: they must find each other, go on at the checkpoint, and end where an unbroken run does."""
    done = two_ranks(tmp_path, {"mim": (pretrain, [*JOBS["mim"][1], "--save_every", "2", "--resume"], "kill")}, "--max_restarts=1")
    assert done.returncode == 0 and (tmp_path / "killed").exists() and "at step 2" in done.stdout, done.stderr
    assert same(weights(tmp_path / "mim"), weights(two[0] / "mim")) and losses(tmp_path / "mim") == losses(two[0] / "mim")


def test_one_ranks_failure_ends_all(tmp_path):
    """The rest would wait for it for half an hour."""
    done = two_ranks(tmp_path, {"run": (pretrain, ["--method", "mim", "--max_steps", "100000"], "error")})
    assert done.returncode == 1 and "ValueError: planted" in done.stderr


# ---- no step waits for the device

CHIP = """
import itertools, sys
sys.path.insert(0, sys.argv[1])
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend
import data, finetune, pretrain
given = sys.argv[2:]

class NeverWait(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and args[0].device.type == "chip":
            index = args[1] if isinstance(args[1], tuple) else args[1:2]
            assert all(x.device.type == "chip" for x in index if isinstance(x, torch.Tensor)), "an index on the host waits"
        out = func(*args, **(kwargs or {}))
        if func in (torch.Tensor.cpu, torch.Tensor.to) and args[0].device != out.device:
            assert out.device.type == "chip" and (kwargs or {}).get("non_blocking") and getattr(args[0], "pinned", False), "a copy waits"
        return out

def pin(x):
    x.pinned = True
    return x

def steps(run, steps=pretrain.Run.steps):
    for step in steps(run):
        with NeverWait():
            yield step

def over_ranks(run, *numbers):
    assert not any(isinstance(number, torch.Tensor) for number in numbers), "a tensor among numbers of the host waits"
    return list(numbers)

def to(module, device):
    for part in module.modules():
        part._parameters.update({k: torch.nn.Parameter(p.to(device)) for k, p in part._parameters.items() if p is not None})
        part._buffers.update({k: b.to(device) for k, b in part._buffers.items()})
    return module

backend = _DummyBackendModule()
backend.get_amp_supported_dtype = lambda: [torch.bfloat16]
_setup_privateuseone_for_python_backend("chip", backend)
with FakeTensorMode() as mode:                                  # tensors with a shape and a device, and no numbers
    crops = torch.zeros(8, 3, 32, 128, dtype=torch.uint8), ["word"] * 8, None, [], list(range(8))
    torch.nn.Module.to, torch.Tensor.pin_memory = to, pin
    data.SQUARE = mode.from_tensor(data.SQUARE)
    data.fixed = lambda constant, device: pin(mode.from_tensor(constant)).to(device, non_blocking=True)     # once a run
    pretrain.batches, pretrain.read_batch = lambda *_: itertools.repeat(crops), lambda *_: (crops[0][:0],)
    pretrain.Run.log = pretrain.Run.save = lambda *_: True
    pretrain.Run.due, pretrain.Run.steps, pretrain.Run.over_ranks = lambda *_: False, steps, over_ranks
    for script, flags in ((pretrain, "--method mnsp --scales 8x32 16x64"), (finetune, "--spell 0"),
                          (pretrain, "--method lmim --align infonce --mask block --batch_size 4 --accum_iter 2")):
        sys.argv = [script.__name__, *given, *flags.split()]
        script.main()
"""


def test_a_step_never_waits_for_the_device(tmp_path):
    """A number asked of the GPU, a tensor made on the host for it, a copy that waits for it or comes from memory that is not
    pinned: each stops the queue of work.
    Shown by the scripts' own loops on a device that holds no numbers, so that whoever asks for one fails."""
    flags = [*TINY, "--batch_size", "8", "--max_steps", "1", "--device", "chip:0", "--out_dir", str(tmp_path)]
    done = subprocess.run([sys.executable, "-c", CHIP, ROOT, *flags], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


# ---- learning

@pytest.mark.skipif("STR_SLOW" not in os.environ, reason="up to twenty minutes a method: STR_SLOW=1 runs it")
@pytest.mark.parametrize("method, steps, size, shares", [
    ("mim", 6000, 32, dict(mim=0.85)), ("nsp", 2000, 64, dict(nsp=0.5)), ("lmim", 6000, 32, dict(mim=0.92)),
    ("mnsp", 2000, 64, dict(mim=0.9, nsp=0.6))])
def test_overfits_2000_crops(go, method, steps, size, shares):
    """A method that learns nothing, whatever its parts do by themselves: its losses on 2,000 rendered crops must fall below
    these shares of what the best constant gets. Reached: mim 0.78, nsp 0.41, lmim 0.86, mnsp 0.86 and 0.55."""
    from data import normalize, open_source, read_batch
    from model import Pretrainer
    images, *_ = read_batch(range(2000), open_source("synth:2000"))
    target = Pretrainer("mim", "vit_nano").target(normalize(images))[-1].flatten(0, 1)
    out = go(pretrain, "--method", method, "--data", "synth:2000", *f"--max_steps {steps} --batch_size {size} --lr 1e-3 --dtype auto".split())
    rows = log_of(out)
    rows = [row for row in rows if row["step"] > steps - 400]
    for term, share in shares.items():
        reached = sum(row[term] for row in rows) / len(rows)
        assert reached < share * target.var(dim=0, correction=0).mean(), (method, term, reached)


# ---- schedule

def test_learning_rate(go):
    """A first step at rate 0, a warm-up that never ends, a cosine that ends early."""
    out = go(pretrain, "--method", "mim", "--lr", "1e-3", *"--min_lr 1e-5 --warmup_epochs 0.25 --epochs 0.5".split())
    rates = [row["lr"] for row in log_of(out)]
    cosine = [1e-5 + (1e-3 - 1e-5) * (1 + math.cos(math.pi * i / 3)) / 2 for i in range(3)]
    assert rates == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3, *cosine])


def test_layers_learn_at_their_own_rates(go):
    """--layer_decay that is parsed and grouped by, and never reaches the optimizer."""
    out = go(finetune, "--layer_decay", "0.5", "--max_steps", "2")
    groups = torch.load(os.path.join(out, "last.pt"), weights_only=True)["optimizer"]["param_groups"]
    shares = sorted({group["lr"] / max(g["lr"] for g in groups) for group in groups})
    assert shares == pytest.approx([0.5 ** k for k in range(7, -1, -1)])


def test_a_teachers_features_are_the_target(go):
    """--teacher that is loaded and not used, or that is saved; a picture that takes features for pixels."""
    teacher = os.path.join(go(pretrain, "--method", "mim", "--max_steps", "1", out="teacher"), "last.pt")
    flags = ["--method", "lmim", "--max_steps", "2", "--sample_every", "2"]
    out, pixels = go(pretrain, *flags, "--teacher", teacher, out="features"), go(pretrain, *flags, out="pixels")
    assert weights(out)["decoder.pred.bias"].shape == (128,) and weights(out).keys() == weights(pixels).keys()
    assert os.path.exists(os.path.join(out, "samples", "step_000002.png")) and losses(out) != losses(pixels)


def test_decay_groups():
    """Decay on biases, norms or tokens; a parameter in two groups or in none; the layers' rates upside down."""
    from model import MODELS, Pretrainer, Recognizer, ViT
    model = Pretrainer("mnsp", "vit_nano")
    decay, plain = (len(g["params"]) for g in pretrain.weight_groups(model, 0.05))
    assert decay + plain == sum(p.requires_grad for p in model.parameters())
    config = MODELS["vit_nano"]["encoder"]
    reader = Recognizer(ViT(**config), "abc", **MODELS["vit_nano"]["reader"])
    groups = pretrain.weight_groups(reader, 0.05, 0.5)
    scale = {id(p): g["lr_scale"] for g in groups for p in g["params"]}
    decays = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    named = dict(reader.named_parameters())
    assert scale[id(named["classifier.weight"])] == 1 and scale[id(named["encoder.norm.weight"])] == 1
    assert scale[id(named["encoder.blocks.5.mlp.fc1.weight"])] == 0.5
    assert scale[id(named["encoder.blocks.0.mlp.fc1.weight"])] == 0.5 ** 6
    assert scale[id(named["encoder.patch_embed.proj.weight"])] == 0.5 ** 7
    assert decays[id(named["encoder.cls_token"])] == 0
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


@pytest.mark.parametrize("script, flags, kind", [
    (pretrain, ["--method", "mnsp"], signal.SIGTERM),
    (finetune, ["--dropout", "0.1", "--drop_path", "0.1"], signal.SIGINT)])
def test_resume_is_bit_identical(go, monkeypatch, tmp_path, script, flags, kind):
    """Anything that a checkpoint forgets: moments, position in the data, masks, dropout. A signal saves and leaves, and
    `pretrain.py && finetune.py` must not go on with half a run."""
    whole, cut = go(script, *flags, out="whole"), str(tmp_path / "cut")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, 3, lambda: signal.raise_signal(kind))
        go(script, *flags, out="cut")
    assert torch.load(os.path.join(cut, "last.pt"), weights_only=True)["step"] == 3
    go(script, *flags, "--resume", out="cut")
    assert same(weights(whole), weights(cut)) and losses(whole) == losses(cut)


@pytest.mark.parametrize("torn", [True, False])
def test_crash_and_torn_checkpoint(go, monkeypatch, capsys, torn):
    """A crash between two checkpoints, then a torn file, then a crash between the two renames of a checkpoint: the run
    must go back to the one before it and say so, and never put a torn file in the place of the last whole one."""
    def crash(*_):
        raise KeyboardInterrupt
    flags = ["--method", "mim"]
    whole = go(pretrain, *flags, out="whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, 5, crash)
        go(pretrain, *flags, out="cut")
    last = os.path.join(os.path.dirname(whole), "cut", "last.pt")
    os.truncate(last, os.path.getsize(last) // (2 if torn else 1))
    capsys.readouterr()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        replace = os.replace
        patch.setattr(os, "replace", lambda old, new: crash() if old == last + ".tmp" else replace(old, new))
        go(pretrain, *flags, "--resume", out="cut")
    assert ("falling back" in capsys.readouterr().out) == torn
    cut = go(pretrain, *flags, "--resume", out="cut")
    assert same(weights(whole), weights(cut)) and losses(whole) == losses(cut)


def test_kill_while_a_checkpoint_is_written(go, tmp_path):
    """Half a file under a checkpoint's name, or a step twice in the log (tests/survive.py does this at length)."""
    flags, cut = ["--method", "mim", "--max_steps", "9", "--save_every", "1"], tmp_path / "cut"
    whole = go(pretrain, *flags, out="whole")
    for _ in range(2):
        command = [sys.executable, os.path.join(ROOT, "pretrain.py"), *TINY, *flags, "--resume", "--out_dir", str(cut)]
        with contextlib.suppress(FileNotFoundError):
            os.remove(cut / "last.pt.tmp")                                  # the last kill's, or this one comes too early
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while not ((cut / "last.pt").exists() and (cut / "last.pt.tmp").exists()):
            assert process.poll() is None
            time.sleep(0.001)
        process.kill()
        process.wait()
    go(pretrain, *flags, "--resume", out="cut")
    assert same(weights(whole), weights(cut)) and losses(whole) == losses(cut)


def test_best_alone_is_gone_on_from(go, capsys):
    """Killed between the first best.pt and last.pt: a run that starts anew in silence and writes over it."""
    flags = ["--val", "synth:2:1", "--max_steps", "2", "--sample_every", "1"]
    out = go(finetune, *flags)
    for name in "last.pt", "prev.pt":
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(out, name))
    best = torch.load(os.path.join(out, "best.pt"), weights_only=True)
    go(finetune, *flags, "--resume")
    assert f"best.pt at step {best['step']}" in capsys.readouterr().out
    assert torch.load(os.path.join(out, "last.pt"), weights_only=True)["best"] >= best["best"]


def test_torn_lines_of_the_log_are_dropped(go):
    """Half a line, left by a full disk or a crash in the midst of it, that makes --resume fail."""
    out = go(pretrain, "--method", "mim", "--max_steps", "3")
    with open(os.path.join(out, "log.jsonl"), "a") as f:
        f.write('{"step": 1, "lo{"step": 2, "loss": 1.0}\n{"step": 3, "loss"')
    go(pretrain, "--method", "mim", "--max_steps", "4", "--resume")
    assert [row["step"] for row in log_of(out)] == [1, 2, 3, 4]


def test_damage_is_counted_over_a_resume(go, monkeypatch, tmp_path):
    """A count that starts at zero with every --resume, so that nobody sees how much of the data is lost."""
    from PIL import Image
    for i in range(16):
        Image.new("RGB", (64, 16), (8 * i, 0, 0)).save(tmp_path / f"{i:02d}.png")
    (tmp_path / "15.png").write_bytes(b"torn")
    flags = ["--method", "mim", "--data", str(tmp_path), "--max_damaged", "0.5"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, 3, lambda: signal.raise_signal(signal.SIGTERM))
        go(pretrain, *flags)
    out = go(pretrain, *flags, "--resume")
    assert [row["damaged"] for row in log_of(out)] == [1, 2, 3, 4, 5, 6]


def test_out_dir_and_arguments_are_guarded(go):
    """A finished run overwritten in silence, or resumed as another method."""
    go(pretrain, "--method", "mim")
    with pytest.raises(UserError, match="add --resume"):
        go(pretrain, "--method", "mim")
    with pytest.raises(UserError, match="--mask_ratio 0.8 there, 0.6 here.*16 crops a step there, 8 here"):
        go(pretrain, "--method", "mim", "--mask_ratio", "0.6", "--batch_size", "8", "--resume")
    go(pretrain, "--method", "mim", "--resume")                             # at its end: nothing to do, nothing lost


def test_data_that_grew_is_no_longer_the_runs(go, tmp_path):
    """More crops under the same name: in another order, some would be seen twice and some never, and nobody be told."""
    crops = tmp_path / "crops"
    crops.mkdir()
    for i in range(17):
        if i == 16:
            go(pretrain, "--method", "mim", "--data", str(crops), "--max_steps", "1")
        data.Image.new("RGB", (64, 16), (8 * i, 0, 0)).save(crops / f"{i:02d}.png")
    with pytest.raises(UserError, match="--data held 16 crops and holds 17 now"):
        go(pretrain, "--method", "mim", "--data", str(crops), "--max_steps", "2", "--resume")


def test_a_charset_file_that_changed_is_no_longer_the_runs(go, tmp_path):
    """Letters in another order under the same name: classes would mean other letters, and the checkpoint name the old ones."""
    (tmp_path / "chars.txt").write_text(data.CHARSETS["62"])
    go(finetune, "--charset", str(tmp_path / "chars.txt"), "--max_steps", "1")
    (tmp_path / "chars.txt").write_text(data.CHARSETS["62"][::-1])
    with pytest.raises(UserError, match="--charset .*chars.txt"):
        go(finetune, "--charset", str(tmp_path / "chars.txt"), "--max_steps", "2", "--resume")


@pytest.mark.parametrize("script, paper", [
    (pretrain, dict(model="vit_small", batch_size=64, accum_iter=1, epochs=10, max_steps=None, blr=1.5e-4, min_lr=0, warmup_epochs=1,
                    weight_decay=0.05, mask="random", mask_ratio=0.8, guidance_strength=1)),
    (finetune, dict(model="vit_small", batch_size=64, epochs=10, max_steps=None, blr=2e-4 / 512 * 256, min_lr=0, warmup_epochs=1,
                    weight_decay=0.05, layer_decay=0.75, dropout=0.1, drop_path=0.1, charset="94", max_length=25, spell=0))])
def test_the_defaults_are_the_papers(monkeypatch, script, paper):
    """A small model's recipe, or a forgotten experiment, that became what everybody runs at LMIM's size (CVPR 2025, 4.1)."""
    class Parsed(Exception):
        pass

    def stop(args):
        raise Parsed(vars(args))
    monkeypatch.setattr(script, "Run", stop)
    monkeypatch.setattr(sys, "argv", [script.__name__ + ".py"])
    with pytest.raises(Parsed) as found:
        script.main()
    assert paper == {name: found.value.args[0][name] for name in paper}


@pytest.mark.parametrize("typed, steps", [("", 2000), ("--epochs 3", None), ("--epochs 3 --max_steps 7", 7)])
def test_epochs_that_are_typed_count(monkeypatch, typed, steps):
    """vit_nano's recipe is in steps, and would overrule them in silence."""
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--model", "vit_nano", *typed.split()])
    parser = data.Parser()
    pretrain.training_flags(parser)
    assert pretrain.parse(parser, pretrain.RECIPES).max_steps == steps


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
    rows = log_of(out)
    assert rows[2]["loss"] is None and rows[3]["loss"] > 0                    # JSON has no NaN
    assert rows[-1]["bad_steps"] == 1 and all(v.isfinite().all() for v in weights(out).values())
    bad = set(range(1000))
    with pytest.raises(UserError, match="3 steps in a row had a non-finite gradient.*last.pt"):
        go(pretrain, "--method", "mim", "--max_bad_steps", "3", out="always")


def test_full_disk_keeps_the_old_checkpoint(go, monkeypatch, capsys):
    """A half-written last.pt in place of a whole one, or a run that dies because the disk was full for a while."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    interrupt(monkeypatch, 3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, old[1])))      # a MiB
    interrupt(monkeypatch, 5, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, old))
    try:
        out = go(pretrain, "--method", "mim")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    said = capsys.readouterr().out
    assert "step 4: could not write" in said and "File too large" in said and "training goes on" in said
    assert torch.load(os.path.join(out, "prev.pt"), weights_only=True)["step"] == 2 and len(losses(out)) == 6
    assert not [name for name in os.listdir(out) if name.endswith(".tmp")]


def test_full_disk_that_holds_the_log_too(monkeypatch):
    """`nohup ... > out/log.txt`: what is said of the full disk cannot be written either, and would end the run."""
    training = pretrain.Run.__new__(pretrain.Run)
    training.rank = training.step = 0
    monkeypatch.setattr(sys, "stdout", open("/dev/full", "w"))
    with training.writing("last.pt"):
        raise OSError(28, "No space left on device")
    training.say("step 20  loss 1.000")


def test_best_that_could_not_be_written_is_not_announced(go, monkeypatch, tmp_path, capsys):
    """best.pt of worse weights, or none, under the accuracy of others. The first label of --val being damaged ends nothing.
    log.jsonl has one object a step, which holds the validation too."""
    files = [("a.png", "ab"), ("b.png", "cd")]
    for k, (name, _) in enumerate(files):
        data.Image.fromarray(data.open_source("synth:2")[k][0].permute(1, 2, 0).numpy()).save(tmp_path / name)
    (tmp_path / "val.tsv").write_text("".join(f"{name}\t{label}\n" for name, label in files))
    data_label = data.Files.label
    monkeypatch.setattr(data.Files, "label", lambda self, i: data_label(self, i) if i else (_ for _ in ()).throw(data.Damaged("torn")))
    write = pretrain.Run.write_checkpoint
    monkeypatch.setattr(pretrain.Run, "write_checkpoint", lambda run, name, damage: name != "best.pt" and write(run, name, damage))
    out = go(finetune, "--val", str(tmp_path / "val.tsv"), "--max_steps", "2", "--sample_every", "1")
    assert torch.load(os.path.join(out, "last.pt"), weights_only=True)["best"] == -1
    said = capsys.readouterr().out
    assert "best val" not in said and "--val: 1 crops are damaged" in said
    rows = log_of(out)
    assert [row["step"] for row in rows] == [1, 2] and all({"loss", "val_accuracy", "val_ned"} <= set(row) for row in rows)


def test_weights_that_are_not_finite_are_not_saved(go, monkeypatch, tmp_path):
    """A last.pt full of NaN, because the run ended before --max_bad_steps."""
    models, prepare = [], pretrain.Run.prepare
    monkeypatch.setattr(pretrain.Run, "prepare", lambda run, *rest: models.append(rest[0]) or prepare(run, *rest))
    interrupt(monkeypatch, 3, lambda: [p.data.fill_(math.nan) for p in models[0].parameters()])
    with pytest.raises(UserError, match="last checkpoint was not written"):
        go(pretrain, "--method", "mim")
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["step"] == 2


def test_loader_processes_end_with_the_run(tmp_path):
    """Workers that ignore signals and are never told to end: a finished or failed script would hang at its exit."""
    command = [sys.executable, os.path.join(ROOT, "pretrain.py"), *TINY, "--workers", "1", "--max_steps", "2"]
    for flags, status in (("--method mim", 0), ("--method mim --lr 1e30 --max_bad_steps 1 --max_steps 40", 2)):
        done = subprocess.run([*command, *flags.split(), "--out_dir", str(tmp_path / str(status))], capture_output=True,
                              text=True, timeout=300)
        assert done.returncode == status, done.stderr


@pytest.mark.parametrize("script, flags, said", [
    ("pretrain.py", ["--data", "nowhere"], "nowhere"),
    ("pretrain.py", ["--out_dir", "README.md/run"], "README.md/run"),
    ("pretrain.py", ["--batch_size", "0"], "pretrain.py: --batch_size 0: expected a number in [1, inf)"),
    ("pretrain.py", ["--batch_size", "1.5"], "pretrain.py: --batch_size 1.5: expected a number in [1, inf), whole"),
    ("pretrain.py", ["--method", "byol"], "byol"),
    ("pretrain.py", ["--mask_ratio", "1.4"], "1.4: expected a number in (0, 1)"),
    ("pretrain.py", ["--teacher", "README.md"], "README.md"),
    ("pretrain.py", ["--scales", "16"], "16x64"),
    ("pretrain.py", ["--scales", "12x50"], "12x50"),
    ("pretrain.py", ["--scales", "16x64", "8x32"], "coarse to fine"),
    ("pretrain.py", ["--method", "nsp", "--align", "mse"], "--method nsp"),
    ("pretrain.py", ["--method", "mim", "--align_weight", "-1"], "-1: expected a number in [0, inf)"),
    ("pretrain.py", ["--method", "nsp", "--guide", "coarse"], "a guide needs mim"),
    ("pretrain.py", ["--method", "mim", "--guide", "still"], "still needs nsp too"),
    ("pretrain.py", ["--device", "gpu"], "gpu"),
    ("pretrain.py", ["--device", "meta"], "--device meta"),
    ("pretrain.py", ["--epochs", "1e308"], "--epochs 1e308"),
    ("pretrain.py", ["--seed", "10000000000"], "--seed"),
    ("pretrain.py", ["--model"], "--model"),
    ("finetune.py", ["--init", "README.md"], "README.md"),
    ("finetune.py", ["--label_fraction", "0"], "--label_fraction"),
    ("finetune.py", ["--charset", "nowhere.txt"], "nowhere.txt"),
])
def test_wrong_commands_are_one_line(tmp_path, monkeypatch, capsys, script, flags, said):
    """A traceback for what the person who typed it can mend."""
    command = [script, *"--model vit_nano --max_steps 1 --out_dir".split(), str(tmp_path / "o"), *flags]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as left:
        data.run({"pretrain.py": pretrain, "finetune.py": finetune}[script].main)
    error = capsys.readouterr().err
    assert left.value.code == 2 and said in error and error.count("\n") == 1, error


def test_a_wrong_command_ends_with_2(tmp_path):
    """A status of 0 or 1, or a traceback on the way out, in a process of its own."""
    command = [sys.executable, os.path.join(ROOT, "pretrain.py"), "--data", "nowhere", "--out_dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "nowhere" in done.stderr and done.stderr.count("\n") == 1, done.stderr


# ---- fine-tuning's own

def test_fine_tuning_takes_over_the_encoder(go, tmp_path):
    """An --init that is parsed and not loaded; a new alphabet that throws the decoder away, or keeps other letters."""
    out = go(pretrain, "--method", "mnsp", "--max_steps", "2", out="pre")
    first = go(finetune, "--init", os.path.join(out, "last.pt"), "--freeze_encoder", "--max_steps", "1", out="fine")
    old, new = weights(out), weights(first)
    assert all(torch.equal(new[k], old[k]) for k in new if k.startswith("encoder."))
    (tmp_path / "greek.txt").write_text("αβγδ")
    from argparse import Namespace
    args = Namespace(init=os.path.join(first, "last.pt"), dropout=0.0, drop_path=0.0, model="vit_nano", max_length=25,
                     spell=1.0, freeze_encoder=False)
    model, said = finetune.build(args, "αβγδ")
    state = model.state_dict()
    kept = [k for k in state if k in new and state[k].shape == new[k].shape]
    kept = [k for k in kept if not k.startswith(("embed", "classifier", "char_head"))]
    assert all(torch.equal(state[k], new[k]) for k in kept) and len(kept) > 100
    assert "anew: " in said and "classifier.weight" in said


def test_labels_become_classes():
    """A missing end, an end that counts as padding, or a patch that is given its neighbour's letter."""
    from model import MODELS, Recognizer, ViT
    config = MODELS["vit_nano"]["encoder"]
    model = Recognizer(ViT(**config), "abc", **MODELS["vit_nano"]["reader"])
    targets = finetune.encode_labels(["ab", "c"], model)
    assert targets.tolist() == [[0, 1, model.end, model.pad], [2, model.end, model.pad, model.pad]]
    masks = torch.zeros(2, 32, 128, dtype=torch.uint8)
    masks[0, 8:16, 0:8], masks[0, 0:8, 120:128] = 1, 2             # patch (1, 0) holds 'a', patch (0, 15) 'b'
    chars = finetune.under_patches(masks, targets, model).view(2, 4, 16)
    assert chars[0, 1, 0] == 0 and chars[0, 0, 15] == 1
    assert (chars[1] == model.pad).all() and (chars != model.pad).sum() == 2


def test_label_fraction_is_the_same_every_time():
    """Another subset for every run: a table over methods would compare subsets."""
    source = data.open_sources(["synth:200"])
    one, two, other = (finetune.label_fraction(source, 0.1, seed) for seed in (0, 0, 1))
    words = lambda s: [s.where(i) for i in range(len(s))]
    assert len(one) == 20 and words(one) == words(two) != words(other)


def test_label_fraction_of_crops_that_count_often():
    """Places drawn, not crops: of a set that counts twenty times nearly every label would be used."""
    drawn = finetune.label_fraction(data.open_sources(["synth:200@20", "synth:50:1"]), 0.1, 0)
    seen = Counter(drawn.where(i) for i in range(len(drawn)))
    assert sorted(seen.values()) == [1] * 5 + [20] * 20


@pytest.mark.parametrize("labels, says", [(["да", "нет"], "no label keeps a letter under the protocol waics"), (["no", None], "no label;")])
def test_val_that_cannot_be_scored(go, tmp_path, capsys, labels, says):
    """Found at the first validation, an hour into a run that is then lost."""
    for k in range(2):
        data.Image.fromarray(data.open_source("synth:2")[k][0].permute(1, 2, 0).numpy()).save(tmp_path / f"{k}.png")
    rows = [json.dumps({"filename": f"{k}.png", "text": label}) for k, label in enumerate(labels)]
    (tmp_path / "val.jsonl").write_text("\n".join(rows))
    with pytest.raises(UserError, match=says):
        go(finetune, "--val", str(tmp_path / "val.jsonl"), "--max_steps", "1")
    assert "step 1 " not in capsys.readouterr().out


def test_ctrl_c_before_the_first_step(go, monkeypatch, tmp_path):
    """Taken for a stop between steps: labels are read to the end, and a checkpoint of step 0 then refuses the mended command."""
    monkeypatch.setattr(finetune, "fit_labels", lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        go(finetune, "--max_steps", "1")
    assert not list((tmp_path / "run").glob("*"))


def test_case_folded_words_are_drawn_in_both_cases(go, monkeypatch):
    """The 36-character set taken for what is drawn: upper case would never be seen in training."""
    seen, fit = [], finetune.fit_label
    monkeypatch.setattr(finetune, "fit_label", lambda label, *rest: seen.append(label) or fit(label, *rest))
    go(finetune, "--charset", "36", "--max_steps", "2")
    assert any(label != label.lower() for label in seen) and all(c.isalnum() for label in seen for c in label)
