"""Tests of the rendered words. Each says which mistake it catches."""
import hashlib
import inspect
import io
import os
import pickle
import platform
import random
import re
import runpy
import struct
import subprocess
import sys
from collections import Counter
import unicodedata

import numpy as np
import PIL
import pytest
import torch
from PIL import Image, ImageFilter, ImageFont, features

import render
from common import UserError
from data import Synth, open_source
from render import MAX_LENGTH, PRINTABLE, render_word, word_label

GREEK = "αβγδεζηθικλμνξοπρστυφχψωΑΒΓΔΕΖΗΘΙΚΛΜΝΞΟΠΡΣΤΥΦΧΨΩ"
FONTS = render.font_files()
# What decides about a picture's last bits, besides render.py.
DRAWN_WITH = [PIL.__version__, platform.machine()]
DRAWN_WITH += [features.version(library) for library in ("freetype2", "libjpeg_turbo")]


def draw(index, seed=0, charset=PRINTABLE):
    return render_word(seed, index, FONTS, charset)


def digest(seed, indices):
    parts = []
    for i in indices:
        image, label, char_map = draw(i, seed)
        content = image.tobytes() + char_map.tobytes() + label.encode()
        parts.append(hashlib.sha256(content).hexdigest())
    return parts


# ---- a word

def test_shapes_and_types():
    """A crop in the order (H, W, 3), as float, or read-only: the loader passes it on unnoticed."""
    image, label, char_map = draw(3)
    assert image.shape == (3, 32, 128) and image.dtype == np.uint8
    assert char_map.shape == (32, 128) and char_map.dtype == np.uint8
    for array in image, char_map:
        assert array.flags.c_contiguous and array.flags.writeable
    assert label == word_label(0, 3, PRINTABLE)


def test_a_crop_is_nobody_elses_memory():
    """A crop that shares memory with the textures or the glyphs: who writes into it changes later crops."""
    before = digest(0, range(20))
    for i in range(20):
        image, _, char_map = draw(i)
        image[:] = 0
        char_map[:] = 0
    assert digest(0, range(20)) == before


def test_order_does_not_matter():
    """State carried from one crop to the next (a shared generator): a crop depends on those before."""
    assert digest(0, range(20)) == digest(0, reversed(range(20)))[::-1]


def test_labels_without_pictures_are_the_pictures_labels():
    """fit_labels asks for labels alone: from other random numbers they would be other crops' labels."""
    for seed, charset in (0, PRINTABLE), (5, "0123456789"), (5, "xyz"):
        for i in range(30):
            assert draw(i, seed, charset)[1] == word_label(seed, i, charset)


def test_other_processes_draw_the_same():
    """hash() of a string, or the order of a set, differs between processes: workers would disagree."""
    code = "import test_render as t; print(*t.digest(5, range(60, 72)))"
    for hashes in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": hashes, "PYTHONPATH": ".."}
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                             cwd=os.path.dirname(__file__), env=env)
        assert out.stdout.split() == digest(5, range(60, 72))


def test_seeds_and_indices_draw_different_words():
    """Adding seed and index would make draw 1 the draw 0 moved by one."""
    zero = [word_label(0, i, PRINTABLE) for i in range(200)]
    one = [word_label(1, i, PRINTABLE) for i in range(200)]
    assert len(set(zero)) > 150
    assert sum(a == b for a, b in zip(zero[1:], one)) < 10
    assert sum(a == b for a, b in zip(zero, one)) < 10


# ---- labels

def test_labels():
    """Missing characters, spaces, long words, or one case only would leave the recognizer with a hole."""
    labels = [word_label(0, i, PRINTABLE) for i in range(20_000)]
    assert set("".join(labels)) == set(PRINTABLE) and len(PRINTABLE) == 94
    lengths = np.array([len(label) for label in labels])
    assert lengths.min() >= 1 and lengths.max() <= MAX_LENGTH == 25 and 5 < lengths.mean() < 6
    for case in (str.isupper, str.islower, str.istitle):
        assert .2 < np.mean([case(label) for label in labels]) < .5
    assert .08 < np.mean([any(map(str.isdigit, label)) for label in labels]) < .2


def test_kinds_of_labels_come_as_often_as_the_table_says(monkeypatch):
    """A kind that the table names and draw_label does not know becomes another one in silence."""
    english = set(sum(render.vocabulary().values(), []))

    def labels(kind):
        monkeypatch.setattr(render, "LABELS", {kind: 1})
        return [word_label(0, i, PRINTABLE) for i in range(1000)]

    def share_of_words(labels):
        return np.mean([label.strip("!.,?:;'\"()[]*&@#-").lower() in english for label in labels])

    shares = dict(render.LABELS)
    assert set(shares) == {"english word", "random letters", "number", "random characters"}
    assert sum(shares.values()) == pytest.approx(1)
    assert share_of_words(labels("english word")) > .9
    letters = labels("random letters")
    assert share_of_words(letters) < .2 and not any(re.search("[0-9]", label) for label in letters)
    assert np.mean([label.isalpha() for label in letters]) == pytest.approx(1 - render.P_PUNCTUATION, abs=.04)
    assert all(re.search("[0-9]", label) for label in labels("number"))
    characters = "".join(labels("random characters"))
    assert .5 < np.mean([char.isalpha() for char in characters]) < .6               # 52 of 94

    monkeypatch.setattr(render, "LABELS", shares)
    drawn = [render.choose(random.Random(i), render.LABELS) for i in range(5000)]
    for kind, share in shares.items():
        assert drawn.count(kind) / 5000 == pytest.approx(share, abs=.02)


def test_vocabulary_is_english():
    """A word with a blank, an accent or a capital, or that comes twice: labels that the table does not
    promise."""
    by_length = render.vocabulary()
    words = render.WORDS.read_text("utf-8").split("\n")
    assert words.pop() == "" and 20_000 <= len(words) <= 50_000 and len(set(words)) == len(words)
    for word in words:
        assert re.fullmatch("[a-z]{1,14}", word) and re.search("[aeiouy]", word), word
    assert sum(by_length.values(), []) == sorted(words, key=len)        # all of them, in their order
    assert all(by_length[length] for length in render.LENGTHS)


def test_common_words_stand_first():
    """Names and rare words before common ones: half of the crops would be words that no sign shows."""
    words = render.WORDS.read_text("utf-8").split()
    place = {word: k for k, word in enumerate(words)}
    assert max(place[word] for word in "open sale exit stop street office".split()) < 20
    for word in "the of school water people quiet".split():
        assert place[word] < 12_000
    for name in "london smith paris toyota google microsoft".split():
        assert 5_000 < place[name]
    initials = [word[0] for word in words[20:4000]]
    for letter in "aps":                                                # no letter is favoured
        assert abs(initials[:2000].count(letter) - initials[2000:].count(letter)) < 60


def test_half_of_the_words_are_common(monkeypatch):
    """An exponent that fits another vocabulary: most crops show words that hardly anybody has seen, or the
    same few words again and again."""
    monkeypatch.setattr(render, "LABELS", {"english word": 1})
    monkeypatch.setattr(render, "P_PUNCTUATION", 0)
    common = set(render.WORDS.read_text("utf-8").split()[:4000])
    labels = [word_label(0, i, render.LOWER_CASE) for i in range(20_000)]
    assert .48 < np.mean([label in common for label in labels]) < .55
    assert len(set(labels)) > 8000
    word, times = Counter(labels).most_common(1)[0]
    assert times < 500, word


def test_no_word_that_was_left_out():
    """A slur on a picture that a course shows: words.txt made anew without its list of what to leave out."""
    make_words = runpy.run_path(str(render.WORDS.parent / "make_words.py"))
    assert len(make_words["LEFT_OUT"]) > 100
    words = render.WORDS.read_text("utf-8").split()
    assert [word for word in words if make_words["digest"](word)[:8] in make_words["LEFT_OUT"]] == []
    assert words[:len(make_words["SIGN_WORDS"])] == make_words["SIGN_WORDS"]


def test_missing_vocabulary(monkeypatch, tmp_path):
    """A copy of the scripts without assets/: a traceback from a process of the loader, or random letters in
    silence. A charset that has no use for English words has no use for the file."""
    monkeypatch.setattr(render, "WORDS", tmp_path / "words.txt")
    render.vocabulary.cache_clear()
    try:
        with pytest.raises(UserError, match="words.txt: missing; .* copy it") as error:
            [word_label(0, i, PRINTABLE) for i in range(20)]
        assert "\n" not in str(error.value)
        assert all(word_label(0, i, "0123456789") for i in range(20))
    finally:
        monkeypatch.undo()
        render.vocabulary.cache_clear()


def test_a_length_without_words(monkeypatch):
    """A teacher adds words of 24 letters to the table. The vocabulary has none: every run would stop."""
    monkeypatch.setattr(render, "LENGTHS", {24: 1})
    monkeypatch.setattr(render, "LABELS", {"english word": 1})
    render.vocabulary.cache_clear()
    try:
        labels = [word_label(0, i, PRINTABLE) for i in range(50)]
    finally:
        monkeypatch.undo()
        render.vocabulary.cache_clear()
    assert all(24 <= len(label) <= 25 for label in labels)


@pytest.mark.parametrize("charset", [
    "0123456789abcdefghijklmnopqrstuvwxyz", "0123456789", "ABCDEF0123456789", "7"])
def test_ascii_charset(charset):
    """A letter outside the charset cannot be learned; filtering it out must not leave an empty label, nor,
    where the charset has few letters or none, one character of each word."""
    labels = [word_label(0, i, charset) for i in range(300)]
    assert all(0 < len(label) <= 25 and set(label) <= set(charset) for label in labels)
    assert draw(0, charset=charset)[1] == labels[0]
    assert 4 < np.mean([len(label) for label in labels]) < 7
    if "a" in charset:
        assert sum(label in render.vocabulary().get(len(label), ()) for label in labels) > 120


def test_lines_are_drawn_where_they_are_asked_for():
    """Lines of 40 that nobody asked for, that are cut at 25, or that are most of what is seen: a network that
    is fed what it cannot read never starts to. A map of characters that ends before the line does."""
    charset = "".join(chr(0x4e00 + k) for k in range(500))

    def lengths(max_length, charset=charset):
        return np.array([len(word_label(0, i, charset, max_length)) for i in range(1000)])

    drawn = lengths(40)
    assert drawn.min() == 1 and drawn.max() == 40 and .02 < np.mean(drawn > 25) < .06
    assert np.mean(drawn <= 10) > .8
    of_30 = lengths(30)
    assert 25 < of_30.max() <= 30 and lengths(1000).max() == render.MAX_LINE
    assert np.sum(of_30 == 30) < 15                         # drawn so long, and not cut there
    assert lengths(render.MAX_LENGTH).max() == 14           # as the table says, with no line among them
    assert 25 < lengths(40, PRINTABLE).max() <= 40          # for which the vocabulary has no word

    longest = int(lengths(40, PRINTABLE).argmax())
    _, label, char_map = render_word(0, longest, [None], PRINTABLE, 40)
    assert label == word_label(0, longest, PRINTABLE, 40)
    assert len(label) > 30 and np.mean(np.isin(range(1, len(label) + 1), char_map)) > .9


def test_words_of_a_seed_stay():
    """One random number more, or drawn elsewhere, and each seed has other words: figures that were measured
    on synth:1000:1 no longer hold, and nobody knows why."""
    labels = [word_label(0, i, PRINTABLE) for i in range(300)]
    assert labels[:4] == ["SUGARING", "bib", "deals", "STN"]
    assert hashlib.sha256("\n".join(labels).encode()).hexdigest()[:16] == "5815481136745f90"


@pytest.mark.parametrize("charset, max_length, beginning", [
    ("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ", 25, "1f9117df"),
    ("0123456789abcdefghijklmnopqrstuvwxyz", 40, "a2f3106e"),
    (PRINTABLE + "äöüÄÖÜ", 25, "adc29e68"),
    ("ab\u0301'-", 25, "a059e4e0"),
])
def test_words_of_other_charsets_stay(charset, max_length, beginning):
    """The same for who trains on another alphabet, on capitals alone, or on lines."""
    labels = [word_label(0, i, charset, max_length) for i in range(200)]
    assert hashlib.sha256("\n".join(labels).encode()).hexdigest()[:8] == beginning


def test_accented_alphabet():
    """Drawn from what is not ASCII alone: German of ä, ö and ü. Drawn from a to z: German without them."""
    charset = PRINTABLE + "äöüßÄÖÜ"
    drawn = "".join(word_label(0, i, charset) for i in range(200))
    assert .02 < sum(not char.isascii() for char in drawn) / len(drawn) < .3
    assert "Ä" in drawn and "ä" in drawn and set(drawn) <= set(charset)


@pytest.mark.parametrize("charset", ["ae\u0306", "\u0995\u0996\u09c7\u09be"])
def test_labels_are_their_own_nfc(charset):
    """NFC joins a and a breve, or two Bengali vowel signs, to a letter that the charset has not: training
    dies on it, and the map of characters counts more of them than the label."""
    labels = [word_label(0, i, charset) for i in range(200)]
    assert set("".join(labels)) == set(charset)
    for label in labels:
        assert unicodedata.normalize("NFC", label) == label and 1 <= len(label) <= 25


# ---- pictures

@pytest.mark.skipif(DRAWN_WITH != ["13.0.0", "x86_64", "2.14.3", "3.2.0"], reason="others draw other pixels")
def test_pictures_of_a_seed_stay():
    """A sign, a range, a probability or the order of two random numbers that is not what it was: each seed
    has other pictures, and nothing that was measured on them holds. In Pillow's own font, since other
    systems have others. Whoever means to change the pictures writes these digits anew."""
    content = hashlib.sha256()
    for i in range(400):
        image, _, char_map = render_word(0, i, [None], PRINTABLE)
        content.update(image.tobytes() + char_map.tobytes())
    assert content.hexdigest()[:16] == "dd16fd691852ebdb"


def test_mask_lies_on_the_letters():
    """A mask warped, flipped or numbered otherwise than the picture: where it is set, colours differ from
    those around it."""
    apart, whole, ordered = [], [], []
    for i in range(400):
        image, label, ids = draw(i)
        pixels = image.astype(float)
        assert ids.max() <= len(label)
        numbers = np.unique(ids[ids > 0])
        whole.append(len(numbers) == len(label))
        columns = [np.nonzero((ids == k).any(0))[0].mean() for k in numbers]
        ordered.append(np.all(np.diff(columns) > 0))

        def difference(mask):
            return abs(pixels[:, mask].mean(1) - pixels[:, ~mask].mean(1)).sum()

        moved = np.roll(ids, (16, 11), (0, 1)) > 0
        apart.append(difference(ids > 0) > difference(moved))
    assert np.mean(apart) > .9 and np.mean(whole) > .9 and np.mean(ordered) > .95


def test_crops_vary():
    """One look only: dark on light and light on dark come about equally, and few crops are nearly flat."""
    lighter, spread = [], []
    for i in range(400):
        image, _, char_map = draw(i)
        grey, text = image.mean(0), char_map > 0
        lighter.append(grey[text].mean() > grey[~text].mean())
        spread.append(grey.std())
    assert .4 < np.mean(lighter) < .6 and np.mean(np.array(spread) < 6) < .1


def test_unbending_undoes_bending():
    """A sign that is wrong in one of the two moves the letters out of the crop or out of shape."""
    def errors(bend):
        for u in (-1, -.4, 0, 1):
            for v in (-1, .2, 1):
                found = render.unbend_point(bend, *render.bend_point(bend, u, v))
                yield max(abs(found[0] - u), abs(found[1] - v) / 2)

    rng = random.Random(0)
    for _ in range(100):
        bend = render.draw_bend(rng, rng.uniform(.5, 9))
        assert max(errors(bend._replace(sag=0))) < 1e-9
        # Of a parabola the inverse is one step of an iteration. Without that step the error is 0.017.
        gentle = bend._replace(sag=.15, aspect=6, shear=0, taper=0)
        assert max(errors(gentle)) < .006


def test_bends_are_what_their_names_say():
    """Shear and angle in the other direction, or sag upwards: what the table says would be another thing."""
    straight = render.Bend(aspect=4, shear=0, taper=0, sag=0, angle=0)
    top_right = np.array(render.bend_point(straight, 1, -1))
    assert top_right == pytest.approx([2, -.5])
    assert render.bend_point(straight._replace(shear=.2), 1, -1) == pytest.approx((2.1, -.5))
    assert render.bend_point(straight._replace(taper=.3), 1, -1)[1] == pytest.approx(-.65)
    assert render.bend_point(straight._replace(sag=.4), 0, 0) == pytest.approx((0, .4))
    assert render.bend_point(straight._replace(sag=.4), 1, 0) == pytest.approx((2, 0))
    assert render.bend_point(straight._replace(angle=.2), 1, 0)[1] > .3             # the right end goes down

    # Letters stand upright on the parabola: from foot to top goes at a right angle to the middle line.
    hanging = straight._replace(sag=.4)
    top = np.array(render.bend_point(hanging, .5, -1))
    foot = np.array(render.bend_point(hanging, .5, 1))
    along = np.array(render.bend_point(hanging, .501, 0)) - render.bend_point(hanging, .499, 0)
    assert abs((foot - top) @ along) < 1e-6
    assert render.slope_at(hanging, .5) == pytest.approx(along[1] / along[0], abs=1e-6)


def test_crop_holds_the_whole_word(monkeypatch):
    """An outline that misses the highest point of an arch, or a mesh whose corners are swapped: letters are
    cut, or stand on their heads. Words that stand in the middle of every crop, or are cut off further than the
    table says."""
    monkeypatch.setattr(render, "MARGIN", (.05, 0))
    for sag in (0, .8, -.8):
        bend = render.Bend(aspect=4, shear=.1, taper=.1, sag=sag, angle=.1)
        left, top, right, bottom = render.crop_around(random.Random(0), bend)
        for u in np.linspace(-1, 1, 101):
            for v in (-1, 1):
                x, y = render.bend_point(bend, u, v)
                assert left < x < right and top < y < bottom

    straight = render.Bend(aspect=4, shear=0, taper=0, sag=0, angle=0)
    monkeypatch.setattr(render, "MARGIN", (.05, .1))
    margins = []
    for i in range(40):
        left, top, right, bottom = render.crop_around(random.Random(i), straight)
        margins.append((-2 - left, -.5 - top, right - 2, bottom - .5))
    assert np.min(margins, axis=0) == pytest.approx(-.05)
    assert np.corrcoef(np.transpose(margins))[np.triu_indices(4, 1)].max() < .6

    drawing = Image.new("L", (160, 80))
    drawing.paste(255, (0, 20, 80, 40))                                 # the word's upper left quarter
    mesh = render.bend_mesh(straight, (-2, -.5, 2, .5), drawing.size)
    bent = render.bend_drawing(drawing, mesh, Image.Resampling.NEAREST)
    assert bent[:16, :64].min() == 255 and bent[16:].max() == 0 and bent[:, 64:].max() == 0


def test_a_shadow_ends_at_the_rim():
    """What leaves the crop on one side and comes back on the other: lines above a word that no sign has."""
    coverage = np.zeros((32, 128), np.float32)
    coverage[-1, -1] = 1
    coverage[10, 20] = .5
    for down, right in (0, 1), (1, 0), (2, 2), (1, -2), (-1, 1):
        wider = render.add_copies(coverage, [(down, right)])
        assert wider.shape == coverage.shape and wider.dtype == np.float32
        assert wider[10, 20] == wider[10 + down, 20 + right] == .5 and wider[-1, -1] == 1
        assert not wider[0].any() and not wider[:, 0].any()
        assert np.count_nonzero(wider) == (3 if max(down, right) > 0 else 4)
    assert np.count_nonzero(render.add_copies(coverage, render.ALL_AROUND)) == 5 + 3


def test_a_colour_has_the_lightness_asked_for():
    """Ground and letters are kept apart by lightness alone: a colour that misses it makes words that
    nobody can read. Signs that are green and pink, for want of blue and yellow ones."""
    rng = random.Random(0)
    colours = []
    missed = []
    for _ in range(300):
        red, green, blue = render.draw_colour(rng, .5).ravel()
        colours.append((red, green, blue))
        missed.append(abs((.30 * red + .59 * green + .11 * blue) / 255 - .5))
    red, green, blue = np.std(colours, axis=0)
    assert green < .6 * red and red < blue
    assert np.mean(np.array(missed) < .01) > .9 and max(missed) < .3    # channels end at 0 and 255


def test_letters_have_their_places(monkeypatch):
    """Letters without the space between them, without their own place beside the pen, or that hop all the
    same way."""
    letter = render.Glyph(np.full((9, 5), 255, np.uint8), left=2, top=-9, advance=7)
    monkeypatch.setattr(render, "SPACING", (.25, 0))                    # of 48 pixels
    monkeypatch.setattr(render, "P_HOP", 0)
    corners = render.place_glyphs(random.Random(0), [letter] * 4)
    assert corners == [(2, -9), (21, -9), (40, -9), (59, -9)]
    monkeypatch.setattr(render, "SPACING", (-9, 0))
    corners = render.place_glyphs(random.Random(0), [letter] * 2)
    assert corners[1][0] == round(2 + 7 - .04 * 48)                     # MIN_SPACING
    monkeypatch.setattr(render, "P_HOP", 1)
    heights = [y + 9 for x, y in render.place_glyphs(random.Random(0), [letter] * 200)]
    assert min(heights) == -6 and max(heights) == 6                     # 0.12 of 48 pixels


def test_a_lone_sign_does_not_fill_its_crop():
    """A "." as large as a word."""
    for sign in ".", "l":
        coverage, char_map = render.set_letters(random.Random(0), sign, [None])
        assert coverage.shape[0] >= 2 * 26 and coverage.shape[1] >= 26      # half a letter size, and rims
        y, x = char_map.nonzero()
        assert abs(y.min() + y.max() + 1 - coverage.shape[0]) <= 3          # in the middle
        assert abs(x.min() + x.max() + 1 - coverage.shape[1]) <= 3


def test_letters_that_overlap_stay_whole(monkeypatch):
    """A letter that wipes out what lies below its box, as the end of an italic before it."""
    monkeypatch.setattr(render, "STROKES", {0: 1})
    monkeypatch.setattr(render, "place_glyphs", lambda rng, glyphs: [(0, -40)] * len(glyphs))
    alone, _ = render.set_letters(random.Random(0), "H", [None])
    both, _ = render.set_letters(random.Random(0), "Ho", [None])
    assert both.shape == alone.shape and (both >= alone).all() and (both > alone).any()


def test_bends_keep_their_limits(monkeypatch):
    """Long words turned or bent so far that they leave nothing of the letters; italics that lean to the left;
    words that are made wider and never narrower."""
    monkeypatch.setattr(render, "STRETCH", (0, 0))
    monkeypatch.setattr(render, "TAPER", (0, 9))
    monkeypatch.setattr(render, "SHEAR", (0, 0))

    def bends(aspect, chance):
        for name in "P_ITALIC", "P_SAG", "P_STEEP_TURN":
            monkeypatch.setattr(render, name, chance)
        rng = random.Random(0)
        return [render.draw_bend(rng, aspect) for _ in range(300)]

    for aspect, most_sag, most_angle in (1, 0, .26), (4, .8, .195), (12, 1, .065):
        drawn = bends(aspect, 1)
        assert max(abs(bend.sag) for bend in drawn) == pytest.approx(most_sag, rel=.05)
        assert max(abs(bend.angle) for bend in drawn) == pytest.approx(most_angle, rel=.05)
        assert {bend.shear for bend in drawn} == {.25} and {bend.aspect for bend in drawn} == {aspect}
        tapers = [bend.taper for bend in drawn]
        assert max(tapers) == .35 == -min(tapers) and len(set(tapers)) > 3
    drawn = bends(4, 0)
    assert {(bend.sag, bend.shear) for bend in drawn} == {(0, 0)}
    assert np.std([bend.angle for bend in drawn]) == pytest.approx(.03, rel=.15)
    monkeypatch.setattr(render, "STRETCH", (0, .15))
    stretches = np.log([bend.aspect / 4 for bend in bends(4, 0)])
    assert abs(stretches.mean()) < .03 and stretches.std() == pytest.approx(.15, rel=.15)


def test_a_crop_tells_its_true_shape():
    """The height divided by the width: few pixels that squeeze a long word into a square. Between the marks
    of two characters, those of one that stands elsewhere; marks where hardly any ink is."""
    for label, least, most in ("H" * 12, 5, 20), ("l", .3, 1.5):
        rng = random.Random(0)
        coverage, char_map = render.set_letters(rng, label, [None])
        coverage, char_map, crop_aspect = render.bend_word(rng, coverage, 20 * char_map)
        assert least < crop_aspect < most and 0 <= coverage.min() < coverage.max() <= 1
        assert np.unique(char_map).tolist() == [20 * k for k in range(len(label) + 1)]
        assert coverage[char_map > 0].min() > render.MIN_INK / 255


def test_fine_strokes_are_averaged():
    """A long word of which single columns are drawn and the rest is skipped."""
    coverage = np.zeros((80, 1000), np.uint8)
    coverage[20:60, ::2] = 255
    bent, _, _ = render.bend_word(random.Random(0), coverage, coverage)
    assert bent[12:20, 40:88].mean() == pytest.approx(.5, abs=.02) and bent[12:20, 40:88].std() < .1


def test_letters_and_ground_are_apart(monkeypatch):
    """Letters that are as light as what they stand on: the words that nobody can read."""
    for chance, (least, most) in (0, render.CONTRAST), (1, render.FAINT_CONTRAST):
        monkeypatch.setattr(render, "P_FAINT", chance)
        rng = random.Random(0)
        drawn = np.array([render.choose_lightness(rng) for _ in range(500)])
        assert drawn.min() >= 0 and drawn.max() <= 1
        contrasts = abs(drawn[:, 0] - drawn[:, 1])
        assert least <= contrasts.min() < least + .02 and most - .02 < contrasts.max() <= most
        assert .4 < np.mean(drawn[:, 0] < drawn[:, 1]) < .6

    asked = []

    def draw_colour(rng, lightness):
        asked.append(lightness)
        return np.full((3, 1, 1), 255 * lightness, np.float32)
    monkeypatch.setattr(render, "draw_colour", draw_colour)
    monkeypatch.setattr(render, "P_SECOND_INK", 1)
    limits = {"colour_ground": (-.16, .44), "colour_ink": (.62, 1.04)}      # shares of the way from .2 to .8
    for kind in "plain", "shaded", "two colours":
        monkeypatch.setattr(render, "GROUNDS", {kind: 1})
        for name, (least, most) in limits.items():
            asked.clear()
            for i in range(100):
                drawn = getattr(render, name)(random.Random(i), .2, .8)
            assert least < min(asked) and max(asked) < most
            of_two = name == "colour_ink" or kind == "two colours"
            assert len(asked) == (200 if of_two else 100)
            if of_two or kind == "shaded":
                assert drawn.shape == (3, 32, 128) and drawn.std() > 1
            else:
                assert drawn.shape == (3, 1, 1)


def test_reliefs_look_as_they_are_called(monkeypatch):
    """Hollow letters that are filled, a shadow above the letters or in their colour, letters and ground
    exchanged. Light that is uneven where it should be even."""
    coverage = np.zeros((32, 128), np.float32)
    coverage[10:20, 30:60] = 1
    monkeypatch.setattr(render, "choose_lightness", lambda rng: (0, 1))
    monkeypatch.setattr(render, "colour_ground", lambda *_: np.zeros((3, 1, 1), np.float32))
    monkeypatch.setattr(render, "colour_ink", lambda *_: np.full((3, 1, 1), 200, np.float32))
    lightness = []

    def draw_colour(rng, light):
        lightness.append(light)
        return np.full((3, 1, 1), 100, np.float32)
    monkeypatch.setattr(render, "draw_colour", draw_colour)
    monkeypatch.setattr(render, "RELIEF_OPACITY", (1, 1))
    monkeypatch.setattr(render, "SHADOW_DOWN", [2])
    monkeypatch.setattr(render, "SHADOW_RIGHT", [1])
    monkeypatch.setattr(render, "P_UNEVEN_LIGHT", 0)
    # in the letter, just above it, just below it, far away
    looks = {"none": (200, 0, 0, 0), "shadow": (200, 0, 100, 0), "outline": (200, 100, 100, 0),
             "hollow": (100, 200, 200, 0)}
    for relief, wanted in looks.items():
        monkeypatch.setattr(render, "RELIEFS", {relief: 1})
        image = render.colour_word(random.Random(0), coverage)
        assert image.shape == (3, 32, 128)
        assert tuple(image[0, [15, 9, 20, 3], 45]) == wanted, relief
    monkeypatch.setattr(render, "P_UNEVEN_LIGHT", 1)
    lit = [render.colour_word(random.Random(i), coverage)[0, 11:19, 31:59] for i in range(20)]
    assert len(lightness) == 3 + 20 and -1 <= min(lightness) < max(lightness) <= .3     # nearer to the ground
    assert np.std(lit, axis=(1, 2)).max() > 1 and np.min(lit) >= .4 * 100 and np.max(lit) <= 1.4 * 100


def test_a_window_may_be_anywhere(monkeypatch):
    """Textures and noise that are always cut out of the same corner; a texture that is nearly flat, or that is
    never drawn."""
    maps = np.arange(64 * 192).reshape(64, 192)
    rng = random.Random(0)
    corners = np.array([divmod(int(render.cut_window(rng, maps)[0, 0]), 192) for _ in range(1000)])
    assert corners.min(0).tolist() == [0, 0] and corners.max(0).tolist() == [32, 64]
    textures = render.textures()
    assert (textures.min((1, 2)) == 0).all() and (textures.max((1, 2)) == 1).all()
    alike = (textures[:, 1:] == textures[:, :-1]).all(2).mean(1)        # to the row above
    assert alike[::4].min() > .5 and alike[1::2].max() < .1             # upright cells with edges; turned ones
    numbered = np.arange(len(textures))[:, None, None] * np.ones((64, 192), int)
    monkeypatch.setattr(render, "textures", lambda: numbered)
    assert {render.draw_texture(rng)[0, 0] for _ in range(5000)} == set(range(len(textures)))


def test_wear_is_as_strong_as_it_says(monkeypatch):
    """A JPEG quality, a number of pixels or a blur that has no effect, or another; one that is left out where
    it comes alone; few pixels in the shape of the crop and not in the word's, or enlarged to blocks. Noise on
    white that comes out black."""
    image = np.random.default_rng(0).uniform(0, 255, (3, 32, 128)).astype(np.float32)
    happened = []
    real = {name: getattr(render, name) for name in ("shrink", "compress")}

    def shrink(picture, height, crop_aspect):
        happened.append(("few pixels", height, crop_aspect))
        return real["shrink"](picture, height, crop_aspect)

    def compress(picture, quality):
        happened.append(("blocks", picture.size, quality))
        return real["compress"](picture, quality)

    def blur(radius):
        happened.append(("blur", radius))
        return ImageFilter.BoxBlur(1)
    monkeypatch.setattr(render, "shrink", shrink)
    monkeypatch.setattr(render, "compress", compress)
    monkeypatch.setattr(render.ImageFilter, "GaussianBlur", blur)
    monkeypatch.setattr(render, "FEW_PIXELS", (16, 16))
    monkeypatch.setattr(render, "JPEG_QUALITY", (33, 33))
    monkeypatch.setattr(render, "BLUR", (1, 1))
    one_by_one = {
        (0, 0, 0): [],
        (1, 0, 0): [("few pixels", 16, 3)],
        (0, 1, 0): [("blocks", (128, 32), 33)],
        (0, 0, 1): [("blur", 1)],
        (1, 1, 1): [("few pixels", 16, 3), ("blocks", (48, 16), 33), ("blur", .5)],
    }
    for chances, wanted in one_by_one.items():
        for name, chance in zip(("P_FEW_PIXELS", "P_JPEG", "P_BLUR"), chances):
            monkeypatch.setattr(render, name, chance)
        happened.clear()
        worn = render.wear_out(random.Random(0), image, 3)
        assert happened == wanted and worn.shape == (3, 32, 128) and worn.dtype == np.uint8
        assert (worn[:, ::2] == worn[:, 1::2]).mean() < .5              # 16 rows that are not each drawn twice

    picture = Image.fromarray(image.transpose(1, 2, 0).astype(np.uint8))
    errors = [np.abs(np.subtract(real["compress"](picture, quality), picture, dtype=float)).mean()
              for quality in (90, 60, 15)]
    assert errors[0] < errors[1] < errors[2]
    for height, aspect, size in (10, 4, (40, 10)), (20, 10, (128, 20)), (10, .5, (12, 10)):
        assert real["shrink"](picture, height, aspect).size == size
    monkeypatch.setattr(render, "NOISE_DEVIATION", (50, 0))
    for grey in 0, 255:
        noisy = render.add_noise(random.Random(0), np.full((3, 32, 128), grey, np.float32))
        assert abs(noisy.astype(int) - grey).mean() < 25 < noisy.std()


def test_neighbours_come_as_often_as_the_table_says(monkeypatch):
    """Lines above and below in most crops, or in none."""
    seen = []

    def add_neighbours(coverage):
        seen.append(coverage)
        return coverage
    monkeypatch.setattr(render, "add_neighbours", add_neighbours)
    for chance in 0, 1:
        seen.clear()
        monkeypatch.setattr(render, "P_NEIGHBOURS", chance)
        for i in range(5):
            render_word(0, i, [None], PRINTABLE)
        assert len(seen) == 5 * chance


def test_every_number_of_the_table_is_read():
    """A teacher changes a number, and nothing changes: it stands in the table and nowhere else."""
    source = inspect.getsource(render)
    table = source.split("# ---- the table")[1].split("# ---- a word")[0]
    names = re.findall("^([A-Z][A-Z_0-9]+) = ", table, re.MULTILINE)
    rest = source.replace(table, "")
    assert len(names) > 50
    assert [name for name in names if not re.search(rf"\b{name}\b", rest)] == []
    assert re.findall(r"rng\.\w+\([^)]*\d\.\d[^)]*\)", rest) == []          # nor a number besides the table


# ---- fonts

def own_font(**changes):
    """Pillow's own font as bytes, changed: family, a name of seven letters; last, the last character that it
    has of those up to "~"; symbols=True, with the table of a font of symbols instead of Unicode's."""
    font = ImageFont.load_default(10).path.getvalue()
    family = changes.get("family", "Aileron")
    for encoding in "ascii", "utf-16-be":
        font = font.replace("Aileron".encode(encoding), family.encode(encoding))
    tables = [font[12 + 16 * k:28 + 16 * k] for k in range(font[5])]
    start = next(struct.unpack(">8xII", table)[0] for table in tables if table[:4] == b"cmap")
    font = bytearray(font)
    for k in range(font[start + 3]):
        entry = start + 4 + 8 * k
        subtable = start + struct.unpack_from(">I", font, entry + 4)[0]
        if font[subtable + 1] == 4:                                     # its first segment ends at "~"
            struct.pack_into(">H", font, subtable + 14, ord(changes.get("last", "~")))
        if changes.get("symbols"):
            struct.pack_into(">HH", font, entry, 3, 0)
    return bytes(font)


def test_a_folder_of_typefaces_is_made(tmp_path, capsys, monkeypatch):
    """A superfamily of ninety weights that fills the folder with its first, bold ones; faces without
    signs; what is known to draw no letters."""
    make_fonts = runpy.run_path(str(render.WORDS.parent / "make_fonts.py"))
    faces = {f"many/{k:02}.ttf": own_font() for k in range(9)}
    faces.update({"few/a.ttf": own_font(), "few/lacks.otf": own_font(last="}"), "few/broken.ttf": b"no font",
                  "few/LibertinusKeyboard-Regular.otf": own_font()})
    for name, content in faces.items():
        (tmp_path / "texlive" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "texlive" / name).write_bytes(content)
    source, target = str(tmp_path / "texlive"), tmp_path / "fonts"

    monkeypatch.setattr(sys, "argv", ["make_fonts.py", source, str(target)])
    make_fonts["main"]()
    kept = ["00.ttf", "01.ttf", "03.ttf", "04.ttf", "06.ttf", "07.ttf", "a.ttf"]
    assert sorted(path.name for path in target.iterdir()) == kept
    assert (target / "07.ttf").read_bytes() == own_font()
    assert f"{target}: 7 faces of 1 family" in capsys.readouterr().out

    (tmp_path / "twins" / "b").mkdir(parents=True)
    for name in "a.ttf", "b/a.ttf":                                         # one would be written over the other
        (tmp_path / "twins" / name).write_bytes(own_font())
    for folder, new, fault in [(source, target, "fonts: is there already"),
                               (str(tmp_path / "twins"), tmp_path / "new", "twins: 2 fonts have the name a.ttf"),
                               (str(tmp_path / "none"), tmp_path / "new", "none: no font")]:
        monkeypatch.setattr(sys, "argv", ["make_fonts.py", folder, str(new)])
        with pytest.raises(UserError, match=fault):
            make_fonts["main"]()


def test_unusable_fonts_are_counted(tmp_path, capsys):
    """A user's folder of which half is passed over without a word: the crops look less varied than the folder
    does. Its damaged file must not end the run."""
    files = {"good.ttf": own_font(), "sub/broken.TTF": b"not a font", "short.otf": own_font()[:200],
             "capitals.ttf": own_font(last="`"), "few.ttf": own_font(last="y"),
             "pi.ttf": own_font(symbols=True)}
    (tmp_path / "sub").mkdir()
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    fonts = render.font_files(str(tmp_path))
    assert fonts == [str(tmp_path / "good.ttf")]
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and f"--fonts {tmp_path}: 5 of 6 fonts are left out" in said
    for reason in "cannot be opened: 2", "no lower case: 1", "characters missing: 1", "not letters: 1":
        assert reason in said
    render.font_files(str(tmp_path))
    assert capsys.readouterr().out == ""                                # --val asks again

    with pytest.raises(UserError, match="good.ttf: a file; name the folder that it is in"):
        render.font_files(str(tmp_path / "good.ttf"))

    # Another alphabet: what is needed is the charset, not a to z.
    fonts = render.font_files(str(tmp_path), charset="ABC")
    assert [os.path.basename(path) for path in fonts] == ["capitals.ttf", "few.ttf", "good.ttf"]
    capsys.readouterr()

    (tmp_path / "good.ttf").unlink()
    render.usable_fonts.cache_clear()
    with pytest.raises(UserError, match=r"none of its 5 fonts can be used \(.*no lower case: 1") as error:
        render.font_files(str(tmp_path))
    assert "\n" not in str(error.value) and capsys.readouterr().out == ""


def test_broken_font_is_passed_over(tmp_path):
    """A damaged file among the system's fonts ends the run."""
    broken = tmp_path / "broken.ttf"
    broken.write_bytes(b"not a font")
    for i in range(30):
        render_word(0, i, [None, str(broken)], PRINTABLE)
    assert render.fonts_with("ab", [str(broken), None]) == [None]
    assert render.find_font("ab", 14, [str(broken)]).getlength("ab") > 0
    assert render.find_font("", 14, [str(broken)]).getlength("ab") > 0
    assert render_word(0, 0, [str(broken)], PRINTABLE)[2].any()         # in Pillow's own
    with pytest.raises(UserError, match="no font has all of"):
        render_word(0, 0, [str(broken)], "\U0010fffd")


def test_a_users_fonts_are_all_that_is_drawn(monkeypatch, tmp_path):
    """A folder of fonts beside which the system's are drawn: other pictures on every machine, though folder
    and Pillow are the same. Where Pillow's own font steps in for signs, the user hears of it."""
    mine, systems = tmp_path / "mine", tmp_path / "systems"
    names = ["b/x.ttf", "e.otf", "D.ttf", "c-1.ttf", "c/x.ttf", "a.ttf", "B.ttf", "f.TTF"]
    for path in [systems / "s.ttf", *(mine / name for name in names)]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(own_font())
    monkeypatch.setattr(render, "FONT_FOLDERS", [str(systems)])
    assert render.font_files() == [None, str(systems / "s.ttf")]
    fonts = render.font_files(str(mine))
    assert fonts == [str(mine / name) for name in sorted(names)]        # as no language sorts them
    fonts.clear()
    assert len(render.font_files(str(mine))) == 8                       # what was cleared is not the kept answer


def test_signs_that_a_users_fonts_lack(tmp_path, capsys):
    """A folder of one font without "~": the first label that has it ends the run; or another font is drawn,
    and the user does not hear of it."""
    (tmp_path / "few.ttf").write_bytes(own_font(last="}"))
    fonts = render.font_files(str(tmp_path))
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "no font has all of a keyboard's signs" in said and "Pillow's own" in said
    assert len(fonts) == 1
    glyphs = render.choose_glyphs(random.Random(0), "~a", fonts)
    assert glyphs == [render.draw_glyph(None, "~"), render.draw_glyph(None, "a")]
    (tmp_path / "few.ttf").write_bytes(own_font())
    for cached in (render.usable_fonts, render.open_font, render.has_char, render.missing_box):
        cached.cache_clear()
    render.font_files(str(tmp_path))
    assert capsys.readouterr().out == ""


def test_letters_need_no_library_of_the_systems():
    """Pillow's other layout needs fribidi, which a system has or has not: letters would stand elsewhere."""
    for path in FONTS[:4]:
        assert render.open_font(path, render.LETTER_SIZE).layout_engine == ImageFont.Layout.BASIC


def test_families_come_equally_often(monkeypatch, tmp_path):
    """A family of 70 weights that drowns the others: a folder of 500 files that looks like 20 fonts."""
    fonts = []
    for k in range(9):
        family = "Bileron" if k == 8 else "Aileron"
        fonts.append(str(tmp_path / f"{k}.ttf"))
        (tmp_path / f"{k}.ttf").write_bytes(own_font(family=family))
    assert render.families_of(tuple(fonts)) == [fonts[:8], fonts[8:]]
    assert render.describe_fonts(fonts) == "9 faces of 2 families"
    assert render.describe_fonts([None, *fonts]) == "10 faces of 2 families"    # Pillow's own is an Aileron
    assert render.describe_fonts(fonts[:2]) == "2 faces of 1 family"
    assert render.describe_fonts([None]) == "1 face of 1 family"

    monkeypatch.setattr(render, "draw_glyph", lambda path, char: path)
    drawn = [render.choose_glyphs(random.Random(i), "a", fonts)[0] for i in range(2000)]
    assert .45 < drawn.count(fonts[8]) / 2000 < .55
    assert all(80 < drawn.count(font) for font in fonts)


def test_fonts_that_lack_a_letter_leave_the_others_equal(monkeypatch):
    """The first font of the list in the place of each that lacks a letter: most labels with a rare sign look
    alike."""
    fonts = list("abcdef")                          # of which a and b alone have all that is asked for
    monkeypatch.setattr(render, "families_of", lambda fonts: [[font] for font in fonts])
    monkeypatch.setattr(render, "draw_glyph", lambda path, char: path if path in ("a", "b") else None)
    drawn = [render.choose_glyphs(random.Random(i), "~", fonts)[0] for i in range(1000)]
    assert .45 < drawn.count("b") / 1000 < .52


def test_font_without_the_letters_is_an_error():
    """Nothing to draw with: one line that names the label, not StopIteration, which ends loops in silence."""
    with pytest.raises(UserError, match="--fonts"):
        render_word(0, 0, [None], "\U0010fffd")


def test_missing_letters_are_not_had():
    """The box for a missing letter is a picture like another: labels would be learned from boxes."""
    for path in FONTS[:3]:
        assert not render.has_char(path, "\U0010fffd") and not render.has_char(path, " ")
        assert render.has_char(path, "g") and render.has_char(path, ".")
    assert render.draw_glyph(None, "\U0010fffd") is None


def test_titles_font():
    """A title shows boxes where another font of the list has all of its letters."""
    have = [path for path in FONTS if path and render.has_char(path, "α")]
    if not have:
        pytest.skip("no font has Greek letters")
    font = render.find_font("α b", 14, [None, *have])
    assert font.path == have[0] and font.size == 14
    nobody_has_it = render.find_font("α \U0010fffd", 14, FONTS)
    assert bytes(nobody_has_it.getmask("b")) == bytes(ImageFont.load_default(14).getmask("b"))


def test_a_title_with_a_blank_has_its_font(tmp_path):
    """A font passed over for want of a blank, which no font draws: every title in Pillow's own."""
    (tmp_path / "a.ttf").write_bytes(own_font(family="Bileron"))
    path = str(tmp_path / "a.ttf")
    font = render.find_font("a b", 14, [path])
    assert font.getname()[0] == "Bileron" and font.size == 14


def test_glyph_is_placed_by_its_pen():
    """A corner that is off by the font's ascent, or ink that is cut: letters of a word hop."""
    glyph = render.draw_glyph(None, "H")
    assert glyph.top + len(glyph.ink) == 0          # an H stands on the baseline
    assert glyph.ink[0].any() and glyph.ink[-1].any()
    assert glyph.ink.shape[1] >= glyph.advance > 20


def test_a_letter_is_drawn_once():
    """A letter drawn anew for each size or stroke: with 500 fonts most of the time goes there, or the memory."""
    render.draw_glyph.cache_clear()
    for i in range(300):
        render_word(0, i, [None], PRINTABLE)
    assert render.draw_glyph.cache_info().misses <= 94


def test_strokes_are_as_wide_as_they_say(monkeypatch):
    """Bold letters that are cut at the drawing's rim, that grow on one side, or whose map stays thin."""
    monkeypatch.setattr(render, "P_HOP", 0)

    def drawn(stroke):
        monkeypatch.setattr(render, "STROKES", {stroke: 1})
        return render.set_letters(random.Random(0), "HlH", [None])

    def rims(drawing):
        """How far the ink is from the left, right, top and bottom."""
        rows, columns = np.nonzero(drawing > render.MIN_INK)
        h, w = drawing.shape
        return columns.min(), w - columns.max(), rows.min() - h // 4, h - h // 4 - rows.max()

    thin = drawn(0)[0]
    for stroke in 1, 2:
        coverage, char_map = drawn(stroke)
        assert coverage.shape == (thin.shape[0] + 4 * stroke, thin.shape[1] + 2 * stroke)
        assert rims(coverage) == rims(thin)         # the drawing grows as the letters do
        assert (coverage > render.MIN_INK).sum() > (thin > render.MIN_INK).sum() * (1 + .1 * stroke)
        assert np.array_equal(char_map > 0, coverage > render.MIN_INK)
        assert np.unique(char_map).tolist() == [0, 1, 2, 3]


def test_neighbours_stand_above_and_below():
    """Lines that lie on the word, or on one side of it only: labels that nobody could read."""
    coverage = np.zeros((80, 90), np.uint8)
    coverage[20:60] = 200                           # the word
    coverage[20:60, :30] = 100                      # its first third
    crowded = render.add_neighbours(coverage)
    assert np.array_equal(crowded[20:60], coverage[20:60])
    assert crowded[:16, 30:60].min() == crowded[:16, 30:60].max() == 100        # moved to the right
    assert not crowded[16:20].any() and not crowded[60:64].any() and not crowded[:16, :30].any()
    assert crowded[64:, :60].min() == 200 and not crowded[64:, 60:].any()       # and to the left


def test_names_of_a_users_fonts_do_not_matter(tmp_path):
    """What names a system's fonts of symbols is part of honest names too: a user's Reading.ttf must not
    go."""
    (tmp_path / "Reading.ttf").write_bytes(own_font())
    assert str(tmp_path / "Reading.ttf") in render.font_files(str(tmp_path))


def test_systems_fonts_of_symbols_are_left_out(monkeypatch, tmp_path):
    """Words in pictographs: only the file's name counts, not that of a folder such as coding."""
    folder = tmp_path / "coding"
    folder.mkdir()
    for name in ("NotoColorEmoji.ttf", "Wingdings.TTF", "Plain.otf", "b.ttc", "c.txt"):
        (folder / name).write_bytes(b"")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("FONTS", str(folder))
    for place in str(tmp_path), "~/coding", "$FONTS":
        monkeypatch.setattr(render, "FONT_FOLDERS", [place])
        if place != "~/coding" or sys.platform != "win32":
            assert render.font_files() == [None, str(folder / "Plain.otf"), str(folder / "b.ttc")]


def test_pillows_own_font_is_enough(monkeypatch):
    """A bare machine has no fonts at all: all 94 characters must still be drawn."""
    monkeypatch.setattr(render, "FONT_FOLDERS", [])
    assert render.font_files() == [None] and render.fonts_with(PRINTABLE, [None]) == [None]
    for i in range(30):
        render_word(0, i, [None], PRINTABLE)
    assert len(list(Synth(30))) == 30


# ---- the source

def test_synth_hands_over_what_is_drawn():
    """A source that swaps seed and index, or loses the map of characters, trains on without an error."""
    synth = Synth(10, 4)
    for i in range(5):
        image, label, char_map = synth.get(i)
        drawn, written, marked = draw(i, 4)
        assert torch.equal(image, torch.from_numpy(drawn))
        assert torch.equal(char_map, torch.from_numpy(marked))
        assert label == written == synth.label(i) == synth[i][1] and torch.equal(synth[i][0], image)
        assert image.dtype == char_map.dtype == torch.uint8 and image.is_contiguous()
    assert len(synth) == 10 and synth.name == "synth" and "3" in synth.where(3)
    stored = Image.open(io.BytesIO(synth.file_bytes(2)))                                 # pack writes this
    assert np.array_equal(np.asarray(stored).transpose(2, 0, 1), draw(2, 4)[0])
    again = open_source("synth:10:4")
    assert len(again) == 10 and torch.equal(again[3][0], synth[3][0])


def test_survives_pickling_for_spawned_workers():
    """An open font or a lambda on the object cannot be sent to a worker on Mac and Windows."""
    synth = pickle.loads(pickle.dumps(Synth(9, 2)))
    for i in range(9):
        assert np.array_equal(synth.get(i).image.numpy(), draw(i, 2)[0])


def test_ends():
    """An index beyond the end that draws a crop makes an iteration endless."""
    assert len(list(Synth(3))) == 3
    for i in (3, -1):
        with pytest.raises(IndexError):
            Synth(3)[i]


@pytest.mark.parametrize("charset", ["0123456789", "ABCDEF0123456789"])
def test_synth_draws_its_charset(charset):
    """A charset that the source forgets on the way to the drawing leaves labels that cannot be trained on."""
    synth = Synth(100, 0, None, charset)
    labels = [synth.label(i) for i in range(100)]
    assert set("".join(labels)) == set(charset) and synth.get(0).label == labels[0]


def test_greek_needs_a_font_that_has_it():
    """Empty boxes instead of letters: fonts that lack the charset must go; the user hears if none is left."""
    try:
        synth = Synth(100, 0, None, GREEK)
    except UserError as error:
        assert "--fonts" in str(error) and "\n" not in str(error)
        return
    fonts = render.fonts_with(GREEK, FONTS)
    assert all(render.has_char(path, char) for path in fonts for char in GREEK)
    assert all(set(synth.label(i)) <= set(GREEK) for i in range(100)) and synth.get(0).char_map.any()
    drawn = render_word(0, 0, fonts, GREEK)[0]
    assert np.array_equal(synth.get(0).image.numpy(), drawn)


def test_no_font_has_it(tmp_path):
    """A charset that nothing draws must stop at the start, naming the letters, not in a worker much later."""
    charset = "ab\U0010fffd"
    with pytest.raises(UserError, match="U0010fffd.*--fonts"):
        render.fonts_with(charset, FONTS)
    with pytest.raises(UserError, match="U0010fffd.*--fonts"):
        Synth(3, 0, None, charset)
    for last in "`", "y":                                       # without small letters; without z
        (tmp_path / f"{ord(last)}.ttf").write_bytes(own_font(last=last))
    with pytest.raises(UserError, match="the best lacks 'z'; give one with --fonts"):
        render.fonts_with("Aaz", render.font_files_under(tmp_path))


def test_folder_without_fonts(tmp_path):
    """--fonts with a typing mistake must not fall back to the system's fonts in silence."""
    (tmp_path / "a.txt").write_text("no font")
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match="--fonts"):
            Synth(3, 0, str(folder))
