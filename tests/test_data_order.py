"""The order in blocks: every example once, from any step, in long pieces for each process, and well mixed."""

import itertools

import numpy as np
import pytest
from test_data_batches import NumberedSource, assert_same, batches_of, numbers, one_in_seven
from test_data_source import png

from limoe.config.presets import preset
from limoe.config.settings import override
from limoe.data import files, inputs
from limoe.data.images import Preprocess
from limoe.data.order import _SMALL, BlockOrder, Epoch, Order, example_at
from limoe.data.shards import Example, write_shard
from limoe.data.source import Decoded, ShardSource
from limoe.data.tokenizer import train_tokenizer


def order(block=16, buffer=640, seed=0):
    return Order(seed, (), BlockOrder(block, buffer))


# Fewer examples than a block or a lane, blocks that do not fit, and more blocks than are ordered by a sort.
@pytest.mark.parametrize(
    ("num_examples", "batch_size", "block", "buffer"),
    [(1, 1, 256, 65536), (7, 7, 16, 1), (200, 7, 16, 50), (1000, 100, 16, 640), (1003, 37, 1, 10_000), (999, 65, 7, 7)],
)
def test_each_epoch_holds_every_example_once(num_examples, batch_size, block, buffer):
    batches = batches_of(NumberedSource(num_examples), batch_size=batch_size, seed=order(block, buffer))
    per_epoch = num_examples // batch_size
    for epoch in range(2):
        steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
        seen = [int(key) for step in steps for key in batches.at(step).keys]
        assert len(set(seen)) == len(seen) == per_epoch * batch_size and set(seen) <= set(range(num_examples))


def test_more_blocks_than_are_sorted_are_each_there_once():
    epoch, size = Epoch((3,), 5, 0, 2 * _SMALL + 77, 64), 2 * _SMALL + 77
    found = [example_at(epoch, batch, rank, BlockOrder(1, 128)) for batch in range(size // 64) for rank in range(64)]
    assert len(set(found)) == len(found) and max(found) < size


def test_what_fills_no_batch_is_not_always_the_same():
    batches = batches_of(NumberedSource(1000), batch_size=300, seed=order())
    left = [
        set(range(1000)) - {int(key) for step in range(e, e + 3) for key in batches.at(step).keys} for e in (0, 3, 6)
    ]
    assert len(set.intersection(*left)) < 10


@pytest.mark.parametrize("threads", [0, 2])
def test_reading_ahead_from_any_step_gives_the_same_batches(threads):
    batches = batches_of(
        NumberedSource(500, one_in_seven), batch_size=70, threads=threads, max_bad_share=0.5, seed=order()
    )
    for start in (0, 5, 10**6):
        for step, batch in enumerate(itertools.islice(batches.from_step(start), 4), start):
            assert_same(batch, batches.at(step))
            assert len(set(batch.keys)) == 70, "no pair twice in a batch"


def test_seeds_and_epochs_have_their_own_order():
    first, other = (numbers(batches_of(NumberedSource(400), seed=order(seed=seed)), 100) for seed in (0, 1))
    assert len({tuple(found) for found in (first[:400], first[400:], other[:400], range(400))}) == 4


@pytest.mark.parametrize("num_processes", [1, 4, 16])
def test_a_process_reads_the_blocks_of_its_rows_alone(num_processes):
    size, batch_size, block = 16_384, 128, 64
    epoch, num_rows = Epoch((0,), 0, 0, size, batch_size), batch_size // num_processes
    read = []
    for first in range(0, batch_size, num_rows):
        found = {
            example_at(epoch, batch, rank, BlockOrder(block, 4096))
            for batch in range(size // batch_size)
            for rank in range(first, first + num_rows)
        }
        read.append(len(set(np.array(sorted(found)) // block)))
    # Blocks begin anywhere, so each lies across two of these; a lane ends within one.
    assert max(read) <= 2 * (size // block // num_processes) + 64


def test_rows_of_a_batch_come_from_far_apart():
    size, batch_size = 65_536, 256
    epoch = Epoch((0,), 0, 0, size, batch_size)
    for batch in (0, 100, 255):
        found = np.sort([example_at(epoch, batch, rank, BlockOrder(256, 16_384)) for rank in range(batch_size)])
        assert len(np.unique(found // 256)) > 64 and abs(found.mean() / size - 0.5) < 0.15


@pytest.fixture
def shards_of_pictures(tmp_path):
    for shard in range(4):
        examples = [Example(f"{shard}{n:02}", png((shard, n, 0), side=40), f"{n}", None, "png") for n in range(64)]
        write_shard(tmp_path / f"{shard}.tar", examples)
    return tmp_path


def test_neighbours_are_read_in_pieces(shards_of_pictures, monkeypatch):
    monkeypatch.setattr(files, "_PIECE", 16_384)
    plain = ShardSource(shards_of_pictures, preprocess=Preprocess(8))
    source = ShardSource(shards_of_pictures, preprocess=Preprocess(8))
    source.keep_blocks(64)
    read, read_range = [], files.read_range
    monkeypatch.setattr(
        files, "read_range", lambda path, offset, size: read.append(size) or read_range(path, offset, size)
    )
    batches = batches_of(source, batch_size=8, seed=order(16, 64))
    keys = [key for step in range(32) for key in batches.at(step).keys]
    pieces = sum(-(-path.stat().st_size // 16_384) for path in shards_of_pictures.glob("*.tar"))
    assert len(set(keys)) == 256 and len(read) < 3 * pieces < 256, "each picture and caption would be 512 reads"
    for number in range(0, 256, 9):
        one, other = plain[number], source[number]
        assert isinstance(one, Decoded) and isinstance(other, Decoded) and one.key == other.key
        np.testing.assert_array_equal(one.image, other.image)


def test_a_member_across_pieces_is_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_PIECE", 10)
    content = bytes(range(200))
    files.write_bytes(tmp_path / "a", content)
    pieces = files.Pieces(40)
    for offset in range(0, 205, 3):
        for size in (0, 1, 9, 10, 11, 35):
            assert pieces.read_range(tmp_path / "a", offset, size) == content[offset : offset + size]


def test_the_setting_chooses_the_order_and_how_shards_are_read(shards_of_pictures):
    found = []
    words = [f"number {number}" for number in range(256)]
    tokenizer = train_tokenizer(words, vocab_size=64, length=8)
    for name in ("examples", "blocks"):
        config = override(
            preset("tiny"), [f"data.order={name}", "data.block_size=16", "data.shuffle_buffer=64", "train.batch_size=8"]
        )
        config = override(config, [f"data.shards={shards_of_pictures}"])
        source = inputs.training_source(config, inputs.data_folders(config))
        rows = [0, 1, 2, 3]
        found.append(inputs.training_batches(config, source, tokenizer, rows).at(3).keys)
        expected = batches_of(NumberedSource(256), seed=order(16, 64) if name == "blocks" else 0, rows=rows).at(3).keys
        assert found[-1] == tuple(f"{int(key) // 64}{int(key) % 64:02}" for key in expected)
    assert found[0] != found[1]
