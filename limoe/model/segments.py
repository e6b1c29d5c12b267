"""Cut a tower into periodic segments. Each segment is one scan, so a deep model compiles as fast as a shallow one."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Segment:
    """A short pattern of blocks that occurs `repeats` times; True marks a block with experts."""

    pattern: tuple[bool, ...]
    repeats: int
    first_block: int

    @property
    def num_blocks(self) -> int:
        """The number of blocks in the segment."""
        return len(self.pattern) * self.repeats


def cut(depth: int, moe_layers: tuple[int, ...]) -> tuple[Segment, ...]:
    """Cut `depth` blocks into the periodic segments with the fewest distinct blocks, then the fewest segments.

    >>> [(len(s.pattern), s.repeats) for s in cut(12, (1, 3, 5, 7, 9, 11))]
    [(2, 6)]
    >>> [(len(s.pattern), s.repeats) for s in cut(32, (3, 7, 11, 15, 17, 19, 21, 23, 25, 27, 29, 31))]
    [(4, 4), (2, 8)]
    """
    blocks = tuple(layer in moe_layers for layer in range(depth))
    # best[i] has the cost and the segments of the first i blocks.
    best: list[tuple[tuple[int, int], tuple[Segment, ...]]] = [((0, 0), ())]
    for end in range(1, depth + 1):
        options = []
        for start in range(end):
            length = end - start
            for period in range(1, length + 1):
                pattern = blocks[start : start + period]
                if length % period == 0 and pattern * (length // period) == blocks[start:end]:
                    (distinct, segments), before = best[start]
                    segment = Segment(pattern, length // period, start)
                    options.append(((distinct + period, segments + 1), (*before, segment)))
                    break  # the shortest period of these blocks
        best.append(min(options, key=lambda option: option[0]))
    return best[depth][1]
