"""The networks: a plain ViT, the pre-training objective of four methods, and a recognizer that reads.

`pretrain.py` and `finetune.py` hold the loops. Only `align_infonce` knows of ranks: it compares the crops of them all.

    # B batch   H W pixels   h w patch grid   N = h*w patches (N' of another view)   K kept   M masked (K + M = N)
    # D width   C channels of the target   T characters   V classes
    # view: another look at the crop, nothing hidden   guide: mim's view   coarse: nsp's views, smaller, in place
"""
import argparse
import math
import warnings

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed._functional_collectives import all_gather_single

from data import UserError, normalize, put

MODELS = {  # encoder, its patch in pixels (h, w); reader of words, after fine-tuning; decoder of pre-training
    "vit_nano": dict(encoder=dict(depth=6, width=128, heads=4, patch=(8, 8)), reader=dict(layers=2, width=128, heads=4, ffn=256),
                     decoder=dict(layers=2, width=128, heads=4, ffn=256, dropout=0.0)),
    "vit_tiny": dict(encoder=dict(depth=12, width=192, heads=3, patch=(4, 4)), reader=dict(layers=3, width=256, heads=8, ffn=256),
                     decoder=dict(layers=2, width=256, heads=8, ffn=1024)),
    "vit_small": dict(encoder=dict(depth=12, width=384, heads=6, patch=(4, 4)), reader=dict(layers=6, width=512, heads=8, ffn=256),
                      decoder=dict(layers=2, width=512, heads=16, ffn=2048)),
    "vit_base": dict(encoder=dict(depth=12, width=768, heads=12, patch=(4, 4)), reader=dict(layers=6, width=512, heads=8, ffn=256),
                     decoder=dict(layers=2, width=512, heads=16, ffn=2048)),
}

# ---- tensors

def take(x, ids):
    """Rows `ids` (B, K) of every crop's tokens x (B, N, D) -> (B, K, D)."""
    return x.gather(1, ids[..., None].expand(-1, -1, x.shape[-1]))

def patchify(images, patch):
    """(B, 3, H, W) -> (B, N, 3*p*q): pixels of each patch in the order of a convolution's weight (channel, row, column)."""
    p, q = patch
    x = images.unflatten(3, (-1, q)).unflatten(2, (-1, p))                                   # (B, 3, h, p, w, q)
    return x.permute(0, 2, 4, 1, 3, 5).flatten(1, 2).flatten(2)

def unpatchify(x, grid, patch):
    """The inverse of `patchify`: (B, N, 3*p*q) -> (B, 3, H, W)."""
    (h, w), (p, q) = grid, patch
    return x.reshape(-1, h, w, 3, p, q).permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, h * p, w * q)

def patch_norm(x):
    """Pixels (B, N, 3*p*q) less each channel's mean in the patch, over the patch's standard deviation -> normalised, mean, std.

    MAE takes one mean of all channels; on words that makes the target the colour of a flat ground, which a recoloured view cannot
    know, and drowns the strokes. Below a contrast of 4 grey levels (variance 1e-3 on [-1, 1]) a patch is noise and is not blown up."""
    channels = x.unflatten(-1, (3, -1))
    mean = channels.mean(-1, keepdim=True)
    centred = (channels - mean).flatten(-2)
    std = (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    return centred / std, mean.expand_as(channels).flatten(-2), std

def sincos(width, grid, fine):
    """Fixed position embedding (h*w, width) of patch centres, in units of patches of the grid `fine` = (h, w).

    First half x, second half y, each [sin, cos] with frequencies 10000^(-i/(width/4)): MAE's, wherever grid == fine. A coarse
    patch that covers fine patches 2j and 2j+1 stands at 2j + 0.5, so that the same place has the same code at every scale."""
    y, x = (((torch.arange(n, dtype=torch.float64) + 0.5) * m / n - 0.5) for n, m in zip(grid, fine))
    y, x = torch.meshgrid(y, x, indexing="ij")
    omega = 10000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = [place.reshape(-1, 1) * omega for place in (x, y)]
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1).float()

# ---- attention and block

def drop(x, rate, training=True):
    """Dropout. CPUs draw Bernoulli numbers slowly, and fill tensors of bool slowly: there one random byte an element decides, `rate`
    in 256ths, and becomes the 0 or 1 of what is kept."""
    if not training or rate == 0 or x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, rate, training)
    cut = min(max(round(256 * rate), 1), 255)
    numbers = torch.empty(x.numel() // 8 + 1, dtype=torch.int64).random_(-2 ** 63, None).view(torch.uint8)
    return x * (numbers[:x.numel()].ge_(cut).view(x.shape).to(x.dtype) * (256 / (256 - cut)))

def attend(q, k, v, dropout=0.0, causal=False):
    """softmax(q k' / sqrt(d)) v on (B, heads, T, d). CUDA takes the fused kernel. Elsewhere the lines are written
    out: on a CPU that is faster in the backward pass, and for the single queries of reading."""
    if q.is_cuda:
        q = q.expand(len(k), -1, -1, -1)                                                     # nsp's queries: one crop's, for all
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=causal)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)                                 # (B, heads, T, S)
    if causal:
        scores = scores + scores.new_full(scores.shape[-2:], -math.inf).triu(1)
    return drop(scores.softmax(-1), dropout) @ v                                             # (B, heads, T, d)

class Attention(nn.Module):
    """The encoder's self-attention: one matrix for queries, keys and values, as in timm's checkpoints."""

    def __init__(self, width, heads, dropout=0.0):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def split(self, x):
        return self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)         # (3, B, heads, T, d)

    def forward(self, x):
        out = attend(*self.split(x).unbind(0), self.dropout if self.training else 0.0)
        return drop(self.proj(out.transpose(1, 2).flatten(2)), self.dropout, self.training)

class Mlp(nn.Module):
    def __init__(self, width, hidden, dropout=0.0, bias=True):
        super().__init__()
        self.dropout = dropout
        self.fc1, self.fc2 = nn.Linear(width, hidden, bias=bias), nn.Linear(hidden, width, bias=bias)

    def forward(self, x):
        return self.fc2(drop(F.gelu(self.fc1(x)), self.dropout, self.training))

class Block(nn.Module):
    """Pre-norm Transformer block. `drop_path` skips a branch for whole crops in training (stochastic depth, 1603.09382)."""

    def __init__(self, width, heads, dropout=0.0, drop_path=0.0):
        super().__init__()
        self.drop_path = drop_path
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn, self.mlp = Attention(width, heads, dropout), Mlp(width, 4 * width, dropout)

    def skip(self, x):
        return x * drop(x.new_ones(len(x), 1, 1), self.drop_path) if self.training and self.drop_path else x

    def forward(self, x):
        x = x + self.skip(self.attn(self.norm1(x)))
        return x + self.skip(self.mlp(self.norm2(x)))

# ---- encoder

class PatchEmbed(nn.Module):
    def __init__(self, patch, width):
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch)

    def forward(self, images):
        # one matrix product with the convolution's own weights: faster than a strided convolution on every device
        x = patchify(images, self.proj.kernel_size)
        return F.linear(x, self.proj.weight.flatten(1), self.proj.bias)                      # (B, N, D)

class ViT(nn.Module):
    """The encoder. images (B, 3, H, W), normalised to [-1, 1] -> (B, 1+N, D): [cls], then the patches in row order;
    with ids_keep (B, K) only those patches are seen: (B, 1+K, D). LayerNormed.

    `size` is the fine scale (H, W); `scales` the coarse ones, coarse to fine. All share every weight but a learned offset each
    (`scale_embed`; the fine scale has none). Names and shapes are MAE's and timm's, so their checkpoints load."""

    def __init__(self, depth, width, heads, patch=(4, 4), size=(32, 128), scales=(), dropout=0.0, drop_path=0.0):
        super().__init__()
        self.size, self.patch, self.scales = tuple(size), tuple(patch), [tuple(s) for s in scales]
        self.grid, self.width = self.grid_of(self.size), width
        self.patch_embed = PatchEmbed(self.patch, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        fine = F.pad(sincos(width, self.grid, self.grid), (0, 0, 1, 0))[None]                # [cls] stands nowhere: zeros
        self.pos_embed = nn.Parameter(fine, requires_grad=False)                             # stored, as in MAE
        self.scale_embed = nn.Parameter(torch.zeros(len(self.scales), width)) if self.scales else None
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(width, heads, dropout, rate) for rate in rates)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        for i, s in enumerate(self.scales):
            self.register_buffer(f"pos_{i}", sincos(width, self.grid_of(s), self.grid)[None], persistent=False)
        init_weights(self)

    def grid_of(self, size):
        return size[0] // self.patch[0], size[1] // self.patch[1]

    def forward(self, images, ids_keep=None):
        x, size = self.patch_embed(images), tuple(images.shape[-2:])                         # (B, N, D)
        if size == self.size:
            x = x + self.pos_embed[:, 1:]
        else:
            i = self.scales.index(size)
            x = x + getattr(self, f"pos_{i}") + self.scale_embed[i]
        x = x if ids_keep is None else take(x, ids_keep)
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1).to(x.dtype)
        x = torch.cat([cls, x], dim=1)                                                       # (B, 1+K, D)

        for block in self.blocks:
            x = block(x)
        return self.norm(x)

def init_weights(module):
    """MAE's: Xavier for matrices (the patch projection as one), zeros for biases, N(0, 0.02) for tokens."""
    for name, p in module.named_parameters():
        if p.requires_grad and name.rsplit(".", 1)[-1] in ("cls_token", "mask_token", "scale_embed"):
            nn.init.normal_(p, std=0.02)
        elif p.requires_grad and p.dim() > 1:
            nn.init.xavier_uniform_(p.data.flatten(1))
        elif name.endswith("bias"):
            nn.init.zeros_(p)

# ---- decoder

class CachedAttention(nn.Module):
    """The decoders' attention, to themselves or to another's tokens: keys and values are made apart and can be used again."""

    def __init__(self, width, heads, dropout=0.0, bias=True):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.q, self.kv, self.proj = (nn.Linear(width, n * width, bias=bias) for n in (1, 2, 1))

    def keys_values(self, y):
        kv = self.kv(y).unflatten(-1, (2, self.heads, -1))                                   # (B, S, 2, heads, d)
        return kv.permute(2, 0, 3, 1, 4).contiguous()                                        # (2, B, heads, S, d), read by every query

    def queries(self, x):
        return self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)                     # (B, heads, T, d)

    def forward(self, x, kv, causal=False):
        out = attend(self.queries(x), *kv.unbind(0), self.dropout if self.training else 0.0, causal)
        return drop(self.proj(out.transpose(1, 2).flatten(2)), self.dropout, self.training)

class DecoderLayer(nn.Module):
    """Self-attention -> cross-attention -> FFN. Post-norm in pre-training, pre-norm in the recognizer: both LMIM's.

    x (B, T, D) -> (B, T, D). `memory`: keys and values of what is attended to, from `cross_attn.keys_values`, or None: no
    cross-attention. `cache`: keys and values of the characters so far (2, B, heads, t, d), which x continues. `last`: only the last
    so many rows of x are queries (all are keys), since the others enter no loss. Returns x and the keys and values to keep."""

    def __init__(self, width, heads, ffn, dropout=0.0, pre_norm=False, bias=True, cross=True):
        super().__init__()
        self.pre_norm, self.dropout = pre_norm, dropout
        self.self_attn = CachedAttention(width, heads, dropout, bias)
        self.cross_attn = CachedAttention(width, heads, dropout, bias) if cross else None
        self.mlp = Mlp(width, ffn, dropout, bias)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width, eps=1e-6) if n else None for n in (1, cross, 1))

    def forward(self, x, memory=None, cache=None, causal=False, last=None):
        def residual(x, norm, branch):
            return x + branch(norm(x)) if self.pre_norm else norm(x + branch(x))

        kv = self.self_attn.keys_values(self.norm1(x) if self.pre_norm else x)
        kv = kv if cache is None else torch.cat([cache, kv], dim=3)
        x = x if last is None else x[:, -last:]
        x = residual(x, self.norm1, lambda x: self.self_attn(x, kv, causal))
        if memory is not None:
            x = residual(x, self.norm2, lambda x: self.cross_attn(x, memory))
        return residual(x, self.norm3, lambda x: drop(self.mlp(x), self.dropout, self.training)), kv

class Decoder(nn.Module):
    """The decoder of pre-training: predicts the target of hidden patches from visible tokens, places, and the tokens of other views.

    `grids` are the grids it can predict, the fine one last; places are in units of the fine grid, as in the encoder."""

    def __init__(self, encoder_width, out, grids, layers, width, heads, ffn, dropout=0.1, seen=True, cross=True):
        super().__init__()
        self.embed = nn.Linear(encoder_width, width) if seen else None
        self.embed_memory = nn.Linear(encoder_width, width) if cross else None
        self.mask_token, self.n_grids = nn.Parameter(torch.zeros(1, 1, width)), len(grids)
        self.layers = nn.ModuleList(DecoderLayer(width, heads, ffn, dropout, cross=cross) for _ in range(layers))
        self.norm, self.pred = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, out)
        for i, grid in enumerate(grids):
            self.register_buffer(f"pos_{i}", sincos(width, grid, grids[-1])[None], persistent=False)
        init_weights(self)

    def forward(self, memory, seen=None, ids_keep=None, ids_mask=None, scale=-1):
        """memory: list of (B, 1+N', D'), or []; seen (B, 1+K, D') with ids_keep and ids_mask -> (B, M, C), in ids_mask's order.
        Without `seen` every patch of grids[scale] is hidden: (B, N, C). Tokens are not put back in order, as places are embedded:
        hidden ones come last, and the head runs on them alone."""
        pos = getattr(self, f"pos_{scale % self.n_grids}")                                   # (1, N, D)
        if seen is None:
            x, M = self.mask_token + pos, pos.shape[1]                                       # (1, N, D): for all crops, until they see memory
        else:
            pos, M = pos.expand(len(seen), -1, -1), ids_mask.shape[1]
            seen = self.embed(seen) + F.pad(take(pos, ids_keep), (0, 0, 1, 0))               # (B, 1+K, D), [cls] has no place
            x = torch.cat([seen, self.mask_token + take(pos, ids_mask)], dim=1)              # (B, 1+N, D)

        memory = self.embed_memory(torch.cat(memory, dim=1)) if memory else None             # (B, sum(1+N'), D)
        for layer in self.layers:
            kv = None if memory is None else layer.cross_attn.keys_values(memory)
            x, _ = layer(x, kv, last=M if layer is self.layers[-1] else None)
        return self.pred(self.norm(x))                                                       # (B, M, C)

# ---- methods: a fifth is a fifth row

GUIDES = ("none", "full", "coarse", "still")
METHODS = {  # guide: what mim's decoder sees besides visible patches; mim, nsp, align: the terms' weights; form: of align
    # full, coarse: a view of that size, moved, bent and recoloured; still: nsp's own views, coarse, recoloured and in place
    "mim":  dict(guide="none",   mim=1.0, nsp=0.0, align=0.0),
    "nsp":  dict(guide="none",   mim=0.0, nsp=1.0, align=0.0),
    "lmim": dict(guide="full",   mim=1.0, nsp=0.0, align=1.0,  form="mse"),
    "mnsp": dict(guide="coarse", mim=1.0, nsp=1.0, align=0.02, form="infonce"),
}

def mse(pred, target):
    return F.mse_loss(pred.float(), target.float())

def align_mse(a, b, crops=None):
    """LMIM's: mean square difference, gradients through both sides. [cls] collapse (watch `spread`), and
    if the target is pixels, not features, `lmim` at this weight learns little that helps to read (README, "Which method")."""
    return mse(a, b)

def align_infonce(a, b, crops=None, temperature=0.2):
    """A crop's two [cls] tokens (B, D) find each other among those of all crops of all ranks (InfoNCE, 1807.03748), both
    ways. A rank with a damaged crop has fewer than its `crops` rows and is padded. Without gradients nothing is gathered."""
    ranks = torch.is_grad_enabled() and dist.is_initialized()
    rows = crops if ranks and crops else len(a)                              # of each rank, padding included
    with torch.autocast(a.device.type, enabled=False):
        a, b = F.normalize(a.float(), dim=-1), F.normalize(b.float(), dim=-1)
        both = F.pad(torch.cat([a, b], dim=1), (0, 0, 0, rows - len(a)))     # padding is rows of zeros
        both = all_gather_single(both, 0, dist.group.WORLD) if ranks else both                               # with gradients
        all_a, all_b, padding = *both.chunk(2, dim=1), (both == 0).all(1)
        partner = torch.arange(len(a), device=a.device) + (dist.get_rank() * rows if ranks else 0)           # its row in all_b
        a_to_b = (a @ all_b.T / temperature).masked_fill(padding, -math.inf)
        b_to_a = (b @ all_a.T / temperature).masked_fill(padding, -math.inf)
        return (F.cross_entropy(a_to_b, partner) + F.cross_entropy(b_to_a, partner)) / 2

ALIGN = {"mse": align_mse, "infonce": align_infonce}

def spread(cls):
    """How far unit [cls] tokens (B, D) lie from their mean, 0 (all the same: collapsed) to 1."""
    return (1 - F.normalize(cls.detach().float(), dim=-1).mean(0).square().sum()).clamp(min=0).sqrt()

class Pretrainer(nn.Module):
    """One model and one loss path for every row of METHODS."""

    def __init__(self, method, model="vit_small", scales=((16, 64),), teacher=None, rank_crops=None):
        super().__init__()
        self.method = METHODS[method] if isinstance(method, str) else method
        guide, nsp = self.method["guide"], self.method["nsp"]
        self.scales = [tuple(s) for s in (scales if nsp else scales[-1:] if guide == "coarse" else ())]
        self.encoder = ViT(**MODELS[model]["encoder"], scales=self.scales)
        self.__dict__["teacher"] = teacher and teacher.requires_grad_(False).eval()  # no part of the model: not trained, not saved
        self.grids = [self.encoder.grid_of(s) for s in [*self.scales[1:], self.encoder.size]]  # predicted: all but the coarsest
        out = teacher.width if teacher else 3 * math.prod(self.encoder.patch)
        self.decoder = Decoder(self.encoder.width, out, self.grids, seen=self.method["mim"] > 0, cross=bool(nsp or guide != "none"),
                               **MODELS[model]["decoder"])
        self.rank_crops = rank_crops                                         # of one rank in a step, for InfoNCE over ranks

    @torch.no_grad()
    def target(self, image):
        """Each patch's pixels normalised (`patch_norm`), or a frozen teacher's tokens LayerNormed without parameters: (B, N, C) for
        each scale that is predicted, the fine one last."""
        if self.teacher is None:
            views = [F.adaptive_avg_pool2d(image, size) for size in self.scales[1:]] + [image]
            return [patch_norm(patchify(view, self.encoder.patch))[0] for view in views]
        x = self.teacher(image)[:, 1:].float().transpose(1, 2).unflatten(2, self.teacher.grid)               # (B, C, h, w)
        grids = [F.adaptive_avg_pool2d(x, grid).flatten(2).transpose(1, 2) for grid in self.grids]
        return [F.layer_norm(tokens, tokens.shape[-1:]) for tokens in grids]

    def encode(self, image, views, ids_keep):
        """Lists of tokens (B, 1+N', D): what mim's decoder sees besides visible patches, what nsp's sees; the visible patches'
        (B, 1+K, D), or None; a list of the [cls] (B, D) of mim's guide, nsp's views and the masked crop, where there are such."""
        guide, coarse = ([self.encoder(view) for view in group] for group in views)
        seen = self.encoder(image, ids_keep) if self.method["mim"] else None
        cls = [tokens[:, 0] for tokens in (*guide, *coarse, seen) if tokens is not None]
        return coarse if self.method["guide"] == "still" else guide, coarse, seen, cls

    def agree(self, cls, others):
        """How far [cls] of neighbouring views are from agreeing, mean over the pairs: (guide, nsp's view), (nsp's view, masked
        crop) in mnsp, (guide, masked crop) in lmim. `others`: `cls` of each other micro-batch of the step, without gradients: by
        GradCache (2101.06983) each micro-batch adds its share of one large batch's gradient."""
        cls = [torch.cat(view) for view in zip(cls, *others)]
        pairs = list(zip(cls, cls[1:]))
        align = sum(ALIGN[self.method["form"]](a, b, self.rank_crops) for a, b in pairs) / len(pairs)
        return align + len(others) * (align - align.detach())                # same value, n times the gradient: Run.backward divides by n parts

    def forward(self, image, views, ids_keep, ids_mask, others=()):
        """image (B, 3, H, W); views: two lists, `make_views` of pretrain.py; ids_keep (B, K), ids_mask (B, M) -> (loss, terms
        weighted, pred: what mim and nsp predict of the fine scale, (B, M, C) and (B, N, C))."""
        weight, terms, pred = self.method, {}, {}
        target = self.target(image)                                          # (B, N, C) each, the fine scale last
        guide, coarse, seen, cls = self.encode(image, views, ids_keep)       # guide, coarse: what mim and nsp attend to

        if weight["mim"]:                                                    # hidden patches from visible ones and the guide
            pred["mim"] = self.decoder(guide, seen, ids_keep, ids_mask)      # (B, M, C)
            terms["mim"] = mse(pred["mim"], take(target[-1], ids_mask))

        if weight["nsp"]:                                                    # every patch of a scale from coarser scales alone
            finer = [self.decoder(coarse[:i + 1], scale=i) for i in range(len(self.grids))]      # (B, N, C) each
            terms["nsp"], pred["nsp"] = sum(map(mse, finer, target)) / len(finer), finer[-1]

        if weight["align"]:                                                  # [cls] of neighbouring views agree (MLA)
            terms["align"] = self.agree(cls, others)

        terms = {name: weight[name] * term for name, term in terms.items()}
        return sum(terms.values()), dict(terms, spread=spread(cls[-1])), pred

# ---- checkpoints

def read_checkpoint(path):
    """A checkpoint's dict, from a file that is not trusted: tensors, plain types and MAE's `argparse.Namespace`, nothing that runs.
    Raises UserError, one line, when the file is missing, foreign, torn or would run code."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")                                  # of a pickle's protocol: the error below says enough
            state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as e:
        raise UserError(f"{path}: {e.strerror or e}; expected a checkpoint file (.pt, .pth)")
    except Exception as e:                                                   # a dozen kinds; each means that it is no checkpoint
        raise UserError(f"{path}: not a checkpoint that can be read safely ({type(e).__name__}); expected tensors and plain types "
                        "saved by torch.save")
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds a {type(state).__name__}; expected a dict with 'model', or a state dict")
    return state

def load_state(module, state, path, hint=""):
    """Strict load; a UserError says how many tensors match and names the first that do not."""
    own, state = module.state_dict(), {k: v for k, v in state.items() if torch.is_tensor(v)}
    fit = [k for k in own if k in state and own[k].shape == state[k].shape]
    wrong = [f"missing {k}" for k in own if k not in state] + [f"not known here: {k}" for k in state if k not in own]
    wrong += [f"{k} is {tuple(state[k].shape)} there and {tuple(own[k].shape)} here" for k in own if k in state and k not in fit]
    if wrong:
        raise UserError(f"{path}: {len(fit)} of {len(own)} tensors match; {wrong[0]}{hint}")
    module.load_state_dict(state)
    return len(own)

ENCODER_PREFIXES = ("", "module.", "model_maeenc.", "module.model_maeenc.", "encoder.", "backbone.")
NOT_ENCODER = ("decoder", "mask_token", "scale_embed", "model_maeenc_momentum", "head", "fc_norm", "linear_norm")

def load_encoder(path):
    """ViT of a checkpoint for crops of 32 x 128: this project's (any method, or a recognizer), or one in MAE's format, such as
    MAERec's and LMIM's, with or without {"model": ...}. Width, depth and patch are read off the tensors, the stored `pos_embed`
    is kept as it is, heads are those of the row of MODELS of that depth and width, else 64 wide, coarse scales are left behind.
    `encoder.matched` says how many tensors came from the file."""
    checkpoint = read_checkpoint(path)
    state = checkpoint.get("model", checkpoint)
    state = {k: v for k, v in state.items() if isinstance(k, str) and torch.is_tensor(v)} if isinstance(state, dict) else {}
    key = "blocks.0.attn.qkv.weight"
    prefix = next((p for p in ENCODER_PREFIXES if p + key in state), None)
    if prefix is None:
        raise UserError(f"{path}: no {key} in it; expected the encoder of a ViT with MAE's or timm's names")
    state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    state = {k: v for k, v in state.items() if not k.startswith(NOT_ENCODER)}
    patches = state.get("patch_embed.proj.weight", torch.zeros(0))
    if patches.dim() != 4 or 0 in patches.shape or "pos_embed" not in state:
        raise UserError(f"{path}: no patch_embed.proj.weight of a convolution, or no pos_embed; expected a whole ViT encoder")
    width, _, p, q = patches.shape
    found = dict(depth=sum(k.endswith(".attn.qkv.weight") for k in state), width=width)
    ours = (row["encoder"]["heads"] for row in MODELS.values() if found.items() <= row["encoder"].items())
    encoder = ViT(**found, heads=next(ours, max(width // 64, 1)), patch=(p, q))
    encoder.matched = load_state(encoder, state, path, f"; expected 32x128 crops in patches of {p}x{q}")
    return encoder

# ---- recognizer

class Recognizer(nn.Module):
    """Encoder, Linear + LayerNorm, and a Transformer decoder that reads (LMIM's fine-tuning model). Classes: the charset, then
    end, padding, unknown; one more embedding starts a word. `char_head` (only with a weight `spell`) names the character under
    each patch: an auxiliary loss on rendered words, whose character boxes are known; it is not used in reading."""

    def __init__(self, encoder, charset, max_length=25, layers=6, width=512, heads=8, ffn=256, dropout=0.0, spell=0.0):
        super().__init__()
        self.encoder, self.charset, self.max_length, self.spell = encoder, charset, max_length, spell
        self.index = {c: i for i, c in enumerate(charset)}
        V = len(charset) + 3
        self.end, self.pad, self.start = V - 3, V - 2, V                     # V - 1, unknown, is LMIM's and no target here
        self.proj = nn.Sequential(nn.Linear(encoder.width, width), nn.LayerNorm(width))
        self.embed = nn.Embedding(V + 1, width)
        row = (1, max_length + 1)                                            # of places, of which sincos's first half, x, is taken
        self.register_buffer("pos", sincos(2 * width, row, row)[None, :, :width], persistent=False)
        self.layers = nn.ModuleList(DecoderLayer(width, heads, ffn, dropout, pre_norm=True, bias=False) for _ in range(layers))
        self.norm, self.classifier = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, V)
        self.char_head = nn.Linear(encoder.width, V) if spell else None
        self.dropout = dropout
        for part in (self.proj, self.layers, self.classifier):
            init_weights(part)
        nn.init.normal_(self.embed.weight, std=width ** -0.5)

    def encode(self, images):
        """(B, 3, H, W) -> patch tokens (B, N, D), and the keys and values of each layer's cross-attention."""
        tokens = self.encoder(images)[:, 1:]
        memory = self.proj(tokens)
        return tokens, [layer.cross_attn.keys_values(memory) for layer in self.layers]

    def step(self, ids, memory, caches=None):
        """ids (B, T) continue what `caches` hold -> logits (B, T, V) and the new caches."""
        past = 0 if caches is None else caches[0].shape[3]
        x = self.embed(ids) + self.pos[:, past:past + ids.shape[1]]
        x, kept = drop(x, self.dropout, self.training), []
        for i, layer in enumerate(self.layers):
            x, kv = layer(x, memory[i], caches and caches[i], causal=caches is None)
            kept.append(kv)
        return self.classifier(self.norm(x)), kept

    def forward(self, images, targets, chars_under=None):
        """Teacher forcing. targets (B, T): a word's classes, end, then padding; chars_under (B, N): class of the character under each
        patch, padding where not known. Returns loss (cross-entropy, summed over a word, mean over words), terms, logits (B, T, V)."""
        tokens, memory = self.encode(images)
        ids = torch.cat([torch.full_like(targets[:, :1], self.start), targets[:, :-1]], dim=1)
        logits, _ = self.step(ids, memory)                                   # (B, T, V)
        loss = F.cross_entropy(logits.float().transpose(1, 2), targets, ignore_index=self.pad, reduction="none")
        terms = {"read": loss.sum() / len(images)}                           # nats a word, as LMIM: no word weighs on another
        if chars_under is not None:
            loss = F.cross_entropy(self.char_head(tokens).float().transpose(1, 2), chars_under, ignore_index=self.pad, reduction="none")
            terms["spell"] = self.spell * (loss.sum(1) / (chars_under != self.pad).sum(1).clamp(min=1)).mean()
        return sum(terms.values()), terms, logits

    @torch.no_grad()
    def decode(self, images):
        """Greedy reading. images (B, 3, H, W), normalised -> ids (B, T), probs (B, T) of the classes chosen; a word that has ended goes
        on with `end` at probability 1; T is the longest of the batch."""
        _, memory = self.encode(images)
        ids = torch.full((len(images), self.max_length + 1), self.end, device=images.device)
        probs, rows = torch.ones_like(ids, dtype=torch.float32), torch.arange(len(ids), device=ids.device)
        last, going = torch.full_like(rows, self.start), torch.ones_like(rows, dtype=torch.bool)
        caches = [m[:, :, :, :0] for m in memory]                            # empty: (2, B, heads, 0, d)
        for t in range(self.max_length + 1):
            logits, caches = self.step(last[:, None], memory, caches)
            logits = logits[:, -1].float()
            logits[:, self.pad:] = -math.inf                                 # padding and unknown are never read
            probabilities = logits.softmax(-1)
            if t == self.max_length:
                probabilities[:, :self.end] = -1                             # the longest word ends here
            p, last = probabilities.max(-1)
            ids[rows, t], probs[rows, t] = last.where(going, self.end), p.where(going, 1.0)
            going = going & (last != self.end)
            left = going.sum().item()
            if left == 0:
                break
            if 2 * left <= len(rows):                                        # half have ended: the others go on without them
                memory, caches = ([x[:, going] for x in kept] for kept in (memory, caches))
                rows, last, going = rows[going], last[going], going[going]
        return ids[:, :t + 1], probs[:, :t + 1]

    @torch.inference_mode()
    def read(self, images, batch_size=128, dtype=torch.float32):
        """uint8 or float in [0, 1], (B, 3, 32, 128) -> [(text, product of the probabilities of its characters, end included)].
        In float32 a reading does not depend on its batch; half precision gives no such promise."""
        device, words = self.pos.device, []
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            for batch in images.split(batch_size):
                ids, probs = self.decode(normalize(put(batch, device)))
                texts = ["".join(self.charset[i] for i in row if i != self.end) for row in ids.tolist()]
                words += zip(texts, probs.cpu().double().prod(dim=1).tolist())
        return words
