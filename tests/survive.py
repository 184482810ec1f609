"""Kills training with SIGKILL, again and again, and asks that nothing is lost: the run that was killed and the run that
was left alone must end with the same weights, moments and logged losses, bit for bit.

    python tests/survive.py process --kills 20   one process; every second kill waits for a checkpoint being written
    python tests/survive.py ranks --kills 10     one of two ranks; torchrun starts both again by itself
    python tests/survive.py nodes --kills 2      torchruns on 127.0.0.1 and 127.0.0.2; the second dies and comes back

Rendered words, vit_nano, CPU, Linux. Prints a line a kill; exits with 1 if anything differs. Writes to --out_dir.
"""
import argparse
import contextlib
import glob
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import torch

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), ".."))
# without the last, a node that comes back never hears where the first one is (torchrun of torch 2.5 to 2.13)
ENVIRONMENT = dict(os.environ, OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
PATIENCE = 300                                                              # seconds without the next thing to wait for


def children(pid):
    """Processes whose parent is `pid`."""
    found = []
    for path in glob.glob("/proc/[0-9]*/stat"):
        with contextlib.suppress(OSError), open(path) as f:                 # it may have ended meanwhile
            if int(f.read().rsplit(")", 1)[1].split()[1]) == pid:
                found.append(int(path.split("/")[2]))
    return sorted(found)


def rows(out):
    """What log.jsonl says of the arithmetic, a dict a step; the line that a kill cut short is left out."""
    try:
        with open(os.path.join(out, "log.jsonl")) as f:
            found = [json.loads(line) for line in f if line.endswith("}\n")]
    except OSError:
        return []
    names = ("step", "loss", "mim", "nsp", "align", "spread", "lr", "bad_steps")
    return [{k: row[k] for k in names} for row in found]


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    return len(a) == len(b) and all(map(equal, a, b)) if isinstance(a, (list, tuple)) else a == b


def differences(whole, cut):
    """Names of what is not the same, bit for bit, in two runs' folders."""
    a, b = (torch.load(os.path.join(out, "last.pt"), weights_only=True) for out in (whole, cut))
    found = [k for k in a if k != "args" and not equal(a[k], b[k])]
    return found + [f"log.jsonl, {len(rows(whole))} and {len(rows(cut))} lines"] * (rows(whole) != rows(cut))


class Training:
    """A run of pretrain.py in `out`, under one torchrun or two if their flags are given."""

    def __init__(self, args, out, *torchruns):
        self.out, self.said, self.torchruns = out, os.path.join(out, "said.txt"), torchruns or [None]
        flags = ("--method mnsp --model vit_nano --data synth:1000 --dtype float32 --device cpu --workers 1 "
                 f"--log_every 1 --sample_every 1000000 --batch_size {args.batch_size} --max_steps {args.steps} "
                 f"--save_every {args.save_every} --resume --out_dir")
        self.command = [os.path.join(ROOT, "pretrain.py"), *flags.split(), out]
        shutil.rmtree(out, ignore_errors=True)
        os.makedirs(out)
        self.started, self.left = [self.start(flags) for flags in self.torchruns], None

    def start(self, flags):
        before = ["-m", "torch.distributed.run", *flags] if flags else []
        with open(self.said, "a") as f:
            return subprocess.Popen([sys.executable, *before, *self.command], stdout=f, stderr=f, env=ENVIRONMENT)

    def kill(self, i):
        """Kills started process i and what it started."""
        below = children(self.started[i].pid)
        self.started[i].kill()
        for pid in below:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        self.started[i].wait()

    def again(self, i):
        self.started[i] = self.start(self.torchruns[i])

    def fail(self, why):
        for i in range(len(self.started)):
            self.kill(i)
        with open(self.said) as f:
            sys.exit(f"{f.read()[-3000:]}\n{self.out}: {why}")

    def until(self, what, condition, pause=0.02):
        """Waits for a condition; it is an error that the run ends before."""
        began = time.time()
        while not condition():
            if any(p.poll() is not None for p in self.started) or time.time() - began > PATIENCE:
                self.fail(f"no {what} after {time.time() - began:.0f} s; exits {[p.poll() for p in self.started]}")
            time.sleep(pause)

    def end(self):
        if any([p.wait() for p in self.started]):
            self.fail("failed")

    def step(self):
        return max((r["step"] for r in rows(self.out)), default=0)

    def stamp(self):
        """When the unfinished checkpoint was last written to, or None."""
        with contextlib.suppress(OSError):
            return os.stat(os.path.join(self.out, "last.pt.tmp")).st_mtime_ns

    def writing(self):
        """A checkpoint is being written, and is not what an earlier kill left."""
        return self.stamp() not in (None, self.left)

    def taken_up(self):
        """The steps at which it went on from a checkpoint so far."""
        with open(self.said) as f:
            return [int(line.split()[-1]) for line in f if line.startswith("resuming ")]


def campaign(args, training, kill):
    """Calls `kill` at --kills random moments: a little after a step that is drawn; while a checkpoint is written (every
    second); at any moment of a start (every fifth). Says what each of them met."""
    rng, torn = random.Random(args.seed), 0
    for k in range(1, args.kills + 1):
        goal = training.step() + rng.randint(1, max(1, args.steps // (args.kills + 1) - args.save_every))
        if k % 5 == 0:
            time.sleep(rng.uniform(0, 4))
        else:
            training.until(f"step {goal}", lambda: training.step() >= goal)
            time.sleep(rng.uniform(0, 0.1))
            if k % 2 == 0:
                training.until("checkpoint being written", training.writing, 0.0005)
                time.sleep(rng.uniform(0, 0.03))
        times = len(training.taken_up())
        whom = kill(rng)
        reached, caught = training.step(), training.writing()
        training.left = training.stamp()
        torn += caught
        if glob.glob(os.path.join(training.out, "*.pt")):
            training.until("going on", lambda: len(training.taken_up()) > times)
        print(f"kill {k:2d}  {whom}  step {reached:3d}  {'in the midst of a checkpoint' if caught else 28 * ' '}  "
              f"taken up at step {training.taken_up()[-1] if len(training.taken_up()) > times else 0}", flush=True)
    training.end()
    return f"{args.kills} kills, {torn} of them in the midst of a checkpoint"


def process(args, out):
    whole = Training(args, os.path.join(out, "whole"))
    whole.end()
    cut = Training(args, os.path.join(out, "cut"))

    def kill(rng):
        cut.kill(0)
        cut.again(0)
        return "process"
    return whole, cut, campaign(args, cut, kill)


def ranks(args, out):
    torchrun = ["--nproc_per_node=2", f"--max_restarts={args.kills}", "--master_port"]
    whole = Training(args, os.path.join(out, "whole"), [*torchrun, str(args.port)])
    whole.end()
    cut = Training(args, os.path.join(out, "cut"), [*torchrun, str(args.port + 1)])

    def kill(rng):
        cut.until("two ranks", lambda: len(children(cut.started[0].pid)) == 2)
        rank = rng.randrange(2)
        os.kill(children(cut.started[0].pid)[rank], signal.SIGKILL)
        return f"rank {rank}"
    return whole, cut, campaign(args, cut, kill)


def nodes(args, out):
    def torchruns(port):
        return [["--nnodes=2", "--nproc_per_node=1", f"--max_restarts={args.kills}", "--rdzv_backend=c10d",
                 f"--rdzv_endpoint=127.0.0.1:{port}", f"--rdzv_conf=is_host={1 - node}", "--rdzv_id=survive",
                 f"--local_addr=127.0.0.{node + 1}"] for node in range(2)]
    whole = Training(args, os.path.join(out, "whole"), *torchruns(args.port))
    whole.end()
    cut = Training(args, os.path.join(out, "cut"), *torchruns(args.port + 1))

    def kill(rng):
        cut.kill(1)
        time.sleep(5)                                                       # it is away for a while
        cut.again(1)
        return "node 1"
    return whole, cut, campaign(args, cut, kill)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["process", "ranks", "nodes"])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--save_every", type=int, default=5)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--port", type=int, default=29640)
    parser.add_argument("--out_dir", default=os.path.join("out", "survive"))
    args = parser.parse_args()
    began = time.time()
    run = dict(process=process, ranks=ranks, nodes=nodes)[args.what]
    whole, cut, said = run(args, os.path.join(args.out_dir, args.what))
    differ = differences(whole.out, cut.out)
    said = f"{args.what}: {said}; {args.steps} steps; {time.time() - began:.0f} s"
    print(f"{said}; {'DIFFERENT: ' + '; '.join(differ) if differ else 'weights, moments and losses are bit-identical'}")
    sys.exit(bool(differ))


if __name__ == "__main__":
    main()
