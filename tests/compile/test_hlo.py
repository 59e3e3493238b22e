"""The data that compiled programs move: hand-written programs, some in TPU form, and compiled ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from unclip_jax.compile.hlo import Program
from unclip_jax.sharding import make_mesh

LOOP = """
HloModule m

%wide.region_1.2 (p: (f32[8])) -> (f32[8]) {
  %g = f32[64,8]{1,0} all-gather(f32[8,8]{1,0} %x), replica_groups=[1,8]<=[8], dimensions={0}
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %w = (f32[8]) while((f32[8]) %t), condition=%region_2.c, body=%wide.region_1.2, TURNS
  %r = f32[8,8]{1,0} reduce-scatter(f32[64,8]{1,0} %y), replica_groups=[2,4]<=[8], dimensions={0}
  %s = (bf16[4]{0}, bf16[4]{0}) all-reduce(bf16[4]{0} %a, bf16[4]{0} %b), PAIRS, to_apply=%add
  %p = f32[16]{0} collective-permute(f32[16]{0} %z), source_target_pairs={{0,1}}
}
""".replace("TURNS", 'backend_config={"known_trip_count":{"n":"5"}}').replace(
    "PAIRS", "replica_groups={{0,1},{2,3},{4,5},{6,7}}"
)


def test_collectives_of_a_program():
    """Collectives count as often as their loop runs; bytes are those that arrive at a device."""
    moved = Program(LOOP).collectives()
    assert moved["all-gather"] == (5, 5 * 64 * 8 * 4 * 7 // 8)
    assert moved["reduce-scatter"] == (1, 8 * 8 * 4 * 3)
    assert moved["all-reduce"] == (1, 2 * 8 * 2 // 2)
    assert moved["collective-permute"] == (1, 64)
    assert Program("").collectives() == {}
    # The TPU compiler writes down no count of turns. The condition compares the counter with it.
    condition = """
%region_2.c (p: (s32[], f32[8])) -> pred[] {
  %n = s32[]{:T(128)} constant(7)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT, metadata={op_name="while/cond/lt"}
}
"""
    without = LOOP.replace(', backend_config={"known_trip_count":{"n":"5"}}', "").replace(
        "\n%wide", condition + "\n%wide"
    )
    assert Program(without).collectives()["all-gather"] == (7, 7 * 64 * 8 * 4 * 7 // 8)


GROUPS = (
    "channel_id=4, replica_groups=mesh['axis_0'=8,'axis_1'=1,'axis_2'=2], "
    "device_ids=([2,8]T(1,0)) {'axis_0'}, dimensions={0}"
)
BEHIND = """
%first (p.0: bf16[32,64], p.1: bf16[256,64], p.2: f32[128,64]) -> (f32[128,64], RESULTS) {
  %p.2 = f32[128,64]{1,0:T(8,128)} parameter(2)
  %made = f32[128,64]{1,0:T(8,128)S(1)} negate(%p.2)
  %p.0 = bf16[32,64]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %p.1 = bf16[256,64]{1,0:T(8,128)(2,1)} parameter(1)
  %gathered = bf16[256,64]{1,0:T(8,128)(2,1)} all-gather(%p.0), GROUPS
  ROOT %all = (f32[128,64]{1,0:T(8,128)S(1)}, OTHERS) tuple(%made, %p.0, %p.1, %gathered)
}

%all-reduce-scatter (input: bf16[64,16]) -> bf16[8,16] {
  %input = bf16[64,16]{1,0:T(8,128)(2,1)} parameter(0)
  %sum = bf16[64,16]{1,0:T(8,128)(2,1)} all-reduce(%input), channel_id=9, ALL, to_apply=%add
  %which = u32[] partition-id()
  %none = u32[] constant(0)
  ROOT %own = bf16[8,16]{1,0:T(8,128)(2,1)S(1)} dynamic-slice(%sum, %which, %none), dynamic_slice_sizes={8,16}
}

ENTRY %main (a: bf16[32,64], b: bf16[256,64], c: f32[128,64], d: bf16[64,16]) -> bf16[8,16] {
  %a = bf16[32,64]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %b = bf16[256,64]{1,0:T(8,128)(2,1)} parameter(1)
  %c = f32[128,64]{1,0:T(8,128)} parameter(2)
  %d = bf16[64,16]{1,0:T(8,128)(2,1)} parameter(3)
  %one = (f32[128,64]{1,0:T(8,128)S(1)}, OTHERS) fusion(%a, %b, %c), kind=kCustom, calls=%first
  %two = (f32[128,64]{1,0:T(8,128)S(1)}, OTHERS) fusion(%a, %b, %c), kind=kCustom, calls=%first
  ROOT %r = bf16[8,16]{1,0:T(8,128)(2,1)S(1)} fusion(%d), kind=kCustom, calls=%all-reduce-scatter
}
"""
for _word, _text in (
    ("GROUPS", GROUPS),
    ("RESULTS", "bf16[32,64], bf16[256,64], bf16[256,64]"),
    ("OTHERS", "bf16[32,64]{1,0:S(1)}, bf16[256,64]{1,0}, bf16[256,64]{1,0}"),
    ("ALL", "replica_groups={{0,1,2,3,4,5,6,7}}"),
):
    BEHIND = BEHIND.replace(_word, _text)


def test_collectives_behind_fusions():
    """A channel is one collective, in however many fusions it appears.

    An all-reduce of which only a slice is kept is a reduce-scatter.
    """
    program = Program(BEHIND)
    assert program.collectives() == {
        "all-gather": (1, 256 * 64 * 2 * 7 // 8),
        "reduce-scatter": (1, 64 * 16 * 2 * 7 // 8),
    }
    # Memory traffic: both fusions read c, one writes the gathered array, and the sum reads its operand and
    # writes its result. Arrays that stay on the chip do not count.
    assert program.traffic() == 2 * 128 * 64 * 4 + 256 * 64 * 2 + 2 * 64 * 16 * 2


CROSSING = """
ENTRY %main (a: f32[16,8]) -> f32[16,8] {
  %a = f32[16,8]{1,0:T(8,128)} parameter(0)
  %after = token[] after-all()
  %out = (f32[16,8]{1,0:T(8,128)}, u32[], token[]) send(%a, %after), channel_id=3, HOST
  %in = (f32[16,8]{1,0:T(8,128)}, u32[], token[]) recv(%after), channel_id=2, HOST
  %sent = token[] send-done(%out), channel_id=3, HOST
  %received = (f32[16,8]{1,0:T(8,128)}, token[]) recv-done(%in), channel_id=2, HOST
  ROOT %other = f32[16,8]{1,0:T(8,128)} get-tuple-element(%received), index=0
}
""".replace(
    "HOST",
    'is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}',
)


def test_what_crosses_from_slice_to_slice():
    """Data that hosts receive from other slices counts separately, not among the collectives.

    Sent data is read from memory; received data is written to it.
    """
    program = Program(CROSSING)
    assert program.between_slices() == (1, 16 * 8 * 4) and program.collectives() == {}
    assert program.traffic() == 16 * 8 * 4 + 16 * 8 * 4 + 4
    elsewhere = Program(CROSSING.replace("megascale", "other"))
    assert elsewhere.between_slices() == (0, 0)


COPIES = """
ENTRY %main (a: f32[64,32], b: f32[1,32], i: s32[]) -> f32[64,32] {
  %a = f32[64,32]{1,0} parameter(0)
  %b = f32[1,32]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %on = (f32[64,32]{1,0:S(1)}, f32[64,32]{1,0}, u32[]{:S(2)}) copy-start(%a)
  %done = f32[64,32]{1,0:S(1)} copy-done(%on)
  %part = ((f32[64,32]{1,0}), f32[4,32]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%a), slice={[0:4], [0:32]}
  %there = f32[4,32]{1,0:S(1)} slice-done(%part)
  %row = f32[1,32]{1,0} dynamic-slice(%a, %i, %i), dynamic_slice_sizes={1,32}
  ROOT %new = f32[64,32]{1,0} dynamic-update-slice(%a, %b, %i, %i)
}
"""


def test_traffic_of_copies_and_slices():
    """A copy to the chip reads once. A slice costs its own size, and so does writing one in place."""
    row, whole = 32 * 4, 64 * 32 * 4
    indices = 2 * 2 * 4
    assert Program(COPIES).traffic() == whole + 4 * row + 2 * row + 2 * row + indices


def compiled(function, *shapes):
    return jax.jit(function).lower(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).compile()


def test_traffic_of_a_loop():
    """A loop over layers moves as much as the unrolled layers. The compiler counts its body only once."""

    def layer(x, w):
        return jnp.tanh(x @ w), None

    def looped(x, weights):
        return jax.lax.scan(layer, x, weights)[0]

    def unrolled(x, weights):
        for w in weights:
            x = layer(x, w)[0]
        return x

    shapes = (256, 512), (12, 512, 512)
    loop, straight = compiled(looped, *shapes), compiled(unrolled, *shapes)
    counted_by_compiler = loop.cost_analysis()["bytes accessed"]
    moved, flat = Program(loop.as_text()).traffic(), Program(straight.as_text()).traffic()
    least = 12 * 512 * 512 * 4 + 24 * 256 * 512 * 4
    assert least <= moved <= 3 * least and moved > 4 * counted_by_compiler
    assert moved == pytest.approx(flat, rel=0.5)
    assert flat == pytest.approx(straight.cost_analysis()["bytes accessed"], rel=0.5)


def test_collectives_of_a_loop():
    """Sharded weights are gathered at every turn, forward and backward."""
    mesh = make_mesh({"data": 1, "fsdp": 8})
    place = lambda shape, spec: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
    whole = NamedSharding(mesh, PartitionSpec())

    def turn(x, w):
        return jnp.tanh(x @ jax.lax.with_sharding_constraint(w, whole)), None

    def loss(weights, x):
        return jnp.sum(jax.lax.scan(jax.checkpoint(turn), x, weights)[0] ** 2)

    weights, x = place((6, 64, 64), PartitionSpec(None, "fsdp")), place((16, 64), PartitionSpec("fsdp"))
    shards = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    text = jax.jit(jax.grad(loss), out_shardings=shards).lower(weights, x).compile().as_text()
    times, size = Program(text).collectives()["all-gather"]
    assert times == 12 and size == 12 * 64 * 64 * 4 * 7 // 8
    assert np.isfinite(Program(text).traffic())


PADDED = """
HloModule m

%body (p: (f32[8])) -> (f32[8]) {
  %a = bf16[2,100,96]{2,1,0} parameter(0)
  %b = bf16[2,96,128]{2,1,0} parameter(1)
  %d = bf16[2,100,128]{2,1,0} dot(%a, %b), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %w = (f32[8]) while((f32[8]) %t), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %x = bf16[2,8,8,320]{3,2,1,0} parameter(0)
  %k = bf16[3,3,320,256]{3,2,1,0} parameter(1)
  %y = bf16[2,8,8,256]{3,2,1,0} convolution(%x, %k), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f
}
"""


def test_padding_of_products():
    """Summed axes and features come in multiples of 128, rows in multiples of 8; a loop counts its turns."""
    useful = 5 * 2 * 100 * 96 * 128 + 9 * 128 * 320 * 256
    padded = 5 * 2 * 104 * 128 * 128 + 9 * 128 * 384 * 256
    assert Program(PADDED).padding() == pytest.approx(1 - useful / padded)
    assert Program("").padding() == 0


def test_padding_of_compiled_programs():
    """What the compiler writes is read: channels of 128 need none, of 64 three quarters."""
    for channels, share in ((128, 0.0), (64, 0.75)):
        text = compiled(lambda x, w: x @ w, (16, channels), (channels, channels)).as_text()
        assert Program(text).padding() == pytest.approx(share)
