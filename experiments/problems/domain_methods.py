"""Fifteen methods of domain generalization as one task: digits that are coloured, rotated or corrupted."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.problems.corrupted_images import CORRUPTIONS, corrupted
from experiments.problems.distillation import index_data
from experiments.problems.domains import domain_parts
from jaxreg import regularizers
from jaxreg.adversarial import craft_domain
from jaxreg.data import bundled, colored_digits, rotate_images
from jaxreg.losses import domain_heads_loss, domain_mean, mixed_head_probabilities, weights_by_entropy
from jaxreg.models import MLP
from jaxreg.training import Task, TrainState, gradient_task
from jaxreg.transforms import fish, gam, reset_at, sagm, sam, udim_value_and_grad

__all__ = ["DERIVATIVES", "METHODS", "PROBLEMS", "SOURCES", "DomainProblem", "domain_task"]

_AT = CORRUPTIONS.index
# Source domains and target: how often the colour is not the label, degrees, places of corruptions.
PROBLEMS = {
  "colored": ((0.1, 0.2, 0.3), 0.9),
  "rotated": ((0.0, 20.0, 40.0), 65.0),
  "corrupted": ((_AT("blur"), _AT("contrast"), _AT("brightness")), _AT("Gaussian noise")),
}
SOURCES = 3
METHODS = (
  "ERM",
  "IRM",
  "V-REx",
  "CORAL",
  "MMD",
  "IGA",
  "Fish",
  "Fishr",
  "HGP",
  "Hutchinson",
  "SAM",
  "SAGM",
  "GAM",
  "UDIM",
  "DRM",
)
PENALTIES = ("IRM", "V-REx", "CORAL", "MMD", "IGA", "Fishr", "HGP", "Hutchinson")
DERIVATIVES = ("IRM", "V-REx", "IGA", "Fish", "Fishr", "HGP", "Hutchinson")  # that align risks or gradients


@dataclasses.dataclass(frozen=True)
class DomainProblem:
  """The MNIST subset at 14 × 14 pixels, in three source domains and a target, and how a method trains on it.

  Attributes:
    name: one of `PROBLEMS`.
    method: one of `METHODS`.
    leave_out: whether the source domain of hyperparameter `left_out` is not trained on.
    label_flip: fraction of wrong labels of coloured digits.
    train: images of each source domain; which images are where differs from seed to seed.
    valid: validation images of each source domain, and of the target.
    test: images of the target.
    features: width of the hidden layer.
    batch_size: images of each domain in a step.
    steps: of training; Fish, whose step sees one domain, takes as many for each.
    warm_up: fraction of the steps before the weights of penalties and of UDIM count; Adam then starts anew.
    decay: of Fishr's moving averages.
    step_size: length of UDIM's step in the images.
    test_batch: target images by which DRM chooses a head.
  """

  name: str = "colored"
  method: str = "HGP"
  leave_out: bool = False
  label_flip: float = 0.25
  train: int = 800
  valid: int = 200
  test: int = 1500
  features: int = 64
  batch_size: int = 64
  steps: int = 300
  warm_up: float = 0.25
  decay: float = 0.95
  step_size: float = 1.0
  test_batch: int = 50

  def __post_init__(self):
    for name, value, known in (("name", self.name, PROBLEMS), ("method", self.method, METHODS)):
      if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}.")
    if self.test % self.test_batch or self.valid % self.test_batch:
      raise ValueError(
        f"test_batch must divide {self.test} test and {self.valid} validation images, got {self.test_batch}."
      )

  @property
  def trained(self) -> int:
    """How many source domains are trained on."""
    return SOURCES - self.leave_out

  @property
  def updates(self) -> int:
    """Steps of the method."""
    return self.steps * (self.trained if self.method == "Fish" else 1)


@functools.cache
def _images() -> tuple[np.ndarray, np.ndarray]:
  data = bundled.mnist_subset()
  return data["x"].reshape(-1, 28, 28)[:, ::2, ::2], data["y"].astype(np.int32)


@functools.cache
def _corrupted() -> np.ndarray:
  """`[corruptions, images, 14, 14]`."""
  return np.stack([corrupted(_images()[0], name) for name in CORRUPTIONS])


def _place(config: DomainProblem, key, rows, domain):
  """Images `[rows, 14, 14, channels]` in a domain, and their labels."""
  images, labels = map(jnp.asarray, _images())
  if config.name == "colored":
    return colored_digits(
      key, images[rows, ..., None], labels[rows], color_flip=domain, label_flip=config.label_flip
    )[:2]  # fmt: skip
  if config.name == "rotated":
    return rotate_images(images[rows, ..., None], degrees=domain), labels[rows]
  return jnp.asarray(_corrupted())[domain, rows, ..., None], labels[rows]


def _network(config: DomainProblem):
  """Parameters by key, and features and logits by parameters: DRM's head has a leading axis of heads."""
  classes = 2 if config.name == "colored" else 10
  body = MLP((config.features,))
  heads = (config.trained + 1,) if config.method == "DRM" else ()

  def init(key):
    of_body, of_head = jax.random.split(key)
    channels = 2 if config.name == "colored" else 1
    kernel = jax.nn.initializers.lecun_normal()(of_head, (config.features, classes))
    head = {"kernel": jnp.broadcast_to(kernel, (*heads, *kernel.shape)), "bias": jnp.zeros((*heads, 1, classes))}
    params = body.init(of_body, jnp.zeros((1, 14, 14, channels)))["params"]
    return {"body": params, "head": head if heads else {**head, "bias": jnp.zeros(classes)}}

  features = lambda params, inputs: jax.nn.relu(body.apply({"params": params["body"]}, inputs))
  logits = lambda params, features: features @ params["head"]["kernel"] + params["head"]["bias"]
  return init, features, logits


def domain_task(config: DomainProblem) -> Task:
  """A method on a problem; hyperparameters are `learning_rate`, the methods' own, and `left_out`."""
  init_params, features, logits = _network(config)
  sources, target = PROBLEMS[config.name]

  def init(key, hparams):
    del hparams
    of_data, of_params = jax.random.split(key)
    sizes = dict(train=config.train, valid=config.valid, test=config.test, target_valid=config.valid)
    extra = domain_parts(
      of_data, functools.partial(_place, config), examples=len(_images()[1]), sources=sources, target=target, **sizes
    )
    params = init_params(of_params)
    if config.method == "Fishr":
      extra["fishr"] = regularizers.fishr_init(params["head"], environments=config.trained)
    return params, extra

  def trained_on(batch, extra, step, hparams):
    """`[environments, batch, ...]`, of which Fish sees one at a time."""
    domains = jnp.arange(config.trained)
    domains += (domains >= hparams["left_out"]) if config.leave_out else 0
    if config.method == "Fish":
      domains = domains[step % config.trained][None]
    return [jnp.swapaxes(extra["train"][name][batch["row"]], 0, 1)[domains] for name in "xy"]

  def risk(params, x, y):
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits(params, features(params, x)), y))

  def objective(params, extra, batch, context):
    x, y = trained_on(batch, extra, context.step, context.hparams)
    hidden = features(params, x.reshape(-1, *x.shape[2:])).reshape(*x.shape[:2], -1)
    decay = context.hparams["weight_decay"] / 2 * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))
    if config.method == "DRM":
      domains = jnp.repeat(jnp.arange(len(x)), x.shape[1])
      values = domain_heads_loss(logits(params, hidden.reshape(len(domains), -1)), y.ravel(), domains)
      return domain_mean(values, domains, num_domains=len(x)) + decay, (extra, {})
    losses = optax.softmax_cross_entropy_with_integer_labels(logits(params, hidden), y)
    if config.method not in PENALTIES:
      return jnp.mean(losses) + decay, (extra, {})
    if config.method == "IGA":
      gradients = jax.vmap(jax.grad(risk), (None, 0, 0))(params, x, y)
      penalty = regularizers.iga_penalty(gradients)
    elif config.method == "Fishr":
      penalty, averages = regularizers.fishr_penalty(hidden, y, params["head"], extra["fishr"], decay=config.decay)
      extra = {**extra, "fishr": averages}
    else:
      penalty = _penalty(config.method, hidden, logits(params, hidden), losses, y, params["head"])
    weight = _weight(config, context.step, context.hparams)
    return (jnp.mean(losses) + weight * penalty) / jnp.maximum(weight, 1), (extra, {})

  def evaluate(params, extra, hparams):
    return _measured(config, lambda x: logits(params, features(params, x)), extra, hparams)

  options = dict(
    data=index_data(config.train),
    batch_size=config.batch_size,
    hparams={
      "learning_rate": 1e-3, "weight_decay": 0.0, "weight": 0.0, "rho": 0.05, "meta_rate": 0.5,
      "left_out": SOURCES,
    },
    config=config,
  )  # fmt: skip
  optimizer = functools.partial(_optimizer, config)
  plain = gradient_task(
    init, objective, optimizer, evaluate=evaluate, predict=lambda params, extra, x: logits(params, features(params, x)),
    **options,
  )  # fmt: skip
  if config.method != "UDIM":
    return plain

  def step(state: TrainState, batch, hparams):
    x, y = trained_on(batch, state.extra, state.step, hparams)
    gradient_fn = udim_value_and_grad(
      lambda params, inputs: (features(params, inputs), params["head"]),
      functools.partial(craft_domain, step_size=config.step_size, rho=hparams["rho"]),
      weight=_weight(config, state.step, hparams), rho=hparams["rho"],
    )  # fmt: skip
    (loss, _), gradient = gradient_fn(state.params, x.reshape(-1, *x.shape[2:]), y.ravel())
    updates, opt_state = optimizer(hparams).update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return state.advance(params=params, opt_state=opt_state), {"loss": loss}

  return plain.replace(step=step, make_step=None)


def _weight(config: DomainProblem, step, hparams):
  return jnp.where(step >= int(config.warm_up * config.steps), hparams["weight"], 0.0)


def _optimizer(config: DomainProblem, hparams) -> optax.GradientTransformation:
  adam = optax.adam(hparams["learning_rate"])
  rho, method = hparams["rho"], config.method
  if method == "Fish":
    return fish(adam, environments=config.trained, meta_learning_rate=hparams["meta_rate"])
  if method in (*PENALTIES, "UDIM"):
    return reset_at(adam, int(config.warm_up * config.steps))
  return {
    "SAM": lambda: sam(adam, rho=rho),
    "SAGM": lambda: sagm(adam, rho=rho),
    "GAM": lambda: gam(adam, rho=rho, rho_norm=rho),
  }.get(method, lambda: adam)()


def _penalty(method: str, features, logits, losses, labels, head):
  return {
    "IRM": lambda: regularizers.irm_penalty(logits, labels, split=False),
    "V-REx": lambda: regularizers.vrex_penalty(losses),
    "CORAL": lambda: regularizers.coral_penalty(features),
    "MMD": lambda: regularizers.mmd_penalty(features),
    "HGP": lambda: regularizers.hgp_penalty(features, labels, head, product_weight=1.0, gradient_weight=1.0),
    "Hutchinson": lambda: regularizers.hutchinson_penalty(
      features, labels, head, diagonal_weight=1.0, gradient_weight=1.0
    ),
  }[method]()


def _measured(config: DomainProblem, logits, extra, hparams) -> dict[str, jax.Array]:
  """Accuracies on validation images of each source domain, the left-out one among them, and on the target."""

  def right(x, y, own=None):
    found = logits(x)
    if config.method != "DRM":
      return jnp.mean(found.argmax(-1) == y)
    if own is not None:
      return jnp.mean(found[own].argmax(-1) == y)
    size = min(config.test_batch, len(y))
    batches = jnp.swapaxes(found.reshape(len(found), -1, size, found.shape[-1]), 0, 1)
    chosen = jax.vmap(lambda heads: mixed_head_probabilities(heads, weights_by_entropy(heads)).argmax(-1))(batches)
    return jnp.mean(chosen.ravel() == y)

  valid = extra["valid"]
  found = {"target": right(**extra["target"]), "target valid": right(**extra["target_valid"])}
  if config.leave_out:
    of_left_out = {name: jnp.take(valid[name], jnp.asarray(hparams["left_out"], int), axis=1) for name in "xy"}
    return found | {"left out": right(**of_left_out)}
  return found | {
    f"valid {index}": right(valid["x"][:, index], valid["y"][:, index], index) for index in range(SOURCES)
  }
