"""Reads words with a fine-tuned recognizer and scores the readings.

    python evaluate.py --ckpt out/finetune/best.pt --data bench/IIIT5k_3000 bench/SVT --json r.json
    python evaluate.py --ckpt out/finetune/best.pt --images a.png b.jpg
    python evaluate.py --score preds.tsv --protocol waics
    torchrun --nproc_per_node=8 evaluate.py --ckpt out/finetune/best.pt --data bench/SVT

--data prints a table of labelled test sets. --images prints path, text and confidence. --score
takes lines of label<TAB>prediction, which may come from any system. From Python:

    net = evaluate.load_recognizer("best.pt")
    net.read(images)                # uint8 (B, 3, 32, 128) -> [(text, confidence)]
"""
import difflib
import json
import math
import os
import re
import sys
import time
import unicodedata
from collections import Counter, namedtuple

import torch
import torch.distributed as dist
import torch.nn.functional as F

import data
import model
from common import (
    H, W, Parser, UserError, check_data_flags, load_state, number_in, pick_device, pick_dtype,
    rank, read_checkpoint, run_main, say, to_device, to_unit, typed_flags, world_size,
)
from data import BLACK, GREY, RED, Damaged, draw_sheet

# What is written on a crop, what was read, and how sure that is: the product of the
# probabilities of its letters and its end.
Reading = namedtuple("Reading", "label text confidence")
DAMAGED = Reading("", None, 0)                  # of a crop that could not be read


# ---- protocols and scores

# A protocol says which differences between a label and a reading do not count.
PROTOCOLS = {
    "exact": "composed and decomposed Unicode are the same (NFC), nothing else is; spaces count",
    "ci": "as exact, but in lower case; spaces count",
    "waics": "only ASCII letters and digits count, in lower case; spaces and symbols do not",
    "parseq36": "PARSeq's: no spaces, NFKD to ASCII, labels over 25 characters dropped, "
                "0-9 and a-z kept, labels that are then empty dropped",
    "zh": "FudanVI's: lower case, no spaces, full width to half; "
          "traditional is not made simplified, lacking a table",
}
PARSEQ_LONGEST = 25                             # characters, counted after NFKD
LETTERS_AND_DIGITS = data.CHARSETS["62"]        # ASCII's, in both cases

# Full-width characters and their half-width forms: U+FF01 to U+FF5E are ASCII's "!" to "~".
HALF_WIDTH = {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}
HALF_WIDTH[0x3000] = " "


def default_protocol(charset):
    """waics, as in papers. It keeps ASCII alone, so exact for a charset of one's own."""
    if charset in data.CHARSETS.values():
        return "waics"
    return "exact"


def normalize(text, protocol):
    """The form in which a label and a reading are compared. UserError for an unknown protocol."""
    if protocol == "exact":
        return unicodedata.normalize("NFC", text)
    if protocol == "ci":
        return unicodedata.normalize("NFC", text).lower()
    if protocol == "waics":
        # LMIM's order: first the filter, then lower case. The other way round a Kelvin sign would
        # become a k. mmocr does that, and keeps Chinese, and "^" by a slip in its pattern.
        return keep_letters_and_digits(text).lower()
    if protocol == "parseq36":
        return keep_letters_and_digits(to_ascii(text)).lower()
    if protocol == "zh":
        # FudanVI's order: the space goes before full width becomes half. So an ideographic space
        # (U+3000) turns into a space that stays and counts.
        return text.lower().replace(" ", "").translate(HALF_WIDTH)
    raise UserError(f"protocol {protocol}: expected one of {' '.join(PROTOCOLS)}")


def keep_letters_and_digits(text):
    return "".join(char for char in text if char in LETTERS_AND_DIGITS)


def to_ascii(text):
    """PARSeq's first steps: no whitespace, accents apart from their letters (NFKD), ASCII alone."""
    without_spaces = "".join(text.split())
    decomposed = unicodedata.normalize("NFKD", without_spaces)
    return decomposed.encode("ascii", "ignore").decode()


def edit_distance(a, b):
    """Levenshtein distance: the fewest letters to insert, delete or replace that turn a into b.

    Dynamic programming, one row after the other: row[j] is the distance from a[:i] to b[:j]."""
    row = list(range(len(b) + 1))               # i = 0: all of b[:j] is inserted
    for i, letter in enumerate(a, 1):
        above = row
        row = [i]                               # j = 0: all of a[:i] is deleted
        for j, other in enumerate(b, 1):
            replaced = above[j - 1]
            if letter != other:
                replaced += 1
            deleted = above[j] + 1
            inserted = row[j - 1] + 1
            row.append(min(replaced, deleted, inserted))
    return row[-1]


def reason_to_drop(label, text, protocol):
    """Why a word is not scored, or None. A text of None stands for a damaged crop."""
    if text is None:
        return "damaged"
    if protocol == "parseq36" and len(to_ascii(label)) > PARSEQ_LONGEST:
        return f"longer than {PARSEQ_LONGEST}"
    if protocol == "parseq36" and normalize(label, protocol) == "":
        return "no letter or digit"
    return None


def score(pairs, protocol):
    """(label, text) pairs -> {"n", "evaluated", "dropped": {reason: count}, "accuracy", "ned"}.

    accuracy: how many are equal when normalized, in percent. ned: PARSeq's 1 - NED, the mean of
    1 - distance / length of the longer word, in percent. `n` counts the dropped words too.

    Only parseq36 drops labels. In waics a label without letters and digits stays, as in LMIM's
    code, and a reading without any is right. Where all labels are such (another script, say),
    the figures would mean nothing, and are None."""
    n, right, letters = 0, 0, 0
    dropped = Counter()                         # {reason: how often}
    nearness = []                               # 1 - distance / length of the longer word
    for label, text in pairs:
        n += 1
        reason = reason_to_drop(label, text, protocol)
        if reason is not None:
            dropped[reason] += 1
            continue

        truth = normalize(label, protocol)
        reading = normalize(text, protocol)
        letters += len(truth)
        if truth == reading:
            right += 1
            nearness.append(1)                  # two empty words are equal as well
        else:
            longer = max(len(truth), len(reading))
            nearness.append(1 - edit_distance(truth, reading) / longer)

    evaluated = len(nearness)
    accuracy, ned = None, None
    if letters > 0:
        accuracy = 100 * right / evaluated
        ned = 100 * sum(nearness) / evaluated
    return {"n": n, "evaluated": evaluated, "dropped": dict(dropped),
            "accuracy": accuracy, "ned": ned}


def read_predictions(path):
    """A file of lines label<TAB>prediction -> [(label, prediction)]; UserError for any other file.

    Further columns are passed over. But --predictions writes "damaged" into the third where a crop
    could not be read: there the prediction is None."""
    expected = "expected lines of label<TAB>prediction in UTF-8"
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as file:
            lines = file.readlines()
    except OSError as error:
        raise UserError(f"--score {path}: {error.strerror}; {expected}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--score {path}: {error}; {expected}") from None

    pairs = []
    for number, line in enumerate(lines, 1):
        line = line.rstrip("\r\n")
        if line == "":
            continue
        columns = line.split("\t")
        if len(columns) == 1:
            raise UserError(f"--score {path}: line {number} has no tab; {expected}")
        label, prediction = columns[:2]
        if columns[2:3] == ["damaged"]:
            prediction = None
        pairs.append((label, prediction))
    if not pairs:
        raise UserError(f"--score {path}: no line in it; {expected}")
    return pairs


# ---- table

def is_incomplete(name):
    """Union14M's set Incomplete is reported by itself: no average has it."""
    return "incomplete" in name.lower()


def summarize(sets, protocol):
    """{set: its score} -> what --json holds. `average` is the mean over sets, `weighted` the mean
    over their words. A set without an accuracy is in neither."""
    accuracies, words = [], []
    for name, row in sets.items():
        if row["accuracy"] is not None and not is_incomplete(name):
            accuracies.append(row["accuracy"])
            words.append(row["evaluated"])

    average, weighted = None, None
    if accuracies:
        average = sum(accuracies) / len(accuracies)
        total = sum(n * accuracy for n, accuracy in zip(words, accuracies))
        weighted = total / sum(words)
    return {"protocol": protocol, "sets": sets, "average": average, "weighted": weighted}


def print_table(result):
    """Prints what `summarize` returned: a row a set, then both averages. Then, if they are in it,
    a table for each of --heights and --rotations."""
    sets = result["sets"]
    width = max(10, max(map(len, sets))) + 1
    print(f"\nprotocol {result['protocol']}: {PROTOCOLS[result['protocol']]}")
    print_row(width, "set", "n", "evaluated", "accuracy", "1-NED", "seconds")
    for name, row in sets.items():
        cells = [row[key] for key in ("n", "evaluated", "accuracy", "ned", "seconds")]
        print_row(width, name, *cells, *table_notes(name, row))
    print_row(width, "average", "", "", result["average"])
    print_row(width, "weighted", "", "", result["weighted"])

    for key, title in (("heights", "height"), ("rotations", "rotation")):
        for value, view in result.get(key, {}).items():
            print(f"\n{title} {value}, and the change")
            for name, row in view["sets"].items():
                print_change(width, name, row["accuracy"], sets[name]["accuracy"])
            print_change(width, "average", view["average"], result["average"])


def table_notes(name, row):
    """What has to be said at the end of a set's row."""
    notes = [f"   {n:,} dropped: {reason}" for reason, n in row["dropped"].items()]
    if is_incomplete(name):
        notes.append("   not averaged")
    if row["accuracy"] is None and row["evaluated"] > 0:
        notes.append("   no label has what counts")
    return notes


def print_change(width, name, accuracy, plain_accuracy):
    """A row of another view: its accuracy, and by how much it differs from that of plain crops."""
    change = None
    if accuracy is not None and plain_accuracy is not None:
        change = f"{accuracy - plain_accuracy:+.2f}"
    print_row(width, name, "", "", accuracy, change)


def print_row(width, name, *cells):
    """The name in `width` columns, then each cell in ten: - for None, two decimals for a float."""
    line = name.ljust(width)
    for cell in cells:
        if cell is None:
            cell = "-"
        elif isinstance(cell, float):
            cell = f"{cell:.2f}"
        line += str(cell).rjust(10)
    print(line.rstrip())


# ---- reading

def load_recognizer(path, device="cpu"):
    """A checkpoint of finetune.py -> model.Recognizer; UserError if the file is none."""
    checkpoint = read_checkpoint(path)
    if not is_recognizer(checkpoint):
        raise UserError(f"{path}: not a recognizer; expected a checkpoint of finetune.py")
    args = checkpoint["args"]
    sizes = model.MODELS[args["model"]]
    encoder = model.ViT(**sizes["encoder"])
    net = model.Recognizer(encoder, checkpoint["charset"], args["max_length"],
                           spell=args["spell"], **sizes["reader"])
    load_state(net, checkpoint["model"], path)
    return net.to(device).eval()


def is_recognizer(checkpoint):
    """True if a checkpoint holds all that a recognizer is made from."""
    args = checkpoint.get("args")
    if not isinstance(args, dict):
        return False
    if not {"max_length", "spell"} <= set(args):
        return False
    if not {"charset", "model"} <= set(checkpoint):             # "model": the weights
        return False
    return args.get("model") in model.MODELS                    # "model": the name of a size


def read_source(read, source, batch_size, workers, group=None):
    """Reads every crop once. The ranks share the work, and each returns what all of them read.

    read: a function, crops uint8 (B, 3, 32, 128) -> [(text, confidence)]. group: over which the
    ranks exchange readings; None is torch's default group.
    -> a Reading for every crop, in the source's order, and a line for every damaged crop that
    says where it is and why."""
    found = {}                                  # {place in the source: Reading}
    broken = []
    for batch in data.read_all(source, batch_size, workers):
        broken += batch.damaged
        if len(batch.images) == 0:
            continue
        words = read(batch.images)
        for place, label, (text, confidence) in zip(batch.places, batch.labels, words):
            found[place] = Reading(label, text, confidence)

    if world_size() > 1:
        parts = [None] * world_size()
        dist.all_gather_object(parts, (found, broken), group=group)
        found, broken = {}, []
        for found_by_rank, broken_by_rank in parts:
            found.update(found_by_rank)
            broken += broken_by_rank
    readings = [found.get(place, DAMAGED) for place in range(len(source))]
    return readings, broken


def check_labels(source, predictions):
    """UserError for a crop without a label, and for a label that a line of the file --predictions
    cannot hold. This is known before an hour of reading and not after it."""
    for i in range(len(source)):
        try:
            label = source.label(i)
        except Damaged:                         # read_source will count it
            continue
        if label is None:
            raise UserError(f"{source.where(i)}: no label; expected labelled crops: "
                            "only --images reads without")
        if predictions and ("\t" in label or "\n" in label):
            raise UserError(f"{source.where(i)}: {label!r} holds a tab or line end: "
                            "no --predictions of it")


def read_sets(net, sources, protocol, args, view=None, value=None):
    """Reads and scores every set -> {name: its score}, {name: its Readings}. If a view is given,
    not the crops are read but view(crops, value)."""
    device = net.pos.device
    dtype = pick_dtype(args.dtype, device)

    def read(images):
        if view is not None:
            images = view(to_unit(to_device(images, device)), value)
        return net.read(images, args.batch_size, dtype)

    scores, readings = {}, {}
    for name, source in sources.items():
        start = time.perf_counter()
        readings[name], broken = read_source(read, source, args.batch_size, args.workers)
        pairs = [(reading.label, reading.text) for reading in readings[name]]
        scores[name] = score(pairs, protocol)
        scores[name]["seconds"] = time.perf_counter() - start
        if view is None:                        # with a view the same crops are damaged
            for line in broken[:5]:
                say(f"damaged: {line}")
    return scores, readings


# ---- robustness

def read_views(net, sources, protocol, args, view, values):
    """Reads view(crops, value) of every set, for each value -> {value: summary}."""
    results = {}
    for value in values:
        scores, _ = read_sets(net, sources, protocol, args, view, value)
        results[f"{value:g}"] = summarize(scores, protocol)
    return results


def reduce_height(images, height):
    """Crops as they would be if their originals were `height` pixels high: made smaller, their
    shape kept, and enlarged again, bicubically. (B, 3, H, W) in [0, 1] -> the same."""
    small = F.interpolate(images, size=(height, height * W // H), mode="bilinear", antialias=True)
    return F.interpolate(small, size=(H, W), mode="bicubic").clamp(0, 1)


def rotate(images, degrees):
    """Crops turned counter-clockwise on a canvas that grows until they fit, then squeezed into
    32 x 128 again. The new corners are filled with the nearest pixels of the crop.
    (B, 3, H, W) in [0, 1] -> the same.

    Each pixel is the mean of 4 x 4 points, so that 0 changes nothing and 30 does not alias."""
    angle = torch.full((len(images),), math.radians(degrees), device=images.device)
    corners = data.turned(angle, W / H)
    large = F.interpolate(images, scale_factor=4)
    return data.coarse_view(data.warp(large, corners), (H, W))


# ---- pictures of attention

N_DRAWN = 16                    # crops in the picture
N_MEASURED = 256                # rendered words over which the share on text is measured
CELLS_IN_A_ROW = 6
FULL_RED_QUANTILE = 0.995       # of all patches: what is above it is drawn as full red
FULL_RED_AT_LEAST = 4           # times an even spread, or faint attention would look strong


def inputs_of(layer, call, *arguments):
    """Runs call(*arguments) and returns what `layer`, a part of it, was given. Before a layer's
    forward torch calls its hooks with the same inputs; ours keeps them."""
    caught = []

    def keep(layer, inputs):
        caught.append(inputs)

    hook = layer.register_forward_pre_hook(keep)
    call(*arguments)
    hook.remove()
    return caught[0]


def attention_weights(q, k):
    """softmax(q k' / sqrt(d)) of (B, heads, T, d) and (B, heads, S, d), mean over the heads:
    (B, T, S). The layers themselves never keep it."""
    scores = q.float() @ k.float().mT / math.sqrt(q.shape[-1])
    return scores.softmax(-1).mean(1)


def encoder_attention(net, images):
    """Where each token of the encoder's last block looks: (B, 1+N, 1+N), [cls] first."""
    layer = net.encoder.blocks[-1].attn
    (tokens,) = inputs_of(layer, net.encoder, images)           # (B, 1+N, D)
    q, k, _ = layer.queries_keys_values(tokens)
    return attention_weights(q, k)


def decoder_attention(net, images, ids):
    """Where the last layer's cross-attention looks for each letter: (B, T, N). The net is given
    the classes `ids` (B, T) that it read, as in training, and so sees all letters at once."""
    layer = net.layers[-1].cross_attn
    letters, (keys, _) = inputs_of(layer, net, images, ids)     # (B, T, D), (B, heads, N, d)
    return attention_weights(layer.queries(letters), keys)


@torch.inference_mode()
def attention(net, images):
    """Normalised crops -> ids (B, T), what is read; where the encoder looks (B, 1+N, 1+N); where
    the decoder looks (B, T, N)."""
    ids, _ = net.decode(images)
    return ids, encoder_attention(net, images), decoder_attention(net, images, ids)


def report_attention(net, source, path):
    """Draws where the net looks on the first crops of a source. On rendered words, whose text
    pixels are known, also measures how often that is text -> attention_on_text's dict, or None."""
    first = range(min(N_MEASURED, len(source)))
    batch = data.read_batch(first, source, char_maps=True)
    rendered = bool(batch.char_maps.any())
    images = batch.images
    if not rendered:                            # nothing to measure
        images = images[:N_DRAWN]
    if len(images) == 0:                        # all of them are damaged
        return None

    normalized = model.normalize_pixels(to_device(images, net.pos.device))
    ids, encoder, decoder = attention(net, normalized)
    encoder = encoder[:, :, 1:]                 # what falls on [cls] is nowhere in the picture
    encoder = encoder / encoder.sum(-1, keepdim=True)           # (B, 1+N, N), shares again

    draw_attention(net, images[:N_DRAWN], batch.labels, ids, encoder, decoder, path)
    if not rendered:
        return None
    return attention_on_text(net, batch.char_maps, ids, encoder, decoder, source.name)


def draw_attention(net, images, labels, ids, encoder, decoder, path):
    """For each crop a row: the crop, where [cls] looks, where each letter looks. encoder
    (B, 1+N, N), decoder (B, T, N). Red has one scale for the whole picture."""
    h, w = net.encoder.grid
    words, heats = [], []
    for k in range(len(images)):
        word = [net.charset[i] for i in ids[k].tolist() if i != net.end]
        cls, letters = encoder[k, :1], decoder[k, :len(word)]
        words.append(word)
        heats.append(torch.cat([cls, letters]).cpu())           # (1 + letters, N)

    even = 1 / (h * w)
    full_red = torch.cat(heats).quantile(FULL_RED_QUANTILE).item()
    full_red = max(full_red, FULL_RED_AT_LEAST * even)

    rows = []
    for image, label, word, heat in zip(images, labels, words, heats):
        heat = (heat / full_red).clamp(max=1).view(-1, 1, h, w)
        cells = [(image, [(label or "", BLACK)])]
        for picture, title in zip(paint_red(image, heat), ["[cls]", *word]):
            cells.append((picture, [(title, GREY)]))
        for start in range(0, len(cells), CELLS_IN_A_ROW):
            rows.append(cells[start:start + CELLS_IN_A_ROW])
    draw_sheet(rows, path)
    print(f"{path}: full red is {full_red / even:.1f} times an even spread")


def paint_red(image, heat):
    """A crop (3, H, W) in pale grey, and over it each heat (n, 1, h, w): 0 leaves it grey, 1 is
    red -> uint8 (n, 3, H, W)."""
    heat = F.interpolate(heat, size=(H, W))                     # a whole patch has one colour
    grey = 127 + image.float().mean(0) / 2                      # (H, W)
    red = torch.tensor(RED).float().view(3, 1, 1)
    pictures = (1 - heat) * grey + heat * red
    return pictures.byte()


def attention_on_text(net, char_maps, ids, encoder, decoder, name):
    """How much of the attention falls on text, and how widely it is spread -> a dict.

    char_maps (B, H, W) is above 0 on text; encoder (B, 1+N, N), decoder (B, T, N). Within a patch
    attention counts as even, so the share of blind attention is `text_area`. The entropy is
    divided by log N: 1 is all over the picture, 0 is on one patch."""
    on_text = (char_maps > 0).float().unsqueeze(1)              # (B, 1, H, W)
    text = F.avg_pool2d(on_text, net.encoder.patch).flatten(2)  # (B, 1, N), share of each patch
    text = text.to(encoder.device)
    n, N = len(text), text.shape[-1]
    text_area = text.mean().item()
    print(f"attention on {n} rendered words of {name}; text is {text_area:.3f} of the area")

    found = {"n": n, "text_area": text_area}
    looks = {"cls": encoder[:, :1], "patches": encoder[:, 1:], "decoder": decoder}
    for who, weights in looks.items():
        share = (weights * text).sum(-1)                        # (B, 1 or N or T)
        entropy = -torch.xlogy(weights, weights).sum(-1) / math.log(N)
        if who == "decoder":
            is_letter = ids != net.end
            if not is_letter.any():                             # nothing was read
                continue
            share = share[is_letter]
            entropy = entropy[is_letter]
        share = share.mean().item()
        entropy = entropy.mean().item()
        found[who] = {"share": share, "entropy": entropy}
        print(f"  {who:8} {share:.3f} on text, entropy {entropy:.3f}")
    return found


# ---- pictures of errors

N_ERRORS = 48                   # the most confident ones


def draw_errors(sources, readings, protocol, path):
    """Draws wrongly read crops, the most confident first: image, truth, reading."""
    wrong = []
    for name in sources:
        for place, reading in enumerate(readings[name]):
            if is_wrong(reading, protocol):
                wrong.append((name, place, reading))
    wrong.sort(key=lambda error: error[2].confidence, reverse=True)

    # a row of the sheet is a list of cells: (picture or None, [(text, colour), ...])
    rows = [[(None, [(title, GREY)]) for title in ("image", "truth", "reading")]]
    for name, place, (label, text, confidence) in wrong[:N_ERRORS]:
        source = sources[name]
        caption = f"{source.where(place)}   {confidence:.3f}"
        image = (source.get(place).image, [(caption, GREY)])
        truth = (None, [(label, BLACK)])
        reading = (None, mark_errors(label, text, protocol))
        rows.append([image, truth, reading])
    draw_sheet(rows, path)
    print(f"{path}: the {len(rows) - 1} most confident of {len(wrong):,} errors")


def is_wrong(reading, protocol):
    """True for a word that is scored and not read right."""
    label, text, _ = reading
    if reason_to_drop(label, text, protocol) is not None:
        return False
    return normalize(label, protocol) != normalize(text, protocol)


def mark_errors(label, text, protocol):
    """A reading, normalized, in pieces (letters, colour): wrong letters are red, and so is a _ for
    each letter that is missing."""
    truth, reading = normalize(label, protocol), normalize(text, protocol)
    pieces = []
    matcher = difflib.SequenceMatcher(None, truth, reading, autojunk=False)
    for kind, i1, i2, j1, j2 in matcher.get_opcodes():          # truth[i1:i2] is reading[j1:j2]
        colour = BLACK if kind == "equal" else RED
        missing = (i2 - i1) - (j2 - j1)
        pieces.append((reading[j1:j2], colour))
        if missing > 0:
            pieces.append(("_" * missing, RED))
    return pieces


# ---- the command

def add_flags(parser):
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", nargs="+", metavar="SRC",
        help="labelled sets, a row each: an LMDB folder or a tree of them, a labels file, "
        "synth:N for rendered words in the checkpoint's charset")
    what.add_argument("--images", nargs="+", metavar="FILE",
        help="image files to read: prints path, text, confidence")
    what.add_argument("--score", metavar="FILE",
        help="lines of label<TAB>prediction, from any system; needs no --ckpt")
    add = parser.add_argument
    add("--ckpt", metavar="FILE",
        help="best.pt or last.pt of finetune.py; it holds charset and sizes")
    add("--protocol", choices=PROTOCOLS,
        help="how labels and readings are compared; left out: waics, as in papers, "
        "but exact for a checkpoint with your own charset")
    add("--json", metavar="FILE", help="write the results here")
    add("--predictions", metavar="FILE",
        help="write label, reading, confidence, place here; --score reads it back")
    add("--heights", nargs="+", type=number_in(f"[1, {H}]", int), default=[],
        help="read crops reduced to these heights too; 8 is hard")
    add("--rotations", nargs="+", type=number_in("(-90, 90)"), default=[],
        help="read crops turned by these degrees too, leftwards")
    add("--attention", metavar="DIR",
        help="draw where the network looks; on synth:256 also its share on text")
    add("--errors", metavar="FILE", help=f"draw the {N_ERRORS} most confident errors here")
    add("--batch_size", type=number_in("[1, inf)", int), default=128,
        help="crops read at once by each process; lower it if memory runs out")
    add("--workers", type=number_in("[0, inf)", int), default=min(4, os.cpu_count()),
        help="processes that decode, for each rank; 0 for a handful of crops")
    add("--device", default="auto",
        help="cpu, cuda, cuda:1; auto takes a CUDA GPU if there is one")
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="float32",
        help="half is faster, less exact")
    add("--fonts", help="a folder of .ttf or .otf files for synth, besides those of the system")
    add("--rotate_tall", action="store_true",
        help="turn crops much taller than wide; for data with vertical words")


# Flags that are about labelled sets, and flags about crops of any kind.
NEED_DATA = ("predictions", "heights", "rotations", "attention", "errors", "fonts")
NEED_CROPS = ("ckpt", "batch_size", "workers", "device", "dtype", "rotate_tall")


def check_flags(parser, args):
    """Ends with one line if a flag is missing, or has no effect with the others."""
    typed = typed_flags()
    for name in NEED_DATA:
        if name in typed and not args.data:
            parser.error(f"--{name} needs --data; name labelled sets, or leave it out")
    for name in NEED_CROPS:
        if name in typed and args.score:
            parser.error(f"--{name} has no effect with --score, which reads no crop; leave it out")
    if args.images and "protocol" in typed:
        parser.error("--protocol has no effect with --images, which scores nothing; leave it out")
    if args.images and args.json:
        parser.error("--json needs --data or --score; --images prints what it reads")
    if not args.score and not args.ckpt:
        parser.error("--ckpt is missing; type finetune.py's, such as out/finetune/best.pt")
    if args.errors and not args.errors.lower().endswith(data.SUFFIXES):
        parser.error(f"--errors {args.errors}: expected a picture's name, such as errors.png")
    if args.data:
        check_sets(parser, args)


def check_sets(parser, args):
    """The same for what --data names."""
    check_data_flags(parser, args)
    if len(set(map(os.path.realpath, args.data))) < len(args.data):
        parser.error(f"--data {' '.join(args.data)}: one set twice; each is one row of the table")


def open_sets(args, charset):
    """--data -> {name: source}. A set is named by its folder or file; if that name is taken, by its
    path as it was typed; if that is taken too, by its whole path."""
    sources = {}
    for src in args.data:
        source = data.open_source(
            src, fonts=args.fonts, rotate_tall=args.rotate_tall, chars=charset)
        name = source.name
        if name in sources:
            name = src.rstrip("/")
        if name in sources:
            name = os.path.abspath(src)
        sources[name] = source
    return sources


def prepare_files(args):
    """Makes the files and folders that will be written. If one cannot be, this is known now and
    not after an hour of reading."""
    for path in (args.json, args.predictions, args.errors):
        if path:
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            open(path, "a").close()             # what is in it stays until there is a result
    if args.attention:
        os.makedirs(args.attention, exist_ok=True)


def write_predictions(sources, readings, path):
    """Lines of label, text, confidence and where the crop is. "damaged" stands for a confidence."""
    with open(path, "w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
        for name, source in sources.items():
            for place, (label, text, confidence) in enumerate(readings[name]):
                confidence = f"{confidence:.6g}"
                if text is None:
                    text, confidence = "", "damaged"
                columns = [label, text, confidence, source.where(place)]
                file.write("\t".join(columns) + "\n")


def write_json(result, path):
    """Half of a letter, as in a file's name that is not UTF-8, is written as JSON does: \\udcff."""
    with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:
        json.dump(result, file, indent=1, ensure_ascii=False)


def score_file(args):
    """--score: the table of a file of predictions."""
    start = time.perf_counter()
    protocol = args.protocol or "waics"
    row = score(read_predictions(args.score), protocol)
    row["seconds"] = time.perf_counter() - start
    result = summarize({os.path.basename(args.score): row}, protocol)
    print_table(result)
    prepare_files(args)
    if args.json:
        write_json(result, args.json)


def read_images(net, args):
    """--images: path, text and confidence of each, on a line. Ends with an error if one cannot be
    read, once all the others are printed."""
    entries = [(path, None) for path in args.images]
    source = data.Files(entries, "", "--images", args.rotate_tall)
    dtype = pick_dtype(args.dtype, net.pos.device)

    def read(images):
        return net.read(images, args.batch_size, dtype)

    readings, broken = read_source(read, source, args.batch_size, args.workers)
    if rank() > 0:
        return
    for path, (_, text, confidence) in zip(args.images, readings):
        if text is not None:
            print(f"{path}\t{text}\t{confidence:.6g}")
    if broken:
        raise UserError(f"{len(broken)} of {len(args.images)} could not be read: "
                        + "; ".join(broken))


def main():
    parser = Parser(description=__doc__.split("\n\n")[0])
    add_flags(parser)
    args = parser.parse_args()
    check_flags(parser, args)

    if args.score:
        if rank() == 0:                         # one process is enough
            score_file(args)
        return

    device = pick_device(args.device)
    net = load_recognizer(args.ckpt, device)
    if world_size() > 1:
        dist.init_process_group("gloo")         # only readings travel, from processor to processor
    if args.images:
        read_images(net, args)
        return

    protocol = args.protocol or default_protocol(net.charset)
    sources = open_sets(args, net.charset)
    for source in sources.values():
        check_labels(source, args.predictions)
    prepare_files(args)

    parameters = sum(p.numel() for p in net.parameters())
    crops = sum(map(len, sources.values()))
    say(" ".join(sys.argv))
    say(f"torch {torch.__version__}  {device} x{world_size()}  {args.dtype}")
    say(f"{parameters / 1e6:.2f} M parameters, {len(net.charset)} characters, {crops:,} crops")

    scores, readings = read_sets(net, sources, protocol, args)
    result = summarize(scores, protocol)
    if args.heights:
        result["heights"] = read_views(
            net, sources, protocol, args, reduce_height, args.heights)
    if args.rotations:
        result["rotations"] = read_views(
            net, sources, protocol, args, rotate, args.rotations)
    if rank() > 0:
        return

    print_table(result)                         # first, whatever becomes of the files
    if args.predictions:
        write_predictions(sources, readings, args.predictions)
    if args.errors:
        draw_errors(sources, readings, protocol, args.errors)
    if args.attention:
        result["attention"] = {}
        for name, source in sources.items():
            file = re.sub(r"[^\w.-]", "_", name) + ".png"
            found = report_attention(net, source, os.path.join(args.attention, file))
            if found:
                result["attention"][name] = found
    if args.json:
        write_json(result, args.json)


if __name__ == "__main__":
    run_main(main)
