"""conf/, a preset and the command line become one plain nested dict: past this file nobody sees Hydra.

Hydra composes from a directory staged for the occasion. It holds the primary config and, as
`experiment/chosen.yaml`, the preset; conf/, the directory of a preset given by path and the current one are
searched after it. So `reward=mine` finds reward/mine.yaml, as `_target_: mine.Reward` finds mine.py.
"""

from __future__ import annotations

import itertools
import re
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from otcrl.errors import ConfigError, nearest
from otcrl.presets import conf_dir, groups, options, shipped

OmegaConf.register_new_resolver(
    "shipped", lambda name: str(shipped(name)), replace=True
)  # ${shipped:tiny_qa/train.jsonl}

ENGINE = re.compile(r"^rollout\.engine(?=[.=])")  # where many look for it
REFUSED: dict[str, str] = dict.fromkeys(
    ("top_p", "top_k", "min_p"),
    "the learner sees the whole distribution, so it must be sampled from as a whole: there is no such setting, only "
    "rollout.temperature (docs/mismatch.md)",
)
KL = ("kl_coef", "kl_reward_coef")  # in the loss, in the reward
SIZES = ("context", "max_sequences", "batch_tokens")  # of an engine, whichever
OF_FILES = ("reader", "skip_bad_rows", "max_test")  # of a task, about the files that it reads
SEVERAL = "logger"  # a group of which several can be chosen: logger=[console,wandb]
Config = dict[str, Any]  # sections by name; plain values all the way down


def compose(overrides: Sequence[str], *, preset: Path | None = None, run: Path | None = None) -> Config:
    """The resolved config: config.yaml or what `run` was started with, then `preset`, then `overrides`.

    Raises ConfigError, one line, naming what is wrong and the nearest valid choice.
    """
    overrides = [ENGINE.sub("engine", text) for text in overrides]
    parsed = [parse(text) for text in overrides]
    for override in parsed:
        if override.is_sweep_override():
            key = override.get_key_element()
            raise ConfigError(f"{override.input_line!r} lists several values: add -m to run each, or write {key}=[...]")
        group = override.key_or_group
        if group in groups() and not override.is_delete() and not names(group, override.value()):
            raise ConfigError(f"{override.input_line!r}: {group} is chosen by name.{nearest('', options(group))}")
    whole = [override for override in parsed if not override.package]  # reward@reward.reward=NAME is a part of one
    chosen = {override.key_or_group: names(override.key_or_group, override.value()) for override in whole}
    if run and "scale" in chosen:
        raise ConfigError("scale is chosen as a run begins: with conf=..., not with one that is there")
    with staged(preset, run, chosen) as stage:
        config = compose_staged(stage, [*(sizes(run, chosen) if run else ()), *overrides])
    sections = [*known_sections()]
    for key in config:
        if key not in sections:
            raise ConfigError(f"{key} is not a section of the config.{nearest(key, sections)}")
    for key in sections:
        if key not in config:
            raise ConfigError(f"the config has no {key}")
    return config


def to_yaml(config: Config) -> str:
    """What `run` of `compose` reads back: a run directory keeps it as config.yaml."""
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True)


def expand(overrides: Sequence[str]) -> list[list[str]]:
    """The runs of a sweep, the last override changing fastest: ["a=1,2", "b=x"] -> [["a=1", "b=x"], ["a=2", "b=x"]]."""
    return [list(run) for run in itertools.product(*(values(parse(text)) for text in overrides))]


def values(override: Override) -> list[str]:
    line = override.input_line or ""
    if not override.is_sweep_override():
        return [line]
    if not (override.is_choice_sweep() or override.is_range_sweep()):
        raise ConfigError(f"{line!r}: a sweep is a list of values (1,2,3) or a range(start, stop)")
    try:
        return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
    except HydraException as error:
        raise ConfigError(f"{line!r}: {str(error).splitlines()[0]}") from error


def parse(text: str) -> Override:
    how = f"cannot read {text!r}: write key=value, a list as key=[1,2], text as key='a b'"
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException as error:
        raise ConfigError(how) from error
    if not override.key_or_group:
        raise ConfigError(how)
    return override


def quoted(text: str) -> str:
    """`text` as the value of an override, whatever characters it holds."""
    escaped = text.replace("'", "\\'")
    return f"'{escaped}'"


def names(group: str, value: object) -> list[str]:
    """What is chosen of a group: one thing, of loggers one or several. [] for what is no choice."""
    several = value if group == SEVERAL and isinstance(value, list) else [value]
    return [str(name) for name in several] if all(isinstance(name, str) for name in several) else []


def known_sections() -> list[str]:
    primary = OmegaConf.load(conf_dir() / "config.yaml")
    return [*(str(key) for key in primary if key != "defaults"), *groups()]


# -- staging --------------------------------------------------------------------------------------


@contextmanager
def staged(preset: Path | None, run: Path | None, chosen: Mapping[str, Sequence[str]]) -> Iterator[Path]:
    """A directory for Hydra to start from, gone afterwards."""
    primary = saved(run, chosen) if run else load(conf_dir() / "config.yaml")
    search = [conf_dir(), Path.cwd()]
    with tempfile.TemporaryDirectory(prefix="otcrl-") as directory:
        stage = Path(directory)
        if preset:
            search.insert(1, preset.parent.parent if preset.parent.name == "experiment" else preset.parent)
            stage.joinpath("experiment").mkdir()
            stage_preset(preset, stage / "experiment/chosen.yaml", chosen, search)
            primary["defaults"][primary["defaults"].index({"experiment": None})] = {"experiment": "chosen"}
        for name in chosen.get("scale", ()):
            stage_scale(name, stage, effective_choices(preset, search), chosen, search)
        check_own(chosen, search[1:])
        primary["hydra"] = {"searchpath": [f"file://{path.absolute()}" for path in search]}
        stage.joinpath("config.yaml").write_text(yaml.safe_dump(primary, sort_keys=False))
        yield stage


def stage_preset(
    preset: Path,
    copy: Path,
    chosen: Mapping[str, Sequence[str]],
    search: Sequence[Path],
    above: frozenset[Path] = frozenset(),  # those that are based on it
) -> None:
    """A copy of the preset for Hydra, and of the presets that it is based on (`defaults: [search_r1_grpo, ...]`).

    `chosen` holds the choices of whoever comes later: the command line, and a preset for those that it is based on.
    """
    if preset in above:
        raise ConfigError(f"{preset} is based on itself")
    content = load(preset)  # a syntax error names the user's file, not our copy of it
    text = yaml.safe_dump(fitting(content, chosen, search), sort_keys=False, allow_unicode=True)
    copy.write_text("# @package _global_\n" + text)
    bases, choices = defaults(content)
    for base in bases:
        if path := found_in(search, f"experiment/{base}.yaml"):
            stage_preset(path, copy.with_name(path.name), {**choices, **chosen}, search, above | {preset})


def stage_scale(
    name: str,
    stage: Path,
    before: Mapping[str, Sequence[str]],
    chosen: Mapping[str, Sequence[str]],
    search: Sequence[Path],
) -> Mapping[str, Sequence[str]]:
    """A copy of conf/scale/NAME.yaml for Hydra, and of those that it is based on, with what the parts of a run have.

    `before` are the choices that it finds, `chosen` those of the command line: `scale=8gpus engine=vllm_servers`.
    Returns its own.
    """
    if (path := found_in(search, f"scale/{name}.yaml")) is None:
        return {}  # Hydra says so
    content = load(path)
    bases, own = defaults(content)
    choices: Mapping[str, Sequence[str]] = own
    for base in bases:
        choices = {**stage_scale(base, stage, {**before, **choices}, chosen, search), **choices}
    text = yaml.safe_dump(fitting(content, {**before, **choices, **chosen}, search), sort_keys=False)
    stage.joinpath("scale").mkdir(exist_ok=True)
    stage.joinpath(f"scale/{name}.yaml").write_text("# @package _global_\n" + text)
    return choices


def effective_choices(preset: Path | None, search: Sequence[Path]) -> dict[str, list[str]]:
    """What a preset chooses of each group, or config.yaml."""
    content = load(preset) if preset else {}
    return {group: effective(content, group, search) for group in ("engine", "model")}


def defaults(content: Config) -> tuple[list[str], dict[str, list[str]]]:
    """The files that a yaml is based on, and its choices of groups."""
    entries = content.get("defaults") or []
    if not isinstance(entries, list) or not all(isinstance(entry, str | dict) for entry in entries):
        raise ConfigError(f"defaults must be a list of presets and choices, [quickstart, _self_], got {entries!r}")
    bases = [entry for entry in entries if isinstance(entry, str) and entry != "_self_"]
    pairs = [pair for entry in entries if isinstance(entry, dict) for pair in entry.items()]
    several = {key: choice if isinstance(choice, list) else [choice] for key, choice in pairs}
    return bases, {key.removeprefix("override /"): list(map(str, choices)) for key, choices in several.items()}


def check_own(chosen: Mapping[str, Sequence[str]], search: Sequence[Path]) -> None:
    """Raises ConfigError for the name of a user's yaml that one of otcrl's has too: neither must win unsaid."""
    shipped = conf_dir().resolve()
    of_user = [root for root in search if root.resolve() != shipped]
    for group in chosen.keys() & groups():
        for name in chosen[group]:
            own = found_in(of_user, f"{group}/{name}.yaml")
            if own is not None and name in options(group):
                raise ConfigError(f"{group}={name}: otcrl has one, and so have you: rename {own}")


def fitting(preset: Config, chosen: Mapping[str, Sequence[str]], search: Sequence[Path]) -> Config:
    """The preset, where a group is chosen anew without those of its settings that the new choice does not have.

    `conf=quickstart algo=rloo`: quickstart's algo.weighting was said of GRPO.
    """
    fit = dict(preset)
    for group in groups():
        own = [keys for name in chosen.get(group, ()) if (keys := keys_of(group, name, search)) is not None]
        if own and isinstance(preset.get(group), dict):
            keys = set().union(*own)
            is_another = list(chosen[group]) != effective(preset, group, search)
            section = of_any_algorithm(preset[group]) if group == "algo" and is_another else preset[group]
            fit[group] = {key: value for key, value in section.items() if key in keys}
    return fit


def of_any_algorithm(section: Config) -> Config:
    """Without what each algorithm means otherwise: where it clips, and where it charges KL, if it does."""
    own = {"clip_low", "clip_high"}
    if any(section.get(key) for key in KL):
        own |= {*KL}
    return {key: value for key, value in section.items() if key not in own}


def effective(preset: Config, group: str, search: Sequence[Path]) -> list[str]:
    """A preset's own choice of a group, or that of what it is based on."""
    bases, choices = defaults(preset)
    if group in choices:
        return choices[group]
    for base in bases:
        if path := found_in(search, f"experiment/{base}.yaml"):
            return effective(load(path), group, search)
    return next((names for name, names in defaults(load(conf_dir() / "config.yaml"))[1].items() if name == group), [])


def keys_of(group: str, choice: str, search: Sequence[Path]) -> set[str] | None:
    """The settings of a choice of a group, with those of the files that it is based on; None if there is no file."""
    path = found_in(search, f"{group}/{choice}.yaml")
    if path is None:
        return None
    content = load(path)
    bases, choices = defaults(content)
    parts = {key.partition("@")[2] for key in choices if "@" in key}  # /reward@reward: the section that it becomes
    return {*content, *parts, *(key for base in bases for key in keys_of(group, base, search) or ())}


def found_in(search: Sequence[Path], name: str) -> Path | None:
    return next((root / name for root in search if (root / name).is_file()), None)


def saved(run: Path, overridden: Collection[str]) -> Config:
    """What `run` was started with, as a primary config. A group that is chosen anew replaces its section."""
    path = run / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{run} is not a run directory: it has no config.yaml")
    kept = {key: value for key, value in load(path).items() if key not in groups() or key not in overridden}
    return {"defaults": ["_self_", *({group: None} for group in groups()), {"experiment": None}], **kept}


def sizes(run: Path, chosen: Mapping[str, Sequence[str]]) -> list[str]:
    """What a run's engine could hold, as overrides for another one: its trajectories are as long."""
    engine = load(run / "config.yaml").get("engine") or {}
    known = [keys_of("engine", name, [conf_dir(), Path.cwd()]) or set() for name in chosen.get("engine", ())]
    kept = [key for key in SIZES if engine.get(key) is not None and any(key in keys for keys in known)]
    return [f"engine.{key}={engine[key]}" for key in kept]


def load(path: Path) -> Config:
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise ConfigError(f"{path}:{line}: {error.problem}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold settings (key: value), got a {type(content).__name__}")
    return {str(key): value for key, value in content.items()}


# -- errors ---------------------------------------------------------------------------------------


def compose_staged(stage: Path, overrides: Sequence[str], *, whole: bool = True) -> Config:
    """`whole`: a setting that has no value yet is an error."""
    try:
        with hydra.initialize_config_dir(str(stage), version_base=None):
            composed = hydra.compose("config", overrides=list(overrides))
        content = OmegaConf.to_container(composed, resolve=whole, throw_on_missing=whole)
    except MissingConfigException as error:
        group, _, choice = (error.missing_cfg_file or "").rpartition("/")
        found = {*options(group), *(error.options or [])}
        raise ConfigError(f"{group}={choice}: there is no such yaml.{nearest(choice, found)}") from error
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise explained(error, stage, overrides) from error
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def explained(error: Exception, stage: Path, overrides: Sequence[str]) -> ConfigError:
    """Hydra's paragraph as one line."""
    lines = [line.strip() for line in str(error).splitlines()]
    if unchosen := re.match(r"You must specify '(.+?)'", lines[0]):
        group = unchosen[1]
        return ConfigError(f"no {group} is chosen: add {group}=NAME.{nearest('', options(group))}")
    if unknown := re.match(r"Could not (?:override|delete) '(.+?)'", lines[0]):
        key = getattr(error.__cause__, "full_key", None) or unknown[1]
        if reason := REFUSED.get(key.rpartition(".")[2]):
            return ConfigError(f"{key}: {reason}")
        choices = [text for text in overrides if parse(text).key_or_group in groups()]
        if len(choices) < len(overrides):
            known = compose_staged(stage, choices, whole=False)
            return ConfigError(f"{key} is not a setting.{nearest_setting(key, known)}")
    if isinstance(error, MissingMandatoryValue):
        return ConfigError(f"{error.full_key} is not set: add {error.full_key}=...")
    if missing := getattr(error, "full_key", None):
        return ConfigError(f"{missing}: {lines[0]}")
    return ConfigError(lines[0])


def nearest_setting(key: str, config: Config) -> str:
    """A hint from the settings beside `key`, else those of its name elsewhere, else the sections."""
    known = [*dotted(config), "scale"]  # which leaves nothing of its name in the config
    parent, _, leaf = key.rpartition(".")
    beside = [name for name in known if name.rpartition(".")[0] == parent]
    elsewhere = [name for name in known if name.rpartition(".")[2] == leaf]
    return nearest(key, (beside if parent else elsewhere) or elsewhere or beside)


def dotted(node: Mapping[str, object], prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        yield f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from dotted(value, f"{prefix}{key}.")
