# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Dense parameters to compressed parameters.

The module itself can be called: `gx.compress(model, params, recipe)`.
"""

# pylint: disable=g-importing-member

import sys as _sys
import types as _types

from gemma_ext.compress._allocate import allocate
from gemma_ext.compress._allocate import Allocation
from gemma_ext.compress._allocate import Budget
from gemma_ext.compress._allocate import corrected
from gemma_ext.compress._allocate import CORRECTIONS
from gemma_ext.compress._allocate import held_out
from gemma_ext.compress._allocate import refined
from gemma_ext.compress._allocate import solve
from gemma_ext.compress._calibrate import second_moments
from gemma_ext.compress._candidates import Candidate
from gemma_ext.compress._candidates import read as read_sensitivities
from gemma_ext.compress._candidates import Sensitivities
from gemma_ext.compress._carve import carve
from gemma_ext.compress._compensate import compensate
from gemma_ext.compress._compress import check_params
from gemma_ext.compress._compress import compress
from gemma_ext.compress._divergence import divergence
from gemma_ext.compress._divergence import divergences
from gemma_ext.compress._experts import choose as choose_experts
from gemma_ext.compress._experts import Curves
from gemma_ext.compress._experts import curves as expert_curves
from gemma_ext.compress._experts import with_experts
from gemma_ext.compress._fit_int import fit_int
from gemma_ext.compress._fit_ternary import fit_ternary
from gemma_ext.compress._fits import Fits
from gemma_ext.compress._plan import Plan
from gemma_ext.compress._plan import plan
from gemma_ext.compress._plan import PlanRow
from gemma_ext.compress._registry import FITS
from gemma_ext.compress._sensitivity import CANDIDATES
from gemma_ext.compress._sensitivity import check_known
from gemma_ext.compress._sensitivity import MORE_CANDIDATES
from gemma_ext.compress._sensitivity import sensitivities
from gemma_ext.compress._statistics import RANDOM_SHARE
from gemma_ext.compress._statistics import Statistics
from gemma_ext.compress._statistics import statistics
from gemma_ext.compress._statistics import text_fingerprint
from gemma_ext.compress._upcycle import upcycle
from gemma_ext.compress._weight import compress_weight


class _CallableModule(_types.ModuleType):
  """Lets `gx.compress` be the verb and the room where its parts live."""

  def __call__(self, *args, **kwargs):
    return compress(*args, **kwargs)


_sys.modules[__name__].__class__ = _CallableModule
