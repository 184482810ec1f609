"""Word crops: where they come from, what is done to them, and how they become batches.

    python data.py show SRC --guidance --coarse 16x64     draws crops and the views made of them
    python data.py check TRAIN --against TEST TEST        counts; finds crops that test sets hold
    python data.py pack SRC out_lmdb --without list.tsv   writes an LMDB in the field's layout

The parts of this file, in the order of reading:

    sources     decode, Lmdb, Files, Synth, Parts, Subset, open_source, open_sources
    labels      CHARSETS, read_charset, fit_label, fit_labels
    views       moved_view, still_view, augment, coarse_view: whole batches, on their device
    batches     read_batch, batches, next_batch, read_all, DamageCount
    pictures    draw_sheet
    files       check_output, check_writable, write_file
    commands    show, check, pack

SRC is a source of crops, see SRC_HELP. What cannot be read raises Damaged and is counted. In
training a sound crop of the same batch stands in its place; nowhere else is it replaced.

Some words of pre-training, which model.py explains. A view is a picture of the same word that
looks different. `mim` fills in the hidden patches of a crop, and may look at a guidance view.
`nsp` predicts a crop from its coarse views, which have fewer pixels.
"""
import atexit
import contextlib
import csv
import functools
import io
import itertools
import json
import math
import multiprocessing
import operator
import os
import pathlib
import re
import shutil
import signal
import string
import unicodedata
import warnings
import zlib
from collections import Counter, namedtuple

if __name__ == "__main__":              # Ctrl-C while torch is loading ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import common
from common import H, W, Parser, UserError, is_rendered, number_in, parse_size, run_main
from common import check_unit, say, to_device, to_unit, typed_flags
from render import MAX_LENGTH, MAX_LINE, PRINTABLE, describe_fonts, find_font, font_files
from render import font_files_under, render_word, word_label


# ---- sources: one crop

# image: uint8 (3, 32, 128). label: a string, or None.
# char_map: uint8 (32, 128), where k > 0 marks the pixels of the k-th character.
# Rendered words alone have a char_map; other crops have None.
Crop = namedtuple("Crop", "image label char_map")


class Damaged(UserError):
    """An entry that cannot be read: where it is, and why."""


class Source(Dataset):
    """Numbered crops: source[i] -> (image uint8 (3, 32, 128), label or None).

    A subclass sets `n`, how many crops it has, and `name`. It has four methods:

        get(i)          -> Crop; raises Damaged
        label(i)        -> the label alone, or None; raises Damaged
        file_bytes(i)   -> the crop as an image file; raises Damaged
        where(i)        -> where a person finds it
    """

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        i = operator.index(i)                       # a TypeError for 2.5
        if not 0 <= i < self.n:
            raise IndexError(f"{self.name} holds {self.n} crops, not crop {i}")
        crop = self.get(i)
        return crop.image, crop.label


class StoredFiles(Source):
    """A source whose crops are image files. A subclass also sets `rotate_tall`, see decode."""

    def get(self, i):
        try:
            image = decode(self.file_bytes(i), self.rotate_tall)
            label = self.label(i)
        except Damaged as error:
            raise Damaged(f"{self.where(i)}: {error}") from None
        return Crop(image, label, None)


# Pillow could read EPS and the like too, but runs other programs for them.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
MAX_PIXELS = 2 ** 25                    # 33 million are no word. Pillow allows five times as many.
TALL = 1.5                              # a crop is tall if its height / width is above this
PHOTOMETRIC = 262                       # a TIFF's tag: 0 if 0 is white, 1 if it is black

# Files that are often met in the place of an image, by how they begin. They are not read.
NOT_READ = {
    "AVIF": rb"....ftypavi[fs]",
    "HEIC": rb"....ftyp(hei[cx]|mif1)",
    "JPEG 2000": rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51",
    "a Mac's notes on another file": rb"\0\x05\x16\x07",
    "a Git LFS pointer, and not the file itself": rb"version https://git-lfs",
}


def decode(data, rotate_tall=False):
    """An image file's bytes -> uint8 (3, 32, 128), squeezed bicubically, as the field does,
    though a large JPEG is read at a half or less of its size first.

    What is transparent is laid over white or black, 16 bits are scaled to 8, EXIF rotation is
    applied. rotate_tall turns tall crops 90 degrees counter-clockwise. Raises Damaged for whatever
    is not a whole image.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns of broken EXIF. The pixels are sound.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                return read_pixels(image, rotate_tall)
    except UnidentifiedImageError:
        raise Damaged(f"{kind_of_file(data)} ({len(data)} bytes)") from None
    except Damaged:
        raise
    except Exception as error:
        # Pillow raises a dozen kinds; each means that there is no whole image.
        reason = " ".join(str(error).split())
        raise Damaged(f"{type(error).__name__}: {reason[:120]}") from None


def kind_of_file(data):
    """What a file is that is no image of FORMATS."""
    for kind, beginning in NOT_READ.items():
        if re.match(beginning, data, re.DOTALL):
            return f"{kind}; expected one of {', '.join(FORMATS)}"
    return "not an image"


def read_pixels(image, rotate_tall):
    """An opened image, of which nothing is read yet -> uint8 (3, 32, 128)."""
    if image.width * image.height > MAX_PIXELS:
        raise Damaged(f"{image.width} x {image.height} pixels: no word, but a decompression bomb")
    # A phone's photograph (MPO) holds copies of itself. Elsewhere the others may be other words.
    if image.format != "MPO" and getattr(image, "is_animated", False):
        raise Damaged(f"{image.n_frames} pictures in one file; expected one")
    # A large JPEG can be read at a half, a quarter or an eighth of its size. But EXIF may turn an
    # image later, and then its width and height change places.
    if image.format == "JPEG" and "exif" not in image.info:
        image.draft(None, (2 * W, 2 * H))           # at least as large as this
    image.load()
    ImageOps.exif_transpose(image, in_place=True)

    if image.mode[0] in "IF":                       # I, I;16, F: more than 8 bits of grey
        if image.format == "TIFF" and image.tag_v2.get(PHOTOMETRIC) == 0:
            raise Damaged("a TIFF of more than 8 bits in which 0 is white: Pillow inverts none")
        image = deep_grey_to_8_bits(image)
    if image.has_transparency_data:
        image = lay_on_ground(image)
    if rotate_tall and image.height > TALL * image.width:
        image = image.transpose(Image.Transpose.ROTATE_90)

    image = image.convert("RGB")
    image = image.resize((W, H), Image.Resampling.BICUBIC, reducing_gap=3)
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())


DEEP_RANGES = (255, 1023, 4095, 65535)      # white of 8, 10, 12 and 16 bits


def deep_grey_to_8_bits(image):
    """Grey of more than 8 bits has one of DEEP_RANGES, since some programs store 8, 10 or 12 bits
    in 16; or that of 0 to 1. The lightest pixel says which: nothing could be seen of 65535 greys
    if none were above 255."""
    grey = np.asarray(image, np.float32)
    darkest, lightest = grey.min(), grey.max()      # both are NaN if one pixel is
    if math.isnan(darkest):
        raise Damaged("a pixel that is not a number")
    if not (darkest >= 0 and lightest <= 65535):
        raise Damaged(f"pixels from {darkest:g} to {lightest:g}; expected 0 to 1, 255 or 65535")
    white = min(white for white in DEEP_RANGES if white >= lightest)
    if image.mode == "F" and lightest <= 1:
        white = 1
    scale = 255 / white
    return Image.fromarray((grey * scale).astype(np.uint8))


def lay_on_ground(image):
    """A picture with transparency, over a ground on which it shows: black if what is to be seen of
    it is light, as white letters are, else white."""
    image = image.convert("RGBA")
    small = image.resize((W, H), Image.Resampling.BOX)
    grey = np.asarray(small.convert("L"), np.float32)
    opacity = np.asarray(small.getchannel("A"), np.float32)
    mid_grey = 127.5
    colour = "white"
    if (grey * opacity).sum() > mid_grey * opacity.sum():
        colour = "black"
    ground = Image.new("RGBA", image.size, colour)
    return Image.alpha_composite(ground, image)


# ---- sources: LMDB

# What was read of an LMDB counts as memory until it is closed. So after this many reads all LMDBs
# are opened anew.
MAX_READS = 1000


class OpenLmdbs:
    """The LMDBs that this process has open. lmdb opens each only once in a process."""

    def __init__(self):
        self.forget_all()

    def forget_all(self):
        """None is open now. Those that were are closed by Python once no transaction uses them."""
        self.environments = {}
        self.process_id = os.getpid()
        self.reads = 0

    def get(self, folder):
        """The read-only LMDB of a folder."""
        # A forked worker inherits this object, but LMDB forbids it to read through what its
        # parent opened.
        forked = self.process_id != os.getpid()
        read_enough = self.reads == MAX_READS
        if forked or read_enough:
            self.forget_all()
        self.reads += 1
        if folder not in self.environments:
            self.environments[folder] = open_lmdb(folder)
        return self.environments[folder]


OPEN_LMDBS = OpenLmdbs()


def open_lmdb(folder):
    """UserError if its file was cut short: reading past the end would kill the process."""
    import lmdb
    environment = lmdb.open(folder, readonly=True, lock=False, readahead=False, meminit=False)
    need = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    have = os.path.getsize(os.path.join(folder, "data.mdb"))
    if need > have:
        raise UserError(f"{folder}: data.mdb has {have:,} of its {need:,} bytes; copy it again")
    return environment


@contextlib.contextmanager
def reading(folder):
    """A look into the LMDB of a folder: a transaction. Damaged if lmdb fails."""
    import lmdb
    try:
        with OPEN_LMDBS.get(folder).begin() as transaction:
            yield transaction
    except lmdb.Error as error:
        raise Damaged(f"{folder}: expected an LMDB, copied whole ({error})") from None


class Lmdb(StoredFiles):
    """The field's layout: keys image-%09d (JPEG, PNG), label-%09d (UTF-8) and num-samples.
    Entries are counted from 1. labels=False reads no label: a damaged one is then no damage."""

    def __init__(self, folder, name, rotate_tall=False, labels=True):
        self.folder = os.path.realpath(folder)
        self.name = name
        self.rotate_tall = rotate_tall
        with reading(self.folder) as transaction:
            self.n = count_crops(transaction, folder)
            check_first_key(transaction, "image", folder)
            self.labelled = labels and first_key(transaction, b"label-") is not None
            if self.labelled:
                check_first_key(transaction, "label", folder)

    def value(self, key):
        with reading(self.folder) as transaction:
            value = transaction.get(key.encode())
        if value is None:
            raise Damaged(f"key {key} is missing")
        return value

    def file_bytes(self, i):
        return self.value(f"image-{i + 1:09d}")

    def label(self, i):
        if not self.labelled:
            return None
        try:
            return self.value(f"label-{i + 1:09d}").decode()
        except UnicodeDecodeError:
            raise Damaged("the label is not UTF-8") from None

    def where(self, i):
        return f"{self.name} image-{i + 1:09d}"


def count_crops(transaction, folder):
    """How many crops an LMDB has: its num-samples, or without that the number of its last
    image. UserError if that cannot be true. Not all keys are read: there may be millions."""
    n_keys = transaction.stat()["entries"]
    last = last_image_number(transaction)
    stated = transaction.get(b"num-samples")        # bytes too, such as b"3000"
    if stated is None:
        stated = last
    stated = stated.strip()

    is_number = re.fullmatch(b"0*[1-9][0-9]{,8}", stated) is not None
    has_images = first_key(transaction, b"image-") is not None
    if not is_number or not has_images or int(stated) > n_keys:
        raise UserError(
            f"{folder}: no word crops (num-samples {stated[:20]}, {n_keys:,} entries, "
            f"first key {first_key(transaction, b'')}); expected the keys image-000000001, "
            "label-000000001 and so on, and num-samples")

    count = int(stated)
    if last.isdigit() and int(last) > count:
        say(f"{folder}: num-samples says {count:,}; images after that, up to {int(last):,}, "
            "are not looked at")
    return count


def check_first_key(transaction, kind, folder):
    """UserError if the first key of a kind, "image" or "label", is numbered in another way than
    the field's: with other digits, or from 0. One or all of the crops would be missing. The
    caller knows that there is a key of this kind."""
    key = first_key(transaction, f"{kind}-".encode())
    number = key.removeprefix(f"{kind}-")
    if re.fullmatch("[0-9]{9}", number) and number != "000000000":
        return
    if number == "000000000":
        key += ", counted from 0"
    raise UserError(f"{folder}: its first {kind} is {key}; expected {kind}-000000001 and so on, "
                    "nine digits, counted from 1: write it anew")


def first_key(transaction, prefix):
    """The first key that begins with these bytes, as text, or None."""
    with transaction.cursor() as cursor:
        # This goes to the first key that is not before the prefix.
        if cursor.set_range(prefix) and cursor.key().startswith(prefix):
            return cursor.key().decode(errors="replace")
    return None


def last_image_number(transaction):
    """The number in the last image's key, as bytes: b"000003000". b"" if there is no image."""
    after_images = b"image-:"                       # keys are sorted; a colon comes after 9
    with transaction.cursor() as cursor:
        if cursor.set_range(after_images):          # the first key from there on
            found = cursor.prev()
        else:                                       # there is none: images are the last keys
            found = cursor.last()
        if found and cursor.key().startswith(b"image-"):
            return cursor.key().removeprefix(b"image-")
    return b""


# ---- sources: labels files, and folders of images

class Files(StoredFiles):
    """Images named by entries (path, label or None). Paths start from the folder `root`."""

    def __init__(self, entries, root, name, rotate_tall=False):
        self.root = root
        self.name = name
        self.rotate_tall = rotate_tall
        rows = []
        for path, label in entries:
            row = path
            if label is not None:
                row = f"{path}\0{label}"            # no path holds a NUL
            # A file name that is not UTF-8 holds lone surrogates. They must pass.
            rows.append(row.encode("utf-8", "surrogatepass"))
        self.n = len(rows)
        # One block of bytes, which worker processes share without copying it.
        self.block = b"".join(rows)
        self.ends = np.cumsum([0] + [len(row) for row in rows])

    def row(self, i):
        """-> (path as the file has it, label or None)."""
        row = self.block[self.ends[i]:self.ends[i + 1]].decode("utf-8", "surrogatepass")
        path, nul, label = row.partition("\0")
        if nul == "":
            label = None
        return path, label

    def path(self, i):
        return os.path.join(self.root, self.row(i)[0])

    def file_bytes(self, i):
        path = self.path(i)
        try:
            if not os.path.isfile(path) and os.path.exists(path):
                raise Damaged("a folder or a pipe; expected a file")    # a pipe may never end
            return pathlib.Path(path).read_bytes()
        except OSError as error:
            raise Damaged(error.strerror) from None
        except ValueError as error:                 # a path that no file can have
            raise Damaged(str(error)) from None

    def label(self, i):
        return self.row(i)[1]

    def where(self, i):
        return one_line(f"{self.name} {self.row(i)[0]}")


def one_line(path):
    """A path as it can stand in a column of a table: some hold a tab or a line end."""
    return path.replace("\t", "\\t").replace("\n", "\\n").replace("\r", "\\r")


# What a labels file holds, by its suffix.
LABEL_FILES = {
    ".txt": "path<TAB>label",
    ".tsv": "path<TAB>label",
    ".csv": "path,label",
    ".jsonl": '{"filename": ..., "text": ...}',
    ".json": 'MMOCR\'s {"data_list": [{"img_path": ..., "instances": [{"text": ...}]}]}',
}
# A label that JSON takes for a number, such as 7 or 1.50, stays as it is written.
NUMBERS_AS_TEXT = dict(parse_int=str, parse_float=str)


def read_labels(path):
    """Yields (image path, label). UserError names the first line that is not as it should be, or
    MMOCR's entry."""
    kind = suffix_of(path)
    unit = "entry" if kind == ".json" else "line"
    at = path                                       # where an error is: as yet in no line
    may_be_header = kind in (".txt", ".tsv", ".csv")
    try:
        for number, entry in read_entries(path, kind):
            at = f"{path}: {unit} {number}"
            image_path, label = parse_entry(entry, kind)
            check_names(image_path, label)
            if may_be_header and is_header(image_path, os.path.dirname(path)):
                say(f"{at} is taken for a header: {entry}")
            elif image_path == "":
                raise ValueError("no path")
            else:
                yield image_path, label
            may_be_header = False                   # the first line alone may be one
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: line {first_line_not_utf8(path)}: expected UTF-8 "
                        f"({error.reason}); save it as UTF-8") from None
    except (ValueError, KeyError, TypeError, RecursionError, csv.Error) as error:
        raise UserError(f"{at}: expected {LABEL_FILES[kind]} "
                        f"({type(error).__name__}: {error})") from None


def suffix_of(path):
    return os.path.splitext(path)[1].lower()


def read_entries(path, kind):
    """Yields (number, entry): the lines that are not empty, or the elements of MMOCR's list."""
    with open(path, encoding="utf-8-sig") as file:
        if kind == ".json":
            yield from enumerate(json.load(file, **NUMBERS_AS_TEXT)["data_list"], 1)
            return
        for number, line in enumerate(file, 1):
            # a spreadsheet's empty row holds its commas
            cells = line.replace(",", " ") if kind == ".csv" else line
            if cells.strip():
                yield number, line.rstrip("\n")


def parse_entry(entry, kind):
    """A line, or an element of MMOCR's list -> (image path, label)."""
    if kind == ".json":
        instances = entry["instances"]
        if len(instances) != 1:
            raise ValueError(f"{len(instances)} instances; expected one, an image of one word")
        return entry["img_path"], instances[0]["text"]
    if kind == ".jsonl":
        row = json.loads(entry, **NUMBERS_AS_TEXT)
        return row["filename"], row["text"]
    if kind == ".csv":
        # ICDAR's own files have a blank after the comma, and then quotes
        (fields,) = csv.reader([entry], strict=True, skipinitialspace=True)
    else:
        fields = entry.split("\t")
    if len(fields) != 2:
        advice = ""
        if kind != ".csv" and "," in entry and "\t" not in entry:
            advice = "; name a file with commas .csv"
        raise ValueError(f"number of columns in {entry[:60]!r}: {len(fields)}{advice}")
    image_path, label = fields
    return image_path, label


def check_names(image_path, label):
    """TypeError for what is no string, ValueError for what no file can hold: a NUL in its name,
    or half an emoji in its name or label."""
    if not isinstance(image_path, str):
        raise TypeError(f"the path is {image_path!r}")
    if label is not None and not isinstance(label, str):
        raise TypeError(f"the label is {label!r}")
    # For half an emoji, a lone surrogate, these raise UnicodeEncodeError, which is a ValueError.
    os.fsencode(image_path)
    if label is not None:
        label.encode()
    if "\0" in image_path:
        raise ValueError("a NUL in a path")


def is_header(image_path, folder):
    """True for a first line such as "filename,words": its first field names no file."""
    return suffix_of(image_path) == "" and not os.path.isfile(os.path.join(folder, image_path))


def first_line_not_utf8(path):
    """The number of the first line that is not UTF-8. (The decoder's own error tells a place in a
    block of many lines.)"""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number


def files_under(folder):
    """-> (every file below a folder, sorted; an OSError for each folder that cannot be read).
    Links are followed, but each folder is read once, by the first of its names."""
    files = []
    unreadable = []
    seen = {os.path.realpath(folder)}
    for parent, folders, names in os.walk(folder, onerror=unreadable.append, followlinks=True):
        files += [os.path.join(parent, name) for name in names]
        unseen = []
        for name in sorted(folders):
            real = os.path.realpath(os.path.join(parent, name))
            if real not in seen:
                seen.add(real)
                unseen.append(name)
        folders[:] = unseen                         # os.walk goes on into these alone
    return sorted(files), unreadable


def is_hidden(file, folder):
    """True for .a.png and .ipynb_checkpoints/a.png in a folder, which may itself be hidden."""
    return os.sep + "." in os.sep + file[len(folder):]


# ---- sources: rendered words

# How many words `synth` stands for. They would drown a small set of real crops: there type fewer,
# such as synth:20000.
SYNTH_N = 1_000_000


class Synth(Source):
    """n rendered words. Crop i depends on (seed, i) alone, whatever the process or the order.

    fonts: a folder, whose fonts alone are drawn; None: the system's. charset: the characters to
    draw, in fonts that have them all; None: a keyboard's, in all fonts. Other fonts, as another
    machine has, draw other pictures of the same words. max_length: above MAX_LENGTH it
    asks for lines too, of so many characters at most; below, nothing changes.
    """
    name = "synth"

    def __init__(self, n=SYNTH_N, seed=0, fonts=None, charset=None, max_length=MAX_LENGTH):
        self.n = n
        self.seed = seed
        self.max_length = max(max_length, MAX_LENGTH)
        if charset is None:
            self.charset = PRINTABLE
            self.fonts = font_files(fonts)
        else:
            self.charset = "".join(charset.split())         # no blanks
            self.fonts = font_files(fonts, self.charset)

    def get(self, i):
        image, label, char_map = render_word(
            self.seed, i, self.fonts, self.charset, self.max_length)
        return Crop(torch.from_numpy(image), label, torch.from_numpy(char_map))

    def label(self, i):
        return word_label(self.seed, i, self.charset, self.max_length)

    def file_bytes(self, i):
        """A PNG file: nothing is lost."""
        pixels = self.get(i).image.permute(1, 2, 0).numpy()
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        return file.getvalue()

    def where(self, i):
        return f"synth:{self.n}:{self.seed} word {i}"


# ---- sources: several as one, and some crops of one

class Derived(Source):
    """A source whose crops are those of other sources. A subclass says which:

        locate(i)       -> (the source that has crop i, the crop's number there)
    """

    def get(self, i):
        source, number = self.locate(i)
        return source.get(number)

    def label(self, i):
        source, number = self.locate(i)
        return source.label(number)

    def file_bytes(self, i):
        source, number = self.locate(i)
        return source.file_bytes(number)

    def where(self, i):
        source, number = self.locate(i)
        return source.where(number)


class Parts(Derived):
    """Several sources as one, one after the other."""

    def __init__(self, parts, name):
        self.parts = parts
        self.name = name
        # The number of each part's first crop, and at the end the number of all crops.
        self.starts = np.cumsum([0] + [len(part) for part in parts])
        self.n = int(self.starts[-1])

    def locate(self, i):
        # The last part that starts at or before i.
        k = np.searchsorted(self.starts, i, "right") - 1
        return self.parts[k], int(i - self.starts[k])


class Subset(Derived):
    """Some crops of a source. indices: an array of their numbers there, in their new order."""

    def __init__(self, source, indices):
        self.source = source
        self.indices = indices
        self.name = source.name
        self.n = len(indices)

    def locate(self, i):
        return self.source, int(self.indices[i])


# ---- sources: what was typed

SRC_HELP = """
SRC is one of: `synth`, `synth:N` or `synth:N:SEED` (rendered words); a folder that holds
`data.mdb`, or a tree of such folders; a labels file, .txt or .tsv (path<TAB>label), .csv
(path,label), .jsonl ({"filename", "text"}) or MMOCR's .json, with image paths that are relative to
it; a folder of images (unlabelled). In a list SRC@N counts N times.
"""


def open_source(src, fonts=None, rotate_tall=False, charset=None, labels=True,
                max_length=MAX_LENGTH):
    """SRC, see SRC_HELP -> Source. UserError for what is missing, empty or foreign.

    To add a format of labels, begin with LABEL_FILES and parse_entry; of images, with FORMATS; for
    another kind of container write a StoredFiles and open it here.

    fonts, charset and max_length are for rendered words, see Synth. labels=False is for those who
    need no label: a damaged one is then no damage.
    """
    src = str(src)
    if src.split(":")[0] == "synth":
        return open_synth(src, fonts, charset, max_length)
    if os.path.isdir(src):
        return open_folder(src, rotate_tall, labels)
    if os.path.exists(src) and suffix_of(src) in LABEL_FILES:
        return open_labels_file(src, rotate_tall)

    if not os.path.exists(src):
        what = "no such file or folder"
    elif os.path.basename(src) == "data.mdb":
        what = f"name its folder, {os.path.dirname(os.path.abspath(src))}"
    else:
        what = "a file of another kind"
    raise UserError(f"{src}: {what}; expected synth, synth:N, an LMDB folder, a labels file "
                    f"({' '.join(LABEL_FILES)}) or a folder of images")


def name_of(src):
    """A set is named by its folder or file."""
    return os.path.basename(os.path.abspath(src))


def open_synth(src, fonts, charset, max_length):
    if not re.fullmatch("synth(:0*[1-9][0-9]{,8}(:[0-9]+)?)?", src):
        raise UserError(f"{src}: expected synth, synth:N or synth:N:SEED, whole numbers, "
                        "N from 1 to 999999999")
    if os.path.exists(src):
        say(f"{src}: rendered words, not the file or folder of that name; for that type ./{src}")
    if charset is not None:
        check_can_be_drawn(src, charset)
        if folds_case(charset):
            # The label "Word" becomes "word" in training, so the crop may show either.
            charset = CHARSETS["62"]
    numbers = [int(number) for number in src.split(":")[1:]]
    return Synth(*numbers, fonts=fonts, charset=charset, max_length=max_length)


def check_can_be_drawn(src, charset):
    """UserError for a charset of which rendered words would be wrong. Says if they lack some."""
    is_name = charset in CHARSETS or os.path.isfile(charset)
    if is_name or charset.strip() == "":
        raise UserError(f"{src}: charset {charset!r}: expected the characters themselves, as "
                        "data.read_charset(\"36\") gives them")
    wrong = "".join(char for char in charset if not stands_alone(char))
    if wrong:
        raise UserError(
            f"{src}: rendered words are set letter by letter, from left to right, which is wrong "
            f"for {' '.join(wrong[:10])} of the charset; name real crops instead")
    if any(char.isspace() for char in charset):
        say(f"{src}: rendered words hold no space, which the charset has")


# Scripts that run from left to right but join their letters. A letter's Unicode name begins so.
JOINING_SCRIPTS = ("MONGOLIAN", "PHAGS-PA")


def stands_alone(char):
    """False for what is not simply set to the right of the letter before: a mark, and letters of a
    script that runs from right to left or joins them."""
    if is_mark(char) or unicodedata.bidirectional(char) in ("R", "AL"):
        return False
    return not unicodedata.name(char, "").startswith(JOINING_SCRIPTS)


def open_folder(src, rotate_tall, labels):
    """A folder that holds data.mdb, or a tree of such folders; else a folder of images. Says in
    one line what else is in it."""
    files, unreadable = files_under(src)
    lmdbs = []
    images = []
    others = Counter()                              # what is not looked at: how often
    if unreadable:
        others["folders that cannot be read"] = len(unreadable)
    for file in files:
        name = os.path.basename(file)
        if name.startswith("._"):
            others["._* (a Mac's notes on other files)"] += 1
        elif is_hidden(file, src):
            others["hidden"] += 1
        elif name == "data.mdb":
            lmdbs.append(os.path.normpath(os.path.dirname(file)))
        elif suffix_of(name) in SUFFIXES:
            images.append(file)
        elif name != "lock.mdb":                    # stands beside every data.mdb
            others[suffix_of(name) or "without suffix"] += 1
    if lmdbs and images:
        others["images beside an LMDB"] = len(images)

    if not lmdbs and not images:
        raise UserError(f"{src}: holds {list_counts(others)}; expected data.mdb, folders with "
                        f"one, or images ({' '.join(SUFFIXES)})")
    if others:
        say(f"{src}: not looked at: {list_counts(others)}")
    if not lmdbs:
        entries = [(os.path.relpath(file, src), None) for file in images]
        return Files(entries, src, name_of(src), rotate_tall)
    return open_lmdb_tree(src, lmdbs, rotate_tall, labels)


def list_counts(counts):
    """A Counter in one line: "3 .csv, 1 without suffix", or "nothing"."""
    first = counts.most_common(8)
    listed = [f"{n:,} {what}" for what, n in first]
    rest = counts.total() - sum(n for _, n in first)
    if rest > 0:
        listed.append(f"{rest:,} others")
    return ", ".join(listed) or "nothing"


def open_lmdb_tree(src, folders, rotate_tall, labels):
    """The LMDBs below a folder as one Source."""
    name = name_of(src)
    if len(folders) == 1:
        return Lmdb(folders[0], name, rotate_tall, labels)
    parts = []
    for folder in folders:
        below = os.path.relpath(folder, src)        # "." is src itself
        part_name = os.path.normpath(os.path.join(name, below))
        parts.append(Lmdb(folder, part_name, rotate_tall, labels))
    return Parts(parts, name)


def open_labels_file(src, rotate_tall):
    source = Files(read_labels(src), os.path.dirname(src), name_of(src), rotate_tall)
    if len(source) == 0:
        raise UserError(f"{src}: expected entries in it, found none")
    first_paths = [source.path(i) for i in range(min(100, len(source)))]
    if not any(os.path.isfile(path) for path in first_paths):
        raise UserError(f"{src}: no {first_paths[0]}; image paths are relative to the labels file: "
                        f"{how_to_mend_paths(source)}")
    return source


def how_to_mend_paths(source):
    """What to do with a labels file whose image paths lead nowhere, judged by its first entry."""
    label = source.label(0) or ""
    if os.path.isfile(os.path.join(source.root, label)):
        return "write the path first, then the label"
    if "\\" in source.path(0):
        return "write their \\ as /"
    if "://" in source.path(0):
        return "download the images, and write where they lie now"
    return "move it to the folder that they start from"


def open_sources(srcs, **options):
    """Several SRCs as one Source with .parts. SRC@N stands for N times SRC, to weigh more."""
    parts = []
    for src in srcs:
        path, times = split_times(src)
        if not re.fullmatch("[1-9][0-9]{,5}", times):
            raise UserError(f"{src}: no such file or folder, nor SRC@N with a whole number N from "
                            "1 to 999999")
        parts += [open_source(path, **options)] * int(times)
    return Parts(parts, " ".join(str(src) for src in srcs))


def split_times(src):
    """SRC@N -> SRC, N as it was typed. A bare SRC counts once; its own name may hold an @."""
    path = str(src)
    if "@" in path and not os.path.exists(path):
        path, times = path.rsplit("@", 1)
        return path, times
    return path, "1"


def share_words(src, other):
    """True if two SRCs are one draw of rendered words, one path, or a folder and one in it."""
    one, two = place_of(src), place_of(other)
    if os.path.isfile(one) or os.path.isfile(two):          # no folder is read for its labels files
        return one == two
    # the separator at the end keeps the folder `ab` apart from what is in the folder `a`
    one, two = one + os.sep, two + os.sep
    return one.startswith(two) or two.startswith(one)       # equal, or one inside of the other


def place_of(src):
    """Which draw a SRC is, or which path."""
    src, _ = split_times(src)
    if not is_rendered(src):
        return os.path.realpath(src)
    seed = src.split(":")[2] if src.count(":") == 2 else "0"        # synth:N:SEED
    return f"rendered words of seed {int(seed)}"


def say_fonts(source):
    """Says of Parts in which fonts their rendered words are drawn."""
    for part in source.parts:
        if isinstance(part, Synth):
            say(f"rendered words: {describe_fonts(part.fonts)}")
            return


# ---- charsets and labels

CHARSETS = {
    "36": string.digits + string.ascii_lowercase,
    "62": string.digits + string.ascii_letters,
    "94": string.digits + string.ascii_letters + string.punctuation,
}


def folds_case(charset):
    """True for the charset of 36: labels are read and trained on in lower case."""
    return set(charset) == set(CHARSETS["36"])


def read_charset(name):
    """--charset: 36, 62, 94 or a UTF-8 file -> its characters as one string, NFC, line ends
    left out. UserError if there is none, one twice, or a control character."""
    if name in CHARSETS:
        return CHARSETS[name]
    try:
        lines = pathlib.Path(name).read_text("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--charset {name}: expected 36, 62, 94 or a UTF-8 file of characters "
                        f"({error})") from None
    check_typed_once(name, lines)

    # Line by line, or an accent that begins a line would join the line above.
    chars = "".join(unicodedata.normalize("NFC", line) for line in lines)
    for char in chars:
        if unicodedata.category(char) == "Cc":
            raise UserError(f"--charset {name}: {char!r} is a control character")
    if not chars.strip():
        raise UserError(f"--charset {name}: holds no character")

    # NFC leaves many marks as characters of their own, and one mark may follow two letters.
    repeated = [char for char, times in Counter(chars).items() if times > 1]
    if repeated:
        say(f"--charset {name}: once it is NFC, some characters stand in it more than once; "
            f"{' '.join(repeated)} became one class each")
    return "".join(dict.fromkeys(chars))


def check_typed_once(name, lines):
    """UserError for a letter, with its marks, that stands in a charset's lines twice."""
    letters = Counter()
    for line in lines:
        letters.update(split_letters(line))
    for letter, times in letters.items():
        if times > 1:
            raise UserError(f"--charset {name}: {letter!r} stands in it twice")


def split_letters(line):
    """A line -> its letters, each with the marks that follow it."""
    letters = []
    for char in line:
        if letters and is_mark(char):
            letters[-1] += char
        else:
            letters.append(char)
    return letters


def is_mark(char):
    """True for what is written onto another letter, such as an accent or Hindi's vowel signs."""
    return unicodedata.category(char).startswith("M")


# text: a label as it is trained on. problem: why it cannot be trained on, or "".
Fit = namedtuple("Fit", "text problem")


def fit_label(label, charset, max_length):
    """-> Fit. The text is NFC, and in lower case if the charset is 36."""
    if label is None:
        return Fit("", "without a label")
    text = unicodedata.normalize("NFC", label)
    if folds_case(charset):
        text = text.lower()
    if any(char not in charset for char in text):
        return Fit(text, "outside the charset")
    if len(text) > max_length:
        return Fit(text, "too long")
    if not text:
        return Fit(text, "empty")
    return Fit(text, "")


def fit_labels(source, charset, max_length):
    """Parts -> (Subset of the crops whose label can be trained on, a line for the log).

    The line says how many cannot, why, and which characters are to blame. Entries whose label is
    damaged stay in, for the loader to name and count.
    """
    fits = np.ones(len(source), bool)
    problems = Counter()
    unknown = Counter()
    known_parts = {}                                # the parts of SRC@N are read once
    for start, part in zip(source.starts, source.parts):
        if part not in known_parts:
            known_parts[part] = fit_part(part, charset, max_length)
        part_fits, part_problems, part_unknown = known_parts[part]
        fits[start:start + len(part)] = part_fits
        problems += part_problems
        unknown += part_unknown

    report = [f"{source.name}: {fits.sum():,} of {len(source):,} labels fit"]
    report += [f"{n:,} {problem}" for problem, n in problems.items()]
    line = ", ".join(report)
    if unknown:
        commonest = [f"{char!r} {n:,}" for char, n in unknown.most_common(8)]
        line += f" ({', '.join(commonest)})"
    return Subset(source, fits.nonzero()[0]), line


def fit_part(part, charset, max_length):
    """A part -> three results: a bool array, which labels fit; Counter {problem: labels that have
    it}; Counter {character outside the charset: labels that hold it}."""
    fits = np.ones(len(part), bool)
    problems = Counter()
    unknown = Counter()
    if all_drawn_labels_fit(part, charset, max_length):
        return fits, problems, unknown
    for i, label in readable_labels(part):
        fit = fit_label(label, charset, max_length)
        if fit.problem:
            fits[i] = False
            problems[fit.problem] += 1
            for char in dict.fromkeys(fit.text):    # each once, in the label's order
                if char not in charset:
                    unknown[char] += 1
    return fits, problems, unknown


def readable_labels(source):
    """Yields (number, label) of each crop; label is None if it has none. Those that are damaged
    are counted when the crop is read."""
    for i in range(len(source)):
        try:
            label = source.label(i)
        except Damaged:
            continue
        yield i, label


def all_drawn_labels_fit(part, charset, max_length):
    """True for rendered words if each character that is drawn is known: a million words need not
    be asked one by one. Where NFC may change a label, False: then they are asked."""
    if not isinstance(part, Synth) or max_length < part.max_length:
        return False
    drawn = part.charset
    if folds_case(charset):
        drawn = drawn.lower()
    return unicodedata.is_normalized("NFC", drawn) and set(drawn) <= set(charset)


# ---- views and augmentations
#
# Everything here works on a whole batch, on its device, and never asks the device for a
# number: the host would have to wait. So whether a crop is changed is no branch but a number:
#
#     strengths   {operation: (B,)}, how strongly it acts on each crop; 0 leaves the crop as it is
#     drawn       {name: (B,) or (B, columns)}, random numbers in [0, 1): where in its range it is
#
# Both come from one row of random numbers for each crop. A row means the same view, whatever
# batch its crop is in.
#
# To add an augmentation of your own: give its probability at the end of AUGMENT_CHANCES, and what
# it draws, under one name, at the end of RANGES and of AUGMENTATION. Write it as one of the stages
# below, and call that in augment_from_numbers. There is room for four more probabilities, in
# `more_chances`, and for five more columns: AUGMENTATION has 76 of AUGMENT_NUMBERS' 81. Leave
# AUGMENT_NUMBERS, so that the others keep the numbers that they draw today.

# LMIM's operations (CVPR 2025): those that change a crop's look and those that move its pixels.
# vertical and horizontal cut something off; tilt is a change of perspective.
LOOK = ("haze", "blur", "sharpen", "fade")          # haze is LMIM's loss of contrast
MOVE = ("rotate", "vertical", "horizontal", "tilt", "bend")
OPERATIONS = LOOK + MOVE + ("solarize",)
LEAST_OPERATIONS = 3                    # a view has from three to all ten of them,
P_JITTER = 0.8                          # then colour jitter, with this probability,
P_GREY = 0.2                            # and loss of all colour.
P_NOISE = 0.5                           # A view that stays in place may have noise; not LMIM's.

# What fine-tuning does to its share of the crops. Ours; PARSeq (ECCV 2022) has most of it too.
AUGMENT_CHANCES = {
    "rotate": 0.4, "vertical": 0.4, "horizontal": 0.4, "tilt": 0.4, "bend": 0.2,
    "haze": 0.2, "blur": 0.2, "sharpen": 0.2, "fade": 0.2,
    "jitter": 0.6, "grey": 0.1,
    "low_resolution": 0.15, "invert": 0.1, "noise": 0.25,
}
P_UNCHANGED = 0.125                     # a crop given to `augment` stays as it is

# How much an operation does, at strength 1: a number in [0, 1) says where between these two.
# These are the ranges of LMIM's code, but for sharpen and solarize. Where the name is not the
# operation's, the comment begins with that.
RANGES = {
    "left": (0, 0.02),                  # horizontal: cut off, shares of the width
    "right": (0, 0.02),                 # horizontal
    "top": (0, 0.10),                   # vertical: cut off, shares of the height
    "bottom": (0, 0.10),                # vertical
    "tilt": (0.02, 0.06),               # how far corners move inward, on average, shares of a side
    "bend": (0.03, 0.05),               # standard deviation of the bend, shares of a side
    "angle": (-1, 1),                   # rotate: shares of MAX_ANGLE
    "blur": (0.5, 1.5),                 # standard deviation in pixels
    "sharpen": (0.2, 1),                # strength of the unsharp mask
    "fade": (0, 1),                     # share of the colour that goes
    "saturation": (-0.2, 0.2),          # jitter: what is added to a factor of 1
    "brightness": (-0.4, 0.4),          # jitter
    "contrast": (-0.4, 0.4),            # jitter
    "hue": (-0.1, 0.1),                 # jitter: turns of the colour circle
    "haze": (0, 0.5),                   # share that mid-grey takes
    "solarize": (0.25, 0.75),           # what is lighter than 1 minus this is inverted
    "noise_deviation": (0.01, 0.05),    # noise: where white is 1
}
MAX_ANGLE = math.radians(15)

# What the columns of a crop's numbers are for: a name and how many columns it has, from the
# left. Numbers to the right of these are drawn and not used.
VIEW_NUMBERS = 80
AUGMENT_NUMBERS = 81
CHOICE_COLUMNS = dict(order=10, how_many=1, jitter_chance=1, grey_chance=1, noise_chance=1)
POINT_COLUMNS = dict(corners=8, bend_points=32)
MOVE_COLUMNS = dict(left=1, top=1, right=1, bottom=1, tilt=1, bend=1, angle=1)
LOOK_COLUMNS = dict(
    blur=1, sharpen=1, fade=1, saturation=1, brightness=1, contrast=1, haze=1, hue=1)
NOISE_COLUMNS = dict(noise_start=1, noise_deviation=1)

MOVED_VIEW = CHOICE_COLUMNS | POINT_COLUMNS | MOVE_COLUMNS | LOOK_COLUMNS | dict(solarize=1)
# A view that stays in place has no points to move, and 40 columns are not used. Leave them: were
# they taken out, every seed would give other views.
STILL_VIEW = CHOICE_COLUMNS | dict(not_used=40) | LOOK_COLUMNS | NOISE_COLUMNS
# AUGMENT_CHANCES' first fourteen read their numbers in `chances`, what you add after them in
# `more_chances`.
AUGMENTATION = dict(chances=14, changed=1) | POINT_COLUMNS | MOVE_COLUMNS | LOOK_COLUMNS
AUGMENTATION |= NOISE_COLUMNS | dict(more_chances=4)


def guidance_view(images, generator):
    """The same word, looking different, each crop in its own way: (B, 3, H, W) uint8 or float in
    [0, 1] -> float in [0, 1]. UserError for other numbers."""
    images = to_unit(images)
    check_unit(images, "guidance_view: numbers")
    numbers = uniform_numbers(images, VIEW_NUMBERS, generator)
    return moved_view(images, numbers)


def augment(images, generator):
    """Fine-tuning's augmentation, each crop's its own: (B, 3, H, W) uint8 or float in [0, 1] ->
    float in [0, 1]."""
    images = to_unit(images)
    numbers = uniform_numbers(images, AUGMENT_NUMBERS, generator)
    return augment_from_numbers(images, numbers)


def uniform_numbers(images, columns, generator):
    """(B, columns) in [0, 1) for B images, on their device. They are drawn where the generator is:
    the host's gives the same numbers to every device."""
    numbers = torch.rand(len(images), columns, generator=generator, device=generator.device)
    return to_device(numbers, images.device)


def moved_view(images, numbers, strength=1.0):
    """guidance_view with its numbers, (B, VIEW_NUMBERS) in [0, 1). Rows of a larger draw give the
    same views as in that larger batch. strength scales every range; 0 changes nothing.

    What is done is LMIM's list: at least three of ten operations, colour jitter and loss of colour.
    The order is ours."""
    drawn = name_columns(numbers, MOVED_VIEW)
    strengths = choose_operations(drawn, strength)
    images = move_and_bend(to_unit(images), strengths, drawn)
    images = change_look(images, strengths, drawn)
    return solarize(images, strengths, drawn)


def still_view(images, numbers, strength=1.0):
    """As moved_view, but for nsp's coarse views, which must show where the letters are that nsp
    predicts: every pixel keeps its place, and letters stay darker or lighter than the ground. So
    of the ten operations the four of LOOK are left. Noise is added, which is not LMIM's."""
    drawn = name_columns(numbers, STILL_VIEW)
    strengths = choose_operations(drawn, strength)
    images = change_look(to_unit(images), strengths, drawn)
    return add_noise(images, strengths, drawn)


def augment_from_numbers(images, numbers):
    """augment with its numbers, (B, AUGMENT_NUMBERS) in [0, 1)."""
    drawn = name_columns(numbers, AUGMENTATION)
    strengths = choose_augmentations(drawn)
    images = to_unit(images)
    images = move_and_bend(images, strengths, drawn)
    images = lower_resolution(images, strengths)
    images = change_look(images, strengths, drawn)
    images = invert(images, strengths)
    return add_noise(images, strengths, drawn)


# ---- views: what the numbers mean

def name_columns(numbers, widths):
    """Cuts numbers (B, n) into {name: (B, width)}, from the left; a single column is (B,)."""
    named = {}
    start = 0
    for name, width in widths.items():
        if width == 1:
            named[name] = numbers[:, start]
        else:
            named[name] = numbers[:, start:start + width]
        start += width
    return named


def amount(drawn, name):
    """How much of an operation each crop has drawn, (B,)."""
    low, high = RANGES[name]
    return low + (high - low) * drawn[name]


def choose_operations(drawn, strength):
    """What a view does to each crop -> {operation: (B,)}: `strength`, or 0 where it does not."""
    shuffled = drawn["order"].argsort(1)            # (B, 10): the operations in their turn
    turn = shuffled.argsort(1)                      # (B, 10): when each operation comes
    choices = len(OPERATIONS) - LEAST_OPERATIONS + 1
    how_many = LEAST_OPERATIONS + (choices * drawn["how_many"]).floor()
    chosen = torch.where(turn < how_many[:, None], strength, 0.0)
    strengths = dict(zip(OPERATIONS, chosen.unbind(1)))

    strengths["jitter"] = torch.where(drawn["jitter_chance"] < P_JITTER, strength, 0.0)
    strengths["noise"] = torch.where(drawn["noise_chance"] < P_NOISE, strength, 0.0)
    # A crop has all of its colour or none. So here the strength scales the probability.
    strengths["grey"] = (drawn["grey_chance"] < P_GREY * strength).float()
    return strengths


def choose_augmentations(drawn):
    """What fine-tuning does to each crop -> {operation: (B,)}: 1, or 0 where it does not."""
    changed = drawn["changed"] > P_UNCHANGED
    numbers = torch.cat([drawn["chances"], drawn["more_chances"]], 1)
    if len(AUGMENT_CHANCES) > numbers.shape[1]:
        raise ValueError("AUGMENT_CHANCES: more_chances has room for four more, and no fifth")
    strengths = {}
    for (name, chance), number in zip(AUGMENT_CHANCES.items(), numbers.unbind(1)):
        strengths[name] = ((number < chance) & changed).float()
    return strengths


# ---- views: stages

TO_DEVIATION_1 = 12 ** 0.5      # times this, uniform numbers in [0, 1) have standard deviation 1


def for_images(numbers):
    """(B,) -> (B, 1, 1, 1), to be multiplied with images."""
    return numbers[:, None, None, None]


def for_matrices(numbers):
    """(B,) -> (B, 1, 1), to be multiplied with matrices."""
    return numbers[:, None, None]


def move_and_bend(images, strengths, drawn):
    """All of the geometry becomes four corners and a bend, so that a crop is sampled once. The
    corners say where in the crop the view's corners are read, so what comes last here is what the
    crop undergoes first. Coordinates run from -1 to 1, so a side is 2 long."""
    b, _, height, width = images.shape
    side = 2

    # Each corner moves inward, by its own number. `tilt` is the mean move, in shares of a side.
    tilt = strengths["tilt"] * amount(drawn, "tilt")
    corner_moves = 2 * drawn["corners"].view(b, 4, 2)                           # their mean is 1
    inward = for_matrices(tilt) * corner_moves * side
    corners = copy_once(SQUARE, images.device) * (1 - inward)                   # (B, 4, 2)

    # All of it turns.
    angle = strengths["rotate"] * amount(drawn, "angle") * MAX_ANGLE
    corners = turned(angle, width / height, corners)

    # Rims are cut off: `before` at the left and top, `after` at the right and bottom.
    left = strengths["horizontal"] * amount(drawn, "left")
    right = strengths["horizontal"] * amount(drawn, "right")
    top = strengths["vertical"] * amount(drawn, "top")
    bottom = strengths["vertical"] * amount(drawn, "bottom")
    before = torch.stack([left, top], 1)[:, None]                               # (B, 1, 2)
    after = torch.stack([right, bottom], 1)[:, None]
    # What remains goes from -1 + 2 before to 1 - 2 after. Its middle is before - after.
    half_length = 1 - before - after
    corners = corners * half_length + before - after

    # 4 x 4 points move in x and y. `bend` is the standard deviation of the moves, in shares of a
    # side.
    bend = strengths["bend"] * amount(drawn, "bend")
    point_moves = drawn["bend_points"].view(b, 2, 4, 4) - 0.5
    point_moves = for_images(bend) * point_moves * (side * TO_DEVIATION_1)
    return warp(images, corners, point_moves)


def change_look(images, strengths, drawn):
    """Blur, sharpness and colour: every pixel stays in its place."""
    blur = strengths["blur"] * amount(drawn, "blur")
    sharpen = strengths["sharpen"] * amount(drawn, "sharpen")
    images = focus(images, blur, sharpen)

    # The factors of fading, of jitter and of the loss of all colour.
    jitter = strengths["jitter"]
    saturation = 1 - strengths["fade"] * amount(drawn, "fade")
    saturation = saturation * (1 + jitter * amount(drawn, "saturation"))
    saturation = saturation * (1 - strengths["grey"])
    saturation = saturation.clamp(min=0)
    hue = jitter * amount(drawn, "hue")
    brightness = 1 + jitter * amount(drawn, "brightness")
    contrast = 1 + jitter * amount(drawn, "contrast")
    haze = strengths["haze"] * amount(drawn, "haze")
    return recolour(images, saturation, hue, brightness, contrast, haze)


def lower_resolution(images, strengths):
    """A picture of a third of the pixels each way, 10 x 42 of 32 x 128, enlarged again."""
    height, width = images.shape[2:]
    low = coarse_view(images, (height // 3, width // 3))
    low = F.interpolate(low, size=(height, width), mode="bilinear")
    return images.lerp(low, for_images(strengths["low_resolution"]))


def solarize(images, strengths, drawn):
    """Inverts what is light, as film does that was given far too much light."""
    threshold = 1 - strengths["solarize"] * amount(drawn, "solarize")
    return torch.where(images > for_images(threshold), 1 - images, images)


def invert(images, strengths):
    return images.lerp(1 - images, for_images(strengths["invert"]))


def add_noise(images, strengths, drawn):
    deviation = strengths["noise"] * amount(drawn, "noise_deviation")
    noise = noise_from_tape(images, drawn["noise_start"])
    return images.addcmul(noise, for_images(deviation * TO_DEVIATION_1)).clamp_(0, 1)


# ---- views: geometry

# A picture's corners (x, y), clockwise from top left.
SQUARE = torch.tensor([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])


def turned(angle, aspect, corners=None):
    """The corners (B, 4, 2) through which a picture is seen rotated by `angle` (B,) radians
    counter-clockwise, on a canvas that grows until all of it fits.

    aspect: the picture's width / height. corners: what is turned, (B, 4, 2); None: SQUARE.
    """
    if corners is None:
        corners = copy_once(SQUARE, angle.device)
    cos = torch.cos(angle)[:, None]
    sin = torch.sin(angle)[:, None]

    # First the canvas grows, from w x h to (w cos + h |sin|) x (h cos + w |sin|).
    growth_x = cos + sin.abs() / aspect
    growth_y = cos + sin.abs() * aspect
    x, y = corners.unbind(-1)
    x = x * growth_x
    y = y * growth_y

    # Then it turns. y goes down, so (cos x - sin y, sin x + cos y) is (x, y) turned clockwise to
    # the eye, and what is seen through it turns counter-clockwise. x counts half widths and y half
    # heights: in half heights the point is (aspect x, y), and turned_x is divided by aspect again.
    turned_x = cos * x - sin * y / aspect
    turned_y = sin * aspect * x + cos * y
    return torch.stack([turned_x, turned_y], -1)


def homography(corners):
    """The projective maps from the unit square to four corners (B, 4, 2) -> (B, 3, 3).

    Heckbert, Fundamentals of Texture Mapping and Image Warping (1989), 2.2.3. A point (u, v) of
    the square goes to

        x = (a u + b v + c) / (g u + h v + 1)
        y = (d u + e v + f) / (g u + h v + 1)

    and the square's corners, clockwise from (0, 0), go to p0, p1, p2, p3.
    """
    p0, p1, p2, p3 = corners.unbind(1)                              # (x, y), each (B, 2)
    delta1 = p1 - p2
    delta2 = p3 - p2
    sigma = p0 - p1 + p2 - p3

    denominator = determinant(delta1, delta2)                       # (B, 1)
    g = determinant(sigma, delta2) / denominator
    h = determinant(delta1, sigma) / denominator
    ad = p1 - p0 + g * p1                                           # a and d, (B, 2)
    be = p3 - p0 + h * p3
    cf = p0

    upper_rows = torch.stack([ad, be, cf], 2)                       # (B, 2, 3)
    last_row = torch.stack([g, h, torch.ones_like(g)], 2)           # (B, 1, 3)
    return torch.cat([upper_rows, last_row], 1)


def determinant(p, q):
    """Of two columns (x, y): p, q (B, 2) -> (B, 1)."""
    return p[:, :1] * q[:, 1:] - p[:, 1:] * q[:, :1]


def warp(images, corners, moves=None):
    """Pictures (B, 3, H, W), each seen through four corners (B, 4, 2). SQUARE leaves them as they
    are. moves (B, 2, 4, 4): how far 4 x 4 points, spread over the picture, go in x and y."""
    b, _, height, width = images.shape
    device = images.device
    u = (torch.arange(width, device=device) + 0.5) / width          # the middles of pixels
    v = (torch.arange(height, device=device) + 0.5) / height
    ones = torch.ones(height, width, device=device)
    points = torch.stack([u.expand(height, width), v[:, None].expand(height, width), ones])

    # (a u + b v + c), (d u + e v + f) and (g u + h v + 1) of every crop and pixel.
    products = homography(corners) @ points.flatten(1)              # (B, 3, H * W)
    products = products.view(b, 3, height, width)
    grid = products[:, :2].div_(products[:, 2:])
    if moves is not None:
        grid += F.interpolate(moves, size=(height, width), mode="bilinear", align_corners=True)
    grid = grid.permute(0, 2, 3, 1)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def coarse_view(images, size):
    """Area averages: (B, 3, H, W) -> (B, 3, *size), float32 in [0, 1]."""
    return F.interpolate(to_unit(images), size=size, mode="area")


# ---- views: sharpness, colour and noise

KERNEL_RADIUS = 3                       # pixels
MASK_VARIANCE = 1                       # of the unsharp mask's own blur, in pixels squared


def focus(images, sigma, sharpen):
    """Gaussian blur of `sigma` pixels (B,), then an unsharp mask of strength `sharpen` (B,).

    An unsharp mask adds what one more blur would take away: x + s (x - blur(x)). With x blurred
    too, both are one kernel: (1 + s) times that of one blur, minus s times that of two. The
    variances of blurs one after the other add up.
    """
    b, c, height, width = images.shape
    r = KERNEL_RADIUS
    blur = gaussian_kernel(sigma ** 2)
    blur_twice = gaussian_kernel(sigma ** 2 + MASK_VARIANCE)
    sharpen = for_matrices(sharpen)
    kernel = (1 + sharpen) * blur - sharpen * blur_twice            # (B, 7, 7)

    # Crops and colours become channels, and each channel has its own kernel.
    padded = F.pad(images, (r, r, r, r), mode="replicate")
    padded = padded.reshape(1, b * c, height + 2 * r, width + 2 * r)
    kernel = kernel.repeat_interleave(c, 0)[:, None]
    return F.conv2d(padded, kernel, groups=b * c).view(b, c, height, width)


def gaussian_kernel(variance):
    """(B,) -> (B, 7, 7), each with sum 1. A variance of 0 leaves a picture as it is."""
    distance = torch.arange(-KERNEL_RADIUS, KERNEL_RADIUS + 1, device=variance.device)
    tiny = 1e-4                         # instead of a division by 0
    exponent = -distance ** 2 / (2 * variance[:, None] + tiny)
    row = torch.softmax(exponent, 1)    # exp, with sum 1
    return row[:, :, None] * row[:, None]


# The grey of a colour is the sum of its red, green and blue with these weights.
LUMA = torch.tensor([0.299, 0.587, 0.114])
# NTSC writes a colour as its grey (Y) and a point of a plane (I, Q), whose direction is the hue.
# From these to RGB:
FROM_YIQ = torch.tensor([[1, 0.956, 0.619], [1, -0.272, -0.647], [1, -1.106, 1.703]])
# Takes the grey away and turns the hue by 90 degrees, in YIQ.
QUARTER_TURN_OF_IQ = torch.tensor([[0.0, 0, 0], [0, 0, -1], [0, 1, 0]])
# The same in RGB.
QUARTER_TURN = FROM_YIQ @ QUARTER_TURN_OF_IQ @ FROM_YIQ.inverse()


def recolour(images, saturation, hue, brightness, contrast, haze):
    """All changes of colour as one 3 x 3 matrix and one offset for each crop. All arguments but
    the images are (B,).

    They come in the order of the arguments: saturation (a factor), hue (turns), brightness (a
    factor), contrast about the crop's mean grey (a factor), haze (the share of mid-grey).
    """
    luma = copy_once(LUMA, images.device)
    quarter = copy_once(QUARTER_TURN, images.device)

    # A colour is its grey and a rest. The grey stays. The rest turns as a vector does in a plane:
    # cos times itself, plus sin times itself turned by 90 degrees.
    to_grey = luma.expand(3, 3)
    to_rest = torch.eye(3, device=images.device) - to_grey
    cos = for_matrices(torch.cos(2 * math.pi * hue))
    sin = for_matrices(torch.sin(2 * math.pi * hue))
    turned_rest = cos * to_rest + sin * quarter
    matrix = to_grey + for_matrices(saturation) * turned_rest                   # (B, 3, 3)

    # Then three more changes of a colour c, one after the other:
    #
    #     brightness   c  ->  brightness * c
    #     contrast     c  ->  contrast * c + (1 - contrast) * mean
    #     haze         c  ->  keep * c + (1 - keep) * 0.5
    #
    # The mean is the brightened crop's, brightness * mean_grey: saturation and hue leave a colour's
    # grey as it is. All in all c -> keep * contrast * brightness * c + offset.
    keep = 1 - haze
    matrix = for_matrices(keep * contrast * brightness) * matrix
    mean_grey = images.mean((2, 3)) @ luma                                      # (B,)
    offset = keep * (1 - contrast) * brightness * mean_grey + 0.5 * (1 - keep)

    recoloured = torch.baddbmm(for_matrices(offset), matrix, images.flatten(2))
    return recoloured.view_as(images).clamp_(0, 1)


NOISE_TAPE_LENGTH = 2 ** 20


@functools.cache
def noise_tape():
    """Numbers in [-0.5, 0.5), always the same: noise is cut out of them."""
    fixed_seed = torch.Generator().manual_seed(0)
    return torch.rand(NOISE_TAPE_LENGTH, generator=fixed_seed) - 0.5


def noise_from_tape(images, start):
    """Noise of standard deviation 1 / sqrt(12), of the images' shape. start (B,) in [0, 1) says
    where on the tape a crop's begins: it is the same in every batch and on every device."""
    tape = copy_once(noise_tape(), images.device)
    # A window begins at each number of the tape. They are views of it: nothing is copied.
    windows = tape.unfold(0, images[0].numel(), 1)
    first = (start * len(windows)).long()
    return windows[first].view_as(images)


@functools.cache
def copy_once(constant, device):
    """A tensor that never changes, copied to a device once: the host waits for such a copy."""
    return constant.to(device)


# ---- batches

# images: uint8 (b, 3, 32, 128). labels: b strings or None.
# char_maps: uint8 (b, 32, 128), zeros for a crop without one; None if nobody asked.
# damaged: a line for each crop that could not be read.
# indices: the numbers of the b crops in the source.
Batch = namedtuple("Batch", "images labels char_maps damaged indices")


def read_batch(source, asked_for, char_maps=False, fill=False):
    """The crops of these numbers -> Batch. Damaged ones are missing.

    fill: sound crops stand, once more, in the places of damaged ones; each keeps its own place. So
    all batches of a run are of one size: for another one torch.compile would compile anew, and
    ranks could not gather their rows. Without a sound crop the batch is empty."""
    rows = []                                   # (number, crop), or None of a damaged one
    damaged = []
    for i in asked_for:
        try:
            rows.append((i, source.get(i)))
        except Damaged as error:
            rows.append(None)
            damaged.append(str(error))

    sound = [row for row in rows if row is not None]
    if fill and sound:
        for place, row in enumerate(rows):
            if row is None:
                rows[place] = sound[place % len(sound)]
    else:
        rows = sound
    indices = [i for i, _ in rows]
    crops = [crop for _, crop in rows]

    images = torch.zeros(len(crops), 3, H, W, dtype=torch.uint8)
    maps = None
    if char_maps:
        maps = torch.zeros(len(crops), H, W, dtype=torch.uint8)
    for k, crop in enumerate(crops):
        images[k] = crop.image
        if char_maps and crop.char_map is not None:
            maps[k] = crop.char_map
    labels = [crop.label for crop in crops]
    return Batch(images, labels, maps, damaged, indices)


class BatchReader(Dataset):
    """For a DataLoader with batch_size=None: it asks for reader[key] for each key of its sampler.
    Here a key is a list of indices, and an item a Batch."""

    def __init__(self, source, char_maps, fill):
        self.source = source
        self.char_maps = char_maps
        self.fill = fill

    def __getitem__(self, indices):
        return read_batch(self.source, indices, self.char_maps, self.fill)


BATCHES_AHEAD = 4                       # how many each worker has ready


def check_shared_memory(workers, batch_size, char_maps=False):
    """UserError if /dev/shm, through which workers hand over what they read, has too little room.
    The worker would fail, and whoever waits for its batch would wait for ever. Docker gives 64 MB
    where it is told nothing else."""
    bytes_a_crop = 3 * H * W
    if char_maps:
        bytes_a_crop += H * W
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    need = ranks_here * workers * BATCHES_AHEAD * batch_size * bytes_a_crop
    with contextlib.suppress(OSError):              # other systems have no such folder
        free = shutil.disk_usage("/dev/shm").free
        if free < need:
            raise UserError(f"--workers {workers}: their batches need {need / 1e6:.0f} MB of "
                            f"/dev/shm, which has {free / 1e6:.0f} free; start docker with "
                            "--shm-size=1g, or lower --workers or --batch_size")


def loader(source, index_lists, workers, char_maps=False, fill=False):
    """Lists of indices -> an iterator over their Batches, see read_batch. Worker processes are
    handed indices alone."""
    if workers:
        # When a process ends, what was registered last runs first. end_workers has to run before
        # multiprocessing's own end, which would wait. Taken out before, lest it stand there twice.
        atexit.unregister(end_workers)
        atexit.register(end_workers)
    with warnings.catch_warnings():
        # torch finds that more workers than cores are too many, in every validation anew
        warnings.filterwarnings("ignore", "This DataLoader will create")
        return iter(DataLoader(
            BatchReader(source, char_maps, fill), sampler=index_lists, batch_size=None,
            num_workers=workers, prefetch_factor=BATCHES_AHEAD if workers else None,
            worker_init_fn=start_worker, pin_memory=torch.cuda.is_initialized()))


def start_worker(_):
    """A signal to the whole group is the training script's to handle: it saves, and its workers
    end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if hasattr(signal, "SIGHUP"):                           # Windows has none
        signal.signal(signal.SIGHUP, signal.SIG_IGN)


def end_workers():
    """When this process ends: multiprocessing would wait for ever for workers that ignore
    signals."""
    with contextlib.suppress(AttributeError):               # Windows has no such signal
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)       # torch's handler would call it an error
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def batches(source, batch_size, seed, position=0, rank=0, world=1, workers=0, char_maps=False):
    """An endless iterator over the Batches of a rank, in the order of crop_order, filled."""
    check_shared_memory(workers, batch_size, char_maps)
    order = crop_order(len(source), batch_size, seed, position, rank, world)
    return loader(source, order, workers, char_maps, fill=True)


def crop_order(n, batch_size, seed, position=0, rank=0, world=1):
    """Yields for ever the indices of a rank's micro-batches.

    All ranks read one stream of crops: all n in random order, then all n in another, and so on.
    Position p of it is crop permutation[p % n] of epoch p // n. The ranks take batch_size crops of
    it each, in turn. So a step sees the same crops whether 1 process reads 16, or 2 read 8 each,
    or 1 reads 4 and accumulates four times; and a run resumes at any position, on any number of
    processes or workers, with the same order.
    """
    epoch = None
    for micro_batch in itertools.count():
        first = position + (micro_batch * world + rank) * batch_size
        indices = []
        for p in range(first, first + batch_size):
            if p // n != epoch:
                epoch = p // n
                generator = torch.Generator().manual_seed(common.number_of(seed, epoch))
                permutation = torch.randperm(n, generator=generator)
            indices.append(int(permutation[p % n]))
        yield indices


def rows_in_step(micro_step, batch_size):
    """Where this rank's micro-batch stands in the step's one large batch, that of all ranks and
    micro-steps, see crop_order -> slice."""
    first = (micro_step * common.world_size() + common.rank()) * batch_size
    return slice(first, first + batch_size)


def next_batch(stream, damage):
    """The next Batch of a stream, see `batches`. damage, a DamageCount, is told what could not be
    read. UserError if nothing could be read."""
    batch = next(stream)
    asked_for = len(batch.images)               # the batch is filled, unless all are damaged
    if asked_for == 0:
        asked_for = len(batch.damaged)
    damage.add(asked_for, batch.damaged)
    if len(batch.images) == 0:
        raise UserError(f"no crop of a batch could be read, the first being {batch.damaged[0]}; "
                        "leave such crops out with data.py pack, or raise --batch_size")
    return batch


def read_all(source, batch_size, workers=0):
    """Yields this rank's share of the crops as Batches, in order: every world_size-th crop. The
    first rank shows how far it is, on a terminal."""
    check_shared_memory(workers, min(batch_size, len(source)))
    mine = range(common.rank(), len(source), common.world_size())
    index_lists = [mine[k:k + batch_size] for k in range(0, len(mine), batch_size)]
    hide_bar = True if common.rank() > 0 else None          # None: where there is no terminal
    with tqdm(total=len(mine), desc=source.name[:40], disable=hide_bar) as bar:
        for batch in loader(source, index_lists, workers):
            yield batch
            bar.update(len(batch.images) + len(batch.damaged))


class DamageCount:
    """Counts what cannot be read and names the first ten, each once however often it is met. A
    share above `limit` ends the run. It is judged from 100 crops on, and three standard
    deviations are allowed for, or chance would end sound runs early."""
    NAMED = 10
    LEAST_SEEN = 100
    DEVIATIONS = 3

    def __init__(self, limit=0.01):
        self.limit = limit
        self.seen = 0
        self.damaged = 0
        self.first = []

    def add(self, seen, damaged):
        """Of `seen` crops these, one string each, could not be read."""
        self.seen += seen
        self.damaged += len(damaged)
        for line in damaged:
            if len(self.first) == self.NAMED or line in self.first:
                continue
            self.first.append(line)
            with contextlib.suppress(OSError):      # the output may go to a disk that is full
                print(f"damaged, left out: {line}", flush=True)

        expected = self.limit * self.seen
        deviation = (expected * (1 - self.limit)) ** 0.5
        if self.seen >= self.LEAST_SEEN and self.damaged > expected + self.DEVIATIONS * deviation:
            raise UserError(f"{self.damaged} of {self.seen} crops are damaged, "
                            f"more than --max_damaged {self.limit}: {'; '.join(self.first)}")


# ---- pictures of crops

RED, BLACK, GREY = (210, 30, 30), (0, 0, 0), (120, 120, 120)

# In pixels.
PICTURE_W, PICTURE_H = 2 * W, 2 * H     # of a crop on a sheet
MARGIN_X, MARGIN_Y = 6, 4               # around it
CELL_W = PICTURE_W + 2 * MARGIN_X
NO_PICTURE_H = 22                       # of a row without pictures
TEXT_H = 18                             # is added to a row with text
CAPTION_BELOW_PICTURE = 16              # from a picture down to the base line of its caption
TITLE_BELOW_TOP = 46                    # from the row's top down to the base line of text alone,
TITLE_ABOVE_BOTTOM = 12                 # which in a low row is this far above the bottom
CAPTION_SIZE = 14
TITLE_SIZE = 24
LEAST_SIZE = 7                          # of text that would not fit into its cell

MAX_LETTERS = 200                       # of a piece of text


def draw_sheet(rows, path, fonts=None):
    """Draws rows of cells: (picture uint8 (3, 32, 128) or None, [(text, colour), ...]).

    The text stands below its picture, or alone, in the first font that has all of it: the system's
    are asked, then those of the folder `fonts`. UserError if path is no picture's name.
    """
    files = font_files()
    if fonts:
        files += font_files_under(fonts)
    heights = [row_height(row) for row in rows]
    across = max(len(row) for row in rows)
    sheet = Image.new("RGB", (across * CELL_W, sum(heights)), "white")
    y = 0
    for row, height in zip(rows, heights):
        for column, (picture, pieces) in enumerate(row):
            x = column * CELL_W + MARGIN_X
            if picture is None:
                base = min(TITLE_BELOW_TOP, height - TITLE_ABOVE_BOTTOM)
                draw_text(sheet, pieces, x, y + base, TITLE_SIZE, files)
            else:
                base = MARGIN_Y + PICTURE_H + CAPTION_BELOW_PICTURE
                paste_crop(sheet, picture, x, y + MARGIN_Y)
                draw_text(sheet, pieces, x, y + base, CAPTION_SIZE, files)
        y += height
    save_picture(sheet, path)


def save_picture(picture, path):
    """What was there stays until all of the picture is written. UserError if path is no picture's
    name, OSError if it cannot be written."""
    suffix = os.path.splitext(path)[1]              # Pillow goes by it
    try:
        write_whole(path, picture.save, ".tmp" + suffix)
    except ValueError as error:
        raise UserError(f"{path}: {error}; expected a picture's name, such as sheet.png") from None
    except OSError as error:                        # Pillow's own say neither the file nor a number
        reason = error.strerror or error
        raise OSError(error.errno, f"could not be written ({reason})", path) from None


def row_height(row):
    height = NO_PICTURE_H
    if any(picture is not None for picture, _ in row):
        height = PICTURE_H + 2 * MARGIN_Y
    if any(pieces for _, pieces in row):
        height += TEXT_H
    return height


def paste_crop(sheet, picture, x, y):
    picture = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
    picture = picture.resize((PICTURE_W, PICTURE_H), Image.Resampling.NEAREST)
    sheet.paste(picture, (x, y))


def draw_text(sheet, pieces, x, y, size, files):
    """Pieces (text, colour), one after the other on the base line y, small enough for a cell."""
    pieces = [(text[:MAX_LETTERS].replace("\n", " "), colour) for text, colour in pieces]
    line = "".join(text for text, _ in pieces)
    font = find_font(line, size, files)
    room = PICTURE_W / max(1, font.getlength(line))
    if room < 1:
        font = find_font(line, max(LEAST_SIZE, int(size * room)), files)
    for text, colour in pieces:
        ImageDraw.Draw(sheet).text((x, y), text, colour, font, anchor="ls")     # on the base line
        x += font.getlength(text)


# ---- files that are written

# What no file of text is called: such a name is a slip, and would cost the file.
NOT_TEXT = (*SUFFIXES, ".mdb", ".pt", ".pth")


def check_text_output(path, srcs):
    """check_output, and UserError unless the file that will be written may be one of text, or if
    labels of images are in it, which a person may have typed."""
    check_output(path, srcs)
    if holds_labels(path):
        raise UserError(f"{path}: holds labels of images; name another file")
    if path == "-" or path.endswith("/"):
        raise UserError(f"{path}: expected the name of a file; /dev/stdout is the terminal")
    if path.lower().endswith(NOT_TEXT):
        raise UserError(f"{path}: expected the name of a text file, such as r.json or list.tsv; "
                        "this may be a crop or a checkpoint")


def holds_labels(path):
    """True for a labels file whose first image is there."""
    path = os.path.realpath(path)                   # its images lie beside the file itself
    kind = suffix_of(path)
    if kind not in LABEL_FILES or not os.path.isfile(path):
        return False
    try:
        for _, entry in itertools.islice(read_entries(path, kind), 2):  # or a header
            image_path, _ = parse_entry(entry, kind)
            if os.path.isfile(os.path.join(os.path.dirname(path), image_path)):
                return True
    except (OSError, ValueError, KeyError, TypeError, csv.Error):
        pass                                                    # it holds something else
    return False


def check_output(path, srcs):
    """UserError if the file that will be written is one that is read, or is a picture in a folder
    of images that is read: the next time it would be one of the crops."""
    out = os.path.realpath(path)
    for src in srcs:
        if is_rendered(src):
            continue
        place = os.path.realpath(split_times(src)[0])
        picture_inside = is_inside(out, place) and suffix_of(out) in SUFFIXES
        if out == place or (picture_inside and is_image_folder(place)):
            raise UserError(f"{path}: {src} is read, and would be changed; name a file elsewhere")


def is_inside(path, folder):
    """True for what is below a folder, wherever links lead."""
    return os.path.realpath(path).startswith(os.path.realpath(folder) + os.sep)


def is_image_folder(place):
    """True for a folder whose images are crops. They are not if an LMDB is in it, see
    open_folder."""
    if not os.path.isdir(place):
        return False
    files, _ = files_under(place)
    for file in files:
        if os.path.basename(file) == "data.mdb" and not is_hidden(file, place):
            return False
    return True


def check_crops_stay(path, source):
    """UserError if the file that will be written is a crop that a labels file names."""
    if not os.path.exists(path):
        return
    out = os.path.realpath(path)
    for part in getattr(source, "parts", [source]):
        if not isinstance(part, Files):
            continue
        for i in range(len(part)):
            crop = part.path(i)
            # Names are compared first: to ask for the real paths of millions would take long.
            same_name = os.path.basename(crop) == os.path.basename(out)
            if same_name and os.path.realpath(crop) == out:
                raise UserError(f"{path}: {part.where(i)} is read, and would be changed; "
                                "name a file elsewhere")


def check_writable(path):
    """An OSError now, and not after an hour of reading, if a file cannot be written. What is in it
    stays until there is a result. Its folder is made."""
    if is_pipe(path):                           # whoever reads it would see its end
        return
    path = os.path.realpath(path)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    is_new = not os.path.exists(path)
    open(path, "a").close()
    if is_new:
        with contextlib.suppress(FileNotFoundError):        # another rank was faster
            os.remove(path)


def write_file(text, path, errors="backslashreplace"):
    """What was there stays until all of the text is written. UserError names the file.

    Of a file name that is not UTF-8 Python makes lone surrogates. They are written as JSON does,
    \\udcff, and are no error; errors="surrogateescape" writes the name's own bytes."""
    def write(path):
        with open(path, "w", encoding="utf-8", errors=errors, newline="\n") as file:
            file.write(text)

    if not is_pipe(path):
        path = os.path.realpath(path)           # an error names the file, not a link to it
    try:
        write_whole(path, write, ".tmp")
    except OSError as error:
        raise UserError(f"{path}: could not be written ({error.strerror})") from None


def write_whole(path, write, suffix):
    """write(path + suffix), and that file takes the place of what was there. If it fails, what was
    there stays. A pipe is written as it is."""
    if is_pipe(path):
        write(path)
        return
    path = os.path.realpath(path)               # a link stays a link
    try:
        write(path + suffix)
        os.replace(path + suffix, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.remove(path + suffix)
        raise


def is_pipe(path):
    """True for a pipe, and for a device such as /dev/stdout: they are written as they are."""
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


# ---- the command show

def show(args):
    """Draws crops, and beside each the views that were asked for."""
    check_output(args.out, args.src)
    source = open_with_flags(args)
    check_crops_stay(args.out, source)
    generator = torch.Generator().manual_seed(args.seed)
    chosen = torch.randperm(len(source), generator=generator)[:args.n].tolist()
    batch = read_batch(source, chosen)
    if len(batch.images) == 0:
        raise UserError(f"{source.name}: none of {len(batch.damaged)} crops could be read, "
                        f"the first: {batch.damaged[0]}")

    views = views_to_show(batch.images, generator, args)
    check_writable(args.out)
    cells = []
    for k, label in enumerate(batch.labels):
        crop, *others = [(255 * view[k]).round().byte() for view in views]
        cells.append((crop, [(label or "", BLACK)]))
        cells += [(other, []) for other in others]
    crops_in_row = max(1, 4 // len(views))          # four pictures, or one crop with all its views
    across = crops_in_row * len(views)
    rows = [cells[k:k + across] for k in range(0, len(cells), across)]
    draw_sheet(rows, args.out, args.fonts)

    for line in batch.damaged:
        print(f"damaged: {line}")
    print(f"{args.out}: {len(batch.images)} of the {len(source):,} crops of {source.name}")


def open_with_flags(args):
    """SRC as one Source, its rendered words drawn as the flags of add_drawing say. UserError if
    one of these was typed in vain."""
    charset = None
    if args.charset is not None:
        charset = read_charset(args.charset)
    source = open_sources(
        args.src, fonts=args.fonts, charset=charset, max_length=args.max_length)
    rendered = any(isinstance(part, Synth) for part in source.parts)
    for flag in ("fonts", "charset", "max_length"):
        if flag in typed_flags() and not rendered:
            raise UserError(f"--{flag} {getattr(args, flag)}: has no effect without rendered "
                            "words; add synth to SRC")
    return source


def views_to_show(images, generator, args):
    """-> a list of batches (B, 3, 32, 128) in [0, 1], the first being the crops themselves."""
    views = [to_unit(images)]
    if args.guidance:
        views.append(guidance_view(images, generator))
        numbers = uniform_numbers(images, VIEW_NUMBERS, generator)
        views.append(still_view(images, numbers))
    if args.augment:
        views.append(augment(images, generator))
        views.append(augment(images, generator))
    if args.coarse:
        height, width = parse_size(args.coarse, "--coarse")
        if height > H or width > W:
            raise UserError(f"--coarse {args.coarse}: expected at most {H}x{W}, a crop's size")
        coarse = coarse_view(images, (height, width))
        views.append(F.interpolate(coarse, size=(H, W)))
    return views


# ---- the command check

READ_AT_ONCE = 256                      # crops
FINGERPRINT_SIZE = (8, 32)              # of the small picture that it is made of


def check(args):
    """Counts everything, and with --against finds the crops that test sets hold too."""
    for flag in ("write_list", "alike"):
        if flag in typed_flags() and not args.against:
            raise UserError(f"--{flag} is of what --against finds; name test sets with it")
    if args.write_list:
        check_text_output(args.write_list, args.src + args.against)
    source = open_sources(args.src)
    known = None
    if args.against:
        tests = open_sources(args.against)
        if args.write_list:
            check_crops_stay(args.write_list, source)
            check_crops_stay(args.write_list, tests)
        known = KnownCrops(tests, args.workers)
        if args.write_list:
            check_writable(args.write_list)

    counts = Counts()
    lines = []
    for batch in read_all(source, READ_AT_ONCE, args.workers):
        files = [source.file_bytes(i) for i in batch.indices]
        counts.add(files, batch)
        if known is not None:
            matches = known.find(files, batch.images, args.alike)
            lines += list_lines(source, batch.indices, known.source, matches)

    try:
        counts.report(source)
        if not counts.widths:
            raise UserError(f"{source.name}: none of its {len(source):,} entries could be read")
        if known is not None:
            first = ", the first 20:" if len(lines) > 20 else ""
            print(f"also in {known.source.name}: {len(lines):,}{first}")
            for line in lines[:20]:
                print(line)
    finally:                                    # even if nobody listens: `check ... | head -1`
        if args.write_list and counts.widths:
            text = "".join(f"{line}\n" for line in lines)
            write_file(text, args.write_list, errors="surrogateescape")


class Counts:
    """What `check` says about a source."""

    def __init__(self):
        self.hashes = Counter()         # of files: 64 bits, which no two share by chance
        self.chars = Counter()
        self.widths = []
        self.heights = []
        self.lengths = []               # of labels
        self.quoted = 0                 # labels that are written as CSV writes them
        self.damaged = []

    def add(self, files, batch):
        self.damaged += batch.damaged
        for file in files:
            width, height = Image.open(io.BytesIO(file)).size
            self.widths.append(width)
            self.heights.append(height)
            self.hashes[hash(file)] += 1
        for label in batch.labels:
            if label is not None:
                self.lengths.append(len(label))
                self.chars.update(label)
                if re.fullmatch('".*"".*"', label):         # such as "a 6"" pipe"
                    self.quoted += 1

    def report(self, source):
        print(f"{source.name}: {len(source):,} entries = {len(self.widths):,} read "
              f"+ {len(self.damaged):,} damaged")
        print(f"width {range_and_median(self.widths)}; height {range_and_median(self.heights)}")

        commonest = " ".join(f"{char!r} {n:,}" for char, n in self.chars.most_common(12))
        print(f"{len(self.lengths):,} labels, length {range_and_median(self.lengths)}; "
              f"{len(self.chars)} characters, the commonest {commonest}")

        outside = [(char, n) for char, n in self.chars.most_common() if char not in CHARSETS["94"]]
        named = " ".join(f"{char!r} {n:,}" for char, n in outside[:50])
        print(f"{len(outside)} characters outside the 94: {named}")

        repeats = self.hashes.total() - len(self.hashes)
        print(f"entries that repeat the bytes of another: {repeats:,}")
        if self.quoted:
            print(f"{self.quoted:,} labels stand in quotes and double those in them, as in a CSV "
                  "file; if it is one, name it .csv, with a comma after the path")
        for line in list(dict.fromkeys(self.damaged))[:20]:
            print(f"damaged: {line}")


def range_and_median(numbers):
    if not numbers:
        return "none"
    least, median, most = np.quantile(numbers, (0, 0.5, 1))
    return f"from {least:g} to {most:g}, median {median:g}"


class KnownCrops:
    """The crops of test sets, to be found again among others by their bytes or their
    fingerprints."""

    def __init__(self, source, workers):
        self.source = source
        self.by_hash = {}               # hash of a file -> its number
        self.numbers = []
        prints = []
        n_damaged = 0
        for batch in read_all(source, READ_AT_ONCE, workers):
            for i in batch.indices:
                self.by_hash[hash(source.file_bytes(i))] = i
            self.numbers += batch.indices
            prints.append(fingerprint(batch.images))
            n_damaged += len(batch.damaged)
        if not self.numbers:
            raise UserError(f"--against {source.name}: none of {n_damaged:,} crops could be read")
        if n_damaged > 0:
            print(f"{source.name}: {n_damaged:,} of {len(source):,} crops are damaged and are not "
                  "looked for")
        self.prints = torch.cat(prints)

    def find(self, files, images, least_alike):
        """-> for each crop the number of a test crop, and why: it has the same bytes, or it is the
        most alike and its likeness is above `least_alike`. (None, "") if neither is there."""
        likeness, nearest = (fingerprint(images) @ self.prints.T).max(1)
        likeness = likeness.clamp(max=1)        # rounding goes beyond
        matches = []
        for file, alike, k in zip(files, likeness.tolist(), nearest.tolist()):
            if hash(file) in self.by_hash:
                matches.append((self.by_hash[hash(file)], "same bytes"))
            elif alike > least_alike:
                matches.append((self.numbers[k], f"alike {alike:.3f}"))
            else:
                matches.append((None, ""))
        return matches


def fingerprint(images):
    """Crops -> (n, 472) of length 1: differences of neighbours in the grey picture at 8 x 32.

    The product of two is their likeness. It is above 0.9 if one is the other coded anew (all of
    500 at JPEG quality 75, 98 % at 30) or resized (97 %), not if it is cropped anew. Among 49
    million pairs of training and test crops, no two with different labels came so near.
    """
    grey = torch.einsum("bchw,c->bhw", to_unit(images), LUMA)[:, None]
    small = coarse_view(grey, FINGERPRINT_SIZE)
    down = small.diff(dim=2).flatten(1)
    along = small.diff(dim=3).flatten(1)
    edges = torch.cat([down, along], 1)
    return F.normalize(edges - edges.mean(1, keepdim=True))


def list_lines(source, indices, tests, matches):
    """A line for each crop that was found: its number, where it is, its label, why, where the
    test crop is, its label, the crop's checksum."""
    lines = []
    for i, (k, why) in zip(indices, matches):
        if k is not None:
            fields = [list_start(source, i), why, tests.where(k), str(tests.label(k)),
                      checksum(source, i)]
            lines.append("\t".join(fields).replace("\n", " "))
    return lines


def checksum(source, i):
    """Of crop i's file, 8 digits: another set may have the same names and labels."""
    return f"{zlib.crc32(source.file_bytes(i)):08x}"


def list_start(source, i):
    """How crop i's line in such a list begins. By this and its end pack --without knows it."""
    fields = [str(i), source.where(i), str(source.label(i))]
    return "\t".join(fields).replace("\n", " ")


# ---- the command pack

def pack(args):
    """Writes an LMDB of the files as they are, reads it back, and only then gives it its name."""
    import lmdb
    out = os.path.normpath(args.out)
    source = open_with_flags(args)
    for src in args.src:
        path, times = split_times(src)
        if path != src:                             # SRC@N: open_with_flags has looked at N
            raise UserError(f"{src}: pack writes no crop N times; leave @{times} out, and type it "
                            "where the LMDB is trained on")
        if is_inside(out, src):
            raise UserError(f"{out}: {src} is read, and would be changed; name a folder outside it")
    if os.path.exists(out):
        raise UserError(f"{out}: exists already; type the name of a new folder")
    skip = read_list(args.without, source) if args.without else set()

    # A name that no other process has, so that whatever is in it is ours. It is hidden: what is
    # left of a pack that was killed is not read as crops.
    folder, name = os.path.split(out)
    unfinished = os.path.join(folder, f".{name}.part{os.getpid()}")
    expected = "expected a new folder, in one that is there, on a disk with room"
    try:
        os.mkdir(unfinished)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error}); {expected}") from None
    try:
        kept = write_lmdb(unfinished, source, skip, args.workers)
        check_written(unfinished, out, source, kept)
        os.rename(unfinished, out)
    except BaseException as error:                          # Ctrl-C too
        shutil.rmtree(unfinished, ignore_errors=True)
        if not isinstance(error, (lmdb.Error, OSError)):
            raise
        raise UserError(f"{out}: cannot be written ({error}); {expected}") from None
    print(f"{out}: {len(kept):,} of {len(source):,} entries written and read back, "
          f"{len(skip):,} left out by list")


def read_list(path, source):
    """What check --write_list wrote -> the numbers of its crops. UserError if they are another
    source's."""
    try:
        text = pathlib.Path(path).read_bytes().decode("utf-8", "surrogateescape")
        skip = set()
        for line in text.split("\n"):               # not splitlines: a label may hold a \r
            if line == "":
                continue
            number = line.split("\t")[0]
            if not number.isdecimal():
                raise ValueError("a line does not begin with a number")
            i = int(number)
            if i >= len(source):
                raise ValueError(f"it names entry {i:,} of {len(source):,}")
            starts = line.startswith(f"{list_start(source, i)}\t")
            if not starts or not line.endswith(f"\t{checksum(source, i)}"):
                raise ValueError("it names other entries")
            skip.add(i)
    except (OSError, ValueError, Damaged) as error:
        raise UserError(f"--without {path}: {error}; expected the list that check wrote "
                        "of this SRC") from None
    return skip


# Room for the worst case.
TWO_PAGES = 8192                # bytes, about what an entry may waste: LMDB writes whole pages
COPIES = 2                      # LMDB writes a page anew before it sets the former one free


def write_lmdb(folder, source, skip, workers):
    """-> the numbers of the crops that were written."""
    import lmdb
    kept = []
    labelled = None                                 # whether the first crop has a label
    room = 2 ** 24                                  # bytes that the file may have
    # Without a lock file: nobody else knows this folder yet.
    with lmdb.open(folder, map_size=room, lock=False) as environment:
        for batch in read_all(source, READ_AT_ONCE, workers):
            for line in batch.damaged:
                print(f"left out, damaged: {line}")
            files = [source.file_bytes(i) for i in batch.indices]
            room += COPIES * sum(len(file) + TWO_PAGES for file in files)
            environment.set_mapsize(room)
            with environment.begin(write=True) as transaction:
                for i, label, file in zip(batch.indices, batch.labels, files):
                    if i in skip:
                        continue
                    if not kept:
                        labelled = label is not None
                    check_labelled(source, i, label, labelled)
                    kept.append(i)
                    put_crop(transaction, len(kept), file, label)
                transaction.put(b"num-samples", b"%d" % len(kept))
    if not kept:
        raise UserError(f"{source.name}: none of its {len(source):,} crops is left to pack")
    return kept


def check_labelled(source, i, label, expected):
    """UserError if crop i has a label and none is expected, or the other way round."""
    has_label = label is not None
    if has_label != expected:
        has = "a" if has_label else "no"
        raise UserError(f"{source.where(i)}: {has} label, unlike those before it; "
                        "pack labelled and unlabelled crops apart")


def put_crop(transaction, number, file, label):
    transaction.put(b"image-%09d" % number, file)
    if label is not None:
        transaction.put(b"label-%09d" % number, label.encode())


def check_written(folder, name, source, kept):
    """UserError if the LMDB does not hold, byte by byte, what it should."""
    packed = Lmdb(folder, name)
    wrong = 0
    for k, i in enumerate(kept):
        if packed.file_bytes(k) != source.file_bytes(i) or packed.label(k) != source.label(i):
            wrong += 1
    if wrong or len(packed) != len(kept):
        raise UserError(f"{folder}: {wrong} entries are not what was written; is the disk sound?")
    OPEN_LMDBS.forget_all()                  # Windows renames no folder that holds an open file


# ---- the command line

def main():
    parser = Parser(__doc__)
    commands = parser.add_subparsers(required=True)
    add_show(commands)
    add_check(commands)
    add_pack(commands)
    args = parser.parse_args()
    if common.world_size() > 1:                 # each rank would read a share of the crops
        parser.error("works as one process; start it without torchrun, or unset WORLD_SIZE")
    args.command(args)


def add_command(commands, command, does):
    """Adds a command to the parser -> the function that adds flags to that command."""
    parser = commands.add_parser(command.__name__, help=does, description=f"{does} {SRC_HELP}")
    parser.set_defaults(command=command)
    parser.add_argument("src", nargs="+", metavar="SRC", help="where the crops are, one or several")
    return parser.add_argument


def add_show(commands):
    add = add_command(commands, show, "Draw crops and their views.")
    add("--out", default="sheet.png", help="the picture to write")
    add("--n", type=number_in("[1, inf)", int), default=48,
        help="how many crops; views need room, so ask for fewer with them")
    add("--seed", type=number_in("[0, 4294967296)", int), default=0,
        help="another one picks other crops and draws other views")
    add_drawing(add)
    add("--guidance", action="store_true",
        help="beside each crop mim's kind of guidance view, moved and bent, and nsp's")
    add("--augment", action="store_true",
        help="beside each crop two of fine-tuning's augmentations of it")
    add("--coarse", metavar="HxW",
        help="beside each crop its area average of that size, such as 16x64")


def add_check(commands):
    add = add_command(commands, check, "Read and count.")
    add_workers(add)
    add("--against", nargs="+", metavar="TEST", help="test sets: find the crops that they hold too")
    add("--alike", type=number_in("[0, 1]"), default=0.9,
        help="likeness of near duplicates; lower finds more, and wrong ones; 1 finds those alone "
        "that have the same bytes")
    add("--write_list", metavar="FILE", help="write what --against finds, for pack --without")


def add_pack(commands):
    add = add_command(commands, pack, "Write an LMDB, without @N.")
    add_workers(add)
    add_drawing(add)
    add("out", metavar="OUT", help="a new folder for data.mdb")
    add("--without", metavar="LIST",
        help="leave out the entries of this list, written by check --write_list")


def add_drawing(add):
    add("--fonts", help="a folder of fonts for rendered words, instead of the system's")
    add("--charset",
        help="36, 62, 94 or a UTF-8 file: the characters that rendered words are made of")
    add("--max_length", type=number_in(f"[{MAX_LENGTH}, {MAX_LINE}]", int), default=MAX_LENGTH,
        help="characters of the longest rendered label; above the default: lines too")


def add_workers(add):
    add("--workers", type=number_in("[0, inf)", int), default=0,
        help="processes that read; about one a core is best")


if __name__ == "__main__":
    run_main(main)
