"""Reads words with a fine-tuned recognizer and scores the readings.

    python evaluate.py --images a.png folder
    python evaluate.py --ckpt out/finetune/best.pt --data bench/IIIT5k_3000 bench/SVT --json r.json
    python evaluate.py --score preds.tsv --protocol waics
    torchrun --nproc_per_node=8 evaluate.py --ckpt out/finetune/best.pt --data bench/SVT

--data prints a table of labelled test sets. --images prints path, text and confidence. --score
takes lines of label<TAB>prediction, which may come from any system. Without --ckpt the weights
that come with this repository read. From Python:

    net = evaluate.load_recognizer("best.pt")
    net.read(images)                # uint8 (B, 3, 32, 128) -> [(text, confidence)]
"""
import contextlib
import difflib
import itertools
import json
import math
import os
import pathlib
import re
import signal
import sys
import time
import unicodedata
from collections import Counter, namedtuple

if __name__ == "__main__":              # Ctrl-C while torch is loading ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import data
import model
from common import (
    H, W, Parser, UserError, check_data_flags, hush_output, join_ranks, load_state,
    number_in, pick_device, rank, read_checkpoint, run_main, say, to_device, to_unit, typed_flags,
    world_size,
)
from data import BLACK, GREY, RED, draw_sheet

# The weights that come with this repository, at half precision. Its "about" says what they were
# trained on.
SHIPPED = pathlib.Path(__file__).resolve().parent / "assets" / "reader.pt"

# label: what is written on a crop. text: what was read. confidence: how sure that is, the
# product of the probabilities of its characters and its end. Of a crop that could not be
# decoded nothing is known.
Reading = namedtuple("Reading", "label text confidence")
DAMAGED = Reading(None, None, None)


# ---- protocols and scores

PARSEQ_LONGEST = 25                             # characters, counted after NFKD

# Full-width characters and their half-width forms: U+FF01 to U+FF5E are ASCII's "!" to "~".
HALF_WIDTH = {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}
HALF_WIDTH[0x3000] = " "


def fold_exact(text):
    return unicodedata.normalize("NFC", text)


def fold_ci(text):
    return unicodedata.normalize("NFC", text.lower())


def fold_waics(text):
    """LMIM's order: first the filter, then lower case. The other way round a Kelvin sign would
    become a k. mmocr lowers first. Its filter also keeps Chinese and, by a slip, "^"."""
    return keep_letters_and_digits(text).lower()


def fold_parseq36(text):
    return keep_letters_and_digits(to_ascii(text)).lower()


def fold_zh(text):
    """FudanVI's order: the space goes before full width becomes half. So an ideographic space
    (U+3000) turns into a space that stays and counts."""
    return text.lower().replace(" ", "").translate(HALF_WIDTH)


def keep_letters_and_digits(text):
    return "".join(char for char in text if char in data.CHARSETS["62"])


def to_ascii(text):
    """PARSeq's first steps: no whitespace, accents apart from their letters (NFKD), ASCII alone."""
    without_spaces = "".join(text.split())
    decomposed = unicodedata.normalize("NFKD", without_spaces)
    return decomposed.encode("ascii", "ignore").decode()


# A protocol says which differences between a label and a reading do not count. fold: makes the
# form in which both are compared. about: the sentence above the table.
Protocol = namedtuple("Protocol", "fold about")
PROTOCOLS = {
    "exact": Protocol(fold_exact,
        "composed and decomposed Unicode are the same (NFC), nothing else is; spaces count"),
    "ci": Protocol(fold_ci,
        "as exact, but in lower case; spaces count"),
    "waics": Protocol(fold_waics,
        "only ASCII letters and digits count, in lower case; spaces and symbols do not"),
    "parseq36": Protocol(fold_parseq36,
        "PARSeq's: no spaces, NFKD to ASCII, labels over 25 characters dropped, "
        "0-9 and a-z kept, labels that are then empty dropped"),
    "zh": Protocol(fold_zh,
        "FudanVI's: lower case, no spaces, full width to half; "
        "traditional is not made simplified, lacking a table"),
}


def normalize(text, protocol):
    """The form in which a label and a reading are compared. UserError for an unknown protocol."""
    if protocol not in PROTOCOLS:
        raise UserError(f"protocol {protocol}: expected one of {' '.join(PROTOCOLS)}")
    return PROTOCOLS[protocol].fold(text)


def default_protocol(charset):
    """waics, as in papers; exact for a charset of one's own, of which waics may drop every
    character."""
    for known in data.CHARSETS.values():
        if set(charset) == set(known):
            return "waics"
    return "exact"


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
    if protocol == "parseq36":
        if len(to_ascii(label)) > PARSEQ_LONGEST:
            return f"longer than {PARSEQ_LONGEST}"
        if normalize(label, protocol) == "":
            return "no letter or digit"
    return None


def line_on_empty_labels(labels, protocol):
    """What is to be said of labels that hold nothing that the protocol compares; "" if none is so.
    parseq36 leaves them out, and score counts them."""
    n = sum(normalize(label, protocol) == "" for label in labels)
    if n == 0 or protocol == "parseq36":
        return ""
    outcome = "each is right if nothing else is read"
    if n == len(labels):
        outcome = "so no accuracy is printed"
    return f"{n:,} of {len(labels):,} labels hold nothing that {protocol} compares; {outcome}"


def is_pair(pair):
    """True for (label, text), two strings. For a damaged crop the text is None, and the label may
    be too."""
    if isinstance(pair, str) or len(pair) != 2:     # of "ab" Python would make the pair "a", "b"
        return False
    label, text = pair
    return text is None or (isinstance(label, str) and isinstance(text, str))


def score(pairs, protocol):
    """(label, text) pairs -> {"n", "evaluated", "dropped": {reason: count}, "accuracy", "ned"}.

    accuracy: how many are equal when normalized, in percent. `n` counts the dropped words too.
    ned: PARSeq's 1 - NED, in percent: 100 where all are equal. NED is the normalized edit
    distance, the mean of distance / length of the longer word.

    Only parseq36 drops labels. In waics a label without letters and digits stays, as in LMIM's
    code, and a reading without any is right. Where all labels are such (another script, say),
    the figures would mean nothing, and are None."""
    n, right = 0, 0
    any_label_counts = False                    # one label at least has what the protocol counts
    dropped = Counter()                         # {reason: how often}
    nearness = []                               # 1 - distance / length of the longer word
    for pair in pairs:
        if not is_pair(pair):
            raise UserError(f"score: {pair!r}; expected pairs (label, text) of strings")
        label, text = pair
        n += 1
        reason = reason_to_drop(label, text, protocol)
        if reason is not None:
            dropped[reason] += 1
            continue

        truth = normalize(label, protocol)
        answer = normalize(text, protocol)
        if truth != "":
            any_label_counts = True
        if truth == answer:
            right += 1
            nearness.append(1)                  # two empty words are equal as well
        else:
            longer = max(len(truth), len(answer))
            nearness.append(1 - edit_distance(truth, answer) / longer)

    evaluated = len(nearness)
    accuracy, ned = None, None
    if any_label_counts:
        accuracy = 100 * right / evaluated
        ned = 100 * sum(nearness) / evaluated
    return {"n": n, "evaluated": evaluated, "dropped": dict(dropped),
            "accuracy": accuracy, "ned": ned}


# ---- table

def is_incomplete(name):
    """Union14M's set Incomplete is reported by itself: no average has it."""
    return "incomplete" in name.lower()


def summarize(sets, protocol):
    """{set: its score} -> what --json holds. `average` is the mean over sets, `weighted` the mean
    over their words. A set without an accuracy is in neither."""
    averaged = []
    for name, row in sets.items():
        if row["accuracy"] is not None and not is_incomplete(name):
            averaged.append(row)

    average, weighted = None, None
    if averaged:
        average = sum(row["accuracy"] for row in averaged) / len(averaged)
        n_words = sum(row["evaluated"] for row in averaged)
        weighted = sum(row["evaluated"] * row["accuracy"] for row in averaged) / n_words
    return {"protocol": protocol, "sets": sets, "average": average, "weighted": weighted}


def print_table(result):
    """Prints what `summarize` returned, and a short table for each of --heights and --rotations
    that is in it."""
    width = max(10, max(map(len, result["sets"]))) + 1
    lines = ["", *set_lines(result, width)]
    for height, summary in result.get("heights", {}).items():
        lines += ["", f"height {height}, and the change"]
        lines += difference_lines(summary, result, width)
    for degrees, summary in result.get("rotations", {}).items():
        lines += ["", f"rotation {degrees}, and the change"]
        lines += difference_lines(summary, result, width)
    print_at_once("\n".join(lines) + "\n")


def set_lines(result, width):
    """The protocol, one row per set, then both averages."""
    lines = [f"protocol {result['protocol']}: {PROTOCOLS[result['protocol']].about}"]
    lines.append(table_row(width, "set", "n", "evaluated", "accuracy", "1-NED", "seconds"))
    for name, row in result["sets"].items():
        cells = [row[key] for key in ("n", "evaluated", "accuracy", "ned", "seconds")]
        lines.append(table_row(width, name, *cells) + table_notes(name, row))
    lines.append(table_row(width, "average", "", "", result["average"]))
    lines.append(table_row(width, "weighted", "", "", result["weighted"]))
    return lines


def table_notes(name, row):
    """What has to be said at the end of a set's row, one thing after the other."""
    notes = [f"{n:,} dropped: {reason}" for reason, n in row["dropped"].items()]
    if is_incomplete(name):
        notes.append("not averaged")
    if row["accuracy"] is None and row["evaluated"] > 0:
        notes.append("no label has what counts")
    return "".join(f"   {note}" for note in notes)


def difference_lines(summary, plain, width):
    """One row per set of changed crops: its accuracy, and by how much it differs from that of
    plain crops. Then a row of the averages."""
    lines = []
    for name, row in summary["sets"].items():
        plain_accuracy = plain["sets"][name]["accuracy"]
        lines.append(difference_row(width, name, row["accuracy"], plain_accuracy))
    lines.append(difference_row(width, "average", summary["average"], plain["average"]))
    return lines


def difference_row(width, name, accuracy, plain_accuracy):
    difference = None
    if accuracy is not None and plain_accuracy is not None:
        difference = f"{accuracy - plain_accuracy:+.2f}"
    return table_row(width, name, "", "", accuracy, difference)


def table_row(width, name, *cells):
    """The name in `width` columns, then each cell in ten: - for None, two decimals for a float."""
    line = name.ljust(width)
    for cell in cells:
        if cell is None:
            cell = "-"
        elif isinstance(cell, float):
            cell = f"{cell:.2f}"
        line += str(cell).rjust(10)
    return line.rstrip()


def print_at_once(text):
    """Prints, while tqdm may show a bar. -> False if nobody listens any more, as after
    `| head -1`: then this and all that follows goes nowhere, quietly."""
    try:
        tqdm.write(text, end="")
        sys.stdout.flush()
    except BrokenPipeError:
        hush_output(sys.stdout)
        return False
    return True


def check_damaged(result, max_damaged):
    """UserError that names the sets of which a larger share could not be decoded: their accuracy
    is that of the rest, which may be few."""
    lines = []
    for name, row in result["sets"].items():
        damaged = row["dropped"].get("damaged", 0)
        if damaged > max_damaged * row["n"]:
            lines.append(f"{name}: {damaged:,} of {row['n']:,} crops could not be read")
    if lines:
        raise UserError(f"{'; '.join(lines)}; that is more than --max_damaged {max_damaged:g}")


# ---- reading

def load_recognizer(path=SHIPPED, device="cpu"):
    """A checkpoint of finetune.py -> model.Recognizer; UserError if the file is none. Its
    `rotate_tall` says whether it was trained on crops of which the tall ones were turned, its
    `about` what it was trained on ("" if the file does not say)."""
    checkpoint = read_checkpoint(path)
    if not is_recognizer(checkpoint):
        raise UserError(f"{path}: not a recognizer; expected a checkpoint of finetune.py")
    flags = checkpoint["args"]                  # finetune.py's
    sizes = model.MODELS[flags["model"]]
    encoder = model.ViT(**sizes["encoder"])
    net = model.Recognizer(encoder, checkpoint["charset"], flags["max_length"],
                           spell=flags["spell"], **sizes["reader"])
    load_state(net, checkpoint["model"], path)
    net.rotate_tall = bool(flags.get("rotate_tall"))
    net.about = str(checkpoint.get("about", ""))
    return net.to(device).eval()


def is_recognizer(checkpoint):
    """True if a checkpoint holds all that a recognizer is made from."""
    if model.model_of(checkpoint) is None:
        return False
    flags = checkpoint["args"]
    max_length = flags.get("max_length")
    if not isinstance(max_length, int) or max_length < 1:
        return False
    if not isinstance(flags.get("spell"), (int, float)):
        return False
    if not isinstance(checkpoint.get("charset"), str):
        return False
    return isinstance(checkpoint.get("model"), dict)


def read_source(read, source, batch_size, workers, group=None, stop=None):
    """Reads every crop once. The ranks share the work, and each returns what all of them read.

    read: a function, crops uint8 (B, 3, 32, 128) -> [(text, confidence)]. group: join_ranks'.
    stop: a StopSignal; once it has come, this rank reads no further.
    -> a Reading for every crop, in the source's order, and a line for every damaged crop that
    says where it is and why."""
    readings = {}                               # {number in the source: Reading}
    damaged = []
    for batch in data.read_all(source, batch_size, workers):
        if stop is not None and stop.first is not None:
            break
        damaged += batch.damaged
        if len(batch.images) == 0:
            continue
        words = read(batch.images)
        for index, label, (text, confidence) in zip(batch.indices, batch.labels, words):
            readings[index] = Reading(label, text, confidence)

    readings, damaged = gather_readings(readings, damaged, group)
    return [readings.get(index, DAMAGED) for index in range(len(source))], damaged


def gather_readings(readings, damaged, group):
    """{number in the source: reading} and damaged crops' lines of one rank -> those of all."""
    if group is None:
        return readings, damaged
    of_ranks = [None] * world_size()
    dist.all_gather_object(of_ranks, (readings, damaged), group=group)
    all_readings, all_damaged = {}, []
    for rank_readings, rank_damaged in of_ranks:
        all_readings.update(rank_readings)
        all_damaged += rank_damaged
    return all_readings, all_damaged


def read_sets(net, sources, protocol, args, group, change=None):
    """Reads and scores every set. change: a function, crops (B, 3, H, W) in [0, 1] -> what is
    read in their place; None leaves them as they are.

    -> {name: its score, and the seconds}, {name: its Readings}, {name: lines of damaged crops}."""
    dtype = getattr(torch, args.dtype)

    def read(images):
        if change is not None:
            images = change(to_unit(to_device(images, net.device)))
        return net.read(images, args.batch_size, dtype)

    rows, readings, damaged = {}, {}, {}
    for name, source in sources.items():
        began = time.perf_counter()
        readings[name], damaged[name] = read_source(
            read, source, args.batch_size, args.workers, group)
        pairs = [(reading.label, reading.text) for reading in readings[name]]
        rows[name] = score(pairs, protocol)
        rows[name]["seconds"] = time.perf_counter() - began
    return rows, readings, damaged


# ---- robustness

def read_changed(net, sources, protocol, args, group, change, values):
    """Reads every set anew for each value, its crops changed by change(images, value) -> {value,
    as text: summary}."""
    summaries = {}
    for value in values:
        def change_crops(images):
            return change(images, value)

        rows, _, _ = read_sets(net, sources, protocol, args, group, change_crops)
        summaries[str(value).removesuffix(".0")] = summarize(rows, protocol)
    return summaries


def reduce_height(images, height):
    """Crops as they would be if their originals were `height` pixels high: made smaller, their
    shape kept, and enlarged again, bicubically. (B, 3, H, W) in [0, 1] -> the same."""
    small = F.interpolate(images, size=(height, height * W // H), mode="bilinear", antialias=True)
    return F.interpolate(small, size=(H, W), mode="bicubic").clamp(0, 1)


def rotate(images, degrees):
    """Crops turned counter-clockwise on a canvas that grows until they fit, then squeezed into
    32 x 128 again. The new corners are filled with the nearest pixels of the crop.
    (B, 3, H, W) in [0, 1] -> the same.

    Each pixel is the mean of 4 x 4 points, so that 30 does not alias. 0 changes nothing, since
    these points are copies of the pixel."""
    angle = torch.full((len(images),), math.radians(degrees), device=images.device)
    corners = data.turned(angle, W / H)
    large = F.interpolate(images, scale_factor=4, mode="nearest")
    turned = data.warp(large, corners)
    means = data.coarse_view(turned, (H, W))                    # over areas of 4 x 4
    return means.clamp(0, 1)                                    # whatever a device rounds to


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
    logits = q.float() @ k.float().mT / math.sqrt(q.shape[-1])
    return logits.softmax(-1).mean(1)


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
    # Recognizer.forward gives the layer the letters so far, and the crop's keys and values.
    letters, crop_kv = inputs_of(layer, net, images, ids)       # (B, T, D), (2, B, heads, N, d)
    keys, _ = crop_kv
    return attention_weights(layer.queries(letters), keys)


@torch.inference_mode()
def attention(net, images):
    """Normalised crops -> ids (B, T), what is read: letters, after them nothing but net.end; where
    the encoder looks (B, 1+N, 1+N); where the decoder looks (B, T, N)."""
    ids, _ = net.decode(images)
    return ids, encoder_attention(net, images), decoder_attention(net, images, ids)


def report_attention(net, source, path):
    """Draws where the net looks on the first crops of a source. On rendered words, whose text
    pixels are known, also measures which share of it falls on text -> attention_on_text's dict, or
    None."""
    first = range(min(N_MEASURED, len(source)))
    batch = data.read_batch(source, first, char_maps=True)
    rendered = bool(batch.char_maps.any())      # other crops have no map of their characters
    images = batch.images
    if not rendered:                            # nothing to measure: what is drawn is enough
        images = images[:N_DRAWN]
    if len(images) == 0:                        # all of them are damaged
        return None

    normalized = model.normalize_pixels(to_device(images, net.device))
    ids, encoder_maps, decoder_maps = attention(net, normalized)
    encoder_maps = encoder_maps[:, :, 1:]       # what falls on [cls] is nowhere in the picture
    encoder_maps = encoder_maps / encoder_maps.sum(-1, keepdim=True)    # (B, 1+N, N), shares again

    draw_attention(net, images[:N_DRAWN], batch.labels, ids, encoder_maps, decoder_maps, path)
    if not rendered:
        return None
    return attention_on_text(net, batch.char_maps, ids, encoder_maps, decoder_maps, source.name)


def draw_attention(net, images, labels, ids, encoder_maps, decoder_maps, path):
    """For each crop a row: the crop, where [cls] looks, where each letter looks. encoder_maps
    (B, 1+N, N), decoder_maps (B, T, N). Red has one scale for the whole picture."""
    h, w = net.encoder.grid
    words, heats = [], []
    for k in range(len(images)):
        word = [net.charset[i] for i in ids[k].tolist() if i != net.end]
        cls, letters = encoder_maps[k, :1], decoder_maps[k, :len(word)]
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


def attention_on_text(net, char_maps, ids, encoder_maps, decoder_maps, name):
    """How much of the attention falls on text, and how widely it is spread -> a dict.

    char_maps (B, H, W) is above 0 on text; encoder_maps (B, 1+N, N), decoder_maps (B, T, N). Of a
    patch's attention as much falls on text as text has of the patch. An even spread over the
    picture has the share `text_area`. The entropy is divided by log N: 1 is an even spread, 0 is
    one patch."""
    on_text = (char_maps > 0).float().unsqueeze(1)              # (B, 1, H, W)
    text_share = F.avg_pool2d(on_text, net.encoder.patch)       # (B, 1, h, w), of each patch
    text_share = text_share.flatten(2).to(encoder_maps.device)  # (B, 1, N)
    n, N = len(text_share), text_share.shape[-1]
    text_area = text_share.mean().item()
    print(f"attention on {n} rendered words of {name}; text is {text_area:.3f} of the area")

    measured = {"n": n, "text_area": text_area}
    looks = {"cls": encoder_maps[:, :1], "patches": encoder_maps[:, 1:], "decoder": decoder_maps}
    for who, weights in looks.items():
        share = (weights * text_share).sum(-1)                  # (B, 1 or N or T)
        entropy = -torch.xlogy(weights, weights).sum(-1) / math.log(N)
        if who == "decoder":
            is_letter = ids != net.end
            if not is_letter.any():                             # nothing was read
                continue
            share = share[is_letter]
            entropy = entropy[is_letter]
        share = share.mean().item()
        entropy = entropy.mean().item()
        measured[who] = {"share": share, "entropy": entropy}
        print(f"  {who:8} {share:.3f} on text, entropy {entropy:.3f}")
    return measured


def attention_files(names, folder):
    """{name of a set: the path of its picture}."""
    paths = {}
    for name in names:
        path = os.path.join(folder, re.sub(r"[^\w.-]", "_", name))
        while f"{path}.png" in paths.values():      # a/b and a_b are two sets
            path += "_"
        paths[name] = f"{path}.png"
    return paths


def report_attention_on_sets(net, sources, folder):
    """One picture per set, into the folder -> {name: what was measured}, of sets of rendered
    words."""
    measured = {}
    for name, path in attention_files(sources, folder).items():
        numbers = report_attention(net, sources[name], path)
        if numbers is not None:
            measured[name] = numbers
    return measured


# ---- pictures of errors

N_ERRORS = 48                   # the most confident ones


def draw_errors(sources, readings, protocol, path):
    """Draws wrongly read crops, the most confident first: image, truth, reading."""
    wrong = []
    for name, source in sources.items():
        for index, reading in enumerate(readings[name]):
            if is_wrong(reading, protocol):
                wrong.append((source, index, reading))
    wrong.sort(key=lambda error: error[2].confidence, reverse=True)

    # a row of the sheet is a list of cells: (picture or None, [(text, colour), ...])
    rows = [[(None, [(title, GREY)]) for title in ("image", "truth", "reading")]]
    for source, index, (label, text, confidence) in wrong[:N_ERRORS]:
        caption = f"{source.where(index)}   {confidence:.3f}"
        image_cell = (source.get(index).image, [(caption, GREY)])
        truth_cell = (None, [(label, BLACK)])
        reading_cell = (None, mark_errors(label, text, protocol))
        rows.append([image_cell, truth_cell, reading_cell])
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
    truth, answer = normalize(label, protocol), normalize(text, protocol)
    pieces = []
    matcher = difflib.SequenceMatcher(None, truth, answer, autojunk=False)
    for kind, i1, i2, j1, j2 in matcher.get_opcodes():  # truth[i1:i2] was read as answer[j1:j2]
        colour = BLACK if kind == "equal" else RED
        missing = (i2 - i1) - (j2 - j1)
        pieces.append((answer[j1:j2], colour))
        if missing > 0:
            pieces.append(("_" * missing, RED))
    return pieces


# ---- flags

def add_flags(parser):
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", nargs="+", metavar="SRC",
        help="labelled sets, a row each: an LMDB folder, or a tree of them as one set, a labels "
        "file, synth:N for rendered words in the checkpoint's charset")
    what.add_argument("--images", nargs="+", metavar="FILE",
        help="image files to read, or folders of them: prints path, text, confidence")
    what.add_argument("--score", metavar="FILE",
        help="lines of label<TAB>prediction, from any system; needs no --ckpt")
    add = parser.add_argument
    add("--ckpt", metavar="FILE",
        help="best.pt or last.pt of finetune.py; it holds charset and sizes; left out: the weights "
        "that come with the repository, assets/reader.pt")
    add("--protocol", choices=PROTOCOLS,
        help="how labels and readings are compared; left out: waics, as in papers, "
        "but exact for a checkpoint with your own charset")
    add("--json", metavar="FILE",
        help="write the results here; those of --images have each character's confidence")
    add("--predictions", metavar="FILE",
        help="write label, reading, confidence, place here; --score reads it back, as one set")
    add("--max_damaged", type=number_in("[0, 1]"), default=.01,
        help="exit with status 2, after the table, if a larger share of a set is unreadable")
    add("--heights", nargs="+", type=number_in(f"[1, {H}]", int), default=[],
        help="read crops reduced to these heights too; 8 is hard")
    add("--rotations", nargs="+", type=number_in("(-90, 90)"), default=[],
        help="read crops turned counter-clockwise by these degrees too")
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
    add("--fonts",
        help="a folder: draw synth in its .ttf, .otf and .ttc files, not in the system's")
    add("--rotate_tall", action="store_true",
        help="turn crops much taller than wide; for data with vertical words")


def check_flags(parser, args):
    """Ends with one line if a flag is missing, or has no effect with the others."""
    typed = typed_flags()
    for name in ("heights", "rotations", "attention", "errors", "fonts"):
        if name in typed and not args.data:
            parser.error(f"--{name} needs --data; name labelled sets, or leave it out")
    for name in ("ckpt", "batch_size", "workers", "device", "dtype", "rotate_tall"):
        if name in typed and args.score:
            parser.error(f"--{name} has no effect with --score, which reads no crop; leave it out")
    if args.score and args.predictions:
        parser.error("--predictions needs --data or --images; --score reads such a file")
    for name in ("protocol", "max_damaged"):
        if name in typed and args.images:
            parser.error(
                f"--{name} has no effect with --images, which scores nothing; leave it out")
    if args.errors and not args.errors.lower().endswith(data.SUFFIXES):
        parser.error(f"--errors {args.errors}: expected a picture's name, such as errors.png")
    if args.data:
        check_sets(parser, args)
    check_outputs(parser, args)


def files_to_write(args):
    return [path for path in (args.json, args.predictions, args.errors) if path]


def check_outputs(parser, args):
    """Ends with one line if a result would be written over what is read, or over another result."""
    read = [*(args.data or ()), *(args.images or ())]
    read += [path for path in (args.ckpt, args.score) if path]
    for path in (args.json, args.predictions):
        if path:
            data.check_text_output(path, read)
    if args.errors:
        data.check_output(args.errors, read)
    if args.attention:
        data.check_output(os.path.join(args.attention, "set.png"), read)

    written = files_to_write(args)
    if args.attention:
        written.append(args.attention)
    check_names_differ(written)


def check_names_differ(written):
    """UserError if two results would be written into one file."""
    if len(set(map(os.path.realpath, written))) < len(written):
        raise UserError(f"{' '.join(written)}: one name for two results; give each its own")


def check_sets(parser, args):
    """Ends with one line if a set of --data has no end, or is named twice."""
    check_data_flags(parser, args)
    for src in args.data:
        path, times = data.split_times(src)
        if path != src and times.isdecimal():       # SRC@N, and no file whose name holds an @
            parser.error(f"--data {src}: a set is read once; leave @{times} out")
    if "synth" in args.data:
        parser.error("--data synth: a million words take too long to read; type synth:1000:1")
    for one, two in itertools.combinations(args.data, 2):
        if data.share_words(one, two):
            parser.error(f"--data {one} {two}: one set twice, or a part of the other; each is one "
                         "row of the table")


# ---- results in files

def prepare_files(args):
    """Makes the folders to write into. If a file or a folder cannot be, this is known now."""
    for path in files_to_write(args):
        data.check_writable(path)
    if args.attention:
        os.makedirs(args.attention, exist_ok=True)


def prediction_line(reading, where):
    """A line of --predictions. "damaged" stands for the confidence of what could not be decoded."""
    where = data.one_line(where)
    confidence = "damaged"
    if reading.confidence is not None:
        confidence = f"{reading.confidence:.6g}"
    return "\t".join([reading.label or "", reading.text or "", confidence, where]) + "\n"


def write_predictions(sources, readings, path):
    lines = []
    for name, source in sources.items():
        for index, reading in enumerate(readings[name]):
            lines.append(prediction_line(reading, source.where(index)))
    data.write_file("".join(lines), path)


def write_json(result, path):
    data.write_file(json.dumps(result, indent=1, ensure_ascii=False), path)


# ---- --score: a file of predictions

# A first line of --score is a header if its two columns differ and hold no word but these, such as
# "GT Label" and "predicted_text".
LABEL_WORDS = {
    "label", "labels", "gt", "ground", "truth", "groundtruth", "true", "target", "reference", "ref",
    "expected",
}
PREDICTION_WORDS = {
    "pred", "preds", "prediction", "predictions", "predicted", "reading", "model", "ocr", "output",
    "hypothesis", "hyp", "recognized",
}
HEADER_WORDS = LABEL_WORDS | PREDICTION_WORDS | {"text"}


def words_of(column):
    return set(re.split("[ _-]+", column.lower()))


def is_header(label, prediction):
    """True if these, the columns of a first line, name what stands below them."""
    words = words_of(label) | words_of(prediction)
    return label.lower() != prediction.lower() and words <= HEADER_WORDS


def is_swapped(label, prediction):
    """True if a header's columns stand the other way round. "true text" names labels, and
    "predicted label" or "expected output" neither of the two."""
    first, second = words_of(label), words_of(prediction)
    first_is_prediction = bool(first & PREDICTION_WORDS) and not first & LABEL_WORDS
    second_is_label = bool(second & LABEL_WORDS) and not second & PREDICTION_WORDS
    return first_is_prediction or second_is_label


def parse_predictions(path):
    """A file of lines label<TAB>prediction -> [(label, prediction)]; UserError for any other file.

    A third column is a confidence, and further ones are passed over. But --predictions writes
    "damaged" into the third where a crop could not be decoded: there the prediction is None."""
    expected = "expected lines of label<TAB>prediction in UTF-8"
    try:
        with open(path, "rb") as file:                      # once: it may be a pipe
            content = file.read()
        lines = content.decode("utf-8-sig").split("\n")
    except OSError as error:
        raise UserError(f"--score {path}: {error.strerror}; {expected}") from None
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"--score {path}: line {number}: {error.reason}; {expected}") from None
    if lines[-1] == "":
        lines.pop()                             # the text ended with a line's end

    pairs = []
    wrong = []                                  # what is said of third columns
    n_empty = 0
    for number, line in enumerate(lines, 1):
        line = line.rstrip("\r\n")
        if line.strip("\t") == "":              # a spreadsheet's empty row holds its tabs
            n_empty += 1
            continue
        columns = line.split("\t")
        if len(columns) == 1:
            raise UserError(f"--score {path}: line {number} has no tab; {expected}")
        label, prediction = columns[:2]
        if "\r" in prediction:
            raise UserError(f"--score {path}: line {number} goes on after a carriage return; save "
                            "it with the line ends of Unix or Windows")
        third = columns[2] if len(columns) > 2 else ""
        if number == 1 and is_header(label, prediction) and not is_number(third):
            if is_swapped(label, prediction):
                raise UserError(f"--score {path}: its header is {line!r}; expected the label first")
            say(f"--score {path}: line 1 is taken for a header: {line}", sys.stderr)
            continue
        if third == "damaged":
            prediction = None
        elif third != "" and not is_number(third):
            wrong.append(f"line {number}: its third column is {third!r}, and no confidence")
        pairs.append((label, prediction))
    if not pairs:
        raise UserError(f"--score {path}: no line in it; {expected}")
    check_columns(path, pairs, expected)
    if wrong:
        raise UserError(f"--score {path}: {wrong[0]}; expected label, prediction and perhaps a "
                        "confidence, with tabs between them")
    if n_empty:
        say(f"--score {path}: {n_empty:,} empty lines left out", sys.stderr)
    return pairs


def is_number(text):
    try:
        float(text)
    except ValueError:
        return False
    return True


def check_columns(path, pairs, expected):
    """UserError if most labels, or most predictions, are names of files: these are other columns.
    Not all need be, as the first may be a header."""
    for column, what in enumerate(["labels", "predictions"]):
        words = [pair[column] or "" for pair in pairs]
        files = [word for word in words if word.lower().endswith(data.SUFFIXES)]
        if len(files) >= len(words) / 2:
            raise UserError(f"--score {path}: its {what} are names of files, such as {files[0]}; "
                            f"{expected}, in this order")


def score_file(args):
    """--score: the table of a file of predictions."""
    began = time.perf_counter()
    protocol = args.protocol or "waics"
    pairs = parse_predictions(args.score)
    row = score(pairs, protocol)
    row["seconds"] = time.perf_counter() - began
    labels = [label for label, text in pairs if text is not None]
    line = line_on_empty_labels(labels, protocol)
    if line:
        say(f"--score {args.score}: {line}", sys.stderr)
    result = summarize({os.path.basename(args.score): row}, protocol)
    print_table(result)
    prepare_files(args)
    if args.json:
        write_json(result, args.json)
    check_damaged(result, args.max_damaged)


# ---- --images: crops without labels

DAMAGED_NAMED = 5               # of a set, and of --images: crops that are named, with the reason
ROTATE_TALL = "--rotate_tall, as in the recognizer's training: tall crops are turned"


def open_images(args):
    """--images -> a Source of all the files, those of folders too."""
    parts = []
    for path in args.images:
        if os.path.isdir(path):
            # open_source's remarks go to stderr: stdout is for readings alone
            with contextlib.redirect_stdout(sys.stderr):
                part = data.open_source(path, rotate_tall=args.rotate_tall, labels=False)
            rename(part, path.rstrip("/"))      # two folders may have one name
            parts.append(part)
        else:
            parts.append(data.Files([(path, None)], "", "--images", args.rotate_tall))
    return data.Parts(parts, "--images")


def image_path(source, index):
    """What stands for an image of open_images: its file, or its place in an LMDB."""
    part, number = source.locate(index)
    if isinstance(part, data.Files):
        return part.path(number)
    return part.where(number)


def read_image_batches(net, source, args, group):
    """Yields, as soon as every rank has read a batch, {number in the source: (text, confidences)},
    see Recognizer.read_letters, and the lines of damaged images."""
    dtype = getattr(torch, args.dtype)
    rounds_over = 0
    for batch in data.read_all(source, args.batch_size, args.workers):
        words = []
        if len(batch.images) > 0:                   # all of them may be damaged
            words = net.read_letters(batch.images, args.batch_size, dtype)
        yield gather_readings(dict(zip(batch.indices, words)), batch.damaged, group)
        rounds_over += 1

    # All ranks gather equally often. A rank that has a batch less than another gives nothing in
    # the last round.
    rounds = math.ceil(len(source) / (args.batch_size * world_size()))
    for _ in range(rounds_over, rounds):
        yield gather_readings({}, [], group)


def read_images(net, args, group):
    """--images: prints path, text and confidence of each as they are read, and writes --json and
    --predictions. Ends with an error if one could not be decoded, once all the others are done."""
    source = open_images(args)
    prepare_files(args)
    if net.rotate_tall:
        say(ROTATE_TALL, sys.stderr)

    only_prints = not args.json and not args.predictions
    readings, damaged = {}, []
    for words, lines in read_image_batches(net, source, args, group):
        readings.update(words)
        damaged += lines
        if rank() > 0:
            continue
        printed = []
        for index, (text, confidences) in sorted(words.items()):
            path = data.one_line(image_path(source, index))
            printed.append(f"{path}\t{text}\t{math.prod(confidences):.6g}\n")
        heard = print_at_once("".join(printed))
        if only_prints and not heard and group is None:     # other ranks would wait for this one
            return
    if rank() == 0:
        write_images(source, readings, args)
        if damaged:
            first = "; ".join(damaged[:DAMAGED_NAMED])
            if len(damaged) > DAMAGED_NAMED:
                first += f"; and {len(damaged) - DAMAGED_NAMED} more"
            raise UserError(f"{len(damaged)} of {len(source)} could not be read: {first}")


def write_images(source, readings, args):
    """--json and --predictions of --images."""
    rows, lines = [], []
    for index in range(len(source)):
        path = image_path(source, index)
        if index not in readings:               # it is damaged
            rows.append({"path": path, "text": None, "confidence": None})
            lines.append(prediction_line(DAMAGED, path))
            continue
        text, confidences = readings[index]
        confidence = math.prod(confidences)
        *characters, end = confidences
        rows.append({"path": path, "text": text, "confidence": confidence,
                     "characters": characters, "end": end})
        lines.append(prediction_line(Reading(None, text, confidence), path))
    if args.predictions:
        data.write_file("".join(lines), args.predictions)
    if args.json:
        write_json({"images": rows}, args.json)


# ---- --data: labelled sets

def open_sets(args, net):
    """--data -> {name: source}. A set is named by its folder or file; if that name is taken, by its
    path as it was typed; if that is taken too, by its whole path. Rendered words are those of the
    recognizer `net`: of its characters, and as long as it reads."""
    sources = {}
    for src in args.data:
        source = data.open_source(
            src, fonts=args.fonts, rotate_tall=args.rotate_tall, charset=net.charset,
            max_length=net.max_length)
        name = source.name
        if name in sources:
            name = src.rstrip("/")
        if name in sources:
            name = os.path.abspath(src)
        rename(source, name)
        sources[name] = source
    return sources


def rename(source, name):
    """Crops are named by their source, and those of a tree of LMDBs by its parts."""
    for part in getattr(source, "parts", []):
        part.name = name + part.name.removeprefix(source.name)
    source.name = name


def check_labels(source, net, protocol, predictions):
    """-> lines that say how many of a set's labels the net can write, and of how many nothing is
    compared.

    UserError for a crop without a label, for a label that a line of the file --predictions cannot
    hold, and if no label can be read right. This is known before an hour of reading and not after
    it."""
    labels = []
    for i, label in data.readable_labels(source):
        if label is None:
            raise UserError(f"{source.where(i)}: no label; expected labelled crops: "
                            "only --images reads without")
        if predictions and ("\t" in label or "\n" in label):
            raise UserError(f"{source.where(i)}: {label!r} holds a tab or line end: "
                            "no --predictions of it")
        labels.append(label)

    parts = data.Parts([source], source.name)
    fitting, line = data.fit_labels(parts, net.charset, net.max_length)
    if len(fitting) == 0 and not can_be_right(labels, net, protocol):
        raise UserError(f"{line}; the recognizer can read none of them right: it has "
                        f"{len(net.charset)} characters, for words of {net.max_length} at most; "
                        "leave the set out, or name another --ckpt")
    lines = [line]
    empty = line_on_empty_labels(labels, protocol)
    if empty:
        lines.append(f"{source.name}: {empty}")
    return lines


def can_be_right(labels, net, protocol):
    """True if the net can write a word that equals one of these under the protocol, which may
    pass over case and symbols."""
    known = set()
    for character in net.charset:
        known.update(normalize(character, protocol))
    for label in labels:
        truth = normalize(label, protocol)
        if truth and len(truth) <= net.max_length and known.issuperset(truth):
            return True
    return False


def score_sets(net, args, group):
    """--data: the table of labelled sets, and what else was asked for."""
    protocol = args.protocol or default_protocol(net.charset)
    sources = open_sets(args, net)
    written = files_to_write(args)
    if args.attention:
        written += attention_files(sources, args.attention).values()
        check_names_differ(written)
    fit_lines = []
    for source in sources.values():
        for path in written:
            data.check_crops_stay(path, source)
        fit_lines.extend(check_labels(source, net, protocol, args.predictions))
    prepare_files(args)
    print_header(net, sources, args)
    for line in fit_lines:
        say(line)

    rows, readings, damaged = read_sets(net, sources, protocol, args, group)
    for lines in damaged.values():
        for line in lines[:DAMAGED_NAMED]:
            say(f"damaged: {line}")
    result = summarize(rows, protocol)
    if args.heights:
        result["heights"] = read_changed(
            net, sources, protocol, args, group, reduce_height, args.heights)
    if args.rotations:
        result["rotations"] = read_changed(
            net, sources, protocol, args, group, rotate, args.rotations)
    if rank() > 0:
        return

    print_table(result)                         # first, whatever becomes of the files
    if args.predictions:
        write_predictions(sources, readings, args.predictions)
    if args.json:
        write_json(result, args.json)           # now, should a picture below fail
    if args.errors:
        draw_errors(sources, readings, protocol, args.errors)
    if args.attention:
        result["attention"] = report_attention_on_sets(net, sources, args.attention)
        if args.json:
            write_json(result, args.json)       # again, with what was measured
    check_damaged(result, args.max_damaged)


def print_header(net, sources, args):
    """What runs, so that its figures can be told from others."""
    parameters = sum(p.numel() for p in net.parameters())
    crops = sum(map(len, sources.values()))
    say(" ".join(sys.argv))
    say(f"torch {torch.__version__}  {net.device} x{world_size()}  {args.dtype}")
    say(f"{parameters / 1e6:.2f} M parameters, {len(net.charset)} characters, {crops:,} crops")
    if net.rotate_tall:
        say(ROTATE_TALL)


# ---- the command

def main():
    parser = Parser(__doc__)
    add_flags(parser)
    args = parser.parse_args()
    check_flags(parser, args)

    if args.score:
        if rank() == 0:                         # one process is enough
            score_file(args)
        return

    device = pick_device(args.device)
    net = load_recognizer(args.ckpt or SHIPPED, device)
    if not args.ckpt:                           # to stderr: stdout is for readings alone
        say(f"no --ckpt, so {SHIPPED.name} reads: {net.about}", sys.stderr)
    if net.rotate_tall:
        args.rotate_tall = True
    # Only readings travel between ranks, so their group is the CPUs', even with GPUs.
    group = join_ranks(torch.device("cpu"))
    if args.images:
        read_images(net, args, group)
    else:
        score_sets(net, args, group)


if __name__ == "__main__":
    run_main(main)
