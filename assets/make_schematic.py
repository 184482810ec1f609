"""Draws schematic.png, the picture in README.md of how mnsp works:

    python assets/make_schematic.py

The pictures in it are what pretrain.py makes of one rendered word: its views, its hidden patches,
its target. Only the arrows and the words are drawn by hand. Letters are in Pillow's own face, the
word's too, so that every machine draws the same.
"""
import pathlib
import sys
from types import SimpleNamespace

import torch
from PIL import Image, ImageDraw, ImageFont

ASSETS = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(ASSETS.parent))

from common import H, W                                                         # noqa: E402
from model import (                                                             # noqa: E402
    METHODS, normalize_pixels, patch_norm, patchify, take, unpatchify,
)
from pretrain import (                                                          # noqa: E402
    WHITE_AT, draw_numbers, make_mask, make_views, put_in, to_uint8,
)
from render import PRINTABLE, render_word                                       # noqa: E402

WORD = 2891                     # which rendered word of seed 0: one that is clear
STEP = 0                        # whose random numbers: the views of this step differ much
MASK_RATIO = 0.8                # the default of --mask_ratio
SCALES = [(16, 64)]             # the default of --scales
PATCH = (8, 8)                  # of no size in MODELS: a person sees it better than 4 x 4

# ---- where things are, in pixels of the picture

SIZE = (1600, 700)
ZOOM = 2                        # pixels of the picture for a pixel of a crop
PICTURE_W, PICTURE_H = ZOOM * W, ZOOM * H

# The left rims of the columns.
CROP_X, VIEW_X, ENCODER_X, TOKENS_X, DECODER_X, TARGET_X = 20, 364, 670, 868, 1048, 1292
BOX_W = 126                     # of "encoder" and "decoder"
BOX_H = 68

# The middles of the rows of pictures. The first two are mim's, the third is nsp's.
SEEN_Y, GUIDE_Y, COARSE_Y = 182, 304, 546
MIM_Y = (SEEN_Y + GUIDE_Y) // 2
BANDS = {"mim": (58, 378), "nsp": (432, 618)}       # top, bottom
BAND_X = (342, 1586)                                # left, right
ALIGN_Y = 405                                       # its words, between the bands
ANSWER_X, ANSWER_Y = 1566, 648                      # the line from the crop to the answers

# ---- colours and sizes

WHITE, INK, SOFT = (255, 255, 255), (40, 44, 52), (104, 110, 120)
BAND = {"mim": (232, 241, 250), "nsp": (233, 245, 234)}
TERM = {"mim": (28, 96, 160), "nsp": (38, 120, 60), "align": (138, 60, 150)}
ENCODER, DECODER = (255, 226, 168), (250, 208, 196)
PATCH_TOKEN = (120, 146, 176)
TITLE, TEXT, SMALL = 32, 25, 22


def main():
    draw_schematic().save(ASSETS / "schematic.png", optimize=True)


# ---- the pictures in it

def make_pictures():
    """{name: uint8 (3, h, w)} of one word: the crop, what mim and nsp see, what they predict."""
    image, _, _ = render_word(0, WORD, fonts=[None], charset=PRINTABLE)
    images = torch.from_numpy(image)[None]                              # (1, 3, 32, 128)
    grid = (H // PATCH[0], W // PATCH[1])
    method = METHODS["mnsp"]
    args = SimpleNamespace(seed=0, mask="random")
    numbers = draw_numbers(STEP, len(images), method, args, grid)

    guide, coarse = make_views(images, method, SCALES, numbers, strength=1.0)
    ids_keep, ids_mask = make_mask(numbers["mask"], args.mask, MASK_RATIO, grid, PATCH)
    pixels = patchify(normalize_pixels(images), PATCH)                  # (1, N, 3*p*q)
    grey = torch.zeros_like(take(pixels, ids_mask))
    seen = put_in(pixels, ids_mask, grey)
    target, _, _ = patch_norm(pixels)
    target = target / WHITE_AT
    white = torch.ones_like(take(pixels, ids_keep))
    hidden_target = put_in(target, ids_keep, white)     # mim is not asked for visible patches

    return {
        "crop": images[0],
        "seen": to_uint8(unpatchify(seen, grid, PATCH)[0]),
        "guide": to_uint8(guide[0]),
        "coarse": to_uint8(coarse[0][0]),
        "mim target": to_uint8(unpatchify(hidden_target, grid, PATCH)[0]),
        "nsp target": to_uint8(unpatchify(target, grid, PATCH)[0]),
    }


# ---- the whole

def draw_schematic():
    """-> an image of SIZE."""
    sheet = Image.new("RGB", SIZE, WHITE)
    draw = ImageDraw.Draw(sheet)
    left, right = BAND_X
    for term, (top, bottom) in BANDS.items():
        draw.rounded_rectangle((left, top, right, bottom), 18, BAND[term])
    draw_views(draw)
    draw_networks(draw)
    draw_align(draw)
    draw_answers(draw)
    draw_pictures(sheet, draw)
    return sheet


# Of each picture the left rim and the middle, and what is written above and below.
PICTURES = {
    "crop": (CROP_X, GUIDE_Y, "the crop of a word", "32 x 128 pixels"),
    "seen": (VIEW_X, SEEN_Y, "the crop, four fifths hidden", ""),
    "guide": (VIEW_X, GUIDE_Y, "guide: a small copy,", "moved, bent, recoloured"),
    "coarse": (VIEW_X, COARSE_Y, "a small copy, in place,", "recoloured"),
    "mim target": (TARGET_X, MIM_Y, "the hidden patches", ""),
    "nsp target": (TARGET_X, COARSE_Y, "every patch", ""),
}


def draw_pictures(sheet, draw):
    """The pictures, each with its words."""
    pictures = make_pictures()
    for name, (x, y, above, below) in PICTURES.items():
        picture = Image.fromarray(pictures[name].permute(1, 2, 0).contiguous().numpy())
        w, h = ZOOM * picture.width, ZOOM * picture.height
        picture = picture.resize((w, h), Image.Resampling.NEAREST)
        top = y - h // 2
        sheet.paste(picture, (x, top))
        draw.rectangle((x - 1, top - 1, x + w, top + h), outline=SOFT)
        write(draw, x, top - 18, above, SMALL)
        write(draw, x, top + h + 18, below, SMALL)


def draw_views(draw):
    """What is made of the crop: an arrow to each of the three pictures that are encoded."""
    crop_right = CROP_X + PICTURE_W
    fork_x = BAND_X[0] - 22
    line(draw, [(crop_right, GUIDE_Y), (fork_x, GUIDE_Y)])
    line(draw, [(fork_x, SEEN_Y), (fork_x, COARSE_Y)])
    for y in (SEEN_Y, GUIDE_Y, COARSE_Y):
        arrow(draw, [(fork_x, y), (VIEW_X - 3, y)])


def draw_networks(draw):
    """From the views to the encoder, to the decoder, to what is predicted."""
    mim_top, nsp_top = BANDS["mim"][0], BANDS["nsp"][0]
    write(draw, VIEW_X, mim_top + 30, "mim: fill in what is hidden", TITLE, TERM["mim"])
    write(draw, VIEW_X, nsp_top + 30, "nsp: draw it from a small copy", TITLE, TERM["nsp"])

    small_right = VIEW_X + ZOOM * SCALES[-1][1]
    view_right = {SEEN_Y: VIEW_X + PICTURE_W, GUIDE_Y: small_right, COARSE_Y: small_right}
    for y in (SEEN_Y, GUIDE_Y, COARSE_Y):
        arrow(draw, [(view_right[y], y), (ENCODER_X - 2, y)])
        box(draw, ENCODER_X, y, y, ENCODER, "encoder")
        arrow(draw, [(ENCODER_X + BOX_W, y), (TOKENS_X - 6, y)])
        draw_tokens(draw, TOKENS_X, y)
        arrow(draw, [(TOKENS_X + TOKENS_W + 6, y), (DECODER_X - 2, y)])
    box(draw, DECODER_X, SEEN_Y, GUIDE_Y, DECODER, "decoder")
    box(draw, DECODER_X, COARSE_Y, COARSE_Y, DECODER, "decoder")
    say_same(draw, ENCODER_X, GUIDE_Y)
    say_same(draw, ENCODER_X, COARSE_Y)
    say_same(draw, DECODER_X, COARSE_Y)

    for y in (MIM_Y, COARSE_Y):
        arrow(draw, [(DECODER_X + BOX_W, y), (TARGET_X - 4, y)])
        middle = (DECODER_X + BOX_W + TARGET_X - 10) // 2
        write(draw, middle, y - 20, "predicts", SMALL, INK, "mm")


def say_same(draw, x, y):
    """Below a box: its weights are those of the box above."""
    write(draw, x + BOX_W // 2, y + BOX_H // 2 + 20, "the same", SMALL, SOFT, "mm")


N_TOKENS = 6                    # that are drawn; there are more
TOKEN, TOKEN_GAP = 16, 6
TOKENS_W = N_TOKENS * (TOKEN + TOKEN_GAP) - TOKEN_GAP


def draw_tokens(draw, x, y):
    """A row of squares: [cls], which stands for the whole word, then patches."""
    for k in range(N_TOKENS):
        colour = PATCH_TOKEN
        if k == 0:
            colour = TERM["align"]
        draw_token(draw, x + k * (TOKEN + TOKEN_GAP), y, colour)


def draw_token(draw, x, y, colour):
    """A square; x is its left rim, y its middle."""
    draw.rectangle((x, y - TOKEN // 2, x + TOKEN, y + TOKEN // 2), colour)


def draw_align(draw):
    """The [cls] of nsp's copy is compared with the guide's, and with the masked crop's."""
    colour = TERM["align"]
    x = TOKENS_X + TOKEN // 2
    aside = TOKENS_X - 30
    rim = TOKEN // 2 + 5
    fork_y = ALIGN_Y + 40
    dashed(draw, [(x, COARSE_Y - rim), (x, GUIDE_Y + rim)], colour)
    turn_y = SEEN_Y + 44
    way = [(x, fork_y), (aside, fork_y), (aside, turn_y), (x, turn_y), (x, SEEN_Y + rim)]
    dashed(draw, way, colour)
    write(draw, x + 18, ALIGN_Y, "align: the [cls] of one word agree", TITLE, colour)

    # what the squares are
    y = 28
    draw_token(draw, TOKENS_X, y, colour)
    write(draw, TOKENS_X + 26, y, "[cls], a vector for the whole word", SMALL)
    draw_token(draw, TARGET_X, y, PATCH_TOKEN)
    write(draw, TARGET_X + 26, y, "a vector for a patch", SMALL)


def draw_answers(draw):
    """Along the foot, from the crop to what is to be predicted."""
    crop_middle = CROP_X + PICTURE_W // 2
    below_words = GUIDE_Y + PICTURE_H // 2 + 36
    target_right = TARGET_X + PICTURE_W + 3
    start, corner = (crop_middle, below_words), (crop_middle, ANSWER_Y)
    other_corner = (ANSWER_X, ANSWER_Y)
    dashed(draw, [start, corner, other_corner, (ANSWER_X, MIM_Y)], SOFT)
    for y in (MIM_Y, COARSE_Y):
        arrow(draw, [(ANSWER_X, y), (target_right, y)], SOFT)
    words = "The answer is the crop itself: the pixels of each patch, normalised. "
    words += "No label is needed."
    write(draw, VIEW_X, ANSWER_Y + 26, words, SMALL)


# ---- lines, boxes and letters

LINE_W = 3
HEAD = 9                        # half the breadth of an arrow's head
DASH, DASH_GAP = 9, 7


def line(draw, points, colour=INK):
    draw.line(points, colour, LINE_W)


def arrow(draw, points, colour=INK):
    """A level line between two points, with a head at the second."""
    line(draw, points, colour)
    (x0, _), (x, y) = points
    back = x + 2 * HEAD
    if x > x0:
        back = x - 2 * HEAD
    draw.polygon([(x, y), (back, y - HEAD), (back, y + HEAD)], colour)


def dashed(draw, points, colour):
    """A line of dashes through points; each piece is level or upright."""
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        length = abs(x1 - x0) + abs(y1 - y0)
        right = (x1 - x0) / length
        down = (y1 - y0) / length
        for start in range(0, length, DASH + DASH_GAP):
            end = min(start + DASH, length)
            dash = (x0 + right * start, y0 + down * start, x0 + right * end, y0 + down * end)
            draw.line(dash, colour, LINE_W)


def box(draw, x, first_y, last_y, colour, name):
    """A box from one row to another, or in one row alone."""
    top, bottom = first_y - BOX_H // 2, last_y + BOX_H // 2
    draw.rounded_rectangle((x, top, x + BOX_W, bottom), 12, colour, INK, 2)
    write(draw, x + BOX_W // 2, (top + bottom) // 2, name, TEXT, INK, "mm")


def write(draw, x, y, words, size, colour=INK, anchor="lm"):
    """Words at (x, y), which is the point of them that Pillow calls anchor: "lm" is the middle of
    their left side, "mm" their middle."""
    font = ImageFont.load_default(size)
    draw.text((x, y), words, colour, font, anchor)


if __name__ == "__main__":
    main()
