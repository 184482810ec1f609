"""The networks against plain code: an independent ViT and decoder, a boolean mask, hand-made
cases, and what must not leak.

Each test says in its docstring which mistake it catches."""
import argparse
import contextlib
import copy
import math
import pathlib
import pickle
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._dynamo.utils import counters

import bench
import data
import finetune
import model
import pretrain
from common import UserError, to_unit
from model import METHODS, MODELS, Decoder, Pretrainer, Recognizer, ViT, take

CHARS = "0123456789abcdefghijklmnopqrstuvwxyz"
TWO_SCALES = ((8, 32), (16, 64))
THREE_SCALES = ((8, 32), (16, 64), (24, 96))

# rows of METHODS and of the ablations that --set makes of them
ROWS = {
    **METHODS,
    "mnsp without a guide": dict(METHODS["mnsp"], guide="none"),
    "mnsp aligned by MSE": dict(METHODS["mnsp"], form="mse"),
    "mim with a coarse guide": dict(METHODS["mim"], guide="coarse"),
}
WITH_MIM = [name for name in ROWS if ROWS[name]["mim"]]
WITH_NSP = [name for name in ROWS if ROWS[name]["nsp"]]
WITH_ALIGN = [name for name in ROWS if ROWS[name]["align"]]


def hide(n, grid, ratio=0.8, kind="random", seed=0):
    """ids_keep, ids_mask of n crops in 4 x 4 patches, as pretrain.py draws them."""
    args = SimpleNamespace(mask=kind, seed=seed)
    numbers = pretrain.draw_numbers(0, n, METHODS["mim"], args, grid)
    return pretrain.make_mask(numbers["mask"], kind, ratio, grid, (4, 4))


def views_for(method, scales, n):
    """Views of noise for a row of METHODS, as pretrain.make_views makes them: mim's guide, or None,
    and a list of nsp's."""
    view = torch.rand(n, 3, 32, 128) * 2 - 1
    guide, coarse = None, []
    if method["nsp"]:
        coarse = [F.adaptive_avg_pool2d(view, size) for size in scales]
    if method["guide"] == "full":
        guide = -view
    if method["guide"] == "coarse":
        guide = F.adaptive_avg_pool2d(-view, scales[-1])
    return guide, coarse


def batch(name="mnsp", n=4, scales=((16, 64),), teacher=None, seed=0):
    """A Pretrainer of a row of ROWS, or of such a row, and its five inputs, from a fixed seed."""
    method = ROWS[name] if isinstance(name, str) else name
    torch.manual_seed(seed)
    m = Pretrainer(method, "vit_square", scales, teacher)
    image = torch.rand(n, 3, 32, 128) * 2 - 1
    guide, coarse = views_for(method, scales, n)
    ids_keep, ids_mask = hide(n, m.encoder.grid, seed=seed)
    return m, image, guide, coarse, ids_keep, ids_mask


def move_weights(module, by=0.1):
    """Away from the zeros and ones that they start at, which would hide a bias left out."""
    for parameter in module.parameters():
        parameter.data += by * torch.randn_like(parameter)


def assert_same_gradients(got, expected, inputs):
    """Equal numbers may hide a detach: then what they were made of learns otherwise, or nothing."""
    inputs = list(inputs)
    weights = torch.randn(got.shape, generator=torch.Generator().manual_seed(0))
    found = torch.autograd.grad((got * weights).sum(), inputs, retain_graph=True)
    wanted = torch.autograd.grad((expected * weights).sum(), inputs, retain_graph=True)
    for grad, other in zip(found, wanted):
        torch.testing.assert_close(grad, other, rtol=0, atol=1e-4 * other.abs().max().item() + 1e-7)


def head_outputs(m):
    """-> a list to which every forward pass adds what the decoder's head puts out, in order."""
    outputs = []
    m.decoder.pred.register_forward_hook(lambda _, inputs, output: outputs.append(output))
    return outputs


# ---- an independent implementation, with loops where the product has reshapes

def plain_attention(q, k, v, heads, causal=False):
    out = torch.zeros_like(q)
    d = q.shape[-1] // heads
    for i in range(heads):
        s = slice(i * d, (i + 1) * d)
        scores = q[..., s] @ k[..., s].transpose(1, 2) / math.sqrt(d)
        if causal:
            future = torch.ones(scores.shape[-2:]).triu(1).bool()
            scores = scores.masked_fill(future, -math.inf)
        out[..., s] = torch.exp(scores - scores.logsumexp(-1, keepdim=True)) @ v[..., s]
    return out


def plain_norm(x, norm):
    mean = x.mean(-1, keepdim=True)
    variance = x.var(-1, unbiased=False, keepdim=True)
    return (x - mean) / (variance + norm.eps).sqrt() * norm.weight + norm.bias


def plain_linear(x, layer):
    out = x @ layer.weight.T
    if layer.bias is not None:
        out = out + layer.bias
    return out


def plain_mlp(x, mlp):
    hidden = plain_linear(x, mlp.fc1)
    gelu = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    return plain_linear(gelu, mlp.fc2)


def plain_patch_embed(images, proj):
    p, q = proj.kernel_size
    tokens = []
    for y in range(0, images.shape[2], p):
        for x in range(0, images.shape[3], q):
            patch = images[:, None, :, y:y + p, x:x + q]                # (B, 1, 3, p, q)
            tokens.append((proj.weight * patch).sum((2, 3, 4)) + proj.bias)
    return torch.stack(tokens, dim=1)


def plain_vit(vit, images, keep=None):
    tokens = plain_patch_embed(images, vit.patch_embed.proj) + vit.pos_embed[:, 1:]
    if keep is not None:
        tokens = torch.stack([crop[row] for crop, row in zip(tokens, keep)])
    cls = vit.cls_token.expand(len(images), 1, -1) + vit.pos_embed[:, :1]
    x = torch.cat([cls, tokens], dim=1)
    for block in vit.blocks:
        q, k, v = plain_linear(plain_norm(x, block.norm1), block.attn.qkv).chunk(3, dim=-1)
        x = x + plain_linear(plain_attention(q, k, v, block.attn.heads), block.attn.proj)
        x = x + plain_mlp(plain_norm(x, block.norm2), block.mlp)
    return plain_norm(x, vit.norm)


def plain_cross(attention, x, y, causal=False):
    q = plain_linear(x, attention.q)
    k, v = plain_linear(y, attention.kv).chunk(2, dim=-1)
    return plain_linear(plain_attention(q, k, v, attention.heads, causal), attention.proj)


def plain_decoder_layers(decoder, x, memory=None):
    """Every token through every layer, post-norm, and the head on all of them."""
    if memory is not None:
        memory = plain_linear(memory, decoder.embed_memory)
    for layer in decoder.layers:
        x = plain_norm(x + plain_cross(layer.self_attn, x, x), layer.norm1)
        if memory is not None:
            x = plain_norm(x + plain_cross(layer.cross_attn, x, memory), layer.norm2)
        x = plain_norm(x + plain_mlp(x, layer.mlp), layer.norm3)
    return plain_linear(plain_norm(x, decoder.norm), decoder.pred)


def plain_target(image, patch):
    """MAE's normalised pixels, a mean for each channel of a patch: (B, N, 3*p*q)."""
    p, q = patch
    tokens = []
    for y in range(0, image.shape[2], p):
        for x in range(0, image.shape[3], q):
            pixels = image[:, :, y:y + p, x:x + q]
            centred = pixels - pixels.mean((2, 3), keepdim=True)
            variance = centred.square().mean((1, 2, 3), keepdim=True)
            tokens.append((centred / (variance + 1e-3).sqrt()).flatten(1))
    return torch.stack(tokens, dim=1)


@pytest.mark.parametrize("size, patch", [
    ((32, 128), (4, 4)),                                                # a grid of 8 x 32
    ((16, 64), (4, 4)),                                                 # 4 x 16
    ((12, 40), (4, 8)),                                                 # 3 x 5
])
def test_vit_equals_plain_vit(size, patch):
    """A slip in the reshapes of heads, patches or grids: rows and columns swapped, heads mixed,
    a square grid assumed."""
    torch.manual_seed(0)
    vit = ViT(2, 48, 3, patch, size).eval()
    move_weights(vit)
    images = torch.randn(3, 3, *size)
    keep = torch.rand(3, math.prod(vit.grid)).argsort(1)[:, :7]
    with torch.no_grad():
        torch.testing.assert_close(vit(images), plain_vit(vit, images), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(vit(images, keep), plain_vit(vit, images, keep), atol=1e-5, rtol=1e-5)
    # with gradients too, where attention may take another way
    torch.testing.assert_close(vit(images), plain_vit(vit, images), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("grid", [(8, 32), (4, 16), (3, 5)])
@pytest.mark.parametrize("cross", [True, False])
def test_masked_prediction_equals_a_plain_decoder(grid, cross):
    """Memory mixed with queries, a norm in the wrong place, hidden tokens not last, places of the
    wrong patches, the second view's tokens left out, or tokens that are detached."""
    torch.manual_seed(0)
    decoder = Decoder(24, 10, [grid], 2, 48, 3, 96, dropout=0.0, cross=cross)
    move_weights(decoder)
    ids_keep, ids_mask = hide(2, grid, 0.7)
    seen = torch.randn(2, 1 + ids_keep.shape[1], 24)
    others = [torch.randn(2, 6, 24), torch.randn(2, 4, 24)] if cross else []
    for tokens in (seen, *others):
        tokens.requires_grad_()
    got = decoder.predict_hidden(others, seen, ids_keep, ids_mask)

    # the plain way keeps every patch at its place, and picks the hidden ones at the end
    embedded = plain_linear(seen, decoder.embed)
    x = decoder.mask_token.expand(2, math.prod(grid), -1).clone()
    for b in range(2):
        x[b, ids_keep[b]] = embedded[b, 1:]
    places = model.sincos_2d(48, grid, grid)
    x = torch.cat([embedded[:, :1], x + places], dim=1)
    out = plain_decoder_layers(decoder, x, torch.cat(others, dim=1) if cross else None)
    expected = torch.stack([out[b, 1 + ids_mask[b]] for b in range(2)])
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    assert_same_gradients(got, expected, [seen, *others, *decoder.parameters()])


@pytest.mark.parametrize("scale", [0, 1])
def test_prediction_of_a_scale_equals_a_plain_decoder(scale):
    """Places of another scale, or not in units of the fine grid; a scale's patches counted wrong;
    the last layer's queries cut off."""
    torch.manual_seed(0)
    grids = [(2, 6), (4, 12)]
    decoder = Decoder(24, 10, grids, 2, 48, 3, 96, dropout=0.0, visible=False)
    move_weights(decoder)
    others = [torch.randn(2, 6, 24), torch.randn(2, 13, 24)]
    got = decoder.predict_all(others, scale)
    places = model.sincos_2d(48, grids[scale], (4, 12))
    x = (decoder.mask_token + places).expand(2, -1, -1)
    expected = plain_decoder_layers(decoder, x, torch.cat(others, dim=1))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_encoding_does_not_depend_on_the_batch():
    """Statistics over the batch (a batch norm, a mean over the wrong axis) where there must be
    none."""
    torch.manual_seed(0)
    vit, images = ViT(2, 48, 3).eval(), torch.randn(5, 3, 32, 128)
    with torch.no_grad():
        alone, among_others = vit(images[2:3]), vit(images)[2:3]
    torch.testing.assert_close(among_others, alone, atol=1e-5, rtol=1e-4)


def test_first_weights():
    """A token that starts at 0, a bias or a norm that does not start at 0 or 1, the patches'
    projection drawn as a convolution's and not as a matrix's (MAE)."""
    torch.manual_seed(0)
    vit = ViT(2, 192, 3, (4, 8), scales=TWO_SCALES)
    for name, parameter in vit.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        elif name in ("cls_token", "scale_embed"):
            assert 0.015 < parameter.std() < 0.025, name
        elif parameter.requires_grad:
            rows, columns = parameter.flatten(1).shape
            limit = math.sqrt(6 / (rows + columns))
            assert 0.98 * limit < parameter.abs().max() <= limit, name


def test_first_weights_of_the_decoder():
    """A mask token drawn as a matrix, and as large as one: it would drown the codes of places."""
    torch.manual_seed(0)
    decoder = Decoder(48, 10, [(4, 16)], 1, 192, 3, 96)
    assert 0.015 < decoder.mask_token.std() < 0.025
    for layer in (decoder.embed, decoder.embed_memory, decoder.layers[0].cross_attn.q, decoder.pred):
        limit = math.sqrt(6 / sum(layer.weight.shape))
        assert 0.98 * limit < layer.weight.abs().max() <= limit
        assert (layer.bias == 0).all()


def test_first_weights_of_a_recognizer():
    """Letters drawn from another spread, layers that start as torch starts them, characters that are counted
    from 1, classes in another order than in the weights that ship."""
    torch.manual_seed(0)
    m = Recognizer(ViT(1, 48, 3, (8, 8)), CHARS, 6, 1, 96, 3, 192)
    assert (m.end, m.pad, m.unknown, m.start) == (36, 37, 38, 39)
    assert m.embed.weight.std().item() == pytest.approx(96 ** -0.5, rel=0.05)
    for layer in (m.proj[0], m.layers[0].mlp.fc1, m.layers[0].cross_attn.kv, m.classifier):
        limit = math.sqrt(6 / sum(layer.weight.shape))
        assert 0.98 * limit < layer.weight.abs().max() <= limit
        assert layer.bias is None or (layer.bias == 0).all()
    sines = torch.tensor([0, 1, 2, 3, 4, 5, 6.0]).sin()
    torch.testing.assert_close(m.pos[0, :, 0], sines)


def test_norms_add_as_little_as_maes():
    """torch's own 1e-5 under the root of a norm: MAE's and LMIM's weights were trained with 1e-6."""
    config = MODELS["vit_square"]
    recognizer = Recognizer(ViT(**config["encoder"]), CHARS, **config["reader"])
    for part in (recognizer.encoder, recognizer.layers, recognizer.norm, Pretrainer("mnsp", "vit_square")):
        norms = [module for module in part.modules() if isinstance(module, torch.nn.LayerNorm)]
        assert {norm.eps for norm in norms} == {1e-6}


# ---- dropout

@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_of_attention(rate):
    """A share that is not `rate`, a mean that is not kept, the same mask twice, dropout of the
    scores before their softmax."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, 3, 40, 16)
    identity = torch.eye(40).expand(4, 3, 40, 40)           # so that what comes out is the weights
    weights = model.attend(q, k, identity)
    one = model.attend(q, k, identity, rate)
    two = model.attend(q, k, identity, rate)
    kept = one != 0
    torch.testing.assert_close(one[kept], weights[kept] / (1 - rate))
    assert abs(1 - kept.double().mean() - rate) < 0.01
    assert (kept != (two != 0)).any()


class OnGpu(torch.Tensor):
    """A tensor of the CPU that says it is a GPU's, so that attention takes the fused kernel."""
    is_cuda = True


@pytest.mark.parametrize("causal", [False, True])
def test_attention_of_a_gpu_is_the_same(causal):
    """A GPU on which letters see the next one, scores have another scale, or nothing is dropped."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 5, 16)
    gpu = model.attend(q.as_subclass(OnGpu), k, v, causal=causal)
    torch.testing.assert_close(gpu.as_subclass(torch.Tensor), model.attend(q, k, v, causal=causal))
    identity = torch.eye(5).expand(2, 3, 5, 5)              # so that what comes out is the weights
    dropped = model.attend(q.as_subclass(OnGpu), k, identity, dropout=0.5)
    assert 0.3 < (dropped == 0).float().mean() < 0.7


def layers(rate):
    """-> {name: (layer, it as a function of x (B, T, 48), what it gives if its branches are 0)}."""
    memory = torch.randn(2, 7, 48)
    block = model.Block(48, 3, dropout=rate)
    decoder = model.DecoderLayer(48, 3, 96, dropout=rate)
    reader = model.ReaderLayer(48, 3, 96, dropout=rate)
    for layer in (block, decoder, reader):
        move_weights(layer)
    keys_values = reader.cross_attn.keys_values(memory)

    def block_without_branches(x):
        return x + block.mlp.fc2.bias           # as in timm the FFN's dropout comes before fc2

    def decoder_without_branches(x):
        return decoder.norm3(decoder.norm2(decoder.norm1(x)))

    return {
        "block": (block, block, block_without_branches),
        "decoder": (decoder, lambda x: decoder(x, memory, x.shape[1]), decoder_without_branches),
        "reader": (reader, lambda x: reader(x, keys_values, None)[0], lambda x: x),
    }


@pytest.mark.parametrize("name", ["block", "decoder", "reader"])
def test_every_branch_has_its_dropout(name):
    """A branch without dropout, or a flag `training` the wrong way round: at a rate of 1 a layer
    gives back what would come out if every branch were 0."""
    torch.manual_seed(0)
    layer, call, without_branches = layers(1.0)[name]
    x = torch.randn(2, 5, 48)
    torch.testing.assert_close(call(x), without_branches(x))
    if name != "block":
        layer.mlp.dropout = 0.0                 # and that behind the FFN alone
        torch.testing.assert_close(call(x), without_branches(x))
    layer.eval()
    assert (call(x) - without_branches(x)).abs().mean() > 0.1


def test_dropout_inside_the_ffn():
    """An FFN that drops none of its hidden numbers, or all of them when it should drop none."""
    torch.manual_seed(0)
    mlp, x = model.Mlp(48, 96, dropout=1.0), torch.randn(2, 5, 48)
    torch.testing.assert_close(mlp(x), mlp.fc2.bias.expand(2, 5, -1))
    torch.testing.assert_close(mlp.eval()(x), plain_mlp(x, mlp))


def test_dropout_of_letters_embeddings():
    """Letters whose embeddings are never dropped: with all of them dropped, no letter changes what follows."""
    torch.manual_seed(0)
    m = Recognizer(ViT(1, 48, 3, (8, 8)), CHARS, 6, 1, 48, 3, 96)
    m.dropout = 1.0                                         # of embeddings alone
    _, crop_kvs = m.encode(torch.randn(1, 3, 32, 128))
    one, other = torch.tensor([[1, 2]]), torch.tensor([[3, 4]])
    assert torch.equal(m.logits_after(one, crop_kvs)[0], m.logits_after(other, crop_kvs)[0])
    m.eval()
    assert not torch.equal(m.logits_after(one, crop_kvs)[0], m.logits_after(other, crop_kvs)[0])


@pytest.mark.parametrize("name, calls", [("block", 1), ("decoder", 2), ("reader", 2)])
def test_attention_is_told_its_dropout(name, calls, monkeypatch):
    """Attention's weights that are never dropped, or also when words are read."""
    told = []
    attend = model.attend

    def spy(q, k, v, dropout=0.0, causal=False):
        told.append(dropout)
        return attend(q, k, v, dropout, causal)

    monkeypatch.setattr(model, "attend", spy)
    layer, call, _ = layers(0.3)[name]
    call(torch.randn(2, 5, 48))
    layer.eval()
    call(torch.randn(2, 5, 48))
    assert told == [0.3] * calls + [0.0] * calls


def test_drop_path():
    """A share of crops that is not the rate, rows of a crop dropped one by one, a mean that is not
    kept, every block at the same rate. A rate that is stored as if it were a weight: the checkpoint would fit
    no network without it, such as the one that reads."""
    torch.manual_seed(0)
    vit = ViT(5, 48, 3, drop_path=0.4)
    assert vit.state_dict().keys() == ViT(5, 48, 3).state_dict().keys()
    assert vit.blocks[0].keep_path is None
    assert [float(block.keep_path) for block in vit.blocks[1:]] == pytest.approx([0.9, 0.8, 0.7, 0.6])
    skipped = vit.blocks[-1].leave_out_some(torch.ones(4000, 3, 2))
    each_crop = skipped[:, 0, 0]
    assert torch.equal(skipped, each_crop[:, None, None].expand(-1, 3, 2))
    assert abs((each_crop == 0).double().mean() - 0.4) < 0.03
    torch.testing.assert_close(each_crop.unique(), torch.tensor([0, 1 / 0.6]))
    assert torch.equal(vit.eval().blocks[-1].leave_out_some(torch.ones(9, 3, 2)), torch.ones(9, 3, 2))

    block, x = model.Block(48, 3, drop_path=1 - 1e-6), torch.randn(2, 5, 48)
    assert torch.equal(block(x), x)             # both branches are skipped
    assert not torch.equal(block.eval()(x), x)


@pytest.mark.parametrize("part", ["encoder", "mim", "nsp", "reading"])
def test_no_dropout_in_eval_mode(part):
    """Dropout that stays on when words are read, validated or drawn: of attention, of the FFN, of
    embeddings, or a path that is skipped. Twice the same, and the same as without."""
    def outputs(dropout):
        torch.manual_seed(0)
        images = torch.rand(3, 3, 32, 128) * 2 - 1
        encoder = ViT(2, 48, 3, (8, 8), dropout=dropout, drop_path=dropout)
        recognizer = Recognizer(encoder, CHARS, 6, 2, 48, 3, 96, dropout).eval()
        decoder = Decoder(48, 10, [(4, 16)], 2, 48, 3, 96, dropout).eval()
        tokens = torch.randn(3, 14, 48)
        ids_keep, ids_mask = hide(3, (4, 16))
        torch.seed()                # other numbers each time, for a dropout that is on
        if part == "encoder":
            return [encoder(images)]
        if part == "mim":
            return [decoder.predict_hidden([tokens], tokens, ids_keep, ids_mask)]
        if part == "nsp":
            return [decoder.predict_all([tokens], 0)]
        return [*recognizer.decode(images), recognizer(images, torch.zeros(3, 5, dtype=torch.long))[2]]

    with torch.no_grad():
        once, twice, without = outputs(0.5), outputs(0.5), outputs(0.0)
    for a, b, c in zip(once, twice, without):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


# ---- pixels, patches and places

def test_pixels_are_normalised():
    """Bytes taken for numbers in [0, 1], or the other way round; another range than [-1, 1]. Floats of 0 to 255,
    which would be noise to every network. Floats a little beyond 1, refused."""
    levels = torch.tensor([0, 51, 255], dtype=torch.uint8)
    expected = torch.tensor([-1, -0.6, 1])
    torch.testing.assert_close(model.normalize_pixels(levels), expected)
    torch.testing.assert_close(model.normalize_pixels(levels / 255), expected)
    with pytest.raises(UserError, match="images from 0 to 255; expected uint8, or float in"):
        model.normalize_pixels(levels.float())
    beyond = torch.tensor([-0.01, 1.01])
    torch.testing.assert_close(model.normalize_pixels(beyond), beyond * 2 - 1)      # which rounding may do


def test_unpatchify_is_the_inverse():
    """Pictures whose patches stand elsewhere than the model's: rows and columns swapped."""
    images = torch.randn(2, 3, 12, 40)
    patches = model.patchify(images, (4, 8))
    assert torch.equal(patches[:, 6], images[:, :, 4:8, 8:16].flatten(1))   # row 1, column 1 of 3 x 5
    assert torch.equal(model.unpatchify(patches, (3, 5), (4, 8)), images)


def test_position_embedding_by_hand():
    """The order of x and y, of sine and cosine, or the frequencies: MAE's files would load and
    mean something else."""
    places = model.sincos_2d(8, (3, 5), (3, 5)).view(3, 5, 8)
    y, x = 2.0, 4.0
    expected = [math.sin(x), math.sin(x / 100), math.cos(x), math.cos(x / 100),
                math.sin(y), math.sin(y / 100), math.cos(y), math.cos(y / 100)]
    torch.testing.assert_close(places[2, 4], torch.tensor(expected))


def test_coarse_places_lie_between_the_fine_ones_they_cover():
    """Coarse patches counted 0, 1, 2 instead of placed in the image: scales would disagree on
    where things are."""
    coarse = model.sincos_2d(8, (1, 4), (1, 8))
    fine = model.sincos_2d(8, (1, 8), (1, 8))
    torch.testing.assert_close(coarse[1, :2], torch.tensor([math.sin(2.5), math.sin(2.5 / 100)]))
    torch.testing.assert_close(fine[2, :2], torch.tensor([math.sin(2.0), math.sin(2.0 / 100)]))


def test_each_scale_has_its_own_places_and_embedding():
    """A coarse view that gets the places or the learned offset of another scale, or the fine
    scale an offset."""
    torch.manual_seed(0)
    vit = ViT(1, 48, 3, scales=TWO_SCALES)
    tokens = torch.zeros(1, 1, 48)
    for i, (scale, grid) in enumerate(zip(TWO_SCALES, [(2, 8), (4, 16)])):
        expected = model.sincos_2d(48, grid, (8, 32)) + vit.scale_embed[i]
        torch.testing.assert_close(vit.add_codes(tokens, scale)[0], expected)
    torch.testing.assert_close(vit.add_codes(tokens, (32, 128))[0], model.sincos_2d(48, (8, 32), (8, 32)))


def test_sizes_of_views():
    """A coarse guide of the coarsest scale, a coarse view for a method that has none, a view that is lower
    than a patch."""
    both = [(8, 32), (16, 64)]
    for name, sizes in dict(mim=[], lmim=[], nsp=both, mnsp=both).items():
        assert model.coarse_sizes(METHODS[name], TWO_SCALES) == sizes
    assert model.coarse_sizes(ROWS["mim with a coarse guide"], TWO_SCALES) == [(16, 64)]
    assert [model.half_size(patch) for patch in ((4, 4), (16, 8), (32, 4))] == [(16, 64), (16, 64), (32, 64)]


# ---- masks

@pytest.mark.parametrize("ratio, N, kept", [
    (0.8, 256, 51), (0.6, 256, 102), (0.9, 64, 6), (0.999, 64, 1), (0.001, 64, 63), (0.5, 2, 1),
])
def test_mask_counts(ratio, N, kept):
    """Off by one, or an empty side: a loss of 0/0."""
    keep, hidden = hide(3, (1, N), ratio)
    assert keep.shape == (3, kept) and hidden.shape == (3, N - kept)
    for a, b in zip(keep, hidden):
        assert sorted(a.tolist() + b.tolist()) == list(range(N))


def mask_of(n, kind):
    """-> (n, 8, 32), True where hidden."""
    _, hidden = hide(n, (8, 32), 0.6, kind)
    return torch.zeros(n, 256, dtype=torch.bool).scatter(1, hidden, True).view(n, 8, 32)


def test_block_mask_hides_blocks():
    """Block noise that is no more than random noise: a hidden patch's right neighbour would be
    hidden no oftener than the ratio."""
    shares = {}
    for kind in ("random", "block"):
        mask = mask_of(200, kind)
        assert (mask.flatten(1).sum(1) == 154).all()
        both = mask[:, :, 1:] & mask[:, :, :-1]
        shares[kind] = both.sum() / mask[:, :, :-1].sum()
    assert abs(shares["random"] - 0.6) < 0.02
    assert shares["block"] > 0.85


def test_block_mask_hides_every_patch_as_often():
    """The corner from which blocks are laid drawn with a block's own noise: its first patches are
    seen too often, or never."""
    often = mask_of(4000, "block").float().mean(0)
    assert (often - 0.6).abs().max() < 0.06


def test_blocks_are_laid_from_a_corner_drawn_anew():
    """Blocks that always begin at the crop's corner, on one axis or both: then only some neighbours
    are ever told apart."""
    mask = mask_of(4000, "block")
    rows_differ = (mask[:, 1:] != mask[:, :-1]).float().mean((0, 2))            # (7,)
    columns_differ = (mask[:, :, 1:] != mask[:, :, :-1]).float().mean((0, 1))   # (31,)
    for differ in (rows_differ, columns_differ):
        assert differ.max() < 1.25 * differ.min(), differ

    numbers = torch.rand(500, 2 + 8 * 32, generator=torch.Generator().manual_seed(0))
    keys = pretrain.block_keys(numbers, (8, 32), (4, 4)).view(500, 8, 32)
    first_row = ((keys[:, 1:, 0] - keys[:, :-1, 0]).abs() > 1e-4).float().argmax(1)         # where a block ends
    first_column = ((keys[:, 0, 1:] - keys[:, 0, :-1]).abs() > 1e-4).float().argmax(1)
    corners = set(zip(first_row.tolist(), first_column.tolist()))
    assert len(corners) == 16, "both axes are moved by one number"


def test_block_mask_hides_whole_blocks():
    """Blocks of another size than 16 x 16 pixels, of one size for each axis, or hidden in part: in
    each mask there is a corner from which all blocks but one are hidden or seen as a whole."""
    for mask in mask_of(20, "block").float():
        fewest = min(torn_blocks(mask, y, x) for y in range(4) for x in range(4))
        assert fewest <= 1


def test_no_two_blocks_have_one_number():
    """Blocks counted as if none were cut off at the left: the last of a row and the first of the next would
    always be hidden together. Here they begin with patch 31 of the first row and patch 0 of the second."""
    numbers = torch.rand(50, 2 + 8 * 32, generator=torch.Generator().manual_seed(0))
    numbers[:, :2] = 0.99                                   # moved as far as can be
    keys = pretrain.block_keys(numbers, (8, 32), (4, 4)).view(50, 8, 32)
    assert ((keys[:, 0, 31] - keys[:, 1, 0]).abs() > 1e-4).float().mean() > 0.9


def torn_blocks(mask, y, x, block=4):
    """How many blocks of 4 x 4 patches, the first one cut off by (y, x), are hidden in part."""
    padded = F.pad(mask[None], (x, -(32 + x) % block, y, -(8 + y) % block), value=-1)[0]
    blocks = padded.unfold(0, block, block).unfold(1, block, block).flatten(2).flatten(0, 1)
    torn = 0
    for patches in blocks:
        inside = patches[patches >= 0]
        torn += len(inside.unique()) > 1
    return torn


# ---- the loss path

def test_gathered_loss_equals_boolean_mask():
    """Gathering the wrong rows, a mean over the wrong count, or gradients to visible patches."""
    torch.manual_seed(0)
    pred = torch.randn(3, 20, 7, requires_grad=True)
    target = torch.randn(3, 20, 7, requires_grad=True)
    _, hidden = hide(3, (4, 5))
    mask = torch.zeros(3, 20, dtype=torch.bool).scatter(1, hidden, True)
    gathered = model.mse(take(pred, hidden), take(target, hidden))
    plain = (pred - target)[mask].square().mean()
    torch.testing.assert_close(gathered, plain)
    grads = torch.autograd.grad(gathered, (pred, target))
    for grad, expected in zip(grads, torch.autograd.grad(plain, (pred, target))):
        torch.testing.assert_close(grad, expected)
        assert (grad[~mask] == 0).all()


def test_masked_loss_is_the_mean_over_hidden_patches():
    """The model's own loss against its own prediction, patch by patch: a target of the wrong
    patches or of the wrong view, the method's weight left out."""
    m, image, guide, coarse, ids_keep, ids_mask = batch(dict(METHODS["mim"], mim=3.0))
    _, terms, pred = m(image, guide, coarse, ids_keep, ids_mask)
    target = plain_target(image, m.encoder.patch)
    errors = []
    for b in range(len(image)):
        for j, i in enumerate(ids_mask[b].tolist()):
            errors.append((pred["mim"][b, j] - target[b, i]).square().mean())
    torch.testing.assert_close(terms["mim"], 3 * torch.stack(errors).mean())


def test_next_scale_loss_is_the_mean_over_scales():
    """A scale that is compared with another's target or with the view instead of the crop, a scale
    that counts by its patches, the method's weight left out."""
    m, image, guide, coarse, ids_keep, ids_mask = batch(dict(METHODS["nsp"], nsp=3.0), scales=TWO_SCALES)
    predictions = head_outputs(m)
    _, terms, pred = m(image, guide, coarse, ids_keep, ids_mask)
    half = image.unflatten(3, (64, 2)).unflatten(2, (16, 2)).mean((3, 5))       # 16 x 64
    errors = []
    for got, scale in zip(predictions, (half, image)):
        errors.append((got - plain_target(scale, m.encoder.patch)).square().mean())
    assert len(errors) == 2
    assert pred["nsp"] is predictions[-1]
    torch.testing.assert_close(terms["nsp"], 3 * (errors[0] + errors[1]) / 2)


def test_teacher_gets_no_gradient_and_is_not_saved():
    """A teacher that moves with the student, or that doubles every checkpoint."""
    torch.manual_seed(0)
    teacher = ViT(**MODELS["vit_square"]["encoder"], dropout=0.5)
    m, image, guide, coarse, ids_keep, ids_mask = batch("lmim", teacher=teacher)
    m.train()
    loss, _, pred = m(image, guide, coarse, ids_keep, ids_mask)
    loss.backward()
    assert pred["mim"].shape[-1] == teacher.width
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not any("teacher" in name for name in m.state_dict())
    theirs = {id(parameter) for parameter in teacher.parameters()}
    for name, parameter in m.named_parameters():
        assert id(parameter) not in theirs, name
        assert parameter.grad is not None or not parameter.requires_grad, name


@pytest.mark.parametrize("name", METHODS)
def test_teacher_of_another_patch_lies_over_the_same_places(name):
    """A teacher's first 64 of 256 tokens taken as if they were the student's 64 patches; a scale's target
    that is made of a coarser scale's."""
    teacher = ViT(1, 64, 1, (4, 4)).eval()
    m, image, *_ = batch(name, scales=TWO_SCALES, teacher=teacher)
    tokens = teacher(image)[:, 1:]                                      # 8 x 32
    grids = [(2, 8), (4, 16)] if m.method["nsp"] else [(4, 16)]
    targets = m.targets(image)
    assert len(targets) == len(grids)
    for target, (h, w) in zip(targets, grids):
        mean = tokens.view(4, h, 8 // h, w, 32 // w, 64).mean((2, 4)).flatten(1, 2)
        torch.testing.assert_close(target, F.layer_norm(mean, (64,)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ROWS)
def test_every_method_trains_every_parameter(name):
    """A parameter that no loss reaches makes DDP hang; a term that is weighed twice or not at
    all."""
    m, *inputs = batch(name)
    loss, terms, _ = m(*inputs)
    loss.backward()
    idle = [n for n, p in m.named_parameters() if p.requires_grad and p.grad is None]
    assert idle == []
    assert set(terms) == {"spread"} | {term for term in ("mim", "nsp", "align") if ROWS[name][term]}
    torch.testing.assert_close(loss, sum(terms[term] for term in terms if term != "spread"))


# ---- what must not leak

def noise_on(view):
    """The same view with noise, or None."""
    if view is None:
        return None
    return view + 0.5 * torch.randn_like(view)


@pytest.mark.parametrize("name", WITH_NSP)
@pytest.mark.parametrize("scales", [((16, 64),), TWO_SCALES])
def test_nsp_sees_its_own_views_alone(name, scales):
    """Anything of the crop in NSP's decoder, such as the tokens of the masked crop in mnsp, or mim's
    guide: its loss would fall and nothing would be learned."""
    m, image, guide, coarse, ids_keep, ids_mask = batch(name, scales=scales)
    m.eval()
    with torch.no_grad():
        loss, _, pred = m(image, guide, coarse, ids_keep, ids_mask)
        other_loss, _, other_crop = m(torch.randn_like(image), guide, coarse, ids_keep, ids_mask)
        _, _, other_guide = m(image, noise_on(guide), coarse, ids_keep, ids_mask)
        _, _, other_views = m(image, guide, [noise_on(view) for view in coarse], ids_keep, ids_mask)
    assert torch.equal(other_crop["nsp"], pred["nsp"])
    assert torch.equal(other_guide["nsp"], pred["nsp"])
    assert not torch.allclose(other_views["nsp"], pred["nsp"])
    assert other_loss != loss                                           # the crop is the target


def test_nsp_encodes_no_crop():
    """The crop encoded beside nsp's views: more work than all of them, for tokens that no term looks at."""
    m, image, guide, coarse, ids_keep, _ = batch("nsp", n=2)
    guides, views, seen = m.encode(image, guide, coarse, ids_keep)
    assert (len(guides), len(views), len(seen)) == (0, 1, 0)


@pytest.mark.parametrize("name", ["nsp", "mnsp"])
@pytest.mark.parametrize("scales", [TWO_SCALES, THREE_SCALES])
def test_a_scale_is_predicted_from_coarser_scales_alone(name, scales):
    """A scale that sees itself or a finer one, or that is not shown a coarser one: the view of
    scale i must change the predictions of the scales above i, and no other."""
    m, image, guide, coarse, ids_keep, ids_mask = batch(name, scales=scales)
    m.eval()
    predictions = head_outputs(m)

    def predict(coarse):
        """-> what is predicted of scales[1], ..., of the crop."""
        predictions.clear()
        with torch.no_grad():
            m(image, guide, coarse, ids_keep, ids_mask)
        return predictions[-len(scales):]                               # in mnsp mim's comes first

    before = predict(coarse)
    sizes = [h // 8 * (w // 8) for h, w in (*scales[1:], (32, 128))]
    assert [prediction.shape[1] for prediction in before] == sizes
    for i in range(len(scales)):
        changed = list(coarse)
        changed[i] = torch.randn_like(coarse[i])
        for k, (old, new) in enumerate(zip(before, predict(changed))):  # k: of scales[k + 1]
            assert torch.equal(old, new) == (k + 1 <= i), (i, k)


@pytest.mark.parametrize("name", WITH_MIM)
def test_mim_does_not_see_hidden_pixels(name):
    """A hidden patch that reaches the encoder, by a wrong index or by a mask applied after
    attention; visible patches that do not reach it."""
    m, image, guide, coarse, ids_keep, ids_mask = batch(name)
    m.eval()
    p, q = m.encoder.patch
    N = math.prod(m.encoder.grid)
    cover = torch.zeros(len(image), N).scatter(1, ids_mask, 1.0).view(-1, 1, *m.encoder.grid)
    cover = cover.repeat_interleave(p, 2).repeat_interleave(q, 3)       # 1 where hidden
    noise = torch.randn_like(image)
    with torch.no_grad():
        _, _, pred = m(image, guide, coarse, ids_keep, ids_mask)
        _, _, hidden_changed = m(image + cover * noise, guide, coarse, ids_keep, ids_mask)
        _, _, visible_changed = m(
            image + (1 - cover) * noise, guide, coarse, ids_keep, ids_mask)
    assert torch.equal(hidden_changed["mim"], pred["mim"])
    assert not torch.allclose(visible_changed["mim"], pred["mim"])


@pytest.mark.parametrize("name", WITH_MIM)
def test_mim_sees_its_guide_and_no_other_view(name):
    """A guide that is not looked at; nsp's views, which stay in place, shown to mim, whose guide is
    moved for a reason."""
    m, image, guide, coarse, ids_keep, ids_mask = batch(name)
    m.eval()
    with torch.no_grad():
        _, _, pred = m(image, guide, coarse, ids_keep, ids_mask)
        _, _, guide_changed = m(image, noise_on(guide), coarse, ids_keep, ids_mask)
        _, _, coarse_changed = m(image, guide, [noise_on(view) for view in coarse], ids_keep, ids_mask)
    has_guide = m.method["guide"] != "none"
    assert torch.equal(guide_changed["mim"], pred["mim"]) == (not has_guide)
    assert torch.equal(coarse_changed["mim"], pred["mim"])


@pytest.mark.parametrize("name", ROWS)
def test_every_view_learns(name, monkeypatch):
    """Tokens that are detached on their way into a decoder: the numbers stay, and the encoder learns nothing of
    that view from that prediction."""
    shallow_encoder(monkeypatch, 1)
    m, image, guide, coarse, ids_keep, ids_mask = batch(name, n=2, scales=TWO_SCALES)
    views = dict(mim=[image], nsp=coarse)
    if guide is not None:
        views["mim"].append(guide)
    for view in (*views["mim"], *coarse):
        view.requires_grad_()
    _, _, pred = m(image, guide, coarse, ids_keep, ids_mask)
    for term in pred:
        for grad in torch.autograd.grad(pred[term].square().sum(), views[term], retain_graph=True):
            assert grad.abs().max() > 0


# ---- alignment

def plain_infonce(a, b):
    """InfoNCE at temperature 0.2 by loops, both ways."""
    def cosine(x, y):
        return x @ y / x.norm() / y.norm()

    nats = []
    for x, y in ((a, b), (b, a)):
        for i in range(len(x)):
            likeness = torch.stack([cosine(x[i], y[j]) / 0.2 for j in range(len(y))])
            nats.append(-torch.log(likeness[i].exp() / likeness.exp().sum()))
    return torch.stack(nats).mean()


def plain_mse(a, b):
    return (a - b).square().mean()


@pytest.mark.parametrize("align, plain", [(model.infonce, plain_infonce), (model.mse, plain_mse)])
def test_alignment_equals_plain_code(align, plain):
    """A wrong positive, one direction counted twice, another temperature; one side without a
    gradient."""
    torch.manual_seed(0)
    a, b = torch.randn(2, 6, 8).requires_grad_().unbind(0)
    torch.testing.assert_close(align(a, b), plain(a, b))
    grads = torch.autograd.grad(align(a, b), (a, b))
    for grad, expected in zip(grads, torch.autograd.grad(plain(a, b), (a, b))):
        torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("name", WITH_ALIGN)
def test_neighbouring_views_are_aligned(name):
    """A pair left out, the whole crop's [cls] for the masked one's, another weight or form, a [cls]
    that is detached: the term and its gradient against pairs that are written out."""
    m, image, guide, coarse, ids_keep, ids_mask = batch(name)
    _, terms, _ = m(image, guide, coarse, ids_keep, ids_mask)

    views = [*coarse] if guide is None else [guide, *coarse]
    cls = [m.encoder(view)[:, 0] for view in views]
    cls.append(m.encoder(image, ids_keep)[:, 0])
    plain = {"infonce": plain_infonce, "mse": plain_mse}[m.method["form"]]
    pairs = [plain(a, b) for a, b in zip(cls, cls[1:])]
    assert len(pairs) == len(views)
    expected = m.method["align"] * sum(pairs) / len(pairs)
    torch.testing.assert_close(terms["align"], expected)
    torch.testing.assert_close(terms["spread"], model.spread(cls[-1]))      # of the masked crop

    weights = m.encoder.blocks[0].attn.qkv.weight
    grad, = torch.autograd.grad(terms["align"], weights, retain_graph=True)
    expected_grad, = torch.autograd.grad(expected, weights)
    torch.testing.assert_close(grad, expected_grad, atol=1e-6, rtol=1e-3)


# what one of two ranks does, given a file for the meeting, its rank, and where to write its
# losses and gradients. Rank 1 has a damaged crop: 3 crops where 4 are expected.
ONE_OF_TWO_RANKS = """
import sys
import torch
import torch.distributed as dist
import model
meeting, rank, result = sys.argv[1], int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", store=dist.FileStore(meeting, 2), rank=rank, world_size=2)
tokens = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
a, b = tokens[:, :4] if rank == 0 else tokens[:, 4:]
eager = model.infonce
compiled = torch.compile(eager, fullgraph=True, backend="aot_eager")
found = []
for align in (eager, compiled):
    loss = align(a, b)
    grad, = torch.autograd.grad(loss, tokens)
    found.append((loss.detach(), grad))
torch.save(found, result)
dist.barrier()
dist.destroy_process_group()
"""


def run_two_ranks(folder):
    """-> for each rank, its loss and gradients, eager and compiled."""
    ranks = []
    for rank in (0, 1):
        words = [folder / "meeting", str(rank), folder / f"{rank}.pt"]
        command = [sys.executable, "-W", "error::FutureWarning", "-c", ONE_OF_TWO_RANKS, *words]
        home = pathlib.Path(model.__file__).parent
        ranks.append(subprocess.Popen(command, cwd=home, stderr=subprocess.PIPE, text=True))
    try:
        said = [process.communicate(timeout=300)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], "".join(said)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def test_infonce_over_two_ranks(tmp_path):
    """Gradients that other ranks send back and that are lost or counted twice, partners looked for
    in the other rank's rows; a compiled collective whose gradient
    differs; a name that torch no longer wants, whose warning every rank would print."""
    of_rank_0, of_rank_1 = run_two_ranks(tmp_path)

    # DDP takes the mean over the ranks; so the loss is the mean of two means over rows
    tokens = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    a, b = F.normalize(tokens, dim=-1)
    partner = torch.arange(8)
    nats = F.cross_entropy(a @ b.T / 0.2, partner, reduction="none")
    nats = (nats + F.cross_entropy(b @ a.T / 0.2, partner, reduction="none")) / 2
    first, second = nats[:4].mean(), nats[4:].mean()
    grad, = torch.autograd.grad((first + second) / 2, tokens)
    for (loss_0, grad_0), (loss_1, grad_1) in zip(of_rank_0, of_rank_1):        # eager, compiled
        torch.testing.assert_close(loss_0, first.detach())
        torch.testing.assert_close(loss_1, second.detach())
        torch.testing.assert_close((grad_0 + grad_1) / 2, grad)


def test_losses_are_in_float32():
    """Squares and exponents in half precision: small differences become 0."""
    torch.manual_seed(0)
    a, b = torch.randn(2, 6, 8)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model.infonce(a, b), plain_infonce_in_float32(a, b))
    a, b = a.bfloat16(), b.bfloat16()
    torch.testing.assert_close(model.mse(a, b), plain_mse(a.float(), b.float()))
    assert model.spread(a).dtype == torch.float32


def plain_infonce_in_float32(a, b):
    with torch.autocast("cpu", enabled=False):
        return plain_infonce(a, b)


def test_spread():
    """A spread that does not fall to 0 on collapse would hide it, and so would the root of a number that rounding
    made negative; one that changes with the length of the tokens, or that takes the lengths of columns for those of
    tokens."""
    all_the_same = torch.ones(5, 8)
    all_the_same_rounded_up = torch.ones(6, 7)
    all_about = torch.cat([torch.eye(8), -torch.eye(8)])
    a_right_angle = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    half_of_it = torch.tensor([[1.0, 1.0], [0.0, 3.0]])
    assert float(model.spread(all_the_same)) == pytest.approx(0, abs=1e-3)
    assert float(model.spread(all_the_same_rounded_up)) == pytest.approx(0, abs=1e-3)
    assert float(model.spread(all_about)) == pytest.approx(1, abs=1e-6)
    assert float(model.spread(a_right_angle)) == pytest.approx(math.sqrt(0.5), abs=1e-6)
    assert float(model.spread(half_of_it)) == pytest.approx(math.sin(math.pi / 8), abs=1e-6)


# ---- compiling, and what a GPU would have to wait for

@pytest.mark.parametrize("name", ROWS)
def test_loss_asks_the_device_for_nothing(name, monkeypatch):
    """An .item(), a boolean index, a Python branch on data: on a GPU the host would wait for each.
    Tensors without data cannot be asked."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())   # knows no "meta"
    m, image, guide, coarse, ids_keep, ids_mask = batch(name)
    m.to("meta")
    if guide is not None:
        guide = guide.to("meta")
    coarse = [view.to("meta") for view in coarse]
    loss, _, _ = m(image.to("meta"), guide, coarse, ids_keep.to("meta"), ids_mask.to("meta"))
    loss.backward()


def test_reading_loss_asks_the_device_for_nothing():
    """The same for the recognizer's loss, with padding and with patches whose character is not
    known."""
    m = Recognizer(ViT(1, 48, 3, (8, 8)), CHARS, 6, 1, 48, 3, 96, dropout=0.1, spell=2.0).to("meta")
    images = torch.empty(3, 3, 32, 128, device="meta")
    targets = torch.empty(3, 4, dtype=torch.long, device="meta")
    under = torch.empty(3, 64, dtype=torch.long, device="meta")
    loss, _, _ = m(images, targets, under)
    loss.backward()


@pytest.fixture
def one_rank():
    """A process group, as under torchrun."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_nothing_is_gathered_without_gradients(one_rank, monkeypatch):
    """Rank 0 alone draws pictures: it would wait for the others for ever."""
    monkeypatch.setattr(model, "GatherRows", None)
    torch.manual_seed(0)
    a, b = torch.randn(2, 6, 8)
    with torch.no_grad():
        torch.testing.assert_close(model.infonce(a, b), plain_infonce(a, b))


@pytest.mark.parametrize("name", METHODS)
def test_the_objective_has_no_graph_break(name, monkeypatch, one_rank):
    """What the compiler cannot follow, such as a boolean index or a collective."""
    shallow_encoder(monkeypatch, 1)                                     # every block is the same code
    m, *inputs = batch(name, n=2)
    loss, _, _ = torch.compile(m, fullgraph=True, backend="eager")(*inputs)
    torch.testing.assert_close(loss, m(*inputs)[0])


def shallow_encoder(monkeypatch, depth):
    nano = MODELS["vit_square"]
    monkeypatch.setitem(MODELS, "vit_square", dict(nano, encoder=dict(nano["encoder"], depth=depth)))


def compile_quickly(network, monkeypatch):
    """compile_layers, without code for the device, and with an error at a graph break."""
    plain = torch.nn.Module.compile

    def compile_module(layer, **options):
        plain(layer, backend="aot_eager", fullgraph=True, **options)
    monkeypatch.setattr(torch.nn.Module, "compile", compile_module)
    model.compile_layers(network)
    torch.compiler.reset()
    counters.clear()


def loss_and_grads(network, inputs):
    torch.manual_seed(0)                                                # of dropout
    loss = network(*inputs)[0]
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    return [loss, *torch.autograd.grad(loss, parameters)]


def test_compiled_layers_equal_eager_ones(monkeypatch):
    """A layer that is compiled anew for each block or step, which takes minutes; one that is not
    compiled at all; a gradient that the compiler loses."""
    shallow_encoder(monkeypatch, 3)
    m, *inputs = batch("mnsp", n=2)
    expected = loss_and_grads(m, inputs)
    compile_quickly(m, monkeypatch)
    for one, other in zip(loss_and_grads(m, inputs), expected):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-3)
    # a block for the guide and for nsp's view, for the masked crop; mim's first layer, mim's last
    # one, both of nsp's
    assert counters["stats"]["unique_graphs"] == 2 + 3
    with torch.compiler.set_stance("fail_on_recompile"):
        loss_and_grads(m, inputs)


def test_a_teacher_is_compiled_too(monkeypatch):
    """The one network that is none of the objective's modules left out: half of a step would not be faster."""
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda layer, dynamic: compiled.append(layer))
    shallow_encoder(monkeypatch, 1)
    teacher = ViT(2, 48, 3, (8, 8))
    model.compile_layers(Pretrainer("mim", "vit_square", teacher=teacher))
    assert len(compiled) == 1 + 2 + 2                       # blocks, the decoder's layers, the teacher's blocks
    assert all(block in compiled for block in teacher.blocks)


def test_compiled_recognizer_equals_an_eager_one(monkeypatch):
    """Code for each block's rate of drop-path, for each length of a word, or for each letter that is
    read in a validation, which takes minutes; words that are read otherwise; a copy (an average of weights,
    say) that reads with the weights of the network it was copied from."""
    torch.manual_seed(0)
    m = Recognizer(ViT(4, 48, 3, (8, 8), drop_path=0.4), CHARS, 26, 1, 48, 3, 96)
    move_weights(m)
    images, val = torch.rand(3, 3, 32, 128), data.open_source("synth:3")
    args = SimpleNamespace(batch_size=3, workers=0)
    words = {T: [images, torch.randint(0, 36, (3, T))] for T in (8, 4)}
    expected = {T: loss_and_grads(m, words[T]) for T in words}
    read = finetune.validate(m, val, "exact", args, torch.float32, None, None)
    compile_quickly(m.train(), monkeypatch)
    found = {8: loss_and_grads(m, words[8])}
    # blocks with and without drop-path, a layer
    assert counters["stats"]["unique_graphs"] == 2 + 1
    with torch.compiler.set_stance("fail_on_recompile"):
        found[4] = loss_and_grads(m, words[4])
        assert finetune.validate(m, val, "exact", args, torch.float32, None, None) == read
        twin = copy.deepcopy(m)
        twin.classifier.bias.data[5] = 1e4                  # of class 5 alone: its words are those of m.charset[5]
        assert finetune.validate(twin, val, "exact", args, torch.float32, None, None)[1][0].text == CHARS[5] * 26
    for T in words:
        for one, other in zip(found[T], expected[T]):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-3)


# ---- sizes and checkpoints

def millions(module):
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


def test_parameter_counts_are_the_papers():
    """A missing bias or a wrong width: 21.4 M encoder, 35.8 M recognizer (LMIM)."""
    small = MODELS["vit_small"]
    recognizer = Recognizer(ViT(**small["encoder"]), "a" * 94, **small["reader"])
    assert millions(recognizer.encoder) == pytest.approx(21.4, rel=0.01)
    assert millions(recognizer) == pytest.approx(35.8, rel=0.01)


# encoder: depth, width, heads; decoder of pre-training: layers, width, heads, FFN, dropout; reader: layers,
# width, heads, FFN
SIZES = {
    "vit_nano": [(6, 128, 4), (2, 128, 4, 256, 0.0), (2, 128, 4, 256)],
    "vit_mini": [(8, 192, 6), (2, 192, 6, 384, 0.0), (2, 192, 6, 384)],
    "vit_tiny": [(12, 192, 3), (2, 256, 8, 1024, 0.1), (3, 256, 8, 256)],
    "vit_small": [(12, 384, 6), (2, 512, 16, 2048, 0.1), (6, 512, 8, 256)],
    "vit_base": [(12, 768, 12), (2, 512, 16, 2048, 0.1), (6, 512, 8, 256)],
}


@pytest.mark.parametrize("name", SIZES)
def test_heads_and_layers(name):
    """A number of heads, which no count of parameters shows, or a decoder's size or dropout that was changed
    for an experiment and stayed; a row of MODELS of which only a part reaches the network."""
    with torch.device("meta"):                              # tensors that take up no room
        pretrainer = Pretrainer("mnsp", name)
        recognizer = Recognizer(pretrainer.encoder, CHARS, **MODELS[name]["reader"])
    found = []
    for layers, width in ((pretrainer.encoder.blocks, pretrainer.encoder.width),
                          (pretrainer.decoder.layers, pretrainer.decoder.mask_token.shape[-1]),
                          (recognizer.layers, recognizer.embed.weight.shape[1])):
        heads = {part.heads for part in layers.modules() if hasattr(part, "heads")}
        found.append((len(layers), width, *heads, layers[-1].mlp.fc1.out_features))
    encoder, decoder, reader = found
    for layer in pretrainer.decoder.layers:
        assert layer.dropout == layer.self_attn.dropout == layer.cross_attn.dropout == layer.mlp.dropout
    assert [encoder[:3], (*decoder, layer.dropout), reader] == SIZES[name]
    assert encoder[3] == 4 * encoder[1]


def mae_state(width=64, depth=2, grid=(16, 16)):
    """A state dict in MAE's format, with the square position grid of MAERec's files, and a decoder
    to pass over."""
    vit = ViT(depth, width, 1)
    state = {name: torch.randn_like(x) for name, x in vit.state_dict().items()}
    state["pos_embed"] = F.pad(model.sincos_2d(width, grid, grid), (0, 0, 1, 0))[None]
    rest = {"decoder_embed.weight": torch.zeros(3, 3), "mask_token": torch.zeros(1, 1, 3),
            "decoder_pos_embed": torch.zeros(1, 9, 3), "head.weight": torch.zeros(3, 3),
            "fc_norm.weight": torch.zeros(3), "linear_norm.0.weight": torch.zeros(3, 3)}
    return state, rest


@pytest.mark.parametrize("wrap", ["bare", "mae", "lmim", "mmocr"])
def test_foreign_encoders_load_unchanged(tmp_path, wrap):
    """A tensor renamed, transposed or made anew on loading, above all the stored 16 x 16 position
    grid of 8 x 32 patches."""
    state, rest = mae_state()
    prefix = dict(lmim="model_maeenc.", mmocr="backbone.").get(wrap, "")
    full = {**{prefix + name: x for name, x in state.items()}, **rest}
    if wrap != "bare":
        full = {"state_dict" if wrap == "mmocr" else "model": full, "args": argparse.Namespace(lr=1)}
    torch.save(full, tmp_path / "x.pth")
    encoder = model.load_encoder(tmp_path / "x.pth")
    assert encoder.grid == (8, 32)
    assert encoder.matched == len(state)
    assert encoder.blocks[0].attn.heads == 1
    for name, x in state.items():
        assert torch.equal(encoder.state_dict()[name], x), name


def test_what_an_encoder_is_not_made_for():
    """One row of places for three crops, of which two are lost; a size without codes of places; whole numbers
    beyond 255, taken for pixels."""
    vit = ViT(1, 32, 1, patch=(8, 8), scales=[(16, 64)]).eval()
    images = torch.rand(3, 3, 32, 128)
    one = torch.tensor([[5, 2]])
    torch.testing.assert_close(vit(images, one), vit(images, one.expand(3, -1)))
    with pytest.raises(ValueError, match=r"\(32, 64\); expected \(32, 128\) or one of .*\[\(16, 64\)\]"):
        vit(torch.rand(1, 3, 32, 64))
    with pytest.raises(UserError, match="images of torch.int64; expected uint8"):
        to_unit(torch.full((1, 3, 32, 128), 300))


def test_an_encoder_is_found_in_odd_files(tmp_path):
    """A network's name where the tensors are looked for; a recognizer's weights without a "model" around them,
    which end in a traceback; a file without an encoder that does not say what is in it."""
    state, _ = mae_state()
    torch.save({"model": "vit_small", "state_dict": state}, tmp_path / "named.pth")
    torch.save({"model": state, "state_dict": {}}, tmp_path / "both.pth")
    for name in ("named", "both"):
        assert model.load_encoder(tmp_path / f"{name}.pth").matched == len(state)

    nano = ViT(**MODELS["vit_nano"]["encoder"]).state_dict()
    torch.save({"charset": "abc", **{f"encoder.{name}": x for name, x in nano.items()}}, tmp_path / "flat.pth")
    args = SimpleNamespace(model="vit_nano", init=str(tmp_path / "flat.pth"), freeze_encoder=False, dropout=0.0,
                           drop_path=0.0, max_length=25, spell=0.0)
    _, said = finetune.build_recognizer(args, "abc")
    assert said.endswith(f"all {len(nano)} tensors of the encoder loaded")

    torch.save({"stem.weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"no blocks.0.attn.qkv.weight in it, but stem.weight; expected"):
        model.load_encoder(tmp_path / "other.pth")
    torch.save({"student": nano, "teacher": nano}, tmp_path / "two.pth")
    with pytest.raises(UserError, match="in it, but student, teacher; expected .* a dict that has it under 'model'"):
        model.load_encoder(tmp_path / "two.pth")


def hollow_state(config):
    """The names and shapes of a ViT's tensors, all of them zeros that take up no room."""
    with torch.device("meta"):
        state = ViT(**config).state_dict()
    return {name: torch.zeros(1).expand(x.shape) for name, x in state.items()}


@pytest.mark.parametrize("name", MODELS)
def test_bare_encoders_have_their_heads(tmp_path, monkeypatch, name):
    """A size of MODELS without our `args` beside it, or with other patches, read with another
    number of heads: all tensors match, and every feature is wrong."""
    config = MODELS[name]["encoder"]
    for patch in config["patch"], (4, 8):
        torch.save({"model": hollow_state(dict(config, patch=patch))}, tmp_path / "bare.pt")
        encoder = model.load_encoder(str(tmp_path / "bare.pt"))
        assert {block.attn.heads for block in encoder.blocks} == {config["heads"]}
        assert encoder.patch == patch
    assert model.heads_of(7, 320) == 5 and model.heads_of(2, 32) == 1       # sizes that are not ours
    monkeypatch.setitem(MODELS, "mine", dict(encoder=dict(MODELS["vit_nano"]["encoder"], heads=8)))
    state = {"model": hollow_state(dict(config, patch=patch)), "args": {"model": "mine"}}
    if name == "vit_nano":                  # as deep and as wide, and it comes first
        torch.save(state, tmp_path / "mine.pt")
        assert model.load_encoder(str(tmp_path / "mine.pt")).blocks[0].attn.heads == 8
    with pytest.raises(UserError, match="width 200: expected a multiple of 64"):
        model.heads_of(7, 200)              # else it loads, and fails when it is used


def write_bad_checkpoints(folder):
    """-> names of files that hold no encoder. Two of them leave folder/ran behind if they are
    trusted."""
    class Bomb:
        def __reduce__(self):
            return (open, (str(folder / "ran"), "w"))

    (folder / "text.pt").write_text("no checkpoint")
    (folder / "empty.pt").write_bytes(b"")
    (folder / "pickle.pt").write_bytes(pickle.dumps({"model": Bomb()}))
    (folder / "old.pt").write_bytes(bytes.fromhex("80025801"))          # struct.error
    state, _ = mae_state()
    part = {name: x for name, x in state.items() if "norm.weight" not in name}
    bad = {
        "bomb": {"model": Bomb()},
        "part": part,
        "grid": dict(state, pos_embed=state["pos_embed"][:, :65]),
        "flat": dict(state, **{"patch_embed.proj.weight": torch.zeros(64, 48)}),
        "high": dict(state, **{"patch_embed.proj.weight": torch.zeros(64, 3, 64, 4)}),
        "five": dict(state, **{"patch_embed.proj.weight": torch.zeros(64, 3, 5, 4),
                               "pos_embed": torch.zeros(1, 1 + 6 * 32, 64)}),      # 5 x 6 pixels of 32
        "other": {"a": torch.zeros(1)},
        "number": {"model": 3},
    }
    for name, content in bad.items():
        torch.save(content, folder / f"{name}.pt")
    return ["text", "empty", "pickle", "old", "missing", *bad]


def test_bad_checkpoints_are_one_line(tmp_path):
    """A traceback, a pickle that runs, or an encoder loaded in part and trained on as if it were
    whole."""
    for name in write_bad_checkpoints(tmp_path):
        with pytest.raises(UserError) as error, warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            model.load_encoder(str(tmp_path / f"{name}.pt"))
        assert "\n" not in str(error.value) and name in str(error.value)
        assert not heard, name          # torch's warnings are lines on the terminal too
    assert not (tmp_path / "ran").exists()


def test_names_that_are_numbers_are_passed_over(tmp_path):
    """An encoder that is refused for what lies beside it in the file."""
    state, _ = mae_state()
    torch.save({**state, 1: 2}, tmp_path / "numbers.pt")
    assert model.load_encoder(str(tmp_path / "numbers.pt")).matched == len(state)


# ---- the recognizer

def recognizer(n=8):
    """A Recognizer with random weights, such that words differ and end early, late or at once; n
    images."""
    torch.manual_seed(1)
    nano = MODELS["vit_square"]
    m = Recognizer(ViT(**nano["encoder"]), CHARS, max_length=8, **nano["reader"])
    move_weights(m, by=0.2)
    m.classifier.bias.data[m.end] += 5
    return m.eval(), torch.rand(n, 3, 32, 128) * 2 - 1


def test_recordings_belong_to_the_weights_as_they_are(monkeypatch):
    """On a GPU: words read by weights that have been replaced, in another dtype, or with dropout, since those
    were recorded; a copy that reads with the weights of the original; T other than max_length + 1."""
    made = []

    def record(function, eager_calls):
        assert eager_calls == 1, "kernels are loaded in the first call, which cannot be recorded"
        made.append(function)
        return function
    monkeypatch.setattr(model, "Replayed", record)
    net, images = recognizer()
    wanted, sure = net.decode(images)
    for _ in range(2):                                              # recorded once
        characters, confidences = net.decode_recorded(images, torch.float32)
        assert characters.shape[1] == net.max_length + 1 and len(made) == 1
        assert torch.equal(characters[:, :wanted.shape[1]], wanted)
        assert torch.allclose(confidences[:, :wanted.shape[1]], sure)
    net.decode_recorded(images, torch.bfloat16)
    net.train()
    net.decode_recorded(images, torch.bfloat16)
    net.embed.weight.data = net.embed.weight.data.clone()
    net.decode_recorded(images, torch.bfloat16)
    assert len(made) == 4 and len(net.recordings) == 1
    twin = copy.deepcopy(net)
    assert twin.recordings == {} and len(net.recordings) == 1


def lengths_of(ids, m):
    """Letters of each word before its first end."""
    return ((ids == m.end).cumsum(1) == 0).sum(1)


def test_cached_decoding_equals_decoding_from_scratch():
    """A cache that is one step behind, a position that starts anew, a word that goes on after its
    end or beyond max_length, a confidence that counts what comes after the end."""
    m, images = recognizer()
    ids, probs = m.decode(images)
    lengths = lengths_of(ids, m)
    assert lengths.min() == 0 and lengths.max() == m.max_length and len(lengths.unique()) > 3

    again = torch.full((len(images), 1), m.start)
    with torch.no_grad():
        _, crop_kvs = m.encode(images)
        for t in range(ids.shape[1]):
            logits = m.logits_after(again, crop_kvs)[0][:, -1]
            logits[:, m.pad:] = -math.inf
            chosen = logits.argmax(-1)
            if t == m.max_length:
                chosen = torch.full((len(images),), m.end)
            expected = logits.softmax(-1).gather(1, chosen[:, None])[:, 0]
            alive = t <= lengths
            assert torch.equal(ids[alive, t], chosen[alive])
            torch.testing.assert_close(probs[alive, t], expected[alive], atol=1e-5, rtol=1e-4)
            assert (ids[~alive, t] == m.end).all()
            assert (probs[~alive, t] == 1).all()
            again = torch.cat([again, ids[:, t:t + 1]], dim=1)


def test_decoding_stops_with_the_longest_word():
    """Steps for words that have ended, or a word cut off because another one ended."""
    m, images = recognizer()
    ids, _ = m.decode(images)
    lengths = lengths_of(ids, m)
    short = lengths < m.max_length
    again, _ = m.decode(images[short])
    assert again.shape[1] == lengths[short].max() + 1
    assert torch.equal(again, ids[short, :again.shape[1]])


def test_padding_and_unknown_are_never_read():
    """A class that is no character, chosen: an index beyond the charset."""
    m, images = recognizer()
    m.classifier.bias.data[m.pad:] += 1e3
    ids, probs = m.decode(images)
    assert (ids <= m.end).all()
    assert (probs > 0).all() and (probs <= 1).all()


def test_decoding_equals_the_benchmark_s():
    """A speed that is measured against something that reads other words."""
    m, images = recognizer()
    ids, _ = m.decode(images)
    whole = bench.prefixes(m, images)[:, :ids.shape[1]]
    before_end = (whole == m.end).cumsum(1) == 0
    assert torch.equal(whole.where(before_end, m.end), ids)             # after an end all is end


def test_teacher_forcing_equals_a_plain_decoder():
    """A causal mask that lets a character see the next one, a memory of the wrong layer, a loss
    that counts padding or that is a mean over characters; an encoder that does not learn from it."""
    m, images = recognizer(6)
    targets = torch.randint(0, 36, (6, 5))
    targets[:, 3], targets[:, 4] = m.end, m.pad
    targets[0, 1:] = torch.tensor([m.end, m.pad, m.pad, m.pad])         # a shorter word
    loss, terms, logits = m(images, targets)

    memory = plain_linear(plain_vit(m.encoder, images)[:, 1:], m.proj[0])
    memory = plain_norm(memory, m.proj[1])
    ids = torch.cat([torch.full((6, 1), m.start), targets[:, :-1]], dim=1)
    x = m.embed(ids) + m.pos[:, :5]
    for layer in m.layers:
        normed = plain_norm(x, layer.norm1)
        x = x + plain_cross(layer.self_attn, normed, normed, causal=True)
        x = x + plain_cross(layer.cross_attn, plain_norm(x, layer.norm2), memory)
        x = x + plain_mlp(plain_norm(x, layer.norm3), layer.mlp)
    expected = plain_linear(plain_norm(x, m.norm), m.classifier)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)

    nats = -expected.log_softmax(-1).gather(2, targets[..., None])[..., 0]
    nats = nats[targets != m.pad].sum() / 6
    torch.testing.assert_close(loss, nats, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(terms["read"], nats, atol=1e-4, rtol=1e-4)
    learning = [m.encoder.norm.weight, m.embed.weight]
    for part in (m.proj, m.layers, m.classifier):
        learning += part.parameters()
    assert_same_gradients(loss, nats, learning)


def test_spelling_loss_by_hand():
    """Patches whose character is not known counted as right or wrong, crops with few known patches
    counted for less, the weight left out, an encoder that does not learn from it."""
    torch.manual_seed(0)
    m = Recognizer(ViT(1, 48, 3, (8, 8)), CHARS, 6, 1, 48, 3, 96, spell=2.0)
    move_weights(m)
    images = torch.rand(3, 3, 32, 128) * 2 - 1
    targets = torch.full((3, 2), m.end)
    under = torch.full((3, 64), m.pad)
    under[0, :5] = torch.tensor([1, 1, 4, 4, 7])
    under[1, 40] = 9                                                    # and none in the third
    loss, terms, _ = m(images, targets, under)
    nats = -m.char_head(m.encoder(images)[:, 1:]).log_softmax(-1)       # (3, 64, V)
    first = (nats[0, 0, 1] + nats[0, 1, 1] + nats[0, 2, 4] + nats[0, 3, 4] + nats[0, 4, 7]) / 5
    expected = 2 * (first + nats[1, 40, 9] + 0) / 3
    torch.testing.assert_close(terms["spell"], expected)
    torch.testing.assert_close(loss, terms["read"] + terms["spell"])
    learning = [*m.encoder.blocks.parameters(), *m.char_head.parameters()]
    assert_same_gradients(terms["spell"], expected, learning)


def test_reading_says_text_and_confidence():
    """Text that holds what comes after the end or lacks a character of the charset, a confidence
    without the end or of a word's first letters alone, bytes that are not normalised, crops of
    another batch."""
    m, _ = recognizer()
    images = torch.randint(0, 256, (8, 3, 32, 128), dtype=torch.uint8)
    ids, probs = m.decode(images / 255 * 2 - 1)
    lengths = lengths_of(ids, m)
    assert len(lengths.unique()) > 2
    words = m.read(images, batch_size=3)
    assert len(words) == 8
    for (text, confidence), row, p, n in zip(words, ids.tolist(), probs, lengths):
        assert text == "".join(CHARS[i] for i in row[:n])
        assert confidence == pytest.approx(p[:n + 1].double().prod().item(), rel=1e-4)
    assert [text for text, _ in m.read(images / 255)] == [text for text, _ in words]
    assert m.read(images, batch_size=3) == words
    assert m.read(images, batch_size=3, dtype=torch.bfloat16) != words, "--dtype is not heard"
    with torch.autocast("cpu", torch.bfloat16):
        assert m.decode(images[:2] / 255)[1].dtype == torch.float32, "0.999 becomes 1"

    m.classifier.bias.data[m.end - 1] += 1e3                            # the charset's last character
    assert m.read(images[:1])[0][0] == "z" * m.max_length


CROPS = torch.zeros(2, 3, 32, 128)


@pytest.mark.parametrize("images, said", [
    ([CROPS[0]], "a list"),
    (CROPS.numpy(), "a ndarray"),
    (CROPS[0], "shape (3, 32, 128)"),
    (CROPS[:, :1], "shape (2, 1, 32, 128)"),
    (torch.zeros(2, 3, 64, 256), "shape (2, 3, 64, 256)"),
    (CROPS.long(), "torch.int64"),
    (CROPS + 255, "numbers from 255 to 255"),
    (CROPS - 1, "numbers from -1 to -1"),
    (CROPS + 1.01, "numbers from 1.01 to 1.01"),
    (CROPS + math.nan, "numbers from nan to nan"),
])
def test_what_is_no_crop_is_not_read(images, said):
    """Floats of 0 to 255, normalised crops, another size, an array of another library, or numbers
    that are not finite: read all the same, as noise, or a traceback from inside."""
    m, _ = recognizer(1)
    with pytest.raises(UserError) as error:
        m.read(images)
    assert said in str(error.value) and "expected a torch tensor of shape (B, 3, 32, 128)" in str(error.value)
    assert "\n" not in str(error.value)


def test_no_crop_and_white_crops_are_read():
    """An empty batch, or crops of zeros or ones alone, refused as something else."""
    m, _ = recognizer(1)
    assert m.read(CROPS[:0]) == [] and m.read(CROPS[:0].byte()) == []
    assert len(m.read(CROPS)) == len(m.read(CROPS + 1)) == len(m.read(CROPS.half())) == 2
