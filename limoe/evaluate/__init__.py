"""Numbers that say how good a trained model is: embeddings, and evaluators that compute figures from them.

Pictures for people are in `limoe.report`.
"""

from limoe.evaluate import probe, retrieval, zero_shot
from limoe.evaluate.evaluator import Evaluator, evaluate, register

__all__ = ["Evaluator", "evaluate", "register"]

for _evaluator in (zero_shot.EVALUATOR, retrieval.EVALUATOR, probe.EVALUATOR):
    register(_evaluator)
