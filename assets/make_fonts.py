"""Copies typefaces of every kind into one folder, for --fonts, from those of Debian's package
texlive-fonts-extra (1,680 files), which need not be installed:

    apt-get download texlive-fonts-extra
    dpkg-deb --extract texlive-fonts-extra_*.deb texlive
    python assets/make_fonts.py texlive fonts

Taken are fonts that have all 94 characters of a keyboard, at most six of a folder.
"""
import os
import shutil
import sys
from collections import Counter

sys.path.insert(0, os.path.join(os.path.dirname(__file__), ".."))
from common import Parser, UserError, run_main, say
from render import PRINTABLE, describe_fonts, font_fault, font_files_under

MAX_OF_FOLDER = 6               # so that a family of sixty weights does not drown the others
LEFT_OUT = [
    "LibertinusKeyboard-Regular.otf",       # draws keys with letters on them
    "ffmlq10.otf",                          # a tenth as wide as other fonts
]


def main():
    parser = Parser(__doc__)
    parser.add_argument("source", help="a folder of fonts, and of folders of fonts")
    parser.add_argument("target", help="the folder to make")
    args = parser.parse_args()
    if os.path.exists(args.target):
        raise UserError(f"{args.target}: is there already; name a new folder")
    chosen = choose_fonts(args.source)
    if not chosen:
        raise UserError(f"{args.source}: no font with all of a keyboard's characters in it")
    for name, times in Counter(map(os.path.basename, chosen)).items():
        if times > 1:
            raise UserError(f"{args.source}: {times} fonts have the name {name}; rename them")
    os.makedirs(args.target)
    for path in chosen:
        shutil.copy(path, args.target)
    say(f"{args.target}: {describe_fonts(chosen)}")


def choose_fonts(source):
    """The paths of the fonts to copy."""
    by_folder = {}
    for path in font_files_under(source):
        if os.path.basename(path) not in LEFT_OUT and font_fault(path, PRINTABLE) is None:
            by_folder.setdefault(os.path.dirname(path), []).append(path)

    chosen = []
    for paths in by_folder.values():
        chosen += spread(paths, MAX_OF_FOLDER)
    return chosen


def spread(items, count):
    """At most `count` of a list, at equal distances: a folder's fonts stand in the order of their
    names, so bold and italic ones are among the chosen."""
    if len(items) <= count:
        return items
    return [items[i * len(items) // count] for i in range(count)]


if __name__ == "__main__":
    run_main(main)
