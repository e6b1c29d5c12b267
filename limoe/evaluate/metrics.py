"""Zero-shot classification, retrieval and k-shot probes over plain arrays of embeddings (paper section 7).

Letters: N rows (images, pairs), P width of the embeddings, Q classes. Every figure is a share between 0 and 1, and the
result of a function depends on its arguments only: equal scores count against the model, so that one that gives every
candidate the same score gets 0 and not a share that depends on the order of the candidates.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike
from os.path import join
from typing import NamedTuple

import numpy as np

from limoe.data import files

CLASSES_FILE = "classes.json"

# Scores held at once; about 30 bytes each at the widest place, so 120 MB.
_SCORES_PER_BLOCK = 4_000_000


@dataclass(frozen=True)
class Classes:
    """Names of the candidate classes and the templates that make a sentence of a name."""

    templates: tuple[str, ...]
    names: tuple[str, ...]


class ZeroShot(NamedTuple):
    """Zero-shot classification: shares of the images, and who was taken for whom."""

    top1: float
    top5: float
    chance: float
    confusion: np.ndarray  # [Q, Q] int64: images of the row's class that were taken for the column's class


class Retrieval(NamedTuple):
    """Recall at 1, 5 and 10: share of the queries with a right answer among the first k candidates."""

    image_to_text_r1: float
    image_to_text_r5: float
    image_to_text_r10: float
    text_to_image_r1: float
    text_to_image_r5: float
    text_to_image_r10: float


class Probe(NamedTuple):
    """k-shot probe: share of the test images whose class the linear map finds."""

    top1: float
    chance: float
    shots: int


def read_classes(folder: str | PathLike[str]) -> Classes:
    """Reads `classes.json` of an evaluation folder: `{"templates": ["a photo of a {}"], "classes": ["red square"]}`.

    Raises DataError, with the file and what to change, where the folder holds no such file, it is not JSON, a list is
    absent or empty, a template has not exactly one `{}`, or two names are equal in lower case. Other keys are left
    alone.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     files.write_bytes(join(folder, "classes.json"), b'{"templates": ["a {}"], "classes": ["cat", "dog"]}')
    ...     read_classes(folder)
    Classes(templates=('a {}',), names=('cat', 'dog'))
    """
    path = join(folder, CLASSES_FILE)
    if not files.exists(path):
        raise files.DataError(
            f"{path} does not exist; zero-shot evaluation needs it: "
            '{"templates": ["a photo of a {}"], "classes": ["cat", "dog"]}'
        )
    try:
        content = json.loads(files.read_text(path))
    except (ValueError, RecursionError) as error:
        raise files.DataError(f"{path} is not JSON ({error}); write it again") from error
    if not isinstance(content, dict):
        raise files.DataError(
            f'{path} must hold an object with the lists "templates" and "classes", not {_kind(content)}'
        )
    templates = _strings(content, "templates", path)
    names = _strings(content, "classes", path)
    for template in templates:
        if template.count("{}") != 1:
            raise files.DataError(
                f"template {template!r} in {path} must hold {{}} exactly once, where the class name goes"
            )
    seen: dict[str, int] = {}
    for index, name in enumerate(names):
        first = seen.setdefault(name.lower(), index)
        if first != index:
            raise files.DataError(
                f"classes {first} and {index} in {path} have the same name {name!r}; make every name unique"
            )
    return Classes(templates, names)


def prompts(classes: Classes) -> tuple[str, ...]:
    """Lower-cased sentences of all classes: all templates of class 0, then all of class 1, and so on (paper section 7).

    >>> prompts(Classes(("a {}", "A photo of a {}."), ("Cat", "dog")))
    ('a cat', 'a photo of a cat.', 'a dog', 'a photo of a dog.')
    """
    return tuple(template.replace("{}", name).lower() for name in classes.names for template in classes.templates)


def class_embeddings(text_embedding: np.ndarray, *, num_templates: int) -> np.ndarray:
    """Averages the embeddings [Q * num_templates, P] of `prompts` over the templates and L2-normalises: [Q, P] float32.

    Raises ValueError where the rows are no multiple of `num_templates` or not finite (paper section 7).

    >>> class_embeddings(np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0], [0.0, 4.0]]), num_templates=2).round(3)
    array([[0.707, 0.707],
           [0.   , 1.   ]], dtype=float32)
    """
    embedding = _embedding("text_embedding", text_embedding)
    if num_templates < 1 or len(embedding) % num_templates:
        raise ValueError(
            f"{len(embedding)} prompt embeddings cannot be split into classes of {num_templates} templates each; "
            "pass the embeddings of all prompts(classes) and num_templates=len(classes.templates)"
        )
    mean = embedding.reshape(-1, num_templates, embedding.shape[1]).mean(axis=1)
    norm = np.linalg.norm(mean, axis=1, keepdims=True)
    # Prompts that cancel out leave the zero vector and not NaN.
    return (mean / np.maximum(norm, np.finfo(np.float32).tiny)).astype(np.float32)


def zero_shot(image: np.ndarray, classes: np.ndarray, label: np.ndarray) -> ZeroShot:
    """Classifies image embeddings [N, P] by the largest dot product with class embeddings [Q, P].

    `label` [N] is the right class of every image (paper section 7).
    A class that scores as high as the right one is put before it, so a tie is an error. `confusion` follows the same
    rule (among wrong classes with equal scores the lowest index): its diagonal sums to `top1 * N`. Up to five
    classes `top5` is 1.
    Raises ValueError on shapes that do not fit, labels outside 0 to Q - 1, no images, or values that are not finite.

    >>> result = zero_shot(np.eye(3)[[0, 1, 2, 2]], np.eye(3), np.array([0, 1, 2, 0]))
    >>> result.top1, round(result.chance, 3), result.confusion.tolist()
    (0.75, 0.333, [[1, 0, 1], [0, 1, 0], [0, 0, 1]])
    """
    image, classes = _embedding("image", image), _embedding("classes", classes)
    _check_width("image", image, "classes", classes)
    num_classes = len(classes)
    label = _label("label", label, len(image), num_classes)
    confusion = np.zeros((num_classes, num_classes), np.int64)
    hits1 = hits5 = 0
    for block in _blocks(len(image), num_classes):
        scores = _scores(image[block], classes)
        row = np.arange(len(scores))
        right = scores[row, label[block]]
        scores[row, label[block]] = -np.inf
        before = np.sum(~(scores < right[:, None]), axis=1)
        predicted = np.where(before == 0, label[block], np.argmax(scores, axis=1))
        np.add.at(confusion, (label[block], predicted), 1)
        hits1 += int(np.sum(before < 1))
        hits5 += int(np.sum(before < 5))
    return ZeroShot(hits1 / len(image), hits5 / len(image), 1 / num_classes, confusion)


def retrieval(image: np.ndarray, text: np.ndarray, caption_id: np.ndarray, image_id: np.ndarray) -> Retrieval:
    """Recall both ways over N pairs of embeddings `image` and `text` [N, P], as COCO counts it (paper section 7).

    Row i pairs the image `image_id[i]` with the caption `caption_id[i]` (any integers). Rows with the same `image_id`
    are one image with several captions: one query and one candidate, its embedding taken from the first of them. Rows
    with the same `caption_id` have equal captions: every one is a right answer for each of their images, and each of
    their images for every one of them. A wrong candidate that scores as high as the best right one is put before it.
    Scores are computed in blocks, never as a whole N x N matrix.
    Raises ValueError on shapes that do not fit, no pairs, or values that are not finite.

    >>> eye = np.eye(3)
    >>> result = retrieval(eye[[0, 0, 1, 2]], eye[[0, 2, 1, 2]], np.array([0, 1, 2, 3]), np.array([0, 0, 1, 2]))
    >>> result.image_to_text_r1, result.text_to_image_r1  # image 2 is beaten by the equal score of a caption of image 0
    (0.6666666666666666, 0.75)
    """
    image, text = _embedding("image", image), _embedding("text", text)
    _check_width("image", image, "text", text)
    num_pairs = len(image)
    if len(text) != num_pairs:
        raise ValueError(f"image has {num_pairs} rows and text {len(text)}; row i of both must be one pair")
    _, first_row, image_index = np.unique(_ids("image_id", image_id, num_pairs), return_index=True, return_inverse=True)
    _, caption_index = np.unique(_ids("caption_id", caption_id, num_pairs), return_inverse=True)
    images = image[first_row]
    image_rank = _rank_of_best(images, text, np.arange(len(images)), caption_index, image_index, caption_index)
    text_rank = _rank_of_best(text, images, caption_index, np.arange(len(images)), caption_index, image_index)
    return Retrieval(*(float(np.mean(rank < k)) for rank in (image_rank, text_rank) for k in (1, 5, 10)))


def ridge_probe(
    train_features: np.ndarray,
    train_label: np.ndarray,
    test_features: np.ndarray,
    test_label: np.ndarray,
    *,
    shots: int = 10,
    ridge: float = 1.0,
    seed: int = 0,
) -> Probe:
    """Closed-form ridge regression of frozen features [N, D] onto one-hot targets, `shots` a class (paper section 7).

    Q is the largest training label + 1. Features and targets are centred by their training mean, which is an intercept
    without penalty: W = (X'X + a I)^-1 X'Y with a = `ridge` times the mean eigenvalue of X'X, so that the scale of the
    features does not matter. `seed` chooses which examples of a class are taken. Ties count as in `zero_shot`.
    Raises ValueError on shapes or labels that do not fit, or a class with fewer than `shots` training examples.

    >>> features, label = np.array([[0.0], [0.1], [1.0], [1.1]]), np.array([0, 0, 1, 1])
    >>> ridge_probe(features, label, np.array([[0.2], [0.9]]), np.array([0, 1]), shots=2)
    Probe(top1=1.0, chance=0.5, shots=2)
    """
    train, test = _embedding("train_features", train_features), _embedding("test_features", test_features)
    _check_width("train_features", train, "test_features", test)
    if shots < 1 or not ridge > 0:
        raise ValueError(f"shots={shots} and ridge={ridge} must be at least 1 and above 0")
    train_label = _label("train_label", train_label, len(train), None)
    num_classes = int(train_label.max()) + 1
    test_label = _label("test_label", test_label, len(test), num_classes)
    count = np.bincount(train_label, minlength=num_classes)
    if count.min() < shots:
        scarce = int(count.argmin())
        raise ValueError(
            f"class {scarce} has {count[scarce]} training examples; {shots} shots need {shots} of every class"
        )
    order = np.random.default_rng(seed).permutation(len(train))
    order = order[np.argsort(train_label[order], kind="stable")]
    place = np.arange(len(order)) - np.repeat(np.cumsum(count) - count, count)
    chosen = order[place < shots]

    targets = np.eye(num_classes)[train_label[chosen]]
    mean = train[chosen].mean(axis=0)
    x, y = train[chosen] - mean, targets - targets.mean(axis=0)
    penalty = max(ridge * float(np.sum(x * x)) / x.shape[1], np.finfo(np.float64).tiny)
    # The dual form is the same map with a matrix of the number of examples, which is smaller for wide features.
    if len(x) < x.shape[1]:
        weight = x.T @ np.linalg.solve(x @ x.T + penalty * np.eye(len(x)), y)
    else:
        weight = np.linalg.solve(x.T @ x + penalty * np.eye(x.shape[1]), x.T @ y)
    scores = ((test - mean) @ weight).astype(np.float32)
    right = scores[np.arange(len(test)), test_label]
    before = np.sum(~(scores < right[:, None]), axis=1) - 1
    return Probe(float(np.mean(before == 0)), 1 / num_classes, shots)


def _rank_of_best(
    query: np.ndarray,
    candidate: np.ndarray,
    query_key: np.ndarray,
    candidate_key: np.ndarray,
    pair_query_key: np.ndarray,
    pair_candidate_key: np.ndarray,
) -> np.ndarray:
    """Number of wrong candidates that score at least as high as the best right one, for every query.

    Candidate j is right for query i if some pair holds both their keys. Keys count from 0.
    """
    order = np.argsort(pair_query_key, kind="stable")
    right_keys = np.split(pair_candidate_key[order], np.cumsum(np.bincount(pair_query_key))[:-1])
    num_keys = int(candidate_key.max()) + 1
    rank = np.zeros(len(query), np.int64)
    for block in _blocks(len(query), len(candidate)):
        scores = _scores(query[block], candidate)
        right_key = np.zeros((len(scores), num_keys), bool)
        for row, key in enumerate(query_key[block]):
            right_key[row, right_keys[key]] = True
        right = right_key[:, candidate_key]
        best = np.max(scores, axis=1, where=right, initial=-np.inf)
        rank[block] = np.sum(~right & ~(scores < best[:, None]), axis=1)
    return rank


def _blocks(num_rows: int, num_columns: int) -> Iterator[slice]:
    size = max(1, _SCORES_PER_BLOCK // num_columns)
    return (slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size))


def _scores(query: np.ndarray, candidate: np.ndarray) -> np.ndarray:
    # A product's last bits depend on the shapes of the blocks. Rounding float64 sums to float32 drops them, so equal
    # embeddings tie wherever they stand.
    return (query @ candidate.T).astype(np.float32)


def _embedding(name: str, value: np.ndarray) -> np.ndarray:
    array = np.asarray(value)
    # NumPy knows bfloat16 as kind "V".
    if array.ndim != 2 or 0 in array.shape or array.dtype.kind not in "fiuV":
        raise ValueError(f"{name} must be a table [rows, width] of numbers that is not empty, not {_shape(array)}")
    array = array.astype(np.float64)
    bad = np.flatnonzero(~np.isfinite(array).all(axis=1))
    if len(bad):
        raise ValueError(f"row {bad[0]} of {name} ({len(bad)} of {len(array)} rows) is not finite; the model is broken")
    return array


def _check_width(name: str, value: np.ndarray, other_name: str, other: np.ndarray) -> None:
    if value.shape[1] != other.shape[1]:
        raise ValueError(
            f"{name} has width {value.shape[1]} and {other_name} width {other.shape[1]}; they must be equal"
        )


def _ids(name: str, value: np.ndarray, num_rows: int) -> np.ndarray:
    array = np.asarray(value)
    if array.shape != (num_rows,) or array.dtype.kind not in "iu":
        raise ValueError(f"{name} must be {num_rows} integers, one a row, not {_shape(array)}")
    return array


def _label(name: str, value: np.ndarray, num_rows: int, num_classes: int | None) -> np.ndarray:
    array = _ids(name, value, num_rows).astype(np.int64)
    if array.min() < 0 or (num_classes is not None and array.max() >= num_classes):
        limit = "" if num_classes is None else f" to {num_classes - 1}"
        raise ValueError(f"{name} must lie in 0{limit}, but ranges from {array.min()} to {array.max()}")
    return array


def _strings(content: dict[str, object], key: str, path: str) -> tuple[str, ...]:
    if key not in content:
        raise files.DataError(f'{path} has no "{key}"; add a list of strings of that name')
    value = content[key]
    if not isinstance(value, list) or not value:
        raise files.DataError(f'"{key}" in {path} must be a list of at least one string, not {_kind(value)}')
    for index, item in enumerate(value):
        if not isinstance(item, str) or not item.strip():
            raise files.DataError(
                f'entry {index} of "{key}" in {path} must be a string that is not empty, not {item!r:.60}'
            )
    return tuple(value)


def _kind(value: object) -> str:
    return "an empty list" if value == [] else f"{type(value).__name__} {value!r:.60}"


def _shape(array: np.ndarray) -> str:
    return f"{array.dtype} {list(array.shape)}"
