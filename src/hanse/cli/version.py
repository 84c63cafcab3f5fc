"""``hanse version``."""

import platform
from importlib.metadata import version as version_of

from hanse.cli.output import TEXT, Output
from hanse.messages import PROTOCOL_VERSIONS


def version(*, output: Output = TEXT) -> None:
    """Print the release."""
    release = version_of("hanse")
    if output.is_json:
        output.document({"release": release, "protocol": PROTOCOL_VERSIONS, "python": platform.python_version()})
    else:
        output.say(release)
