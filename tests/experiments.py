"""The experiments behind the tables of docs/results.md.

    python tests/experiments.py list --real DIR        every run, whether it is done, and its command
    python tests/experiments.py run --real DIR         makes all of them; two cores need half a day
    python tests/experiments.py run --real DIR --only '.*-s0.*'
                                                       makes those whose names match, and what they need
    python tests/experiments.py table --real DIR --record tests/results.jsonl --write docs/results.md
                                                       writes the tables between the file's two marks

DIR holds train/ and test/, with LMDBs of word crops: IIIT5k, SVT, IC13, IC15, IC03. Validation is split
off train/ once. --fonts FONTS draws the rendered words in a folder's fonts, as the tables' runs did. `run`
skips what is done, and what was cut off goes on. Several processes with the same --out share the work:
start one a core, with OMP_NUM_THREADS=1.

A run's folder holds what the scripts write, log.txt, and done.json, by which `run` knows that it is done.
So when you have changed what a method is, name another --out. The tables show what is in --out, and what
the file --record holds of earlier runs.
"""
import contextlib
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections import namedtuple

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), ".."))
sys.path.insert(0, ROOT)
from common import Parser, UserError, run_main
from data import Damaged, list_start, open_source


# ---- what is run

SEEDS = (0, 1, 2)
SMALL = ["--model", "vit_nano"]
LARGE = ["--model", "vit_mini", "--batch_size", "64", "--lr", "1e-3"]       # as many crops a step
# vit_mini's patches of 8 x 4 learn nothing in so few steps. So make these rows in a copy of the
# repository, after    sed -i 's/patch=(8, 4)/patch=(32, 4)/' model.py
HEIGHTS = ["16", "12", "8"]                     # in pixels, to which test crops are reduced
ROTATIONS = ["15", "30"]                        # in degrees, by which they are turned
PRETRAINING_STEPS = 2000                        # unless a row of PRETRAINING says otherwise

# A run's name, and its flags of pretrain.py. {run} stands for the checkpoint of that run.
PRETRAINING = {
    # the main rows: no pre-training, and the four methods
    "scratch": None,                            # is not pre-trained
    "mim": "--method mim",
    "nsp": "--method nsp",
    "lmim": "--method lmim --teacher {mim-s0}",
    "mnsp": "--method mnsp",

    # the steps that these make while mnsp makes 2,000
    "mim_long": "--method mim --max_steps 5500",
    "nsp_long": "--method nsp --max_steps 4300",
    "mnsp_no_guide_long": "--method mnsp --set guide=none --max_steps 2750",

    # parts of mnsp left out
    "mnsp_no_guide": "--method mnsp --set guide=none",
    "mnsp_no_mla": "--method mnsp --set align=0",

    # the share that is hidden, three fifths above
    "mim_.4": "--method mim --mask_ratio 0.4",
    "mim_.75": "--method mim --mask_ratio 0.75",
    "mnsp_.4": "--method mnsp --mask_ratio 0.4",
    "mnsp_.75": "--method mnsp --mask_ratio 0.75",

    # an encoder that has learned next to nothing, in one step, to compare frozen ones with
    "untrained": "--method mim --max_steps 1",

    # a larger network: LARGE
    "large_scratch": None,
    "large_mim": "--method mim",
    "large_mnsp": "--method mnsp",
    "large_mim_long": "--method mim --max_steps 5500",
}
MAIN_ROWS = ["scratch", "mim", "nsp", "lmim", "mnsp"]
EQUAL_TIME = ["mim_long", "nsp_long", "lmim", "mnsp_no_guide_long", "mnsp"]
LARGE_ROWS = ["large_scratch", "large_mim", "large_mnsp", "large_mim_long"]
TENTH_ROWS = [*MAIN_ROWS, "mim_long"]           # also fine-tuned with a tenth of the labels
LONG_ROWS = ["scratch", "mim_long", "mnsp"]     # also fine-tuned for long
FROZEN_ROWS = ["untrained", *MAIN_ROWS[1:], "mim_long"]     # also with a frozen encoder

# the other rows have the first seed alone
ALL_SEEDS = [*TENTH_ROWS, "untrained", "mnsp_no_guide_long", "mnsp_no_guide", "mnsp_no_mla", "mim_.4",
             *LARGE_ROWS]

# steps; how many of the real labels, in words; the part of the split that has them; how often
# each of its crops counts; flags of finetune.py
FineTuning = namedtuple("FineTuning", "steps labels part times flags")
FINE_TUNING = {
    "all": FineTuning(4000, "all", "fit", 12, []),
    "tenth": FineTuning(2000, "a tenth", "tenth", 120, []),
    "long": FineTuning(12000, "all", "fit", 12, []),
    "double": FineTuning(8000, "all", "fit", 12, []),   # takes as long as mnsp's 2,000 and 4,000
    "frozen": FineTuning(4000, "all", "fit", 12, ["--freeze_encoder"]),
}
COMPARED = ("all", "tenth")                     # the main rows are fine-tuned in these two ways


class Job:
    """A run: its name, the commands that make it (lists of words after `python`), and the names of the
    jobs it needs."""

    def __init__(self, name, commands, needs=()):
        self.name, self.commands, self.needs = name, commands, needs

    def folder(self, out):
        return os.path.join(out, self.name)

    def done(self, out):
        return os.path.exists(os.path.join(self.folder(out), "done.json"))

    def line(self):
        return " && ".join("python " + shlex.join(command) for command in self.commands)


def all_jobs(real, out, fonts):
    """{name: Job}, in the order in which they are made: first what tells most."""
    rows = [(name, 0) for name in PRETRAINING]
    rows += [(name, seed) for seed in SEEDS[1:] for name in ALL_SEEDS]
    tests = sorted(open_tests(real))

    jobs = [split_job(real, out)]
    for name, seed in rows:
        if PRETRAINING[name] is not None:
            jobs.append(pretraining_job(name, seed, out, fonts))
        if name != "untrained":
            jobs.append(fine_tuning_job(name, seed, "all", tests, out, fonts))
    for seed in SEEDS:
        for name in TENTH_ROWS:
            if PRETRAINING[name] is not None:
                jobs.append(untrained_reader_job(name, seed, out))
            jobs.append(fine_tuning_job(name, seed, "tenth", tests, out, fonts))
    for seed in SEEDS:
        for name in LONG_ROWS:
            jobs.append(fine_tuning_job(name, seed, "long", tests, out, fonts))
        jobs.append(fine_tuning_job("scratch", seed, "double", tests, out, fonts))
        for name in FROZEN_ROWS:
            jobs.append(fine_tuning_job(name, seed, "frozen", tests, out, fonts))
    return {job.name: job for job in jobs}


def size_flags(name):
    """The network of a row of PRETRAINING, in pre-training and in fine-tuning."""
    if name in LARGE_ROWS:
        return LARGE
    return SMALL


def network(name):
    """Its name in a table's title."""
    if name in LARGE_ROWS:
        return "vit_mini with patches of 32 x 4"
    return "vit_nano"


def split_job(real, out):
    return Job("split", [["tests/experiments.py", "split", "--real", real, "--out", out]])


def pretraining_job(name, seed, out, fonts):
    """Pre-trains by a row of PRETRAINING."""
    run = f"{name}-s{seed}"
    flags, needs = [], ["split"]
    for word in PRETRAINING[name].split():
        if word.startswith("{"):
            teacher = word.strip("{}")
            needs.append(teacher)
            word = f"{out}/{teacher}/last.pt"
        flags.append(word)
    command = ["pretrain.py", *size_flags(name), *fonts, "--data", "synth:60000", f"{out}/split/fit@4",
               "--max_steps", str(PRETRAINING_STEPS), *flags,
               "--seed", str(seed), "--resume", "--out_dir", f"{out}/{run}"]
    return Job(run, [command], needs)


def fine_tuning_job(name, seed, length, tests, out, fonts):
    """Fine-tunes, reads the test sets once, and draws where the recognizer looks."""
    run = f"{name}-s{seed}-{length}"
    kind, folder = FINE_TUNING[length], f"{out}/{run}"
    init, needs = pretrained(name, seed, out)
    train = ["finetune.py", *init, *size_flags(name), *fonts, *kind.flags,
             "--data", "synth:200000", f"{out}/split/{kind.part}@{kind.times}", "--val", f"{out}/split/val",
             "--max_steps", str(kind.steps), "--seed", str(seed), "--resume", "--out_dir", folder]
    read = ["evaluate.py", "--ckpt", f"{folder}/best.pt", "--data", *tests,
            "--heights", *HEIGHTS, "--rotations", *ROTATIONS, "--json", f"{folder}/real.json"]
    return Job(run, [train, read, attention_command(folder)], needs)


def untrained_reader_job(name, seed, out):
    """A recognizer that learned nothing, for a look at where the pre-trained encoder looks."""
    run = f"{name}-s{seed}-before"
    folder = f"{out}/{run}"
    init, needs = pretrained(name, seed, out)
    train = ["finetune.py", *init, *size_flags(name), "--freeze_encoder", "--data", "synth:64",
             "--max_steps", "1", "--seed", str(seed), "--workers", "0", "--resume", "--out_dir", folder]
    return Job(run, [train, attention_command(folder)], needs)


def pretrained(name, seed, out):
    """-> finetune.py's flags that start from a run's encoder; the jobs that make it."""
    if PRETRAINING[name] is None:
        return [], ["split"]
    run = f"{name}-s{seed}"
    return ["--init", f"{out}/{run}/last.pt"], [run]


def attention_command(folder):
    return ["evaluate.py", "--ckpt", f"{folder}/last.pt", "--data", "synth:256:9",
            "--attention", f"{folder}/attention", "--json", f"{folder}/synth.json"]


def open_tests(real):
    """The folders of the test sets."""
    folder = os.path.join(real, "test")
    try:
        paths = [os.path.join(folder, name) for name in os.listdir(folder)]
    except OSError as error:
        expected = "expected a folder with train and test in it"
        raise UserError(f"--real {real}: {error.strerror}; {expected}") from None
    return [path for path in paths if os.path.isdir(path)]


# ---- splitting the training crops

def split(real, out):
    """Packs every tenth labelled crop of train/ as `val`, the others as `fit`, and every tenth of those
    as `tenth`. What a test set holds too is left out."""
    train, folder = os.path.join(real, "train"), os.path.join(out, "split")
    os.makedirs(folder, exist_ok=True)
    in_tests = crops_in_tests(train, open_tests(real), os.path.join(folder, "also_in_test.tsv"))

    source = open_source(train)
    fit, val = [], []
    for i in range(len(source)):
        if i in in_tests:
            continue
        if i % 10 == 0:
            val.append(i)
        else:
            fit.append(i)
    for name, kept in [("fit", fit), ("tenth", fit[::10]), ("val", val)]:
        pack(source, set(kept), train, os.path.join(folder, name))


def crops_in_tests(train, tests, list_path):
    """Numbers of the training crops that a test set holds too."""
    run_script("data.py", "check", train, "--against", *tests, "--write_list", list_path)
    with open(list_path, encoding="utf-8") as file:
        return {int(line.split("\t")[0]) for line in file}


def pack(source, kept, train, path):
    """Packs the crops `kept` of train/ into an LMDB, if it is not there yet."""
    without = path + ".tsv"
    with open(without, "w", encoding="utf-8") as file:
        for i in range(len(source)):
            if i not in kept:
                # what cannot be read is no entry of a list: data.py leaves it out by itself
                with contextlib.suppress(Damaged):
                    file.write(f"{list_start(source, i)}\n")
    if not os.path.exists(path):
        run_script("data.py", "pack", train, path, "--without", without)


def run_script(*command):
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)


# ---- running

def run_all(jobs, chosen, out):
    """Makes the chosen jobs and what they need, in turns with other processes on the same --out."""
    left = with_needs(jobs, chosen)
    while True:
        left = [name for name in left if not jobs[name].done(out)]
        if not left:
            return
        if not work_on_one(jobs, left, out):
            time.sleep(10)                      # other processes are at all that can be done now


def work_on_one(jobs, names, out):
    """Makes the first job that is ready and that no other process makes -> False if there is none."""
    for name in names:
        ready = all(jobs[need].done(out) for need in jobs[name].needs)
        if ready and work(jobs[name], out):
            return True
    return False


def with_needs(jobs, names):
    """The names, each after those that it needs, each once."""
    ordered = []
    for name in names:
        for needed in [*with_needs(jobs, jobs[name].needs), name]:
            if needed not in ordered:
                ordered.append(needed)
    return ordered


def work(job, out):
    """Runs a job's commands, which resume by themselves, and leaves done.json -> True. False if another
    process is at it, or has done it. UserError: which command failed, and where its log is."""
    import fcntl                                # Windows has none
    folder = job.folder(out)
    os.makedirs(folder, exist_ok=True)
    began = time.time()

    # The lock is let go of when this process and the command have ended, however they end.
    with open(os.path.join(folder, "lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        if job.done(out):
            return False
        print(f"{job.name}: {job.line()}", flush=True)
        for command in job.commands:
            run_logged(job, command, os.path.join(folder, "log.txt"), lock)
        with open(os.path.join(folder, "done.json"), "w") as file:
            json.dump(dict(seconds=time.time() - began, cpu=cpu_model()), file)
    return True


def run_logged(job, command, log, lock):
    with open(log, "a") as file:
        done = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
                              pass_fds=[lock.fileno()])
    if done.returncode:
        raise UserError(f"{job.name}: `{' '.join(command)}` ended with {done.returncode}; see {log}")


def cpu_model():
    """The processor's name: another one rounds otherwise, so that a run comes out a little different."""
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            found = re.search("model name\\s*: (.*)", file.read())
        if found:
            return found[1]
    return platform.processor()


# ---- records: a line of tests/results.jsonl for each run

LAST_LINES = 5                                  # logged lines over which a loss is averaged: 100 steps


def record(out, name):
    """What the tables need of a run that is done."""
    folder = os.path.join(out, name)
    done = read_json(os.path.join(folder, "done.json"))
    real = read_json(os.path.join(folder, "real.json"))
    synth = read_json(os.path.join(folder, "synth.json"))
    log = read_lines(os.path.join(folder, "log.jsonl"))

    found = dict(run=name, seconds=done["seconds"], cpu=done["cpu"])
    if real:
        found.update(record_readings(real, log))
    if synth:
        found.update(synth.get("attention", {}).get("synth", {}))
    if log and not real and not synth:
        found.update(record_pretraining(log))
    return round_numbers(found)


def record_readings(real, log):
    """Of a fine-tuning: the best validation, and the test sets, as they are and reduced or turned."""
    found = dict(val=max(column(log, "val_accuracy")), average=real["average"])
    found["sets"] = {name: one["accuracy"] for name, one in real["sets"].items()}
    for change in ("heights", "rotations"):
        found[change] = {value: one["average"] for value, one in real[change].items()}
    return found


def record_pretraining(log):
    """Of a pre-training: its last losses."""
    found = {}
    for key in ("mim", "nsp", "spread"):
        values = column(log, key)
        if values:
            found[key] = statistics.mean(values[-LAST_LINES:])
    return found


def column(log, key):
    return [row[key] for row in log if key in row]


def round_numbers(found):
    """To four decimals, at every depth."""
    return json.loads(json.dumps(found), parse_float=round_text)


def round_text(number):
    return round(float(number), 4)


def read_json(path):
    """A file's dict, or an empty one if there is no file."""
    if not os.path.exists(path):
        return {}
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def read_lines(path):
    """A dict for each line of a file, or none if there is no file."""
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def read_records(path):
    """{run: record} of a file's lines."""
    found = {}
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                found[row["run"]] = row
            except (ValueError, KeyError, TypeError):
                expected = "expected lines that `table` wrote"
                raise UserError(f"--record {path}: line {number} is no record; {expected}") from None
    return found


def write_records(found, path):
    with open(path + ".part", "w", encoding="utf-8") as file:
        for name in sorted(found):
            file.write(json.dumps(found[name]) + "\n")
    os.replace(path + ".part", path)


def collect_records(jobs, out, path):
    """{run: record} of the runs in --out and of the lines of --record, which is brought up to date. A run
    in --out goes before its line."""
    found = {}
    if path and os.path.exists(path):
        found = read_records(path)
    for name, job in jobs.items():
        if job.done(out) and name != "split":
            found[name] = record(out, name)
    if path:
        write_records(found, path)
    return found


# ---- tables

TEST_SETS = ["IIIT5k_3000", "SVT", "IC13_857", "IC15_2077"]
NOTHING = "-"                                   # of a run that has not been made


def all_tables(found):
    """All records, as Markdown."""
    tables = [words_read_table(found, MAIN_ROWS, length) for length in COMPARED]
    tables.append(words_read_table(found, ["scratch"], "double"))
    tables.append(words_read_table(found, LONG_ROWS, "long"))
    tables.append(words_read_table(found, FROZEN_ROWS, "frozen"))
    tables.append(equal_time_table(found))
    tables.append(changes_table(found))
    tables.append(words_read_table(found, LARGE_ROWS, "all"))
    tables.append(robustness_table(found))
    tables.append(attention_table(found, "before", "before", ["cls", "patches"]))
    tables.append(attention_table(found, "all", "after", ["cls", "patches", "decoder"]))
    return "\n".join(table for table in tables if table) + "\n"


def markdown(title, head, rows):
    """A table without the rows that hold nothing."""
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in rows:
        if set(row[1:]) - {NOTHING, "0"}:
            lines.append("| " + " | ".join(row) + " |")
    if len(lines) == 2:
        return ""
    return "\n".join(["", f"**{title}**", "", *lines])


def each_seed(found, run, *keys):
    """The value of each seed of a run, such as "mim-s{}-tenth", or None where there is none."""
    values = []
    for seed in SEEDS:
        value = found.get(run.format(seed))
        for key in keys:
            if value is not None:
                value = value.get(key)
        values.append(value)
    return values


def mean_sd(values, form="{:.1f}"):
    """Mean of the seeds that are there, and their standard deviation: how far they lie apart."""
    values = [value for value in values if value is not None]
    if not values:
        return NOTHING
    text = form.format(statistics.mean(values))
    if len(values) > 1:
        text += " ± " + form.format(statistics.stdev(values))
    return text


def list_seeds(found, run):
    """The average of each seed, such as "61.2, 60.8, -"."""
    averages = each_seed(found, run, "average")
    if averages.count(None) == len(averages):
        return NOTHING
    return ", ".join(mean_sd([average]) for average in averages)


def count_seeds(found, run):
    values = each_seed(found, run)
    return str(len(values) - values.count(None))


def words_read_table(found, names, length):
    kind = FINE_TUNING[length]
    rows = []
    for name in names:
        run = f"{name}-s{{}}-{length}"
        row = [f"`{name}`", mean_sd(each_seed(found, run, "val"))]
        for test_set in TEST_SETS:
            row.append(mean_sd(each_seed(found, run, "sets", test_set)))
        row.append(mean_sd(each_seed(found, run, "average")))
        row.append(list_seeds(found, run))
        rows.append(row)
    title = (f"Words read (%) after {kind.steps:,} steps of fine-tuning on rendered words "
             f"and {kind.labels} of the real ones, {network(names[0])}")
    if kind.flags:
        title += f", {' '.join(kind.flags)}"
    head = ["from", "validation", "IIIT5k", "SVT", "IC13_857", "IC15_2077", "average", "each seed"]
    return markdown(title, head, rows)


def equal_time_table(found):
    rows = []
    for name in EQUAL_TIME:
        row = [f"`{name}`", f"{steps_of(name):,}"]
        for length in COMPARED:
            run = f"{name}-s{{}}-{length}"
            row.append(mean_sd(each_seed(found, run, "average")))
            row.append(list_seeds(found, run))
        if count_seeds(found, f"{name}-s{{}}-all") != "0":
            rows.append(row)
    title = "Words read (%) after pre-training for the same time, and the same fine-tuning: averages"
    head = ["pre-training", "its steps"]
    for length in COMPARED:
        head += [f"{FINE_TUNING[length].labels} of the real words", "each seed"]
    return markdown(title, head, rows)


def steps_of(name):
    """How many steps a row of PRETRAINING makes."""
    found = re.search("--max_steps ([0-9]+)", PRETRAINING[name])
    if found:
        return int(found[1])
    return PRETRAINING_STEPS


def changes_table(found):
    rows = []
    for name in PRETRAINING:
        run, fine = name + "-s{}", name + "-s{}-all"
        if name in LARGE_ROWS or count_seeds(found, fine) == "0":
            continue
        row = [f"`{name}`", f"`{PRETRAINING[name] or 'no pre-training'}`"]
        for key in ("mim", "nsp", "spread"):
            row.append(mean_sd(each_seed(found, run, key), "{:.3f}"))
        for key in ("val", "average"):
            row.append(mean_sd(each_seed(found, fine, key)))
        row.append(list_seeds(found, fine))
        rows.append(row)
    title = "What each change does: losses of pre-training, words read (%) with all real words"
    head = ["pre-training", "flags", "mim", "nsp", "spread", "validation", "average", "each seed"]
    return markdown(title, head, rows)


def robustness_table(found):
    rows = []
    for name in MAIN_ROWS:
        run = f"{name}-s{{}}-all"
        row = [f"`{name}`"]
        row += [kept(found, run, "heights", height) for height in HEIGHTS]
        row += [kept(found, run, "rotations", angle) for angle in ROTATIONS]
        rows.append(row)
    title = "Accuracy on reduced or turned crops, in per cent of that on crops as they are; all real words"
    return markdown(title, ["from", "16 px", "12 px", "8 px", "15°", "30°"], rows)


def kept(found, run, change, value):
    """Accuracy on changed crops, in per cent of that on crops as they are."""
    shares = []
    for plain, changed in zip(each_seed(found, run, "average"), each_seed(found, run, change, value)):
        if plain and changed is not None:
            shares.append(100 * changed / plain)
    return mean_sd(shares)


def attention_table(found, length, when, who_looks):
    rows = []
    for name in MAIN_ROWS:
        run = f"{name}-s{{}}-{length}"
        row = [f"`{name}`"]
        for who in who_looks:
            for what in ("share", "entropy"):
                row.append(mean_sd(each_seed(found, run, who, what), "{:.3f}"))
        row.append(count_seeds(found, run))
        rows.append(row)
    head = ["from", "[cls]", "entropy", "patches", "entropy"]
    if "decoder" in who_looks:
        head += ["letters", "entropy"]
    title = (f"Attention {when} fine-tuning, on 256 rendered words: share on text "
             f"(of blind attention: {text_area(found):.3f}) and entropy")
    return markdown(title, [*head, "seeds"], rows)


def text_area(found):
    """The text's share of the area of the 256 words, the same in every run."""
    for row in found.values():
        if "text_area" in row:
            return row["text_area"]
    return 0.0


# ---- the command

START, END = "<!-- tables -->\n", "<!-- /tables -->"


def write_tables(text, path):
    """Puts the tables between the marks of a file."""
    with open(path, encoding="utf-8") as file:
        page = file.read()
    if START not in page or END not in page.partition(START)[2]:
        raise UserError(f"--write {path}: expected the marks {START.strip()} and {END} in it")
    head, _, rest = page.partition(START)
    tail = rest.partition(END)[2]
    with open(path, "w", encoding="utf-8") as file:
        file.write(head + START + text + END + tail)


def parse_args():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("what", choices=["list", "split", "run", "table"], help="what to do")
    add("--real", required=True, metavar="DIR", help="the folder of train/ and test/")
    add("--fonts", metavar="DIR", help="draw rendered words in the fonts of this folder alone")
    add("--out", default="out/experiments", help="where the runs are")
    add("--only", metavar="REGEX", help="only runs whose whole name matches, and what they need")
    add("--record", metavar="FILE", help="the tables show its runs too, and it takes up those of --out")
    add("--write", metavar="FILE", help="write the tables into it, between its marks, see docs/results.md")
    return parser.parse_args()


def main():
    args = parse_args()
    real, out = os.path.abspath(args.real), os.path.abspath(args.out)
    fonts = []
    if args.fonts:
        fonts = ["--fonts", os.path.abspath(args.fonts)]
    jobs = all_jobs(real, out, fonts)
    chosen = [name for name in jobs if re.fullmatch(args.only or ".*", name)]
    if not chosen:
        raise UserError(f"--only {args.only}: matches no run; see list")

    if args.what == "split":
        split(real, out)
        return
    if args.what == "list":
        for name in chosen:
            state = "done" if jobs[name].done(out) else "open"
            print(f"{state}  {name}: {jobs[name].line()}")
        return
    if args.what == "run":
        run_all(jobs, chosen, out)
    text = all_tables(collect_records(jobs, out, args.record))
    print(text, end="")
    if args.write:
        write_tables(text, args.write)


if __name__ == "__main__":
    run_main(main)
