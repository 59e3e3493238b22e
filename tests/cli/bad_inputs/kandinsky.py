"""Bad folders of Kandinsky: its pipelines side by side, and their configurations."""

import copy

from tests.cli.bad_inputs import Row
from tests.cli.bad_inputs.public import DECODER, DELETE, SCHEDULER, set_in, write_json
from unclip_jax.data.tokenizer import ClipTokenizer

UNET = {key: value for key, value in DECODER.items() if key != "class_embed_type"} | {
    "in_channels": 4,
    "out_channels": 8,
    "addition_embed_type": "image",
    "encoder_hid_dim": 16,
    "encoder_hid_dim_type": "image_proj",
}
MOVQ = {
    "_class_name": "VQModel",
    "block_out_channels": [32, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "latent_channels": 4,
    "norm_type": "spatial",
}
DDPM = {"_class_name": "DDPMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
TOWER = {"hidden_size": 16, "num_attention_heads": 2, "projection_dim": 16, "hidden_act": "gelu"}
SIZES = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
DECODES = {
    "unet": ["diffusers", "UNet2DConditionModel"],
    "scheduler": ["diffusers", "DDPMScheduler"],
    "movq": ["diffusers", "VQModel"],
}
FILES = {
    "prior/model_index": {
        "_class_name": "KandinskyV22PriorPipeline",
        "prior": ["diffusers", "PriorTransformer"],
        "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
        "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "UnCLIPScheduler"],
        "image_processor": ["transformers", "CLIPImageProcessor"],
    },
    "prior/prior/config": {"num_attention_heads": 2, "embedding_dim": 16},
    "prior/text_encoder/config": TOWER,
    "prior/image_encoder/config": TOWER | {"image_size": 16, "patch_size": 8},
    "prior/image_processor/preprocessor_config": SIZES,
    "prior/scheduler/scheduler_config": SCHEDULER | {"prediction_type": "sample"},
    "decoder/model_index": {"_class_name": "KandinskyV22Pipeline"} | DECODES,
    "decoder/unet/config": UNET,
    "decoder/movq/config": MOVQ,
    "decoder/scheduler/scheduler_config": DDPM,
}
# What is bad, the file, the key, its new value (a file without a key is left out), and what is said.
ROWS = [
    ("no decoder", "decoder/model_index", None, None, "Kandinsky's prior without a decoder"),
    ("no prior", "prior/model_index", None, None, "Kandinsky's decoder without a prior"),
    ("a pipeline of 2.1", "other/model_index", ["_class_name"], "KandinskyPipeline", "not of Kandinsky 2.2"),
    ("two decoders", "other/model_index", ["_class_name"], "KandinskyV22Pipeline", "two folders of a"),
    ("another autoencoder", "decoder/model_index", ["movq"], ["diffusers", "AutoencoderKL"], "movq is a"),
    ("a part too few", "decoder/model_index", ["movq"], DELETE, "lacks movq"),
    ("a part too many", "prior/model_index", ["decoder"], ["diffusers", "X"], "no such part"),
    ("another prior", "prior/prior/config", ["embedding_dim"], 24, "they are of different CLIPs"),
    ("another text tower", "prior/text_encoder/config", ["projection_dim"], 24, "of different CLIPs"),
    ("no preparation", "prior/image_processor/preprocessor_config", None, None, "preprocessor_config.json"),
    ("the prior's noise", "prior/scheduler/scheduler_config", ["prediction_type"], "epsilon", "is 'epsilon'"),
    ("the U-Net of 2.1", "decoder/unet/config", ["addition_embed_type"], "text_image", "is 'text_image'"),
    ("text in the U-Net", "decoder/unet/config", ["encoder_hid_dim_type"], "text_proj", "is 'text_proj'"),
    ("other embeddings", "decoder/unet/config", ["encoder_hid_dim"], 24, "they are of different CLIPs"),
    ("other channels", "decoder/unet/config", ["in_channels"], 5, "takes 5 channels and makes 8"),
    ("no variance", "decoder/unet/config", ["out_channels"], 4, "takes 4 channels and makes 4"),
    ("no heads", "decoder/unet/config", ["attention_head_dim"], 7, "no heads of 7 channels"),
    ("another time", "decoder/unet/config", ["resnet_time_scale_shift"], "default", "is 'default'"),
    ("no size", "decoder/unet/config", ["sample_size"], DELETE, "lacks 'sample_size'"),
    ("other norms", "decoder/movq/config", ["norm_type"], "batch", "norm_type must be group or spatial"),
    ("another scheduler", "decoder/scheduler/scheduler_config", ["_class_name"], "Euler", "it is a 'Euler'"),
    ("another variance", "decoder/scheduler/scheduler_config", ["variance_type"], "x", "is 'x'"),
    ("no weights", "decoder/scheduler/scheduler_config", ["clip_sample"], True, "and with it the weights"),
]

MIXES = [
    ("a file that is gone", ["gone.png", "a fox"], "gone.png looks like a picture's file, and there is none"),
    ("a weight too few", ["a fox", "a cat", "--weights", "1"], "--weights has 1 numbers for 2 items"),
    ("a weight in words", ["a fox", "--weights", "half"], "--weights must be a finite number"),
    ("two scales", ["a fox", "--guidance", "1,2"], "mix draws with one guidance scale"),
    ("an unknown prior", ["a fox", "--prior", "gan"], "unknown prior 'gan'"),
    ("no picture to draw", ["a fox", "--count", "0"], "--count must be between 1 and"),
]


def rows(box):
    """The rows of this file."""
    return list(_rows(box))


def _rows(box):
    for i, (name, changed, path, new, says) in enumerate(ROWS):
        folder = box / f"kandinsky_{i}"
        for file, config in FILES.items():
            config = copy.deepcopy(config)
            if file == changed and path is None:
                continue
            if file == changed:
                set_in(config, path, new)
            write_json(folder / f"{file}.json", config)
        if changed.startswith("other"):
            write_json(folder / f"{changed}.json", {path[0]: new})
        ClipTokenizer(77, 600).save_folder(folder / "prior" / "tokenizer")
        write_json(folder / "prior" / "tokenizer" / "special_tokens_map.json", {"pad_token": "!"})
        yield Row(f"a Kandinsky with {name}", ["convert", folder.name, "--out", "made"], says)
    for name, words, says in MIXES:
        yield Row(f"a mixture with {name}", ["mix", *words], says)
    index = {"_class_name": "KandinskyPriorPipeline"}
    write_json(box / "kandinsky_2_1" / "model_index.json", index)
    yield Row(
        "Kandinsky 2.1",
        ["convert", "kandinsky_2_1", "--out", "made"],
        "is a KandinskyPriorPipeline; the public",
    )
