"""Bad folders of StableUnCLIP and of LAION's prior. Their rows are with `weights`."""

import copy

import numpy as np
from safetensors.numpy import save_file

from tests.cli.bad_inputs import Row
from tests.cli.bad_inputs.public import DELETE, set_in, write_json
from unclip_jax.data.tokenizer import ClipTokenizer

TEXT = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "max_position_embeddings": 10}
DDPM = {"_class_name": "DDPMScheduler", "beta_schedule": "squaredcos_cap_v2"}
SHARED = {
    "text_encoder/config": TEXT,
    "tokenizer/tokenizer_config": {"pad_token": "!"},
    "unet/config": {
        "sample_size": 8,
        "block_out_channels": [32, 64],
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "cross_attention_dim": 16,
        "class_embed_type": "projection",
        "projection_class_embeddings_input_dim": 32,
    },
    "vae/config": {"_class_name": "AutoencoderKL", "block_out_channels": [32], "latent_channels": 4},
    "scheduler/scheduler_config": {"_class_name": "DDIMScheduler", "clip_sample": False},
    "image_normalizer/config": {"embedding_dim": 16},
    "image_noising_scheduler/scheduler_config": DDPM,
}
CLASSES = {
    "text_encoder": "CLIPTextModel",
    "tokenizer": "CLIPTokenizer",
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
    "scheduler": "DDIMScheduler",
    "image_normalizer": "StableUnCLIPImageNormalizer",
    "image_noising_scheduler": "DDPMScheduler",
}


def index(pipeline, **more):
    parts = {name: ["diffusers", kind] for name, kind in (CLASSES | more).items()}
    return {"_class_name": pipeline, **parts}


VARIES = SHARED | {
    "model_index": index(
        "StableUnCLIPImg2ImgPipeline",
        image_encoder="CLIPVisionModelWithProjection",
        feature_extractor="CLIPImageProcessor",
    ),
    "image_encoder/config": {"hidden_size": 16, "num_attention_heads": 2, "projection_dim": 16},
    "feature_extractor/preprocessor_config": {"size": {"shortest_edge": 224}},
}
DRAWS = SHARED | {
    "model_index": index(
        "StableUnCLIPPipeline",
        prior="PriorTransformer",
        prior_tokenizer="CLIPTokenizer",
        prior_text_encoder="CLIPTextModelWithProjection",
        prior_scheduler="DDPMScheduler",
    ),
    "prior_tokenizer/tokenizer_config": {"pad_token": "!"},
    "prior_text_encoder/config": TEXT | {"projection_dim": 16},
    "prior/config": {"num_attention_heads": 2, "embedding_dim": 16, "num_embeddings": 10},
    "prior_scheduler/scheduler_config": DDPM | {"prediction_type": "sample"},
}
UNET, NOISING = "unet/config", "image_noising_scheduler/scheduler_config"
BOTH = [
    ("a part too many", "model_index", ["controlnet"], ["diffusers", "ControlNetModel"], "no such part"),
    ("another U-Net", "model_index", ["unet"], ["diffusers", "UNet2DModel"], "unet is a 'UNet2DModel'"),
    ("no autoencoder", "model_index", ["vae"], DELETE, "lacks vae"),
    ("no vector", UNET, ["class_embed_type"], None, "takes a vector of None"),
    ("another vector", UNET, ["projection_class_embeddings_input_dim"], 48, "are of different CLIPs"),
    ("another embedding", "image_normalizer/config", ["embedding_dim"], 24, "whitens embeddings of 24"),
    ("no noise", NOISING, None, None, "scheduler_config.json is missing"),
    ("another noise", NOISING, ["beta_schedule"], "sigmoid", "beta_schedule is 'sigmoid'; known"),
    ("betas in a list", NOISING, ["trained_betas"], [0.1], "trained_betas is [0.1]"),
]
WITH_PRIOR = [
    ("another prior", "prior/config", ["embedding_dim"], 24, "they are of different CLIPs"),
    ("no prior's encoder", "prior_text_encoder/config", None, None, "config.json is missing"),
    (
        "a learned variance",
        "prior_scheduler/scheduler_config",
        ["variance_type"],
        "learned",
        "is 'learned'; known",
    ),
    ("another step", "prior_scheduler/scheduler_config", ["steps_offset"], "1", "steps_offset must be a"),
    ("no range", "prior_scheduler/scheduler_config", ["clip_sample_range"], 0.0, "must be positive"),
    ("another scheduler", "prior_scheduler/scheduler_config", ["_class_name"], "PNDM", "is 'PNDM'"),
]


def stable_unclip_rows(box):
    """Folders whose configurations are refused before any weights are looked for, and one without numbers."""
    for kind, files, rows in (("varies", VARIES, BOTH), ("draws", DRAWS, WITH_PRIOR)):
        for tokenizer in (
            name for name in ("tokenizer", "prior_tokenizer") if f"{name}/tokenizer_config" in files
        ):
            ClipTokenizer(10, 49408, 0).save_folder(box / f"unclip_{kind}" / tokenizer)
        for file, config in files.items():
            write_json(box / f"unclip_{kind}" / f"{file}.json", config)
        for i, (name, file, path, new, says) in enumerate(rows):
            folder, config = box / f"unclip_{kind}_{i}", copy.deepcopy(files[file])
            folder.mkdir()
            for part in (box / f"unclip_{kind}").iterdir():
                if part.stem != file.split("/")[0]:
                    (folder / part.name).symlink_to(part)
            if path is not None:
                set_in(config, path, new)
                write_json(folder / f"{file}.json", config)
            argv = ["convert", folder.name, "--out", "made"]
            yield Row(f"a StableUnCLIP that {kind} with {name}", argv, says)
    normalizer = {"mean": np.zeros((1, 16), np.float32), "std": np.zeros((1, 16), np.float32)}
    save_file(normalizer, box / "unclip_varies" / "image_normalizer" / "diffusion_pytorch_model.safetensors")
    yield Row("a StableUnCLIP without weights", ["convert", "unclip_varies", "--out", "made"], "and with it")
    for name, files, says in (
        ("no file", (), "holds no .pth file"),
        ("two files", ("best.pth", "latest.pth"), "holds best.pth, latest.pth: name the one to read"),
        ("an empty file", ("latest.pth",), "latest.pth is empty"),
    ):
        folder = box / f"laion_{len(files)}"
        write_json(folder / "prior_config.json", {})
        for file in files:
            (folder / file).touch()
        yield Row(f"LAION's prior with {name}", ["convert", folder.name, "--out", "made"], says)
