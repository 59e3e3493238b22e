"""Bad inputs of the figures of `unclip evaluate`: sets, statistics, captions, networks and options."""

import dataclasses
import json
from pathlib import Path

import numpy as np
from PIL import Image

from tests.cli.bad_inputs import Row
from tests.runs import random_bundle
from unclip_jax.checkpoint.bundle import save_bundle
from unclip_jax.evaluate.statistics import Recipe

PAIR = ["pictures", "pictures", "--partial"]
TINY = ["bundle=tiny", "pictures", "--partial"]
# What is wrong with the words of `evaluate fid` -> those words, and words of the message.
FID = {
    "no set": ([], "the following arguments are required: SET, REFERENCE"),
    "no reference": (["pictures"], "the following arguments are required: REFERENCE"),
    "a set that is not there": (["nothing", "pictures"], "there is no folder or file 'nothing'"),
    "a reference that is not there": (
        ["pictures", "nothing.npz"],
        "there is no folder or file 'nothing.npz'",
    ),
    "an empty folder": (["empty", "pictures"], "no image in folder 'empty'"),
    "a folder of texts": (["texts", "pictures"], "no image in folder 'texts'"),
    "a set without a name": (["", "pictures"], "'': a path is not empty"),
    "a set in a strange store": (["s3://b/x", "pictures"], "paths may begin with gs://"),
    "a bundle without bundle=": (["tiny", "pictures"], "tiny is a bundle: write bundle=tiny"),
    "a bundle with other keys": (["bundle=tiny,steps=3", "pictures"], "a bundle takes no other key"),
    "a bundle that is not there": (["bundle=nowhere", "pictures", "--captions", "c.txt"], "is not a bundle"),
    "an unknown source": (["name=gan", "pictures"], "unknown data source 'gan'"),
    "a source without its name": (["path=pictures", "pictures"], "unknown data source None"),
    "an unknown key of a source": (["name=emoji,size=3", "pictures"], "unknown key 'size'"),
    "a picture as set": (["pictures/0.png", "pictures"], "0.png is no archive of NumPy (.npz)"),
    "cut statistics": (["pictures", "cut.npz"], "cut.npz is no archive of NumPy (.npz), or it is cut off"),
    "statistics of nothing": (["pictures", "other.npz"], "other.npz holds x: expected mu and sigma"),
    "a pickle as statistics": (["pictures", "stats.pt"], "a pickle is not read"),
    "pickled objects in an archive": (
        ["pictures", "objects.npz", "--made-by", "adm"],
        "the array mu is damaged",
    ),
    "statistics that do not say how": (["pictures", "foreign.npz"], "name the tool with --made-by (adm, "),
    "an unknown tool": (["pictures", "foreign.npz", "--made-by", "me"], "unknown maker 'me' of statistics"),
    "statistics with a NaN": (
        ["pictures", "nan.npz", "--made-by", "adm"],
        "values that are not finite numbers",
    ),
    "statistics in a later format": (["pictures", "later.npz"], "another version of the format than 1"),
    "statistics of two networks": (
        ["ours.npz", "dinov2.npz", "--partial"],
        "were made differently: network 'inception' and 'dinov2'",
    ),
    "statistics of two resizes": (
        ["ours.npz", "foreign.npz", "--partial", "--made-by", "clean-fid"],
        "resize 'tf1-bilinear 299' and 'clean bicubic 299'",
    ),
    "statistics of other widths": (
        ["ours.npz", "foreign.npz", "--partial", "--made-by", "adm"],
        "features of different widths: 2 and 3",
    ),
    "few images": (["pictures", "pictures"], "fid is measured on 50,000 images (Heusel et al. 2017), and"),
    "an unknown number of images": (
        ["foreign.npz", "ours.npz", "--made-by", "adm"],
        "does not say how many images it describes",
    ),
    "one image": (["one", "pictures", "--partial"], "fid needs at least two images, and one has 1"),
    "one image as reference": (["pictures", "one", "--partial"], "needs at least two images, and one has 1"),
    "no network": (PAIR, "the weights of inception are not here: run `unclip fetch inception` once"),
    "a bundle as Inception": ([*PAIR, "--weights", "tiny"], "inception"),
    "an empty folder as Inception": ([*PAIR, "--weights", "empty"], "empty"),
    "one row": ([*PAIR, "--rows", "1"], "--rows must be between 2 and"),
    "one row of the reference": ([*PAIR, "--reference-rows", "1"], "--reference-rows must be between 2 and"),
    "rows of statistics": (
        ["pictures", "ours.npz", "--partial", "--reference-rows", "5"],
        "--reference-rows cannot choose among its images",
    ),
    "a negative seed of subsets": ([*PAIR, "--seed", "-1"], "--seed must be between 0 and"),
    "an empty batch": ([*PAIR, "--batch", "0"], "--batch must be between 1 and"),
    "an unknown crop": ([*PAIR, "--crop", "random"], "unknown crop 'random': choose none or center"),
    "a size without a crop": ([*PAIR, "--size", "64"], "a size goes with the crop center"),
    "a size of nothing": ([*PAIR, "--crop", "center", "--size", "0"], "lies between 1 and 4096"),
    "a quality above all": ([*PAIR, "--jpeg", "101"], "the quality of JPEG lies between 1 and 100"),
    "a working folder in a store": ([*PAIR, "--work", "gs://b/x"], "the folder must be local"),
    "statistics in another format": ([*PAIR, "--save-statistics", "s.csv"], "end the name in .npz"),
    "statistics into a folder": ([*PAIR, "--save-statistics", "empty/x.npz/"], "end the name in .npz"),
    "JSON into a folder": ([*PAIR, "--json", "empty"], "empty is a folder; name a file"),
    "a mesh that does not fit the devices": ([*PAIR, "--mesh", "data=3"], "does not fit"),
    "captions without a bundle": ([*PAIR, "--captions", "c.txt"], "--captions says how a bundle draws"),
    "guidance without a bundle": ([*PAIR, "--guidance", "3"], "--guidance says how a bundle draws"),
    "options without a bundle": ([*PAIR, "--set", "decoder.steps=3"], "--set says how a bundle draws"),
    "captions that are not there": (
        [*TINY, "--captions", "nothing.txt"],
        "no file of captions 'nothing.txt'",
    ),
    "captions of nothing": ([*TINY, "--captions", "blank.txt"], "blank.txt has no captions"),
    "a blank caption": ([*TINY, "--captions", "gap.txt"], "gap.txt: line 2 is blank"),
    "images without captions": (TINY, "has no caption"),
    "an array without captions": (["bundle=tiny", "batch.npz"], "say what the bundle draws: --captions FILE"),
    "an unknown prior to draw with": ([*TINY, "--prior", "gan"], "unknown prior 'gan'"),
    "two scales for one figure": ([*TINY, "--guidance", "1,2"], "a figure is measured at one guidance scale"),
    "options of another part": (
        [*TINY, "--captions", "c.txt", "--prior", "null", "--set", "prior_ar.top_k=3"],
        "prior_ar does not draw with the prior null",
    ),
}
SWEEP = ["sweep", "bundle=tiny", "pictures", "--partial"]
COCO = ["coco30k", "bundle=tiny", "--coco", "coco"]
OTHERS = {
    "a sweep of pictures": (["sweep", "pictures", "pictures"], "a sweep measures what a bundle draws"),
    "a bundle as reference of a sweep": (
        ["sweep", "bundle=tiny", "bundle=tiny"],
        "the reference of a sweep is no",
    ),
    "an unknown figure of a sweep": (
        [*SWEEP, "--figures", "fid,lpips"],
        "unknown figure 'lpips' in --figures",
    ),
    "no figure of a sweep": ([*SWEEP, "--figures", ""], "unknown figure '' in --figures"),
    "words as scales of a sweep": ([*SWEEP, "--guidance", "1,much"], "--guidance must be a finite number"),
    "a plot of one scale": ([*SWEEP, "--plot", "p.png"], "--plot draws a line through several scales"),
    "a plot of nothing": (
        [*SWEEP, "--plot", "p.png", "--guidance", "1,2", "--figures", "kid"],
        "--plot draws FID, or precision against recall",
    ),
    "a plot in another format": ([*SWEEP, "--plot", "p.pdf", "--guidance", "1,2"], "end the name in .png"),
    "a sweep without captions": (SWEEP, "has no caption"),
    "COCO without its folder": (["coco30k", "bundle=tiny"], "the following arguments are required: --coco"),
    "COCO that is not there": (COCO, "unpack MS-COCO's annotations of 2014 into coco"),
    "COCO without pictures": (
        ["coco30k", "bundle=tiny", "--coco", "annotated", "--rows", "2", "--partial"],
        "unpack MS-COCO's validation images of 2014 into annotated",
    ),
    "more captions than COCO has": (
        ["coco30k", "bundle=tiny", "--coco", "annotated"],
        "has 2 captions, and 30,000",
    ),
    "an unknown table": ([*COCO, "--expect", "sdxl"], "no published table 'sdxl': choose one of karlo"),
    "a table at another guidance": (
        [*COCO, "--expect", "karlo", "--guidance", "3"],
        "--expect sets the guidance, the steps and the rows itself",
    ),
    "a table of fewer rows": ([*COCO, "--expect", "karlo", "--rows", "100"], "--expect sets the guidance"),
    "a table without its figures": (
        [*COCO, "--expect", "karlo", "--figures", "kid"],
        "must name fid and clip-score",
    ),
    "a reference of the CLIP score": (["clip-score", "pictures", "pictures"], "unrecognized arguments"),
    "CLIP without weights": (["clip-score", "name=emoji,split=val"], "clip"),
    "an unknown network": (["kid", *PAIR, "--network", "vgg"], "unknown feature network 'vgg'"),
    "features of moments": (
        ["kid", "pictures", "ours.npz", "--partial"],
        "ours.npz holds the mean and the covariance alone, and kid needs the features",
    ),
    "an array without captions for the CLIP score": (["clip-score", "batch.npz"], "has no captions, which"),
    "few images of KID": (["kid", "pictures", "pictures"], "kid is measured on 1,000 images"),
    "extrapolated moments": (["fid", "ours.npz", "ours.npz", "--partial", "--infinity"], "needs its images"),
}


def rows(box: Path) -> list[Row]:
    """Makes the files and returns the rows."""
    for folder, count in (("pictures", 4), ("one", 1), ("empty", 0), ("texts", 0)):
        (box / folder).mkdir()
        for i in range(count):
            pixels = np.random.default_rng(i).integers(0, 256, (8, 9, 3), np.uint8)
            Image.fromarray(pixels).save(box / folder / f"{i}.png")
    (box / "texts" / "a.txt").write_text("a")
    (box / "annotated" / "annotations").mkdir(parents=True)
    listed = {"annotations": [{"caption": "a fox"}, {"caption": "a heart"}]}
    (box / "annotated" / "annotations" / "captions_val2014.json").write_text(json.dumps(listed))
    save_bundle(random_bundle(), box / "tiny")
    (box / "c.txt").write_text("a fox\na heart\n")
    (box / "blank.txt").write_text(" \n")
    (box / "gap.txt").write_text("a fox\n\na heart\n")
    recipe = Recipe("inception", "a" * 64, "tf1-bilinear 299", "none", "none")
    for name, made, changes in (
        ("ours", recipe, {}),
        ("dinov2", dataclasses.replace(recipe, network="dinov2"), {}),
        ("later", recipe, {"format": 2}),
    ):
        about = {"format": 1, "recipe": dataclasses.asdict(made), "count": 9, "stored": []} | changes
        np.savez(box / f"{name}.npz", mu=np.zeros(2), sigma=np.eye(2), about=np.asarray(json.dumps(about)))
    np.savez(box / "foreign.npz", mu=np.zeros(3), sigma=np.eye(3))
    np.savez(box / "nan.npz", mu=np.array([np.nan, 0]), sigma=np.eye(2))
    np.savez(box / "objects.npz", mu=np.array([None, {}]), sigma=np.eye(2))
    np.savez(box / "other.npz", x=np.zeros(2))
    np.savez(box / "batch.npz", arr_0=np.zeros((4, 8, 8, 3), np.uint8))
    (box / "cut.npz").write_bytes((box / "ours.npz").read_bytes()[:300])
    (box / "stats.pt").write_bytes(b"\x80\x02}q\x00.")
    fid = {name: (["fid", *words], says) for name, (words, says) in FID.items()}
    return [Row(name, ["evaluate", *words], says) for name, (words, says) in (fid | OTHERS).items()]
