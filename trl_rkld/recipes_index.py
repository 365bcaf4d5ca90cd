# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""What comes with the package and `--config` finds by name; `trl-rkld recipes`, which lists and copies the recipes."""

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
    recipes = {name: recipe_path(name) for name in list_recipes()}
    return resolve_config(arguments, recipes, "a recipe. `trl-rkld recipes` lists them")


def resolve_config(arguments: list[str], shipped: dict[str, Path], what: str) -> list[str]:
    """
    Let `--config` name something that comes with the package as well as a file.

    Args:
        arguments (`list[str]`):
            Command-line arguments.
        shipped (`dict[str, Path]`):
            What comes with the package, by name.
        what (`str`):
            What these are, for the message.

    Returns:
        `list[str]`:
            The arguments, with a file behind `--config`.
    """
    arguments = [part for argument in arguments for part in _parts(argument)]
    if "--config" not in arguments[:-1]:
        return arguments
    value = arguments.index("--config") + 1
    name = arguments[value]
    if Path(name).is_file():
        return arguments
    if name not in shipped:
        raise ValueError(f"`--config {name}` is neither a file nor {what}.")
    return [*arguments[:value], str(shipped[name]), *arguments[value + 1 :]]


def _parts(argument: str) -> list[str]:
    return argument.split("=", 1) if argument.startswith("--config=") else [argument]


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
    output = Path(args.output_dir)
    files = [source, *source.parent.glob("*.jsonl")]
    for target in [output / path.name for path in files]:
        if target.exists():
            raise ValueError(f"`{target}` exists. Choose another --output_dir, or move it away.")
    output.mkdir(parents=True, exist_ok=True)
    for path in files:
        print(shutil.copy(path, output / path.name))
    return 0
