"""Where captioned images come from: every source is an indexed array of records that any thread may read.

`SOURCES` lists the kinds, one file each, and `make_source` builds one from a config:

    make_source({"name": "tfrecord", "pattern": "gs://bucket/laion/*.tfrecord", "filters": {"min_side": 256}})

Paths with "://" are read through `tf.io.gfile`, and a `tfds` source needs tensorflow-datasets. Nothing else
here needs TensorFlow.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping

from unclip_jax.data.balance import balanced
from unclip_jax.data.record import Source
from unclip_jax.data.sources.embeddings import embeddings_source, with_embeddings
from unclip_jax.data.sources.emoji import emoji_source
from unclip_jax.data.sources.folder import folder_source
from unclip_jax.data.sources.tfds import tfds_source
from unclip_jax.data.sources.tfrecord import tfrecord_source
from unclip_jax.data.sources.webdataset import webdataset_source
from unclip_jax.data.text_states import with_text_states
from unclip_jax.errors import InputError

# All kinds of source, by the name that configs use.
SOURCES = {
    "emoji": emoji_source,
    "tfrecord": tfrecord_source,
    "webdataset": webdataset_source,
    "tfds": tfds_source,
    "folder": folder_source,
    "embeddings": embeddings_source,
}


# The types that an argument's annotation stands for, where it is to be a text.
TEXTS = {"str": (str, os.PathLike), "str | None": (str, os.PathLike, type(None))}


def make_source(config: Mapping) -> Source:
    """The source that a config describes.

    Args:
      config: {"name": one of SOURCES, the arguments of that source, "filters": {fields of `Filters`}}. Any
        source also takes "balance": {"by": a field of the metadata, "power": 0 to 1} (see `balanced`). Any
        source of images also takes "embeddings": the folder that `unclip embed` made of it (see
        `with_embeddings`), or "text_states": the one of `unclip embed --t5` (`with_text_states`).

    Raises `ValueError` naming an unknown source, argument or filter and what is allowed instead, and the
    errors of the source itself.
    """
    if not hasattr(config, "keys"):
        raise InputError(f"a data source is a name and its arguments, got {config!r}")
    arguments = {key: config[key] for key in config}
    balance, embeddings = arguments.pop("balance", None), arguments.pop("embeddings", None)
    states = arguments.pop("text_states", None)
    name = arguments.pop("name", None)
    if not isinstance(name, str) or name not in SOURCES:
        raise InputError(f"unknown data source {name!r}: choose one of {', '.join(SOURCES)}")
    parameters = inspect.signature(SOURCES[name]).parameters
    for key in arguments:
        if key not in parameters:
            raise InputError(
                f"unknown key {key!r} for data source {name!r}: allowed are {', '.join(parameters)}"
            )
    for key, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and arguments.get(key) in (None, ""):
            raise InputError(f"data source {name!r} needs {key!r}: set it in the config")
        value, texts = arguments.get(key), TEXTS.get(str(parameter.annotation))
        if texts is not None and key in arguments and not isinstance(value, texts):
            raise InputError(f"{key}={value!r} of data source {name!r}: expected a text")
    source = SOURCES[name](**arguments)
    beside = (("embeddings", embeddings, with_embeddings), ("text_states", states, with_text_states))
    for key, folder, add in beside:
        if folder is not None:
            if not isinstance(folder, (str, os.PathLike)):
                raise InputError(f"{key}={folder!r} of data source {name!r}: expected a text")
            source = add(source, folder)
    if balance is None:
        return source
    if not hasattr(balance, "keys") or set(balance) != {"by", "power"}:
        given = list(balance) if hasattr(balance, "keys") else balance
        raise InputError(f"balance needs 'by' and 'power' and no other key, got {given!r}")
    return balanced(source, balance["by"], balance["power"])
