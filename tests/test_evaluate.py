"""Protocols, tables, files, readings and pictures of evaluate.py, on labels, crops and weights made here."""
import functools
import itertools
import json
import os
import pathlib
import random
import re
import runpy
import shutil
import subprocess
import sys
import unicodedata
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import common
import data
import evaluate
import model

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SCRIPT = os.path.join(ROOT, "evaluate.py")
CROPS = pathlib.Path(ROOT) / "tests" / "crops"
WORDS = ["Stop!", "EXIT", "a" * 24, "b" * 25, "c" * 26, "d" * 60, "&", "café", "12:30"]


# ---- protocols and scores

@pytest.mark.parametrize("protocol, text, folded", [
    ("exact", " A-b c ", " A-b c "), ("exact", "e\u0301", "é"), ("exact", "É", "É"), ("exact", "Ａ", "Ａ"),
    ("ci", "A-b C", "a-b c"), ("ci", "E\u0301", "é"), ("ci", "İ", "i\u0307"), ("ci", "ẞ", "ß"),
    ("ci", "Ａ²", "ａ²"),
    ("waics", "It's A-1 !", "itsa1"), ("waics", "café", "caf"), ("waics", "e\u0301", "e"),
    ("waics", "中^文", ""),
    ("waics", "\u212a", ""), ("waics", "Ａ１", ""), ("waics", "²", ""), ("waics", "", ""),
    ("parseq36", "It's\tA-1 \u3000!", "itsa1"), ("parseq36", "café", "cafe"), ("parseq36", "Ａ１", "a1"),
    ("parseq36", "\u212aﬁ²½", "kfi212"), ("parseq36", "Straße", "strae"), ("parseq36", "中文", ""),
    ("zh", "Ａ１，Ｂ", "a1,b"), ("zh", "中 文 Abc", "中文abc"), ("zh", "中\u3000文", "中 文"),
    ("zh", "國", "國"), ("zh", "。", "。"), ("zh", "！～｟", "!~｟"),
])
def test_normalize(protocol, text, folded):
    """Each rule on a case of its own. Catches lower case before the ASCII filter (a Kelvin sign would become
    k), mmocr's ^ and CJK in waics, NFKD left out of parseq36, symbols dropped by exact, the zh space rule, a
    range of full width that is one too short or long, and a guessed traditional-simplified fold."""
    assert evaluate.normalize(text, protocol) == folded


@pytest.mark.parametrize("protocol", ["exact", "ci"])
def test_composed_and_decomposed_are_the_same(protocol):
    """A letter whose lower case is not composed any more, such as a Greek iota with two accents: read right, and
    counted as wrong."""
    for code in range(sys.maxunicode + 1):
        char = chr(code)
        apart = unicodedata.normalize("NFD", char)
        if apart != char:
            assert evaluate.normalize(char, protocol) == evaluate.normalize(apart, protocol), hex(code)
            if protocol == "ci":
                for cased in (char.upper(), char.lower()):
                    decomposed = unicodedata.normalize("NFD", cased)
                    assert evaluate.normalize(cased, "ci") == evaluate.normalize(decomposed, "ci"), hex(code)


def test_every_protocol_says_what_it_does():
    """A protocol without its sentence would print a table that nobody can compare; zh must own up to what it
    cannot fold; a mistyped one is not taken for exact."""
    assert set(evaluate.PROTOCOLS) == {"exact", "ci", "waics", "parseq36", "zh"}
    with pytest.raises(common.UserError, match="WAICS: expected one of exact"):
        evaluate.score([("Ab!", "ab")], "WAICS")
    assert "traditional" in evaluate.PROTOCOLS["zh"].about
    assert "25" in evaluate.PROTOCOLS["parseq36"].about


def test_a_new_protocol_is_one_row(call, tmp_path, monkeypatch):
    """A row of PROTOCOLS that --protocol takes and the first set's score does not know."""
    first = evaluate.Protocol(lambda text: text[:1], "first letters")
    monkeypatch.setitem(evaluate.PROTOCOLS, "first", first)
    (tmp_path / "p.tsv").write_text("abc\tax\nabc\txb\n")
    status, out, _ = call("--score", tmp_path / "p.tsv", "--protocol", "first")
    assert status == 0 and "protocol first: first letters" in out
    assert re.search(r"^average +50\.00", out, re.M)


def test_edit_distance_is_the_plain_dynamic_programme():
    """Against the recursive definition, on strings with many repeats: catches a wrong border or a diagonal
    counted twice."""
    def plain(a, b):
        @functools.cache
        def d(i, j):
            if not i or not j:
                return max(i, j)
            replaced = d(i - 1, j - 1) + (a[i - 1] != b[j - 1])
            return min(d(i - 1, j) + 1, d(i, j - 1) + 1, replaced)
        return d(len(a), len(b))

    rng = random.Random(0)
    for _ in range(400):
        a = "".join(rng.choices("abé", k=rng.randrange(9)))
        b = "".join(rng.choices("abé", k=rng.randrange(9)))
        assert evaluate.edit_distance(a, b) == plain(a, b), (a, b)


def test_ned_is_parseqs():
    """1 - NED divides by the longer word and averages words, not characters: (1 + 1/4 + 0) / 3 here, where
    dividing by the label's length or pooling the characters gives another number. Two empty words are equal,
    not 0 / 0."""
    got = evaluate.score([("ab", "ab"), ("a", "abcd"), ("abc", "")], "exact")
    assert got["ned"] == pytest.approx(100 * (1 + 0.25 + 0) / 3)
    assert got["accuracy"] == pytest.approx(100 / 3)
    got = evaluate.score([("&", "!"), ("a", "a")], "waics")
    assert got == {"n": 2, "evaluated": 2, "dropped": {}, "accuracy": 100, "ned": 100}


@pytest.mark.parametrize("protocol", evaluate.PROTOCOLS)
def test_long_labels_are_counted_where_they_belong(protocol):
    """LMIM's loader replaces labels of 24 and more by a neighbour and the count stays the same. Here 24, 25,
    26 and 60 are all evaluated, but for parseq36, which drops 26 and 60, and '&', each under its reason.
    Spaces and what has no ASCII do not make a label long, symbols do, and a half counts as 12."""
    words = ["a" * 24, "b" * 25, "c" * 26, "d" * 60, "&", "e " * 25, "f" * 25 + "!", "½" * 13, "中" * 26]
    got = evaluate.score([(word, word) for word in words], protocol)
    evaluated, dropped = 9, {}
    if protocol == "parseq36":
        evaluated, dropped = 3, {"longer than 25": 4, "no letter or digit": 2}
    assert got == {"n": 9, "evaluated": evaluated, "dropped": dropped, "accuracy": 100, "ned": 100}


def test_damaged_and_nothing_left():
    """A damaged crop is dropped by name and stays in n; a set with no word left has no accuracy, rather than
    0 or a division by zero."""
    got = evaluate.score([("a", None), ("b", "b")], "waics")
    assert got == {"n": 2, "evaluated": 1, "dropped": {"damaged": 1}, "accuracy": 100, "ned": 100}
    got = evaluate.score([("a", None), ("!", "")], "parseq36")
    assert got == {"n": 2, "evaluated": 0, "dropped": {"damaged": 1, "no letter or digit": 1},
                   "accuracy": None, "ned": None}
    assert evaluate.summarize({"x": got}, "parseq36")["average"] is None


# ---- table

def some_sets(**sizes):
    """{name: score} of sets of these sizes, all 80 % right."""
    sets = {}
    for name, n in sizes.items():
        sets[name] = dict(n=n, evaluated=n, dropped={}, accuracy=80.0, ned=90.0, seconds=1.0)
    return sets


def test_averages_and_incomplete():
    """The average is over sets, the weighted one over words that were scored; Union14M's Incomplete, whatever
    its name's style, is in neither."""
    sets = some_sets(curve=10, general=30, Union14M_Incomplete=60, INCOMPLETE=60)
    sets["general"]["n"] = 300                                              # of which most were dropped
    sets["curve"]["accuracy"] = 60.0
    sets["Union14M_Incomplete"]["accuracy"] = sets["INCOMPLETE"]["accuracy"] = 1.0
    got = evaluate.summarize(sets, "waics")
    assert got["average"] == 70 and got["weighted"] == 75


def test_what_the_table_says(capsys):
    """The protocol, without which figures cannot be compared; a row a set, the averages, what is not
    averaged; for another view the accuracy and the change, - where there is none."""
    result = evaluate.summarize(some_sets(SVT=647, Incomplete=1495, a_name_of_more_than_ten=5), "exact")
    result["sets"]["SVT"]["dropped"] = {"damaged": 1234}
    lower = evaluate.summarize(some_sets(SVT=647, Incomplete=1495, a_name_of_more_than_ten=5), "exact")
    lower["sets"]["SVT"]["accuracy"] = 71.5
    lower["sets"]["Incomplete"]["accuracy"] = None
    evaluate.print_table(dict(result, heights={"8": lower}, rotations={"-5": result}))
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("protocol exact: ") and evaluate.PROTOCOLS["exact"].about in lines[1]
    assert [" ".join(line.split()) for line in lines[2:]] == [
        "set n evaluated accuracy 1-NED seconds",
        "SVT 647 647 80.00 90.00 1.00 1,234 dropped: damaged",
        "Incomplete 1495 1495 80.00 90.00 1.00 not averaged",
        "a_name_of_more_than_ten 5 5 80.00 90.00 1.00",
        "average 80.00",
        "weighted 80.00",
        "",
        "height 8, and the change",
        "SVT 71.50 -8.50",
        "Incomplete - -",
        "a_name_of_more_than_ten 80.00 +0.00",
        "average 80.00 +0.00",
        "",
        "rotation -5, and the change",
        "SVT 80.00 +0.00",
        "Incomplete 80.00 +0.00",
        "a_name_of_more_than_ten 80.00 +0.00",
        "average 80.00 +0.00",
    ]
    assert lines[3].index("647") > len("a_name_of_more_than_ten")            # columns stand below each other
    nothing_read = dict(accuracy=None, evaluated=0, dropped={"damaged": 3})
    assert evaluate.table_notes("SVT", nothing_read) == "   3 dropped: damaged"         # labels are not to blame


def test_a_word_without_any_confidence_was_read():
    """A crop called damaged, and dropped by --score, because its confidence is 0."""
    line = evaluate.prediction_line(evaluate.Reading("a", "b", 0.0), "SVT 1.png")
    assert line == "a\tb\t0\tSVT 1.png\n"


# ---- the script

def save_random_reader(path, size):
    torch.manual_seed(0)
    sizes = model.MODELS[size]
    net = model.Recognizer(model.ViT(**sizes["encoder"]), data.CHARSETS["94"], 25, **sizes["reader"])
    with torch.no_grad():           # louder: words differ, end at many lengths, and nothing is near a tie
        for layer in net.layers:
            layer.cross_attn.proj.weight.mul_(8)
        net.embed.weight.mul_(40)
        net.classifier.weight.mul_(20)
        net.classifier.bias[net.end] += 15
    torch.save({"model": net.state_dict(), "args": {"model": size, "max_length": 25, "spell": False},
                "charset": net.charset, "step": 0}, path)


@pytest.fixture(scope="session")
def bench(tmp_path_factory):
    """A folder with tiny.pt (random weights, short words), nano.pt, of a size that other processes know too,
    and set/labels.tsv of nine crops, the eighth of them torn."""
    root = tmp_path_factory.mktemp("bench")
    save_random_reader(root / "tiny.pt", "vit_square")
    save_random_reader(root / "nano.pt", "vit_nano")

    (root / "set").mkdir()
    rng = np.random.default_rng(0)
    for k in range(len(WORDS)):
        small = Image.fromarray(rng.integers(0, 256, (4 + k, 16, 3), dtype=np.uint8))
        small.resize((100, 40)).save(root / "set" / f"{k}.png")
    torn = root / "set" / "7.png"
    torn.write_bytes(torn.read_bytes()[:60])
    lines = "".join(f"{k}.png\t{word}\n" for k, word in enumerate(WORDS))
    (root / "set" / "labels.tsv").write_text(lines, encoding="utf-8")
    return root


@pytest.fixture
def call(monkeypatch, capsys):
    """call(*argv) -> (exit status, stdout, stderr) of the script, run in this process."""
    def call(*argv):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, argv)])
        status = 0
        try:
            common.run_main(evaluate.main)
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()
    return call


def refused(got, *parts):
    """What `call` returned is an error: status 2, and one line that holds each of the parts."""
    status, out, err = got
    assert status == 2 and err.count("\n") == 1 and "Traceback" not in err, got
    for part in parts:
        assert part in err, got


def without_seconds(results):
    if not isinstance(results, dict):
        return results
    return {key: without_seconds(value) for key, value in results.items() if key != "seconds"}


def timeless(path):
    """A results file without its seconds."""
    return without_seconds(json.loads(path.read_text(encoding="utf-8")))


def columns(path):
    """The lines of a TSV, split."""
    return [line.split("\t") for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def test_score_reproduces_known_counts(call, tmp_path, monkeypatch):
    """Seven lines of a foreign system, with a BOM, CRLF, a further column and no last line end: 4 right under
    waics, 5 evaluated and 4 right under parseq36. Catches a line end left on the prediction, a line passed
    over, and the third column taken for something."""
    file = tmp_path / "preds.tsv"
    lines = ["\ufeffStop\tstop!", "café\tcafe", "A\tB\t0.9", "&\t", "long\tlong", "x" * 26 + "\tx"]
    lines += ["end\tend"]
    file.write_bytes("\r\n".join(lines).encode())

    status, out, _ = call("--score", file, "--json", tmp_path / "r.json")
    got = json.loads((tmp_path / "r.json").read_text())
    assert status == 0 and set(got) == {"protocol", "sets", "average", "weighted"}
    assert got["protocol"] == "waics" and list(got["sets"]) == ["preds.tsv"]
    one = got["sets"]["preds.tsv"]
    assert set(one) == {"n", "evaluated", "dropped", "accuracy", "ned", "seconds"}
    assert (one["n"], one["evaluated"], one["dropped"]) == (7, 7, {})
    assert one["accuracy"] == pytest.approx(400 / 7) and "57.14" in out and one["seconds"] > 0
    assert one["ned"] == pytest.approx(100 * (4 + 3 / 4 + 1 / 26) / 7)

    call("--score", file, "--json", tmp_path / "r.json", "--protocol", "parseq36")
    one = json.loads((tmp_path / "r.json").read_text())["sets"]["preds.tsv"]
    assert (one["n"], one["evaluated"], one["accuracy"]) == (7, 5, 80)
    assert one["dropped"] == {"no letter or digit": 1, "longer than 25": 1}

    monkeypatch.setenv("RANK", "1")    # left from elsewhere: nothing would be printed at all
    assert call("--score", file)[1] != ""
    monkeypatch.setenv("WORLD_SIZE", "2")                     # of torchrun: the table is printed once
    assert call("--score", file)[:2] == (0, "")


def test_score_refuses_strings():
    """Words of two letters that are taken for pairs: 0 % or 100, and no word of what was wrong. A traceback for
    what evaluate.read_source and `read` return."""
    for wrong in ("ab", ("ab", "ab", 0.9), ("ab", ("ab", 0.9)), (None, "ab"), ("ab", 7)):
        with pytest.raises(common.UserError, match=re.escape(f"score: {wrong!r}; expected pairs")):
            evaluate.score([("a", "a"), wrong], "waics")
    assert evaluate.score([("a", "a"), ("b", None)], "waics")["evaluated"] == 1


def test_labels_of_which_nothing_is_compared_are_said(call, bench, tmp_path, monkeypatch):
    """Words of another script, each right under waics if nothing of ours is read: 90 %, and no word of why."""
    file = tmp_path / "p.tsv"
    file.write_text("да\tнет\nнет\tда\nab\tac\n", encoding="utf-8")
    status, out, err = call("--score", file)
    assert status == 0 and re.search(r"^average +66.67", out, re.M)
    said = "2 of 3 labels hold nothing that waics compares; each is right if nothing else is read\n"
    assert err == f"--score {file}: {said}"
    assert call("--score", file, "--protocol", "exact")[2] == ""
    (tmp_path / "all.tsv").write_text("да\tнет\n", encoding="utf-8")
    _, out, err = call("--score", tmp_path / "all.tsv")
    assert re.search("^all.tsv +1 +1 +- +-", out, re.M) and "waics compares; so no accuracy is printed\n" in err
    assert call("--score", file, "--protocol", "parseq36")[2] == ""         # which leaves them out

    (bench / "set" / "mixed.tsv").write_text("0.png\tда\n1.png\tнет\n2.png\tab\n", encoding="utf-8")
    out = call("--ckpt", bench / "tiny.pt", "--data", bench / "set" / "mixed.tsv")[1]
    assert f"mixed.tsv: {said}" in out


def test_score_refuses_what_is_no_file_of_readings(call, tmp_path):
    """A file without tabs, an empty one, a missing one and one that is not UTF-8: one line each, never a
    table of zeros; line ends of Windows are no part of a prediction. A spreadsheet's empty rows that count as
    words read right, or that are left out unsaid."""
    (tmp_path / "words.txt").write_bytes(b"a\tb\n\nword\n")
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\tcafe\n")
    expected = "expected lines of label<TAB>prediction"
    refused(call("--score", tmp_path / "words.txt"), "words.txt", "line 3 has no tab", expected)
    refused(call("--score", tmp_path / "empty.txt"), "empty.txt", "no line", expected)
    refused(call("--score", tmp_path / "latin.txt"), "latin.txt: line 1: ", "in UTF-8", expected)
    refused(call("--score", tmp_path / "nowhere.tsv"), "nowhere.tsv", "No such file")

    (tmp_path / "windows.txt").write_bytes(b"a\tb\r\n\r\nb\tb\r\n\t\r\n\t\t\r\n")
    status, out, err = call("--score", tmp_path / "windows.txt", "--protocol", "exact")
    assert status == 0 and re.search(r"^average +50\.00", out, re.M) and "3 empty lines left out" in err


def test_score_refuses_other_columns(call, tmp_path):
    """A header counted as a word; what --images prints, whose first column is no label; a file with the line
    ends of old Macs, which is one long line: each a wrong figure in silence."""
    file = tmp_path / "p.tsv"
    for header in ("Label\tPrediction", "GT Label\tPredicted text", "ground_truth\tpred", "ref\thyp"):
        file.write_text(f"{header}\nab\tab\n")
        status, out, err = call("--score", file)
        assert status == 0 and f"line 1 is taken for a header: {header}\n" in err
        assert re.search(r"^p.tsv +1 +1 +100", out, re.M)
    for header in ("prediction\tlabel", "hypothesis\treference", "text\tground truth", "Predicted text\ttext"):         # parseq36 drops by label
        file.write_text(f"{header}\nab\tab\n")
        refused(call("--score", file), f"its header is {header!r}; expected the label first")
    for header in ("expected output\tmodel output", "true label\tpredicted label"):
        file.write_text(f"{header}\nab\tab\n")
        assert re.search(r"^p.tsv +1 +1 +100", call("--score", file)[1], re.M)
    for word in ("Label\tlabel", "target\tmarket", "text\t", "true\ttarget\t0.9"):       # no header
        file.write_text(f"{word}\nab\tab\n")
        assert re.search(r"^p.tsv +2 +2 ", call("--score", file)[1], re.M)
    file.write_text("ab\tab\nlabel\ttext\n")                  # words that were read
    assert re.search(r"^p.tsv +2 +2 +50", call("--score", file)[1], re.M)
    file.write_text("c/0.png\tab\t0.9\nc/1.JPG\tcd\t0.9\n")
    refused(call("--score", file), "its labels are names of files, such as c/0.png")
    file.write_text("image\tlabel\tprediction\nc/0.png\tab\tab\n")
    refused(call("--score", file), "its labels are names of files, such as c/0.png")
    file.write_text("ab\tc/0.png\tab\nno.png\tc/1.png\tab\n\t\tdamaged\n")
    refused(call("--score", file), "its predictions are names of files, such as c/0.png")
    file.write_text("1\tFace\tFace\n2\tcd\tcd\n")            # a number, the label, the prediction
    refused(call("--score", file), "line 1: its third column is 'Face', and no confidence; expected label")
    file.write_text("expected\toutput\tscore\nab\tab\t\nab\tab\t1e-3\n")
    assert re.search(r"^p.tsv +2 +2 +100", call("--score", file)[1], re.M)
    file.write_bytes(b"ab\tab\rcd\tcd\r")
    refused(call("--score", file), "line 1 goes on after a carriage return")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_file_name_that_is_not_utf8(call, tmp_path):
    """A traceback after all has been read, and half a JSON file."""
    (tmp_path / "\udcff.txt").write_text("a\ta\n")
    assert call("--score", tmp_path / "\udcff.txt", "--json", tmp_path / "r.json")[0] == 0
    assert list(json.loads((tmp_path / "r.json").read_text("utf-8"))["sets"]) == ["\udcff.txt"]
    (tmp_path / "文é.txt").write_text("a\ta\n")
    assert call("--score", tmp_path / "文é.txt", "--json", tmp_path / "r.json")[0] == 0
    assert '"文é.txt"' in (tmp_path / "r.json").read_text("utf-8")           # for people to read


def test_table_json_predictions_and_pictures(bench, call, tmp_path):
    """One run with everything: the torn crop is counted and named once, never replaced; labels of every
    length are evaluated; the predictions hold all nine and score the same; 32 pixels and 0 degrees change
    nothing; the pictures are there."""
    new = tmp_path / "new"
    status, out, err = call(
        "--ckpt", bench / "tiny.pt", "--data", bench / "set" / "labels.tsv", "--json", new / "r.json",
        "--errors", new / "e.png", "--predictions", new / "p.tsv", "--attention", new / "looks",
        "--heights", 32, 16, 8, "--rotations", 0, 0.00001, "--workers", 0, "--device", "cpu", "--batch_size", 4,
        "--max_damaged", 0.5)
    assert status == 0, err
    got = timeless(new / "r.json")
    assert set(got) == {"protocol", "sets", "average", "weighted", "heights", "rotations", "attention"}
    assert got["attention"] == {}    # nothing to measure on photographs
    one = got["sets"]["labels.tsv"]
    assert (one["n"], one["evaluated"], one["dropped"]) == (9, 8, {"damaged": 1})
    assert out.count("damaged: labels.tsv 7.png") == 1

    assert list(got["heights"]) == ["32", "16", "8"] and list(got["rotations"]) == ["0", "1e-05"]
    plain = {key: got[key] for key in ("protocol", "sets", "average", "weighted")}
    assert got["heights"]["32"] == plain == got["rotations"]["0"]
    assert got["heights"]["8"]["sets"]["labels.tsv"]["n"] == 9

    rows = columns(new / "p.tsv")
    assert len(rows) == 9 and rows[7] == ["", "", "damaged", "labels.tsv 7.png"]
    assert [row[0] for row in rows[:7]] == WORDS[:7]
    assert len({row[1] for row in rows}) > 3
    assert all(0 <= float(row[2]) <= 1 for row in rows[:7])
    call("--score", new / "p.tsv", "--json", tmp_path / "again.json")
    assert timeless(tmp_path / "again.json")["sets"]["p.tsv"] == one

    assert Image.open(new / "e.png").height > 8 * 64
    assert Image.open(new / "looks" / "labels.tsv.png").height >= 8 * 64


def test_the_first_lines_say_what_runs(bench, call):
    """Figures from another command, another checkpoint or another machine, which nobody can tell any more."""
    status, out, _ = call("--ckpt", bench / "tiny.pt", "--data", bench / "set" / "labels.tsv",
                          "--workers", 0, "--device", "cpu")
    first = out.splitlines()[:3]
    assert first[0].startswith(f"evaluate.py --ckpt {bench}/tiny.pt --data ")
    assert first[1] == f"torch {torch.__version__}  cpu x1  float32"
    assert re.fullmatch(r"1\.\d\d M parameters, 94 characters, 9 crops", first[2])


def test_the_errors_are_the_surest(bench, call, tmp_path, monkeypatch):
    """Errors drawn in the order of the set, right readings among them, the damaged crop or a dropped label
    drawn as an error, or a crop beside another's reading."""
    drawn = []
    monkeypatch.setattr(evaluate, "draw_sheet", lambda rows, path: drawn.extend(rows))
    monkeypatch.setattr(evaluate, "N_ERRORS", 4)
    src = bench / "set" / "labels.tsv"
    said = call("--ckpt", bench / "tiny.pt", "--data", src, "--errors", tmp_path / "e.png", "--workers", 0,
                "--predictions", tmp_path / "p.tsv", "--protocol", "parseq36")[1]
    assert "e.png: the 4 most confident of 5 errors\n" in said
    rows = [row for row in columns(tmp_path / "p.tsv") if row[2] != "damaged"]
    # random weights read nothing right; parseq36 drops what is too long, and "&"
    wrong = [row for row in rows if len(row[0]) <= 25 and row[0] != "&"]
    surest = sorted(wrong, key=lambda row: -float(row[2]))
    assert len(wrong) == 5 and len(drawn) == 1 + 4
    source = data.open_source(src)
    for (label, _, confidence, place), (image, truth, reading) in zip(surest, drawn[1:]):
        ((caption, _),) = image[1]
        assert caption.startswith(place)
        assert float(caption.split()[-1]) == pytest.approx(float(confidence), abs=1e-3)
        assert truth[1][0][0] == label
        assert torch.equal(image[0], source[int(place.split()[-1].split(".")[0])][0])


def test_right_readings_are_no_errors(bench):
    """Case and symbols drawn as errors under waics; a damaged crop, whose text is None, normalized."""
    said = [evaluate.is_wrong(evaluate.Reading(*words, 0.5), "waics")
            for words in (("Hotel!", "hotel"), ("Hotel", "motel"), ("Hotel", None), ("&", ""))]
    assert said == [False, True, False, False]


def test_a_wrong_name_costs_nothing(bench, call, tmp_path):
    """Results of an hour ago emptied by a mistyped --ckpt; an hour of reading lost to a picture's name
    without an end, or to a set without labels."""
    (tmp_path / "r.json").write_text("{}")
    ckpt = ["--ckpt", bench / "tiny.pt", "--workers", 0]
    got = call("--ckpt", tmp_path / "nowhere.pt", "--data", "synth:4", "--json", tmp_path / "r.json")
    refused(got, "nowhere.pt", "No such file")
    assert (tmp_path / "r.json").read_text() == "{}"
    refused(call(*ckpt, "--data", tmp_path / "no", "--json", tmp_path / "new.json"), "no such file")
    got = call(*ckpt, "--data", bench / "set" / "labels.tsv", bench / "set", "--json", tmp_path / "new.json")
    refused(got, "no label", "--images")
    assert "parameters" not in got[1] and "damaged" not in got[1]           # before anything is read
    assert not (tmp_path / "new.json").exists()
    got = call(*ckpt, "--data", bench / "set" / "labels.tsv", "--json", tmp_path / "r.json",
               "--errors", bench / "set" / "labels.tsv" / "e.png")
    refused(got, "labels.tsv: File exists")
    assert (tmp_path / "r.json").read_text() == "{}"
    refused(call(*ckpt, "--data", "synth:4", "--errors", tmp_path / "errors"), "errors.png")
    got = call(*ckpt, "--data", "synth:4", "--attention", tmp_path, "--errors", tmp_path / "synth.png")
    refused(got, "synth.png: one name for two results")
    got = call(*ckpt, "--data", bench / "set", "--attention", bench / "set")        # its pictures would be crops
    refused(got, "is read, and would be changed")
    typed = (bench / "set" / "labels.tsv").read_text()
    for flag in "--predictions", "--json":                                  # labels, typed by hand
        got = call(*ckpt, "--images", bench / "set" / "0.png", flag, bench / "set" / "labels.tsv")
        refused(got, "labels.tsv: holds labels of images; name another file")
    assert (bench / "set" / "labels.tsv").read_text() == typed
    for _ in range(2):                                                      # its own results may be written anew
        got = call(*ckpt, "--images", bench / "set" / "0.png", "--predictions", tmp_path / "own.tsv",
                   "--json", tmp_path / "r.json")
        assert got[0] in (0, None)
    (tmp_path / "r.json").write_text("{}")
    crop = bench / "set" / "0.png"                              # of a labels file
    got = call(*ckpt, "--data", "synth:4", bench / "set" / "labels.tsv", "--errors", crop)
    refused(got, f"{crop}: labels.tsv 0.png is read, and would be changed")
    shutil.copy(crop, tmp_path / "0.tsv.png")
    (tmp_path / "0.tsv").write_text("0.tsv.png\tab\n")
    got = call(*ckpt, "--data", tmp_path / "0.tsv", "--attention", tmp_path)
    refused(got, "0.tsv.png is read, and would be changed")


@pytest.mark.skipif(sys.platform == "win32", reason="it has no such pipes, and links for few")
def test_a_link_hides_no_checkpoint(bench, call, tmp_path):
    """Results written through a link over the weights that have just read."""
    shutil.copy(bench / "tiny.pt", tmp_path / "best.pt")
    (tmp_path / "r.json").symlink_to(tmp_path / "best.pt")
    got = call("--ckpt", tmp_path / "best.pt", "--images", bench / "set" / "0.png", "--json", tmp_path / "r.json")
    refused(got, "best.pt is read, and would be changed")


def test_results_are_replaced_whole(call, tmp_path, monkeypatch):
    """A disk that fills up while results are written: half a file where a whole one was, and an error that
    does not name it. A link that is replaced by a file; /dev/null that becomes one."""
    (tmp_path / "p.tsv").write_text("a\ta\n")
    (tmp_path / "real.json").write_text("before")
    (tmp_path / "r.json").symlink_to(tmp_path / "real.json")
    command = ["--score", tmp_path / "p.tsv", "--json", tmp_path / "r.json"]

    def full(text):
        raise OSError(28, "No space left on device")

    def open_on_a_full_disk(path, mode="r", **options):
        file = open(path, mode, **options)
        if mode == "w":
            file.write = full
        return file

    with monkeypatch.context() as patch:
        patch.setattr(data, "open", open_on_a_full_disk, raising=False)
        got = call(*command)
    refused(got, "real.json", "No space left on device")
    assert "average" in got[1] and (tmp_path / "r.json").read_text() == "before"
    assert not (tmp_path / "real.json.tmp").exists()

    assert call(*command)[0] == 0
    assert (tmp_path / "r.json").is_symlink()
    assert json.loads((tmp_path / "real.json").read_text())["average"] == 100
    assert sorted(os.listdir(tmp_path)) == ["p.tsv", "r.json", "real.json"]

    os.mkfifo(tmp_path / "pipe")
    end = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    data.write_file("text", str(tmp_path / "pipe"))
    assert os.read(end, 9) == b"text"
    os.close(end)


def test_results_come_before_pictures(bench, call, tmp_path, monkeypatch):
    """Readings of an hour that are lost because a picture could not be drawn; an empty file that is left
    where there was no result."""
    def fails(*_):
        raise common.UserError("no room for a picture")

    monkeypatch.setattr(evaluate, "draw_errors", fails)
    files = ["--json", tmp_path / "r.json", "--predictions", tmp_path / "p.tsv"]
    files += ["--errors", tmp_path / "e.png"]
    command = ["--ckpt", bench / "tiny.pt", "--data", "synth:4", "--workers", 0, *files]
    with monkeypatch.context() as patch:
        patch.setattr(model.Recognizer, "read", fails)
        refused(call(*command), "no room")
    assert os.listdir(tmp_path) == []
    refused(call(*command), "no room")
    assert timeless(tmp_path / "r.json")["sets"]["synth"]["n"] == 4 and len(columns(tmp_path / "p.tsv")) == 4


def test_too_much_damage_is_a_failure(bench, call, tmp_path):
    """An average over the two crops of a hundred that could be read, and exit status 0. The table and the
    files are there all the same; the limit is a share, more than which is too much; --score judges alike."""
    command = ["--ckpt", bench / "tiny.pt", "--data", "synth:4", bench / "set" / "labels.tsv", "--workers", 0]
    files = ["--json", tmp_path / "r.json", "--predictions", tmp_path / "p.tsv"]
    got = call(*command, *files)
    refused(got, "labels.tsv: 1 of 9 crops", "--max_damaged 0.01")
    assert "synth" not in got[2] and re.search("^weighted ", got[1], re.M)
    assert timeless(tmp_path / "r.json")["sets"]["labels.tsv"]["dropped"] == {"damaged": 1}
    assert len(columns(tmp_path / "p.tsv")) == 4 + 9

    assert call(*command, "--max_damaged", 0.112)[0] == 0                   # 1 of 9 is less than that
    assert call(*command, "--max_damaged", 0.111)[0] == 2
    refused(call("--score", tmp_path / "p.tsv", "--protocol", "exact"), "p.tsv: 1 of 13 crops")
    (tmp_path / "p.tsv").write_text("a\tb\t1\tx\n" * 99 + "\t\tdamaged\tx\n")
    assert call("--score", tmp_path / "p.tsv")[0] == 0                      # no more than one of a hundred


def checkpoint_with(bench, path, charset=None, **flags):
    """A copy of tiny.pt with other flags stored, and with another charset of 94."""
    state = torch.load(bench / "tiny.pt", weights_only=True)
    state["args"].update(flags)
    state["charset"] = charset or state["charset"]
    torch.save(state, path)
    return path


def test_labels_that_can_never_be_right_are_counted(bench, call, tmp_path):
    """An accuracy that no recognizer of this charset could have exceeded: the table alone does not tell."""
    out = call("--ckpt", bench / "tiny.pt", "--data", bench / "set" / "labels.tsv", "--workers", 0)[1]
    line = "labels.tsv: 6 of 9 labels fit, 2 too long, 1 outside the charset ('é' 1)"
    assert out.count("labels fit") == 1 and line in out.splitlines()

    short = checkpoint_with(bench, tmp_path / "short.pt", max_length=3)
    out = call("--ckpt", short, "--data", bench / "set" / "labels.tsv", "--workers", 0)[1]
    assert "labels.tsv: 1 of 9 labels fit, 7 too long, 1 outside the charset ('é' 1)" in out.splitlines()


def test_a_set_of_which_none_can_be_right(bench, call, tmp_path):
    """A table of zeros where the recognizer cannot write a single label, rather than one line. But what the
    protocol passes over, as case or a symbol, makes no label hopeless."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    def said(ckpt, *labels, protocol):
        lines = "".join(f"{bench}/set/0.png\t{label}\n" for label in labels)
        (tmp_path / "labels.tsv").write_text(lines, encoding="utf-8")
        return call("--ckpt", ckpt, "--data", tmp_path / "labels.tsv", "--workers", 0, "--protocol", protocol)

    own = checkpoint_with(bench, tmp_path / "own.pt",
                          charset=letters + "".join(map(chr, range(0x400, 0x400 + 68))))
    got = said(own, "STOP", "GO", protocol="exact")
    refused(got, "labels.tsv: 0 of 2 labels fit, 2 outside the charset", "read none of them right")
    assert got[1] == ""                                                     # before anything is read
    assert said(own, "STOP", "GO", protocol="ci")[0] == 0
    assert said(own, "A" * 25, protocol="ci")[0] == 0                       # the longest word
    assert said(own, "stop!", protocol="waics")[0] == 0
    refused(said(own, "stop!", protocol="ci"), "0 of 1 labels fit")
    refused(said(own, "123", "合格", protocol="waics"), "0 of 2 labels fit")
    refused(said(own, "a" * 26, protocol="ci"), "1 too long")
    assert said(own, "stop", "合格", protocol="exact")[0] == 0


def test_tall_crops_are_turned_as_in_training(bench, call, tmp_path, monkeypatch):
    """A recognizer of vertical words that is shown them upright: 4 % instead of 100. The flag that it was
    trained with is in its checkpoint, is taken up for --data, --images and folders, and is said."""
    rng = np.random.default_rng(1)
    (tmp_path / "tall").mkdir()
    tall = Image.fromarray(rng.integers(0, 256, (16, 4, 3), dtype=np.uint8)).resize((40, 160))
    tall.save(tmp_path / "tall" / "tall.png")
    (tmp_path / "labels.tsv").write_text("tall/tall.png\ta\n")
    file = (tmp_path / "tall" / "tall.png").read_bytes()
    upright, turned = data.decode(file), data.decode(file, rotate_tall=True)
    assert not torch.equal(upright, turned)

    given = []
    decode = model.Recognizer.decode
    monkeypatch.setattr(model.Recognizer, "decode",
                        lambda net, images: (given.append(images.clone()), decode(net, images))[1])
    vertical = checkpoint_with(bench, tmp_path / "vertical.pt", rotate_tall=True)
    flat = checkpoint_with(bench, tmp_path / "flat.pt", rotate_tall=False)
    for ckpt, typed, crop in ((vertical, [], turned), (flat, [], upright), (bench / "tiny.pt", [], upright),
                              (flat, ["--rotate_tall"], turned)):
        for what in (["--data", tmp_path / "labels.tsv"], ["--images", tmp_path / "tall" / "tall.png"],
                     ["--images", tmp_path / "tall"]):
            status, out, err = call("--ckpt", ckpt, *what, *typed, "--workers", 0, "--device", "cpu")
            assert status == 0
            assert torch.equal(given.pop(), model.normalize_pixels(crop[None])), (ckpt, what)
            assert ("tall crops are turned" in out + err) == (ckpt == vertical)
            if what[0] == "--images":
                assert out.count("\n") == 1                                 # readings alone


def torchrun(folder, *argv):
    """The script on two ranks -> its standard output."""
    start = "-m torch.distributed.run --standalone --nproc_per_node=2".split()
    command = [sys.executable, *start, SCRIPT, *map(str, argv)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_one_process_or_two(bench, call, tmp_path, monkeypatch):
    """Nine crops over two ranks: a sampler that pads would count one twice, one that cuts would lose one.
    Rank 0 alone prints and writes, and the readings are the same, in the same order."""
    monkeypatch.chdir(bench)
    command = "--ckpt nano.pt --data set/labels.tsv --workers 0 --batch_size 2 --device cpu".split()
    command += ["--heights", "8", "--max_damaged", "1"]
    status, one, _ = call(*command, "--json", tmp_path / "one.json", "--predictions", tmp_path / "one.tsv")
    two = torchrun(bench, *command, "--json", tmp_path / "two.json", "--predictions", tmp_path / "two.tsv")
    assert status == 0
    tables = []
    for out in (one, two):
        assert out.count("damaged: ") == 1    # each crop was read by one rank only
        rows = [line.split() for line in out.splitlines() if re.match("(labels.tsv|average|weighted) ", line)]
        tables.append([row[:5] for row in rows])                            # but for the seconds
    assert len(tables[0]) == 5 and tables[0] == tables[1]
    assert timeless(tmp_path / "one.json") == timeless(tmp_path / "two.json")
    one, two = columns(tmp_path / "one.tsv"), columns(tmp_path / "two.tsv")
    assert len(one) == 9
    without_confidence = [[[row[0], row[1], row[3]] for row in rows] for rows in (one, two)]
    assert without_confidence[0] == without_confidence[1]


def test_every_rank_names_its_damaged_crops(monkeypatch):
    """Damaged crops, or readings, of the last rank alone."""
    def gather(of_ranks, mine, group):
        of_ranks[:] = [({0: "a"}, ["x"]), mine]

    monkeypatch.setattr(evaluate, "world_size", lambda: 2)
    monkeypatch.setattr(evaluate.dist, "all_gather_object", gather)
    assert evaluate.gather_readings({1: "b"}, ["y"], "group") == ({0: "a", 1: "b"}, ["x", "y"])


def test_images_over_two_ranks(bench):
    """A rank that waits for ever for another that has nothing to print; a path printed twice or by nobody."""
    names = [f"set/{k}.png" for k in (3, 0, 5)]    # the second rank has a batch less than the first
    out = torchrun(bench, "--ckpt", "nano.pt", "--workers", 0, "--device", "cpu", "--batch_size", 1,
                   "--json", "two.json", "--images", *names)
    assert [line.split("\t")[0] for line in out.splitlines()] == names
    assert [row["path"] for row in json.loads((bench / "two.json").read_text())["images"]] == names


def test_images_of_two_ranks_are_printed_in_their_order(monkeypatch, capsys):
    """All of one rank's images, then all of the other's: no script that reads the lines expects that."""
    monkeypatch.setattr(evaluate, "open_images", lambda _: range(4))
    monkeypatch.setattr(evaluate, "image_path", lambda _, index: str(index))
    gathered = {index: ("a", [0.5, 0.5]) for index in (0, 2, 1, 3)}             # a rank has every second image
    monkeypatch.setattr(evaluate, "read_image_batches", lambda *_: [(gathered, [])])
    args = SimpleNamespace(json=None, predictions=None, errors=None, attention=None)
    evaluate.read_images(SimpleNamespace(rotate_tall=False), args, None)
    assert capsys.readouterr().out == "".join(f"{index}\ta\t0.25\n" for index in range(4))


class Pixels(torch.nn.Module):
    """In place of an encoder: patches as they are, so that 1,000 crops take a second and are all unlike."""

    def forward(self, images):
        return F.pad(model.patchify(images, (8, 8))[..., :128], (0, 0, 1, 0))


def read_without_cache(net, images):
    """Every prefix anew, to the full length -> [(text, confidence)]."""
    _, memory = net.encode(model.normalize_pixels(images))
    ids = torch.full((len(images), 1), net.start)
    for _ in range(net.max_length + 1):
        logits = net.logits_after(ids, memory)[0][..., :net.pad]
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    ids[:, -1] = net.end                                                    # no word is longer
    chances = logits.softmax(-1).gather(2, ids[:, 1:, None])[..., 0].double()
    words = []
    for row, chance in zip(ids[:, 1:].tolist(), chances):
        n = row.index(net.end)
        words.append(("".join(net.charset[k] for k in row[:n]), chance[:n + 1].prod().item()))
    return words


def test_1000_crops_read_the_same_with_a_cache_without_one_and_alone(bench):
    """A word's reading must not depend on how it is come by: catches a key/value cache that mixes rows or is
    a step late, a word that goes on after its end, and a confidence that counts the steps waited. uint8 and
    [0, 1] read the same."""
    net = evaluate.load_recognizer(str(bench / "tiny.pt"))
    assert not net.training                                                 # or it would drop at random
    net.encoder, net.max_length = Pixels(), 11
    net.classifier.bias.data[net.end] = 35                                  # words end at all lengths
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (1000, 3, 32, 128), dtype=torch.uint8, generator=generator)
    many = net.read(images, 128)
    with torch.inference_mode():
        plain = read_without_cache(net, images)
    one, floats = net.read(images[:128], 1), net.read(images[:128].float() / 255)
    for other in (plain, one, floats):
        same = many[:len(other)]
        assert [text for text, _ in other] == [text for text, _ in same]
        assert np.allclose([sure for _, sure in other], [sure for _, sure in same], rtol=1e-3)
    assert len({text for text, _ in many}) > 200
    assert {len(text) for text, _ in many} == {*range(12)}


def test_images(bench, call):
    """path, text, confidence for each; a torn file is named, the others are read, and the exit status
    tells."""
    good, torn = bench / "set" / "0.png", bench / "set" / "7.png"
    ckpt = ["--ckpt", bench / "tiny.pt", "--workers", 0]
    status, out, _ = call(*ckpt, "--images", good, good)
    rows = [line.split("\t") for line in out.splitlines()]
    assert status == 0 and [row[0] for row in rows] == [str(good)] * 2
    assert rows[0][1] == rows[1][1]
    assert float(rows[0][2]) == pytest.approx(float(rows[1][2]), rel=1e-4)

    status, out, err = call(*ckpt, "--images", torn, good, bench / "no.png")
    path, text, confidence = out.splitlines()[0].split("\t")
    assert out.count("\n") == 1 and [path, text] == rows[0][:2]
    assert float(confidence) == pytest.approx(float(rows[0][2]), rel=1e-4)
    refused((status, "", err), "2 of 3", "7.png", "no.png")
    status, _, err = call(*ckpt, "--images", *[torn] * 7)
    refused((status, "", err), "7 of 7", "; and 2 more")


def test_images_in_folders(bench, call, tmp_path):
    """A folder taken for a damaged file; files below it passed over; a name that nobody can open; lines in
    another order than the files'."""
    (tmp_path / "words" / "more").mkdir(parents=True)
    for name, k in (("b.png", 3), ("a.png", 0), ("more/c.png", 5)):
        (tmp_path / "words" / name).write_bytes((bench / "set" / f"{k}.png").read_bytes())
    (tmp_path / "words" / "notes.txt").write_text("no picture")
    single = bench / "set" / "1.png"
    command = ["--ckpt", bench / "tiny.pt", "--workers", 0, "--batch_size", 2, "--images"]
    status, out, _ = call(*command, tmp_path / "words", single)
    rows = [line.split("\t") for line in out.splitlines()]
    assert status == 0
    wanted = [tmp_path / "words" / name for name in ("a.png", "b.png", "more/c.png")]
    assert [row[0] for row in rows] == list(map(str, [*wanted, single]))
    for (path, text, confidence), k in zip(rows, (0, 3, 5, 1)):
        alone = call(*command, bench / "set" / f"{k}.png")[1].split("\t")
        assert text == alone[1] and float(confidence) == pytest.approx(float(alone[2]), rel=1e-4)
    (tmp_path / "empty").mkdir()
    refused(call(*command, single, tmp_path / "empty"), "empty", "expected")


@pytest.mark.skipif(sys.platform == "win32", reason="it has no such names")
def test_images_whose_names_hold_tabs_and_line_ends(bench, call, tmp_path):
    """A name that makes two lines of one, or columns too many."""
    name = tmp_path / "a\tb\nc.png"
    name.write_bytes((bench / "set" / "0.png").read_bytes())
    status, out, _ = call("--ckpt", bench / "tiny.pt", "--workers", 0, "--images", name,
                          "--predictions", tmp_path / "p.tsv", "--json", tmp_path / "r.json")
    assert status == 0 and out.split("\t")[0] == f"{tmp_path}/a\\tb\\nc.png"
    assert columns(tmp_path / "p.tsv")[0][3:] == [f"{tmp_path}/a\\tb\\nc.png"]
    assert json.loads((tmp_path / "r.json").read_text())["images"][0]["path"] == str(name)


def test_images_of_an_lmdb(bench, call, tmp_path):
    """Crops in an LMDB, which only --images can read without labels; a missing label that makes a crop
    damaged."""
    lmdb = pytest.importorskip("lmdb")
    with lmdb.open(str(tmp_path / "packed")) as environment, environment.begin(write=True) as transaction:
        for number, k in ((1, 0), (2, 3)):
            transaction.put(b"image-%09d" % number, (bench / "set" / f"{k}.png").read_bytes())
        transaction.put(b"label-000000001", b"a")
        transaction.put(b"num-samples", b"2")
    status, out, _ = call("--ckpt", bench / "tiny.pt", "--workers", 0, "--images", tmp_path / "packed")
    assert status == 0
    assert [line.split("\t")[0] for line in out.splitlines()] == [
        f"{tmp_path}/packed image-000000001", f"{tmp_path}/packed image-000000002"]
    shutil.copytree(tmp_path / "packed", tmp_path / "other" / "packed")     # two of one name are told apart
    status, out, _ = call("--ckpt", bench / "tiny.pt", "--workers", 0, "--images", tmp_path / "packed",
                          tmp_path / "other" / "packed/")
    paths = [line.split("\t")[0] for line in out.splitlines()]
    assert status == 0 and len(set(paths)) == 4 and f"{tmp_path}/other/packed image-000000002" in paths


def test_images_are_printed_as_they_are_read(bench, call, monkeypatch):
    """A million images, and nothing on the screen until the last is read."""
    happened = []
    read, show = model.Recognizer.read_letters, evaluate.print_at_once
    monkeypatch.setattr(model.Recognizer, "read_letters",
                        lambda *given: (happened.append("read"), read(*given))[1])
    monkeypatch.setattr(evaluate, "print_at_once",
                        lambda text: (happened.append(text.count("\n")), show(text))[1])
    names = [bench / "set" / f"{k}.png" for k in range(5)]
    call("--ckpt", bench / "tiny.pt", "--workers", 0, "--batch_size", 2, "--images", *names)
    assert happened == ["read", 2, "read", 2, "read", 1]


@pytest.mark.skipif(sys.platform == "win32", reason="its pipes tell otherwise")
def test_a_closed_pipe_is_quiet(bench):
    """`| head -1` answered by a traceback, or by an error; a million images that are read for nobody: here
    the last, which is torn, would be an error; results that are lost with the table."""
    listens, speaks = os.pipe()
    os.close(listens)
    ckpt = ["--ckpt", bench / "nano.pt", "--workers", 0, "--batch_size", 1]
    names = [bench / "set" / f"{k}.png" for k in (0, 1, 7)]
    for what in (["--images", *names], ["--data", "synth:2", "--json", bench / "unheard.json"]):
        command = [sys.executable, SCRIPT, *ckpt, *what]
        done = subprocess.run(list(map(str, command)), stdout=speaks, stderr=subprocess.PIPE, text=True)
        assert (done.returncode, done.stderr) == (0, ""), what
    os.close(speaks)
    assert timeless(bench / "unheard.json")["sets"]["synth"]["n"] == 2


def test_a_closed_pipe_does_not_cost_a_file(bench, call, tmp_path, monkeypatch):
    """`--json r.json | head -1` that stops at the first batch, without r.json."""
    monkeypatch.setattr(evaluate, "print_at_once", lambda text: False)
    names = [bench / "set" / f"{k}.png" for k in range(4)]
    call("--ckpt", bench / "tiny.pt", "--workers", 0, "--batch_size", 1, "--json", tmp_path / "r.json",
         "--images", *names)
    assert len(json.loads((tmp_path / "r.json").read_text())["images"]) == 4


def test_a_closed_pipe_leaves_no_rank_waiting(monkeypatch):
    """Rank 0 that goes away when nobody listens, while the others gather: they would fail, with an error."""
    made = []

    def batches(*_):
        for index in range(3):
            made.append(index)
            yield {index: ("a", [0.5])}, []
    monkeypatch.setattr(evaluate, "open_images", lambda _: range(3))
    monkeypatch.setattr(evaluate, "prepare_files", lambda _: None)
    monkeypatch.setattr(evaluate, "image_path", lambda _, index: str(index))
    monkeypatch.setattr(evaluate, "read_image_batches", batches)
    monkeypatch.setattr(evaluate, "print_at_once", lambda _: False)
    args = SimpleNamespace(json=None, predictions=None)
    for group, n in (("of ranks", 3), (None, 1)):
        made.clear()
        evaluate.read_images(SimpleNamespace(rotate_tall=False), args, group)
        assert len(made) == n


def test_files_of_images(bench, call, tmp_path):
    """--json without what was printed, with confidences of other characters, or of steps after the end; a
    damaged image that is missing in it. Their product is the word's confidence, which is net.read's."""
    names = [str(bench / "set" / f"{k}.png") for k in (0, 7, 3, 5)]
    ckpt = tmp_path / "ends.pt"
    state = torch.load(bench / "tiny.pt", weights_only=True)
    state["model"]["classifier.bias"][94] = 22                              # words of 2 and of 10 characters
    torch.save(state, ckpt)
    status, out, err = call("--ckpt", ckpt, "--workers", 0, "--json", tmp_path / "r.json",
                            "--predictions", tmp_path / "p.tsv", "--images", *names)
    refused((status, "", err), "1 of 4", "7.png")
    rows = json.loads((tmp_path / "r.json").read_text())["images"]
    assert [row["path"] for row in rows] == names
    assert rows.pop(1) == {"path": names.pop(1), "text": None, "confidence": None}

    net = evaluate.load_recognizer(str(ckpt))
    crops = torch.stack([data.open_source(bench / "set" / "labels.tsv")[k][0] for k in (0, 3, 5)])
    printed = [line.split("\t") for line in out.splitlines()]
    for row, (text, confidence), line in zip(rows, net.read(crops), printed):
        assert row["text"] == text == line[1] and len(row["characters"]) == len(text)
        assert row["confidence"] == pytest.approx(confidence) == pytest.approx(float(line[2]), rel=1e-5)
        assert np.prod(row["characters"]) * row["end"] == pytest.approx(confidence)
        assert all(0 < sure < 1 for sure in row["characters"]) and 0 < row["end"] <= 1
    assert len({len(row["text"]) for row in rows}) > 1

    # the first character's confidence is that of the first step alone
    _, confidences = net.decode(model.normalize_pixels(crops))
    assert np.allclose([row["characters"][0] for row in rows], confidences[:, 0], rtol=1e-4)
    lines = columns(tmp_path / "p.tsv")
    assert [line[0] for line in lines] == [""] * 4 and lines[1][1:3] == ["", "damaged"]
    assert [line[1:] for line in lines[:1] + lines[2:]] == [[line[1], line[2], line[0]] for line in printed]


def test_another_script_is_never_all_right(bench, call, tmp_path):
    """waics keeps nothing of Cyrillic, so that every reading equals every label: a table of 100 % for
    rubbish. So a checkpoint with a charset of its own is scored under exact, and where waics is asked for,
    the table has no accuracy and says why."""
    protocols = [evaluate.default_protocol(chars) for chars in (*data.CHARSETS.values(), "хлеб")]
    assert protocols == ["waics", "waics", "waics", "exact"]
    assert evaluate.default_protocol("0123456789") == "exact"               # one's own as well
    pairs = [("хлеб", "ночь"), ("вода", "вода")]
    assert evaluate.score(pairs, "exact")["accuracy"] == 50
    assert evaluate.score(pairs, "waics") == dict(n=2, evaluated=2, dropped={}, accuracy=None, ned=None)
    state = torch.load(bench / "tiny.pt", weights_only=True)
    torch.save(dict(state, charset="".join(map(chr, range(0x400, 0x400 + 94)))), tmp_path / "own.pt")
    (tmp_path / "labels.tsv").write_text(f"{bench}/set/0.png\tхлеб\n", encoding="utf-8")
    command = ["--ckpt", tmp_path / "own.pt", "--data", tmp_path / "labels.tsv", "--workers", 0]
    _, out, _ = call(*command)
    assert "protocol exact" in out and re.search("average +0.00", out)
    _, out, _ = call(*command, "--protocol", "waics")
    assert re.search("average +-\n", out) and "no label has what counts" in out


class Bomb:
    def __reduce__(self):
        return os.system, ("echo ran > bomb_ran",)


def test_untrusted_and_foreign_checkpoints(bench, call, tmp_path, monkeypatch):
    """A pickle that would run code does not run it; what is missing, torn, of another kind or of another
    shape is refused. Each in one line with exit status 2."""
    monkeypatch.chdir(tmp_path)

    def read_with(ckpt):
        return call("--ckpt", ckpt, "--data", bench / "set" / "labels.tsv", "--workers", 0)

    torch.save({"model": {}, "args": Bomb(), "charset": "ab"}, "bomb.pt")
    refused(read_with("bomb.pt"), "bomb.pt")
    assert not os.path.exists("bomb_ran")
    torch.load("bomb.pt", weights_only=False)
    assert os.path.exists("bomb_ran"), "the bomb is a dud, so the check above says nothing"

    refused(read_with("nowhere.pt"), "nowhere.pt", "No such file")
    torch.save({"model": {"cls_token": torch.zeros(1)}}, "encoder.pt")
    refused(read_with("encoder.pt"), "encoder.pt", "not a recognizer")
    with open("torn.pt", "wb") as file:
        file.write((bench / "tiny.pt").read_bytes()[:1000])
    refused(read_with("torn.pt"), "torn.pt")

    state = torch.load(bench / "tiny.pt", weights_only=True)
    torch.save(dict(state, charset=state["charset"][:-1]), "shape.pt")
    refused(read_with("shape.pt"), "shape.pt", "tensors match")
    for name in ("model", "charset", "args"):
        torch.save({key: state[key] for key in state if key != name}, "part.pt")
        refused(read_with("part.pt"), "part.pt", "not a recognizer")
    for name in ("spell", "max_length", "model"):
        args = {key: state["args"][key] for key in state["args"] if key != name}
        torch.save(dict(state, args=args), "older.pt")
        refused(read_with("older.pt"), "older.pt", "not a recognizer")
    for name, value in (("model", None), ("charset", 5)):
        torch.save(dict(state, **{name: value}), "odd.pt")
        refused(read_with("odd.pt"), "odd.pt", "not a recognizer")
    for name, value in (("max_length", "25"), ("max_length", 0), ("spell", "x"), ("model", [])):
        torch.save(dict(state, args=dict(state["args"], **{name: value})), "odd.pt")
        refused(read_with("odd.pt"), "odd.pt", "not a recognizer")


def test_the_weights_that_ship(call, tmp_path):
    """Without --ckpt the stored weights read stored crops of rendered words, named by their labels. Catches
    weights of another size than MODELS', a charset in another order, another resizing or normalising of crops
    than in training, and a remark on stdout, where only readings belong."""
    crops = sorted(CROPS.glob("*.png"))
    labels = [crop.stem for crop in crops]
    assert len(labels) >= 8
    status, out, err = call("--images", *crops)
    assert status == 0
    rows = [line.split("\t") for line in out.splitlines()]
    assert [row[1] for row in rows] == labels
    assert "reader.pt" in err
    assert "trained" in err
    images = torch.stack([data.open_source(str(CROPS))[i][0] for i in range(len(crops))])
    assert [text for text, _ in evaluate.load_recognizer().read(images)] == labels


def test_the_mean_of_recognizers(tmp_path, monkeypatch):
    """A sum, or the first recognizer, in the place of the mean. A mean over charsets that hold the same
    characters in another order, over two sizes, or with what is no recognizer: it ships, and reads nothing."""
    make_reader = runpy.run_path(os.path.join(ROOT, "assets", "make_reader.py"))
    flags = {"model": "vit_nano", "max_length": 25, "spell": 0.5, "rotate_tall": False, "lr": 0.1}
    first = {"model": {"w": torch.tensor([1.0, -1.0])}, "args": flags, "charset": "ab", "step": 7}
    second = dict(first, model={"w": torch.tensor([2.0, 2.0])}, step=8)
    third = dict(first, model={"w": torch.tensor([6.0, 5.0])})

    def mean_of(*checkpoints):
        paths = []
        for k, checkpoint in enumerate(checkpoints):
            paths.append(str(tmp_path / f"{k}.pt"))
            torch.save(checkpoint, paths[-1])
        monkeypatch.setattr(sys, "argv", ["make_reader.py", *paths, "--out", str(tmp_path / "r.pt")])
        make_reader["main"]()
        return torch.load(tmp_path / "r.pt", weights_only=True)

    made = mean_of(first, second, third)
    assert made["model"]["w"].dtype == torch.float16 and made["model"]["w"].tolist() == [3, 2]
    assert made["charset"] == "ab" and made["step"] == 7 and "research" in made["about"]
    assert made["args"] == {name: flags[name] for name in ("model", "max_length", "spell", "rotate_tall")}

    os.remove(tmp_path / "r.pt")
    no_recognizer = {name: value for name, value in first.items() if name != "charset"}
    others = {"another --charset": dict(first, charset="ba"), "no recognizer": no_recognizer,
              "--model vit_mini": dict(first, args=dict(flags, model="vit_mini"))}
    for why, other in others.items():
        with pytest.raises(common.UserError, match=f"1.pt: {why}"):
            mean_of(first, other)
    assert not (tmp_path / "r.pt").exists()


def test_refusals(bench, call, tmp_path):
    """Wrong flags, one set twice, a label that a TSV cannot hold, a place that cannot be written, a device
    that is not there: each in one line, before any table."""
    src, ckpt = bench / "set" / "labels.tsv", ["--ckpt", bench / "tiny.pt", "--workers", 0]
    refused(call(*ckpt), "--data", "--images", "--score")
    refused(call(*ckpt, "--data", bench / "set"), "no label", "--images")
    refused(call(*ckpt, "--data", src, src), "twice")
    refused(call(*ckpt, "--data", src, "--heights", 40), "--heights 40")
    refused(call(*ckpt, "--data", src, "--rotations", 120), "--rotations")
    refused(call(*ckpt, "--data", src, "--batch_size", 0), "--batch_size")
    refused(call(*ckpt, "--data", src, "--json", src / "r.json"), "labels.tsv: File exists")
    refused(call(*ckpt, "--data", src, "--device", "banana"), "--device banana")
    for name, label in (("tab", "a\tb"), ("line", "a\nb")):
        labels = bench / "set" / f"{name}.jsonl"
        labels.write_text(json.dumps({"filename": "0.png", "text": label}))
        got = call(*ckpt, "--data", labels, "--predictions", tmp_path / "p.tsv")
        refused(got, repr(label), "tab or line end")
        assert call(*ckpt, "--data", labels)[0] == 0


@pytest.mark.parametrize("flags, part", [
    ("--score p.tsv --ckpt x.pt", "--ckpt has no effect with --score"),
    ("--score p.tsv --batch_size 4", "--batch_size has no effect with --score"),
    ("--score p.tsv --workers=0", "--workers has no effect with --score"),
    ("--score p.tsv --device cpu", "--device has no effect with --score"),
    ("--score p.tsv --dtype float32", "--dtype has no effect with --score"),
    ("--score p.tsv --rotate_tall", "--rotate_tall has no effect with --score"),
    ("--score p.tsv --fonts f", "--fonts needs --data"),
    ("--score p.tsv --heights 8", "--heights needs --data"),
    ("--score p.tsv --rotations 8", "--rotations needs --data"),
    ("--score p.tsv --predictions q.tsv", "--predictions needs --data or --images"),
    ("--score p.tsv --errors e.png", "--errors needs --data"),
    ("--score p.tsv --attention a", "--attention needs --data"),
    ("--ckpt x.pt --images a.png --protocol ci", "--protocol has no effect with --images"),
    ("--ckpt x.pt --images a.png --max_damaged 1", "--max_damaged has no effect with --images"),
    ("--ckpt x.pt --images a.png --heights 8", "--heights needs --data"),
    ("--ckpt x.pt --images a.png --rotations 8", "--rotations needs --data"),
    ("--ckpt x.pt --images a.png --errors e.png", "--errors needs --data"),
    ("--ckpt x.pt --images a.png --attention a", "--attention needs --data"),
    ("--ckpt x.pt --images a.png --fonts f", "--fonts needs --data"),
    ("--ckpt x.pt --data synth", "--data synth: a million words"),
    ("--ckpt x.pt --data synth:9@3", "--data synth:9@3: a set is read once; leave @3 out"),
    ("--ckpt x.pt --data l.tsv@2", "--data l.tsv@2: a set is read once; leave @2 out"),
    ("--score p.tsv --json p.tsv", "p.tsv: p.tsv is read, and would be changed"),
    ("--ckpt x.pt --images a.png --json x.pt", "x.pt: x.pt is read, and would be changed"),
    ("--images a.png --predictions ./a.png", "./a.png: a.png is read, and would be changed"),
    ("--data l.tsv --json r --predictions ./r", "r ./r: one name for two results"),
    ("--data l.tsv --json r --attention r", "r r: one name for two results"),
    ("--data l.tsv --json -", "-: expected the name of a file; /dev/stdout is the terminal"),
    ("--data l.tsv --errors e.png --predictions out/", "out/: expected the name of a file"),
    ("--data l.tsv --predictions c/0.PNG", "c/0.PNG: expected the name of a text file"),
    ("--data lmdb --json lmdb/data.mdb", "lmdb/data.mdb: expected the name of a text file"),
    ("--ckpt x.pt --data set --fonts f", "--fonts f: has no effect without rendered words"),
    ("--ckpt x.pt --data synth:4 synth:4:1 --rotate_tall", "--rotate_tall has no effect on rendered words"),
])
def test_a_flag_without_effect_is_refused(call, flags, part):
    """A flag passed over in silence: its user believes that it was heeded. A result in the place of a crop."""
    refused(call(*flags.split()), part)


@pytest.mark.parametrize("script", [data, evaluate])
def test_help_without_docstrings(script, monkeypatch, capsys):
    """A traceback under python -OO, which leaves docstrings out."""
    monkeypatch.setattr(script, "__doc__", None)
    monkeypatch.setattr(sys, "argv", ["script.py", "--help"])
    with pytest.raises(SystemExit) as end:
        script.main()
    assert end.value.code == 0 and "usage: script.py" in capsys.readouterr().out


def test_flags_with_an_effect_are_taken(bench, call, monkeypatch):
    """A check that refuses what works: a set of crops beside synth may need --fonts and --rotate_tall."""
    for flags in ("--data set synth:4 --fonts f --rotate_tall", "--images a.png --rotate_tall --workers 0"):
        got = call("--ckpt", bench / "nowhere.pt", *flags.split())
        refused(got, "nowhere.pt", "No such file")


def test_two_sets_of_one_name(bench, call, tmp_path, monkeypatch):
    """train/SVT and test/SVT, or old/SVT and SVT, are two rows, not one that overwrites the other."""
    for name, n in (("a", 1), ("b", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "labels.tsv").write_text(f"{bench}/set/0.png\tx\n" * n)
    monkeypatch.chdir(tmp_path / "b")
    ckpt = ["--ckpt", bench / "tiny.pt", "--workers", 0]
    call(*ckpt, "--json", tmp_path / "r.json", "--data", tmp_path / "a" / "labels.tsv", "labels.tsv")
    got = timeless(tmp_path / "r.json")["sets"]
    sizes = {name: one["n"] for name, one in got.items()}
    assert sizes == {"labels.tsv": 1, str(tmp_path / "b" / "labels.tsv"): 2}
    monkeypatch.chdir(tmp_path)
    call(*ckpt, "--predictions", "p.tsv", "--json", "r.json", "--data", "a/labels.tsv", "b/labels.tsv")
    assert list(timeless(tmp_path / "r.json")["sets"]) == ["labels.tsv", "b/labels.tsv"]
    places = [row[3].split()[0] for row in columns(tmp_path / "p.tsv")]
    assert places == ["labels.tsv", "b/labels.tsv", "b/labels.tsv"]
    for name in "x", "y":                       # trees of LMDBs, whose crops have the names of their parts
        (tmp_path / name / "tree").mkdir(parents=True)
        for part in "a", "b":
            data.write_lmdb(str(tmp_path / name / "tree" / part), data.open_source("synth:1"), set(), 0)
    call(*ckpt, "--predictions", "p.tsv", "--data", "x/tree", "y/tree")
    places = [row[3].split()[0] for row in columns(tmp_path / "p.tsv")]
    assert places == ["tree/a", "tree/b", "y/tree/a", "y/tree/b"]
    twice = [bench / "set" / "labels.tsv", bench / "set" / ".." / "set" / "labels.tsv"]
    refused(call(*ckpt, "--data", *twice), "one set twice")
    refused(call(*ckpt, "--data", "x/tree", "x/tree/a"), "--data x/tree x/tree/a: one set twice, or a part")
    refused(call(*ckpt, "--data", "synth:3", "synth:4:00"), "one set twice")


# ---- robustness

def test_heights_and_rotations():
    """32 pixels and 0 degrees return the crop itself, or the drop would measure the resampling. 8 pixels are
    means, not samples: they forget noise, and stripes of 2 pixels. So do 30 degrees with stripes of one, which
    fewer points would alias. A turned crop is what Pillow makes with a grown canvas; a wrong sign, aspect or
    order of turning and squeezing would show."""
    crop = torch.rand(1, 3, 32, 128, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(evaluate.reduce_height(crop, 32), crop, atol=1e-5)
    assert torch.allclose(evaluate.rotate(crop, 0.0), crop, atol=1e-5)

    assert evaluate.reduce_height(crop, 8).std() < 0.1 < crop.std()         # of noise, averaged
    picture = Image.fromarray((crop[0] * 255).byte().permute(1, 2, 0).numpy())
    for height, apart in ((16, 0.009), (8, 0.0045)):                        # Pillow's bicubic is a bit softer
        want = picture.resize((4 * height, height), Image.BILINEAR).resize((128, 32), Image.BICUBIC)
        want = torch.from_numpy(np.array(want)).permute(2, 0, 1) / 255
        assert (evaluate.reduce_height(crop, height)[0] - want).abs().mean() < apart
    stripes = (torch.arange(128) // 2 % 2).float().expand(1, 3, 32, 128)
    assert evaluate.reduce_height(stripes, 8).std() < 0.1 < evaluate.reduce_height(stripes, 32).std()
    lying = (torch.arange(32) % 2).float()[:, None].expand(1, 3, 32, 128)
    assert evaluate.rotate(lying, 30)[..., 12:20, 50:78].std() < 0.1        # 0.16 with 2 x 2 points

    blobs = F.interpolate(crop[:, :, :4, :16], size=(32, 128), mode="bicubic").clamp(0, 1)
    blobs[:, :, [0, -1]] = 0    # what lies outside is black in both
    blobs[..., [0, -1]] = 0
    picture = Image.fromarray((blobs[0] * 255).byte().permute(1, 2, 0).numpy())
    for degrees in (20, -40):
        turned = picture.resize((1024, 256), Image.BOX).rotate(degrees, Image.BILINEAR, expand=True)
        turned = turned.resize((128, 32), Image.BOX)
        want = torch.from_numpy(np.array(turned)).permute(2, 0, 1) / 255
        assert (evaluate.rotate(blobs, degrees)[0] - want).abs().mean() < 0.02, degrees


def test_the_net_reads_the_views(bench, call, monkeypatch):
    """A drop that is always 0: views that are made and not read, values mixed up, or one view on top of
    another."""
    given = []

    def read(net, images, batch_size, dtype):
        assert (batch_size, dtype) == (9, torch.bfloat16)                   # as they were typed
        given.append(images)
        return [("x", 0.5)] * len(images)

    monkeypatch.setattr(model.Recognizer, "read", read)
    src = bench / "set" / "labels.tsv"
    call("--ckpt", bench / "tiny.pt", "--data", src, "--workers", 0, "--device", "cpu",
         "--batch_size", 9, "--dtype", "bfloat16", "--heights", 16, 8, "--rotations", 30)
    source = data.open_source(src)
    crops = common.to_unit(torch.stack([source[i][0] for i in (0, 1, 2, 3, 4, 5, 6, 8)]))
    plain, *views = map(common.to_unit, given)
    wanted = [evaluate.reduce_height(crops, height) for height in (16, 8)] + [evaluate.rotate(crops, 30)]
    assert torch.equal(plain, crops) and len(views) == 3
    for view, want in zip(views, wanted):
        assert torch.allclose(view, want) and not torch.allclose(view, crops, atol=0.1)


# ---- pictures

@pytest.mark.parametrize("label, text, said", [
    ("Hotel!", "hotel", "hotel"), ("hotel", "hatel", "hAtel"), ("hotel", "htel", "h_tel"),
    ("hotel", "hotels", "hotelS"), ("hotel", "", "_____"), ("ab", "xyz", "XYZ"), ("abcd", "axd", "aX_d"),
])
def test_wrong_letters_are_marked(label, text, said):
    """Red (upper case here) is for letters that the protocol counts as wrong, and for missing ones; case and
    symbols are no error under waics."""
    pieces = evaluate.mark_errors(label, text, "waics")
    assert {colour for _, colour in pieces} <= {evaluate.RED, evaluate.BLACK}
    shown = [letters.upper() if colour == evaluate.RED else letters for letters, colour in pieces]
    assert "".join(shown) == said


class Rendered(data.Source):
    """Three grey crops whose text is the left 36 columns: four patches of 8 and half of one."""
    name = "rendered"

    def __len__(self):
        return 3

    def get(self, i):
        mask = torch.zeros(32, 128, dtype=torch.uint8)
        mask[:, :36] = i + 1
        return data.Crop(torch.full((3, 32, 128), 90 * i, dtype=torch.uint8), "ab", mask)


def test_views_are_scored_as_the_crops_are(monkeypatch):
    """Views that another protocol judges: a drop that is none. A set whose seconds hold those of the sets
    before it."""
    net = SimpleNamespace(device=torch.device("cpu"), read=lambda images, *_: [("AB!", 0.5)] * len(images))
    args = SimpleNamespace(dtype="float32", batch_size=2, workers=0)
    sources = {"one": Rendered(), "two": Rendered()}
    clock = itertools.count(0, 5)
    monkeypatch.setattr(evaluate, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    for protocol, accuracy in (("waics", 100), ("exact", 0)):
        got = evaluate.read_changed(net, sources, protocol, args, None, evaluate.reduce_height, [8])["8"]
        assert got["protocol"] == protocol and got["average"] == accuracy
        assert [row["seconds"] for row in got["sets"].values()] == [5, 5]


def test_attention_on_text(bench, tmp_path, monkeypatch):
    """Attention spread evenly has the text's share of the area and entropy 1; attention on one text patch has
    share 1 and entropy 0. Catches rows and columns of the grid exchanged, [cls] left among the keys, the
    end counted as a letter, and crops that the net is not shown as in training."""
    net = evaluate.load_recognizer(str(bench / "tiny.pt"))
    h, w = net.encoder.grid
    monkeypatch.setattr(evaluate, "N_DRAWN", 2)                             # all three are measured
    even = torch.full((3, 1 + h * w), 1 / (1 + h * w))
    point = torch.zeros(3, 1 + h * w)
    point[:, 0], point[:, 1 + w] = 0.5, 0.5                                 # [cls]; the first patch of row 2
    ids = torch.tensor([[0, 1, net.end], [0, net.end, net.end], [2, 3, 4]])
    last_patch = F.one_hot(torch.tensor(h * w - 1), h * w).float()
    crops = torch.stack([Rendered().get(i).image for i in range(3)])
    shown = []

    def look(net, images):
        shown.append(images)
        return ids, encoder, decoder
    monkeypatch.setattr(evaluate, "attention", look)
    for weights, share, entropy in ((even, 36 / 128, 1), (point, 1, 0)):
        encoder = weights[:, None].expand(-1, 1 + h * w, -1)
        decoder = weights[:, 1:] / weights[:, 1:].sum(1, keepdim=True)
        decoder = decoder[:, None].repeat(1, 3, 1)
        decoder[ids == net.end] = last_patch                                # which is no text
        got = evaluate.report_attention(net, Rendered(), str(tmp_path / "look.png"))
        assert torch.equal(shown.pop(), model.normalize_pixels(crops))
        assert got["n"] == 3 and got["text_area"] == pytest.approx(36 / 128)
        for who in ("cls", "patches", "decoder"):
            assert got[who] == pytest.approx({"share": share, "entropy": entropy}, abs=1e-5), who

    sheet = np.array(Image.open(tmp_path / "look.png")).astype(int)
    assert len(sheet) == 2 * 90                                             # N_DRAWN
    encoder = point[:, None].repeat(1, 1 + h * w, 1)
    encoder[:, 0] = even                                                    # of [cls] alone
    got = evaluate.report_attention(net, Rendered(), str(tmp_path / "even.png"))
    assert got["cls"]["share"] == pytest.approx(36 / 128) and got["patches"]["share"] == pytest.approx(1)
    cell = sheet[4:68, 268 + 6:268 + 262]                                   # the first [cls], magnified twice
    red = cell[..., 0] - cell[..., 1] > 100
    (p, q), (y, x) = net.encoder.patch, red.nonzero()
    assert (y.min(), y.max(), x.min(), x.max()) == (2 * p, 4 * p - 1, 0, 2 * q - 1)

    photo = data.Files([(str(bench / "set" / "0.png"), "a")], "", "x")
    assert evaluate.report_attention(net, photo, str(tmp_path / "x.png")) is None


def test_each_letter_has_its_own_look(monkeypatch):
    """A letter above what the net looked at for the next one, or a crop beside another's label."""
    rows = []
    monkeypatch.setattr(evaluate, "draw_sheet", lambda drawn, path: rows.extend(drawn))
    net = SimpleNamespace(charset="abc", end=3, encoder=SimpleNamespace(grid=(4, 16)))
    ids = torch.tensor([[1, 0, 3], [2, 3, 3]])
    encoder, decoder = torch.zeros(2, 65, 64), torch.zeros(2, 3, 64)
    encoder[:, 0, 40] = encoder[:, 1:, 50] = 1                              # [cls] looks at patch 40
    decoder[0, range(3), range(3)] = decoder[1, range(3), range(20, 23)] = 1
    images = torch.stack([torch.zeros(3, 32, 128), torch.full((3, 32, 128), 90)]).byte()
    evaluate.draw_attention(net, images, ["ba", "C"], ids, encoder, decoder, "x.png")
    wanted = [{"[cls]": 40, "b": 0, "a": 1}, {"[cls]": 40, "c": 20}]
    for (crop, *looks), image, label, places in zip(rows, images, ["ba", "C"], wanted, strict=True):
        assert torch.equal(crop[0], image) and crop[1][0][0] == label
        red_patch = {}
        for picture, ((title, _),) in looks:
            red = picture[0, 4::8, 4::8].int() - picture[1, 4::8, 4::8] > 100       # (4, 16)
            (red_patch[title],) = red.flatten().nonzero().flatten().tolist()
        assert red_patch == places


def test_faint_attention_looks_faint(monkeypatch):
    """An even spread, which means nothing, drawn in full red."""
    rows = []
    monkeypatch.setattr(evaluate, "draw_sheet", lambda drawn, path: rows.extend(drawn))
    net = SimpleNamespace(charset="abc", end=3, encoder=SimpleNamespace(grid=(4, 16)))
    even = torch.full((1, 65, 64), 1 / 64)
    image = torch.zeros(1, 3, 32, 128).byte()
    evaluate.draw_attention(net, image, ["a"], torch.tensor([[0]]), even, even[:, :1], "x.png")
    assert len(rows) == 1 and len(rows[0]) == 3
    for picture, _ in rows[0][1:]:                                          # a quarter red, the rest grey
        assert picture[0].unique().tolist() == [int(0.75 * 127 + 0.25 * evaluate.RED[0])]


def test_each_set_has_its_own_picture(bench, tmp_path, monkeypatch):
    """The sets a/b and a_b in one file: the second picture over the first."""
    drawn = []
    monkeypatch.setattr(evaluate, "report_attention", lambda net, source, path: drawn.append((source, path)))
    names = ["a/b", "a_b", "a b", "SVT"]
    got = evaluate.report_attention_on_sets(None, {name: name for name in names}, str(tmp_path))
    assert got == {} and [source for source, _ in drawn] == names
    assert len({path for _, path in drawn}) == 4 and drawn[3][1] == str(tmp_path / "SVT.png")


def test_a_word_without_letters_has_no_share(bench, tmp_path, monkeypatch):
    """The mean over no letter at all: NaN, which is no JSON."""
    net = evaluate.load_recognizer(str(bench / "tiny.pt"))
    n = net.encoder.grid[0] * net.encoder.grid[1]
    ends = torch.full((3, 1), net.end)
    even = torch.full((3, 1 + n, 1 + n), 1 / (1 + n))
    monkeypatch.setattr(evaluate, "attention", lambda *_: (ends, even, even[:, :1, 1:]))
    got = evaluate.report_attention(net, Rendered(), str(tmp_path / "look.png"))
    assert set(got) == {"n", "text_area", "cls", "patches"}


def test_real_attention_maps_sum_to_one(bench):
    """The recognizer's own maps, unpatched: of another layer, of keys that are not the crop's, or no shares;
    hooks that stay."""
    net = evaluate.load_recognizer(str(bench / "tiny.pt"))
    images = torch.rand(2, 3, 32, 128) * 2 - 1
    ids, encoder, decoder = evaluate.attention(net, images)
    n = np.prod(net.encoder.grid)
    assert encoder.shape[1:] == (1 + n, 1 + n) and decoder.shape == (*ids.shape, n)
    assert torch.equal(ids, net.decode(images)[0])
    for weights in (encoder, decoder):
        assert torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-4)
    assert not net.layers[-1].cross_attn._forward_pre_hooks
    assert not net.encoder.blocks[-1].attn._forward_pre_hooks

    # the encoder's maps by the definition, of the last block
    block, inputs = net.encoder.blocks[-1], []
    block.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    net.encoder(images)
    q, k, _ = block.attn.qkv(block.norm1(inputs[0])).chunk(3, -1)
    heads = zip(q.chunk(block.attn.heads, -1), k.chunk(block.attn.heads, -1))
    maps = [torch.softmax(a @ b.transpose(1, 2) / a.shape[-1] ** 0.5, -1) for a, b in heads]
    assert torch.allclose(sum(maps) / len(maps), encoder, atol=1e-5)

    # the letters' maps by the definition: softmax of q k' in each head, of the last layer, letter by letter
    _, memory = net.encode(images)
    layer, seen = net.layers[-1].cross_attn, []
    layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][:, -1:]))
    start = torch.full((2, 1), net.start)
    for t in range(ids.shape[1]):
        net.logits_after(torch.cat([start, ids[:, :t]], dim=1), memory)
    for t, x in enumerate(seen):
        q, k = layer.q(x).view(2, layer.heads, -1), memory[-1][0]
        maps = []
        for head in range(layer.heads):
            scores = (k[:, head] @ q[:, head, :, None])[..., 0]
            maps.append(torch.softmax(scores / q.shape[-1] ** 0.5, -1))
        assert torch.allclose(sum(maps) / layer.heads, decoder[:, t], atol=1e-5), t


# ---- export

def exported(module, name="images"):
    """What torch.export makes of a module of crops, for batches of any size."""
    example = torch.rand(2, 3, 32, 128)
    any_size = {name: {0: torch.export.Dim("batch")}}
    with torch.no_grad():
        return torch.export.export(module, (example,), dynamic_shapes=any_size).module()


def test_an_exported_encoder_takes_any_batch():
    """A batch that is frozen at the size of the example: as by a Python number in ViT.forward."""
    torch.manual_seed(0)
    encoder = model.ViT(**dict(model.MODELS["vit_square"]["encoder"], depth=1)).eval()
    outside = exported(encoder)
    for n in (1, 2, 5):
        images = torch.rand(n, 3, 32, 128) * 2 - 1
        assert torch.allclose(outside(images), encoder(images), atol=1e-5)


class FixedReader(torch.nn.Module):
    """The recipe of docs/gpus.md: Recognizer.decode without an early stop, which no graph can hold."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, images):
        return self.net.decode(images, stop_early=False)


@pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="2.6 takes its own guard for a limit of the batch")
def test_an_exported_reader_reads_the_same(bench):
    """A traced decode that stops where the example's words stopped, and cuts longer ones; a word that goes on
    after its end; the longest word without an end; a batch of one size."""
    net = evaluate.load_recognizer(str(bench / "tiny.pt"))
    net.max_length, net.encoder.blocks = 4, net.encoder.blocks[:1]          # a small graph
    net.classifier.bias.data[net.end] = 30                                  # words end at all lengths
    outside = exported(FixedReader(net).eval())
    images = torch.rand(40, 3, 32, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1
    lengths = set()
    for part in (images[:1], images[:2], images):
        characters, confidences = outside(part)
        wanted, sure = net.decode(part)
        n = wanted.shape[1]
        assert characters.shape[1] == net.max_length + 1
        assert torch.equal(characters[:, :n], wanted) and (characters[:, n:] == net.end).all()
        assert torch.allclose(confidences[:, :n], sure, rtol=1e-3) and (confidences[:, n:] == 1).all()
        lengths |= set((wanted != net.end).sum(1).tolist())
    assert lengths >= {0, 2, 4}


def test_lines_are_drawn_for_who_reads_lines():
    """Rendered lines that end at 25 characters, for a recognizer that learned to read 40."""
    args = SimpleNamespace(data=["synth:200"], fonts=None, rotate_tall=False)
    longest = {}
    for max_length in (10, 25, 40):
        net = SimpleNamespace(charset=data.CHARSETS["94"], max_length=max_length)
        words = evaluate.open_sets(args, net)["synth"]
        longest[max_length] = max(len(words.label(i)) for i in range(200))
    assert longest[10] == longest[25] <= 25 < longest[40] <= 40


def test_rendered_words_are_those_that_were_asked_for(tmp_path):
    """Characters that the recognizer has not; the system's fonts in the place of --fonts."""
    args = SimpleNamespace(data=["synth:20"], fonts=None, rotate_tall=False)
    net = SimpleNamespace(charset="xyz", max_length=25)
    words = evaluate.open_sets(args, net)["synth"]
    assert set("".join(words.label(i) for i in range(20))) == set("xyz")
    args.fonts = str(tmp_path)
    with pytest.raises(common.UserError, match="--fonts .*: no .ttf"):
        evaluate.open_sets(args, net)


def test_dtype_is_heeded(bench, call, tmp_path, monkeypatch):
    """Half precision that was asked for and never used, or used where nobody asked."""
    used = []
    decode = model.Recognizer.decode

    def look(net, images):
        used.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32)
        return decode(net, images)
    monkeypatch.setattr(model.Recognizer, "decode", look)
    (tmp_path / "labels.tsv").write_text(f"{bench}/set/0.png\ta\n")
    for what in (["--data", tmp_path / "labels.tsv"], ["--images", bench / "set" / "0.png"]):
        for dtype in ("bfloat16", "float32"):
            call("--ckpt", bench / "tiny.pt", *what, "--workers", 0, "--device", "cpu", "--dtype", dtype)
            assert used.pop() == getattr(torch, dtype)
