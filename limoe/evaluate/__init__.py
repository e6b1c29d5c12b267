"""What a trained model can do, as numbers: embeddings, and the evaluators that make figures of them.

What a person looks at is in `limoe.report`.
"""

from limoe.evaluate import probe, retrieval, zero_shot
from limoe.evaluate.evaluator import Evaluator, evaluate, register

__all__ = ["Evaluator", "evaluate", "register"]

for _evaluator in (zero_shot.EVALUATOR, retrieval.EVALUATOR, probe.EVALUATOR):
    register(_evaluator)
