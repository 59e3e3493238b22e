"""Programs lowered for a GPU that is not here."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from unclip_jax.cli.main import main
from unclip_jax.compile.cuda import examine, lower
from unclip_jax.models.layers import attend

ROOT = Path(__file__).resolve().parents[2]


def found(function, *shapes, dtype=jnp.bfloat16, chip="a100"):
    arguments = tuple(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)
    return examine(lower(jax.jit(lambda *given: function(*given)), arguments, chip))


def convolve(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def test_products_in_float32():
    """They are found inside loops, with their share of the operations."""

    def program(x, kernel):
        x = convolve(x, kernel)
        return jax.lax.scan(lambda x, _: (convolve(x.astype(jnp.float32), kernel.astype(jnp.float32))
                                          .astype(x.dtype), None), x, length=3)[0]  # fmt: skip

    both = found(program, (2, 8, 8, 16), (3, 3, 16, 16))
    assert both.operations == 2 * (2 * 2 * 8 * 8 * 16 * 9 * 16) and both.float32_share == 0.5
    assert both.largest[0][1].startswith("convolution of f32[2,8,8,16]")
    assert found(convolve, (2, 8, 8, 16), (3, 3, 16, 16)).float32 == 0


@pytest.mark.parametrize(
    "program, count",
    [
        (lambda x, k: convolve(x, k), 0),
        (lambda x, k: convolve(jnp.transpose(convolve(x, k), (0, 2, 1, 3)), k), 1),
        (lambda x, k: jnp.transpose(jax.nn.silu(convolve(x, k)), (0, 3, 1, 2)), 1),
        (lambda x, k: jnp.transpose(x, (0, 3, 1, 2)), 0),
    ],
)
def test_transposes_beside_convolutions(program, count):
    assert len(found(program, (1, 64, 64, 16), (3, 3, 16, 16)).transposes) == count


@pytest.mark.parametrize("queries, keys", [(16, 16), (15, 16), (16, 81), (257, 257)])
def test_attention_is_cudnns(queries, keys):
    """At odd lengths too, with masks, and in the gradient; in float32 and for wide heads it is ours."""
    mask = jnp.arange(keys)[None, None, None] < keys - 2

    def loss(q, k, v):
        return attend(q, k, v, mask).astype(jnp.float32).sum()

    shapes = (2, queries, 4, 64), (2, keys, 4, 64), (2, keys, 4, 64)
    got = found(jax.grad(loss, (0, 1, 2)), *shapes)
    assert got.fused == 2 and not got.plain
    assert found(attend, *shapes).fused == 1
    plain = found(attend, *shapes, dtype=jnp.float32)
    assert plain.fused == 0 and len(plain.plain) == 2
    wide = [(2, 16, 4, 160)] * 3
    assert found(attend, *wide).fused == 0 and found(attend, *wide, chip="h100").fused == 1


def test_the_command(capsys):
    """A train step and a sampler of the tiny decoder; one line for what cannot be lowered."""
    arguments = ["compile", str(ROOT / "configs/karlo/decoder.py:tiny"), "--topology"]
    assert main([*arguments, "cuda:a100", "--batch", "2"]) == 0
    out = capsys.readouterr().out
    assert "lowered for one a100, batch 2" in out and "0.00% of them in float32" in out
    assert "beside a convolution: 0" in out and "10 kernels of cuDNN, 0 products" in out
    assert main([*arguments, "cuda:a100", "--batch", "2", "--sample"]) == 0
    assert "0.00% of them in float32" in capsys.readouterr().out
    for more, message in (
        (["cuda:k80"], "unknown topology 'cuda:k80'; write cuda:a100"),
        (["cuda:a100", "--mesh", "data=8"], "compiles nothing: leave --mesh out"),
    ):
        assert main([*arguments, *more]) == 1
        assert message in capsys.readouterr().err
