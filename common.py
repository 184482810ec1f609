"""What every script needs, and no reader must read first: plain functions, in the order in
which a run uses them.

    errors and flags    UserError, run_main, Parser, number_in, add_training_flags
    device              pick_device, pick_dtype, autocast, to_device
    ranks               rank, world_size, join_ranks, sum_over_ranks
    checkpoints         read_checkpoint, load_state, find_checkpoint, save_checkpoint
    steps               learning_rate, weight_groups, wrap_model, step_unless_not_finite
    log                 say, Log

A checkpoint is one dict of plain types and tensors: model, optimizer, scaler, step, bad,
args and data."""
import argparse
import contextlib
import ctypes
import datetime
import gc
import inspect
import json
import math
import os
import re
import signal
import sys
import threading
import time
import traceback
import uuid
import warnings

import torch
import torch.distributed as dist

H, W = 32, 128                  # pixels of every crop, in this order everywhere


# ---- errors and flags

class UserError(Exception):
    """What the person who typed the command can mend, on one line: what came, what was
    expected, what to type."""


def run_main(main):
    """Calls main() and exits. What the user can mend becomes one line on stderr and exit
    status 2."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):       # a notebook's streams cannot be told
            # a letter that the terminal lacks is no error
            stream.reconfigure(errors="backslashreplace")
    status = 0
    try:
        main()
    except KeyboardInterrupt:
        status = 130
    except (UserError, OSError, RuntimeError) as error:
        text = one_line(error)
        # they hold the loader: its processes end now
        traceback.clear_frames(error.__traceback__)
        print(f"{os.path.basename(sys.argv[0])}: {text}", file=sys.stderr)
        status = 2
    leave_ranks(status)
    sys.exit(status)


def one_line(error):
    """The line that run_main prints. A RuntimeError that is not the loader's is a bug here
    and is raised again."""
    text = str(error).strip().split("\n")[-1]   # a loader's process sends its whole traceback
    if isinstance(error, RuntimeError):
        if "DataLoader worker" not in text:
            raise error
        text = text.rstrip(".")
        return f"{text}; if memory ran out, lower --workers; training goes on with --resume"
    if getattr(error, "filename", None):
        return f"{error.filename}: {error.strerror}"
    return text


class Parser(argparse.ArgumentParser):
    """Defaults in every help line; what is wrong in one line and exit status 2."""

    def __init__(self, **options):
        formatter = argparse.ArgumentDefaultsHelpFormatter
        super().__init__(formatter_class=formatter, allow_abbrev=False, **options)

    def error(self, message):
        message = re.sub("^argument (.*?): (.*: expected)", r"\1 \2", message)
        self.exit(2, f"{self.prog}: {message}\n")


def number_in(interval, kind=float):
    """A flag's type: a number in an interval, such as "(0, 1]"; kind=int takes whole
    numbers alone."""
    low, high = interval[1:-1].split(",")
    low, high = float(low), float(high)
    whole = ", whole" if kind is int else ""

    def parse_number(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        inside = low < value < high
        at_low = value == low and interval[0] == "["
        at_high = value == high and interval[-1] == "]"
        if not (inside or at_low or at_high):
            raise argparse.ArgumentTypeError(f"{text}: expected a number in {interval}{whole}")
        return value
    return parse_number


def parse_size(text):
    """"16x64" -> (16, 64), height first."""
    if not re.fullmatch("[1-9][0-9]*x[1-9][0-9]*", text):
        raise UserError(f"{text}: expected height x width in pixels, such as 16x64")
    height, width = text.split("x")
    return int(height), int(width)


def typed_flags():
    """Names of the flags on the command line: {"method", "batch_size", ...}."""
    return {word[2:].split("=")[0] for word in sys.argv[1:] if word.startswith("--")}


def add_training_flags(parser, models):
    """Flags that pretrain.py and finetune.py share; `models` are the names for --model."""
    add = parser.add_argument
    count = number_in("[1, inf)", int)
    positive = number_in("(0, inf)")
    not_negative = number_in("[0, inf)")

    add("--model", choices=models, default="vit_small",
        help="vit_nano trains on a laptop, vit_small is the papers'")
    add("--data", nargs="+", default=["synth"], metavar="SRC",
        help="synth[:N[:SEED]], an LMDB folder or a tree of them, a .txt/.tsv/.jsonl/.json of "
        "labels, a folder of images; SRC@5 is seen five times as often")
    add("--fonts",
        help="a folder of .ttf or .otf files for rendered words, besides those of the system")
    add("--rotate_tall", action="store_true",
        help="turn crops much taller than wide; for vertical words")
    add("--max_damaged", type=number_in("(0, 1)"), default=.01,
        help="stop if of 100 crops or more a larger share is unreadable, chance allowed for")
    add("--batch_size", type=count, default=64,
        help="crops a process and micro-step; lower it if memory runs out")
    add("--accum_iter", type=count, default=1,
        help="micro-steps that add up to a step; raise it as --batch_size falls")
    add("--epochs", type=number_in("(0, 1e9)"), default=10, help="passes over --data")
    add("--max_steps", type=count, help="steps in all, instead of --epochs")
    add("--blr", type=positive, default=1.5e-4,
        help="the learning rate is blr * crops a step / 256")
    add("--lr", type=positive, help="the learning rate itself, instead of --blr")
    add("--min_lr", type=not_negative, default=0.0, help="where the cosine ends")
    add("--warmup_epochs", type=not_negative, default=1,
        help="epochs of rising rate; with --max_steps the same share of them")
    add("--weight_decay", type=not_negative, default=0.05,
        help="AdamW's; never on biases, norms and tokens")
    add("--clip_grad", type=not_negative, default=0.0,
        help="largest norm of the gradient; 0 leaves it as it is")
    add("--max_bad_steps", type=count, default=10,
        help="stop after so many skipped (non-finite) steps in a row")
    add("--seed", type=number_in("[0, 4294967296)", int), default=0,
        help="of weights, masks, views and order")
    add("--workers", type=number_in("[0, inf)", int), default=min(4, os.cpu_count()),
        help="processes that read crops, for each rank; more if 'wait' is high")
    add("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto",
        help="of matrix products; auto: bfloat16 where the device has it, else float16 on a GPU, "
        "float32 on a CPU")
    add("--compile", action="store_true",
        help="some minutes' wait, then faster; a CPU gains little, and needs a C++ compiler")
    add("--device", default="auto",
        help="cpu, cuda, cuda:1; auto takes a CUDA GPU if there is one")
    add("--resume", action="store_true",
        help="go on from --out_dir's checkpoint, or start if there is none")
    add("--log_every", type=count, default=20, help="steps between lines of log.jsonl")
    add("--save_every", type=count, default=500, help="steps between checkpoints")
    add("--sample_every", type=count, default=1000,
        help="steps between pictures, or readings of all of --val")


def parse_with_recipe(parser, recipes, stored_model=None):
    """Parses with the defaults of --model's row of `recipes`, so that --help shows them
    too. `stored_model` is the size that a checkpoint was made with; it stands in for a
    --model that is not typed."""
    first = Parser(add_help=False)
    first.add_argument("--model", default=stored_model or "vit_small")
    model = first.parse_known_args()[0].model
    parser.set_defaults(model=model, **recipes.get(model, {}))
    if "epochs" in typed_flags():
        parser.set_defaults(max_steps=None)                 # the recipe's; what is typed stands
    return parser.parse_args()


def is_rendered(src):
    """True for a SRC of rendered words: synth, synth:N, synth:N:SEED, each perhaps with @N."""
    return re.split("[:@]", src)[0] == "synth"


def check_data_flags(parser, args):
    """Ends with one line if --fonts or --rotate_tall has no effect on what --data names."""
    rendered = [is_rendered(src) for src in args.data]
    if args.fonts and not any(rendered):
        parser.error(f"--fonts {args.fonts}: has no effect without rendered words; "
                     "add synth to --data")
    if args.rotate_tall and all(rendered):
        parser.error("--rotate_tall has no effect on rendered words, which lie flat; leave it out")


def check_training_flags(parser, args):
    """Ends with one line if a typed flag has no effect with the others. -> the typed names."""
    typed = typed_flags()
    if "blr" in typed and "lr" in typed:
        parser.error("--blr has no effect with --lr; leave one of them out")
    check_data_flags(parser, args)
    return typed


# ---- device

def pick_device(name):
    """--device -> torch.device; auto takes a CUDA GPU if there is one, that of this rank.
    UserError if it cannot be used."""
    kind = name
    if name == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda":
        kind = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(kind)
        torch.empty(1, device=device).cpu()     # which "meta", a device without memory, cannot
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # it plans anew for each new shape of reading
        torch.backends.cuda.enable_cudnn_sdp(False)
    if device.type == "cpu":
        keep_memory()
    return device


def keep_memory():
    """Tells glibc to keep the memory it has. Else it gives each large block back, and Linux
    clears it anew: half of a step's time."""
    M_MMAP_MAX, M_TRIM_THRESHOLD = -4, -1
    # another system, another C library
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(M_MMAP_MAX, 0)
        ctypes.CDLL(None).mallopt(M_TRIM_THRESHOLD, -1)


def pick_dtype(name, device):
    """--dtype -> torch.dtype. auto: bfloat16 where the device multiplies it fast, else
    float16 on a GPU, float32 on a CPU."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else torch.float16
    if device.type == "cpu" and cpu_has_bfloat16():
        return torch.bfloat16
    return torch.float32


def cpu_has_bfloat16():
    """True if this CPU multiplies matrices in bfloat16 (AVX512-BF16 or AMX). Only Linux
    says."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        return bool(re.search("avx512_bf16|amx_bf16", file.read()))
    return False


def autocast(device, dtype):
    """Matrix products in `dtype`; the weights stay float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def to_device(x, device):
    """A tensor on the device. From the host it goes by pinned memory, so that nothing waits
    for the copy (but not to MPS, which would read too late: pytorch issue 139550)."""
    if not x.is_cpu or torch.device(device).type in ("cpu", "mps"):
        return x.to(device)
    return x.contiguous().pin_memory().to(device, non_blocking=True)


def to_unit(images):
    """uint8, or float in [0, 1] -> float32 in [0, 1]."""
    if images.dtype == torch.uint8:
        return images.float() / 255
    return images.float()


# ---- ranks

def rank():
    """This process's number among all of torchrun's; 0 without it."""
    return int(os.environ.get("RANK", 0))


def world_size():
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", 1))


def join_ranks(device):
    """Meets the other ranks. -> the group over which numbers of the host travel, or None
    for a lone process."""
    if world_size() == 1:
        return None
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, store=meet_ranks(), rank=rank(), world_size=world_size())
    return dist.new_group(backend="gloo")       # NCCL would wait for the GPU's queue of work


def meet_ranks():
    """torchrun's store, under a prefix that no earlier start has used: addresses of ranks
    that were killed still stand in it (pytorch issue 135712). Each rank leaves a random
    ticket; rank 0 answers every ticket with its prefix, until all have signed in."""
    store = next(dist.rendezvous("env://"))[0]
    if rank() > 0:
        ticket = uuid.uuid4().hex
        store.set(f"ticket/{rank()}", ticket)
        # waits for the answer to this very ticket
        prefix = store.get(f"prefix/{ticket}").decode()
        store.set(f"{prefix}/{rank()}", "here")
        return dist.PrefixStore(prefix, store)

    prefix, began = uuid.uuid4().hex, time.time()
    others = range(1, world_size())
    while not store.check([f"{prefix}/{r}" for r in others]):
        for r in others:
            if store.check([f"ticket/{r}"]):  # perhaps of a rank that is dead: answered in vain
                ticket = store.get(f"ticket/{r}").decode()
                store.set(f"prefix/{ticket}", prefix)
        if time.time() - began > 1800:
            raise UserError(f"rank 0 waited half an hour for the other {len(others)}; "
                            "were all of them started?")
        time.sleep(0.05)
    return dist.PrefixStore(prefix, store)


def sum_over_ranks(group, *numbers):
    """Sums of numbers of the host. Ranks decide on these alone, or some would wait for
    others that have left."""
    numbers = torch.tensor(numbers, dtype=torch.float64)
    if group is not None:
        dist.all_reduce(numbers, group=group)
    return numbers.tolist()


def leave_ranks(status):
    """Gloo's threads must end before Python does, or one of them may abort it. After an
    error NCCL is left alone: it would wait for ranks that go on."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    if status in (0, 130) or dist.get_backend() != "nccl":
        # our handlers hold what holds the threads
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        gc.collect()
        dist.destroy_process_group()


def watch_signals():
    """From now on SIGTERM and Ctrl-C ask for a stop between two steps. -> an Event that is
    set when one came."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    return stop


def stop_requested(stop, group):
    """True on every rank if a signal came to any."""
    return sum_over_ranks(group, stop.is_set())[0] > 0


# ---- checkpoints

def read_checkpoint(path):
    """A checkpoint's dict, from a file that is not trusted: tensors, plain types and MAE's
    argparse.Namespace, nothing that runs. Raises UserError, one line, when the file is
    missing, foreign, torn or would run code."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            # of a pickle's protocol: the error below says enough
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path}: {reason}; expected a checkpoint file (.pt, .pth)") from None
    except Exception as error:              # a dozen kinds; each means that it is no checkpoint
        kind = type(error).__name__
        raise UserError(f"{path}: not a checkpoint that can be read safely ({kind}); expected "
                        "tensors and plain types saved by torch.save") from None
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds a {type(state).__name__}; expected a dict with 'model', "
                        "or a state dict")
    return state


def load_state(module, state, path, hint=""):
    """Strict load -> how many tensors. A UserError says how many match and names the first
    that does not."""
    own = module.state_dict()
    state = {name: value for name, value in state.items() if torch.is_tensor(value)}
    fit, wrong = 0, []
    for name in own:
        if name not in state:
            wrong.append(f"missing {name}")
        elif own[name].shape != state[name].shape:
            there, here = tuple(state[name].shape), tuple(own[name].shape)
            wrong.append(f"{name} is {there} there and {here} here")
        else:
            fit += 1
    wrong += [f"not known here: {name}" for name in state if name not in own]
    if wrong:
        raise UserError(f"{path}: {fit} of {len(own)} tensors match; {wrong[0]}{hint}")
    module.load_state_dict(state)
    return len(own)


def check_out_dir(path):
    """UserError if the folder cannot be made or written. It is made when there is something
    to write."""
    place = os.path.abspath(path)
    while not os.path.exists(place):
        place = os.path.dirname(place)
    if not os.path.isdir(place):
        raise UserError(f"--out_dir {path}: {place} is a file; expected a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"--out_dir {path}: {place} cannot be written; name another folder")


def find_checkpoint(out_dir, resume):
    """The checkpoint to go on from, with its "path", or None for a new run. UserError if the
    folder holds one and --resume was not typed. best.pt counts where a run was killed before its
    first last.pt."""
    check_out_dir(out_dir)
    for name in ("last.pt", "best.pt"):
        path = os.path.join(out_dir, name)
        if not os.path.exists(path):
            continue
        if not resume:
            raise UserError(f"--out_dir {out_dir}: holds {name}; add --resume to go on, or name "
                            "another folder")
        checkpoint = read_checkpoint(path)
        if not {"args", "data", "optimizer", "scaler", "step", "bad"} <= set(checkpoint):
            raise UserError(f"--resume {path}: not a training checkpoint of this project; name "
                            "another --out_dir")
        return dict(checkpoint, path=path)
    return None


# flags that change the model, the data or their order: a run cannot go on under others
MUST_MATCH ="""
    model method scales teacher mask mask_ratio guidance_strength
    data fonts rotate_tall seed dtype weight_decay
    init layer_decay dropout drop_path freeze_encoder spell
    charset max_length label_fraction val
    """.split()


def check_resume(checkpoint, args, crops_per_step, n_crops):
    """UserError that lists what differs between the run that was stopped and this one."""
    stored, now, differ = checkpoint["args"], vars(args), []
    for name in MUST_MATCH:
        if name in stored and name in now and stored[name] != now[name]:
            differ.append(f"--{name} {stored[name]} there, {now[name]} here")

    old_row = stored.get("objective", {})                       # METHODS' row, changed by --set
    for name, value in now.get("objective", {}).items():
        if old_row.get(name) != value:
            differ.append(f"the method's {name} {old_row.get(name)} there, {value} here")

    old_crops, old_n = checkpoint["data"]["crops"], checkpoint["data"]["n"]
    if old_crops != crops_per_step:
        differ.append(f"{old_crops} crops a step there, {crops_per_step} here")
    if old_n != n_crops:
        differ.append(f"--data held {old_n:,} crops and holds {n_crops:,} now: their order would "
                      "be another")
    if differ:
        path = checkpoint["path"]
        raise UserError(f"--resume {path}: {'; '.join(differ)}; name another --out_dir")


def check_ranks_agree(group, step, n_crops):
    """UserError, on every rank, if ranks stand at different steps or read different data."""
    world = world_size()
    if sum_over_ranks(group, step, n_crops) != [step * world, n_crops * world]:
        raise UserError(f"rank {rank()} stands at step {step} and reads {n_crops:,} crops of "
                        "--data, other ranks do not; expected an --out_dir that all nodes share, "
                        "and the same crops on each")


def resume_training(checkpoint, model, optimizer, scaler, damage):
    """Puts everything where the checkpoint was. -> the step that comes next, and `bad` (see
    step_unless_not_finite)."""
    load_state(model, checkpoint["model"], checkpoint["path"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    if checkpoint["scaler"]:
        scaler.load_state_dict(checkpoint["scaler"])
    if rank() == 0:                                             # the sum over ranks was stored
        damage.seen, damage.bad = checkpoint["data"]["damage"]
    say(f"resuming {checkpoint['path']} at step {checkpoint['step']}")
    return checkpoint["step"], checkpoint["bad"]


def training_state(args, step, model, optimizer, scaler, bad, damage, data, group):
    """What a checkpoint holds; data: dict(crops=a step, n=crops in all). Every rank must call
    this: damage is counted over all of them."""
    seen, damaged = sum_over_ranks(group, damage.seen, damage.bad)
    return dict(
        model=model.state_dict(),
        optimizer=optimizer.state_dict(),
        scaler=scaler.state_dict(),
        step=step,
        bad=bad.tolist(),
        args=vars(args),
        data=dict(data, damage=[int(seen), int(damaged)]),
    )


def save_checkpoint(path, state, group):
    """Rank 0 writes; False, on every rank, if that failed."""
    failed = rank() == 0 and not write_checkpoint(path, state)
    return sum_over_ranks(group, failed)[0] == 0


def write_checkpoint(path, state):
    """To a temporary file, flushed, then renamed: at no moment is there half a checkpoint.
    False if it could not be written."""
    if not all(value.isfinite().all() for value in state["model"].values()):
        say(f"step {state['step']}: the weights are not finite and were not saved; "
            "lower --lr or --blr")
        return False
    with tolerate_full_disk(path, state["step"]):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path + ".tmp", "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(path + ".tmp", path)
        return True
    with contextlib.suppress(OSError):
        os.remove(path + ".tmp")
    return False


@contextlib.contextmanager
def tolerate_full_disk(path, step):
    """A full or read-only disk is reported, and training goes on."""
    try:
        yield
    except (OSError, RuntimeError) as error:        # torch's writer puts a RuntimeError on top
        reason = str(error.__context__ or error).partition("\n")[0]
        say(f"step {step}: could not write {path} ({reason}); training goes on, "
            "what was there stays")


# ---- steps

def count_steps(args, n_crops, crops_per_step):
    """-> steps in all, steps of warm-up."""
    total = args.max_steps or max(1, round(args.epochs * n_crops / crops_per_step))
    warmup = max(1, round(total * min(1, args.warmup_epochs / args.epochs)))
    return total, warmup


def learning_rate(step, total_steps, warmup_steps, lr, min_lr):
    """Linear warm-up from above 0, then half a cosine from lr down to min_lr."""
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    share = (step - warmup_steps) / (total_steps - warmup_steps)
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * share))


def weight_groups(model, weight_decay, layer_decay=1.0):
    """AdamW's groups. Matrices decay; biases, norms, tokens and the embedding of letters do
    not (MAE). Encoder layer i of n learns at layer_decay^(n + 1 - i) of the rate, what is
    above the encoder's blocks at the full rate (BEiT)."""
    groups, n = {}, len(model.encoder.blocks)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = n + 1
        if name.startswith(("encoder.cls_token", "encoder.patch_embed")):
            layer = 0
        elif name.startswith("encoder.blocks"):
            layer = int(name.split(".")[2]) + 1
        lr_scale = layer_decay ** (n + 1 - layer)

        decay = weight_decay
        if parameter.dim() < 2 or name.endswith(("cls_token", "mask_token", "scale_embed")):
            decay = 0.0
        if name == "embed.weight":
            decay = 0.0

        if (lr_scale, decay) not in groups:
            groups[lr_scale, decay] = dict(lr_scale=lr_scale, weight_decay=decay, params=[])
        groups[lr_scale, decay]["params"].append(parameter)
    return list(groups.values())


def wrap_model(model, compiled):
    """The model to call in training: compiled if asked for, and under DDP if there are
    several ranks."""
    if compiled:
        model = torch.compile(model)
    if world_size() == 1:
        return model
    # the model's buffers are places, which never change: no rank need send them (torch 2.13
    # renamed the argument)
    ddp = torch.nn.parallel.DistributedDataParallel
    names = inspect.signature(ddp.__init__).parameters
    send_buffers = "broadcast_buffers"
    if "forward_sync_buffers" in names:
        send_buffers = "forward_sync_buffers"
    return ddp(model, gradient_as_bucket_view=True, **{send_buffers: False})


def step_generator(seed, step, stream):
    """Random numbers of one step, the same on every rank. Views and masks have a `stream`
    each, 0 to 15."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * 16 + stream)


def seed_dropout(seed, step):
    """Dropout and drop-path draw from torch's own generator: new numbers every step, others
    on each rank."""
    torch.manual_seed((seed * 1_000_003 + step) * 4096 + rank())


def step_unless_not_finite(optimizer, scaler, grad_norm, bad):
    """Steps, or on a non-finite gradient does nothing. Gradients were averaged over the
    ranks, so all of them agree. It is decided on the device, without asking the host. bad
    (2,): skipped steps, in a row and in all -> bad."""
    skip = (~torch.isfinite(grad_norm)).float()
    optimizer.found_inf = skip      # 1: the fused step does nothing (float16: the scaler's own)
    scaler.step(optimizer)
    scaler.update()
    return torch.stack([(bad[0] + 1) * skip, bad[1] + skip])


def stop_if_not_finite(bad, step, args):
    """UserError after --max_bad_steps skipped steps in a row."""
    if bad[0] >= args.max_bad_steps:
        raise UserError(f"step {step}: {int(bad[0])} steps in a row had a non-finite gradient; "
                        f"lower --lr or --blr, or set --clip_grad 1; {args.out_dir}/last.pt, "
                        "if written, is from before them")


# ---- log

def say(text):
    """Prints on rank 0."""
    if rank() == 0:
        with contextlib.suppress(OSError):          # it may go to a file on a disk that is full
            print(text, flush=True)


class Log:
    """Means over the steps since the last line: printed, and a line of out_dir/log.jsonl.

    log.start_step() log.waited(seconds)         for data log.add(loss, terms)        each
    micro-step; nothing is read from the device log.end_step(line_due)          reads them
    if a line is due, inside the step's time: reading waits for the device log.write(...)
    if a line is due"""

    def __init__(self, args, step, total_steps, crops_per_step, device, group):
        self.args, self.total_steps, self.crops_per_step = args, total_steps, crops_per_step
        self.device, self.group = device, group
        self.path = os.path.join(args.out_dir, "log.jsonl")
        if rank() == 0 and os.path.exists(self.path):
            cut_log(self.path, step)
        self.start_line()

    def start_line(self):
        self.sums, self.steps, self.seconds, self.wait = {}, 0, 0.0, 0.0

    def start_step(self):
        self.began = time.perf_counter()

    def waited(self, seconds):
        self.wait += seconds

    def add(self, loss, terms):
        for name, value in dict(terms, loss=loss).items():
            value = value.detach().float() / self.args.accum_iter
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def end_step(self, line_due):
        self.steps += 1
        if line_due:
            sums = torch.stack(list(self.sums.values())).tolist()       # waits for the device
            sums = sum_over_ranks(self.group, *sums)
            share = 1 / (world_size() * self.steps)
            self.means = {name: share * total for name, total in zip(self.sums, sums)}
        self.seconds += time.perf_counter() - self.began

    def write(self, step, lr, bad, damaged, **more):
        """bad: of step_unless_not_finite; damaged: this rank's count; more: for log.jsonl."""
        step_seconds = self.seconds / self.steps
        row = dict(
            self.means,
            lr=lr,
            crops_per_s=self.crops_per_step / step_seconds,
            ms_per_step=1000 * step_seconds,
            wait=self.wait / self.seconds,
            peak_gb=peak_memory(self.device),
            eta_s=step_seconds * (self.total_steps - step),
            bad_steps=int(bad[1]),
            damaged=int(sum_over_ranks(self.group, damaged)[0]),
            **more,
        )
        say(log_line(step, row, self.means))
        days = row["eta_s"] / 86400
        if step == 1 and self.device.type == "cpu" and days > 1:
            say(f"this takes {days:.0f} days on this CPU; --model vit_nano takes minutes")
        if rank() == 0:
            with tolerate_full_disk(self.path, step):
                os.makedirs(self.args.out_dir, exist_ok=True)
                with open(self.path, "a") as file:
                    file.write(json.dumps(dict(step=step, **finite_or_null(row))) + "\n")
        self.start_line()


def log_line(step, row, means):
    """step 120  loss 0.813 = mim 0.402 + nsp 0.311 + align 0.100  lr 2.9e-04  812 img/s ..."""
    terms, others = [], ""
    for name, mean in means.items():
        if name in ("spread", "accuracy"):
            others += f"  {name} {mean:.3f}"
        elif name != "loss":
            terms.append(f"{name} {mean:.3f}")
    eta = datetime.timedelta(seconds=round(row["eta_s"]))
    line = f"step {step}  loss {row['loss']:.3f} = {' + '.join(terms)}{others}"
    line += f"  lr {row['lr']:.1e}  {row['crops_per_s']:.0f} img/s  {row['ms_per_step']:.0f} ms"
    line += f"  wait {100 * row['wait']:.0f}%  {row['peak_gb']:.1f} GB  eta {eta}"
    if row["bad_steps"]:
        line += f"  BAD {row['bad_steps']}"
    return line


def finite_or_null(row):
    """JSON has no NaN: a number that is not finite becomes None, which is written as null."""
    return {name: value if math.isfinite(value) else None for name, value in row.items()}


def cut_log(path, step):
    """Lines after the checkpoint's step belong to steps that are run again: they are cut
    off, as are torn ones."""
    whole_line = re.compile(r'{"step": (\d+), [^{}]*}\n')
    with tolerate_full_disk(path, step):
        with open(path) as old, open(path + ".tmp", "w") as new:
            for line in old:
                found = whole_line.fullmatch(line)
                if found and int(found[1]) <= step:
                    new.write(line)
        os.replace(path + ".tmp", path)


def peak_memory(device):
    """Largest memory so far in GiB: the GPU's, or the process's (0 on Windows, which has no
    such count)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 30
    try:
        import resource
    except ImportError:
        return 0.0
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    bytes_each = 1 if sys.platform == "darwin" else 1024
    return used * bytes_each / 2 ** 30
