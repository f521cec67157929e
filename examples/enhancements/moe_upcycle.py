# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Upcycles a dense model and trains it on, with balanced experts.

By default the dense model is a small one on the bytes of the text, trained here
first, and all three ways to balance are compared. With a checkpoint, its own
tokens. A real 270M wants an accelerator; without one, `--last=2` upcycles the
last layers alone. What they read comes from the frozen ones below, computed
once, and the vocabulary is cut to the tokens that occur:

python examples/enhancements/moe_upcycle.py [--json=out/balance.json] \
    [--png=out/balance] [--checkpoint=gemma3-270m --last=2]
"""

import argparse
import dataclasses
import json
import pathlib
import time

from flax import linen as nn
from gemma import gm
import jax
import jax.numpy as jnp
import numpy as np
import optax

from gemma_ext import ckpts
from gemma_ext import compress
from gemma_ext import data
from gemma_ext import nn as gx_nn
from gemma_ext import train

# Of the default model, a Gemma 3 in everything but size.
_SMALL = dict(
  num_embed=264,
  embed_dim=64,
  hidden_dim=128,
  num_heads=2,
  head_dim=32,
  num_kv_heads=1,
  attention_types=gm.nn.Gemma3_270M.config.attention_types[2:6],
)
_TRIALS = {
  'none': {'router': 'softmax', 'weight': 0.0, 'rate': 0.0},
  'loss': {'router': 'softmax', 'weight': 0.1, 'rate': 0.0},
  'bias': {'router': 'sigmoid', 'weight': 0.0, 'rate': 1e-2},
}


def batches(rows: dict, size: int, seed: int):
  """Endless batches of rows."""
  rng = np.random.default_rng(seed)
  count = len(rows['tokens'])
  while True:
    order = rng.permutation(count)[: count // size * size]
    for part in np.split(order, count // size):
      yield {k: jnp.asarray(v[part]) for k, v in rows.items()}


def run(model, params, batch):
  """Logits of all tokens but the last, and what was sown.

  Where rows have 'states', these are what the first layer reads.
  """

  def encode(next_fun, args, kwargs, context):
    if context.method_name == 'encode' and 'states' in batch:
      return batch['states']
    return next_fun(*args, **kwargs)

  with nn.intercept_methods(encode):
    out, sown = model.apply(
      {'params': params}, batch['tokens'][:, :-1], mutable=['intermediates']
    )
  return out.logits, sown.get('intermediates')


def fit(model, params, rows, *, steps, batch, learning_rate, weight, rate):
  """Trains on text; `rate` of the biases falls to a tenth."""
  optimizer = optax.chain(
    optax.clip_by_global_norm(1.0)
    if weight is None
    else optax.masked(optax.clip_by_global_norm(1.0), train.floating),
    optax.masked(optax.adam(learning_rate), train.floating),
    gx_nn.freeze_codes(),
  )

  @jax.jit
  def step(params, state, batch, rate):
    def loss(params):
      logits, sown = run(model, params, batch)
      error = cross_entropy(logits, batch['tokens'])
      if weight:
        found = train.routing(sown)
        error += weight * train.load_balance(found).mean()
        error += 1e-3 * train.router_z(found).mean()
      return error, sown

    grads, sown = jax.grad(loss, has_aux=True, allow_int=True)(params)
    updates, state = optimizer.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    if weight is not None:
      params = train.balance(params, sown, rate)
    return params, state

  state = optimizer.init(params)
  source = batches(rows, batch, seed=0)
  for i in range(steps):
    now = rate * 0.1 ** (i / steps)
    params, state = step(params, state, next(source), now)
  return params


def cross_entropy(logits, tokens):
  """Mean over the tokens that are no padding."""
  target = tokens[:, 1:]
  mask = target != 0
  each = optax.softmax_cross_entropy_with_integer_labels(
    logits.astype(jnp.float32), target
  )
  return (each * mask).sum() / mask.sum()


def evaluate(model, params, rows) -> tuple[float, dict]:
  """Cross-entropy of rows, a few at a time, and their routing, if any."""

  @jax.jit
  def of(params, batch):
    logits, sown = run(model, params, batch)
    found = train.routing(sown) if sown else {}
    return cross_entropy(logits, batch['tokens']), found

  size = min(8, len(rows['tokens']))
  parts = []
  for i in range(0, len(rows['tokens']) - size + 1, size):
    part = {k: jnp.asarray(v[i : i + size]) for k, v in rows.items()}
    parts.append(jax.device_get(of(params, part)))
  loss, found = jax.tree.map(lambda *x: np.mean(x, axis=0), *parts)
  return float(loss), found


def cut(model, params, rows):
  """Leaves out all tokens that do not occur in the rows.

  The others are numbered anew, from 1, as 0 is padding.
  """
  kept, numbers = np.unique(np.concatenate(rows), return_inverse=True)
  numbers = numbers.reshape(-1, rows[0].shape[1]).astype(np.int32) + 1
  table = params['embedder']['input_embedding']
  table = jnp.concatenate([jnp.zeros_like(table[:1]), table[kept]])
  config = dataclasses.replace(model.config, num_embed=len(table))
  embedder = params['embedder'] | {'input_embedding': table}
  made = model.clone(config=config), params | {'embedder': embedder}
  return *made, np.split(numbers, [len(rows[0])])


def tail(model, params, rows, count: int):
  """The last layers as a model, and rows with what they read."""
  types = model.config.attention_types
  first = len(types) - count
  name = f'layer_{first - 1}'

  @jax.jit
  def states(params, tokens):
    _, state = model.apply(
      {'params': params},
      tokens,
      capture_intermediates=lambda m, _: m.name == name,
      mutable=['intermediates'],
    )
    return state['intermediates'][name]['__call__'][0][1]

  found = []
  for part in rows:
    read = [np.asarray(states(params, x[None, :-1])[0]) for x in part]
    found.append({'tokens': part, 'states': np.stack(read)})
  layers = {f'layer_{i}': params[f'layer_{first + i}'] for i in range(count)}
  rest = {k: v for k, v in params.items() if not k.startswith('layer_')}
  config = dataclasses.replace(model.config, attention_types=types[first:])
  return model.clone(config=config), rest | layers, *found


def start(args):
  """Dense model, parameters, and rows of tokens to train and to test on."""
  if args.checkpoint:
    found = ckpts.load(args.checkpoint, dtype=jnp.float32)
    splits = data.split(data.load_documents(args.text), seed=0)
    rows = []
    for part, count in (
      (splits.calibration, args.tokens),
      (splits.test, args.test_tokens),
    ):
      tokens = data.windows(
        found.tokenizer, part.documents, length=args.length, max_tokens=count
      ).tokens
      rows.append(tokens[(tokens != 0).all(axis=1)])
    if not args.last:
      return found.model, found.params, *({'tokens': r} for r in rows)
    model, params, rows = cut(found.model, found.params, rows)
    return tail(model, params, rows, args.last)
  config = dataclasses.replace(gm.nn.Gemma3_270M.config, **_SMALL)
  model = gm.nn.Gemma3_270M(config=config, dtype=jnp.float32)
  splits = data.split(data.load_documents(args.text), seed=0)
  rows = []
  for part, count in (
    (splits.calibration, args.tokens),
    (splits.test, args.test_tokens),
  ):
    text = '\n'.join(d.text for d in part.documents).encode()[:count]
    bytes_ = np.frombuffer(text, np.uint8).astype(np.int32) + 4
    body = bytes_[: len(bytes_) // args.length * args.length]
    body = body.reshape(-1, args.length)
    body = np.pad(body, ((0, 0), (1, 0)), constant_values=2)
    rows.append({'tokens': body})
  params = model.init(jax.random.key(0), jnp.ones((1, 4), jnp.int32))['params']
  params = fit(
    model,
    params,
    rows[0],
    steps=2 * args.steps,
    batch=args.batch,
    learning_rate=3e-3,
    weight=None,
    rate=0.0,
  )
  return model, params, *rows


def main():
  """Upcycles, trains, and prints loads and losses."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--checkpoint', default='')
  parser.add_argument('--text', default='sample')
  parser.add_argument('--steps', type=int, default=300)
  parser.add_argument('--batch', type=int, default=8)
  parser.add_argument('--length', type=int, default=128)
  parser.add_argument('--experts', type=int, default=8)
  parser.add_argument('--top_k', type=int, default=2)
  parser.add_argument('--learning_rate', type=float, default=1e-3)
  parser.add_argument('--tokens', type=int, default=400_000)
  parser.add_argument('--test_tokens', type=int, default=16_000)
  parser.add_argument('--last', type=int, default=0)
  parser.add_argument('--weight', type=float, default=_TRIALS['loss']['weight'])
  parser.add_argument('--balance', default='none,loss,bias')
  parser.add_argument('--output', type=pathlib.Path)
  parser.add_argument('--json', type=pathlib.Path)
  parser.add_argument('--png', type=pathlib.Path)
  args = parser.parse_args()
  began = time.time()
  dense, params, rows, test = start(args)
  names = ('checkpoint', 'last', 'steps', 'batch', 'length', 'learning_rate')
  names += ('experts', 'top_k', 'tokens')
  result = {
    'settings': {k: getattr(args, k) for k in names},
    'test_tokens': int(test['tokens'][:, 1:].size),
    'dense': evaluate(dense, params, test)[0],
    'trials': {},
  }
  print(f'dense: {result["dense"]:.4f}', flush=True)
  if args.json and args.json.exists():
    # Trials of an earlier run with the same settings stay.
    before = json.loads(args.json.read_text())
    if before['settings'] == result['settings']:
      result['trials'] = before['trials']
  for name in args.balance.split(','):
    trial = dict(_TRIALS[name])
    if name == 'loss':
      trial['weight'] = args.weight
    wider, made, recipe = compress.upcycle(
      dense,
      params,
      num_experts=args.experts,
      top_k=args.top_k,
      router=trial['router'],
    )
    model = gx_nn.Compressed(model=wider, recipe=recipe)
    # Traces of another trial hold its states.
    jax.clear_caches()
    made = fit(
      model,
      made,
      rows,
      steps=args.steps,
      batch=args.batch,
      learning_rate=args.learning_rate,
      weight=trial['weight'],
      rate=trial['rate'],
    )
    jax.clear_caches()
    loss, found = evaluate(model, made, test)
    loads = {p: train.relative_load(x).tolist() for p, x in found.items()}
    every = np.concatenate([*loads.values()])
    result['trials'][name] = {
      **trial,
      'loss': loss,
      'loads': loads,
      'entropy': {p: train.routing_entropy(x) for p, x in found.items()},
    }
    print(
      f'{name}: {result["trials"][name]["loss"]:.4f}, loads relative to the'
      f' mean {every.min():.2f} to {every.max():.2f}, lowest entropy'
      f' {min(result["trials"][name]["entropy"].values()):.3f}',
      flush=True,
    )
    if args.json:
      args.json.write_text(json.dumps(result, indent=1) + '\n')
    if args.png:
      train.plot_routing(found, f'{args.png}_{name}.png')
    if args.output:
      ckpts.save(args.output / name, model=model, params=made)
  print(f'{time.time() - began:.0f} s')


if __name__ == '__main__':
  main()
