"""The networks: a plain ViT, the pre-training objective of four methods, and a recognizer.

From top to bottom: the encoder, the decoder, METHODS and `Pretrainer.forward` (the objective),
loading of checkpoints, the recognizer. The training loops are in pretrain.py and finetune.py.

mim is masked image modelling: some patches are hidden and predicted. nsp is next-scale
prediction: a fine scale is predicted from coarser ones. mnsp does both, and gives mim a small
guide. lmim gives mim a guide of full size.

    B       crops of a batch
    H W     pixels
    h w     patches in a column, in a row
    N       patches of a view, h * w (N' of another view)
    K M     patches kept and patches masked: K + M = N
    D       width of tokens (D' of the encoder's, where a decoder has its own)
    C       channels of a target
    T S     tokens that ask (queries), tokens that are asked (keys); in the recognizer T counts
            characters
    V       classes of characters
    d       width of a head

    view    another look at the crop, nothing hidden
    guide   the view that mim's decoder sees
    coarse  nsp's views, smaller, with everything in its place
"""
import math

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from common import (
    H, W, Replayed, UserError, autocast, check_unit, load_state, read_checkpoint, to_device,
    to_unit,
)

# encoder   the ViT; patch: height and width in pixels. vit_nano's patches are as high as the crop,
#           which is one row of them. There are few, and it begins to read after far fewer steps
# decoder   predicts patches in pre-training
# reader    the decoder that reads words in fine-tuning
MODELS = {
    "vit_nano": dict(
        encoder=dict(depth=6, width=128, heads=4, patch=(32, 4)),
        decoder=dict(layers=2, width=128, heads=4, ffn=256, dropout=0.0),
        reader=dict(layers=2, width=128, heads=4, ffn=256)),
    "vit_mini": dict(
        encoder=dict(depth=8, width=192, heads=6, patch=(8, 4)),
        decoder=dict(layers=2, width=192, heads=6, ffn=384, dropout=0.0),
        reader=dict(layers=2, width=192, heads=6, ffn=384)),
    "vit_tiny": dict(
        encoder=dict(depth=12, width=192, heads=3, patch=(4, 4)),
        decoder=dict(layers=2, width=256, heads=8, ffn=1024),
        reader=dict(layers=3, width=256, heads=8, ffn=256)),
    "vit_small": dict(
        encoder=dict(depth=12, width=384, heads=6, patch=(4, 4)),
        decoder=dict(layers=2, width=512, heads=16, ffn=2048),
        reader=dict(layers=6, width=512, heads=8, ffn=256)),
    "vit_base": dict(
        encoder=dict(depth=12, width=768, heads=12, patch=(4, 4)),
        decoder=dict(layers=2, width=512, heads=16, ffn=2048),
        reader=dict(layers=6, width=512, heads=8, ffn=256)),
}


# ---- patches and places

def normalize_pixels(images):
    """uint8, or float in [0, 1] -> float32 in [-1, 1]: what every network here is given."""
    return to_unit(images) * 2 - 1


def take(x, ids):
    """Rows ids (B, K) of every crop's tokens x (B, N, D) -> (B, K, D)."""
    return x.gather(1, ids[..., None].expand(x.shape[0], -1, x.shape[-1]))


def patchify(images, patch):
    """(B, 3, H, W) -> (B, N, 3*p*q): the pixels of each patch, in the order of a convolution's
    weight: channel, row, column."""
    p, q = patch
    n_crops, _, height, width = images.shape
    h, w = height // p, width // q
    x = images.reshape(n_crops, 3, h, p, w, q)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(n_crops, h * w, 3 * p * q)


def unpatchify(x, grid, patch):
    """The inverse of patchify: (B, N, 3*p*q) -> (B, 3, H, W)."""
    (h, w), (p, q) = grid, patch
    x = x.reshape(-1, h, w, 3, p, q)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, h * p, w * q)


def patch_norm(x):
    """Pixels x (B, N, 3*p*q) -> (x - mean) / std, and mean, both (B, N, 3*p*q), and std (B, N, 1).
    A patch has one mean for each channel, and one std.

    MAE takes one mean of all three channels. There a flat red patch has a target: red is above that
    mean, green and blue are below. Here its target is zeros. Most patches of a word are flat
    ground, and a recoloured view cannot know their colour. MAE divides by a variance of n - 1
    numbers, and adds 1e-6 to it, where this adds 1e-3."""
    channels = x.unflatten(-1, (3, -1))                                 # (B, N, 3, p*q)
    mean = channels.mean(-1, keepdim=True)                              # (B, N, 3, 1)
    centred = (channels - mean).flatten(-2)                             # (B, N, 3*p*q)
    variance = centred.square().mean(-1, keepdim=True)                  # (B, N, 1)
    # a patch whose pixels differ by less than 4 levels of 256 is noise, and is not blown up: its
    # variance, where pixels go from -1 to 1, is below (4 / 128)^2, about 1e-3
    std = (variance + 1e-3).sqrt()
    return centred / std, mean.expand_as(channels).flatten(-2), std


def sincos(width, places):
    """Position codes (n, width) of places (n,): [sin, cos], frequencies 10000^(-i/(width/2))."""
    half = width // 2
    omega = 10000 ** -(torch.arange(half, dtype=torch.float64) / half)
    angles = places[:, None] * omega                                    # (n, width/2)
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()


def sincos_2d(width, grid, fine_grid):
    """Position codes (h*w, width) of a grid's patch centres: first half x, second half y. MAE's.

    Places are counted in patches of fine_grid. A coarse patch that covers the fine patches 2j
    and 2j+1 stands at 2j + 0.5, so that the same place has the same code at every scale."""
    y = centres(grid[0], fine_grid[0])                                  # (h,)
    x = centres(grid[1], fine_grid[1])                                  # (w,)
    y, x = torch.meshgrid(y, x, indexing="ij")                          # (h, w) each
    codes = [sincos(width // 2, x.flatten()), sincos(width // 2, y.flatten())]
    return torch.cat(codes, dim=1)


def centres(n, n_fine):
    """Centres of n patches that together are as long as n_fine patches at 0, 1, 2, ..."""
    patch = n_fine / n                                      # length of one, in fine patches
    return (torch.arange(n, dtype=torch.float64) + 0.5) * patch - 0.5


def init_weights(module):
    """MAE's: Xavier for matrices (the patch projection as one), zeros for biases, N(0,
    0.02) for tokens."""
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.endswith(("cls_token", "mask_token", "scale_embed")):
            nn.init.normal_(parameter, std=0.02)
        elif parameter.dim() > 1:
            matrix = parameter.data.flatten(1)              # a view: it fills the parameter
            nn.init.xavier_uniform_(matrix)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)


# ---- the encoder

def attend(q, k, v, dropout=0.0, causal=False):
    """softmax(q k' / sqrt(d)) v for q (B, heads, T, d), k and v (B, heads, S, d) -> (B,
    heads, T, d).

    dropout must be 0 outside training. CUDA takes the fused kernel. Elsewhere the lines are
    written out: on a CPU that is faster in the backward pass, and for the single queries of
    reading."""
    if q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=causal)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)            # (B, heads, T, S)
    if causal:
        future = scores.new_full(scores.shape[-2:], -math.inf).triu(1)
        scores = scores + future
    weights = F.dropout(scores.softmax(-1), dropout)
    return weights @ v                                                  # (B, heads, T, d)


class Attention(nn.Module):
    """Self-attention of the encoder: one matrix for queries, keys and values, as in timm's
    checkpoints."""

    def __init__(self, width, heads, dropout=0.0):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def queries_keys_values(self, x):
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))            # (B, T, 3, heads, d)
        return qkv.permute(2, 0, 3, 1, 4)                               # (3, B, heads, T, d)

    def forward(self, x):
        q, k, v = self.queries_keys_values(x).unbind(0)
        dropout = self.dropout if self.training else 0.0
        x = attend(q, k, v, dropout)                                    # (B, heads, T, d)
        x = self.proj(x.transpose(1, 2).flatten(2))                     # (B, T, D)
        return F.dropout(x, self.dropout, self.training)


class Mlp(nn.Module):
    def __init__(self, width, hidden, dropout=0.0, bias=True):
        super().__init__()
        self.dropout = dropout
        self.fc1 = nn.Linear(width, hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, width, bias=bias)

    def forward(self, x):
        x = F.gelu(self.fc1(x))
        x = F.dropout(x, self.dropout, self.training)
        return self.fc2(x)


class Block(nn.Module):
    """Pre-norm Transformer block. drop_path: the share of crops for which a branch is left out in
    training (stochastic depth, arXiv 1603.09382)."""

    def __init__(self, width, heads, dropout=0.0, drop_path=0.0):
        super().__init__()
        # the share of crops that keep a branch. It is a tensor, since it differs from block to
        # block: with a Python float torch.compile would compile each block anew
        keep_path = torch.tensor(1 - drop_path) if drop_path else None
        self.register_buffer("keep_path", keep_path, persistent=False)
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads, dropout)
        self.mlp = Mlp(width, 4 * width, dropout)

    def leave_out_some(self, branch):
        if self.keep_path is None or not self.training:
            return branch
        chances = self.keep_path.expand(branch.shape[0], 1, 1)              # (B, 1, 1)
        kept = torch.bernoulli(chances)                                     # 0 or 1 for each crop
        kept = kept / self.keep_path                                        # its mean is 1
        return branch * kept.to(branch.dtype)

    def forward(self, x):
        x = x + self.leave_out_some(self.attn(self.norm1(x)))
        x = x + self.leave_out_some(self.mlp(self.norm2(x)))
        return x


class PatchEmbed(nn.Module):
    """A linear map of each patch's pixels. Its weight has a convolution's shape, as in
    MAE's checkpoints."""

    def __init__(self, patch, width):
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch)

    def forward(self, images):
        # one matrix product with the convolution's own weight: faster than a strided
        # convolution
        x = patchify(images, self.proj.kernel_size)                     # (B, N, 3*p*q)
        return F.linear(x, self.proj.weight.flatten(1), self.proj.bias)


class ViT(nn.Module):
    """The encoder. images (B, 3, H, W) in [-1, 1] -> (B, 1+N, D): [cls], then the patches
    in row order. With ids_keep (B, K) only those patches are seen: (B, 1+K, D).
    LayerNormed.

    `size` is the fine scale (H, W); `scales` are the coarse ones, coarse to fine. All
    scales share every weight, but for a learned offset each (`scale_embed`; the fine scale
    has none). Names and shapes are MAE's and timm's, so their checkpoints load."""

    def __init__(self, depth, width, heads, patch=(4, 4), size=(H, W), scales=(),
                 dropout=0.0, drop_path=0.0):
        super().__init__()
        self.size, self.patch, self.width = tuple(size), tuple(patch), width
        self.scales = [tuple(scale) for scale in scales]
        self.grid = self.grid_of(self.size)

        self.patch_embed = PatchEmbed(self.patch, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        codes = sincos_2d(width, self.grid, self.grid)                  # (N, D)
        codes = F.pad(codes, (0, 0, 1, 0))                              # [cls] has no place: zeros
        self.pos_embed = nn.Parameter(codes[None], requires_grad=False)     # stored, as in MAE

        self.scale_embed = None
        if self.scales:
            self.scale_embed = nn.Parameter(torch.zeros(len(self.scales), width))
        for i, scale in enumerate(self.scales):
            codes = sincos_2d(width, self.grid_of(scale), self.grid)
            self.register_buffer(f"pos_{i}", codes[None], persistent=False)

        self.blocks = nn.ModuleList()
        for i in range(depth):
            rate = drop_path * i / max(depth - 1, 1)        # deeper blocks are left out more often
            self.blocks.append(Block(width, heads, dropout, rate))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        init_weights(self)

    def grid_of(self, size):
        """Pixels (H, W) -> patches (h, w)."""
        return size[0] // self.patch[0], size[1] // self.patch[1]

    def add_codes(self, x, size):
        """Patch tokens (B, N, D) of a view of that size, each plus the code of where it
        stands."""
        if size == self.size:
            return x + self.pos_embed[:, 1:]
        if size not in self.scales:
            raise ValueError(f"images of (height, width) {size}; expected {self.size} or one of "
                             f"the coarse scales {self.scales}")
        i = self.scales.index(size)
        return x + getattr(self, f"pos_{i}") + self.scale_embed[i]

    def forward(self, images, ids_keep=None):
        x = self.patch_embed(images)                                    # (B, N, D)
        x = self.add_codes(x, tuple(images.shape[-2:]))
        if ids_keep is not None:
            x = take(x, ids_keep)                                       # (B, K, D)

        cls = self.cls_token + self.pos_embed[:, :1]                    # (1, 1, D)
        cls = cls.expand(x.shape[0], -1, -1)                            # (B, 1, D)
        x = torch.cat([cls, x], dim=1)                                  # (B, 1+K, D)

        for block in self.blocks:
            x = block(x)
        return self.norm(x)


# ---- the decoder of pre-training

class DecoderAttention(nn.Module):
    """The decoders' attention, to themselves or to another network's tokens. Keys and
    values are made apart, so that they can be kept and used again."""

    def __init__(self, width, heads, dropout=0.0, bias=True):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.q = nn.Linear(width, width, bias=bias)
        self.kv = nn.Linear(width, 2 * width, bias=bias)
        self.proj = nn.Linear(width, width, bias=bias)

    def keys_values(self, y):
        kv = self.kv(y).unflatten(-1, (2, self.heads, -1))              # (B, S, 2, heads, d)
        return kv.permute(2, 0, 3, 1, 4).contiguous()                   # (2, B, heads, S, d)

    def queries(self, x):
        return self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)    # (B, heads, T, d)

    def forward(self, x, kv, causal=False):
        keys, values = kv.unbind(0)
        dropout = self.dropout if self.training else 0.0
        x = attend(self.queries(x), keys, values, dropout, causal)      # (B, heads, T, d)
        x = self.proj(x.transpose(1, 2).flatten(2))                     # (B, T, D)
        return F.dropout(x, self.dropout, self.training)


class DecoderLayer(nn.Module):
    """Self-attention -> cross-attention -> FFN, post-norm: LMIM's.

    x (B, T, D), memory (B, S, D) -> (B, n_queries, D). All T tokens are keys of self-attention,
    but only the last n_queries of them go on. memory=None leaves cross-attention out."""

    def __init__(self, width, heads, ffn, dropout=0.0, cross=True):
        super().__init__()
        self.dropout = dropout
        self.self_attn = DecoderAttention(width, heads, dropout)
        self.cross_attn = DecoderAttention(width, heads, dropout) if cross else None
        self.mlp = Mlp(width, ffn, dropout)
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, eps=1e-6) if cross else None
        self.norm3 = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x, memory, n_queries):
        kv = self.self_attn.keys_values(x)
        x = x[:, -n_queries:]
        x = self.norm1(x + self.self_attn(x, kv))
        if memory is not None:
            kv = self.cross_attn.keys_values(memory)
            x = self.norm2(x + self.cross_attn(x, kv))
        branch = F.dropout(self.mlp(x), self.dropout, self.training)
        return self.norm3(x + branch)                                   # (B, n_queries, D)


class Decoder(nn.Module):
    """Predicts the target of hidden patches from visible tokens, places, and tokens of other views.

    grids: those that it can predict, the fine one last. Places are counted in patches of the fine
    grid, as in the encoder. visible=False: it is never given visible tokens; cross=False: never
    tokens of other views."""

    def __init__(self, encoder_width, out, grids, layers, width, heads, ffn, dropout=0.1,
                 visible=True, cross=True):
        super().__init__()
        # a weight that a method never uses is not made: DDP would wait for its gradient
        self.embed = nn.Linear(encoder_width, width) if visible else None
        self.embed_memory = nn.Linear(encoder_width, width) if cross else None
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.layers = nn.ModuleList()
        for _ in range(layers):
            self.layers.append(DecoderLayer(width, heads, ffn, dropout, cross))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pred = nn.Linear(width, out)
        self.fine = len(grids) - 1                          # the fine grid's number
        for i, grid in enumerate(grids):
            codes = sincos_2d(width, grid, grids[-1])
            self.register_buffer(f"pos_{i}", codes[None], persistent=False)
        init_weights(self)

    def codes_of(self, i):
        """Position codes (1, N, D) of the patches of grids[i]."""
        return getattr(self, f"pos_{i}")

    def predict_hidden(self, others, seen, ids_keep, ids_mask):
        """mim, at the fine scale. others: tokens of other views, a list of (B, 1+N', D'), perhaps
        empty; seen (B, 1+K, D') -> (B, M, C), in ids_mask's order.

        Tokens need not be put back in order: each has the code of its place."""
        codes = self.codes_of(self.fine).expand(seen.shape[0], -1, -1)  # (B, N, D)
        seen_codes = F.pad(take(codes, ids_keep), (0, 0, 1, 0))         # [cls] has no place: zeros
        seen = self.embed(seen) + seen_codes                            # (B, 1+K, D)
        hidden = self.mask_token + take(codes, ids_mask)                # (B, M, D)
        x = torch.cat([seen, hidden], dim=1)                            # (B, 1+N, D)
        return self.predict(x, others, n_hidden=hidden.shape[1])

    def predict_all(self, others, i):
        """nsp: every patch of grids[i] is hidden, and all that is known comes from others, a list
        of (B, 1+N', D') -> (B, N, C)."""
        hidden = self.mask_token + self.codes_of(i)                     # (1, N, D)
        x = hidden.repeat(others[0].shape[0], 1, 1)                     # (B, N, D)
        return self.predict(x, others, n_hidden=x.shape[1])

    def predict(self, x, others, n_hidden):
        """x (B, T, D), of which the last n_hidden are hidden -> (B, n_hidden, C). The last layer
        and the head run on the hidden tokens alone."""
        memory = None
        if others:
            memory = self.embed_memory(torch.cat(others, dim=1))        # (B, S, D)
        for layer in self.layers[:-1]:
            x = layer(x, memory, n_queries=x.shape[1])
        x = self.layers[-1](x, memory, n_queries=n_hidden)              # (B, n_hidden, D)
        return self.pred(self.norm(x))                                  # (B, n_hidden, C)


# ---- methods: a fifth is a fifth row

# guide   what mim's decoder sees besides visible patches: nothing, or a view of full or coarse
#         size, moved, bent and recoloured
# mim, nsp, align     the weights of the terms. lmim's align of 1 is for a teacher's features; on
#         pixels it harms reading, and 0.02 does not
# form    how [cls] tokens are aligned
GUIDES = ("none", "full", "coarse")
FORMS = ("mse", "infonce")
METHODS = {
    "mim":  dict(guide="none",   mim=1.0, nsp=0.0, align=0.0),
    "nsp":  dict(guide="none",   mim=0.0, nsp=1.0, align=0.0),
    "lmim": dict(guide="full",   mim=1.0, nsp=0.0, align=1.0,  form="mse"),
    "mnsp": dict(guide="coarse", mim=1.0, nsp=1.0, align=0.02, form="infonce"),
}


def mse(pred, target):
    """Mean square difference, in float32."""
    return F.mse_loss(pred.float(), target.float())


def infonce(a, b, temperature=0.2):
    """A crop's two [cls] tokens, a and b (B, D), find each other among those of the micro-batch's
    crops on all ranks, both ways (InfoNCE, arXiv 1807.03748). A crop that is there twice, as with
    SRC@2, counts as two crops that differ."""
    with torch.autocast(a.device.type, enabled=False):
        a = F.normalize(a.float(), dim=-1)
        b = F.normalize(b.float(), dim=-1)
        all_a, all_b, first_row = gather_ranks(a, b)        # (R, D) each: R crops on all ranks
        a_to_b = a @ all_b.T / temperature                              # (B, R)
        b_to_a = b @ all_a.T / temperature
        partner = first_row + torch.arange(a.shape[0], device=a.device)     # its row of the R
        return (F.cross_entropy(a_to_b, partner) + F.cross_entropy(b_to_a, partner)) / 2


def gather_ranks(a, b):
    """a, b (B, D) of this rank -> those of all ranks, (R, D) each, and the row in them at which
    this rank's begin. All ranks have as many rows: next_batch in data.py fills the places of
    damaged crops.

    Without gradients nothing is gathered. That is how draw_samples in pretrain.py calls the model,
    on rank 0 alone, which would wait for the others for ever."""
    if not dist.is_initialized() or not torch.is_grad_enabled():
        return a, b, 0
    both = GatherRows.apply(torch.cat([a, b], dim=1))                   # (R, 2*D), R = ranks * B
    all_a, all_b = both.chunk(2, dim=1)
    return all_a, all_b, dist.get_rank() * a.shape[0]


class GatherRows(torch.autograd.Function):
    """x (B, D) -> the rows of all ranks (ranks * B, D). A row's gradient is the sum of what all
    ranks send back."""

    @staticmethod
    def forward(ctx, x):
        of_rank = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(of_rank, x.contiguous())
        return torch.cat(of_rank)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)    # all_reduce writes into it
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def spread(cls):
    """How far unit [cls] tokens (B, D) lie from their mean, from 0 (all the same: they
    collapsed) to 1."""
    unit = F.normalize(cls.detach().float(), dim=-1)
    return (unit - unit.mean(0)).square().sum(-1).mean().sqrt()


def half_size(patch):
    """The coarse view's size where none is named: half the crop's height and width, or half the
    width alone where a patch is higher than that."""
    height = H // 2
    if patch[0] > height:
        height = H
    return height, W // 2


def coarse_sizes(method, scales):
    """Those of `scales` at which a row of METHODS has a view. nsp has one at each of them. A coarse
    guide is of the last, the finest, with nsp or without."""
    if method["nsp"]:
        return [tuple(size) for size in scales]
    if method["guide"] == "coarse":
        return [tuple(scales[-1])]
    return []


class Pretrainer(nn.Module):
    """One model and one loss path for every row of METHODS.

    method: a row of METHODS, or its name; scales: (height, width) in pixels, coarse to fine,
    None: half_size; teacher: a frozen ViT whose features are the target, None: pixels."""

    def __init__(self, method, model="vit_small", scales=None, teacher=None):
        super().__init__()
        if scales is None:
            scales = [half_size(MODELS[model]["encoder"]["patch"])]
        self.method = METHODS[method] if isinstance(method, str) else method
        self.scales = coarse_sizes(self.method, scales)
        self.encoder = ViT(**MODELS[model]["encoder"], scales=self.scales)

        # not by `self.teacher = ...`, which would make it a part of the model: trained and saved
        self.__dict__["teacher"] = teacher
        if teacher is not None:
            teacher.requires_grad_(False)
            teacher.eval()

        # the fine scale is always a target. nsp predicts each scale from coarser ones, so that all
        # but the coarsest are targets too: views of 8 x 32 and 16 x 64 have targets of 16 x 64 and
        # 32 x 128
        self.target_sizes = [*self.scales[1:], self.encoder.size]
        self.target_grids = [self.encoder.grid_of(size) for size in self.target_sizes]
        self.decoder = Decoder(
            self.encoder.width, 3 * math.prod(self.encoder.patch), self.target_grids,
            visible=self.method["mim"] > 0,
            cross=self.method["nsp"] > 0 or self.method["guide"] != "none",
            **MODELS[model]["decoder"])
        if teacher is not None:
            # the target has teacher.width numbers a patch. This is drawn last, so that all else
            # begins with the same weights as without a teacher
            self.decoder.pred = nn.Linear(self.decoder.pred.in_features, teacher.width)
            init_weights(self.decoder.pred)

    @torch.no_grad()
    def targets(self, image):
        """What is to be predicted of each target size, the fine one last: (B, N, C) each. The
        normalised pixels of each patch, or the teacher's tokens, LayerNormed without parameters."""
        targets = []
        if self.teacher is None:
            for size in self.target_sizes:
                view = F.adaptive_avg_pool2d(image, size)
                pixels, _, _ = patch_norm(patchify(view, self.encoder.patch))
                targets.append(pixels)
            return targets

        tokens = self.teacher(image)[:, 1:].float()                     # (B, N', C)
        tokens = tokens.transpose(1, 2)                                 # (B, C, N')
        tokens = tokens.unflatten(2, self.teacher.grid)                 # (B, C, h', w')
        for grid in self.target_grids:
            pooled = F.adaptive_avg_pool2d(tokens, grid)                # (B, C, h, w)
            pooled = pooled.flatten(2).transpose(1, 2)                  # (B, N, C)
            targets.append(F.layer_norm(pooled, pooled.shape[-1:]))
        return targets

    def encode(self, image, guide_view, coarse_views, ids_keep):
        """-> three lists: tokens (B, 1+N', D) of mim's guide and of nsp's views, and (B, 1+K, D)
        of the masked crop. A list is empty where the method has no such thing."""
        guide, coarse, seen = [], [], []
        if guide_view is not None:
            guide = [self.encoder(guide_view)]
        for view in coarse_views:
            coarse.append(self.encoder(view))
        if self.method["mim"]:
            seen = [self.encoder(image, ids_keep)]
        return guide, coarse, seen

    def disagreement(self, cls):
        """How far neighbours in a list of [cls] tokens (B, D) are from agreeing, mean over the
        pairs. lmim's list is guide, masked crop: one pair. mnsp's is guide, nsp's view, masked
        crop: two pairs, each with nsp's view."""
        losses = []
        for a, b in zip(cls, cls[1:]):
            if self.method["form"] == "mse":
                losses.append(mse(a, b))
            else:
                losses.append(infonce(a, b))
        return sum(losses) / len(losses)

    def forward(self, image, guide_view, coarse_views, ids_keep, ids_mask):
        """image (B, 3, H, W); guide_view (B, 3, ...) or None, coarse_views a list of such, as
        make_views in pretrain.py makes them; ids_keep (B, K), ids_mask (B, M)
        -> loss; a dict of its weighted terms, and of spread, which is only logged; a dict of
        what is predicted of the fine scale: "mim" (B, M, C), "nsp" (B, N, C)."""
        weight = self.method                            # of each term
        terms, pred = {}, {}
        targets = self.targets(image)                   # (B, N, C) each, the fine scale last
        guide, coarse, seen = self.encode(image, guide_view, coarse_views, ids_keep)
        cls = [tokens[:, 0] for tokens in [*guide, *coarse, *seen]]     # (B, D) each

        if weight["mim"]:           # hidden patches, from visible ones and the guide
            pred["mim"] = self.decoder.predict_hidden(guide, seen[0], ids_keep, ids_mask)
            terms["mim"] = weight["mim"] * mse(pred["mim"], take(targets[-1], ids_mask))

        if weight["nsp"]:           # every patch of a scale, from coarser scales alone
            losses = []
            for i, target in enumerate(targets):    # one for each coarse view, a scale finer
                coarser = coarse[:i + 1]
                predicted = self.decoder.predict_all(coarser, i)
                losses.append(mse(predicted, target))
            pred["nsp"] = predicted                 # of the fine scale, which comes last
            terms["nsp"] = weight["nsp"] * sum(losses) / len(losses)

        if weight["align"]:         # [cls] of neighbouring views agree: MLA
            terms["align"] = weight["align"] * self.disagreement(cls)

        loss = sum(terms.values())
        terms["spread"] = spread(cls[-1])               # after the sum: logged, not minimised
        return loss, terms, pred


# ---- loading an encoder

# what may stand before an encoder's names
ENCODER_PREFIXES = (
    "model_maeenc.",            # LMIM's
    "encoder.",                 # ours
    "backbone.",                # MMOCR's
    "",                         # MAE's and timm's. It is last, since every name starts with it
)
# names that begin so, the prefix taken off, are left behind: other networks, our coarse scales
NOT_ENCODER = (
    "decoder", "mask_token", "scale_embed", "model_maeenc_momentum", "head", "fc_norm",
    "linear_norm")


def load_encoder(path):
    """ViT of a checkpoint for crops of 32 x 128: this project's (any method, or a
    recognizer), or one in MAE's format, such as MAERec's and LMIM's, with or without
    {"model": ...}.

    Width, depth and patch are read off the tensors. The stored `pos_embed` is kept as it
    is. For the number of heads see heads_of. Coarse scales are left behind.
    `encoder.matched` says how many tensors came from the file. Raises UserError, one line,
    if it holds no whole encoder."""
    checkpoint = read_checkpoint(path)
    state = encoder_tensors(checkpoint, path)
    width, _, p, q = state["patch_embed.proj.weight"].shape
    depth = sum(name.endswith(".attn.qkv.weight") for name in state)
    encoder = ViT(depth, width, heads_of(depth, width, model_of(checkpoint)), patch=(p, q))
    hint = f"; expected 32x128 crops in patches of {p}x{q}"
    encoder.matched = load_state(encoder, state, path, hint)
    return encoder


def encoder_tensors(checkpoint, path):
    """{timm's name: tensor} of the encoder in a checkpoint, whatever stands before its
    names. UserError if there is none, or none for our crops."""
    state = checkpoint.get("model", checkpoint)
    if not isinstance(state, dict):
        state = {}
    tensors = {}
    for name, x in state.items():
        if isinstance(name, str) and torch.is_tensor(x):
            tensors[name] = x

    needed = "blocks.0.attn.qkv.weight"         # every encoder has it, after the prefix
    found = [prefix for prefix in ENCODER_PREFIXES if prefix + needed in tensors]
    if not found:
        names = list(tensors)
        if not tensors:
            names = list(checkpoint)
        first_names = ", ".join(str(name) for name in names[:3])
        raise UserError(f"{path}: no {needed} in it, but {first_names or 'nothing'}; expected the "
                        "encoder of a ViT with MAE's or timm's names, or a dict that has it under "
                        "'model'")
    prefix = found[0]
    encoder = {}
    for name, x in tensors.items():
        short = name.removeprefix(prefix)
        if name.startswith(prefix) and not short.startswith(NOT_ENCODER):
            encoder[short] = x

    patches = encoder.get("patch_embed.proj.weight")
    is_whole = patches is not None and patches.dim() == 4 and 0 not in patches.shape
    if not is_whole or "pos_embed" not in encoder:
        raise UserError(f"{path}: no patch_embed.proj.weight of a convolution, or no pos_embed; "
                        "expected a whole ViT encoder")
    p, q = patches.shape[2:]
    if H % p or W % q:
        raise UserError(
            f"{path}: patches of {p}x{q}; expected a size that divides the crop, {H}x{W}")
    return encoder


def model_of(checkpoint):
    """The --model that a checkpoint was made with, if it is one of ours, or None: a foreign file
    may hold anything there."""
    flags = checkpoint.get("args")
    if not isinstance(flags, dict):
        return None
    name = flags.get("model")
    if isinstance(name, str) and name in MODELS:
        return name
    return None


def heads_of(depth, width, size=None):
    """The number of heads, which cannot be read off tensors: that of the row of MODELS that `size`
    names, or of another of that depth and width, else width // 64, as is usual."""
    rows = list(MODELS.values())
    if size is not None:
        rows.insert(0, MODELS[size])
    for row in rows:
        encoder = row["encoder"]
        if encoder["depth"] == depth and encoder["width"] == width:
            return encoder["heads"]
    heads = max(width // 64, 1)
    if width % heads:
        raise UserError(f"an encoder of width {width}: expected a multiple of 64, or less than 128")
    return heads


# ---- the recognizer

class ReaderLayer(nn.Module):
    """Self-attention -> cross-attention -> FFN, pre-norm, and no biases. This is LMIM's layer in
    fine-tuning, but for the biases that its FFN has.

    x (B, T, D) are characters, and crop_kv the keys and values of the crop's tokens. cache holds
    the keys and values of earlier characters (2, B, heads, t, d); it is None where x begins the
    word, and no character of it may see the next. -> (B, T, D), and the cache with x."""

    def __init__(self, width, heads, ffn, dropout=0.0):
        super().__init__()
        self.dropout = dropout
        self.self_attn = DecoderAttention(width, heads, dropout, bias=False)
        self.cross_attn = DecoderAttention(width, heads, dropout, bias=False)
        self.mlp = Mlp(width, ffn, dropout, bias=False)
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.norm3 = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x, crop_kv, cache):
        normed = self.norm1(x)
        kv = self.self_attn.keys_values(normed)                         # (2, B, heads, T, d)
        if cache is not None:
            kv = torch.cat([cache, kv], dim=3)                          # (2, B, heads, t+T, d)
        x = x + self.self_attn(normed, kv, causal=cache is None)
        x = x + self.cross_attn(self.norm2(x), crop_kv)
        branch = self.mlp(self.norm3(x))
        x = x + F.dropout(branch, self.dropout, self.training)
        return x, kv


class Recognizer(nn.Module):
    """Encoder, Linear + LayerNorm, and a Transformer decoder that reads (LMIM's fine-tuning model).

    Classes: the charset, then end, padding, unknown. One more embedding starts a word. With a
    weight `spell` there is a `char_head`, which names the character under each patch: an auxiliary
    loss on rendered words, whose character boxes are known. It is not used in reading."""

    def __init__(self, encoder, charset, max_length=25, layers=6, width=512, heads=8, ffn=256,
                 dropout=0.0, spell=0.0):
        super().__init__()
        self.encoder, self.charset, self.max_length = encoder, charset, max_length
        self.dropout, self.spell = dropout, spell
        self.index = {character: i for i, character in enumerate(charset)}
        self.end = len(charset)
        self.pad = self.end + 1
        self.unknown = self.end + 2                 # LMIM has it; nothing here is ever unknown
        n_classes = self.end + 3
        self.start = n_classes                      # no class: it is given, and never predicted

        self.proj = nn.Sequential(nn.Linear(encoder.width, width), nn.LayerNorm(width))
        self.embed = nn.Embedding(n_classes + 1, width)
        places = torch.arange(max_length + 1, dtype=torch.float64)
        self.register_buffer("pos", sincos(width, places)[None], persistent=False)
        self.layers = nn.ModuleList()
        for _ in range(layers):
            self.layers.append(ReaderLayer(width, heads, ffn, dropout))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.classifier = nn.Linear(width, n_classes)
        self.char_head = nn.Linear(encoder.width, n_classes) if spell else None
        self.recordings = {}                                            # see decode_recorded
        for part in (self.proj, self.layers, self.classifier):
            init_weights(part)
        nn.init.normal_(self.embed.weight, std=width ** -0.5)

    @property
    def device(self):
        return self.pos.device

    def __getstate__(self):
        """What is copied or pickled: all but recordings, which belong to these very weights."""
        return dict(self.__dict__, recordings={})

    def encode(self, images):
        """(B, 3, H, W) -> patch tokens (B, N, D), and for each layer the keys and values of its
        cross-attention."""
        tokens = self.encoder(images)[:, 1:]
        projected = self.proj(tokens)
        return tokens, [layer.cross_attn.keys_values(projected) for layer in self.layers]

    def logits_after(self, characters, crop_kvs, caches=None):
        """Characters (B, T) -> logits (B, T, V) of what follows each of them, and each layer's
        cache, these characters included.

        Without caches the characters begin a word, and none sees the next. With caches there is
        one, T = 1, which sees all those in the caches and itself."""
        if caches is None:
            past = 0                                # characters before these
            caches = [None] * len(self.layers)
        else:
            past = caches[0].shape[3]
        x = self.embed(characters) + self.pos[:, past:past + characters.shape[1]]   # (B, T, D)
        x = F.dropout(x, self.dropout, self.training)
        longer_caches = []
        for layer, crop_kv, cache in zip(self.layers, crop_kvs, caches):
            x, longer_cache = layer(x, crop_kv, cache)
            longer_caches.append(longer_cache)
        return self.classifier(self.norm(x)), longer_caches

    def forward(self, images, targets, chars_under=None):
        """Teacher forcing. targets (B, T): a word's classes, end, then padding; chars_under
        (B, N): the class of the character under each patch, padding where it is not known
        -> loss, its terms, logits (B, T, V)."""
        tokens, crop_kvs = self.encode(images)
        start = torch.full_like(targets[:, :1], self.start)
        given = torch.cat([start, targets[:, :-1]], dim=1)              # (B, T), one place later
        logits, _ = self.logits_after(given, crop_kvs)                  # (B, T, V)

        nats = self.cross_entropy(logits, targets)                      # (B, T)
        terms = {"read": nats.sum(1).mean()}                            # nats a word, as in LMIM
        if chars_under is not None:
            nats = self.cross_entropy(self.char_head(tokens), chars_under)          # (B, N)
            n_known = (chars_under != self.pad).sum(1).clamp(min=1)     # (B,)
            terms["spell"] = self.spell * (nats.sum(1) / n_known).mean()
        return sum(terms.values()), terms, logits

    def cross_entropy(self, logits, targets):
        """logits (B, T, V), targets (B, T) -> nats (B, T), in float32; 0 where padding."""
        logits = logits.float().transpose(1, 2)                         # (B, V, T): torch's order
        return F.cross_entropy(logits, targets, ignore_index=self.pad, reduction="none")

    @torch.no_grad()
    def decode(self, images, stop_early=True):
        """Greedy reading. images (B, 3, H, W) in [-1, 1] -> classes (B, T), and the probability of
        each (B, T). A word that has ended goes on with `end` at probability 1. T is the longest of
        the batch, its end included; with stop_early=False, max_length + 1."""
        _, crop_kvs = self.encode(images)
        B, device = images.shape[0], images.device
        character = torch.full((B, 1), self.start, device=device)
        caches = None                                                   # no letter yet
        going = torch.ones(B, dtype=torch.bool, device=device)          # words that have no end yet
        characters, confidences = [], []
        for t in range(self.max_length + 1):
            logits, caches = self.logits_after(character, crop_kvs, caches)
            logits = logits[:, 0].float()                               # (B, V)
            logits[:, self.pad:] = -math.inf                # padding and unknown are never read
            probabilities = logits.softmax(-1)
            confidence, chosen = probabilities.max(-1)                  # (B,)
            if t == self.max_length:                                    # the longest word ends here
                confidence = probabilities[:, self.end]
                chosen = torch.full_like(chosen, self.end)

            characters.append(chosen.where(going, self.end))
            confidences.append(confidence.where(going, 1.0))
            going = going & (chosen != self.end)
            character = chosen[:, None]
            if stop_early and not going.any():
                break
        return torch.stack(characters, dim=1), torch.stack(confidences, dim=1)

    def decode_recorded(self, images, dtype):
        """`decode` on a GPU, max_length + 1 letters, as a CUDA graph for each size of a batch, see
        Replayed in common.py: letter by letter, launching takes longer than the work. The first
        batch of a size runs as usual."""
        # a recording reads the weights at their addresses. They may have been moved since: then,
        # as with another dtype or with dropout, the recordings are thrown away
        key = (dtype, self.training, self.embed.weight.data_ptr())
        if key not in self.recordings:
            def decode_all_letters(images):
                with autocast(images.device, dtype):
                    return self.decode(images, stop_early=False)
            self.recordings.clear()
            self.recordings[key] = Replayed(decode_all_letters, eager_calls=1)
        return self.recordings[key](images=images)

    def read(self, images, batch_size=128, dtype=torch.float32):
        """uint8, or float in [0, 1], (B, 3, 32, 128) -> [(text, confidence)]: the product of the
        probabilities of its characters, end included. In float32 a text does not depend on its
        batch; half precision gives no such promise."""
        words = self.read_letters(images, batch_size, dtype)
        return [(text, math.prod(confidences)) for text, confidences in words]

    @torch.inference_mode()
    def read_letters(self, images, batch_size=128, dtype=torch.float32):
        """As `read`, but -> [(text, confidences)]: a list of probabilities, one of each character
        and one of the end."""
        check_crops(images)
        words = []
        for batch in images.split(batch_size):
            batch = normalize_pixels(to_device(batch, self.device))
            if self.device.type == "cuda":
                characters, confidences = self.decode_recorded(batch, dtype)
            else:
                with autocast(self.device, dtype):
                    characters, confidences = self.decode(batch)
            for row, sure in zip(characters.tolist(), confidences.cpu().double().tolist()):
                n = row.index(self.end)
                text = "".join(self.charset[i] for i in row[:n])
                words.append((text, sure[:n + 1]))
        return words


def check_crops(images):
    """UserError, one line, unless images are crops as `Recognizer.read` takes them."""
    expected = f"expected a torch tensor of shape (B, 3, {H}, {W}), uint8 or float in [0, 1]"
    if not torch.is_tensor(images):
        raise UserError(f"read: a {type(images).__name__}; {expected}")
    if images.dim() != 4 or tuple(images.shape[1:]) != (3, H, W):
        raise UserError(f"read: a tensor of shape {tuple(images.shape)}; {expected}")
    if images.dtype == torch.uint8:
        return
    if not images.is_floating_point():
        raise UserError(f"read: a tensor of {images.dtype}; {expected}")
    check_unit(images, "read: numbers", expected)


# ---- compiling

def compile_layers(network):
    """Compiles the blocks of the encoder and the layers of the decoders, on their first call. Those
    of one kind share what is compiled for a shape: seconds, where a whole network takes minutes.

    This is for training alone. Whoever reads or draws meanwhile, in other shapes, says so by
    torch.compiler.set_stance("force_eager")."""
    for layer in network.modules():
        if isinstance(layer, (Block, DecoderLayer)):
            layer.compile(dynamic=False)                    # once for each size of a view
        if isinstance(layer, ReaderLayer):
            layer.compile(dynamic=True)                     # once for words of any length
    if isinstance(network, Pretrainer) and network.teacher is not None:
        compile_layers(network.teacher)                     # which is none of its modules
