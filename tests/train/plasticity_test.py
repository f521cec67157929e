# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Plasticity: what is decided, and that division changes no function."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gemma_ext as gx
from gemma_ext import errors
from gemma_ext import train
from gemma_ext.nn import _moe

_SETTINGS = train.Plasticity()


def _windows(load, gradient=None, *, count, similarity=None, live=None, seed=0):
  """Decides on so many windows with 10% of noise; all events, with windows."""
  rng = np.random.default_rng(seed)
  load = np.asarray(load, float)
  gradient = np.ones(len(load)) if gradient is None else gradient
  history = train.History.start(len(load))
  live = np.ones(len(load), bool) if live is None else np.asarray(live, bool)
  found = []
  for window in range(count):
    g = gradient(window) if callable(gradient) else np.asarray(gradient)
    noise = lambda: 1 + 0.1 * rng.standard_normal(len(load))
    history, events = train.decide_experts(
      _SETTINGS,
      history,
      train.Observation(
        live=live,
        load=load * noise(),
        gradient=g * noise(),
        similarity=similarity,
      ),
    )
    found += [(window, e) for e in events]
    if events:
      break
  return found


_FOUR_OF_SIX = [1, 1, 1, 1, 0, 0]


def test_a_balanced_router_is_left_alone():
  for seed in range(3):
    load = np.array(_FOUR_OF_SIX) / 4
    assert not _windows(load, count=300, live=_FOUR_OF_SIX, seed=seed)


def test_a_saturated_router_divides_the_busiest():
  ((window, event),) = _windows(
    [0.1, 0.7, 0.1, 0.1, 0, 0],
    [1, 2.5, 1, 1, 0, 0],
    count=30,
    live=_FOUR_OF_SIX,
  )
  assert (event.kind, event.reason) == ('birth', 'saturated')
  assert (event.other, event.expert) == (1, 4)
  assert window == _SETTINGS.age
  assert event.values['load'] == pytest.approx(2.8, rel=0.3)


def test_a_harder_task_divides_though_loads_are_equal():
  surge = lambda window: np.full(6, 1.0 if window < 20 else 4.0)
  ((window, event),) = _windows(
    np.array(_FOUR_OF_SIX) / 4, surge, count=60, live=_FOUR_OF_SIX
  )
  assert event.kind == 'birth' and window == 20 + _SETTINGS.patience - 1
  # Gradients of another scale, not of another task, decide nothing.
  flat = lambda window: np.full(6, 1e6)
  assert not _windows(
    np.array(_FOUR_OF_SIX) / 4, flat, count=60, live=_FOUR_OF_SIX
  )


def test_an_idle_expert_dies_and_a_little_used_one_does_not():
  ((_, event),) = _windows([0.45, 0.3, 0.245, 0.005], count=30)
  assert (event.kind, event.expert, event.reason) == ('death', 3, 'unused')
  assert not _windows([0.3, 0.3, 0.3, 0.1], count=100)


def test_of_two_alike_the_one_with_less_load_dies():
  similarity = np.full((3, 3), 0.2)
  similarity[0, 2] = similarity[2, 0] = 0.995
  ((_, event),) = _windows([0.4, 0.35, 0.25], count=30, similarity=similarity)
  assert (event.expert, event.other, event.reason) == (2, 0, 'redundant')
  similarity[0, 2] = similarity[2, 0] = 0.9
  assert not _windows([0.4, 0.35, 0.25], count=100, similarity=similarity)


def test_counts_start_again_below_the_second_level():
  # Two windows of three are quiet: never enough of them in a row.
  live = [1, 1, 1, 0]
  load = [1 / 3, 1 / 3, 1 / 3, 0]

  def every(period):
    busy = lambda window: window >= 20 and window % period == 0
    return lambda w: np.array([5.0 if busy(w) else 0.9, 0.9, 0.9, 0])

  for seed in range(3):
    assert not _windows(load, every(3), count=100, live=live, seed=seed)
    ((window, event),) = _windows(
      load, every(1), count=100, live=live, seed=seed
    )
    assert (event.other, window) == (0, 20 + _SETTINGS.patience - 1)


def test_an_easier_task_divides_nothing():
  # A tenth of the gradient, and one of four has most of what is left to do.
  gradient = lambda window: np.full(6, 4.0 if window < 30 else 0.4)
  load = np.array([0.42, 0.22, 0.18, 0.18, 0, 0])
  for seed in range(3):
    assert not _windows(load, gradient, count=200, live=_FOUR_OF_SIX, seed=seed)


def test_a_time_of_growth_ends():
  # Loads that are not equal divide after a surge, not long before or after.
  load = np.array([0.34, 0.22, 0.22, 0.22, 0, 0])
  peak = lambda at: lambda window: np.full(6, 3.0 if window == at else 1.0)
  assert not _windows(load, peak(-1), count=150, live=_FOUR_OF_SIX)
  ((window, event),) = _windows(load, peak(40), count=150, live=_FOUR_OF_SIX)
  assert event.other == 0
  assert 40 < window <= 40 + _SETTINGS.growth


def _simulate(regions, seed):
  """A layer whose experts share regions; a new region's gradient is large.

  Returns how many experts there are, by window.
  """
  rng = np.random.default_rng(seed)
  slots, most = 16, 12
  owner = np.arange(most) % 4
  known = np.zeros((slots, most))
  live = np.arange(slots) < 4
  history = train.History.start(slots)
  counts = []
  for now in regions:
    load, gradient = np.zeros(slots), np.full(slots, 1e-3)
    for r in range(now):
      load[owner[r]] += 1 / now
      gradient[owner[r]] += (0.1 + 1.5 * 0.7 ** known[owner[r], r]) / now
      known[owner[r], r] += 1
    history, events = train.decide_experts(
      _SETTINGS,
      history,
      train.Observation(
        live=live,
        load=load * (1 + 0.1 * rng.standard_normal(slots)),
        gradient=gradient * (1 + 0.1 * rng.standard_normal(slots)),
      ),
    )
    for e in events:
      live[e.expert] = e.kind == 'birth'
      if e.kind == 'birth':
        mine = np.flatnonzero(owner == e.other)
        owner[mine[: len(mine) // 2]] = e.expert
        known[e.expert] = known[e.other]
    counts.append(int(live.sum()))
  return np.array(counts)


@pytest.mark.parametrize('seed', range(5))
def test_a_layer_follows_its_task_and_does_not_flap(seed):
  counts = _simulate([4] * 50 + [12] * 60 + [4] * 100, seed)
  assert (counts[:50] == 4).all()
  assert counts[109] >= 8
  assert (np.diff(counts[50:110]) >= 0).all()
  assert (np.diff(counts[110:]) <= 0).all()
  assert counts[-1] == 4


def test_numbers_are_bounded():
  full = _windows([0.7, 0.1, 0.1, 0.1], [3, 1, 1, 1], count=60)
  assert not full  # There is no slot.
  ((_, event),) = _windows([1.0, 0.001], count=60)
  assert event.kind == 'death'
  assert not _windows([0.001, 0], count=60, live=[1, 0])  # The last one stays.


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'saturated': 1.05}, 'relaxed <= saturated'),
    ({'overloaded': 1.2}, 'saturated <= overloaded'),
    ({'surge': 1.0}, 'relaxed <= surge'),
    ({'growth': 0}, 'growth'),
    ({'slip': 1.0}, 'slip'),
    ({'unused': 0.3}, 'unused <= used'),
    ({'patience': 0}, 'patience'),
    ({'most': 2, 'least': 3}, 'most'),
    ({'memory': 1.0}, 'memory'),
  ],
)
def test_bad_settings(change, message):
  with pytest.raises(errors.ConfigError, match=message):
    train.Plasticity(**change)


# --------------------------------- division ----------------------------------

_D, _M = 12, 8


def _layer(router, k, *, threshold=None, slots=6, live=4, shared=0, seed=0):
  method = gx.MoE(num_experts=slots, top_k=slots, router=router, shared=shared)
  hidden = (slots + shared) * _M
  mixture = gx.nn.Mixture(
    path='layer_0/mlp', method=method, features=_D, hidden=hidden
  )
  rng = np.random.default_rng(seed)
  draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
  made = _moe.initial(mixture, jax.random.key(seed))
  made['k'] = jnp.int32(k)
  if threshold is not None:
    made['threshold'] = jnp.float32(threshold)
  mlp = {
    # One of the two ways round that official models have.
    'gating_einsum': draw(2, _D, hidden) / 3,
    'linear': draw(hidden, _D) / 3,
    'router': made,
  }
  params = {'layer_0': {'mlp': mlp}, 'other': {'w': draw(hidden, _D)}}
  return mixture, train.keep_experts(params, mixture, live)


def _run(params, mixture, x):
  mlp = params['layer_0']['mlp']
  choice = gx.nn.route(mixture.method, mlp['router'], x)
  gate, up = jnp.einsum('nd,cdh->cnh', x, mlp['gating_einsum'])
  mask = _moe.mask(mixture, choice.gates(), jnp.float32)
  hidden = jax.nn.gelu(gate) * up * mask
  return hidden @ mlp['linear'], choice


_EXACT = [
  ('norm', 1, None, 0),
  ('softmax', 1, None, 1),
  ('sigmoid', 1, None, 0),
  ('norm', 6, 0.1, 1),
  ('softmax', 6, None, 0),
]


@pytest.mark.parametrize(('router', 'k', 'threshold', 'shared'), _EXACT)
def test_division_keeps_the_function(router, k, threshold, shared):
  mixture, params = _layer(router, k, threshold=threshold, shared=shared)
  x = jnp.asarray(np.random.default_rng(1).standard_normal((600, _D)) + 0.3)
  x = x.astype(jnp.float32)
  want, before = _run(params, mixture, x)
  load = np.asarray((before.gates() != 0).mean(axis=0))
  parent = int(load.argmax())
  inputs = x if k == 1 else None
  new, _ = train.divide_expert(
    params,
    None,
    mixture,
    parent,
    4,
    rng=np.random.default_rng(0),
    inputs=inputs,
  )
  got, after = _run(new, mixture, x)
  np.testing.assert_allclose(
    got, want, atol=2e-5 * float(jnp.abs(want).max()), rtol=0
  )
  now = np.asarray((after.gates() != 0).mean(axis=0))
  if k == 1:  # Its tokens, in halves.
    np.testing.assert_allclose(now[[parent, 4]], load[parent] / 2, atol=0.01)
  else:
    np.testing.assert_allclose(now[[parent, 4]], load[parent], atol=1e-6)
    # The two are not one: their gradients differ.
    grads = jax.grad(
      lambda p: jnp.mean(_run(p, mixture, x)[0] ** 2), allow_int=True
    )(new)
    down = np.asarray(grads['layer_0']['mlp']['linear'])
    at = lambda e: down[(shared + e) * _M :][:_M]
    assert not np.allclose(at(parent), at(4), rtol=1e-2)
  np.testing.assert_array_equal(new['other']['w'], params['other']['w'])


def test_twins_keep_their_tokens_if_some_may_slip():
  mixture, params = _layer('norm', 1)
  rng = np.random.default_rng(3)
  # What every expert reads is of two kinds.
  kind = rng.integers(0, 2, 4000)
  axis = rng.standard_normal(_D)
  x = 0.4 * rng.standard_normal((4000, _D)) + np.outer(2 * kind - 1, axis) / 2
  x = jnp.asarray(x, jnp.float32)
  owner = lambda p: np.asarray(_run(p, mixture, x)[1].chosen)[:, 0]
  before = owner(params)
  parent = int(np.bincount(before).argmax())
  shares = {}
  for slip in (0.0, 0.02):
    new, _ = train.divide_expert(
      params,
      None,
      mixture,
      parent,
      4,
      rng=np.random.default_rng(0),
      inputs=x,
      slip=slip,
    )
    after = owner(new)
    was, now = before == parent, np.isin(after, (parent, 4))
    assert (was != now).mean() <= max(slip, 1e-3)
    # A step of an optimiser on the routers.
    router = dict(new['layer_0']['mlp']['router'])
    step = rng.choice([-1, 1], router['w'].shape) * 1e-3
    router['w'] = router['w'] + jnp.asarray(step, jnp.float32)
    mlp = new['layer_0']['mlp'] | {'router': router}
    moved = owner(new | {'layer_0': {'mlp': mlp}})
    both = np.isin(after, (parent, 4)) & np.isin(moved, (parent, 4))
    shares[slip] = (after == moved)[both].mean()
  assert shares[0.02] > 0.95 > shares[0.0]


def test_alike_is_what_puts_out_the_same_for_its_own_tokens():
  mixture, params = _layer('norm', 1)
  x = jnp.asarray(
    np.random.default_rng(1).standard_normal((500, _D)), jnp.float32
  )
  choice = _run(params, mixture, x)[1]
  new, _ = train.divide_expert(
    params, None, mixture, 0, 4, rng=np.random.default_rng(0), inputs=x
  )
  got = train.expert_similarity(new, mixture, x)
  assert got[0, 4] == pytest.approx(1.0, abs=1e-5)
  # In numpy, of the tokens of either.
  gate, up = np.einsum(
    'nd,cdh->cnh', x, np.asarray(params['layer_0']['mlp']['gating_einsum'])
  )
  hidden = np.asarray(jax.nn.gelu(gate)) * up
  down = np.asarray(params['layer_0']['mlp']['linear'])
  out = [
    hidden[:, e * _M : (e + 1) * _M] @ down[e * _M : (e + 1) * _M]
    for e in range(3)
  ]
  chosen = np.asarray(choice.chosen)[:, 0]
  either = np.isin(chosen, (1, 2))
  a, b = out[1][either], out[2][either]
  want = (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)
  assert got[1, 2] == pytest.approx(want, abs=1e-4)
  assert got[2, 1] == pytest.approx(want, abs=1e-4)


@pytest.mark.parametrize(
  ('router', 'k', 'threshold'),
  [
    ('softmax', 2, None),
    ('sigmoid', 6, None),
    ('expert_choice', 1, None),
    ('gate', 1, None),
  ],
)
def test_routers_that_cannot_divide_say_so(router, k, threshold):
  mixture, params = _layer(router, k, threshold=threshold)
  with pytest.raises(errors.TrainError, match='compute the same'):
    train.divide_expert(
      params, None, mixture, 0, 4, rng=np.random.default_rng(0)
    )


@pytest.mark.parametrize(('parent', 'child'), [(4, 5), (0, 1)])
def test_slots_have_to_be_right(parent, child):
  mixture, params = _layer('norm', 1)
  with pytest.raises(errors.TrainError, match='slots in use'):
    train.divide_expert(
      params, None, mixture, parent, child, rng=np.random.default_rng(0)
    )


def test_moments_go_with_the_neurons():
  mixture, params = _layer('norm', 6, threshold=0.0)
  optimizer = optax.chain(
    optax.masked(optax.adam(1e-2), train.floating), gx.nn.freeze_codes()
  )
  state = optimizer.init(params)
  noisy = lambda x: (
    x + jnp.arange(1, x.size + 1, dtype=x.dtype).reshape(x.shape)
    if jnp.issubdtype(x.dtype, jnp.floating)
    else x
  )
  state = jax.tree.map(noisy, state)
  rng = np.random.default_rng(0)
  _, new = train.divide_expert(params, state, mixture, 1, 5, rng=rng)
  was = np.asarray(state[0].inner_state[0].mu['layer_0']['mlp']['linear'])
  now = np.asarray(new[0].inner_state[0].mu['layer_0']['mlp']['linear'])
  rows = lambda a, e: a[e * _M : (e + 1) * _M]
  # Every neuron's moments are with the one that has it, and nowhere else.
  np.testing.assert_array_equal(rows(now, 1) + rows(now, 5), rows(was, 1))
  assert (rows(now, 1).any(axis=1) ^ rows(now, 5).any(axis=1)).all()
  np.testing.assert_array_equal(rows(now, 2), rows(was, 2))
  gate = np.asarray(new[0].inner_state[0].nu['layer_0']['mlp']['gating_einsum'])
  old = np.asarray(
    state[0].inner_state[0].nu['layer_0']['mlp']['gating_einsum']
  )
  cols = lambda a, e: a[..., e * _M : (e + 1) * _M]
  np.testing.assert_array_equal(cols(gate, 1) + cols(gate, 5), cols(old, 1))
  _, gone = train.remove_expert(params, new, mixture, 1)
  mu = gone[0].inner_state[0].mu['layer_0']['mlp']
  assert not rows(np.asarray(mu['linear']), 1).any()
  assert not np.asarray(mu['router']['w'])[1].any()
  assert rows(np.asarray(mu['linear']), 2).all()
  np.testing.assert_array_equal(
    gone[0].inner_state[0].mu['other']['w'],
    state[0].inner_state[0].mu['other']['w'],
  )


def test_packed_experts_are_refused():
  mixture, params = _layer('norm', 1)
  params['layer_0']['mlp']['linear'] = {'codes': jnp.zeros((2, 2))}
  with pytest.raises(errors.TrainError, match='packed'):
    train.live_experts(params, mixture)


def test_a_saturated_layer_grows_and_an_idle_one_shrinks(tmp_path):
  mixture, params = _layer('norm', 1, live=3)
  settings = train.Plasticity(patience=1, age=1, pause=1)
  log = tmp_path / 'log.jsonl'
  plastic = train.Plastic(settings, {mixture.path: mixture}, log=log)
  with pytest.raises(errors.TrainError, match='nothing was observed'):
    plastic.update(0, params)

  def window(params, load, step):
    load = jnp.asarray(load, jnp.float32)
    # Who has more tokens has a larger gradient.
    each = jnp.repeat(load, _M)
    grads = {
      'mlp': {
        'gating_einsum': jnp.ones((2, _D, len(each))) * each,
        'linear': jnp.ones((len(each), _D)) * each[:, None],
      }
    }
    sown = {'load': load, 'probability': load, 'z': 0.0, 'active': 0.2}
    plastic.observe(
      {'layer_0': {'mlp': {'routing': (sown,)}}}, {'layer_0': grads}
    )
    return plastic.update(step, params)

  events = []
  for step in range(3):
    params, _, found = window(params, [0.9, 0.06, 0.04, 0, 0, 0], step)
    events += found
    if found:
      break
  assert [e.kind for e in events] == ['birth']
  assert (
    train.live_experts(params, mixture).tolist() == [True] * 4 + [False] * 2
  )
  for step in range(3, 9):
    params, _, found = window(params, [0.4, 0.3, 0.01, 0.29, 0, 0], step)
    events += found
  assert (events[-1].kind, events[-1].expert) == ('death', 2)
  lines = [json.loads(line) for line in log.read_text().splitlines()]
  assert [x['reason'] for x in lines] == [e.reason for e in events]
  assert lines == plastic.records
  assert lines[0]['experts'] == 4 and lines[0]['layer'] == 'layer_0/mlp'
