"""Fine-tunes a pre-trained encoder into a recognizer: labelled crops in, text out.

    python finetune.py --init out/mnsp/last.pt --data synth --val synth:1000:1      a laptop
    python finetune.py --init out/mnsp/last.pt --data L/train --val L/val --compile     one GPU
    torchrun --nproc_per_node=8 finetune.py --init out/mnsp/last.pt \\
             --data L/train --val L/val                         eight GPUs: LMIM's recipe

Read `main`: it holds the training loop, the same as pretrain.py's but for labels and
validation. Writes to --out_dir: last.pt, best.pt (highest accuracy on --val, which should
never be a test set), log.jsonl. evaluate.py needs nothing but such a checkpoint.
"""
import contextlib
import math
import os
import sys

import torch
import torch.nn.functional as F

import evaluate
from common import (
    Log, Parser, UserError, add_training_flags, autocast, check_ranks_agree,
    check_resume, check_training_flags, count_steps, find_checkpoint, join_ranks,
    learning_rate, load_state, number_in, parse_with_recipe, pick_device, pick_dtype,
    rank, read_checkpoint, resume_training, run_main, save_checkpoint, say,
    seed_dropout, step_generator, step_unless_not_finite, stop_if_not_finite,
    stop_requested, to_device, to_unit, training_state, watch_signals, weight_groups,
    world_size, wrap_model,
)
from data import (
    AUGMENT_NUMBERS, Damaged, DamageCount, Parts, augment_from_numbers, batches,
    fit_label, fit_labels, next_batch, open_sources, read_charset,
)
from model import MODELS, Recognizer, ViT, load_encoder, normalize_pixels

# what --model changes in the flags' defaults; vit_small's are LMIM's: lr 2e-4 at 512 words
# a step, 10 epochs
RECIPES = {
    "vit_nano": dict(batch_size=64, max_steps=9000, blr=4e-3, warmup_epochs=0.3, clip_grad=20.0,
                     layer_decay=1.0, drop_path=0.0, dropout=0.0, spell=10.0, save_every=1000),
    "vit_tiny": dict(blr=4e-4),
    "vit_small": dict(blr=1e-4),
    "vit_base": dict(blr=1e-4),
}


# ---- labels

def encode_labels(labels, model):
    """Words -> classes (B, T): characters, end, then padding. T is the longest, rounded up
    to 4: few shapes to compile."""
    rows = []
    for label in labels:
        rows.append([model.index[character] for character in label] + [model.end])
    longest = max(len(row) for row in rows)
    T = min(math.ceil(longest / 4) * 4, model.max_length + 1)
    return torch.tensor([row + [model.pad] * (T - len(row)) for row in rows])


def under_patches(char_maps, targets, model):
    """char_maps (B, 32, 128), k > 0 where the k-th character is -> the class of the
    character under each patch (B, N), the last if there are two; padding where there is
    none, or where it is not known: on real crops."""
    # (B, N)
    k = F.max_pool2d(char_maps.float()[:, None], model.encoder.patch)   # (B, 1, h, w)
    k = k.flatten(1).long()                                             # (B, N)
    classes = targets.gather(1, (k - 1).clamp(min=0))
    return torch.where(k > 0, classes, model.pad)


def augment_real(images, char_maps, numbers):
    """Augments (B, 3, 32, 128) in [0, 1] by numbers (B, AUGMENT_NUMBERS). With char_maps
    rendered words stay as they are: they come varied, and the places of their letters would
    have to move along."""
    if char_maps is None:
        return augment_from_numbers(images, to_device(numbers, images.device))
    # on the host, where nothing waits
    real = (char_maps.flatten(1).amax(1) == 0).nonzero()[:, 0]
    if len(real) == 0:
        return images
    places = to_device(real, images.device)
    numbers = to_device(numbers[real], images.device)
    images[places] = augment_from_numbers(images[places], numbers)
    return images


def label_fraction(source, share, seed):
    """A random `share` of the crops of each of source.parts, the same for the same seed,
    and in every copy of a SRC@N."""
    parts = []
    for part in source.parts:
        order = torch.randperm(len(part), generator=torch.Generator().manual_seed(seed))
        kept = order[:max(1, round(share * len(part)))].sort().values
        parts.append(Parts([part], part.name, kept))
    return Parts(parts, source.name)


# ---- the model

def build_recognizer(args, charset):
    """-> Recognizer from --init: an encoder (ours or MAE's), or a whole recognizer; left
    out: random weights; and a line that says which tensors came from where."""
    options = dict(dropout=args.dropout, drop_path=args.drop_path)
    if args.freeze_encoder:
        options = {}
    encoder = ViT(**MODELS[args.model]["encoder"], **options)
    sizes = MODELS[args.model]["reader"]
    model = Recognizer(
        encoder, charset, args.max_length, dropout=args.dropout, spell=args.spell, **sizes)
    if args.freeze_encoder:
        encoder.requires_grad_(False)
    if not args.init:
        return model, "from scratch"

    stored = load_encoder(args.init).state_dict()
    hint = f"; name the --model it was made with, not {args.model}"
    matched = load_state(encoder, stored, f"--init {args.init}", hint)
    checkpoint = read_checkpoint(args.init)
    if "charset" in checkpoint:
        return model, load_recognizer_tensors(model, checkpoint, args.init)
    return model, f"--init {args.init}: all {matched} tensors of the encoder loaded"


def load_recognizer_tensors(model, checkpoint, path):
    """Takes every tensor that fits from a recognizer; with another charset not those of its
    letters. -> what it did."""
    letters = ()
    if checkpoint["charset"] != model.charset:
        letters = ("embed.", "classifier.", "char_head.")
    own, stored = model.state_dict(), checkpoint["model"]
    anew = []
    for name in own:
        fits = name in stored and stored[name].shape == own[name].shape
        if fits and not name.startswith(letters):
            own[name] = stored[name]
        else:
            anew.append(name)
    load_state(model, own, path)
    said = f"--init {path}: a recognizer; {len(own) - len(anew)} of {len(own)} tensors loaded"
    if anew:
        said += f", anew: {' '.join(anew)}"
    return said


# ---- validation

def open_val(srcs, protocol, **options):
    """--val as one Source, once it is known, before any training, that its labels are there
    and can be scored."""
    val, letters = open_sources(srcs, **options), 0
    for i in range(len(val)):
        with contextlib.suppress(Damaged):                  # which is counted when it is read
            label = val.label(i)
            if label is None:
                raise UserError(f"--val {val.where(i)}: no label; expected labelled crops")
            letters += len(evaluate.normalize(label, protocol))
    if letters == 0:
        raise UserError(f"--val {val.name}: no label keeps a letter under the protocol {protocol}, "
                        "which goes with --charset")
    return val


def validate(model, val, protocol, args, dtype, group):
    """Reads --val, every crop once over all ranks -> evaluate.score's dict, and the first
    few readings."""
    def read(images):
        return model.read(images, len(images), dtype)

    model.eval()
    rows, broken = evaluate.read_source(read, val, args.batch_size, args.workers, group)
    model.train()
    if broken:
        say(f"--val: {len(broken)} crops are damaged and were not read, the first being "
            f"{broken[0]}")
    result = evaluate.score([(row.label, row.text) for row in rows], protocol)
    if result["accuracy"] is None:
        raise UserError(f"--val {val.name}: {len(broken)} of its {len(val)} crops cannot be read, "
                        "the rest hold no letter")
    return result, [row for row in rows if row.text is not None][:4]


# ---- flags

def parse_args():
    parser = Parser(description=__doc__.split("\n\n")[0])
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
        help="longest word, in characters; 40 for lines of Chinese")
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
        "known: supervision beyond the labels, which gets small models off the ground")
    add("--out_dir", default=os.path.join("out", "finetune"), help="where to write")
    args = parse_with_recipe(parser, RECIPES, stored_model=model_of_init())

    typed = check_training_flags(parser, args)
    if "sample_every" in typed and not args.val:
        parser.error("--sample_every has no effect without --val; name labelled crops that are "
                     "not trained on")
    for flag in ("layer_decay", "drop_path"):
        if flag in typed and args.freeze_encoder:
            parser.error(f"--{flag} has no effect with --freeze_encoder; leave one of them out")
    return args


def model_of_init():
    """The --model that --init was made with, if it is one of ours, or None."""
    first = Parser(add_help=False)
    first.add_argument("--init")
    named, rest = first.parse_known_args()
    if named.init is None or "-h" in rest or "--help" in rest:
        return None
    stored = read_checkpoint(named.init).get("args")
    if isinstance(stored, dict) and stored.get("model") in MODELS:
        return stored["model"]
    return None


# ---- training

def main():
    args = parse_args()

    # where it runs, and whether there is something to go on from
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    args.dtype = str(dtype).removeprefix("torch.")
    group = join_ranks(device)
    say(" ".join(sys.argv))
    say(f"torch {torch.__version__}  {device} x{world_size()}  {args.dtype}")
    checkpoint = find_checkpoint(args.out_dir, args.resume)

    # data
    charset = read_charset(args.charset)
    protocol = evaluate.default_protocol(charset)
    options = dict(fonts=args.fonts, rotate_tall=args.rotate_tall, chars=charset)
    source = open_sources(args.data, **options)
    if args.label_fraction < 1:
        source = label_fraction(source, args.label_fraction, args.seed)
    source, report = fit_labels(source, charset, args.max_length)
    say(report)
    if len(source) == 0:
        raise UserError(f"--data {' '.join(args.data)}: no crop has a label that fits --charset "
                        f"{args.charset}")
    val = None
    if args.val:
        val = open_val(args.val, protocol, **options)
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
    peak_lr = args.lr or args.blr * crops_per_step / 256
    groups = weight_groups(raw_model, args.weight_decay, args.layer_decay)
    optimizer = torch.optim.AdamW(groups, peak_lr, betas=(0.9, 0.999), fused=True)
    scaler = torch.amp.GradScaler(device.type, init_scale=4096, enabled=dtype == torch.float16)

    # go on where the checkpoint is
    damage, step, bad, best = DamageCount(args.max_damaged), 0, [0.0, 0.0], -1.0
    if checkpoint is not None:
        step, bad = resume_training(checkpoint, raw_model, optimizer, scaler, damage)
        best = checkpoint["best"]
        checkpoint = None                                               # frees its memory
    bad = torch.tensor(bad, device=device)                  # skipped steps: in a row, in all
    check_ranks_agree(group, step, len(source))
    model = wrap_model(raw_model, args.compile)
    crops = batches(source, args.batch_size, args.seed, step * crops_per_step,
                    rank(), world_size(), args.workers, char_maps=args.spell > 0)
    n_parameters = sum(parameter.numel() for parameter in raw_model.parameters())
    say(f"{args.model}  {n_parameters / 1e6:.2f} M parameters  {len(source)} crops  "
        f"{crops_per_step} a step  {total_steps} steps  lr {peak_lr:.2e}  "
        f"warm-up {warmup_steps} steps  out {args.out_dir}")

    def save(name):
        data = dict(crops=crops_per_step, n=len(source))
        state = training_state(
            args, step, raw_model, optimizer, scaler, bad, damage, data, group)
        state.update(charset=charset, best=best)
        return save_checkpoint(os.path.join(args.out_dir, name), state, group)

    stop = watch_signals()
    log = Log(args, step, total_steps, crops_per_step, device, group)
    while step < total_steps and not stop_requested(stop, group):
        log.start_step()
        lr = learning_rate(step, total_steps, warmup_steps, peak_lr, args.min_lr)
        for weights in optimizer.param_groups:
            weights["lr"] = lr * weights["lr_scale"]
        seed_dropout(args.seed, step)
        generator = step_generator(args.seed, step, stream=0)
        # of all ranks, see draw_numbers
        numbers = torch.rand(crops_per_step, AUGMENT_NUMBERS, generator=generator)

        for micro_step in range(args.accum_iter):
            # images uint8 (B, 3, 32, 128)
            batch = next_batch(crops, damage, args.batch_size, log)
            first = (micro_step * world_size() + rank()) * args.batch_size
            # where these crops stand in the step's batch
            rows = first + torch.tensor(batch.places)
            words = [fit_label(label, charset, args.max_length)[0] for label in batch.labels]
            targets = to_device(encode_labels(words, raw_model), device)
            images = to_unit(to_device(batch.images, device))
            images = augment_real(images, batch.char_maps, numbers[rows])
            chars_under = None
            if args.spell:
                char_maps = to_device(batch.char_maps, device)
                chars_under = under_patches(char_maps, targets, raw_model)

            if world_size() > 1:                            # ranks share gradients once a step
                model.require_backward_grad_sync = micro_step == args.accum_iter - 1
            with autocast(device, dtype):
                loss, terms, logits = model(normalize_pixels(images), targets, chars_under)
            scaler.scale(loss / args.accum_iter).backward()
            right = (logits.argmax(-1) == targets) | (targets == raw_model.pad)
            log.add(loss, dict(terms, accuracy=right.all(1).float().mean()))

        scaler.unscale_(optimizer)
        max_norm = args.clip_grad or math.inf
        grad_norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), max_norm)
        bad = step_unless_not_finite(optimizer, scaler, grad_norm, bad)
        optimizer.zero_grad(set_to_none=True)
        step += 1

        val_due = val is not None and (step % args.sample_every == 0 or step == total_steps)
        line_due = val_due or step % args.log_every == 0 or step in (1, total_steps)
        log.end_step(line_due)
        scores, improved = {}, False
        if val_due:
            result, few = validate(raw_model, val, protocol, args, dtype, group)
            readings = "  ".join(f"{row.label}>{row.text}" for row in few)
            say(f"step {step}  val {result['accuracy']:.1f} {protocol}  "
                f"1-NED {result['ned']:.1f}  {readings}")
            scores = dict(val_accuracy=result["accuracy"], val_ned=result["ned"])
            improved = result["accuracy"] > best
        if line_due:
            log.write(step, lr, bad, damage.bad, **scores)
        if line_due or device.type == "cpu":        # a GPU's is looked at when it is waited for
            stop_if_not_finite(bad, step, args)
        if improved:
            before, best = best, result["accuracy"]
            if not save("best.pt"):
                best = before
        if step % args.save_every == 0 and step < total_steps and bad[0] == 0:
            save("last.pt")

    if not save("last.pt"):
        raise UserError(f"{args.out_dir}: the last checkpoint was not written; mend the reason "
                        "above and add --resume")
    if step < total_steps:
        say(f"stopped by a signal at step {step}; add --resume to go on")
        raise KeyboardInterrupt             # status 130: nothing that builds on this may follow
    if best < 0:
        say(f"checkpoint {os.path.join(args.out_dir, 'last.pt')}")
    else:
        say(f"checkpoint {os.path.join(args.out_dir, 'best.pt')}  best val {best:.1f}")


if __name__ == "__main__":
    run_main(main)
