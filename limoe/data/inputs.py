"""From a configuration to what a run reads: shards (the embedded world is written first), tokenizer, batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from limoe.config.schema import Config, ConfigError
from limoe.data import files
from limoe.data.batches import Batches
from limoe.data.files import cache_folder
from limoe.data.source import CachedSource, Source, open_source
from limoe.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from limoe.data.world import World, write_world

# Captions that a tokenizer is trained from, spread evenly over the data.
TOKENIZER_CAPTIONS = 200_000
# Decoded images are kept in memory as far as this goes: the embedded world whole, of large data nothing that matters.
CACHE_BYTES = 2 * 2**30
# Beside evaluation shards: the classes of zero-shot classification, and which captions are right in retrieval.
CLASSES_FILE, RETRIEVAL_FILE = "classes.json", "retrieval.json"

Progress = Callable[[int, int], None]


class DataFolders(NamedTuple):
    """Where pairs lie: for training, and (empty if there are none) for zero-shot classification and for retrieval."""

    train: str
    zero_shot: str
    retrieval: str


def data_folders(config: Config, progress: Progress | None = None) -> DataFolders:
    """Folders of the configured shards; the embedded world is written into the cache first if it is not there whole.

    With `data.shards` given, `data.eval_shards` serves both evaluations (zero-shot needs its classes.json), and none
    take place without it.
    """
    if config.data.shards:
        return DataFolders(config.data.shards, *_evaluation(config.data.eval_shards))
    world = World(seed=config.data.seed, num_pairs=config.data.world_pairs)
    cache = cache_folder(config.data.cache_dir)
    folders = write_world(world, cache, progress)
    if config.data.eval_shards:
        return DataFolders(folders.train, *_evaluation(config.data.eval_shards))
    return DataFolders(folders.train, folders.heldout, folders.retrieval)


def _evaluation(folder: str) -> tuple[str, str]:
    has_classes = bool(folder) and files.is_folder(folder) and files.exists(Path(folder) / CLASSES_FILE)
    return folder if has_classes else "", folder


def evaluation_folders(config: Config, data: str) -> DataFolders:
    """The folders of an evaluation: the given shards for both kinds, or those of the run's own configuration."""
    if data:
        return DataFolders("", *_evaluation(data))
    return data_folders(config)


def ready_tokenizer(config: Config, path: Path) -> Tokenizer | None:
    """The tokenizer at `path` if it is there, else the configured one, saved there; None if one has to be trained.

    Raises ConfigError if it has more pieces than `model.vocab_size`, DataError if it cannot be read.
    """
    given = path if files.exists(path) else config.data.tokenizer
    if not given:
        return None
    tokenizer = load_tokenizer(given, length=config.model.text_length)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"the tokenizer {given} has {tokenizer.vocab_size} pieces, more than model.vocab_size="
            f"{config.model.vocab_size}; set model.vocab_size={tokenizer.vocab_size}"
        )
    if given != path:
        tokenizer.save(path)
    return tokenizer


def tokenizer_for(config: Config, path: Path, source: Source) -> Tokenizer:
    """The tokenizer of a run: the one at `path` if it is there, else the configured or a newly trained one, saved
    there.

    Raises like `ready_tokenizer`, and DataError if it cannot be trained.
    """
    tokenizer = ready_tokenizer(config, path)
    if tokenizer is None:
        captions = source.captions(limit=TOKENIZER_CAPTIONS)
        model = config.model
        tokenizer = train_tokenizer(captions, vocab_size=model.vocab_size, length=model.text_length)
        assert tokenizer.vocab_size <= model.vocab_size
        tokenizer.save(path)
    return tokenizer


def training_source(config: Config, folders: DataFolders) -> Source:
    """The training examples at the configured image size."""
    return open_source(folders.train, image_size=config.model.image_size, cache_dir=config.data.cache_dir)


def training_batches(
    config: Config, source: Source, tokenizer: Tokenizer, rows: Sequence[int] | None = None
) -> Batches:
    """The global batches of a run, or some rows of them, decoded in threads, decoded images kept in memory where they
    fit."""
    return Batches(
        CachedSource(source, max_bytes=CACHE_BYTES),
        tokenizer.encode,
        batch_size=config.train.batch_size,
        seed=config.data.seed,
        rows=rows,
        threads=config.data.threads,
        max_bad_share=config.data.max_bad_share,
    )
