"""`limoe embed`: what the model gives, in a file, whatever stops it on the way, in memory that does not grow."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from run_cases import cache_folder, environment

import limoe
from limoe.cli import main
from limoe.config.presets import preset
from limoe.config.settings import override
from limoe.data import inputs
from limoe.data.places import open_source
from limoe.use import embed as embedding
from limoe.use.embed import embed


@pytest.fixture(scope="module")
def model(finished):
    return limoe.load(finished.folder)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Ten pictures in two folders, a file that is no picture and one that is not looked at."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "b").mkdir()
    random = np.random.default_rng(0)
    for number in range(10):
        pixels = random.integers(0, 256, (20, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / ("b" if number % 2 else ".") / f"{number}.png")
    (folder / "b" / "0.JPG").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("none")
    return folder


def test_a_folder_of_pictures(model, pictures, tmp_path, monkeypatch):
    """Stopped after the second batch and in the middle of a write, it goes on where it was."""
    monkeypatch.setattr(embedding, "BATCH", 4)
    out, names = tmp_path / "out.npz", [f"{n}.png" for n in range(0, 10, 2)] + [f"b/{n}.png" for n in range(1, 10, 2)]
    encode, sizes = type(model).encode_image, []

    def counted(self, images):
        sizes.append(len(images))
        if len(sizes) == 3:
            raise KeyboardInterrupt
        return encode(self, images)

    monkeypatch.setattr(type(model), "encode_image", counted)
    with pytest.raises(KeyboardInterrupt):
        embed(model, out, images=str(pictures))
    assert sizes == [4, 3, 3] and not out.exists()
    for name in ("embeddings", "inputs.jsonl"):
        with open(f"{out}.partial/{name}", "ab") as file:
            file.write(b"cut")
    done = embed(model, out, images=str(pictures))
    assert sizes == [4, 3, 3, 3]
    assert done[:2] == (10, 1) and done.first_bad[0].startswith("b/0.JPG: the image does not decode")
    with np.load(out) as found:
        assert found["names"].tolist() == names
        batches = [encode(model, [pictures / name for name in batch]) for batch in (names[:4], names[4:7], names[7:])]
        np.testing.assert_array_equal(found["embeddings"], np.concatenate(batches))
    assert not Path(f"{out}.partial").exists()


def test_shards(model, tmp_path):
    config = override(preset("tiny"), ["data.world_pairs=200", f"data.cache_dir={cache_folder()}"])
    place = inputs.data_folders(config).retrieval
    source = open_source(place, preprocess=model.preprocess)
    embed(model, tmp_path / "out.npz", images=place)
    with np.load(tmp_path / "out.npz") as found:
        assert len(found["names"]) == len(source) > 64 and found["names"][3] == source[3].key
        expected = model.encode_image([source[number].image for number in range(len(source))])
        np.testing.assert_array_equal(found["embeddings"], expected)


def test_the_command(finished, model, tmp_path, capsys):
    (tmp_path / "texts").write_bytes(
        "a red ring\n\nTwo blué squares\n\xff".encode("latin-1").replace(b"\xe9", "é".encode())
    )
    words = ["embed", f"--workdir={finished.folder}", f"--texts={tmp_path / 'texts'}", f"--out={tmp_path / 'out.npz'}"]
    assert main(words) == 0
    said = capsys.readouterr()
    assert said.out == f"wrote 2 embeddings into {tmp_path / 'out.npz'}; 2 inputs left out\n"
    assert "left out 2: the text is empty" in said.err and "left out 4: 'utf-8' codec" in said.err
    with np.load(tmp_path / "out.npz") as found:
        assert found["names"].tolist() == ["1", "3"]
        np.testing.assert_array_equal(found["embeddings"], model.encode_text(["a red ring", "Two blué squares"]))
    assert main(words) == 1 and "out.npz is there already" in capsys.readouterr().err
    assert main([*words, "--images=here"]) == 2 and main(words[:-1]) == 2
    assert "embed needs --workdir=DIR, --out=FILE.npz and either" in capsys.readouterr().err


def test_what_is_of_another_model_or_damaged_is_not_continued(model, pictures, tmp_path):
    partial = tmp_path / "out.npz.partial"
    partial.mkdir()
    (partial / "job.json").write_text(json.dumps({"step": 3}))
    with pytest.raises(limoe.InputError, match="is of another model or of other inputs"):
        embed(model, tmp_path / "out.npz", images=str(pictures))
    (partial / "job.json").unlink()
    (partial / "inputs.jsonl").write_text('["0.png", null]\n')
    with pytest.raises(limoe.InputError, match=r"lost rows that .*inputs\.jsonl lists"):
        embed(model, tmp_path / "out.npz", images=str(pictures))
    with pytest.raises(limoe.InputError, match="there is no file no/texts"):
        embed(model, tmp_path / "other.npz", texts="no/texts")
    (tmp_path / "empty").mkdir()
    with pytest.raises(limoe.InputError, match="empty holds nothing to embed"):
        embed(model, tmp_path / "other.npz", images=str(tmp_path / "empty"))
    assert not (tmp_path / "other.npz.partial").exists()


PEAK = """
import resource, sys
from limoe.cli import main
status = main(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
sys.exit(status)
"""


@pytest.mark.full
def test_memory_does_not_grow_with_the_number_of_pictures(finished, tmp_path):
    """1,000 and 20,000 pictures take the same memory within 10%."""
    peaks = {}
    random = np.random.default_rng(0)
    for count in (1_000, 20_000):
        folder = tmp_path / str(count)
        folder.mkdir()
        for number in range(count):
            Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{number:05d}.png")
        words = ["embed", f"--workdir={finished.folder}", f"--images={folder}", f"--out={tmp_path / f'{count}.npz'}"]
        ended = subprocess.run([sys.executable, "-c", PEAK, *words], env=environment(), capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        peaks[count] = int(ended.stdout.splitlines()[-1]) / 1024
    print({count: f"{peak:.0f} MB" for count, peak in peaks.items()})
    assert peaks[20_000] < 1.1 * peaks[1_000]
