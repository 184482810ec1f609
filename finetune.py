"""Fine-tunes a pre-trained encoder into a recognizer: labelled crops in, text out.

    python finetune.py --init out/mnsp/last.pt --data synth --val synth:1000:1                    a laptop
    python finetune.py --init out/mnsp/last.pt --data L/train --val L/val --compile               one GPU
    torchrun --nproc_per_node=8 finetune.py --init out/mnsp/last.pt --data L/train --val L/val    eight, LMIM's recipe

Writes to --out_dir: last.pt, prev.pt, best.pt (highest accuracy on --val, which should never be a test set), log.jsonl.
`evaluate.py --ckpt` needs nothing but such a file.
"""
import os
from contextlib import suppress

import torch

import evaluate
from data import (Damaged, Parser, Parts, UserError, augment, charset, fit_label, fit_labels, normalize, open_sources,
                  run, unit, within)
from model import MODELS, Recognizer, ViT, load_encoder, load_state, read_checkpoint
from pretrain import Run, parse, training_flags

RECIPES = {  # what --model changes in the defaults; vit_small's are LMIM's: lr 2e-4 at 512 words a step, 10 epochs
    "vit_nano": dict(batch_size=64, max_steps=9000, blr=4e-3, warmup_epochs=0.3, clip_grad=20.0, layer_decay=1.0,
                     drop_path=0.0, dropout=0.0, spell=10.0, save_every=1000),
    "vit_tiny": dict(blr=4e-4),
    "vit_small": dict(blr=1e-4),
    "vit_base": dict(blr=1e-4),
}

# ---- labels

def encode_labels(labels, model):
    """Words -> classes (B, T): characters, end, then padding; T is the longest, rounded up: few shapes to compile."""
    rows = [[*(model.index[c] for c in word), model.end] for word in labels]
    T = min(-(-max(map(len, rows)) // 4) * 4, model.max_length + 1)
    return torch.tensor([row + [model.pad] * (T - len(row)) for row in rows])

def under_patches(char_maps, targets, model):
    """Class of the character under each patch (B, N), the last if there are two; padding where there is none or it is not
    known (real crops)."""
    k = torch.nn.functional.max_pool2d(char_maps.float()[:, None], model.encoder.patch).flatten(1).long()  # 1: the first
    return torch.where(k > 0, targets.gather(1, (k - 1).clamp(min=0)), model.pad)

def label_fraction(source, share, seed):
    """A random `share` of the crops of each of source.parts, the same for the same seed, and in every copy of a SRC@N."""
    parts = []
    for part in source.parts:
        order = torch.randperm(len(part), generator=torch.Generator().manual_seed(seed))
        parts.append(Parts([part], part.name, order[:max(1, round(share * len(part)))].sort().values))
    return Parts(parts, source.name)

# ---- model

def build(args, chars):
    """Recognizer from --init: an encoder (ours or MAE's), or a whole recognizer; left out: random weights."""
    options = {} if args.freeze_encoder else dict(dropout=args.dropout, drop_path=args.drop_path)
    start, said = read_checkpoint(args.init) if args.init else {}, "from scratch"
    encoder = ViT(**MODELS[args.model]["encoder"], **options)
    reader = dict(MODELS[args.model]["reader"], dropout=args.dropout, spell=args.spell)
    model = Recognizer(encoder, chars, args.max_length, **reader)
    if args.init:
        stored = load_encoder(args.init).state_dict()
        matched = load_state(encoder, stored, f"--init {args.init}", f"; name the --model it was made with, not {args.model}")
        said = f"--init {args.init}: all {matched} tensors of the encoder loaded"
    if "charset" in start:
        own, old = model.state_dict(), start["model"]
        letters = ("embed.", "classifier.", "char_head.") if start["charset"] != chars else ()
        new = [k for k in own if k not in old or own[k].shape != old[k].shape or k.startswith(letters)]
        load_state(model, {k: own[k] if k in new else old[k] for k in own}, args.init)
        said = f"--init {args.init}: a recognizer; {len(own) - len(new)} of {len(own)} tensors loaded"
        said += f", anew: {' '.join(new)}" if new else ""
    if args.freeze_encoder:
        encoder.requires_grad_(False)
    return model, said

# ---- validation

def open_val(srcs, protocol, **options):
    """--val as one Source, once it is known, before any training, that its labels are there and can be scored."""
    val, letters = open_sources(srcs, **options), 0
    for i in range(len(val)):
        with suppress(Damaged):                         # which is counted when it is read
            label = val.label(i)
            if label is None:
                raise UserError(f"--val {val.where(i)}: no label; expected labelled crops")
            letters += len(evaluate.normalize(label, protocol))
    if not letters:
        raise UserError(f"--val {val.name}: no label keeps a letter under the protocol {protocol}, which goes with --charset")
    return val

def validate(training, source, protocol):
    """Reads --val, every crop once over all ranks -> evaluate.score's dict, and the first few (label, reading)."""
    net = training.raw.eval()
    read = lambda images: net.read(images, len(images), training.dtype)
    rows, broken = evaluate.read_source(read, source, training.args, training.rank, training.world, training.gloo)
    training.raw.train()
    if broken:
        training.say(f"--val: {len(broken)} crops are damaged and were not read, the first being {broken[0]}")
    result = evaluate.score([row[:2] for row in rows], protocol)
    if result["accuracy"] is None:
        raise UserError(f"--val {source.name}: {len(broken)} of its {len(source)} crops cannot be read, the rest hold no letter")
    return result, [row[:2] for row in rows if row[1] is not None][:4]

# ---- main

def main():
    parser = Parser(description=__doc__.split("\n\n")[0])
    add, share = parser.add_argument, within("(0, 1]")
    add("--init", help="checkpoint to start from: pretrain.py's, a recognizer's, MAE's, LMIM's; left out: from scratch")
    training_flags(parser)
    add("--val", nargs="+", metavar="SRC",
        help="labelled crops that choose best.pt, read every --sample_every steps; never a test set")
    add("--charset", default="94", help="36 (case folded), 62, 94, or a UTF-8 file of the characters of your script")
    add("--max_length", type=within("[1, inf)", int), default=25, help="longest word, in characters; 40 for lines of Chinese")
    add("--layer_decay", type=share, default=0.75, help="each encoder layer learns at this share of the next's rate")
    add("--drop_path", type=within("[0, 1)"), default=0.1, help="share of branches skipped in the encoder's last block, less below; 0 for short runs")
    add("--dropout", type=within("[0, 1)"), default=0.1, help="in attention, FFN and embeddings; 0 for short runs")
    add("--label_fraction", type=share, default=1.0, help="train on this share of each SRC, drawn once by --seed")
    add("--freeze_encoder", action="store_true", help="train all but the encoder, to measure what it holds")
    add("--spell", type=within("[0, inf)"), default=0.0,
        help="weight of naming the character under each patch of rendered words, whose boxes are known: supervision "
        "beyond the labels, which gets small models off the ground")
    add("--out_dir", default=os.path.join("out", "finetune"), help="where to write")
    args = parse(parser, RECIPES)

    training = Run(args)
    chars = charset(args.charset)
    protocol = evaluate.default_protocol(chars)
    options = dict(fonts=args.fonts, rotate_tall=args.rotate_tall, chars=chars)
    source = open_sources(args.data, **options)
    if args.label_fraction < 1:
        source = label_fraction(source, args.label_fraction, args.seed)
    source, report = fit_labels(source, chars, args.max_length)
    training.say(report)
    if not len(source):
        raise UserError(f"--data {' '.join(args.data)}: no crop has a label that fits --charset {args.charset}")
    val = open_val(args.val, protocol, **options) if args.val else None
    model, said = build(args, chars)
    training.say(said)
    training.more = dict(charset=chars, best=-1.0)
    training.prepare(model, source, (0.9, 0.999), args.layer_decay, char_maps=args.spell > 0)
    if training.more["charset"] != chars:
        raise UserError(f"--resume: --charset {args.charset} does not hold the characters, in the order, of the checkpoint's")

    for step in training.steps():
        for images, labels, char_maps, (rows, total) in training.micro_batches():
            words = [fit_label(label, chars, args.max_length)[0] for label in labels]
            targets = training.put(encode_labels(words, model))
            # with --spell rendered words stay as they are: they come varied, and their letters would have to move along
            real = torch.arange(len(images)) if char_maps is None else (char_maps.flatten(1).amax(1) == 0).nonzero()[:, 0]
            images = unit(images)
            if len(real):
                places = training.put(real)
                images[places] = augment(images[places], training.generator(), (rows[real], total))
            chars_under = None if char_maps is None else under_patches(training.put(char_maps), targets, model)
            with training.autocast():
                loss, terms, logits = training.model(normalize(images), targets, chars_under)
            right = ((logits.argmax(-1) == targets) | (targets == model.pad)).all(1).float().mean()
            training.backward(loss, dict(terms, accuracy=right))
        training.update()

        if val is not None and training.due(args.sample_every):
            result, few = validate(training, val, protocol)
            readings = "  ".join(f"{label}>{text}" for label, text in few)
            training.say(f"step {step + 1}  val {result['accuracy']:.1f} {protocol}  1-NED {result['ned']:.1f}  "
                         f"{readings}")
            training.row.update(val_accuracy=result["accuracy"], val_ned=result["ned"])
            if result["accuracy"] > training.more["best"]:
                before, training.more["best"] = training.more["best"], result["accuracy"]
                if not training.save("best.pt"):
                    training.more["best"] = before
    best = training.more["best"]
    training.say(f"checkpoint {os.path.join(args.out_dir, 'last.pt' if best < 0 else f'best.pt  best val {best:.1f}')}")

if __name__ == "__main__":
    run(main)
