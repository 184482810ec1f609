"""Pre-trains an encoder on crops of words without labels, by a method of METHODS in model.py: mim
(masked image modelling), nsp (next-scale prediction), mnsp (mim and nsp), lmim (mim, guided).

    python pretrain.py --method mnsp --model vit_nano           a laptop: rendered words
    python pretrain.py --method mnsp --compile --batch_size 256     one GPU
    torchrun --nproc_per_node=8 pretrain.py --method mnsp \\
             --data U/book32_lmdb U/cc_lmdb U/openvino_lmdb \\
             --teacher vit_small_checkpoint-19.pth              eight: LMIM's data and teacher

First come a step's random numbers, views and masks, then `main` with the training loop, last
the pictures and the flags. Writes to --out_dir: last.pt, log.jsonl (an object a logged step),
samples/step_*.png.

Every random number of a step is a function of --seed, the step and the crop's place in the
step's batch of all ranks. So a resumed run goes through the same numbers, and so does one
on another number of processes or one with accumulated gradients. (Two things differ: dropout is
each rank's and each micro-batch's own, and InfoNCE compares the crops of one micro-batch.)
"""
import math
import os
import signal
import sys
import time

if __name__ == "__main__":              # Ctrl-C while torch is loading ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch
import torch.nn.functional as F

from common import (
    H, W, Log, Parser, Replayed, StopSignal, UserError, add_training_flags, autocast,
    average_over_ranks, check_ranks_agree, check_resume, check_training_flags, count_steps,
    find_checkpoint, is_recorded, join_ranks, learning_rate, number_in, parse_size,
    parse_with_recipe, peak_learning_rate, pick_device, pick_dtype, rank, resume_training,
    run_main, save_checkpoint, say, seed_dropout, step_generator, step_unless_not_finite,
    stop_if_not_finite, to_device, tolerate_full_disk, training_state, typed_flags,
    weight_groups, world_size, wrap_model,
)
from data import (
    GREY, VIEW_NUMBERS, DamageCount, batches, check_output, coarse_view, draw_sheet, moved_view,
    next_batch, open_sources, read_batch, rows_in_step, say_fonts, still_view,
)
from model import (
    FORMS, GUIDES, METHODS, MODELS, Pretrainer, compile_layers, load_encoder,
    half_size, normalize_pixels, patch_norm, patchify, take, unpatchify,
)

# what --model changes in the flags' defaults, which are LMIM's for vit_small: 10 epochs,
# 8 GPUs of 64 crops
RECIPES = {
    "vit_nano": dict(batch_size=64, max_steps=2000, blr=6e-3, warmup_epochs=0.5, clip_grad=1.0,
                     mask_ratio=0.6),
    "vit_mini": dict(batch_size=256, max_steps=1000, blr=2e-3, warmup_epochs=0.1, clip_grad=1.0,
                     mask_ratio=0.6),
    "vit_tiny": dict(blr=5e-4),
}


# ---- the random numbers of a step, views and masks

BLOCK = 16                      # --mask block: a block's height and width, in pixels
SHIFT_NUMBERS = 2               # how far a crop's blocks are moved, up and left


def draw_numbers(step, n_crops, method, args, grid):
    """The random numbers of a step, uniform in [0, 1): a dict of tensors with a row for each of
    the step's crops on all ranks. Each rank and micro-batch takes the rows of its own crops, as
    if there were one large batch."""
    numbers = {}
    generator = step_generator(args.seed, step, stream=0)
    if method["nsp"]:
        numbers["coarse"] = torch.rand(n_crops, VIEW_NUMBERS, generator=generator)
    if method["guide"] != "none":
        numbers["guide"] = torch.rand(n_crops, VIEW_NUMBERS, generator=generator)

    generator = step_generator(args.seed, step, stream=1)
    n_patches = math.prod(grid)
    if args.mask == "block":
        numbers["mask"] = torch.rand(n_crops, SHIFT_NUMBERS + n_patches, generator=generator)
    else:
        numbers["mask"] = torch.rand(n_crops, n_patches, generator=generator)
    return numbers


def make_views(images, method, scales, crop_numbers, strength):
    """The views of a row of METHODS, in [-1, 1]: mim's guide, or None, and a list of nsp's views,
    one of each of `scales`, coarse to fine. The guide is moved and bent, of full size or of the
    finest of `scales`. nsp's views stay in place: moved ones would not tell where the target's
    letters are. images and crop_numbers, draw_numbers' dict, are on the same device."""
    guide, coarse = None, []
    if method["guide"] != "none":
        guide = moved_view(images, crop_numbers["guide"], strength)     # in [0, 1]
        if method["guide"] == "coarse":
            guide = coarse_view(guide, scales[-1])
        guide = normalize_pixels(guide)
    if method["nsp"]:
        still = still_view(images, crop_numbers["coarse"], strength)    # in [0, 1]
        for size in scales:
            coarse.append(normalize_pixels(coarse_view(still, size)))
    return guide, coarse


def make_mask(mask_numbers, kind, mask_ratio, grid, patch):
    """-> ids_keep (B, K), ids_mask (B, M). mask_numbers (B, ...): draw_numbers' "mask".

    All crops keep as many patches, so that shapes never change: K = N - round(mask_ratio * N), at
    least one, at most all but one."""
    if kind == "block":
        keys = block_keys(mask_numbers, grid, patch)                    # (B, N)
    else:
        keys = mask_numbers
    N = keys.shape[1]
    K = N - round(mask_ratio * N)
    K = min(max(K, 1), N - 1)
    ids = keys.argsort(dim=1, stable=True)          # a random order, the same on every device
    return ids[:, :K], ids[:, K:]


def block_keys(mask_numbers, grid, patch):
    """mask_numbers (B, 2 + N) -> sort keys (B, N). The patches of a block have nearly the same key,
    so that sorting keeps them together: a block is hidden as a whole, or seen. One is hidden in
    part, where the mask ratio falls into it. (Two are, if their random numbers are nearly the same:
    in two crops of a thousand.)

    Blocks of 16 x 16 pixels (or of a patch, where that is larger) tile the crop. The tiling is
    moved up and left by a part of a block, drawn anew for each crop."""
    h, w = grid
    block_h = max(1, BLOCK // patch[0])                                 # in patches
    block_w = max(1, BLOCK // patch[1])
    shift_y = (mask_numbers[:, 0:1] * block_h).long()                   # (B, 1), in patches
    shift_x = (mask_numbers[:, 1:2] * block_w).long()
    patch_numbers = mask_numbers[:, SHIFT_NUMBERS:]                     # (B, N)

    # blocks are numbered row by row, and as far apart as if there were w in a row
    rows = torch.arange(h, device=mask_numbers.device)
    columns = torch.arange(w, device=mask_numbers.device)
    block_row = (rows + shift_y) // block_h                             # (B, h)
    block_column = (columns + shift_x) // block_w                       # (B, w)
    block_id = block_row[:, :, None] * w + block_column[:, None, :]     # (B, h, w), below N
    block_id = block_id.flatten(1)                                      # (B, N)

    # a block needs a random number of its own, and there are no more blocks than patches: block i
    # takes the number of patch i
    block_numbers = patch_numbers.gather(1, block_id)                   # (B, N)
    return block_numbers + 1e-4 * patch_numbers             # within a block any order


# ---- training

def main():
    args, method, scales = parse_args()

    # where it runs, and whether there is something to go on from
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    args.dtype = str(dtype).removeprefix("torch.")          # --resume asks for the same
    group = join_ranks(device)
    say(" ".join(sys.argv))
    say(f"torch {torch.__version__}  {device} x{world_size()}  {args.dtype}")
    # the run's pictures must not become its crops: one path stands for all of them
    check_output(sample_path(args.out_dir, step=1), args.data)
    checkpoint = find_checkpoint(args.out_dir, args.resume)

    # data
    source = open_sources(
        args.data, fonts=args.fonts, rotate_tall=args.rotate_tall, labels=False)
    say_fonts(source)
    crops_per_step = args.batch_size * args.accum_iter * world_size()
    total_steps, warmup_steps = count_steps(args, len(source), crops_per_step)
    if checkpoint is not None:
        check_resume(checkpoint, args, crops_per_step, len(source))

    # model
    teacher = None
    if args.teacher:
        teacher = load_encoder(args.teacher).to(device)
        say(f"--teacher {args.teacher}: all {teacher.matched} tensors loaded")
    elif args.method == "lmim" and method["align"] == METHODS["lmim"]["align"]:
        say(f"lmim without --teacher: an align of {method['align']:g} is for a teacher's features; "
            "on pixels it read less than from scratch. Add --teacher, or --set align=0.02")
    torch.manual_seed(args.seed)
    raw_model = Pretrainer(method, args.model, scales, teacher)
    raw_model.to(device)
    grid, patch = raw_model.encoder.grid, raw_model.encoder.patch

    # optimizer
    peak_lr = peak_learning_rate(args, crops_per_step)
    groups = weight_groups(raw_model, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, peak_lr, betas=(0.9, 0.95), fused=True)
    scaler = torch.amp.GradScaler(device.type, init_scale=4096, enabled=dtype == torch.float16)

    # go on where the checkpoint is
    step = 0
    skipped = torch.zeros(2, device=device)         # non-finite steps: [0] in a row, [1] in all
    damage = DamageCount(args.max_damaged)
    if checkpoint is not None:
        step = resume_training(checkpoint, raw_model, optimizer, scaler, skipped, damage)
        checkpoint = None                           # frees its memory
    check_ranks_agree(group, step, len(source))

    if args.compile:
        compile_layers(raw_model)
    # a step may be recorded as a CUDA graph, see Replayed in common.py
    recorded = is_recorded(args.compile, device)
    model, gradients = wrap_model(raw_model, recorded)
    stream = batches(source, args.batch_size, args.seed, step * crops_per_step,
                     rank(), world_size(), args.workers)
    # up to 8 sound crops for the pictures, of the first 64
    pictured = read_batch(source, range(min(64, len(source)))).images[:8]
    n_parameters = sum(parameter.numel() for parameter in raw_model.parameters())
    say(f"{args.model}  {n_parameters / 1e6:.2f} M parameters  {len(source)} crops  "
        f"{crops_per_step} a step  {total_steps} steps  lr {peak_lr:.2e}  "
        f"warm-up {warmup_steps} steps  out {args.out_dir}")

    def save(name):
        order = dict(crops_per_step=crops_per_step, n_crops=len(source))
        state = training_state(
            args, step, raw_model, optimizer, scaler, skipped, damage, order, group)
        return save_checkpoint(os.path.join(args.out_dir, name), state, group)

    def forward_backward(images, **crop_numbers):
        """Adds a micro-batch's gradient to the weights' -> its loss, its terms. images are uint8
        (B, 3, 32, 128) on the device, and so are the crops' random numbers: draw_numbers'."""
        guide, coarse = make_views(
            images, method, raw_model.scales, crop_numbers, args.guidance_strength)
        ids_keep, ids_mask = make_mask(
            crop_numbers["mask"], args.mask, args.mask_ratio, grid, patch)
        with autocast(device, dtype):
            loss, terms, _ = model(normalize_pixels(images), guide, coarse, ids_keep, ids_mask)
        scaler.scale(loss / args.accum_iter).backward()
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
        numbers = draw_numbers(step, crops_per_step, method, args, grid)    # of all ranks

        for micro_step in range(args.accum_iter):
            began = time.perf_counter()
            batch = next_batch(stream, damage)
            log.waited(time.perf_counter() - began)
            images = to_device(batch.images, device)                # uint8 (B, 3, 32, 128)
            rows = rows_in_step(micro_step, args.batch_size)        # these crops' in numbers
            crop_numbers = {}
            for name, drawn in numbers.items():
                crop_numbers[name] = to_device(drawn[rows], device)
            if world_size() > 1 and not recorded:           # DDP shares gradients once a step
                model.require_backward_grad_sync = micro_step == args.accum_iter - 1
            loss, terms = forward_backward(images=images, **crop_numbers)
            log.add(loss, terms)

        if recorded:
            average_over_ranks(gradients)
        scaler.unscale_(optimizer)
        max_norm = args.clip_grad or math.inf
        grad_norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), max_norm)
        step_unless_not_finite(optimizer, scaler, grad_norm, skipped)
        optimizer.zero_grad(set_to_none=not recorded)       # a recording needs them in their place
        step += 1

        line_due = step % args.log_every == 0 or step in (1, total_steps)
        if line_due:
            log.read_losses()                   # waits for the device, as a part of the step
        log.end_step()
        if line_due:
            log.write(step, lr, skipped, damage.damaged)
            stop_if_not_finite(skipped, step, args)
        if rank() == 0 and (step % args.sample_every == 0 or step == total_steps):
            path = sample_path(args.out_dir, step)
            draw_samples(raw_model, pictured, device, dtype, args, path, step)
        if step % args.save_every == 0 and step < total_steps:
            if skipped[0] == 0:                 # else last.pt stays as before the bad steps
                save("last.pt")

    if not save("last.pt"):
        raise UserError(f"{args.out_dir}: the last checkpoint was not written; mend the reason "
                        "above and add --resume")
    log.close()
    if step < total_steps:
        say(f"stopped by a signal at step {step}; add --resume to go on")
        raise KeyboardInterrupt             # status 130, so that `pretrain.py && ...` stops too
    say(f"checkpoint {os.path.join(args.out_dir, 'last.pt')}")


# ---- pictures

WHITE_AT = 3                    # normalised pixels beyond this many deviations are black or white


def sample_path(out_dir, step):
    return os.path.join(out_dir, "samples", f"step_{step:06d}.png")


def draw_samples(model, images, device, dtype, args, path, step):
    """A sheet with a crop in each row. Columns: the crop; what mim sees and what it predicts; the
    same of nsp; the target. The numbers are always those of step 0, so that the sheets of a run
    can be compared."""
    if len(images) == 0:
        return
    grid, patch = model.encoder.grid, model.encoder.patch
    numbers = draw_numbers(0, len(images), model.method, args, grid)
    numbers = {name: to_device(drawn, device) for name, drawn in numbers.items()}
    images = to_device(images, device)
    guide, coarse = make_views(
        images, model.method, model.scales, numbers, args.guidance_strength)
    ids_keep, ids_mask = make_mask(numbers["mask"], args.mask, args.mask_ratio, grid, patch)
    image = normalize_pixels(images)

    model.eval()
    # eager, whatever is compiled: these crops are fewer, and drawn once in a while
    with torch.no_grad(), autocast(device, dtype), torch.compiler.set_stance("force_eager"):
        _, _, pred = model(image, guide, coarse, ids_keep, ids_mask)
        target = model.targets(image)[-1].float()                       # (B, N, C)
    model.train()

    columns = [("crop", image)]
    if "mim" in pred:
        columns += mim_columns(model, image, guide, target, ids_mask, pred["mim"].float())
    if "nsp" in pred:
        columns += nsp_columns(model, image, coarse, target, pred["nsp"].float())
    if model.teacher is None:
        columns.append(("target", unpatchify(target / WHITE_AT, grid, patch)))

    # a cell of the sheet is a picture or None, and pieces of text, each with its colour
    titles = []
    for title, _ in columns:
        titles.append((None, [(title, GREY)]))
    rows = [titles]
    for k in range(len(images)):
        pictures = [to_uint8(column[k]) for _, column in columns]
        rows.append([(picture, []) for picture in pictures])
    with tolerate_full_disk(path, step):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        draw_sheet(rows, path)
        say(f"picture    {path}")


def mim_columns(model, image, guide, target, ids_mask, pred):
    """[(title, pictures (B, 3, H, W) in [-1, 1])] of what mim sees and predicts. ids_mask and pred
    are as in Pretrainer.forward; target is the fine scale's."""
    grid, patch = model.encoder.grid, model.encoder.patch
    pixels = patchify(image, patch)
    grey = torch.zeros_like(take(pixels, ids_mask))
    columns = [("mim sees", unpatchify(put_in(pixels, ids_mask, grey), grid, patch))]
    if guide is not None:
        columns.append(("mim's guide", F.interpolate(guide, image.shape[-2:])))
    return columns + predicted_columns(model, image, target, ids_mask, pred, "mim")


def nsp_columns(model, image, coarse, target, pred):
    """The same of nsp, for which every patch is hidden."""
    columns = [("nsp sees", F.interpolate(view, image.shape[-2:])) for view in coarse]
    everything = torch.arange(pred.shape[1], device=image.device).expand(len(image), -1)
    return columns + predicted_columns(model, image, target, everything, pred, "nsp")


def predicted_columns(model, image, target, ids, pred, name):
    """The columns of pred (B, M, C), the patches ids (B, M). Pixels are shown twice: as the loss
    sees them, normalised per patch, and with the true mean and contrast of each patch put back, as
    MAE draws them.

    Features cannot be drawn. In their place stands the cosine between prediction and target:
    black is 0, white is 1. Patches that were visible are white too."""
    grid, patch = model.encoder.grid, model.encoder.patch
    pixels = patchify(image, patch)
    if model.teacher is None:
        _, mean, std = patch_norm(pixels)
        normalised = put_in(torch.zeros_like(pixels), ids, pred / WHITE_AT)
        in_colour = put_in(pixels, ids, pred * take(std, ids) + take(mean, ids))
        return [(f"{name} predicts", unpatchify(normalised, grid, patch)),
                (f"{name}, in colour", unpatchify(in_colour, grid, patch))]

    cosine = torch.cosine_similarity(pred, take(target, ids), dim=-1)   # (B, M)
    grey = 2 * cosine[..., None] - 1                        # [0, 1] -> [-1, 1], black to white
    grey = grey.expand(-1, -1, pixels.shape[-1])                        # (B, M, 3*p*q)
    likeness = put_in(torch.ones_like(pixels), ids, grey)
    return [(f"{name}, likeness", unpatchify(likeness, grid, patch))]


def put_in(ground, ids, values):
    """Tokens (B, N, C) with `values` (B, M, C) at the places ids (B, M)."""
    ids = ids[..., None].expand(-1, -1, ground.shape[-1])
    return ground.scatter(1, ids, values)


def to_uint8(picture):
    """[-1, 1] -> 0 to 255, on the host."""
    return (127.5 * (picture.clamp(-1, 1) + 1)).round().byte().cpu()


# ---- flags

def parse_args():
    """-> args, the row of METHODS, nsp's scales [(h, w), ...]."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--method", choices=METHODS, default="mnsp", help="a row of METHODS in model.py")
    add_training_flags(parser, MODELS)
    add("--teacher",
        help="checkpoint whose features are the target (MAE, MAERec, LMIM or ours); left out: "
        "pixels")
    add("--scales", nargs="+", metavar="HxW",
        help="sizes of nsp's views, height x width, coarse to fine; mim's coarse guide is of the "
        "last; left out: 16x64, half the crop, or 32x64 with patches as high as the crop")
    add("--mask_ratio", type=number_in("(0, 1)"), default=0.8, help="share of patches hidden")
    add("--mask", choices=["random", "block"], default="random",
        help="hide patches, or blocks of 16 x 16 pixels")
    add("--guidance_strength", type=number_in("[0, inf)"), default=1.0,
        help="how much the views differ from the crop: at 0 they are the crop itself, 1 is LMIM's "
        "medium")
    add("--set", nargs="+", default=[], metavar="KEY=VALUE",
        help="change the method's row of METHODS, for an ablation: guide=none, form=mse, nsp=0.5, "
        "align=0.1 (InfoNCE compares the crops of a micro-batch on all ranks)")
    add("--out_dir", help="where to write; left out: out/METHOD")
    args = parse_with_recipe(parser, RECIPES)
    if args.out_dir is None:
        args.out_dir = os.path.join("out", args.method)
    if args.scales is None:
        h, w = half_size(MODELS[args.model]["encoder"]["patch"])
        args.scales = [f"{h}x{w}"]

    check_training_flags(parser, args)
    method = change_method(parser, args)
    scales = [parse_size(text, "--scales") for text in args.scales]
    check_method(parser, args, method, scales)
    args.objective = method                     # goes into the checkpoint: --resume refuses another
    return args, method, scales


def change_method(parser, args):
    """--method's row of METHODS, changed by --set."""
    method = dict(METHODS[args.method])
    keys = []
    for setting in args.set:
        key, equals, value = setting.partition("=")
        if key in keys:
            parser.error(f"--set {' '.join(args.set)}: {key} is set twice; leave one out")
        keys.append(key)
        if not equals:
            parser.error(f"--set {setting}: expected KEY=VALUE, such as guide=none or align=0.1")
        if key == "guide" and value in GUIDES:
            method[key] = value
        elif key == "form" and value in FORMS:
            method[key] = value
        elif key in ("mim", "nsp", "align"):
            try:
                weight = float(value)
            except ValueError:
                weight = math.nan                           # which lies in no interval
            if not 0 <= weight < math.inf:
                parser.error(f"--set {setting}: expected a weight in [0, inf)")
            method[key] = weight
        else:
            parser.error(f"--set {setting}: expected guide={'|'.join(GUIDES)}, "
                         f"form={'|'.join(FORMS)}, or a weight of mim, nsp or align")
    return method


def check_method(parser, args, method, scales):
    """Which method goes with which flags: one `if` a mistake."""
    typed = typed_flags()
    guide = method["guide"]
    mim, nsp, align = method["mim"] > 0, method["nsp"] > 0, method["align"] > 0
    asked = f"--method {args.method}"
    if args.set:
        asked += f" --set {' '.join(args.set)}"

    if not mim and not nsp:
        parser.error(f"{asked}: nothing is predicted; give mim or nsp a weight")
    if guide != "none" and not mim:
        parser.error(f"{asked}: a guide needs mim, whose decoder sees it; give mim a weight, or "
                     "set guide=none")

    if align and "form" not in method:
        parser.error(f"{asked}: align needs a form; add form=infonce or form=mse to --set")
    n_cls = 0                                   # each view that is encoded has a [cls] token:
    if guide != "none":
        n_cls += 1                              # the guide,
    if nsp:
        n_cls += len(scales)                    # nsp's views,
    if mim:
        n_cls += 1                              # the masked crop
    if align and n_cls < 2:
        parser.error(f"{asked}: align needs two [cls] tokens, and there is one; set align=0")
    if align and method["form"] == "infonce" and args.batch_size * world_size() == 1:
        parser.error(f"{asked}: InfoNCE compares crops, and there is one; raise --batch_size")
    if not align and any(setting.startswith("form=") for setting in args.set):
        parser.error(f"{asked}: form has no effect without align; add align=0.02 to --set")

    patch_h, patch_w = MODELS[args.model]["encoder"]["patch"]
    for h, w in scales:
        if h % patch_h != 0 or w % patch_w != 0 or h > H or w > W or (h, w) == (H, W):
            parser.error(f"--scales {h}x{w}: expected multiples of the patch, {patch_h}x{patch_w}, "
                         f"below {H}x{W}")
    for (h, w), (finer_h, finer_w) in zip(scales, scales[1:]):
        if h > finer_h or w > finer_w or (h, w) == (finer_h, finer_w):
            parser.error(f"--scales {' '.join(args.scales)}: expected coarse to fine, each once")

    if "scales" in typed and not nsp and guide != "coarse":
        parser.error(f"--scales has no effect with {asked}, which has no coarse view")
    if len(scales) > 1 and not nsp:
        parser.error(f"--scales {' '.join(args.scales)}: {asked} has one coarse view; give one "
                     "size")
    if "guidance_strength" in typed and not nsp and guide == "none":
        parser.error(f"--guidance_strength has no effect with {asked}, which has no view but the "
                     "crop")
    for flag in ("mask", "mask_ratio"):
        if flag in typed and not mim:
            parser.error(f"--{flag} has no effect with {asked}, which hides every patch")


if __name__ == "__main__":
    run_main(main)
