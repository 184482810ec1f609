"""Pre-trains an encoder on crops of words without labels: mim, nsp, lmim or mnsp (METHODS in model.py).

    python pretrain.py --method mnsp --model vit_nano                        a laptop: rendered words, no download
    python pretrain.py --method mnsp --compile --batch_size 512              one GPU
    torchrun --nproc_per_node=8 pretrain.py --method mnsp --data U/book32_lmdb U/cc_lmdb U/openvino_lmdb \\
             --teacher vit_small_checkpoint-19.pth                           eight GPUs, the paper's setting

Writes to --out_dir: last.pt (and prev.pt, the one before), log.jsonl (an object a logged step), samples/step_*.png.
Every random number of a step is a function of --seed, the step and the crop's place in the global batch, so that a resumed run,
a run on other processes and a run with accumulated gradients go through the same numbers (dropout is each rank's own).
"""
import argparse
import contextlib
import json
import math
import os
import re
import signal
import sys
import time

import torch
import torch.distributed as dist

from PIL import Image

try:
    import resource
except ImportError:                          # Windows has none: peak memory then reads 0
    resource = None

from data import H, W, Batches, DamageCount, Parser, Readable, UserError, coarse_view, guidance_view, normalize, open_sources, run, size, uniform
from model import (METHODS, MODELS, ALIGN, Pretrainer, block_noise, load_encoder, load_state, patch_norm, patchify,
                   random_mask, read_checkpoint, take, unpatchify)

RECIPES = {  # what --model changes in the defaults; vit_small's are LMIM's (10 epochs on 8 GPUs of 64 crops)
    "vit_nano": dict(batch_size=64, max_steps=2000, blr=4e-3, warmup_epochs=0.5, sample_every=1000, clip_grad=1.0),
    "vit_tiny": dict(blr=5e-4),
    "vit_small": {},
    "vit_base": {},
}


# ---- flags (fine-tuning adds its own to these)

def between(low, high, closed=False):
    def number(text):
        value = float(text)
        if not (low < value < high or closed and value == low):
            raise argparse.ArgumentTypeError(f"{text}: expected a number in {'[' if closed else '('}{low}, {high})")
        return value
    return number


def training_flags(parser):
    add = parser.add_argument
    add("--model", choices=MODELS, default="vit_small", help="size of the encoder; vit_nano trains on a laptop, vit_small is the papers'")
    add("--data", nargs="+", default=["synth"], metavar="SRC",
        help="synth[:N[:SEED]], an LMDB folder or a tree of them, a .txt/.tsv/.jsonl/.json of labels, a folder of images; name one "
             "twice to see it twice as often")
    add("--fonts", help="a folder of .ttf or .otf files for rendered words, besides those of the system")
    add("--rotate_tall", action="store_true", help="turn crops much taller than wide; for data with vertical words")
    add("--max_damaged", type=between(0, 1), default=0.01, help="share of crops that may be unreadable before the run stops")
    add("--batch_size", type=int, default=64, help="crops a process and micro-step; lower this first if memory runs out")
    add("--accum_iter", type=int, default=1, help="micro-steps whose gradients add up to one step; raise it as --batch_size falls")
    add("--epochs", type=float, default=10, help="passes over --data")
    add("--max_steps", type=int, help="steps in all, instead of --epochs")
    add("--blr", type=float, default=1.5e-4, help="learning rate for 256 crops a step; the real one is blr * crops / 256")
    add("--lr", type=float, help="learning rate as it is, instead of --blr")
    add("--min_lr", type=float, default=0.0, help="where the cosine ends")
    add("--warmup_epochs", type=float, default=1, help="of --epochs, with the learning rate rising; scales along with --max_steps")
    add("--weight_decay", type=float, default=0.05, help="AdamW's; never on biases, norms and tokens")
    add("--clip_grad", type=float, default=0.0, help="largest norm of the gradient; 0 leaves it as it is")
    add("--max_bad_steps", type=int, default=10, help="steps in a row with a non-finite gradient before the run stops; each is skipped")
    add("--seed", type=int, default=0, help="of weights, masks, views and order")
    add("--workers", type=int, default=min(4, os.cpu_count()), help="processes that read crops, for each rank; more if 'wait' is high")
    add("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto", help="of matrix products; auto takes bfloat16 "
        "where the device has it")
    add("--compile", action="store_true", help="torch.compile: a minute's wait, then faster; needs a C++ compiler on CPUs")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps; auto takes a GPU if there is one")
    add("--resume", action="store_true", help="go on from --out_dir's checkpoint, or start if there is none")
    add("--log_every", type=int, default=20, help="steps between lines of log.jsonl")
    add("--save_every", type=int, default=500, help="steps between checkpoints")
    add("--sample_every", type=int, default=1000, help="steps between pictures or readings of a few crops")


def parse(parser, recipes, argv=None):
    """Parses with the defaults of the --model that is named, so that --help shows them too."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--model", default="vit_small")
    parser.set_defaults(**recipes.get(first.parse_known_args(argv)[0].model, {}))
    args = parser.parse_args(argv)
    for name in ("batch_size", "accum_iter", "log_every", "save_every", "sample_every", "max_bad_steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: expected 1 or more")
    for name in ("epochs", "max_steps", "blr", "lr"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            parser.error(f"--{name} {getattr(args, name)}: expected more than 0")
    for name in ("workers", "clip_grad", "weight_decay", "warmup_epochs", "min_lr"):
        if getattr(args, name) < 0:
            parser.error(f"--{name} {getattr(args, name)}: expected 0 or more")
    return args


# ---- one run: device, ranks, steps, checkpoints, logs (fine-tuning uses the same)

class Run:
    """What every training loop needs, so that the loop itself reads as the method does.

        for step in run.steps():                                   sets the learning rate; saves, or leaves, after the body
            for images, ..., rows in run.micro_batches():          `accum_iter` of them
                with run.autocast(): loss, terms = run.model(...)
                run.backward(loss, terms)
            run.update()                                           clips, steps, logs
    """

    MUST_MATCH = ("model", "data", "fonts", "rotate_tall", "seed", "dtype", "method", "scales", "teacher", "mask", "mask_ratio",
                  "align", "align_weight", "weight_decay", "init", "layer_decay", "dropout", "drop_path", "spell", "charset", "max_length", "label_fraction", "freeze_encoder")

    def __init__(self, args):
        self.args, self.stop = args, False
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        local = int(os.environ.get("LOCAL_RANK", 0))
        name = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self.device = torch.device(f"cuda:{local}" if name == "cuda" else name)
            torch.empty(1, device=self.device)
        except (RuntimeError, AssertionError) as e:
            raise UserError(f"--device {args.device}: {str(e).splitlines()[0]}")
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            torch.backends.cuda.matmul.allow_tf32 = True
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        # flags between hosts travel over Gloo: asking a GPU would stop the queue of work
        self.hosts = dist.new_group(backend="gloo") if self.world > 1 else None
        self.dtype = self.pick_dtype()
        self.scaler = torch.amp.GradScaler(self.device.type, init_scale=2.0 ** 12) if self.dtype == torch.float16 else None
        self.crops = args.batch_size * args.accum_iter * self.world                          # a step, all ranks
        self.step, self.position, self.more = 0, 0, {}                                        # more: what else a checkpoint holds
        self.out = args.out_dir
        torch.manual_seed(args.seed)
        for s in (signal.SIGTERM, signal.SIGINT):
            signal.signal(s, lambda *_: setattr(self, "stop", True))
        self.say(f"{' '.join(sys.argv)}\ntorch {torch.__version__}  {self.device} x{self.world}  {str(self.dtype)[6:]}")
        self.find_checkpoint()

    def pick_dtype(self):
        if self.args.dtype != "auto":
            return getattr(torch, self.args.dtype)
        if self.device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
        fast = self.device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
        return torch.bfloat16 if fast else torch.float32

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def say(self, text):
        if self.rank == 0:
            print(text, flush=True)

    def agree(self, flag):
        """True on every rank if it is on any: decisions to leave are taken together, or the rest would hang."""
        if self.world == 1:
            return flag
        flags = torch.tensor([float(flag)])
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.hosts)
        return bool(flags[0])

    # -- checkpoints

    def find_checkpoint(self):
        paths = [os.path.join(self.out, name) for name in ("last.pt", "prev.pt")]
        found = [p for p in paths if os.path.exists(p)]
        taken = [p for p in [*paths, os.path.join(self.out, "best.pt")] if os.path.exists(p)]
        if taken and not self.args.resume:
            raise UserError(f"--out_dir {self.out}: holds {os.path.basename(taken[0])}; add --resume to go on, or name another folder")
        self.loaded = None
        for path in found:
            try:
                self.loaded = dict(read_checkpoint(path), path=path)
                break
            except UserError as e:
                self.say(f"{e}; falling back to the checkpoint before it")
        if found and self.loaded is None:
            raise UserError(f"--resume: neither {' nor '.join(found)} can be read; name another --out_dir to start anew")
        if self.loaded:
            if not {"args", "data", "optimizer", "step", "bad"} <= set(self.loaded):
                raise UserError(f"--resume {self.loaded['path']}: not a training checkpoint of this project; name another --out_dir")
            old, new = self.loaded["args"], vars(self.args)
            differ = [f"--{k} {old[k]} there, {new[k]} here" for k in self.MUST_MATCH if k in old and k in new and old[k] != new[k]]
            if self.loaded["data"]["crops"] != self.crops:
                differ.append(f"{self.loaded['data']['crops']} crops a step there, {self.crops} here")
            if differ:
                raise UserError(f"--resume {self.loaded['path']}: {'; '.join(differ)}")
        try:
            os.makedirs(os.path.join(self.out, "samples"), exist_ok=True)
        except OSError as e:
            raise UserError(f"--out_dir {self.out}: {e.strerror}")

    def prepare(self, model, source, groups=None, masks=False):
        """Puts model, optimizer and data in place, at the very step where the checkpoint is, if there is one."""
        args = self.args
        self.raw = model.to(self.device)
        groups = groups or weight_groups(self.raw, args.weight_decay)
        self.total = args.max_steps or max(1, round(args.epochs * len(source) / self.crops))
        self.warmup = max(1, round(self.total * min(1, args.warmup_epochs / args.epochs)))
        self.lr = args.lr or args.blr * self.crops / 256
        self.optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=self.betas(), fused=True)
        if self.loaded:
            load_state(self.raw, self.loaded["model"], self.loaded["path"])
            self.optimizer.load_state_dict(self.loaded["optimizer"])
            self.step, self.position = self.loaded["step"], self.loaded["data"]["position"]
            self.more.update((k, self.loaded[k]) for k in self.more)
            if self.scaler and self.loaded["scaler"]:
                self.scaler.load_state_dict(self.loaded["scaler"])
            self.say(f"resuming {self.loaded['path']} at step {self.step}")
        self.model = torch.compile(self.raw) if args.compile else self.raw
        if self.world > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            self.model = torch.nn.parallel.DistributedDataParallel(self.model, device_ids=ids, gradient_as_bucket_view=True)
        self.damage = DamageCount(args.max_damaged)
        self.batches = iter(Batches(source, args.batch_size, args.seed, self.position, self.rank, self.world,
                                    args.workers, masks=masks))
        self.bad = torch.tensor(self.loaded["bad"] if self.loaded else [0.0, 0.0], device=self.device)   # in a row, in all
        self.loaded = None
        parameters = sum(p.numel() for p in self.raw.parameters())
        self.say(f"{args.model}  {parameters / 1e6:.2f} M parameters  {len(source)} crops  {self.crops} a step  "
                 f"{self.total} steps  lr {self.lr:.2e}  warm-up {self.warmup} steps  out {self.out}")

    def betas(self):
        return (0.9, 0.95) if hasattr(self.args, "method") else (0.9, 0.999)                  # MAE's, and fine-tuning's

    def save(self, name="last.pt"):
        """Rank 0 writes to a temporary file, flushes, renames; the old last.pt becomes prev.pt. A full disk is said, not fatal."""
        if self.rank:
            return True
        path = os.path.join(self.out, name)
        state = dict(model=self.raw.state_dict(), optimizer=self.optimizer.state_dict(), step=self.step, args=vars(self.args),
                     rng=dict(seed=self.args.seed, step=self.step), data=dict(position=self.position, crops=self.crops),
                     scaler=self.scaler and self.scaler.state_dict(), bad=self.bad.tolist(), **self.more)
        try:
            with open(path + ".tmp", "wb") as f:
                torch.save(state, f)
                f.flush()
                os.fsync(f.fileno())
            if name == "last.pt" and os.path.exists(path):
                os.replace(path, os.path.join(self.out, "prev.pt"))
            os.replace(path + ".tmp", path)
        except (OSError, RuntimeError) as e:                                                  # torch's writer raises RuntimeError
            with contextlib.suppress(OSError):
                os.remove(path + ".tmp")
            self.say(f"step {self.step}: could not write {path} ({str(e).splitlines()[0]}); training goes on, what was there stays")
            return False
        return True

    # -- steps

    def learning_rate(self, step):
        """Linear warm-up from above 0, then half a cosine down to --min_lr."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        share = (step - self.warmup) / max(1, self.total - self.warmup)
        return self.args.min_lr + (self.lr - self.args.min_lr) * 0.5 * (1 + math.cos(math.pi * share))

    def generator(self, salt=0):
        """Random numbers of this step, the same on every rank: each takes the rows of its crops (`rows`)."""
        return torch.Generator().manual_seed((self.args.seed * 1_000_003 + self.step) * 16 + salt)

    def steps(self):
        self.open_log()
        self.clock()
        while self.step < self.total and not self.agree(self.stop):
            lr = self.learning_rate(self.step)
            for group in self.optimizer.param_groups:
                group["lr"] = lr * group.get("lr_scale", 1.0)
            torch.manual_seed((self.args.seed * 1_000_003 + self.step) * 4096 + self.rank)    # dropout and drop-path
            self.sums = {}

            yield self.step

            if self.step % self.args.save_every == 0 and self.step < self.total and self.bad[0] == 0:
                self.save()
        saved = self.save()
        if self.step < self.total:
            self.say(f"stopped by a signal at step {self.step}; add --resume to go on")
        if not saved:
            raise UserError(f"the last checkpoint could not be written to {self.out}; make room and add --resume")

    def micro_batches(self):
        for i in range(self.args.accum_iter):
            before = time.perf_counter()
            images, labels, masks, damaged, taken = next(self.batches)
            self.waited += time.perf_counter() - before
            self.damage.add(self.args.batch_size, damaged)
            if len(images) == 0:
                raise UserError(f"no crop of a whole batch could be read, the first being {damaged[0]}; see python data.py check")
            first = (i * self.world + self.rank) * self.args.batch_size
            rows = (first + torch.as_tensor(taken), self.args.batch_size * self.args.accum_iter * self.world)
            share = self.world > 1 and i < self.args.accum_iter - 1                           # ranks share gradients once a step
            with self.model.no_sync() if share else contextlib.nullcontext():
                yield images.to(self.device, non_blocking=True), labels, masks, rows

    def backward(self, loss, terms):
        loss = loss / self.args.accum_iter
        (self.scaler.scale(loss) if self.scaler else loss).backward()
        for name, term in dict(terms, loss=loss.detach() * self.args.accum_iter).items():
            self.sums[name] = self.sums.get(name, 0) + term.detach().float() / self.args.accum_iter

    def update(self):
        """Clips and steps. A non-finite gradient is everybody's (it was averaged over ranks): all skip the step, on the device,
        without asking the host; the host looks when it logs."""
        if self.scaler:
            self.scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.args.clip_grad or math.inf)
        bad = (~torch.isfinite(norm)).float()
        if self.scaler:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.found_inf = bad
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.bad = torch.stack([(self.bad[0] + 1) * bad, self.bad[1] + bad])
        self.step, self.position, self.since = self.step + 1, self.position + self.crops, self.since + 1
        due = self.step % self.args.log_every == 0 or self.step == self.total
        if due:
            self.log()
        if due or self.device.type == "cpu":
            if self.bad[0] >= self.args.max_bad_steps:
                raise UserError(f"step {self.step}: {int(self.bad[0])} steps in a row had a non-finite gradient; lower --lr or --blr, or "
                                f"set --clip_grad 1; {os.path.join(self.out, 'last.pt')} is from before them, if it was written")

    # -- log

    def clock(self):
        self.began, self.waited, self.since = time.perf_counter(), 0.0, 0

    @contextlib.contextmanager
    def untimed(self):
        """Evaluation and pictures do not count as training time."""
        before = time.perf_counter()
        yield
        self.began += time.perf_counter() - before

    def open_log(self):
        """Lines after the checkpoint's step belong to steps that are run again: they are cut off."""
        path = os.path.join(self.out, "log.jsonl")
        if self.rank == 0 and os.path.exists(path):
            with open(path) as f:
                kept = [line for line in f if re.match(r'{"step": \d+, .*}\n', line) and json.loads(line)["step"] <= self.step]
            with open(path + ".tmp", "w") as f:
                f.writelines(kept if self.step else [])
            os.replace(path + ".tmp", path)

    def log(self):
        lr = self.optimizer.param_groups[-1]["lr"] / self.optimizer.param_groups[-1].get("lr_scale", 1.0)
        names = sorted(self.sums)
        means = torch.stack([self.sums[n] for n in names])
        if self.world > 1:
            dist.all_reduce(means)
        means = dict(zip(names, (means / self.world).tolist()))
        seconds = time.perf_counter() - self.began
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated()
        else:                                    # kilobytes, on a Mac bytes
            unit = 1 if sys.platform == "darwin" else 1024
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit if resource else 0
        ms = 1000 * seconds / self.since
        row = dict(step=self.step, **means, lr=lr, crops_per_s=self.crops * self.since / seconds, ms_per_step=ms,
                   wait=self.waited / seconds, peak_gb=peak / 2 ** 30, eta_s=ms / 1000 * (self.total - self.step), bad_steps=int(self.bad[1]),
                   damaged=self.damage.bad)
        terms = " + ".join(f"{n} {means[n]:.3f}" for n in means if n not in ("loss", "spread", "accuracy"))
        extra = "".join(f"  {n} {means[n]:.3f}" for n in ("spread", "accuracy") if n in means)
        eta = time.strftime("%H:%M:%S", time.gmtime(row["eta_s"]))
        self.say(f"step {self.step}  loss {means['loss']:.3f} = {terms}{extra}  lr {lr:.1e}  {row['crops_per_s']:.0f} img/s  {ms:.0f} ms  "
                 f"wait {100 * row['wait']:.0f}%  {row['peak_gb']:.1f} GB  eta {eta}" + (f"  BAD {row['bad_steps']}" if row["bad_steps"] else ""))
        self.write(row)
        self.clock()

    def write(self, row):
        if self.rank == 0:
            try:
                with open(os.path.join(self.out, "log.jsonl"), "a") as f:
                    f.write(json.dumps(row) + "\n")
            except OSError as e:
                self.say(f"could not write log.jsonl ({e.strerror}); training goes on")


def weight_groups(model, weight_decay):
    """AdamW's two groups: matrices decay; biases, norms and tokens do not (MAE)."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    plain = [p for n, p in named if p.dim() < 2 or n.endswith(("cls_token", "mask_token", "scale_embed"))]
    decay = [p for n, p in named if not any(p is q for q in plain)]
    return [dict(params=decay, weight_decay=weight_decay), dict(params=plain, weight_decay=0.0)]


# ---- views, masks and pictures of pre-training

def make_views(images, method, scales, generator, rows=None):
    """The guidance views of METHODS[method], normalised: none, one at full scale, or one a coarse scale."""
    if method["guidance"] == "none":
        return []
    look = guidance_view(images, generator, rows, geometry=method["guidance"] == "full")      # (B, 3, H, W) in [0, 1]
    return [normalize(coarse_view(look, s)) for s in scales] or [normalize(look)]


def make_mask(n, args, encoder, generator, rows=None):
    """ids_keep (n, K), ids_mask (n, M) of --mask and --mask_ratio; blocks are of 16 x 16 pixels."""
    noise = uniform(generator, n, encoder.grid[0] * encoder.grid[1], rows=rows)
    if args.mask == "block":
        noise = block_noise(noise, encoder.grid, [max(1, 16 // p) for p in encoder.patch])
    return random_mask(noise, args.mask_ratio)


@torch.no_grad()
def draw_samples(run, images, path):
    """A sheet: rows are crops; columns are the crop, what is visible, the coarsest view, the prediction, and the truth.

    Pixel targets are normalised per patch, so the prediction is drawn twice: as the loss sees it (beside the truth so seen), and with
    the true mean and contrast of each hidden patch put back, as MAE draws it. Feature targets cannot be drawn: in their place stands
    the cosine similarity of prediction and target per patch, black 0 to white 1."""
    model, args = run.raw.eval(), run.args
    images = images.to(run.device)
    generator = torch.Generator().manual_seed(args.seed)
    views = make_views(images, model.method, model.scales, generator)
    ids_keep, ids_mask = (ids.to(run.device) for ids in make_mask(len(images), args, model.encoder, generator))
    image = normalize(images)
    with run.autocast():
        _, _, pred = model(image, views, ids_keep, ids_mask)
    if not model.method["mim"]:
        ids_keep, ids_mask = ids_mask[:, :0], torch.arange(pred.shape[1], device=run.device).expand(len(images), -1)
    grid, patch, pred = model.encoder.grid, model.encoder.patch, pred.float()
    pixels, target = patchify(image, patch), model.target(image, grid)

    def fill(values, ground):
        """Tokens with `values` at the hidden places, as a picture."""
        x = ground.clone().scatter_(1, ids_mask[..., None].expand(-1, -1, ground.shape[-1]), values)
        return unpatchify(x, grid, patch) / 2 + 0.5
    columns = [image / 2 + 0.5, fill(torch.zeros_like(pixels)[:, :ids_mask.shape[1]], pixels)]
    columns += [torch.nn.functional.interpolate(views[0], images.shape[-2:]) / 2 + 0.5] if views else []
    if model.teacher is None:
        _, mean, std = patch_norm(pixels)
        grey = torch.zeros_like(pixels)
        columns += [fill(pred / 3, grey), fill(take(target, ids_mask) / 3, grey),
                    fill(pred * take(std, ids_mask) + take(mean, ids_mask), pixels)]
    else:
        like = torch.cosine_similarity(pred, take(target, ids_mask), dim=-1)[..., None]
        columns += [fill(2 * like.expand(-1, -1, pixels.shape[-1]) - 1, torch.ones_like(pixels))]
    model.train()
    rows = torch.stack([c.clamp(0, 1).cpu() for c in [*columns, image / 2 + 0.5]], dim=1)     # (B, columns, 3, H, W)
    B, columns, _, h, w = rows.shape
    sheet = torch.nn.functional.pad(rows, (2, 2, 2, 2), value=1).permute(0, 3, 1, 4, 2).reshape(B * (h + 4), columns * (w + 4), 3)
    sheet = Image.fromarray((sheet * 255).byte().numpy())
    try:
        sheet.resize((sheet.width * 2, sheet.height * 2), Image.NEAREST).save(path)
        run.say(f"picture    {path}")
    except OSError as e:
        run.say(f"could not write {path} ({e.strerror}); training goes on")


# ---- main

def main():
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--method", choices=METHODS, default="mnsp", help="a row of METHODS in model.py")
    training_flags(parser)
    parser.add_argument("--teacher", help="checkpoint whose features are the target (MAE, MAERec, LMIM or ours); left out: pixels")
    parser.add_argument("--scales", nargs="+", default=["16x64"], help="coarse views of nsp and mnsp, height x width, coarse to fine")
    parser.add_argument("--mask_ratio", type=between(0, 1), default=0.8, help="share of patches hidden")
    parser.add_argument("--mask", choices=["random", "block"], default="random", help="hide single patches, or blocks of 16 x 16 pixels")
    parser.add_argument("--align", choices=[*ALIGN, "none"], help="how [cls] tokens are brought together; left out: the method's own")
    parser.add_argument("--align_weight", type=float, help="weight of that term; left out: the method's own")
    parser.add_argument("--out_dir", help="where to write; left out: out/METHOD")
    args = parse(parser, RECIPES)
    args.out_dir = args.out_dir or os.path.join("out", args.method)

    method = dict(METHODS[args.method])
    if args.align and method["guidance"] != "none":
        method.update(form=args.align, align=0.0 if args.align == "none" else method["align"] or 0.1)
    method.update(align=args.align_weight if args.align_weight is not None else method["align"])
    scales = [size(s) for s in args.scales]
    views = {"none": 0, "full": 1, "coarse": len(scales)}[method["guidance"]]
    if (args.align or args.align_weight) and (views + (method["mim"] > 0) < 2 or method["form"] not in ALIGN and method["align"]):
        parser.error(f"--align {args.align} --align_weight {args.align_weight}: --method {args.method} has no two [cls] to align that way")
    for (h, w), (p, q) in zip(scales, [MODELS[args.model]["patch"]] * len(scales)):
        if h % p or w % q or not (0 < h < H and 0 < w < W):
            parser.error(f"--scales {h}x{w}: expected multiples of the patch, {p}x{q}, below {H}x{W}")
    run = Run(args)
    source = open_sources(args.data, fonts=args.fonts, rotate_tall=args.rotate_tall)
    teacher = None
    if args.teacher:
        teacher = load_encoder(args.teacher).to(run.device)
        run.say(f"--teacher {args.teacher}: all {teacher.matched} tensors loaded")
    model = Pretrainer(method, args.model, scales, teacher)
    model.crops = args.batch_size
    run.prepare(model, source)
    few = [c.image for c in map(Readable(source).__getitem__, range(min(64, len(source)))) if not isinstance(c, str)][:8]

    for step in run.steps():
        for images, _, _, rows in run.micro_batches():
            views = make_views(images, method, model.scales, run.generator(0), rows)
            ids_keep, ids_mask = (ids.to(run.device) for ids in make_mask(len(images), args, model.encoder, run.generator(1), rows))
            with run.autocast():
                loss, terms, _ = run.model(normalize(images), views, ids_keep, ids_mask)
            run.backward(loss, terms)
        run.update()

        if (step + 1) % args.sample_every == 0 or step + 1 == run.total:
            with run.untimed():
                sheet = os.path.join(args.out_dir, "samples", f"step_{step + 1:06d}.png")
                if run.rank == 0 and few:
                    draw_samples(run, torch.stack(few), sheet)
    run.say(f"checkpoint {os.path.join(args.out_dir, 'last.pt')}")


if __name__ == "__main__":
    run(main)
