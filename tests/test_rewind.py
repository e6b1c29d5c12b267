"""A run that is taken back to a checkpoint: what came after it is kept aside, and what comes now is exact."""

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from run_cases import Ran, metrics, ran, result
from test_data_batches import NumberedSource, encode
from test_train import stop_after

from limoe.data.batches import Batches
from limoe.data.order import Order
from limoe.workdir.checkpoint import CheckpointError


@pytest.mark.slow
def test_a_rewound_run_goes_on_with_other_data(tmp_path: Path, finished: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("whole", "stopped"):
        shutil.copytree(finished.folder, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"cannot rewind to step 9; the checkpoints in .* are of: 8, 12"):
        ran(tmp_path / "whole", rewind=9)
    assert not (tmp_path / "whole" / "rewound").exists()
    whole = ran(tmp_path / "whole", rewind=8)
    aside = tmp_path / "whole" / "rewound" / "1"
    assert f"rewound to step 8; the steps after it are in {aside}" in whole.said
    assert {path.name for path in aside.iterdir()} == {"metrics.jsonl", "step_00000012", "summary.json"}
    before = metrics(finished.folder)
    assert [json.loads(line) for line in (aside / "metrics.jsonl").read_text().splitlines()] == before[8:]
    after = metrics(whole.folder)
    assert after[:8] == before[:8] and [line["step"] for line in after] == list(range(1, 13))
    assert all(a["total"] != b["total"] for a, b in zip(after[8:], before[8:], strict=True))
    assert json.loads((whole.folder / "config.json").read_text())["data"]["rewound_at"] == [8]

    with monkeypatch.context() as patch:
        stop_after(patch, 10, signal.SIGTERM)
        ran(tmp_path / "stopped", rewind=8)
    ran(tmp_path / "stopped")  # the command without --rewind
    assert result(tmp_path / "stopped") == result(whole.folder)


def test_the_last_rewind_before_a_step_gives_its_order() -> None:
    def orders(*rewound_at: int) -> list[list[int]]:
        batches = Batches(NumberedSource(40), encode, batch_size=10, seed=Order(0, rewound_at))
        return [[batches._example_at(step, row, batches._order.at(step)) for row in range(10)] for step in range(8)]

    plain, once, twice, further_back = orders(), orders(4), orders(4, 4), orders(4, 2)
    assert once[:4] == plain[:4] and once[4:] != plain[4:]
    assert twice[:4] == plain[:4] and not any(a == b for a, b in zip(twice[4:], once[4:], strict=True))
    assert further_back[:2] == plain[:2] and further_back[4:] == twice[4:]
    assert sorted(np.ravel(once[4:])) == list(range(40))
