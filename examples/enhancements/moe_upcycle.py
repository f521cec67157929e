# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Upcycles a dense model and trains it on, with balanced experts.

By default the dense model is a small one on the bytes of the text, trained here
first, and all three ways to balance are compared. With a checkpoint, its own
tokens (a real 270M wants an accelerator):

python examples/enhancements/moe_upcycle.py [--json=out/balance.json] \
    [--png=out/balance] [--checkpoint=gemma3-270m --output=out/upcycled]
"""

import argparse
import dataclasses
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
_TRIALS = {
  'none': {'router': 'softmax', 'weight': 0.0, 'rate': 0.0},
  'loss': {'router': 'softmax', 'weight': 3e-2, 'rate': 0.0},
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
  def step(params, state, tokens, rate):
    def loss(params):
      out, sown = model.apply(
        {'params': params}, tokens[:, :-1], mutable=['intermediates']
      )
      error = cross_entropy(out.logits, tokens)
      if weight:
        found = train.routing(sown['intermediates'])
        error += weight * train.load_balance(found).mean()
        error += 1e-3 * train.router_z(found).mean()
      return error, sown.get('intermediates')

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


def evaluate(model, params, rows) -> float:
  """Cross-entropy of rows, a few at a time."""
  of = jax.jit(
    lambda p, x: cross_entropy(model.apply({'params': p}, x[:, :-1]).logits, x)
  )
  parts = np.array_split(rows, max(1, len(rows) // 8))
  parts = [p for p in parts if len(p) == len(parts[0])]
  return float(np.mean([of(params, jnp.asarray(p)) for p in parts]))


def start(args):
  """Dense model, parameters, and rows of tokens to train and to test on."""
  if args.checkpoint:
    found = ckpts.load(args.checkpoint)
    splits = data.split(data.load_documents(args.text), seed=0)
    rows = [
      data.windows(
        found.tokenizer, part.documents, length=args.length, max_tokens=count
      ).tokens
      for part, count in ((splits.calibration, 400_000), (splits.test, 16_000))
    ]
    return found.model, found.params, *rows
  config = dataclasses.replace(gm.nn.Gemma3_270M.config, **_SMALL)
  model = gm.nn.Gemma3_270M(config=config, dtype=jnp.float32)
  splits = data.split(data.load_documents(args.text), seed=0)
  rows = []
  for part, count in ((splits.calibration, 400_000), (splits.test, 16_000)):
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
  parser.add_argument('--balance', default='none,loss,bias')
  parser.add_argument('--output', type=pathlib.Path)
  parser.add_argument('--json', type=pathlib.Path)
  parser.add_argument('--png', type=pathlib.Path)
  args = parser.parse_args()
  began = time.time()
  dense, params, rows, test = start(args)
  result = {'dense': evaluate(dense, params, test), 'trials': {}}
  print(f'dense: {result["dense"]:.4f}', flush=True)
  for name in args.balance.split(','):
    trial = _TRIALS[name]
    wider, made, recipe = compress.upcycle(
      dense,
      params,
      num_experts=args.experts,
      top_k=args.top_k,
      router=trial['router'],
    )
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
    )
    found = train.measure_routing(model, made, test[:64])
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
    if args.png:
      train.plot_routing(found, f'{args.png}_{name}.png')
    if args.output:
      ckpts.save(args.output / name, model=model, params=made)
  print(f'{time.time() - began:.0f} s')
  if args.json:
    args.json.write_text(json.dumps(result, indent=1) + '\n')


if __name__ == '__main__':
  main()
