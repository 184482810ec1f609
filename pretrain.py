"""Pre-trains an encoder on crops of words without labels: mim, nsp, lmim or mnsp (METHODS in model.py).

    python pretrain.py --method mnsp --model vit_nano                        a laptop: rendered words, no download
    python pretrain.py --method mnsp --compile --batch_size 512              one GPU
    torchrun --nproc_per_node=8 pretrain.py --method mnsp --data U/book32_lmdb U/cc_lmdb U/openvino_lmdb \\
             --teacher vit_small_checkpoint-19.pth                           eight GPUs, LMIM's data and teacher

Read `main` first, then `make_views` and `make_mask`; `Run` is the machinery that fine-tuning shares.
Writes to --out_dir: last.pt (and prev.pt, the one before), log.jsonl (an object a logged step), samples/step_*.png.
Every random number of a step is a function of --seed, the step and the crop's place in the global batch, so a resumed
run, one on other processes and one with accumulated gradients go through the same numbers (dropout is each rank's own).
"""
import contextlib
import datetime
import json
import math
import os
import re
import signal
import sys
import time
import uuid

import torch
import torch.distributed as dist
import torch.nn.functional as F

from data import (GREY, H, W, DamageCount, Parser, UserError, batches, coarse_view, device, draw_sheet, guidance_view, normalize,
                  open_sources, put, read_batch, run, size, uniform, within)
from model import (ALIGN, GUIDES, METHODS, MODELS, Pretrainer, load_encoder, load_state, patch_norm, patchify,
                   read_checkpoint, take, unpatchify)

RECIPES = {  # what --model changes in the flags' defaults, which are LMIM's for vit_small (10 epochs, 8 GPUs of 64 crops)
    "vit_nano": dict(batch_size=64, max_steps=2000, blr=4e-3, warmup_epochs=0.5, clip_grad=1.0),
    "vit_tiny": dict(blr=5e-4),
}

# ---- flags (fine-tuning adds its own to these)

def training_flags(parser):
    add, count, positive, nonnegative = parser.add_argument, within("[1, inf)", int), within("(0, inf)"), within("[0, inf)")
    add("--model", choices=MODELS, default="vit_small", help="vit_nano trains on a laptop, vit_small is the papers'")
    add("--data", nargs="+", default=["synth"], metavar="SRC",
        help="synth[:N[:SEED]], an LMDB folder or a tree of them, a .txt/.tsv/.jsonl/.json of labels, a folder of "
        "images; SRC@5 is seen five times as often")
    add("--fonts", help="a folder of .ttf or .otf files for rendered words, besides those of the system")
    add("--rotate_tall", action="store_true", help="turn crops much taller than wide; for data with vertical words")
    add("--max_damaged", type=within("(0, 1)"), default=.01, help="stop if of 100 crops or more a larger share is unreadable, chance allowed for")
    add("--batch_size", type=count, default=64, help="crops a process and micro-step; lower it if memory runs out")
    add("--accum_iter", type=count, default=1, help="micro-steps that add up to a step; raise it as --batch_size falls")
    add("--epochs", type=within("(0, 1e9)"), default=10, help="passes over --data")
    add("--max_steps", type=count, help="steps in all, instead of --epochs")
    add("--blr", type=positive, default=1.5e-4, help="the learning rate is blr * crops a step / 256")
    add("--lr", type=positive, help="the learning rate itself, instead of --blr")
    add("--min_lr", type=nonnegative, default=0.0, help="where the cosine ends")
    add("--warmup_epochs", type=nonnegative, default=1, help="epochs of rising rate; with --max_steps the same share of them")
    add("--weight_decay", type=nonnegative, default=0.05, help="AdamW's; never on biases, norms and tokens")
    add("--clip_grad", type=nonnegative, default=0.0, help="largest norm of the gradient; 0 leaves it as it is")
    add("--max_bad_steps", type=count, default=10, help="stop after so many skipped (non-finite) steps in a row")
    add("--seed", type=within("[0, 4294967296)", int), default=0, help="of weights, masks, views and order")
    add("--workers", type=within("[0, inf)", int), default=min(4, os.cpu_count()),
        help="processes that read crops, for each rank; more if 'wait' is high")
    add("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto",
        help="of matrix products; auto: bfloat16 where the device has it, else float16 on a GPU, float32 on a CPU")
    add("--compile", action="store_true", help="some minutes' wait, then faster; a CPU gains little, and needs a C++ compiler")
    add("--device", default="auto", help="cpu, cuda, cuda:1; auto takes a CUDA GPU if there is one")
    add("--resume", action="store_true", help="go on from --out_dir's checkpoint, or start if there is none")
    add("--log_every", type=count, default=20, help="steps between lines of log.jsonl")
    add("--save_every", type=count, default=500, help="steps between checkpoints")
    add("--sample_every", type=count, default=1000, help="steps between pictures, or readings of all of --val")

def parse(parser, recipes):
    """Parses with the defaults of the --model that is named, or that --init was made with if it is ours, so that --help
    shows them too."""
    first = Parser(add_help=False)
    for flag in "--model", "--init", "--epochs":
        first.add_argument(flag)
    named, rest = first.parse_known_args()
    asked = {"-h", "--help"} & set(rest)
    stored = read_checkpoint(named.init).get("args") if named.init and not (named.model or asked) else None
    known = isinstance(stored, dict) and stored.get("model") in MODELS
    model = stored["model"] if known else named.model or "vit_small"
    parser.set_defaults(**dict(recipes.get(model, {}), model=model))
    if named.epochs:
        parser.set_defaults(max_steps=None)                                 # a recipe's; what is typed stands
    return parser.parse_args()

# ---- ranks

def meet(rank, world):
    """torchrun's store, under a prefix that no earlier start has used: addresses of ranks that were killed still stand in
    it (pytorch issue 135712). Each rank leaves a random ticket; rank 0 answers every ticket with its prefix, until all
    have signed in."""
    store, prefix, ticket = next(dist.rendezvous("env://"))[0], uuid.uuid4().hex, uuid.uuid4().hex
    if rank:
        store.set(f"ticket/{rank}", ticket)
        prefix = store.get(f"prefix/{ticket}").decode()                     # waits for rank 0's answer to this very ticket
        store.set(f"{prefix}/{rank}", "here")
    began = time.time()
    while rank == 0 and not store.check([f"{prefix}/{r}" for r in range(1, world)]):
        for r in range(1, world):
            if store.check([f"ticket/{r}"]):                                # perhaps of a rank that is dead: answered in vain
                store.set(f"prefix/{store.get(f'ticket/{r}').decode()}", prefix)
        if time.time() - began > 1800:
            raise UserError(f"rank 0 waited half an hour for the other {world - 1}; were all of them started?")
        time.sleep(0.05)
    return dist.PrefixStore(prefix, store)

# ---- one run: device, ranks, steps, checkpoints, logs (fine-tuning uses the same)

class Run:
    """What every training loop needs, so that the loop itself reads as the method does.

        training.prepare(model, source)                           also takes up the checkpoint; `more` must be set before
        for step in training.steps():                             sets the learning rate; saves, or leaves, after the body
            for images, ..., rows in training.micro_batches():    `accum_iter` of them (pre-training draws them all first)
                with training.autocast(): loss, terms = training.model(...)
                training.backward(loss, terms)
            training.update()                                     clips, steps, logs
    """
    MUST_MATCH = ("model data fonts rotate_tall seed dtype method scales teacher mask mask_ratio guidance_strength "
                  "weight_decay init layer_decay dropout drop_path spell charset max_length label_fraction val "
                  "freeze_encoder").split()

    def __init__(self, args):
        self.args, self.out, self.stop = args, args.out_dir, False
        self.step, self.more, self.row = 0, {}, {}                          # more: what else a checkpoint holds
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.crops = args.batch_size * args.accum_iter * self.world         # a step, all ranks
        self.device = device(args.device)
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo", store=meet(self.rank, self.world),
                                    rank=self.rank, world_size=self.world)
        # numbers on the host travel over Gloo: NCCL would wait for the GPU's queue of work
        self.gloo = dist.new_group(backend="gloo") if self.world > 1 else None
        self.dtype = self.pick_dtype()
        self.scaler = torch.amp.GradScaler(self.device.type, init_scale=4096, enabled=self.dtype == torch.float16)
        torch.manual_seed(args.seed)
        self.say(f"{' '.join(sys.argv)}\ntorch {torch.__version__}  {self.device} x{self.world}  {str(self.dtype)[6:]}")
        self.find_checkpoint()

    def pick_dtype(self):
        if self.args.dtype != "auto":
            return getattr(torch, self.args.dtype)
        if self.device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if fast and self.device.type == "cpu" else torch.float32

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def put(self, x):
        return put(x, self.device)

    def say(self, text):
        if self.rank == 0:
            with contextlib.suppress(OSError):                              # it may go to a file on a disk that is full
                print(text, flush=True)

    def over_ranks(self, *numbers):
        """Sums of numbers, on the host. Ranks decide on these, or some would wait for others that have left."""
        numbers = torch.tensor(numbers, dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(numbers, group=self.gloo)
        return numbers.tolist()

    @contextlib.contextmanager
    def writing(self, path):
        """A full or read-only disk is reported, and training goes on."""
        try:
            yield
        except (OSError, RuntimeError) as e:                                # torch's writer puts a RuntimeError on top
            why = str(e.__context__ or e).partition("\n")[0]
            self.say(f"step {self.step}: could not write {path} ({why}); training goes on, what was there stays")

    # -- checkpoints

    def find_checkpoint(self):
        """self.loaded: the newest checkpoint of --out_dir that can be read, once it is known to fit the flags."""
        paths = (os.path.join(self.out, name) for name in ("last.pt", "prev.pt", "best.pt"))
        found, self.loaded, self.torn = list(filter(os.path.exists, paths)), None, False
        if found and not self.args.resume:
            raise UserError(f"--out_dir {self.out}: holds {os.path.basename(found[0])}; add --resume to go on, or name another folder")
        for path in found:
            try:
                self.loaded = dict(read_checkpoint(path), path=path)
                break
            except UserError as e:
                self.torn = True
                self.say(f"{e}; falling back to the checkpoint before it")
        if self.loaded:
            if not {"args", "data", "optimizer", "step", "bad"} <= set(self.loaded):
                raise UserError(f"--resume {path}: not a training checkpoint of this project; name another --out_dir")
            old, new, crops = self.loaded["args"], vars(self.args), self.loaded["data"]["crops"]
            differ = [f"--{k} {old[k]} there, {new[k]} here" for k in self.MUST_MATCH
                      if k in old and k in new and old[k] != new[k]]
            was, now = (a.get("objective", {}) for a in (old, new))         # METHODS' row, changed by flags
            differ += [f"the method's {k} {was.get(k)} there, {now[k]} here" for k in now if was.get(k) != now[k]]
            differ += [f"{crops} crops a step there, {self.crops} here"] if crops != self.crops else []
            if differ:
                raise UserError(f"--resume {path}: {'; '.join(differ)}")
        elif found:
            raise UserError(f"--resume: cannot read {' nor '.join(found)}; name another --out_dir to start anew")
        try:
            os.makedirs(self.out, exist_ok=True)
        except OSError as e:
            raise UserError(f"--out_dir {self.out}: {e.strerror}; expected a folder that can be written")

    def prepare(self, model, source, betas=(0.9, 0.95), layer_decay=1.0, char_maps=False):
        """Puts model, optimizer (AdamW; its betas are MAE's) and data in place, at the very step where the checkpoint is. With
        `char_maps` crops come with the pixels of each character, where they are known."""
        args = self.args
        self.raw, self.n = model.to(self.device), len(source)
        self.total = args.max_steps or max(1, round(args.epochs * len(source) / self.crops))
        self.warmup = max(1, round(self.total * min(1, args.warmup_epochs / args.epochs)))
        self.lr = args.lr or args.blr * self.crops / 256
        groups = weight_groups(model, args.weight_decay, layer_decay)
        self.optimizer = torch.optim.AdamW(groups, self.lr, betas, fused=True)
        self.damage = DamageCount(args.max_damaged)
        self.bad = torch.zeros(2, device=self.device)                       # skipped steps: in a row, in all
        if self.loaded:
            load_state(self.raw, self.loaded["model"], self.loaded["path"])
            self.optimizer.load_state_dict(self.loaded["optimizer"])
            self.step = self.loaded["step"]
            self.more.update((k, self.loaded[k]) for k in self.more)
            self.bad += torch.tensor(self.loaded["bad"], device=self.device)
            if self.rank == 0:
                self.damage.seen, self.damage.bad = map(int, self.loaded["data"].get("damage", (0, 0)))
            self.scaler.load_state_dict(self.loaded["scaler"] or self.scaler.state_dict())
            self.say(f"resuming {self.loaded.pop('path')} at step {self.step}")
            had = self.loaded["data"].get("n", self.n)
            if had != self.n:
                raise UserError(f"--resume: --data held {had:,} crops and holds {self.n:,} now: their order would be another; "
                                "name another --out_dir")
        self.loaded = None                                                  # frees its memory
        if self.over_ranks(self.step, self.n) != [self.step * self.world, self.n * self.world]:
            raise UserError(f"rank {self.rank} stands at step {self.step} of {self.out} and reads {self.n:,} crops of --data, other ranks "
                            "do not; expected an --out_dir that all nodes share, and the same crops on each")
        self.model = torch.compile(self.raw) if args.compile else self.raw
        if self.world > 1:
            self.model = torch.nn.parallel.DistributedDataParallel(self.model, gradient_as_bucket_view=True, forward_sync_buffers=False)
        self.batches = batches(source, args.batch_size, args.seed, self.step * self.crops, self.rank, self.world,
                               args.workers, char_maps)
        parameters = sum(p.numel() for p in model.parameters())
        self.say(f"{args.model}  {parameters / 1e6:.2f} M parameters  {len(source)} crops  {self.crops} a step  "
                 f"{self.total} steps  lr {self.lr:.2e}  warm-up {self.warmup} steps  out {self.out}")

    def save(self, name="last.pt"):
        """False, on every rank, if the checkpoint could not be written. Every rank calls this, for what is counted over all of them."""
        damage = self.over_ranks(self.damage.seen, self.damage.bad)
        failed = self.rank == 0 and not self.write_checkpoint(name, damage)     # rank 0 alone writes
        return self.over_ranks(failed)[0] == 0

    def write_checkpoint(self, name, damage):
        """To a temporary file, which is flushed and renamed; the old last.pt becomes prev.pt. False if that failed."""
        path = os.path.join(self.out, name)
        state = dict(model=self.raw.state_dict(), optimizer=self.optimizer.state_dict(), step=self.step,
                     args=vars(self.args), rng=dict(seed=self.args.seed, step=self.step), bad=self.bad.tolist(),
                     data=dict(position=self.step * self.crops, crops=self.crops, n=self.n, damage=damage),
                     scaler=self.scaler.state_dict(), **self.more)
        if not all(p.isfinite().all() for p in self.raw.parameters()):
            self.say(f"step {self.step}: the weights are not finite and were not saved; lower --lr or --blr")
            return False
        with self.writing(path):
            with open(path + ".tmp", "wb") as f:
                torch.save(state, f)
                f.flush()
                os.fsync(f.fileno())
            if name == "last.pt" and os.path.exists(path) and not self.torn:
                os.replace(path, os.path.join(self.out, "prev.pt"))
            os.replace(path + ".tmp", path)
            self.torn = self.torn and name != "last.pt"
            return True
        with contextlib.suppress(OSError):
            os.remove(path + ".tmp")
        return False

    # -- steps

    def learning_rate(self, step):
        """Linear warm-up from above 0, then half a cosine down to --min_lr."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        share = (step - self.warmup) / (self.total - self.warmup)
        return self.args.min_lr + (self.lr - self.args.min_lr) * 0.5 * (1 + math.cos(math.pi * share))

    def generator(self, salt=0):
        """Random numbers of this step, the same on every rank: each takes the rows of its crops (`rows`)."""
        return torch.Generator().manual_seed((self.args.seed * 1_000_003 + self.step) * 16 + salt)

    def steps(self):
        for s in (signal.SIGTERM, signal.SIGINT):
            signal.signal(s, lambda *_: setattr(self, "stop", True))
        self.open_log()
        self.clock()
        while self.step < self.total and not self.over_ranks(self.stop)[0]:
            lr = self.learning_rate(self.step)
            for group in self.optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
            torch.manual_seed((self.args.seed * 1_000_003 + self.step) * 4096 + self.rank)  # dropout and drop-path
            self.sums = {}

            yield self.step

            self.write_row()
            if self.step % self.args.save_every == 0 and self.step < self.total and self.bad[0] == 0:
                self.save()
            self.began = time.perf_counter()                                # what came after `update` was no training
        if not self.save():
            raise UserError(f"{self.out}: the last checkpoint was not written; mend the reason above and add --resume")
        if self.step < self.total:
            self.say(f"stopped by a signal at step {self.step}; add --resume to go on")
            raise KeyboardInterrupt                                         # status 130: nothing that builds on this run may follow

    def draw(self):
        """The crops of a step, as `accum_iter` micro-batches: images, labels, char_maps, rows in the global batch."""
        for i in range(self.args.accum_iter):
            before = time.perf_counter()
            images, labels, char_maps, damaged, taken = next(self.batches)
            self.waited += time.perf_counter() - before
            self.damage.add(self.args.batch_size, damaged)
            if len(images) == 0:
                raise UserError(f"no crop of a batch could be read, the first being {damaged[0]}; leave such crops out with "
                                "data.py pack, or raise --batch_size")
            rows = ((i * self.world + self.rank) * self.args.batch_size + torch.as_tensor(taken), self.crops)
            yield self.put(images), labels, char_maps, rows

    def micro_batches(self, drawn=None):
        """The body of the caller's loop runs inside the `with`: forward and backward are under no_sync, but for the last."""
        for i, part in enumerate(drawn or self.draw()):
            alone = self.world > 1 and i < self.args.accum_iter - 1         # ranks share gradients once a step
            with self.model.no_sync() if alone else contextlib.nullcontext():
                yield part

    def backward(self, loss, terms):
        self.scaler.scale(loss / self.args.accum_iter).backward()
        for name, term in dict(terms, loss=loss).items():
            self.sums[name] = self.sums.get(name, 0) + term.detach().float() / self.args.accum_iter

    def update(self):
        """Clips and steps. A non-finite gradient is everybody's (it was averaged over ranks): all skip the step, on the
        device, without asking the host; the host looks when it logs."""
        self.scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.args.clip_grad or math.inf)
        bad = (~torch.isfinite(norm)).float()
        self.optimizer.found_inf = bad                                      # 1: the fused step does nothing (float16: the scaler's own)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.bad = torch.stack([(self.bad[0] + 1) * bad, self.bad[1] + bad])
        self.step, self.since = self.step + 1, self.since + 1
        logged = self.due(self.args.log_every)
        if logged:
            self.log()
        self.seconds += time.perf_counter() - self.began
        if (logged or self.device.type == "cpu") and self.bad[0] >= self.args.max_bad_steps:
            self.write_row()
            raise UserError(f"step {self.step}: {int(self.bad[0])} steps in a row had a non-finite gradient; lower "
                            f"--lr or --blr, or set --clip_grad 1; {self.out}/last.pt, if written, is from before them")

    # -- log

    def due(self, every):
        """After `update`: every so many steps, and after the last."""
        return self.step % every == 0 or self.step == self.total

    def clock(self):
        self.began, self.seconds, self.waited, self.since = time.perf_counter(), 0.0, 0.0, 0

    def open_log(self):
        """Lines after the checkpoint's step belong to steps that are run again: they are cut off, as are torn ones."""
        path, row = os.path.join(self.out, "log.jsonl"), re.compile(r'{"step": (\d+), [^{}]*}\n')
        if self.rank == 0 and os.path.exists(path):
            with self.writing(path):
                with open(path) as f, open(path + ".tmp", "w") as new:
                    new.writelines(x for x in f if (found := row.fullmatch(x)) and int(found[1]) <= self.step)
                os.replace(path + ".tmp", path)

    def peak(self):
        """Largest memory so far in GiB: the GPU's, or the process's."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2 ** 30
        with contextlib.suppress(ImportError):                              # Windows has no such module: 0
            import resource
            used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss       # bytes on a Mac, elsewhere kilobytes
            return used / 2 ** (30 if sys.platform == "darwin" else 20)
        return 0.0

    def log(self):
        *sums, damaged = self.over_ranks(*torch.stack(list(self.sums.values())).tolist(), self.damage.bad)  # waits for the device
        seconds, top = self.seconds + time.perf_counter() - self.began, self.optimizer.param_groups[-1]
        means = dict(sorted(zip(self.sums, (total / self.world for total in sums))))
        lr, ms, left = top["lr"] / top["lr_scale"], 1000 * seconds / self.since, self.total - self.step
        row = self.row = dict(means, lr=lr, crops_per_s=self.crops * self.since / seconds, ms_per_step=ms,
                              wait=self.waited / seconds, peak_gb=self.peak(), eta_s=ms / 1000 * left,
                              bad_steps=int(self.bad[1]), damaged=int(damaged))
        terms = " + ".join(f"{n} {means[n]:.3f}" for n in means if n not in ("loss", "spread", "accuracy"))
        extra = "".join(f"  {n} {means[n]:.3f}" for n in ("spread", "accuracy") if n in means)
        bad = f"  BAD {row['bad_steps']}" if row["bad_steps"] else ""
        self.say(f"step {self.step}  loss {means['loss']:.3f} = {terms}{extra}  lr {lr:.1e}  "
                 f"{row['crops_per_s']:.0f} img/s  {ms:.0f} ms  wait {100 * row['wait']:.0f}%  "
                 f"{row['peak_gb']:.1f} GB  eta {datetime.timedelta(seconds=round(row['eta_s']))}{bad}")
        self.clock()

    def write_row(self):
        """What was logged of this step, validation included, as a line of log.jsonl; null is a number that is not finite."""
        path, row = os.path.join(self.out, "log.jsonl"), dict(step=self.step)
        row.update((name, x if math.isfinite(x) else None) for name, x in self.row.items())
        if self.rank == 0 and self.row:
            with self.writing(path), open(path, "a") as f:
                f.write(json.dumps(row) + "\n")
        self.row = {}

def weight_groups(model, weight_decay, layer_decay=1.0):
    """AdamW's groups. Matrices decay; biases, norms, tokens and the embedding of letters do not (MAE). Encoder layer i of
    n learns at layer_decay^(n + 1 - i) of the rate, what is above it at the full rate (BEiT)."""
    groups, n = {}, len(model.encoder.blocks)
    for name, p in model.named_parameters():
        if p.requires_grad:
            layer = int(name.split(".")[2]) + 1 if name.startswith("encoder.blocks") else n + 1
            layer = 0 if name.startswith(("encoder.cls_token", "encoder.patch_embed")) else layer
            plain = p.dim() < 2 or name.endswith(("cls_token", "mask_token", "scale_embed")) or name == "embed.weight"
            kind = dict(lr_scale=layer_decay ** (n + 1 - layer), weight_decay=0.0 if plain else weight_decay)
            groups.setdefault(tuple(kind.values()), dict(kind, params=[]))["params"].append(p)
    return list(groups.values())

# ---- views, masks and pictures of pre-training

def make_views(images, method, scales, generator, rows=None, strength=1.0):
    """The views of a row of METHODS, normalised, as two lists: mim's guide, if it has its own, moved and bent, at full scale
    or the finest coarse one; nsp's at every coarse scale, which stay in place, or what they have to predict could not be known."""
    def look(sizes, moved):
        view = guidance_view(images, generator, rows, moved, strength)                       # (B, 3, H, W) in [0, 1]
        return [normalize(coarse_view(view, s)) for s in sizes]
    coarse = look(scales, moved=False) if method["nsp"] else []
    guide = {"full": [(H, W)], "coarse": scales[-1:]}.get(method["guide"])
    return look(guide, moved=True) if guide else [], coarse

def make_mask(n, args, encoder, generator, rows=None):
    """-> ids_keep (n, K), ids_mask (n, M): keeps the N - round(mask_ratio * N) patches of least noise, as many in every
    crop, so that shapes are static; at least one is kept and one is hidden.

    --mask block: the patches of a block, 16 x 16 pixels from a corner drawn anew, share their noise, so that they are
    hidden together; only the block in which the ratio is reached is hidden in part."""
    (h, w), N = encoder.grid, math.prod(encoder.grid)
    noise = uniform(generator, n, N + 2 * (args.mask == "block"), rows=rows)
    if args.mask == "block":
        a, b = (max(1, 16 // p) for p in encoder.patch)
        corner, noise = noise.split([2, N], dim=1)
        y = (torch.arange(h) + (corner[:, :1] * a).long()) // a                               # (n, h) row of blocks
        x = (torch.arange(w) + (corner[:, 1:] * b).long()) // b                               # (n, w)
        cell = (y[:, :, None] * ((w + b - 2) // b + 1) + x[:, None, :]).flatten(1)            # (n, N): which block
        noise = noise.gather(1, cell) + 1e-4 * noise
    ids, K = noise.argsort(dim=1), min(max(N - round(args.mask_ratio * N), 1), N - 1)
    return ids[:, :K], ids[:, K:]

@torch.no_grad()
def draw_samples(training, images, path):
    """A sheet: rows are crops. Columns: the crop; what mim sees (visible patches, its guide) and what it predicts, twice:
    as the loss sees it, pixels normalised per patch, and with the true mean and contrast of each hidden patch put back,
    as MAE draws it; the same of nsp, from its coarse views; last the truth as the loss sees it. Features cannot be
    drawn: in place of a prediction stands its cosine similarity to the target, 0 black, 1 white; visible patches are white."""
    model, args, generator = training.raw.eval(), training.args, torch.Generator().manual_seed(training.args.seed)
    images = training.put(images)
    views = make_views(images, model.method, model.scales, generator, strength=args.guidance_strength)
    ids_keep, ids_mask = map(training.put, make_mask(len(images), args, model.encoder, generator))
    image, grid, patch = normalize(images), model.encoder.grid, model.encoder.patch
    with training.autocast():
        _, _, predicted = model(image, views, ids_keep, ids_mask)
    pixels, target = patchify(image, patch), model.target(image)[-1]
    _, mean, std = patch_norm(pixels)
    everything = torch.arange(pixels.shape[1], device=training.device).expand(len(images), -1)

    def fill(values, ids, ground):
        """Tokens with `values` at the hidden places, as a picture."""
        x = ground.clone().scatter_(1, ids[..., None].expand(-1, -1, ground.shape[-1]), values)
        return unpatchify(x, grid, patch) / 2 + 0.5

    enlarge = lambda view: F.interpolate(view, images.shape[-2:]) / 2 + 0.5
    guide, coarse = views
    guide = coarse if model.method["guide"] == "still" else guide
    visible = fill(torch.zeros_like(pixels)[:, :ids_mask.shape[1]], ids_mask, pixels)
    columns = [("crop", image / 2 + 0.5)]
    for name, pred in predicted.items():
        pred, ids = pred.float(), ids_mask if name == "mim" else everything
        looks = [visible, *map(enlarge, guide)] if name == "mim" else map(enlarge, coarse)
        columns += [(f"{name} sees", look) for look in looks]
        if model.teacher is None:
            columns += [(f"{name} predicts", fill(pred / 3, ids, torch.zeros_like(pixels))),
                        (f"{name}, in colour", fill(pred * take(std, ids) + take(mean, ids), ids, pixels))]
        else:
            like = torch.cosine_similarity(pred, take(target, ids), dim=-1)[..., None]
            like = fill(2 * like.expand(-1, -1, pixels.shape[-1]) - 1, ids, torch.ones_like(pixels))
            columns += [(f"{name}, likeness", like)]
    columns += [("target", unpatchify(target / 3, grid, patch) / 2 + 0.5)] if model.teacher is None else []
    model.train()
    sheet = (255 * torch.stack([x for _, x in columns], 1).clamp(0, 1)).byte().cpu()         # (B, columns, 3, H, W)
    with training.writing(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        draw_sheet([[(None, [(title, GREY)]) for title, _ in columns], *([(x, []) for x in row] for row in sheet)], path)
        training.say(f"picture    {path}")

# ---- main

def main():
    parser = Parser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--method", choices=METHODS, default="mnsp", help="a row of METHODS in model.py")
    training_flags(parser)
    add("--teacher", help="checkpoint whose features are the target (MAE, MAERec, LMIM or ours); left out: pixels")
    add("--scales", nargs="+", default=["16x64"],
        help="sizes of nsp's views, height x width, coarse to fine; mim's coarse guide is of the last")
    add("--mask_ratio", type=within("(0, 1)"), default=0.8, help="share of patches hidden")
    add("--mask", choices=["random", "block"], default="random", help="hide patches, or blocks of 16 x 16 pixels")
    add("--guidance_strength", type=within("[0, inf)"), default=1.0,
        help="how much the guidance view differs: at 0 it is the crop itself, 1 is LMIM's medium")
    add("--guide", choices=GUIDES,
        help="what mim's decoder sees besides visible patches: a look that is moved and bent, of full or coarse size; "
        "still: nsp's own, in place; left out: the method's own")
    add("--align", choices=[*ALIGN, "none"],
        help="how [cls] tokens are brought together; left out: the method's own")
    add("--align_weight", type=within("[0, inf)"), help="weight of that term; left out: the method's own, or mnsp's; 0.02 suits lmim without a --teacher")
    add("--out_dir", help="where to write; left out: out/METHOD")
    args = parse(parser, RECIPES)
    args.out_dir = args.out_dir or os.path.join("out", args.method)

    method, (p, q) = dict(METHODS[args.method]), MODELS[args.model]["encoder"]["patch"]
    scales = [size(s) for s in args.scales]
    for h, w in scales:
        if h % p or w % q or h >= H or w >= W:
            parser.error(f"--scales {h}x{w}: expected multiples of the patch, {p}x{q}, below {H}x{W}")
    if scales != sorted(set(scales)):
        parser.error(f"--scales {' '.join(args.scales)}: expected coarse to fine, each once")
    method.update(guide=args.guide or method["guide"])
    if args.align:
        method.update(form=args.align, align=0.0 if args.align == "none" else method["align"] or METHODS["mnsp"]["align"])
    method.update(align=method["align"] if args.align_weight is None else args.align_weight)
    guide, mim, nsp, form = method["guide"], method["mim"] > 0, method["nsp"] > 0, method.get("form")
    if not {"none": mim or nsp, "full": mim, "coarse": mim, "still": mim and nsp}.get(guide):
        parser.error(f"--method {args.method} --guide {guide}: expected one of {' '.join(GUIDES)}, and a weight for mim or "
                     "nsp; a guide needs mim, and still needs nsp too")
    n_cls = (guide in ("full", "coarse")) + len(scales) * nsp + mim         # one of each view, one of the masked crop
    if method["align"] and (n_cls < 2 or form not in ALIGN):
        parser.error(f"--align {form} --align_weight {method['align']}: expected {' or '.join(ALIGN)}, and two [cls]; "
                     f"--method {args.method} --guide {guide} has {n_cls}")
    args.objective = method                                                 # --resume refuses another
    training = Run(args)
    source = open_sources(args.data, fonts=args.fonts, rotate_tall=args.rotate_tall, labels=False)
    teacher = load_encoder(args.teacher).to(training.device) if args.teacher else None
    if teacher:
        training.say(f"--teacher {args.teacher}: all {teacher.matched} tensors loaded")
    model = Pretrainer(method, args.model, scales, teacher, args.batch_size * args.accum_iter)
    training.prepare(model, source)
    few = read_batch(range(min(64, len(source))), source)[0][:8]             # some may be damaged

    for step in training.steps():
        parts, everyone = [], []
        for images, _, _, rows in training.draw():
            views = make_views(images, method, model.scales, training.generator(0), rows, args.guidance_strength)
            ids = make_mask(len(images), args, model.encoder, training.generator(1), rows)
            parts.append((normalize(images), views, *map(training.put, ids)))
        if args.accum_iter > 1 and method["align"] and form == "infonce":   # it needs every [cls] of the step: a first pass
            with torch.no_grad(), training.autocast():                      # without gradients (GradCache)
                everyone = [model.encode(*part[:3])[-1] for part in parts]  # for each part, [cls] of each view
        for i, part in enumerate(training.micro_batches(parts)):            # image, views, ids_keep, ids_mask
            with training.autocast():
                loss, terms, _ = training.model(*part, others=everyone[:i] + everyone[i + 1:])
            training.backward(loss, terms)
        training.update()

        if training.due(args.sample_every) and training.rank == 0 and len(few):
            draw_samples(training, few, os.path.join(args.out_dir, "samples", f"step_{step + 1:06d}.png"))
    training.say(f"checkpoint {os.path.join(args.out_dir, 'last.pt')}")

if __name__ == "__main__":
    run(main)
