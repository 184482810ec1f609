"""Drawing words: a label, its letters in some font, bent, coloured, worn as by a camera.

    word_label(seed, index, charset)          -> the label alone
    render_word(seed, index, fonts, charset)  -> picture, label, map of characters

Both depend on nothing but their arguments, whatever the process or the order.
(Another machine has other fonts, so it draws other pictures; and another Python
may have other English words, see `vocabulary`.)
"""
import functools
import io
import math
import os
import pathlib
import random
import re
import unicodedata
from collections import Counter, namedtuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from common import H, W, UserError

PRINTABLE = "".join(chr(code) for code in range(33, 127))    # a keyboard's 94 characters
LOWER_CASE = "abcdefghijklmnopqrstuvwxyz"
MAX_LENGTH = 25                 # characters of the longest label


# ---- the table: how often, and how much
#
# Change a number, then look at what it does: python data.py show synth
#
# P_... is a probability. A dict holds shares: one of its keys is drawn, a key of twice
# the share twice as often. A list holds values that come equally often. A pair is a
# range that is drawn from evenly, or, where the comment says "normal", the mean and the
# standard deviation of a normal distribution.

# What is written. Random letters are there so that no model can do with language alone.
LABELS = {
    "english word": 0.70,
    "random letters": 0.15,
    "number": 0.10,
    "random characters": 0.05,
}
LENGTHS = {                     # characters of a word: per cent
    1: 1, 2: 4, 3: 16, 4: 20, 5: 15, 6: 13, 7: 11,
    8: 7, 9: 5, 10: 3, 11: 2, 12: 1, 13: 1, 14: 1,
}
CASES = {"STREET": 0.40, "Street": 0.28, "street": 0.32}
P_PUNCTUATION = 0.12            # of words and of random letters
COMMON_FIRST = 2                # 1: all words come equally often; 2: common ones more often

NUMBERS = """
    # ## ### #### ##### 19## 20## $# $## $#.## $##.## ##% #% #.## ##.# #,###
    #:## ##:## ##am #pm #/# ##/## #x## ###-#### ###-###-#### (###) No.# #th
    +## ##-## ##+ ##m ##km A# B## #C ##A
""".split()                     # each "#" becomes a digit
PUNCTUATION = """
    *! *. *, *? *: *; *'s '* "*" "* *" (*) [*] *& @* #* -* *- *... www.* *.com *!!
""".split()                     # "*" becomes the word
SIGN_WORDS = """
    open sale exit stop street road park hotel bank cafe shop free city market
    school police taxi office
""".split()
SIGN_WORD_COUNT = 200           # each counts as if it had been read 200 times more

# The letters. Their size is the font's: about from the top of an "l" to the foot of a "p".
LETTER_SIZE = 40                # pixels
SHORT_LETTER_SIZE = 64          # of short labels, since these are enlarged the most
SHORT_LABEL = 4                 # characters, at most
STROKES = {0: 3, 1: 2, 2: 1}    # pixels that are added all around a letter: share
SPACING = (0.02, 0.06)          # between letters, in letter sizes (normal)
MIN_SPACING = -0.04
P_DANCE = 0.06                  # letters hop up and down
DANCE = 0.12                    # by at most this, in letter sizes

# The lines above and below, which a crop shows in part.
P_NEIGHBOURS = 0.12
NEIGHBOUR_DISTANCE = 1.1        # from line to line, in heights of the word
NEIGHBOUR_SHIFT = 1 / 3         # to the side, in widths of the word

# The bend. A length without a unit is in heights of the word.
STRETCH = (0.0, 0.15)           # the width is multiplied by e to the power of this (normal)
LEAN = (0.0, 0.05)              # how far the top of a letter lies to the right (normal)
P_ITALIC = 1 / 6
ITALIC_LEAN = 0.25              # is added
TAPER = (0.0, 0.1)              # 0.1: the right end is 1.1 times as high (normal)
MAX_TAPER = 0.35
P_SAG = 0.18                    # the middle hangs down or arches up
SAG = (-0.2, 0.2)               # by this share of the word's length
MIN_SAG_LENGTH = 2              # shorter words do not sag
MAX_SAG_LENGTH = 5              # longer words sag no more than a word of this length
TURN = (0.0, 0.03)              # radians (normal)
P_STEEP_TURN = 0.2
STEEP_TURN = (-0.26, 0.26)      # radians
STEEP_LENGTH = 3                # longer words turn less: twice as long, half as much
MARGIN = (0.06, 0.08)           # between the word and a rim of the crop (normal)
MIN_MARGIN = -0.05              # below 0: letters are cut

# The colours. Lightness goes from 0, black, to 1, white.
CONTRAST = (0.3, 0.9)           # difference in lightness between ground and letters
P_FAINT = 0.15
FAINT_CONTRAST = (0.15, 0.3)
VIVIDNESS = [0.03, 0.06, 0.12, 0.25, 0.5]    # deviation of red and blue: mostly near grey
GREEN_VIVIDNESS = 0.3           # of green, as a share: green and pink are rare among signs
GROUNDS = {"plain": 0.30, "shaded": 0.42, "two colours": 0.28}
SHADE = (0.75, 1.2)             # factor on the colour of a shaded ground
SECOND_GROUND = (-0.6, 0.4)     # its lightness: 0 is the ground's, 1 the letters'
P_SECOND_INK = 0.3              # letters of two colours
SECOND_INK = (-0.4, 0.3)        # its lightness: 0 is the letters', 1 the ground's
RELIEFS = {"none": 0.75, "shadow": 0.15, "outline": 0.08, "hollow": 0.02}
RELIEF_COLOUR = (-1.0, 0.3)     # its lightness: 0 is the ground's, 1 the letters'
RELIEF_OPACITY = (0.5, 1.0)
SHADOW_DOWN = [-1, 1, 2]        # pixels of the crop
SHADOW_RIGHT = [-2, 1, 2]       # pixels of the crop
P_UNEVEN_LIGHT = 0.3
DIM = (0.4, 1.0)                # factor on the picture where the light is weakest
BRIGHT = (0.9, 1.4)             # and where it is strongest

# The wear: what a camera leaves of it.
NOISE = (0, 7)                  # its deviation, of 255 grey levels (normal; below 0: none)
P_FEW_PIXELS = 0.35
FEW_PIXELS = (10, 24)           # height of the crop, whose width follows
MIN_FEW_WIDTH = 12
P_JPEG = 0.15
JPEG_QUALITY = (15, 60)
P_BLUR = 0.12
BLUR = (0.4, 1.4)               # radius, in pixels of the crop

# Textures, which colours are mixed with: grids of random cells, enlarged.
N_TEXTURES = 192
TEXTURE_ROWS = [2, 3, 6, 16, 96]
TEXTURE_COLUMNS = [2, 4, 8, 24, 96]
TEXTURE_HARDNESS = [1, 1, 3, 20]    # 1: soft; 20: nearly black and white


# ---- a word

def word_label(seed, index, charset):
    """The label of word `index` in the draw `seed`, without its picture: 1 to MAX_LENGTH
    characters of charset, a string without blanks. Words are English if charset has all
    of a to z and nothing beyond ASCII."""
    return draw_label(word_rng(seed, index), charset)


def render_word(seed, index, fonts, charset):
    """Word `index` in the draw `seed` -> image uint8 (3, 32, 128), label, char_map uint8
    (32, 128): a value k > 0 marks the pixels of the label's k-th character.

    fonts: paths, such as font_files gives. UserError if none has the label's characters.
    """
    rng = word_rng(seed, index)
    label = draw_label(rng, charset)

    coverage, char_map = set_letters(rng, label, fonts)
    if rng.random() < P_NEIGHBOURS:
        add_neighbours(coverage)
    coverage, char_map, aspect = bend_word(rng, coverage, char_map)

    image = colour_word(rng, coverage)
    image = wear_out(rng, image, aspect)
    return image, label, char_map


def word_rng(seed, index):
    """The random numbers of one word. Python hashes the text, so no two words have anything in
    common. With the sum of both, draw 1 would be draw 0 moved by one word."""
    return random.Random(f"{seed} {index}")


def choose(rng, shares):
    """One key of a dict of shares."""
    return rng.choices(list(shares), weights=shares.values())[0]


# ---- the label

def draw_label(rng, charset):
    """What to write: one of LABELS; a word has a case, and now and then punctuation."""
    kind = choose(rng, LABELS)
    length = choose(rng, LENGTHS)
    if kind == "english word":
        word = english_word(rng, length, charset)
    elif kind == "random letters":
        word = random_letters(rng, length, charset)
    elif kind == "number":
        word = draw_number(rng)
    else:
        word = "".join(rng.choices(charset, k=length))

    if kind in ("english word", "random letters"):
        word = set_case(rng, word)
        if rng.random() < P_PUNCTUATION:
            word = rng.choice(PUNCTUATION).replace("*", word)

    label = keep_known(word, charset)[:MAX_LENGTH]
    if label == "":
        return rng.choice(charset)
    return label


def english_word(rng, length, charset):
    """A word of that length; random letters if charset cannot write it or none is known."""
    words = vocabulary()[length]
    if not words or not can_write_english(charset):
        return random_letters(rng, length, charset)
    # Common words stand first. Squaring a number between 0 and 1 brings it nearer to 0.
    place = rng.random() ** COMMON_FIRST
    return words[int(place * len(words))]


def random_letters(rng, length, charset):
    return "".join(rng.choices(letters_of(charset), k=length))


def draw_number(rng):
    """A price, a year, a time, a telephone number."""
    text = ""
    for char in rng.choice(NUMBERS):
        if char == "#":
            char = str(rng.randrange(10))
        text += char
    return text


def set_case(rng, word):
    """A lower-case word in one of CASES."""
    case = choose(rng, CASES)
    if case == "STREET":
        return word.upper()
    if case == "Street":
        return word.capitalize()
    return word


def keep_known(word, charset):
    """The word without what charset lacks. A letter that charset has only in the other case
    changes its case."""
    known = ""
    for char in word:
        if char not in charset:
            char = char.swapcase()
        # Unicode's normal form NFC joins some characters to the one before, such as an accent
        # to its letter. These are left out: the label would become shorter than its map.
        if char in charset and unicodedata.is_normalized("NFC", known + char):
            known += char
    return known


@functools.lru_cache
def can_write_english(charset):
    """True if charset has a to z, in either case, and nothing beyond ASCII."""
    return charset.isascii() and set(LOWER_CASE) <= set(charset.lower())


@functools.lru_cache
def letters_of(charset):
    """The letters that random letters are drawn from. A charset without letters gives all
    of its characters."""
    if can_write_english(charset):
        return LOWER_CASE           # set_case does the rest
    letters = [char for char in charset if char.isalpha() or not char.isascii()]
    return "".join(letters) or charset


@functools.cache
def vocabulary():
    """{length: lower-case words, the common ones first}, about 8,000 words: of signs, of the
    docstrings and comments of this Python's library (another version may have others), and
    of the names of pictographs, such as "hamburger"."""
    texts = []
    for code in range(0x1F300, 0x1FB00):
        texts.append(unicodedata.name(chr(code), "").lower())
    library = pathlib.Path(os.__file__).parent
    docstring_or_comment = r'"""(.*?)"""|# ([^\n]*)'
    for path in sorted(library.glob("*.py")):
        source = path.read_text("utf-8", "ignore")
        for docstring, comment in re.findall(docstring_or_comment, source, re.DOTALL):
            texts.append(docstring or comment)

    # Words stand between blanks, brackets and punctuation, and only their first letter may
    # be a capital. This leaves out most names of variables.
    pattern = r"(?<=[ \n(])[A-Za-z]?[a-z]+(?=[ ,.;:)\n])"
    found = re.findall(pattern, f" {' '.join(texts)} ")
    counts = Counter(word.lower() for word in found)
    for word in SIGN_WORDS:
        counts[word] += SIGN_WORD_COUNT

    words = [word for word in counts if re.search("[aeiouy]", word)]    # not "str"
    words.sort(key=lambda word: (-counts[word], word))
    by_length = {}
    for length in LENGTHS:
        by_length[length] = [word for word in words if len(word) == length]
    return by_length


# ---- fonts

FONT_FOLDERS = [
    "/usr/share/fonts",
    "/usr/local/share/fonts",
    "~/.fonts",
    "~/.local/share/fonts",
    "/Library/Fonts",
    "/System/Library/Fonts",
    "~/Library/Fonts",
    "$WINDIR/Fonts",
    "$LOCALAPPDATA/Microsoft/Windows/Fonts",
]
NO_LETTERS = (                  # in the names of fonts that hold something else
    "symbol|emoji|ding|math|icon|braille|barcode|music|"
    "lastresort|blank|notdef|ornament"
)
PROBE_SIZE = 40                 # pixels at which a font is asked what it has
NO_CHARACTER = "\U0010fffe"     # Unicode will never give it a meaning, so no font has it


def font_files(folder=None):
    """Paths of fonts: None, which is Pillow's own font, then the TrueType and OpenType files
    of the system, then all of those under `folder`. UserError if that holds none."""
    files = [None]
    for place in FONT_FOLDERS:
        for path in files_under(place):
            name = os.path.basename(path)
            if not re.search(NO_LETTERS, name, re.IGNORECASE):
                files.append(path)
    if folder:
        found = files_under(folder)
        if not found:
            raise UserError(f"--fonts {folder}: no .ttf, .otf or .ttc file in it; "
                            "give a folder that holds some")
        files += found
    return files


def files_under(folder):
    """The font files of a folder and of the folders in it, sorted."""
    folder = os.path.expanduser(os.path.expandvars(folder))
    found = pathlib.Path(folder).rglob("*.[oOtT][tT][cCfF]")
    return [str(path) for path in sorted(found)]


def fonts_with(charset, files):
    """The files that have every character of charset. If there is none: UserError, with what
    the best file lacks."""
    lacking = {}
    for path in files:
        lacking[path] = [char for char in charset if not has_char(path, char)]
    complete = [path for path in files if not lacking[path]]
    if not complete:
        least = min(lacking.values(), key=len)
        raise UserError("charset: no font has all of it, the best lacks "
                        f"{''.join(least[:40])}; give one with --fonts FOLDER")
    return complete


def find_font(text, size, files):
    """The ImageFont, `size` pixels high, of the first file that has all of the text. If none
    does: Pillow's own, which draws boxes."""
    chars = text.replace(" ", "")
    for path in files:
        font = open_font(path, size)
        if font and all(has_char(path, char) for char in chars):
            return font
    return open_font(None, size)


@functools.lru_cache(maxsize=4096)
def open_font(path, size):
    """An ImageFont, `size` pixels high, or None for a file that cannot be used."""
    if path is None:
        return ImageFont.load_default(size)
    try:
        return ImageFont.truetype(path, size)
    except (OSError, ValueError):
        return None


@functools.lru_cache(maxsize=2**16)
def has_char(path, char):
    """Whether a font has a character. A font that lacks one draws nothing, or the box that it
    draws for every character that it lacks."""
    font = open_font(path, PROBE_SIZE)
    if font is None:
        return False
    try:
        drawn = bytes(font.getmask(char))
        return any(drawn) and drawn != missing_box(path)
    except (OSError, ValueError):       # a damaged font
        return False


@functools.lru_cache(maxsize=4096)
def missing_box(path):
    """The pixels that a font draws for a character that it lacks."""
    return bytes(open_font(path, PROBE_SIZE).getmask(NO_CHARACTER))


# ---- the letters

# A drawn character. ink: its coverage, a picture of mode "L". left, top: the corner of
# ink, seen from the pen, which stands on the baseline. advance: how far the pen moves on.
Glyph = namedtuple("Glyph", "ink left top advance")


@functools.lru_cache(maxsize=2**15)
def draw_glyph(path, size, stroke, char):
    """The Glyph of a character with `stroke` pixels added all around, or None if the font
    lacks it."""
    font = open_font(path, size)
    if font is None or not has_char(path, char):
        return None
    at_pen = dict(anchor="ls", stroke_width=stroke)     # "ls": left end of the baseline
    left, top, right, bottom = font.getbbox(char, **at_pen)
    ink = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(ink).text((-left, -top), char, 255, font, **at_pen)
    return Glyph(ink, left, top, font.getlength(char))


def set_letters(rng, label, fonts):
    """The label on a straight line -> coverage, char_map: two pictures of mode "L", (w, 2 h).
    The word is (w, h) and in their middle. Above and below is room for other lines."""
    size = LETTER_SIZE
    if len(label) <= SHORT_LABEL:
        size = SHORT_LETTER_SIZE
    stroke = choose(rng, STROKES)
    glyphs = choose_glyphs(rng, label, fonts, size, stroke)
    corners = place_glyphs(rng, glyphs, size)

    left = min(x for x, y in corners)
    top = min(y for x, y in corners)
    right = max(x + glyph.ink.width for (x, y), glyph in zip(corners, glyphs))
    bottom = max(y + glyph.ink.height for (x, y), glyph in zip(corners, glyphs))

    # A lone "." must not fill its crop. The two pixels more let the rims fade out.
    w = max(right - left, size // 2) + 2
    h = max(bottom - top, size // 2) + 2
    move_right = (w - left - right) // 2
    move_down = (2 * h - top - bottom) // 2

    coverage = Image.new("L", (w, 2 * h))
    char_map = Image.new("L", (w, 2 * h))
    for k, ((x, y), glyph) in enumerate(zip(corners, glyphs), start=1):
        corner = (x + move_right, y + move_down)
        coverage.paste(255, corner, mask=glyph.ink)
        half_covered = glyph.ink.convert("1", dither=Image.Dither.NONE)
        char_map.paste(k, corner, mask=half_covered)
    return coverage, char_map


def choose_glyphs(rng, label, fonts, size, stroke):
    """The label's Glyphs in one font: eight fonts are tried by chance, then each in turn,
    until one has all of the label's characters."""
    for path in rng.choices(fonts, k=8) + fonts:
        glyphs = [draw_glyph(path, size, stroke, char) for char in label]
        if all(glyphs):
            return glyphs
    raise UserError(f"no font has all of {label}; give one with --fonts FOLDER")


def place_glyphs(rng, glyphs, size):
    """The upper left corner (x, y) of each Glyph's ink; y is 0 at the baseline."""
    spacing = size * max(MIN_SPACING, rng.gauss(*SPACING))
    hop = 0
    if rng.random() < P_DANCE:
        hop = size * DANCE

    corners = []
    pen = 0
    for glyph in glyphs:
        x = round(pen) + glyph.left
        y = glyph.top + round(rng.uniform(-hop, hop))
        corners.append((x, y))
        pen += glyph.advance + spacing
    return corners


def add_neighbours(coverage):
    """Writes the word once more above itself and below, moved to the side."""
    w, h = coverage.width, coverage.height // 2
    top = h // 2
    line = coverage.crop((0, top, w, top + h))
    shift = round(NEIGHBOUR_SHIFT * w)
    distance = round(NEIGHBOUR_DISTANCE * h)
    coverage.paste(line, (shift, top - distance))
    coverage.paste(line, (-shift, top + distance))


# ---- the bend

# A point of the straight word is (u, v): u goes from -1, the left end, to 1, the right
# end, and v from -1/2, the top, to 1/2, the foot. The same point of the bent word is
# (x, y), in heights of the word. (0, 0) is the middle, and y goes down.
#
# aspect: width / height of the straight word
# lean:   how far the top of a letter lies to the right of its foot
# taper:  letters are 1 + taper u high
# sag:    how far the middle hangs below the ends
# angle:  by which all of it is turned, in radians
Bend = namedtuple("Bend", "aspect lean taper sag angle")

BEND_STRIPS = 8                 # straight pieces that stand for a curve
MAX_DRAWN = (160, 80)           # width, height: what is larger is made smaller, then bent
INKED = 96                      # of 255: a pixel with less coverage belongs to no character


def bend_word(rng, coverage, char_map):
    """set_letters' two pictures -> coverage float32 (32, 128) in [0, 1], char_map uint8
    (32, 128), and the width / height that the crop had before it was squeezed."""
    w, h = coverage.width, coverage.height // 2
    bend = draw_bend(rng, w / h)
    n = 1                       # without a curve one piece is enough
    if bend.sag != 0:
        n = BEND_STRIPS
    crop = crop_around(rng, bend, n)

    # A warp reads single pixels. In a large drawing it would miss some, so these are averaged.
    size = (min(w, MAX_DRAWN[0]), min(2 * h, MAX_DRAWN[1]))
    coverage = coverage.resize(size, Image.Resampling.BILINEAR)
    char_map = char_map.resize(size, Image.Resampling.NEAREST)

    mesh = warp_mesh(bend, crop, n, size)
    coverage = warp(coverage, mesh, Image.Resampling.BILINEAR)
    char_map = warp(char_map, mesh, Image.Resampling.NEAREST)
    char_map = np.where(coverage > INKED, char_map, 0).astype(np.uint8)

    left, top, right, bottom = crop
    aspect = (right - left) / (bottom - top)
    return coverage.astype(np.float32) / 255, char_map, aspect


def draw_bend(rng, aspect):
    """A Bend for a word whose width / height is `aspect`."""
    aspect = aspect * math.exp(rng.gauss(*STRETCH))
    lean = rng.gauss(*LEAN)
    if rng.random() < P_ITALIC:
        lean += ITALIC_LEAN
    taper = rng.gauss(*TAPER)
    taper = max(-MAX_TAPER, min(MAX_TAPER, taper))

    sag = 0
    if aspect > MIN_SAG_LENGTH and rng.random() < P_SAG:
        sag = rng.uniform(*SAG) * min(aspect, MAX_SAG_LENGTH)

    angle = rng.gauss(*TURN)
    if rng.random() < P_STEEP_TURN:
        angle = rng.uniform(*STEEP_TURN) * min(1, STEEP_LENGTH / aspect)
    return Bend(aspect, lean, taper, sag, angle)


def bend_point(bend, u, v):
    """The point (u, v) of the word, bent -> (x, y)."""
    # The middle line, v = 0, becomes a parabola: x = aspect/2 u, y = sag (1 - u^2).
    # Its slope is dy/dx = (dy/du) / (dx/du) = -2 sag u / (aspect/2).
    slope = -4 * bend.sag * u / bend.aspect
    # Letters stand upright on it: a step down, along (-slope, 1), also goes to the left.
    x = bend.aspect / 2 * u - slope * v
    y = bend.sag * (1 - u**2) + (1 + bend.taper * u) * v
    # They lean to the right: the higher a point, the farther.
    x = x - bend.lean * y
    return turn(x, y, bend.angle)


def unbend_point(bend, x, y):
    """The point (x, y) unbent -> (u, v): bend_point's steps undone, the last one first."""
    x, y = turn(x, y, -bend.angle)
    x = x + bend.lean * y
    # The equations for x and y hold both u and v. First u as if the slope were 0, then v,
    # then u again: not exact where a short word sags much, but near enough for the eye.
    u = 2 / bend.aspect * x
    v = (y - bend.sag * (1 - u**2)) / (1 + bend.taper * u)
    slope = -4 * bend.sag * u / bend.aspect
    u = 2 / bend.aspect * (x + slope * v)
    return u, v


def turn(x, y, angle):
    """A point turned about (0, 0), clockwise to the eye since y goes down."""
    cos, sin = math.cos(angle), math.sin(angle)
    return cos * x - sin * y, sin * x + cos * y


def crop_around(rng, bend, n):
    """The rims of a crop that holds the bent word and margins -> left, top, right, bottom, in
    heights of the word. The word is n straight pieces: their corners are looked at."""
    points = []
    for k in range(n + 1):
        u = -1 + 2 * k / n
        points.append(bend_point(bend, u, -1 / 2))
        points.append(bend_point(bend, u, 1 / 2))
    xs = [x for x, y in points]
    ys = [y for x, y in points]

    margins = [max(MIN_MARGIN, rng.gauss(*MARGIN)) for _ in range(4)]
    left = min(xs) - margins[0]
    top = min(ys) - margins[1]
    right = max(xs) + margins[2]
    bottom = max(ys) + margins[3]
    return left, top, right, bottom


def warp_mesh(bend, crop, n, size):
    """How Pillow is told to warp a drawing of that size: by a list of boxes and quads.

    A box is a rectangle of the new picture, here one of n strips side by side. Its quad is the
    quadrilateral of the drawing that fills it, x and y of four corners: upper left, lower
    left, lower right, upper right. Between the corners Pillow interpolates. (A photograph of
    a tilted sheet needs a homography; for the bends here this is near enough.)
    """
    left, top, right, bottom = crop
    w, h = size

    def drawn_at(x, y):
        u, v = unbend_point(bend, x, y)
        return (1 / 2 + u / 2) * w, (1 / 2 + v / 2) * h

    mesh = []
    for k in range(n):
        box = (W * k // n, 0, W * (k + 1) // n, H)
        x0 = left + (right - left) * k / n
        x1 = left + (right - left) * (k + 1) / n
        quad = (*drawn_at(x0, top), *drawn_at(x0, bottom),
                *drawn_at(x1, bottom), *drawn_at(x1, top))
        mesh.append((box, quad))
    return mesh


def warp(picture, mesh, resample):
    """A drawing -> (32, 128). Beyond its rims all is 0."""
    return np.asarray(picture.transform((W, H), Image.Transform.MESH, mesh, resample))


# ---- the colours

def colour_word(rng, coverage):
    """coverage (32, 128) -> float32 (3, 32, 128), about 0 to 255: letters on a ground, in
    colours that differ, mostly enough to read."""
    ground_light, ink_light = choose_lightness(rng)
    ground = colour_ground(rng, ground_light, ink_light)
    ink = colour_ink(rng, ground_light, ink_light)

    relief = choose(rng, RELIEFS)
    if relief != "none":
        wider = widen(rng, coverage, relief)
        lightness = mix(ground_light, ink_light, rng.uniform(*RELIEF_COLOUR))
        colour = draw_colour(rng, lightness)
        ground = mix(ground, colour, wider * rng.uniform(*RELIEF_OPACITY))
        if relief == "hollow":
            coverage = wider - coverage         # the outline alone has the letters' colour

    image = mix(ground, ink, coverage)
    if rng.random() < P_UNEVEN_LIGHT:
        dim = rng.uniform(*DIM)
        bright = rng.uniform(*BRIGHT)
        image = image * mix(dim, bright, draw_texture(rng))
    return image


def choose_lightness(rng):
    """The lightness of the ground and that of the letters: dark on light as often as light
    on dark."""
    contrast = rng.uniform(*CONTRAST)
    if rng.random() < P_FAINT:
        contrast = rng.uniform(*FAINT_CONTRAST)
    dark = rng.uniform(0, 1 - contrast)
    light = dark + contrast
    if rng.random() < 0.5:
        return dark, light
    return light, dark


def colour_ground(rng, ground_light, ink_light):
    """What the letters stand on: (3, 1, 1) if it is plain, else (3, 32, 128)."""
    colour = draw_colour(rng, ground_light)
    kind = choose(rng, GROUNDS)
    if kind == "plain":
        return colour
    if kind == "shaded":
        other = colour * rng.uniform(*SHADE)
    else:
        lightness = mix(ground_light, ink_light, rng.uniform(*SECOND_GROUND))
        other = draw_colour(rng, lightness)
    return mix(colour, other, draw_texture(rng))


def colour_ink(rng, ground_light, ink_light):
    """The letters' colour (3, 1, 1), or two that run into each other, (3, 32, 128)."""
    colour = draw_colour(rng, ink_light)
    if rng.random() < P_SECOND_INK:
        lightness = mix(ink_light, ground_light, rng.uniform(*SECOND_INK))
        other = draw_colour(rng, lightness)
        colour = mix(colour, other, draw_texture(rng))
    return colour


def draw_colour(rng, lightness):
    """A colour of that lightness: float32 (3, 1, 1), 0 to 255."""
    deviation = rng.choice(VIVIDNESS)
    red = rng.gauss(0, deviation)
    green = rng.gauss(0, deviation * GREEN_VIVIDNESS)
    blue = rng.gauss(0, deviation)
    # The lightness of a colour is 0.30 red + 0.59 green + 0.11 blue (ITU-R BT.601).
    # The grey that is added makes it the one asked for.
    grey = lightness - (0.30 * red + 0.59 * green + 0.11 * blue)
    channels = [grey + red, grey + green, grey + blue]
    channels = [255 * min(1, max(0, channel)) for channel in channels]
    return np.array(channels, np.float32).reshape(3, 1, 1)


def widen(rng, coverage, relief):
    """Coverage of the letters and their shadow or outline: copies that are moved by some pixels
    are laid on the letters, and each pixel keeps its largest value."""
    moves = [(0, 1), (0, -1), (1, 0), (-1, 0)]
    if relief == "shadow":
        moves = [(rng.choice(SHADOW_DOWN), rng.choice(SHADOW_RIGHT))]
    wider = coverage
    for move in moves:
        moved = np.roll(coverage, move, axis=(0, 1))
        wider = np.maximum(wider, moved)
    return wider


def mix(a, b, share):
    """a where share is 0, b where it is 1, and on the way from a to b elsewhere."""
    return a + (b - a) * share


def draw_texture(rng):
    """float32 (32, 128) in [0, 1]."""
    return cut_window(rng, textures()[rng.randrange(N_TEXTURES)])


@functools.cache
def textures():
    """float32 (192, 64, 192) in [0, 1]. A grid of few or many random cells, smooth or with
    edges, upright or turned, soft or hard, looks like light, clouds, cloth, planks."""
    rng = np.random.default_rng(0)
    maps = []
    for i in range(N_TEXTURES):
        rows = rng.choice(TEXTURE_ROWS)
        columns = rng.choice(TEXTURE_COLUMNS)
        cells = Image.fromarray(rng.random((rows, columns), np.float32))
        resample = Image.Resampling.BICUBIC
        if i % 4 == 0:
            resample = Image.Resampling.NEAREST         # cells with edges
        picture = cells.resize((256, 256), resample)
        if i % 2 == 1:
            picture = picture.rotate(rng.uniform(0, 360), resample)
        middle = picture.crop((32, 96, 224, 160))       # without the turned one's corners

        values = np.asarray(middle) - 0.5
        values = np.tanh(rng.choice(TEXTURE_HARDNESS) * values)
        values = values - values.min()
        maps.append(values / values.max())
    return np.stack(maps).astype(np.float32)


def cut_window(rng, maps):
    """(..., 32, 128) out of maps (..., h, w) that are larger."""
    h, w = maps.shape[-2:]
    top = rng.randint(0, h - H)
    left = rng.randint(0, w - W)
    return maps[..., top:top + H, left:left + W]


# ---- the wear

def wear_out(rng, image, aspect):
    """What a camera leaves of a picture float32 (3, 32, 128) -> uint8 (3, 32, 128).
    aspect: the crop's width / height before it was squeezed."""
    deviation = max(0, rng.gauss(*NOISE))
    image = image + deviation * cut_window(rng, noise())
    image = image.clip(0, 255).astype(np.uint8)

    picture = Image.fromarray(image.transpose(1, 2, 0).copy())
    if rng.random() < P_FEW_PIXELS:
        picture = shrink(picture, rng.randint(*FEW_PIXELS), aspect)
    if rng.random() < P_JPEG:
        picture = compress(picture, rng.randint(*JPEG_QUALITY))
    if rng.random() < P_BLUR:
        radius = rng.uniform(*BLUR) * picture.height / H
        picture = picture.filter(ImageFilter.GaussianBlur(radius))
    picture = picture.resize((W, H), Image.Resampling.BICUBIC)
    return np.asarray(picture).transpose(2, 0, 1).copy()


@functools.cache
def noise():
    """float32 (3, 64, 256): noise of mean 0 and deviation 1, from which windows are cut."""
    return np.random.default_rng(0).standard_normal((3, 2 * H, 2 * W), np.float32)


def shrink(picture, height, aspect):
    """The picture `height` pixels high and in its true shape, but no wider than it was."""
    width = round(height * aspect)
    width = max(MIN_FEW_WIDTH, min(W, width))
    return picture.resize((width, height), Image.Resampling.BILINEAR)


def compress(picture, quality):
    """The picture with the blocks that JPEG leaves."""
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return Image.open(file)
