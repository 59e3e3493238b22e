"""What is typed for steps, options and meshes: any text gives a value that can be used, or one line."""

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from unclip_jax.cli.options import parse_mesh, parse_numbers, parse_steps, part_options
from unclip_jax.errors import InputError
from unclip_jax.generate.options import OPTIONS, check_options, options_from

CONFIGS = {
    "decoder": {"diffusion": {"schedule": "cosine", "num_steps": 1000}},
    "prior_ar": {"model": {"buckets": 16}},
}
PIECES = st.sampled_from(
    [
        *"0123456789",
        ",",
        "[",
        "]",
        "(",
        ")",
        "-",
        ".",
        "e",
        "_",
        " ",
        "'",
        "ddim",
        "fast27",
        "nan",
        "inf",
        "None",
        "True",
    ]
)
TEXT = st.one_of(st.lists(PIECES, max_size=8).map("".join), st.text(max_size=12))
NAMES = st.sampled_from(sorted({name for kind in OPTIONS.values() for name in kind.__dataclass_fields__}))


def or_one_line(call):
    """What a function returns; None where it raises an error of one line."""
    try:
        return call()
    except InputError as error:
        assert str(error) and "\n" not in str(error)
        return None


@given(TEXT)
@example("[" * 10_000)
@example("9" * 10_000)
@example("[1" + "0" * 5000 + "]")
@example("(999, 0)")
def test_steps(text):
    """Steps that pass are distinct, descending and below T."""

    def used():
        options = options_from({"steps": parse_steps(text)})
        check_options(options, CONFIGS["decoder"])
        return options

    or_one_line(used)


@given(st.sampled_from(["decoder", "prior_ar"]), NAMES, TEXT)
@example("decoder", "guidance_interval", "[0, 1e999]")
@example("decoder", "clip", "1e999")
@example("prior_ar", "top_k", "9" * 5000)
def test_options_of_parts(kind, name, text):
    """An option that passes has a finite value."""

    def used():
        settings = part_options([f"part.{name}={text}"])["part"]
        options = options_from({"steps": 2, **settings} if kind == "decoder" else settings, kind)
        check_options(options, CONFIGS[kind])
        return options

    options = or_one_line(used)
    if options is not None:
        value = getattr(options, name)
        assert not isinstance(value, float) or np.isfinite(value)


@given(TEXT)
def test_assignments_meshes_and_numbers(text):
    or_one_line(lambda: part_options([text]))
    or_one_line(lambda: parse_mesh(text))
    assert all(np.isfinite(or_one_line(lambda: parse_numbers("--guidance", text)) or []))
