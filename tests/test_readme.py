"""README.md and the five scripts as one text: commands that exist, flags that are read, nothing that is left over."""
import ast
import os
import re
import runpy
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

import data
import exercises
import experiments
from data import UserError

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), ".."))
SCRIPTS = ["model.py", "data.py", "pretrain.py", "finetune.py", "evaluate.py"]
PUBLIC = {"open_source", "guidance_view", "load_encoder", "load_recognizer", "read"}       # for other people's code


def text(name):
    with open(os.path.join(ROOT, name), encoding="utf-8") as file:
        return file.read()


def commands():
    """(script, its words) of every command in README's code blocks and in the docstrings at the top of the scripts."""
    blocks = re.findall(r"```sh\n(.*?)```", text("README.md"), re.S) + [ast.get_docstring(ast.parse(text(name))) for name in SCRIPTS]
    lines = re.sub(r"\s*\\\n\s*", " ", "\n".join(blocks)).splitlines()
    parts = [part.strip() for line in lines for part in re.split(r"&&|\s{3,}", line)]
    for words in map(str.split, filter(re.compile(r"(python3?|torchrun) .*\w\.py").match, parts)):
        at = next(k for k, word in enumerate(words) if word.endswith(".py"))
        yield words[at], words[at + 1:]


def test_the_commands_shown_exist(monkeypatch, capsys):
    """A flag that was renamed, and lives on in the README or in a docstring."""
    helps, shown = {}, list(commands())
    assert len(shown) > 20 and {script for script, _ in shown} >= {"data.py", "pretrain.py", "finetune.py", "evaluate.py"}
    for script, words in shown:
        command = (script, *words[:1]) if script == "data.py" else (script,)
        if command not in helps:
            monkeypatch.setattr(sys, "argv", [*command, "--help"])
            with pytest.raises(SystemExit) as left:
                runpy.run_path(os.path.join(ROOT, script), run_name="__main__")
            assert left.value.code == 0, command
            helps[command] = set(re.findall(r"(?<!\w)--\w+", capsys.readouterr().out))
        unknown = {word for word in words if word.startswith("--")} - helps[command]
        assert not unknown, f"{script}: {unknown}"


@pytest.mark.parametrize("scripts", [["pretrain.py", "finetune.py"], ["evaluate.py"], ["data.py"]], ids=" ".join)
def test_every_flag_is_read(scripts):
    """A flag that is parsed, documented, and changes nothing: 16 of LMIM's 97."""
    source = "\n".join(map(text, scripts))
    flags = re.findall(r'add(?:_argument)?\(\s*"(?:--)?(\w+)"', source)
    assert len(flags) > 9
    read = set(re.findall(r"args\.(\w+)", source))
    assert not set(flags) - read, set(flags) - read


@pytest.mark.parametrize("script", SCRIPTS)
def test_nothing_is_left_over(script):
    """A function that nothing calls any more, an import that nothing needs."""
    tree = ast.parse(text(script))
    everywhere = "\n".join(map(text, SCRIPTS))
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    imported = {(alias.asname or alias.name).split(".")[0] for node in ast.walk(tree)
                if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names}
    assert not imported - names, f"imported and not used: {imported - names}"
    defined = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("__")}
    called = {node.attr for node in ast.walk(ast.parse(everywhere)) if isinstance(node, ast.Attribute)}
    called |= {node.id for node in ast.walk(ast.parse(everywhere)) if isinstance(node, ast.Name)}
    called |= {node.value for node in ast.walk(ast.parse(everywhere)) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    own = {"forward", "backward", "error"}                                           # called by torch and argparse
    assert not defined - called - own - PUBLIC, f"defined and not used: {defined - called - own - PUBLIC}"


def test_the_objective_is_shown_as_it_is():
    """Lines of code in the README that have since changed."""
    block, row = re.findall(r"```python\n(.*?)```", text("README.md"), re.S)
    flat = lambda code: [line.strip() for line in code.splitlines() if line.strip()]
    assert "\n".join(flat(block)) in "\n".join(flat(text("model.py"))) and row.startswith("METHODS[")


def test_tables_hold_what_was_recorded():
    """A figure typed by hand, a row of another day, seeds of one run counted to another."""
    found = experiments.read_records(os.path.join(ROOT, "tests", "results.jsonl"))
    shown = text("README.md").partition("<!-- tables -->\n")[2].partition("<!-- /tables -->")[0]
    assert shown == experiments.tables(found)
    seeds = [found[f"mim-s{seed}-tenth"]["average"] for seed in range(3)]
    first = next(line for line in shown.splitlines() if line.startswith("| `mim`"))
    assert first.endswith(f"| {statistics.mean(seeds):.1f} ± {statistics.stdev(seeds):.1f} | {', '.join(f'{seed:.1f}' for seed in seeds)} |")


def test_processes_share_the_experiments(tmp_path):
    """A run that two processes make at once, in one folder."""
    once = f"import time; open({str(tmp_path / 'made')!r}, 'a').write('x'); time.sleep(1)"
    job, out = experiments.Job("job", [["-c", once]]), str(tmp_path)
    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(lambda _: experiments.work(job, out), range(2))) == [False, True]
    assert (tmp_path / "made").read_text() == "x" and job.done(out) and not experiments.work(job, out)


@pytest.mark.parametrize("exercise", exercises.EXERCISES)
def test_exercises_are_open(exercise):
    """A check that passes on what the student was given."""
    with pytest.raises((AssertionError, UserError)):
        exercise()


@pytest.mark.skipif(not shutil.which("git"), reason="git applies the solutions")
@pytest.mark.parametrize("numbers", ["1 3 5", "2 4", pytest.param("6", marks=pytest.mark.skipif(
    not any(all(data.glyph(file, 40, 0, c) for c in "αβγδεζηθικλμνξοπρστυφχψω") for file in data.font_files()),
    reason="no font has Greek letters"))])
def test_solutions_solve(tmp_path, numbers):
    """A solution that no longer applies, or does not pass the check: every change of the scripts can break one."""
    for name in SCRIPTS:
        shutil.copy(os.path.join(ROOT, name), tmp_path)
    shutil.copytree(os.path.join(ROOT, "tests"), tmp_path / "tests")
    for number in numbers.split():
        subprocess.run(["git", "apply", f"tests/solutions/{number}.diff"], cwd=tmp_path, check=True)
    done = subprocess.run([sys.executable, "tests/exercises.py", *numbers.split()], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("solved:") == len(numbers.split()), done.stdout + done.stderr
