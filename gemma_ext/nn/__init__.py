# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Flax modules that read packed weights."""

# pylint: disable=g-importing-member

from gemma_ext.nn._compressed import Compressed
from gemma_ext.nn._compressed import methods_of
from gemma_ext.nn._compressed import mixtures_of
from gemma_ext.nn._compressed import packed_weights
from gemma_ext.nn._latent import from_latent
from gemma_ext.nn._latent import to_latent
from gemma_ext.nn._lora import LoRA
from gemma_ext.nn._low_rank import add as add_low_rank
from gemma_ext.nn._low_rank import PackedLowRank
from gemma_ext.nn._moe import Choice
from gemma_ext.nn._moe import Mixture
from gemma_ext.nn._moe import route
from gemma_ext.nn._native import mixtures as native_mixtures
from gemma_ext.nn._offload import hit_rate
from gemma_ext.nn._offload import offload
from gemma_ext.nn._offload import Offloaded
from gemma_ext.nn._optim import freeze_codes
from gemma_ext.nn._packed import format_of
from gemma_ext.nn._packed import nbytes_of
from gemma_ext.nn._packed import PackedRows
from gemma_ext.nn._packed import PackedWeight
from gemma_ext.nn._packed import param as packed_param
from gemma_ext.nn._part import part
from gemma_ext.nn._rolling import rolling_cache
from gemma_ext.nn._rolling import slots_of
from gemma_ext.nn._sharded import shard_experts
from gemma_ext.nn._sharded import Sharded
from gemma_ext.nn._sites import BASE
from gemma_ext.nn._sites import DOWN
from gemma_ext.nn._sites import join
from gemma_ext.nn._sites import Kind
from gemma_ext.nn._sites import Layout
from gemma_ext.nn._sites import mean_path
from gemma_ext.nn._sites import rank_path
from gemma_ext.nn._sites import role_path
from gemma_ext.nn._sites import ROLES
from gemma_ext.nn._sites import Site
from gemma_ext.nn._sites import sites
from gemma_ext.nn._sites import split
from gemma_ext.nn._sites import UP
