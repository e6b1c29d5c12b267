"""Figures are written whole, are not blank, survive what data may hold, and repeat byte for byte."""

import io
import math

import numpy as np
import pytest
from PIL import Image

from limoe.report import panels
from limoe.report import pictures as report
from limoe.report.analysis import TopPatches
from limoe.report.panels import COLOURS, History, LayerView, one_line, pack_words

NASTY = ("$x^2$ $\\frac{$", "漢字 \U0001f600", "line\nbreak\x00\ud800", "a" * 500, "", "%s {} \\alpha")


def counts(num_layers, num_experts, seed=0):
    rng = np.random.default_rng(seed)
    wanted = rng.integers(1, 100, (num_layers, 2, num_experts)).astype(float)
    if num_experts > 1:
        wanted[:, 1, 0] = wanted[:, 0, -1] = 0
    return wanted, np.minimum(wanted, 70.0)


def images(number=5, side=16):
    return np.random.default_rng(1).integers(0, 255, (number, side, side, 3), dtype=np.uint8)


def view(num_experts, count=4):
    rng = np.random.default_rng(2)
    example, patch = rng.integers(-1, 5, (num_experts, count)), rng.integers(0, 16, (num_experts, count))
    example[0] = -1
    words = ((), *[NASTY] * (num_experts - 1))
    return LayerView(3, counts(1, num_experts)[0][0], TopPatches(example, patch, rng.random(example.shape)), words)


def history(steps=300, num_layers=2, evaluations=4):
    rng = np.random.default_rng(3)
    success = rng.uniform(0.8, 1, (steps, 2))
    success[: steps // 2, 1] = np.nan
    return History(
        step=np.arange(1, steps + 1),
        loss=rng.random(steps) + 2,
        contrastive=rng.random(steps) + 1,
        success_rate=success,
        effective_experts=rng.uniform(1, 4, (steps, num_layers, 2)),
        success_rate_bound=0.99,
        zero_shot_step=np.linspace(1, steps, evaluations),
        zero_shot_top1=rng.random(evaluations),
        zero_shot_chance=0.1,
    )


def pixels(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def share_of(picture, colour):
    """Share of the pixels with exactly this colour."""
    rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return np.mean(np.all(picture == rgb, axis=2))


@pytest.mark.parametrize(("num_layers", "num_experts"), [(1, 4), (5, 8), (2, 32)])
def test_expert_shares_show_both_modalities(tmp_path, num_layers, num_experts):
    path = tmp_path / "figures" / "expert_shares.png"
    wanted, kept = counts(num_layers, num_experts)
    layers = tuple(range(1, 2 * num_layers, 2))
    report.draw_expert_shares(path, wanted, kept, moe_layers=layers, capacity_factor=1.05)
    picture = pixels(path)
    assert 300 < picture.shape[0] < 3000 and 600 < picture.shape[1] < 3000
    # The bars of both have one scale; the legend, coloured labels and edges of bars blur it a little.
    ratio = share_of(picture, COLOURS["text"]) / share_of(picture, COLOURS["image"])
    assert ratio == pytest.approx(kept[:, 1].sum() / kept[:, 0].sum(), rel=0.2)
    # Nothing is left behind beside it, and only text and image are counted where only they are.
    assert [file.name for file in path.parent.iterdir()] == ["expert_shares.png"]
    report.draw_expert_shares(path, wanted * [[[1.0], [0.0]]], 0 * kept, moe_layers=layers, capacity_factor=1.05)
    assert share_of(pixels(path), COLOURS["text"]) < 0.002


@pytest.mark.parametrize(
    ("steps", "num_layers", "evaluations"), [(300, 2, 4), (1, 1, 0), (40, 12, 1), (30, 0, 3), (2, 0, 0)]
)
def test_training_is_drawn_for_any_length_and_depth(tmp_path, steps, num_layers, evaluations):
    path = tmp_path / "training.png"
    report.draw_training(path, history(steps, num_layers, evaluations))
    picture = pixels(path)
    assert picture.std() > 5
    assert (share_of(picture, COLOURS["image"]) > 0) == (num_layers > 0)


@pytest.mark.parametrize("num_experts", [4, 9])
def test_gallery_holds_the_patches(tmp_path, num_experts):
    path = tmp_path / "gallery.png"
    red = np.zeros((5, 16, 16, 3), np.uint8)
    red[..., 0] = 250
    some = view(num_experts)
    report.draw_gallery(path, red, some, patch_size=4)
    picture = pixels(path)
    assert share_of(picture, "#FA0000") > 0.05
    none = some.top._replace(example=np.full_like(some.top.example, -1))
    report.draw_gallery(path, red, some._replace(top=none, words=((),) * num_experts), patch_size=4)
    assert share_of(pixels(path), "#FA0000") == 0


@pytest.mark.parametrize("number", [1, 8])
def test_examples_survive_any_name(tmp_path, number):
    path = tmp_path / "examples.png"
    probability = np.random.default_rng(4).dirichlet(np.ones(len(NASTY)), number)
    label = np.arange(number) % len(NASTY)
    report.draw_examples(path, images(number), probability, label, NASTY)
    assert pixels(path).std() > 20
    report.draw_examples(path, images(1), np.array([[0.3, 0.7]]), np.array([0]), ("a", "b"))


@pytest.mark.parametrize(("num_experts", "evaluations"), [(1, 3), (8, 3), (32, 0)])
def test_overview_has_all_three_parts(tmp_path, num_experts, evaluations):
    path = tmp_path / "overview.png"
    some = view(num_experts)
    report.draw_overview(path, images(), some, history(evaluations=evaluations), patch_size=4)
    picture = pixels(path)
    assert picture.shape[1] > 1.5 * picture.shape[0]
    for third in np.array_split(picture, 3, axis=1):
        assert third.std() > 10


def test_experts_are_named_by_what_they_lean_to():
    shares = {0.2: "image 4.0×", 0.024: "image 41×", 0.004: "image >99×", 0.0: "image only", 0.5: "both alike"}
    shares |= {0.512: "both alike", 0.6: "text 1.5×", 0.9088: "text 10×", 1.0: "text only", math.nan: "unused"}
    for preference, text in shares.items():
        assert panels.leaning(preference) == text


def test_image_lies_to_the_left_and_text_to_the_right(tmp_path):
    path = tmp_path / "bars.png"
    wanted = np.array([[60.0, 40.0, 0.0], [0.0, 5.0, 5.0]])
    some = view(3)._replace(wanted=wanted)
    with panels.open_figure(path, 4.0, 4.0) as figure:
        axes = panels.axes_at(figure, 1.0, 0.5, 2.5, 2.5)
        panels.draw_bars(axes, some, [2, 1, 0], 3)
        widths = [round(bar.get_width(), 2) for bar in axes.patches]
        assert widths == [0.0, -0.4, -0.6, 0.5, 0.5, 0.0]
        assert [label.get_text() for label in axes.get_yticklabels()] == [
            "expert 2\ntext only",
            "expert 1\ntext 1.3×",
            "expert 0\nimage only",
        ]
        assert {"share of\nimage tokens", "share of\ntext tokens"} <= {text.get_text() for text in axes.texts}


def test_the_same_input_gives_the_same_bytes(tmp_path):
    for name in ("a.png", "b.png"):
        report.draw_overview(tmp_path / name, images(), view(4), history(), patch_size=4)
    content = (tmp_path / "a.png").read_bytes()
    assert content == (tmp_path / "b.png").read_bytes()
    with Image.open(io.BytesIO(content)) as image:
        assert set(image.info) <= {"dpi"}


def test_a_failed_drawing_leaves_the_old_file_and_the_settings_of_others(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    path = tmp_path / "gallery.png"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match="cannot be cut"):
        report.draw_gallery(path, images(), view(4), patch_size=5)
    assert path.read_bytes() == b"old"
    report.draw_gallery(path, images(), view(4), patch_size=4)
    assert dict(matplotlib.rcParams) == before


def test_words_are_packed_into_lines():
    assert pack_words(["red", "blue", "green", "of"], 9, 2) == ["red, blue", "green, of"]
    assert pack_words(["red", "blue", "green", "of"], 5, 2) == ["red", "blue"]
    assert pack_words([], 5, 2) == [""]
    assert one_line("a\n b\x00\ud800c", 9) == "a b c"
    assert one_line("abcdefghij", 4) == "abc…"


W, K = counts(2, 4)
P = np.full((5, 2), 0.5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: report.draw_expert_shares(p, W, K, moe_layers=(1,), capacity_factor=1.0), "do not name the 2"),
        (lambda p: report.draw_expert_shares(p, W[:0], K[:0], moe_layers=(), capacity_factor=1.0), "must be counts"),
        (lambda p: report.draw_training(p, history()._replace(loss=np.ones(3))), "shapes do not fit"),
        (lambda p: report.draw_training(p, history(4, 0)._replace(effective_experts=np.ones(4))), "shapes do not fit"),
        (lambda p: report.draw_training(p, history(0)), "no steps"),
        (lambda p: report.draw_gallery(p, images(), view(4)._replace(words=()), patch_size=4), "words of 0 experts"),
        (lambda p: report.draw_gallery(p, images(), view(4)._replace(wanted=W[0] * 0), patch_size=4), "no tokens"),
        (lambda p: report.draw_gallery(p, images() / 255, view(4), patch_size=4), "uint8"),
        (lambda p: report.draw_overview(p, images(), view(4), history(0), patch_size=4), "no steps"),
        (lambda p: report.draw_examples(p, images() / 255, P, np.zeros(5, int), ("a", "b")), "uint8"),
        (lambda p: report.draw_examples(p, images(), P, np.zeros(5, int), ("a",)), "5 images and 1 names"),
        (lambda p: report.draw_examples(p, images(), P, np.full(5, 2), ("a", "b")), "label must lie in 0 to 1"),
    ],
)
def test_ill_input_is_refused_and_nothing_is_written(tmp_path, call, message):
    with pytest.raises(ValueError, match=message):
        call(tmp_path / "figure.png")
    assert not list(tmp_path.iterdir())


SUMMARY = {
    "preset": "tiny",
    "steps": 12345,
    "seconds": 205.6,
    "zero_shot_top1": 0.912,
    "zero_shot_chance": 1 / 24,
    "image_to_text_r1": 0.5,
    "text_to_image_r1": 0.25,
    "success_rate_image": 0.98,
    "success_rate_text": 0.96,
    "success_rate_bound": 0.992,
    "parameters_total": 5_554_000_000,
    "parameters_per_token": 675_000_000,
}


def test_summary_table_says_it_all():
    text = report.summary_table(
        SUMMARY
        | {"moe_layers": [1, 11], "expert_modality": [["image", "text", "image"], ["unused", "shared", "text"]]}
        | {"figures": "runs/tiny/figures"}
    )
    assert text.splitlines() == [
        "tiny: 12,345 steps in 3 min 26 s",
        "",
        "  zero-shot top-1                91.2%   chance 4.2%",
        "  retrieval image to text R@1    50.0%",
        "  retrieval text to image R@1    25.0%",
        "  image tokens that found room   98.0%   a perfect router keeps 99.2%",
        "  text tokens that found room    96.0%   a perfect router keeps 99.2%",
        "  parameters                    5.554B   675M per token",
        "",
        "  experts by modality",
        "    block 1   image: 0 2   text: 1",
        "    block 11  text: 2   shared: 1   unused: 0",
        "",
        "  figures: runs/tiny/figures",
    ]


def test_summary_table_of_a_dense_model_has_no_rates():
    dense = SUMMARY | dict.fromkeys(("success_rate_image", "success_rate_text", "success_rate_bound"))
    text = report.summary_table(dense | {"seconds": 7322, "parameters_total": 12_345})
    assert "found room" not in text
    assert "2 h 2 min" in text and "12.35k" in text


@pytest.mark.parametrize("key", ["steps", "success_rate_text"])
def test_summary_table_names_what_is_absent(key):
    with pytest.raises(ValueError, match=f"no {key}"):
        report.summary_table({name: value for name, value in SUMMARY.items() if name != key})
    with pytest.raises(ValueError, match="no moe_layers"):
        report.summary_table(SUMMARY | {"expert_modality": []})
