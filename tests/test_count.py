"""What is counted in compiled programs, against hand calculations and the compiler's own count without loops."""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from lsp_jax.model import llama
from lsp_jax.perf import hlo
from lsp_jax.perf.cost import COLLECTIVES, Work, count, group_size
from lsp_jax.perf.matmul_flops import flops
from tiny import tiny_config, tiny_params


def compiled(function, *shapes, dtype=jnp.float32):
    return jax.jit(function).lower(*(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)).compile()


def work_of(function, *shapes) -> Work:
    return count(hlo.parse(compiled(function, *shapes).as_text()), 1)


@pytest.mark.parametrize(
    ("equation", "left", "right", "expected"),
    [
        ("ij,jk->ik", (64, 96), (96, 80), 2 * 64 * 96 * 80),
        ("bij,bjk->bik", (5, 64, 48), (5, 48, 32), 2 * 5 * 64 * 48 * 32),
        ("ngskrh,npkh->nkgrsp", (2, 3, 8, 2, 2, 16), (2, 24, 2, 16), 2 * 2 * 3 * 8 * 2 * 2 * 16 * 24),
    ],
)
def test_products_equal_the_hand_calculation_and_the_compilers_count(equation, left, right, expected):
    program = compiled(lambda a, b: jnp.einsum(equation, a, b), left, right)
    assert count(hlo.parse(program.as_text()), 1).flops == expected
    analysis = program.cost_analysis()
    assert expected <= analysis["flops"] <= 1.05 * expected  # its own count adds what is not a product


def test_a_model_without_loops_equals_the_hand_calculation_and_the_compilers_count():
    config = tiny_config(num_hidden_layers=1, hidden_size=128, intermediate_size=256, head_dim=32, vocab_size=512)
    params, tokens = tiny_params(config), jnp.zeros((4, 32), jnp.int32)
    program = jax.jit(llama.forward, static_argnums=1).lower(params, config, tokens).compile()
    rows, length, heads = 4, 32, config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    matrices = 128 * (2 * heads + 2 * kv) + 3 * 128 * 256 + 128 * 512
    expected = 2 * rows * length * matrices + 4 * rows * length * length * heads
    found = count(hlo.parse(program.as_text()), 1).flops
    assert found == expected
    assert 0.9 < found / program.cost_analysis()["flops"] <= 1.0


def test_a_loop_counts_as_often_as_it_runs():
    def chain(x, matrices):
        return jax.lax.scan(lambda x, matrix: (x @ matrix, None), x, matrices)[0]

    work = work_of(chain, (16, 32), (7, 32, 32))
    assert work.flops == 7 * 2 * 16 * 32 * 32 and work.unknown_loops == 0
    # each turn reads one matrix, not the stack of all
    assert 7 * 4 * 32 * 32 <= work.bytes < 3 * 7 * 4 * (32 * 32 + 2 * 16 * 32)


def test_a_loop_that_may_end_early_counts_at_its_longest():
    def decode(x, matrix):
        def going(state):
            return (state[0] < 50) & ~jnp.all(state[1] > 1e9)

        return jax.lax.while_loop(going, lambda state: (state[0] + 1, state[1] @ matrix), (0, x))[1]

    assert work_of(decode, (16, 32), (32, 32)).flops == 50 * 2 * 16 * 32 * 32


CONVOLUTIONS = [
    # [8, 128, 64] x [8, 64, 128], contracted over the 8 too
    (
        "f32[8,128,64]{2,1,0}",
        "f32[8,64,32]{2,1,0}",
        "f32[1,128,32]",
        "window={size=8}, dim_labels=0bf_0io->0bf",
        8 * 64,
    ),
    # a batch of 8 products, spelled as a window that meets one real element a position
    (
        "f32[8,128,64]{2,1,0}",
        "f32[8,64,32]{2,1,0}",
        "f32[8,128,32]",
        "window={size=8 stride=7 lhs_dilate=8}, dim_labels=0bf_0io->0bf",
        64,
    ),
    # every pair of an outer product over the window's axis: 4 heads written by padding
    (
        "bf16[8,128,64]{2,1,0}",
        "bf16[4,32,64]{2,1,0}",
        "bf16[8,128,4,32]",
        "window={size=1x4 pad=0_0x3_3 rhs_reversal=0x1}, dim_labels=0bf1_1oi0->0b1f",
        64,
    ),
]


@pytest.mark.parametrize(("left", "right", "made", "attributes", "depth"), CONVOLUTIONS)
def test_a_product_spelled_as_a_convolution_counts_its_real_products(left, right, made, attributes, depth):
    if "1oi0" in attributes:  # the labels name an axis that the shapes leave out
        left, right = left.replace("64]{2,1,0}", "64,1]{3,2,1,0}"), right.replace("64]{2,1,0}", "64,1]{3,2,1,0}")
    text = f"""HloModule m

ENTRY %main (a: x, b: y) -> z {{
  %a = {left} parameter(0)
  %b = {right} parameter(1)
  ROOT %c = {made}{{0}} convolution(%a, %b), {attributes}
}}
"""
    program = hlo.parse(text)
    assert flops(program.entry, program.entry.root) == 2 * program.entry.root.arrays[0].size * depth


COLLECTIVE_PROGRAM = """HloModule m

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%body (s: (s32[], f32[64])) -> (s32[], f32[64]) {
  %s = (s32[], f32[64]{0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %v = f32[64]{0} get-tuple-element(%s), index=1
  %r = f32[64]{0} all-reduce(%v), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %t = (s32[], f32[64]{0}) tuple(%i, %r)
}

%condition (s: (s32[], f32[64])) -> pred[] {
  %s = (s32[], f32[64]{0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %bound = s32[] constant(5)
  ROOT %less = pred[] compare(%i, %bound), direction=LT
}

%slice_sum (p: f32[64], i: s32[]) -> f32[8] {
  %p = f32[64]{0} parameter(0)
  %i = s32[] parameter(1)
  %r = f32[64]{0} all-reduce(%p), replica_groups=[1,8]<=[8], to_apply=%add
  ROOT %d = f32[8]{0} dynamic-slice(%r, %i), dynamic_slice_sizes={8}
}

ENTRY %main (a: f32[8], n: s32[]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %n = s32[] parameter(1)
  %g = f32[64]{0} all-gather(%a), replica_groups=[1,8]<=[8], dimensions={0}
  %start = (f32[8]{0}, f32[64]{0}) all-gather-start(%a), replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}, dimensions={0}
  %done = f32[64]{0} all-gather-done(%start)
  %pair = (s32[], f32[64]{0}) tuple(%n, %g)
  %loop = (s32[], f32[64]{0}) while(%pair), condition=%condition, body=%body
  %v = f32[64]{0} get-tuple-element(%loop), index=1
  %moved = f32[64]{0} collective-permute(%v), source_target_pairs={{0,1},{1,0}}
  ROOT %out = f32[8]{0} fusion(%moved, %n), kind=kCustom, calls=%slice_sum
}
"""


def test_collectives_count_what_a_chip_receives_as_often_as_their_loop_runs():
    work = count(hlo.parse(COLLECTIVE_PROGRAM), 8)
    assert work.collectives == pytest.approx(
        {
            "all-gather": 256 * 7 / 8 + 256 * 3 / 4,
            "all-reduce": 5 * 2 * 256 * 3 / 4,
            "collective-permute": 256,
            "reduce-scatter": 256 * 7 / 8,
        }
    )
    assert work.network == pytest.approx(sum(work.collectives.values()))


def test_ring_bytes_by_hand():
    # 4 chips, 100 bytes whole: each is sent three quarters once (gather), and a sum goes around twice
    assert COLLECTIVES["all-gather"](25, 100, 4) == 75
    assert COLLECTIVES["reduce-scatter"](100, 25, 4) == 75
    assert COLLECTIVES["all-reduce"](100, 100, 4) == 150


def test_group_sizes_in_every_spelling():
    assert group_size("replica_groups={{0,1},{2,3}}", 4) == 2
    assert group_size("replica_groups=[4,8]<=[8,4]T(1,0)", 32) == 8
    assert group_size("replica_groups=mesh['a'=2,'b'=4,'c'=3] {'a','c'}", 24) == 6
    assert group_size("replica_groups={}", 16) == 16


def test_shapes_with_layouts_and_memory_spaces():
    found = hlo.arrays("(bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, f32[]{:T(128)}, pred[<=4,2]{1,0}, s4[3])")
    assert [array.shape for array in found] == [(8, 128), (), (4, 2), (3,)]
    assert [array.bytes for array in found] == [2048, 4, 8, 1.5]
    assert [array.stored for array in found] == [0, 4, 8, 1.5]


SPLIT = """
import jax, numpy as np
mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "x"))
left = jax.ShapeDtypeStruct((16, 32), np.float32)
right = jax.ShapeDtypeStruct((32, 64), np.float32, sharding=split)
print(jax.jit(jax.numpy.dot).lower(left, right).compile().as_text())
"""


@pytest.mark.full
def test_a_program_over_devices_reads_its_share():
    """One chip's text: a matrix split over 4 devices by its columns counts a quarter on each."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    done = subprocess.run(
        [sys.executable, "-c", SPLIT], capture_output=True, text=True, env=environment, timeout=120, check=True
    )
    assert count(hlo.parse(done.stdout), 4).flops == 2 * 16 * 32 * 64 / 4


ATTENTION = """HloModule m

ENTRY %main (q: x) -> y {
  %t = s8[1,1,1]{2,1,0} parameter(0)
  %q = bf16[2,4,256,128]{3,2,1,0} parameter(1)
  %k = bf16[2,2,256,128]{3,2,1,0} parameter(2)
  %splash_mha_fwd_no_residuals.1 = bf16[2,4,256,128]{3,2,1,0} custom-call(%t, %t, %q, %k, %k), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
}}, metadata={op_name="x"}
  %splash_mha_dq_no_residuals.1 = bf16[2,4,256,128]{3,2,1,0} custom-call(%t, %t, %q, %k, %k), custom_call_target="tpu_custom_call"
  %fwd = (bf16[8,4,256,128]{3,1,2,0}, u8[0]{0}) custom-call(%q, %k, %k), custom_call_target="__cudnn$fmhaSoftmax", backend_config={"intermediate_tensor_shape": {"dimensions": ["8", "4", "256", "256"]}, "mask_type": "CAUSAL"}
  ROOT %bwd = (bf16[8,4,256,128]{3,1,2,0}, u8[0]{0}) custom-call(%q, %k, %k), custom_call_target="__cudnn$fmhaSoftmaxBackward", backend_config={"intermediate_tensor_shape": {"dimensions": ["8", "4", "256", "256"]}, "mask_type": "CAUSAL"}
}
"""  # noqa: E501


SPREAD = """HloModule m

%product (l: f32[16,32], r: f32[32,8]) -> f32[16,8] {
  %l = f32[16,32]{1,0} parameter(0)
  %r = f32[32,8]{1,0} parameter(1)
  ROOT %p = f32[16,8]{1,0} dot(%l, %r), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%gather_begins (a: f32[64]) -> (f32[64], f32[256]) {
  %a = f32[64]{0} parameter(0)
  %g = f32[256]{0} all-gather(%a), channel_id=7, replica_groups=[1,4]<=[4], dimensions={0}
  ROOT %t = (f32[64]{0}, f32[256]{0}) tuple(%a, %g)
}

%gather_goes_on (a: f32[64], b: f32[256], l: f32[16,32], r: f32[32,8]) -> (f32[16,8], f32[64], f32[256]) {
  %a = f32[64]{0} parameter(0)
  %b = f32[256]{0} parameter(1)
  %l = f32[16,32]{1,0} parameter(2)
  %r = f32[32,8]{1,0} parameter(3)
  %g = f32[256]{0} all-gather(%a), channel_id=7, replica_groups=[1,4]<=[4], dimensions={0}
  %p = f32[16,8]{1,0} fusion(%l, %r), kind=kOutput, calls=%product
  ROOT %t = (f32[16,8]{1,0}, f32[64]{0}, f32[256]{0}) tuple(%p, %a, %b)
}

ENTRY %main (a: f32[64], l: f32[16,32], r: f32[32,8]) -> f32[16,8] {
  %a = f32[64]{0} parameter(0)
  %l = f32[16,32]{1,0} parameter(1)
  %r = f32[32,8]{1,0} parameter(2)
  %start = (f32[64]{0}, f32[256]{0}) fusion(%a), kind=kCustom, calls=%gather_begins
  %own = f32[64]{0} get-tuple-element(%start), index=0
  %all = f32[256]{0} get-tuple-element(%start), index=1
  %on = (f32[16,8]{1,0}, f32[64]{0}, f32[256]{0}) fusion(%own, %all, %l, %r), kind=kOutput, calls=%gather_goes_on
  %moved = ((f32[256]{0}), f32[64]{0:S(1)}, s32[]{:S(2)}) slice-start(%all), slice={[0:64]}
  ROOT %out = f32[16,8]{1,0} get-tuple-element(%on), index=0
}
"""


def test_a_collective_spread_over_kernels_counts_once_and_a_prefetch_only_its_slice():
    work = count(hlo.parse(SPREAD), 4)
    assert work.collectives == {"all-gather": 1024 * 3 / 4}
    assert work.flops == 2 * 16 * 32 * 8
    gathered, product, prefetched = 4 * (64 + 256), 4 * (16 * 32 + 32 * 8 + 16 * 8), 4 * 64
    assert work.bytes == gathered + product + prefetched


def test_fused_attention_counts_half_of_the_scores():
    program = hlo.parse(ATTENTION)
    found = [flops(program.entry, instruction) for instruction in program.entry.instructions.values()]
    splash, cudnn = 2 * 4 * 256 * 256 * 128, 8 * 4 * 256 * 256 * 128  # one product's operations, causal
    assert found == [0, 0, 0, 2 * splash, 3 * splash, 2 * cudnn, 5 * cudnn]
