# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Healing: wins back what compression broke.

run = gx.train.heal(gx.train.Heal(recipe='tssn', output='out/healed'))
"""

from gemma_ext.train._calibration import calibrate
from gemma_ext.train._calibration import Calibration
from gemma_ext.train._closed_form import ClosedForm
from gemma_ext.train._division import divide as divide_expert
from gemma_ext.train._division import keep as keep_experts
from gemma_ext.train._division import live as live_experts
from gemma_ext.train._division import remove as remove_expert
from gemma_ext.train._division import similarity as expert_similarity
from gemma_ext.train._evolution import Evolution
from gemma_ext.train._gradient import Gradient
from gemma_ext.train._heal import heal
from gemma_ext.train._init import FromCheckpoint
from gemma_ext.train._mezo import Mezo
from gemma_ext.train._noise import LowRank
from gemma_ext.train._noise import matmul
from gemma_ext.train._plasticity import decide as decide_experts
from gemma_ext.train._plasticity import Event
from gemma_ext.train._plasticity import History
from gemma_ext.train._plasticity import Observation
from gemma_ext.train._plasticity import Plastic
from gemma_ext.train._plasticity import Plasticity
from gemma_ext.train._problem import Optimizer
from gemma_ext.train._problem import Problem
from gemma_ext.train._reward import Match
from gemma_ext.train._reward import TaskReward
from gemma_ext.train._routing import ActiveShare
from gemma_ext.train._routing import balance
from gemma_ext.train._routing import BalancedStep
from gemma_ext.train._routing import entropy as routing_entropy
from gemma_ext.train._routing import ExpertUtilisation
from gemma_ext.train._routing import floating
from gemma_ext.train._routing import LargestLoad
from gemma_ext.train._routing import load_balance
from gemma_ext.train._routing import LoadBalance
from gemma_ext.train._routing import measure as measure_routing
from gemma_ext.train._routing import plot as plot_routing
from gemma_ext.train._routing import relative_load
from gemma_ext.train._routing import router_z
from gemma_ext.train._routing import RouterZ
from gemma_ext.train._routing import routing
from gemma_ext.train._routing import RoutingEntropy
from gemma_ext.train._routing import SmallestLoad
from gemma_ext.train._rows import EvolveRows
from gemma_ext.train._run import Heal
from gemma_ext.train._run import Run
from gemma_ext.train._sharded import sharded_update
from gemma_ext.train._sources import Prompts
from gemma_ext.train._sources import TextWindows
from gemma_ext.train._stages import Block
from gemma_ext.train._stages import Distill
from gemma_ext.train._steps import EvolutionStep
from gemma_ext.train._steps import MezoStep
from gemma_ext.train._teacher import TeacherKL
from gemma_ext.train._teacher import TeacherWindows
