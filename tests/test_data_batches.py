"""Batches: a pure function of (data, seed, step), the same for every reader; bad examples replaced and counted."""

import io
import itertools
import threading

import numpy as np
import pytest
from PIL import Image

from limoe.data.batches import Batches
from limoe.data.files import DataError
from limoe.data.images import Preprocess
from limoe.data.shards import Example, write_shard
from limoe.data.source import Bad, CachedSource, Decoded, ShardSource, Source


def encode(captions):
    return np.array([[int(caption), len(caption)] for caption in captions], np.int32)


class NumberedSource(Source):
    """Examples whose pixels, caption and key are their number, except those that `is_bad` says."""

    def __init__(self, num_examples, is_bad=lambda number: False):
        self.num_examples = num_examples
        self.is_bad = is_bad

    def __len__(self):
        return self.num_examples

    def __getitem__(self, number):
        if self.is_bad(number):
            return Bad(f"{number}", "it is bad")
        return Decoded(np.full((2, 2, 3), number % 256, np.uint8), f"{number}", f"{number}", None)


def batches_of(source, *, batch_size=8, seed=0, **options):
    return Batches(source, encode, batch_size=batch_size, seed=seed, **options)


def assert_same(left, right):
    np.testing.assert_array_equal(left.images, right.images)
    np.testing.assert_array_equal(left.tokens, right.tokens)
    assert left.keys == right.keys
    assert left.bad == right.bad


def numbers(batches, num_steps):
    return [int(key) for step in range(num_steps) for key in batches.at(step).keys]


def one_in_seven(number):
    return number % 7 == 0


def test_a_batch_holds_what_its_keys_say():
    batch = batches_of(NumberedSource(100)).at(3)
    expected = np.array([int(key) for key in batch.keys])
    np.testing.assert_array_equal(batch.images, np.broadcast_to(expected[:, None, None, None], (8, 2, 2, 3)))
    np.testing.assert_array_equal(batch.tokens[:, 0], expected)
    assert batch.images.dtype == np.uint8 and batch.tokens.dtype == np.int32
    assert batch.bad == (8, 0, ())


@pytest.mark.parametrize("num_examples", [1, 2, 40, 2**14 - 8, 2**14, 2**14 + 8])
def test_each_epoch_holds_every_example_once(num_examples):
    order = numbers(batches_of(NumberedSource(num_examples), batch_size=min(8, num_examples)), -(-num_examples // 8))
    assert sorted(order[:num_examples]) == list(range(num_examples))


@pytest.mark.parametrize("num_examples", [8, 29, 2**14 + 5])
def test_no_batch_lies_across_the_end_of_an_epoch(num_examples):
    per_epoch = num_examples // 8
    batches = batches_of(NumberedSource(num_examples))
    for epoch in range(2):
        steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
        seen = [int(key) for step in steps for key in batches.at(step).keys]
        assert len(set(seen)) == 8 * per_epoch, "what is left over waits for another epoch, and nothing comes twice"
    assert batches.at(0).keys != batches.at(per_epoch).keys


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(
        DataError, match=r"has 7 examples, fewer than the 8 of a batch .train\.batch_size=8.*set a smaller"
    ):
        batches_of(NumberedSource(7))


class SeveralCaptions(NumberedSource):
    def __getitem__(self, number):
        return super().__getitem__(number)._replace(more_captions=(f"{number}0", f"{number}00"))


def test_one_of_several_captions_is_drawn_by_seed_and_step():
    batches = batches_of(SeveralCaptions(64), batch_size=16)
    drawn = [tuple(batches.at(step).tokens[:, 1] - [len(key) for key in batches.at(step).keys]) for step in range(8)]
    counts = np.bincount(np.concatenate(drawn), minlength=3)
    assert counts.sum() == 128 and counts.min() > 25 and len(set(drawn)) == 8
    assert_same(batches.at(3), next(batches_of(SeveralCaptions(64), batch_size=16, threads=2).from_step(3)))
    some = batches_of(SeveralCaptions(64), batch_size=16, rows=[3, 9]).at(5)
    np.testing.assert_array_equal(some.tokens, batches.at(5).tokens[[3, 9]])
    assert (batches_of(SeveralCaptions(64), batch_size=16, seed=1).at(0).tokens != batches.at(0).tokens).any()


def test_an_augmented_picture_is_a_function_of_seed_step_and_row():
    class Ramp(NumberedSource):
        def __getitem__(self, number):
            ramp = np.arange(48, dtype=np.uint8).reshape(4, 4, 3) + np.uint8(number)
            return super().__getitem__(number)._replace(image=ramp)

    augment = Preprocess(3)
    batches = batches_of(Ramp(16), augment=augment)
    first, later = batches.at(0), batches.at(2)
    assert first.images.shape == (8, 3, 3, 3) and (first.images != later.images).any()
    assert_same(first, batches_of(Ramp(16), augment=augment).at(0))
    for number, key in enumerate(first.keys):
        again = np.flatnonzero(np.array(later.keys) == key)
        assert all((first.images[number] != later.images[row]).any() for row in again), "a new draw each time"


def test_epochs_and_seeds_have_their_own_order():
    first, other = numbers(batches_of(NumberedSource(40)), 10), numbers(batches_of(NumberedSource(40), seed=1), 10)
    orders = {tuple(order) for order in (first[:40], first[40:], other[:40], other[40:], range(40))}
    assert len(orders) == 5
    assert sorted(first[40:]) == list(range(40))


@pytest.mark.parametrize("num_examples", [50, 2**14])
@pytest.mark.parametrize("threads", [0, 2, 3])
def test_reading_ahead_from_any_step_gives_the_same_batches(num_examples, threads):
    source = NumberedSource(num_examples, one_in_seven)
    batches = batches_of(source, batch_size=37, threads=threads, max_bad_share=0.5)
    for start in (0, 1, 5):
        for step, batch in enumerate(itertools.islice(batches.from_step(start), 4), start):
            assert_same(batch, batches.at(step))


def test_a_far_step_is_reached_at_once():
    batches = batches_of(NumberedSource(1000))
    step = 10**9
    assert_same(next(batches.from_step(step)), batches.at(step))


@pytest.mark.parametrize("num_processes", [1, 2, 4])
def test_the_rows_of_the_processes_are_slices_of_the_global_batch(num_processes):
    source = NumberedSource(50, one_in_seven)
    whole = batches_of(source, batch_size=40).at(7)
    num_rows = 40 // num_processes
    first_rows = range(0, 40, num_rows)
    parts = [batches_of(source, batch_size=40, rows=range(row, row + num_rows)).at(7) for row in first_rows]
    np.testing.assert_array_equal(np.concatenate([part.images for part in parts]), whole.images)
    np.testing.assert_array_equal(np.concatenate([part.tokens for part in parts]), whole.tokens)
    assert tuple(key for part in parts for key in part.keys) == whole.keys
    assert sum(part.bad.num_bad for part in parts) == whole.bad.num_bad > 0
    in_turn = [*range(10), *range(20, 30)]
    np.testing.assert_array_equal(
        batches_of(source, batch_size=40, rows=in_turn).at(7).images, whole.images[np.array(in_turn)]
    )


def test_a_bad_example_is_replaced_in_its_place_and_counted():
    clean, bad = batches_of(NumberedSource(1000)), batches_of(NumberedSource(1000, one_in_seven))
    for step in range(20):
        expected, batch = clean.at(step), bad.at(step)
        for row, (intended, key) in enumerate(zip(expected.keys, batch.keys, strict=True)):
            if one_in_seven(int(intended)):
                later = (clean.at(step + tried).keys[row] for tried in range(1, 20))
                assert key == next(candidate for candidate in later if not one_in_seven(int(candidate)))
            else:
                assert key == intended
        assert len(set(batch.keys)) == 8, "no pair twice in a batch"
        num_intended = sum(one_in_seven(int(key)) for key in expected.keys)
        assert batch.bad.num_bad >= num_intended
        assert batch.bad.num_examined == 8 + batch.bad.num_bad
        assert all(one_in_seven(int(example.key)) for example in batch.bad.first)


def test_no_replacement_gives_a_batch_a_pair_twice():
    batches = batches_of(NumberedSource(60, lambda number: number in (3, 20, 41)), max_bad_share=0.5)
    assert all(len(set(batches.at(step).keys)) == 8 for step in range(40))


def test_only_the_first_few_bad_examples_are_kept():
    batch = batches_of(NumberedSource(1000, lambda number: number % 2 == 0), batch_size=100).at(0)
    assert batch.bad.num_bad > 50
    assert len(batch.bad.first) == 5


@pytest.mark.parametrize("num_examples", [8, 1000])
def test_all_bad_stops_and_says_so(num_examples):
    batches = batches_of(NumberedSource(num_examples, lambda number: True), max_bad_share=1.0)
    with pytest.raises(DataError, match=r"no usable example .* First: \d+ \(it is bad\)"):
        batches.at(0)
    with pytest.raises(DataError, match="no usable example"):
        next(batches.from_step(0))


@pytest.mark.parametrize("num_examples", [30, 1000, 20_000])
def test_more_bad_examples_than_allowed_stop_the_run(num_examples):
    batches = batches_of(NumberedSource(num_examples, one_in_seven), max_bad_share=0.05)
    with pytest.raises(DataError, match=r"are bad, more than max_bad_share=0\.05 allows\. First: \d+ \(it is bad\)"):
        list(itertools.islice(batches.from_step(0), 200))


@pytest.mark.parametrize("share", [0.15, 1.0])
def test_fewer_bad_examples_than_allowed_do_not(share):
    batches = batches_of(NumberedSource(1000, one_in_seven), max_bad_share=share)
    assert len(list(itertools.islice(batches.from_step(0), 400))) == 400


def test_one_bad_example_at_the_start_does_not_stop_the_run():
    clean = batches_of(NumberedSource(1000))
    unlucky = clean.at(0).keys[0]
    batches = batches_of(NumberedSource(1000, lambda number: f"{number}" == unlucky), max_bad_share=0.01)
    assert len(list(itertools.islice(batches.from_step(0), 125))) == 125


def test_no_bad_example_may_be_allowed_at_all():
    batches = batches_of(NumberedSource(100, lambda number: number == 5), max_bad_share=0.0)
    with pytest.raises(DataError, match="max_bad_share=0 allows"):
        list(itertools.islice(batches.from_step(0), 40))


def test_closing_stops_the_threads():
    before = set(threading.enumerate())
    steps = batches_of(NumberedSource(100)).from_step(0)
    next(steps)
    assert set(threading.enumerate()) - before
    steps.close()
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=10)
        assert not thread.is_alive()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"batch_size": 0}, "batch_size 0"),
        ({"rows": range(4, 9)}, "rows"),
        ({"rows": range(0)}, "rows"),
        ({"rows": [2, 1]}, "rows"),
        ({"rows": [1, 1]}, "rows"),
        ({"seed": -1}, "seed -1"),
        ({"threads": -1}, "threads -1"),
        ({"max_bad_share": 1.5}, "max_bad_share 1.5"),
    ],
)
def test_settings_out_of_range_are_refused(options, named):
    with pytest.raises(ValueError, match=named):
        batches_of(NumberedSource(100), **options)


def test_more_examples_than_one_order_can_hold_are_refused():
    with pytest.raises(DataError, match="4294967296 examples"):
        batches_of(NumberedSource(2**32))
    last = Batches(NumberedSource(2**32 - 1), lambda captions: encode(["0"] * len(captions)), batch_size=8, seed=0)
    assert len(last.at(0).keys) == 8


def jpeg(number):
    file = io.BytesIO()
    Image.new("RGB", (20, 14), (number * 9, 255 - number * 9, 128)).save(file, "JPEG")
    return file.getvalue()


def test_from_shards_with_every_kind_of_damage_the_run_goes_on(tmp_path):
    captions = {1: "", 2: "   "}
    examples = [Example(f"{n:03}", jpeg(n % 28), captions.get(n, f"{n}")) for n in range(60)]
    examples[3] = examples[3]._replace(image_bytes=examples[3].image_bytes[:100])
    write_shard(tmp_path / "a.tar", examples[:40])
    write_shard(tmp_path / "b.tar", examples[40:])
    content = (tmp_path / "b.tar").read_bytes()
    (tmp_path / "b.tar").write_bytes(content[: content.index(b"055.txt") + 512])
    source = ShardSource(tmp_path, preprocess=Preprocess(8))
    batches = batches_of(source, batch_size=7, max_bad_share=0.5)
    read = list(itertools.islice(batches.from_step(0), 9))
    reasons = {example.key: example.reason for batch in read for example in batch.bad.first}
    assert reasons == {
        "001": "the caption is empty",
        "002": "the caption is empty",
        "003": reasons["003"],
        "055": "the caption is incomplete (the tar is cut short inside 055.txt)",
    }
    assert reasons["003"].startswith("the image does not decode")
    cached = batches_of(CachedSource(source, max_bytes=2**20), batch_size=7, max_bad_share=0.5)
    for _ in range(2):
        for step, batch in enumerate(read):
            assert_same(batch, cached.at(step))
