# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Experts that grow with a task and are pruned with it, against a fixed number.

A mixture learns a function that is another one in each of several regions. A
third of the way in, the regions become more; later they become few again. The
plastic mixture has as many experts as the fixed one at the start, and one of
them a token, as the fixed one: the same active parameters throughout. A third
one has all slots filled from the start.

python examples/enhancements/moe_plasticity.py [--seeds=8] \
    [--json=out/plasticity.json] [--png=out/plasticity.png]
"""

import argparse
import functools
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gemma_ext import MoE
from gemma_ext import nn as gx_nn
from gemma_ext import train

FEATURES, SLOTS, NEURONS, START = 16, 16, 8, 4
# Of the linear maps, so that an expert has neurons enough for one region.
RANK = 4
# Regions of the three parts of the training, and steps of each.
REGIONS, STEPS = (4, 12, 4), (1200, 1500, 1500)
BATCH, WINDOW = 256, 30
# Of what the losses are the mean over, at the end of a part.
TEST = 8192

METHOD = MoE(num_experts=SLOTS, top_k=1, router='norm')
LAYER = gx_nn.Mixture(
  path='mlp', method=METHOD, features=FEATURES, hidden=SLOTS * NEURONS
)
SETTINGS = train.Plasticity(least=START)
# Of Adam, falling to a tenth within a part. Routers move slower, so that
# experts keep their regions.
RATE, ROUTER_RATE = 1e-2, 1e-3


def task(seed: int, regions: int):
  """Centres of the regions, and a linear map and a wave for each of them."""
  rng = np.random.default_rng(seed)
  most = max(REGIONS)
  centres = rng.standard_normal((most, FEATURES)) * 1.2
  first = rng.standard_normal((most, FEATURES, RANK))
  second = rng.standard_normal((most, RANK, FEATURES))
  maps = first @ second * (FEATURES * RANK) ** -0.5

  def draw(rng: np.random.Generator, count: int):
    region = rng.integers(0, regions, count)
    x = centres[region] + 0.5 * rng.standard_normal((count, FEATURES))
    y = np.einsum('nd,nde->ne', x, maps[region])
    y = np.tanh(y) + 0.3 * np.sin(2 * y)
    return x.astype(np.float32), y.astype(np.float32)

  return draw


def start(seed: int, experts: int):
  """Parameters of a layer with so many experts, named as official ones."""
  gate, down, router = jax.random.split(jax.random.key(seed), 3)
  hidden = LAYER.hidden
  w = jax.random.normal(router, (SLOTS, FEATURES)) * FEATURES**-0.5
  params = {
    'mlp': {
      'gating_einsum': jax.random.normal(gate, (2, hidden, FEATURES))
      * FEATURES**-0.5,
      'linear': jax.random.normal(down, (hidden, FEATURES)) * NEURONS**-0.5,
      'router': {
        'w': w,
        'bias': jnp.zeros(SLOTS),
        'k': jnp.int32(1),
        'threshold': jnp.float32(-1e30),
      },
    }
  }
  return train.keep_experts(params, LAYER, experts)


def apply(params, x):
  """The layer, and what it sows."""
  layer = params['mlp']
  choice = gx_nn.route(METHOD, layer['router'], x)
  gate, up = jnp.einsum('nd,chd->cnh', x, layer['gating_einsum'])
  gates = choice.gates()
  hidden = jax.nn.gelu(gate) * up * jnp.repeat(gates, NEURONS, axis=-1)
  load = (gates != 0).mean(axis=0)
  sown = {
    'load': load,
    'probability': jax.nn.softmax(choice.logits).mean(axis=0),
    'z': jnp.mean(jax.nn.logsumexp(choice.logits, axis=-1) ** 2),
    'active': load.sum() / SLOTS,
  }
  return hidden @ layer['linear'], {'mlp': {'routing': (sown,)}}


def optimizer():
  """Adam, and integers that stay."""

  def slower(path, update):
    factor = ROUTER_RATE / RATE if 'router' in jax.tree_util.keystr(path) else 1
    return (update * factor).astype(update.dtype)

  return optax.chain(
    optax.masked(optax.adam(RATE), train.floating),
    gx_nn.freeze_codes(),
    optax.stateless(
      lambda updates, _: jax.tree_util.tree_map_with_path(slower, updates)
    ),
  )


@functools.partial(jax.jit, donate_argnums=(0, 1))
def step(params, state, x, y, rate):
  """One step of Adam on the squared error."""

  def loss(params):
    out, sown = apply(params, x)
    return jnp.mean((out - y) ** 2), sown

  grad = jax.value_and_grad(loss, has_aux=True, allow_int=True)
  (error, sown), grads = grad(params)
  updates, state = optimizer().update(grads, state, params)
  updates = jax.tree.map(lambda u: (u * rate).astype(u.dtype), updates)
  params = optax.apply_updates(params, updates)
  grads = {'mlp': {k: grads['mlp'][k] for k in ('gating_einsum', 'linear')}}
  return params, state, error, sown, grads


@jax.jit
def error_of(params, x, y):
  """Mean squared error."""
  return jnp.mean((apply(params, x)[0] - y) ** 2)


def run(seed: int, experts: int, *, plastic: bool, log=None):
  """Trains through all parts; returns a record."""
  params = start(seed, experts)
  state = optimizer().init(params)
  growth = train.Plastic(SETTINGS, {'mlp': LAYER}, log=log, seed=seed)
  rng = np.random.default_rng(1000 + seed)
  record = {'experts': [], 'loss': [], 'ends': [], 'jumps': []}
  number = 0
  for regions, steps in zip(REGIONS, STEPS, strict=True):
    draw = task(seed, regions)
    test = draw(np.random.default_rng(2000 + seed), TEST)
    total = 0.0
    for i in range(steps):
      x, y = draw(rng, BATCH)
      rate = 0.1 ** (i / steps)
      params, state, error, sown, grads = step(params, state, x, y, rate)
      if plastic:
        growth.observe(sown, grads)
      total += error
      number += 1
      # Not in the last windows of a part, so that nothing newborn is measured.
      if (i + 1) % WINDOW == 0:
        if plastic:
          before = float(error_of(params, *test))
          params, state, events = growth.update(
            number, params, state, inputs={'mlp': test[0][:1024]}
          )
          if events and all(e.kind == 'birth' for e in events):
            after = float(error_of(params, *test))
            record['jumps'].append(abs(after - before) / before)
        record['experts'].append(int(train.live_experts(params, LAYER).sum()))
        record['loss'].append(round(float(total) / WINDOW, 5))
        total = 0.0
    record['ends'].append(float(error_of(params, *test)))
  return record | {'events': growth.records}


def interval(values, draws=10_000):
  """Mean of logs as a ratio, with a bootstrap interval of 95%."""
  logs = np.log(values)
  rng = np.random.default_rng(0)
  means = logs[rng.integers(0, len(logs), (draws, len(logs)))].mean(axis=1)
  return [
    float(np.exp(v)) for v in (logs.mean(), *np.quantile(means, (0.025, 0.975)))
  ]


def main():
  """Runs all seeds, prints a table and writes the results."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--seeds', type=int, default=8)
  parser.add_argument('--first', type=int, default=0)
  parser.add_argument('--json', type=pathlib.Path)
  parser.add_argument('--png', type=pathlib.Path)
  parser.add_argument('--log', type=pathlib.Path)
  args = parser.parse_args()
  began = time.time()
  runs = {'plastic': [], 'fixed': [], 'full': []}
  for seed in range(args.first, args.first + args.seeds):
    runs['plastic'].append(run(seed, START, plastic=True, log=args.log))
    runs['fixed'].append(run(seed, START, plastic=False))
    runs['full'].append(run(seed, SLOTS, plastic=False))
    print(
      f'seed {seed}:',
      {
        name: [f'{v:.4f}' for v in found[-1]['ends']]
        for name, found in runs.items()
      },
      'experts at the ends',
      [
        runs['plastic'][-1]['experts'][sum(STEPS[: i + 1]) // WINDOW - 1]
        for i in range(len(STEPS))
      ],
      flush=True,
    )
  ends = {k: np.array([r['ends'] for r in v]) for k, v in runs.items()}
  ratios = {
    f'plastic / {other}': [
      interval(ends['plastic'][:, i] / ends[other][:, i])
      for i in range(len(STEPS))
    ]
    for other in ('fixed', 'full')
  }
  for name, parts in ratios.items():
    for part, (mid, low, high) in zip(REGIONS, parts, strict=True):
      print(f'{name}, {part} regions: {mid:.3f} [{low:.3f}, {high:.3f}]')
  jumps = [j for r in runs['plastic'] for j in r['jumps']]
  print(
    f'largest change of the loss at a division: {max(jumps, default=0):.1e}'
  )
  print(f'{time.time() - began:.0f} s')
  if args.json:
    args.json.write_text(
      json.dumps(
        {
          'regions': REGIONS,
          'steps': STEPS,
          'window': WINDOW,
          'ratios': ratios,
          'largest_jump': max(jumps, default=0),
          'runs': runs,
        }
      )
      + '\n'
    )
  if args.png:
    plot(runs, args.png)


def plot(runs, path):
  """Experts and loss by step, all seeds."""
  import matplotlib.figure  # pylint: disable=g-import-not-at-top

  figure = matplotlib.figure.Figure(figsize=(8.4, 5.4), layout='constrained')
  top, bottom = figure.subplots(2, sharex=True)
  colors = {'plastic': '#D55E00', 'fixed': '#0072B2', 'full': '#009E73'}
  for name, found in runs.items():
    for key, axis in (('experts', top), ('loss', bottom)):
      values = np.array([r[key] for r in found])
      steps = WINDOW * (1 + np.arange(values.shape[1]))
      axis.plot(steps, values.T, color=colors[name], alpha=0.25, lw=0.8)
      axis.plot(
        steps, values.mean(axis=0), color=colors[name], label=name, lw=2
      )
  for axis in (top, bottom):
    for edge in np.cumsum(STEPS)[:-1]:
      axis.axvline(edge, color='#767676', ls='--', lw=0.8)
    axis.spines[['top', 'right']].set_visible(False)
  top.set_ylabel('experts of a layer')
  top.legend(frameon=False)
  bottom.set_yscale('log')
  bottom.set_ylabel('training loss')
  bottom.set_xlabel('step')
  figure.savefig(path, dpi=120)


if __name__ == '__main__':
  main()
