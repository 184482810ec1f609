"""Measures speed on a CPU or a GPU. Machines are shared and noisy, so what is compared takes
turns, call by call.

each method, vit_small, 64 crops a step; beside another implementation:
    python tests/bench.py train --compile
    python tests/bench.py train --methods lmim --teacher --against peer.py
pretrain.py itself, and how long it waits for data; two processes of a core each, one of two cores:
    python tests/bench.py run --model vit_nano --data LMDB
    python tests/bench.py run --methods mnsp --processes 2 1
reading with a cache, and by whole prefixes:
    python tests/bench.py read --batch_size 128 --ckpt out/finetune/best.pt
decoding files, rendering words, views:
    python tests/bench.py data --data LMDB --memory

Prints medians and quartiles of the calls and ratios of medians. The last line is one JSON object
with every figure.

A file for --against lies outside of the repository and defines functions of (images, dtype), crops
(B, 3, 32, 128) in uint8 on their device, that return a step to call. One named as a method takes
turns with it, `read` with `read`."""
import importlib.util
import json
import math
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
import common
import data
import evaluate
import pretrain
from common import H, W
from model import METHODS, MODELS, Pretrainer, Recognizer, ViT, compile_layers, normalize_pixels

WARM_UP = 2             # calls of each step before those that are timed
MASK_RATIO = 0.8
NEVER = -1e4            # a logit; float16 has it too


# ---- taking turns

def take_turns(steps, args):
    """{name: step} -> {name: seconds of its --rounds calls}, after WARM_UP calls of each."""
    on_gpu = args.device.startswith("cuda")
    seconds = {name: [] for name in steps}
    for turn in range(WARM_UP + args.rounds):
        if on_gpu and turn == WARM_UP:
            torch.cuda.set_sync_debug_mode(args.sync)
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if on_gpu:
                torch.cuda.synchronize()
            if turn >= WARM_UP:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def report_speed(name, seconds, crops, **more):
    """Prints and returns the figures of steps of so many crops that took so many seconds each."""
    low, ms, high = (1000 * np.quantile(seconds, (0.25, 0.5, 0.75))).tolist()
    crops_per_s = 1000 * crops / ms
    extra = "  ".join(f"{key} {value:.3g}" for key, value in more.items())
    print(f"{name:24} {crops_per_s:9.1f} crops/s {ms:9.1f} ms ({low:.1f} to {high:.1f})  {extra}",
          flush=True)
    return dict(crops_per_s=crops_per_s, ms=ms, quartiles=[low, high], **more)


def compare(rows, pairs, **more):
    """Prints, for each pair (a, b) of rows, how many times b's crops/s are a's -> all figures."""
    ratios = {}
    for a, b in pairs:
        if a in rows and b in rows:
            name = f"{a} / {b}"
            ratios[name] = rows[a]["crops_per_s"] / rows[b]["crops_per_s"]
            print(f"{name:52} {ratios[name]:.2f}")
    return dict(more, rows=rows, ratios=ratios)


def load_peers(images, names, args):
    """What the files of --against define of `names` -> {"FILE.name": a function that makes a
    step}."""
    found = {}
    for path in map(pathlib.Path, args.against):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for name in names:
            if hasattr(module, name):
                make = getattr(module, name)
                found[f"{path.stem}.{name}"] = partial(make, images, getattr(torch, args.dtype))
    return found


# ---- pre-training

def make_inputs(net, images, step):
    """What pretrain.py gives its model at a step: crop, guide, nsp's views, ids_keep, ids_mask."""
    return inputs_from_numbers(net, images, draw_numbers(net, len(images), step))


def draw_numbers(net, n_crops, step):
    flags = SimpleNamespace(seed=0, mask="random")
    return pretrain.draw_numbers(step, n_crops, net.method, flags, net.encoder.grid)


def inputs_from_numbers(net, images, numbers):
    numbers = {name: common.to_device(drawn, images.device) for name, drawn in numbers.items()}
    guide, coarse = pretrain.make_views(images, net.method, net.scales, numbers, 1.0)
    ids_keep, ids_mask = pretrain.make_mask(
        numbers["mask"], "random", MASK_RATIO, net.encoder.grid, net.encoder.patch)
    return normalize_pixels(images), guide, coarse, ids_keep, ids_mask


def make_training_step(method, images, args, compiled=False):
    """-> a call that is one step of pretrain.py on these crops: random numbers, views, masks,
    forward, backward, clipping, AdamW."""
    device, dtype = images.device, getattr(torch, args.dtype)
    teacher = None
    if args.teacher:
        teacher = ViT(**MODELS[args.model]["encoder"]).to(device)
    raw_model = Pretrainer(method, args.model, teacher=teacher).to(device)
    if compiled:
        compile_layers(raw_model)
    groups = common.weight_groups(raw_model, 0.05)
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=True)
    steps_done = 0

    def forward_backward(images, **numbers):
        inputs = inputs_from_numbers(raw_model, images, numbers)
        with common.autocast(device, dtype):
            loss, _, _ = raw_model(*inputs)
        loss.backward()
        return loss.detach()

    recorded = common.is_recorded(compiled, device)
    if recorded:
        common.join_gradients(raw_model)
        forward_backward = common.Replayed(forward_backward)

    def step():
        nonlocal steps_done
        numbers = draw_numbers(raw_model, len(images), steps_done)
        numbers = {name: common.to_device(drawn, device) for name, drawn in numbers.items()}
        forward_backward(images=images, **numbers)
        torch.nn.utils.clip_grad_norm_(raw_model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=not recorded)
        steps_done += 1
    return step


def peak_of_three_steps(step, device):
    """GB: a GPU's allocated memory, a CPU's resident memory, libraries and all."""
    for _ in range(3):
        step()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2 ** 30


def peak_of_process(name):
    """The peak memory of a step in a process that does nothing else: this command with --only."""
    command = [sys.executable, *sys.argv, "--only", name]
    last_line = subprocess.check_output(command).splitlines()[-1]
    return json.loads(last_line)


def count_flops(method, args):
    """Of a step, for one crop: its matrix products, with attention's written out."""
    two_crops = torch.zeros(2, 3, H, W, dtype=torch.uint8)
    step = make_training_step(method, two_crops, args)
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops() / 2


def train(args):
    """Steps of --methods and of their peers, and a plain product of matrices."""
    images = torch.randint(0, 256, (args.batch_size, 3, H, W), dtype=torch.uint8, device=args.device)
    theirs = load_peers(images, args.methods, args)
    makers = {}
    for method in args.methods:
        makers[method] = partial(make_training_step, method, images, args, args.compile)
    makers.update(theirs)
    if args.only:
        return peak_of_three_steps(makers[args.only](), images.device)

    # the children's peaks come first, since a child's peak starts at the size of its parent
    peaks = {name: peak_of_process(name) for name in makers}
    flops = {method: count_flops(method, args) for method in args.methods}
    a, b = torch.randn(2, args.n, args.n, device=args.device).to(getattr(torch, args.dtype))
    steps = {"product": partial(torch.matmul, a, b)}
    for name, make in makers.items():
        steps[name] = make()
    times = take_turns(steps, args)

    product = 2e-12 * args.n ** 3 / np.median(times.pop("product"))
    print(f"matrix product {args.n} x {args.n}, {args.dtype}: {product:.3g} TFLOP/s")
    rows = {}
    for name, seconds in times.items():
        more = dict(peak_gb=peaks[name])
        if name in flops:
            tflops = 1e-12 * flops[name] * args.batch_size / np.median(seconds)
            more.update(gflop=flops[name] / 1e9, tflops=tflops, of_product=tflops / product)
        rows[name] = report_speed(name, seconds, args.batch_size, **more)
    pairs = [("mnsp", "lmim")]
    pairs += [(name.split(".")[1], name) for name in theirs]
    return compare(rows, pairs, product_tflops=product)


# ---- pretrain.py itself

def run(args):
    """pretrain.py with its own loader: first one of --processes, then the next, three times. All
    make steps of as many crops. If there are several, a lone process has all of the cores that the
    most processes have one each of."""
    logs = {}
    for turn in range(3 if len(args.processes) > 1 else 1):
        for method in args.methods:
            for processes in args.processes:
                log = run_pretraining(method, processes, args)
                logs.setdefault(f"{method} x{processes}", []).extend(log)
    rows = {}
    for name, log in logs.items():
        seconds = np.array([row["ms_per_step"] / 1000 for row in log])
        waits = np.array([row["wait"] for row in log])
        wait = float(seconds @ waits / seconds.sum())
        rows[name] = report_speed(name, seconds, args.batch_size, wait=wait, peak_gb=log[-1]["peak_gb"])
    first, *others = args.processes
    pairs = [(f"{method} x{first}", f"{method} x{p}") for method in args.methods for p in others]
    return compare(rows, pairs)


def run_pretraining(method, processes, args):
    """Runs 2 * --rounds steps -> the rows of log.jsonl of the second half; the first warms up."""
    launch = []
    if processes > 1:
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = dict(os.environ)
    if len(args.processes) > 1:
        environment["OMP_NUM_THREADS"] = str(max(args.processes) // processes)
    with tempfile.TemporaryDirectory() as out:
        flags = dict(method=method, model=args.model, dtype=args.dtype, device=args.device, log_every=1,
                     batch_size=args.batch_size // processes, workers=math.ceil(args.workers / processes),
                     max_steps=2 * args.rounds, out_dir=out)
        command = [sys.executable, *launch, ROOT / "pretrain.py", "--data", *args.data]
        command += [f"--{name}={value}" for name, value in flags.items()]
        if args.compile:
            command.append("--compile")
        subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
        lines = pathlib.Path(out, "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines[args.rounds:]]


# ---- reading

def prefixes(net, images):
    """Greedy reading as LMIM does it: for each letter all of the decoder, over all places, the
    crop's keys made anew, and no stop before the end. -> ids (B, T)."""
    ids = torch.full((len(images), net.max_length + 2), net.end, device=images.device)
    ids[:, 0] = net.start
    memory = net.proj(net.encoder(images)[:, 1:])
    for t in range(net.max_length + 1):
        crop_kvs = [layer.cross_attn.keys_values(memory) for layer in net.layers]
        logits, _ = net.logits_after(ids[:, :-1], crop_kvs)
        ids[:, t + 1] = logits[:, t, :net.pad].argmax(-1)
    ids[:, -1] = net.end                                                # no word is longer
    return ids[:, 1:]


class Planted(Recognizer):
    """Random weights whose words end where those of the data do: `lengths` (B,)."""
    lengths = None

    def logits_after(self, characters, crop_kvs, caches=None):
        logits, kept = super().logits_after(characters, crop_kvs, caches)
        after = kept[0].shape[3]
        places = torch.arange(after - characters.shape[1], after, device=characters.device)
        ended = places >= self.lengths[:, None]                         # (B, T)
        logits[:, :, self.end] = torch.where(ended, -NEVER, NEVER).to(logits)
        return logits, kept


def make_recognizers(labels, args):
    """-> {name: a Recognizer}: random weights that read to the longest word, such that end where
    the labels do, and --ckpt."""
    sizes = MODELS[args.model]
    encoder, charset = ViT(**sizes["encoder"]), data.CHARSETS["94"]
    endless = Recognizer(encoder, charset, **sizes["reader"])
    endless.classifier.bias.data[endless.end] = NEVER
    planted = Planted(encoder, charset, **sizes["reader"])
    planted.lengths = torch.tensor([len(label) for label in labels], device=args.device)
    nets = {"random": endless, "real lengths": planted}
    nets = {name: net.eval().to(args.device) for name, net in nets.items()}
    if args.ckpt:
        nets["ckpt"] = evaluate.load_recognizer(args.ckpt, args.device)
    return nets


def make_reading_step(read_ids, images, dtype):
    """-> a call that reads the crops."""
    def step():
        with torch.inference_mode(), common.autocast(images.device, dtype):
            return read_ids(normalize_pixels(images))
    return step


def make_recorded_reading_step(net, images, dtype):
    """The same as `Recognizer.read` does it on a GPU."""
    def step():
        with torch.inference_mode():
            return net.decode_recorded(normalize_pixels(images), dtype)
    return step


def read(args):
    """Reading letter by letter with a cache, and without."""
    batch = data.read_batch(data.open_sources(args.data), range(args.batch_size))
    images = batch.images.to(args.device)
    dtype = getattr(torch, args.dtype)
    steps = {name: make() for name, make in load_peers(images, ["read"], args).items()}
    pairs = [(f"{kind} cached", name) for kind in ("random", "real lengths") for name in steps]
    found = {}
    for name, net in make_recognizers(batch.labels, args).items():
        cached = make_reading_step(net.decode, images, dtype)
        whole = make_reading_step(partial(prefixes, net), images, dtype)
        found[name] = compare_readings(name, cached()[0], whole(), net.end)
        steps[f"{name} cached"] = cached
        steps[f"{name} whole prefixes"] = whole
        pairs.append((f"{name} cached", f"{name} whole prefixes"))

    rows = {}
    for name, seconds in take_turns(steps, args).items():
        rows[name] = report_speed(name, seconds, args.batch_size)
    return compare(rows, pairs, **found)


def compare_readings(name, ids, whole, end):
    """ids (B, T) of cached decoding, whole (B, T') of whole prefixes -> how many steps were made,
    the share of letters that agree."""
    before_end = (whole == end).cumsum(1) == 0
    whole = whole.where(before_end, end)[:, :ids.shape[1]]              # after an end all is end
    same = (whole == ids).float().mean().item()
    print(f"{name}: {ids.shape[1]} steps to the last word's end; {same:.2%} of letters agree")
    return dict(letters=ids.shape[1], same=same)


# ---- views by Pillow, one crop at a time, as a loader's worker would make them

SMOOTH = Image.Resampling.BILINEAR


def change_contrast(picture, rng):
    return ImageEnhance.Contrast(picture).enhance(rng.uniform(0.5, 1))


def sharpen(picture, rng):
    return ImageEnhance.Sharpness(picture).enhance(rng.uniform(1, 2))


def blur(picture, rng):
    return picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 1.5)))


def solarize(picture, rng):
    return ImageOps.solarize(picture, rng.uniform(64, 192))


def cut_rims(picture, rng, widest_x, widest_y):
    left, right = rng.uniform(0, widest_x, 2)
    top, bottom = rng.uniform(0, widest_y, 2)
    return picture.resize((W, H), SMOOTH, (left, top, W - right, H - bottom))


def cut_vertically(picture, rng):
    return cut_rims(picture, rng, 0, 0.1 * H)


def cut_horizontally(picture, rng):
    return cut_rims(picture, rng, 0.02 * W, 0)


def fade(picture, rng):
    return Image.blend(picture, to_grey(picture), rng.uniform())


def rotate(picture, rng):
    return picture.rotate(rng.uniform(-15, 15), SMOOTH, expand=True).resize((W, H), SMOOTH)


def tilt(picture, rng):
    u = rng.uniform
    homography = (1, u(0, 0.1), 0, u(0, 0.02), 1, 0, u(0, 4e-4), u(0, 2e-3))
    return picture.transform((W, H), Image.Transform.PERSPECTIVE, homography, SMOOTH)


def bend(picture, rng):
    """Moves the corners of a 4 x 4 mesh."""
    corners = np.stack(np.meshgrid(np.linspace(0, W, 5), np.linspace(0, H, 5)), -1)     # (5, 5, 2)
    moved = corners + rng.normal(0, rng.uniform(0.03, 0.05) * H, corners.shape)
    mesh = []
    for i in range(4):
        for j in range(4):
            box = corners[[i, i + 1], [j, j + 1]].ravel().astype(int)
            quad = moved[[i, i + 1, i + 1, i], [j, j, j + 1, j + 1]].ravel()
            mesh.append((tuple(box), quad))
    return picture.transform((W, H), Image.Transform.MESH, mesh, SMOOTH)


def jitter_colours(picture, rng):
    """Brightness, contrast, saturation, hue."""
    changes = ((ImageEnhance.Brightness, 0.4), (ImageEnhance.Contrast, 0.4), (ImageEnhance.Color, 0.2))
    for change, most in changes:
        picture = change(picture).enhance(rng.uniform(1 - most, 1 + most))
    turn = np.array([rng.uniform(-25, 25), 0, 0], int)                  # of 256
    turned = (np.array(picture.convert("HSV"), int) + turn) % 256
    return Image.fromarray(turned.astype(np.uint8), "HSV").convert("RGB")


def to_grey(picture):
    return picture.convert("L").convert("RGB")


OPERATIONS = (change_contrast, sharpen, blur, solarize, cut_vertically, cut_horizontally, fade, bend,
              rotate, tilt)


def view_by_pillow(picture, rng):
    """guidance_view's list for one picture -> float32 (3, 32, 128)."""
    for k in rng.permutation(len(OPERATIONS))[:rng.integers(3, 11)]:
        picture = OPERATIONS[k](picture, rng)
    if rng.uniform() < 0.8:
        picture = jitter_colours(picture, rng)
    if rng.uniform() < 0.2:
        picture = to_grey(picture)
    return np.asarray(picture, np.float32).transpose(2, 0, 1) / 255


# ---- data

def draw_crops(source, n, order):
    return [source.get(order.randrange(len(source))).image for _ in range(n)]


def on_cores(cores, call):
    torch.set_num_threads(cores)
    call()


def loading(args):
    """Reading, rendering, and making views of crops, on one core."""
    source, words = data.open_sources(args.data), data.Synth()
    order, rng, generator = random.Random(0), np.random.default_rng(0), torch.Generator().manual_seed(0)
    images = torch.stack(draw_crops(source, args.batch_size, order))
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]

    def views_by_pillow():
        return [view_by_pillow(picture, rng) for picture in pictures]

    guidance = partial(data.guidance_view, images, generator)
    numbers = torch.rand(len(images), data.VIEW_NUMBERS, generator=generator)
    calls = {
        "decode": partial(draw_crops, source, args.batch_size, order),
        "render": partial(draw_crops, words, args.batch_size, order),
        "guidance": guidance,
        "guidance, in place": partial(data.still_view, images, numbers),
        "augment": partial(data.augment, images, generator),
        "Pillow": views_by_pillow,
    }
    steps = {name: partial(on_cores, 1, call) for name, call in calls.items()}
    steps["guidance, all cores"] = partial(on_cores, torch.get_num_threads(), guidance)
    rows = {}
    for name, seconds in take_turns(steps, args).items():
        rows[name] = report_speed(name, seconds, args.batch_size)
    more = {}
    if args.memory:
        more["memory"] = memory_of_loader(args)
    return compare(rows, [("guidance", "Pillow"), ("guidance, all cores", "Pillow")], **more)


def memory_of_loader(args):
    """MB of this process and its workers at three moments of an epoch."""
    began = time.perf_counter()
    source = data.open_sources(args.data)
    found = {"open_s": time.perf_counter() - began}
    steps = max(3, len(source) // args.batch_size)
    batches = data.batches(source, args.batch_size, 0, workers=args.workers)
    for step in range(1, steps + 1):
        next(batches)
        if step in (1, steps // 2, steps):
            found[step] = memory_of_processes()
            print(f"batch {step} of {steps}, MB: {found[step]}", flush=True)
    return found


def memory_of_processes():
    """All that is resident (Rss); that with shared pages split among those who share them (Pss);
    and the latter without files, whose pages the system takes back when it needs them."""
    totals = {}
    workers = [child.pid for child in multiprocessing.active_children()]
    for process in [os.getpid(), *workers]:
        who = "parent" if process == os.getpid() else "workers"
        lines = pathlib.Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        sizes = dict(line.split()[:2] for line in lines[1:])
        for key in ("Rss", "Pss", "Pss_Anon"):
            name = f"{key} {who}"
            totals[name] = totals.get(name, 0) + int(sizes[f"{key}:"]) // 1024
    return totals


# ---- the command line

COMMANDS = dict(train=train, run=run, read=read, data=loading)


def parse_args():
    parser = common.Parser(__doc__)
    add = parser.add_argument
    add("command", nargs="?", choices=COMMANDS,
        help="see the top of this file; left out: all, one after the other")
    add("--model", choices=MODELS, default="vit_small", help="size of the networks; vit_nano is quick")
    add("--methods", nargs="+", choices=METHODS, default=[*METHODS],
        help="train, run: rows of METHODS in model.py")
    add("--data", nargs="+", default=["synth"], metavar="SRC", help="run, read, data: crops, see data.py")
    add("--batch_size", type=int, default=64, help="crops a step, of all processes together")
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16", help="of matrix products")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1")
    add("--compile", action="store_true", help="train, run: torch.compile our networks")
    add("--rounds", type=int, default=10, help="calls of each step that are timed")
    add("--n", type=int, default=4096,
        help="train: side of the matrices of the plain product; 8192 fills a GPU")
    add("--teacher", action="store_true",
        help="train: the target is a frozen ViT's features, as LMIM's is, not pixels")
    add("--against", nargs="+", default=[], metavar="FILE", help="train, read: peers to take turns with")
    add("--only", metavar="NAME", help="train: no times, the peak memory in GB of this step alone")
    add("--sync", choices=["default", "warn", "error"], default="default",
        help="what a step that waits for a GPU is")
    add("--processes", type=int, nargs="+", default=[1],
        help="run: how many share a step; several numbers take turns")
    add("--workers", type=int, default=min(4, os.cpu_count()), help="run, data: processes that read crops")
    add("--ckpt", metavar="FILE", help="read: a checkpoint of finetune.py, beside random weights")
    add("--memory", action="store_true", help="data: also an epoch of the loader; Linux only")
    add("--plain_malloc", action="store_true",
        help="on a CPU, leave malloc as it is without our scripts: as peers run")
    return parser.parse_args()


def main():
    args = parse_args()
    if not args.plain_malloc:
        common.pick_device(args.device)
    if args.only:                                           # train calls this script anew, with --only
        figures = train(args)
    elif args.command:
        figures = COMMANDS[args.command](args)
    else:
        figures = {name: command(args) for name, command in COMMANDS.items()}
    print(json.dumps(figures))


if __name__ == "__main__":
    common.run_main(main)
