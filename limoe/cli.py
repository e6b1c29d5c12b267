"""The command line: `limoe train`, `limoe eval`, `limoe describe`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags, logging

from limoe.checkpoint import CheckpointError
from limoe.config import Config, ConfigError
from limoe.data.files import DataError, StorageError
from limoe.presets import PRESETS, preset
from limoe.settings import override, settings_help
from limoe.workdir import WorkdirError

FLAGS = flags.FLAGS
_PRESET = flags.DEFINE_string("preset", "tiny", f"train, describe: named configuration ({', '.join(PRESETS)}).")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "train: folder of the run (default: runs/PRESET); eval: folder of a trained run."
)
_SET = flags.DEFINE_multi_string(
    "set", [], "train, describe: settings by name, key=value; several may follow one another (see: limoe settings)."
)
_DATA = flags.DEFINE_string(
    "data", "", "eval: folder of shards to evaluate on (default: the run's own); classes.json in it asks for zero-shot."
)
_JSON = flags.DEFINE_bool("json", False, "eval, describe: print one JSON object.")
_PROFILE = flags.DEFINE_integer(
    "profile", 0, "train: steps to trace with jax.profiler into WORKDIR/profile (default: 0, none).", lower_bound=0
)

USAGE = """limoe: train and evaluate a language-image mixture of experts.

  limoe train [--preset=tiny] [--workdir=runs/PRESET] [--set key=value ...] [--profile=STEPS]
      Train, evaluate, and write figures and summary.json into the work folder. Without arguments: the tiny model on the
      embedded world, a few minutes on two CPU cores. The same command goes on with an interrupted run.
  limoe eval --workdir=DIR [--data=SHARDS] [--json]
      Evaluate the newest checkpoint: zero-shot classification and retrieval.
  limoe describe [--preset=tiny] [--set key=value ...] [--json]
      Parameters and FLOPs of a configuration; nothing is allocated.
  limoe settings [--preset=tiny]
      All settings that --set takes, with type, default and unit.
"""

# What a person can mend gets a message; anything else is a bug and keeps its traceback.
_EXPECTED = (ConfigError, WorkdirError, CheckpointError, DataError, StorageError)


class UsageError(Exception):
    """The words of the command are off."""


def main(arguments: Sequence[str]) -> int:
    """Run a command given as a list of words, flags already parsed; the exit status."""
    from limoe.train import TrainingError

    try:
        return _command(list(arguments[1:]))
    except UsageError as error:
        print(f"limoe: {error}\n\n{USAGE}", file=sys.stderr)
        return 2
    except (*_EXPECTED, TrainingError) as error:
        print(f"limoe: {error}", file=sys.stderr)
        return 1


def _command(words: list[str]) -> int:
    command = words.pop(0) if words else "help"
    settings = [*_SET.value, *(word for word in words if "=" in word)]
    strange = [word for word in words if "=" not in word]
    if strange:
        raise UsageError(f"{strange[0]!r} is not expected after {command!r}")
    commands = {"train": _train, "eval": _evaluate, "describe": _describe, "settings": _settings, "help": _help}
    if command not in commands:
        raise UsageError(f"there is no command {command!r}; commands are {', '.join(commands)}")
    return commands[command](settings)


def _config(settings: list[str]) -> Config:
    return override(preset(_PRESET.value), settings)


def _help(settings: list[str]) -> int:
    print(USAGE)
    return 0


def _settings(settings: list[str]) -> int:
    print(settings_help(_PRESET.value))
    return 0


def _train(settings: list[str]) -> int:
    from limoe.train import train

    config = _config(settings)
    folder = _WORKDIR.value or str(Path("runs") / config.preset)
    return train(config, folder, profile_steps=_PROFILE.value)


def _describe(settings: list[str]) -> int:
    from limoe.describe import as_text, describe

    description = describe(_config(settings))
    print(json.dumps(description._asdict()) if _JSON.value else as_text(description))
    return 0


def _evaluate(settings: list[str]) -> int:
    from limoe.evaluation import evaluate_run, evaluation_text

    if _WORKDIR.value is None:
        raise UsageError("eval needs --workdir=DIR, the folder of a trained run")
    if settings:
        raise UsageError("eval takes the settings of the run; --set is for train and describe")
    result = evaluate_run(_WORKDIR.value, _DATA.value, say=lambda text: print(text, file=sys.stderr))
    print(json.dumps(result) if _JSON.value else evaluation_text(result))
    return 0


def run() -> None:
    """Entry point of the `limoe` command."""
    if len(sys.argv) == 1 or sys.argv[1] in ("-h", "--help", "-help"):
        print(USAGE)
        sys.exit(0)
    # JAX reports at INFO which platforms it did not find; --verbosity=0 shows that again.
    FLAGS.set_default("verbosity", logging.WARNING)
    app.run(main)
