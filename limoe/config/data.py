"""Settings of the data: where pairs come from, and how they are read."""

from dataclasses import dataclass
from typing import Literal

from limoe.config.section import Section, setting


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """Sources of image-text pairs, and how they are read."""

    section = "data"

    shards: str = setting(
        "training data: a folder of shards (*.tar as img2dataset writes them), or LAYOUT:PATH?option=value of another "
        "layout; empty = the embedded world",
        "",
    )
    sources: str = setting(
        "several sources with weights in place of data.shards, a JSON list of objects with path, layout, weight and "
        "options",
        "",
    )
    eval_shards: str = setting("evaluation data, as data.shards; empty = the embedded world's held-out pairs", "")
    tokenizer: str = setting("SentencePiece .model file; empty = train one from the captions", "")
    seed: int = setting("seed of the order of the data and of the embedded world", 0)
    order: Literal["examples", "blocks"] = setting(
        "examples = any example may come next; blocks = long pieces of shards, mixed in a buffer, for storage in which "
        "each read costs much",
        "examples",
    )
    block_size: int = setting("examples of a block, with data.order=blocks", 128)
    shuffle_buffer: int = setting(
        "examples of all processes among which blocks are mixed, with data.order=blocks", 65_536
    )
    rewound_at: tuple[int, ...] = setting(
        "steps of the run's rewinds, in order, written by --rewind; each gives the data after its step another order",
        (),
    )
    threads: int = setting("threads that decode images", 2)
    max_bad_share: float = setting("share of bad examples above which the run stops", 0.05)
    preprocess: Literal["squash", "crop", "augment"] = setting(
        "squash = the whole picture as a square; crop = its central square; augment = in training a random part, "
        "mirrored or not, else as crop",
        "squash",
    )
    interpolation: Literal["bilinear", "bicubic"] = setting("filter for resizing, with antialiasing", "bilinear")
    background: Literal["white", "grey", "black"] = setting("what shows through transparent pixels", "white")
    world: Literal["shapes", "scenes"] = setting(
        "the embedded world: shapes = one or two things; scenes = several, with relations and counts, much harder",
        "shapes",
    )
    world_pairs: int = setting("training pairs of the embedded world", 20_480)
    cache_dir: str = setting("folder for generated data; empty = the user's cache folder", "")

    def _check(self) -> None:
        self._require_not_negative("seed")
        self._require(all(step > 0 for step in self.rewound_at), "rewound_at", "must be steps, from 1")
        self._require_positive("threads", "world_pairs", "block_size", "shuffle_buffer")
        self._require(not (self.shards and self.sources), "sources", "give either this or data.shards")
        self._require_below_one("max_bad_share")
