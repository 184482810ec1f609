"""The experiments behind the README's tables: what is done is skipped, what was cut off goes on, nothing is copied by hand.

    python tests/experiments.py list  --real DIR                     every run with its state and its one command
    python tests/experiments.py run   --real DIR                     all of them; two cores need a night and a day
    python tests/experiments.py run   --real DIR --only '.*-s0.*'    those whose names match: after `split`, several such lines
                                                                     at once, one a core (OMP_NUM_THREADS=1), share the work
    python tests/experiments.py table --real DIR --readme README.md  writes what is there between the README's marks

DIR holds train/ and test/ (LMDBs of word crops: IIIT5k, SVT, IC13, IC15, IC03). Validation is split off train/ once. Every run's folder
holds log.txt beside what the scripts write; done.json says how long it took, and is what `run` skips by: when you have changed what a
method is, name another --out.
"""
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import time

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), ".."))
sys.path.insert(0, ROOT)
from data import Parser, UserError, open_source, run

SEEDS = (0, 1, 2)
PRETRAINING = {  # name: flags of pretrain.py, {run} being its checkpoint; the first five are table 1's
    "scratch": None, "mim": "--method mim", "nsp": "--method nsp", "lmim": "--method lmim", "mnsp": "--method mnsp",
    "mim_x2": "--method mim --max_steps 8000", "mnsp_x2": "--method mnsp --max_steps 8000",   # mim_x2 takes as long as mnsp
    "mnsp_none_x2": "--method mnsp --guide none --max_steps 8000",
    "mnsp_no_mla": "--method mnsp --align none",
    "mnsp_mse": "--method mnsp --align mse --align_weight 1", "mnsp_mse_.1": "--method mnsp --align mse --align_weight 0.1",
    "mnsp_infonce_.1": "--method mnsp --align infonce --align_weight 0.1", "mnsp_infonce_1": "--method mnsp --align infonce --align_weight 1",
    "mnsp_still": "--method mnsp --guide still", "mnsp_still_8x32": "--method mnsp --guide still --scales 8x32",
    "mnsp_none": "--method mnsp --guide none", "mim_coarse": "--method mim --guide coarse",
    "mnsp_two_scales": "--method mnsp --scales 8x32 16x64", "mnsp_8x32": "--method mnsp --scales 8x32",
    "mnsp_weak": "--method mnsp --guidance_strength 0.5", "mnsp_strong": "--method mnsp --guidance_strength 1.5",
    "lmim_no_align": "--method lmim --align none", "lmim_infonce": "--method lmim --align infonce --align_weight 0.02",
    "mim_features": "--method mim --teacher {mim-s0}", "lmim_features": "--method lmim --teacher {mim-s0}",   # LMIM's own target
    "mnsp_features": "--method mnsp --teacher {mim-s0}", "mim_random_features": "--method mim --teacher {scratch-s0-before}",
    "mim_.6": "--method mim --mask_ratio 0.6", "mim_.9": "--method mim --mask_ratio 0.9", "mim_block": "--method mim --mask block",
    "mnsp_.6": "--method mnsp --mask_ratio 0.6", "mnsp_.9": "--method mnsp --mask_ratio 0.9", "mnsp_block": "--method mnsp --mask block",
}
TABLE1 = list(PRETRAINING)[:5]
SEVERAL = (*TABLE1, "mnsp_none")                                            # whose every seed is run
STEPS = 4000
SHARES = {  # steps of fine-tuning; how many of the real labels, the part of `split` that has them, and how often it counts
    "tenth": (2000, "a tenth", "tenth", 60), "tenth_long": (8000, "a tenth", "tenth", 60), "all": (8000, "all", "fit", 6)}
MODEL = "--model vit_nano"


class Job:
    """One run: name, the commands that make it (lists of words after `python`), and the jobs it needs."""

    def __init__(self, name, commands, needs=()):
        self.name, self.commands, self.needs = name, commands, needs

    def folder(self, out):
        return os.path.join(out, self.name)

    def done(self, out):
        return os.path.exists(os.path.join(self.folder(out), "done.json"))

    def line(self):
        return " && ".join("python " + shlex.join(command) for command in self.commands)


def jobs(args):
    """All runs in the order in which they are made, by name."""
    real, out, every = shlex.quote(args.real), shlex.quote(args.out), {}
    tests = sorted(map(shlex.quote, open_tests(args.real)))
    parts = os.path.join(out, "split")

    def add(name, commands, *needs):
        every[name] = Job(name, list(map(shlex.split, commands)), needs)

    def looks(folder):
        return f"evaluate.py --ckpt {folder}/last.pt --data synth:256:9 --attention {folder}/attention --json {folder}/synth.json"

    add("split", [f"tests/experiments.py split --real {real} --out {out}"])
    for seed, name in [(seed, name) for seed in SEEDS for name in SEVERAL] + [(0, name) for name in PRETRAINING if name not in SEVERAL]:
        pre, flags, init, needs = f"{name}-s{seed}", PRETRAINING[name], "", ["split"]
        if flags:
            flags, teachers = re.sub("{(.*?)}", rf"{out}/\1/last.pt", flags), re.findall("{(.*?)}", flags)
            add(pre, [f"pretrain.py {MODEL} --data synth:60000 {parts}/fit@4 --max_steps {STEPS} {flags} --seed {seed} --resume "
                      f"--out_dir {out}/{pre}"], "split", *teachers)
            init, needs = f"--init {out}/{pre}/last.pt ", [pre]
        for share, (steps, _, part, times) in SHARES.items():
            folder = f"{out}/{pre}-{share}"
            if share == "tenth" or name in TABLE1:
                add(f"{pre}-{share}", [
                    f"finetune.py {init}{MODEL} --data synth:200000 {parts}/{part}@{times} --val {parts}/val --max_steps {steps} "
                    f"--seed {seed} --resume --out_dir {folder}",
                    f"evaluate.py --ckpt {folder}/best.pt --data {' '.join(tests)} --heights 16 12 8 --rotations 15 30 --json {folder}/real.json",
                    looks(folder)], *needs)
        if name in TABLE1:                                           # a recognizer of no training, to look at the encoder alone
            folder = f"{out}/{pre}-before"
            add(f"{pre}-before", [f"finetune.py {init}{MODEL} --freeze_encoder --data synth:64 --max_steps 1 --seed {seed} --workers 0 "
                                  f"--resume --out_dir {folder}", looks(folder)], *needs)
    return every


def open_tests(real):
    folder = os.path.join(real, "test")
    try:
        return [os.path.join(folder, name) for name in os.listdir(folder) if os.path.isdir(os.path.join(folder, name))]
    except OSError as error:
        raise UserError(f"--real {real}: {error.strerror}; expected a folder with train and test in it") from None


def split(args):
    """Packs every tenth labelled crop of train/ as `val`, the others as `fit`, and every tenth of those as `tenth`; what a
    test set holds too is left out."""
    train, place = os.path.join(args.real, "train"), os.path.join(args.out, "split")
    source, also = open_source(train), os.path.join(place, "also_in_test.tsv")
    os.makedirs(place, exist_ok=True)
    subprocess.run([sys.executable, "data.py", "check", train, "--against", *open_tests(args.real), "--write_list", also], cwd=ROOT, check=True)
    with open(also, encoding="utf-8") as file:
        tested = {int(line.split("\t")[0]) for line in file}
    fit = [i for i in range(len(source)) if i % 10 and i not in tested]
    for name, kept in dict(fit=fit, tenth=fit[::10], val=[i for i in range(len(source)) if not i % 10 and i not in tested]).items():
        without, kept = os.path.join(place, name + ".tsv"), set(kept)
        with open(without, "w", encoding="utf-8") as file:
            file.writelines(f"{i}\t{source.where(i)}\n" for i in range(len(source)) if i not in kept)
        if not os.path.exists(os.path.join(place, name)):
            subprocess.run([sys.executable, "data.py", "pack", train, os.path.join(place, name), "--without", without], cwd=ROOT, check=True)


def work(job, out):
    """Runs a job's commands, which resume by themselves; leaves done.json, or says which command failed and where its log is."""
    os.makedirs(job.folder(out), exist_ok=True)
    log, start = os.path.join(job.folder(out), "log.txt"), time.time()
    print(f"{job.name}: {job.line()}", flush=True)
    for command in job.commands:
        with open(log, "a") as file:
            status = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT).returncode
        with open(log) as file:
            stopped = "stopped by a signal" in "".join(file.readlines()[-3:])
        if status or stopped:
            raise UserError(f"{job.name}: `{' '.join(command)}` {'was stopped' if stopped else f'ended with {status}'}; see {log}")
    with open(os.path.join(job.folder(out), "done.json"), "w") as file:
        json.dump(dict(seconds=time.time() - start), file)


# ---- tables

def mean_sd(values, form="{:.1f}"):
    """Mean, and how far the seeds lie apart (standard deviation), of what is there."""
    values = [v for v in values if v is not None]
    if not values:
        return "-"
    return form.format(statistics.mean(values)) + (f" ± {form.format(statistics.stdev(values))}" if len(values) > 1 else "")


def final(out, run_name, key, mean=lambda values: statistics.mean(values[-5:])):
    """Mean of `key` over the last 100 steps of a run, five logged lines, or None if it is not done."""
    if not os.path.exists(os.path.join(out, run_name, "done.json")):
        return None
    with open(os.path.join(out, run_name, "log.jsonl")) as file:
        values = [row[key] for row in map(json.loads, file) if key in row]
    return mean(values) if values else None


def result(out, run_name, *keys, file="real.json"):
    try:
        with open(os.path.join(out, run_name, file)) as opened:
            value = json.load(opened)
        for key in keys:
            value = value[key]
        return value
    except (OSError, KeyError, ValueError):
        return None


def tables(out):
    """Everything that is there, as Markdown."""
    lines = []
    of = lambda name, kind, *keys, file="real.json": [result(out, f"{name}-s{seed}-{kind}", *keys, file=file) for seed in SEEDS]
    seeds = lambda name, share: sum(found is not None for found in of(name, share))

    def table(title, head, body):
        rows = [row for row in body if set(row[1:]) - {"-", 0}]
        if rows:
            lines.extend(["", f"**{title}**", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)])
            lines.extend("| " + " | ".join(map(str, row)) + " |" for row in rows)
    for share, (steps, labels, *_) in SHARES.items():
        body = []
        for name in TABLE1:
            sets = [mean_sd(of(name, share, "sets", s, "accuracy")) for s in ("IIIT5k_3000", "SVT", "IC13_857", "IC15_2077")]
            body.append([f"`{name}`", *sets, mean_sd(of(name, share, "average")), seeds(name, share)])
        table(f"Words read (%) after {steps:,} steps of fine-tuning on 200,000 rendered words and {labels} of the real ones",
              ["from", "IIIT5k", "SVT", "IC13_857", "IC15_2077", "average", "seeds"], body)
    body = []
    for name in PRETRAINING:
        last = lambda key, form="{:.3f}", **how: mean_sd([final(out, f"{name}-s{seed}", key, **how) for seed in SEEDS], form)
        tenth = mean_sd(of(name, "tenth", "average"))
        body.append([f"`{name}`", last("mim"), last("nsp"), last("spread"), last("crops_per_s", "{:.0f}", mean=statistics.median),
                     last("peak_gb", "{:.2f}", mean=max), tenth, seeds(name, "tenth")])
    table("What each change does, and costs", ["pre-training", "mim", "nsp", "spread", "crops/s, one core", "GB", "words read (%), a tenth of the real", "seeds"], body)
    for share, (steps, labels, *_) in SHARES.items():
        body = []
        for name in TABLE1:
            kept = lambda *keys: mean_sd([100 * b / a if a and b is not None else None for a, b in
                                          zip(of(name, share, "average"), of(name, share, *keys, "average"))])
            body.append([f"`{name}`", *(kept("heights", h) for h in ("16", "12", "8")), *(kept("rotations", r) for r in ("15", "30"))])
        table(f"Robustness after {steps:,} steps with {labels} of the real words: accuracy on reduced or turned crops, "
              "in per cent of that on crops as they are", ["from", "16 px", "12 px", "8 px", "15°", "30°"], body)
    before = []
    for name in TABLE1:
        looks = lambda kind, who: [mean_sd(of(name, kind, "attention", "synth", who, what, file="synth.json"), "{:.3f}")
                                   for what in ("share", "entropy")]
        before.append([f"`{name}`", *looks("before", "cls"), *looks("before", "patches"),
                       *looks("tenth", "cls"), *looks("tenth", "patches"), *looks("tenth", "decoder")])
    area = next((x for name in TABLE1 if (x := result(out, f"{name}-s0-before", "attention", "synth", "text_area", file="synth.json"))), 0)
    table(f"Attention on 256 rendered words: share on text (blind: {area:.3f}) and entropy, before and after 2,000 steps of fine-tuning",
          ["from", "[cls] before", "entropy", "patches before", "entropy", "[cls] after", "entropy", "patches after", "entropy",
           "letters after", "entropy"], before)
    return "\n".join(lines) + "\n"


def main():
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=["list", "split", "run", "table"], help="what to do")
    parser.add_argument("--real", required=True, metavar="DIR", help="the folder of train/ and test/")
    parser.add_argument("--out", default="out/experiments", help="where the runs are")
    parser.add_argument("--only", default="", metavar="REGEX", help="only runs whose whole name matches, and what they need")
    parser.add_argument("--readme", metavar="FILE", help="write the tables into it, between <!-- tables --> and <!-- /tables -->")
    args = parser.parse_args()
    args.real, args.out = os.path.abspath(args.real), os.path.abspath(args.out)
    every = jobs(args)
    chosen = [name for name in every if re.fullmatch(args.only or ".*", name)]
    if not chosen:
        raise UserError(f"--only {args.only}: matches no run; see list")
    if args.what == "split":
        split(args)
    elif args.what == "list":
        for name in chosen:
            print(f"{'done' if every[name].done(args.out) else 'open'}  {name}: {every[name].line()}")
    elif args.what == "run":
        ahead = lambda name: [first for need in every[name].needs for first in ahead(need)] + [name]
        for name in chosen:
            for need in ahead(name):
                if not every[need].done(args.out):
                    work(every[need], args.out)
    text = tables(args.out) if args.what in ("run", "table") else ""
    print(text, end="")
    if args.readme and text:
        with open(args.readme, encoding="utf-8") as file:
            head, _, rest = file.read().partition("<!-- tables -->\n")
        _, mark, tail = rest.partition("<!-- /tables -->")
        if not mark:
            raise UserError(f"--readme {args.readme}: expected the marks <!-- tables --> and <!-- /tables --> in it")
        with open(args.readme, "w", encoding="utf-8") as file:
            file.write(f"{head}<!-- tables -->\n{text}{mark}{tail}")


if __name__ == "__main__":
    run(main)
