"""The spiral `dx = A x^3` learned by a neural ODE, and with noise by a neural SDE; both without and with a penalty."""

import diffrax
import jax
import jax.numpy as jnp
import lineax
import numpy as np
import optax
from scipy import integrate

from jaxreg.models import MLP
from jaxreg.solvers.solver_cost import solve_with_cost

__all__ = ["CONVERGED", "ODE_WEIGHT", "SDE_WEIGHT", "measure_ode", "measure_sde", "thresholds"]

MATRIX = np.array([[-0.1, 2.0], [-2.0, -0.1]])
START = np.array([2.0, 0.0])
TIMES = np.linspace(0, 1, 31)[1:]
NOISE = 0.2
ODE_WEIGHT = 0.2  # of the error's penalty
SDE_WEIGHT = 0.2
CONVERGED = 0.05  # times the loss of a solution that stays at the start; training that fails ends at several times that


def thresholds() -> dict[str, float]:
  """The losses of `ODE` and `SDE` below which a training counts as converged."""
  means, variances = spiral_moments()
  rest = {
    "ODE": np.mean((trajectory() - START) ** 2),
    "SDE": np.mean((means - START) ** 2) + np.mean(variances**2),
  }
  return {name: CONVERGED * float(loss) for name, loss in rest.items()}


def measure_ode(seeds, steps: int = 500) -> dict[str, np.ndarray]:
  """The spiral's trajectory learned by a neural ODE in float64: `NAME loss` and the like, `[seeds]`.

  Args:
    seeds: of the runs.
    steps: AdaBelief's steps.

  Returns:
    Of `vanilla` and `error`, at the end of training, `loss` (the mean square error), `evaluations` of the vector field,
    and `converged`, whether the loss is below the threshold.
  """
  drift = MLP((50, 2), activation=jnp.tanh)
  vector_field = lambda t, y, params: drift.apply({"params": params}, y[None] ** 3)[0]
  controller = diffrax.PIDController(rtol=1e-6, atol=1e-6)

  def losses(params, key):
    del key
    solution, cost = solve_with_cost(
      diffrax.ODETerm(vector_field), diffrax.Tsit5(), 0.0, 1.0, None, jnp.asarray(START), params,
      saveat=diffrax.SaveAt(ts=TIMES), stepsize_controller=controller, max_steps=256,
    )  # fmt: skip
    return jnp.mean((solution.ys - trajectory()) ** 2), cost.error_sum, cost.evaluations

  def init(key):
    params = drift.init(key, jnp.zeros((1, 2)))["params"]
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)

  with jax.enable_x64(True):
    return _measure("ODE", losses, init, seeds, ODE_WEIGHT, steps, trials=1)


def measure_sde(paths: int, seeds, steps: int = 250) -> dict[str, np.ndarray]:
  """The noisy spiral's moments learned by a neural SDE: `NAME loss` and the like, `[seeds]`.

  Args:
    paths: of the neural SDE, solved as one state.
    seeds: of the runs.
    steps: AdaBelief's steps.

  Returns:
    Of `vanilla` and `error`, at the end of training, `loss` and `evaluations` of the drift, means of ten solutions, and
    `converged`, whether the loss is below the threshold.
  """
  means, variances = spiral_moments()
  drift, diffusion = MLP((50, 2), activation=jnp.tanh), MLP((2,))
  # The learnt drift is that of the Stratonovich equation, which SPaRK solves.
  vector_field = lambda t, y, params: drift.apply({"params": params["drift"]}, y**3)
  noise = lambda t, y, params: lineax.DiagonalLinearOperator(diffusion.apply({"params": params["diffusion"]}, y))
  controller = diffrax.PIDController(rtol=0.3, atol=0.3, pcoeff=0.1, icoeff=0.3, dtmin=1e-3)

  def losses(params, key):
    path = diffrax.VirtualBrownianTree(0.0, 1.0, 5e-4, (paths, 2), key, diffrax.SpaceTimeLevyArea)
    terms = diffrax.MultiTerm(diffrax.ODETerm(vector_field), diffrax.ControlTerm(noise, path))
    solution, cost = solve_with_cost(
      terms, diffrax.SPaRK(), 0.0, 1.0, 0.05, jnp.tile(jnp.asarray(START), (paths, 1)), params,
      saveat=diffrax.SaveAt(ts=TIMES), stepsize_controller=controller, max_steps=256,
    )  # fmt: skip
    loss = jnp.mean((solution.ys.mean(1) - means) ** 2) + jnp.mean((solution.ys.var(1) - variances) ** 2)
    return loss, cost.error_sum, 3 * solution.stats["num_steps"]  # three stages

  def init(key):
    one, two = jax.random.split(key)
    return {name: module.init(at, jnp.zeros((1, 2)))["params"]
            for name, module, at in (("drift", drift, one), ("diffusion", diffusion, two))}  # fmt: skip

  return _measure("SDE", losses, init, seeds, SDE_WEIGHT, steps, trials=10)


def _measure(kind, losses, init, seeds, weight, steps, trials):
  """Training without and with a penalty; `losses(params, key)` are the loss, the penalty and the evaluations."""
  optimizer = optax.adabelief(0.01)

  @jax.jit
  def train(key, weight):
    one, two, three = jax.random.split(key, 3)
    params = init(one)

    def penalized(params, key):
      loss, error, _ = losses(params, key)
      return loss + weight * error

    def step(carry, key):
      params, state = carry
      updates, state = optimizer.update(jax.grad(penalized)(params, key), state, params)
      return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(two, steps))
    loss, _, evaluations = jax.lax.map(lambda key: losses(params, key), jax.random.split(three, trials))
    return loss.mean(), evaluations.astype(loss.dtype).mean()

  measured = {}
  for name, value in (("vanilla", 0.0), ("error", weight)):
    results = np.array([jax.device_get(train(jax.random.key(seed), jnp.asarray(value))) for seed in seeds])
    converged = (results[:, 0] < thresholds()[kind]).astype(float)
    measured |= {f"{name} loss": results[:, 0], f"{name} evaluations": results[:, 1], f"{name} converged": converged}
  return measured


def trajectory() -> np.ndarray:
  """The solution `[times, 2]` of `dx = A x^3 dt` from (2, 0) at 30 times in (0, 1].

  >>> trajectory().shape
  (30, 2)
  """
  solution = integrate.solve_ivp(lambda t, x: MATRIX @ x**3, (0, 1), START, t_eval=TIMES, rtol=1e-10, atol=1e-10)
  return solution.y.T


def spiral_moments(paths: int = 5000, steps: int = 600) -> tuple[np.ndarray, np.ndarray]:
  """Means and variances `[times, 2]` of `dx = A x^3 dt + 0.2 x dW` (Ito) from (2, 0), by the Euler-Maruyama method."""
  random = np.random.default_rng(0)
  x, moments = np.tile(START, (paths, 1)), []
  for index in range(1, steps + 1):
    x = x + x**3 @ MATRIX.T / steps + NOISE * x * random.normal(size=x.shape) / np.sqrt(steps)
    if index % (steps // len(TIMES)) == 0:
      moments.append((x.mean(0), x.var(0)))
  return tuple(np.array(moments).swapaxes(0, 1))
