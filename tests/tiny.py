# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of every Gemma family, and a tiny real tokenizer.

    model = tiny.model('gemma3')
    params = tiny.params(model, seed=0)
    tokenizer = tiny.tokenizer(model.INFO.tokenizer_version)

Every input axis is 128, 256 or 512 wide except Gemma 3n's LAuReL and the
per-layer inputs, so that recipes with the default group of 128 apply.
"""

import atexit
import dataclasses
import functools
import io
import pathlib
import shutil
import tempfile
from typing import Any

from flax import traverse_util
from gemma import gm
from gemma import peft
from gemma.gm.nn import _config as gemma3_config
from gemma.gm.nn import _modules as gemma3_modules
from gemma.gm.nn.gemma3n import _config as gemma3n_config
from gemma.gm.nn.gemma3n import _modules as gemma3n_modules
from gemma.gm.nn.gemma4 import _config as gemma4_config
from gemma.gm.nn.gemma4 import _modules as gemma4_modules
import jax
import jax.numpy as jnp
import numpy as np
import sentencepiece as spm

import gemma_ext as gx
from gemma_ext import ckpts
from gemma_ext import recipe as recipe_lib

VOCAB_SIZE = 512

_SIZES = dict(
  num_embed=VOCAB_SIZE,
  embed_dim=128,
  hidden_dim=256,
  num_heads=4,
  head_dim=32,
  use_post_attn_norm=True,
  use_post_ffw_norm=True,
  sliding_window_size=16,
)
_GEMMA3_LAYERS = (
  gemma3_modules.AttentionType.LOCAL_SLIDING,
  gemma3_modules.AttentionType.GLOBAL,
)
_GEMMA3N_LAYERS = (
  gemma3n_modules.AttentionType.LOCAL_SLIDING,
  gemma3n_modules.AttentionType.GLOBAL,
)
_GEMMA4_LAYERS = (
  gemma4_modules.AttentionType.LOCAL_SLIDING,
  gemma4_modules.AttentionType.GLOBAL,
)
_GEMMA4_ATTENTION = dict(
  final_logit_softcap=30.0,
  qk_norm_with_scale=True,
  global_key_size=64,
  global_rope_proportion=0.25,
  local_rope_proportion=1.0,
  local_base_frequency=10_000,
  global_base_frequency=1_000_000,
)


class TinyGemma2(gm.nn.Gemma2_2B):
  """Gemma 2: soft caps, FFN weights not transposed."""

  config: gemma3_config.TransformerConfig = gemma3_config.TransformerConfig(
    **_SIZES,
    num_kv_heads=2,
    final_logit_softcap=30.0,
    attn_logits_soft_cap=50.0,
    attention_types=_GEMMA3_LAYERS,
  )


class TinyGemma3(gm.nn.Gemma3_270M):
  """Gemma 3: query-key norms, transposed gating, one key-value head."""

  config: gemma3_config.TransformerConfig = gemma3_config.TransformerConfig(
    **_SIZES,
    num_kv_heads=1,
    final_logit_softcap=None,
    use_qk_norm=True,
    transpose_gating_einsum=True,
    attention_types=_GEMMA3_LAYERS + _GEMMA3_LAYERS[:1],
    local_base_frequency=10_000,
    global_base_frequency=1_000_000,
  )


class TinyGemma3Shallow(TinyGemma3):
  """One layer of it, for tests that compile much."""

  config: gemma3_config.TransformerConfig = dataclasses.replace(
    TinyGemma3.config, attention_types=_GEMMA3_LAYERS[:1]
  )


class TinyGemma3n(gm.nn.Gemma3n_E2B):
  """Gemma 3n: AltUp, LAuReL, per-layer inputs, sparse and KV-sharing layers."""

  config: gemma3n_config.TransformerConfig = gemma3n_config.TransformerConfig(
    **_SIZES,
    num_kv_heads=2,
    final_logit_softcap=None,
    use_qk_norm=True,
    qk_norm_with_scale=True,
    use_value_norm=True,
    attention_types=_GEMMA3N_LAYERS * 2,
    query_pre_attn_norm=gemma3n_config.QueryPreAttentionNormalisation.NONE,
    transpose_gating_einsum=True,
    local_base_frequency=10_000,
    global_base_frequency=1_000_000,
    activation_sparsity_pattern=(0.95, 0.0, 0.0, 0.0),
    use_altup=True,
    altup_coef_clip=120.0,
    per_layer_input_dim=32,
    use_laurel=True,
    laurel_rank=16,
    kv_cache_sharing_config=gemma3n_config.KVCacheSharingConfig(
      frac_shared_layers=0.5, share_global=True, share_local=True
    ),
    scale_plus_one=False,
    guard_against_excess_precision=True,
  )


class TinyGemma4(gm.nn.Gemma4_31B):
  """Gemma 4 dense: wider global heads whose keys are also their values."""

  config: gemma4_config.TransformerConfig = gemma4_config.TransformerConfig(
    **_SIZES,
    **_GEMMA4_ATTENTION,
    num_kv_heads=2,
    num_global_kv_heads=1,
    k_eq_v_global=True,
    attention_types=_GEMMA4_LAYERS,
    use_bidirectional_attention='vision',
  )


class TinyGemma4E2B(gm.nn.Gemma4_E2B):
  """Gemma 4 E2B: per-layer inputs, KV sharing with wider FFNs."""

  config: gemma4_config.TransformerConfig = gemma4_config.TransformerConfig(
    **_SIZES,
    **_GEMMA4_ATTENTION,
    num_kv_heads=1,
    attention_types=_GEMMA4_LAYERS * 2,
    per_layer_input_dim=32,
    kv_cache_sharing_config=gemma4_config.KVCacheSharingConfig(
      frac_shared_layers=0.5, share_global=True, share_local=True
    ),
    override_kv_shared_ffw_hidden=512,
  )


class TinyGemma4Moe(gm.nn.Gemma4_26B_A4B):
  """Gemma 4 mixture of experts: 4 experts, 2 of them a token."""

  config: gemma4_config.TransformerConfig = gemma4_config.TransformerConfig(
    **_SIZES,
    **_GEMMA4_ATTENTION,
    num_kv_heads=2,
    num_global_kv_heads=1,
    k_eq_v_global=True,
    attention_types=_GEMMA4_LAYERS,
    enable_moe=True,
    num_experts=4,
    expert_dim=128,
    top_k_experts=2,
    moe_dense_hidden_dim=256,
    use_bidirectional_attention='vision',
  )


_CLASSES = {
  'gemma2': TinyGemma2,
  'gemma3': TinyGemma3,
  'gemma3n': TinyGemma3n,
  'gemma4': TinyGemma4,
  'gemma4_e2b': TinyGemma4E2B,
  'gemma4_moe': TinyGemma4Moe,
}
FAMILIES = tuple(_CLASSES)


def model(family: str, *, dtype: Any = jnp.float32) -> Any:
  """Returns the tiny model of a family (one of `FAMILIES`), text only."""
  kwargs = {} if family in ('gemma2', 'gemma3') else {'text_only': True}
  return _CLASSES[family](dtype=dtype, tokens='batch.input', **kwargs)


def shallow(*, dtype: Any = jnp.float32) -> TinyGemma3Shallow:
  """Returns the tiny Gemma 3 of one layer."""
  return TinyGemma3Shallow(dtype=dtype, tokens='batch.input')


def params(model: Any, seed: int = 0) -> dict[str, Any]:
  """Returns random parameters of a tiny model, in the nested layout.

  Matrices are normal with variance 1/128, so that activations keep their size.
  Vectors (norm scales and the like) are normal around the value that does
  nothing, with deviation 0.1, so that no test passes by a scale being exactly
  one.
  """
  tokens = jnp.ones((1, 8), jnp.int32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)['params']
  # Gemma 2 and 3 multiply by 1 + scale, the later families by scale.
  neutral = float(not isinstance(model.config, gemma3_config.TransformerConfig))
  rng = np.random.default_rng(seed)

  def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
    noise = rng.standard_normal(leaf.shape).astype(np.float32)
    if len(leaf.shape) < 2:
      return jnp.asarray(neutral + 0.1 * noise, leaf.dtype)
    return jnp.asarray(noise * 128**-0.5, leaf.dtype)

  return jax.tree.map(draw, shapes)


_TEXT = """\
The quick brown fox jumps over the lazy dog. A river is a natural stream of
fresh water that flows on land towards another body of water at a lower
elevation. In mathematics, a group is a set with an operation that combines
any two elements of the set to produce a third element of the set.
The city was founded in 1842 and had 12,345 people in the census of 1910.
What is the capital of France? The capital of France is Paris.
"""


def tokenizer_model(*, version: int | str = 3) -> bytes:
  """Returns a serialised SentencePiece model laid out as Gemma's are.

  BPE with byte fallback, no dummy prefix, identity normaliser, `VOCAB_SIZE`
  pieces: padding, end, begin and unknown at 0 to 3, the turn markers at
  Gemma's ids (106 and 107 for version 2, 105 and 106 later).
  """
  turns = ('<start_of_turn>', '<end_of_turn>')
  if version == 4:
    turns = ('<|turn>', '<turn|>')
  first = 106 if version == 2 else 105
  symbols = ['<mask>'] + [f'<unused{i}>' for i in range(first - 5)]
  out = io.BytesIO()
  spm.SentencePieceTrainer.train(
    sentence_iterator=iter(_TEXT.splitlines()),
    model_writer=out,
    model_type='bpe',
    vocab_size=VOCAB_SIZE,
    hard_vocab_limit=True,
    byte_fallback=True,
    character_coverage=1.0,
    normalization_rule_name='identity',
    add_dummy_prefix=False,
    remove_extra_whitespaces=False,
    split_digits=True,
    allow_whitespace_only_pieces=True,
    pad_id=0,
    eos_id=1,
    bos_id=2,
    unk_id=3,
    pad_piece='<pad>',
    eos_piece='<eos>',
    bos_piece='<bos>',
    unk_piece='<unk>',
    user_defined_symbols=[*symbols, *turns, '\n', '\n\n'],
    minloglevel=2,
  )
  return out.getvalue()


@functools.cache
def _folder() -> pathlib.Path:
  path = pathlib.Path(tempfile.mkdtemp(prefix='gemma_ext_tiny_'))
  atexit.register(shutil.rmtree, path, ignore_errors=True)
  return path


@functools.cache
def tokenizer(version: int | str = 3) -> gm.text.Tokenizer:
  """Returns a tiny tokenizer as `ckpts.load` gives it (2, 3, '3n', 4)."""
  path = _folder() / f'tokenizer_{version}.model'
  path.write_bytes(tokenizer_model(version=version))
  cls = {
    2: ckpts.Gemma2Tokenizer,
    3: gm.text.Gemma3Tokenizer,
    '3n': gm.text.Gemma3nTokenizer,
    4: gm.text.Gemma4Tokenizer,
  }[version]
  return cls(path=str(path))


def checkpoint(
  path: pathlib.Path, *, seed: int = 0, one_layer: bool = False
) -> pathlib.Path:
  """Writes a dense Gemma 3 and its tokenizer; returns its path."""
  dense = shallow() if one_layer else model('gemma3')
  return ckpts.save(
    path, model=dense, params=params(dense, seed), tokenizer=tokenizer(3)
  )


def folder(path: pathlib.Path, *, texts: int, words: int = 400) -> pathlib.Path:
  """Fills a folder: `dense`, a tiny Gemma 3, and `text_0.txt` and so on."""
  checkpoint(path / 'dense')
  rng = np.random.default_rng(0)
  known = 'the river flows city was founded in France capital of a set'.split()
  for i in range(texts):
    text = ' '.join(rng.choice(known, words))
    (path / f'text_{i}.txt').write_text(text)
  return path


def routed(dense: Any, recipe: gx.Recipe, tokens: Any) -> dict[str, Any]:
  """Parameters of a tiny model whose mixtures may have any router.

  Carved for 'norm' where carving does not make the router: the parameters of
  all but 'gate' have the same shapes.
  """

  def carvable(method: recipe_lib.Method) -> recipe_lib.Method:
    if isinstance(method, gx.MoE) and method.router != 'gate':
      return dataclasses.replace(method, router='norm')
    return method

  rules = tuple((match, carvable(method)) for match, method in recipe.rules)
  carved = gx.Recipe(rules=rules)
  return gx.compress(dense, params(dense), carved, calibration=tokens)


def unpacked(model: gx.nn.Compressed, params: Any) -> dict[str, Any]:
  """Returns the dense parameters that packed ones stand for."""

  @jax.jit
  def unpack(flat):
    for path, (site, method) in gx.nn.methods_of(
      model.model, model.recipe
    ).items():
      leaf = {name: flat.pop(f'{path}/{name}') for name in ('codes', 'scale')}
      fmt = gx.nn.format_of(method, site.layout.cols)
      flat[path] = gx.nn.PackedWeight(
        leaf=leaf, fmt=fmt, layout=site.layout, dtype=model.dtype
      ).dequantize()
    return flat

  flat = unpack(traverse_util.flatten_dict(params, sep='/'))
  return traverse_util.unflatten_dict(flat, sep='/')


def adapters(lora: Any, tokens: Any, *, within: str = '') -> dict[str, Any]:
  """Random adapters of a model in `gx.nn.LoRA` or the official one.

  Args:
    lora: The model.
    tokens: What it takes.
    within: Those whose path does not have this are zeros.
  """
  shapes = jax.eval_shape(lora.init, jax.random.key(0), tokens)['params']
  flat = traverse_util.flatten_dict(peft.split_params(shapes).lora, sep='/')
  rng = np.random.default_rng(0)
  flat = {
    path: jnp.float32(rng.standard_normal(x.shape) * (within in path) / 4)
    for path, x in flat.items()
  }
  return traverse_util.unflatten_dict(flat, sep='/')
