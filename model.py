"""The networks: a plain ViT, the pre-training objective of four methods, and a recognizer
that reads.

Read it top to bottom: the encoder, the decoder, METHODS and `Pretrainer.forward` (the
objective), loading of checkpoints, the recognizer. The loops are in pretrain.py and
finetune.py.

B batch   H W pixels   h w patch grid   N = h*w patches (N' of another view)   K kept, M
masked: K + M = N D width   C channels of the target   T characters   V classes   d width of
a head   S tokens attended to view    another look at the crop, nothing hidden guide   the
view that mim's decoder sees          coarse   nsp's views, smaller, everything in its place
"""
import math

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from common import H, W, UserError, load_state, read_checkpoint, to_device, to_unit

# encoder: the ViT, its patch in pixels (h, w); decoder: of pre-training; reader: of words,
# in fine-tuning
MODELS = {
    "vit_nano": dict(
        encoder=dict(depth=6, width=128, heads=4, patch=(8, 8)),
        decoder=dict(layers=2, width=128, heads=4, ffn=256, dropout=0.0),
        reader=dict(layers=2, width=128, heads=4, ffn=256)),
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
    return x.gather(1, ids[..., None].expand(-1, -1, x.shape[-1]))


def patchify(images, patch):
    """(B, 3, H, W) -> (B, N, 3*p*q): the pixels of each patch, in the order of a convolution's
    weight: channel, row, column."""
    p, q = patch
    x = images.unflatten(3, (-1, q)).unflatten(2, (-1, p))              # (B, 3, h, p, w, q)
    x = x.permute(0, 2, 4, 1, 3, 5)                                     # (B, h, w, 3, p, q)
    return x.flatten(1, 2).flatten(2)


def unpatchify(x, grid, patch):
    """The inverse of patchify: (B, N, 3*p*q) -> (B, 3, H, W)."""
    (h, w), (p, q) = grid, patch
    x = x.reshape(-1, h, w, 3, p, q)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, h * p, w * q)


def patch_norm(x):
    """Pixels (B, N, 3*p*q), less each channel's mean in the patch, over the patch's
    standard deviation -> normalised, mean, std.

    MAE takes one mean of all channels. On words that makes the target the colour of a flat
    ground, which a recoloured view cannot know, and drowns the strokes. Below a contrast of
    4 grey levels (variance 1e-3 on [-1, 1]) a patch is noise and is not blown up."""
    channels = x.unflatten(-1, (3, -1))                                 # (B, N, 3, p*q)
    mean = channels.mean(-1, keepdim=True)
    centred = (channels - mean).flatten(-2)                             # (B, N, 3*p*q)
    std = (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    return centred / std, mean.expand_as(channels).flatten(-2), std


def sincos(width, grid, fine):
    """Fixed position embedding (h*w, width) of patch centres, in units of patches of the
    grid `fine`.

    First half x, second half y, each [sin, cos] with frequencies 10000^(-i/(width/4)):
    MAE's, wherever grid == fine. A coarse patch that covers the fine patches 2j and 2j+1
    stands at 2j + 0.5, so that the same place has the same code at every scale."""
    h, w = grid
    y = (torch.arange(h, dtype=torch.float64) + 0.5) * fine[0] / h - 0.5
    x = (torch.arange(w, dtype=torch.float64) + 0.5) * fine[1] / w - 0.5
    y, x = torch.meshgrid(y, x, indexing="ij")                          # (h, w) each

    quarter = width // 4
    omega = 10000 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    x_angles = x.reshape(-1, 1) * omega                                 # (h*w, width/4)
    y_angles = y.reshape(-1, 1) * omega
    parts = [x_angles.sin(), x_angles.cos(), y_angles.sin(), y_angles.cos()]
    return torch.cat(parts, dim=1).float()


def init_weights(module):
    """MAE's: Xavier for matrices (the patch projection as one), zeros for biases, N(0,
    0.02) for tokens."""
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.endswith(("cls_token", "mask_token", "scale_embed")):
            nn.init.normal_(parameter, std=0.02)
        elif parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter.data.flatten(1))
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)


# ---- the encoder

def attend(q, k, v, dropout=0.0, causal=False):
    """softmax(q k' / sqrt(d)) v for q (B, heads, T, d), k and v (B, heads, S, d) -> (B,
    heads, T, d).

    CUDA takes the fused kernel. Elsewhere the lines are written out: on a CPU that is
    faster in the backward pass, and for the single queries of reading."""
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
        return F.dropout(x, dropout)


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
    """Pre-norm Transformer block. In training `drop_path` is the share of crops for which a
    branch is skipped (stochastic depth, arXiv 1603.09382)."""

    def __init__(self, width, heads, dropout=0.0, drop_path=0.0):
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads, dropout)
        self.mlp = Mlp(width, 4 * width, dropout)

    def skip(self, branch):
        if self.drop_path == 0 or not self.training:
            return branch
        kept = F.dropout(branch.new_ones(branch.shape[0], 1, 1), self.drop_path)
        return branch * kept                                        # 0, or 1 / (1 - drop_path)

    def forward(self, x):
        x = x + self.skip(self.attn(self.norm1(x)))
        x = x + self.skip(self.mlp(self.norm2(x)))
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
        places = sincos(width, self.grid, self.grid)                    # (N, D)
        places = F.pad(places, (0, 0, 1, 0))                    # [cls] stands nowhere: zeros
        self.pos_embed = nn.Parameter(places[None], requires_grad=False)    # stored, as in MAE
        self.scale_embed = None
        if self.scales:
            self.scale_embed = nn.Parameter(torch.zeros(len(self.scales), width))

        self.blocks = nn.ModuleList()
        for i in range(depth):
            rate = drop_path * i / max(depth - 1, 1)            # deeper blocks are skipped more
            self.blocks.append(Block(width, heads, dropout, rate))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        for i, scale in enumerate(self.scales):
            places = sincos(width, self.grid_of(scale), self.grid)
            self.register_buffer(f"pos_{i}", places[None], persistent=False)
        init_weights(self)

    def grid_of(self, size):
        """Pixels (H, W) -> patches (h, w)."""
        return size[0] // self.patch[0], size[1] // self.patch[1]

    def add_places(self, x, size):
        """Patch tokens (B, N, D) of a view of that size, each plus the code of where it
        stands."""
        if size == self.size:
            return x + self.pos_embed[:, 1:]
        i = self.scales.index(size)
        return x + getattr(self, f"pos_{i}") + self.scale_embed[i]

    def forward(self, images, ids_keep=None):
        x = self.patch_embed(images)                                    # (B, N, D)
        x = self.add_places(x, tuple(images.shape[-2:]))
        if ids_keep is not None:
            x = take(x, ids_keep)                                       # (B, K, D)

        cls = self.cls_token + self.pos_embed[:, :1]                    # (1, 1, D)
        cls = cls.expand(x.shape[0], -1, -1).to(x.dtype)
        x = torch.cat([cls, x], dim=1)                                  # (B, 1+K, D)

        for block in self.blocks:
            x = block(x)
        return self.norm(x)


# ---- the decoder of pre-training

class CachedAttention(nn.Module):
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
        return F.dropout(x, dropout)


class DecoderLayer(nn.Module):
    """Self-attention -> cross-attention -> FFN, post-norm: LMIM's.

    x (B, T, D), memory (B, S, D) or None: then there is no cross-attention -> (B,
    n_queries, D). Only the last n_queries tokens go on; all T are keys."""

    def __init__(self, width, heads, ffn, dropout=0.0, cross=True):
        super().__init__()
        self.dropout = dropout
        self.self_attn = CachedAttention(width, heads, dropout)
        self.cross_attn = CachedAttention(width, heads, dropout) if cross else None
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
    """Predicts the target of hidden patches from visible tokens, places, and the tokens of
    other views.

    `grids` are the grids it can predict, the fine one last. Places are in units of the fine
    grid, as in the encoder. Without `visible` it is never shown visible tokens, without
    `cross` no other views."""

    def __init__(self, encoder_width, out, grids, layers, width, heads, ffn, dropout=0.1,
                 visible=True, cross=True):
        super().__init__()
        self.embed = nn.Linear(encoder_width, width) if visible else None
        self.embed_memory = nn.Linear(encoder_width, width) if cross else None
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.layers = nn.ModuleList()
        for _ in range(layers):
            self.layers.append(DecoderLayer(width, heads, ffn, dropout, cross))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pred = nn.Linear(width, out)
        self.fine = len(grids) - 1
        for i, grid in enumerate(grids):
            places = sincos(width, grid, grids[-1])
            self.register_buffer(f"pos_{i}", places[None], persistent=False)
        init_weights(self)

    def predict_hidden(self, memory, seen, ids_keep, ids_mask):
        """mim: memory, a list of (B, 1+N', D'), or []; seen (B, 1+K, D') -> (B, M, C), in
        ids_mask's order. Tokens are not put back in order: each has its place added, and
        hidden ones come last."""
        places = getattr(self, f"pos_{self.fine}").expand(seen.shape[0], -1, -1)    # (B, N, D)
        seen_places = F.pad(take(places, ids_keep), (0, 0, 1, 0))  # [cls] stands nowhere: zeros
        seen = self.embed(seen) + seen_places                           # (B, 1+K, D)
        hidden = self.mask_token + take(places, ids_mask)               # (B, M, D)
        x = torch.cat([seen, hidden], dim=1)                            # (B, 1+N, D)
        return self.predict(x, memory, n_hidden=ids_mask.shape[1])

    def predict_all(self, memory, scale):
        """nsp: every patch of grids[scale] is hidden, and all that is known comes from
        memory, a list of (B, 1+N', D') -> (B, N, C)."""
        places = getattr(self, f"pos_{scale}")                          # (1, N, D)
        x = (self.mask_token + places).expand(memory[0].shape[0], -1, -1)
        return self.predict(x, memory, n_hidden=x.shape[1])

    def predict(self, x, memory, n_hidden):
        """x (B, T, D), of which the last n_hidden are hidden -> (B, n_hidden, C). The last
        layer and the head run on the hidden tokens alone."""
        if memory:
            memory = self.embed_memory(torch.cat(memory, dim=1))        # (B, sum of 1+N', D)
        else:
            memory = None
        for layer in self.layers[:-1]:
            x = layer(x, memory, n_queries=x.shape[1])
        x = self.layers[-1](x, memory, n_queries=n_hidden)              # (B, M, D)
        return self.pred(self.norm(x))                                  # (B, M, C)


# ---- methods: a fifth is a fifth row

# guide: what mim's decoder sees besides visible patches (full, coarse: a view of that size,
# moved, bent and recoloured; still: nsp's own views, coarse, recoloured and in place); mim,
# nsp, align: the terms' weights; form: how [cls] tokens are aligned, a name of ALIGN
GUIDES = ("none", "full", "coarse", "still")
METHODS = {
    "mim":  dict(guide="none",   mim=1.0, nsp=0.0, align=0.0),
    "nsp":  dict(guide="none",   mim=0.0, nsp=1.0, align=0.0),
    "lmim": dict(guide="full",   mim=1.0, nsp=0.0, align=1.0,  form="mse"),
    "mnsp": dict(guide="coarse", mim=1.0, nsp=1.0, align=0.02, form="infonce"),
}


def mse(pred, target):
    """Mean square difference, in float32."""
    return F.mse_loss(pred.float(), target.float())


def align_mse(a, b, rank_crops=None):
    """LMIM's: mean square difference of [cls] tokens (B, D), gradients through both sides.
    They collapse (watch `spread`). Where the target is pixels and not features, `lmim` at
    this weight learns little that helps to read; --set align=0.02 learns more."""
    return mse(a, b)


def align_infonce(a, b, rank_crops=None, temperature=0.2):
    """A crop's two [cls] tokens, a and b (B, D), find each other among those of the
    micro-batch's crops on all ranks, both ways (InfoNCE, arXiv 1807.03748)."""
    with torch.autocast(a.device.type, enabled=False):
        a = F.normalize(a.float(), dim=-1)
        b = F.normalize(b.float(), dim=-1)
        all_a, all_b, padding, first = gather_pairs(a, b, rank_crops)   # (S, D) each, of all ranks

        a_to_b = a @ all_b.T / temperature                              # (B, S)
        b_to_a = b @ all_a.T / temperature
        a_to_b = a_to_b.masked_fill(padding, -math.inf)
        b_to_a = b_to_a.masked_fill(padding, -math.inf)
        partner = first + torch.arange(a.shape[0], device=a.device)     # its row among the S
        return (F.cross_entropy(a_to_b, partner) + F.cross_entropy(b_to_a, partner)) / 2


def gather_pairs(a, b, rank_crops):
    """a, b (B, D) of this rank -> those of all ranks (S, D), which rows are padding (S,), and
    where this rank's begin. A rank with a damaged crop has fewer than rank_crops rows and is
    padded with zeros."""
    # without gradients nothing is gathered: rank 0 alone draws pictures
    if not dist.is_initialized() or not torch.is_grad_enabled():
        padding = torch.zeros(a.shape[0], dtype=torch.bool, device=a.device)
        return a, b, padding, 0
    rows = rank_crops or a.shape[0]
    both = torch.cat([a, b], dim=1)                                     # (B, 2*D)
    both = F.pad(both, (0, 0, 0, rows - a.shape[0]))
    both = GatherRanks.apply(both)                                      # (ranks * rows, 2*D)
    all_a, all_b = both.chunk(2, dim=1)
    return all_a, all_b, (both == 0).all(1), dist.get_rank() * rows


class GatherRanks(torch.autograd.Function):
    """x (B, D) -> the rows of all ranks (ranks * B, D). A row's gradient is the sum of what
    all ranks send back."""

    @staticmethod
    def forward(ctx, x):
        gathered = x.new_empty(dist.get_world_size() * x.shape[0], x.shape[1])
        dist.all_gather_into_tensor(gathered, x.contiguous())
        return gathered

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


ALIGN = {"mse": align_mse, "infonce": align_infonce}


def spread(cls):
    """How far unit [cls] tokens (B, D) lie from their mean, from 0 (all the same: they
    collapsed) to 1."""
    mean = F.normalize(cls.detach().float(), dim=-1).mean(0)
    return (1 - mean.square().sum()).clamp(min=0).sqrt()


class Pretrainer(nn.Module):
    """One model and one loss path for every row of METHODS.

    method: a name of METHODS, or such a row; scales: nsp's, coarse to fine; teacher: a
    frozen ViT whose features are the target, or None: pixels; rank_crops: of one rank in a
    micro-batch, for align_infonce."""

    def __init__(self, method, model="vit_small", scales=((16, 64),), teacher=None,
                 rank_crops=None):
        super().__init__()
        self.method = METHODS[method] if isinstance(method, str) else method
        self.rank_crops = rank_crops
        self.scales = []
        if self.method["nsp"]:
            self.scales = [tuple(scale) for scale in scales]
        elif self.method["guide"] == "coarse":
            self.scales = [tuple(scales[-1])]

        self.encoder = ViT(**MODELS[model]["encoder"], scales=self.scales)
        self.__dict__["teacher"] = teacher  # no part of the model: neither trained nor saved
        out = 3 * math.prod(self.encoder.patch)
        if teacher is not None:
            teacher.requires_grad_(False).eval()
            out = teacher.width

        predicted = [*self.scales[1:], self.encoder.size]       # all scales but the coarsest
        self.grids = [self.encoder.grid_of(size) for size in predicted]
        visible = self.method["mim"] > 0
        cross = self.method["nsp"] > 0 or self.method["guide"] != "none"
        sizes = MODELS[model]["decoder"]
        self.decoder = Decoder(
            self.encoder.width, out, self.grids, visible=visible, cross=cross, **sizes)

    @torch.no_grad()
    def target(self, image):
        """What is to be predicted, for each predicted scale (B, N, C), the fine one last:
        each patch's normalised pixels, or the teacher's tokens, LayerNormed without
        parameters."""
        if self.teacher is None:
            views = [F.adaptive_avg_pool2d(image, size) for size in self.scales[1:]]
            patches = [patchify(view, self.encoder.patch) for view in [*views, image]]
            return [patch_norm(pixels)[0] for pixels in patches]

        tokens = self.teacher(image)[:, 1:].float()                     # (B, N', C)
        tokens = tokens.transpose(1, 2).unflatten(2, self.teacher.grid)     # (B, C, h', w')
        targets = []
        for grid in self.grids:
            pooled = F.adaptive_avg_pool2d(tokens, grid).flatten(2).transpose(1, 2)  # (B, N, C)
            targets.append(F.layer_norm(pooled, pooled.shape[-1:]))
        return targets

    def encode(self, image, views, ids_keep):
        """-> what mim's decoder sees besides visible patches, a list of (B, 1+N', D); what
        nsp's sees, such a list; the visible patches' tokens (B, 1+K, D), or None; the [cls]
        tokens (B, D) of every view, of the masked crop last."""
        guide_views, coarse_views = views
        guide = [self.encoder(view) for view in guide_views]
        coarse = [self.encoder(view) for view in coarse_views]
        seen = None
        if self.method["mim"]:
            seen = self.encoder(image, ids_keep)

        encoded = [*guide, *coarse]
        if seen is not None:
            encoded.append(seen)
        cls = [tokens[:, 0] for tokens in encoded]
        if self.method["guide"] == "still":
            guide = coarse
        return guide, coarse, seen, cls

    def agree(self, cls):
        """How far the [cls] tokens of neighbouring views are from agreeing, mean over the
        pairs: (guide, nsp's view) and (nsp's view, masked crop) in mnsp; (guide, masked
        crop) in lmim."""
        align = ALIGN[self.method["form"]]
        pairs = [align(a, b, self.rank_crops) for a, b in zip(cls, cls[1:])]
        return sum(pairs) / len(pairs)

    def forward(self, image, views, ids_keep, ids_mask):
        """image (B, 3, H, W); views: two lists, of make_views in pretrain.py; ids_keep (B,
        K), ids_mask (B, M) -> loss; its terms, weighted, and the spread of [cls]; what mim
        and nsp predict of the fine scale, (B, M, C) and (B, N, C)."""
        weight, terms, pred = self.method, {}, {}
        target = self.target(image)                     # (B, N, C) each, the fine scale last
        guide, coarse, seen, cls = self.encode(image, views, ids_keep)

        if weight["mim"]:           # hidden patches, from visible ones and the guide
            # (B, M, C)
            pred["mim"] = self.decoder.predict_hidden(guide, seen, ids_keep, ids_mask)
            terms["mim"] = weight["mim"] * mse(pred["mim"], take(target[-1], ids_mask))

        if weight["nsp"]:           # every patch of a scale, from coarser scales alone
            losses = []
            for scale in range(len(self.grids)):
                pred["nsp"] = self.decoder.predict_all(coarse[:scale + 1], scale)   # (B, N, C)
                losses.append(mse(pred["nsp"], target[scale]))
            terms["nsp"] = weight["nsp"] * sum(losses) / len(losses)

        if weight["align"]:         # [cls] of neighbouring views agree: MLA
            terms["align"] = weight["align"] * self.agree(cls)

        loss = sum(terms.values())
        terms["spread"] = spread(cls[-1])
        return loss, terms, pred


# ---- loading an encoder

ENCODER_PREFIXES = ("", "module.", "model_maeenc.", "module.model_maeenc.", "encoder.", "backbone.")
NOT_ENCODER = (
    "decoder", "mask_token", "scale_embed", "model_maeenc_momentum", "head", "fc_norm",
    "linear_norm")


def load_encoder(path):
    """ViT of a checkpoint for crops of 32 x 128: this project's (any method, or a
    recognizer), or one in MAE's format, such as MAERec's and LMIM's, with or without
    {"model": ...}.

    Width, depth and patch are read off the tensors. The stored `pos_embed` is kept as it
    is. Heads are those of the row of MODELS of that depth and width, else 64 wide. Coarse
    scales are left behind. `encoder.matched` says how many tensors came from the file.
    Raises UserError, one line, if it holds no whole encoder."""
    state = encoder_tensors(read_checkpoint(path), path)
    patches = state.get("patch_embed.proj.weight", torch.zeros(0))
    if patches.dim() != 4 or 0 in patches.shape or "pos_embed" not in state:
        raise UserError(f"{path}: no patch_embed.proj.weight of a convolution, or no pos_embed; "
                        "expected a whole ViT encoder")
    width, _, p, q = patches.shape
    depth = sum(name.endswith(".attn.qkv.weight") for name in state)
    encoder = ViT(depth, width, heads_of(depth, width), patch=(p, q))
    hint = f"; expected 32x128 crops in patches of {p}x{q}"
    encoder.matched = load_state(encoder, state, path, hint)
    return encoder


def encoder_tensors(checkpoint, path):
    """{timm's name: tensor} of the encoder in a checkpoint, whatever stands before its
    names."""
    state = checkpoint.get("model", checkpoint)
    if not isinstance(state, dict):
        state = {}
    tensors = {}
    for name, x in state.items():
        if isinstance(name, str) and torch.is_tensor(x):
            tensors[name] = x

    first = "blocks.0.attn.qkv.weight"
    found = [prefix for prefix in ENCODER_PREFIXES if prefix + first in tensors]
    if not found:
        raise UserError(f"{path}: no {first} in it; expected the encoder of a ViT with MAE's or "
                        "timm's names")
    encoder = {}
    for name, x in tensors.items():
        if name.startswith(found[0]):
            name = name.removeprefix(found[0])
            if not name.startswith(NOT_ENCODER):
                encoder[name] = x
    return encoder


def heads_of(depth, width):
    """Heads cannot be read off tensors: those of our size of that depth and width, else 64
    wide, as is usual."""
    for sizes in MODELS.values():
        encoder = sizes["encoder"]
        if encoder["depth"] == depth and encoder["width"] == width:
            return encoder["heads"]
    return max(width // 64, 1)


# ---- the recognizer

class ReaderLayer(nn.Module):
    """Self-attention -> cross-attention -> FFN, pre-norm and without biases: LMIM's in
    fine-tuning.

    x (B, T, D), the characters that continue `cache`; memory: keys and values of the crop's
    tokens, from cross_attn.keys_values; cache: keys and values of the characters so far (2,
    B, heads, t, d), or None -> (B, T, D), and the keys and values of t + T characters."""

    def __init__(self, width, heads, ffn, dropout=0.0):
        super().__init__()
        self.dropout = dropout
        self.self_attn = CachedAttention(width, heads, dropout, bias=False)
        self.cross_attn = CachedAttention(width, heads, dropout, bias=False)
        self.mlp = Mlp(width, ffn, dropout, bias=False)
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.norm3 = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x, memory, cache=None):
        normed = self.norm1(x)
        kv = self.self_attn.keys_values(normed)
        if cache is not None:
            kv = torch.cat([cache, kv], dim=3)                          # (2, B, heads, t+T, d)
        x = x + self.self_attn(normed, kv, causal=cache is None)
        x = x + self.cross_attn(self.norm2(x), memory)
        branch = self.mlp(self.norm3(x))
        x = x + F.dropout(branch, self.dropout, self.training)
        return x, kv


class Recognizer(nn.Module):
    """Encoder, Linear + LayerNorm, and a Transformer decoder that reads (LMIM's fine-tuning
    model).

    Classes: the charset, then end, padding, unknown. One more embedding starts a word.
    `char_head` (only with a weight `spell`) names the character under each patch: an
    auxiliary loss on rendered words, whose character boxes are known; it is not used in
    reading."""

    def __init__(self, encoder, charset, max_length=25, layers=6, width=512, heads=8, ffn=256,
                 dropout=0.0, spell=0.0):
        super().__init__()
        self.encoder, self.charset, self.max_length = encoder, charset, max_length
        self.dropout, self.spell = dropout, spell
        self.index = {character: i for i, character in enumerate(charset)}
        V = len(charset) + 3
        # V - 1, unknown, is LMIM's, no target here
        self.end, self.pad, self.start = V - 3, V - 2, V

        self.proj = nn.Sequential(nn.Linear(encoder.width, width), nn.LayerNorm(width))
        self.embed = nn.Embedding(V + 1, width)
        row = (1, max_length + 1)                                   # characters stand in a row
        places = sincos(2 * width, row, row)[:, :width]                 # the half that is x
        self.register_buffer("pos", places[None], persistent=False)
        self.layers = nn.ModuleList()
        for _ in range(layers):
            self.layers.append(ReaderLayer(width, heads, ffn, dropout))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.classifier = nn.Linear(width, V)
        self.char_head = nn.Linear(encoder.width, V) if spell else None
        for part in (self.proj, self.layers, self.classifier):
            init_weights(part)
        nn.init.normal_(self.embed.weight, std=width ** -0.5)

    def encode(self, images):
        """(B, 3, H, W) -> patch tokens (B, N, D), and the keys and values of each layer's
        cross-attention."""
        tokens = self.encoder(images)[:, 1:]
        memory = self.proj(tokens)
        return tokens, [layer.cross_attn.keys_values(memory) for layer in self.layers]

    def step(self, ids, memory, caches=None):
        """ids (B, T) continue what `caches` hold -> logits (B, T, V), and the caches with
        these T."""
        past = 0 if caches is None else caches[0].shape[3]
        x = self.embed(ids) + self.pos[:, past:past + ids.shape[1]]     # (B, T, D)
        x = F.dropout(x, self.dropout, self.training)
        kept = []
        for i, layer in enumerate(self.layers):
            cache = None if caches is None else caches[i]
            x, kv = layer(x, memory[i], cache)
            kept.append(kv)
        return self.classifier(self.norm(x)), kept

    def forward(self, images, targets, chars_under=None):
        """Teacher forcing. targets (B, T): a word's classes, end, then padding; chars_under
        (B, N): the class of the character under each patch, padding where it is not known
        -> loss, its terms, logits (B, T, V)."""
        tokens, memory = self.encode(images)
        start = torch.full_like(targets[:, :1], self.start)
        logits, _ = self.step(torch.cat([start, targets[:, :-1]], dim=1), memory)   # (B, T, V)

        nats = self.cross_entropy(logits, targets)                  # (B, T), 0 where padding
        # nats a word, as in LMIM: no word weighs on another
        terms = {"read": nats.sum() / images.shape[0]}
        if chars_under is not None:
            nats = self.cross_entropy(self.char_head(tokens), chars_under)          # (B, N)
            known = (chars_under != self.pad).sum(1).clamp(min=1)
            terms["spell"] = self.spell * (nats.sum(1) / known).mean()
        return sum(terms.values()), terms, logits

    def cross_entropy(self, logits, targets):
        """logits (B, T, V), targets (B, T) -> nats (B, T), in float32; 0 where the target
        is padding."""
        logits = logits.float().transpose(1, 2)                 # (B, V, T), as torch wants them
        return F.cross_entropy(logits, targets, ignore_index=self.pad, reduction="none")

    @torch.no_grad()
    def decode(self, images):
        """Greedy reading. images (B, 3, H, W) in [-1, 1] -> ids (B, T), probs (B, T) of the
        classes chosen. A word that has ended goes on with `end` at probability 1; T is the
        longest of the batch."""
        _, memory = self.encode(images)
        B, device = images.shape[0], images.device
        last = torch.full((B,), self.start, device=device)
        going = torch.ones(B, dtype=torch.bool, device=device)
        caches = [kv[:, :, :, :0] for kv in memory]                 # empty: (2, B, heads, 0, d)
        all_ids, all_probs = [], []
        for t in range(self.max_length + 1):
            logits, caches = self.step(last[:, None], memory, caches)
            logits = logits[:, -1].float()                              # (B, V)
            logits[:, self.pad:] = -math.inf                # padding and unknown are never read
            probabilities = logits.softmax(-1)
            if t == self.max_length:
                probabilities[:, :self.end] = -1                    # the longest word ends here
            probs, last = probabilities.max(-1)                         # (B,)
            all_ids.append(last.where(going, self.end))
            all_probs.append(probs.where(going, 1.0))
            going = going & (last != self.end)
            if not going.any():
                break
        return torch.stack(all_ids, dim=1), torch.stack(all_probs, dim=1)

    @torch.inference_mode()
    def read(self, images, batch_size=128, dtype=torch.float32):
        """uint8, or float in [0, 1], (B, 3, 32, 128) -> [(text, confidence)], the product
        of the probabilities of its characters, end included. In float32 a reading does not
        depend on its batch; half precision gives no such promise."""
        device, words = self.pos.device, []
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            for batch in images.split(batch_size):
                ids, probs = self.decode(normalize_pixels(to_device(batch, device)))
                confidences = probs.cpu().double().prod(dim=1).tolist()
                for row, confidence in zip(ids.tolist(), confidences):
                    text = "".join(self.charset[i] for i in row if i != self.end)
                    words.append((text, confidence))
        return words
