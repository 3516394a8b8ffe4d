"""Names in YAML and the classes behind them: one line per component, imported when asked for."""

from __future__ import annotations

import importlib
import sys
import traceback
from pathlib import Path
from typing import Any

from gossamer.runtime.component import Component
from gossamer.runtime.errors import ConfigError, nearest

__all__ = ["REGISTRY", "find", "import_object"]

REGISTRY: dict[str, dict[str, str]] = {
    "task": {
        "a9a": "tasks.svmlight:A9A",
        "breast-cancer": "tasks.bundled:BreastCancer",
        "contrastive": "tasks.contrastive:Contrastive",
        "custom": "tasks.custom:Custom",
        "digits": "tasks.bundled:Digits",
        "huggingface": "tasks.huggingface:HuggingFace",
        "least-squares": "tasks.least_squares:LeastSquares",
        "mnist": "tasks.mnist:MNIST",
        "pretraining": "tasks.pretraining:Pretraining",
        "prompted": "tasks.prompted:Prompted",
        "svmlight": "tasks.svmlight:SVMLight",
        "text": "tasks.text:Text",
        "wine": "tasks.bundled:Wine",
    },
    "oracle": {
        "backprop": "oracles.backprop:Backprop",
        "contrastive": "contrastive.contrastive:Contrastive",
        "disk": "privacy.disk:Disk",
        "doppler": "privacy.doppler:Doppler",
        "dp": "privacy.dp:DP",
        "public": "privacy.public:PublicData",
        "zeroth-order": "zeroth_order.zeroth_order:ZerothOrder",
    },
    "optimizer": {
        "sgd": "optimizers.sgd:SGD",
        "momentum": "optimizers.sgd:Momentum",
        "adam": "optimizers.adam:Adam",
        "adamw": "optimizers.adam:AdamW",
        "adam8bit": "optimizers.adam8bit:Adam8bit",
        "adam-bc": "optimizers.adam_bc:AdamBC",
        "galore": "optimizers.galore:GaLore",
        "lars": "optimizers.lars:LARS",
        "sign-sgd": "optimizers.sgd:SignSGD",
    },
    "algorithm": {
        "d-nasa": "decentralized.dnasa:DNASA",
        "dsgd": "decentralized.dsgd:DSGD",
        "all-reduce": "decentralized.all_reduce:AllReduce",
        "gradient-tracking": "decentralized.gradient_tracking:GradientTracking",
        "qg-dsgdm": "decentralized.quasi_global:QGDSGDm",
        "qg-adam": "decentralized.quasi_global:QGAdam",
        "decentlam": "decentralized.decentlam:DecentLaM",
        "momentum-tracking": "decentralized.momentum_tracking:MomentumTracking",
        "edm": "decentralized.d2:EDM",
        "d2": "decentralized.d2:D2",
        "extra": "decentralized.extra:Extra",
        "k-gt": "decentralized.kgt:KGT",
        "mt-dsgt": "decentralized.mt_dsgt:MTDSGT",
        "official-dsgd": "decentralized.dnasa_baselines:OfficialDSGD",
        "official-dsgt": "decentralized.dnasa_baselines:OfficialDSGT",
        "d-asagt": "decentralized.dnasa_baselines:DASAGT",
        "sgp": "decentralized.sgp:SGP",
        "push-diging": "decentralized.push_diging:PushDIGing",
        "choco": "decentralized.choco:Choco",
        "deepsqueeze": "decentralized.deepsqueeze:DeepSqueeze",
        "local-sgd": "decentralized.local_sgd:LocalSGD",
        "slowmo": "decentralized.slowmo:SlowMo",
        "diloco": "decentralized.diloco:DiLoCo",
        "gt-hsgd": "decentralized.gt_hsgd:GTHSGD",
        "damsgrad": "decentralized.damsgrad:DAMSGrad",
        "ad-psgd": "decentralized.ad_psgd:ADPSGD",
        "dnsgd": "decentralized.dnsgd:DNSGD",
        "gt-nsgdm": "decentralized.gt_nsgdm:GTNSGDm",
        "conservative": "zeroth_order.conservative:Conservative",
        "flood": "zeroth_order.flood:Flood",
        "coefficient-gossip": "zeroth_order.coefficient_gossip:CoefficientGossip",
    },
}
"""kind -> name -> ``module:Class`` below ``gossamer.algorithms``."""


def find(kind: str, name: str) -> type[Component]:
    """Return the class called ``name``, or the user's own ``package.module:Class``.

    Raises:
        ConfigError: no such name (the nearest ones are offered), or the import fails.
    """
    if ":" in name:
        found = import_object(name, f"{kind}.name")
        if not (isinstance(found, type) and issubclass(found, Component)):
            raise ConfigError(
                f"{kind}.name: {name} is not a class derived from gossamer's {kind.capitalize()}"
            )
        return found
    name = name.replace("_", "-")
    if name not in REGISTRY[kind]:
        raise ConfigError(
            f"{kind}.name: unknown {kind} '{name}'{nearest(name, REGISTRY[kind])} "
            f"(your own: 'package.module:Class')"
        )
    module, _, cls = REGISTRY[kind][name].partition(":")
    found = getattr(importlib.import_module(f"gossamer.algorithms.{module}"), cls)
    assert isinstance(found, type), found
    assert issubclass(found, Component), found
    return found


def import_object(path: str, where: str) -> Any:
    """Import ``package.module:object``; the current folder counts as importable.

    Raises:
        ConfigError: names ``where``, the path and what failed.
    """
    module, _, name = path.partition(":")
    if not all(part.isidentifier() for part in [*module.split("."), name]):
        what = "Class" if where.endswith(".name") else "function"
        raise ConfigError(f"{where}: must be 'package.module:{what}', got '{path}'")
    if str(Path.cwd()) not in sys.path:  # an installed command does not look here by itself
        sys.path.insert(0, str(Path.cwd()))
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if not module.startswith(str(error.name)):
            raise ConfigError(
                f"{where}: '{module}' imports '{error.name}', which is not installed; install it"
            ) from error
        raise ConfigError(
            f"{where}: there is no module '{module}' in {Path.cwd()} or on PYTHONPATH, asked for "
            f"by '{path}'; run from its folder, or install it"
        ) from error
    except Exception as error:
        raise ConfigError(
            f"{where}: importing '{module}' failed: {_cause(error)}; correct that file"
        ) from error
    if not hasattr(found, name):
        known = [n for n in vars(found) if not n.startswith("_")]
        raise ConfigError(f"{where}: {module} has no '{name}'{nearest(name, known)}")
    return getattr(found, name)


def _cause(error: Exception) -> str:
    """Return the error and its place in the user's file, on one line."""
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error.msg} ({error.filename}, line {error.lineno})"
    at = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({at.filename}, line {at.lineno})"
