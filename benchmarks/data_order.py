"""How well the orders of `data.order` mix: a million examples, of shards of 10,000 that differ, in batches of 4,096.

Each shard has a value of its own (standard normal), which all its examples have. Printed for each order: the
correlation of the value between neighbouring rows of a batch; the standard deviation of a batch's mean value over that
of rows drawn at random; the correlation of the means of one batch and the next; and how many of the 256 stretches of
the data a batch has.

    python benchmarks/data_order.py
"""

import os
import sys
from collections.abc import Sequence

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
from absl import app

from limoe.data.order import BlockOrder, Epoch, example_at

NUM_EXAMPLES, PER_SHARD, BATCH_SIZE, NUM_BATCHES = 1_000_000, 10_000, 4_096, 60
ORDERS = {
    "examples": None,
    "blocks of 128, buffer 65,536": BlockOrder(128, 65_536),
    "blocks of 64, buffer 65,536": BlockOrder(64, 65_536),
    "blocks of 256, buffer 262,144": BlockOrder(256, 262_144),
    "blocks of 10,000, buffer 65,536": BlockOrder(10_000, 65_536),
}


def row_of(name: str, blocks: BlockOrder | None, values: np.ndarray) -> str:
    """Measure one order."""
    epoch = Epoch((0,), 0, 0, NUM_EXAMPLES, BATCH_SIZE)
    order = np.array(
        [[example_at(epoch, batch, rank, blocks) for rank in range(BATCH_SIZE)] for batch in range(NUM_BATCHES)]
    )
    seen = values[order // PER_SHARD]
    means = seen.mean(axis=1)
    neighbours = np.corrcoef(seen[:, :-1].reshape(-1), seen[:, 1:].reshape(-1))[0, 1]
    spread = means.std() / (seen.std() / BATCH_SIZE**0.5)
    batches = np.corrcoef(means[:-1], means[1:])[0, 1]
    stretches = np.mean([len(np.unique(batch * 256 // NUM_EXAMPLES)) for batch in order])
    return f"| {name} | {neighbours:.3f} | {spread:.2f} | {batches:.2f} | {stretches:.0f} |"


def main(argv: Sequence[str]) -> None:
    """Print a row for each order."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
    values = np.random.default_rng(0).normal(size=NUM_EXAMPLES // PER_SHARD)
    print("| order | neighbouring rows | spread of means | next batch | of 256 stretches |\n|---|---|---|---|---|")
    for name, blocks in ORDERS.items():
        print(row_of(name, blocks, values), flush=True)


if __name__ == "__main__":
    app.run(main)
