"""Inputs of a run, from its configuration: folders of shards (with the embedded world), tokenizer, batches."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import PIL

from limoe.config.schema import Config, ConfigError
from limoe.data import files
from limoe.data.batches import Batches
from limoe.data.images import preprocess_of
from limoe.data.order import BlockOrder, Order
from limoe.data.places import open_mixture, open_source, place_has_classes
from limoe.data.source import CachedSource, DataFolders, Source
from limoe.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from limoe.data.world import World, write_world
from limoe.data.world_scenes import Scenes

# Captions to train a tokenizer from, spread evenly over the data.
TOKENIZER_CAPTIONS = 200_000
# Captions to look at for the share that is cut; a source that is not ours may decode a picture for each.
_CAPTIONS_TO_COUNT = 200
# Memory for decoded images. The whole embedded world fits; of large data sets only a small part does.
CACHE_BYTES = 2 * 2**30
# A file beside evaluation shards: which captions are right in retrieval.
RETRIEVAL_FILE = "retrieval.json"

_WORLDS: dict[str, type[World]] = {"shapes": World, "scenes": Scenes}

Progress = Callable[[int, int], None]


def data_folders(config: Config, progress: Progress | None = None) -> DataFolders:
    """Find the folders of the configured shards. If the embedded world is used, write its missing shards first.

    If `data.shards` or `data.sources` is set, both evaluations use `data.eval_shards` (zero-shot needs a list of
    classes there). Without it there is no evaluation.
    """
    if config.data.shards or config.data.sources:
        return DataFolders(config.data.shards, *_evaluation(config.data.eval_shards))
    world = _WORLDS[config.data.world](seed=config.data.seed, num_pairs=config.data.world_pairs)
    folders = write_world(world, files.cache_folder(config.data.cache_dir), progress)
    if config.data.eval_shards:
        return DataFolders(folders.train, *_evaluation(config.data.eval_shards))
    return folders


def _evaluation(folder: str) -> tuple[str, str]:
    return folder if folder and place_has_classes(folder) else "", folder


def evaluation_folders(config: Config, data: str) -> DataFolders:
    """Find the folders of an evaluation: the given shards for both kinds, or those of the run's configuration."""
    if data:
        return DataFolders("", *_evaluation(data))
    return data_folders(config)


def ready_tokenizer(config: Config, path: Path) -> Tokenizer | None:
    """Load the tokenizer at `path`, or load the configured one and save it there; None if neither exists.

    Raises ConfigError if it has more pieces than `model.vocab_size`, and DataError if it cannot be read.
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
    """Load the tokenizer of a run as `ready_tokenizer` does, or train one and save it at `path`.

    Raises the errors of `ready_tokenizer`, and DataError if no tokenizer can be trained.
    """
    tokenizer = ready_tokenizer(config, path)
    if tokenizer is None:
        captions = source.captions(limit=TOKENIZER_CAPTIONS)
        model = config.model
        tokenizer = train_tokenizer(captions, vocab_size=model.vocab_size, length=model.text_length)
        assert tokenizer.vocab_size <= model.vocab_size
        tokenizer.save(path)
    return tokenizer


def cut_captions(source: Source, tokenizer: Tokenizer) -> list[str]:
    """Say which share of a few captions is too long for the model; nothing if none is."""
    captions = list(source.captions(limit=_CAPTIONS_TO_COUNT))
    cut = tokenizer.num_cut(captions)
    if not cut:
        return []
    share = f"{cut} of {len(captions)} captions looked at ({cut / len(captions):.1%})"
    return [f"{share} have more than model.text_length={tokenizer.length} tokens; the rest of them is cut off"]


def training_source(config: Config, folders: DataFolders) -> Source:
    """Open the training examples, with their pictures as the configuration wants them."""
    chosen = preprocess_of(config, training=True)
    if config.data.sources:
        return open_mixture(config.data.sources, preprocess=chosen, cache_dir=config.data.cache_dir)
    return open_source(folders.train, preprocess=chosen, cache_dir=config.data.cache_dir)


def data_facts(config: Config, source: Source, tokenizer: Tokenizer) -> dict[str, str]:
    """Describe all that decides which bits a step gets: the data, the tokenizer, and how pictures are decoded."""
    chosen = preprocess_of(config, training=True)
    return {
        **{f"data {name}": what for name, what in source.contents.items()},
        "tokenizer": hashlib.sha256(tokenizer.model).hexdigest()[:16],
        "preprocessing": f"{chosen.resize}, {chosen.interpolation}, {chosen.background}, {chosen.size} pixels",
        "decoder": f"Pillow {PIL.__version__}",
    }


def training_batches(
    config: Config, source: Source, tokenizer: Tokenizer, rows: Sequence[int] | None = None
) -> Batches:
    """Make the global batches of a run, or some of their rows. Decoded images stay in memory up to `CACHE_BYTES`."""
    chosen, data, batch_size = preprocess_of(config, training=True), config.data, config.train.batch_size
    blocks = BlockOrder(data.block_size, data.shuffle_buffer) if data.order == "blocks" else None
    if blocks is not None:
        source.keep_blocks(math.ceil(blocks.buffer * (1 if rows is None else len(rows) / batch_size)))
    return Batches(
        CachedSource(source, max_bytes=CACHE_BYTES),
        tokenizer.encode,
        batch_size=batch_size,
        seed=Order(data.seed, data.rewound_at, blocks),
        rows=rows,
        threads=data.threads,
        max_bad_share=data.max_bad_share,
        augment=chosen if chosen.resize == "whole" else None,
    )
