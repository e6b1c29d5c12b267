"""What opening the index of 10^6 to 10^8 examples takes, from index files that are made without tars.

Each shard has 10,000 examples: a picture of 15 to 45 kB, a caption and metadata. A last line opens 10,000 shards of one
example. Needs 1.5 GB of disk.

    python benchmarks/index_size.py [--lookups=5000]
"""

import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
from absl import app, flags

from limoe.data import files
from limoe.data.index import ShardIndex
from limoe.data.index_file import Index, encoded, stored_index

LOOKUPS = flags.DEFINE_integer("lookups", 5000, "examples that are looked up at random", lower_bound=1)

# Shards, and examples of each.
CASES = ((100, 10_000), (1_000, 10_000), (10_000, 10_000), (10_000, 1))


def synthetic_index(num_examples: int) -> ShardIndex:
    """Make an index as of a tar of pictures with captions and metadata, without the tar."""
    rng = np.random.default_rng(0)
    sizes = np.stack([rng.integers(15_000, 45_000, num_examples), *rng.integers(20, 400, (2, num_examples))], axis=1)
    ends = np.cumsum((512 + -(-sizes // 512) * 512).reshape(-1)).reshape(-1, 3)
    offsets = np.concatenate([[0], ends.reshape(-1)[:-1]]).reshape(-1, 3) + 512
    image, caption, metadata = (np.stack([offsets[:, kind], sizes[:, kind]], axis=1) for kind in range(3))
    none = np.tile(np.array([[-1, 0]]), (num_examples, 1))
    keys = [f"{number:09d}" for number in range(num_examples)]
    return ShardIndex(files.Stamp(int(ends[-1, -1]), 1), keys, image, caption, metadata, none, "", {}, {})


def resident_megabytes() -> float:
    """Read the resident memory of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6


def measure(folder: str, num_shards: int, num_examples: int) -> str:
    """Open all indexes, look examples up, and describe what both took as a row of a table."""
    index = synthetic_index(num_examples)
    content = encoded(index)
    for number in range(num_shards):
        files.write_bytes(os.path.join(folder, f"{number}.index"), content)
    before, began = resident_megabytes(), time.perf_counter()
    opened: list[Index] = []
    for number in range(num_shards):
        found = stored_index(f"{number}.tar", os.path.join(folder, f"{number}.index"), index.stamp)
        assert found is not None
        opened.append(found)
    seconds = time.perf_counter() - began
    draw, began = random.Random(0), time.perf_counter()
    for _ in range(LOOKUPS.value):
        opened[draw.randrange(num_shards)].entry(draw.randrange(num_examples))
    lookup = (time.perf_counter() - began) / LOOKUPS.value
    return (
        f"| {num_shards * num_examples:,} | {num_shards:,} | {num_shards * len(content) / 1e6:,.1f} MB "
        f"| {seconds:.2f} s, {seconds / num_shards * 1e3:.3f} ms a shard | {resident_megabytes() - before:.1f} MB "
        f"| {lookup * 1e6:.0f} us |"
    )


def main(argv: Sequence[str]) -> None:
    """Print a row for each case."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
    print("| examples | shards | index files | open | memory | looking up |\n|---|---|---|---|---|---|")
    for num_shards, num_examples in CASES:
        with tempfile.TemporaryDirectory() as folder:
            print(measure(folder, num_shards, num_examples), flush=True)


if __name__ == "__main__":
    app.run(main)
