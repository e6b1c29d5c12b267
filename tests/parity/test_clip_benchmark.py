"""Retrieval and zero-shot classification give CLIP_benchmark's own figures for the same embeddings."""

import numpy as np
from record_clip_benchmark import RECORDED, TEMPLATES, drawn

from limoe.evaluate.retrieval import retrieval
from limoe.evaluate.zero_shot import class_embeddings, zero_shot


def test_figures_are_those_of_clip_benchmark():
    with np.load(RECORDED) as file:
        recorded = dict(file)
    assert all(np.array_equal(recorded[name], array) for name, array in drawn().items())
    theirs = dict(zip(recorded["names"].tolist(), recorded["figures"].tolist(), strict=True))
    assert all(0.2 < figure < 1 for figure in theirs.values()), "figures that could differ"

    image_of_text = recorded["image_of_text"]
    found = retrieval(recorded["image"][image_of_text], recorded["text"], np.arange(len(image_of_text)), image_of_text)
    classes = class_embeddings(recorded["prompt"], num_templates=TEMPLATES)
    classified = zero_shot(recorded["labelled"], classes, recorded["label"])
    ours = {"acc1": classified.top1, "acc5": classified.top5, "mean_per_class_recall": classified.mean_per_class}
    for k in (1, 5, 10):
        ours[f"text_retrieval_recall@{k}"] = getattr(found, f"image_to_text_r{k}")
        ours[f"image_retrieval_recall@{k}"] = getattr(found, f"text_to_image_r{k}")
    assert ours.keys() == theirs.keys()
    for name, figure in theirs.items():
        assert abs(ours[name] - figure) < 1e-6, name  # theirs are means in float32
