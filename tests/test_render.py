"""Tests of the rendered words. Each says which mistake it catches."""
import hashlib
import os
import pickle
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import data as render
from data import PRINTABLE, Synth, UserError

GREEK = "αβγδεζηθικλμνξοπρστυφχψωΑΒΓΔΕΖΗΘΙΚΛΜΝΞΟΠΡΣΤΥΦΧΨΩ"


def digest(synth, indices):
    parts = []
    for i in indices:
        image, label, mask = synth.get(i)
        parts.append(hashlib.sha256(image.numpy().tobytes() + mask.numpy().tobytes() + label.encode()).hexdigest())
    return parts


def test_shapes_and_types():
    """A crop in the order (H, W, 3), as float, or sharing memory with the textures would pass the loader unnoticed."""
    synth = Synth(10)
    image, label, mask = synth.get(3)
    assert image.shape == (3, 32, 128) and image.dtype == torch.uint8 and image.is_contiguous()
    assert mask.shape == (32, 128) and mask.dtype == torch.uint8
    assert len(synth) == 10 and synth.name == "synth" and "3" in synth.where(3)
    assert torch.equal(synth[3][0], image) and synth[3][1] == label == synth.label(3)
    image.zero_()
    assert synth.get(3).image.any()


def test_order_does_not_matter():
    """State carried from one crop to the next (a shared generator) makes a crop depend on what was drawn before."""
    assert digest(Synth(50), range(20)) == digest(Synth(50), reversed(range(20)))[::-1]


def test_other_processes_draw_the_same():
    """hash() of a string, or the order of a set, differs between processes: workers would then disagree."""
    code = "import test_render as t; print(*t.digest(t.Synth(90, 5), range(60, 72)))"
    for hashes in ("1", "2"):
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                             cwd=os.path.dirname(__file__),
                             env={**os.environ, "PYTHONHASHSEED": hashes, "PYTHONPATH": ".."})
        assert out.stdout.split() == digest(Synth(90, 5), range(60, 72))


def test_survives_pickling_for_spawned_workers():
    """An open font or a lambda on the object cannot be sent to a worker on Mac and Windows."""
    synth = pickle.loads(pickle.dumps(Synth(9, 2)))
    assert digest(synth, range(9)) == digest(Synth(9, 2), range(9))


def test_seeds_and_indices_draw_different_words():
    """Adding seed and index would make draw 1 the draw 0 moved by one."""
    zero, one = ([Synth(200, seed).label(i) for i in range(200)] for seed in (0, 1))
    assert len(set(zero)) > 150
    assert sum(a == b for a, b in zip(zero[1:], one)) < 10 and sum(a == b for a, b in zip(zero, one)) < 10


def test_ends():
    """An index beyond the end that draws a crop makes an iteration endless."""
    assert len(list(Synth(3))) == 3
    for i in (3, -1):
        with pytest.raises(IndexError):
            Synth(3)[i]


def test_labels():
    """Missing characters, spaces, long words, or one case only would leave the recognizer with a hole."""
    synth = Synth(20_000)
    labels = [synth.label(i) for i in range(20_000)]
    assert set("".join(labels)) == set(PRINTABLE) and len(PRINTABLE) == 94
    lengths = np.array([len(label) for label in labels])
    assert lengths.min() >= 1 and lengths.max() <= 25 and 5 < lengths.mean() < 6
    for case in (str.isupper, str.islower, str.istitle):
        assert .2 < np.mean([case(label) for label in labels]) < .5
    assert .08 < np.mean([any(map(str.isdigit, label)) for label in labels]) < .2


def test_vocabulary_is_english_and_quick():
    """A changed layout of the standard library would leave random letters, in silence."""
    render.vocabulary.cache_clear()
    start = time.perf_counter()
    words = render.vocabulary()
    assert time.perf_counter() - start < 3 and sum(map(len, words.values())) > 4000
    assert "street" in words[6] and "hamburger" in words[9] and "the" in words[3][:20]


def test_mask_lies_on_the_letters():
    """A mask warped, flipped or numbered otherwise than the picture: where it is set, colours differ from around it."""
    synth, apart, whole, ordered = Synth(400), [], [], []
    for i in range(400):
        image, label, mask = synth.get(i)
        pixels, ids = image.numpy().astype(float), mask.numpy()
        assert ids.max() <= len(label)
        whole.append(len(np.unique(ids[ids > 0])) == len(label))
        columns = [np.nonzero((ids == k).any(0))[0].mean() for k in np.unique(ids[ids > 0])]
        ordered.append(np.all(np.diff(columns) > 0))
        inside, outside = pixels[:, ids > 0].mean(1), pixels[:, ids == 0].mean(1)
        moved = np.roll(ids, (16, 11), (0, 1)) > 0
        apart.append(abs(inside - outside).sum() > abs(pixels[:, moved].mean(1) - pixels[:, ~moved].mean(1)).sum())
    assert np.mean(apart) > .9 and np.mean(whole) > .9 and np.mean(ordered) > .95


def test_crops_vary():
    """One look only: dark on light and light on dark come about equally, and few crops are nearly flat."""
    lighter, spread = [], []
    for image, _, mask in map(Synth(400).get, range(400)):
        grey, text = image.numpy().mean(0), mask.numpy() > 0
        lighter.append(grey[text].mean() > grey[~text].mean())
        spread.append(grey.std())
    assert .4 < np.mean(lighter) < .6 and np.mean(np.array(spread) < 6) < .1


@pytest.mark.parametrize("charset", ["0123456789abcdefghijklmnopqrstuvwxyz", "0123456789", "ABCDEF0123456789", "7"])
def test_ascii_charset(charset):
    """A letter outside the charset cannot be learned; filtering it out must not leave an empty label, nor, where the charset
    has few letters or none, one character of each word."""
    synth = Synth(300, charset=charset)
    labels = [synth.label(i) for i in range(300)]
    assert all(0 < len(label) <= 25 and set(label) <= set(charset) for label in labels)
    assert synth.get(0).label == labels[0] and 4 < np.mean(list(map(len, labels))) < 7
    if "a" in charset:
        assert sum(label in render.vocabulary().get(len(label), ()) for label in labels) > 120


def test_greek_needs_a_font_that_has_it():
    """Empty boxes instead of letters: fonts lacking the charset must go, and the user hear if none is left."""
    try:
        synth = Synth(100, charset=GREEK)
    except UserError as error:
        assert "--fonts" in str(error) and "\n" not in str(error)
        return
    assert all(all(render.glyph(font, 40, 0, char) for char in GREEK) for font in synth.fonts)
    assert all(set(synth.label(i)) <= set(GREEK) for i in range(100)) and synth.get(0).char_map.any()


def test_no_font_has_it():
    """A charset that nothing draws must stop at the start, naming the letters, not in a worker an hour later."""
    with pytest.raises(UserError, match="--fonts"):
        Synth(3, charset="ab\U0010fffd")


def test_folder_without_fonts(tmp_path):
    """--fonts with a typing mistake must not fall back to the system's fonts in silence."""
    (tmp_path / "a.txt").write_text("no font")
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match="--fonts"):
            Synth(3, fonts=str(folder))


def test_folder_of_fonts_is_taken_whole(tmp_path):
    """What names a system's fonts of symbols is part of honest names too: a user's Reading.ttf must not go in silence."""
    (tmp_path / "Reading.ttf").write_bytes(b"")
    assert str(tmp_path / "Reading.ttf") in render.font_files(str(tmp_path))


def test_broken_font_is_passed_over(tmp_path):
    """One damaged file among a user's fonts must not end the run."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "broken.TTF").write_bytes(b"not a font")
    synth = Synth(30, fonts=str(tmp_path))
    synth.fonts = [None, str(tmp_path / "sub" / "broken.TTF")]
    assert len(list(synth)) == 30


def test_pillows_own_font_is_enough(monkeypatch):
    """A bare machine has no fonts at all: all 94 characters must still be drawn."""
    monkeypatch.setattr(render, "FONT_FOLDERS", ())
    assert render.font_files() == [None] and all(render.glyph(None, 40, 0, char) for char in PRINTABLE)
    assert len(list(Synth(30))) == 30
