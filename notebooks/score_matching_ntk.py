# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Score matching as kernel regression, and why it has to stop early
#
# A diffusion model learns the *score* of noisy data, $\nabla \log p_t$, by denoising. For wide networks one can say
# exactly what gradient descent on that task does (Han, Razaviyayn and Xu, *ICLR* 2024): it is kernel regression with noisy
# targets. Three things follow, and this notebook shows them on four little Gaussians in the plane.
#
# 1. Predicting the clean data instead of the score turns score matching into ordinary least squares.
# 2. A wide network follows the neural tangent kernel, step by step.
# 3. The targets are noisy even when the data are not, so training must stop early. How early depends on what the score
#    is for.

# %%
import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt

from jaxreg import denoising, kernels
from jaxreg.models import PosteriorMeanMLP

jax.config.update("jax_enable_x64", True)
plt.rcParams.update({"figure.dpi": 90, "axes.grid": True, "grid.alpha": 0.3})

# %% [markdown]
# ## From the score to least squares
#
# Noise turns data $x_0$ into $x_t = \alpha_t x_0 + \sqrt{h_t}\, \varepsilon$. Tweedie's formula says that the score and the
# **posterior mean** $f^\star(t, x) = \mathbb E[x_0 \mid x_t = x]$ are two names for one thing,
#
# $$\nabla \log p_t(x) = \frac{\alpha_t f^\star(t, x) - x}{h_t},$$
#
# and with the right weighting the denoising loss *is* the squared error of predicting $x_0$. So: inputs $(x_t, t)$, targets
# $x_0$. The catch is in the targets. Given $x_t$, the clean $x_0$ is random, and $f^\star$ is only its mean. At large noise
# nearly everything about the target is noise.

# %%
mixture = {
  "means": jnp.array([[0.8, 0.8], [0.8, -0.8], [-0.8, 0.8], [-0.8, -0.8]]),
  "variances": jnp.full(4, 0.05**2),
  "weights": jnp.full(4, 0.25),
}
schedule = functools.partial(denoising.linear_vp_schedule, start_rate=0.1, end_rate=8.0)
first, last = 0.05, 1.0


def draw(key, count):
  """Clean data, times, noisy data and their posterior means."""
  keys = jax.random.split(key, 4)
  centres = mixture["means"][jax.random.randint(keys[0], (count,), 0, 4)]
  clean = centres + 0.05 * jax.random.normal(keys[1], (count, 2))
  times = jax.random.uniform(keys[2], (count,), minval=first, maxval=last)
  signal, variance = schedule(times)
  noisy = signal[:, None] * clean + jnp.sqrt(variance)[:, None] * jax.random.normal(keys[3], (count, 2))
  truth = denoising.gaussian_mixture_posterior_mean(noisy, signal=signal, variance=variance, **mixture)
  return clean, times, noisy, truth


axis_points = jnp.linspace(-1.6, 1.6, 15)
grid = jnp.stack(jnp.meshgrid(axis_points, axis_points), axis=-1).reshape(-1, 2)
clean, times, noisy, truth = draw(jax.random.key(0), 800)
figure, axes = plt.subplots(1, 3, figsize=(12, 4), sharey=True, layout="constrained")
for axis, time in zip(axes, (0.1, 0.4, 0.9)):
  signal, variance = schedule(jnp.array(time))
  own = signal * clean + jnp.sqrt(variance) * jax.random.normal(jax.random.key(1), clean.shape)
  score = denoising.gaussian_mixture_score(grid, signal=signal, variance=variance, **mixture)
  axis.plot(*own.T, ".", markersize=2, color="C7")
  axis.quiver(*grid.T, *(score / jnp.linalg.norm(score, axis=1, keepdims=True)).T, color="C0", width=0.004)
  axis.set(title=f"t = {time:g}", xlim=(-1.7, 1.7), ylim=(-1.7, 1.7), aspect="equal")
figure.suptitle("noisy data, and the direction of the score")
plt.show()

# %% [markdown]
# ## A wide network follows a kernel
#
# Take a two-layer ReLU network of which the hidden layer is trained. In the limit of infinite width its tangent kernel is
#
# $$\kappa(z, z') = \frac{z \cdot z'}{2\pi} \bigl(\pi - \angle(z, z')\bigr), \qquad z = (x_t, t, 1),$$
#
# and gradient descent of the network is gradient descent under that kernel, which has a closed form for any number of
# steps. Networks of growing width against it:

# %%
features = lambda noisy, times: jnp.concatenate([noisy, (times - first)[:, None], jnp.ones((len(noisy), 1))], axis=1)
few = 60
small_x, small_y = features(noisy[:few], times[:few]), clean[:few]
_, test_times, test_noisy, test_truth = draw(jax.random.key(2), 500)
test_x = features(test_noisy, test_times)
gram, cross = kernels.score_ntk(small_x, small_x), kernels.score_ntk(test_x, small_x)
rate, steps = 0.5 / jnp.linalg.eigvalsh(gram)[-1], 200
path = kernels.kernel_descent_path(gram, cross, small_y, learning_rate=rate, steps=jnp.arange(steps + 1.0))


@functools.partial(jax.jit, static_argnums=1)
def network_path(key, width):
  """Root mean squared difference to the kernel's predictions at test points, at every step."""
  model = PosteriorMeanMLP(width, 2)
  variables = model.init(key, small_x)
  apply = lambda params, inputs: model.apply({"params": params, "fixed": variables["fixed"]}, inputs)
  loss = lambda params: jnp.sum((apply(params, small_x) - small_y) ** 2) / 2

  def step(params, expected):
    gap = jnp.sqrt(jnp.mean((apply(params, test_x) - expected) ** 2))
    return jax.tree.map(lambda p, g: p - rate * g, params, jax.grad(loss)(params)), gap

  return jax.lax.scan(step, variables["params"], path.test)[1]


figure, axis = plt.subplots(figsize=(6, 3.6))
for width, color in ((100, "C0"), (1000, "C1"), (10_000, "C2")):
  axis.semilogy(network_path(jax.random.key(3), width)[1:], color, label=f"width {width:,}")
axis.set(xlabel="step", ylabel="difference to the kernel", title="networks follow kernel descent")
axis.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Stop early
#
# Now the kernel alone, with 800 examples. The error that counts is the distance to $f^\star$, which we know here.

# %%
x = features(noisy, times)
gram, cross = kernels.score_ntk(x, x), kernels.score_ntk(test_x, x)
eigen = kernels.kernel_eigensystem(gram)
rate = 1 / eigen.values[-1]
descend = lambda targets, steps: kernels.gradient_descent_coefficients(eigen, targets, steps=steps, learning_rate=rate)
counts = jnp.unique(jnp.round(jnp.geomspace(1, 1e7, 57)))


@jax.jit
def errors(targets):
  return jax.lax.map(lambda steps: jnp.mean((cross @ descend(targets, steps) - test_truth) ** 2), counts)


residual = jnp.sqrt(jnp.mean((clean - truth) ** 2))  # the targets' noise; in practice a bound, the size of the data
rule = kernels.early_stopping_step(
  eigen.values / len(x), noise=residual, learning_rate=rate * len(x), longest=10_000_000
)
noisy_errors, clean_errors = errors(clean), errors(truth)
best = counts[jnp.argmin(noisy_errors)]
figure, axis = plt.subplots(figsize=(6.5, 3.8))
axis.loglog(counts, noisy_errors, label="targets: clean data (noisy, given the input)")
axis.loglog(counts, clean_errors, label="targets: posterior means")
axis.axvline(best, color="C0", linestyle=":", label=f"best step, {best:.0f}")
axis.axvline(rule, color="k", linestyle="--", label=f"stopping rule, {int(rule)}")
axis.set(xlabel="step", ylabel="squared error to the posterior mean", title="kernel regression of the score")
axis.legend(frameon=False, fontsize=8)
plt.show()

# %% [markdown]
# With noisy targets (blue) the error falls, reaches its best after a few hundred steps, and rises to several times that as
# the kernel goes on to fit every single target. With their means as targets (orange) no stopping is needed: noise is the whole reason.
#
# The rule of the paper needs no test data. It compares how much of the kernel's spectrum has been used with how much the
# noise allows, and is deliberately careful: here it stops after a handful of steps.
#
# ## What is the score for?
#
# Run the reverse equation with three scores: stopped by the rule, stopped at the best step, and trained to the end.

# %%
radius = jnp.max(jnp.linalg.norm(clean, axis=1))


@jax.jit
def sample(coefficients, start):
  """The probability flow from the last time to the first, by Heun's method, then one step to the posterior mean."""

  def mean(time, points):
    inputs = features(points, jnp.full(len(points), time))
    predicted = kernels.score_ntk(inputs, x) @ coefficients
    return predicted * jnp.minimum(1, radius / jnp.maximum(jnp.linalg.norm(predicted, axis=1, keepdims=True), 1e-9))

  def velocity(time, points):
    signal, variance = schedule(time)
    score = denoising.score_from_posterior_mean(mean(time, points), points, signal=signal, variance=variance)
    return -(0.1 + 7.9 * time) / 2 * (points + score)

  step = (first - last) / 80

  def heun(points, time):
    slope = velocity(time, points)
    other = velocity(time + step, points + step * slope)
    return points + step * (slope + other) / 2, None

  points, _ = jax.lax.scan(heun, start, last + step * jnp.arange(80))
  return mean(jnp.array(first), points)


start = jax.random.normal(jax.random.key(4), (400, 2))
figure, axes = plt.subplots(1, 3, figsize=(12, 4), sharey=True, layout="constrained")
for axis, (name, count) in zip(axes, (("rule", rule), ("best step", best), ("to the end", 1e7))):
  samples = sample(descend(clean, count), start)
  nearest = jnp.sqrt(jnp.min(jnp.sum((samples[:, None] - clean) ** 2, axis=-1), axis=1)).mean()
  axis.plot(*clean.T, ".", markersize=3, color="C7", label="training data")
  axis.plot(*samples.T, ".", markersize=3, color="C3", label="samples")
  axis.set(title=f"{name}; nearest training point at {nearest:.3f}", xlim=(-1.5, 1.5), ylim=(-1.5, 1.5), aspect="equal")
axes[0].legend(frameon=False, fontsize=8, loc="upper center")
plt.show()

# %% [markdown]
# This picture is a warning against reading one number. The rule's score is almost linear; its samples fill the middle.
# The score with the least error gives samples *between* the four Gaussians as well as in them. The score that was trained
# to the end, several times worse by its error, gives samples that look best, because they sit on **training points**. Whether
# that is success or failure is the question of memorisation in diffusion models: a small error of the score and samples
# close to the data are different goals.
#
# **In code.** `kernels.score_ntk`, `kernels.kernel_descent_path` and `kernels.early_stopping_step` are the method,
# `losses.posterior_mean_squared_loss` the loss, `models.PosteriorMeanMLP` the network. `experiments/score_ntk.py` checks
# the claims over seeds; one of them, that stopped scores give better samples, does not reproduce
# ([ledger](../experiments/LEDGER.md)).
