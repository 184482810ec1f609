"""README.md, docs/ and the scripts beside each other: commands that exist, names that exist, flags that are
read, nothing left over; and the marks of plain code, which every script keeps."""
import ast
import contextlib
import functools
import importlib.util
import inspect
import io
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

import common
import data
import evaluate
import exercises
import experiments
import finetune
import model
import pretrain
import render

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), ".."))
SCRIPTS = ["common.py", "render.py", "data.py", "model.py", "pretrain.py", "finetune.py", "evaluate.py"]
COMMANDS = ["data.py", "pretrain.py", "finetune.py", "evaluate.py"]
PAGES = ["README.md", "docs/results.md", "docs/gpus.md", "docs/course.md"]


def text(name):
    with open(os.path.join(ROOT, name), encoding="utf-8") as file:
        return file.read()


@functools.cache
def tree(name):
    return ast.parse(text(name))


# ---- commands

def blocks(page, language):
    """The code blocks of a page that are marked as sh or python."""
    return re.findall(rf"```{language}\n(.*?)```", text(page), re.S)


def shown_lines():
    """(where, a line) of every shell block of the pages, and of the docstrings at the top of the scripts."""
    for page in PAGES:
        for block in blocks(page, "sh"):
            for line in block.splitlines():
                yield page, line
    for name in SCRIPTS:
        docstring = re.sub(r"\s*\\\n\s*", " ", ast.get_docstring(tree(name)))
        for line in docstring.splitlines():
            yield name, re.split(r"\s{3,}", line.strip())[0]        # what it is for stands to the right


def shown_commands():
    """(where, script, its arguments) of every command that runs a script of ours."""
    for where, line in shown_lines():
        for part in line.split("&&"):
            if re.match(r"\s*(python3?|torchrun) .*\w\.py", part):
                words = shlex.split(part, comments=True)
                at = [word.endswith(".py") for word in words].index(True)
                yield where, words[at], words[at + 1:]


@functools.cache
def show_help(*command):
    """What --help prints."""
    done = subprocess.run([sys.executable, *command, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_commands_shown_exist():
    """A flag that was renamed, and lives on in a page or in a docstring."""
    shown = list(shown_commands())
    assert {script for _, script, _ in shown} >= {*COMMANDS, "tests/experiments.py", "tests/survive.py"}
    assert {where for where, _, _ in shown} >= {*PAGES, *COMMANDS}
    for where, script, words in shown:
        command = (script, words[0]) if script == "data.py" else (script,)
        flags = set(re.findall(r"(?<!\w)--\w+", show_help(*command)))
        typed = {word for word in words if word.startswith("--")}
        assert typed <= flags, f"{where}: {script} has no {typed - flags}"


def test_the_commands_shown_are_accepted(monkeypatch):
    """A value that a flag does not take any more, or flags that exclude each other: the first thing that a
    reader types, and the program refuses it."""
    monkeypatch.setattr(finetune, "model_of_init", nano)        # the checkpoints that are shown are not there
    tried = 0
    for where, script, words in shown_commands():
        monkeypatch.setattr(sys, "argv", [script, *words])
        if "--help" in words or script not in ("pretrain.py", "finetune.py", "evaluate.py"):
            continue
        try:
            if script == "evaluate.py":
                parser = common.Parser()
                evaluate.add_flags(parser)
                evaluate.check_flags(parser, parser.parse_args())
            else:
                dict([("pretrain.py", pretrain), ("finetune.py", finetune)])[script].parse_args()
        except (SystemExit, common.UserError) as error:
            pytest.fail(f"{where}: {script} {' '.join(words)}: {error}")
        tried += 1
    assert tried > 30


def test_docstrings_may_be_left_out():
    """`python -OO`, under which __doc__ is None: a traceback in the place of --help."""
    for name in [*SCRIPTS, "tests/bench.py", "tests/experiments.py", "tests/gpu.py"]:
        assert not re.search(r"__doc__\.", text(name)), name
    printed = common.Parser(None, prog="evaluate.py").format_help()
    assert printed.startswith("usage: evaluate.py") and "None" not in printed


def nano():
    return "vit_nano"


def test_every_flag_that_a_page_names_exists():
    """`--guide still` in a sentence, long after the flag went."""
    torchrun = {"--nproc_per_node", "--nnodes", "--max_restarts", "--rdzv_backend", "--rdzv_endpoint"}
    flags = set(torchrun)
    for script in ["pretrain.py", "finetune.py", "evaluate.py", "tests/experiments.py", "tests/bench.py"]:
        flags.update(re.findall(r"(?<!\w)--\w+", show_help(script)))
    for name in ["show", "check", "pack"]:
        flags.update(re.findall(r"(?<!\w)--\w+", show_help("data.py", name)))
    for page in PAGES:
        prose = re.sub("```.*?```", "", text(page), flags=re.S)
        named = set(re.findall(r"(?<![\w-])--[a-z]\w+", prose))
        solved = {"--mask"} if page == "docs/course.md" else set()      # exercise 2 gives it a new value
        assert named - solved <= flags, f"{page}: {named - flags}"


# Runs a script with --help, and prints the files and folders that it looked into, then its modules.
WATCHED_HELP = """
import runpy, sys
looked = []
def hook(event, found):
    if event in ("open", "os.scandir", "os.listdir"):
        looked.append(str(found[0]))
sys.addaudithook(hook)
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit:
    pass
print("looked:", *looked, sep=chr(10))
print("modules:", *sys.modules)
"""
SLOW_MODULES = {"torch._dynamo", "torch._inductor", "torchvision", "lmdb", "matplotlib", "pytest"}


@pytest.mark.parametrize("script", COMMANDS)
def test_help_is_quick(script):
    """An import or a search for fonts that makes a reader of --help wait."""
    start = f"import sys; sys.argv = [{script!r}, '--help']; sys.path.insert(0, {ROOT!r})"
    done = subprocess.run([sys.executable, "-c", start + WATCHED_HELP], cwd=ROOT, capture_output=True, text=True)
    printed, _, rest = done.stdout.partition("looked:")
    looked, _, modules = rest.partition("modules:")
    looked = looked.replace(ROOT, "").replace(sys.prefix, "")      # they may lie in a folder "fonts"
    assert done.returncode == 0 and "usage: " + script in printed, done.stderr
    assert script in looked and "torch" in modules.split()
    assert re.findall(r".*(?:[fF]onts|assets|\.[to]tf).*", looked) == []
    assert SLOW_MODULES & set(modules.split()) == set()


def test_settings_shown_are_settings():
    """`--set` with a key or value that a row of METHODS does not take."""
    parser = common.Parser()
    for page in PAGES:
        for method, settings in re.findall(r"(?:--method (\w+) )?--set((?: \w+=[\w.]+)+)", text(page)):
            args = argparse_like(method or "mnsp", settings.split())
            pretrain.change_method(parser, args)    # leaves Python if it refuses one


def argparse_like(method, settings):
    """What change_method needs of parse_args's result."""
    return type("Args", (), dict(method=method, set=settings))


# ---- names and places

def names_in(script):
    """Every function, class, method and constant of a script, methods as Class.method."""
    found = set()
    for node in tree(script).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef):
                    found.update([inner.name, f"{node.name}.{inner.name}"])
        if isinstance(node, ast.Assign):
            found.update(target.id for target in node.targets if isinstance(target, ast.Name))
    return found


def test_the_names_shown_exist():
    """A table of places that sends a reader to a function that has another name by now."""
    phrase = re.compile(r"((?:`[\w.]+`(?:, and |, | and )?)+) in (\w+\.py)")
    count = 0
    for page in PAGES:
        for names, script in phrase.findall(text(page).replace("\n", " ")):
            for name in re.findall(r"`([\w.]+)`", names):
                assert name in names_in(script), f"{page}: `{name}` is not in {script}"
                count += 1
    assert count > 40


def test_the_links_and_files_shown_exist():
    """A page, picture or section that was moved."""
    for page in PAGES:
        folder = os.path.dirname(os.path.join(ROOT, page))
        for target in re.findall(r"\]\(([^)\s]+)\)", text(page)):
            path, _, section = target.partition("#")
            if target.startswith("https://"):
                continue
            path = os.path.join(folder, path) if path else os.path.join(ROOT, page)
            assert os.path.exists(path), f"{page}: {target}"
            assert not section or section in sections(path), f"{page}: {target}"
        for path in re.findall(r"\b(?:tests|docs|assets)/[\w./]*\w", text(page)):
            assert os.path.exists(os.path.join(ROOT, path)), f"{page}: {path}"
        for name in re.findall(r"(?<![\w./])(\w+\.py)\b", text(page)):
            there = [os.path.exists(os.path.join(ROOT, place, name)) for place in ("", "tests")]
            assert any(there) or name == "peer.py", f"{page}: {name}"


def sections(path):
    """A page's headings as GitHub names them in links."""
    with open(path, encoding="utf-8") as file:
        headings = re.findall(r"^#+ (.*)$", file.read(), re.M)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


def test_the_objective_is_shown_as_it_is():
    """Lines of code in the README that have since changed."""
    (shown,) = [block for block in blocks("README.md", "python") if "self.target" in block]
    forward = inspect.getsource(model.Pretrainer.forward)
    assert stripped(shown) in stripped(forward)
    for term in ("mim", "nsp", "align"):
        assert f'terms["{term}"]' in shown


def stripped(code):
    lines = [line.strip() for line in code.splitlines()]
    return "\n".join(line for line in lines if line)


def test_the_methods_are_shown_as_they_are():
    """A weight that was changed in METHODS alone, a fifth row that would not be one."""
    rows = dict(re.findall(r"^\| `(\w+)` \|[^|\n]*\|((?:[^|\n]*\|){3})$", text("README.md"), re.M))
    for name, method in model.METHODS.items():
        cells = [cell.split(",")[0].strip() or "0" for cell in rows[name].split("|")[:3]]
        assert [float(cell) for cell in cells] == [method["mim"], method["nsp"], method["align"]], name

    (row,) = [block for block in blocks("README.md", "python") if block.startswith("METHODS[")]
    methods = dict(model.METHODS)
    exec(row, {"METHODS": methods})
    (new,) = methods.keys() - model.METHODS.keys()
    assert set(methods[new]) >= set(methods["mim"])
    loss_of = model.Pretrainer(methods[new], "vit_nano")
    assert loss_of.method["mim"] > 0


def test_the_sizes_are_shown_as_they_are():
    """A size of MODELS that was changed, and a table that still promises the former one."""
    row = r"^\| `(vit_\w+)`.*?\| (\d+) x (\d+), ([\d.]+) M \| ([\d.]+) M \| (\d+) x (\d+) \|"
    shown = re.findall(row, text("docs/gpus.md"), re.M)
    assert [name for name, *_ in shown] == [name for name in model.MODELS if name != "vit_square"]
    for name, depth, width, millions, all_millions, patch_h, patch_w in shown:
        sizes = model.MODELS[name]
        encoder = sizes["encoder"]
        assert (encoder["depth"], encoder["width"]) == (int(depth), int(width)), name
        assert encoder["patch"] == (int(patch_h), int(patch_w)), name
        if name in ("vit_nano", "vit_mini", "vit_tiny"):        # the others take seconds to build
            reader = model.Recognizer(model.ViT(**encoder), data.CHARSETS["94"], **sizes["reader"])
            assert abs(millions_of(reader.encoder) - float(millions)) < 0.06, name
            assert abs(millions_of(reader) - float(all_millions)) < 0.06, name


def millions_of(network):
    return sum(parameter.numel() for parameter in network.parameters()) / 1e6


def test_the_python_shown_runs(tmp_path, monkeypatch):
    """A README that shows a call as it was before a rename."""
    for block in blocks("README.md", "python"):
        compile(block, "README.md", "exec")
    (shown,) = [block for block in blocks("README.md", "python") if "load_recognizer" in block]
    monkeypatch.chdir(tmp_path)
    save_untrained()
    result = {}
    exec(shown, result)
    assert result["image"].shape == (3, 32, 128)
    assert result["tokens"].shape[0] == 1


def test_the_schematic_is_what_its_script_draws(monkeypatch):
    """A schematic of former views, masks or targets; one whose words name defaults that have changed."""
    spec = importlib.util.spec_from_file_location("make_schematic", os.path.join(ROOT, "assets", "make_schematic.py"))
    schematic = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(schematic)
    monkeypatch.setattr(sys, "argv", ["pretrain.py"])
    args, method, scales = pretrain.parse_args()
    assert (args.mask_ratio, args.mask, scales) == (schematic.MASK_RATIO, "random", schematic.SCALES)
    assert method == model.METHODS["mnsp"]

    path = os.path.join(ROOT, "assets", "schematic.png")
    assert os.path.getsize(path) < 150_000
    drawn = np.asarray(schematic.draw_schematic()).astype(int)
    with Image.open(path) as picture:
        shipped = np.asarray(picture).astype(int)
    assert shipped.shape == drawn.shape
    other = (abs(drawn - shipped) > 32).any(axis=2)     # another Pillow sets letters a little differently
    assert other.mean() < 0.0002, "type python assets/make_schematic.py, and look at schematic.png"


def save_untrained():
    """Checkpoints of networks that learned nothing, where the README's quick start leaves its own."""
    sizes, charset = model.MODELS["vit_nano"], data.CHARSETS["94"]
    reader = model.Recognizer(model.ViT(**sizes["encoder"]), charset, **sizes["reader"])
    args = dict(model="vit_nano", max_length=25, spell=0.0)
    pretrainer = model.Pretrainer("mnsp", "vit_nano")
    os.makedirs("out/finetune")
    os.makedirs("out/mnsp")
    torch.save(dict(model=reader.state_dict(), charset=charset, args=args), "out/finetune/best.pt")
    torch.save(dict(model=pretrainer.state_dict()), "out/mnsp/last.pt")


# ---- the scripts: nothing left over, and plain

# Imported by other people's code, or called by torch and argparse.
PUBLIC = {"open_source", "guidance_view", "load_encoder", "load_recognizer", "read"}
CALLED_BY_OTHERS = {"forward", "backward", "error"}


READ_TOGETHER = [["common.py", "pretrain.py", "finetune.py"], ["evaluate.py"], ["data.py"]]


@pytest.mark.parametrize("scripts", READ_TOGETHER, ids=" ".join)
def test_every_flag_is_read(scripts):
    """A flag that is parsed, documented, and changes nothing: 16 of LMIM's 97."""
    source = "\n".join(text(name) for name in scripts)
    flags = set(re.findall(r'add(?:_argument)?\(\s*"(?:--)?(\w+)"', source))
    read = set(re.findall(r"args\.(\w+)", source))
    assert len(flags) > 9
    assert flags <= read, f"never read: {flags - read}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_nothing_is_left_over(script):
    """A function that nothing calls any more, a constant or an import that nothing needs."""
    used_here = {node.id for node in ast.walk(tree(script)) if isinstance(node, ast.Name)}
    imported, defined = set(), set()
    for node in ast.walk(tree(script)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            imported.update((alias.asname or alias.name).split(".")[0] for alias in node.names)
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("__"):
            defined.add(node.name)
    for node in tree(script).body:
        if isinstance(node, ast.Assign):
            defined.update(target.id for target in node.targets if isinstance(target, ast.Name))

    assert imported <= used_here, f"imported and not used: {imported - used_here}"
    left_over = defined - used_anywhere() - PUBLIC - CALLED_BY_OTHERS
    assert not left_over, f"defined and not used: {left_over}"


@functools.cache
def used_anywhere():
    """Every name that some script reads: as a name, an attribute, or in a string."""
    found = set()
    for script in SCRIPTS:
        for node in ast.walk(tree(script)):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                found.add(node.id)
            if isinstance(node, ast.Attribute):
                found.add(node.attr)
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return found


@pytest.mark.parametrize("script", SCRIPTS)
def test_lines_are_short(script):
    """Statements packed into one line, as they were when lines were counted."""
    lines = text(script).splitlines()
    long = [f"{number}: {len(line)}" for number, line in enumerate(lines, 1) if len(line) > 100]
    assert not long, f"over 100 columns, line and length: {long}"
    assert statistics.mean(len(line) for line in lines) <= 50


def test_code_is_plain():
    """Expressions that have to be decoded: assignments inside of others, functions without a name."""
    lambdas = []
    for script in SCRIPTS:
        for node in ast.walk(tree(script)):
            assert not isinstance(node, ast.NamedExpr), f"{script}:{node.lineno}: a walrus"
            if isinstance(node, ast.Lambda):
                lambdas.append(f"{script}:{node.lineno}")
    assert len(lambdas) <= 5, lambdas


# Other people's modules are imported first, then our scripts, each after those that it imports, so that only
# a script's own doing is seen.
IMPORT_EACH = """
import atexit, importlib, json, os, random, signal, sys, warnings
for number in signal.valid_signals() - {{signal.SIGKILL, signal.SIGSTOP}}:
    if signal.getsignal(number) is signal.SIG_IGN:          # handed on by the process of the tests
        signal.signal(number, signal.SIG_DFL)
for line in {others}:
    exec(line)

def state():
    handlers = [str(signal.getsignal(number)) for number in signal.valid_signals()]
    folders = [sorted(os.listdir(folder)) for folder in (".", {root!r})]
    torch = sys.modules["torch"]
    return dict(signals=handlers, files=folders, environment=dict(os.environ),
                filters=list(map(str, warnings.filters)), at_exit=atexit._ncallbacks(),
                random=hash(random.getstate()), torch_random=torch.get_rng_state().tolist(),
                threads=torch.get_num_threads(), dtype=str(torch.get_default_dtype()))

sys.path.insert(0, {root!r})
changed = {{}}
for script in {scripts}:
    before = state()
    importlib.import_module(script)
    after = state()
    changed[script] = [name for name in before if before[name] != after[name]]
print(json.dumps(changed))
"""


def test_importing_does_nothing(tmp_path):
    """A signal handler, a warning filter, a file or a variable of the environment that comes with an import:
    someone who wants one function gets them all. What the script imports of ours has its own test."""
    others, scripts = ["import torch"], []
    for script in [*SCRIPTS[:-2], "evaluate.py", "finetune.py"]:            # finetune.py imports evaluate.py
        theirs, own = split_imports(script)
        assert set(own) <= set(scripts), script
        others += theirs
        scripts.append(script.removesuffix(".py"))
    program = IMPORT_EACH.format(others=others, scripts=scripts, root=ROOT)
    # The variables of the tests' own process would hide those that the script sets: it was imported there.
    environment = dict(PYTHONDONTWRITEBYTECODE="1", OMP_NUM_THREADS="1")
    for name in ("PATH", "HOME", "LD_LIBRARY_PATH"):
        if name in os.environ:
            environment[name] = os.environ[name]
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert json.loads(done.stdout) == {script: [] for script in scripts}, "importing changes these"


def split_imports(script):
    """-> the import statements at a script's top, of other people's modules; the names of ours."""
    others, own = [], []
    for node in tree(script).body:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module]
        else:
            continue
        ours = [name for name in names if name + ".py" in SCRIPTS]
        own += ours
        if not ours:
            others.append(ast.unparse(node))
    return others, own


# ---- the experiments

RECORDS = os.path.join(ROOT, "tests", "results.jsonl")


def test_tables_hold_what_was_recorded():
    """A figure typed by hand, a row of another day, seeds of one run counted to another."""
    found = experiments.read_records(RECORDS)
    shown = text("docs/results.md").partition(experiments.START)[2].partition(experiments.END)[0]
    assert shown == experiments.all_tables(found)
    seeds = [found[f"mim-s{seed}-all"]["average"] for seed in range(3)]
    mean, deviation = statistics.mean(seeds), statistics.stdev(seeds)
    first = next(line for line in shown.splitlines() if line.startswith("| `mim`"))
    each = ", ".join(f"{seed:.1f}" for seed in seeds)
    assert first.endswith(f"| {mean:.1f} ± {deviation:.1f} | {each} |")


def test_tables_are_written_between_the_marks(tmp_path):
    """Tables that take the text around them with them, or a page without marks that is overwritten."""
    page = tmp_path / "page.md"
    page.write_text(f"before\n{experiments.START}former\n{experiments.END}\nafter\n")
    experiments.write_tables("tables\n", page)
    assert page.read_text() == f"before\n{experiments.START}tables\n{experiments.END}\nafter\n"

    page.write_text("no marks\n")
    with pytest.raises(common.UserError, match="expected the marks"):
        experiments.write_tables("tables\n", page)
    assert page.read_text() == "no marks\n"


def test_experiments_are_accepted(monkeypatch):
    """A row whose flags pretrain.py does not take, or reads as another method."""
    objective = {}
    for name, flags in experiments.PRETRAINING.items():
        if flags is not None:
            command = experiments.pretraining_job(name, 0, "out", []).commands[0]
            monkeypatch.setattr(sys, "argv", command)
            _, objective[name], _ = pretrain.parse_args()

    mnsp = model.METHODS["mnsp"]
    assert objective["lmim"] == model.METHODS["lmim"]
    assert objective["mnsp"] == objective["mnsp_.4"] == mnsp
    assert objective["mnsp_no_mla"] == dict(mnsp, align=0)
    assert objective["mnsp_no_guide"] == dict(mnsp, guide="none")


def test_fine_tunings_are_accepted(tmp_path, monkeypatch):
    """Half a day of runs that stops at a fine-tuning whose flags exclude each other."""
    (tmp_path / "test" / "SVT").mkdir(parents=True)
    sizes = []
    monkeypatch.setattr(finetune, "model_of_init", nano)        # the checkpoints are not there
    for job in experiments.all_jobs(str(tmp_path), "out", []).values():
        for command in job.commands:
            if command[0] == "finetune.py":
                monkeypatch.setattr(sys, "argv", command)
                sizes.append(finetune.parse_args().model)
    assert sizes.count("vit_mini") == 3 * len(experiments.LARGE_ROWS)
    assert sizes.count("vit_nano") > 40


def test_what_a_run_needs_comes_first(tmp_path):
    """A pupil that is trained before its teacher, or a job that is made twice."""
    (tmp_path / "test" / "SVT").mkdir(parents=True)
    jobs = experiments.all_jobs(str(tmp_path), "out", [])
    names = experiments.with_needs(jobs, ["lmim-s1-all", "mim-s0-before"])
    assert names == ["split", "mim-s0", "lmim-s1", "lmim-s1-all", "mim-s0-before"]
    for job in jobs.values():
        assert set(job.needs) <= set(jobs), job.name


def test_fonts_and_all_runs_reach_the_commands(tmp_path, monkeypatch):
    """--fonts that one of the two trainings forgets; `list` that refuses its own default."""
    (tmp_path / "test" / "SVT").mkdir(parents=True)
    monkeypatch.setattr(sys, "argv", ["experiments.py", "list", "--real", str(tmp_path), "--fonts", "faces"])
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        experiments.main()
    fonts = f"--fonts {os.path.abspath('faces')}"
    for name in ["mim-s0", "mim-s0-all", "scratch-s2-all"]:
        line = re.search(f"^open  {name}: (.*)", printed.getvalue(), re.M)[1]
        assert fonts in line, line


def test_processes_share_the_experiments(tmp_path):
    """A run that two processes make at once, in one folder."""
    made, out = str(tmp_path / "made"), str(tmp_path)
    once = f"import time; open({made!r}, 'a').write('x'); time.sleep(1)"
    job = experiments.Job("job", [["-c", once]])

    def work(_):
        return experiments.work(job, out)

    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(work, range(2))) == [False, True]
    assert (tmp_path / "made").read_text() == "x"
    assert job.done(out)
    assert not experiments.work(job, out)


def test_an_experiment_that_fails_says_where(tmp_path):
    """A night of runs that goes on after a failure, or counts it as done."""
    job = experiments.Job("job", [["-c", "raise SystemExit(3)"]])
    with pytest.raises(common.UserError, match="ended with 3; see .*log.txt"):
        experiments.work(job, str(tmp_path))
    assert not job.done(str(tmp_path))


# ---- the exercises

def has_greek_font():
    try:
        render.fonts_with("αβγδεζηθικλμνξοπρστυφχψω", render.font_files())
    except common.UserError:
        return False
    return True


@pytest.mark.parametrize("exercise", exercises.EXERCISES)
def test_exercises_are_open(exercise):
    """A check that passes on what the student was given."""
    with pytest.raises(exercises.NotYet):
        exercise()


@pytest.mark.skipif(not shutil.which("git"), reason="git applies the solutions")
@pytest.mark.parametrize("numbers", [[2, 4, 6], [3, 5], pytest.param([1], marks=pytest.mark.skipif(
    not has_greek_font(), reason="no font has Greek letters"))], ids=str)
def test_solutions_solve(tmp_path, numbers):
    """A solution that no longer applies, or does not pass the check: every change of the scripts can break
    one."""
    for name in SCRIPTS:
        shutil.copy(os.path.join(ROOT, name), tmp_path)
    for folder in ("tests", "assets"):
        shutil.copytree(os.path.join(ROOT, folder), tmp_path / folder)
    for number in numbers:
        subprocess.run(["git", "apply", f"tests/solutions/{number}.diff"], cwd=tmp_path, check=True)
    command = [sys.executable, "tests/exercises.py", *map(str, numbers)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("solved:") == len(numbers), done.stdout


def test_the_course_has_every_exercise():
    """An exercise without a text, or a text without a check."""
    listed = re.findall(r"^(\d)\. \*\*", text("docs/course.md"), re.M)
    assert listed == [str(number + 1) for number in range(len(exercises.EXERCISES))]
    for number in listed:
        assert os.path.exists(os.path.join(ROOT, "tests", "solutions", f"{number}.diff"))
