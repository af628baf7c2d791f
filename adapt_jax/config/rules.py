"""Checks of rules that involve several options, or that a range cannot express."""

import dataclasses
import math
import re

from adapt_jax.config.mode_options import SensitivityOptions
from adapt_jax.config.options import ExportOptions, MeshOptions, RunOptions, TrainOptions
from adapt_jax.config.prune_options import PruneOptions
from adapt_jax.config.values import serving_multiples
from adapt_jax.models.errors import InputError


def check(options: RunOptions) -> None:
  """Raises InputError naming field, value and remedy."""
  _check_prune(options.prune)
  _check_train(options.train)
  _check_mesh(options.mesh)
  _check_sensitivity(options.sensitivity)
  _check_export(options.export)


def _check_prune(prune: PruneOptions) -> None:
  serving_multiples(prune.serve)
  _check_weights('prune.calibration', prune.calibration.weights, prune.calibration.source)
  if prune.attention == 'query_heads' and prune.budget == 'kv_cache':
    raise InputError(
      f'prune.attention = {prune.attention!r} conflicts with prune.budget = {prune.budget!r}, which counts '
      f'KV heads: change one of them'
    )
  if not 0 < prune.target < math.inf:
    raise InputError(
      f'prune.target = {prune.target!r} must be positive: a fraction kept (≤ 1) or a number in the '
      f'unit of prune.budget (> 1)'
    )
  if prune.budget == 'latency' and not prune.latency_table:
    raise InputError(
      f'prune.budget = {prune.budget!r} needs prune.latency_table: name the report.json of '
      f'--mode=bench on the dense model, or a device such as h100'
    )
  if prune.latency_table and prune.budget != 'latency':
    raise InputError(
      f'prune.latency_table = {prune.latency_table!r} is only read with prune.budget = '
      f"'latency', not with {prune.budget!r}: set the budget, or leave the table empty"
    )


def _check_train(train: TrainOptions) -> None:
  for name in ('lr', 'min_lr'):
    if -1 < (rate := getattr(train, name)) < 0:
      raise InputError(f'train.{name} = {rate} is below 0: give a learning rate, or -1 for the default')
  if 0 <= train.lr < train.min_lr:
    raise InputError(f'train.min_lr = {train.min_lr} is above train.lr = {train.lr}: lower it')
  _check_weights('train', train.weights, train.source)


def _check_weights(group: str, weights: tuple[float, ...], source: tuple[str, ...]) -> None:
  good = len(weights) == len(source) and all(0 <= x < math.inf for x in weights) and any(weights)
  if weights and not good:
    raise InputError(
      f'{group}.weights = {weights!r} must have one number >= 0 for each of the {len(source)} '
      f'entries of {group}.source, not all 0; or be empty to concatenate them'
    )


def _check_mesh(options: MeshOptions) -> None:
  sizes = dataclasses.asdict(options)
  for axis, size in sizes.items():
    if size < 1 and size != -1:
      raise InputError(f'mesh.{axis} = {size}: give a number of devices, or -1 for all that remain')
  if len(filling := [axis for axis, size in sizes.items() if size == -1]) > 1:
    raise InputError(f'mesh.{filling[0]} and mesh.{filling[1]} are both -1: set one to a number of devices')


def _check_sensitivity(options: SensitivityOptions) -> None:
  bases = options.bases
  if not bases or len(set(bases)) < len(bases):
    raise InputError(f'sensitivity.bases = {bases!r}: give one or more numbers, each once')


def _check_export(options: ExportOptions) -> None:
  if options.push and not re.fullmatch(r'[\w.-]+/[\w.-]+', options.push, re.ASCII):
    raise InputError(f'export.push = {options.push!r}: give a repository of the hub, as org/name')
