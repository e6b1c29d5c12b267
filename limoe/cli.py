"""The command line: the command `limoe` and its words, such as `limoe train`."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import signal
import sys
import tempfile
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import flags

from limoe import __version__
from limoe.config.presets import PRESETS, preset
from limoe.config.schema import Config
from limoe.config.settings import override, settings_help
from limoe.errors import LimoeError, nearest
from limoe.usage import USAGE

FLAGS = flags.FLAGS
_PRESET = flags.DEFINE_string("preset", "tiny", f"named configuration: {', '.join(PRESETS)}")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "train: the run's folder (default: runs/PRESET); study: what it keeps; all others: the run to read"
)
_SET = flags.DEFINE_multi_string("set", [], "one or more settings, key=value")
_DATA = flags.DEFINE_string(
    "data", "", "eval, index: the shards (eval: default the run's; with a classes.json in the folder also zero-shot)"
)
_PROBE_DATA = flags.DEFINE_string(
    "probe-data",
    "",
    "eval: shards with class labels, for a linear probe with 10 images of each class (default: no probe)",
)
_JSON = flags.DEFINE_bool("json", False, "print one JSON object")
_PROFILE = flags.DEFINE_integer(
    "profile", 0, "steps to trace with jax.profiler into WORKDIR/profile, after the first five; 0 = none", lower_bound=0
)
_ACCEPT = flags.DEFINE_bool(
    "accept-new-data", False, "train: go on with other data or another tokenizer than the run began with"
)
_TENSORBOARD = flags.DEFINE_bool(
    "tensorboard", False, "train: also log to TensorBoard, into WORKDIR/tensorboard (the extra tensorboard)"
)
_INIT = flags.DEFINE_string("init", "", "train: run or export whose parameters to begin with (init.source)")
_UPCYCLE = flags.DEFINE_bool("upcycle", False, "train: make experts of the MLPs of a dense --init (init.upcycle)")
_REWIND = flags.DEFINE_integer(
    "rewind",
    None,
    "train: go back to the checkpoint of this step first, and take the data in another order from there; give it once",
    lower_bound=1,
)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "train: address HOST:PORT of process 0, for several processes")
_NUM_PROCESSES = flags.DEFINE_integer(
    "num-processes", None, "train: number of processes that train together", lower_bound=1
)
_PROCESS_ID = flags.DEFINE_integer("process-id", None, "train: number of this process, from 0", lower_bound=0)
_TOPOLOGY = flags.DEFINE_string("topology", None, "plan: the TPU pod, kind and chips along each side, as in v5p:8x8x8")
_BATCH = flags.DEFINE_integer("batch", None, "plan: pairs in a step (default: the preset's)", lower_bound=2)
_SEARCH = flags.DEFINE_bool("search", False, "plan: try meshes, rematerialisation and chunks, and show the best")
_SCHEDULE = flags.DEFINE_bool(
    "schedule", False, "plan: also price the step by the compiler's own schedule; takes minutes more"
)

_CLASSES = flags.DEFINE_list("classes", [], "classify: names of the classes, with commas between them")
_TEMPLATES = flags.DEFINE_string(
    "templates", "none", "classify: sentences around a class name: none, simple or imagenet80 (CLIP's)"
)
_STEP = flags.DEFINE_integer(
    "step", None, "classify, embed, export: the checkpoint's step (default: the newest)", lower_bound=0
)
_SEEDS = flags.DEFINE_integer("seeds", 3, "study: trainings of each kind, which differ in their seed", lower_bound=1)
_SCALE = flags.DEFINE_string("scale", "small", "study: how large its trainings are: smoke, small or full")
_LIST = flags.DEFINE_bool("list", False, "study: list all studies with their cost, and run none")
_OUT = flags.DEFINE_string(
    "out",
    None,
    "export: the folder to write, which must be new or empty; embed: the .npz file to write; "
    "report: the file (default: WORKDIR/report.html); index --check: the report (default: check.json)",
)
_PART = flags.DEFINE_string("part", "1/1", "index: which of how many equal parts of the shards, as in 3/64")
_CHECK = flags.DEFINE_bool("check", False, "index: also decode every example once, and report what is bad")
_JOBS = flags.DEFINE_integer("jobs", None, "index: processes (default: one for each core)", lower_bound=1)
_IMAGES = flags.DEFINE_string("images", "", "embed: a folder of pictures, or shards")
_TEXTS = flags.DEFINE_string("texts", "", "embed: a UTF-8 file with a text a line")

# Import names of the packages that the extra `train` installs.
TRAINER = (
    *("einops", "flatbuffers", "flax", "fsspec", "grain", "matplotlib", "optax"),
    *("orbax", "PIL", "safetensors", "sentencepiece", "tqdm"),
)

_HELP = ("help", "-h", "-help", "--help")


class UsageError(Exception):
    """The command line has wrong words or flags."""


def main(words: Sequence[str]) -> int:
    """Run a command line without the program's name. Returns the exit status: 1 for a failure, 2 for wrong usage."""
    if list(words) == ["--version"]:
        print(f"limoe {__version__}")
        return 0
    if missing := [name for name in TRAINER if importlib.util.find_spec(name) is None]:
        packages = "pip install 'limoe-jax[train]', or in a checkout pip install '.[train]'"
        print(f"limoe: {', '.join(missing)} not installed; the trainer needs its extra: {packages}", file=sys.stderr)
        return 2
    help_wanted = any(word in _HELP for word in words)
    try:
        rest = _parse([word for word in words if word not in _HELP])
        return _help() if help_wanted else _command(rest)
    except UsageError as error:
        print(f"limoe: {error}\n\n{USAGE}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        raise  # the reader of our output has closed it; see `run`
    except (LimoeError, OSError) as error:
        print(f"limoe: {error}", file=sys.stderr)
        return 1


def _parse(words: Sequence[str]) -> list[str]:
    """Parse the flags and return the other words."""
    for name in _FLAGS:  # a second call in one process starts from the defaults
        FLAGS[name].unparse()
    try:
        return FLAGS(["limoe", *words])[1:]
    except flags.Error as error:
        raise UsageError(str(error)) from error


def _command(words: list[str]) -> int:
    command = words.pop(0) if words else ""
    if not command:
        print(USAGE)
        return 0
    if command not in _COMMANDS:
        close = nearest(command, _COMMANDS)
        hint = f"did you mean {close!r}? " if close else ""
        raise UsageError(f"there is no command {command!r}; {hint}commands are {', '.join(_COMMANDS)}")
    function, taken = _COMMANDS[command]
    for flag in _FLAGS:
        if FLAGS[flag].present and flag not in taken:
            flags_taken = ", ".join(f"--{name}" for name in taken)
            raise UsageError(f"limoe {command} does not take --{flag}; its flags are {flags_taken}")
    if command in _TAKES_WORDS:
        return function(words)
    settings = [*_SET.value, *(word for word in words if "=" in word and _SET.present)]
    strange = [word for word in words if word not in settings]
    if strange:
        raise UsageError(
            f"{strange[0]!r} is not expected after {command!r}" + "; put --set before it" * ("=" in strange[0])
        )
    return function(settings)


def _config(settings: list[str]) -> Config:
    return override(preset(_PRESET.value), settings)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _help() -> int:
    print(USAGE)
    print("Flags:")
    for name in _FLAGS:
        flag = FLAGS[name]
        default = f" (default: {flag.default})" if flag.default not in (None, "", []) else ""
        print(textwrap.fill(f"--{name}  {flag.help}{default}", 110, initial_indent="  ", subsequent_indent="      "))
    print()
    return _settings([])


def _settings(settings: list[str]) -> int:
    print(settings_help(_PRESET.value))
    return 0


def _train(settings: list[str]) -> int:
    from limoe.parallel import processes
    from limoe.train import loggers
    from limoe.train.loop import train

    if _INIT.value:
        settings = [*settings, f"init.source={_INIT.value}"]
    if _UPCYCLE.value:
        settings = [*settings, "init.upcycle=true"]
    config = _config(settings)
    processes.join(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    folder = _WORKDIR.value or str(Path("runs") / config.preset)
    rewind, profile_steps, accept = _REWIND.value, _PROFILE.value, _ACCEPT.value
    with contextlib.ExitStack() as stack:
        if _TENSORBOARD.value:
            if importlib.util.find_spec("tensorboardX") is None:
                raise UsageError("--tensorboard needs its extra: pip install 'limoe-jax[tensorboard]'")
            from limoe.train.tensorboard import TensorBoard

            stack.enter_context(loggers.registered("tensorboard", TensorBoard))
        return train(config, folder, rewind=rewind, profile_steps=profile_steps, accept_new_data=accept)


def _describe(settings: list[str]) -> int:
    from limoe.model.describe import as_text, describe

    description = describe(_config(settings))
    print(json.dumps(description._asdict()) if _JSON.value else as_text(description))
    return 0


def _evaluate(settings: list[str]) -> int:
    from limoe.evaluate.command import evaluate_run, evaluation_text

    if _WORKDIR.value is None:
        raise UsageError("eval needs --workdir=DIR, the folder of a trained run")
    result = evaluate_run(_WORKDIR.value, _DATA.value, _PROBE_DATA.value, say=_say)
    print(json.dumps(result) if _JSON.value else evaluation_text(result))
    return 0


def _classify(images: list[str]) -> int:
    from limoe.use.model import load

    if _WORKDIR.value is None or not _CLASSES.value or not images:
        raise UsageError("classify needs --workdir=DIR, --classes=NAME,NAME and one or more pictures")
    model = load(_WORKDIR.value, step=_STEP.value)
    scores = model.classify(images, _CLASSES.value, templates=_TEMPLATES.value)
    found = {
        image: dict(zip(_CLASSES.value, row.tolist(), strict=True)) for image, row in zip(images, scores, strict=True)
    }
    if _JSON.value:
        print(json.dumps(found))
        return 0
    for image, row in found.items():
        best = sorted(row.items(), key=lambda item: -item[1])[:5]
        print(f"{image}: {', '.join(f'{name} {score:.1%}' for name, score in best)}")
    return 0


def _embed(settings: list[str]) -> int:
    from limoe.use.embed import embed
    from limoe.use.model import load

    if _WORKDIR.value is None or _OUT.value is None or bool(_IMAGES.value) == bool(_TEXTS.value):
        raise UsageError(
            "embed needs --workdir=DIR, --out=FILE.npz and either --images=FOLDER_OR_SHARDS or --texts=FILE"
        )
    model = load(_WORKDIR.value, step=_STEP.value)
    found = embed(model, _OUT.value, images=_IMAGES.value, texts=_TEXTS.value, progress=True)
    for bad in found.first_bad:
        _say(f"left out {bad}")
    print(f"wrote {found.num_rows:,} embeddings into {_OUT.value}; {found.num_bad:,} inputs left out")
    return 0


def _index(settings: list[str]) -> int:
    from limoe.data.indexing import Work, as_text, index_shards, part_of, report_of
    from limoe.train.progress import progress_callback

    if not _DATA.value or (_OUT.value and not _CHECK.value):
        raise UsageError("index needs --data=SHARDS, and takes --out=FILE.json only with --check")
    part = part_of(_PART.value)
    default = "check.json" if part == (1, 1) else f"check-{part[0]}-of-{part[1]}.json"
    report = (_OUT.value or default) if _CHECK.value else ""
    work = Work(_DATA.value, part, _config(settings).data.cache_dir, report)
    jobs = _JOBS.value or len(os.sched_getaffinity(0))
    found = report_of(index_shards(work, jobs=jobs, progress=progress_callback("indexing", "shard")))
    print(json.dumps(found) if _JSON.value else as_text(found, checked=_CHECK.value))
    if report:
        _say(f"wrote {report}")
    return 1 if found["indexes that could not be stored"] else 0


def _export(settings: list[str]) -> int:
    from limoe.evaluate.restore import restored_encoder
    from limoe.use.export import write_export

    if _WORKDIR.value is None or _OUT.value is None:
        raise UsageError("export needs --workdir=DIR, the folder of a trained run, and --out=DIR, a new folder")
    restored = restored_encoder(_WORKDIR.value, step=_STEP.value)
    for message in restored.skipped:
        _say(message)
    write_export(restored, _WORKDIR.value, _OUT.value)
    print(f"wrote step {restored.step:,} of {_WORKDIR.value} into {_OUT.value}")
    return 0


def _report(settings: list[str]) -> int:
    from limoe.report.page import write_report

    if _WORKDIR.value is None:
        raise UsageError("report needs --workdir=DIR, the folder of a run")
    print(f"wrote {write_report(_WORKDIR.value, _OUT.value, say=_say)}")
    return 0


def _study(words: list[str]) -> int:
    from limoe.study.command import list_text, run_study

    if _LIST.value:
        print(list_text(_SEEDS.value))
        return 0
    settings = [*_SET.value, *(word for word in words if "=" in word)]
    names = [word for word in words if "=" not in word]
    if len(names) != 1:
        raise UsageError("study needs the name of one study; limoe study --list shows them")
    folder = Path(_WORKDIR.value or "runs/study")
    run_study(names[0], folder, scale=_SCALE.value, num_seeds=_SEEDS.value, settings=settings)
    return 0


def _plan(settings: list[str]) -> int:
    from limoe.plan import compiler
    from limoe.plan.planner import plan
    from limoe.plan.search import search
    from limoe.plan.text import as_text

    if _TOPOLOGY.value is None:
        raise UsageError("plan needs --topology=KIND:SHAPE, such as --topology=v5p:8x8x8")
    if _BATCH.value is not None:
        settings = [*settings, f"train.batch_size={_BATCH.value}"]
    config = _config(settings)
    planned = plan
    with tempfile.TemporaryDirectory() as folder:
        if _SCHEDULE.value:
            compiler.write_schedules(Path(folder))
            planned = functools.partial(plan, schedules=Path(folder))
        if _SEARCH.value:
            result = search(config, _TOPOLOGY.value, say=_say, planned=planned)
        else:
            result = planned(config, _TOPOLOGY.value)
    print(json.dumps(result.as_json()) if _JSON.value else as_text(result))
    return 0


_TRAIN_FLAGS = (
    *("preset", "workdir", "set", "init", "upcycle", "rewind", "profile", "accept-new-data"),
    "tensorboard",
    *("coordinator", "num-processes", "process-id"),
)
# The function of each command, and the flags that it takes.
_COMMANDS: dict[str, tuple[Callable[[list[str]], int], tuple[str, ...]]] = {
    "train": (_train, _TRAIN_FLAGS),
    "eval": (_evaluate, ("workdir", "data", "probe-data", "json")),
    "classify": (_classify, ("workdir", "classes", "templates", "step", "json")),
    "embed": (_embed, ("workdir", "images", "texts", "out", "step")),
    "index": (_index, ("data", "part", "check", "jobs", "out", "set", "json")),
    "export": (_export, ("workdir", "out", "step")),
    "report": (_report, ("workdir", "out")),
    "study": (_study, ("seeds", "workdir", "scale", "set", "list")),
    "describe": (_describe, ("preset", "set", "json")),
    "plan": (_plan, ("preset", "topology", "batch", "set", "search", "schedule", "json")),
    "settings": (_settings, ("preset",)),
}
_FLAGS = tuple(dict.fromkeys(flag for _, taken in _COMMANDS.values() for flag in taken))
# The words of these commands are not all settings.
_TAKES_WORDS = ("classify", "study")


def _restart_with_huge_pages() -> None:
    """Begin this process again, once, with an allocator that asks Linux for huge pages.

    A train step on a CPU writes hundreds of megabytes of fresh arrays, and in pages of 4 kB their faults take a quarter
    of the time: 20 steps of `tiny` took 24.6 s of processor time without and 19.3 s with huge pages (2 cores of an AMD
    EPYC, 2026-11-30). glibc reads this variable only when a process starts; whatever else reads it ignores the name.
    """
    given = os.environ.get("GLIBC_TUNABLES", "")
    if "glibc.malloc.hugetlb" in given:
        return
    os.environ["GLIBC_TUNABLES"] = f"{given}:glibc.malloc.hugetlb=1".removeprefix(":")
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def run() -> None:
    """Entry point of the `limoe` command."""
    if sys.platform == "linux" and sys.argv[1:2] == ["train"]:
        _restart_with_huge_pages()
    try:
        status = main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:
        # As in `limoe settings | head`: no traceback for it, neither here nor from the flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    sys.exit(status)
