"""Drawing words: a label, its letters in some font, bent and coloured, then noisy and
blurred as a camera leaves it.

    word_label(seed, index, charset)          -> the label alone
    render_word(seed, index, fonts, charset)  -> picture, label, map of characters

Both depend on nothing but their arguments, whatever the process or the order.
Labels are the same on every machine. Pictures are the same where the fonts are, such as
those of one folder, and Pillow's version.
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

from common import H, W, UserError, say

PRINTABLE = "".join(chr(code) for code in range(33, 127))    # a keyboard's 94 characters
LOWER_CASE = "abcdefghijklmnopqrstuvwxyz"
MAX_LENGTH = 25                 # characters of the longest label, if no lines are asked for
MAX_LINE = 40                   # characters of the longest line: each is 3 pixels wide


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
P_LINE = 0.1                    # where lines are asked for: of any length up to MAX_LINE
CASES = {"STREET": 0.40, "Street": 0.28, "street": 0.32}
P_PUNCTUATION = 0.12            # of words and of random letters
COMMON_EXPONENT = 3             # 1: all words come equally often; 3: half are of the first eighth

NUMBERS = """
    # ## ### #### ##### 19## 20## $# $## $#.## $##.## ##% #% #.## ##.# #,###
    #:## ##:## ##am #pm #/# ##/## #x## ###-#### ###-###-#### (###) No.# #th
    +## ##-## ##+ ##m ##km A# B## #C ##A
""".split()                     # each "#" becomes a digit
PUNCTUATION = """
    *! *. *, *? *: *; *'s '* "*" "* *" (*) [*] *& @* #* -* *- *... www.* *.com *!!
""".split()                     # "*" becomes the word

# The letters. Their size is the font's: about from the top of an "l" to the foot of a "p".
LETTER_SIZE = 48                # pixels
STROKES = {0: 3, 1: 2, 2: 1}    # pixels that are added all around a letter: share
SPACING = (0.02, 0.06)          # between letters, in letter sizes (normal)
MIN_SPACING = -0.04
P_HOP = 0.06                    # letters hop up and down
HOP = 0.12                      # by at most this, in letter sizes

# The lines above and below, which a crop shows in part.
P_NEIGHBOURS = 0.12
NEIGHBOUR_DISTANCE = 1.1        # from line to line, in heights of the word
NEIGHBOUR_SHIFT = 1 / 3         # to the side, in widths of the word

# The bend. A length without a unit is in heights of the word.
STRETCH = (0.0, 0.15)           # the width is multiplied by e to the power of this (normal)
SHEAR = (0.0, 0.05)             # to the right, for each height of the word upwards (normal)
P_ITALIC = 1 / 6
ITALIC_SHEAR = 0.25             # is added
TAPER = (0.0, 0.1)              # 0.1: the right end is 1.1 times as high (normal)
MAX_TAPER = 0.35
P_SAG = 0.18                    # the middle hangs down or arches up
SAG = (-0.2, 0.2)               # by this share of the word's length
MIN_SAG_LENGTH = 2              # shorter words do not sag
MAX_SAG_LENGTH = 5              # longer words sag no more than a word of this length
TURN = (0.0, 0.03)              # radians (normal)
P_STEEP_TURN = 0.2
STEEP_TURN = (-0.26, 0.26)      # radians
STEEP_LENGTH = 3                # a word twice as long as this turns half as much, and so on
MARGIN = (0.06, 0.08)           # between the word and a rim of the crop (normal)
MIN_MARGIN = -0.05              # below 0: letters are cut

# The colours. Lightness goes from 0, black, to 1, white.
CONTRAST = (0.3, 0.9)           # difference in lightness between ground and letters
P_FAINT = 0.15
FAINT_CONTRAST = (0.15, 0.3)
P_DARK_GROUND = 0.5
VIVIDNESS = [0.03, 0.06, 0.12, 0.25, 0.5]    # deviation of red and blue: mostly near grey
GREEN_VIVIDNESS = 0.3           # of green, as a share: green and pink are rare among signs
GROUNDS = {"plain": 0.30, "shaded": 0.42, "two colours": 0.28}
SHADE = (0.75, 1.2)             # factor on the colour of a shaded ground
SECOND_GROUND_LIGHTNESS = (-0.6, 0.4)   # 0 is the ground's, 1 the letters'
P_SECOND_INK = 0.3              # letters of two colours
SECOND_INK_LIGHTNESS = (-0.4, 0.3)      # 0 is the letters', 1 the ground's
RELIEFS = {"none": 0.75, "shadow": 0.15, "outline": 0.08, "hollow": 0.02}
RELIEF_LIGHTNESS = (-1.0, 0.3)  # 0 is the ground's, 1 the letters'
RELIEF_OPACITY = (0.5, 1.0)
SHADOW_DOWN = [-1, 1, 2]        # pixels of the crop
SHADOW_RIGHT = [-2, 1, 2]       # pixels of the crop
P_UNEVEN_LIGHT = 0.3
DIM = (0.4, 1.0)                # factor on the picture where the light is weakest
BRIGHT = (0.9, 1.4)             # and where it is strongest

# The wear: what a camera leaves of it.
NOISE_DEVIATION = (0, 7)        # grey levels of 255 (normal; below 0: no noise)
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

def word_label(seed, index, charset, max_length=MAX_LENGTH):
    """The label of word `index` of those of `seed`, without its picture: 1 to max_length
    characters of charset, a string without blanks. Words are English if charset has all
    of a to z and nothing beyond ASCII. A max_length above MAX_LENGTH asks for lines too."""
    return draw_label(word_rng(seed, index), charset, max_length)


def render_word(seed, index, fonts, charset, max_length=MAX_LENGTH):
    """Word `index` of those of `seed` -> image uint8 (3, 32, 128), label, char_map uint8
    (32, 128): a value k > 0 marks the pixels of the label's k-th character.

    fonts: a list, such as font_files gives. UserError if neither one of these nor Pillow's own
    has the label's characters.
    """
    rng = word_rng(seed, index)
    label = draw_label(rng, charset, max_length)

    coverage, char_map = set_letters(rng, label, fonts)
    if rng.random() < P_NEIGHBOURS:
        coverage = add_neighbours(coverage)
    coverage, char_map, crop_aspect = bend_word(rng, coverage, char_map)

    image = colour_word(rng, coverage)
    image = wear_out(rng, image, crop_aspect)
    return image, label, char_map


def word_rng(seed, index):
    """The random numbers of one word. Random seeds itself from a text (by SHA-512), the same in
    every process. In the text seed and index stand side by side. Were they added, word 4 of
    seed 1 would be word 5 of seed 0."""
    return random.Random(f"{seed} {index}")


def choose(rng, shares):
    """One key of a dict of shares."""
    return rng.choices(list(shares), weights=shares.values())[0]


# ---- the label

def draw_label(rng, charset, max_length):
    """What to write: one of LABELS; a word has a case, and now and then punctuation."""
    kind = choose(rng, LABELS)
    length = choose(rng, LENGTHS)       # of all kinds but numbers, which have patterns
    if max_length > MAX_LENGTH and rng.random() < P_LINE:
        length = rng.randint(1, min(max_length, MAX_LINE))
    if kind == "english word":
        text = english_word(rng, length, charset)
    elif kind == "random letters":
        text = random_letters(rng, length, charset)
    elif kind == "number":
        text = draw_number(rng)
    else:
        text = "".join(rng.choices(charset, k=length))

    if kind in ("english word", "random letters"):
        text = set_case(rng, text)
        if rng.random() < P_PUNCTUATION:
            text = rng.choice(PUNCTUATION).replace("*", text)

    label = keep_known(text, charset)[:max_length]
    if label == "":
        return rng.choice(charset)
    return label


def english_word(rng, length, charset):
    """A word of that length; random letters if charset cannot write it or none is known."""
    words = []
    if can_write_english(charset):
        words = vocabulary().get(length)        # none is as long as a line
    if not words:
        return random_letters(rng, length, charset)
    # Common words stand first. A power of a number between 0 and 1 is nearer to 0.
    share = rng.random() ** COMMON_EXPONENT
    return words[int(share * len(words))]


def random_letters(rng, length, charset):
    return "".join(rng.choices(letters_of(charset), k=length))


def draw_number(rng):
    """A price, a year, a time, a telephone number."""
    number = ""
    for char in rng.choice(NUMBERS):
        if char == "#":
            char = str(rng.randrange(10))
        number += char
    return number


def set_case(rng, word):
    """A lower-case word in one of CASES."""
    case = choose(rng, CASES)
    if case == "STREET":
        return word.upper()
    if case == "Street":
        return word.capitalize()
    return word


def keep_known(text, charset):
    """The text without what charset lacks. A letter that charset has only in the other case
    changes its case."""
    known = ""
    for char in text:
        if char not in charset:
            char = char.swapcase()
        # data.py brings all labels to Unicode's normal form NFC, which joins some characters
        # to the one before, such as an accent to its letter. Here these are left out, or the
        # label would have fewer characters than its map.
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
    # Some scripts' signs are no letters to Python, so all that is not ASCII counts as one.
    letters = [char for char in charset if char.isalpha() or not char.isascii()]
    return "".join(letters) or charset


WORDS = pathlib.Path(__file__).parent / "assets" / "words.txt"


@functools.cache
def vocabulary():
    """{length: lower-case words, the common ones first}: 48,000 English words and names, from
    the lines of assets/words.txt. UserError if that is missing."""
    try:
        words = WORDS.read_text("utf-8").split()
    except FileNotFoundError:
        raise UserError(f"{WORDS}: missing; it holds the words to draw and comes with "
                        "the repository: copy it from there") from None
    by_length = {}
    for length in LENGTHS:
        by_length[length] = [word for word in words if len(word) == length]
    return by_length


# ---- fonts
#
# A font is known by the path of its file; None stands for Pillow's own. `fonts` is always
# a list of such paths.

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
NO_CHARACTER = "\U0010fffe"     # Unicode will never give it a meaning, so no font has it
LETTERS_AND_DIGITS = LOWER_CASE + LOWER_CASE.upper() + "0123456789"


def font_files(folder=None, charset=None):
    """A list of fonts that have all of charset; UserError if there is none. With a folder these are
    its TrueType and OpenType files and nothing else, so that pictures are the same on every
    machine. Without one they are None, which is Pillow's own font, and the files of the system.

    charset=None asks a folder's fonts for all letters and digits, and the system's for nothing. Of
    a collection, .ttc, the first font is drawn."""
    if folder:
        return list(usable_fonts(folder, charset))
    fonts = [None]
    for system_folder in FONT_FOLDERS:
        for path in font_files_under(system_folder):
            name = os.path.basename(path)
            if not re.search(NO_LETTERS, name, re.IGNORECASE):
                fonts.append(path)
    if charset is not None:
        return fonts_with(charset, fonts)
    return fonts


def font_files_under(folder):
    """The font files of a folder and of the folders in it, in the same order on every system."""
    folder = os.path.expanduser(os.path.expandvars(folder))
    found = pathlib.Path(folder).rglob("*.[oOtT][tT][cCfF]")    # .otf, .ttf, .ttc
    # As texts: paths themselves are compared without regard to case on Windows.
    return sorted(path.as_posix() for path in found)


@functools.lru_cache
def usable_fonts(folder, charset):
    """font_files of a folder. How many are left out, and why, is said, but once: the answer is
    kept."""
    if os.path.isfile(folder):
        raise UserError(f"--fonts {folder}: a file; name the folder that it is in")
    paths = font_files_under(folder)
    if not paths:
        raise UserError(f"--fonts {folder}: no .ttf, .otf or .ttc file in it; "
                        "give a folder that holds some")
    # Without a charset all of a keyboard is drawn, but few fonts have all of its signs.
    needed = charset or LETTERS_AND_DIGITS
    usable = []
    left_out = Counter()
    for path in paths:
        fault = font_fault(path, needed)
        if fault is None:
            usable.append(path)
        else:
            left_out[fault] += 1

    reasons = ", ".join(f"{fault}: {count}" for fault, count in left_out.items())
    if not usable:
        raise UserError(f"--fonts {folder}: none of its {len(paths)} fonts can be used "
                        f"({reasons}); give a folder of others")
    if left_out:
        n_left_out = len(paths) - len(usable)
        say(f"--fonts {folder}: {n_left_out} of {len(paths)} fonts are left out ({reasons})")
    if charset is None and not any(has_all(path, PRINTABLE) for path in usable):
        say(f"--fonts {folder}: no font has all of a keyboard's signs; labels that none can "
            "write are drawn in Pillow's own font")
    return usable


def font_fault(path, needed):
    """Why a font cannot be used to draw the characters in `needed`, or None if it can."""
    if open_font(path, LETTER_SIZE) is None:
        return "cannot be opened"
    lacking = {char for char in needed if not has_char(path, char)}
    if not lacking:
        return None
    if is_symbol_face(path):
        return "symbols, not letters"
    if has_char(path, "A") and set(LOWER_CASE) <= lacking:
        return "no lower case"
    return "characters missing"


def is_symbol_face(path):
    """Whether a font says that it holds symbols: it has a "symbol" table of characters, which
    Windows made for fonts such as Wingdings."""
    try:
        ImageFont.truetype(path, LETTER_SIZE, encoding="symb")
    except (OSError, ValueError):
        return False
    return True


def fonts_with(charset, fonts):
    """The fonts that have every character of charset. If there is none: UserError, with what
    the best font lacks."""
    lacking = {}
    for path in fonts:
        lacking[path] = [char for char in charset if not has_char(path, char)]
    complete = [path for path in fonts if not lacking[path]]
    if not complete:
        least = min(lacking.values(), key=len)
        raise UserError("--charset: no font has all of it, the best lacks "
                        f"{''.join(least[:40])!r}; give one with --fonts FOLDER")
    return complete


@functools.lru_cache(maxsize=64)
def families_of(fonts):
    """A tuple of fonts -> a list of families, each a list of its fonts. "Lato Thin" and "Lato
    Black" are two fonts of one family."""
    families = {}
    for path in fonts:
        font = open_font(path, LETTER_SIZE)
        if font is None:
            name = ""                   # all that cannot be opened are one family
        else:
            name, style = font.getname()
        families.setdefault(name, []).append(path)
    return list(families.values())


def describe_fonts(fonts):
    """Such as "526 faces of 198 families"."""
    n_families = len(families_of(tuple(fonts)))
    faces = "1 face" if len(fonts) == 1 else f"{len(fonts)} faces"
    families = "1 family" if n_families == 1 else f"{n_families} families"
    return f"{faces} of {families}"


def find_font(text, size, fonts):
    """An ImageFont, `size` pixels high: the first of the fonts that has all of the text. If
    none does: Pillow's own, which draws boxes."""
    visible = text.replace(" ", "")
    for path in fonts:
        # layout None is Pillow's best: it joins letters where a script asks for it.
        font = open_font(path, size, layout=None)
        if font and has_all(path, visible):
            return font
    return open_font(None, size)


@functools.lru_cache(maxsize=4096)
def open_font(path, size, layout=ImageFont.Layout.BASIC):
    """An ImageFont, `size` pixels high, or None for a file that cannot be opened.

    The basic layout is enough for single letters. It is fast, and always there: the other one
    needs a library, fribidi, which some systems lack, and may choose other shapes of letters.
    """
    if path is None:
        return ImageFont.load_default(size)
    try:
        return ImageFont.truetype(path, size, layout_engine=layout)
    except (OSError, ValueError):
        return None


def has_all(path, text):
    """Whether a font has every character of a text."""
    return all(has_char(path, char) for char in text)


@functools.lru_cache(maxsize=2**16)
def has_char(path, char):
    """Whether a font has a character. A font that lacks one draws nothing, or the box that it
    draws for every character that it lacks."""
    font = open_font(path, LETTER_SIZE)
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
    return bytes(open_font(path, LETTER_SIZE).getmask(NO_CHARACTER))


# ---- the letters

FONT_TRIES = 8                  # by chance, before all fonts are tried
MIN_INK = 96                    # of 255: a pixel with less coverage belongs to no character
ALL_AROUND = [(0, 1), (0, -1), (1, 0), (-1, 0)]     # moves by one pixel: down, right

# A drawn character. ink: its coverage, uint8 (h, w). left, top: the corner of ink, seen
# from the pen, which stands on the baseline. advance: how far the pen moves on.
Glyph = namedtuple("Glyph", "ink left top advance")


# A letter is drawn once, at one size, and kept: 500 fonts of 94 characters fill 70 MB. It is
# made bold, slanted and coloured where it is used.
@functools.lru_cache(maxsize=2**16)
def draw_glyph(path, char):
    """The Glyph of a character, or None if the font lacks it."""
    if not has_char(path, char):
        return None
    font = open_font(path, LETTER_SIZE)
    left, top, right, bottom = font.getbbox(char, anchor="ls")  # "ls": left end of the baseline
    ink = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(ink).text((-left, -top), char, 255, font, anchor="ls")
    return Glyph(np.array(ink), left, top, font.getlength(char))


def set_letters(rng, label, fonts):
    """The label on a straight line -> coverage, char_map: uint8 (2 h, w). The word is (h, w)
    and in their middle. Above and below is room for other lines."""
    stroke = choose(rng, STROKES)
    glyphs = choose_glyphs(rng, label, fonts)
    corners = place_glyphs(rng, glyphs)

    left = min(x for x, y in corners)
    top = min(y for x, y in corners)
    right = max(x + glyph.ink.shape[1] for (x, y), glyph in zip(corners, glyphs))
    bottom = max(y + glyph.ink.shape[0] for (x, y), glyph in zip(corners, glyphs))

    inked_w = right - left
    inked_h = bottom - top

    # A lone "." must not fill its crop: a word counts as half a letter size at least.
    # An empty pixel at each rim lets the letters fade out when the drawing is resized.
    rim = stroke + 1
    w = max(inked_w, LETTER_SIZE // 2) + 2 * rim
    h = max(inked_h, LETTER_SIZE // 2) + 2 * rim
    # From the pen's coordinates to the drawing's, where the letters are in the middle.
    move_right = (w - inked_w) // 2 - left
    move_down = (2 * h - inked_h) // 2 - top

    coverage = np.zeros((2 * h, w), np.uint8)
    char_map = np.zeros((2 * h, w), np.uint8)
    for k, ((x, y), glyph) in enumerate(zip(corners, glyphs), start=1):
        glyph_h, glyph_w = glyph.ink.shape
        rows = slice(y + move_down, y + move_down + glyph_h)
        columns = slice(x + move_right, x + move_right + glyph_w)
        coverage[rows, columns] = np.maximum(coverage[rows, columns], glyph.ink)
        char_map[rows, columns][glyph.ink > MIN_INK] = k

    for _ in range(stroke):
        coverage = add_copies(coverage, ALL_AROUND)
        char_map = add_copies(char_map, ALL_AROUND)
    return coverage, char_map


def choose_glyphs(rng, label, fonts):
    """The label's Glyphs in one font: some fonts are tried by chance, then each in turn, then
    Pillow's own, until one has all of the label's characters."""
    # First a family, then a font of it: else a family of 70 weights would drown the others.
    families = families_of(tuple(fonts))
    for _ in range(FONT_TRIES):
        family = rng.choice(families)
        glyphs = draw_glyphs(rng.choice(family), label)
        if glyphs is not None:
            return glyphs
    for path in [*fonts, None]:
        glyphs = draw_glyphs(path, label)
        if glyphs is not None:
            return glyphs
    raise UserError(f"no font has all of {label}; give one with --fonts FOLDER")


def draw_glyphs(path, label):
    """The label's Glyphs, or None if the font lacks one."""
    glyphs = []
    for char in label:
        glyph = draw_glyph(path, char)
        if glyph is None:
            return None
        glyphs.append(glyph)
    return glyphs


def place_glyphs(rng, glyphs):
    """The upper left corner (x, y) of each Glyph's ink; y is 0 at the baseline."""
    spacing = LETTER_SIZE * max(MIN_SPACING, rng.gauss(*SPACING))
    hop = 0
    if rng.random() < P_HOP:
        hop = LETTER_SIZE * HOP

    corners = []
    pen = 0
    for glyph in glyphs:
        x = round(pen) + glyph.left
        y = glyph.top + round(rng.uniform(-hop, hop))
        corners.append((x, y))
        pen += glyph.advance + spacing
    return corners


def add_neighbours(coverage):
    """The coverage with the word once more above itself and below, moved to the side. These
    letters have no place in the char_map: they belong to no character of the label."""
    h, w = coverage.shape[0] // 2, coverage.shape[1]
    distance = round(NEIGHBOUR_DISTANCE * h)
    shift = round(NEIGHBOUR_SHIFT * w)
    return add_copies(coverage, [(-distance, shift), (distance, -shift)])


def add_copies(drawing, moves):
    """The drawing (h, w) with copies of itself, each moved (down, right) by so many pixels: a
    pixel keeps its largest value. What comes in at the rims is 0."""
    h, w = drawing.shape
    rim = np.abs(moves).max()
    padded = np.zeros((h + 2 * rim, w + 2 * rim), drawing.dtype)
    padded[rim:rim + h, rim:rim + w] = drawing
    result = drawing
    for down, right in moves:
        top = rim - down
        left = rim - right
        result = np.maximum(result, padded[top:top + h, left:left + w])
    return result


# ---- the bend

# A point of the straight word is (u, v): u goes from -1, the left end, to 1, the right
# end, and v from -1, the top, to 1, the foot. The same point of the bent word is (x, y),
# in heights of the straight word. (0, 0) is the middle, and y goes down.
#
# aspect: width / height of the straight word
# shear:  how far a point moves to the right for each height that it lies above the middle
# taper:  letters are 1 + taper u high
# sag:    how far the middle of the word hangs below its ends
# angle:  by which all of it is turned, in radians
Bend = namedtuple("Bend", "aspect shear taper sag angle")

CURVE_PIECES = 8                # straight pieces that stand for a curve
MAX_DRAWING = (192, 96)         # width, height: what is larger is made smaller, then bent


def bend_word(rng, coverage, char_map):
    """set_letters' two pictures -> coverage float32 (32, 128) in [0, 1], char_map uint8
    (32, 128), and the width / height that the crop had before it was squeezed."""
    h, w = coverage.shape[0] // 2, coverage.shape[1]
    bend = draw_bend(rng, w / h)
    crop = crop_around(rng, bend)

    # Bending reads a few pixels for each new one and would skip the rest of a large drawing. So
    # the drawing is made smaller first, which averages its pixels. It may lose its shape: (u, v)
    # are shares of its width and its height.
    drawing_size = (min(w, MAX_DRAWING[0]), min(2 * h, MAX_DRAWING[1]))
    coverage = Image.fromarray(coverage).resize(drawing_size, Image.Resampling.BILINEAR)
    char_map = Image.fromarray(char_map).resize(drawing_size, Image.Resampling.NEAREST)

    mesh = bend_mesh(bend, crop, drawing_size)
    coverage = bend_drawing(coverage, mesh, Image.Resampling.BILINEAR)
    char_map = bend_drawing(char_map, mesh, Image.Resampling.NEAREST)
    char_map = np.where(coverage > MIN_INK, char_map, np.uint8(0))

    left, top, right, bottom = crop
    crop_aspect = (right - left) / (bottom - top)
    return coverage.astype(np.float32) / 255, char_map, crop_aspect


def draw_bend(rng, drawn_aspect):
    """A Bend for a word whose width / height is drawn_aspect before it is stretched."""
    aspect = drawn_aspect * math.exp(rng.gauss(*STRETCH))
    shear = rng.gauss(*SHEAR)
    if rng.random() < P_ITALIC:
        shear += ITALIC_SHEAR
    taper = rng.gauss(*TAPER)
    taper = max(-MAX_TAPER, min(MAX_TAPER, taper))

    sag = 0
    if aspect > MIN_SAG_LENGTH and rng.random() < P_SAG:
        sag = rng.uniform(*SAG) * min(aspect, MAX_SAG_LENGTH)

    angle = rng.gauss(*TURN)
    if rng.random() < P_STEEP_TURN:
        angle = rng.uniform(*STEEP_TURN) * min(1, STEEP_LENGTH / aspect)
    return Bend(aspect, shear, taper, sag, angle)


def bend_point(bend, u, v):
    """The point (u, v) of the word, bent -> (x, y)."""
    # The middle line, v = 0, becomes a parabola: x = aspect/2 u, y = sag (1 - u^2).
    middle_x = bend.aspect / 2 * u
    middle_y = bend.sag * (1 - u**2)
    # The foot lies half a height below it. Letters stand upright on the parabola, so the
    # way from a middle to its foot is (-slope, 1) / 2, at a right angle to (1, slope).
    # The taper makes letters higher, not wider: it is for y alone.
    x = middle_x - slope_at(bend, u) * v / 2
    y = middle_y + (1 + bend.taper * u) * v / 2
    # Sheared to the right: the higher a point, the farther.
    x = x - bend.shear * y
    return turn(x, y, bend.angle)


def unbend_point(bend, x, y):
    """The point (x, y) unbent -> (u, v): bend_point's steps undone, the last one first."""
    x, y = turn(x, y, -bend.angle)
    x = x + bend.shear * y
    # The equations for x and y hold both u and v. First u is guessed as if the slope were 0,
    # then comes v, then u with the slope. Where a short word sags much this is not exact,
    # but near enough for the eye.
    u_guess = 2 / bend.aspect * x
    v = 2 * (y - bend.sag * (1 - u_guess**2)) / (1 + bend.taper * u_guess)
    u = 2 / bend.aspect * (x + slope_at(bend, u_guess) * v / 2)
    return u, v


def slope_at(bend, u):
    """How steep the middle line goes down: dy/dx = (dy/du) / (dx/du) of its parabola."""
    return -2 * bend.sag * u / (bend.aspect / 2)


def turn(x, y, angle):
    """A point turned about (0, 0), clockwise to the eye since y goes down."""
    cos, sin = math.cos(angle), math.sin(angle)
    return cos * x - sin * y, sin * x + cos * y


def n_pieces(bend):
    """Of how many straight pieces the upper rim of the bent word consists, and the lower one. The
    word is drawn in as many strips."""
    if bend.sag == 0:
        return 1
    return CURVE_PIECES


def crop_around(rng, bend):
    """The rims of a crop that holds the bent word and margins -> left, top, right, bottom, in
    heights of the word."""
    pieces = n_pieces(bend)
    outline = []
    for k in range(pieces + 1):
        u = -1 + 2 * k / pieces
        outline.append(bend_point(bend, u, -1))
        outline.append(bend_point(bend, u, 1))
    xs = [x for x, y in outline]
    ys = [y for x, y in outline]

    margins = [max(MIN_MARGIN, rng.gauss(*MARGIN)) for _ in range(4)]
    left = min(xs) - margins[0]
    top = min(ys) - margins[1]
    right = max(xs) + margins[2]
    bottom = max(ys) + margins[3]
    return left, top, right, bottom


def bend_mesh(bend, crop, drawing_size):
    """How Pillow is told to bend a drawing of that size: a list of pairs (box, quad).

    The new picture is cut into strips side by side. A box is the rectangle of a strip. Its quad
    is the quadrilateral of the drawing that comes there, x and y of four corners: upper left,
    lower left, lower right, upper right. Pillow interpolates between corners. (A photograph of
    a tilted sheet needs a homography; for the bends here this is near enough.)
    """
    left, top, right, bottom = crop
    drawing_w, drawing_h = drawing_size
    word_h = drawing_h / 2          # set_letters left the rest as room for other lines
    strips = n_pieces(bend)

    def drawn_at(x, y):
        u, v = unbend_point(bend, x, y)
        drawn_x = drawing_w / 2 * (1 + u)
        drawn_y = drawing_h / 2 + word_h / 2 * v
        return drawn_x, drawn_y

    mesh = []
    for k in range(strips):
        x0 = left + (right - left) * k / strips
        x1 = left + (right - left) * (k + 1) / strips
        upper_left, upper_right = drawn_at(x0, top), drawn_at(x1, top)
        lower_left, lower_right = drawn_at(x0, bottom), drawn_at(x1, bottom)
        box = (W * k // strips, 0, W * (k + 1) // strips, H)
        quad = (*upper_left, *lower_left, *lower_right, *upper_right)
        mesh.append((box, quad))
    return mesh


def bend_drawing(drawing, mesh, resample):
    """A drawing -> array (32, 128). Beyond the drawing's rims all is 0."""
    bent = drawing.transform((W, H), Image.Transform.MESH, mesh, resample)
    return np.asarray(bent)


# ---- the colours

def colour_word(rng, coverage):
    """coverage (32, 128) -> float32 (3, 32, 128), about 0 to 255: letters on a ground, in
    colours that differ, mostly enough to read."""
    ground_light, ink_light = choose_lightness(rng)
    ground = colour_ground(rng, ground_light, ink_light)
    ink = colour_ink(rng, ground_light, ink_light)

    inked = coverage
    relief = choose(rng, RELIEFS)
    if relief != "none":
        moves = ALL_AROUND
        if relief == "shadow":
            moves = [(rng.choice(SHADOW_DOWN), rng.choice(SHADOW_RIGHT))]
        wider = add_copies(coverage, moves)
        lightness = mix(ground_light, ink_light, rng.uniform(*RELIEF_LIGHTNESS))
        colour = draw_colour(rng, lightness)
        ground = mix(ground, colour, wider * rng.uniform(*RELIEF_OPACITY))
        if relief == "hollow":
            inked = wider - coverage    # the outline alone has the letters' colour

    image = mix(ground, ink, inked)
    if rng.random() < P_UNEVEN_LIGHT:
        dim = rng.uniform(*DIM)
        bright = rng.uniform(*BRIGHT)
        image = image * mix(dim, bright, draw_texture(rng))
    return image


def choose_lightness(rng):
    """The lightness of the ground and that of the letters."""
    contrast = rng.uniform(*CONTRAST)
    if rng.random() < P_FAINT:
        contrast = rng.uniform(*FAINT_CONTRAST)
    dark = rng.uniform(0, 1 - contrast)
    light = dark + contrast
    if rng.random() < P_DARK_GROUND:
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
        lightness = mix(ground_light, ink_light, rng.uniform(*SECOND_GROUND_LIGHTNESS))
        other = draw_colour(rng, lightness)
    return mix(colour, other, draw_texture(rng))


def colour_ink(rng, ground_light, ink_light):
    """The letters' colour (3, 1, 1), or two that run into each other, (3, 32, 128)."""
    colour = draw_colour(rng, ink_light)
    if rng.random() < P_SECOND_INK:
        lightness = mix(ink_light, ground_light, rng.uniform(*SECOND_INK_LIGHTNESS))
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


def mix(a, b, share):
    """a where share is 0, b where it is 1, and on the way from a to b elsewhere."""
    return a + (b - a) * share


def draw_texture(rng):
    """float32 (32, 128) in [0, 1]."""
    texture = rng.choice(textures())
    return cut_window(rng, texture)


TEXTURE_H, TEXTURE_W = 64, 192      # pixels, larger than a crop: a window is cut out
SQUARE_SIDE = 256                   # pixels, of the square that a texture is cut from


@functools.cache
def textures():
    """float32 (N_TEXTURES, TEXTURE_H, TEXTURE_W) in [0, 1]. A grid of few or many random cells,
    smooth or with edges, upright or turned, soft or hard, looks like light, clouds, cloth,
    planks. Of four textures one has edges, one is smooth, and two are smooth and turned."""
    numpy_rng = np.random.default_rng(0)
    # The middle of the square: there a turned one has no empty corners.
    left = (SQUARE_SIDE - TEXTURE_W) // 2
    top = (SQUARE_SIDE - TEXTURE_H) // 2
    middle = (left, top, left + TEXTURE_W, top + TEXTURE_H)

    maps = []
    for k in range(N_TEXTURES):
        rows = numpy_rng.choice(TEXTURE_ROWS)
        columns = numpy_rng.choice(TEXTURE_COLUMNS)
        cells = Image.fromarray(numpy_rng.random((rows, columns), np.float32))
        if k % 4 == 0:
            resample = Image.Resampling.NEAREST         # cells with edges
        else:
            resample = Image.Resampling.BICUBIC
        square = cells.resize((SQUARE_SIDE, SQUARE_SIDE), resample)
        if k % 2 == 1:
            square = square.rotate(numpy_rng.uniform(0, 360), resample)

        values = np.asarray(square.crop(middle), np.float64) - 0.5
        values = np.tanh(numpy_rng.choice(TEXTURE_HARDNESS) * values)
        values = values - values.min()
        # Processors differ in a tanh's last digits. Rounded, it is the same on all of them.
        values = (values / values.max()).round(3)
        maps.append(values.astype(np.float32))
    return np.stack(maps)


def cut_window(rng, maps):
    """(..., 32, 128) out of maps (..., h, w) that are larger."""
    h, w = maps.shape[-2:]
    top = rng.randint(0, h - H)
    left = rng.randint(0, w - W)
    return maps[..., top:top + H, left:left + W]


# ---- the wear

def wear_out(rng, image, crop_aspect):
    """What a camera leaves of a picture float32 (3, 32, 128) -> uint8 (3, 32, 128).
    crop_aspect: the crop's width / height before it was squeezed."""
    # The order matters: few pixels average the noise away, JPEG's blocks are as large as
    # eight of the few pixels, and a blur softens the blocks.
    image = add_noise(rng, image)
    has_few_pixels = rng.random() < P_FEW_PIXELS
    has_blocks = rng.random() < P_JPEG
    is_blurred = rng.random() < P_BLUR
    if not (has_few_pixels or has_blocks or is_blurred):
        return image            # half of the crops: no need to go by way of a picture

    picture = Image.fromarray(image.transpose(1, 2, 0).copy())
    if has_few_pixels:
        picture = shrink(picture, rng.randint(*FEW_PIXELS), crop_aspect)
    if has_blocks:
        picture = compress(picture, rng.randint(*JPEG_QUALITY))
    if is_blurred:
        scale = picture.height / H          # BLUR counts pixels of the full crop
        blur = ImageFilter.GaussianBlur(rng.uniform(*BLUR) * scale)
        picture = picture.filter(blur)
    picture = picture.resize((W, H), Image.Resampling.BICUBIC)
    return np.asarray(picture).transpose(2, 0, 1).copy()


def add_noise(rng, image):
    """A picture float32 (3, 32, 128) with noise, or without -> uint8 (3, 32, 128)."""
    deviation = rng.gauss(*NOISE_DEVIATION)
    if deviation > 0:
        image = image + deviation * cut_window(rng, noise_field())
    return image.clip(0, 255).astype(np.uint8)


@functools.cache
def noise_field():
    """float32 (3, 64, 256): noise of mean 0 and deviation 1, from which windows are cut."""
    return np.random.default_rng(0).standard_normal((3, 2 * H, 2 * W), np.float32)


def shrink(picture, height, crop_aspect):
    """The picture `height` pixels high and in its true shape, but no wider than it was."""
    width = round(height * crop_aspect)
    width = max(MIN_FEW_WIDTH, min(W, width))
    return picture.resize((width, height), Image.Resampling.BILINEAR)


def compress(picture, quality):
    """The picture with the blocks that JPEG leaves."""
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return Image.open(file)
