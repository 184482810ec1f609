"""Measures speed on a CPU or a GPU. Machines are shared and noisy, so what is compared takes turns, call by call.

    python tests/bench.py train --compile                                    each method, vit_small, 64 crops a step
    python tests/bench.py train --methods lmim --teacher --against peer.py   beside another implementation
    python tests/bench.py run --model vit_nano --data LMDB                   pretrain.py itself: its waits for data
    python tests/bench.py run --methods mnsp --processes 2 1                 two processes of a core, one of two
    python tests/bench.py read --batch_size 128 --ckpt out/finetune/best.pt  cached decoding, whole prefixes
    python tests/bench.py data --data LMDB --memory                          decoding, rendering, views

Prints medians and quartiles of the calls and ratios of medians; the last line is one JSON object with every figure. A
file for --against lies outside of the repository and defines functions of (images, dtype), crops (B, 3, 32, 128) in
uint8 on their device, that return a step to call: one named as a method takes turns with it, `read` with `read`.
"""
import importlib.util
import json
import multiprocessing
import os
import pathlib
import random
import resource
import subprocess
import sys
import tempfile
import time
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch.utils.flop_counter import FlopCounterMode

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import data
import evaluate
import pretrain
from data import H, W
from model import METHODS, MODELS, Pretrainer, Recognizer, ViT


# ---- taking turns

def take_turns(steps, args):
    """{name: step} -> {name: seconds of its --rounds calls}, after two to warm up."""
    gpu, seconds = args.device.startswith("cuda"), {name: [] for name in steps}
    for turn in range(-2, args.rounds):
        if gpu and turn == 0:
            torch.cuda.set_sync_debug_mode(args.sync)
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            torch.cuda.synchronize() if gpu else None
            seconds[name] += [time.perf_counter() - begin] * (turn >= 0)
    return seconds


def speed(name, seconds, crops, **more):
    """Prints and returns the figures of steps of so many crops that took so many seconds each."""
    low, ms, high = (1000 * np.quantile(seconds, (0.25, 0.5, 0.75))).tolist()
    print(f"{name:24} {1000 * crops / ms:9.1f} crops/s {ms:9.1f} ms ({low:.1f} to {high:.1f})  "
          + "  ".join(f"{key} {value:.3g}" for key, value in more.items()), flush=True)
    return dict(crops_per_s=1000 * crops / ms, ms=ms, quartiles=[low, high], **more)


def summary(rows, pairs, **more):
    """-> all figures; with, for each pair (a, b), how many times b's crops/s are a's."""
    rate = {name: row["crops_per_s"] for name, row in rows.items()}
    ratios = {f"{a} / {b}": rate[a] / rate[b] for a, b in pairs if a in rate and b in rate}
    print("".join(f"{name:52} {ratio:.2f}\n" for name, ratio in ratios.items()), end="")
    return dict(more, rows=rows, ratios=ratios)


def peers(images, names, args):
    """{FILE.name: a function that makes a step}: what the files of --against define of `names`."""
    found = {}
    for path in map(pathlib.Path, args.against):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
        for name in filter(partial(hasattr, module), names):
            found[f"{path.stem}.{name}"] = partial(getattr(module, name), images, getattr(torch, args.dtype))
    return found


# ---- pre-training

def training_step(method, images, args, compiled=False):
    """-> a call that is one step of pretrain.py on these crops: views, masks, forward, backward, clipping, AdamW."""
    device, generator = images.device, torch.Generator().manual_seed(0)
    teacher = ViT(**MODELS[args.model]["encoder"]).to(device) if args.teacher else None
    model = Pretrainer(method, args.model, teacher=teacher).to(device)
    net, mask = torch.compile(model) if compiled else model, SimpleNamespace(mask="random", mask_ratio=0.8)
    optimizer = torch.optim.AdamW(pretrain.weight_groups(model, 0.05), lr=1e-4, betas=(0.9, 0.95), fused=True)

    def step():
        views = pretrain.make_views(images, model.method, model.scales, generator)
        ids = pretrain.make_mask(len(images), mask, model.encoder, generator)
        ids_keep, ids_mask = (data.put(each, device) for each in ids)
        with torch.autocast(device.type, getattr(torch, args.dtype), enabled=args.dtype != "float32"):
            loss, _, _ = net(data.normalize(images), views, ids_keep, ids_mask)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


def train(args):
    """Steps of --methods and of their peers, and a plain product of matrices. Peak memory is a GPU's allocated, a CPU's
    resident, libraries and all."""
    images = torch.randint(0, 256, (args.batch_size, 3, H, W), dtype=torch.uint8, device=args.device)
    theirs = peers(images, args.methods, args)
    makers = {name: partial(training_step, name, images, args, args.compile) for name in args.methods} | theirs
    if args.only:
        step = makers[args.only]()
        for _ in range(3):
            step()
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return (torch.cuda.max_memory_allocated() if images.is_cuda else resident) / 2 ** 30

    # of a process that does nothing else; children come first, as their peak starts at the size of their parent
    alone = lambda name: subprocess.check_output([sys.executable, *sys.argv, "--only", name])
    peaks, work = {name: json.loads(alone(name).splitlines()[-1]) for name in makers}, {}
    for name in args.methods:                                     # matrix products of a step, attention's written out
        step = training_step(name, torch.zeros(2, 3, H, W, dtype=torch.uint8), args)
        with FlopCounterMode(display=False) as counter:
            step()
        work[name] = counter.get_total_flops() / 2                # of one crop
    a, b = torch.randn(2, args.n, args.n, device=args.device).to(getattr(torch, args.dtype))
    times = take_turns({"product": lambda: a @ b} | {name: make() for name, make in makers.items()}, args)
    plain, rows = 2e-12 * args.n ** 3 / np.median(times.pop("product")), {}
    print(f"matrix product {args.n} x {args.n}, {args.dtype}: {plain:.3g} TFLOP/s")
    for name, seconds in times.items():
        rate = 1e-12 * work.get(name, 0) * args.batch_size / np.median(seconds)
        counted = dict(gflop=work[name] / 1e9, tflops=rate, of_product=rate / plain) if name in work else {}
        rows[name] = speed(name, seconds, args.batch_size, peak_gb=peaks[name], **counted)
    pairs = [("mnsp", "lmim"), *((name.split(".")[1], name) for name in theirs)]
    return summary(rows, pairs, product_tflops=plain)


def run(args):
    """pretrain.py with its own loader: first one of --processes, then the next, three times. All make steps of as many
    crops; if there are several, a lone process has all of the cores that the most processes have one each of."""
    logs = {f"{method} x{p}": [] for method in args.methods for p in args.processes}
    for name in [*logs] * (3 if len(args.processes) > 1 else 1):
        method, p = name.split(" x")[0], int(name.split(" x")[1])
        flags = dict(method=method, model=args.model, dtype=args.dtype, device=args.device, log_every=1,
                     batch_size=args.batch_size // p, workers=-(-args.workers // p), max_steps=2 * args.rounds)
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={p}"] if p > 1 else []
        threads = {"OMP_NUM_THREADS": str(max(args.processes) // p)} if len(args.processes) > 1 else {}
        with tempfile.TemporaryDirectory() as out:
            command = [sys.executable, *launch, ROOT / "pretrain.py", "--data", *args.data, "--out_dir", out]
            command += [f"--{key}={value}" for key, value in flags.items()] + ["--compile"] * args.compile
            subprocess.run(command, env=os.environ | threads, stdout=subprocess.DEVNULL, check=True)
            log = pathlib.Path(out, "log.jsonl").read_text().splitlines()
        logs[name] += map(json.loads, log[args.rounds:])                               # half of the steps warm up
    rows = {}
    for name, log in logs.items():
        seconds = np.array([row["ms_per_step"] / 1000 for row in log])
        waits = float(seconds @ [row["wait"] for row in log] / seconds.sum())
        rows[name] = speed(name, seconds, args.batch_size, wait=waits, peak_gb=log[-1]["peak_gb"])
    first, *others = args.processes
    return summary(rows, [(f"{method} x{first}", f"{method} x{p}") for method in args.methods for p in others])


# ---- reading

def prefixes(net, images):
    """Greedy reading as LMIM does it: for each letter all of the decoder, over all places, the crop's keys made anew,
    and no stop before the end. -> ids (B, T)."""
    ids = torch.full((len(images), net.max_length + 2), net.end, device=images.device)
    ids[:, 0] = net.start
    memory = net.proj(net.encoder(images)[:, 1:])
    for t in range(net.max_length + 1):
        logits, _ = net.step(ids[:, :-1], [layer.cross_attn.keys_values(memory) for layer in net.layers])
        ids[:, t + 1] = logits[:, t, :net.pad].argmax(-1)
    ids[:, -1] = net.end                                                # no word is longer
    return ids[:, 1:]


class Planted(Recognizer):
    """Random weights whose words end where those of the data do: `lengths` (B,), found again by each crop's memory."""
    lengths = None

    def step(self, ids, memory, caches=None):
        logits, kept = super().step(ids, memory, caches)
        mark = memory[0][0, :, :, 0].flatten(1).float()                 # (B, D)
        if caches is None or caches[0].shape[3] == 0:
            self.marks = mark if len(mark) == len(self.lengths) else self.marks
        length = self.lengths[torch.cdist(mark, self.marks, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)]
        at = torch.arange(kept[0].shape[3] - ids.shape[1], kept[0].shape[3], device=ids.device)
        logits[:, :, self.end] = torch.where(at >= length[:, None], 1e4, -1e4).to(logits)
        return logits, kept


def read(args):
    source = data.open_sources(args.data)
    images, labels, *_ = data.read_batch(range(args.batch_size), source)
    images = images.to(args.device)
    net = Recognizer(ViT(**MODELS[args.model]["encoder"]), data.CHARSETS["94"], **MODELS[args.model]["reader"]).eval()
    net.classifier.bias.data[net.end] = -1e4                      # random weights: no word ends before it must
    planted = Planted(net.encoder, net.charset, **MODELS[args.model]["reader"]).eval().to(args.device)
    planted.lengths = torch.tensor(list(map(len, labels)), device=args.device)
    nets = {"random": net.to(args.device), "real lengths": planted}
    nets |= {"ckpt": evaluate.load_recognizer(args.ckpt, args.device)} if args.ckpt else {}
    dtype = getattr(torch, args.dtype)

    def reading(how):
        def step():
            with torch.inference_mode(), torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
                return how(data.normalize(images))
        return step
    found, steps = {}, {name: make() for name, make in peers(images, ["read"], args).items()}
    pairs = [(f"{kind} cached", name) for kind in ("random", "real lengths") for name in steps]
    for name, net in nets.items():
        cached, whole = reading(net.decode), reading(partial(prefixes, net))
        ids, other = cached()[0], whole()
        other = other.where((other == net.end).cumsum(1) == 0, net.end)[:, :ids.shape[1]]      # after an end all is end
        found[name] = dict(letters=ids.shape[1], same=(other == ids).float().mean().item())
        print(f"{name}: {ids.shape[1]} steps to the last word's end; {found[name]['same']:.2%} of letters agree")
        steps |= {f"{name} cached": cached, f"{name} whole prefixes": whole}
        pairs.append((f"{name} cached", f"{name} whole prefixes"))
    rows = {name: speed(name, seconds, args.batch_size) for name, seconds in take_turns(steps, args).items()}
    return summary(rows, pairs, **found)


# ---- data

def by_pillow(x, rng):
    """guidance_view's list for one crop, a Pillow image, as a loader's worker would do it -> float32 (3, 32, 128)."""
    u, size, smooth = rng.uniform, (W, H), Image.Resampling.BILINEAR
    grey = lambda x: x.convert("L").convert("RGB")
    crop = lambda x, w, h: x.resize(size, smooth, (u(0, w), u(0, h), W - u(0, w), H - u(0, h)))
    tilt = lambda: (1, u(0, 0.1), 0, u(0, 0.02), 1, 0, u(0, 4e-4), u(0, 2e-3))

    def bend(x):
        at = np.stack(np.meshgrid(np.linspace(0, W, 5), np.linspace(0, H, 5)), -1)            # (5, 5, 2) corners
        to = at + rng.normal(0, u(0.03, 0.05) * H, at.shape)
        mesh = [(tuple(at[[i, i + 1], [j, j + 1]].ravel().astype(int)),
                 to[[i, i + 1, i + 1, i], [j, j, j + 1, j + 1]].ravel()) for i in range(4) for j in range(4)]
        return x.transform(size, Image.Transform.MESH, mesh, smooth)
    operations = (
        lambda x: ImageEnhance.Contrast(x).enhance(u(0.5, 1)), lambda x: ImageEnhance.Sharpness(x).enhance(u(1, 2)),
        lambda x: x.filter(ImageFilter.GaussianBlur(u(0.5, 1.5))), lambda x: ImageOps.solarize(x, u(64, 192)),
        lambda x: crop(x, 0, 0.1 * H), lambda x: crop(x, 0.02 * W, 0), lambda x: Image.blend(x, grey(x), u()), bend,
        lambda x: x.rotate(u(-15, 15), smooth, expand=True).resize(size, smooth),
        lambda x: x.transform(size, Image.Transform.PERSPECTIVE, tilt(), smooth))
    for k in rng.permutation(10)[:rng.integers(3, 11)]:
        x = operations[k](x)
    if u() < 0.8:
        for kind, reach in ((ImageEnhance.Brightness, 0.4), (ImageEnhance.Contrast, 0.4), (ImageEnhance.Color, 0.2)):
            x = kind(x).enhance(u(1 - reach, 1 + reach))
        turned = (np.array(x.convert("HSV"), int) + np.array([u(-25, 25), 0, 0], int)) % 256
        x = Image.fromarray(turned.astype(np.uint8), "HSV").convert("RGB")
    return np.asarray(grey(x) if u() < 0.2 else x, np.float32).transpose(2, 0, 1) / 255


def loading(args):
    source, words, n, cores = data.open_sources(args.data), data.Synth(), args.batch_size, torch.get_num_threads()
    order, rng, generator = random.Random(0), np.random.default_rng(0), torch.Generator().manual_seed(0)
    some = lambda source: [source.get(order.randrange(len(source))).image for _ in range(n)]
    images = torch.stack(some(source))
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    calls = {"decode": partial(some, source), "render": partial(some, words),
             "guidance": partial(data.guidance_view, images, generator),
             "guidance, in place": partial(data.guidance_view, images, generator, moved=False),
             "augment": partial(data.augment, images, generator),
             "Pillow": lambda: [by_pillow(picture, rng) for picture in pictures]}
    on = lambda cores, call: lambda: (torch.set_num_threads(cores), call())
    steps = {name: on(1, call) for name, call in calls.items()} | {"guidance, all cores": on(cores, calls["guidance"])}
    rows = {name: speed(name, seconds, n) for name, seconds in take_turns(steps, args).items()}
    more = {"memory": memory(args)} if args.memory else {}
    return summary(rows, [("guidance", "Pillow"), ("guidance, all cores", "Pillow")], **more)


def memory(args):
    """MB of this process and its workers in an epoch: all that is resident (Rss), that with shared pages split among
    those who share them (Pss), and the latter without files, whose pages the system takes back when it needs them."""
    begin = time.perf_counter()
    source = data.open_sources(args.data)
    found, steps = {"open_s": time.perf_counter() - begin}, max(3, len(source) // args.batch_size)
    for step, _ in zip(range(1, steps + 1), data.batches(source, args.batch_size, 0, workers=args.workers)):
        if step in (1, steps // 2, steps):
            found[step] = {}
            for process in [os.getpid(), *(child.pid for child in multiprocessing.active_children())]:
                rollup = dict(line.split()[:2] for line in open(f"/proc/{process}/smaps_rollup").readlines()[1:])
                for key in ("Rss", "Pss", "Pss_Anon"):
                    name = f"{key} {'parent' if process == os.getpid() else 'workers'}"
                    found[step][name] = found[step].get(name, 0) + int(rollup[key + ":"]) // 1024
            print(f"batch {step} of {steps}, MB: {found[step]}", flush=True)
    return found


# ---- main

def main():
    parser = data.Parser(description=__doc__.split("\n\n")[0])
    commands, add = dict(train=train, run=run, read=read, data=loading), parser.add_argument
    add("command", nargs="?", choices=commands, help="see the top of this file; left out: all, one after the other")
    add("--model", choices=MODELS, default="vit_small", help="size of the networks; vit_nano is quick")
    add("--methods", nargs="+", choices=METHODS, default=[*METHODS], help="train, run: rows of METHODS in model.py")
    add("--data", nargs="+", default=["synth"], metavar="SRC", help="run, read, data: crops, see data.py")
    add("--batch_size", type=int, default=64, help="crops a step, of all processes together")
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16", help="of matrix products")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1")
    add("--compile", action="store_true", help="train, run: torch.compile our networks")
    add("--rounds", type=int, default=10, help="calls of each step that are timed")
    add("--n", type=int, default=4096, help="train: side of the matrices of the plain product; 8192 fills a GPU")
    add("--teacher", action="store_true", help="train: the target is a frozen ViT's features, as LMIM's is, not pixels")
    add("--against", nargs="+", default=[], metavar="FILE", help="train, read: peers to take turns with")
    add("--only", metavar="NAME", help="train: no times, the peak memory in GB of this step alone")
    add("--sync", choices=["default", "warn", "error"], default="default", help="what a step that waits for a GPU is")
    add("--processes", type=int, nargs="+", default=[1], help="run: how many share a step; several numbers take turns")
    add("--workers", type=int, default=min(4, os.cpu_count()), help="run, data: processes that read crops")
    add("--ckpt", metavar="FILE", help="read: a checkpoint of finetune.py, beside random weights")
    add("--memory", action="store_true", help="data: also an epoch of the loader; Linux only")
    add("--plain_malloc", action="store_true", help="on a CPU, leave malloc as it is without our scripts: as peers run")
    args = parser.parse_args()
    if not args.plain_malloc:
        data.device(args.device)
    one = "train" if args.only else args.command            # train calls this script anew, with --only
    print(json.dumps(commands[one](args) if one else {name: part(args) for name, part in commands.items()}))


if __name__ == "__main__":
    data.run(main)
