"""What every script needs. Read this last: a script's main() says what is called when.

    errors and flags    UserError, run_main, Parser, number_in, parse_size, typed_flags,
                        add_training_flags, parse_with_recipe, is_rendered, check_data_flags,
                        check_training_flags
    device              pick_device, pick_dtype, autocast, to_device, to_unit, check_unit
    ranks               rank, world_size, join_ranks, sum_over_ranks, StopSignal
    checkpoints         read_checkpoint, load_state, find_checkpoint, check_resume,
                        check_ranks_agree, resume_training, training_state, save_checkpoint,
                        tolerate_full_disk
    steps               count_steps, peak_learning_rate, learning_rate, weight_groups, wrap_model,
                        join_gradients, average_over_ranks, is_recorded, Replayed
    random numbers      number_of, step_generator, seed_dropout
    bad steps           step_unless_not_finite, stop_if_not_finite
    log                 say, Log

A checkpoint is one dict of plain types and tensors: model, optimizer, scaler, step, skipped,
args, order and damage; a recognizer's also holds charset and best.
"""
import argparse
import collections
import contextlib
import ctypes
import datetime
import gc
import inspect
import json
import math
import os
import pickletools
import re
import signal
import sys
import time
import traceback
import uuid
import warnings
import zipfile

import torch
import torch.distributed as dist

H, W = 32, 128                  # pixels of every crop, in this order everywhere


# ---- errors and flags

class UserError(Exception):
    """What the person who typed the command can mend, on one line: what came, what was
    expected, what to type."""


def run_main(main):
    """Calls main() and exits. What the user can mend becomes one line on stderr and exit status 2;
    a mistake in the program keeps its traceback. STR_TRACEBACK=1 shows every traceback."""
    signal.signal(signal.SIGINT, signal.default_int_handler)    # which a script's top had changed
    prepare_output()
    status = 1                          # of what is raised below
    try:
        main()
        print(end="", flush=True)       # now, since at its end Python would catch no error of it
        status = 0
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:             # nobody listens any more, as after `| head -1`
        status = 141                    # which a shell says of other programs then
    except Exception as error:
        # torch would raise an error of its own amid these lines, when it hears that a process of
        # the loader was killed (Windows has no such signal)
        with contextlib.suppress(AttributeError):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        line = line_for_user(error)
        if line is None or os.environ.get("STR_TRACEBACK"):
            raise
        print(f"{os.path.basename(sys.argv[0])}: {line}", file=sys.stderr)
        # the traceback's frames hold the loader, whose processes would outlive the error
        traceback.clear_frames(error.__traceback__)
        status = 2
    finally:
        leave_ranks(status)
        try:
            print(end="", flush=True)
        except OSError:
            hush_output(sys.stdout)
    sys.exit(status)


def prepare_output():
    """Makes sys.stdout and sys.stderr such that any text can be printed to them."""
    if sys.stdout is None:                                      # it was closed, as by `>&-`
        sys.stdout = open(os.devnull, "w")
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")
    for stream in (sys.stdout, sys.stderr):
        # a letter that the terminal lacks is printed as \u...; a notebook cannot be told so
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="backslashreplace")


def hush_output(stream):
    """What could not be printed to it, and whatever is printed there from now on, goes nowhere,
    quietly."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def line_for_user(error):
    """The line that tells the user what to mend, or None: then the program is to be mended."""
    text = str(error).strip().split("\n")[-1]               # a loader sends a whole traceback
    advice = "if memory ran out, lower --workers; training goes on with --resume"
    # these come when a loader's process was killed
    if isinstance(error, (EOFError, ConnectionResetError, ConnectionRefusedError)):
        return f"a process that reads crops has ended; {advice}"
    if isinstance(error, FileNotFoundError) and not error.filename:
        return f"a process that reads crops has ended; {advice}"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, (UserError, OSError)):
        return text
    if isinstance(error, torch.OutOfMemoryError):
        return "the GPU's memory is full; lower --batch_size (and raise --accum_iter as much)"
    if isinstance(error, RuntimeError) and "can't allocate memory" in text:
        return "memory is full; lower --batch_size"
    if isinstance(error, RuntimeError) and "DataLoader worker" in text:
        return f"{text.rstrip('.')}; {advice}"
    if isinstance(error, RuntimeError) and re.search(r"No working C\+\+|C compiler", str(error)):
        return "--compile needs a C++ compiler, such as g++, and found none; or leave it out"
    if isinstance(error, RuntimeError) and "Connection closed by peer" in text:
        return "another rank has ended; what it said stands above"
    return None


class Parser(argparse.ArgumentParser):
    """Defaults in every help line; what is wrong in one line and exit status 2. doc: a script's
    docstring, whose first paragraph --help shows. It is None under `python -OO`."""

    def __init__(self, doc=None, **options):
        if doc is not None:
            options["description"] = doc.split("\n\n")[0]
        formatter = argparse.ArgumentDefaultsHelpFormatter
        super().__init__(formatter_class=formatter, allow_abbrev=False, **options)

    def parse_args(self):
        """An empty value, such as that of a shell's variable that is not set, is an error: left
        out, the flag would have its default. A flag that is typed twice is said, since values
        are lost: `--data A --data B` would lose A."""
        args = super().parse_args()
        for flag, times in collections.Counter(typed_flags()).items():
            if times > 1:
                say(f"{self.prog}: --{flag} stands there {times} times, and the last counts",
                    sys.stderr)
        for name, value in vars(args).items():
            if value == "" or (isinstance(value, list) and "" in value):
                if name in typed_flags():
                    self.error(f"--{name} is empty; give it a value, or leave it out")
                self.error(f"{name.upper()} is empty; give it a value")
        return args

    def error(self, message):
        # "argument --lr: 0: expected a number" becomes "--lr 0: expected a number"
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


def parse_size(text, flag):
    """"16x64" -> (16, 64), height first. flag: what it was typed for."""
    if not re.fullmatch("[1-9][0-9]*x[1-9][0-9]*", text):
        raise UserError(f"{flag} {text}: expected height x width in pixels, such as 16x64")
    height, width = text.split("x")
    return int(height), int(width)


def typed_flags():
    """Names of the flags on the command line, ["method", "batch_size", ...], each as often as it
    was typed."""
    return [word[2:].split("=")[0] for word in sys.argv[1:] if word.startswith("--")]


def add_training_flags(parser, models):
    """Flags that pretrain.py and finetune.py share; `models` are the names for --model."""
    add = parser.add_argument
    count = number_in("[1, inf)", int)
    positive = number_in("(0, inf)")
    not_negative = number_in("[0, inf)")

    add("--model", choices=models, default="vit_small",
        help="vit_nano trains on a laptop, vit_small is the papers'")
    add("--data", nargs="+", default=["synth"], metavar="SRC",
        help="synth[:N[:SEED]], an LMDB folder or a tree of them, a .txt/.tsv/.csv/.jsonl/.json "
        "of labels, a folder of images; SRC@5 is seen five times as often")
    add("--fonts",
        help="a folder: draw rendered words in its .ttf, .otf and .ttc files, not in the system's")
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
        help="epochs of rising rate; with --max_steps, warmup_epochs / epochs of all steps")
    add("--weight_decay", type=not_negative, default=0.05,
        help="AdamW's; never on biases, norms and tokens")
    add("--clip_grad", type=not_negative, default=0.0,
        help="largest norm of the gradient; 0 leaves it as it is")
    add("--max_bad_steps", type=count, default=10,
        help="stop after so many skipped (non-finite) steps in a row")
    add("--seed", type=number_in("[0, 268435456)", int), default=0,
        help="of weights, masks, views and order")
    add("--workers", type=number_in("[0, inf)", int), default=min(4, os.cpu_count()),
        help="processes that read crops, for each rank; more if 'wait' is high")
    add("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto",
        help="of matrix products; auto: bfloat16 where the device has it, else float16 on a GPU, "
        "float32 on a CPU")
    add("--compile", action="store_true",
        help="half a minute at the start, then a GPU is 1.3 to 3 times as fast: layers are "
        "compiled, and a step is recorded; a CPU gains little, and needs a C++ compiler")
    add("--device", default="auto",
        help="cpu, cuda, cuda:1; auto takes a CUDA GPU if there is one")
    add("--resume", action="store_true",
        help="go on from --out_dir's checkpoint, or start if there is none")
    add("--log_every", type=count, default=20, help="steps between lines of log.jsonl")
    add("--save_every", type=count, default=500, help="steps between checkpoints")
    add("--sample_every", type=count, default=1000,
        help="steps between pictures, or readings of all of --val")


def parse_with_recipe(parser, recipes, stored_model=None):
    """Parses with the defaults of --model's row of `recipes`, so that --help shows them too.
    `stored_model`, the size that a checkpoint was made with, stands in for an untyped --model."""
    # --model is read alone first: the other flags' defaults go by it
    first = Parser(add_help=False)
    first.add_argument("--model", default=stored_model or "vit_small")
    known, _ = first.parse_known_args()

    recipe = dict(recipes.get(known.model, {}))
    if "epochs" in typed_flags():           # a recipe's max_steps would win over typed --epochs
        recipe.pop("max_steps", None)
    parser.set_defaults(model=known.model, **recipe)
    return parser.parse_args()


def is_rendered(src):
    """True for a SRC of rendered words: synth, synth:N, synth:N:SEED, each perhaps with @N."""
    return re.split("[:@]", src)[0] == "synth"


def check_data_flags(parser, args):
    """Ends with one line if --fonts or --rotate_tall has no effect on what --data and --val
    name."""
    srcs = list(args.data)
    if getattr(args, "val", None):              # finetune.py's alone
        srcs += args.val
    rendered = [is_rendered(src) for src in srcs]
    if args.fonts and not any(rendered):
        parser.error(f"--fonts {args.fonts}: has no effect without rendered words; "
                     "add synth to --data")
    if args.rotate_tall and all(rendered):
        parser.error("--rotate_tall has no effect on rendered words, which lie flat; leave it out")


def check_training_flags(parser, args):
    """Ends with one line if a typed flag has no effect with the others."""
    if "blr" in typed_flags() and "lr" in typed_flags():
        parser.error("--blr has no effect with --lr; leave one of them out")
    check_data_flags(parser, args)


# ---- device

def pick_device(name):
    """--device -> torch.device, ready to use. auto takes a CUDA GPU if there is one, that of this
    rank. UserError if it cannot be used."""
    if world_size() > 1 and ":" in name:
        raise UserError(f"--device {name}: torchrun gives each rank its own; type --device cuda")
    kind = name
    if name == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda":
        kind = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(kind)
        torch.empty(1, device=device).cpu()     # which "meta", a device without memory, cannot
    except (RuntimeError, AssertionError) as error:
        reason = re.split(r"\. |\n", str(error))[0]               # its first sentence
        raise UserError(f"--device {name}: {reason}") from None

    if device.type == "cuda":
        torch.cuda.set_device(device)
        # cuDNN's attention plans anew for each new shape, and each letter read is a new shape
        torch.backends.cuda.enable_cudnn_sdp(False)
    if device.type == "cpu":
        keep_memory()
    return device


def keep_memory():
    """Tells glibc to keep the memory it has. Else it gives each large block back, and Linux
    clears it anew: half of a step's time."""
    M_MMAP_MAX, M_TRIM_THRESHOLD = -4, -1           # names and numbers of glibc's malloc.h
    # other systems and other C libraries have no mallopt
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)                 # no block is asked of Linux by itself
        libc.mallopt(M_TRIM_THRESHOLD, -1)          # free memory at the heap's end is kept


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
    if x.is_cpu and torch.device(device).type not in ("cpu", "mps"):
        return x.contiguous().pin_memory().to(device, non_blocking=True)
    return x.to(device)


def to_unit(images):
    """uint8, or float in [0, 1] -> float32 in [0, 1]."""
    if not torch.is_tensor(images):
        raise UserError(f"images are a {type(images).__name__}; expected a tensor, such as "
                        "torch.from_numpy makes")
    if images.dtype == torch.uint8:
        return images.float() / 255
    if not images.is_floating_point():
        raise UserError(f"images of {images.dtype}; expected uint8, or float in [0, 1]")
    # A GPU would have to wait for this, and a graph cannot hold it. A little beyond is rounding.
    if images.device.type == "cpu" and not torch.compiler.is_compiling():
        check_unit(images, "images", slack=0.25)
    return images.float()


def check_unit(images, what, expected="expected uint8, or float in [0, 1]", slack=0.0):
    """UserError unless all numbers lie in [0, 1], or at most `slack` beyond. Waits for the
    device."""
    if images.numel() == 0:
        return
    low, high = (bound.item() for bound in images.aminmax())
    if not (low >= -slack and high <= 1 + slack):           # NaN is neither
        raise UserError(f"{what} from {low:g} to {high:g}; {expected}")


# ---- ranks

def rank():
    """This process's number among all of torchrun's; 0 of a lone process."""
    if world_size() == 1:                       # a RANK without others is left from elsewhere
        return 0
    return int(os.environ.get("RANK") or 0)


def world_size():
    """How many processes train together."""
    size = os.environ.get("WORLD_SIZE") or "1"
    if not size.isdecimal():
        raise UserError(f"WORLD_SIZE is {size}; expected a whole number: start with torchrun, or "
                        "unset WORLD_SIZE")
    return int(size)


def join_ranks(device):
    """Meets the other ranks. -> the group over which numbers of the host travel, or None
    for a lone process."""
    if world_size() == 1:
        return None
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise UserError(f"WORLD_SIZE is set and {name} is not; start with torchrun, or unset "
                            "WORLD_SIZE")
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(        # meet_ranks stands at the end of this file
            backend, store=meet_ranks(), rank=rank(), world_size=world_size())
    return dist.new_group(backend="gloo")       # NCCL would wait for the GPU's queue of work


def sum_over_ranks(group, *numbers):
    """Sums of CPU numbers over the ranks of `group`; the numbers themselves if it is None. All
    ranks get the same, so whatever depends on it they do alike."""
    numbers = torch.tensor(numbers, dtype=torch.float64)
    if group is not None:
        dist.all_reduce(numbers, group=group)
    return numbers.tolist()


def leave_ranks(status):
    """Gloo's threads must end before Python does, or one of them may abort it. After an error NCCL
    is left alone: it would wait for ranks that go on."""
    if not dist.is_available() or not dist.is_initialized():
        return
    all_end = status in (0, 130)            # they are done, or were stopped by a signal
    if all_end or dist.get_backend() != "nccl":
        gc.collect()                        # what still holds a group keeps its threads alive
        dist.destroy_process_group()


class StopSignal:
    """From now on SIGTERM, Ctrl-C and a terminal that is closed ask for a stop between two steps. A
    second Ctrl-C, two seconds later or more, ends at once. (Under torchrun one Ctrl-C arrives
    twice.)"""

    def __init__(self):
        self.first = None                                       # when one came, in seconds
        signal.signal(signal.SIGTERM, self.handle)
        signal.signal(signal.SIGINT, self.handle)
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            signal.signal(signal.SIGHUP, self.handle)           # nohup's is ignored, and stays so

    def handle(self, number, frame):
        now = time.monotonic()
        if self.first is None:
            self.first = now
        elif number == signal.SIGINT and now - self.first > 2:
            raise KeyboardInterrupt

    def came(self, group):
        """True on every rank if a signal came to any."""
        return sum_over_ranks(group, self.first is not None)[0] > 0


# ---- checkpoints

def read_checkpoint(path):
    """A checkpoint's dict, from a file that is not trusted: tensors, plain types and MAE's
    argparse.Namespace, nothing that runs. {"state_dict": ...} becomes {"model": ...}, and names
    are plain, see plain_names. UserError, one line, for whatever else the file is."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            # torch warns of an old pickle's protocol; the error below says enough
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
            damaged = damaged_part(path)
    except Exception as error:              # a dozen kinds; each means that it is no checkpoint
        raise UserError(f"{path}: {why_refused(path, error)}") from None
    if damaged is not None:
        raise UserError(f"{path}: {damaged} in it does not agree with its checksum; copy the file "
                        "again, or save it with checksums")
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds a {type(state).__name__}; expected a dict with 'model', "
                        "or a state dict")

    state = plain_names(state)
    if "state_dict" in state and not isinstance(state.get("model"), dict):
        state["model"] = state["state_dict"]                    # Lightning's and MMOCR's
    if isinstance(state.get("model"), dict):
        state["model"] = plain_names(state["model"])
    return state


def damaged_part(path):
    """The name of a part of torch.save's file that does not agree with its checksum, or None.
    torch.load does not look: a flipped bit would be another weight."""
    if not zipfile.is_zipfile(path):                            # torch.save's before torch 1.6
        return None
    with zipfile.ZipFile(path) as file:
        return file.testzip()


def why_refused(path, error):
    """What a file is that torch.load refused, and what to do about it."""
    if os.path.isdir(path):
        return f"a folder; name the checkpoint in it, such as {os.path.join(path, 'last.pt')}"
    try:
        with open(path, "rb") as file:
            begins = file.read(30)
    except OSError as cannot_open:
        return f"{cannot_open.strerror}; expected a checkpoint file (.pt, .pth)"
    if begins == b"":
        return "an empty file; copy or download it again"
    if begins.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, and not the file itself; type git lfs pull where it lies"
    if begins.startswith(b"<"):
        return "a web page; download the file itself"
    if begins[6:9] == b"\0\0{":             # eight bytes say how long the JSON is that follows
        return ("a safetensors file; expected torch.save's, which this makes of it: "
                f"torch.save(safetensors.torch.load_file('{path}'), 'weights.pt')")
    if "TorchScript" in str(error):
        return ("a TorchScript archive; expected a state dict, which this makes of it: "
                f"torch.save(torch.jit.load('{path}').state_dict(), 'weights.pt')")
    if begins.startswith(b"PK\3\4") and not zipfile.is_zipfile(path):
        return "a checkpoint that was cut short; copy it again"
    refused = re.search(r"GLOBAL (\S+)", str(error))
    if refused and begins.startswith((b"PK", b"\x80")):         # else it is no pickle at all
        return (f"a pickle that wants {refused[1]}, which could run code and is not loaded; if you "
                "trust the file, load it with torch.load(..., weights_only=False) and torch.save "
                "its state dict alone")
    if re.match(rb"\x80[\3-\5]", begins):                       # torch.save's begins with \x80\2
        return (f"a pickle that could run code (it wants {first_import(path)}); if you trust the "
                "file, read it with pickle.load and torch.save its state dict alone")
    return (f"not a checkpoint that can be read safely ({type(error).__name__}); expected tensors "
            "and plain types saved by torch.save")


def first_import(path):
    """The first function or class that a pickle wants, such as "numpy.dtype", or "nothing". None of
    it is run."""
    words = []
    with contextlib.suppress(ValueError), open(path, "rb") as file:     # it may be cut short
        for opcode, value, _ in pickletools.genops(file):
            if opcode.name == "GLOBAL":
                return value.replace(" ", ".")
            if opcode.name == "STACK_GLOBAL":                   # the last two words are its name
                return ".".join(words[-2:])
            if isinstance(value, str):
                words.append(value)
    return "nothing"


def plain_names(state):
    """A state dict without what wrappers put into the names: torch.compile "_orig_mod."; DDP
    "module.", and others "model.", once or several times in front."""
    plain = {}
    for name, value in state.items():
        if isinstance(name, str):
            name = name.replace("_orig_mod.", "")
            while name.startswith(("module.", "model.")):
                name = name.split(".", 1)[1]
        plain[name] = value
    if len(plain) < len(state):             # two tensors would have one name: as they were
        return state
    return plain


def load_state(module, state, path, hint=""):
    """Strict load -> how many tensors. A UserError says how many match and names the first
    that does not. hint: what to do about other names or shapes."""
    own = module.state_dict()
    state = {name: value for name, value in state.items() if torch.is_tensor(value)}
    fit, wrong = 0, []
    for name in own:
        if name not in state:
            wrong.append(f"missing {name}{hint}")
        elif own[name].shape != state[name].shape:
            there, here = tuple(state[name].shape), tuple(own[name].shape)
            wrong.append(f"{name} is {there} there and {here} here{hint}")
        elif not holds_finite_numbers(state[name]):
            wrong.append(f"{name} holds other things than finite numbers")
        else:
            fit += 1
    wrong += [f"not known here: {name}{hint}" for name in state if name not in own]
    if wrong:
        raise UserError(f"{path}: {fit} of {len(own)} tensors match; {wrong[0]}")
    module.load_state_dict(state)
    return len(own)


def holds_finite_numbers(x):
    if x.layout != torch.strided or x.is_meta or not x.is_floating_point():
        return False
    return x.float().isfinite().all()           # torch cannot ask numbers of 8 bits


def check_out_dir(path):
    """UserError if the folder cannot be made or written. It is made when there is something
    to write."""
    place = os.path.abspath(path)
    while not os.path.lexists(place):           # a link that leads nowhere is there, too
        place = os.path.dirname(place)
    if not os.path.isdir(place):
        kind = "a file" if os.path.exists(place) else "a link that leads nowhere"
        raise UserError(f"--out_dir {path}: {place} is {kind}; expected a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"--out_dir {path}: {place} cannot be written; name another folder")


# what training_state puts into a checkpoint
STATE = {"model", "optimizer", "scaler", "step", "skipped", "args", "order", "damage"}


def find_checkpoint(out_dir, resume):
    """The checkpoint to go on from, with its "path", or None for a new run. UserError if the
    folder holds one and --resume was not typed. best.pt counts where a run was killed before its
    first last.pt."""
    check_out_dir(out_dir)
    check_alone(os.path.join(out_dir, "log.jsonl"))
    for name in ("last.pt", "best.pt"):
        path = os.path.join(out_dir, name)
        if not os.path.exists(path):
            continue
        if not resume:
            raise UserError(f"--out_dir {out_dir}: holds {name}; add --resume to go on, or name "
                            "another folder")
        checkpoint = read_checkpoint(path)
        if not STATE <= set(checkpoint):
            raise UserError(f"--resume {path}: not a training checkpoint of this project; name "
                            "another --out_dir")
        return dict(checkpoint, path=path)
    return None


# flags that --resume needs as they were
UNCHANGED = [
    # they change the model,
    "model", "method", "scales", "teacher", "spell", "charset", "max_length", "init", "dropout",
    "drop_path", "freeze_encoder",
    # the data, their order, or the words that choose best.pt,
    "data", "fonts", "rotate_tall", "seed", "mask", "mask_ratio", "guidance_strength",
    "label_fraction", "val",
    # or the arithmetic. (The stored optimizer would keep its own decays, whatever is typed.)
    "weight_decay", "layer_decay", "dtype",
]


# these may differ, and nothing is said: set and objective are compared as the method's row
NOT_LISTED = ["resume", "out_dir", "set", "objective"]


def check_resume(checkpoint, args, crops_per_step, n_crops):
    """UserError that lists what differs between the run that was stopped and this one, and may not.
    What may differ, such as the learning rate, is said."""
    stored, now, differ = checkpoint["args"], vars(args), []
    for name in UNCHANGED:
        if stored.get(name) != now.get(name):
            differ.append(f"--{name} {stored.get(name)} there, {now.get(name)} here")

    there = stored.get("objective", {})                         # METHODS' row, changed by --set
    here = now.get("objective", {})
    for name in {**there, **here}:                              # whatever stands in one of them
        if there.get(name) != here.get(name):
            differ.append(f"the method's {name} {there.get(name)} there, {here.get(name)} here")

    order = checkpoint["order"]
    if order["crops_per_step"] != crops_per_step:
        differ.append(f"{order['crops_per_step']} crops a step there, {crops_per_step} here")
    if order["n_crops"] != n_crops:
        differ.append(f"--data held {order['n_crops']:,} crops and holds {n_crops:,} now: their "
                      "order would be another")
    if differ:
        path = checkpoint["path"]
        raise UserError(f"--resume {path}: {'; '.join(differ)}; type it as there, or name another "
                        "--out_dir")

    said = []
    for name in now.keys() & stored.keys():
        if stored[name] != now[name] and name not in UNCHANGED and name not in NOT_LISTED:
            said.append(f"--{name} {stored[name]} there, {now[name]} here")
    if said:
        say(f"--resume: it goes on with what is typed now: {'; '.join(sorted(said))}")


def check_ranks_agree(group, step, n_crops):
    """UserError, on every rank, if ranks stand at different steps or read different data."""
    if group is None:
        return
    all_ranks = [None] * world_size()
    dist.all_gather_object(all_ranks, (step, n_crops), group=group)
    if len(set(all_ranks)) > 1:
        raise UserError(f"rank {rank()} stands at step {step} and reads {n_crops:,} crops of "
                        "--data, other ranks do not; expected an --out_dir that all nodes share, "
                        "and the same crops on each")


def resume_training(checkpoint, model, optimizer, scaler, skipped, damage):
    """Puts everything where the checkpoint was. -> the step that comes next."""
    load_state(model, checkpoint["model"], checkpoint["path"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    if checkpoint["scaler"]:                                    # empty but for float16
        scaler.load_state_dict(checkpoint["scaler"])
    skipped.copy_(torch.tensor(checkpoint["skipped"]))
    if rank() == 0:             # the sum over all ranks was stored, so one rank takes it all
        damage.seen, damage.damaged = checkpoint["damage"]
    say(f"resuming {checkpoint['path']} at step {checkpoint['step']}")
    return checkpoint["step"]


def training_state(args, step, model, optimizer, scaler, skipped, damage, order, group):
    """What a checkpoint holds. order: dict(crops_per_step=, n_crops=), on which the order of crops
    depends. Every rank must call this: damage is counted over all of them."""
    seen, damaged = sum_over_ranks(group, damage.seen, damage.damaged)
    return dict(
        model=model.state_dict(),
        optimizer=optimizer.state_dict(),
        scaler=scaler.state_dict(),
        step=step,
        skipped=skipped.tolist(),
        args=vars(args),
        order=order,
        damage=[int(seen), int(damaged)],
    )


def save_checkpoint(path, state, group):
    """Rank 0 writes; False, on every rank, if that failed."""
    failed = False
    if rank() == 0:
        failed = not write_checkpoint(path, state)
    return sum_over_ranks(group, failed)[0] == 0


def write_checkpoint(path, state):
    """To a temporary file, flushed, then renamed: at no moment is there half a checkpoint. False
    if the weights are not finite, or if it could not be written; then training goes on."""
    if not all(value.isfinite().all() for value in state["model"].values()):
        say(f"step {state['step']}: the weights are not finite and were not saved; "
            "lower --lr or --blr")
        return False
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path + ".tmp", "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(path + ".tmp", path)
    except (OSError, RuntimeError) as error:
        cause = error
        if isinstance(error, RuntimeError):
            # torch.save raised it while it dealt with the disk's OSError: that is its context
            cause = error.__context__
        if not isinstance(cause, OSError):
            raise
        say_not_written(path, state["step"], cause)
        with contextlib.suppress(OSError):
            os.remove(path + ".tmp")
        return False
    return True


@contextlib.contextmanager
def tolerate_full_disk(path, step):
    """A full or read-only disk is reported, and training goes on."""
    try:
        yield
    except OSError as error:
        say_not_written(path, step, error)


def say_not_written(path, step, error):
    say(f"step {step}: could not write {path} ({error}); training goes on, "
        "what was there stays")


# ---- steps

def count_steps(args, n_crops, crops_per_step):
    """-> steps in all, steps of warm-up."""
    total = args.max_steps or max(1, round(args.epochs * n_crops / crops_per_step))
    warmup = max(1, round(total * min(1, args.warmup_epochs / args.epochs)))
    return total, warmup


def peak_learning_rate(args, crops_per_step):
    """--lr, or --blr for each 256 crops of a step. UserError if --min_lr is above it."""
    lr = args.lr or args.blr * crops_per_step / 256
    if args.min_lr > lr:
        raise UserError(f"--min_lr {args.min_lr:g}: expected at most the learning rate, {lr:.2e}")
    return lr


def learning_rate(step, total_steps, warmup_steps, lr, min_lr):
    """Linear warm-up from above 0, then half a cosine from lr down to min_lr."""
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    share = (step - warmup_steps) / (total_steps - warmup_steps)
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * share))


def weight_groups(model, weight_decay, layer_decay=1.0):
    """AdamW's groups. Matrices decay; biases, norms and tokens do not, as in MAE's fine-tuning,
    and here letters' embeddings do not either. Encoder layer i learns at layer_decay^(n + 1 - i)
    of the rate (BEiT): of n blocks, block 1 to n, the patch embedding as layer 0, and all else as
    layer n + 1."""
    groups, n = {}, len(model.encoder.blocks)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = n + 1
        if name.startswith(("encoder.cls_token", "encoder.patch_embed")):
            layer = 0
        elif name.startswith("encoder.blocks"):
            layer = int(name.split(".")[2]) + 1             # encoder.blocks.0 is block 1
        lr_scale = layer_decay ** (n + 1 - layer)

        decay = weight_decay
        if parameter.dim() < 2 or name.endswith(("cls_token", "mask_token", "scale_embed")):
            decay = 0.0
        if name == "embed.weight":                          # a recognizer's, of letters
            decay = 0.0

        if (lr_scale, decay) not in groups:
            groups[lr_scale, decay] = dict(lr_scale=lr_scale, weight_decay=decay, params=[])
        groups[lr_scale, decay]["params"].append(parameter)
    return list(groups.values())


def wrap_model(model, recorded):
    """-> the model to call in training, and its gradients as one tensor, or None.

    A step that is recorded, see Replayed, needs that tensor, and averages it over the ranks
    itself. Else DDP does, within backward(), if there are several ranks."""
    if recorded:
        return model, join_gradients(model)
    if world_size() == 1:
        return model, None
    ddp = torch.nn.parallel.DistributedDataParallel
    # no rank need send its buffers, since none ever changes: position codes, drop_path's shares.
    # torch 2.13 gave the argument that says so another name
    send_buffers = "broadcast_buffers"
    if "forward_sync_buffers" in inspect.signature(ddp.__init__).parameters:
        send_buffers = "forward_sync_buffers"
    return ddp(model, gradient_as_bucket_view=True, **{send_buffers: False}), None


def join_gradients(model):
    """Gives every trained weight a gradient of zeros, each a part of one long tensor -> that
    tensor. So one call averages all gradients over the ranks, and they stay in their place, where
    a recorded step reads and writes them."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    total = sum(parameter.numel() for parameter in trained)
    gradients = torch.zeros(total, device=trained[0].device)
    pieces = gradients.split([parameter.numel() for parameter in trained])
    for parameter, piece in zip(trained, pieces):
        parameter.grad = piece.view_as(parameter)
    return gradients


def average_over_ranks(gradients):
    """Sums the tensor over the ranks and divides it by their number, in place: what DDP does."""
    if world_size() > 1:
        dist.all_reduce(gradients)
        gradients /= world_size()


def is_recorded(compiled, device):
    """True if a step's work is recorded and replayed, see Replayed: with --compile, on a GPU."""
    return compiled and device.type == "cuda"


class Replayed:
    """A function of tensors whose work on a GPU is recorded once, as a CUDA graph, then replayed.
    The host launches one thing, where it launched thousands of small ones and the GPU waited.

    The function takes tensors by name and returns tensors. It may not ask the device for a number,
    nor copy from the host. What else it reads or writes, weights and gradients, must stay where
    it is. The first calls for each set of shapes run as usual, since libraries are loaded and
    kernels are compiled in them. What a replay returns is overwritten by the next call."""

    def __init__(self, function, eager_calls=3):
        self.function, self.eager_calls = function, eager_calls
        self.calls = collections.Counter()      # of each set of shapes
        self.recorded = {}                      # shapes: graph, inputs, outputs
        self.stream = torch.cuda.Stream()       # recording may not be on the usual stream
        self.pool = torch.cuda.graph_pool_handle()      # memory that all graphs share

    def __call__(self, **tensors):
        shapes = tuple((name, x.shape, x.dtype) for name, x in tensors.items())
        if shapes not in self.recorded:
            self.calls[shapes] += 1
            if self.calls[shapes] <= self.eager_calls:
                return self.run_eagerly(tensors)
            self.recorded[shapes] = self.record(tensors)
        graph, inputs, outputs = self.recorded[shapes]
        for name, x in tensors.items():
            inputs[name].copy_(x)
        graph.replay()
        return outputs

    def run_eagerly(self, tensors):
        """Calls the function on the stream that the recording will use. Autograd goes back to the
        stream on which a weight was first used, and another one would not be recorded."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            outputs = self.function(**tensors)
        torch.cuda.current_stream().wait_stream(self.stream)
        return outputs

    def record(self, tensors):
        """-> the graph, and the tensors that it reads and writes. Nothing is computed yet."""
        inputs = {name: x.clone() for name, x in tensors.items()}
        graph = torch.cuda.CUDAGraph()
        torch.clear_autocast_cache()            # so that weights are cast anew in each replay
        # other threads, such as NCCL's, may go on calling CUDA
        with torch.cuda.graph(
                graph, self.pool, self.stream, capture_error_mode="thread_local"):
            outputs = self.function(**inputs)
        return graph, inputs, outputs


# ---- random numbers

def number_of(seed, step):
    """A number that no other pair of a seed and a step (or epoch) has, as long as steps are fewer
    than 1,000,003."""
    return seed * 1_000_003 + step


def step_generator(seed, step, stream):
    """Random numbers of one step, the same on every rank. What must not have the same numbers,
    such as views and masks, has a `stream` of its own, 0 to 15.

    A generator on the CPU keeps 32 bits of its seed. So --seed has at most 28. Two large seeds may
    still have the same numbers, some steps apart: by chance, and rarely."""
    return torch.Generator().manual_seed(number_of(seed, step) * 16 + stream)


def seed_dropout(seed, step):
    """Dropout and drop-path draw from torch's own generator: new numbers every step, others
    on each rank."""
    torch.manual_seed(number_of(seed, step) * 4096 + rank())        # for up to 4096 ranks


# ---- bad steps

def step_unless_not_finite(optimizer, scaler, grad_norm, skipped):
    """Steps, or does nothing if the gradient is not finite. Gradients were averaged over the
    ranks, so all of them do the same. skipped (2,) counts such steps: in a row, and in all.

    The device decides, and the host does not wait: a fused optimizer of torch leaves the weights
    alone where its found_inf is 1. With float16 the scaler looks for itself, and sets found_inf to
    the same."""
    if not optimizer.defaults.get("fused"):
        raise ValueError("expected an optimizer with fused=True: others do not look at found_inf")
    skip = (~torch.isfinite(grad_norm)).float()             # 1 or 0, on the device
    optimizer.found_inf = skip                              # optimizer.step() looks at found_inf
    scaler.step(optimizer)                                  # calls optimizer.step()
    scaler.update()
    skipped[0] = (skipped[0] + 1) * skip                    # 1 more, or 0 after a good step
    skipped[1] += skip


def stop_if_not_finite(skipped, step, args):
    """UserError after --max_bad_steps skipped steps in a row. Waits for the device."""
    if skipped[0] >= args.max_bad_steps:
        raise UserError(f"step {step}: {int(skipped[0])} steps in a row had a non-finite gradient; "
                        f"lower --lr or --blr, or set --clip_grad 1; {args.out_dir}/last.pt, "
                        "if written, is from before them")


# ---- log

def say(text, file=None):
    """Prints on rank 0, to stdout or another file. Whoever calls this goes on where that is not
    possible."""
    if rank() > 0:
        return
    try:
        print(text, file=file, flush=True)
    except BrokenPipeError:                         # nobody listens any more
        hush_output(file or sys.stdout)
    except OSError:                                 # it goes to a file, and the disk is full
        pass


class Log:
    """Means over the steps since the last line: printed, and a line of out_dir/log.jsonl. A step
    calls, in this order:

        start_step()
        waited(seconds)         for data
        add(loss, terms)        each micro-step; nothing is read from the device
        read_losses()           if a line is due: waits for the device, as part of the step
        end_step()
        write(...)              if a line is due
    """

    def __init__(self, args, step, total_steps, crops_per_step, device, group):
        self.args, self.total_steps, self.crops_per_step = args, total_steps, crops_per_step
        self.device, self.group = device, group
        self.path = os.path.join(args.out_dir, "log.jsonl")
        self.file = None
        if rank() == 0 and os.path.exists(self.path):
            cut_log(self.path, step)
            with tolerate_full_disk(self.path, step):
                self.file = open_alone(self.path)
        if step >= total_steps:
            say(f"all {total_steps} steps are done; a larger --max_steps or --epochs goes on")
        self.start_line()

    def start_line(self):
        self.sums, self.means = {}, {}
        self.steps, self.seconds, self.wait = 0, 0.0, 0.0

    def start_step(self):
        self.steps += 1
        self.began = time.perf_counter()

    def waited(self, seconds):
        self.wait += seconds

    def add(self, loss, terms):
        for name, value in dict(terms, loss=loss).items():
            value = value.float() / self.args.accum_iter
            if name in self.sums:
                value = self.sums[name] + value
            self.sums[name] = value

    def read_losses(self):
        sums = torch.stack(list(self.sums.values())).tolist()
        sums = sum_over_ranks(self.group, *sums)
        for name, total in zip(self.sums, sums):
            self.means[name] = total / (self.steps * world_size())

    def end_step(self):
        self.seconds += time.perf_counter() - self.began

    def write(self, step, lr, skipped, damaged, **more):
        """skipped: see step_unless_not_finite; damaged: this rank's count; more: for log.jsonl.
        Every rank must call this: damage is counted over all of them."""
        step_seconds = self.seconds / self.steps
        row = dict(
            self.means,
            lr=lr,
            crops_per_s=self.crops_per_step / step_seconds,
            ms_per_step=1000 * step_seconds,
            wait=self.wait / self.seconds,
            peak_gb=peak_memory(self.device),
            eta_s=step_seconds * (self.total_steps - step),
            bad_steps=int(skipped[1]),
            damaged=int(sum_over_ranks(self.group, damaged)[0]),
            **more,
        )
        say(log_line(step, row, self.means))
        if rank() == 0:
            with tolerate_full_disk(self.path, step):
                self.append(dict(step=step, **finite_or_null(row)))
        self.start_line()

    def append(self, row):
        # It stays open: as long as it is, open_alone refuses it to other runs. (Whoever opens and
        # closes it once more in this process gives it free.)
        if self.file is None or not os.path.exists(self.path):
            os.makedirs(self.args.out_dir, exist_ok=True)
            self.file = open_alone(self.path)
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()

    def close(self):
        """When training is over: from then on another run may write there."""
        if self.file is not None:
            with contextlib.suppress(OSError):      # a line that a full disk did not take
                self.file.close()


LOGGED_ONLY = ("spread", "accuracy")        # no terms of the loss


def log_line(step, row, means):
    """step 120  loss 0.813 = mim 0.402 + nsp 0.311 + align 0.100  lr 2.9e-04  812 img/s ..."""
    terms, others = [], ""
    for name, mean in means.items():
        if name in LOGGED_ONLY:
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


def open_alone(path):
    """Opens a file to append to it. UserError if another process has it open in this way: two
    runs in one folder would overwrite each other's checkpoints."""
    file = open(path, "a")
    try:
        import fcntl
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):      # which of them differs between systems
        file.close()
        raise UserError(f"{path}: another run writes to it; name another --out_dir") from None
    except (ImportError, OSError):
        pass                                        # Windows and some network disks have no lockf
    return file


def check_alone(path):
    """UserError if another run writes to the file. Asked before a run looks for a checkpoint: what
    is written while it starts, it would overwrite."""
    if rank() == 0 and os.path.exists(path):
        with contextlib.suppress(OSError):              # that it cannot be written is said later
            open_alone(path).close()


def finite_or_null(row):
    """JSON has no NaN: a number that is not finite becomes None, which is written as null."""
    return {name: value if math.isfinite(value) else None for name, value in row.items()}


def cut_log(path, step):
    """Lines after the checkpoint's step belong to steps that are run again: they are cut
    off, as are torn ones. UserError if another run writes there."""
    whole_line = re.compile(r'{"step": (\d+), [^{}]*}\n')      # [1] is its step
    n_cut = 0
    with tolerate_full_disk(path, step):
        open_alone(path).close()
        with open(path, errors="replace") as old, open(path + ".tmp", "w") as new:
            for line in old:
                found = whole_line.fullmatch(line)
                if found and int(found[1]) <= step:
                    new.write(line)
                else:
                    n_cut += 1
        os.replace(path + ".tmp", path)
        if n_cut > 0:
            say(f"{path}: {n_cut} lines, torn or of steps after {step}, are cut off")


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


# ---- ranks that are started again, by torchrun --max_restarts; nothing else needs this

def meet_ranks():
    """torchrun's store, under a prefix that no earlier start has used. Without one, ranks that
    start again would find the addresses of ranks that were killed (pytorch issue 135712).

    Rank 0 makes up the prefix. The others ask for it. What rank 0 answered at an earlier start is
    still in the store, so each asks with a random ticket of its own, and waits for the answer to
    that very ticket. A worker that was killed and restarted asks with another ticket.

        key in the store    value       written by
        ticket/RANK         a ticket    the rank that asks
        prefix/TICKET       a prefix    rank 0, the answer
        PREFIX/RANK         "here"      the rank that got the answer
    """
    store, _, _ = next(dist.rendezvous("env://"))
    if rank() == 0:
        prefix = hand_out_prefix(store)
    else:
        prefix = ask_for_prefix(store)
    return dist.PrefixStore(prefix, store)


def ask_for_prefix(store):
    """What the other ranks do: ask, wait, and say that they are here."""
    ticket = uuid.uuid4().hex
    store.set(f"ticket/{rank()}", ticket)
    prefix = store.get(f"prefix/{ticket}").decode()             # waits for the answer
    store.set(f"{prefix}/{rank()}", "here")
    return prefix


def hand_out_prefix(store):
    """What rank 0 does: answers tickets until all ranks are here. Some tickets may be of ranks that
    are dead: these are answered in vain."""
    prefix = uuid.uuid4().hex
    began = time.time()
    others = range(1, world_size())
    all_here = [f"{prefix}/{other}" for other in others]
    while not store.check(all_here):
        for other in others:
            if store.check([f"ticket/{other}"]):
                ticket = store.get(f"ticket/{other}").decode()
                store.set(f"prefix/{ticket}", prefix)
        if time.time() - began > 1800:
            raise UserError(f"rank 0 waited half an hour for the other {len(others)}; "
                            "were all of them started?")
        time.sleep(0.05)
    return prefix
