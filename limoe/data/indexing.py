"""limoe index: the indexes of many shards by several processes, and a report of what is bad in them.

Each shard is one piece of work. What is done is kept: an index beside its shard, the check of a shard as a line of
JSON, so that the same command goes on where it was stopped.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import functools
import json
import multiprocessing
import os
import re
from collections.abc import Callable, Generator, Iterable
from typing import Any, NamedTuple

from limoe.data import files
from limoe.data.files import DataError
from limoe.data.images import Preprocess
from limoe.data.index import NO_TAR
from limoe.data.places import open_source, parsed
from limoe.data.shards import find_shards
from limoe.data.source import Bad, ShardSource, index_of

# Pictures are decoded whole and made this small, which takes the least time.
_CHECKED = Preprocess(16)
_NUM_KEYS = 20


class Work(NamedTuple):
    """What to index: a place, a part (the second of three is (2, 3)), a cache folder, and the report of a check.

    With `report` each example is decoded, and what is bad is written there.
    """

    place: str
    part: tuple[int, int] = (1, 1)
    cache_dir: str = ""
    report: str = ""


class ShardFacts(NamedTuple):
    """What was found in a shard. `bad` are keys by reason, of examples if they were checked; `stored`: its index is."""

    shard: str
    stamp: files.Stamp
    examples: int
    damage: str
    ignored: dict[str, tuple[int, str]]
    stored: bool
    bad: dict[str, list[str]]


def part_of(text: str) -> tuple[int, int]:
    """Read which part of the shards is meant. Raises DataError.

    >>> part_of("3/64")
    (3, 64)
    """
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise DataError(f"--part={text} is no part; give a number and how many there are, from 1/64 to 64/64")
    return int(match[1]), int(match[2])


def index_shards(
    work: Work, *, jobs: int = 1, progress: Callable[[int, int], None] = lambda done, total: None
) -> list[ShardFacts]:
    """Index the shards of a part of a place, and check them if a report is wanted, in `jobs` processes.

    Returns what each shard holds, in the order of shards. `progress` gets the numbers of shards done and of all. Raises
    DataError if the place has no shards, and StorageError without permission.

    >>> import tempfile
    >>> from limoe.data.shards import Example, write_shard
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     number = write_shard(f"{folder}/00000.tar", [Example("000", b"no picture", "a red ring")])
    ...     [facts] = index_shards(Work(folder, report=f"{folder}/report.json"))
    >>> facts.examples, facts.bad
    (1, {'the image does not decode: none of JPEG, PNG, WEBP, BMP, GIF': ['000']})
    """
    number, parts = work.part
    paths = _paths(work.place)[number - 1 :: parts]
    lines = f"{work.report}.shards"
    done = _already_checked(lines) if work.report else {}
    found = {path: facts for path, facts in done.items() if path in set(paths) and facts.stamp == _stamp(path)}
    if work.report:  # without a torn line, to which the next would be appended
        files.write_bytes(lines, "".join(f"{json.dumps(facts)}\n" for facts in found.values()).encode())
    left = [path for path in paths if path not in found]
    _source.cache_clear()  # the shards may be others than those of an earlier call
    progress(len(found), len(paths))
    with contextlib.closing(_facts_of(left, work, jobs)) as results:
        for facts in results:
            found[facts.shard] = facts
            if work.report:
                files.append_line(lines, json.dumps(facts))
            progress(len(found), len(paths))
    ordered = [found[path] for path in paths]
    if work.report:
        text = json.dumps(report_of(ordered), indent=1, ensure_ascii=False)
        files.write_bytes(work.report, text.encode())
    return ordered


def report_of(facts: Iterable[ShardFacts]) -> dict[str, Any]:
    """Add up what was found: numbers, and for each reason how many examples are bad and the first few by shard."""
    facts = list(facts)
    counts: collections.Counter[str] = collections.Counter()
    first: dict[str, list[str]] = collections.defaultdict(list)
    ignored: collections.Counter[str] = collections.Counter()
    for one in facts:
        for reason, keys in one.bad.items():
            counts[reason] += len(keys)
            first[reason] += [f"{one.shard}: {key}" for key in keys[: _NUM_KEYS - len(first[reason])]]
        for what, (count, _) in one.ignored.items():
            ignored[what] += count
    return {
        "shards": len(facts),
        "examples": sum(one.examples for one in facts),
        "bad": sum(counts.values()),
        "reasons": {reason: {"examples": count, "first": first[reason]} for reason, count in counts.most_common()},
        "damaged shards": {one.shard: one.damage for one in facts if one.damage},
        "ignored members": dict(ignored.most_common()),
        "indexes that could not be stored": [one.shard for one in facts if not one.stored],
    }


def as_text(report: dict[str, Any], *, checked: bool) -> str:
    """Format a report for a terminal."""
    lines = [f"{report['shards']:,} shards, {report['examples']:,} examples"]
    if checked:
        lines[0] += f", {report['bad']:,} of them bad"
        lines += [f"  {found['examples']:,} x {reason}" for reason, found in report["reasons"].items()]
    lines += [f"  damaged: {shard}: {damage}" for shard, damage in report["damaged shards"].items()]
    lines += [f"  ignored: {count:,} {what}" for what, count in report["ignored members"].items()]
    if unstored := report["indexes that could not be stored"]:
        lines.append(
            f"  {len(unstored):,} indexes could not be stored, the first is that of {unstored[0]}; make its folder "
            "writable, or set data.cache_dir"
        )
    return "\n".join(lines)


def _paths(place: str) -> list[str]:
    layout, path, options = parsed(place)
    if layout == "clip_benchmark":
        path = os.path.join(path, options.get("split", "test"))
    elif layout != "shards":
        raise DataError(f"{place} is of the layout {layout}, which has no index; give a place of tar shards")
    return find_shards(path)


def _stamp(path: str) -> files.Stamp | None:
    try:
        return files.stamp(path)
    except FileNotFoundError:
        return None


def _already_checked(lines: str) -> dict[str, ShardFacts]:
    """Read the lines of an earlier command; the last may be torn."""
    found = {}
    for line in files.read_bytes(lines).splitlines() if files.exists(lines) else ():
        with contextlib.suppress(ValueError, TypeError):
            facts = ShardFacts(*json.loads(line))
            ignored = {what: (count, first) for what, (count, first) in facts.ignored.items()}
            found[facts.shard] = facts._replace(stamp=files.Stamp(*facts.stamp), ignored=ignored)
    return found


def _facts_of(paths: list[str], work: Work, jobs: int) -> Generator[ShardFacts, None, None]:
    """Yield what each shard holds, in the order in which processes finish."""
    if jobs == 1 or len(paths) < 2:
        yield from (_indexed(path, work) for path in paths)
        return
    # Not forked: a thread of the parent may hold a lock.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(min(jobs, len(paths)), mp_context=context) as pool:
        futures = [pool.submit(_indexed, path, work) for path in paths]
        try:
            for future in concurrent.futures.as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _indexed(path: str, work: Work) -> ShardFacts:
    index = index_of(path, work.cache_dir)
    bad: dict[str, list[str]] = collections.defaultdict(list)
    if work.report:
        source = _source(work)
        for number in source.numbers_of(path):
            example = source[number]
            if isinstance(example, Bad):
                bad[_kind_of(example)].append(example.key)
    stored = index.stored or index.damage.startswith(NO_TAR)  # nothing is left beside a file of another kind
    return ShardFacts(path, index.stamp, len(index), index.damage, index.ignored, stored, dict(bad))


@functools.lru_cache(maxsize=1)
def _source(work: Work) -> ShardSource:
    source = open_source(work.place, preprocess=_CHECKED, cache_dir=work.cache_dir)
    assert isinstance(source, ShardSource)
    return source


def _kind_of(bad: Bad) -> str:
    """Describe why an example is bad without what differs between examples: its key, and numbers.

    >>> _kind_of(Bad("0001", "there are two members for its image: 0001.jpg and 0001.png"))
    'there are two members for its image: KEY.jpg and KEY.png'
    """
    return re.sub(r"\d+", "N", bad.reason.replace(f"{bad.key}.", "KEY."))[:200]
