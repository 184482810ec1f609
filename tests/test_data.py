"""Tests of data.py. Each docstring names the mistake that the test would catch. Crops are made here.

    pytest tests/test_data.py
    STR_DATA=folder/of/lmdbs pytest tests/test_data.py        also reads real crops
"""
import colorsys
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import string
import struct
import subprocess
import sys
import time
import tracemalloc
import warnings
import zlib
from types import SimpleNamespace

import lmdb
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import multiprocessing

import data
import evaluate
import finetune
import render
from common import to_unit
from data import Damaged, UserError

SCRIPTS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def picture(i, width=90, height=30):
    """A word-like picture that no other i has."""
    rng = random.Random(i)
    image = Image.new("RGB", (width, height), tuple(rng.randrange(256) for _ in range(3)))
    draw = ImageDraw.Draw(image)
    for _ in range(6):
        x, y = rng.randrange(width), rng.randrange(height)
        fill = tuple(rng.randrange(256) for _ in range(3))
        draw.rectangle((x, y, x + rng.randrange(4, 30), y + rng.randrange(4, 15)), fill)
    return image


def encode(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def write_lmdb(folder, entries, count=True):
    """entries: [(bytes or None, label bytes or None)]; None leaves the key out."""
    os.makedirs(folder)
    with lmdb.open(str(folder), map_size=2 ** 26) as env, env.begin(write=True) as txn:
        for i, (image, label) in enumerate(entries, 1):
            for kind, value in ((b"image", image), (b"label", label)):
                if value is not None:
                    txn.put(b"%s-%09d" % (kind, i), value)
        if count:
            txn.put(b"num-samples", b"%d" % len(entries))
    return str(folder)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """An LMDB of 50 crops, the label of number i being f"w{i}"."""
    entries = [(encode(picture(i)), b"w%d" % i) for i in range(50)]
    return write_lmdb(tmp_path_factory.mktemp("data") / "words", entries)


def labels_of(batches, n):
    return [label for batch in itertools.islice(batches, n) for label in batch.labels]


def run_python(code):
    """A process of its own, in the folder of the scripts."""
    words = [sys.executable, "-c", code]
    return subprocess.run(words, cwd=SCRIPTS, capture_output=True, text=True, timeout=300)


def test_importing_does_nothing():
    """A limit of Pillow's, a filter of warnings or a hook that a program gets because it imported one
    function."""
    code = """
import atexit, os, tqdm, warnings, numpy, torch, torch.utils.data
from PIL import Image
import common, render
before = Image.MAX_IMAGE_PIXELS, list(warnings.filters), atexit._ncallbacks()
os.register_at_fork = None                                          # calling it would be an error
import data
assert before == (Image.MAX_IMAGE_PIXELS, list(warnings.filters), atexit._ncallbacks())
"""
    done = run_python(code)
    assert done.returncode == 0 and done.stdout == done.stderr == "", done.stderr


# ---- layouts

def test_lmdb(words):
    """Off-by-one: the first and the last crop are image-000000001 and image-{n}; iteration ends by itself."""
    source, labels = data.open_source(words), [f"w{i}" for i in range(50)]
    assert len(source) == 50 and source.name == "words" and source.where(49) == "words image-000000050"
    assert [label for _, label in source] == labels
    assert [source.label(i) for i in range(50)] == labels
    assert source[49][0].dtype == torch.uint8 and source[49][0].shape == (3, 32, 128)
    assert torch.equal(source[49][0], data.decode(encode(picture(49))))
    for wrong in (-1, 50):
        with pytest.raises(IndexError):
            source[wrong]


def test_one_lmdb_under_two_names(tmp_path, words):
    """lmdb opens a folder once in a process: a link to one that is open could not be read."""
    os.symlink(words, tmp_path / "link")
    source = data.open_sources([words, tmp_path / "link"])
    assert [source.label(i) for i in (0, 50)] == ["w0", "w0"]


def test_lmdb_without_num_samples(tmp_path):
    """Counting the keys would lose the last crop when one in the middle is missing."""
    entries = [(encode(picture(i)), b"x") for i in range(12)]
    entries[4] = (None, b"x")
    source = data.open_source(write_lmdb(tmp_path / "a", entries, count=False))
    one = write_lmdb(tmp_path / "b", [(encode(picture(0)), None)], count=False)
    assert len(source) == 12 and len(data.open_source(one)) == 1
    with pytest.raises(Damaged, match="image-000000005 is missing"):
        source[4]


def test_num_samples_that_is_not_true(tmp_path, capsys):
    """Crops that are passed over in silence, or memory for a million million; a count refused for the line end
    behind it."""
    entries = [(encode(picture(i)), b"x") for i in range(6)]
    for name, count in {"few": b"4\n", "many": b"10", "huge": b"999999999999", "impossible": b"14"}.items():
        with lmdb.open(write_lmdb(tmp_path / name, entries)) as env, env.begin(write=True) as txn:
            txn.put(b"num-samples", count)
    few = data.open_source(str(tmp_path / "few"))
    many = data.open_source(str(tmp_path / "many"))
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "num-samples says 4; images after that, up to 6" in said
    assert len(few) == 4 and len(many) == 10                                 # four of them damaged
    for name in "huge", "impossible":
        with pytest.raises(UserError, match="13 entries"):
            data.open_source(str(tmp_path / name))


def test_lmdb_labels(tmp_path):
    """A set without any label is unlabelled, but a single missing or undecodable label is damage, not an
    empty word; and none to pre-training, which asks for no label and would lose a whole image."""
    image = encode(picture(0))
    assert data.open_source(write_lmdb(tmp_path / "none", [(image, None)] * 3))[2][1] is None
    some = [(image, "é".encode()), (image, None), (image, b"\xff\xfe")]
    source = data.open_source(write_lmdb(tmp_path / "some", some))
    assert source[0][1] == "é"
    for i, why in ((1, "label-000000002 is missing"), (2, "not UTF-8")):
        with pytest.raises(Damaged, match=why):
            source[i]
        assert data.open_source(str(tmp_path / "some"), labels=False)[i][1] is None
    for name in "a", "b":
        write_lmdb(tmp_path / "tree" / name, some)
    assert data.open_source(str(tmp_path / "tree"), labels=False)[5][1] is None


def test_tree_and_several(tmp_path, words):
    """Folders in the order of the file system would give another data set on another machine."""
    for name in "b", "a/y", "a/x":
        write_lmdb(tmp_path / "tree" / name, [(encode(picture(0)), f"{name}{i}".encode()) for i in range(2)])
    tree = data.open_source(str(tmp_path / "tree"))
    assert [tree.label(i) for i in range(len(tree))] == ["a/x0", "a/x1", "a/y0", "a/y1", "b0", "b1"]
    assert [part.name for part in tree.parts] == ["tree/a/x", "tree/a/y", "tree/b"]
    assert tree.where(5) == "tree/b image-000000002"
    write_lmdb(tmp_path / "alone" / "c", [(encode(picture(0)), b"x")])
    assert data.open_source(str(tmp_path / "alone")).name == "alone"            # a set is named by its folder
    both = data.open_sources([words, str(tmp_path / "tree"), os.path.join(words, "..", "words")])
    assert len(both) == 106 and both[105][1] == "w49"
    assert both.label(52) == "a/y0" and both.parts[1].name == "tree"
    thrice = data.open_sources([f"{words}@3", "synth:2"])
    assert len(thrice) == 152 and thrice[149][1] == "w49" and thrice.where(151) == "synth:2:0 word 1"
    at = write_lmdb(tmp_path / "at@2", [(encode(picture(0)), b"x")])                # its own name
    assert len(data.open_sources([at])) == 1 and len(data.open_sources([f"{at}@3"])) == 3
    for wrong in ("0", "-1", "1.5", "ten", ""):
        with pytest.raises(UserError, match=f"words@{wrong}: no such file or folder, nor SRC@N with a whole"):
            data.open_sources([f"{words}@{wrong}"])


ROWS = [("a.png", "one"), ("sub dir/ü b.jpg", "two words "), ("a.png", " three"), ("sub dir/ü b.jpg", "")]
LAYOUTS = {
    "l.txt": "\ufeff" + "".join(f"{path}\t{label}\r\n" for path, label in ROWS[:2])
             + "\r\na.png\t three\nsub dir/ü b.jpg\t",
    "l.tsv": "".join(f"{path}\t{label}\n" for path, label in ROWS),
    "l.jsonl": "\n\n".join(json.dumps({"filename": path, "text": label, "more": 1}) for path, label in ROWS),
    "l.json": json.dumps({"metainfo": {}, "data_list": [{"img_path": path, "instances": [{"text": label}]}
                                                        for path, label in ROWS]}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_labels_files(tmp_path, monkeypatch, name):
    """A byte order mark or a Windows line end becomes part of a path or label, a space is lost; paths from
    here."""
    os.makedirs(tmp_path / "sub dir")
    picture(0).save(tmp_path / "a.png")
    picture(1).save(tmp_path / "sub dir" / "ü b.jpg")
    (tmp_path / name).write_bytes(LAYOUTS[name].encode())
    source = data.open_source(str(tmp_path / name))
    assert [label for _, label in source] == [label for _, label in ROWS]
    assert torch.equal(source[2][0], data.decode(encode(picture(0))))
    assert source.where(1) == f"{name} sub dir/ü b.jpg"
    monkeypatch.chdir(tmp_path)
    assert len(data.open_source(name)[3]) == 2
    os.remove(tmp_path / "a.png")
    with pytest.raises(Damaged, match="a.png: No such file"):
        source[0]


def test_folder(tmp_path):
    """Crops in another order on another machine; other files taken for images; labels where there are
    none."""
    for name in "b.PNG", "deep/er/a.jpg", "deep/10.png", "a.bmp":
        os.makedirs((tmp_path / name).parent, exist_ok=True)
        picture(0).save(tmp_path / name)
    (tmp_path / "readme.md").write_text("x")
    (tmp_path / "deep" / "er" / "round").symlink_to(tmp_path)   # read 40 times over, it would drown the rest
    (tmp_path / "deep" / "far").symlink_to("er")                # the same folder by another name
    source = data.open_source(str(tmp_path))
    assert [source.row(i)[0] for i in range(4)] == ["a.bmp", "b.PNG", "deep/10.png", "deep/er/a.jpg"]
    assert len(source) == 4 and source[3][1] is None


def test_a_link_to_a_folder_is_followed(tmp_path):
    """The crops of another disk, to which a link leads, left out in silence."""
    (tmp_path / "disk" / "deep").mkdir(parents=True)
    picture(0).save(tmp_path / "disk" / "deep" / "a.png")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "linked").symlink_to(tmp_path / "disk")
    assert len(data.open_source(tmp_path / "set")) == 1


def test_every_kind_of_image_is_found(tmp_path, capsys):
    """A folder of .jpeg or .webp whose crops are "not looked at"."""
    suffixes = "bmp gif jpeg jpg pgm png ppm tif tiff webp".split()
    for suffix in suffixes:
        picture(0).convert("L").save(tmp_path / f"{suffix}.{suffix}")
    source = data.open_source(str(tmp_path))
    assert [source.row(i)[0].split(".")[1] for i in range(len(source))] == suffixes
    for image, _ in source:
        assert (image.float() - source[5][0]).abs().mean() < 6
    assert capsys.readouterr().out == ""


def test_synth():
    """synth:N:SEED read in the wrong order; one seed's words for every seed."""
    source, other = data.open_source("synth:7:3"), data.open_source("synth:7:4")
    assert len(source) == 7 and len(data.open_source("synth")) == 1_000_000
    labels = [source.label(i) for i in range(7)]
    assert labels == [label for _, label in source]
    assert labels != [other.label(i) for i in range(7)]
    crop = source.get(3)
    assert crop.image.shape == (3, 32, 128) and crop.image.dtype == torch.uint8
    assert crop.char_map.shape == (32, 128) and crop.char_map.any()


def test_a_folder_called_synth(tmp_path, monkeypatch, capsys):
    """Rendered words in the place of somebody's folder of SynthText, unsaid."""
    monkeypatch.chdir(tmp_path)
    data.open_source("synth")
    assert capsys.readouterr().out == ""
    os.mkdir("synth")
    data.open_source("synth")
    said = "synth: rendered words, not the file or folder of that name; for that type ./synth\n"
    assert capsys.readouterr().out == said
    with pytest.raises(UserError, match="./synth: holds nothing"):
        data.open_source("./synth")


def test_foreign_sources(tmp_path, words):
    """A stack trace, or silence, where one line should say what came, what was expected and what to type."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x.csv").write_text("a")
    with lmdb.open(str(tmp_path / "foreign")) as env, env.begin(write=True) as txn:
        txn.put(b"key", b"value")
    write_lmdb(tmp_path / "zero", [])
    (tmp_path / "junk").mkdir()
    (tmp_path / "junk" / "data.mdb").write_bytes(b"x" * 9000)
    (tmp_path / "short").mkdir()
    whole = open(os.path.join(words, "data.mdb"), "rb").read()
    (tmp_path / "short" / "data.mdb").write_bytes(whole[:-4096])            # a page less: reading it is SIGBUS
    with pytest.raises(UserError, match="copy it again"):
        data.open_lmdb(str(tmp_path / "short"))                             # which reads nothing yet
    foreign = {
        "a.txt": "path label\n",
        "b.jsonl": "{}",
        "c.jsonl": "[1",
        "d.json": "{}",
        "e.txt": "",
        "f.tsv": "no.png\tx",
        "g.json": '{"data_list": [{"img_path": "a", "instances": []}]}',
        "h.csv": "a,b",
        "deep.json": "[" * 100_000,
        "nul.jsonl": r'{"filename": "e.txt\u0000b", "text": "x"}',
        "half.jsonl": r'{"filename": "a", "text": "x\ud83d"}',
        "null.jsonl": '{"filename": null, "text": null}',
        "list.jsonl": '{"filename": "a", "text": ["x"]}',
    }
    for name, text in foreign.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "i.txt").write_bytes(b"a\t\xff\n")
    bad = ["synth:x", "synth:0", "synth:1:2:3", "synth:-1", "synth:1000000000", "nowhere"]
    bad += [str(path) for path in sorted(tmp_path.iterdir())]
    for src in bad:
        with pytest.raises(UserError) as error:
            data.open_source(src)
        message = str(error.value)
        assert message.startswith(src) and "\n" not in message
        assert "expected" in message or "copy" in message or "relative" in message
    assert len(bad) == 26


def test_the_entry_that_is_wrong_is_named(tmp_path):
    """"Line 3 of 2,000,000" that is line 2, because an empty line was not counted; a picture of two words that
    gets the first one's label."""
    (tmp_path / "l.tsv").write_text("a.png\tone\n\nb.png two\n")
    with pytest.raises(UserError, match="l.tsv: line 3: expected path<TAB>label"):
        data.open_source(str(tmp_path / "l.tsv"))
    listed = [{"img_path": "a", "instances": [{"text": "x"}]}, {"img_path": "b", "instances": []}]
    (tmp_path / "l.json").write_text(json.dumps({"data_list": listed}))
    with pytest.raises(UserError, match="l.json: entry 2: expected MMOCR's.*0 instances; expected one"):
        data.open_source(str(tmp_path / "l.json"))
    listed[1]["instances"] = [{"text": "y"}, {"text": "z"}]
    (tmp_path / "l.json").write_text(json.dumps({"data_list": listed}))
    with pytest.raises(UserError, match="l.json: entry 2: expected MMOCR's.*2 instances; expected one"):
        data.open_source(str(tmp_path / "l.json"))


def open_error(src, **options):
    """The UserError's text."""
    with pytest.raises(UserError) as error:
        data.open_source(str(src), **options)
    message = str(error.value)
    assert message.startswith(str(src)) and "\n" not in message
    return message


def test_a_file_that_is_not_utf8_says_where(tmp_path):
    """A decoder reads many lines at once, so the wrong one is named, and nobody is told what to do."""
    rows = [f"{i}.png\tword\n".encode() for i in range(5000)]
    rows[3210] = "3210.png\tcafé\n".encode("latin-1")
    (tmp_path / "l.tsv").write_bytes(b"".join(rows))
    assert re.search("l.tsv: line 3211: expected UTF-8 .*; save it as UTF-8", open_error(tmp_path / "l.tsv"))
    (tmp_path / "w.txt").write_text("a.png\tword\n", encoding="utf-16")
    assert "w.txt: line 1: expected UTF-8" in open_error(tmp_path / "w.txt")
    (tmp_path / "m.json").write_bytes('{\n"data_list": "é"}'.encode("latin-1"))
    assert "m.json: line 2: expected UTF-8" in open_error(tmp_path / "m.json")


def test_numbers_are_taken_as_they_are_written(tmp_path):
    """A label that JSON takes for a number ends the reading, or loses its last zero."""
    picture(0).save(tmp_path / "a.png")
    lines = ['{"filename": "a.png", "text": 1.50}', '{"filename": "a.png", "text": 20}']
    (tmp_path / "l.jsonl").write_text("\n".join(lines))
    instances = '{"img_path": "a.png", "instances": [{"text": -7e2}]}'
    (tmp_path / "l.json").write_text(f'{{"data_list": [{instances}]}}')
    assert [label for _, label in data.open_source(str(tmp_path / "l.jsonl"))] == ["1.50", "20"]
    assert data.open_source(str(tmp_path / "l.json")).label(0) == "-7e2"
    for text in "true", "NaN", "-Infinity":                             # a missing value, as Python writes it
        (tmp_path / "none.jsonl").write_text(f'{{"filename": "a.png", "text": {text}}}')
        assert "line 1: expected" in open_error(tmp_path / "none.jsonl")


def test_csv(tmp_path, capsys):
    """A label with a comma cut in two, quotes left around it, or a quote that swallows the lines after it. ICDAR's
    own lines, read with their blank and quotes."""
    picture(0).save(tmp_path / "a.png")
    lines = 'a.png,word\n"a.png","say ""hi"", you"\n\na.png,\na.png, "MY"\na.png, MY\n'
    (tmp_path / "l.csv").write_text(lines)
    source = data.open_source(str(tmp_path / "l.csv"))
    assert [label for _, label in source] == ["word", 'say "hi", you', "", "MY", "MY"]
    assert capsys.readouterr().out == ""
    wrong = {
        "three": "a.png,x\na.png,b,c\n",
        "open": 'a.png,x\na.png,"b\na.png,c\n',
        "one": "a.png,x\na.png;b\n",
    }
    for name, text in wrong.items():
        (tmp_path / f"{name}.csv").write_text(text)
        assert "line 2: expected path,label" in open_error(tmp_path / f"{name}.csv")


@pytest.mark.parametrize("name, between", [("l.csv", ","), ("l.tsv", "\t"), ("l.txt", "\t")])
def test_a_header_is_noticed(tmp_path, capsys, name, between):
    """The names of columns become a crop, which is damaged in every epoch; or a first crop is taken for
    them."""
    picture(0).save(tmp_path / "a.png")
    (tmp_path / "bare").write_bytes((tmp_path / "a.png").read_bytes())
    (tmp_path / name).write_text(f"filename{between}words\na.png{between}one\nno{between}two\n")
    source = data.open_source(str(tmp_path / name))
    assert [source.label(i) for i in range(len(source))] == ["one", "two"]
    said = capsys.readouterr().out
    assert said == f"{tmp_path / name}: line 1 is taken for a header: filename{between}words\n"
    for first in "bare", "lost.png":
        (tmp_path / name).write_text(f"{first}{between}word\na.png{between}one\n")
        assert len(data.open_source(str(tmp_path / name))) == 2
    assert capsys.readouterr().out == ""
    lost = '{"filename": "lost", "text": "word"}\n{"filename": "a.png", "text": "one"}'
    (tmp_path / "l.jsonl").write_text(lost)                                         # which has no columns
    assert len(data.open_source(str(tmp_path / "l.jsonl"))) == 2
    (tmp_path / name).write_text(f"{between}word\n0{between}one\n")                  # a column of numbers
    assert "no " + os.path.join(tmp_path, "0;") in open_error(tmp_path / name)


def test_rows_that_a_spreadsheet_leaves_empty(tmp_path):
    """`,` at the end of a .csv, or a row without a path: a damaged crop in every epoch."""
    picture(0).save(tmp_path / "a.png")
    (tmp_path / "l.csv").write_text("a.png,one\n,\n , \na.png,two\n")
    source = data.open_source(str(tmp_path / "l.csv"))
    assert [source.label(i) for i in range(len(source))] == ["one", "two"]
    for name, row in ("l.csv", ",two"), ("l.tsv", "\ttwo"):
        between = row[0]
        (tmp_path / name).write_text(f"a.png{between}one\n{row}\n")
        assert "line 2: expected path" in open_error(tmp_path / name) and "no path" in open_error(tmp_path / name)
    (tmp_path / "gt.txt").write_text('a.png, "one"\n')                      # ICDAR's
    assert "name a file with commas .csv" in open_error(tmp_path / "gt.txt")


def test_hidden_files_are_no_crops(tmp_path, capsys):
    """A notebook's copies of crops, .ipynb_checkpoints, among the crops, unsaid; or all crops of a folder whose
    own path has a hidden part."""
    folder = tmp_path / ".cache" / "crops"
    for name in "a.png", ".b.png", ".ipynb_checkpoints/c.png", "sub/.d/e.png", "sub/f.png":
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(0).save(folder / name)
    for src in str(folder), f"{folder}/":
        source = data.open_source(src)
        assert [source.row(i)[0] for i in range(len(source))] == ["a.png", os.path.join("sub", "f.png")]
        assert "not looked at: 3 hidden\n" in capsys.readouterr().out


def test_messages_about_paths(tmp_path, words):
    """Paths written on Windows, and the file in the place of its folder: an error that does not say what to
    type."""
    (tmp_path / "imgs").mkdir()
    picture(0).save(tmp_path / "imgs" / "a.png")
    (tmp_path / "l.tsv").write_text("imgs\\a.png\tword\n")
    assert open_error(tmp_path / "l.tsv").endswith("write their \\ as /")
    (tmp_path / "web.tsv").write_text("https://a.b/c.png\tword\n")
    assert "download the images" in open_error(tmp_path / "web.tsv")
    (tmp_path / "three.tsv").write_text("imgs/a.png\tword\t0.98\n")       # not the label "word\t0.98"
    assert "line 1: expected path<TAB>label (ValueError: number of columns in 'imgs/a.png\\tword\\t0.98': 3)" in open_error(tmp_path / "three.tsv")
    (tmp_path / "one.tsv").write_text("imgs/a.png;word\n")
    assert "(ValueError: number of columns in 'imgs/a.png;word': 1)" in open_error(tmp_path / "one.tsv")
    (tmp_path / "folders.tsv").write_text("imgs\tone\nimgs\ttwo\n")
    assert "relative to the labels file" in open_error(tmp_path / "folders.tsv")
    (tmp_path / "swapped.tsv").write_text("one.\timgs/a.png\n")
    assert open_error(tmp_path / "swapped.tsv").endswith("write the path first, then the label")
    (tmp_path / "bare.jsonl").write_text('{"filename": "no.png", "text": null}')
    assert open_error(tmp_path / "bare.jsonl").endswith("move it to the folder that they start from")
    assert f"name its folder, {words}; expected" in open_error(os.path.join(words, "data.mdb"))
    assert "no such file" in open_error(tmp_path / "data.mdb")


def lmdb_with_keys(folder, image_key, label_key, numbers):
    os.makedirs(folder)
    with lmdb.open(str(folder), map_size=2 ** 26) as env, env.begin(write=True) as txn:
        for i in numbers:
            txn.put(image_key % i, encode(picture(i)))
            txn.put(label_key % i, b"w%d" % i)
        txn.put(b"num-samples", b"%d" % len(numbers))
    return folder


def test_lmdb_numbered_in_another_way(tmp_path):
    """Counted from 0, the first crop is lost; with other digits all are "missing", and check ends well."""
    image, label = b"image-%09d", b"label-%09d"
    zero = open_error(lmdb_with_keys(tmp_path / "zero", image, label, range(8)))
    assert "image-000000000, counted from 0; expected image-000000001" in zero
    eight = open_error(lmdb_with_keys(tmp_path / "eight", b"image-%08d", b"label-%08d", range(1, 9)))
    assert "image is image-00000001; expected image-000000001" in eight
    bare = open_error(lmdb_with_keys(tmp_path / "bare", b"image-%d", b"label-%d", range(1, 12)))
    assert "image is image-1; expected image-000000001" in bare
    mixed = lmdb_with_keys(tmp_path / "mixed", image, b"label-%d", range(1, 9))
    assert "label is label-1; expected label-000000001" in open_error(mixed)
    assert len(data.open_source(str(mixed), labels=False)) == 8             # whose labels nobody asks for
    late = data.open_source(str(lmdb_with_keys(tmp_path / "late", image, label, range(3, 9))))
    with pytest.raises(Damaged, match="image-000000001 is missing"):
        late[0]


def test_what_a_folder_holds_besides_is_counted(tmp_path, capsys, monkeypatch, words):
    """Crops that are passed over in silence: of other formats, beside an LMDB, in a folder that may not be
    read; a Mac's ._ files called damaged."""
    folder = tmp_path / "some"
    folder.mkdir()
    picture(0).save(folder / "a.png")
    for name in "._a.png", "._b.jpg", "b.AVIF", "c.avif", "d", "e.tsv":
        (folder / name).write_bytes(b"x")
    assert len(data.open_source(str(folder))) == 1
    said = capsys.readouterr().out
    counts = "2 ._* (a Mac's notes on other files), 2 .avif, 1 without suffix, 1 .tsv"
    assert said == f"{folder}: not looked at: {counts}\n"

    os.remove(folder / "a.png")
    assert f"holds {counts}; expected data.mdb" in open_error(folder)
    for i in range(12):
        (folder / f"x.{i}").write_bytes(b"")
    assert open_error(folder).count("others") == 1 and "8 others; expected" in open_error(folder)

    mixed = write_lmdb(tmp_path / "mixed", [(encode(picture(0)), b"x")])
    picture(0).save(tmp_path / "mixed" / "a.png")
    assert len(data.open_source(mixed)) == 1
    assert capsys.readouterr().out == f"{mixed}: not looked at: 1 images beside an LMDB\n"
    data.open_source(words)                                                     # and its lock.mdb
    assert capsys.readouterr().out == ""


def test_folders_that_cannot_be_read_are_counted(tmp_path, capsys, monkeypatch):
    """os.walk passes them over, and with them perhaps most of the crops."""
    for name in "open", "closed":
        (tmp_path / name).mkdir()
        picture(0).save(tmp_path / name / "a.png")
    scandir = os.scandir

    def scan_the_open(folder):
        if os.path.basename(folder) == "closed":
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)
    monkeypatch.setattr(os, "scandir", scan_the_open)
    assert len(data.open_source(str(tmp_path))) == 1
    assert capsys.readouterr().out == f"{tmp_path}: not looked at: 1 folders that cannot be read\n"
    assert "holds 1 folders that cannot be read; expected" in open_error(tmp_path / "closed")


def test_opening_a_large_lmdb_is_cheap(tmp_path):
    """Reading all keys or labels into lists: half a gigabyte and half a minute for Union14M. Memory tells: it
    does not hang on how busy the machine is."""
    n = 100_000
    with lmdb.open(str(tmp_path / "big"), map_size=2 ** 28, sync=False) as env, env.begin(write=True) as txn:
        for kind in (b"image", b"label"):
            txn.cursor().putmulti(((b"%s-%09d" % (kind, i), b"label") for i in range(1, n + 1)), append=True)
    tracemalloc.start()
    source = data.open_source(str(tmp_path / "big"))
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(source) == n and source.label(n - 1) == "label" and held < 2 ** 20


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="only Linux says what is mapped")
def test_reading_keeps_no_memory(tmp_path):
    """Every page once read stays mapped, so that each worker grows to the size of the whole data set."""
    path = write_lmdb(tmp_path / "big", [(bytes(8000), None)] * 5000)
    source = data.open_source(path)
    for i in range(5000):
        assert len(source.file_bytes(i)) == 8000
    maps = open("/proc/self/smaps").read().split(os.path.realpath(path) + "/data.mdb\n")[1:]
    resident = [int(re.search(r"Rss: +(\d+)", entry)[1]) for entry in maps]
    assert resident and sum(resident) < 20_000                                              # of 60,000 kB


# ---- images

SIZE = 40, 20


def corner(image):
    """The top left pixel of what is decoded. image: a file's bytes, or (image, kind)."""
    return data.decode(encode(*image) if isinstance(image, tuple) else image)[:, 0, 0].tolist()


def test_modes():
    """16 bits cut to white, 8 bits in a file of 16 read as black, a black picture of whole numbers made white,
    transparency read as what lies hidden below it, CMYK inverted, a camera's 10 or 12 bits in 16 read as nearly
    black."""
    colour, black, white = (200, 40, 80), (0, 0, 0), (255, 255, 255)
    red = Image.new("RGB", SIZE, colour)
    grey = round(.299 * 200 + .587 * 40 + .114 * 80)
    palette = Image.new("P", SIZE, 1)
    palette.putpalette([*black, *colour])
    cases = [
        (red, "PNG", colour), (palette, "PNG", colour), (palette, "GIF", colour),
        (red, "BMP", colour), (red, "WEBP", colour), (red.convert("CMYK"), "TIFF", colour),
        (red.convert("L"), "PNG", (grey,) * 3), (Image.new("1", SIZE, 1), "PNG", white),
        (Image.new("RGBA", SIZE, (9, 9, 9, 0)), "PNG", white),
        (Image.new("LA", SIZE, (9, 0)), "PNG", white),
        (Image.new("RGBA", SIZE, (*colour, 255)), "PNG", colour),
        (Image.new("RGBA", SIZE, (0, 0, 0, 128)), "PNG", (127,) * 3),
    ]
    deep = {(np.uint16, 100 * 257): 100, (np.uint16, 255): 255, (np.uint16, 1): 1, (np.int32, 200): 200,
            (np.uint16, 1023): 255, (np.uint16, 512): 127, (np.uint16, 4095): 255, (np.uint16, 2048): 127,
            (np.int32, 65535): 255, (np.float32, .5): 127, (np.float32, 1): 255, (np.float32, 200): 200,
            (np.float32, 51400): 200}
    for (kind, value), wanted in deep.items():
        image = Image.fromarray(np.full((20, 40), value, kind))
        cases.append((image, "PNG" if kind == np.uint16 else "TIFF", (wanted,) * 3))
    for image, kind, wanted in cases:
        assert np.abs(np.subtract(corner((image, kind)), wanted)).max() <= 5, (image, kind)
    assert corner(encode(palette, "PNG", transparency=1)) == [255, 255, 255]
    assert np.abs(np.subtract(corner((red.convert("CMYK"), "JPEG")), colour)).max() <= 8


@pytest.mark.parametrize("kind, value", [(np.float32, np.nan), (np.float32, -0.5), (np.int32, 70000)])
def test_pixels_that_are_no_grey(kind, value):
    """What is no number, below black or above white, made black or white in silence."""
    grey = np.full((20, 40), 0, kind)
    grey[3, 3] = value
    said = f"^pixels from .*{value:g}.*; expected 0 to 1, 255 or 65535"
    if np.isnan(value):
        said = "^a pixel that is not a number$"
    with pytest.raises(Damaged, match=said):
        data.decode(encode(Image.fromarray(grey), "TIFF"))


def test_a_deep_tiff_that_counts_from_white():
    """Black and white exchanged, in silence: Pillow heeds the tag for 8 bits alone."""
    grey = Image.fromarray(np.full((20, 40), 60000, np.uint16))
    assert data.decode(encode(grey, "TIFF", tiffinfo={262: 1})).float().mean() > 200
    with pytest.raises(Damaged, match="0 is white"):
        data.decode(encode(grey, "TIFF", tiffinfo={262: 0}))


def letters_on_nothing(colour, opacity=255):
    """A bar as of an "l", 8 x 20, in the middle of a transparent picture."""
    hidden = (255 - colour[0],) * 3                             # what is transparent has a colour too
    image = Image.new("RGBA", (128, 32), (*hidden, 0))
    image.paste((*colour, opacity), (60, 6, 68, 26))
    return encode(image)


@pytest.mark.parametrize("colour", [(255,) * 3, (0,) * 3, (255, 255, 0), (200, 0, 0), (140,) * 3, (110,) * 3])
def test_transparency_has_a_ground_on_which_letters_show(colour):
    """White letters on white."""
    crop = data.decode(letters_on_nothing(colour)).float().mean(0)
    assert (crop[16, 64] - crop[16, 10]).abs() > 80
    assert crop[16, 10] == (255 if crop[16, 64] < 128 else 0)
    faint = data.decode(letters_on_nothing(colour, opacity=200)).float().mean(0)
    assert faint[16, 10] == crop[16, 10]
    grey = Image.open(io.BytesIO(letters_on_nothing((255,) * 3))).convert("LA")
    assert data.decode(encode(grey))[0, 16, 10] == 0


def test_thin_letters_have_a_ground_on_which_they_show():
    """White on white, because the few pixels that the ground was chosen by lie between the strokes."""
    image = Image.new("RGBA", (512, 128), (0, 0, 0, 0))
    image.paste((255,) * 4, (200, 40, 201, 90))                 # one pixel wide, of four that become one
    assert data.decode(encode(image))[0, 16, 10] == 0


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF", "MPO"])
def test_a_file_of_several_pictures(kind):
    """The words of an animation, or of the pages of a scan, that are left out in silence; a phone's
    photograph refused, which holds a small copy of itself."""
    file = encode(picture(0), kind, save_all=True, append_images=[picture(1)])
    if kind == "MPO":
        assert data.decode(file).shape == (3, 32, 128)
        return
    with pytest.raises(Damaged, match="^2 pictures in one file; expected one$"):
        data.decode(file)


def test_turned_images(tmp_path):
    """A photo that lies on its side; rotate_tall turning the other way, or turning what is not tall once it
    is upright."""
    upright = Image.new("RGB", (120, 40), "blue")
    upright.paste("yellow", (0, 0, 60, 40))                                 # left half yellow
    plain = data.decode(encode(upright))
    exif = Image.Exif()
    exif[0x0112] = 6                                                        # shown by turning clockwise
    for kind in "JPEG", "PNG", "WEBP", "TIFF":
        lying = encode(upright.transpose(Image.Transpose.ROTATE_90), kind, exif=exif, quality=95)
        assert (data.decode(lying).float() - plain.float()).abs().mean() < 6, kind
        assert torch.equal(data.decode(lying, rotate_tall=True), data.decode(lying)), kind
    broken = encode(upright, "JPEG", quality=95, exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0")
    with warnings.catch_warnings(record=True) as heard:                     # two lines, and no crop's name
        warnings.simplefilter("always")
        assert (data.decode(broken).float() - plain.float()).abs().mean() < 6
    assert heard == []
    tall = encode(upright.transpose(Image.Transpose.ROTATE_270))            # reads from top to bottom
    assert torch.equal(data.decode(tall, rotate_tall=True), plain)
    assert not torch.equal(data.decode(tall), plain)
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "tall.png").write_bytes(tall)
    labels = tmp_path / "labels.tsv"
    labels.write_text("files/tall.png\tword\n")
    for name in "a", "b":
        write_lmdb(tmp_path / "tree" / name, [(tall, None)])
    for src in write_lmdb(tmp_path / "lmdb", [(tall, None)]), tmp_path / "files", tmp_path / "tree", labels:
        assert torch.equal(data.open_sources([src], rotate_tall=True)[0][0], plain)
    for height, turns in ((60, False), (61, True)):                         # tall is above 1.5 times as high
        crop = encode(picture(0, 40, height))
        assert torch.equal(data.decode(crop, rotate_tall=True), data.decode(crop)) is not turns


def test_a_crop_is_resized_as_the_field_does():
    """Another filter than bicubic: crops would look otherwise than in training."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 70, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    expected = Image.fromarray(pixels).resize((128, 32), Image.Resampling.BICUBIC)
    expected = torch.from_numpy(np.array(expected)).permute(2, 0, 1)
    assert torch.equal(data.decode(file.getvalue()), expected)


@pytest.mark.parametrize("size", [(1600, 400), (400, 1600), (3000, 3000), (5, 4), (1, 1)])
def test_sizes(size):
    """Reading a large JPEG at a fraction of its size must keep what the crop needs, whichever side is
    long."""
    image = picture(3).resize(size).filter(ImageFilter.GaussianBlur(2))
    for tall in False, True:
        turn = tall and size[1] > 1.5 * size[0]
        plain = image.transpose(Image.Transpose.ROTATE_90) if turn else image
        plain = plain.resize((128, 32), Image.Resampling.BICUBIC)
        got = data.decode(encode(image, "JPEG", quality=95), tall)
        assert (got.float() - torch.tensor(np.array(plain)).permute(2, 0, 1)).abs().mean() < 4


def test_a_large_crop_keeps_what_it_shows():
    """Fine strokes that are lost, or alias, because a large file is read at too small a fraction of its
    size."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 128, 3), dtype=np.uint8)
    large = Image.fromarray(pixels).resize((1600, 400), Image.Resampling.BICUBIC)
    plain = np.array(large.resize((128, 32), Image.Resampling.BICUBIC))
    for kind in "PNG", "JPEG":
        got = data.decode(encode(large, kind, quality=95)).permute(1, 2, 0).numpy()
        assert np.abs(got.astype(float) - plain).mean() < 1.5, kind
    exif = Image.Exif()
    exif[0x0112] = 6                            # width and height change places once it is read
    tall = Image.fromarray(pixels).resize((200, 800), Image.Resampling.BICUBIC)
    plain = np.array(tall.resize((128, 32), Image.Resampling.BICUBIC))
    lying = encode(tall.transpose(Image.Transpose.ROTATE_90), "JPEG", quality=95, exif=exif, subsampling=0)
    assert np.abs(data.decode(lying).permute(1, 2, 0).numpy().astype(float) - plain).mean() < 2


# ---- damage

def chunk(kind, body):
    """A piece of a PNG file."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def bomb(side=65000):
    """A PNG of side x side pixels in a few bytes."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(bytes(10 ** 6)))
    return b"\x89PNG\r\n\x1a\n" + head + body + chunk(b"IEND", b"")


def test_decompression_bombs():
    """An image of 6000 x 6000 pixels, far below Pillow's own limit, takes 100 MB in each worker."""
    tracemalloc.start()
    for side in (6000, 65000):
        with pytest.raises(Damaged, match="(?i)decompression *bomb"):
            data.decode(bomb(side))
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert held < 2 ** 24
    large = encode(Image.new("L", (5790, 5790)))                # just below 2 ** 25 pixels
    assert data.decode(large).shape == (3, 32, 128)


@pytest.fixture
def damaged(tmp_path):
    """30 entries, of which numbers 3, 6, ... 24 are damaged, each in its own way."""
    entries = [(encode(picture(i)), b"w%d" % i) for i in range(30)]
    jpeg, png = encode(picture(0), "JPEG"), encode(picture(0))
    ways = [(jpeg[:len(jpeg) // 2], b"x"), (png[:len(png) // 2], b"x"), (b"", b"x"), (b"no image", b"x"),
            (bomb(), b"x"), (None, b"x"), (png, None), (png, b"\xff")]
    for k, way in enumerate(ways):
        entries[3 * k + 3] = way
    return write_lmdb(tmp_path / "damaged", entries), [3 * k + 3 for k in range(len(ways))]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no such pipes here")
def test_a_pipe_among_crops(tmp_path, monkeypatch):
    """A pipe in a folder of crops, which is waited for without end."""
    picture(0).save(tmp_path / "a.png")
    os.mkfifo(tmp_path / "b.png")
    source = data.open_source(tmp_path)
    assert source[0][0].shape == (3, 32, 128)
    monkeypatch.setattr(data.pathlib.Path, "read_bytes", lambda _: pytest.fail("it waits here"))
    with pytest.raises(Damaged, match="b.png: a folder or a pipe"):
        source[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_damage_is_counted(damaged, workers):
    """A damaged crop becomes its neighbour, or kills the loader, or vanishes: what is read and reported
    must add up."""
    path, bad = damaged
    source = data.open_source(path)
    got = list(data.read_all(source, 7, workers))
    read = [i for batch in got for i in batch.indices]
    named = [line for batch in got for line in batch.damaged]
    assert read == [i for i in range(30) if i not in bad] and len(read) == len(source) - len(named)
    assert [label for batch in got for label in batch.labels] == [f"w{i}" for i in read]
    for i, line in zip(bad, named):
        assert f"image-{i + 1:09d}" in line and "\n" not in line
    reasons = ("runcated", "", "0 bytes", "not an image", "Bomb", "missing", "missing", "UTF-8")
    for reason, line in zip(reasons, named, strict=True):
        assert reason in line
    images = torch.cat([batch.images for batch in got])
    for i, image in zip(read, images, strict=True):
        assert torch.equal(image, data.decode(encode(picture(i))))


def test_whole_batch_damaged(tmp_path):
    """torch.stack of nothing raises."""
    source = data.open_source(write_lmdb(tmp_path / "d", [(b"", b"x")] * 4))
    batch = next(data.batches(source, 4, 0, char_maps=True))
    assert batch.images.shape == (0, 3, 32, 128) and batch.char_maps.shape == (0, 32, 128)
    assert batch.labels == batch.indices == [] and len(batch.damaged) == 4


def test_next_batch(damaged, capsys):
    """A step on no crop at all, whose loss is nan; damage that is passed on and not counted."""
    source = data.open_source(damaged[0])
    damage = data.DamageCount(.9)
    stream = data.batches(source, 10, seed=0)
    sizes = [len(data.next_batch(stream, damage).images) for _ in range(3)]
    assert sizes == [10] * 3 and damage.seen == 30 and damage.damaged == 8
    assert capsys.readouterr().out.count("damaged, left out: ") == 8
    first_bad = data.Subset(source, damaged[1])
    with pytest.raises(UserError, match="no crop of a batch .*, the first being damaged image-0") as error:
        data.next_batch(data.batches(first_bad, 4, seed=0), damage)
    assert "leave such crops out with data.py pack, or raise --batch_size" in str(error.value)
    assert damage.seen == 34 and damage.damaged == 12


@pytest.mark.parametrize("char_maps", [False, True])
def test_places_of_damaged_crops_are_filled(damaged, char_maps):
    """A batch of another size, for which --compile compiles anew; a crop that is moved to another's place, or
    gets another's label or boxes; the same crop again and again in a batch that has many."""
    source = data.open_sources([damaged[0], "synth:2"])
    asked_for = [6, 0, 3, 30, 9, 31, 12]                                # 3, 6, 9, 12 are damaged
    filled = data.read_batch(source, asked_for, char_maps, fill=True)
    assert filled.indices == [0, 0, 31, 30, 30, 31, 0]
    assert filled.damaged == data.read_batch(source, asked_for).damaged and len(filled.damaged) == 4
    assert filled.labels == [source.label(i) for i in filled.indices]
    for k, i in enumerate(filled.indices):
        assert torch.equal(filled.images[k], source[i][0])
        if i >= 30 and char_maps:
            assert torch.equal(filled.char_maps[k], source.get(i).char_map)
    assert char_maps or filled.char_maps is None
    assert data.read_batch(source, [3, 0, 6], char_maps, fill=True).indices == [0, 0, 0]    # one sound crop


def test_shared_memory_that_is_too_small(monkeypatch):
    """Docker's 64 MB: a worker fails, and the script waits for its batch for ever."""
    monkeypatch.setattr(data.shutil, "disk_usage", lambda _: SimpleNamespace(free=64 * 2 ** 20))
    data.check_shared_memory(0, 10 ** 6)
    data.check_shared_memory(4, 256)                                        # 50 MB
    with pytest.raises(UserError, match="--workers 4: their batches need 67 MB of /dev/shm, which has 67 free"):
        data.check_shared_memory(4, 257, char_maps=True)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match="need 101 MB"):
        data.check_shared_memory(4, 256)
    source = data.open_source("synth:300")
    with pytest.raises(UserError, match="--shm-size"):
        data.batches(source, 256, 0, workers=4)
    with pytest.raises(UserError, match="--shm-size"):
        next(data.read_all(source, 300, workers=4))


def test_shared_memory_that_is_enough(words, monkeypatch):
    """A validation of a few crops refused for the room of a large batch; maps of characters that nobody
    reckoned with."""
    asked = []
    monkeypatch.setattr(data, "check_shared_memory", lambda *given: asked.append(given))
    source = data.open_source(words)
    assert len(next(data.read_all(source, 1000)).images) == 50
    data.batches(source, 8, 0, char_maps=True)
    assert asked == [(0, 50), (0, 8, True)]


def test_workers_end_with_their_reading(words):
    """The workers of every validation, alive until the run ends; or their pipes, until no more files can be
    opened."""
    before, files = set(multiprocessing.active_children()), []
    for _ in range(3):
        assert len(list(data.read_all(data.open_source(words), 20, workers=1))) == 3
        files.append(len(os.listdir("/dev/fd")))
    assert set(multiprocessing.active_children()) <= before
    until = time.monotonic() + 10               # a thread of the queue's closes its end of a pipe
    while len(os.listdir("/dev/fd")) > files[0]:
        assert time.monotonic() < until, files
        time.sleep(0.01)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_process_ends_with_its_workers():
    """Workers ignore the signals that multiprocessing sends them at the end, and it waits for them for
    ever."""
    code = """
import data, os
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1])      # two workers on a core: torch would warn
stream = data.batches(data.open_source("synth:100"), 2, seed=0, workers=2)
assert len(next(stream).images) == 2
data.kept = [stream]                                                # as a traceback does
"""
    done = run_python(code)
    assert done.returncode == 0 and done.stderr == "", done.stderr


def test_workers_leave_signals_to_the_script():
    """Ctrl-C, a scheduler or a terminal that is closed signals the whole group: a worker dies, and the script
    with it, before it has saved."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = [signal.getsignal(number) for number in numbers]
    try:
        data.start_worker(0)
        assert [signal.getsignal(number) for number in numbers] == [signal.SIG_IGN] * 3
    finally:
        for number, handler in zip(numbers, handlers):
            signal.signal(number, handler)


def test_error_of_a_worker_is_one_line(tmp_path):
    """A file that becomes shorter during the run: the worker's traceback, 25 lines of it, then a process that
    never ends."""
    path = write_lmdb(tmp_path / "d", [(encode(picture(i)), b"x") for i in range(50)])
    done = run_python(f"""
import common, data, multiprocessing, os
source = data.open_source({path!r})
os.truncate({os.path.join(path, "data.mdb")!r}, 8192)
try:
    common.run_main(lambda: list(data.read_all(source, 8, workers=1)))
finally:            # it has ended, and was not left for a late garbage collection, which hangs
    assert not multiprocessing.active_children()
""")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "copy it again" in done.stderr


def test_a_worker_that_is_killed_is_one_line():
    """What a system without memory does to a worker, told as a stack trace."""
    done = run_python("""
import common, data, os
stream = data.loader(data.open_source("synth:5000"), [[k] for k in range(5000)], 1)
next(stream)        # torch imports some of itself at the first batch, and says so if a signal falls into that
os.kill(stream._workers[0].pid, 9)
common.run_main(lambda: list(stream))
""")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "if memory ran out, lower --workers" in done.stderr


def test_damaged_tree(tmp_path):
    """An LMDB of which a block went bad ends the run with lmdb's own error, its crops uncounted."""
    path = write_lmdb(tmp_path / "d", [(encode(picture(i)), b"w%d" % i) for i in range(200)])
    with open(os.path.join(path, "data.mdb"), "r+b") as file:
        pages = range(8192 + 10, os.path.getsize(file.name), 4096)
        leaves = [at for at in pages if file.seek(at) and file.read(2) == b"\2\0"]      # a leaf's flags
        file.seek(leaves[len(leaves) // 2])
        file.write(b"\0\0")
    got = list(data.read_all(data.open_source(path), 8))
    read = [i for batch in got for i in batch.indices]
    named = [line for batch in got for line in batch.damaged]
    assert len(read) + len(named) == 200 and len(read) > 50 and len(named) > 5
    assert "expected an LMDB, copied whole (mdb_get: MDB_CORRUPTED" in named[0] and "d image-0" in named[0]


def broken(file, rng):
    """A file with a few changes: bytes of other values, an end cut off, bytes left out or put in."""
    file = bytearray(file)
    for _ in range(rng.randrange(1, 8)):
        way = rng.random()
        at = rng.randrange(max(1, min(len(file), rng.choice((40, 10 ** 6)))))
        if way < .6 and file:
            file[at] = rng.randrange(256)
        elif way < .7:
            del file[at:]
        elif way < .85:
            del file[at:at + rng.randrange(50)]
        else:
            file[at:at] = rng.randbytes(rng.randrange(50))
    return bytes(file)


@pytest.mark.filterwarnings("ignore")
def test_fuzz(tmp_path):
    """Pillow raises a dozen kinds of errors on broken files (struct, zlib, Value, Syntax, Overflow),
    labels may be any bytes: each such entry is counted, none ends the reading or is lost from the
    count."""
    rng, seeds, entries = random.Random(0), [], []
    for k in range(3):
        seeds += [encode(picture(k), "JPEG"), encode(picture(k), "JPEG", progressive=True)]
        seeds += [encode(picture(k), "PNG"), encode(picture(k), "PNG", optimize=True)]
    seeds += [encode(picture(0).quantize(8)), encode(picture(0).convert("RGBA"))]
    seeds += [encode(picture(0), kind) for kind in ("GIF", "BMP", "TIFF", "WEBP")]
    for _ in range(2000):
        label = bytearray(b"word!")
        label[rng.randrange(5)] = rng.randrange(256) if rng.random() < .2 else ord("a")
        entries.append((broken(rng.choice(seeds), rng), bytes(label)))
    got = list(data.read_all(data.open_source(write_lmdb(tmp_path / "fuzzed", entries)), 64))
    fine = sum(len(batch.indices) for batch in got)
    named = [line for batch in got for line in batch.damaged]
    assert fine + len(named) == 2000 and min(fine, len(named)) > 150
    assert not any("\n" in line for line in named)
    assert sum(len(batch.images) for batch in got) == sum(len(batch.labels) for batch in got) == fine


def test_files_that_are_no_image_of_ours_are_named(tmp_path):
    """"Not an image", said of an AVIF that every browser shows."""
    files = {
        "AVIF": b"\0\0\0 ftypavif\0\0\0\0",
        "HEIC": b"\0\0\0\x18ftypheic",
        "JPEG 2000": b"\0\0\0\x0cjP  \r\n\x87\n",
        "a Mac's notes": b"\0\x05\x16\7\0\2\0\0Mac OS X",
        "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
        "not an image": b"<html>",
    }
    for kind, begins in files.items():
        with pytest.raises(Damaged, match=f"^{kind}.* \\({len(begins) + 99} bytes\\)"):
            data.decode(begins + bytes(99))
    with pytest.raises(Damaged, match="JPEG 2000; expected one of JPEG, PNG"):
        data.decode(encode(picture(0), "JPEG2000", no_jp2=True))


def test_a_damaged_crop_is_named_once(capsys):
    """The one damaged crop of a small set, named in every epoch until the ten lines are full; or another
    one that is not named, because it comes after that one in its batch."""
    count = data.DamageCount(.5)
    for _ in range(20):
        count.add(5, ["a"])
    count.add(5, ["a", "b"])
    assert capsys.readouterr().out == "damaged, left out: a\ndamaged, left out: b\n"
    assert count.damaged == 22 and count.seen == 105


def test_damage_count(capsys):
    """A few damaged crops in the first batches stop a run whose share is lower; or a limit is never
    judged; or it blames nobody, or too many."""
    count = data.DamageCount(.01)
    count.add(50, ["a"])
    count.add(50, [])
    count.add(10, ["b", "c", "d"])      # 4 of 110, where 1.1 are allowed: within three deviations, 4.2
    assert capsys.readouterr().out == "".join(f"damaged, left out: {c}\n" for c in "abcd")
    message = "5 of 120 crops are damaged, more than --max_damaged 0.01: a; b; c; d; e"
    with pytest.raises(UserError, match=message):
        count.add(10, ["e"])
    with pytest.raises(UserError, match="more than --max_damaged 0.01: a; b; c; d; e; 0; 1; 2; 3; 4$"):
        count.add(10, list("0123456789"))
    assert capsys.readouterr().out.count("left out") == 6
    count = data.DamageCount(.01)
    count.add(99, ["x"] * 99)                               # too few to judge by
    with pytest.raises(UserError, match="99 of 100 crops are damaged"):
        count.add(1, [])
    count = data.DamageCount(.01)
    with pytest.raises(UserError, match="more than --max_damaged"):
        for _ in range(100):
            count.add(50, ["x"])                            # twice the limit, found in the end


# ---- labels

def test_fit_label():
    """36 characters lose every word in capitals; a decomposed é is outside a charset with é; length off by
    one."""
    fit = data.fit_label
    assert fit("Wörld", data.CHARSETS["36"], 25) == ("wörld", "outside the charset")
    assert fit("WORLD", data.CHARSETS["36"], 25) == ("world", "")
    assert fit("WORLD", data.CHARSETS["62"], 5) == ("WORLD", "")
    assert fit("WORLD", data.CHARSETS["94"], 4)[1] == "too long"
    assert fit("", data.CHARSETS["94"], 4)[1] == "empty" and fit(None, "a", 4)[1] == "without a label"
    assert fit("e\u0301", "é", 1) == ("é", "")
    assert fit("a b", data.CHARSETS["94"], 9)[1] == "outside the charset"
    assert fit("long", "x", 9)[1] == "outside the charset"
    assert fit("ﬁ²Ａ", "fi2A", 9) == ("ﬁ²Ａ", "outside the charset")            # which NFKC would change


def test_fit_labels(tmp_path):
    """A label that cannot be trained on is replaced or dropped in silence, or a later crop gets its
    image; in the second source the crops of the first are meant."""
    labels = [b"good", "naïve".encode(), b"x" * 30, b"", b"fine", "ïï".encode(), None]
    entries = [(encode(picture(k)), label) for k, label in enumerate(labels)]
    path = write_lmdb(tmp_path / "l", entries)
    first = write_lmdb(tmp_path / "f", [(encode(picture(9)), b"first")] * 2)
    source, report = data.fit_labels(data.open_sources([first, "synth:3", path]), data.CHARSETS["94"], 25)
    reasons = "2 outside the charset, 1 too long, 1 empty ('ï' 2)"
    assert report == f"{first} synth:3 {path}: 8 of 12 labels fit, {reasons}"
    source = data.Subset(source, torch.tensor([0, 1, 5, 6, 7]))                         # without the drawn
    assert [source.label(i) for i in range(3)] == ["first", "first", "good"] and source[3][1] == "fine"
    assert source.where(3) == "l image-000000005" and len(source) == 5
    assert source.file_bytes(3) == encode(picture(4))
    assert torch.equal(source.get(3).image, data.decode(encode(picture(4))))
    with pytest.raises(Damaged):
        source.label(4)


def test_labels_of_a_source_that_counts_many_times_are_read_once(tmp_path, monkeypatch):
    """SRC@18 asks an LMDB of four million labels 18 times, which takes an hour; or counts it once. Another
    source of the same name that is not asked at all: its labels pass, or sound ones are left out."""
    image = encode(picture(0))
    path = write_lmdb(tmp_path / "l", [(image, text.encode()) for text in ("good", "naïve", "fine")])
    asked = []
    label = data.Lmdb.label

    def count_label(self, i):
        asked.append(i)
        return label(self, i)
    monkeypatch.setattr(data.Lmdb, "label", count_label)
    source, report = data.fit_labels(data.open_sources([f"{path}@18"]), data.CHARSETS["94"], 25)
    assert asked == [0, 1, 2] and len(source) == 36
    assert report == f"{path}@18: 36 of 54 labels fit, 18 outside the charset ('ï' 18)"
    assert [source.label(i) for i in (0, 1, 34, 35)] == ["good", "fine", "good", "fine"]

    namesake = write_lmdb(tmp_path / "other" / "l", [(image, "ï".encode()), (image, b"sound")])
    source, report = data.fit_labels(data.open_sources([path, namesake]), data.CHARSETS["94"], 25)
    assert [source.label(i) for i in range(len(source))] == ["good", "fine", "sound"]
    assert report.endswith("3 of 5 labels fit, 2 outside the charset ('ï' 2)")


def test_drawn_words_that_do_not_fit_are_found():
    """A million drawn labels pass unread, though some are too long, or hold what the charset has not."""
    source = data.open_sources(["synth:300"])
    labels = [source.label(i) for i in range(300)]
    short, _ = data.fit_labels(source, data.CHARSETS["94"], 4)
    assert [short.label(i) for i in range(len(short))] == [label for label in labels if len(label) <= 4]
    letters, report = data.fit_labels(source, data.CHARSETS["62"], 25)
    assert [letters.label(i) for i in range(len(letters))] == [label for label in labels if label.isalnum()]
    assert 0 < len(letters) < 300 and "outside the charset" in report
    chars = data.CHARSETS["36"]
    folded, _ = data.fit_labels(data.open_sources(["synth:300"], charset=chars), chars, 25)
    assert len(folded) == 300


def test_drawn_words_that_fit_are_not_asked(monkeypatch):
    """A million labels drawn one by one, to learn that each fits: a start that takes minutes."""
    monkeypatch.setattr(data.Synth, "label", lambda self, i: pytest.fail("it was asked"))
    monkeypatch.setattr(render, "fonts_with", lambda charset, files: files)           # to look for them takes long
    for name in "36", "62", "94":
        chars = data.CHARSETS[name]
        source, _ = data.fit_labels(data.open_sources(["synth:9"], charset=chars), chars, 25)
        assert len(source) == 9


def test_max_length_reaches_what_is_drawn(tmp_path, monkeypatch):
    """finetune.py --max_length 40 that trains on words of at most 25; labels of 40 that pass unread where 30
    are asked for; a max_length of 4 that cuts words, where it should leave them out."""
    lines = data.open_sources(["synth:300"], charset="xyz", max_length=40)
    longest = max(range(300), key=lambda i: len(lines.label(i)))
    assert len(lines.label(longest)) > 30 and lines.get(longest).label == lines.label(longest)
    fitting, report = data.fit_labels(lines, "xyz", 30)
    assert 270 < len(fitting) < 300 and "too long" in report
    short = data.open_source("synth:9", charset="xyz", max_length=4)
    plain = data.open_source("synth:9", charset="xyz")
    assert [short.label(i) for i in range(9)] == [plain.label(i) for i in range(9)]

    asked = []

    def open_sources(srcs, **options):
        asked.append(options["max_length"])
        return data.open_sources(srcs, **options)
    monkeypatch.setattr(finetune, "open_sources", open_sources)
    monkeypatch.setattr(finetune, "build_recognizer", lambda args, charset: 1 / 0)      # far enough
    flags = f"--max_length 33 --data synth:3 --val synth:3:1 --out_dir {tmp_path}"
    monkeypatch.setattr(sys, "argv", ["finetune.py", *flags.split()])
    with pytest.raises(ZeroDivisionError):
        finetune.main()
    assert asked == [33, 33]


def test_letters_that_combine_are_looked_at_one_by_one():
    """Drawn words pass unread though NFC joins a and a breve to a letter that the charset has not:
    training dies on it."""
    synth = data.Synth(3)
    synth.charset, synth.label = "ae\u0306", ["ae", "a\u0306", "e"].__getitem__
    source, report = data.fit_labels(data.Parts([synth], "synth"), synth.charset, 25)
    assert len(source) == 2 and "1 outside the charset" in report


def test_drawn_words_are_their_own_nfc():
    """NFC joins a and a breve, or two Bengali vowel signs, to a letter that the charset has not: training
    dies on it, and the map of characters counts more of them than the label."""
    for chars in "ae\u0306", "\u0995\u0996\u09c7\u09be":
        synth = data.Synth(100)
        synth.charset = chars
        words = [synth.label(i) for i in range(100)]
        assert set("".join(words)) == set(chars)
        assert all(data.fit_label(word, chars, 25) == (word, "") for word in words)


def test_words_of_an_accented_alphabet(monkeypatch):
    """Drawn from what is not ASCII alone: German of ä, ö and ü. Upper case never drawn where labels are
    folded."""
    monkeypatch.setattr(render, "fonts_with", lambda charset, files: files)           # as if a font had them
    synth = data.Synth(200, charset=data.CHARSETS["94"] + "äöüßÄÖÜ")
    drawn = "".join(synth.label(i) for i in range(200))
    assert .02 < sum(not c.isascii() for c in drawn) / len(drawn) < .3
    folded = data.open_source("synth:50", charset=data.CHARSETS["36"])
    labels = [folded.label(i) for i in range(50)]
    assert any(label != label.lower() for label in labels)


def test_fonts_of_rendered_words(monkeypatch):
    """A charset that is drawn in a font without it; fonts sorted out for nothing where no charset is asked
    for."""
    monkeypatch.setattr(data, "font_files", lambda folder=None, charset=None: [folder, charset])
    plain = data.open_source("synth:3", fonts="mine")
    assert plain.fonts == ["mine", None] and plain.charset == data.PRINTABLE
    assert data.open_source("synth:3").fonts == [None, None]
    some = data.open_source("synth:3", fonts="mine", charset="a b")
    assert some.fonts == ["mine", "ab"] and set(some.label(0)) <= set("ab")
    assert data.open_source("synth:3", charset="a b").fonts == [None, "ab"]
    monkeypatch.undo()
    monkeypatch.setattr(render, "fonts_with", lambda charset, files: ["chosen", charset, files])
    files = render.font_files()
    assert data.open_source("synth:3").fonts == files
    assert data.open_source("synth:3", charset="a b").fonts == ["chosen", "ab", files]


def test_charset(tmp_path):
    """Characters in another order; a byte order mark or a line end as a class; one character with two
    classes."""
    letters = string.digits + string.ascii_letters
    for name, chars in {"36": letters[:36], "62": letters, "94": letters + string.punctuation}.items():
        assert data.read_charset(name) == chars
    (tmp_path / "c.txt").write_bytes("\ufeffабв\r\nце\u0301漢 \n".encode())
    assert data.read_charset(str(tmp_path / "c.txt")) == "абвце\u0301漢 "
    (tmp_path / "e.txt").write_text("ae\u0301b", encoding="utf-8")
    assert data.read_charset(str(tmp_path / "e.txt")) == "aéb"
    (tmp_path / "lines.txt").write_text("a\nz\n\u0301\nb", encoding="utf-8")
    assert data.read_charset(str(tmp_path / "lines.txt")) == "az\u0301b"     # not ź: a z would be lost
    (tmp_path / "wide.txt").write_text("ﬁ²Ａ", encoding="utf-8")              # which NFKC would change
    assert data.read_charset(str(tmp_path / "wide.txt")) == "ﬁ²Ａ"
    wrong = {"twice": b"abcda", "none": b"\n", "blank": b" \n", "tab": b"a\tb", "latin": b"\xe9"}
    said = {"twice": "'a' stands in it twice", "tab": "'\\\\t' is a control character"}
    for name, content in wrong.items():
        (tmp_path / name).write_bytes(content)
    for name in [*wrong, "missing"]:
        with pytest.raises(UserError, match=f"--charset .*{said.get(name, '')}"):
            data.read_charset(str(tmp_path / name))


def test_letters_that_nfc_splits(tmp_path, capsys):
    """Hindi's letters with a dot, which NFC splits: "stands in it twice", of a charset that holds each once.
    Or two classes for one letter, or another order than the file's."""
    chars = tmp_path / "hindi.txt"
    chars.write_text("\u0915\u093c\u0958\u0921\u095c", encoding="utf-8")           # ka, nukta, qa, da, rra
    assert data.read_charset(str(chars)) == "\u0915\u093c\u0921"
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "NFC" in said and "\u0915 \u093c \u0921 became one class each" in said
    assert data.fit_label("\u0958\u095c", data.read_charset(str(chars)), 25).problem == ""
    saved_as_nfc = "\u0915\u0915\u093c\u0921\u0921\u093c"
    chars.write_text(saved_as_nfc, encoding="utf-8")
    assert data.read_charset(str(chars)) == "\u0915\u093c\u0921"
    chars.write_text("e\u0301ae\u0301", encoding="utf-8")
    with pytest.raises(UserError, match="'e\u0301' stands in it twice"):
        data.read_charset(str(chars))
    chars.write_text("\u0915\u0958\u0915", encoding="utf-8")
    with pytest.raises(UserError, match="stands in it twice"):
        data.read_charset(str(chars))
    capsys.readouterr()
    chars.write_text("\u0915\u093c", encoding="utf-8")
    assert data.read_charset(str(chars)) == "\u0915\u093c" and capsys.readouterr().out == ""


@pytest.mark.parametrize("chars, named", [
    ("ab\u05e9\u05dc", "\u05e9 \u05dc"),
    ("\u0633a", "\u0633"),
    ("\u0915\u093f", "\u093f"),
    ("\u182a", "\u182a"),
], ids=["Hebrew", "Arabic", "Hindi", "Mongolian"])
def test_scripts_that_cannot_be_rendered_are_refused(chars, named):
    """Words from left to right that are read from right to left, letters that do not join: a reader that is
    trained on what nobody writes."""
    message = open_error("synth:5", charset=chars)
    assert f"which is wrong for {named} of the charset; name real crops instead" in message


def test_a_space_is_not_drawn_and_that_is_said(monkeypatch, capsys):
    """A class that never comes, for a reason that nobody knows."""
    monkeypatch.setattr(render, "fonts_with", lambda charset, files: files)
    assert " " not in data.open_source("synth:5", charset="ab c").charset
    assert capsys.readouterr().out == "synth:5: rendered words hold no space, which the charset has\n"
    data.open_source("synth:5", charset="abcé")
    assert capsys.readouterr().out == ""


# ---- batches

def test_workers_and_resume(words):
    """An order that depends on the workers, or starts anew on resuming; an LMDB opened here before the
    loader forks."""
    source = data.open_source(words)
    assert source[0][1] == "w0"
    plain = labels_of(data.batches(source, 8, seed=1), 20)
    for workers in 2, 4:
        assert labels_of(data.batches(source, 8, seed=1, workers=workers), 20) == plain
    assert labels_of(data.batches(source, 8, seed=1, position=72, workers=3), 11) == plain[72:]
    assert labels_of(data.batches(source, 8, seed=2), 20) != plain
    first = next(data.batches(source, 8, seed=1, workers=2)).images
    assert torch.equal(first, torch.stack([source[int(label[1:])][0] for label in plain[:8]]))


def test_epochs(words):
    """Crops seen twice and others never; the same order in every epoch."""
    labels = labels_of(data.batches(data.open_source(words), 8, seed=0), 25)
    epochs = [labels[k:k + 50] for k in range(0, 200, 50)]
    assert all(sorted(epoch) == sorted(epochs[0]) and len(set(epoch)) == 50 for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_ranks_and_accumulation(words):
    """Two processes see the same crops; a step of 2 x 8 or of 4 accumulated 4's is another step than one of
    16."""
    source = data.open_source(words)
    steps = data.batches(source, 16, 3, position=16)
    ranks = [data.batches(source, 8, 3, position=16, rank=rank, world=2) for rank in range(2)]
    small = data.batches(source, 4, 3, position=16)
    for _ in range(8):
        step = labels_of(steps, 1)
        assert labels_of(ranks[0], 1) + labels_of(ranks[1], 1) == step
        assert labels_of(small, 4) == step


def test_the_order_of_crops_by_hand():
    """Seed 6's first epoch that is seed 5's second; a run that was measured and is another one now; a crop
    more or less where one epoch ends within a batch."""
    stream = []
    for epoch in range(4):
        generator = torch.Generator().manual_seed(5 * 1_000_003 + epoch)
        stream += torch.randperm(7, generator=generator).tolist()
    for rank in range(2):
        order = data.crop_order(7, 3, seed=5, position=4, rank=rank, world=2)
        for first in (4, 10, 16, 22):
            mine = first + 3 * rank
            assert next(order) == stream[mine:mine + 3]


def test_rows_in_step(monkeypatch):
    """A crop that gets the random numbers of another, so that two ranks are not one large batch."""
    rows = []
    for micro_step in range(3):
        for rank in range(2):
            monkeypatch.setenv("RANK", str(rank))
            monkeypatch.setenv("WORLD_SIZE", "2")
            rows += range(24)[data.rows_in_step(micro_step, 4)]
    assert rows == list(range(24))


def test_indices(damaged):
    """A number in the source that is taken for a place in the batch, or that is another crop's."""
    path, bad = damaged
    asked_for = [5, bad[1], 0, bad[0], 29]
    batch = data.read_batch(data.open_source(path), asked_for)
    assert batch.indices == [5, 0, 29]
    assert batch.labels == ["w5", "w0", "w29"] and len(batch.damaged) == 2


def test_spawn(words):
    """A source that holds an open LMDB cannot be pickled, so no loader on macOS or Windows."""
    source = data.open_source(words)
    assert source[1][1] == "w1" and pickle.loads(pickle.dumps(source))[2][1] == "w2"
    plain, usual = labels_of(data.batches(source, 8, seed=1), 2), multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    try:
        assert labels_of(data.batches(source, 8, seed=1, workers=1), 2) == plain
    finally:
        multiprocessing.set_start_method(usual, force=True)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_fork(words):
    """A worker that reads through its parent's LMDB, which LMDB forbids."""
    context, source = multiprocessing.get_context("fork"), data.open_source(words)
    assert source.label(2) == "w2" and data.OPEN_LMDBS.environments
    said = context.SimpleQueue()

    def read():
        label = source.label(3)
        said.put((label, data.OPEN_LMDBS.process_id == os.getpid(), data.OPEN_LMDBS.reads))
    child = context.Process(target=read)
    child.start()
    assert said.get() == ("w3", True, 1)                        # its own, of which nothing was read before
    child.join()


def test_masks():
    """A loss on characters that looks at another crop's letters."""
    source = data.open_source("synth:9")
    batch = next(data.batches(source, 9, 0, char_maps=True))
    masks = batch.char_maps
    assert masks.shape == (9, 32, 128) and masks.dtype == torch.uint8
    order = next(data.crop_order(9, 9, 0))
    for mask, label, i in zip(masks, batch.labels, order, strict=True):
        assert torch.equal(mask, source.get(i).char_map) and mask.max() <= len(label)
    assert next(data.batches(source, 9, 0)).char_maps is None


def test_crops_without_a_mask(words):
    """Real crops beside rendered words whose maps are left over from another crop."""
    source = data.open_sources(["synth:1", words])
    maps = data.read_batch(source, [1, 0, 2], char_maps=True).char_maps
    assert not maps[0].any() and maps[1].any() and not maps[2].any()


@pytest.mark.parametrize("world", [1, 3])
def test_read_all_once(words, world, monkeypatch):
    """Ranks that pad their shares evaluate some crops twice; labels that are not those of the crops named."""
    source, seen = data.open_source(words), []
    monkeypatch.setenv("WORLD_SIZE", str(world))
    for rank in range(world):
        monkeypatch.setenv("RANK", str(rank))
        for batch in data.read_all(source, 8):
            assert batch.labels == [f"w{i}" for i in batch.indices]
            seen += batch.indices
    assert sorted(seen) == list(range(50))


# ---- views and augmentations

def crops(n=24):
    """Smooth pictures, uint8."""
    smooth = [picture(i).filter(ImageFilter.GaussianBlur(1)) for i in range(n)]
    return torch.stack([data.decode(encode(image)) for image in smooth])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def still_view(images, generator):
    numbers = data.uniform_numbers(images, data.VIEW_NUMBERS, generator)
    return data.still_view(images, numbers)


VIEWS = {       # each with the function that is given its random numbers, and how many of them a crop needs
    "lmim": (data.guidance_view, data.moved_view, data.VIEW_NUMBERS),
    "nsp": (still_view, data.still_view, data.VIEW_NUMBERS),
    "augment": (data.augment, data.augment_from_numbers, data.AUGMENT_NUMBERS),
}


@pytest.mark.parametrize("name", VIEWS)
def test_views(name):
    """Parameters drawn once for all crops; a view that cannot be repeated, or depends on the batch or rank
    it is in."""
    view, from_numbers, columns = VIEWS[name]
    images = crops(1).expand(24, -1, -1, -1)
    whole = view(images, generator())
    assert whole.shape == images.shape and whole.dtype == torch.float32
    assert whole.min() >= 0 and whole.max() <= 1
    assert torch.equal(whole, view(images, generator()))
    assert not torch.equal(whole, view(images, generator(1)))
    assert torch.allclose(whole, view(images.float() / 255, generator()))
    apart = (whole[:, None] - whole[None]).abs().mean((2, 3, 4)) + torch.eye(24)
    enough = .9 if name == "augment" else .999              # augment leaves some as they are
    assert (apart > 1e-4).float().mean() > enough
    numbers = torch.rand(24, columns, generator=generator())
    assert torch.equal(from_numbers(images, numbers), whole)
    part = from_numbers(images[8:13], numbers[8:13])
    assert torch.allclose(part, whole[8:13], atol=1e-4)
    picked = torch.tensor([3, 17, 4])
    assert torch.allclose(from_numbers(images[picked], numbers[picked]), whole[picked], atol=1e-4)
    state = generator()
    first, second = view(images, state), view(images, state)
    assert torch.equal(first, whole) and not torch.equal(first, second)


# Of 100 views of a seed: mean, standard deviation, that of the grey, edges along and down.
VIEWS_OF_A_SEED = {
    "lmim": [0.43398, 0.18366, 0.15923, 0.05269, 0.08401],
    "nsp": [0.50999, 0.1987, 0.17077, 0.04698, 0.07596],
    "augment": [0.50094, 0.23109, 0.16975, 0.04757, 0.08705],
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_of_a_seed_stay(name):
    """A range, a probability, the order of two changes or a column of numbers that is not what it was: each
    seed has other views, and no run that was measured can be repeated. Whoever means to change the views
    writes what is measured here anew."""
    images = torch.rand(100, 3, 8, 16, generator=generator())
    images = torch.nn.functional.interpolate(images, size=(32, 128), mode="bicubic").clamp(0, 1)
    view = VIEWS[name][0](images, generator())
    along, down = view.diff(dim=3), view.diff(dim=2)
    measured = [view.mean(), view.std(), grey_of(view).std(), along.std(), down.std()]
    assert torch.tensor(measured).tolist() == pytest.approx(VIEWS_OF_A_SEED[name], abs=2e-5)


def test_columns_of_numbers():
    """A column for which no number is drawn, which a slice would leave out in silence; a range that nothing
    uses."""
    for columns, numbers in ((data.MOVED_VIEW, data.VIEW_NUMBERS), (data.STILL_VIEW, data.VIEW_NUMBERS),
                             (data.AUGMENTATION, data.AUGMENT_NUMBERS)):
        assert sum(columns.values()) <= numbers
    assert set(data.RANGES) <= set(data.MOVED_VIEW) | set(data.AUGMENTATION)


def test_an_augmentation_more_leaves_the_others_as_they_were(monkeypatch):
    """A new probability moves the columns of all that is drawn after it: it is another run, and nobody knows
    why."""
    images, numbers = crops(8), torch.rand(8, data.AUGMENT_NUMBERS, generator=generator())
    before = data.augment_from_numbers(images, numbers)
    more = data.AUGMENT_CHANCES | {"mine": .5, "yours": .5}
    assert len(data.AUGMENT_CHANCES) == data.AUGMENTATION["chances"]
    monkeypatch.setattr(data, "AUGMENT_CHANCES", more)
    monkeypatch.setattr(data, "AUGMENTATION", data.AUGMENTATION | {"how_much": 1})
    drawn = data.name_columns(numbers, data.AUGMENTATION)
    assert drawn["how_much"].shape == (8,)
    strengths = data.choose_augmentations(drawn)
    changed = numbers[:, 14] > data.P_UNCHANGED
    assert torch.equal(strengths["mine"], ((drawn["more_chances"][:, 0] < .5) & changed).float())
    assert torch.equal(strengths["yours"], ((drawn["more_chances"][:, 1] < .5) & changed).float())
    assert torch.equal(data.augment_from_numbers(images, numbers), before)
    monkeypatch.setattr(data, "AUGMENT_CHANCES", more | dict.fromkeys("abc", .5))
    with pytest.raises(ValueError, match="no fifth"):                   # it would do nothing, and not say so
        data.augment_from_numbers(images, numbers)


def one_operation(name, **drawn):
    """augment's numbers of one crop that has this operation alone, its numbers in the middle but for
    `drawn`."""
    numbers, start = torch.full((1, data.AUGMENT_NUMBERS), .5), 0
    for column, width in data.AUGMENTATION.items():
        numbers[:, start:start + width] = drawn.get(column, .5)
        start += width
    numbers[:, :len(data.AUGMENT_CHANCES)] = 1
    numbers[:, list(data.AUGMENT_CHANCES).index(name)] = 0
    return numbers


def test_each_operation_does_what_it_is_called():
    """Numbers that went to another operation, and a crop that is cut at the other end: from a ramp, dark
    at the left and the top, that is seen in what is left."""
    y, x = torch.meshgrid(torch.linspace(0, .5, 32), torch.linspace(0, .5, 128), indexing="ij")
    ramp = torch.stack([x + y, x + y, x + y])[None]
    as_it_is = data.augment_from_numbers(ramp, one_operation("rotate"))                     # by no angle
    assert torch.allclose(as_it_is, ramp, atol=1e-3)

    cut_left = data.augment_from_numbers(ramp, one_operation("horizontal", left=1., right=0.)) - ramp
    assert cut_left[..., 0].mean() > .005 and cut_left[..., -1].abs().max() < .001
    cut_right = data.augment_from_numbers(ramp, one_operation("horizontal", left=0., right=1.)) - ramp
    assert cut_right[..., -1].mean() < -.005 and cut_right[..., 0].abs().max() < .001
    cut_top = data.augment_from_numbers(ramp, one_operation("vertical", top=1., bottom=0.)) - ramp
    assert cut_top[:, :, 0].mean() > .02 and cut_top[:, :, -1].abs().max() < .001

    brighter = data.augment_from_numbers(ramp, one_operation("jitter", brightness=.75))     # by 1.2
    assert torch.allclose(brighter, (1.2 * ramp).clamp(0, 1), atol=2e-3)
    red = torch.tensor([.8, .2, .3]).view(1, 3, 1, 1).expand(1, 3, 32, 128)
    same = dict(saturation=per_crop(1), hue=per_crop(0), brightness=per_crop(1), contrast=per_crop(1),
                haze=per_crop(0))
    for name, most in {"saturation": 1.2, "hue": .1, "contrast": 1.4}.items():
        jittered = data.augment_from_numbers(red, one_operation("jitter", **{name: 1.}))
        by_hand = data.recolour(red, **same | {name: per_crop(most)})
        assert torch.allclose(jittered, by_hand, atol=2e-3), name
    hazy = data.augment_from_numbers(ramp, one_operation("haze", haze=1.))
    assert torch.allclose(hazy, .25 + .5 * ramp, atol=2e-3)
    inverted = data.augment_from_numbers(ramp, one_operation("invert"))
    assert torch.allclose(inverted, 1 - ramp, atol=2e-3)
    faded = data.augment_from_numbers(red, one_operation("fade", fade=1.))
    grey = data.augment_from_numbers(red, one_operation("grey"))
    assert faded.std(1).max() < 1e-3 and (grey - faded).abs().max() < 1e-3


def one_strength(name):
    """What a function is to choose: this operation for every crop, and no other."""
    def choose(drawn, strength=1.0):
        none = torch.zeros(len(drawn["noise_start"]) if "noise_start" in drawn else len(drawn["solarize"]))
        names = [*data.OPERATIONS, *data.AUGMENT_CHANCES, "jitter", "grey", "noise"]
        return dict.fromkeys(names, none) | {name: none + strength}
    return choose


def test_every_operation_that_is_chosen_acts(monkeypatch):
    """An operation that is drawn, counted among three to ten, and then forgotten; or one that acts on all."""
    images, numbers = crops(6), torch.full((6, 100), .9)
    as_they_are = to_unit(images)

    def changes(view):
        return (view - as_they_are).abs().mean() > 1e-3
    for name in [*data.OPERATIONS, "jitter", "grey"]:
        monkeypatch.setattr(data, "choose_operations", one_strength(name))
        assert changes(data.moved_view(images, numbers)), name
        still = data.still_view(images, numbers)
        assert changes(still) == (name in (*data.LOOK, "jitter", "grey")), name
    monkeypatch.setattr(data, "choose_operations", one_strength("noise"))
    random_numbers = torch.rand(6, 100, generator=generator())
    assert changes(data.still_view(images, random_numbers))
    for name in data.AUGMENT_CHANCES:
        monkeypatch.setattr(data, "choose_augmentations", one_strength(name))
        assert changes(data.augment_from_numbers(images, random_numbers)), name
    monkeypatch.setattr(data, "choose_augmentations", one_strength("nothing"))
    assert torch.allclose(data.augment_from_numbers(images, random_numbers), as_they_are, atol=1e-4)


def test_how_often_an_operation_is_chosen():
    """Two operations, or eleven; a probability the wrong way round; a strength that reaches nobody."""
    numbers = torch.rand(20_000, data.VIEW_NUMBERS, generator=generator())
    drawn = data.name_columns(numbers, data.MOVED_VIEW)
    strengths = data.choose_operations(drawn, .7)
    for name in [*data.OPERATIONS, "jitter", "noise"]:
        assert set(strengths[name].tolist()) == {0, torch.tensor(.7).item()}, name
    assert set(strengths["grey"].tolist()) == {0, 1}

    chosen = torch.stack([strengths[name] > 0 for name in data.OPERATIONS]).float()
    how_many = torch.bincount(chosen.sum(0).long(), minlength=11)
    assert how_many[:3].sum() == 0 and len(how_many) == 11
    assert (how_many[3:] / 20_000 - 1 / 8).abs().max() < .01
    assert (chosen.mean(1) - .65).abs().max() < .015
    for name, share in {"jitter": .8, "noise": .5, "grey": .7 * .2}.items():
        assert ((strengths[name] > 0).float().mean() - share).abs() < .015, name


def test_how_often_fine_tuning_augments():
    """Probabilities of one operation given to another, or crops that are to stay as they are changed."""
    numbers = torch.rand(20_000, data.AUGMENT_NUMBERS, generator=generator())
    strengths = data.choose_augmentations(data.name_columns(numbers, data.AUGMENTATION))
    assert list(strengths) == list(data.AUGMENT_CHANCES)
    together = torch.stack(list(strengths.values()))
    assert set(together.unique().tolist()) == {0, 1}
    for name, chance in data.AUGMENT_CHANCES.items():
        share = strengths[name].mean() / (1 - data.P_UNCHANGED)
        assert (share - chance).abs() < .015, name
    nothing_by_chance = np.prod([1 - chance for chance in data.AUGMENT_CHANCES.values()])
    unchanged = (together.sum(0) == 0).float().mean()
    assert (unchanged - (.125 + .875 * nothing_by_chance)).abs() < .01


def test_how_far_points_move(monkeypatch):
    """A perspective or a bend of half the size, or one that pushes all points to one side; a rotation that
    goes one way alone."""
    seen = {}

    def warp(images, corners, moves):
        seen.update(corners=corners, moves=moves)
        return images
    monkeypatch.setattr(data, "warp", warp)
    images = torch.zeros(2000, 3, 32, 128)

    def move(name, **numbers):
        drawn = {column: torch.full((2000,), .5) for column in data.MOVE_COLUMNS}
        drawn["corners"] = torch.rand(2000, 8, generator=generator())
        drawn["bend_points"] = torch.rand(2000, 32, generator=generator(1))
        for column, number in numbers.items():
            drawn[column] = torch.full((2000,), number)
        strengths = dict.fromkeys(data.OPERATIONS, torch.zeros(2000)) | {name: torch.ones(2000)}
        data.move_and_bend(images, strengths, drawn)
        return seen["corners"], seen["moves"]

    corners, moves = move("tilt", tilt=1.)                              # a side is 2 long
    inward = (data.SQUARE - corners) * data.SQUARE / 2
    assert inward.min() >= 0 and (inward.mean() - .06).abs() < .001 and moves.abs().max() == 0
    corners, moves = move("bend", bend=1.)
    assert torch.equal(corners, data.SQUARE.expand(2000, 4, 2))
    assert (moves.std() / 2 - .05).abs() < .001 and moves.mean().abs() < .002
    for number, degrees in ((1., 15), (0., -15), (.5, 0)):
        corners, _ = move("rotate", angle=number)
        angle = torch.tensor([degrees]).deg2rad()
        assert torch.allclose(corners[:1], data.turned(angle, 4.0), atol=1e-6)


def test_solarize_inverts_what_is_light():
    """Darkness inverted in the place of light, or another threshold."""
    greys = torch.tensor([.1, .3, .6, .8]).view(1, 1, 1, 4).expand(2, 3, 32, 4)
    drawn = {"solarize": torch.tensor([0., 1.])}                        # above 3/4, above 1/4
    got = data.solarize(greys, {"solarize": torch.ones(2)}, drawn)[:, 0, 0]
    assert torch.allclose(got, torch.tensor([[.1, .3, .6, .2], [.1, .7, .4, .2]]), atol=1e-6)


def test_strength():
    """Strength 0 still changes something, or strength does not order the ablation's weak, medium and
    strong."""
    images = crops(64)
    numbers = torch.rand(64, data.VIEW_NUMBERS, generator=generator())
    for view in data.moved_view, data.still_view:
        views = [view(images, numbers, strength) for strength in (0, .5, 1, 1.5)]
        changes = [(view - images / 255).abs().mean() for view in views]
        assert changes[0] < 1e-6 < changes[1] < changes[2] < changes[3]


def test_low_resolution_is_of_both_sides():
    """A picture that keeps its columns and loses its rows, or of half the pixels and not of a third."""
    for width in 1, 2:                          # pixels, of which half a picture still shows the second
        fine_stripes = (torch.arange(128) // width % 2).float()
        upright = fine_stripes.expand(1, 3, 32, 128)
        lying = fine_stripes[:32, None].expand(1, 3, 32, 128)
        for stripes in upright, lying:
            low = data.lower_resolution(stripes, {"low_resolution": torch.ones(1)})
            assert low.std() < .2 * stripes.std()
    broad = (torch.arange(128) // 32 % 2).float().expand(1, 3, 32, 128)
    assert (data.lower_resolution(broad, {"low_resolution": torch.ones(1)}) - broad).abs().mean() < .05


def test_fading_ends_in_grey():
    """A strength above 1 takes more colour than there is: red becomes green."""
    red = torch.tensor([.8, .2, .3]).view(1, 3, 1, 1).expand(1, 3, 32, 128)
    strengths = dict.fromkeys([*data.LOOK, "jitter", "grey"], torch.zeros(1)) | {"fade": torch.full((1,), 2.)}
    drawn = {column: torch.ones(1) for column in data.LOOK_COLUMNS}
    assert data.change_look(red, strengths, drawn).std(1).max() < 1e-3


def grey_of(images):
    return (images * data.LUMA.view(3, 1, 1)).sum(1)


def flat_grey(images):
    """(B, pixels) of mean 0 and length 1: a product of two is their correlation."""
    grey = grey_of(images).flatten(1)
    return torch.nn.functional.normalize(grey - grey.mean(1, keepdim=True), dim=1)


def test_look_keeps_the_place():
    """nsp's coarse view has each thing where the target has it, as dark or light, or what it predicts is
    unknowable."""
    images = torch.full((200, 3, 32, 128), 60, dtype=torch.uint8)
    spots = [(random.Random(i).randrange(4, 28), random.Random(-i).randrange(4, 124)) for i in range(200)]
    for i, (y, x) in enumerate(spots):
        images[i, :, y - 1:y + 2, x - 1:x + 2] = 250
    still, moved = (view(images, generator()).mean(1) for view in (still_view, data.guidance_view))
    still = torch.nn.functional.avg_pool2d(still, 3, 1, 1).flatten(1).argmax(1)
    where = torch.stack([still // 128, still % 128], 1) - torch.tensor(spots)
    assert where.abs().max() <= 2 and where.float().mean().abs() < .1
    assert (moved.flatten(1).argmax(1) != still).float().mean() > .5
    crop = crops(100)
    view = still_view(crop, generator())
    likeness = (flat_grey(view) * flat_grey(crop / 255)).sum(1)
    assert (likeness > .5).float().mean() > .97


@pytest.mark.parametrize("degrees", [15, -10, 4])
def test_rotation_is_pillows(degrees):
    """Turned the other way, by an angle stretched by the crop's shape, or with its ends cut off."""
    y, x = np.mgrid[:32, :128]
    squares = np.uint8(255 * (x // 11 % 2 ^ y // 11 % 2))[..., None].repeat(3, 2)
    image = Image.fromarray(squares).filter(ImageFilter.GaussianBlur(2))
    corners = data.turned(torch.tensor([degrees]).deg2rad(), 4.0)
    ours = data.warp(to_unit(torch.tensor(np.array(image)).permute(2, 0, 1)[None]), corners)[0]

    def turn(picture):
        turned = picture.rotate(degrees, Image.Resampling.BILINEAR, expand=True)
        return np.array(turned.resize((128, 32), Image.Resampling.BILINEAR)) / 255
    inside = turn(Image.new("L", (128, 32), 255)) > .99
    error = np.abs(ours.permute(1, 2, 0).numpy() - turn(image)).mean(2)
    assert inside.mean() > .4 and error[inside].mean() < .025, error[inside].mean()


def test_warp_is_pillows_perspective():
    """A homography of the wrong corners, or an affine map in its place."""
    image = picture(6, 128, 32).filter(ImageFilter.GaussianBlur(2))
    corners = torch.tensor([[-.9, -.5], [1., -.9], [.8, .7], [-1, 1]])
    ours = data.warp(to_unit(torch.tensor(np.array(image)).permute(2, 0, 1)[None]), corners[None])[0]
    square, rows = [(0, 0), (128, 0), (128, 32), (0, 32)], []
    for (x, y), (u, v) in zip(square, ((corners + 1) / 2 * torch.tensor([128., 32])).tolist()):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y, u], [0, 0, 0, x, y, 1, -v * x, -v * y, v]]
    rows = np.array(rows)
    solved = np.linalg.solve(rows[:, :8], rows[:, 8])
    theirs = image.transform((128, 32), Image.Transform.PERSPECTIVE, solved, Image.Resampling.BILINEAR)
    assert np.abs(ours.permute(1, 2, 0).numpy() - np.array(theirs) / 255)[2:-2, 2:-2].mean() < .01


def test_points_that_bend_reach_the_rims():
    """Outer points that stand inside the picture: what is between them moves too far, and the rims stiffly."""
    image = to_unit(crops(1))
    moves = torch.zeros(1, 2, 4, 4)
    moves[:, 0] = torch.linspace(-.2, .2, 4)                # in x: as much wider as they are far from the middle
    wider = data.warp(image, data.SQUARE[None] * torch.tensor([1.2, 1]))
    assert (data.warp(image, data.SQUARE[None], moves) - wider).abs().mean() < .005


def test_homography_takes_corners_to_corners():
    """Heckbert's letters in the wrong places: the unit square's corners go elsewhere, or in another order."""
    corners = data.SQUARE + .4 * torch.rand(5, 4, 2, generator=generator())
    square = torch.tensor([[0., 0, 1], [1, 0, 1], [1, 1, 1], [0, 1, 1]])
    there = data.homography(corners) @ square.T                                     # (5, 3, 4)
    there = (there[:, :2] / there[:, 2:]).mT
    assert torch.allclose(there, corners, atol=1e-5)


def per_crop(*values):
    return torch.tensor(values, dtype=torch.float32)


def test_blur_and_sharpness():
    """A blur that darkens the rim, or has another size than asked; a sharpening that blurs; of a blurred crop,
    the mask of another blur, as if widths added up and not variances."""
    flat = torch.full((2, 3, 32, 128), .7)
    assert torch.allclose(data.focus(flat, per_crop(1.5, .5), per_crop(0, 1)), torch.tensor(.7), atol=1e-5)
    point, sigma = torch.zeros(3, 3, 32, 128), per_crop(.8, 1, 1.2)
    point[:, :, 16, 64] = 1
    blurred = data.focus(point, sigma, per_crop(0, 0, 0)).sum(1) / 3
    along, down = (torch.arange(128) - 64) ** 2, (torch.arange(32) - 16) ** 2
    assert torch.allclose((blurred.sum(1) * along).sum(1), sigma ** 2, rtol=.1)
    assert torch.allclose((blurred.sum(2) * down).sum(1), sigma ** 2, rtol=.1)
    sharpened = data.focus(point, per_crop(0, 0, 0), per_crop(0, .5, 1))
    assert sharpened[:, 0, 16, 64].diff().min() > .1
    away = data.focus(point, per_crop(1, 1, 1), per_crop(0, 0, 0))      # what one more blur takes away
    strength = torch.tensor([0, .5, 1]).view(3, 1, 1, 1)
    assert torch.allclose(sharpened, point + strength * (point - away), atol=1e-4)
    both = data.focus(point, per_crop(.7, .7, .7), per_crop(0, .5, 1))
    blurred = data.focus(point, per_crop(.7, .7, .7), per_crop(0, 0, 0))
    away = data.focus(blurred, per_crop(1, 1, 1), per_crop(0, 0, 0))
    assert torch.allclose(both, blurred + strength * (blurred - away), atol=2e-3)


def test_colour_and_noise():
    """Colours whose grey changes with the hue; noise of another size than asked."""
    middle = torch.rand(4, 3, 32, 128, generator=generator()) * .2 + .4
    ones = per_crop(1, 1, 1, 1)
    turned = data.recolour(middle, per_crop(1, 1, 0, .5), per_crop(.1, -.3, 0, 0), ones, ones, 0 * ones)
    assert torch.allclose(grey_of(turned), grey_of(middle), atol=1e-4)
    assert (turned[2].std(0) < 1e-4).all()
    for k, turns in ((0, .1), (1, -.3)):                                # by Python's own colours
        before, after = (torch.tensor(colorsys.rgb_to_yiq(*images[k, :, 9, 9].tolist()))
                         for images in (middle, turned))
        angles = torch.atan2(after[2], after[1]) - torch.atan2(before[2], before[1])
        assert (angles / (2 * math.pi) - turns + .5).remainder(1) == pytest.approx(.5, abs=.02)
        assert after[1:].norm() == pytest.approx(before[1:].norm().item(), rel=.1)
    changed = data.recolour(middle, ones, 0 * ones, 1.1 * ones, .5 * ones, .2 * ones)
    mean = grey_of(1.1 * middle).mean((1, 2)).view(4, 1, 1, 1)
    by_hand = .8 * (.5 * 1.1 * middle + .5 * mean) + .1
    assert torch.allclose(changed, by_hand, atol=1e-4)
    drawn = {"noise_start": torch.rand(4, generator=generator()), "noise_deviation": per_crop(1, 1, 1, 1)}
    grey = torch.full((4, 3, 32, 128), .5)
    noisy = data.add_noise(grey, {"noise": per_crop(2, 1, .4, 0)}, drawn) - .5              # shares of 0.05
    assert torch.allclose(noisy.std((1, 2, 3)), per_crop(.1, .05, .02, 0), atol=.003)
    assert noisy.mean().abs() < .002
    fixed = torch.rand(99, generator=generator()) - .5                  # in every process, and on every rank
    assert torch.equal(data.noise_tape()[:99], fixed)


def test_coarse_and_unit():
    """Single pixels in place of averages; height and width exchanged; uint8 and float scaled differently."""
    images = crops(4)
    coarse = data.coarse_view(images, (16, 64))
    assert coarse.shape == (4, 3, 16, 64)
    assert torch.allclose(coarse[1, 2, 3, 5], images[1, 2, 6:8, 10:12].float().mean() / 255)
    coarser = data.coarse_view(images, (8, 32))                         # of 16 pixels, not of the 4 in the middle
    assert torch.allclose(coarser[1, 2, 3, 5], images[1, 2, 12:16, 20:24].float().mean() / 255)
    assert torch.allclose(to_unit(images), to_unit(images.float() / 255), atol=1e-6)
    assert to_unit(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [0, 1]
    for other in images.float(), images.float() / 127.5 - 1, torch.full((1,), math.nan):
        with pytest.raises(UserError, match="images from .*; expected uint8, or float in"):
            to_unit(other)                              # tokens of another picture, and nobody says so
    with pytest.raises(UserError, match="images are a ndarray; expected a tensor"):
        to_unit(images.numpy())
    with pytest.raises(UserError, match="from 4 to 253; expected uint8, or float in"):
        data.guidance_view(images.float(), generator())                 # white noise, and nobody says so
    with pytest.raises(UserError, match="from -0.9.* to 0.9.*; expected"):
        data.guidance_view(images.float() / 127.5 - 1, generator())     # another picture
    for view in (data.guidance_view, data.augment):
        with pytest.raises(UserError, match="images are a ndarray; expected a tensor"):
            view(images.numpy(), generator())


def test_a_charsets_name_is_no_charset(tmp_path, monkeypatch):
    """Words of 3 and 6 alone for charset="36", or of the letters of a file's name; a traceback for none."""
    (tmp_path / "greek.txt").write_text("αβγ", "utf-8")
    monkeypatch.chdir(tmp_path)
    for charset in ("36", "94", "greek.txt", "", " "):
        with pytest.raises(UserError, match="expected the characters themselves"):
            data.open_source("synth:6", charset=charset)
    assert set("".join(data.open_source("synth:6", charset="63").label(i) for i in range(6))) == set("63")


def test_a_picture_that_fails_leaves_what_was_there(tmp_path):
    """A crop, or a picture of yesterday, emptied by one that Pillow cannot write; a link that becomes a file."""
    (tmp_path / "keep.jpg").write_bytes(b"yesterday's")
    (tmp_path / "link.jpg").symlink_to("keep.jpg")
    with pytest.raises(OSError, match="could not be written"):
        data.save_picture(Image.new("RGB", (8, 70000)), str(tmp_path / "keep.jpg"))     # no JPEG is so high
    assert (tmp_path / "keep.jpg").read_bytes() == b"yesterday's"
    data.save_picture(Image.new("RGB", (8, 8)), str(tmp_path / "link.jpg"))
    assert Image.open(tmp_path / "keep.jpg").size == (8, 8) and (tmp_path / "link.jpg").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["keep.jpg", "link.jpg"]


def test_labels_behind_a_link(tmp_path):
    """Labels that were typed by hand, written over through a link to them."""
    (tmp_path / "crops").mkdir()
    picture(0).save(tmp_path / "crops" / "a.png")
    (tmp_path / "crops" / "labels.tsv").write_text("a.png\tword\n")
    (tmp_path / "link.tsv").symlink_to("crops/labels.tsv")
    assert data.holds_labels(str(tmp_path / "link.tsv"))


# ---- the command line

def command(*arguments, env=None):
    words = [sys.executable, os.path.join(SCRIPTS, "data.py"), *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, env=env)


def call(monkeypatch, capsys, *arguments):
    """data.py's main() in this process: what it prints."""
    monkeypatch.setattr(sys, "argv", ["data.py", *map(str, arguments)])
    data.main()
    return capsys.readouterr().out


def test_one_line_and_status_2(tmp_path):
    """A stack trace for a typing error."""
    result = command("check", tmp_path / "nowhere")
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.count("\n") == 1 and "no such file" in result.stderr
    (tmp_path / "labels.tsv").write_text("a.png\t\u8bcd", encoding="utf-8")
    picture(0).save(tmp_path / "a.png")
    result = command("check", tmp_path / "labels.tsv", env=dict(os.environ, PYTHONIOENCODING="cp1252"))
    assert result.returncode == 0 and "\\u8bcd" in result.stdout, result.stderr
    tests = ["--against", tmp_path / "labels.tsv"]
    result = command("check", tmp_path / "labels.tsv", *tests, "--write_list", "/dev/full")
    assert result.returncode == 2 and "No space left" in result.stderr and result.stderr.count("\n") == 1
    (tmp_path / "sheet.png").symlink_to("/dev/full")
    result = command("show", tmp_path / "labels.tsv", "--out", tmp_path / "sheet.png")
    assert result.returncode == 2 and "sheet.png: could not be written (No space left" in result.stderr


def test_flags_without_effect(tmp_path, words, monkeypatch, capsys):
    """A flag that was typed in vain, and nobody says so."""
    with pytest.raises(UserError, match="--fonts .*has no effect without rendered words; add synth"):
        call(monkeypatch, capsys, "show", words, "--fonts", tmp_path)
    flags = ["--n", 3, "--max_length", 30, "--out", tmp_path / "s.png"]
    call(monkeypatch, capsys, "show", words, "synth:2", *flags)                 # has an effect on one of both
    os.remove(tmp_path / "s.png")
    with pytest.raises(UserError, match="--alike .*--against"):
        call(monkeypatch, capsys, "check", words, "--alike", ".9")              # the default, but typed
    with pytest.raises(UserError, match="--coarse 33x128: expected at most 32x128, a crop's size"):
        call(monkeypatch, capsys, "show", words, "--coarse", "33x128", "--out", tmp_path / "s.png")
    with pytest.raises(UserError, match="--write_list .*--against"):
        call(monkeypatch, capsys, "check", words, "--write_list", tmp_path / "list.tsv")
    assert not os.listdir(tmp_path)


def test_pack(tmp_path, words, damaged, monkeypatch, capsys):
    """Images coded anew, labels shifted by damage, a data set overwritten, half of one under the final
    name; a count that is missing, without which other programs read nothing; damage that is said to be left
    out by list."""
    said = call(monkeypatch, capsys, "pack", words, damaged[0], tmp_path / "out")
    source, packed = data.open_sources([words, damaged[0]]), data.open_source(str(tmp_path / "out"))
    kept = [i for i in range(80) if i - 50 not in damaged[1]]
    assert "72 of 80 entries written and read back, 0 left out by list\n" in said
    assert said.count("left out, damaged") == 8 and len(packed) == 72
    with data.reading(packed.folder) as transaction:
        assert transaction.get(b"num-samples") == b"72"
    for k, i in enumerate(kept):
        assert (packed.file_bytes(k), packed.label(k)) == (source.file_bytes(i), source.label(i))
    with pytest.raises(UserError, match="exists already"):
        call(monkeypatch, capsys, "pack", words, tmp_path / "out")
    with pytest.raises(UserError, match="No such file .*expected a new folder, in one that is there"):
        call(monkeypatch, capsys, "pack", words, tmp_path / "no" / "out")
    assert sorted(os.listdir(tmp_path)) == ["damaged", "out"]
    (tmp_path / "bare").mkdir()
    picture(0).save(tmp_path / "bare" / "a.png")
    with pytest.raises(UserError, match="bare a.png: no label, unlike those before it"):
        call(monkeypatch, capsys, "pack", words, tmp_path / "bare", f"{tmp_path}/mixed/")
    (tmp_path / "bare" / "a.png").write_bytes(b"")
    with pytest.raises(UserError, match="bare: none of its 1 crops is left to pack"):
        call(monkeypatch, capsys, "pack", tmp_path / "bare", tmp_path / "none")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data, "put_crop", interrupt)
        call(monkeypatch, capsys, "pack", words, tmp_path / "none")
    assert sorted(os.listdir(tmp_path)) == ["bare", "damaged", "out"]


def interrupt(*_):
    raise KeyboardInterrupt


def test_commands_are_one_process(tmp_path, words, monkeypatch, capsys):
    """`WORLD_SIZE` left over from elsewhere, or torchrun: each process takes its share of the crops for all of
    them, and packs half a data set."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    for arguments in (["pack", words, tmp_path / "half"], ["check", words], ["show", words]):
        with pytest.raises(SystemExit) as end:
            call(monkeypatch, capsys, *arguments)
        assert end.value.code == 2 and "start it without torchrun" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_pack_reads_back_what_it_wrote(tmp_path, words, monkeypatch, capsys):
    """A disk that keeps something else than was written: crops lost, and status 0."""
    put_crop = data.put_crop
    wrong = {"image": lambda txn, k, file, label: put_crop(txn, k, file + b"x", label),
             "label": lambda txn, k, file, label: put_crop(txn, k, file, label + "x")}
    for kind, put in wrong.items():
        monkeypatch.setattr(data, "put_crop", put)
        with pytest.raises(UserError, match="50 entries are not what was written"):
            call(monkeypatch, capsys, "pack", words, tmp_path / kind)
        assert not (tmp_path / kind).exists()


def test_pack_makes_room(tmp_path):
    """MDB_MAP_FULL from 16 MB on."""
    class Large(data.Source):
        n, name = 40, "large"

        def get(self, i):
            return data.Crop(torch.zeros(3, 32, 128, dtype=torch.uint8), "x", None)

        def file_bytes(self, i):
            return bytes(2 ** 19)
    assert data.write_lmdb(str(tmp_path / "out"), Large(), set(), workers=0) == list(range(40))


def test_pack_synth(tmp_path, monkeypatch, capsys):
    """Rendered words that change on being stored."""
    call(monkeypatch, capsys, "pack", "synth:5:2", tmp_path / "out")
    for ours, theirs in zip(data.open_source(str(tmp_path / "out")), data.open_source("synth:5:2")):
        assert torch.equal(ours[0], theirs[0]) and ours[1] == theirs[1]


def test_pack_draws_lines_of_a_charset(tmp_path, words, monkeypatch, capsys):
    """Another alphabet that pretrain.py, which has no --charset, cannot be given; a flag typed in vain."""
    (tmp_path / "c.txt").write_text("xyz")
    flags = ["--charset", tmp_path / "c.txt", "--max_length", 40]
    call(monkeypatch, capsys, "pack", "synth:30:5", tmp_path / "out", *flags)
    packed = data.open_source(tmp_path / "out")
    drawn = data.open_source("synth:30:5", charset="xyz", max_length=40)
    assert [label for _, label in packed] == [label for _, label in drawn]
    assert torch.equal(packed[29][0], drawn[29][0])
    with pytest.raises(UserError, match="--max_length 40: has no effect without rendered words"):
        call(monkeypatch, capsys, "pack", words, tmp_path / "other", "--max_length", 40)


def test_list_is_written_though_nobody_listens(tmp_path, words, monkeypatch, capsys):
    """`check ... --write_list list.tsv | head -1` that ends without a list: `pack` takes the last one."""
    def report(counts, source):
        raise BrokenPipeError
    monkeypatch.setattr(data.Counts, "report", report)
    with pytest.raises(BrokenPipeError):
        call(monkeypatch, capsys, "check", words, "--against", words, "--write_list", tmp_path / "list.tsv")
    assert (tmp_path / "list.tsv").read_text().count("same bytes") == 50


def test_check_against_and_without(tmp_path, words, monkeypatch, capsys):
    """Training crops that are also test crops, as they are or coded anew and resized, go unseen; others do
    not."""
    again = encode(picture(9).resize((80, 26)), "JPEG", quality=60)
    cut = encode(picture(11).crop((6, 0, 90, 30)))                          # cropped anew: it is not looked for
    test = [(encode(picture(7)), b"w7"), (again, b"w9"), (encode(picture(90)), b"x"), (cut, b"w11")]
    test = write_lmdb(tmp_path / "test", test)
    said = call(monkeypatch, capsys, "check", words, "--against", test, "--write_list", tmp_path / "list.tsv")
    assert "50 entries = 50 read + 0 damaged" in said and "also in" in said
    rows = [line.split("\t") for line in (tmp_path / "list.tsv").read_text().splitlines()]
    assert [row[:3] + row[4:-1] for row in rows] == [
        ["7", "words image-000000008", "w7", "test image-000000001", "w7"],
        ["9", "words image-000000010", "w9", "test image-000000002", "w9"]]
    assert rows[0][3] == "same bytes" and rows[1][3].startswith("alike")
    assert [row[-1] for row in rows] == [f"{zlib.crc32(encode(picture(i))):08x}" for i in (7, 9)]
    said = call(monkeypatch, capsys, "check", words, "--against", test, "--alike", 1)
    assert f"also in {test}: 1\n" in said
    with pytest.raises(SystemExit):                                         # a percentage: none is so alike
        call(monkeypatch, capsys, "check", words, "--against", test, "--alike", 90)
    assert "--alike 90: expected a number in [0, 1]" in capsys.readouterr().err
    with pytest.raises(UserError, match="words@2: pack writes no crop N times; leave @2 out"):
        call(monkeypatch, capsys, "pack", f"{words}@2", tmp_path / "twice", "--without", tmp_path / "list.tsv")
    assert not (tmp_path / "twice").exists()                                # the list would name one copy of two
    (tmp_path / "far.tsv").write_text("50\tx\n")
    with pytest.raises(UserError, match="far.tsv: it names entry 50 of 50; expected the list"):
        call(monkeypatch, capsys, "pack", words, tmp_path / "far", "--without", tmp_path / "far.tsv")
    call(monkeypatch, capsys, "pack", words, tmp_path / "clean", "--without", tmp_path / "list.tsv")
    clean = data.open_source(str(tmp_path / "clean"))
    assert [label for _, label in clean] == [f"w{i}" for i in range(50) if i not in (7, 9)]
    windows = [(encode(picture(7)), b"w7\r"), (encode(picture(8)), b"w8\r"),        # line ends in labels
               (encode(picture(9)), b"w\n9")]
    typed = write_lmdb(tmp_path / "typed", windows)
    call(monkeypatch, capsys, "check", typed, "--against", typed, "--write_list", tmp_path / "typed.tsv")
    assert (tmp_path / "typed.tsv").read_bytes().count(b"\n") == 3                  # a line each
    call(monkeypatch, capsys, "check", typed, "--against", test, "--write_list", tmp_path / "typed.tsv")
    call(monkeypatch, capsys, "pack", typed, tmp_path / "clean2", "--without", tmp_path / "typed.tsv")
    assert [label for _, label in data.open_source(str(tmp_path / "clean2"))] == ["w8\r"]
    with pytest.raises(UserError, match="--without"):
        call(monkeypatch, capsys, "pack", test, tmp_path / "other", "--without", tmp_path / "list.tsv")
    # another set of the same name: sound crops would be left out of it
    namesake = write_lmdb(tmp_path / "b" / "words", [(encode(picture(i)), b"w%d more" % i) for i in range(50)])
    (tmp_path / "longer.tsv").write_text("7\twords image-000000008\tw7 more\tsame bytes\n")
    for src, lines in (namesake, "list.tsv"), (words, "longer.tsv"):
        with pytest.raises(UserError, match="--without .*: it names other entries"):
            call(monkeypatch, capsys, "pack", src, tmp_path / "other", "--without", tmp_path / lines)
    (tmp_path / "labels.tsv").write_text("a.png\tword\n")
    with pytest.raises(UserError, match="a line does not begin with a number; expected the list that check"):
        call(monkeypatch, capsys, "pack", words, tmp_path / "other", "--without", tmp_path / "labels.tsv")
    with pytest.raises(SystemExit):
        call(monkeypatch, capsys, "check", "")
    assert "SRC is empty; give it a value\n" in capsys.readouterr().err
    with pytest.raises(UserError, match="--against"):                   # would empty the list
        call(monkeypatch, capsys, "check", words, "--write_list", tmp_path / "list.tsv")
    with pytest.raises(UserError, match="wrods"):               # `pack --without` would take an empty list
        call(monkeypatch, capsys, "check", "wrods", "--against", test, "--write_list", tmp_path / "none.tsv")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="none of its 1 entries"):
        call(monkeypatch, capsys, "check", tmp_path / "bad", "--against", test,
             "--write_list", tmp_path / "none.tsv")
    assert not (tmp_path / "none.tsv").exists()


def test_pack_deletes_and_changes_nobodys_crops(tmp_path, words, monkeypatch, capsys):
    """An LMDB named out.part, that of the crops even, deleted for being what a pack had left; a tree that is packed
    into itself, of which every crop counts twice from then on."""
    own = tmp_path / "out.part"
    call(monkeypatch, capsys, "pack", words, own)
    call(monkeypatch, capsys, "pack", own, tmp_path / "out")
    assert len(data.open_source(str(own))) == len(data.open_source(str(tmp_path / "out"))) == 50
    with pytest.raises(UserError, match="out.part is read, and would be changed; name a folder outside it"):
        call(monkeypatch, capsys, "pack", own, own / "all")

    # Two packs at a time to one name: the later one finds a folder there, and leaves it alone.
    def pack_meanwhile(*args):
        shutil.copytree(own, tmp_path / "late")
    monkeypatch.setattr(data, "check_written", pack_meanwhile)
    with pytest.raises(UserError, match="late: cannot be written .*not empty"):
        call(monkeypatch, capsys, "pack", "synth:3", tmp_path / "late")
    assert len(data.open_source(str(tmp_path / "late"))) == 50

    # What is left of a pack that was killed is not read with the rest of a tree.
    tree = tmp_path / "tree"
    shutil.copytree(own, tree / "set")
    monkeypatch.setattr(data.shutil, "rmtree", lambda *args, **flags: None)
    monkeypatch.setattr(data, "check_written", killed)
    with pytest.raises(KeyboardInterrupt):
        call(monkeypatch, capsys, "pack", "synth:3", tree / "half")
    assert len(list(tree.glob(".half.part*/data.mdb"))) == 1
    assert len(data.open_source(str(tree))) == 50


def killed(*args):
    raise KeyboardInterrupt


def test_a_list_of_another_set_of_the_same_names(tmp_path, monkeypatch, capsys):
    """A list that was made of one unlabelled LMDB takes out the crops of those numbers of another, whose folder
    has the same name."""
    first = write_lmdb(tmp_path / "a" / "train", [(encode(picture(i)), None) for i in range(4)])
    second = write_lmdb(tmp_path / "b" / "train", [(encode(picture(9 - i)), None) for i in range(4)])
    test = write_lmdb(tmp_path / "test", [(encode(picture(2)), b"w")])
    call(monkeypatch, capsys, "check", first, "--against", test, "--write_list", tmp_path / "list.tsv")
    with pytest.raises(UserError, match="list.tsv: it names other entries; expected the list"):
        call(monkeypatch, capsys, "pack", second, tmp_path / "out", "--without", tmp_path / "list.tsv")
    said = call(monkeypatch, capsys, "pack", first, tmp_path / "out", "--without", tmp_path / "list.tsv")
    assert "3 of 4 entries written and read back, 1 left out by list" in said


def test_a_crops_number_is_whole(words):
    """Crop 2.5 of rendered words, which is none; numpy's whole numbers refused."""
    for source in (data.open_source("synth:9"), data.open_source(str(words))):
        image, label = source[np.int64(3)]
        assert label == source[3][1] and torch.equal(image, source[3][0])
        for odd in (2.5, "2", None):
            with pytest.raises(TypeError):
                source[odd]


def test_the_36_in_another_order(tmp_path):
    """A file of the 36 that begins with the letters, whose labels keep their case: each capital is left out."""
    (tmp_path / "own.txt").write_text(data.CHARSETS["36"][10:] + data.CHARSETS["36"][:10])
    charset = data.read_charset(str(tmp_path / "own.txt"))
    assert data.fit_label("Ab1", charset, 25) == data.fit_label("Ab1", data.CHARSETS["36"], 25) == ("ab1", "")
    assert evaluate.default_protocol(charset) == "waics"


@pytest.mark.skipif(sys.platform == "win32", reason="it has no such names")
def test_names_that_no_column_holds(tmp_path, monkeypatch, capsys):
    """A tab or a line end in a file's name that spoils the list, which is then refused; the last line of a
    list that was edited, passed over for want of a line end."""
    (tmp_path / "crops").mkdir()
    for k, name in enumerate(("a\tb.png", "c\nd.png", "e\r.png", "f.png", "g.png")):
        picture(k).save(tmp_path / "crops" / name)
    test = write_lmdb(tmp_path / "test", [(encode(picture(k)), b"w") for k in range(4)])
    lines = tmp_path / "list.tsv"
    call(monkeypatch, capsys, "check", tmp_path / "crops", "--against", test, "--write_list", lines)
    assert [line.split("\t")[1] for line in lines.read_text().split("\n")[:-1]] == [
        "crops a\\tb.png", "crops c\\nd.png", "crops e\\r.png", "crops f.png"]
    lines.write_text(lines.read_text().rstrip("\n"))
    call(monkeypatch, capsys, "pack", tmp_path / "crops", tmp_path / "clean", "--without", lines)
    (kept,) = [crop for crop, _ in data.open_source(tmp_path / "clean")]
    assert torch.equal(kept, data.decode(encode(picture(4))))


def test_nothing_is_written_over_what_is_read(tmp_path, monkeypatch, capsys):
    """Labels, or a crop, lost for a slip of the pen, SRC@N typed or not; a database or a checkpoint that is
    written over by text; a sheet that is one of the crops the next time; one that is refused beside an LMDB,
    where it is none."""
    picture(0).save(tmp_path / "a.png")
    picture(0).save(tmp_path / "crop", format="PNG")
    labels = tmp_path / "l.tsv"
    labels.write_text("a.png\tword\ncrop\tword\n")
    for words in (["check", "synth:2", "--against", labels, "--write_list", labels],
                  ["check", labels, "--against", "synth:2", "--write_list", labels],
                  ["check", f"{labels}@2", "--against", "synth:2", "--write_list", labels],
                  ["check", "synth:2", "--against", labels, "--write_list", tmp_path / "crop"],
                  ["check", labels, "--against", labels, "--write_list", tmp_path / "crop"],
                  ["show", tmp_path / ".." / tmp_path.name / "l.tsv", "--out", tmp_path / "a.png"],
                  ["show", tmp_path, "--out", tmp_path / "a.png"],
                  ["show", tmp_path, "--out", tmp_path / "new" / "sheet.png"]):
        with pytest.raises(UserError, match="is read, and would be changed"):
            call(monkeypatch, capsys, *words)
    for name in "data.mdb", "last.pt", "a.png":
        with pytest.raises(UserError, match=f"{name}: expected the name of a text file"):
            call(monkeypatch, capsys, "check", labels, "--against", "synth:2", "--write_list", tmp_path / name)
    assert labels.read_text() == "a.png\tword\ncrop\tword\n"
    with pytest.raises(UserError):                                      # and no folder is left behind
        call(monkeypatch, capsys, "show", "synth:2", "--coarse", "99x99", "--out", tmp_path / "left" / "a.png")
    assert not (tmp_path / "left").exists()
    call(monkeypatch, capsys, "show", labels, "--out", tmp_path / "sheet.png")
    call(monkeypatch, capsys, "show", tmp_path, "--out", f"{tmp_path}.png")             # beside the folder
    os.remove(f"{tmp_path}.png")
    database = write_lmdb(tmp_path / "database", [(encode(picture(0)), b"word")])
    call(monkeypatch, capsys, "show", database, "--out", tmp_path / "database" / "sheet.png")


def test_a_link_hides_nothing_that_is_read(tmp_path, monkeypatch, capsys):
    """Under the name of a link: a crop that is written over, a sheet or an LMDB among the crops."""
    (tmp_path / "set").mkdir()
    picture(0).save(tmp_path / "set" / "a.png")
    (tmp_path / "l.tsv").write_text("set/a.png\tword\n")
    (tmp_path / "link.png").symlink_to(tmp_path / "set" / "a.png")
    (tmp_path / "link").symlink_to(tmp_path / "set")
    for words in (["show", tmp_path / "l.tsv", "--out", tmp_path / "link.png"],
                  ["show", tmp_path / "set", "--out", tmp_path / "link" / "sheet.png"],
                  ["pack", tmp_path / "set", tmp_path / "link" / "new"]):
        with pytest.raises(UserError, match="is read, and would be changed"):
            call(monkeypatch, capsys, *words)


def test_check_counts(tmp_path, damaged, monkeypatch, capsys):
    """Reports that do not add up; characters outside the charset, damage and repeats left unsaid."""
    entries = [(encode(picture(1)), "ñ".encode()), (encode(picture(1)), b"b c")]
    twice = write_lmdb(tmp_path / "twice", entries)
    said = call(monkeypatch, capsys, "check", damaged[0], twice)
    assert "32 entries = 24 read + 8 damaged" in said and said.count("damaged: damaged image-") == 8
    assert "2 characters outside the 94: 'ñ' 1 ' ' 1" in said, said
    assert "repeat the bytes of another: 2" in said
    assert "width from 90 to 90, median 90; height from 30 to 30" in said
    assert "24 labels, length from 1 to 3, median 3" in said
    said = call(monkeypatch, capsys, "check", f"{damaged[0]}@2")
    assert "44 read + 16 damaged" in said and said.count("damaged: damaged image-") == 8


def test_alike_1_is_of_the_same_bytes_alone(tmp_path, words, monkeypatch, capsys):
    """--alike 1 that finds crops which are saved anew without loss: their likeness is 1, but for rounding."""
    anew = [(encode(picture(i), "PNG" if i == 0 else "BMP"), b"w%d" % i) for i in range(50)]
    test = write_lmdb(tmp_path / "anew", anew)
    said = call(monkeypatch, capsys, "check", words, "--against", test, "--alike", 1)
    assert f"also in {test}: 1\n" in said
    assert f"also in {test}: 50, " in call(monkeypatch, capsys, "check", words, "--against", test, "--alike", .999)


def test_fingerprints_by_hand():
    """A likeness of something else than edges, so that other words are alike, or darker copies are not."""
    images = crops(6)
    grey = np.einsum("bchw,c->bhw", images.numpy() / 255, [.299, .587, .114])
    small = grey.reshape(6, 8, 4, 32, 4).mean((2, 4))
    edges = np.concatenate([np.diff(small, axis=1).reshape(6, -1), np.diff(small, axis=2).reshape(6, -1)], 1)
    edges -= edges.mean(1, keepdims=True)
    edges /= np.linalg.norm(edges, axis=1, keepdims=True)
    prints = data.fingerprint(images)
    assert prints.shape == (6, 472) and np.abs(prints.numpy() - edges).max() < 1e-5
    darker = data.fingerprint(to_unit(images) * .5 + .2)
    assert torch.allclose(prints, darker, atol=1e-4)


def test_check_of_nothing_that_can_be_read(tmp_path, words, monkeypatch, capsys):
    """Status 0, and "also in: 0", of a set that was not read at all."""
    broken = write_lmdb(tmp_path / "broken", [(b"", b"x")] * 3)
    with pytest.raises(UserError, match="broken: none of its 3 entries could be read"):
        call(monkeypatch, capsys, "check", broken)
    assert "3 entries = 0 read + 3 damaged" in capsys.readouterr().out
    with pytest.raises(UserError, match="--against .*broken: none of 3 crops could be read"):
        call(monkeypatch, capsys, "check", words, "--against", broken, "--write_list", tmp_path / "list.tsv")
    assert not (tmp_path / "list.tsv").exists()
    again = encode(picture(7).resize((80, 26)), "JPEG", quality=60)
    half = write_lmdb(tmp_path / "half", [(b"", b"x"), (again, b"w7")])
    said = call(monkeypatch, capsys, "check", words, "--against", half)
    assert "half: 1 of 2 crops are damaged and are not looked for" in said and f"also in {half}: 1" in said
    assert said.endswith(f"\thalf image-000000002\tw7\t{zlib.crc32(encode(picture(7))):08x}\n")
    monkeypatch.setattr(data, "READ_AT_ONCE", 1)                        # the crop is the first of its batch
    said = call(monkeypatch, capsys, "check", words, "--against", half)
    assert said.endswith(f"\thalf image-000000002\tw7\t{zlib.crc32(encode(picture(7))):08x}\n")


def test_check_notices_doubled_quotes(tmp_path, monkeypatch, capsys):
    """A table that a program wrote as CSV, with tabs: quotes that become part of labels."""
    picture(0).save(tmp_path / "a.png")
    labels = ['"say ""hi"""', '""""', '"plain"', '""', 'a""b', '"a"b"']
    (tmp_path / "l.tsv").write_text("".join(f"a.png\t{label}\n" for label in labels))
    said = call(monkeypatch, capsys, "check", tmp_path / "l.tsv")
    assert "2 labels stand in quotes and double those in them" in said
    (tmp_path / "l.tsv").write_text("".join(f"a.png\t{label}\n" for label in labels[2:]))
    assert "quotes" not in call(monkeypatch, capsys, "check", tmp_path / "l.tsv")


def test_show_draws_what_it_names(words, monkeypatch, capsys):
    """A --seed without effect; views that are not those of training, or stand in another order; the height
    taken for the width."""
    rows = []
    monkeypatch.setattr(data, "draw_sheet", lambda drawn, path, fonts: rows.extend(drawn))
    flags = ["--n", 3, "--seed", 7, "--guidance", "--augment", "--coarse", "8x64"]
    call(monkeypatch, capsys, "show", words, *flags)
    source, same = data.open_source(words), generator(7)
    chosen = torch.randperm(50, generator=same)[:3].tolist()
    images = torch.stack([source[i][0] for i in chosen])
    views = [to_unit(images), data.guidance_view(images, same), still_view(images, same)]
    views += [data.augment(images, same), data.augment(images, same)]
    coarse = data.coarse_view(images, (8, 64))
    views.append(coarse.repeat_interleave(4, 2).repeat_interleave(2, 3))
    for k, row in enumerate(rows):
        assert [text for text, _ in row[0][1]] == [source.label(chosen[k])]
        assert torch.equal(row[0][0], images[k])                        # no pixel is a level darker
        for (drawn, _), view in zip(row, views, strict=True):
            assert torch.equal(drawn, (255 * view[k]).round().byte())
    assert len(rows) == 3


def test_show_draws_a_charset(tmp_path, words, monkeypatch, capsys):
    """A charset whose rendered words nobody has seen before training on them; a flag without effect."""
    (tmp_path / "c.txt").write_text("xyz")
    drawn = []
    monkeypatch.setattr(data, "draw_sheet", lambda rows, path, fonts: drawn.extend(rows))
    flags = ["--n", 60, "--charset", tmp_path / "c.txt", "--max_length", 40]
    call(monkeypatch, capsys, "show", "synth:60", *flags)
    labels = [text for row in drawn for _, pieces in row for text, _ in pieces]
    assert set("".join(labels)) == set("xyz") and max(map(len, labels)) > 25
    with pytest.raises(UserError, match="--charset 94: has no effect without rendered words"):
        call(monkeypatch, capsys, "show", words, "--charset", "94")


def test_show(tmp_path, damaged, monkeypatch, capsys):
    """The sheet dies on a damaged crop, or on an unlabelled one."""
    for options, width in (([], 4 * 268), (["--guidance", "--augment", "--coarse", "16x64"], 6 * 268)):
        flags = ["--n", 30, "--out", tmp_path / "sheet.png", *options]
        said = call(monkeypatch, capsys, "show", damaged[0], *flags)
        assert "22 of the 30 crops" in said and said.count("damaged: ") == 8
        assert Image.open(tmp_path / "sheet.png").width == width
    with pytest.raises(UserError, match="16x64"):
        call(monkeypatch, capsys, "show", damaged[0], "--coarse", "wide")
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "a.png").write_bytes(b"")
    with pytest.raises(UserError, match="none of 1 crops could be read"):
        call(monkeypatch, capsys, "show", tmp_path / "none", "--guidance")
    data.draw_sheet([[(None, [("two\nlines" + "x" * 2_000_000, data.BLACK)])]], tmp_path / "lines.png")


def test_a_sheet_shows_every_pixel(tmp_path):
    """Crops that are smoothed, of another shape, or below another's text."""
    images = crops(3)
    cells = [(image, [(text, data.BLACK)]) for image, text in zip(images, ("one", "", "three"))]
    data.draw_sheet([cells[:2], cells[2:]], tmp_path / "sheet.png")
    sheet = np.array(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (2 * 90, 2 * 268, 3)
    for image, (cell, text), (y, x) in zip(images, cells, ((0, 0), (0, 268), (90, 0))):
        drawn = image.permute(1, 2, 0).numpy().repeat(2, 0).repeat(2, 1)
        assert np.array_equal(sheet[y + 4:y + 68, x + 6:x + 262], drawn)
        assert (sheet[y + 68:y + 90, x:x + 268] < 99).any() == (text[0][0] != "")


def test_text_on_a_sheet(tmp_path, monkeypatch):
    """Wrong letters that are not red, pieces drawn over one another, a long line beyond its cell; text in the
    fonts of --fonts alone, which may lack its letters."""
    asked = []

    def find_font(text, size, files):
        asked.append((text, size, files))
        return ImageFont.load_default(size)
    monkeypatch.setattr(data, "find_font", find_font)
    sheet = Image.new("RGB", (400, 60), "white")
    data.draw_text(sheet, [("HHHH", data.RED), ("HHHH", data.GREY)], 10, 40, 24, ["a"])
    assert asked == [("HHHHHHHH", 24, ["a"])]
    pixels = np.array(sheet)
    found = {}
    for colour in data.RED, data.GREY:
        y, x = (pixels == colour).all(2).nonzero()
        assert 20 <= y.min() and 37 <= y.max() <= 40                    # they stand on the line y = 40
        found[colour] = x.min(), x.max()
    assert found[data.RED][1] < found[data.GREY][0] < found[data.RED][1] + 10

    room = Image.new("RGB", (600, 60), "white")
    data.draw_text(room, [("H" * 20, data.BLACK)], 10, 40, 24, [])
    x = (np.array(room) < 99).all(2).nonzero()[1]
    assert asked[-1][1] < 24 and 200 < x.max() - x.min() <= data.PICTURE_W

    monkeypatch.setattr(data, "font_files", lambda: ["system's"])
    monkeypatch.setattr(data, "font_files_under", lambda folder: [f"{folder}/mine"])
    data.draw_sheet([[(None, [("one", data.BLACK)])]], tmp_path / "s.png", "folder")
    assert asked[-1][2] == ["system's", "folder/mine"]

    # A row of text alone is low, and its text stays in it.
    rows = [[(None, [("one", data.BLACK)])], [(torch.full((3, 32, 128), 200, dtype=torch.uint8), [])]]
    data.draw_sheet(rows, tmp_path / "s.png")
    dark = (np.array(Image.open(tmp_path / "s.png")) < 99).all(2)
    assert dark.shape[0] == 40 + 72 and dark[:40].any() and not dark[40:].any()


@pytest.mark.skipif("STR_DATA" not in os.environ, reason="STR_DATA names no folder of LMDBs")
def test_real_crops():
    """What holds for made pictures fails on the field's own files."""
    source = data.open_source(os.environ["STR_DATA"])
    got = list(data.read_all(source, 256, 2))
    assert sum(len(batch.indices) for batch in got) == len(source)
    assert not any(batch.damaged for batch in got)
