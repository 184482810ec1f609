"""Makes words.txt, the words that render.py draws, from SCOWL's lists (Debian's package
scowl; words-copyright.txt has its notice):

    apt-get install scowl
    python assets/make_words.py /usr/share/dict/scowl > assets/words.txt
"""
import hashlib
import pathlib
import re
import sys

# SCOWL's lists are numbered by how rare their words are: 10 holds the most common ones.
# From 40 on only names are taken, of people, places and brands.
CLASSES = [10, 20, 35, 40, 50]
LISTS = {
    10: ["english-words", "american-words", "english-upper", "*-proper-names"],
    20: ["english-words", "american-words", "english-upper", "*-proper-names"],
    35: ["english-words", "american-words", "english-upper", "*-proper-names"],
    40: ["english-upper", "*-proper-names"],
    50: ["english-upper", "*-proper-names"],
}
MAX_WORDS = 50_000

# Words that signs have much more often than books: they come first.
SIGN_WORDS = """
    open sale exit stop street road park hotel bank cafe shop free city market
    school police taxi office
""".split()

# Obscenities, slurs and worse, which nobody wants to find on a picture for a course: the
# first digits of their SHA-256, so that they do not stand here either.
LEFT_OUT = """
    0508a634 0632813d 09747467 0c9eff9d 0cf97c16 0f28c496 11cf8376 13a465fc 13aa420a
    158869a9 1b830448 1d0864b8 1e02eec4 1e8c25b5 2062f800 2189c0ed 245c20d3 27e030b8
    27eb0c4a 2a6060b5 2a6937d7 2b392732 2b5fb5b4 2c32c156 2d66da9f 2f34b7a4 35d7ccc6
    38012c26 3b873fc1 3d05bf51 3f975152 41b4d5e8 45a5717a 45cd3e1b 4ae19158 4b18aefe
    4c59c12a 51ae06cf 5304378d 538773a2 5574ef77 59cc3cb8 5a36615e 5a9d9dce 5d26ffd8
    63bd9333 67d3791f 67e588bd 693ee996 6adc452d 737dd1bc 74305616 76f03622 78a00d18
    7902e270 796e43a5 7ad1e368 7c686cf2 8171c4ec 867d7897 8693f216 86eaefb1 8f09b956
    8f5083e3 937d56e4 94a2b576 984b5c6e 98980840 9ae315a9 9e2506a3 9e6a9540 a1c1a3b7
    a24efab8 a3686065 a6ee0e6b a76d588d acf45488 ad505b0b ade74a96 af48d859 afe92f9e
    b04a8a40 b0f1b038 ba6fb01a ba7463ed bbe195a3 bd331fb1 be2db2bf c1cabb6f c22f315f
    c2c3b68b c5975840 c8bd849e c905e73d c91d7a20 cbb06149 cbbd0f71 ccb8b885 ccff74c2
    d11f3961 d2296194 d31f9b0c d6816f47 d75a838d d7f1e232 d84f691f dbff2575 dc2abe4e
    dd32831e dd971cc1 dfb0ce07 e1b73076 e512a055 e9b64384 eb9b0354 ebc98c1e ebec03d8
    eff26b18 f59e28f8 f6952d6e f8fa90ea f9d0d9b1 fa1597ae fd70ad90 fda6539b fdca9cb0
""".split()


def main():
    folder = pathlib.Path(sys.argv[1])
    words = {}                          # as keys: a dict keeps their order
    for word in SIGN_WORDS:
        words[word] = True
    for number in CLASSES:
        for word in sorted(words_of_class(folder, number), key=digest):
            words[word] = True
    for word in list(words)[:MAX_WORDS]:
        print(word)


def words_of_class(folder, number):
    """A set of lower-case words: 1 to 14 letters a to z, one of them a vowel or y."""
    found = set()
    for name in LISTS[number]:
        for path in folder.glob(f"{name}.{number}"):
            for word in path.read_text("latin-1").lower().split():
                # This leaves out possessives, such as "john's", and accents.
                if not re.fullmatch("[a-z]{1,14}", word):
                    continue
                if re.search("[aeiouy]", word) and digest(word)[:8] not in LEFT_OUT:
                    found.add(word)
    return found


def digest(word):
    """The order within a class: the same everywhere, and no letter comes first."""
    return hashlib.sha256(word.encode()).hexdigest()


if __name__ == "__main__":
    main()
