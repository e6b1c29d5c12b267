"""Compare the throughput of the data pipeline with two threads and of a simple Pillow loop on one core.

The program makes JPEG shards in a temporary folder, runs three variants in turns, and prints their medians:

- bare: one thread with Image.open, convert, resize to 224 and np.asarray; it decodes every JPEG at its full size
- bare+draft: the same with the pipeline's decoding at reduced size; it isolates the effect of threads and overhead
- pipeline: limoe.data with tar shards on disk, ordering, decoding in threads, tokens, and whole uint8 batches

Then it prints the processor time of an image that is spent outside of Pillow's decoder and filters, which alone
release the interpreter's lock for long: one process ends at the inverse of it, however many cores there are.

The target is 1.6 times the throughput of each of the others. It needs as many idle cores as threads, so the program
prints the load. It also prints the processor time of an image, which hardly depends on other programs.

    python benchmarks/data_pipeline.py [--num_images=400] [--repetitions=7] [--threads=2]
"""

import io
import itertools
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
from absl import app, flags
from PIL import Image, ImageFile

from limoe.data.batches import Batches
from limoe.data.images import Preprocess
from limoe.data.shards import Example, write_shard
from limoe.data.source import ShardSource
from limoe.data.tokenizer import train_tokenizer

NUM_IMAGES = flags.DEFINE_integer("num_images", 400, "number of JPEGs, 400x300 to 640x480 pixels", lower_bound=32)
REPETITIONS = flags.DEFINE_integer("repetitions", 7, "runs of each variant, interleaved", lower_bound=1)
THREADS = flags.DEFINE_integer("threads", 2, "decoding threads of the pipeline", lower_bound=1)

TARGET = 1.6
IMAGE_SIZE = 224
BATCH_SIZE = 64
WORDS = ("red", "blue", "green", "ring", "square", "star", "small", "large", "striped", "plain")


class Timing(NamedTuple):
    """Images per second of one run, by wall-clock time and by the processor time of all threads."""

    by_clock: float
    by_processor: float


def make_examples(num_images: int) -> list[Example]:
    """Make JPEGs with about the size and detail of photographs: smooth colours with some noise."""
    rng = np.random.default_rng(0)
    examples = []
    for number in range(num_images):
        width = int(rng.integers(400, 641))
        size = (width, width * 3 // 4)
        smooth = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
        pixels = np.asarray(smooth, np.int16) + rng.normal(0, 8, (size[1], size[0], 3)).astype(np.int16)
        file = io.BytesIO()
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
        caption = " ".join(rng.choice(WORDS, 6))
        examples.append(Example(f"{number:06d}", file.getvalue(), caption))
    return examples


def bare_loop(examples: list[Example], draft: bool) -> Callable[[], int]:
    """Make a run that decodes and resizes every example in one thread, and returns their number."""

    def run() -> int:
        for example in examples:
            image = Image.open(io.BytesIO(example.image_bytes))
            if draft:
                image.draft("RGB", (IMAGE_SIZE, IMAGE_SIZE))
            np.asarray(image.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR))
        return len(examples)

    return run


def pipeline(batches: Batches, num_steps: int) -> Callable[[], int]:
    """Make a run of the pipeline's first steps that starts without read-ahead, and returns the number of rows."""

    def run() -> int:
        return sum(len(batch.keys) for batch in itertools.islice(batches.from_step(0), num_steps))

    return run


def time_once(run: Callable[[], int]) -> Timing:
    """Time a run."""
    clock, processor = time.perf_counter(), time.process_time()
    count = run()
    timing = Timing(count / (time.perf_counter() - clock), count / (time.process_time() - processor))
    # Threads of the closed pipeline that still read ahead must not slow down the next variant.
    for thread in threading.enumerate():
        if thread is not threading.main_thread():
            thread.join()
    return timing


def lock_milliseconds(batches: Batches, num_steps: int) -> float:
    """Measure the processor time of an image outside of Pillow's decoder and filters, in one thread, least of three."""
    released, depth = 0.0, 0

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            nonlocal released, depth
            began, depth = time.thread_time(), depth + 1
            try:
                return function(*arguments, **options)
            finally:
                depth -= 1
                if not depth:  # a resize decodes what is not decoded yet
                    released += time.thread_time() - began

        return run

    load, resize = ImageFile.ImageFile.load, Image.Image.resize
    ImageFile.ImageFile.load, Image.Image.resize = timed(load), timed(resize)
    found = []
    try:
        for _ in range(3):
            released, began = 0.0, time.thread_time()
            count = sum(len(batches.at(step).keys) for step in range(num_steps))
            found.append((time.thread_time() - began - released) / count * 1e3)
    finally:
        ImageFile.ImageFile.load, Image.Image.resize = load, resize
    return min(found)


def main(argv: list[str]) -> None:
    """Make the shards, run the variants in turns, and print medians and ratios."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
    with tempfile.TemporaryDirectory() as folder:
        examples = make_examples(NUM_IMAGES.value)
        half = len(examples) // 2
        write_shard(os.path.join(folder, "00000.tar"), examples[:half])
        write_shard(os.path.join(folder, "00001.tar"), examples[half:])
        tokenizer = train_tokenizer((example.caption for example in examples), vocab_size=64, length=16)
        source = ShardSource(folder, preprocess=Preprocess(IMAGE_SIZE))
        batches = Batches(source, tokenizer.encode, batch_size=BATCH_SIZE, seed=0, threads=THREADS.value)
        variants = {
            "bare": bare_loop(examples, draft=False),
            "bare+draft": bare_loop(examples, draft=True),
            "pipeline": pipeline(batches, max(1, 2 * len(examples) // BATCH_SIZE)),
        }
        timings: dict[str, list[Timing]] = {name: [] for name in variants}
        for repetition in range(REPETITIONS.value + 1):
            for name, run in variants.items():
                timing = time_once(run)
                # The first round warms the page cache and the libraries.
                if repetition:
                    timings[name].append(timing)
        lock = lock_milliseconds(batches, max(1, len(examples) // BATCH_SIZE))
    kilobytes = statistics.mean(len(example.image_bytes) for example in examples) / 1e3
    facts = f"{len(examples)} JPEGs of {kilobytes:.0f} kB to {IMAGE_SIZE} px"
    print(f"{facts}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    medians = {name: statistics.median(timing.by_clock for timing in values) for name, values in timings.items()}
    for name, values in timings.items():
        rates = sorted(timing.by_clock for timing in values)
        milliseconds = statistics.median(1e3 / timing.by_processor for timing in values)
        print(
            f"{name:11s} {medians[name]:6.0f} images/s ({rates[0]:.0f} to {rates[-1]:.0f}), "
            f"{milliseconds:.2f} ms of processor time an image"
        )
    print(
        f"outside of Pillow's decoder and filters: {lock:.3f} ms an image, so one process ends at {1e3 / lock:,.0f}/s"
    )
    for name in ("bare", "bare+draft"):
        ratio = medians["pipeline"] / medians[name]
        print(f"pipeline with {THREADS.value} threads / {name}: {ratio:.2f}  (target: at least {TARGET})")


if __name__ == "__main__":
    app.run(main)
