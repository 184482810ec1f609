"""Pre-trains an encoder on crops of words without labels: mim, nsp, lmim or mnsp (METHODS
in model.py).

    python pretrain.py --method mnsp --model vit_nano           a laptop: rendered words
    python pretrain.py --method mnsp --compile --batch_size 512     one GPU
    torchrun --nproc_per_node=8 pretrain.py --method mnsp \\
             --data U/book32_lmdb U/cc_lmdb U/openvino_lmdb \\
             --teacher vit_small_checkpoint-19.pth              eight: LMIM's data and teacher

Read `main` first: it holds the training loop. Then `make_views` and `make_mask`. Writes to
--out_dir: last.pt, log.jsonl (an object a logged step), samples/step_*.png.

Every random number of a step is a function of --seed, the step and the crop's place in the
step's batch of all ranks. So a resumed run goes through the same numbers, and so does one
on another number of processes or one with accumulated gradients (but for dropout, which is
each rank's own).
"""
import math
import os
import sys

import torch
import torch.nn.functional as F

from common import (
    H, W, Log, Parser, UserError, add_training_flags, autocast, check_ranks_agree,
    check_resume, check_training_flags, count_steps, find_checkpoint, join_ranks,
    learning_rate, number_in, parse_size, parse_with_recipe, pick_device, pick_dtype,
    rank, resume_training, run_main, save_checkpoint, say, seed_dropout, step_generator,
    step_unless_not_finite, stop_if_not_finite, stop_requested, to_device,
    tolerate_full_disk, training_state, watch_signals, weight_groups, world_size,
    wrap_model,
)
from data import (
    GREY, VIEW_NUMBERS, DamageCount, batches, coarse_view, draw_sheet, next_batch,
    open_sources, read_batch, view_from_numbers,
)
from model import (
    ALIGN, GUIDES, METHODS, MODELS, Pretrainer, load_encoder, normalize_pixels,
    patch_norm, patchify, take, unpatchify,
)

# what --model changes in the flags' defaults, which are LMIM's for vit_small: 10 epochs, 8
# GPUs of 64 crops
RECIPES = {
    "vit_nano": dict(batch_size=64, max_steps=2000, blr=4e-3, warmup_epochs=0.5, clip_grad=1.0),
    "vit_tiny": dict(blr=5e-4),
}


# ---- the random numbers of a step, views and masks

def draw_numbers(step, n_crops, method, args, grid):
    """The random numbers of a step, uniform in [0, 1), a row for each of its crops on all
    ranks. Each rank and micro-batch takes the rows of its own crops, as if there were one
    large batch."""
    numbers = {}
    views = step_generator(args.seed, step, stream=0)
    if method["nsp"]:
        numbers["coarse"] = torch.rand(n_crops, VIEW_NUMBERS, generator=views)
    if method["guide"] in ("full", "coarse"):
        numbers["guide"] = torch.rand(n_crops, VIEW_NUMBERS, generator=views)
    masks = step_generator(args.seed, step, stream=1)
    corner = 2 if args.mask == "block" else 0
    numbers["mask"] = torch.rand(n_crops, corner + math.prod(grid), generator=masks)
    return numbers


def make_views(images, method, scales, numbers, rows, strength):
    """The views of a row of METHODS, in [-1, 1], as two lists. mim's guide, if it has its
    own, is moved and bent, at full scale or at the finest coarse one. nsp's views, at every
    coarse scale, stay in place, or what they have to predict could not be known."""
    guide, coarse = [], []
    if method["nsp"]:
        drawn = to_device(numbers["coarse"][rows], images.device)
        # (B, 3, H, W) in [0, 1]
        view = view_from_numbers(images, drawn, moved=False, strength=strength)
        for size in scales:
            coarse.append(normalize_pixels(coarse_view(view, size)))
    if method["guide"] in ("full", "coarse"):
        drawn = to_device(numbers["guide"][rows], images.device)
        view = view_from_numbers(images, drawn, moved=True, strength=strength)
        size = (H, W) if method["guide"] == "full" else scales[-1]
        guide.append(normalize_pixels(coarse_view(view, size)))
    return guide, coarse


def make_mask(numbers, kind, mask_ratio, grid, patch):
    """numbers (B, ...) -> ids_keep (B, K), ids_mask (B, M): as many in every crop, so that
    shapes are static."""
    if kind == "random":
        order = numbers                                                 # (B, N)
    else:
        order = block_order(numbers, grid, patch)
    return hide_last(order, mask_ratio)


def hide_last(order, mask_ratio):
    """Hides round(mask_ratio * N) of N patches, those last in `order` (B, N), but keeps one
    and hides one at least."""
    N = order.shape[1]
    K = N - round(mask_ratio * N)
    K = min(max(K, 1), N - 1)
    ids = order.argsort(dim=1)
    return ids[:, :K], ids[:, K:]


def block_order(numbers, grid, patch, block=16):
    """numbers (B, 2 + N) -> (B, N) in which the patches of a block, 16 x 16 pixels from a
    corner drawn anew, stand together: they are hidden together, and only the block in which
    the ratio is reached is hidden in part."""
    h, w = grid
    block_h, block_w = max(1, block // patch[0]), max(1, block // patch[1])     # in patches
    corner_y = (numbers[:, 0:1] * block_h).long()   # (B, 1), where the first block is cut off
    corner_x = (numbers[:, 1:2] * block_w).long()
    each_patch = numbers[:, 2:]                                         # (B, N)

    block_row = (torch.arange(h) + corner_y) // block_h                 # (B, h)
    block_column = (torch.arange(w) + corner_x) // block_w              # (B, w)
    across = (w + block_w - 2) // block_w + 1                       # blocks in a row, at most
    block_of = block_row[:, :, None] * across + block_column[:, None, :]        # (B, h, w)
    # a block's first numbers stand for the block
    each_block = each_patch.gather(1, block_of.flatten(1))
    return each_block + 1e-4 * each_patch


# ---- pictures

def draw_samples(model, images, device, dtype, args, path, step):
    """A sheet with a crop in each row. Columns: the crop; what mim sees and what it
    predicts; the same of nsp; the target. The numbers are always those of step 0, so that
    sheets of a run can be compared."""
    grid, patch, rows = model.encoder.grid, model.encoder.patch, torch.arange(len(images))
    numbers = draw_numbers(0, len(images), model.method, args, grid)
    images = to_device(images, device)
    views = make_views(images, model.method, model.scales, numbers, rows, args.guidance_strength)
    ids_keep, ids_mask = make_mask(numbers["mask"], args.mask, args.mask_ratio, grid, patch)
    ids_keep, ids_mask = to_device(ids_keep, device), to_device(ids_mask, device)
    image = normalize_pixels(images)

    model.eval()
    with torch.no_grad(), autocast(device, dtype):
        _, _, predicted = model(image, views, ids_keep, ids_mask)
    model.train()

    columns = sample_columns(model, image, views, ids_mask, predicted)
    titles = [(None, [(title, GREY)]) for title, _ in columns]
    # (B, columns, 3, H, W) in [0, 1]
    pictures = torch.stack([column for _, column in columns], 1)
    pictures = (255 * pictures.clamp(0, 1)).byte().cpu()
    with tolerate_full_disk(path, step):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        draw_sheet([titles, *([(picture, []) for picture in row] for row in pictures)], path)
        say(f"picture    {path}")


def sample_columns(model, image, views, ids_mask, predicted):
    """-> [(title, pictures (B, 3, H, W) in [0, 1])].

    A prediction of pixels is shown twice: as the loss sees it, normalised per patch, and
    with the true mean and contrast of each patch put back, as MAE draws it. Features cannot
    be drawn: there stands how like the target they are (cosine), 0 black and 1 white;
    patches that were visible are white."""
    grid, patch = model.encoder.grid, model.encoder.patch
    pixels, target = patchify(image, patch), model.target(image)[-1]
    _, mean, std = patch_norm(pixels)
    everything = torch.arange(pixels.shape[1], device=image.device).expand(len(image), -1)

    def as_picture(tokens):
        return unpatchify(tokens, grid, patch) / 2 + 0.5

    def put_in(ground, ids, values):
        return ground.scatter(1, ids[..., None].expand(-1, -1, ground.shape[-1]), values)

    columns = [("crop", image / 2 + 0.5)]
    for name, pred in predicted.items():
        pred = pred.float()
        ids = ids_mask if name == "mim" else everything
        if name == "mim":
            grey = torch.zeros_like(pixels)[:, :ids_mask.shape[1]]
            columns.append(("mim sees", as_picture(put_in(pixels, ids_mask, grey))))
        for view in views_seen(model, views, name):
            columns.append((f"{name} sees", F.interpolate(view, image.shape[-2:]) / 2 + 0.5))
        if model.teacher is None:
            normalised = put_in(torch.zeros_like(pixels), ids, pred / 3)
            in_colour = put_in(pixels, ids, pred * take(std, ids) + take(mean, ids))
            columns.append((f"{name} predicts", as_picture(normalised)))
            columns.append((f"{name}, in colour", as_picture(in_colour)))
        else:
            likeness = torch.cosine_similarity(pred, take(target, ids), dim=-1)[..., None]
            grey = 2 * likeness.expand(-1, -1, pixels.shape[-1]) - 1
            grey = put_in(torch.ones_like(pixels), ids, grey)
            columns.append((f"{name}, likeness", as_picture(grey)))
    if model.teacher is None:
        columns.append(("target", as_picture(target / 3)))
    return columns


def views_seen(model, views, name):
    """The views that mim's or nsp's decoder sees."""
    guide, coarse = views
    if name == "nsp" or model.method["guide"] == "still":
        return coarse
    return guide


# ---- flags

def parse_args():
    """-> args, the row of METHODS, nsp's scales [(h, w), ...]."""
    parser = Parser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--method", choices=METHODS, default="mnsp", help="a row of METHODS in model.py")
    add_training_flags(parser, MODELS)
    add("--teacher",
        help="checkpoint whose features are the target (MAE, MAERec, LMIM or ours); left out: "
        "pixels")
    add("--scales", nargs="+", default=["16x64"], metavar="HxW",
        help="sizes of nsp's views, height x width, coarse to fine; mim's coarse guide is of the "
        "last")
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

    typed = check_training_flags(parser, args)
    method = change_method(parser, args)
    scales = [parse_size(text) for text in args.scales]
    check_method(parser, args, method, scales, typed)
    args.objective = method                                         # --resume refuses another
    return args, method, scales


def change_method(parser, args):
    """--method's row of METHODS, changed by --set."""
    method = dict(METHODS[args.method])
    for setting in args.set:
        key, equals, value = setting.partition("=")
        if not equals:
            parser.error(f"--set {setting}: expected KEY=VALUE, such as guide=none or align=0.1")
        if key == "guide" and value in GUIDES:
            method[key] = value
        elif key == "form" and value in ALIGN:
            method[key] = value
        elif key in ("mim", "nsp", "align"):
            try:
                method[key] = float(value)
            except ValueError:
                method[key] = math.nan
            if not 0 <= method[key] < math.inf:
                parser.error(f"--set {setting}: expected a weight in [0, inf)")
        else:
            parser.error(f"--set {setting}: expected guide={'|'.join(GUIDES)}, "
                         f"form={'|'.join(ALIGN)}, or a weight of mim, nsp or align")
    return method


def check_method(parser, args, method, scales, typed):
    """Which method goes with which flags: one `if` a mistake."""
    guide = method["guide"]
    mim, nsp, align = method["mim"] > 0, method["nsp"] > 0, method["align"] > 0
    row = f"--method {args.method}"
    if args.set:
        row += f" --set {' '.join(args.set)}"

    if not mim and not nsp:
        parser.error(f"{row}: nothing is predicted; give mim or nsp a weight")
    if guide != "none" and not mim:
        parser.error(f"{row}: a guide needs mim, whose decoder sees it; give mim a weight, or set "
                     "guide=none")
    if guide == "still" and not nsp:
        parser.error(f"{row}: guide=still needs nsp too, whose views it is; give nsp a weight")

    if align and "form" not in method:
        parser.error(f"{row}: align needs a form; add form=infonce or form=mse to --set")
    cls_tokens = 1 if guide in ("full", "coarse") else 0
    if mim:
        cls_tokens += 1
    if nsp:
        cls_tokens += len(scales)
    if align and cls_tokens < 2:
        parser.error(f"{row}: align needs two [cls] tokens, and there is one; set align=0")
    if not align and any(setting.startswith("form=") for setting in args.set):
        parser.error(f"{row}: form has no effect without align; add align=0.02 to --set")

    patch_h, patch_w = MODELS[args.model]["encoder"]["patch"]
    for h, w in scales:
        if h % patch_h != 0 or w % patch_w != 0 or h >= H or w >= W:
            parser.error(f"--scales {h}x{w}: expected multiples of the patch, {patch_h}x{patch_w}, "
                         f"below {H}x{W}")
    if scales != sorted(set(scales)):
        parser.error(f"--scales {' '.join(args.scales)}: expected coarse to fine, each once")

    if "scales" in typed and not nsp and guide != "coarse":
        parser.error(f"--scales has no effect with {row}, which has no coarse view")
    if len(scales) > 1 and not nsp:
        parser.error(f"--scales {' '.join(args.scales)}: {row} has one coarse view; give one size")
    if "guidance_strength" in typed and not nsp and guide == "none":
        parser.error(f"--guidance_strength has no effect with {row}, which has no view but the "
                     "crop")
    for flag in ("mask", "mask_ratio"):
        if flag in typed and not mim:
            parser.error(f"--{flag} has no effect with {row}, which hides every patch")


# ---- training

def main():
    args, method, scales = parse_args()

    # where it runs, and whether there is something to go on from
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    args.dtype = str(dtype).removeprefix("torch.")
    group = join_ranks(device)
    say(" ".join(sys.argv))
    say(f"torch {torch.__version__}  {device} x{world_size()}  {args.dtype}")
    checkpoint = find_checkpoint(args.out_dir, args.resume)

    # data
    options = dict(fonts=args.fonts, rotate_tall=args.rotate_tall, labels=False)
    source = open_sources(args.data, **options)
    crops_per_step = args.batch_size * args.accum_iter * world_size()
    total_steps, warmup_steps = count_steps(args, len(source), crops_per_step)
    if checkpoint is not None:
        check_resume(checkpoint, args, crops_per_step, len(source))

    # model
    teacher = None
    if args.teacher:
        teacher = load_encoder(args.teacher).to(device)
        say(f"--teacher {args.teacher}: all {teacher.matched} tensors loaded")
    torch.manual_seed(args.seed)
    raw_model = Pretrainer(method, args.model, scales, teacher, args.batch_size).to(device)
    grid, patch = raw_model.encoder.grid, raw_model.encoder.patch

    # optimizer
    peak_lr = args.lr or args.blr * crops_per_step / 256
    groups = weight_groups(raw_model, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, peak_lr, betas=(0.9, 0.95), fused=True)
    scaler = torch.amp.GradScaler(device.type, init_scale=4096, enabled=dtype == torch.float16)

    # go on where the checkpoint is
    damage, step, bad = DamageCount(args.max_damaged), 0, [0.0, 0.0]
    if checkpoint is not None:
        step, bad = resume_training(checkpoint, raw_model, optimizer, scaler, damage)
        checkpoint = None                                               # frees its memory
    bad = torch.tensor(bad, device=device)                  # skipped steps: in a row, in all
    check_ranks_agree(group, step, len(source))
    model = wrap_model(raw_model, args.compile)
    crops = batches(source, args.batch_size, args.seed, step * crops_per_step,
                    rank(), world_size(), args.workers)
    # for pictures; some may be damaged
    few = read_batch(range(min(64, len(source))), source).images[:8]
    n_parameters = sum(parameter.numel() for parameter in raw_model.parameters())
    say(f"{args.model}  {n_parameters / 1e6:.2f} M parameters  {len(source)} crops  "
        f"{crops_per_step} a step  {total_steps} steps  lr {peak_lr:.2e}  "
        f"warm-up {warmup_steps} steps  out {args.out_dir}")

    def save(name):
        data = dict(crops=crops_per_step, n=len(source))
        state = training_state(
            args, step, raw_model, optimizer, scaler, bad, damage, data, group)
        return save_checkpoint(os.path.join(args.out_dir, name), state, group)

    stop = watch_signals()
    log = Log(args, step, total_steps, crops_per_step, device, group)
    while step < total_steps and not stop_requested(stop, group):
        log.start_step()
        lr = learning_rate(step, total_steps, warmup_steps, peak_lr, args.min_lr)
        for weights in optimizer.param_groups:
            weights["lr"] = lr * weights["lr_scale"]
        seed_dropout(args.seed, step)
        numbers = draw_numbers(step, crops_per_step, method, args, grid)

        for micro_step in range(args.accum_iter):
            # images uint8 (B, 3, 32, 128)
            batch = next_batch(crops, damage, args.batch_size, log)
            first = (micro_step * world_size() + rank()) * args.batch_size
            # where these crops stand in the step's batch
            rows = first + torch.tensor(batch.places)
            images = to_device(batch.images, device)
            views = make_views(
                images, method, raw_model.scales, numbers, rows, args.guidance_strength)
            ids_keep, ids_mask = make_mask(
                numbers["mask"][rows], args.mask, args.mask_ratio, grid, patch)
            ids_keep, ids_mask = to_device(ids_keep, device), to_device(ids_mask, device)

            if world_size() > 1:                            # ranks share gradients once a step
                model.require_backward_grad_sync = micro_step == args.accum_iter - 1
            with autocast(device, dtype):
                loss, terms, _ = model(normalize_pixels(images), views, ids_keep, ids_mask)
            scaler.scale(loss / args.accum_iter).backward()
            log.add(loss, terms)

        scaler.unscale_(optimizer)
        max_norm = args.clip_grad or math.inf
        grad_norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), max_norm)
        bad = step_unless_not_finite(optimizer, scaler, grad_norm, bad)
        optimizer.zero_grad(set_to_none=True)
        step += 1

        line_due = step % args.log_every == 0 or step in (1, total_steps)
        log.end_step(line_due)
        if line_due:
            log.write(step, lr, bad, damage.bad)
        if line_due or device.type == "cpu":        # a GPU's is looked at when it is waited for
            stop_if_not_finite(bad, step, args)
        if rank() == 0 and len(few) and (step % args.sample_every == 0 or step == total_steps):
            path = os.path.join(args.out_dir, "samples", f"step_{step:06d}.png")
            draw_samples(raw_model, few, device, dtype, args, path, step)
        if step % args.save_every == 0 and step < total_steps and bad[0] == 0:
            save("last.pt")

    if not save("last.pt"):
        raise UserError(f"{args.out_dir}: the last checkpoint was not written; mend the reason "
                        "above and add --resume")
    if step < total_steps:
        say(f"stopped by a signal at step {step}; add --resume to go on")
        raise KeyboardInterrupt             # status 130: nothing that builds on this may follow
    say(f"checkpoint {os.path.join(args.out_dir, 'last.pt')}")


if __name__ == "__main__":
    run_main(main)
