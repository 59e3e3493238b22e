"""Bad inputs of `train` and `compile`: configuration files, settings, and what does not fit together."""

from pathlib import Path

from tests.cli.bad_inputs import Row

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
RETURNS = 'from ml_collections import ConfigDict\ndef get_config(v=""):\n    return '
FILES = {
    "syntax.py": ("def get_config(v\n", "was never closed"),
    "imports.py": ("import nothing_here\n", "No module named 'nothing_here'"),
    "name.py": ('def get_config(v=""):\n    return undefined\n', "name 'undefined' is not defined"),
    "arguments.py": ("def get_config():\n    pass\n", "takes 0 positional arguments"),
    "exits.py": ("import sys\nsys.exit(3)\n", "exits.py: 3"),
    "recursive.py": ('def get_config(v=""):\n    return get_config(v)\n', "recursion"),
    "number.py": ("get_config = 3\n", "not callable"),
    "empty.py": ("", "has no get_config function"),
    "nulls.py": ("\x00", "null bytes"),
    "words.txt": ("a text", "is not a Python configuration file"),
    "none.py": ('def get_config(v=""):\n    pass\n', "returns NoneType, not a ConfigDict"),
    "stageless.py": (
        f'{RETURNS}ConfigDict({{"stage": ["clip"]}})\n',
        "unknown stage ['clip']",
    ),
    "prior.py": (
        f'{RETURNS}ConfigDict({{"stage": "prior_ar"}})\n',
        "the configuration lacks the setting",
    ),
    "bare.py": (
        f'{RETURNS}ConfigDict({{"stage": "clip"}})\n',
        "the configuration lacks the setting",
    ),
}
# Configuration -> setting -> the words of the message.
SETTINGS = {
    "clip": {
        "batch_size=1": "batch_size must be at least 2",
        "batch_size=0": "batch_size must be a whole number in [1, inf), got 0",
        "batch_size=1e3": "batch_size must be a whole number, got '1e3'",
        "batch_size=12": "a batch of 12 does not divide over data x fsdp = 8 devices",
        "steps=0": "steps must be a whole number in [1,",
        "steps=many": "steps must be a whole number, got 'many'",
        "steps=1.5": "steps must be a whole number, got '1.5'",
        "stepz=3": "did you mean 'steps'?",
        "model=3": "setting 'model' is a group; set one of",
        "seed=-1": "seed must be a whole number in [0, 4294967296), got -1",
        "dtype=float16": "dtype must be one of auto, float32, bfloat16",
        "remat=some": "remat must be one of none, full",
        "scan_layers=maybe": "scan_layers must be true or false, got 'maybe'",
        "keep=0": "keep must be a whole number in [1, inf), got 0",
        "keep=-1": "keep must be a whole number in [1, inf), got -1",
        "checkpoint_every=0": "checkpoint_every must be a whole number in [1, inf), got 0",
        "checkpoint_every=-1": "checkpoint_every must be a whole number in [1, inf), got -1",
        "log_every=0": "log_every must be a whole number in [1, inf), got 0",
        "eval_every=-4": "eval_every must be a whole number in [0, inf), got -4",
        "keep_best=val_cosine": "keep_best=val_cosine names no figure of the evaluation",
        "watchdog=-1": "watchdog must be a number in [0, inf), got -1",
        "watchdog=nan": "watchdog must be a number in [0, inf), got nan",
        "profile=5:3": "profile must be FIRST:LAST",
        "profile=ten": "profile must be FIRST:LAST",
        "track.experiment=": "track.experiment must be a text, got ''",
        "mesh.data=3": "does not fit 8 devices",
        "mesh.data=0": "does not fit 8 devices",
        "mesh.fsdp=-1": "does not fit 8 devices",
        "mesh.tensor=-7": "mesh.tensor must be a whole number in [-1, inf), got -7",
        "grad_accumulation=2": "grad_accumulation must be 1 for CLIP",
        "ema_decay=2": "ema_decay must be a number in [0, 1), got 2.0",
        "ema_decay=1": "ema_decay must be a number in [0, 1), got 1.0",
        "optimizer.learning_rate=-1": "optimizer.learning_rate must be a number in (0, inf), got -1.0",
        "optimizer.learning_rate=0": "optimizer.learning_rate must be a number in (0, inf), got 0.0",
        "optimizer.learning_rate=nan": "optimizer.learning_rate must be a number in (0, inf), got nan",
        "optimizer.learning_rate=inf": "optimizer.learning_rate must be a number in (0, inf), got inf",
        "optimizer.warmup_steps=4": "optimizer.warmup_steps=4 must be fewer than steps=4",
        "optimizer.warmup_steps=-1": "optimizer.warmup_steps must be a whole number in [0, inf)",
        "optimizer.schedule=linear": "optimizer.schedule must be one of cosine, constant",
        "optimizer.b1=1": "optimizer.b1 must be a number in [0, 1), got 1.0",
        "optimizer.b2=-0.1": "optimizer.b2 must be a number in [0, 1), got -0.1",
        "optimizer.eps=0": "optimizer.eps must be a number in (0, inf), got 0.0",
        "optimizer.weight_decay=-1": "optimizer.weight_decay must be a number in [0, inf)",
        "optimizer.clip_norm=0": "optimizer.clip_norm must be a number in (0, inf), or None",
        "optimizer.mu_dtype=int8": "optimizer.mu_dtype must be one of float32, bfloat16, or None",
        "sam.rho=-1": "sam.rho must be a number in [0, inf), got -1.0",
        "sam.group_size=0": "sam.group_size must be a whole number in [1, inf), got 0",
        "tokenizer.length=1": "tokenizer.length must be a whole number in [2, inf), got 1",
        "tokenizer.vocab_size=100": "tokenizer.vocab_size must be a whole number in [514, 49408]",
        "model.embed_dim=0": "model.embed_dim must be a whole number in [1, inf), got 0",
        "model.activation=relu": "model.activation must be one of",
        "model.image.layers=0": "model.image.layers must be a whole number in [1, inf), got 0",
        "model.image.patch_size=32": "image_size=16 must be a multiple of model.image.patch_size=32",
        "model.image.patch_size=5": "image_size=16 must be a multiple of model.image.patch_size=5",
        "model.text.heads=3": "model.text.width=32 must be a multiple of model.text.heads=3",
        "model.text.width=0": "model.text.width must be a whole number in [1, inf), got 0",
        "eval.rows=0": "eval.rows must be a whole number in [2, inf), got 0",
        "eval.batch_size=0": "eval.batch_size must be a whole number in [1, inf), got 0",
        "eval.candidates=1": "eval.candidates must be a whole number in [2, inf), got 1",
        "eval.candidates=17": "eval.candidates=17 must be at most eval.rows=16",
        "data.crop_scale=0": "data.crop_scale must be a number in (0, 1], got 0.0",
        "data.crop_scale=1.5": "data.crop_scale must be a number in (0, 1], got 1.5",
        "data.max_bad_fraction=2": "data.max_bad_fraction must be a number in [0, 1], got 2.0",
        "data.backend=torch": "data.backend must be one of auto, tf, numpy",
        "data.train.name=folders": "unknown data source 'folders'",
        "data.train.split=2024_01": "unknown split '2024_01'",
        "data.train.balance.power=2": "balance.power must be between 0",
    },
    "prior_diffusion": {
        "drop_text=5": "drop_text must be a number in [0, 1), got 5.0",
        "drop_text=1": "drop_text must be a number in [0, 1), got 1.0",
        "model.dropout=1": "model.dropout must be a number in [0, 1), got 1.0",
        "model.heads=5": "model.width=32 must be a multiple of model.heads=5",
        "statistics_batches=0": "statistics_batches must be a whole number in [1, inf), got 0",
        "space.kind=round": "space.kind must be one of raw, unit, scaled, whitened",
        "space.scale=0": "space.scale must be a number in (0, inf), or None, got 0.0",
        "diffusion.num_steps=0": "diffusion.num_steps must be a whole number in [1, inf), got 0",
        "diffusion.prediction=noise": "diffusion.prediction must be one of eps, x0, v",
        "diffusion.schedule=quadratic": "diffusion.schedule must be one of cosine, linear",
        "sampling.steps=0": "steps must be between 1 and 1000, got 0",
        "sampling.steps=1001": "steps must be between 1 and 1000, got 1001",
        "sampling.steps=fast28": "'fast28'",
        "sampling.sampler=heun": "unknown sampler 'heun'",
        "sampling.variance=learned": "variance 'learned' needs a network that predicts it",
        "sampling.candidates=0": "candidates must be",
        "sampling.guidance_scale=nan": "guidance_scale must be a finite number",
        "keep_best=cosine": "names no figure of the evaluation; its figures are compose_cosine, ",
        "frozen.clip=": "frozen.clip must be a text, got ''",
        "frozen.clip=nowhere": "nowhere",
    },
    "prior_ar": {
        "model.codes=0": "model.codes must be a whole number in [1, inf), got 0",
        "model.buckets=1": "model.buckets must be a whole number in [2, inf), got 1",
        "model.dot_bins=1": "model.dot_bins must be a whole number in [2, inf), got 1",
        "sampling.temperature=-1": "temperature must be 0 or a positive number, got -1.0",
        "sampling.dot_quantile=1": "dot_quantile must be in [0, 1), got 1.0",
        "sampling.candidates=two": "sampling.candidates must be a whole number, got 'two'",
    },
    "codec": {
        "dims=0": "dims must be a whole number in [1, inf), got 0",
        "report=(0,)": "report must be whole numbers in [1, inf), as in (1, 2), got (0,)",
        "report=8": "report must be a list such as (1, 2), got '8'",
    },
    "decoder": {
        "drop_embedding=-0.1": "drop_embedding must be a number in [0, 1], got -0.1",
        "drop_text=1.5": "drop_text must be a number in [0, 1], got 1.5",
        "freeze_text=true": "freeze_text keeps the decoder's text encoder: it needs one",
        "model.unet.channel_mult=(1,2,4,8,16)": "model.unet.image_size=8 must be a multiple of 16",
        "model.unet.channel_mult=()": "model.unet.channel_mult must be at least one of whole numbers",
        "model.unet.channel_mult=(1,'2')": "model.unet.channel_mult must be at least one of whole numbers",
        "model.unet.groups=5": "8 channels of model.unet must be a multiple of model.unet.groups=5",
        "model.unet.head_channels=7": "16 channels of model.unet must be a multiple of",
        "model.unet.attention_resolutions=(3,)": "has 3, but the U-Net's sides are 8, 4",
        "model.unet.out_channels=4": "model.unet.out_channels must be 3, or 6",
        "model.unet.res_blocks=0": "model.unet.res_blocks must be a whole number in [1, inf), got 0",
        "model.conditioning.clip_tokens=0": "model.conditioning.clip_tokens must be a whole number",
        "diffusion.vb_weight=-1": "diffusion.vb_weight must be a number in [0, inf), got -1.0",
        "sampling.variance=analytic": "variance 'analytic' needs measured errors",
        "sampling.variance=huge": "unknown variance 'huge'",
        "sampling.clip=0": "clip must be positive or None, got 0",
        "eval.samples=0": "eval.samples must be a whole number in [1, inf), got 0",
        "eval.fid_rows=-1": "eval.fid_rows must be a whole number in [0, inf), got -1",
        "keep_best=-loss": "keep_best=-loss names no figure of the evaluation; its figures are eval_loss",
    },
    "upsampler": {
        "factor=1": "factor must be a whole number in [2, inf), got 1",
        "factor=3": "are no multiples of 3",
        "data.crop_size=32": "data.crop_size=32 must be a multiple of 2, at most model.unet.image_size=16",
        "data.degradation=noise": "data.degradation must be one of blur, bsr_light",
        "data.blur_prob=2": "data.blur_prob must be a number in [0, 1], got 2.0",
        "model.resize=nearest": "model.resize must be one of cubic, linear",
        "sampling.eta=2": "eta must be in [0, 1], got 2.0",
        "grad_accumulation=3": "grad_accumulation=3 does not divide the 2 rows of a device",
        "grad_accumulation=0": "grad_accumulation must be a whole number in [1, inf), got 0",
    },
}
TOPOLOGIES = (
    "cpu:0",
    "cpu:-1",
    "cpu:x",
    "cpu:99999",
    "v5e",
    "v5e:0x0",
    "v5e:2",
    "v5e:2x0",
    "0*v5e:2x2",
    "v5e:999x999",
)


def rows(box: Path) -> list[Row]:
    """Makes the configuration files and returns the rows."""
    for name, (content, _) in FILES.items():
        (box / name).write_text(content)
    clip, prior, upsampler = (
        str(CONFIGS / f"emoji/{name}.py:tiny") for name in ("clip", "prior_diffusion", "upsampler")
    )
    train = ["train", clip, "--workdir", "run"]
    own = ["train", str(CONFIGS / "dalle2/decoder.py:tiny"), "--workdir", "run"]
    compiled = ["compile", upsampler, "--topology"]
    search = [*compiled, "cpu:8", "--search"]
    return [
        *(
            Row(f"the file {name}", ["train", name, "--workdir", "run"], says)
            for name, (_, says) in FILES.items()
        ),
        *(
            Row(
                f"{name} with {setting}",
                ["train", str(CONFIGS / f"emoji/{name}.py:tiny"), "--workdir", "run", "--set", setting],
                says,
            )
            for name, settings in SETTINGS.items()
            for setting, says in settings.items()
        ),
        *(
            Row(f"the topology {name}", [*compiled, name], f"unknown topology '{name}'")
            for name in TOPOLOGIES
        ),
        Row(
            "no configuration",
            ["train", "nothing.py", "--workdir", "run"],
            "no configuration file nothing.py",
        ),
        Row(
            "an unknown variant", ["train", clip[:-4] + "huge", "--workdir", "run"], "unknown variant 'huge'"
        ),
        Row("a setting without a value", [*train, "--set", "steps"], "'steps' is not KEY=VALUE"),
        Row("a CLIP for CLIP", [*train, "--clip", "emoji"], "no frozen CLIP; leave out --clip"),
        Row("embeddings for CLIP", [*train, "--embeddings", "there"], "the clip stage reads no embeddings"),
        Row(
            "embeddings without data",
            ["train", "prior.py", "--workdir", "run", "--embeddings", "there"],
            "the configuration lacks the setting data.train",
        ),
        Row(
            "two widths",
            [*own, "--set", "model.text.width=8"],
            "=8 must be model.conditioning.context_dim=16",
        ),
        Row(
            "two texts",
            [*own, "--set", "model.conditioning.use_text_states=true"],
            "use_text_states is CLIP's",
        ),
        Row(
            "a text encoder of no layers",
            [*own, "--set", "model.text.layers=0"],
            "model.text.layers must be a whole",
        ),
        Row("a bad profile", [*train, "--profile", "2"], "profile must be FIRST:LAST"),
        Row("a profile after the end", [*train, "--profile", "4:9"], "profile=4:9 begins after the last of"),
        Row("a run without a name", ["train", clip, "--workdir", ""], "the run's folder must have a name"),
        Row(
            "a file for a run",
            ["train", clip, "--workdir", "empty.py"],
            "empty.py/checkpoints/checkpoint cannot be written",
        ),
        Row("a run below a file", ["train", clip, "--workdir", "empty.py/run"], "cannot be written: "),
        Row(
            "an unknown scheme", ["train", clip, "--workdir", "s3://bucket/run"], "s3://bucket/run: paths may"
        ),
        Row(
            "more candidates than rows",
            [*train, "--set", "eval.candidates=30000", "--set", "eval.rows=30000"],
            "eval.candidates=30000 needs as many rows, but data.eval",
        ),
        Row(
            "a CLIP that is not there",
            ["train", prior, "--workdir", "run", "--clip", "no"],
            "train 'clip' first",
        ),
        Row("a batch of no rows", [*compiled, "cpu:8", "--batch", "0"], "batch_size must be a whole number"),
        Row("a negative batch", [*compiled, "cpu:8", "--batch", "-8"], "batch_size must be a whole number"),
        Row("a mesh of words", [*compiled, "cpu:8", "--mesh", "data=x"], "sizes must be whole numbers"),
        Row("half a mesh", [*compiled, "cpu:8", "--mesh", "data"], "'data' is not KEY=VALUE"),
        Row("an axis twice", [*compiled, "cpu:8", "--mesh", "data=2,data=4"], "an axis is given twice"),
        Row("an unknown axis", [*compiled, "cpu:8", "--mesh", "model=8"], "unknown mesh axis model"),
        Row("too few devices", [*compiled, "cpu:8", "--mesh", "data=2"], "does not fit 8 devices"),
        Row(
            "steps of 0",
            [*compiled, "cpu:8", "--set", "diffusion.num_steps=0"],
            "diffusion.num_steps must be",
        ),
        Row("an empty name to save to", [*compiled, "cpu:8", "--save", ""], "'': a path is not empty"),
        Row("a file to save below", [*compiled, "cpu:8", "--save", "empty.py/x"], "cannot be written"),
        Row(
            "no CLIP",
            ["compile", prior, "--topology", "cpu:8", "--clip", upsampler],
            "is not a CLIP's configuration",
        ),
        Row("a folder to save to", [*compiled, "cpu:8", "--save", "."], ". is a folder; name a file"),
        Row("a price without a search", [*compiled, "cpu:8", "--price", "2"], "--price belongs to --search"),
        Row(
            "a search of samplers",
            [*search, "remat=none", "--sample"],
            "compares train steps: leave --sample",
        ),
        Row(
            "a search with a mesh", [*search, "remat=none", "--mesh", "data=8"], "takes the mesh as settings"
        ),
        Row("a search of nothing", [*search, "remat"], "'remat' is not KEY=VALUE"),
        Row("a search of an unknown key", [*search, "rematt=none"], "'rematt'; did you mean 'remat'"),
        Row("a search of a wrong value", [*search, "batch_size=8,many"], "batch_size"),
        Row(
            "a free chip", [*search, "remat=none", "--price", "0"], "--price must be a number above 0, got 0"
        ),
        Row("a search on a CPU", [*search, "remat=none"], "chips whose peaks are known"),
        Row(
            "rows that are something else",
            [*search, "remat=none", "--rows", "words.txt"],
            "words.txt, line 1: not a row",
        ),
    ]
