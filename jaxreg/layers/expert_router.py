"""A router of sparse mixtures of experts by sparse optimal transport: each expert chooses at most k tokens."""

import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxreg.checks import check_float, check_hyperparameter
from jaxreg.solvers.sparse_transport import solve_sparse_transport

__all__ = ["ExpertAssignment", "SparseTransportRouter", "assign_tokens", "expert_capacity"]


class ExpertAssignment(NamedTuple):
  """Which tokens go to which experts, and how the experts' outputs are weighted; leading axes are groups."""

  dispatch: jax.Array  # boolean [..., tokens, experts]
  combine: jax.Array  # softmax of the logits where dispatched and 0 elsewhere, [..., tokens, experts]
  plan: jax.Array  # of the transport problem, [..., tokens, experts]; it has no gradient


def expert_capacity(tokens: int, experts: int, *, capacity_factor: float = 1.0, multiple_of: int = 4) -> int:
  """The number of tokens that an expert may take, `tokens * capacity_factor / experts`, rounded up to a multiple.

  >>> expert_capacity(100, 8)
  16

  Args:
    tokens: tokens of a group.
    experts: number of experts.
    capacity_factor: positive.
    multiple_of: what the capacity is a multiple of, unless there are fewer tokens.

  Returns:
    The capacity.

  Raises:
    ValueError: when an argument is not positive.

  Reference: Liu, Puigcerver, Blondel, "Sparsity-Constrained Optimal Transport", ICLR 2023, the router's k (Section 6).
  """
  check_hyperparameter("tokens", tokens, low=1)
  check_hyperparameter("experts", experts, low=1)
  check_hyperparameter("capacity_factor", capacity_factor, low=0, open_low=True)
  check_hyperparameter("multiple_of", multiple_of, low=1)
  capacity = math.ceil(tokens * capacity_factor / experts)
  return min(math.ceil(capacity / multiple_of) * multiple_of, tokens)


def assign_tokens(
  logits: ArrayLike,
  *,
  k: int,
  regularization: ArrayLike = 1.0,
  learning_rate: ArrayLike = 1e-2,
  steps: int = 20,
) -> ExpertAssignment:
  """Assigns tokens to experts, at most `k` to each, by sparse transport with the costs `-softmax(logits)`.

  Every token has mass 1 and every expert `tokens / experts`. After a fixed number of Adam steps on the semi-dual the
  rows are only approximately right: some tokens have two experts, some none, and pass through the residual connection.
  The training signal is in the weights of `combine`; the choice has no gradient.

  >>> import jax, jax.numpy as jnp
  >>> logits = jnp.array([[3.0, 0.0], [2.0, 0.0], [1.0, 0.0], [0.0, 1.0]])  # three tokens prefer the first expert
  >>> jax.jit(assign_tokens, static_argnames="k")(logits, k=2).dispatch.sum(0).tolist()
  [2, 2]

  Args:
    logits: floating `[..., tokens, experts]`, the leading axes being groups.
    k: static, the largest number of tokens of an expert, in [1, tokens].
    regularization: gamma, positive; may be traced.
    learning_rate: of Adam, positive; may be traced.
    steps: static, of Adam, from the potential 0.

  Returns:
    ExpertAssignment.

  Raises:
    ValueError: when logits are not floating point or a hyperparameter is outside its domain.

  Reference: Liu, Puigcerver, Blondel, "Sparsity-Constrained Optimal Transport", ICLR 2023, sparse mixtures of experts
    (Section 6).
  """
  check_float("logits", logits)
  check_hyperparameter("learning_rate", learning_rate, low=0, open_low=True)
  *groups, tokens, experts = logits.shape
  dtype = jnp.promote_types(logits.dtype, jnp.float32)
  scores = jax.nn.softmax(logits.astype(dtype), axis=-1)
  result = solve_sparse_transport(
    -jax.lax.stop_gradient(scores),
    jnp.ones((*groups, tokens), dtype),
    jnp.full((*groups, experts), tokens / experts, dtype),
    k=k,
    regularization=regularization,
    steps=steps,
    tolerance=0.0,
    optimizer=optax.adam(learning_rate),
    row_potential=jnp.zeros((*groups, tokens), dtype),
  )
  dispatch = result.plan > 0
  return ExpertAssignment(dispatch, jnp.where(dispatch, scores, 0).astype(logits.dtype), result.plan)


class SparseTransportRouter(nn.Module):
  """Scores tokens by a linear layer without bias and lets every expert choose at most its capacity of them.

  >>> import jax, jax.numpy as jnp
  >>> router = SparseTransportRouter(experts=4, multiple_of=1)
  >>> tokens = jax.random.normal(jax.random.key(0), (2, 16, 8))
  >>> assignment, variables = jax.jit(router.init_with_output)(jax.random.key(1), tokens)
  >>> assignment.combine.shape, int(assignment.dispatch.sum(1).max())
  ((2, 16, 4), 4)

  Inputs are `[..., tokens, features]`, one transport problem per group of the leading axes; the result is an
  `ExpertAssignment`. `min`, `mean` and `max` tokens per expert are sown into `intermediates`.

  Attributes:
    experts: number of experts.
    capacity_factor: the capacity is `expert_capacity(tokens, experts, ...)`.
    multiple_of: what the capacity is a multiple of.
    regularization: of the transport problem.
    learning_rate: of its solver.
    steps: of its solver.

  Reference: Liu, Puigcerver, Blondel, "Sparsity-Constrained Optimal Transport", ICLR 2023, sparse mixtures of experts
    (Section 6).
  """

  experts: int
  capacity_factor: float = 1.0
  multiple_of: int = 4
  regularization: float = 1.0
  learning_rate: float = 1e-2
  steps: int = 20

  @nn.compact
  def __call__(self, tokens: ArrayLike) -> ExpertAssignment:
    capacity = expert_capacity(
      tokens.shape[-2], self.experts, capacity_factor=self.capacity_factor, multiple_of=self.multiple_of
    )
    assignment = assign_tokens(
      nn.Dense(self.experts, use_bias=False, name="scores")(tokens),
      k=capacity,
      regularization=self.regularization,
      learning_rate=self.learning_rate,
      steps=self.steps,
    )
    loads = assignment.dispatch.sum(-2)
    self.sow("intermediates", "min_tokens", loads.min())
    self.sow("intermediates", "mean_tokens", loads.mean())
    self.sow("intermediates", "max_tokens", loads.max())
    return assignment
