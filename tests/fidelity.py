"""torch-fidelity, the reference of the figures, without torchvision.

torch-fidelity imports torchvision when it is loaded, but its figures and its Inception need none of it, and
its reader of folders needs one function.
torchvision's compiled half loads only beside the build of torch that it was made for. So stand-ins take its
place while torch-fidelity is loaded.
"""

import importlib
import importlib.util
import sys
import types

import numpy as np
import pytest
import torch

_ABSENT = (
    "torchvision",
    "torchvision.datasets",
    "torchvision.models",
    "torchvision.transforms",
    "torchvision.transforms.functional",
)


def _pil_to_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def torch_fidelity(name):
    """The module `torch_fidelity.NAME`; the test is skipped where torch-fidelity is not installed."""
    if importlib.util.find_spec("torch_fidelity") is None:
        pytest.skip("needs torch-fidelity")
    modules = {absent: types.ModuleType(absent) for absent in _ABSENT}
    for kind in ("CIFAR10", "STL10", "CIFAR100"):
        setattr(modules["torchvision.datasets"], kind, object)
    modules["torchvision.transforms.functional"].pil_to_tensor = _pil_to_tensor
    for path, module in modules.items():
        parent, _, child = path.rpartition(".")
        if parent:
            setattr(modules[parent], child, module)
    with pytest.MonkeyPatch.context() as patch:
        for path, module in modules.items():
            patch.setitem(sys.modules, path, module)
        return importlib.import_module(f"torch_fidelity.{name}")
