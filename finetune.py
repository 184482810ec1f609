"""Fine-tunes a pre-trained encoder into a recognizer: labelled crops in, text out.

    python finetune.py --init out/mnsp/last.pt --data synth --val synth:1000:1      a laptop
    python finetune.py --init out/mnsp/last.pt --data L/train --val L/val --compile     one GPU
    torchrun --nproc_per_node=8 finetune.py --init out/mnsp/last.pt \\
             --data L/train --val L/val               eight GPUs: LMIM's data, schedule

Read `main`: it holds the training loop, the same as pretrain.py's but for labels,
augmentation and validation. Writes to --out_dir: last.pt, best.pt (highest accuracy on
--val, which should never be a test set), log.jsonl. evaluate.py needs nothing but such a
checkpoint.
"""
import math
import os
import re
import signal
import sys
import time

if __name__ == "__main__":              # Ctrl-C while torch is loading ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch
import torch.nn.functional as F

import evaluate
from common import (
    Log, Parser, Replayed, StopSignal, UserError, add_training_flags, autocast,
    average_over_ranks, check_ranks_agree, check_resume, check_training_flags, count_steps,
    find_checkpoint, is_recorded, is_rendered, join_ranks, learning_rate, load_state,
    number_in, parse_with_recipe, peak_learning_rate, pick_device, pick_dtype, rank,
    read_checkpoint, resume_training, run_main, save_checkpoint, say, seed_dropout,
    step_generator, step_unless_not_finite, stop_if_not_finite, to_device, to_unit,
    training_state, typed_flags, weight_groups, world_size, wrap_model,
)
from data import (
    AUGMENT_NUMBERS, DamageCount, Parts, Subset, augment_from_numbers, batches,
    fit_label, fit_labels, next_batch, open_sources, read_charset, readable_labels, rows_in_step,
    say_fonts, share_words,
)
from model import (
    MODELS, Recognizer, ViT, compile_layers, encoder_tensors, model_of, normalize_pixels,
)

# what --model changes in the flags' defaults; vit_small's are LMIM's: lr 2e-4 at 512 words
# a step, 10 epochs
RECIPES = {
    "vit_nano": dict(batch_size=64, max_steps=9000, blr=4e-3, warmup_epochs=0.3, clip_grad=20.0,
                     layer_decay=1.0, drop_path=0.0, dropout=0.0, spell=10.0, save_every=1000),
    "vit_mini": dict(batch_size=256, max_steps=12500, blr=2e-3, warmup_epochs=0.1, clip_grad=20.0,
                     layer_decay=1.0, drop_path=0.0, dropout=0.0, spell=10.0, save_every=1000),
    "vit_tiny": dict(blr=4e-4),
    "vit_small": dict(blr=1e-4),
    "vit_base": dict(blr=1e-4),
}


# ---- labels

def encode_labels(labels, model):
    """Words -> classes (B, T): characters, end, then padding. T is the longest, rounded up
    to 4: a step is recorded for each shape, see Replayed in common.py."""
    rows = []
    for label in labels:
        rows.append([model.index[character] for character in label] + [model.end])
    longest = max(len(row) for row in rows)
    T = min(math.ceil(longest / 4) * 4, model.max_length + 1)
    return torch.tensor([row + [model.pad] * (T - len(row)) for row in rows])


def under_patches(char_maps, targets, model):
    """The class of the character under each patch (B, N); padding where there is none, or where it
    is not known, as on real crops. char_maps (B, 32, 128): 0, or n on the pixels of a word's n-th
    character. Of two characters under a patch the later one, the larger n, counts."""
    n_th = F.max_pool2d(char_maps.float()[:, None], model.encoder.patch)    # (B, 1, h, w)
    n_th = n_th.flatten(1).long()                                           # (B, N)
    index = (n_th - 1).clamp(min=0)                 # in targets; any will do where there is none
    classes = targets.gather(1, index)
    return torch.where(n_th > 0, classes, model.pad)


def augment_crops(images, numbers, untouched):
    """images (B, 3, 32, 128) in [0, 1] -> augmented, each by its numbers (B, AUGMENT_NUMBERS).
    untouched (B,) bool: True is left as it is. It and the numbers are on the host."""
    chosen = (~untouched).nonzero()[:, 0]
    if len(chosen) == 0:
        return images
    numbers = to_device(numbers[chosen], images.device)
    chosen = to_device(chosen, images.device)
    augmented = augment_from_numbers(images[chosen], numbers)
    return images.index_copy(0, chosen, augmented)          # the caller's own stay as they are


def keep_fraction(source, share, seed):
    """A random `share` of the crops of each of source.parts. It is the same for the same seed,
    and all copies of a SRC@N keep the same crops."""
    subsets = {}                        # SRC@N is one object that stands N times in source.parts
    for part in source.parts:
        if part not in subsets:
            order = torch.randperm(len(part), generator=torch.Generator().manual_seed(seed))
            kept = order[:max(1, round(share * len(part)))].sort().values
            subsets[part] = Subset(part, kept)
    return Parts([subsets[part] for part in source.parts], source.name)


# ---- the model

def build_recognizer(args, charset):
    """-> Recognizer, and a line that says where its tensors came from. --init may be an encoder
    (ours or MAE's) or a whole recognizer; without it all weights are random."""
    sizes = MODELS[args.model]
    if args.freeze_encoder:                             # what does not learn needs no dropout
        encoder = ViT(**sizes["encoder"])
        encoder.requires_grad_(False)
    else:
        encoder = ViT(**sizes["encoder"], dropout=args.dropout, drop_path=args.drop_path)
    model = Recognizer(
        encoder, charset, args.max_length, dropout=args.dropout, spell=args.spell,
        **sizes["reader"])
    if not args.init:
        return model, "from scratch"

    checkpoint = read_checkpoint(args.init)
    stored = encoder_tensors(checkpoint, args.init)
    hint = f"; name the --model it was made with, not {args.model}"
    matched = load_state(encoder, stored, f"--init {args.init}", hint)
    check_heads(args, model_of(checkpoint))
    if isinstance(checkpoint.get("charset"), str) and "model" in checkpoint:
        said = load_recognizer_tensors(model, checkpoint, args.init)
        flags = checkpoint.get("args")
        turned = isinstance(flags, dict) and flags.get("rotate_tall")
        if turned and not args.rotate_tall:
            said += "; it was trained with --rotate_tall"
        return model, said
    return model, f"--init {args.init}: all {matched} tensors of the encoder loaded"


def check_heads(args, made_with):
    """UserError if --init was made with another number of heads, which no tensor's shape tells."""
    if made_with is None:                               # a foreign file
        return
    heads = MODELS[made_with]["encoder"]["heads"]
    expected = MODELS[args.model]["encoder"]["heads"]
    if heads != expected:
        raise UserError(f"--init {args.init}: {heads} heads, of --model {made_with}; {args.model} "
                        f"has {expected}; type --model {made_with}")


def load_recognizer_tensors(model, checkpoint, path):
    """Takes every tensor that fits from a recognizer; with another charset, the rows of the
    characters that both have. -> a line that says what was taken."""
    own, stored = model.state_dict(), checkpoint["model"]
    pairs = shared_rows(model, checkpoint["charset"])
    more_rows = len(checkpoint["charset"]) - len(model.charset)         # the file's than ours
    merged, anew = {}, []
    for name, tensor in own.items():
        has_row_per_class = name.startswith(("embed.", "classifier.", "char_head."))
        n_rows = len(tensor) + more_rows if has_row_per_class else len(tensor)
        if not fits(tensor, stored.get(name), n_rows):
            merged[name] = tensor
            anew.append(name)
        elif has_row_per_class:
            merged[name] = tensor.clone()
            for row, stored_row in pairs:
                if row < len(tensor):                       # embed alone has a row for start
                    merged[name][row] = stored[name][stored_row]
        else:
            merged[name] = stored[name]
    load_state(model, merged, path)             # refuses what is no number

    taken = len(own) - len(anew)
    said = f"--init {path}: a recognizer; {taken} of {len(own)} tensors loaded"
    if checkpoint["charset"] != model.charset and "embed.weight" not in anew:
        both = set(checkpoint["charset"]) & set(model.charset)
        said += f", with the rows of {len(both)} of {len(model.charset)} characters"
    if anew:
        said += f", anew: {' '.join(anew)}"
    return said


def fits(tensor, stored, n_rows):
    """True if what is stored, or None, is a tensor of our shape, but with n_rows rows."""
    if not torch.is_tensor(stored):
        return False
    return stored.shape == (n_rows, *tensor.shape[1:])


def shared_rows(model, stored_charset):
    """[(row, row in a recognizer of stored_charset)] of the classes that both have: characters, and
    end, padding, unknown, start, which come after the characters in this order."""
    pairs = []
    for stored_row, character in enumerate(stored_charset):
        if character in model.index:
            pairs.append((model.index[character], stored_row))
    specials = range(model.end, model.start + 1)
    for stored_row, row in enumerate(specials, start=len(stored_charset)):
        pairs.append((row, stored_row))
    return pairs


# ---- validation

def open_val(args, charset, protocol, options):
    """--val as one Source. UserError, before any training, if a label is missing, if none fits the
    charset, or if none can be scored. Labels that do not fit stay in it."""
    val = open_sources(args.val, **options)
    check_can_be_scored(val, protocol)
    fitting, report = fit_labels(val, charset, args.max_length)
    say(f"--val {report}")
    if len(fitting) == 0:
        raise UserError(f"--val {val.name}: no label fits --charset {args.charset} and "
                        f"--max_length {args.max_length}; none could be read right")
    for src in args.val:
        if any(share_words(src, other) for other in args.data):
            say(f"--val {src}: its words are trained on too; its accuracy says nothing of new ones")
    return val


def check_can_be_scored(val, protocol):
    """UserError if a label of --val is missing, or if none keeps a letter under the protocol. Says
    how many keep none."""
    labels = labels_of(val)
    if not labels:
        raise UserError(f"--val {val.name}: none of its {len(val):,} labels can be read")
    if all(evaluate.normalize(label, protocol) == "" for label in labels):
        raise UserError(f"--val {val.name}: no label keeps a letter under the protocol {protocol}, "
                        "which goes with --charset")
    empty = evaluate.line_on_empty_labels(labels, protocol)
    if empty:
        say(f"--val {val.name}: {empty}")


def labels_of(val):
    """The labels of --val, those of SRC@N once. UserError if one is missing."""
    labels = []
    for part in dict.fromkeys(val.parts):
        for i, label in readable_labels(part):
            if label is None:
                raise UserError(f"--val {part.where(i)}: no label; expected labelled crops")
            labels.append(label)
    return labels


def validate(model, val, protocol, args, dtype, stop, group):
    """Reads --val, every crop once over all ranks -> evaluate.score's dict, and the first few
    readings; or None, None if a signal came meanwhile. With stop=None no signal cuts it short."""
    def read(images):
        return model.read(images, len(images), dtype)

    model.eval()
    # eager, whatever is compiled: shapes change with every letter
    with torch.compiler.set_stance("force_eager"):
        rows, broken = evaluate.read_source(
            read, val, args.batch_size, args.workers, group, stop)
    model.train()
    if stop is not None and stop.came(group):
        return None, None
    if broken:
        say(f"--val: {len(broken)} of {len(val)} crops are damaged and were not read, the first "
            f"being {broken[0]}")
    result = evaluate.score([(row.label, row.text) for row in rows], protocol)
    if result["accuracy"] is None:
        raise UserError(f"--val {val.name}: {len(broken)} of its {len(val)} crops cannot be read, "
                        "the rest hold no letter")
    return result, [row for row in rows if row.text is not None][:4]


# ---- training

def main():
    args = parse_args()

    # where it runs, and whether there is something to go on from
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    args.dtype = str(dtype).removeprefix("torch.")          # --resume asks for the same
    group = join_ranks(device)
    say(" ".join(sys.argv))
    say(f"torch {torch.__version__}  {device} x{world_size()}  {args.dtype}")
    checkpoint = find_checkpoint(args.out_dir, args.resume)

    # data
    charset = read_charset(args.charset)
    protocol = evaluate.default_protocol(charset)
    options = dict(fonts=args.fonts, rotate_tall=args.rotate_tall, charset=charset,
                   max_length=args.max_length)
    source = open_sources(args.data, **options)
    say_fonts(source)
    if args.label_fraction < 1:
        n_crops = len(source)
        source = keep_fraction(source, args.label_fraction, args.seed)
        say(f"--label_fraction {args.label_fraction:g}: {len(source):,} of {n_crops:,} crops")
    source, report = fit_labels(source, charset, args.max_length)
    say(report)
    if len(source) == 0:
        raise UserError(f"--data {report}; expected labels that fit --charset {args.charset} and "
                        f"--max_length {args.max_length}; a folder of images has none: name its "
                        "labels file")
    val = None
    if args.val:
        val = open_val(args, charset, protocol, options)
    crops_per_step = args.batch_size * args.accum_iter * world_size()
    total_steps, warmup_steps = count_steps(args, len(source), crops_per_step)
    if checkpoint is not None:
        check_resume(checkpoint, args, crops_per_step, len(source))
        if checkpoint["charset"] != charset:
            raise UserError(f"--resume: --charset {args.charset} does not hold the characters, in "
                            "the order, of the checkpoint's")

    # model
    torch.manual_seed(args.seed)
    raw_model, said = build_recognizer(args, charset)
    raw_model.to(device)
    say(said)

    # optimizer
    peak_lr = peak_learning_rate(args, crops_per_step)
    groups = weight_groups(raw_model, args.weight_decay, args.layer_decay)
    optimizer = torch.optim.AdamW(groups, peak_lr, betas=(0.9, 0.999), fused=True)
    scaler = torch.amp.GradScaler(device.type, init_scale=4096, enabled=dtype == torch.float16)

    # go on where the checkpoint is
    step = 0
    best = -1.0                                     # --val's highest accuracy: none yet
    skipped = torch.zeros(2, device=device)         # non-finite steps: [0] in a row, [1] in all
    damage = DamageCount(args.max_damaged)
    if checkpoint is not None:
        step = resume_training(checkpoint, raw_model, optimizer, scaler, skipped, damage)
        best = checkpoint["best"]
        checkpoint = None                           # frees its memory
    check_ranks_agree(group, step, len(source))

    if args.compile:
        compile_layers(raw_model)
    # a step may be recorded as a CUDA graph, see Replayed in common.py
    recorded = is_recorded(args.compile, device)
    model, gradients = wrap_model(raw_model, recorded)
    stream = batches(source, args.batch_size, args.seed, step * crops_per_step,
                     rank(), world_size(), args.workers, char_maps=args.spell > 0)
    n_parameters = sum(parameter.numel() for parameter in raw_model.parameters())
    say(f"{args.model}  {n_parameters / 1e6:.2f} M parameters  {len(source)} crops  "
        f"{crops_per_step} a step  {total_steps} steps  lr {peak_lr:.2e}  "
        f"warm-up {warmup_steps} steps  out {args.out_dir}")

    def save(name, best):
        order = dict(crops_per_step=crops_per_step, n_crops=len(source))
        state = training_state(
            args, step, raw_model, optimizer, scaler, skipped, damage, order, group)
        state.update(charset=charset, best=best)
        return save_checkpoint(os.path.join(args.out_dir, name), state, group)

    def forward_backward(images, targets, chars_under=None):
        """Adds a micro-batch's gradient to the weights' -> its loss, its terms and accuracy."""
        with autocast(device, dtype):
            loss, terms, logits = model(normalize_pixels(images), targets, chars_under)
        scaler.scale(loss / args.accum_iter).backward()
        right = (logits.argmax(-1) == targets) | (targets == raw_model.pad)         # (B, T)
        terms["accuracy"] = right.all(1).float().mean()
        return loss.detach(), {name: term.detach() for name, term in terms.items()}

    if recorded:
        forward_backward = Replayed(forward_backward)

    stop = StopSignal()
    log = Log(args, step, total_steps, crops_per_step, device, group)
    while step < total_steps and not stop.came(group):
        log.start_step()
        lr = learning_rate(step, total_steps, warmup_steps, peak_lr, args.min_lr)
        for param_group in optimizer.param_groups:
            param_group["lr"] = lr * param_group["lr_scale"]
        seed_dropout(args.seed, step)
        generator = step_generator(args.seed, step, stream=0)
        numbers = torch.rand(crops_per_step, AUGMENT_NUMBERS, generator=generator)  # of all ranks

        for micro_step in range(args.accum_iter):
            began = time.perf_counter()
            batch = next_batch(stream, damage)
            log.waited(time.perf_counter() - began)
            rows = rows_in_step(micro_step, args.batch_size)
            # labels as the charset writes them: in one case, say
            words = [fit_label(label, charset, args.max_length).text for label in batch.labels]
            targets = to_device(encode_labels(words, raw_model), device)    # (B, T)
            images = to_unit(to_device(batch.images, device))               # (B, 3, 32, 128)
            untouched = torch.zeros(len(images), dtype=torch.bool)          # all are augmented
            inputs = dict(targets=targets)
            if args.spell:
                # rendered words stay as they are: a word that is moved no longer fits its map
                untouched = (batch.char_maps > 0).flatten(1).any(1)
                char_maps = to_device(batch.char_maps, device)
                inputs["chars_under"] = under_patches(char_maps, targets, raw_model)
            inputs["images"] = augment_crops(images, numbers[rows], untouched)

            if world_size() > 1 and not recorded:           # DDP shares gradients once a step
                model.require_backward_grad_sync = micro_step == args.accum_iter - 1
            loss, terms = forward_backward(**inputs)
            log.add(loss, terms)

        if recorded:
            average_over_ranks(gradients)
        scaler.unscale_(optimizer)
        max_norm = args.clip_grad or math.inf
        grad_norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), max_norm)
        step_unless_not_finite(optimizer, scaler, grad_norm, skipped)
        optimizer.zero_grad(set_to_none=not recorded)       # a recording needs them in their place
        step += 1

        val_due = val is not None and (step % args.sample_every == 0 or step == total_steps)
        line_due = val_due or step % args.log_every == 0 or step in (1, total_steps)
        if line_due:
            log.read_losses()                   # waits for the device, as a part of the step
        log.end_step()

        scores, improved = {}, False
        if val_due:
            cut_by = stop
            if step == total_steps:
                cut_by = None                   # no signal cuts the last one short
            result, few = validate(raw_model, val, protocol, args, dtype, cut_by, group)
            if result is None:
                say(f"step {step}: the validation was cut short by a signal and is left out")
            else:
                readings = "  ".join(f"{row.label}>{row.text}" for row in few)
                say(f"step {step}  val {result['accuracy']:.1f} {protocol}  "
                    f"1-NED {result['ned']:.1f}  {readings}")
                scores = dict(val_accuracy=result["accuracy"], val_ned=result["ned"])
                improved = result["accuracy"] > best
        if line_due:
            log.write(step, lr, skipped, damage.damaged, **scores)
            stop_if_not_finite(skipped, step, args)
        if improved:                            # saved after the line, which ends a bad run
            if save("best.pt", result["accuracy"]):
                best = result["accuracy"]
        if step % args.save_every == 0 and step < total_steps:
            if skipped[0] == 0:                 # else last.pt stays as before the bad steps
                save("last.pt", best)

    if not save("last.pt", best):
        raise UserError(f"{args.out_dir}: the last checkpoint was not written; mend the reason "
                        "above and add --resume")
    log.close()
    if step < total_steps:
        say(f"stopped by a signal at step {step}; add --resume to go on")
        raise KeyboardInterrupt             # status 130, so that `finetune.py && ...` stops too
    if best < 0:
        say(f"checkpoint {os.path.join(args.out_dir, 'last.pt')}")
    else:
        say(f"checkpoint {os.path.join(args.out_dir, 'best.pt')}  best val {best:.1f}")


# ---- flags

def parse_args():
    parser = Parser(__doc__)
    add, share = parser.add_argument, number_in("(0, 1]")
    add("--init",
        help="checkpoint to start from: pretrain.py's, a recognizer's, MAE's, LMIM's; left out: "
        "from scratch")
    add_training_flags(parser, MODELS)
    add("--val", nargs="+", metavar="SRC",
        help="labelled crops that choose best.pt, read every --sample_every steps; never a test "
        "set")
    add("--charset", default="94",
        help="36 (case folded), 62, 94, or a UTF-8 file of the characters of your script")
    add("--max_length", type=number_in("[1, inf)", int), default=25,
        help="longest word, in characters; 40 for lines of Chinese: above 25 synth draws lines too")
    add("--layer_decay", type=share, default=0.75,
        help="each encoder layer learns at this share of the next's rate")
    add("--drop_path", type=number_in("[0, 1)"), default=0.1,
        help="share of branches skipped in the encoder's last block, less below; 0 for short "
        "runs")
    add("--dropout", type=number_in("[0, 1)"), default=0.1,
        help="in attention, FFN and embeddings; 0 for short runs")
    add("--label_fraction", type=share, default=1.0,
        help="train on this share of each SRC, drawn once by --seed")
    add("--freeze_encoder", action="store_true",
        help="train all but the encoder, to measure what it holds")
    add("--spell", type=number_in("[0, inf)"), default=0.0,
        help="weight of naming the character under each patch of rendered words, whose boxes are "
        "known: supervision beyond the labels, which gets small models off the ground; rendered "
        "words are then not augmented")
    add("--out_dir", default=os.path.join("out", "finetune"), help="where to write")
    args = parse_with_recipe(parser, RECIPES, stored_model=model_of_init())

    check_training_flags(parser, args)
    typed = typed_flags()
    if "sample_every" in typed and not args.val:
        parser.error("--sample_every has no effect without --val; name labelled crops that are "
                     "not trained on")
    for src in args.val or ():
        if re.fullmatch("synth(@[0-9]+)?", src):
            parser.error(f"--val {src}: a million words take too long to read; type synth:1000:1, "
                         "a thousand words of another draw")
    if "spell" in typed and args.spell > 0 and not any(is_rendered(src) for src in args.data):
        parser.error("--spell has no effect without rendered words; add synth to --data")
    for flag in ("layer_decay", "drop_path"):
        if flag in typed and args.freeze_encoder:
            parser.error(f"--{flag} has no effect with --freeze_encoder; leave one of them out")
    if args.freeze_encoder and not args.init:
        parser.error("--freeze_encoder without --init keeps random weights; name a checkpoint")
    return args


def model_of_init():
    """The --model that --init was made with, if it is one of ours, or None. It is asked before the
    flags are parsed, since their defaults go by the model."""
    first = Parser(add_help=False)
    first.add_argument("--init")
    known, rest = first.parse_known_args()
    if not known.init or "-h" in rest or "--help" in rest:      # --help reads no file
        return None
    return model_of(read_checkpoint(known.init))


if __name__ == "__main__":
    run_main(main)
