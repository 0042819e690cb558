"""Where conf/ is and which presets it holds: plain file names, so that `--help` need not load Hydra."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from otcrl.errors import ConfigError, nearest

SUFFIXES = (".yaml", ".yml")
NO_SECTIONS = ("experiment", "scale", "encoder")  # presets of whole runs, and of a part that several sections have


@dataclass(frozen=True, slots=True)
class Preset:
    name: str
    path: Path
    summary: str  # its first comment; "" if it has none


def conf_dir() -> Path:
    """The directory of config.yaml: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).parent
    shipped = package / "conf"
    return shipped if shipped.is_dir() else package.parent / "conf"


def shipped(name: str) -> Path:
    """A file of the small data that otcrl has with it, e.g. tiny_qa/train.jsonl."""
    return Path(__file__).parent / "small" / name


def options(group: str, root: Path | None = None) -> list[str]:
    """The choices of a group, e.g. `algo` -> ["grpo", "ppo"]; [] if it is no group."""
    return sorted(path.stem for path in (root or conf_dir()).joinpath(group).glob("*.yaml"))


def groups() -> list[str]:
    """Sections that are chosen by name: algo, reward, task, ..."""
    return sorted(path.name for path in conf_dir().iterdir() if path.is_dir() and path.name not in NO_SECTIONS)


def presets() -> list[Preset]:
    """What `conf=NAME` can name."""
    return [Preset(path.stem, path, summary(path)) for path in sorted(conf_dir().glob("experiment/*.yaml"))]


def summary(path: Path) -> str:
    comments = (line.lstrip("# ") for line in path.read_text().splitlines() if line.startswith("#"))
    return next((text for text in comments if not text.startswith("@package")), "")


def find_preset(conf: str) -> Path:
    """The file that `conf=` names: a preset, or any YAML file by its path."""
    if conf.endswith(SUFFIXES):
        path = Path(conf).expanduser()
        if not path.is_file():
            raise ConfigError(f"conf={conf}: there is no such file")
        return path.resolve()
    known = {preset.name: preset.path for preset in presets()}
    if conf not in known:
        raise ConfigError(f"conf={conf}: there is no such preset.{nearest(conf, known)}")
    return known[conf]
