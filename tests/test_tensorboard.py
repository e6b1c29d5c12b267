"""What the TensorBoard logger writes is read back from its event files."""

import io
import struct

import numpy as np
import pytest
from PIL import Image
from run_cases import config, ran
from tensorboardX.proto.event_pb2 import Event

from limoe import cli
from limoe.train import loggers
from limoe.train.tensorboard import TensorBoard
from limoe.workdir.metrics import read_metrics


def events(folder):
    """The events of a folder's files: each is its length, a checksum of that, the event, and a checksum of that."""
    for path in sorted(folder.glob("events.*")):
        content, place = path.read_bytes(), 0
        while place < len(content):
            (length,) = struct.unpack_from("<Q", content, place)
            event = Event()
            event.ParseFromString(content[place + 12 : place + 12 + length])
            yield event
            place += length + 16


def values(folder):
    """The newest value of each tag and step."""
    return {(value.tag, event.step): value for event in events(folder) for value in event.summary.value}


@pytest.mark.slow
def test_a_run_logs_scalars_pictures_and_histograms(tmp_path):
    with loggers.registered("tensorboard", TensorBoard):
        run = ran(tmp_path / "run", "train.steps=4", "train.routing_every=2", rendered=True).folder
    found, lines = values(run / "tensorboard"), list(read_metrics(run / "metrics.jsonl"))
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        for name in ("total", "contrastive", "gradient_norm", "learning_rate", "scale", "pairs_per_second"):
            assert found[name, line["step"]].simple_value == pytest.approx(line[name], rel=1e-6)
        for number, modality in enumerate(("image", "text")):
            scalar = found[f"success_rate/block1_{modality}", line["step"]].simple_value
            assert scalar == pytest.approx(line["success_rate"][0][number], rel=1e-6)
            if line["step"] == 3:
                assert (f"load/block1_{modality}", 3) not in found and ("experts", 3) not in found
                continue
            histogram = found[f"load/block1_{modality}", line["step"]].histo
            assert list(histogram.bucket) == line["wanted"][0][number] and list(histogram.bucket_limit) == [1, 2, 3, 4]
    for step in (1, 2, 4):
        with Image.open(io.BytesIO(found["experts", step].image.encoded_image_string)) as picture:
            assert np.asarray(picture.convert("L")).std() > 5
    assert not {tag for tag, _ in found} & {"bad_first", "wanted", "zero_shot_top1"}
    with pytest.raises(KeyError):
        loggers.unregister("tensorboard")


def test_a_run_that_goes_on_takes_back_what_it_logs_again(tmp_path):
    dense = config(name="tiny-dense")
    for steps in ([1, 2, 3], [3, 4]):
        logger = TensorBoard(tmp_path, dense)
        for step in steps:
            logger.log(step, {"total": 10.0 * len(steps) + step, "bad_first": [], "zero_shot_top1": None})
        logger.close()
    assert [event.step for event in events(tmp_path / "tensorboard") if event.session_log.status] == [1, 3]
    assert values(tmp_path / "tensorboard")["total", 3].simple_value == 23
    TensorBoard(tmp_path / "nothing", dense).close()
    assert not (tmp_path / "nothing").exists()


def test_without_its_extra_the_command_says_what_to_install(capsys, monkeypatch, tmp_path):
    there = cli.importlib.util.find_spec
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None if name == "tensorboardX" else there(name))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "--tensorboard"]) == 2
    assert "pip install 'limoe-jax[tensorboard]'" in capsys.readouterr().err and not list(tmp_path.iterdir())
