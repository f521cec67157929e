# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Upcycles a dense model and trains it on, with balanced experts.

By default the dense model is a small one on the bytes of the text, trained here
first, and all three ways to balance are compared. With a checkpoint, its own
tokens. Without an accelerator that takes a cut: `--train_layers` upcycles the
last layers alone, all others stay as they are, and `--cut_vocabulary` leaves
out the tokens that do not occur in the text.

python examples/enhancements/moe_upcycle.py [--json=out/balance.json] \
    [--png=out/balance] [--checkpoint=gemma3-270m --output=out/upcycled]
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import time

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
_PATHS = ('json', 'png', 'output')
_TRIALS = {
  'none': {'router': 'softmax', 'weight': 0.0, 'rate': 0.0},
  'loss': {'router': 'softmax', 'weight': 1e-1, 'rate': 0.0},
  'bias': {'router': 'sigmoid', 'weight': 0.0, 'rate': 1e-2},
}


def batches(rows: np.ndarray, size: int, seed: int):
  """Endless batches of rows."""
  rng = np.random.default_rng(seed)
  while True:
    for part in np.split(
      rng.permutation(len(rows))[: len(rows) // size * size], len(rows) // size
    ):
      yield jnp.asarray(rows[part])


def last_layers(params, count: int) -> tuple[dict, dict]:
  """The mixtures of the last layers, all if 0, and all other parameters."""
  if not count:
    return params, {}
  layers = sum(name.startswith('layer_') for name in params)
  names = [f'layer_{i}' for i in range(layers - count, layers)]
  train_ = {n: {'mlp': params[n]['mlp']} for n in names}
  rest = {n: {k: v for k, v in params[n].items() if k != 'mlp'} for n in names}
  return train_, {k: v for k, v in params.items() if k not in names} | rest


def joined(train_, rest):
  """The parameters again."""
  return rest | {k: rest.get(k, {}) | v for k, v in train_.items()}


def fit(
  model, params, rows, *, steps, batch, learning_rate, weight, rate, layers=0
):
  """Trains on text; `rate` of the biases falls to a tenth."""
  params, rest = last_layers(params, layers)
  optimizer = optax.chain(
    optax.clip_by_global_norm(1.0)
    if weight is None
    else optax.masked(optax.clip_by_global_norm(1.0), train.floating),
    optax.masked(optax.adam(learning_rate), train.floating),
    gx_nn.freeze_codes(),
  )

  @jax.jit
  def step(params, rest, state, tokens, rate):
    def loss(params):
      out, sown = model.apply(
        {'params': joined(params, rest)},
        tokens[:, :-1],
        mutable=['intermediates'],
      )
      error = cross_entropy(out.logits, tokens)
      sown = sown.get('intermediates', {})
      sown = {k: v for k, v in sown.items() if k in params}
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
    params, state = step(params, rest, state, next(source), now)
  return joined(params, rest)


def cross_entropy(logits, tokens):
  """Mean over the tokens that are no padding."""
  target = tokens[:, 1:]
  mask = target != 0
  each = optax.softmax_cross_entropy_with_integer_labels(
    logits.astype(jnp.float32), target
  )
  return (each * mask).sum() / mask.sum()


def evaluate(model, params, rows) -> float:
  """Cross-entropy of rows, a few at a time."""
  of = jax.jit(
    lambda p, x: cross_entropy(model.apply({'params': p}, x[:, :-1]).logits, x)
  )
  parts = np.array_split(rows, max(1, len(rows) // 8))
  parts = [p for p in parts if len(p) == len(parts[0])]
  return float(np.mean([of(params, jnp.asarray(p)) for p in parts]))


def cut(model, params, rows):
  """Leaves out all tokens that do not occur in the rows."""
  kept, numbers = np.unique(np.concatenate([*rows]), return_inverse=True)
  # No padding among them: windows are whole.
  assert kept[0] != 0
  table = params['embedder']['input_embedding']
  table = jnp.concatenate([jnp.zeros_like(table[:1]), table[kept]])
  numbers = numbers.reshape(-1, rows[0].shape[1]).astype(np.int32) + 1
  config = dataclasses.replace(model.config, num_embed=len(table))
  embedder = params['embedder'] | {'input_embedding': table}
  first, second = np.split(numbers, [len(rows[0])])
  return (
    model.clone(config=config),
    params | {'embedder': embedder},
    first,
    second,
  )


def start(args):
  """Dense model, parameters, and rows of tokens to train and to test on."""
  if args.checkpoint:
    found = ckpts.load(args.checkpoint, dtype=jnp.float32)
    splits = data.split(data.load_documents(args.text), seed=0)
    rows = [
      data.windows(
        found.tokenizer, part.documents, length=args.length, max_tokens=count
      ).tokens
      for part, count in (
        (splits.calibration, args.tokens),
        (splits.test, args.test_tokens),
      )
    ]
    rows = [r[(r != 0).all(axis=1)] for r in rows]
    if args.cut_vocabulary:
      return cut(found.model, found.params, rows)
    return found.model, found.params, *rows
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
    rows.append(np.pad(body, ((0, 0), (1, 0)), constant_values=2))
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
  parser.add_argument('--train_layers', type=int, default=0)
  parser.add_argument('--cut_vocabulary', action='store_true')
  parser.add_argument('--balance', default='none,loss,bias')
  parser.add_argument('--measured', type=int, default=64)
  parser.add_argument('--output', type=pathlib.Path)
  parser.add_argument('--json', type=pathlib.Path)
  parser.add_argument('--png', type=pathlib.Path)
  args = parser.parse_args()
  began = time.time()
  dense, params, rows, test = start(args)
  result = {
    'settings': {k: v for k, v in vars(args).items() if k not in _PATHS},
    'dense': evaluate(dense, params, test),
    'trials': {},
  }
  print(f'dense: {result["dense"]:.4f}', flush=True)
  for name in args.balance.split(','):
    trial = _TRIALS[name]
    wide = functools.partial(
      compress.upcycle,
      dense,
      params,
      num_experts=args.experts,
      top_k=args.top_k,
      router=trial['router'],
    )
    wider, made, recipe = wide()
    if args.train_layers:
      # Copies with nothing drawn anew compute what the dense layer does.
      _, rest = last_layers(wide(reinitialise=0)[1], args.train_layers)
      made = joined(last_layers(made, args.train_layers)[0], rest)
    model = gx_nn.Compressed(model=wider, recipe=recipe)
    made = fit(
      model,
      made,
      rows,
      steps=args.steps,
      batch=args.batch,
      learning_rate=args.learning_rate,
      weight=trial['weight'],
      rate=trial['rate'],
      layers=args.train_layers,
    )
    found = train.measure_routing(model, made, test[: args.measured])
    mine = last_layers(made, args.train_layers)[0]
    found = {p: x for p, x in found.items() if p.split('/')[0] in mine}
    loads = {p: train.relative_load(x).tolist() for p, x in found.items()}
    every = np.concatenate([*loads.values()])
    result['trials'][name] = {
      'loss': evaluate(model, made, test),
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
