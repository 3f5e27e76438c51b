"""Completion scripts, written from the parser so that they cannot fall behind it.

Commands, options and names of loaded models are completed; where a command takes a file, the
shell's own completion of files does.
"""

import argparse
from collections.abc import Mapping
from shlex import quote

from graphoptd.ctl.parser import SHELLS, build_parser

_MODELS = "graphoptctl models -q 2>/dev/null"


def script(shell: str) -> str:
    """The script for bash, zsh or fish."""
    makers = dict(zip(SHELLS, (_bash, _zsh, _fish), strict=True))
    return makers[shell](_commands())


def _commands() -> Mapping[str, tuple[str, list[str], bool]]:
    """Help, options and whether models are named, by command."""
    parser = build_parser()
    (commands,) = (
        action for action in parser._actions if isinstance(action, argparse._SubParsersAction)
    )
    says = {choice.dest: choice.help or "" for choice in commands._choices_actions}
    return {
        name: (
            says[name],
            [text for action in command._actions for text in action.option_strings],
            any(action.dest == "model" for action in command._actions),
        )
        for name, command in commands.choices.items()
    }


def _bash(commands: Mapping[str, tuple[str, list[str], bool]]) -> str:
    cases = "\n".join(
        f"    {name}) options='{' '.join(options)}'; models={int(takes_model)} ;;"
        for name, (_, options, takes_model) in commands.items()
    )
    return f"""\
# graphoptctl completion for bash: source this, or put it into bash-completion's folder.
_graphoptctl() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} command= options= models=0 i
  for ((i = 1; i < COMP_CWORD; i++)); do
    case ${{COMP_WORDS[i]}} in
      --socket|--timeout) ((i++)) ;;
      -*) ;;
      *) command=${{COMP_WORDS[i]}}; break ;;
    esac
  done
  if [[ -z $command ]]; then
    COMPREPLY=($(compgen -W '{" ".join(commands)} --socket --json --timeout --help' -- "$word"))
    return
  fi
  case $command in
{cases}
  esac
  if [[ $word == -* ]]; then
    COMPREPLY=($(compgen -W "$options" -- "$word"))
  elif ((models)); then
    COMPREPLY=($(compgen -W "$({_MODELS})" -- "$word") $(compgen -f -- "$word"))
  else
    COMPREPLY=($(compgen -f -- "$word"))
  fi
}}
complete -o filenames -F _graphoptctl graphoptctl
"""


def _zsh(commands: Mapping[str, tuple[str, list[str], bool]]) -> str:
    listed = "\n".join(f"    {quote(f'{name}:{says}')}" for name, (says, _, _) in commands.items())
    cases = "\n".join(
        f"    {name}) options=({' '.join(options)}); models={int(takes_model)} ;;"
        for name, (_, options, takes_model) in commands.items()
    )
    return f"""\
#compdef graphoptctl
# graphoptctl completion for zsh: put this as _graphoptctl into a folder of $fpath.
_graphoptctl() {{
  local -a commands options
  local models=0
  commands=(
{listed}
  )
  if ((CURRENT == 2)); then
    _describe command commands
    return
  fi
  case $words[2] in
{cases}
  esac
  if [[ $PREFIX == -* ]]; then
    compadd -- $options
    return
  fi
  ((models)) && compadd -- ${{(f)"$({_MODELS})"}}
  _files
}}
compdef _graphoptctl graphoptctl
"""


def _fish(commands: Mapping[str, tuple[str, list[str], bool]]) -> str:
    lines = ["# graphoptctl completion for fish: put this into ~/.config/fish/completions."]
    for name, (says, options, takes_model) in commands.items():
        told = quote(says)
        lines.append(f"complete -c graphoptctl -n __fish_use_subcommand -f -a {name} -d {told}")
        seen = f"-n '__fish_seen_subcommand_from {name}'"
        for option in options:
            kind = f"-l {option[2:]}" if option.startswith("--") else f"-s {option[1:]}"
            lines.append(f"complete -c graphoptctl {seen} {kind}")
        if takes_model:
            lines.append(f"complete -c graphoptctl {seen} -a '({_MODELS})'")
    return "\n".join(lines) + "\n"
