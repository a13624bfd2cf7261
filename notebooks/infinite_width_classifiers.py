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
# # What does a network become when it is infinitely wide, and then infinitely deep?
#
# A wide network trained by gradient descent on squared error is, in the limit of infinite width, a *kernel machine*: all
# that training does can be written down with one matrix, the **neural tangent kernel** (NTK). That makes questions
# answerable which are hopeless for finite networks. This notebook answers one of them: what kind of classifier is left
# when the depth grows without bound too?
#
# The answer (Radhakrishnan, Belkin and Uhler, *PNAS* 2023) is short. Depending on two numbers of the activation
# function, an infinitely deep network is
#
# - a **nearest-neighbour** classifier,
# - a **majority vote** that ignores its input, or
# - a vote weighted by a **singular kernel**, which can be made *consistent*: right in the limit of many examples, for
#   every distribution of the data.
#
# Everything below runs in about a minute on a laptop.

# %%
import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from jaxreg import kernels
from jaxreg.data import digits, split

jax.config.update("jax_enable_x64", True)  # kernels of deep networks are nearly singular matrices
plt.rcParams.update({"figure.dpi": 90, "axes.grid": True, "grid.alpha": 0.3})

# %% [markdown]
# ## Two kernels
#
# Let the weights of a network $f_\theta$ be random. Two kernels describe it:
#
# $$\Sigma(x, x') = \mathbb{E}\, f_\theta(x) f_\theta(x'), \qquad
#   \Theta(x, x') = \mathbb{E}\, \langle \nabla_\theta f_\theta(x), \nabla_\theta f_\theta(x') \rangle .$$
#
# The first, the NNGP kernel, is the covariance of the outputs at initialization. The second, the NTK, says how much a
# gradient step at $x'$ moves the output at $x$. For fully connected networks of infinite width both obey a recursion over
# layers,
#
# $$\Sigma_{l+1} = \check\varphi(\Sigma_l), \qquad
#   \Theta_{l+1} = \Sigma_{l+1} + \check\varphi'(\Sigma_l)\, \Theta_l ,$$
#
# where $\check\varphi(\xi) = \mathbb{E}\, \varphi(U)\varphi(V)$ for standard normal $U, V$ with correlation $\xi$ is the
# **dual** of the activation $\varphi$. For common activations it has a closed form; `jaxreg.kernels` has a function for
# each. Here they are, with a finite network beside them.

# %%
depth = 2
dual = kernels.normalize_dual(kernels.relu_dual())  # scaled to unit variance
angles = jnp.linspace(0, jnp.pi, 40)
circle = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=1)


def random_network(key, widths):
  """Standard normal weights; the scaling is in `apply_network`."""
  keys = jax.random.split(key, len(widths) - 1)
  return [jax.random.normal(k, (m, n)) for k, m, n in zip(keys, widths[:-1], widths[1:])]


def apply_network(weights, inputs):
  for layer in weights[:-1]:
    inputs = dual.activation(inputs @ layer / jnp.sqrt(layer.shape[0]) * scale(layer))
  return (inputs @ weights[-1])[:, 0] / jnp.sqrt(weights[-1].shape[0])


def scale(layer):
  return jnp.sqrt(layer.shape[0]) if layer.shape[0] == 2 else 1.0  # the inputs have unit norm, not unit variance


def tangent_kernel(key, width):
  weights = random_network(key, [2, *[width] * depth, 1])
  rows = jax.jacrev(apply_network)(weights, circle)
  flat = jnp.concatenate([row.reshape(len(circle), -1) for row in rows], axis=1)
  return flat @ flat[0]


closed = kernels.deep_ntk(kernels.sphere_gram(circle), depth=depth, dual=dual)[0]
figure, axis = plt.subplots(figsize=(6, 3.5))
for width, color in ((16, "C0"), (64, "C1"), (256, "C2")):
  for seed in range(3):
    values = jax.jit(tangent_kernel, static_argnums=1)(jax.random.key(seed), width)
    axis.plot(np.degrees(angles), values, color=color, alpha=0.5, label=f"width {width}" if seed == 0 else None)
axis.plot(np.degrees(angles), closed, "k--", label="infinite width")
axis.set(xlabel="angle between inputs in degrees", ylabel="NTK", title=f"ReLU network, {depth} hidden layers, 3 draws")
axis.legend(frameon=False)
plt.show()

# %% [markdown]
# The kernel of one random network concentrates at the closed form; its fluctuations shrink like $1/\sqrt{\text{width}}$.
#
# ## Training is linear algebra
#
# In the limit the NTK stays what it was at initialization, and gradient flow on squared error for a time $t$ predicts
#
# $$f_t(x) = \Theta(x, X)\, \Theta(X, X)^{-1} \bigl(1 - e^{-\Theta(X, X) t}\bigr)\, y .$$
#
# One eigendecomposition gives the whole trajectory. On scikit-learn's digits, 500 images for training:

# %%
train, test = split(digits(), sizes=(500, 1000))
flatten = lambda part: jnp.asarray(part["x"].reshape(len(part["x"]), -1), jnp.float64)
targets = kernels.class_targets(jnp.asarray(train["y"]), num_classes=10, dtype=jnp.float64)


@functools.partial(jax.jit, static_argnames="depth")
def tangent_kernels(inputs, others, depth):
  network = functools.partial(kernels.fully_connected, depth=depth, dual=kernels.relu_dual(), weight_variance=2.0)
  return network(inputs).ntk, network(others, inputs).ntk


times = np.geomspace(1e-3, 1e4, 22)
figure, axis = plt.subplots(figsize=(6, 3.5))
for layers in (1, 3, 10):
  gram, cross = tangent_kernels(flatten(train), flatten(test), layers)
  eigen = kernels.kernel_eigensystem(gram)
  errors = [
    jnp.mean(kernels.kernel_classify(cross, kernels.gradient_flow_coefficients(eigen, targets, time=t)) != test["y"])
    for t in times
  ]
  axis.loglog(times, errors, label=f"{layers} hidden layer{'s' if layers > 1 else ''}")
axis.set(xlabel="time of gradient flow", ylabel="test error", title="digits, infinitely wide ReLU networks")
axis.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Letting the depth grow
#
# Put the inputs on the unit sphere and normalize the activation, so that $\check\varphi(1) = 1$. Then depth is iteration
# of one function of one variable, $\check\varphi$, on the correlations $\xi = \langle x, x' \rangle \in [0, 1]$, and
# what happens is decided by how $\check\varphi$ behaves at its ends:
#
# - if $\check\varphi(0) > 0$ (an activation with a mean, such as ReLU), all correlations flow to one value: in the end
#   every pair of inputs looks alike, and the classifier takes a **majority vote**;
# - if $\check\varphi(0) = 0$ and $\check\varphi'(0) = 0$, correlations die out faster and faster, the largest most
#   slowly: only the **nearest neighbour** counts;
# - if $\check\varphi(0) = 0$ and $\check\varphi'(0) > 0$, they die out at the same rate, and dividing by it leaves a
#   kernel $\psi$ with a singularity at $\xi = 1$: a **weighted vote** of all examples.

# %%
activations = {
  "ReLU": kernels.normalize_dual(kernels.relu_dual()),
  "third Hermite polynomial": kernels.hermite_dual([0, 0, 0, 1]),
  "made for dimension 1": kernels.optimal_dual(1),
}
correlations = jnp.linspace(0, 1, 200)
figure, axes = plt.subplots(1, 3, figsize=(12, 3.5), sharey=True, layout="constrained")
for axis, (name, own) in zip(axes, activations.items()):
  for layers in (0, 1, 3, 10, 30):
    value = kernels.deep_nngp(correlations, depth=layers, dual=own)
    axis.plot(correlations, value, color=plt.cm.viridis(min(layers, 30) ** 0.5 / 6), label=f"{layers} layers")
  axis.set(title=f"{name}: {kernels.depth_taxonomy(own)}", xlabel="correlation of inputs")
axes[0].set(ylabel="correlation of features")
axes[0].legend(frameon=False)
plt.show()

# %% [markdown]
# ## The three classifiers at work
#
# Thirteen labelled points on a quarter of the circle, and what ridgeless kernel regression makes of them along it, from
# shallow to deep. Deep kernels vanish or explode between the points, which does not matter for the sign; so each curve is
# divided by the fit of a constant 1, and is a weighted mean of labels.

# %%
rng = np.random.default_rng(3)
positions = np.sort(rng.uniform(0, np.pi / 2, 13))
labels = jnp.asarray(np.where(rng.uniform(size=13) < 0.35 + 0.5 * (positions > 0.8), 1.0, -1.0))
on_circle = lambda angles: jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=1)
points, places = on_circle(positions), jnp.linspace(0, jnp.pi / 2, 500)
same, cross = kernels.sphere_gram(points), kernels.sphere_gram(on_circle(places), points)


@functools.partial(jax.jit, static_argnames=("dual", "depth"))
def predictor(dual, depth):
  gram = kernels.deep_ntk(same, depth=depth, dual=dual)
  coefficients = kernels.kernel_regression(gram, jnp.stack([labels, jnp.ones_like(labels)], axis=1))
  fit, constant = (kernels.deep_ntk(cross, depth=depth, dual=dual) @ coefficients).T
  return fit / constant


limits = {
  "ReLU": kernels.majority_vote(cross, labels),
  "third Hermite polynomial": kernels.nearest_neighbor_vote(cross, labels),
  "made for dimension 1": kernels.singular_vote(cross, labels, activations["made for dimension 1"]),
}
depths = {"ReLU": (1, 30, 3000), "third Hermite polynomial": (4, 6, 8), "made for dimension 1": (4, 12, 100)}
figure, axes = plt.subplots(1, 3, figsize=(12, 3.8), sharey=True, layout="constrained")
for axis, (name, own) in zip(axes, activations.items()):
  for layers, color in zip(depths[name], ("C0", "C1", "C2")):
    axis.plot(np.degrees(places), predictor(own, layers), color=color, alpha=0.8, label=f"{layers} layers")
  axis.plot(np.degrees(places), limits[name], "k--", linewidth=1, label="infinite depth")
  axis.plot(np.degrees(positions), labels, "r.", markersize=8)
  axis.set(title=name, xlabel="angle in degrees", ylim=(-1.6, 2.2))
  axis.legend(frameon=False, fontsize=8, ncols=2, loc="upper center")
axes[0].set(ylabel="weighted mean of labels")
plt.show()

# %% [markdown]
# ReLU slowly ends as a constant with needles at the training points (it interpolates, at the points only). The Hermite
# polynomial ends as steps between nearest neighbours. The third activation ends as a smooth compromise that trusts near
# points more, in just the right measure.
#
# ## The right measure
#
# Near $\xi = 1$ the limiting kernel behaves like $\lVert x - x' \rVert^{-a}$ with
# $a = -2 \log \check\varphi'(0) / \log \check\varphi'(1)$. A vote with such weights is the *Hilbert estimate*, which is
# consistent for every distribution when $a$ equals the dimension of the sphere. So one can choose an activation for a
# dimension. Data: two classes from Dirichlet distributions mapped to the sphere, for which the best possible error is
# known.

# %%
concentrations = [[1.0, 2.0], [2.0, 1.0]]
draw = functools.partial(kernels.dirichlet_sphere, concentrations=concentrations)
samples, sample_labels = draw(jax.random.key(0), 2000)
tests, test_labels = draw(jax.random.key(1), 1000)
signs = 2.0 * sample_labels - 1
best = jnp.mean((kernels.dirichlet_sphere_log_odds(tests, concentrations=concentrations) > 0) != test_labels)
sizes = [62, 125, 250, 500, 1000, 2000]
rules = {
  "made for dimension 1": lambda c, y: kernels.singular_vote(c, y, kernels.optimal_dual(1), iterations=50),
  "made for dimension 8": lambda c, y: kernels.singular_vote(c, y, kernels.optimal_dual(8), iterations=50),
  "nearest neighbour": kernels.nearest_neighbor_vote,
  "majority": kernels.majority_vote,
}
figure, axis = plt.subplots(figsize=(6, 3.8))
for name, rule in rules.items():
  errors = []
  for size in sizes:
    votes = rule(kernels.sphere_gram(tests, samples[:size]), signs[:size])
    errors.append(jnp.mean((votes > 0) != test_labels))
  axis.semilogx(sizes, errors, "o-", label=name)
axis.axhline(best, color="k", linestyle=":", label="best possible")
axis.set(xlabel="training examples", ylabel="test error", title="infinitely wide and deep networks on a circle")
axis.legend(frameon=False, fontsize=8, loc="center right", bbox_to_anchor=(1, 0.76))
plt.show()

# %% [markdown]
# The activation made for the dimension approaches the best possible error as examples accumulate. The one made for a
# higher dimension, whose kernel is more singular, behaves more like the nearest neighbour, which never gets there: it
# believes every single label. The majority learns nothing from the input.
#
# **In code.** `kernels.optimal_dual(d).activation` is the activation itself, to be used in a finite network;
# `experiments/wide_deep_kernels.py` checks the paper's claims, and the [ledger](../experiments/LEDGER.md) has the
# numbers.
