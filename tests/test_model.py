"""The networks against plain code: an independent ViT and decoder, a boolean mask, hand-made cases, and what must not leak."""
import argparse
import math
import pickle
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import bench
import model
import pretrain
from data import UserError
from model import METHODS, MODELS, Decoder, Pretrainer, Recognizer, ViT, drop, take

CHARS = "0123456789abcdefghijklmnopqrstuvwxyz"


def hide(n, grid, ratio=0.8, mask="random", seed=0):
    """ids_keep, ids_mask of n crops of so many 4 x 4 patches, as pretrain.py draws them."""
    args, encoder = SimpleNamespace(mask=mask, mask_ratio=ratio), SimpleNamespace(grid=grid, patch=(4, 4))
    return pretrain.make_mask(n, args, encoder, torch.Generator().manual_seed(seed))


def batch(method="mnsp", n=4, scales=((16, 64),), teacher=None, seed=0):
    """A Pretrainer and its four inputs, from a fixed seed."""
    torch.manual_seed(seed)
    m = Pretrainer(method, "vit_nano", scales, teacher)
    image = torch.rand(n, 3, 32, 128) * 2 - 1
    look = torch.rand(n, 3, 32, 128) * 2 - 1
    coarse = [F.adaptive_avg_pool2d(look, s) for s in scales] if m.method["nsp"] else []
    views = {"none": [], "still": [], "full": [-look], "coarse": [F.adaptive_avg_pool2d(-look, scales[-1])]}[m.method["guide"]], coarse
    ids_keep, ids_mask = hide(n, m.encoder.grid, seed=seed)
    return m, image, views, ids_keep, ids_mask


# ---- an independent implementation, with loops where the product has reshapes

def plain_attention(q, k, v, heads, causal=False):
    out = torch.zeros_like(q)
    d = q.shape[-1] // heads
    for i in range(heads):
        s = slice(i * d, (i + 1) * d)
        scores = q[..., s] @ k[..., s].transpose(1, 2) / math.sqrt(d)
        if causal:
            scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -math.inf)
        out[..., s] = torch.exp(scores - scores.logsumexp(-1, keepdim=True)) @ v[..., s]
    return out


def plain_norm(x, norm):
    mean, var = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
    return (x - mean) / (var + norm.eps).sqrt() * norm.weight + norm.bias


def plain_linear(x, layer):
    return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)


def plain_mlp(x, mlp):
    hidden = plain_linear(x, mlp.fc1)
    return plain_linear(hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))), mlp.fc2)


def plain_vit(vit, images, keep=None):
    p, q = vit.patch
    tokens = torch.stack([(vit.patch_embed.proj.weight * images[:, None, :, y:y + p, x:x + q]).sum((2, 3, 4)) + vit.patch_embed.proj.bias
                          for y in range(0, images.shape[2], p) for x in range(0, images.shape[3], q)], dim=1)
    tokens = tokens + vit.pos_embed[:, 1:]
    if keep is not None:
        tokens = torch.stack([t[row] for t, row in zip(tokens, keep)])
    x = torch.cat([vit.cls_token.expand(len(images), 1, -1) + vit.pos_embed[:, :1], tokens], dim=1)
    for block in vit.blocks:
        q, k, v = plain_linear(plain_norm(x, block.norm1), block.attn.qkv).chunk(3, dim=-1)
        x = x + plain_linear(plain_attention(q, k, v, block.attn.heads), block.attn.proj)
        x = x + plain_mlp(plain_norm(x, block.norm2), block.mlp)
    return plain_norm(x, vit.norm)


def plain_cross(attention, x, y, causal=False):
    k, v = plain_linear(y, attention.kv).chunk(2, dim=-1)
    return plain_linear(plain_attention(plain_linear(x, attention.q), k, v, attention.heads, causal), attention.proj)


@pytest.mark.parametrize("size, patch", [((32, 128), (4, 4)), ((16, 64), (4, 4)), ((12, 40), (4, 8))])   # grids 8x32, 4x16, 3x5
def test_vit_equals_plain_vit(size, patch):
    """A slip in the reshapes of heads, patches or grids: rows and columns swapped, heads mixed, a square grid assumed."""
    torch.manual_seed(0)
    vit = ViT(2, 48, 3, patch, size).eval()
    for p in vit.parameters():
        p.data += 0.1 * torch.randn_like(p)
    images = torch.randn(3, 3, *size)
    keep = torch.rand(3, math.prod(vit.grid)).argsort(1)[:, :7]
    with torch.no_grad():
        assert torch.allclose(vit(images), plain_vit(vit, images), atol=1e-5)
        assert torch.allclose(vit(images, keep), plain_vit(vit, images, keep), atol=1e-5)
    torch.testing.assert_close(vit(images), plain_vit(vit, images), atol=1e-5, rtol=1e-4)     # the training path's attention too


@pytest.mark.parametrize("grid", [(8, 32), (4, 16), (3, 5)])
@pytest.mark.parametrize("cross", [True, False])
def test_decoder_equals_plain_decoder(grid, cross):
    """Memory mixed with queries, a norm in the wrong place, hidden tokens not last, places of the wrong patches."""
    torch.manual_seed(0)
    decoder = Decoder(24, 10, [grid], 2, 48, 3, 96, dropout=0.0, cross=cross)
    for p in decoder.parameters():
        p.data += 0.1 * torch.randn_like(p)
    N = math.prod(grid)
    ids_keep, ids_mask = hide(2, grid, 0.7)
    seen, memory = torch.randn(2, 1 + ids_keep.shape[1], 24), [torch.randn(2, 6, 24)]
    got = decoder(memory if cross else [], seen, ids_keep, ids_mask)
    # the plain way keeps every patch at its place and picks the hidden ones at the end
    x = decoder.mask_token.expand(2, N, -1).clone()
    cls_and_seen = plain_linear(seen, decoder.embed)
    for b in range(2):
        x[b, ids_keep[b]] = cls_and_seen[b, 1:]
    x = torch.cat([cls_and_seen[:, :1], x + decoder.pos_0], dim=1)
    for layer in decoder.layers:
        x = plain_norm(x + plain_cross(layer.self_attn, x, x), layer.norm1)
        if cross:
            x = plain_norm(x + plain_cross(layer.cross_attn, x, plain_linear(memory[0], decoder.embed_memory)), layer.norm2)
        x = plain_norm(x + plain_mlp(x, layer.mlp), layer.norm3)
    x = plain_linear(plain_norm(x, decoder.norm), decoder.pred)[:, 1:]
    torch.testing.assert_close(got, torch.stack([x[b, ids_mask[b]] for b in range(2)]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_on_a_cpu(rate):
    """Random bytes read as anything but even numbers: a share that is not `rate`, a mean that is not kept, the same mask twice."""
    torch.manual_seed(0)
    x = torch.full((1001, 33), 2.0)
    one, two = drop(x, rate), drop(x, rate)
    assert ((one == 0).double().mean() - rate).abs() < 0.006 and (one.mean() - 2).abs() < 0.03 and not torch.equal(one, two)
    assert one.unique().numel() == 2 and torch.equal(drop(x, rate, training=False), x) and drop(x.bfloat16(), rate).dtype == torch.bfloat16
    columns, rows = ((one == 0).double().mean(dim=d) for d in (0, 1))
    assert (columns - rate).abs().max() < 0.08 and rows.min() < rate < rows.max()


def test_encoding_does_not_depend_on_the_batch():
    """Statistics over the batch (a batch norm, a mean over the wrong axis) where there must be none."""
    torch.manual_seed(0)
    vit, images = ViT(2, 48, 3).eval(), torch.randn(5, 3, 32, 128)
    with torch.no_grad():
        torch.testing.assert_close(vit(images)[2:3], vit(images[2:3]), atol=1e-5, rtol=1e-4)


# ---- places

def test_position_embedding_by_hand():
    """The order of x and y, of sine and cosine, or the frequencies: MAE's files would load and mean something else."""
    pos = model.sincos(8, (3, 5), (3, 5)).view(3, 5, 8)
    y, x = 2.0, 4.0
    expected = [math.sin(x), math.sin(x / 100), math.cos(x), math.cos(x / 100), math.sin(y), math.sin(y / 100), math.cos(y), math.cos(y / 100)]
    torch.testing.assert_close(pos[2, 4], torch.tensor(expected))


def test_coarse_places_lie_between_the_fine_ones_they_cover():
    """Coarse patches counted 0, 1, 2 instead of placed in the image: scales would disagree on where things are."""
    coarse, fine = model.sincos(8, (1, 4), (1, 8)), model.sincos(8, (1, 8), (1, 8))
    assert torch.allclose(coarse[1, :2], torch.tensor([math.sin(2.5), math.sin(2.5 / 100)]))
    assert torch.allclose(fine[2, :2], torch.tensor([math.sin(2.0), math.sin(2.0 / 100)]))


# ---- masks

@pytest.mark.parametrize("ratio, N, kept", [(0.8, 256, 51), (0.6, 256, 102), (0.9, 64, 6), (0.999, 64, 1), (0.001, 64, 63), (0.5, 2, 1)])
def test_mask_counts(ratio, N, kept):
    """Off by one, or an empty side: a loss of 0/0."""
    keep, hidden = hide(3, (1, N), ratio)
    assert keep.shape == (3, kept) and hidden.shape == (3, N - kept)
    for a, b in zip(keep, hidden):
        assert sorted(a.tolist() + b.tolist()) == list(range(N))


def test_block_mask_hides_blocks():
    """Block noise that is no more than random noise: a hidden patch's right neighbour would be hidden no oftener than the ratio.
    The corner from which blocks are laid drawn with a block's own noise: its first patches are seen too often, or never."""
    shares = []
    for kind in ("random", "block"):
        _, hidden = hide(200, (8, 32), 0.6, kind)
        mask = torch.zeros(200, 256, dtype=torch.bool).scatter(1, hidden, True).view(200, 8, 32)
        assert (mask.flatten(1).sum(1) == 154).all()
        shares.append((mask[:, :, 1:] & mask[:, :, :-1]).sum() / mask[:, :, :-1].sum())
    assert abs(shares[0] - 0.6) < 0.02 and shares[1] > 0.85
    _, hidden = hide(4000, (8, 32), 0.6, "block")
    assert (hidden.flatten().bincount(minlength=256) / 4000 - 0.6).abs().max() < 0.06


# ---- the loss path

def test_gathered_loss_equals_boolean_mask():
    """Gathering the wrong rows, a mean over the wrong count, or gradients to visible patches."""
    torch.manual_seed(0)
    pred, target = torch.randn(3, 20, 7, requires_grad=True), torch.randn(3, 20, 7, requires_grad=True)
    _, hidden = hide(3, (4, 5))
    mask = torch.zeros(3, 20, dtype=torch.bool).scatter(1, hidden, True)
    gathered = model.mse(take(pred, hidden), take(target, hidden))
    grads = torch.autograd.grad(gathered, (pred, target))
    plain = (pred - target)[mask].square().mean()
    for a, b in zip((gathered, *grads), (plain, *torch.autograd.grad(plain, (pred, target)))):
        torch.testing.assert_close(a, b)
    assert (grads[0][~mask] == 0).all() and (grads[1][~mask] == 0).all()


def test_loss_in_the_model_is_the_masked_mean():
    """The model's own loss against its own prediction, patch by patch: a target of the wrong patches or of the wrong view."""
    m, image, views, ids_keep, ids_mask = batch("mim")
    _, terms, pred = m(image, views, ids_keep, ids_mask)
    p, q = m.encoder.patch
    total, count = 0.0, 0
    for b in range(len(image)):
        for j, i in enumerate(ids_mask[b].tolist()):
            y, x = divmod(i, m.encoder.grid[1])
            patch = image[b, :, y * p:(y + 1) * p, x * q:(x + 1) * q]
            centred = patch - patch.mean((1, 2), keepdim=True)
            total += ((pred["mim"][b, j] - (centred / (centred.square().mean() + 1e-3).sqrt()).flatten()) ** 2).mean()
            count += 1
    torch.testing.assert_close(terms["mim"], total / count)


def test_teacher_gets_no_gradient_and_is_not_saved():
    """A teacher that moves with the student, or that doubles every checkpoint."""
    torch.manual_seed(0)
    config = MODELS["vit_nano"]["encoder"]
    teacher = ViT(**config)
    m, image, views, ids_keep, ids_mask = batch("lmim", teacher=teacher)
    loss, _, pred = m(image, views, ids_keep, ids_mask)
    loss.backward()
    assert pred["mim"].shape[-1] == teacher.width
    assert all(p.grad is None for p in teacher.parameters()) and not any("teacher" in k for k in m.state_dict())
    assert not any(p is q for p in m.parameters() for q in teacher.parameters())
    assert all(p.grad is not None for p in m.parameters() if p.requires_grad)


@pytest.mark.parametrize("method", METHODS)
def test_teacher_of_another_patch_lies_over_the_same_places(method):
    """A teacher's first 64 of 256 tokens taken as if they were the student's 64 patches."""
    teacher = ViT(1, 64, 1, (4, 4)).eval()
    m, image, *_ = batch(method, teacher=teacher)
    tokens = teacher(image)[:, 1:].view(4, 4, 2, 16, 2, 64).mean((2, 4)).flatten(1, 2)
    torch.testing.assert_close(m.target(image)[-1], F.layer_norm(tokens, (64,)), atol=1e-5, rtol=1e-4)


# ---- what must not leak

@pytest.mark.parametrize("scales", [((16, 64),), ((8, 32), (16, 64))])
def test_nsp_cannot_see_the_fine_scale(scales):
    """Anything of the fine image in NSP's decoder: its loss would fall and nothing would be learned."""
    m, image, views, ids_keep, ids_mask = batch("nsp", scales=scales)
    with torch.no_grad():
        loss, _, pred = m.eval()(image, views, ids_keep, ids_mask)
        other, _, same = m(torch.randn_like(image), views, ids_keep, ids_mask)
        _, _, changed = m(image, [[v + 0.5 * torch.randn_like(v) for v in group] for group in views], ids_keep, ids_mask)
    assert torch.equal(pred["nsp"], same["nsp"]) and loss != other and not torch.allclose(pred["nsp"], changed["nsp"])


@pytest.mark.parametrize("method", ["mim", "lmim", "mnsp", dict(METHODS["mnsp"], guide="none"), dict(METHODS["mnsp"], guide="still")])
def test_mim_does_not_see_hidden_pixels(method):
    """A hidden patch that reaches the encoder, by a wrong index or by a mask applied after attention."""
    m, image, views, ids_keep, ids_mask = batch(method)
    p, q = m.encoder.patch
    cover = torch.zeros(len(image), math.prod(m.encoder.grid)).scatter(1, ids_mask, 1.0).view(-1, 1, *m.encoder.grid)
    cover = cover.repeat_interleave(p, 2).repeat_interleave(q, 3)
    with torch.no_grad():
        _, _, pred = m.eval()(image, views, ids_keep, ids_mask)
        _, _, same = m(image + cover * torch.randn_like(image), views, ids_keep, ids_mask)
        _, _, changed = m(image + (1 - cover) * torch.randn_like(image), views, ids_keep, ids_mask)
        _, _, other = m(image, [[v + 0.5 * torch.randn_like(v) for v in group] for group in views], ids_keep, ids_mask)
    assert torch.equal(pred["mim"], same["mim"]) and not torch.allclose(pred["mim"], changed["mim"])
    assert torch.equal(pred["mim"], other["mim"]) == (m.method["guide"] == "none")


# ---- alignment

def test_infonce_equals_a_loop():
    """A wrong positive, or one direction counted twice."""
    torch.manual_seed(0)
    a, b = torch.randn(6, 8), torch.randn(6, 8)
    cos = lambda x, y: float(x @ y / x.norm() / y.norm())
    rows = [-math.log(math.exp(cos(x[i], y[i]) / 0.2) / sum(math.exp(cos(x[i], y[j]) / 0.2) for j in range(6)))
            for x, y in ((a, b), (b, a)) for i in range(6)]
    assert float(model.align_infonce(a, b)) == pytest.approx(sum(rows) / 12, rel=1e-5)


def test_spread():
    """A spread that does not fall to 0 on collapse would hide it."""
    assert float(model.spread(torch.ones(5, 8))) == pytest.approx(0, abs=1e-3)
    assert float(model.spread(torch.cat([torch.eye(8), -torch.eye(8)]))) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_every_parameter(method):
    """A parameter that no loss reaches makes DDP hang; a term that is weighed twice or not at all."""
    m, *inputs = batch(method)
    loss, terms, _ = m(*inputs)
    loss.backward()
    assert [n for n, p in m.named_parameters() if p.requires_grad and p.grad is None] == []
    assert {t for t in ("mim", "nsp", "align") if METHODS[method][t]} == set(terms) - {"spread"}
    torch.testing.assert_close(loss, sum(v for k, v in terms.items() if k != "spread"))


@pytest.fixture
def one_rank():
    """A process group, as under torchrun."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("method", METHODS)
def test_compiled_step_has_no_graph_break_and_equals_eager(method, monkeypatch, one_rank):
    """An .item(), a boolean index or a Python branch on data in the loss path; a collective that the compiler cannot follow."""
    nano = MODELS["vit_nano"]
    monkeypatch.setitem(MODELS, "vit_nano", dict(nano, encoder=dict(nano["encoder"], depth=2)))      # every block is the same code
    m, *inputs = batch(method, n=2)
    loss, _, pred = torch.compile(m, fullgraph=True, backend="aot_eager")(*inputs)
    expected, _, same = m(*inputs)
    torch.testing.assert_close(loss, expected)
    for name in pred:
        torch.testing.assert_close(pred[name], same[name], atol=1e-5, rtol=1e-4)


# ---- sizes and checkpoints

def test_parameter_counts_are_the_papers():
    """A missing bias or a wrong width: 21.4 M encoder, 35.8 M recognizer (LMIM)."""
    config = MODELS["vit_small"]["encoder"]
    recognizer = Recognizer(ViT(**config), "a" * 94, **MODELS["vit_small"]["reader"])
    count = lambda m: sum(p.numel() for p in m.parameters()) / 1e6
    assert count(recognizer.encoder) == pytest.approx(21.4, rel=0.01) and count(recognizer) == pytest.approx(35.8, rel=0.01)


def mae_state(width=64, depth=2, grid=(16, 16)):
    """A state dict in MAE's format, with the square position grid of MAERec's files and a decoder to pass over."""
    vit = ViT(depth, width, 1)
    state = {k: torch.randn_like(v) for k, v in vit.state_dict().items()}
    state["pos_embed"] = F.pad(model.sincos(width, grid, grid), (0, 0, 1, 0))[None]
    return state, {"decoder_embed.weight": torch.zeros(3, 3), "mask_token": torch.zeros(1, 1, 3), "decoder_pos_embed": torch.zeros(1, 9, 3)}


@pytest.mark.parametrize("wrap", ["bare", "mae", "lmim"])
def test_foreign_encoders_load_unchanged(tmp_path, wrap):
    """A tensor renamed, transposed or made anew on loading, above all the stored 16 x 16 position grid of 8 x 32 patches."""
    state, rest = mae_state()
    full = {**{("model_maeenc." if wrap == "lmim" else "") + k: v for k, v in state.items()}, **rest}
    torch.save(full if wrap == "bare" else {"model": full, "args": argparse.Namespace(lr=1)}, tmp_path / "x.pth")
    encoder = model.load_encoder(tmp_path / "x.pth")
    assert encoder.grid == (8, 32) and encoder.matched == len(state) and encoder.blocks[0].attn.heads == 1
    assert all(torch.equal(encoder.state_dict()[k], v) for k, v in state.items())


@pytest.mark.parametrize("name", MODELS)
def test_bare_encoders_have_their_heads(tmp_path, name):
    """A size of MODELS without our `args` beside it, or with other patches (README, "Target, mask, patch"), read with another
    number of heads: all tensors match, and every feature is wrong."""
    for patch in MODELS[name]["encoder"]["patch"], (4, 8):
        torch.save({"model": ViT(**dict(MODELS[name]["encoder"], patch=patch)).state_dict()}, tmp_path / "bare.pt")
        encoder = model.load_encoder(str(tmp_path / "bare.pt"))
        assert {block.attn.heads for block in encoder.blocks} == {MODELS[name]["encoder"]["heads"]} and encoder.patch == patch


def test_bad_checkpoints_are_one_line(tmp_path):
    """A traceback, a pickle that runs, or an encoder loaded in part and trained on as if it were whole."""
    ran = tmp_path / "ran"

    class Bomb:
        def __reduce__(self):
            return (open, (str(ran), "w"))
    torch.save({"model": Bomb()}, tmp_path / "bomb.pt")
    (tmp_path / "text.pt").write_text("no checkpoint")
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps({"model": Bomb()}))
    (tmp_path / "old.pt").write_bytes(bytes.fromhex("80025801"))              # struct.error
    state, _ = mae_state()
    torch.save({k: v for k, v in state.items() if "norm.weight" not in k}, tmp_path / "part.pt")
    torch.save(dict(state, pos_embed=state["pos_embed"][:, :65]), tmp_path / "grid.pt")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    torch.save(dict(state, **{"patch_embed.proj.weight": torch.zeros(64, 48)}), tmp_path / "flat.pt")
    torch.save({**state, 1: 2}, tmp_path / "numbers.pt")
    for name in ("bomb", "text", "empty", "pickle", "old", "part", "grid", "flat", "other", "missing"):
        with pytest.raises(UserError) as e, warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            model.load_encoder(str(tmp_path / f"{name}.pt"))
        assert "\n" not in str(e.value) and name in str(e.value) and not heard  # torch's warnings are lines on the terminal too
    assert not ran.exists() and model.load_encoder(str(tmp_path / "numbers.pt")).matched == len(state)


# ---- the recognizer

def recognizer(seed=0, n=6):
    torch.manual_seed(seed)
    config = MODELS["vit_nano"]["encoder"]
    m = Recognizer(ViT(**config), CHARS, max_length=8, **MODELS["vit_nano"]["reader"]).eval()
    m.classifier.weight.data *= 6                                            # sharp enough to read different things
    return m, torch.rand(n, 3, 32, 128) * 2 - 1


def test_cached_decoding_equals_decoding_from_scratch():
    """A cache that is one step behind, a position that starts anew, or a word that goes on after its end or beyond max_length."""
    m, images = recognizer()
    ids, probs = m.decode(images)
    again = torch.full((len(images), 1), m.start)
    with torch.no_grad():
        _, memory = m.encode(images)
        for t in range(ids.shape[1]):
            logits = m.step(again, memory)[0][:, -1]
            logits[:, m.pad:] = -math.inf
            chosen = logits.argmax(-1) if t < m.max_length else torch.full((len(images),), m.end)
            p = logits.softmax(-1).gather(1, chosen[:, None])[:, 0]
            alive = ~(ids[:, :t] == m.end).any(1)
            assert torch.equal(chosen[alive], ids[alive, t])
            torch.testing.assert_close(p[alive], probs[alive, t], atol=1e-5, rtol=1e-4)
            assert (ids[~alive, t] == m.end).all() and (probs[~alive, t] == 1).all()
            again = torch.cat([again, ids[:, t:t + 1]], dim=1)
        alive = F.pad((ids == m.end).cumsum(1), (1, -1)) == 0                # and as tests/bench.py reads, which it is timed against
        assert torch.equal(bench.prefixes(m, images)[:, :ids.shape[1]][alive], ids[alive])


def test_teacher_forcing_equals_a_plain_decoder():
    """A causal mask that lets a character see the next one, or a memory of the wrong layer."""
    m, images = recognizer()
    targets = torch.randint(0, 36, (6, 5))
    targets[:, 3], targets[:, 4] = m.end, m.pad
    loss, terms, logits = m(images, targets)
    memory = plain_linear(plain_vit(m.encoder, images)[:, 1:], m.proj[0])
    memory = plain_norm(memory, m.proj[1])
    x = m.embed(torch.cat([torch.full((6, 1), m.start), targets[:, :-1]], 1)) + m.pos[:, :5]
    for layer in m.layers:
        h = plain_norm(x, layer.norm1)
        x = x + plain_cross(layer.self_attn, h, h, causal=True)
        x = x + plain_cross(layer.cross_attn, plain_norm(x, layer.norm2), memory)
        x = x + plain_mlp(plain_norm(x, layer.norm3), layer.mlp)
    expected = plain_linear(plain_norm(x, m.norm), m.classifier)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    each = -expected.log_softmax(-1).gather(2, targets[..., None])[..., 0]
    torch.testing.assert_close(loss, each[:, :4].sum() / 6, atol=1e-4, rtol=1e-4)
