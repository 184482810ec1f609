"""What has to be shown on a GPU, by one command, in at most nine minutes.

    python tests/gpu.py                         all parts: the cheapest first, the compiled ones last
    python tests/gpu.py --parts losses train --against peer.py
    python tests/gpu.py --profile mnsp          no parts: the twenty dearest kernels of a step
    python tests/gpu.py --device cpu --tiny     the whole with tiny sizes, as a test of this file

Each part runs in a process of its own and has its own time limit: if one fails, hangs or takes all of the
memory, the others still run. A figure is printed as soon as it is known, as one line of JSON. A line with
"ok" is a check; if one is false, or a part fails, the exit status is 1.

    what_it_is      the card, and how fast it multiplies matrices
    losses          each method's loss, gradient, views and masks beside the CPU's; bfloat16 beside float32
    readings        words that the GPU reads as the CPU does
    waits           no step of pretrain.py and finetune.py waits for the GPU
    one_rank        the same loss and gradient with DDP and NCCL, by torchrun, and from a recording
    resume          a run that is killed and resumed has the losses of one that was left alone
    curve           bfloat16's losses over 200 steps stay within 1 % of float32's
    train, read     speed and memory of a step, its share of the matrix product; words read a second
    run             pretrain.py with its loader: the share of time that it waits for crops
    graphs          --compile compiles each block as a whole, nothing after the second step, and keeps the losses
    compiled        train with compiled layers and recorded steps, and the seconds until they are ready

For --against see bench.py."""
import contextlib
import copy
import importlib.util
import inspect
import json
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from functools import partial
from types import SimpleNamespace

import torch
import torch.distributed as dist

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import bench
import common
import data
import finetune
import pretrain
from model import METHODS, MODELS, Pretrainer, Recognizer, ViT

SECONDS = 540                   # for all parts together
WITH_TEACHER = "lmim with a teacher"
KINDS = [*METHODS, WITH_TEACHER]
RECORDED = 5                    # steps, after which all are replayed, see common.Replayed
fork = multiprocessing.get_context("fork")              # a child need not import torch again


# ---- lines of JSON

def show(**figures):
    """One line, at once."""
    print(json.dumps(figures), flush=True)


def check(name, ok, **figures):
    show(check=name, ok=bool(ok), **figures)
    if not ok:
        check.failed = True


check.failed = False


# ---- what the parts share

def sizes_of(args):
    """How large everything is: as the papers', or tiny."""
    if args.tiny:
        return SimpleNamespace(model="vit_nano", crops=4, batches=[4], rounds=1, n=64, words=[4], steps=4, curve=4,
                               workers=0)
    return SimpleNamespace(model="vit_small", crops=16, batches=[256, 64], rounds=8, n=8192, words=[128, 512],
                           steps=20, curve=200, workers=12)


def bench_args(args, **changed):
    """What the functions of bench.py need of its flags."""
    sizes = sizes_of(args)
    given = dict(model=sizes.model, dtype="bfloat16", device=args.device, rounds=sizes.rounds, sync="default",
                 teacher=False, against=args.against, ckpt=None, compile=False, processes=[1], data=["synth"],
                 workers=sizes.workers, n=sizes.n)
    return SimpleNamespace(**dict(given, **changed))


def noise(n, device):
    """Crops of noise, the same on every device."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, 3, common.H, common.W), dtype=torch.uint8, generator=generator).to(device)


def method_of(kind):
    """The row of METHODS."""
    if kind == WITH_TEACHER:
        return "lmim"
    return kind


def build(kind, model, device):
    """A Pretrainer for a row of METHODS, or for lmim with a teacher, from a fixed seed."""
    torch.manual_seed(0)
    teacher = None
    if kind == WITH_TEACHER:
        teacher = ViT(**MODELS[model]["encoder"]).to(device)
    return Pretrainer(method_of(kind), model, teacher=teacher).to(device)


def make_step(kind, images, args, compiled=False):
    """-> a call that is one step of pretrain.py on these crops, in bfloat16."""
    flags = bench_args(args, teacher=kind == WITH_TEACHER)
    with quick_compiler(args):
        return bench.make_training_step(method_of(kind), images, flags, compiled)


@contextlib.contextmanager
def quick_compiler(args):
    """With --tiny, layers are traced, but no code is made for the device: that takes a CPU a minute."""
    plain = torch.nn.Module.compile
    if args.tiny:
        torch.nn.Module.compile = partial_method(plain, backend="eager")
    try:
        yield
    finally:
        torch.nn.Module.compile = plain


def partial_method(method, **more):
    def call(self, **options):
        return method(self, **more, **options)
    return call


def train_by(script, args, out, *flags):
    """Runs main of pretrain.py or finetune.py in this process -> the rows of its log. A flag such as
    --max_steps=200 takes the place of the usual one."""
    sizes = sizes_of(args)
    given = dict(model="vit_nano", data="synth:20000", batch_size=sizes.crops, max_steps=sizes.steps, log_every=1,
                 workers=sizes.workers, device=args.device, out_dir=out)
    usual = [f"--{name}={value}" for name, value in given.items()]
    typed = [flag.split("=")[0] for flag in flags]
    usual = [flag for flag in usual if flag.split("=")[0] not in typed]
    sys.argv = [script.__name__ + ".py", *usual, *flags]
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        script.main()
    return read_log(out)


def read_log(out):
    lines = pathlib.Path(out, "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def largest_difference(rows, others):
    """Of two logs' losses, as a share of the loss."""
    if len(rows) != len(others):
        return float("inf")
    return max(abs(a["loss"] - b["loss"]) / abs(b["loss"]) for a, b in zip(rows, others))


# ---- right

def what_it_is(args):
    """The card, and how fast it multiplies matrices."""
    card = "cpu"
    if args.device.startswith("cuda"):
        card = torch.cuda.get_device_name()
    show(device=card, torch=torch.__version__, product_tflops=tflops_of_product(args))


def tflops_of_product(args):
    """Of a plain product of matrices."""
    n = sizes_of(args).n
    a, b = torch.randn(2, n, n, device=args.device).bfloat16()
    times = bench.take_turns({"product": partial(torch.matmul, a, b)}, bench_args(args))
    return 2e-12 * n ** 3 / median(times["product"])


def median(values):
    return sorted(values)[len(values) // 2]


def loss_and_gradient(net, inputs, dtype):
    with common.autocast(inputs[0].device, dtype):
        loss, _, _ = net(*inputs)
    parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]
    grads = torch.autograd.grad(loss, parameters)
    return loss.item(), torch.cat([grad.flatten().float().cpu() for grad in grads])


def losses(args):
    """The device's loss and gradient beside the CPU's, in float32, and bfloat16's; and the views."""
    sizes = sizes_of(args)
    images = noise(sizes.crops // 2, "cpu")
    for kind in METHODS:
        net = build(kind, sizes.model, "cpu").eval()        # no dropout, whose numbers differ
        there = copy.deepcopy(net).to(args.device)
        inputs = bench.make_inputs(net, images, 0)
        inputs_there = bench.make_inputs(there, images.to(args.device), 0)
        views = 0.0
        for a, b in zip([inputs[1], *inputs[2]], [inputs_there[1], *inputs_there[2]]):
            if a is not None:
                views = max(views, (a - b.cpu()).abs().max().item())
        masks = torch.equal(inputs[3], inputs_there[3].cpu()) and torch.equal(inputs[4], inputs_there[4].cpu())

        loss, grad = loss_and_gradient(net, inputs, torch.float32)
        on_device, on_device_grad = loss_and_gradient(there, inputs_there, torch.float32)
        half, half_grad = loss_and_gradient(there, inputs_there, torch.bfloat16)
        grad_rel = ((on_device_grad - grad).norm() / grad.norm()).item()
        half_rel = ((half_grad - grad).norm() / grad.norm()).item()
        ok = masks and views < 1e-4 and abs(on_device - loss) < 1e-4 * loss and grad_rel < 1e-4
        check("losses", ok, method=kind, cpu=loss, device=on_device, gradient=grad_rel, views=views, masks=masks)
        check("bfloat16", abs(half - loss) < 0.01 * loss and half_rel < 0.02, method=kind, loss=half,
              gradient=half_rel)


def readings(args):
    """Words that the device reads as the CPU does."""
    sizes = sizes_of(args)
    net = random_reader(sizes.model).eval()
    images = data.read_batch(data.open_sources(["synth:100"]), range(4 * sizes.crops)).images
    expected = [text for text, _ in net.read(images)]
    there = copy.deepcopy(net).to(args.device)
    for turn in ("launched", "recorded", "replayed"):           # on a GPU, see Recognizer.decode_recorded
        found = [text for text, _ in there.read(images)]
        same = sum(a == b for a, b in zip(found, expected))
        check("readings", same == len(expected) and len(set(expected)) > 1, turn=turn, same=same, of=len(expected))


def random_reader(model):
    """A Recognizer of random weights, moved away from those that it starts at: words differ."""
    torch.manual_seed(1)
    net = Recognizer(ViT(**MODELS[model]["encoder"]), data.CHARSETS["94"], 25, **MODELS[model]["reader"])
    for parameter in net.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return net


def forbid_waiting(args):
    """From now on a step of the training loops, its reading of losses left out, may not wait for the GPU."""
    if not args.device.startswith("cuda"):
        return
    mode = torch.cuda.set_sync_debug_mode
    start, read, end = common.Log.start_step, common.Log.read_losses, common.Log.end_step
    started = []

    def start_step(log):
        start(log)
        started.append(log)
        if len(started) > 1:                                # libraries are loaded in the first
            mode("error")

    def read_losses(log):
        mode("default")
        read(log)

    def end_step(log):
        mode("default")
        end(log)
    common.Log.start_step, common.Log.read_losses, common.Log.end_step = start_step, read_losses, end_step


def waits(args):
    """Steps of pretrain.py and finetune.py that wait for nothing but their allowed reads."""
    forbid_waiting(args)
    with tempfile.TemporaryDirectory() as folder:
        for script, flags in ((pretrain, ["--method=mnsp"]), (pretrain, ["--method=lmim"]), (finetune, [])):
            name = " ".join([script.__name__, *flags])
            rows = train_by(script, args, os.path.join(folder, name), "--log_every=1000", *flags)
            check("waits", len(rows) == 2, script=name, steps=rows[-1]["step"])


def one_rank(args):
    """DDP and InfoNCE's gathering over NCCL, or gloo on a CPU, started by torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", __file__,
               "--rank", f"--device={args.device}"]
    if args.tiny:
        command.append("--tiny")
    subprocess.run(command, check=True)


def as_rank(args):
    """The one rank: loss and gradient with DDP and collectives, and without."""
    device = common.pick_device(args.device)
    net = build("mnsp", sizes_of(args).model, device).eval()
    inputs = bench.make_inputs(net, noise(sizes_of(args).crops, device), 0)
    loss, grad = loss_and_gradient(net, inputs, torch.float32)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend)
    net_to_record = copy.deepcopy(net)                      # DDP leaves hooks at a network's weights
    ddp = torch.nn.parallel.DistributedDataParallel(net, gradient_as_bucket_view=True)
    found, _, _ = ddp(*inputs)
    found.backward()
    check_gradient("one rank", net, found.item(), loss, grad, backend=backend)

    if device.type == "cuda":                               # the gathering amid a recording
        gradients = common.join_gradients(net_to_record)

        def forward_backward():
            found, _, _ = net_to_record(*inputs)
            found.backward()
            return found.detach()

        step = common.Replayed(forward_backward)
        for _ in range(5):
            gradients.zero_()
            found = step()
            dist.all_reduce(gradients)
        check_gradient("one rank, recorded", net_to_record, found.item(), loss, grad, backend=backend)
    dist.destroy_process_group()


def check_gradient(name, net, found, loss, grad, **more):
    """Of net's weights, beside a loss and gradient made another way."""
    parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]
    found_grad = torch.cat([parameter.grad.flatten().cpu() for parameter in parameters])
    grad_rel = ((found_grad - grad).norm() / grad.norm()).item()
    check(name, abs(found - loss) < 1e-5 * loss and grad_rel < 1e-4, loss=found, alone=loss, gradient=grad_rel,
          **more)


def resume(args):
    """pretrain.py is killed with SIGKILL after a checkpoint, and resumed: the losses of a run that was left
    alone."""
    steps = sizes_of(args).steps
    flags = [f"--save_every={steps // 3}", "--dtype=float32"]
    with tempfile.TemporaryDirectory() as folder:
        whole, cut = os.path.join(folder, "whole"), os.path.join(folder, "cut")
        in_child(train_by, pretrain, args, whole, *flags).join()
        child = in_child(train_by, pretrain, args, cut, *flags)
        while child.is_alive() and not os.path.exists(os.path.join(cut, "last.pt")):
            time.sleep(0.01)
        kill(child)
        killed_after = len(read_log(cut))
        in_child(train_by, pretrain, args, cut, *flags, "--resume").join()
        rows, others = read_log(cut), read_log(whole)
        # sums over threads of a GPU may change their last bits from run to run
        difference = largest_difference(rows, others)
        check("resume", difference < 1e-3 and killed_after < steps, steps=len(rows), killed_after=killed_after,
              difference=difference)


def curve(args):
    """bfloat16's losses beside float32's."""
    steps = sizes_of(args).curve
    crops = 4 * sizes_of(args).crops
    logs = {}
    with tempfile.TemporaryDirectory() as folder:
        for dtype in ("float32", "bfloat16"):
            out = os.path.join(folder, dtype)
            logs[dtype] = train_by(pretrain, args, out, f"--dtype={dtype}", f"--max_steps={steps}",
                                   f"--batch_size={crops}", f"--log_every={max(1, steps // 10)}")
    difference = largest_difference(logs["bfloat16"], logs["float32"])
    check("curve", difference < 0.01, steps=steps, difference=difference,
          float32=[row["loss"] for row in logs["float32"]], bfloat16=[row["loss"] for row in logs["bfloat16"]])


def graphs(args):
    """pretrain.py and finetune.py with --compile: no graph break, nothing compiled after step 2, and the
    losses of a run without."""
    from torch._dynamo.utils import counters
    start = common.Log.start_step
    stance = None

    def start_step(log):
        nonlocal stance
        started.append(log)
        if len(started) == 3:
            stance = torch.compiler.set_stance("fail_on_recompile")
        start(log)

    common.Log.start_step = start_step
    for script in (pretrain, finetune):
        with tempfile.TemporaryDirectory() as folder:
            flags = ["--dtype=float32", f"--max_steps={sizes_of(args).steps}"]
            if script is finetune:
                flags += ["--dropout=0", "--drop_path=0"]   # their numbers differ in compiled code
            started = [None] * 3                            # the eager run's steps are not counted
            eager = train_by(script, args, os.path.join(folder, "eager"), *flags)
            started = []
            counters.clear()
            with quick_compiler(args):
                compiled = train_by(script, args, os.path.join(folder, "compiled"), "--compile", *flags)
            torch.compiler.set_stance("default")
        difference = largest_difference(compiled, eager)
        breaks = sum(counters["graph_break"].values())
        check("graphs", breaks == 0 and difference < 1e-3, script=script.__name__, graph_breaks=breaks,
              graphs=counters["stats"]["unique_graphs"], difference=difference,
              first_step_s=compiled[0]["ms_per_step"] / 1000)


# ---- fast

def timed_steps(args, makers, crops, flops, product, compiled):
    """Times each step alone and shows its figures: {name: a function that makes the step}."""
    device = args.device
    for name, make in makers.items():
        torch.compiler.reset()                              # so many shapes and no more are kept of a layer
        began = time.perf_counter()
        step = make()
        step()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        first_step_s = time.perf_counter() - began
        if compiled and device.startswith("cuda"):
            for _ in range(RECORDED):
                step()
        ready_s = time.perf_counter() - began
        if device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats()
        seconds = median(bench.take_turns({name: step}, bench_args(args))[name])
        row = dict(speed=name, crops=crops, ms=1000 * seconds, crops_per_s=crops / seconds,
                   first_step_s=first_step_s, ready_s=ready_s, peak_gb=common.peak_memory(torch.device(device)))
        if name in flops:
            row.update(tflops=1e-12 * flops[name] * crops / seconds)
            row.update(of_product=row["tflops"] / product)
        show(**row)


def count_flops(kind, args):
    """Of a step, for one crop, see bench.py."""
    flags = bench_args(args, teacher=kind == WITH_TEACHER, device="cpu")
    return bench.count_flops(method_of(kind), flags)


def train(args, compiled=False):
    """Every method, each beside its peer."""
    sizes = sizes_of(args)
    flops = {kind: count_flops(kind, args) for kind in KINDS}
    product = tflops_of_product(args)
    for crops in sizes.batches:
        images = noise(crops, args.device)
        kinds = KINDS
        if compiled and crops != sizes.batches[0]:
            kinds = [WITH_TEACHER]                          # compiling the others anew takes too long
        makers = {}
        for kind in kinds:
            makers[kind] = partial(make_step, kind, images, args, compiled)
        for name, make in bench.load_peers(images, METHODS, bench_args(args)).items():
            if not compiled:
                makers[name] = make
            elif "compiled" in inspect.signature(make).parameters:
                makers[name] = partial(make, compiled=True)
        timed_steps(args, makers, crops, flops, product, compiled)


def read(args):
    """Reading to the longest word, with the key/value cache and by whole prefixes."""
    sizes = sizes_of(args)
    for words in sizes.words:
        flags = bench_args(args, batch_size=words)
        images = noise(words, args.device)
        net = bench.make_recognizers(["word"] * words, flags)["random"]
        ways = {"cached": net.decode, "whole prefixes": partial(bench.prefixes, net)}
        steps = {name: bench.make_reading_step(read_ids, images, torch.bfloat16) for name, read_ids in ways.items()}
        if images.is_cuda:
            steps["recorded"] = bench.make_recorded_reading_step(net, images, torch.bfloat16)
        for name, step in steps.items():
            seconds = median(bench.take_turns({name: step}, flags)[name])
            show(speed=f"read, {name}", words=words, ms=1000 * seconds, words_per_s=words / seconds)


def run(args):
    """pretrain.py itself with its loader, of rendered words and of an LMDB: how long it waits."""
    sizes = sizes_of(args)
    crops = sizes.batches[0]
    with tempfile.TemporaryDirectory() as folder:
        sources = {"rendered": "synth"}
        if importlib.util.find_spec("lmdb"):
            sources["LMDB"] = os.path.join(folder, "lmdb")
            pack = [sys.executable, str(ROOT / "data.py"), "pack", f"synth:{20 * crops}", sources["LMDB"]]
            subprocess.run(pack, stdout=subprocess.DEVNULL, check=True)
        else:
            show(speed="pretrain.py, LMDB", left_out="lmdb is not installed")
        if args.tiny and "LMDB" in sources:
            del sources["rendered"]                         # one is enough
        for name, source in sources.items():
            flags = bench_args(args, batch_size=crops, data=[source])
            rows = bench.run_pretraining("mnsp", 1, flags)
            seconds = sum(row["ms_per_step"] for row in rows) / 1000
            wait = sum(row["ms_per_step"] * row["wait"] for row in rows) / 1000 / seconds
            show(speed=f"pretrain.py, {name}", crops=crops, crops_per_s=crops * len(rows) / seconds, wait=wait)


def profile(args):
    """The twenty dearest kernels of a step of --profile, or on a CPU the dearest operations."""
    images = noise(sizes_of(args).batches[0], args.device)
    on_gpu = images.is_cuda
    step = make_step(args.profile, images, args, compiled=on_gpu)
    for _ in range(RECORDED):
        step()
    with torch.profiler.profile() as found:
        step()
        if on_gpu:
            torch.cuda.synchronize()
    rows = []
    for event in found.key_averages():
        us = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        rows.append((us, event.count, event.key))
    total = sum(us for us, _, _ in rows)
    for us, count, name in sorted(rows, reverse=True)[:20]:
        show(kernel=name[:100], ms=us / 1000, share=us / total, calls=count)


# ---- parts

# in this order, with the seconds that each may take
PARTS = {
    what_it_is: 30, losses: 60, readings: 40, waits: 60, one_rank: 60, resume: 60, curve: 90,
    train: 120, read: 60, run: 90, graphs: 90, partial(train, compiled=True): 150,
}


def name_of(part):
    if isinstance(part, partial):
        return "compiled"
    return part.__name__


def in_child(function, *words):
    """Starts a process that calls it, with all that it starts in a group of its own."""
    child = fork.Process(target=call_in_group, args=(function, *words))
    child.start()
    return child


def call_in_group(function, *words):
    os.setpgid(0, 0)
    function(*words)


def kill(child):
    """Ends a process and its group, whatever they do."""
    for end in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError):
            end(child.pid, signal.SIGKILL)
    child.join()


def call_part(part, args):
    common.pick_device(args.device)
    try:
        part(args)
    except Exception as error:
        traceback.print_exc()
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        show(part=name_of(part), failed=reason)
        sys.exit(1)
    sys.exit(1 if check.failed else 0)


def run_parts(args):
    """-> names of the parts that failed or were left out."""
    began, failed = time.perf_counter(), []
    for part, limit in PARTS.items():
        name = name_of(part)
        if args.parts and name not in args.parts:
            continue
        started = time.perf_counter()
        limit = min(limit, SECONDS - (started - began))
        if limit <= 0:
            show(part=name, failed=f"left out: the others took {SECONDS} s")
            failed.append(name)
            continue
        child = in_child(call_part, part, args)
        child.join(limit)
        if child.exitcode is None:
            show(part=name, failed=f"not ready after {limit:.1f} s")
        kill(child)
        if child.exitcode != 0:
            failed.append(name)
        show(part=name, seconds=time.perf_counter() - started, exit_status=child.exitcode)
    return failed


def parse_args():
    parser = common.Parser(__doc__)
    add = parser.add_argument
    add("--device", default="cuda", help="cuda, or cpu with --tiny")
    add("--tiny", action="store_true", help="tiny sizes; what is compiled is only traced")
    add("--parts", nargs="+", choices=[name_of(part) for part in PARTS], help="only these; left out: all")
    add("--against", nargs="+", default=[], metavar="FILE", help="train, compiled: peers, see bench.py")
    add("--profile", choices=KINDS, metavar="METHOD", help="no parts, but the dearest kernels of a step")
    add("--rank", action="store_true", help="for torchrun, which the part one_rank calls")
    return parser.parse_args()


def main():
    args = parse_args()
    if args.rank:
        as_rank(args)
    elif args.profile:
        common.pick_device(args.device)
        profile(args)
    else:
        failed = run_parts(args)
        show(failed=failed)
        check.failed = len(failed) > 0
    sys.exit(1 if check.failed else 0)


if __name__ == "__main__":
    main()
