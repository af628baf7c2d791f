"""What a program reads, writes and sends between devices, from its text."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from adapt_jax.machine.compiled_text import Collective, CompiledText, Kernel

TEXT = """HloModule jit_step, is_scheduled=true, num_partitions=8

%add.1 (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

%sliced (whole: f32[6,8,128], more: f32[8,128]) -> f32[8,128] {
  %whole = f32[6,8,128]{2,1,0} parameter(0)
  %more = f32[8,128]{1,0:T(8,128)} parameter(1)
  %one = f32[1,8,128]{2,1,0} dynamic-slice(%whole, %i), dynamic_slice_sizes={1,8,128}
  %flat = f32[8,128]{1,0} bitcast(%one)
  ROOT %both = f32[8,128]{1,0} add(%flat, %more)
}

%around (whole: f32[6,8,128], more: f32[8,128]) -> f32[8,128] {
  %whole = f32[6,8,128]{2,1,0} parameter(0)
  %more = f32[8,128]{1,0:T(8,128)} parameter(1)
  ROOT %inner = f32[8,128]{1,0} fusion(%whole, %more), kind=kLoop, calls=%sliced
}

%updated (whole: f32[6,8,128], part: f32[1,8,128]) -> f32[6,8,128] {
  %whole = f32[6,8,128]{2,1,0} parameter(0)
  %part = f32[1,8,128]{2,1,0} parameter(1)
  ROOT %new = f32[6,8,128]{2,1,0} dynamic-update-slice(%whole, %part, %i, %zero, %zero)
}

%body.2 (arg: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %h = bf16[64,4] get-tuple-element(%arg), index=1
  %all = bf16[64,32] all-gather(%h), replica_groups=mesh['a'=2,'b'=4] {'b'}
  %a = f32[4]{0} get-tuple-element(%arg), index=2
  %b = f32[4]{0} get-tuple-element(%arg), index=3
  %start = (f32[4]{0}, f32[4]{0}) all-reduce-start(%a, %b), replica_groups={{0,1},{2,3},{4,5},{6,7}}
  %done = (f32[4]{0}, f32[4]{0}) all-reduce-done(%start)
}

%branch.5 (arg: f32[2]) -> f32[2] {
  ROOT %moved = f32[2] collective-permute(%arg), source_target_pairs={{0,1}}
}

%other.6 (arg: f32[2]) -> f32[2] {
  ROOT %copy = f32[2] bitcast(%arg)
}

%outer.3 (arg: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %inner = f32[8,4] while(%arg), body=%body.2, backend_config={"known_trip_count":{"n":"5"}}
  %either = f32[2] conditional(%which, %a, %b), branch_computations={%branch.5, %other.6}
}

%unused.7 (arg: f32[8]) -> f32[8] {
  ROOT %never = f32[8] all-to-all(%arg), dimensions={0}
}

ENTRY %main.9 (p: f32[16,4]) -> f32[2,4] {
  %p = f32[16,4]{1,0} parameter(0)
  %loop = f32[8,4] while(%t), body=%outer.3, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %scattered = f32[2,4]{1,0} reduce-scatter(%p), dimensions={0}, to_apply=%add.1
}
"""


def test_operations_in_nested_loops_are_counted_with_their_rounds():
  assert sorted(CompiledText(TEXT).collectives(), key=lambda x: x.kind) == [
    Collective('all-gather', 'bf16[64,32]', 64 * 32 * 2, 4, 15),
    Collective('all-reduce', 'f32[4]', 32, 2, 15),  # of two arrays
    Collective('collective-permute', 'f32[2]', 8, 8, 3),
    Collective('reduce-scatter', 'f32[16,4]', 16 * 4 * 4, 8, 1),
  ]


def test_a_device_sends_to_the_others_of_its_group():
  kinds = 'all-gather', 'reduce-scatter', 'all-reduce', 'collective-permute'
  assert [Collective(kind, 'f32[25]', 100, 4, 1).sent for kind in kinds] == [75, 75, 150, 100]


@pytest.mark.parametrize(
  'shape,operation,sent,moved',
  [
    ('bf16[64,4]{1,0:T(8,128)S(1)}', 'all-gather', 64, 8),  # gathered into the chip, not into memory
    ('(bf16[8,4]{1,0}, bf16[64,4]{1,0})', 'all-gather-start', 64, 8 + 64),
    ('((bf16[8,4]{1,0}), bf16[1,4]{1,0})', 'reduce-scatter-start', 8, 8 + 1),
    ('((bf16[8,4]{1,0}), bf16[8,4]{1,0})', 'all-to-all-start', 8, 8 + 8),
    ('bf16[8,4]{1,0}', 'all-reduce-start', 8, 8 + 8),
  ],
)
def test_an_asynchronous_operation_names_its_operands_too(shape, operation, sent, moved):
  text = f"""
ENTRY %main.1 (p: bf16[8,4]) -> bf16[64,4] {{
  %p = bf16[8,4]{{1,0}} parameter(0)
  %start = {shape} {operation}(%p), replica_groups=[1,8]<=[8], dimensions={{0}}
  ROOT %done = bf16[64,4]{{1,0}} {operation.removesuffix('-start')}-done(%start)
}}
"""
  (one,) = CompiledText(text).collectives()
  assert (one.bytes, one.devices) == (sent * 4 * 2, 8)
  assert CompiledText(text).bytes_moved() == moved * 4 * 2


@pytest.mark.parametrize(
  'fusion,moved',
  [
    ('f32[8,128]{1,0} fusion(%whole, %more), kind=kLoop, calls=%sliced', 3 * 8 * 128),  # one slice, twice one
    ('f32[6,8,128]{2,1,0} fusion(%whole, %part), kind=kLoop, calls=%updated', 2 * 8 * 128),  # in place
    ('f32[8,128]{1,0:T(8,128)S(1)} negate(%more)', 8 * 128),  # the result stays on the chip
    (
      'f32[8,128]{1,0} fusion(%whole, %more), kind=kOutput, calls=%around',
      3 * 8 * 128,
    ),  # a fusion in it slices
    ('f32[1,8,128]{2,1,0:S(1)} dynamic-slice(%whole, %i)', 8 * 128),  # read, and kept on the chip
    ('(f32[8,128]{1,0:S(1)}, f32[8,128]{1,0}, u32[]{:S(2)}) copy-start(%more)', 8 * 128),
  ],
)
def test_of_a_slice_only_the_slice_is_moved(fusion, moved):
  body = f"""
ENTRY %main.1 (whole: f32[6,8,128], more: f32[8,128], part: f32[1,8,128]) -> f32[2] {{
  %whole = f32[6,8,128]{{2,1,0}} parameter(0)
  %more = f32[8,128]{{1,0:T(8,128)}} parameter(1)
  %part = f32[1,8,128]{{2,1,0}} parameter(2)
  ROOT %result = {fusion}
}}
"""
  assert CompiledText(TEXT.split('%body.2')[0] + body).bytes_moved() == 4 * moved


def test_products_and_solvers_of_kernels_are_counted():
  """As in texts of an H100: in fusions and loops, at full precision apart; asynchronous ones run beside."""
  text = """
%product (a: bf16[2,64,32], b: bf16[2,32,16]) -> bf16[2,64,16] {
  %a = bf16[2,64,32]{2,1,0} parameter(0)
  %b = bf16[2,32,16]{2,1,0} parameter(1)
  ROOT %p = bf16[2,64,16]{2,1,0} dot(%a, %b), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}
}

%body (x: (s32[], bf16[2,64,32])) -> (s32[], bf16[2,64,32]) {
  %a = bf16[2,64,32]{2,1,0} get-tuple-element(%x), index=1
  %b = bf16[2,32,16]{2,1,0} get-tuple-element(%x), index=2
  %fused = bf16[2,64,16]{2,1,0} fusion(%a, %b), kind=kCustom, calls=%product
}

ENTRY %main (m: f32[8,8], r: f32[8,4]) -> f32[8,4] {
  %m = f32[8,8]{1,0} parameter(0)
  %r = f32[8,4]{1,0} parameter(1)
  %loop = (s32[]) while(%t), body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %exact = f32[8,4]{1,0} dot(%m, %r), lhs_contracting_dims={1}, rhs_contracting_dims={0}, operand_precision={highest,highest}
  %gathered = (f32[8,4]{1,0}, f32[64,4]{1,0}) all-gather-start(%r), replica_groups=[1,8]<=[8], dimensions={0}
  %factor = (f32[8,8]{0,1}, s32[]) custom-call(%m), custom_call_target="cusolver_potrf_ffi", api_version=4
  ROOT %solved = (f32[8,4]{0,1}, s8[0]{0}) custom-call(%m, %r), custom_call_target="__cublas$triangularSolve"
}
"""  # noqa: E501 as XLA writes it
  of_product, exact, factor, solved = sorted(CompiledText(text).kernels(), reverse=True)[:1] + [
    x for x in CompiledText(text).kernels() if x.times == 1
  ]
  assert of_product == Kernel(3, 2 * 2 * 64 * 16 * 32, 0, 2 * 2 * (64 * 32 + 32 * 16 + 64 * 16))
  assert exact == Kernel(1, 0, 2 * 8 * 4 * 8, 4 * (64 + 32 + 32))
  assert (factor.exact, solved.exact) == (pytest.approx(8**3 / 3), 8 * 8 * 4)


def test_a_compiled_program_is_read():
  """A sum over rows that are split over four devices, and a product, in a loop of seven rounds."""
  mesh = jax.make_mesh((4,), ('rows',), axis_types=(AxisType.Auto,))
  split, copied = NamedSharding(mesh, PartitionSpec('rows')), NamedSharding(mesh, PartitionSpec())

  def f(x, weights):
    def step(total, w):
      summed = jax.lax.with_sharding_constraint(x.sum(0), copied)
      return jnp.tanh((total + summed) @ w), None

    return jax.lax.scan(step, jnp.zeros(128), weights)[0]

  x = jax.ShapeDtypeStruct((8, 128), jnp.float32, sharding=split)
  weights = jax.ShapeDtypeStruct((7, 128, 128), jnp.float32, sharding=copied)
  text = CompiledText(jax.jit(f).lower(x, weights).compile().as_text())
  (found,) = text.collectives()
  assert (found.kind, found.shape, found.bytes, found.devices) == ('all-reduce', 'f32[128]', 512, 4)
  read = 4 * 7 * 128 * 128
  assert read <= text.bytes_moved() < 5 * read  # of the stacked weights, each round reads its slice


@pytest.mark.parametrize('step,rounds', [(1, 7), (2, 4)])
def test_loops_without_a_note_are_counted_by_their_condition(step, rounds):
  """As the compiler of TPUs writes them."""
  text = f"""
%condition.1 (arg: (u32[], f32[8])) -> pred[] {{
  %arg = (u32[], f32[8]) parameter(0)
  %bound = u32[]{{:T(128)}} constant(7), metadata={{op_name="while"}}
  %counter = u32[]{{:T(128)}} get-tuple-element(%arg), index=0
  ROOT %less = pred[]{{:T(512)}} compare(%counter, %bound), direction=LT
}}

%body.2 (arg: (u32[], f32[8])) -> (u32[], f32[8]) {{
  %arg = (u32[], f32[8]) parameter(0)
  %old = u32[]{{:T(128)}} get-tuple-element(%arg), index=0
  %step = u32[]{{:T(128)}} constant({step})
  %new = u32[]{{:T(128)}} add(%old, %step)
  %half = f32[8]{{0}} get-tuple-element(%arg), index=1
  %sent = f32[8]{{0}} collective-permute(%half), source_target_pairs={{{{0,1}}}}
  ROOT %result = (u32[], f32[8]) tuple(%new, %sent)
}}

ENTRY %main.9 (p: (u32[], f32[8])) -> (u32[], f32[8]) {{
  %p = (u32[], f32[8]) parameter(0)
  ROOT %loop = (u32[]{{:T(128)}}, f32[8]{{0}}) while(%p), condition=%condition.1, body=%body.2, metadata={{}}
}}
"""
  assert [x.times for x in CompiledText(text).collectives()] == [rounds]
