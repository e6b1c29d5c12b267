"""Adafactor and AdamW, the learning rate, and which parameters are decayed and factored (paper, section 4)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from limoe.config.schema import OptimizerConfig
from limoe.parallel.parameters import Kinds, parameter_path


def make_schedule(optimizer: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Make the learning rate of the update after s finished ones: linear warm-up, reverse square root, linear
    cool-down.

    With n = s + 1 (no update has a rate of zero), peak P, W warm-up and Q cool-down steps, timescale H and N steps:

        rate(s) = P * min(1, n / W) * sqrt(H / (H + max(0, n - W))) * clip((N + 1 - n) / Q, 0, 1)

    A factor whose W or Q is 0 is left out. With a cool-down the rate is zero from s = N on.

    >>> from limoe.config.presets import preset
    >>> config = preset("b16")
    >>> schedule = make_schedule(config.optimizer, config.train.steps)
    >>> [f"{float(schedule(step)):.3e}" for step in (0, 9_999, 39_999, 781_250)]
    ['1.000e-07', '1.000e-03', '5.000e-04', '0.000e+00']
    """

    def rate(step: Any) -> Float[Array, ""]:
        update = jnp.asarray(step, jnp.int32) + 1
        after_warmup = jnp.maximum(0, update - optimizer.warmup_steps).astype(jnp.float32)
        value = optimizer.learning_rate * jnp.sqrt(optimizer.timescale / (optimizer.timescale + after_warmup))
        if optimizer.warmup_steps:
            value *= jnp.minimum(1.0, update / optimizer.warmup_steps)
        if optimizer.cooldown_steps:
            value *= jnp.clip((num_steps + 1 - update) / optimizer.cooldown_steps, 0.0, 1.0)
        return value

    return rate


class FactoredMoment(NamedTuple):
    """Mean squares of the gradient of a stack of matrices [..., D, F]: over columns and over rows."""

    row: Float[Array, "*stack D"]
    column: Float[Array, "*stack F"]


class AdafactorState(NamedTuple):
    """Finished updates, second moments by parameter path, and the momentum in bfloat16 (shaped like the parameters)."""

    num_updates: Int[Array, ""]
    second_moment: dict[str, FactoredMoment | Float[Array, "..."]]
    momentum: PyTree


def scale_by_adafactor(optimizer: OptimizerConfig, kinds: Kinds) -> optax.GradientTransformation:
    """Make Adafactor as in section 4 of the paper, without a learning rate, update clipping or parameter scaling.

    For update t = 1, 2, ... of a matrix with gradient g [D, F], all in float32:

        beta_t = min(1 - t^-decay, beta2_cap)
        r = beta_t r + (1 - beta_t) mean_F(g^2 + epsilon)      c = beta_t c + (1 - beta_t) mean_D(g^2 + epsilon)
        u = g / sqrt(r c / mean(r))
        m = momentum m + (1 - momentum) u                      kept in bfloat16, used before it is rounded

    Only the last two axes are factored, if the parameter's kind allows it and both have at least `factored_size`. Axes
    before them (experts, layers of a scan) count separate matrices. Other parameters keep the whole second moment v: u
    = g / sqrt(v). Optax's own Adafactor would factor the two largest axes, even experts or layers.

    >>> from limoe.parallel.parameters import EXPERT_KERNEL, EXPERT_VECTOR
    >>> params = {"w1": jnp.zeros((8, 64, 128)), "b1": jnp.zeros((8, 128))}
    >>> adafactor = scale_by_adafactor(OptimizerConfig(), {"w1": EXPERT_KERNEL, "b1": EXPERT_VECTOR})
    >>> state = adafactor.init(params)
    >>> state.second_moment["w1"].row.shape, state.second_moment["w1"].column.shape, state.second_moment["b1"].shape
    ((8, 64), (8, 128), (8, 128))
    """
    momentum = optimizer.momentum

    def init(params: PyTree) -> AdafactorState:
        leaves = jax.tree_util.tree_leaves_with_path(params)
        named = {parameter_path(path): leaf for path, leaf in leaves}
        return AdafactorState(
            num_updates=jnp.zeros((), jnp.int32),
            second_moment={
                path: _no_moment(leaf.shape, kinds[path].factored, optimizer.factored_size)
                for path, leaf in named.items()
            },
            momentum=jax.tree.map(lambda param: jnp.zeros(param.shape, jnp.bfloat16), params),
        )

    def update(updates: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, AdafactorState]:
        del params  # not needed: no parameter scaling
        num_updates = jnp.asarray(optax.safe_increment(state.num_updates))
        beta = jnp.minimum(1.0 - num_updates.astype(jnp.float32) ** -optimizer.decay, optimizer.beta2_cap)
        second_moment = {}

        def normalise(path: jax.tree_util.KeyPath, gradient: Array) -> Array:
            name, gradient = parameter_path(path), gradient.astype(jnp.float32)
            square = jnp.square(gradient) + optimizer.factored_epsilon
            second_moment[name] = _updated_moment(state.second_moment[name], square, beta)
            return _normalised(gradient, second_moment[name])

        normalised = jax.tree_util.tree_map_with_path(normalise, updates)
        smoothed = jax.tree.map(
            lambda old, new: momentum * old.astype(jnp.float32) + (1.0 - momentum) * new, state.momentum, normalised
        )
        kept = jax.tree.map(lambda value: value.astype(jnp.bfloat16), smoothed)
        return smoothed, AdafactorState(num_updates=num_updates, second_moment=second_moment, momentum=kept)

    return optax.GradientTransformation(init, update)


def _no_moment(shape: tuple[int, ...], factored: bool, factored_size: int) -> FactoredMoment | Float[Array, "..."]:
    """Make the second moment before the first update."""
    if factored and len(shape) >= 2 and min(shape[-2:]) >= factored_size:
        column = (*shape[:-2], shape[-1])
        return FactoredMoment(row=jnp.zeros(shape[:-1], jnp.float32), column=jnp.zeros(column, jnp.float32))
    return jnp.zeros(shape, jnp.float32)


def _normalised(gradient: Float[Array, "..."], moment: FactoredMoment | Float[Array, "..."]) -> Float[Array, "..."]:
    """Divide the gradient by the root of its mean square."""
    if not isinstance(moment, FactoredMoment):
        return gradient * jax.lax.rsqrt(moment)
    # Take each root by itself: for a row of zeros beside large ones, r c or r / mean(r) would underflow to 0 * inf =
    # NaN.
    row, column = jax.lax.rsqrt(moment.row), jax.lax.rsqrt(moment.column)
    root = jnp.sqrt(jnp.mean(moment.row, axis=-1))
    return gradient * row[..., :, None] * (root[..., None] * column)[..., None, :]


def _updated_moment(
    moment: FactoredMoment | Float[Array, "..."], square: Float[Array, "..."], beta: Float[Array, ""]
) -> FactoredMoment | Float[Array, "..."]:
    if isinstance(moment, FactoredMoment):
        return FactoredMoment(
            row=beta * moment.row + (1.0 - beta) * jnp.mean(square, axis=-1),
            column=beta * moment.column + (1.0 - beta) * jnp.mean(square, axis=-2),
        )
    return beta * moment + (1.0 - beta) * square


def make_optimizer(optimizer: OptimizerConfig, num_steps: int, kinds: Kinds) -> optax.GradientTransformation:
    """Make the optimiser of a run for parameters of these kinds (a tree: an nnx State or nested dicts and lists).

    It clips by the global norm, applies Adafactor or Adam, decays the kernels, and multiplies by minus the learning
    rate. The decay is relative to the peak of the schedule: at the peak rate a kernel shrinks by the share
    `weight_decay` in a step. (As a multiple of the paper's rate of 1e-3, its 1e-5 would take only 0.4% off a kernel in
    400,000 steps.) Updates may hide a gradient that is not finite: a norm that overflows makes them zero. The caller
    must check the loss and `optax.global_norm` of the gradients.

    >>> from limoe.parallel.parameters import KERNEL, VECTOR
    >>> params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    >>> optimizer = make_optimizer(OptimizerConfig(), 20_000, {"kernel": KERNEL, "bias": VECTOR})
    >>> gradients, state = jax.tree.map(jnp.zeros_like, params), optimizer.init(params)
    >>> updates, state = jax.jit(optimizer.update)(gradients, state, params)
    >>> bool((updates["kernel"] < 0).all()), bool((updates["bias"] == 0).all())
    (True, True)
    """
    if optimizer.name == "adafactor":
        scale = scale_by_adafactor(optimizer, kinds)
    else:
        scale = optax.scale_by_adam(b1=optimizer.adam_beta1, b2=optimizer.adam_beta2, eps=optimizer.adam_epsilon)

    def decayed(params: PyTree) -> PyTree:
        return jax.tree_util.tree_map_with_path(lambda path, _: kinds[parameter_path(path)].decayed, params)

    return optax.chain(
        optax.clip_by_global_norm(optimizer.clip_norm) if optimizer.clip_norm else optax.identity(),
        scale,
        optax.add_decayed_weights(optimizer.weight_decay / optimizer.learning_rate, mask=decayed),
        optax.scale_by_learning_rate(make_schedule(optimizer, num_steps)),
    )
