"""Reads words with a fine-tuned recognizer and scores them under the field's protocols.

    python evaluate.py --ckpt out/finetune/best.pt --data bench/IIIT5k_3000 bench/SVT --json r.json --errors errors.png
    python evaluate.py --ckpt out/finetune/best.pt --images a.png b.jpg            prints path, text, confidence
    python evaluate.py --score preds.tsv --protocol waics                          label<TAB>prediction, from any system
    torchrun --nproc_per_node=8 evaluate.py --ckpt best.pt --data bench/*          eight GPUs; each crop is read once

Writes what is asked for: --json, --predictions, --errors, --attention. From Python: load_recognizer(path).read(images).
"""
import difflib
import json
import math
import os
import re
import sys
import time
import unicodedata
from collections import Counter

import torch
import torch.distributed as dist
import torch.nn.functional as F

import data
import model
from data import BLACK, GREY, H, RED, W, UserError, draw_sheet, within

# ---- protocols

PROTOCOLS = {
    "exact": "nothing folded but composed and decomposed Unicode (NFC); spaces count",
    "ci": "as exact, in lower case; spaces count",
    "waics": "only ASCII letters and digits count, in lower case; spaces and symbols do not",
    "parseq36": "PARSeq's: no spaces, NFKD to ASCII, labels over 25 characters dropped, a-z 0-9 kept, empty ones dropped",
    "zh": "FudanVI's: lower case, no spaces, full width to half; traditional is not made simplified, lacking a table"}
HALF = {0x3000: " ", **{c: chr(c - 0xFEE0) for c in range(0xFF01, 0xFF5F)}}

def default_protocol(charset):
    return "waics" if charset in data.CHARSETS.values() else "exact"

def ascii_of(text):
    """PARSeq's first steps, after which it measures the length: no whitespace, NFKD, then what is not ASCII goes."""
    return unicodedata.normalize("NFKD", "".join(text.split())).encode("ascii", "ignore").decode()

def normalize(text, protocol):
    """The form in which a label and a reading are compared.

    exact, ci: NFC, as in training. waics: LMIM's, which drops what is not ASCII before it lowers case: a Kelvin sign is
    no k. mmocr's lowers first, keeps CJK, and ^ by a slip in its pattern. zh: to the letter, so of spaces only ASCII's
    goes, an ideographic one becomes a space that counts, and labels and readings must be in one script."""
    if protocol not in PROTOCOLS:
        raise UserError(f"protocol {protocol}: expected one of {' '.join(PROTOCOLS)}")
    if protocol in ("waics", "parseq36"):
        text = ascii_of(text) if protocol == "parseq36" else text
        return "".join(c for c in text if c in data.CHARSETS["62"]).lower()
    if protocol == "zh":
        return text.lower().replace(" ", "").translate(HALF)
    text = unicodedata.normalize("NFC", text)
    return text.lower() if protocol == "ci" else text

def distance(a, b):
    """Levenshtein distance, a row of the table at a time; 400,000 words take seconds."""
    row = list(range(len(b) + 1))
    for i, c in enumerate(a, 1):
        last, row = row, [i]
        for j, d in enumerate(b):
            row.append(min(last[j] + (c != d), last[j + 1] + 1, row[j] + 1))
    return row[-1]

def score(pairs, protocol):
    """(label, reading) pairs -> {"n", "evaluated", "dropped": {reason: count}, "accuracy", "ned"}. In percent: equal
    when normalized, and PARSeq's 1 - NED, the mean of 1 - distance / longer length; None if no word is left. A reading
    of None is a damaged crop, counted and dropped. Only parseq36 drops labels; what waics folds to nothing stays, as in
    LMIM's code, and is right when the reading folds to nothing too: None if all of them do, as those of a script do."""
    pairs, dropped, near, letters = list(pairs), Counter(), [], 0                # near is 1 where equal, and only there
    for label, reading in pairs:
        a, b = normalize(label, protocol), normalize(reading or "", protocol)
        long = protocol == "parseq36" and len(ascii_of(label)) > 25
        if reading is None or long or protocol == "parseq36" and not a:
            dropped["damaged" if reading is None else "longer than 25" if long else "no letter or digit"] += 1
        else:
            near.append(1 if a == b else 1 - distance(a, b) / max(len(a), len(b)))
            letters += len(a)
    accuracy, ned = (100 * x / len(near) if letters else None for x in (near.count(1), sum(near)))
    return {"n": len(pairs), "evaluated": len(near), "dropped": dict(dropped), "accuracy": accuracy, "ned": ned}

def read_predictions(path):
    """(label, prediction) of lines label<TAB>prediction; further columns are passed over, but for our own `damaged`."""
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as file:
            rows = {n: line.rstrip("\r\n").split("\t") for n, line in enumerate(file, 1) if line.strip("\r\n")}
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--score {path}: {getattr(error, 'strerror', None) or error}; expected UTF-8 text") from None
    short = [n for n, row in rows.items() if len(row) < 2]
    if short or not rows:
        raise UserError(f"--score {path}: line {[*short, 1][0]} has no tab; expected lines of label<TAB>prediction")
    return [(row[0], None if row[2:3] == ["damaged"] else row[1]) for row in rows.values()]

# ---- table

BENCHMARKS = [  # sets and their full size, for IC13-857 is not IC13-1015; figures in that order, then their average; from
    # LMIM's paper (CVPR 2025), those of MNSP and DSHM from their own (2605.14885, AAAI 2026)
    (dict(iiit5k=3000, ic13=1015, svt=647, ic15=2077, svtp=645, cute=288), {
        "LMIM": "98.5 98.0 97.7 88.7 94.0 98.6 95.9", "MNSP": "- - - - - - 96.7"}),
    (dict(curve=2426, multiori=1369, artistic=900, contextless=779, salient=1585, multiword=829, general=400000), {
        "MIM": "84.8 79.3 71.1 81.5 81.0 82.5 82.0 80.3", "SeqCLR": "83.7 79.9 73.7 79.7 81.0 84.0 82.7 80.7",
        "MAERec-S": "81.4 71.4 72.0 82.0 78.5 82.4 82.5 78.6", "LMIM-10ep": "87.5 84.5 79.8 84.3 86.6 86.1 84.4 84.7",
        "LMIM-20ep": "90.3 86.6 80.7 85.5 88.2 87.9 85.1 86.3", "MNSP": "- - - - - - - 86.2",
        "DSHM": "91.6 88.2 81.4 86.3 87.9 88.4 85.3 87.0"})]

def loose(name):
    """A set's name whatever its style: Multi-Oriented, multi_oriented; ICDAR2013, IC13_1015."""
    return re.sub("ic(dar)?(20)?(?=1[35])", "ic", re.sub("[^a-z0-9]", "", name.lower()))

def summary(sets, protocol):
    """{set: score} -> what --json holds: `average` over sets, `weighted` over their evaluated words. Sets without an
    accuracy stay out, and so does Union14M's Incomplete, which is reported as a drop."""
    many = [one for name, one in sets.items() if one["accuracy"] is not None and "incomplete" not in loose(name)]
    mean = lambda weights: sum(w * one["accuracy"] for w, one in zip(weights, many)) / sum(weights) if many else None
    return {"protocol": protocol, "sets": sets, "average": mean([1] * len(many)),
            "weighted": mean([one["evaluated"] for one in many])}

def published(sets):
    """{method: {set or 'average': figure}} for sets of a benchmark's name and size; averages for its very sets only."""
    columns, names = {}, [name for name in sets if "incomplete" not in loose(name)]
    for sizes, methods in BENCHMARKS:
        place = {name: k for k, (known, n) in enumerate(sizes.items()) for name in names
                 if known in loose(name) and sets[name]["n"] == n}
        if len(set(place.values())) == len(sizes) == len(names):             # the whole benchmark and nothing else
            place["average"] = -1                                            # its last figure
        for method, figures in methods.items():
            columns.setdefault(method, {}).update({name: figures.split()[k] for name, k in place.items()})
    return {method: cells for method, cells in columns.items() if set(cells.values()) - {"-"}}

def print_table(result):
    sets, columns, wide = result["sets"], published(result["sets"]), max(10, *map(len, result["sets"])) + 1
    beside = lambda name: [cells.get(name, "") for cells in columns.values()]

    def line(name, *cells):
        cells = ("-" if cell is None else f"{cell:.2f}" if isinstance(cell, float) else cell for cell in cells)
        print((f"{name:{wide}}" + "".join(f"{cell:>10}" for cell in cells)).rstrip())

    print(f"\nprotocol {result['protocol']}: {PROTOCOLS[result['protocol']]}")
    line("set", "n", "evaluated", "accuracy", "1-NED", "seconds", *columns)
    for name, one in sets.items():
        notes = [f"   {n:,} dropped: {why}" for why, n in one["dropped"].items()]
        notes += ["   not averaged"] * ("incomplete" in loose(name))
        notes += ["   no label has what counts"] * (one["accuracy"] is None and one["evaluated"] > 0)
        line(name, *map(one.get, ("n", "evaluated", "accuracy", "ned", "seconds")), *beside(name), *notes)
    line("average", "", "", result["average"], "", "", *beside("average"))
    line("weighted", "", "", result["weighted"])
    other = "" if result["protocol"] == "waics" else f"; not comparable with {result['protocol']}"
    print(f"{', '.join(columns)}: as published, protocol waics; those of LMIM's paper on original labels{other}\n" if columns else "", end="")

    def accuracies(view):
        return {name: one["accuracy"] for name, one in view["sets"].items()} | {"average": view["average"]}
    for kind in ("heights", "rotations"):
        for value, view in result.get(kind, {}).items():
            print(f"\n{kind[:-1]} {value}, and the change")
            for (name, a), b in zip(accuracies(view).items(), accuracies(result).values()):
                line(name, "", "", a, "-" if None in (a, b) else f"{a - b:+.2f}")

# ---- reading

def load_recognizer(path, device="cpu"):
    """A checkpoint of finetune.py, which holds size, charset and length -> model.Recognizer. Raises UserError if it is none."""
    checkpoint = model.read_checkpoint(path)
    args = checkpoint.get("args")
    if not (isinstance(args, dict) and {"charset", "model"} <= set(checkpoint) and {"max_length", "spell"} <= set(args)
            and args.get("model") in model.MODELS):
        raise UserError(f"{path}: not a recognizer; expected a checkpoint of finetune.py")
    sizes = model.MODELS[args["model"]]
    net = model.Recognizer(model.ViT(**sizes["encoder"]), checkpoint["charset"], args["max_length"], spell=args["spell"],
                           **sizes["reader"])
    model.load_state(net, checkpoint["model"], path)
    return net.to(device).eval()

def changed(images, kind, value):
    """heights: crops at `value` pixels, their shape kept, enlarged again as crops of that height would be, bicubically.
    rotations: turned by `value` degrees counter-clockwise on a canvas that grows, edges continued, and squeezed again;
    4 x 4 points a pixel, so that 0 changes nothing and 30 does not alias. Else as they are."""
    images = data.unit(images)
    if kind == "heights":
        images = F.interpolate(images, size=(value, value * W // H), mode="bilinear", antialias=True)
        return F.interpolate(images, size=(H, W), mode="bicubic").clamp(0, 1)
    if kind == "rotations":
        angle = torch.full((len(images),), math.radians(value), device=images.device)
        return data.coarse_view(data.warp(F.interpolate(images, scale_factor=4), data.turned(angle, W / H)), (H, W))
    return images

def read_source(read, source, args, rank=0, world=1, group=None):
    """Every crop once over all ranks -> rows (label, reading, confidence), ("", None, 0) for the damaged; why they are.
    `read`: crops -> [(text, confidence)]. Fine-tuning validates by this too. Crops are not sorted, since a word's length
    is known only once it is read: `decode` drops what has ended."""
    rows, broken = {}, []
    for ids, images, labels, damaged in data.read_all(source, args.batch_size, args.workers, rank, world):
        for i, label in zip(ids, labels):
            if args.data and label is None:
                raise UserError(f"{source.where(i)}: no label; expected labelled crops: only --images reads without")
            if vars(args).get("predictions") and set("\t\n") & set(label):
                raise UserError(f"{source.where(i)}: {label!r} holds a tab or line end: no --predictions of it")
        rows.update((i, (label, *word)) for i, label, word in zip(ids, labels, read(images) if ids else ()))
        broken += damaged
    parts = [(rows, broken)] * world
    if world > 1:
        dist.all_gather_object(parts, parts[0], group=group)
    rows = {i: row for part, _ in parts for i, row in part.items()}
    return [rows.get(i, ("", None, 0)) for i in range(len(source))], [why for _, part in parts for why in part]

# ---- pictures

def marked(truth, reading, protocol):
    """The reading as it is compared, in pieces (text, colour): wrong letters red, each missing one a red _."""
    a, b, pieces = normalize(truth, protocol), normalize(reading, protocol), []
    for tag, i, j, k, m in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        pieces += [(b[k:m], BLACK if tag == "equal" else RED), ("_" * (j - i - m + k), RED)]
    return pieces

@torch.inference_mode()
def attention(net, images):
    """-> what is read, ids (B, T); where the encoder's last block looks (B, 1+N, 1+N) and, for each letter, the reader's
    last cross-attention (B, T, N), means over heads, as seen when the net is given its own reading once more."""
    own, cross, (ids, _), given = net.encoder.blocks[-1].attn, net.layers[-1].cross_attn, net.decode(images), {}
    hooks = [layer.register_forward_pre_hook(lambda layer, inputs: given.update({layer: inputs})) for layer in (own, cross)]
    net(images, ids)
    for hook in hooks:
        hook.remove()
    weights = lambda q, k: (q.float() @ k.float().mT * q.shape[-1] ** -0.5).softmax(-1).mean(1)
    (x,), (letters, (keys, _), *_) = given[own], given[cross]
    return ids, weights(*own.split(x)[:2]), weights(cross.queries(letters), keys)

@torch.inference_mode()
def look(net, source, path):
    """Draws where the network looks on the first 16 crops: [cls] in the encoder's last block, each letter in the
    decoder's last cross-attention, means over heads, without what falls on [cls]; red on one scale for the sheet.

    On rendered words, whose text pixels are known, returns over the first 256 the share of attention on text (even
    within a patch) and its entropy / log N (1: all over), for [cls], the mean patch and the mean letter; `text_area` is
    the share that blind attention has. Else None."""
    images, labels, maps, _, _ = data.read_batch(range(min(256, len(source))), source, char_maps=True)
    if not maps.any():                                                           # not rendered: only drawn
        images, labels = images[:16], labels[:16]
    if not labels:
        return None
    (h, w), rows = net.encoder.grid, []
    batch = data.normalize(images.to(net.pos.device))
    ids, own, letters = attention(net, batch)                                    # (B, T), (B, 1+N, 1+N), (B, T, N)
    own = own[:, :, 1:] / own[:, :, 1:].sum(-1, keepdim=True)                    # (B, 1+N, N)

    words = [[net.charset[k] for k in row if k != net.end] for row in ids[:16].tolist()]
    heats = [torch.cat([a[:1], b[:len(word)]]).cpu() for a, b, word in zip(own, letters, words)]
    full = max(4 / h / w, torch.cat(heats).quantile(0.995).item())
    for image, label, weights, word in zip(images, labels, heats, words):
        heat = F.interpolate((weights / full).clamp(max=1).view(-1, 1, h, w), size=(H, W))
        grey = 127 + image.float().mean(0).expand(len(heat), 3, H, W) / 2
        heat = grey.lerp(torch.tensor(RED).view(3, 1, 1).float(), heat).byte()
        cells = [(image, [(label or "", BLACK)]), *((x, [(c, GREY)]) for x, c in zip(heat, ["[cls]", *word]))]
        rows += [cells[k:k + 6] for k in range(0, len(cells), 6)]
    draw_sheet(rows, path)
    print(f"{path}: full red is {full * h * w:.1f} times an even spread")
    if not maps.any():
        return None

    text = F.avg_pool2d((maps[:, None] > 0).float(), net.encoder.patch).flatten(1).to(own)  # (B, N) part of a patch
    found = {"n": len(text), "text_area": text.mean().item()}
    print(f"attention on {found['n']} rendered words of {source.name}; text is {found['text_area']:.3f} of the area")
    for name, seen in {"cls": own[:, :1], "patches": own[:, 1:], "decoder": letters}.items():
        asked = (ids if name == "decoder" else torch.full(seen.shape[:2], -1)) != net.end    # (B, queries)
        share, entropy = (seen * text[:, None]).sum(-1), -torch.xlogy(seen, seen).sum(-1) / math.log(h * w)
        if asked.any():
            found[name] = dict(share=share[asked].mean().item(), entropy=entropy[asked].mean().item())
            print(f"  {name:8} {found[name]['share']:.3f} on text, entropy {found[name]['entropy']:.3f}")
    return found

# ---- main

def parse():
    parser = data.Parser(description=__doc__.split("\n\n")[0])
    add, what = parser.add_argument, parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", nargs="+", metavar="SRC", help="labelled sets, a row each: an LMDB folder or a tree of "
                      "them, a labels file, synth:N for rendered words in the checkpoint's charset")
    what.add_argument("--images", nargs="+", metavar="FILE", help="image files to read: prints path, text, confidence")
    what.add_argument("--score", metavar="FILE", help="lines of label<TAB>prediction, from any system; needs no --ckpt")
    add("--ckpt", metavar="FILE", help="best.pt or last.pt of finetune.py; it holds charset and sizes")
    add("--protocol", choices=PROTOCOLS, help="how labels and readings are compared; left out: waics, as in papers, "
        "but exact for a checkpoint with your own charset")
    add("--json", metavar="FILE", help="write the results here")
    add("--predictions", metavar="FILE", help="write label, reading, confidence, place here; --score reads it back")
    add("--heights", nargs="+", type=within(f"[1, {H}]", int), default=[], help="read crops reduced to these heights too; 8 is hard")
    add("--rotations", nargs="+", type=within("(-90, 90)"), default=[], help="read crops turned by these degrees too, leftwards")
    add("--attention", metavar="DIR", help="draw where the network looks; on synth:256 also its share on text")
    add("--errors", metavar="FILE", help="draw the 48 most confident errors here")
    add("--batch_size", type=within("[1, inf)", int), default=128, help="crops read at once by each process; lower it if memory runs out")
    add("--workers", type=within("[0, inf)", int), default=min(4, os.cpu_count()), help="processes that decode, for each rank; 0 for a handful")
    add("--device", default="auto", help="cpu, cuda, cuda:1; auto takes a CUDA GPU if there is one")
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="half is faster, less exact")
    add("--fonts", help="a folder of .ttf or .otf files for synth, besides those of the system")
    add("--rotate_tall", action="store_true", help="turn crops much taller than wide; for data with vertical words")
    args = parser.parse_args()
    given = [flag for flag in ("predictions", "heights", "rotations", "attention", "errors") if getattr(args, flag)]
    given += ["json"] * bool(args.json and args.images)
    if not args.score and not args.ckpt:
        parser.error("--ckpt is missing; type finetune.py's, such as out/finetune/best.pt")
    if given and not args.data:
        parser.error(f"--{' --'.join(given)} needs --data")
    if args.errors and not args.errors.lower().endswith(data.SUFFIXES):
        parser.error(f"--errors {args.errors}: expected a picture's name, such as errors.png")
    return args

def evaluate(net, sources, args, rank, world):
    """{name: source} -> what --json holds. Every set is read as it is, then at --heights and at --rotations."""
    def read(*view):
        rows, sets = {}, {}
        for name, source in sources.items():
            start = time.perf_counter()
            looking = lambda images: net.read(changed(images.to(net.pos.device), *view), args.batch_size, getattr(torch, args.dtype))
            rows[name], broken = read_source(looking, source, args, rank, world)
            one = score([row[:2] for row in rows[name]], args.protocol)
            sets[name] = dict(one, seconds=time.perf_counter() - start)
            print("".join(f"damaged: {why}\n" for why in broken[:5] if view[0] == "sets" and not rank), end="")
        return summary(sets, args.protocol), rows

    result, rows = read("sets", 0)
    for kind, values in dict(heights=args.heights, rotations=args.rotations).items():
        for value in values:
            result.setdefault(kind, {})[f"{value:g}"] = read(kind, value)[0]
    if rank:
        return None
    print_table(result)                                                          # whatever becomes of the files
    rows = [(*row, sources[name], i) for name in sources for i, row in enumerate(rows[name])]
    if args.predictions:
        with open(args.predictions, "w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            for label, text, sure, source, i in rows:
                sure = "damaged" if text is None else f"{sure:.6g}"
                print(label, text or "", sure, source.where(i), sep="\t", file=file)
    if args.errors:
        wrong = [row for row in rows if score([row[:2]], args.protocol)["evaluated"]
                 and normalize(row[0], args.protocol) != normalize(row[1], args.protocol)]
        sheet = [[(None, [(title, GREY)]) for title in ("image", "truth", "reading")]]
        for label, text, sure, source, i in sorted(wrong, key=lambda row: -row[2])[:48]:
            sheet.append([(source.get(i).image, [(f"{source.where(i)}   {sure:.3f}", GREY)]), (None, [(label, BLACK)]),
                          (None, marked(label, text, args.protocol))])
        draw_sheet(sheet, args.errors)
        print(f"{args.errors}: the {len(sheet) - 1} most confident of {len(wrong):,} errors")
    if args.attention:
        paths = [os.path.join(args.attention, re.sub(r"[^\w.-]", "_", name) + ".png") for name in sources]
        looks = {name: look(net, sources[name], path) for name, path in zip(sources, paths)}
        result["attention"] = {name: one for name, one in looks.items() if one}
    return result

def main():
    args, start = parse(), time.perf_counter()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if rank and not args.data:                                               # one process is enough
        return
    if args.score:
        args.protocol = args.protocol or "waics"
        one = dict(score(read_predictions(args.score), args.protocol), seconds=time.perf_counter() - start)
        result = summary({os.path.basename(args.score): one}, args.protocol)
        print_table(result)
    else:
        net, sources = load_recognizer(args.ckpt, data.device(args.device)), {}
        args.protocol = args.protocol or default_protocol(net.charset)
    if args.images:
        source = data.Files([(path, None) for path in args.images], "", "--images", args.rotate_tall)
        rows, broken = read_source(lambda images: net.read(images, args.batch_size, getattr(torch, args.dtype)), source, args)
        for path, (_, text, sure) in zip(args.images, rows):
            print(f"{path}\t{text}\t{sure:.6g}\n" if text is not None else "", end="")
        if broken:
            raise UserError(f"{len(broken)} of {len(args.images)} could not be read: " + "; ".join(broken))
        return
    if args.data and len({*map(os.path.realpath, args.data)}) < len(args.data):
        raise UserError(f"--data {' '.join(args.data)}: one set twice; each is one row of the table")
    for src in args.data or ():
        source = data.open_source(src, fonts=args.fonts, rotate_tall=args.rotate_tall, chars=net.charset)
        names = source.name, src.rstrip("/"), os.path.abspath(src)
        sources[next(name for name in names if name not in sources)] = source
    for path in filter(None, (args.json, args.predictions, args.errors)):        # now, not after an hour of reading
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        open(path, "a").close()
    if args.data:
        os.makedirs(args.attention or ".", exist_ok=True)
        if world > 1:
            dist.init_process_group("gloo")                                      # only readings travel, from CPU to CPU
        if rank == 0:
            print(f"{' '.join(sys.argv)}\ntorch {torch.__version__}  {net.pos.device} x{world}  {args.dtype}\n"
                  f"{sum(p.numel() for p in net.parameters()) / 1e6:.2f} M parameters, "
                  f"{len(net.charset)} characters, {sum(map(len, sources.values())):,} crops")
        result = evaluate(net, sources, args, rank, world)
    if result and args.json:
        with open(args.json, "w", encoding="utf-8", errors="backslashreplace") as file:    # JSON's own way to write half a letter
            json.dump(result, file, indent=1, ensure_ascii=False)

if __name__ == "__main__":
    data.run(main)
