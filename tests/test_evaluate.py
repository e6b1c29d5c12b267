"""Evaluation against loops that compare one score with another, and the rules for ties and equal captions."""

import io
import tracemalloc
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from limoe.config.presets import preset
from limoe.config.settings import override
from limoe.data.classes import Classes
from limoe.data.files import DataError
from limoe.data.inputs import DataFolders
from limoe.data.shards import Example, write_shard
from limoe.data.source import SOURCES, Decoded, Source
from limoe.evaluate import Evaluator, evaluate, evaluator, register
from limoe.evaluate import data as evaluation_data
from limoe.evaluate import embeddings as tables
from limoe.evaluate.command import evaluation_text
from limoe.evaluate.data import (
    EvaluationData,
    Pairs,
    equal_captions_are_right,
    match,
    read_evaluation_data,
)
from limoe.evaluate.encode import Encoder
from limoe.evaluate.pictures import Pictures
from limoe.evaluate.probe import ridge_probe
from limoe.evaluate.retrieval import retrieval
from limoe.evaluate.zero_shot import class_embeddings, first_of_name, prompts, zero_shot


def embeddings(seed, rows, width=3, levels=3):
    """Small integers, so that scores are exact and ties are frequent."""
    return np.random.default_rng(seed).integers(-levels, levels + 1, (rows, width)).astype(np.float32)


def rank_ref(scores, right):
    """Wrong candidates that are not strictly below the best right one."""
    best = max(scores[j] for j in right)
    return sum(1 for j in range(len(scores)) if j not in right and scores[j] >= best)


@pytest.fixture(params=[1, 7, 4_000_000])
def block(request, monkeypatch):
    monkeypatch.setattr(tables, "_SCORES_PER_BLOCK", request.param)


@pytest.mark.parametrize("num_classes", [1, 2, 9])
def test_zero_shot_is_the_loop(block, num_classes):
    rng = np.random.default_rng(num_classes)
    image, classes = embeddings(1, 40), embeddings(2, num_classes)
    label = rng.integers(0, num_classes, 40)
    result = zero_shot(image, classes, label)
    rank = [rank_ref([float(a @ c) for c in classes], {y}) for a, y in zip(image, label, strict=True)]
    assert result.top1 == np.mean([r < 1 for r in rank])
    assert result.top5 == np.mean([r < 5 for r in rank])
    assert result.chance == 1 / num_classes
    confusion = np.zeros((num_classes, num_classes))
    for i, y in enumerate(label):
        wrong = [q for q in range(num_classes) if q != y]
        confusion[y, y if rank[i] == 0 else max(wrong, key=lambda q, i=i: (image[i] @ classes[q], -q))] += 1
    np.testing.assert_array_equal(result.confusion, confusion)


def test_a_collapsed_model_scores_zero_and_not_chance():
    one = np.random.default_rng(0).normal(size=(1, 64)).astype(np.float32)
    image, text = np.repeat(one, 203, 0), np.repeat(one, 203, 0)
    assert zero_shot(image, text[:31], np.arange(203) % 31).top5 == 0.0
    assert set(retrieval(image, text, np.arange(203), np.arange(203))) == {0.0}


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), rows=st.integers(1, 14), captions=st.integers(1, 14), images=st.integers(1, 14))
def test_retrieval_is_the_loop(seed, rows, captions, images):
    rng = np.random.default_rng(seed)
    caption_id = rng.integers(0, captions, rows) * 10 - 5
    image_id = rng.integers(0, images, rows) * 7
    text = embeddings(seed + 1, captions)[(caption_id + 5) // 10]
    image = embeddings(seed + 2, images)[image_id // 7]
    result = retrieval(image, text, caption_id, image_id)

    pairs = set(zip(image_id.tolist(), caption_id.tolist(), strict=True))
    unique = sorted(set(image_id.tolist()))
    vector = {key: image[list(image_id).index(key)] for key in unique}
    to_text = [
        rank_ref([float(vector[a] @ t) for t in text], {j for j in range(rows) if (a, caption_id[j]) in pairs})
        for a in unique
    ]
    to_image = [
        rank_ref(
            [float(vector[a] @ text[i]) for a in unique],
            {j for j, a in enumerate(unique) if (a, caption_id[i]) in pairs},
        )
        for i in range(rows)
    ]
    expected = [np.mean([r < k for r in rank]) for rank in (to_text, to_image) for k in (1, 5, 10)]
    np.testing.assert_allclose(result, expected, rtol=1e-15)


def test_retrieval_does_not_depend_on_the_blocks(monkeypatch):
    image, text = embeddings(3, 50, 4), embeddings(4, 50, 4)
    ids = np.arange(50)
    whole = retrieval(image, text, ids // 2, ids // 5)
    monkeypatch.setattr(tables, "_SCORES_PER_BLOCK", 1)
    assert retrieval(image, text, ids // 2, ids // 5) == whole
    assert 0 < whole.image_to_text_r1 < whole.image_to_text_r10 < 1


def test_equal_captions_are_hits_and_five_captions_an_image_are_one_query():
    eye = np.eye(4)
    # Both images carry the caption 7; each query finds the other's copy first, and that is right.
    result = retrieval(eye[[0, 1]], eye[[1, 0]], np.array([7, 7]), np.array([0, 1]))
    assert set(result) == {1.0}
    # Without that, each finds the other's caption.
    assert retrieval(eye[[0, 1]], eye[[1, 0]], np.array([7, 8]), np.array([0, 1])).image_to_text_r1 == 0.0
    # Image 0 has five captions, of which one is near it; image 1 has one that is.
    result = retrieval(eye[[0, 0, 0, 0, 0, 1]], eye[[2, 2, 0, 2, 2, 1]], np.arange(6), np.array([0, 0, 0, 0, 0, 1]))
    assert result.image_to_text_r1 == 1.0
    assert result.text_to_image_r1 == pytest.approx(2 / 6)


def test_class_embeddings_are_the_loop():
    text = np.random.default_rng(5).normal(size=(12, 6)).astype(np.float32)
    result = class_embeddings(text, num_templates=4)
    assert result.dtype == np.float32
    for q in range(3):
        mean = sum(text[4 * q + t].astype(np.float64) for t in range(4)) / 4
        np.testing.assert_allclose(result[q], mean / np.sqrt(mean @ mean), rtol=4e-7)
    assert np.isfinite(class_embeddings(np.array([[1.0, 0.0], [-1.0, 0.0]]), num_templates=2)).all()


@pytest.mark.parametrize("width", [3, 40])
def test_ridge_probe_is_the_normal_equation(width):
    """Wide features go through the dual form; the loop below only knows the primal one."""
    rng = np.random.default_rng(width)
    centre = rng.normal(size=(4, width))
    label, test_label = rng.integers(0, 4, 60), rng.integers(0, 4, 50)
    train = centre[label] + rng.normal(size=(60, width))
    test = centre[test_label] + rng.normal(size=(50, width))
    shots = int(np.bincount(label).min())
    keep = np.concatenate([np.flatnonzero(label == q)[:shots] for q in range(4)])
    train, label = train[keep], label[keep]  # exactly `shots` a class: the draw cannot matter
    for ridge in (0.01, 1.0, 100.0):
        mean = train.mean(0)
        x, y = train - mean, np.eye(4)[label] - 0.25
        penalty = ridge * np.trace(x.T @ x) / width
        weight = np.linalg.inv(x.T @ x + penalty * np.eye(width)) @ x.T @ y
        expected = np.mean([np.argmax((row - mean) @ weight) == q for row, q in zip(test, test_label, strict=True)])
        result = ridge_probe(train, label, test, test_label, shots=shots, ridge=ridge)
        assert (result.top1, result.chance, result.shots) == (expected, 0.25, shots)
        assert expected > 0.4
        assert ridge_probe(train * 1e3, label, test * 1e3, test_label, shots=shots, ridge=ridge) == result


def test_ridge_probe_takes_shots_of_every_class_by_the_seed():
    rng = np.random.default_rng(0)
    label = np.repeat([0, 1], [5, 500])
    features = rng.normal(size=(505, 2)) + 2.0 * label[:, None]
    results = {ridge_probe(features, label, features, label, shots=2, seed=seed).top1 for seed in range(6)}
    assert len(results) > 1
    assert len({ridge_probe(features, label, features, label, shots=2, seed=3).top1 for _ in range(3)}) == 1
    assert ridge_probe(np.ones((4, 2)), np.array([0, 0, 1, 1]), np.ones((2, 2)), np.array([0, 1]), shots=2).top1 == 0.0


def test_prompts_are_lower_case_and_braces_in_names_are_text():
    classes = Classes(("a {}", "The {} here"), ("Red {0}", "été"))
    assert prompts(classes) == ("a red {0}", "the red {0} here", "a été", "the été here")


EYE, IDS = np.eye(3), np.arange(3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: zero_shot(EYE, np.eye(4), IDS), "width 3 and classes width 4"),
        (lambda: zero_shot(EYE, EYE, np.array([0, 1, 3])), "label must lie in 0 to 2"),
        (lambda: zero_shot(EYE, EYE, np.array([0, 1])), "label must be 3 integers"),
        (lambda: zero_shot(EYE, EYE, np.array([0.0, 1.0, 2.0])), "label must be 3 integers"),
        (lambda: zero_shot(np.zeros((0, 3)), EYE, IDS[:0]), "not empty"),
        (lambda: zero_shot(EYE * [1, np.nan, 1], EYE, IDS), "row 0 of image .3 of 3 rows. is not finite"),
        (lambda: retrieval(EYE, np.eye(4)[:, :3], IDS, IDS), "row i of both must be one pair"),
        (lambda: retrieval(EYE, EYE, IDS[:2], IDS), "caption_id must be 3 integers"),
        (lambda: retrieval(EYE[0], EYE, IDS, IDS), "image must be a table"),
        (lambda: class_embeddings(EYE, num_templates=2), "3 prompt embeddings cannot be split"),
        (lambda: class_embeddings(EYE, num_templates=0), "cannot be split"),
        (lambda: ridge_probe(EYE, IDS, EYE, IDS, shots=2), "class 0 has 1 training examples"),
        (lambda: ridge_probe(EYE, IDS * 2, EYE, IDS, shots=1), "class 1 has 0 training examples"),
        (lambda: ridge_probe(EYE, IDS, EYE, IDS + 1, shots=1), "test_label must lie in 0 to 2"),
        (lambda: ridge_probe(EYE, IDS, EYE, IDS, shots=1, ridge=0.0), "ridge=0.0"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Pictures of one colour each, as PNG, so that they decode to what they were.
NUM_IMAGES, NUM_CAPTIONS = 20, 5


def colour_of(image):
    return (7 * image, 255 - 11 * image, 80)


def shard_of_images(path, identified):
    """Twenty images with five captions each, as img2dataset writes COCO: a member of each for every pair."""

    def example(image, number):
        file = io.BytesIO()
        Image.new("RGB", (8, 8), colour_of(image)).save(file, "PNG")
        metadata = {"image_id": 1000 - image} if identified else None
        return Example(f"{image:03d}{number}", file.getvalue(), f"caption {number} of {image}", metadata, "png")

    write_shard(path, [example(image, number) for number in range(NUM_CAPTIONS) for image in range(NUM_IMAGES)])


class PerfectEncoder(Encoder):
    """An image and its captions have one direction; all others are at right angles to it."""

    def __init__(self):
        pass

    def images(self, images):
        found = [tuple(image[0, 0].tolist()) for image in images]
        return np.eye(NUM_IMAGES)[[[colour_of(n) for n in range(NUM_IMAGES)].index(colour) for colour in found]]

    def texts(self, texts):
        return np.eye(NUM_IMAGES)[[int(text.rpartition(" ")[2]) for text in texts]]


@pytest.mark.parametrize(("identified", "rule"), [(True, "image_id"), (False, "equal pictures")])
def test_several_captions_an_image(tmp_path, identified, rule):
    shard_of_images(tmp_path / "0.tar", identified)
    small = override(preset("tiny"), ["model.image_size=8", "model.patch_size=8"])
    data = read_evaluation_data(small, DataFolders("", "", str(tmp_path)))
    figures = evaluate(PerfectEncoder(), data)
    assert figures["retrieval_rule"] == f"images by {rule}; captions of the image are right"
    assert (figures["retrieval_pairs"], figures["retrieval_images"]) == (100, 20)
    for way in ("image_to_text", "text_to_image"):
        assert [figures[f"{way}_r{k}"] for k in (1, 5, 10)] == [1, 1, 1], way


class LargePictures(Source):
    """Pictures of 768 kB with five captions each, as many as the path says."""

    decoded = 0

    def __init__(self, path, **options):
        self.count = int(path)

    def __len__(self):
        return self.count

    def __getitem__(self, number):
        LargePictures.decoded += 1
        captions = [f"caption {caption} of {number % NUM_IMAGES}" for caption in range(NUM_CAPTIONS)]
        image = np.full((512, 512, 3), colour_of(number % NUM_IMAGES), np.uint8)
        return Decoded(image, captions[0], str(number), {"image_id": number}, tuple(captions[1:]))


def test_memory_does_not_grow_with_the_number_of_pictures(monkeypatch):
    monkeypatch.setitem(SOURCES, "large", LargePictures)
    monkeypatch.setattr(evaluation_data, "_KEPT_BYTES", 0)

    def peak(count):
        LargePictures.decoded = 0
        tracemalloc.start()
        data = read_evaluation_data(preset("tiny"), DataFolders("", "", f"large:{count}"))
        assert evaluate(PerfectEncoder(), data)["retrieval_pairs"] == count * NUM_CAPTIONS
        largest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert LargePictures.decoded == 2 * count, "one pass for captions, one for pixels, however many captions"
        return largest

    assert peak(80) - peak(20) < 512 * 512 * 3


def pairs_of(captions, image_ids):
    examples = [Decoded(np.array([[colour_of(n)]], np.uint8), "", "", None) for n in range(len(captions))]
    pictures = Pictures(examples.__getitem__, range(len(captions)))
    return Pairs(pictures, captions, np.full(len(captions), -1), image_ids, 0, "")


def test_who_is_the_same_image():
    # A number is not the text of it; without either, equal pictures count, wherever they stand.
    matched = match(pairs_of(tuple("abcdea"), (5, "5", 5, b"9", b"9", b"5")), equal_captions_are_right=True)
    assert matched.image_id.tolist() == [0, 1, 0, 2, 2, 3]
    assert matched.caption_id.tolist() == [0, 1, 2, 3, 4, 0]
    assert matched.rule == "images by image_id, else equal pictures; captions equal to one of the image are right"


def test_an_image_id_of_another_kind_is_none(tmp_path):
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    given = [{"image_id": True}, {"image_id": None}, {"image_id": 1.5}, {}, {"image_id": "a"}]
    examples = [Example(str(n), picture.getvalue(), "a", facts, "png") for n, facts in enumerate(given)]
    write_shard(tmp_path / "0.tar", examples)
    small = override(preset("tiny"), ["model.image_size=8", "model.patch_size=8"])
    data = read_evaluation_data(small, DataFolders("", "", str(tmp_path)))
    assert data.retrieval is not None
    *others, last = data.retrieval.pairs.image_ids
    assert last == "a" and len(set(others)) == 1 and isinstance(others[0], bytes), "the digest of the picture"


def test_an_example_without_metadata_is_left_out_where_it_needs_a_class(tmp_path):
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    facts = ({"class": 0}, None)
    write_shard(tmp_path / "0.tar", [Example(str(n), picture.getvalue(), "a", facts[n], "png") for n in range(2)])
    (tmp_path / "classes.json").write_text('{"templates": ["a {}"], "classes": ["dog"]}')
    small = override(preset("tiny"), ["model.image_size=8", "model.patch_size=8"])
    data = read_evaluation_data(small, DataFolders("", str(tmp_path), str(tmp_path)))
    assert data.zero_shot is not None and data.zero_shot.pairs.first_bad == "1: the metadata is missing"
    assert (len(data.zero_shot.pairs.captions), data.num_bad) == (1, 1)
    data = read_evaluation_data(small, DataFolders("", "", str(tmp_path)))
    assert data.retrieval is not None and (len(data.retrieval.pairs.captions), data.num_bad) == (2, 0)


def test_equal_captions_of_other_images_are_right_only_where_the_data_say_so(tmp_path):
    pairs = pairs_of(("a dog", "a dog"), (0, 1))
    data = lambda right: EvaluationData(None, match(pairs, equal_captions_are_right=right), None, 0)  # noqa: E731

    class OneText(Encoder):
        def __init__(self):
            pass

        def images(self, images):
            return np.eye(2)

        def texts(self, texts):
            return np.ones((2, 2))

    assert evaluate(OneText(), data(True))["image_to_text_r1"] == 1
    assert evaluate(OneText(), data(False))["image_to_text_r1"] == 0
    for content, expected in ((None, False), ("true", True), ("false", False)):
        if content:
            (tmp_path / "retrieval.json").write_text(f'{{"equal_captions_are_right": {content}}}')
        assert equal_captions_are_right(tmp_path) is expected
    for content in ("[]", "{}", '{"equal_captions_are_right": 1}', "{"):
        (tmp_path / "retrieval.json").write_text(content)
        with pytest.raises(DataError, match=r"retrieval\.json"):
            equal_captions_are_right(tmp_path)


class Lengths(NamedTuple):
    mean_caption_length: float | None = None


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(evaluator, "_EVALUATORS", dict(evaluator._EVALUATORS))


def test_an_evaluator_from_outside(registry):
    def measure(encoder, data):
        return Lengths(float(np.mean([len(caption) for caption in data.retrieval.pairs.captions])))

    lengths = Evaluator(
        name="lengths",
        needs=("retrieval",),
        measure=measure,
        nothing=Lengths(),
        text=lambda found: f"captions have {found.mean_caption_length} letters",
    )
    register(lengths)
    nothing = evaluate(PerfectEncoder(), EvaluationData(None, None, None, 0))
    assert nothing["mean_caption_length"] is None and nothing["retrieval_pairs"] == 0
    matched = match(pairs_of(("caption 1 of 0", "of 1"), (0, 1)), equal_captions_are_right=False)
    figures = evaluate(PerfectEncoder(), EvaluationData(None, matched, None, 3))
    assert figures["mean_caption_length"] == 9 and figures["evaluation_bad_examples"] == 3
    assert set(figures) == set(nothing)
    assert "captions have 9.0 letters" in evaluation_text({"preset": "tiny", "step": 1, **figures})
    for wrong, message in (
        (lengths, "there is an evaluator 'lengths' already"),
        (replace(lengths, name="other"), "other figures are called mean_caption_length already"),
        (replace(lengths, name="other", needs=("video",)), "needs video; data are zero_shot, retrieval"),
    ):
        with pytest.raises(ValueError, match=message):
            register(wrong)


def test_of_two_classes_with_one_name_the_first_is_predicted():
    """As in ImageNet's list: an image of the first is right, one of the second is not, and nobody else is moved."""
    classes = np.eye(3)[[0, 1, 0, 2]]
    image, label = np.eye(3)[[0, 0, 1, 2]], np.array([0, 2, 1, 3])
    first = first_of_name(["Missile", "cat", "missile", "dog"])
    found = zero_shot(image, classes, label, first)
    assert (found.top1, found.mean_per_class, found.num_doubled, found.top5) == (0.75, 0.75, 2, 1)
    assert found.confusion[2, 0] == 1 and found.confusion[0, 0] == 1
    assert zero_shot(image, classes, label).top1 == 0.5, "without names both tie"
    uneven = zero_shot(np.eye(2)[[0, 0, 0, 0]], np.eye(2), np.array([0, 0, 0, 1]))
    assert (uneven.top1, uneven.mean_per_class) == (0.75, 0.5)
