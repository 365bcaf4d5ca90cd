# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""`trl-rkld recipes`: the recipes that come with the package, by name."""

import argparse
import shutil
from importlib import resources
from pathlib import Path


def _root() -> Path:
    return Path(str(resources.files("trl_rkld.recipes")))


def list_recipes() -> list[str]:
    """Names of the recipes, such as `"smollm2-135m/tofu/config_rkld_qlora"`."""
    paths = (path.relative_to(_root()).with_suffix("") for path in _root().rglob("*.yaml"))
    return sorted(path.as_posix() for path in paths if path.parts[0] != "accelerate_configs")


def recipe_path(name: str) -> Path:
    """File of the recipe called `name` (`str`)."""
    return _root() / f"{name}.yaml"


def resolve_recipe(arguments: list[str]) -> list[str]:
    """Let `--config` name a recipe as well as a file."""
    if "--config" in arguments[:-1]:
        value = arguments.index("--config") + 1
        if not Path(arguments[value]).is_file():
            if arguments[value] not in list_recipes():
                raise ValueError(
                    f"`--config {arguments[value]}` is neither a file nor a recipe. `trl-rkld recipes` lists them."
                )
            arguments = [*arguments[:value], str(recipe_path(arguments[value])), *arguments[value + 1 :]]
    return arguments


def run_recipes(arguments: list[str]) -> int:
    """
    List the recipes, or copy one, with the data files beside it, into a folder.

    Args:
        arguments (`list[str]`):
            Command-line arguments.

    Returns:
        `int`:
            Exit code.
    """
    parser = argparse.ArgumentParser(prog="trl-rkld recipes", description="List the recipes, or copy one.")
    parser.add_argument("name", nargs="?", help="recipe to copy")
    parser.add_argument("--output_dir", default=".", help="where to (default: here)")
    args = parser.parse_args(arguments)
    if args.name is None:
        print("\n".join(list_recipes()))
        return 0
    if args.name not in list_recipes():
        raise ValueError(f"there is no recipe `{args.name}`. The recipes are:\n  " + "\n  ".join(list_recipes()))
    source = recipe_path(args.name)
    for path in [source, *source.parent.glob("*.jsonl")]:
        target = Path(args.output_dir) / path.name
        if target.exists():
            raise ValueError(f"`{target}` exists. Choose another --output_dir, or move it away.")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
        print(target)
    return 0
