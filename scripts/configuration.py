"""Hydra and OmegaConf, which configure the scripts: imported here, so that one line says how to get them."""

import sys

try:
    import hydra
    from omegaconf import DictConfig, OmegaConf
except ModuleNotFoundError as error:
    if error.name not in ("hydra", "omegaconf"):
        raise
    print("error: scripts need Hydra; install it with: pip install 'stnerp[scripts]'", file=sys.stderr)
    sys.exit(2)

__all__ = ["DictConfig", "OmegaConf", "hydra"]
