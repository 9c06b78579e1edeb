"""The workspace as folders: where weights and tokenizer lie, the doors around them, links for LMDeploy's paths.

    DST/model_repository/turbomind/1/weights/             real     (with doors "text": <served name>/1/weights)
                        /preprocessing/1/tokenizer/       real     (with doors "text": <served name>/1/tokenizer)
                        /postprocessing/1/tokenizer       link
                        /<served name>/1/{weights,tokenizer}  links
    DST/triton_models/{weights,tokenizer,interactive,preprocessing,postprocessing}   links back

All links are relative and stay inside DST; those in model_repository stay inside model_repository, so that this folder can be
mounted or uploaded alone.
"""

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from turbotriton.contract.errors import ConfigError, TurbotritonError, WorkspaceError

__all__ = ["RESERVED_NAMES", "Layout", "check_served_name", "door_templates", "find_weights", "is_workspace", "write_doors"]

RESERVED_NAMES = ("turbomind", "preprocessing", "postprocessing")
TOP_LEVEL = frozenset({"model_repository", "triton_models", "service_docker_up.sh"})  # the last one: LMDeploy's


@dataclass(frozen=True, slots=True)
class Layout:
    """Paths of one workspace. `doors`: "all" or "text"."""

    root: Path
    served_name: str
    doors: str

    @property
    def repository(self) -> Path:
        return self.root / "model_repository"

    @property
    def weights(self) -> Path:
        return self.repository / ("turbomind" if self.doors == "all" else self.served_name) / "1" / "weights"

    @property
    def tokenizer(self) -> Path:
        return self.repository / ("preprocessing" if self.doors == "all" else self.served_name) / "1" / "tokenizer"


def check_served_name(name: str) -> None:
    """Raises ConfigError: tritonserver takes the name from the folder and clients put it into URLs."""
    if name in RESERVED_NAMES:
        raise ConfigError(f"--served-name is {name!r}; {', '.join(RESERVED_NAMES)} are the names of other doors, choose another")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ConfigError(
            f"--served-name is {name!r} (default: MODEL_NAME); use letters, digits, '.', '_' and '-', "
            "beginning with a letter or digit"
        )


def door_templates() -> Path:
    """The folders of `model_repository/` as installed."""
    return Path(__file__).parents[1] / "model_repository"


def is_workspace(path: Path) -> bool:
    """Made by us or by LMDeploy, and with nothing of anyone else's in its top folder."""
    names = {entry.name for entry in path.iterdir()}
    return names <= TOP_LEVEL and bool(names & {"model_repository", "triton_models"}) and find_weights(path) is not None


def find_weights(root: Path) -> Path | None:
    """The weights folder of a workspace of any layout, or None."""
    candidates = [root / "triton_models" / "weights", *sorted(root.glob("model_repository/*/1/weights")), root]
    return next((path.resolve() for path in candidates if (path / "config.ini").is_file()), None)


def write_doors(layout: Layout, templates: Path, *, model_name: str, tp: int, chat_template: str | None) -> None:
    """Copies the doors' folders from `templates`, fills in names and parameters, makes the links.

    Raises TurbotritonError when a template is absent: the installation is then incomplete.
    """
    names = {"text": layout.served_name}
    if layout.doors == "all":
        names = {"turbomind": "turbomind", "preprocessing": "preprocessing", "postprocessing": "postprocessing", **names}
    chat = {} if chat_template is None else {"chat_template": chat_template}
    parameters = {"turbomind": {"tensor_para_size": str(tp), "model_name": model_name, **chat}, "text": chat}
    for template, name in names.items():
        _copy_door(templates / template, layout.repository / name, name, parameters.get(template, {}))
    if layout.doors == "all":
        _link(layout.repository / "postprocessing" / "1" / "tokenizer", layout.tokenizer)
        _link(layout.repository / layout.served_name / "1" / "weights", layout.weights)
        _link(layout.repository / layout.served_name / "1" / "tokenizer", layout.tokenizer)
    old = layout.root / "triton_models"
    _link(old / "weights", layout.weights)
    _link(old / "tokenizer", layout.tokenizer)
    if layout.doors == "all":
        _link(old / "interactive", layout.repository / "turbomind")
        for name in ("preprocessing", "postprocessing"):
            _link(old / name, layout.repository / name)


def _copy_door(template: Path, target: Path, name: str, parameters: dict[str, str]) -> None:
    config, model = template / "config.pbtxt", template / "1" / "model.py"
    for path in (config, model):
        if not path.is_file():
            raise TurbotritonError(f"{path}: a door's template is missing; install turbotriton again")
    (target / "1").mkdir(parents=True, exist_ok=True)
    shutil.copyfile(model, target / "1" / "model.py")
    text, count = re.subn(r'(?m)^name:\s*"[^"]*"', f'name: "{name}"', config.read_text(encoding="utf-8"), count=1)
    if not count:
        raise WorkspaceError(f'{config}: has no line name: "..."; install turbotriton again')
    for key, value in parameters.items():
        text = text.rstrip("\n") + (
            f'\n\nparameters {{\n  key: "{key}"\n  value: {{\n    string_value: "{_escape(value)}"\n  }}\n}}\n'
        )
    (target / "config.pbtxt").write_text(text, encoding="utf-8")


def _escape(value: str) -> str:
    """For a protobuf text format string."""
    named = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"}
    return "".join(named.get(char) or (char if char >= " " and char != "\x7f" else f"\\{ord(char):03o}") for char in value)


def _link(link: Path, target: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(os.path.relpath(target, link.parent))
