"""Reads words with a fine-tuned recognizer and scores them under the protocols of the field.

    python evaluate.py --ckpt out/finetune/best.pt --data bench/IIIT5k_3000 bench/SVT --json r.json --errors errors.png
    python evaluate.py --ckpt out/finetune/best.pt --images a.png b.jpg            prints path, text, confidence
    python evaluate.py --score preds.tsv --protocol waics                          label<TAB>prediction, from any system
    torchrun --nproc_per_node=8 evaluate.py --ckpt best.pt --data bench/*          eight GPUs; each crop is read once

Writes what is asked for: --json, --predictions, --errors, --attention. From Python: load_recognizer(path).read(images).
Accuracy is the share of words that are equal after the protocol's folding; 1-NED is the mean of 1 - distance / longer length.
"""
import difflib
import json
import math
import os
import re
import string
import sys
import time
import unicodedata
from collections import Counter

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw
from tqdm import tqdm

import data
import model
from data import H, W, Damaged, UserError

# ---- protocols: how a label and a reading are folded before they are compared

PROTOCOLS = {
    "exact": "nothing is folded but Unicode's composed and decomposed forms (NFC); spaces count",
    "ci": "as exact, in lower case; spaces count",
    "waics": "word accuracy ignoring case and symbols: ASCII letters and digits are kept, in lower case; spaces go",
    "parseq36": "PARSeq's: spaces go, NFKD to ASCII, labels over 25 characters dropped, a-z0-9 kept, empty labels dropped",
    "zh": "FudanVI's: lower case, spaces go, full width to half; traditional is not turned into simplified (that needs a table of "
          "characters), so have labels and readings in one script",
}
ALNUM = frozenset(string.ascii_letters + string.digits)
HALF = {0x3000: " ", **{c: chr(c - 0xFEE0) for c in range(0xFF01, 0xFF5F)}}


def ascii_of(text):
    """PARSeq's first step, after which it measures the length: no whitespace, NFKD, and what is not ASCII then goes."""
    return unicodedata.normalize("NFKD", "".join(text.split())).encode("ascii", "ignore").decode()


def normalize(text, protocol):
    """The form of a label or a reading in which the two are compared.

    exact, ci: NFC, as labels are in training. waics: LMIM's; what is not ASCII is dropped before lower case, so that a Kelvin sign
    is no k (mmocr's keeps CJK too, folds case first, and by a slip in its pattern keeps ^). zh: to the letter, so that of
    spaces only the ASCII one goes; an ideographic space becomes a space and counts."""
    if protocol == "waics":
        return "".join(c for c in text if c in ALNUM).lower()
    if protocol == "parseq36":
        return "".join(c for c in ascii_of(text) if c in ALNUM).lower()
    if protocol == "zh":
        return text.lower().replace(" ", "").translate(HALF)
    text = unicodedata.normalize("NFC", text)
    return text.lower() if protocol == "ci" else text


def unfit(label, protocol):
    """Why a protocol leaves a label out, or ''. Only parseq36 leaves any out. A label that waics folds to nothing stays, as in
    LMIM's code, and is read rightly when the reading folds to nothing too."""
    if protocol != "parseq36":
        return ""
    return "longer than 25" if len(ascii_of(label)) > 25 else "" if normalize(label, protocol) else "no letter or digit"


def distance(a, b):
    """Levenshtein distance. A column of the table is two integers, one bit a row: where it rises by one and where it falls by one
    (Myers 1999, as told by Hyyro 2003); 400,000 words take seconds."""
    if not a or not b:
        return len(a) or len(b)
    at, full = {}, (1 << len(a)) - 1
    for i, c in enumerate(a):
        at[c] = at.get(c, 0) | 1 << i
    rises, falls, d, last = full, 0, len(a), 1 << len(a) - 1
    for c in b:
        equal = at.get(c, 0)
        diagonal = (((equal & rises) + rises) ^ rises) | equal | falls      # where the cell equals its upper left neighbour
        right, left = falls | ~(diagonal | rises) & full, rises & diagonal
        d += bool(right & last) - bool(left & last)
        right = right << 1 | 1
        rises, falls = (left << 1 | ~(diagonal | right)) & full, right & diagonal & full
    return d


def score(pairs, protocol):
    """(label, reading) pairs -> {"n", "evaluated", "dropped": {reason: count}, "accuracy", "ned"}, the last two in percent, or None
    where nothing could be evaluated. A reading of None is a damaged crop: counted and dropped. `ned` is 1 - NED as PARSeq has it."""
    n, evaluated, dropped, right, near = 0, 0, Counter(), 0, 0.0
    for label, reading in pairs:
        n += 1
        reason = "damaged" if reading is None else unfit(label, protocol)
        if reason:
            dropped[reason] += 1
            continue
        a, b = normalize(label, protocol), normalize(reading, protocol)
        evaluated, right = evaluated + 1, right + (a == b)
        near += 1 if a == b else 1 - distance(a, b) / max(len(a), len(b))
    percent = lambda x: 100 * x / evaluated if evaluated else None
    return {"n": n, "evaluated": evaluated, "dropped": dict(dropped), "accuracy": percent(right), "ned": percent(near)}


# ---- tables

SIX, UNION = "the six sets", "Union14M-Benchmark"
BENCHMARKS = {  # pattern of a set's name and its full size, for IC13-857 is not IC13-1015; rows end in the average
    SIX: (dict(iiit5k=3000, ic13=1015, svt=647, ic15=2077, svtp=645, cute=288), {
        "LMIM": (98.5, 98.0, 97.7, 88.7, 94.0, 98.6, 95.9), "MNSP": (None, None, None, None, None, None, 96.7)}),
    UNION: (dict(curve=2426, multioriented=1369, artistic=900, contextless=779, salient=1585, multiwords=829, general=400000), {
        "MIM": (84.8, 79.3, 71.1, 81.5, 81.0, 82.5, 82.0, 80.3), "SeqCLR": (83.7, 79.9, 73.7, 79.7, 81.0, 84.0, 82.7, 80.7),
        "MAERec-S": (81.4, 71.4, 72.0, 82.0, 78.5, 82.4, 82.5, 78.6), "LMIM-10ep": (87.5, 84.5, 79.8, 84.3, 86.6, 86.1, 84.4, 84.7),
        "LMIM-20ep": (90.3, 86.6, 80.7, 85.5, 88.2, 87.9, 85.1, 86.3), "MNSP": (None, None, None, None, None, None, None, 86.2),
        "DSHM": (91.6, 88.2, 81.4, 86.3, 87.9, 88.4, 85.3, 87.0)}),
}


def plain(name):
    """A set's name, loosely: Multi-Oriented, multi_oriented; ICDAR2013, IC13_1015."""
    return re.sub("ic(dar)?(20)?(?=1[35])", "ic", re.sub("[^a-z0-9]", "", name.lower()))


def averaged(sets):
    """Names of the sets that make the average: those with something evaluated. Union14M's Incomplete is reported as a drop and is
    never averaged in."""
    return [name for name, one in sets.items() if one["accuracy"] is not None and "incomplete" not in plain(name)]


def summary(sets, protocol):
    """{set: score} -> what --json holds. `average` is the mean over sets, `weighted` over their evaluated words."""
    names, total = averaged(sets), sum(sets[name]["evaluated"] for name in averaged(sets))
    average = sum(sets[name]["accuracy"] for name in names) / len(names) if names else None
    weighted = sum(sets[name]["accuracy"] * sets[name]["evaluated"] for name in names) / total if total else None
    return {"protocol": protocol, "sets": sets, "average": average, "weighted": weighted}


def published(sets):
    """{method: {set or 'average': figure}} for sets whose name and size are those of a benchmark's; an average only beside exactly
    the sets it is of."""
    columns, names = {}, averaged(sets)
    for splits, rows in BENCHMARKS.values():
        place = {name: k for name in names for k, (split, n) in enumerate(splits.items())
                 if split in plain(name) and sets[name]["n"] == n}
        for method, figures in rows.items():
            cells = {name: figures[k] for name, k in place.items() if figures[k] is not None}
            if len(set(place.values())) == len(splits) == len(names):
                cells["average"] = figures[-1]
            if cells:
                columns.setdefault(method, {}).update(cells)
    return columns


def print_table(result):
    sets, columns = result["sets"], published(result["sets"])
    number = lambda x: "-" if x is None else f"{x:.2f}"
    wide = max(10, *map(len, sets)) + 2
    line = lambda name, *cells, tail="": print(f"{name:{wide}}" + "".join(f"{cell:>11}" for cell in cells) + tail)
    print(f"\nprotocol {result['protocol']}: {PROTOCOLS[result['protocol']]}")
    line("set", "n", "evaluated", "accuracy", "1-NED", "seconds", *columns)
    for name, one in sets.items():
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in one["dropped"].items())
        line(name, one["n"], one["evaluated"], number(one["accuracy"]), number(one["ned"]), f"{one['seconds']:.1f}",
             *(cells.get(name, "") for cells in columns.values()), tail=f"   dropped: {dropped}" if dropped else "")
    line("average", "", "", number(result["average"]), "", "", *(cells.get("average", "") for cells in columns.values()))
    line("weighted", "", "", number(result["weighted"]))
    out = [name for name in sets if name not in averaged(sets)]
    if out:
        print(f"not in the averages: {', '.join(out)}")
    if columns:
        print("published: " + ", ".join(columns) + "; waics on original labels, as the papers print them"
              + ("" if result["protocol"] == "waics" else f": not comparable with {result['protocol']}"))


def print_views(result, kind):
    """Accuracy and what it lost against the untouched crops, for each height or angle."""
    views, number = result[kind], lambda x, y: "-" if x is None or y is None else f"{x:.2f} {x - y:+.2f}"
    wide = max(10, *map(len, result["sets"])) + 2
    print(f"\n{kind}: accuracy, and the change against crops as they are\n" + f"{'set':{wide}}" + "".join(f"{v:>16}" for v in views))
    for name, one in result["sets"].items():
        print(f"{name:{wide}}" + "".join(f"{number(v['sets'][name]['accuracy'], one['accuracy']):>16}" for v in views.values()))
    print(f"{'average':{wide}}" + "".join(f"{number(v['average'], result['average']):>16}" for v in views.values()))


# ---- files of readings: label, prediction, confidence, where

ESCAPES = {"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"}


def write_readings(file, rows):
    """One line a crop. Tabs, line ends and backslashes are escaped; a damaged crop has the word damaged for a confidence."""
    for label, reading, where in rows:
        text, confidence = ("", "damaged") if reading is None else (reading[0], f"{reading[1]:.6f}")
        file.write("\t".join("".join(ESCAPES.get(c, c) for c in field) for field in (label, text, confidence, where)) + "\n")


def read_readings(path):
    """Yields (label, prediction) of a file of label<TAB>prediction; further columns are ignored. Only lines of our own four
    columns are unescaped: a foreign file's backslashes are its own."""
    unescape = {escaped: c for c, escaped in ESCAPES.items()}
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, 1):
                fields = line.removesuffix("\n").removesuffix("\r").split("\t")
                if len(fields) < 2:
                    raise UserError(f"{path}: line {number} has no tab: {line[:40]!r}; expected label<TAB>prediction")
                if len(fields) == 4:
                    fields = [re.sub(r"\\[\\tnr]", lambda match: unescape[match[0]], field) for field in fields]
                yield fields[0], None if fields[2:3] == ["damaged"] else fields[1]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--score {path}: {getattr(error, 'strerror', None) or error}; expected a UTF-8 file") from None


# ---- reading

class Reader:
    """A recognizer that reads crops: uint8 or float in [0, 1], (B, 3, 32, 128) -> [(text, confidence)].

    In float32, the default, a word's reading does not depend on what it is batched with; half precision gives no such promise.
    Words keep the order of the data: how long one is cannot be known before it is read."""

    def __init__(self, recognizer, device="cpu", dtype="float32"):
        self.model, self.device, self.dtype = recognizer, torch.device(device), getattr(torch, dtype)

    @torch.inference_mode()
    def read(self, images, batch_size=128):
        words = []
        for batch in images.split(batch_size):
            batch = data.normalize(batch.to(self.device))
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                words += self.model.strings(*self.model.decode(batch))
        return words


def load_recognizer(path, device="cpu", dtype="float32"):
    """Checkpoint of finetune.py -> Reader; charset and sizes are in it. UserError, one line, when it is missing or foreign."""
    return Reader(model.load_recognizer(path, device), device, dtype)


def reduced(images, height):
    """Each crop at `height` pixels, its shape kept, and enlarged again as a crop of that height would be: bicubically."""
    small = F.interpolate(data.unit(images), size=(height, height * W // H), mode="bilinear", antialias=True)
    return F.interpolate(small, size=(H, W), mode="bicubic").clamp(0, 1)


def rotated(images, degrees):
    """Each crop turned counter-clockwise on a canvas that grows to hold it, edges continued, and squeezed back to 32 x 128: four by
    four points to a pixel, so that 0 degrees changes nothing and 30 do not alias."""
    angle = torch.full((len(images),), math.radians(degrees), device=images.device)
    fine = F.interpolate(data.unit(images), scale_factor=4, mode="nearest")
    return data.coarse_view(data.warp(fine, data.turned(angle, W / H)), (H, W))


def read_source(reader, source, args, views, rank=0, world=1):
    """Every crop once over all ranks -> rows {index: (label, reading of each view)}, damaged lines, seconds of each view."""
    rows, broken, seconds, clock = {}, [], dict.fromkeys(views, 0.0), time.perf_counter()
    steps = data.read_all(source, args.batch_size, args.workers, rank, world)
    for ids, images, labels, damaged in tqdm(steps, source.name, -(-len(source) // world // args.batch_size), disable=rank or None):
        if args.data and None in labels:
            raise UserError(f"{source.where(ids[labels.index(None)])}: no label; --data scores readings, --images only reads")
        images, readings = images.to(reader.device), []
        for name, view in views.items():
            readings.append(reader.read(view(images), args.batch_size) if ids else [])
            clock, seconds[name] = time.perf_counter(), seconds[name] + time.perf_counter() - clock
        rows.update((i, row) for i, *row in zip(ids, labels, *readings))
        broken += damaged
    parts = [(rows, broken, seconds)]
    if world > 1:
        parts = [None] * world
        dist.all_gather_object(parts, (rows, broken, seconds))
    rows = {i: row for part in parts for i, row in part[0].items()}
    return rows, [line for part in parts for line in part[1]], {name: max(part[2][name] for part in parts) for name in views}


def label_of(source, i):
    """The label of a damaged crop, '' when that is what is damaged."""
    try:
        return source.label(i) or ""
    except Damaged:
        return ""


# ---- pictures

RED, BLACK, GREY = (210, 30, 30), (0, 0, 0), (120, 120, 120)


def face(text, size):
    """The first font, Pillow's own or one of the system's, that has every letter of the text; else Pillow's."""
    for path in data.font_files():
        font, missing = data.face(path, size) or (None, b"")
        if font and all(bytes(font.getmask(c)) != missing for c in set(text) if not c.isspace()):
            return font
    return data.face(None, size)[0]


def draw_sheet(rows, path, zoom=2):
    """rows of cells (picture uint8 (3, 32, 128) or None, [(text, colour), ...]): the text stands below a picture, or alone."""
    w, h = W * zoom + 12, H * zoom + 26
    sheet = Image.new("RGB", (w * max(map(len, rows)), h * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for y, row in enumerate(rows):
        for x, (picture, pieces) in enumerate(row):
            left, top, size = x * w + 6, y * h + 4, 16 if picture is not None else 24
            if picture is not None:
                picture = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
                sheet.paste(picture.resize((W * zoom, H * zoom), Image.NEAREST), (left, top))
            line = "".join(text for text, _ in pieces)
            while face(line, size).getlength(line) > w - 8 and size > 8:
                size -= 1
            for text, colour in pieces:
                draw.text((left, top + (H * zoom + size if picture is not None else H * zoom // 2)), text, colour, face(line, size), "ls")
                left += face(line, size).getlength(text)
    sheet.save(path)


def marked(truth, reading, protocol):
    """The reading in pieces (text, colour): wrong letters red, a missing one as a red _; what the protocol drops is grey."""
    folded = [normalize(c, protocol) for c in reading]
    kept = [k for k, c in enumerate(folded) if c]
    wanted = [c for c in (normalize(c, protocol) for c in truth) if c]
    pieces, done = [], 0
    for tag, a, b, c, d in difflib.SequenceMatcher(None, wanted, [folded[k] for k in kept], autojunk=False).get_opcodes():
        end = kept[d - 1] + 1 if d > c else done
        pieces += [(reading[k], GREY if not folded[k] else BLACK if tag == "equal" else RED) for k in range(done, end)]
        pieces += [("_", RED)] * (b - a - d + c)
        done = end
    return pieces + [(c, GREY) for c in reading[done:]]


def draw_errors(wrong, protocol, path, most=48):
    """wrong: (confidence, source, index, truth, reading); the most confident first: image, truth, reading and its confidence."""
    wrong = sorted(wrong, key=lambda row: -row[0])[:most]
    rows = [[(None, [("image", GREY)]), (None, [("truth", GREY)]), (None, [("reading", GREY)])]]
    for confidence, source, i, truth, reading in wrong:
        rows.append([(source.get(i).image, [(f"{source.where(i)}  {confidence:.3f}", GREY)]), (None, [(truth, BLACK)]),
                     (None, marked(truth, reading, protocol))])
    draw_sheet(rows, path)


@torch.inference_mode()
def look(recognizer, images):
    """Where the network looks: [cls] (B, N), every patch (B, N, N), every letter read (B, T, N), and the letters' ids. The first two are
    the encoder's last block, the third is the decoder's last cross-attention; mean over heads; what falls on [cls] is left out,
    so each row sums to 1 over the patches."""
    images = data.normalize(images)
    own = recognizer.encoder.attention(images).mean(1)[:, :, 1:]
    own = own / own.sum(-1, keepdim=True)
    ids, _, letters = recognizer.decode(images, attention=True)
    return own[:, 0], own[:, 1:], letters, ids


def measure_attention(reader, source, most=256, chunk=16):
    """On rendered words, whose text pixels are known: the share of attention that falls on text, attention being spread evenly within
    a patch, and its entropy over log N (1: spread over everything). `text_area` is the share that blind attention would have.
    The first `most` words; letters are those read, the end not counted. None where no mask is known."""
    sums, area, crops, encoder = {}, 0.0, 0, reader.model.encoder
    for start in range(0, min(most, len(source)), chunk):
        batch = [source.get(i) for i in range(start, min(start + chunk, most, len(source)))]
        if any(crop.mask is None for crop in batch):
            return None
        text = torch.stack([crop.mask for crop in batch]).to(reader.device) > 0
        text = F.avg_pool2d(text[:, None].float(), encoder.patch).flatten(1)                 # (B, N) share of text in each patch
        cls, patches, letters, ids = look(reader.model, torch.stack([crop.image for crop in batch]).to(reader.device))
        crops, area = crops + len(batch), area + text.mean(1).sum().item()
        for name, weights in {"cls": cls[:, None], "patches": patches, "decoder": letters}.items():
            share = (weights * text[:, None]).sum(-1)                                        # (B, queries)
            entropy = -torch.xlogy(weights, weights).sum(-1) / math.log(weights.shape[-1])
            asked = ids != reader.model.end if name == "decoder" else torch.ones_like(share, dtype=torch.bool)
            sums[name] = [a + b for a, b in zip(sums.get(name, (0, 0, 0)), (share[asked].sum().item(), entropy[asked].sum().item(),
                                                                            asked.sum().item()))]
    return {"n": crops, "text_area": area / crops, **{name: {"share": s / n if n else None, "entropy": e / n if n else None}
                                                      for name, (s, e, n) in sums.items()}}


def draw_attention(reader, source, path, most=16, columns=6):
    """For each crop: itself, what [cls] looks at, what each letter looks at; red on grey, on one scale for the whole sheet. Returns the
    weight of full red, in shares of an even spread."""
    crops = []
    for i in range(len(source)):
        try:
            crops.append(source.get(i)[:2])
        except Damaged:
            continue                        # the table has counted it
        if len(crops) == most:
            break
    images = torch.stack([image for image, _ in crops])
    cls, _, letters, ids = look(reader.model, images.to(reader.device))
    named = [[reader.model.charset[k] for k in row if k != reader.model.end] for row in ids.tolist()]
    maps = [torch.cat([one[None], more[:len(word)]]).cpu() for one, more, word in zip(cls, letters, named)]    # (1 + letters, N)
    full = torch.cat(maps).flatten().quantile(0.995).item()
    h, w = reader.model.encoder.grid
    rows = []
    for (image, label), weights, word in zip(crops, maps, named):
        heat = F.interpolate((weights / full).clamp(max=1).view(-1, 1, h, w), size=(H, W), mode="nearest")    # (1 + letters, 1, H, W)
        ground = 255 - (255 - image.float().mean(0)) / 2
        drawn = torch.lerp(ground.expand(len(heat), 3, H, W), torch.tensor(RED).float()[:, None, None], heat).byte()
        cells = [(image, [(label or "", BLACK)]), (drawn[0], [("[cls]", GREY)])]
        cells += [(picture, [(letter, BLACK)]) for picture, letter in zip(drawn[1:], word)]
        rows += [cells[k:k + columns] for k in range(0, len(cells), columns)]
    draw_sheet(rows, path)
    return full * h * w


def print_attention(looks):
    for name, one in looks.items():
        if one is None:
            print(f"{name}: where its text lies is not known, so no share of attention; type --data synth:256 for that")
            continue
        print(f"\nattention on {one['n']} rendered words of {name}: text covers {100 * one['text_area']:.1f} % of the crop")
        for who in ("cls", "patches", "decoder"):
            if one[who]["share"] is not None:
                print(f"{who:10}{100 * one[who]['share']:6.1f} % on text   entropy {one[who]['entropy']:.3f} (1: even spread)")


# ---- main

def parse():
    parser = data.Parser(description="Reads words with a fine-tuned recognizer and scores them under the field's protocols.")
    add = parser.add_argument
    add("--ckpt", help="best.pt or last.pt of finetune.py; charset and sizes are in it")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", nargs="+", metavar="SRC", help="labelled sets, each an LMDB folder or a tree of them, a labels file, or "
                      "synth:N (rendered words in the checkpoint's charset); one row of the table each")
    what.add_argument("--images", nargs="+", metavar="FILE", help="image files to read; prints path, text, confidence")
    what.add_argument("--score", metavar="FILE", help="lines of label<TAB>prediction from any system; needs no --ckpt")
    add("--protocol", choices=PROTOCOLS, default="waics", help="how labels and readings are folded; waics is what papers print")
    add("--json", metavar="FILE", help="write the results here")
    add("--predictions", metavar="FILE", help="write every label, reading, confidence and place here; --score reads it back")
    add("--heights", nargs="+", type=int, default=[], help="read crops reduced to these heights too; 8 is where models differ")
    add("--rotations", nargs="+", type=float, default=[], help="read crops turned by these degrees too, counter-clockwise")
    add("--attention", metavar="DIR", help="draw where the network looks, for 16 crops a set; use synth:256 for the share on text")
    add("--errors", metavar="FILE", help="draw the 48 most confident errors here")
    add("--batch_size", type=int, default=128, help="crops read at once, for each process; lower it if memory runs out")
    add("--workers", type=int, default=min(4, os.cpu_count()), help="processes that decode images, for each rank; 0 for tiny sets")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps; auto takes a GPU if there is one")
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of matrix products; bfloat16 is faster, but a "
        "reading may then change with the batch it is in")
    add("--fonts", help="a folder of .ttf or .otf files for synth, besides those of the system")
    add("--rotate_tall", action="store_true", help="turn crops much taller than wide; for data with vertical words")
    args = parser.parse_args()
    if not args.score and not args.ckpt:
        parser.error("--ckpt is missing; type the checkpoint of finetune.py, such as out/finetune/best.pt")
    for flag in ("json", "predictions", "heights", "rotations", "attention", "errors"):
        if getattr(args, flag) and not args.data and not (args.score and flag == "json"):
            parser.error(f"--{flag} needs --data" + " or --score" * (flag == "json"))
    if args.batch_size < 1 or args.workers < 0:
        parser.error(f"--batch_size {args.batch_size} --workers {args.workers}: expected 1 or more, and 0 or more")
    if not all(1 <= height <= H for height in args.heights) or not all(-90 <= angle <= 90 for angle in args.rotations):
        parser.error(f"--heights {args.heights} --rotations {args.rotations}: expected 1 to {H} pixels, and -90 to 90 degrees")
    try:                                                         # now, and not after an hour of reading
        for path in filter(None, (args.json, args.predictions, args.errors)):
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            open(path, "a").close()
        if args.attention:
            os.makedirs(args.attention, exist_ok=True)
    except OSError as error:
        parser.error(f"{error.filename}: cannot be written: {error.strerror}")
    return args


def finish(result, args):
    print_table(result)
    for kind in ("heights", "rotations"):
        if kind in result:
            print_views(result, kind)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=1, ensure_ascii=False)


def read_images(reader, args):
    """--images: path, text, confidence. A file that cannot be read is named on stderr, and the exit status says so."""
    source = data.Files([(path, None) for path in args.images], "", "images", args.rotate_tall)
    rows, broken, _ = read_source(reader, source, args, {"": data.unit})
    for i, (_, (text, confidence)) in sorted(rows.items()):
        print(f"{args.images[i]}\t{text}\t{confidence:.6f}")
    if broken:
        raise UserError(f"{len(broken)} of {len(args.images)} images could not be read: " + "; ".join(broken))


def evaluate(reader, sources, args, rank, world):
    """Reads every set as it is and as --heights and --rotations have it, in one pass over the data; rank 0 scores, draws, writes."""
    views = {("sets", ""): data.unit}
    views.update({("heights", str(height)): lambda x, height=height: reduced(x, height) for height in args.heights})
    views.update({("rotations", f"{angle:g}"): lambda x, angle=angle: rotated(x, angle) for angle in args.rotations})
    scores, wrong, looks = {view: {} for view in views}, [], {}
    file = open(args.predictions, "w", encoding="utf-8", newline="\n") if args.predictions and rank == 0 else None
    for name, source in sources.items():
        rows, broken, seconds = read_source(reader, source, args, views, rank, world)
        if rank:
            continue
        labels = [rows[i][0] if i in rows else label_of(source, i) for i in range(len(source))]
        for k, view in enumerate(views, 1):
            readings = [rows[i][k] if i in rows else None for i in range(len(source))]
            scores[view][name] = dict(score(((a, b and b[0]) for a, b in zip(labels, readings)), args.protocol), seconds=seconds[view])
            if k == 1 and file:
                write_readings(file, ((a, b, source.where(i)) for i, (a, b) in enumerate(zip(labels, readings))))
            if k == 1 and args.errors:
                wrong += [(b[1], source, i, a, b[0]) for i, (a, b) in enumerate(zip(labels, readings)) if b and not
                          unfit(a, args.protocol) and normalize(a, args.protocol) != normalize(b[0], args.protocol)]
        for line in broken[:3]:
            print(f"damaged: {line}" + (f" (and {len(broken) - 3} more)" if len(broken) > 3 and line is broken[2] else ""))
        if args.attention and rows:
            path = os.path.join(args.attention, re.sub(r"[^\w.-]+", "_", name) + ".png")
            full = draw_attention(reader, source, path)
            print(f"{path}: full red is {full:.1f} times an even spread")
            looks[name] = measure_attention(reader, source)
    if file:
        file.close()
    if rank:
        return
    result = summary(scores["sets", ""], args.protocol)
    for kind, value in list(views)[1:]:
        result.setdefault(kind, {})[value] = summary(scores[kind, value], args.protocol)
    if args.attention:
        result["attention"] = {name: one for name, one in looks.items() if one}
        print_attention(looks)
    if args.errors:
        draw_errors(wrong, args.protocol, args.errors)
        print(f"{args.errors}: the {min(len(wrong), 48)} most confident of {len(wrong):,} errors")
    finish(result, args)


def main():
    args = parse()
    if args.score:
        start, pairs = time.perf_counter(), list(read_readings(args.score))
        if not pairs:
            raise UserError(f"--score {args.score}: holds no line; expected label<TAB>prediction")
        one = score(pairs, args.protocol)
        return finish(summary({os.path.basename(args.score): dict(one, seconds=time.perf_counter() - start)}, args.protocol), args)

    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = "cuda" if args.device == "auto" and torch.cuda.is_available() else args.device.replace("auto", "cpu")
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if device == "cuda" else device
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {args.device}: {str(error).splitlines()[0]}") from None
    reader = load_recognizer(args.ckpt, device, args.dtype)
    if args.images:
        return read_images(reader, args)
    options = dict(fonts=args.fonts, rotate_tall=args.rotate_tall, chars=reader.model.charset)
    found = [(src, data.open_source(src, **options)) for src in args.data]
    names = [source.name for _, source in found]
    sources = {source.name if names.count(source.name) == 1 else src.rstrip("/"): source for src, source in found}
    if len(sources) < len(found):
        raise UserError(f"--data {' '.join(args.data)}: the same set twice; each is one row of the table")
    if rank == 0:
        size = sum(p.numel() for p in reader.model.parameters())
        print(f"{' '.join(sys.argv)}\ntorch {torch.__version__}  {device} x{world}  {args.dtype}\n{size / 1e6:.2f} M parameters, "
              f"{len(reader.model.charset)} characters, {sum(map(len, sources.values())):,} crops in {len(sources)} sets")
    if world > 1:
        dist.init_process_group("gloo")     # nothing but readings travels, and those are on the CPU
    evaluate(reader, sources, args, rank, world)
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    data.run(main)
