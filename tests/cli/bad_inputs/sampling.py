"""Bad inputs of `evaluate`, `doctor` and the verbs that draw: numbers, options, pictures, outputs."""

import os
from pathlib import Path

import numpy as np
from PIL import Image

from tests.cli.bad_inputs import Row
from tests.runs import random_bundle, without_image_tower
from unclip_jax.checkpoint.bundle import save_bundle

FOX = ["sample", "a fox"]
TINY = ["--bundle", "tiny"]
VARY, EDIT = ["vary", "good.png", *TINY], ["edit", "good.png", "--to", "a heart", *TINY]
MASKED = ["good.png", "white.png", "a fox", *TINY]
BETWEEN, AGAIN = ["interpolate", "good.png", "good.png", *TINY], ["reconstruct", "good.png", *TINY]
# What is wrong with the words of `sample` -> those words, and words of the message.
SAMPLE = {
    "no caption": (["sample"], "say what to draw: captions, or --prompts FILE --layout L"),
    "an unknown prior": ([*FOX, "--prior", "gan"], "unknown prior 'gan'; choose one of"),
    "a second prior that is unknown": ([*FOX, "--prior", "prior_ar,foo"], "unknown prior 'foo'"),
    "an empty prior": ([*FOX, "--prior", ""], "unknown prior ''"),
    "a comma after the prior": ([*FOX, "--prior", "prior_ar,"], "unknown prior ''"),
    "a part that is no prior": ([*FOX, "--prior", "clip"], "unknown prior 'clip'"),
    "guidance of no prior": ([*FOX, "--prior-guidance", "3", "--prior", "none"], "needs a prior that draws"),
    "a NaN as the prior's guidance": ([*FOX, "--prior-guidance", "nan"], "'nan' is not a finite number"),
    "a negative seed": ([*FOX, "--seed", "-1"], "--seed must be between 0 and 4294967295, got -1"),
    "a seed beyond 32 bits": ([*FOX, "--seed", "4294967296"], "--seed must be between 0 and"),
    "half a seed": ([*FOX, "--seed", "1.5"], "argument --seed: invalid int value: '1.5'"),
    "a word as seed": ([*FOX, "--seed", "one"], "argument --seed: invalid int value: 'one'"),
    "a negative position": ([*FOX, "--position", "-1"], "--position must be between 0 and"),
    "a position beyond 32 bits": ([*FOX, "--position", "4294967296"], "--position must be between 0 and"),
    "a last position beyond 32 bits": (
        [*FOX, "b", "--position", "4294967295"],
        "--position must be between 0 and 4294967294",
    ),
    "no samples": ([*FOX, "--samples", "0"], "--samples must be between 1 and 10000, got 0"),
    "a negative number of samples": ([*FOX, "--samples", "-3"], "--samples must be between 1 and 10000"),
    "more samples than a grid holds": (
        [*FOX, "b", "--samples", "5001"],
        "--samples must be between 1 and 5000",
    ),
    "a folder as output": ([*FOX, "--out", "folder"], "--out folder is a folder; name a file"),
    "no output": ([*FOX, "--out", ""], "--out '': a path is not empty"),
    "an output below a file": ([*FOX, "--out", "words.png/x.png"], "cannot be written: Not a directory"),
    "an output through a loop": ([*FOX, "--out", "loop"], "--out loop cannot be written: Too many levels"),
    "an output in another format": ([*FOX, "--out", "fox.JPG"], "end the name in .png, not .jpg"),
    "an output in a strange store": ([*FOX, "--out", "s3://b/x.png"], "paths may begin with gs://"),
    "an output where nothing can be": ([*FOX, "--out", "/proc/x.png"], "--out /proc/x.png cannot be written"),
    "an output of nobody": ([*FOX, "--out", "~nobody-here/x.png"], "~nobody-here/x.png: "),
    "an output with a long name": ([*FOX, "--out", "n" * 300], "cannot be written: File name too long"),
    "an output with a NUL": ([*FOX, "--out", "a\0b"], "is not text in UTF-8"),
    "a caption that is no text": (["sample", "a \udcff fox"], "is not text in UTF-8"),
    "words as guidance": ([*FOX, "--guidance", "a,b"], "--guidance must be a finite number"),
    "a NaN as guidance": ([*FOX, "--guidance", "nan"], "--guidance must be a finite number"),
    "an infinite second guidance": ([*FOX, "--guidance", "1,inf"], "--guidance must be a finite number"),
    "no guidance": ([*FOX, "--guidance", ""], "--guidance must be a finite number"),
    "two commas in guidance": ([*FOX, "--guidance", "1,,2"], "--guidance must be a finite number"),
    "an option without its part": ([*FOX, "--set", "steps=3"], "'steps' is not PART.OPTION"),
    "an option of a part without name": ([*FOX, "--set", ".steps=3"], "'.steps' is not PART.OPTION"),
    "a part without an option": ([*FOX, "--set", "decoder.=3"], "'decoder.' is not PART.OPTION"),
    "an option without a value": ([*FOX, "--set", "decoder.steps"], "is not KEY=VALUE"),
    "a value without an option": ([*FOX, "--set", "=3"], "'=3' is not KEY=VALUE"),
    "no bundle": ([*FOX, "--bundle", "nowhere"], "nowhere is not a bundle"),
    "an empty name of a bundle": ([*FOX, "--bundle", ""], "'': a path is not empty"),
    "a file as bundle": ([*FOX, "--bundle", "words.png"], "words.png is not a bundle"),
    "a pipe as bundle": ([*FOX, "--bundle", "pipe"], "pipe is not a bundle"),
    "an empty folder as bundle": ([*FOX, "--bundle", "folder"], "folder is not a bundle"),
    "a bundle of nobody": ([*FOX, "--bundle", "~nobody-here"], "~nobody-here: "),
    "a bundle in a strange store": ([*FOX, "--bundle", "s3://b"], "paths may begin with gs://"),
    "a bundle of the hub without revision": ([*FOX, "--bundle", "hf:x/y"], "write hf:owner/name@revision"),
    "a mesh without sizes": ([*FOX, "--mesh", "data"], "'data' is not KEY=VALUE"),
    "an empty mesh": ([*FOX, "--mesh", ""], "is not KEY=VALUE"),
    "a mesh with a word as size": ([*FOX, "--mesh", "data=x"], "sizes must be whole numbers"),
    "a mesh with a fraction": ([*FOX, "--mesh", "data=1.0"], "sizes must be whole numbers"),
    "a mesh of nothing": ([*FOX, "--mesh", "data=0"], "a mesh of data=0"),
    "a mesh that does not fit": ([*FOX, "--mesh", "data=3"], "does not fit"),
    "an unknown axis": ([*FOX, "--mesh", "rows=2"], "unknown mesh axis rows"),
    "two sizes that are left open": ([*FOX, "--mesh", "data=-1,fsdp=-1"], "does not fit"),
    "two values of an option": (
        [*FOX, "--set", "decoder.steps=2", "--set", "decoder.steps=3"],
        "decoder.steps is given twice: '2' and '3'",
    ),
    "steps by two arguments": (
        [*FOX, "--steps", "2", "--set", "decoder.steps=3"],
        "decoder.steps is given twice: '2' and '3'",
    ),
    "guidance by two arguments": (
        [*FOX, "--guidance", "1,2", "--set", "decoder.guidance_scale=3"],
        "--guidance and --set decoder.guidance_scale say the same thing",
    ),
    "the prior's guidance by two arguments": (
        [*FOX, "--prior-guidance", "2", "--set", "prior_diffusion.guidance_scale=3"],
        "--prior-guidance and --set prior_diffusion.guidance_scale say the same thing",
    ),
    "options of another prior": (
        [*FOX, *TINY, "--prior", "none", "--set", "prior_diffusion.steps=2"],
        "prior_diffusion does not draw with --prior none: leave its options out",
    ),
    "options of a decoder that inpaints": (
        [*FOX, *TINY, "--set", "decoder_inpaint.steps=2"],
        "decoder_inpaint does not draw with --prior prior_diffusion",
    ),
    "a negative caption of another system": (
        [*FOX, *TINY, "--negative", "a cat"],
        "decoder: unknown sampling option negative",
    ),
    "a LoRA that is not there": ([*FOX, *TINY, "--lora", "lora.safetensors=0.5"], "lora.safetensors"),
    "a folder to come as output": ([*FOX, "--out", "new/"], "--out new/ is a folder; name a file"),
    "prompts without a layout": (["sample", "--prompts", "p.txt", "--out", "o"], "give --layout"),
    "a layout without prompts": (["sample", "--layout", "folder", "--out", "o"], "give --prompts"),
    "a layout without a folder": (["sample", "--prompts", "p.txt", "--layout", "folder"], "give --out"),
    "prompts and captions": (
        [*FOX, "--prompts", "p.txt", "--layout", "folder", "--out", "o"],
        "--prompts takes the place of captions and --position",
    ),
    "an unknown layout": (
        ["sample", "--prompts", "p.txt", "--layout", "grid", "--out", "o"],
        "unknown layout 'grid': choose one of geneval, dpg",
    ),
    "no file of prompts": (
        ["sample", "--prompts", "nothing.txt", "--layout", "t2i-compbench", "--out", "o"],
        "no file of prompts 'nothing.txt'",
    ),
    "prompts in latin-1": (
        ["sample", "--prompts", "latin.txt", "--layout", "t2i-compbench", "--out", "o"],
        "latin.txt: a caption is not UTF-8",
    ),
    "a folder of samples over other files": (
        ["sample", "--prompts", "p.txt", "--layout", "folder", "--out", "tiny"],
        "tiny holds files that this command did not write",
    ),
    "two scales for a folder": (
        ["sample", "--prompts", "p.txt", "--layout", "folder", "--out", "o", "--guidance", "1,2"],
        "a folder holds the samples of one guidance scale",
    ),
    "an unknown argument": ([*FOX, "--guidanec", "2"], "unrecognized arguments: --guidanec 2"),
    "an unknown verb": (["draw", "a fox"], "invalid choice: 'draw'"),
}
# Sampling options with a bad value -> words of the message.
OPTIONS = {
    "decoder.steps=0": "decoder: sampling steps must be between 1 and",
    "decoder.steps=-5": "sampling steps must be between 1 and",
    "decoder.steps=99999999999": "sampling steps must be between 1 and",
    "decoder.steps=1.5": "sampling steps '1.5': give a number",
    "decoder.steps=slow27": "sampling steps 'slow27': give a number",
    "decoder.steps=10,,3": "sampling steps '10,,3': give a number",
    "decoder.steps=": "sampling steps '': give a number",
    "decoder.steps=[5, 5]": "listed sampling steps must be distinct",
    "decoder.steps=[]": "listed sampling steps must be distinct, at least one",
    "decoder.steps=[-1]": "listed sampling steps must be",
    "decoder.steps=[1.5]": "the sampling option steps must be",
    "decoder.steps=None": "sampling steps 'None': give a number",
    "decoder.steps=ddim0": "no integer stride takes 0",
    "decoder.steps=0,0": "segment 1 of 2",
    "decoder.eta=nan": "the sampling option eta must be a finite number",
    "decoder.eta=2": "eta must be in [0, 1], got 2",
    "decoder.eta=0.5": "eta=0.5 is for the sampler ddim, not for ddpm: set it to 0",
    "decoder.variance=analytic": "decoder: variance 'analytic' needs measured errors",
    "decoder.variance=huge": "unknown variance 'huge'",
    "decoder.spacing=karras": "unknown spacing 'karras'; choose one of even, leading, trailing",
    "decoder.offset=1": "offset and last belong to the other spacings",
    "decoder.sampler=heun": "unknown sampler 'heun'",
    "decoder.sampler=[]": "unknown sampler '[]'",
    "decoder.clip=-1": "clip must be positive or None",
    "decoder.clip=1e400": "the sampling option clip must be a finite number or None",
    "decoder.threshold=101": "a percentile in (0, 100]",
    "decoder.guidance_scale=1e39": "the sampling option guidance_scale must be a finite number",
    "decoder.guidance_interval=1": "guidance_interval must be a list such as (1, 2)",
    "decoder.guidance_interval=(0,)": "guidance_interval must be two finite numbers",
    "decoder.guidance_interval=(1,0)": "the guidance interval must be 0 <= low < high <= 1",
    "decoder.guidance_rescale=2": "guidance rescale must be in [0, 1]",
    "decoder.guidance_schedule=steep": "unknown guidance schedule 'steep'",
    "prior_ar.candidates=1000000": "candidates must be between 1 and 1024",
    "upsampler_16.guidance_scale=3": "upsampler_16: an upsampler is not guided",
    "decoder.candidates=2": "decoder: only a prior chooses among candidates",
    "prior_diffusion.variance=learned": "prior_diffusion: variance 'learned' needs a network",
    "prior_diffusion.candidates=2.5": "candidates must be a whole number",
    "prior_ar.top_k=0": "top_k must be between 1 and",
    "prior_ar.temperature=-1": "temperature must be 0 or a positive number",
    "prior_ar.dot_quantile=1": "dot_quantile must be in [0, 1)",
    "prior_ar.steps=3": "unknown sampling option steps",
    "clip.steps=3": "unknown part clip in the sampling options",
    "decodr.steps=3": "unknown part decodr in the sampling options",
}
# The verbs that start from a picture.
EDITS = {
    "no name of a picture": (["vary"], "the following arguments are required: IMAGE"),
    "no picture": (["vary", "nothing.png"], "no picture nothing.png"),
    "a broken picture": (["vary", "broken.png"], "broken.png: cannot decode image"),
    "words in place of a picture": (["vary", "words.png"], "words.png: cannot decode image"),
    "an empty picture": (["vary", "empty.png"], "empty.png: "),
    "a folder as picture": (["vary", "folder"], "folder cannot be read: Is a directory"),
    "a loop as picture": (["vary", "loop"], "loop cannot be read: Too many levels of symbolic links"),
    "a picture in a strange store": (["vary", "s3://b/x.png"], "error: s3://b/x.png: paths may begin with"),
    "no variations": ([*VARY, "--count", "0"], "--count must be between 1 and 10000, got 0"),
    "variations beyond a grid": ([*VARY, "--count", "20000"], "--count must be between 1 and 10000"),
    "a NaN as eta": ([*VARY, "--eta", "nan"], "argument --eta: 'nan' is not a finite number"),
    "eta above one": ([*VARY, "--eta", "2"], "eta must be in [0, 1], got 2"),
    "a negative eta": ([*VARY, "--eta", "-0.5"], "eta must be in [0, 1], got -0.5"),
    "infinite guidance of a variation": ([*VARY, "--guidance", "inf"], "'inf' is not a finite number"),
    "guidance beyond float32": ([*VARY, "--guidance", "1e39"], "guidance_scale must be a finite number"),
    "no steps of a variation": ([*VARY, "--steps", "0"], "sampling steps must be between 1 and"),
    "no steps of a fresh variation": ([*VARY, "--fresh", "--steps", "0"], "sampling steps must be between"),
    "a negative seed of a variation": ([*VARY, "--seed", "-1"], "--seed must be between 0 and"),
    "a folder as a variation's output": ([*VARY, "--out", "folder"], "--out folder is a folder"),
    "one end of a path": (["interpolate", "good.png"], "the following arguments are required: B"),
    "a path to nothing": (["interpolate", "good.png", "nothing.png"], "no picture nothing.png"),
    "a path of one picture": ([*BETWEEN, "--count", "1"], "--count must be between 2 and"),
    "an unknown noise": ([*BETWEEN, "--noise", "pink"], "invalid choice: 'pink'"),
    "a number of steps with an exponent": ([*BETWEEN, "--steps", "1e3"], "sampling steps '1e3'"),
    "no caption to edit to": (["edit", "good.png"], "the following arguments are required: --to"),
    "an edit of nothing": (["edit", "nothing.png", "--to", "b"], "no picture nothing.png"),
    "no turn": ([*EDIT, "--theta", "0"], "max_theta must be in (0, 1], got 0"),
    "too far a turn": ([*EDIT, "--theta", "2"], "max_theta must be in (0, 1], got 2"),
    "a NaN as turn": ([*EDIT, "--theta", "nan"], "argument --theta: 'nan' is not a finite number"),
    "an edit in one picture": ([*EDIT, "--count", "1"], "--count must be between 2 and"),
    "no components": ([*AGAIN, "--dims", "0"], "components must be between 1 and"),
    "more components than there are": ([*AGAIN, "--dims", "1", "9999"], "components must be between 1 and"),
    "half a component": ([*AGAIN, "--dims", "2.5"], "argument --dims: invalid int value: '2.5'"),
    "an empty list of components": ([*AGAIN, "--dims"], "argument --dims: expected at least one argument"),
}
INPAINT = {
    "no caption to inpaint": (["good.png"], "the following arguments are required: [MASK] CAPTION"),
    "an opaque picture without a mask": (["good.png", "a fox"], "good.png: the picture is opaque"),
    "a mask and no caption": (["good.png", "black.png"], "black.png is a file, and no caption"),
    "a black mask": (["good.png", "black.png", "a fox"], "black.png: nothing is to be drawn anew"),
    "a mask of another size": (["good.png", "large.png", "a fox"], "large.png is 9x9, but good.png is 8x8"),
    "no mask": (["good.png", "nothing.png", "a fox"], "no picture nothing.png"),
    "no picture to inpaint": (["nothing.png", "white.png", "a fox"], "no picture nothing.png"),
    "a broken mask": (["good.png", "broken.png", "a fox"], "broken.png: cannot decode image"),
    "a caption without quotes": (["good.png", "white.png", "a", "fox"], "IMAGE [MASK] CAPTION, got 1 more"),
    "no passes": ([*MASKED, "--resamples", "0"], "resamples must be between 1 and 1000, got 0"),
    "passes of the trained method": ([*MASKED, "--resamples", "9"], "resamples is for the method resample"),
    "a mask beside the square": (
        ["wide.png", "side.png", "a fox", *TINY],
        "side.png: nothing is to be drawn anew in the centred square",
    ),
    "an unknown method": ([*MASKED, "--method", "gan"], "unknown way to inpaint 'gan'"),
}
AGAINST = ["good.png", "a fox", *TINY]
IMG2IMG = {
    "no caption to draw for": (["good.png"], "the following arguments are required: CAPTION"),
    "no picture to start from": (["nothing.png", "a fox"], "no picture nothing.png"),
    "no strength": ([*AGAINST, "--strength", "0"], "--strength must be in (0, 1], got 0"),
    "too much strength": ([*AGAINST, "--strength", "0.5,1.1"], "--strength must be in (0, 1], got 1.1"),
    "a word as strength": ([*AGAINST, "--strength", "high"], "--strength must be a finite number"),
    "a strength without a step": (
        [*AGAINST, "--strength", "0.1", "--steps", "5", "--prior", "none"],
        "a strength of 0.1 makes none of 5 steps: raise the strength or the steps",
    ),
    "pictures of no number": ([*AGAINST, "--count", "0"], "--count must be between 1 and"),
    "more strengths than a grid holds": (
        [*AGAINST, "--strength", "0.5,0.6", "--count", "6000"],
        "one grid holds 10000 pictures",
    ),
    "two scales from a picture": ([*AGAINST, "--guidance", "1,2"], "img2img draws with one guidance scale"),
    "two priors from a picture": ([*AGAINST, "--prior", "none,null"], "unknown prior 'none,null'"),
    "options of another decoder": (
        [*AGAINST, "--set", "decoder_inpaint.steps=2"],
        "decoder_inpaint does not draw here",
    ),
}
COMPLETE = {
    "nothing to complete": (["good.png"], "the following arguments are required: CAPTION"),
    "no picture to complete": (["nothing.png", "a fox"], "no picture nothing.png"),
    "a broken picture to complete": (["broken.png", "a fox"], "broken.png: cannot decode image"),
    "no rows to keep": ([*AGAINST, "--rows", "0"], "the share of the picture that is kept, in (0, 1), got 0"),
    "all rows to keep": (
        [*AGAINST, "--rows", "1"],
        "the share of the picture that is kept, in (0, 1), got 1",
    ),
    "a word as rows to keep": ([*AGAINST, "--rows", "half"], "'half' is not a finite number"),
    "two scales of a completion": ([*AGAINST, "--guidance", "1,2"], "complete draws with one guidance scale"),
    "a system without codes": (AGAINST, "the system unclip cannot complete a picture from its upper rows"),
}
UPSCALE = {
    "nothing to enlarge": ([], "the following arguments are required: IMAGE"),
    "no picture to enlarge": (["nothing.png", *TINY], "no picture nothing.png"),
    "a broken picture to enlarge": (["good.png", "broken.png", *TINY], "broken.png: cannot decode image"),
    "two pictures in one file": (
        ["good.png", "wide.png", "--out", "o.png"],
        "several pictures need a folder",
    ),
    "two pictures of one name": (
        ["good.png", "photos/good.png", "--out", "o"],
        "two pictures are called good: enlarge them one at a time",
    ),
    "pictures over themselves": (
        ["good.png", "wide.png", "--out", "."],
        "good.png exists; name another folder",
    ),
    "a decoder to enlarge with": (
        ["good.png", *TINY, "--part", "decoder"],
        "decoder is no upsampler of the bundle; choose of upsampler_16",
    ),
    "a caption for upsamplers without": (["good.png", *TINY, "--caption", "a"], "read no caption"),
    "guidance of an upsampler": (
        ["good.png", *TINY, "--set", "upsampler_16.guidance_scale=2"],
        "an upsampler is not guided",
    ),
}
EVALUATE = {
    "no task": ([], "the following arguments are required: TASK"),
    "an unknown task": (["lpips"], "invalid choice: 'lpips'"),
    "one row": (["samples", "--rows", "1"], "--rows must be between 2 and"),
    "a part of a group of rows": (["samples", "--rows", "150"], "or a multiple of 100 up to 600, got 150"),
    "more rows than there are": (["samples", "--rows", "100000"], "or a multiple of 100 up to 600"),
    "a word as rows": (["samples", "--rows", "all"], "argument --rows: invalid int value: 'all'"),
    "an unknown prior to measure": (["samples", "--prior", "none,gan"], "unknown prior 'gan'"),
    "data of samples": (["samples", "--data", "name=folder"], "leave out --data, --train and --skip-bad"),
    "a negative seed of rows": (["retrieval", "--seed", "-1"], "--seed must be between 0 and"),
    "a training source of retrieval": (["retrieval", "--train", "split=val"], "--train is for probe"),
    "a training source of zeroshot": (["zeroshot", "--train", "split=val"], "--train is for probe"),
    "unknown templates": (["zeroshot", "--templates", "foto"], "unknown templates 'foto'"),
    "a folder as templates": (["zeroshot", "--templates", "folder"], "unknown templates 'folder'"),
    "templates without a place": (["zeroshot", "--templates", "words.png"], "must have one {} for the class"),
    "templates in latin-1": (["zeroshot", "--templates", "latin.txt"], "latin.txt: 'utf-8' codec"),
    "an unknown label": (["zeroshot", "--label", "colour", *TINY], "has no colour"),
    "a label with one class": (["zeroshot", "--label", "split", *TINY], "has 1 class by split"),
    "an unknown split to train on": (["probe", "--train", "split=all_of_it"], "unknown split 'all_of_it'"),
}
DOCTOR = {
    "no bundle to examine": (["nothing"], "nothing is not a bundle"),
    "a picture to examine": (["good.png"], "good.png is not a bundle"),
    "two bundles to examine": (["emoji", "judge"], "unrecognized arguments: judge"),
    "a CLIP beside a whole one": (["tiny", "--clip", "judge"], "has CLIP's image tower already"),
    "a CLIP that is not there": (
        ["towerless", "--clip", "nowhere"],
        "nowhere holds neither checkpoints nor a bundle",
    ),
    "a CLIP of another space": (["towerless", "--clip", "judge"], "makes image embeddings in another space"),
    "too few rows to examine": (["--rows", "15"], "--rows must be between 16 and 10000, got 15"),
    "one drawn caption": (["--drawn", "1"], "--drawn must be between 2 and 64, got 1"),
    "more drawn captions than half the rows": (["--rows", "16", "--drawn", "9"], "between 2 and 8, got 9"),
    "a grid of nothing drawn": (["--drawn", "0", "--grid", "g.png"], "--grid shows drawn pictures"),
    "a grid in another format": (["--grid", "g.jpg"], "--grid g.jpg: pictures are written as PNG"),
    "a report in a folder": (["--json", "folder"], "--json folder is a folder; name a file"),
    "a report and a grid in one file": (["--json", "g.png", "--grid", "g.png"], "write to the same file"),
    "a negative seed of an examination": (["--seed", "-1"], "--seed must be between 0 and"),
    "an unknown split to examine on": (["--data", "split=all_of_it"], "unknown split 'all_of_it'"),
    "balanced rows to examine": (["--data", "balance={}"], "balance repeats records"),
    "a folder with too few pictures": (
        ["--data", "name=folder", "--data", "path=photos"],
        "the doctor needs 16 records of",
    ),
    "devices that are not there": (["--mesh", "data=4000"], "4000"),
}
SERVE = {
    "a server that everybody reaches": (["--host", "0.0.0.0"], "lets other machines in: set a key"),
    "a server that everybody reaches by IPv6": (["--host", "::"], "lets other machines in"),
    "a server that a name reaches": (["--host", "example.org"], "lets other machines in"),
    "a short key": (["--api-key", "short"], "must have at least 8 characters"),
    "a key and none": (["--api-key", "long enough", "--no-auth"], "exclude each other"),
    "a batch of nothing": (["--batch", "0"], "batch must be at least 1"),
    "an unknown verb to compile": (["--compile", "edits,dreams"], "unknown verb 'dreams' to compile"),
    "a queue of nothing": (["--queue", "0"], "queue must be at least 1"),
    "no deadline": (["--deadline", "0"], "deadline must be a positive number"),
    "an upload of nothing": (["--upload", "0"], "upload must be at least"),
    "a port beyond 16 bits": (["--port", "70000"], "--port must be between 0 and 65535"),
    "a port below 0": (["--port", "-1"], "--port must be between 0 and 65535"),
    "an address that is not there": (["--host", "192.0.2.1", "--no-auth"], "cannot listen on 192.0.2.1"),
    "no bundle to serve": (["--bundle", "nowhere", "--port", "0"], "nowhere is not a bundle"),
    "a bundle to serve that only embeds": (["--bundle", "judge", "--port", "0"], "has no part 'decoder'"),
    "a bundle to serve twice": (
        ["--bundle", "tiny", "--bundle", "tiny", "--port", "0"],
        "two bundles are called",
    ),
    "a mesh for the server that does not fit": (["--mesh", "data=3", "--port", "0"], "does not fit"),
}


def rows(box: Path) -> list[Row]:
    """Makes the files and returns the rows."""
    for name, size, value in (("good", 8, 0), ("black", 8, 0), ("white", 8, 255), ("large", 9, 255)):
        Image.fromarray(np.full((size, size, 3), value, np.uint8)).save(box / f"{name}.png")
    side = np.zeros((8, 20, 3), np.uint8)
    Image.fromarray(side).save(box / "wide.png")
    side[:, :3] = 255
    Image.fromarray(side).save(box / "side.png")
    (box / "broken.png").write_bytes((box / "good.png").read_bytes()[:40])
    (box / "words.png").write_text("no picture")
    (box / "empty.png").write_bytes(b"")
    (box / "p.txt").write_text("a fox\na heart\n")
    (box / "latin.txt").write_bytes("ein Bär {}".encode("latin-1"))
    (box / "folder").mkdir()
    (box / "photos").mkdir()
    (box / "photos" / "good.png").write_bytes((box / "good.png").read_bytes())
    (box / "photos" / "good.txt").write_text("a grey square")
    (box / "loop").symlink_to("loop")
    os.mkfifo(box / "pipe")
    bundle = random_bundle()
    save_bundle(bundle, box / "tiny")
    save_bundle(without_image_tower(bundle), box / "towerless")
    options = {f"--set {item}": ([*FOX, *TINY, "--set", item], says) for item, says in OPTIONS.items()}
    inpaint = {name: (["inpaint", *words], says) for name, (words, says) in INPAINT.items()}
    upscale = {name: (["upscale", *words], says) for name, (words, says) in UPSCALE.items()}
    img2img = {name: (["img2img", *words], says) for name, (words, says) in IMG2IMG.items()}
    complete = {name: (["complete", *words], says) for name, (words, says) in COMPLETE.items()}
    evaluate = {name: (["evaluate", *words], says) for name, (words, says) in EVALUATE.items()}
    serve = {name: (["serve", *words], says) for name, (words, says) in SERVE.items()}
    doctor = {name: (["doctor", *words], says) for name, (words, says) in DOCTOR.items()}
    drawn = SAMPLE | options | EDITS | inpaint | img2img | complete | upscale
    return [Row(name, argv, says) for name, (argv, says) in (drawn | evaluate | serve | doctor).items()]
