"""Put texts into the places of a template."""

import re
from collections.abc import Mapping

PLACE = re.compile(r"\{(\w+)\}")


def filled(template: str, values: Mapping[str, str]) -> str:
    """Put the values in the places of their names, as in `{question}`. Braces in the values stay as they are."""
    return PLACE.sub(lambda place: values.get(place[1], place[0]), template)
