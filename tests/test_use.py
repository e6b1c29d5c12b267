"""A trained model in Python: it gives what evaluation gives, for every kind of input, and says what it cannot take."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

import limoe
from limoe.cli import main
from limoe.data.templates import TEMPLATES
from limoe.data.tokenizer import load_tokenizer
from limoe.evaluate.restore import restored_encoder
from limoe.use.export import write_export
from limoe.workdir.checkpoint import CheckpointError
from limoe.workdir.folder import WorkdirError
from limoe.workdir.weights import ExportError

SENTENCES = ["a red ring", "Two blue squares", "nothing"]


@pytest.fixture(scope="module")
def model(finished):
    return limoe.load(finished.folder)


@pytest.fixture(scope="module")
def pictures():
    return np.random.default_rng(0).integers(0, 256, (70, 16, 16, 3), dtype=np.uint8)


def test_embeddings_are_those_of_an_evaluation(finished, model, pictures):
    theirs = restored_encoder(finished.folder, batch_sizes=[64]).encoder
    mine = model.encode_image(iter(pictures)), model.encode_text(SENTENCES)
    bound = 8 * np.finfo(np.float32).eps * np.sqrt(32)
    np.testing.assert_allclose(mine[0], theirs.images(pictures), atol=bound)
    np.testing.assert_allclose(mine[1], theirs.texts(SENTENCES), atol=bound)
    assert mine[0].dtype == mine[1].dtype == np.float32
    np.testing.assert_allclose(model.similarity(pictures[:2], SENTENCES), mine[0][:2] @ mine[1].T, atol=bound)
    np.testing.assert_allclose(model.features(pictures[:3]), theirs.image_features(pictures[:3]), atol=bound)
    assert (model.logit_scale, model.step) == (theirs.scale, 12)


def test_a_picture_may_come_in_any_form(model, tmp_path):
    pixels = np.random.default_rng(1).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image.save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    grey, clear = pixels[..., 0], np.dstack([pixels, np.full((24, 40), 255, np.uint8)])
    forms = [tmp_path / "a.png", str(tmp_path / "a.png"), content, image, pixels, clear]
    found = model.encode_image([*forms, grey, grey[..., None], np.dstack([grey] * 3)])
    np.testing.assert_array_equal(found[:6], np.broadcast_to(found[0], found[:6].shape))
    np.testing.assert_array_equal(found[6:], np.broadcast_to(found[6], found[6:].shape))
    assert abs(found[0] - found[6]).max() > 1e-3


def test_classes_get_the_softmax_of_scaled_similarities(model, pictures):
    classes, templates = ["Ring", "square"], ["a {}", "a photo of {}"]
    found = model.classify(pictures[:5], classes, templates=templates)
    means = [model.encode_text([t.format(c.lower()) for t in templates]).mean(axis=0) for c in classes]
    candidates = np.stack([mean / np.linalg.norm(mean) for mean in means])
    logits = model.logit_scale * model.encode_image(pictures[:5]).astype(np.float64) @ candidates.T
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(found, expected, atol=64 * np.finfo(np.float32).eps * model.logit_scale)
    assert found.dtype == np.float32
    assert model.classify(pictures[:2], classes, templates="simple").shape == (2, 2)


def test_the_sets_of_templates():
    assert {name: len(set(templates)) for name, templates in TEMPLATES.items()} == {
        "none": 1,
        "simple": 7,
        "imagenet80": 80,
    }
    assert set(TEMPLATES["simple"]) < set(TEMPLATES["imagenet80"])
    assert all(template.count("{}") == 1 for templates in TEMPLATES.values() for template in templates)


def test_experts_of_patches_and_of_text(model, pictures):
    found = model.image_experts(pictures[:3])
    assert found.expert.shape == found.gate.shape == (1, 3, 4)
    assert found.expert.min() >= 0 and found.expert.max() < 4
    assert (found.gate > 0.2).all()
    words, pieces = model.text_experts(SENTENCES)
    assert words.expert.shape == (1, 3, 8)
    assert [len(row) for row in pieces] == (words.gate[0] > 0).sum(axis=1).tolist()


def test_no_inputs_give_no_rows(model):
    assert model.encode_image([]).shape == model.encode_text([]).shape == (0, 32)


def test_threads_share_a_model(model, pictures):
    alone = model.encode_image(pictures[:9]), model.encode_text(SENTENCES)
    found = [None] * 8

    def ask(number):
        found[number] = model.encode_image(pictures[:9]) if number % 2 else model.encode_text(SENTENCES)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, embeddings in enumerate(found):
        np.testing.assert_array_equal(embeddings, alone[0 if number % 2 else 1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.encode_image("a.png"), "images must be a list; put the one that you have into"),
        (lambda m: m.encode_image(np.zeros((4, 4, 3), np.uint8)), "images must be a list"),
        (lambda m: m.encode_text("a dog"), "texts must be a list"),
        (lambda m: m.encode_text(iter(["a dog", 3])), "text 1 is int; give a str"),
        (lambda m: m.encode_image([b"no picture"]), "image 0 cannot be used: the image does not decode"),
        (lambda m: m.encode_image(["no/such.png"]), r"image 0 \(no/such.png\) cannot be used: .*no/such.png"),
        (lambda m: m.encode_image([np.zeros((4, 4, 3), np.float32)]), r"float32 \[4, 4, 3\] is no picture; give uint8"),
        (lambda m: m.encode_image(iter([None])), "NoneType is no picture"),
        (lambda m: m.classify([], []), "classes is empty; give at least one"),
        (lambda m: m.image_experts([]), "images is empty; give at least one"),
        (lambda m: m.text_experts([]), "texts is empty; give at least one"),
        (lambda m: m.classify([], ["a"], templates="clip"), "no set of templates 'clip'; choose one of none, simple"),
        (lambda m: m.classify([], ["a"], templates=["a photo"]), "must have {} exactly once"),
    ],
)
def test_what_a_model_cannot_take(model, call, message):
    with pytest.raises(limoe.InputError, match=message):
        call(model)


def test_what_cannot_be_loaded(finished, tmp_path):
    with pytest.raises(WorkdirError, match=r"is not a work folder: it has no config.json"):
        limoe.load(tmp_path)
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 3; the steps that it has: 8, 12"):
        limoe.load(finished.folder, step=3)
    assert limoe.load(finished.folder, step=8).step == 8


def test_parameters_that_are_not_finite_are_refused(finished, monkeypatch):
    read = limoe.workdir.checkpoint._read

    def spoilt(*arguments, **options):
        state = read(*arguments, **options)
        router = state["parameters"]["norm"]["scale"]
        state["parameters"]["norm"]["scale"] = router.at[0].set(np.nan)
        return state

    monkeypatch.setattr(limoe.workdir.checkpoint, "_read", spoilt)
    with pytest.raises(
        CheckpointError, match=r"step 12: parameters are not finite: .*norm.*scale.*; use an earlier step"
    ):
        limoe.load(finished.folder)


@pytest.fixture(scope="module")
def export(finished, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "tiny"
    write_export(restored_encoder(finished.folder), finished.folder, folder)
    return folder


def test_an_export_gives_the_same_bits(model, export, pictures):
    again = limoe.load(export)
    np.testing.assert_array_equal(again.encode_image(pictures), model.encode_image(pictures))
    np.testing.assert_array_equal(again.encode_text(SENTENCES), model.encode_text(SENTENCES))
    assert (again.step, again.logit_scale) == (model.step, model.logit_scale)


def test_an_export_has_the_files_that_people_expect(finished, export):
    assert {path.name for path in export.iterdir()} == {
        *("model.safetensors", "config.json", "tokenizer.model", "preprocess.json", "README.md", "programs"),
    }
    assert json.loads((export / "preprocess.json").read_text())["size"] == [16, 16]
    card = (export / "README.md").read_text()
    score = json.loads((finished.folder / "summary.json").read_text())["zero_shot_top1"]
    assert f"| zero-shot top-1 | {score:.1%} |" in card and "the embedded world, 200 rendered scenes" in card


PROGRAM = """
import sys
import jax
import numpy as np
from safetensors.numpy import load_file

folder, out = sys.argv[1:]
parameters = load_file(f"{folder}/model.safetensors")
given = {"image": np.load(f"{out}/image.npy"), "text": np.load(f"{out}/text.npy")}
for kind, inputs in given.items():
    program = jax.export.deserialize(bytearray(open(f"{folder}/programs/{kind}_1.jaxexport", "rb").read()))
    assert set(program.platforms) == {"cpu", "tpu", "cuda"}
    np.save(f"{out}/{kind}_found.npy", program.call(parameters, inputs))
assert not {"limoe", "moe_kernels", "flax"} & set(sys.modules)
"""


def test_exported_programs_need_no_limoe(model, export, pictures, tmp_path):
    np.save(tmp_path / "image.npy", pictures[:1])
    np.save(tmp_path / "text.npy", load_tokenizer(export / "tokenizer.model", length=8).encode(SENTENCES[:1]))
    (tmp_path / "program.py").write_text(PROGRAM)
    words = [sys.executable, str(tmp_path / "program.py"), str(export), str(tmp_path)]
    subprocess.run(words, check=True, cwd=tmp_path, env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": ""})
    bound = 8 * np.finfo(np.float32).eps * np.sqrt(32)
    np.testing.assert_allclose(np.load(tmp_path / "image_found.npy"), model.encode_image(pictures[:1]), atol=bound)
    np.testing.assert_allclose(np.load(tmp_path / "text_found.npy"), model.encode_text(SENTENCES[:1]), atol=bound)


def test_what_cannot_be_exported_or_read_back(finished, export, tmp_path):
    restored = restored_encoder(finished.folder)
    with pytest.raises(ExportError, match="is there already and not empty; give a new folder"):
        write_export(restored, finished.folder, export)
    with pytest.raises(ExportError, match="is an export, which has one step"):
        limoe.load(export, step=8)
    other = shutil.copytree(export, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    save_file(tensors, other / "model.safetensors", metadata={"format": "limoe", "version": "99", "step": "1"})
    with pytest.raises(ExportError, match="limoe version 99; this version of limoe reads limoe version 1"):
        limoe.load(other)
    del tensors["token_table"]
    save_file(tensors, other / "model.safetensors", metadata={"format": "limoe", "version": "1", "step": "1"})
    with pytest.raises(ExportError, match=r"is not of the model in config.json: token_table differ"):
        limoe.load(other)
    (other / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(ExportError, match=r"cannot be read: .*; copy the export again"):
        limoe.load(other)


def test_the_commands(finished, export, tmp_path, capsys):
    Image.new("RGB", (20, 20), "red").save(tmp_path / "a.png")
    words = ["classify", f"--workdir={export}", "--classes=ring,square", str(tmp_path / "a.png")]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)[str(tmp_path / "a.png")]
    assert set(found) == {"ring", "square"} and sum(found.values()) == pytest.approx(1)
    assert main(words) == 0
    assert re.fullmatch(r".*a\.png: (ring|square) \d+\.\d%, (ring|square) \d+\.\d%\n", capsys.readouterr().out)
    assert main(words[:-1]) == 2
    assert "classify needs --workdir=DIR, --classes=NAME,NAME and one or more pictures" in capsys.readouterr().err
    assert main([*words, "--templates=clip"]) == 1
    assert "no set of templates 'clip'" in capsys.readouterr().err
    out = tmp_path / "out"
    assert main(["export", f"--workdir={finished.folder}", f"--out={out}", "--step=8"]) == 0
    assert capsys.readouterr().out == f"wrote step 8 of {finished.folder} into {out}\n"
    assert limoe.load(out).step == 8
    assert main(["export", f"--workdir={finished.folder}"]) == 2
