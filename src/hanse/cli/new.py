"""``hanse new``."""

from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Final, Literal

from cyclopts import Parameter

from hanse.cli.output import TEXT, Output
from hanse.errors import ConfigError, Conflict
from hanse.ids import NAME_RULE, is_name

_SUFFIX: Final = ".txt"
"""What the files of a template end in beside their name: they are no modules of this package."""
_PLACE: Final = "NAME"


def new(
    folder: Annotated[Path, Parameter(help="The folder to make; its last part is the job's name.")],
    /,
    *,
    template: Annotated[
        Literal["numpy", "script"],
        Parameter(help="numpy: functions that train; script: a plain training script with four lines added."),
    ] = "numpy",
    output: Output = TEXT,
) -> None:
    """Make a job's folder that runs, to start from: 'hanse simulate FOLDER' runs it."""
    name = folder.absolute().name
    if not is_name(name):
        raise ConfigError("the folder's name", got=name, expected=NAME_RULE)
    made = {source.name.removesuffix(_SUFFIX): _text(source, name) for source in _files_of(template)}
    if folder.exists():
        raise Conflict(str(folder), state="there already", wanted="made")
    try:
        folder.mkdir(parents=True)
        for path, text in made.items():
            (folder / path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError("folder", got=str(folder), expected=f"one that can be made ({error.strerror})") from error
    if output.is_json:
        output.document({"folder": str(folder.absolute()), "name": name, "files": sorted(made)})
    else:
        output.say(f"{folder} has {', '.join(sorted(made))}", f"try it: hanse simulate {folder} --clients 3")


def _files_of(template: str) -> list[Traversable]:
    folder = files("hanse.cli") / "templates" / template
    return [entry for entry in folder.iterdir() if entry.name.endswith(_SUFFIX)]


def _text(source: Traversable, name: str) -> str:
    return source.read_text(encoding="utf-8").replace(_PLACE, name)
