"""Kills training with SIGKILL, again and again, and asks that nothing is lost: the run that was killed and
the run that was left alone must end with the same weights, moments and logged losses, bit for bit.

    python tests/survive.py process --kills 20   one process; every second kill waits for a checkpoint
    python tests/survive.py ranks --kills 10     one of two ranks; torchrun starts both again by itself
    python tests/survive.py nodes --kills 2      torchruns on 127.0.0.1 and 127.0.0.2; the second comes back

Rendered words, vit_nano, CPU, Linux. Prints a line a kill; exits with 1 if anything differs. Writes to
--out_dir.
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
PATIENCE = 300                  # seconds without the next thing to wait for
NODE_IS_AWAY = 5                # seconds until a killed node comes back
ENVIRONMENT = dict(
    os.environ,
    OMP_NUM_THREADS="1",
    GLOO_SOCKET_IFNAME="lo",
    # without it a node that comes back never hears where the first one is (torchrun of torch 2.5 to 2.13)
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
)


# ---- what a run leaves

# of a line of log.jsonl: what arithmetic decides, and not the clock
ARITHMETIC = ("step", "loss", "mim", "nsp", "align", "spread", "lr", "bad_steps")


def log_rows(out):
    """A dict a logged step. A line that a kill cut short is left out."""
    rows = []
    with contextlib.suppress(FileNotFoundError), open(os.path.join(out, "log.jsonl")) as file:
        for line in file:
            if line.endswith("}\n"):
                row = json.loads(line)
                rows.append({name: row[name] for name in ARITHMETIC})
    return rows


def equal(a, b):
    """Bit for bit, in tensors, dicts and lists of anything."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[name], b[name]) for name in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b))
    return a == b


def differences(whole, cut):
    """Names of what is not the same in two runs' folders."""
    a = torch.load(os.path.join(whole, "last.pt"), weights_only=True)
    b = torch.load(os.path.join(cut, "last.pt"), weights_only=True)
    found = [name for name in sorted(set(a) | set(b)) if name not in a or name not in b]
    for name in sorted(set(a) & set(b)):
        if name != "args" and not equal(a[name], b[name]):      # args hold the name of the folder
            found.append(name)
    rows, rows_of_cut = log_rows(whole), log_rows(cut)
    if rows != rows_of_cut:
        found.append(f"log.jsonl, {len(rows)} and {len(rows_of_cut)} lines")
    return found


# ---- a run that can be killed

def children(pid):
    """Processes whose parent is `pid`."""
    found = []
    for path in glob.glob("/proc/[0-9]*/stat"):
        with contextlib.suppress(OSError), open(path) as file:  # it may have ended meanwhile
            after_name = file.read().rsplit(")", 1)[1].split()  # state, parent, ...
            if int(after_name[1]) == pid:
                found.append(int(path.split("/")[2]))
    return sorted(found)


class Training:
    """A run of pretrain.py in the folder `out`: alone, or under one torchrun or two, each with its flags."""

    def __init__(self, args, out, *torchruns):
        self.out = out
        self.said = os.path.join(out, "said.txt")
        self.torchruns = torchruns or [None]
        flags = "--method mnsp --model vit_nano --data synth:1000 --dtype float32 --device cpu --workers 1"
        flags += f" --log_every 1 --sample_every 1000000 --save_every {args.save_every}"
        flags += f" --batch_size {args.batch_size} --max_steps {args.steps} --resume --out_dir"
        self.command = [os.path.join(ROOT, "pretrain.py"), *flags.split(), out]
        self.left_behind = None                                 # see writing
        shutil.rmtree(out, ignore_errors=True)
        os.makedirs(out)
        self.processes = [self.start(torchrun) for torchrun in self.torchruns]

    def start(self, torchrun):
        command = [sys.executable]
        if torchrun is not None:
            command += ["-m", "torch.distributed.run", *torchrun]
        with open(self.said, "a") as file:
            return subprocess.Popen([*command, *self.command], stdout=file, stderr=file, env=ENVIRONMENT)

    def kill(self, i):
        """Kills process i and what it started."""
        below = children(self.processes[i].pid)
        self.processes[i].kill()
        for pid in below:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        self.processes[i].wait()

    def start_again(self, i):
        self.processes[i] = self.start(self.torchruns[i])

    def fail(self, why):
        for i in range(len(self.processes)):
            self.kill(i)
        with open(self.said) as file:
            sys.exit(f"{file.read()[-3000:]}\n{self.out}: {why}")

    def wait_for(self, what, condition, pause=0.02):
        """Until condition() is true. It is an error if the run ends before, or takes too long."""
        began = time.time()
        while not condition():
            waited = time.time() - began
            exits = [process.poll() for process in self.processes]
            if exits != [None] * len(exits) or waited > PATIENCE:
                self.fail(f"no {what} after {waited:.0f} s; exits {exits}")
            time.sleep(pause)

    def wait_for_end(self):
        exits = [process.wait() for process in self.processes]
        if any(exits):
            self.fail(f"failed; exits {exits}")

    def step(self):
        """The last logged step."""
        return max((row["step"] for row in log_rows(self.out)), default=0)

    def has_checkpoint(self):
        return os.path.exists(os.path.join(self.out, "last.pt"))

    def unfinished(self):
        """When the unfinished checkpoint was last written to, or None if there is none."""
        with contextlib.suppress(OSError):
            return os.stat(os.path.join(self.out, "last.pt.tmp")).st_mtime_ns
        return None

    def writing(self):
        """True if a checkpoint is being written: there is an unfinished one, and not an earlier kill's."""
        return self.unfinished() not in (None, self.left_behind)

    def resumed_at(self):
        """The steps at which it went on from a checkpoint so far."""
        with open(self.said) as file:
            return [int(line.split()[-1]) for line in file if line.startswith("resuming ")]


# ---- campaigns

def campaign(args, training, kill):
    """Calls `kill` at --kills random moments, each one of three: a little after a step that is drawn; while a
    checkpoint is written (every second kill); at any moment of a start (every fifth). -> how many fell into
    the writing of a checkpoint."""
    rng = random.Random(args.seed)
    torn = 0
    for k in range(1, args.kills + 1):
        if k % 5 == 0:
            time.sleep(rng.uniform(0, 4))
        else:
            wait_for_moment(args, training, rng, in_checkpoint=k % 2 == 0)

        times_resumed = len(training.resumed_at())
        whom = kill(rng)
        step, caught = training.step(), training.writing()
        training.left_behind = training.unfinished()
        torn += caught
        resumed = 0
        if training.has_checkpoint():
            training.wait_for("going on", lambda: len(training.resumed_at()) > times_resumed)
            resumed = training.resumed_at()[-1]
        where = "in the midst of a checkpoint" if caught else ""
        print(f"kill {k:2d}  {whom}  step {step:3d}  {where:28}  taken up at step {resumed}", flush=True)
    training.wait_for_end()
    return torn


def wait_for_moment(args, training, rng, in_checkpoint):
    steps_a_kill = args.steps // (args.kills + 1) - args.save_every
    goal = training.step() + rng.randint(1, max(1, steps_a_kill))
    training.wait_for(f"step {goal}", lambda: training.step() >= goal)
    time.sleep(rng.uniform(0, 0.1))
    if in_checkpoint:
        training.wait_for("checkpoint being written", training.writing, pause=0.0005)
        time.sleep(rng.uniform(0, 0.03))


def process(args, out):
    whole = Training(args, os.path.join(out, "whole"))
    whole.wait_for_end()
    cut = Training(args, os.path.join(out, "cut"))

    def kill(rng):
        cut.kill(0)
        cut.start_again(0)
        return "process"
    return whole, cut, campaign(args, cut, kill)


def ranks(args, out):
    def torchrun(port):
        return ["--nproc_per_node=2", f"--max_restarts={args.kills}", f"--master_port={port}"]
    whole = Training(args, os.path.join(out, "whole"), torchrun(args.port))
    whole.wait_for_end()
    cut = Training(args, os.path.join(out, "cut"), torchrun(args.port + 1))

    def both_ranks():
        return children(cut.processes[0].pid)

    def kill(rng):
        cut.wait_for("two ranks", lambda: len(both_ranks()) == 2)
        rank = rng.randrange(2)
        os.kill(both_ranks()[rank], signal.SIGKILL)
        return f"rank {rank}"
    return whole, cut, campaign(args, cut, kill)


def nodes(args, out):
    def torchruns(port):
        shared = ["--nnodes=2", "--nproc_per_node=1", f"--max_restarts={args.kills}", "--rdzv_backend=c10d",
                  f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=survive"]
        first = [*shared, "--rdzv_conf=is_host=1", "--local_addr=127.0.0.1"]
        second = [*shared, "--rdzv_conf=is_host=0", "--local_addr=127.0.0.2"]
        return first, second
    whole = Training(args, os.path.join(out, "whole"), *torchruns(args.port))
    whole.wait_for_end()
    cut = Training(args, os.path.join(out, "cut"), *torchruns(args.port + 1))

    def kill(rng):
        cut.kill(1)
        time.sleep(NODE_IS_AWAY)
        cut.start_again(1)
        return "node 1"
    return whole, cut, campaign(args, cut, kill)


CAMPAIGNS = {"process": process, "ranks": ranks, "nodes": nodes}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=CAMPAIGNS)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--save_every", type=int, default=5)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--port", type=int, default=29640)
    parser.add_argument("--out_dir", default=os.path.join("out", "survive"))
    args = parser.parse_args()

    began = time.time()
    whole, cut, torn = CAMPAIGNS[args.what](args, os.path.join(args.out_dir, args.what))
    found = differences(whole.out, cut.out)
    verdict = "weights, moments and losses are bit-identical"
    if found:
        verdict = f"DIFFERENT: {'; '.join(found)}"
    print(f"{args.what}: {args.kills} kills, {torn} of them in the midst of a checkpoint; "
          f"{args.steps} steps; {time.time() - began:.0f} s; {verdict}")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
