"""The words and all that is done before a model sees one: charsets, drawing, reading, two looks at a word, batches.

    python data.py show SRC --guidance --coarse 16x64     writes sheet.png: crops and the views that are made of them
    python data.py check TRAIN --against TEST TEST        counts everything, finds training crops that a test set holds
    python data.py pack SRC out_lmdb --without list.tsv   writes an LMDB in the field's layout

SRC is one of: `synth`, `synth:N` or `synth:N:SEED` (rendered words); a folder holding `data.mdb`, or a tree of such
folders; a labels file, .txt or .tsv (path<TAB>label), .jsonl ({"filename", "text"}) or MMOCR .json, image paths being
relative to it; a folder of images (unlabelled). In a list SRC@N counts N times. What cannot be read raises Damaged and
is counted, never replaced.
"""
import argparse
import atexit
import ctypes
import gc
import io
import json
import math
import multiprocessing
import os
import pathlib
import random
import re
import shutil
import signal
import sys
import traceback
import unicodedata
import warnings
from collections import Counter, namedtuple
from contextlib import contextmanager, suppress
from functools import cache, lru_cache, partial, partialmethod, reduce
from itertools import count

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

H, W = 32, 128                      # every crop, in this order everywhere
SYNTH_N = 1_000_000                 # words in `synth`, drawn on the fly: beside 10,000 crops 99 in a hundred are rendered
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM")      # not EPS and the like, which run other programs
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
Image.MAX_IMAGE_PIXELS = 2 ** 25    # 33 million pixels are no word; more is a decompression bomb
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)

# image uint8 (3, 32, 128); char_map uint8 (32, 128), rendered words only: k > 0 marks the pixels of the k-th character
Crop = namedtuple("Crop", "image label char_map")

class UserError(Exception):
    """What the person who typed the command can mend. One line: what came, what was expected, what to type."""

class Damaged(UserError):
    """An entry that cannot be read: where it is and why."""

def run(main):
    """Call main(); a UserError, or a file that cannot be opened or written, becomes one line on stderr and exit status 2."""
    status = 0
    for stream in sys.stdout, sys.stderr:
        with suppress(AttributeError):                          # a notebook's streams
            stream.reconfigure(errors="backslashreplace")       # letters that a terminal lacks are no error
    try:
        main()
    except KeyboardInterrupt:
        status = 130
    except (UserError, OSError, RuntimeError) as error:
        text = str(error).strip().split("\n")[-1]               # a loader's process sends its whole traceback
        if isinstance(error, RuntimeError):
            if "DataLoader worker" not in text:
                raise
            text = f"{text.rstrip('.')}; if memory ran out, lower --workers; training goes on with --resume"
        traceback.clear_frames(error.__traceback__)             # which hold the loader, and it them: its processes end now
        text = f"{error.filename}: {error.strerror}" if getattr(error, "filename", None) else text
        print(f"{os.path.basename(sys.argv[0])}: {text}", file=sys.stderr)
        status = 2
    if torch.distributed.is_available() and torch.distributed.is_initialized() and (
            status in (0, 130) or torch.distributed.get_backend() != "nccl"):      # NCCL would wait for ranks that go on
        # Gloo's threads must end before Python does, or one of them may abort it; the training script's handlers hold them
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        gc.collect()
        torch.distributed.destroy_process_group()
    sys.exit(status)

class Parser(argparse.ArgumentParser):
    """Defaults in every help line; what is wrong in one line and exit status 2."""

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False, **options)

    def error(self, message):
        message = re.sub("^argument (.*?): (.*: expected)", r"\1 \2", message)
        self.exit(2, f"{self.prog}: {message}\n")

def within(interval, kind=float):
    """A flag's type: a number in an interval, such as "(0, 1]"."""
    low, high = map(float, interval[1:-1].split(","))

    def number(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low < value < high or value == low and interval[0] == "[" or value == high and interval[-1] == "]"):
            raise argparse.ArgumentTypeError(f"{text}: expected a number in {interval}{', whole' * (kind is int)}")
        return value
    return number

def device(name):
    """--device: auto takes a CUDA GPU if there is one, that of this rank -> torch.device. UserError if it cannot
    be used. On a CPU this also tells the C library to keep the memory it has, for the whole process."""
    kind = name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if kind == "cuda" else kind)
        torch.empty(1, device=found).cpu()                 # which a device without memory, meta, cannot
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from None
    if found.type == "cuda":
        torch.cuda.set_device(found)
        torch.backends.cuda.enable_cudnn_sdp(False)        # it plans anew for each new shape, and words end at all lengths
    if found.type == "cpu":         # glibc gives each large block back, and Linux clears it anew: half of a step's time
        with suppress(OSError, AttributeError, TypeError):              # other systems
            for option in (-4, 0), (-1, -1):                            # M_MMAP_MAX, M_TRIM_THRESHOLD
                ctypes.CDLL(None).mallopt(*option)
    return found

def size(text):
    """"16x64" -> (16, 64), height first."""
    if not re.fullmatch("[1-9][0-9]*x[1-9][0-9]*", text):
        raise UserError(f"{text}: expected height x width in pixels, such as 16x64")
    return tuple(map(int, text.split("x")))

class Source(Dataset):
    """len(s); s[i] -> (uint8 (3, 32, 128), label or None). Subclasses set n and name, and have label(i), where(i), and
    bytes(i), the stored file, or get(i)."""

    def __len__(self): return self.n

    def __getitem__(self, i):
        if not 0 <= i < self.n:
            raise IndexError(f"{self.name} holds {self.n} crops, not crop {i}")
        return self.get(i)[:2]

    def get(self, i):
        try:
            return Crop(decode(self.bytes(i), self.rotate_tall), self.label(i), None)
        except Damaged as error:
            raise Damaged(f"{self.where(i)}: {error}") from None

    def bytes(self, i):
        file = io.BytesIO()
        Image.fromarray(self.get(i).image.permute(1, 2, 0).numpy()).save(file, "PNG")
        return file.getvalue()

# ---- charset

CHARSETS = {"36": "0123456789abcdefghijklmnopqrstuvwxyz"}
CHARSETS["62"] = CHARSETS["36"] + "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
CHARSETS["94"] = CHARSETS["62"] + "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"

def charset(name):
    """'36', '62', '94' or a UTF-8 file of characters (line ends passed over, NFC) -> the characters as one string."""
    try:
        lines = [CHARSETS[name]] if name in CHARSETS else pathlib.Path(name).read_text("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--charset {name}: expected 36, 62, 94 or a UTF-8 file of characters ({error})") from None
    chars = "".join(unicodedata.normalize("NFC", line) for line in lines)      # no accent joins the line above
    wrong = [f"{c!r} stands in it twice" for c, n in Counter(chars).items() if n > 1]
    wrong += [f"{c!r} is a control character" for c in chars if unicodedata.category(c) == "Cc"]
    if wrong or not chars.strip():
        raise UserError(f"--charset {name}: {wrong[0] if wrong else 'holds no character'}")
    return chars

def fit_label(label, chars, max_length):
    """-> (the label as it is trained on: NFC, lower case where the charset is 36; why it cannot be, or "")."""
    text = unicodedata.normalize("NFC", label or "")
    text = text.lower() if chars == CHARSETS["36"] else text
    if any(c not in chars for c in text):
        return text, "outside the charset"
    return text, "too long" if len(text) > max_length else "" if text else "empty"

def fit_labels(source, chars, max_length):
    """-> (the crops whose label can be trained on, a line that says how many cannot, why, and which characters are to
    blame). Entries whose label is damaged stay in, for the loader to name and count."""
    fits, why, odd = np.ones(len(source), bool), Counter(), Counter()
    for start, part in zip(source.starts, source.parts):
        if isinstance(part, Synth) and not fit_label(part.charset, chars, len(part.charset))[1] and max_length >= MAX_LENGTH:
            continue                        # a million drawn words need not be asked one by one
        for i in range(len(part)):
            with suppress(Damaged):             # the loader names and counts it
                text, reason = fit_label(part.label(i), chars, max_length)
                if reason:
                    fits[start + i] = False
                    why[reason] += 1
                    odd.update(c for c in dict.fromkeys(text) if c not in chars)
    report = [f"{source.name}: {fits.sum():,} of {len(source):,} labels fit", *(f"{n:,} {x}" for x, n in why.items())]
    blame = f" ({', '.join(f'{c!r} {n:,}' for c, n in odd.most_common(8))})" if odd else ""
    return Parts([source], source.name, fits.nonzero()[0]), ", ".join(report) + blame

# ---- drawing words

PRINTABLE, MAX_LENGTH = "".join(map(chr, range(33, 127))), 25
LENGTHS = [n for n, share in enumerate((0, 1, 4, 16, 20, 15, 13, 11, 7, 5, 3, 2, 1, 1, 1)) for _ in range(share)]
NUMBERS = """# ## ### #### ##### 19## 20## $# $## $#.## $##.## ##% #% #.## ##.# #,### #:## ##:## ##am #pm #/# ##/## #x##
    ###-#### ###-###-#### (###) No.# #th +## ##-## ##+ ##m ##km A# B## #C ##A""".split()
EXTRAS = r"""*! *. *, *? *: *; *'s '* "*" "* *" (*) [*] *& @* #* -* *- *... www.* *.com *!!""".split()
SIGNS = "open sale exit stop street road park hotel bank cafe shop free city market school police taxi office".split()
FONT_FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.fonts", "~/.local/share/fonts", "/Library/Fonts",
                "/System/Library/Fonts", "~/Library/Fonts", "$WINDIR/Fonts", "$LOCALAPPDATA/Microsoft/Windows/Fonts")
NO_LETTERS = "(?i)symbol|emoji|ding|math|icon|braille|barcode|music|lastresort|blank|notdef|ornament"

@cache
def vocabulary():
    """{length: lower-case words, the common ones first}, about 8,000: words of signs, of the docstrings and comments of
    this Python (another version may have others), and of the names of pictographs, such as "hamburger"."""
    prose = [unicodedata.name(chr(code), "").lower() for code in range(0x1F300, 0x1FB00)]
    for path in sorted(pathlib.Path(os.__file__).parent.glob("*.py")):
        prose += map("".join, re.findall(r'"""(.*?)"""|# ([^\n]*)', path.read_text("utf-8", "ignore"), re.S))
    found = re.findall(r"(?<=[ \n(])[A-Za-z]?[a-z]+(?=[ ,.;:)\n])", f" {' '.join(prose)} ")
    count = Counter(SIGNS * 200 + [word.lower() for word in found])
    common = sorted(filter(re.compile("[aeiouy]").search, count), key=lambda word: (-count[word], word))
    return {length: [word for word in common if len(word) == length] for length in set(LENGTHS)}

def font_files(folder=None):
    """None (Pillow's own font), then the TrueType and OpenType files of the system, then those under folder."""
    files = [None]
    for place in (*FONT_FOLDERS, folder) if folder else FONT_FOLDERS:
        found = sorted(pathlib.Path(os.path.expanduser(os.path.expandvars(place))).rglob("*.[oOtT][tT][cCfF]"))
        files += [str(path) for path in found if place == folder or not re.search(NO_LETTERS, path.name)]
    if folder and not found:
        raise UserError(f"--fonts {folder}: no .ttf, .otf or .ttc file in it; give a folder that holds some")
    return files

@lru_cache(4096)
def face(path, size):
    """(the font, its picture of a character that no font has), or None for a file that FreeType cannot use."""
    try:
        font = ImageFont.truetype(path, size) if path else ImageFont.load_default(size)
        return font, bytes(font.getmask("\U0010fffe"))
    except (OSError, ValueError):
        return None

@lru_cache(1 << 15)
def glyph(path, size, stroke, char):
    """(coverage, its pixels as mode "1", left, top from the baseline, advance), or None where the font lacks char."""
    font, missing = face(path, size) or (None, None)
    left, top, right, bottom = font.getbbox(char, anchor="ls", stroke_width=stroke) if font else (0, 0, 0, 0)
    if right <= left or bottom <= top or bytes(font.getmask(char)) == missing:
        return None
    ink = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(ink).text((-left, -top), char, 255, font, "ls", stroke_width=stroke)
    return ink, ink.convert("1", dither=Image.Dither.NONE), left, top, font.getlength(char)

@cache
def textures():
    """(192, 64, 192) in [0, 1] and (3, 64, 256) unit noise, float32; a crop cuts its own windows out of it. Noise of
    few or many cells, smooth or square, upright or turned, soft or hard, is light, clouds, cloth, planks, frames."""
    g, maps = np.random.Generator(np.random.PCG64(0)), []
    for i in range(192):
        cells = Image.fromarray(g.random((g.choice([2, 3, 6, 16, 96]), g.choice([2, 4, 8, 24, 96])), np.float32))
        way = Image.Resampling.BICUBIC if i % 4 else Image.Resampling.NEAREST
        m = cells.resize((256, 256), way).rotate(g.uniform(0, 360) * (i % 2), way).crop((32, 96, 224, 160))
        m = np.tanh((np.asarray(m) - .5) * g.choice([1, 1, 3, 20]))
        maps.append((m - m.min()) / np.ptp(m))
    return np.stack(maps).astype(np.float32), g.standard_normal((3, 64, 256), np.float32)

def bend(rng, w, h, a):
    """Leans, tapers, sags, turns and crops a word, a times as wide as high, that fills the middle half of an image (h, w).
    Returns the inverse, quads for Image.transform, and the crop's width / height. The unit is the word's height."""
    a *= np.exp(rng.gauss(0, .15))
    lean, taper = rng.gauss(rng.choice((0, 0, 0, 0, 0, .25)), .05), max(-.35, min(.35, rng.gauss(0, .1)))
    turn = np.exp(1j * (rng.gauss(0, .03) if rng.random() < .8 else rng.uniform(-.26, .26) * min(1, 3 / a)))
    sag = rng.uniform(-.2, .2) * min(a, 5) if a > 2 and rng.random() < .18 else 0
    u, v, n = np.arange(-4, 5) / 4, np.array([[-.5], [.5]]), 8 if sag else 1  # u along the word, v up and down, n quads
    y = sag * (1 - u * u) + (1 + taper * u) * v  # the letters stand upright on a parabola
    z = turn * (a / 2 * u + 4 * sag / a * u * v - lean * y + 1j * y)  # where its rims go, x + iy: a product turns them
    left, right, top, bottom = (max(-.05, rng.gauss(.06, .08)) for _ in range(4))
    left, top, right, bottom = z.real.min() - left, z.imag.min() - top, z.real.max() + right, z.imag.max() + bottom
    z = (left + (right - left) / n * np.arange(n + 1) + 1j * np.array([[top], [bottom]])) / turn
    u = 2 / a * (z.real + lean * z.imag)  # the lines above undone: which place of the word the crop's rims show
    v = (z.imag - sag * (1 - u * u)) / (1 + taper * u)
    x, y = ((.5 + u / 2 - 4 * sag / a ** 2 * u * v) * w).T.tolist(), ((.5 + v / 2) * h).T.tolist()
    quads = [(x[k][0], y[k][0], x[k][1], y[k][1], x[k + 1][1], y[k + 1][1], x[k + 1][0], y[k + 1][0]) for k in range(n)]
    return [((W * k // n, 0, W * (k + 1) // n, H), quads[k]) for k in range(n)], (right - left) / (bottom - top)

def paint(rng, cover):
    """(3, 32, 128) float32, 0 to 255: a word of coverage (32, 128) in colours that differ, mostly enough to read."""
    def colour(light):
        spread = rng.choice((.03, .06, .12, .25, .5))  # mostly grey; green and pink are rare among signs
        red, green, blue = rng.gauss(0, spread), rng.gauss(0, .3 * spread), rng.gauss(0, spread)
        light -= .3 * red + .59 * green + .11 * blue
        return np.array([[[255 * min(1, max(0, light + part))]] for part in (red, green, blue)], np.float32)
    def texture():
        y, x = rng.randrange(32), rng.randrange(64)
        return textures()[0][rng.randrange(192), y:y + H, x:x + W]
    mix = lambda under, over, share: under + (over - under) * share

    gap = rng.uniform(.3, .9) if rng.random() < .85 else rng.uniform(.15, .3)
    back, text = rng.sample((dark := rng.uniform(0, 1 - gap), dark + gap), 2)
    image, ink, kind = colour(back), colour(text), rng.random()
    if rng.random() < .7:
        other = image * rng.uniform(.75, 1.2) if rng.random() < .6 else colour(mix(back, text, rng.uniform(-.6, .4)))
        image = mix(image, other, texture())
    if rng.random() < .3:
        ink = mix(ink, colour(mix(text, back, rng.uniform(-.4, .3))), texture())
    if kind < .25:  # hollow letters, an outline; a shadow, the side of a raised letter
        steps = [(0, 1), (0, -1), (1, 0), (-1, 0)] if kind < .1 else [(rng.choice((-1, 1, 2)), rng.choice((-2, 1, 2)))]
        under = reduce(np.maximum, [np.roll(cover, step, (0, 1)) for step in steps], cover)
        image = mix(image, colour(mix(back, text, rng.uniform(-1, .3))), under * rng.uniform(.5, 1))
        cover = under - cover if kind < .02 else cover
    light = mix(rng.uniform(.4, 1), rng.uniform(.9, 1.4), texture()) if rng.random() < .3 else 1
    return mix(image, ink, cover) * light

def worn(rng, image, a):
    """(3, 32, 128) uint8: what a camera leaves of a crop a times as wide as high: noise, few pixels, JPEG, blur."""
    y, x, noise = rng.randrange(32), rng.randrange(128), max(0, rng.gauss(0, 7))
    image = (image + noise * textures()[1][:, y:y + H, x:x + W]).clip(0, 255).astype(np.uint8)
    few, jpeg, blur = (rng.random() < share for share in (.35, .15, .12))
    if few or jpeg or blur:
        h = rng.randint(10, 24) if few else H
        w = max(12, min(W, round(h * a))) if few else W
        picture = Image.fromarray(image.transpose(1, 2, 0).copy()).resize((w, h), Image.Resampling.BILINEAR)
        if jpeg:
            picture.save(file := io.BytesIO(), "JPEG", quality=rng.randint(15, 60))
            picture = Image.open(file)
        if blur:
            picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(.4, 1.4) * h / H))
        image = np.asarray(picture.resize((W, H), Image.Resampling.BICUBIC)).transpose(2, 0, 1).copy()
    return image

class Synth(Source):
    """n rendered words; crop i is a pure function of (seed, i), whatever the process, the worker or the order.
    fonts: a folder of more fonts. charset: the characters to use; its words are English if that is ASCII and has all of a to z,
    else random letters (of its characters, if it has no letter).
    Pictures depend on the installed fonts, words on the Python version: another machine draws another set."""
    name = "synth"

    def __init__(self, n=SYNTH_N, seed=0, fonts=None, charset=None):
        self.n, self.seed, self.fonts = n, seed, font_files(fonts)
        self.charset = "".join((charset or PRINTABLE).split())
        english = self.charset.isascii() and set(PRINTABLE[64:90]) <= set(self.charset.lower())
        self.foreign = [] if english else [c for c in self.charset if c.isalpha() or not c.isascii()] or list(self.charset)
        if charset:
            lack = {font: [char for char in self.charset if not glyph(font, 40, 0, char)] for font in self.fonts}
            self.fonts = [font for font in lack if not lack[font]]
            if not self.fonts:
                least = "".join(min(lack.values(), key=len)[:40])
                raise UserError(f"charset: no font has all of it, the best lacks {least}; give one with --fonts FOLDER")

    def where(self, i): return f"synth:{self.n}:{self.seed} word {i}"
    def label(self, i): return self.word(i)[0]

    def word(self, i):
        """(label, the generator that draws its picture). Of 20 words 14 are English and 2 are numbers; so that no model
        can do with language alone, 3 are random letters and 1 random characters."""
        rng = random.Random(f"{self.seed} {i}")
        kind, case, length = rng.random(), rng.random(), rng.choice(LENGTHS)
        if kind < .85:
            words = [] if self.foreign or kind > .7 else vocabulary()[length]
            word = "".join(rng.choices(self.foreign or PRINTABLE[64:90], k=length))
            word = words[int(len(words) * rng.random() ** 2)] if words else word
            word = word.upper() if case < .4 else word.capitalize() if case < .68 else word
            word = rng.choice(EXTRAS).replace("*", word) if rng.random() < .12 else word
        elif kind < .95:
            word = re.sub("#", lambda _: str(rng.randrange(10)), rng.choice(NUMBERS))
        else:
            word = rng.choices(self.charset, k=length)
        label = ""
        for char in word:
            char = char if char in self.charset else char.swapcase()
            if char in self.charset and unicodedata.is_normalized("NFC", label + char):     # or the label would be shorter
                label += char
        return label[:MAX_LENGTH] or rng.choice(self.charset), rng

    def get(self, i):
        label, rng = self.word(i)
        size, stroke = 64 if len(label) < 5 else 40, rng.choice((0, 0, 0, 1, 1, 2))
        fonts = rng.choices(self.fonts, k=8) + self.fonts  # those without the letters are passed over
        glyphs = next(filter(all, ([glyph(font, size, stroke, char) for char in label] for font in fonts)))
        gap, hop = size * max(-.04, rng.gauss(.02, .06)), size * .12 * (rng.random() < .06)
        x, spots = 0, []
        for ink, solid, left, top, advance in glyphs:
            spots.append((round(x) + left, top + round(rng.uniform(-hop, hop)), ink, solid))
            x += advance + gap
        left, top = min(x for x, *_ in spots), min(y for _, y, *_ in spots)
        right, bottom = max(x + ink.width for x, _, ink, _ in spots), max(y + ink.height for _, y, ink, _ in spots)
        w, h = max(right - left, size // 2) + 2, max(bottom - top, size // 2) + 2  # a lone "." does not fill its crop
        cover, char_map = Image.new("L", (w, 2 * h)), Image.new("L", (w, 2 * h))  # of which character a pixel is
        for k, (x, y, ink, solid) in enumerate(spots, 1):
            at = x + (w - right - left) // 2, y + (2 * h - bottom - top) // 2
            cover.paste(255, at, ink)
            char_map.paste(k, at, solid)
        if rng.random() < .12:  # the lines above and below can be seen
            line = cover.crop((0, h // 2, w, h // 2 + h))
            cover.paste(line, (w // 3, h // 2 - round(1.1 * h)))
            cover.paste(line, (-w // 3, h // 2 + round(1.1 * h)))
        small = min(w, 160), min(2 * h, 80)  # the warp reads single pixels: what is larger is averaged first
        cover, char_map = cover.resize(small, Image.Resampling.BILINEAR), char_map.resize(small, Image.Resampling.NEAREST)
        quads, a = bend(rng, *small, w / h)
        cover = np.asarray(cover.transform((W, H), Image.Transform.MESH, quads, Image.Resampling.BILINEAR))
        char_map = np.asarray(char_map.transform((W, H), Image.Transform.MESH, quads, Image.Resampling.NEAREST))
        image = worn(rng, paint(rng, cover * np.float32(1 / 255)), a)
        return Crop(torch.from_numpy(image), label, torch.from_numpy(char_map * (cover > 96)))

# ---- reading

def decode(data, rotate_tall=False):
    """Encoded bytes -> uint8 (3, 32, 128), resized bicubically with no regard for shape, as the field does.

    Transparency is laid over white, 16 bits are scaled to 8, EXIF rotation is applied. rotate_tall turns crops more
    than 1.5 times as high as wide 90 degrees counter-clockwise. Raises Damaged for whatever is not a whole image."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.format == "JPEG" and "exif" not in image.info:     # let the decoder halve what is far too large
                image.draft(None, (2 * W, 2 * H))
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            if image.mode[0] in "IF":                                   # 16 or 32 bits of grey
                grey = np.asarray(image, np.float32)
                deep = image.mode.startswith("I;16") or grey.max() > 255
                scale = 1 / 257 if deep else 255 if image.mode == "F" and grey.max() <= 1 else 1
                image = Image.fromarray((grey * scale).clip(0, 255).astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            if rotate_tall and image.height > 1.5 * image.width:
                image = image.transpose(Image.Transpose.ROTATE_90)
            pixels = np.asarray(image.convert("RGB").resize((W, H), Image.Resampling.BICUBIC, reducing_gap=3))
            return torch.from_numpy(pixels.transpose(2, 0, 1).copy())
    except UnidentifiedImageError:
        raise Damaged(f"not an image ({len(data)} bytes)") from None
    except Exception as error:              # Pillow raises a dozen kinds; each means that there is no whole image here
        raise Damaged(f"{type(error).__name__}: {' '.join(str(error).split())[:120]}") from None

@cache
def environment(folder):
    """The read-only LMDB of a folder: lmdb opens it only once in a process."""
    import lmdb
    env = lmdb.open(folder, readonly=True, lock=False, readahead=False, meminit=False)
    need = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
    have = os.path.getsize(os.path.join(folder, "data.mdb"))
    if need > have:                         # reading past the end would kill the process
        raise UserError(f"{folder}: data.mdb has {have:,} of its {need:,} bytes; copy it again")
    return env

if hasattr(os, "register_at_fork"):         # a forked worker opens its own; where there is no fork, each does so anyway
    os.register_at_fork(after_in_child=environment.cache_clear)
READS = count(1)                            # of LMDBs by this process

@contextmanager
def reading(folder):
    """A look into the LMDB of a folder; Damaged if that fails."""
    import lmdb
    if next(READS) % 1000 == 0:             # pages once read stay mapped and count as memory until the file is closed
        environment.cache_clear()
    try:
        with environment(folder).begin() as txn:
            yield txn
    except lmdb.Error as error:
        raise Damaged(f"{folder}: expected an LMDB, copied whole ({error})") from None

class Lmdb(Source):
    """The field's layout: image-%09d (JPEG, PNG), label-%09d (UTF-8), counted from 1, and num-samples."""

    def __init__(self, folder, name, rotate_tall=False, labels=True):
        self.folder, self.name, self.rotate_tall = os.path.realpath(folder), name, rotate_tall
        with reading(self.folder) as txn, txn.cursor() as cursor:
            starts = lambda kind: cursor.set_range(kind) and cursor.key().startswith(kind)
            self.labelled, last = labels and starts(b"label-"), b""
            if starts(b"image-"):                                       # the last is the key before "image-:"
                cursor.prev() if cursor.set_range(b"image-:") else cursor.last()
                last = cursor.key()[6:]
            count, entries = txn.get(b"num-samples", last).strip(), txn.stat()["entries"]
            if not (starts(b"image-") and re.fullmatch(b"0*[1-9][0-9]{,8}", count) and int(count) <= entries):
                first = cursor.key().decode(errors="replace") if cursor.first() else "none"
                raise UserError(f"{folder}: no word crops (num-samples {count[:20]}, {entries:,} entries, first key {first}); "
                                "expected the keys image-000000001, label-000000001 and so on, and num-samples")
            self.n = int(count)
            if last.isdigit() and int(last) > self.n and os.environ.get("RANK", "0") == "0":
                print(f"{folder}: num-samples says {self.n:,}; images after that, up to {int(last):,}, are not looked at")

    def where(self, i): return f"{self.name} image-{i + 1:09d}"
    def bytes(self, i): return self.value(f"image-{i + 1:09d}")

    def value(self, key):
        with reading(self.folder) as txn:
            value = txn.get(key.encode())
        if value is None:
            raise Damaged(f"key {key} is missing")
        return value

    def label(self, i):
        try:
            return self.value(f"label-{i + 1:09d}").decode() if self.labelled else None
        except UnicodeDecodeError:
            raise Damaged("the label is not UTF-8") from None

def read_labels(path):
    """Yield (image path, label) of a .txt, .tsv, .jsonl or MMOCR .json file."""
    number, kind = 0, os.path.splitext(path)[1].lower()
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(json.load(file)["data_list"] if kind == ".json" else file, 1):
                if kind == ".json":
                    (instance,) = line["instances"]
                    name, label = line["img_path"], instance["text"]
                elif not line.strip():
                    continue
                elif kind == ".jsonl":
                    name, label = (row := json.loads(line))["filename"], row["text"]
                else:
                    name, label = line.rstrip("\n").split("\t", 1)
                os.fsencode(name), str.encode("" if label is None else label)      # fails for a number, for half an emoji
                if "\0" in name:
                    raise ValueError("a NUL in a path")
                yield name, label
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        want = {".json": 'MMOCR\'s {"data_list": [{"img_path": ..., "instances": [{"text": ...}]}]}',
                ".jsonl": '{"filename": ..., "text": ...}'}.get(kind, "path<TAB>label")
        raise UserError(f"{path}: entry {number}: expected {want} ({type(error).__name__}: {error})") from None

class Files(Source):
    """Images named by (path, label or None), kept as one block of bytes, which workers share without copying."""

    def __init__(self, entries, root, name, rotate_tall=False):
        self.root, self.name, self.rotate_tall = root, name, rotate_tall
        rows = [(path if label is None else f"{path}\0{label}").encode("utf-8", "surrogatepass") for path, label in entries]
        self.n, self.ends, self.rows = len(rows), np.cumsum([0] + [len(row) for row in rows]), b"".join(rows)

    def row(self, i):
        path, *label = self.rows[self.ends[i]:self.ends[i + 1]].decode("utf-8", "surrogatepass").split("\0", 1)
        return path, label[0] if label else None

    def path(self, i): return os.path.join(self.root, self.row(i)[0])
    def label(self, i): return self.row(i)[1]
    def where(self, i): return f"{self.name} {self.row(i)[0]}"

    def bytes(self, i):
        try:
            return pathlib.Path(self.path(i)).read_bytes()
        except (OSError, ValueError) as error:
            raise Damaged(getattr(error, "strerror", error)) from None

class Parts(Source):
    """Several sources as one, in order; of their crops only those at `indices`, an array, if it is given."""

    def __init__(self, parts, name, indices=None):
        self.parts, self.name, self.indices = parts, name, indices
        self.starts = np.cumsum([0, *map(len, parts)])
        self.n = int(self.starts[-1]) if indices is None else len(indices)

    def ask(self, what, i):
        i = i if self.indices is None else int(self.indices[i])
        k = np.searchsorted(self.starts, i, "right") - 1
        return getattr(self.parts[k], what)(int(i - self.starts[k]))

    get, bytes = partialmethod(ask, "get"), partialmethod(ask, "bytes")                    # get(i) is ask("get", i)
    label, where = partialmethod(ask, "label"), partialmethod(ask, "where")

def open_source(src, fonts=None, rotate_tall=False, chars=None, labels=True):
    """SRC (see the top of this file) -> Source; `fonts` (a folder) and `chars` are for rendered words, labels=False is for
    those who need none: a damaged label is then no damage. Raises UserError for what is missing, empty or foreign."""
    src = str(src)
    name, there = os.path.basename(os.path.abspath(src)), os.path.exists(src)
    kind, *numbers = src.split(":")
    if kind == "synth":
        if not re.fullmatch("synth(:0*[1-9][0-9]{,8}(:[0-9]+)?)?", src):
            raise UserError(f"{src}: expected synth, synth:N or synth:N:SEED, whole numbers, N from 1 to 999999999")
        drawn = CHARSETS["62"] if chars == CHARSETS["36"] else chars       # labels are folded, words of both cases are drawn
        return Synth(*map(int, numbers), fonts=fonts, charset=drawn)
    if os.path.isdir(src):
        files, seen = [], {os.path.realpath(src)}
        for at, folders, names in os.walk(src, followlinks=True):
            files += [os.path.join(at, file) for file in names]
            real = {os.path.realpath(os.path.join(at, folder)): folder for folder in sorted(folders, reverse=True)}
            folders[:] = sorted(real[path] for path in real.keys() - seen)      # links: a folder is read once, by its first name
            seen.update(real)
        files.sort()
        found = [os.path.relpath(os.path.dirname(file), src) for file in files if os.path.basename(file) == "data.mdb"]
        if found:
            names = [os.path.normpath(os.path.join(name, at)) if len(found) > 1 else name for at in found]
            parts = [Lmdb(os.path.normpath(os.path.join(src, at)), part, rotate_tall, labels) for at, part in zip(found, names)]
            return Parts(parts, name) if len(parts) > 1 else parts[0]
        images = [(os.path.relpath(file, src), None) for file in files if file.lower().endswith(SUFFIXES)]
        if not images:
            held = Counter(os.path.splitext(file)[1] or "without suffix" for file in files).most_common(4)
            raise UserError(f"{src}: holds {', '.join(f'{n} {what}' for what, n in held) or 'nothing'}; expected "
                            f"data.mdb, folders with one, or images ({' '.join(SUFFIXES)})")
        return Files(images, src, name, rotate_tall)
    if not there or os.path.splitext(src)[1].lower() not in (".txt", ".tsv", ".jsonl", ".json"):
        raise UserError(f"{src}: {'a file of another kind' if there else 'no such file or folder'}; expected synth, "
                        "synth:N, an LMDB folder, a labels file (.txt .tsv .jsonl .json) or a folder of images")
    source = Files(read_labels(src), os.path.dirname(src), name, rotate_tall)
    if not any(os.path.exists(source.path(i)) for i in range(min(100, len(source)))):
        raise UserError(f"{src}: " + (f"no {source.path(0)}; image paths are relative to the labels file: move it to the folder that "
                                      "they start from" if len(source) else "expected entries in it, found none"))
    return source

def open_sources(srcs, **options):
    """Several SRCs as one Source with .parts. SRC@N stands for N times SRC, to weigh more."""
    parts = []
    for src in map(str, srcs):
        weighted = not os.path.exists(src) and re.fullmatch("(.+)@([1-9][0-9]{,5})", src)
        path, times = weighted.groups() if weighted else (src, 1)
        parts += [open_source(path, **options)] * int(times)
    return Parts(parts, " ".join(map(str, srcs)))

# ---- two looks at a word

LUMA = torch.tensor([.299, .587, .114])
FROM_YIQ = torch.tensor([[1, .956, .619], [1, -.272, -.647], [1, -1.106, 1.703]])
QUARTER = FROM_YIQ @ torch.tensor([[0., 0, 0], [0, 0, -1], [0, 1, 0]]) @ FROM_YIQ.inverse()     # turns hues 90 degrees
SQUARE = torch.tensor([[-1., -1], [1, -1], [1, 1], [-1, 1]])            # a picture's corners, top left and on clockwise

@cache
def fixed(constant, device):
    """A tensor that never changes, copied to a device once: the host waits for such a copy."""
    return constant.to(device)

def put(x, device):
    """A tensor on the device. From the host it goes by pinned memory, so that nothing waits for the copy (but MPS waits: it
    would read too late, pytorch issue 139550)."""
    if not x.is_cpu or torch.device(device).type in ("cpu", "mps"):
        return x.to(device)
    return x.contiguous().pin_memory().to(device, non_blocking=True)

def uniform(generator, n, *shape, rows=None, device="cpu"):
    """Numbers in [0, 1), (n, *shape). rows=(indices, total) draws for `total` crops and keeps those of n, so that a
    rank or a micro-batch gets the very numbers of the one large batch."""
    kept, total = rows or (slice(n), n)
    return put(torch.rand(total, *shape, generator=generator, device=generator.device)[kept], device)

def unit(images):
    """uint8 or float in [0, 1] -> float32 in [0, 1]."""
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()

def normalize(images):
    """uint8 or float in [0, 1] -> float32 in [-1, 1]."""
    return unit(images) * 2 - 1

def coarse_view(images, size):
    """Area averages: (B, 3, H, W) -> (B, 3, *size), float32 in [0, 1]."""
    return F.interpolate(unit(images), size=size, mode="area")

def turned(angle, aspect, corners=SQUARE):
    """The corners (B, 4, 2) through which a picture of that width / height is seen rotated by `angle` (B,) radians
    counter-clockwise, on a canvas grown until all of it fits."""
    c, s = torch.cos(angle)[:, None], torch.sin(angle)[:, None]
    x, y = corners.to(angle.device).unbind(-1)
    x, y = x * (c + s.abs() / aspect), y * (c + s.abs() * aspect)
    return torch.stack([c * x - s * y / aspect, s * aspect * x + c * y], -1)

def warp(images, corners, bend=None):
    """The picture seen through four corners (B, 4, 2), its own being SQUARE: one homography for each crop (Heckbert,
    Fundamentals of Texture Mapping, 1989), and the bend, moves (B, 2, 4, 4) spread over the picture; sampled once."""
    b, _, h, w = images.shape
    p, q, r, s = corners.unbind(1)                                      # each (B, 2)
    cross = lambda left, right: left[:, :1] * right[:, 1:] - left[:, 1:] * right[:, :1]
    total, down, along = p - q + r - s, q - r, s - r
    gx, gy = cross(total, along) / cross(down, along), cross(down, total) / cross(down, along)
    top = torch.stack([q - p + gx * q, s - p + gy * s, p], 2)
    homography = torch.cat([top, torch.stack([gx, gy, torch.ones_like(gx)], 2)], 1)             # of the unit square
    y, x = ((torch.arange(n, device=images.device) + .5) / n for n in (h, w))
    points = torch.stack([x.expand(h, w), y[:, None].expand(h, w), torch.ones(h, w, device=images.device)]).flatten(1)
    read = (homography.reshape(-1, 3) @ points).view(b, 3, h, w)
    grid = read[:, :2].div_(read[:, 2:])
    if bend is not None:
        grid += F.interpolate(bend, size=(h, w), mode="bilinear", align_corners=True)
    return F.grid_sample(images, grid.permute(0, 2, 3, 1), padding_mode="border", align_corners=False)

def focus(images, sigma, sharpen):
    """Gaussian blur of `sigma` pixels (B,), then an unsharp mask of that strength (B,): one 7 x 7 kernel a crop."""
    b, c, h, w = images.shape
    distance = torch.arange(-3, 4, device=images.device) ** 2
    gauss = lambda variance: torch.softmax(-distance / (2 * variance[:, None] + 1e-4), 1)
    square = lambda row: row[:, :, None] * row[:, None]
    sharpen = sharpen[:, None, None]
    kernel = (1 + sharpen) * square(gauss(sigma ** 2)) - sharpen * square(gauss(sigma ** 2 + 1))
    padded = F.pad(images, (3, 3, 3, 3), mode="replicate").view(1, b * c, h + 6, w + 6)
    return F.conv2d(padded, kernel.repeat_interleave(c, 0)[:, None], groups=b * c).view(b, c, h, w)

def recolour(images, bright, contrast, haze, saturation, hue):
    """Brightness, contrast about the crop's mean grey, contrast about mid-grey (`haze`), saturation (factors (B,)) and hue
    (turns): one 3 x 4 colour matrix for each crop."""
    grey, quarter = fixed(LUMA, images.device), fixed(QUARTER, images.device)
    column = lambda numbers: numbers[:, None, None]
    cos, sin = column(torch.cos(2 * math.pi * hue)), column(torch.sin(2 * math.pi * hue))
    onto = grey.expand(3, 3)                                            # a colour's grey, which the next line keeps
    colour = onto + column(saturation) * (cos * (torch.eye(3, device=images.device) - onto) + sin * quarter)
    offset = haze * (1 - contrast) * bright * (images.mean((2, 3)) @ grey) + .5 * (1 - haze)
    colour = column(haze * contrast * bright) * colour
    return torch.baddbmm(column(offset), colour, images.flatten(2)).view_as(images).clamp_(0, 1)

TAPE = torch.rand(2 ** 20, generator=torch.Generator().manual_seed(0)) - .5

def noise(images, seed, sd):
    """Add noise of standard deviation `sd` (B,), in place. A crop's seed (B,) in [0, 1) says where on one long tape of
    numbers its noise begins, so that it is the same whatever batch, rank or device the crop is in."""
    windows = fixed(TAPE, images.device).unfold(0, images[0].numel(), 1)
    value = windows[(seed * len(windows)).long()].view_as(images)
    return images.addcmul_(value, (sd * 12 ** .5)[:, None, None, None]).clamp_(0, 1)

def distort(images, numbers, on):
    """Apply operations to (B, 3, H, W) in [0, 1]: `on` has the strength (B,) of each, where 0 changes nothing and 1 has
    LMIM's ranges (CVPR 2025, medium); `numbers` (B, 66), uniform in [0, 1), say where in its range each one is."""
    (b, _, h, w), column = images.shape, lambda x: x[:, None, None, None]
    inward, bend, rest = numbers.split([8, 32, 26], 1)
    columns = iter(rest.unbind(1))
    between = lambda low=0., high=1.: low + (high - low) * next(columns)        # each call uses up a column

    if "rotate" in on:                      # all of the geometry is four corners and a bend: the crop is sampled once
        crop = lambda: torch.stack([on["horizontal"] * between(0, .02), on["vertical"] * between(0, .10)], 1)[:, None]
        before, after = crop(), crop()
        inward = (on["tilt"] * between(.02, .06))[:, None, None] * inward.view(b, 4, 2) * 4     # shares of half a side
        bend = column(on["bend"] * between(.03, .05)) * (bend.view(b, 2, 4, 4) - .5) * 4 * 3 ** .5
        angle = on["rotate"] * between(-1, 1) * math.radians(15)
        corners = turned(angle, w / h, fixed(SQUARE, images.device) * (1 - inward))
        images = warp(images, corners * (1 - before - after) + before - after, bend)
    if "low" in on:                         # a picture of 10 x 42 pixels, enlarged
        low = F.interpolate(coarse_view(images, (h // 3, w // 3)), size=(h, w), mode="bilinear")
        images = images.lerp(low, column(on["low"]))
    images = focus(images, on["blur"] * between(.5, 1.5), on["sharpen"] * between(.2, 1))
    saturation = (1 - on["fade"] * between()) * (1 + on["jitter"] * between(-.2, .2)) * (1 - on["grey"])
    images = recolour(images, 1 + on["jitter"] * between(-.4, .4), 1 + on["jitter"] * between(-.4, .4),
                      1 - on["contrast"] * between(0, .5), saturation.clamp(min=0), on["jitter"] * between(-.1, .1))
    if "solarize" in on:
        images = torch.where(images > column(1 - on["solarize"] * between(.25, .75)), 1 - images, images)
    if "invert" in on:
        images = images.lerp(1 - images, column(on["invert"]))
    return noise(images, between(), on["noise"] * between(.01, .05)) if "noise" in on else images

LOOK = "contrast", "blur", "sharpen", "fade"
MOVE = "rotate", "vertical", "horizontal", "tilt", "bend"

def guidance_view(images, generator, rows=None, moved=True, strength=1.0):
    """The same word, looking different: (B, 3, H, W) uint8 or float in [0, 1] -> float in [0, 1], new for every crop.

    LMIM's list: at least three of ten operations, then colour jitter with p = .8 and grey with p = .2. moved=False
    leaves every pixel in its place and every edge its sign (no solarizing), or else what a coarse view has to predict
    could not be known: of the ten LOOK's four are left, and noise. `strength` scales every range: 0 changes nothing."""
    numbers = uniform(generator, len(images), 80, rows=rows, device=images.device)
    place = numbers[:, :10].argsort(1).argsort(1)                                   # of each of the ten, shuffled
    many, jitter, grey, grain = numbers[:, 10:14].unbind(1)
    chosen = strength * (place < 3 + (8 * many[:, None]).floor())                   # the first 3 to 10
    on = dict(zip(LOOK + MOVE + ("solarize",) if moved else LOOK, chosen.unbind(1)))
    on.update(jitter=strength * (jitter < .8), grey=1. * (grey < .2 * strength))
    return distort(unit(images), numbers[:, 14:], on if moved else on | {"noise": strength * (grain < .5)})

def augment(images, generator, rows=None):
    """Fine-tuning's augmentation, of PARSeq's kinds: (B, 3, H, W) uint8 or float in [0, 1] -> float in [0, 1], new for
    every crop. Each operation changes its share of the crops; one crop in eight stays as it is."""
    chances = dict.fromkeys(MOVE, .4) | dict.fromkeys(LOOK, .2) | dict(bend=.2, jitter=.6, grey=.1, low=.15, invert=.1, noise=.25)
    numbers = uniform(generator, len(images), 81, rows=rows, device=images.device)
    on = {name: 1. * ((u < p) & (numbers[:, 14] > .125)) for (name, p), u in zip(chances.items(), numbers.unbind(1))}
    return distort(unit(images), numbers[:, 15:], on)

# ---- batches

def read_batch(indices, source, char_maps=False):
    """Crops -> (images uint8 (b, 3, 32, 128), labels, char_maps uint8 (b, 32, 128) or None, damaged, taken). The
    damaged, a line for each, leave a smaller batch; `taken` are the places of the others. A crop without a map gets zeros."""
    crops, damaged = {}, []
    for place, i in enumerate(indices):
        try:
            crops[place] = source.get(i)
        except Damaged as error:
            damaged.append(str(error))
    images, maps = (torch.zeros(len(crops), *shape, dtype=torch.uint8) for shape in ((3, H, W), (H, W)))
    for k, crop in enumerate(crops.values()):
        images[k] = crop.image
        maps[k] = 0 if crop.char_map is None else crop.char_map
    return images, [crop.label for crop in crops.values()], maps if char_maps else None, damaged, list(crops)

def start_worker(_):
    """Signals to the whole group are the training script's to handle: it saves, and its workers end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

def end_workers():
    """They ignore signals: killed, or multiprocessing waits for them for ever."""
    with suppress(AttributeError):                              # Windows has no such signal
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)           # torch's handler would call it an error
    for worker in filter(lambda worker: worker.daemon, multiprocessing.active_children()):
        worker.kill()

atexit.register(end_workers)

def loader(source, batches, workers, char_maps=False):
    """batches: lists of indices -> what read_batch makes of each. The workers are handed indices alone."""
    return iter(DataLoader(range(len(source)), batch_sampler=batches, num_workers=workers, worker_init_fn=start_worker,
                           collate_fn=partial(read_batch, source=source, char_maps=char_maps),
                           pin_memory=torch.cuda.is_initialized(), prefetch_factor=4 if workers else None))

def order(n, batch_size, seed, position=0, rank=0, world=1):
    """Yields for ever the indices of a rank's micro-batches: position p of the stream is crop perm[epoch](p % n) with
    epoch = p // n, and micro-batch m holds positions position + (m * world + rank) * batch_size + [0, batch_size). So
    1 x 16, 2 x 8 and 1 x 4 accumulated four times see the same crops in a step, and a run resumes at any position, on
    any number of processes or workers, with the same order."""
    @lru_cache(1)
    def perm(epoch):
        return torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))

    for first in count(position + rank * batch_size, world * batch_size):
        yield [int(perm(p // n)[p % n]) for p in range(first, first + batch_size)]

def batches(source, batch_size, seed, position=0, rank=0, world=1, workers=0, char_maps=False):
    """An endless stream of micro-batches as `read_batch` returns them, in the order that `order` says."""
    return loader(source, order(len(source), batch_size, seed, position, rank, world), workers, char_maps)

def read_all(source, batch_size, workers=0, rank=0, world=1):
    """Every crop once over all ranks, in order: yields (indices of what could be read, images, labels, damaged). The first
    rank shows how far it is, on a terminal."""
    mine = range(rank, len(source), world)
    batches = [mine[k:k + batch_size] for k in range(0, len(mine), batch_size)]
    with tqdm(total=len(mine), desc=source.name[:40], disable=rank or None) as bar:
        for (images, labels, _, damaged, taken), batch in zip(loader(source, batches, workers), batches):   # its end ends its workers
            yield [batch[j] for j in taken], images, labels, damaged
            bar.update(len(batch))

class DamageCount:
    """Counts what cannot be read and names the first ten. From 100 crops on more than the share `limit` stops; three standard
    deviations are allowed for, or chance would end sound runs early."""

    def __init__(self, limit=.01):
        self.limit, self.seen, self.bad, self.first = limit, 0, 0, []

    def add(self, seen, damaged):
        """Of `seen` crops these, one string each, could not be read."""
        self.seen, self.bad, new = self.seen + seen, self.bad + len(damaged), damaged[:10 - len(self.first)]
        self.first += new
        with suppress(OSError):                                 # as in Run.say
            print("".join(f"damaged, left out: {line}\n" for line in new), end="", flush=True)
        allowed = self.limit * self.seen
        if self.seen >= 100 and self.bad > allowed + 3 * (allowed * (1 - self.limit)) ** .5:
            raise UserError(f"{self.bad} of {self.seen} crops are damaged, more than --max_damaged {self.limit}: "
                            + "; ".join(self.first))

# ---- show, check and pack

RED, BLACK, GREY = (210, 30, 30), (0, 0, 0), (120, 120, 120)

def draw_sheet(rows, path):
    """rows of cells (picture uint8 (3, 32, 128) or None, [(text, colour), ...]): text is below a picture, or alone, in
    the first font that has all of it, else in Pillow's own, with boxes."""
    w, files = 2 * W + 12, font_files()
    tall = [(2 * H + 8 if any(picture is not None for picture, _ in row) else 22) + 18 * any(text for _, text in row) for row in rows]
    sheet = Image.new("RGB", (w * max(map(len, rows), default=1), max(1, sum(tall))), "white")
    cells = ((x * w + 6, sum(tall[:k]), tall[k], *cell) for k, row in enumerate(rows) for x, cell in enumerate(row))
    for x, y, h, picture, pieces in cells:
        pieces = [(text[:200].replace("\n", " "), colour) for text, colour in pieces]
        base, size = (min(46, h - 12), 24) if picture is None else (84, 14)
        line = "".join(text for text, _ in pieces)
        if picture is not None:
            picture = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
            sheet.paste(picture.resize((2 * W, 2 * H), Image.Resampling.NEAREST), (x, y + 4))
        file = next((file for file in files if all(glyph(file, size, 0, c) for c in line if c != " ")), None)
        room = (w - 12) / max(1, face(file, size)[0].getlength(line))
        font = face(file, max(7, int(size * min(1, room))))[0]
        for text, colour in pieces:
            ImageDraw.Draw(sheet).text((x, y + base), text, colour, font, "ls")
            x += font.getlength(text)
    try:
        sheet.save(path)
    except ValueError as error:
        raise UserError(f"{path}: {error}; expected a picture's name, such as sheet.png") from None

def show(args):
    source, generator = open_sources(args.src, fonts=args.fonts), torch.Generator().manual_seed(args.seed)
    chosen = torch.randperm(len(source), generator=generator)[:args.n].tolist()
    images, labels, _, damaged, _ = read_batch(chosen, source)
    if not labels:
        raise UserError(f"{source.name}: none of {len(damaged)} crops could be read, the first: {damaged[0]}")
    views = [unit(images)] + [guidance_view(images, generator, moved=m) for m in (True, False) if args.guidance]
    views += [augment(images, generator) for _ in range(2) if args.augment]
    views += [F.interpolate(coarse_view(images, size(args.coarse)), size=(H, W))] if args.coarse else []
    cells = [(x, [(label or "", BLACK)] * (k == 0)) for label, strip in zip(labels, (255 * torch.stack(views, 1)).byte())
             for k, x in enumerate(strip)]
    across = len(views) * max(1, 4 // len(views))
    draw_sheet([cells[k:k + across] for k in range(0, len(cells), across)], args.out)
    print("".join(f"damaged: {line}\n" for line in damaged), end="")
    print(f"{args.out}: {len(images)} of the {len(source):,} crops of {source.name}")

def fingerprint(images):
    """Crops -> (n, 472) of length 1: differences of neighbours in the grey picture at 8 x 32. A product of two is over
    .9 if one is the other coded anew (all of 500 at JPEG quality 75, 98 % at 30) or resized (97 %), not cropped anew.
    Among 49 million pairs of training and test crops, no two with different labels came so near."""
    small = coarse_view(torch.einsum("bchw,c->bhw", unit(images), LUMA)[:, None], (8, 32))
    edges = torch.cat([small.diff(dim=2).flatten(1), small.diff(dim=3).flatten(1)], 1)
    return F.normalize(edges - edges.mean(1, keepdim=True))

def check(args):
    if args.write_list and not args.against:
        raise UserError("--write_list is of what --against finds; name test sets with it")
    source, tests = open_sources(args.src), open_sources(args.against or [])
    if args.write_list:                             # now, not after an hour of reading
        open(args.write_list, "a").close()
    same, places, marks = {}, [None], [torch.zeros(1, 472)]     # of the test crops; nothing is alike to the first
    for indices, images, _, _ in read_all(tests, 256, args.workers) if args.against else ():
        same.update((hash(tests.bytes(i)), i) for i in indices)         # 64 bits, which no two files share by chance
        places += indices
        marks.append(fingerprint(images))
    marks = torch.cat(marks)
    seen, chars, sizes, lengths, bad, lines = Counter(), Counter(), [], [], [], []
    for indices, images, labels, damaged in read_all(source, 256, args.workers):
        files = [source.bytes(i) for i in indices]
        seen.update(map(hash, files))
        chars.update("".join(label or "" for label in labels))
        sizes += [Image.open(io.BytesIO(data)).size for data in files]
        lengths += [len(label) for label in labels if label is not None]
        bad += damaged
        if not args.against:
            continue
        likeness, nearest = (fingerprint(images) @ marks.T).max(1)
        for i, label, file, alike, k in zip(indices, labels, map(hash, files), likeness.tolist(), nearest.tolist()):
            if file in same or alike > args.alike:
                why, k = ("same bytes", same[file]) if file in same else (f"alike {alike:.3f}", places[k])
                lines.append("\t".join(map(str, (i, source.where(i), label, why, tests.where(k), tests.label(k)))).replace("\n", " "))
    spread = lambda x: "from {:g} to {:g}, median {:g}".format(*np.quantile(x, (0, 1, .5))) if x else "none"
    print(f"{source.name}: {len(source):,} entries = {len(sizes):,} read + {len(bad):,} damaged")
    print(f"width {spread([w for w, _ in sizes])}; height {spread([h for _, h in sizes])}")
    print(f"{len(lengths):,} labels, length {spread(lengths)}; {len(chars)} characters, the commonest "
          + " ".join(f"{c!r} {n:,}" for c, n in chars.most_common(12)))
    odd = [f"{c!r} {n:,}" for c, n in chars.most_common() if c not in CHARSETS["94"]]
    print(f"{len(odd)} characters outside the 94: {' '.join(odd[:50])}")
    print(f"entries that repeat the bytes of another: {seen.total() - len(seen):,}")
    print("".join(f"damaged: {line}\n" for line in bad[:20]), end="")
    if args.against:
        print(f"also in {tests.name}: {len(lines):,}" + ", the first 20:" * (len(lines) > 20), *lines[:20], sep="\n")
    if args.write_list:
        pathlib.Path(args.write_list).write_text("".join(line + "\n" for line in lines), "utf-8", "surrogateescape")

def pack(args):
    import lmdb
    args.out = os.path.normpath(args.out)
    source, part, kept, room, labelled = open_sources(args.src), args.out + ".part", [], 2 ** 24, set()
    if os.path.exists(args.out):
        raise UserError(f"{args.out}: exists already; type the name of a new folder")
    try:
        lines = pathlib.Path(args.without).read_bytes().decode("utf-8", "surrogateescape").split("\n")[:-1] if args.without else []
        skip = dict(line.split("\t")[:2] for line in lines)
        if any(source.where(int(i)) != where for i, where in skip.items()):
            raise ValueError("it names other entries")
    except (OSError, ValueError, IndexError) as error:
        raise UserError(f"--without {args.without}: {error}; expected the list that check wrote of this SRC") from None
    shutil.rmtree(part, ignore_errors=True)         # of a pack that was stopped
    try:
        with lmdb.open(part, map_size=room) as env:
            for indices, _, labels, damaged in read_all(source, 256, args.workers):
                files = [source.bytes(i) for i in indices]
                print("".join(f"left out, damaged: {line}\n" for line in damaged), end="")
                room += 2 * sum(len(data) + 8192 for data in files)     # whole pages, and those that a write sets free
                env.set_mapsize(room)
                with env.begin(write=True) as txn:
                    for i, label, data in zip(indices, labels, files):
                        if str(i) not in skip:
                            labelled.add(label is not None)
                            if len(labelled) > 1:
                                raise UserError(f"{source.where(i)}: {'no' if label is None else 'a'} label, unlike those before it; "
                                                "pack labelled and unlabelled crops apart")
                            kept.append(i)
                            txn.put(b"image-%09d" % len(kept), data)
                            if label is not None:
                                txn.put(b"label-%09d" % len(kept), label.encode())
                    txn.put(b"num-samples", b"%d" % len(kept))
            if not kept:
                raise UserError(f"{source.name}: none of its {len(source):,} crops is left to pack")
    except (lmdb.Error, OSError, UserError) as error:
        shutil.rmtree(part, ignore_errors=True)
        if isinstance(error, UserError):
            raise
        raise UserError(f"{args.out}: cannot be written ({error}); is there room?") from None
    packed = Lmdb(part, args.out)
    wrong = [k for k, i in enumerate(kept) if (packed.bytes(k), packed.label(k)) != (source.bytes(i), source.label(i))]
    if wrong or len(packed) != len(kept):
        raise UserError(f"{part}: {len(wrong)} entries are not what was written; is the disk sound?")
    environment.cache_clear()                       # Windows renames no folder that holds an open file
    os.rename(part, args.out)
    print(f"{args.out}: {len(kept):,} of {len(source):,} entries written and read back, {len(skip):,} left out by list")

def main():
    parser = Parser(description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(required=True)
    for command, does in ((show, "Draw crops and their views."), (check, "Read and count."), (pack, "Write an LMDB.")):
        sub = commands.add_parser(command.__name__, help=does, description=does + " SRC:" + __doc__.split("SRC is")[1])
        sub.set_defaults(command=command)
        sub.add_argument("src", nargs="+", metavar="SRC", help="where the crops are, one or several")
        if command is not show:
            sub.add_argument("--workers", type=within("[0, inf)", int), default=0, help="processes that read; about one a core is best")
    add = commands.choices["show"].add_argument
    add("--out", default="sheet.png", help="the picture to write")
    add("--n", type=within("[1, inf)", int), default=48, help="how many crops; views need room, so ask for fewer with them")
    add("--seed", type=within("[0, 4294967296)", int), default=0, help="another one picks other crops and draws other views")
    add("--fonts", help="a folder of more fonts for rendered words")
    add("--guidance", action="store_true", help="beside each crop mim's kind of guidance view, moved and bent, and nsp's")
    add("--augment", action="store_true", help="beside each crop two of fine-tuning's augmentations of it")
    add("--coarse", metavar="HxW", help="beside each crop its area average of that size, such as 16x64")
    add = commands.choices["check"].add_argument
    add("--against", nargs="+", metavar="TEST", help="test sets: find the crops that they hold too")
    add("--alike", type=within("[0, inf)"), default=.9, help="likeness of near duplicates; lower finds more, and wrong ones")
    add("--write_list", metavar="FILE", help="write what --against finds, for pack --without")
    add = commands.choices["pack"].add_argument
    add("out", metavar="OUT", help="a new folder for data.mdb")
    add("--without", metavar="LIST", help="leave out the entries of this list, written by check --write_list")
    args = parser.parse_args()
    args.command(args)

if __name__ == "__main__":
    run(main)
