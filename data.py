"""The words and everything done to them before a model sees one: charsets, drawing, reading, two looks at a word, batches.

    python data.py show SRC --guidance --coarse 16x64     writes sheet.png: crops and the views that are made of them
    python data.py check TRAIN --against TEST TEST        reads everything, counts, finds training crops that a test set holds
    python data.py pack SRC out_lmdb --without list.tsv   writes an LMDB in the field's layout

SRC is one of: `synth`, `synth:N` or `synth:N:SEED` (rendered words); a folder holding `data.mdb`, or a tree of such folders; a
labels file, .txt or .tsv (path<TAB>label), .jsonl ({"filename", "text"}) or MMOCR .json, its paths relative to it; a folder of
images (unlabelled). A crop is a uint8 tensor (3, 32, 128). What cannot be read raises Damaged; it is never replaced.
"""
import argparse
import hashlib
import io
import json
import math
import os
import shutil
import signal
import sys
import unicodedata
import warnings
from collections import Counter
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

H, W = 32, 128                      # every crop, in this order everywhere
SYNTH_N = 1_000_000                 # words in `synth`: drawn on the fly, so the number only says when an epoch ends
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM", "MPO")    # never EPS and the like, which run other programs
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
Image.MAX_IMAGE_PIXELS = 2 ** 25    # 33 million pixels are no word; more is a decompression bomb
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


class UserError(Exception):
    """What the person who typed the command can mend. One line: what came, what was expected, what to type."""


class Damaged(UserError):
    """An entry that cannot be read: where it is and why."""


def run(main):
    """Call main(); a UserError becomes one line on stderr and exit status 2."""
    try:
        main()
    except UserError as error:
        print(f"{os.path.basename(sys.argv[0])}: {error}", file=sys.stderr)
        sys.exit(2)


class Parser(argparse.ArgumentParser):
    """Defaults in every help line; what is wrong in one line and exit status 2."""

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False, **options)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def size(text):
    """"16x64" -> (16, 64), height first."""
    try:
        h, w = map(int, text.lower().split("x"))
        return h, w
    except ValueError:
        raise UserError(f"{text}: expected height x width in pixels, such as 16x64") from None


class Crop(NamedTuple):
    image: torch.Tensor             # uint8 (3, 32, 128)
    label: str | None
    mask: torch.Tensor | None       # uint8 (32, 128), rendered words only: k > 0 marks the pixels of the k-th character


# ---- charset

DIGITS, LOWER, UPPER = "0123456789", "abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
CHARSETS = {"36": DIGITS + LOWER, "62": DIGITS + LOWER + UPPER,
            "94": DIGITS + LOWER + UPPER + "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"}


def charset(name):
    """'36', '62', '94' or a UTF-8 file of characters (line ends passed over, NFC) -> the characters as one string."""
    if name in CHARSETS:
        return CHARSETS[name]
    try:
        with open(name, encoding="utf-8-sig") as file:
            chars = unicodedata.normalize("NFC", file.read()).replace("\n", "")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--charset {name}: expected 36, 62, 94 or a UTF-8 file of characters ({error})") from None
    twice = [c for c, n in Counter(chars).items() if n > 1]
    if twice or not chars:
        raise UserError(f"--charset {name}: " + (f"{twice[0]!r} stands in it twice" if twice else "holds no character"))
    return chars


def fit_label(label, chars, max_length):
    """-> (the label as it is trained on: NFC, lower case where the charset has no upper; the characters that keep it out, 'long'
    or 'empty', or '' when it fits)."""
    label = unicodedata.normalize("NFC", label)
    if chars == CHARSETS["36"]:
        label = label.lower()
    if not label:
        return label, "empty"
    return label, "".join(c for c in label if c not in chars) or ("long" if len(label) > max_length else "")


# ---- drawing words

# (the renderer: class Synth(Source), pasted in here)


# ---- reading

def decode(data, rotate_tall=False):
    """Encoded bytes or a path -> uint8 (3, 32, 128), resized bicubically with no regard for shape, as the field does.

    Transparency is laid over white; 16 bits are scaled to 8; EXIF rotation is applied. rotate_tall turns crops more than 1.5
    times as high as wide by 90 degrees counter-clockwise. Raises Damaged for whatever is not a whole image.
    """
    try:
        with Image.open(io.BytesIO(data) if isinstance(data, (bytes, memoryview)) else data, formats=FORMATS) as image:
            turns = image.getexif().get(0x0112, 1) != 1 if image.format in ("JPEG", "MPO", "TIFF") else "exif" in image.info
            if image.format == "JPEG":      # let the decoder halve what is far too large; a side that may be turned stays
                image.draft(None, (2 * W, 2 * (H if image.width > image.height and not turns else W)))
            image.load()
            if turns:
                image = ImageOps.exif_transpose(image)
            if image.mode[0] in "IF":       # 16 or 32 bits of grey
                grey = np.asarray(image, np.float32)
                scale = 255 if image.mode == "F" and grey.max() <= 1 else 1 / 257 if grey.max() > 255 else 1
                image = Image.fromarray((grey * scale).clip(0, 255).astype(np.uint8))
            if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            if rotate_tall and image.height > 1.5 * image.width:
                image = image.transpose(Image.Transpose.ROTATE_90)
            pixels = np.array(image.convert("RGB").resize((W, H), Image.Resampling.BICUBIC, reducing_gap=3))
            return torch.from_numpy(pixels.transpose(2, 0, 1).copy())
    except Exception as error:              # Pillow raises a dozen kinds; each means that there is no image here
        size = f"{len(data)} bytes, " if isinstance(data, bytes) else ""
        raise Damaged(f"{size}{type(error).__name__}: {' '.join(str(error).split())[:120]}") from None


class Source(Dataset):
    """len(s); s[i] -> (uint8 (3, 32, 128), label or None). Subclasses have bytes(i), label(i), where(i) and name."""
    rotate_tall = False

    def get(self, i):
        label, data = self.label(i), self.bytes(i)
        try:
            return Crop(decode(data, self.rotate_tall), label, None)
        except Damaged as error:
            raise Damaged(f"{self.where(i)}: {error}") from None

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(f"{self.name} holds {len(self)} crops, not crop {i}")
        return self.get(i)[:2]


OPENED = {}                                 # LMDB folder -> (process, environment)


def environment(folder):
    """The read-only LMDB of a folder, opened once in each process, so that workers may be forked or spawned."""
    try:
        import lmdb
    except ImportError:
        raise UserError(f"{folder} is an LMDB, and lmdb is not installed: pip install lmdb") from None
    folder = os.path.realpath(folder)
    process, env = OPENED.get(folder, (None, None))
    if process != os.getpid():
        if env:
            env.close()                     # inherited through fork; lmdb refuses a second one while this is open
        try:
            env = lmdb.open(folder, readonly=True, lock=False, readahead=False, meminit=False, max_spare_txns=1)
        except lmdb.Error as error:
            raise UserError(f"{folder}: not an LMDB that can be read ({error}); was it copied whole?") from None
        OPENED[folder] = os.getpid(), env
        pages, size = env.info()["last_pgno"] + 1, os.path.getsize(os.path.join(folder, "data.mdb"))
        if pages * env.stat()["psize"] > size:   # reading past the end would kill the process
            raise UserError(f"{folder}: data.mdb has {size:,} bytes of {pages * env.stat()['psize']:,}; copy it again")
    return env


class Lmdb(Source):
    """The field's layout: image-%09d (JPEG, PNG), label-%09d (UTF-8), counted from 1, and num-samples."""

    def __init__(self, folder, name, rotate_tall=False):
        self.folder, self.name, self.rotate_tall = folder, name, rotate_tall
        with environment(folder).begin() as txn, txn.cursor() as cursor:
            count, self.labelled = txn.get(b"num-samples"), cursor.set_range(b"label-") and cursor.key()[:6] == b"label-"
            if count is None and (cursor.prev() if cursor.set_range(b"image-:") else cursor.last()):   # ':' follows '9'
                count = cursor.key()[6:] if cursor.key()[:6] == b"image-" else None
            if count is None or not count.isdigit() or not int(count) or not (
                    cursor.set_range(b"image-") and cursor.key()[:6] == b"image-"):
                keys = b", ".join(key for _, key in zip(range(3), cursor.iternext(values=False) if cursor.first() else ()))
                raise UserError(f"{folder}: holds no word crops (first keys: {keys.decode(errors='replace') or 'none'}); expected "
                                f"image-000000001, label-000000001, num-samples")
            self.count = int(count)

    def __len__(self):
        return self.count

    def where(self, i):
        return f"{self.name} image-{i + 1:09d}"

    def value(self, kind, i):
        with environment(self.folder).begin() as txn:
            value = txn.get(b"%s-%09d" % (kind, i + 1))
        if value is None:
            raise Damaged(f"{self.where(i)}: key {kind.decode()}-{i + 1:09d} is missing")
        return value

    def bytes(self, i):
        return self.value(b"image", i)

    def label(self, i):
        try:
            return self.value(b"label", i).decode() if self.labelled else None
        except UnicodeDecodeError:
            raise Damaged(f"{self.where(i)}: the label is not UTF-8") from None


def read_labels(path):
    """Yield (image path, label) of a .txt, .tsv, .jsonl or MMOCR .json file."""
    number, kind = 0, os.path.splitext(path)[1].lower()
    try:
        with open(path, encoding="utf-8-sig") as file:
            if kind == ".json":
                for number, entry in enumerate(json.load(file)["data_list"], 1):
                    (instance,) = entry["instances"]
                    yield entry["img_path"], instance["text"]
            for number, line in enumerate(file, 1):
                line = line.rstrip("\n")
                if kind == ".jsonl" and line.strip():
                    row = json.loads(line)
                    yield row["filename"], row["text"]
                elif line.strip():
                    name, label = line.split("\t", 1)
                    yield name, label
    except (ValueError, KeyError, TypeError) as error:
        want = {".json": 'MMOCR\'s {"data_list": [{"img_path": ..., "instances": [{"text": ...}]}]}',
                ".jsonl": '{"filename": ..., "text": ...}'}.get(kind, "path<TAB>label")
        raise UserError(f"{path}: entry {number}: expected {want} ({type(error).__name__}: {error})") from None


class Files(Source):
    """Images named by (path, label or None); kept as one block of bytes, which workers share without copying."""

    def __init__(self, entries, root, name, rotate_tall=False):
        self.root, self.name, self.rotate_tall = root, name, rotate_tall
        rows = [(path if label is None else f"{path}\0{label}").encode("utf-8", "surrogatepass") for path, label in entries]
        self.ends, self.rows = np.cumsum([0] + [len(row) for row in rows]), b"".join(rows)

    def __len__(self):
        return len(self.ends) - 1

    def row(self, i):
        path, *label = self.rows[self.ends[i]:self.ends[i + 1]].decode("utf-8", "surrogatepass").split("\0", 1)
        return path, label[0] if label else None

    def where(self, i):
        return f"{self.name} {self.row(i)[0]}"

    def bytes(self, i):
        try:
            with open(os.path.join(self.root, self.row(i)[0]), "rb") as file:
                return file.read()
        except (OSError, ValueError) as error:
            raise Damaged(f"{self.where(i)}: {getattr(error, 'strerror', error)}") from None

    def label(self, i):
        return self.row(i)[1]


class Parts(Source):
    """Several sources as one, in order; one that is listed twice counts twice."""

    def __init__(self, parts, name):
        self.parts, self.name, self.ends = parts, name, np.cumsum([len(part) for part in parts])

    def __len__(self):
        return int(self.ends[-1])

    def at(self, i):
        part = int(np.searchsorted(self.ends, i, side="right"))
        return self.parts[part], i - int(self.ends[part - 1] if part else 0)

    def get(self, i):
        part, i = self.at(i)
        return part.get(i)

    def where(self, i):
        part, i = self.at(i)
        return part.where(i)

    def bytes(self, i):
        part, i = self.at(i)
        return part.bytes(i)

    def label(self, i):
        part, i = self.at(i)
        return part.label(i)


class Subset(Parts):
    """The crops of a source at the given indices (a numpy array)."""

    def __init__(self, source, indices):
        super().__init__([source], source.name)
        self.indices = indices

    def __len__(self):
        return len(self.indices)

    def at(self, i):
        return self.parts[0], int(self.indices[i])


def open_source(src, fonts=None, rotate_tall=False, chars=None):
    """SRC (see the top of this file) -> Source. Raises UserError for what is missing, empty or foreign."""
    src = str(src)
    if src == "synth" or src.startswith("synth:"):
        try:
            n, seed = ([int(x) for x in src.split(":")[1:]] + [SYNTH_N, 0][src.count(":"):])
            if n < 1:
                raise ValueError
        except ValueError:
            raise UserError(f"{src}: expected synth, synth:N or synth:N:SEED, whole numbers, N at least 1") from None
        from render import Synth
        return Synth(n, seed, fonts, chars or CHARSETS["94"])
    name = os.path.basename(os.path.abspath(src))
    if os.path.isdir(src):
        files = sorted(os.path.join(folder, file) for folder, _, names in os.walk(src, followlinks=True) for file in names)
        found = [os.path.dirname(file) for file in files if os.path.basename(file) == "data.mdb"]
        if found:
            parts = [Lmdb(folder, os.path.relpath(folder, os.path.dirname(os.path.abspath(src))), rotate_tall) for folder in found]
            return Lmdb(src, name, rotate_tall) if found == [src] else Parts(parts, name)
        images = [(os.path.relpath(file, src), None) for file in files if file.lower().endswith(SUFFIXES)]
        if not images:
            kinds = ", ".join(f"{n} {kind or 'without suffix'}" for kind, n in
                              Counter(os.path.splitext(file)[1] for file in files).most_common(4)) or "nothing"
            raise UserError(f"{src}: holds {kinds}; expected data.mdb, folders with one, or images ({' '.join(SUFFIXES)})")
        return Files(images, src, name, rotate_tall)
    if not os.path.exists(src):
        raise UserError(f"{src}: no such file or folder; expected synth, synth:N, an LMDB folder, a labels file or a folder of images")
    if os.path.splitext(src)[1].lower() not in (".txt", ".tsv", ".jsonl", ".json"):
        raise UserError(f"{src}: expected a labels file (.txt .tsv .jsonl .json) or a folder; for data.mdb or an image, type its folder")
    source = Files(read_labels(src), os.path.dirname(src), name, rotate_tall)
    if not len(source):
        raise UserError(f"{src}: holds no line; expected path<TAB>label (.txt, .tsv), .jsonl or MMOCR .json")
    if not any(os.path.exists(os.path.join(source.root, source.row(i)[0])) for i in range(min(100, len(source)))):
        raise UserError(f"{src}: no image where it says, the first is {os.path.join(source.root, source.row(0)[0])}; paths are "
                        f"relative to the labels file: move it to the folder they start from")
    return source


def open_sources(srcs, **options):
    """Several SRCs as one Source with .parts; each may be listed more than once to weigh more."""
    return Parts([open_source(src, **options) for src in srcs], " ".join(map(str, srcs)))


def fit_labels(source, chars, max_length):
    """-> (the crops whose label can be trained on, one line that says how many could not and why)."""
    keep, why, odd = [], Counter(), Counter()
    for i in range(len(source)):
        try:
            label = source.label(i)
        except Damaged:
            keep.append(i)                  # the loader meets it again, names and counts it
            continue
        bad = fit_label(label, chars, max_length)[1] if label is not None else "no label"
        why[bad if bad in ("", "empty", "long", "no label") else "characters"] += 1
        if not bad:
            keep.append(i)
        elif bad not in ("empty", "long", "no label"):
            odd.update(set(bad))
    left_out = [f"{n:,} {reason}" for reason, n in why.items() if reason]
    report = f"{source.name}: {len(keep):,} of {len(source):,} labels fit" + (f"; left out: {', '.join(left_out)}" if left_out else "")
    report += f" (most often {' '.join(f'{c!r} {n:,}' for c, n in odd.most_common(8))})" if odd else ""
    return Subset(source, np.array(keep, np.int64)), report


# ---- two looks at a word

GREY = torch.tensor([.299, .587, .114])
FROM_YIQ = torch.tensor([[1, .956, .619], [1, -.272, -.647], [1, -1.106, 1.703]])
QUARTER = FROM_YIQ @ torch.tensor([[0., 0, 0], [0, 0, -1], [0, 1, 0]]) @ torch.linalg.inv(FROM_YIQ)   # turns hues by 90 degrees


def uniform(generator, n, *shape, rows=None, device="cpu"):
    """Numbers in [0, 1), (n, *shape). rows=(start, total) draws for `total` crops and keeps rows start:start+n, so that a rank
    or a micro-batch gets the very numbers that it would get in the one large batch; `start` may be the n rows themselves."""
    start, total = rows or (0, n)
    kept = slice(start, start + n) if isinstance(start, int) else start
    return torch.rand(total, *shape, generator=generator, device=generator.device)[kept].to(device, non_blocking=True)


def unit(images):
    """uint8 or float in [0, 1] -> float32 in [0, 1]."""
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()


def normalize(images):
    """uint8 or float in [0, 1] -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images * 2 - 1


def coarse_view(images, size):
    """Area average: (B, 3, H, W) -> (B, 3, *size), float in [0, 1]."""
    return F.interpolate(unit(images), size=size, mode="area")


def matrix(xx, xy, x1, yx, yy, y1):
    """Rows of (B,) numbers -> (B, 3, 3)."""
    zero = torch.zeros_like(xx)
    return torch.stack([xx, xy, x1, yx, yy, y1, zero, zero, zero + 1], 1).view(-1, 3, 3)


def turned(angle, aspect):
    """Where a picture is read that is rotated by `angle` (radians, counter-clockwise), its canvas grown until all of it fits."""
    c, s = torch.cos(angle), torch.sin(angle)
    wide, high = c + s.abs() / aspect, c + s.abs() * aspect
    return matrix(c * wide, -s * high / aspect, 0 * c, s * wide * aspect, c * high, 0 * c)


def tilted(inward):
    """Homography (B, 3, 3) of the square [-1, 1]^2 to its corners, top left and on clockwise, each moved inward by its shares
    (B, 8) of half a side (Heckbert, Fundamentals of Texture Mapping and Image Warping, 1989)."""
    corners = inward.new_tensor([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * (1 - inward.view(-1, 4, 2))
    a, b, c, d = corners.unbind(1)
    cross = lambda p, q: p[:, :1] * q[:, 1:] - p[:, 1:] * q[:, :1]
    total, down, along = a - b + c - d, b - c, d - c
    det = cross(down, along)
    g, h = cross(total, along) / det, cross(down, total) / det
    columns = torch.stack([b - a + g * b, d - a + h * d, a], 2)
    square = torch.cat([columns, torch.stack([g, h, torch.ones_like(g)], 2)], 1)
    return square @ square.new_tensor([[.5, 0, .5], [0, .5, .5], [0, 0, 1]])


def warp(images, matrices, bend=None):
    """Read every pixel where its matrix says, in coordinates of [-1, 1], plus the bend, (B, 2, 4, 4) spread over the picture."""
    b, _, h, w = images.shape
    y, x = (torch.arange(n, device=images.device) * 2 + 1 for n in (h, w))
    points = torch.stack([(x / w - 1).expand(h, w), (y / h - 1)[:, None].expand(h, w), torch.ones(h, w, device=images.device)])
    p = (matrices.reshape(-1, 3) @ points.flatten(1)).view(b, 3, h, w)
    grid = p[:, :2].div_(p[:, 2:])
    if bend is not None:
        grid += F.interpolate(bend, size=(h, w), mode="bilinear", align_corners=True)
    return F.grid_sample(images, grid.permute(0, 2, 3, 1), padding_mode="border", align_corners=False)


def focus(images, sigma, sharpen):
    """Gaussian blur of `sigma` pixels (B,), then an unsharp mask of that strength (B,): one 7 x 7 kernel for each crop."""
    b, c, h, w = images.shape
    d = torch.arange(-3, 4, device=images.device) ** 2
    gauss = lambda var: torch.softmax(-d / (2 * var[:, None] + 1e-4), 1)
    blur, more = gauss(sigma ** 2), gauss(sigma ** 2 + 1)
    kernel = (1 + sharpen)[:, None, None] * blur[:, :, None] * blur[:, None] - sharpen[:, None, None] * more[:, :, None] * more[:, None]
    padded = F.pad(images, (3, 3, 3, 3), mode="replicate").view(1, b * c, h + 6, w + 6)
    return F.conv2d(padded, kernel.repeat_interleave(c, 0)[:, None], groups=b * c).view(b, c, h, w)


def recolour(images, bright, contrast, fade, saturation, hue):
    """Brightness, contrast about the crop's mean grey, contrast about mid-grey, saturation (factors, (B,)) and hue (turns): one
    3 x 4 colour matrix for each crop. It keeps the grey, for each part does."""
    grey, quarter = GREY.to(images.device), QUARTER.to(images.device)
    onto = grey.expand(3, 3)
    col = lambda v: v[:, None, None]
    cos, sin = torch.cos(2 * math.pi * hue), torch.sin(2 * math.pi * hue)
    chroma = onto + col(saturation) * (col(cos) * (torch.eye(3, device=images.device) - onto) + col(sin) * quarter)
    mean = images.mean((2, 3)) @ grey
    offset = fade * (1 - contrast) * bright * mean + .5 * (1 - fade)
    return torch.baddbmm(col(offset), col(fade * contrast * bright) * chroma, images.flatten(2)).view_as(images).clamp_(0, 1)


def noise(images, seed, sd):
    """Add noise of standard deviation `sd` (B,). It is an integer hash of the crop's seed (B,) in [0, 1) and the pixel, hence the
    same whatever batch or device the crop is in."""
    h, w = images.shape[-2:]
    bits = (torch.arange(h * w, device=images.device, dtype=torch.int32) + (seed * 2 ** 24).int()[:, None] * 40503) * 0x2c1b3c6d
    bits = (bits ^ (bits >> 15)) * 0x297a2d39
    bits = (bits ^ (bits >> 13)) * 0x1b56c4e9
    value = torch.stack([bits >> 2, bits >> 12, bits >> 22], 1) & 1023
    return images.addcmul_(value.view_as(images) / 1023 - .5, (sd * math.sqrt(12))[:, None, None, None]).clamp_(0, 1)


def guidance_view(images, generator, rows=None, geometry=True, strength=1.0):
    """The same word, looking different: (B, 3, H, W) uint8 or float in [0, 1] -> float in [0, 1], drawn anew for every crop.

    LMIM's list (CVPR 2025, medium strength): at least three of ten operations, then colour jitter with p = .8 and grey with
    p = .2. geometry=False leaves every pixel where it is and the sign of every edge alone (no solarizing), or else what a
    coarse view has to predict could not be known; it adds noise instead. `strength` scales every range: 0 changes nothing.
    """
    images = unit(images)
    b, _, h, w = images.shape
    keys, corners, bend, one = uniform(generator, b, 75, rows=rows, device=images.device).split([11, 8, 32, 24], 1)
    chosen = keys[:, 1:].argsort(1).argsort(1) < 3 + (keys[:, :1] * 8).floor()      # 3 to 10 of the ten
    fade, blur, rows_off, columns_off, sharpen, rotate, bent, tilt, solarize, greyed = (strength * chosen).unbind(1)
    draw = iter(one.unbind(1))
    between = lambda low, high: low + (high - low) * next(draw)

    if geometry:                            # all of it is one matrix and one bend: the crop is sampled once
        top, bottom = rows_off * between(0, .10), rows_off * between(0, .10)
        left, right = columns_off * between(0, .02), columns_off * between(0, .02)
        cropped = matrix(1 - left - right, 0 * top, left - right, 0 * top, 1 - top - bottom, top - bottom)
        angle = rotate * between(-1, 1) * math.radians(15)
        inward = (tilt * between(.02, .06))[:, None] * corners * 4                  # a half-normal's spread is about that
        bend = (bent * between(.03, .05))[:, None] * (bend - .5) * 4 * math.sqrt(3)
        images = warp(images, cropped @ turned(angle, w / h) @ tilted(inward), bend.view(b, 2, 4, 4))

    images = focus(images, blur * between(.5, 1.5), sharpen * between(.2, 1))
    jitter = strength * (next(draw) < .8)
    saturation = (1 - greyed * next(draw)) * (1 + jitter * between(-.2, .2)) * (next(draw) >= .2 * strength)
    images = recolour(images, 1 + jitter * between(-.4, .4), 1 + jitter * between(-.4, .4), 1 - fade * between(0, .5),
                      saturation.clamp(min=0), jitter * between(-.1, .1))
    threshold, seed, sd = 1 - solarize * between(.25, .75), next(draw), between(.01, .08) * (next(draw) < .5) * strength
    if geometry:
        return torch.where(images > threshold[:, None, None, None], 1 - images, images)
    return noise(images, seed, sd)


def augment(images, generator, rows=None):
    """Fine-tuning's augmentation, modelled on PARSeq's: (B, 3, H, W) uint8 or float in [0, 1] -> float in [0, 1], new for every
    crop. Each part is applied to some of the crops: rotation, shear, stretch, shift, perspective; low resolution, blur,
    sharpening, colour, inversion, noise. About one crop in eight stays as it is."""
    images = unit(images)
    b, _, h, w = images.shape
    odds, corners, one = uniform(generator, b, 44, rows=rows, device=images.device).split([12, 8, 24], 1)
    some = lambda k, p: (odds[:, k] < p) * (odds[:, 11] > .125)
    draw = iter(one.unbind(1))
    between = lambda low, high: low + (high - low) * next(draw)

    moved = some(0, .5)
    angle = moved * between(-1, 1) * math.radians(15)
    shear = matrix(1 + moved * between(-.1, .15), some(1, .4) * between(-.15, .15), moved * between(-.04, .04), 0 * angle,
                   1 + moved * between(-.1, .15), moved * between(-.1, .1))
    images = warp(images, shear @ turned(angle, w / h) @ tilted((some(2, .3) * between(0, .1))[:, None] * corners * 4))

    low = F.interpolate(coarse_view(images, (h // 3, w // 3)), size=(h, w), mode="bilinear")
    images = images.lerp_(low, some(3, .15).float()[:, None, None, None])
    images = focus(images, some(4, .25) * between(.3, 1.5), some(5, .15) * between(.2, 1))
    tint = some(6, .6).float()
    images = recolour(images, 1 + tint * between(-.4, .4), 1 + tint * between(-.4, .4), 1 - some(7, .2) * between(0, .6),
                      (1 + tint * between(-.5, .5)) * ~some(8, .1), tint * between(-.1, .1))
    inverted = some(9, .1).float()[:, None, None, None]
    return noise(images * (1 - 2 * inverted) + inverted, next(draw), some(10, .25) * between(.01, .1))


# ---- batches

class Readable(Dataset):
    """A source whose damaged entries are strings that say so, for a loader's worker to hand on."""

    def __init__(self, source):
        self.source = source

    def __len__(self):
        return len(self.source)

    def __getitem__(self, i):
        try:
            return self.source.get(i)
        except Damaged as error:
            return str(error)


class Order:
    """The endless list of index lists of one process: position p of the stream is crop perm[epoch](p % n), epoch = p // n."""

    def __init__(self, n, batch_size, seed, position, rank, world, shuffle):
        self.n, self.size, self.seed, self.shuffle = n, batch_size, seed, shuffle
        self.first, self.stride = position + rank * batch_size, world * batch_size

    def __iter__(self):
        p, known, order = self.first, None, None
        while True:
            batch = []
            for q in range(p, p + self.size):
                if self.shuffle and q // self.n != known:
                    known = q // self.n
                    order = torch.randperm(self.n, generator=torch.Generator().manual_seed(hash((self.seed, known))))
                batch.append(int(order[q % self.n]) if self.shuffle else q % self.n)
            yield batch
            p += self.stride


def collate(crops, masks=False):
    """Crops or strings -> (images uint8 (b, 3, 32, 128), labels, masks uint8 (b, 32, 128) or None, damaged, taken)."""
    taken = [j for j, crop in enumerate(crops) if not isinstance(crop, str)]
    good = [crops[j] for j in taken]
    stack = lambda tensors, *shape: torch.stack(tensors) if tensors else torch.empty(0, *shape, dtype=torch.uint8)
    nothing = torch.zeros(H, W, dtype=torch.uint8)
    hidden = stack([nothing if crop.mask is None else crop.mask for crop in good], H, W) if masks else None
    return (stack([crop.image for crop in good], 3, H, W), [crop.label for crop in good], hidden,
            [crop for crop in crops if isinstance(crop, str)], taken)


def start_worker(_):
    """Ctrl-C is the training script's to handle: it saves, and then the workers end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def loader(source, batches, workers, masks=False):
    return DataLoader(Readable(source), batch_sampler=batches, num_workers=workers, collate_fn=partial(collate, masks=masks),
                      worker_init_fn=start_worker, pin_memory=torch.cuda.is_available(), prefetch_factor=4 if workers else None)


class Batches:
    """An endless stream of micro-batches, (images, labels, masks, damaged, taken) as `collate` says.

    Micro-batch m of a rank holds the positions position + (m * world + rank) * batch_size + [0, batch_size), so that 1 x 16, 2 x 8
    and 1 x 4 accumulated four times see the same crops in a step, and a run that resumes at any position, with any number of
    processes or workers, continues the very same order. Damaged crops leave a smaller batch; `taken` are the places of the others.
    """

    def __init__(self, source, batch_size, seed, position=0, rank=0, world=1, workers=0, shuffle=True, masks=False):
        order = Order(len(source), batch_size, seed, position, rank, world, shuffle)
        self.loader = loader(source, order, workers, masks)

    def __iter__(self):
        return iter(self.loader)


def read_all(source, batch_size, workers=0, rank=0, world=1):
    """Every crop once over all ranks, in order: yields (indices, images, labels, damaged), the indices of those that could be read."""
    mine = range(rank, len(source), world)
    batches = [list(mine[k:k + batch_size]) for k in range(0, len(mine), batch_size)]
    for batch, (images, labels, _, damaged, taken) in zip(batches, loader(source, batches, workers)):
        yield [batch[j] for j in taken], images, labels, damaged


class DamageCount:
    """Counts what could not be read; more than the share `limit` of at least 100 crops is a UserError that names the first ten."""

    def __init__(self, limit=.01):
        self.limit, self.read, self.bad, self.first = limit, 0, 0, []

    def add(self, read, damaged):
        """`read` crops were read and these, one string each, were not."""
        self.read, self.bad = self.read + read, self.bad + len(damaged)
        self.first += damaged[:10 - len(self.first)]
        if self.read + self.bad >= 100 and self.bad > self.limit * (self.read + self.bad):
            raise UserError(f"{self.bad} of {self.read + self.bad} crops are damaged, more than --max_damaged {self.limit}: "
                            + "; ".join(self.first))
