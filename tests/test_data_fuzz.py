"""Damaged and strange tars and pictures from a generator: none crashes, none hangs, all are counted.

The suite tries 10 tars of 10 examples; `pytest -m 'full and not aot and not mutants'` tries 1,000 of them.
"""

import io
import json
import resource
import tarfile
import time

import numpy as np
import pytest
from PIL import Image

from limoe.data.images import Preprocess
from limoe.data.index import build_index
from limoe.data.index_file import open_index
from limoe.data.source import Bad, Decoded, ShardSource

PER_TAR = 10
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
MODES = ("RGB", "L", "RGBA", "P", "1", "LA", "CMYK", "I;16")
NAMES = (
    "{}.jpg",
    "{}.PNG",
    "{}.webp",
    "{}.gif",
    "{}.bmp",
    "{}.jpeg",
    "{}.tiff",
    "{}",
    "a/b/{}.jpg",
    "../{}.jpg",
    "{}.x.jpg",
)
TEXTS = (b"a red ring", b"", b" \n", b"\xff\xfe", b"\0" * 40, "größer".encode(), b"x" * (2**20 + 1))
FACTS = (b"{}", b"{", b"[1]", b'{"class": 3}', b"null", b"[" * 5000, b"NaN")
KINDS = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE)
TARS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)


def damaged(content: bytes, draws: np.random.Generator) -> bytes:
    """Flip, cut, repeat, insert or exchange bytes."""
    if not content:
        return content
    at, length = int(draws.integers(len(content))), int(draws.integers(1, 64))
    noise = draws.bytes(length)
    return (
        content[:at] + bytes([content[at] ^ (1 << int(draws.integers(8)))]) + content[at + 1 :],
        content[:at],
        content[:at] + noise + content[at:],
        content[:at] + noise + content[at + length :],
        content[:at] + content[at + length :],
        content[:at] + content[at // 2 : at] * 3 + content[at:],
        content[:at] + bytes(length) + content[at + length :],
        content + noise,
    )[draws.integers(8)]


def picture(draws: np.random.Generator) -> bytes:
    """A small picture of any format and mode; one in three is damaged."""
    width, height = draws.integers(1, 60, 2).tolist()
    file, mode, kind = io.BytesIO(), str(draws.choice(MODES)), str(draws.choice(FORMATS))
    pixels = Image.fromarray(draws.integers(0, 256, (height, width, 3), np.uint8))
    try:
        pixels.convert(mode).save(file, kind)
    except (OSError, ValueError):  # a format without this mode
        pixels.save(file, "PNG")
    content = file.getvalue()
    for _ in range(max(0, draws.integers(-3, 3))):
        content = damaged(content, draws)
    return content


def strange_tar(seed: int) -> bytes:
    """A tar of ten examples or more; two in three are damaged as a whole."""
    draws = np.random.default_rng(seed)
    file, kind = io.BytesIO(), TARS[draws.integers(3)]
    longest = 90 if kind == tarfile.USTAR_FORMAT else 400
    with tarfile.open(fileobj=file, mode="w", format=kind) as tar:
        for number in range(PER_TAR):
            key = f"{number:03}" if draws.random() < 0.9 else "k" * int(draws.integers(1, longest))
            members = [
                (str(draws.choice(NAMES) if draws.random() < 0.3 else "{}.jpg"), picture(draws)),
                ("{}.txt", TEXTS[draws.integers(len(TEXTS))] if draws.random() < 0.3 else b"a caption"),
                ("{}.json", FACTS[draws.integers(len(FACTS))]),
                ("{}.cls", draws.choice([b"3", b"x", b""])),
            ]
            for member in (
                draws.integers(0, 4, draws.integers(0, 3)) if draws.random() < 0.2 else range(draws.integers(2, 5))
            ):
                name, content = members[member]
                info = tarfile.TarInfo(name.format(key))
                info.type = KINDS[draws.integers(6)] if draws.random() < 0.05 else tarfile.REGTYPE
                info.size = len(content) if info.isreg() else 0
                tar.addfile(info, io.BytesIO(content) if info.isreg() else None)
    content = file.getvalue()
    if draws.random() < 0.2:
        content += content if draws.random() < 0.5 else draws.bytes(700)
    for _ in range(draws.integers(0, 3)):
        content = damaged(content, draws)
    return content


def check(tmp_path, seed):
    """Read a strange tar, and return how many of its examples were good and bad."""
    path = tmp_path / f"{seed}.tar"
    path.write_bytes(strange_tar(seed))
    began, built = time.monotonic(), build_index(path)
    index = open_index(path)
    keys = [index.entry(row).key for row in range(len(index))]
    assert keys == built.keys and len(set(keys)) == len(keys)
    if not keys or built.damage.startswith("the tar is not a tar"):
        assert built.damage or built.ignored or path.stat().st_size <= 10_240
        return 0, 0
    for metadata in (False, True):
        counts = [0, 0]
        source = ShardSource(path, preprocess=Preprocess(8), metadata=metadata)
        for number in range(len(source)):
            example = source[number]
            assert isinstance(example, Bad | Decoded) and example.key == keys[number]
            if isinstance(example, Bad):
                assert example.reason.strip()
            else:
                assert example.image.shape == (8, 8, 3) and example.image.dtype == np.uint8
            counts[isinstance(example, Bad)] += 1
    if built.damage:
        assert built.damage in source.damages[0] and counts[1], "a loss is at least one bad example where all is read"
    assert time.monotonic() - began < 10, "it hangs"
    json.dumps(source.contents)
    path.unlink()
    return counts


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("num_tars", [10, pytest.param(1_000, marks=pytest.mark.full)])
def test_strange_tars_are_read_and_counted(tmp_path, num_tars):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    good, bad = np.sum([check(tmp_path, seed) for seed in range(num_tars)], axis=0)
    assert good > num_tars and bad > num_tars, "both are there, or the generator is of no use"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 700_000, "kB"
