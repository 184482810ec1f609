"""The experiments behind the README's tables: what is done is skipped, what was cut off goes on, nothing is copied by hand.

    python tests/experiments.py list  --real DIR                     every run with its state and its one command
    python tests/experiments.py run   --real DIR                     all of them; two cores need a night and a day
    python tests/experiments.py run   --real DIR --only '.*-s0.*'    those whose names match; several processes with the same --out
                                                                     share the work: start one a core, OMP_NUM_THREADS=1
    python tests/experiments.py table --real DIR --record tests/results.jsonl --readme README.md
                                                                     writes what is there, and what results.jsonl holds of
                                                                     earlier runs, between the README's marks

DIR holds train/ and test/ (LMDBs of word crops: IIIT5k, SVT, IC13, IC15, IC03). Validation is split off train/ once. Every run's folder
holds log.txt beside what the scripts write; done.json says how long it took, and is what `run` skips by: when you have changed what a
method is, name another --out.
"""
import json
import os
import platform
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
PRETRAINING = {  # name: flags of pretrain.py, {run} being its checkpoint; the first seven are table 1's
    "scratch": None, "mim": "--method mim", "nsp": "--method nsp", "lmim": "--method lmim", "mnsp": "--method mnsp",
    "mim_.6": "--method mim --mask_ratio 0.6", "mnsp_.6": "--method mnsp --mask_ratio 0.6",
    "mim_x2": "--method mim --max_steps 8000", "mnsp_x2": "--method mnsp --max_steps 8000",   # mim_x2 takes as long as mnsp
    "mnsp_none_x2": "--method mnsp --guide none --max_steps 8000", "lmim_x2": "--method lmim --max_steps 8000",
    "nsp_x2": "--method nsp --max_steps 8000",
    "mnsp_no_mla": "--method mnsp --align none",
    "mnsp_mse": "--method mnsp --align mse --align_weight 1", "mnsp_mse_.1": "--method mnsp --align mse --align_weight 0.1",
    "mnsp_infonce_.1": "--method mnsp --align infonce --align_weight 0.1", "mnsp_infonce_1": "--method mnsp --align infonce --align_weight 1",
    "mnsp_still": "--method mnsp --guide still", "mnsp_still_8x32": "--method mnsp --guide still --scales 8x32",
    "mnsp_none": "--method mnsp --guide none", "mim_coarse": "--method mim --guide coarse",
    "mnsp_two_scales": "--method mnsp --scales 8x32 16x64", "mnsp_8x32": "--method mnsp --scales 8x32",
    "mnsp_weak": "--method mnsp --guidance_strength 0.5", "mnsp_strong": "--method mnsp --guidance_strength 1.5",
    "lmim_no_align": "--method lmim --align none", "lmim_infonce": "--method lmim --align infonce --align_weight 0.02",
    "lmim_mse_.02": "--method lmim --align_weight 0.02",
    "mim_features": "--method mim --teacher {mim-s0}", "lmim_features": "--method lmim --teacher {mim-s0}",   # LMIM's own target
    "mnsp_features": "--method mnsp --teacher {mim-s0}", "mim_random_features": "--method mim --teacher {scratch-s0-before}",
    "mim_.4": "--method mim --mask_ratio 0.4", "mim_.9": "--method mim --mask_ratio 0.9", "mim_block": "--method mim --mask block",
    "mnsp_.9": "--method mnsp --mask_ratio 0.9", "mnsp_block": "--method mnsp --mask block",
}
TABLE1 = list(PRETRAINING)[:7]
SEVERAL = (*TABLE1, "mnsp_none")                                            # whose every seed is run
EQUAL_TIME = ("mim_x2", "nsp_x2", "lmim", "lmim_no_align", "mnsp")          # a step of the last three takes about twice as long
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


def cpu():
    """Model of the processor, by which speeds can be told apart."""
    with open("/proc/cpuinfo" if os.path.exists("/proc/cpuinfo") else os.devnull) as file:
        models = re.findall("model name\\s*: (.*)", file.read())
    return models[0] if models else platform.processor()


def work(job, out):
    """Runs a job's commands, which resume by themselves, and leaves done.json -> True; False if another process is at it, or has done
    it. UserError: which command failed, and where its log is."""
    import fcntl                                                     # Windows has none
    os.makedirs(job.folder(out), exist_ok=True)
    log, start = os.path.join(job.folder(out), "log.txt"), time.time()
    with open(os.path.join(job.folder(out), "lock"), "w") as lock:   # let go of when this process and the command end, however they end
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        if job.done(out):
            return False
        print(f"{job.name}: {job.line()}", flush=True)
        for command in job.commands:
            with open(log, "a") as file:
                status = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
                                        pass_fds=[lock.fileno()]).returncode
            if status:
                raise UserError(f"{job.name}: `{' '.join(command)}` ended with {status}; see {log}")
        with open(os.path.join(job.folder(out), "done.json"), "w") as file:
            json.dump(dict(seconds=time.time() - start, cpu=cpu()), file)
    return True


# ---- records and tables

def record(out, name):
    """What the tables need of a run that is done, as one line of tests/results.jsonl."""
    def read(file, lines=False):
        path = os.path.join(out, name, file)
        with open(path if os.path.exists(path) else os.devnull, encoding="utf-8") as opened:
            return list(map(json.loads, opened)) if lines else json.loads(opened.read() or "{}")
    done, real, synth, log = read("done.json"), read("real.json"), read("synth.json"), read("log.jsonl", lines=True)
    of = lambda key: [row[key] for row in log if key in row]
    found = dict(run=name, seconds=done["seconds"], cpu=done["cpu"])
    if real:
        found |= dict(val=max(of("val_accuracy")), average=real["average"], sets={key: row["accuracy"] for key, row in real["sets"].items()})
        found |= {change: {key: row["average"] for key, row in real[change].items()} for change in ("heights", "rotations")}
    found |= synth.get("attention", {}).get("synth", {})
    if not real and not synth:                             # pre-training: its last 100 steps, five logged lines
        found |= {key: statistics.mean(of(key)[-5:]) for key in ("mim", "nsp", "spread") if of(key)}
        found |= dict(crops_per_s=statistics.median(of("crops_per_s")), peak_gb=max(of("peak_gb"))) if log else {}
    return json.loads(json.dumps(found), parse_float=lambda number: round(float(number), 4))


def read_records(path):
    """{name: record} of a file's lines."""
    found = {}
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                found[row["run"]] = row
            except (ValueError, KeyError, TypeError):
                raise UserError(f"--record {path}: line {number} is no record; expected lines that `table` wrote") from None
    return found


def records(args, every):
    """{name: record} of the lines of --record and of the runs in --out, which go before; --record is brought up to date."""
    found = read_records(args.record) if args.record and os.path.exists(args.record) else {}
    found |= {name: record(args.out, name) for name in every if every[name].done(args.out) and name != "split"}
    if args.record:
        with open(args.record + ".part", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(found[name]) + "\n" for name in sorted(found))
        os.replace(args.record + ".part", args.record)
    return found


def mean_sd(values, form="{:.1f}"):
    """Mean, and how far the seeds lie apart (standard deviation), of what is there."""
    values = [v for v in values if v is not None]
    if not values:
        return "-"
    return form.format(statistics.mean(values)) + (f" ± {form.format(statistics.stdev(values))}" if len(values) > 1 else "")


def tables(found):
    """All records, as Markdown."""
    lines = []

    def of(run, *keys):
        """The value of each seed of a run such as `mim-s{}-tenth`, or None."""
        values = [found.get(run.format(seed)) for seed in SEEDS]
        for key in keys:
            values = [None if value is None else value.get(key) for value in values]
        return values

    def table(title, head, body, folded=False):
        """Folded tables open at a click where the README is shown as a page."""
        rows = [row for row in body if set(row[1:-1]) - {"-"}]
        if rows:
            rows = ["| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows)]
            lines.extend(["", f"<details><summary>{title}</summary>" if folded else f"**{title}**", "", *rows])
            lines.extend(["", "</details>"] if folded else [])
    seeds = lambda run: sum(value is not None for value in of(run))
    for share, (steps, labels, *_) in SHARES.items():
        body = []
        for name in TABLE1:
            runs = f"{name}-s{{}}-{share}"
            sets = [mean_sd(of(runs, "sets", s)) for s in ("IIIT5k_3000", "SVT", "IC13_857", "IC15_2077")]
            averages = of(runs, "average")
            body.append([f"`{name}`", *sets, mean_sd(averages), ", ".join(mean_sd([one]) for one in averages)])
        table(f"Words read (%) after {steps:,} steps of fine-tuning on 200,000 rendered words and {labels} of the real ones",
              ["from", "IIIT5k", "SVT", "IC13_857", "IC15_2077", "average", "each seed"], body)
    body = [[f"`{name}`", f"{STEPS * (1 + name.endswith('_x2')):,}", mean_sd(of(name + "-s{}-tenth", "average")[:1])] for name in EQUAL_TIME]
    table("Words read (%) after pre-training for about the same time, then 2,000 steps of fine-tuning, a tenth of the real words (first seed)",
          ["pre-training", "its steps", "average"], [row for row in body if row[-1] != "-"])
    cpus = [row["cpu"] for row in found.values() if "crops_per_s" in row]
    body, usual = [], max(cpus, key=cpus.count, default=None)          # speeds of another CPU compare with nothing
    for name in PRETRAINING:
        last = lambda key, form="{:.3f}": mean_sd(of(name + "-s{}", key), form)
        speed = [value if on == usual else None for value, on in zip(of(name + "-s{}", "crops_per_s"), of(name + "-s{}", "cpu"))]
        body.append([f"`{name}`", last("mim"), last("nsp"), last("spread"), mean_sd(speed, "{:.0f}"), last("peak_gb", "{:.2f}"),
                     mean_sd(of(name + "-s{}-tenth", "average")), seeds(name + "-s{}-tenth")])
    table("What each change does, and costs", ["pre-training", "mim", "nsp", "spread", "crops/s, one core", "GB", "words read (%), a tenth of the real", "seeds"], body)
    for share, (steps, labels, *_) in SHARES.items():
        body = []
        for name in TABLE1:
            runs = f"{name}-s{{}}-{share}"
            kept = lambda *keys: mean_sd([100 * b / a if a and b is not None else None for a, b in zip(of(runs, "average"), of(runs, *keys))])
            body.append([f"`{name}`", *(kept("heights", h) for h in ("16", "12", "8")), *(kept("rotations", r) for r in ("15", "30"))])
        table(f"Robustness after {steps:,} steps with {labels} of the real words: accuracy on reduced or turned crops, "
              "in per cent of that on crops as they are", ["from", "16 px", "12 px", "8 px", "15°", "30°"], body, folded=True)
    area = next((row["text_area"] for row in found.values() if "text_area" in row), 0)
    for share, when, who in (("before", "before", ("cls", "patches")), ("tenth", "after 2,000 steps of", ("cls", "patches", "decoder"))):
        body = []
        for name in TABLE1:
            runs = f"{name}-s{{}}-{share}"
            looks = [mean_sd(of(runs, look, what), "{:.3f}") for look in who for what in ("share", "entropy")]
            body.append([f"`{name}`", *looks, seeds(runs)])
        table(f"Attention {when} fine-tuning, on 256 rendered words: share on text (blind: {area:.3f}) and entropy",
              ["from", "[cls]", "entropy", "patches", "entropy", "letters", "entropy"][:1 + 2 * len(who)] + ["seeds"], body, folded=True)
    return "\n".join(lines) + "\n"


def main():
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=["list", "split", "run", "table"], help="what to do")
    parser.add_argument("--real", required=True, metavar="DIR", help="the folder of train/ and test/")
    parser.add_argument("--out", default="out/experiments", help="where the runs are")
    parser.add_argument("--only", default="", metavar="REGEX", help="only runs whose whole name matches, and what they need")
    parser.add_argument("--record", metavar="FILE", help="the tables show its runs too, and it takes up those of --out")
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
        left = list(dict.fromkeys(need for name in chosen for need in ahead(name)))
        while left := [name for name in left if not every[name].done(args.out)]:
            ready = [name for name in left if all(every[need].done(args.out) for need in every[name].needs)]
            if not any(work(every[name], args.out) for name in ready):
                time.sleep(10)                                       # other processes are at all of them
    text = tables(records(args, every)) if args.what in ("run", "table") else ""
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
