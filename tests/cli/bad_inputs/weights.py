"""Bad inputs of the verbs that read and write weights: bundles, their files, and public weights."""

import json
import os
import shutil
import struct
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from tests.cli.bad_inputs import Row
from tests.cli.bad_inputs.public import CLIP, DELETE, public_rows, set_in, write_json
from tests.cli.bad_inputs.stable_unclip import stable_unclip_rows
from unclip_jax.checkpoint.load import SHIPPED

PARTS = ("clip", "codec", "prior_diffusion", "prior_ar")
BASE = "good"


def small_bundle(folder, *names, source=SHIPPED / "emoji", copy_function=shutil.copy):
    """Parts of the shipped bundle."""
    top = json.loads((SHIPPED / "emoji" / "bundle.json").read_text())
    for name in names:
        shutil.copytree(source / name, folder / name, copy_function=copy_function)
    top["parts"] = {name: top["parts"][name] for name in names}
    write_json(folder / "bundle.json", top | {"sampling": {}, "provenance": {}})
    return folder


# ------------------------------------------------------------------------------------------- bundles
TOP = [
    ("no parts", ["parts"], {}, "lists no parts"),
    ("parts in a list", ["parts"], ["clip"], "parts must be an object, not ['clip']"),
    ("no list of parts", ["parts"], DELETE, "parts must be an object, not None"),
    ("a part that leads outside", ["parts", "../evil"], {"hash": "0"}, "'../evil' is no name of a part"),
    ("a part by its path", ["parts", "/tmp/evil"], {"hash": "0"}, "'/tmp/evil' is no name of a part"),
    ("a part in capitals", ["parts", "Clip"], {"hash": "0"}, "'Clip' is no name of a part"),
    ("a part without a name", ["parts", ""], {"hash": "0"}, "'' is no name of a part"),
    ("a part with a dot", ["parts", "."], {"hash": "0"}, "'.' is no name of a part"),
    ("a part with a line break", ["parts", "a\nb"], {"hash": "0"}, r"'a\nb' is no name of a part"),
    ("a part that is not there", ["parts", "decoder"], {"hash": "0"}, "decoder/config.json is missing"),
    ("a part that is a number", ["parts", "codec"], 3, "part codec must be an object, not 3"),
    ("a hash that is a number", ["parts", "codec", "hash"], 3, "part codec: hash must be text, not 3"),
    ("no hash", ["parts", "codec", "hash"], DELETE, "part codec lacks 'hash'"),
    ("another hash", ["parts", "codec", "hash"], "00", "hash differs"),
    ("a count in words", ["parts", "codec", "parameters"], "many", "parameters must be an integer"),
    ("an unknown key", ["colour"], 1, "unknown key 'colour'"),
    ("no version", ["format_version"], DELETE, "has format version None"),
    ("a version in words", ["format_version"], "two", "has format version 'two'"),
    ("a version to come", ["format_version"], 3, "format version 3; this version reads 1 and 2"),
    ("a system that is a list", ["system"], [], "system must be text, not []"),
    ("no system", ["system"], DELETE, "lacks 'system'"),
    ("sampling in words", ["sampling"], "fast", "sampling must be an object, not 'fast'"),
    (
        "a part's sampling in words",
        ["sampling", "prior_ar"],
        "fast",
        "prior_ar must be an object, not 'fast'",
    ),
    ("an unknown option", ["sampling", "prior_ar"], {"colour": 1}, "unknown sampling option"),
    ("codes in words", ["sampling", "prior_ar"], {"top_k": "many"}, "top_k"),
    ("no codes", ["sampling", "prior_ar"], {"top_k": 0}, "top_k"),
    ("no provenance", ["provenance"], None, "provenance must be an object, not None"),
    ("training in a list", ["provenance", "training"], [], "training must be an object, not []"),
]
CONFIGS = [
    ("no kind", "clip", ["kind"], DELETE, "unknown kind of network None"),
    ("an unknown kind", "clip", ["kind"], "vqgan", "unknown kind of network 'vqgan'"),
    ("a kind of another part", "clip", ["kind"], "decoder", "lacks 'diffusion'"),
    ("a kind that is a list", "clip", ["kind"], ["clip"], "unknown kind of network ['clip']"),
    ("no model", "clip", ["model"], DELETE, "lacks 'model'"),
    ("a model in words", "clip", ["model"], "ViT-L", "model must be an object, not 'ViT-L'"),
    ("an unknown setting", "clip", ["model", "colour"], 1, "model: unknown key 'colour'"),
    ("a width in words", "clip", ["model", "image", "width"], "wide", "width must be an integer, not 'wide'"),
    ("a width that is true", "clip", ["model", "image", "width"], True, "width must be an integer, not True"),
    ("a width with a fraction", "clip", ["model", "image", "width"], 192.5, "width must be an integer"),
    ("a negative width", "clip", ["model", "image", "width"], -192, "width must be between 1 and"),
    ("another width", "clip", ["model", "image", "width"], 186, "does not hold the network"),
    ("no heads", "clip", ["model", "image", "heads"], 0, "heads must be between 1 and"),
    ("heads that do not divide", "clip", ["model", "image", "heads"], 7, "not a multiple of heads 7"),
    ("other layers", "clip", ["model", "text", "layers"], 3, "parameters are missing: text_tower"),
    ("endless layers", "clip", ["model", "text", "layers"], 10**12, "layers must be between 1 and 1000"),
    ("a patch beyond the image", "clip", ["model", "image", "patch_size"], 128, "does not hold the network"),
    ("no patches", "clip", ["model", "image", "patch_size"], 0, "patch_size must be between 1 and"),
    ("an unknown activation", "clip", ["model", "activation"], "relu", "unknown activation 'relu'"),
    ("no image tower", "clip", ["model", "image"], None, "tensors have no use: image_tower"),
    (
        "two numbers as mean",
        "clip",
        ["model", "image", "mean"],
        [0.5, 0.5],
        "mean must be a list of 3 numbers",
    ),
    ("no deviation", "clip", ["model", "image", "std"], [0, 0, 0], "std must be between"),
    ("no tokenizer", "clip", ["tokenizer"], DELETE, "lacks 'tokenizer'"),
    ("a tokenizer in words", "clip", ["tokenizer"], "bpe", "tokenizer must be an object, not 'bpe'"),
    ("another tokenizer", "clip", ["tokenizer", "kind"], "spm", "unknown tokenizer kind 'spm'"),
    ("another vocabulary", "clip", ["tokenizer", "vocab_sha256"], "00", "names another vocabulary"),
    ("fewer tokens", "clip", ["tokenizer", "vocab_size"], 600, "and the tokenizer makes 24 of 600"),
    ("tokens beyond CLIP's", "clip", ["tokenizer", "vocab_size"], 10**6, "vocab_size=1000000 must lie in"),
    ("merges in a text", "clip", ["tokenizer", "merges"], "ab", "merges must be a list of texts, not 'ab'"),
    ("shorter captions", "clip", ["tokenizer", "length"], 8, "the text encoder reads 24 of 8192 tokens"),
    ("frozen in a list", "clip", ["frozen"], [], "frozen must be an object, not []"),
    ("a frozen part outside", "codec", ["frozen"], {"../a": "0"}, "'../a' is no name of a part"),
    ("a hash that is a list", "codec", ["frozen", "clip"], [], "frozen: clip must be text, not []"),
    ("no dimensions", "codec", ["embed_dim"], DELETE, "lacks 'embed_dim'"),
    ("other dimensions", "codec", ["embed_dim"], 64, "shapes differ"),
    (
        "a schedule in numbers",
        "prior_diffusion",
        ["diffusion", "schedule"],
        3,
        "schedule must be text, not 3",
    ),
    ("a schedule unknown", "prior_diffusion", ["diffusion", "schedule"], "sine", "unknown schedule 'sine'"),
    ("a prediction unknown", "prior_diffusion", ["diffusion", "prediction"], "y", "unknown prediction 'y'"),
    ("no time steps", "prior_diffusion", ["diffusion", "num_steps"], 0, "num_steps must be between 2 and"),
    ("endless time", "prior_diffusion", ["diffusion", "num_steps"], 10**15, "num_steps must be between 2"),
    ("no space", "prior_diffusion", ["embedding_space"], DELETE, "lacks 'embedding_space'"),
    ("an unknown space", "prior_diffusion", ["embedding_space", "kind"], "flat", "unknown kind 'flat'"),
    ("no mean", "prior_diffusion", ["embedding_space", "mean"], None, "embedding_space lacks 'mean'"),
    ("a short mean", "prior_diffusion", ["embedding_space", "mean"], [0.0], "mean has 1 numbers"),
    ("zero std", "prior_diffusion", ["embedding_space", "std"], [0.0] * 128, "std must be positive"),
    ("dropout of one", "prior_diffusion", ["model", "dropout"], 1, "dropout must be in [0, 1), not 1"),
    ("another length", "prior_diffusion", ["model", "length"], 25, "does not hold the network"),
    ("a length of text", "prior_diffusion", ["model", "length"], "24", "length must be an integer, not '24'"),
    ("edges in words", "prior_ar", ["dot_edges"], "none", "dot_edges must be a list of numbers, not 'none'"),
    ("too few edges", "prior_ar", ["dot_edges"], [0.1], "dot_edges must be 15 ascending numbers"),
    ("other buckets", "prior_ar", ["model", "buckets"], 64, "shapes differ"),
    ("more codes", "prior_ar", ["model", "codes"], 40, "shapes differ"),
]
# What stands in place of a JSON file.
TEXTS = [
    ("half an object", '{"kind": ', "is not valid JSON"),
    ("a list", "[]", "does not hold a JSON object"),
    ("nothing", "", "is not valid JSON"),
    ("NaN", '{"kind": NaN}', "NaN is no number of JSON"),
    ("a key twice", '{"kind": "clip", "kind": "codec"}', "the key 'kind' stands there twice"),
    ("lists without end", "[" * 100_000, "is not valid JSON"),
    ("digits without end", '{"kind": ' + "1" * 5000 + "}", "is not valid JSON"),
]


def bundle_rows(box):
    """Changed bundles: `convert` reads them, and `sample` some of them."""
    count = 0

    def changed(*parts):
        nonlocal count
        count += 1
        return small_bundle(box / f"bundle_{count}", *parts, source=box / BASE, copy_function=os.link)

    def row(name, folder, says):
        return Row(f"a bundle with {name}", ["convert", folder.name, "--out", "made"], says)

    def with_value(folder, file, path, new):
        value = json.loads((folder / file).read_text())
        set_in(value, path, new)
        write_json(folder / file, value)
        return folder

    for name, path, new, says in TOP:
        folder = changed("prior_ar" if path[0] == "sampling" else "codec")
        yield row(name, with_value(folder, "bundle.json", path, new), says)
    for name, part, path, new, says in CONFIGS:
        yield row(f"{name} in {part}", with_value(changed(part), f"{part}/config.json", path, new), says)
    other = with_value(changed("clip", "codec"), "codec/config.json", ["frozen", "clip"], "0123456789abcdef")
    yield row("another CLIP under the codec", other, "was trained in the embedding space of CLIP 0123")
    for name, text, says in TEXTS:
        for file in ("bundle.json", "codec/config.json"):
            folder = changed("codec")
            write_json(folder / file, text)
            yield row(f"{name} as {file}", folder, says)
    for name, damage, says in DAMAGES:
        folder = changed(name.split()[-1] if name.split()[-1] in PARTS else "codec")
        damage(folder)
        yield row(name, folder, says)
        if name in SAMPLED:
            yield Row(f"sample from {name}", ["sample", "x", "--bundle", folder.name], says)


def edited(part, change):
    """A damage: changed tensors of a part."""

    def damage(folder):
        file = folder / part / "model.safetensors"
        held = load_file(file)
        change(held)
        file.unlink()
        save_file(held, file)

    return damage


def raw(part, data):
    """A damage: other bytes as a part's weights."""

    def damage(folder):
        file = folder / part / "model.safetensors"
        held = file.read_bytes()
        file.unlink()
        file.write_bytes(data(held) if callable(data) else data)

    return damage


def header(text):
    return struct.pack("<Q", len(text)) + text.encode() + bytes(8)


def linked(file):
    """A damage: a link out of the bundle in place of a file."""

    def damage(folder):
        (folder / file).rename(folder.parent / f"outside_{folder.name}")
        (folder / file).symlink_to(folder.parent / f"outside_{folder.name}")

    return damage


def pickled(folder):
    (folder / "codec" / "model.safetensors").rename(folder / "codec" / "model.bin")


TENSOR = '{"a": {"dtype": "%s", "shape": [%s], "data_offsets": [0, %s]}}'
DAMAGES = [
    ("NaN in clip", edited("clip", lambda w: w["text_tower/position_embedding"].fill(np.nan)), "not finite"),
    ("infinity in prior_ar", edited("prior_ar", lambda w: w["logits_out/bias"].fill(np.inf)), "not finite"),
    ("integers", edited("codec", lambda w: w.update(mean=np.zeros(128, np.int32))), "quantised weights"),
    ("a tensor too few", edited("codec", lambda w: w.pop("mean")), "parameters are missing: mean"),
    ("a tensor too many", edited("codec", lambda w: w.update(more=w["low"])), "tensors have no use: more"),
    ("a short tensor", edited("codec", lambda w: w.update(mean=np.zeros(5, np.float32))), "shapes differ"),
    ("other values", edited("codec", lambda w: w.update(mean=w["low"])), "hash differs"),
    ("no weights", lambda f: (f / "codec" / "model.safetensors").unlink(), "and with it the weights"),
    ("a pickle", pickled, "is a pickle, which could run code"),
    ("no part's folder", lambda f: shutil.rmtree(f / "codec"), "codec/config.json is missing"),
    ("empty weights", raw("codec", b""), "cannot be read as safetensors"),
    ("weights cut short", raw("codec", lambda held: held[:-3]), "cannot be read as safetensors"),
    ("words as weights", raw("codec", b"no weights here" * 9), "cannot be read as safetensors"),
    ("an endless header", raw("codec", struct.pack("<Q", 2**62) + b"{}"), "cannot be read as safetensors"),
    ("a header of no JSON", raw("codec", header("{]")), "cannot be read as safetensors"),
    ("a header in a list", raw("codec", header("[]")), "cannot be read as safetensors"),
    (
        "offsets beyond the end",
        raw("codec", header(TENSOR % ("F32", 2, 80))),
        "cannot be read as safetensors",
    ),
    ("an unknown type", raw("codec", header(TENSOR % ("F3", 2, 8))), "cannot be read as safetensors"),
    ("a shape without end", raw("codec", header(TENSOR % ("F32", 2**60, 8))), "cannot be read as safet"),
    ("a link as bundle.json", linked("bundle.json"), "outside the bundle; copy the file there"),
    ("a link as config.json", linked("codec/config.json"), "outside the bundle; copy the file there"),
    ("a link as weights", linked("codec/model.safetensors"), "outside the bundle; copy the file there"),
    ("a link as a part", linked("codec"), "outside the bundle; copy the file there"),
]
SAMPLED = ("NaN in clip", "a link as a part", "a pickle", "a short tensor")


# ------------------------------------------------------------------------------------------- verbs
def runs(box, name, meta=None):
    """A folder with one run, whose newest checkpoint holds this description alone."""
    step = box / name / "run" / "checkpoints" / "5"
    step.mkdir(parents=True)
    if meta is not None:
        write_json(step / "meta" / "metadata", meta)
    return ["bundle", name, "--out", "made"]


def run_rows(box):
    """Runs whose checkpoints are damaged."""
    (box / "none" / "run" / "checkpoints").mkdir(parents=True)
    return [
        Row("a run without checkpoints", ["bundle", "none", "--out", "made"], "no complete checkpoint in"),
        Row("a checkpoint without files", runs(box, "bare"), "checkpoint 5 in"),
        Row("a checkpoint of half a word", runs(box, "half", '{"na'), "is damaged"),
        Row("a checkpoint of a list", runs(box, "list", "[]"), "must be an object, not []"),
        Row("a checkpoint with a list as part", runs(box, "partly", {"part": []}), "part must be an object"),
        Row(
            "a checkpoint with a number as name", runs(box, "number", {"name": 3}), "name must be text, not 3"
        ),
        Row("a checkpoint without weights", runs(box, "empty", {"name": "clip"}), "is damaged"),
        Row("a base that is none", [*runs(box, "based"), "--base", "nowhere"], "nowhere is not a bundle"),
    ]


def verb_rows(box):
    """Places to read and write that are none."""
    (box / "file").write_text("x")
    (box / "full").mkdir()
    (box / "full" / "thesis.tex").write_text("x")
    shutil.copytree(box / BASE, box / "mine", copy_function=os.link)
    (box / "mine" / "notes.txt").write_text("x")
    (box / "odd").mkdir()
    save_file({"weight": np.zeros(1)}, box / "odd" / "model.safetensors")
    for name, shape in (("openai", 320), ("laion", 768)):
        (box / name).mkdir()
        tensors = {
            "visual.conv1.weight": np.zeros((shape, 3, 8, 8), np.float16),
            "visual.positional_embedding": np.zeros((5, shape), np.float16),
            "token_embedding.weight": np.zeros((10, 512), np.float16),
            "text_projection": np.zeros((512, 512), np.float16),
        }
        save_file(tensors, box / name / "model.safetensors")
    (box / "pointers").mkdir()
    (box / "pointer").mkdir()
    write_json(box / "pointers" / "config.json", CLIP)
    for file in ("pointers/model.safetensors", "pointer/bundle.json"):
        (box / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    (box / "variants").mkdir()
    write_json(box / "variants" / "config.json", CLIP)
    for precision in ("fp16", "bf16"):
        save_file({"weight": np.zeros(1)}, box / "variants" / f"model.{precision}.safetensors")
    return [
        Row("convert nothing", ["convert", "nowhere", "--out", "made"], "nowhere is not a bundle"),
        Row("convert a file", ["convert", "file", "--out", "made"], "file is not a bundle"),
        Row("convert an empty name", ["convert", "", "--out", "made"], "a path is not empty"),
        Row("convert from an unknown store", ["convert", "s3://b/x", "--out", "made"], "s3://b/x"),
        Row("convert an unpinned repository", ["convert", "hf:a/b", "--out", "made"], "@revision"),
        Row("convert onto a file", ["convert", BASE, "--out", "file"], "file exists and is not a bundle"),
        Row("convert below a file", ["convert", BASE, "--out", "file/b"], "Not a directory"),
        Row("convert onto a folder", ["convert", BASE, "--out", "full"], "full exists and is not a bundle"),
        Row("convert onto more than a bundle", ["convert", BASE, "--out", "mine"], "also holds notes.txt"),
        Row("convert to an unknown type", ["convert", BASE, "--out", "made", "--dtype", "int8"], "int8"),
        Row("export without parts", ["export", BASE, "--out", "made"], "it lacks decoder"),
        Row("export onto a folder", ["export", BASE, "--out", "full"], "full exists and is not empty"),
        Row("export onto a file", ["export", BASE, "--out", "file"], "file exists and is not empty"),
        Row("export nothing", ["export", "nowhere", "--out", "made"], "nowhere is not a bundle"),
        Row("bundle without runs", ["bundle", "full", "--out", "made"], "full has no run"),
        Row("bundle nothing", ["bundle", "nowhere", "--out", "made"], "nowhere has no run"),
        Row("bundle onto a folder", ["bundle", "full", "--out", "full"], "full exists and is not a bundle"),
        Row("bundle one row", ["bundle", "full", "--out", "made", "--rows", "1"], "rows must be between 2"),
        Row("weights of Git LFS", ["convert", "pointers", "--out", "made"], "is a pointer of Git LFS"),
        Row("JSON of Git LFS", ["sample", "x", "--bundle", "pointer"], "bundle.json is a pointer of Git LFS"),
        Row("unknown tensors", ["convert", "odd", "--out", "made"], "are not those of a network known here"),
        Row("OpenAI's names, other sizes", ["convert", "openai", "--out", "made"], "are not OpenAI's own"),
        Row("OpenAI's sizes alone", ["convert", "laion", "--out", "made"], "copy open_clip_config.json"),
        Row("two precisions", ["convert", "variants", "--out", "made"], "only as bf16, fp16: keep one of"),
    ]


def rows(box: Path) -> list[Row]:
    """Makes the files and returns the rows."""
    small_bundle(box / BASE, *PARTS)
    return [
        *bundle_rows(box),
        *public_rows(box),
        *stable_unclip_rows(box),
        *run_rows(box),
        *verb_rows(box),
    ]
