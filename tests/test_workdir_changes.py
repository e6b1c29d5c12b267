"""What may change while a run goes on, what may not, and folders of an earlier version."""

import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest
from data_cases import caption, colour_examples

from limoe.config.presets import preset
from limoe.config.schema import Config
from limoe.config.settings import from_json, override, to_json
from limoe.data import inputs
from limoe.data.shards import write_shard
from limoe.data.tokenizer import train_tokenizer
from limoe.parallel import processes
from limoe.train.optim import make_schedule
from limoe.workdir.data import check_data, check_tokenizer
from limoe.workdir.folder import Workdir, WorkdirError
from limoe.workdir.metrics import write_json

TINY = preset("tiny")


def test_what_does_not_change_the_result_may_change_on_the_way(tmp_path: Path) -> None:
    began = override(TINY, ["data.shards=here", "data.eval_shards=there", "data.cache_dir=one"])
    Workdir.open(tmp_path, began).close()
    free = ["data.threads=5", "data.cache_dir=two", "train.log_every=3", "train.checkpoint_every=7", "routing_every=9"]
    free += ["train.non_finite=skip", "train.max_skipped=3"]
    goes_on = override(began, [*free, "mesh.keep_exchanged=false", "train.checkpoints_kept=4", "max_bad_share=0.1"])
    with Workdir.open(tmp_path, goes_on) as workdir:
        (said,) = workdir.changes
        assert "changed settings: data.threads (2 before, 5 now), data.max_bad_share (0.05 before, 0.1 now), " in said
        assert "nothing checks" not in said
    assert from_json((tmp_path / "config.json").read_text()) == goes_on == Workdir.existing(tmp_path).config
    with Workdir.open(tmp_path, override(goes_on, ["data.shards=moved"])) as workdir:
        assert workdir.changes == ("changed settings: data.shards ('here' before, 'moved' now)",)
    with Workdir.open(tmp_path, workdir.config) as again:
        assert again.changes == ()
    for other in ("data.shards=", "data.seed=1", "train.batch_size=64", "data.tokenizer=mine"):
        with pytest.raises(WorkdirError, match="was made with other settings"):
            Workdir.open(tmp_path, override(workdir.config, [other]))
    assert Workdir.existing(tmp_path).config == workdir.config


@pytest.mark.parametrize(("cooldown", "saved", "fits"), [(250, 251, True), (250, 252, False), (0, 500, True)])
def test_steps_may_grow_until_the_cooldown_has_begun(tmp_path: Path, cooldown: int, saved: int, fits: bool) -> None:
    """251 of 500 steps: update 252 is the first one that a cool-down of 250 steps makes smaller."""
    began = override(TINY, ["train.steps=500", f"optimizer.cooldown_steps={cooldown}"])
    longer = override(began, ["train.steps=600"])
    schedules = (make_schedule(config.optimizer, config.train.steps) for config in (began, longer))
    rates, others = (np.asarray(jax.vmap(schedule)(np.arange(saved))) for schedule in schedules)
    assert (rates == others).all() == fits
    with Workdir.open(tmp_path, began) as workdir:
        (workdir.checkpoints / f"step_{saved:08d}").mkdir(parents=True)
    if fits:
        with Workdir.open(tmp_path, longer) as workdir:
            assert "train.steps (500 before, 600 now)" in workdir.changes[0]
        with pytest.raises(WorkdirError, match=r"train\.steps \(600 there, 500 now\); train.steps may grow only"):
            Workdir.open(tmp_path, began)
    else:
        with pytest.raises(WorkdirError, match=r"train\.steps \(500 there, 600 now\); train.steps may grow only while"):
            Workdir.open(tmp_path, longer)
    write_json(workdir.summary, {})
    with pytest.raises(WorkdirError, match="may grow only"):
        Workdir.open(tmp_path, override(longer, ["train.steps=700"]))


def test_data_that_changed_are_refused_and_a_moved_folder_is_not(tmp_path: Path) -> None:
    """A shard that was added, one that was replaced, and another tokenizer: each is named. A place is none."""
    folder, moved = tmp_path / "a", tmp_path / "b"
    folder.mkdir()
    write_shard(folder / "0.tar", colour_examples(3))
    tokenizer = train_tokenizer([caption(n) for n in range(9)], vocab_size=40, length=8)

    def facts(place: Path, *more: str) -> dict[str, str]:
        config = override(TINY, [f"data.shards={place}", *more])
        return inputs.data_facts(config, inputs.training_source(config, inputs.data_folders(config)), tokenizer)

    with Workdir.open(tmp_path / "run", TINY) as workdir:
        assert check_data(workdir, facts(folder), accept=False) == ()
        folder.rename(moved)
        os.utime(moved / "0.tar", (0, 0))
        assert check_data(workdir, facts(moved), accept=False) == ()
        for setting in ("data.background=black", "data.preprocess=augment", "data.interpolation=bicubic"):
            with pytest.raises(WorkdirError, match=r"began with other data: preprocessing \(squash, bilinear, white"):
                check_data(workdir, facts(moved, setting), accept=False)
        write_shard(moved / "1.tar", colour_examples(2))
        with pytest.raises(WorkdirError, match=r"data 1\.tar \(missing before, \d+ bytes, .*--accept-new-data"):
            check_data(workdir, facts(moved), accept=False)
        [said] = check_data(workdir, facts(moved), accept=True)
        assert "accepted new data: data 1.tar" in said and check_data(workdir, facts(moved), accept=False) == ()
        write_shard(moved / "1.tar", colour_examples(2, first=7))
        with pytest.raises(WorkdirError, match=r"data 1\.tar \(\d+ bytes, index \w+ before"):
            check_data(workdir, facts(moved), accept=False)
        flipped = bytearray(tokenizer.model)
        flipped[-1] ^= 1
        workdir.tokenizer.write_bytes(tokenizer.model)
        check_tokenizer(workdir)
        workdir.tokenizer.write_bytes(flipped)
        with pytest.raises(WorkdirError, match="not the tokenizer of this run"):
            check_tokenizer(workdir)
        assert workdir.discard_unstarted() and not workdir.data.exists()


def test_every_process_must_have_the_same_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    others = {"data 0.tar": "9 bytes"}
    monkeypatch.setattr(processes, "texts_of_all", lambda text: [text, json.dumps(others) if "{" in text else "else"])
    with Workdir.open(tmp_path, TINY) as workdir:
        with pytest.raises(WorkdirError, match=r"process 1 has other data than process 0: data 1\.tar \(7 bytes in"):
            check_data(workdir, {**others, "data 1.tar": "7 bytes"}, accept=True)
        assert not workdir.data.exists()


def as_in_0_1_0(config: Config) -> str:
    """The config.json that version wrote."""
    tree = json.loads(as_in_format_2(config))
    del tree["format"], tree["train"]["routing_every"], tree["loss"]["extra"]
    return json.dumps(tree, indent=2)


def as_in_format_2(config: Config) -> str:
    tree = json.loads(to_json(config)) | {"format": 2}
    del tree["init"]
    came = {
        "loss": ("max_logit_scale", "mask_equal_captions"),
        "train": ("non_finite", "max_skipped"),
        "data": (
            *("rewound_at", "sources", "preprocess", "interpolation", "background", "world"),
            *("order", "block_size", "shuffle_buffer"),
        ),
    }
    for section, names in came.items():
        for name in names:
            del tree[section][name]
    return json.dumps(tree, indent=2)


def test_the_second_format_is_read() -> None:
    assert from_json(as_in_format_2(TINY)) == override(TINY, ["data.background=black"])


def test_what_the_run_itself_wrote_stays_when_a_command_leaves_it_out(tmp_path: Path) -> None:
    begun = override(TINY, ["init.source=there", "init.upcycle=true"])
    with Workdir.open(tmp_path, begun) as workdir:
        workdir.record(override(begun, ["init.digest=ab", "data.rewound_at=7,3"]))
    with Workdir.open(tmp_path, begun) as workdir:
        assert workdir.config == override(begun, ["init.digest=ab", "data.rewound_at=7,3"]) and workdir.changes == ()
    for settings, words in (
        (["init.source=there", "init.upcycle=true", "init.digest=cd"], r"init\.digest \('ab' there, 'cd' now\)"),
        ([], r"init\.source \('there' there, '' now\)"),
    ):
        with pytest.raises(WorkdirError, match=words):
            Workdir.open(tmp_path, override(TINY, settings))


def test_a_folder_of_the_first_version_is_read_and_not_continued(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(as_in_0_1_0(TINY))
    then = override(TINY, ["data.background=black"])
    assert Workdir.existing(tmp_path).config == then
    with pytest.raises(WorkdirError, match=r"made by limoe 0\.1\.0, .* limoe eval.*or start a new run with --workdir"):
        Workdir.open(tmp_path, then)
    write_json(tmp_path / "summary.json", {})
    before = (tmp_path / "config.json").read_bytes()
    with Workdir.open(tmp_path, override(then, ["data.threads=5"])) as workdir:
        assert workdir.finished and workdir.changes == ()
    assert (tmp_path / "config.json").read_bytes() == before
