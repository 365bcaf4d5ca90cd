# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""`trl-rkld <command>`: training commands go through `accelerate launch`, as `trl` does; the others run here."""

import importlib
import subprocess
import sys

from .methods import METHODS, script_of
from .recipes_index import resolve_recipe, run_recipes


TRAINING_COMMANDS = {method: text for method, (_, text) in METHODS.items()} | {
    "idk": "unlearn by fine-tuning on refusals",
    "dpo": "unlearn by preferring refusals to the answers (DPO)",
    "finetune": "fine-tune a model on the records (to try unlearning out)",
}
COMMANDS = {
    "task-vector": "unlearn by task arithmetic, without training",
    "merge": "merge an adapter into its base (4-bit: into the dequantised base)",
    "demo": "fine-tune, unlearn and compare a small model on the spot (one to two minutes, no network)",
    "compare": "compare methods on TOFU: train, unlearn, evaluate every epoch, table and figure",
    "eval": "evaluate models and adapters on TOFU, or on records of your own",
    "rescore": "recompute the aggregates of a TOFU log from its per-item values",
    "plot": "draw forget quality against model utility, from result logs or a CSV",
    "recipes": "list the recipes, or copy one",
}


def main(argv: list[str] | None = None) -> int:
    """
    Run a command.

    Args:
        argv (`list[str]`, *optional*):
            Arguments after the program's name. Defaults to those of the process.

    Returns:
        `int`:
            Exit code.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return 0
    command, arguments = argv[0], argv[1:]
    try:
        if command in TRAINING_COMMANDS:
            return _launch(command, arguments)
        if command == "recipes":
            return run_recipes(arguments)
        if command in COMMANDS:
            return importlib.import_module(f".scripts.{command.replace('-', '_')}", __package__).run(arguments)
    except (ValueError, OSError) as error:
        print(f"trl-rkld {command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"trl-rkld {command}: interrupted", file=sys.stderr)
        return 130
    print(f"trl-rkld: there is no command `{command}`.\n\n{_usage()}", file=sys.stderr)
    return 2


def _usage() -> str:
    lines = [f"  {name:<11} {text}" for name, text in (TRAINING_COMMANDS | COMMANDS).items()]
    return "usage: trl-rkld <command> [--help] [arguments]\n\ncommands:\n" + "\n".join(lines)


def _launch(command: str, arguments: list[str]) -> int:
    from accelerate.commands.launch import launch_command, launch_command_parser
    from trl.cli.accelerate_config import resolve_accelerate_config_argument
    from trl.cli.commands.training import _subtract_subsequence

    arguments = resolve_recipe(arguments)
    module, first = script_of(command)
    parser = module.make_parser(*first, prog=f"trl-rkld {command}")
    *_, unknown_keys, launch_arguments = parser.parse_args_and_config(
        arguments, return_remaining_strings=True, separate_remaining_strings=True
    )
    if unknown_keys:
        # Also where accelerate would take it: a recipe says what is trained, the command line on how many devices.
        keys = ", ".join(f"`{key[2:]}`" for key in unknown_keys if key.startswith("--"))
        raise ValueError(
            f"unknown key in the config file: {keys}. Correct it; arguments of `accelerate launch`, such as "
            "--num_processes, go on the command line."
        )
    script_arguments = _subtract_subsequence(arguments, launch_arguments)
    launch = resolve_accelerate_config_argument(launch_arguments) + [module.__file__, *first, *script_arguments]
    try:
        launch_command(launch_command_parser().parse_args(launch))
    except subprocess.CalledProcessError as error:  # the script has said why
        return error.returncode
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
