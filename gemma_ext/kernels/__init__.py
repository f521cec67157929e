# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Packed weight formats and the operations on them; only jax and numpy."""

from gemma_ext.kernels._attend import attend
from gemma_ext.kernels._attend import MOST_ROWS
from gemma_ext.kernels._backends import on_cpu
from gemma_ext.kernels._block import block
from gemma_ext.kernels._block import BlockSpec
from gemma_ext.kernels._block import MOST_TOKENS
from gemma_ext.kernels._block import NORMS
from gemma_ext.kernels._block import why_not as why_not_block
from gemma_ext.kernels._cpu import cuts
from gemma_ext.kernels._dequantize import dequantize
from gemma_ext.kernels._experts import experts_ffn
from gemma_ext.kernels._experts_dense import Adapters
from gemma_ext.kernels._experts_dense import experts_dense
from gemma_ext.kernels._experts_dense import NO_ADAPTERS
from gemma_ext.kernels._formats import choose_group
from gemma_ext.kernels._formats import Format
from gemma_ext.kernels._formats import IntFormat
from gemma_ext.kernels._formats import TernaryFormat
from gemma_ext.kernels._gated import gated_ffn
from gemma_ext.kernels._matmul import matmul
from gemma_ext.kernels._memory import empty_side_by_side
from gemma_ext.kernels._memory import side_by_side
from gemma_ext.kernels._neurons import DEAD
from gemma_ext.kernels._neurons import neuron_logits
from gemma_ext.kernels._neurons import neurons_ffn
from gemma_ext.kernels._neurons import open_gates
from gemma_ext.kernels._params import first
from gemma_ext.kernels._params import random_codes
from gemma_ext.kernels._params import validate
from gemma_ext.kernels._pick import pick
from gemma_ext.kernels._scales import round_scale
from gemma_ext.kernels._scales import SCALES
from gemma_ext.kernels._take import take
