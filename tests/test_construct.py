"""A section of the config becomes an object, or one clear sentence about why not."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import pytest
import yaml
from omegaconf import OmegaConf

from otcrl.construct import check_part, construct, construct_as, locate, settings_of, wired_parts
from otcrl.errors import ConfigError, DataError
from otcrl.presets import conf_dir, presets
from otcrl.protocols import RewardFn
from otcrl.rewards.otc import OTCReward

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Schedule:
    steps: int
    warmup: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Prize:
    alpha: float
    steps: int = 10
    weighting: Literal["token", "sequence"] = "token"
    tags: tuple[str, ...] = ()
    folder: Path | None = None
    schedule: Schedule | None = None
    correct: Callable[[str], float] = float
    weights: Tensor | None = None

    wired = frozenset({"correct", "weights"})

    def __post_init__(self) -> None:
        if self.alpha < 0:
            raise ValueError(f"alpha must not be negative, got {self.alpha}")
        if self.alpha > 100:
            raise DataError(f"alpha is off the chart: {self.alpha}")


@dataclass(frozen=True, kw_only=True)
class Needy:
    correct: Callable[[str], float]

    wired = frozenset({"correct"})


@dataclass(frozen=True, kw_only=True)
class Sum:
    parts: list[object]
    schedule: Schedule = Schedule(steps=1)


PRIZE = "tests.test_construct.Prize"


def test_a_section_becomes_its_target():
    assert construct({"_target_": PRIZE, "alpha": 0.5, "steps": 3}, "reward") == Prize(alpha=0.5, steps=3)


def test_a_section_without_target_becomes_the_class_the_code_knows():
    assert construct_as(Schedule, {"steps": 3, "warmup": 0.5}, "loop") == Schedule(steps=3, warmup=0.5)


def test_values_arrive_as_their_annotation_says():
    prize = construct({"_target_": PRIZE, "alpha": 1, "tags": ["a", "b"], "folder": "x/y"}, "reward")
    assert (prize.alpha, prize.tags, prize.folder) == (1.0, ("a", "b"), Path("x/y"))
    assert type(prize.alpha) is float


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 1, "steps": "abc"}, "reward.steps must be int, got 'abc'"),
        ({"alpha": 1, "steps": True}, "reward.steps must be int, got True"),
        ({"alpha": 1, "steps": 1.5}, "reward.steps must be int, got 1.5"),
        ({"alpha": "0.1"}, "reward.alpha must be float, got '0.1'"),
        (
            {"alpha": 1, "weighting": "tokens"},
            "reward.weighting must be 'token' or 'sequence', got 'tokens'. Did you mean 'token'?",
        ),
        ({"alpha": 1, "folder": 3}, "reward.folder must be Path | None, got 3"),
        ({"alpha": 1, "tags": "a.b"}, "reward.tags must be tuple[str, ...], got 'a.b': write [a.b]"),
        ({"alhpa": 1}, "reward.alhpa is not a setting of Prize. Did you mean 'alpha'?"),
        ({}, "reward.alpha is missing; Prize needs it"),
        ({"alpha": -1}, "reward: alpha must not be negative, got -1.0"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_wrong_is_said_with_its_name(settings: dict[str, object], message: str):
    with pytest.raises(ConfigError) as caught:
        construct({"_target_": PRIZE} | settings, "reward")
    assert str(caught.value) == message


def test_a_data_error_stays_one():
    with pytest.raises(DataError, match=r"^reward: alpha is off the chart: 101\.0$"):
        construct({"_target_": PRIZE, "alpha": 101}, "reward")


def test_wired_parts_go_in_as_they_are():
    assert construct({"_target_": PRIZE, "alpha": 1}, "reward", correct=len).correct is len


def test_a_wired_part_is_not_a_setting():
    with pytest.raises(ConfigError, match=r"reward\.correct is wired by otcrl, not a setting"):
        construct({"_target_": PRIZE, "alpha": 1, "correct": "max"}, "reward", correct=len)
    with pytest.raises(ConfigError, match=r"reward\.correct is not a setting of Prize"):
        construct({"_target_": PRIZE, "alpha": 1, "correct": "max"}, "reward")


def test_who_needs_no_part_goes_without():
    assert construct({"_target_": "tests.test_construct.Schedule", "steps": 1}, "x", correct=len) == Schedule(steps=1)


def test_a_part_that_nobody_wires_is_named():
    with pytest.raises(ConfigError, match=r"tool\.correct is a part that otcrl does not wire here; Needy needs it"):
        construct({"_target_": "tests.test_construct.Needy"}, "tool")


def test_nested_sections_come_first_and_share_the_parts():
    section = {"_target_": "tests.test_construct.Sum", "parts": [{"_target_": PRIZE, "alpha": 1}, 7]}
    total = construct(section, "reward", correct=len)
    assert total.parts == [Prize(alpha=1, correct=len), 7]


def test_a_mistake_in_a_nested_section_has_its_full_name():
    section = {"_target_": "tests.test_construct.Sum", "parts": [{"_target_": PRIZE, "alpha": "x"}]}
    with pytest.raises(ConfigError, match=r"^reward\.parts\[0\]\.alpha must be float, got 'x'$"):
        construct(section, "reward")


def test_a_dataclass_inside_is_held_to_the_same_rules():
    section = {"_target_": "tests.test_construct.Sum", "parts": [], "schedule": {"stps": 3}}
    with pytest.raises(ConfigError, match=r"x\.schedule\.stps is not a setting of Schedule\. Did you mean 'steps'\?"):
        construct(section, "x")


@pytest.mark.parametrize("value", [None, 5, "fast"])
def test_a_plain_value_where_a_section_belongs_is_refused(value: object):
    section = {"_target_": "tests.test_construct.Sum", "parts": [], "schedule": value}
    with pytest.raises(ConfigError, match=rf"x\.schedule must be a section of settings, got {value!r}"):
        construct(section, "x")


@dataclass(frozen=True, kw_only=True)
class Own(OTCReward):
    """A user's class, in a module that knows nothing of the types of what it inherits."""

    bonus: float


def test_settings_may_be_inherited_from_a_class_of_another_module():
    settings = yaml.safe_load((conf_dir() / "reward/otc_grpo.yaml").read_text())
    own = construct(settings | {"_target_": f"{__name__}.Own", "bonus": 1.0}, "reward", correct=lambda a, p: 1.0)
    assert (own.bonus, own.warmup.steps, own.price.tools) == (1.0, 0, {})


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("tests.test_construct.Prise", "tests.test_construct has nothing called 'Prise'. Did you mean 'Prize'?"),
        ("otcrl.rewads.otc.OTCReward", "no module named 'otcrl.rewads'. Did you mean 'rewards'?"),
        ("no_such_pkg.Reward", "no module named 'no_such_pkg'."),
        ("Reward", "must be a dotted path such as my_pkg.MyReward, got 'Reward'"),
        (None, "must be a dotted path such as my_pkg.MyReward, got None"),
    ],
)
def test_a_wrong_target_names_the_nearest_right_one(target: str | None, message: str):
    with pytest.raises(ConfigError) as caught:
        construct({"_target_": target}, "reward")
    assert str(caught.value).startswith("reward._target_")
    assert message in str(caught.value)


def test_a_component_whose_own_import_is_missing_says_which(tmp_path: Path):
    (tmp_path / "my_component.py").write_text("import no_such_package\n")
    code = "from otcrl.construct import construct; construct({'_target_': 'my_component.Thing'}, 'tool')"
    env = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(__file__).parents[1]}"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert "my_component needs the package 'no_such_package', which is not installed" in done.stderr


# -- the yaml is the manual: it lists every setting, no more and no fewer --------------------------------


def sections(node: object, where: str) -> Iterator[tuple[str, Mapping[str, object]]]:
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield where, node
        for key, value in node.items():
            yield from sections(value, f"{where}.{key}")
    if isinstance(node, list):
        for value in node:
            yield from sections(value, where)


def listed(section: Mapping[str, Any]) -> set[str]:
    """Its settings; a part that its defaults choose (`/reward@reward: outcome`) is one."""
    chosen = (key for entry in section.get("defaults", ()) if isinstance(entry, Mapping) for key in entry)
    return section.keys() - {"_target_", "defaults"} | {key.partition("@")[2] for key in chosen}


YAMLS = sorted(path for path in conf_dir().rglob("*.yaml") if path.parent.name != "experiment")


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: str(path.relative_to(conf_dir())))
def test_a_yaml_lists_exactly_the_settings_of_its_class(path: Path):
    content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    for where, section in sections(content, path.stem):
        cls = locate(section["_target_"], where)
        assert listed(section) == settings_of(cls).keys() - wired_parts(cls), where


@pytest.mark.parametrize("preset", presets(), ids=lambda preset: preset.name)
def test_a_preset_sets_only_what_exists(preset):
    from otcrl.compose import compose

    config = compose([], preset=preset.path)
    assert config["name"] == preset.name
    for where, section in sections(config, "config"):
        cls = locate(section["_target_"], where)
        assert section.keys() - {"_target_"} == settings_of(cls).keys() - wired_parts(cls), where


class Speaker(Protocol):
    def speak(self) -> str: ...


@dataclass(frozen=True, kw_only=True)
class Talk:
    speaker: Speaker | None = None


def test_a_part_that_is_a_protocol_may_be_null_but_no_plain_value():
    assert construct_as(Talk, {"speaker": None}, "talk") == Talk()
    with pytest.raises(ConfigError, match=r"talk\.speaker must be a section with a _target_, got 'loud'"):
        construct_as(Talk, {"speaker": "loud"}, "talk")


def test_a_part_of_ones_own_that_lacks_what_is_asked_of_it_is_told_what():
    class Mine:
        needs_groups = False

        def state_dict(self) -> dict[str, float]:
            return {}

    with pytest.raises(ConfigError, match="reward: Mine has no __call__, load_state_dict, which every RewardFn has"):
        check_part(Mine(), RewardFn, "reward")
