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
# # Grokking: a network that is lazy first and rich later
#
# Sometimes a network fits its training set early and generalises only much later. This is called *grokking*, and it was
# first seen in modular arithmetic, with weight decay, so that many explanations were about the norm of the weights.
#
# Kumar, Bordelon, Gershman and Pehlevan (*ICLR* 2024) found it in a problem small enough to be solved by hand, without
# any weight decay, and with a different explanation: **the network is first lazy, then rich**. At the beginning it fits
# with the features it happens to have, as a kernel machine would, and those are the wrong ones. Only then, slowly, it
# learns features. Two dials decide how long that takes: how large the output is scaled (the *laziness*), and how well the
# initial kernel is *aligned* with the task.
#
# This notebook reproduces the effect, turns both dials, and lays a mean-field theory over the simulation.

# %%
import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from jaxreg import kernels
from jaxreg.metrics import kernel_alignment

plt.rcParams.update({"figure.dpi": 90, "axes.grid": True, "grid.alpha": 0.3})

# %% [markdown]
# ## The problem
#
# Inputs $x \sim \mathcal N(0, I/D)$, and a teacher $y(x) = \tfrac12 (\beta \cdot x)^2$ that looks in one direction only. The
# student is a *committee machine*, a two-layer network of which the first layer is trained:
#
# $$f(x) = \frac{a}{N} \sum_{i=1}^N \varphi(w_i \cdot x), \qquad \varphi(h) = h + \frac{c}{2} h^2 .$$
#
# The scale $a$ is the laziness: the larger it is, the less the weights need to move. The curvature $c$ is the alignment:
# with little of it the network starts out almost linear, while the task is quadratic.
#
# The pleasant thing about this network is that two statistics of its neurons say all, their mean $\bar w$ and their second
# moment $M = \frac1N \sum_i w_i w_i^\top$:
#
# $$f(x) = a\, \bar w \cdot x + \frac{a c}{2}\, x^\top M x .$$
#
# So the population loss needs no test set. `kernels.committee_risk` gives it in three terms, one of which is the power
# that sits in *linear* functions, $a^2 |\bar w|^2 / D$. There is nothing linear to be learned here: that term is pure
# overfitting.

# %%
features, neurons, examples = 50, 100, 250


def problem(key):
  keys = jax.random.split(key, 3)
  inputs = jax.random.normal(keys[0], (examples, features)) / features**0.5
  teacher = jax.random.normal(keys[1], (features,))
  teacher = teacher * features**0.5 / jnp.linalg.norm(teacher)
  return inputs, (inputs @ teacher) ** 2 / 2, teacher, jax.random.normal(keys[2], (neurons, features))


inputs, targets, teacher, initial = problem(jax.random.key(0))
held_out = jax.random.normal(jax.random.key(1), (300, features)) / features**0.5
moments = 2.0 ** np.arange(0, 14.6, 0.2)  # at which steps to look
moments = np.unique(np.round(moments).astype(int))


@jax.jit
def train(output_scale, curvature, centring=0.0):
  """Full-batch gradient descent; losses, the loss's linear term and the kernel's alignment at the chosen steps.

  A centred network (`centring=1`) has its initial outputs subtracted, and starts from zero.
  """
  options = {"output_scale": output_scale, "curvature": curvature}
  rate = 0.6 / (1 + (examples / features) ** 0.5) ** 2 * neurons / output_scale**2
  offset = centring * kernels.committee(initial, inputs, **options)
  loss = lambda weights: jnp.sum((kernels.committee(weights, inputs, **options) - offset - targets) ** 2) / 2
  step = lambda _, weights: weights - rate * jax.grad(loss)(weights)

  def look(weights, count):
    weights = jax.lax.fori_loop(0, count, step, weights)
    now, start = kernels.committee_statistics(weights), kernels.committee_statistics(initial)
    centred = jax.tree.map(lambda a, b: a - centring * b, now, start)
    risk = kernels.committee_risk(centred, teacher, **options)
    kernel = kernels.committee_ntk(held_out, held_out, now, curvature=curvature)
    return weights, {
      "training loss": 2 * loss(weights) / examples,
      "population loss": sum(risk),
      "its linear term": risk.linear,
      "kernel alignment": kernel_alignment(kernel, (held_out @ teacher) ** 2 / 2),
      "norm": jnp.linalg.norm(weights) / jnp.linalg.norm(initial),
    }

  return jax.lax.scan(look, initial, jnp.diff(moments, prepend=0))[1]


curves = train(2.0, 0.25)
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
for name in ("training loss", "population loss", "its linear term"):
  left.loglog(moments, curves[name], label=name)
left.set(xlabel="step", title="grokking without weight decay", ylim=(1e-4, 3))
left.legend(frameon=False)
right.semilogx(moments, curves["kernel alignment"], "C3", label="alignment of the tangent kernel")
right.semilogx(moments, curves["norm"], "C4", label="norm of the weights, relative to the start")
right.set(xlabel="step", title="what happens inside", ylim=(0, None))
right.legend(frameon=False)
plt.show()

# %% [markdown]
# The training loss (blue) falls first. The population loss (orange) meanwhile *rises* a little: the network explains its
# examples with linear functions (green), because these are what its initial kernel offers most of. Later that power
# disappears and the population loss falls, reaching each level many times later than the training loss did. Inside, the
# tangent kernel turns towards the task. The norm of the weights ends larger than it began, so no shrinking of weights can
# be the reason.
#
# ## The first dial: laziness
#
# For large $a$ the weights hardly need to move, the kernel stays what it was, and the network remains a kernel machine with
# the wrong kernel. For small $a$ it learns features at once. To turn the dials cleanly, the initial network is subtracted
# from the outputs, so that all of them start from zero.

# %%
figure, axes = plt.subplots(1, 2, figsize=(11, 3.8), sharey=True, layout="constrained")
for index, scale in enumerate((0.25, 1.0, 4.0, 16.0)):
  curves = train(scale, 0.25, 1.0)
  axes[0].loglog(moments, curves["population loss"], f"C{index}", label=f"a = {scale:g}")
  axes[0].loglog(moments, curves["training loss"], f"C{index}:")
for index, curvature in enumerate((0.05, 0.25, 1.0)):
  curves = train(1.0, curvature, 1.0)
  axes[1].loglog(moments, curves["population loss"], f"C{index}", label=f"c = {curvature:g}")
  axes[1].loglog(moments, curves["training loss"], f"C{index}:")
axes[0].set(xlabel="step", title="laziness; dotted: training loss", ylim=(1e-4, 10))
axes[1].set(xlabel="step", title="alignment; dotted: training loss")
for axis in axes:
  axis.legend(frameon=False)
plt.show()

# %% [markdown]
# ## The second dial: alignment
#
# On the right the curvature changes instead. A strongly curved network ($c = 1$) fits its examples soonest, because its
# initial kernel already contains much of what is quadratic; and for that very reason it need not learn features, and
# generalises worst in the end. Grokking lives in between: a kernel bad enough to be worth leaving, and laziness large
# enough that leaving takes time.
#
# How many examples would the lazy network need? Its initial kernel is $x \cdot x' + c^2 (x \cdot x')^2$, and the quadratic
# functions have an eigenvalue of $2 c^2 / D^2$, so of the order of $D^2 / (2 c^2)$ examples; learning a direction needs of
# the order of $D$.

# %%
spectrum = kernels.committee_spectrum(features, curvature=0.25)
print(f"eigenvalues: linear {spectrum.linear:.3g}, quadratic {spectrum.quadratic:.3g}")
print(f"examples that the kernel needs: about {1 / spectrum.quadratic:,.0f}; here there are {examples}, D = {features}")

# %% [markdown]
# ## A theory without a network
#
# For many dimensions and as many examples, the path of gradient descent is no longer random: *dynamical mean-field theory*
# predicts both losses at every step. What makes it nontrivial is memory: a training example has been seen before, so the
# weights remember it, and that memory is all that separates training loss from test loss. `kernels.committee_dmft` solves
# the equations forward in time. Networks of growing dimension approach it.

# %%
setting = {"output_scale": 1.0, "curvature": 0.5, "learning_rate": 0.15}
steps, kappa, committee_size = 10, 2.0, 2
theory = kernels.committee_dmft(
  jax.random.key(0), kappa=kappa, neurons=committee_size, steps=steps, samples=2048, **setting
)


@functools.partial(jax.jit, static_argnames="features")
def simulate(key, features):
  keys = jax.random.split(key, 3)
  inputs = jax.random.normal(keys[0], (round(kappa * features), features)) / features**0.5
  teacher = jax.random.normal(keys[1], (features,))
  teacher = teacher * features**0.5 / jnp.linalg.norm(teacher)
  targets = (inputs @ teacher) ** 2 / 2
  options = {name: setting[name] for name in ("output_scale", "curvature")}
  rate = setting["learning_rate"] * committee_size / setting["output_scale"] ** 2
  loss = lambda w: jnp.sum((kernels.committee(w, inputs, **options) - targets) ** 2) / 2

  def step(weights, _):
    value, gradient = jax.value_and_grad(loss)(weights)
    test = sum(kernels.committee_risk(kernels.committee_statistics(weights), teacher, **options))
    return weights - rate * gradient, (2 * value / len(targets), test)

  return jax.lax.scan(step, jax.random.normal(keys[2], (committee_size, features)), None, length=steps + 1)[1]


figure, axes = plt.subplots(1, 2, figsize=(11, 3.8), sharey=True, layout="constrained")
for axis, dimension in zip(axes, (20, 400)):
  keys = jax.random.split(jax.random.key(1), 16)
  for color, name, values, curve in zip(
    ("C0", "C1"),
    ("training", "population"),
    jax.lax.map(lambda key: simulate(key, dimension), keys),
    (theory.train_loss, theory.test_loss),
  ):
    axis.plot(values.T, color, alpha=0.25, linewidth=0.8)
    axis.plot(curve, color, marker="o", linestyle="--", label=f"{name} loss, theory")
  axis.set(title=f"sixteen networks with D = {dimension}", xlabel="step", ylim=(0, 2))
  axis.legend(frameon=False)
plt.show()

# %% [markdown]
# **In code.** `kernels.committee` and its relatives are the model, `metrics.kernel_alignment` the alignment of any kernel,
# and `kernels.lazy_output` makes any network lazy by the same dial. `experiments/grokking_lazy_rich.py` checks the paper's
# claims over seeds; the numbers are in the [ledger](../experiments/LEDGER.md). For grokking in modular arithmetic, and a
# different reason for it, see `experiments/grokking_stability.py`.
