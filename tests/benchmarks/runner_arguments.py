"""What real_llm.py hands to the programs that it runs in the peers' environments."""

import argparse
import json
from pathlib import Path


def parse_arguments(package_class):
    """The command line; `config` holds keyword arguments of that class of the package."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model_path", type=Path)
    parser.add_argument("save_directory", type=Path)
    parser.add_argument("config", type=json.loads, help=f"keyword arguments of the package's {package_class}")
    parser.add_argument("windows", type=Path, help="list of int64 [tokens], as torch.save writes it")
    return parser.parse_args()
