"""Completion for shells. `otcrl completion bash|zsh|fish` prints a script, which at the press of the key asks
`otcrl completion suggest` with the line so far in OTCRL_LINE.

What there is to choose is read from the usage lines of the commands and from conf/, so it is never out of date. The
yaml files are merged here as far as names go: Hydra takes most of a second to load.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from otcrl.errors import ConfigError, nearest
from otcrl.manual import COMMANDS, Command
from otcrl.presets import conf_dir, groups, options, presets
from otcrl.settings import leaves

Config = dict[str, Any]

BASH = r"""# bash completion of otcrl: source <(otcrl completion bash)
_otcrl() {
    local line=${COMP_LINE:0:COMP_POINT} head i
    mapfile -t COMPREPLY < <(OTCRL_LINE=$line "${COMP_WORDS[0]}" completion suggest 2>/dev/null)
    local word=${line##*[[:space:]]} current=${COMP_WORDS[COMP_CWORD]}
    # bash takes = and : for the end of a word, and what is before the last of them stays as it is
    if [[ $current == [=:] ]]; then current=; fi
    head=${word%"$current"}
    for i in "${!COMPREPLY[@]}"; do COMPREPLY[i]=${COMPREPLY[i]#"$head"}; done
}
complete -o nospace -o default -F _otcrl otcrl
"""
ZSH = r"""#compdef otcrl
# zsh completion of otcrl: otcrl completion zsh > "${fpath[1]}/_otcrl"
_otcrl() {
    local -a found
    found=("${(@f)$(OTCRL_LINE="${(j: :)words[1,CURRENT-1]} $PREFIX" "${words[1]}" completion suggest 2>/dev/null)}")
    found=("${(@)found:#}")
    if (( ${#found} )); then compadd -Q -S '' -- "${found[@]}"; else _files; fi
}
if [[ $funcstack[1] == _otcrl ]]; then _otcrl "$@"; else compdef _otcrl otcrl; fi
"""
FISH = r"""# fish completion of otcrl: otcrl completion fish > ~/.config/fish/completions/otcrl.fish
function __otcrl_suggest
    set -lx OTCRL_LINE (commandline -cp)
    set -l program (commandline -opc)[1]
    $program completion suggest 2>/dev/null | string trim --right
end
complete -c otcrl -a '(__otcrl_suggest)'
"""
SCRIPTS = {"bash": BASH, "zsh": ZSH, "fish": FISH}


def run(words: Sequence[str]) -> int:
    if list(words) == ["suggest"]:
        for suggestion in suggestions(os.environ.get("OTCRL_LINE", "")):
            print(suggestion)
        return 0
    shell = words[0] if len(words) == 1 else ""
    if shell not in SCRIPTS:
        raise ConfigError(f"otcrl completion needs the name of a shell, got {' '.join(words) or 'none'}."
                          f"{nearest(shell, SCRIPTS)}")  # fmt: skip
    print(SCRIPTS[shell], end="")
    return 0


def suggestions(line: str) -> list[str]:
    """For the last word of `line`, which may be empty. A word that is complete ends with a space."""
    *before, current = line.split(" ")
    words = [word for word in before if word][1:]  # without the program
    if not words:
        found = [f"{name} " for name in (*COMMANDS, "--help")]
    elif words[0] not in COMMANDS:
        found = []
    elif current.startswith("-"):
        found = [f"{flag} " for flag in (*COMMANDS[words[0]].flags, "--help")]
    else:
        found = of_command(COMMANDS[words[0]], words[1:], current)
    return [word for word in dict.fromkeys(found) if word.startswith(current)]


def of_command(command: Command, words: Sequence[str], current: str) -> list[str]:
    key, is_setting, value = current.partition("=")
    config = composed(words) if command.lists_presets else {}
    if is_setting:
        return [f"{key}={choice}" for choice in values(command, config, key, value)]
    own = [f"{name}=" for name in re.findall(r"(?<![\w.])([a-z_]+)=", command.usage) if name != "key"]
    chosen = [f"{name}=" for name in (*groups(), "scale")] if command.lists_presets else []
    return [*positional(command, current), *own, *chosen, *next_level(dict(leaves(config)), current)]


# -- what a usage line says ---------------------------------------------------------------------------------


def positional(command: Command, current: str) -> list[str]:
    """`python|retrieval` at the beginning of a line, and lists of names: `questions:  nq triviaqa ...`."""
    found: list[str] = []
    for line in command.usage.splitlines():
        first = re.sub(r"^\s*otcrl \w+ ", "", line).partition(" ")[0]
        found += re.findall(r"[\w-]+", first) if re.fullmatch(r"[a-z0-9_|-]+", first) else []
        if listed := re.fullmatch(r"\s+[a-z ]+:\s+([a-z0-9_ ]+)", line):
            found += listed[1].split()
    head = "".join(current.rpartition(",")[:2])  # nq,hot...
    return [f"{head}{name} " for name in found]


def choices(command: Command, key: str) -> list[str]:
    """`format=markdown|latex|csv`, and what is there by default: `port=8080`."""
    said = re.search(rf"(?<![\w.]){re.escape(key)}=([a-z0-9_.|-]+)", command.usage)
    return said[1].strip(".").split("|") if said and "..." not in said[1] else []


# -- what conf/ says ----------------------------------------------------------------------------------------


def values(command: Command, config: Config, key: str, value: str) -> Iterator[str]:
    """Complete ones end with a space."""
    if key == "conf":
        yield from (f"{preset.name} " for preset in presets())
    elif key in ("run", "resume"):
        yield from (("auto ", "never ") if key == "resume" else ())
        yield from (f"{path.parent} " for path in sorted(Path().glob("runs/*/config.yaml")))
    elif key == "logger" and value.startswith("["):
        head = re.sub(r"[^,\[]*$", "", value)
        yield from (f"{head}{name}" for name in options(key) if name not in head)
    elif key in (*groups(), "scale"):
        yield from (f"{name} " for name in options(key))
    elif command.lists_presets and key in (known := dict(leaves(config))):
        yield from (f"{shown} " for shown in written(known[key]))
    else:
        yield from (f"{choice} " for choice in choices(command, key))


def written(value: object) -> list[str]:
    """How a setting is typed: both booleans, else what it is now. [] for what a shell would need quotes for."""
    if isinstance(value, bool):
        return ["true", "false"]
    text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":")).replace('"', "")
    return [text] if re.fullmatch(r"[\w.,:/+\[\]-]+", text) else []


def next_level(names: Iterable[str], current: str) -> list[str]:
    """`lo` -> `loop.`, `loop.st` -> `loop.steps=`."""
    found = []
    for name in names:
        if name.startswith(current):
            section, dot, _ = name[len(current) :].partition(".")
            found.append(f"{current}{section}." if dot else f"{name}=")
    return found


def composed(words: Sequence[str]) -> Config:
    """The config as far as `words` choose it, with the values of the yaml files; what cannot be read is left out."""
    typed = dict(word.split("=", 1) for word in words if "=" in word)
    run = Path(typed.get("run", typed.get("resume", "")), "config.yaml")
    if "conf" not in typed and run.is_file():
        return read(run)
    primary = read(conf_dir() / "config.yaml")
    named = overlay("experiment", typed.get("conf"))
    overlays = [named, scale := overlay("scale", typed.get("scale"))]
    entries = [entry for entry in primary.pop("defaults") if isinstance(entry, dict)]
    entries += [entry for each in overlays for entry in each.pop("defaults", [])]
    chosen = {key.removeprefix("override /"): name for entry in entries for key, name in entry.items()}
    chosen |= {group: name for group, name in typed.items() if group in groups()}
    sections: Config = {}
    for group in groups():
        for name in str(chosen.get(group)).strip("[]").split(","):
            sections = merged(sections, {group: section(group, name)})
        if group in typed and group in named:
            named[group] = fitting(named[group], sections[group])
        if group in scale:
            scale[group] = fitting(scale[group], sections[group])
    for each in overlays:
        primary = merged(primary, each)
    return merged(sections, primary)


def fitting(overlay: Any, node: Config) -> Config:
    """What a preset says of settings that a section has which was chosen anew."""
    return {key: value for key, value in overlay.items() if key in node} if isinstance(overlay, dict) else {}


def section(group: str, name: str) -> Config:
    """A yaml of a group, on top of those that it is made of."""
    node = read(conf_dir() / group / f"{name}.yaml")
    below: Config = {}
    for part in node.pop("defaults", []):
        below = merged(below, section(group, part)) if isinstance(part, str) and part != "_self_" else below
    return merged(below, node)


def overlay(folder: str, name: str | None) -> Config:
    """A preset or a scale, on top of those that it is based on; `defaults` are the choices of them all."""
    if name is None:
        return {}
    node = read(Path(name) if name.endswith((".yaml", ".yml")) else conf_dir() / folder / f"{name}.yaml")
    entries = node.pop("defaults", [])
    own = [entry for entry in entries if isinstance(entry, dict)]
    chosen = {key.removeprefix("override /"): choice for entry in own for key, choice in entry.items()}
    below: Config = {"defaults": []}
    for base in entries:
        if isinstance(base, str) and base != "_self_":
            part = overlay(folder, base)
            part |= {
                group: fitting(part[group], section(group, chosen[group])) for group in chosen.keys() & part.keys()
            }
            below = merged(below, part) | {"defaults": [*below["defaults"], *part.get("defaults", [])]}
    return merged(below, node) | {"defaults": [*below["defaults"], *own]}


def merged(below: Config, above: Config) -> Config:
    both = dict(below)
    for key, value in above.items():
        is_section = isinstance(value, dict) and isinstance(both.get(key), dict)
        both[key] = merged(both[key], value) if is_section else value
    return both


def read(path: Path) -> Config:
    import yaml

    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):  # half a name, or a user's file that is being written
        return {}
    return content if isinstance(content, dict) else {}
