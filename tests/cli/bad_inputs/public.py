"""Bad folders of public weights: CLIP, open_clip, Karlo, DINOv2, Inception, GLIDE.

Their rows are with `weights`.
"""

import copy
import json
import zipfile

from tests.cli.bad_inputs import Row
from unclip_jax.data.tokenizer import ClipTokenizer

DELETE = object()


def set_in(value, path, new):
    """Sets or deletes a value in nested dictionaries; `path` is a list of keys."""
    *inner, last = path
    for key in inner:
        value = value.setdefault(key, {})
    if new is DELETE:
        del value[last]
    else:
        value[last] = new


def write_json(file, value):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)  # it may share its data with another bundle's
    file.write_text(value if isinstance(value, str) else json.dumps(value))


CLIP = {"model_type": "clip", "text_config": {}, "vision_config": {}}
CLIPS = [
    ("a width in words", ["text_config", "hidden_size"], "wide", "hidden_size must be an integer"),
    ("no heads", ["text_config", "num_attention_heads"], 0, "num_attention_heads must be between 1 and"),
    ("heads that do not divide", ["vision_config", "num_attention_heads"], 5, "no multiple of its 5 heads"),
    ("another normalisation", ["text_config", "layer_norm_eps"], 1e-6, "layer_norm_eps is 1e-06"),
    ("grey images", ["vision_config", "num_channels"], 1, "num_channels is 1, but the network here has 3"),
    ("oblong images", ["vision_config", "image_size"], [224, 336], "image_size must be an integer"),
    ("two activations", ["text_config", "hidden_act"], "gelu", "activations gelu, quick_gelu"),
    (
        "an activation unknown",
        ["text_config", "hidden_act"],
        "swish",
        "one of quick_gelu, gelu is known here",
    ),
    ("an activation in a list", ["text_config", "hidden_act"], ["gelu"], "hidden_act must be text"),
    ("another end token", ["text_config", "eos_token_id"], 7, "eos_token_id is 7"),
    ("quantised weights", ["quantization_config"], {"bits": 4}, "'quantization_config' is"),
    ("an unknown setting", ["vision_config", "use_registers"], 4, "'use_registers' is 4, a setting"),
    ("a half in a list", ["vision_config"], [], "vision_config must be an object or null, not []"),
    ("a half of another kind", ["text_config", "model_type"], "bert", "model_type is 'bert'"),
    ("endless layers", ["text_config", "num_hidden_layers"], 10**9, "between 1 and 1000"),
    ("no weights", ["initializer_range"], 1.0, "and with it the weights"),
    ("another model", ["model_type"], "siglip", "holds a 'siglip' model"),
    ("a model that is a list", ["model_type"], [], "holds a [] model"),
]
PROCESSORS = [
    ("words", "[]", "does not hold a JSON object"),
    ("another filter", {"resample": 2}, "resample is 2, but the network here has 3"),
    ("no crop", {"do_center_crop": False}, "do_center_crop is False"),
    ("no resizing", {"do_resize": False}, "do_resize is False"),
    ("pixels to 255", {"do_rescale": False}, "do_rescale is False"),
    ("another scale", {"rescale_factor": 0.5}, "rescale_factor is 0.5"),
    (
        "another size",
        {"size": {"shortest_edge": 256}},
        "the shorter side is resized to the image tower's 224",
    ),
    ("a squashed image", {"size": {"height": 224, "width": 224}}, "the shorter side is resized"),
    ("another crop", {"crop_size": {"height": 192, "width": 192}}, "the shorter side is resized"),
    ("a mean in words", {"image_mean": "grey"}, "image_mean must be a list of 3 numbers, not 'grey'"),
    ("no deviation", {"image_std": [0.0, 0.0, 0.0]}, "standard deviation must be positive"),
    ("another kind", {"image_processor_type": "BlipImageProcessor"}, "is 'BlipImageProcessor', but"),
    ("padding", {"do_pad": True}, "'do_pad' is True, a setting that is not known here"),
]
OPEN_CLIP = {
    "model_cfg": {
        "embed_dim": 12,
        "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 40, "head_width": 10, "layers": 2},
        "text_cfg": {"context_length": 10, "width": 24, "heads": 2, "layers": 2},
    }
}
OPEN_CLIPS = [
    ("no model", ["model_cfg"], DELETE, "lacks 'model_cfg'"),
    ("a model in words", ["model_cfg"], "ViT-B-32", "model_cfg must be an object, not 'ViT-B-32'"),
    ("no embedding", ["model_cfg", "embed_dim"], DELETE, "lacks 'embed_dim'"),
    ("a bias of the logits", ["model_cfg", "init_logit_bias"], -10, "'init_logit_bias' is -10"),
    ("a ResNet", ["model_cfg", "vision_cfg", "layers"], [3, 4, 6, 3], "layers must be an integer"),
    (
        "a network of timm",
        ["model_cfg", "vision_cfg", "timm_model_name"],
        "vit",
        "'timm_model_name' is 'vit'",
    ),
    ("another text encoder", ["model_cfg", "text_cfg", "hf_model_name"], "bert", "'hf_model_name' is 'bert'"),
    (
        "heads that do not divide",
        ["model_cfg", "vision_cfg", "head_width"],
        16,
        "no multiple of head_width 16",
    ),
    ("another pooling", ["model_cfg", "text_cfg", "pool_type"], "last", "pool_type is 'last'"),
    ("squashed images", ["preprocess_cfg"], {"resize_mode": "squash"}, "resize_mode is 'squash'"),
    ("another filter", ["preprocess_cfg"], {"interpolation": "random"}, "interpolation is 'random'"),
    ("grey statistics", ["preprocess_cfg"], {"mean": [0.5]}, "mean must be a list of 3 numbers"),
    ("no weights", ["preprocess_cfg"], {}, "and with it the weights"),
]
SCHEDULER = {"_class_name": "UnCLIPScheduler", "prediction_type": "epsilon"}
CROSS, PLAIN = "SimpleCrossAttn", "ResnetDownsampleBlock2D"
UNET = {
    "sample_size": 8,
    "in_channels": 6,
    "out_channels": 3,
    "layers_per_block": 1,
    "block_out_channels": [32, 64],
    "down_block_types": [PLAIN] * 2,
    "up_block_types": ["ResnetUpsampleBlock2D"] * 2,
    "add_attention": False,
}
DECODER = UNET | {
    "in_channels": 3,
    "out_channels": 6,
    "down_block_types": [PLAIN, f"{CROSS}DownBlock2D"],
    "up_block_types": [f"{CROSS}UpBlock2D", "ResnetUpsampleBlock2D"],
    "mid_block_type": f"UNetMidBlock2D{CROSS}",
    "class_embed_type": "identity",
    "resnet_time_scale_shift": "scale_shift",
    "cross_attention_dim": 20,
    "attention_head_dim": 8,
}
del DECODER["add_attention"]
KARLO = {
    "model_index": {"_class_name": "UnCLIPPipeline", "prior_scheduler": ["diffusers", "UnCLIPScheduler"]},
    "text_encoder/config": {"hidden_size": 16, "num_attention_heads": 2, "projection_dim": 16},
    "prior/config": {"num_attention_heads": 2, "embedding_dim": 16},
    "decoder/config": DECODER,
    "text_proj/config": {"clip_embeddings_dim": 16, "time_embed_dim": 128, "cross_attention_dim": 20},
    "super_res_first/config": UNET | {"sample_size": 32},
    "super_res_last/config": UNET | {"sample_size": 32},
    "prior_scheduler/scheduler_config": SCHEDULER | {"prediction_type": "sample"},
    "decoder_scheduler/scheduler_config": SCHEDULER | {"variance_type": "learned_range"},
    "super_res_scheduler/scheduler_config": SCHEDULER,
}
KARLOS = [
    ("another prior's class", "model_index", ["prior"], ["diffusers", "Prior"], "is a PriorTransformer"),
    ("a class in words", "model_index", ["prior"], "PriorTransformer", "'prior' is 'PriorTransformer'"),
    ("a part too many", "model_index", ["vae"], ["diffusers", "VQModel"], "Karlo has no such part"),
    ("another pipeline", "model_index", ["_class_name"], "FluxPipeline", "is a FluxPipeline"),
    ("no text encoder", "text_encoder/config", None, None, "text_encoder/config.json is missing"),
    ("another encoder", "text_encoder/config", ["projection_dim"], 24, "they are of different CLIPs"),
    ("another width", "prior/config", ["embedding_dim"], 24, "they are of different CLIPs"),
    ("another query", "prior/config", ["added_emb_type"], "query", "added_emb_type is 'query'"),
    ("heads in words", "prior/config", ["num_attention_heads"], "two", "must be an integer, not 'two'"),
    ("no size", "decoder/config", ["sample_size"], DELETE, "a configuration lacks 'sample_size'"),
    ("another class", "decoder/config", ["_class_name"], "UNet2DModel", "_class_name is 'UNet2DModel'"),
    ("no class embedding", "decoder/config", ["class_embed_type"], None, "class_embed_type is None"),
    ("other groups", "decoder/config", ["norm_num_groups"], 7, "width 32 has no 7 equal groups"),
    ("other heads", "decoder/config", ["attention_head_dim"], 7, "no heads of 7 channels"),
    ("other tokens", "text_proj/config", ["cross_attention_dim"], 24, "text_proj makes tokens of 24"),
    ("other embeddings", "text_proj/config", ["clip_embeddings_dim"], 24, "they are of different CLIPs"),
    ("another upsampler's class", "super_res_first/config", ["add_attention"], True, "add_attention is True"),
    ("another last size", "super_res_last/config", ["sample_size"], 64, "its last step, 64 px"),
    ("a size between", "super_res_first/config", ["sample_size"], 36, "px"),
    (
        "zero terminal noise",
        "prior_scheduler/scheduler_config",
        ["rescale_betas_zero_snr"],
        True,
        "not known",
    ),
    ("thresholding", "decoder_scheduler/scheduler_config", ["thresholding"], True, "'thresholding' is True"),
    ("another scheduler", "decoder_scheduler/scheduler_config", ["_class_name"], "DDPM", "is 'DDPM'"),
    ("no clipping", "decoder_scheduler/scheduler_config", ["clip_sample"], False, "clip_sample is False"),
    (
        "another variance",
        "super_res_scheduler/scheduler_config",
        ["variance_type"],
        "x",
        "variance_type is 'x'",
    ),
    ("another target", "super_res_scheduler/scheduler_config", ["prediction_type"], "v", "is 'v', but"),
    ("betas in words", "super_res_scheduler/scheduler_config", ["clip_sample_range"], "1", "finite number"),
]

DINO = {"model_type": "dinov2", "image_size": 518}
DINOS = [
    ("gates", ["use_swiglu_ffn"], True, "is a DINOv2-giant (use_swiglu_ffn)"),
    ("no layers", ["num_hidden_layers"], 0, "num_hidden_layers must be between 1 and 1000"),
    ("heads that do not divide", ["num_attention_heads"], 7, "no multiple of its 7 heads"),
    ("another shift", ["interpolate_offset"], 0.1, "interpolate_offset is 0.1"),
    ("an unknown setting", ["key_bias"], 1, "'key_bias' is 1, a setting that is not known here"),
]
# What stands in `default_1.pt`: bytes, or those of a pickle in an archive of torch's.
INCEPTIONS = [
    ("words", b"weights", None, "was not written by torch"),
    ("nothing", b"", None, "default_1.pt is empty"),
    ("half an archive", b"PK\x03\x04half", None, "it is no whole zip archive"),
    ("a pickle alone", b"\x80\x02}q\x00.", None, "was not written by torch"),
    (
        "a command",
        None,
        b"\x80\x02cos\nsystem\nX\x01\x00\x00\x00x\x85R.",
        "asks for 'os.system'; only tensors",
    ),
    ("code", None, b"\x80\x02cbuiltins\nexec\n.", "asks for 'builtins.exec'"),
    ("no tensors", None, b"\x80\x02}.", "holds no tensors"),
    ("half a pickle", None, b"\x80\x02}(X", "its pickle ends early"),
    ("a list in itself", None, b"\x80\x02]q\x00h\x00a.", "lie too deep inside one another"),
]
# What lies beside `base.pt`.
GLIDES = [
    ("no tokenizer", {}, "holds no tokenizer of GLIDE"),
    ("one file of the tokenizer", {"vocab.bpe": "#version: 0.2\n"}, "holds no tokenizer of GLIDE"),
    ("merges of three", {"vocab.bpe": "a b c\n", "encoder.json": "{}"}, "is no list of merges of two words"),
    ("ids that are no JSON", {"vocab.bpe": "", "encoder.json": "{"}, "encoder.json is damaged"),
    ("other ids", {"vocab.bpe": "a b\n", "encoder.json": "{}"}, "are not of one GPT-2 tokenizer"),
    ("a broken archive", {"vocab.bpe.gz": "a b", "encoder.json": "{}"}, "vocab.bpe.gz is damaged"),
    ("options in a list", {"base.json": "[]"}, "does not hold a JSON object"),
    ("no heads", {"base.json": '{"xf_heads": 0}'}, "xf_heads must be between 1 and"),
    ("a schedule unknown", {"base.json": '{"noise_schedule": 3}'}, "noise_schedule must be text"),
]
# Changes to T5's configuration, and the file of its tokenizer beside it.
T5 = {"model_type": "t5", "vocab_size": 40, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1}
T5 |= {"num_heads": 2, "feed_forward_proj": "relu"}
T5S = [
    ("no heads", {"num_heads": 0}, {}, "num_heads must be between 1 and"),
    ("another MLP", {"feed_forward_proj": "gated-silu"}, {}, "known are relu, gated-gelu"),
    ("another norm", {"layer_norm_epsilon": 1e-5}, {}, "layer_norm_epsilon is 1e-05"),
    ("no tokenizer", {}, {}, "holds no tokenizer of T5: expected tokenizer.json or spiece.model"),
    ("half a vocabulary", {}, {"spiece.model": b"\x0a\xff"}, "spiece.model holds no tokenizer of T5"),
    ("a tokenizer of nothing", {}, {"tokenizer.json": b"{}"}, "tokenizer.json holds no tokenizer of T5"),
]


def public_rows(box):
    """Folders of public weights: their configurations are refused before any weights are looked for."""

    def row(library, name, folder, says):
        return Row(f"{library} with {name}", ["convert", folder, "--out", "made"], says)

    for i, (name, path, new, says) in enumerate(CLIPS):
        config = copy.deepcopy(CLIP)
        set_in(config, path, new)
        write_json(box / f"clip_{i}" / "config.json", config)
        yield row("a CLIP", name, f"clip_{i}", says)
    for i, (name, settings, says) in enumerate(PROCESSORS):
        write_json(box / f"processor_{i}" / "config.json", CLIP)
        write_json(box / f"processor_{i}" / "preprocessor_config.json", settings)
        yield row("a preprocessing", name, f"processor_{i}", says)
    for i, (name, path, new, says) in enumerate(OPEN_CLIPS):
        config = copy.deepcopy(OPEN_CLIP)
        set_in(config, path, new)
        write_json(box / f"open_clip_{i}" / "open_clip_config.json", config)
        yield row("an open_clip", name, f"open_clip_{i}", says)
    for file, config in KARLO.items():
        write_json(box / "karlo" / f"{file}.json", config)
    ClipTokenizer(77, 600).save_folder(box / "karlo" / "tokenizer")
    for i, (name, file, path, new, says) in enumerate(KARLOS):
        folder, config = box / f"karlo_{i}", copy.deepcopy(KARLO[file])
        folder.mkdir()
        for part in (box / "karlo").iterdir():
            if part.stem != file.split("/")[0]:
                (folder / part.name).symlink_to(part)
        if path is not None:
            set_in(config, path, new)
            write_json(folder / f"{file}.json", config)
        yield row("a Karlo", name, f"karlo_{i}", says)
    for i, (name, path, new, says) in enumerate(DINOS):
        config = copy.deepcopy(DINO)
        set_in(config, path, new)
        write_json(box / f"dino_{i}" / "config.json", config)
        yield row("a DINOv2", name, f"dino_{i}", says)
    for i, (name, whole, pickled, says) in enumerate(INCEPTIONS):
        (box / f"inception_{i}").mkdir()
        file = box / f"inception_{i}" / "default_1.pt"
        if whole is not None:
            file.write_bytes(whole)
        else:
            with zipfile.ZipFile(file, "w") as archive:
                archive.writestr("x/data.pkl", pickled)
        yield row("an Inception", name, f"inception_{i}", says)
        yield Row(
            f"Inception's file with {name}", ["convert", f"inception_{i}/default_1.pt", "--out", "made"], says
        )
    for i, (name, whole, pickled, says) in enumerate(INCEPTIONS):
        (box / f"dalle_{i}").mkdir()
        for file, source in (
            (box / f"vqvae_{i}.pt", "a VQ-VAE's file"),
            (box / f"vae_{i}.pt", "a file of DALLE-pytorch"),
            (box / f"vqgan_{i}.ckpt", "a VQGAN's file"),
            (box / f"dalle_{i}" / "encoder.pkl", "a discrete VAE"),
        ):
            if whole is not None:
                file.write_bytes(whole)
            else:
                with zipfile.ZipFile(file, "w") as archive:
                    archive.writestr("x/data.pkl", pickled)
            path = f"dalle_{i}" if file.suffix == ".pkl" else file.name
            says_so = says.replace("default_1.pt", file.name)
            yield Row(f"{source} with {name}", ["convert", path, "--out", "made"], says_so)
    for i, (name, files, says) in enumerate(GLIDES):
        (box / f"glide_{i}").mkdir()
        with zipfile.ZipFile(box / f"glide_{i}" / "base.pt", "w") as archive:
            archive.writestr("x/data.pkl", b"\x80\x02cos\nsystem\nX\x01\x00\x00\x00x\x85R.")
        for file, text in files.items():
            (box / f"glide_{i}" / file).write_text(text)
        yield row("a GLIDE", name, f"glide_{i}", says)
    for i, (name, change, files, says) in enumerate(T5S):
        write_json(box / f"t5_{i}" / "config.json", T5 | change)
        for file, data in files.items():
            (box / f"t5_{i}" / file).write_bytes(data)
        yield row("a T5", name, f"t5_{i}", says)
