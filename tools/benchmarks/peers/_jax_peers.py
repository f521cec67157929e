# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""What others in JAX make of a checkpoint: the official wrapper, and qwix.

`IntWrapper int8` and `int4` are `gm.nn.IntWrapper`, one scale a channel. It
leaves the table of embeddings as it is.

`qwix int4 g32` is qwix' post-training quantisation with one scale for 32
weights, `qwix gptq int4 g32` its GPTQ, on calibration text, except for the
table, on which it takes hours. qwix quantises the table as well, but the
official embedder cannot multiply what it makes of it, so weights are turned
back and run by the dense model: what is measured is their quality. Bytes are
those of so many bits a weight and scales of 16 bits, also where qwix itself
stores more.
"""

from __future__ import annotations

from collections.abc import Mapping
import re
from typing import Any

from flax import traverse_util
from gemma import gm
from gemma import peft
import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from gemma_ext import ckpts
from gemma_ext import data
from gemma_ext import errors

_SPEC = re.compile(
  r'IntWrapper int(?P<wrapper>[48])'
  r'|qwix (?P<gptq>gptq )?int(?P<bits>[2-8])(?: g(?P<group>\d+))?'
)
_WINDOW = 512
# Tokens of calibration text, as many as our budgets are fitted on.
_TOKENS = 8192
# qwix' GPTQ knows types of JAX only.
_GPTQ_BITS = (4, 8)


def check(text: str) -> re.Match[str]:
  """Returns the parts of 'IntWrapper int4' or 'qwix gptq int4 g32'.

  Args:
    text: The peer.

  Raises:
    ConfigError: If there is no such peer.
  """
  found = _SPEC.fullmatch(text)
  if not found or (found['gptq'] and int(found['bits']) not in _GPTQ_BITS):
    raise errors.ConfigError(
      f"peer: {text!r}; expected 'IntWrapper int4' or int8, 'qwix intB' with 2"
      " to 8 bits, or 'qwix gptq int4' or int8, the last ones with ' gN'."
    )
  return found


def stands_in(peer: str) -> bool:
  """Whether a peer's weights are run by the dense model.

  Args:
    peer: As for `check`.
  """
  return not check(peer)['wrapper']


def load(name: str, peer: str) -> tuple[ckpts.Checkpoint, Any, Any, int]:
  """Loads a dense checkpoint and quantises it.

  Args:
    name: The checkpoint.
    peer: As for `check`.

  Returns:
    The checkpoint, the model, its parameters, and their bytes.

  Raises:
    OptionalDependencyError: If qwix is missing.
    ConfigError: If the checkpoint is compressed already, or qwix refuses.
  """
  spec = check(peer)
  dense = ckpts.load(
    name, dtype=jnp.bfloat16 if spec['wrapper'] else jnp.float32
  )
  if dense.recipe is not None:
    raise errors.ConfigError(f'peer: {name!r} is compressed already.')
  if spec['wrapper']:
    bits = int(spec['wrapper'])
    params = peft.quantize(dense.params, method=f'INT{bits}')
    dtype = {4: jnp.int4, 8: jnp.int8}[bits]
    model = gm.nn.IntWrapper(model=dense.model, dtype=dtype)
    return dense, model, params, _nbytes(params)
  try:
    params, nbytes = _qwix(dense, spec)
  except errors.GemmaExtError:
    raise
  except (ValueError, NotImplementedError) as e:
    raise errors.ConfigError(f'peer: {peer!r}: qwix refuses it: {e}') from e
  return dense, dense.model, params, nbytes


def _nbytes(params: Any) -> int:
  """Bytes, two numbers of 4 bits in one."""
  size = lambda x: x.size // 2 if x.dtype == jnp.int4 else x.nbytes
  return sum(size(x) for x in jax.tree.leaves(params))


def _qwix(
  dense: ckpts.Checkpoint, spec: re.Match[str]
) -> tuple[dict[str, Any], int]:
  """Parameters that were quantised and turned back, and their bytes."""
  try:
    # pylint: disable-next=g-import-not-at-top
    import qwix
  except ImportError as e:
    raise errors.OptionalDependencyError(
      'This peer needs qwix: pip install "gemma_ext[peers]" (or pip install'
      ' qwix).'
    ) from e
  bits, group = int(spec['bits']), spec['group']
  rule: dict[str, Any] = {
    'weight_qtype': {4: jnp.int4, 8: jnp.int8}.get(bits, f'int{bits}'),
    'tile_size': int(group) if group else None,
  }
  model, params = dense.model, dense.params
  ptq = qwix.quantize_model(
    model, qwix.PtqProvider([qwix.QuantizationRule(**rule)])
  )
  tokens = jnp.ones((1, 8), jnp.int32)
  shapes = jax.eval_shape(ptq.init, jax.random.key(0), tokens)['params']
  if spec['gptq']:
    found = _gptq(dense, rule, shapes)
  else:
    found = qwix.quantize_params(params, shapes)
  flat = traverse_util.flatten_dict(found)
  out: dict[Any, Any] = {}
  nbytes = 0
  for path, before in traverse_util.flatten_dict(params).items():
    leaf = flat.pop(path)
    if not hasattr(leaf, 'array'):
      out[path] = leaf.astype(jnp.bfloat16)
      nbytes += out[path].nbytes
      continue
    array = leaf.array
    out[path] = (
      qwix.dequantize(array).reshape(before.shape).astype(jnp.bfloat16)
    )
    nbytes += -(-before.size * bits // 8) + 2 * array.scale.size
  return traverse_util.unflatten_dict(out), nbytes


def _gptq(
  dense: ckpts.Checkpoint, rule: Mapping[str, Any], shapes: Any
) -> dict[str, Any]:
  """Parameters by GPTQ, on the calibration split of the sample text."""
  # pylint: disable=g-import-not-at-top
  import qwix
  from qwix.contrib import gptq

  # pylint: enable=g-import-not-at-top
  documents = data.split(tuple(data.load_documents('sample'))).calibration
  windows = data.windows(
    dense.tokenizer,
    documents.documents,
    length=_WINDOW,
    max_tokens=_TOKENS,
  )
  model = qwix.quantize_model(
    dense.model, gptq.GptqCalibrationProvider([gptq.GptqRule(**rule)])
  )
  variables = {'params': dense.params}
  for row in np.asarray(windows.tokens):
    tokens = jnp.asarray(row[None], jnp.int32)
    _, state = model.apply(variables, tokens, mutable='quant_stats')
    variables |= state
  stats = dict(variables['quant_stats'])
  stats.pop('embedder', None)
  # It goes from column to column, with a program for each place in a block and
  # each column: JAX keeps those of one shape of small blocks, and no more. A
  # block as large as a group changes no more than which scales know of errors.
  flat = traverse_util.flatten_dict(dense.params)
  by_shape = sorted(flat.items(), key=lambda item: item[1].shape)
  block = {'gptq_block_size': rule['tile_size']} if rule['tile_size'] else {}
  found: dict[Any, Any] = {}
  for path, leaf in tqdm.tqdm(by_shape, desc='qwix GPTQ', unit='weight'):
    one = traverse_util.unflatten_dict({path: leaf})
    found |= traverse_util.flatten_dict(
      gptq.quantize_params(one, shapes, stats, **block)
    )
  return traverse_util.unflatten_dict(found)
